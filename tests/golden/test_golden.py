"""What must not change by accident: help texts, a plan, and the bytes of a first adapter."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import lab as labs
from smolmlx import backend, models, plan, recipe, session, shelf
from smolmlx.cli import VERBS, cli


def commands(group: click.Group, names: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return every command path below a group."""
    found: list[tuple[str, ...]] = [names]
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found += commands(command, (*names, name)) if isinstance(command, click.Group) else [(*names, name)]
    return found


def help_texts() -> str:
    """Return the help of every command, one behind the other."""
    parts = []
    for path in commands(cli):
        shown = CliRunner().invoke(cli, [*path, "--help"], prog_name="smolmlx", terminal_width=110)
        assert shown.exit_code == 0
        parts.append(f"$ smolmlx {' '.join([*path, '--help'])}\n{shown.output}")
    return "\n".join(parts)


def test_help_texts(golden: Any) -> None:
    # In a process of its own: click keeps a command's help option as its first caller in a process saw it.
    code = "import sys; sys.path[:0] = sys.argv[1:]; import test_golden; print(test_golden.help_texts(), end='')"
    here = Path(__file__).parent
    shown = subprocess.run([sys.executable, "-c", code, here, here.parent], capture_output=True, text=True, check=True)
    golden.check("help.txt", shown.stdout)
    assert {path[0] for path in commands(cli) if path} == set(VERBS)


@pytest.fixture(scope="module")
def quickstart() -> plan.Plan:
    if not (models.embedded_folder() / "model.safetensors").is_file():
        pytest.skip("the embedded model has no weights in this checkout")
    with labs.toy_installed():
        return plan.resolve(recipe.load(shelf.find("quickstart")), backend.choose("toy", "cpu"))


def test_quickstart_plan(golden: Any, quickstart: plan.Plan) -> None:
    tree = quickstart.to_json()
    for machine in ("backend", "why_backend", "device", "notes", "memory_bytes", "device_memory_bytes"):
        tree.pop(machine)
    rates = [float(f"{rate:.9g}") for rate in quickstart.learning_rates]
    golden.check("quickstart-plan.json", json.dumps({**tree, "learning_rates": rates}, indent=1) + "\n")


def test_first_adapter(golden: Any, quickstart: plan.Plan, tmp_path: Any) -> None:
    path = tmp_path / "adapter_model.safetensors"
    session.save_arrays(dict(plan.initial_adapter(quickstart)), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    config = plan.adapter_config(quickstart)
    config["base_model_name_or_path"] = "(folder)"
    golden.check("first-adapter.json", json.dumps({"sha256": digest, "config": config}, indent=1) + "\n")
