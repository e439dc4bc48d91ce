"""What a worker's settings name, made: the device, its model and cache, in the form that is fastest there."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch

from minidisagg.config import ClusterSettings, WorkerConfig, WorkerSettings, mps_daemon
from minidisagg.core.messages import Role
from minidisagg.model.config import ModelConfig
from minidisagg.model.loader import load_weights
from minidisagg.model.transformer import Transformer
from minidisagg.runtime.device import Device
from minidisagg.runtime.kv_cache import KVCache, num_pages_for, page_bytes

CPU_CACHE = 512 << 20  # bytes, of a worker that was not told
CONTEXT = 1 << 30  # bytes of a GPU that CUDA, its libraries and the captured graphs take
PAIR_BYTES = 1050 << 20  # and an open pair of nccl, with its staging memory
Progress = Callable[[str, int, int], None]  # what is being made, how many are, of how many


def load_device(config: WorkerConfig, model_config: ModelConfig, say: Progress) -> Device:
    """The device that a worker's settings name, with the model and an empty cache on it.

    Raises `ValueError` for what a user can mend: no GPU, too little memory, a broken model.
    """
    settings = config.settings
    device = worker_devices(config.cluster)[config.index]
    if device.type == "cuda":
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device.index >= there:
            raise ValueError(f"device {str(device)!r} is asked for, but torch {torch.__version__} sees {there} GPUs")
        if settings.sms and not mps_daemon():
            raise ValueError(f"sms={settings.sms} needs an MPS daemon, and none runs: nvidia-cuda-mps-control -d")
        torch.cuda.set_device(device)  # of this thread: Triton launches where it is
    dtype = dtype_of(settings, model_config)
    # Roles may compute in different dtypes; what they hand over is in the narrower one.
    dtypes = [dtype_of(worker, model_config) for _, _, worker in config.cluster.roles()]
    kv_dtype = min(dtypes, key=lambda dtype: dtype.itemsize)
    say("weights", 0, 0)
    weights = load_weights(config.model.model, model_config)
    if can_fuse(model_config, dtype, kv_dtype, device):
        from minidisagg.model.fused import FusedTransformer  # Triton is not everywhere
        from minidisagg.runtime.fused_device import FusedDevice

        fused = FusedTransformer(model_config, weights, dtype, device)
        del weights
        cache = _make_cache(config, model_config, kv_dtype, device)
        longest = max_model_len(config, model_config, cache)
        fused_device = FusedDevice(fused, cache, most_seqs(config.cluster), longest, most_tokens(config.cluster))
        fused_device.warm_up(partial(say, "plans and graphs"))
        return fused_device
    model = Transformer(model_config, weights, dtype, device)
    return Device(model, _make_cache(config, model_config, kv_dtype, device))


def _make_cache(config: WorkerConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> KVCache:
    """After the weights, which it leaves room for."""
    memory, size = config.settings.kv_cache_memory, config.model.block_size
    if not memory and device.type == "cuda":
        memory = _left_on(device, config, model)
    memory = memory or CPU_CACHE
    if (num_pages := num_pages_for(memory, model, size, dtype)) < 1:
        need = page_bytes(model, size, dtype)
        raise ValueError(f"a KV cache of {memory} bytes holds no page; one needs {need} bytes")
    return KVCache(model, num_pages, size, dtype, device)


def _left_on(device: torch.device, config: WorkerConfig, model: ModelConfig) -> int:
    """Bytes of this worker's share of a GPU beside its weights, which are there already, its steps and its links."""
    settings, cluster = config.settings, config.cluster
    free, total = torch.cuda.mem_get_info(device)
    share = settings.gpu_memory_utilization * total / worker_devices(cluster).count(device)
    # Of a row of a step: its vectors, with those of the feed-forward layer twice, and of a sequence its logits twice.
    row = 2 * (8 * model.hidden_size + 3 * model.intermediate_size)
    step = most_tokens(cluster) * row + most_seqs(cluster) * 12 * model.vocab_size
    pairs = cluster.decode_workers if config.role is Role.PREFILL else cluster.prefill_workers
    other = CONTEXT + step + PAIR_BYTES * pairs
    # Whatever is free just now: a dead worker's memory is taken until its peers let go, and the next one is as large.
    left = int(share - torch.cuda.memory_reserved(device) - other)
    if left <= 0:
        gib = 2**30
        raise ValueError(
            f"gpu_memory_utilization {settings.gpu_memory_utilization:g} leaves nothing for a KV cache on {device}: "
            f"{free / gib:.1f} of {total / gib:.1f} GiB are free, and steps and links take {other / gib:.1f}"
        )
    return left


def can_fuse(config: ModelConfig, dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels of `model/kernels.py` know this model; where not, the portable form computes it."""
    return (
        device.type == "cuda"
        and dtype == kv_dtype
        and dtype in (torch.bfloat16, torch.float16)
        and config.head_dim in (64, 128)
        and not config.windowed_layers
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def most_seqs(cluster: ClusterSettings) -> int:
    """Of a step, whichever role a worker has by then."""
    return max(settings.max_num_seqs for settings in (cluster.prefill, cluster.decode))


def most_tokens(cluster: ClusterSettings) -> int:
    """Likewise."""
    return max(settings.max_num_batched_tokens for settings in (cluster.prefill, cluster.decode))


def worker_devices(cluster: ClusterSettings) -> list[torch.device]:
    """Where each worker computes: "cuda" alone is one GPU after the other, beginning anew after the last."""
    devices = [torch.device(settings.device) for _, _, settings in cluster.roles()]
    gpus = itertools.cycle(range(max(torch.cuda.device_count(), 1)))
    return [torch.device("cuda", next(gpus)) if str(device) == "cuda" else device for device in devices]


def dtype_of(settings: WorkerSettings, config: ModelConfig) -> torch.dtype:
    """What a worker computes in; "auto" is the checkpoint's, but on a CPU the fastest dtype with all of its range.

    That is bfloat16 where the CPU has instructions for it; on one with AVX2 alone a matmul in float32 took an eighth.
    """
    name = settings.dtype
    if name == "auto":
        name = config.dtype
        if settings.device == "cpu" and name in ("float16", "bfloat16"):
            name = "bfloat16" if fast_in_bfloat16() else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def max_model_len(config: WorkerConfig, model: ModelConfig, cache: KVCache) -> int:
    """What was asked for, which must be possible; else the model's own limit, or what the cache holds."""
    asked, held = config.model.max_model_len, cache.num_pages * cache.page_size
    if asked > model.max_model_len:
        raise ValueError(f"max_model_len is {asked}, but the model's own limit is {model.max_model_len}")
    if asked > held:
        need = -(-asked // cache.page_size) * cache.bytes_per_page
        raise ValueError(
            f"the KV cache of {cache.nbytes} bytes holds {held} tokens; max_model_len {asked} needs {need} bytes"
        )
    return asked or min(model.max_model_len, held)


def fast_in_bfloat16() -> bool:
    """Whether oneDNN has kernels for this CPU."""
    mkldnn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
