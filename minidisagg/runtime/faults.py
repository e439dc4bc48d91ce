"""What experiments do to a worker on purpose: stages of a request that take longer than they have to."""

from __future__ import annotations

import time

from minidisagg.config import WorkerConfig
from minidisagg.core.messages import Envelope, Submit
from minidisagg.core.plan import StepPlan
from minidisagg.runtime.device import StepResult
from minidisagg.runtime.worker import Worker


class DelayedWorker(Worker):
    """Adds to each request `RunSettings.delays` of a stage: queue, prefill, decode_wait and decode.

    That of the transfer is the links' latency.
    """

    def __init__(self, config: WorkerConfig) -> None:
        super().__init__(config)
        self.delays = config.run.delays

    def _on_message(self, envelope: Envelope) -> None:
        if isinstance(envelope.body, Submit) and "queue" in self.delays:
            self.loop.call_later(self.delays["queue"], super()._on_message, envelope)
        else:
            super()._on_message(envelope)

    def _carry_on(self) -> None:
        """Between a request's KV being complete and its first decode step nothing is planned."""
        now, delay = self.now(), self.delays.get("decode_wait", 0.0)
        for request in self.core.scheduler.running if delay else ():
            left = request.ready_at + delay - now
            if request.ready_at >= 0 and not request.introduced and left > 0:
                self._drain()
                self.loop.call_later(left, self._advance)
                return
        super()._carry_on()

    def _compute(self, plan: StepPlan) -> StepResult:
        result, delay = super()._compute(plan), 0.0
        for item in plan.items:
            if item.sample and item.index == 0:
                delay = max(delay, self.delays.get("prefill", 0.0))
            elif item.index == 2:  # the second decode step: the first one's time is told apart from waiting for it
                delay = max(delay, self.delays.get("decode", 0.0))
        if delay:
            time.sleep(delay)
        return result
