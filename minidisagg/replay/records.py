"""What `--record` has left in a directory: runs, each of a router's log and those of the workers that it heard of.

DIR/router.1.inputs       one log per run: a front end begins another where it becomes another cluster
DIR/decode-0.1.inputs     of each worker and epoch
DIR/A/…, DIR/record/…     of several sides, and below a run directory
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from minidisagg.core.inputlog import read_log
from minidisagg.core.messages import ROUTER

SUFFIX = ".inputs"
HOW = "`bench --record`, `simulate --record` and `serve --record DIR` keep one"


class Record(NamedTuple):
    """One run. Without a router's log, `workers` are all that there are."""

    name: str  # as for --run
    router: Path | None
    workers: dict[tuple[str, int], Path]  # all of the directory; by name and epoch


def find_records(directory: Path) -> list[Record]:
    """The runs below `directory`, the one that was written last at the end. Raises `ValueError` where there is none."""
    found = list[tuple[float, Record]]()
    for folder in sorted({path.parent for path in directory.rglob(f"*{SUFFIX}")}):
        workers, routers = dict[tuple[str, int], Path](), dict[int, Path]()
        for path in folder.glob(f"*{SUFFIX}"):
            who, _, text = path.name.removesuffix(SUFFIX).rpartition(".")
            if text.isdigit() and who == ROUTER:
                routers[int(text)] = path
            elif text.isdigit():
                workers[who, int(text)] = path
        where = folder.relative_to(directory).as_posix().removeprefix("record").strip("/.")
        for number, path in routers.items():
            run = f"{where}/{number}".lstrip("/")
            found.append((path.stat().st_mtime, Record(run, path, workers)))
        if not routers and workers:
            found.append((folder.stat().st_mtime, Record(where or "workers", None, workers)))
    if not found:
        raise ValueError(f"{directory} has no recorded run: {HOW}")
    return [record for _, record in sorted(found, key=lambda one: (one[0], one[1].name))]


def is_cut(path: Path) -> bool:
    """The log ends within a record: its process was killed as it wrote, or the file is not all there."""
    with path.open("rb") as log:
        end = len(log.readline())
        for _ in read_log(log):
            end = log.tell()
        return log.tell() > end


def choose_record(directory: Path, name: str) -> tuple[Record, list[str]]:
    """The run of this name, or the last one, and the names of all. Raises `ValueError`."""
    records = find_records(directory)
    names = [record.name for record in records]
    if not name:
        return records[-1], names
    if name not in names:
        raise ValueError(f"{directory} has no run {name!r}: there are {', '.join(names)}")
    return records[names.index(name)], names
