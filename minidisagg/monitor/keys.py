"""What a key does: it changes what is shown (`Ui`), or asks for an action that `app` carries out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from minidisagg.admin_schema import EndRecord, WorkerState
from minidisagg.monitor.state import State

POLICIES = ("fcfs", "prefill_first", "sarathi:chunk=64")
RATES = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 30.0, 50.0, 80.0, 120.0)  # requests per second, + and - step
FLIPPED = {"prefill": "decode", "decode": "prefill", "both": "prefill"}
HELP = (
    ("space", "pause or resume admission: new requests wait in the router"),
    ("m", "give the workers the roles of the other mode, colocated or disagg"),
    ("p", "next scheduling policy: " + ", ".join(POLICIES)),
    ("↑ ↓", "select a worker"),
    ("f", "flip the selected worker's role, once it has finished what it has"),
    ("R", "restart the selected worker, once it has finished what it has"),
    ("K", "kill the selected worker; its requests are recomputed elsewhere"),
    ("+ -", "more or less load from the built-in generator"),
    ("← →", "select a request of the waterfall"),
    ("enter", "details of the selected request"),
    ("1 … 7", "one panel alone; again: all of them"),
    ("", "5: in a tall red step, all that decode there wait for a prefill"),
    ("/", "filter the log"),
    ("s", "save the latest events for --replay, and a trace for ui.perfetto.dev"),
    ("esc", "back"),
    ("q", "quit"),
)


class Post(NamedTuple):
    """POST /admin/`path`; `label` says what it does."""

    path: str
    label: str
    body: dict[str, Any] | None = None


class SetLoad(NamedTuple):
    """The load generator's new rate, in requests per second."""

    rate: float


Action = Post | SetLoad | Literal["save", "quit"]


@dataclass
class Ui:
    """What the user has chosen to see, and what the footer says."""

    worker: int = 0  # selected
    request: str = ""  # selected; none: the newest
    panel: int = 0  # alone on the screen; 0: all
    filter: str = ""
    mode: str = ""  # or filter, kill, help, details
    status: str = ""  # for some seconds since `said`
    failed: bool = False  # `status` is bad news
    said: float = 0.0
    lost: str = ""  # why there are no events
    live: str = "live"
    load: float | None = None  # requests per second; None: there is no generator
    trouble: str = ""  # what became of some of its requests

    def say(self, status: str, failed: bool = False) -> None:
        """In the footer, for some seconds or until there is something else to say."""
        self.status, self.failed, self.said = status, failed, time.monotonic()


def selected_worker(ui: Ui, state: State) -> WorkerState | None:
    """The worker that f, K and R are about."""
    return state.now.workers[min(ui.worker, len(state.now.workers) - 1)] if state.now.workers else None


def selected_request(ui: Ui, state: State) -> EndRecord | None:
    """The ended request that Enter shows."""
    return next((end for end in reversed(state.ends) if not ui.request or end.id == ui.request), None)


def press(ui: Ui, key: str, state: State) -> Action | None:
    """`key`: a character, or prompt_toolkit's name of it."""
    if key == "c-c":
        return "quit"
    if ui.mode == "filter":
        _edit(ui, key)
        return None
    if ui.mode == "kill":
        ui.mode = ""
        worker = selected_worker(ui, state)
        if key == "y" and worker is not None:
            return Post(f"workers/{worker.name}/kill", f"kill {worker.name}")
        ui.say("not killed")
        return None
    if key == "q":
        return "quit"
    if ui.mode == "help" or key == "escape":
        ui.mode, ui.panel, ui.request = "", 0 if key == "escape" else ui.panel, "" if key == "escape" else ui.request
    elif key in "1234567":
        ui.mode, ui.panel = "", 0 if ui.panel == int(key) else int(key)
    elif key in ("left", "right"):
        _step_request(ui, state, 1 if key == "right" else -1)
    elif key in ("c-m", "c-j"):
        ui.mode = "details" if ui.mode != "details" and state.ends else ""
        end = selected_request(ui, state)
        ui.request = end.id if end is not None else ""
        if not state.ends:
            ui.say("no request yet")
    elif key in ("?", "/"):
        ui.mode = "help" if key == "?" else "filter"
    elif key == "s":
        return "save"
    elif key in ("+", "=", "-"):
        load, rates = ui.load or 0.0, RATES[::-1] if key == "-" else RATES
        return SetLoad(next((rate for rate in rates if (rate < load if key == "-" else rate > load)), load))
    else:
        return _operate(ui, key, state)
    return None


def _edit(ui: Ui, key: str) -> None:
    if key == "c-h":
        ui.filter = ui.filter[:-1]
    elif key in ("c-m", "c-j", "escape"):
        ui.mode, ui.filter = "", "" if key == "escape" else ui.filter
    elif len(key) == 1 and key.isprintable():
        ui.filter += key


def _step_request(ui: Ui, state: State, by: int) -> None:
    ids = [end.id for end in state.ends]
    if ids:
        at = ids.index(ui.request) if ui.request in ids else len(ids) - 1
        ui.request = ids[min(max(at + by, 0), len(ids) - 1)]


def _operate(ui: Ui, key: str, state: State) -> Post | None:
    now, worker = state.now, selected_worker(ui, state)
    if worker is None:
        return None
    if key == " ":
        return Post("resume", "resume admission") if now.paused else Post("pause", "pause admission")
    if key == "m":
        mode = "disagg" if now.mode == "colocated" else "colocated"
        return Post("mode", f"mode {mode}", {"mode": mode})
    if key == "p":
        names, name = [policy.partition(":")[0] for policy in POLICIES], now.policy.partition(":")[0]
        policy = POLICIES[(names.index(name) + 1) % len(POLICIES) if name in names else 0]
        return Post("policy", f"policy {policy}", {"policy": policy})
    if key in ("up", "down"):
        ui.worker = min(max(now.workers.index(worker) + (1 if key == "down" else -1), 0), len(now.workers) - 1)
    elif key == "f":
        role = FLIPPED.get(worker.role, "both")
        return Post(f"workers/{worker.name}/role", f"{worker.name} becomes {role}", {"role": role})
    elif key == "R":
        return Post(f"workers/{worker.name}/restart", f"restart {worker.name}")
    elif key == "K":
        ui.mode = "kill"
    return None
