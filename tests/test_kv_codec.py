"""KV through a lossy codec: what it saves, what it does to the answers, and that it never answers for raw KV."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cluster import MODEL, cluster, greedy, needs_two_cores, prompts, run_to_end, settings
from msgspec.structs import replace

from minidisagg.bench.quality import TOKENS, measure
from minidisagg.config import ClusterSettings, RunSettings, WorkerConfig, WorkerSettings
from minidisagg.core.messages import KVOffer, RequestSpec, Role
from minidisagg.core.plan import CODECS, RAW
from minidisagg.core.request import Request
from minidisagg.core.spec import EngineSpec
from minidisagg.model.loader import cached_path, load_config
from minidisagg.model.tokenizer import Tokenizer
from minidisagg.runtime.kv_cache import KVCache
from minidisagg.runtime.specs import engine_spec
from minidisagg.sim.machines import ClusterSpec, parse_cluster
from minidisagg.sim.simulate import simulate
from minidisagg.transfer.codec import CODECS as MADE
from minidisagg.workload.lengths import random_items, text_items

# By the parity of a request's number: what comes first of each prompt is sent as int8, and the next as it is.
TURNS = """
from dataclasses import replace

from minidisagg import Policy


class Turns(Policy):
    def place(self, request, cluster):
        codec = "int8" if request.max_tokens % 2 else "raw"
        return replace(super().place(request, cluster), codec=codec, returns=True)
