"""The conversion benchmark judges its limits; what it measures is asserted nowhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "convert.py"
ROWS = {
    "copy, plain": (1000e6, 0),
    "convert, plain": (500e6, 0),
    "copy, patterns": (1000e6, 0),
    "convert, patterns": (600e6, 0),
    "merge": (80e6, 3_900_000_000),
}


@pytest.mark.parametrize(
    ("missed", "change"),
    [
        (None, {}),
        ("convert, plain", {"convert, plain": (499e6, 0)}),
        ("convert, patterns", {"convert, patterns": (100e6, 0)}),
        ("merge", {"merge": (80e6, 4_000_000_000)}),
    ],
)
def test_each_limit_is_judged(missed: str | None, change: dict[str, tuple[float, int]]) -> None:
    spec = importlib.util.spec_from_file_location("convert_benchmark", PATH)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = [
        {"job": job, "bytes": 3_000_000_000, "bytes_per_second": speed, "peak_bytes": peak}
        for job, (speed, peak) in {**ROWS, **change}.items()
    ]
    verdicts = module.judge(rows)
    assert [words.partition(":")[0] for words, kept in verdicts if not kept] == ([missed] if missed else [])
    assert len(verdicts) == 3
