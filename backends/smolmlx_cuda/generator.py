"""Batched generation and scoring with transformers' models.

The decoding loop is ours: rows come and go as they finish, and a sampled row depends on (seed, row) alone, which
`model.generate` cannot promise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch

from smolmlx import memory
from smolmlx.backend import Completion, Decoding, FloatArray, Loading, OnText, Score
from smolmlx.data.batches import Batch
from smolmlx.data.chat import Tokenizer
from smolmlx.generation.batching import Batcher, run_all
from smolmlx.models import BaseModel, check_base
from smolmlx_cuda.engine import pick_device, refuse_mlx_weights
from smolmlx_cuda.memory import ran_out
from smolmlx_cuda.model import Adapters, Losses, load_base, to_inputs
from smolmlx_cuda.steps import TorchSteps

EAGER_ONLY = ("gemma2",)
"""Models whose capped attention transformers offers in its own code alone."""


class TorchGenerator:
    """A base model with at most one adapter at a time, ready to answer and to score."""

    def __init__(self, model: BaseModel, adapter: Path | None, tokenizer: Tokenizer, how: Loading) -> None:
        refuse_mlx_weights(model, "--quantize 4bit")
        self.device = pick_device(how.device)
        dtype = how.dtype if how.dtype != "auto" else ("bfloat16" if self.device == "cuda" else "float32")
        self.tokenizer = tokenizer
        attention = "eager" if model.config.get("model_type") in EAGER_ONLY else "sdpa"
        # On a CPU there is no quantized base to advise.
        self.quantize = self.device == "cuda" and how.quantize != "4bit"
        self.base = model
        with memory.guard(ran_out, lambda: memory.loading(model.name, self.quantize)):
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
        return Batcher(self._steps, self.tokenizer, batch_size, self._guard)

    def _guard(self, prompts: Sequence[Sequence[int]], how: Decoding) -> AbstractContextManager[None]:
        return memory.guard(ran_out, lambda: memory.answering(prompts, how, self.quantize))

    def generate(
        self, prompts: Sequence[Sequence[int]], how: Decoding, on_text: OnText | None = None
    ) -> Iterator[Completion]:
        with torch.no_grad():
            batcher = self.batcher(how.batch_size)
        yield from run_all(batcher, prompts, how, on_text)

    def score(self, batches: Iterable[Batch]) -> Iterator[Score]:
        losses = Losses(self.model)
        for batch in batches:
            advice = partial(memory.scoring, len(batch.ids), batch.ids.shape[1], self.quantize)
            with memory.guard(ran_out, advice), torch.no_grad():
                nats, correct = losses.positions({k: v.to(self.device) for k, v in to_inputs(batch).items()})
            yield Score(-nats.cpu().numpy(), correct.cpu().numpy())

    def logits(self, ids: Sequence[int]) -> FloatArray:
        with torch.no_grad():
            found: FloatArray = (
                self.model(torch.tensor([list(ids)], device=self.device)).logits[0].float().cpu().numpy()
            )
        return found
