"""`smolmlx data pairs`: from notes rows to preference pairs with one flaw each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
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
  smolmlx data pairs data/notes pairs --model tiny --adapter runs/notes-sft-.../adapter --samples 8
  smolmlx data pairs data/notes pairs --model tiny --counts 100,20 --judge http://127.0.0.1:8000/v1
"""


@click.command("pairs", epilog=PAIRS_EPILOG)
@click.argument("names", nargs=-1, metavar="NOTES...")  # not required: click would miss NOTES where OUT_DIR is
@click.argument("out_dir", metavar="OUT_DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--counts", metavar="A[,B[,C]]", help="Pairs for train, validation and test.  [default: 258,42; with --model all]")  # fmt: skip
@click.option("--issue", "issues", multiple=True, metavar="I", help=f"One of {', '.join(ISSUES)}; may be repeated.  [default: all]")  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Which rows, flaws and words.")
@click.option("--allow-test", is_flag=True, help="Take held-out rows too; the model can then not be measured on them.")
@click.option(
    "--model", metavar="M", help="Draw both answers from this model (hub id, folder or `tiny`) and rank them."
)
@click.option("--adapter", metavar="A", type=click.Path(), help="Adapter folder for --model.")
@click.option("--samples", type=click.IntRange(min=2), help="Answers drawn for each row.  [default: 8]")
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), help="Of the answers drawn.  [default: 0.8]")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer drawn.  [default: 256]")
@click.option("--about", type=click.Choice(["any", "form"]), help="form: only pairs whose rejected answer breaks the strict rule.  [default: any]")  # fmt: skip
@click.option("--judge", metavar="URL|MODEL", help="Rank the answers that keep the strict rule by this judge's marks.")
@click.option("--judge-model", metavar="NAME", help="Model at the judge's address.  [default: the only one it serves]")
@options.quantize
@options.engine
@options.as_json
def pairs(
    names: tuple[str, ...],
    out_dir: Path,
    counts: str | None,
    issues: tuple[str, ...],
    seed: int,
    allow_test: bool,
    model: str | None,
    adapter: str | None,
    quantize: str,
    backend: str,
    device: str | None,
    as_json: bool,
    **drawn: Any,
) -> None:
    """Make preference pairs from notes, by rule or from a model's own answers.

    NOTES are JSONL files of the notes task, or a folder with train.jsonl and validation.jsonl. Without --model the chosen
    answer is the row's own; the rejected one has one flaw and nearly the same number of words, so that length teaches
    nothing, and each pair is checked by rules of their own. With --model several answers are drawn for each row: the best
    that keeps the strict rule is chosen, one that breaks it (or is clearly further from the row's own answer) is rejected.
    With --judge, what keeps the rule is ranked by a judge, as `smolmlx judge` asks it; the key is in OPENAI_API_KEY.
    Rows are taken in turn over topics and difficulties. Writes one JSONL file per split, and manifest.json with counts,
    word gaps and hashes.
    """  # fmt: skip
    from smolmlx import console
    from smolmlx.synth.pairs import COUNTS, MADE_BY, Order, write_pairs

    if not names:
        raise click.UsageError(f"Missing argument 'OUT_DIR', the folder to write: smolmlx data pairs {out_dir} OUT_DIR")
    given = {name: value for name, value in drawn.items() if value is not None}
    options.say_replaced(out_dir, MADE_BY, "pairs")
    if model is not None:
        if issues or allow_test:
            raise RecipeError("--issue, --allow-test: are for pairs by rule; leave them out with --model.")
        wanted = None if counts is None else _counts(counts)
        made = _draw(names, out_dir, wanted, model, adapter, seed, given, quantize, backend, device)
    else:
        idle = [f"--{name.replace('_', '-')}" for name in given] + (["--adapter"] if adapter else [])
        if idle or quantize != "none" or backend != "auto" or device is not None:
            raise RecipeError(f"{', '.join(idle) or '--backend'}: has no effect without --model.")
        unknown = [f"{i}: unknown.{nearest(i, ISSUES)} Known: {', '.join(ISSUES)}" for i in issues if i not in ISSUES]
        if unknown:
            raise RecipeError("--issue", unknown)
        # In the order of ISSUES, so that the order of options changes nothing.
        chosen = tuple(i for i in ISSUES if i in (issues or ISSUES))
        order = Order(_counts(counts) if counts else COUNTS, chosen, seed, allow_test)
        with console.status("making pairs") as say:
            made = write_pairs(names, out_dir, order, lambda count: say(f"making pairs: {count:,}"))
    if as_json:
        console.print_json({"folder": str(out_dir), **made})
    else:
        _show(made, out_dir)


