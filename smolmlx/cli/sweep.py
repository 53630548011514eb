"""`smolmlx sweep`: a recipe under many settings and seeds, each its own run, in one folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from smolmlx.cli import options
from smolmlx.errors import RecipeError

if TYPE_CHECKING:
    from smolmlx.backend import Choice
    from smolmlx.plan import Plan
    from smolmlx.stages import OnEvent
    from smolmlx.sweeps.definition import Cell, Sweep

EPILOG = """\b
Examples:
  smolmlx sweep sweeps/notes --dry-run                     what would run, and whether it can
  smolmlx sweep my-sweep.yaml                              run it; again: go on, or do nothing
  smolmlx sweep notes/sft --grid lora.r=8,32 --seeds 4     without a file
"""


@click.command("sweep", epilog=EPILOG)
@click.argument("source", metavar="RECIPE")
@click.option("--grid", multiple=True, metavar="KEY=V1,V2", help="Values of a recipe key; several keys are crossed.")
@click.option("--seeds", metavar="N|A,B", help="How many seeds from 0, or which (a comma makes a list: `7,`). Default: the file's, else 1.")  # fmt: skip
@options.overrides
@options.engine
@click.option("--out", type=click.Path(file_okay=False), help="The sweep's folder. Default: runs/sweep-<name>.")
@click.option("--resume", is_flag=True, help="Only go on with a sweep that is there, never start one.")
@click.option(
    "--dry-run", is_flag=True, help="Plan every setting and say what is done and what is left; train nothing."
)
@options.as_json
def command(
    source: str,
    grid: tuple[str, ...],
    seeds: str | None,
    sets: tuple[str, ...],
    backend: str,
    device: str | None,
    out: str | None,
    resume: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train RECIPE, a sweep file or a plain recipe, under every setting and seed, and write one line a run.

    Finished runs are never run again; an interrupted one goes on from its last checkpoint, and one that failed is tried
    again. A run that fails does not stop the others, but the exit code is 1.
    """
    from smolmlx import console, recipe, shelf, stages
    from smolmlx.sweeps import record, table
    from smolmlx.sweeps.definition import parse_axes

    axes, values = parse_axes(grid), dict(map(recipe.parse_override, sets))
    sweep, folder = shelf.find_sweep(source, out, grid=axes, seeds=_seeds(seeds), sets=values)
    if resume and not (folder / "sweep.json").is_file():
        raise RecipeError(f"{folder}: no sweep to resume. Leave --resume out to start one, or pass its folder with --out.")  # fmt: skip
    if dry_run:
        _plan_all(sweep, folder, options.choose(backend, device), as_json)
        return
    with record.lock(folder):
        left = [cell for cell in sweep.cells if record.state(cell, folder) != "finished"]
        if left:
            runner = _Runner(options.choose(backend, device), sweep, folder, len(left))
            table.write_table(table.read_table(sweep, folder), folder)
            try:
                record.run_cells(sweep, folder, runner.work, runner.ended)
            except stages.Interrupted as stop:
                console.note(f"{stop}\nGo on with the same command.", style="yellow")
                raise click.exceptions.Exit(130) from stop
        found = table.read_table(sweep, folder)
        table.write_table(found, folder)
    if as_json:
        console.print_json({"folder": str(folder), "ran": len(left), **table.to_json(found)})
    else:
        _show(found, folder, len(left))
    if any(line.status == "failed" for line in found.lines):
        raise click.exceptions.Exit(1)


def _seeds(text: str | None) -> Sequence[int] | int | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    parts = parts[:-1] if len(parts) > 1 and not parts[-1] else parts
    if not all(part.isdecimal() for part in parts) or text.strip() == "0":
        raise RecipeError(f"--seeds {text}: expected how many (3), or which (0,7,42).")
    numbers = [int(part) for part in parts]
    return numbers if "," in text else numbers[0]


