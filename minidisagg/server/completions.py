"""POST /v1/completions and POST /v1/chat/completions.

body ─decode─▶ request ─tokenize─▶ Generation.submit ─▶ engine
engine ─Emit─▶ Generation.news ─▶ chunks (one server-sent event per token) or one body at the end
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from aiohttp import web

from minidisagg.core.messages import SamplingParams, TokenLogprob
from minidisagg.core.tracked import StageTimes
from minidisagg.model.tokenizer import IncrementalDetokenizer, Tokenizer
from minidisagg.runtime.output import TokenText
from minidisagg.server.generation import Choice, Generation, News
from minidisagg.server.protocol import (
    ApiError,
    ChatChoice,
    ChatChunkChoice,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChatRequestMessage,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    ContentLogprob,
    Delta,
    GenerationRequest,
    Response,
    TopLogprob,
    Usage,
    decode,
)

INLINE_TEXT = 4096  # characters that are tokenized on the event loop: less than a millisecond
COMPLETION_TOKENS = 16  # OpenAI's default for completions
ENCODER = msgspec.json.Encoder()


class Endpoint(ABC):
    """What differs between completions and chat."""

    kind: str  # of the object
    prefix: str  # of its id
    param: str  # the field that prompts come from

    @abstractmethod
    async def read(self, data: bytes, tokenizer: Tokenizer, limit: int) -> Job:
        """Decode, check and tokenize. Raises `ApiError` 400."""

    @abstractmethod
    def chunk(self, job: Job, news: News, part: TokenText, first: bool, tokenizer: Tokenizer) -> Sequence[Any]:
        """The choices of one chunk."""

    @abstractmethod
    def choice(self, job: Job, choice: Choice, parts: list[TokenText], tokenizer: Tokenizer) -> Any:
        """One whole choice."""


class Job(msgspec.Struct):
    """A request ready for the engine."""

    request: GenerationRequest
    prompts: list[list[int]]
    sampling: SamplingParams
    echo: bool = False
    wants_logprobs: bool = False
    texts: list[str | None] = []  # the prompts as they were sent; None where they were token ids

    @property
    def n(self) -> int:
        """Choices per prompt."""
        return self.request.n or 1


class Completions(Endpoint):
    """Text in, text out."""

    kind, prefix, param = "text_completion", "cmpl-", "prompt"
    decoder = msgspec.json.Decoder(CompletionRequest)

    async def read(self, data: bytes, tokenizer: Tokenizer, limit: int) -> Job:
        request = decode(data, self.decoder)
        sent = request.prompts()
        prompts = [p if isinstance(p, list) else await encode(tokenizer, p) for p in sent]
        texts = [p if isinstance(p, str) else None for p in sent]
        max_tokens = COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
        if max_tokens == 0 and not request.echo:
            raise ApiError(400, "max_tokens is 0, which makes sense with echo only", "max_tokens")
        scored = request.logprobs if request.echo else None
        # One token is computed with max_tokens 0 too, and not shown: the engine's work ends with a token.
        sampling = request.sampling(max(1, max_tokens), request.logprobs, scored)
        return Job(request, prompts, sampling, bool(request.echo), request.logprobs is not None, texts)

    def chunk(
        self, job: Job, news: News, part: TokenText, first: bool, tokenizer: Tokenizer
    ) -> Sequence[CompletionChoice]:
        return [self.choice(job, news.choice, [part], tokenizer, first)]

    def choice(
        self, job: Job, choice: Choice, parts: list[TokenText], tokenizer: Tokenizer, first: bool = True
    ) -> CompletionChoice:
        finish, echo = parts[-1].finish or None, first and job.echo
        parts = parts if _shown(job) else []
        sent = job.texts[choice.index // job.n] if echo else None
        prompt = (tokenizer.decode(choice.prompt, False) if sent is None else sent) if echo else ""
        logprobs = self._logprobs(job, choice, parts, prompt if echo else None, tokenizer)
        choice.offset += len(prompt) + sum(len(part.added) for part in parts)
        return CompletionChoice(choice.index, prompt + "".join(part.text for part in parts), logprobs, finish)

    def _logprobs(
        self, job: Job, choice: Choice, parts: list[TokenText], prompt: str | None, tokenizer: Tokenizer
    ) -> CompletionLogprobs | None:
        if not job.wants_logprobs:
            return None
        out = CompletionLogprobs([], [], [], [])

        def add(token: int, name: str, offset: int, value: TokenLogprob | None) -> None:
            out.tokens.append(name)
            out.text_offset.append(offset)
            out.token_logprobs.append(None if value is None else value.logprob)
            top = None
            if value is not None:
                top = {token_text(tokenizer, other): logprob for other, logprob in reversed(value.top)}
                top[token_text(tokenizer, token)] = value.logprob
            out.top_logprobs.append(top)

        offset = choice.offset
        if prompt is not None:
            if len(choice.prompt_logprobs) != len(choice.prompt) - 1:
                raise ApiError(500, "the prompt's log-probabilities were lost with a worker; try again")
            values = (None, *choice.prompt_logprobs)
            for token, (name, at), value in zip(
                choice.prompt, located(tokenizer, choice.prompt, prompt), values, strict=True
            ):
                add(token, name, offset + at, value)
            offset += len(prompt)
        for part in parts:
            # Behind an echo a token is what stands at its offset, and a special one is not there; else it has its name.
            name = token_text(tokenizer, part.token, part.added if job.echo else None)
            add(part.token, name, offset + max(0, len(part.added) - len(name)), part.logprob)
            offset += len(part.added)
        return out


class Chat(Endpoint):
    """A conversation in, its next message out."""

    kind, prefix, param = "chat.completion", "chatcmpl-", "messages"
    decoder = msgspec.json.Decoder(ChatRequest)

    async def read(self, data: bytes, tokenizer: Tokenizer, limit: int) -> Job:
        request = decode(data, self.decoder)
        if request.top_logprobs and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        if request.echo:
            raise ApiError(400, "echo is not supported by this server in chats", "echo")
        ids = await encode(tokenizer, templated(tokenizer, request.messages), add_special_tokens=False)
        asked = request.max_completion_tokens or request.max_tokens
        max_tokens = max(1, limit - len(ids)) if asked is None else asked
        top = (request.top_logprobs or 0) if request.logprobs else None
        return Job(request, [ids], request.sampling(max_tokens, top, None), False, bool(request.logprobs))

    def chunk(
        self, job: Job, news: News, part: TokenText, first: bool, tokenizer: Tokenizer
    ) -> Sequence[ChatChunkChoice]:
        index = news.choice.index
        delta = Delta("assistant" if first else None, part.text)
        return [ChatChunkChoice(index, delta, self._logprobs(job, [part], tokenizer), part.finish or None)]

    def choice(self, job: Job, choice: Choice, parts: list[TokenText], tokenizer: Tokenizer) -> ChatChoice:
        message = ChatMessage("assistant", "".join(part.text for part in parts))
        return ChatChoice(choice.index, message, self._logprobs(job, parts, tokenizer), parts[-1].finish)

    def _logprobs(self, job: Job, parts: list[TokenText], tokenizer: Tokenizer) -> ChatLogprobs | None:
        if not job.wants_logprobs:
            return None

        def entry(token: int, logprob: float) -> tuple[str, float, list[int]]:
            return token_text(tokenizer, token), logprob, list(tokenizer.piece(token, False))

        scored = [(part.token, part.logprob) for part in parts if part.logprob is not None]
        return ChatLogprobs(
            [
                ContentLogprob(*entry(token, value.logprob), [TopLogprob(*entry(*other)) for other in value.top])
                for token, value in scored
            ]
        )


def _shown(job: Job) -> bool:
    return job.request.max_tokens != 0


def templated(tokenizer: Tokenizer, messages: list[ChatRequestMessage]) -> str:
    """The conversation as one text. Raises `ApiError` 400."""
    try:
        return tokenizer.apply_chat_template([message.as_dict() for message in messages])
    except ValueError as error:
        raise ApiError(400, str(error), "messages") from None


async def encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids, of a long text in a thread. Raises `ApiError` 400."""
    try:
        if len(text) <= INLINE_TEXT:
            return tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)
    except ValueError as error:
        raise ApiError(400, str(error), "prompt") from None


