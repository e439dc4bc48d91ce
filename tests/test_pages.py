"""README and tutorial are true: every command is typed, every Python block is run, and what they print is what comes.

What would take minutes is made smaller, and what needs a person or the network is named in `NOT_HERE`.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minidisagg.cli import cli
from minidisagg.model.loader import cached_path

ROOT = Path(__file__).parents[1]
README, TUTORIAL = ROOT / "README.md", ROOT / "docs" / "policy-tutorial.md"
# Made smaller: flags of the last word count.
SMALLER = {
    "simulate": ["--num-prompts", "30", "--num-warmups", "2", "--repeats", "1"],
    "league": ["--num-prompts", "30", "--repeats", "1", "-j", "1"],
    "bench": ["--dry-run"],
    "replay": ["--plain"],
}
NOT_HERE = {
    "git clone": "the network",
    "source ": "this test is on the path already",
    "scripts/": "quickstart installs, test.sh runs this",
    "minidisagg serve": "tests/test_serve.py runs servers, with every endpoint that is named here",
    "curl ": "of that server",
}


def commands(page: Path) -> list[str]:
    """Indented lines that begin like a command."""
    lines = (line.partition("  #")[0].strip() for line in page.read_text().splitlines() if line.startswith("    "))
    return [line for line in lines if re.match(r"(minidisagg|curl|git|source) |scripts/", line)]


def blocks(page: Path) -> list[str]:
    """Python."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a reader of the tutorial has come to: `mine.py` is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    classes = [block for block in blocks(TUTORIAL) if "(Policy)" in block]
    assert len(classes) == 2
    (tmp_path / "mine.py").write_text("\n\n".join(classes))
    yield tmp_path


def typed(line: str, *more: str) -> int:
    """A command, in this process."""
    words = [str(path) for word in shlex.split(line)[1:] for path in (sorted(Path.cwd().glob(word)) or [word])]
    return int(cli.main([*words, *more], standalone_mode=False) or 0)


def run_directory() -> dict[str, Any]:
    """The result of the last run."""
    newest = max(Path("bench-results").iterdir(), key=lambda path: path.stat().st_mtime)
    return json.loads((newest / "result.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("page", [README, TUTORIAL], ids=lambda page: page.stem)
def test_every_command_works(page: Path, place: Path) -> None:
    """In the order of the page: a later one may need what an earlier one has left."""
    tried = set()
    for line in commands(page):
        if any(line.startswith(begin) for begin in NOT_HERE):
            continue
        name = line.split()[1]
        assert typed(line, *SMALLER.get(name, [])) == 0, line
        tried.add(name)
    assert tried >= {"simulate", "bench", "league"}


@pytest.mark.skipif(
    not (cached_path("smollm2-135m") / "config.json").is_file(),
    reason="smollm2-135m is not in the cache; `minidisagg pull` gets it",
)
def test_every_block_of_the_readme_works(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed("minidisagg simulate --record --result-dir recorded", *SMALLER["simulate"])
    (recorded,) = Path("recorded").iterdir()
    for block in blocks(README):
        exec(compile(re.sub(r"bench-results/[\d-]+", str(recorded), block), "README.md", "exec"), {})
    assert "Paris" in capsys.readouterr().out


def test_the_readme_shows_what_comes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`minidisagg simulate` is the same everywhere, so that its first screen can be held to the digit."""
    assert typed("minidisagg simulate") == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = re.search(r"\n {4}minidisagg simulate\n\n((?: {4}.*\n)+)", README.read_text())
    assert shown is not None
    for line in shown.group(1).splitlines()[1:]:
        figures = [word for word in line.split() if re.match(r"[\d[]", word)]
        assert any(figures == [w for w in words if re.match(r"[\d[]", w)] for words in printed), line


def test_the_tutorials_win_is_there(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its second command as it stands: the shortest first meets the SLO more often, and ageing mends the tail."""
    line = next(line for line in commands(TUTORIAL) if line.startswith("minidisagg simulate") and "Ageing" in line)
    assert typed(line) == 0
    printed = {tuple(line.split()) for line in capsys.readouterr().out.splitlines()}
    for name in ("fcfs", "ShortestFirst", "Ageing"):
        rows = [tuple(line.split()) for line in TUTORIAL.read_text().splitlines() if line.startswith(f"    {name} ")]
        assert rows and all(row in printed for row in rows if len(row) == 9), (name, rows)
    result = run_directory()
    fcfs, shortest, ageing = (side["values"] for side in result["contest"])
    assert shortest["attainment"] > 3 * fcfs["attainment"] and ageing["attainment"] > 2.5 * fcfs["attainment"]
    assert ageing["p99_ttft"] < 0.5 * shortest["p99_ttft"]
