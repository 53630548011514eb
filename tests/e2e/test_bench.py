"""`smolmlx bench`: that it measures what it says and leaves nothing behind; never how fast."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lab as labs

Call = Callable[..., tuple[int, str, str]]
SHORT = ("--steps", 2, "--repeats", 2, "--json")


@pytest.fixture(params=["mlx", "cuda"])
def engine(request: pytest.FixtureRequest) -> tuple[str, ...]:
    if (reason := labs.why_missing(request.param)) is not None:
        pytest.skip(reason)
    return "--backend", request.param, "--device", "cpu"


def write(path: Path, model: Path, rows: Path, more: str = "") -> Path:
    path.write_text(
        f"model: {{id: {model}}}\ndata: {{train: {rows}, max_length: 128, validation_share: 0.2}}\n"
        "train: {batch_size: 2, epochs: 2}\nlora: {r: 2}\neval: {every: 1}\nsamples: {prompts: [hi]}\nsave: {every: 1}\n"
        f"{more}"
    )
    return path


@pytest.fixture
def recipe(tiny_model: Path, chat_rows: Path, tmp_path: Path) -> Path:
    return write(tmp_path / "my.yaml", tiny_model, chat_rows)


def read(said: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = said
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_training_two_ways(call: Call, recipe: Path, engine: tuple[str, ...], tmp_path: Path) -> None:
    made = read(call("bench", "train", recipe, *engine, "--against", "train.batch_size=1", *SHORT))
    assert list(made["ways"]) == [str(recipe), "train.batch_size=1"]
    for way in made["ways"].values():
        assert 0 < way["supervised_per_second"] < way["tokens_per_second"] and way["seconds_per_step"] > 0
        assert len(way["repeats"]) == 2 and way["peak_bytes"] > 0
    assert list(tmp_path.iterdir()) == [recipe], "nothing is kept"


def test_compile_says_where_it_has_no_effect(call: Call, recipe: Path, engine: tuple[str, ...]) -> None:
    said = call("bench", "compile", recipe, *engine, *SHORT)
    assert list(read(said)["ways"]) == ["train.compile=true", "train.compile=false"]
    assert ("train.compile: has no effect" in said[2]) == ("cuda" in engine)


def test_pairs(
    call: Call, tiny_model: Path, pair_rows: Path, recipe: Path, engine: tuple[str, ...], tmp_path: Path
) -> None:
    pairs = write(tmp_path / "dpo.yaml", tiny_model, pair_rows, "stage: dpo\n")
    assert len(read(call("bench", "dpo", pairs, *engine, *SHORT))["ways"]) == 2
    code, _, err = call("bench", "dpo", recipe, *engine, *SHORT)
    assert code == 2 and "stage: dpo" in err


def test_cost(call: Call, recipe: Path, engine: tuple[str, ...]) -> None:
    made = read(call("bench", "cost", recipe, *engine, "--price", 3, *SHORT))
    assert made["steps"] > 10 and made["hours"] == pytest.approx(made["steps"] * made["seconds_per_step"] / 3600)
    assert made["price"] == pytest.approx(3 * made["hours"])


def test_answers(call: Call, tiny_model: Path, engine: tuple[str, ...]) -> None:
    asked = ("--batch-size", 1, "--batch-size", 3, "--max-tokens", 6, "--repeats", 2, "--json")
    made = read(call("bench", "generate", "--model", tiny_model, *engine, *asked))
    assert list(made["speeds"]) == ["1", "3"]
    assert all(len(speed["repeats"]) == 2 and speed["tokens_per_second"] > 0 for speed in made["speeds"].values())
