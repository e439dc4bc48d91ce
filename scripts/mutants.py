"""How many small bugs in minidisagg/core do the core's tests notice? `scripts/mutants.py 200 [--seed 1] [--jobs 2]`

mutmut makes the mutants in a copy of this tree; N of them are drawn by the seed, each runs the tests that reach its
function, and those that no test noticed are printed with file, line and difference. mutmut lives in an environment of
its own, .venv-mutants or $MINIDISAGG_MUTANTS_VENV, made at the first run: the core and its tests need no torch.
A change to a sentence (in an error message) is no bug and is not drawn.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENVIRONMENT = Path(os.environ.get("MINIDISAGG_MUTANTS_VENV") or ROOT / ".venv-mutants")
PACKAGES = ["mutmut==3.8.1", "msgspec>=0.18", "hypothesis>=6.100", "pytest>=8.2", "pytest-timeout>=2.3"]
# The core's tests: a quarter of a minute on one quiet core, without processes and without torch.
FILES = "blame blocks engine deadlines router policies rehearsal messages inputlog simulator stateful".split()
TESTS = [*(f"tests/test_{name}.py" for name in FILES), "tests/test_fuzz.py::test_faults_lose_nothing[0]"]
NOTHING = "no.such.mutant"  # mutmut then makes all mutants, times the tests, and stops


@dataclass(frozen=True)
class Mutant:
    """One changed function, beside what it was."""

    name: str  # mutmut's
    path: str
    before: list[str]
    after: list[str]

    def describe(self, source: list[str]) -> str:
        """file:line of the first change, and the difference."""
        steps = difflib.SequenceMatcher(None, self.before, self.after).get_opcodes()
        changed = [step for step in steps if step[0] != "equal"]
        text = [f"-{line}" for op in changed for line in self.before[op[1] : op[2]]]
        text += [f"+{line}" for op in changed for line in self.after[op[3] : op[4]]]
        starts = (n for n in range(len(source)) if source[n : n + len(self.before)] == self.before)
        return "\n  ".join([f"{self.path}:{next(starts, 0) + (changed[0][1] if changed else 0) + 1}", *text])


def mutants_of(path: Path, name: str) -> Iterator[Mutant]:
    """The mutants of one module: mutmut writes `NAME__mutmut_1` and so on beside the original, `NAME__mutmut_orig`."""
    lines = (text := path.read_text()).splitlines()
    known = json.loads(path.with_suffix(".py.meta").read_text())["exit_code_by_key"]
    found = {node.name: node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    for key in known:
        function = key.rpartition(".")[2]
        before, after = found[function.partition("__mutmut_")[0] + "__mutmut_orig"], found[function]
        if _bare(before) != _bare(after):
            texts = [lines[node.body[0].lineno - 1 : node.end_lineno] for node in (before, after)]
            yield Mutant(key, name, *texts)


def _bare(function: ast.FunctionDef) -> str:
    """What the function does: not its name, not its sentences."""
    for node in ast.walk(function):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip("X"):
            node.value = ""
    return "".join(ast.dump(node) for node in [function.args, *function.body])


def mutmut(where: Path, *arguments: str) -> str:
    """Run it in the copy; returns what it said."""
    command = [ENVIRONMENT / "bin" / "mutmut", "run", *arguments]
    return subprocess.run(command, cwd=where, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout


def main() -> None:
    """Draw, run, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    asked = parser.parse_args()
    if not (ENVIRONMENT / "bin" / "mutmut").exists():
        venv.create(ENVIRONMENT, clear=True, with_pip=True)
        subprocess.run([ENVIRONMENT / "bin" / "python", "-m", "pip", "install", "-qq", *PACKAGES], check=True)
    with tempfile.TemporaryDirectory() as directory:
        where, began = Path(directory), time.monotonic()
        for name in ("minidisagg", "tests"):
            shutil.copytree(ROOT / name, where / name, ignore=shutil.ignore_patterns("__pycache__", ".hypothesis"))
        options = {"source_paths": ["minidisagg/core/"], "also_copy": ["minidisagg/", "tests/"],
                   "pytest_add_cli_args_test_selection": TESTS}  # fmt: skip
        table = "".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items())
        (where / "pyproject.toml").write_text(f"{(ROOT / 'pyproject.toml').read_text()}\n[tool.mutmut]\n{table}")
        said = mutmut(where, NOTHING)
        core = sorted((where / "mutants/minidisagg/core").glob("*.py"))
        every = [mutant for path in core for mutant in mutants_of(path, f"minidisagg/core/{path.name}")]
        if not every:
            sys.exit(said)
        drawn = random.Random(asked.seed).sample(every, min(asked.count, len(every)))
        said = mutmut(where, "--max-children", str(asked.jobs), *(mutant.name for mutant in drawn))
        codes: dict[str, int | None] = {}
        for path in core:
            codes |= json.loads(path.with_suffix(".py.meta").read_text())["exit_code_by_key"]
    if any(codes[mutant.name] is None for mutant in drawn):
        sys.exit(said)
    left = [mutant for mutant in drawn if codes[mutant.name] in (0, 33)]  # 33: no test reaches the function
    for mutant in sorted(left, key=lambda mutant: mutant.name):
        sys.stdout.write(f"{mutant.describe((ROOT / mutant.path).read_text().splitlines())}\n  {mutant.name}\n\n")
    share, seconds = 1 - len(left) / len(drawn), time.monotonic() - began
    sys.stdout.write(f"{share:.1%} of {len(drawn)} mutants noticed, of {len(every)} that there are; {seconds:.0f} s\n")


if __name__ == "__main__":
    main()
