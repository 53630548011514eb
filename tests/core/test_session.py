"""Every decision about a run that is not arithmetic: when to score, save and stop, what is best, what is refused."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_plan import Paper

from smolmlx import rundir
from smolmlx.backend import Choice
from smolmlx.errors import RecipeError, RunError
from smolmlx.plan import Plan, resolve
from smolmlx.recipe import build
from smolmlx.session import Arrays, Event, Session, StepResult, read_metrics, read_state, save_arrays, write_csv


class Counter:
    """An engine whose one weight counts its steps."""

    def __init__(self) -> None:
        self.value = 0
        self.loaded: tuple[Arrays, Arrays | None, int] | None = None

    def weights(self) -> Arrays:
        return {"w": np.full((2,), self.value, np.float32)}

    def optimizer(self) -> Arrays:
        return {f"w.{kind}": np.full((2,), -self.value, np.float32) for kind in ("exp_avg", "exp_avg_sq")}

    def load(self, weights: Arrays, optimizer: Arrays | None, step: int) -> None:
        self.loaded = (weights, optimizer, step)
        self.value = int(next(iter(weights.values())).flat[0])


Make = Callable[..., Session]


@pytest.fixture
def make(tiny_model: Path, chat_rows: Path, tmp_path: Path) -> Make:
    """A function that makes a session in one run folder; later calls go on with it."""

    def session(
        resume: bool = False, on_event: Callable[[Event], None] = lambda event: None, **changes: Any
    ) -> Session:
        tree: dict[str, Any] = {
            "model": {"id": str(tiny_model)},
            "data": {"train": str(chat_rows), "validation_share": 0.25, "packing": "off"},
            "train": {"batch_size": 4, "max_steps": 10, "epochs": 10, "learning_rate": 1e-3},
            "eval": {"every": 1},
        }
        for section, values in changes.items():
            tree[section] = {**tree.get(section, {}), **values}
        plan: Plan = resolve(build(tree, source="r.yaml", folder=tmp_path), Choice(Paper(), None, "asked for"))  # type: ignore[arg-type]
        run = rundir.RunDir(tmp_path / "run")
        run.path.mkdir(exist_ok=resume)
        made = Session(plan, run, on_event)
        made.attach(Counter())
        return made

    return session


def walk(session: Session, steps: int, losses: list[float] | None = None) -> None:
    """Take steps the way an engine does; `losses` are those of the evaluations."""
    engine = session._engine
    assert isinstance(engine, Counter)
    for k in range(steps):
        if not session.wants_step:
            return
        engine.value += 1
        session.record_step(StepResult(5.0 - 0.1 * session.state.step, 1.0, 3, 1000))
        if session.wants_eval:
            session.record_eval((losses[k] if losses else 1.0) * 10, 10, 5)
        if session.wants_checkpoint:
            session.save_checkpoint()


def test_weights_that_are_not_numbers_are_not_kept(make: Make) -> None:
    session = make(eval={"every": 5})
    walk(session, 1)
    session.save_checkpoint()
    engine = session._engine
    assert isinstance(engine, Counter)
    engine.weights = lambda: {"w": np.array([1.0, np.inf], np.float32)}  # type: ignore[method-assign]
    kept = session.run.last_checkpoint()
    for keep in (session.save_checkpoint, session.final_weights, lambda: session.record_eval(1.0, 1, 1)):
        with pytest.raises(RunError, match=r"weights are no longer numbers[^$]*Lower train\.learning_rate"):
            keep()
    assert session.run.last_checkpoint() == kept and not (session.run.checkpoints / "best").exists()


def test_rows_of_metrics(make: Make) -> None:
    events: list[Event] = []
    session = make(on_event=events.append)
    walk(session, 2)
    rows = read_metrics(session.run)
    assert [(row["step"], row["kind"]) for row in rows] == [(1, "step"), (1, "eval"), (2, "step"), (2, "eval")]
    assert [(event.step, event.kind) for event in events] == [(1, "step"), (1, "eval"), (2, "step"), (2, "eval")]
    plan, step, scored = session.plan, rows[2], rows[3]
    counts = [plan.train.step_tokens(k) for k in range(2)]
    assert step["num_supervised"] == sum(supervised for supervised, _ in counts)
    assert step["num_tokens"] == sum(tokens for _, tokens in counts)
    assert step["learning_rate"] == plan.learning_rates[1]
    assert step["accuracy"] == 3 / counts[1][0]
    assert step["epoch"] == 2 / plan.train.steps_per_epoch
    assert {"loss", "grad_norm", "seconds", "tokens_per_second", "samples_per_second", "peak_bytes"} <= set(step)
    assert rows[0]["samples_per_second"] * rows[0]["seconds"] == pytest.approx(4)
    assert sum(len(plan.train.step_documents(k)) for k in range(plan.train.steps_per_epoch)) == len(plan.train.store)
    assert scored["val_loss"] == 1.0 and scored["val_perplexity"] == math.e and scored["val_accuracy"] == 0.5


def test_evaluation_is_token_weighted(make: Make) -> None:
    """2.0 over 10 tokens and 1.0 over 30 are 1.25."""
    session = make()
    walk(session, 1)
    session.record_eval(2.0 * 10 + 1.0 * 30, 40, 20)
    assert session.state.best_loss == 1.0
    assert read_metrics(session.run)[-1]["val_loss"] == 1.25


def test_best_weights_are_left_behind(make: Make) -> None:
    session = make()
    walk(session, 4, [3.0, 1.0, 2.0, 1.5])
    assert (session.state.best_loss, session.state.best_step, session.state.bad_evals) == (1.0, 2, 2)
    assert session.final_weights()["w"].tolist() == [2, 2]


def test_last_weights_when_asked(make: Make) -> None:
    session = make(eval={"keep_best": False})
    walk(session, 4, [3.0, 1.0, 2.0, 1.5])
    assert session.final_weights()["w"].tolist() == [4, 4]
    assert not (session.run.checkpoints / "best").exists()


def test_patience(make: Make) -> None:
    session = make(eval={"patience": 2})
    walk(session, 10, [3.0, 1.0, 2.0, 0.9, 2.0, 1.0, 0.1])
    assert session.state.stopped and session.state.step == 6 and not session.wants_step


def test_equal_loss_is_no_improvement(make: Make) -> None:
    session = make(eval={"patience": 2})
    walk(session, 10, [1.0] * 10)
    assert session.state.step == 3


def test_checkpoints_and_keep_last(make: Make) -> None:
    session = make(save={"every": 2, "keep_last": 2})
    walk(session, 10)
    assert [path.name for path in session.run.list_checkpoints()] == ["000008", "000010"]
    last = session.run.last_checkpoint()
    assert last is not None
    assert sorted(path.name for path in last.iterdir()) == [
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert read_state(last) == session.state


def test_resume_brings_everything_back(make: Make) -> None:
    first = make(save={"every": 2}, eval={"patience": 5})
    walk(first, 5, [3.0, 2.0, 2.5, 2.4, 1.0])
    again = make(resume=True, save={"every": 2}, eval={"patience": 5})
    engine = again._engine
    assert isinstance(engine, Counter) and engine.loaded is not None
    weights, optimizer, step = engine.loaded
    assert (
        weights["w"].tolist() == [4, 4]
        and optimizer is not None
        and optimizer["w.exp_avg"].tolist() == [-4, -4]
        and step == 4
    )
    assert (again.state.step, again.state.best_loss, again.state.best_step, again.state.bad_evals) == (4, 2.0, 2, 2)
    # Step 5 will be taken again, so its rows are gone.
    assert [row["step"] for row in read_metrics(again.run)] == [1, 1, 2, 2, 3, 3, 4, 4]
    walk(again, 6)
    assert [row["step"] for row in read_metrics(again.run) if row["kind"] == "step"] == list(range(1, 11))


def test_half_a_line_is_dropped(make: Make) -> None:
    session = make(save={"every": 2})
    walk(session, 2)
    with session.run.metrics.open("a") as file:
        file.write('{"step": 3, "kind": "st')
    assert len(read_metrics(session.run)) == 4
    again = make(resume=True, save={"every": 2})
    walk(again, 1)
    assert [row["step"] for row in read_metrics(again.run) if row["kind"] == "step"] == [1, 2, 3]


def test_half_a_checkpoint_is_not_one(make: Make) -> None:
    session = make(save={"every": 2})
    walk(session, 4)
    (session.run.checkpoint(4) / "state.json").unlink()
    assert make(resume=True, save={"every": 2}).state.step == 2


def test_broken_checkpoint_is_named(make: Make) -> None:
    session = make(save={"every": 2})
    walk(session, 4)
    state = json.loads((session.run.checkpoint(4) / "state.json").read_text())
    path = session.run.checkpoint(4) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(RunError, match=r"000004.*Delete this checkpoint folder to go on from the one before"):
        make(resume=True, save={"every": 2})
    (session.run.checkpoint(4) / "state.json").write_text("{")
    for broken in ("{", "[]", json.dumps({**state, "step": "4"}), json.dumps({**state, "step": -1})):
        (session.run.checkpoint(4) / "state.json").write_text(broken)
        with pytest.raises(RunError, match=r"state\.json is broken"):
            make(resume=True, save={"every": 2})
    (session.run.checkpoint(4) / "state.json").write_text(json.dumps({**state, "step": 99}))
    with pytest.raises(RunError, match=r"state\.json says step 99, and the run has 10"):
        make(resume=True, save={"every": 2})


def test_moments_that_are_missing_are_not_made_up(make: Make) -> None:
    session = make(save={"every": 2})
    walk(session, 4)
    save_arrays({"w.exp_avg": np.zeros(2, np.float32)}, session.run.checkpoint(4) / "optimizer.safetensors")
    with pytest.raises(RunError, match=r"optimizer\.safetensors lacks the moments of w \(1 such weights\)"):
        make(resume=True, save={"every": 2})


def test_checkpoint_of_another_plan(make: Make) -> None:
    session = make(save={"every": 2})
    (session.run.path / "recipe.yaml").write_text(json.dumps(session.plan.recipe.model_dump(mode="json")))
    walk(session, 4)
    with pytest.raises(RecipeError, match=r"another plan: train\.learning_rate was .*, is 0\.0005\..*leave out --set"):
        make(resume=True, train={"learning_rate": 5e-4})


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_loss_that_is_not_a_number(make: Make, loss: float, norm: float) -> None:
    session = make(save={"every": 1})
    walk(session, 2)
    with pytest.raises(RunError, match=r"step 3: the loss is .* Lower train.learning_rate") as caught:
        session.record_step(StepResult(loss, norm))
    assert "000002" in str(caught.value), "the checkpoint that is left is named"
    assert read_metrics(session.run)[-1]["step"] == 2


def test_interruption_asks_for_one_checkpoint(make: Make) -> None:
    session = make()
    walk(session, 2)
    assert not session.wants_checkpoint
    session.interrupted = True
    assert session.wants_checkpoint and not session.wants_step
    session.save_checkpoint()
    assert not session.wants_checkpoint
    assert [path.name for path in session.run.list_checkpoints()] == ["000002"]


def test_csv_has_every_column(make: Make) -> None:
    session = make()
    walk(session, 3)
    write_csv(session.run)
    with (session.run.path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and rows[0]["loss"] == "5.0" and rows[0]["val_loss"] == "" and rows[1]["val_loss"] == "1.0"


def test_state_of_a_newer_version_is_refused(make: Make) -> None:
    session = make(save={"every": 2})
    walk(session, 2)
    path = session.run.checkpoint(2) / "state.json"
    tree = json.loads(path.read_text())
    del tree["bad_evals"]
    path.write_text(json.dumps(tree))
    with pytest.raises(RunError, match="bad_evals"):
        make(resume=True, save={"every": 2})


class TestRunDir:
    def test_publish_replaces_whole_folders(self, tmp_path: Path) -> None:
        target = tmp_path / "out"
        for text in ("one", "two"):
            with rundir.publish(target) as folder:
                (folder / text).write_text(text)
                assert not (target / text).exists()
        assert [path.name for path in target.iterdir()] == ["two"]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_failed_publish_leaves_the_old(self, tmp_path: Path) -> None:
        target = tmp_path / "out"
        with rundir.publish(target) as folder:
            (folder / "one").touch()
        with pytest.raises(KeyError), rundir.publish(target) as folder:
            raise KeyError
        assert [path.name for path in target.iterdir()] == ["one"]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_place_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(RunError, match="choose another folder"):
            rundir.create("r", tmp_path / "file" / "runs")
        with pytest.raises(RunError, match="cannot write"):
            rundir.write_text(tmp_path / "file" / "x", "text")

    def test_names(self, tmp_path: Path) -> None:
        run = rundir.create("notes", tmp_path)
        assert run.path.name.startswith("notes-2") and len(run.path.name) == len("notes-20250101-120000-abcd")
        assert not run.done
        run.write_json("report.json", {"a": 1})
        assert run.done and run.read_json("report.json") == {"a": 1}
        with pytest.raises(RunError, match="missing"):
            run.read_json("other.json")
