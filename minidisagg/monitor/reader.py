"""Keys of a terminal, on the running event loop."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum

from prompt_toolkit.input import create_input
from prompt_toolkit.key_binding import KeyPress

ESCAPE = 0.05  # seconds after which an escape is the key, not the start of a sequence


@contextmanager
def reading_keys(on_key: Callable[[str], None], on_end: Callable[[], None]) -> Iterator[None]:
    """Takes stdin; `on_key` gets a character, or prompt_toolkit's name of it. `on_end`: there will be no more."""
    loop, source = asyncio.get_running_loop(), create_input(sys.stdin)

    def tell(keys: Iterable[KeyPress]) -> None:
        for key in keys:
            on_key(key.key.value if isinstance(key.key, Enum) else key.key)

    def on_input() -> None:
        keys = source.read_keys()
        if source.closed:
            on_end()
        loop.call_later(ESCAPE, lambda: tell(source.flush_keys()))
        tell(keys)

    with source.raw_mode(), source.attach(on_input):
        yield
