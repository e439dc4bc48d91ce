"""How the sides of a comparison are written, for `bench` and `simulate` alike."""

from __future__ import annotations

from typing import NamedTuple

from minidisagg.config import MODES


class SideName(NamedTuple):
    """A mode, empty where the cluster is to be as it is, and a policy."""

    mode: str
    policy: str


def parse_compare(text: str) -> list[SideName]:
    """`colocated:sarathi:chunk=512,disagg,./mine.py:Mine`: MODE, POLICY or MODE:POLICY. Raises `ValueError`.

    A setting of a policy may follow a comma, too: what looks like KEY=VALUE belongs to the side before it.
    """
    parts: list[str] = []
    for part in text.split(","):
        key, equals, _ = part.partition("=")
        if parts and equals and key.strip().isidentifier():
            parts[-1] += f",{part}"
        elif part.strip():
            parts.append(part.strip())
        else:
            raise ValueError(f"--compare {text!r}: a side is empty")
    sides = []
    for part in parts:
        mode, _, policy = part.partition(":")
        sides.append(SideName(mode, policy or "fcfs") if mode in MODES else SideName("", part))
    return sides


def short(policy: str) -> str:
    """A policy's name in tables: of one in a file, its class and settings."""
    return policy.partition(".py:")[2] or policy


def numbered(labels: list[str]) -> list[str]:
    """The same, told apart where some are alike."""
    return [f"{label} {n}" if labels.count(label) > 1 else label for n, label in enumerate(labels, 1)]
