"""Settings that the tests and their script share."""

from typing import Any

STEPS, BATCH = 4, 12
PODS = "pods"
CONFIGS: dict[str, dict[str, Any]] = {
    "block": {"groups": "block", "optimizer": {"name": "adamw", "lr": 0.03}},
    "orthonormal": {
        "basis": "orthonormal",
        "groups": "tensor",
        "optimizer": {"name": "sgd", "lr": 0.005, "momentum": 0.9},
    },
    "mpi": {"groups": "tensor", "comm": "mpi", "optimizer": {"name": "adamw", "lr": 0.03}},
}
