"""Marks alone decide what runs: without a `-m` of its own, pytest leaves out what is slow.

pytest                              everything but the slow tests
pytest -m slow tests/test_soak.py   the slow tests of one file
scripts/test.sh --full              slow ones and others
"""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """The default of `-m`."""
    config.option.markexpr = config.option.markexpr or "not slow"
