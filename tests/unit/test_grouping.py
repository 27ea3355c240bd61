"""How pytest-xdist divides the tests."""

import os

import pytest


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs all tests")
def test_the_tests_of_a_file_run_in_one_process(request: pytest.FixtureRequest) -> None:
    """Otherwise each process makes the fixtures of a module or a session anew, which takes most of the time."""
    assert request.node.nodeid.endswith("@tests/unit/test_grouping.py")
