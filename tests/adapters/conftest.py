"""What tests of exports share."""

from __future__ import annotations

from pathlib import Path

import pytest
import stock
from stock import LINEAR

from smolmlx.adapters.exports import Source
from smolmlx.models import open_model


@pytest.fixture(scope="module")
def tuned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A PEFT adapter with two ranks, trained on the tiny byte-level model."""
    folder = tmp_path_factory.mktemp("tuned")
    adapter = stock.train_peft(tiny_model, folder / "adapter", target_modules=LINEAR, rank_pattern={"q_proj": 2})
    return Source("tuned", open_model(tiny_model), adapter)
