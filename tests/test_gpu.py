"""The engine on a CUDA device: run with `pytest -m gpu`.

Two NCCL ranks on one GPU need NCCL 2.31 or later and NCCL_MULTI_RANK_GPU_ENABLE=1; without them the disaggregated
tests go over gloo, and the one that is about nccl says why it skips.
"""

from __future__ import annotations

import asyncio
import os
import random

import pytest
import torch

from minidisagg.config import ClusterSettings, Mode, ModelSettings, RunSettings, WorkerSettings
from minidisagg.core.messages import SamplingParams
from minidisagg.core.tracked import Emit
from minidisagg.runtime.frontend import Frontend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
shares_a_gpu = torch.cuda.device_count() > 1 or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"
MODEL = ModelSettings(model="dummy:tiny,std=0.15", block_size=16)


def settings(mode: Mode, link: str, dtype: str) -> ClusterSettings:
    worker = WorkerSettings(device="cuda", dtype=dtype, kv_cache_memory=16 << 20, chunk=32, max_num_seqs=16)
    decode = WorkerSettings(
        device=f"cuda:{torch.cuda.device_count() - 1}", dtype=dtype, kv_cache_memory=16 << 20, max_num_seqs=16
    )
    return ClusterSettings(
        mode=mode, prefill_workers=1, decode_workers=int(mode == "disagg"), prefill=worker, decode=decode, link=link
    )


async def outputs(cluster: ClusterSettings, kill: str = "") -> tuple[list[list[int]], int]:
    """Tokens of 24 requests, and the bytes that went over links; `kill` names a worker to SIGKILL on the way."""
    rng = random.Random(1)
    prompts = [[rng.randrange(512) for _ in range(rng.randint(8, 200))] for _ in range(24)]
    sampling = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    tokens: list[list[int]] = [[] for _ in prompts]
    async with await Frontend.start(MODEL, cluster, RunSettings(link_timeout=8.0)) as frontend:
        begun, ended = asyncio.Event(), asyncio.Event()
        left = len(prompts)
        failures: list[str] = []

        def listen(index: int, emit: Emit, now: float) -> None:
            nonlocal left
            tokens[index].extend(emit.tokens)
            if sum(map(len, tokens)) >= 100:
                begun.set()
            if emit.finish:
                failures.extend([emit.error] if emit.finish != "length" else [])
                left -= 1
                if not left:
                    ended.set()

        for index, prompt in enumerate(prompts):
            frontend.submit(prompt, sampling, lambda e, t, i=index: listen(i, e, t))  # type: ignore[misc]
        if kill:
            await asyncio.wait_for(begun.wait(), 240)
            frontend.supervisor.kill(kill, 1)
        await asyncio.wait_for(ended.wait(), 240)
        assert not failures
        for _ in range(100):  # a dead peer's link holds its pages until its abort is confirmed
            stats = await frontend.fresh_stats()
            if not any(one.pages_live + one.pages_inflight + one.pages_quarantined for one in stats.values()):
                break
        else:
            raise AssertionError(f"pages are still held: {stats}")
        return tokens, sum(link.bytes for one in stats.values() for link in one.links)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_colocated_runs(dtype: str) -> None:
    tokens, moved = asyncio.run(outputs(settings("colocated", "auto", dtype)))
    assert moved == 0 and len({token for output in tokens for token in output}) >= 16


def test_disaggregated_over_gloo_equals_colocated() -> None:
    expected, _ = asyncio.run(outputs(settings("colocated", "auto", "float64")))
    tokens, moved = asyncio.run(outputs(settings("disagg", "gloo", "float64")))
    assert tokens == expected and moved > 0


@pytest.mark.skipif(not shares_a_gpu, reason="needs two GPUs, or NCCL >= 2.31 and NCCL_MULTI_RANK_GPU_ENABLE=1")
@pytest.mark.parametrize("kill", ["", "prefill-0", "decode-0"])
def test_disaggregated_over_nccl_equals_colocated(kill: str) -> None:
    expected, _ = asyncio.run(outputs(settings("colocated", "auto", "float64")))
    tokens, moved = asyncio.run(outputs(settings("disagg", "nccl", "float64"), kill))
    assert tokens == expected and moved > 0