"""


def test_names_stand_for_codecs() -> None:
    assert tuple(MADE) == CODECS


@needs_two_cores
@pytest.mark.parametrize("link", ["unix", "shm"])
def test_what_came_lossy_never_answers_for_raw(link: str, tmp_path: Path) -> None:
    """In float64 the tokens of raw KV are the oracle's, though the decode worker's cache has the same prompts lossy,
    and what it has made of them goes back to where the next turn begins."""
    (tmp_path / "turns.py").write_text(TURNS)
    many = prompts(12, seed=3, shortest=60, longest=200)

    async def run() -> None:
        shape = replace(settings("disagg", link=link), policy=f"{tmp_path / 'turns.py'}:Turns")
        async with cluster(shape) as frontend:
            lossy = await run_to_end(frontend, many, greedy(25))
            again = await run_to_end(frontend, many, greedy(25))
            raw = await run_to_end(frontend, many, greedy(24))
            turns = [[*prompt, *tokens, 7, 8, 9] for prompt, tokens in zip(many, lossy, strict=True)]
            answers = await run_to_end(frontend, turns, greedy(24))
        async with cluster(settings("colocated")) as frontend:
            oracle = await run_to_end(frontend, many, greedy(24))
            assert raw == oracle and answers == await run_to_end(frontend, turns, greedy(24))
        assert [tokens[0] for tokens in lossy] == [tokens[0] for tokens in oracle]  # the prefill's
        assert sum(a[:24] != b for a, b in zip(lossy, oracle, strict=True)) >= 3, "int8 changes nothing: no control"
        assert again == lossy  # which answers for itself

    asyncio.run(run())


@needs_two_cores
@pytest.mark.parametrize("link", ["gloo", "shm"])
def test_a_clusters_codec_is_half_of_the_wire(link: str) -> None:
    moved = {}

    async def run(codec: str) -> None:
        shape = replace(settings("disagg", link=link, dtype="float32"), kv_codec=codec)
        async with cluster(shape, RunSettings()) as frontend:
            await run_to_end(frontend, prompts(8, seed=1), greedy(4))
            moved[codec] = sum(one.bytes for one in (await frontend.fresh_stats())["prefill-0"].links)

    for codec in CODECS:
        asyncio.run(run(codec))
    assert moved["int8"] * 4 * 16 == moved[RAW] * (16 + 2)  # heads of 16 values


def spec_of(kind: str, **cluster: Any) -> EngineSpec:
    """Of a worker whose links are of this kind."""
    model = load_config("dummy:tiny")
    cache = KVCache(model, 4, 8, torch.float32, torch.device("cpu"))
    config = WorkerConfig(
        index=0, name="w", epoch=1, role=Role.BOTH, model=MODEL, settings=WorkerSettings(), run=RunSettings(),
        cluster=ClusterSettings(**cluster), run_dir="/nowhere",
    )  # fmt: skip
    device: Any = SimpleNamespace(cache=cache, model=SimpleNamespace(config=model))
    return engine_spec(config, device, kind, None)


def test_a_checksum_between_gpus_leaves_no_lossy_codec() -> None:
    for checked, kind, codecs in ((True, "nccl", (RAW,)), (False, "nccl", CODECS), (True, "gloo", CODECS)):
        assert spec_of(kind, gpu_checksums=checked).codecs == codecs


def test_pages_computed_in_two_dtypes_are_not_those_of_a_cluster_that_has_one() -> None:
    """Though the caches are alike: a store would tell one of them what the other has computed."""
    exact, low = (WorkerSettings(dtype=name) for name in ("float32", "bfloat16"))
    shapes = [spec_of("shm", prefill=p, decode=d).fingerprint for p in (exact, low) for d in (exact, low)]
    assert len(set(shapes)) == 3 and shapes[1] == shapes[2]


def test_names_in_the_prefix_cache_are_its_own() -> None:
    spec = RequestSpec(prompt=list(range(20)), emitted=[], sampling=greedy(4), arrival=0.0)
    raw, lossy, other = (
        Request(KVOffer("r", 0, spec, "f", 1, codec), "f", 0.0).extend_hashes(8) for codec in (RAW, "int8", "int8")
    )
    assert lossy == other and not set(lossy) & set(raw) and len(lossy) == 2
    traced = replace(spec, hashes=raw)
    assert Request(KVOffer("r", 0, traced, "f", 1, RAW), "f", 0.0).extend_hashes(8) == raw
    assert not set(Request(KVOffer("r", 0, traced, "f", 1, "int8"), "f", 0.0).extend_hashes(8)) & set(raw)


def test_a_simulated_wire_has_half_as_much_to_carry() -> None:
    items = random_items(20, 2000, 8, 0.5)
    groups, sent = parse_cluster("prefill=1@h100,decode=1@h100"), {}
    for codec in CODECS:
        run = simulate("fcfs", items, ClusterSpec(groups=groups, codec=codec)).run
        sent[codec] = run.links[0].bytes, run.links[0].seconds
    assert sent["int8"][0] == pytest.approx(0.51 * sent[RAW][0], rel=1e-3)
    assert sent["int8"][1] < 0.6 * sent[RAW][1]


def test_the_meter_finds_nothing_where_nothing_is_and_what_is_there() -> None:
    rng = random.Random(0)
    many = [[rng.randrange(512) for _ in range(rng.randint(20, 120))] for _ in range(10)]
    exact = measure(MODEL.model, torch.float32, RAW, many)
    (way, rounded) = exact.ways
    assert (way.name, way.kl, way.same_tokens, way.same_texts) == (RAW, 0.0, 1.0, 1.0)
    assert way.first_difference == TOKENS and not any(way.layers)
    assert exact.wire_share == 1.0
    lossy = measure(MODEL.model, torch.float32, "int8", many)
    int8, other = lossy.ways
    assert other == rounded
    assert 0 < other.kl < int8.kl < 0.1 and other.first_difference > int8.first_difference
    assert len(int8.layers) == 2 and min(int8.layers) > 0
    assert int8.same_texts <= int8.same_tokens < 1
    assert lossy.wire_share == (16 + 2) / 64 and lossy.wire_share_bfloat16 == (16 + 2) / 32


@pytest.mark.slow
def test_what_int8_does_to_a_real_model() -> None:
    """SmolLM2 on a few of the prompts of `docs/data/kv-quality.json`: a hundredth of the bar, as there."""
    if not (cached_path("smollm2-135m") / "config.json").is_file():
        pytest.skip("smollm2-135m is not in the cache; run: minidisagg pull smollm2-135m")
    text = Path(__file__).parent / "data" / "alice29.txt"
    items = text_items(12, TOKENS, Tokenizer.load("smollm2-135m").encode, 0, str(text))
    int8, rounded = measure("smollm2-135m", torch.float32, "int8", [item.prompt for item in items if item.prompt]).ways
    assert rounded.kl < int8.kl < 0.002 and int8.same_tokens > 0.97 and rounded.same_tokens > 0.99
