"""What is refused and said of a plan's rows: those that cannot be trained or scored, and ids or lengths beyond the model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from smolmlx.data.chat import Tokenizer
from smolmlx.data.encode import NO_TARGET, TOO_LONG, Account
from smolmlx.data.store import TokenStore
from smolmlx.errors import DataError, RecipeError
from smolmlx.models import BaseModel
from smolmlx.recipe import Loaded, Recipe


def check_account(store: TokenStore, loaded: Loaded, named: str | list[str]) -> None:
    """Refuse data of which most is not trained: a healthy-looking loss would hide it."""
    account = store.account
    name = named if isinstance(named, str) else ", ".join(named)
    listed = [f"{reason}: {count} rows, first at {account.first[reason]}" for reason, count in account.reasons.items()]
    advice = _advice(account, loaded.recipe)
    if not len(store):
        raise DataError(f"{name}: none of its {account.rows} rows can be trained. {advice}", listed)
    if account.lost * 2 > account.rows and not loaded.recipe.data.allow_affected:
        count = f"{account.lost} of {account.rows} rows cannot be trained, more than half"
        raise DataError(f"{name}: {count}. {advice} Or go on with data.allow_affected: true", listed)


def unscored(store: TokenStore | None, recipe: Recipe) -> Iterator[str]:
    """Say how many validation rows are lost, since the best checkpoint rests on the others."""
    if store is not None and store.account.lost:
        account = store.account
        why = ", ".join(
            f"{reason}: {count}, first at {account.first[reason]}" for reason, count in account.reasons.items()
        )
        yield f"data.validation: {account.lost:,} of {account.rows:,} rows cannot be scored ({why}). {_advice(account, recipe)}"


def beyond_context(model: BaseModel, store: TokenStore) -> Iterator[str]:
    longest = int(store.lengths.max(initial=0))
    if model.context is not None and longest > model.context:
        yield f"data.max_length: the longest row has {longest:,} tokens, the model was made for {model.context:,}. Lower it to that."


def _advice(account: Account, recipe: Recipe) -> str:
    if account.reasons[TOO_LONG] >= account.reasons[NO_TARGET]:
        possible = ("truncate_prompt", *(["split"] if recipe.stage != "dpo" else []))
        others = ", ".join(name for name in possible if name != recipe.data.overlong)
        return f"Raise data.max_length{f', or choose another data.overlong ({others})' if others else ''}."
    return "Each row needs an assistant turn that is not empty within data.max_length; see `smolmlx data inspect`."


def check_ids(tokenizer: Tokenizer, model: BaseModel, store: TokenStore) -> None:
    vocabulary = int(model.config.get("vocab_size", 0))
    if tokenizer.vocab_size > vocabulary and len(store.ids) and int(np.max(store.ids)) >= vocabulary:
        raise RecipeError(
            f"model: the tokenizer in {tokenizer.folder} makes ids up to {int(np.max(store.ids))}, but the model has {vocabulary} "
            "embeddings. They do not belong together; set model.tokenizer to the model's own."
        )
