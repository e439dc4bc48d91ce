"""On the path of a worker process under test: it does harm on behalf of the test, as $HARM says (a Python expression
over `harm`, below). Without $HARM it does nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any


def in_step(request_id: str, what: Callable[[], object]) -> None:
    """Whenever this request is in a step, `what` happens in the middle of it."""
    from minidisagg.runtime.device import Device

    launch = Device.launch

    def harmed(self: Any, step: Any, report: Any) -> Any:
        if any(item.request_id == request_id for item in step.plan.items):
            what()
        return launch(self, step, report)

    Device.launch = harmed  # type: ignore[method-assign]


def at(where: str, what: Callable[..., object]) -> None:
    """`what` is called with the arguments of every call of `where` ("module:Class.method"), before it."""
    import importlib

    module, _, path = where.partition(":")
    owner, _, name = path.partition(".")
    target = getattr(importlib.import_module(module), owner)
    method = getattr(target, name)

    def harmed(*arguments: Any, **more: Any) -> Any:
        what(*arguments, **more)
        return method(*arguments, **more)

    setattr(target, name, harmed)


def armed(path: str, what: Callable[[], object]) -> Callable[[], object]:
    """`what`, once, when the file at `path` is there: it goes with it."""

    def happen() -> None:
        try:
            os.unlink(path)
        except FileNotFoundError:
            return
        what()

    return happen


def fail(text: str = "harm") -> None:
    """As a bug would."""
    raise RuntimeError(text)


def leave() -> None:
    """As a crash in native code would: no word, no clean-up."""
    os._exit(9)


if "HARM" in os.environ and "minidisagg.runtime.forkserver" in " ".join(sys.orig_argv):
    exec(os.environ["HARM"])
