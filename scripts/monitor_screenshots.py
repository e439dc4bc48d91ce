"""Screenshots of the monitor for the README, as SVG, from a recording of `minidisagg monitor --record FILE`.

    python scripts/monitor_screenshots.py                              docs/data/monitor.jsonl.gz into docs/images/
    python scripts/monitor_screenshots.py my.jsonl --out . --at 8      the moment 8 s after the first event

The recording in docs/data is of `minidisagg serve dummy:tiny --prefill-workers 1 --decode-workers 1` on two CPU cores
with `monitor --demo-load 8`, first colocated, then disaggregated (key m).
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, DIMMED_MONOKAI, TerminalTheme

from minidisagg.monitor.app import read_events
from minidisagg.monitor.keys import Ui
from minidisagg.monitor.state import State, decode
from minidisagg.monitor.view import frame

SLO = {"ttft": 100.0, "tpot": 5.0}  # milliseconds
ROOT = Path(__file__).parent.parent


def main(args: Sequence[str] | None = None) -> None:
    """Four pictures of the last event, and two of the moment `--at` seconds after the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", nargs="?", type=Path, default=ROOT / "docs/data/monitor.jsonl.gz")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images")
    parser.add_argument("--at", type=float, default=10.5, help="seconds after the first event")
    flags = parser.parse_args(args)
    events = [decode(data) for data in read_events(flags.recording)]
    early, late = State(SLO), State(SLO)
    for event in events:
        late.apply(event)
        if event.clock <= events[0].clock + flags.at:
            early.apply(event)
    flags.out.mkdir(parents=True, exist_ok=True)
    for name, state, ui, size, theme in (
        ("monitor", late, Ui(load=8.0), (120, 40), DIMMED_MONOKAI),
        ("monitor-light", late, Ui(load=8.0), (120, 40), DEFAULT_TERMINAL_THEME),
        ("monitor-80x24", late, Ui(), (80, 24), DIMMED_MONOKAI),
        ("monitor-colocated", early, Ui(panel=5), (120, 20), DIMMED_MONOKAI),
        ("monitor-interference", late, Ui(panel=5), (120, 20), DIMMED_MONOKAI),
        ("monitor-request", late, Ui(mode="details"), (80, 24), DIMMED_MONOKAI),
    ):
        (flags.out / f"{name}.svg").write_text(svg(state, ui, size, theme))


def svg(state: State, ui: Ui, size: tuple[int, int], theme: TerminalTheme) -> str:
    """One frame."""
    console = Console(file=io.StringIO(), record=True, width=size[0], height=size[1], force_terminal=True)
    console.print(frame(state, ui, *size), end="")
    return console.export_svg(title="minidisagg monitor", theme=theme)


if __name__ == "__main__":
    main()
