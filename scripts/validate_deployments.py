"""Predicts deployments that others measured, with the simulator and the profiles that ship; nothing is fitted to them.

    pip download --no-deps -d /tmp/aic aiconfigurator-core==0.12.0 && unzip -d /tmp/aic /tmp/aic/*.whl
    python scripts/validate_deployments.py /tmp/aic/aiconfigurator_core/systems/silicon_sample.csv \\
        --out docs/data/deployments.json

The CSV is NVIDIA AIConfigurator's (Apache-2.0): deployments with GPU, precision, lengths, number of clients in a closed
loop, and mean TTFT and TPOT. `--out` keeps what a file has of other sets. `docs/validation.md` discusses the errors.

Each run repeats what the clients did: ten requests for each of them, through a closed loop that starts full, and means
over all requests. (Ten: the recipes say so, and of Qwen3's rows the means times ten times the concurrency are whole
nanoseconds.) So the burst at the start and the drain at the end are counted here, as they were there.
"""

from __future__ import annotations

import csv
import json
import random
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from msgspec.structs import replace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minidisagg.core.messages import WorkerOptions
from minidisagg.measure.records import RunRecord
from minidisagg.measure.stats import samples_of
from minidisagg.sim.machines import ClusterSpec, find_profile, parse_cluster
from minidisagg.sim.simulate import simulate
from minidisagg.sim.simulation import Settings
from minidisagg.workload.lengths import WorkItem, random_items

ROUNDS = 10  # requests of each client
PAGE = 16  # tokens: vLLM's block
SERVE_BUDGET = 8192  # tokens of a step: vLLM's default for a server on these cards, and what InferenceMAX sets
OFFLINE_BUDGET = 16384  # the default of its LLM class there


class Origin(NamedTuple):
    """Where the rows of a set are in the CSV, and what is known of them that no column says.

    Of InferenceMAX, by its published recipes (benchmarks/70b_fp8_h100_slurm.sh, ..._h200_...): lengths uniform between
    0.8 of the stated ones and all of them, and a KV cache of 8 bits, half of what a profile counts. Of the others
    nothing: lengths as stated, 16 bits.
    """

    model_path: str
    system: str
    precision: str
    model: str  # of the profile, as is the next
    dtype: str
    shortest: float = 1.0  # of the stated lengths
    kv_share: float = 1.0  # of the profile's bytes


SETS = {
    "llama-70b-h100": Origin("meta-llama/Llama-3.1-70B", "h100_sxm", "fp8", "llama-70b", "fp8", 0.8, 0.5),
    "llama-70b-h200": Origin("meta-llama/Llama-3.1-70B", "h200_sxm", "fp8", "llama-70b", "fp8", 0.8, 0.5),
    "qwen3-32b-h100": Origin("Qwen/Qwen3-32B", "h100_sxm", "", "qwen3-32b", "bfloat16"),
}
FIGURES = "vllm-0.22.1"  # the set that is not in the CSV
# vLLM 0.22.1, bf16, dummy weights, no prefix cache, as this project measured it: out tokens/s of 256 requests of 100 to
# 1024 tokens in and out, offline; ms of a decode step at 2k context, batch 1 and 64; prompt tokens/s of 16 x 4000.
FIGURE_NAMES = "offline out tok/s", "decode step ms, batch 1", "batch 64", "prefill tok/s"
MEASURED = {
    ("h100_sxm", "llama-8b"): (8_513, 6.70, 12.87, 41_886), ("h100_sxm", "qwen3-0.6b"): (19_112, 1.65, 6.91, 331_852),
    ("h200_sxm", "llama-8b"): (9_797, 5.07, 9.58, 40_894), ("h200_sxm", "qwen3-0.6b"): (23_627, 2.14, 5.34, 343_128),
}  # fmt: skip


class Deployment(NamedTuple):
    """One row: lengths in tokens, TTFT and TPOT as measured, in ms."""

    device: str
    tp: int
    concurrency: int
    prompt: int
    output: int
    ttft: float
    tpot: float


class Outcome(NamedTuple):
    """A row as it is printed and kept; errors are predicted / measured - 1."""

    device: str
    tp: int
    concurrency: int
    prompt: int
    output: int
    ttft: float
    ttft_predicted: float
    ttft_error: float
    tpot: float
    tpot_predicted: float
    tpot_error: float


def say(line: str, to: Any = None) -> None:
    (to or sys.stdout).write(line + "\n")


# ------------------------------------------------------------ what was measured


