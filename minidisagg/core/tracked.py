"""A request in the router's log: what the client has of it, where it is, and where its time went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from msgspec import Struct

from minidisagg.core.blocks import page_hashes, prefix_root, short
from minidisagg.core.messages import RequestSpec, TokenLogprob, TokenOut
from minidisagg.core.request import OfSpec
from minidisagg.core.views import AnyRequest


class StageTimes(Struct, frozen=True):
    """Where a request's time went, in seconds on the router's clock; the five stages add up to `e2e` exactly.

    `queue` is all before the last prefill began (its channel hop too), `transfer` what handoffs added between two
    tokens beside waiting for a place in the batch.
    """

    queue: float
    prefill: float
    transfer: float
    decode_wait: float
    decode: float
    e2e: float


class Emit(Struct, frozen=True):
    """News for the client: tokens from output index `index` on, and the end if `finish` is set.

    `finish` is "stop", "length", "abort", "reject" or "error" (`error` then says why, and for "reject" `retry_after`).
    """

    request_id: str
    index: int = 0
    tokens: tuple[int, ...] = ()
    finish: str = ""
    error: str = ""
    retry_after: float = 0.0
    times: StageTimes | None = None
    ends: tuple[float, ...] = ()  # of tokens of equal steps: when each step ended, on the worker's clock
    handoff: bool = False  # the gap before these tokens holds a handoff or a resubmission
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()  # of `tokens`, where the request asks for them
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # with the first token: of the prompt from its second token on


class Stage(Enum):
    """Where an incarnation of a request is, as far as the router can tell."""

    PARKED = auto()  # no worker can take it now
    PREFILL = auto()  # its first token has not come
    TRANSFER = auto()  # it has, and its KV is on its way to another worker
    DECODE = auto()


@dataclass
class Tracked(OfSpec):
    """One accepted request: the log entry, and where it is."""

    request_id: str
    spec: RequestSpec  # as it came
    deadline: float
    emitted: list[int] = field(default_factory=list)
    incarnation: int = 0
    before: int = -1  # while it migrates: its incarnation where it comes from
    newest: int = 0  # of its incarnations
    failures: int = 0
    cohort: int = 0  # of suspects; 0: nobody suspects it
    stage: Stage = Stage.PARKED
    prefill: str = ""  # worker, unless it is parked
    decode: str = ""  # worker; empty while left open
    charged: int = 0  # tokens counted on the prefill worker
    begun: bool = False  # its prefill has, by that worker's word
    early: dict[int, tuple[str, TokenOut]] = field(default_factory=dict)  # that came before their predecessor, and from
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)  # by position, until they are emitted
    cached_tokens: int = 0
    prefill_s: float = 0.0
    wait_s: float = 0.0
    transfer_s: float = 0.0
    first_at: float = -1.0
    last_at: float = -1.0
    stage_at: float = -1.0  # since when it decodes where it does, or is on its way from there
    stays: str = ""  # why a migration of it has come to nothing, as operators were told last
    codec: str = ""  # of its KV on the wire, where its placement names one
    home: str = ""  # worker to which what is decoded goes back at its end, if one is to have it
    workers: list[str] = field(default_factory=list)  # where it was, in order
    _names: list[bytes] | None = None

    @property
    def view(self) -> RequestView:
        """What a policy gets of it."""
        return RequestView(self)

    @property
    def prefill_len(self) -> int:
        """Tokens that the next prefill computes."""
        return len(self.spec.prompt) + len(self.emitted)

    def page_names(self, fingerprint: str, page_size: int) -> list[bytes]:
        """`short` hashes of the prompt's full pages, computed when they are first asked for."""
        if self._names is None:
            root = prefix_root(fingerprint, self.spec.salt)
            self._names = list(map(short, self.spec.hashes or page_hashes(root, self.prompt, page_size)))
        return self._names

    def renew(self) -> int:
        """The next incarnation; what it was before."""
        before = self.incarnation
        self.newest += 1
        self.incarnation, self.before = self.newest, -1
        return before

    def speaks(self, worker: str, incarnation: int) -> bool:
        """That worker's word about this incarnation counts."""
        return incarnation == self.incarnation or (incarnation == self.before and worker == self.prefill)

    @property
    def computing(self) -> bool:
        """This incarnation has no token yet."""
        return self.stage in (Stage.PARKED, Stage.PREFILL)

    def uses(self, worker: str) -> bool:
        """It cannot go on without this worker."""
        return worker == self.decode or (worker == self.prefill and self.stage is not Stage.DECODE)

    def take(self, source: str, out: TokenOut, now: float) -> bool:
        """The next token, from the worker `source`; whether a handoff or a resubmission lies in the gap before it."""
        moved = self.stage is Stage.TRANSFER and source == self.decode
        gap = moved or (self.computing and self.incarnation > 0)
        if not self.emitted:
            self.first_at, self.prefill_s, self.cached_tokens = now, out.prefill_s, out.cached_tokens
        elif moved and (step := out.step_s or out.prefill_s) > 0:  # from the store, the last page is computed anew
            wait = min(out.wait_s, now - self.last_at)
            self.wait_s += wait
            self.transfer_s += max(0.0, now - self.last_at - wait - step)
        if self.stage is not Stage.DECODE and (source == self.decode or not self.decode):
            self.stage, self.stage_at, self.before = Stage.DECODE, now, -1
            if self.decode and self.workers[-1] != self.decode:
                self.workers.append(self.decode)
        elif self.computing:
            self.stage, self.stage_at = Stage.TRANSFER, now
        self.last_at = now
        self.emitted += (out.token, *out.more)
        return gap

    def news(self, out: TokenOut, gap: bool, ends: Sequence[float] = ()) -> Emit:
        """These tokens for the client, with the log-probabilities that have come ahead of it."""
        values, size = self.logprobs, len(self.prompt)
        own: tuple[TokenLogprob, ...] = ()
        prompt: tuple[TokenLogprob, ...] = ()
        if values:
            own = tuple(values.pop(p) for p in [size + out.index] if p in values)
            prompt = tuple(values.pop(p) for p in range(1, size) if p in values) if out.index == 0 else ()
        return Emit(
            self.request_id,
            out.index,
            (out.token, *out.more),
            ends=tuple(ends),
            handoff=gap,
            cached_tokens=self.cached_tokens,
            logprobs=own,
            prompt_logprobs=prompt,
        )

    def times(self, now: float) -> StageTimes:
        """Residuals make the stages add up: workers report durations, the router's clock the two ends."""
        e2e = now - self.arrival
        if self.first_at < 0:
            return StageTimes(e2e, 0.0, 0.0, 0.0, 0.0, e2e)
        queue = max(0.0, self.first_at - self.arrival - self.prefill_s)
        prefill = self.first_at - self.arrival - queue
        transfer, wait = self.transfer_s, self.wait_s
        return StageTimes(queue, prefill, transfer, wait, now - self.first_at - transfer - wait, e2e)


class RequestView(AnyRequest):
    """What the router's hooks see."""

    __slots__ = ()
    _of: Tracked

    @property
    def num_output(self) -> int:
        """Tokens that the client has."""
        return len(self._of.emitted)

    @property
    def prefill(self) -> str:
        """Where it is to be computed, or was: `place` is asked again where it left `decode` open. Else empty."""
        return self._of.prefill

    @property
    def decode(self) -> str:
        """Where it is to decode; empty where that is open."""
        return self._of.decode


def tracked_of(view: RequestView) -> Tracked:
    """The mechanism's way back."""
    return view._of
