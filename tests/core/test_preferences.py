"""Values of the preference losses, what is reported of pairs, and what must hold before the first step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pair_reference import KINDS, columns, one_pair, some_pairs
from smolmlx.errors import RunError
from smolmlx.preferences import NUMPY, Pairs, check_start, least_gradient, metrics, pair_losses, start_loss
from smolmlx.recipe import Dpo


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_values_are_those_of_the_papers(kind: dict[str, Any]) -> None:
    how, pairs = Dpo(**kind), some_pairs()
    wanted = [one_pair(how, *map(float, row))[0] for row in zip(*columns(pairs), strict=True)]
    assert pair_losses(how, NUMPY, pairs) == pytest.approx(np.array(wanted), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_slopes_of_the_reference_are_those_of_its_values(kind: dict[str, Any]) -> None:
    how, pairs = Dpo(**kind), some_pairs()
    for c, r, *rest in zip(*columns(pairs), strict=True):
        step = 1e-6
        by_c = (one_pair(how, c + step, r, *rest)[0] - one_pair(how, c - step, r, *rest)[0]) / (2 * step)
        by_r = (one_pair(how, c, r + step, *rest)[0] - one_pair(how, c, r - step, *rest)[0]) / (2 * step)
        assert one_pair(how, c, r, *rest)[1:] == pytest.approx((by_c, by_r), rel=1e-5, abs=1e-7)


def test_values_of_the_metrics_page() -> None:
    """spec/metrics.md: beta .1, d = 0, 13.5 and 20."""
    zero, one = np.zeros(3), np.ones(3)
    pairs = Pairs(np.array([0.0, 13.5, 20.0]), zero, zero, zero, one, one)
    assert pair_losses(Dpo(), NUMPY, pairs) == pytest.approx([0.693147, 0.230, 0.126928], abs=1e-3)


def test_large_margins_stay_finite() -> None:
    far = np.array([1e4, -1e4])
    zero, one = np.zeros(2), np.ones(2)
    losses = pair_losses(Dpo(beta=1.0), NUMPY, Pairs(far, zero, zero, zero, one, one))
    assert losses == pytest.approx([0.0, 1e4])


@pytest.mark.parametrize(
    ("kind", "loss"), [({}, math.log(2)), ({"label_smoothing": 0.3}, math.log(2)), ({"loss": "ipo"}, 25.0), ({"loss": "hinge", "sft_weight": 2.0}, 1.0)]
)  # fmt: skip
def test_loss_of_a_tie(kind: dict[str, Any], loss: float) -> None:
    assert start_loss(Dpo(**kind)) == pytest.approx(loss)


def test_metrics() -> None:
    pairs = Pairs(
        np.array([-10.0, -20.0]), np.array([-12.0, -18.0]), np.array([-11.0, -20.0]), np.array([-11.0, -20.0]),
        np.array([4.0, 8.0]), np.array([6.0, 2.0]),
    )  # fmt: skip
    found = metrics(Dpo(beta=0.5), pairs)
    assert found == pytest.approx(
        {
            "chosen_logp": -15.0, "rejected_logp": -15.0, "chosen_reward": 0.25, "rejected_reward": 0.25, "margin": 0.0,
            "accuracy": 0.5, "kl": (-1.0 + 0.0 + 1.0 - 2.0) / 20,
        }
    )  # fmt: skip
    assert set(metrics(Dpo(loss="orpo"), pairs)) == {"chosen_logp", "rejected_logp", "accuracy"}


class TestStart:
    def tie(self, off: float = 0.0) -> Pairs:
        logp, tokens = -np.arange(10.0, 20.0), np.full(10, 12.0)
        return Pairs(logp + off, logp - 3, logp, logp - 3, tokens, tokens)

    @pytest.mark.parametrize("kind", [{}, {"sft_weight": 1.0}, {"loss": "ipo"}, {"loss": "hinge"}], ids=str)
    def test_a_tie_passes(self, kind: dict[str, Any]) -> None:
        check_start(Dpo(**kind), self.tie(1e-6), "float32")

    @pytest.mark.parametrize("kind", [{}, {"loss": "ipo"}, {"loss": "hinge"}], ids=str)
    def test_another_reference_is_refused(self, kind: dict[str, Any]) -> None:
        with pytest.raises(RunError, match="not those of the start weights"):
            check_start(Dpo(**kind), self.tie(0.01), "float32")
        check_start(Dpo(), self.tie(0.01), "bfloat16")  # sums of 16-bit products differ by more

    @pytest.mark.parametrize("kind", [{"beta": 1.0}, {"loss": "ipo"}, {"loss": "hinge"}], ids=str)
    def test_long_answers_round_by_more(self, kind: dict[str, Any]) -> None:
        """What two engines were seen to differ by, on answers of 376 nats; and one step of an adapter."""
        logp, tokens = np.full(4, -376.0), np.full(4, 140.0)
        check_start(Dpo(**kind), Pairs(logp + 2.6e-3, logp - 2.6e-3, logp, logp, tokens, tokens), "float32")
        off = np.array([0.3, -0.3, 0.0, 0.0])  # the mean hides it
        with pytest.raises(RunError, match=r"0\.3 nats from the reference's"):
            check_start(Dpo(**kind), Pairs(logp + off, logp, logp, logp, tokens, tokens), "float32")

    def test_a_reference_made_here_is_held_to_the_loss_of_a_tie(self) -> None:
        logp, tokens = np.full(4, -376.0), np.full(4, 140.0)
        apart = Pairs(logp + 2.6e-3, logp - 2.6e-3, logp, logp, tokens, tokens)
        with pytest.raises(RunError, match=r"instead of 0\.693147"):
            check_start(Dpo(), apart, "float32", made=True)
        check_start(Dpo(), self.tie(1e-6), "float32", made=True)
        check_start(Dpo(), apart, "bfloat16", made=True)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_what_is_not_a_number_is_no_tie(self, dtype: str) -> None:
        with pytest.raises(RunError, match="not those of the start weights"):
            check_start(Dpo(), self.tie(math.nan), dtype)

    def test_a_gradient_of_rounding_is_none(self) -> None:
        assert 1.04e-6 < least_gradient(Dpo()) < 1e-4, "measured on equal answers; 2.6 on others"
        assert least_gradient(Dpo(loss="ipo")) == pytest.approx(1e-3)
