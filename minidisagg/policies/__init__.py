"""Published policies, one file each, and how a name on the command line becomes a `Policy`.

--policy sarathi            a file of this package
--policy sarathi:chunk=64   with a setting
--policy ./mine.py:Mine     a class in a file of yours; settings follow another colon
an entry point in the group `minidisagg.policies`
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import os
import pkgutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from minidisagg.core import rehearsal
from minidisagg.core.checked import PolicyError, line_of, place_of
from minidisagg.core.messages import ROUTER
from minidisagg.core.policy import HOOKS, Policy
from minidisagg.policies._log import Logged, Write

PATIENCE = 10.0  # seconds that each loading may take, and a rehearsal

logger = logging.getLogger("minidisagg")


def names() -> list[str]:
    """All policies that a bare name can mean."""
    mine = _own()
    return sorted({*mine, *(point.name for point in entry_points(group="minidisagg.policies"))})


def load_policy(spec: str) -> Policy:
    """A new instance of the policy that `spec` names; raises `ValueError` in one line if there is none."""
    spec, newline, source = spec.partition("\n")
    name, _, rest = spec.partition(":")
    if name.endswith(".py"):
        class_name, _, rest = rest.partition(":")
        found = _from_file(Path(name), source if newline else _source(Path(name)), class_name)
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
    except ValueError:
        raise
    except TypeError as error:  # a setting that the class does not have, or of another type
        known = inspect.signature(found).parameters
        wrong = ", ".join(key for key in settings if key not in known)
        told = f"it has no setting {wrong}; it has {', '.join(known) or 'none'}" if wrong else error
        raise ValueError(f"policy {spec!r}: {told}") from error
    except Exception as error:  # whatever the user's file raises is told in one line
        file, what = getattr(found, "file", ""), f"{type(error).__name__}: {error}"
        raise ValueError(f"policy {spec!r} cannot be made: {what}{place_of(file, line_of(error, file))}") from error
    if not isinstance(policy, Policy):
        raise ValueError(f"policy {spec!r} is not a minidisagg.Policy")
    return policy


def pinned(spec: str) -> str:
    """`spec` with the source of its file behind it, in lines of their own: whoever loads that, in another process,
    later or elsewhere, gets what the file holds now. Raises `ValueError`."""
    name = spec.partition(":")[0]
    return f"{spec}\n{_source(Path(name))}" if name.endswith(".py") and "\n" not in spec else spec


def shown(spec: str) -> str:
    """What a user called it."""
    return spec.partition("\n")[0]


def make_policy(spec: str, who: str, log_dir: str) -> Policy:
    """`load_policy`, with each decision of it written to `log_dir`/`who`.jsonl where there is a `log_dir`."""
    policy = load_policy(spec)
    return logged(policy, spec, who, _appender(Path(log_dir) / f"{who}.jsonl")) if log_dir else policy


def logged(policy: Policy, spec: str, who: str, write: Write) -> Policy:
    """The same policy, whose decisions are written: a line, as bytes, for each."""
    return Logged(policy, shown(spec), who, write)


def rehearse(spec: str, workers: rehearsal.Workers) -> None:
    """A dry call of the policy that `spec` names, on these workers; raises `ValueError` in one line."""
    with in_time(PATIENCE, TimeoutError, f"a rehearsal has to end within {PATIENCE:.0f} s") as begin:

        def make() -> Policy:
            begin()
            policy = load_policy(spec)
            check_hooks(policy)
            return policy

        try:
            rehearsal.rehearse(make, workers)
        except PolicyError as error:
            raise ValueError(str(error)) from error


@contextmanager
def in_time(seconds: float, kind: type[BaseException], told: str) -> Iterator[Callable[[], object]]:
    """An endless loop ends as an error of the line that it is in; in a process's main thread, that is. The time begins
    whenever what this yields is called. 0: there is no limit."""
    main = threading.current_thread() is threading.main_thread()
    if not seconds or not main or not hasattr(signal, "setitimer"):
        yield lambda: None
        return

    def late(*_: object) -> None:
        raise kind(told)

    # Again and again: one that is taken for the failure of one request leaves the loop that the next one runs into. Not
    # so soon that it would come while the one before is dealt with.
    begin = partial(signal.setitimer, signal.ITIMER_REAL, seconds, max(0.1, seconds / 20))
    before = signal.signal(signal.SIGALRM, late)
    left, every = begin()
    try:
        yield begin
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left, every)  # of whoever has one


def check_hooks(policy: Policy) -> None:
    """Tells of what nobody will ever call and looks like a hook, and of a user's policy that has none."""
    kind = type(policy)
    for name in dir(kind):
        if name[0] != "_" and not hasattr(Policy, name) and (meant := difflib.get_close_matches(name, HOOKS, 1, 0.75)):
            _warn(f"policy {kind.__name__}: {name} is no hook, and is never asked: is it to be {meant[0]}?")
    if policy.file and all(getattr(kind, hook) is getattr(Policy, hook) for hook in HOOKS):
        _warn(f"policy {kind.__name__} has no hook of its own: it decides as fcfs does")


@cache
def _warn(text: str) -> None:
    """Once, however often a policy is loaded."""
    logger.warning("%s", text)


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


def _source(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"policy file {path} does not exist")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"policy file {path} is no UTF-8: {error}") from error


def _from_file(path: Path, source: str, class_name: str) -> type[Policy]:
    """Compiled anew each time: a cache of bytecode may take two saves within a second for one."""
    module = ModuleType(f"{__name__}.file:{path}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # a dataclass in the file looks itself up there
    try:
        exec(compile(source, str(path), "exec"), vars(module))
    except Exception as error:  # whatever the user's file raises is told in one line
        line, what = line_of(error, str(path)), str(error)
        if isinstance(error, SyntaxError) and error.filename == str(path):
            line, what = error.lineno or 1, error.msg
        raise ValueError(f"policy file {path}, line {line} fails: {type(error).__name__}: {what}") from error
    own = {
        one.__name__: one for one in vars(module).values()
        if isinstance(one, type) and issubclass(one, Policy) and one.__module__ == module.__name__
    }  # fmt: skip
    for one in own.values():
        one.file = str(path)
    if not class_name and len(own) == 1:
        return next(iter(own.values()))
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Policy)):
        named = f" named {class_name}" if class_name else f" that is named: say {path}:CLASS"
        raise ValueError(
            f"policy file {path} has no subclass of minidisagg.Policy{named}; it has {', '.join(own) or 'none'}"
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
