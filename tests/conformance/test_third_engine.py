"""A third engine is a folder and an entry point: every verb takes it by name, and nothing under smolmlx/ names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from lab import toy_installed
from smolmlx.cli import cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe_file(tiny_model: Path, chat_rows: Path, tmp_path: Path) -> Path:
    tree = {
        "model": {"id": str(tiny_model)},
        "data": {"train": str(chat_rows), "validation_share": 0.2},
        "train": {"max_steps": 4, "batch_size": 4, "learning_rate": 0.01},
    }
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run(*arguments: object) -> str:
    with toy_installed():
        found = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert found.exit_code == 0, found.stderr
    return found.stdout


def test_product_does_not_name_it() -> None:
    assert not [path for path in (ROOT / "smolmlx").rglob("*.py") if "toy_engine" in path.read_text(encoding="utf-8")]


def test_plan(recipe_file: Path) -> None:
    found = json.loads(run("plan", recipe_file, "--backend", "toy", "--json"))
    assert '"toy"' in json.dumps(found) and '"steps": 4' in json.dumps(found)


def test_train_and_generate(recipe_file: Path, tiny_model: Path, tmp_path: Path) -> None:
    run("train", recipe_file, "--backend", "toy", "--out", tmp_path / "runs", "--json")
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "report.json").read_text())["steps"] == 4
    text = run(
        "generate", "--model", tiny_model, "--adapter", folder / "adapter", "--prompt", "red", "--max-tokens", 5, "--backend", "toy", "--json"
    )  # fmt: skip
    assert json.loads(text)
