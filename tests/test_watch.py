"""A policy's file that is saved while requests run."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cluster import Load, assert_clean, cluster, greedy, needs_two_cores, prompts, settings
from msgspec.structs import replace

from minidisagg.core.messages import Role
from minidisagg.core.policy import WorkerOptions
from minidisagg.policies import pinned
from minidisagg.runtime.frontend import Frontend
from minidisagg.server import watch as watching

VERSION = """
from pathlib import Path

from minidisagg import Policy


class Mine(Policy):
    version = {version}

    def compose(self, batch, worker):
        Path({seen!r}, f"{{worker.name}}-{{self.version}}").touch()
        super().compose(batch, worker)
"""


@pytest.fixture
def told() -> list[str]:
    return []


@contextlib.asynccontextmanager
async def watched(path: Path, told: list[str]) -> AsyncIterator[Frontend]:
    """Two workers under the policy in the file; `told` gets what an operator is told."""

    class Listening:
        def on_event(self, text: str) -> None:
            told.append(text)

        def on_message(self, *_: object) -> None: ...
        def on_emit(self, *_: object) -> None: ...

    spec = f"{path}:Mine"
    async with cluster(replace(settings("disagg", link="unix"), policy=spec)) as frontend:
        frontend.observers.append(Listening())
        task = asyncio.create_task(watching.watch(frontend, spec))
        try:
            yield frontend
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


@needs_two_cores
def test_what_passes_is_taken_while_requests_run_and_what_does_not_changes_nothing(
    tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "POLL", 0.05)
    path, seen = tmp_path / "mine.py", tmp_path / "seen"
    seen.mkdir()

    def save(version: int, wrong: str = "") -> str:
        text = VERSION.format(version=version, seen=str(seen)).replace("super().compose", wrong or "super().compose")
        path.write_text(text)
        return text

    async def news(load: Load, pattern: str) -> str:
        """Requests come until the operator has been told what he was not before."""
        while not (found := [text for text in told if re.search(pattern, text)]):
            if len(load.open) < 8:
                load.submit_all(prompts(8, seed=len(load.results)), greedy(8))
            await asyncio.sleep(0.02)
        told.remove(found[0])
        return found[0]

    async def run() -> None:
        async with watched(path, told) as frontend:
            load = Load(frontend)
            first = frontend.router.policy
            line = save(2, "batch.missing").splitlines().index("        batch.missing(batch, worker)") + 1
            said = await news(load, "is not taken")
            assert said == (
                f"{path}:Mine is not taken, what was there stays: policy Mine: compose raised AttributeError: "
                f"'BatchBuilder' object has no attribute 'missing' ({path}, line {line})"
            )
            path.write_text("class Mine(\n")
            assert "line 1 fails: SyntaxError: '(' was never closed" in await news(load, "is not taken")
            assert frontend.router.policy is first and frontend.policy == f"{path}:Mine"
            save(3)
            assert await news(load, "^policy ") == f"policy {path}:Mine"
            assert frontend.router.policy.asks.version == 3  # type: ignore[union-attr, attr-defined]
            path.unlink()
            save(3)  # it is as it was
            frontend.kill("decode-0")  # which comes back, whatever the file says now
            path.write_text("raise RuntimeError('half done')")
            assert "line 1 fails: RuntimeError: half done" in await news(load, "is not taken")
            await news(load, "decode-0 is up, epoch 2")
            results = await load.finished()
            assert {result.finish for result in results} == {"length"} and len(results) > 20
            await assert_clean(frontend)
            assert not any("policy" in text for text in told), told

    save(1)
    asyncio.run(run())
    assert {one.name for one in seen.iterdir()} >= {f"{name}-{n}" for name in ("prefill-0", "decode-0") for n in (1, 3)}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def accept(self, offer, worker): return 3", "accept answered 3, not True or False (MINE, line 3)"),
        ("def order(self, *_): return 1 / 0", "order raised ZeroDivisionError: division by zero (MINE, line 3)"),
        ("def order(self, *_): exit()", "order raised SystemExit"),
        ("def __init__(self): import os; os._exit(7)", "it ends its process (7)"),
        (
            "def compose(self, batch, worker):\n        while batch.waiting: pass",
            "a rehearsal of it does not end within",
        ),
        ("def compose(self, batch, worker):\n        print('looking')\n        super().compose(batch, worker)", ""),
    ],
    ids=["nonsense", "raises", "exits", "dies", "hangs", "prints"],
)
def test_a_rehearsal_elsewhere(body: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "PATIENCE", 2.0 if "while" in body else 30.0)
    path = tmp_path / "mine.py"
    path.write_text(f"from minidisagg import Policy\nclass Mine(Policy):\n    {body}\n")
    workers = {"p": (Role.PREFILL, WorkerOptions()), "d": (Role.DECODE, WorkerOptions())}
    try:
        asyncio.run(watching.check(pinned(f"{path}:Mine"), workers))
    except ValueError as error:
        assert said and said.replace("MINE", str(path)) in str(error) and "\n" not in str(error)
    else:
        assert not said
