"""Averages in the trainers of other libraries. Each module imports its own library, and nothing imports them."""
