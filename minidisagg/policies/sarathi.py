"""Sarathi-Serve (Agrawal et al., OSDI'24): stall-free batches of decodes and prefill chunks under a token budget."""

from __future__ import annotations

from minidisagg.core.policy import Batch, Policy, WorkerView


class Sarathi(Policy):
    """All decodes first, then prompts in order, in chunks, until the step holds `chunk` tokens."""

    equal_steps = True

    def __init__(self, chunk: int = 64) -> None:
        """`chunk`: tokens of one step, the decodes among them (the paper's token budget)."""
        super().__init__()
        if not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"sarathi: chunk must be a number of tokens, at least 1, not {chunk}")
        self.chunk = chunk

    def compose(self, batch: Batch, worker: WorkerView) -> None:
        """One token for each decode; what is left of the budget goes to prompts."""
        left = self.chunk
        for request in batch.running:
            if not request.is_prefill:
                left -= batch.add(request)
        for request in (*batch.running, *batch.waiting):
            if left <= 0:
                return
            if request.is_prefill:
                taken = batch.add(request, left)
                if not taken:
                    return
                left -= taken


POLICY = Sarathi
