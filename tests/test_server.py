"""The HTTP server with real clients, over an engine that makes tokens up."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import aiohttp
import openai
import pytest
from fake_engine import fake_engine, fake_token
from serving import Serving, serving

from minidisagg.core.messages import Role, SamplingParams
from minidisagg.core.router import RouterSpec
from minidisagg.core.tracked import Stage
from minidisagg.server.app import ServerSettings, drain

MODEL = "dummy:tiny,max_len=4096"


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    with serving() as running:
        yield running
        assert running.frontend.idle


@pytest.fixture
def slow() -> Iterator[Serving]:
    """Fifty steps a second."""
    with serving(partial(fake_engine, 50.0)) as running:
        yield running


@pytest.fixture
def client(served: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def post(served: Serving, path: str, body: Any, **headers: str) -> tuple[int, Any, dict[str, str]]:
    async def send() -> tuple[int, Any, dict[str, str]]:
        async with (
            aiohttp.ClientSession() as session,
            session.post(
                served.url + path, data=body if isinstance(body, bytes) else json.dumps(body), headers=headers
            ) as answer,
        ):
            return answer.status, await answer.json(), {key.lower(): value for key, value in answer.headers.items()}

    return asyncio.run(send())


def get(served: Serving, path: str, **headers: str) -> tuple[int, str]:
    async def send() -> tuple[int, str]:
        async with aiohttp.ClientSession() as session, session.get(served.url + path, headers=headers) as answer:
            return answer.status, await answer.text()

    return asyncio.run(send())


def events(served: Serving, path: str, body: dict[str, Any]) -> list[Any]:
    """The server-sent events of a streamed request, [DONE] checked and left out."""

    async def read() -> bytes:
        async with (
            aiohttp.ClientSession() as session,
            session.post(served.url + path, json={**body, "stream": True}) as answer,
        ):
            assert answer.status == 200 and answer.content_type == "text/event-stream"
            return await answer.read()

    lines = [line for line in asyncio.run(read()).split(b"\n\n") if line]
    assert all(line.startswith(b"data: ") for line in lines)
    assert lines[-1] == b"data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def until(condition: Any, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.01)


# ---------------------------------------------------------------- completions


def test_completion_and_its_stream_are_the_same(client: openai.OpenAI, served: Serving) -> None:
    made = client.completions.create(model=MODEL, prompt="Hello", max_tokens=40, seed=7)
    assert made.choices[0].finish_reason == "length"
    assert made.usage is not None and (made.usage.prompt_tokens, made.usage.completion_tokens) == (5, 40)
    expected = served.server.tokenizer.decode([fake_token(7, i, served.frontend.vocab_size) for i in range(40)])
    assert made.choices[0].text == expected
    stream = list(
        client.completions.create(
            model=MODEL, prompt="Hello", max_tokens=40, seed=7, stream=True, stream_options={"include_usage": True}
        )
    )
    assert len(stream) == 41, "one event per token, whether it has text or not, and the usage"
    assert "".join(chunk.choices[0].text for chunk in stream[:-1]) == expected
    assert [chunk.choices[0].finish_reason for chunk in stream[-2:-1]] == ["length"]
    assert stream[-1].choices == [] and stream[-1].usage == made.usage
    assert len({chunk.id for chunk in stream}) == 1


def test_stage_times_add_up(served: Serving) -> None:
    body = {"prompt": "x" * 300, "max_tokens": 9}
    _, whole, _ = post(served, "/v1/completions", body)
    last = events(served, "/v1/completions", body)[-1]
    for metrics in (whole["metrics"], last["metrics"]):
        assert sum(v for k, v in metrics.items() if k != "e2e") == pytest.approx(metrics["e2e"], abs=1e-9)
        assert metrics["e2e"] > 0


def test_several_prompts_and_choices(client: openai.OpenAI) -> None:
    made = client.completions.create(model=MODEL, prompt=[[1, 2, 3], [4, 5]], n=3, max_tokens=4, seed=1)
    assert [choice.index for choice in made.choices] == list(range(6))
    assert len({choice.text for choice in made.choices}) == 3, "seeds differ by choice, not by prompt"
    assert made.usage is not None and (made.usage.prompt_tokens, made.usage.completion_tokens) == (5, 24)


def test_stop_string_ends_the_request_everywhere(served: Serving, client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="a", max_tokens=64, seed=3).choices[0].text
    stop = whole[9:12]
    cut = client.completions.create(model=MODEL, prompt="a", max_tokens=4000, seed=3, stop=[stop]).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")
    streamed = events(served, "/v1/completions", {"prompt": "a", "max_tokens": 4000, "seed": 3, "stop": stop})
    assert "".join(event["choices"][0]["text"] for event in streamed) == cut.text
    assert streamed[-1]["choices"][0]["finish_reason"] == "stop" and streamed[-1]["metrics"]["e2e"] > 0
    until(lambda: served.frontend.idle)


@pytest.mark.parametrize("kind", ["completions", "chat/completions"])
def test_min_tokens_keeps_stop_strings_off(served: Serving, kind: str) -> None:
    prompt = {"prompt": "a"} if kind == "completions" else {"messages": [{"role": "user", "content": "a"}]}
    body = {**prompt, "max_tokens": 64, "seed": 3}

    def text(choice: dict[str, Any]) -> str:
        return str(choice["text"] if "text" in choice else choice.get("message", choice.get("delta"))["content"])

    whole = text(post(served, f"/v1/{kind}", body)[1]["choices"][0])
    body |= {"stop": [whole[0], whole[3:5]], "min_tokens": 20}
    _, made, _ = post(served, f"/v1/{kind}", body)
    (choice,), usage = made["choices"], made["usage"]
    assert usage["completion_tokens"] > 20 and whole.startswith(text(choice)) and len(text(choice)) > 5
    streamed = events(served, f"/v1/{kind}", body)
    assert len(streamed) == usage["completion_tokens"]
    assert "".join(text(event["choices"][0]) for event in streamed) == text(choice)


@pytest.mark.parametrize("rate", [0.0, 200.0])
def test_cached_tokens_are_told_after_a_stop_string_too(rate: float) -> None:
    """The engine's last word on a request that was aborted for it says nothing of them."""
    with serving(partial(fake_engine, rate)) as served:
        (worker,) = served.frontend.workers.values()
        body: dict[str, Any] = {"prompt": "a prompt of 22 letters", "max_tokens": 100, "seed": 3, "n": 2}
        whole = post(served, "/v1/completions", body)[1]["choices"]
        # Each choice is ended by a string of its own, at once or late.
        body |= {"stop": [whole[0]["text"][:1], whole[1]["text"][30:33]]}
        worker.cached = 16
        made = post(served, "/v1/completions", body)[1]
        assert {choice["finish_reason"] for choice in made["choices"]} == {"stop"}
        assert made["usage"]["completion_tokens"] < 100
        usage = {"include_usage": True, "continuous_usage_stats": True}
        streamed = events(served, "/v1/completions", body | {"stream_options": usage})
        chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 100, "seed": 3, "stop": body["stop"][:1]}
        told = post(served, "/v1/chat/completions", chat)[1]
        for answer in (made, streamed[-1], streamed[-2], told):
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 16


