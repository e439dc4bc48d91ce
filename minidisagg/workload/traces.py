"""Recorded workloads: Azure, Mooncake and BurstGPT traces, and ShareGPT conversations.

Every loader yields raw rows; `load_trace` then scales, clamps, sorts and counts, in one place. Files:

- azure: CSV, `TIMESTAMP,ContextTokens,GeneratedTokens` (Splitwise, Patel et al. 2024) or
  `arrived_at,num_prefill_tokens,num_decode_tokens` (seconds; vidur's form of the same traces)
- mooncake: JSON lines of `timestamp` (ms), `input_length`, `output_length`, `hash_ids` (Qin et al. 2025; without
  `hash_ids` a request shares its prefix with no other)
- burstgpt: CSV with `Timestamp` (s), `Request tokens`, `Response tokens` (Wang et al. 2024)
- sharegpt: JSON list of `conversations`; the first two turns are prompt and answer; it has no arrival times

A workload is measured for minutes before anybody looks at it, so that what cannot be meant is refused when it is read:
a time that is no finite number, half a token, a date with an offset between dates without.
"""

from __future__ import annotations

import codecs
import csv
import heapq
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from minidisagg.workload.lengths import Encode, WorkItem, encoded

MOONCAKE_BLOCK = 512  # tokens named by one hash id
MIN_TURN_TOKENS = 4  # ShareGPT turns under this are noise; vLLM leaves them out too
MAX_TOKENS = 1 << 31  # of a prompt or an output
MAX_SECONDS = 1e10  # three centuries; up to here a float tells microseconds apart


class TraceReport(Struct, frozen=True):
    """What became of a file's requests: `used` of them are in the workload, `clamped` of these were shortened.

    `duration_s`: by its own times; 0: they are not used. `windows`: that the file has, where the one that was asked for
    lies beyond them and is one of them again; else 0. `unshared`: of a Mooncake trace, those that name no blocks.
    """

    used: int
    skipped: int
    clamped: int
    duration_s: float
    windows: int = 0
    unshared: int = 0

    def __str__(self) -> str:
        over = f" over {self.duration_s:.1f} s" if self.duration_s else ""
        lacking = f", {self.unshared} without hash_ids" if self.unshared else ""
        return f"{self.used} requests{over}, {self.skipped} skipped, {self.clamped} clamped{lacking}"

    @property
    def marks(self) -> list[str]:
        """What limits the use of a repetition that has this window."""
        of = f"{self.windows} repetition{'s' * (self.windows > 1)}"
        return [f"the trace has requests for {of}, and those after have the same ones again"] if self.windows else []


class _Row(Struct, frozen=True):
    """One request as the file has it; `arrival_s` counts from any origin."""

    arrival_s: float
    prompt_len: int
    output_len: int
    blocks: tuple[int, ...] = ()
    prompt: list[int] | None = None
    text: str | None = None


