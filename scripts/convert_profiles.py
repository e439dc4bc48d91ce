"""Makes the simulator's profiles (`minidisagg/sim/profile.py`) from tables that others measured.

    pip install pyarrow pyyaml                 # in an environment of their own: nothing else here needs them
    pip download --no-deps -d /tmp/aic aiconfigurator-core==0.12.0 && unzip -d /tmp/aic /tmp/aic/*.whl
    python scripts/convert_profiles.py aiconfigurator /tmp/aic/aiconfigurator_core
    python scripts/convert_profiles.py splitwise splitwise_perf_model.csv

Both write `minidisagg/sim/profiles/DEVICE.json.gz`. The first one reads the kernel tables that NVIDIA's AIConfigurator
has of vLLM and prints what they predict beside what was measured of vLLM 0.22.1; nothing is fitted but CONSTANT. A step
is the sum of its kernels. What the tables lack:

- Linears of other sizes: bilinear in both sizes of the weight, in proportion beyond.
- Tensor parallelism: linears by sharded sizes, and two all-reduces a layer and one of the embedding.
- Prompts with a past: the attention of the whole, in proportion to the (query, key) pairs that are new (AIConfigurator
  does so too), but not less than a decode of the same context.
- Attention is launched once for all sequences of a step: its floor goes to `linear`, and a prompt costs what it adds to
  a step full of equal ones.
- Norms, RoPE, activations, writing KV: their bytes at AIConfigurator's share of the bandwidth; launching all of them,
  sampling and the host: CONSTANT.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import statistics
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise, product
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minidisagg.sim.profile import SHIPPED, Curve, Grid, Profile, interpolate, load_profile

RELEASE = "0.12.0"
CONSTANT = 0.76e-3  # seconds a step: fitted to vLLM 0.22.1's decode steps on an H200
DEVICES = {"h100_sxm": "0.24.0", "h200_sxm": "0.24.0", "a100_sxm": "0.14.0"}  # the vLLM that was measured
MODELS = {
    "qwen3-0.6b": "Qwen--Qwen3-0.6B", "llama-8b": "meta-llama--Meta-Llama-3.1-8B", "qwen3-32b": "Qwen--Qwen3-32B",
    "llama-70b": "meta-llama--Meta-Llama-3.1-70B", "qwen3-30b-a3b": "Qwen--Qwen3-30B-A3B",
}  # fmt: skip
ROUTING = "power_law_1.2"  # how unevenly tokens choose experts: AIConfigurator's default
MOE = ("hidden_size", "inter_size", "num_experts", "topk", "moe_tp_size")
STEP = 16384  # tokens of a full step
# Engines pad small steps to such sizes (CUDA graphs); the tables' odd ones between, 129 or 2305, cost a tile too much.
TOKENS = (
    1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 384, 512, 768, *range(1024, 4097, 512),
    6144, 8192, 12288, 16384, 24576, 32768,
)  # fmt: skip
PAST = (0, 256, 1024, 4096, 16384, 65536, 131072)
NEW = (1, 16, 64, 128, 192, 256, 384, *(round(512 * 2 ** (i / 4)) for i in range(33)))
TOLERANCE = 0.004  # of a table's values that its neighbours tell: points are dropped for less
MEASURED = {  # vLLM 0.22.1: ms of a decode step at 2k context, batch 1 and 64; prompt tokens/s of 16 x 4000
    ("h200_sxm", "llama-8b"): (5.07, 9.58, 40_894), ("h200_sxm", "qwen3-0.6b"): (2.14, 5.34, 343_128),
    ("h100_sxm", "llama-8b"): (6.70, 12.87, 41_886), ("h100_sxm", "qwen3-0.6b"): (1.65, 6.91, 331_852),
}  # fmt: skip


# ------------------------------------------------------------ tables that only grow, and are small


def isotonic(values: Sequence[float]) -> list[float]:
    """The nearest (in squares) values that never fall: neighbours that do are pooled."""
    pools: list[tuple[float, int]] = []
    for value in values:
        count = 1
        while pools and pools[-1][0] > value:
            mean, n = pools.pop()
            value, count = (value * count + mean * n) / (count + n), count + n
        pools.append((value, count))
    return [mean for mean, n in pools for _ in range(n)]


def digits(seconds: float) -> float:
    """Four significant ones."""
    return float(f"{seconds:.4g}")


def thin(points: Sequence[int], lines: Sequence[Sequence[float]], scales: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the points to keep: of the others, interpolation tells each line's value to TOLERANCE of its scale."""
    keep, start = [0], 0
    for end in range(2, len(points) + 1):
        ends = [points[start], points[min(end, len(points) - 1)]]
        told = end < len(points) and all(
            abs(interpolate(ends, [line[start], line[end]], points[i]) - line[i]) <= TOLERANCE * scale[i]
            for line, scale in zip(lines, scales, strict=True)
            for i in range(start + 1, end)
        )
        if not told:
            start = end - 1
            keep.append(start)
    return keep