def test_a_scored_prompt_has_a_salt_of_its_own(served: Serving) -> None:
    """Each time, each choice: what is scored must be computed, so that it may share its prefix with nothing."""
    (worker,) = served.frontend.workers.values()

    def salts(body: dict[str, Any]) -> list[str]:
        before = worker.seen
        assert post(served, "/v1/completions", {"max_tokens": 1, **body})[0] == 200
        return [submit.spec.salt for submit in worker.submitted[before - worker.seen :]]

    plain = [salts({"prompt": "a", **more}) for more in ({}, {"echo": True}, {"logprobs": 1}, {"n": 2})]
    assert {salt for some in plain for salt in some} == {""}
    scored = [salts({"prompt": ["a", "a"], "echo": True, "logprobs": 0, "n": 2}) for _ in range(3)]
    assert [len(some) for some in scored] == [4] * 3
    ours = salts({"prompt": "a", "cache_salt": "ours"})
    scored += [salts({"prompt": "a", "echo": True, "logprobs": 0, "cache_salt": "ours"}) for _ in range(2)]
    every = ["", *ours, *(salt for some in scored for salt in some)]
    assert len(set(every)) == len(every) == 2 + 12 + 2


def test_a_conversation_has_a_name(served: Serving) -> None:
    """OpenAI's prompt_cache_key: a policy sees the request's session, and what is decoded goes to the next turn."""
    (worker,) = served.frontend.workers.values()
    turn = {"max_tokens": 1, "messages": [{"role": "user", "content": "a"}]}
    for path, body in ("chat/completions", turn), ("completions", {"max_tokens": 1, "prompt": "a"}):
        for more in {"prompt_cache_key": "c1"}, {"user": "u"}:
            assert post(served, f"/v1/{path}", body | more)[0] == 200
    assert [submit.spec.session for submit in worker.submitted[-4:]] == ["c1", "", "c1", ""]


