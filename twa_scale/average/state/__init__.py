"""The state that a run continues from: its file, its schema, and its comparison with the run."""

from twa_scale.average.state.file import (
    PREVIOUS,
    STATE,
    forget_state,
    has_state,
    keep_loaded,
    load_state,
    remove_unused_rows,
    require_stored_rows,
    save_state,
)
from twa_scale.average.state.form import StateForm
from twa_scale.average.state.run_settings import require_same_settings, require_same_shapes, require_same_state
from twa_scale.average.state.schema import (
    VERSION,
    AverageState,
    KeptState,
    RateState,
    RowsState,
    RunState,
    StoredRows,
    checked,
)

__all__ = [
    "PREVIOUS",
    "STATE",
    "VERSION",
    "AverageState",
    "KeptState",
    "RateState",
    "RowsState",
    "RunState",
    "StateForm",
    "StoredRows",
    "checked",
    "forget_state",
    "has_state",
    "keep_loaded",
    "load_state",
    "remove_unused_rows",
    "require_same_settings",
    "require_same_shapes",
    "require_same_state",
    "require_stored_rows",
    "save_state",
]
