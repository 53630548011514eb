"""`smolmlx data`: look at rows, check them, clean them, split them, and build the pretraining corpus.

`chunk` and `augment`, which make rows from documents, are in `documents`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from smolmlx.cli import documents, options
from smolmlx.cli.group import Group
from smolmlx.errors import DataError, RecipeError, SmolError

if TYPE_CHECKING:
    from smolmlx.data.chat import Tokenizer
    from smolmlx.data.clean import Survey, Tally
    from smolmlx.data.corpus import CorpusReport
    from smolmlx.data.encode import Encoding
    from smolmlx.data.formats import Source
    from smolmlx.data.splits import Method

Function = TypeVar("Function", bound=Callable[..., Any])

_VOCABULARY = 4096
_SHORT_VIEW = 1500
"""Characters of a row that is shown without being asked for."""

_ELSEWHERE = {
    "dedupe": "smolmlx.cli.data_overlap",
    "audit": "smolmlx.cli.data_overlap",
    "mix": "smolmlx.cli.data_mix",
    "pairs": "smolmlx.cli.pairs",
}
"""Verbs of this group that have a file of their own."""

INSPECT_EPILOG = """\b
Examples:
  smolmlx data inspect rows.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct --max-length 512 --row 7
  smolmlx data inspect chats.json --tokenizer models/mine --chat-template chatml --json
