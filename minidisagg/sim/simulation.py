"""One run of a workload on a simulated cluster: what is offered when, and the records that come of it.

Needs nothing beyond msgspec, so that it runs in a browser too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import msgspec
from msgspec import Struct

from minidisagg.core.checked import PolicyError
from minidisagg.core.granularity import parse_granularity
from minidisagg.core.messages import RequestSpec, Role, SamplingParams
from minidisagg.core.policy import Policy
from minidisagg.core.predictor import Predictor
from minidisagg.core.router import RouterSpec
from minidisagg.core.spec import EngineSpec
from minidisagg.measure.goodput import SLO, parse_slo
from minidisagg.measure.records import (
    COMPLETED,
    NOT_SENT,
    ORACLE,
    UNSENT,
    LinkRecord,
    RequestRecord,
    RunRecord,
    WorkerRecord,
)
from minidisagg.sim.machines import ClusterSpec, MachineCosts, find_profile
from minidisagg.sim.profile import Profile
from minidisagg.sim.recording import Recording
from minidisagg.sim.simulator import Simulator
from minidisagg.sim.world import Outcome, World
from minidisagg.workload.lengths import WorkItem, prompt_tokens
from minidisagg.workload.multiturn import first_turns, rests

LOOK = 4096  # events between two looks at how far it is
PIECE_BYTES = 128 << 20  # that `auto` layer groups weigh at least: a millisecond of a fast wire
TTFT_SLO, TPOT_SLO = 8.0, 2.0  # times the unloaded prefill and decode step, as `bench` derives them
LEASE = 600.0  # seconds that a side of a handoff waits for the other: a policy may leave them waiting for ever
STANDSTILL = 3600.0  # seconds without a step after which nobody will ever do one
FOREVER = 1e9  # seconds: a simulated request waits as long as it takes
UNLIMITED = 1 << 60
VOCABULARY = 1 << 15  # of a session's tokens, which are there, unlike those of a trace
MakePolicy = Callable[[], Policy]


class Settings(Struct, frozen=True, kw_only=True):
    """How a workload is offered, and how it is judged."""

    slo: SLO | str | None = None  # "ttft:400 tpot:30"; None: 8 unloaded prefills of the mean prompt, 2 unloaded steps
    max_concurrency: int | None = None  # closed loop, of so many sessions where the workload has some
    seed: int = 0
    num_warmups: int = 0
    predictor: Predictor = "none"
    equal_steps: bool = True
    time_limit: float = 0.0  # seconds of this process after which it raises TimeoutError; 0: none


class Simulation:
    """One run under way."""

    def __init__(
        self,
        cluster: ClusterSpec,
        make_policy: MakePolicy,
        workload: Sequence[WorkItem],
        settings: Settings,
        profiles: Mapping[str, Profile] | None = None,
        record: Recording | None = None,
    ) -> None:
        """`profiles`: by a group's device, those that are not to be looked up. `record`: where its inputs are kept."""
        if not workload:
            raise ValueError("the workload has no requests")
        self.cluster = cluster
        self.items = {str(item.index): item for item in workload}
        self.profiles = profiles_of(cluster, profiles)
        self.settings = settings
        slo = parse_slo([settings.slo]) if isinstance(settings.slo, str) else settings.slo
        self.slo = slo or derived_slo(cluster, self.profiles, workload)  # what is judged by it says so to the policy
        specs = [self._spec(name, group.role) for name, group in cluster.workers()]
        options = {Role.PREFILL: cluster.prefill, Role.DECODE: cluster.decode, Role.BOTH: cluster.decode}
        router = RouterSpec(
            UNLIMITED, UNLIMITED, FOREVER, FOREVER, FOREVER, settings.seed, settings.predictor, options
        )  # fmt: skip
        costs = MachineCosts(self.profiles, cluster.wire, settings.seed, cluster.spread)
        world = World(
            costs, router=router, seed=settings.seed, check=False, tokens=False, equal_steps=settings.equal_steps,
            record=record,
        )  # fmt: skip
        self.sim = Simulator(specs, make_policy, world)
        self.sim.run_events(len(specs))  # all have said hello when the first request comes
        capacity = min(spec.num_pages for spec in specs) * cluster.page_size
        self._check(workload, capacity)
        self._capacity, self._longest = capacity, max(item.output_len for item in workload)
        self.sent: dict[str, float] = {}
        self.ended = 0.0, 0  # the last request: when, and after how many events
        self._rests = rests(workload)
        self._waiting = sorted(first_turns(workload), key=lambda item: item.arrival_s)[::-1]
        self._coming = 0  # requests whose time is set
        self._left = len(workload)
        self.sim.on_end = self._on_end

    def _check(self, workload: Sequence[WorkItem], capacity: int) -> None:
        for item in workload:
            if item.prompt_len + item.output_len > capacity:
                raise ValueError(
                    f"request {item.index} has {item.prompt_len} + {item.output_len} tokens, more than the KV cache of "
                    f"a worker, {capacity}: clamp the workload, or give the workers more memory"
                )
            if item.blocks and item.block_size % self.cluster.page_size:
                raise ValueError(
                    f"a page of {self.cluster.page_size} tokens does not divide the trace's blocks of "
                    f"{item.block_size}: give --block-size {item.block_size}"
                )

    def _spec(self, name: str, role: Role) -> EngineSpec:
        cluster, profile = self.cluster, self.profiles[name]
        return EngineSpec(
            name, 1, role, pages_of(cluster, profile), cluster.page_size, profile.num_layers, "sim",
            granularity=parse_granularity(cluster.granularity, PIECE_BYTES),
            codec=cluster.codec, decode_after=cluster.decode_after,
            layer_bytes=profile.kv_bytes_per_token * cluster.page_size // profile.num_layers,
            prefix_caching=cluster.prefix_caching, lease=LEASE, link_timeout=FOREVER, step_deadline=FOREVER,
            options=cluster.options(role),
        )  # fmt: skip

    # ------------------------------------------------------------ the load

    def play(self, deadline: float, progress: Callable[[int], None] | None) -> None:
        """To the end of the last request. Raises TimeoutError, and PolicyError where that never comes."""
        if self.settings.max_concurrency is None:
            for item in self._waiting:
                self._plan(item, item.arrival_s)
            self._waiting.clear()
        else:
            burst = [self._waiting.pop() for _ in range(min(self.settings.max_concurrency, len(self._waiting)))]
            for item in burst:  # one that is rejected at once has the next of those that still wait sent
                self._send(item)
        told, steps, since = self._left, 0, self.sim.now
        while self._left:
            self.sim.run_events(LOOK, partial(self._over, deadline))
            if steps != (steps := sum(worker.core.steps for worker in self.sim.workers.values())) or self._coming:
                since = self.sim.now
            elif self.sim.now > since + STANDSTILL:
                raise PolicyError(f"policy {self.sim.router.policy.name}: {self._left} requests would wait for ever")
            if progress is not None:
                progress(told - self._left)
                told = self._left

    def _over(self, deadline: float) -> bool:
        if deadline and time.monotonic() > deadline:
            raise TimeoutError(f"the simulation took more than {self.settings.time_limit:g} s")
        return not self._left

    def _plan(self, item: WorkItem, time: float) -> None:
        self._coming += 1

        def arrive() -> None:
            self._coming -= 1
            self._send(item)

        self.sim.plan(time, arrive)

    def _prompt(self, item: WorkItem) -> Sequence[int]:
        """A session's are tokens, so that the core itself names their pages, and those of the answers in between."""
        if not item.new_len:
            return range(item.prompt_len)
        new = prompt_tokens(item, VOCABULARY, self.settings.seed)
        if not item.turn:
            return new
        before = self.sim.outcomes[str(item.index - 1)]
        return [*before.spec.prompt, *before.tokens, *new]

    def _send(self, item: WorkItem) -> None:
        slo, name = self.slo, str(item.index)
        # A user sets one limit for all outputs, and it is no hint: the longest of them, where the cache can hold it.
        limit = max(item.output_len, min(self._longest, self._capacity - item.prompt_len))
        sampling = SamplingParams(max_tokens=limit, temperature=0.0, ignore_eos=True)
        spec = RequestSpec(
            prompt=self._prompt(item), sampling=sampling, arrival=self.sim.now, session=item.session,
            hashes=page_names(item, self.cluster.page_size) if self.cluster.prefix_caching and not item.new_len else [],
            ends_after=item.output_len,
            slo_ttft=slo.ttft / 1e3 if slo.ttft else None,
            slo_tpot=slo.tpot / 1e3 if slo.tpot else None,
        )  # fmt: skip
        self.sent[name] = self.sim.now
        self.sim.send(name, spec)

    def _on_end(self, request_id: str) -> None:
        outcome, rest = self.sim.outcomes[request_id], self._rests[self.items[request_id].index]
        self._left -= 1
        self.ended = self.sim.now, self.sim.happened
        if rest and outcome.finish in COMPLETED:
            self._plan(rest[0], outcome.token_times[-1] + rest[0].think_s)
            return
        for item in rest:
            self.sent[str(item.index)] = self.sim.now
            self.sim.outcomes[str(item.index)] = Outcome(outcome.spec, finish=UNSENT, error=NOT_SENT)
        self._left -= len(rest)
        if self._waiting:
            self._plan(self._waiting.pop(), self.sim.now)

    # ------------------------------------------------------------ what came of it

    def record(self, policy: str) -> RunRecord:
        """As a benchmark's."""
        requests = []
        for name, at in self.sent.items():
            item, outcome = self.items[name], self.sim.outcomes[name]
            stages = msgspec.structs.asdict(outcome.times) if outcome.times else {}
            stages.pop("e2e", None)
            requests.append(
                RequestRecord(
                    request_id=name, index=item.index, turn=item.turn, scheduled=at, sent=at,
                    prompt_len=item.prompt_len, output_len=item.output_len, token_times=outcome.token_times,
                    finish_reason=outcome.finish, error=outcome.error, rejected=outcome.finish == "reject",
                    stages=stages, handoffs=outcome.handoffs, cached_tokens=outcome.cached_tokens,
                    workers=outcome.workers,
                )
            )  # fmt: skip
        workers, links = [], []
        for name, worker in self.sim.workers.items():
            role = worker.core.scheduler.role.name.lower()
            workers.append(WorkerRecord(name=name, role=role, busy_s=worker.busy))
            links += [
                LinkRecord(
                    source=name, dest=peer, kind="simulated", bytes=sent.bytes, seconds=sent.seconds,
                    transfers=sent.transfers,
                )
                for peer, sent in worker.sent.items()
            ]  # fmt: skip
        return RunRecord(
            label=self.cluster.mode, mode=self.cluster.mode, policy=policy, model=self.cluster.model,
            max_concurrency=self.settings.max_concurrency, seed=self.settings.seed,
            num_warmups=self.settings.num_warmups, requests=requests, workers=workers, links=links,
            wall_s=self.ended[0], marks=[ORACLE] if self.settings.predictor == "oracle" else [],
        )  # fmt: skip


