"""What `smolmlx eval` makes of its words, and which rows it reads: no engine needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

import smolmlx
from smolmlx.cli.eval import _name_adapters, _settings
from smolmlx.errors import DataError, RecipeError
from smolmlx.evals.run import Evaluation, Settings, read_rows

NOTES = Path(__file__).resolve().parents[2] / "data" / "notes"
Call = Callable[..., tuple[int, str, str]]


def test_adapters_are_called_what_the_user_says_or_their_run(tmp_path: Path) -> None:
    one, two, odd = tmp_path / "run-1" / "adapter", tmp_path / "run-2" / "adapter", tmp_path / "a=b"
    for folder in (one, two, odd):
        folder.mkdir(parents=True)
    assert _name_adapters((f"sft={one}", f"dpo={two}")) == {"sft": str(one), "dpo": str(two)}
    assert _name_adapters((str(one), f"dpo={two}", str(odd))) == {"run-1": str(one), "dpo": str(two), "a=b": str(odd)}
    assert list(_name_adapters((str(one), str(one)))) == ["run-1-1", "run-1-2"]


def test_every_wrong_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        _name_adapters((f"base={tmp_path}", f"sft={tmp_path}", f"sft={tmp_path}", "gone"))
    assert caught.value.exit_code == 2 and len(caught.value.problems) == 3
    for text in ("base", "the name sft is taken", "--adapter gone: no such folder"):
        assert text in str(caught.value)


def test_the_loss_suite_refuses_what_only_answers_have(call: Call) -> None:
    code, _, err = call("eval", "--model", "tiny", "--data", NOTES / "test.jsonl", "--ood", NOTES / "ood.jsonl", "--id", "row-0001")  # fmt: skip
    assert code == 2 and "--ood: is for suite notes and research" in err and "--id: is for suite notes" in err


def test_a_suite_refuses_what_others_use(call: Call) -> None:
    given = ("--free", "--tasks-file", "t.yaml")
    code, _, err = call("eval", "--model", "tiny", "--data", NOTES / "test.jsonl", "--suite", "notes", *given)
    assert code == 2 and "--free: is for suite research" in err and "--tasks-file: is for suite research" in err


def test_the_recipe_says_how_many_prompts_are_answered_together(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{id: tiny}}\ndata: {{train: {NOTES / 'train.jsonl'}}}\n"
        f"evaluate: {{suite: notes, data: {NOTES / 'test.jsonl'}, batch_size: 4}}\n"
    )
    flags: dict[str, Any] = dict.fromkeys(
        ("data", "suite", "train", "ood", "max_tokens", "repetition_penalty", "no_repeat_ngram", "limit", "batch_size", "constrained", "registry")
    )  # fmt: skip
    flags |= {"temperature": 0.0, "seed": 0, "ids": ()}
    assert _settings(str(recipe), flags, None, "none")[0].decoding.batch_size == 4
    assert _settings(str(recipe), {**flags, "batch_size": 2}, None, "none")[0].decoding.batch_size == 2


def test_python_refuses_what_the_command_line_refuses() -> None:
    model = cast(Any, None)  # refused before it is looked at
    with pytest.raises(RecipeError, match=r"no suite 'lsos'\. Did you mean 'loss'"):
        smolmlx.evaluate(model, "rows.jsonl", "lsos")
    with pytest.raises(RecipeError) as caught:
        smolmlx.evaluate(model, "rows.jsonl", ood="ood.jsonl", max_tokens=9)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["ood", "max_tokens"]


def test_rows_by_id_and_limit() -> None:
    every = read_rows(str(NOTES / "test.jsonl"), Settings("x"))
    some = read_rows(str(NOTES / "test.jsonl"), Settings("x", ids=("row-0007", "row-0002")))
    assert [row for row, _ in some] == [every[1][0], every[6][0]]
    assert len(read_rows(str(NOTES / "test.jsonl"), Settings("x", limit=5))) == 5
    both = read_rows(str(NOTES / "test.jsonl"), Settings("x", ids=("row-0007", "row-0002", "row-0009"), limit=2))
    assert [row for row, _ in both] == [every[1][0], every[6][0]]
    for limit in (None, 1, 3):
        with pytest.raises(DataError, match="no row row-9999"):
            read_rows(str(NOTES / "test.jsonl"), Settings("x", ids=("row-0002", "row-9999"), limit=limit))


def test_notes_without_train_rows_say_that_controls_are_missing() -> None:
    without = Evaluation(Settings("x", suite="notes"), notes=cast(Any, {"test": None}))
    assert "--train" in without.missing_controls
    assert not replace(without, settings=Settings("x", suite="notes", train="y")).missing_controls
    assert not Evaluation(Settings("x", suite="loss")).missing_controls
