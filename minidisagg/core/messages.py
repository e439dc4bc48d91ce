"""Everything that crosses a process boundary, in one file.

Each message is a `msgspec.Struct`, sent as msgpack inside an `Envelope` that names the sender and its epoch.
A request is fenced by `(request_id, incarnation)`: the incarnation grows with every preemption, migration and
resubmission, and a message about an older one changes nothing. A worker is fenced by its epoch, which grows with
every restart. Times are seconds; workers send durations only, so that every instant is on the router's clock.
"""

from __future__ import annotations

from msgspec import Struct

from minidisagg.core.request_spec import MaxLogprobs as MaxLogprobs  # all of these are known from here
from minidisagg.core.request_spec import NonNegative
from minidisagg.core.request_spec import RequestSpec as RequestSpec
from minidisagg.core.request_spec import Role as Role
from minidisagg.core.request_spec import SamplingParams as SamplingParams
from minidisagg.core.request_spec import TokenId as TokenId
from minidisagg.core.request_spec import WorkerOptions as WorkerOptions

ROUTER = "router"  # the address of the front-end process, beside the workers' names


class Message(Struct, frozen=True, tag=True, array_like=True):
    """Base of all messages; the class name is the tag on the wire."""


class OfRequest(Message, frozen=True):
    """About one incarnation of one request."""

    request_id: str
    incarnation: int


# ---------------------------------------------------------------- front end -> worker


class Submit(OfRequest, frozen=True):
    """Compute this request: prefill what is known of it, then hand over to `decode`, or stay where that is empty.

    With `hold`, the worker keeps the blocks after prefill until a `Migrate` names the decode worker (late binding).
    """

    spec: RequestSpec
    decode: str = ""
    hold: bool = False
    codec: str = ""  # of its KV on the wire; empty: as the worker's
    until: NonNegative = 0  # positions to compute here before it is handed over; 0: as the worker's `decode_after` says
    after: str = ""  # the worker that copies a prefix of it here (`Replicate`): to be begun when that has ended


class Abort(OfRequest, frozen=True):
    """Forget every incarnation of the request up to this one; it may overtake the offer, so it leaves a tombstone."""


class SetRole(Message, frozen=True):
    """Take this role and its options; the router sends it once the worker has finished what its old role brought it.

    Without options, those that the worker was started with.
    """

    role: Role
    options: WorkerOptions | None = None


class SetPolicy(Message, frozen=True):
    """Schedule by this policy from now on; `spec` is as on the command line."""

    spec: str


class Reconfigure(Message, frozen=True):
    """Once nothing is left to do, begin the next epoch: as after a start, on the same process, weights and memory.

    `config` is what a worker gets at its start (`WorkerConfig` as JSON); nothing that it is built from differs.
    """

    config: str


class Migrate(OfRequest, frozen=True):
    """Hand the request's KV over to the worker `dest`: at once if it is held, else while it goes on decoding.

    There it is the incarnation `anew`: it may have been there before.
    """

    dest: str
    codec: str = ""  # as `Submit` has it
    anew: int = -1  # -1: the same one


class Replicate(OfRequest, frozen=True):
    """Copy what the prefix cache has of these tokens into that of the worker `dest`.

    The copy has a name and an incarnation of its own, as if it were a request: see `fetched` and `returned`.
    """

    spec: RequestSpec
    dest: str
    codec: str = "raw"  # lossy pages would answer for nothing


class PeerUp(Message, frozen=True):
    """A worker is there, under this epoch, and its channel listens at `address`."""

    worker: str
    epoch: int
    address: str


class PeerDown(Message, frozen=True):
    """The worker's process is dead (its parent has waited for it): it will never write again."""

    worker: str
    epoch: int


def fetched(request_id: str) -> str:
    """The name of the copy that a request waits for."""
    return f"{request_id}+"


def returned(request_id: str) -> str:
    """The name of the copy of what a request's decode worker has computed, on its way back."""
    return f"{request_id}-"


# ---------------------------------------------------------------- worker -> front end


class Hello(Message, frozen=True):
    """A worker's first message: what it is and what it holds."""

    role: Role
    num_pages: int
    page_size: int  # tokens
    max_model_len: int
    fingerprint: str
    address: str
    pid: int
    kv_bytes_per_token: int
    info: dict[str, str | int | float] = {}


