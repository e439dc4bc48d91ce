"""`minidisagg rerun DIR`: the run of a run directory once more, from its settings and its copies of the policies.

The same code on the same inputs gives the same simulation to the last bit, and whether it did is said. A benchmark is
never the same; its main figures then and now are put side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count, zip_longest
from pathlib import Path
from typing import Any

import click
import msgspec
from msgspec import Struct
from rich import box
from rich.console import Console
from rich.table import Table

from minidisagg.measure.comparison import VERDICT, Comparison, milliseconds, number
from minidisagg.measure.contest import Contest
from minidisagg.measure.files import UsedFile, sha256_of, source_of
from minidisagg.measure.machine import machine
from minidisagg.measure.run_directory import GoodputSearch, read_json, read_result
from minidisagg.measure.settings import ReportSettings

COMPARED = ("minidisagg", "commit", "python", "torch", "numpy", "cpu", "cores", "memory", "system")
# Where they go, in the new run directory.
LOGS = {"decision_dir": "decisions", "record_dir": "record", "record": "record"}
Result = Comparison | Contest | dict[int, Comparison] | GoodputSearch


class Made(Struct):
    """How a run was made, as options.json says it; the settings stand beside these keys."""

    program: str
    command: str
    cwd: str
    machine: dict[str, Any]
    files: list[UsedFile]


def rerun(directory: Path, out: Path | None = None, api_key: str = "") -> int:
    """Carry it out; returns the exit status, which is 1 where a simulation comes out otherwise than it did.

    `out`: the new run directory, which must not be there; else one beside `directory`. Raises `OSError`, and
    `ValueError` for what is no run directory, or lacks a file that the run has read.
    """
    try:
        recorded, before = read_json(directory / "options.json"), read_result(directory)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{directory} is no run directory: there is no {error.filename}") from None
    try:
        made, new = msgspec.convert(recorded, Made), _free(directory, out)
        run_again = _program(made.program, _moved(recorded, made, directory, new), api_key)
    except (msgspec.MsgspecError, KeyError) as error:
        raise ValueError(f"{directory}: not a run directory of this version: {error!r}") from None
    click.echo(f"again: {made.command}")
    for line in differences(made):
        click.echo(line)
    if (status := run_again()) and not (new / "result.json").exists():  # a void run has one, and is one again
        return status
    if made.program == "bench":
        Console().print(then_and_now(before, read_result(new)))
        return 0
    where = first_difference(directory, new)
    click.echo(f"not as in {directory}: {where}" if where else f"bit-identical to {directory}: requests, steps, result")
    return 1 if where else 0


def _program(name: str, settings: dict[str, Any], api_key: str) -> Callable[[], int]:
    if name == "simulate":
        from minidisagg.sim import study

        return partial(study.run, msgspec.convert(settings, study.SimOptions))
    from minidisagg.bench.compare import run
    from minidisagg.bench.settings import BenchOptions

    return partial(run, msgspec.convert(settings, BenchOptions), api_key)


# ---------------------------------------------------------------- the same inputs


def _free(directory: Path, out: Path | None) -> Path:
    """A directory that is not there yet."""
    if out is not None:
        if out.exists():
            raise ValueError(f"--out {out} is there already, and a run gets a directory of its own")
        return out.resolve()
    whole = directory.resolve()
    names = (whole.with_name(f"{whole.name}-rerun{'' if number == 1 else f'-{number}'}") for number in count(1))
    return next(name for name in names if not name.exists())


def _moved(recorded: Mapping[str, Any], made: Made, directory: Path, out: Path) -> dict[str, Any]:
    """The settings, with each file and directory where it is now. Raises `ValueError` where one is missing."""
    places: dict[str, Path] = {}
    for file in [file for file in made.files if not file.installed]:
        places[file.given] = place = (directory / file.copy).resolve() if file.copy else Path(file.path)
        if not place.is_file():
            raise ValueError(f"{place} is missing, which the run has read ({file.bytes:,} bytes)")
        if file.copy and sha256_of(place) != file.sha256:
            raise ValueError(f"{place} is not the copy that the run has made: its hash is another one")

    def moved(given: str) -> str:
        name, colon, rest = given.partition(":")
        return f"{places[name]}{colon}{rest}" if name in places else given

    own = {"version", *Made.__struct_fields__}
    settings = {key: value for key, value in recorded.items() if key not in own}
    for side in settings["sides"]:
        side["policy"] = moved(side["policy"])
        for group in side.get("cluster", {}).get("groups", ()):
            group["device"] = moved(group["device"])
    workload, arrivals = settings["workload"], settings["arrivals"]
    workload |= {"dataset_path": str(places.get(workload["dataset_path"], "")), "fit": False}  # it has been fitted
    if arrivals["request_rate"] is None:
        arrivals["request_rate"] = math.inf  # JSON has no infinity
    for of in filter(None, (settings.get("model"), settings.get("server"))):
        local = {key: Path(made.cwd, of[key]) for key in ("model", "tokenizer") if of.get(key)}
        of |= {key: str(path) for key, path in local.items() if path.is_dir()}
    logs = settings.get("run", settings)  # a new run's are new, too
    logs |= {key: str(out / name) for key, name in LOGS.items() if logs.get(key)}
    settings["report"] = ReportSettings(directory=str(out.parent), name=out.name)
    return settings


def differences(made: Made) -> list[str]:
    """What is not as it was then: a line on code and machine, and one on each file."""
    then, now = made.machine, machine()
    other = [f"{key} {then.get(key, '?')} → {now.get(key, '?')}" for key in COMPARED if then.get(key) != now.get(key)]
    if dirty := [name for name, of in (("then", then), ("now", now)) if of.get("dirty")]:
        other.append(f"uncommitted changes ({' and '.join(dirty)})")
    lines = [f"other than then: {'; '.join(other)}" if other else "versions, commit and machine are those of then"]
    return [*lines, *filter(None, map(_news_of, made.files))]


def _news_of(file: UsedFile) -> str:
    path = source_of(file.given) if file.installed else Path(file.path)
    if path.is_file() and sha256_of(path) == file.sha256:
        return ""
    happened = f"has changed ({file.bytes:,} → {path.stat().st_size:,} bytes)" if path.is_file() else "is gone"
    if file.installed:
        return f"policy {file.given} is another one: {path} {happened}"
    return f"{path} {happened}: {'the copy of then is used' if file.copy else 'the load is another one'}"


# ---------------------------------------------------------------- the same outcome


def first_difference(then: Path, now: Path) -> str:
    """Where two simulations came apart; empty where requests, steps and results are the same to the last bit."""
    for kind in ("requests.jsonl", "steps.jsonl"):
        for name in sorted({path.relative_to(of) for of in (then, now) for path in of.rglob(kind)}):
            if not ((then / name).is_file() and (now / name).is_file()):
                return f"{name} is not in both"
            with (then / name).open("rb") as one, (now / name).open("rb") as other:
                for line, pair in enumerate(zip_longest(one, other, fillvalue=b""), 1):
                    if pair[0] != pair[1]:
                        return f"{name} differs from line {line} on{_of(pair[0])}"
    same = _outcome(read_json(then / "result.json")) == _outcome(read_json(now / "result.json"))
    return "" if same else "result.json differs, though requests and steps do not"


def _of(line: bytes) -> str:
    found = msgspec.json.decode(line or b"{}", type=dict[str, Any])
    told = ", ".join(f"{key} {found[key]}" for key in ("side", "repetition", "request_id", "worker") if key in found)
    return f" ({told})" if told else ""


def _outcome(result: Any) -> Any:
    """Without the names of policies: one that was in a file is in another one now."""
    if isinstance(result, dict):
        return {key: _outcome(value) for key, value in result.items() if key != "policy"}
    return list(map(_outcome, result)) if isinstance(result, list) else result


def then_and_now(then: Result, now: Result) -> Table:
    """The main figures of both."""
    limits = _slo(then), _slo(now)  # each run derives its own, where none was given
    caption = f"goodput is within the SLO: {' then, now '.join(limits)}" if limits[0] != limits[1] else None
    table = Table(
        "", "", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold",
        caption=caption, caption_justify="left",
    )  # fmt: skip
    for title in ("then", "now", "now / then"):
        table.add_column(title, justify="right")
    old, said = figures(then), ""
    for (of, title), value in figures(now).items():
        before, write = old.get((of, title), math.nan), milliseconds if title.endswith("ms") else number
        table.add_row(of if of != said else "", title, write(before), write(value), number(_ratio(value, before)))
        said = of
    return table


def _slo(result: Result) -> str:
    if isinstance(result, GoodputSearch):
        return result.slo
    one = next(iter(result.values())) if isinstance(result, dict) else result
    return str(one.sides[0].results[0].get("slo", ""))


def _ratio(value: float, before: float) -> float:
    return value / before if before else math.nan


def figures(result: Result) -> dict[tuple[str, str], float]:
    """What the verdict weighs, by side and title: seconds, and rates per second; of a search what it has found."""
    if isinstance(result, GoodputSearch):
        return {(label, "goodput, req/s"): one.rate for label, one in result.goodput.items()}
    steps = {f", {users} at a time": one for users, one in result.items()} if isinstance(result, dict) else {"": result}
    units = {"output_throughput": "tok/s", "request_goodput": "req/s"}
    return {
        (f"{side.label}{users}", f"{title}, {units.get(statistic, 'ms')}"): side.values[statistic]
        for users, one in steps.items()
        for side in one.sides
        for title, statistic in VERDICT
        if statistic in side.values
    }
