"""Preference training: what must hold on every engine that offers it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lab import Lab, column, make_lab, make_tiny, numbers, sentence, stop_at, toy_installed, why_missing
from smolmlx import rundir, stages
from smolmlx.backend import choose
from smolmlx.data.chat import Encoded
from smolmlx.data.pairs import encode_pairs
from smolmlx.errors import DataError, RecipeError, RunError
from smolmlx.plan import Plan
from smolmlx.references import content_hash
from smolmlx.session import load_arrays

LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "smoothed": {"label_smoothing": 0.2},
    "per token": {"length_normalized": True, "beta": 2.0},
    "rpo": {"sft_weight": 0.5},
    "ipo": {"loss": "ipo"},
    "hinge": {"loss": "hinge"},
    "orpo": {"loss": "orpo", "beta": 0.5},
}


@pytest.fixture
def lab(engine: str, tiny_model: Path, pair_rows: Path, tmp_path: Path) -> Iterator[Lab]:
    """Each engine that offers dpo, with a short recipe on the tiny model."""
    with toy_installed():
        made = make_lab(engine, tiny_model, pair_rows, tmp_path)
        capabilities = made.choice.backend.capabilities(made.choice.device)
        if "dpo" not in capabilities.stages:
            pytest.skip(f"{engine}: {capabilities.missing.get('dpo', 'no reason given')}")
        tree = {**made.tree, "stage": "dpo", "data": {"train": str(pair_rows), "max_length": 128}}
        yield Lab(made.choice, tree, made.out)


@pytest.fixture
def adapter(lab: Lab, tmp_path: Path) -> Path:
    """A start adapter that is far from the base."""
    plan = lab.plan()
    rng = np.random.default_rng(3)
    run = lab.start(plan)
    start = load_arrays(run.start / "adapter_model.safetensors")
    arrays = {name: value + rng.normal(0, 0.05, value.shape).astype(np.float32) for name, value in start.items()}
    from smolmlx.plan import adapter_config

    folder = tmp_path / "sft" / "adapter"
    folder.mkdir(parents=True)
    save_file(arrays, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config(plan)))
    return folder


def first_gradient(lab: Lab, plan: Plan) -> dict[str, np.ndarray[Any, Any]]:
    """Return a tenth of the first step's gradient: Adam's first moments behind it."""
    run = lab.train(plan)
    arrays = load_arrays(run.checkpoint(1) / "optimizer.safetensors")
    return {name: value for name, value in arrays.items() if name.endswith(".exp_avg")}


def largest_difference(a: dict[str, np.ndarray[Any, Any]], b: dict[str, np.ndarray[Any, Any]]) -> float:
    """Return the largest difference of two gradients, as a share of the largest element."""
    assert set(a) == set(b)
    most = max(float(np.abs(value).max()) for value in a.values())
    assert most > 0
    return max(float(np.abs(value - b[name]).max()) for name, value in a.items()) / most


ONE_STEP = {"train__max_steps": 1, "train__max_grad_norm": 1e9, "save__every": 1, "train__batch_size": 8}


class TestLearning:
    @pytest.mark.parametrize("kind", LOSSES)
    def test_the_chosen_answer_gains(self, lab: Lab, kind: str) -> None:
        run = lab.train(lab.plan(train__max_steps=24, dpo=LOSSES[kind]))
        losses, gap = column(run, "loss"), column(run, "chosen_logp") - column(run, "rejected_logp")
        assert losses[-6:].mean() < losses[:6].mean() and gap[-6:].mean() > gap[:6].mean() + 1
        assert column(run, "accuracy")[-6:].mean() > 0.8

    def test_step_zero(self, lab: Lab) -> None:
        (row,) = numbers(lab.train(lab.plan(train__max_steps=1)), "step")
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-5) and row["grad_norm"] > 0
        assert row["margin"] == pytest.approx(0, abs=1e-5) and row["kl"] == pytest.approx(0, abs=1e-5)
        assert row["chosen_reward"] == pytest.approx(0, abs=1e-5) and row["chosen_logp"] < 0

    def test_what_is_logged_is_what_was_minimised(self, lab: Lab) -> None:
        """One pair a step: the logged margin gives the logged loss."""
        run = lab.train(lab.plan(train__batch_size=1, train__max_steps=12))
        for row in numbers(run, "step"):
            assert row["loss"] == pytest.approx(math.log1p(math.exp(-row["margin"])), abs=1e-5)
            assert row["margin"] == pytest.approx(row["chosen_reward"] - row["rejected_reward"], abs=1e-5)

    def test_evaluation_is_over_all_pairs(self, lab: Lab) -> None:
        """Measured on the 24 pairs it learns, in batches of 5 and of 7: the loss falls below ln 2, the reference's own."""
        changes = {"data__validation": lab.tree["data"]["train"], "eval__every": 4, "train__max_steps": 8}
        for size in (5, 7):
            run = lab.train(lab.plan(**changes, train__batch_size=size, eval__keep_best=False))
            rows = numbers(run, "eval")
            assert [row["step"] for row in rows] == [4, 8]
            assert math.log(2) > rows[0]["val_loss"] > rows[1]["val_loss"]
            assert all(row["val_accuracy"] * 24 == pytest.approx(round(row["val_accuracy"] * 24)) for row in rows)
            assert {"val_margin", "val_accuracy", "val_kl", "val_chosen_logp", "best"} <= set(rows[0])

    def test_a_share_of_the_pairs_is_held_out(self, lab: Lab) -> None:
        plan = lab.plan(data__validation_share=0.3)
        assert plan.validation_pairs is not None and len(plan.validation_pairs) + plan.num_rows == 24

    def test_the_run_leaves_one_adapter_and_no_reference_model(self, lab: Lab, adapter: Path) -> None:
        before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in adapter.iterdir()}
        run = lab.train(lab.plan(model__adapter=str(adapter), train__max_steps=2, save__every=1))
        assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in adapter.iterdir()} == before
        assert not [path for path in run.path.rglob("*") if path.is_dir() and path.name == "ref"]
        folders = {path.parent.name for path in run.path.rglob("adapter_model.safetensors")}
        assert folders == {"start", "adapter", "000001", "000002"}
        start, end = (load_arrays(folder / "adapter_model.safetensors") for folder in (adapter, run.adapter))
        assert set(start) == set(end) and any(np.abs(start[name] - end[name]).max() > 0 for name in start)

    def test_all_weights(self, lab: Lab) -> None:
        if "full" not in lab.choice.backend.capabilities(lab.choice.device).methods:
            pytest.skip(f"{lab.name} trains no whole models")
        run = lab.train(lab.plan(train__method="full", train__learning_rate=1e-3, train__max_steps=8))
        losses = column(run, "loss")
        assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < losses[0] - 0.02


