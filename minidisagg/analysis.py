"""A run directory of `bench` or `simulate` as pandas frames, for questions that its report does not answer.

    from minidisagg.analysis import OF_RUN, load_run
    run = load_run("bench-results/20260101-120000")
    kept = run.requests[run.requests.measured]
    print(kept.groupby("label").ttft.describe(), run.steps.groupby(["label", "worker", "kind"]).seconds.median())
    print(kept.merge(run.decisions[run.decisions.hook == "place"], on=[*OF_RUN, "engine_id"]).answer)

Each frame begins with the run that a row is of, `OF_RUN`: `side` (A, B, …), `label` (as in the tables), `concurrency`
(of a sweep's step, else <NA>) and `repetition`. All times are seconds, instants and durations; instants are on the
clock of the run's requests, which is virtual in a simulation, else the front end's monotonic one. What is not known is
NaN.

requests    a row per request. `index`: its place in the workload, the same on all sides; `turn`: its place in its
            session, from 0; `request_id`, and `engine_id`, its name in the other frames; `scheduled`, `sent`
            (instants); `prompt_len`, `output_len` (tokens, as asked for), `tokens` (received), `cached_tokens` (of the
            prompt, prefix hits); `finish_reason`, `error`, `rejected`; `measured`: it counts in latencies, being
            neither warm-up nor drain; `ttft`, `ttst`, `e2el` (from `scheduled` to the first, second, last token),
            `tpot`, `max_itl` (durations, of requests that completed, as `measure/stats.py` defines them); `queue`,
            `prefill`, `transfer`, `decode_wait`, `decode` (durations of its stages); `token_times` (instants),
            `handoffs` (i: between tokens i and i + 1), `workers` (in order)
steps       a row per step of a worker: `worker`; `kind` (prefill, decode, mixed); `begin`, `end` (instants), `seconds`;
            `prefill_tokens`, `decode_tokens` (computed), `context_tokens` (KV tokens that it read); `requests`, the
            `engine_id` of each that it gave a token. None of a server that ran already, and none of a simulated run
            of more than 2,000 requests
links       a row per pair of workers and run: `source`, `dest`, `kind`; `bytes`, `transfers` (pieces), `failures`;
            `seconds` on the wire, summed over pieces
decisions   a row per line of the decision log, where the run had `--log-decisions` (docs/decisions.md): `who` (router
            or a worker), `clock` (an instant; a worker's lines have its own clock, which is the same on one host),
            `policy`, `hook`, `engine_id` (of the request that was asked about, else empty), `answer`, and `asked`, a
            dict of all else in the line. Those of warm-up requests are there, too

A search for goodput keeps nothing but its result: its frames are empty.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from minidisagg.formats import check_version
from minidisagg.measure.comparison import Comparison
from minidisagg.measure.contest import Contest
from minidisagg.measure.records import STAGES, RunRecord, StepRecord
from minidisagg.measure.run_directory import LETTERS, StepLine, read_json, read_lines, read_result, run_name
from minidisagg.measure.stats import by_schedule, latencies_of, window_of
from minidisagg.measure.timeline import step_kind
from minidisagg.policies._log import VERSION as LOG_VERSION

try:
    import pandas as pd
except ImportError:
    raise ImportError("minidisagg.analysis needs pandas: pip install -e '.[analysis]'") from None

Row = dict[str, Any]
OF_RUN = ("side", "label", "concurrency", "repetition")
LATENCIES = ("ttft", "ttst", "e2el", "tpot", "max_itl")
COLUMNS = {
    "requests": (
        "index", "turn", "request_id", "engine_id", "scheduled", "sent", "prompt_len", "output_len", "tokens",
        "cached_tokens", "finish_reason", "error", "rejected", "measured", *LATENCIES, *STAGES, "token_times",
        "handoffs", "workers",
    ),
    "steps": (
        "worker", "kind", "begin", "end", "seconds", "prefill_tokens", "decode_tokens", "context_tokens", "requests",
    ),
    "links": ("source", "dest", "kind", "bytes", "transfers", "failures", "seconds"),
    "decisions": ("who", "clock", "policy", "hook", "engine_id", "answer", "asked"),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What one run directory holds; `options` and `result` are its JSON files (docs/formats.md)."""

    requests: pd.DataFrame
    steps: pd.DataFrame
    links: pd.DataFrame
    decisions: pd.DataFrame
    options: dict[str, Any]
    result: dict[str, Any]


