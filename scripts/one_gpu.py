"""What disaggregation is worth with one GPU, and how exact its steps are.

    scripts/one_gpu.py --part shared       8B: one colocated worker against a prefill and a decode process on one card
    scripts/one_gpu.py --part mps          the same under an MPS daemon, which this starts and ends
    scripts/one_gpu.py --part laptop       135M: the GPU prefills and the CPU decodes, against either of them alone
    scripts/one_gpu.py --part precision    how long bfloat16 samples what float32 does, and by how little it differs
    scripts/one_gpu.py --part shared --dry-run

Two processes on one card take turns: unless the user runs an MPS daemon, one waits while the other computes. Each part
takes less than six minutes, appends what it saw to one JSON, and ends with a short table.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from minidisagg.core.messages import SamplingParams
from minidisagg.core.plan import PlanItem, SeqInit, StepPlan
from minidisagg.model.dummy import SHAPES, parameter_shapes
from minidisagg.model.transformer import Transformer
from minidisagg.runtime.device import Device
from minidisagg.runtime.kv_cache import KVCache

FIGURES = {
    "mean_ttft": "TTFT", "p99_ttft": "p99 TTFT", "mean_ttst": "2nd token", "mean_tpot": "TPOT", "p99_itl": "p99 ITL",
    "mean_e2el": "E2E",
}  # fmt: skip
LARGE = (
    "dummy:llama-8b", "--device", "cuda", "--dtype", "bfloat16", "--block-size", "64", "--kv-cache-memory", "10G",
    "--max-num-seqs", "64", "--max-num-batched-tokens", "8192", "--max-model-len", "4096", "--random-input-len", "2000",
    "--random-output-len", "128", "--no-prefix-caching",
)  # fmt: skip
SMALL = (
    "dummy:smollm2-135m", "--block-size", "64", "--kv-cache-memory", "1G", "--random-input-len", "512",
    "--random-output-len", "64", "--no-prefix-caching", "--dtype", "float32",
)  # fmt: skip
COLOCATED = ("--mode", "colocated", "--prefill-workers", "1", "--decode-workers", "0")
DISAGG = ("--mode", "disagg", "--prefill-workers", "1", "--decode-workers", "1")
MPS = "nvidia-cuda-mps-control"
PROMPTS, PROMPT, OUTPUT = 32, 256, 64  # of the precision part


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def compare(sides: dict[str, tuple[str, ...]], load: tuple[str, ...], dry_run: bool) -> list[dict[str, Any]]:
    """Each side twice, in turns."""
    rows = []
    for repeat in range(2):
        for name, flags in sides.items():
            command = [sys.executable, "-m", "minidisagg", "bench", *flags, *load, "--repeats", "1", "--seed", "1"]
            say(" ".join(["minidisagg", *command[3:]]))
            if dry_run:
                continue
            with TemporaryDirectory() as folder:
                done = subprocess.run([*command, "--result-dir", folder], capture_output=True, text=True)
                if done.returncode:
                    raise click.ClickException(done.stderr.strip() or done.stdout.strip())
                (found,) = Path(folder).glob("*/result.json")
                result = json.loads(found.read_text())
            (side,) = result["sides"].values()
            rows.append({"side": name, "repeat": repeat, "warnings": done.stderr.strip(), **side["values"]})
            say(", ".join(f"{label} {rows[-1][key] * 1e3:.1f}" for key, label in FIGURES.items()))
    if rows:
        table = Table("ms", *FIGURES.values())
        for name in sides:
            mine = [r for r in rows if r["side"] == name]
            table.add_row(name, *[" ".join(f"{r[key] * 1e3:.1f}" for r in mine) for key in FIGURES])
        Console(width=140).print(table)
    return rows


def shared_part(dry_run: bool) -> list[dict[str, Any]]:
    """8B at five requests a second."""
    sides = {
        "colocated": (*LARGE, *COLOCATED),
        "two processes": (*LARGE, *DISAGG, "--link", "cuda_ipc"),
        "colocated, Sarathi": (*LARGE, *COLOCATED, "--policy", "sarathi:chunk=512"),
    }
    return compare(sides, ("--request-rate", "5", "--num-prompts", "60"), dry_run)


def mps_part(dry_run: bool) -> list[dict[str, Any]]:
    """The load of `shared` where kernels of both run side by side, with and without a bound for the prefill's."""
    if shutil.which(MPS) is None and not dry_run:
        raise click.ClickException(f"there is no {MPS}, which comes with NVIDIA's driver")
    sides = {
        "colocated": (*LARGE, *COLOCATED),
        "MPS": (*LARGE, *DISAGG, "--link", "cuda_ipc"),
        "MPS, prefill sms=60%": (*LARGE, *DISAGG, "--link", "cuda_ipc", "--prefill", "sms=60%"),
    }
    if not dry_run:
        subprocess.run([MPS, "-d"], check=True)
    try:
        return compare(sides, ("--request-rate", "5", "--num-prompts", "60"), dry_run)
    finally:
        if not dry_run:
            subprocess.run([MPS], input="quit\n", text=True, check=False)  # what was measured stands


