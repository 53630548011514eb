"""Answers and scores of the bigram model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from smolmlx.backend import Completion, Decoding, FloatArray, OnText, Score
from smolmlx.data.batches import Batch
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import RecipeError
from smolmlx.generation.batching import Batcher, Feed, run_all
from smolmlx.generation.sampling import Picks, choose
from smolmlx.models import BaseModel, check_adapter_folder, check_base
from smolmlx.plan import PEFT_PREFIX
from smolmlx.session import Arrays, load_arrays
from toy_engine.model import Bigram
from toy_engine.trainer import flat


class ToyGenerator:
    """A base model with at most one adapter."""

    def __init__(self, model: BaseModel, adapter: Path | None, tokenizer: Tokenizer) -> None:
        self.base, self.tokenizer = model, tokenizer
        self.use_adapter(adapter)

    def batcher(self, batch_size: int) -> Batcher:
        return Batcher(ToySteps(self.model), self.tokenizer, batch_size)

    def use_adapter(self, adapter: Path | None) -> None:
        self.model = Bigram(self.base.folder, {}, 1.0, False)
        if adapter is not None:
            check_base(self.base, adapter)
            self.model = Bigram(self.base.folder, *read_adapter(adapter, self.base))

    def generate(
        self, prompts: Sequence[Sequence[int]], how: Decoding, on_text: OnText | None = None
    ) -> Iterator[Completion]:
        yield from run_all(self.batcher(how.batch_size), prompts, how, on_text)

    def score(self, batches: Iterable[Batch]) -> Iterator[Score]:
        for batch in batches:
            nats, correct = self.model.losses(*flat(batch))
            yield Score(-nats, correct)

    def logits(self, ids: Sequence[int]) -> FloatArray:
        return self.model.logits(np.array(ids))[0]


def read_adapter(folder: Path, model: BaseModel) -> tuple[Arrays, float, bool]:
    """Return (arrays, scale, dora) of a PEFT adapter folder.

    Raises:
        RecipeError: not an adapter, or made for another base.
    """
    config = check_adapter_folder(folder)
    arrays = load_arrays(folder / "adapter_model.safetensors")
    shapes = model.linear_shapes()
    for name, value in arrays.items():
        path, _, leaf = name.removeprefix(PEFT_PREFIX).partition(".lora_")
        if path not in shapes or (leaf == "A.weight" and value.shape[1] != shapes[path][0]):
            raise RecipeError(f"{folder}: made for another base model: it adapts {path} as {value.shape}.")
    rank = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
    return arrays, config["lora_alpha"] / rank, bool(config["use_dora"])


class ToySteps:
    """Steps of a model that looks at one token: there is nothing to keep."""

    most = None

    def __init__(self, model: Bigram) -> None:
        self.model = model

    @property
    def num_words(self) -> int:
        return (self.model.logits(np.array([0]))[0].shape[-1] + 31) // 32

    def open(self, num_places: int, prefix: Sequence[int]) -> None: ...
    def admit(self, places: Sequence[int], prompts: Sequence[Sequence[int]]) -> None: ...
    def release(self, place: int) -> None: ...
    def grow(self, num_places: int) -> None: ...
    def keep(self, places: Sequence[int]) -> None: ...

    def step(self, feed: Feed, picks: Callable[[], Picks]) -> list[int]:
        last = [tokens if isinstance(tokens, int) else (tokens[-1] if tokens else 0) for tokens in feed]
        return [int(token) for token in choose(self.model.logits(np.array(last))[0], picks())]

    def read(self, tokens: list[int]) -> list[int]:
        return tokens
