"""Rule-made pairs under any seed and any choice of flaws: one flaw, one length, each source row once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from smolmlx.synth.flaws import ISSUES, MAX_GAP, find_flaws, gap
from smolmlx.synth.pairs import Order, make_pairs, read_notes_rows

NOTES = Path(__file__).parents[2] / "data" / "notes"
ROWS = read_notes_rows([NOTES / "validation.jsonl"])
issues = st.lists(st.sampled_from([i for i in ISSUES if i != "fourth-bullet"]), min_size=1, unique=True)


def pairs_of(seed: int, kinds: list[str]) -> list[dict[str, Any]]:
    made, _ = make_pairs(ROWS, Order((0, 6), tuple(kinds), seed))
    return made["validation"]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), issues)
def test_pairs(seed: int, kinds: list[str]) -> None:
    pairs = pairs_of(seed, kinds)
    assert len({pair["source_id"] for pair in pairs}) == 6
    answers = {row.id: row.answer for row in ROWS}
    for pair in pairs:
        (issue,) = pair["issues"]
        assert issue in kinds and pair["chosen"] == answers[pair["source_id"]] != pair["rejected"]
        assert find_flaws(pair["prompt"], pair["chosen"], pair["rejected"]) == {issue}
        assert abs(gap(pair["chosen"], pair["rejected"])) < MAX_GAP
    assert json.dumps(pairs) == json.dumps(pairs_of(seed, kinds))
