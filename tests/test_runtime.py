"""What a running cluster tells of itself: stage times, input logs, and a real model's words."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from cluster import (
    MODEL,
    Load,
    assert_clean,
    cluster,
    greedy,
    needs_two_cores,
    prompts,
    random_prompt,
    run_to_end,
    send_signal,
    settings,
)

from minidisagg.config import STAGES, ModelSettings, RunSettings
from minidisagg.core.inputlog import read_entries, replay
from minidisagg.core.inputs import PieceDone, Received
from minidisagg.core.messages import Abort, Starting
from minidisagg.core.tracked import StageTimes
from minidisagg.model.loader import cached_path
from minidisagg.model.tokenizer import Tokenizer
from minidisagg.policies import load_policy
from minidisagg.runtime.frontend import Frontend
from minidisagg.runtime.launch import MALLOC_TUNABLES
from minidisagg.starting import StartBars
from minidisagg.workload.lengths import text_items

figures = logging.getLogger("figures")  # pytest --log-cli-level=INFO shows them

# ---------------------------------------------------------------- stage times


async def stage_times(delays: dict[str, float]) -> StageTimes:
    """The least of a few requests on an idle cluster: other load on the machine only adds."""
    rng = random.Random(0)
    async with cluster(settings("disagg"), RunSettings(delays=delays)) as frontend:
        await run_to_end(frontend, [random_prompt(rng, 30)], greedy(4))  # opens the link
        times = []
        for _ in range(5):
            load = Load(frontend)
            result = load.submit(random_prompt(rng, 30), greedy(4))
            await load.finished()
            assert result.times is not None
            times.append(result.times)
            parts = sum(getattr(result.times, stage) for stage in STAGES)
            assert parts == pytest.approx(result.times.e2e, abs=1e-9)
            assert result.times.e2e == pytest.approx(result.at[-1] - result.submitted, abs=0.005)
    return StageTimes(*(min(getattr(t, f) for t in times) for f in StageTimes.__struct_fields__))


async def check_delays(patterns: list[dict[str, float]]) -> None:
    """Each pattern of injected delays moves its stages by that much, and no other."""
    base = await stage_times({})
    for delays in patterns:
        for last in (False, False, True):  # a host that stands still for a moment is given another chance
            times = await stage_times(delays)
            moved = {stage: getattr(times, stage) - getattr(base, stage) for stage in STAGES}
            figures.info("delays %s moved %s from %s", delays, moved, base)
            # Less than half of the smallest delay; a busy machine makes the steps of a stage 20 ms longer.
            if all(abs(moved[stage] - delays.get(stage, 0.0)) < 0.05 for stage in STAGES):
                break
            assert not last, (delays, moved, base)
            base = await stage_times({})


@needs_two_cores
def test_what_workers_are_at_is_told_until_they_are_up() -> None:
    """And a person at a terminal has a line for each that is not."""
    bars, at = StartBars(), dict[str, list[Starting | None]]()

    def on_starting(worker: str, starting: Starting | None) -> None:
        at.setdefault(worker, []).append(starting)
        bars.tell(worker, starting)
        lines = {f"{name}: weights" for name, told in at.items() if told[-1] is not None}
        assert {task.description for task in bars.tasks} == lines

    async def run() -> None:
        async with await Frontend.start(MODEL, settings("disagg"), RunSettings(), on_starting=on_starting):
            pass

    asyncio.run(run())
    assert at == {name: [Starting("weights"), None] for name in ("prefill-0", "decode-0")}


def test_injected_delays_move_their_stages_and_no_other() -> None:
    asyncio.run(check_delays([{"queue": 0.2, "transfer": 0.12, "decode": 0.16}, {"prefill": 0.2, "decode_wait": 0.12}]))


@needs_two_cores
@pytest.mark.slow
def test_one_injected_delay_moves_one_stage() -> None:
    asyncio.run(check_delays([{stage: 0.2} for stage in STAGES]))


# ---------------------------------------------------------------- input logs


@needs_two_cores
def test_a_run_with_faults_replays_to_the_same_plans(tmp_path: Path) -> None:
    """Clients leave and the decode worker is killed; its log is readable up to that moment."""

    async def run() -> float:
        rng = random.Random(3)
        shape = settings("disagg", "gloo", pages=80)
        async with cluster(shape, RunSettings(record_dir=str(tmp_path), delays={"transfer": 0.005})) as frontend:
            load = Load(frontend)
            results = load.submit_all(prompts(80, seed=4, longest=200), greedy(32))
            for left in (70, 60, 50):
                await load.until(lambda left=left: len(load.open) <= left)  # type: ignore[misc]
                for result in rng.sample([r for r in results if not r.finish], 4):
                    frontend.abort(result.request_id)
            killed = time.monotonic()
            send_signal(frontend, "decode-0", signal.SIGKILL)
            await load.finished()
            assert {result.finish for result in results} == {"length", "abort"}
            await assert_clean(frontend)
            return killed

    killed = asyncio.run(run())
    for name in ("prefill-0.1", "decode-0.1", "decode-0.2"):
        path = tmp_path / f"{name}.inputs"
        with path.open("rb") as log:
            plans = list(replay(log, load_policy))
        assert sum(recorded is not None for recorded, _ in plans) > 10, name
        assert [recorded for recorded, _ in plans] == [replayed for _, replayed in plans], name
        with path.open("rb") as log:
            entries = [entry for entry, _ in read_entries(log)[1]]
        inputs = [entry.what for entry in entries]
        assert any(isinstance(what, PieceDone) for what in inputs)
        if name != "decode-0.2":
            assert any(isinstance(what, Received) and isinstance(what.envelope.body, Abort) for what in inputs)
        if name == "decode-0.1":
            assert killed - 0.3 < entries[-1].now < killed + 0.05  # a tick every 0.25 s
        with path.open("rb") as log:  # cut anywhere, it is readable up to there
            data = log.read()
        (tmp_path / "cut").write_bytes(data[: len(data) // 2])
        with (tmp_path / "cut").open("rb") as log:
            assert 0 < len(list(read_entries(log)[1])) < len(entries)


# ---------------------------------------------------------------- a real model

SMOLLM2 = "smollm2-135m"


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Any]:
    if not (cached_path(SMOLLM2) / "config.json").is_file():
        pytest.skip(f"{SMOLLM2} is not in the cache; `minidisagg pull {SMOLLM2}` gets it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers deprecates inside itself says nothing about this project
        transformers = pytest.importorskip("transformers")
        yield transformers.AutoModelForCausalLM.from_pretrained(cached_path(SMOLLM2), dtype=torch.float32)


def compare(smollm2: Any, count: int, length: int) -> tuple[int, list[float]]:
    """How many of `count` outputs are transformers' greedy ones, and the logit gaps where the others part."""
    tokenizer = Tokenizer.load(SMOLLM2)
    items = sorted(text_items(20, length, tokenizer.encode), key=lambda item: item.prompt_len)
    chosen = [item.prompt for item in items[:count] if item.prompt is not None]
    model = ModelSettings(model=SMOLLM2, block_size=64)

    async def run() -> list[list[int]]:
        shape = settings("disagg", pages=1, dtype="float32", chunk=128)
        worker = msgspec.structs.replace(shape.prefill, kv_cache_memory=256 << 20)
        shape = msgspec.structs.replace(shape, prefill=worker, decode=worker)
        async with cluster(shape, model=model) as frontend:
            [paris] = await run_to_end(frontend, [tokenizer.encode("The capital of France is")], greedy(8))
            assert tokenizer.decode(paris).startswith(" Paris")
            return await run_to_end(frontend, chosen, greedy(length))

    ours = asyncio.run(run())
    same, gaps = 0, []
    for prompt, tokens in zip(chosen, ours, strict=True):
        with torch.inference_mode():
            logits = smollm2(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        wanted = logits.argmax(-1).tolist()
        same += wanted == tokens
        if wanted != tokens:  # equal up to here, so this is where greedy decoding by transformers would part
            at = next(i for i, (a, b) in enumerate(zip(wanted, tokens, strict=True)) if a != b)
            gaps.append(float(logits[at, wanted[at]] - logits[at, tokens[at]]))
    return same, gaps


@needs_two_cores
@pytest.mark.parametrize(("count", "length"), [(5, 12), pytest.param(20, 48, marks=pytest.mark.slow)])
def test_smollm2_says_what_transformers_says(smollm2: Any, count: int, length: int) -> None:
    same, gaps = compare(smollm2, count, length)
    figures.info("%d of %d outputs are the same; logit gaps %s", same, count, gaps)
    assert same >= 0.9 * count, gaps
    assert all(gap < 1e-3 for gap in gaps)  # two tokens of the same logit, as far as float32 can tell


# ---------------------------------------------------------------- memory

STEADY = """
import resource, threading, torch

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def work():
    kept, worst = [], 0
    for _ in range(140):  # wherever in the thread's arena its temporaries come to lie
        kept.append(torch.ones(1 << 17))
        torch.ones(1 << 19)
        before = faults()
        for _ in range(10):
            torch.ones(1 << 19)
        worst = max(worst, faults() - before)
    print(worst)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the tunables are glibc's")
def test_what_a_step_frees_stays_in_the_process() -> None:
    environment = os.environ | {"GLIBC_TUNABLES": MALLOC_TUNABLES, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", STEADY], env=environment, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 100  # each of the ten would take 512, or one of 2 MiB
