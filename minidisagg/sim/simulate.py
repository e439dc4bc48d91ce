"""A workload on a simulated cluster, from Python.

    from minidisagg.sim.simulate import simulate
    result = simulate("sarathi:chunk=512", synth_items("azure-conv-2023", 1000), "prefill=2@h100,decode=2@h100")
    result.score, result.values["p99_ttft"], result.run.requests[0].token_times

The same arguments give the same result to the last bit, so that a search over policies can call it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from minidisagg.core.checked import OutOfTime, PolicyError
from minidisagg.core.messages import ROUTER
from minidisagg.measure.comparison import values_of
from minidisagg.measure.records import RunRecord
from minidisagg.measure.stats import samples_of, void_reasons
from minidisagg.policies import in_time, load_policy, logged, used
from minidisagg.sim.machines import ClusterSpec, parse_cluster
from minidisagg.sim.recording import Recording
from minidisagg.sim.simulation import MakePolicy, Settings, Simulation
from minidisagg.sim.simulator import Simulator
from minidisagg.sim.world import Observer
from minidisagg.workload.lengths import WorkItem


@dataclass(frozen=True)
class Result:
    """What came of a simulation. `score`: requests per second within the SLO, while the load was steady."""

    score: float
    values: dict[str, float]  # statistics as in the tables, in seconds and per second
    run: RunRecord
    events: int
    steps: int
    took: float  # seconds of this process


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
    its score is none. The time limit ends a hook that never returns, too; outside of a process's main thread, only
    what comes after one that does.
    """
    if isinstance(cluster, str):
        cluster = ClusterSpec(groups=parse_cluster(cluster))
    if not isinstance(policy, str) and not callable(policy):
        raise ValueError("a policy is named or made here: give its class, as the router and each worker have their own")
    make = partial(load_policy, policy) if isinstance(policy, str) else policy
    began = time.monotonic()
    with _within(settings.time_limit), ExitStack() as files:
        name = policy if isinstance(policy, str) else type(policy()).__name__
        recording = files.enter_context(Recording(Path(record), name)) if record else None
        simulation = Simulation(cluster, make, workload, settings, record=recording)
        simulation.sim.observers += observers
        if decisions:
            _log_decisions(simulation.sim, name, Path(decisions), files)
        simulation.play(began + settings.time_limit if settings.time_limit else 0.0, progress)
    run, sim = simulation.record(name), simulation.sim
    if (void := void_reasons(run)) and not allow_void:
        raise PolicyError(void[0])
    values = values_of([samples_of(run, simulation.settings.slo)])
    steps = sum(worker.core.steps for worker in sim.workers.values())
    return Result(values.get("request_goodput", 0.0), values, run, simulation.ended[1], steps, time.monotonic() - began)


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Not even a hook that never returns takes longer."""
    try:
        with in_time(seconds, OutOfTime, f"the simulation took more than {seconds:g} s") as begin:
            begin()
            yield
    except OutOfTime as error:
        raise TimeoutError(str(error)) from error


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
