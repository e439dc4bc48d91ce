"""What a benchmark leaves behind, and how it is read again (docs/formats.md says what is in the files).

options.json      what was asked for, with which command, on which machine, by which code
files/            copies of the policies' sources, as the run has read them
result.json       what came of it: a comparison or a contest, one per concurrency of a sweep, or a search for goodput
requests.jsonl    of a comparison or contest: a line per request of every run
steps.jsonl       the same of each step of each worker, where somebody has kept them
concurrency-N/    of a sweep: result.json, requests.jsonl and steps.jsonl of each of its steps
trace.json        `measure/timeline.py`
report.html       `measure/html.py`, from the other files alone
record/           with --record: the inputs of the router and of each worker, for `minidisagg replay`
"""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from minidisagg.formats import check_version
from minidisagg.measure.comparison import Comparison, Side, goodput_verdict, worker_usage
from minidisagg.measure.contest import Contest
from minidisagg.measure.files import Files
from minidisagg.measure.goodput import SLO, GoodputResult
from minidisagg.measure.intervals import Ratio, center
from minidisagg.measure.machine import command_line, machine
from minidisagg.measure.records import RequestRecord, RunRecord, StepRecord
from minidisagg.measure.settings import ReportSettings

LETTERS = string.ascii_uppercase  # of the sides: as many can be compared
RECORD = "record"  # the folder of the input logs
VERSION = 2  # of all files of the directory but trace.json, which has its own
Line = TypeVar("Line", "RequestLine", "StepLine")
COUNTS = ("num_prompts", "measured", "completed", "failed", "rejected", "total_input_tokens", "total_output_tokens")


class RequestLine(RequestRecord, kw_only=True):
    """A line of requests.jsonl."""

    version: int | None = None
    side: str
    repetition: int


class StepLine(StepRecord, kw_only=True):
    """A line of steps.jsonl."""

    version: int | None = None
    side: str
    repetition: int


class SideResult(Struct):
    """A side in result.json, as far as it is read again; its `workers` are shares for a person."""

    values: dict[str, float]
    repetitions: list[dict[str, object]]
    runs: list[RunRecord]  # without their requests and steps


class GoodputSearch(Struct):
    """What searches for goodput found, by side."""

    goodput: dict[str, GoodputResult]
    slo: str
    void: list[str]
    marks: list[str]
    verdict: str = ""  # of two sides


# ---------------------------------------------------------------- writing


def run_name(repetition: int, concurrency: int | None) -> str:
    """The directory of one run's decisions, in those of its side."""
    return f"concurrency-{concurrency}/{repetition}" if concurrency else str(repetition)


def remove_if_empty(directory: Path) -> None:
    """Where nothing came of a run, or nothing of a part of it. Whatever is in a file stays."""
    for path in (*sorted(directory.rglob("*/"), reverse=True), directory):
        with suppress(OSError):
            path.rmdir()


def write_json(path: Path, content: object) -> None:
    """For people to read, too. Raises `OSError`."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2))


def new_directory(report: ReportSettings) -> Path:
    """The run's own. Raises `OSError`."""
    name = report.name or datetime.now().strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):  # another run may have begun in the same second
        path = Path(report.directory) / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError


def write_options(directory: Path, program: str, options: object, files: Files) -> None:
    """Write options.json, and the copies of files. Raises `OSError`."""
    made = {"program": program, "command": command_line(), "cwd": str(Path.cwd()), "machine": machine()}
    used = msgspec.to_builtins(files.write(directory))
    asked = {"version": VERSION, **made, "files": used, **msgspec.to_builtins(options)}
    write_json(directory / "options.json", asked)


def to_dict(comparison: Comparison) -> dict[str, object]:
    """result.json: vLLM's keys in each side's repetitions, and over all of them where one side ran alone."""
    sides = {side.label: _side_to_dict(side) for side in comparison.sides}
    return {
        "version": VERSION,
        **(overall(comparison.a.results) if comparison.b is None else {}),
        "verdict": comparison.verdict,
        "void": comparison.void,
        "marks": comparison.marks,
        "sides": sides,
        "ratios": {name: msgspec.to_builtins(ratio) for name, ratio in comparison.ratios.items()},
    }


def _side_to_dict(side: Side) -> dict[str, object]:
    runs = [msgspec.to_builtins(msgspec.structs.replace(run, requests=[], steps=[])) for run in side.runs]
    for run in runs:
        del run["requests"], run["steps"]  # they have files of their own
    return {
        "repetitions": side.results,
        "values": side.values,
        "workers": [msgspec.to_builtins(usage) for usage in worker_usage(side.runs)],
        "runs": runs,
    }


def overall(results: Sequence[dict[str, object]]) -> dict[str, object]:
    """One result over repetitions: counts and durations are sums, rates and latencies centers, as in the tables."""
    found: dict[str, object] = {"repetitions": len(results)}
    for key in dict.fromkeys(key for one in results for key in one if key != "repetition"):
        seen = [one[key] for one in results if key in one]
        values = [value for value in seen if isinstance(value, int | float)]
        if key in (*COUNTS, "duration", "wall"):
            found[key] = sum(values)
        else:  # a center of equal values may differ from them in the last bit
            found[key] = center(values) if len(set(seen)) > 1 else seen[0]
    return found


