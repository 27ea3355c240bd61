"""Errors that a user can cause. Each message names what is wrong, the rule that it breaks, and the fix."""


class TwaError(Exception):
    """Base class of all errors that twa_scale raises for bad input. Other errors are bugs of twa_scale."""

    agreed = False
    """Whether every rank of the group raises this error, so that one of them can report it for all."""


class ConfigError(TwaError):
    """A configuration value, key or combination that cannot be run."""


class CandidateError(TwaError):
    """A candidate that is missing, damaged, or does not fit the model or the other candidates."""


class EngineError(TwaError):
    """A model that is wrapped in a way that no engine here can read and write."""


class OutputError(TwaError):
    """A result that could not be written. An earlier output at the target is unchanged."""


class StateError(TwaError):
    """A saved state that does not belong to this run."""


class NotFiniteError(TwaError):
    """A gradient or weights are not finite. Coefficients and weights are those before the step."""


class RankError(TwaError):
    """A rank does not take part in a collective: it has failed, hangs, has ended, or runs other code."""
