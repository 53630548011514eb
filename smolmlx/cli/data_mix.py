"""`smolmlx data mix`: rows of several files in one, each with its share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from smolmlx.cli import options
from smolmlx.cli.data import _open_all, columns_option
from smolmlx.errors import RecipeError

MIX_EPILOG = """\b
Examples:
  smolmlx data mix notes.jsonl=3 chats.jsonl=1 mixed
  smolmlx data mix notes.jsonl=.8 pairs.jsonl=.2 mixed --rows 1000 --to messages --seed 7
"""


@click.command("mix", epilog=MIX_EPILOG)
@click.argument("inputs", metavar="INPUT[=WEIGHT]...", nargs=-1, required=True)
@click.argument("out_dir", metavar="OUT_DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--rows", type=click.IntRange(min=1), help="Rows in all.  [default: as many as the shares allow]")
@click.option("--to", default="auto", type=click.Choice(["auto", "messages", "text", "preference"]), help="The layout.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Which rows, and their order.")
@columns_option
@options.as_json
def mix(
    inputs: tuple[str, ...], out_dir: Path, columns: Mapping[str, str], as_json: bool, rows: int | None, **how: Any
) -> None:
    """Mix files in given shares.

    Writes train.jsonl, in one layout, and manifest.json with what came from where. An INPUT's share is its WEIGHT (1
    where none is given) over the sum of all; no row comes twice. The same rows, weights and seed give the same bytes.
    """
    from smolmlx import console
    from smolmlx.data.mix import mix as run

    weights = _weights(inputs)
    with console.status("reading rows"):
        manifest = run(_open_all(list(weights), columns), weights, out_dir, rows=rows, **how)
    if as_json:
        console.print_json({"folder": str(out_dir), **manifest})
        return
    made = [
        (name, entry["format"], f"{entry['rows_read']:,}", f"{entry['rows']:,}", f"{entry['share']:.1%}")
        for name, entry in manifest["sources"].items()
    ]
    console.table(made, ("input", "format", "rows read", "taken", "share"))
    console.result(f"\n{out_dir}/train.jsonl: {manifest['rows']:,} rows, as {manifest['to']}, seed {manifest['seed']}")
    console.result(f"Next: smolmlx data inspect {out_dir}/train.jsonl")


def _weights(inputs: tuple[str, ...]) -> dict[str, float]:
    found: dict[str, float] = {}
    problems = []
    for text in inputs:
        name, equals, weight = text.rpartition("=")
        try:
            name, share = (name, float(weight)) if equals else (text, 1.0)
        except ValueError:
            problems.append(f"{text}: expected a number behind =, e.g. {name}=0.5.")
            continue
        if not 0 < share < float("inf"):
            problems.append(f"{text}: the weight must be above 0.")
        if name in found:
            problems.append(f"{name}: is named twice.")
        found[name] = share
    if not problems and len(found) < 2:
        problems.append("a mix takes two inputs or more, then the folder to write.")
    if problems:
        raise RecipeError("INPUT[=WEIGHT]", problems)
    return found