def sweep_to_dict(steps: Mapping[int, Comparison]) -> dict[str, object]:
    """result.json of a sweep over concurrencies."""
    return {"version": VERSION, "sweep": {str(users): to_dict(one) for users, one in steps.items()}}


def search_to_dict(
    found: Mapping[str, GoodputResult], slo: SLO, void: list[str], marks: list[str]
) -> dict[str, object]:
    """result.json of a search for goodput."""
    by_side = {f"{number}: {label}": msgspec.to_builtins(one) for number, (label, one) in enumerate(found.items())}
    result: dict[str, object] = {"version": VERSION, "goodput": by_side, "slo": str(slo), "void": void, "marks": marks}
    if len(found) == 2:
        ratio, verdict = goodput_verdict(found, void)
        result |= {"ratio": msgspec.to_builtins(ratio), "verdict": verdict}
    return result


def contest_to_dict(contest: Contest) -> dict[str, object]:
    """result.json of more than two sides."""
    sides = [{"label": side.label, **_side_to_dict(side)} for side in contest.sides]
    rest = {key: getattr(contest, key) for key in ("verdict", "void", "marks", "ratios", "best")}
    return {"version": VERSION, "contest": sides, **msgspec.to_builtins(rest)}


def write_run_directory(directory: str | Path, result: Comparison | Contest) -> Path:
    """Write result.json, requests.jsonl and steps.jsonl. Raises `OSError`."""
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "result.json", to_dict(result) if isinstance(result, Comparison) else contest_to_dict(result))
    _write_lines(path / "requests.jsonl", result, lambda run: run.requests)
    if any(run.steps for side in result.sides for run in side.runs):
        _write_lines(path / "steps.jsonl", result, lambda run: run.steps)
    return path


def _write_lines(path: Path, result: Comparison | Contest, records: Callable[[RunRecord], Iterable[Struct]]) -> None:
    with path.open("wb") as file:
        for letter, side in zip(LETTERS, result.sides, strict=False):
            for run in side.runs:
                head = {"version": VERSION, "side": letter, "label": run.label, "repetition": run.repetition}
                for record in records(run):
                    file.write(msgspec.json.encode({**head, **msgspec.to_builtins(record)}) + b"\n")


# ---------------------------------------------------------------- reading


def read_json(path: Path) -> dict[str, Any]:
    """options.json or result.json. Raises `OSError`, `VersionError`, and `MsgspecError` where it is neither."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise msgspec.ValidationError(f"{path}: {error}") from error
    check_version(path, found.get("version"), VERSION)
    return found


def read_result(directory: Path) -> Comparison | Contest | dict[int, Comparison] | GoodputSearch:
    """What `directory` holds, without its steps; the comparisons of a sweep come without their requests, too.

    Raises `OSError`, `VersionError`, and `MsgspecError` or `KeyError` where it is no run directory.
    """
    result = read_json(directory / "result.json")
    if "sweep" in result:
        return {int(users): _comparison(one, ()) for users, one in result["sweep"].items()}
    if "goodput" in result:
        found = {}
        for key, one in result["goodput"].items():
            upper = math.inf if one["upper"] is None else one["upper"]  # JSON has no infinity
            found[key.partition(": ")[2]] = {**one, "upper": upper}
        return msgspec.convert({**result, "goodput": found}, GoodputSearch)
    lines = read_lines(directory / "requests.jsonl", RequestLine)
    if "contest" in result:
        ratios = [{name: _ratio(one) for name, one in side.items()} for side in result["ratios"]]
        sides = _sides(((side["label"], side) for side in result["contest"]), lines)
        best = [_ratio(one) for one in result["best"]]
        return Contest(sides, ratios, best, result["marks"], result["void"], result["verdict"])
    return _comparison(result, lines)


def read_lines(path: Path, kind: type[Line]) -> list[Line]:
    """requests.jsonl or steps.jsonl. Raises as `read_result` does."""
    decoder, found = msgspec.json.Decoder(kind), []
    with path.open("rb") as file:
        for line in file:
            found.append(one := decoder.decode(line))
            check_version(path, one.version, VERSION)
    return found


def _comparison(result: Mapping[str, Any], lines: Sequence[RequestLine]) -> Comparison:
    sides = _sides(result["sides"].items(), lines)
    ratios = {name: _ratio(one) for name, one in result["ratios"].items()}
    b = sides[1] if len(sides) > 1 else None
    return Comparison(sides[0], b, ratios, result["marks"], result["void"], result["verdict"])


def _sides(written: Iterable[tuple[str, Any]], lines: Sequence[RequestLine]) -> list[Side]:
    by_run: dict[tuple[str, int], list[RequestRecord]] = {}
    for line in lines:
        by_run.setdefault((line.side, line.repetition), []).append(line)
    sides = []
    for letter, (label, one) in zip(LETTERS, written, strict=False):
        side = msgspec.convert(one, SideResult)
        for run in side.runs:
            run.requests = by_run.get((letter, run.repetition), [])
        sides.append(Side(label, side.values, side.runs, side.repetitions))
    return sides


def _ratio(values: Mapping[str, Any]) -> Ratio:
    known = {name: math.nan if value is None else value for name, value in values.items()}  # JSON has no nan
    return msgspec.convert(known, Ratio)
