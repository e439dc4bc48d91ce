"""An echoed prompt is what was sent, and `text_offset` says where each token of it and of the output stands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from serving import Serving, serving
from test_server import events, post
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer

from minidisagg.model.tokenizer import Tokenizer
from minidisagg.server.completions import located

CHAT = "<|im_start|>user\nHi, \u65e5\u672c \U0001f600<|im_end|>\n"


def byte_level(bos: bool = False, nfc: bool = False) -> Tokenizer:
    """Each byte a token, some pairs, and two special ones; 262 ids in all; others are those again, modulo 300."""
    vocab = {char: n for n, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("\u0120", "u"), ("s", "e"), ("se", "r"), ("H", "i")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    rust = RustTokenizer(models.BPE(vocab=vocab, merges=merges))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    if nfc:
        rust.normalizer = normalizers.NFC()
    if bos:
        first = rust.token_to_id("<|im_start|>")
        rust.post_processor = processors.TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", first)])
    return Tokenizer(
        rust, eos_token_ids=(), special_tokens={}, chat_template=None, decoder={"type": "ByteLevel"}, modulus=300
    )


def metaspace() -> Tokenizer:
    """As Llama 2's: a space is put in front of a text, and taken from a decoded one."""
    words = ["<unk>", "<s>", "\u2581The", "\u2581sea", "\u2581is", "\u2581", "is", "s"]
    rust = RustTokenizer(models.Unigram([(word, -1.0 - n) for n, word in enumerate(words)], unk_id=0))
    rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    rust.add_special_tokens([AddedToken("<s>", special=True)])
    rust.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    decoder = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"}
    return Tokenizer(rust, eos_token_ids=(), special_tokens={}, chat_template=None, decoder=decoder, modulus=len(words))


@pytest.mark.parametrize(
    ("tokenizer", "text", "tokens"),
    [
        (
            byte_level(),
            "<|im_start|>user\n\u65e5",
            ["<|im_start|>", "u", "ser", "\n", *[f"bytes:\\x{b:02x}" for b in b"\xe6\x97\xa5"]],
        ),
        (byte_level(bos=True), "user", ["", "u", "ser"]),
        (byte_level(bos=True), "<|im_start|>user", ["<|im_start|>", "", "u", "ser"]),
        (byte_level(nfc=True), "e\u0301user", ["bytes:\\xc3", "", "u", "ser"]),
        (metaspace(), "The sea is", ["", "The", " sea", " is"]),
        (metaspace(), "The The", ["", "The", " The"]),
    ],
)
def test_tokens_are_found_in_what_was_sent(tokenizer: Tokenizer, text: str, tokens: list[str]) -> None:
    found = list(located(tokenizer, tokenizer.encode(text), text))
    assert [name for name, _ in found] == tokens
    places = [at for _, at in found]
    assert places == sorted(places) and places[0] == 0
    assert all(text[at:].startswith(name) or name.startswith("bytes:") for name, at in found)
    assert text[places[-1] :] in (tokens[-1], "\u65e5")


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    with serving() as running:
        running.server.tokenizer = byte_level()
        yield running


