"""`smolmlx bench`: how fast a recipe trains and a model answers on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import click

from smolmlx.cli import options
from smolmlx.cli.group import Group
from smolmlx.errors import RecipeError

if TYPE_CHECKING:
    from smolmlx.backend import Choice
    from smolmlx.bench import TrainingSpeed
    from smolmlx.plan import Plan
    from smolmlx.recipe import Loaded

Function = TypeVar("Function", bound=Callable[..., Any])

TRAIN_EPILOG = """\b
Examples:
  smolmlx bench train notes/sft --steps 10
  smolmlx bench train my.yaml --against train.gradient_checkpointing=true --json
"""
DPO_EPILOG = """\b
Example:
  smolmlx bench dpo notes/dpo
"""
COMPILE_EPILOG = """\b
Example:
  smolmlx bench compile notes/sft --steps 50
"""
COST_EPILOG = """\b
Example:
  smolmlx bench cost my.yaml --price 2.50
"""
GENERATE_EPILOG = """\b
Examples:
  smolmlx bench generate --model tiny
  smolmlx bench generate --model tiny --adapter runs/mine/adapter --batch-size 1 --batch-size 8 --max-tokens 128
"""


@click.group("bench", cls=Group)
def command() -> None:
    """Measure how fast this machine trains and answers.

    Nothing is kept. Ways that are compared take turns, so that a busy moment meets all of them; numbers are medians.
    """


def _training(function: Function) -> Function:
    """Add what every measurement of training takes."""
    for add in (
        options.as_json,
        click.option("--repeats", default=3, show_default=True, type=click.IntRange(min=1), help="Trainings of each."),
        click.option("--steps", default=5, show_default=True, type=click.IntRange(min=1), help="Steps that count, after 3 that do not."),
        options.overrides,
        options.engine,
        click.argument("recipe", default="quickstart"),
    ):  # fmt: skip
        function = add(function)
    return function


@command.command("train", epilog=TRAIN_EPILOG)
@_training
@click.option("--against", multiple=True, metavar="KEY=VALUE", help="Compare with the recipe changed by this.")
def train(against: tuple[str, ...], **given: Any) -> None:
    """Time the training steps of RECIPE (default: quickstart)."""
    _compare(against, **given)


@command.command("dpo", epilog=DPO_EPILOG)
@_training
def dpo(**given: Any) -> None:
    """Time a preference recipe, with its prompts shared by both answers and without."""
    _compare(("dpo.shared_prompt=false",), base=("dpo.shared_prompt=true",), **given)


@command.command("compile", epilog=COMPILE_EPILOG)
@_training
def compare_compile(**given: Any) -> None:
    """Time RECIPE with its step compiled and without."""
    _compare(("train.compile=false",), base=("train.compile=true",), **given)


@command.command("cost", epilog=COST_EPILOG)
@_training
@click.option("--price", type=click.FloatRange(min=0), metavar="P", help="Of an hour of this machine, in any currency.")
def cost(price: float | None, recipe: str, sets: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Estimate how long all steps of RECIPE take here, evaluation left out."""
    from smolmlx import console

    choice = options.choose(given["backend"], given["device"])
    whole = options.resolve(options.load_recipe(recipe, sets), choice)
    speed = _measure({recipe: _steps_only(recipe, sets, given["steps"])}, choice, given["repeats"])[recipe]
    hours = whole.steps * speed.seconds_per_step / 3600
    tree = {"recipe": recipe, "steps": whole.steps, "hours": hours, "price": None if price is None else price * hours}
    if as_json:
        console.print_json({**_machine(whole), **tree, **asdict(speed)})
        return
    text = (
        f"{recipe}: {whole.steps:,} steps of {speed.seconds_per_step:.3g} s are {console.format_seconds(hours * 3600)}"
    )
    console.result(text + (f", {tree['price']:.2f} at {price:g} an hour" if price is not None else ""))


