"""What a step and a transfer cost on the simulated device, linear in what the roofline says matters; and bad luck."""

from __future__ import annotations

from dataclasses import dataclass

from minidisagg.core.plan import StepPlan


@dataclass(frozen=True)
class LinearCost:
    """Seconds. The defaults are of the order of SmolLM2-135M in bf16 on one CPU core."""

    step: float = 0.012  # fixed: the weights are read once
    prefill_token: float = 0.0007
    decode_seq: float = 0.0012
    context_token: float = 0.000002  # KV tokens read by the step's sequences
    link_latency: float = 0.0005
    link_page: float = 0.0005  # one page over one link
    message: float = 0.0001  # one message over a channel

    def step_seconds(self, plan: StepPlan) -> float:
        """Duration of one step."""
        prefill = sum(item.count for item in plan.items if item.count > 1)
        decode = sum(item.count == 1 for item in plan.items)
        context = sum(item.start + item.count for item in plan.items)
        return self.step + prefill * self.prefill_token + decode * self.decode_seq + context * self.context_token

    def transfer_seconds(self, pages: float) -> float:
        """Duration of one piece on an idle link; `pages` of all layers, so that some layers are parts of pages."""
        return self.link_latency + pages * self.link_page


@dataclass(frozen=True)
class Chaos:
    """Probabilities and delays of what a network and a scheduler may do."""

    reorder: float = 0.0  # a message is delayed past others
    duplicate: float = 0.0  # a message arrives twice
    drop: float = 0.0  # a message between workers is lost
    delay: float = 0.02  # by up to so many seconds
    break_transfer: float = 0.0  # a piece fails (checksum, reset)
    abort_delay: float = 0.0  # up to so many seconds until an abort is confirmed; writes may land until then
