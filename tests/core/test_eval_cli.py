"""What `smolmlx eval` makes of its words, and which rows it reads: the numpy engine is enough."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from safetensors.numpy import save_file

import lab as labs
import smolmlx
from smolmlx.backend import choose
from smolmlx.cli.eval import _name_adapters, _settings
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import DataError, RecipeError
from smolmlx.evals.bases import System
from smolmlx.evals.run import Evaluation, Settings, evaluate, read_rows
from smolmlx.evals.suites import score_note
from smolmlx.models import BASE_FILE, open_model

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


@pytest.mark.parametrize(
    ("weights", "words"),
    [("adapters.safetensors", "smolmlx adapter convert"), ("adapter_model.safetensors", "made for another base")],
)
def test_adapters_are_checked_before_anything_is_answered(
    weights: str, words: str, tiny_model: Path, tmp_path: Path
) -> None:
    """The base answered every row first."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"base_model.model.q.lora_A.weight": np.ones((8, 2), np.float32)}, tmp_path / weights)
    (tmp_path / BASE_FILE).write_text(json.dumps({"name": "other", "weights": "0"}))
    nobody = cast(Any, None)
    with pytest.raises(RecipeError, match=words):
        evaluate(
            nobody, [System("sft", open_model(tiny_model), tmp_path)], nobody, Settings("rows.jsonl", "notes"), nobody
        )


def test_the_loss_suite_refuses_what_only_answers_have(call: Call) -> None:
    code, _, err = call("eval", "--model", "tiny", "--data", NOTES / "test.jsonl", "--ood", NOTES / "ood.jsonl")
    assert code == 2 and "--ood: is for suite notes and research" in err


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
        ("data", "suite", "train", "ood", "max_tokens", "repetition_penalty", "no_repeat_ngram", "limit", "batch_size", "constrained", "tasks_file")
    )  # fmt: skip
    flags |= {"temperature": 0.0, "seed": 0, "ids": ()}
    assert _settings(str(recipe), flags, None, "none")[0].decoding.batch_size == 4
    assert _settings(str(recipe), {**flags, "batch_size": 2}, None, "none")[0].decoding.batch_size == 2


def test_python_refuses_what_the_command_line_refuses() -> None:
    model = cast(Any, None)  # refused before it is looked at
    with pytest.raises(RecipeError, match=r"no suite 'lsos'\. Did you mean 'loss'"):
        smolmlx.evaluate(model, "rows.jsonl", "lsos")
    with pytest.raises(RecipeError) as caught:
        smolmlx.evaluate(model, "rows.jsonl", ood="ood.jsonl", max_tokens=9, constrained=False)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["ood", "constrained", "max_tokens"]


def test_python_refuses_prompts_that_the_command_line_refuses(tiny_model: Path) -> None:
    with labs.toy_installed():
        model = smolmlx.load(tiny_model, backend="toy", device="cpu")
    with pytest.raises(DataError, match=r"expected a list of prompts, got one text: write \[text\]"):
        model.generate("red")
    with pytest.raises(DataError, match="expected a list of prompts, got None"):
        model.generate(cast(Any, None))
    with pytest.raises(DataError, match="prompt 1: got 1, expected a text or a list of messages"):
        model.generate(cast(Any, ["red", 1]))
    for source in (None, 1, ("tiny",)):
        with pytest.raises(RecipeError, match=r"load: got .*; expected a run"):
            smolmlx.load(cast(Any, source))
    with pytest.raises(RecipeError, match=r"set: got .*expected a dict"):
        smolmlx.train(set=cast(Any, "a.b=c"))
    with pytest.raises(
        DataError, match=r"prompts must have 1 to 511, as the model's context is 512: 1 problem\n  row 2: \d+"
    ):
        model.generate(["red", "word " * 600], max_tokens=1)
    assert len(model.generate(["red"], max_tokens=1)) == 1


def test_rows_by_id_and_limit() -> None:
    path = str(NOTES / "test.jsonl")
    every = [row for row, _ in read_rows(path, Settings("x"))]
    assert [row.id for row in every] == [json.loads(line)["id"] for line in Path(path).read_text().splitlines()]
    second, seventh, ninth = (every[place].id for place in (1, 6, 8))
    some = read_rows(path, Settings("x", ids=(seventh, second)))
    assert [row for row, _ in some] == [every[1], every[6]]
    assert len(read_rows(path, Settings("x", limit=5))) == 5
    both = read_rows(path, Settings("x", ids=(seventh, second, ninth), limit=2))
    assert [row for row, _ in both] == [every[1], every[6]]
    for limit in (None, 1, 3):
        with pytest.raises(DataError, match=f"no row notes-9999.*Ids of this file are like {every[0].id}, {second}"):
            read_rows(path, Settings("x", ids=(second, "notes-9999"), limit=limit))


