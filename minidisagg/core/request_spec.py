"""What a request is, and how a worker takes it: the part of the messages that all of the project speaks of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated

from msgspec import Meta, Struct

NonNegative = Annotated[int, Meta(ge=0)]
TokenId = Annotated[int, Meta(ge=0)]
MaxLogprobs = Annotated[int, Meta(ge=0, le=20)]


class Role(IntEnum):
    """What the router sends a worker; a soft attribute that can change while the worker runs."""

    PREFILL = 1
    DECODE = 2
    BOTH = 3


@dataclass(frozen=True)
class WorkerOptions:
    """What can be set per worker, and so per role."""

    max_num_seqs: int = 32  # sequences in one step
    max_num_batched_tokens: int = 2048  # tokens in one step
    chunk: int = 0  # most prompt tokens of one request in one step; 0: no limit but the budget


class SamplingParams(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How tokens are chosen. Temperature 0 is greedy; randomness is keyed by (seed, position), so a retry repeats it.

    `stop` strings are matched by the front end; a worker knows `stop_token_ids` only, into which the front end has
    put the model's end-of-sequence ids unless `ignore_eos` is set. Temperatures between 0 and 0.01 are taken as 0.01,
    as vLLM does, and a repetition penalty has a smallest value: beyond these, logits overflow.
    """

    max_tokens: Annotated[int, Meta(ge=1)] = 128
    min_tokens: NonNegative = 0
    temperature: Annotated[float, Meta(ge=0.0, le=10.0)] = 1.0
    top_k: Annotated[int, Meta(ge=0)] = 0  # 0: off
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10.0)] = 1.0
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[TokenId, ...] = ()
    ignore_eos: bool = False
    logprobs: MaxLogprobs | None = None  # of each output token, and of as many of the likeliest in its place
    prompt_logprobs: MaxLogprobs | None = None  # the same of the prompt's tokens, from the second on


class RequestSpec(Struct, frozen=True, array_like=True, kw_only=True):
    """What a request is, wherever it goes: all that a worker needs to begin it or to go on with it.

    Where nobody has the tokens of its prompt (a simulated trace), `prompt` is a range of the right length, and `hashes`
    name its full pages.
    """

    prompt: Sequence[TokenId]
    emitted: list[TokenId] = []  # tokens that the client has; apart, since penalties, limits and usage need the split
    sampling: SamplingParams
    arrival: float = 0.0  # seconds on the router's clock; orders requests, never compared with a worker's clock
    salt: str = ""  # separates prefix caches of different tenants
    priority: int = 0
    cohort: int = 0  # suspects of a crash: a step holds requests of one cohort only
    slo_ttft: float | None = None  # seconds, if its client has such a limit
    slo_tpot: float | None = None
    predicted_len: int | None = None  # output tokens that a predictor expects
    session: str = ""  # of several requests of one conversation
    hints: dict[str, str | int | float] = {}  # what `place` wants the hooks of workers to know
    hashes: list[bytes] = []
    ends_after: int = 0  # output tokens at which a benchmark's request ends, whatever its limit; no view shows it

    @property
    def prefill_len(self) -> int:
        """Tokens that a prefill computes."""
        return len(self.prompt) + len(self.emitted)
