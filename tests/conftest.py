"""What all tests share: real files, a tiny model built in place, and the engines that are installed here.

No network: hub libraries are told to stay offline before any of them is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from smolmlx import backend, models, plan, recipe, rundir, session, stages
from smolmlx.data.tokenizer_training import CHATML_TEMPLATE, train_tokenizer

for _name, _value in (("HF_HUB_OFFLINE", "1"), ("HF_DATASETS_OFFLINE", "1"), ("TOKENIZERS_PARALLELISM", "false")):
    os.environ.setdefault(_name, _value)

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT.parent / "shared" / "assets"
ENGINES = {"mlx": ("mlx.core", None), "cuda": ("torch", "cpu"), "toy": ("numpy", "cpu")}
"""Engine -> (package it stands on, device asked for); the PyTorch engine must be asked to run on a CPU."""

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

WORDS = ("red", "green", "blue", "apple", "pear", "plum", "one", "two", "three", "four", "small", "large", "river", "stone")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's cache out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOLMLX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real tokenizers, models and data."""
    if not ASSETS.is_dir():
        pytest.skip(f"{ASSETS} is missing: real tokenizers, models and data lie there")
    return ASSETS


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer model of random weights with a byte-level tokenizer and a ChatML template."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_tiny(folder)
    return folder


def make_tiny(folder: Path, seed: int = 1, **config: Any) -> None:
    models.make_model({**TINY, **config}, folder, seed)
    train_tokenizer([sentence(i) for i in range(200)], TINY["vocab_size"], folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": CHATML_TEMPLATE}))


def sentence(i: int) -> str:
    """A short text that is a function of `i`; lengths vary from 3 to 9 words."""
    return " ".join(WORDS[(i * 7 + k * (i % 5 + 1)) % len(WORDS)] for k in range(3 + i % 7))


@pytest.fixture(scope="session")
def chat_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 conversations of one or two exchanges, of different lengths."""
    path = tmp_path_factory.mktemp("rows") / "chat.jsonl"
    with path.open("w") as file:
        for i in range(24):
            turns = [{"role": role, "content": sentence(i * 3 + k)} for k, role in enumerate(("user", "assistant") * (1 + i % 2))]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


@pytest.fixture(scope="session")
def text_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 documents of plain text."""
    path = tmp_path_factory.mktemp("rows") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": ". ".join(sentence(i + k) for k in range(1 + i % 4))}) + "\n" for i in range(40)))
    return path


def why_missing(engine: str) -> str | None:
    """Return why an engine cannot run here, or None."""
    package = ENGINES[engine][0]
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        return f"engine {engine}: {package} is not installed"
    return None


def import_mlx(name: str = "mlx.core") -> ModuleType:
    """Import an mlx module behind a fast BLAS; on Linux it must be in the process first."""
    from smolmlx_mlx import blas

    blas.ensure()
    return importlib.import_module(name)


@pytest.fixture(scope="session")
def toy_installed() -> Iterator[None]:
    """Install the numpy engine the way a package would: by one entry point."""
    real = backend.entry_points

    def with_toy(*, group: str) -> list[EntryPoint]:
        return [*real(group=group), EntryPoint("toy", "toy_engine:backend", backend.GROUP)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "entry_points", with_toy)
        yield


def choose(name: str) -> backend.Choice:
    """Choose an engine as a user would, or skip with the reason it cannot run."""
    if (reason := why_missing(name)) is not None:
        pytest.skip(reason)
    return backend.choose(name, ENGINES[name][1])


@dataclass(frozen=True)
class Lab:
    """One engine with a recipe to vary: plans it, trains it, and keeps its runs in a temporary folder."""

    choice: backend.Choice
    tree: Mapping[str, Any]
    out: Path

    @property
    def name(self) -> str:
        return self.choice.backend.name

    def load(self, **changes: Any) -> recipe.Loaded:
        """Build the recipe with `section__key=value` laid over it; None takes a key out."""
        tree = {section: dict(values) if isinstance(values, dict) else values for section, values in self.tree.items()}
        for dotted, value in changes.items():
            section, _, key = dotted.partition("__")
            if key:
                tree.setdefault(section, {})[key] = value
            else:
                tree[section] = value
        return recipe.build(tree, source="test", folder=self.out)

    def plan(self, **changes: Any) -> plan.Plan:
        return plan.resolve(self.load(**changes), self.choice)

    def start(self, made: plan.Plan) -> rundir.RunDir:
        return stages.start_run(made, self.out, self.name)

    def train(self, made: plan.Plan, run: rundir.RunDir | None = None, on_event: stages.OnEvent = lambda event: None) -> rundir.RunDir:
        """Train a plan to its end and return its run."""
        run = run or self.start(made)
        stages.train(made, self.choice, run, on_event)
        return run

    def generator(self, made: plan.Plan, adapter: Path | None = None) -> backend.Generator:
        how = backend.Loading(self.choice.device, made.dtype)
        return self.choice.backend.generator(made.model, adapter, made.tokenizer, how)


def make_lab(name: str, model: Path, rows: Path, out: Path) -> Lab:
    """An engine with a short SFT recipe in float32; steps are not compiled, which costs more than these steps do."""
    tree: dict[str, Any] = {
        "model": {"id": str(model), "dtype": "float32"},
        "data": {"train": str(rows), "max_length": 128, "packing": "off"},
        "train": {"batch_size": 4, "learning_rate": 1e-2, "max_steps": 6, "epochs": 100, "schedule": "linear", "compile": False},
        "lora": {"r": 4, "alpha": 8},
    }
    return Lab(choose(name), tree, out)


TIMING = ("seconds", "tokens_per_second", "peak_bytes")
"""Fields of a metrics row that no two runs share."""


def numbers(run: rundir.RunDir, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without what a clock or an allocator decides."""
    rows = session.read_metrics(run)
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows if kind in (None, row["kind"])]
