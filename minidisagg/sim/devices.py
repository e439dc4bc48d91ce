"""What a simulated worker computes on: a hash chain, which proves that KV is right, or nothing, which is fast.

Both stand for the device of one worker process and its KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence

from minidisagg.core.blocks import IntegrityError, PageState
from minidisagg.core.engine import EngineCore
from minidisagg.core.plan import Piece, SeqKey, StepPlan
from minidisagg.sim.memory import Memory


class TimingOnly:
    """All tokens are 0, and pages hold nothing."""

    most = 1024  # equal steps at once

    def compute(self, plan: StepPlan, planes: int) -> None:
        """The step's KV, in the planes up to this one that do not have it yet."""

    def finish(self, plan: StepPlan, steps: int) -> list[int]:
        """The tokens of so many steps."""
        return [0] * (steps * sum(item.sample for item in plan.items))

    def send(self, piece: Piece, dest: TimingOnly, remote: Sequence[int]) -> None:
        """The pages of a piece are in the other worker's cache."""


    def page(self, page: int) -> object:
        """What is in it, to be kept elsewhere."""
        return None

    def put(self, page: int, content: object) -> None:
        """That is in it now."""


class HashChain(TimingOnly):
    """With `check`, it is an error when a step or a link touches a page that is not its own, and when a request starts
    from KV that is not its own."""

    most = 1

    def __init__(self, core: EngineCore, planes: int, vocab: int, check: bool) -> None:
        self.core = core
        self.planes = planes
        self.vocab = vocab
        self.check = check
        self.memory = Memory(planes, core.spec.num_pages, core.spec.page_size)
        self.alive = True  # the process is: what a link writes later is nobody's
        self.written = 0  # planes of the step that is being computed
        self.last: dict[SeqKey, int] = {}  # last sampled token per sequence, as a device keeps it

    def compute(self, plan: StepPlan, planes: int) -> None:
        """As above."""
        if planes <= self.written:
            return
        new = {(init.request_id, init.incarnation): init for init in plan.new}
        for item in plan.items:
            key = item.request_id, item.incarnation
            if self.check:
                self._expect(item.pages, PageState.LIVE)
                if key in new and item.start and not self.written:
                    tokens = [*new[key].prompt, *new[key].output][: item.start]
                    if not self.memory.holds(item.pages, tokens):
                        name = self.core.spec.name
                        raise IntegrityError(f"{item.request_id} starts from KV on {name} that is not its own")
            known = item.tokens if len(item.tokens) == item.count else [*item.tokens, self.last[key]]
            self.memory.write(range(self.written, planes), item, known)
        self.written = planes

    def finish(self, plan: StepPlan, steps: int) -> list[int]:
        """As above, of one step."""
        self.compute(plan, self.planes)
        self.written = 0
        for key in plan.dropped:
            self.last.pop(key, None)
        tokens = []
        for item in plan.items:
            if item.sample:
                token = self.memory.sample(item, self.vocab)
                self.last[item.request_id, item.incarnation] = token
                tokens.append(token)
        return tokens

    def send(self, piece: Piece, dest: TimingOnly, remote: Sequence[int]) -> None:
        """As above."""
        assert isinstance(dest, HashChain)
        if self.check:
            self._expect(piece.pages, PageState.LIVE)
            dest._expect(remote, PageState.INFLIGHT, PageState.QUARANTINED)
        planes = range(*piece.layers) if self.planes > 1 else range(1)
        self.memory.copy(planes, piece.pages, dest.memory, remote)

    def page(self, page: int) -> object:
        """As above."""
        if self.check:
            self._expect([page], PageState.LIVE)
        return [list(plane[page]) for plane in self.memory.planes]

    def put(self, page: int, content: object) -> None:
        """As above."""
        assert isinstance(content, list)
        if self.check:
            self._expect([page], PageState.INFLIGHT)
        for plane, slots in zip(self.memory.planes, content, strict=True):
            plane[page] = list(slots)

    def _expect(self, pages: Sequence[int], *states: PageState) -> None:
        for page in pages:
            if self.alive and self.core.pool.state[page] not in states:
                state = self.core.pool.state[page].name
                raise IntegrityError(f"page {page} of {self.core.spec.name} is in use while it is {state}")
