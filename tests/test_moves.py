"""KV that moves: handoffs at any token, migrations, prefixes fetched, replicated and returned change no token."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import msgspec
import pytest
import simfuzz
from cluster import (
    PAGE_BYTES,
    STORES_OF_TESTS,
    Load,
    assert_clean,
    cluster,
    greedy,
    needs_two_cores,
    policy_file,
    prompts,
    run_to_end,
    settings,
)
from stepwise import spec

from minidisagg.config import ClusterSettings, RunSettings
from minidisagg.core.blocks import PageState
from minidisagg.core.effects import Effect, LoadPages, SavePage
from minidisagg.core.inputlog import read_entries
from minidisagg.core.inputs import Loaded, Received
from minidisagg.core.messages import KVDone, KVOffer, RequestSpec, Role, StoreStats, Submit
from minidisagg.core.plan import Piece
from minidisagg.core.policy import (
    ClusterView,
    Hits,
    Placement,
    Policy,
    Replica,
    RequestView,
    RoleChange,
    Work,
    WorkerOptions,
    WorkerView,
)
from minidisagg.core.spec import EngineSpec
from minidisagg.core.tracked import Stage, Tracked
from minidisagg.server.history import History
from minidisagg.server.metrics import Metrics
from minidisagg.sim.cost_model import LinearCost
from minidisagg.sim.simulator import Simulator
from minidisagg.sim.world import World

OUTPUT = 32
LONG = list(range(100, 148))
PROMPTS = prompts(48, seed=3)
MOVER = """
from minidisagg import Policy
from minidisagg.core.messages import Role
from minidisagg.core.policy import Migration, Placement, Replica


class Mover(Policy):
    def place(self, request, cluster):
        rng = cluster.rng
        split = rng.choice([None, rng.randint(1, request.prefill_len + 20)])
        fetch = rng.choice([None, rng.choice(list(cluster.workers))])
        where = [rng.choice(cluster.candidates(role)).name for role in (Role.PREFILL, Role.DECODE)]
        return Placement(*where, None, split, fetch, True)

    def rebalance(self, cluster):
        rng, names = cluster.rng, sorted(cluster.workers)
        changes = [Migration(r, rng.choice(names[:2])) for r in cluster.requests() if rng.random() < 0.7]
        return changes + [Replica(r, *rng.sample(names, 2)) for r in cluster.requests()[:1]]
"""


def shape(link: str, granularity: str = "auto", pages: int = 400) -> ClusterSettings:
    """A prefill worker and two that decode."""
    made = settings("disagg", link, pages, policy=policy_file(MOVER), granularity=granularity, chunk=16)
    return msgspec.structs.replace(made, decode_workers=2)


async def tokens_of(made: ClusterSettings, run: RunSettings, count: int = len(PROMPTS)) -> list[list[int]]:
    """Of so many prompts, and then of each answer as a prompt that goes on, as the next turn of a conversation."""
    async with cluster(made, run) as frontend:
        load = Load(frontend)
        first = load.submit_all(PROMPTS[:count], greedy(OUTPUT))
        await load.finished()
        await asyncio.sleep(0.3)  # what goes back is under way
        load.submit_all([[*one.prompt, *one.tokens, 7, 8, 9] for one in first], greedy(OUTPUT))
        await load.finished()
        await assert_clean(frontend)
    assert {one.finish for one in load.results} == {"length"}, [one.error for one in load.results if one.error][:3]
    return [one.tokens for one in load.results]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """One colocated worker's."""
    return asyncio.run(tokens_of(settings("colocated", pages=400), RunSettings()))


@pytest.fixture(autouse=True)
def more_workers_than_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    cpus = [[0], [1], [1]]
    monkeypatch.setattr("minidisagg.runtime.launch.assign_cpus", lambda made: cpus[: len(made.roles())])
    yield


def handoffs(logs: Path) -> Counter[str]:
    """What came of all offers that were seen to their end, by the inputs of the workers."""
    found: Counter[str] = Counter()
    for path in logs.glob("*-*.inputs"):
        offers: dict[tuple[str, int], KVOffer] = {}
        with path.open("rb") as file:
            for entry, _ in read_entries(file)[1]:
                body = entry.what.envelope.body if isinstance(entry.what, Received) else None
                if isinstance(body, KVOffer):
                    offers[body.request_id, body.incarnation] = body
                elif isinstance(body, KVDone) and (offer := offers.get((body.request_id, body.incarnation))):
                    beyond = len(offer.spec.emitted) + len(body.tokens)
                    kind = f"copy{offer.request_id[-1]}" if offer.prefix else "decoding" if beyond > 1 else "prompt"
                    found["part" if not body.tokens and not offer.prefix else kind] += 1
                    found["migrated"] += bool(offer.spec.emitted)
    return found