def page_names(item: WorkItem, page_size: int) -> list[bytes]:
    """Of the prompt's full pages: equal where the trace names the same block, else of this request alone."""
    pages = item.prompt_len // page_size
    if not item.blocks:
        return [(1 << 63 | item.index << 24 | page).to_bytes(8, "big") for page in range(pages)]
    each = item.block_size // page_size
    return [(item.blocks[page // each] * each + page % each).to_bytes(8, "big") for page in range(pages)]


def derived_slo(cluster: ClusterSpec, profiles: Mapping[str, Profile], workload: Sequence[WorkItem]) -> SLO:
    """Of the mean prompt alone on the slowest worker for prompts, and for decodes. `profiles`: of each worker."""
    prompt = sum(item.prompt_len for item in workload) // len(workload)
    roles = [(group.role, profiles[name]) for name, group in cluster.workers()]
    prefill = max(profile.step_seconds([(0, prompt)], 0, 0) for role, profile in roles if role & Role.PREFILL)
    step = max(profile.step_seconds((), 1, prompt) for role, profile in roles if role & Role.DECODE)
    return SLO(ttft=max(1, round(TTFT_SLO * prefill * 1e3)), tpot=max(1, round(TPOT_SLO * step * 1e3)))


def profiles_of(cluster: ClusterSpec, given: Mapping[str, Profile] | None = None) -> dict[str, Profile]:
    """Of each worker. Raises `ValueError` where one is not known."""
    found = {
        group: (given or {}).get(group.device)
        or find_profile(group.device, cluster.model, cluster.dtype, group.devices)
        for group in cluster.groups
    }
    return {name: found[group] for name, group in cluster.workers()}


def pages_of(cluster: ClusterSpec, profile: Profile) -> int:
    """KV pages of a worker."""
    return cluster.pages or profile.pages(cluster.page_size, cluster.memory_utilization)


def capacity_of(cluster: ClusterSpec) -> int:
    """Tokens that every worker can hold: no request may be longer."""
    return cluster.page_size * min(pages_of(cluster, profile) for profile in profiles_of(cluster).values())
