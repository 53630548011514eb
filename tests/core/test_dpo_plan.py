"""What a recipe of stage dpo becomes, where it may start, and what is refused before weights load."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_plan
from safetensors.numpy import save_file
from test_plan import CAPABLE, Paper, load

from smolmlx.backend import Capabilities, Choice
from smolmlx.errors import DataError, RecipeError
from smolmlx.models import open_model, write_base
from smolmlx.plan import Plan, adapter_config, initial_adapter, resolve
from smolmlx.recipe import DPO_LEARNING_RATE, build


class DpoPaper(Paper):
    def capabilities(self, device: str | None = None) -> Capabilities:
        return dataclasses.replace(CAPABLE, stages=("pretrain", "sft", "dpo"))


@pytest.fixture
def tree(tiny_model: Path, pair_rows: Path) -> dict[str, Any]:
    return {
        "stage": "dpo", "model": {"id": str(tiny_model)}, "data": {"train": str(pair_rows), "max_length": 128},
        "train": {"batch_size": 4}, "lora": {"r": 4},
    }  # fmt: skip


def make(tree: dict[str, Any], **changes: Any) -> Plan:
    merged = {
        key: {**tree.get(key, {}), **value} if isinstance(value, dict) else value for key, value in changes.items()
    }
    return resolve(load({**tree, **merged}), Choice(DpoPaper(), None, "asked for"))  # type: ignore[arg-type]


def write_adapter(tree: dict[str, Any], folder: Path, **lora: Any) -> Path:
    """Write an adapter with weights of its own for the recipe's model."""
    plan = make(tree, lora=lora)
    folder.mkdir(parents=True)
    arrays = {name: value + np.float32(0.01) for name, value in initial_adapter(plan).items()}
    save_file(arrays, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config(plan)))
    return folder


def test_counts_are_of_pairs(tree: dict[str, Any]) -> None:
    plan = make(tree)
    assert plan.pairs is not None and plan.num_rows == 24 and plan.steps == math.ceil(24 / 4)
    found = plan.to_json()
    assert found["rows"] == 24 and found["packed"] is False and found["dpo"]["start_adapter"] is None
    assert found["padded_tokens"] == plan.pairs.padded_tokens() >= found["tokens"] / 2
    assert plan.train.step_tokens(0)[0] > 0


def test_learning_rate_of_its_own(tree: dict[str, Any]) -> None:
    assert make(tree).recipe.train.learning_rate == DPO_LEARNING_RATE == 1e-6
    assert make(tree, train={"learning_rate": 1e-3}).recipe.train.learning_rate == 1e-3
    assert (
        build({"data": {"train": "x"}, "model": {"id": "y"}}, source="", folder=Path()).recipe.train.learning_rate
        == 2e-4
    )


def test_sharing_is_chosen_by_cost_and_said(tree: dict[str, Any], tmp_path: Path, tiny_model: Path) -> None:
    long, short = tmp_path / "long.jsonl", tmp_path / "short.jsonl"
    for path, prompt, answer in ((long, "river " * 60, "red"), (short, "a", "red " * 60)):
        row = {"prompt": prompt, "chosen": answer, "rejected": answer + " blue"}
        path.write_text((json.dumps(row) + "\n") * 4)
    plans = [make(tree, data={"train": str(path), "max_length": 512}) for path in (long, short)]
    assert [plan.pairs.shared for plan in plans if plan.pairs] == [True, False]
    assert "prompts computed once for both answers: estimated cost" in plans[0].notes[-1]
    assert "prompts computed with each answer: estimated cost" in plans[1].notes[-1]
    for wanted in (True, False):
        plan = make(tree, dpo={"shared_prompt": wanted})
        assert plan.pairs is not None and plan.pairs.shared is wanted
    checkpointed = make(tree, train={"gradient_checkpointing": True})
    assert checkpointed.pairs is not None and not checkpointed.pairs.shared


