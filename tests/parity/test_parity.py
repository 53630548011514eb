"""One plan, two engines, one curve; and a run begun on one is finished on the other (design/numerics.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from measure import CASES, DPO_CASES, LIMITS, LOGITS, PAIR, Bench, apart

from lab import column, numbers, why_missing
from smolmlx import models, rundir
from smolmlx.session import load_arrays

pytestmark = pytest.mark.skipif(
    any(why_missing(engine) for engine in PAIR),
    reason="; ".join(filter(None, map(why_missing, PAIR))) or "both engines are here",
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize("case", CASES)
def test_same_curve(bench: Bench, case: str) -> None:
    ours, theirs = (bench.run(engine, case) for engine in PAIR)
    figures = apart(ours, theirs)
    least = 0.05 if case in DPO_CASES else 0.5  # a preference loss begins near ln 2
    assert figures.last < figures.first - least, "nothing was learned, so nothing was compared"
    assert figures.loss <= LIMITS["loss"] and figures.mean <= LIMITS["mean"] and figures.norm <= LIMITS["norm"]
    assert figures.val <= LIMITS["loss"]
    if case in DPO_CASES:
        for name in ("chosen_logp", "rejected_logp"):
            assert column(ours, name) == pytest.approx(column(theirs, name), rel=1e-5, abs=1e-4)
    # What is decided before an engine starts is the same to the last bit.
    for name in ("learning_rate", "num_tokens", "num_supervised", "epoch"):
        assert column(ours, name).tolist() == column(theirs, name).tolist()


def moments(run: rundir.RunDir) -> dict[str, np.ndarray[Any, Any]]:
    """Return the first moments behind the first step: a tenth of its gradient."""
    arrays = load_arrays(run.checkpoint(1) / "optimizer.safetensors")
    return {name: value for name, value in arrays.items() if name.endswith(".exp_avg")}


class TestGradients:
    """Element by element, on the documents of one step."""

    changes = {  # noqa: RUF012 - read only
        "train__max_steps": 1, "train__max_grad_norm": 1e9, "save__every": 1, "train__batch_size": 8, "data__limit": 8,
        "eval__every": "epoch", "data__validation_share": 0.0,
    }  # fmt: skip

    def gradient(self, bench: Bench, engine: str, **changes: Any) -> dict[str, np.ndarray[Any, Any]]:
        lab = bench.lab(engine)
        plan = lab.plan(**{**self.changes, **changes})
        assert plan.steps == 1 and plan.train.step_tokens(0)[0] == plan.train.store.supervised.sum(), (
            "all documents in one step"
        )
        return moments(lab.train(plan))

    def close(self, a: dict[str, np.ndarray[Any, Any]], b: dict[str, np.ndarray[Any, Any]]) -> None:
        assert set(a) == set(b)
        largest = max(float(np.abs(value).max()) for value in a.values())
        assert largest > 1e-3
        for name, value in a.items():
            assert np.abs(value - b[name]).max() < 2e-6 * max(1.0, largest), name

    @pytest.mark.parametrize("method", ["lora", "full"])
    def test_engines_agree(self, bench: Bench, method: str) -> None:
        self.close(*(self.gradient(bench, engine, train__method=method) for engine in PAIR))

    @pytest.mark.parametrize("engine", PAIR)
    @pytest.mark.parametrize("method", ["lora", "full"])
    def test_packed_equals_apart(self, bench: Bench, engine: str, method: str) -> None:
        packed = {"data__packing": "on", "data__max_length": 128, "train__batch_size": 4, "train__method": method}
        self.close(self.gradient(bench, engine, train__method=method), self.gradient(bench, engine, **packed))

    @pytest.mark.parametrize("engine", PAIR)
    def test_accumulated_equals_whole(self, bench: Bench, engine: str) -> None:
        cut = self.gradient(bench, engine, train__batch_size=2, train__accumulation=4)
        self.close(self.gradient(bench, engine), cut)


class TestHandOver:
    @pytest.mark.parametrize("first", PAIR)
    @pytest.mark.parametrize(
        "case",
        [
            "SFT, LoRA",
            "SFT, DoRA",
            "SFT, LoRA, packed, accumulation 4",
            "pretraining, all weights",
            "pretraining, Muon",
            "DPO, prompts shared",
        ],
    )
    def test_finished_on_the_other_engine(self, bench: Bench, first: str, case: str) -> None:
        second = next(engine for engine in PAIR if engine != first)
        run = bench.hand_over(case, 9, first, second)
        whole = bench.run(second, case)
        assert [row["step"] for row in numbers(run, "step")] == [row["step"] for row in numbers(whole, "step")]
        figures = apart(run, whole)
        assert figures.loss <= LIMITS["loss"] and figures.mean <= LIMITS["mean"] and figures.norm <= LIMITS["norm"]


class TestLogits:
    """An adapter trained on either engine means the same on both."""

    ids = [1, 87, 85, 298, 201, 268, 275, 281, 2, 201, 1, 290, 270, 12, 99, 300, 17]  # noqa: RUF012 - read only

    def check(self, bench: Bench, model: models.BaseModel, adapter: Path | None) -> np.ndarray[Any, Any]:
        ours, theirs = (bench.logits(engine, model, adapter, self.ids) for engine in PAIR)
        assert np.abs(ours - theirs).max() < LOGITS
        return ours

    @pytest.mark.parametrize("engine", PAIR)
    @pytest.mark.parametrize(
        "lora", [{}, {"dora": True}, {"rslora": True, "alpha": 7}, {"targets": ["q_proj"], "last_layers": 1}], ids=str
    )
    def test_adapter(self, bench: Bench, engine: str, lora: dict[str, Any]) -> None:
        lab = bench.lab(engine)
        run = lab.train(lab.plan(train__max_steps=15, lora={"r": 4, "alpha": 8, **lora}))
        model = models.open_model(bench.model)
        base, tuned = self.check(bench, model, None), self.check(bench, model, run.adapter)
        assert np.abs(tuned - base).max() > 0.05

    @pytest.mark.parametrize("engine", PAIR)
    def test_adapter_on_a_real_model(self, bench: Bench, assets: Path, engine: str) -> None:
        lab = bench.lab(engine)
        folder = assets / "models/stories260k"
        plan = lab.plan(
            model={"id": str(folder), "chat_template": "plain", "dtype": "float32"}, data__max_length=256,
            data__train=str(assets / "data/taskmaster_messages.jsonl"), data__limit=40, train__max_steps=10, train__learning_rate=2e-3,
        )  # fmt: skip
        run = lab.train(plan)
        base, tuned = (self.check(bench, plan.model, adapter) for adapter in (None, run.adapter))
        assert np.abs(tuned - base).max() > 0.05

    @pytest.mark.parametrize("engine", PAIR)
    def test_whole_model(self, bench: Bench, engine: str) -> None:
        run = bench.run(engine, "pretraining, all weights, accumulation 4")
        self.check(bench, models.open_model(run.model), None)

    @pytest.mark.parametrize(
        "rope",
        [
            {"rope_type": "default", "rope_theta": 100.0},
            {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        ],
        ids=["theta", "scaling"],
    )
    def test_rope_that_only_transformers_reads(self, bench: Bench, tmp_path: Path, rope: dict[str, Any]) -> None:
        """A config saved by transformers 5 holds it in rope_parameters alone; mlx-lm would silently take its defaults."""
        folder = tmp_path / "model"
        plain = models.open_model(bench.model)
        folder.mkdir()
        for path in bench.model.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        config = {**plain.config, "rope_parameters": rope}
        del config["rope_theta"]
        (folder / "config.json").write_text(json.dumps(config))
        other = self.check(bench, models.open_model(folder), None)
        assert np.abs(other - self.check(bench, plain, None)).max() > 0.01

    def test_untied_head(self, bench: Bench, tmp_path: Path) -> None:
        from lab import make_tiny

        self.check(bench, models.open_model(make_tiny(tmp_path / "model", tie_word_embeddings=False)), None)
