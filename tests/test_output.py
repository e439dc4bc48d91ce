"""From tokens to text: stop strings and `min_tokens`, against vLLM's rule written out naively."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minidisagg import SamplingParams
from minidisagg.core.tracked import Emit
from minidisagg.model.tokenizer import Tokenizer
from minidisagg.runtime.output import OutputProcessor, StopChecker

DUMMY = Tokenizer.load("dummy:tiny")


def as_vllm(pieces: list[str], stops: tuple[str, ...], min_tokens: int) -> tuple[str, int, bool]:
    """(text, tokens, stopped): after each token past the first `min_tokens`, what ends in that token's text is found.

    Where vLLM takes the first of the list that is found there, this takes the one that was complete first.
    """
    text = ""
    for count, piece in enumerate(pieces, 1):
        text += piece
        if count > min_tokens and piece:
            starts = [(text.find(stop, max(0, len(text) - len(piece) - len(stop) + 1)), len(stop)) for stop in stops]
            if ends := [(at + length, at) for at, length in starts if at >= 0]:
                return text[: min(ends)[1]], count, True
    return text, len(pieces), False


@given(
    pieces=st.lists(st.text("abc", max_size=5), max_size=12),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3).map(tuple),
    min_tokens=st.integers(0, 6),
)
@settings(max_examples=300, deadline=None, derandomize=True)
@example(pieces=["a", "b", "c", "d"], stop=("abcd", "bc"), min_tokens=0)
@example(pieces=["xab", "c"], stop=("ab", "xabc"), min_tokens=1)  # one is over before it counts, in the other's text
@example(pieces=["aa", "a"], stop=("aa",), min_tokens=1)  # one that counts overlaps one that does not
@example(pieces=["ab", "", "a"], stop=("ab",), min_tokens=1)
def test_stop_strings_are_looked_for_once_min_tokens_are_there(
    pieces: list[str], stop: tuple[str, ...], min_tokens: int
) -> None:
    checker, emitted, count, stopped = StopChecker(stop), "", 0, False
    for count, piece in enumerate(pieces, 1):
        emit, stopped = checker.push(piece, count > min_tokens)
        emitted += emit
        if stopped:
            break
        held = "".join(pieces[:count])[len(emitted) :]
        assert held == "" or any(len(s) > len(held) and s.startswith(held) for s in stop), (
            "no more is held than must be"
        )
    if not stopped:
        emitted += checker.flush()
    assert (emitted, count, stopped) == as_vllm(pieces, stop, min_tokens)


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopChecker(("a", ""))


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(
    ("text", "stop", "min_tokens", "shown", "count", "finish"),
    [
        ("say Paris, Paris!", "Par", 0, "say ", 7, "stop"),
        ("say Paris, Paris!", "Par", 6, "say ", 7, "stop"),  # its last token is the seventh
        ("say Paris, Paris!", "Par", 7, "say Paris, ", 14, "stop"),
        ("say Paris, Paris!", "Par", 14, "say Paris, Paris!", 17, "length"),
        ("say Paris, Paris!", "!", 17, "say Paris, Paris!", 17, "length"),
        ("ends in Pa", "Par", 10, "ends in Pa", 10, "length"),  # what was held back comes out
        ("caf\u00e9", "\u00e9", 4, "caf", 5, "stop"),  # a character counts with its last byte
        ("caf\u00e9", "\u00e9", 5, "caf\u00e9", 5, "length"),
    ],
)
def test_min_tokens_keeps_stop_strings_off(
    text: str, stop: str, min_tokens: int, shown: str, count: int, finish: str, at_once: bool
) -> None:
    ids = DUMMY.encode(text)
    sampling = SamplingParams(stop=(stop,), min_tokens=min_tokens, max_tokens=len(ids))
    processor, pieces = OutputProcessor(DUMMY, sampling), []
    for news in [ids] if at_once else [[token] for token in ids]:
        end = "length" if at_once or processor.num_tokens == len(ids) - 1 else ""
        pieces += processor.push(Emit("r", tokens=tuple(news), finish=end))
    assert ("".join(piece.text for piece in pieces), len(pieces), processor.finish) == (shown, count, finish)
    assert "".join(piece.added for piece in pieces) == text.encode()[:count].decode()