def shrunk(points: Sequence[int], seconds: Sequence[float]) -> Curve:
    """Growing and thinned."""
    seconds = isotonic(seconds)
    keep = thin(points, [seconds], [seconds])
    return Curve([points[i] for i in keep], [digits(seconds[i]) for i in keep])


def grid(rows: Sequence[int], columns: Sequence[int], seconds: Sequence[Sequence[float]], floor: float) -> Grid:
    """Growing along both axes and thinned. Values come on top of `floor`: an error is small beside both together."""
    table = transposed([list(accumulate(line, max)) for line in seconds])
    table = transposed([list(accumulate(column, max)) for column in table])
    scales = [[value + floor for value in line] for line in table]
    across = thin(columns, table, scales)
    down = thin(rows, transposed(table), transposed(scales))
    return Grid(
        [rows[i] for i in down], [columns[j] for j in across], [[digits(table[i][j]) for j in across] for i in down]
    )


def transposed(table: Sequence[Sequence[float]]) -> list[list[float]]:
    """Columns for lines."""
    return [list(column) for column in zip(*table, strict=True)]


def write(device: str, profiles: list[Profile]) -> None:
    """One file of a device; the same bytes every time."""
    text = msgspec.json.encode(profiles)
    path = SHIPPED / f"{device}.json.gz"
    path.write_bytes(gzip.compress(text, 9, mtime=0))
    size = path.stat().st_size / 1024
    say(f"{path.name}: {len(profiles)} profiles, {size:.0f} KiB ({len(text) / 1024:.0f} unpacked)")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


# ------------------------------------------------------------ AIConfigurator


