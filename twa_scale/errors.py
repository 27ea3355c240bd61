"""Errors that a user can cause. Each message names what is wrong, the rule that it breaks, and the fix."""


class TwaError(Exception):
    """Base of every error that twa_scale raises for bad input; anything else that escapes is our bug."""

    agreed = False
    """Whether every rank of the group raises this same error, so that one of them may speak for all."""


class ConfigError(TwaError):
    """A configuration value, key or combination that cannot be run."""


class CandidateError(TwaError):
    """A candidate that is missing, damaged, or does not fit the model or the other candidates."""


class EngineError(TwaError):
    """A model that is wrapped in a way that no engine here can read and write."""


class OutputError(TwaError):
    """A result that could not be written; what stood at the target is as it was."""


class StateError(TwaError):
    """A saved state that does not belong to this run."""


class NotFiniteError(TwaError):
    """Training has diverged: a gradient or weights are not finite. Coefficients and weights are as before the step."""


class RankError(TwaError):
    """A rank does not take part in a collective: it has failed, hangs, has ended, or runs other code."""