SUITE = [("shm", "layers:1"), ("unix", "request"), ("gloo", "chunk"), ("tcp", "auto")]  # each of both, once
PRODUCT = [(link, unit) for link in ("gloo", "shm", "tcp", "unix") for unit in ("request", "chunk", "layers:1", "auto")]


@needs_two_cores
@pytest.mark.parametrize(
    ("link", "granularity"), [*SUITE, *(pytest.param(*p, marks=pytest.mark.slow) for p in PRODUCT if p not in SUITE)]
)
def test_whatever_moves_changes_no_token(
    link: str, granularity: str, expected: list[list[int]], tmp_path: Path
) -> None:
    run = RunSettings(record_dir=str(tmp_path), step_ahead=int(link == "unix"))
    assert asyncio.run(tokens_of(shape(link, granularity), run)) == expected
    found = handoffs(tmp_path)
    assert min(found[kind] for kind in ("part", "prompt", "decoding")) >= 5, found
    assert min(found[kind] for kind in ("migrated", "copy+", "copy-")) >= 2, found


@needs_two_cores
@pytest.mark.parametrize(("output", "least"), [(200, (20, 2)), pytest.param(1500, (100, 20), marks=pytest.mark.slow)])
def test_role_flips_and_migrations_under_load_lose_and_repeat_no_token(output: int, least: tuple[int, int]) -> None:
    """The same prompts again, until there have been enough."""
    many = prompts(24, seed=5, longest=200)

    async def run() -> list[list[int]]:
        async with cluster(msgspec.structs.replace(shape("shm", pages=2400), policy="fcfs")) as frontend:
            load, rng, moved, flips = Load(frontend), random.Random(1), 0, 0
            while load.open or moved < least[0] or flips < least[1]:
                if not load.open:
                    load.submit_all(many, greedy(output))
                await asyncio.sleep(0.005)
                decoding = [r for r in frontend.requests.values() if r.stage is Stage.DECODE]
                workers = frontend.view.workers
                steady = [n for n in ("decode-0", "decode-1") if n in workers and workers[n].takes(Role.DECODE)]
                if decoding and len(steady) == 2:
                    one = rng.choice(decoding)
                    moved += frontend.migrate(one.request_id, next(n for n in steady if n != one.decode))
                    if rng.random() < 0.1:
                        frontend.set_role(rng.choice(steady), Role.PREFILL)
                        flips += 1
                for name, worker in workers.items():
                    if name.startswith("decode") and worker.role is Role.PREFILL and worker.flipping is None:
                        frontend.set_role(name, Role.DECODE)
                        flips += 1
            await load.finished()
            await assert_clean(frontend)
            assert frontend.router.migrations >= moved // 2  # the others ended on the way, or stayed
            return [one.tokens for one in load.results]

    async def plain() -> list[list[int]]:
        async with cluster(settings("colocated", pages=2400)) as frontend:
            return await run_to_end(frontend, many, greedy(output))

    tokens = asyncio.run(run())
    assert tokens == asyncio.run(plain()) * (len(tokens) // len(many))


# ---------------------------------------------------------------- simulated, with faults


def test_random_moves_with_faults() -> None:
    failures, ends = simfuzz.run_seeds(0, 80, moving=True)
    assert not failures
    assert ends["length"] > 300 and ends["migrated"] > 120, ends


@pytest.mark.slow
def test_ten_thousand_migrations_with_faults() -> None:
    failures, ends = simfuzz.run_seeds(1000, 6600, moving=True)
    assert not failures
    assert ends["migrated"] > 10_000, ends


# ---------------------------------------------------------------- the store


def stored(made: ClusterSettings, store: str) -> ClusterSettings:
    """With a store below caches that hold few prompts."""
    return msgspec.structs.replace(made, kv_store=store)


def loads(logs: Path, swapped: bool = False) -> list[int]:
    """How many pages came of each load, in all workers; only those of requests that had tokens already, if asked."""
    found = []
    for path in logs.glob("*-*.inputs"):
        begun: set[tuple[str, int]] = set()
        with path.open("rb") as file:
            for entry, _ in read_entries(file)[1]:
                body = entry.what.envelope.body if isinstance(entry.what, Received) else None
                if isinstance(body, Submit) and body.spec.emitted:
                    begun.add((body.request_id, body.incarnation))
                if isinstance(entry.what, Loaded) and (
                    not swapped or (entry.what.request_id, entry.what.incarnation) in begun
                ):
                    found.append(entry.what.pages)
    return found


FEW = 20  # prompts of those tests


@pytest.fixture
def disk() -> Iterator[Path]:
    """A directory where a sync costs nothing, as on no disk."""
    with tempfile.TemporaryDirectory(prefix=STORES_OF_TESTS, dir="/dev/shm") as path:
        yield Path(path)


TIERS = ["DRAM=64M", "SSD={}:64M", "DRAM=1M,SSD={}:64M"]
STORES = [("colocated", TIERS[1], "shm", "auto"), ("disagg", TIERS[2], "gloo", "chunk")]
OTHERS = [(mode, tiers, "shm", "auto") for mode in ("colocated", "disagg") for tiers in TIERS]
OTHERS = [one for one in [*OTHERS, *(("disagg", TIERS[2], *pair) for pair in PRODUCT)] if one not in STORES]


def few(expected: list[list[int]]) -> list[list[int]]:
    """Of both turns."""
    return expected[:FEW] + expected[len(PROMPTS) : len(PROMPTS) + FEW]


@needs_two_cores
@pytest.mark.parametrize(
    ("mode", "tiers", "link", "unit"), [*STORES, *(pytest.param(*one, marks=pytest.mark.slow) for one in OTHERS)]
)
def test_hits_in_the_store_change_no_token(
    mode: Literal["colocated", "disagg"], tiers: str, link: str, unit: str, expected: list[list[int]], tmp_path: Path,
    disk: Path,
) -> None:  # fmt: skip
    made = stored(settings(mode, link, 80, granularity=unit), "local:" + tiers.format(disk))
    for start in range(1 + ("SSD" in tiers)):
        logs = tmp_path / f"logs-{start}"
        logs.mkdir()
        assert asyncio.run(tokens_of(made, RunSettings(record_dir=str(logs)), FEW)) == few(expected)
        found = loads(logs)
        if start:  # of the first prompts, too, all pages are there
            assert sum(pages > 0 for pages in found) >= 0.7 * len(found) and len(found) >= FEW // 2, found
        else:
            assert sum(pages > 0 for pages in found) >= 3, found


@needs_two_cores
def test_handoffs_through_the_store_change_no_token(expected: list[list[int]], tmp_path: Path) -> None:
    made = stored(settings("disagg", "shm", 150), "local:DRAM=8M")
    run = RunSettings(record_dir=str(tmp_path))
    assert asyncio.run(tokens_of(msgspec.structs.replace(made, handoff="store"), run, FEW)) == few(expected)
    assert not handoffs(tmp_path) and len(loads(tmp_path)) > 1.5 * FEW


@needs_two_cores
@pytest.mark.parametrize("mode", ["colocated", pytest.param("disagg", marks=pytest.mark.slow)])
def test_what_is_swapped_out_and_in_changes_no_token(
    mode: Literal["colocated", "disagg"], expected: list[list[int]], tmp_path: Path
) -> None:
    made = stored(settings(mode, "shm", 60), "local:DRAM=64M")
    assert asyncio.run(tokens_of(made, RunSettings(record_dir=str(tmp_path)), FEW)) == few(expected)
    found = loads(tmp_path, swapped=True)
    assert sum(pages > 0 for pages in found) >= 2, found


@needs_two_cores
def test_what_workers_and_the_store_gave_each_other_is_counted() -> None:
    async def run() -> StoreStats | None:
        async with cluster(stored(settings("colocated", "shm", 80), "local:DRAM=64M")) as frontend:
            for _ in range(2):
                await run_to_end(frontend, PROMPTS[:FEW], greedy(OUTPUT))
            (stats,) = (await frontend.fresh_stats()).values()
            metrics = Metrics(frontend, History(frontend)).render().decode()
            assert f'kv_store_hits_total{{role="both",worker="worker-0"}} {stats.store.hits:.1f}' in metrics
            return stats.store

    store = asyncio.run(run())
    assert store is not None and store.hits > FEW and store.misses and not store.corrupt
    assert min(store.read_seconds, store.write_seconds) > 0.0
    page = PAGE_BYTES["float64"]
    assert (
        store.bytes_written % page == 0 and store.bytes_read == store.hits * page and store.bytes_written > FEW * page
    )


@needs_two_cores
def test_a_store_that_takes_nothing_is_told_once_and_changes_no_token(
    expected: list[list[int]], disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (disk / "file").touch()
    made = stored(settings("disagg", "shm", 80), f"local:SSD={disk}/file/kv:64M")
    assert asyncio.run(tokens_of(made, RunSettings(), FEW)) == few(expected)
    told = [record.message for record in caplog.records if "store" in record.message]
    why = os.strerror(errno.ENOTDIR)
    assert told == [f"store: nothing is written to {disk}/file/kv for now, what is there is read: {why}"]


@needs_two_cores
def test_pages_through_a_lossy_codec_answer_for_nothing_in_the_store(disk: Path) -> None:
    """What a decode worker has of a lossy handoff does not go there."""
    plain = settings("disagg", "shm", 150, dtype="float32")
    store = f"local:SSD={disk}:64M"  # which outlives the first engine

    def run(made: ClusterSettings) -> list[list[int]]:
        return asyncio.run(tokens_of(made, RunSettings(), FEW))

    exact = run(plain)
    lossy = run(stored(msgspec.structs.replace(plain, kv_codec="int8"), store))
    assert lossy != exact  # or this tells nothing
    assert run(stored(plain, store)) == exact


# ---------------------------------------------------------------- the oracle can fail

SPOILER = """
import gc
from pathlib import Path
from minidisagg.core.handoff import Incoming, Receiver
from minidisagg.core.scheduler import Scheduler
from minidisagg.core.tiers import Tiers
from minidisagg.runtime.kv_cache import KVCache


def spoil(pages):
    (cache,) = (one for one in gc.get_objects() if type(one) is KVCache)
    cache.data[:, :, pages[len(pages) // 2]] = 0


def came(incoming):
    request, tokens = incoming.request, incoming.done.tokens if incoming.done else []
    if request.prefix:
        return {"+": "fetched", "-": "returned"}.get(request.request_id[-1], "replicated")
    if request.output:
        return "migrated"
    return "prompt" if len(tokens) == 1 else "decoding" if tokens else "part"


def settle(self):
    whole = self.expected is not None and self.arrived >= max(self.expected, self.posted)
    if whole and not self.dropped and self.reserved and came(self) == KIND:
        spoil(self.reserved)
    settled(self)


def on_loaded(self, done):
    loading = self.loading[done.request_id, done.incarnation]
    if done.pages and KIND in (("swapped", "handed on") if loading.request.output else ("stored",)):
        spoil(loading.pages[: done.pages])
    loaded(self, done)


def admit(self, request):
    admitted_now = admitted(self, request)
    if admitted_now and request.cached_tokens and KIND == "prefix":
        spoil(request.pages[: request.cached_tokens // self.spec.page_size])
    return admitted_now


def grant(self, request, source, link_epoch, reserved, now):
    if (held := len(request.pages) - len(reserved)) and KIND == "delta":
        spoil(request.pages[:held])
    granted(self, request, source, link_epoch, reserved, now)


if Path("/proc/self/comm").read_text().startswith(("prefill-", "decode-", "worker-")):  # not the front end's
    settled, Incoming.settle = Incoming.settle, settle
    loaded, Tiers.on_loaded = Tiers.on_loaded, on_loaded
    admitted, Scheduler.admit = Scheduler.admit, admit
    granted, Receiver.grant = Receiver.grant, grant
"""
ONWARD = f"""
from minidisagg import Policy
from minidisagg.core.policy import Placement, Replica


class Onward(Policy):
    \"""Prompts begin on one worker, their next turns on the other, which has a copy of what the first one knows.\"""

    def __init__(self, fetch=1):
        super().__init__()
        self.fetch, self.homes, self.copied = fetch, dict(), set()

    def place(self, request, cluster):
        home = self.homes.setdefault(request.request_id, int(len(self.homes) >= {len(PROMPTS)}))
        name = "worker-" + str(home)
        return Placement(name, name, fetch_from="worker-0" if self.fetch and home else None)

    def rebalance(self, cluster):
        new = [] if self.fetch else [r for r in cluster.requests() if r.num_output and r.request_id not in self.copied]
        self.copied.update(r.request_id for r in new)
        return [Replica(r, "worker-0", "worker-1") for r in new]
"""
PAIR = msgspec.structs.replace(settings("colocated", "shm", 2400, chunk=16), decode_workers=1)
COPIES = {"fetched": "", "replicated": ":fetch=0"}


@needs_two_cores
@pytest.mark.parametrize("kind", COPIES)
def test_copies_that_serve_change_no_token(kind: str, expected: list[list[int]]) -> None:
    made = msgspec.structs.replace(PAIR, policy=policy_file(ONWARD) + COPIES[kind])
    assert asyncio.run(tokens_of(made, RunSettings())) == expected


@needs_two_cores
@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        ("migrated", MOVER), ("fetched", ONWARD), ("delta", MOVER), *(
            pytest.param(*pair, marks=pytest.mark.slow) for pair in (
                ("part", MOVER), ("prompt", MOVER), ("decoding", MOVER), ("returned", MOVER), ("replicated", ONWARD),
                ("prefix", MOVER),
            )
        )
    ],
)  # fmt: skip
def test_one_page_zeroed_where_it_comes_changes_the_tokens(kind: str, policy: str, expected: list[list[int]]) -> None:
    """A policy file is how test code gets into the workers."""
    made = shape("shm", pages=2400) if policy == MOVER else PAIR
    name = policy_file(f"KIND = {kind!r}\n" + SPOILER + policy) + COPIES.get(kind, "")
    tokens = asyncio.run(tokens_of(msgspec.structs.replace(made, policy=name), RunSettings()))
    assert sum(a != b for a, b in zip(tokens, expected, strict=True)) >= 5


