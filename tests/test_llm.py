"""The offline API in both modes, on a model whose tokens are bytes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import PAGE, needs_two_cores
from msgspec.structs import replace

from minidisagg import LLM, SamplingParams
from minidisagg.config import Mode, WorkerSettings
from minidisagg.runtime.frontend import StartError

MODEL = "dummy:tiny,std=0.15"
WORKER = WorkerSettings(dtype="float64", kv_cache_memory=4 << 20)
TEXTS = ["The capital of France is", "Once upon a time", "héllo ∑ wörld", "x"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
SAMPLED = SamplingParams(temperature=1.2, top_p=0.9, max_tokens=24, seed=7)


def start(mode: Mode) -> LLM:
    return LLM(MODEL, mode=mode, block_size=PAGE, prefill=WORKER, decode=WORKER)


@pytest.fixture(scope="module")
def colocated() -> Iterator[LLM]:
    with start("colocated") as llm:
        yield llm


@pytest.fixture(scope="module")
def disagg() -> Iterator[LLM]:
    with start("disagg") as llm:
        yield llm


def test_text_and_token_prompts_in_their_order(colocated: LLM) -> None:
    outputs = colocated.generate(TEXTS, GREEDY)
    assert [output.prompt_token_ids for output in outputs] == [colocated.tokenizer.encode(text) for text in TEXTS]
    assert len({tuple(output.token_ids) for output in outputs}) == len(TEXTS)
    again = colocated.generate([colocated.tokenizer.encode(text) for text in reversed(TEXTS)], GREEDY)
    assert [output.token_ids for output in reversed(again)] == [output.token_ids for output in outputs]
    for output in outputs:
        assert output.finish_reason == "length" and len(output.token_ids) == 24
        assert output.text == colocated.tokenizer.decode(output.token_ids)
        assert output.times is not None and output.times.e2e > 0
    [alone] = colocated.generate(TEXTS[0], GREEDY)
    [ids] = colocated.generate(outputs[0].prompt_token_ids, GREEDY)
    assert alone.token_ids == ids.token_ids == outputs[0].token_ids


@needs_two_cores
def test_roles_may_compute_in_different_dtypes() -> None:
    """What they hand over is in the narrower one: float32 on both sides, whoever is the wide one."""
    narrow, size = replace(WORKER, dtype="float32"), {"block_size": PAGE, "mode": "disagg"}
    tokens = []
    for prefill, decode in ((WORKER, narrow), (narrow, WORKER)):
        with LLM(MODEL, prefill=prefill, decode=decode, **size) as llm:
            assert {hello.kv_bytes_per_token for hello in llm.frontend.hellos.values()} == {2 * 2 * 2 * 16 * 4}
            tokens.append([output.token_ids for output in llm.generate(TEXTS, GREEDY)])
    with LLM(MODEL, prefill=WORKER, decode=WORKER, **size) as llm:
        tokens.append([output.token_ids for output in llm.generate(TEXTS, GREEDY)])
    assert tokens[0] == tokens[1] == tokens[2]


def test_a_prompt_may_have_sampling_parameters_of_its_own(colocated: LLM) -> None:
    each = [replace(GREEDY, max_tokens=4), SAMPLED]
    short, sampled = colocated.generate(TEXTS[:2], each)
    assert short.token_ids == colocated.generate(TEXTS[0], GREEDY)[0].token_ids[:4]
    assert sampled.token_ids == colocated.generate(TEXTS[1], SAMPLED)[0].token_ids
    with pytest.raises(ValueError, match="3 prompts, but 2 sampling parameters"):
        colocated.generate(TEXTS[:3], each)


def test_more_prompts_than_a_server_lets_wait(colocated: LLM) -> None:
    outputs = colocated.generate([[index % 512, index // 512] for index in range(1500)], replace(GREEDY, max_tokens=1))
    assert len(outputs) == 1500 and all(len(output.token_ids) == 1 for output in outputs)


def test_one_bad_prompt_aborts_the_others(colocated: LLM) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        colocated.generate([[1, 2, 3], []], replace(GREEDY, max_tokens=1000))
    assert not colocated.frontend.router.requests


@needs_two_cores
def test_ctrl_c_in_the_middle_of_a_thousand_aborts_them_all(disagg: LLM) -> None:
    prompts = [[index % 512] * 20 for index in range(1000)]
    interrupt = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        disagg.generate(prompts, replace(GREEDY, max_tokens=500))
    for _ in range(100):
        stats = asyncio.run_coroutine_threadsafe(disagg.frontend.fresh_stats(), disagg._loop).result()
        if not disagg.frontend.router.requests and not any(s.pages_live + s.pages_inflight for s in stats.values()):
            break
    for name, one in stats.items():
        assert (one.pages_live, one.pages_inflight, one.pages_quarantined) == (0, 0, 0), name
        assert one.pages_free + one.pages_cached == disagg.frontend.hellos[name].num_pages
    [output] = disagg.generate(TEXTS[0], GREEDY)
    assert len(output.token_ids) == 24


FORGETFUL = """
import sys
from minidisagg import LLM
llm = LLM("dummy:tiny")
sys.stdout.write(str(llm.frontend.run_dir))
"""


def test_a_script_that_forgets_to_close_leaves_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", FORGETFUL], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout and not Path(done.stdout).exists()


@needs_two_cores
def test_both_modes_give_the_same(colocated: LLM, disagg: LLM) -> None:
    penalties = replace(SAMPLED, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.2, min_p=0.01)
    seen = []
    for params in (GREEDY, SAMPLED, replace(SAMPLED, seed=8), penalties, replace(GREEDY, repetition_penalty=1.5)):
        here = [output.token_ids for output in colocated.generate(TEXTS, params)]
        assert here == [output.token_ids for output in disagg.generate(TEXTS, params)], params
        assert here == [output.token_ids for output in colocated.generate(TEXTS, params)], params
        assert here not in seen  # every parameter changes something
        seen.append(here)


@needs_two_cores
def test_stops(colocated: LLM, disagg: LLM) -> None:
    for llm in (colocated, disagg):
        [whole] = llm.generate(TEXTS[0], GREEDY)
        cut = next(i for i in range(2, len(whole.text)) if whole.text[i : i + 2] not in whole.text[:i])
        stop = whole.text[cut : cut + 2]
        [stopped] = llm.generate(TEXTS[0], replace(GREEDY, stop=("never there", stop)))
        assert (stopped.text, stopped.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
        assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)] and len(stopped.token_ids) < 24
        end = whole.token_ids[3]
        [ended] = llm.generate(TEXTS[0], replace(GREEDY, stop_token_ids=(end,)))
        at = whole.token_ids.index(end) + 1
        assert (ended.token_ids, ended.finish_reason) == (whole.token_ids[:at], "stop")
        [longer] = llm.generate(TEXTS[0], replace(GREEDY, stop_token_ids=(end,), min_tokens=at + 2))
        assert len(longer.token_ids) > at
        [one] = llm.generate(TEXTS[0], replace(GREEDY, max_tokens=1))
        assert one.token_ids == whole.token_ids[:1]


@needs_two_cores
def test_streaming_gives_the_same_text_in_pieces(colocated: LLM, disagg: LLM) -> None:
    for llm in (colocated, disagg):
        pieces: list[str] = []
        output = llm.stream(TEXTS[1], pieces.append, GREEDY)
        assert len(pieces) > 3
        assert "".join(pieces) == output.text == llm.generate(TEXTS[1], GREEDY)[0].text


def test_unseeded_requests_differ_and_a_run_repeats_them(colocated: LLM) -> None:
    params = replace(SAMPLED, seed=None)
    a, b = colocated.generate([TEXTS[0]] * 2, params)
    assert a.token_ids != b.token_ids


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], GREEDY, "the prompt is empty"),
        ([[1, 2], []], GREEDY, "the prompt is empty"),
        ([[600]], GREEDY, "token ids must be below the vocabulary's size of 512"),
        ([[1] * 2040], GREEDY, "the prompt has 2040 tokens and max_tokens is 24: together more than the limit of 2048"),
    ],
)
def test_errors_of_a_request_are_one_line(
    colocated: LLM, prompt: list[list[int]], params: SamplingParams, message: str
) -> None:
    if not prompt:
        assert colocated.generate(prompt, params) == []
        return
    with pytest.raises(ValueError, match=message) as raised:
        colocated.generate(prompt, params)
    assert "\n" not in str(raised.value)
    assert len(colocated.generate(TEXTS, GREEDY)) == len(TEXTS)  # nothing is broken by it


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": "dummy:huge"}, ValueError, "unknown shape 'huge'"),
        ({"model": "/nowhere/at/all"}, (ValueError, OSError), "/nowhere/at/all"),
        ({"policy": "mine"}, ValueError, "unknown policy 'mine'"),
        ({"link": "pigeon"}, (StartError, ValueError), "unknown link 'pigeon'"),
        ({"wings": 2}, (TypeError, ValueError), "wings"),
        ({"handoff": "store"}, ValueError, "--handoff store goes through --kv-store, and none is given"),
        ({"kv_store": "local:DRAM=1M", "prefix_caching": False}, ValueError, "the prefix caches know, and there are"),
        ({"kv_codec": "zip"}, ValueError, "the codec is zip: expected one of raw, int8"),
        ({"decode_after": 0}, ValueError, "a decode worker goes on after a token at the earliest, not 0"),
        ({"prefill": replace(WORKER, kv_cache_memory=100)}, StartError, "a KV cache of 100 bytes holds no page"),
        ({"prefill": replace(WORKER, cpus="999")}, ValueError, "asks for core 999"),
    ],
)
def test_errors_of_a_start_are_one_line(
    settings: dict[str, object], error: type[Exception], message: str, tmp_path: object
) -> None:
    with pytest.raises(error, match=message) as raised:
        LLM(**({"model": MODEL, "prefill": WORKER} | settings))  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)
