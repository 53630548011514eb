"""The bigram model and its gradient.

S positions, D width of the model, I and O the sides of a linear layer, R rank, V vocabulary.
    x = E[id]                                                       [S, D]
    h = x + sum over the n layers of W' x / sqrt(n)                 each cut or padded to the layer's I and back to D
    logits = h E^T                                                  [S, V]
W' is W + scale B A, or with DoRA m W' / |W'| by rows, the norm taken as a constant (Liu et al. 2024, section 4.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from smolmlx.plan import PEFT_PREFIX
from smolmlx.session import Arrays, load_arrays

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.integer[Any]]
_A, _B, _M = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"


def fit(x: Floats, width: int) -> Floats:
    """Cut or zero-pad the last axis to `width`."""
    if x.shape[-1] >= width:
        return x[..., :width]
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


@dataclass(frozen=True)
class Dropout:
    """Dropout on what an adapter sees, drawn from `rng`; None of it when scoring."""

    share: float
    rng: np.random.Generator

    def __call__(self, x: Floats) -> Floats:
        kept = self.rng.random(x.shape, np.float32) >= self.share
        return x * kept / np.float32(1 - self.share)


class Bigram:
    """The frozen base and its adapter, under PEFT's names."""

    def __init__(self, folder: Path, adapter: Arrays, scale: float, dora: bool) -> None:
        base = {
            name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_arrays(path).items()
        }
        self.embedding: Floats = base["model.embed_tokens.weight"]
        self.linear: dict[str, Floats] = {
            name.removesuffix(".weight"): value
            for name, value in base.items()
            if ".layers." in name and value.ndim == 2
        }
        self.share = np.float32(len(self.linear) ** -0.5)
        self.scale, self.dora = np.float32(scale), dora
        self.adapter: Arrays = dict(adapter)
        if dora:
            for name in self.adapted:
                key = f"{PEFT_PREFIX}{name}.{_M}"
                self.adapter.setdefault(key, np.linalg.norm(self._merged(name), axis=1).astype(np.float32))

    @cached_property
    def adapted(self) -> tuple[str, ...]:
        """Paths of the layers that have an adapter."""
        return tuple(
            sorted(
                {name.removeprefix(PEFT_PREFIX).removesuffix(f".{_A}") for name in self.adapter if name.endswith(_A)}
            )
        )

    def _leaf(self, name: str, leaf: str) -> Floats:
        return self.adapter[f"{PEFT_PREFIX}{name}.{leaf}"]

    def _merged(self, name: str) -> Floats:
        return self.linear[name] + self.scale * self._leaf(name, _B) @ self._leaf(name, _A)

    def _row_factor(self, name: str) -> Floats:
        """[O, 1]; m / |W'| with DoRA."""
        merged = self._merged(name)
        return (self._leaf(name, _M) / np.linalg.norm(merged, axis=1))[:, None].astype(np.float32)

    def _apply(self, name: str, x: Floats, seen: Floats) -> Floats:
        """Return [S, O]; `seen` [S, I] is what the adapter sees of x."""
        y = x @ self.linear[name].T
        if name not in self.adapted:
            return y
        y = y + self.scale * (seen @ self._leaf(name, _A).T) @ self._leaf(name, _B).T
        return y * self._row_factor(name).T if self.dora else y

    def logits(self, ids: Ints, dropout: Dropout | None = None) -> tuple[Floats, dict[str, tuple[Floats, Floats]]]:
        """Return [S, V], and for each adapted layer its input and what its adapter saw of it."""
        x = self.embedding[ids]
        total, inputs = np.zeros_like(x), {}
        for name, weight in self.linear.items():
            entry = fit(x, weight.shape[1])
            seen = dropout(entry) if dropout and name in self.adapted else entry
            inputs[name] = (entry, seen)
            total += fit(self._apply(name, entry, seen), x.shape[1])
        hidden = x + total * self.share
        return hidden @ self.embedding.T, {name: inputs[name] for name in self.adapted}

    def losses(self, ids: Ints, labels: Ints, dropout: Dropout | None = None) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Return nats and correctness of each position: [S], [S]."""
        return _nats(self.logits(ids, dropout)[0], labels)

    def gradients(
        self, ids: Ints, labels: Ints, weights: Floats, dropout: Dropout | None
    ) -> tuple[float, int, Mapping[str, Floats]]:
        """Return (nats, correct, gradient of the nats) summed over positions of weight 1."""
        logits, inputs = self.logits(ids, dropout)
        nats, correct = _nats(logits, labels)
        slope = np.exp(logits - logits.max(axis=1, keepdims=True))
        slope /= slope.sum(axis=1, keepdims=True)
        slope[np.arange(len(labels)), labels] -= 1
        back = (slope * weights[:, None]) @ self.embedding * self.share  # [S, D]
        found: dict[str, Floats] = {}
        for name in self.adapted:
            a, b = self._leaf(name, _A), self._leaf(name, _B)
            out = fit(back, b.shape[0])  # [S, O]
            entry, seen = inputs[name]
            if self.dora:
                factor = self._row_factor(name)
                plain = entry @ self._merged(name).T
                found[f"{PEFT_PREFIX}{name}.{_M}"] = (out * plain).sum(axis=0) * factor[:, 0] / self._leaf(name, _M)
                out = out * factor.T
            found[f"{PEFT_PREFIX}{name}.{_B}"] = self.scale * out.T @ (seen @ a.T)
            found[f"{PEFT_PREFIX}{name}.{_A}"] = self.scale * (out @ b).T @ seen
        return float((nats * weights).sum()), int((correct * weights).sum()), found


def _nats(logits: Floats, labels: Ints) -> tuple[Floats, npt.NDArray[np.bool_]]:
    top = logits.max(axis=1)
    target = logits[np.arange(len(labels)), labels]
    return top + np.log(np.exp(logits - top[:, None]).sum(axis=1)) - target, logits.argmax(axis=1) == labels
