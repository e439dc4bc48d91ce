"""What well-known clients send, to the field, and what they read of the answers; over an engine that makes tokens up.

`scripts/test_clients.sh` runs the clients themselves, those that install without a GPU.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import aiohttp
import openai
import pytest
from fake_engine import fake_engine
from serving import Serving, serving

MODEL = "dummy:tiny,max_len=4096"
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
KEY = "sk-a.b-c_1"
BEARER = {"Authorization": f"Bearer {KEY}"}
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    with serving() as running:
        yield running
        assert running.frontend.idle


@pytest.fixture(scope="module")
def keyed() -> Iterator[Serving]:
    with serving(api_keys=("another", KEY)) as running:
        yield running
        assert running.frontend.idle


@dataclass
class Answer:
    """Status, headers with small letters, and the body or the events with their arrival times."""

    status: int
    headers: dict[str, str]
    body: Any = None
    events: list[tuple[float, Any]] = field(default_factory=list)
    done: bool = False


def send(served: Serving, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
    """One request. A stream is read as it comes, event by event."""

    async def talk() -> Answer:
        began = time.monotonic()
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, served.url + path, json=body, headers=headers) as response,
        ):
            answer = Answer(response.status, {key.lower(): value for key, value in response.headers.items()})
            if response.content_type != "text/event-stream":
                answer.body = await response.json()
                return answer
            pending = b""
            async for data in response.content.iter_any():
                *events, pending = (pending + data).split(b"\n\n")
                for event in events:
                    assert event.startswith(b"data: ") and b"\n" not in event and not answer.done
                    if event == b"data: [DONE]":
                        answer.done = True
                    else:
                        answer.events.append((time.monotonic() - began, json.loads(event[6:])))
            assert pending == b"", "the last event ends with an empty line too"
            return answer

    return asyncio.run(talk())


# ---------------------------------------------------------------- vllm bench serve

VLLM_TEXT = {
    "model": MODEL, "repetition_penalty": 1.0, "logprobs": None, "stream": True,
    "stream_options": {"include_usage": True}, "ignore_eos": True,
}  # fmt: skip
VLLM_CHAT = {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
VLLM_SAMPLING = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "frequency_penalty": 0.0}


def vllm_bench(answer: Answer) -> tuple[str, list[float], dict[str, int]]:
    """Text, arrival times of the tokens, and the usage, as the benchmark takes them from the events.

    An event with choices is a token, whether it has text or not; one without, that has usage, is the usage.
    """
    text = ""
    arrivals: list[float] = []
    usage: dict[str, int] = {}
    for when, event in answer.events:
        if event["choices"]:
            choice = event["choices"][0]
            text += (choice["delta"].get("content") if "delta" in choice else choice["text"]) or ""
            arrivals.append(when)
            assert not usage, "the usage comes last"
        elif event["usage"]:
            usage = event["usage"]
    return text, arrivals, usage


@pytest.mark.parametrize("extra", [{}, VLLM_SAMPLING, {"best_of": 1}])
@pytest.mark.parametrize("prompt, length", [("Hello", 5), ([72, 101, 108], 3)])
def test_vllm_bench_completions(served: Serving, prompt: Any, length: int, extra: dict[str, Any]) -> None:
    body = {**VLLM_TEXT, "prompt": prompt, "max_tokens": 50, "seed": 7, **extra}
    answer = send(served, "POST", TEXT, body, {"x-request-id": "bench-5f2a-17"})
    text, arrivals, usage = vllm_bench(answer)
    assert answer.status == 200 and answer.done
    assert answer.headers["x-request-id"] == "bench-5f2a-17"
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (length, 50)
    assert len(arrivals) == 50, "an event per token"
    assert any(e["choices"] and e["choices"][0]["text"] == "" for _, e in answer.events), "one of them has no text"
    whole = send(served, "POST", TEXT, {"prompt": prompt, "max_tokens": 50, "seed": 7, "ignore_eos": True}).body
    assert text == whole["choices"][0]["text"] and text


def test_vllm_bench_chat(served: Serving) -> None:
    body = {**VLLM_CHAT, "messages": PARTS, "max_completion_tokens": 30, "seed": 7}
    answer = send(served, "POST", CHAT, body, {"x-request-id": "bench-5f2a-18", "Content-Type": "application/json"})
    text, arrivals, usage = vllm_bench(answer)
    assert answer.done and len(arrivals) == usage["completion_tokens"] == 30 and text
    assert usage["prompt_tokens"] == len("user: Hello\nassistant: ")


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_vllm_bench_measures_the_engine(path: str) -> None:
    """TTFT and inter-token times are those of the steps: nothing is held back, the usage is no token."""
    asked = {"prompt": "Hi", "max_tokens": 12} if path == TEXT else {"messages": PARTS, "max_completion_tokens": 12}
    with serving(partial(fake_engine, 20.0)) as slow:
        _, arrivals, usage = vllm_bench(send(slow, "POST", path, {**VLLM_TEXT, **asked, "logprobs": None}))
    assert len(arrivals) == usage["completion_tokens"] == 12
    gaps = [after - before for before, after in pairwise(arrivals)]
    assert arrivals[0] < arrivals[-1] / 2 and median(gaps) > 0.03, "a step takes 50 ms"


def test_vllm_bench_finds_the_model_and_hears_of_failures(served: Serving) -> None:
    card = send(served, "GET", "/v1/models").body["data"][0]
    assert (card["id"], card["root"]) == (MODEL, MODEL)
    late = send(served, "POST", TEXT, {**VLLM_TEXT, "prompt": "a" * 5000, "max_tokens": 10})
    assert late.status == 400, "not 200 with the error in the stream: what is no 200 counts as failed"


# ---------------------------------------------------------------- guidellm

GUIDELLM = {
    "model": MODEL, "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    "stop": None, "ignore_eos": True,
}  # fmt: skip


def test_guidellm_looks_before_it_starts(keyed: Serving) -> None:
    assert send(keyed, "GET", "/health").status == 200
    assert send(keyed, "GET", "/health", headers=BEARER).status == 200
    assert [item["id"] for item in send(keyed, "GET", "/v1/models", headers=BEARER).body["data"]] == [MODEL]


@pytest.mark.parametrize("path, limit", [(TEXT, "max_tokens"), (CHAT, "max_completion_tokens")])
def test_guidellm_stream(served: Serving, path: str, limit: str) -> None:
    asked: dict[str, Any] = {"prompt": "Hello"} if path == TEXT else {"messages": PARTS}
    answer = send(served, "POST", path, {**GUIDELLM, **asked, limit: 40, "seed": 1})
    events = [event for _, event in answer.events]
    assert answer.done and len({event["id"] for event in events}) == 1
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-1] == 40
    for usage in (event["usage"] for event in events):
        assert usage["prompt_tokens"] == (5 if path == TEXT else 23)
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert isinstance(events[-1]["metrics"], dict)


def test_guidellm_whole(served: Serving) -> None:
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 5, "stop": None, "ignore_eos": True}
    made = send(served, "POST", TEXT, body).body
    assert made["usage"]["prompt_tokens"] == 5 and made["usage"]["completion_tokens"] == 5
    made = send(served, "POST", CHAT, {"messages": PARTS, "max_completion_tokens": 5, "ignore_eos": True}).body
    assert isinstance(made["choices"][0]["message"]["content"], str) and made["usage"]["completion_tokens"] == 5


# ---------------------------------------------------------------- lm-eval


def lm_eval_scores(answer: Any, context_lengths: list[int]) -> list[tuple[float, bool]]:
    """The log-likelihood of what follows each context, and whether it is what greedy decoding would say."""
    found = []
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    for choice, length in zip(choices, context_lengths, strict=True):
        values = choice["logprobs"]["token_logprobs"][length:-1]  # the last is of the one generated token
        best = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][length:-1]]
        found.append((sum(values), values == best))
    return found


def test_lm_eval_log_likelihoods(served: Serving) -> None:
    prompts = [[72, 105, 33, 65, 66], [65, 66, 67], [9, 8, 7, 6, 5, 4, 3]]
    body = {
        "model": MODEL, "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True
    }  # fmt: skip
    made = send(served, "POST", TEXT, body).body
    assert lm_eval_scores(made, [2, 1, 6]) == [(-3.0, True), (-2.0, True), (-1.0, True)]
    for prompt, choice in zip(prompts, made["choices"], strict=True):
        scores = choice["logprobs"]
        lengths = {len(scores[key]) for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
        assert lengths == {len(prompt) + 1}, "the prompt and one token"
        assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
        for token, value, top in list(zip(scores["tokens"], scores["token_logprobs"], scores["top_logprobs"],
                                          strict=True))[1:]:  # fmt: skip
            assert top[token] == value
    bare = send(served, "POST", TEXT, {**body, "logprobs": 0}).body["choices"][0]["logprobs"]
    assert bare["top_logprobs"][1] == {"i": -1.0}, "the actual token is there even where none was asked for"
    one = send(served, "POST", TEXT, {**body, "prompt": "Hi!AB"}).body  # tokenized_requests=False, batch of one
    assert lm_eval_scores(one, [2]) == [(-3.0, True)]


def test_lm_eval_generates(served: Serving) -> None:
    """`until` becomes `stop`, with the text of the end token; answers go by their index."""
    body = {"model": MODEL, "max_tokens": 16, "temperature": 0, "stop": ["\n\n", "Question:", "<|endoftext|>"],
            "seed": 1234}  # fmt: skip
    prompts = [[72, 105], [65, 66, 67]]
    made = send(served, "POST", TEXT, {**body, "prompt": prompts}).body
    assert [choice["index"] for choice in made["choices"]] == [0, 1]
    assert all(isinstance(choice["text"], str) for choice in made["choices"])
    message = {"role": "user", "content": "Hi", "type": "text"}  # lm-eval leaves a type in it
    made = send(served, "POST", CHAT, {**body, "messages": [message], "stop": []}).body
    assert isinstance(made["choices"][0]["message"]["content"], str) and made["choices"][0]["index"] == 0


def test_lm_eval_remote_tokenizer(keyed: Serving) -> None:
    assert "eos_token" in send(keyed, "GET", "/tokenizer_info", headers=BEARER).body
    body = {"prompt": "test", "add_special_tokens": False}
    assert send(keyed, "POST", "/tokenize", body, BEARER).body["tokens"] == list(b"test")
    assert send(keyed, "POST", "/detokenize", {"tokens": list(b"test")}, BEARER).body["prompt"] == "test"


# ---------------------------------------------------------------- Open WebUI


@pytest.mark.parametrize("path", ["/models", "/v1/models"])
def test_open_webui_lists_models_with_its_key(keyed: Serving, path: str) -> None:
    found = send(keyed, "GET", path, headers={**BEARER, "Content-Type": "application/json"})
    assert found.status == 200 and [item["id"] for item in found.body["data"]] == [MODEL]
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
        refused = send(keyed, "GET", path, headers=headers)
        assert refused.status == 401 and refused.body["error"]["message"]


def test_open_webui_chat(keyed: Serving) -> None:
    body = {
        "stream": True, "model": MODEL, "temperature": 0.7, "seed": 3, "max_completion_tokens": 20,
        "messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Again"},
        ],
    }  # fmt: skip
    assert send(keyed, "POST", CHAT, body).status == 401
    answer = send(keyed, "POST", CHAT, body, BEARER)
    deltas = [event["choices"][0] for _, event in answer.events]
    assert answer.done and answer.headers["content-type"].startswith("text/event-stream")
    assert deltas[0]["delta"]["role"] == "assistant"
    assert {choice["finish_reason"] for choice in deltas[:-1]} == {None} and deltas[-1]["finish_reason"] == "length"
    title = send(keyed, "POST", CHAT, {**body, "stream": False, "max_completion_tokens": 9}, BEARER).body
    assert isinstance(title["choices"][0]["message"]["content"], str)


# ---------------------------------------------------------------- LangChain


@pytest.fixture
def client(keyed: Serving) -> Iterator[openai.OpenAI]:
    """LangChain speaks through the openai package."""
    with openai.OpenAI(base_url=keyed.url + "/v1", api_key=KEY, max_retries=0) as made:
        yield made


def test_langchain_chat(client: openai.OpenAI) -> None:
    turns: Any = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "ann"},
        {"role": "assistant", "content": None}, {"role": "user", "content": [{"type": "text", "text": "So?"}]},
    ]  # fmt: skip
    asked: Any = {"model": MODEL, "messages": turns, "max_completion_tokens": 40, "temperature": 0.5, "seed": 2}
    raw = client.chat.completions.with_raw_response.create(**asked, n=2, stop=["~~", "@@"], stream=False)
    made = raw.parse().model_dump()
    assert [choice["index"] for choice in made["choices"]] == [0, 1]
    assert {choice["message"]["role"] for choice in made["choices"]} == {"assistant"}
    usage = made["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert made["model"] == MODEL and made["id"].startswith("chatcmpl-")

    text = client.chat.completions.create(**asked).choices[0].message.content
    assert text
    stop = text[len(text) // 2 :][:2]
    cut = client.chat.completions.create(**asked, stop=["never to be seen", stop]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (text[: text.index(stop)], "stop")
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 40


def test_langchain_completions(client: openai.OpenAI) -> None:
    """Several prompts in one request; its answers are cut into `n` for each prompt."""
    asked: Any = {
        "model": MODEL, "max_tokens": 8, "temperature": 0.7, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0,
        "seed": 4, "logit_bias": {}, "best_of": 1, "logprobs": None, "stop": None,
    }  # fmt: skip
    made = client.completions.create(**asked, prompt=["one", "three"], n=2)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    alone = client.completions.create(**asked, prompt="three", n=2)
    assert [choice.text for choice in made.choices[2:]] == [choice.text for choice in alone.choices]
    assert made.usage is not None and made.usage.prompt_tokens == 8 and made.usage.completion_tokens == 32
