"""`smolmlx report`: one HTML file for a run, a sweep, or several side by side."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import click

from smolmlx.cli import options
from smolmlx.errors import RecipeError

EPILOG = """\b
Examples:
  smolmlx report runs/notes-sft-20261121-081316-b00e
  smolmlx report runs/sweeps-notes
  smolmlx report runs/a runs/b --out comparison.html
  smolmlx report runs --title "What the rank changes"
"""


@click.command("report", epilog=EPILOG)
@click.argument("folders", nargs=-1, required=True, metavar="RUN_OR_SWEEP...")
@click.option("--out", type=click.Path(dir_okay=False), help="Where the file goes. Default: the folder of the run or sweep, or ./report.html for several.")  # fmt: skip
@click.option("--title", help="Heading in place of the runs' names.")
@click.option("--rows", type=click.IntRange(min=0), default=500, show_default=True, help="Rows of each set in the viewer; tables cover all.")  # fmt: skip
@click.option("--open/--no-open", "show", default=False, show_default=True, help="Open it in the browser.")
@options.as_json
def command(folders: tuple[str, ...], out: str | None, title: str | None, rows: int, show: bool, as_json: bool) -> None:
    """Write an HTML report of runs, of a sweep, of `smolmlx eval --out` folders, or of folders that hold such folders.

    The folder of one run or sweep also gets charts/ (SVG and PNG), a run's README.md, a model card. With --out only that file and a
    folder of charts beside it are written. The file is whole: it loads nothing, and runs no script but its own.
    """
    from smolmlx import console
    from smolmlx.reports import card, charts, page
    from smolmlx.reports.folders import open_runs
    from smolmlx.reports.sweeps import open_sweeps

    paths = list({Path(name).resolve(): Path(name) for name in folders}.values())
    views, sweeps = open_runs(paths), open_sweeps(paths)
    charts.load_vega()
    with console.status("drawing"):
        if out is None and len(paths) == len(sweeps) == 1:
            made = card.write_sweep_report(views, sweeps[0], title=title, max_rows=rows)
        elif out is None and len(views) == 1:
            made = card.write_run_report(views[0], title=title, max_rows=rows)
        else:
            target = Path(out or "report.html")
            if target.suffix not in (".html", ".htm"):
                raise RecipeError(f"--out {target}: the report is an HTML file; give it a name that ends in .html.")
            beside = target.with_name(f"{target.stem}-charts")
            page.write_report(views, target, sweeps=sweeps, title=title, max_rows=rows)
            made = [target, *([beside] if card.write_charts(views, beside, sweeps) else [])]
    if as_json:
        console.print_json({"report": str(made[0]), "written": [str(path) for path in made], "runs": [str(v.path) for v in views]})  # fmt: skip
    else:
        console.result(f"Report: {made[0]}")
        for path in made[1:]:
            console.result(f"        {path}")
        if not show:
            console.result("Next: open it in a browser, or add --open")
    if show:
        webbrowser.open(made[0].resolve().as_uri())
