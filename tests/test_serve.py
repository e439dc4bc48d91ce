"""The server over real workers: the same tokens as offline, and nothing left of clients that left."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import cluster
import msgspec
import openai
import pytest
from cluster import assert_clean, needs_two_cores
from rich.console import Console
from rich.progress import Progress, TextColumn
from serving import Serving, real_engine, serving

from minidisagg import LLM, SamplingParams
from minidisagg.config import Mode, ModelSettings, RunSettings
from minidisagg.core.messages import Role
from minidisagg.core.router import Router
from minidisagg.core.tracked import Stage, Tracked
from minidisagg.model.loader import cached_path
from minidisagg.model.tokenizer import Tokenizer
from minidisagg.runtime.frontend import Frontend
from minidisagg.server import generation
from minidisagg.server.app import Server, ServerSettings, listening
from minidisagg.server.run import _Stderr

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


@dataclass
class Client:
    """One of many: which stage it leaves at ("": it stays), and how it ended."""

    leaves_at: str
    task: asyncio.Task[None] | None = None
    end: str = ""


def router_stage(request: Tracked) -> str:
    """Where the router has a request. It does not hear when a worker begins with a prompt: the decision log knows."""
    if request.computing:
        return "prefilling" if request.prefill else "queued"
    return "transferring" if request.stage is Stage.TRANSFER else "decoding"


def seems_at(router: Router, request: Tracked) -> str:
    """A guess, to leave at the right time: FCFS prefills the oldest first, and 32 tokens of two prompts in a step."""
    stage = router_stage(request)
    if stage == "prefilling":
        older = [r for r in router.requests.values() if r.computing and r.arrival < request.arrival]
        return "queued" if len(older) > 4 else "prefilling" if not older else "between"
    return stage


def first_planned(directory: Path, workers: Sequence[str]) -> dict[str, float]:
    """When the workers that prefill planned the first tokens of each request: the same clock as here."""
    first: dict[str, float] = {}
    for name in workers:
        for line in (directory / f"{name}.jsonl").read_text().splitlines():
            decision = json.loads(line)
            if decision["hook"] == "compose":
                for request_id, *_ in decision["answer"]:
                    first.setdefault(request_id, decision["clock"])
    return first


@pytest.mark.parametrize("mode", ["colocated", "disagg"])
def test_a_prompt_is_scored_as_often_as_it_is_sent(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is scored shares its prefix with nothing, itself included; and what the worker says of itself is there."""
    monkeypatch.setattr(generation, "id", lambda _: 1, raising=False)  # Python gives an object's id again
    settings = cluster.settings(mode, link="unix" if mode == "disagg" else "auto")
    prompt = cluster.random_prompt(random.Random(3), 300)
    run = RunSettings(seed=(1 << 32) - 1)  # the largest that --seed takes
    with serving(partial(real_engine, cluster.MODEL, settings, run)) as served:
        with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
            found = [
                client.completions.create(
                    model=cluster.MODEL.model, prompt=prompt, echo=True, logprobs=1, max_tokens=1, temperature=0
                ).choices[0].logprobs
                for _ in range(6)
            ]  # fmt: skip
            sampled = client.completions.create(model=cluster.MODEL.model, prompt=prompt, max_tokens=3)
        values = [scores.token_logprobs for scores in found if scores is not None]
        assert len(values) == 6 and all(value == values[0] for value in values) and len(values[0] or ()) == 301
        assert sampled.usage is not None and sampled.usage.completion_tokens >= 1
        served.call(served.frontend.fresh_stats())
        text = served.server.metrics.render().decode()
        for name, role in {"colocated": (("both", "both"),), "disagg": (("prefill", "decode"),)}[mode]:
            assert f'minidisagg:time_to_first_token_seconds_count{{role="{name}"' in text
            assert f'minidisagg:request_decode_time_seconds_count{{role="{role}"' in text
            assert f'minidisagg:worker_busy_share{{role="{role}"' in text
        served.call(assert_clean(served.frontend))


