"""`minidisagg generate` and `minidisagg chat`: one front end on one event loop, which Ctrl-C cancels cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence

import click
import msgspec

from minidisagg.core.messages import SamplingParams
from minidisagg.model.loader import cache_dir
from minidisagg.model.pull import ensure
from minidisagg.model.tokenizer import Tokenizer
from minidisagg.options import Engine
from minidisagg.runtime.frontend import Frontend
from minidisagg.runtime.llm import GenerationError, Output, complete
from minidisagg.starting import StartBars

HELP = """\
/reset        forget the conversation
/system TEXT  tell the model this before a new conversation; without TEXT, nothing
/help         this list
/exit         leave, as does Ctrl-D; Ctrl-C stops an answer"""


@contextlib.asynccontextmanager
async def started(engine: Engine) -> AsyncIterator[tuple[Frontend, Tokenizer]]:
    """A running cluster and the model's tokenizer; a person at a terminal sees that it is being started."""
    ensure(engine.model.model, lambda line: click.echo(line, err=True))
    tokenizer = Tokenizer.load(engine.model.model)
    with StartBars() as bars:
        frontend = await Frontend.start(*engine, on_starting=bars.tell)
    async with frontend:
        yield frontend, tokenizer


def write(text: str) -> None:
    """A piece of an answer, at once."""
    click.echo(text, nl=False)


# ---------------------------------------------------------------- generate


def run_generate(engine: Engine, prompts: Sequence[str], sampling: SamplingParams, as_json: bool) -> None:
    """Complete `prompts`; a single one is written as it comes."""
    asyncio.run(_generate(engine, prompts, sampling, as_json))


async def _generate(engine: Engine, prompts: Sequence[str], sampling: SamplingParams, as_json: bool) -> None:
    async with started(engine) as (frontend, tokenizer):
        if len(prompts) == 1 and not as_json:
            await complete(frontend, tokenizer, prompts[0], sampling, write)
            click.echo()
            return
        outputs = await asyncio.gather(*(complete(frontend, tokenizer, prompt, sampling) for prompt in prompts))
        for prompt, output in zip(prompts, outputs, strict=True):
            if as_json:
                click.echo(_as_json(prompt, output))
            else:
                click.echo(click.style(prompt, bold=True) + output.text + "\n")


def _as_json(prompt: str, output: Output) -> bytes:
    """UTF-8, as JSON is, whatever the terminal's encoding."""
    return msgspec.json.encode(
        {
            "prompt": prompt,
            "text": output.text,
            "token_ids": output.token_ids,
            "finish_reason": output.finish_reason,
            "usage": {"prompt_tokens": len(output.prompt_token_ids), "completion_tokens": len(output.token_ids)},
            "metrics": output.times,
        }
    )


# ---------------------------------------------------------------- chat


def run_chat(engine: Engine, sampling: SamplingParams, system: str) -> None:
    """Talk until Ctrl-D or the end of stdin."""
    try:
        asyncio.run(_chat(engine, sampling, system))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def _chat(engine: Engine, sampling: SamplingParams, system: str) -> None:
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGHUP):  # they end the chat, where Ctrl-C ends an answer
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    async with started(engine) as (frontend, tokenizer):
        chat = Chat(frontend, tokenizer, sampling, system)
        if interactive:
            click.secho(f"{engine.model.model}, {engine.cluster.mode}. /help lists the commands.", dim=True, err=True)
        async for line in _typed_lines() if interactive else _piped_lines():
            command, _, rest = line.strip().partition(" ")
            if command in ("/exit", "/quit"):
                return
            if command in ("/reset", "/system"):
                chat.reset(rest.strip() if command == "/system" else chat.system)
            elif command.startswith("/"):
                click.secho(
                    HELP if command == "/help" else f"there is no command {command}\n{HELP}", dim=True, err=True
                )
            elif command:
                try:
                    await chat.answer(line, interactive)
                except (ValueError, GenerationError) as error:
                    if not interactive:
                        raise
                    click.secho(f"{error}; /reset starts anew", fg="red", err=True)


class Chat:
    """A conversation; the whole of it is the prompt of each turn, of which the prefix cache has all but the last."""

    def __init__(self, frontend: Frontend, tokenizer: Tokenizer, sampling: SamplingParams, system: str) -> None:
        self.frontend, self.tokenizer, self.sampling = frontend, tokenizer, sampling
        self.reset(system)

    def reset(self, system: str) -> None:
        """Begin again, with this system message (none where it is empty)."""
        self.system, self.session = system, uuid.uuid4().hex
        self.messages = [{"role": "system", "content": system}] if system else []

    async def answer(self, text: str, interruptible: bool) -> None:
        """Write the model's answer as it comes. Interrupted, it stays in the conversation as far as it got.

        Raises `ValueError` where the conversation has become too long; then this turn is not part of it.
        """
        turn = [*self.messages, {"role": "user", "content": text}]
        ids = self.tokenizer.encode(self.tokenizer.apply_chat_template(turn), add_special_tokens=False)
        room = self.frontend.max_model_len - len(ids)
        sampling = msgspec.structs.replace(self.sampling, max_tokens=max(1, min(self.sampling.max_tokens, room)))
        pieces: list[str] = []
        sent, first = time.monotonic(), 0.0

        def on_text(piece: str) -> None:
            nonlocal first
            first = first or time.monotonic()
            pieces.append(piece)
            write(piece)

        work = asyncio.ensure_future(complete(self.frontend, self.tokenizer, ids, sampling, on_text, self.session))
        with _ctrl_c_cancels(work) if interruptible else contextlib.nullcontext():
            await asyncio.wait([work])
        click.echo()
        if not work.cancelled():
            output = work.result()
            rate = (len(output.token_ids) - 1) / max(1e-9, time.monotonic() - first)
            if first:
                click.secho(
                    f"{(first - sent) * 1000:.0f} ms to the first token, {rate:.0f} tokens/s", dim=True, err=True
                )
        self.messages = [*turn, {"role": "assistant", "content": "".join(pieces)}]


@contextlib.contextmanager
def _ctrl_c_cancels(work: asyncio.Future[Output]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    before = signal.signal(signal.SIGINT, lambda *_: loop.call_soon_threadsafe(work.cancel))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


async def _typed_lines() -> AsyncIterator[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory

    cache_dir().mkdir(parents=True, exist_ok=True)
    session: PromptSession[str] = PromptSession(history=FileHistory(str(cache_dir() / "chat_history")))
    while True:
        try:
            yield await session.prompt_async("> ")
        except KeyboardInterrupt:
            continue  # it clears the line, as in a shell
        except EOFError:
            return


async def _piped_lines() -> AsyncIterator[str]:
    """Lines of stdin, from a thread that need not end: `sys.stdin` could be neither interrupted nor left at exit."""
    loop = asyncio.get_running_loop()
    lines: asyncio.Queue[str] = asyncio.Queue()

    def read() -> None:
        with open(0, encoding="utf-8", errors="replace", closefd=False) as stdin, contextlib.suppress(RuntimeError):
            while line := stdin.readline():
                loop.call_soon_threadsafe(lines.put_nowait, line)
            loop.call_soon_threadsafe(lines.put_nowait, "")  # the end; RuntimeError: the loop is closed already

    threading.Thread(target=read, daemon=True).start()
    while line := await lines.get():
        yield line
