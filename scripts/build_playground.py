"""Builds the playground: a folder that any web server can show, with all that it needs inside (`docs/playground.md`).

    scripts/build_playground.py [OUT_DIR]       # build/playground by default
    python -m http.server -d build/playground

Pyodide comes from npm, msgspec's wheel for it from PyPI; both are kept in build/playground-parts.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PARTS = ROOT / "build/playground-parts"
PYODIDE, MSGSPEC = "314.0.7", "0.22.0"
RUNTIME = (
    "pyodide.mjs", "pyodide.asm.mjs", "pyodide.asm.wasm", "python_stdlib.zip", "pyodide-lock.json", "package.json",
)  # fmt: skip
PAGE = "index.html", "app.js", "style.css", "worker.js"
# What a simulation imports, `measure` without all that needs numpy; the policies, and what they are measured on.
PYTHON = (
    "LICENSE", "minidisagg/__init__.py", "minidisagg/formats.py", "minidisagg/interconnect.py", "minidisagg/core",
    "minidisagg/policies", "minidisagg/sim", "minidisagg/workload", "minidisagg/measure/__init__.py",
    "minidisagg/measure/goodput.py", "minidisagg/measure/records.py",
)  # fmt: skip


class BuildError(Exception):
    """In one line."""


def python_files() -> dict[str, bytes]:
    """The project's part of the archive: by name, what is in it."""
    found = [path for part in PYTHON for path in [ROOT / part, *sorted((ROOT / part).rglob("*"))] if path.is_file()]
    files = {path.relative_to(ROOT).as_posix(): path for path in found if path.suffix != ".pyc"}
    files |= {name: ROOT / "playground" / name for name in ("play.py", "mine.py")}
    return {name: path.read_bytes() for name, path in files.items()}


def build(out: Path) -> None:
    """Writes the folder. Raises `BuildError` and `OSError`."""
    (out / "pyodide").mkdir(parents=True, exist_ok=True)  # before minutes of fetching
    archive, runtime = _pyodide()
    wheel = _wheel(json.loads(runtime["pyodide-lock.json"])["info"])
    for name, content in runtime.items():
        (out / "pyodide" / name).write_bytes(content)
    for name in PAGE:
        shutil.copy(ROOT / "playground" / name, out)
    with zipfile.ZipFile(out / "python.zip", "w", zipfile.ZIP_DEFLATED) as packed, zipfile.ZipFile(wheel) as unpacked:
        files = {name: unpacked.read(name) for name in unpacked.namelist()} | python_files()
        for name, content in files.items():
            packed.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)  # no dates: equal each time
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    sys.stdout.write(f"{out}: {size / 1e6:.1f} MB, with {archive.name} and {wheel.name}\n")
    sys.stdout.write(f"python -m http.server -d {out}\n")


def _pyodide() -> tuple[Path, dict[str, bytes]]:
    archive = PARTS / f"pyodide-{PYODIDE}.tgz"
    if not archive.exists():
        _fetch("npm", "pack", f"pyodide@{PYODIDE}", "--pack-destination", str(PARTS))
    runtime = {}
    with tarfile.open(archive) as packed:
        for name in RUNTIME:
            member = packed.extractfile(f"package/{name}")
            assert member is not None
            runtime[name] = member.read()
    return archive, runtime


def _wheel(info: dict[str, str]) -> Path:
    """msgspec for the Python and the ABI of this Pyodide."""
    python, platform = "".join(info["python"].split(".")[:2]), f"pyemscripten_{info['abi_version']}_{info['arch']}"
    pattern = f"msgspec-{MSGSPEC}-cp{python}-*{platform}.whl"
    if not any(PARTS.glob(pattern)):
        _fetch(
            sys.executable, "-m", "pip", "download", f"msgspec=={MSGSPEC}", "--no-deps", "--only-binary=:all:",
            "--python-version", python, "--implementation", "cp", "--abi", f"cp{python}", "--platform", platform,
            "--dest", str(PARTS),
        )  # fmt: skip
    return next(PARTS.glob(pattern))


def _fetch(*command: str) -> None:
    PARTS.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    except FileNotFoundError:
        raise BuildError(f"{command[0]} is not installed, which fetches a part of the playground") from None
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = str(error.stderr or error).strip().splitlines()
        raise BuildError(f"{' '.join(command)} fails: {said[-1] if said else error}") from error


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "build/playground")
    try:
        build(parser.parse_args().out)
    except (BuildError, OSError) as error:
        sys.exit(str(error))
