"""scripts/validate_deployments.py: what it reads, predicts and says; and that docs/validation.md has its numbers."""

from __future__ import annotations

import csv
import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
ROW = {
    "silicon_data_source": "file=x.csv; silicon_concurrency=2; wip=False", "backend": "vllm", "mode": "agg",
    "model_path": "Qwen/Qwen3-32B", "system": "h100_sxm", "precision": "", "isl": "64", "osl": "8", "tp_size": "4",
    "silicon_ttft_ms": "20.0", "silicon_tpot_ms": "10.0",
}  # fmt: skip


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "scripts" / "validate_deployments.py"
    spec = spec_from_file_location("validate_deployments", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["validate_deployments"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(path: Path, *changes: dict[str, str]) -> Path:
    """A CSV of ROW, changed in so many ways."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ROW)
        writer.writeheader()
        writer.writerows({**ROW, **change} for change in changes)
    return path


def test_only_rows_of_the_set_whose_concurrency_is_told(script: ModuleType, tmp_path: Path) -> None:
    path = table(
        tmp_path / "silicon.csv",
        {"tp_size": "8"},
        {},
        {"silicon_data_source": "file=x.csv"},
        {"mode": "disagg"},
        {"backend": "sglang"},
        {"precision": "fp8"},
        {"system": "h200_sxm"},
    )
    found = script.read(path, script.SETS["qwen3-32b-h100"])
    assert found == [script.Deployment("h100_sxm", tp, 2, 64, 8, 20.0, 10.0) for tp in (4, 8)]
    assert script.read(path, script.SETS["llama-70b-h200"]) == []


def test_lengths_are_as_the_clients_drew_them(script: ModuleType) -> None:
    row = script.Deployment("h100_sxm", 2, 8, 1000, 200, 0.0, 0.0)
    drawn = script.requests(row, 0.8)
    assert drawn == script.requests(row, 0.8) and len(drawn) == 80
    assert all(800 <= item.prompt_len <= 1000 and 160 <= item.output_len <= 200 for item in drawn)
    assert len({item.prompt_len for item in drawn}) > 20
    assert {(item.prompt_len, item.output_len) for item in script.requests(row, 1.0)} == {(1000, 200)}


def test_errors(script: ModuleType) -> None:
    assert script.error(12.0, 10.0) == 0.2 and script.error(5.0, 10.0) == -0.5
    assert script.spread([-0.3, 0.1, -0.2]) == {"n": 3, "median": 0.2, "p90": 0.28, "bias": -0.2}
    rows = [
        script.Outcome("d", tp, concurrency, 1, 1, 1.0, 1.0, 0.5, 1.0, 1.0, off)
        for tp, concurrency, off in ((2, 4, 0.1), (8, 4, -0.3), (8, 16, -0.1))
    ]
    summary = script.summarize(rows)
    assert summary["all"]["all"]["tpot"]["bias"] == -0.1 and summary["all"]["all"]["ttft"]["median"] == 0.5
    assert {tp: both["tpot"]["bias"] for tp, both in summary["tp"].items()} == {"2": 0.1, "8": -0.2}
    assert list(summary["concurrency"]) == ["4", "16"] and summary["concurrency"]["4"]["tpot"]["median"] == 0.2


def test_a_row_from_end_to_end(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = table(tmp_path / "silicon.csv", {}, {"tp_size": "8"}), tmp_path / "out.json"
    out.write_text(json.dumps({"sets": {"another": {"rows": [["kept"]]}}}))
    script.main([str(path), "--only", "qwen3-32b-h100", "--limit", "1", "--out", str(out)])
    sets = json.loads(out.read_text())["sets"]
    assert sets["another"] == {"rows": [["kept"]]}
    [row] = sets["qwen3-32b-h100"]["rows"]
    told = dict(zip(sets["qwen3-32b-h100"]["columns"], row, strict=True))
    profile = script.find_profile("h100_sxm", "qwen3-32b", "bfloat16", 4)
    step, whole = (1e3 * profile.step_seconds(prompts, 2, 2 * 68) for prompts in ((), [(0, 64)]))
    assert told["tp"] == 4 and step < told["tpot_predicted"] < whole < told["ttft_predicted"] < 2 * whole
    assert told["tpot_error"] == pytest.approx(told["tpot_predicted"] / 10 - 1, abs=1e-3)
    said, progress = capsys.readouterr()
    assert f"| h100_sxm | 4 | 2 | 64 | 8 | 20 / {told['ttft_predicted']:.0f} |" in said and "1/1" in progress


def kept() -> dict[str, Any]:
    sets: dict[str, Any] = json.loads((ROOT / "docs" / "data" / "deployments.json").read_text())["sets"]
    return sets


def test_the_summaries_are_those_of_the_rows(script: ModuleType) -> None:
    sets = kept()
    assert {name: len(one["rows"]) for name, one in sets.items()} == {
        "llama-70b-h100": 45, "llama-70b-h200": 60, "qwen3-32b-h100": 90, "vllm-0.22.1": 16,
    }  # fmt: skip
    for name in script.SETS:
        assert sets[name]["summary"] == script.summarize([script.Outcome(*row) for row in sets[name]["rows"]])


def test_the_page_has_these_numbers(script: ModuleType) -> None:
    page, sets = (ROOT / "docs" / "validation.md").read_text(), kept()
    summaries = {name: sets[name]["summary"] for name in script.SETS}
    assert script.summary_table(summaries, ("all", "tp", "concurrency")) in page
    assert script.figures_table(sets["vllm-0.22.1"]["rows"]) in page
