"""`smolmlx sweep` as a user types it, on a tiny model: run, run again, a failed run, SIGKILL and going on."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import lab as labs
import smolmlx

Call = Callable[..., tuple[int, str, str]]
ENGINE = ("--backend", "mlx", "--device", "cpu")


@pytest.fixture
def recipe(tiny_model: Path, chat_rows: Path, tmp_path: Path) -> Path:
    if reason := labs.why_missing("mlx"):
        pytest.skip(reason)
    path = tmp_path / "my.yaml"
    (tmp_path / "rows.jsonl").write_bytes(chat_rows.read_bytes())
    path.write_text(
        f"model: {{id: {tiny_model}}}\ndata: {{train: {chat_rows}, max_length: 128, limit: 8, validation_share: 0.25, packing: 'off'}}\n"
        "train: {batch_size: 2, max_steps: 2, learning_rate: 1e-2, compile: false}\nlora: {r: 4}\neval: {every: end}\n"
        f"evaluate: {{suite: loss, data: {chat_rows}, limit: 4}}\n"
    )
    return path


def test_a_sweep_runs_once_records_what_fails_and_is_reported(call: Call, recipe: Path, tmp_path: Path) -> None:
    grid = ("--grid", "lora.targets=[q_proj],[no_such]", "--seeds", 2)
    code, out, err = call("sweep", recipe, *grid, *ENGINE, "--dry-run")
    assert code == 2 and "no_such" in err and not (tmp_path / "runs").exists()
    code, out, err = call("sweep", recipe, *grid, *ENGINE, "--json")
    assert code == 1, err
    tree = json.loads(out)
    folder = tmp_path / tree["folder"]
    assert [run["status"] for run in tree["runs"]] == ["finished"] * 2 + ["failed"] * 2
    assert "no_such" in tree["runs"][2]["error"]
    assert all(
        name in tree["runs"][0]["figures"] for name in ("train_loss", "val_loss", "eval.loss", "eval.perplexity")
    )
    assert len(list(csv.DictReader((folder / "sweep.csv").read_text().splitlines(keepends=True)))) == 4

    good = ("--grid", "lora.targets=[q_proj]", "--seeds", 2, "--out", folder)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*seed*/**/*") if path.is_file()}
    code, out, err = call("sweep", recipe, *good, *ENGINE, "--resume")
    assert code == 0 and "Nothing to do" in out, err
    after = {path: path.stat().st_mtime_ns for path in folder.glob("*seed*/**/*") if path.is_file()}
    assert before == after
    code, out, err = call("sweep", recipe, *good, *ENGINE, "--set", "lora.alpha=3")
    assert code == 2 and "lora.alpha" in err


def test_the_python_verb_loads_and_asks_a_base_once(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three runs, scored: one base in memory with the adapters put on it in turn, and answers of the base kept."""
    from smolmlx_mlx.engine import MlxBackend

    loads: list[object] = []
    real = MlxBackend.generator
    monkeypatch.setattr(MlxBackend, "generator", lambda *given: (loads.append(given[2]), real(*given))[1])
    monkeypatch.chdir(tmp_path)
    made = smolmlx.sweep(recipe, grid={"lora.r": [2, 4, 8]}, set={"train.max_steps": 1}, backend="mlx", device="cpu")
    assert made.path == Path("runs/sweep-my") and [line.status for line in made.table.lines] == ["finished"] * 3
    assert made.table.findings and len(loads) == 1
    assert smolmlx.sweep(recipe, grid={"lora.r": [2, 4, 8]}, set={"train.max_steps": 1}).table.lines == made.table.lines
    assert len(loads) == 1, "nothing is left to do"
    alone = smolmlx.evaluate(smolmlx.load(made.path / "lora.r=8-seed0", backend="mlx", device="cpu"), str(recipe.parent / "rows.jsonl"), max_length=128, limit=4)  # fmt: skip
    assert alone.loss["adapter"].loss == pytest.approx(made.table.lines[-1].figures["eval.loss"], rel=1e-6)


def test_resume_needs_a_sweep(call: Call, recipe: Path) -> None:
    code, _, err = call("sweep", recipe, "--resume")
    assert code == 2 and "no sweep to resume" in err
    code, _, err = call("sweep", recipe, "--seeds", "many")
    assert code == 2 and "--seeds many" in err


def test_a_killed_sweep_goes_on_and_ends_as_if_it_had_not_been(recipe: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-c", "from smolmlx.cli import main; main()", "sweep", str(recipe), *ENGINE]
    words += ["--seeds", "2", "--set", "save.every=1", "--set", "train.max_steps=4", "--json"]
    whole = subprocess.run([*words, "--out", "whole"], cwd=tmp_path, capture_output=True, text=True, check=True)
    killed = subprocess.Popen(
        [*words, "--out", "cut"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    first, second = (tmp_path / "cut" / f"baseline-seed{seed}" for seed in (0, 1))
    limit = time.monotonic() + 120
    while not list(second.glob("checkpoints/0*/state.json")) and killed.poll() is None:
        assert time.monotonic() < limit, "no checkpoint of the second run"
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert (first / "outcome.json").is_file()
    stamp = (first / "report.json").stat().st_mtime_ns
    again = subprocess.run([*words, "--out", "cut"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (first / "report.json").stat().st_mtime_ns == stamp, "a finished run was run again"
    mine, wanted = json.loads(again.stdout), json.loads(whole.stdout)
    assert mine["ran"] <= 1
    for one, other in zip(mine["runs"], wanted["runs"], strict=True):
        assert one["status"] == "finished"
        for name in ("train_loss", "val_loss", "eval.loss", "steps"):
            assert one["figures"][name] == other["figures"][name]
