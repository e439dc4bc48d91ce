"""From a request's tokens to its text: detokenizing as they come, and ending at a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from minidisagg.core.messages import SamplingParams, TokenLogprob
from minidisagg.core.tracked import Emit
from minidisagg.model.tokenizer import IncrementalDetokenizer, Tokenizer


class TokenText(NamedTuple):
    """One token and the text that is final with it, empty where a character or a stop string may be incomplete.

    `finish` is "stop" or "length" with the last one. `added` is what the token added to the text before stop strings
    hold anything back: the place of each token in the text is the sum of those before it.
    """

    text: str
    token: int
    logprob: TokenLogprob | None = None
    finish: str = ""
    added: str = ""


class StopChecker:
    """Finds stop strings in a stream of text, however it is split, and holds back only what might begin one.

    The stop string that is complete first counts; of several that end together, the longest.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        if "" in stop:
            raise ValueError("a stop string must not be empty")
        self._stop = stop
        beginnings = {s[:n] for s in stop for n in range(1, len(s))}
        self._beginnings = tuple(sorted(beginnings, key=len, reverse=True))
        self._held = ""

    def push(self, text: str, counts: bool = True) -> tuple[str, bool]:
        """(text to emit, stopped). Once stopped, push no more; the stop string is not emitted.

        One that ends in text that does not count is text like any other; one that begins there and ends later counts.
        """
        before = len(self._held)
        text = self._held + text
        if counts:
            ends = ((text.find(stop, max(0, before + 1 - len(stop))), len(stop)) for stop in self._stop)
            if found := [(at + length, at) for at, length in ends if at >= 0]:
                self._held = ""
                return text[: min(found)[1]], True
        held = 0
        if text.endswith(self._beginnings):  # in C, and false nearly always
            held = next(len(beginning) for beginning in self._beginnings if text.endswith(beginning))
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """What was held back, at the end of a stream that did not stop."""
        held, self._held = self._held, ""
        return held


class OutputProcessor:
    """Turns the news of one request into text.

    Stop strings are looked for as vLLM does it: in what comes after the first `min_tokens` tokens, and back into their
    text only for a stop string that ends after it.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams, after: Sequence[int] = ()) -> None:
        """`after` are the tokens whose text is shown before the output, if it is."""
        self.detokenizer = IncrementalDetokenizer(tokenizer)
        self.checker = StopChecker(sampling.stop)
        self.min_tokens = sampling.min_tokens
        self.num_tokens = 0
        self.finish = ""
        # Some tokenizers drop the space that a text begins with, and this one has begun. Nothing else of it matters.
        for token in after:
            if self.detokenizer.push(token):
                break
        self.detokenizer.flush()

    def push(self, emit: Emit) -> list[TokenText]:
        """The news, token by token; after a stop string nothing more comes."""
        parts: list[TokenText] = []
        if self.finish:
            return parts
        for n, token in enumerate(emit.tokens):
            self.num_tokens += 1
            counts = self.num_tokens > self.min_tokens
            added = self.detokenizer.push(token)
            text, stopped = self.checker.push(added, counts)
            if stopped:
                self.finish = "stop"
            elif emit.finish and n == len(emit.tokens) - 1:
                self.finish = emit.finish
                rest, stopped = self.checker.push(self.detokenizer.flush(), counts)
                text += rest if stopped else rest + self.checker.flush()
            parts.append(TokenText(text, token, emit.logprobs[n] if emit.logprobs else None, self.finish, added))
            if self.finish:
                break
        return parts


def with_stops(sampling: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """The model's end-of-sequence tokens among the stop tokens, unless they are to be ignored."""
    if sampling.ignore_eos:
        return sampling
    stops = dict.fromkeys((*sampling.stop_token_ids, *tokenizer.eos_token_ids))
    return msgspec.structs.replace(sampling, stop_token_ids=tuple(stops))
