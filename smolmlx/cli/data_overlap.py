"""`smolmlx data dedupe` and `smolmlx data audit`: what rows say twice, within a file and across splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smolmlx.cli import options
from smolmlx.cli.data import _open, _short, columns_option
from smolmlx.errors import DataError, RecipeError

if TYPE_CHECKING:
    from smolmlx.data.audit import PairAudit
    from smolmlx.data.dedupe import Deduped

DEDUPE_EPILOG = """\b
Examples:
  smolmlx data dedupe rows.jsonl unique.jsonl
  smolmlx data dedupe train.jsonl clean.jsonl --on input --against test.jsonl --threshold 0.7
"""
AUDIT_EPILOG = """\b
Examples:
  smolmlx data audit train.jsonl validation.jsonl test.jsonl
  smolmlx data audit data/notes/train.jsonl data/notes/test.jsonl --group concept --max-share 0
"""


@click.command("dedupe", epilog=DEDUPE_EPILOG)
@click.argument("source", metavar="INPUT")
@click.argument("target", metavar="OUTPUT", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--threshold", default=0.8, show_default=True, help="Share of word triples in common, from .5; 1: exact only."
)
@click.option(
    "--on",
    "part",
    default="row",
    show_default=True,
    type=click.Choice(["row", "input", "answer"]),
    help="What is compared.",
)
@click.option("--against", multiple=True, metavar="FILE", help="Drop what repeats these held-out rows, too.")
@columns_option
@options.as_json
def dedupe(
    source: str, target: Path, columns: Mapping[str, str], against: tuple[str, ...], as_json: bool, **given: Any
) -> None:
    """Drop exact and near duplicates.

    Of rows that are alike the first is kept; the rest is written as it stands. Equal means equal but for case and
    white space; near duplicates are found by MinHash. Time and memory are linear in rows.
    """
    from smolmlx import console
    from smolmlx.data.dedupe import dedupe as run

    if target.suffix in (".csv", ".tsv", ".json", ".parquet", ".txt"):
        raise RecipeError(f"{target}: rows are written as JSON lines. Name it {target.with_suffix('.jsonl')}.")
    opened, held_out = _open(source, columns), [_open(name, columns) for name in against]
    if target.resolve() in {path.resolve() for each in (opened, *held_out) for path in each.files}:
        raise RecipeError(f"{target}: is one of the inputs. Choose another name.")
    with console.status("reading rows") as say:
        found = run(opened, target, against=held_out, on_rows=lambda rows: say(f"reading: {rows:,} rows"), **given)
    if as_json:
        console.print_json({"input": source, "output": str(target), **given, **asdict(found)})
    else:
        _show_deduped(found, target)


def _show_deduped(found: Deduped, target: Path) -> None:
    from smolmlx import console

    rows = [("rows read", found.rows), ("- exact duplicate", found.exact), ("- near duplicate", found.near)]
    rows += [("- held-out row", found.held_out_exact), ("- nearly a held-out row", found.held_out_near)]
    lines = [(name, count) for name, count in rows if count or name == "rows read"] + [("rows kept", found.kept)]
    console.table([(name, f"{count:,}") for name, count in lines])
    for twin in found.twins:
        console.result(f"  {_short(twin.where)} is like {_short(twin.of)} ({twin.similarity:.2f})")
    console.result(f"\n{target}: written\nNext: smolmlx data split {target} DIR")


@click.command("audit", epilog=AUDIT_EPILOG)
@click.argument("files", nargs=-1, required=True, metavar="TRAIN HELD_OUT...")
@click.option("--group", metavar="COL", help="A column whose values must not be in two splits, such as a document.")
@click.option(
    "--threshold", default=0.8, show_default=True, help="Share of word triples in common, from .5; 1: exact only."
)
@click.option(
    "--max-share", type=click.FloatRange(0, 1), metavar="SHARE", help="Exit 4 if a larger share of a split leaks."
)
@columns_option
@options.as_json
def audit(
    files: tuple[str, ...], max_share: float | None, columns: Mapping[str, str], as_json: bool, **given: Any
) -> None:
    """Look for held-out rows that training has seen.

    Each file is compared with those before it. Inputs and answers: equal (but for case and white space) or nearly so
    (MinHash). Inputs: word for word in any user turn, whatever the instruction around them. Answers and closing
    questions: word for word in any turn. Groups: how many are in both. An answer may stand in two splits with no harm
    done, such as "Yes"; judge by the places that are named. Time and memory are linear in rows.
    """
    from smolmlx import console
    from smolmlx.data.audit import audit as run

    if len(set(files)) < len(files):
        raise RecipeError(f"data audit {' '.join(files)}: the same file twice. Give each split once, train first.")
    with console.status("reading rows") as say:
        opened = {name: _open(name, columns) for name in files}
        pairs = run(opened, on_rows=lambda rows: say(f"reading: {rows:,} rows"), **given)
    if as_json:
        console.print_json({**given, "pairs": [{**asdict(pair), "share": pair.share} for pair in pairs]})
    else:
        for pair in pairs:
            _show_pair(pair)
    bad = [f"{p.later}: {p.leaked:,} of {p.rows:,} rows ({p.share:.1%}) leak from {p.earlier}" for p in pairs if max_share is not None and p.share > max_share]  # fmt: skip
    if bad:
        raise DataError(f"more than --max-share {max_share:g}. `smolmlx data dedupe --against` removes such rows", bad)


def _show_pair(pair: PairAudit) -> None:
    from smolmlx import console

    console.result(
        f"{pair.later} against {pair.earlier}: {pair.leaked:,} of {pair.rows:,} rows seen ({pair.share:.1%})"
    )
    for finding in pair.findings:
        of = f" of {finding.of:,} groups" if finding.kind == "same group" else ""
        places = "; ".join(f"{_short(t.where)} = {_short(t.of)}" if t.similarity == 1 else f"{_short(t.where)} ~ {_short(t.of)} ({t.similarity:.2f})" for t in finding.first)  # fmt: skip
        console.result(f"  {finding.kind:<26} {finding.count:>7,}{of}  {finding.share:>6.1%}  {places}".rstrip())
    console.result()
