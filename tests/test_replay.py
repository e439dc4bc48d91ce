"""Recorded runs, step by step, and what another policy would have decided in them."""

from __future__ import annotations

import asyncio
import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cluster import Load, assert_clean, cluster, greedy, needs_two_cores, prompts, settings
from msgspec.structs import replace
from rich.console import Console
from terminals import terminal

from minidisagg.cli import cli
from minidisagg.config import RunSettings
from minidisagg.core.effects import StartPiece
from minidisagg.core.engine import EngineCore
from minidisagg.core.inputs import Received, Schedule, StepDone
from minidisagg.core.messages import ROUTER, Envelope, KVGrant, RequestSpec, Role, SamplingParams, Submit
from minidisagg.core.policy import Policy, WorkerOptions
from minidisagg.core.spec import EngineSpec
from minidisagg.policies import load_policy
from minidisagg.replay.alike import decided_alike
from minidisagg.replay.asking import Asked, Asker, Notes
from minidisagg.replay.records import find_records
from minidisagg.replay.screen import Cursor, frame
from minidisagg.replay.steps import Run
from minidisagg.sim.machines import ClusterSpec, parse_cluster
from minidisagg.sim.recording import Recording
from minidisagg.sim.simulate import simulate
from minidisagg.sim.simulator import Simulator
from minidisagg.sim.world import World
from minidisagg.workload.lengths import WorkItem