def read(path: Path, origin: Origin) -> list[Deployment]:
    """The aggregated vLLM deployments of a set whose concurrency is known, in order."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["backend"] == "vllm" and row["mode"] == "agg"]
    found = []
    for row in rows:
        concurrency = concurrency_of(row["silicon_data_source"])
        if (row["model_path"], row["system"], row["precision"]) == origin[:3] and concurrency:
            lengths = int(row["isl"]), int(row["osl"])
            means = float(row["silicon_ttft_ms"]), float(row["silicon_tpot_ms"])
            found.append(Deployment(row["system"], int(row["tp_size"]), concurrency, *lengths, *means))
    return sorted(found)


def concurrency_of(source: str) -> int:
    """Of `...; silicon_concurrency=16; ...`; 0 where it is not told."""
    told = dict(part.strip().partition("=")[::2] for part in source.split(";"))
    return int(told.get("silicon_concurrency", 0))


# ------------------------------------------------------------ what is predicted


def predict(deployment: Deployment, origin: Origin) -> tuple[float, float]:
    """Mean TTFT and TPOT in ms, over all requests."""
    items = requests(deployment, origin.shortest)
    run = engine(deployment, origin, items, SERVE_BUDGET, deployment.concurrency)
    metrics = samples_of(run, trim=0.0).metrics
    return 1e3 * float(metrics["ttft"].values.mean()), 1e3 * float(metrics["tpot"].values.mean())


def requests(deployment: Deployment, shortest: float) -> list[WorkItem]:
    """What the clients send, the same at every call."""
    draw = random.Random(repr(deployment)).randint
    prompt, output = deployment.prompt, deployment.output
    return [
        WorkItem(
            index=index,
            prompt_len=draw(int(prompt * shortest), prompt),
            output_len=draw(int(output * shortest), output),
        )
        for index in range(ROUNDS * deployment.concurrency)
    ]


def engine(where: Deployment, origin: Origin, items: Sequence[WorkItem], budget: int, concurrency: int) -> RunRecord:
    """These requests on one engine: decodes first, then prompts in order and in chunks, as vLLM schedules them."""
    profile = find_profile(where.device, origin.model, origin.dtype, where.tp)
    kv_bytes = int(profile.kv_bytes_per_token * origin.kv_share)
    options = WorkerOptions(concurrency, budget, 0)
    cluster = ClusterSpec(
        groups=parse_cluster(f"both=1@{where.device}x{where.tp}"), model=origin.model, dtype=origin.dtype,
        page_size=PAGE, pages=replace(profile, kv_bytes_per_token=kv_bytes).pages(PAGE), prefix_caching=False,
        prefill=options, decode=options,
    )  # fmt: skip
    return simulate(f"sarathi:chunk={budget}", items, cluster, Settings(max_concurrency=concurrency)).run


def outcome(deployment: Deployment, origin: Origin) -> Outcome:
    """A row with its prediction."""
    ttft, tpot = predict(deployment, origin)
    return Outcome(
        *deployment[:5], round(deployment.ttft, 1), round(ttft, 1), error(ttft, deployment.ttft),
        round(deployment.tpot, 2), round(tpot, 2), error(tpot, deployment.tpot),
    )  # fmt: skip


def figures() -> list[tuple[str, str, str, float, float, float]]:
    """(device, model, figure, measured, predicted, error) of each in MEASURED."""
    rows = []
    for (device, model), measured in MEASURED.items():
        origin = Origin("", device, "", model, "bfloat16")
        where = Deployment(device, 1, 256, 0, 0, 0.0, 0.0)
        profile = find_profile(device, model, origin.dtype, 1)
        offline = engine(where, origin, random_items(256, 562, 562, 462 / 562), OFFLINE_BUDGET, 256)
        out = sum(len(request.token_times) for request in offline.requests) / offline.wall_s
        steps = [1e3 * profile.step_seconds((), seqs, 2048 * seqs) for seqs in (1, 64)]
        prefill = 16 * 4000 / engine(where, origin, random_items(16, 4000, 1), OFFLINE_BUDGET, 256).wall_s
        for name, theirs, ours in zip(FIGURE_NAMES, measured, (out, *steps, prefill), strict=True):
            rows.append((device, model, name, theirs, round(ours, 2 if theirs < 100 else None), error(ours, theirs)))
    return rows


# ------------------------------------------------------------ how far off


def error(predicted: float, measured: float) -> float:
    """Relative, signed."""
    return round(predicted / measured - 1, 4)


def spread(errors: Iterable[float]) -> dict[str, float]:
    """Median and 90th percentile of |error|, and the median with its sign: a bias."""
    values = np.array(list(errors))
    size = np.abs(values)
    return {
        "n": len(values),
        "median": round(float(np.median(size)), 4),
        "p90": round(float(np.percentile(size, 90)), 4),
        "bias": round(float(np.median(values)), 4),
    }


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Of both errors: over all rows, by tensor parallelism, by concurrency, and by lengths."""
    keys: dict[str, Callable[[Outcome], Any]] = {
        "all": lambda o: "all",
        "tp": lambda o: o.tp,
        "concurrency": lambda o: o.concurrency,
        "lengths": lambda o: f"{o.prompt}/{o.output}",
    }
    found: dict[str, Any] = {}
    for name, key in keys.items():
        for value, group in groupby(sorted(outcomes, key=key), key):
            rows = list(group)
            both = {"tpot": spread(o.tpot_error for o in rows), "ttft": spread(o.ttft_error for o in rows)}
            found.setdefault(name, {})[str(value)] = both
    return found


