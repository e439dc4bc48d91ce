"""The paged KV cache: one tensor over memory that another process can map."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import time
from pathlib import Path

import torch
from torch import Tensor

from minidisagg.model.config import ModelConfig

PATIENCE = 50  # tenths of a second


class KVCache:
    """`data` is [num_layers, 2 (K, V), num_pages, num_kv_heads, page_size, head_dim], zeroed.

    Head-major pages: a head's tokens are contiguous, so that decode attention is a batched matmul over whole pages.
    On Linux's CPU the memory is a memfd (`fd`), which a peer maps to write into it and which leaves nothing behind
    after a SIGKILL; elsewhere `fd` is None. Raises ValueError when the memory is not there.
    """

    layout = "LPHSD-head-major"

    def __init__(
        self, config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"a KV cache needs at least one page of one token, not {num_pages} of {page_size}")
        self.num_pages, self.page_size, self.num_kv_heads = num_pages, page_size, config.num_kv_heads
        self.bytes_per_page = page_bytes(config, page_size, dtype)
        self.nbytes = num_pages * self.bytes_per_page
        free = free_bytes(device)
        for _ in range(PATIENCE if device.type == "cuda" else 0):  # a dead owner's memory goes with its last mapping
            if self.nbytes <= free:
                break
            time.sleep(0.1)
            free = free_bytes(device)
        if self.nbytes > free:
            need, have = self.nbytes / 2**30, free / 2**30
            raise ValueError(f"a KV cache of {num_pages} pages needs {need:.2f} GiB, and {have:.2f} GiB are free")
        self.fd: int | None = None
        shape = (config.num_layers, 2, num_pages, config.num_kv_heads, page_size, config.head_dim)
        self.data = self._allocate(shape, dtype, device)
        # Views made once: a layer as rows of one token and head, and as rows of one page and head.
        self.token_rows = [layer.view(-1, config.head_dim) for layer in self.data]
        self.page_rows = [layer.view(-1, page_size * config.head_dim) for layer in self.data]

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type != "cpu" or not hasattr(os, "memfd_create"):
            return torch.zeros(shape, dtype=dtype, device=device)
        self.fd = os.memfd_create("minidisagg-kv", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, self.nbytes)
            memory = mmap.mmap(self.fd, self.nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            self.close()
            raise ValueError(f"cannot map {self.nbytes / 2**30:.2f} GiB for the KV cache: {error}") from error
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    def clear(self, pages: list[int]) -> None:
        """Zero whole pages: attention multiplies what lies beyond a context by 0, which a stale NaN would survive."""
        self.data[:, :, pages] = 0

    def fingerprint(self, config: ModelConfig, weights: str) -> str:
        """Hex digest of all that two caches must share before a page of one means the same in the other.

        `weights`: what tells the model from any other of its shape (`loader.identity`).
        """
        facts = [
            weights,
            config.architecture,
            list(self.data.shape[:2] + self.data.shape[3:]),
            [config.hidden_size, config.intermediate_size, config.num_heads, config.vocab_size],
            str(self.data.dtype),
            self.layout,
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def close(self) -> None:
        """Give the memory back; it is unmapped when the last tensor over it is gone."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        self.data = torch.empty(0)
        self.token_rows, self.page_rows = [], []


def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers."""
    return page_size * config.kv_bytes_per_token(dtype.itemsize)


def num_pages_for(nbytes: int, config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """How many pages fit into `nbytes`."""
    return nbytes // page_bytes(config, page_size, dtype)


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still allocate on the device: on a CPU the smaller of the host's and cgroup's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()) != "max":
        free = min(free, int(limit) - int((group / "memory.current").read_text()))
    return free