def _draw(
    names: tuple[str, ...],
    out_dir: Path,
    counts: tuple[int, ...] | None,
    model: str,
    adapter: str | None,
    seed: int,
    given: dict[str, Any],
    quantize: str,
    backend: str,
    device: str | None,
) -> dict[str, Any]:
    """Make pairs of a model's answers."""
    from smolmlx import console
    from smolmlx.backend import Loading
    from smolmlx.cli.judge import is_address, open_judge
    from smolmlx.data.chat import Tokenizer
    from smolmlx.evals.judging import EndpointJudge, address
    from smolmlx.models import find_model
    from smolmlx.synth.on_policy import Draw, Mark, Marked, Sampling, drawing, judging, write_sampled
    from smolmlx.synth.server import has_host

    base = find_model(model)
    if adapter and not Path(adapter).is_dir():
        raise RecipeError(f"--adapter {adapter}: no such folder.")
    judge, judge_model = given.pop("judge", None), given.pop("judge_model", None)
    if judge_model and not (judge and is_address(judge)):
        raise RecipeError("--judge-model: for a judge at an address. Pass --judge URL too, or leave it out.")
    if judge and is_address(judge) and not has_host(judge):
        raise RecipeError(f"--judge {judge}: expected an address such as http://127.0.0.1:8000/v1.")
    named = " ".join(filter(None, (judge_model, address(judge) if judge and is_address(judge) else judge)))
    sampling = Sampling(model, adapter or "", seed=seed, judge=named, **given)

    @cache
    def loaded() -> Draw:
        """Load when the first answers are asked for: counts, rows and folder have been checked then, and now the judge."""
        if judge:
            opened()
        tokenizer = Tokenizer(options.tokenizer_folder(base.folder, [adapter] if adapter else []))
        choice = options.choose(backend, device)
        loading = Loading(device or choice.device, quantize=quantize)
        with console.status("loading the model"):
            generator = choice.backend.generator(base, Path(adapter) if adapter else None, tokenizer, loading)
        return drawing(generator, tokenizer, sampling, console.Counter)

    @cache
    def opened() -> Mark:
        # As `smolmlx judge` has them.
        how: dict[str, Any] = {"key_from": "OPENAI_API_KEY", "concurrency": 4, "retries": 5, "timeout": 60.0}
        how |= {"backend": backend, "device": device}
        made = open_judge(str(judge), judge_model, how, named=("--judge-model", "OPENAI_API_KEY"))
        if isinstance(made, EndpointJudge):
            made.probe()
        return judging(made, out_dir / "ledger.jsonl", console.Counter)

    @_saying_what_was_written(out_dir)
    def draw(*asked: Any) -> list[list[str]]:
        return loaded()(*asked)

    @_saying_what_was_written(out_dir)
    def mark(asked: Any) -> Marked:
        return opened()(asked)

    return write_sampled(names, out_dir, counts, sampling, draw, mark if judge else None)


@contextlib.contextmanager
def _saying_what_was_written(out_dir: Path) -> Iterator[None]:
    """Say on Ctrl-C, before the first pair is written, what that leaves."""
    from smolmlx import console

    try:
        yield
    except KeyboardInterrupt as stop:
        kept = f" What is in {out_dir} stays as it is." if out_dir.exists() else ""
        console.note(f"Interrupted: no pairs were written.{kept}", style="yellow")
        raise click.exceptions.Exit(130) from stop


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
