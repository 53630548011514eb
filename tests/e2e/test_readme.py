"""The README's commands: what can run here is run, the rest is parsed.

A line of a `sh` block whose `# needs: ...` asks for a hub, a Mac, a GPU or a package is only parsed. Every other line is run,
in order, in one empty folder that holds `rows.jsonl`, on the embedded model and in the least time that shows that it works;
the interrupted run and the judge's server that some need are made here.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click
import pytest

import smolmlx
from judge_server import GOOD, serve
from smolmlx import pipelines, recipe, shelf
from smolmlx.backend import Decoding
from smolmlx.cli import cli
from smolmlx.models import embedded_folder

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = {
    "train.batch_size": "2",
    "eval.every": "end",
    "samples.max_tokens": "8",
    "evaluate.limit": "2",
    "evaluate.max_tokens": "8",
}


def settings(values: dict[str, str], stage: str = "") -> str:
    return " ".join(f"--set {stage}{key}={value}" for key, value in values.items())


SCORED = {key: value for key, value in SHORT.items() if key.startswith("evaluate.")}
LEAST = {
    "train": f"--max-steps 2 {settings(SHORT)} --set save.every=1",
    "train notes/sft --set": "--max-steps 2 --set train.batch_size=2 --set eval.every=end --set samples.max_tokens=8 --set evaluate.limit=2",
    "train notes/dpo": f"--max-steps 2 {settings({**SHORT, 'data.limit': '4'})}",
    "train notes/pipeline": (
        f"--max-steps 2 --set sft.train.batch_size=2 --set dpo.train.batch_size=2 {settings(SCORED, 'dpo.')}"
    ),
    "train --resume": "",
    "sweep": f"--out runs/sweeps-notes --seeds 1 --set train.max_steps=2 {settings({**SHORT, 'save.every': '2'})}",
    "bench": "--steps 1 --repeats 1",
    "judge": "--limit 2",
    "eval": "--limit 2 --max-tokens 8",
    "generate": "--max-tokens 8",
}
"""What is added to a command, so that it takes seconds; of several beginnings of it, the longest counts."""
ELSEWHERE = ("the hub", "a Mac", "GPU", "PyPI", "pip install")
"""What no test can provide."""
JUDGE = "http://127.0.0.1:8000/v1"


@dataclass(frozen=True)
class Line:
    """A command of the README."""

    words: tuple[str, ...]
    needs: str
    """What a user must have for it; empty for nothing."""

    @property
    def can_run(self) -> bool:
        return not any(place in self.needs for place in ELSEWHERE)

    def __str__(self) -> str:
        return " ".join(self.words)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def read_line(text: str) -> Line:
    needs = re.search(r"#\s*needs:\s*(.+)$", text)
    return Line(tuple(shlex.split(text, comments=True)), needs[1].strip() if needs else "")


LINES = [
    read_line(text)
    for block in blocks("sh")
    for text in block.splitlines()
    if text.strip() and not text.startswith("#")
]
OURS = [line for line in LINES if line.words[0] == "smolmlx"]


def test_the_readme_has_commands_of_both_kinds() -> None:
    assert {line.can_run for line in OURS} == {True, False}
    assert {line.words[0] for line in LINES} <= {"smolmlx", "make", "pip"}


@pytest.mark.parametrize("line", OURS, ids=str)
def test_command_parses(line: Line) -> None:
    """Options and commands exist, and values are of the right kind; recipes that are named are shipped."""
    context, words = click.Context(cli, info_name="smolmlx"), list(line.words[1:])
    command: click.Command = cli
    while isinstance(command, click.Group):
        _, found, words = command.resolve_command(context, words)
        assert found is not None
        command = found
        context = click.Context(command, parent=context, info_name=command.name)
    command.parse_args(context, words)
    named = context.params.get("recipe")
    if named and not named.endswith(".yaml"):
        overrides, path = context.params.get("sets", ()), shelf.find(named)
        if pipelines.is_pipeline(recipe.read(path)):
            pipelines.open_pipeline(path, named, shelf.find, dict(map(recipe.parse_override, overrides)))
        else:
            recipe.load(path, overrides)


@pytest.mark.parametrize("line", [line for line in LINES if line.words[0] != "smolmlx"], ids=str)
def test_make_targets_and_extras_exist(line: Line) -> None:
    if line.words[0] == "make":
        assert re.search(rf"^{line.words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    else:
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        for extra in re.findall(r"\[(.*?)\]", str(line)):
            assert all(re.search(rf"^{name} = \[", project, re.MULTILINE) for name in extra.split(","))


def test_python_names_exist() -> None:
    """Functions of the README's Python are public and take these arguments."""
    (block,) = blocks("python")
    calls = [
        node
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    public = [call for call in calls if isinstance(call.func.value, ast.Name) and call.func.value.id == "smolmlx"]
    methods = [call for call in calls if isinstance(call.func.value, ast.Name) and call.func.value.id == "model"]
    assert public and methods
    decoding = {field.name for field in fields(Decoding)}
    for owner, found, skip in ((smolmlx, public, 0), (smolmlx.Model, methods, 1)):
        for call in found:
            function = getattr(owner, call.func.attr)
            keywords = {word.arg: None for word in call.keywords if word.arg}
            signature = inspect.signature(function)
            bound = signature.bind(*[None] * (len(call.args) + skip), **keywords)
            assert set(bound.arguments.get("decoding", {})) <= decoding, f"{call.func.attr}: not a field of Decoding"


NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def cells(kind: str) -> list[str]:
    tree = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in tree["cells"] if cell["cell_type"] == kind]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make the API's verbs do the least that shows that they work, in an empty folder."""
    if not (embedded_folder() / "model.safetensors").is_file():
        pytest.skip(f"the embedded model's weights are missing: {embedded_folder()}/model.safetensors")
    train, sweep, evaluate = smolmlx.train, smolmlx.sweep, smolmlx.evaluate
    least = {"train.max_steps": 2, "train.batch_size": 2, "eval.every": "end", "samples.max_tokens": 8}
    scored = {"evaluate.limit": 2, "evaluate.max_tokens": 8}

    def train_least(recipe: Any, set: Any = None, **options: Any) -> Any:
        return train(recipe, set={**(set or {}), **least, **(scored if isinstance(recipe, str) else {})}, **options)

    def sweep_least(recipe: Any, **options: Any) -> Any:
        return sweep(recipe, **{**options, "seeds": 1}, set={**least, **scored})

    def evaluate_least(*arguments: Any, **options: Any) -> Any:
        answers = {"max_tokens": 8} if options.get("suite", "loss") != "loss" else {}
        return evaluate(*arguments, **options, limit=2, **answers)

    monkeypatch.setattr(smolmlx, "train", train_least)
    monkeypatch.setattr(smolmlx, "sweep", sweep_least)
    monkeypatch.setattr(smolmlx, "evaluate", evaluate_least)
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_python_runs(short: None) -> None:
    (block,) = blocks("python")
    found: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), found)
    assert len(found["answers"]) == 1
    assert found["scores"].notes["test"].num_rows == 2 and found["run"].report.steps == 2
    assert len(found["made"].table.settings) == 2


