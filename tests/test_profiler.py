"""`minidisagg profile`: a known machine is found again in noisy steps, and the engine gives steps of every kind."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from minidisagg.bench.profiler import CHUNK, SHORT, Decode, Prompt, error_table, errors, fit, grouped
from minidisagg.cli import cli
from minidisagg.core.messages import Role
from minidisagg.core.plan import PlanItem, StepPlan
from minidisagg.core.spec import EngineSpec
from minidisagg.interconnect import Interconnect
from minidisagg.sim.machines import MachineCosts
from minidisagg.sim.profile import Curve, Grid, Profile, load_profile
from minidisagg.sim.simulate import simulate
from minidisagg.workload.lengths import random_items

ABOUT = Profile(
    version=1, name="here", model="m", dtype="float32", tensor_parallel=1, source="", licence="", constant=0.0,
    linear=Curve([1], [0.0]), head=Curve([1], [0.0]), prefill_attention=Grid([1], [1], [[0.0]]),
    decode_attention=Grid([1], [1], [[0.0]]), num_layers=1, kv_bytes_per_token=1, weight_bytes=1, memory_bytes=9,
)  # fmt: skip
OVERHEAD, FIXED, TOKEN, PAIR, READ = 1e-3, 20e-3, 2e-3, 1e-6, 5e-6  # seconds


def steps(noise: float) -> tuple[list[Decode], list[Prompt]]:
    rng = random.Random(0)

    def noisy(seconds: float) -> float:
        return seconds * rng.gauss(1.0, noise) + (seconds if rng.random() < 0.05 else 0.0)  # some are held up

    decodes = []
    for seqs in (1, 2, 4, 8):
        for context in (64, 256, 1024):
            for n in range(20):
                read = seqs * (context + n)
                seconds = noisy(FIXED + TOKEN * seqs + READ * read)
                decodes.append(Decode(seqs, read, seconds + OVERHEAD, OVERHEAD))
    prompts = [(0, new) for new in (16, 64, 128, 512, 2048) for _ in range(3)]
    prompts += [(past, CHUNK) for past in range(CHUNK, 1024, CHUNK) for _ in range(3)]
    return decodes, [Prompt(p, n, noisy(FIXED + TOKEN * n + PAIR * n * (p + n / 2))) for p, n in prompts]


def test_a_known_machine_is_found_again() -> None:
    decodes, prompts = steps(0.02)
    profile = fit(decodes, prompts, ABOUT)
    for seqs, context in ((1, 100), (3, 1500), (8, 8000)):
        truth = OVERHEAD + FIXED + TOKEN * seqs + READ * context
        assert profile.step_seconds((), seqs, context) == pytest.approx(truth, rel=0.06)
    for past, new in ((0, 100), (0, 1024), (512, CHUNK), (900, 100)):
        truth = OVERHEAD + FIXED + TOKEN * new + PAIR * new * (past + new / 2)
        assert profile.step_seconds([(past, new)], 0, 0) == pytest.approx(truth, rel=0.1), (past, new)
    for residuals in profile.residuals, profile.prompt_residuals:
        assert 0.98 < statistics.median(residuals) < 1.02 and max(residuals) > 1.8
    assert error_table(profile, decodes, prompts).row_count == len(grouped(errors(profile, decodes, prompts)))


def test_a_prompts_last_chunk_alone_has_the_head() -> None:
    head, (decodes, prompts) = 9e-3, steps(0.001)
    pieces = [one._replace(last=False) for one in prompts if one.past]
    whole = [one._replace(seconds=one.seconds + head) for one in prompts if not one.past]
    short = FIXED + TOKEN * SHORT + PAIR * SHORT * SHORT * 1.5
    ends = [Prompt(SHORT, SHORT, short + head * last, last) for last in (False, True) for _ in range(5)]
    profile = fit([one._replace(seconds=one.seconds + head) for one in decodes], [*pieces, *whole, *ends], ABOUT)
    assert profile.head.at(1) == pytest.approx(head, rel=0.01) and profile.head_of_last
    for past in (0, 512):
        truth = OVERHEAD + FIXED + TOKEN * CHUNK + PAIR * CHUNK * (past + CHUNK / 2)
        assert profile.step_seconds([(past, CHUNK)], 0, 0, 0) == pytest.approx(truth, rel=0.01)
        assert profile.step_seconds([(past, CHUNK)], 0, 0) == pytest.approx(truth + head, rel=0.01)
    assert profile.step_seconds((), 4, 4000) == pytest.approx(
        OVERHEAD + FIXED + TOKEN * 4 + READ * 4000 + head, rel=0.05
    )


def test_steps_scatter_as_their_kind_did() -> None:
    profile = replace(fit(*steps(0.0), ABOUT), residuals=[1.5], prompt_residuals=[3.0])
    spec = EngineSpec("w", 1, Role.BOTH, 9, 16, 1, "sim")
    decode, prompt = PlanItem("a", 0, 40, 1, [], [0], True, 0), PlanItem("b", 0, 0, 64, [], [1], True, 0)
    alone = profile.step_seconds((), 1, 41), profile.step_seconds([(0, 64)], 1, 41)
    for spread, ratios in ((True, (1.5, 3.0)), (False, (1.0, 1.0))):
        costs = MachineCosts({"w": profile}, Interconnect(1e9, 0.0), spread=spread)
        found = [costs.steps(spec, StepPlan(0, items, [], [])) for items in ([decode], [decode, prompt])]
        assert found == [[pytest.approx(seconds * ratio)] for seconds, ratio in zip(alone, ratios, strict=True)]


def test_many_sequences_that_were_seen_at_one_length_only_get_no_slope_from_it() -> None:
    """Time was out: twenty steps whose contexts differ by twenty tokens, the last of them slow."""
    decodes, prompts = steps(0.0)
    some = [Decode(16, 16 * (64 + n), (0.052 if n < 15 else 0.06) + OVERHEAD, OVERHEAD) for n in range(20)]
    profile = fit([*decodes, *some], prompts, ABOUT)
    truth = OVERHEAD + FIXED + TOKEN * 16 + READ * 16 * 1024
    assert profile.step_seconds((), 16, 16 * 1024) == pytest.approx(truth, rel=0.06)


def test_prompts_that_are_bound_by_launches_and_chunks_that_tell_nothing_of_attention() -> None:
    """As on a GPU: decode steps are replayed in a millisecond, the shortest prompt takes seven."""
    decodes = [
        Decode(n, n * (c + i), 1e-3 + 1e-9 * n * (c + i), 0.0) for n in (1, 8) for c in (64, 1024) for i in range(20)
    ]
    whole = {16: 7e-3, 128: 7e-3, 512: 7.2e-3, 1024: 8e-3, 4096: 20e-3}
    noise = [7e-3, 11e-3, 9e-3, 15e-3]  # of chunks that come one after another
    prompts = [Prompt(0, n, seconds) for n, seconds in whole.items() for _ in range(3)]
    prompts += [Prompt(128 * i, 128, seconds) for i, seconds in enumerate(noise)]
    profile = fit(decodes, prompts, ABOUT)
    assert profile.step_seconds((), 1, 100) < 2e-3
    for n, seconds in whole.items():
        assert profile.step_seconds([(0, n)], 0, 0) == pytest.approx(seconds, rel=0.1), n


def test_a_machine_that_is_all_noise_still_gives_costs_that_grow() -> None:
    decodes, prompts = steps(0.6)
    profile = fit([replace_seconds(one) for one in decodes], prompts, ABOUT)
    costs = [profile.step_seconds([(0, n)], 0, 0) for n in (1, 10, 100, 1000)]
    assert costs == sorted(costs) and min(costs) >= 0.0
    assert min(profile.decode_seconds(8, 800, 50)) >= 0.0


def replace_seconds(one: Decode) -> Decode:
    return one._replace(seconds=abs(one.seconds), overhead=0.0)


def test_the_engine_is_measured_and_simulated(tmp_path: Path) -> None:
    path = tmp_path / "tiny.json"
    args = ["profile", "dummy:tiny", "--out", str(path), "--seconds", "1", "--max-num-seqs", "4"]
    done = CliRunner().invoke(cli, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "decode 1 sequences" in said and "chunk after 256 tokens" in said and f"--cluster both=1@{path}" in said
    profile = load_profile(str(path), "dummy:tiny", "float32")
    assert profile.num_layers == 2 and len(profile.residuals) > 50 < len(profile.prompt_residuals)
    assert profile.constant >= 0.0 and "64 tokens 24 " in said  # pieces of 64 tokens, half of them the last ones
    assert replace(profile, residuals=[]).pages(128) * 128 * profile.kv_bytes_per_token == 512 << 20
    result = simulate("fcfs", random_items(10, 100, 10), _cluster(str(path)))
    assert all(len(request.token_times) == 10 for request in result.run.requests)


def _cluster(path: str):  # type: ignore[no-untyped-def]
    from minidisagg.sim.machines import ClusterSpec, parse_cluster

    return ClusterSpec(groups=parse_cluster(f"both=1@{path}"), model="dummy:tiny", dtype="float32")


def test_profile_measures_one_worker() -> None:
    with pytest.raises(ValueError, match="measures one worker"):
        cli.main(["profile", "dummy:tiny", "--prefill-workers", "2"], standalone_mode=False)