# ------------------------------------------------------------ what is told


def table(outcomes: Iterable[Outcome]) -> str:
    """A row per deployment, in Markdown."""
    lines = [
        "| device | tp | concurrency | in | out | TTFT ms, measured / predicted | error | TPOT ms | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for o in outcomes:
        where = " | ".join(map(str, o[:5]))
        ttft, tpot = f"{o.ttft:,.0f} / {o.ttft_predicted:,.0f}", f"{o.tpot:.2f} / {o.tpot_predicted:.2f}"
        lines.append(f"| {where} | {ttft} | {o.ttft_error:+.1%} | {tpot} | {o.tpot_error:+.1%} |")
    return "\n".join(lines)


def summary_table(summaries: dict[str, dict[str, Any]], groupings: Iterable[str]) -> str:
    """Median, 90th percentile and bias of the groups of each set."""
    lines = ["| set | rows | TPOT: median, p90 of \\|error\\|; bias | TTFT: the same |", "|---|---|---|---|"]
    for (name, summary), grouping in product(summaries.items(), groupings):
        for value, both in summary[grouping].items():
            cells = [f"{s['median']:.1%}, {s['p90']:.1%}; {s['bias']:+.1%}" for s in (both["tpot"], both["ttft"])]
            label = name if grouping == "all" else f"{name}, {grouping} {value}"
            lines.append(f"| {label} | {both['tpot']['n']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figures_table(rows: Iterable[Sequence[Any]]) -> str:
    """A row per device and model: measured / predicted."""
    lines = [f"| | {' | '.join(FIGURE_NAMES)} |", "|---" * (1 + len(FIGURE_NAMES)) + "|"]
    for where, group in groupby(rows, lambda row: " ".join(row[:2])):
        cells = [f"{theirs:,} / {ours:,} ({off:+.1%})" for *_, theirs, ours, off in group]
        lines.append(f"| {where} | {' | '.join(cells)} |")
    return "\n".join(lines)


def keep(path: Path, name: str, found: dict[str, Any]) -> None:
    """Into the file, in place of what it had of the set; a line a row."""
    sets = json.loads(path.read_text())["sets"] if path.exists() else {}
    sets[name] = found
    head = {
        "source": "silicon_sample.csv of aiconfigurator-core 0.12.0, NVIDIA AIConfigurator, Apache-2.0; "
        f"{FIGURES}: this project's own measurements",
        "command": "python scripts/validate_deployments.py silicon_sample.csv --out docs/data/deployments.json",
    }
    text = json.dumps({**head, "sets": sets}, indent=1)
    for rows in (one["rows"] for one in sets.values()):
        for row in rows:
            text = text.replace(json.dumps(row, indent=1).replace("\n", "\n    "), json.dumps(row))
    path.write_text(text + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="silicon_sample.csv")
    parser.add_argument("--out", type=Path, help="JSON file for rows and summaries")
    parser.add_argument("--limit", type=int, help="so many rows of each set")
    parser.add_argument("--only", choices=(*SETS, FIGURES), help="one set")
    args = parser.parse_args(arguments)
    for name, origin in SETS.items():
        if args.only not in (None, name):
            continue
        rows = read(args.csv, origin)[: args.limit]
        outcomes = []
        for number, deployment in enumerate(rows, 1):
            outcomes.append(outcome(deployment, origin))
            say(f"{name} {number}/{len(rows)}: {outcomes[-1]}", sys.stderr)
        summary = summarize(outcomes)
        say(f"\n## {name}\n\n{table(outcomes)}\n\n{summary_table({name: summary}, summary)}")
        if args.out:
            keep(args.out, name, {"columns": Outcome._fields, "rows": outcomes, "summary": summary})
    if args.only in (None, FIGURES):
        lines = figures()
        say(f"\n## {FIGURES}\n\n{figures_table(lines)}")
        if args.out:
            columns = "device", "model", "figure", "measured", "predicted", "error"
            keep(args.out, FIGURES, {"columns": columns, "rows": lines, "summary": spread(row[-1] for row in lines)})


if __name__ == "__main__":
    main()
