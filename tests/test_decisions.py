"""The decision log of a real run: every hook is there, and its inputs, asked of a fresh policy, give its answer."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cluster
import msgspec
from cluster import needs_two_cores

from minidisagg.config import RunSettings
from minidisagg.core.costs import StepCosts
from minidisagg.core.messages import Role
from minidisagg.core.policy import ClusterView, Hits, Policy, Reject, WorkerOptions, WorkerStatus
from minidisagg.policies import load_policy

Line = dict[str, Any]
CURIOUS = """
from minidisagg import Policy
from minidisagg.core.messages import Role
from minidisagg.core.policy import Placement, Reject, RoleChange, Victim


class Curious(Policy):
    \"\"\"Decides by all that it can see; `decode` is left open, and roles change with the hour.\"\"\"

    dynamic_order = True

    def admit(self, request, cluster):
        if request.max_tokens > 30 or cluster.waiting_tokens > cluster.max_waiting_tokens:
            return Reject(2.5, f"{request.max_tokens} of {cluster.max_waiting}")
        return None

    def place(self, request, cluster):
        workers = cluster.candidates(Role.DECODE if request.prefill else Role.PREFILL)
        if not workers:
            return Reject(1.0, "all of them flip")
        hits = cluster.hits(request)
        found = max(workers, key=lambda w: (hits[w.name].device, cluster.rng.random()))
        if request.prefill:
            return Placement(request.prefill, found.name)
        return Placement(found.name, found.name if found.role == Role.BOTH and request.prefill_len % 2 else None)

    def rebalance(self, cluster):
        worker = cluster.workers.get("decode-0")
        role = Role.BOTH if cluster.now % 1.5 < 0.75 else Role.DECODE
        return [RoleChange("decode-0", role)] if worker and role not in (worker.role, worker.flipping) else []

    def order(self, request, stage, worker):
        return [stage, request.remaining if worker.free_pages % 2 else request.prefill_len, request.arrival]

    def accept(self, offer, worker):
        return worker.expected < 3 + offer.max_tokens % 2 and offer.prompt_len < 10_000

    def compose(self, batch, worker):
        for request in batch.running:
            batch.add(request)
        for request in sorted(batch.waiting, key=lambda r: r.request_id)[: batch.seqs_left]:
            if not batch.empty and batch.tokens_left < 400:
                break
            batch.add(request, 10 + worker.options.max_num_seqs)

    def evict(self, worker, candidates):
        return Victim(max(candidates, key=lambda r: (r.num_pages, r.num_output, r.arrival))) if candidates else None
"""


# ---------------------------------------------------------------- what a line says, asked again


def work(seen: Line) -> Any:
    """A request, as the log has it."""
    return SimpleNamespace(**seen)


def worker_of(line: Line) -> Any:
    seen = line["worker"]
    lists = {name: [work(one) for one in seen.get(name, ())] for name in ("running", "waiting")}
    costs = msgspec.convert(seen["costs"], StepCosts)
    options = WorkerOptions(**seen["options"])
    return SimpleNamespace(**{**seen, **lists, "options": options, "costs": costs, "now": line["clock"]})


def cluster_of(line: Line) -> ClusterView:
    seen = dict(line["cluster"])
    hits = {name: Hits(*one) for name, one in line.get("hits", {}).items()}
    workers = msgspec.convert(seen.pop("workers"), dict[str, WorkerStatus])
    view = ClusterView(line["clock"], workers, **seen, hits=lambda _: hits)
    if "rng" in line:
        version, state, gauss = line["rng"]
        view.rng.setstate((version, tuple(state), gauss))
    return view


class Builder:
    """Answers as the engine's builder did, as long as it is asked the same."""

    def __init__(self, line: Line, worker: Any) -> None:
        self.running, self.waiting = tuple(worker.running), tuple(worker.waiting)
        self.tokens_left, self.seqs_left = worker.options.max_num_batched_tokens, worker.options.max_num_seqs
        self.told, self.adds = iter(line["answer"]), []

    @property
    def empty(self) -> bool:
        return not any(count for _, _, count in self.adds)

    def add(self, request: Any, limit: int | None = None) -> int:
        name, asked, count = next(self.told)
        assert (name, asked) == (request.request_id, limit)
        self.adds.append([name, limit, count])
        self.tokens_left -= count
        self.seqs_left -= count > 0
        return int(count)


def again(line: Line, policy: Policy) -> Any:
    """The answer of `policy` to what the line's hook was asked."""
    hook = line["hook"]
    if hook == "rebalance":
        return msgspec.to_builtins(policy.rebalance(cluster_of(line)))
    if hook in ("admit", "place"):
        answer = getattr(policy, hook)(SimpleNamespace(**line["request"]), cluster_of(line))
        if answer is None:
            return {"verdict": "accept"}
        always = "prefill", "decode", "retry_after", "reason"
        told = {key: value for key, value in msgspec.to_builtins(answer).items() if value or key in always}
        return ({"verdict": "reject"} if isinstance(answer, Reject) else {}) | told
    worker = worker_of(line)
    if hook == "accept":
        return policy.accept(work(line["request"]), worker)
    if hook == "order":
        return json.loads(json.dumps(policy.order(work(line["request"]), line["stage"], worker)))
    if hook == "evict":
        candidates = [request for request in worker.running if request.request_id in line["candidates"]]
        victim = policy.evict(worker, candidates)
        return victim and victim.request.request_id
    builder: Any = Builder(line, worker)
    policy.compose(builder, worker)
    return builder.adds


