"""Recorded workloads: Azure, Mooncake and BurstGPT traces, and ShareGPT conversations.

Every loader yields raw rows; `load_trace` then scales, clamps, sorts and counts, in one place. Files:

- azure: CSV, `TIMESTAMP,ContextTokens,GeneratedTokens` (Splitwise, Patel et al. 2024) or
  `arrived_at,num_prefill_tokens,num_decode_tokens` (seconds; vidur's form of the same traces)
- mooncake: JSON lines of `timestamp` (ms), `input_length`, `output_length`, `hash_ids` (Qin et al. 2025)
- burstgpt: CSV with `Timestamp` (s), `Request tokens`, `Response tokens` (Wang et al. 2024)
- sharegpt: JSON list of `conversations`; the first two turns are prompt and answer; it has no arrival times
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from minidisagg.workload.lengths import Encode, WorkItem, encoded

MOONCAKE_BLOCK = 512  # tokens named by one hash id
MIN_TURN_TOKENS = 4  # ShareGPT turns under this are noise; vLLM leaves them out too


class TraceReport(Struct, frozen=True):
    """What became of a file's requests: `used` of them are in the workload, `clamped` of these were shortened."""

    used: int
    skipped: int
    clamped: int
    duration_s: float

    def __str__(self) -> str:
        return f"{self.used} requests over {self.duration_s:.1f} s, {self.skipped} skipped, {self.clamped} clamped"


class _Row(Struct, frozen=True):
    """One request as the file has it; `arrival_s` counts from any origin."""

    arrival_s: float
    prompt_len: int
    output_len: int
    blocks: tuple[int, ...] = ()
    session: str = ""
    prompt: list[int] | None = None
    text: str | None = None


def load_trace(
    kind: str,
    path: str | Path,
    *,
    count: int | None = None,
    speedup: float = 1.0,
    scale_len: float = 1.0,
    max_model_len: int | None = None,
    encode: Encode | None = None,
) -> tuple[list[WorkItem], TraceReport]:
    """The first `count` usable requests of a trace, by arrival, the first of them at 0.

    `speedup` divides all times, `scale_len` multiplies all lengths (shared blocks shrink with them, so the share of
    reused prompt tokens stays). Where prompt and output exceed `max_model_len`, the output is cut first, to no less
    than half of it, then the prompt. Requests without prompt or output tokens (failures in the log) are skipped.
    Raises ValueError, one line with file and line number, and OSError.
    """
    if kind not in _READERS:
        raise ValueError(f"unknown trace kind {kind!r}, choose from {', '.join(sorted(_READERS))}")
    if not (speedup > 0 and scale_len > 0):
        raise ValueError(f"trace speedup and length scale must be positive, not {speedup} and {scale_len}")
    if max_model_len is not None and max_model_len < 2:
        raise ValueError(f"max model length must be at least 2, not {max_model_len}")
    rows = list(_READERS[kind](Path(path), encode))
    usable = sorted((row for row in rows if row.prompt_len > 0 and row.output_len > 0), key=lambda row: row.arrival_s)
    if not usable:
        raise ValueError(f"{path}: no requests with prompt and output tokens")
    skipped = len(rows) - len(usable)
    block_size = max(1, round(MOONCAKE_BLOCK * scale_len))
    items, clamped = [], 0
    for index, row in enumerate(usable[:count]):
        item = _item(index, row, (row.arrival_s - usable[0].arrival_s) / speedup, scale_len, block_size)
        fitted = _clamp(item, max_model_len)
        clamped += fitted is not item
        items.append(fitted)
    duration = items[-1].arrival_s if items else 0.0
    return items, TraceReport(used=len(items), skipped=skipped, clamped=clamped, duration_s=duration)


def _item(index: int, row: _Row, arrival_s: float, scale_len: float, block_size: int) -> WorkItem:
    item = WorkItem(
        index=index,
        arrival_s=arrival_s,
        prompt_len=row.prompt_len,
        output_len=row.output_len,
        prompt=row.prompt,
        prompt_text=row.text,
        blocks=row.blocks,
        block_size=block_size if row.blocks else 0,
        session=row.session,
    )
    prompt_len = max(1, round(row.prompt_len * scale_len))
    if row.blocks:  # rounding the block size must not leave tokens without a block
        prompt_len = min(prompt_len, len(row.blocks) * block_size)
    return _cut(item, prompt_len, max(1, round(row.output_len * scale_len)))


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


class _MooncakeLine(Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def _read_mooncake(path: Path, encode: Encode | None) -> Iterator[_Row]:
    decoder = msgspec.json.Decoder(_MooncakeLine)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = decoder.decode(line)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise ValueError(f"{path}:{number}: not a Mooncake request: {error}") from None
            if len(row.hash_ids) != -(-row.input_length // MOONCAKE_BLOCK):
                raise ValueError(f"{path}:{number}: {len(row.hash_ids)} hash ids for {row.input_length} tokens")
            yield _Row(row.timestamp / 1000, row.input_length, row.output_length, row.hash_ids)


def _read_azure(path: Path, encode: Encode | None) -> Iterator[_Row]:
    azure = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    vidur = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")
    return _read_csv(path, [azure, vidur])


def _read_burstgpt(path: Path, encode: Encode | None) -> Iterator[_Row]:
    return _read_csv(path, [("Timestamp", "Request tokens", "Response tokens")], session="Session ID")


def _read_csv(path: Path, headers: list[tuple[str, str, str]], session: str = "") -> Iterator[_Row]:
    """Rows of a CSV file that has the columns (time, prompt tokens, output tokens) under one of these names."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            columns = next((names for names in headers if set(names) <= set(reader.fieldnames or ())), None)
            if columns is None:
                wanted = " or ".join(",".join(names) for names in headers)
                raise ValueError(f"{path}:1: header must have {wanted}")
            for row in reader:
                time, prompt, output = (row[name] for name in columns)
                try:
                    if min(prompt_len := int(prompt), output_len := int(output)) < 0:
                        raise ValueError(f"negative length in {prompt},{output}")
                    yield _Row(_seconds(time), prompt_len, output_len, session=row.get(session) or "")
                except (ValueError, TypeError) as error:  # TypeError: too few columns give None
                    raise ValueError(f"{path}:{reader.line_num}: bad row: {error}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a CSV file: {error}") from None


def _seconds(text: str) -> float:
    """Seconds as a number, or a date and time (Azure's have seven digits after the point)."""
    try:
        return float(text)
    except ValueError:
        return (datetime.fromisoformat(text).replace(tzinfo=None) - datetime(2000, 1, 1)).total_seconds()


def _read_sharegpt(path: Path, encode: Encode | None) -> Iterator[_Row]:
    try:
        conversations = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None
    if not isinstance(conversations, list):
        raise ValueError(f"{path}:1: not a list of conversations")
    for number, entry in enumerate(conversations, 1):
        try:
            turns = [str(turn["value"]) for turn in entry["conversations"][:2]]
        except (KeyError, TypeError):
            raise ValueError(f"{path}: conversation {number} has no `conversations` list of `value`s") from None
        if len(turns) < 2:
            yield _Row(0.0, 0, 0)  # nothing to answer: counted as skipped
            continue
        prompt, prompt_len = encoded(turns[0], encode)
        _, output_len = encoded(turns[1], encode)
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
