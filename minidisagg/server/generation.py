"""One HTTP request's way through the engine: a submission per choice, and their news in one queue."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from minidisagg.core.messages import SamplingParams, TokenLogprob
from minidisagg.core.tracked import Emit, StageTimes
from minidisagg.model.tokenizer import Tokenizer
from minidisagg.runtime.frontend import Frontend
from minidisagg.runtime.output import OutputProcessor, TokenText, with_stops
from minidisagg.server.history import Timing
from minidisagg.server.metrics import Metrics
from minidisagg.server.protocol import ApiError, PromptDetails, Usage

MAX_UNREAD = 1024  # tokens of each choice of a request that its client has not taken


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
    end: Emit | None = None  # the engine's last word
    offset: int = 0  # characters so far, for `text_offset`


@dataclass
class News:
    """What is new of a choice; `last` with its end, when `Choice.times` is set too."""

    choice: Choice
    parts: list[TokenText]
    first: bool
    last: bool


@dataclass
class Generation:
    """All choices of one HTTP request. Use as a context manager: leaving it aborts what still runs.

    `on_stall` is called when the client has left more than `MAX_UNREAD` tokens of each choice unread.
    """

    frontend: Frontend
    tokenizer: Tokenizer
    on_stall: Callable[[], None]
    metrics: Metrics
    param: str  # the field that prompts come from
    n: int = 1  # choices of each prompt
    choices: list[Choice] = field(default_factory=list)
    _queue: asyncio.Queue[tuple[Choice, Emit]] = field(default_factory=asyncio.Queue)

    def submit(
        self,
        prompts: Sequence[list[int]],
        n: int,
        sampling: SamplingParams,
        salt: str,
        priority: int,
        echo: bool = False,
        session: str = "",
    ) -> None:
        """Hand `n` choices of each prompt to the engine. Raises `ApiError` 400, or 429 where there is no room.

        `echo`: the output is read after the prompt. `session`: the conversation that they are of.
        """
        self.n, sampling = n, with_stops(sampling, self.tokenizer)
        view, size, tokens = self.frontend.view, n * len(prompts), n * sum(map(len, prompts))
        if size > view.max_waiting or tokens > view.max_waiting_tokens:  # to come again would not help
            limits = f"{view.max_waiting} and {view.max_waiting_tokens} may wait"
            raise ApiError(400, f"{size} requests of {tokens} prompt tokens at once; {limits}", self.param)
        if self.frontend.failure:
            raise ApiError(503, self.frontend.failure, code="unavailable", headers={"x-should-retry": "false"})
        for prompt in prompts:  # all or none
            try:
                self.frontend.check(prompt, sampling)
            except ValueError as error:
                code = "context_length_exceeded" if "limit" in str(error) else None
                raise ApiError(400, str(error), self.param, code) from None
        for prompt in prompts:
            for turn in range(n):
                own = sampling
                if sampling.seed is not None and turn:
                    # Where the sum is too large it begins anew at the other end, as a number of 64 bits does.
                    seed = (sampling.seed + turn + (1 << 63)) % (1 << 64) - (1 << 63)
                    own = msgspec.structs.replace(sampling, seed=seed)
                processor = OutputProcessor(self.tokenizer, own, prompt if echo else ())
                choice = Choice(len(self.choices), prompt, processor, Timing(len(prompt)))
                self.choices.append(choice)
                # What is scored must be computed, so that it shares its prefix with nothing.
                own_salt = salt if own.prompt_logprobs is None else f"{salt}/{uuid.uuid4()}"

                def on_emit(emit: Emit, now: float, choice: Choice = choice) -> None:
                    if emit.finish:
                        # After a stop string the engine has been told to abort, and that is what it says.
                        choice.end = emit = msgspec.structs.replace(emit, finish=choice.processor.finish or emit.finish)
                    self.metrics.on_emit(choice.timing, emit, now)
                    self._queue.put_nowait((choice, emit))
                    if self._queue.qsize() > MAX_UNREAD * len(self.choices):
                        self.on_stall()

                choice.request_id = self.frontend.submit(
                    prompt, own, on_emit, salt=own_salt, priority=priority, session=session
                )
                if choice.end is not None and choice.end.finish == "error":
                    raise failure(choice.end)
                if choice.end is not None:
                    raise too_many(choice.end.error, max(choice.end.retry_after, self.metrics.retry_after()))
                choice.timing.workers = self.frontend.requests[choice.request_id].workers

    async def news(self) -> AsyncIterator[list[News]]:
        """All that has come since the last time, until every choice has ended. Raises `ApiError` if one fails."""
        open_choices, failed = len(self.choices), None
        held: dict[int, TokenText] = {}  # the last part waits for the stage times
        while open_choices:
            batch = [await self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get_nowait())
            out: list[News] = []
            for choice, emit in batch:
                first = choice.processor.num_tokens == 0
                parts = choice.processor.push(emit)
                choice.prompt_logprobs = choice.prompt_logprobs or emit.prompt_logprobs
                choice.cached_tokens = emit.cached_tokens or choice.cached_tokens
                if parts and parts[-1].finish:
                    held[choice.index] = parts.pop()
                    if not emit.finish:  # a stop string: the engine does not know yet
                        self.frontend.abort(choice.request_id)
                if emit.finish:
                    choice.times = emit.times
                    open_choices -= 1
                    if choice.index in held:
                        parts.append(held.pop(choice.index))
                    else:
                        failed = failed or failure(emit)
                if parts:
                    out.append(News(choice, parts, first, emit.finish != ""))
            if out:
                yield out
            if failed is not None:
                raise failed

    def usage(self, written: int) -> Usage:
        """As of the first `written` tokens; a prompt counts once, however many choices it has."""
        prompts = self.choices[:: self.n]
        prompt_tokens = sum(len(choice.prompt) for choice in prompts)
        cached = PromptDetails(sum(choice.cached_tokens for choice in prompts))
        return Usage(prompt_tokens, written, prompt_tokens + written, cached)

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        for choice in self.choices:
            if choice.request_id and choice.end is None:
                self.frontend.abort(choice.request_id)

    def __str__(self) -> str:
        """For the log: ids and lengths, never text."""
        ids = " to ".join(dict.fromkeys(choice.request_id for choice in (self.choices[0], self.choices[-1])))
        usage = self.usage(sum(choice.processor.num_tokens for choice in self.choices))
        finish = ", ".join(dict.fromkeys(choice.end.finish for choice in self.choices if choice.end is not None))
        return f"engine {ids}, prompt {usage.prompt_tokens} tokens, output {usage.completion_tokens} tokens, {finish}"


def too_many(reason: str, retry_after: float) -> ApiError:
    """429, with the time after which it may go better."""
    seconds = str(round(min(max(1.0, retry_after), 60.0)))  # clients of OpenAI do not heed a longer one
    return ApiError(429, reason, code="rate_limit_exceeded", headers={"Retry-After": seconds})


def failure(emit: Emit) -> ApiError:
    """What the client hears of a request that did not end well."""
    if "deadline" in emit.error:
        return ApiError(504, emit.error, code="timeout", headers={"x-should-retry": "false"})
    if "stopping" in emit.error:
        return ApiError(503, emit.error, code="unavailable")
    return ApiError(500, emit.error or f"the request ended: {emit.finish}", headers={"x-should-retry": "false"})
