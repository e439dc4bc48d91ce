"""Marks alone decide what runs: without a `-m` of its own, pytest leaves out what is slow.

pytest                              everything but the slow tests
pytest -m slow tests/test_soak.py   the slow tests of one file
scripts/test.sh --full              slow ones and others
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from linkpair import Pair


def pytest_configure(config: pytest.Config) -> None:
    """The default of `-m`; and Triton, which looks at the variable when it is imported, interprets where no GPU is."""
    config.option.markexpr = config.option.markexpr or "not slow"
    if not Path("/dev/nvidia0").exists():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def one_fork_server() -> Iterator[None]:
    """All clusters of this process share one, as long as a test leaves the environment as it is: each would spend
    seconds on its imports."""
    if "minidisagg.runtime.launch" not in sys.modules:
        yield
        return
    from minidisagg.runtime import launch

    environment, fork_server, kept = launch._environment, launch.fork_server, list[launch.ForkServer]()

    def same_for_all_tests() -> dict[str, str]:
        return {name: value for name, value in environment().items() if name != "PYTEST_CURRENT_TEST"}

    def keep(environment: dict[str, str]) -> launch.ForkServer:
        if not kept:
            kept.append(fork_server(environment))
        return fork_server(environment)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_environment", same_for_all_tests)
        patch.setattr(launch, "fork_server", keep)
        yield
    for server in kept:
        server.release()


@pytest.fixture
def charged(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What each request was charged with at its end, by its id."""
    from minidisagg.core.router import Router
    from minidisagg.core.tracked import Tracked

    found: dict[str, int] = {}
    finish = Router._finish

    def noted(self: Router, request: Tracked, *rest: object, **more: object) -> None:
        found[request.request_id] = request.failures
        finish(self, request, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Router, "_finish", noted)
    return found


@pytest.fixture
def make_pair(tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    """Makes pairs; afterwards nothing may be left in the run directory and in shared memory."""
    from cluster import assert_left_no_shared_memory, in_shared_memory
    from linkpair import Pair

    before, pairs = in_shared_memory(), list[Pair]()
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o700)

    def make(kind: str, **options: Any) -> Pair:
        pairs.append(Pair(kind, run_dir, **options))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()
    assert os.listdir(run_dir) == []
    assert_left_no_shared_memory(before)
