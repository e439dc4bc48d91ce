"""Published policies, one file each, and how a name on the command line becomes a `Policy`.

--policy sarathi            a file of this package
--policy sarathi:chunk=64   with a setting
--policy ./mine.py:Mine     a class in a file of yours; settings follow another colon
an entry point in the group `minidisagg.policies`
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import sys
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path

from minidisagg.core import rehearsal
from minidisagg.core.checked import PolicyError
from minidisagg.core.messages import ROUTER
from minidisagg.core.policy import Policy
from minidisagg.policies._log import Logged, Write


def names() -> list[str]:
    """All policies that a bare name can mean."""
    mine = _own()
    return sorted({*mine, *(point.name for point in entry_points(group="minidisagg.policies"))})


def load_policy(spec: str) -> Policy:
    """A new instance of the policy that `spec` names; raises `ValueError` in one line if there is none."""
    name, _, rest = spec.partition(":")
    if name.endswith(".py"):
        class_name, _, rest = rest.partition(":")
        found = _from_file(Path(name), class_name)
    elif name in _own():
        found = importlib.import_module(f"{__name__}.{name}").POLICY
    else:
        points = [point for point in entry_points(group="minidisagg.policies") if point.name == name]
        if not points:
            raise ValueError(f"unknown policy {name!r}; there are {', '.join(names())}, or FILE.py:CLASS")
        found = points[0].load()
    settings = dict(_setting(part, spec) for part in rest.split(",") if part)
    try:
        policy = found(**settings)
    except TypeError as error:  # a setting that the class does not have, or of another type
        raise ValueError(f"policy {spec!r}: {error}") from error
    if not isinstance(policy, Policy):
        raise ValueError(f"policy {spec!r} is not a minidisagg.Policy")
    return policy


def make_policy(spec: str, who: str, log_dir: str) -> Policy:
    """`load_policy`, with each decision of it written to `log_dir`/`who`.jsonl where there is a `log_dir`."""
    policy = load_policy(spec)
    return logged(policy, spec, who, _appender(Path(log_dir) / f"{who}.jsonl")) if log_dir else policy


def logged(policy: Policy, spec: str, who: str, write: Write) -> Policy:
    """The same policy, whose decisions are written: a line, as bytes, for each."""
    return Logged(policy, spec, who, write)


def rehearse(spec: str, workers: rehearsal.Workers) -> None:
    """A dry call of the policy that `spec` names, on these workers; raises `ValueError` in one line."""
    try:
        rehearsal.rehearse(partial(load_policy, spec), workers)
    except PolicyError as error:
        raise ValueError(str(error)) from error


@cache
def _appender(path: Path) -> Write:
    """Once per process: a policy that is set later, or a worker that is started again, goes on in the same file.

    The front end makes its file first, and refuses one of an earlier run with a `ValueError` of one line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    if path.stem == ROUTER and os.fstat(file).st_size:
        os.close(file)
        raise used(path.parent)
    return partial(os.write, file)  # at once: a kill loses nothing


def used(directory: Path) -> ValueError:
    """Why decisions are not written there."""
    return ValueError(f"{directory} has the decisions of an earlier run: name another directory, or empty it")


def _own() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]


def _from_file(path: Path, class_name: str) -> type[Policy]:
    module_spec = importlib.util.spec_from_file_location(f"{__name__}.file:{path}", path)
    if not path.is_file() or module_spec is None or module_spec.loader is None:
        raise ValueError(f"policy file {path} does not exist")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # a dataclass in the file looks itself up there
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises is told in one line
        raise ValueError(f"policy file {path} fails: {type(error).__name__}: {error}") from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise ValueError(
            f"policy file {path} has no subclass of minidisagg.Policy named {class_name or '(none given)'}"
        )
    return found


def _setting(part: str, spec: str) -> tuple[str, int | float | str]:
    key, equals, value = part.partition("=")
    if not equals:
        raise ValueError(f"policy {spec!r}: expected KEY=VALUE, not {part!r}")
    for number in (int, float):
        try:
            return key, number(value)
        except ValueError:
            continue
    return key, value