"""
VALIDATE_EPILOG = """\b
Examples:
  smolmlx data validate train.jsonl chats.json
  smolmlx data validate data/notes/*.jsonl --notes
"""
PREPARE_EPILOG = """\b
Examples:
  smolmlx data prepare raw.json clean.jsonl
  smolmlx data prepare raw.csv clean.jsonl --column prompt=Frage --column response=Antwort --min-chars 20
  smolmlx data prepare pairs.jsonl chosen.jsonl --to messages
"""
SPLIT_EPILOG = """\b
Examples:
  smolmlx data split clean.jsonl splits --shares .9,.1
  smolmlx data split notes.jsonl splits --counts 480,60,60 --group concept --seed 7
"""
CORPUS_EPILOG = """\b
Examples:
  smolmlx data corpus out/corpus --package python --package numpy --tokenizer out/tokenizer --vocab-size 4096
"""


class _Verbs(Group):
    """A group that lists its verbs in the order of use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.commands, *(name for name in _ELSEWHERE if name not in self.commands)]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in _ELSEWHERE and name not in self.commands:
            self.add_command(getattr(importlib.import_module(_ELSEWHERE[name]), name))
        return super().get_command(ctx, name)


@click.group("data", cls=_Verbs)
def command() -> None:
    """Look at, check, prepare and split rows, and make them from documents.

    Files may be jsonl, json, csv, parquet or txt (gzip too), in any known layout; `data inspect` names it.
    """


def _mapping(ctx: click.Context, option: click.Parameter, given: Sequence[str]) -> dict[str, str]:
    from smolmlx.data.formats import FORMATS

    fields = {name: None for form in FORMATS for name in (*form.columns, *form.optional)}
    problems = []
    for pair in given:
        field_name, _, name = pair.partition("=")
        if not field_name or not name:
            problems.append(f"{pair}: expected FIELD=NAME, e.g. prompt=question")
        elif field_name not in fields:
            problems.append(f"{pair}: no format has a field '{field_name}'. Known: {', '.join(fields)}")
    if problems:
        raise RecipeError("--column", problems)
    return dict(pair.split("=", 1) for pair in given)


def columns_option(function: Function) -> Function:
    """Add --column."""
    text = "Take a field from a column of another name, e.g. prompt=question."
    how: dict[str, Any] = {"multiple": True, "callback": _mapping, "metavar": "FIELD=NAME", "help": text}
    return click.option("--column", "columns", **how)(function)


def _open(name: str, columns: Mapping[str, str]) -> Source:
    """Find a file and its format; every way in which that fails is a DataError."""
    from smolmlx.data.formats import open_source

    try:
        return open_source(name, columns=columns)
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error


def _open_all(names: Sequence[str], columns: Mapping[str, str]) -> dict[str, Source]:
    """Open files, each with its own format, and report all that cannot be opened at once."""
    opened, problems = {}, []
    for name in names:
        try:
            opened[name] = _open(name, columns)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("files that cannot be read", problems) if problems[1:] else DataError(problems[0])
    return opened


@dataclass(frozen=True, slots=True)
class View:
    """How `inspect` turns rows into tokens, and which row it shows."""

    model: str | None
    tokenizer: str | None
    chat_template: str | None
    max_length: int
    loss_on: str
    history: str
    row: int | None
    columns: Mapping[str, str]

    def encoding(self) -> Encoding:
        from smolmlx.data.encode import Encoding

        return Encoding(self.max_length, self.loss_on, self.history)  # type: ignore[arg-type]  # click checks both

    def open_tokenizer(self) -> Tokenizer | None:
        """Open what was asked for, else the embedded model's; None where there is none."""
        if self.model and self.tokenizer:
            raise RecipeError(f"--model {self.model} and --tokenizer {self.tokenizer}: choose one of them.")
        from smolmlx.data.chat import Tokenizer
        from smolmlx.models import embedded_folder, find_model

        if self.tokenizer:
            folder = Path(self.tokenizer).expanduser()
            if not folder.is_dir():
                raise RecipeError(f"--tokenizer {self.tokenizer}: no such folder.")
        elif self.model:
            folder = find_model(self.model).folder
        else:
            folder = embedded_folder()
            if not (folder / "tokenizer.json").is_file():
                return None
        return Tokenizer(folder, self.chat_template)


@dataclass(slots=True)
class Look:
    """What `inspect` prints of one file."""

    name: str
    source: Source
    survey: Survey
    row: int
    tokens: dict[str, Any] = field(default_factory=dict)
    pieces: list[tuple[str, bool]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        form, tally, example = self.source.form, self.survey.tally, self.survey.example
        shown: dict[str, Any] = {"row": self.row, "where": example.where}
        if self.pieces:
            shown["pieces"] = [{"text": text, "trained": trained} for text, trained in self.pieces]
        else:
            shown["messages"] = [dict(m) for m in (*example.messages, *example.chosen)] or example.text
        return {
            "file": self.name,
            "format": form.name,
            "kind": form.kind,
            "rows": tally.rows,
            "columns": dict(self.survey.columns),
            "exact_duplicates": self.survey.duplicates,
            "prepare_would_drop": dict(tally.reasons),
            "first": tally.first,
            "tokens": self.tokens or None,
            "shown": shown,
        }


@command.command("inspect", epilog=INSPECT_EPILOG)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--model", metavar="M", help="Take the tokenizer of a model: hub id, folder or `tiny` (the default).")
@click.option("--tokenizer", metavar="DIR", help="Tokenizer folder, in place of --model.")
@click.option("--chat-template", metavar="T", help="`chatml` or a Jinja file, in place of the tokenizer's own.")
@click.option("--max-length", default=1024, show_default=True, type=click.IntRange(min=8), help="As data.max_length.")
@click.option(
    "--loss-on", default="assistant", type=click.Choice(["assistant", "completion", "all"]), help="As data.loss_on."
)
@click.option("--history", default="refuse", type=click.Choice(["refuse", "last_turn"]), help="As data.history.")
@click.option("--row", type=click.IntRange(min=1), metavar="N", help="Show row N (from 1) whole; else row 1's start.")
@columns_option
@options.as_json
def inspect(files: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Show format, lengths, duplicates and what is trained.

    Each FILE is looked at on its own: rows, columns, lengths in tokens, the share that is trained, rows that are lost
    and why, what `data prepare` would drop, and one row with its trained tokens in colour. Nothing is changed.
    """
    from smolmlx import console
    from smolmlx.data import inspection
    from smolmlx.data.clean import survey

    view = View(**given)
    tokenizer = view.open_tokenizer()
    looks = []
    with console.status("reading rows") as say:
        for name, source in _open_all(files, view.columns).items():
            row = view.row or 1
            found = Look(name, source, survey(source, row, lambda rows: say(f"reading: {rows:,} rows")), row)
            looks.append(found)
            try:
                if tokenizer is not None:
                    how = view.encoding()
                    found.tokens = inspection.measure(source, tokenizer, how, lambda n: say(f"tokenizing: {n:,} rows"))
                    found.pieces = inspection.example_pieces(found.survey.example, tokenizer, how)
            except DataError as error:
                if view.model or view.tokenizer:
                    raise
                console.note(f"Not tokenized with the embedded model's tokenizer; give --model. {error}")
    if as_json:
        console.print_json({"files": [found.to_json() for found in looks]})
        return
    for found in looks:
        _show(found, whole=view.row is not None)
    if tokenizer is None:
        console.note("No tokenizer: add --model or --tokenizer to see lengths and what is trained.")


def _show(found: Look, whole: bool) -> None:
    from smolmlx import console

    form, tally, example = found.source.form, found.survey.tally, found.survey.example
    rows = [("format", f"{form.name} ({form.kind})"), ("rows", f"{tally.rows:,}"), ("columns", _columns(found.survey))]
    rows += [("exact duplicates", f"{found.survey.duplicates:,}"), *_token_lines(found)]
    drops = [f"{n:,} {reason} (first {_short(tally.first[reason])})" for reason, n in tally.reasons.items()]
    rows += [("prepare would drop" if i == 0 else "", text) for i, text in enumerate(drops)]
    width = max(len(name) for name, _ in rows)
    console.result(found.name)
    for name, text in rows:
        console.result(f"  {name:<{width}}  {text}")
    pieces = found.pieces or [(example.characters(), False)]
    cut = not whole and sum(len(text) for text, _ in pieces) > _SHORT_VIEW
    console.result(f"\nrow {found.row} ({_short(example.where)}){', its start' if cut else ''}:")
    shown = list(_start(pieces)) if cut else pieces
    # A final line break of the template is left to the terminal.
    console.tokens([*shown[:-1], (shown[-1][0].rstrip("\n"), shown[-1][1])])
    console.result()


def _short(where: str) -> str:
    """Name a place by its file, without the folders."""
    return where.rpartition("/")[2]


def _columns(survey: Survey) -> str:
    """List columns, with the number of rows for those that not every row has."""
    rows = survey.tally.rows
    return ", ".join(name if n == rows else f"{name} (in {n:,})" for name, n in survey.columns.items())


def _token_lines(found: Look) -> list[tuple[str, str]]:
    tokens = found.tokens
    if not tokens:
        return []
    lengths = tokens["lengths"]
    what = "tokens of prompt + chosen" if found.source.form.kind == "preference" else "tokens per row"
    lines = [("tokenizer", tokens["tokenizer"])]
    if lengths["max"] is not None:
        lines.append((what, " · ".join(f"{name} {value:,}" for name, value in lengths.items())))
    lines.append(("rows that fit", f"{tokens['trained_rows']:,} (max length {tokens['max_length']:,})"))
    if tokens["supervised_share"] is not None:
        lines.append(("supervised", f"{tokens['supervised_share']:.1%} of {tokens['tokens']:,} tokens"))
    for reason, count in tokens["affected_rows"].items():
        first = f" (first {_short(tokens['first'][reason])})" if reason in tokens["first"] else ""
        lines.append((reason, f"{count:,}{first}"))
    return lines


def _start(pieces: Sequence[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    left = _SHORT_VIEW
    for text, trained in pieces:
        if left > 0:
            yield (text if len(text) <= left else f"{text[:left]} ..."), trained
        left -= len(text)


@command.command("validate", epilog=VALIDATE_EPILOG)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--notes", is_flag=True, help="Check fields and answers of the notes task; on by itself for its rows.")
@columns_option
@options.as_json
def validate(files: tuple[str, ...], notes: bool, columns: dict[str, str], as_json: bool) -> None:
    """Read every row strictly and list all that is wrong.

    Rows must be readable, have turns in order, none empty and one to learn from, and no id twice. Rows of the notes
    task must also have known fields, true hashes, answers that keep to the template, and no concept in two splits,
    over all FILEs together. A folder stands for its train files. The exit code is 4 if anything is wrong.
    """
    from smolmlx import console

    reports: list[dict[str, Any]] = []
    with console.status("reading rows"):
        noted = [name for name in files if notes or _holds_notes(name)]
        found = _check_notes(noted) if noted else {}
        for name in files:
            reports.append(found[name] if name in found else _check_rows(name, columns))
    problems = [problem for report in reports for problem in report["problems"]]
    if as_json:
        console.print_json({"ok": not problems, "files": reports})
    else:
        for report in reports:
            if not report["problems"]:
                console.result(f"{report['file']}: ok, {report['rows']:,} rows, format {report['format']}")
    bad = ", ".join(report["file"] for report in reports if report["problems"])
    if problems and as_json:
        raise DataError(f"{bad}: {len(problems)} problem(s), listed in the JSON on stdout.")
    if problems:
        raise DataError(bad, problems) if len(problems) > 1 else DataError(problems[0])


def _holds_notes(name: str) -> bool:
    """Say whether the first readable row has the fields of the notes task."""
    from smolmlx.data.formats import read_rows

    try:
        _, row = next(read_rows([Path(name)], []), ("", {}))
    except (OSError, SmolError):
        return False
    return set(row) >= {"input_sha256", "topic", "difficulty"}


def _check_notes(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    from smolmlx.data.notes import validate_notes
    from smolmlx.evals.notes import strict_compliance

    found = validate_notes(names, lambda answer: strict_compliance(answer).problems)
    reports: dict[str, dict[str, Any]] = {}
    for name in names:
        path = Path(name)
        rows = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n")) if path.is_file() else 0
        problems = [str(problem) for problem in found if problem.path == path]
        reports[name] = {"file": name, "format": "notes", "rows": rows, "problems": problems}
    return reports


def _check_rows(name: str, columns: Mapping[str, str]) -> dict[str, Any]:
    from smolmlx.data.clean import list_problems

    try:
        rows, problems = list_problems(source := _open(name, columns))
    except DataError as error:
        return {"file": name, "format": None, "rows": 0, "problems": list(error.problems or (str(error),))}
    return {"file": name, "format": source.form.name, "rows": rows, "problems": problems}


@command.command("prepare", epilog=PREPARE_EPILOG)
@click.argument("source", metavar="INPUT")
@click.argument("target", metavar="OUTPUT", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--min-chars", default=1, show_default=True, type=click.IntRange(min=1), help="Shortest row, all turns.")
@click.option("--max-chars", type=click.IntRange(min=1), help="Longest row, all turns.")
@click.option("--max-run", default=40, show_default=True, type=click.IntRange(min=2), help="Longest run of one sign.")
@click.option("--keep-truncated", is_flag=True, help="Keep answers that stop in mid-sentence.")
@click.option("--keep-duplicates", is_flag=True, help="Keep rows that repeat an earlier one (but for case and space).")
@click.option("--to", default="auto", type=click.Choice(["auto", "messages", "text", "preference"]), help="The layout.")
@columns_option
@options.as_json
def prepare(source: str, target: Path, to: Any, columns: dict[str, str], as_json: bool, **filters: Any) -> None:
    """Drop bad rows and write the rest in one layout.

    Rows go that are empty, unreadable, cut off, out of order, repeated, too short or too long. Chats become `messages`, documents `text`, pairs `prompt`/`chosen`/`rejected` (or, with --to messages, the chosen
    answer alone). Other columns are kept. A table says how many rows were dropped for which reason. OUTPUT is written
    whole or not at all.
    """
    from smolmlx import console
    from smolmlx.data import clean

    rules = clean.Filters(**filters)
    if rules.max_chars is not None and rules.max_chars < rules.min_chars:
        raise RecipeError(f"--max-chars {rules.max_chars} is below --min-chars {rules.min_chars}: no row can be kept.")
    if target.suffix != ".jsonl":
        raise RecipeError(f"{target}: rows are written as JSONL; name it {target.with_suffix('.jsonl')}.")
    opened = _open(source, columns)
    if target.resolve() in {path.resolve() for path in opened.files}:
        raise RecipeError(f"{target}: is the input. Choose another name; the raw rows may be needed again.")
    with console.status("reading rows") as say:
        tally = clean.prepare(opened, target, rules, to, lambda rows: say(f"cleaning: {rows:,} rows"))
    layout = clean.choose_layout(opened, to)
    if as_json:
        counts = {"rows": tally.rows, "kept": tally.kept, "dropped": dict(tally.reasons), "first": tally.first}
        console.print_json({"input": source, "output": str(target), "format": opened.form.name, "to": layout, **counts})
        return
    for line in _reason_lines(tally):
        console.result(line)
    console.result(f"\n{target}: written, as {layout}\nNext: smolmlx data split {target} DIR")


def _reason_lines(tally: Tally) -> list[str]:
    """Lay out what was read, dropped and kept; not in a table, which would break long places."""
    rows = [("rows read", tally.rows, "")]
    rows += [(f"- {reason}", n, f"first {_short(tally.first[reason])}") for reason, n in tally.reasons.most_common()]
    rows.append(("rows kept", tally.kept, ""))
    wide, digits = max(len(name) for name, _, _ in rows), len(f"{tally.rows:,}")
    return [f"{name:<{wide}}  {count:>{digits},}  {first}".rstrip() for name, count, first in rows]


@command.command("split", epilog=SPLIT_EPILOG)
@click.argument("source", metavar="INPUT")
@click.argument("out_dir", metavar="OUT_DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--shares", metavar="A,B[,C]", help="Shares of train, validation and test.  [default: .8,.1,.1]")
@click.option("--counts", metavar="A,B[,C]", help="Rows of each, in place of shares; the rest is left out.")
@click.option("--stratify", metavar="COL", help="Give each value of a column the same shares in every split.")
@click.option("--group", metavar="COL", help="Never put rows with one value of a column into two splits.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@columns_option
@options.as_json
def split(source: str, out_dir: Path, columns: dict[str, str], as_json: bool, **given: Any) -> None:
    """Divide rows into train, validation and test.

    Writes one JSONL file each, and manifest.json with their hashes, counts, method and seed. Rows keep their columns and their order. The same rows, options and seed give the same bytes.
    """
    from smolmlx import console
    from smolmlx.data.splits import MADE_BY, check_method, split_source

    method = _method(**given)
    check_method(method)
    options.say_replaced(out_dir, MADE_BY, "rows")
    with console.status("reading rows") as say:
        manifest = split_source(_open(source, columns), out_dir, method, lambda rows: say(f"reading: {rows:,} rows"))
    if as_json:
        console.print_json({"folder": str(out_dir), **manifest})
        return
    rows = []
    for name, entry in manifest["files"].items():
        groups = (f"{entry['groups']:,}",) if method.group else ()
        rows.append(
            (name, f"{entry['rows']:,}", f"{entry['rows'] / manifest['rows']:.1%}", *groups, entry["sha256"][:12])
        )
    headers = ("split", "rows", "share", *(("groups",) if method.group else ()), "sha256")
    how = f"{method.name} by {method.column}" if method.column else method.name
    console.result(f"{out_dir}: {manifest['rows']:,} rows of {source}, {how}, seed {method.seed}\n")
    console.table(rows, headers)
    if manifest["left_out"]:
        console.note(f"{manifest['left_out']:,} rows are in no split: --counts asks for fewer than there are.")
    if repeated := manifest["rows_repeated_across_splits"]:
        hint = "Run `smolmlx data prepare` first, or use --group."
        console.note(f"{repeated:,} rows have the same text as a row of another split. {hint}", style="yellow")


def _method(shares: str | None, counts: str | None, **rest: Any) -> Method:
    from smolmlx.data.splits import Method

    if shares and counts:
        raise RecipeError(f"--shares {shares} and --counts {counts}: choose one of them.")
    if counts:
        return Method(counts=tuple(map(int, _numbers("--counts", counts, "480,60,60", int))), **rest)
    if shares:
        numbers = _numbers("--shares", shares, ".8,.1,.1", float)
        if abs(sum(numbers) - 100) < 1e-6:
            numbers = [number / 100 for number in numbers]
        return Method(shares=tuple(numbers), **rest)
    return Method(**rest)


def _numbers(option: str, text: str, example: str, make: Callable[[str], float]) -> list[float]:
    try:
        return [make(part) for part in text.split(",")]
    except ValueError as error:
        kind = "whole numbers" if make is int else "numbers"
        hint = f"expected {kind} with commas between them, e.g. {option} {example}"
        raise RecipeError(f"{option} {text}: {hint}.") from error


@command.command("corpus", epilog=CORPUS_EPILOG)
@click.argument("out_dir", metavar="OUT_DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--package", "packages", multiple=True, metavar="NAME", help="Installed package; else a list of many.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Order, and what is held out.")
@click.option(
    "--chat-share",
    default=0.35,
    show_default=True,
    type=click.FloatRange(0, 0.9),
    help="Share of the characters in chat tasks, less where passages run out.",
)
@click.option("--tokenizer", metavar="DIR", type=click.Path(file_okay=False), help="Train a tokenizer on it, too.")
@click.option("--vocab-size", type=click.IntRange(min=1), help=f"Tokens of the tokenizer.  [default: {_VOCABULARY}]")
@options.as_json
def corpus(out_dir: Path, packages: tuple[str, ...], seed: int, chat_share: float, as_json: bool, **given: Any) -> None:
    """Build a pretraining corpus from installed documentation.

    Writes train.jsonl, validation.jsonl and card.json. Packages are read, not imported. With --tokenizer, a byte-level
    BPE tokenizer is trained on the train rows.
    """
    from smolmlx import console

    folder, vocab_size = _tokenizer_options(**given)
    report = _build_corpus(out_dir, packages, seed, chat_share)
    made: dict[str, Any] = {}
    if folder is not None:
        _train_tokenizer(out_dir, folder, vocab_size)
        made = {"tokenizer": str(folder), "vocab_size": vocab_size}
    if as_json:
        console.print_json({"folder": str(out_dir), **asdict(report), **made})
        return
    rows = [(kind, f"{count:,}", f"{report.characters[kind]:,}") for kind, count in report.documents.items()]
    console.table(rows, ("kind", "documents", "characters"), title=str(out_dir))
    console.result(", ".join(f"{name}.jsonl: {count:,} rows" for name, count in report.splits.items()))
    if report.missing:
        console.note(f"Not installed, so not in it: {', '.join(report.missing)}")
    if folder is not None:
        console.result(f"{folder}: tokenizer of at most {vocab_size:,} tokens")


def _tokenizer_options(tokenizer: str | None, vocab_size: int | None) -> tuple[Path | None, int]:
    from smolmlx.data.tokenizer_training import SMALLEST_VOCABULARY

    if vocab_size is not None and tokenizer is None:
        raise RecipeError(f"--vocab-size {vocab_size}: has no effect without --tokenizer DIR.")
    if vocab_size is not None and vocab_size < SMALLEST_VOCABULARY:
        least = f"at least {SMALLEST_VOCABULARY}, for all bytes and three special tokens"
        raise RecipeError(f"--vocab-size {vocab_size}: {least}.")
    return Path(tokenizer) if tokenizer else None, vocab_size or _VOCABULARY


def _build_corpus(out_dir: Path, packages: Sequence[str], seed: int, chat_share: float) -> CorpusReport:
    from smolmlx import console
    from smolmlx.data.corpus import write_corpus
    from smolmlx.data.corpus_pages import DEFAULT_PACKAGES, collect
    from smolmlx.rundir import writing

    with console.status("reading documentation") as say:
        collection = collect(packages or DEFAULT_PACKAGES)
        if not collection.pages:
            raise DataError(f"--package {' '.join(packages)}: not installed here, or without documentation.")
        say("making chat views")
        with writing(out_dir):
            return write_corpus(out_dir, seed, chat_share=chat_share, collection=collection)


def _train_tokenizer(corpus_dir: Path, folder: Path, vocab_size: int) -> None:
    from smolmlx import console
    from smolmlx.data.tokenizer_training import train_tokenizer
    from smolmlx.rundir import writing

    rows = corpus_dir / "train.jsonl"
    with console.status("training the tokenizer"), writing(folder), rows.open(encoding="utf-8") as lines:
        train_tokenizer((json.loads(line)["text"] for line in lines), vocab_size, folder)


# The verbs on documents have a file of their own.
command.add_command(documents.chunk)
command.add_command(documents.augment)
