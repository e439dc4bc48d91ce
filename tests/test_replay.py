"""Recorded runs, step by step, and what another policy would have decided in them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minidisagg.core.effects import StartPiece
from minidisagg.core.engine import EngineCore
from minidisagg.core.inputs import Received, Schedule, StepDone
from minidisagg.core.messages import ROUTER, Envelope, KVGrant, RequestSpec, Role, SamplingParams, Submit
from minidisagg.core.policy import Policy, WorkerOptions
from minidisagg.core.spec import EngineSpec
from minidisagg.replay.asking import Asked, Asker, Notes
from minidisagg.replay.records import find_records
from minidisagg.replay.steps import Run
from minidisagg.sim.machines import ClusterSpec, parse_cluster
from minidisagg.sim.simulate import simulate
from minidisagg.workload.lengths import WorkItem

RECORDED = ("fcfs", "sarathi:chunk=48", "sjf", "deflection", "arrow", "dynamo", "polyserve")
SOURCE = """
from minidisagg import Policy, Victim
from minidisagg.core.policy import Placement, Reject


class Restless(Policy):
    \"\"\"Its keys change with every step, and so does who goes first.\"\"\"

    dynamic_order = True

    def order(self, request, stage, worker):
        return (int(worker.now * 50) % 3 == 0, -request.arrival if worker.free_pages % 2 else request.prefill_len)


class Meddler(Policy):
    \"\"\"Writes wherever it is shown something that can be written to, and throws every die.\"\"\"

    def __init__(self):
        super().__init__()
        self.seen = 0

    def place(self, request, cluster):
        request.hints["chunk"] = 1
        request.hints.pop("cached", None)
        cluster.rng.random()
        for worker in cluster.workers.values():
            worker.changed(queued_tokens=0, decoding=7, draining=True)
        cluster.changed(waiting=99, now=0.0)
        return Reject(1.0, "no")

    def replace(self, request, cluster):
        return self.place(request, cluster) and None

    def rebalance(self, cluster):
        cluster.rng.seed(1)
        return []

    def order(self, request, stage, worker):
        request.hints.clear()
        worker.options.max_num_seqs = 1
        return -request.arrival

    def compose(self, batch, worker):
        worker.options.max_num_batched_tokens = 1
        for request in reversed(batch.waiting):
            request.hints["x"] = 1
            batch.add(request, 7)
        for request in reversed(batch.running):
            batch.add(request)

    def evict(self, worker, candidates):
        return Victim(candidates[0]) if candidates else None


class Broken(Policy):
    def order(self, request, stage, worker):
        return {}["nothing"] if stage == "decode" else request.arrival

    def place(self, request, cluster):
        return Placement("nowhere", None)


class Later(Policy):
    \"\"\"As fcfs when a request comes, and the other way round from then on.\"\"\"

    dynamic_order = True

    def order(self, request, stage, worker):
        return -request.arrival if stage == "prefill" and worker.now > request.queued_at else request.arrival


class Teller(Policy):
    def place(self, request, cluster):
        request.hints["told"] = request.request_id
        return super().place(request, cluster)

    def order(self, request, stage, worker):
        assert request.hints == {"told": request.request_id}
        return super().order(request, stage, worker)


class Mover(Policy):
    def replace(self, request, cluster):
        return Placement("decode-0", "decode-0")


class Last(Policy):
    def place(self, request, cluster):
        name = max(cluster.workers)
        return Placement(name, name)
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policies") / "mine.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, mine: Path) -> Callable[..., Path]:
    """Records a simulation of small caches in which prompts share pages and decodes preempt."""
    made: dict[tuple[str, str], Path] = {}

    def record(policy: str, workers: str = "prefill=2@h100,decode=2@h100") -> Path:
        if (policy, workers) not in made:
            directory = made[policy, workers] = tmp_path_factory.mktemp("record")
            items = [
                WorkItem(
                    index=n, prompt_len=100 + 37 * n % 900, output_len=20 + 13 * n % 90, arrival_s=0.004 * n,
                    blocks=(n % 4, *range(100 * n, 100 * n + 99)), block_size=64,
                )
                for n in range(40)
            ]  # fmt: skip
            shape = ClusterSpec(groups=parse_cluster(workers), pages=80, page_size=16)
            simulate(policy.replace("mine.py", str(mine)), items, shape, record=str(directory))
        return made[policy, workers]

    return record