class TestSharedPrompts:
    """Prompts computed once give what computing them with each answer gives (numerics.md: 1e-5)."""

    @pytest.mark.parametrize("kind", LOSSES)
    def test_same_loss_and_gradient(self, lab: Lab, adapter: Path, kind: str) -> None:
        changes = {**ONE_STEP, "model__adapter": str(adapter)}
        plans = [lab.plan(**changes, dpo={**LOSSES[kind], "shared_prompt": shared}) for shared in (True, False)]
        assert [plan.pairs.shared for plan in plans if plan.pairs] == [True, False]
        one, two = (first_gradient(lab, plan) for plan in plans)
        assert largest_difference(one, two) < 1e-5

    def test_same_curve(self, lab: Lab, adapter: Path) -> None:
        runs = [
            lab.train(lab.plan(model__adapter=str(adapter), train__max_steps=20, train__learning_rate=1e-3, dpo={"shared_prompt": shared}))
            for shared in (True, False)
        ]  # fmt: skip
        one, two = (np.stack([column(run, name) for name in ("loss", "margin", "chosen_logp")]) for run in runs)
        assert one == pytest.approx(two, rel=1e-5, abs=2e-5) and one[0][-1] < one[0][0]

    @pytest.mark.parametrize("shared", [True, False])
    def test_micro_batches(self, lab: Lab, adapter: Path, shared: bool) -> None:
        """The mean is over the pairs of the step, however it is cut."""
        changes = {**ONE_STEP, "model__adapter": str(adapter), "data__limit": 6, "dpo": {"shared_prompt": shared}}
        whole = first_gradient(lab, lab.plan(**changes))
        for size, accumulation in ((3, 2), (2, 3), (4, 2), (1, 6)):
            cut = lab.plan(**{**changes, "train__batch_size": size, "train__accumulation": accumulation})
            assert largest_difference(whole, first_gradient(lab, cut)) < 1e-5, f"{size} x {accumulation}"

    def test_compiled(self, lab: Lab) -> None:
        plain, compiled = (column(lab.train(lab.plan(train__compile=on)), "loss") for on in (False, True))
        assert compiled == pytest.approx(plain, rel=1e-5)

    def test_gradient_checkpointing(self, lab: Lab, adapter: Path) -> None:
        changes = {"model__adapter": str(adapter), "dpo": {"shared_prompt": False}}
        plain, saved = (
            column(lab.train(lab.plan(**changes, train__gradient_checkpointing=on)), "loss") for on in (False, True)
        )
        assert saved == pytest.approx(plain, rel=1e-5)


