"""What every engine must do with a plan; run for each installed engine and for the numpy one."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lab import Lab, column, make_lab, make_tiny, numbers, sentence
from smolmlx.errors import RecipeError, RunError
from smolmlx.plan import initial_adapter
from smolmlx.session import load_arrays, read_metrics


def needs(lab: Lab, kind: str, value: str) -> None:
    """Skip where an engine says it cannot, with its reason."""
    capabilities = lab.choice.backend.capabilities(lab.choice.device)
    if value not in getattr(capabilities, kind):
        pytest.skip(f"{lab.name}: {kind} lacks '{value}': {capabilities.missing.get(value, 'no reason given')}")


@pytest.fixture
def few_rows(tmp_path: Path) -> Path:
    """Four conversations: all of them fit into one optimizer step, however it is cut."""
    path = tmp_path / "few.jsonl"
    rows = [{"prompt": sentence(i), "completion": sentence(2 * i + 1)} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class TestLearning:
    def test_loss_falls(self, lab: Lab) -> None:
        run = lab.train(lab.plan(train__max_steps=40))
        losses = column(run, "loss")
        assert len(losses) == 40 and losses[-6:].mean() < losses[:6].mean() - 0.5

    def test_first_loss_is_that_of_the_base(self, lab: Lab) -> None:
        """B is zero, so the adapter changes nothing yet."""
        plan = lab.plan(train__max_steps=1)
        (batch,) = plan.train.step(0)
        (score,) = lab.generator(plan).score([batch])
        base = -(score.log_probs * batch.weights).sum() / batch.num_supervised
        assert column(lab.train(plan), "loss")[0] == pytest.approx(base, rel=1e-5)

    def test_base_is_frozen(self, lab: Lab, tiny_model: Path) -> None:
        def digest() -> str:
            return hashlib.sha256((tiny_model / "model.safetensors").read_bytes()).hexdigest()

        before = digest()
        run = lab.train(lab.plan(train__max_steps=2))
        assert digest() == before
        assert not (run.path / "model").exists()

    def test_learning_rates_are_followed(self, lab: Lab) -> None:
        plan = lab.plan(
            train__schedule="constant", train__warmup=4, train__max_steps=5, save__every=1, save__keep_last=9
        )
        run = lab.train(plan)
        assert column(run, "learning_rate").tolist() == [0.0025, 0.005, 0.0075, 0.01, 0.01]
        # The first step of Adam moves each weight by the learning rate, whatever its gradient; B starts at zero.
        arrays = load_arrays(run.checkpoint(1) / "adapter_model.safetensors")
        moved = np.concatenate([np.abs(value).reshape(-1) for name, value in arrays.items() if "lora_B" in name])
        assert moved.max() == pytest.approx(0.0025, rel=1e-3)

    def test_same_plan_same_numbers(self, lab: Lab) -> None:
        plan = lab.plan(lora__dropout=0.2, train__max_steps=3)
        assert numbers(lab.train(plan)) == numbers(lab.train(plan))
        other = lab.train(lab.plan(lora__dropout=0.2, train__max_steps=3, train__seed=1))
        assert column(other, "loss").tolist() != column(lab.train(plan), "loss").tolist()

    def test_dropout_drops(self, lab: Lab) -> None:
        plain, dropped = (column(lab.train(lab.plan(lora__dropout=p)), "loss") for p in (0.0, 0.5))
        assert plain[0] == pytest.approx(dropped[0], rel=1e-6), "B is zero in the first step"
        assert np.abs(plain[1:] - dropped[1:]).max() > 1e-4

    def test_checkpointing_drops_the_same_twice(self, lab: Lab) -> None:
        """A recomputed layer that drops other elements gives gradients of another function, and no error."""
        runs = [
            lab.train(lab.plan(lora__dropout=0.4, train__max_steps=4, train__gradient_checkpointing=on))
            for on in (False, True)
        ]
        for name in ("loss", "grad_norm"):
            plain, again = (column(run, name) for run in runs)
            assert again == pytest.approx(plain, rel=1e-5)

    def test_clipping(self, lab: Lab) -> None:
        """The norm that is reported is the one before clipping; with Adam clipping shows from the second step on."""
        free, tight = (lab.train(lab.plan(train__max_grad_norm=most)) for most in (1e9, 1e-3))
        assert column(free, "grad_norm")[0] == pytest.approx(column(tight, "grad_norm")[0], rel=1e-6)
        assert column(free, "grad_norm")[0] > 1e-3

    @pytest.mark.parametrize(
        "lora", [{"rslora": True}, {"dora": True}, {"targets": ["q_proj", "down_proj"]}, {"last_layers": 1}]
    )
    def test_kinds_of_adapters(self, lab: Lab, lora: dict[str, Any]) -> None:
        plan = lab.plan(train__max_steps=12, lora={"r": 4, "alpha": 8, **lora})
        run = lab.train(plan)
        losses = column(run, "loss")
        assert np.isfinite(losses).all() and losses[-3:].mean() < losses[:3].mean()
        arrays = load_arrays(run.adapter / "adapter_model.safetensors")
        wanted = {name: value.shape for name, value in initial_adapter(plan).items()}
        if plan.recipe.lora.dora:
            wanted |= {f"base_model.model.{n}.lora_magnitude_vector": (out,) for n, (_, out) in plan.targets.items()}
        assert {name: value.shape for name, value in arrays.items()} == wanted
        assert sum(value.size for value in arrays.values()) == plan.num_trainable


class TestInvariance:
    """Settings that must share one loss trajectory."""

    def losses(self, lab: Lab, few_rows: Path, **changes: Any) -> np.ndarray[Any, Any]:
        plan = lab.plan(data__train=str(few_rows), train__max_steps=5, **changes)
        assert plan.train.steps_per_epoch == 1
        run = lab.train(plan)
        assert column(run, "num_supervised")[-1] == 5 * plan.train.store.supervised.sum()
        return np.stack([column(run, "loss"), column(run, "grad_norm")])

    def test_micro_batches(self, lab: Lab, few_rows: Path) -> None:
        """The mean is over the supervised tokens of the step, never a mean of means."""
        whole = self.losses(lab, few_rows)
        for size, accumulation in ((2, 2), (1, 4), (3, 2), (8, 1), (4, 3)):
            cut = self.losses(lab, few_rows, train__batch_size=size, train__accumulation=accumulation)
            assert cut == pytest.approx(whole, rel=2e-5), f"{size} x {accumulation}"

    def test_packing(self, lab: Lab, few_rows: Path) -> None:
        """Documents behind each other in one row do not see each other."""
        apart = self.losses(lab, few_rows)
        packed = self.losses(lab, few_rows, data__packing="on", train__batch_size=1)
        assert packed == pytest.approx(apart, rel=2e-5)

    def test_gradient_checkpointing(self, lab: Lab, few_rows: Path) -> None:
        plain = self.losses(lab, few_rows)
        assert self.losses(lab, few_rows, train__gradient_checkpointing=True) == pytest.approx(plain, rel=1e-6)

    def test_compiling(self, lab: Lab, few_rows: Path) -> None:
        plain = self.losses(lab, few_rows)
        assert self.losses(lab, few_rows, train__compile=True) == pytest.approx(plain, rel=1e-5)


class TestFiles:
    def test_metrics(self, lab: Lab) -> None:
        plan = lab.plan(data__validation_share=0.2, eval__every=2, train__max_steps=4)
        run = lab.train(plan)
        rows = read_metrics(run)
        assert [(row["step"], row["kind"]) for row in rows] == [
            (1, "step"), (2, "step"), (2, "eval"), (3, "step"), (4, "step"), (4, "eval"),
        ]  # fmt: skip
        for row in rows:
            if row["kind"] == "step":
                assert set(row) - {"accuracy"} == {
                    "step", "kind", "loss", "learning_rate", "grad_norm", "num_tokens", "num_supervised", "epoch",
                    "seconds", "tokens_per_second", "samples_per_second", "peak_bytes",
                }  # fmt: skip
            else:
                assert set(row) == {"step", "kind", "val_loss", "val_perplexity", "val_accuracy", "best"}
                assert row["val_perplexity"] == pytest.approx(math.exp(row["val_loss"]))
        counts = [plan.train.step_tokens(k) for k in range(4)]
        assert column(run, "num_supervised").tolist() == np.cumsum([c[0] for c in counts]).tolist()
        with (run.path / "metrics.csv").open() as file:
            assert len(list(csv.DictReader(file))) == len(rows)

    def test_accuracy_is_a_share_of_targets(self, lab: Lab) -> None:
        accuracies = column(lab.train(lab.plan(train__max_steps=60)), "accuracy")
        assert (accuracies >= 0).all() and (accuracies <= 1).all() and accuracies.max() > 0

    def test_run_folder(self, lab: Lab) -> None:
        plan = lab.plan(train__max_steps=2, samples__prompts=["red apple", "blue"], samples__max_tokens=5)
        run = lab.train(plan)
        names = {path.name for path in run.path.iterdir()}
        assert {
            "recipe.yaml", "plan.json", "env.json", "metrics.jsonl", "metrics.csv", "samples.md", "report.json", "adapter",
        } <= names  # fmt: skip
        assert run.done and run.read_json("report.json")["steps"] == 2
        assert run.read_json("env.json")["backend"] == lab.name
        samples = run.read_json("samples.json")
        assert len(samples["before"]) == len(samples["after"]) == 2
        assert "red apple" in (run.path / "samples.md").read_text()
        config = json.loads((run.adapter / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and config["r"] == 4
        assert {"adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
            p.name for p in run.adapter.iterdir()
        }

    def test_checkpoints_know_no_engine(self, lab: Lab) -> None:
        plan = lab.plan(save__every=2)
        run = lab.train(plan)
        last = run.last_checkpoint()
        assert last is not None
        assert sorted(p.name for p in last.iterdir()) == [
            "adapter_model.safetensors",
            "optimizer.safetensors",
            "state.json",
        ]
        wanted = {name: value.shape for name, value in initial_adapter(plan).items()}
        weights, moments = load_arrays(last / "adapter_model.safetensors"), load_arrays(last / "optimizer.safetensors")
        assert {name: value.shape for name, value in weights.items()} == wanted
        assert {name: value.shape for name, value in moments.items()} == {
            f"{name}.{kind}": shape for name, shape in wanted.items() for kind in ("exp_avg", "exp_avg_sq")
        }
        assert all((value >= 0).all() for name, value in moments.items() if name.endswith("_sq"))

    def test_keep_last(self, lab: Lab) -> None:
        run = lab.train(lab.plan(save__every=1, save__keep_last=2))
        assert [path.name for path in run.list_checkpoints()] == ["000005", "000006"]


class TestEvaluation:
    def test_is_token_weighted_over_all_rows(self, lab: Lab) -> None:
        """The same number as scoring the left adapter row by row."""
        plan = lab.plan(data__validation_share=0.3, eval__every="end", train__max_steps=4, eval__keep_best=False)
        run = lab.train(plan)
        assert plan.validation is not None
        batches = list(plan.validation.evaluation())
        assert len(batches) > 1
        nats = tokens = right = 0.0
        for batch, score in zip(batches, lab.generator(plan, run.adapter).score(batches), strict=True):
            nats -= float((score.log_probs * batch.weights).sum())
            right += float((score.correct * batch.weights).sum())
            tokens += batch.num_supervised
        assert tokens == plan.validation.store.supervised.sum()
        (row,) = numbers(run, "eval")
        assert row["val_loss"] == pytest.approx(nats / tokens, rel=1e-5)
        assert row["val_accuracy"] == right / tokens

    def test_does_not_disturb_training(self, lab: Lab) -> None:
        plain = lab.train(lab.plan(data__validation_share=0.3, eval__every="end", lora__dropout=0.1))
        often = lab.train(lab.plan(data__validation_share=0.3, eval__every=1, lora__dropout=0.1))
        assert numbers(plain, "step") == numbers(often, "step")

    @pytest.fixture
    def contrary(self, tmp_path: Path) -> dict[str, Any]:
        """Validation rows that hold what the train rows never say: their loss falls with the format, then rises."""
        rows = {"train": ("red green blue", "red"), "validation": ("red green blue", "stone river stone river")}
        for name, (prompt, completion) in rows.items():
            row = json.dumps({"prompt": prompt, "completion": completion}) + "\n"
            (tmp_path / f"{name}.jsonl").write_text(row * 8)
        return {
            "data__train": str(tmp_path / "train.jsonl"), "data__validation": str(tmp_path / "validation.jsonl"),
            "train__learning_rate": 0.05, "train__schedule": "constant", "eval__every": 1,
        }  # fmt: skip

    def test_best_is_left_behind(self, lab: Lab, contrary: dict[str, Any]) -> None:
        plan = lab.plan(**contrary, train__max_steps=12)
        run = lab.train(plan)
        losses = column(run, "val_loss", "eval")
        report = run.read_json("report.json")
        assert losses.argmin() < len(losses) - 1, "the recipe of this test should overshoot"
        assert (report["best_step"], report["best_val_loss"]) == (losses.argmin() + 1, losses.min())
        nats = tokens = 0.0
        assert plan.validation is not None
        batches = list(plan.validation.evaluation())
        for batch, score in zip(batches, lab.generator(plan, run.adapter).score(batches), strict=True):
            nats -= float((score.log_probs * batch.weights).sum())
            tokens += batch.num_supervised
        assert nats / tokens == pytest.approx(losses.min(), rel=1e-5)

    def test_early_stopping(self, lab: Lab, contrary: dict[str, Any]) -> None:
        run = lab.train(lab.plan(**contrary, eval__patience=2, train__max_steps=40))
        report = run.read_json("report.json")
        assert report["stopped_early"] and report["steps"] == report["best_step"] + 2 < 40


class TestFailure:
    def test_loss_that_is_not_a_number(self, lab: Lab) -> None:
        plan = lab.plan(train__learning_rate=1e30, train__schedule="constant", save__every=1)
        run = lab.start(plan)
        with pytest.raises(RunError, match=r"Lower train\.learning_rate"):
            lab.train(plan, run)
        assert all(math.isfinite(row["loss"]) for row in read_metrics(run))
        assert not run.done and not run.adapter.exists()
        assert run.last_checkpoint() is not None

    def test_validation_loss_that_is_not_a_number(self, lab: Lab) -> None:
        """The last step may ruin the weights after its own loss was still a number."""
        if lab.name == "toy":
            pytest.skip("numpy raises where a number overflows")
        evaluation = {"data__validation_share": 0.3, "eval__every": 1}
        plan = lab.plan(train__learning_rate=3e37, train__schedule="constant", train__max_steps=1, **evaluation)
        run = lab.start(plan)
        with pytest.raises(RunError, match=r"validation loss is nan[^$]*Lower train\.learning_rate"):
            lab.train(plan, run)
        assert not run.done and not run.adapter.exists() and not (run.checkpoints / "best").exists()


class TestFullTraining:
    def test_loss_falls_and_the_model_is_left_behind(self, lab: Lab) -> None:
        needs(lab, "methods", "full")
        plan = lab.plan(train__method="full", train__learning_rate=3e-3, train__max_steps=20)
        run = lab.train(plan)
        losses = column(run, "loss")
        assert losses[-4:].mean() < losses[:4].mean() - 0.5
        arrays = load_arrays(run.model / "model.safetensors")
        assert {name: value.shape for name, value in arrays.items()} == plan.model.shapes

    def test_pretraining_from_a_config(self, lab: Lab, text_rows: Path, tiny_model: Path) -> None:
        needs(lab, "methods", "full")
        config = json.loads((tiny_model / "config.json").read_text())
        plan = lab.plan(
            stage="pretrain", model={"config": config, "tokenizer": str(tiny_model), "dtype": "float32"},
            data={"train": str(text_rows), "max_length": 32}, train__method="full", train__max_steps=8,
        )  # fmt: skip
        run = lab.train(plan)
        losses = column(run, "loss")
        # It has overshot or it has learned, but it began at the loss of a model that knows nothing.
        assert losses[0] == pytest.approx(math.log(320), abs=1.0) and losses[-1] < losses[0]

    def test_weight_decay_spares_norms(self, lab: Lab) -> None:
        """With a gradient clipped to nothing only decay moves weights, and norms stay where they were."""
        needs(lab, "methods", "full")
        changes = {"train__method": "full", "train__max_steps": 1, "train__schedule": "constant"}
        runs = [
            lab.train(lab.plan(**changes, train__weight_decay=decay, train__learning_rate=1e-3)) for decay in (0.0, 0.5)
        ]
        plain, decayed = (load_arrays(run.model / "model.safetensors") for run in runs)
        start = load_arrays(lab.plan().model.folder / "model.safetensors")
        for name, value in plain.items():
            if value.ndim == 1:
                assert np.array_equal(value, decayed[name]), name
            else:
                assert decayed[name] - value == pytest.approx(-0.5e-3 * start[name], abs=1e-6), name


class TestPrecision:
    def test_every_dtype_it_names(self, lab: Lab) -> None:
        for dtype in lab.choice.backend.capabilities(lab.choice.device).dtypes:
            run = lab.train(lab.plan(model__dtype=dtype, train__max_steps=2))
            assert np.isfinite(column(run, "loss")).all(), dtype
            arrays = load_arrays(run.adapter / "adapter_model.safetensors")
            assert any(value.any() for name, value in arrays.items() if "lora_B" in name), dtype

    @pytest.mark.parametrize("quantize", ["4bit", "8bit"])
    def test_quantized_base(self, lab: Lab, engine: str, chat_rows: Path, tmp_path: Path, quantize: str) -> None:
        needs(lab, "quantize", quantize)
        model = make_tiny(tmp_path / "wide", hidden_size=64, intermediate_size=128)
        wide = make_lab(engine, model, chat_rows, tmp_path)
        plain = column(wide.train(wide.plan(train__max_steps=20)), "loss")
        coarse = column(wide.train(wide.plan(train__max_steps=20, model__quantize=quantize)), "loss")
        assert 0 < abs(plain[0] - coarse[0]) < 0.5
        assert coarse[-3:].mean() < coarse[:3].mean()

    def test_base_that_cannot_be_quantized_is_refused(self, lab: Lab) -> None:
        """Widths of 32 fill no group of 64; leaving such layers as they are would drop the setting silently."""
        needs(lab, "quantize", "4bit")
        with pytest.raises(Exception, match="quantize"):
            lab.train(lab.plan(model__quantize="4bit", train__max_steps=1))


class TestMixedPrecision:
    def test_products_are_rounded_and_weights_are_not(self, lab: Lab, text_rows: Path) -> None:
        changes = {"stage": "pretrain", "data__train": str(text_rows), "train__method": "full", "train__max_steps": 3}
        if lab.name == "toy":
            with pytest.raises(RecipeError, match="no bfloat16"):
                lab.plan(train__mixed_precision=True, **changes)
            return
        plain = lab.train(lab.plan(**changes))
        for piecewise in (False, True):
            extra = {"train__gradient_checkpointing": piecewise}
            mixed = lab.train(lab.plan(train__mixed_precision=True, **changes, **extra))
            assert column(mixed, "loss") == pytest.approx(column(plain, "loss"), rel=1e-2)
            assert column(mixed, "grad_norm") == pytest.approx(column(plain, "grad_norm"), rel=5e-2)
            assert (column(mixed, "loss") != column(plain, "loss")).all()
        weights = load_arrays(mixed.path / "model" / "model.safetensors")
        # Weights kept in bfloat16 would have its 8 bits.
        assert any((array.view(np.uint32) & 0xFFFF).any() for array in weights.values())
