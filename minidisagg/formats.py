"""Whatever is recorded, or crosses a process boundary, begins with a version (docs/formats.md lists them)."""

from __future__ import annotations


class VersionError(ValueError):
    """Something was written by another version of minidisagg; one line for the user."""


def check_version(what: object, found: object, known: int) -> None:
    """Raises `VersionError` that names both unless `found` is the version that this code reads."""
    if found != known:
        said = "no version" if found is None else f"version {found}"
        raise VersionError(f"{what} has {said}, and this minidisagg reads version {known} (docs/formats.md)")