def run_of(directory: Path, ask: str = "") -> Run:
    return Run(find_records(directory)[-1], ask)


def differences(run: Run) -> list[Any]:
    return [one for lane in run.lanes for step in lane.steps for one in step.differences]


# ---------------------------------------------------------------- asking


@pytest.mark.parametrize("policy", [*RECORDED, "mine.py:Restless"])
def test_a_policy_that_is_asked_about_its_own_run_would_do_it_again(
    policy: str, recorded: Callable[..., Path], mine: Path
) -> None:
    run = run_of(recorded(policy), policy.replace("mine.py", str(mine)))
    assert run.summary()[0].endswith("all as recorded") and differences(run) == []
    asked = {hook: tally.asked for hook, tally in run.notes.tallies.items()}
    assert min(asked[hook] for hook in ("admit", "place", "order")) >= 40 and asked["compose"] > 200
    assert asked["accept"] and asked["rebalance"] and ("replace" in asked) is (policy == "deflection")
    events = [text for lane in run.lanes for step in lane.steps for text in step.events]
    assert any(text.startswith("preempted ") for text in events) and "evict" in asked
    assert any("from the prefix cache" in text for text in events)


@pytest.mark.parametrize(("policy", "routed"), [("sjf", True), ("deflection", True), ("sjf", False)])
def test_what_is_asked_cannot_disturb_the_run(
    policy: str, routed: bool, recorded: Callable[..., Path], mine: Path, tmp_path: Path
) -> None:
    directory = recorded(policy)
    if not routed:
        directory = Path(shutil.copytree(directory, tmp_path / "workers"))
        (directory / "router.1.inputs").unlink()
    alone, beside = run_of(directory), run_of(directory, f"{mine}:Meddler")
    assert alone.summary()[0] == beside.summary()[0] and beside.summary()[0].endswith("all as recorded")
    assert [lane.name for lane in alone.lanes] == [lane.name for lane in beside.lanes]
    for one, other in zip(alone.lanes, beside.lanes, strict=True):
        told = [step for step in other.steps if step.events or not step.differences]  # a decision alone is a step, too
        assert [(step.time, step.facts(), step.events) for step in one.steps] == [
            (step.time, step.facts(), step.events) for step in told
        ]
    assert {"order", "compose", *["place"] * routed} <= {one.hook for one in differences(beside)}


def test_each_decision_that_would_be_another_is_marked(recorded: Callable[..., Path], mine: Path) -> None:
    directory = recorded("fcfs", "both=2@h100")
    run = run_of(directory, f"{mine}:Last")
    placed = run.lanes[0]
    assert placed.name == ROUTER and {one.hook for one in differences(run)} == {"place"}
    marked = [(step.events[0], one) for step in placed.steps for one in step.differences]
    for event, one in marked:
        assert event == f"place {one.about}: worker-0" and (one.recorded, one.other) == ("worker-0", "worker-1")
    elsewhere = [text for step in placed.steps for text in step.events if text.endswith(": worker-0")]
    tally = run.notes.tallies["place"]
    assert 10 < len(marked) == len(elsewhere) == tally.differ < tally.asked
    first = min(step.time for step in placed.steps if step.differences)
    assert (
        f"of {tally.asked} decisions of place, {tally.differ} differ, first at {first:.3f} s (router)" in run.summary()
    )
    assert f"of {run.notes.tallies['compose'].asked} decisions of compose, 0 differ" in run.summary()


