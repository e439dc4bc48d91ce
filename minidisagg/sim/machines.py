"""What steps and transfers take on a cluster of known devices: profiles for steps, a network card each for KV.

A card sends and receives one piece after the other, each at the wire's speed: what goes to one worker from many waits
for its turn (incast) while its sender sends to others, and what leaves in layer groups overlaps with the step that
computes the others.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections import defaultdict
from collections.abc import Mapping, Sequence

from msgspec import Struct

from minidisagg.core.messages import Role, WorkerOptions
from minidisagg.core.plan import RAW, Piece, StepPlan
from minidisagg.core.spec import EngineSpec
from minidisagg.interconnect import Interconnect
from minidisagg.sim.cost_model import wire_bytes
from minidisagg.sim.profile import Profile, devices, load_profile

ROLES = {"prefill": Role.PREFILL, "decode": Role.DECODE, "both": Role.BOTH}
MAX_SEQS, MAX_TOKENS = 256, 8192  # of a step, as engines for such devices have them
SPREAD = 1021  # draws of a worker's steps, before they come again
Spans = list[tuple[float, float]]  # of seconds, in order
MESSAGE = 100e-6  # seconds of a message between two processes, their event loops included


class Group(Struct, frozen=True):
    """Workers that are alike: so many, of `devices` cards each (tensor parallel)."""

    role: Role
    count: int
    device: str
    devices: int = 1


def parse_cluster(text: str) -> tuple[Group, ...]:
    """`prefill=8@h100,decode=4@a100x2`: workers by role, of which device, and of how many. Raises `ValueError`."""
    groups = []
    for part in text.split(","):
        role, equals, rest = part.strip().partition("=")
        count, at, device = rest.partition("@")
        name, _, devices = device.rpartition("x") if device.rpartition("x")[2].isdigit() else (device, "", "1")
        if role not in ROLES or not (equals and at and count.isdigit() and int(count) and name and int(devices)):
            raise ValueError(
                f"cluster {text!r}: {part.strip()!r} is not ROLE=COUNT@DEVICE[xN] with a role of {', '.join(ROLES)}, "
                "as in prefill=2@h100,decode=1@h100x4"
            )
        groups.append(Group(ROLES[role], int(count), name, int(devices)))
    roles = {role for group in groups for role in Role if group.role & role}
    if not {Role.PREFILL, Role.DECODE} <= roles:
        raise ValueError(f"cluster {text!r} has no worker for {'decode' if Role.PREFILL in roles else 'prefill'}")
    return tuple(groups)


def parse_options(role: str, text: str) -> WorkerOptions:
    """`max_num_seqs=64,chunk=512` over the defaults. Raises `ValueError`."""
    values = {"max_num_seqs": MAX_SEQS, "max_num_batched_tokens": MAX_TOKENS, "chunk": 0}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = part.replace("-", "_").partition("=")
        if key not in values or not value.isdigit() or not (int(value) or key == "chunk"):
            raise ValueError(f"--{role} {part!r}: expected KEY=NUMBER with a key of {', '.join(values)}")
        values[key] = int(value)
    return WorkerOptions(**values)


def find_profile(device: str, model: str, dtype: str, cards: int) -> Profile:
    """Of a device by its name or the beginning of one (`h100`), or in a file. Raises `ValueError`."""
    shipped = devices()
    full = device if device in shipped else next((name for name in shipped if name.startswith(f"{device}_")), device)
    return load_profile(full, model, dtype, cards)


class MachineCosts:
    """The costs of a cluster's workers."""

    def __init__(self, profiles: Mapping[str, Profile], wire: Interconnect, seed: int = 0, spread: bool = True) -> None:
        """`profiles`: of each worker. With `spread`, steps scatter as the profile's own measurements did."""
        self.message = MESSAGE
        self.wire = wire
        self.profiles = profiles
        self._ratios: dict[str, tuple[Sequence[float], Sequence[float]]] = {}  # of decode steps, and with a prompt
        for name, profile in profiles.items():
            rng = random.Random(f"{seed} {name}")
            if spread and profile.residuals:
                decodes, prompts = rng.choices(profile.residuals, k=SPREAD), profile.prompt_residuals
                self._ratios[name] = decodes, rng.choices(prompts, k=SPREAD) if prompts else decodes
        self._sends = defaultdict[str, Spans](list)  # when a worker's card is busy, from now on
        self._receives = defaultdict[str, Spans](list)
        self._links: dict[tuple[str, str], float] = {}  # when the last piece of each has moved

    def steps(self, spec: EngineSpec, plan: StepPlan) -> list[float]:
        """As `Costs` says. By number of the step, so that it takes as long alone as among equal ones."""
        profile, seqs, context = self.profiles[spec.name], 0, 0
        prefill, last = [], 0
        for item in plan.items:
            if item.count == 1:
                seqs += 1
                context += item.start + 1
            else:
                prefill.append((item.start, item.count))
                last += item.sample
        if prefill:
            seconds = [profile.step_seconds(prefill, seqs, context, last)]
        else:
            seconds = profile.decode_seconds(seqs, context, plan.repeat)
        if spec.name not in self._ratios:
            return seconds
        ratios = self._ratios[spec.name][bool(prefill)]
        return [one * ratios[(plan.step_id + n) % SPREAD] for n, one in enumerate(seconds)]

    def transfer(self, source: EngineSpec, dest: str, piece: Piece, now: float) -> tuple[float, float]:
        """As `Costs` says."""
        lanes = min(self.profiles[source.name].tensor_parallel, self.profiles[dest].tensor_parallel)
        takes = wire_bytes(source, piece) / (self.wire.bandwidth * lanes)
        link, cards = (source.name, dest), (self._sends[source.name], self._receives[dest])
        begins = max(now, self._links.get(link, 0.0))  # behind the pieces before it
        for busy in cards:
            while busy and busy[0][1] <= now:
                del busy[0]
        for first, last in sorted([*cards[0], *cards[1]]):
            if begins + takes <= first:
                break
            begins = max(begins, last)
        self._links[link] = done = begins + takes
        for busy in cards:
            _book(busy, begins, done)
        return begins, done + self.wire.latency


