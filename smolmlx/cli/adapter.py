"""`smolmlx adapter`: look into adapters, convert them between PEFT and mlx-lm, merge them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from smolmlx.cli import options
from smolmlx.cli.group import Group
from smolmlx.errors import RecipeError

if TYPE_CHECKING:
    from smolmlx.adapters.analysis import LayerChange
    from smolmlx.models import BaseModel

INSPECT_EPILOG = """\b
Examples:
  smolmlx adapter inspect runs/quickstart-.../adapter
  smolmlx adapter inspect downloaded/adapter --json
"""
CONVERT_EPILOG = """\b
Examples:
  smolmlx adapter convert runs/quickstart-.../adapter for-mlx --to mlx
  smolmlx adapter convert adapters for-peft --to peft --base HuggingFaceTB/SmolLM2-135M
"""
MERGE_EPILOG = """\b
Examples:
  smolmlx adapter merge runs/quickstart-.../adapter merged
  smolmlx adapter merge notes style merged --weight 1 --weight 0.5 --model tiny --dtype float16
"""
ANALYZE_EPILOG = """\b
Examples:
  smolmlx adapter analyze runs/quickstart-.../adapter
  smolmlx adapter analyze adapter --model tiny --csv layers.csv --chart layers.png
"""
_REVISION = click.option("--revision", metavar="R", help="Branch, tag or commit of a hub model.")


@click.group("adapter", cls=Group)
def command() -> None:
    """Inspect, convert, merge and analyze adapters.

    An ADAPTER is a folder of PEFT or of mlx-lm, or a finished run's folder.
    """


@command.command("inspect", epilog=INSPECT_EPILOG)
@click.argument("adapter", type=click.Path())
@options.as_json
def inspect(adapter: str, as_json: bool) -> None:
    """Show kind, rank, scale, targets, base, size, and what looks wrong."""
    from smolmlx import console
    from smolmlx.adapters.adapter import find_folder
    from smolmlx.adapters.inspection import inspect as look

    found = look(find_folder(adapter))
    if as_json:
        console.print_json(asdict(found))
        return
    rows = [
        ("format", {"peft": "PEFT", "mlx": "mlx-lm"}[found.form]),
        ("kind", found.kind),
        ("base", f"{found.base or 'not recorded'}{' @ ' + found.revision if found.revision else ''}"),
        ("rank", _counts(found.ranks)),
        ("scale", _counts(found.scales)),
        ("targets", _counts(found.targets)),
        ("layers", _ranges(found.layers)),
        ("whole weights", ", ".join(found.full)),
        ("dropout", f"{found.dropout:g}" if found.dropout else ""),
        (
            "size",
            f"{found.num_parameters:,} parameters, {'/'.join(found.dtypes)}, {console.format_bytes(found.num_bytes)}",
        ),
    ]
    console.table([(name, value) for name, value in rows if value])
    for problem in found.problems:
        console.note(f"problem: {problem}", style="yellow")


@command.command("convert", epilog=CONVERT_EPILOG)
@click.argument("adapter", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--to", type=click.Choice(["peft", "mlx"]), help="Left out: the format that ADAPTER is not in.")
@click.option(
    "--base", metavar="M", help="Its base, where embeddings or a head are adapted and it is not found by itself."
)
@_REVISION
@options.as_json
def convert(adapter: str, out: str, to: str | None, base: str | None, revision: str | None, as_json: bool) -> None:
    """Write ADAPTER as OUT in the other library's format; what cannot be kept exactly is refused by name."""
    from smolmlx import console
    from smolmlx.adapters.adapter import find_folder
    from smolmlx.adapters.convert import convert as run

    done = run(find_folder(adapter), Path(out), to, _model(base, revision, "--base"))
    for note in done.notes:
        console.note(note)
    if as_json:
        console.print_json(asdict(done))
        return
    how = " (the original file, byte for byte)" if done.restored else ""
    folded = f", {done.num_folded} brought to one rank and scale" if done.num_folded else ""
    console.result(f"{out}: {done.num_modules} modules{folded}, for {'PEFT' if done.form == 'peft' else 'mlx-lm'}{how}")
    if done.form == "peft":
        console.result(f'Next: smolmlx generate --model {done.base or "BASE"} --adapter {out} --prompt "..."')
    else:
        console.result(f'Next: mlx_lm.generate --model {done.base or "BASE"} --adapter-path {out} --prompt "..."')