class TestReference:
    def test_is_the_start_adapter_not_the_base(self, lab: Lab, adapter: Path) -> None:
        plain, started = (
            numbers(lab.train(lab.plan(train__max_steps=1, **changes)), "step")[0] for changes in ({}, {"model__adapter": str(adapter)})
        )  # fmt: skip
        assert started["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert abs(started["chosen_logp"] - plain["chosen_logp"]) > 0.1

    def test_made_once_for_all_runs(
        self, lab: Lab, adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("SMOLMLX_CACHE", str(tmp_path / "cache"))
        said: list[str] = []

        def listen(event: Any) -> None:
            if event.kind == "note" and event.values["text"].startswith("reference:"):
                said.append(event.values["text"])

        first = lab.plan(model__adapter=str(adapter), train__max_steps=3)
        lab.train(first, on_event=listen)
        again = lab.plan(
            model__adapter=str(adapter), train__max_steps=3, train__seed=5, train__batch_size=3, dpo={"beta": 0.3}
        )
        lab.train(again, on_event=listen)
        off = lab.plan(model__adapter=str(adapter), train__max_steps=3, dpo={"cache": False})
        lab.train(off, on_event=listen)
        assert ["made in" in text for text in said] == [True, False, True] and "24 pairs from" in said[1]
        assert len(list((tmp_path / "cache" / "references").iterdir())) == 1

    @pytest.mark.parametrize("kind", [{"beta": 1.0}, {"loss": "ipo"}, {"loss": "hinge"}], ids=str)
    def test_of_long_answers_is_taken_from_another_engine_and_batch(
        self, lab: Lab, adapter: Path, kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Answers of about 400 tokens and 4000 nats, whose sums differ by more than 1e-5 of the loss."""
        monkeypatch.setenv("SMOLMLX_CACHE", str(tmp_path / "cache"))
        rows = tmp_path / "long.jsonl"
        words = [" ".join(sentence(i + k) for k in range(30)) for i in range(16)]
        pairs = [{"prompt": sentence(i), "chosen": words[i], "rejected": words[i + 8]} for i in range(8)]
        rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        changes: dict[str, Any] = {"model__adapter": str(adapter), "train__max_steps": 1, "dpo": kind}
        changes["data"] = {"train": str(rows), "max_length": 512}
        others = [name for name in ("mlx", "cuda") if why_missing(name) is None]
        for name in others:
            made = Lab(choose(name, "cpu"), lab.tree, lab.out)
            made.train(made.plan(**changes))
        lab.train(lab.plan(**changes, train__batch_size=2))
        assert len(list((tmp_path / "cache" / "references").iterdir())) == 1

    def test_is_known_by_its_tokens_and_by_all_weights(
        self, lab: Lab, tiny_model: Path, pair_rows: Path, tmp_path: Path
    ) -> None:
        """Names of files and limits that cut nothing are no other rows; a change far inside a file is another model."""

        def key(**changes: Any) -> str:
            plan = lab.plan(**changes)
            assert plan.pairs is not None
            return content_hash(plan, plan.pairs)

        renamed = tmp_path / "renamed.jsonl"
        renamed.write_bytes(pair_rows.read_bytes())
        assert key() == key(data__train=str(renamed), data__max_length=500) != key(data__limit=20)
        large, other = (make_tiny(tmp_path / name, hidden_size=256, intermediate_size=1024) for name in ("large", "other"))  # fmt: skip
        assert key(model__id=str(large)) == key(model__id=str(other))
        weights = bytearray((other / "model.safetensors").read_bytes())
        assert len(weights) > 3 << 20, "the middle is in neither the first nor the last megabyte"
        weights[len(weights) // 2] ^= 1
        (other / "model.safetensors").write_bytes(weights)
        assert key(model__id=str(large)) != key(model__id=str(other))

    @pytest.mark.parametrize("how", ["cut", "not a number"])
    def test_a_broken_file_is_made_again(
        self, lab: Lab, how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("SMOLMLX_CACHE", str(tmp_path / "cache"))
        plan = lab.plan(train__max_steps=1)
        assert plan.pairs is not None
        lab.train(plan)
        (kept,) = (tmp_path / "cache" / "references").iterdir()
        good = kept.read_bytes()
        if how == "cut":
            kept.write_bytes(good[:-100])
        else:
            save_file({"log_probs": np.full((24, 2), np.nan)}, kept, {"content": content_hash(plan, plan.pairs)})
        said: list[str] = []
        lab.train(plan, on_event=lambda event: said.append(str(event.values.get("text"))))
        assert any(f"{kept} " in text and "made again" in text for text in said) and kept.read_bytes() == good

    def test_scores_that_are_not_numbers_are_not_kept(
        self, lab: Lab, adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("SMOLMLX_CACHE", str(tmp_path / "cache"))
        arrays = load_arrays(adapter / "adapter_model.safetensors")
        arrays[min(arrays)][0, 0] = np.nan
        save_file(arrays, adapter / "adapter_model.safetensors")
        plan = lab.plan(model__adapter=str(adapter), train__max_steps=1, dpo={"shared_prompt": False})
        run = lab.start(plan)
        with pytest.raises(RunError, match="not a number"):
            lab.train(plan, run)
        assert not (tmp_path / "cache" / "references").exists() and not list(run.start.glob("reference*"))

    def test_cached_and_fresh_give_one_curve(
        self, lab: Lab, adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        # A cache of its own: the other engine's numbers, which may be used too, differ in the last bit.
        monkeypatch.setenv("SMOLMLX_CACHE", str(tmp_path / "cache"))
        runs = [lab.train(lab.plan(model__adapter=str(adapter), dpo={"cache": cache})) for cache in (True, True, False)]
        assert numbers(runs[0]) == numbers(runs[1]) == numbers(runs[2])

    def test_of_another_adapter_is_refused(
        self, lab: Lab, adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("SMOLMLX_CACHE", str(tmp_path / "cache"))
        lab.train(lab.plan(train__max_steps=1))
        (other,) = (tmp_path / "cache" / "references").iterdir()
        plan = lab.plan(model__adapter=str(adapter), train__max_steps=1)
        run = lab.start(plan)
        (run.start / "reference_train.safetensors").write_bytes(other.read_bytes())
        with pytest.raises(DataError, match=r"of another model, adapter, template or rows .* Start a new run\."):
            lab.train(plan, run)
        (run.start / "reference_train.safetensors").unlink()
        lab.train(plan, run)

    def test_rows_that_changed_are_refused_before_anything_is_written(
        self, lab: Lab, pair_rows: Path, tmp_path: Path
    ) -> None:
        rows = tmp_path / "changed.jsonl"
        rows.write_text(pair_rows.read_text())
        plan = lab.plan(data__train=str(rows), train__max_steps=3)
        run = lab.start(plan)
        with pytest.raises(stages.Interrupted):
            lab.train(plan, run, stop_at(1))
        kept = run.start / "reference_train.safetensors"
        kept.unlink()
        rows.write_text(pair_rows.read_text().replace("red", "blue", 1))
        with pytest.raises(RecipeError, match="another plan"):
            lab.train(lab.plan(data__train=str(rows), train__max_steps=3), run)
        assert not kept.exists()

    def test_false_numbers_are_noticed_before_the_first_step(self, lab: Lab, adapter: Path) -> None:
        plan = lab.plan(model__adapter=str(adapter), train__max_steps=1)
        assert plan.pairs is not None
        run = lab.start(plan)
        save_file(
            {"log_probs": np.full((24, 2), -9.0)},
            run.start / "reference_train.safetensors",
            {"content": content_hash(plan, plan.pairs)},
        )
        with pytest.raises(RunError, match="not those of the start weights"):
            lab.train(plan, run)
        assert not numbers(run)


def test_a_first_gradient_of_rounding_is_refused(lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each chosen answer as both: what a fault behind the reading of rows might leave."""

    def chosen_twice(*given: Any) -> Iterator[Encoded]:
        for number, row in enumerate(encode_pairs(*given)):
            if number % 2 == 0:
                yield from (row, row)

    monkeypatch.setenv("SMOLMLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("smolmlx.data.store.encode_pairs", chosen_twice)
    with pytest.raises(RunError, match="nothing but rounding"):
        lab.train(lab.plan(train__max_steps=1))


KINDS: dict[str, dict[str, Any]] = {
    "shared": {"dpo__shared_prompt": True},
    "apart, dropout, accumulated": {"dpo__shared_prompt": False, "lora__dropout": 0.3, "train__accumulation": 3},
    "shared, dropout": {"dpo__shared_prompt": True, "lora__dropout": 0.3},
    "orpo": {"dpo__loss": "orpo"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_and_resumed(lab: Lab, adapter: Path, kind: str) -> None:
    changes = {
        "train__max_steps": 10, "data__validation_share": 0.2, "eval__every": 3, "model__adapter": str(adapter), **KINDS[kind],
    }  # fmt: skip
    whole = lab.train(lab.plan(**changes))
    plan = lab.plan(**changes)
    cut = lab.start(plan)
    with pytest.raises(stages.Interrupted):
        lab.train(plan, cut, stop_at(4))
    lab.train(lab.plan(**changes), cut)
    assert numbers(cut) == numbers(whole)
    assert result(cut) == result(whole)


def result(run: rundir.RunDir) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()
