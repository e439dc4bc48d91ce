"""Profiles: what a step of one model costs on one kind of device, as tables of measured seconds.

    load_profile("h100_sxm", "llama-8b").step_seconds([(0, 2048)], decode_seqs=32, decode_context=32 * 1000)

A file is a JSON list of profiles, plain or gzipped. Those of `profiles/` ship; `scripts/convert_profiles.py` made them,
and `profiles/NOTICE.md` says from whose measurements. A step is a sum of independent parts:

    constant + linear(tokens) + head(sampled rows) + prefill attention of each prompt + decode attention of the rest

Between the points of a table seconds are linear; below the first they are the first one's, beyond the last they grow in
proportion. Tables that only grow therefore give costs that only grow.
"""

from __future__ import annotations

import gzip
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from math import fsum
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
from msgspec import Struct

SHIPPED = Path(__file__).parent / "profiles"
SUFFIXES = (".json", ".json.gz")
T = TypeVar("T")
# Of a decode step: seconds but for attention; that as pieces of a line over the SUM of contexts: ends, offsets, slopes.
DecodeRow = tuple[float, list[int], list[float], list[float]]


class Key(Struct, frozen=True, kw_only=True):
    """What tells the profiles of one device apart; all that is decoded where they are only listed."""

    model: str
    dtype: str
    tensor_parallel: int  # devices that share each layer; a profile is of all of them together

    def __str__(self) -> str:
        return f"{self.model} {self.dtype} tp{self.tensor_parallel}"


class Curve(Struct, frozen=True):
    """Seconds at some points, both ascending and of one length."""

    points: list[int]
    seconds: list[float]

    def at(self, x: float) -> float:
        """Seconds at x."""
        return interpolate(self.points, self.seconds, x)


class Grid(Struct, frozen=True):
    """Seconds over two ascending axes: `seconds[row][column]`."""

    rows: list[int]
    columns: list[int]
    seconds: list[list[float]]

    def at(self, row: float, column: float) -> float:
        """Seconds there, bilinear."""
        rows, lines = self.rows, self.seconds
        i = bisect_right(rows, row)
        low = interpolate(self.columns, lines[max(i - 1, 0)], column)
        if 0 < i < len(rows):
            high = interpolate(self.columns, lines[i], column)
            return low + (high - low) * (row - rows[i - 1]) / (rows[i] - rows[i - 1])
        return low * (row / rows[-1]) if row > rows[-1] else low