def test_echo_and_logprobs_as_lm_eval_reads_them(client: openai.OpenAI) -> None:
    made = client.completions.create(
        model=MODEL, prompt=[[72, 105, 33], [65]], echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234
    )
    first = made.choices[0]
    assert first.text.startswith("Hi!") and first.logprobs is not None
    assert first.logprobs.tokens is not None and first.logprobs.tokens[:3] == ["H", "i", "!"]
    assert len(first.logprobs.tokens) == 4
    assert first.logprobs.token_logprobs == [None, -1.0, -1.0, -1.0]
    assert first.logprobs.top_logprobs is not None and first.logprobs.top_logprobs[0] is None
    assert first.logprobs.top_logprobs[1]["i"] == -1.0, "the actual token is always among the likeliest"
    assert first.logprobs.text_offset is not None and first.logprobs.text_offset[:3] == [0, 1, 2]
    alone = client.completions.create(model=MODEL, prompt="Hi!", echo=True, logprobs=0, max_tokens=0).choices[0]
    assert alone.text == "Hi!" and alone.logprobs is not None and alone.logprobs.tokens == ["H", "i", "!"]


# ---------------------------------------------------------------- chat


def test_chat(client: openai.OpenAI, served: Serving) -> None:
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
    ]
    made = client.chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=12, seed=5)
    assert made.choices[0].message.role == "assistant" and made.choices[0].finish_reason == "length"
    prompt = "system: Be brief.\nuser: Hel\nlo\nassistant: "
    assert made.usage is not None and made.usage.prompt_tokens == len(prompt)
    stream = list(client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12, seed=5, stream=True))
    assert stream[0].choices[0].delta.role == "assistant" and len(stream) == 12
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == made.choices[0].message.content
    scored = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=3, logprobs=True, top_logprobs=2, seed=5
    ).choices[0]
    assert scored.logprobs is not None and scored.logprobs.content is not None
    assert [len(content.top_logprobs) for content in scored.logprobs.content] == [2, 2, 2]


