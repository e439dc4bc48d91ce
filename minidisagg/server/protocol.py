"""The bodies of the OpenAI-compatible endpoints: what is accepted, in which ranges, and what is answered.

Requests are decoded by msgspec straight from their bytes, so that a wrong type or a value out of range names its
field. Fields that OpenAI's clients may send and this server does not do are declared as such: an answer that ignored
them would be wrong. Fields that nobody knows are ignored, as OpenAI does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from minidisagg.core.messages import SamplingParams
from minidisagg.core.tracked import StageTimes
from minidisagg.ranges import explained

MAX_TEXT = 4 << 20  # characters of a prompt
MAX_PROMPTS = 256  # of one request
Count = Annotated[int, Meta(ge=1, le=1 << 20)]
TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Meta(max_length=1 << 20)]
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
StopText = Annotated[str, Meta(min_length=1, max_length=256)]
Stops = Annotated[list[StopText], Meta(max_length=16)]
Seed = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Id = Annotated[str, Meta(max_length=256)]


T = TypeVar("T", bound="GenerationRequest")
S = TypeVar("S", bound=Struct)


class ApiError(Exception):
    """An error as OpenAI's clients expect it: `{"error": {"message", "type", "param", "code"}}` and a status."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> bytes:
        """The JSON of it."""
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


