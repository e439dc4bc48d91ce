"""Flags of `bench` alone."""

from __future__ import annotations

import click

from minidisagg.bench.settings import PRESETS as BENCH_PRESETS
from minidisagg.config import MODES
from minidisagg.options import once, stack

QUALITY_PROMPTS = 200


def _use_preset(ctx: click.Context, _: click.Parameter, name: str | None) -> str:
    """An eager option: the preset's values become the defaults of the options after it."""
    ctx.default_map = {**(ctx.default_map or {}), **BENCH_PRESETS.get(name or "", {})}
    return name or ""


# fmt: off
bench_options = stack(
    [
        click.option("--mode", type=click.Choice([*MODES, "both"]), default="both", show_default=True,
                     help="What to measure; both is disagg against colocated, on as many workers."),
        click.option("--against", default="", metavar="MODE[:POLICY]", help="Compare --mode with this baseline."),
        click.option("--compare", metavar="SIDE,SIDE,…", multiple=True, callback=once,
                     help="Any number of sides, in place of --mode and --against: MODE, POLICY or MODE:POLICY each, "
                          "the baseline first."),
        click.option("--baseline", default="", metavar="KEY=VAL,…",
                     help="In what the baseline differs: keys of --decode, link, transfer_granularity, kv_codec."),
        click.option("--plant-slowdown", default="0", metavar="SHARE",
                     help="Make each step of the side that is not the baseline longer by this share of its time, as "
                          "15%: a control that must be noticed."),
        click.option("--base-url", default="", metavar="URL",
                     help="Measure an OpenAI-compatible server that runs already; MODEL is then its model's name."),
        click.option("--api-key", default="", envvar="OPENAI_API_KEY", show_envvar=True, metavar="KEY",
                     help="Of that server."),
        click.option("--tokenizer", default="", metavar="MODEL",
                     help="Where random prompts get their token ids from.  [default: the server's model]"),
        click.option("--preset", type=click.Choice(list(BENCH_PRESETS)), is_eager=True, callback=_use_preset,
                     help="quick: a first comparison in three minutes."),
        click.option("--kv-quality", is_flag=True,
                     help="No load, but what --kv-codec does to the answers to English prompts.  [default --kv-codec: "
                          f"int8, --num-prompts: {QUALITY_PROMPTS}]"),
        click.option("--dry-run", is_flag=True, help="Say what would be done, and how long it would take."),
    ],
    "What is measured",
)
# fmt: on
