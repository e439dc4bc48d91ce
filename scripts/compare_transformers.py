"""Offline throughput on one CPU: minidisagg against transformers' continuous batching, alternating in one run.

    python scripts/compare_transformers.py --threads 2 --rounds 2

16 requests of 128-384 random prompt tokens, 64 out, end-of-sequence ignored, bfloat16. Also prints the decode step at
512 tokens of context against its floor: the bytes that it must read / the bandwidth of a plain read just before it.
--skip-steps and --skip-transformers leave that and the other engine out. The last line is all of it as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

from minidisagg.measure.machine import command_line, machine
from minidisagg.model.loader import resolve
from minidisagg.runtime.launch import MALLOC_TUNABLES

OUT = 64


def prompts(count: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(49152) for _ in range(rng.randint(128, 384))] for _ in range(count)]


def transformers_round(model: object, batch: list[list[int]]) -> float:
    """Seconds for the batch through `generate_batch`."""
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=OUT, min_new_tokens=OUT, do_sample=False, eos_token_id=-1, pad_token_id=0)
    began = time.perf_counter()
    outputs = model.generate_batch(inputs=batch, generation_config=config, progress_bar=False)  # type: ignore[attr-defined]
    seconds = time.perf_counter() - began
    tokens = sum(len(output.generated_tokens) for output in outputs.values())
    assert tokens == OUT * len(batch), tokens
    return seconds


def steps(threads: int) -> list[dict[str, float]]:
    """The decode step at 512 tokens of context, and what part of it its floor is."""
    import torch

    from minidisagg.core.messages import SamplingParams
    from minidisagg.core.plan import PlanItem, SeqInit, StepPlan
    from minidisagg.model.loader import load_config, load_weights
    from minidisagg.model.transformer import Transformer
    from minidisagg.runtime.device import Device
    from minidisagg.runtime.kv_cache import KVCache

    torch.set_num_threads(threads)
    config, cpu = load_config("smollm2-135m"), torch.device("cpu")
    model = Transformer(config, load_weights("smollm2-135m", config), torch.bfloat16, cpu)
    cache = KVCache(config, 16 * 5, 128, torch.bfloat16, cpu)
    cache.data.normal_()
    device, rows = Device(model, cache), []
    greedy = SamplingParams(temperature=0.0)
    stream = torch.randint(2**30, (1 << 26,), dtype=torch.int32).view(torch.float32)  # as long as the weights
    for batch in (1, 8, 16):
        items = [
            PlanItem(f"r{i}", 0, 511, 1, [random.Random(i).randrange(49152)], list(range(5 * i, 5 * i + 5)), True, 0)
            for i in range(batch)
        ]
        new = [SeqInit(item.request_id, 0, [1], [], greedy) for item in items]
        reads, times, ratios = [], [], []
        with torch.inference_mode():
            device.run(StepPlan(0, items, new, []))
            for _ in range(60):  # in pairs: on a shared machine the bandwidth itself moves from one second to the next
                began = time.perf_counter()
                stream.sum()
                reads.append(stream.nbytes / (time.perf_counter() - began))
                result = device.run(StepPlan(0, items, [], []))
                times.append(result.seconds)
                ratios.append(result.bytes_read / reads[-1] / result.seconds)
        rows.append({
            "batch": batch, "step_ms": statistics.median(times) * 1e3, "read_GBps": statistics.median(reads) / 1e9,
            "floor_over_step": statistics.median(ratios),
            "quarter": statistics.quantiles(ratios)[0], "three_quarters": statistics.quantiles(ratios)[2],
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--skip-transformers", action="store_true")
    parser.add_argument("--skip-steps", action="store_true")
    arguments = parser.parse_args()
    if "GLIBC_TUNABLES" not in os.environ:  # read when a process begins; workers are started with it
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"GLIBC_TUNABLES": MALLOC_TUNABLES})
    import torch

    from minidisagg import LLM, SamplingParams
    from minidisagg.config import WorkerSettings

    torch.set_num_threads(arguments.threads)
    rows = [] if arguments.skip_steps else steps(arguments.threads)
    result: dict[str, object] = {
        "command": command_line(), "machine": machine(), "threads": arguments.threads, "torch": torch.__version__,
        "steps": rows,
    }  # fmt: skip
    for row in rows:
        sys.stdout.write("  ".join(f"{key} {value:.2f}" for key, value in row.items()) + "\n")
    cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
    worker = WorkerSettings(dtype="bfloat16", cpus="+".join(map(str, cores)))
    sampling = SamplingParams(temperature=0.0, max_tokens=OUT, ignore_eos=True)
    reference = None
    if not arguments.skip_transformers:
        from transformers import AutoModelForCausalLM

        path: Path = resolve("smollm2-135m")
        reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="sdpa")
    ours: dict[int, list[float]] = {1: [], 16: []}
    theirs: dict[int, list[float]] = {1: [], 16: []}
    with LLM("smollm2-135m", prefill_workers=1, decode_workers=0, prefill=worker, prefix_caching=False) as llm:
        llm.generate([prompts(1, 99)[0]], sampling)
        for turn in range(arguments.rounds):
            for count in (1, 16):
                batch = prompts(count, turn)
                began = time.perf_counter()
                llm.generate(batch, sampling)  # type: ignore[arg-type]
                ours[count].append(count * OUT / (time.perf_counter() - began))
                if reference is not None:
                    theirs[count].append(count * OUT / transformers_round(reference, batch))
    for count in (1, 16):
        mine = statistics.median(ours[count])
        line = f"{count} at once: minidisagg {mine:.1f} out tok/s"
        if theirs[count]:
            other = statistics.median(theirs[count])
            line += f", transformers {other:.1f}, ratio {mine / other:.2f}"
        sys.stdout.write(line + "\n")
    result |= {"minidisagg": ours, "transformers": theirs}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
