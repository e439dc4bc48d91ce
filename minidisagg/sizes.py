"""Sizes in bytes, as people write them."""

from __future__ import annotations

UNITS = {"k": 10, "m": 20, "g": 30, "t": 40}


def parse_size(text: str) -> int:
    """ "512M", "1.5GiB", "4096" → bytes."""
    digits = text.strip().lower().removesuffix("b").removesuffix("i")
    unit = UNITS.get(digits[-1:], 0)
    try:
        size = int(float(digits[:-1] if unit else digits) * (1 << unit))
    except ValueError:
        raise ValueError(f"{text!r} is not a size; write 512M or 1.5GiB") from None
    if size <= 0:
        raise ValueError(f"a size must be positive, not {text!r}")
    return size