def token_text(tokenizer: Tokenizer, token: int, added: str | None = None) -> str:
    """A token by itself, or as it stands at the end of what it `added` to a text.

    Where its bytes are no text, as OpenAI writes them: bytes:\\xNN.
    """
    raw = tokenizer.piece(token, skip_special_tokens=False)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
    return text if added is None or added.endswith(text) else added


def located(tokenizer: Tokenizer, ids: list[int], text: str) -> Iterator[tuple[str, int]]:
    """Each token of `text` as it stands there, and where.

    The decoding of its ids may differ from a text: the tokenizer has put a token or a space in front, or has normalized
    it. A token that is not there is empty, and the search goes on behind it, farther the more of them there are.
    """
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    at = missed = 0
    for token in ids:
        added = detokenizer.push(token)
        if not text.startswith(added, at):
            if text.startswith(rest := added.removeprefix(" "), at):
                added = rest
            elif (found := text.find(added, at, at + len(added) + 4 * missed)) >= 0:
                at = found
            else:
                missed += len(added)
                yield "", at
                continue
        missed = 0 if added else missed
        name = token_text(tokenizer, token, added)
        yield name, at + max(0, len(added) - len(name))
        at += len(added)


# ---------------------------------------------------------------- answers


class Answer:
    """Writes one request's outcome, streamed or whole."""

    def __init__(self, endpoint: Endpoint, job: Job, generation: Generation, request_id: str, model: str) -> None:
        self.endpoint, self.job, self.generation, self.model = endpoint, job, generation, model
        self.tokenizer = generation.tokenizer
        self.id = endpoint.prefix + request_id
        self.created = int(time.time())
        self.written = 0  # tokens; with max_tokens 0 the one that is computed is not the client's
        options = job.request.stream_options
        self.final_usage = options is not None and bool(options.include_usage)
        self.each_usage = options is not None and bool(options.continuous_usage_stats)

    async def whole(self) -> bytes:
        """The body, once every choice has ended."""
        parts: dict[int, list[TokenText]] = {choice.index: [] for choice in self.generation.choices}
        async for batch in self.generation.news():
            for news in batch:
                parts[news.choice.index] += news.parts
                self.written += len(news.parts) if _shown(self.job) else 0
        choices = [
            self.endpoint.choice(self.job, choice, parts[choice.index], self.tokenizer)
            for choice in self.generation.choices
        ]
        return ENCODER.encode(
            Response(
                self.id,
                self.endpoint.kind,
                self.created,
                self.model,
                choices,
                self.generation.usage(self.written),
                self._last_times(),
            )
        )

    async def stream(self, request: web.BaseRequest) -> web.StreamResponse:
        """Server-sent events: what comes together is written together. The headers leave with the first token."""
        response = web.StreamResponse(headers={"Cache-Control": "no-cache", "Content-Type": "text/event-stream"})
        async for batch in self.generation.news():
            data = b"".join(
                self._event(news, part, news.first and n == 0, news.last and n == len(news.parts) - 1)
                for news in batch
                for n, part in enumerate(news.parts)
            )
            if not response.prepared:
                await response.prepare(request)
            await response.write(data)
        if self.final_usage:
            await response.write(self._as_event([], self.generation.usage(self.written), self._last_times()))
        await response.write_eof(b"data: [DONE]\n\n")
        return response

    def _event(self, news: News, part: TokenText, first: bool, last: bool) -> bytes:
        choices = self.endpoint.chunk(self.job, news, part, first, self.tokenizer)
        self.written += _shown(self.job)  # what has come may be more: several tokens are written together
        usage = self.generation.usage(self.written) if self.each_usage else None
        return self._as_event(choices, usage, news.choice.times if last else None)

    def _as_event(self, choices: Sequence[Any], usage: Usage | None, times: StageTimes | None) -> bytes:
        kind = self.endpoint.kind + (".chunk" if self.endpoint.kind.startswith("chat") else "")
        body = Response(self.id, kind, self.created, self.model, list(choices), usage, times)
        return b"data: " + ENCODER.encode(body) + b"\n\n"

    def _last_times(self) -> StageTimes | None:
        times = [choice.times for choice in self.generation.choices if choice.times is not None]
        return max(times, key=lambda t: t.e2e, default=None)
