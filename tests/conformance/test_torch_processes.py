"""More than one GPU or process under the PyTorch engine; what a machine here can show of it."""

from __future__ import annotations

from typing import Any

import pytest

import lab as labs
from lab import Lab
from smolmlx.errors import BackendError


@pytest.fixture(scope="module")
def engine() -> str:
    if (reason := labs.why_missing("cuda")) is not None:
        pytest.skip(reason)
    return "cuda"


def test_one_gpu_of_several(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer wraps a model in DataParallel and doubles the micro-batch where it counts two GPUs."""
    from smolmlx_cuda import trainer

    monkeypatch.setattr(trainer.Engine, "_arguments", counting(trainer.Engine._arguments))
    run = lab.train(lab.plan(train__max_steps=2))
    assert run.read_json("report.json")["steps"] == 2


def counting(arguments: Any) -> Any:
    def two(*given: Any) -> Any:
        made = arguments(*given)
        made._n_gpu = 2
        assert made.train_batch_size == 2
        return made

    return two


def test_processes_are_refused_while_planning(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    lab.plan()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BackendError, match="launched as 2 processes") as caught:
        lab.plan()
    assert caught.value.exit_code == 3
