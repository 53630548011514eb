"""Loggers by name: never imported unasked, refused with their pip line where missing, and fed every step."""

from __future__ import annotations

import signal
import struct
import subprocess
import sys
import types
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

import lab as labs
from smolmlx import loggers
from smolmlx.errors import BackendError, RecipeError, RunError
from smolmlx.rundir import RunDir
from smolmlx.session import Event, read_metrics
from smolmlx.stages import Interrupted

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"wandb": "wandb", "trackio": "trackio", "tensorboard": "tensorboardX"}
"""Name -> what pip installs for it."""


def hide(patch: pytest.MonkeyPatch) -> None:
    """Make every package of a logger look as if it were not installed."""
    for module in (*NAMES, "tensorboardX", "torch.utils.tensorboard"):
        patch.setitem(sys.modules, module, None)


def test_none_is_imported_unasked() -> None:
    code = "import sys, smolmlx.stages, smolmlx.loggers; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not set(loaded.split()) & {*NAMES, "tensorboardX", "torch"}


def stand_in(name: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Install a service that keeps what it is told, and return that."""
    told: list[Any] = []

    class Opened:
        def log(self, values: Mapping[str, float], step: int) -> None:
            told.append((step, values))

        def finish(self) -> None:
            told.append("finished")

    def init(**given: Any) -> Opened:
        told.append(given)
        return Opened()

    hide(monkeypatch)
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    return told


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_one_is_refused_with_its_pip_line(
    name: str, tiny_model: Path, chat_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch)
    with labs.toy_installed():
        lab = labs.make_lab("toy", tiny_model, chat_rows, tmp_path)
        with pytest.raises(RecipeError, match=f"'{name}' is not installed: pip install {NAMES[name]}"):
            lab.plan(loggers=[name])
    with pytest.raises(BackendError, match=f"'{name}' is not installed: pip install {NAMES[name]}"):
        loggers.open_loggers([name], RunDir(tmp_path), {})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_get_the_plan_and_every_step(
    name: str, tiny_model: Path, chat_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have one interface, init, log and finish; a stand-in here, since neither may talk to a network."""
    told = stand_in(name, monkeypatch)
    with labs.toy_installed():
        lab = labs.make_lab("toy", tiny_model, chat_rows, tmp_path)
        run = lab.train(lab.plan(loggers=[name], train__max_steps=3))
    opened, *logged, last = told
    assert (opened["project"], opened["name"]) == ("smolmlx", run.path.name) and opened["config"]["steps"] == 3
    rows = [row for row in read_metrics(run) if row["kind"] == "step"]
    steps = [(step, values["loss"]) for step, values in logged if "loss" in values]
    assert steps == [(row["step"], row["loss"]) for row in rows] and len(steps) == 3 and last == "finished"
    assert (run.path / "metrics.csv").is_file()


@pytest.mark.parametrize("how", ["failed", "interrupted"])
def test_services_are_closed_when_a_run_does_not_end_well(
    how: str, tiny_model: Path, chat_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = stand_in("wandb", monkeypatch)

    def stop(event: Event) -> None:
        if event.kind == "step" and event.step == 2:
            if how == "failed":
                raise RunError("the loss is not a number")
            signal.raise_signal(signal.SIGINT)

    with labs.toy_installed():
        lab = labs.make_lab("toy", tiny_model, chat_rows, tmp_path)
        made = lab.plan(loggers=["wandb"], train__max_steps=3)
        with pytest.raises(RunError if how == "failed" else Interrupted):
            lab.train(made, on_event=stop)
    assert told[-1] == "finished" and told.count("finished") == 1


def test_tensorboard_files_hold_every_number(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    from tensorboardX.proto.event_pb2 import Event

    ((log, close),) = loggers.open_loggers(["tensorboard"], RunDir(tmp_path), {})
    for step in (1, 2):
        log(step, {"loss": 3.0 - step})
    close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, found = path.read_bytes(), []
    while data:  # TFRecord: length, its checksum, the event, its checksum
        (length,) = struct.unpack_from("<Q", data)
        event = Event.FromString(data[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    assert found == [(1, "loss", 2.0), (2, "loss", 1.0)]


def test_numbers_leave_out_what_no_chart_shows() -> None:
    values = {"loss": 1.5, "step": 3, "best": True, "note": "x", "lost": None}
    assert loggers.numbers(values) == {"loss": 1.5, "step": 3.0}
