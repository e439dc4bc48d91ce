"""What arrives: one `WorkItem` per request, with its lengths and, on demand, its prompt.

An item from a generator or a trace carries lengths only; `prompt_tokens` makes its prompt when somebody needs one. A
simulation of a trace with 10^8 prompt tokens therefore never builds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from minidisagg.workload.arrivals import arrival_times, keyed_random
from minidisagg.workload.corpus import PASSAGES, QUESTIONS

Encode = Callable[[str], list[int]]
PIECE = 40, 2600  # least and most characters of a prompt that is a piece of a text
CHARS_PER_TOKEN = 4  # English under a 50k byte-pair vocabulary; used only where no tokenizer is at hand


class WorkItem(Struct, frozen=True, kw_only=True):
    """One request of a workload: `output_len` tokens asked for, at `arrival_s` seconds after the start.

    `blocks` are a trace's names for consecutive pieces of `block_size` prompt tokens (the last one may be partial):
    equal names mean equal tokens, so they stand for the prefix sharing of the trace without the tokens.

    A later turn of a session (`turn` > 0) follows the turn before in the workload, and comes `think_s` seconds after
    that one's last token. Its `prompt_len` counts the whole prompt, its `prompt` has only what is new: see
    `workload/multiturn.py`.
    """

    index: int
    prompt_len: int
    output_len: int
    arrival_s: float = 0.0
    prompt: list[int] | None = None
    prompt_text: str | None = None
    blocks: tuple[int, ...] = ()
    block_size: int = 0
    salt: str = ""  # separates prefix caches of different tenants
    session: str = ""
    turn: int = 0  # in its session
    think_s: float = 0.0
    new_len: int = 0  # tokens that the user of a session adds; 0: it is no turn of one
    system_len: int = 0  # of a first turn: tokens before these, which all sessions share


def random_items(
    count: int, input_len: int, output_len: int, range_ratio: float = 0.0, seed: int = 0
) -> list[WorkItem]:
    """`--dataset-name random`: lengths uniform in [(1 - r) · len, (1 + r) · len], as in vLLM. Raises ValueError."""
    if input_len < 1 or output_len < 1:
        raise ValueError(f"random lengths must be at least 1, not {input_len} in and {output_len} out")
    if not 0.0 <= range_ratio < 1.0:
        raise ValueError(f"random range ratio must be in [0, 1), not {range_ratio}")
    items = []
    for index in range(count):
        rng = keyed_random("lengths", seed, index)

        def draw(mean: int, uniform: Callable[[int, int], int] = rng.randint) -> int:
            return max(1, uniform(math.floor(mean * (1 - range_ratio)), math.ceil(mean * (1 + range_ratio))))

        items.append(WorkItem(index=index, prompt_len=draw(input_len), output_len=draw(output_len)))
    return items


def text_items(
    count: int, output_len: int, encode: Encode | None = None, seed: int = 0, path: str = ""
) -> list[WorkItem]:
    """`--dataset-name text`: English prompts of some 10 to 650 tokens, a question alone or after some passages.

    With `path`, whatever language that text is in: from a random paragraph on, to be gone on with. With `encode` (a
    tokenizer) the token ids are filled in, else `prompt_len` is an estimate. Raises ValueError for an empty file.
    """
    items = []
    paragraphs = _paragraphs(Path(path)) if path else []
    for index in range(count):
        rng = keyed_random("text", seed, index)
        if path:
            begin, length = rng.randrange(len(paragraphs)), rng.randint(*PIECE)
            text = "\n\n".join(paragraphs[begin : begin + length])[:length].rstrip()  # none is empty
        else:
            passages = rng.sample(PASSAGES, k=index % 6)  # every run of six has short and long prompts
            text = "\n\n".join([*passages, rng.choice(QUESTIONS)])
        prompt, prompt_len = encoded(text, encode)
        items.append(
            WorkItem(index=index, prompt_len=prompt_len, output_len=output_len, prompt=prompt, prompt_text=text)
        )
    return items


def _paragraphs(path: Path) -> list[str]:
    """Of a text, each on one line."""
    try:
        parts = [" ".join(part.split()) for part in path.read_text(encoding="utf-8").split("\n\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8 ({error.reason} at byte {error.start})") from None
    if not any(parts):
        raise ValueError(f"{path}: no text")
    return [part for part in parts if part]


def encoded(text: str, encode: Encode | None) -> tuple[list[int] | None, int]:
    """Token ids and their number; without a tokenizer no ids, and an estimate."""
    if encode is None:
        return None, max(1, len(text) // CHARS_PER_TOKEN)
    ids = encode(text)
    return ids, len(ids)


def prompt_tokens(item: WorkItem, vocab_size: int, seed: int = 0) -> list[int]:
    """The item's prompt, `prompt_len` token ids below `vocab_size`.

    Depends on (seed, index) only, or on (seed, block names) where the item has blocks: two items that share a block
    name share its tokens. A shorter item of the same index has a prefix of the longer one's prompt. Of a session's turn
    it is what its user adds, after the system prompt if it is the first, and depends on (seed, session, turn) only.
    """
    if item.prompt is not None:
        return item.prompt
    if item.new_len:
        system = _random_tokens(item.system_len, vocab_size, "system", seed)
        return system + _random_tokens(item.new_len, vocab_size, "words", seed, item.session, item.turn)
    if not item.blocks:
        return _random_tokens(item.prompt_len, vocab_size, "prompt", seed, item.index)
    tokens: list[int] = []
    for block in item.blocks:
        count = min(item.block_size, item.prompt_len - len(tokens))
        tokens += _random_tokens(count, vocab_size, "block", seed, block)
    return tokens


def with_prompts(items: Iterable[WorkItem], vocab_size: int, seed: int = 0) -> list[WorkItem]:
    """The items with `prompt` filled in."""
    return [replace(item, prompt=prompt_tokens(item, vocab_size, seed)) for item in items]


def with_arrivals(items: Sequence[WorkItem], times: Sequence[float]) -> list[WorkItem]:
    """The items at these times, for data sets that have none."""
    return [replace(item, arrival_s=t) for item, t in zip(items, times, strict=True)]


def at_rate(items: Sequence[WorkItem], request_rate: float, burstiness: float = 1.0, seed: int = 0) -> list[WorkItem]:
    """The items in an open loop of so many requests per second, as `arrival_times` says.

    Later turns of sessions count as requests, but have no times of their own: sessions begin at as much less than this
    rate as they have turns.
    """
    firsts = [item for item in items if not item.turn]
    rate = request_rate * (len(firsts) / max(1, len(items)))  # of sessions of one turn it is the same to the last bit
    times = iter(arrival_times(len(firsts), rate, burstiness, seed))
    return [item if item.turn else replace(item, arrival_s=next(times)) for item in items]


def _random_tokens(count: int, vocab_size: int, *key: int | str) -> list[int]:
    draw = keyed_random(*key).random  # the one method whose sequence Python guarantees across versions
    return [int(draw() * vocab_size) for _ in range(count)]
