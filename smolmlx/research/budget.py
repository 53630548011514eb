"""Fitting passages into a model's context: passages give way, questions never do."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from smolmlx.data.chat import Tokenizer
from smolmlx.errors import DataError
from smolmlx.tasks.registry import Registry, number_passages

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s)|\n{2,}")
_SHORTEST_PASSAGE = 16
"""Tokens below which a passage says nothing; a question that leaves less room is refused."""


_GO_ON = frozenset({"continuation"})
"""Tasks that go on from a text's end: of what is too long the end is kept."""


class PassageCut(UserWarning):
    """A passage was too long for the model, and its end was left out; of a text to go on with, its beginning."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What goes into one prompt."""

    fixed: Mapping[str, str]
    """Fields that are never cut, such as the question."""
    passages: tuple[str, ...]


Fill = Callable[[Asked], dict[str, str]]


def fill_single(asked: Asked) -> dict[str, str]:
    return {**asked.fixed, "passage": asked.passages[0]}


def fill_pair(asked: Asked) -> dict[str, str]:
    return {**asked.fixed, "passage_a": asked.passages[0], "passage_b": asked.passages[1]}


def fill_numbered(asked: Asked) -> dict[str, str]:
    return {**asked.fixed, "passages": number_passages(asked.passages)}


@dataclass(frozen=True, slots=True)
class Budget:
    """Room for prompts: tokens of the model's context, less those of the answer."""

    tokenizer: Tokenizer
    registry: Registry
    context: int | None

    def answer_tokens(self, task: str) -> int:
        """Return how long an answer may be: what the task allows, and at most a third of the context."""
        asked = self.registry.task(task).max_tokens
        return asked if self.context is None else min(asked, self.context // 3)

    def prompt(self, task: str, asked: Asked, style: str, fill: Fill) -> str:
        """Lay a request out within the budget; what is cut is warned about.

        Raises:
            DataError: the question itself, with a little of each passage, does not fit.
        """
        text = self.registry.prompt(task, fill(asked), style).text
        if self.context is None:
            return text
        room = self.context - self.answer_tokens(task)
        if self._length(text) <= room:
            return text
        empty = Asked(asked.fixed, tuple("" for _ in asked.passages))
        frame = self._length(self.registry.prompt(task, fill(empty), style).text)
        if room - frame < _SHORTEST_PASSAGE * len(asked.passages):
            raise DataError(
                f"{task}: the question and its instruction take {frame} tokens and the answer may take "
                f"{self.answer_tokens(task)}, of a context of {self.context}: no room is left for "
                f"{len(asked.passages)} passage(s). Shorten the question, give fewer passages, or use a model with a longer context."
            )
        return self._shorten(task, asked, style, fill, room - frame)

    def _shorten(self, task: str, asked: Asked, style: str, fill: Fill, room: int) -> str:
        lengths = [self.count(passage) for passage in asked.passages]
        limit = self.context or 0
        cut, side = (self.cut_start, "last") if task in _GO_ON else (self.cut, "first")
        while True:
            parts = share_out(lengths, room)
            passages = tuple(cut(text, part) for text, part in zip(asked.passages, parts, strict=True))
            text = self.registry.prompt(task, fill(Asked(asked.fixed, passages)), style).text
            excess = self._length(text) - (limit - self.answer_tokens(task))
            if excess <= 0:
                break
            room -= excess  # tokens at the seams come out a little differently than counted apart
        kept = [self.count(passage) for passage in passages]
        said = ", ".join(
            f"passage {i + 1}: the {side} {kept[i]} of {lengths[i]} tokens kept"
            for i in range(len(parts))
            if kept[i] < lengths[i]
        )
        warnings.warn(f"{task}: cut to fit the model's context of {limit}: {said}", PassageCut, stacklevel=5)
        return text

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def cut(self, text: str, num_tokens: int) -> str:
        """Return the beginning of a text, of at most so many tokens: whole sentences where one ends in its second half."""
        offsets = self.tokenizer.fast.encode(text, add_special_tokens=False).offsets
        if len(offsets) <= num_tokens:
            return text
        stop = int(offsets[num_tokens - 1][1]) if num_tokens > 0 else 0
        ends = [
            match.end()
            for match in _SENTENCE_END.finditer(text, 0, min(stop + 1, len(text)))
            if match.end() > stop // 2
        ]
        if ends:
            return text[: ends[-1]].rstrip()
        words = text[:stop].rsplit(maxsplit=1)
        return words[0] if len(words) > 1 else text[:stop]

    def cut_start(self, text: str, num_tokens: int) -> str:
        """Return the end of a text, of at most so many tokens: from the start of a sentence where one lies in its first half."""
        offsets = self.tokenizer.fast.encode(text, add_special_tokens=False).offsets
        if len(offsets) <= num_tokens:
            return text
        start = int(offsets[-num_tokens][0]) if num_tokens > 0 else len(text)
        middle = (start + len(text)) // 2
        begin = next((match.end() for match in _SENTENCE_END.finditer(text, start) if match.end() <= middle), None)
        words = text[start:].split(maxsplit=1)
        kept = text[begin:].lstrip() if begin is not None else words[1] if len(words) > 1 else text[start:]
        # A word at the beginning of a text may take more tokens than behind a space.
        while self.count(kept) > num_tokens and len(words := kept.split(maxsplit=1)) > 1:
            kept = words[1]
        return kept

    def _length(self, prompt: str) -> int:
        return len(self.tokenizer.encode(self.tokenizer.prompt([{"role": "user", "content": prompt}])))


def share_out(lengths: Sequence[int], room: int) -> list[int]:
    """Divide room among texts: short ones stay whole, the long ones get equal parts of what is left."""
    parts = [0] * len(lengths)
    left = room
    for place, index in enumerate(sorted(range(len(lengths)), key=lambda i: lengths[i])):
        parts[index] = min(lengths[index], left // (len(lengths) - place))
        left -= parts[index]
    return parts