def test_chat_without_a_limit_fills_the_context(served: Serving) -> None:
    _, made, _ = post(served, "/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 4000}]})
    assert made["usage"]["total_tokens"] == served.frontend.max_model_len


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("body, param, words", [
    (b"{", None, "JSON"),
    (b"\xff\xfe", None, "JSON"),
    (b'{"prompt": "\\ud800"}', None, "JSON"),
    ({}, None, "prompt"),
    ({"prompt": "a", "temperature": 3}, "temperature", "<= 2"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens", ">= 0"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens", "echo"),
    ({"prompt": "a", "n": 1000}, "n", ">= 1 and <= 16"),
    (b'{"prompt": "a", "temperature": 1e400}', "temperature", ">= 0 and <= 2"),
    ({"prompt": "a", "top_p": 0}, "top_p", "> 0 and <= 1"),
    ({"prompt": "a", "top_k": 10**30}, "top_k", f">= -1 and <= {1 << 20}"),
    ({"prompt": "a", "presence_penalty": -2.5}, "presence_penalty", ">= -2 and <= 2"),
    ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", ">= 0.01 and <= 10"),
    ({"prompt": "a", "repetition_penalty": 0.001}, "repetition_penalty", ">= 0.01 and <= 10"),
    ({"prompt": "a", "repetition_penalty": 11}, "repetition_penalty", ">= 0.01 and <= 10"),
    ({"prompt": "a", "stop_token_ids": [1, -1]}, "stop_token_ids[1]", f">= 0 and < {1 << 31}"),
    ({"prompt": "a", "stream_options": {}}, "stream_options", "stream"),
    ({"prompt": "a", "stream_options": {"include_usage": True}, "stream": False}, "stream_options", "stream"),
    ({"prompt": "a", "stop": [""]}, "stop[0]", "length"),
    ({"prompt": "a", "max_tokens": 5000}, "prompt", "limit"),
    ({"prompt": []}, "prompt", "length"),
    ({"prompt": [[]]}, "prompt", "empty"),
    ({"prompt": [1, "a"]}, "prompt", "mixes"),
    ({"prompt": [10**9]}, "prompt", "vocabulary"),
    ({"prompt": "a", "best_of": 4}, "best_of", "not supported"),
    ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias", "not supported"),
    ({"prompt": "a", "min_tokens": 20}, "min_tokens", "more than max_tokens"),
    ({"prompt": "a", "model": "gpt-9"}, "model", "gpt-9"),
])  # fmt: skip
def test_bad_requests_name_the_field(served: Serving, body: Any, param: str | None, words: str) -> None:
    status, answer, headers = post(served, "/v1/completions", body)
    assert status == (404 if param == "model" else 400)
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["param"] == param and words in answer["error"]["message"]
    assert headers["x-request-id"]


def test_chat_refuses_what_it_cannot_do(served: Serving) -> None:
    message = {"role": "user", "content": "a"}
    for extra in (
        {"tools": [{"type": "function"}]}, {"response_format": {"type": "json_object"}}, {"stream_options": {}},
        {"stream_options": {"include_usage": False}, "stream": False}, {"stream_options": {}, "stream": None},
    ):  # fmt: skip
        status, answer, _ = post(served, "/v1/chat/completions", {"messages": [message], **extra})
        assert status == 400 and answer["error"]["param"] in extra
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}
    assert post(served, "/v1/chat/completions", {"messages": [image]})[0] == 400
    # What would happen anyway is accepted, and so is what nobody knows.
    harmless = {"tools": None, "response_format": {"type": "text"}, "stream_options": None}
    harmless |= {"max_tokens": 2, "new_field": 1}
    assert post(served, "/v1/chat/completions", {"messages": [message], **harmless})[0] == 200


def test_unknown_routes_and_methods(served: Serving) -> None:
    assert get(served, "/v1/nothing")[0] == 404
    status, text = get(served, "/v1/completions")
    assert status == 405 and json.loads(text)["error"]["type"] == "invalid_request_error"
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as raw:
        raw.sendall(b"NOT HTTP\r\n\r\n")
        answer = raw.recv(65536)
    assert answer.startswith(b"HTTP/1.1 400") or answer.startswith(b"HTTP/1.0 400")
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["message"]


def test_openai_errors(client: openai.OpenAI, served: Serving) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=MODEL, prompt="a", temperature=1.5, top_p=7)
    assert bad.value.param == "top_p"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")
    assert [model.id for model in client.models.list()] == [MODEL]


def test_the_key_is_needed_everywhere_but_for_health() -> None:
    with serving(api_keys=("secret",)) as served:
        assert get(served, "/health")[0] == 200
        for path in ("/v1/models", "/metrics", "/admin/state", "/openapi.json", "/version", "/nothing"):
            assert get(served, path)[0] == 401
            assert get(served, path, Authorization="Bearer wrong")[0] == 401
        assert get(served, "/v1/models", Authorization="Bearer secret")[0] == 200
        with openai.OpenAI(base_url=served.url + "/v1", api_key="nö", max_retries=0) as client:
            with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)):
                client.models.list()
    with pytest.raises(ValueError, match="--api-key"):
        ServerSettings(host="0.0.0.0")


def test_request_ids(served: Serving) -> None:
    _, made, headers = post(served, "/v1/completions", {"prompt": "a", "max_tokens": 1}, **{"x-request-id": "mine-1"})
    assert headers["x-request-id"] == "mine-1" and made["id"] == "cmpl-mine-1"
    _, made, headers = post(served, "/v1/completions", {"prompt": "a"}, **{"x-request-id": "not one\tof mine"})
    assert "\t" not in headers["x-request-id"] and made["id"] == "cmpl-" + headers["x-request-id"]


