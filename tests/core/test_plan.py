"""A plan resolves every number before weights load, and refuses what cannot run with all reasons at once."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import lab as labs
from smolmlx import plan as planning
from smolmlx import recipe
from smolmlx.backend import Capabilities, Choice
from smolmlx.errors import BackendError, DataError, RecipeError
from smolmlx.plan import Plan, resolve
from smolmlx.schedule import count_steps, learning_rates

CAPABLE = Capabilities(
    device="cpu", device_name="CPU", dtype="float32", dtype_reason="it is a CPU", dtypes=("float32",),
    stages=("pretrain", "sft"), methods=("lora", "full"), quantize=("none",), optimizers=("adamw",),
    notes=("a note of the engine",), missing={"8bit": "Buy a GPU.", "adamw_8bit": "Use adamw."},
)  # fmt: skip


class Paper:
    """An engine that can be asked what it can do, and nothing else: planning needs no more."""

    name = "mlx"

    def capabilities(self, device: str | None = None) -> Capabilities:
        return CAPABLE

    def check(self, knobs: Mapping[str, Any]) -> Sequence[str]:
        return [f"mlx.{key}: unknown key." for key in knobs]

    def check_plan(self, plan: Plan) -> Sequence[str]:
        return ["the engine's own reason"] if plan.recipe.description == "odd" else []


class Other(Paper):
    def check(self, knobs: Mapping[str, Any]) -> Sequence[str]:
        return [f"cuda.{key}: unknown key." for key in knobs]


def load(tree: Mapping[str, Any], folder: Path = Path(), overrides: Sequence[str] = ()) -> recipe.Loaded:
    return recipe.build(tree, source="r.yaml", folder=folder, overrides=overrides)


@pytest.fixture
def tree(tiny_model: Path, chat_rows: Path) -> dict[str, dict[str, Any]]:
    return {
        "model": {"id": str(tiny_model)},
        "data": {"train": str(chat_rows), "max_length": 128},
        "train": {"batch_size": 4, "learning_rate": 1e-3},
        "lora": {"r": 4},
    }


def make(tree: Mapping[str, Any], **changes: Any) -> Plan:
    """Resolve a recipe with `section__key=value` laid over it."""
    copy = {section: dict(values) if isinstance(values, dict) else values for section, values in tree.items()}
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        if key:
            copy.setdefault(section, {})[key] = value
        else:
            copy[section] = value
    if copy["train"].get("method") == "full" and "lora" not in changes:
        copy.pop("lora", None)  # full training has no adapter
    return resolve(load(copy), Choice(Paper(), None, "asked for"))  # type: ignore[arg-type]


class TestLearningRates:
    def rates(self, steps: int, **train: Any) -> list[float]:
        return [float(x) for x in learning_rates(recipe.Train(learning_rate=1.0, **train), steps)]

    def test_constant_with_warmup_still_warms_up(self) -> None:
        assert self.rates(6, schedule="constant", warmup=4) == [0.25, 0.5, 0.75, 1, 1, 1]

    def test_linear(self) -> None:
        assert self.rates(4, schedule="linear") == [1, 0.75, 0.5, 0.25]
        assert self.rates(6, schedule="linear", warmup=2, min_lr_ratio=0.5) == pytest.approx(
            [0.5, 1, 1, 0.875, 0.75, 0.625]
        )

    def test_cosine_to_a_tenth(self) -> None:
        rates = self.rates(100, schedule="cosine", warmup=0.1, min_lr_ratio=0.1)
        assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
        wanted = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (k - 10) / 90)) for k in range(10, 100)]
        assert rates[10:] == pytest.approx(wanted)
        assert rates[-1] < 0.101

    def test_one_percent_of_warmup(self) -> None:
        rates = self.rates(1000, schedule="constant", warmup=0.01)
        assert rates[8] < 1 and rates[9] == 1

    def test_warmup_longer_than_the_run(self) -> None:
        assert self.rates(2, schedule="cosine", warmup=10) == [0.5, 1]

    def test_no_warmup(self) -> None:
        assert self.rates(3, schedule="constant") == [1, 1, 1]


@pytest.mark.parametrize(
    ("train", "per_epoch", "steps"),
    [
        ({"epochs": 3}, 25, 75),
        ({"epochs": 0.5}, 25, 13),
        ({"epochs": 1.2}, 25, 30),
        ({"epochs": 3, "max_steps": 10}, 25, 10),
        ({"epochs": 1, "max_steps": 1000}, 25, 25),
    ],
)
def test_steps(train: dict[str, Any], per_epoch: int, steps: int) -> None:
    assert count_steps(recipe.Train(**train), per_epoch) == steps


def test_more_steps_than_can_be_planned() -> None:
    with pytest.raises(RecipeError, match=r"train\.epochs: 1e\+15 epochs"):
        count_steps(recipe.Train(epochs=1e15), 25)


class TestNumbers:
    def test_steps_evaluations_and_checkpoints(self, tree: dict[str, Any]) -> None:
        made = make(
            tree,
            train__epochs=2.5,
            data__validation_share=0.25,
            data__packing="off",
            eval__every="epoch",
            save__every=3,
        )
        per_epoch = math.ceil(len(made.train.store) / 4)
        assert made.steps == math.ceil(2.5 * per_epoch) == len(made.learning_rates)
        assert made.eval_steps == {per_epoch, 2 * per_epoch, made.steps}
        assert made.save_steps == set(range(3, made.steps + 1, 3))

    def test_evaluation_at_the_end_alone(self, tree: dict[str, Any]) -> None:
        made = make(tree, data__validation_share=0.25, eval__every="end")
        assert made.eval_steps == {made.steps}

    def test_no_validation_no_evaluation(self, tree: dict[str, Any]) -> None:
        assert make(tree).eval_steps == frozenset() and make(tree).validation is None

    def test_trainable_parameters(self, tree: dict[str, Any]) -> None:
        made = make(tree)
        shapes = made.model.linear_shapes()
        assert len(made.targets) == 14 and made.num_trainable == sum(4 * (a + b) for a, b in shapes.values())
        assert make(tree, lora__dora=True).num_trainable == made.num_trainable + sum(b for _, b in shapes.values())
        full = make(tree, train__method="full")
        assert full.num_trainable == full.num_parameters and full.targets == {}

    def test_scale(self, tree: dict[str, Any]) -> None:
        assert make(tree, lora__alpha=8).scale == 2
        assert make(tree, lora__alpha=8, lora__rslora=True).scale == 4

    def test_json_is_json_and_complete(self, tree: dict[str, Any]) -> None:
        made = make(tree, data__validation_share=0.25)
        found = json.loads(json.dumps(made.to_json()))
        assert found["rows"] + found["validation_rows"] == found["rows_read"] + found["validation_rows"] == 24
        assert found["supervised"] == made.train.store.supervised.sum()
        assert found["targets"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
        assert {"device", "dtype", "num_trainable", "steps", "memory_bytes", "data_hash", "template", "notes"} <= set(
            found
        )
        assert "a note of the engine" in found["notes"]


class TestSplit:
    def test_share_is_disjoint_and_seeded(self, tree: dict[str, Any]) -> None:
        def tokens(made: Plan) -> tuple[set[bytes], set[bytes]]:
            assert made.validation is not None
            stores = (made.train.store, made.validation.store)
            first, second = ({s.row(i)[0].tobytes() for i in range(len(s))} for s in stores)
            return first, second

        made = make(tree, data__validation_share=0.25)
        train, held = tokens(made)
        assert held and not train & held
        assert tokens(make(tree, data__validation_share=0.25)) == (train, held)
        assert tokens(make(tree, data__validation_share=0.25, train__seed=1)) != (train, held)

    def test_share_that_holds_nothing(self, tree: dict[str, Any]) -> None:
        with pytest.raises(DataError, match="no validation row"):
            make(tree, data__validation_share=0.001)


class TestPacking:
    def test_auto_says_why(self, tree: dict[str, Any]) -> None:
        made = make(tree, data__packing="auto")
        assert any("packed" in note and "data.packing" in note for note in made.notes)

    def test_on_and_off(self, tree: dict[str, Any]) -> None:
        assert make(tree, data__packing="on").train.packed
        assert not make(tree, data__packing="off").train.packed

    def test_validation_is_never_packed(self, tree: dict[str, Any]) -> None:
        made = make(tree, data__packing="on", data__validation_share=0.25)
        assert made.validation is not None and not made.validation.packed


class TestAdapter:
    def test_first_weights(self, tree: dict[str, Any]) -> None:
        made = make(tree)
        arrays = planning.initial_adapter(made)
        assert len(arrays) == 2 * len(made.targets)
        for name, (width_in, width_out) in made.targets.items():
            a = arrays[f"base_model.model.{name}.lora_A.weight"]
            b = arrays[f"base_model.model.{name}.lora_B.weight"]
            assert a.shape == (4, width_in) and b.shape == (width_out, 4) and not b.any()
            assert 0.7 / math.sqrt(width_in) < np.abs(a).max() <= 1 / math.sqrt(width_in)

    def test_first_weights_follow_the_seed(self, tree: dict[str, Any]) -> None:
        def first(seed: int) -> np.ndarray[Any, Any]:
            return next(iter(planning.initial_adapter(make(tree, train__seed=seed)).values()))

        assert np.array_equal(first(0), first(0)) and not np.array_equal(first(0), first(1))

    @pytest.mark.parametrize(
        ("lora", "suffixes", "count"),
        [
            ({"targets": ["q_proj", "v_proj"]}, {"q_proj", "v_proj"}, 4),
            ({"targets": ["model.layers.1.mlp.up_proj"]}, {"up_proj"}, 1),
            ({"targets": ["mlp.up_proj"]}, {"up_proj"}, 2),
            ({"last_layers": 1}, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, 7),
            ({"targets": ["q_proj"], "last_layers": 1}, {"q_proj"}, 1),
        ],
    )
    def test_targets(self, tree: dict[str, Any], lora: dict[str, Any], suffixes: set[str], count: int) -> None:
        made = make(tree, lora={"r": 4, **lora})
        assert ({name.rpartition(".")[2] for name in made.targets}, len(made.targets)) == (suffixes, count)

    def test_peft_config_names_what_was_trained(self, tree: dict[str, Any]) -> None:
        assert planning.adapter_config(make(tree, lora__targets=["q_proj"]))["target_modules"] == ["q_proj"]
        partly = planning.adapter_config(make(tree, lora__last_layers=1, lora__targets=["q_proj"]))
        assert partly["target_modules"] == ["model.layers.1.self_attn.q_proj"]
        config = planning.adapter_config(make(tree, lora__rslora=True))
        assert (
            config["peft_type"] == "LORA"
            and config["r"] == 4
            and config["use_rslora"]
            and config["fan_in_fan_out"] is False
        )

    @pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
    def test_tied_embeddings_are_refused(self, tree: dict[str, Any], target: str) -> None:
        with pytest.raises(RecipeError, match="ties them"):
            make(tree, lora__targets=[target, "q_proj"])

    def test_unknown_targets_name_the_nearest(self, tree: dict[str, Any]) -> None:
        with pytest.raises(RecipeError) as caught:
            make(tree, lora__targets=["q_porj", "zzz"])
        assert "Did you mean 'q_proj'" in caught.value.problems[0] and "Known: down_proj" in caught.value.problems[1]


class TestFingerprint:
    @pytest.mark.parametrize(
        "changes",
        [
            {"train__seed": 1},
            {"train__learning_rate": 2e-3},
            {"train__weight_decay": 0.1},
            {"lora__r": 5},
            {"lora__dropout": 0.1},
            {"data__max_length": 40, "data__overlong": "split"},
            {"train__epochs": 2},
        ],
    )
    def test_changes_with_what_is_learned(self, tree: dict[str, Any], changes: dict[str, Any]) -> None:
        assert make(tree, **changes).fingerprint() != make(tree).fingerprint()

    def test_changes_with_the_validation_rows(self, tree: dict[str, Any], tmp_path: Path) -> None:
        """Best weights and early stopping hang on them."""
        prints = []
        for answer in ("red", "green"):
            (tmp_path / f"{answer}.jsonl").write_text(json.dumps({"prompt": "blue", "completion": answer}) + "\n")
            prints.append(make(tree, data__validation=str(tmp_path / f"{answer}.jsonl")).fingerprint())
        assert prints[0] != prints[1]

    @pytest.mark.parametrize(
        "changes",
        [
            {"train__compile": False},
            {"save__every": 5},
            {"train__gradient_checkpointing": True},
            {"samples__prompts": ["hi"]},
        ],
    )
    def test_stays_with_what_is_not(self, tree: dict[str, Any], changes: dict[str, Any]) -> None:
        assert make(tree, **changes).fingerprint() == make(tree).fingerprint()


@pytest.mark.parametrize("name", ["./base", "base", "models/base"])
def test_model_beside_its_recipe(tree: dict[str, Any], tiny_model: Path, tmp_path: Path, name: str) -> None:
    """One slash would make it a hub id."""
    shutil.copytree(tiny_model, tmp_path / name)
    found = resolve(load({**tree, "model": {"id": name}}, tmp_path), Choice(Paper(), None, "asked for"))  # type: ignore[arg-type]
    assert found.model.folder == tmp_path / name
    assert Path(found.model.name).is_dir(), "the name must work from the working folder, where `generate` is typed"


class TestColumns:
    def columns(self, tree: dict[str, Any], rows: Path, **columns: str) -> Plan:
        rows.write_text(
            '{"question": "red?", "completion": "blue"}\n{"question": "a", "completion": "b", "note": "c"}\n'
        )
        return make(tree, data={"train": str(rows), "columns": columns})

    def test_mapping_that_does_what_it_says(self, tree: dict[str, Any], tmp_path: Path) -> None:
        assert (
            self.columns(tree, tmp_path / "r.jsonl", prompt="question", system="note").format_name
            == "prompt-completion"
        )

    def test_mapping_that_would_do_nothing(self, tree: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(RecipeError) as caught:
            self.columns(tree, tmp_path / "r.jsonl", prompt="question", sytem="note", completion="answr")
        assert caught.value.problems == (
            "sytem: format 'prompt-completion' has no such field. Did you mean 'system'? Known: prompt, completion, system.",
            f"'answr': no row of {tmp_path / 'r.jsonl'} has this column.",
        )


@pytest.mark.parametrize("key", ["data", "train", "ood"])
def test_evaluation_rows_that_are_not_there(tree: dict[str, Any], chat_rows: Path, key: str) -> None:
    """Found after the training, they would be found late."""
    with pytest.raises(DataError, match=rf"evaluate\.{key}: nowhere\.jsonl: no such file"):
        make(tree, evaluate={"data": str(chat_rows), key: "nowhere.jsonl"})


@pytest.mark.parametrize(
    ("suite", "lines", "said"),
    [
        ("notes", ['{"prompt": "a", "completion": "b"}', "{oops"], "rows.jsonl:2: not valid JSON"),
        ("loss", ['{"prompt": "a", "completion": "b"}', '{"prompt": "a"}'], "rows.jsonl:2: missing field 'completion'"),
        ("notes", ['{"text": "a"}'], "rows.jsonl:1: no question, or no assistant answer"),
        ("research", ['{"prompt": "a", "completion": "b", "task": "qa"}'], "rows.jsonl:1: no style, gold"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused_before_training(
    suite: str, lines: list[str], said: str, tree: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"evaluate\.data: suite") as caught:
        make(tree, evaluate={"suite": suite, "data": str(path)})
    assert said in caught.value.problems[0]


def test_rows_beyond_the_limit_need_not_be_scored(tree: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}')
    assert make(tree, evaluate={"data": str(path), "limit": 1})


def test_files_of_a_folder_that_are_not_taken_are_named(tree: dict[str, Any], chat_rows: Path, tmp_path: Path) -> None:
    for name in ("latest", "test"):
        shutil.copy(chat_rows, tmp_path / f"{name}.jsonl")
    plan = make(tree, data={**tree["data"], "train": str(tmp_path)})
    assert [note for note in plan.notes if note.startswith("data.train: test.jsonl of the folder not taken")]


def test_warmup_longer_than_the_run_is_said(tree: dict[str, Any]) -> None:
    assert any(
        "train.warmup: 500 steps, but the run has 2" in note
        for note in make(tree, train__warmup=500, train__max_steps=2).notes
    )
    assert not any("train.warmup" in note for note in make(tree, train__warmup=2, train__max_steps=2).notes)


class TestSaid:
    def test_validation_rows_that_cannot_be_scored(self, tree: dict[str, Any], tmp_path: Path) -> None:
        """The best checkpoint would rest on the few others, without a word."""
        rows = [("q", "a")] + [("q", "long " * 200)] * 3
        lines = [json.dumps({"prompt": ask, "completion": answer}) for ask, answer in rows]
        (tmp_path / "val.jsonl").write_text("\n".join(lines))
        notes = make(tree, data__validation=str(tmp_path / "val.jsonl")).notes
        assert any(
            re.match(r"data\.validation: 3 of 4 rows cannot be scored \(.*: 3, first at .*val\.jsonl:2\)", n)
            for n in notes
        )

    def test_rows_beyond_the_context(self, tree: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "q", "completion": "long words " * 600}) + "\n")
        long = {"train": str(tmp_path / "long.jsonl"), "max_length": 16384}
        assert any("data.max_length: the longest row has" in note for note in make(tree, data=long).notes)
        assert not any("longest row" in note for note in make(tree).notes)

    def test_full_training_in_16_bits(self, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        both = replace(CAPABLE, dtypes=("float32", "bfloat16"))
        monkeypatch.setattr(Paper, "capabilities", lambda self, device=None: both)
        words = "model.dtype: bfloat16 with train.method: full loses every update"
        assert any(words in note for note in make(tree, train__method="full", model__dtype="bfloat16").notes)
        assert not any(words in note for note in make(tree, model__dtype="bfloat16").notes)
        assert not any(words in note for note in make(tree, train__method="full").notes)

    def test_fewer_steps_than_asked_for(self, tree: dict[str, Any]) -> None:
        """Seven thousand steps were asked for once, and the run ended after the one epoch that is the default."""
        plan = make(tree, train__max_steps=5000)
        assert f"train.max_steps: 5,000, but train.epochs: 1 ends the run after {plan.steps}." in plan.notes
        assert not any("max_steps" in note for note in make(tree, train__max_steps=2).notes)

    @pytest.mark.parametrize("name", ["messages", "add_generation_prompt"])
    def test_variables_that_templates_have(self, tree: dict[str, Any], name: str) -> None:
        with pytest.raises(
            RecipeError, match=rf"data\.template_args: {name}: every chat template is given this already"
        ):
            make(tree, data__template_args={name: 1})

    def test_half_a_step_of_warmup(self, tree: dict[str, Any]) -> None:
        with pytest.raises(RecipeError, match=r"train\.warmup: 1\.5 is neither a share"):
            make(tree, train__warmup=1.5)


class TestWithoutEffect:
    def test_batches_larger_than_the_data(self, tree: dict[str, Any]) -> None:
        plan = make(tree, train__batch_size=4096)
        note = f"train.batch_size: 4096, but an epoch has {plan.train.num_rows} rows: all are in one batch."
        assert note in plan.notes and plan.train.batch_size == plan.train.num_rows

    @pytest.mark.parametrize("key", ["save", "eval"])
    def test_moments_beyond_the_last_step(self, tree: dict[str, Any], key: str) -> None:
        changes = {"data__validation_share": 0.25, "train__max_steps": 2}
        late = make(tree, **changes, **{f"{key}__every": 500}).notes
        assert any(f"{key}.every: 500 steps, but the run has 2" in note for note in late)
        assert not any(".every" in note for note in make(tree, **changes, **{f"{key}__every": 2}).notes)

    def test_compile_where_nothing_compiles(self, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        def said(**changes: Any) -> bool:
            return any(note.startswith("train.compile: has no effect") for note in make(tree, **changes).notes)

        assert said(train__compile=False) and said(train__compile=True) and not said()
        monkeypatch.setattr(Paper, "capabilities", lambda self, device=None: replace(CAPABLE, compiles=True))
        assert not said(train__compile=False)

    def test_length_of_samples_without_prompts(self, tree: dict[str, Any]) -> None:
        """A sweep that takes a recipe's prompts away must not be refused for what is left."""
        note = "samples.max_tokens: has no effect without samples.prompts."
        assert note in make(tree, samples__max_tokens=8).notes
        assert note not in make(tree, samples={"max_tokens": 8, "prompts": ["hi"]}).notes
        assert note not in make(tree, samples={"max_tokens": 8, "prompts": []}).notes

        def said(*overrides: str) -> bool:
            shipped = {**tree, "samples": {"max_tokens": 8, "prompts": ["hi"]}}
            return note in resolve(load(shipped, overrides=overrides), Choice(Paper(), None, "asked for")).notes  # type: ignore[arg-type]

        assert not said("samples.prompts=[]") and said("samples.prompts=[]", "samples.max_tokens=9")

    def test_variables_the_template_does_not_use(self, tree: dict[str, Any]) -> None:
        with pytest.raises(RecipeError, match=r"data\.template_args: zork: the chat template does not use this"):
            make(tree, data__template_args={"zork": 1})


