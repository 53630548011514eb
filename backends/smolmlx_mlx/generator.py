"""Batched generation and scoring through mlx-lm's continuous batch generator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from smolmlx import memory
from smolmlx.backend import Completion, Decoding, FloatArray, Loading, Score
from smolmlx.data.batches import Batch
from smolmlx.data.chat import Tokenizer
from smolmlx.models import BaseModel
from smolmlx_mlx import device as devices
from smolmlx_mlx.device import mx as mx
from smolmlx_mlx.losses import Losses, to_inputs
from smolmlx_mlx.memory import ran_out
from smolmlx_mlx.model import load_adapter, load_base


class MlxGenerator:
    """A base model with at most one adapter, ready to answer and to score."""

    def __init__(self, model: BaseModel, adapter: Path | None, tokenizer: Tokenizer, how: Loading) -> None:
        device = devices.use(how.device)
        dtype = how.dtype if how.dtype != "auto" else ("bfloat16" if device == "gpu" else "float32")
        self.tokenizer = tokenizer
        self.quantize = how.quantize != "4bit"
        with memory.guard(ran_out, lambda: memory.loading(model.name, self.quantize)):
            self.model = load_base(model.folder, model.config, dtype, how.quantize)
            if adapter is not None:
                load_adapter(self.model, adapter)
        self.model.eval()

    def generate(self, prompts: Sequence[Sequence[int]], how: Decoding) -> Iterator[Completion]:
        """Answer prompts in batches; each row's random numbers depend on (seed, row) alone."""
        from mlx_lm.generate import BatchGenerator

        stops = how.stop_ids or self.tokenizer.eos_ids
        with memory.guard(ran_out, lambda: memory.answering(prompts, how, self.quantize)), devices.limits():
            # On a CPU the generator must run on the default stream: its own is bound to the first device seen.
            generator = BatchGenerator(
                self.model,
                max_tokens=how.max_tokens,
                stop_tokens=[[stop] for stop in stops],
                completion_batch_size=how.batch_size,
                prefill_batch_size=min(8, how.batch_size),
                stream=mx.default_stream(mx.default_device()),
            )
            samplers = [_sampler(how, row) for row in range(len(prompts))]
            uids = generator.insert([list(prompt) for prompt in prompts], samplers=samplers)
            rows = {uid: row for row, uid in enumerate(uids)}
            answers: dict[int, list[int]] = {uid: [] for uid in uids}
            try:
                while responses := generator.next_generated():
                    for response in responses:
                        if response.finish_reason != "stop":
                            answers[response.uid].append(int(response.token))
                        if response.finish_reason is not None:
                            yield Completion(
                                rows[response.uid], tuple(answers.pop(response.uid)), response.finish_reason == "stop"
                            )
            finally:
                generator.close()

    def score(self, batches: Iterable[Batch]) -> Iterator[Score]:
        losses = Losses(self.model)
        for batch in batches:
            ids, segments, index, labels, _ = to_inputs(batch)
            with memory.guard(ran_out, partial(memory.scoring, len(batch.ids), batch.ids.shape[1], self.quantize)):
                nats, correct = (np.array(found) for found in losses.positions(ids, segments, index, labels))
            yield Score(-nats, correct)

    def logits(self, ids: Sequence[int]) -> FloatArray:
        return np.array(self.model(mx.array([list(ids)]))[0].astype(mx.float32))


def _sampler(how: Decoding, row: int) -> Any:
    """Return a function from [1, V] log-probabilities to a token."""
    if how.temperature == 0:
        return lambda logprobs: mx.argmax(logprobs, axis=-1)
    key = [mx.random.key(int(np.random.SeedSequence([how.seed, row]).generate_state(1, np.uint64)[0]))]

    def sample(logprobs: mx.array) -> mx.array:
        key[0], now = mx.random.split(key[0])
        scaled = logprobs / how.temperature
        if how.top_p < 1:
            order = mx.argsort(-scaled, axis=-1)
            probabilities = mx.take_along_axis(mx.softmax(scaled, axis=-1), order, axis=-1)
            outside = mx.cumsum(probabilities, axis=-1) - probabilities >= how.top_p
            scaled = mx.put_along_axis(
                mx.zeros_like(scaled),
                order,
                mx.where(outside, -mx.inf, mx.take_along_axis(scaled, order, axis=-1)),
                axis=-1,
            )
        return mx.random.categorical(scaled, key=now)

    return sample
