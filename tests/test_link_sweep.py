"""scripts/link_sweep.py without an engine: what it takes, and the figure that it draws."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from minidisagg.measure.plots import svg


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    spec = spec_from_file_location("link_sweep", Path(__file__).parent.parent / "scripts" / "link_sweep.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["link_sweep"] = module_from_spec(spec)  # its dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def test_bandwidths_get_the_latency_and_are_checked(sweep: ModuleType) -> None:
    _, plan = sweep.read_arguments(["--bandwidths", "1Gbps, 2GB/s", "--latency", "5us", "--lengths", "64,128"])
    assert plan.bandwidths == ["1Gbps,5us", "2GB/s,5us"] and plan.lengths == [64, 128]
    with pytest.raises(ValueError, match="no interconnect 'fast,50us'"):
        sweep.read_arguments(["--bandwidths", "fast"])
    _, plan = sweep.read_arguments(["--granularities", "request,layers:1+int8", "--loaded", "0"])
    assert plan.granularities == ["request", "layers:1+int8"] and plan.loaded == 0
    with pytest.raises(ValueError, match="no codec 'zip'; there are raw, int8"):
        sweep.read_arguments(["--granularities", "request+zip"])


WHAT = "TTFT", "second token", "goodput", "hidden share of the transfer"


def test_a_row_of_panels_per_length_and_a_curve_per_granularity(sweep: ModuleType) -> None:
    points = [
        sweep.Point(wire, grain, length, ttft=0.1, second=second, goodput=2.0, late=float(wire == "100Gbps,5us"))
        for length in (64, 256)
        for grain in ("request", "chunk")
        for wire, second in (("none", 0.12), ("1Gbps,5us", 0.2), ("100Gbps,5us", 0.12))
    ]
    figure = sweep.figure(points, 3.0)
    assert [panel.title for panel in figure.drawn] == [
        f"{length} tokens: {what}" for length in (64, 256) for what in WHAT
    ]
    second = figure.panels[1]
    shown = [(s.kind, s.marker, s.label, s.x, s.y) for s in second.series if s.x]
    assert shown[:4] == [
        ("line", "dash", "", [second.x.low, second.x.high], [120.0, 120.0]),
        ("line", "circle", "", [1.0, 100.0], [200.0, 120.0]),
        ("points", "circle", "request", [1.0], [200.0]),
        ("points", "circle", "", [100.0], [120.0]),
    ]
    assert {s.label for s in second.series} == {"", "request", "chunk"}
    assert all(svg(panel, figure.columns).startswith("<svg") for panel in figure.panels)


def test_where_a_codec_stops_paying(sweep: ModuleType) -> None:
    """Half the gap at 1 Gbit/s, 1.5 times of it at 100: level at 10."""
    gaps = {"1Gbps,5us": (0.4, 0.2), "100Gbps,5us": (0.1, 0.15), "none": (0.1, 0.16)}
    points = [
        sweep.Point(wire, grain, 64, ttft=1.0, second=1.0 + gap, gap=gap)
        for wire, both in gaps.items()
        for grain, gap in zip(("request", "request+int8"), both, strict=True)
    ]
    said = sweep.codecs(points)
    assert said == [
        "request+int8, 64 tokens, 1 Gbit/s: second token 0.86 x, after the first 400 → 200 ms, 0.50 x",
        "request+int8, 64 tokens, 100 Gbit/s: second token 1.05 x, after the first 100 → 150 ms, 1.50 x",
        "request+int8, 64 tokens: stops paying at 10 Gbit/s",
        "request+int8, 64 tokens, the real link alone: second token 1.05 x, after the first 100 → 160 ms, 1.60 x",
    ]
    del points[2:4]
    assert "request+int8, 64 tokens: stops paying above 1 Gbit/s" in sweep.codecs(points)
    assert sweep.codecs([p for p in points if "+" not in p.granularity]) == []


def test_what_several_gpus_would_run_can_be_seen_without_one() -> None:
    """scripts/multi_gpu.py --dry-run: the commands that it would measure."""
    script = Path(__file__).parents[1] / "scripts" / "multi_gpu.py"
    done = subprocess.run(
        [sys.executable, str(script), "--part", "eight", "--dry-run"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().splitlines()
    assert "--prefill-workers 4 --decode-workers 4" in first and "--prefill-workers 6 --decode-workers 2" in second
    done = subprocess.run([sys.executable, str(script), "--part", "four"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.strip()) == (1, "Error: this measures GPUs, and torch sees none")