def load_run(directory: str | Path, decisions: str | Path = "") -> Run:
    """Read a run directory, whatever number of sides, repetitions and steps of a sweep it has.

    `decisions`: where its decision log is, if it has been moved since. Raises `OSError`, and `ValueError` where
    `directory` is no run directory, or one of another version.
    """
    path = Path(directory)
    try:
        options, result = read_json(path / "options.json"), read_json(path / "result.json")
        runs = list(_runs(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{path} is no run directory: there is no {error.filename}") from None
    except (msgspec.MsgspecError, KeyError) as error:
        raise ValueError(f"{path}: not a run directory of this version: {error!r}") from None
    log = decisions or options.get("decision_dir") or options.get("run", {}).get("decision_dir") or ""
    if log and not Path(log).is_dir():
        warnings.warn(f"the decisions are not in {log} any more: say where as load_run(…, decisions=DIR)", stacklevel=2)
    alone = len({one.side for one in runs}) == 1
    return Run(
        _frame("requests", [_head(one) | row for one in runs for row in _requests(one.record)]),
        _frame("steps", [_head(one) | row for one in runs for step in one.steps for row in _steps(step)]),
        _frame("links", [_head(one) | msgspec.to_builtins(link) for one in runs for link in one.record.links]),
        _frame("decisions", [_head(one) | row for one in runs if log for row in _decisions(Path(log), one, alone)]),
        options,
        result,
    )


class _OneRun(NamedTuple):
    side: str
    label: str
    concurrency: int | None
    record: RunRecord
    steps: list[StepRecord]


def _runs(path: Path, concurrency: int | None = None) -> Iterator[_OneRun]:
    result = read_result(path)
    if isinstance(result, dict):
        for users in result:
            yield from _runs(path / f"concurrency-{users}", users)
    if not isinstance(result, Comparison | Contest):
        return
    kept: dict[tuple[str, int], list[StepRecord]] = {}
    if (path / "steps.jsonl").exists():
        for line in read_lines(path / "steps.jsonl", StepLine):
            kept.setdefault((line.side, line.repetition), []).append(line)
    for letter, side in zip(LETTERS, result.sides, strict=False):
        for run in side.runs:
            yield _OneRun(letter, side.label, concurrency, run, kept.get((letter, run.repetition), []))


def _head(run: _OneRun) -> Row:
    return dict(zip(OF_RUN, (run.side, run.label, run.concurrency, run.record.repetition), strict=True))


def _requests(run: RunRecord) -> Iterator[Row]:
    window = window_of(run)
    for position, request in enumerate(by_schedule(run)):
        row = {name: getattr(request, name) for name in COLUMNS["requests"] if hasattr(request, name)}
        row |= {"engine_id": request.engine_id or request.request_id, "tokens": len(request.token_times)}
        row["measured"] = window.first <= position < window.last
        latencies = latencies_of(request, np.asarray(request.token_times)) if request.ok else {}
        yield row | {name: latencies[name][0] for name in LATENCIES if name in latencies} | request.stages


def _steps(step: StepRecord) -> Iterator[Row]:
    """Of equal steps that were taken at once each one's own row: each reads one more token of every sequence."""
    whole = step.ends or [step.begin + step.seconds]
    for number, (begin, end) in enumerate(zip([step.begin, *whole], whole, strict=False)):
        yield {
            "worker": step.worker,
            "kind": step_kind(step),
            "begin": begin,
            "end": end,
            "seconds": end - begin if step.ends else step.seconds,
            "prefill_tokens": step.prefill_tokens,
            "decode_tokens": step.decode_tokens,
            "context_tokens": step.context_tokens - step.decode_tokens * (len(whole) - 1 - number),
            "requests": step.requests,
        }


def _decisions(log: Path, run: _OneRun, alone: bool) -> Iterator[Row]:
    directory = (log if alone else log / run.side) / run_name(run.record.repetition, run.concurrency)
    for path in sorted(directory.glob("*.jsonl")):
        with path.open("rb") as file:
            for text in file:
                line = msgspec.json.decode(text, type=dict[str, Any])
                check_version(path, line.pop("version", None), LOG_VERSION)
                own = {name: line.pop(name) for name in ("who", "clock", "policy", "hook", "answer")}
                yield own | {"engine_id": line.get("request", {}).get("request_id", ""), "asked": line}


def _frame(name: str, rows: list[Row]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=[*OF_RUN, *COLUMNS[name]])
    return frame.astype({"concurrency": "Int64"})
