"""Batches: every row once per epoch, a small fixed set of shapes, documents apart, targets shifted once."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from smolmlx.data.batches import IGNORE, BatchPlan, choose_widths, pack, padded_tokens, plan_batches
from smolmlx.data.chat import Encoded
from smolmlx.data.pair_batches import plan_pairs
from smolmlx.data.store import TokenStore, from_rows


def make_store(folder: Path, lengths: list[int], prompt: int = 2) -> TokenStore:
    """Rows of distinct tokens; the first `prompt` of each are not supervised."""
    rows, token = [], 1
    for length in lengths:
        ids = list(range(token, token + length))
        rows.append(Encoded(ids, [i >= prompt for i in range(length)]))
        token += length
    return from_rows(rows, folder / "store")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    rng = np.random.default_rng(0)
    return make_store(tmp_path_factory.mktemp("store"), [int(n) for n in rng.integers(4, 300, 203)])


def seen(plan: BatchPlan, epoch: int) -> list[int]:
    return [int(row) for rows in plan.epoch_order(epoch) for row in rows]


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "epochs", "steps"), [(2260, 2, 2, 1, 565), (400, 2, 8, 3, 75), (61, 2, 8, 3, 12)]
)
def test_steps_are_rounded_up(
    tmp_path: Path, rows: int, batch: int, accumulation: int, epochs: int, steps: int
) -> None:
    plan = plan_batches(make_store(tmp_path, [5] * rows), batch_size=batch, accumulation=accumulation)
    assert epochs * plan.steps_per_epoch == steps
    assert sum(len(plan.step(k)) for k in range(plan.steps_per_epoch)) == -(-rows // batch)


def test_a_batch_has_no_more_rows_than_there_are(tmp_path: Path) -> None:
    plan = plan_batches(make_store(tmp_path, [5, 6]), batch_size=4096)
    (batch,) = plan.step(0)
    assert plan.steps_per_epoch == 1 and len(batch.ids) == 2
    pairs = plan_pairs(make_store(tmp_path, [5, 6]), batch_size=4096, shared=True)
    (one,) = pairs.step(0)
    assert pairs.order.batch_size == 1 and one.pairs.tolist() == [0]


def test_steps_of_a_billion_tokens(tmp_path: Path) -> None:
    """98,304 tokens a step: 96 rows of 1,024. One row stands for all, since only their number counts."""
    plan = plan_batches(make_store(tmp_path, [1024]), batch_size=8, accumulation=12, pack_to=1024)
    plan = replace(plan, batch_size=8, rows=(np.array([0]),) * math.ceil(1e9 / 1024))
    assert plan.steps_per_epoch == 10_173


@pytest.mark.parametrize("pack_to", [None, 320])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_each_row_once_per_epoch(store: TokenStore, epoch: int, pack_to: int | None) -> None:
    plan = plan_batches(store, batch_size=4, accumulation=3, seed=3, pack_to=pack_to)
    assert sorted(seen(plan, epoch)) == list(range(plan.num_rows))


def test_each_token_once_per_epoch(store: TokenStore) -> None:
    """Through the arrays an engine gets, in the second epoch, packed and not."""
    for pack_to in (None, 320):
        plan = plan_batches(store, batch_size=4, accumulation=3, pack_to=pack_to)
        steps = range(plan.steps_per_epoch, 2 * plan.steps_per_epoch)
        batches = [batch for k in steps for batch in plan.step(k)]
        ids = np.concatenate([b.ids[b.segments > 0] for b in batches])
        assert np.array_equal(np.sort(ids), np.arange(1, len(store.ids) + 1))
        labels = np.concatenate([b.labels[b.weights > 0] for b in batches])
        assert np.array_equal(np.sort(labels), np.asarray(store.ids)[np.asarray(store.mask) == 1])


def test_order_is_a_function_of_seed_and_epoch(store: TokenStore) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return seen(plan_batches(store, batch_size=4, seed=seed), epoch)

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1, 2)}) == 6


def test_a_step_is_built_without_the_steps_before_it(store: TokenStore) -> None:
    plan = plan_batches(store, batch_size=4, accumulation=2)
    fresh = plan_batches(store, batch_size=4, accumulation=2)
    walked = [plan.step(k) for k in range(60)][-1]
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(walked, fresh.step(59), strict=True))


def test_shapes_are_few(store: TokenStore) -> None:
    for pack_to in (None, 320):
        plan = plan_batches(store, batch_size=4, pack_to=pack_to)
        batches = [plan.step(k)[0] for k in range(plan.steps_per_epoch)]
        assert {b.ids.shape[1] for b in batches} <= set(plan.widths) and len(plan.widths) <= 8
        assert {b.ids.shape[0] for b in batches} == {4}, "a last, smaller batch is padded"
        assert len({len(b.index) for b in batches}) <= 8


def test_like_lengths_share_a_batch_and_order_stays_random(store: TokenStore) -> None:
    plan = plan_batches(store, batch_size=4)
    padded = padded_tokens(plan)
    assert padded == sum(b.ids.size for k in range(plan.steps_per_epoch) for b in plan.step(k))
    assert padded < 1.15 * store.lengths.sum()
    means = [store.lengths[rows].mean() for rows in plan.epoch_order(0)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3, "long rows must not come last"


def test_targets_are_shifted_once(tmp_path: Path) -> None:
    plan = plan_batches(make_store(tmp_path, [4, 3, 2, 2]), batch_size=3, shuffle=False, pad_id=99)
    batch = plan.build([1, 0])  # and a row to fill it up
    assert batch.ids[:, :5].tolist() == [[5, 6, 7, 99, 99], [1, 2, 3, 4, 99], [99] * 5]
    assert batch.targets[:, :4].tolist() == [
        [IGNORE, 7, IGNORE, IGNORE],
        [IGNORE, 3, 4, IGNORE],
        [IGNORE] * 4,
    ]
    assert batch.segments.sum() == 7 and batch.num_tokens == 7
    found = batch.ids.reshape(-1)[batch.index[batch.weights > 0]]
    assert (found.tolist(), batch.labels[batch.weights > 0].tolist()) == ([6, 2, 3], [7, 3, 4])
    assert batch.num_supervised == 3 and not batch.packed


def test_packed_documents_do_not_touch(tmp_path: Path) -> None:
    store = make_store(tmp_path, [5, 7, 4], prompt=0)
    plan = plan_batches(store, batch_size=1, pack_to=16)
    assert plan.num_rows == 1
    (batch,) = plan.step(0)
    assert batch.packed and batch.ids.shape == (1, 16)
    for segment in (1, 2, 3):
        inside = batch.segments[0] == segment
        ids, targets = batch.ids[0][inside], batch.targets[0][inside]
        assert targets.tolist() == [*ids[1:].tolist(), IGNORE], "no target crosses a document's end"
        assert batch.positions[0][inside].tolist() == list(range(len(ids)))


def test_packing_keeps_documents_whole(store: TokenStore) -> None:
    packs = pack(store.lengths, 320, seed=0)
    assert sorted(int(i) for row in packs for i in row) == list(range(len(store)))
    sizes = [int(store.lengths[row].sum()) for row in packs]
    assert max(sizes) <= 320
    assert len(packs) <= 1.1 * np.ceil(store.lengths.sum() / 320), "best fit leaves little room"


def test_step_tokens_are_counted_without_arrays(store: TokenStore) -> None:
    for pack_to in (None, 320):
        plan = plan_batches(store, batch_size=4, accumulation=2, pack_to=pack_to)
        for k in range(plan.steps_per_epoch):
            batches = plan.step(k)
            counted = (sum(b.num_supervised for b in batches), sum(b.num_tokens for b in batches))
            assert plan.step_tokens(k) == counted


def test_evaluation_takes_each_row_once_by_length(store: TokenStore) -> None:
    plan = plan_batches(store, batch_size=8, shuffle=False)
    order = seen(plan, 0)
    assert sorted(order) == list(range(len(store)))
    assert np.all(np.diff(store.lengths[order]) >= 0)
    assert sum(b.num_supervised for b in plan.evaluation()) == store.supervised.sum()
    assert seen(plan, 7) == order


def test_digest_follows_tokens_and_order(store: TokenStore) -> None:
    digests = {
        plan_batches(store, batch_size=batch, seed=seed, pack_to=pack_to).digest()
        for batch, seed, pack_to in ((4, 0, None), (4, 1, None), (5, 0, None), (4, 0, 320))
    }
    assert len(digests) == 4
    assert plan_batches(store, batch_size=4).digest() in digests


def test_widths_of_one_length() -> None:
    assert choose_widths(np.array([17] * 9)) == (32,)


def test_widths_hold_the_longest_row() -> None:
    lengths = np.arange(1, 5000, 7)
    widths = choose_widths(lengths)
    assert len(widths) <= 8 and widths[-1] >= lengths.max() and list(widths) == sorted(widths)
