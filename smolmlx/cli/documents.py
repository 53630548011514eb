"""`smolmlx data chunk`: from documents to chunks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from smolmlx.cli import options
from smolmlx.errors import RecipeError

if TYPE_CHECKING:
    from smolmlx.data.splits import Method

CHUNK_EPILOG = """\b
Examples:
  smolmlx data chunk papers/ chunks
  smolmlx data chunk paper.pdf chunks --words 300 --overlap 50 --shares 1,0
  smolmlx data chunk notes.md appendix.tex pages.jsonl chunks --shares .9,.1 --seed 7
"""


@click.command("chunk", epilog=CHUNK_EPILOG)
@click.argument("names", nargs=-1, required=True, metavar="DOCUMENT...")
@click.argument("out_dir", metavar="OUT_DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--words", default=500, show_default=True, type=click.IntRange(min=1), help="Words of a chunk.")
@click.option("--overlap", default=100, show_default=True, type=click.IntRange(min=0), help="Words shared with the one before.")  # fmt: skip
@click.option("--shares", default=".8,.1,.1", show_default=True, metavar="A,B[,C]", help="Train, validation and test.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Which documents go where.")
@options.as_json
def chunk(
    names: tuple[str, ...], out_dir: Path, words: int, overlap: int, shares: str, seed: int, as_json: bool
) -> None:
    """Cut documents into overlapping chunks, split by document.

    A DOCUMENT is a txt, md, html, tex or pdf file, a jsonl file with one document per row (field `text`), or a folder
    of those. Each goes to one split whole, so that nothing made from it can leak into another. Writes one JSONL file
    per split, and manifest.json with every document, its split and hash, and what was left out and why.
    """
    from smolmlx import console
    from smolmlx.synth.chunks import Cut, write_chunks

    with console.status("reading documents") as say:
        made = write_chunks(
            names, out_dir, Cut(words, overlap), _method(shares, seed), lambda n: say(f"reading: {n:,} documents")
        )
    if as_json:
        console.print_json({"folder": str(out_dir), **made})
        return
    rows = [(name, f"{f['documents']:,}", f"{f['rows']:,}", f["sha256"][:12]) for name, f in made["files"].items()]
    console.table(rows, ("split", "documents", "chunks", "sha256"), title=str(out_dir))
    for reason, entries in made["left_out"].items():
        first = entries[0]
        detail = f" ({first['detail']})" if first["detail"] else ""
        console.note(f"left out, {reason}: {len(entries):,}, first {first['document']}{detail}", style="yellow")
    console.result(f"Next: smolmlx data inspect {out_dir}/train.jsonl")


def _method(shares: str, seed: int) -> Method:
    from smolmlx.data.splits import Method

    try:
        return Method(shares=tuple(float(part) for part in shares.split(",")), group="document", seed=seed)
    except ValueError as error:
        raise RecipeError(f"--shares {shares}: expected numbers with commas between them, e.g. .8,.1,.1.") from error
