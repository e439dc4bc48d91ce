"""A request as one worker sees it: tokens still to compute, and the pages that hold what is computed."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import Any, NamedTuple

from minidisagg.core.blocks import page_hash, prefix_root
from minidisagg.core.messages import KVOffer, Replicate, RequestSpec, SamplingParams, Submit, TokenOut
from minidisagg.core.plan import RAW, PlanItem, SeqInit, SeqKey
from minidisagg.core.views import AnyRequest

FOREVER = 1 << 62  # positions of a request that does not leave


class State(Enum):
    """Where a request is in its life on this worker.

    QUEUED ──first chunk──▶ RUNNING ──last token──▶ DONE_INFLIGHT ──its last step lands──▶ DONE
    WAIT_KV ──KV complete──▶ RUNNING ──no pages──▶ DONE_INFLIGHT
                             RUNNING ──all that is to be computed here──▶ HELD ──acknowledged──▶ DONE
    """

    QUEUED = auto()  # nothing computed, no pages
    WAIT_KV = auto()  # KV on its way from a peer, into pages that are granted, or of a prefix into the cache
    RUNNING = auto()  # in the batch: a prompt begun, or decoding
    HELD = auto()  # computed here, kept until the decode worker has it
    DONE_INFLIGHT = auto()  # ended here, or given back to the router: a step or a peer still reads its pages
    DONE = auto()  # no pages, no step: forgotten


class OfSpec:
    """What the spec of a request says, for whoever has one."""

    __slots__ = ()
    spec: RequestSpec

    @property
    def prompt(self) -> Sequence[int]:
        """What the client sent."""
        return self.spec.prompt

    @property
    def arrival(self) -> float:
        """Seconds on the router's clock; it may lie before the time at which the router heard of the request."""
        return self.spec.arrival

    @property
    def priority(self) -> int:
        """The higher, the earlier."""
        return self.spec.priority

    @property
    def max_tokens(self) -> int:
        """Output limit; the upper bound of its length."""
        return self.spec.sampling.max_tokens


