"""The playground's Python: one workload on two simulated clusters, and all that the page shows of it.

It runs in the page's worker and under CPython alike, and gives the same numbers to the last digit. Side A is colocated,
side B disaggregated: the same devices, the same requests at the same times, the same luck of every step. The statistics
are those of `measure/stats.py`, which needs numpy, and so is not here.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple, NoReturn

import msgspec
from msgspec import Meta, Struct, field

from minidisagg.core.accounts import StalledError
from minidisagg.core.checked import PolicyError
from minidisagg.core.messages import Envelope, Role, StepOutput
from minidisagg.core.policy import HOOKS, Policy
from minidisagg.core.rehearsal import rehearse
from minidisagg.core.tracked import Emit
from minidisagg.interconnect import PRESETS, Interconnect
from minidisagg.measure.goodput import SLO
from minidisagg.measure.records import STAGES, TRIM, RequestRecord, RunRecord
from minidisagg.policies import load_policy, names
from minidisagg.sim import profile, simulation
from minidisagg.sim.machines import ClusterSpec, Group
from minidisagg.workload.arrivals import arrival_times
from minidisagg.workload.lengths import WorkItem, random_items, with_arrivals

MINE = "mine"  # the policy in the editor
FILE = "<your policy>"  # what it is compiled as: how its lines are known in a traceback
PATIENCE = 900.0  # virtual seconds without an arrival or an end, after which nothing will ever come
LATENCY = PRESETS["400g-ib"].latency
Workers = Annotated[int, Meta(ge=1, le=64)]
Tokens = Annotated[int, Meta(ge=1, le=1 << 17)]
Tell = Callable[[str, int], object]  # which side, and how many of its requests have ended


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the page's inputs say, and what they say at first."""

    profile: str = "h100_sxm llama-8b bfloat16 tp1"
    prefill: Workers = 2
    decode: Workers = 2
    rate: Annotated[float, Meta(gt=0, le=1e5)] = 36.0  # requests per second
    prompt: Tokens = 2000  # tokens, mean
    output: Tokens = 100
    spread: Annotated[float, Meta(ge=0, lt=1)] = 0.5  # of both lengths
    gbps: Annotated[float, Meta(gt=0)] = 400.0  # of each worker's network card
    requests: Annotated[int, Meta(ge=3, le=20_000)] = 400
    seed: int = 0
    baseline: str = "fcfs"  # side A's policy, as for `--policy`, or "mine"
    source: str = field(default_factory=lambda: (Path(__file__).parent / "mine.py").read_text(encoding="utf-8"))


class PlayError(Exception):
    """Told where it belongs: `where` is "policy" or "settings", `line` one of the policy's, or 0."""

    def __init__(self, message: str, where: str = "settings", line: int = 0) -> None:
        super().__init__(message)
        self.where, self.line = where, line


# ---------------------------------------------------------------- the policy in the editor


class Edited:
    """A policy's source. Its class is `Mine`, or what it calls `POLICY`, or the last one that it defines."""

    def __init__(self, source: str) -> None:
        self.source, self.raised = source, ""
        self.line = 0  # where a hook raised last
        module = ModuleType("mine")
        try:
            exec(compile(source, FILE, "exec"), vars(module))
        except Exception as error:
            self._fail(error)
        own = [of for of in vars(module).values() if isinstance(of, type) and of.__module__ == "mine"]
        last = [of for of in own if issubclass(of, Policy)][-1:]
        found = getattr(module, "Mine", None) or getattr(module, "POLICY", None) or (last and last[0])
        if not (isinstance(found, type) and issubclass(found, Policy)):
            raise PlayError("there is no class here like `class Mine(Policy)`", "policy")
        changed = [name for name in HOOKS if getattr(found, name) is not getattr(Policy, name)]
        noted: dict[str, Any] = {name: self._noted(getattr(found, name)) for name in changed}
        self.found = type(found.__name__, (found,), noted | {"equal_steps": found.equal_steps})

    def make(self) -> Policy:
        """An instance, for the router or a worker."""
        try:
            return self.found()
        except Exception as error:
            self._fail(error)

    def line_of(self, message: str) -> int:
        """The line that a `PolicyError` is about: what raised, or the hook whose answer is wrong."""
        if "raised" in message:
            return self.line
        hook = re.search(r"policy \w+: (\w+) ", message)
        defined = re.search(rf"^[ \t]+def {hook[1]}\b", self.source, re.MULTILINE) if hook else None
        return self.source.count("\n", 0, defined.start()) + 1 if defined else 0

    def _noted(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any) -> Any:
            try:
                return hook(*args)
            except PolicyError:
                raise  # of another hook, asked meanwhile
            except Exception as error:
                self.line = _line(error)
                raise

        return ask

    def _fail(self, error: Exception) -> NoReturn:
        what = error.msg if isinstance(error, SyntaxError) else error
        raise PlayError(f"{type(error).__name__}: {what}", "policy", _line(error)) from error


