"""Ranks: process groups and their rendezvous, collectives on small data, reductions, failures, process exit.

Start with `world.py` (the rank of this process and its process group) and `ranks.py` (what ranks exchange, and errors
on all of them).
"""

from twa_scale.ranks.block_exit import BlockExits
from twa_scale.ranks.consistency import Difference, first_difference, require_same_settings
from twa_scale.ranks.failures import is_collective_failure, publish_failure, rank_errors
from twa_scale.ranks.group import Group
from twa_scale.ranks.pods import Pods
from twa_scale.ranks.process_exit import SignalExit, exit_on_signals, exit_process
from twa_scale.ranks.ranks import Ranks
from twa_scale.ranks.reduction import Reduction
from twa_scale.ranks.timeouts import set_collective_timeout
from twa_scale.ranks.world import World

__all__ = [
    "BlockExits",
    "Difference",
    "Group",
    "Pods",
    "Ranks",
    "Reduction",
    "SignalExit",
    "World",
    "exit_on_signals",
    "exit_process",
    "first_difference",
    "is_collective_failure",
    "publish_failure",
    "rank_errors",
    "require_same_settings",
    "set_collective_timeout",
]
