"""Each engine's preference losses, and what its autograd makes of them, beside the closed forms in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lab import import_mlx
from pair_reference import KINDS, columns, one_pair, some_pairs
from smolmlx.preferences import Pairs, pair_losses
from smolmlx.recipe import Dpo

Floats = npt.NDArray[np.float64]
Slopes = Callable[[Dpo, list[npt.NDArray[np.float32]]], tuple[Floats, Floats, Floats]]


def by_mlx(how: Dpo, arrays: list[npt.NDArray[np.float32]]) -> tuple[Floats, Floats, Floats]:
    """Return the loss of each pair and its slopes by the log-probability of the chosen and of the rejected answer."""
    mx = import_mlx()
    from smolmlx_mlx.pairs import OPS

    chosen, rejected, *rest = map(mx.array, arrays)

    def losses(c: Any, r: Any) -> Any:
        return pair_losses(how, OPS, Pairs(c, r, *rest))

    slopes = mx.grad(lambda c, r: losses(c, r).sum(), argnums=(0, 1))(chosen, rejected)
    one, two, three = (np.array(found, np.float64) for found in (losses(chosen, rejected), *slopes))
    return one, two, three


def by_torch(how: Dpo, arrays: list[npt.NDArray[np.float32]]) -> tuple[Floats, Floats, Floats]:
    """As `by_mlx`."""
    import torch

    from smolmlx_cuda.pairs import OPS

    chosen, rejected, *rest = map(torch.from_numpy, arrays)
    losses = pair_losses(how, OPS, Pairs(chosen.requires_grad_(), rejected.requires_grad_(), *rest))
    slopes = torch.autograd.grad(losses.sum(), (chosen, rejected))
    one, two, three = (found.detach().numpy().astype(np.float64) for found in (losses, *slopes))
    return one, two, three


ENGINES: dict[str, Slopes] = {"mlx": by_mlx, "cuda": by_torch}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_values_and_slopes_are_those_of_the_reference(engine: str, kind: dict[str, Any]) -> None:
    if engine not in ENGINES:
        pytest.skip(f"{engine} offers no dpo")
    how = Dpo(**kind)
    arrays = [np.asarray(column, np.float32) for column in columns(some_pairs())]
    wanted = np.array([one_pair(how, *map(float, row)) for row in zip(*arrays, strict=True)])
    found = ENGINES[engine](how, arrays)
    for name, mine, other in zip(("loss", "by chosen", "by rejected"), found, wanted.T, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5), name
