"""What a machine with a GPU has to tell about this project in a few minutes: `tests/gpu/run.sh` runs these stages."""
