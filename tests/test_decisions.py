"""The decision log of a real run: every hook is there, and the answers are those that were acted on."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import cluster
from cluster import needs_two_cores

from minidisagg.config import RunSettings


@needs_two_cores
def test_every_decision_is_written(tmp_path: Path) -> None:
    async def run() -> None:
        shape = cluster.settings("disagg", link="unix", pages=96, policy="sarathi:chunk=24")
        async with cluster.cluster(shape, RunSettings(decision_dir=str(tmp_path))) as frontend:
            await cluster.run_to_end(frontend, cluster.prompts(30, longest=120), cluster.greedy(40))
            frontend.set_policy("fcfs")
            await cluster.run_to_end(frontend, cluster.prompts(2, seed=1), cluster.greedy(4))

    asyncio.run(run())
    lines: dict[str, list[dict[str, Any]]] = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.iterdir()
    }
    assert set(lines) == {"router", "prefill-0", "decode-0"}
    hooks = {line["hook"] for of_one in lines.values() for line in of_one}
    assert hooks >= {"admit", "place", "accept", "order", "compose", "evict"}
    admitted = [line for line in lines["router"] if line["hook"] == "admit"]
    assert len(admitted) == 32 and all(line["answer"]["verdict"] == "accept" for line in admitted)
    placed = [line for line in lines["router"] if line["hook"] == "place"]
    assert all(line["answer"] == {"prefill": "prefill-0", "decode": "decode-0"} for line in placed)
    assert set(placed[0]["cluster"]["workers"]) == {"prefill-0", "decode-0"}
    steps = [line for line in lines["prefill-0"] if line["hook"] == "compose"]
    chunks = [count for line in steps for _, _, count in line["answer"]]
    assert max(chunks[:50]) <= 24 < max(chunks), "sarathi's chunks first, whole prompts after the change"
    evicted = [line for line in lines["decode-0"] if line["hook"] == "evict" and line["answer"]]
    assert all(line["answer"] in line["candidates"] for line in evicted)
