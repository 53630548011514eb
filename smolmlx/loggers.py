"""Experiment loggers by name. metrics.jsonl and metrics.csv are always written; these are extra, and never imported unasked."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from smolmlx.errors import BackendError
from smolmlx.plan import LOGGER_PACKAGES
from smolmlx.rundir import RunDir

Log = Callable[[int, Mapping[str, float]], None]


def open_loggers(names: Sequence[str], run: RunDir, config: Mapping[str, Any]) -> list[tuple[Log, Callable[[], None]]]:
    """Return (log, close) for each named logger.

    Raises:
        BackendError: its package is not installed.
    """
    return [_open(name, run, config) for name in names]


def _open(name: str, run: RunDir, config: Mapping[str, Any]) -> tuple[Log, Callable[[], None]]:
    try:
        if name == "tensorboard":
            return _tensorboard(run)
        module = importlib.import_module(name)
    except ImportError as error:
        raise BackendError(f"loggers: '{name}' is not installed: pip install {LOGGER_PACKAGES[name][0]}.") from error
    # wandb and trackio share one interface: init, log, finish.
    opened = module.init(project="smolmlx", name=run.path.name, config=dict(config))
    return (lambda step, values: opened.log(dict(values), step=step)), opened.finish


def _tensorboard(run: RunDir) -> tuple[Log, Callable[[], None]]:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:  # torch is heavy, and not there with the MLX engine
        from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(str(run.path / "tensorboard"))

    def log(step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return log, writer.close


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Keep what a chart can show."""
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