def both_ways(served: Serving, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of a completion, which its stream adds up to."""
    status, whole, _ = post(served, "/v1/completions", body)
    assert status == 200, whole
    choices: list[dict[str, Any]] = whole["choices"]
    streamed = [{"text": "", "logprobs": None} for _ in choices]
    for event in events(served, "/v1/completions", body):
        for choice in event["choices"]:
            so_far = streamed[choice["index"]]
            so_far["text"] += choice["text"]
            if choice["logprobs"] is not None:
                before = so_far["logprobs"] or {key: [] for key in choice["logprobs"]}
                so_far["logprobs"] = {key: before[key] + choice["logprobs"][key] for key in before}
    assert streamed == [{"text": choice["text"], "logprobs": choice["logprobs"]} for choice in choices]
    return choices


# Special tokens, characters of several tokens, bytes that are no text before one that is.
IDS = [260, 3, 72, 200, 65, 261, 61, 62]


@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("max_tokens", [0, 40])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("prompt", [CHAT, IDS, [CHAT, "Hi"], [IDS, IDS[:3]]], ids=["text", "ids", "texts", "lists"])
def test_text_and_offsets_of_an_echo(
    served: Serving, prompt: Any, n: int, max_tokens: int, logprobs: int | None
) -> None:
    tokenizer = served.server.tokenizer
    body = {"prompt": prompt, "n": n, "max_tokens": max_tokens, "logprobs": logprobs, "seed": 11}
    choices = both_ways(served, body | {"echo": True})
    bare = both_ways(served, body)[: len(choices)] if max_tokens else [{"text": ""}] * len(choices)
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    prompts = [one for one in (prompt if several else [prompt]) for _ in range(n)]
    assert len(choices) == len(prompts)
    for choice, alone, sent in zip(choices, bare, prompts, strict=True):
        shown = sent if isinstance(sent, str) else tokenizer.decode(sent, skip_special_tokens=False)
        assert choice["text"] == shown + alone["text"]
        if logprobs is not None:
            size = len(tokenizer.encode(sent) if isinstance(sent, str) else sent)
            check_offsets(choice, size + max_tokens)
            assert choice["logprobs"]["text_offset"][size:] == [
                len(shown) + offset for offset in (alone["logprobs"]["text_offset"] if max_tokens else [])
            ]


def check_offsets(choice: dict[str, Any], count: int) -> None:
    """`count` tokens, each where `text_offset` says."""
    text, tokens, offsets = choice["text"], choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert len(tokens) == len(offsets) == count and offsets[0] == 0 and offsets == sorted(offsets)
    for token, at in zip(tokens, offsets, strict=True):
        assert text[at:].startswith(token) or token.startswith("bytes:"), (token, at, text)
    assert sum(map(len, tokens)) > len(text) / 2, "most are there"


def test_offsets_while_a_stop_string_is_held_back(served: Serving) -> None:
    body = {"prompt": "Hi", "max_tokens": 60, "logprobs": 0, "seed": 11, "echo": True}
    (whole,) = both_ways(served, body)
    tokens, offsets = whole["logprobs"]["tokens"], whole["logprobs"]["text_offset"]
    # Each character might begin a stop string that never comes: text comes late, and stands where it did.
    never = sorted({token + "\0never" for token in tokens if token and "bytes:" not in token})[:16]
    assert both_ways(served, body | {"stop": never}) == [whole]
    at = next(n for n in range(20, 60) if len(tokens[n]) == 1 and len(tokens[n + 1]) == 1)
    stop = tokens[at] + tokens[at + 1]
    (cut,) = both_ways(served, body | {"stop": [stop, *never[:15]]})
    assert cut["finish_reason"] == "stop" and cut["text"] == whole["text"][: whole["text"].index(stop, 2)]
    ended = len(cut["logprobs"]["tokens"])
    assert (
        ended < 62 and cut["logprobs"]["text_offset"] == offsets[:ended] and cut["logprobs"]["tokens"] == tokens[:ended]
    )


def test_an_output_goes_on_after_its_prompt(served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first space of a text is dropped by some tokenizers; after an echo it is not the first."""
    monkeypatch.setattr(served.server, "tokenizer", metaspace())
    body = {"prompt": "The sea", "max_tokens": 30, "logprobs": 0, "seed": 5, "echo": True}
    (choice,) = both_ways(served, body)
    assert choice["text"].startswith("The sea")
    check_offsets(choice, 3 + 30)
    (alone,) = both_ways(served, body | {"echo": False})
    assert choice["text"].removeprefix("The sea").removeprefix(" ") == alone["text"].removeprefix(" ")
    words = [token for token in choice["logprobs"]["tokens"][3:] if token]
    assert "".join(words) == choice["text"].removeprefix("The sea") and words[0].startswith(" ")
