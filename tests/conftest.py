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


@pytest.fixture
def charged(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What each request was charged with at its end, by its id."""
    from minidisagg.core.router import Router, Tracked

    found: dict[str, int] = {}
    finish = Router._finish

    def noted(self: Router, request: Tracked, *rest: object, **more: object) -> None:
        found[request.request_id] = request.failures
        finish(self, request, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Router, "_finish", noted)
    return found
