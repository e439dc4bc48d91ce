"""The command line as a user meets it: help, errors in one line, streams, Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minidisagg import bench
from minidisagg.bench.settings import BenchOptions
from minidisagg.cli import cli, main
from minidisagg.config import DEFAULT_MODEL
from minidisagg.measure.goodput import SLO
from minidisagg.model.dummy import SHAPES, dummy_weights, parse_dummy

torch.set_num_threads(1)
COMMANDS = ("pull", "replay", "generate", "chat", "serve", "monitor", "bench", "simulate", "league", "profile", "rerun")
TINY = ["dummy:tiny", "--prompt", "hello"]


def command(*args: str) -> list[str]:
    """`minidisagg ARGS` of this checkout."""
    return [sys.executable, "-m", "minidisagg", *args]


@pytest.fixture
def temp() -> Iterator[Path]:
    """Where run directories are made, so that what is left over can be seen; its path is short, as sockets want it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
def env(temp: Path) -> dict[str, str]:
    """The environment of a command."""
    path = os.pathsep.join(p for p in sys.path if p)
    return {**os.environ, "PYTHONPATH": path, "TMPDIR": str(temp), "PROMPT_TOOLKIT_NO_CPR": "1"}


def minidisagg(env: dict[str, str], *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run to the end. Bytes that are no text, which a random model writes, are replaced."""
    return subprocess.run(
        command(*args), input=stdin, capture_output=True, env=env, timeout=120, encoding="utf-8", errors="replace"
    )


def left_over(temp: Path) -> list[str]:
    """Run directories, and workers, whose output goes into one."""
    processes = [
        path.parts[2] for path in Path("/proc").glob("[0-9]*/fd/1") if _target(path).startswith(f"{temp}/minidisagg-")
    ]
    return [*processes, *(path.name for path in temp.glob("minidisagg-*"))]


def _target(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""  # another user's process, or one that has just ended


# ---------------------------------------------------------------- help


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, minidisagg\nfrom minidisagg.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'rich', 'numpy', 'asyncio', 'tokenizers', 'prompt_toolkit'}\n"
        "print(*heavy & set(sys.modules), file=sys.stderr)"
    )
    for args in (["--help"], ["bench", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60)
        assert done.stdout.startswith("Usage: minidisagg")
        assert done.stderr.strip() == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_examples_and_a_default_model(name: str) -> None:
    found = cli.commands[name]
    assert found.help is not None
    assert f"\n    minidisagg {name}" in found.help or f"\nminidisagg {name}" in found.help
    assert name in ("monitor", "simulate", "league", "replay", "rerun") or found.params[0].default == DEFAULT_MODEL


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("bench", ["What is measured", "Load", "Data set", "Results", "Engine", "Options"]),
        ("simulate", ["Cluster", "Sides", "Load", "Data set", "Results", "Options"]),
        ("serve", ["Options", "Engine"]),
        ("generate", ["Options", "Sampling", "Engine"]),
    ],
)
def test_help_has_each_option_in_a_section(name: str, sections: list[str]) -> None:
    command = cli.commands[name]
    told = command.get_help(click.Context(command, info_name=name))
    assert re.findall(r"^(\S.*):$", told, re.M) == sections
    for param in command.params:
        hidden = not isinstance(param, click.Option) or param.hidden
        assert hidden or len(re.findall(rf"^  (?:-\w, )?{param.opts[0]}\b(?!-)", told, re.M)) == 1, param


ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/monitor.md", "docs/simulate.md", "docs/league.md", "scripts/quickstart.sh")


@pytest.mark.parametrize("page", PAGES)
def test_what_is_written_down_can_be_typed(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The flags of each command exist, and a page that installs says first how `minidisagg` comes on the path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "session.jsonl.gz").touch()  # what earlier commands have recorded
    (tmp_path / "RUN").mkdir()
    (tmp_path / "record-1").mkdir()
    lines = [line.strip() for line in (ROOT / page).read_text().splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("minidisagg ")]
    assert len(commands) >= 3
    for _, name, *args in commands:
        paths = [str(path) for arg in args for path in (sorted(tmp_path.glob(arg)) if "*" in arg else [arg])]
        cli.commands[name].make_context(name, paths)
    if not page.startswith("docs/"):
        activates = next(n for n, line in enumerate(lines) if re.match(r"source .*\bactivate\b", line))
        # the README's first screen shows what there is; whoever wants it reads on, and installs
        first = lines.index("## Simulate") if page == "README.md" else 0
        assert activates < min(n for n, line in enumerate(lines) if n >= first and line.startswith("minidisagg "))


def test_all_commands_are_tested() -> None:
    assert set(cli.commands) == set(COMMANDS)


# ---------------------------------------------------------------- errors before a worker is started


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command in this process; gives its exit code and its one line on stderr."""
    monkeypatch.delenv("MINIDISAGG_DEBUG", raising=False)
    before = signal.getsignal(signal.SIGTERM)

    def run(*args: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(args)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("minidisagg: error: ")
        return int(str(ended.value.code)), lines[0].removeprefix("minidisagg: error: ")

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'. (see minidisagg --help)"),
        (["generate", "--frob"], "(see minidisagg generate --help)"),
        (["generate", "nope", "-p", "x"], "unknown model 'nope'"),
        (["generate", "dummy:nope", "-p", "x"], "unknown shape 'nope'"),
        (["generate", *TINY, "--policy", "lifo"], "unknown policy 'lifo'; there are arrow, "),
        (["generate", *TINY, "--policy", "sarathi:speed=1"], "sarathi:speed=1"),
        (["generate", *TINY, "--policy", "./nowhere.py:Mine"], "nowhere.py does not exist"),
        (["generate", *TINY, "--link", "pigeon"], "'pigeon' is not one of 'auto', 'cuda_ipc'"),
        (["generate", *TINY, "--mode", "disagg", "--prefill", "speed=1"], "'speed=1': expected KEY=VAL with a key of"),
        (["generate", *TINY, "--prefill-workers", "5000"], "start fewer with --prefill-workers"),
        (["generate", *TINY, "--top-p", "2"], "--top-p: expected float > 0 and <= 1"),
        (["generate", *TINY, "--temperature", "nan"], "--temperature: expected float >= 0 and <= "),
        (["generate", "dummy:tiny", "--prompt-file", "/nowhere/prompt"], "'/nowhere/prompt' does not exist"),
        (["pull", "../nope"], "is no model name"),
        (["pull", "Qwen/Qwen3-0.6B"], "add --from-hub"),
        (["bench", "--request-rate", "fast"], "request rate 'fast'"),
        (["bench", "--goodput", "speed:3"], "unknown SLO 'speed:3'"),
        (["bench", "--dataset-name", "azure"], "needs --dataset-path FILE"),
        (
            ["simulate", "--dataset-name", "synth:burstgpt", "--random-output-len", "9"],
            "--random-output-len is of --dataset-name random, and synth:burstgpt has lengths of its own",
        ),
        (["bench", "--num-prompts", "9"], "9 with --num-warmups 8 of them, and 1 at the end left out: nothing"),
        (["bench", "--num-prompts", "8", "--request-rate", "inf"], "8 of them: nothing is left to measure"),
        (["bench", "--kv-quality", "--dry-run"], "--dry-run is of a load, and --kv-quality measures pages"),
        (["bench", "--find-goodput", "--request-rate", "inf"], "starts at a finite --request-rate"),
        (["bench", "--find-goodput", "--max-concurrency", "2"], "takes no --max-concurrency"),
        (["bench", "--find-goodput", "--dataset-name", "azure", "--dataset-path", __file__], "a trace must be given"),
        (["bench", "--dataset-name", "azure", "--dataset-path", __file__], "header must have TIMESTAMP"),
        (["bench", "--dataset-name", "azure", "--dataset-path", "nan.csv"], "nan.csv:2: bad row: 'nan' is neither"),
        (
            ["bench", "--dataset-name", "azure", "--dataset-path", "few.csv"],
            "--num-warmups 8 of them, and 1 at the end left out",
        ),
        (["serve", "--drain-timeout", "nan"], "nan is not finite. (see minidisagg serve --help)"),
        (["monitor", "--demo-load=inf"], "inf is not finite."),
        (["bench", "--burstiness", "0"], "0.0 is not in the range x>0"),
        (["simulate", "--burstiness", "0"], "0.0 is not in the range x>0"),
        (
            ["bench", "--goodput", "--num-prompts", "50"],
            "--goodput needs NAME:MS, as in ttft:200 tpot:50, and not --num",
        ),
        (["simulate", "--policy", "fcfs", "--policy", "sjf"], "Invalid value for '--policy': it is given 2 times"),
        (["bench", *TINY[:1], "--policy=fcfs", "--policy", "sjf"], "Invalid value for '--policy': it is given 2 times"),
        (["bench", "--compare", ""], "Invalid value for '--compare': '' lacks a name"),
        (["simulate", "--compare", ""], "Invalid value for '--compare': '' lacks a name"),
        (["simulate", "--compare", "sarathi:,fcfs"], "'sarathi:,fcfs' lacks a name, or the settings after a colon"),
        (["bench", "dummy:tiny", "--policy", "sarathi:"], "'sarathi:' lacks a name, or the settings after a colon"),
        (["bench", "dummy:tiny", "--compare", "fcfs,./bad.py:NoOrder"], "policy NoOrder: order raised TypeError"),
        (
            ["bench", "dummy:tiny", "--compare", "fcfs,./bad.py:NoOrder", "--dry-run"],
            "policy NoOrder: order raised TypeError",
        ),
        (
            "bench --mode both --handoff store --kv-store local:DRAM=1M --baseline kv_codec=int8".split(),
            "--handoff store hands over pages as they are, and the codec is int8",
        ),
        (["bench", "--random-range-ratio", "1.5"], "random range ratio must be in [0, 1)"),
        (["bench", "dummy:tiny", "--random-input-len", "2000"], "up to 2064 tokens, more than the limit of 2048"),
        (["bench", "--policy", "lifo", "--mode", "disagg", "--against", "colocated:fcfs"], "unknown policy 'lifo'"),
        (["bench", "--max-concurrency", "4,many"], "--max-concurrency '4,many'"),
        (["bench", "--against", "elsewhere", "--mode", "disagg"], "a mode of colocated, disagg"),
    ],
)
def test_bad_input_is_one_line(
    fails: Any, args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # bench makes its directory of results before it starts anything
    header = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
    (tmp_path / "nan.csv").write_text(header + "nan,3,4\n" * 9)
    (tmp_path / "few.csv").write_text(header + "1,3,4\n" * 9)
    (tmp_path / "bad.py").write_text(
        "from minidisagg import Policy\nclass NoOrder(Policy):\n    def order(self, *_): return None\n"
    )
    code, line = fails(*args)
    assert message in line
    assert code == 2
    assert "bad.py" not in str(args) or not (tmp_path / "bench-results").exists()  # told before anything is started


def test_an_unexpected_error_says_how_to_see_more(fails: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("minidisagg.model.pull.pull", broken)
    assert fails("pull") == (1, "internal error, KeyError: 'lost' (MINIDISAGG_DEBUG=1 shows where)")
    monkeypatch.setenv("MINIDISAGG_DEBUG", "1")
    with pytest.raises(KeyError):
        main(["pull"])


def test_an_unwritable_directory_is_told_by_its_name(fails: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, line = fails("generate", *TINY, "--record", str(tmp_path / "file" / "logs"))
    assert (code, line) == (1, f"{tmp_path / 'file' / 'logs'}: Not a directory")
    code, line = fails("bench", "dummy:tiny", "--result-dir", str(tmp_path / "file" / "results"))
    assert code == 1 and line.startswith(str(tmp_path / "file" / "results")) and line.endswith("Not a directory")


# ---------------------------------------------------------------- bad models, and errors that a worker finds


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A HF directory of the tiny shape, whole."""
    path = tmp_path / "model"
    path.mkdir()
    shape = SHAPES["tiny"]
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": shape.vocab_size, "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size, "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads, "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "float32",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    save_file(dummy_weights("dummy:tiny", parse_dummy("dummy:tiny").config), path / "model.safetensors")
    return path


def cut(path: Path) -> None:
    """A download that broke off."""
    path.write_bytes(path.read_bytes()[:5000])


def without_a_weight(path: Path) -> None:
    """All weights but the last norm."""
    weights = dummy_weights("dummy:tiny", parse_dummy("dummy:tiny").config)
    del weights["model.norm.weight"]
    save_file(weights, path)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("config.json", lambda path: path.write_text("{"), "config.json is not valid JSON"),
        ("config.json", Path.unlink, "config.json is missing"),
        ("tokenizer.json", Path.unlink, "tokenizer.json is missing"),
        ("tokenizer.json", lambda path: path.write_text("{}"), "tokenizer.json is no valid tokenizer"),
        ("model.safetensors", Path.unlink, "model.safetensors is missing"),
        ("model.safetensors", cut, "model.safetensors is truncated or corrupt"),
        ("model.safetensors", without_a_weight, "weight model.norm.weight is missing"),
    ],
)
def test_a_broken_model_is_one_line(
    model: Path, temp: Path, env: dict[str, str], file: str, damage: Any, message: str
) -> None:
    damage(model / file)
    done = minidisagg(env, "generate", str(model), "--prompt", "hi", "--max-tokens", "2")
    assert done.returncode in (1, 2)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("minidisagg: error: ")
    assert message in done.stderr
    assert left_over(temp) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--kv-cache-memory", "1K"], "a KV cache of 1024 bytes holds no page; one needs 65536 bytes"),
        (["--kv-cache-memory", "64K", "--max-model-len", "256"], "holds 128 tokens; max_model_len 256 needs 131072"),
        (["--max-model-len", "4096"], "max_model_len is 4096, but the model's own limit is 2048"),
        (["--max-model-len", "64", "--max-tokens", "60"], "together more than the limit of 64"),
        (["--link", "nccl"], "link 'nccl' needs caches on cuda, not cpu"),
    ],
)
def test_what_a_worker_refuses_is_one_line(env: dict[str, str], temp: Path, args: list[str], message: str) -> None:
    done = minidisagg(env, "generate", *TINY, *args)
    assert done.returncode in (1, 2)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert message in done.stderr
    assert left_over(temp) == []


# ---------------------------------------------------------------- generate and chat


def test_a_whole_model_and_a_long_tmpdir(model: Path, tmp_path: Path, env: dict[str, str]) -> None:
    """The model that is broken above works; and sockets do not follow TMPDIR to where their paths get too long."""
    long = tmp_path / ("long" * 20)
    long.mkdir()
    args = ("generate", str(model), "--max-tokens", "4", "--mode", "disagg", "--link", "unix", "--json")
    done = minidisagg({**env, "TMPDIR": str(long)}, *args, stdin="hi")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 4


def test_generate_is_the_same_in_both_modes(env: dict[str, str], tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    answers = []
    for args in (["--mode", "colocated"], ["--mode", "disagg", "--link", "unix", "--record", str(logs)]):
        done = minidisagg(env, "generate", *TINY, "-p", "other", "--max-tokens", "12", "--json", *args)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert [line["prompt"] for line in lines] == ["hello", "other"]
        assert [line["usage"] for line in lines] == [{"prompt_tokens": 5, "completion_tokens": 12}] * 2
        for line in lines:
            times = line["metrics"]
            assert sum(times[name] for name in times if name != "e2e") == pytest.approx(times["e2e"])
        answers.append([line["token_ids"] for line in lines])
    assert answers[0] == answers[1]
    assert all(path.stat().st_size > 0 for path in logs.iterdir())
    assert {path.name for path in logs.iterdir()} == {f"{who}.1.inputs" for who in ("prefill-0", "decode-0", "router")}


def test_chat_reads_lines_from_a_pipe(env: dict[str, str], temp: Path) -> None:
    done = minidisagg(env, "chat", "dummy:tiny", "--max-tokens", "4", stdin="hi\n/system brief\n\n/help\nhi\n/frob\n")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("to the first token") == 2
    assert "there is no command /frob" in done.stderr
    assert "\x1b" not in done.stderr
    assert left_over(temp) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything(env: dict[str, str], temp: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        command("generate", *TINY, "--mode", "disagg", "--inject-delay", "decode=60000"),
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(lambda: len(list(temp.glob("minidisagg-*/*.1.sock"))) == 2)
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, err.strip()) == (130, b"")
    assert left_over(temp) == []


@pytest.mark.parametrize(("how", "code"), [("ctrl-d", 0), ("sigterm", 130)])
def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(
    env: dict[str, str], temp: Path, tmp_path: Path, how: str, code: int
) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command("chat", "dummy:tiny", "--inject-delay", "decode=60000"),
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, close_fds=True,
        env={**env, "TERM": "xterm", "MINIDISAGG_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    os.close(theirs)
    screen, prompt = b"", b"\x1b[?2004h"  # the line editor is there: it switches bracketed paste on

    def shows(text: bytes) -> bool:
        nonlocal screen
        while select.select([ours], [], [], 0.1)[0]:
            try:
                screen += os.read(ours, 4096)
            except OSError:
                break
        return text in screen

    try:
        wait_for(lambda: shows(prompt))
        os.write(ours, b"hello\r")
        wait_for(lambda: (tmp_path / "cache" / "chat_history").exists())
        time.sleep(0.5)  # the answer has begun, and hangs in its second step
        screen = b""
        process.send_signal(signal.SIGINT)
        wait_for(lambda: shows(prompt))
        if how == "ctrl-d":
            os.write(ours, b"\x04")
        else:
            process.terminate()
        wait_for(lambda: not shows(b"\0") and process.poll() is not None)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert process.returncode == code, screen
    assert left_over(temp) == []


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    """Poll until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


# ---------------------------------------------------------------- bench


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `minidisagg bench ARGS` up to the point where the measuring begins; gives its options."""
    before = signal.getsignal(signal.SIGTERM)

    def read(*args: str) -> BenchOptions:
        got: list[BenchOptions] = []

        def run(options: BenchOptions) -> int:
            got.append(options)
            return 7

        monkeypatch.setattr("minidisagg.bench.compare.run", run)
        with pytest.raises(SystemExit) as ended:
            main(["bench", *args])
        assert ended.value.code == 7  # the exit code of the command is what `run` returns
        return got[0]

    yield read
    signal.signal(signal.SIGTERM, before)


def test_bench_without_flags(asked: Any) -> None:
    options = asked()
    assert options.model.model == DEFAULT_MODEL
    assert [side.mode for side in options.sides] == ["colocated", "disagg"]
    assert options.workload == bench.settings.Workload()
    assert options.arrivals == bench.settings.Arrivals()
    assert options.trials == bench.settings.Trials()


def test_a_preset_sets_defaults_and_flags_win(asked: Any) -> None:
    quick = bench.settings.PRESETS["quick"]
    for args in (["--preset", "quick", "--repeats", "9"], ["--repeats", "9", "--preset", "quick"]):
        options = asked(*args)
        assert options.trials.preset == "quick"
        assert options.trials.repeats == 9
        assert options.arrivals.num_warmups == quick["num_warmups"]
        assert options.workload.num_prompts == 0  # by the rate
    assert asked("--preset", "quick", "--num-prompts", "33").workload.num_prompts == 33


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], "6 runs of 300 requests, each as long as 600 prefills alone, which calibration measures: 60 s if one"),
        (["--request-rate", "2.5"], "6 runs of 300 requests, each 120 s of arrivals, 720 s in all"),
        (["--preset", "quick"], "6 runs of 14 to 60 requests, each 13 s of arrivals, 78 s in all"),
        (["--max-concurrency", "1,2,4", "--repeats", "2"], "12 runs of 300 requests, each until the last"),
        (["--mode", "disagg", "--request-rate", "inf"], "3 runs of 300 requests, each until the last"),
        (["--find-goodput", "--request-rate", "3"], "at most 32 runs of 300 requests, each 100 s of arrivals"),
        (["--find-goodput", "--preset", "quick"], "at most 20 runs of 40 requests, each as long as 80 prefills"),
    ],
)
def test_a_dry_run_says_how_long(args: list[str], told: str, env: dict[str, str], tmp_path: Path) -> None:
    done = minidisagg({**env, "COLUMNS": "200"}, "bench", *args, "--dry-run", "--result-dir", str(tmp_path / "none"))
    assert done.returncode == 0, done.stderr
    assert told in done.stdout
    assert not (tmp_path / "none").exists()


def test_bench_flags(asked: Any, tmp_path: Path) -> None:
    options = asked(
        "dummy:tiny", "--mode", "disagg", "--against", "colocated:sarathi", "--goodput", "ttft:200", "tpot:50",
        "--request-rate", "2.5", "--max-concurrency", "1,4", "--random-input-len", "32", "--result-dir", str(tmp_path),
        "--dry-run", "--seed", "3", "--goodput", "itl:9", "e2e:800",
    )  # fmt: skip
    assert options.model.model == "dummy:tiny"
    assert [(side.mode, side.policy) for side in options.sides] == [("colocated", "sarathi"), ("disagg", "fcfs")]
    assert options.trials.slo == SLO(ttft=200, tpot=50, itl=9, e2el=800)
    assert (options.arrivals.request_rate, options.arrivals.relative) == (2.5, False)
    assert options.arrivals.max_concurrency == (1, 4)
    assert options.workload.input_len == 32
    assert (options.report.directory, options.report.dry_run, options.run.seed) == (str(tmp_path), True, 3)


def test_a_trace_keeps_its_own_times(asked: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("")
    args = ["--dataset-name", "azure", "--dataset-path", str(trace)]
    assert asked(*args).arrivals.request_rate == 0.0
    assert asked(*args, "--request-rate", "3").arrivals.request_rate == 3.0
    assert asked(*args, "--request-rate", "3", "--find-goodput").trials.find_goodput