RECORDED = ("fcfs", "sarathi:chunk=48", "sjf", "deflection", "dynamo")
SOURCE = """
import dataclasses

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
        return -request.arrival

    def compose(self, batch, worker):
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


class Same(Policy):
    def order(self, request, stage, worker):
        return 0


class Teller(Policy):
    def place(self, request, cluster):
        request.hints["told"] = request.request_id
        return super().place(request, cluster)

    def order(self, request, stage, worker):
        assert request.hints == {"told": request.request_id}
        return super().order(request, stage, worker)


class Coded(Policy):
    def place(self, request, cluster):
        return dataclasses.replace(super().place(request, cluster), codec="int8")

    def replace(self, request, cluster):
        return Placement(request.prefill, request.decode or None, "int8")


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
                    index=n, prompt_len=100 + 37 * n % 700, output_len=10 + 13 * n % 60, arrival_s=0.004 * n,
                    blocks=(n % 4, *range(100 * n, 100 * n + 99)), block_size=64,
                )
                for n in range(40)
            ]  # fmt: skip
            shape = ClusterSpec(groups=parse_cluster(workers), pages=60, page_size=16)
            simulate(policy.replace("mine.py", str(mine)), items, shape, record=str(directory))
        return made[policy, workers]

    return record


def run_of(directory: Path, ask: str = "") -> Run:
    return Run(find_records(directory)[-1], ask)


def differences(run: Run) -> list[Any]:
    return [one for lane in run.lanes for step in lane.steps for one in step.differences]


# ---------------------------------------------------------------- asking


def test_a_policy_that_is_asked_sends_to_the_store_what_was_sent_there(tmp_path: Path) -> None:
    """Each prompt takes 14 of 16 pages: what the store has of one is read when the one before it has gone."""
    spec = EngineSpec("w0", 1, Role.BOTH, 16, 4, 2, "f", options=WorkerOptions(8, 64, 0), store=True)
    sampling = SamplingParams(max_tokens=4, temperature=0.0)
    with Recording(tmp_path, "fcfs") as record:
        sim = Simulator([spec], lambda: load_policy("fcfs"), World(record=record))
        for number, first in enumerate((100, 200, 300, 100, 200)):
            sim.submit(f"r{number}", list(range(first, first + 48)), sampling, 2.0 * min(number, 2) + 0.1 * number)
        sim.run()
    assert [one.cached_tokens for one in sim.outcomes.values()] == [0, 0, 0, 44, 44]
    run = run_of(tmp_path, "fcfs")
    assert run.summary()[0].endswith("all as recorded") and run.notes.tallies["compose"].asked > 10
    assert not differences(run)


@pytest.mark.parametrize("policy", [*RECORDED, "mine.py:Restless"])
def test_a_policy_that_is_asked_about_its_own_run_would_do_it_again(
    policy: str, recorded: Callable[..., Path], mine: Path
) -> None:
    run = run_of(recorded(policy), policy.replace("mine.py", str(mine)))
    assert run.summary()[0].endswith("all as recorded") and differences(run) == []
    asked = {hook: tally.asked for hook, tally in run.notes.tallies.items()}
    assert min(asked[hook] for hook in ("admit", "place", "order")) >= 40 and asked["compose"] > 100
    assert asked["accept"] and asked["rebalance"] and ("replace" in asked) is (policy == "deflection")
    events = [text for lane in run.lanes for step in lane.steps for text in step.events]
    assert any(text.startswith("preempted ") for text in events) and "evict" in asked
    assert any("from the prefix cache" in text for text in events)


def test_who_decided_alike(recorded: Callable[..., Path]) -> None:
    directory = recorded("fcfs")
    assert decided_alike(directory, "fcfs", "sarathi:chunk=100000")  # no prompt is that long
    assert not decided_alike(directory, "fcfs", "sjf")
    assert not decided_alike(directory, "sjf", "sjf")  # there is no run of it


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
    equals = run_of(recorded("fcfs", "both=2@h100"), f"{mine}:Same")  # who comes later stands behind its equals
    events = [text for lane in equals.lanes for step in lane.steps for text in step.events]
    preempted = {text.split()[1] for text in events if text.startswith("preempted ")}
    assert {one.about for one in differences(equals) if one.hook == "order"} <= preempted
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
    run = run_of(recorded("fcfs"), f"{mine}:Coded")
    told = [one for one in differences(run) if one.hook != "place" or one.other != f"{one.recorded} as int8"]
    assert not told and run.notes.tallies["place"].differ == run.notes.tallies["place"].asked
    run = run_of(recorded("fcfs", "both=2@h100"), f"{mine}:Later")
    assert {one.hook for one in differences(run)} == {"compose"}
    assert differences(run_of(recorded("fcfs"), f"{mine}:Teller")) == []


def test_a_policy_that_raises_is_marked_in_one_line(recorded: Callable[..., Path], mine: Path) -> None:
    run = run_of(recorded("fcfs"), f"{mine}:Broken")
    assert run.summary()[0].endswith("all as recorded")
    said = {one.other for one in differences(run) if one.failed}
    assert any(text.startswith(f"policy Broken: order raised KeyError: 'nothing' ({mine}, line ") for text in said)
    assert all("\n" not in text for text in said)
    assert any(text.startswith("policy Broken: place named the worker 'nowhere'; there are prefill-0") for text in said)
    tally = run.notes.tallies["place"]
    assert tally.asked == tally.differ == tally.failed > 0
    assert any(line.endswith(f"; {tally.failed} of them are errors") for line in run.summary())


def test_a_replay_that_is_not_the_run_says_so(tmp_path: Path) -> None:
    """A policy that comes from a file is in the record; what it reads elsewhere is not."""
    (tmp_path / "limit").write_text("48")
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\nfrom minidisagg.policies.sarathi import Sarathi\n\n\n"
        f"class Mine(Sarathi):\n    def __init__(self):\n        super().__init__(int(Path({str(tmp_path)!r}, 'limit')"
        ".read_text()))\n"
    )
    items = [WorkItem(index=n, prompt_len=100, output_len=4, arrival_s=0.001 * n) for n in range(4)]
    simulate(f"{tmp_path}/mine.py:Mine", items, "both=1@h100", record=str(tmp_path / "record"))
    (tmp_path / "mine.py").unlink()
    assert re.fullmatch(
        r"\d\d plans and router messages replayed, all as recorded", *run_of(tmp_path / "record").summary()
    )
    (tmp_path / "limit").write_text("16")
    said = run_of(tmp_path / "record").summary()
    assert re.fullmatch(
        r"\d+ plans and router messages replayed, \d+ otherwise: the code, or what a policy imports, .*", said[0]
    )


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


# ---------------------------------------------------------------- real runs

REAL = ("fcfs", "sarathi:chunk=24", "sjf", "dynamo", "{mine}:Restless")


@needs_two_cores
def test_real_runs_under_five_policies_replay_to_the_same_plans(tmp_path: Path, mine: Path) -> None:
    """One set of workers is one after the other; each hands KV over, and preempts."""
    base = settings("disagg", link="shm", pages=36)
    policies = [policy.replace("{mine}", str(mine)) for policy in REAL]

    async def run() -> list[int]:
        preempted = []
        async with cluster(base) as frontend:
            for number, policy in enumerate(policies):
                told = RunSettings(record_dir=str(tmp_path / str(number)))
                await frontend.reconfigure(replace(base, policy=policy), told)
                load = Load(frontend)
                load.submit_all(prompts(20, seed=number, longest=120), greedy(36))
                assert {result.finish for result in await load.finished()} == {"length"}
                await assert_clean(frontend)
                stats = frontend.stats  # fresh, since it is clean
                preempted.append(sum(one.preemptions for one in stats.values()))
                assert sum(link.transfers for one in stats.values() for link in one.links) >= 14
        return preempted

    assert min(asyncio.run(run())) > 0
    for number, policy in enumerate(policies):
        again = Run(find_records(tmp_path / str(number))[0], policy)
        assert [lane.name for lane in again.lanes] == [ROUTER, "prefill-0", "decode-0"]
        assert all(lane.plans > 12 and not lane.wrong and not lane.notes for lane in again.lanes)
        assert differences(again) == [] and again.policies == [policy]
        assert again.notes.tallies["evict"].asked and again.notes.tallies["accept"].asked
    events = [text for lane in again.lanes for step in lane.steps for text in step.events]
    for begin in ("came ", "offered ", "granted ", "landed ", "admitted ", "preempted ", "ended ", "place "):
        assert any(text.startswith(begin) for text in events), begin


# ---------------------------------------------------------------- a run as text


def command(*args: object, exits: int = 0) -> str:
    done = CliRunner().invoke(cli, [str(arg) for arg in args], catch_exceptions=True)
    assert done.exit_code == exits or done.exception, done.output
    if exits:
        return str(done.exception)
    assert done.exception is None, done.exception
    return done.stdout


def test_lines_of_steps(recorded: Callable[..., Path]) -> None:
    directory = recorded("sarathi:chunk=48")
    run, lines = run_of(directory), command("replay", directory, "--plain").splitlines()
    heads = [line for line in lines if re.match(r" *\d+\.\d{4} s  ", line)]
    assert len(heads) == sum(len(lane.steps) for lane in run.lanes)
    assert [float(head.split()[0]) for head in heads] == sorted(float(head.split()[0]) for head in heads)
    assert lines[-1] == run.summary()[0]
    first = next(line for line in heads if "  prefill-0  step 1 of Sarathi" in line)
    for part in (
        r"\d+\.\d ms", r"prefill 48 tokens: \d+\[0:48 of \d+\]", "decode 0", "queue 0", "running 1",
        r"KV pages \d+ of 60 used; 0 cached, \d+ free", r"sending 1: \d+ \(decode-\d, 0 pieces, 0 on the link\)",
    ):  # fmt: skip
        assert re.search(part, first), (part, first)
    after = lines[lines.index(first) + 1 :][:2]
    assert re.fullmatch(r" {13}came \d+, to decode on decode-\d", after[0])
    assert re.fullmatch(r" {13}admitted \d+", after[1])


def test_a_time_and_a_worker_can_be_chosen(recorded: Callable[..., Path]) -> None:
    directory = recorded("sarathi:chunk=48")
    run = run_of(directory)
    lane = run.lanes[1]
    step = lane.steps[len(lane.steps) // 2]
    lines = command("replay", directory, "--plain", "--at", step.time + 1e-7, "--worker", lane.name).splitlines()
    heads = [line for line in lines if f" s  {lane.name}  " in line]
    assert len(heads) == 1 and heads[0].startswith(f"{step.time:9.4f} s  {lane.name}  {step.title}")
    every = command("replay", directory, "--plain", "--at", step.time + 1e-7).splitlines()
    assert [line.split()[2] for line in every if re.match(r" *\d+\.\d{4} s  ", line)] == [one.name for one in run.lanes]
    said = command("replay", directory, "--worker", "nobody", exits=1)
    assert said == f"run 1 has no worker 'nobody': there are {', '.join(one.name for one in run.lanes)}"


def test_what_is_asked_is_said_in_a_line_for_each_hook(recorded: Callable[..., Path], mine: Path) -> None:
    lines = command("replay", recorded("fcfs", "both=2@h100"), "--ask", f"{mine}:Last", "--worker", ROUTER).splitlines()
    assert any(re.search(r"≠ place, \d+: recorded worker-0; asked: worker-1$", line) for line in lines)
    assert f"asked {mine}:Last, recorded fcfs" in lines
    assert any(
        re.fullmatch(r"of \d+ decisions of place, \d+ differ, first at \d\.\d+ s \(router\)", line) for line in lines
    )


def test_a_policy_that_does_not_answer_is_asked_no_more(
    recorded: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minidisagg.replay.asking.PATIENCE", 0.2)
    monkeypatch.setattr("minidisagg.replay.app.PATIENCE", 0.2)
    path = tmp_path / "loop.py"
    for body, told in (
        ("        while True: pass", "--ask {0}:Loop does not answer: .* place of policy Loop"),
        ("        ...\n    while True: pass", "policy file {0}, line 5 fails: TimeoutError: "),
    ):
        path.write_text(f"from minidisagg import Policy\nclass Loop(Policy):\n    def place(self, *_):\n{body}\n")
        said = command("replay", recorded("fcfs", "both=2@h100"), "--plain", "--ask", f"{path}:Loop", exits=1)
        assert re.match(told.format(path), said) and "line " in said and "Fcfs" not in said, said


def test_a_record_that_ends_early_says_so(recorded: Callable[..., Path], tmp_path: Path) -> None:
    directory = shutil.copytree(recorded("sarathi:chunk=48"), tmp_path / "cut")
    whole = command("replay", directory, "--plain")
    assert "ends early" not in whole
    log = directory / "decode-1.1.inputs"
    log.write_bytes(log.read_bytes()[: log.stat().st_size // 2])
    [line] = [one for one in command("replay", directory, "--plain").splitlines() if "ends early" in one]
    at = r"^decode-1: the record ends early, in mid-record at (\d\.\d{3}) s; the others go on until (\d\.\d{3}) s$"
    found = re.match(at, line)
    assert found and 0 < float(found[1]) < float(found[2])
    log.write_bytes(log.read_bytes()[:30])
    said = command("replay", directory, "--plain", exits=1)
    assert said == "run 1: one of its logs is cut before its first input"


def test_a_directory_without_a_record_says_how_to_make_one(tmp_path: Path) -> None:
    said = command("replay", tmp_path, exits=1)
    assert said.startswith(f"{tmp_path} has no recorded run: `bench --record`, ") and "\n" not in said
    (tmp_path / "worker-0.1.inputs").write_bytes(b"minidisagg inputs 3\n")
    assert "this input log has version 3" in command("replay", tmp_path, exits=1)
    said = command("replay", tmp_path, "--ask", "./nope.py:Mine", exits=1)
    assert said == "policy file nope.py does not exist"


def test_what_simulate_records_is_in_its_run_directory(tmp_path: Path) -> None:
    flags = ("--num-prompts", 30, "--num-warmups", 2, "--random-input-len", 64, "--random-output-len", 8)
    flags += ("--dataset-name", "random", "--result-dir", tmp_path, "--repeats", 2, "--request-rate", 20)
    command("simulate", "--compare", "colocated,disagg", *flags, "--record")
    (directory,) = tmp_path.iterdir()
    names = {path.relative_to(directory).as_posix() for path in directory.rglob("*.inputs")}
    assert names == {f"record/A/{name}.1.inputs" for name in ("router", "worker-0", "worker-1")} | {
        f"record/B/{name}.1.inputs" for name in ("router", "prefill-0", "decode-0")
    }
    for name in ("A/1", "B/1"):
        assert command("replay", directory, "--run", name, "--plain").splitlines()[-1].endswith("all as recorded")
    assert command("replay", directory, "--run", "C", exits=1).endswith("has no run 'C': there are A/1, B/1")
    said = command("simulate", "--record", "--find-goodput", *flags, exits=1)
    assert said.startswith("--record is for runs at a given load")
    assert len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------- the screen


@pytest.fixture
def marked(recorded: Callable[..., Path]) -> Run:
    return run_of(recorded("fcfs", "both=2@h100"), "sjf")


def test_keys_move_the_cursor(marked: Run) -> None:
    cursor, lanes = Cursor(marked), marked.lanes
    for key, index in (
        ("right", 1), ("]", 11), ("s-right", 21), ("left", 20), ("s-left", 10), ("[", 0), ("left", 0),
        ("end", len(lanes[0].steps) - 1), ("right", len(lanes[0].steps) - 1), ("home", 0), ("up", 0),
    ):  # fmt: skip
        assert cursor.go(key) and (cursor.lane, cursor.index) == (0, index), key
    assert not cursor.go("x")
    cursor.index = len(lanes[0].steps) // 2
    time = cursor.step.time
    assert cursor.go("down") and cursor.lane == 1
    assert cursor.step.time <= time < lanes[1].steps[cursor.index + 1].time
    cursor.lane, cursor.index = 0, 0
    seen = list[tuple[float, int, int]]()
    while cursor.go("n") and (here := (cursor.step.time, cursor.lane, cursor.index)) not in seen:
        assert cursor.step.differences
        seen.append(here)
    every = [step for lane in lanes for step in lane.steps if step.differences]
    assert len(seen) == len(every) > 5 and seen == sorted(seen)
    cursor.go("p")
    assert (cursor.step.time, cursor.lane, cursor.index) == seen[-2]


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (30, 8)], ids=str)
def test_the_screen_fits(size: tuple[int, int], marked: Run) -> None:
    cursor = Cursor(marked, 1)
    for key in ("home", "n", "end", "down"):
        cursor.go(key)
        console = Console(width=size[0], height=size[1], color_system=None, record=True, file=io.StringIO())
        console.print(frame(cursor, *size), end="")
        text = console.export_text()
        lines = text.splitlines()
        assert len(lines) == size[1] and all(len(line) == size[0] for line in lines)
        if size[0] >= 80:
            assert f"step {cursor.index + 1} of {len(marked.lanes[cursor.lane].steps)}" in text
            assert "≠" in text and "\n KV pages" in text


def test_on_a_terminal(recorded: Callable[..., Path], tmp_path: Path) -> None:
    args = ("replay", recorded("fcfs", "both=2@h100"), "--ask", "sjf", "--worker", "worker-1")
    with terminal(*args, cwd=tmp_path, program=("-m", "minidisagg"), width=100, height=32) as tty:
        tty.wait(r"─ worker-1 step 1 of \d+ ─")
        tty.press("]", "step 11 of")
        tty.press("\x1b[1;2C", "step 21 of")
        tty.press("\x1b[D", "step 20 of")
        tty.press("\x1b[H", "step 1 of")
        tty.press("n", r"≠ (order|compose), .*recorded .*; asked: ")
        tty.press("\x1b[A\x1b[A\x1b[A", "─ router step")
        tty.press("q")
        assert tty.ended() == 0
        assert re.search(r"of \d+ decisions of compose, \d+ differ, first at", tty.text)
