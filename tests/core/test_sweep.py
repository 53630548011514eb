"""Sweep files become runs: names, seeds, what is refused; and the table of what was run, on made-up folders."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from run_folders import REPORT
from smolmlx import shelf
from smolmlx.errors import RecipeError, RunError
from smolmlx.rundir import RunDir
from smolmlx.sweeps import record, table
from smolmlx.sweeps.definition import Cell, Sweep, folder_name, open_sweep, parse_axes, parse_axis

BASE = {"model": {"id": "tiny"}, "data": {"train": "rows.jsonl"}, "lora": {"r": 4}}


@pytest.fixture
def sweep(tmp_path: Path) -> Callable[..., Sweep]:
    """Write a sweep file beside its recipe and open it."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))

    def make(tree: dict[str, Any], **options: Any) -> Sweep:
        path = tmp_path / "my.yaml"
        path.write_text(yaml.safe_dump({"recipe": "base.yaml", **tree}))
        return open_sweep(path, "my", shelf.find, **options)

    return make


def test_list_grid_and_seeds_are_crossed(sweep: Callable[..., Sweep]) -> None:
    found = sweep(
        {
            "seeds": [3, 7],
            "set": {"train.epochs": 2},
            "list": [{"name": "small", "lora": {"alpha": 8}}, {"lora.alpha": 16}],
            "grid": {"train.learning_rate": [1e-4, 1e-3]},
        }
    )
    assert found.settings == (
        "small, train.learning_rate=0.0001", "small, train.learning_rate=0.001",
        "lora.alpha=16, train.learning_rate=0.0001", "lora.alpha=16, train.learning_rate=0.001",
    )  # fmt: skip
    assert len(found.cells) == 8 and len({cell.folder for cell in found.cells}) == 8
    last = found.cells[-1].loaded
    recipe = last.recipe
    assert (recipe.lora.r, recipe.lora.alpha, recipe.train.learning_rate, recipe.train.epochs) == (4, 16, 1e-3, 2)
    assert recipe.train.seed == 7 and last.origins["lora.alpha"] == "sweep" and last.origins["train.seed"] == "seeds"


def test_a_plain_recipe_takes_grid_and_seeds_from_the_command_line(sweep: Callable[..., Sweep], tmp_path: Path) -> None:
    found = open_sweep(
        tmp_path / "base.yaml", "base", shelf.find, grid={"lora.r": [2, 8]}, seeds=2, sets={"lora.alpha": 1}
    )
    assert [(c.loaded.recipe.lora.r, c.seed) for c in found.cells] == [(2, 0), (2, 1), (8, 0), (8, 1)]
    assert {cell.loaded.recipe.lora.alpha for cell in found.cells} == {1.0}
    assert open_sweep(tmp_path / "base.yaml", "base", shelf.find).settings == ("baseline",)


def test_set_wins_over_the_file_and_is_refused_for_what_is_swept(sweep: Callable[..., Sweep]) -> None:
    tree = {"set": {"train.epochs": 2}, "grid": {"lora.r": [2, 8]}}
    found = sweep(tree, sets={"train.epochs": 5})
    assert {cell.loaded.recipe.train.epochs for cell in found.cells} == {5}
    for key in ("lora.r", "train.seed"):
        with pytest.raises(RecipeError) as caught:
            sweep(tree, sets={key: 4})
        assert any(problem.startswith(f"--set {key}: the sweep varies it") for problem in caught.value.problems)


def test_axes_hold_lists_and_numbers() -> None:
    assert parse_axis("train.learning_rate=1e-4,5e-4") == ("train.learning_rate", (1e-4, 5e-4))
    assert parse_axis("lora.targets=[q_proj],[q_proj, v_proj]")[1] == (["q_proj"], ["q_proj", "v_proj"])
    for wrong in ("lora.r", "lora.r=", "lora.r=[1"):
        with pytest.raises(RecipeError, match="--grid"):
            parse_axis(wrong)


def test_an_axis_is_given_once() -> None:
    assert list(parse_axes(["lora.r=8,32", "lora.alpha=1"])) == ["lora.r", "lora.alpha"]
    with pytest.raises(RecipeError, match=r"lora.r is given twice.*--grid lora.r=8,32\."):
        parse_axes(["lora.r=8", "lora.r=32"])


