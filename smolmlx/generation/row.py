"""One answer while it is written: its tokens, its text, its place in a grammar, and when it is over."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from smolmlx.backend import Completion, Decoding, OnText
from smolmlx.data.chat import Tokenizer
from smolmlx.generation.grammar import Grammar, Walk, Words, pack
from smolmlx.generation.sampling import Draws

_SELDOM = 16
"""Tokens between two looks for a way out while the budget is far: brackets may open on and on."""
_BROKEN = "�"
"""What a decoder writes for bytes that are not yet a character."""


class Row:
    """The state of one answer; engines never see it."""

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        how: Decoding,
        tokenizer: Tokenizer,
        grammar: Grammar | None = None,
        on_text: OnText | None = None,
    ) -> None:
        self.index, self.prompt, self.how = index, prompt, how
        self.ids: list[int] = []
        self.draws = Draws(how.seed, index)
        self.finished = self._cancelled = False
        """The answer ended by itself."""
        self.error: Exception | None = None
        """What went wrong with this row alone."""
        self._tokenizer, self._on_text = tokenizer, on_text
        self._stops = frozenset(how.stop_ids or tokenizer.eos_ids)
        self._walk = grammar.start() if grammar else None
        self._num_forced, self._shortened = 0, False
        self._way: list[int] = []
        """Tokens that end the answer from here, once its budget is near."""
        self._text, self._told, self._decoded = "", 0, 0
        self._grams: set[tuple[int, ...]] = set()

    @property
    def over(self) -> bool:
        return self.finished or self._cancelled or self.error is not None or len(self.ids) >= self.how.max_tokens

    def cancel(self) -> None:
        """End the answer at its next token: nobody waits for it any more."""
        self._cancelled = True

    @property
    def restricted(self) -> bool:
        """Whether the next choice depends on the tokens so far, which must then be known first."""
        return self._walk is not None or self.how.no_repeat_ngram > 0 or self.how.repetition_penalty != 1

    def start(self) -> list[int]:
        """Return what is fed first: the prompt's last token, and what the grammar puts in front of any choice."""
        fed = [self.prompt[-1], *self._take_forced()]
        self._tell()  # the grammar may have written all of the answer
        return fed

    def take(self, token: int) -> list[int]:
        """Add a chosen token; return what is fed next, that token and those the grammar then forces; none when over."""
        if self._walk is not None:
            token = self._within_budget(token)
        if token in self._stops:
            self.finished = True
        else:
            self._add(token)
        if self._walk is not None and not self.finished:
            self._walk.take(token)
        fed = [token, *self._take_forced()]
        self._tell()
        return [] if self.over else fed

    def _add(self, token: int) -> None:
        self.ids.append(token)
        size = self.how.no_repeat_ngram
        if size and len(self.ids) >= size:
            self._grams.add(tuple(self.ids[-size:]))

    def _take_forced(self) -> list[int]:
        if self._walk is None or self.finished:
            return []
        forced = self._walk.forced()
        for token in forced:
            self._walk.take(token)
            self._add(token)
        self._num_forced += len(forced)
        self.finished = self._walk.over
        return forced

    def _within_budget(self, token: int) -> int:
        """Return the token, or the first of a way out where the answer could not be ended whole behind it."""
        assert self._walk is not None
        left = self.how.max_tokens - len(self.ids)
        near = left <= self._walk.grammar.margin
        if token in self._stops or not (near or len(self.ids) % _SELDOM == 0):
            return token
        after, forced = self._look_ahead(token)
        way = after.way_out(left - 1 - len(forced) - (0 if near else _SELDOM))
        if way is None:
            self._shortened = True
            # The way that was found a step ago still fits; one made anew from here may be longer.
            known = self._way or self._walk.way_out(left)
            if not known:
                return token
            token = known[0]
            way = known[1 + len(self._look_ahead(token)[1]) :]
        self._way = way
        return token

    def _look_ahead(self, token: int) -> tuple[Walk, list[int]]:
        """Return where a token and what it forces would lead, and what it forces."""
        assert self._walk is not None
        after = self._walk.copy()
        after.take(token)
        forced = after.forced()
        for one in forced:
            after.take(one)
        return after, forced

    def allowed(self, num_words: int) -> Words | None:
        """Return the tokens that may come next as words, or None where all may."""
        found = self._walk.allowed() if self._walk is not None else None
        banned = self._repeats()
        if banned:
            every = np.full(num_words, 0xFFFFFFFF, np.uint32) if found is None else found
            left = every & ~pack(banned, 32 * len(every))
            # A grammar that leaves nothing else may repeat.
            found = left if left.any() else every
        return found

    def _repeats(self) -> list[int]:
        size = self.how.no_repeat_ngram
        if not size or len(self.ids) < size - 1:
            return []
        head = tuple(self.ids[len(self.ids) - size + 1 :])
        return [gram[-1] for gram in self._grams if gram[:-1] == head]

    def _tell(self) -> None:
        """Decode what is new where somebody listens or a text may end the answer."""
        if self._on_text is None and not self.how.stop:
            return
        self._decode()
        ends = [place for place in (self._text.find(stop) for stop in self.how.stop) if place >= 0]
        if ends:
            self._text = self._text[: min(ends)]
            self.finished = True
        if self._on_text is not None:
            certain = len(self._text) if self.over else len(self._text) - self._held_back()
            if certain > self._told:
                self._on_text(self.index, self._text[self._told : certain])
                self._told = certain

    def _held_back(self) -> int:
        """Return how many characters at the end may yet turn out to begin a stop text."""
        longest = max(map(len, self.how.stop), default=1) - 1
        tails = (size for size in range(min(longest, len(self._text)), 0, -1))
        return next((n for n in tails if any(stop.startswith(self._text[-n:]) for stop in self.how.stop)), 0)

    def _decode(self) -> None:
        """Add the text of new tokens; a few tokens before them are decoded along, as spaces depend on neighbours."""
        start = max(0, self._decoded - 6)
        before = self._tokenizer.decode(self.ids[start : self._decoded])
        after = self._tokenizer.decode(self.ids[start:])
        if after.endswith(_BROKEN) and not self.over:
            return
        self._text += after[len(before) :]
        self._decoded = len(self.ids)

    def completion(self) -> Completion:
        """Return the finished answer, or raise what went wrong with it."""
        if self.error is not None:
            raise self.error
        ended_by_text = self.finished and self.how.stop
        text = self._text if ended_by_text else self._tokenizer.decode(self.ids)
        return Completion(
            self.index, tuple(self.ids), self.finished, text, len(self.prompt), self._num_forced, self._shortened
        )
