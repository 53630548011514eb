"""Controls that need no model, and intervals that decide whether a difference may be claimed."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from smolmlx.evals import headlines
from smolmlx.evals.bootstrap import (
    MIN_ROWS,
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_means,
    difference_sentence,
)
from smolmlx.evals.controls import Neighbour, nearest_copy, nearest_rows, random_reference
from smolmlx.evals.text import content_tokens


def _texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(f"word{i}" for i in rng.integers(0, 400, size=40)) for _ in range(count)]


def _dense_cosines(train: list[str], query: str) -> npt.NDArray[np.float64]:
    """Return TF-IDF cosines by the textbook, with dense vectors over all tokens of train and query."""
    rows = [content_tokens(text) for text in [*train, query]]
    vocabulary = sorted({token for row in rows for token in row})
    counts = np.array([[row.count(token) for token in vocabulary] for row in rows], dtype=float)
    vectors = counts * (np.log((1 + len(train)) / (1 + (counts[:-1] > 0).sum(0))) + 1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines: npt.NDArray[np.float64] = vectors[:-1] @ vectors[-1]
    return cosines


def test_nearest_finds_the_planted_row() -> None:
    train = _texts(300)
    planted = [17, 250, 0]
    test = [" ".join([*train[row].split()[::-1][:34], "unseen terms here"]) for row in planted]
    found = nearest_rows(train, test)
    assert [neighbour.row for neighbour in found] == planted
    assert all(0.6 < neighbour.similarity < 1.0 for neighbour in found)
    assert nearest_copy(train, [f"out{i}" for i in range(300)], test) == ("out17", "out250", "out0")


def test_nearest_equals_a_dense_computation() -> None:
    train = _texts(60)
    for query in [*_texts(10, seed=1), f"{train[3]} unseen unseen"]:
        cosines = _dense_cosines(train, query)
        (found,) = nearest_rows(train, [query])
        assert found.row == int(cosines.argmax())
        assert found.similarity == pytest.approx(cosines.max(), abs=1e-9)


def test_nearest_ties_and_empty_inputs_take_the_first_row() -> None:
    train = ["gradient descent", "rare words", "rare words", "rare words rare words"]
    assert nearest_rows(train, ["words rare", "", "the of", "stranger"]) == (
        Neighbour(1, 1.0),
        Neighbour(0, 0.0),
        Neighbour(0, 0.0),
        Neighbour(0, 0.0),
    )
    assert nearest_rows(["", "the"], ["anything"]) == (Neighbour(0, 0.0),)


def test_controls_refuse_what_they_cannot_answer() -> None:
    with pytest.raises(ValueError, match="no train rows"):
        nearest_rows([], ["x"])
    with pytest.raises(ValueError, match="1 train inputs but 2 train outputs"):
        nearest_copy(["x"], ["y", "z"], ["x"])
    with pytest.raises(ValueError, match="no train outputs"):
        random_reference([], ["x"])


def test_random_reference_is_seeded_and_never_the_own_one() -> None:
    outputs = [f"out{i}" for i in range(5)]
    references = ["out3", "other"] * 50
    drawn = random_reference(outputs, references, seed=4)
    assert drawn == random_reference(outputs, references, seed=4)
    assert drawn != random_reference(outputs, references, seed=5)
    assert all(made != own for made, own in zip(drawn, references, strict=True))
    assert set(drawn) == set(outputs)
    assert random_reference(["same"], ["same"]) == ("same",)


def test_bootstrap_is_deterministic_and_depends_on_the_seed() -> None:
    values = np.random.default_rng(0).normal(2.0, 1.0, size=125)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_bootstrap_matches_the_normal_interval_of_many_rows() -> None:
    values = np.random.default_rng(0).normal(2.0, 1.0, size=2000)
    interval = bootstrap_mean(values)
    half = 1.96 * values.std() / math.sqrt(values.size)
    assert interval.mean == values.mean()
    assert interval.num_rows == 2000
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    intervals = [bootstrap_mean(rng.normal(size=60), draws=400, seed=i) for i in range(200)]
    assert 0.89 <= np.mean([interval.low <= 0 <= interval.high for interval in intervals]) <= 0.99


def test_groups_cover_the_true_mean_where_rows_alone_are_too_sure() -> None:
    """30 groups of 5 rows that share most of their value."""
    rng = np.random.default_rng(7)
    names = [str(row // 5) for row in range(150)]
    apart, together = [], []
    for seed in range(200):
        values = np.repeat(rng.normal(size=30), 5) + 0.1 * rng.normal(size=150)
        apart += bootstrap_means(values[:, None], draws=400, seed=seed)
        together += bootstrap_means(values[:, None], groups=names, draws=400, seed=seed)
    assert np.mean([interval.low <= 0 <= interval.high for interval in apart]) < 0.75
    assert 0.88 <= np.mean([interval.low <= 0 <= interval.high for interval in together]) <= 0.99
    assert [(i.mean, i.num_rows, i.num_groups) for i in together[:1]] == [(pytest.approx(apart[0].mean), 150, 30)]


def test_a_group_of_its_own_for_each_row_is_a_row() -> None:
    values = np.random.default_rng(1).normal(size=(20, 1))
    alone, named = bootstrap_means(values), bootstrap_means(values, groups=[str(i) for i in range(20)])
    assert (alone[0].low, alone[0].high) == (named[0].low, named[0].high)
    assert bootstrap_means(values, groups=["a"] * 19 + [""])[0].num_groups == 0  # a row that belongs nowhere


def test_few_groups_show_no_difference() -> None:
    rows = {"first": [1.0] * 50, "second": [0.0] * 50}
    assert not bootstrap_difference(*rows.values(), groups=[str(row % 5) for row in range(50)]).shows_difference
    assert bootstrap_difference(*rows.values(), groups=[str(row % 6) for row in range(50)]).shows_difference


def test_pairing_sees_a_difference_that_separate_intervals_hide() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(size=100)
    first, second = hard + 0.1 + rng.normal(scale=0.05, size=100), hard
    assert bootstrap_mean(first).low < bootstrap_mean(second).high
    assert bootstrap_difference(first.tolist(), second.tolist()).shows_difference


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_bootstrap_refuses_what_has_no_mean(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        bootstrap_mean(values)


def test_many_columns_are_resampled_like_one() -> None:
    columns = np.random.default_rng(3).normal(size=(40, 300))
    together = bootstrap_means(columns, draws=200, seed=5)
    for column, found in zip(columns.T[::50], together[::50], strict=True):
        alone = bootstrap_mean(column, draws=200, seed=5)
        assert (found.mean, found.low, found.high) == pytest.approx((alone.mean, alone.low, alone.high), abs=1e-12)


def test_bootstrap_refuses_unpaired_values() -> None:
    with pytest.raises(ValueError, match="1 and 2"):
        bootstrap_difference([1.0], [1.0, 2.0])


def test_equal_values_give_a_point() -> None:
    interval = bootstrap_mean([0.1] * 9, draws=50)
    assert (interval.low, interval.mean, interval.high) == pytest.approx((0.1, 0.1, 0.1))


@pytest.mark.parametrize(
    ("interval", "sentence"),
    [
        (Interval(0.5, 0.25, 0.75, 40), "f1: sft is higher than base by 0.5 (95 % interval +0.25 to +0.75, n=40)."),
        (Interval(-0.5, -0.75, -0.25, 40), "f1: sft is lower than base by 0.5 (95 % interval -0.75 to -0.25, n=40)."),
        (
            Interval(0.125, -0.25, 0.5, 40),
            "f1: no difference shown between sft and base (+0.125, 95 % interval -0.25 to +0.5, n=40).",
        ),
        (
            Interval(0.5, 0.0, 0.75, 40),
            "f1: no difference shown between sft and base (+0.5, 95 % interval +0 to +0.75, n=40).",
        ),
        (
            Interval(1.0, 1.0, 1.0, MIN_ROWS - 1),
            "f1: no difference shown between sft and base (+1, 95 % interval +1 to +1, n=5; fewer than 6 rows cannot show one).",
        ),
        (
            Interval(-1, -1, -1, 8, num_groups=4),
            "f1: no difference shown between sft and base (-1, 95 % interval -1 to -1, n=8 in 4 groups; fewer than 6 groups cannot show one).",
        ),
    ],
)
def test_sentences_claim_only_what_the_interval_shows(interval: Interval, sentence: str) -> None:
    assert difference_sentence(interval, "f1", "sft", "base") == sentence


def test_what_the_terminal_says_of_two_systems() -> None:
    assert headlines.is_said("compliance", with_control=True) and headlines.is_said("unsupported", with_control=False)
    assert not headlines.is_said("unsupported", with_control=True) and not headlines.is_said("f1", with_control=False)
