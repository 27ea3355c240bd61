"""Which rank this process is, how ranks find each other, and what they sum and exchange."""

from twa_scale.ranks.block_exit import Departures
from twa_scale.ranks.consistency import Difference, first_difference, require_same_settings
from twa_scale.ranks.failures import is_broken, last_words, waiting
from twa_scale.ranks.group import Group
from twa_scale.ranks.pods import Pods
from twa_scale.ranks.process_exit import Ended, end, ended_by_signals
from twa_scale.ranks.reduction import Reduction
from twa_scale.ranks.timeouts import limit_waiting
from twa_scale.ranks.world import World

__all__ = [
    "Departures",
    "Difference",
    "Ended",
    "Group",
    "Pods",
    "Reduction",
    "World",
    "end",
    "ended_by_signals",
    "first_difference",
    "is_broken",
    "last_words",
    "limit_waiting",
    "require_same_settings",
    "waiting",
]
