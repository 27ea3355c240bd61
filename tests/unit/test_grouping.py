"""The distribution of tests over the processes of pytest-xdist."""

import os

import pytest


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs all tests")
def test_the_tests_of_a_file_run_in_one_process(request: pytest.FixtureRequest) -> None:
    """Otherwise each process would create the fixtures of a module or session again, which takes most of the time."""
    assert request.node.nodeid.endswith("@tests/unit/test_grouping.py")