@command.command("merge", epilog=MERGE_EPILOG)
@click.argument("adapters", nargs=-1, required=True, type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--model", metavar="M", help="The base; left out: the one the first adapter names.")
@_REVISION
@click.option(
    "--weight",
    "weights",
    type=float,
    multiple=True,
    metavar="C",
    help="Coefficient of each adapter, in order; needed for several.",
)
@click.option(
    "--dtype", default="auto", show_default=True, metavar="auto|float32|float16|bfloat16", help="auto is the base's."
)
@click.option("--untie", is_flag=True, help="Let head and embedding become two weights where an adapter needs it.")
@options.as_json
def merge(
    adapters: tuple[str, ...],
    out: str,
    model: str | None,
    revision: str | None,
    weights: tuple[float, ...],
    dtype: str,
    untie: bool,
    as_json: bool,
) -> None:
    """Write the base with ADAPTERS folded in as a plain model folder OUT.

    Several add up, each times its --weight.
    """
    from smolmlx import console
    from smolmlx.adapters.adapter import find_folder, named_base
    from smolmlx.adapters.merge import ERASED
    from smolmlx.adapters.merge import merge as run

    if weights and len(weights) != len(adapters):
        raise RecipeError(f"--weight: {len(weights)} given for {len(adapters)} adapters. Pass one for each, in order.")
    if len(adapters) > 1 and not weights:
        raise RecipeError(
            f"{len(adapters)} adapters would be added up: {', '.join(adapters)}. Pass --weight for each, in order, or one adapter."
        )
    terms = list(zip([find_folder(adapter) for adapter in adapters], weights or (1.0,), strict=True))
    base = _model(model, revision) or named_base(terms[0][0])
    with console.status("merging"):
        done = run(base, terms, Path(out), dtype=dtype, untie=untie)
    if len(terms) > 1:
        console.note(f"added up: {', '.join(f'{weight:g} x {folder}' for folder, weight in terms)}")
    for note in done.notes:
        console.note(note)
    if done.erased:
        worst = max(done.erased, key=lambda name: done.erased[name])
        console.note(
            f"{done.dtype} cannot hold the whole change: {len(done.erased)} weights lose more than {ERASED:.0%} of it"
            f" (most: {worst}, {done.erased[worst]:.0%}). --dtype float32 keeps it.",
            style="yellow",
        )
    if as_json:
        console.print_json(asdict(done))
        return
    console.result(
        f"{out}: {done.num_changed} weights changed, {done.dtype}, {done.lost:.2%} of the change lost to rounding"
    )
    console.result(f'Next: smolmlx generate --model {out} --prompt "..."')


@command.command("analyze", epilog=ANALYZE_EPILOG)
@click.argument("adapter", type=click.Path())
@click.option(
    "--model", metavar="M", help="The base, for relative norms and cosines; left out: the recorded one, if it is here."
)
@_REVISION
@click.option("--csv", "csv_file", type=click.Path(dir_okay=False), metavar="FILE", help="Write the table as CSV.")
@click.option("--chart", type=click.Path(dir_okay=False), metavar="FILE", help="Draw a map of it (png or svg).")
@options.as_json
def analyze(
    adapter: str, model: str | None, revision: str | None, csv_file: str | None, chart: str | None, as_json: bool
) -> None:
    """Measure the change of every weight: Frobenius norm, relative norm, maximum, effective rank, cosine.

    For a finished run's folder the table is kept there too, as weight_changes.json.
    """
    from smolmlx import console
    from smolmlx.adapters import analysis
    from smolmlx.adapters.adapter import find_folder, read
    from smolmlx.rundir import RunDir, write_text, writing

    if chart:
        analysis.check_chart(Path(chart))
    folder = find_folder(adapter)
    with console.status("measuring"):
        found = analysis.analyze(folder, _model(model, revision))
    if RunDir(Path(adapter)).done:
        console.note(f"table kept in {analysis.keep(found, RunDir(Path(adapter)))}")
    if csv_file:
        write_text(Path(csv_file), analysis.to_csv(found))
        console.note(f"table in {csv_file}")
    if chart:
        with writing(Path(chart)):
            analysis.draw(found, Path(chart))
        console.note(f"chart in {chart}")
    if all(change.relative is None for change in found):
        base = read(folder).base_name
        console.note(
            f"||dW||/||W|| and cosine need the base{f', {base}' if base else ''}. It is not here: pass --model M."
        )
    if as_json:
        console.print_json(analysis.to_json(found))
        return
    _print_changes(found)
    console.result(f"\n{len(found)} weights, ||dW|| of all together {analysis.total(found):.4g}")


def _print_changes(found: list[LayerChange]) -> None:
    """Print the table, names shortened so that a row fits 80 columns."""
    from smolmlx import console

    def number(value: float | None, form: str = ".4g") -> str:
        return "-" if value is None else f"{value:{form}}"

    headers = ("weight", "||dW||", "||dW||/||W||", "max |dW|", "effective rank", "cosine")
    console.table(
        [
            (c.weight.removeprefix("model.layers.").removesuffix(".weight"), number(c.frobenius), number(c.relative), number(c.largest), number(c.effective_rank, ".2f"), number(c.cosine, ".6f"))
            for c in found
        ],
        headers,
    )  # fmt: skip


def _model(name: str | None, revision: str | None, flag: str = "--model") -> BaseModel | None:
    from smolmlx.models import find_model

    if not name:
        if revision:
            raise RecipeError(f"--revision {revision}: has no effect without {flag}.")
        return None
    found = find_model(name, revision)
    if revision and found.revision is None:
        raise RecipeError(
            f"--revision {revision}: has no effect: {name} lies on this machine. Leave it out, or name a hub model with {flag}."
        )
    return found


def _counts(counts: dict[int, int] | dict[float, int] | dict[str, int]) -> str:
    return ", ".join(f"{value} ({count})" if len(counts) > 1 else f"{value}" for value, count in counts.items())


def _ranges(layers: tuple[int, ...]) -> str:
    """Write 0, 1, 2, 5 as 0-2, 5."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in parts)
