"""From a request's tokens to its text: detokenizing as they come, and ending at a stop string."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from minidisagg.core.messages import SamplingParams, TokenLogprob
from minidisagg.core.router import Emit
from minidisagg.model.tokenizer import IncrementalDetokenizer, StopChecker, Tokenizer


class Piece(NamedTuple):
    """One token and the text that is final with it, empty where a character or a stop string may be incomplete.

    `finish` is "stop" or "length" with the last one.
    """

    text: str
    token: int
    logprob: TokenLogprob | None = None
    finish: str = ""


class OutputProcessor:
    """Turns the news of one request into text."""

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams) -> None:
        self.detokenizer = IncrementalDetokenizer(tokenizer)
        self.checker = StopChecker(sampling.stop)
        self.num_tokens = 0
        self.finish = ""

    def push(self, emit: Emit) -> list[Piece]:
        """The news, token by token; after a stop string nothing more comes."""
        pieces: list[Piece] = []
        if self.finish:
            return pieces
        for n, token in enumerate(emit.tokens):
            self.num_tokens += 1
            text, stopped = self.checker.push(self.detokenizer.push(token))
            if stopped:
                self.finish = "stop"
            elif emit.finish and n == len(emit.tokens) - 1:
                self.finish = emit.finish
                rest, stopped = self.checker.push(self.detokenizer.flush())
                text += rest if stopped else rest + self.checker.flush()
            pieces.append(Piece(text, token, emit.logprobs[n] if emit.logprobs else None, self.finish))
            if self.finish:
                break
        return pieces


def with_stops(sampling: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """The model's end-of-sequence tokens among the stop tokens, unless they are to be ignored."""
    if sampling.ignore_eos:
        return sampling
    stops = dict.fromkeys((*sampling.stop_token_ids, *tokenizer.eos_token_ids))
    return msgspec.structs.replace(sampling, stop_token_ids=tuple(stops))
