"""Batched generation and scoring with transformers' models and key-value cache.

Our own decoding loop: rows leave the batch as they finish, and a sampled row depends on (seed, row) alone, which
`model.generate` cannot promise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from smolmlx import memory
from smolmlx.backend import Completion, Decoding, FloatArray, Loading, Score
from smolmlx.data.batches import Batch
from smolmlx.data.chat import Tokenizer
from smolmlx.models import BaseModel
from smolmlx_cuda.engine import pick_device
from smolmlx_cuda.memory import ran_out
from smolmlx_cuda.model import Losses, load_adapter, load_base, to_inputs

EAGER_ONLY = ("gemma2",)
"""Models whose capped attention transformers offers in its own code alone."""


class TorchGenerator:
    """A base model with at most one adapter, ready to answer and to score."""

    def __init__(self, model: BaseModel, adapter: Path | None, tokenizer: Tokenizer, how: Loading) -> None:
        self.device = pick_device(how.device)
        dtype = how.dtype if how.dtype != "auto" else ("bfloat16" if self.device == "cuda" else "float32")
        self.tokenizer = tokenizer
        attention = "eager" if model.config.get("model_type") in EAGER_ONLY else "sdpa"
        # On a CPU there is no quantized base to advise.
        self.quantize = self.device == "cuda" and how.quantize != "4bit"
        with memory.guard(ran_out, lambda: memory.loading(model.name, self.quantize)):
            self.model = load_base(model.folder, dtype, self.device, how.quantize, attention)
            if adapter is not None:
                self.model = load_adapter(self.model, adapter)
        self.model.eval()

    def generate(self, prompts: Sequence[Sequence[int]], how: Decoding) -> Iterator[Completion]:
        """Answer prompts in batches of like length."""
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        with memory.guard(ran_out, lambda: memory.answering(prompts, how, self.quantize)):
            for start in range(0, len(order), how.batch_size):
                rows = order[start : start + how.batch_size]
                with torch.no_grad():
                    yield from self._batch(rows, [prompts[row] for row in rows], how)

    def _batch(self, rows: list[int], prompts: Sequence[Sequence[int]], how: Decoding) -> Iterator[Completion]:
        stops = set(how.stop_ids or self.tokenizer.eos_ids)
        width = max(map(len, prompts))
        ids = torch.tensor([[self.tokenizer.pad_id] * (width - len(p)) + list(p) for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        generators = [torch.Generator().manual_seed(_seed(how.seed, row)) for row in rows]
        answers: list[list[int]] = [[] for _ in rows]
        alive = list(range(len(rows)))
        cache = None
        for _ in range(how.max_tokens):
            out = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            chosen = [_choose(row, how, generators[i]) for i, row in zip(alive, out.logits[:, -1].float(), strict=True)]
            keep = [place for place, token in enumerate(chosen) if token not in stops]
            for place, token in enumerate(chosen):
                if token in stops:
                    yield Completion(rows[alive[place]], tuple(answers[alive[place]]), True)
                else:
                    answers[alive[place]].append(token)
            if not keep:
                return
            if len(keep) < len(alive):
                select = torch.tensor(keep, device=self.device)
                cache.batch_select_indices(select)
                mask, positions = mask[select], positions[select]
                alive = [alive[place] for place in keep]
            ids = torch.tensor([[chosen[place]] for place in keep], device=self.device)
            mask = torch.cat([mask, mask.new_ones(len(keep), 1)], dim=1)
            positions = positions[:, -1:] + 1
        for i in alive:
            yield Completion(rows[i], tuple(answers[i]), False)

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


def _seed(seed: int, row: int) -> int:
    return int(np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0] >> 1)


def _choose(logits: torch.Tensor, how: Decoding, generator: torch.Generator) -> int:
    """Return the next token of one row: logits [V]."""
    if how.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.cpu() / how.temperature, dim=-1)
    if how.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        ordered[ordered.cumsum(0) - ordered >= how.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered)
    return int(torch.multinomial(probabilities, 1, generator=generator))