class Profile(Key, frozen=True, kw_only=True, dict=True):
    """The cost of a step of one model on `tensor_parallel` devices. Seconds are of all layers."""

    version: Literal[1]
    name: str  # of the device: "h100_sxm"
    source: str  # what was measured, by whom, with which engine
    licence: str
    constant: float  # seconds per step that no table explains
    linear: Curve  # over tokens: all that depends on their number alone (GEMMs, MoE, all-reduces, launching attention)
    head: Curve  # over sampled rows: the LM head
    head_of_last: bool = False  # of a prompt only its last chunk has one, as in this engine; in others each has
    prefill_attention: Grid  # of one prompt chunk, beyond launching it: [tokens in the cache][new tokens]
    decode_attention: Grid  # of all sequences, beyond launching it: [sequences][tokens in the cache of each]
    prefill_floor: float = 0.0  # least seconds of a step with a prompt, where launching its kernels takes longer
    residuals: list[float] = []  # measured step times over predicted ones
    prompt_residuals: list[float] = []  # of steps with a prompt, where those are told apart: decodes scatter otherwise
    num_layers: int
    kv_bytes_per_token: int  # of all devices together, as are the weights
    weight_bytes: int
    memory_bytes: int  # of one device

    def step_seconds(
        self, prefill: Sequence[tuple[int, int]], decode_seqs: int, decode_context: int, last: int | None = None
    ) -> float:
        """Duration of a step.

        `prefill` has (tokens in the cache, new tokens) of each prompt chunk, so many of which are the `last` of their
        prompts (all, unless said); `decode_context` is the sum of the decode sequences' contexts.
        """
        seconds = attention = 0.0
        if decode_seqs:
            seconds, ends, offsets, slopes = self._decode_row(decode_seqs)
            i = bisect_right(ends, decode_context)
            attention = offsets[i] + slopes[i] * decode_context
        if prefill:
            rows = len(prefill) if last is None or not self.head_of_last else last
            seconds = self._dense(decode_seqs + sum(new for _, new in prefill), decode_seqs + rows)
            seconds += fsum(self.prefill_attention.at(past, new) for past, new in prefill)
            seconds = max(seconds, self.prefill_floor)
        return seconds + attention

    def decode_seconds(self, seqs: int, context: int, steps: int) -> list[float]:
        """Durations of consecutive steps of the same decode sequences: the i-th is, to the last bit,
        `step_seconds((), seqs, context + i * seqs)`."""
        dense, ends, offsets, slopes = self._decode_row(seqs)
        contexts = range(context, context + steps * seqs, seqs)
        seconds: list[float] = []
        while len(seconds) < steps:  # one piece of the line after the other
            begin = len(seconds)
            i = bisect_right(ends, contexts[begin])
            stop = -((context - ends[i]) // seqs) if i < len(ends) else steps
            offset, slope = offsets[i], slopes[i]
            seconds += [dense + (offset + slope * total) for total in contexts[begin:stop]]
        return seconds

    def pages(self, page_size: int, utilization: float = 0.9) -> int:
        """KV pages of `page_size` tokens that fit beside the weights into this share of the devices' memory."""
        room = self.memory_bytes * self.tensor_parallel * utilization - self.weight_bytes
        pages = int(room // (self.kv_bytes_per_token * page_size))
        if pages < 1:
            raise ValueError(
                f"{self} needs {self.weight_bytes / 1e9:.1f} GB for its weights, and {utilization:.0%} of "
                f"{self.tensor_parallel} x {self.name} leaves no page beside them"
            )
        return pages

    def _dense(self, tokens: int, rows: int) -> float:
        """Seconds of all but attention."""
        return self.constant + self.linear.at(tokens) + (self.head.at(rows) if rows else 0.0)

    def _decode_row(self, seqs: int) -> DecodeRow:
        """What so many sequences cost. Cached: a simulation asks for the same few numbers of them again and again."""
        row = self._decode_rows.get(seqs)
        if row is None:
            grid = self.decode_attention
            ends = [context * seqs for context in grid.columns]
            seconds = [interpolate(grid.rows, column, seqs) for column in zip(*grid.seconds, strict=True)]
            slopes = [0.0]
            for i in range(1, len(ends)):
                slopes.append((seconds[i] - seconds[i - 1]) / (ends[i] - ends[i - 1]))
            slopes.append(seconds[-1] / ends[-1])
            offsets = [s - slope * end for s, slope, end in zip(seconds, slopes, ends, strict=False)]
            row = self._decode_rows[seqs] = self._dense(seqs, seqs), ends, [*offsets, 0.0], slopes
        return row

    @cached_property
    def _decode_rows(self) -> dict[int, DecodeRow]:
        return {}


def interpolate(points: Sequence[int], seconds: Sequence[float], x: float) -> float:
    """Seconds at x: linear between the points, clamped below the first, proportional beyond the last."""
    i = bisect_right(points, x)
    if i == 0:
        return seconds[0]
    low = seconds[i - 1]
    if x == points[i - 1]:
        return low
    if i == len(points):
        return low * (x / points[-1])
    return low + (seconds[i] - low) * (x - points[i - 1]) / (points[i] - points[i - 1])


def load_profile(device: str, model: str, dtype: str = "bfloat16", tensor_parallel: int = 1) -> Profile:
    """The profile of a model on a shipped device, or in the file named there; ValueError lists what there is."""
    profiles = _read(device, list[Profile])
    wanted = Key(model=model, dtype=dtype, tensor_parallel=tensor_parallel)
    for profile in profiles:
        if str(profile) == str(wanted):
            return profile
    there: dict[str, list[str]] = {}
    for profile in profiles:
        there.setdefault(profile.model, []).append(str(profile).removeprefix(profile.model).strip())
    listed = "; ".join(f"{name} ({', '.join(kinds)})" for name, kinds in there.items())
    raise ValueError(f"{device} has no profile of {wanted}; there are {listed}")


def names() -> list[str]:
    """All that ship: "h100_sxm llama-8b bfloat16 tp1"."""
    return [f"{device} {key}" for device in devices() for key in _read(device, list[Key])]


def devices() -> list[str]:
    """The devices with shipped profiles."""
    return sorted(path.name.removesuffix(".json.gz") for path in SHIPPED.glob("*.json.gz"))


def _read(device: str, kind: type[T]) -> T:
    """A file of profiles, as far as `kind` wants to know."""
    shipped = not device.endswith(SUFFIXES)
    path = SHIPPED / f"{device}.json.gz" if shipped else Path(device)
    try:
        data = path.read_bytes()
        return msgspec.json.decode(gzip.decompress(data) if path.suffix == ".gz" else data, type=kind)
    except FileNotFoundError:
        raise ValueError(
            f"no profiles of {device!r}; there are {', '.join(devices())}, or name a {' or '.join(SUFFIXES)} file"
        ) from None
    except (OSError, EOFError, msgspec.MsgspecError) as error:
        raise ValueError(f"{path}: {error}; a profile is a file that `minidisagg profile` writes") from error