def write_rows(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_without_an_id_of_their_own_are_counted(tmp_path: Path) -> None:
    ids: list[Any] = ["a", 7, "twice", "twice", None, "", True, "row-0005", "row-0009"]
    rows = [{"instruction": "i", "output": "o"} | ({"id": name} if name is not None else {}) for name in ids]
    found = read_rows(write_rows(tmp_path / "x.jsonl", *rows), Settings("x"))
    assert [row.id for row, _ in found] == ["a", "7", *(f"row-{n:04d}" for n in range(3, 10))]


def test_every_row_without_question_or_answer_is_named(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write_rows(tmp_path / "x.jsonl", *({"messages": made} for made in (turns, turns[:1], turns[1:])))
    with pytest.raises(DataError) as caught:
        read_rows(path, Settings("x"))
    assert [problem.partition(": ")[0] for problem in caught.value.problems] == [f"{path}:2", f"{path}:3"]


def test_an_answer_is_scored_against_the_whole_request_or_the_rows_own_input(tmp_path: Path) -> None:
    asked = "Momentum accumulates gradients across steps.\n\nMake notes of the text above."
    rows = [{"instruction": asked, "output": "o"}, {"instruction": asked, "input": "One.\n\nTwo.", "output": "o"}]
    path = write_rows(tmp_path / "x.jsonl", *rows)
    whole, own = (row for row, _ in read_rows(path, Settings("x")))
    assert (whole.input, own.input) == (asked, "One.\n\nTwo.")
    assert score_note(whole, "Momentum accumulates gradients").unsupported == 0.0
    path = write_rows(tmp_path / "y.jsonl", *({"instruction": asked, "passage": "Mapped.", "output": "o"},))
    ((mapped, messages),) = read_rows(path, Settings("x", columns={"input": "passage"}))
    assert mapped.input == "Mapped." and messages[0]["content"] == f"{asked}\n\nMapped."


def test_the_loss_of_rows_by_id(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"id": f"r{n}", "prompt": "What?", "completion": "word " * n} for n in range(1, 6)]
    path = write_rows(tmp_path / "x.jsonl", *rows)

    def silent(title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        return nullcontext(lambda done: None)

    def tokens(**chosen: Any) -> tuple[int, int]:
        with labs.toy_installed():
            engine = choose("toy", "cpu").backend
            settings = Settings(path, suite="loss", **chosen)
            systems = [System("base", open_model(tiny_model))]
            found = evaluate(engine, systems, Tokenizer(tiny_model), settings, silent).loss["base"]
        return found.num_rows, found.num_tokens

    one, four, five = (tokens(ids=(name,))[1] for name in ("r1", "r4", "r5"))
    assert one < four < five
    assert tokens(ids=("r4", "r1", "r5")) == (3, one + four + five)
    assert tokens(ids=("r5", "r4", "r1"), limit=2) == (2, one + four)


@pytest.mark.parametrize(
    "words", [("eval", "--data", NOTES / "test.jsonl", "--suite", "notes"), ("generate", "--prompt", "x")]
)
def test_a_seed_of_greedy_answers_is_refused(call: Call, words: tuple[Any, ...]) -> None:
    code, _, err = call(*words, "--model", "tiny", "--seed", "0")
    assert code == 2 and "--seed: has no effect at --temperature 0" in err
    if words[0] == "generate":
        code, _, err = call(*words, "--model", "tiny", "--top-k", "4", "--min-p", "0.1")
        assert code == 2 and "--top-k, --min-p: has no effect" in err


def test_notes_without_train_rows_say_that_controls_are_missing() -> None:
    without = Evaluation(Settings("x", suite="notes"), notes=cast(Any, {"test": None}))
    assert "--train" in without.missing_controls
    assert not replace(without, settings=Settings("x", suite="notes", train="y")).missing_controls
    assert not Evaluation(Settings("x", suite="loss")).missing_controls
