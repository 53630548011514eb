"""What the MLX peers have in common: they share mlx-lm's batches, callbacks and model classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from job import Recorder, load_blas

load_blas()

import mlx.core as mx  # noqa: E402 - after the BLAS
from mlx_lm.tuner.callbacks import TrainingCallback  # noqa: E402


def stub_metal() -> None:
    """Let mlx-lm-lora (5.10.2) ask for Metal's limits, which it does unguarded, where there is no Metal."""
    if not mx.metal.is_available():
        mx.device_info = mx.metal.device_info = lambda *_: {"max_recommended_working_set_size": 0}
        mx.set_wired_limit = lambda limit: limit


class Watch(TrainingCallback):  # type: ignore[misc]
    """Hands every reported step to the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self.recorder.end_step(train_info["train_loss"])


def mean_targets(rows: Any) -> float:
    """Return how many targets a row of an mlx-lm data set has.

    Its mask runs from the first answer token to one position behind the last: a pad target a row.
    """
    return sum(len(ids) - start + 1 for ids, start in (rows[i] for i in range(len(rows)))) / len(rows)


def counted(recorder: Recorder, batches: Iterator[Any]) -> Iterator[Any]:
    """Pass mlx-lm's batches on and note what each one holds."""
    for ids, spans in batches:
        width = ids.shape[1] - 1
        targets = sum(min(end, width) - start + 1 for start, end in spans.tolist())
        recorder.add_batch(sum(end for _, end in spans.tolist()), targets, ids.shape)
        yield ids, spans


def held_out_loss(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Return mean nats per supervised token, row by row without padding."""
    model.eval()
    total, count = 0.0, 0
    for row in rows:
        logits = model(mx.array([row["ids"][:-1]]))[0].astype(mx.float32)  # [T, V]
        targets = mx.array(row["ids"][1:])
        nats = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        total += float((nats * mx.array(row["mask"][1:])).sum().item())
        count += sum(row["mask"][1:])
    return total / count