# ---------------------------------------------------------------- disconnects, backpressure, draining


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_aborts(slow: Serving, stream: bool) -> None:
    async def leave() -> None:
        async with aiohttp.ClientSession() as session:
            call = session.post(
                slow.url + "/v1/completions", json={"prompt": "a", "max_tokens": 3000, "n": 2, "stream": stream}
            )
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3), call as answer:
                    async for _ in answer.content:
                        pass

    asyncio.run(leave())
    until(lambda: slow.frontend.idle, 2.0)
    assert sum(worker.aborted for worker in slow.frontend.workers.values()) == 2


def test_too_many_are_turned_away_with_a_time() -> None:
    with serving(partial(fake_engine, 2.0, router=RouterSpec(max_waiting=2))) as served:

        async def flood() -> list[tuple[int, str, float]]:
            async def one(session: aiohttp.ClientSession) -> tuple[int, str, float]:
                began = time.monotonic()
                body = {"prompt": "a", "max_tokens": 1}
                async with session.post(served.url + "/v1/completions", json=body) as answer:
                    await answer.read()
                    return answer.status, answer.headers.get("Retry-After", ""), time.monotonic() - began

            async with aiohttp.ClientSession() as session:
                return await asyncio.gather(*(one(session) for _ in range(8)))

        answers = asyncio.run(flood())
        assert sorted(status for status, _, _ in answers) == [200] * 2 + [429] * 6
        assert all(int(after) >= 1 and seconds < 0.4 for status, after, seconds in answers if status == 429)
        with openai.OpenAI(base_url=served.url + "/v1", api_key="x", max_retries=0) as client:
            text = client.completions.create(model=MODEL, prompt="a", max_tokens=2)
            assert text.usage is not None and text.usage.completion_tokens == 2, "and later it goes on"


def test_a_reader_that_does_not_read_is_cut_off() -> None:
    with serving(partial(fake_engine, model="dummy:tiny,max_len=200000")) as served:
        with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            body = json.dumps({"prompt": "a", "max_tokens": 190_000, "stream": True}).encode()
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            until(lambda: served.frontend.router.requests)
            until(lambda: served.frontend.idle, 20.0)
        assert get(served, "/health")[0] == 200


def test_draining_lets_requests_end(slow: Serving) -> None:
    async def drive() -> tuple[list[Any], int]:
        async with aiohttp.ClientSession() as session:
            body = {"prompt": "a", "max_tokens": 30}
            running = asyncio.create_task(session.post(slow.url + "/v1/completions", json=body).__aenter__())
            await asyncio.sleep(0.2)
            ended = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(drain(slow.server), slow.loop))
            await asyncio.sleep(0.05)
            async with session.post(slow.url + "/v1/completions", json=body) as late:
                status = late.status
            answer = await running
            made = await answer.json()
            answer.release()
            await ended
            return made["choices"], status

    choices, late = asyncio.run(drive())
    assert choices[0]["finish_reason"] == "length" and late == 503
    assert get(slow, "/health")[0] == 503


# ---------------------------------------------------------------- the rest


def test_tokenizer_endpoints(served: Serving) -> None:
    _, tokens, _ = post(served, "/tokenize", {"prompt": "Hi"})
    assert tokens["tokens"] == [72, 105] and tokens["count"] == 2
    assert post(served, "/detokenize", {"tokens": [72, 105]})[1] == {"prompt": "Hi"}
    assert "eos_token" in json.loads(get(served, "/tokenizer_info")[1])
    assert json.loads(get(served, "/models")[1])["data"][0]["root"] == MODEL
    assert json.loads(get(served, "/version")[1])["version"]


def test_metrics(served: Serving) -> None:
    def value(text: str, name: str) -> float:
        return sum(
            float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"minidisagg:{name}")
        )

    before = get(served, "/metrics")[1]
    post(served, "/v1/completions", {"prompt": "abcd", "max_tokens": 11})
    after = get(served, "/metrics")[1]
    for name, more in (
        ("prompt_tokens_total", 4), ("generation_tokens_total", 11), ("time_to_first_token_seconds_count", 1),
        ("inter_token_latency_seconds_count", 10), ("e2e_request_latency_seconds_count", 1),
        ('request_success_total{finished_reason="length",', 1),
    ):  # fmt: skip
        assert value(after, name) - value(before, name) == more, name
    assert 'minidisagg:kv_cache_usage_perc{role="both",worker="worker-0"}' in after


