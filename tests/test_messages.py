"""Every message survives the wire, and nothing else is taken for one."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest

from minidisagg.core.frames import FRAME_VERSION, decode, encode
from minidisagg.core.messages import (
    Abort,
    AnyMessage,
    Cached,
    Envelope,
    Failed,
    Fatal,
    Hello,
    KVAck,
    KVBusy,
    KVCancel,
    KVDone,
    KVFailed,
    KVGrant,
    KVOffer,
    KVPiece,
    KVWait,
    LinkAborted,
    LinkOpen,
    LinkReady,
    Logprobs,
    Migrate,
    Parted,
    PeerDown,
    PeerUp,
    PieceSpan,
    PieceSpans,
    Reconfigure,
    Released,
    Replicate,
    RequestSpec,
    Role,
    SamplingParams,
    SetPolicy,
    SetRole,
    Starting,
    Stats,
    Stayed,
    StepOutput,
    Stored,
    Submit,
    TokenLogprob,
    TokenOut,
    WorkerOptions,
)
from minidisagg.formats import VersionError

SAMPLING = SamplingParams(max_tokens=3, stop=("x",), stop_token_ids=(1, 2), seed=-5)
SPEC = RequestSpec(
    prompt=[1, 2], emitted=[3], sampling=SAMPLING, arrival=0.5, salt="s", priority=-1, cohort=2
)  # fmt: skip
EXAMPLES: list[AnyMessage] = [
    Submit("a", 1, SPEC, decode="d", hold=True),
    Abort("a", 1), SetRole(Role.DECODE), SetRole(Role.BOTH, WorkerOptions(4, 64, 16)),
    SetPolicy("sarathi:chunk=64"), Reconfigure("{}"),
    Migrate("a", 1, "d"), Replicate("a+", 1, SPEC, "d"), Stayed("a", 1, "full", 2), Parted("a", 1), Stored([b"x"], []),
    Cached([b"x"], [b"y"]),
    PeerUp("w", 2, "unix:x"), PeerDown("w", 1),
    Hello(Role.BOTH, 8, 4, 32, "f", "unix:y", 7, 64, {"device": "cpu", "cores": 2}),
    StepOutput(4, [TokenOut("a", 1, 0, 9, "stop", prefill_s=0.1)], 0.2, 3, 1, 4), Released("a", 1, "preempted", True),
    PieceSpans([PieceSpan("d", 1 << 20, 0, True, "a", 0.5, 0.75, 1.0, 64, True)]),
    Logprobs("a", 1, 1, [TokenLogprob(-0.5, [(3, -0.25)])]),
    Stats(Role.PREFILL, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, clock=1.5), Starting("graphs", 3, 12), Fatal("why", "w", 3),
    KVOffer("a", 1, SPEC, "f", 1 << 20), KVGrant("a", 1, [4, 5], 1),
    KVWait("a", 1), KVBusy("a", 1), Failed("a", 1, "why"),
    KVPiece("a", 1, 1 << 20, 0, 1, 2, (0, 30), (1 << 64) - 1), KVDone("a", 1, 2, [9]), KVAck("a", 1),
    KVCancel("a", 1, 2),
    KVFailed("a", 1, "why"), LinkOpen("shm", 1 << 20), LinkReady(1 << 20, "x"), LinkAborted(1 << 20, True),
]  # fmt: skip


@pytest.mark.parametrize("body", EXAMPLES, ids=lambda body: type(body).__name__)
def test_round_trip(body: AnyMessage) -> None:
    envelope = Envelope("w", 3, body)
    assert decode(encode(envelope)) == envelope
    assert type(decode(memoryview(encode(envelope))).body) is type(body)


def test_every_message_has_an_example() -> None:
    assert {type(body) for body in EXAMPLES} == set(get_args(AnyMessage))


V = bytes([FRAME_VERSION])


@pytest.mark.parametrize("data", [
    V, V + b"\x00", V + b"\xc1",
    encode(Envelope("w", 1, Abort("a", 1)))[:-1], encode(Envelope("w", 1, Abort("a", 1))) + b"x",
    V + msgspec.msgpack.encode(["w", 1, ["Eval", "a", 1]]), V + msgspec.msgpack.encode(["w", "1", ["Abort", "a", 1]]),
    V + msgspec.msgpack.encode(["w", 1, ["Abort", "a"]]), V + msgspec.msgpack.encode(["w", 1, ["SetRole", 9]]),
    encode(Envelope("w", 1, Submit("a", 0, RequestSpec(prompt=[-1], sampling=SAMPLING)))),
])  # fmt: skip
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode(data)


@pytest.mark.parametrize(("data", "said"), [(b"", "no version"), (b"\x07\x93", "version 7")])
def test_another_version_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(VersionError, match=f"a message has {said}, and this minidisagg reads version {FRAME_VERSION}"):
        decode(data)


@pytest.mark.parametrize("wrong", [
    {"max_tokens": 0}, {"temperature": -1}, {"temperature": 11}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 2},
    {"repetition_penalty": 0}, {"presence_penalty": 3}, {"min_tokens": -1}, {"nonsense": 1},
])  # fmt: skip
def test_sampling_parameters_have_limits(wrong: dict[str, float]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(wrong, SamplingParams)
