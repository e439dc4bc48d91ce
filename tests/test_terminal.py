"""A terminal that is not UTF-8 gets a replacement for what it cannot show, and no command fails for it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeFrontend
from test_monitor import RECORDED

from minidisagg import chat
from minidisagg.cli import main

Run = Callable[..., tuple[int, str, str]]
COMMANDS = ("pull", "generate", "chat", "serve", "monitor", "bench")


@pytest.fixture(params=["latin-1", "ascii", "ascii:backslashreplace"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """`minidisagg ARGS` on a terminal of this encoding: (exit code, stdout, stderr)."""
    encoding, _, errors = request.param.partition(":")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setenv("COLUMNS", "120")

    def command(*args: str) -> tuple[int, str, str]:
        raw = {"stdout": io.BytesIO(), "stderr": io.BytesIO()}
        for name, handler in (("stdout", errors or "strict"), ("stderr", errors or "backslashreplace")):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(raw[name], encoding, handler, write_through=True))
        with pytest.raises(SystemExit) as ended:
            main(args)
        sys.stdout.flush()
        sys.stderr.flush()
        out, err = (stream.getvalue().decode(encoding) for stream in raw.values())  # it has no other bytes
        assert "codec" not in err, err
        assert "\\u2026" in out + err if errors and "--help" in args and args[0] in ("bench", "serve") else True
        return int(ended.value.code or 0), out, err

    yield command
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", COMMANDS)
def test_help(run: Run, name: str) -> None:
    code, out, err = run(name, "--help")
    assert code == 0 and err == "" and out.startswith(f"Usage: minidisagg {name}") and len(out) > 300


def test_tables_and_screens(run: Run) -> None:
    code, out, _ = run("bench", "dummy:tiny", "--dry-run")
    assert code == 0 and "6 runs of 300 requests" in out
    code, out, _ = run("monitor", "--replay", str(RECORDED), "--once")
    assert code == 0 and "dummy:tiny" in out and len(out.splitlines()) > 30


def test_errors(run: Run, tmp_path: Path) -> None:
    for args in (["pull", "no \u2211 name"], ["monitor", "http://\u2211", "--once", "--json", "--demo-load"],
                 ["bench", "--base-url", "\u2211"], ["generate", "dummy:\u2211", "-p", "a"]):  # fmt: skip
        code, out, err = run(*args)
        assert code == 2 and out == "" and err.startswith("minidisagg: error: ") and err.count("\n") == 1, err


def test_progress(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def pull(name: str, from_hub: bool, say: Callable[[str], object]) -> None:
        say(f"getting {name} \u2026")

    monkeypatch.setattr("minidisagg.model.pull.pull", pull)
    code, out, _ = run("pull")
    assert code == 0 and out.startswith("getting smollm2-135m ") and len(out.strip()) >= 22


def test_answers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random bytes: nearly all are U+FFFD, which neither encoding has. JSON is UTF-8 whatever the terminal is."""
    monkeypatch.setattr(chat, "Frontend", FakeFrontend)
    code, out, _ = run("generate", "dummy:tiny", "-p", "caf\u00e9 \u2211", "--max-tokens", "40")
    assert code == 0 and len(out) > 20
    code, out, _ = run("generate", "dummy:tiny", "-p", "caf\u00e9", "-p", "\u2211", "--max-tokens", "9")
    assert code == 0 and "caf" in out
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr(chat, "_piped_lines", lambda: _lines("caf\u00e9 \u2211"))
    code, out, err = run("chat", "dummy:tiny", "--max-tokens", "40")
    assert code == 0 and len(out) > 20 and "to the first token" in err


async def _lines(*lines: str) -> Any:
    for line in lines:
        yield line


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "POSIX"},
    ],
)
def test_a_process_of_its_own(variables: dict[str, str]) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    env |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "MINIDISAGG_DEBUG": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "minidisagg", "serve", "--help"], env=env | variables, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"") and b"NAME:MS" in done.stdout


def test_json_is_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, before = io.BytesIO(), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "latin-1"))
    monkeypatch.setattr(chat, "Frontend", FakeFrontend)
    with pytest.raises(SystemExit):
        main(["generate", "dummy:tiny", "-p", "caf\u00e9 \u2211", "--max-tokens", "1", "--json"])
    signal.signal(signal.SIGTERM, before)
    sys.stdout.flush()
    assert json.loads(raw.getvalue())["prompt"] == "caf\u00e9 \u2211"
