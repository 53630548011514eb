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
  smolmlx eval notes/sft --model tiny --adapter sft=runs/a/adapter --adapter dpo=runs/b/adapter --out runs/scores
  smolmlx eval --model HuggingFaceTB/SmolLM2-135M --data held_out.jsonl --suite loss
"""
RESERVED = ("base", "copy control", "random control")
"""Names of what always stands beside the adapters."""


@click.command("eval", epilog=EPILOG)
@click.argument("recipe", required=False)
@click.option("--model", required=True, metavar="M", help="Hub id, folder or `tiny`: the base, always scored too.")
@click.option("--adapter", "adapters", multiple=True, metavar="[NAME=]A", help="Adapter folder; several stand beside each other, e.g. sft=A dpo=B.")  # fmt: skip
@click.option("--data", metavar="ROWS", help="Held-out rows; default: the recipe's evaluate.data.")
@click.option("--train", "train", metavar="ROWS", help="Rows that controls answer from: copy and random (suite notes), copy (suite research).")  # fmt: skip
@click.option("--ood", metavar="ROWS", help="Out-of-distribution rows, scored apart.")
@click.option("--suite", type=click.Choice(["notes", "loss", "research"]), help="Default: the recipe's, else loss.")
@click.option("--free", is_flag=True, help="Do not keep answers to their schemas (suite research).")
@click.option(
    "--tasks-file",
    metavar="YAML",
    type=click.Path(dir_okay=False),
    help="Task registry that the rows were made with (suite research).",
)
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy and the same every time.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of sampling, with --temperature.")  # fmt: skip
@click.option("--repetition-penalty", type=click.FloatRange(min=0, min_open=True), help="Of tokens that an answer holds already; 1 is off.")  # fmt: skip
@click.option("--no-repeat-ngram", type=click.IntRange(min=0), help="No N tokens in a row come twice; 0 is off.")
@click.option("--limit", type=click.IntRange(min=1), help="Score the first N rows.")
@click.option("--id", "ids", multiple=True, metavar="ROW", help="Score this row alone, by its `id`; row-0007 is the seventh where it has none. May be given more than once.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=1), help="Prompts answered together. Default: the recipe's, else 32.")  # fmt: skip
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
    free: bool,
    tasks_file: str | None,
    **given: Any,
) -> None:
    """Score MODEL and each adapter on the same rows, template and decoding; RECIPE supplies what is not given."""
    from smolmlx import console
    from smolmlx.data.chat import Tokenizer
    from smolmlx.evals.bases import System
    from smolmlx.evals.run import evaluate, write
    from smolmlx.models import find_model

    base = find_model(model)
    named = _name_adapters(adapters)
    given |= {"constrained": False if free else None, "tasks_file": tasks_file}
    settings, template = _settings(recipe, given, device, quantize)
    options.refuse_idle_sampling(settings.decoding.temperature, "seed")
    choice = options.choose(backend, device)
    tokenizer = Tokenizer(options.tokenizer_folder(base.folder, list(named.values())), template)
    systems = [System("base", base), *(System(name, base, Path(folder)) for name, folder in named.items())]
    found = evaluate(choice.backend, systems, tokenizer, settings, console.Counter)
    if out:
        write(found, Path(out))
    if as_json:
        console.print_json(found.to_json())
    else:
        show(found)
        if out:
            console.result(f"\nResults: {out}")


def _name_adapters(adapters: tuple[str, ...]) -> dict[str, str]:
    """Return name -> folder: the name given with `name=`, else that of the run's folder, numbered where two are alike.

    Raises:
        RecipeError: with every folder that is missing and every name that stands for something else.
    """
    problems, found = [], {}
    split = [(None, a) if Path(a).is_dir() or "=" not in a else tuple(a.split("=", 1)) for a in adapters]
    plain = [name or _run_name(folder) for name, folder in split]
    for number, (name, (given, folder)) in enumerate(zip(plain, split, strict=True), 1):
        label = name if given or plain.count(name) == 1 else f"{name}-{number}"
        if not Path(folder).is_dir():
            problems.append(f"--adapter {folder}: no such folder.")
        if label in found or label in RESERVED:
            problems.append(f"--adapter {label}={folder}: the name {label} is taken; give another one, NAME=FOLDER.")
        found[label] = folder
    if problems:
        raise RecipeError("eval: adapters", problems)
    return found


def _run_name(folder: str) -> str:
    path = Path(folder)
    return path.parent.name if path.name == "adapter" else path.name


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
    suite = chosen["suite"] or "loss"
    _refuse_idle(given, suite)
    settings = Settings(
        data=chosen["data"],
        suite=suite,
        train=chosen["train"],
        ood=chosen["ood"],
        constrained=chosen["constrained"] is not False,
        registry=Path(chosen["tasks_file"]) if chosen["tasks_file"] else None,
        decoding=Decoding(
            max_tokens=chosen["max_tokens"] or 256,
            temperature=given["temperature"],
            seed=given["seed"],
            repetition_penalty=chosen["repetition_penalty"] or 1.0,
            no_repeat_ngram=chosen["no_repeat_ngram"] or 0,
            batch_size=chosen["batch_size"] or 32,
        ),
        limit=chosen["limit"],
        ids=given["ids"],
        template_args=fallback.get("template_args", {}),
        system_message=fallback.get("system_message"),
        columns=fallback.get("columns", {}),
        form=fallback.get("form", "auto"),
        loading=Loading(device, quantize=quantize),
        encoding=fallback["encoding"] if fallback else Encoding(max_length=2048),
    )
    return settings, fallback.get("chat_template")


def _refuse_idle(given: dict[str, Any], suite: str) -> None:
    """Refuse what a suite has no use for; a recipe's own values for another suite are no request."""
    from smolmlx.recipe import find_idle

    asked = [key for key, value in given.items() if value or (key == "constrained" and value is False)]
    flags = {"constrained": "--free"}
    wrong = [f"{flags.get(key, '--' + key.replace('_', '-'))}: {why}." for key, why in find_idle(suite, asked)]
    if wrong:
        raise RecipeError(
            f"eval: settings that suite {suite} has no use for; leave them out, or pass another --suite", wrong
        )


