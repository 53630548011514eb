"""How rows are laid into batches where there is a choice: whichever is estimated to be cheaper, and said so."""

from __future__ import annotations

from typing import Any

import numpy as np

from smolmlx.data.batches import BatchPlan, plan_batches
from smolmlx.data.pair_batches import PairPlan, plan_pairs
from smolmlx.data.store import TokenStore
from smolmlx.models import BaseModel
from smolmlx.recipe import Recipe


def choose_packing(recipe: Recipe, store: TokenStore, model: BaseModel, pad_id: int, notes: list[str]) -> BatchPlan:
    """Pack where that is estimated to be cheaper, and say so.

    A packed row costs attention over the whole row (the mask is dense on some engines); a padded one costs its padding.
    """
    train = recipe.train

    def plan(pack_to: int | None) -> BatchPlan:
        return plan_batches(
            store,
            batch_size=train.batch_size,
            accumulation=train.accumulation,
            seed=train.seed,
            pack_to=pack_to,
            pad_id=pad_id,
        )

    apart = plan(None)
    wanted = recipe.data.packing
    if recipe.stage == "pretrain" or wanted == "off":
        return apart
    packed = plan(recipe.data.max_length)
    if wanted == "on":
        return packed
    costs = [epoch_cost(candidate, model) for candidate in (apart, packed)]
    # Packing also changes how many rows an optimizer step sees, so it must be clearly cheaper to be chosen.
    chosen = packed if costs[1] < 0.8 * costs[0] else apart
    name = "packed rows" if chosen is packed else "length-sorted batches"
    notes.append(
        f"{name}: estimated cost of an epoch {costs[1] / costs[0]:.2f}x when packed (data.packing: on|off decides otherwise)."
    )
    return chosen


def choose_sharing(recipe: Recipe, store: TokenStore, model: BaseModel, pad_id: int, notes: list[str]) -> PairPlan:
    """Compute prompts once for both answers where that is estimated to be cheaper, and say so."""
    train = recipe.train
    options: dict[str, Any] = {
        "batch_size": train.batch_size, "accumulation": train.accumulation, "seed": train.seed, "pad_id": pad_id,
    }  # fmt: skip
    wanted = recipe.dpo.shared_prompt
    if wanted is not True and train.gradient_checkpointing:
        if wanted == "auto":
            notes.append("prompts computed with each answer: gradient checkpointing does not reach a shared prompt.")
        return plan_pairs(store, **options)
    if wanted != "auto":
        return plan_pairs(store, shared=wanted, **options)
    together = plan_pairs(store, shared=True, **options)
    plans = [together.apart(), together]
    costs = [pair_epoch_cost(plan, model) for plan in plans]
    chosen = plans[costs[1] < costs[0]]
    name = "prompts computed once for both answers" if chosen.shared else "prompts computed with each answer"
    notes.append(
        f"{name}: estimated cost of an epoch {costs[1] / costs[0]:.2f}x when shared (dpo.shared_prompt: true|false decides otherwise)."
    )
    return chosen


def pair_epoch_cost(plan: PairPlan, model: BaseModel) -> float:
    """Estimate the relative cost of an epoch of pairs, as `epoch_cost` does; masks are dense where prompts are shared."""
    linear = sum(width_in * width_out for width_in, width_out in model.linear_shapes().values())
    attention = model.num_layers * int(model.config.get("hidden_size", 1))
    total = 0.0
    for rows in plan.order.epoch_order(0):
        prefix, tail = plan.shape(rows)
        scores = prefix * prefix + 2 * tail * (prefix + tail)
        total += (prefix + 2 * tail) * linear + attention * scores * (2 if plan.shared else 1)
    return total


def epoch_cost(plan: BatchPlan, model: BaseModel) -> float:
    """Estimate the relative cost of an epoch: matrix products of the blocks, and attention over each row's width."""
    linear = sum(width_in * width_out for width_in, width_out in model.linear_shapes().values())
    attention = model.num_layers * int(model.config.get("hidden_size", 1))
    lengths, widths = plan.row_lengths, np.array(plan.widths)
    total = 0.0
    for rows in plan.epoch_order(0):
        width = float(widths[np.searchsorted(widths, lengths[rows].max())])
        total += plan.batch_size * width * (linear + attention * width * (2 if plan.packed else 1))
    return total
