"""Batched generation and scoring with mlx-lm's models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import numpy as np

from smolmlx import memory
from smolmlx.backend import Completion, Decoding, FloatArray, Loading, OnText, Score
from smolmlx.data.batches import Batch
from smolmlx.data.chat import Tokenizer
from smolmlx.generation.batching import Batcher, run_all
from smolmlx.models import BaseModel, check_base
from smolmlx_mlx import device as devices
from smolmlx_mlx.device import mx as mx
from smolmlx_mlx.losses import Losses, to_inputs
from smolmlx_mlx.memory import ran_out
from smolmlx_mlx.model import Adapters, load_base
from smolmlx_mlx.steps import MlxSteps


class MlxGenerator:
    """A base model with at most one adapter at a time, ready to answer and to score."""

    def __init__(self, model: BaseModel, adapter: Path | None, tokenizer: Tokenizer, how: Loading) -> None:
        device = devices.use(how.device)
        dtype = how.dtype if how.dtype != "auto" else ("bfloat16" if device == "gpu" else "float32")
        self.tokenizer = tokenizer
        self.quantize = device == "gpu" and how.quantize != "4bit"  # a CPU holds the values whole
        self.base = model
        with memory.guard(ran_out, lambda: memory.loading(model.name, self.quantize)):
            self.model = load_base(model.folder, model.config, dtype, how.quantize)
            self._adapters = Adapters(self.model, model)
            self.use_adapter(adapter)

    def use_adapter(self, adapter: Path | None) -> None:
        if adapter is not None:
            check_base(self.base, adapter)
        self._adapters.use(adapter)
        self.model.eval()
        self._steps: MlxSteps | None = None

    def batcher(self, batch_size: int) -> Batcher:
        self._steps = self._steps or MlxSteps(self.model)
        return Batcher(self._steps, self.tokenizer, batch_size, self._guard)

    def _guard(self, prompts: Sequence[Sequence[int]], how: Decoding) -> AbstractContextManager[None]:
        return memory.guard(ran_out, lambda: memory.answering(prompts, how, self.quantize))

    def generate(
        self, prompts: Sequence[Sequence[int]], how: Decoding, on_text: OnText | None = None
    ) -> Iterator[Completion]:
        with devices.limits():
            yield from run_all(self.batcher(how.batch_size), prompts, how, on_text)

    def score(self, batches: Iterable[Batch]) -> Iterator[Score]:
        losses = Losses(self.model)
        for batch in batches:
            ids, segments, index, labels, _ = to_inputs(batch)
            with memory.guard(ran_out, partial(memory.scoring, len(batch.ids), batch.ids.shape[1], self.quantize)):
                nats, correct = (np.array(found) for found in losses.positions(ids, segments, index, labels))
            yield Score(-nats, correct)

    def logits(self, ids: Sequence[int]) -> FloatArray:
        return np.array(self.model(mx.array([list(ids)]))[0].astype(mx.float32))
