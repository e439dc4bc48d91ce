"""Engines and router under any order of messages: reordered, doubled, lost; deaths, aborts and broken links between."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simfuzz import LONG, POLICIES
from stepwise import NEVER, Stepwise, spec

from minidisagg.core.messages import Role, SamplingParams
from minidisagg.core.policy import RoleChange, WorkerOptions
from minidisagg.core.router import RouterSpec

ROLES = ([1, 2], [3, 3], [1, 2, 3], [1, 2, 2])
INDEX = st.integers(0, 40)


class ClusterMachine(RuleBasedStateMachine):
    """Whatever the order, at the end each request has the oracle's tokens and no page is lost."""

    @initialize(
        roles=st.sampled_from(ROLES), one_sided=st.booleans(), depth=st.integers(0, 2),
        policy=st.sampled_from(POLICIES), pages=st.sampled_from([8, 12]), chunk=st.sampled_from([0, 3]),
    )  # fmt: skip
    def start(self, roles: list[int], one_sided: bool, depth: int, policy: int, pages: int, chunk: int) -> None:
        specs = [
            spec(f"w{index}", Role(role), num_pages=pages, page_size=2, one_sided_links=one_sided,
                 options=WorkerOptions(4, 8, chunk))
            for index, role in enumerate(roles)
        ]  # fmt: skip
        router = RouterSpec(request_timeout=LONG, lost_after=NEVER, stuck_after=NEVER)
        self.sim = Stepwise(specs, policy, depth, router)  # type: ignore[arg-type]
        self.count = 0
        for _ in specs:
            self.sim.deliver()
        for length in (3, 4, 5):
            self.submit([1] * length, 4, 200, "")  # something to disturb from the start

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=6), max_tokens=st.integers(1, 5),
        stop=st.integers(0, 200), salt=st.sampled_from(["", "", "b"]),
    )  # fmt: skip
    def submit(self, prompt: list[int], max_tokens: int, stop: int, salt: str) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=(stop,))
        self.sim.submit(f"r{self.count}", prompt, sampling, self.sim.now, salt)
        self.sim.events.pop()()
        self.count += 1

    @precondition(lambda self: self.sim.messages)
    @rule(index=INDEX, count=st.integers(1, 4), fails=st.sampled_from([False, False, False, True]))
    def deliver(self, index: int, count: int, fails: bool) -> None:
        self.sim.faulty(fails)
        for _ in range(min(count, len(self.sim.messages))):
            self.sim.deliver(index)

    @rule(rounds=st.integers(1, 6), index=INDEX)
    def go_on(self, rounds: int, index: int) -> None:
        """Most of what there is happens, in order, so that requests get somewhere."""
        for _ in range(rounds):
            for _ in range(len(self.sim.messages)):
                self.sim.deliver()
            if self.sim.events:
                self.sim.happen(index)

    @rule(rounds=st.integers(4, 12))
    def go_on_in_order(self, rounds: int) -> None:
        self.go_on(rounds, 0)

    @precondition(lambda self: self.sim.messages)
    @rule(index=INDEX)
    def duplicate(self, index: int) -> None:
        self.sim.messages.append(self.sim.messages[index % len(self.sim.messages)])

    @precondition(lambda self: self.sim.messages)
    @rule(index=INDEX)
    def lose(self, index: int) -> None:
        self.sim.lose(index)

    @precondition(lambda self: self.sim.events)
    @rule(index=INDEX, fails=st.sampled_from([False, False, False, True]))
    def happen(self, index: int, fails: bool) -> None:
        self.sim.faulty(fails)
        self.sim.happen(index)

    @rule(seconds=st.sampled_from([0.25, 3.0, 6.0]))
    def tick(self, seconds: float) -> None:
        self.sim.tick(seconds)

    @precondition(lambda self: self.sim.router.requests)
    @rule(index=INDEX)
    def leave(self, index: int) -> None:
        names = list(self.sim.router.requests)
        self.sim.abort(names[index % len(names)])

    @precondition(lambda self: self.count > 2)
    @rule(index=INDEX)
    def kill(self, index: int) -> None:
        self.sim.kill(f"w{index % len(self.sim.workers)}")

    @precondition(lambda self: self.sim.router.view.workers)
    @rule(index=INDEX)
    def flip(self, index: int) -> None:
        name = sorted(self.sim.router.view.workers)[index % len(self.sim.router.view.workers)]
        self.sim.router.set_role(RoleChange(name, Role.BOTH), self.sim.now)

    @invariant()
    def proved(self) -> None:
        if hasattr(self, "sim"):
            self.sim.prove()

    def teardown(self) -> None:
        if hasattr(self, "sim"):
            self.sim.faulty(False)
            self.sim.settle()
            assert not self.sim.complaints()


ClusterMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=60, derandomize=True, deadline=None)
TestCluster = ClusterMachine.TestCase