# ---------------------------------------------------------------- tests


@needs_two_cores
def test_every_decision_is_written_and_can_be_asked_again(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    (tmp_path / "mine.py").write_text(CURIOUS)
    curious = f"{tmp_path}/mine.py:Curious"

    async def run() -> None:
        shape = cluster.settings("disagg", link="unix", pages=48, policy="sarathi:chunk=24")
        async with cluster.cluster(shape, RunSettings(decision_dir=str(logs))) as frontend:
            await cluster.run_to_end(frontend, cluster.prompts(30, longest=120), cluster.greedy(40))
            frontend.set_policy("fcfs")
            await cluster.run_to_end(frontend, cluster.prompts(2, seed=1), cluster.greedy(4))
            frontend.set_policy(curious)
            load = cluster.Load(frontend)
            rejected = load.submit([1, 2, 3], cluster.greedy(31))
            load.submit_all(cluster.prompts(30, longest=120, seed=2), cluster.greedy(30))
            await load.finished()
            assert rejected.error == f"31 of {sys.maxsize}"
            for role in (Role.BOTH, Role.DECODE):
                await load.until(lambda role=role: frontend.router.view.workers["decode-0"].role == role)
            await frontend.fresh_stats()  # and some ticks, which change nothing

    asyncio.run(run())
    lines = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in logs.iterdir()}
    assert set(lines) == {"router", "prefill-0", "decode-0"}
    every = [line for of_one in lines.values() for line in of_one]
    hooks = {"admit", "place", "rebalance", "accept", "order", "compose", "evict"}
    assert {line["hook"] for line in every if line["policy"] == curious} == hooks
    for line in every:
        assert next(iter(line.items())) == ("version", 2)
        assert again(line, load_policy(line["policy"])) == line["answer"], line

    def asked(who: str, hook: str, *policies: str) -> list[Line]:
        return [line for line in lines[who] if line["hook"] == hook and line["policy"] in policies]

    admitted = asked("router", "admit", "sarathi:chunk=24", "fcfs")
    assert len(admitted) == 32 and all(line["answer"] == {"verdict": "accept"} for line in admitted)
    placed = asked("router", "place", "sarathi:chunk=24", "fcfs")
    assert all(line["answer"] == {"prefill": "prefill-0", "decode": "decode-0"} for line in placed)
    assert set(placed[0]["cluster"]["workers"]) == {"prefill-0", "decode-0"}
    chunks = [[max(n for _, _, n in line["answer"]) for line in asked("prefill-0", "compose", policy) if line["answer"]]
              for policy in ("sarathi:chunk=24", "fcfs")]  # fmt: skip
    assert 0 < max(chunks[0]) <= 24 < max(chunks[1]), "sarathi's chunks first, whole prompts after the change"
    assert all(line["answer"] in line["candidates"] for line in asked("decode-0", "evict", curious) if line["answer"])
    assert any("rng" in line for line in asked("router", "place", curious))
    hits = [line["hits"] for line in asked("router", "place", curious) if "hits" in line]  # not where all of them flip
    assert any(hit for one in hits for pair in one.values() for hit in pair)
    # Of many ticks, those that changed something, and after each of those the first that did not.
    wanted = [line["answer"] for line in asked("router", "rebalance", curious)]
    both, decode = [{"worker": "decode-0", "role": 3}], [{"worker": "decode-0", "role": 2}]
    assert both in wanted and decode in wanted and [] in wanted
    assert not any(one == two == [] for one, two in pairwise(wanted))
    assert [line["answer"] for line in asked("router", "rebalance", "sarathi:chunk=24")] in ([], [[]])


AGAIN = """
import sys
from minidisagg.policies import make_policy
for who in ("router", "decode-0", "router"):
    make_policy("fcfs", who, sys.argv[1]).rebalance
try:
    make_policy("fcfs", "router", sys.argv[2])
except ValueError as error:
    sys.exit(f"refused: {error}")
"""


def test_the_log_of_another_run_is_not_added_to(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "router.jsonl").write_text("{}\n")
    command = [sys.executable, "-c", AGAIN, str(tmp_path / "new" / "A"), str(tmp_path / "used")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"refused: {tmp_path}/used has the decisions of an")
    assert {path.name for path in (tmp_path / "new" / "A").iterdir()} == {"router.jsonl", "decode-0.jsonl"}
    assert (tmp_path / "used" / "router.jsonl").read_text() == "{}\n"
