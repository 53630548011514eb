"""Batches and packs for any lengths: nothing lost, nothing twice, no shape outside the set, no mask off by one."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from smolmlx.data.batches import IGNORE, choose_widths, pack, plan_batches
from smolmlx.data.chat import Encoded
from smolmlx.data.encode import split_row
from smolmlx.data.store import TokenStore, from_rows

masks = st.lists(st.lists(st.booleans(), min_size=2, max_size=40).filter(lambda m: any(m[1:])), min_size=1, max_size=25)
quick = settings(max_examples=40, deadline=None)


def make(rows: list[list[bool]]) -> TokenStore:
    """Rows of distinct tokens, so that each can be followed."""
    tokens = itertools.count(1)
    with tempfile.TemporaryDirectory() as folder:
        store = from_rows([Encoded([next(tokens) for _ in row], row) for row in rows], Path(folder) / "store")
        ids, mask = np.array(store.ids), np.array(store.mask)  # the map outlives its file
    return TokenStore(store.folder, ids, mask, store.offsets, store.account)


@quick
@given(rows=masks, batch=st.integers(1, 6), accumulation=st.integers(1, 4), pack_to=st.sampled_from([None, 40, 64]))
def test_every_target_once_and_from_its_own_document(
    rows: list[list[bool]], batch: int, accumulation: int, pack_to: int | None
) -> None:
    store = make(rows)
    plan = plan_batches(store, batch_size=batch, accumulation=accumulation, pack_to=pack_to, seed=len(rows))
    assert plan.steps_per_epoch == -(-plan.num_rows // (batch * accumulation))
    pairs = []
    for step in range(plan.steps_per_epoch):
        for made in plan.step(step):
            assert made.ids.shape == (min(batch, plan.num_rows), made.ids.shape[1]) and made.ids.shape[1] in plan.widths
            assert len(made.index) % plan.gather == 0
            kept = made.weights > 0
            assert np.array_equal(np.flatnonzero(made.targets.reshape(-1) != IGNORE), made.index[kept])
            pairs += zip(made.ids.reshape(-1)[made.index[kept]].tolist(), made.labels[kept].tolist(), strict=True)
    wanted = []
    for row in range(len(store)):
        ids, mask = store.row(row)
        wanted += [(int(a), int(b)) for a, b, supervised in zip(ids, ids[1:], mask[1:], strict=False) if supervised]
    assert sorted(pairs) == sorted(wanted)
    assert len(wanted) == store.supervised.sum()


@quick
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=200), seed=st.integers(0, 5))
def test_packs_hold_every_document_whole(lengths: list[int], seed: int) -> None:
    sizes = np.array(lengths)
    packs = pack(sizes, 100, seed)
    assert sorted(int(i) for row in packs for i in row) == list(range(len(lengths)))
    filled = sorted(int(sizes[row].sum()) for row in packs)
    assert filled[-1] <= 100
    # Two packs that fit into one would have been one.
    assert len(filled) < 2 or filled[0] + filled[1] > 100


@quick
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=60))
def test_few_widths_waste_no_more_than_any_others(lengths: list[int]) -> None:
    sizes = np.array(lengths)
    widths = np.array(choose_widths(sizes, most=2))

    def cost(chosen: np.ndarray) -> int:
        return int(chosen[np.searchsorted(chosen, sizes)].sum())

    top = -(-sizes.max() // 16) * 16
    others = [np.unique([first, top]) for first in range(16, top + 1, 16)]
    assert cost(widths) == min(cost(other) for other in others)


@quick
@given(mask=st.lists(st.booleans(), min_size=9, max_size=300), limit=st.integers(8, 64))
def test_split_rows_supervise_every_token_once(mask: list[bool], limit: int) -> None:
    whole = Encoded(list(range(len(mask))), mask)
    learned = []
    for row in split_row(whole, limit):
        assert 0 < len(row.ids) <= limit
        assert row.ids == list(range(row.ids[0], row.ids[0] + len(row.ids))), "a window of the row"
        learned += [i for i, supervised in zip(row.ids, row.mask, strict=True) if supervised]
    assert learned == [i for i, supervised in enumerate(mask) if supervised]