@pytest.mark.slow
def test_notebook_runs(short: None, capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, Any] = {}
    for number, cell in enumerate(cells("code"), 1):
        exec(compile(cell, f"{NOTEBOOK.name}, code cell {number}", "exec"), found)
    assert found["scores"].loss and found["run"].evaluation.notes
    assert "validation loss" in capsys.readouterr().out


def test_notebook_is_whole_and_clean() -> None:
    tree = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (tree["nbformat"], tree["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in tree["cells"]}) == len(tree["cells"])
    for cell in tree["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
    named = [name for text in cells("markdown") for name in re.findall(r"`(docs/[\w.]+)`", text)]
    assert named and all((ROOT / name).is_file() for name in named)
    assert NOTEBOOK.name in README


def test_links_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    missing = [target for target in targets if not (ROOT / target).is_file()]
    if missing == ["docs/parity.md"]:
        pytest.skip("docs/parity.md is not there yet: make parity writes it")
    assert not missing


def expand(words: Sequence[str], folder: Path) -> list[str]:
    """Do what a shell does with `*`."""
    return [
        text
        for word in words
        for text in (sorted(str(p.relative_to(folder)) for p in folder.glob(word)) if "*" in word else [word])
    ]


def least(line: Line) -> list[str]:
    typed = " ".join(line.words[1:])
    return LEAST.get(max((start for start in LEAST if typed.startswith(start)), key=len, default=""), "").split()


def run_line(line: Line, folder: Path, instead: Mapping[str, str] | None = None) -> None:
    ours = {"data/notes/train.jsonl=1": f"{ROOT}/data/notes/train.jsonl=1"}  # read from a checkout's own folder
    typed = [{**ours, **(instead or {})}.get(word, word) for word in line.words[1:]]
    words = expand(typed, folder) + least(line)
    program = [sys.executable, "-c", "from smolmlx.cli import main; main()"]
    done = subprocess.run([*program, *words], cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{line}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def interrupt(run: Path, made: Path) -> None:
    """Leave what an interruption after the first step of a finished run would have left, at `made`."""
    shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(run, made)
    for name in ("adapter", "eval", "checkpoints/000002"):
        shutil.rmtree(made / name)
    (made / "report.json").unlink()


def write_short(folder: Path) -> dict[str, str]:
    """Write the shipped pipeline with a few pairs by rule, and two settings of the sweep; return name -> file.

    No option shortens these: the pipeline's stage of pairs answers for minutes, the sweep has seven settings.
    """
    pipeline, sweep = (recipe.read(shelf.find(name)) for name in ("notes/pipeline", "sweeps/notes"))
    pairs = {"rows": pipeline["stages"]["pairs"]["pairs"]["rows"], "counts": [4, 2]}
    short = {
        "notes/pipeline": {**pipeline, "stages": {**pipeline["stages"], "pairs": {"pairs": pairs}}},
        "sweeps/notes": {**sweep, "list": sweep["list"][:2]},
    }
    made = {name: f"{name.replace('/', '-')}.yaml" for name in short}
    for name, tree in short.items():
        (folder / made[name]).write_text(json.dumps(tree), encoding="utf-8")
    return made


def write_rows(path: Path) -> None:
    """Rows as a user may bring them, taken from the notes."""
    with (ROOT / "data" / "notes" / "train.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(40), lines, strict=False)]
    made = [{"prompt": f"{row['instruction']}\n\n{row['input']}", "response": row["output"]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")


@pytest.mark.slow
def test_commands_run(tmp_path: Path) -> None:
    if not (embedded_folder() / "model.safetensors").is_file():
        pytest.skip(f"the embedded model's weights are missing: {embedded_folder()}/model.safetensors")
    write_rows(tmp_path / "rows.jsonl")
    short = write_short(tmp_path)
    with serve(lambda prompt, times: json.dumps(GOOD)) as (url, _):
        for line in filter(lambda line: line.can_run, OURS):
            if "--resume" in line.words:
                named = tmp_path / line.words[line.words.index("--resume") + 1]
                finished = next(path for path in (tmp_path / "runs").glob("notes-sft-*") if path != named)
                interrupt(finished, named)
            run_line(line, tmp_path, {JUDGE: url, **short})
            if "--resume" in line.words:
                assert (named / "report.json").is_file() and (named / "checkpoints" / "000002").is_dir()
    assert (tmp_path / "answers.jsonl").read_text(encoding="utf-8").count("\n") == 4
    assert list((tmp_path / "runs").glob("notes-sft-*/report.json"))
    assert (tmp_path / "runs" / "sweeps-notes" / "report.html").is_file()


def test_data_and_recipe_commands_run_without_the_model(tmp_path: Path) -> None:
    """The part of the README that needs no weights, so that it is checked everywhere."""
    write_rows(tmp_path / "rows.jsonl")
    for line in OURS:
        if line.words[1] in ("data", "recipes") and line.can_run:
            run_line(line, tmp_path)
    assert (tmp_path / "splits" / "test.jsonl").is_file() and (tmp_path / "my.yaml").is_file()
