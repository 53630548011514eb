"""AWQ is for NVIDIA GPUs alone: what is refused here, and with which words. The work itself has never run on a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from test_cli_adapter import save_adapter

from smolmlx import backend as backends
from smolmlx.adapters import awq
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import BackendError, RecipeError
from smolmlx.models import open_model


def test_refused_before_anything_is_written(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.setattr(backends, "has_nvidia", lambda: False)
    adapter = save_adapter(tmp_path / "adapter", tiny_model)
    code, _, err = call("export", "vllm", adapter, "out", "--quantize", "awq", "--calibration", "rows.jsonl")
    assert code == 3 and "no NVIDIA GPU" in err and "q4_k_m" in err and not (tmp_path / "out").exists()
    if importlib.util.find_spec("llmcompressor") is None:
        assert "smolmlx[awq]" in err
    code, _, err = call("export", "vllm", adapter, "out", "--calibration", "rows.jsonl")
    assert code == 2 and "no effect" in err


def test_rows_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "has_nvidia", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(RecipeError, match="--calibration"):
        awq.refuse(None)
    awq.refuse("rows.jsonl")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="1 problem"):
        awq.refuse("rows.jsonl")


def test_calibration_rows_are_those_of_training(chat_rows: Path, tiny_model: Path) -> None:
    tokenizer = Tokenizer(tiny_model)
    rows = awq.read_calibration(str(chat_rows), tokenizer)
    assert 0 < len(rows) <= awq.NUM_ROWS and all(0 < len(row) <= awq.MAX_TOKENS for row in rows)
    text = tokenizer.decode(rows[0])
    assert text.startswith("user\n") and "\nassistant\n" in text


def test_groups_divide_every_layer(tiny_model: Path) -> None:
    assert awq.group_size(open_model(tiny_model)) == 32  # 32 and 64 columns