@command.command("generate", epilog=GENERATE_EPILOG)
@click.option("--model", required=True, metavar="M", help="Hub id, folder or `tiny`.")
@click.option("--adapter", metavar="A", help="Answer with this adapter.")
@click.option("--batch-size", "batch_sizes", multiple=True, default=[1, 8], show_default=True, type=click.IntRange(min=1), help="Prompts at once; several are compared.")  # fmt: skip
@click.option("--prompt-tokens", default=64, show_default=True, type=click.IntRange(min=2), help="Longest prompt.")
@click.option("--max-tokens", default=64, show_default=True, type=click.IntRange(min=1), help="Longest answer.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(min=1), help="Batches of each size.")
@options.quantize
@options.engine
@options.as_json
def generate(
    model: str, adapter: str | None, backend: str, device: str | None, quantize: str, as_json: bool, **how: Any
) -> None:
    """Time greedy answers to random prompts."""
    from smolmlx import api, bench, console

    with console.status("loading the model"):
        source = (model, adapter) if adapter else model
        loaded = api.load(source, backend=backend, device=device, quantize=quantize)
    how["batch_sizes"] = sorted(set(how["batch_sizes"]))
    vocabulary = int(loaded.base.config["vocab_size"])
    with console.status("answering"):
        found = bench.measure_answers(loaded.generator, vocabulary, **how)
    if as_json:
        speeds = {str(size): asdict(speed) for size, speed in found.items()}
        console.print_json(
            {"model": model, "adapter": adapter, "backend": loaded.backend.name, **how, "speeds": speeds}
        )
        return
    rows = [(str(size), f"{speed.tokens_per_second:,.0f}", _spread(speed.repeats)) for size, speed in found.items()]
    console.table(rows, ("batch size", "tokens/s", "of the repeats"), title=f"{model} on {loaded.backend.name}")


def _compare(
    against: Sequence[str], recipe: str, sets: tuple[str, ...], steps: int, repeats: int, as_json: bool,
    base: Sequence[str] = (), **engine: Any,
) -> None:  # fmt: skip
    from smolmlx import console

    choice = options.choose(**engine)
    ways = {", ".join(base) or recipe: _steps_only(recipe, (*sets, *base), steps)}
    ways |= {text: _steps_only(recipe, (*sets, *base, text), steps) for text in against}
    found = _measure(ways, choice, repeats)
    if as_json:
        console.print_json(
            {"recipe": recipe, "backend": choice.backend.name, "ways": {k: asdict(v) for k, v in found.items()}}
        )
        return
    rows = [
        (name, f"{speed.tokens_per_second:,.0f}", f"{speed.supervised_per_second:,.0f}", f"{speed.seconds_per_step:.3g}",
         console.format_bytes(speed.peak_bytes) if speed.peak_bytes else "?", _spread(speed.repeats))
        for name, speed in found.items()
    ]  # fmt: skip
    headers = ("", "tokens/s", "supervised/s", "s/step", "peak memory", "tokens/s of the repeats")
    console.table(rows, headers, title=f"{recipe} on {choice.backend.name}, {repeats} x {steps} steps")


def _steps_only(recipe: str, sets: Sequence[str], steps: int) -> Loaded:
    from smolmlx import bench, shelf
    from smolmlx import recipe as recipes

    flags = {key: ("bench", value) for key, value in bench.STEPS_ONLY.items()}
    flags["train.max_steps"] = ("--steps", steps + bench.WARM_UP)
    options.load_recipe(recipe, sets)  # says where a pipeline or a sweep was named
    return recipes.load(shelf.find(recipe), sets, flags)


def _measure(ways: dict[str, Loaded], choice: Choice, repeats: int) -> dict[str, TrainingSpeed]:
    from smolmlx import bench, console

    plans = {name: options.resolve(loaded, choice) for name, loaded in ways.items()}
    if len({plan.recipe.stage for plan in plans.values()}) > 1:
        raise RecipeError("--against: another stage trains other rows; their tokens cannot be compared.")
    for note in dict.fromkeys(note for plan in plans.values() for note in plan.notes):
        console.note(note, style="yellow")
    with console.status("training") as say:
        return bench.measure_training(
            plans, choice, repeats, lambda name, turn: say(f"{name}: {turn + 1} of {repeats}")
        )


def _machine(plan: Plan) -> dict[str, str]:
    return {"backend": plan.backend, "device": plan.capabilities.device_name}


def _spread(rates: Sequence[float]) -> str:
    return f"{min(rates):,.0f}-{max(rates):,.0f}"
