"""Options that several verbs share, and the steps from them to a plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from smolmlx.backend import Choice
    from smolmlx.plan import Plan
    from smolmlx.recipe import Loaded

Function = TypeVar("Function", bound=Callable[..., Any])


def engine(function: Function) -> Function:
    """Add --backend and --device."""
    function = click.option(
        "--backend",
        default="auto",
        show_default=True,
        metavar="auto|mlx|cuda",
        help="Engine; auto picks by the hardware.",
    )(function)
    return click.option(
        "--device", default=None, metavar="D", help="cpu, gpu (mlx), cuda or mps (cuda); left out: the engine's best."
    )(function)


def overrides(function: Function) -> Function:
    """Add --set."""
    return click.option(
        "--set",
        "sets",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override a recipe value, e.g. --set train.learning_rate=1e-4.",
    )(function)


def as_json(function: Function) -> Function:
    """Add --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(function)


def quantize(function: Function) -> Function:
    """Add --quantize, for models that were trained on a quantized base."""
    return click.option(
        "--quantize",
        type=click.Choice(["none", "4bit", "8bit"]),
        default="none",
        show_default=True,
        help="Quantize the base as in training.",
    )(function)


def typed(*names: str) -> list[str]:
    """Return which of these parameters of the command at hand stand on its command line, rather than being defaults."""
    source = click.get_current_context().get_parameter_source
    return [name for name in names if source(name) is ParameterSource.COMMANDLINE]


def refuse_idle_sampling(temperature: float, *names: str) -> None:
    """Refuse what only a sampled answer depends on, where the command line asks for greedy answers."""
    idle = [f"--{name.replace('_', '-')}" for name in typed(*names)] if temperature == 0 else []
    if idle:
        from smolmlx.errors import RecipeError

        why = "a greedy answer draws nothing. Pass --temperature T above 0, or leave it out"
        raise RecipeError(f"{', '.join(idle)}: has no effect at --temperature 0: {why}.")


def tokenizer_folder(base: Path, adapters: Sequence[str]) -> Path:
    """Serve with the tokenizer and template the first adapter was trained with, where it brings them."""
    found = [Path(adapter) for adapter in adapters if (Path(adapter) / "tokenizer.json").is_file()]
    return found[0] if found else base


def say_replaced(folder: Path, made_by: str, what: str) -> None:
    """Say how many rows or pairs of an earlier call of the same verb are about to be replaced."""
    from smolmlx import console
    from smolmlx.synth.documents import read_made_by

    if read_made_by(folder) == made_by:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8")).get("files", {})
        count = sum(entry[what] for entry in files.values())
        console.note(f"replaces {count:,} {what} in {folder}")


def load_recipe(name: str, sets: Sequence[str], max_steps: int | None = None) -> Loaded:
    from smolmlx import pipelines, recipe, shelf
    from smolmlx.errors import RecipeError

    flags = {"train.max_steps": ("--max-steps", max_steps)} if max_steps else {}
    path = shelf.find(name)
    if shelf.is_sweep_file(path):
        raise RecipeError(f"{name}: a sweep, not a recipe. Run: smolmlx sweep {name}")
    if pipelines.is_pipeline(recipe.read(path)):
        stages = pipelines.open_pipeline(path, name, shelf.find).training
        named = ", ".join(dict.fromkeys(shelf.name_of(Path(stage.source)) for stage in stages))
        raise RecipeError(
            f"{name}: a pipeline of several recipes; name one of them ({named}). Run them all: smolmlx train {name}"
        )
    return recipe.load(path, sets, flags)


def choose(backend: str, device: str | None) -> Choice:
    """Pick the engine and say which and why."""
    from smolmlx import backend as backends
    from smolmlx import console

    with console.status("loading the engine"):
        choice = backends.choose(backend, device)
    say_engine(choice)
    return choice


def say_engine(choice: Choice) -> None:
    from smolmlx import console

    console.note(f"engine {choice.backend.name}: {choice.reason}")


def resolve(loaded: Loaded, choice: Choice) -> Plan:
    """Resolve a plan with a progress note while rows are tokenized."""
    from smolmlx import console, plan

    with console.status("reading rows") as say:
        return plan.resolve(loaded, choice, on_rows=lambda count: say(f"tokenizing: {count:,} rows"))