def test_admin() -> None:
    with serving(partial(fake_engine, 20.0, workers=2)) as served:
        state = json.loads(get(served, "/admin/state")[1])
        assert [worker["state"] for worker in state["workers"]] == ["up", "up"] and state["mode"] == "colocated"
        assert post(served, "/admin/pause", {})[1] == {"paused": True}
        assert post(served, "/admin/policy", {"policy": "sarathi:chunk=64"})[1] == {"policy": "sarathi:chunk=64"}
        assert post(served, "/admin/policy", {"policy": "nothing"})[0] == 400
        assert post(served, "/admin/policy", {"policy": "./mine.py:Mine"})[0] == 400
        assert post(served, "/admin/resume", {})[1] == {"paused": False}
        assert post(served, "/admin/mode", {"mode": "disagg"})[0] == 200
        until(lambda: [w["role"] for w in json.loads(get(served, "/admin/workers")[1])] == ["prefill", "decode"])
        assert post(served, "/admin/workers/worker-1/role", {"role": "nonsense"})[0] == 400
        assert post(served, "/admin/workers/worker-9/kill", {})[0] == 404
        assert post(served, "/admin/mode", {"mode": "colocated"})[0] == 200
        until(lambda: json.loads(get(served, "/admin/state")[1])["mode"] == "colocated")
        epoch = json.loads(get(served, "/admin/workers")[1])[0]["epoch"]
        assert post(served, "/admin/workers/worker-0/kill", {})[0] == 200
        until(lambda: json.loads(get(served, "/admin/workers")[1])[0]["epoch"] == epoch + 1)
        assert post(served, "/admin/workers/worker-1/drain", {})[1]["state"] == "draining"
        post(served, "/admin/workers/worker-1/restart", {})
        until(lambda: json.loads(get(served, "/admin/workers")[1])[1]["state"] == "up")
        assert get(served, "/admin/state", Origin="http://evil.example")[0] == 403


def test_what_cannot_move_is_refused_and_what_stays_is_told() -> None:
    with serving(partial(fake_engine, 20.0, workers=2)) as served:
        told, frontend = list[str](), served.frontend
        listener = SimpleNamespace(on_event=told.append, on_message=lambda *_: None, on_emit=lambda *_: None)

        async def begin() -> str:
            frontend.observers.append(listener)
            return str(frontend.submit([1] * 8, SamplingParams(max_tokens=4000), lambda *_: None))

        def migrate() -> str:
            """Where it can; else why not."""
            until(lambda: frontend.requests[name].stage is Stage.DECODE)
            status, answer, _ = post(served, "/admin/migrate", {"request": name, "worker": other})
            assert status == (409 if "error" in answer else 200)
            return str(answer["error"]["message"] if "error" in answer else answer["worker"])

        name = served.call(begin())
        until(lambda: frontend.requests[name].stage is Stage.DECODE)
        here = frontend.requests[name].decode
        other = next(worker for worker in frontend.worker_names if worker != here)
        for _ in range(2):  # whoever asks again is answered again
            assert migrate() == other
            until(lambda: told[-1] == f"request {name} stays at {here}: a fake moves nothing")
        assert told[-2:] * 2 == told[-4:] and told[-2] == f"request {name} moves from {here} to {other}"
        assert post(served, f"/admin/workers/{other}/role", {"role": "prefill"})[0] == 200
        until(lambda: frontend.view.workers[other].role is Role.PREFILL)
        assert migrate() == f"worker {other} takes no request that decodes: it only prefills"
        assert post(served, f"/admin/workers/{other}/drain", {})[0] == 200
        assert migrate() == f"worker {other} takes no request that decodes: it drains"


def test_admin_events(slow: Serving) -> None:
    async def read() -> list[Any]:
        async with aiohttp.ClientSession() as session, session.get(slow.url + "/admin/events?hz=20") as answer:
            found = []
            async for line in answer.content:
                if line.startswith(b"data: "):
                    found.append(json.loads(line[6:]))
                if len(found) == 3:
                    return found
        raise AssertionError("the stream ended")

    first, second, third = asyncio.run(read())
    assert first["clock"] < second["clock"] < third["clock"]
    assert get(slow, "/admin/events?hz=9999")[0] == 400
