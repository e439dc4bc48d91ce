"""The input logs of a simulated run, as a worker and a front end leave them (`core/inputlog.py`)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from minidisagg.core.engine import EngineCore
from minidisagg.core.inputlog import RecordingCore
from minidisagg.core.messages import ROUTER
from minidisagg.core.policy import Policy
from minidisagg.core.router import Router, RouterSpec
from minidisagg.core.routerlog import RecordingRouter
from minidisagg.core.spec import EngineSpec
from minidisagg.policies import pinned


class Recording(ExitStack):
    """A run's; leaving it closes the files."""

    def __init__(self, directory: Path, policy: str) -> None:
        """`policy`: the name of the one that all are given."""
        super().__init__()
        self._directory, self._policy = directory, pinned(policy)
        directory.mkdir(parents=True, exist_ok=True)

    def router(self, spec: RouterSpec, policy: Policy) -> Router:
        """It writes a log."""
        return RecordingRouter(spec, policy, self._policy, self._open(f"{ROUTER}.1"))

    def core(self, spec: EngineSpec, load_policy: Callable[[str], Policy]) -> EngineCore:
        """It writes a log."""
        named = replace(spec, policy=self._policy)
        return RecordingCore(named, load_policy, self._open(f"{spec.name}.{spec.epoch}"))

    def _open(self, name: str) -> BinaryIO:
        return self.enter_context((self._directory / f"{name}.inputs").open("wb"))