class _Runner:
    """Runs cells with progress, and keeps the table of the sweep up to date."""

    def __init__(self, choice: Choice, sweep: Sweep, folder: Path, total: int) -> None:
        from smolmlx.evals.bases import Bases

        self.choice, self.sweep, self.folder, self.total = choice, sweep, folder, total
        self.bases = Bases(choice.backend)
        self.done = 0
        self.began = time.monotonic()

    def work(self, cell: Cell, path: Path) -> None:
        from smolmlx import console, stages

        title = f"{self.done + 1}/{self.total} {cell.setting}, seed {cell.seed}"
        console.note(f"run {title}", style="bold")
        display: list[console.TrainingDisplay] = []

        def on_plan(plan: Plan) -> OnEvent:
            shown = console.TrainingDisplay(title, plan.steps)
            display.append(shown.__enter__())
            return lambda event: shown(event.kind, event.step, event.values)

        def meter(what: str, total: int) -> console.Counter:
            stop()  # one live display at a time
            return console.Counter(f"{title}: {what}", total)

        def stop() -> None:
            if display:
                display.pop().__exit__()

        try:
            stages.complete_run(cell.loaded, self.choice, path, on_plan, meter, self.bases)
        finally:
            stop()

    def ended(self, cell: Cell, why: str | None) -> None:
        from smolmlx import console
        from smolmlx.sweeps import table

        self.done += 1
        found = table.read_table(self.sweep, self.folder)
        table.write_table(found, self.folder)
        if why is not None:
            console.note(f"failed: {cell.setting}, seed {cell.seed}: {why}", style="red")
        left = self.total - self.done
        if left:
            seconds = (time.monotonic() - self.began) / self.done * left
            console.note(f"{self.done} of {self.total} runs, eta {console.format_seconds(seconds)}")


def _plan_all(sweep: Sweep, folder: Path, choice: Choice, as_json: bool) -> None:
    """Resolve each setting with its first seed; fail where one cannot run."""
    from smolmlx import console
    from smolmlx.errors import SmolError
    from smolmlx.sweeps import record

    runs, problems, lines = [], [], []
    for setting in sweep.settings:
        cells = [cell for cell in sweep.cells if cell.setting == setting]
        states = {cell.seed: record.state(cell, folder) for cell in cells}
        steps, memory, why = None, None, None
        try:
            plan = options.resolve(cells[0].loaded, choice)
            steps, memory = plan.steps, plan.memory_bytes
        except SmolError as error:
            why = str(error)
            problems.append(f"{setting}: {error}")
        runs += [{"setting": setting, "seed": c.seed, "status": states[c.seed], "run": c.folder, "steps": steps, "memory_bytes": memory, "error": why} for c in cells]  # fmt: skip
        counts = ", ".join(f"{list(states.values()).count(word)} {word}" for word in dict.fromkeys(states.values()))
        lines.append((setting, str(steps or "–"), console.format_bytes(memory) if memory else "–", counts if why is None else "cannot run"))  # fmt: skip
    if as_json:
        console.print_json({"folder": str(folder), "seeds": list(sweep.seeds), "runs": runs})
    else:
        console.table(lines, ("setting", "steps", "memory, estimated", "runs"), title=f"{sweep.name}: {len(sweep.settings)} settings x {len(sweep.seeds)} seeds")  # fmt: skip
        console.result(f"\nFolder: {folder}")
    if problems:
        raise RecipeError("the sweep cannot run whole", problems)


def _show(found: object, folder: Path, ran: int) -> None:
    from smolmlx import console
    from smolmlx.sweeps import table

    assert isinstance(found, table.Table)
    head, rows = table.setting_rows(found)
    console.table(rows, head, title="mean ± standard deviation over seeds")
    for sentence in found.findings:
        console.result(f"  {sentence}")
    failed = [line for line in found.lines if line.status == "failed"]
    for line in failed:
        console.result(f"  failed: {line.setting}, seed {line.seed}: {line.error}")
    if not ran:
        console.result("Nothing to do: every run is finished.")
    console.result(f"\nSweep: {folder}  (sweep.md, sweep.csv, sweep.json, one folder a run)")
    console.result(f"Next: smolmlx report {folder}")