class TokenOut(Struct, frozen=True, array_like=True, gc=False):
    """One sampled token. `index` counts the request's output from 0, over all incarnations and workers.

    Durations, on the worker's clock and only where they end with this token, else 0: `queue_s` and `prefill_s` with
    the first token of an incarnation, `wait_s` (KV complete to first scheduled) and `step_s` (that first step) with
    the first token after a handoff.
    """

    request_id: str
    incarnation: int
    index: int
    token: int
    finish: str = ""  # "stop" or "length" with the last token
    queue_s: float = 0.0
    prefill_s: float = 0.0
    wait_s: float = 0.0
    step_s: float = 0.0
    cached_tokens: int = 0  # with the first token: how many prompt tokens were prefix hits
    more: tuple[int, ...] = ()  # those after it, of equal steps that were computed at once


class TokenLogprob(Struct, frozen=True, array_like=True):
    """Natural logarithm of a token's probability before any sampling parameter, and the likeliest (token, logprob)."""

    logprob: float
    top: list[tuple[int, float]]


class Logprobs(OfRequest, frozen=True):
    """Of the tokens at positions `first`, `first` + 1, … of prompt and output; precedes the step's `StepOutput`."""

    first: int
    values: list[TokenLogprob]


class StepOutput(Message, frozen=True):
    """What one step did: its tokens, how long it took, and what was in it."""

    step_id: int
    tokens: list[TokenOut]
    seconds: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    context_tokens: int = 0  # KV tokens read by the step's sequences
    clock: float = 0.0  # the worker's, at the step's end
    ends: list[float] = []  # of equal steps that were computed at once: the same of each; `seconds` is of all of them
    stored: list[bytes] = []  # pages that its prefix cache has gained since the last step's message, by `short` hash
    removed: list[bytes] = []  # and lost
    begun: list[str] = []  # requests whose prefill has begun with this step


class PieceSpan(Struct, frozen=True, array_like=True):
    """One end of one piece on a link, on the worker's clock: handed over, begun, ended (seconds)."""

    peer: str
    link_epoch: int
    seq: int
    send: bool
    request_id: str
    queued: float
    begun: float
    ended: float
    nbytes: int
    ok: bool


class PieceSpans(Message, frozen=True):
    """What a traced worker's links have done since the last time."""

    spans: list[PieceSpan]


class Released(OfRequest, frozen=True):
    """The worker gave the request's blocks up without finishing it; the router places it anew.

    `failure` is False for a preemption: only failures count towards the limit that stops a poison request.
    """

    reason: str
    failure: bool = False


class Stayed(OfRequest, frozen=True):
    """Its migration, with which it was to become the incarnation `anew`, has come to nothing: it goes on here."""

    reason: str
    anew: int


class Parted(OfRequest, frozen=True):
    """All that was to be computed here is, and its pages are in the store: its decode worker may take it from there."""


class Cached(Message, frozen=True):
    """Pages that the worker's prefix cache has gained, and lost, but not by a step; by `short` hash."""

    stored: list[bytes]
    removed: list[bytes]


class Stored(Message, frozen=True):
    """Pages that the host's store has, in whichever tier, by what was written or read; and pages that it has lost."""

    stored: list[bytes]
    removed: list[bytes]


class Failed(OfRequest, frozen=True):
    """The request cannot go on, here or on any other worker: it ends with this reason."""

    reason: str


class LinkStats(Struct, frozen=True, array_like=True):
    """What one worker has sent to one peer, over all epochs of their link."""

    peer: str
    kind: str
    transfers: int = 0  # pieces that have left
    bytes: int = 0
    seconds: float = 0.0  # summed over pieces, from start of sending to its end
    queue_seconds: float = 0.0  # summed over pieces, from the core's word to the start of sending
    failures: int = 0
    backlog: int = 0  # pieces started and not finished
    late: int = 0  # pieces that an emulated interconnect would have brought sooner than the link did


class StoreStats(Struct, frozen=True, array_like=True):
    """What one worker has had of the store, and given to it."""

    hits: int = 0  # pages
    misses: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    read_seconds: float = 0.0  # in which its thread was at work
    write_seconds: float = 0.0
    dropped: int = 0  # pages that were not saved: the worker was ending
    corrupt: int = 0  # pages that were not what had been written, and are gone
    failing: str = ""  # why nothing is written for now


class Stats(Message, frozen=True):
    """A worker's state, sent on every tick; `steps` lets the router tell a live thread from a live device."""

    role: Role
    steps: int
    running: int
    waiting: int
    held: int
    offers: int
    queued_tokens: int
    pages_free: int
    pages_live: int
    pages_cached: int
    pages_inflight: int
    pages_quarantined: int
    preemptions: int = 0
    prefix_queries: int = 0  # tokens looked up
    prefix_hits: int = 0  # tokens found
    flying: int = 0  # steps under way
    links: list[LinkStats] = []  # this worker's outgoing links
    busy_seconds: float = 0.0
    flops: float = 0.0  # floating-point operations of all steps, linears and attention
    bytes_read: float = 0.0  # weight and KV bytes that all steps had to read
    cpu_seconds: float = 0.0
    clock: float = 0.0  # the worker's monotonic clock when it sent this
    store: StoreStats | None = None


