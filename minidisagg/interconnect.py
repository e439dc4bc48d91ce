"""An interconnect between hosts: by name, or as its bandwidth and latency. For what is emulated, and simulated."""

from __future__ import annotations

import re

from msgspec import Struct

NONE = "none"
BITS, BYTES = ("bps", "bit/s"), ("Bps", "B/s")
PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_BANDWIDTH = re.compile(r"(\d+\.?\d*|\.\d+) ?([kKMGT]?)(bps|bit/s|Bps|B/s)")
_TIME = re.compile(r"(\d+\.?\d*|\.\d+) ?(us|µs|ms|s)")


class Interconnect(Struct, frozen=True):
    """What a wire does to a piece: bytes per second, and seconds on the way, plus up to `jitter` more."""

    bandwidth: float
    latency: float = 0.0
    jitter: float = 0.0

    def slowest(self, nbytes: int) -> float:
        """Seconds from the first byte's start to the last one's arrival, where nothing else is on the wire."""
        return nbytes / self.bandwidth + self.latency + self.jitter

    def __str__(self) -> str:
        text = f"{self.bandwidth / 1e9:.3g} GB/s, {self.latency * 1e6:.3g} µs"
        return f"{text} + {self.jitter * 1e6:.3g} µs" if self.jitter else text


# Nominal: a port's line rate, and a small message's way between two hosts in published measurements of its kind.
PRESETS = {
    "10g-tcp": Interconnect(10e9 / 8, 50e-6),
    "100g-roce": Interconnect(100e9 / 8, 5e-6),
    "400g-ib": Interconnect(400e9 / 8, 3e-6),
    "nvlink": Interconnect(450e9, 2e-6),
}


def parse_interconnect(text: str) -> Interconnect | None:
    """A preset's name, or BANDWIDTH[,LATENCY[,JITTER]] as in `25Gbps,20us`; None for `none`. Raises `ValueError`."""
    if text == NONE or text in PRESETS:
        return PRESETS.get(text)
    first, *rest = (part.strip() for part in text.split(","))
    bandwidth, times = _BANDWIDTH.fullmatch(first), [_TIME.fullmatch(part) for part in rest]
    if bandwidth is None or len(times) > 2 or not float(bandwidth[1]):
        raise _unreadable(text)
    per_second = float(bandwidth[1]) * PREFIXES[bandwidth[2]] / (8 if bandwidth[3] in BITS else 1)
    seconds = []
    for match in times:
        if match is None:
            raise _unreadable(text)
        seconds.append(float(match[1]) * SECONDS[match[2]])
    return Interconnect(per_second, *seconds)


def _unreadable(text: str) -> ValueError:
    known = ", ".join((NONE, *PRESETS))
    return ValueError(f"no interconnect {text!r}; known: {known}, or BANDWIDTH,LATENCY[,JITTER] as in 25Gbps,20us")