class StreamOptions(Struct, frozen=True):
    """What a stream carries beside text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(Struct, frozen=True, kw_only=True):
    """What both endpoints take."""

    model: Annotated[str, Meta(max_length=512)] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 20)] | None = None
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    seed: Seed | None = None
    stop: StopText | Stops | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=64)] | None = None
    n: Annotated[int, Meta(ge=1, le=16)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=1 << 20)] | None = None
    ignore_eos: bool | None = None
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10.0)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Id | None = None
    cache_salt: Id | None = None  # requests share prefixes only with those of the same salt
    prompt_cache_key: Id | None = None  # of a conversation: its KV is kept for the next turn where that begins
    priority: Annotated[int, Meta(ge=-1000, le=1000)] | None = None

    def sampling(self, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
        """As the engine has it; unset fields take OpenAI's defaults. Raises `ApiError` 400."""
        if (self.min_tokens or 0) > max_tokens:
            raise ApiError(400, f"min_tokens is {self.min_tokens}, more than max_tokens {max_tokens}", "min_tokens")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "seed": self.seed,
            "min_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "top_k": max(0, self.top_k or 0),
            "stop": tuple(stop),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
        }
        given |= {"max_tokens": max_tokens, "logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
        with _naming_the_field(SamplingParams):  # whose ranges are the engine's, should they be narrower
            return msgspec.convert({key: value for key, value in given.items() if value is not None}, SamplingParams)
        raise AssertionError("unreachable")


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/completions. `prompt` is a text, token ids, or a list of either."""

    # msgspec allows one list type in a union, so that what its items are together is checked in `prompts`.
    prompt: Text | Annotated[list[TokenId | Text | TokenIds], Meta(min_length=1, max_length=1 << 20)]
    max_tokens: Annotated[int, Meta(ge=0, le=1 << 20)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None

    def prompts(self) -> list[str | list[int]]:
        """One or several prompts."""
        items = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if all(isinstance(item, int) for item in items):
            return [items]  # type: ignore[list-item]
        if any(isinstance(item, int) for item in items):
            raise ApiError(400, "prompt mixes token ids with texts or lists", "prompt")
        if len(items) > MAX_PROMPTS:
            raise ApiError(400, f"prompt has {len(items)} entries; the limit is {MAX_PROMPTS}", "prompt")
        return items  # type: ignore[return-value]


class TextPart(Struct, frozen=True):
    """A part of a message's content; text is the only kind."""

    type: Literal["text"]
    text: Text


class ChatRequestMessage(Struct, frozen=True):
    """A turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Meta(max_length=256)] | None = None
    name: Id | None = None
    tool_calls: Any = None
    tool_call_id: Any = None

    def __post_init__(self) -> None:
        if self.tool_calls or self.tool_call_id:
            raise ValueError(f"{'tool_calls' if self.tool_calls else 'tool_call_id'} is not supported by this server")

    def as_dict(self) -> dict[str, Any]:
        """As chat templates read it; its parts stay parts, since the template decides what it takes."""
        content: Any = self.content or ""
        if not isinstance(content, str):
            content = [{"type": part.type, "text": part.text} for part in content]
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return message if self.name is None else {**message, "name": self.name}


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatRequestMessage], Meta(min_length=1, max_length=1024)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None  # refused where it is true; `UNSUPPORTED` is of both endpoints


def _is_any_of(value: object, harmless: tuple[object, ...]) -> bool:
    """Equal and of the same type: in Python True is 1."""
    return any(value == other and type(value) is type(other) for other in harmless)


# What is refused unless it says what would happen anyway.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "best_of": (1,), "suffix": ("",), "logit_bias": ({},), "tools": ([],), "tool_choice": ("none", "auto"),
    "functions": ([],), "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "audio": (), "prediction": (), "web_search_options": (), "guided_json": (),
    "guided_regex": (), "guided_choice": (), "guided_grammar": (), "structured_outputs": (), "prompt_logprobs": (),
    "use_beam_search": (False,), "length_penalty": (1, 1.0), "parallel_tool_calls": (True, False), "chat_template": (),
    "chat_template_kwargs": ({},), "add_generation_prompt": (True,), "continue_final_message": (False,),
    "skip_special_tokens": (True,), "include_stop_str_in_output": (False,), "truncate_prompt_tokens": (),
    "bad_words": ([],), "allowed_token_ids": (), "return_tokens_as_token_ids": (False,), "detokenize": (True,),
}  # fmt: skip
_Unsupported = msgspec.defstruct(
    "_Unsupported", [(name, Any, UNSET) for name in UNSUPPORTED], namespace={"__doc__": "Fields that are refused."}
)
_unsupported_decoder = msgspec.json.Decoder(_Unsupported)


@contextlib.contextmanager
def _naming_the_field(kind: Any) -> Iterator[None]:
    try:
        yield
    except msgspec.ValidationError as error:
        param, reason = explained(error, kind)
        raise ApiError(400, f"{param}: {reason}" if param else reason, param or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None


def decode(data: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """A request from its bytes. Raises `ApiError` 400 that names the field."""
    with _naming_the_field(decoder.type):
        request = decoder.decode(data)
        extras = _unsupported_decoder.decode(data)
    for name, harmless in UNSUPPORTED.items():
        value = getattr(extras, name)
        if not isinstance(value, UnsetType) and value is not None and not _is_any_of(value, harmless):
            raise ApiError(400, f"{name} is not supported by this server", name)
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream: true", "stream_options")
    return request


class TokenizeRequest(Struct, frozen=True):
    """POST /tokenize: a text, or a conversation through the chat template."""

    prompt: Text | None = None
    messages: Annotated[list[ChatRequestMessage], Meta(min_length=1, max_length=1024)] | None = None
    add_special_tokens: bool | None = None
    model: Id | None = None


class DetokenizeRequest(Struct, frozen=True):
    """POST /detokenize."""

    tokens: Annotated[list[TokenId], Meta(max_length=1 << 17)]
    model: Id | None = None


def decode_plain(data: bytes, kind: type[S]) -> S:
    """Any other body. Raises `ApiError` 400 that names the field."""
    with _naming_the_field(kind):
        return msgspec.json.decode(data, type=kind)
    raise AssertionError("unreachable")


# ---------------------------------------------------------------- answers


class PromptDetails(Struct, frozen=True):
    """How much of the prompt was in the prefix cache."""

    cached_tokens: int


class Usage(Struct, frozen=True):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class CompletionLogprobs(Struct, frozen=True):
    """The legacy form: parallel lists over tokens; the first token of an echoed prompt has None.

    The text goes on with `tokens[i]` at `text_offset[i]`. A token that is not in the text is empty there: a special one
    of the output, or what the tokenizer put before a prompt. What it is called is among its `top_logprobs`.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Struct, frozen=True):
    """One completion, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class TopLogprob(Struct, frozen=True):
    """One of the likeliest tokens."""

    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(Struct, frozen=True):
    """An output token of a chat."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    """Of a chat choice."""

    content: list[ContentLogprob]


class Delta(Struct, frozen=True, omit_defaults=True):
    """What a chunk adds to a message."""

    role: str | None = None
    content: str | None = None


class ChatMessage(Struct, frozen=True):
    """The assistant's answer."""

    role: str
    content: str


class ChatChoice(Struct, frozen=True):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatChunkChoice(Struct, frozen=True):
    """What a chunk adds to one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class Response(Struct, frozen=True, omit_defaults=True):
    """The body of an answer, or a chunk of its stream. `metrics` are the stage times of the last choice to end."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice] | list[ChatChoice] | list[ChatChunkChoice]
    usage: Usage | None = None
    metrics: StageTimes | None = None
