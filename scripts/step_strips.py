"""The picture of the README: what two GPUs do in the same second, colocated and disaggregated, and what a reader sees.

    python scripts/step_strips.py [--out docs/images/steps.svg]

Simulated: an 8B model on two H100s, eight prompts of 3,000 tokens a second, 200 tokens out. Below each pair of strips
are the tokens of one request, as they come.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from minidisagg.measure.records import RequestRecord, StepRecord
from minidisagg.measure.timeline import Timeline, step_kind
from minidisagg.sim.simulate import simulate
from minidisagg.workload.lengths import WorkItem

FIRST, LAST = 12.0, 13.2  # seconds of the run that are drawn
WIDTH, LEFT, STRIP, GAP = 960, 118, 26, 8
COLORS = {"prefill": "#e07b39", "mixed": "#9b59b6", "decode": "#3b82c4"}
MEANINGS = {"prefill": "prefill", "decode": "decode", "mixed": "both in one step: every decode waits for the prompt"}


def workload() -> list[WorkItem]:
    """Open loop, random gaps."""
    rng, at, items = random.Random(5), 0.0, []
    while at < LAST + 1:
        at += rng.expovariate(8.0)
        items.append(WorkItem(index=len(items), prompt_len=3000, output_len=200, arrival_s=at))
    return items


def x(at: float) -> float:
    return LEFT + (at - FIRST) / (LAST - FIRST) * (WIDTH - LEFT - 12)


def strip(worker: str, steps: list[StepRecord], top: float) -> list[str]:
    """One worker's steps."""
    out = [f'<text x="{LEFT - 10}" y="{top + STRIP * 0.68}" text-anchor="end">{worker}</text>']
    out.append(f'<rect x="{LEFT}" y="{top}" width="{WIDTH - LEFT - 12}" height="{STRIP}" fill="#8883" rx="2"/>')
    for step in steps:
        ends = step.ends or [step.begin + step.seconds]
        for begin, end in zip([step.begin, *ends], ends, strict=False):
            a, b = max(begin, FIRST), min(end, LAST)
            if a < b:
                out.append(
                    f'<rect x="{x(a):.1f}" y="{top}" width="{max(x(b) - x(a) - 0.6, 0.4):.1f}" height="{STRIP}" '
                    f'fill="{COLORS[step_kind(step)]}"/>'
                )
    return out


def reader(requests: list[RequestRecord], top: float) -> list[str]:
    """The tokens of the request with the most of them in the window."""
    one = max(requests, key=lambda r: sum(FIRST < at < LAST for at in r.token_times))
    out = [f'<text x="{LEFT - 10}" y="{top + 8}" text-anchor="end" class="small">one reader</text>']
    seen = [at for at in one.token_times if FIRST < at < LAST]
    out += [f'<circle cx="{x(at):.1f}" cy="{top + 4}" r="2.2" class="ink"/>' for at in seen]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs/images/steps.svg")
    out, top = list[str](), 34.0
    for title, cluster in (
        ("colocated: each of two GPUs does both", "both=2@h100"),
        ("disaggregated: one prefills, one decodes, the KV cache moves", "prefill=1@h100,decode=1@h100"),
    ):
        timeline = Timeline()
        run = simulate("fcfs", workload(), cluster, observers=[timeline]).run
        out.append(f'<text x="{LEFT}" y="{top - 8}" class="title">{title}</text>')
        for worker in (record.name for record in run.workers):
            out += strip(worker, [step for step in timeline.steps() if step.worker == worker], top)
            top += STRIP + GAP
        out += reader(run.requests, top)
        top += 52
    legend, at = list[str](), float(LEFT)
    for kind, meaning in MEANINGS.items():
        legend.append(f'<rect x="{at}" y="{top - 30}" width="12" height="12" fill="{COLORS[kind]}"/>')
        legend.append(f'<text x="{at + 18}" y="{top - 20}" class="small">{meaning}</text>')
        at += 52 + 6.6 * len(meaning)
    span = f"{LAST - FIRST:g} seconds →"
    legend.append(f'<text x="{WIDTH - 12}" y="{top - 20}" text-anchor="end" class="small">{span}</text>')
    style = (
        "text{font:13px system-ui,sans-serif;fill:#333}.title{font-weight:600;font-size:14px}.small{font-size:12px}"
        ".ink{fill:#333}@media(prefers-color-scheme:dark){text,.ink{fill:#ddd}}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top - 8:.0f}" role="img">'
    body = "\n".join([head, f"<style>{style}</style>", *out, *legend, "</svg>"])
    path = parser.parse_args().out
    path.write_text(body + "\n")


if __name__ == "__main__":
    main()