def test_fingerprint_is_of_what_is_learned(tree: dict[str, Any], tmp_path: Path) -> None:
    plain = make(tree).fingerprint()
    assert (
        make(tree, dpo={"shared_prompt": True}).fingerprint() == make(tree, dpo={"cache": False}).fingerprint() == plain
    )
    assert make(tree, dpo={"beta": 0.2}).fingerprint() != plain
    adapter = write_adapter(tree, tmp_path / "a")
    started = make({**tree, "lora": {}}, model={"id": tree["model"]["id"], "adapter": str(adapter)})
    assert started.fingerprint() != plain


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dpo": {"loss": "ipo", "label_smoothing": 0.1}}, "dpo.label_smoothing"),
        ({"dpo": {"loss": "orpo", "sft_weight": 1.0, "length_normalized": True}}, "dpo.sft_weight"),
        ({"dpo": {"shared_prompt": True}, "train": {"gradient_checkpointing": True}}, "dpo.shared_prompt"),
        ({"dpo": {"bta": 1}}, "Did you mean 'beta'"),
        ({"data": {"packing": "on"}}, "data.packing"),
        ({"data": {"loss_on": "all"}}, "data.loss_on"),
        ({"data": {"overlong": "split"}}, "data.overlong"),
        ({"stage": "sft", "dpo": {"beta": 0.3}}, "dpo: has no effect with stage: sft"),
        ({"model": {"adapter": "x"}, "train": {"method": "full"}}, "model.adapter: full training"),
        ({"model": {"adapter": "nowhere"}}, "no adapter here"),
    ],
)  # fmt: skip
def test_refused_recipes(tree: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make(tree, **changes)
    assert said in str(caught.value)


def test_rows_with_one_answer_are_refused(tree: dict[str, Any], chat_rows: Path) -> None:
    with pytest.raises(DataError, match="stage dpo needs two"):
        make(tree, data={"train": str(chat_rows)})


def test_missing_pairs_name_the_command_that_makes_them(tree: dict[str, Any], chat_rows: Path) -> None:
    for changes in ({"train": "pairs/train.jsonl"}, {"validation": "pairs/validation.jsonl"}):
        with pytest.raises(DataError, match=r"no such file or folder.* Make pairs with: smolmlx data pairs NOTES"):
            make(tree, data=changes)
    with pytest.raises(DataError) as caught:
        test_plan.make({**tree, "stage": "sft", "data": {"train": "nowhere.jsonl"}})
    assert "data pairs" not in str(caught.value)


def test_pairs_that_are_too_long_are_told_what_is_allowed(tree: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"Raise data.max_length, or choose another data.overlong \(truncate_prompt\)"):
        make(tree, data={"max_length": 9})
    with pytest.raises(DataError, match=r"Raise data.max_length: 1 problem"):
        make(tree, data={"max_length": 9, "overlong": "truncate_prompt"})


def test_an_engine_without_dpo_refuses(tree: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="stage: backend 'mlx' on cpu does not support 'dpo'"):
        test_plan.make(tree)


class TestStartAdapter:
    def started(self, tree: dict[str, Any], named: Path | str, **changes: Any) -> Plan:
        return make({**tree, "lora": {}}, **{"model": {"adapter": str(named)}, **changes})

    def test_lora_section_is_the_adapters(self, tree: dict[str, Any], tmp_path: Path) -> None:
        adapter = write_adapter(tree, tmp_path / "a", r=2, alpha=6, targets=["q_proj", "down_proj"], rslora=True)
        plan = self.started(tree, adapter)
        lora = plan.recipe.lora
        assert (lora.r, lora.alpha, lora.rslora) == (2, 6.0, True) and lora.targets == ["down_proj", "q_proj"]
        assert plan.loaded.origins["lora.r"] == "model.adapter" and len(plan.targets) == 4
        assert plan.start is not None and plan.start.weights.is_file()

    def test_some_layers(self, tree: dict[str, Any], tmp_path: Path) -> None:
        adapter = write_adapter(tree, tmp_path / "a", last_layers=1)
        assert {name.split(".")[2] for name in self.started(tree, adapter).targets} == {"1"}

    def test_found_in_a_run_and_by_pattern(self, tree: dict[str, Any], tmp_path: Path) -> None:
        for age, name in enumerate(("notes-new", "notes-old")):
            made = write_adapter(tree, tmp_path / name / "adapter")
            os.utime(made / "adapter_model.safetensors", (1e9 - age, 1e9 - age))
        for named in (tmp_path / "notes-new", tmp_path / "notes-*", tmp_path / "notes-*" / "adapter"):
            plan = self.started(tree, named)
            assert plan.start is not None and plan.start.folder == tmp_path / "notes-new" / "adapter"
            assert plan.start.described.endswith(" (the newest of 2)") == ("*" in str(named)), "chosen, so said"
            assert plan.recipe.model.adapter == str(plan.start.folder.resolve()), "a resumed run must find the same one"

    def test_values_that_differ_are_refused(self, tree: dict[str, Any], tmp_path: Path) -> None:
        adapter = write_adapter(tree, tmp_path / "a")
        assert self.started(tree, adapter, lora={"r": 4, "dropout": 0.1}).recipe.lora.dropout == 0.1
        with pytest.raises(RecipeError) as caught:
            self.started(tree, adapter, lora={"r": 8, "alpha": 3})
        assert [problem.split(":")[0] for problem in caught.value.problems] == ["lora.r", "lora.alpha"]

    def test_another_base_is_refused(self, tree: dict[str, Any], tmp_path: Path) -> None:
        from lab import make_tiny

        wide = make_tiny(tmp_path / "wide", hidden_size=64)
        adapter = write_adapter({**tree, "model": {"id": str(wide)}}, tmp_path / "a")
        with pytest.raises(RecipeError, match="made for another base model"):
            self.started(tree, adapter)

    def test_a_base_of_the_same_shapes_is_refused(self, tree: dict[str, Any], tmp_path: Path) -> None:
        from lab import make_tiny

        adapter = write_adapter(tree, tmp_path / "a")
        write_base(open_model(make_tiny(tmp_path / "other", seed=2)), adapter)
        with pytest.raises(RecipeError, match="made for another base model"):
            self.started(tree, adapter)

    def test_a_broken_config(self, tree: dict[str, Any], tmp_path: Path) -> None:
        adapter = write_adapter(tree, tmp_path / "a")
        (adapter / "adapter_config.json").write_text("[]")
        with pytest.raises(DataError, match=r"model.adapter: .*adapter_config.json: expected a JSON table"):
            self.started(tree, adapter)

    def test_kinds_that_cannot_go_on(self, tree: dict[str, Any], tmp_path: Path) -> None:
        adapter = write_adapter(tree, tmp_path / "a")
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(
            json.dumps({**config, "rank_pattern": {"q_proj": 2}, "bias": "all"})
        )
        with pytest.raises(RecipeError) as caught:
            self.started(tree, adapter)
        assert len(caught.value.problems) == 2

    def test_mlx_layout_names_the_converter(self, tree: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "adapters.safetensors").write_bytes(b"")
        with pytest.raises(RecipeError, match="smolmlx adapter convert"):
            self.started(tree, tmp_path / "m")
