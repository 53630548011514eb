"""Batched generation and scoring with transformers' models.

The decoding loop is ours: rows come and go as they finish, and a sampled row depends on (seed, row) alone, which
`model.generate` cannot promise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from smolmlx.backend import Completion, Decoding, FloatArray, Loading, OnText, Score
from smolmlx.data.batches import Batch
from smolmlx.data.chat import Tokenizer
from smolmlx.generation.batching import Batcher, run_all
from smolmlx.models import BaseModel, check_base
from smolmlx_cuda.engine import pick_device
from smolmlx_cuda.model import Adapters, Losses, load_base, to_inputs
from smolmlx_cuda.steps import TorchSteps

EAGER_ONLY = ("gemma2",)
"""Models whose capped attention transformers offers in its own code alone."""


class TorchGenerator:
    """A base model with at most one adapter at a time, ready to answer and to score."""

    def __init__(self, model: BaseModel, adapter: Path | None, tokenizer: Tokenizer, how: Loading) -> None:
        self.device = pick_device(how.device)
        dtype = how.dtype if how.dtype != "auto" else ("bfloat16" if self.device == "cuda" else "float32")
        self.tokenizer = tokenizer
        attention = "eager" if model.config.get("model_type") in EAGER_ONLY else "sdpa"
        self.base = model
        self._adapters = Adapters(load_base(model.folder, dtype, self.device, how.quantize, attention))
        self.use_adapter(adapter)

    def use_adapter(self, adapter: Path | None) -> None:
        if adapter is not None:
            check_base(self.base, adapter)
        self.model = self._adapters.use(adapter)
        self.model.eval()
        self._steps: TorchSteps | None = None

    def batcher(self, batch_size: int) -> Batcher:
        self._steps = self._steps or TorchSteps(self.model)
        return Batcher(self._steps, self.tokenizer, batch_size)

    def generate(
        self, prompts: Sequence[Sequence[int]], how: Decoding, on_text: OnText | None = None
    ) -> Iterator[Completion]:
        with torch.no_grad():
            batcher = self.batcher(how.batch_size)
        yield from run_all(batcher, prompts, how, on_text)

    def score(self, batches: Iterable[Batch]) -> Iterator[Score]:
        losses = Losses(self.model)
        for batch in batches:
            with torch.no_grad():
                nats, correct = losses.positions({k: v.to(self.device) for k, v in to_inputs(batch).items()})
            yield Score(-nats.cpu().numpy(), correct.cpu().numpy())

    def logits(self, ids: Sequence[int]) -> FloatArray:
        with torch.no_grad():
            found: FloatArray = (
                self.model(torch.tensor([list(ids)], device=self.device)).logits[0].float().cpu().numpy()
            )
        return found
