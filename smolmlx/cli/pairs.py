"""`smolmlx data pairs`: from notes rows to preference pairs with one flaw each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from smolmlx.cli import options
from smolmlx.errors import RecipeError, nearest

ISSUES = ("fourth-bullet", "unsupported-claim", "text-after-question", "generic-close", "boilerplate")
PAIRS_EPILOG = """\b
Examples:
  smolmlx data pairs data/notes pairs
  smolmlx data pairs train.jsonl validation.jsonl pairs --counts 100,20 --issue fourth-bullet --issue boilerplate
  smolmlx data pairs data/notes pairs --counts 258,42,20 --allow-test --seed 7
"""


@click.command("pairs", epilog=PAIRS_EPILOG)
@click.argument("names", nargs=-1, required=True, metavar="NOTES...")
@click.argument("out_dir", metavar="OUT_DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--counts", default="258,42", show_default=True, metavar="A[,B[,C]]", help="Pairs for train, validation and test.")  # fmt: skip
@click.option("--issue", "issues", multiple=True, metavar="I", help=f"One of {', '.join(ISSUES)}; may be repeated.  [default: all]")  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Which rows, flaws and words.")
@click.option("--allow-test", is_flag=True, help="Take held-out rows too; the model can then not be measured on them.")
@options.as_json
def pairs(
    names: tuple[str, ...],
    out_dir: Path,
    counts: str,
    issues: tuple[str, ...],
    seed: int,
    allow_test: bool,
    as_json: bool,
) -> None:
    """Make preference pairs from notes, by rule.

    NOTES are JSONL files of the notes task, or a folder with train.jsonl and validation.jsonl. The chosen answer is the
    row's own; the rejected one has one flaw and nearly the same number of words, so that length teaches nothing. Rows
    are taken in turn over topics and difficulties. Each pair is checked by rules of their own before it is written.
    Writes one JSONL file per split, and manifest.json with counts, word gaps and hashes.
    """  # fmt: skip
    from smolmlx import console
    from smolmlx.models import files_root
    from smolmlx.synth.pairs import Order, write_pairs

    unknown = [f"{i}: unknown.{nearest(i, ISSUES)} Known: {', '.join(ISSUES)}" for i in issues if i not in ISSUES]
    if unknown:
        raise RecipeError("--issue", unknown)
    # In the order of ISSUES, so that the order of options changes nothing.
    order = Order(_counts(counts), tuple(i for i in ISSUES if i in (issues or ISSUES)), seed, allow_test)
    # As in recipes: what is not in the working folder may be the project's own, e.g. data/notes.
    shipped = {name: files_root() / name for name in names if not Path(name).exists()}
    found = [str(shipped[name]) if name in shipped and shipped[name].exists() else name for name in names]
    with console.status("making pairs") as say:
        made = write_pairs(found, out_dir, order, lambda count: say(f"making pairs: {count:,}"))
    if as_json:
        console.print_json({"folder": str(out_dir), **made})
    else:
        _show(made, out_dir)


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise RecipeError(f"--counts {text}: expected whole numbers with commas between them, e.g. 258,42.") from error


def _show(made: dict[str, Any], out_dir: Path) -> None:
    from smolmlx import console

    files = made["files"]
    total = [(name, f"{f['pairs']:,}", f"{f['mean_word_gap']:.2%}", f"{f['largest_word_gap']:.2%}", f"{f['mean_signed_word_gap']:+.2%}", f["sha256"][:12]) for name, f in files.items()]  # fmt: skip
    headers = ("split", "pairs", "mean word gap", "largest", "signed", "sha256")
    console.table(total, headers, title=f"{out_dir}: {made['pairs']:,} pairs of {made['rows']:,} rows")
    for what in ("issues", "topic", "difficulty"):
        names = sorted({name for entry in files.values() for name in entry[what]})
        rows = [(name, *(f"{entry[what].get(name, 0):,}" for entry in files.values())) for name in names]
        console.result()
        console.table(rows, (what.removesuffix("s"), *files))
    for reason, count in made["left_out"].items():
        console.note(f"rows left out, {reason}: {count:,}", style="yellow")
    console.result(f"\nNext: smolmlx data inspect {out_dir / next(iter(files))}.jsonl")