@dataclass(frozen=True)
class Shape:
    """What of a Hugging Face config costs time or memory."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inter: int  # of the MLP, or of one expert
    vocab: int
    tied: bool
    qk_norm: bool
    experts: int  # 0: a dense MLP
    active: int

    @classmethod
    def read(cls, path: Path) -> Shape:
        config = json.loads(path.read_text())
        experts = config.get("num_experts", 0)
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            inter=config["moe_intermediate_size"] if experts else config["intermediate_size"],
            vocab=config["vocab_size"],
            tied=config.get("tie_word_embeddings", False),
            qk_norm=config["model_type"].startswith("qwen3"),
            experts=experts,
            active=config.get("num_experts_per_tok", 0),
        )

    def linears(self, tp: int) -> list[tuple[int, int]]:
        """(outputs, inputs) of a layer's on each device: QKV, O and, in a dense model, gate-up and down."""
        attention, kv = self.heads * self.head_dim // tp, max(self.kv_heads // tp, 1) * self.head_dim
        mlp = [] if self.experts else [(2 * self.inter // tp, self.hidden), (self.hidden, self.inter // tp)]
        return [(attention + 2 * kv, self.hidden), (self.hidden, attention), *mlp]

    def small_bytes(self, tp: int) -> int:
        """What the small kernels of a layer read and write for a token on each device, in bf16."""
        heads, kv_heads = self.heads // tp, max(self.kv_heads // tp, 1)
        norms, passes = 2 * 4 * self.hidden, 2 if self.qk_norm else 1  # with the residual; RoPE
        rotated, cached = 2 * passes * (heads + kv_heads) * self.head_dim, 4 * kv_heads * self.head_dim
        activation = 0 if self.experts else 3 * self.inter // tp  # that of experts is in their table
        return 2 * (norms + rotated + cached + activation)

    def weight_bytes(self, width: int) -> int:
        """With layers of `width` bytes a weight; embedding, head and router are bf16 in any case."""
        layer = sum(n * k for n, k in self.linears(1)) + 3 * self.experts * self.inter * self.hidden
        ends = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * (layer * width + 2 * self.experts * self.hidden) + 2 * ends


class Tables:
    """What was measured on one device, in seconds."""

    def __init__(self, systems: Path, device: str) -> None:
        import pyarrow.parquet as parquet
        import yaml

        self.device, self.version = device, DEVICES[device]
        gpu = yaml.safe_load((systems / f"{device}.yaml").read_text())["gpu"]
        self.memory_bytes = int(gpu["mem_capacity"])
        self.bandwidth = gpu["mem_bw"] * gpu["mem_bw_empirical_scaling_factor"]  # bytes/s of small kernels

        def rows(folder: str, name: str) -> Iterator[dict[str, Any]]:
            path = systems / "data" / device / folder / "vllm" / self.version / f"{name}_perf.parquet"
            yield from parquet.read_table(path).to_pylist()

        gemms = ((row["gemm_dtype"], row["n"], row["k"], row["m"], row["latency"]) for row in rows("gemm", "gemm"))
        self.gemms = tabulate(gemms)
        self.moe = tabulate(
            (row["moe_dtype"], *(row[name] for name in MOE), row["num_tokens"], row["latency"])
            for row in rows("moe", "moe")
            if row["moe_ep_size"] == 1 and row["distribution"] == ROUTING
        )
        self.all_reduces = tabulate(
            (row["num_gpus"], row["message_size"], row["latency"])  # a size in elements
            for row in rows("comm", "custom_allreduce")
            if row["backend"] == "vllm_graph"  # the others wait for their launch, as they would not behind other work
        )
        self.prompts: dict[tuple[int, int], dict[tuple[int, int], float]] = defaultdict(dict)
        self.decodes: dict[tuple[int, int], dict[tuple[int, int], float]] = defaultdict(dict)
        for name, table in (("context", self.prompts), ("generation", self.decodes)):
            for row in rows("attention", f"{name}_attention"):
                if row["head_dim"] == 128 and row["kv_cache_dtype"] == "bfloat16" and not row.get("window_size"):
                    length = row["isl"] if name == "context" else row["step"] + 1
                    heads = (row["num_heads"], row["num_key_value_heads"])
                    table[heads][row["batch_size"], length] = row["latency"] / 1e3

    @cache  # noqa: B019 - as many as devices
    def gemm(self, dtype: str, n: int, k: int) -> list[float]:
        """Seconds of [tokens, k] x [k, n], for each of TOKENS."""
        by_inputs: dict[int, dict[int, Curve]] = defaultdict(dict)
        for (kind, outputs, inputs), curve in self.gemms.items():
            if kind == dtype:
                by_inputs[inputs][outputs] = curve

        def seconds(tokens: int) -> float:
            rows = {inputs: {n: curve.at(tokens) for n, curve in row.items()} for inputs, row in by_inputs.items()}
            return at({inputs: at(row, n) for inputs, row in rows.items()}, k)

        return list(map(seconds, TOKENS))

    def attention(self, heads: tuple[int, int]) -> tuple[float, Grid, Grid]:
        """Of one layer with so many (heads, KV heads) on a device: launching it, prompts, decodes."""
        table = self.decodes[heads]
        floor = min(table.values())
        batches, contexts = (sorted({key[i] for key in table}) for i in (0, 1))
        # Large batches of long contexts are missing: beyond a batch's last one, in proportion.
        excess = {
            batch: {context: table[batch, context] - floor for context in contexts if (batch, context) in table}
            for batch in batches
        }
        decode = [[at(excess[batch], context) for context in contexts] for batch in batches]

        whole: dict[int, float] = {}  # what a prompt without a past adds to a full step
        for length in {length for _, length in self.prompts[heads]}:
            batch = max(b for b, n in self.prompts[heads] if n == length and (b == 1 or b * n <= STEP))
            whole[length] = max((self.prompts[heads][batch, length] - floor) / batch, 1e-9)

        def prompt(past: int, new: int) -> float:
            total = past + new
            return max(power(whole, total) * (1 - (past / total) ** 2), at(excess[1], total))

        prefill = [[prompt(past, new) for new in NEW] for past in PAST]
        return floor, grid(PAST, NEW, prefill, floor), grid(batches, contexts, decode, floor)

    def profile(self, model: str, shape: Shape, dtype: str, tp: int) -> Profile:
        """Of one model; KeyError where a table is missing."""
        floor, prefill, decode = self.attention((shape.heads // tp, max(shape.kv_heads // tp, 1)))
        parts = [self.gemm(dtype, *sizes) for sizes in shape.linears(tp)]
        parts.append([tokens * shape.small_bytes(tp) / self.bandwidth for tokens in TOKENS])
        if shape.experts:
            moe = self.moe[dtype, shape.hidden, shape.inter, shape.experts, shape.active, tp]
            parts += [self.gemm("bfloat16", shape.experts, shape.hidden), [moe.at(tokens) for tokens in TOKENS]]
        linear = [shape.layers * (floor + sum(seconds)) for seconds in zip(*parts, strict=True)]
        if tp > 1:
            reduces, count = self.all_reduces[tp,], 2 * shape.layers + 1
            linear = [s + count * reduces.at(n * shape.hidden) for s, n in zip(linear, TOKENS, strict=True)]
        kv_heads = max(shape.kv_heads, tp)  # fewer are repeated; K and V are bf16 whatever the weights are
        return Profile(
            version=1,
            name=self.device,
            model=model,
            dtype=dtype,
            tensor_parallel=tp,
            source=f"NVIDIA AIConfigurator {RELEASE}: kernels of vLLM {self.version}, summed up; no whole steps",
            licence="Apache-2.0",
            constant=CONSTANT,
            linear=shrunk(TOKENS, linear),
            head=shrunk(TOKENS, self.gemm("bfloat16", shape.vocab // tp, shape.hidden)),
            prefill_attention=times(prefill, shape.layers),
            decode_attention=times(decode, shape.layers),
            num_layers=shape.layers,
            kv_bytes_per_token=4 * shape.layers * kv_heads * shape.head_dim,
            weight_bytes=shape.weight_bytes(1 if dtype == "fp8" else 2),
            memory_bytes=self.memory_bytes,
        )


def tabulate(rows: Iterable[tuple[Any, ...]]) -> dict[tuple[Any, ...], Curve]:
    """A curve for each key, of rows (*key, point, milliseconds)."""
    tables: dict[tuple[Any, ...], dict[int, float]] = defaultdict(dict)
    for *key, point, milliseconds in rows:
        tables[tuple(key)][point] = milliseconds / 1e3
    return {key: Curve(*map(list, zip(*sorted(table.items()), strict=True))) for key, table in tables.items()}


def at(table: Mapping[int, float], x: int) -> float:
    """Seconds at x, of a table in any order."""
    points = sorted(table)
    return interpolate(points, [table[point] for point in points], x)


def power(table: Mapping[int, float], x: int) -> float:
    """Seconds at x where they grow with a power of it between the points; beyond the last with the square."""
    points = sorted(table)
    if x >= points[-1]:
        return table[points[-1]] * (x / points[-1]) ** 2
    low, high = next((low, high) for low, high in pairwise(points) if low <= x < high)
    return table[low] * math.pow(table[high] / table[low], math.log(x / low) / math.log(high / low))


def times(table: Grid, layers: int) -> Grid:
    """Of so many layers."""
    return Grid(table.rows, table.columns, [[digits(layers * value) for value in line] for line in table.seconds])


def aiconfigurator(package: Path) -> None:
    """All models, as far as the tables have them and the weights leave room on the device."""
    shapes = {model: Shape.read(package / "model_configs" / f"{name}_config.json") for model, name in MODELS.items()}
    for device in DEVICES:
        tables, profiles = Tables(package / "systems", device), []
        for (model, shape), tp, dtype in product(shapes.items(), (1, 2, 4, 8), ("bfloat16", "fp8")):
            if not any(kind == dtype for kind, *_ in tables.gemms):
                continue  # no such tensor cores
            try:
                profile = tables.profile(model, shape, dtype, tp)
                profile.pages(16)
            except (LookupError, ValueError) as error:
                say(f"{device}: no {model} {dtype} tp{tp}: {error}")
                continue
            profiles.append(profile)
        write(device, profiles)
    say(
        "\n| predicted / measured by vLLM 0.22.1 | decode step, batch 1 | batch 64, 2k context | prefill of 16 x 4000 |"
    )
    say("|---|---|---|---|")
    for (device, model), measured in MEASURED.items():
        cells = [
            f"{ours:,.{places}f} / {theirs:,.{places}f} {unit} ({ours / theirs - 1:+.1%})"
            for ours, theirs, places, unit in zip(
                predict(load_profile(device, model)), measured, (2, 2, 0), ("ms", "ms", "tok/s"), strict=True
            )
        ]
        say(f"| {device} {model} | {' | '.join(cells)} |")


def predict(profile: Profile) -> tuple[float, float, float]:
    """What MEASURED has. The host is ahead in long prompt steps, so that CONSTANT is not theirs."""
    one, many = (1e3 * profile.step_seconds((), seqs, 2048 * seqs) for seqs in (1, 64))
    return one, many, 4 * 4000 / (profile.step_seconds([(0, 4000)] * 4, 0, 0) - profile.constant)


# ------------------------------------------------------------ Splitwise

CLUSTERS = {"a100-80gb": "dgx-a100", "h100-80gb": "dgx-h100", "h100-80gb-pcap": "dgx-h100-pcap"}
SIZES = {  # layers; bytes of KV a token and of weights, in 16 bits
    "llama2-70b": (80, 2 * 80 * 8 * 128 * 2, 2 * 68_976_648_192),
    "bloom-176b": (70, 2 * 70 * 112 * 128 * 2, 2 * 176_247_271_424),
}


def splitwise(path: Path) -> None:
    """Medians of the repetitions: prompt steps by their tokens alone, as in Splitwise's own simulator (which adds 10 %
    where decodes are among them, as is not done here), and decode steps by their sequences."""
    samples: dict[tuple[str, str, int], list[dict[str, str]]] = defaultdict(list)
    for row in csv.DictReader(path.read_text().splitlines()):
        samples[row["hardware"], row["model"], int(row["tensor_parallel"])].append(row)
    profiles: dict[str, list[Profile]] = defaultdict(list)
    nothing = Grid([1], [1], [[0.0]])
    for (hardware, model, tp), rows in samples.items():
        by_tokens: dict[int, list[float]] = defaultdict(list)
        for row in rows:
            batch = int(row["batch_size"])
            by_tokens[batch].append(float(row["token_time"]) / 1e3)
            by_tokens[batch * int(row["prompt_size"])].append(float(row["prompt_time"]) / 1e3)
        medians = {tokens: statistics.median(seconds) for tokens, seconds in sorted(by_tokens.items())}
        # The largest batch of Llama-2-70B on two devices took a quarter of the time of half of it: it did not fit.
        peaks = accumulate(medians.values(), max)
        points = [
            (tokens, seconds)
            for (tokens, seconds), peak in zip(medians.items(), peaks, strict=True)
            if seconds > peak / 2
        ]
        num_layers, kv_bytes, weight_bytes = SIZES[model]
        profiles[CLUSTERS[hardware]].append(
            Profile(
                version=1,
                name=CLUSTERS[hardware],
                model=model,
                dtype="bfloat16",
                tensor_parallel=tp,
                source="Splitwise (ISCA 2024): whole steps, measured by its authors with vLLM; by tokens alone",
                licence="MIT",
                constant=0.0,
                linear=shrunk([tokens for tokens, _ in points], [seconds for _, seconds in points]),
                head=Curve([1], [0.0]),
                prefill_attention=nothing,
                decode_attention=nothing,
                num_layers=num_layers,
                kv_bytes_per_token=kv_bytes,
                weight_bytes=weight_bytes,
                memory_bytes=80 << 30,
            )
        )
    for device, of_device in profiles.items():
        write(device, of_device)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("tables", choices=("aiconfigurator", "splitwise"))
    parser.add_argument("path", type=Path, help="the unpacked package, or the CSV file")
    args = parser.parse_args()
    {"aiconfigurator": aiconfigurator, "splitwise": splitwise}[args.tables](args.path)


if __name__ == "__main__":
    main()
