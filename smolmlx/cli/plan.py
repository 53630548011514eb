"""`smolmlx plan`: everything a recipe will do, before anything heavy starts."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click

from smolmlx.cli import options
from smolmlx.errors import RecipeError

if TYPE_CHECKING:
    from smolmlx.plan import Plan


@click.command("plan")
@click.argument("recipe", required=False)
@options.engine
@options.overrides
@click.option("--max-steps", type=click.IntRange(min=1), help="As for train.")
@click.option(
    "--row", default=1, show_default=True, type=click.IntRange(min=1), help="Row to show with its trained tokens."
)
@options.as_json
def command(
    recipe: str | None,
    backend: str,
    device: str | None,
    sets: tuple[str, ...],
    max_steps: int | None,
    row: int,
    as_json: bool,
) -> None:
    """Resolve RECIPE (default: quickstart) and print the plan; fails where training would fail."""
    from smolmlx import console

    loaded = options.load_recipe(recipe or "quickstart", sets, max_steps)
    plan = options.resolve(loaded, options.choose(backend, device))
    if row > plan.num_rows:
        raise RecipeError(f"--row {row}: the last row that is trained is {plan.num_rows}.")
    if as_json:
        from smolmlx.recipe import flatten

        values = {
            key: {"value": value, "origin": plan.loaded.origins.get(key, "default")}
            for key, value in flatten(plan.recipe).items()
        }
        console.print_json({**plan.to_json(), "recipe": values})
        return
    _show_values(plan)
    _show_plan(plan)
    _show_row(plan, row - 1)
    for text in plan.notes:
        console.note(text, style="yellow")
    words = ["smolmlx", "train", recipe or "quickstart", "--backend", plan.backend]
    words += ["--device", device] if device else []
    words += ["--max-steps", str(max_steps)] if max_steps else []
    console.result(f"\nNext: {shlex.join([*words, *(word for text in sets for word in ('--set', text))])}")


def _show_values(plan: Plan) -> None:
    """Print the values that someone chose, and where."""
    from smolmlx import console
    from smolmlx.recipe import flatten

    rows = [
        (key, str(value)[:70], plan.loaded.origins[key])
        for key, value in flatten(plan.recipe).items()
        if key in plan.loaded.origins
    ]
    console.table(rows, ("value", "", "from"), title=f"Recipe {plan.loaded.source} (everything else: defaults)")


def _show_plan(plan: Plan) -> None:
    from smolmlx import console

    tree = plan.to_json()
    store, rates = plan.train.store, plan.learning_rates
    padding = 1 - tree["tokens"] / max(1, tree["padded_tokens"])
    shape = f"{100 * padding:.1f} % padding"
    if plan.pairs:  # shared prompts are computed once, so there may be fewer tokens than the rows hold
        shape = f"{tree['padded_tokens'] / max(1, tree['tokens']):.2f} tokens computed for each of the rows', padding included"
    unit = "pairs" if plan.pairs else "packs" if tree["packed"] else "rows"
    rows = [
        (
            "engine",
            f"{plan.backend} on {plan.capabilities.device_name} ({plan.why_backend}), {plan.dtype}: {plan.capabilities.dtype_reason}",
        ),
        (
            "model",
            f"{plan.model.name}, {plan.num_parameters:,} parameters"
            + (f", revision {plan.model.revision}" if plan.model.revision else ""),
        ),
        (
            "trainable",
            f"{plan.num_trainable:,} ({100 * plan.num_trainable / max(1, plan.num_parameters):.2f} %)"
            + (f" in {len(plan.targets)} layers: {', '.join(tree['targets'])}" if plan.targets else ""),
        ),
        ("format", plan.format_name),
        *_start(plan),
        ("pairs" if plan.pairs else "rows", f"{plan.num_rows:,} of {store.account.rows:,} read"),
        *[
            (f"  {reason}", f"{count} rows, first at {store.account.first.get(reason, '?')}")
            for reason, count in store.account.reasons.items()
        ],
        ("tokens", f"{tree['tokens']:,}, longest row {tree['longest']:,}"),
        ("supervised", f"{tree['supervised']:,} ({100 * tree['supervised'] / max(1, tree['tokens']):.1f} %)"),
        (
            "batches",
            f"{plan.train.batch_size} x {plan.train.accumulation} {unit} a step, {_widths(plan)}, {shape}",
        ),
        ("steps", f"{plan.steps} ({plan.train.steps_per_epoch} per epoch)"),
        (
            "learning rate",
            f"{rates[0]:.3g} first, {rates.max():.3g} at most, {rates[-1]:.3g} last ({plan.recipe.train.schedule})",
        ),
        (
            "validation",
            f"{tree['validation_rows']:,} {'pairs' if plan.pairs else 'rows'}, after steps {_short(tree['eval_steps'])}"
            if plan.validation
            else "none",
        ),
        (
            "memory",
            f"about {console.format_bytes(plan.memory_bytes)}"
            + (f" of {console.format_bytes(plan.capabilities.memory_bytes)}" if plan.capabilities.memory_bytes else ""),
        ),
        ("hashes", f"data {tree['data_hash']}, template {tree['template']}, plan {tree['fingerprint']}"),
    ]
    console.result()
    console.table(rows, title="Plan")


def _start(plan: Plan) -> list[tuple[str, str]]:
    """Say where training starts and what it is held against, where that is not the bare model."""
    rows = [("start", f"the adapter in {plan.start.described}")] if plan.start else []
    if plan.pairs:
        dpo = plan.recipe.dpo
        extras = [f"label smoothing {dpo.label_smoothing:g}"] if dpo.label_smoothing else []
        extras += ["per token"] if dpo.length_normalized else []
        extras += [f"plus {dpo.sft_weight:g} x nats per token of the chosen answer"] if dpo.sft_weight else []
        against = "no reference" if dpo.loss == "orpo" else "reference: the start"
        rows.append(("loss", ", ".join([f"{dpo.loss}, beta {dpo.beta:g}", *extras, against])))
    return rows


def _widths(plan: Plan) -> str:
    if plan.pairs is None:
        return f"widths {', '.join(map(str, plan.train.widths))}"
    tails = f"widths of answers {', '.join(map(str, plan.pairs.tail_widths))}"
    if not plan.pairs.shared:
        return tails.replace("answers", "prompt and answer")
    return f"widths of prompts {', '.join(map(str, plan.pairs.prefix_widths))}, {tails}"


def _short(numbers: list[int]) -> str:
    return (
        ", ".join(map(str, numbers)) if len(numbers) <= 8 else f"{', '.join(map(str, numbers[:4]))}, ... {numbers[-1]}"
    )


def _show_row(plan: Plan, index: int) -> None:
    """Print one row (both rows of a pair) as the model sees it, trained tokens coloured (between «» without colour)."""
    from smolmlx import console
    from smolmlx.data.inspection import pieces

    rows = [(f"Row {index + 1}", index)]
    if plan.pairs:
        rows = [(f"Pair {index + 1}, {name}", 2 * index + side) for side, name in enumerate(("chosen", "rejected"))]
    for title, row in rows:
        ids, mask = plan.train.store.row(row)
        shown = pieces(ids.tolist(), mask.tolist(), plan.tokenizer)
        console.result(f"\n{title} as it is trained ({int(mask.sum())} of {len(ids)} tokens):")
        if sum(len(text) for text, _ in shown) > 3000:
            shown = [
                (text if len(text) < 1200 else f"{text[:600]} [...] {text[-600:]}", trained) for text, trained in shown
            ]
        console.tokens(shown)