class TestRefusals:
    def test_more_blocks_than_there_are(self, tree: dict[str, Any]) -> None:
        with pytest.raises(RecipeError, match=r"lora\.last_layers: 100, but .* has 2 blocks"):
            make(tree, lora__last_layers=100)

    @pytest.mark.parametrize("name", ["tiny", "folder"])
    def test_revision_of_a_folder(self, tree: dict[str, Any], tiny_model: Path, name: str) -> None:
        with pytest.raises(RecipeError, match=r"model\.revision: is for a hub id"):
            make(tree, model={"id": "tiny" if name == "tiny" else str(tiny_model), "revision": "main"})

    def test_everything_an_engine_cannot_do_at_once(self, tree: dict[str, Any]) -> None:
        with pytest.raises(RecipeError) as caught:
            make(tree, model__quantize="8bit", model__dtype="bfloat16", train__optimizer="adamw_8bit", mlx={"zzz": 1})
        assert caught.value.problems == (
            "model.quantize: backend 'mlx' on cpu does not support '8bit' (supports: none). Buy a GPU.",
            "train.optimizer: backend 'mlx' on cpu does not support 'adamw_8bit' (supports: adamw). Use adamw.",
            "model.dtype: backend 'mlx' on cpu does not support 'bfloat16' (supports: auto, float32).",
            "mlx.zzz: unknown key.",
        )

    def test_what_an_engine_finds_in_the_plan(self, tree: dict[str, Any]) -> None:
        with pytest.raises(RecipeError, match="the engine's own reason"):
            make(tree, description="odd")

    def test_base_without_layers_to_adapt(self, tree: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
        """A GPT-2's blocks are `h.N`, and its matrices are stored the other way round."""
        model = shutil.copytree(tiny_model, tmp_path / "gpt2")
        config = {"model_type": "gpt2", "vocab_size": 512, "n_layer": 2, "n_embd": 8, "n_head": 2}
        (model / "config.json").write_text(json.dumps(config))
        save_file({"h.0.attn.c_attn.weight": np.zeros((8, 24), np.float32)}, model / "model.safetensors")
        for lora, method in (
            ({}, "lora"),
            ({"targets": ["c_attn"]}, "lora"),
            ({"last_layers": 1}, "lora"),
            ({}, "full"),
        ):
            with pytest.raises(RecipeError, match="type 'gpt2'"):
                make(tree, model__id=str(model), lora=lora, train__method=method)

    def test_knobs_of_another_engine_are_checked_where_it_is_installed(
        self, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(planning, "load", lambda name: {"cuda": Other}[name]())
        with pytest.raises(RecipeError, match=r"cuda\.zzz: unknown"):
            make(tree, cuda={"zzz": 1})

        def missing(name: str) -> None:
            raise BackendError(f"--backend {name}: its packages are not installed")

        monkeypatch.setattr(planning, "load", missing)
        assert make(tree, cuda={"zzz": 1}).steps

    def test_most_rows_lost(self, tree: dict[str, Any]) -> None:
        with pytest.raises(DataError, match="more than half") as caught:
            make(tree, data__max_length=30)
        assert "longer than max_length" in caught.value.problems[0] and "chat.jsonl:2" in caught.value.problems[0]
        assert make(tree, data__max_length=30, data__allow_affected=True).steps

    def test_all_rows_lost(self, tree: dict[str, Any]) -> None:
        with pytest.raises(DataError, match="none of its 24 rows"):
            make(tree, data__max_length=8, data__allow_affected=True)

    def test_tokenizer_of_another_model(self, tree: dict[str, Any], assets: Path) -> None:
        with pytest.raises(RecipeError, match="do not belong together"):
            make(tree, model__tokenizer=str(assets / "tokenizers/smollm2-135m-instruct"))

    def test_missing_tokenizer_folder(self, tree: dict[str, Any]) -> None:
        with pytest.raises(RecipeError, match="no such folder"):
            make(tree, model__tokenizer="nowhere/at/all")

    def test_gguf(self, tree: dict[str, Any]) -> None:
        with pytest.raises(RecipeError, match="GGUF"):
            make(tree, model__id="m.gguf")

    def test_chat_rows_for_pretraining(self, tree: dict[str, Any]) -> None:
        with pytest.raises(DataError, match="pretrain wants text"):
            make(tree, stage="pretrain")


def test_model_from_a_config(tree: dict[str, Any], tiny_model: Path, text_rows: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    made = make(
        tree,
        stage="pretrain",
        model={"config": config, "tokenizer": str(tiny_model)},
        data={"train": str(text_rows), "max_length": 64},
        train={"method": "full", "batch_size": 2, "accumulation": 2, "learning_rate": 1e-3},
    )
    assert made.num_trainable == made.num_parameters == sum(math.prod(s) for s in made.model.shapes.values())
    assert made.train.store.lengths[:-1].tolist() == [64] * (len(made.train.store) - 1)
    tokens = [made.train.step_tokens(k)[1] for k in range(made.train.steps_per_epoch)]
    assert max(tokens) == 2 * 2 * 64, "tokens of an optimizer step are batch x accumulation x length"
    assert not made.train.packed


def test_dtype_of_the_engine_unless_asked(tree: dict[str, Any]) -> None:
    assert make(tree).dtype == "float32" == make(tree, model__dtype="float32").dtype


def test_memory_grows_with_rows(tree: dict[str, Any]) -> None:
    small, large = make(tree), make(tree, train__batch_size=16)
    assert 0 < small.memory_bytes < large.memory_bytes
    assert make(tree, train__gradient_checkpointing=True).memory_bytes < small.memory_bytes


class TestMemoryOfTheDevice:
    def make(self, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, limit: int | None) -> Plan:
        monkeypatch.setattr(Paper, "capabilities", lambda self, device=None: replace(CAPABLE, memory_bytes=limit))
        return make(tree)

    def test_enough_or_unknown(self, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        needed = make(tree).memory_bytes
        for limit in (needed, None):
            made = self.make(tree, monkeypatch, limit)
            assert made.notes == make(tree).notes and made.to_json()["device_memory_bytes"] == limit

    def test_too_little_is_said(self, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        """The process itself is most of this run, and no batch lowers that: it is warned of, not refused."""
        note = self.make(tree, monkeypatch, make(tree).memory_bytes // 4).notes[-1]
        assert "of memory, and the device has" in note
        assert "--set train.batch_size=1 --set train.accumulation=4" in note and "gradient_checkpointing=true" in note

    def test_far_too_little_is_refused(self, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        tree["train"]["batch_size"] = 4000
        limit = make(tree).memory_bytes // 100
        with pytest.raises(RecipeError, match=r"r\.yaml: needs about .*--set train\.batch_size="):
            self.make(tree, monkeypatch, limit)

    @pytest.mark.parametrize("size", [4000, 3750])
    def test_the_batch_that_is_advised_fits(
        self, tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
    ) -> None:
        """One halving of a batch a thousand times too large would be refused again."""
        tree["data"]["train"] = str(labs.write_chat(tmp_path / "many.jsonl", size))
        tree["train"]["batch_size"] = 40
        limit = make(tree).memory_bytes
        tree["train"]["batch_size"] = size
        with pytest.raises(RecipeError) as caught:
            self.make(tree, monkeypatch, limit)
        found = re.search(r"train\.batch_size=(\d+) --set train\.accumulation=(\d+)", str(caught.value))
        assert found
        rows, accumulation = map(int, found.groups())
        assert rows * accumulation == size and rows > 1
        tree["train"] |= {"batch_size": rows, "accumulation": accumulation}
        assert self.make(tree, monkeypatch, limit).memory_bytes <= limit

    def test_weights_alone(self, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(RecipeError, match="weights, gradients and moments alone take"):
            self.make(tree, monkeypatch, 1000)
