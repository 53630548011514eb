"""What `smolmlx eval` makes of its words, and which rows it reads: no engine needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from smolmlx.cli.eval import _name_adapters
from smolmlx.errors import DataError, RecipeError
from smolmlx.evals.run import Settings, read_rows

NOTES = Path(__file__).resolve().parents[2] / "data" / "notes"
Call = Callable[..., tuple[int, str, str]]


def test_adapters_are_called_what_the_user_says_or_their_run(tmp_path: Path) -> None:
    one, two, odd = tmp_path / "run-1" / "adapter", tmp_path / "run-2" / "adapter", tmp_path / "a=b"
    for folder in (one, two, odd):
        folder.mkdir(parents=True)
    assert _name_adapters((f"sft={one}", f"dpo={two}")) == {"sft": str(one), "dpo": str(two)}
    assert _name_adapters((str(one), f"dpo={two}", str(odd))) == {"run-1": str(one), "dpo": str(two), "a=b": str(odd)}
    assert list(_name_adapters((str(one), str(one)))) == ["run-1-1", "run-1-2"]


def test_every_wrong_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        _name_adapters((f"base={tmp_path}", f"sft={tmp_path}", f"sft={tmp_path}", "gone"))
    assert caught.value.exit_code == 2 and len(caught.value.problems) == 3
    for text in ("base", "the name sft is taken", "--adapter gone: no such folder"):
        assert text in str(caught.value)


def test_the_loss_suite_refuses_what_only_answers_have(call: Call) -> None:
    code, _, err = call("eval", "--model", "tiny", "--data", NOTES / "test.jsonl", "--ood", NOTES / "ood.jsonl", "--id", "row-0001")  # fmt: skip
    assert code == 2 and "no use for --ood, --id" in err and "--suite notes" in err


def test_rows_by_id_and_limit() -> None:
    every = read_rows(str(NOTES / "test.jsonl"), Settings("x"))
    some = read_rows(str(NOTES / "test.jsonl"), Settings("x", ids=("row-0007", "row-0002")))
    assert [row for row, _ in some] == [every[1][0], every[6][0]]
    assert len(read_rows(str(NOTES / "test.jsonl"), Settings("x", limit=5))) == 5
    with pytest.raises(DataError, match="no row row-9999"):
        read_rows(str(NOTES / "test.jsonl"), Settings("x", ids=("row-9999",)))
