"""The flags of `minidisagg simulate` beside those of its load, and all of `minidisagg league`."""

from __future__ import annotations

from pathlib import Path

import click

from minidisagg.core.plan import CODECS, RAW
from minidisagg.core.predictor import PREDICTORS
from minidisagg.interconnect import PRESETS
from minidisagg.options import FiniteRange, decisions_option, once, positive, record_option, stack

# A load that means something on the default cluster; a simulation has no noise, so that one repetition says much.
SIMULATED = {"dataset_name": "synth:azure-conv-2023", "num_prompts": 500, "repeats": 1}
LEAGUE = {"cluster": "prefill=4@h100,decode=4@h100", "block_size": 512}

# fmt: off
cluster_options = stack(
    [
        click.option("--cluster", default="prefill=1@h100,decode=1@h100", show_default=True,
                     metavar="ROLE=N@DEVICE[xM],…",
                     help="Workers by role (prefill, decode, both), each of M cards (tensor parallel). DEVICE is the "
                          "beginning of a shipped profile's name (h100, h200, a100, dgx-a100, …) or a profile's file."),
        click.option("--model", default="llama-8b", show_default=True,
                     help="qwen3-0.6b, llama-8b, qwen3-32b, llama-70b, qwen3-30b-a3b, or what a profile's file has."),
        click.option("--dtype", type=click.Choice(["bfloat16", "fp8", "float32"]), default="bfloat16",
                     show_default=True, help="Of the weights; KV is bfloat16."),
        click.option("--prefill", default="", metavar="KEY=VAL,…",
                     help="max_num_seqs, max_num_batched_tokens, chunk of prefill workers."),
        click.option("--decode", default="", metavar="KEY=VAL,…", help="The same of all others."),
        click.option("--link", default="400g-ib", show_default=True, metavar="NAME|BANDWIDTH,LATENCY",
                     help=f"Of each card's wire: {', '.join(PRESETS)}, or 25Gbps,20us."),
        click.option("--kv-codec", type=click.Choice(CODECS), default=RAW, show_default=True,
                     help="How KV looks on the wire: int8 is half of it, and costs nothing else here."),
        click.option("--decode-after", type=positive, default=1, show_default=True, metavar="TOKENS",
                     help="After so many tokens a decode worker goes on: 1 is after the prompt."),
        click.option("--transfer-granularity", default="auto", show_default=True, metavar="WHAT",
                     help="request, chunk, layers:N or auto."),
        click.option("--block-size", type=positive, default=64, show_default=True, metavar="TOKENS",
                     help="Of a KV page; 512, a Mooncake trace's own, is faster to simulate."),
        click.option("--gpu-memory-utilization", type=click.FloatRange(0, 1, min_open=True), default=0.9,
                     show_default=True),
        click.option("--no-prefix-caching", is_flag=True),
        click.option("--predict-lengths", type=click.Choice(PREDICTORS), default="none", show_default=True,
                     help="What a policy sees of an output's length; a run with the oracle is marked."),
        click.option("--seed", type=int, default=0, show_default=True),
        click.option("--time-limit", type=FiniteRange(min=0), default=0.0, metavar="S",
                     help="Give up when a run has taken so many seconds here."),
    ],
    "Cluster",
)

simulate_options = stack(
    [
        click.option("--policy", metavar="NAME[:KEY=VAL]", multiple=True, callback=once,
                     help="One side: the cluster with this policy."),
        click.option("--compare", metavar="SIDE,SIDE,…", multiple=True, callback=once,
                     help="MODE, POLICY or MODE:POLICY of each side; colocated is the same devices, each doing both. "
                          "The first is the baseline.  [default: colocated,disagg, or --policy alone]"),
        decisions_option,
        record_option,
        click.option("--jobs", "-j", type=positive, default=1, show_default=True, metavar="N",
                     help="Runs at a time, each in a process."),
    ],
    "Sides",
)

league_options = stack(
    [
        click.option("--policies", default="", metavar="SIDE,SIDE,…",
                     help="Who plays: POLICY in both modes (what its rule says nothing of is left out), MODE or "
                          "MODE:POLICY in one. In a policy's settings {ttft} and {tpot} are the SLO, in seconds.  "
                          "[default: all that ship]"),
        click.option("--policy", "added", multiple=True, metavar="SIDE", help="One more. Repeatable."),
        click.option("--workload", "workloads", multiple=True, metavar="NAME|KIND:FILE",
                     help="A data set as --dataset-name of `simulate` has them; a trace with its file, as in "
                          "mooncake:conversation_trace.jsonl. Repeatable.  [default: synth:mooncake-conversation, "
                          "synth:azure-code-2023, synth:azure-conv-2023]"),
        click.option("--loads", default="0.5,0.8,1.1", show_default=True, metavar="X,X,…",
                     help="Request rates, as shares of what the devices would do if none of them ever waited."),
        click.option("--goodput", multiple=True, metavar="NAME:MS …",
                     help="SLOs, as in: --goodput ttft:200 tpot:50  [default: 8 unloaded prefills, 2 steps]"),
        click.option("--num-prompts", type=positive, default=500, show_default=True, help="Of each run."),
        click.option("--repeats", type=positive, default=5, show_default=True,
                     help="Runs of each cell, each with requests and times of its own."),
        click.option("--jobs", "-j", type=positive, metavar="N", help="Runs at a time.  [default: one per core]"),
        click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("league"),
                     show_default=True, metavar="DIR",
                     help="Where the tables go. Finished runs are kept there: the same command goes on."),
    ],
    "League",
)
# fmt: on
