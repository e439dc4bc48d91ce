"""What a search over policies from Python relies on: a score is a score, nothing leaks from one run into the next, and
no policy keeps it waiting for ever."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from minidisagg.cli import cli
from minidisagg.core.checked import PolicyError
from minidisagg.core.policy import Batch, ClusterView, Placement, Policy, Reject, RequestView, Work, WorkerView
from minidisagg.measure.goodput import SLO
from minidisagg.sim.machines import ClusterSpec, parse_cluster
from minidisagg.sim.simulate import Result, simulate
from minidisagg.sim.simulation import Settings, derived_slo, profiles_of
from minidisagg.workload.lengths import WorkItem, random_items, with_arrivals

DISAGG = ClusterSpec(groups=parse_cluster("prefill=2@h100,decode=2@h100"))


def load(count: int, rate: float) -> list[WorkItem]:
    return with_arrivals(random_items(count, 900, 60, 0.9), [number / rate for number in range(count)])


def file_of(directory: Path, *body: str) -> str:
    path = directory / "mine.py"
    path.write_text("\n".join(("from minidisagg import Policy", "class Mine(Policy):", *(f"    {b}" for b in body))))
    return f"{path}:Mine"


def decided(result: Result) -> list[object]:
    return [(r.request_id, r.workers, r.token_times, r.rejected) for r in result.run.requests]


# ---------------------------------------------------------------- what a policy may not write


class Greedy(Policy):
    def order(self, request: Work, stage: str, worker: WorkerView) -> Any:
        worker.options.max_num_seqs = 9999  # type: ignore[misc]


class Insatiable(Policy):
    def compose(self, batch: Batch, worker: WorkerView) -> None:
        batch.tokens_left = 10**9  # type: ignore[misc]


@pytest.mark.parametrize(("policy", "hook"), [(Greedy, "order"), (Insatiable, "compose")])
def test_a_policy_cannot_raise_its_budgets_nor_those_of_the_next_run(policy: type[Policy], hook: str) -> None:
    before, options = decided(simulate("fcfs", load(20, 40.0), DISAGG)), str(ClusterSpec(groups=DISAGG.groups))
    with pytest.raises(PolicyError, match=rf"policy {policy.__name__}: {hook} raised \w+Error: "):
        simulate(policy, load(20, 40.0), DISAGG)
    assert str(ClusterSpec(groups=DISAGG.groups)) == options
    assert decided(simulate("fcfs", load(20, 40.0), DISAGG)) == before


# ---------------------------------------------------------------- the SLO


@pytest.mark.parametrize("policy", ["polyserve", "early_rejection"])
def test_a_policy_goes_by_the_slo_that_it_is_judged_by(policy: str) -> None:
    """Also by one that is derived; these would else go by defaults of their own."""
    items = load(150, 300.0)
    slo = derived_slo(DISAGG, profiles_of(DISAGG), items)
    derived, given = (simulate(policy, items, DISAGG, settings) for settings in (Settings(), Settings(slo=slo)))
    assert decided(derived) == decided(given) and derived.score == given.score


def test_requests_say_what_they_are_judged_by() -> None:
    seen = set[tuple[float | None, float | None]]()

    class Looks(Policy):
        def admit(self, request: RequestView, cluster: ClusterView) -> None:
            seen.add((request.slo_ttft, request.slo_tpot))

    items = load(10, 10.0)
    simulate(Looks, items, DISAGG)
    slo = derived_slo(DISAGG, profiles_of(DISAGG), items)
    assert slo.ttft and slo.tpot and seen == {(slo.ttft / 1e3, slo.tpot / 1e3)}


# ---------------------------------------------------------------- time

# The alarm may come in a callback of the garbage collector's, where Python tells of an exception and drops it: it comes
# again.
alarmed = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def refused(limit: float, policy: str | Callable[[], Policy]) -> str:
    """Of a run that would take longer; what it says."""
    began, before = time.monotonic(), signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeoutError, match=f"^the simulation took more than {limit:g} s") as caught:
        simulate(policy, load(3000, 2000.0), DISAGG, Settings(time_limit=limit))
    assert time.monotonic() - began < limit + 1.0 and signal.getsignal(signal.SIGALRM) is before
    return str(caught.value)


@pytest.mark.parametrize("hook", ["place", "compose", "evict", "__init__"])
@alarmed
def test_a_hook_that_never_returns_does_not_keep_anybody(hook: str, tmp_path: Path) -> None:
    loop = "    try:", "        while True: pass", "    except Exception:", "        pass"
    policy = file_of(tmp_path, f"def {hook}(self, *_):", *loop)
    small = ClusterSpec(groups=DISAGG.groups, pages=30)
    with pytest.raises(TimeoutError) as caught:
        simulate(policy, load(60, 2000.0), small, Settings(time_limit=0.6))
    where = rf", in {hook} of policy Mine \({tmp_path}/mine.py, line 5\)"
    assert re.match(f"the simulation took more than 0.6 s{where if hook != '__init__' else ''}", str(caught.value))


class Slow(Policy):
    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        time.sleep(0.005)
        return super().place(request, cluster)


@alarmed
def test_a_slow_policy_is_stopped_in_any_thread() -> None:
    refused(0.3, Slow)
    said = list[str]()
    thread = threading.Thread(target=lambda: said.append(refused(0.3, Slow)))
    thread.start()
    thread.join()
    assert said == ["the simulation took more than 0.3 s"]


def test_a_run_without_a_limit_leaves_alarms_alone() -> None:
    left = []

    class Looks(Policy):
        def admit(self, request: RequestView, cluster: ClusterView) -> None:
            left.append(signal.getitimer(signal.ITIMER_REAL)[0])

    before, every = signal.setitimer(signal.ITIMER_REAL, 500.0)
    try:
        simulate(Looks, load(9, 10.0), DISAGG)
    finally:
        signal.setitimer(signal.ITIMER_REAL, before, every)
    assert min(left) > 400


def test_without_a_limit_a_hook_that_does_not_return_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("minidisagg.sim.simulate.SILENCE", 0.1)

    class Late(Policy):
        def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
            until = time.monotonic() + 0.6 * (request.request_id in "57")
            while time.monotonic() < until:
                pass
            return super().place(request, cluster)

    simulate(Late, load(9, 10.0), DISAGG)
    assert [record.message for record in caplog.records] == [
        "place of policy Late has not returned for 0.1 s; a time limit (--time-limit) would end it"
    ]
    simulate("fcfs", load(200, 10.0), DISAGG)
    assert len(caplog.records) == 1


# ---------------------------------------------------------------- hooks that fail


class Nothing(Policy):
    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        return None  # type: ignore[return-value]


class Idle(Policy):
    def evict(self, worker: WorkerView, candidates: Sequence[Work]) -> None:
        return None


@pytest.mark.parametrize("as_file", [True, False])
def test_a_class_is_told_with_its_line_and_a_standstill_as_any_failure(as_file: bool, tmp_path: Path) -> None:
    where, policies = Path(__file__), [Nothing, Idle]
    if as_file:
        where = tmp_path / "mine.py"
        where.write_text("\n".join(inspect.getsource(one) for one in policies))
        where.write_text("from __future__ import annotations\nfrom minidisagg import Policy\n" + where.read_text())
    place, evict = (f"{where}:{one.__name__}" if as_file else one for one in policies)
    line = where.read_text().splitlines().index
    at = line(
        "    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:",
        line("class Nothing(Policy):"),
    )
    with pytest.raises(PolicyError, match=rf"place answered None, not .* \({where}, line {at + 1}\)$"):
        simulate(place, load(9, 10.0), DISAGG)
    at = line("    def evict(self, worker: WorkerView, candidates: Sequence[Work]) -> None:")
    with pytest.raises(PolicyError, match=rf"and policy Idle plans nothing \({where}, line {at + 1}\)$"):
        simulate(evict, load(60, 2000.0), ClusterSpec(groups=DISAGG.groups, pages=30))


def test_a_hook_that_is_misspelt_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(Policy):
        def oder(self, request: Work, stage: str, worker: WorkerView) -> int:
            return request.prefill_len

    for _ in range(2):
        simulate(Odd, load(9, 10.0), DISAGG)
    assert [record.message for record in caplog.records] == [
        "policy Odd: oder is no hook, and is never asked: is it to be order?",
        "policy Odd has no hook of its own: it decides as fcfs does",
    ]


def test_a_result_is_printed_in_a_line() -> None:
    result = simulate("fcfs", load(20, 40.0), DISAGG, Settings(slo="ttft:400 tpot:30"))
    assert 0 < len(repr(result)) < 300 and "20 requests" in repr(result.run)
    for told in (f"score={result.score:.4g}", f"p99_ttft={result.values['p99_ttft']:.4g}", "attainment="):
        assert told in repr(result)


def test_an_slo_may_be_written_as_on_the_command_line() -> None:
    texts = "ttft:30 tpot:9", SLO(ttft=30.0, tpot=9.0)
    said, meant = (simulate("fcfs", load(60, 40.0), DISAGG, Settings(slo=slo)) for slo in texts)
    assert said.values == meant.values and 0 < said.values["attainment"] < 1
    with pytest.raises(ValueError, match="unknown SLO 'tft:90'"):
        simulate("fcfs", load(9, 10.0), DISAGG, Settings(slo="tft:90"))


@pytest.mark.parametrize("hook", ["admit", "place", "order", "accept"])
def test_what_a_hook_lets_fall_is_no_score(hook: str, tmp_path: Path) -> None:
    """Whoever lets the late ones fall has a low p99."""
    policy = file_of(
        tmp_path, f"def {hook}(self, request, *more):", "    if request.request_id.endswith('7'):",
        "        raise KeyError(request.prompt_len)", f"    return super().{hook}(request, *more)",
    )  # fmt: skip
    said = rf"^2 requests failed, since policy Mine: {hook} raised KeyError: \d+ \({tmp_path}/mine.py, line 5\)$"
    with pytest.raises(PolicyError, match=said):
        simulate(policy, load(20, 40.0), DISAGG)
    result = simulate(policy, load(20, 40.0), DISAGG, allow_void=True)
    assert sum(not request.ok for request in result.run.requests) == 2
    assert math.isnan(result.score), "no search takes it for a good one"


def test_who_rejects_has_a_score() -> None:
    class Choosy(Policy):
        def admit(self, request: RequestView, cluster: ClusterView) -> Reject | None:
            return Reject(1.0, "no") if request.prompt_len > 900 else None

    result = simulate(Choosy, load(60, 40.0), DISAGG)
    assert result.score > 0 and sum(request.rejected for request in result.run.requests) > 10


def test_a_search_for_goodput_tells_of_failures_and_rejections(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = file_of(
        tmp_path, "def admit(self, request, cluster):", "    from minidisagg.core.policy import Reject",
        "    if request.request_id == '33':", "        return Reject(1.0, 'no')",
        "    if cluster.now > 0.1 and request.request_id == '47':", "        raise KeyError(1)",
    )  # fmt: skip
    args = ["--compare", f"fcfs,{policy}", "--find-goodput", "--num-prompts", "60", "--result-dir", str(tmp_path / "r")]
    cli.main(["simulate", *args], standalone_mode=False)
    (directory,) = (tmp_path / "r").iterdir()
    result, out = json.loads((directory / "result.json").read_text()), " ".join(capsys.readouterr().out.split())
    assert result["verdict"].startswith("Void, no verdict") and "void: Mine: " in out
    (void,) = result["void"]
    assert re.match(r"Mine: 1 request failed, since policy Mine: admit raised KeyError: 1 ", void)
    assert any(re.match(r"Mine: \d+ of \d+ requests were rejected", mark) for mark in result["marks"])
    assert out.count("admit raised KeyError") == 1


def test_what_the_page_shows_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs/simulate.md").read_text()
    seen: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        exec(compile(block, "docs/simulate.md", "exec"), seen)
    assert repr(seen["result"]) in capsys.readouterr().out and 0 < seen["result"].values["attainment"] <= 1


# ---------------------------------------------------------------- runs side by side


def workers_of(parent: int) -> set[int]:
    """The processes that compute for it: those of its session which the fork server has started."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = stat.read_text().rpartition(")")
            state, above, _, session = rest.split()[:4]
            if int(session) == parent != int(above) and state != "Z" and int(name.split()[0]) != parent:
                found.add(int(name.split()[0]))
    return found


def wait_for(true: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not (done := true()) and time.monotonic() < until:
        time.sleep(0.05)
    return done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("command", [["simulate", "--repeats", "4"], ["league", "--policies", "fcfs"]])
def test_a_signal_to_the_command_alone_ends_all_of_it(command: list[str], number: int, tmp_path: Path) -> None:
    asked = [sys.executable, "-m", "minidisagg", *command, "--num-prompts", "20000", "-j", "2"]
    with subprocess.Popen(asked, cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL) as main:
        try:
            assert wait_for(lambda: len(workers_of(main.pid)) == 2, 60.0)
            time.sleep(1.0)  # they compute
            main.send_signal(number)
            assert main.wait(5.0) == (-signal.SIGKILL if number == signal.SIGKILL else 128 + signal.SIGINT)
            assert wait_for(lambda: not workers_of(main.pid), 5.0)
        finally:
            for pid in workers_of(main.pid) | {main.pid}:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
