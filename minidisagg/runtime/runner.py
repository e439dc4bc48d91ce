"""The threads of a worker's device, and the note of what it is at work on."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from minidisagg.config import WorkerConfig
from minidisagg.core.plan import StepPlan
from minidisagg.model.config import ModelConfig
from minidisagg.runtime.blackbox import StepNote
from minidisagg.runtime.device import Device, Report, Step, StepResult
from minidisagg.runtime.load import Progress, load_device

T = TypeVar("T")
NICE = 10  # priority of the device's thread below the event loop's


class Runner:
    """Runs steps off the event loop. `after(step, result)` may add to a result, on the thread that waited for it."""

    device: Device

    def __init__(self, config: WorkerConfig, after: Callable[[Step, StepResult], StepResult]) -> None:
        self._config, self._after = config, after
        self._loop = asyncio.get_running_loop()
        # One thread for all that computes, from loading on: OpenMP keeps a team for each thread that ever asked it for
        # work, and stops spinning as soon as its teams have more threads than there are cores: half the speed.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="device", initializer=_lower_priority)
        self._collector = ThreadPoolExecutor(1, thread_name_prefix="collector")
        self._note = StepNote(Path(config.run_dir), config.name, config.epoch, "step")

    async def load(self, model_config: ModelConfig, say: Progress) -> None:
        """Make the device that the worker's settings name; raises as `load_device`. `say` is called on its thread."""
        self.device = await self.on_device(load_device, self._config, model_config, say)

    async def step(self, plan: StepPlan, report: Report) -> StepResult:
        """Compute it. Where steps overlap, this may be called again before it returns; they end in order."""
        if not self.device.overlaps:
            return await self.on_device(lambda: self._collect(self._launch(plan, report)))
        step = await self.on_device(self._launch, plan, report)
        return await self._loop.run_in_executor(self._collector, self._collect, step)

    def on_device(self, work: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        """Work for the device's thread."""
        return self._loop.run_in_executor(self._thread, work, *arguments)

    def close(self) -> None:
        """Nothing more is computed."""
        for executor in self._thread, self._collector:
            executor.shutdown(wait=False, cancel_futures=True)
        self.device.cache.close()

    def _launch(self, plan: StepPlan, report: Report) -> Step:
        """The note stays where the step does not come through: its requests are suspects."""
        self._note.begin(plan.step_id, [(item.request_id, item.incarnation) for item in plan.items])
        return self.device.launch(self.device.prepare(plan), report)

    def _collect(self, step: Step) -> StepResult:
        result = self.device.collect(step)
        self._note.end(step.plan.step_id)
        return self._after(step, result)


def _lower_priority() -> None:
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
