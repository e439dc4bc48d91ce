"""Framing: order, limits, and what is no message."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from minidisagg.core.frames import encode
from minidisagg.core.messages import ROUTER, Abort, Envelope, RequestSpec, SamplingParams, Submit
from minidisagg.runtime import channel as channel_module
from minidisagg.runtime.channel import MAX_FRAME, Channel, ChannelError, connect, listen


def envelope(number: int) -> Envelope:
    return Envelope(ROUTER, 0, Abort(f"r{number}", number))


async def received(path: Path, talk: Callable[[asyncio.StreamWriter], Awaitable[None]]) -> tuple[list[Envelope], str]:
    """What a listening end gets from raw bytes, and how the iteration ended."""
    got: list[Envelope] = []
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def serve(channel: Channel) -> None:
        try:
            async for message in channel:
                got.append(message)
            ended.set_result("")
        except ChannelError as error:
            ended.set_result(str(error))

    server = await listen(str(path), serve)
    _, writer = await asyncio.open_unix_connection(str(path))
    await talk(writer)
    writer.close()
    error = await asyncio.wait_for(ended, 5)
    server.close()
    return got, error


def frame(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def run(path: Path, data: bytes) -> tuple[list[Envelope], str]:
    async def talk(writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    return asyncio.run(received(path / "s", talk))


def test_messages_arrive_in_order_whatever_the_pieces(tmp_path: Path) -> None:
    sent = [envelope(number) for number in range(200)]
    data = b"".join(frame(encode(message)) for message in sent)

    async def drip(writer: asyncio.StreamWriter) -> None:
        for start in range(0, len(data), 37):
            writer.write(data[start : start + 37])
            await asyncio.sleep(0)

    assert asyncio.run(received(tmp_path / "s", drip)) == (sent, "")


def test_both_ways_on_one_connection(tmp_path: Path) -> None:
    async def echo(channel: Channel) -> None:
        async for message in channel:
            channel.send(message)

    async def main() -> list[Envelope]:
        server = await listen(str(tmp_path / "s"), echo)
        channel = await connect(f"unix:{tmp_path}/s")
        big = Envelope(ROUTER, 1, Submit("big", 1, RequestSpec(prompt=list(range(100_000)), sampling=SamplingParams())))
        sent = [big, *(envelope(number) for number in range(1000)), big]
        for message in sent:
            channel.send(message)
        got = []
        async for message in channel:
            got.append(message)
            if len(got) == len(sent):
                break
        channel.close()
        server.close()
        assert got == sent
        return got

    assert len(asyncio.run(main())) == 1002


def test_an_oversized_frame_ends_it_before_it_is_read(tmp_path: Path) -> None:
    good = frame(encode(envelope(1)))
    got, error = run(tmp_path, good + struct.pack("<I", MAX_FRAME + 1) + good)
    assert got == [envelope(1)]
    assert error == f"a frame of {MAX_FRAME + 1} bytes is too large"


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00" * 12, b"\xff\xff\xff", encode(envelope(1)) + b"\x00", encode(envelope(1))[:-1],
     encode(envelope(1)).replace(b"Abort", b"Abhor")],
)  # fmt: skip
def test_a_malformed_message_is_an_error_of_the_channel(data: bytes, tmp_path: Path) -> None:
    got, error = run(tmp_path, frame(encode(envelope(7))) + frame(data))
    assert got == [envelope(7)]
    assert error.startswith(("malformed message", "a message has"))


def test_a_connection_cut_in_the_middle_of_a_frame_is_an_end(tmp_path: Path) -> None:
    whole = frame(encode(envelope(3)))
    for cut in (1, 4, len(whole) - 1):
        path = tmp_path / str(cut)
        path.mkdir()
        assert run(path, whole + whole[:cut]) == ([envelope(3)], "")


def test_a_message_that_exceeds_a_frame_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "MAX_FRAME", 100)

    async def main() -> list[Envelope]:
        got: list[Envelope] = []
        done = asyncio.Event()

        async def serve(channel: Channel) -> None:
            async for message in channel:
                got.append(message)
            done.set()

        server = await listen(str(tmp_path / "s"), serve)
        channel = await connect(f"unix:{tmp_path}/s")
        with pytest.raises(ChannelError, match=r"a message of \d+ bytes exceeds a frame"):
            channel.send(Envelope(ROUTER, 0, Abort("x" * 200, 0)))
        channel.send(envelope(1))
        await asyncio.sleep(0.05)
        channel.close()
        await asyncio.wait_for(done.wait(), 5)
        server.close()
        return got

    assert asyncio.run(main()) == [envelope(1)]


def test_a_peer_that_does_not_read_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "MAX_BACKLOG", 1 << 20)

    async def main() -> int:
        release = asyncio.Event()

        async def serve(_: Channel) -> None:
            await release.wait()

        server = await listen(str(tmp_path / "s"), serve)
        channel = await connect(f"unix:{tmp_path}/s")
        sent = 0
        with pytest.raises(ChannelError, match="the peer does not read"):
            while sent < 100:
                channel.send(Envelope(ROUTER, 0, Abort("x" * (1 << 17), 0)))
                sent += 1
                await asyncio.sleep(0)
        release.set()
        channel.close()
        server.close()
        return sent

    assert 8 <= asyncio.run(main()) < 40  # the backlog, and what sockets and the peer's reader take


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        asyncio.run(connect(f"unix:{tmp_path}/nobody"))


@pytest.mark.parametrize("uvloop", [False, True])
def test_what_is_sent_to_a_peer_that_has_gone_is_dropped(tmp_path: Path, uvloop: bool) -> None:
    """Until its parent says that it is dead, messages for it must not end the sender."""
    new_loop = pytest.importorskip("uvloop").new_event_loop if uvloop else asyncio.new_event_loop

    async def main() -> None:
        gone = asyncio.Event()

        async def serve(_: Channel) -> None:
            gone.set()  # and it closes

        server = await listen(str(tmp_path / "s"), serve)
        channel = await connect(f"unix:{tmp_path}/s")
        await gone.wait()
        for number in range(50):
            channel.send(envelope(number))
            await asyncio.sleep(0.001)
        assert [message async for message in channel] == []
        channel.send(envelope(0))
        channel.close()
        channel.send(envelope(0))
        server.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())