def _from_recipe(name: str | None) -> dict[str, Any]:
    """Return what a recipe says about evaluation; nothing without a recipe."""
    if name is None:
        return {}
    from smolmlx.held_out import eval_format, locate
    from smolmlx.plan import encoding

    loaded = options.load_recipe(name, ())
    data, wanted = loaded.recipe.data, loaded.recipe.evaluate
    found: dict[str, Any] = {
        "template_args": data.template_args,
        "system_message": data.system,
        "columns": data.columns,
        "form": eval_format(loaded.recipe),
        "encoding": encoding(loaded.recipe),
        "chat_template": loaded.recipe.model.chat_template,
    }
    if wanted is not None:
        files = {
            key: locate(path, loaded)
            for key in ("data", "train", "ood", "tasks_file")
            if (path := getattr(wanted, key))
        }
        found |= {"suite": wanted.suite, "max_tokens": wanted.max_tokens, "limit": wanted.limit, **files}
        found |= {
            key: getattr(wanted, key) for key in ("constrained", "repetition_penalty", "no_repeat_ngram", "batch_size")
        }
    return found


def show(evaluation: Evaluation) -> None:
    """Print the figures that decide, per row set and system, with 95 % intervals."""
    from smolmlx import console
    from smolmlx.evals import headlines, research
    from smolmlx.evals.suites import CONTROLS, sum_up

    if evaluation.missing_controls:
        console.note(evaluation.missing_controls, style="yellow")
    for name, report in evaluation.notes.items():
        systems = list(report.summary)
        rows = []
        for metric in headlines.NOTES:
            # On two lines, so that five systems fit into 80 columns.
            cells = [
                f"{i.mean:.3f}" + (f"\n{i.low:.3f}-{i.high:.3f}" if i.num_units > 1 else "")
                for i in (report.summary[s][metric.key] for s in systems)
            ]
            rows.append((metric.label, *cells))
        console.result()
        console.table(
            rows,
            ("mean, 95 % interval", *systems),
            title=f"{name}: {report.num_rows} rows of {evaluation.files[name].path}",
        )
        for sentence in sum_up([d for d in report.differences if headlines.is_said(d.metric, d.control in CONTROLS)]):
            console.result(f"  {sentence}")
    for name, found in evaluation.research.items():
        head, *body = research.table(found)
        console.table(body, head, title=f"{name}: {len(found.rows)} rows, mean [95 % interval]")
        for sentence in sum_up(found.differences):
            console.result(f"  {sentence}")
        console.result()
    if evaluation.loss:
        lines = [
            (
                name,
                f"{s.loss:.4f} [{s.low:.4f}, {s.high:.4f}]",
                f"{s.perplexity:.2f}",
                f"{s.accuracy:.4f}",
                f"{s.num_tokens:,}",
            )
            for name, s in evaluation.loss.items()
        ]
        console.table(lines, ("system", "loss [95 % interval]", "perplexity", "accuracy", "tokens"))
        for gap in evaluation.differences:
            console.result(f"  {gap.sentence}")
