"""When requests arrive, and the one source of randomness of all workloads.

Everything here is a function of its arguments: the same seed gives the same workload in every process and on every
machine, so that two systems are offered exactly the same load.
"""

from __future__ import annotations

import hashlib
import math
import random


def keyed_random(*key: int | str) -> random.Random:
    """A generator that depends on the key's values only (not on `PYTHONHASHSEED`, not on earlier draws)."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return random.Random(int.from_bytes(digest, "big"))


def arrival_times(count: int, request_rate: float, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """Arrival times in seconds for an open loop of `count` requests at `request_rate` per second.

    Gaps are gamma distributed with shape `burstiness` and mean 1 / rate: 1 is a Poisson process, less is burstier,
    `inf` is a metronome. As in `vllm bench serve`, times are then scaled so that the last one is `count / rate`: the
    offered rate is exact, and one seed gives the same pattern at every rate, stretched, which is what a search for
    the highest sustainable rate needs. An infinite rate puts all arrivals at 0. Raises ValueError.
    """
    if not request_rate > 0:
        raise ValueError(f"request rate must be positive, not {request_rate}")
    if not burstiness > 0:
        raise ValueError(f"burstiness must be positive, not {burstiness}")
    if math.isinf(request_rate):
        return [0.0] * count
    rng = keyed_random("arrivals", seed)
    times: list[float] = []
    now = 0.0
    for _ in range(count):
        now += 1.0 if math.isinf(burstiness) else rng.gammavariate(burstiness, 1.0 / burstiness)
        times.append(now)
    # An extremely bursty draw can underflow to all zeros: then all requests come at once, at the end.
    # In twelve digits: a logarithm's last ones differ between mathematical libraries.
    return [float(f"{count / request_rate * (t / now if now else 1.0):.12g}") for t in times]
