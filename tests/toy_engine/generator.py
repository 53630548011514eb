"""Answers and scores of the bigram model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from smolmlx.backend import Completion, Decoding, FloatArray, Score
from smolmlx.data.batches import Batch
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import RecipeError
from smolmlx.models import BaseModel
from smolmlx.plan import PEFT_PREFIX
from smolmlx.session import Arrays, load_arrays
from toy_engine.model import Bigram
from toy_engine.trainer import flat


class ToyGenerator:
    """A base model with at most one adapter."""

    def __init__(self, model: BaseModel, adapter: Path | None, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.base = model
        self.switch(adapter)

    def switch(self, adapter: Path | None) -> None:
        arrays: Arrays = {}
        scale, dora = 1.0, False
        if adapter is not None:
            arrays, scale, dora = read_adapter(adapter, self.base)
        self.model = Bigram(self.base.folder, arrays, scale, dora)

    def generate(self, prompts: Sequence[Sequence[int]], how: Decoding) -> Iterator[Completion]:
        stops = set(how.stop_ids or self.tokenizer.eos_ids)
        for row, prompt in enumerate(prompts):
            rng = np.random.default_rng([how.seed, row])
            answer: list[int] = []
            token = prompt[-1]
            while len(answer) < how.max_tokens:
                token = choose(self.model.logits(np.array([token]))[0][0], how, rng)
                if token in stops:
                    break
                answer.append(token)
            yield Completion(row, tuple(answer), token in stops)

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
    if not (folder / "adapter_config.json").is_file():
        raise RecipeError(f"{folder}: not an adapter folder (needs adapter_config.json and adapter_model.safetensors).")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    arrays = load_arrays(folder / "adapter_model.safetensors")
    shapes = model.linear_shapes()
    for name, value in arrays.items():
        path, _, leaf = name.removeprefix(PEFT_PREFIX).partition(".lora_")
        if path not in shapes or (leaf == "A.weight" and value.shape[1] != shapes[path][0]):
            raise RecipeError(f"{folder}: made for another base model: it adapts {path} as {value.shape}.")
    rank = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
    return arrays, config["lora_alpha"] / rank, bool(config["use_dora"])


def choose(logits: FloatArray, how: Decoding, rng: np.random.Generator) -> int:
    """Return the next token: logits [V]."""
    if how.temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / how.temperature
    probabilities = np.exp(scaled - scaled.max())
    order = np.argsort(-probabilities)
    kept = probabilities[order] / probabilities.sum()
    kept[np.cumsum(kept) - kept >= how.top_p] = 0
    return int(rng.choice(order, p=kept / kept.sum()))
