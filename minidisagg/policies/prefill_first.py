"""Prefill first, as in vLLM's first scheduler (Kwon et al., SOSP'23): prompts run alone and delay the decodes."""

from __future__ import annotations

from minidisagg.core.policy import Batch, Policy, WorkerView


class PrefillFirst(Policy):
    """Whole prompts by themselves as long as there are any with room; otherwise all decodes."""

    only = "colocated"
    equal_steps = True

    def compose(self, batch: Batch, worker: WorkerView) -> None:
        """A step is either prompts or decodes."""
        for request in (*batch.running, *batch.waiting):
            if request.is_prefill and not batch.add(request):
                break
        if batch.empty:
            for request in batch.running:
                batch.add(request)


POLICY = PrefillFirst