def test_an_order_shows_at_once_and_in_the_steps(recorded: Callable[..., Path], mine: Path) -> None:
    run = run_of(recorded("fcfs", "both=2@h100"), "sjf")
    found = differences(run)
    assert {one.hook for one in found} == {"order", "compose"}
    order = next(one for one in found if one.hook == "order")
    assert re.fullmatch(r"place (\d+) of \1 at prefill", order.recorded), order  # it came last
    assert int(order.other.split()[1]) < int(order.recorded.split()[1])
    chunks = run_of(recorded("sarathi:chunk=48", "both=2@h100"), "fcfs")
    step = next(one for one in differences(chunks) if one.hook == "compose")
    names = [re.findall(r"(\S+) \((\d+)\)", text) for text in (step.recorded, step.other)]
    assert [name for name, _ in names[0]] == [name for name, _ in names[1]]
    assert sum(int(count) for _, count in names[0]) <= 48 < sum(int(count) for _, count in names[1])


def test_what_only_the_other_policy_has_is_asked_too(recorded: Callable[..., Path], mine: Path) -> None:
    """A hook, an order that changes with time, and hints from its `place` to its other hooks."""
    run = run_of(recorded("fcfs"), f"{mine}:Mover")
    moved = next(one for one in differences(run) if one.hook == "replace")
    assert (moved.recorded, moved.other) == ("stays", "decode-0") and run.summary()[0].endswith("all as recorded")
    run = run_of(recorded("fcfs", "both=2@h100"), f"{mine}:Later")
    assert {one.hook for one in differences(run)} == {"compose"}
    assert differences(run_of(recorded("fcfs"), f"{mine}:Teller")) == []


def test_a_policy_that_raises_is_marked_in_one_line(recorded: Callable[..., Path], mine: Path) -> None:
    run = run_of(recorded("fcfs"), f"{mine}:Broken")
    assert run.summary()[0].endswith("all as recorded")
    said = {one.other for one in differences(run) if one.failed}
    assert "policy Broken: order raised KeyError: 'nothing'" in said and all("\n" not in text for text in said)
    assert any(text.startswith("policy Broken: place named the worker 'nowhere'; there are prefill-0") for text in said)
    tally = run.notes.tallies["place"]
    assert tally.asked == tally.differ == tally.failed > 0
    assert any(line.endswith(f"; {tally.failed} of them are errors") for line in run.summary())


@pytest.mark.parametrize("flying", [False, True])
def test_a_victim_makes_room_unless_a_link_still_reads_its_pages(flying: bool) -> None:
    """In the step that another policy is asked for as in the one that is recorded."""
    asker = Asker("w", Policy(), Notes())
    spec = EngineSpec("w", 1, Role.BOTH, 8, 4, 1, "f", options=WorkerOptions(8, 64, 1))
    core = EngineCore(spec, lambda _: Asked(Policy(), asker))
    asker.sent = core.sender.transfers
    sampling = SamplingParams(max_tokens=16, temperature=0.0)

    def submit(name: str, length: int, decode: str = "", **more: Any) -> None:
        request = RequestSpec(prompt=[1] * length, sampling=sampling, **more)
        core.on(Received(Envelope(ROUTER, 0, Submit(name, 0, request, decode))), 0.0)

    def step() -> set[str]:
        if (plan := core.on(Schedule(), 0.0)) is None:
            return set()
        core.on(StepDone(plan.step_id, [1] * sum(item.sample for item in plan.items), 0.1), 0.0)
        return {item.request_id for item in plan.items}

    submit("here", 8, priority=1)
    assert [step() for _ in range(8)] == [{"here"}] * 8
    submit("away", 16, decode="d", salt="another")
    assert [step() for _ in range(6)] == [{"here", "away"}] * 6
    if flying:
        core.on(Received(Envelope("d", 1, KVGrant("away", 0, [0, 1, 2, 3], 0))), 0.0)
        assert any(isinstance(effect, StartPiece) for effect in core.outbox)
    steps = [step() for _ in range(4)]
    assert set() in steps if flying else steps[-1] == {"here"}
    assert asker.notes.tallies["evict"].asked and asker.differences == []
