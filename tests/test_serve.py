"""The server over real workers: the same tokens as offline, and nothing left of clients that left."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial

import aiohttp
import cluster
import openai
import pytest
from cluster import assert_clean, needs_two_cores
from serving import real_engine, serving

from minidisagg import LLM, SamplingParams
from minidisagg.config import Mode, RunSettings
from minidisagg.model.loader import cached_path

pytestmark = needs_two_cores
TEXTS = ["Once", "The quick brown fox jumps", "x" * 90, "a", "Prefill and decode"]


@pytest.mark.parametrize("mode", ["colocated", "disagg"])
def test_greedy_output_is_that_of_the_offline_api(mode: Mode) -> None:
    settings = cluster.settings(mode, link="unix" if mode == "disagg" else "auto")
    fields = {name: getattr(settings, name) for name in settings.__struct_fields__}
    sampling = SamplingParams(temperature=0.0, max_tokens=24, logprobs=1)
    with LLM(cluster.MODEL.model, block_size=cluster.PAGE, **fields) as llm:
        expected = llm.generate(TEXTS, sampling)
    with serving(partial(real_engine, cluster.MODEL, settings, RunSettings())) as served:
        with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
            for text, output in zip(TEXTS, expected, strict=True):
                made = client.completions.create(model=cluster.MODEL.model, prompt=text, max_tokens=24, temperature=0)
                assert made.choices[0].text == output.text
            batch = client.completions.create(
                model=cluster.MODEL.model, prompt=TEXTS, max_tokens=24, temperature=0, logprobs=1, echo=True
            )
        for choice, text, output in zip(batch.choices, TEXTS, expected, strict=True):
            assert choice.text == text + output.text
            assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
            assert len(choice.logprobs.token_logprobs) == len(text) + 24
            # Greedy: each token is the likeliest, and prefill and decode workers agree on how likely.
            assert all(value is not None and value <= 0 for value in choice.logprobs.token_logprobs[1:])
        served.call(assert_clean(served.frontend))


@pytest.mark.parametrize("mode", ["colocated", "disagg"])
def test_300_clients_of_which_many_leave(mode: Mode) -> None:
    settings = cluster.settings(mode, pages=400)
    rng = random.Random(5)

    async def one(session: aiohttp.ClientSession, url: str, slots: asyncio.Semaphore) -> str:
        body = {
            "prompt": cluster.random_prompt(rng, rng.randint(4, 300)), "max_tokens": rng.randint(1, 60),
            "ignore_eos": True, "stream": rng.random() < 0.7, "n": rng.choice((1, 1, 1, 3)),
        }  # fmt: skip
        patience = rng.choice((60.0, 60.0, rng.uniform(0.0, 0.5), rng.uniform(0.0, 3.0)))
        async with slots:
            try:
                async with asyncio.timeout(patience), session.post(url + "/v1/completions", json=body) as answer:
                    await answer.read()
                    return "ended" if answer.status == 200 else f"status {answer.status}"
            except TimeoutError:
                return "left"

    async def load(url: str) -> list[str]:
        slots = asyncio.Semaphore(40)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            return await asyncio.gather(*(one(session, url, slots) for _ in range(300)))

    with serving(partial(real_engine, cluster.MODEL, settings, RunSettings())) as served:
        ends = asyncio.run(load(served.url))
        assert set(ends) == {"ended", "left"} and min(ends.count("ended"), ends.count("left")) >= 60
        served.call(assert_clean(served.frontend, within=10.0))


def test_smollm2_through_the_openai_client() -> None:
    if not (cached_path("smollm2-135m") / "config.json").is_file():
        pytest.skip("smollm2-135m is not in the cache; `minidisagg pull` gets it")
    from minidisagg.config import ClusterSettings, ModelSettings

    for mode in ("colocated", "disagg"):
        settings = ClusterSettings(mode=mode, decode_workers=int(mode == "disagg"))  # type: ignore[arg-type]
        with serving(partial(real_engine, ModelSettings(), settings, RunSettings())) as served:
            with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
                text = client.completions.create(
                    model="smollm2-135m", prompt="The capital of France is", max_tokens=4, temperature=0
                )
                assert text.choices[0].text.startswith(" Paris")
                stream = client.chat.completions.create(
                    model="smollm2-135m", messages=[{"role": "user", "content": "Say hello."}], max_tokens=12,
                    temperature=0, stream=True,
                )  # fmt: skip
                assert "ello" in "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            served.call(assert_clean(served.frontend))


def test_the_command_serves_drains_and_leaves_nothing() -> None:
    command = [
        sys.executable, "-m", "minidisagg", "serve", "dummy:tiny", "--mode", "disagg", "--port", "0",
        "--max-model-len", "512",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    url = next(line for line in process.stderr if "serving on" in line).split()[2]
    port = url.partition("//")[2].partition("/")[0].rpartition(":")[2]
    taken = subprocess.run([*command[:-3], port], capture_output=True, text=True)
    assert taken.returncode == 2 and "Address already in use" in taken.stderr and taken.stderr.count("\n") == 1
    listening = subprocess.run(["ss", "-ltnp"], capture_output=True, text=True).stdout if _has_ss() else ""
    for line in listening.splitlines():
        if f"pid={process.pid}," in line:
            assert line.split()[3].startswith(("127.", "[::1]")), f"open beyond loopback: {line}"

    async def drive() -> str:
        async with aiohttp.ClientSession() as session:
            body = {"prompt": "abc", "max_tokens": 400, "ignore_eos": True}
            asking = asyncio.create_task(session.post(f"{url}/completions", json=body).__aenter__())
            await asyncio.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            answer = await asking
            made = await answer.json()
            answer.release()
            return str(made["choices"][0]["finish_reason"])

    assert asyncio.run(drive()) == "length"
    began = time.monotonic()
    _, rest = process.communicate(timeout=20)
    assert process.returncode == 0 and "Traceback" not in rest
    assert time.monotonic() - began < 10
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    assert children == ""


def _has_ss() -> bool:
    return any(os.access(os.path.join(path, "ss"), os.X_OK) for path in os.environ["PATH"].split(":"))


def test_beyond_loopback_a_key_is_needed() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "minidisagg", "serve", "dummy:tiny", "--host", "0.0.0.0"], capture_output=True, text=True
    )
    assert made.returncode == 2 and "--api-key" in made.stderr and made.stderr.count("\n") == 1