def _book(busy: Spans, begins: float, done: float) -> None:
    """What follows at once makes a span longer: of a queue of any length there are few."""
    place = bisect(busy, (begins, done))
    if place and busy[place - 1][1] == begins:
        busy[place - 1] = busy[place - 1][0], done
    else:
        busy.insert(place, (begins, done))


class ClusterSpec(Struct, frozen=True, kw_only=True):
    """What a simulated cluster is built from."""

    groups: tuple[Group, ...]
    model: str = "llama-8b"
    dtype: str = "bfloat16"
    page_size: int = 64
    memory_utilization: float = 0.9
    pages: int = 0  # of each worker; 0: what its memory holds
    prefix_caching: bool = True
    granularity: str = "auto"
    codec: str = RAW
    decode_after: int = 1  # tokens that a prefill worker samples before a decode worker goes on
    wire: Interconnect = Interconnect(50e9, 3e-6)  # 400 Gbit/s
    prefill: WorkerOptions = WorkerOptions(MAX_SEQS, MAX_TOKENS, 0)
    decode: WorkerOptions = WorkerOptions(MAX_SEQS, MAX_TOKENS, 0)
    spread: bool = True

    @property
    def mode(self) -> str:
        """As a benchmark calls it."""
        return "colocated" if all(group.role is Role.BOTH for group in self.groups) else "disagg"

    def options(self, role: Role) -> WorkerOptions:
        """Of workers of this role."""
        return self.prefill if role is Role.PREFILL else self.decode

    def workers(self) -> list[tuple[str, Group]]:
        """Names as the engine gives them."""
        numbers = {role: 0 for role in Role}
        named = []
        for group in self.groups:
            for _ in range(group.count):
                name = {Role.BOTH: "worker", Role.PREFILL: "prefill", Role.DECODE: "decode"}[group.role]
                named.append((f"{name}-{numbers[group.role]}", group))
                numbers[group.role] += 1
        return named
