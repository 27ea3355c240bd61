"""Chaos: damage, kills, full disks and frozen ranks at random places; `make test-chaos` runs all of it."""
