"""What a handoff sends at once: the whole request, each chunk, or groups of layers as soon as each is computed.

Layer groups hide a transfer behind the compute of the step that makes it: of L layers in g groups, all but the last
group's share, 1 - 1/g. Each piece has a fixed cost, so a group should weigh enough to be efficient on the link.
"""

from __future__ import annotations

from dataclasses import dataclass

KNOWN = "request, chunk, layers:N or auto"


@dataclass(frozen=True)
class Granularity:
    """`layers` of a group: 0 for a whole chunk. `weight`: bytes that a group must have; it grows until it does."""

    whole: bool = False  # nothing leaves before the request's last token is computed
    layers: int = 0
    weight: int = 0

    @property
    def layered(self) -> bool:
        """A step's layers do not leave all at once."""
        return bool(self.layers or self.weight)

    def ends(self, num_layers: int, layer_bytes: int) -> list[int]:
        """The layers at whose end a group is complete, the last one included; none where a step is sent as a whole.

        `layer_bytes`: what one layer of the step's pages weighs.
        """
        if not self.layered:
            return []
        if self.layers:
            return [*range(self.layers, num_layers, self.layers), num_layers]
        groups = min(num_layers, max(1, num_layers * layer_bytes // self.weight))
        return [num_layers * n // groups for n in range(1, groups + 1)]


def parse_granularity(text: str, efficient_bytes: int) -> Granularity:
    """`request`, `chunk`, `layers:N`, or `auto`, whose groups weigh `efficient_bytes` or more.

    Raises `ValueError` for anything else.
    """
    unit, colon, number = text.partition(":")
    if not colon and unit in ("request", "chunk", "auto"):
        return Granularity(whole=unit == "request", weight=efficient_bytes if unit == "auto" else 0)
    if unit == "layers" and number.isdecimal() and int(number) > 0:
        return Granularity(layers=int(number))
    raise ValueError(f"transfer granularity {text!r} is not one of {KNOWN}")
