"""Tests that damage files, kill processes, fill disks and freeze ranks at random. `make test-chaos` runs them."""
