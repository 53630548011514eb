"""A run that was stopped at any moment and resumed gives the numbers of one that never was, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lab import Lab, numbers, stop_at
from smolmlx import rundir, stages
from smolmlx.errors import RecipeError
from smolmlx.session import Event, read_state

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"lora__dropout": 0.3},
    "dropout, accumulated": {"lora__dropout": 0.3, "train__accumulation": 3},
    "dropout, packed": {"lora__dropout": 0.3, "data__packing": "on", "train__batch_size": 2},
    "dora": {"lora__dora": True, "lora__rslora": True},
    "decay, constant": {"train__weight_decay": 0.1, "train__schedule": "constant", "train__warmup": 3},
    "full": {"train__method": "full", "train__learning_rate": 1e-3, "train__weight_decay": 0.1},
}
LONG = {"train__max_steps": 10, "data__validation_share": 0.2, "eval__every": 3}


class Killed(BaseException):
    """Stands for the power going off."""


def kill_at(kind: str, step: int) -> stages.OnEvent:
    def on_event(event: Event) -> None:
        if (event.kind, event.step) == (kind, step):
            raise Killed

    return on_event


def result(run: rundir.RunDir) -> bytes:
    (path,) = [*run.path.glob("adapter/adapter_model.safetensors"), *run.path.glob("model/model.safetensors")]
    return path.read_bytes()


def test_interrupted_in_the_last_step(lab: Lab) -> None:
    """It is whole then, but nothing that would follow is wanted: not its evaluation, nor the next run of a sweep."""
    plan = lab.plan(train__max_steps=3)
    run = lab.start(plan)
    with pytest.raises(stages.Interrupted, match=r"after step 3, the last; .* is trained"):
        lab.train(plan, run, stop_at(3))
    assert run.done and result(run) == result(lab.train(plan))


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_and_resumed(lab: Lab, kind: str) -> None:
    changes = {**LONG, **KINDS[kind]}
    if (
        changes.get("train__method") == "full"
        and "full" not in lab.choice.backend.capabilities(lab.choice.device).methods
    ):
        pytest.skip(f"{lab.name} trains no whole models")
    plan = lab.plan(**changes)
    whole = lab.train(plan)
    cut = lab.start(plan)
    with pytest.raises(stages.Interrupted) as caught:
        lab.train(plan, cut, stop_at(4))
    assert caught.value.run == cut and "after step 4" in str(caught.value)
    assert [path.name for path in cut.list_checkpoints()] == ["000004"] and not cut.done
    # A second sitting that is stopped as well, from a plan that was made anew as another process would.
    with pytest.raises(stages.Interrupted):
        lab.train(lab.plan(**changes), cut, stop_at(7))
    lab.train(lab.plan(**changes), cut)
    assert numbers(cut) == numbers(whole)
    assert result(cut) == result(whole)
    reports = [run.read_json("report.json") for run in (cut, whole)]
    timed = ("seconds", "tokens_per_second", "samples_per_second", "peak_bytes")
    assert {k: v for k, v in reports[0].items() if k not in timed} == {
        k: v for k, v in reports[1].items() if k not in timed
    }


@pytest.mark.parametrize("when", [("step", 5), ("eval", 6), ("checkpoint", 6), ("step", 10), ("eval", 10)], ids=str)
def test_killed_at_any_moment(lab: Lab, when: tuple[str, int]) -> None:
    changes = {**LONG, "lora__dropout": 0.2, "save__every": 2}
    plan = lab.plan(**changes)
    whole = lab.train(plan)
    cut = lab.start(plan)
    with pytest.raises(Killed):
        lab.train(plan, cut, kill_at(*when))
    lab.train(lab.plan(**changes), cut)
    assert numbers(cut) == numbers(whole)
    assert result(cut) == result(whole)


def test_killed_before_the_first_checkpoint(lab: Lab) -> None:
    plan = lab.plan()
    whole = lab.train(plan)
    cut = lab.start(plan)
    with pytest.raises(Killed):
        lab.train(plan, cut, kill_at("step", 3))
    lab.train(plan, cut)
    assert numbers(cut) == numbers(whole)


def test_early_stop_survives(lab: Lab, tmp_path: Path) -> None:
    """The count of evaluations without progress is part of a checkpoint."""
    for name, answer in (("train", "red"), ("validation", "stone river stone river")):
        row = json.dumps({"prompt": "red green blue", "completion": answer}) + "\n"
        (tmp_path / f"{name}.jsonl").write_text(row * 8)
    changes: dict[str, Any] = {
        "data__train": str(tmp_path / "train.jsonl"), "data__validation": str(tmp_path / "validation.jsonl"),
        "train__learning_rate": 0.05, "train__schedule": "constant", "train__max_steps": 40, "eval__every": 1, "eval__patience": 3,
    }  # fmt: skip
    plan = lab.plan(**changes)
    whole = lab.train(plan)
    report = whole.read_json("report.json")
    assert report["stopped_early"]
    cut = lab.start(plan)
    with pytest.raises(stages.Interrupted):
        lab.train(plan, cut, stop_at(report["best_step"] + 2))
    last = cut.last_checkpoint()
    assert last is not None and read_state(last).bad_evals == 2
    lab.train(plan, cut)
    assert numbers(cut) == numbers(whole) and result(cut) == result(whole)


def test_plan_of_another_run_is_refused(lab: Lab) -> None:
    plan = lab.plan(**LONG)
    cut = lab.start(plan)
    with pytest.raises(stages.Interrupted):
        lab.train(plan, cut, stop_at(2))
    with pytest.raises(RecipeError, match=r"another plan: train\.seed was 0, is 3"):
        lab.train(lab.plan(**LONG, train__seed=3), cut)


def test_checkpoint_holds_state_moments_and_weights_of_one_step(lab: Lab) -> None:
    plan = lab.plan(save__every=2, save__keep_last=9)
    run = lab.train(plan)
    from smolmlx.session import load_arrays

    for path in run.list_checkpoints():
        assert read_state(path).step == int(path.name)
        moments = load_arrays(path / "optimizer.safetensors")
        assert any(np.abs(value).max() > 0 for value in moments.values())
