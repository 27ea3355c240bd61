"""Stages that measure and check this project on a GPU in a few minutes. `tests/gpu/run.sh` runs them."""