def laptop_part(dry_run: bool) -> list[dict[str, Any]]:
    """135M in float32, four requests a second."""
    on_gpu, on_cpu = ("--device", "cuda"), ("--device", "cpu")
    sides = {
        "GPU alone": (*SMALL, *COLOCATED, *on_gpu),
        "CPU alone": (*SMALL, *COLOCATED, *on_cpu),
        "GPU prefills, CPU decodes": (*SMALL, *DISAGG, *on_cpu, "--prefill", "device=cuda"),
        "CPU prefills, GPU decodes": (*SMALL, *DISAGG, *on_cpu, "--decode", "device=cuda"),
    }
    return compare(sides, ("--request-rate", "4", "--num-prompts", "40"), dry_run)


def sampled(device: Device, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy tokens of each prompt, and by how much the likeliest was ahead of the next."""
    greedy = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True, logprobs=2)
    size = device.cache.page_size
    per = -(-(PROMPT + OUTPUT) // size)
    tokens: list[list[int]] = [[] for _ in prompts]
    gaps: list[list[float]] = [[] for _ in prompts]
    for step in range(OUTPUT):
        new = [SeqInit(str(i), 0, prompt, [], greedy) for i, prompt in enumerate(prompts)] if not step else []
        items = []
        for i, prompt in enumerate(prompts):
            pages = list(range(i * per, (i + 1) * per))
            start, given = (PROMPT + step - 1, tokens[i][-1:]) if step else (0, prompt)
            items.append(PlanItem(str(i), 0, start, len(given), given, pages, True, step))
        result = device.run(StepPlan(step, items, new, []))
        for i, token in enumerate(result.tokens):
            tokens[i].append(token)
        for logprobs in result.logprobs:
            (value,) = logprobs.values
            first, second = sorted((pair[1] for pair in value.top), reverse=True)[:2]
            gaps[int(logprobs.request_id)].append(first - second)
    return tokens, gaps


def precision_part(dry_run: bool) -> list[dict[str, Any]]:
    """0.6B, random weights: greedy tokens of the fused steps in bfloat16 against portable ones in float32."""
    from minidisagg.model.fused import FusedTransformer  # Triton is not everywhere
    from minidisagg.runtime.fused_device import FusedDevice

    if dry_run:
        return []
    config, cuda = SHAPES["qwen3-0.6b"], torch.device("cuda")
    torch.manual_seed(0)
    weights = {
        name: torch.ones(size, device=cuda) if len(size) == 1 else torch.randn(size, device=cuda) * 0.05
        for name, size in parameter_shapes(config).items()
    }
    weights = {name: weight.bfloat16() for name, weight in weights.items()}
    rng = random.Random(0)
    prompts = [[rng.randrange(config.vocab_size) for _ in range(PROMPT)] for _ in range(PROMPTS)]
    pages = PROMPTS * -(-(PROMPT + OUTPUT) // 64)
    found = {}
    for name, dtype in ("float32", torch.float32), ("bfloat16", torch.bfloat16):
        cache = KVCache(config, pages, 64, dtype, cuda)
        made = {key: weight.to(dtype) for key, weight in weights.items()}
        if name == "float32":
            device = Device(Transformer(config, made, dtype, cuda), cache)
        else:
            device = FusedDevice(FusedTransformer(config, made, dtype, cuda), cache, PROMPTS, PROMPT + OUTPUT, PROMPT)
            device.warm_up()
        found[name] = sampled(device, prompts)
    (exact, gaps), (ours, _) = found["float32"], found["bfloat16"]
    rows = []
    for a, b, gap in zip(exact, ours, gaps, strict=True):
        same = next((n for n in range(OUTPUT) if a[n] != b[n]), OUTPUT)
        rows.append({"same": same, "gap": gap[same] if same < OUTPUT else None, "median_gap": statistics.median(gap)})
    table = Table("prompts", f"same for all {OUTPUT} tokens", "same first token", "mean tokens alike", "gap where they "
                  "part, median and largest", "gap of all tokens, median")  # fmt: skip
    parted = [r["gap"] for r in rows if r["gap"] is not None]
    table.add_row(
        str(PROMPTS), f"{sum(r['same'] == OUTPUT for r in rows) / PROMPTS:.0%}",
        f"{sum(r['same'] > 0 for r in rows) / PROMPTS:.0%}", f"{statistics.mean(r['same'] for r in rows):.1f}",
        f"{statistics.median(parted):.3f}, {max(parted):.3f}" if parted else "",
        f"{statistics.median(r['median_gap'] for r in rows):.3f}",
    )  # fmt: skip
    Console(width=140).print(table)
    return rows


PARTS = {"shared": shared_part, "mps": mps_part, "laptop": laptop_part, "precision": precision_part}


@click.command(help=__doc__)
@click.option("--part", type=click.Choice(list(PARTS)), required=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("one_gpu.json"), show_default=True)
@click.option("--dry-run", is_flag=True, help="say what would be run")
def main(part: str, out: Path, dry_run: bool) -> None:
    if not torch.cuda.is_available() and not dry_run:
        raise click.ClickException("this measures a GPU, and torch sees none")
    began = time.time()
    rows = PARTS[part](dry_run)
    if dry_run:
        return
    seen = json.loads(out.read_text()) if out.exists() else []
    card = torch.cuda.get_device_name()
    seen.append({"part": part, "card": card, "seconds": round(time.time() - began), "rows": rows})
    out.write_text(json.dumps(seen, indent=1))


if __name__ == "__main__":
    main()
