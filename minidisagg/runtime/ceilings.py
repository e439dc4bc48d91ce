"""What this machine can do at best, measured: the denominators of bandwidth use and MFU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_SECONDS = 0.3  # of repetitions per measurement


def measure_ceilings(
    dtype: torch.dtype, threads: int | None = None, device: torch.device | None = None
) -> tuple[float, float]:
    """(read bytes per second, matmul floating-point operations per second), each the best of several repetitions.

    On random data: zeros compress, clock higher and share pages. On a CPU, `threads` defaults to torch's setting.
    Takes about a second.
    """
    device = device or torch.device("cpu")
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        # Several times any last-level cache, as int32 so that the sum below is bound by memory, not by conversion.
        stream = torch.randint(2**30, ((1 << 28 if device.type == "cuda" else 1 << 25),), dtype=torch.int32)
        stream = stream.view(torch.float32).to(device)
        size = 8192 if device.type == "cuda" else 1024
        left, right = torch.randn(2, size, size, dtype=torch.float32).to(device, dtype)
        read_seconds = _best(lambda: stream.sum(), device)
        matmul_seconds = _best(lambda: left @ right, device)
    finally:
        torch.set_num_threads(before)
    return stream.nbytes / read_seconds, 2 * size**3 / matmul_seconds


def _best(run: Callable[[], object], device: torch.device) -> float:
    best, deadline = float("inf"), time.perf_counter() + _SECONDS
    while True:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        end = time.perf_counter()
        best = min(best, end - start)
        if end > deadline:
            return best
