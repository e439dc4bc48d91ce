"""What a policy sees of a request: read-only, and nothing that it may not know.

A benchmark knows how long each output will be; a policy sees the limit that a user has set, and what the run's
predictor expects. There is no token in a view either: the simulator has none, and the decision log keeps none.
"""

from __future__ import annotations

from typing import Protocol

from minidisagg.core.messages import RequestSpec


class Seen(Protocol):
    """What a view looks at."""

    request_id: str
    spec: RequestSpec

    @property
    def prefill_len(self) -> int: ...


class AnyRequest:
    """What every hook sees of a request."""

    __slots__ = ("_of",)

    def __init__(self, of: Seen) -> None:
        self._of = of

    @property
    def request_id(self) -> str:
        """Never used again."""
        return self._of.request_id

    @property
    def arrival(self) -> float:
        """Seconds on the router's clock: it orders requests, and says nothing on a worker's clock."""
        return self._of.spec.arrival

    @property
    def priority(self) -> int:
        """The higher, the earlier."""
        return self._of.spec.priority

    @property
    def prompt_len(self) -> int:
        """Tokens that the client sent."""
        return len(self._of.spec.prompt)

    @property
    def prefill_len(self) -> int:
        """Tokens that a prefill computes: the prompt, and what was sampled before a preemption or a failure."""
        return self._of.prefill_len

    @property
    def max_tokens(self) -> int:
        """The limit of the output, as its client has set it."""
        return self._of.spec.sampling.max_tokens

    @property
    def predicted_len(self) -> int | None:
        """Output tokens that the run's predictor expects; None where it has none, or does not know."""
        return self._of.spec.predicted_len

    @property
    def slo_ttft(self) -> float | None:
        """Seconds to the first token that the client wants at most."""
        return self._of.spec.slo_ttft

    @property
    def slo_tpot(self) -> float | None:
        """Seconds per output token that the client wants at most."""
        return self._of.spec.slo_tpot

    @property
    def session(self) -> str:
        """The conversation that it belongs to; empty where nobody said."""
        return self._of.spec.session

    @property
    def hints(self) -> dict[str, str | int | float]:
        """What `place` writes here, the hooks of the workers can read."""
        return self._of.spec.hints
