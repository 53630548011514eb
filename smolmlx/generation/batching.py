"""The schedule of a batch: rows enter as places fall free, and leave as they end. Engines only compute.

An engine offers `Steps`: keys and values of prompts put into places, and one token chosen for every place. A row's
tokens depend neither on its place nor on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np

from smolmlx.backend import Completion, Decoding, OnText
from smolmlx.data.chat import Tokenizer
from smolmlx.generation.grammar import Words, grammars, pack
from smolmlx.generation.row import Row
from smolmlx.generation.sampling import Picks, gather

_SHORTEST_PREFIX = 16
"""Tokens below which computing a common beginning once saves nothing."""
_TOGETHER = 8
"""Most prompts of one prefill, which bounds its padding and its memory."""

GROWTH = 256
"""Columns by which an engine's store of keys grows."""
PREFILL = 512
"""Most tokens of each prompt in one forward pass."""

_Found = TypeVar("_Found")

Feed = Sequence[Sequence[int]] | Any
"""Tokens for each place (none for one that is free), or what `step` returned: one token for each place."""


class Steps(Protocol):
    """What an engine computes for a batch of places."""

    most: int | None
    """Most places this model can be run with; None for any number."""

    def open(self, num_places: int, prefix: Sequence[int]) -> None:
        """Begin with free places; every prompt will begin with `prefix`, whose keys and values are computed once."""

    def admit(self, places: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Compute keys and values of prompts, each without its last token, into free places."""

    def release(self, place: int) -> None:
        """Let a place be free."""

    def grow(self, num_places: int) -> None:
        """Add free places behind the others."""

    def keep(self, places: Sequence[int]) -> None:
        """Drop all other places; those kept are counted from 0 again, in this order."""

    def step(self, feed: Feed, picks: Callable[[], Picks]) -> Any:
        """Feed tokens and choose the next one for each place; the result may still be in the making.

        Args:
            picks: called once the model's work is under way, so that masks are made beside it.
        """

    def read(self, tokens: Any) -> list[int]:
        """Return a step's tokens, one for each place."""

    @property
    def num_words(self) -> int:
        """Words of 32 tokens that a mask over the model's vocabulary has."""


Guard = Callable[[Sequence[Sequence[int]], Decoding], AbstractContextManager[None]]
"""(prompts, how) -> what an engine puts around a batch, to say what its own errors mean."""


def no_guard(prompts: Sequence[Sequence[int]], how: Decoding) -> AbstractContextManager[None]:
    return nullcontext()


class Batcher:
    """Runs rows through an engine's steps."""

    def __init__(self, steps: Steps, tokenizer: Tokenizer, batch_size: int, guard: Guard = no_guard) -> None:
        self.steps, self.tokenizer, self.guard = steps, tokenizer, guard
        self.batch_size = min(batch_size, steps.most or batch_size)
        self._rows: list[Row | None] = []
        self._fed: list[list[int]] = []

    def make_row(self, index: int, prompt: Sequence[int], how: Decoding, on_text: OnText | None = None) -> Row:
        """Return a row to run; raises RecipeError for a schema that cannot be kept to."""
        assert prompt, "a prompt has at least one token"
        grammar = None
        if how.schema is not None:
            grammar = grammars(self.tokenizer, how.stop_ids or self.tokenizer.eos_ids).compile(
                how.schema, how.max_tokens
            )
        return Row(index, prompt, how, self.tokenizer, grammar, on_text)

    def run(self, rows: Sequence[Row], more: Callable[[], Sequence[Row]] | None = None) -> Generator[Row, None, None]:
        """Yield rows as they are over, in any order; `more` is asked at each step for rows that have come since."""
        how = replace(rows[0].how if rows else Decoding(), batch_size=self.batch_size)
        with self.guard([row.prompt for row in rows], how):
            yield from self._run(rows, more)

    def _run(self, rows: Sequence[Row], more: Callable[[], Sequence[Row]] | None) -> Iterator[Row]:
        # Long prompts first: rows of like length are prefilled together, and what is too much for the memory fails at once.
        waiting = sorted(rows, key=lambda row: -len(row.prompt))
        size = max(1, min(self.batch_size, len(rows)))
        self._rows, self._fed = [None] * size, [[] for _ in range(size)]
        self.steps.open(size, common_prefix([row.prompt for row in rows]) if more is None else ())
        ahead: Any = None
        while True:
            waiting += more() if more else ()
            if ahead is None:
                self._grow(len(waiting))
                yield from self._admit(waiting)
                self._shrink(bool(waiting))
                if not any(self._rows):
                    if waiting:
                        continue
                    return
            owners = list(self._rows)
            now = ahead if ahead is not None else self.steps.step(self._fed, self._picks)
            ahead = self.steps.step(now, self._picks) if self._may_go_ahead(bool(waiting)) else None
            for place, token in enumerate(self.steps.read(now)):
                row = owners[place]
                if row is None or row is not self._rows[place]:
                    continue
                self._fed[place] = _alone(row, row.take, token) or []
                if row.over:
                    self._free(place)
                    yield row
            if ahead is not None and not any(self._rows):
                ahead = None

    def _admit(self, waiting: list[Row]) -> Iterator[Row]:
        free = [place for place, row in enumerate(self._rows) if row is None]
        while free and waiting:
            group: list[Row] = []
            while waiting and len(group) < min(len(free), _TOGETHER):
                row = waiting.pop(0)
                fed = _alone(row, row.start) or []
                if row.over:  # the grammar left no choice at all, or it failed
                    yield row
                    continue
                place = free[len(group)]
                self._rows[place], self._fed[place] = row, fed
                group.append(row)
            if group:
                self.steps.admit(free[: len(group)], [row.prompt for row in group])
            free = free[len(group) :]

    def _grow(self, num_waiting: int) -> None:
        """Make room for rows that came while others run."""
        wanted = min(self.batch_size, sum(row is not None for row in self._rows) + num_waiting)
        missing = wanted - len(self._rows)
        if missing > 0:
            self.steps.grow(missing)
            self._rows += [None] * missing
            self._fed += [[] for _ in range(missing)]

    def _shrink(self, has_waiting: bool) -> None:
        """Drop free places once they are more than half and nobody waits for one."""
        busy = [place for place, row in enumerate(self._rows) if row is not None]
        if not has_waiting and 0 < len(busy) <= len(self._rows) // 2:
            self.steps.keep(busy)
            self._rows, self._fed = [self._rows[p] for p in busy], [self._fed[p] for p in busy]

    def _may_go_ahead(self, has_waiting: bool) -> bool:
        """Whether the step after this one can start before this one's tokens are known."""
        busy = [row for row in self._rows if row is not None]
        few = len(busy) <= len(self._rows) // 2 and len(self._rows) > 1
        last = all(len(row.ids) + 1 >= row.how.max_tokens for row in busy)
        return bool(busy) and not (
            last or any(row.restricted for row in busy) or few or (has_waiting and len(busy) < self.batch_size)
        )

    def _free(self, place: int) -> None:
        self._rows[place], self._fed[place] = None, []
        self.steps.release(place)

    def _picks(self) -> Picks:
        hows = [row.how if row else Decoding() for row in self._rows]
        uniform = [row.draws.next() if row and row.how.temperature > 0 else 0.0 for row in self._rows]
        return gather(hows, uniform, self._allowed(), self._seen())

    def _allowed(self) -> Words | None:
        width = self.steps.num_words
        masks = [_alone(row, row.allowed, width) if row else None for row in self._rows]
        if all(mask is None for mask in masks):
            return None
        found = np.zeros((len(masks), width), np.uint32)
        for place, mask in enumerate(masks):
            if mask is None:
                found[place] = 0xFFFFFFFF
            else:
                found[place, : min(width, len(mask))] = mask[:width]
        return found

    def _seen(self) -> Words | None:
        if all(row is None or row.how.repetition_penalty == 1 for row in self._rows):
            return None
        width = self.steps.num_words
        return np.stack([pack(row.ids if row else (), 32 * width) for row in self._rows])


def _alone(row: Row, act: Callable[..., _Found], *arguments: Any) -> _Found | None:
    """Do what concerns one row; what goes wrong there ends that row, and not its neighbours."""
    if row.error is None:
        try:
            return act(*arguments)
        except Exception as error:  # raised again where the row's answer is asked for
            row.error = error
    return None


def common_prefix(prompts: Sequence[Sequence[int]]) -> Sequence[int]:
    """Return what several prompts all begin with, leaving at least one token of each; nothing where it is short."""
    if len(prompts) < 2:
        return ()
    first, last = min(map(list, prompts)), max(map(list, prompts))
    most = min(map(len, prompts)) - 1
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), most)
    length = min(length, most)
    return first[:length] if length >= _SHORTEST_PREFIX else ()


def run_all(
    batcher: Batcher, prompts: Iterable[Sequence[int]], how: Decoding, on_text: OnText | None
) -> Iterator[Completion]:
    """Answer prompts that are decoded alike; what an engine's `generate` does."""
    rows = [batcher.make_row(index, list(prompt), how, on_text) for index, prompt in enumerate(prompts)]
    if rows:
        for row in batcher.run(rows):
            yield row.completion()
