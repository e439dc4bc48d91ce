"""What a worker's steps cost, fitted to those that it has done: the estimators of the policies.

    seconds ≈ a + b · prompt tokens + c · decoding sequences + d · KV tokens read, none of the four negative

by least squares of the relative error over the last steps, so that it follows a worker that becomes slower. A step
teaches something only where its composition is another than that of the step before: thousands of equal decode steps
would else drown all that is known of prompts, and a driver that computes equal steps at once would teach less.
"""

from __future__ import annotations

from collections import deque
from math import fsum

from msgspec import Struct

from minidisagg.core.messages import StepOutput

WINDOW = 128  # steps that count
SCALES = 1.0, 1e-3, 1e-1, 1e-5  # of the four inputs, so that their coefficients are about alike
RIDGE = 1e-9  # share of the squares that pulls a coefficient to 0 which no step has told apart from the others
NOTHING = 1e-9  # what is left of a sum, by rounding, when all that was in it has gone

Row = tuple[float, float, float, float]


class StepCosts(Struct, frozen=True, array_like=True):
    """The four coefficients, of scaled inputs. All zero until a step was seen."""

    step: float = 0.0
    prefill_tokens: float = 0.0
    decode_seqs: float = 0.0
    context_tokens: float = 0.0

    def predict(self, prefill_tokens: int = 0, decode_seqs: int = 0, context_tokens: int = 0) -> float:
        """Seconds of a step of so many prompt tokens and sequences that decode, whose contexts add up to so many."""
        _, prefill, decode, context = SCALES
        return (
            self.step
            + self.prefill_tokens * prefill * prefill_tokens
            + self.decode_seqs * decode * decode_seqs
            + self.context_tokens * context * context_tokens
        )


class StepLearner:
    """Of one worker."""

    def __init__(self) -> None:
        self._steps: deque[Row] = deque()  # inputs over seconds, so that a relative error is squared
        self._squares = [[0.0] * 4 for _ in range(4)]  # of these, summed
        self._sums = [0.0] * 4
        self._last = (-1, -1)
        self._costs: StepCosts | None = StepCosts()  # None: to be fitted again

    def learn(self, step: StepOutput) -> None:
        """What one step has taken."""
        composition = step.prefill_tokens, step.decode_tokens
        if composition == self._last or composition == (0, 0) or step.seconds <= 0:
            return
        self._last = composition
        inputs = 1, step.prefill_tokens, step.decode_tokens, step.context_tokens
        a, b, c, d = (scale * value / step.seconds for scale, value in zip(SCALES, inputs, strict=True))
        self._count((a, b, c, d), 1.0)
        self._steps.append((a, b, c, d))
        if len(self._steps) > WINDOW:
            self._count(self._steps.popleft(), -1.0)
        self._costs = None

    def _count(self, row: Row, sign: float) -> None:
        for i, value in enumerate(row):
            self._sums[i] += sign * value
            squares = self._squares[i]
            for j, other in enumerate(row):
                squares[j] += sign * value * other

    @property
    def costs(self) -> StepCosts:
        """By the steps up to now."""
        if self._costs is None:
            self._costs = StepCosts(*_fit(self._squares, self._sums))
        return self._costs


def _fit(squares: list[list[float]], sums: list[float]) -> list[float]:
    """Coefficients ≥ 0 with rows · coefficients ≈ 1: what comes out negative is left out, the worst first."""
    free = [i for i in range(4) if squares[i][i] > NOTHING]
    while True:
        matrix = [[squares[i][j] * (1.0 + RIDGE * (i == j)) for j in free] + [sums[i]] for i in free]
        found = dict(zip(free, _solve(matrix), strict=True))
        worst = min(found, key=lambda i: found[i])
        if found[worst] >= 0.0:
            return [found.get(i, 0.0) for i in range(4)]
        free.remove(worst)


def _solve(matrix: list[list[float]]) -> list[float]:
    """A symmetric, positive definite system, its right side as the last column; by elimination."""
    size = len(matrix)
    for i in range(size):
        for other in matrix[i + 1 :]:
            factor = other[i] / matrix[i][i]
            for j in range(i, size + 1):
                other[j] -= factor * matrix[i][j]
    for i in reversed(range(size)):
        known = fsum(matrix[i][j] * matrix[j][size] for j in range(i + 1, size))
        matrix[i][size] = (matrix[i][size] - known) / matrix[i][i]
    return [row[size] for row in matrix]
