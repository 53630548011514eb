"""One engine, one short recipe, a place for its runs: what tests of engines are made of."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np

from smolmlx import backend, models, plan, recipe, rundir, session, stages
from smolmlx.data.tokenizer_training import CHATML_TEMPLATE, train_tokenizer

ENGINES = {
    "mlx": ("mlx.core", "cpu"),
    "cuda": ("torch", os.environ.get("SMOLMLX_TEST_DEVICE", "cpu")),
    "toy": ("numpy", "cpu"),
}
"""Engine -> (package it stands on, device asked for)."""

TINY = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    # Wide enough that a random model's answers differ from prompt to prompt.
    "initializer_range": 0.15,
}
"""A Llama-type model with grouped-query attention and tied embeddings."""

TIMING = ("seconds", "tokens_per_second", "samples_per_second", "peak_bytes")
"""Fields of a metrics row that no two runs share."""

WORDS = [
    "red",
    "green",
    "blue",
    "apple",
    "pear",
    "plum",
    "one",
    "two",
    "three",
    "four",
    "small",
    "large",
    "river",
    "stone",
]


def sentence(i: int) -> str:
    """Return a short text that is a function of `i`, of 3 to 9 words."""
    return " ".join(WORDS[(i * 7 + k * (i % 5 + 1)) % len(WORDS)] for k in range(3 + i % 7))


def make_tiny(folder: Path, seed: int = 1, **config: Any) -> Path:
    """Make a tiny model of random weights with a byte-level tokenizer and a ChatML template."""
    models.make_model({**TINY, **config}, folder, seed)
    train_tokenizer([sentence(i) for i in range(200)], TINY["vocab_size"], folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": CHATML_TEMPLATE}))
    return folder


def write_chat(path: Path, rows: int = 24) -> Path:
    """Write conversations of one or two exchanges, of different lengths."""
    with path.open("w") as file:
        for i in range(rows):
            roles = ("user", "assistant") * (1 + i % 2)
            turns = [{"role": role, "content": sentence(i * 3 + k)} for k, role in enumerate(roles)]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def write_pairs(path: Path, rows: int = 24) -> Path:
    """Write preference pairs: prompts and answers of different lengths, the two answers of a pair too."""
    with path.open("w") as file:
        for i in range(rows):
            pair = {
                "prompt": sentence(i * 3),
                "chosen": sentence(i * 3 + 1),
                "rejected": sentence(i * 3 + 2) + " stone",
            }
            file.write(json.dumps(pair) + "\n")
    return path


def write_text(path: Path, rows: int = 40) -> Path:
    """Write documents of plain text."""
    documents = [". ".join(sentence(i + k) for k in range(1 + i % 4)) for i in range(rows)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def why_missing(engine: str) -> str | None:
    """Return why an engine cannot run here, or None."""
    package = ENGINES[engine][0]
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        return f"engine {engine}: {package} is not installed"
    return None


def import_mlx(name: str = "mlx.core") -> ModuleType:
    """Import an mlx module behind a fast BLAS, which must be in the process first on Linux."""
    from smolmlx_mlx import blas

    blas.ensure()
    return importlib.import_module(name)


@contextmanager
def toy_installed() -> Iterator[None]:
    """Install the numpy engine the way a package would: by one entry point."""
    real = backend.entry_points

    def with_toy(*, group: str) -> list[EntryPoint]:
        return [*real(group=group), EntryPoint("toy", "toy_engine:backend", backend.GROUP)]

    with mock.patch.object(backend, "entry_points", with_toy):
        yield


@dataclass(frozen=True)
class Lab:
    """An engine with a recipe to vary."""

    choice: backend.Choice
    tree: Mapping[str, Any]
    out: Path

    @property
    def name(self) -> str:
        return self.choice.backend.name

    def load(self, **changes: Any) -> recipe.Loaded:
        """Build the recipe with `section__key=value` laid over it."""
        tree = {key: dict(value) if isinstance(value, dict) else value for key, value in self.tree.items()}
        for dotted, value in changes.items():
            section, _, key = dotted.partition("__")
            if key:
                tree.setdefault(section, {})[key] = value
            else:
                tree[section] = value
        if tree["train"].get("method") == "full" and "lora" not in changes:
            tree.pop("lora", None)  # full training has no adapter
        return recipe.build(tree, source="test", folder=self.out)

    def plan(self, **changes: Any) -> plan.Plan:
        return plan.resolve(self.load(**changes), self.choice)

    def start(self, made: plan.Plan) -> rundir.RunDir:
        return stages.start_run(made, self.out, self.name)

    def train(
        self, made: plan.Plan, run: rundir.RunDir | None = None, on_event: stages.OnEvent = lambda event: None
    ) -> rundir.RunDir:
        """Train a plan to its end and return its run."""
        run = run or self.start(made)
        stages.train(made, self.choice, run, on_event)
        return run

    def generator(self, made: plan.Plan, adapter: Path | None = None) -> backend.Generator:
        how = backend.Loading(self.choice.device, made.dtype)
        return self.choice.backend.generator(made.model, adapter, made.tokenizer, how)


def make_lab(name: str, model: Path, rows: Path, out: Path) -> Lab:
    """Return an engine with a short SFT recipe in float32; compiling would cost more than these steps do."""
    tree: dict[str, Any] = {
        "model": {"id": str(model), "dtype": "float32"},
        "data": {"train": str(rows), "max_length": 128, "packing": "off"},
        "train": {
            "batch_size": 4, "learning_rate": 1e-2, "max_steps": 6, "epochs": 100, "schedule": "linear", "compile": False,
        },
        "lora": {"r": 4, "alpha": 8},
    }  # fmt: skip
    return Lab(backend.choose(name, ENGINES[name][1]), tree, out)


def numbers(run: rundir.RunDir, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without what a clock or an allocator decides."""
    rows = session.read_metrics(run)
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows if kind in (None, row["kind"])]


def column(run: rundir.RunDir, name: str, kind: str = "step") -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return one field of all rows of a kind."""
    return np.array([row[name] for row in session.read_metrics(run) if row["kind"] == kind], np.float64)


def stop_at(step: int) -> Callable[[session.Event], None]:
    """Return an event callback that presses Ctrl-C once `step` is done."""
    import signal

    def on_event(event: session.Event) -> None:
        if (event.kind, event.step) == ("step", step):
            signal.raise_signal(signal.SIGINT)

    return on_event