def load_trace(
    kind: str,
    path: str | Path,
    *,
    count: int | None = None,
    window: int = 0,
    speedup: float = 1.0,
    scale_len: float = 1.0,
    max_model_len: int | None = None,
    encode: Encode | None = None,
) -> tuple[list[WorkItem], TraceReport]:
    """The first `count` usable requests of a trace, by arrival, the first of them at 0; or after `window` times as many
    the next ones. Where the file ends before them, windows begin anew.

    `speedup` divides all times, `scale_len` multiplies all lengths (shared blocks shrink with them, so the share of
    reused prompt tokens stays). Where prompt and output exceed `max_model_len`, the output is cut first, to no less
    than half of it, then the prompt. Requests without prompt or output tokens (failures in the log) are skipped.
    Raises ValueError, one line with file and line number, and OSError.
    """
    if kind not in _READERS:
        raise ValueError(f"unknown trace kind {kind!r}, choose from {', '.join(sorted(_READERS))}")
    skipped, longest = 0, 0

    def usable() -> Iterator[_Row]:
        nonlocal skipped, longest
        for row in _READERS[kind](Path(path), encode):
            if row.prompt_len > 0 and row.output_len > 0:
                longest = max(longest, row.prompt_len, row.output_len)
                yield row
            else:
                skipped += 1

    # Of a file of millions of rows no more is kept than is wanted.
    most = None if count is None else count * (window + 1)
    rows = sorted(usable(), key=_arrival) if most is None else heapq.nsmallest(most, usable(), key=_arrival)
    windows = max(1, len(rows) // count) if count else 1  # of them, up to the one that is asked for
    rows = rows[window % windows * (count or 0) :][:count]
    if not longest:
        raise ValueError(f"{path}: no requests with prompt and output tokens")
    if longest * scale_len > MAX_TOKENS:
        raise ValueError(f"{path}: a length scale of {scale_len} makes requests of more than {MAX_TOKENS} tokens")
    items = [
        WorkItem(
            index=index, arrival_s=row.arrival_s - rows[0].arrival_s, prompt_len=row.prompt_len,
            output_len=row.output_len, prompt=row.prompt, prompt_text=row.text, blocks=row.blocks,
            block_size=MOONCAKE_BLOCK if row.blocks else 0,
        )
        for index, row in enumerate(rows)
    ]  # fmt: skip
    items, clamped = fitted(items, speedup, scale_len, max_model_len)
    duration = items[-1].arrival_s if items else 0.0
    if duration > MAX_SECONDS:
        raise ValueError(f"{path}: at a speedup of {speedup} the trace takes more than {MAX_SECONDS:.0e} s")
    again = windows if window >= windows else 0
    unshared = sum(not item.blocks for item in items) if kind == "mooncake" else 0
    return items, TraceReport(len(items), skipped, clamped, duration, again, unshared)


def fitted(
    items: Sequence[WorkItem], speedup: float = 1.0, scale_len: float = 1.0, max_model_len: int | None = None
) -> tuple[list[WorkItem], int]:
    """The items at another speed, of other lengths, and clamped, as `load_trace` says; and how many were clamped."""
    if not (0 < speedup < math.inf and 0 < scale_len < math.inf):
        raise ValueError(f"trace speedup and length scale must be positive, not {speedup} and {scale_len}")
    if max_model_len is not None and max_model_len < 2:
        raise ValueError(f"max model length must be at least 2, not {max_model_len}")
    scaled = [_scaled(item, speedup, scale_len) for item in items]
    clamped = [_clamp(item, max_model_len) for item in scaled]
    return clamped, sum(one is not other for one, other in zip(clamped, scaled, strict=True))


def _arrival(row: _Row) -> float:
    return row.arrival_s


def _scaled(item: WorkItem, speedup: float, scale_len: float) -> WorkItem:
    prompt_len = max(1, round(item.prompt_len * scale_len))
    block_size = max(1, round(item.block_size * scale_len)) if item.blocks else 0
    if item.blocks:  # rounding the block size must not leave tokens without a block
        prompt_len = min(prompt_len, len(item.blocks) * block_size)
    item = replace(item, arrival_s=item.arrival_s / speedup, block_size=block_size)
    return _cut(item, prompt_len, max(1, round(item.output_len * scale_len)))


def _clamp(item: WorkItem, max_model_len: int | None) -> WorkItem:
    if max_model_len is None or item.prompt_len + item.output_len <= max_model_len:
        return item
    output_len = min(item.output_len, max(max_model_len - item.prompt_len, max_model_len // 2))
    return _cut(item, min(item.prompt_len, max_model_len - output_len), output_len)


def _cut(item: WorkItem, prompt_len: int, output_len: int) -> WorkItem:
    """The item with at most these lengths, its prompt, text and blocks cut to match."""
    text = item.prompt_text
    if text is not None:
        prompt_len = min(prompt_len, item.prompt_len)  # real text cannot be stretched
        text = text[: len(text) * prompt_len // item.prompt_len]
    return replace(
        item,
        prompt_len=prompt_len,
        output_len=output_len,
        prompt=item.prompt[:prompt_len] if item.prompt is not None else None,
        prompt_text=text,
        blocks=item.blocks[: -(-prompt_len // item.block_size)] if item.blocks else (),
    )


# ---------------------------------------------------------------- readers

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)  # float() takes 1_0 and nan too


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _shown(value: object) -> str:
    """For an error: on one line, and not all of a megabyte."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _number(value: str | float) -> float:
    """Finite and not negative, from JSON or a CSV field. Raises ValueError."""
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        raise ValueError(f"{_shown(value)} is not a number")
    try:
        number = float(value)
    except OverflowError:  # of an int
        number = math.inf
    if not 0 <= number < math.inf:
        raise ValueError(f"{_shown(value)} is {'negative' if number < 0 else 'not finite'}")
    return number


def _tokens(value: str | float) -> int:
    """A number of tokens; 37.0 is one (pandas writes it so where a row of the column was empty). Raises ValueError."""
    number = _number(value)
    if not number.is_integer() or number > MAX_TOKENS:
        raise ValueError(f"{_shown(value)} is not a number of tokens")
    return int(number)


def _time(value: str | float) -> tuple[str, float]:
    """Seconds and what they are counted from: dates with an offset, dates without and numbers do not compare.

    Azure's dates have seven digits after the point.
    """
    if isinstance(value, float) or _NUMBER.fullmatch(value):
        origin, seconds = "in seconds", _number(value)
    else:
        try:
            date = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(f"{_shown(value)} is neither a date nor a finite number of seconds") from None
        origin = "a date without an offset" if date.tzinfo is None else "a date with an offset"
        epoch = datetime(2000, 1, 1, tzinfo=None if date.tzinfo is None else UTC)
        seconds = (date - epoch).total_seconds()
    if seconds > MAX_SECONDS and origin == "in seconds":
        raise ValueError(f"{_shown(value)} s are more than {MAX_SECONDS:.0e}")
    return origin, seconds


class _MooncakeLine(Struct):
    timestamp: float
    input_length: int | float
    output_length: int | float
    hash_ids: tuple[int, ...] | None = None


def _read_mooncake(path: Path, encode: Encode | None) -> Iterator[_Row]:
    decoder = msgspec.json.Decoder(_MooncakeLine)
    numbers: dict[int, int] = {}  # of the ids, which may be hashes of 64 bits, or negative
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = decoder.decode(line)
            _, arrival = _time(row.timestamp / 1000)
            prompt_len, output_len = _tokens(row.input_length), _tokens(row.output_length)
        except (ValueError, RecursionError) as error:  # msgspec's are ValueErrors
            raise ValueError(f"{path}:{number}: not a Mooncake request: {error}") from None
        blocks = tuple(numbers.setdefault(one, len(numbers)) for one in row.hash_ids or ())
        if row.hash_ids is not None and len(blocks) != -(-prompt_len // MOONCAKE_BLOCK):
            raise ValueError(f"{path}:{number}: {len(blocks)} hash ids for {prompt_len} tokens")
        yield _Row(arrival, prompt_len, output_len, blocks)


def _read_azure(path: Path, encode: Encode | None) -> Iterator[_Row]:
    azure = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    vidur = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")
    return _read_csv(path, [azure, vidur])


def _read_burstgpt(path: Path, encode: Encode | None) -> Iterator[_Row]:
    # What a session's turns share is not told. Without a session, nobody keeps KV for a next turn that cannot hit it.
    return _read_csv(path, [("Timestamp", "Request tokens", "Response tokens")])


def _text_lines(path: Path) -> Iterator[str]:
    for number, line in _lines(path):
        if b"\0" in line:
            raise ValueError(f"{path}:{number}: not a CSV file: it has a zero byte")
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8: {error.reason}") from None


def _read_csv(path: Path, headers: list[tuple[str, str, str]]) -> Iterator[_Row]:
    """Rows of a CSV file that has the columns (time, prompt tokens, output tokens) under one of these names."""
    reader = csv.reader(_text_lines(path), strict=True)
    try:
        header = next(reader, [])
        columns = next((names for names in headers if all(header.count(name) == 1 for name in names)), None)
        if columns is None:
            wanted = " or ".join(",".join(names) for names in headers)
            raise ValueError(f"{path}:1: header must have {wanted}")
        first = ""  # what the first row's time is counted from
        for fields in filter(None, reader):  # csv gives an empty line as no fields
            try:
                # A comma too many is not let pass: it may be a decimal one.
                if len(fields) < len(header) or any(fields[len(header) :]):
                    raise ValueError(f"{len(fields)} fields under a header of {len(header)}")
                row = {name: field.strip() for name, field in zip(header, fields, strict=False)}
                origin, arrival = _time(row[columns[0]])
                first = first or origin
                if origin != first:
                    raise ValueError(f"time is {origin}, but the first one {first}")
                prompt_len, output_len = _tokens(row[columns[1]]), _tokens(row[columns[2]])
            except ValueError as error:
                raise ValueError(f"{path}:{reader.line_num}: bad row: {error}") from None
            yield _Row(arrival, prompt_len, output_len)
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not a CSV file: {error}") from None


def _read_sharegpt(path: Path, encode: Encode | None) -> Iterator[_Row]:
    try:
        conversations = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, lists in lists without end
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(conversations, list):
        raise ValueError(f"{path}:1: not a list of conversations")
    for number, entry in enumerate(conversations, 1):
        try:
            turns = [turn["value"] for turn in entry["conversations"][:2]]
        except (LookupError, TypeError):
            turns = [None]
        if not all(isinstance(turn, str) for turn in turns):
            raise ValueError(f"{path}: conversation {number} has no `conversations` list of `value`s")
        if len(turns) < 2:
            yield _Row(0.0, 0, 0)  # nothing to answer: counted as skipped
            continue
        try:
            for turn in turns:
                turn.encode()
            prompt, prompt_len = encoded(turns[0], encode)
            _, output_len = encoded(turns[1], encode)
        except ValueError as error:  # half of a surrogate pair, where a text was cut
            raise ValueError(f"{path}: conversation {number}: {error}") from None
        if min(prompt_len, output_len) < MIN_TURN_TOKENS:
            yield _Row(0.0, 0, 0)
        else:
            yield _Row(0.0, prompt_len, output_len, prompt=prompt, text=turns[0])


_READERS: dict[str, Callable[[Path, Encode | None], Iterator[_Row]]] = {
    "azure": _read_azure,
    "mooncake": _read_mooncake,
    "burstgpt": _read_burstgpt,
    "sharegpt": _read_sharegpt,
}