@needs_two_cores
@pytest.mark.parametrize(
    ("kind", "mode", "pages"), [
        ("stored", "colocated", 150), ("swapped", "colocated", 60),
        pytest.param("handed on", "disagg", 150, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_one_page_zeroed_on_its_way_from_the_store_changes_the_tokens(
    kind: str, mode: Literal["colocated", "disagg"], pages: int, expected: list[list[int]], disk: Path
) -> None:
    plain = "from minidisagg import Policy\n\n\nclass Plain(Policy): ...\n"
    made = stored(settings(mode, "shm", pages), f"local:SSD={disk}:64M")
    if kind == "stored":
        asyncio.run(tokens_of(made, RunSettings(), FEW))  # and a warm restart
    policy = policy_file(f"KIND = {kind!r}\n" + SPOILER + plain)
    made = msgspec.structs.replace(made, policy=policy, handoff="store" if mode == "disagg" else "direct")
    tokens = asyncio.run(tokens_of(made, RunSettings(), FEW))
    assert sum(a != b for a, b in zip(tokens, few(expected), strict=True)) >= (2 if kind == "swapped" else 5)


# ---------------------------------------------------------------- what the router knows of it


def hits(sim: Simulator, prompt: list[int]) -> Mapping[str, Hits]:
    """Of a prompt that might come next."""
    return sim.router.view.hits(Tracked("next", RequestSpec(prompt=prompt, sampling=greedy(1)), 0.0).view)


def test_what_comes_back_to_an_idle_worker_is_known_at_once() -> None:
    sim, ended = Simulator([spec("w0", Role.PREFILL), spec("w1", Role.DECODE)], Policy), list[float]()
    sim.on_end = lambda _: ended.append(sim.now)
    sim.send("a", RequestSpec(prompt=LONG[:20], sampling=greedy(9), session="s"))

    def known() -> bool:
        return bool(ended) and hits(sim, [*LONG[:20], *sim.outcomes["a"].tokens])["w0"].device == 28

    sim.run_events(2000, known)
    assert known() and sim.now < ended[0] + 0.05, "and no tick"


class Copying(Policy):
    """Whatever the other worker has not yet, by what it has told."""

    asked = 0

    def place(self, request: RequestView, cluster: ClusterView) -> Placement:
        return Placement("w0", "w0")

    def rebalance(self, cluster: ClusterView) -> list[Replica]:
        found = [(request, cluster.hits(request)) for request in cluster.requests()]
        missing = [Replica(r, "w0", "w1") for r, has in found if has["w0"].device > has["w1"].device]
        self.asked += len(missing)
        return missing


def test_a_copy_is_asked_for_once() -> None:
    sim = Simulator([spec(name, num_pages=64) for name in ("w0", "w1")], Copying)
    sim.submit("a", LONG, greedy(200), 0.0)
    sim.run()
    assert not simfuzz.verdict(sim) and sim.outcomes["a"].token_times[-1] > 4 * 0.25  # ticks
    assert sim.router.policy.asks.asked == 1  # type: ignore[attr-defined]


def test_what_a_store_had_before_the_engine_is_known_once_it_is_read() -> None:
    old = Simulator([spec("w0", store=True)], Policy)
    old.submit("a", LONG, greedy(4), 0.0)
    old.run()
    sim = Simulator([spec(name, store=True) for name in ("w0", "w1")], Policy)
    sim.shelf.pages = old.shelf.pages
    assert not hits(sim, LONG)
    sim.submit("b", LONG, greedy(4), 0.0)
    sim.run()
    assert not simfuzz.verdict(sim) and sim.outcomes["b"].cached_tokens == 44
    assert hits(sim, LONG) == {"w0": Hits(48, 0), "w1": Hits(0, 48)}


def test_a_request_that_came_raw_through_the_store_moves_raw() -> None:
    class Raw(Policy):
        def place(self, request: RequestView, cluster: ClusterView) -> Placement:
            return Placement("w0", "w1", codec="raw")

    store = {"store": True, "through_store": True, "codec": "int8"}
    sim = Simulator([spec(f"w{n}", Role.DECODE if n else Role.PREFILL, **store) for n in range(3)], Raw)
    sim.submit("a", LONG[:20], greedy(30), 0.0)
    sim.plan(0.4, partial(sim.router.migrate, "a", "w2", 0.4))
    sim.run()
    assert not simfuzz.verdict(sim) and sim.router.migrations == 1
    assert hits(sim, [*LONG[:20], *sim.outcomes["a"].tokens])["w2"].device == 48, "which lossy pages would not be"


# ---------------------------------------------------------------- nobody waits for a lease


class Fetching(Policy):
    """The second request begins elsewhere, with what the first has left."""

    def place(self, request: RequestView, cluster: ClusterView) -> Placement:
        return Placement("w0", "w0") if request.request_id == "a" else Placement("w1", "w1", fetch_from="w0")


def seconds(sim: Simulator) -> tuple[float, float]:
    """From the second request's arrival to its first and its second token."""
    for name, at in ("a", 0.0), ("b", 2.0):
        sim.submit(name, LONG, greedy(4), at)
    sim.run()
    assert not simfuzz.verdict(sim)
    first, second = sim.outcomes["b"].token_times[:2]
    return first - 2.0, second - 2.0


def test_a_request_begins_when_the_prefix_that_it_waits_for_has_come() -> None:
    sim = Simulator([spec("w0", Role.BOTH), spec("w1", Role.BOTH)], Fetching)
    first, _ = seconds(sim)
    assert sim.outcomes["b"].cached_tokens > 0 and first < 0.3


def test_a_request_begins_without_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Apart(Policy):
        def place(self, request: RequestView, cluster: ClusterView) -> Placement:
            return Placement(*["w0" if request.request_id == "a" else "w1"] * 2)

    sim = Simulator([spec(name, Role.BOTH, store=True, lease=2.0, num_pages=64) for name in ("w0", "w1")], Apart)
    sim.submit("a", LONG, greedy(4), 0.0)
    sim.run()
    monkeypatch.setattr("minidisagg.sim.shelf.SECONDS", 10.0)  # of each page
    sim.submit("b", LONG, greedy(4), sim.now)
    began = sim.now
    sim.run()
    assert not simfuzz.verdict(sim)
    assert 2.0 < sim.outcomes["b"].token_times[0] - began < 3.0 and not sim.outcomes["b"].cached_tokens


def asked(sim: Simulator) -> list[tuple[str, int]]:
    """The loads of a worker from now on: whose, and of how many pages."""
    found: list[tuple[str, int]] = []
    tiers = sim.workers["w0"].core.tiers
    emit = tiers._emit

    def see(effect: Effect) -> None:
        if isinstance(effect, LoadPages):
            found.append((effect.request_id, len(effect.digests)))
        emit(effect)

    tiers._emit = see
    return found


def warmed(policy: type[Policy]) -> Simulator:
    """A worker with room for little more than one of two prompts, 14 of 16 pages each, both of which its store has."""
    sim = Simulator([spec("w0", Role.BOTH, store=True)], policy)
    for name, prompt in TWO.items():
        sim.submit(name, prompt, greedy(4), sim.now)
        sim.run()
    return sim


TWO = {"a": list(range(100, 148)), "b": list(range(200, 248))}


class Level(Policy):
    """Nobody goes before anybody."""

    def order(self, request: Work, stage: str, worker: WorkerView) -> int:
        return 0


def test_what_a_full_cache_has_no_room_for_is_read_when_there_is() -> None:
    sim = warmed(Policy)
    found = asked(sim)
    sim.submit("busy", list(range(300, 348)), greedy(8), sim.now)
    sim.submit("again", TWO["a"], greedy(4), sim.now + 0.1)
    sim.run()
    assert not simfuzz.verdict(sim) and sim.outcomes["again"].cached_tokens == 44
    assert [name for name, _ in found] == ["busy", "again"]


@pytest.mark.parametrize("policy", [Policy, Level])
def test_who_reads_does_not_take_turns_for_ever_with_who_reads(policy: type[Policy]) -> None:
    """What is read for the one pushes out what was read for the other, before it begins."""
    sim = warmed(policy)
    found, began = asked(sim), sim.now
    for name in "cdefgh":
        sim.submit(name, TWO["ab"[name in "dfh"]], greedy(4), began)
    sim.run()
    assert not simfuzz.verdict(sim) and {one.finish for one in sim.outcomes.values()} == {"length"}
    assert max(Counter(name for name, _ in found).values()) <= 2 and sim.now < began + 3.0
    assert sum(sim.outcomes[name].cached_tokens == 44 for name in "cdefgh") >= 4


def test_what_others_push_out_again_and_again_is_computed_in_the_end() -> None:
    """Whenever it reads, somebody comes who goes before it and needs the room."""
    sim = warmed(Policy)
    found, end = asked(sim), sim.now + 6.0

    def look() -> None:
        reads = sum(name == "low" for name, _ in found)
        if reads > sum(name.startswith("high") for name in sim.outcomes) and reads < 6:
            sim.submit(f"high-{reads}", [1000 * reads + n for n in range(48)], greedy(4), sim.now, priority=1)
        if sim.now < end:
            sim.plan(sim.now + 0.002, look)

    sim.submit("low", TWO["a"], greedy(4), sim.now)
    sim.plan(sim.now + 0.001, look)
    sim.run()
    assert not simfuzz.verdict(sim) and sim.outcomes["low"].finish == "length"
    assert [name for name, _ in found] == ["low", "high-1", "low", "high-2"]


def test_what_the_store_has_not_is_asked_for_once() -> None:
    sim = Simulator([spec("w0", Role.BOTH, store=True)], Policy)
    found = asked(sim)
    for name, start in ("a", 100), ("b", 200), ("c", 300):
        sim.submit(name, list(range(start, start + 30)), greedy(8), 0.0)
    sim.run()
    assert not simfuzz.verdict(sim)
    assert sorted(found) == [("a", 7), ("b", 7), ("c", 7)]


@pytest.mark.parametrize(("codec", "saves"), [("raw", True), ("int8", False)])
def test_pages_that_nobody_can_ask_for_are_not_saved(codec: str, saves: bool) -> None:
    made = [spec(name, role, store=True, codec=codec) for name, role in (("w0", Role.PREFILL), ("w1", Role.DECODE))]
    sim, saved = Simulator(made, Policy), list[bytes]()
    tiers = sim.workers["w1"].core.tiers
    emit = tiers._emit

    def see(effect: Effect) -> None:
        if isinstance(effect, SavePage):
            saved.append(effect.digest)
        emit(effect)

    tiers._emit = see
    seconds(sim)
    assert bool(saved) == saves and sim.workers["w1"].core.pool.counts[PageState.CACHED] > 0


def test_a_request_whose_pages_are_all_in_the_store_leaves_with_its_last_token() -> None:
    store = {"store": True, "through_store": True}
    sim = Simulator([spec("w0", Role.PREFILL, **store), spec("w1", Role.DECODE, **store)], Policy)
    _, second = seconds(sim)
    assert second < 0.3 and sim.workers["w1"].core.pool.counts[PageState.CACHED] > 0


def test_a_request_leaves_without_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minidisagg.sim.shelf.SECONDS", 10.0)  # of each page
    store = {"store": True, "through_store": True, "lease": 2.0, "num_pages": 64}
    sim = Simulator([spec("w0", Role.PREFILL, **store), spec("w1", Role.DECODE, **store)], Policy)
    sim.submit("a", LONG, greedy(4), 0.0)
    sim.run()
    assert not simfuzz.verdict(sim)
    first, *_, last = sim.outcomes["a"].token_times
    assert sim.outcomes["a"].finish == "length" and last - first < 5.0  # two leases, and not one a token


class Late(Policy):
    """The decode worker is named when the first token is there."""

    there = "w1"

    def place(self, request: RequestView, cluster: ClusterView) -> Placement:
        return Placement("w0", self.there if request.prefill else None)


class LateHere(Late):
    there = "w0"


@pytest.mark.parametrize("policy", [Late, LateHere])
def test_a_worker_that_is_named_late_gets_what_decodes_some_steps_more(policy: type[Policy]) -> None:
    sim = Simulator([spec(name, Role.BOTH, decode_after=4) for name in ("w0", "w1")], policy)
    sim.submit("a", LONG, greedy(12), 0.0)
    sim.run()
    assert not simfuzz.verdict(sim) and sim.outcomes["a"].token_times[-1] < 2.0  # no lease
    assert sim.outcomes["a"].handoffs == ([3] if policy is Late else [])


class Apart(Policy):
    """Two prompts decode on two workers; a third comes to the first of them later."""

    def place(self, request: RequestView, cluster: ClusterView) -> Placement:
        return Placement("w0", "w2" if request.request_id == "moves" else "w1")


class TenGigabits(LinearCost):
    """One wire out of each worker, and 131 kB a token: an 8B model's in bfloat16."""

    def __init__(self) -> None:
        super().__init__(step=0.008, prefill_token=0.00005, decode_seq=0.0001, context_token=1e-8)
        object.__setattr__(self, "free", {})

    def transfer(self, source: EngineSpec, dest: EngineSpec, piece: Piece, now: float) -> tuple[float, float]:
        begun = max(now, self.free.get(source.name, 0.0))  # type: ignore[attr-defined]
        share = (piece.layers[1] - piece.layers[0]) / source.num_layers
        ended = begun + piece.count * source.page_size * 131072 * share / 1.25e9
        self.free[source.name] = ended  # type: ignore[attr-defined]
        return begun, ended + 5e-5


class There(Policy):
    def place(self, request: RequestView, cluster: ClusterView) -> Placement:
        return Placement("w0", "w1")


@pytest.mark.parametrize(("requests", "size"), [(1, 64), (1, 16), (8, 64), (8, 16)])
def test_a_request_that_moves_over_a_slow_wire_pauses_for_its_last_page(requests: int, size: int) -> None:
    """The copy of 2,000 tokens takes 26 steps, and of eight such requests that leave a flipping worker eight times
    that; each goes on decoding meanwhile, and stops for 2 steps at most."""
    roles = {"w0": Role.PREFILL, "w1": Role.DECODE, "w2": Role.DECODE}
    many = {"num_pages": 64000 // size, "page_size": size, "lease": 30.0, "link_timeout": 10.0}
    specs = [spec(name, role, options=WorkerOptions(64, 8192, 0), **many) for name, role in roles.items()]
    sim = Simulator(specs, There, World(cost=TenGigabits(), check=False))
    for n in range(requests):
        sim.submit(f"r{n}", [n * 10_000 + k for k in range(2000)], greedy(1200), 0.0)
    sim.plan(6.0, lambda: sim.router.set_role(RoleChange("w1", Role.PREFILL), sim.now))
    sim.run(until=200.0)
    assert sim.router.migrations == requests
    for outcome in sim.outcomes.values():
        gaps = sorted(b - a for a, b in pairwise(outcome.token_times) if a > 5.0)
        assert gaps[-1] / gaps[len(gaps) // 2] < 3


def test_a_migration_to_a_full_worker_holds_up_no_handoff() -> None:
    sim = Simulator([spec("w0", Role.PREFILL), *(spec(name, Role.DECODE) for name in ("w1", "w2"))], Apart)
    sim.submit("moves", list(range(20)), greedy(20), 0.01)
    sim.submit("fills", LONG[:36], greedy(20), 0.1)
    sim.submit("prompt", LONG[:4], greedy(4), 0.22)
    moved: list[bool] = []
    sim.plan(0.21, lambda: moved.append(sim.router.migrate("moves", "w1", sim.now)))
    sim.run()
    assert not simfuzz.verdict(sim) and moved == [True] and sim.router.migrations == 0
    assert sim.outcomes["moves"].workers == ["w0", "w2"] and sim.outcomes["prompt"].workers == ["w0", "w1"]
    first, second = sim.outcomes["prompt"].token_times[:2]
    assert sim.outcomes["moves"].token_times[-1] > second and second - first < 0.05


class Beyond(Policy):
    def place(self, request: RequestView, cluster: ClusterView) -> Placement:
        return Placement("w0", "w1", split_at=500)


def test_a_split_beyond_the_end_needs_no_more_room_than_the_request() -> None:
    sim = Simulator([spec("w0", Role.PREFILL), spec("w1", Role.DECODE)], Beyond)
    sim.submit("a", LONG, greedy(8), 0.0)
    sim.run()
    assert not simfuzz.verdict(sim) and sim.outcomes["a"].finish == "length"