@pytest.mark.parametrize("mode", [pytest.param("colocated", marks=pytest.mark.slow), "disagg"])
def test_300_clients_of_which_most_leave(mode: Mode, tmp_path: Path) -> None:
    """At every stage, as it was when the abort came; then nothing is left of them, and all pages can be had."""
    stages = ["queued", "prefilling", "transferring", "decoding"]
    if mode == "colocated":
        stages.remove("transferring")
    rng = random.Random(5)
    shape = cluster.settings(mode, pages=250)
    worker = msgspec.structs.replace(shape.prefill, max_num_batched_tokens=64)
    shape = msgspec.structs.replace(shape, prefill=worker, decode=worker)
    delays = {"prefill": 0.01, "transfer": 0.15, "decode": 0.02}  # seconds, else a tiny model is through at once
    model = ModelSettings(model="dummy:tiny,std=0.15,max_len=4096", block_size=cluster.PAGE)
    shared = cluster.random_prompt(rng, 5 * cluster.PAGE)
    clients = [Client(leaves_at) for leaves_at in [*stages, ""] * (300 // (len(stages) + 1))]
    rng.shuffle(clients)
    left: list[tuple[float, str, int, str]] = []  # when, request id, client, stage by the router

    async def one(session: aiohttp.ClientSession, url: str, number: int) -> None:
        client = clients[number]
        prompt = [*(shared if rng.random() < 0.2 else ()), *cluster.random_prompt(rng, rng.randint(4, 250))]
        body = {
            "prompt": [*prompt, *divmod(number, 512)], "max_tokens": rng.randint(20, 60), "ignore_eos": True,
            "stream": rng.random() < 0.7, "n": rng.choice((1, 1, 1, 3)),
        }  # fmt: skip
        async with session.post(url, json=body) as answer:
            await answer.read()
            client.end = "ended" if answer.status == 200 else f"status {answer.status}"

    def asker(request: Tracked) -> int:
        return request.prompt[-2] * 512 + request.prompt[-1]

    async def watch(router: Router) -> None:
        """Has each client leave once its request is where it wants to leave."""
        while True:
            for request in router.requests.values():
                client = clients[asker(request)]
                if client.task is not None and not client.end and seems_at(router, request) == client.leaves_at:
                    client.end = "left"
                    client.task.cancel()
            await asyncio.sleep(0.002)

    async def load(frontend: Frontend, session: aiohttp.ClientSession, url: str) -> None:
        slots = asyncio.Semaphore(40)

        async def take_turn(number: int) -> None:
            async with slots:
                clients[number].task = asyncio.create_task(one(session, url, number))
                await asyncio.wait([clients[number].task])
            if number in (100, 101):  # for a while all that comes waits in the router
                frontend.pause(True)
                asyncio.get_running_loop().call_later(0.3, frontend.pause, False)

        await asyncio.gather(*map(take_turn, range(len(clients))))

    async def run() -> Counter[str]:
        async with real_engine(model, shape, RunSettings(delays=delays, decision_dir=str(tmp_path))) as frontend:
            abort, router = frontend.abort, frontend.router

            def noting(request_id: str) -> None:
                if (request := router.requests.get(request_id)) is not None and not request.incarnation:
                    left.append((time.monotonic(), request_id, asker(request), router_stage(request)))
                abort(request_id)

            frontend.abort = noting  # type: ignore[method-assign]
            server = Server(frontend, Tokenizer.load(model.model), ServerSettings(port=0))
            many = aiohttp.TCPConnector(limit=0)
            async with listening(server) as port, aiohttp.ClientSession(connector=many) as session:
                url = f"http://127.0.0.1:{port}/v1/completions"
                watching = asyncio.create_task(watch(router))
                await load(frontend, session, url)
                watching.cancel()
                await asyncio.wait_for(server.idle.wait(), 5)  # it is about to hear of the last ones
                await assert_clean(frontend, within=10.0)
                planned = first_planned(tmp_path, [name for name, role, _ in shape.roles() if role & Role.PREFILL])
                # One request that needs every page there is, and then as many as fit in a batch.
                size = frontend.max_model_len
                assert {hello.num_pages * cluster.PAGE for hello in frontend.hellos.values()} == {size}
                whole = {"prompt": cluster.random_prompt(rng, size - 4), "max_tokens": 4}
                batch = {"prompt": [cluster.random_prompt(rng, 20) for _ in range(3)], "max_tokens": 40, "n": 16}
                for body in (whole, batch):
                    async with session.post(url, json=body | {"ignore_eos": True}) as answer:
                        made = await answer.json()
                        assert answer.status == 200, made
                        assert {choice["finish_reason"] for choice in made["choices"]} == {"length"}, made
                await assert_clean(frontend)
        hits = set[tuple[int, str]]()  # several choices of a client count once
        for at, request_id, number, stage in left:
            begun = stage != "prefilling" or planned.get(request_id, at) < at
            hits.add((number, stage if begun else "queued"))
        return Counter(stage for _, stage in hits)

    hits = asyncio.run(run())
    ends = Counter(client.end for client in clients)
    sys.stdout.write(f"{mode}: clients {dict(ends)}; they left at {dict(hits)}\n")
    assert set(ends) == {"ended", "left"} and min(ends.values()) >= 300 // (len(stages) + 1)
    assert all(hits[stage] >= 5 for stage in stages), hits


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


CANARY = "zyx-canary-4711"  # in every prompt
KEY = "right-key-5820"


@dataclass
class Command:
    """A `minidisagg serve` that runs, and all that it and its workers say."""

    process: subprocess.Popen[str]
    url: str
    folder: Path  # $TMPDIR: its run directory is in it
    said: list[str] = field(default_factory=list)

    def run_dir(self) -> Path:
        (found,) = self.folder.glob("minidisagg-*")
        return found

    def family(self) -> set[int]:
        """Its process and all below it."""
        found, new = set[int](), {self.process.pid}
        while new:
            found |= new
            new = {int(pid) for parent in new for pid in _children(parent)} - found
        return found

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}", **headers}) as session:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            async with session.post(self.url + path, data=data) as answer:
                return answer.status, await answer.text()


def _children(pid: int) -> list[str]:
    return [pid for task in Path(f"/proc/{pid}/task").iterdir() for pid in (task / "children").read_text().split()]


@contextlib.contextmanager
def serve_command(*arguments: str, model: str = "dummy:tiny,max_len=512") -> Iterator[Command]:
    """In disagg mode; at the end it is killed if it still runs."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="serve-") as folder:  # short: it will hold sockets
        process = subprocess.Popen(
            [sys.executable, "-m", "minidisagg", "serve", model, "--mode", "disagg", "--port", "0", *arguments],
            stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": folder},
        )  # fmt: skip
        assert process.stderr is not None
        said: list[str] = []
        for line in process.stderr:
            said.append(line)
            if "serving on" in line:
                break
        else:
            raise AssertionError("".join(said))
        url = next(word for word in said[-1].split() if word.startswith("http")).removesuffix("/v1")
        reader = threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True)
        reader.start()
        try:
            yield Command(process, url, Path(folder), said)
        finally:
            process.kill()
            process.wait()
            reader.join(5)
            process.stderr.close()


def test_the_command_serves_drains_and_leaves_nothing() -> None:
    with serve_command() as command:
        port = command.url.rpartition(":")[2]
        taken = subprocess.run(
            [sys.executable, "-m", "minidisagg", "serve", "dummy:tiny", "--port", port], capture_output=True, text=True
        )
        assert taken.returncode == 2 and "Address already in use" in taken.stderr and taken.stderr.count("\n") == 1

        async def drive() -> str:
            body = {"prompt": "abc", "max_tokens": 400, "ignore_eos": True}
            asking = asyncio.create_task(command.post("/v1/completions", body))
            await asyncio.sleep(0.3)
            command.process.send_signal(signal.SIGTERM)
            return str(json.loads((await asking)[1])["choices"][0]["finish_reason"])

        family = command.family()
        assert asyncio.run(drive()) == "length"
        began = time.monotonic()
        assert command.process.wait(20) == 0
        assert time.monotonic() - began < 10
        assert len(family) == 4 and not [pid for pid in family if Path(f"/proc/{pid}").exists()]
        assert not list(command.folder.glob("minidisagg-*"))
    assert "Traceback" not in "".join(command.said)


def test_all_sockets_are_on_loopback() -> None:
    """Those of the workers too, of which gloo opens several, in use."""
    if shutil.which("ss") is None:
        pytest.skip("there is no `ss` to ask which sockets listen")
    with serve_command("--link", "gloo") as command:
        body = {"prompt": "abc", "max_tokens": 4}
        assert asyncio.run(command.post("/v1/completions", body))[0] == 200  # the link is there
        family = command.family()
        listed = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
        addresses: dict[int, list[str]] = {pid: [] for pid in family}
        for line in listed.splitlines():
            for pid in family:
                if f"pid={pid}," in line:
                    addresses[pid].append(line.split()[3])
    sys.stdout.write(f"listening: {addresses}\n")
    assert len(family) == 4 and sum(map(bool, addresses.values())) >= 2, "gloo listens in the workers"
    for address in itertools.chain(*addresses.values()):
        assert address.startswith(("127.", "[::1]")), f"open beyond loopback: {address}"


def test_prompts_and_keys_are_in_no_log() -> None:
    """`serve -v` through all that can go wrong with a prompt; its own log, and those of its workers."""
    prompt = f"say {CANARY}"

    async def drive(command: Command) -> list[int]:
        chat = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 3}
        requests: list[tuple[str, Any]] = [
            ("/v1/completions", {"prompt": prompt, "max_tokens": 3}), ("/v1/chat/completions", chat),
            ("/v1/completions", {"prompt": prompt, "max_tokens": 3, "stream": True, "logprobs": 2, "echo": True}),
            ("/v1/completions", {"prompt": prompt * 100, "max_tokens": 3}), ("/v1/completions", prompt.encode()),
            ("/v1/completions", {"prompt": prompt, "top_p": CANARY}), ("/v1/completions", {"prompt": {CANARY: 1}}),
            ("/v1/completions", {"prompt": prompt, "model": CANARY}), ("/v1/completions", {CANARY: 1}),
            ("/v1/chat/completions", chat | {"messages": [{"role": CANARY, "content": prompt}]}),
            ("/tokenize", {"prompt": prompt}), ("/v1/completions", b'{"prompt": "' + prompt.encode() + b"\xff"),
        ]  # fmt: skip
        statuses = [(await command.post(path, body))[0] for path, body in requests]
        with contextlib.suppress(TimeoutError):  # a client that leaves
            body = {"prompt": prompt, "max_tokens": 400, "ignore_eos": True}
            await asyncio.wait_for(command.post("/v1/completions", body), 0.2)
        asking = [asyncio.create_task(command.post("/v1/completions", body | {"seed": n})) for n in range(3)]
        await asyncio.sleep(0.1)
        killed = await command.post("/admin/workers/decode-0/kill", b"")  # with prompts in hand
        return [*statuses, killed[0], *(status for status, _ in await asyncio.gather(*asking))]

    with serve_command("-v", "--api-key", KEY) as command:
        statuses = asyncio.run(drive(command))
        logs = {path.name: path.read_text(errors="replace") for path in command.run_dir().glob("*.log")}
        command.process.send_signal(signal.SIGTERM)
        assert command.process.wait(20) == 0
    logs["stderr"] = "".join(command.said)
    sizes = {name: len(text) for name, text in logs.items()}
    sys.stdout.write(f"statuses {statuses}, characters in logs {sizes}\n")
    assert statuses == [200] * 3 + [400] * 4 + [404] + [400, 400, 200, 400, 200, 200, 200, 200]
    assert set(logs) == {"stderr", "prefill-0.log", "decode-0.log"}
    assert logs["stderr"].count("/v1/completions") >= 10 and "decode-0 is down" in logs["stderr"]
    for name, text in logs.items():
        assert CANARY not in text and KEY not in text and "Traceback" not in text, name


def test_no_key_learns_what_another_has_asked() -> None:
    """Each key has a prefix cache of its own: else the time to the first token, or `cached_tokens`, would tell."""
    prompt = cluster.random_prompt(random.Random(1), 20 * cluster.PAGE)
    settings = cluster.settings("disagg")

    async def ask(url: str, key: str, salt: str | None = None) -> int:
        body = {"prompt": prompt, "max_tokens": 2, "ignore_eos": True} | ({"cache_salt": salt} if salt else {})
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as session:
            async with session.post(url + "/v1/completions", json=body) as answer:
                return int((await answer.json())["usage"]["prompt_tokens_details"]["cached_tokens"])

    async def run(served: Serving) -> list[int]:
        asked = [("a-key", None), ("a-key", None), ("b-key", None), ("b-key", None), ("a-key", "x"), ("b-key", "x")]
        return [await ask(served.url, key, salt) for key, salt in asked]

    with serving(partial(real_engine, cluster.MODEL, settings, RunSettings()), api_keys=("a-key", "b-key")) as served:
        cached = asyncio.run(run(served))
        stats = served.call(served.frontend.fresh_stats())
    most = len(prompt) - cluster.PAGE  # one token is computed always
    assert cached == [0, most, 0, most, 0, 0]
    assert stats["prefill-0"].prefix_hits == 2 * most


def test_beyond_loopback_a_key_is_needed() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "minidisagg", "serve", "dummy:tiny", "--host", "0.0.0.0"], capture_output=True, text=True
    )
    assert made.returncode == 2 and "--api-key" in made.stderr and made.stderr.count("\n") == 1


@needs_two_cores
def test_what_the_front_end_costs_can_be_measured() -> None:
    script = Path(__file__).parent.parent / "scripts" / "frontend_cost.py"
    options = ("--connections", "8", "--seconds", "0.5", "--tokens", "64")
    made = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=60)
    assert made.returncode == 0, made.stderr
    measured = json.loads(made.stdout.splitlines()[-1])
    assert measured["plain"]["tokens_per_s"] > 1000
    assert all(spent > 0 for spent in measured["counted"]["parts_us"].values())


# Each field at the ends of its range, next to them, beyond them, and of no type that it has.
POISON: dict[str, tuple[str, ...]] = {
    "temperature": ("0", "5e-324", "1e-310", "1e-38", "1e-5", "2", "2.0000001", "-1e-300", "1e400", "NaN", "true"),
    "top_p": ("5e-324", "1e-300", "0.9999999999999999", "1", "0", "1e400", "null"),
    "min_p": ("0", "5e-324", "1e-300", "0.9999999999999999", "1", "-0.0"),
    "top_k": ("-1", "0", "1", "1048576", "1048577", "1e3"),
    "repetition_penalty": ("1e-300", "1e-38", "5e-324", "0.01", "0.0099", "10", "1e300", "0", "-1"),
    "presence_penalty": ("-2", "2", "5e-324", "-2.1", "1e308"),
    "frequency_penalty": ("-2", "2", "5e-324", "2.1", "-1e308"),
    "seed": ("-9223372036854775808", "9223372036854775807", "9223372036854775808", "0.5"),
    "min_tokens": ("0", "16", "17", "-1"),
    "stop_token_ids": ("[]", json.dumps(list(range(64))), "[-1]", "[99999999999]", json.dumps(list(range(448, 512)))),
    "stop": ('[""]', '["a", "b", "c", "d"]', '"\\ud83d"'),
    "logprobs": ("0", "20", "21"),
    "echo": ("true", "false"),
    "ignore_eos": ("true",),
    "n": ("1", "16", "0"),
    "max_tokens": ("0", "1", "16", "1048576"),
    "prompt": ("[0]", "[511]", "[512]", "[-1]", '""', "[]", '"x"', "[[1], [2, 3]]", '["\\u0000"]'),
}


def poison(rng: random.Random) -> str:
    fields = {"prompt": '"abc"', "max_tokens": "16", "temperature": "1"}
    for name in rng.sample(sorted(POISON), rng.randint(1, 6)):
        fields[name] = rng.choice(POISON[name])
    return "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}"


@pytest.mark.parametrize(
    "seconds", [3.0, pytest.param(60.0, marks=[pytest.mark.slow, pytest.mark.timeout(300)])]
)  # fmt: skip
def test_eight_streams_lose_nothing_beside_a_client_that_sends_poison(seconds: float) -> None:
    body = {"max_tokens": 64, "temperature": 0.0, "ignore_eos": True, "stream": True}
    statuses: Counter[int] = Counter()
    server_errors: list[str] = []

    async def streams(url: str, prompt: str, end: float) -> list[str]:
        texts = []
        async with aiohttp.ClientSession() as session:
            while time.monotonic() < end or not texts:
                text = ""
                async with session.post(url, json={**body, "prompt": prompt}) as answer:
                    assert answer.status == 200
                    async for line in answer.content:
                        if line.startswith(b"data: {"):
                            event = json.loads(line[6:])
                            assert "error" not in event, event
                            text += event["choices"][0]["text"] if event["choices"] else ""
                texts.append(text)
        return texts

    async def poisons(url: str, end: float) -> None:
        rng = random.Random(7)
        async with aiohttp.ClientSession() as session:
            while time.monotonic() < end:
                asked = [poison(rng) for _ in range(8)]
                answers = await asyncio.gather(*(session.post(url, data=text) for text in asked))
                for text, answer in zip(asked, answers, strict=True):
                    statuses[answer.status] += 1
                    if answer.status >= 500:
                        server_errors.append(f"{text}: {await answer.text()}")
                    answer.release()

    async def all_of_them(url: str, alone: list[str]) -> None:
        end = time.monotonic() + seconds
        *many, _ = await asyncio.gather(*(streams(url, f"prompt {i}", end) for i in range(8)), poisons(url, end))
        for want, texts in zip(alone, many, strict=True):
            assert set(texts) == {want}

    settings = cluster.settings("disagg", link="unix")
    with serving(partial(real_engine, cluster.MODEL, settings, RunSettings())) as served:
        url = served.url + "/v1/completions"
        alone = [asyncio.run(streams(url, f"prompt {i}", 0.0))[0] for i in range(8)]
        asyncio.run(all_of_them(url, alone))
        assert served.frontend.restarted == [] and not server_errors, server_errors[:3]
        assert statuses[200] > 10 and statuses[400] > 10, statuses
        served.call(assert_clean(served.frontend))


def test_a_log_line_stands_above_the_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn begins anew below it: rich does so for what is written to sys.stderr, as it is at the time."""
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    logger = logging.Logger("bars")
    logger.addHandler(logging.StreamHandler(_Stderr()))  # type: ignore[arg-type]
    with Progress(TextColumn("{task.description}"), console=Console(file=screen, force_terminal=True)) as bars:
        bars.add_task("decode-0: weights")
        bars.refresh()
        logger.warning("a line of the log")
    logger.warning("after them")
    rows = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").splitlines()
    assert "a line of the log" in rows and "after them" in rows
