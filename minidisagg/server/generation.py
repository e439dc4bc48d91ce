"""One HTTP request's way through the engine: a submission per choice, and their news in one queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from minidisagg.core.messages import SamplingParams, TokenLogprob
from minidisagg.core.router import Emit, StageTimes
from minidisagg.model.tokenizer import Tokenizer
from minidisagg.runtime.frontend import Frontend
from minidisagg.runtime.output import OutputProcessor, Piece, with_stops
from minidisagg.server.history import Timing
from minidisagg.server.metrics import Metrics
from minidisagg.server.protocol import ApiError, PromptDetails, Usage

MAX_UNREAD = 1024  # tokens of one HTTP request that its client has not taken


@dataclass
class Choice:
    """One completion of one prompt."""

    index: int
    prompt: list[int]
    processor: OutputProcessor
    timing: Timing
    request_id: str = ""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0
    times: StageTimes | None = None
    ended: bool = False
    offset: int = 0  # characters sent, for `text_offset`


@dataclass
class News:
    """What is new of a choice; `last` with its end, when `Choice.times` is set too."""

    choice: Choice
    pieces: list[Piece]
    first: bool
    last: bool


@dataclass
class Generation:
    """All choices of one HTTP request. Use as a context manager: leaving it aborts what still runs.

    `on_stall` is called when the client has left more than `MAX_UNREAD` tokens unread.
    """

    frontend: Frontend
    tokenizer: Tokenizer
    on_stall: Callable[[], None]
    metrics: Metrics
    choices: list[Choice] = field(default_factory=list)
    _queue: asyncio.Queue[tuple[Choice, Emit]] = field(default_factory=asyncio.Queue)

    def submit(self, prompts: Sequence[list[int]], n: int, sampling: SamplingParams, salt: str, priority: int) -> None:
        """Hand `n` choices of each prompt to the engine. Raises `ApiError` 400, or 429 where there is no room."""
        sampling = with_stops(sampling, self.tokenizer)
        for prompt in prompts:  # all or none
            try:
                self.frontend.check(prompt, sampling)
            except ValueError as error:
                code = "context_length_exceeded" if "limit" in str(error) else None
                raise ApiError(400, str(error), "prompt", code) from None
        for prompt in prompts:
            for turn in range(n):
                own = sampling
                if sampling.seed is not None and turn:
                    own = msgspec.structs.replace(sampling, seed=sampling.seed + turn)
                choice = Choice(len(self.choices), prompt, OutputProcessor(self.tokenizer, own), Timing(len(prompt)))
                self.choices.append(choice)
                # What is scored must be computed, so that it shares its prefix with nothing.
                own_salt = salt if own.prompt_logprobs is None else f"{salt}/{id(choice)}"
                rejected: list[Emit] = []

                def on_emit(emit: Emit, now: float, choice: Choice = choice, rejected: list[Emit] = rejected) -> None:
                    if emit.finish == "reject":
                        rejected.append(emit)
                    self.metrics.on_emit(choice.timing, emit, now)
                    self._queue.put_nowait((choice, emit))
                    if self._queue.qsize() > MAX_UNREAD:
                        self.on_stall()

                choice.request_id = self.frontend.submit(prompt, own, on_emit, salt=own_salt, priority=priority)
                if rejected:
                    raise too_many(rejected[0].error, rejected[0].retry_after)

    async def news(self) -> AsyncIterator[list[News]]:
        """All that has come since the last time, until every choice has ended. Raises `ApiError` if one fails."""
        open_choices = len(self.choices)
        held: dict[int, Piece] = {}  # the last piece waits for the stage times
        while open_choices:
            batch = [await self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get_nowait())
            out: list[News] = []
            for choice, emit in batch:
                first = choice.processor.num_tokens == 0
                pieces = choice.processor.push(emit)
                choice.prompt_logprobs = choice.prompt_logprobs or emit.prompt_logprobs
                choice.cached_tokens = emit.cached_tokens or choice.cached_tokens
                if pieces and pieces[-1].finish:
                    held[choice.index] = pieces.pop()
                    if not emit.finish:  # a stop string: the engine does not know yet
                        self.frontend.abort(choice.request_id)
                if emit.finish:
                    choice.times, choice.ended = emit.times, True
                    open_choices -= 1
                    if choice.index not in held:
                        raise failure(emit)
                    pieces.append(held.pop(choice.index))
                if pieces:
                    out.append(News(choice, pieces, first, emit.finish != ""))
            if out:
                yield out

    def usage(self, n: int, written: int | None = None) -> Usage:
        """Tokens so far, or as of the first `written`; a prompt counts once, however many choices it has."""
        prompts = self.choices[::n]
        prompt_tokens = sum(len(choice.prompt) for choice in prompts)
        output_tokens = sum(c.processor.num_tokens for c in self.choices) if written is None else written
        cached = PromptDetails(sum(choice.cached_tokens for choice in prompts))
        return Usage(prompt_tokens, output_tokens, prompt_tokens + output_tokens, cached)

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        for choice in self.choices:
            if choice.request_id and not choice.ended:
                self.frontend.abort(choice.request_id)


def too_many(reason: str, retry_after: float) -> ApiError:
    """429, with the time after which it may go better."""
    return ApiError(429, reason, code="rate_limit_exceeded", headers={"Retry-After": str(max(1, round(retry_after)))})


def failure(emit: Emit) -> ApiError:
    """What the client hears of a request that did not end well."""
    if emit.finish == "reject":
        return too_many(emit.error, emit.retry_after)
    if "deadline" in emit.error:
        return ApiError(504, emit.error, code="timeout", headers={"x-should-retry": "false"})
    if "stopping" in emit.error:
        return ApiError(503, emit.error, code="unavailable")
    return ApiError(500, emit.error or f"the request ended: {emit.finish}", headers={"x-should-retry": "false"})
