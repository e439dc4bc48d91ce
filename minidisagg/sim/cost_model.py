"""What steps and transfers take on the simulated cluster, and bad luck.

`LinearCost` is what the tests of the mechanism need; `machines.py` has the costs of real devices and wires.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from minidisagg.core.plan import WIRE_SHARE, Piece, StepPlan
from minidisagg.core.spec import EngineSpec


def wire_bytes(source: EngineSpec, piece: Piece) -> float:
    """Of a piece, in the codec that it names."""
    first, end = piece.layers
    return source.layer_bytes * piece.count * (end - first) * WIRE_SHARE[piece.codec]


class Costs(Protocol):
    """All times are seconds."""

    @property
    def message(self) -> float:
        """One message over a channel."""
        ...

    def steps(self, spec: EngineSpec, plan: StepPlan) -> list[float]:
        """Of each of the plan's equal steps on this worker."""
        ...

    def transfer(self, source: EngineSpec, dest: str, piece: Piece, now: float) -> tuple[float, float]:
        """When a piece that is started now begins to move, and when it has arrived."""
        ...


@dataclass(frozen=True)
class LinearCost:
    """Linear in what the roofline says matters. The defaults are of the order of SmolLM2-135M in bf16 on a CPU core."""

    step: float = 0.012  # fixed: the weights are read once
    prefill_token: float = 0.0007
    decode_seq: float = 0.0012
    context_token: float = 0.000002  # KV tokens read by the step's sequences
    link_latency: float = 0.0005
    link_page: float = 0.0005  # one page over one link
    message: float = 0.0001

    def steps(self, spec: EngineSpec, plan: StepPlan) -> list[float]:
        """As `Costs` says."""
        prefill = sum(item.count for item in plan.items if item.count > 1)
        decode = sum(item.count == 1 for item in plan.items)
        context = sum(item.start + item.count for item in plan.items)
        fixed = self.step + prefill * self.prefill_token + decode * self.decode_seq
        return [fixed + (context + n * decode) * self.context_token for n in range(plan.repeat)]

    def transfer_seconds(self, pages: float) -> float:
        """Duration of one piece on an idle link; `pages` of all layers, so that some layers are parts of pages."""
        return self.link_latency + pages * self.link_page

    def transfer(self, source: EngineSpec, dest: str, piece: Piece, now: float) -> tuple[float, float]:
        """As `Costs` says."""
        first, end = piece.layers
        return now, now + self.transfer_seconds(piece.count * ((end - first) / source.num_layers))


@dataclass(frozen=True)
class Chaos:
    """Probabilities and delays of what a network and a scheduler may do."""

    reorder: float = 0.0  # a message is delayed past others
    duplicate: float = 0.0  # a message arrives twice
    drop: float = 0.0  # a message between workers is lost
    delay: float = 0.02  # by up to so many seconds
    break_transfer: float = 0.0  # a piece fails (checksum, reset)
    abort_delay: float = 0.0  # up to so many seconds until an abort is confirmed; writes may land until then
