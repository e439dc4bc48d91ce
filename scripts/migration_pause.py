"""What a live migration costs the request that moves: its longest gap between two tokens, in decode steps.

    python scripts/migration_pause.py                                    SmolLM2's shape, a prompt of 1,000 tokens
    python scripts/migration_pause.py --link gloo --prompt 200 --out pause.json

Two colocated workers of a core each; one request decodes, and goes from one to the other and back every few tokens. The
pause is the gap that holds the move less an undisturbed step (median), in steps; beside it how long each move took in
all, while the request went on decoding.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from minidisagg.config import ClusterSettings, ModelSettings, RunSettings, WorkerSettings
from minidisagg.core.messages import SamplingParams
from minidisagg.core.tracked import Emit
from minidisagg.runtime.frontend import Frontend
from minidisagg.transfer.kinds import KINDS

EVERY = 12  # tokens between two moves, which is more than one takes


async def measure(model: str, link: str, prompt: int, moves: int) -> dict[str, Any]:
    """Seconds: undisturbed gaps, gaps with a move in them, and moves from the order to the first token elsewhere."""
    worker = WorkerSettings(max_num_seqs=4)
    cluster = ClusterSettings(mode="colocated", prefill=worker, decode=worker, link=link)
    gaps: dict[bool, list[float]] = {False: [], True: []}
    times, ended, began, took = list[float](), asyncio.Event(), list[float](), list[float]()
    async with await Frontend.start(ModelSettings(model=model), cluster, RunSettings()) as frontend:

        def listen(emit: Emit, now: float) -> None:
            if emit.tokens and times:
                gaps[emit.handoff].append(now - times[-1])
            took.extend([now - began[-1]] if emit.handoff else [])
            times.extend(now for _ in emit.tokens)
            if emit.finish:
                ended.set()
            elif len(began) < moves and len(times) >= EVERY * (len(began) + 1):
                request = frontend.requests[emit.request_id]
                if frontend.migrate(emit.request_id, next(w for w in frontend.worker_names if w != request.decode)):
                    began.append(now)

        rng = random.Random(0)
        tokens = [rng.randrange(frontend.vocab_size) for _ in range(prompt)]
        asked = SamplingParams(temperature=0.0, max_tokens=EVERY * (moves + 2), ignore_eos=True)
        frontend.submit(tokens, asked, listen)
        await ended.wait()
    return {"link": link, "prompt": prompt, "steps": gaps[False], "moves": gaps[True], "took": took}


@click.command(help=__doc__)
@click.option("--model", default="dummy:smollm2-135m", show_default=True)
@click.option("--link", default="shm", show_default=True, type=click.Choice(["auto", *KINDS]))
@click.option("--prompt", default=1000, show_default=True, help="tokens")
@click.option("--moves", default=20, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="write all gaps there, as JSON")
def main(model: str, link: str, prompt: int, moves: int, out: Path | None) -> None:
    found = asyncio.run(measure(model, link, prompt, moves))
    step = statistics.median(found["steps"])
    pauses = sorted((gap - step) / step for gap in found["moves"])
    table = Table("moves", "step, ms", "pause, steps: median", "p90", "longest", "a move in all, ms: median")
    table.add_row(
        str(len(pauses)), f"{step * 1e3:.1f}", f"{statistics.median(pauses):.2f}",
        f"{pauses[len(pauses) * 9 // 10]:.2f}", f"{pauses[-1]:.2f}", f"{statistics.median(found['took']) * 1e3:.0f}",
    )  # fmt: skip
    Console().print(table)
    if out:
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
