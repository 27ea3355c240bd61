"""What a run leaves behind to be continued: a checked file, and the fingerprint of its candidates."""

from twa_scale.state.file import PREVIOUS, STATE, load_state, save_state
from twa_scale.state.fingerprint import Fingerprint, fingerprint_of
from twa_scale.state.form import StateForm
from twa_scale.state.schema import VERSION, AverageState, KeptState, RunState, checked
from twa_scale.state.settings import require_same_settings, require_same_shapes, require_same_state

__all__ = [
    "PREVIOUS",
    "STATE",
    "VERSION",
    "AverageState",
    "Fingerprint",
    "KeptState",
    "RunState",
    "StateForm",
    "checked",
    "fingerprint_of",
    "load_state",
    "require_same_settings",
    "require_same_shapes",
    "require_same_state",
    "save_state",
]