def test_a_pipeline_is_no_recipe_to_sweep(sweep: Callable[..., Sweep]) -> None:
    for tree in ({"recipe": "notes/pipeline"}, None):
        with pytest.raises(
            RecipeError, match=r"is a pipeline \(.*Sweep the recipe of a stage \(notes/sft, notes/dpo\)"
        ):
            sweep(tree) if tree else open_sweep(shelf.find("notes/pipeline"), "p", shelf.find)


WRONG = {
    "unknown key": ({"gird": {}}, "gird: unknown key of a sweep. Did you mean 'grid'?"),
    "unknown recipe key": ({"grid": {"lora.rank": [1]}}, "lora.rank: unknown key"),
    "every setting's problem": ({"list": [{"lora.r": 0}, {"train.epochs": -1}]}, "2 problems"),
    "seed in a setting": ({"grid": {"train.seed": [1, 2]}}, "under `seeds`"),
    "twice the same": ({"list": [{"lora.r": 8}, {"lora": {"r": 8}}]}, "same setting"),
    "grid over the list": (
        {"list": [{"name": "r 8", "lora": {"r": 8}}], "grid": {"lora.r": [4, 16]}},
        "'r 8' of the list sets lora.r",
    ),
    "grid over a part": (
        {"list": [{"lora.r": 8}], "grid": {"lora": [{"alpha": 4}]}},
        "'entry 1' of the list sets lora.r",
    ),
    "no seeds": ({"seeds": []}, "seeds"),
    "empty axis": ({"grid": {"lora.r": []}}, "grid.lora.r"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused_before_anything_runs(sweep: Callable[..., Sweep], name: str) -> None:
    tree, said = WRONG[name]
    with pytest.raises(RecipeError) as caught:
        sweep(tree)
    assert said in str(caught.value)


def test_folder_names_hold_on_any_file_system() -> None:
    assert folder_name("lora.r=8, lora.alpha=16") == "lora.r=8-lora.alpha=16"
    odd = ["Lora", "lora", "a/b", "a:b", "x" * 300, "x" * 301, "../..", "é"]
    names = [folder_name(text) for text in odd]
    assert len(set(names)) == len(names) and all(len(n) < 80 and "/" not in n and not n.startswith(".") for n in names)


@pytest.mark.parametrize("name", shelf.sweep_names())
def test_shipped_sweeps_are_claims(name: str) -> None:
    path = shelf.find(name)
    header = shelf.header(path)
    found = open_sweep(path, name, shelf.find)
    assert found.description and f"smolmlx sweep {name}" in header and "Hardware:" in header and "Result:" in header
    assert found.settings[0] == "baseline" and len(found.seeds) == 3


def finish(cell: Cell, folder: Path, loss: float, scores: list[float] | None = None) -> None:
    """Write what training and evaluation leave that a table reads."""
    run = RunDir(folder / cell.folder)
    tree = cell.loaded.recipe.model_dump(mode="json", exclude_defaults=True)
    run.path.mkdir(parents=True, exist_ok=True)
    (run.path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    run.write_json("plan.json", {})
    run.write_json("report.json", {**REPORT, "final_loss": loss + 1, "best_val_loss": loss})
    if scores is not None:
        rows = [{"compliance": score > 0.5, "content_alignment": score} for score in scores]
        interval = {"mean": sum(scores) / len(scores), "low": 0.0, "high": 1.0}
        made = {"n": len(rows), "systems": {"sft": {"content_alignment": interval}}, "differences": [], "rows": {"sft": rows}}  # fmt: skip
        RunDir(run.path / "eval").write_json("results.json", {"suite": "notes", "sets": {"test": made}})


def test_the_loop_skips_goes_on_and_records_failures(sweep: Callable[..., Sweep], tmp_path: Path) -> None:
    made, out = sweep({"seeds": 2, "grid": {"lora.r": [2, 8]}}), tmp_path / "out"
    out.mkdir()
    calls: list[str] = []

    def work(cell: Cell, path: Path) -> None:
        calls.append(cell.folder)
        if (cell.setting, cell.seed) == ("lora.r=2", 1) and calls.count(cell.folder) == 1:
            raise RunError("the loss is not a number")
        finish(cell, out, cell.seed / 10)

    (out / ".lora.r=2-seed0-halfmade").mkdir()
    failed = record.run_cells(made, out, work, lambda cell, why: None)
    assert [cell.folder for cell in failed] == ["lora.r=2-seed1"] and len(calls) == 4
    assert not list(out.glob(".lora*"))
    found = table.read_table(made, out)
    assert [line.status for line in found.lines] == ["finished", "failed", "finished", "finished"]
    assert found.lines[1].error == "the loss is not a number" and "the loss is not a number" in table.to_markdown(found)
    assert record.run_cells(made, out, work, lambda cell, why: None) == []  # the failed one alone is tried again
    assert calls[4:] == ["lora.r=2-seed1"]
    record.run_cells(made, out, work, lambda cell, why: None)
    assert len(calls) == 5


def test_mean_spread_and_the_table_files(sweep: Callable[..., Sweep], tmp_path: Path) -> None:
    made, out = sweep({"seeds": 3, "list": [{"name": "one"}, {"name": "two", "lora.r": 8}]}), tmp_path / "out"
    for cell in made.cells:
        finish(cell, out, [1.0, 2.0, 3.0][cell.seed], [0.25] * 8)
        RunDir(out / cell.folder).write_json("outcome.json", {"status": "finished"})
    found = table.read_table(made, out)
    spread = found.settings["one"]["val_loss"]
    assert (spread.mean, spread.sd, spread.low, spread.high, spread.num_seeds) == (2.0, 1.0, 1.0, 3.0, 3)
    assert "content alignment: no best setting is shown. one and two share the highest mean 0.250." in found.findings
    table.write_table(found, out)
    lines = list(csv.DictReader(io.StringIO((out / "sweep.csv").read_text())))
    assert [line["lora.r"] for line in lines] == ["4"] * 3 + ["8"] * 3 and lines[2]["train_loss"] == "4.0"
    assert json.loads((out / "sweep.json").read_text())["settings"]["two"]["val_loss"]["mean"] == 2.0
    assert "2.0000 ± 1.0000" in (out / "sweep.md").read_text()


@pytest.mark.parametrize(
    ("mine", "said"),
    [
        ([0.9] * 4, "two is higher than one"),
        ([0.3] * 4, "no difference shown"),
        ([1.0, 0.2, 1.0, 1.0], "no difference shown between two and one, since seeds overlap"),
        ([0.9] * 3, "no verdict on two against one: it takes 4 seeds"),
    ],
    ids=["higher", "same", "seeds overlap", "three seeds"],
)
def test_findings_claim_what_rows_and_seeds_agree_on(
    sweep: Callable[..., Sweep], tmp_path: Path, mine: list[float], said: str
) -> None:
    made, out = sweep({"seeds": len(mine), "list": [{"name": "one"}, {"name": "two", "lora.r": 8}]}), tmp_path / "out"
    for cell in made.cells:
        score = 0.3 if cell.setting == "one" else mine[cell.seed]
        finish(cell, out, 1.0 + cell.seed - (9 if cell.setting == "two" else 0), [score] * 8)
        RunDir(out / cell.folder).write_json("outcome.json", {"status": "finished"})
    sentences = table.read_table(made, out).findings
    assert any(said in s for s in sentences if s.startswith("content alignment"))
    (loss,) = (s for s in sentences if s.startswith("validation loss"))
    assert (
        "two is lower than one with every seed"
        if len(mine) > 3
        else "no verdict on two against one: it takes 4 seeds ("
    ) in loss


def test_an_endless_perplexity_is_left_out(sweep: Callable[..., Sweep], tmp_path: Path) -> None:
    made, out = sweep({"list": [{"name": "one", "lora.r": 2}]}), tmp_path / "out"
    finish(made.cells[0], out, 1.0)
    scored = {"suite": "loss", "systems": {"sft": {"loss": 800.0, "perplexity": None, "accuracy": 0.0}}}
    RunDir(out / made.cells[0].folder / "eval").write_json("results.json", scored)
    RunDir(out / made.cells[0].folder).write_json("outcome.json", {"status": "finished"})
    figures = table.read_table(made, out).settings["one"]
    assert figures["eval.loss"].mean == 800 and "eval.perplexity" not in figures


def test_a_changed_sweep_does_not_mix_with_old_runs(sweep: Callable[..., Sweep], tmp_path: Path) -> None:
    made, out = sweep({"list": [{"name": "one", "lora.r": 2}]}), tmp_path / "out"
    finish(made.cells[0], out, 1.0)
    record.refuse_other_recipes(made, out)
    with pytest.raises(RecipeError, match=r"other values of lora\.r"):
        record.refuse_other_recipes(sweep({"list": [{"name": "one", "lora.r": 3}]}), out)


def test_two_processes_do_not_share_a_sweep(tmp_path: Path) -> None:
    with record.lock(tmp_path), pytest.raises(RunError, match="another process"), record.lock(tmp_path):
        pass
