"""A workload on a simulated cluster, from Python.

    from minidisagg.sim.simulate import simulate
    result = simulate("sarathi:chunk=512", synth_items("azure-conv-2023", 1000), "prefill=2@h100,decode=2@h100")
    result.score, result.values["p99_ttft"], result.run.requests[0].token_times

The same arguments give the same result to the last bit, so that a search over policies can call it.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import parent_process
from pathlib import Path
from threading import Event, Thread, get_ident
from traceback import walk_stack

from minidisagg.core.checked import Checked, OutOfTime, PolicyError
from minidisagg.core.messages import ROUTER
from minidisagg.core.policy import Policy
from minidisagg.measure.comparison import values_of
from minidisagg.measure.records import RunRecord
from minidisagg.measure.stats import samples_of, void_reasons
from minidisagg.policies import check_hooks, in_time, load_policy, logged, used
from minidisagg.sim.machines import ClusterSpec, parse_cluster
from minidisagg.sim.recording import Recording
from minidisagg.sim.simulation import MakePolicy, Settings, Simulation
from minidisagg.sim.simulator import Simulator
from minidisagg.sim.world import Observer
from minidisagg.workload.lengths import WorkItem

SILENCE = 10.0  # seconds in one hook after which a run without a limit says so

logger = logging.getLogger("minidisagg")


@dataclass(frozen=True)
class Result:
    """What came of a simulation. `score`: requests per second within the SLO, while the load was steady; NaN of a run
    that is void."""

    score: float
    values: dict[str, float]  # statistics as in the tables, in seconds and per second
    run: RunRecord
    events: int
    steps: int
    took: float  # seconds of this process

    def __repr__(self) -> str:
        """Not the run, which is long."""
        p50, p99, met = (self.values.get(name, math.nan) for name in ("p50_ttft", "p99_ttft", "attainment"))
        ttft = f"p50_ttft={p50:.4g}, p99_ttft={p99:.4g}"
        return f"Result(score={self.score:.4g}, {ttft}, attainment={met:.4g}, run={self.run})"


def simulate(
    policy: str | MakePolicy,
    workload: Sequence[WorkItem],
    cluster: str | ClusterSpec,
    settings: Settings = Settings(),  # noqa: B008 - it is frozen
    observers: Sequence[Observer] = (),
    progress: Callable[[int], None] | None = None,
    decisions: str = "",
    record: str = "",
    allow_void: bool = False,
) -> Result:
    """`policy`: a name as for `--policy`, or what makes one for the router and each worker. `progress` is told how many
    requests have ended since it was told before. `decisions`: a directory for the decision log (docs/decisions.md);
    `record`: for what `minidisagg replay` shows.

    Raises `ValueError` for what cannot be, `TimeoutError`, and `PolicyError` in one line that names the hook and, where
    the policy comes from a file, the line in it: also where `admit`, `place`, `order` or `accept` failed for some
    requests only, since who drops the late ones looks fast. With `allow_void` such a run comes back all the same, and
    its score is NaN. The time limit ends a hook that never returns, too; outside of a process's main thread, only what
    comes after one that does.
    """
    if isinstance(cluster, str):
        cluster = ClusterSpec(groups=parse_cluster(cluster))
    if not isinstance(policy, str) and not callable(policy):
        raise ValueError("a policy is named or made here: give its class, as the router and each worker have their own")
    make = partial(load_policy, policy) if isinstance(policy, str) else partial(_made, policy)
    began = time.monotonic()
    with _within(settings.time_limit) if settings.time_limit else _watched(), ExitStack() as files:
        first = make()
        name = policy if isinstance(policy, str) else type(first).__name__
        if parent_process() is None:  # of several processes, the one that a user has started says it
            check_hooks(first)
        recording = files.enter_context(Recording(Path(record), name)) if record else None
        simulation = Simulation(cluster, make, workload, settings, record=recording)
        simulation.sim.observers += observers
        if decisions:
            _log_decisions(simulation.sim, name, Path(decisions), files)
        simulation.play(began + settings.time_limit if settings.time_limit else 0.0, progress)
    run, sim = simulation.record(name), simulation.sim
    if (void := void_reasons(run)) and not allow_void:
        raise PolicyError(void[0])
    values = values_of([samples_of(run, simulation.slo)])
    steps = sum(worker.core.steps for worker in sim.workers.values())
    score = math.nan if void else values.get("request_goodput", 0.0)
    return Result(score, values, run, simulation.ended[1], steps, time.monotonic() - began)


def _made(make: MakePolicy) -> Policy:
    """What it does wrong is told with the line, as of one that is loaded from a file."""
    policy = make()
    policy.file = policy.file or getattr(sys.modules.get(type(policy).__module__), "__file__", None) or ""
    return policy


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Not even a hook that never returns takes longer."""
    try:
        with in_time(seconds, OutOfTime, f"the simulation took more than {seconds:g} s") as begin:
            begin()
            yield
    except OutOfTime as error:
        raise TimeoutError(str(error)) from error


@contextmanager
def _watched() -> Iterator[None]:
    """Without a limit, a hook that never returns is told of, once. It costs the hooks nothing: another thread looks."""
    over, me = Event(), get_ident()

    def look() -> None:
        before = None
        while not over.wait(SILENCE):
            stack = walk_stack(sys._current_frames().get(me))
            asked = next((frame for frame, _ in stack if frame.f_code is Checked._ask.__code__), None)
            if asked is not None and asked is before:
                told = "%s of policy %s has not returned for %g s; a time limit (--time-limit) would end it"
                logger.warning(told, asked.f_locals["hook"], asked.f_locals["self"].name, SILENCE)
                return
            before = asked

    Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _log_decisions(sim: Simulator, spec: str, directory: Path, files: ExitStack) -> None:
    """From here on. Raises `ValueError` where an earlier run has left its own."""
    directory.mkdir(parents=True, exist_ok=True)
    asked = {ROUTER: sim.router.policy} | {name: one.core.scheduler.policy for name, one in sim.workers.items()}
    for who, policy in asked.items():
        try:
            file = files.enter_context((directory / f"{who}.jsonl").open("xb"))
        except FileExistsError:
            raise used(directory) from None
        policy.asks = logged(policy.asks, spec, who, file.write)