class Request(OfSpec):
    """One incarnation of a request on one worker.

    Two counters keep a step ahead honest: `num_scheduled` positions are in plans, `num_computed` of them are
    confirmed; `pending` sampled tokens are in flight, their values unknown.
    """

    __slots__ = (
        "cached_tokens",
        "codec",
        "cohort",
        "decode",
        "first_scheduled_at",
        "found",
        "hashes",
        "incarnation",
        "inflight",
        "introduced",
        "last_index",
        "length",
        "lossy",
        "num_computed",
        "num_scheduled",
        "output",
        "pages",
        "pending",
        "prefill_len",
        "prefill_s",
        "prefix",
        "published",
        "queued_at",
        "reads",
        "ready_at",
        "request_id",
        "root",
        "sort_key",
        "spec",
        "state",
        "tried",
        "until",
        "view",
    )

    def __init__(self, source: Submit | KVOffer | Replicate, fingerprint: str, now: float) -> None:
        self.request_id = source.request_id
        self.incarnation = source.incarnation
        self.spec = spec = source.spec
        self.output = list(spec.emitted)
        self.cohort = spec.cohort
        self.decode = source.decode if isinstance(source, Submit) else ""
        self.until = FOREVER  # positions that are computed here: with them it leaves for another worker
        offered = source if isinstance(source, KVOffer) else None
        self.length = (offered.length if offered else 0) or spec.prefill_len  # positions that a peer hands over
        self.prefix = bool(offered and offered.prefix)  # it is none: its KV is for the prefix cache
        self.prefill_s = 0.0  # seconds of it that were spent elsewhere
        self.state = State.QUEUED
        self.pages: list[int] = []
        self.codec = source.codec  # of its KV on its way away from here, or to here; empty: the worker's
        # KV that has come through a lossy codec, and all that is computed on it, is known by names of its own: it
        # never answers for what was computed from the tokens.
        self.lossy = self.codec if isinstance(source, KVOffer) and self.codec != RAW else ""
        self.root = prefix_root(fingerprint, f"{spec.salt}\0{self.lossy}" if self.lossy else spec.salt)
        self.hashes: list[bytes] = []
        self.published = 0  # pages considered for the prefix cache so far
        self.found = FOREVER  # pages from its first on that were here or in the store when that was asked
        self.reads = 0  # from the store, of what it had found then
        self.prefill_len = spec.prefill_len
        most = spec.sampling.max_tokens
        self.last_index = min(spec.ends_after or most, most)  # output tokens at which it ends, if no stop token comes
        self.num_scheduled = 0
        self.num_computed = 0
        self.pending = 0
        self.inflight = 0  # steps that carry this request
        self.introduced = False  # the device knows its sampling state
        self.cached_tokens = 0
        self.tried = -1  # the newest incarnation that it was to become elsewhere
        self.queued_at = now
        self.first_scheduled_at = -1.0
        self.ready_at = -1.0  # KV complete after a handoff, until its first token here
        self.sort_key: dict[str, Any] = {}  # by stage
        self.view = Work(self)  # what a policy gets of it

    @property
    def key(self) -> SeqKey:
        """(request_id, incarnation)."""
        return self.request_id, self.incarnation

    @property
    def sampling(self) -> SamplingParams:
        """How its tokens are chosen."""
        return self.spec.sampling

    @property
    def num_tokens(self) -> int:
        """Tokens whose value is known or in flight."""
        return len(self.prompt) + len(self.output) + self.pending

    @property
    def known(self) -> int:
        """Those of them that are computed here."""
        return min(self.num_tokens, self.until)

    @property
    def remaining(self) -> int:
        """Positions still to schedule here: a prompt's rest, or 1 for a decode step."""
        return self.known - self.num_scheduled

    @property
    def is_prefill(self) -> bool:
        """Still computing tokens that it did not sample here."""
        return self.num_scheduled < self.prefill_len

    @property
    def longest(self) -> int:
        """Its tokens at the latest end."""
        return len(self.prompt) + self.last_index

    def take(self, tokens: Sequence[int], now: float) -> TokenOut:
        """What was sampled for it, in its place."""
        first = len(self.output) == self.prefill_len - len(self.prompt)
        self.output.extend(tokens)
        back = self.ready_at >= 0
        out = TokenOut(
            self.request_id,
            self.incarnation,
            len(self.output) - len(tokens),
            tokens[0],
            self.finish_reason(),
            queue_s=self.first_scheduled_at - self.queued_at if first else 0.0,
            prefill_s=self.prefill_s + now - self.first_scheduled_at if first else 0.0,
            wait_s=max(0.0, self.first_scheduled_at - self.ready_at) if back else 0.0,
            step_s=now - self.first_scheduled_at if back else 0.0,
            cached_tokens=self.cached_tokens if first else 0,
            more=tuple(tokens[1:]),
        )
        self.ready_at = -1.0
        return out

    def tokens(self, start: int, end: int) -> Sequence[int]:
        """Known token ids of positions [start, end); shorter than asked where the last one is in flight."""
        split = len(self.prompt)
        if end <= split:
            return self.prompt[start:end]
        if start >= split:
            return self.output[start - split : end - split]
        return [*self.prompt[start:], *self.output[: end - split]]

    def extend_hashes(self, page_size: int) -> list[bytes]:
        """Chained hashes of all full pages of known tokens; appends what has become full."""
        known = len(self.prompt) + len(self.output)
        if self.spec.hashes and not self.hashes:
            self.hashes = [prefix_root(one.hex(), self.lossy) if self.lossy else one for one in self.spec.hashes]
        while (len(self.hashes) + 1) * page_size <= known:
            start = len(self.hashes) * page_size
            parent = self.hashes[-1] if self.hashes else self.root
            self.hashes.append(page_hash(parent, self.tokens(start, start + page_size)))
        return self.hashes

    def finish_reason(self) -> str:
        """ "stop" or "length" if the last output token ends the request, else ""."""
        sampling = self.sampling
        if len(self.output) > sampling.min_tokens and self.output[-1] in sampling.stop_token_ids:
            return "stop"
        return "length" if len(self.output) >= self.last_index else ""


class Work(AnyRequest):
    """What the hooks of a worker see of a request there: what is done, and what remains."""

    __slots__ = ()
    _of: Request

    @property
    def queued_at(self) -> float:
        """When it came to this worker, on its clock."""
        return self._of.queued_at

    @property
    def num_output(self) -> int:
        """Tokens that were sampled, here or before."""
        return len(self._of.output)

    @property
    def num_pages(self) -> int:
        """Pages that it holds here."""
        return len(self._of.pages)

    @property
    def num_cached(self) -> int:
        """Prompt tokens that were found in the prefix cache when it was admitted."""
        return self._of.cached_tokens

    @property
    def num_scheduled(self) -> int:
        """Positions whose KV is computed, or being computed."""
        return self._of.num_scheduled

    @property
    def remaining(self) -> int:
        """Positions still to schedule: a prompt's rest, or 1 for a decode step."""
        return self._of.remaining

    @property
    def is_prefill(self) -> bool:
        """Still computing tokens that it did not sample here."""
        return self._of.is_prefill


def request_of(view: Work) -> Request:
    """The mechanism's way back."""
    return view._of


class Composed(NamedTuple):
    """What a policy has put into a step. It is shown none of it: these requests know where they end."""

    cohort: int
    members: dict[Request, PlanItem]
    begun: list[Request]  # whose first tokens are in this step
    new: list[SeqInit]
