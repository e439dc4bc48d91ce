"""Sessions: conversations of several turns, each of whose prompts is all that was said before and what its user adds.

The first prompt is a system prompt, which all sessions share, and the user's first words. A later one is the whole
prompt of the turn before, the tokens that were sampled for it, and new words; it comes when the user has thought, after
that turn's last token. Lengths are known before anything is sent, as outputs have exactly the length that is asked for;
what the prompts of later turns contain, and when they come, is known when the turn before has ended.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from random import Random

from msgspec import Struct

from minidisagg.workload.arrivals import keyed_random
from minidisagg.workload.lengths import WorkItem

MULTITURN = "multiturn"  # the data set's name


class Multiturn(Struct, frozen=True, kw_only=True):
    """What sessions are like. Lengths are tokens; all but the system prompt's, and `turns`, are means."""

    system_len: int = 128
    turns: int = 4
    input_len: int = 128  # of the first turn, after the system prompt
    turn_len: int = 64  # that the user adds in each later turn
    output_len: int = 64
    range_ratio: float = 0.5  # turns and lengths are uniform in [1 - r, 1 + r] of the above
    think_time: float = 1.0  # seconds, exponential

    @property
    def longest(self) -> int:
        """Tokens of prompt and output that a last turn can have."""
        turns, first, later, output = (
            math.ceil(mean * (1 + self.range_ratio))
            for mean in (self.turns, self.input_len, self.turn_len, self.output_len)
        )
        return self.system_len + first + (turns - 1) * later + turns * output


def multiturn_items(count: int, like: Multiturn, seed: int = 0) -> list[WorkItem]:
    """`--dataset-name multiturn`: `count` turns, each session's in a row; the last session may be cut short.

    A turn's lengths, think time and new tokens depend on (seed, session, turn) only. Raises ValueError.
    """
    if min(like.turns, like.input_len, like.turn_len, like.output_len) < 1 or like.system_len < 0:
        raise ValueError("multiturn turns and lengths must be at least 1, a system prompt at least 0")
    if not 0.0 <= like.range_ratio < 1.0:
        raise ValueError(f"multiturn range ratio must be in [0, 1), not {like.range_ratio}")
    if not 0.0 <= like.think_time < math.inf:
        raise ValueError(f"multiturn think time must be finite and not negative, not {like.think_time}")

    def draw(rng: Random, mean: int) -> int:
        return max(1, rng.randint(math.floor(mean * (1 - like.range_ratio)), math.ceil(mean * (1 + like.range_ratio))))

    items: list[WorkItem] = []
    for session in itertools.count():
        past = like.system_len
        for turn in range(draw(keyed_random("turns", seed, session), like.turns)):
            if len(items) == count:
                return items
            rng = keyed_random("turn", seed, session, turn)
            new_len, output_len = draw(rng, like.turn_len if turn else like.input_len), draw(rng, like.output_len)
            think_s = -math.log(1 - rng.random()) * like.think_time if turn else 0.0
            items.append(
                WorkItem(
                    index=len(items), prompt_len=past + new_len, output_len=output_len, session=f"session-{session}",
                    turn=turn, new_len=new_len, system_len=0 if turn else like.system_len,
                    think_s=float(f"{think_s:.12g}"),  # the last digits differ between mathematical libraries
                )
            )  # fmt: skip
            past += new_len + output_len
    raise AssertionError


def first_turns(items: Sequence[WorkItem]) -> list[WorkItem]:
    """Those that come at times of their own: the first of each session, and what is in none."""
    return [item for item in items if not item.turn]


def rests(items: Sequence[WorkItem]) -> dict[int, list[WorkItem]]:
    """By the index of each request, the turns of its session that follow it."""
    found: dict[int, list[WorkItem]] = {}
    rest: list[WorkItem] = []
    for item in reversed(items):
        found[item.index] = rest
        rest = [item, *rest] if item.turn else []
    return found
