"""The configuration: one schema for Python, YAML files and the command line. It does not import torch."""

from twa_scale.config.average import TwaConfig
from twa_scale.config.center import (
    Center,
    candidate_index,
    center_weights,
    of_sum_one,
    parse_center,
)
from twa_scale.config.deepspeed_block import BLOCK, block_settings
from twa_scale.config.load import dump, flattened, load_config, validated
from twa_scale.config.optimizers import OptimizerConfig
from twa_scale.config.recipes import RecipeName, recipe_line
from twa_scale.config.run import TIMEOUT, RunConfig, TaskConfig
from twa_scale.config.schedule import ScheduleConfig
from twa_scale.config.section import Count, Section
from twa_scale.config.select import Order, SelectConfig

__all__ = [
    "BLOCK",
    "TIMEOUT",
    "Center",
    "Count",
    "OptimizerConfig",
    "Order",
    "RecipeName",
    "RunConfig",
    "ScheduleConfig",
    "Section",
    "SelectConfig",
    "TaskConfig",
    "TwaConfig",
    "block_settings",
    "candidate_index",
    "center_weights",
    "dump",
    "flattened",
    "load_config",
    "of_sum_one",
    "parse_center",
    "recipe_line",
    "validated",
]