def _line(error: Exception) -> int:
    """The last one of the edited file that an error went through."""
    lines, trace = [0], error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == FILE:
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return (error.lineno or 0) if isinstance(error, SyntaxError) and error.filename == FILE else lines[-1]


# ---------------------------------------------------------------- one side


class Steps:
    """What every step was, by columns, as the page draws it; it ends a run in which a request fails."""

    def __init__(self, workers: Sequence[str]) -> None:
        self.numbers = {name: number for number, name in enumerate(workers)}
        self.columns: dict[str, list[float]] = {
            name: [] for name in ("worker", "begin", "seconds", "prefill", "decode")
        }  # fmt: skip

    def on_message(self, envelope: Envelope, now: float) -> None:
        step = envelope.body
        if not isinstance(step, StepOutput) or not step.seconds:
            return
        ends = step.ends or [step.clock]
        for begin, end in pairwise([ends[-1] - step.seconds, *ends]):
            row = self.numbers[envelope.source], begin, end - begin, step.prefill_tokens, step.decode_tokens
            for column, value in zip(self.columns.values(), row, strict=True):
                column.append(round(value, 6))

    def on_emit(self, emit: Emit, now: float) -> None:
        if emit.finish == "error":
            raise PolicyError(emit.error)


class Side(NamedTuple):
    """One cluster and its policy."""

    label: str
    policy: str
    cluster: ClusterSpec
    make: Callable[[], Policy]
    edited: Edited | None  # None: a policy that ships

    def play(self, items: Sequence[WorkItem], how: simulation.Settings, tell: Tell) -> tuple[RunRecord, Steps]:
        """Raises `PlayError`."""
        workers = {name: (group.role, self.cluster.options(group.role)) for name, group in self.cluster.workers()}
        try:
            rehearse(self.make, workers)
            run = simulation.Simulation(self.cluster, self.make, items, how)
            steps = Steps([*workers])
            run.sim.observers.append(steps)
            run.play(0.0, self._progress(run, items[-1].arrival_s, tell))
        except (PolicyError, StalledError) as error:
            if self.edited is None:
                raise PlayError(f"{self.label}: {error}") from error
            raise PlayError(str(error), "policy", self.edited.line_of(str(error))) from error
        except ValueError as error:
            raise PlayError(str(error)) from error
        return run.record(self.policy), steps

    def _progress(self, run: simulation.Simulation, last: float, tell: Tell) -> Callable[[int], None]:
        ended, since = 0, 0.0

        def progress(more: int) -> None:
            nonlocal ended, since
            ended += more
            since = run.sim.now if more else max(since, last)
            if run.sim.now > since + PATIENCE:
                raise PolicyError(f"{len(run.items) - ended} requests never end: no hook lets them go on")
            tell(self.label, ended)

        return progress


def _sides(settings: Settings) -> list[Side]:
    if settings.profile not in profile.names():
        raise PlayError(f"no profile {settings.profile!r}")
    device, model, dtype, cards = settings.profile.split()
    own = Edited(settings.source)
    sides = []
    for label, policy in ("colocated", settings.baseline), ("disagg", MINE):
        counts = {Role.PREFILL: settings.prefill, Role.DECODE: settings.decode}
        if label == "colocated":
            counts = {Role.BOTH: settings.prefill + settings.decode}
        groups = tuple(Group(role, count, device, int(cards.removeprefix("tp"))) for role, count in counts.items())
        wire = Interconnect(settings.gbps * 1e9 / 8, LATENCY)
        cluster = ClusterSpec(groups=groups, model=model, dtype=dtype, wire=wire)
        make = own.make if policy == MINE else partial(load_policy, policy)
        sides.append(Side(label, policy, cluster, make, own if policy == MINE else None))
    return sides


# ---------------------------------------------------------------- numbers


