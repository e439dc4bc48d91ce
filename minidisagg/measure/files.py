"""The files that a run has read, as options.json has them: a rerun needs the same ones.

What is small, the source of a policy or a device's profile, is copied into the run directory. A data set is named by
its absolute path, size and hash.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from msgspec import Struct

from minidisagg.policies import load_policy

COPIES = "files"  # the directory of copies in a run directory


class UsedFile(Struct, kw_only=True, omit_defaults=True):
    """`given`: as the command named it, of an installed policy its name; `copy`: its place in the run directory."""

    given: str
    path: str  # absolute
    bytes: int
    sha256: str
    copy: str = ""
    installed: bool = False  # the source of a policy that is found by its name


class Files:
    """Those of one run, as they were when it began: people go on editing their policies while it runs."""

    def __init__(self, policies: Iterable[str], data: str, others: Iterable[str] = ()) -> None:
        """`policies` as on the command line; `data`: a data set, or nothing; `others` are copied as policies are.

        Raises `OSError`, and `ValueError` for a policy that there is not.
        """
        self.used: list[UsedFile] = []
        self._contents: dict[str, bytes] = {}  # by place in the run directory
        for spec in policies:
            name = spec.partition(":")[0]
            load_policy(spec)
            self._copy(name, Path(name) if name.endswith(".py") else source_of(name), not name.endswith(".py"))
        for name in others:
            self._copy(name, Path(name))
        if data:
            self.used.append(_used(data, Path(data), sha256_of(Path(data))))

    def _copy(self, given: str, path: Path, installed: bool = False) -> None:
        if any(file.given == given for file in self.used):
            return
        content, name = path.read_bytes(), f"{COPIES}/{path.name}"
        if name in self._contents:  # another file of that name
            name = f"{COPIES}/{len(self.used)}-{path.name}"
        self._contents[name] = content
        self.used.append(_used(given, path, hashlib.sha256(content).hexdigest(), name, installed))

    def write(self, directory: Path) -> Sequence[UsedFile]:
        """Write the copies. Raises `OSError`."""
        for name, content in self._contents.items():
            (directory / COPIES).mkdir(exist_ok=True)
            (directory / name).write_bytes(content)
        return self.used


def sha256_of(path: Path) -> str:
    """In hexadecimal. Raises `OSError`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_of(policy: str) -> Path:
    """The source file of an installed policy. Raises `ValueError` where there is none of that name."""
    return Path(str(sys.modules[type(load_policy(policy)).__module__].__file__))


def _used(given: str, path: Path, sha256: str, copy: str = "", installed: bool = False) -> UsedFile:
    size = path.stat().st_size
    return UsedFile(
        given=given, path=str(path.resolve()), bytes=size, sha256=sha256, copy=copy, installed=installed
    )  # fmt: skip
