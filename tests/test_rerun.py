"""A run directory reruns by itself: from elsewhere, after its policy and its data set have changed or gone.

`tests/test_bench.py` runs a benchmark again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from minidisagg import __version__
from minidisagg.cli import cli
from minidisagg.measure import machine
from minidisagg.measure.goodput import GoodputResult
from minidisagg.measure.run_directory import GoodputSearch, new_directory
from minidisagg.measure.settings import ReportSettings
from minidisagg.rerun import then_and_now
from minidisagg.sim.profile import load_profile

MINE = """
from minidisagg import Policy


class Mine(Policy):
    def order(self, request, stage, worker):
        return -request.prompt_len
"""
TRACE = ["arrived_at,num_prefill_tokens,num_decode_tokens", *(f"0.0{i},{500 + 997 * i % 600},9" for i in range(30))]


def command(*args: str) -> int:
    return int(cli.main(list(args), standalone_mode=False) or 0)


def simulated(*args: str) -> Path:
    """The run directory of a simulation that starts here."""
    assert command("simulate", "--num-prompts", "25", "--result-dir", "out", *args) == 0
    [directory] = Path("out").iterdir()
    return directory.resolve()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a policy and a trace."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("mine.py").write_text(MINE)
    Path("trace.csv").write_text("\n".join(TRACE))
    return tmp_path / "here"


def test_a_simulation_is_the_same_from_elsewhere_and_without_the_policy_file(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = simulated("--compare", "fcfs,./mine.py:Mine", "--dataset-name", "azure", "--dataset-path", "trace.csv",
                      "--log-decisions", "log", "--json")  # fmt: skip
    options = json.loads((first / "options.json").read_text())
    assert (first / "files" / "mine.py").read_text() == MINE and options["program"] == "simulate"
    assert options["machine"].keys() >= {"python", "torch", "cpu"}
    used = {file["given"]: file for file in options["files"]}
    assert used["trace.csv"]["path"] == str(here / "trace.csv") and used["trace.csv"]["bytes"] > 300
    assert used["fcfs"]["installed"] and "installed" not in used["./mine.py"]
    (here / "mine.py").write_text("nonsense")
    monkeypatch.chdir("/")
    capsys.readouterr()
    assert command("rerun", str(first)) == 0
    said = capsys.readouterr().out
    assert f"\nbit-identical to {first}: requests, steps, result\n" in said and said.startswith("again: ")
    assert f"{here}/mine.py has changed ({len(MINE)} → 8 bytes): the copy of then is used" in said
    again = first.with_name(f"{first.name}-rerun")
    assert (again / "requests.jsonl").read_bytes() == (first / "requests.jsonl").read_bytes()
    assert (again / "decisions" / "B" / "0" / "router.jsonl").stat().st_size > 0
    # What was run again is a run like any other.
    shutil.rmtree(here / "mine.py", ignore_errors=True)
    shutil.rmtree(first)
    out = here / "third"
    assert command("rerun", str(again), "--out", str(out)) == 0
    assert f"bit-identical to {again}" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"--out {out} is there already"):
        command("rerun", str(again), "--out", str(out))


def test_a_void_run_comes_again_and_a_file_that_is_cut_is_named(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "    def admit(self, request, cluster):\n        1 // (request.request_id != '7')\n"
    Path("mine.py").write_text(f"from minidisagg import Policy\nclass Mine(Policy):\n{lines}")
    assert command("simulate", "--num-prompts", "25", "--result-dir", "out", "--policy", "./mine.py:Mine") == 1
    [directory] = Path("out").iterdir()
    assert command("rerun", str(directory)) == 1
    told = capsys.readouterr().out  # the error names the policy's file, of which this is the copy
    assert f"not as in {directory}: requests.jsonl differs from line 8 on (side A, repetition 0, request_id 7)" in told
    path = directory / "options.json"
    path.write_bytes(path.read_bytes()[:99])
    with pytest.raises(msgspec.MsgspecError, match=f"{path}: "):
        command("rerun", str(directory))


def test_what_differs_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = simulated("--policy", "./mine.py:Mine", "--dataset-name", "azure", "--dataset-path", "trace.csv")
    path = first / "options.json"
    options = json.loads(path.read_text())
    options["machine"] |= {"cpu": "Abacus 9000", "commit": "0" * 40, "dirty": False}
    path.write_text(json.dumps(options))
    trace = [*TRACE[:2], TRACE[2].removesuffix("9") + "8", *TRACE[3:], "9.0,1,1"]
    (here / "trace.csv").write_text("\n".join(trace))
    assert command("rerun", str(first), "--out", "again") == 1
    said = capsys.readouterr().out.splitlines()
    assert any(line.startswith("other than then: commit 000") and "cpu Abacus 9000 → " in line for line in said)
    assert any(f"{here}/trace.csv has changed (" in line and "the load is another one" in line for line in said)
    assert said[-1].startswith(f"not as in {first}: requests.jsonl differs from line ")
    assert said[-1].endswith("(side A, repetition 0, request_id 2)")
    (first / "files" / "mine.py").write_text(MINE + "# otherwise")
    with pytest.raises(ValueError, match=r"files/mine\.py is not the copy that the run has made"):
        command("rerun", str(first), "--out", "more")
    (first / "files" / "mine.py").write_text(MINE)
    (here / "trace.csv").unlink()
    with pytest.raises(ValueError, match=f"^{here}/trace.csv is missing, which the run has read"):
        command("rerun", str(first), "--out", "more")
    with pytest.raises(ValueError, match=r"is no run directory: there is no .*options\.json"):
        command("rerun", str(here))
    del options["files"]
    path.write_text(json.dumps(options))
    with pytest.raises(ValueError, match="not a run directory of this version") as caught:
        command("rerun", str(first), "--out", "more")
    assert "\n" not in str(caught.value)


def test_sweeps_searches_profiles_and_infinite_rates_come_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = msgspec.json.encode([load_profile("h100_sxm", "llama-8b")])
    for args in (["--request-rate", "inf"], ["--max-concurrency", "1,3"], ["--find-goodput"]):
        shutil.rmtree("out", ignore_errors=True)
        Path("mine.json").write_bytes(profile)
        first = simulated("--cluster", "both=1@./mine.json", "--dataset-name", "random", *args)
        Path("mine.json").unlink()
        capsys.readouterr()
        assert command("rerun", str(first)) == 0
        said = capsys.readouterr().out
        assert said.splitlines()[-1].startswith("bit-identical to ")
        assert f"{here}/mine.json is gone: the copy of then is used" in said


def test_searches_are_put_beside_each_other_with_their_limits() -> None:
    def search(lower: float, slo: str) -> GoodputSearch:
        return GoodputSearch({"disagg": GoodputResult(lower, 4.0, 0.95, 0.9, True, [])}, slo, [], [])

    old, new = search(2.0, "ttft:200"), search(3.0, "ttft:300")
    table = then_and_now(old, new)
    row = [cell for column in table.columns for cell in column.cells]
    assert row == ["disagg", "goodput, req/s", "2.00", "3.00", "1.50"]
    assert table.caption == "goodput is within the SLO: ttft:200 then, now ttft:300"
    assert then_and_now(old, old).caption is None


# ---------------------------------------------------------------- what is recorded


def test_two_runs_of_a_second_have_a_directory_each(tmp_path: Path) -> None:
    made = {new_directory(ReportSettings(directory=str(tmp_path), name="same")).name for _ in range(3)}
    assert made == {"same", "same-2", "same-3"}


def git(where: Path, *args: str) -> None:
    own = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(where), *own, *args], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_package_s_own_tree(tmp_path: Path) -> None:
    package = tmp_path / "minidisagg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert machine.commit(package) == {}
    git(tmp_path, "init", "-q")
    assert machine.commit(package) == {}, "it lies in a tree that is not its own"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    found: dict[str, Any] = machine.commit(package)
    assert len(found["commit"]) == 40 and found["dirty"] is False
    (tmp_path / "notes").write_text("")  # no code
    assert machine.commit(package) == found
    (package / "mine.py").write_text("")
    assert machine.commit(package) == found | {"dirty": True}


def test_what_is_cited_is_what_runs() -> None:
    """The keys that version 1.2.0 of the format requires, and the package's own version and licence."""
    root = Path(__file__).parents[1]
    pairs = (line.partition(": ") for line in (root / "CITATION.cff").read_text().splitlines() if line[:1].isalpha())
    cited = {key.rstrip(":"): value.strip('"') for key, _, value in pairs}
    package = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert cited.keys() >= {"cff-version", "message", "title", "authors"} and cited["cff-version"] == "1.2.0"
    assert cited["version"] == package["version"] == __version__ and cited["license"] == package["license"]["text"]