class Starting(Message, frozen=True):
    """What a worker is at before its `Hello`: `done` of `total`, 0 where nobody knows."""

    what: str
    done: int = 0
    total: int = 0


class Fatal(Message, frozen=True):
    """A worker must be killed: the sender itself cannot go on, or a peer does not let go of a link.

    `hopeless`: what is started in its place would meet the same end, so that the engine is over.
    """

    reason: str
    worker: str
    epoch: int
    hopeless: bool = False


# ---------------------------------------------------------------- worker <-> worker


class KVOffer(OfRequest, frozen=True):
    """Source to destination: I am computing these tokens; give me pages for their KV."""

    spec: RequestSpec
    fingerprint: str
    link_epoch: int  # that will carry it: giving a link up touches exactly its own handoffs
    codec: str = "raw"
    length: NonNegative = 0  # positions that may come, of a running request more than there are; 0: of the prefill
    prefix: bool = False  # for the prefix cache alone: nothing is to be run
    open: bool = False  # it runs on at its source, and stays there if there is no room now


class KVGrant(OfRequest, frozen=True):
    """Destination to source: write into these pages. The first `skip` pages of the request are held already.

    The handle (worker, epoch, request, incarnation, pages) is checked at every boundary; the worker and its epoch
    are the envelope's.
    """

    pages: list[int]
    skip: int


class KVWait(OfRequest, frozen=True):
    """Destination to source: no room yet, but what runs here will make some; keep your pages."""


class KVBusy(OfRequest, frozen=True):
    """Source to destination: the step that computes the next piece is still running; keep the pages."""


class KVPiece(OfRequest, frozen=True):
    """Source to destination: piece `seq` of the link carries these pages of the request.

    Two-sided links announce a piece before its bytes, one-sided links after them (`checksum` is then set).
    """

    link_epoch: int
    seq: int
    first: int  # index of the first page in the request's block table
    count: int  # pages
    layers: tuple[int, int]  # half-open
    checksum: int = 0
    codec: str = "raw"


class KVDone(OfRequest, frozen=True):
    """Source to destination: all is sent, in `pieces` pieces.

    `tokens` were sampled beyond the offered spec; the last one's KV is not computed. Without any, the positions of the
    offer are a part of the prompt, which took `prefill_s` seconds so far.
    """

    pieces: int
    tokens: list[TokenId]
    prefill_s: float = 0.0


class KVAck(OfRequest, frozen=True):
    """Destination to source: the KV is complete and mine; release yours."""


class KVCancel(OfRequest, frozen=True):
    """Source to destination: I have stopped, after `pieces` pieces; nothing more will be written."""

    pieces: int


class KVFailed(OfRequest, frozen=True):
    """Destination to source: stop; answer with `KVCancel` so that I may reuse the pages."""

    reason: str


class LinkOpen(Message, frozen=True):
    """Source to destination: open your end of the link of this kind and epoch, and tell me where it is.

    `codecs`: that the source may send; a destination that lacks one refuses, and says which it has.
    """

    kind: str
    link_epoch: int
    codecs: tuple[str, ...] = ()


class LinkReady(Message, frozen=True):
    """Destination to source: my end listens at `endpoint` (opaque to all but the link), or `error` says why not."""

    link_epoch: int
    endpoint: str
    error: str = ""


class LinkAborted(Message, frozen=True):
    """The sender has given this link epoch up (`outgoing`: it was the link's source) and will not touch it again."""

    link_epoch: int
    outgoing: bool


AnyMessage = (
    Submit | Abort | SetRole | SetPolicy | Reconfigure | Migrate | Replicate | PeerUp | PeerDown | Hello | Logprobs |
    StepOutput | Released | Stayed | Parted | Cached | Stored | Failed | PieceSpans | Stats | Starting | Fatal |
    KVOffer | KVGrant | KVWait | KVBusy | KVPiece | KVDone | KVAck | KVCancel | KVFailed | LinkOpen | LinkReady |
    LinkAborted
)  # fmt: skip


class Envelope(Struct, frozen=True, array_like=True):
    """A message with its sender's name and epoch."""

    source: str
    epoch: int
    body: AnyMessage
