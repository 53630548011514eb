"""`smolmlx eval`: score a model and its adapters on held-out rows, beside base and controls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smolmlx.cli import options
from smolmlx.errors import RecipeError

if TYPE_CHECKING:
    from smolmlx.evals.run import Evaluation, Settings

EPILOG = """\b
Examples:
  smolmlx eval notes/sft --model tiny --adapter runs/notes-sft-.../adapter
  smolmlx eval --model HuggingFaceTB/SmolLM2-135M --data held_out.jsonl --suite loss
"""
# Shown in the terminal; the files hold every metric.
SHOWN = ("compliance", "content_alignment", "f1", "key_term_recall", "unsupported", "rubric")
LABELS = {"compliance": "strict compliance", "f1": "F1", "unsupported": "unsupported terms", "rubric": "rubric (0-12)"}


@click.command("eval", epilog=EPILOG)
@click.argument("recipe", required=False)
@click.option("--model", required=True, metavar="M", help="Hub id, folder or `tiny`: the base, always scored too.")
@click.option("--adapter", "adapters", multiple=True, metavar="A", help="Adapter folder; may be given more than once.")
@click.option("--data", metavar="ROWS", help="Held-out rows; default: the recipe's evaluate.data.")
@click.option("--train", "train", metavar="ROWS", help="Rows the copy and random controls answer from (suite notes).")
@click.option("--ood", metavar="ROWS", help="Out-of-distribution rows, scored apart.")
@click.option("--suite", type=click.Choice(["notes", "loss"]), help="Default: the recipe's, else loss.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer.")
@click.option("--limit", type=click.IntRange(min=1), help="Score the first N rows.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@options.quantize
@click.option("--out", type=click.Path(file_okay=False), help="Write results.json, .md, .csv and the answers here.")
@options.engine
@options.as_json
def command(
    recipe: str | None,
    model: str,
    adapters: tuple[str, ...],
    out: str | None,
    backend: str,
    device: str | None,
    quantize: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Score MODEL and each adapter on the same rows, template and decoding; RECIPE supplies what is not given."""
    from smolmlx import console
    from smolmlx.data.chat import Tokenizer
    from smolmlx.evals.run import System, evaluate, write
    from smolmlx.models import find_model

    base = find_model(model)
    settings, template = _settings(recipe, given, device, quantize)
    for adapter in adapters:
        if not Path(adapter).is_dir():
            raise RecipeError(f"--adapter {adapter}: no such folder.")
    choice = options.choose(backend, device)
    tokenizer = Tokenizer(options.tokenizer_folder(base.folder, adapters), template)
    systems = [
        System("base", base),
        *(System(name, base, Path(a)) for name, a in zip(_names(adapters), adapters, strict=True)),
    ]
    found = evaluate(choice.backend, systems, tokenizer, settings, console.Counter)
    if out:
        write(found, Path(out))
    if as_json:
        console.print_json(found.to_json())
    else:
        show(found)
        if out:
            console.result(f"\nResults: {out}")


def _names(adapters: tuple[str, ...]) -> list[str]:
    """Name each adapter by its run folder, numbered where two are alike."""
    plain = [Path(a).parent.name if Path(a).name == "adapter" else Path(a).name for a in adapters]
    return [name if plain.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(plain, 1)]


def _settings(
    recipe: str | None, given: dict[str, Any], device: str | None, quantize: str
) -> tuple[Settings, str | None]:
    """Join flags and recipe, flags first; return them with the recipe's chat template."""
    from smolmlx.backend import Decoding, Loading
    from smolmlx.data.encode import Encoding
    from smolmlx.evals.run import Settings

    fallback = _from_recipe(recipe)
    chosen: dict[str, Any] = {name: fallback.get(name) if value is None else value for name, value in given.items()}
    if not chosen["data"]:
        raise RecipeError("eval: no rows to score. Pass --data rows.jsonl, or a recipe that has an `evaluate` block.")
    idle = [f"--{key.replace('_', '-')}" for key in ("train", "ood", "max_tokens") if given[key] is not None]
    if idle and (chosen["suite"] or "loss") == "loss":
        raise RecipeError(f"{', '.join(idle)}: no effect with suite loss, which answers nothing. Add --suite notes.")
    settings = Settings(
        data=chosen["data"],
        suite=chosen["suite"] or "loss",
        train=chosen["train"],
        ood=chosen["ood"],
        decoding=Decoding(max_tokens=chosen["max_tokens"] or 256, batch_size=chosen["batch_size"]),
        limit=chosen["limit"],
        template_args=fallback.get("template_args", {}),
        system_message=fallback.get("system_message"),
        columns=fallback.get("columns", {}),
        loading=Loading(device, quantize=quantize),
        encoding=fallback["encoding"] if fallback else Encoding(max_length=2048),
    )
    return settings, fallback.get("chat_template")


def _from_recipe(name: str | None) -> dict[str, Any]:
    """Return what a recipe says about evaluation; nothing without a recipe."""
    if name is None:
        return {}
    from smolmlx.plan import encoding, locate

    loaded = options.load_recipe(name, ())
    data, wanted = loaded.recipe.data, loaded.recipe.evaluate
    found: dict[str, Any] = {
        "template_args": data.template_args,
        "system_message": data.system,
        "columns": data.columns,
        "encoding": encoding(loaded.recipe),
        "chat_template": loaded.recipe.model.chat_template,
    }
    if wanted is not None:
        files = {key: locate(path, loaded) for key in ("data", "train", "ood") if (path := getattr(wanted, key))}
        found |= {"suite": wanted.suite, "max_tokens": wanted.max_tokens, "limit": wanted.limit, **files}
    return found


def show(evaluation: Evaluation) -> None:
    """Print the figures that decide, per row set and system, with 95 % intervals."""
    from smolmlx import console

    for name, report in evaluation.notes.items():
        systems = list(report.summary)
        metrics = [metric for metric in SHOWN if metric in report.summary[systems[0]]]
        rows = []
        for metric in metrics:
            cells = [f"{i.mean:.3f} [{i.low:.3f}, {i.high:.3f}]" for i in (report.summary[s][metric] for s in systems)]
            rows.append((LABELS.get(metric, metric.replace("_", " ")), *cells))
        console.result()
        console.table(rows, ("mean [95 % interval]", *systems), title=f"{name}: {report.num_rows} rows")
        for difference in report.differences:
            if difference.metric in ("compliance", "content_alignment"):
                console.result(f"  {difference.sentence}")
    if evaluation.loss:
        lines = [
            (name, f"{s.loss:.4f}", f"{s.perplexity:.2f}", f"{s.accuracy:.4f}", f"{s.num_tokens:,}")
            for name, s in evaluation.loss.items()
        ]
        console.table(lines, ("system", "loss", "perplexity", "accuracy", "tokens"))
