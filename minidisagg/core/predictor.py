"""How long an output will be, guessed when its request comes, for policies that order or place by it.

none        nobody knows
histogram   the median of the last outputs whose prompts were about as long
oracle      the truth, which a benchmark knows: an upper bound for a policy, and a run with it is marked
"""

from __future__ import annotations

from collections import defaultdict, deque
from statistics import median_low
from typing import Literal

from minidisagg.core.messages import RequestSpec

Predictor = Literal["none", "histogram", "oracle"]
PREDICTORS: tuple[Predictor, ...] = ("none", "histogram", "oracle")
KEPT = 255  # outputs of each class of prompts
FEWEST = 5  # outputs that make a guess


class LengthPredictor:
    """The router's."""

    def __init__(self, kind: Predictor = "none") -> None:
        self.kind = kind
        self._seen: dict[int, deque[int]] = defaultdict(lambda: deque(maxlen=KEPT))  # by class of prompts; 0: of all

    def predict(self, spec: RequestSpec) -> int | None:
        """Output tokens; None where there is nothing to go by."""
        if self.kind == "oracle":
            return spec.ends_after or None
        if self.kind == "histogram":
            for seen in (self._seen[_class(spec)], self._seen[0]):
                if len(seen) >= FEWEST:
                    return min(median_low(seen), spec.sampling.max_tokens)
        return None

    def learn(self, spec: RequestSpec, output: int) -> None:
        """A request has ended after so many tokens."""
        if self.kind == "histogram":
            self._seen[_class(spec)].append(output)
            self._seen[0].append(output)


def _class(spec: RequestSpec) -> int:
    """Prompts of one power of two are alike."""
    return len(spec.prompt).bit_length()
