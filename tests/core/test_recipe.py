"""A recipe is checked strictly, all problems at once, and remembers where each value came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smolmlx import recipe
from smolmlx.errors import RecipeError

GOOD: dict[str, Any] = {"model": {"id": "m"}, "data": {"train": "rows.jsonl"}}


def build(tree: dict[str, Any], **options: Any) -> recipe.Loaded:
    return recipe.build(tree, source="r.yaml", folder=Path(), **options)


def problems(tree: dict[str, Any], **options: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        build(tree, **options)
    assert caught.value.exit_code == 2
    return list(caught.value.problems)


def test_defaults_are_filled_in() -> None:
    made = build(GOOD).recipe
    assert (made.stage, made.train.method, made.lora.targets, made.data.loss_on) == (
        "sft",
        "lora",
        "all-linear",
        "assistant",
    )


def test_unknown_keys_name_the_nearest() -> None:
    found = problems({**GOOD, "train": {"learning_rte": 1e-4}, "lorra": {}})
    assert found == [
        "train.learning_rte: unknown key. Did you mean 'learning_rate'?",
        "lorra: unknown key. Did you mean 'lora'?",
    ]


def test_unknown_key_unlike_any_lists_the_known() -> None:
    (found,) = problems({**GOOD, "samples": {"zzz": 1}})
    assert found == "samples.zzz: unknown key. Known: max_tokens, prompts."


def test_all_problems_at_once() -> None:
    found = problems(
        {"model": {"id": "m"}, "data": {"max_length": "long"}, "train": {"batch_size": 0, "schedule": "cosinus"}}
    )
    assert [line.partition(":")[0] for line in found] == [
        "data.train",
        "data.max_length",
        "train.batch_size",
        "train.schedule",
    ]
    assert "'cosine'" in found[3] and "got 'cosinus'" in found[3]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("lora.r", True, "a whole number (got True)"),
        ("train.batch_size", "4", "Write the number without quotes."),
        ("train.accumulation", 2.0, "a whole number (got 2.0)"),
        ("train.learning_rate", "1e-4", "Write the number without quotes."),
        ("train.epochs", True, "a number (got True)"),
        ("train.gradient_checkpointing", "yes", "expected true or false (got 'yes')"),
        ("train.compile", 1, "expected true or false (got 1)"),
        ("train.betas", ["0.9", 0.999], "without quotes"),
        ("data.train", 5, "got 5"),
    ],
)
def test_values_are_not_converted(key: str, value: object, said: str) -> None:
    (found,) = problems(GOOD, flags={key: ("set", value)})
    assert found.startswith(key) and said in found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train=", "train: expected a section of keys and values (got nothing)."),
        ("data.train=", "data.train: expected text or a list (got nothing)."),
        ("data.train=true", "data.train: expected text or a list (got True)."),
        ("data.train=[3]", "data.train.0: expected text (got 3)."),
        ("eval.every=never", "eval.every: expected a whole number or 'epoch' or 'end' (got 'never')."),
        ("dpo.shared_prompt=3", "dpo.shared_prompt: expected 'auto' or true or false (got 3)."),
        ("train.betas=[0.9]", "train.betas: expected at least 2 in the list (got [0.9])."),
        ("train.betas=[0.9, 0.9, 0.9]", "train.betas: expected at most 2 in the list (got [0.9, 0.9, 0.9])."),
        ("train.batch_size=0", "train.batch_size: expected at least 1 (got 0)."),
        ("loggers=wandb", "loggers: expected a list (got 'wandb')."),
    ],
)
def test_a_wrong_value_is_one_problem_in_plain_words(text: str, said: str) -> None:
    assert problems(GOOD, overrides=[text]) == [f"--set {said}"]


def test_whole_numbers_and_lists_are_taken_where_yaml_means_them() -> None:
    made = build(
        GOOD, overrides=["train.epochs=3", "train.learning_rate=1e-4", "train.betas=[0, 0.95]", "lora.alpha=8"]
    )
    assert (made.recipe.train.epochs, made.recipe.train.betas, made.recipe.lora.alpha) == (3.0, (0.0, 0.95), 8.0)


@pytest.mark.parametrize(
    "text",
    [
        "train.epochs=.inf",
        "train.epochs=.nan",
        "train.learning_rate=.inf",
        "train.max_grad_norm=.inf",
        "train.betas=[1.5, 0.9]",
        "train.betas=[0.9, 1]",
        "train.betas=[-0.1, 0.9]",
        "train.seed=9999999999",
        "lora.alpha=.inf",
    ],
)
def test_numbers_that_no_engine_can_train_with(text: str) -> None:
    (found,) = problems(GOOD, overrides=[text])
    assert found.startswith(f"--set {text.partition('=')[0]}")


@pytest.mark.parametrize(
    "text", ["data.train=[]", "data.train=''", "data.validation=[]", "model.id=''", "lora.targets=[]"]
)
def test_names_of_nothing(text: str) -> None:
    key = text.partition("=")[0]
    assert any(line.startswith(f"--set {key}") and "at least 1" in line for line in problems(GOOD, overrides=[text]))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model": {}}, "either `id`"),
        ({"model": {"id": "m", "config": {}}}, "either `id`"),
        ({"model": {"config": {}, "tokenizer": "t"}, "train": {"method": "full"}}, "stage: pretrain"),
        ({"model": {"config": {}, "tokenizer": "t"}, "stage": "pretrain"}, "method: full"),
        ({"model": {"config": {}}, "stage": "pretrain", "train": {"method": "full"}}, "needs a tokenizer"),
        ({"model": {"id": "m", "quantize": "4bit"}, "train": {"method": "full"}}, "frozen"),
        ({"stage": "pretrain", "data": {"train": "x", "loss_on": "completion"}}, "no meaning"),
        (
            {"data": {"train": "x", "validation": "y", "validation_share": 0.1}},
            "not both. Leave one out, e.g. --set data.validation=null",
        ),
        ({"eval": {"patience": 2}}, "eval.patience: needs data.validation or data.validation_share."),
        ({"eval": {"patience": 2}}, "(--set eval.patience=null)"),
        ({"eval": {"keep_best": False}}, "eval.keep_best: needs data.validation"),
        ({"lora": {"dora": True, "dropout": 0.1}}, "dropout"),
        ({"lora": {"r": 8, "alpha": 4}, "train": {"method": "full"}}, "lora.r, lora.alpha: no adapter"),
        ({"save": {"dtype": "float16"}}, "save.dtype: is for method: full"),
        ({"eval": {"every": 10}}, "eval.every: needs data.validation"),
        ({"eval": {"every": "end"}}, "Leave it out, or set it to its default (--set eval.every=epoch)"),
        ({"train": {"schedule": "constant", "min_lr_ratio": 0.1}}, "train.min_lr_ratio"),
        ({"stage": "pretrain", "data": {"train": "x", "packing": "on"}}, "data.packing: has no effect"),
        ({"stage": "pretrain", "data": {"train": "x", "overlong": "split"}}, "data.overlong: has no effect"),
        ({"stage": "pretrain", "data": {"train": "x", "system": "S"}}, "data.system: has no effect"),
        ({"stage": "pretrain", "data": {"train": "x", "template_args": {"a": 1}}}, "data.template_args: has no effect"),
        ({"evaluate": {"suite": "loss", "data": "x", "ood": "y"}}, "evaluate.ood: is for suite notes"),
        ({"evaluate": {"suite": "loss", "data": "x", "train": "y"}}, "evaluate.train: is for suite notes"),
        ({"evaluate": {"suite": "loss", "data": "x", "max_tokens": 5}}, "evaluate.max_tokens: is for suite notes"),
        (
            {"evaluate": {"suite": "loss", "data": "x", "repetition_penalty": 1.2}},
            "evaluate.repetition_penalty: is for suite notes",
        ),
        (
            {"evaluate": {"suite": "loss", "data": "x", "no_repeat_ngram": 3}},
            "evaluate.no_repeat_ngram: is for suite notes",
        ),
        (
            {"evaluate": {"suite": "loss", "data": "x", "constrained": False}},
            "evaluate.constrained: is for suite research",
        ),
        (
            {"evaluate": {"suite": "notes", "data": "x", "constrained": False}},
            "evaluate.constrained: is for suite research",
        ),
        ({"model": {"id": "x", "first_weights": "induction"}}, "first_weights"),
        ({"stage": "pretrain", "model": {"config": {}, "tokenizer": "t", "revision": "v1"}}, "model.revision"),
        ({"train": {"optimizer": "muon"}}, "method: full"),
        ({"train": {"muon_learning_rate": 0.1}}, "has no effect"),
        ({"train": {"mixed_precision": True}}, "method: full"),
        (
            {"train": {"mixed_precision": True, "method": "full"}, "model": {"id": "x", "dtype": "bfloat16"}},
            "keeps float32",
        ),
    ],
)
def test_impossible_combinations_are_refused(changes: dict[str, Any], word: str) -> None:
    assert any(word in line for line in problems({**GOOD, **changes}))


def test_defaults_that_are_written_out_are_taken() -> None:
    """What a recipe says of a part that is not used must not differ from saying nothing."""
    tree = {
        **GOOD,
        "train": {"method": "full"},
        "lora": {"r": 16},
        "eval": {"every": "epoch"},
        "save": {"dtype": "float32"},
    }
    assert build(tree).recipe.lora.r == 16
    text = {"train": "x", "packing": "off", "overlong": "drop", "system": None}
    assert build({**GOOD, "stage": "pretrain", "data": text}).recipe.stage == "pretrain"
    answered = {"samples": {"prompts": ["hi"]}, "data": {"train": "x", "system": "S"}}
    assert build({**GOOD, "stage": "pretrain", **answered}).recipe.data.system == "S", "the samples take it"


def test_a_section_can_be_taken_back() -> None:
    made = build({**GOOD, "lora": {"r": 8}}, overrides=["train.method=full", "lora={}"])
    assert made.recipe.lora.r == 16 and "lora.r" not in made.origins
    made = build({**GOOD, "lora": {"r": 8, "alpha": 8}}, overrides=["lora={r: 4}"])
    assert made.origins["lora.r"] == "--set" and "lora.alpha" not in made.origins


def test_two_impossible_combinations_are_two_problems() -> None:
    assert len(problems({**GOOD, "eval": {"patience": 1}, "lora": {"dora": True, "dropout": 0.1}})) == 2


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "+1e-4", "0.0001"])
def test_scientific_numbers_are_numbers(text: str) -> None:
    assert recipe.parse_yaml(f"x: {text}") == {"x": 1e-4}


@pytest.mark.parametrize("text", ["e4", "1e", "v1e4", "1e-4x"])
def test_words_stay_words(text: str) -> None:
    assert recipe.parse_yaml(f"x: {text}") == {"x": text}


@pytest.mark.parametrize("word", ["on", "off", "yes", "no"])
def test_on_and_off_are_words(word: str) -> None:
    assert recipe.parse_yaml(f"x: {word}") == {"x": word}
    assert recipe.parse_yaml("x: true") == {"x": True}


@pytest.mark.parametrize("key", ["eval.every", "save.every"])
def test_every_zero_steps_is_refused(key: str) -> None:
    assert any(key in line for line in problems(GOOD, overrides=[f"{key}=0"]))


def test_precedence_and_origins() -> None:
    made = build(
        {**GOOD, "train": {"epochs": 2, "batch_size": 4, "seed": 1}},
        overrides=["train.epochs=3", "train.batch_size=6", "lora.targets=[q_proj, v_proj]"],
        flags={"train.batch_size": ("--batch-size", 8)},
    )
    assert (made.recipe.train.seed, made.recipe.train.epochs, made.recipe.train.batch_size) == (1, 3, 8)
    assert made.recipe.lora.targets == ["q_proj", "v_proj"]
    assert made.origins["train.seed"] == "recipe"
    assert made.origins["train.epochs"] == "--set"
    assert made.origins["train.batch_size"] == "--batch-size"
    assert "train.learning_rate" not in made.origins


def test_overrides_leave_the_tree_alone() -> None:
    tree = {**GOOD, "train": {"epochs": 2}}
    build(tree, overrides=["train.epochs=3"])
    assert tree["train"] == {"epochs": 2}


@pytest.mark.parametrize("text", ["train.epochs", "=3", "train.epochs=[1"])
def test_broken_override_is_one_clear_line(text: str) -> None:
    with pytest.raises(RecipeError, match="--set"):
        build(GOOD, overrides=[text])


def test_override_below_a_value_is_refused() -> None:
    with pytest.raises(RecipeError, match="'stage' is a value, not a section"):
        build({**GOOD, "stage": "sft"}, overrides=["stage.x=1"])


def test_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        build(GOOD).recipe.train.epochs = 3  # type: ignore[misc]


def test_files_that_are_not_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe file"):
        recipe.load(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(RecipeError, match="expected a mapping"):
        recipe.load(tmp_path / "list.yaml")
    (tmp_path / "twice.yaml").write_text("train: {epochs: 1}\ndata: {train: x}\ntrain: {batch_size: 2}\n")
    with pytest.raises(RecipeError, match=r"'train' is given twice[^$]*line 3"):
        recipe.load(tmp_path / "twice.yaml")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    (tmp_path / "latin.yaml").write_bytes(b"description: \xfc\n")
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 5000)
    (tmp_path / "date.yaml").write_text("a: 2024-99-99\n")
    for name in ("broken", "latin", "deep", "date"):
        with pytest.raises(RecipeError, match="not valid YAML"):
            recipe.load(tmp_path / f"{name}.yaml")


def test_a_value_that_is_no_yaml_is_shown_in_quotes() -> None:
    with pytest.raises(RecipeError, match="expected '<document start>'") as caught:
        recipe.parse_override("data.train={rows}/train.jsonl")
    assert str(caught.value).endswith("""As text: --set 'data.train="{rows}/train.jsonl"'""")


def test_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "\ufeffmodel: {id: m}\ndata: {train: x}\ntrain: {learning_rate: 1e-4}\n", encoding="utf-8"
    )
    loaded = recipe.load(tmp_path / "r.yaml")
    assert loaded.recipe.train.learning_rate == 1e-4
    assert loaded.folder == tmp_path.resolve()


def test_flatten_shows_every_value() -> None:
    flat = recipe.flatten(build(GOOD).recipe)
    assert flat["train.learning_rate"] == 2e-4 and flat["data.train"] == "rows.jsonl" and "lora.r" in flat


def test_every_field_is_documented() -> None:
    """Names that say it all may go without a docstring; those with a unit or a choice may not."""
    plain = {
        "stage",
        "description",
        "model",
        "data",
        "train",
        "lora",
        "eval",
        "save",
        "samples",
        "evaluate",
        "loggers",
        "dpo",
    }
    plain |= {
        "method",
        "epochs",
        "learning_rate",
        "schedule",
        "optimizer",
        "betas",
        "eps",
        "seed",
        "r",
        "alpha",
        "dropout",
        "rslora",
        "dora",
    }
    plain |= {"keep_last", "max_tokens", "suite", "batch_size", "limit", "quantize"}
    sections = [
        recipe.Model,
        recipe.Data,
        recipe.Train,
        recipe.Lora,
        recipe.Dpo,
        recipe.Eval,
        recipe.Save,
        recipe.Samples,
        recipe.Recipe,
    ]
    bare = [
        f"{s.__name__}.{name}"
        for s in sections
        for name, field in s.model_fields.items()
        if not field.description and name not in plain
    ]
    assert not bare


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.batch_size=abc", "--set train.batch_size: expected a whole number (got 'abc')."),
        ("lr=1", "--set lr: unknown key. Did you mean 'train.learning_rate'?"),
        ("train.lr=1", "--set train.lr: unknown key. Did you mean 'train.learning_rate'?"),
        ("lora.rank=1", "--set lora.rank: unknown key. Did you mean 'lora.r'?"),
        ("batch_size=1", "--set batch_size: unknown key. Did you mean 'train.batch_size'?"),
    ],
)
def test_a_wrong_value_of_the_command_line_is_not_put_on_the_file(override: str, said: str) -> None:
    with pytest.raises(RecipeError, match=r"^the command line: 1 problem") as caught:
        build(GOOD, overrides=[override])
    assert caught.value.problems == (said,)


@pytest.mark.parametrize(
    ("name", "said"), [("rows.jsonl", "data, not a recipe"), ("rows.csv", "--set data.train="), ("my.yaml", "is empty")]
)
def test_a_file_that_is_no_recipe(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(RecipeError, match=said):
        recipe.load(tmp_path / name)