def measured(run: RunRecord, slo: SLO) -> dict[str, float]:
    """The statistics of `measure/stats.py`: of the requests between warm-up and drain, and rates of that time."""
    requests = sorted(run.requests, key=lambda r: (r.scheduled, r.index))
    cut = math.ceil(TRIM * len(requests))
    kept = requests[cut : len(requests) - cut]
    begin, end = kept[0].scheduled, requests[len(requests) - cut].scheduled
    done = [request for request in kept if request.ok]
    longer = [request for request in done if len(request.token_times) > 1]
    ttft = [request.token_times[0] - request.scheduled for request in done]
    tokens = sum(begin <= t < end for request in requests for t in request.token_times)
    met = [slo.met_by(request) for request in kept]
    return {
        "p50_ttft": quantile(ttft, 0.5),
        "p99_ttft": quantile(ttft, 0.99),
        "p50_ttst": quantile([request.token_times[1] - request.scheduled for request in longer], 0.5),
        "mean_tpot": mean([(r.token_times[-1] - r.token_times[0]) / (len(r.token_times) - 1) for r in longer]),
        "p99_itl": quantile([gap for request in longer for gap in _gaps(request)], 0.99),
        "output_throughput": tokens / (end - begin),
        "request_goodput": sum(met) / (end - begin),
        "attainment": sum(met) / len(met),
    }


def _gaps(request: RequestRecord) -> list[float]:
    """Between tokens, without the handoff's."""
    return [b - a for i, (a, b) in enumerate(pairwise(request.token_times)) if i not in request.handoffs]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def quantile(values: Sequence[float], q: float) -> float:
    """As numpy interpolates, to the last digit."""
    if not values:
        return math.nan
    ordered, place = sorted(values), (len(values) - 1) * q
    low = ordered[int(place)]
    high, share = ordered[min(int(place) + 1, len(values) - 1)], place - int(place)
    return high - (high - low) * (1 - share) if share >= 0.5 else low + (high - low) * share


# ---------------------------------------------------------------- what the page calls


def describe() -> dict[str, Any]:
    """What there is to choose from."""
    shipped = {name: inspect.getsource(import_module(f"minidisagg.policies.{name}")) for name in names()}
    defaults = msgspec.structs.asdict(Settings())
    policies = {"example": defaults.pop("source"), **shipped}
    return {"policies": policies, "profiles": profile.names(), "defaults": defaults}


def run(settings: dict[str, Any], tell: Tell = lambda label, ended: None) -> dict[str, Any]:
    """Both sides. What the user has done wrong comes as {"error": {"message", "where", "line"}}."""
    try:
        return _run(settings, tell)
    except PlayError as error:
        return {"error": {"message": str(error), "where": error.where, "line": error.line}}


def _run(given: dict[str, Any], tell: Tell) -> dict[str, Any]:
    try:
        settings = msgspec.convert(given, Settings)
        items = random_items(settings.requests, settings.prompt, settings.output, settings.spread, settings.seed)
        items = with_arrivals(items, arrival_times(settings.requests, settings.rate, seed=settings.seed))
        sides = _sides(settings)
        load_policy("fcfs" if settings.baseline == MINE else settings.baseline)
        cluster = sides[0].cluster
        slo = simulation.derived_slo(cluster, simulation.profiles_of(cluster), items)
    except (ValueError, msgspec.ValidationError) as error:
        raise PlayError(str(error)) from error
    how = simulation.Settings(slo=slo, seed=settings.seed)
    values, drawn = [], []
    for side in sides:
        record, steps = side.play(items, how, tell)
        values.append(measured(record, slo))
        drawn.append(_drawn(side, record, steps))
    a, b = values
    table = {name: {"a": a[name], "b": b[name], "ratio": b[name] / a[name] if a[name] else math.nan} for name in a}
    lengths = [(item.prompt_len, item.output_len) for item in items]
    return {"slo": msgspec.structs.asdict(slo), "table": table, "lengths": lengths, "sides": drawn}


def _drawn(side: Side, record: RunRecord, steps: Steps) -> dict[str, Any]:
    """`requests`: when each came, then the seconds of its stages, which are none if it was turned away."""
    requests = [
        [round(value, 6) for value in (one.scheduled, *(one.stages.get(stage, 0.0) for stage in STAGES))]
        for one in sorted(record.requests, key=lambda one: one.index)
    ]
    return {
        "label": side.label, "policy": side.policy, "workers": [*steps.numbers], "wall": record.wall_s,
        "busy": [worker.busy_s / record.wall_s for worker in record.workers], "steps": steps.columns,
        "requests": requests, "rejected": sum(one.rejected for one in record.requests),
        "gigabytes": sum(link.bytes for link in record.links) / 1e9,
    }  # fmt: skip


def run_json(settings: str, tell: Tell) -> str:
    """`run`, for the page. A number that is none is null."""
    return msgspec.json.encode(run(msgspec.json.decode(settings), tell)).decode()


def describe_json() -> str:
    return msgspec.json.encode(describe()).decode()
