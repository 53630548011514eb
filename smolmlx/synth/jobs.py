"""What to ask about which chunk, and the rows an accepted answer becomes.

Everything here is a function of the chunks, the registry and the seed: each draw has a key of its own, so neither the
number of workers nor an interruption changes what is asked. Passages of one row come from one split.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from smolmlx.data.notes import Notes
from smolmlx.evals.notes import strict_compliance
from smolmlx.evals.parsers import QAPair, RetrievalResult
from smolmlx.synth.chunks import Chunk
from smolmlx.synth.notes import MIN_SUPPORT, Dice, support
from smolmlx.synth.runtimes import Request
from smolmlx.synth.store import ChunkStore
from smolmlx.tasks import MADE
from smolmlx.tasks.registry import SOURCES, Prompt, Registry, number_passages
from smolmlx.tasks.replies import Rejected, render
from smolmlx.tasks.schemas import ANSWERS, Answer, Quest, Question, Value, plain

TOO_SHORT = "chunk too short"
ALONE = "no other chunk to set beside it"
LAYOUTS = ("messages", "prompt-completion", "alpaca")
NO_PASSAGE = "None of the passages answers the question."
GAP = "[...]"

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n{2,}")
_WORD = re.compile(r"\S+")
_ABOUT_ITSELF = re.compile(
    r"\b(?:the|this|that|given|above|following) (?:passage|text|paragraph|excerpt|section)\b", re.I
)
_MIN_COMPARISON_WORDS = 12
_MIN_REPHRASED = 0.4
"""A rephrased text of less than this share of the words has lost something."""
_MAX_COPIED = 3
"""Most lines of a model's notes that may stand word for word in the passage."""
_TRIES = 50

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Job:
    """One task on one chunk; `draw` counts generations of the same."""

    number: int
    task: str
    chunk: int
    draw: int


@dataclass(frozen=True, slots=True)
class Order:
    """What the user asked for."""

    tasks: tuple[str, ...] = MADE
    seed: int = 0
    layout: str = "messages"
    model: str = ""
    runtime: str = ""
    quantize: str = "none"
    """How the model was quantized here; a server says nothing of it."""


@dataclass(frozen=True, slots=True)
class Outline:
    """How much there is to do."""

    jobs: Counter[str] = field(default_factory=Counter)
    """Task -> jobs."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> chunks drawn for a task that cannot have it."""

    @property
    def total(self) -> int:
        return sum(self.jobs.values())


@dataclass(frozen=True, slots=True)
class _Material:
    """The passages of one job, as they will stand in the row."""

    chunks: tuple[Chunk, ...]
    passages: tuple[str, ...]
    gold: int | None = None
    """Of a retrieval row: which passage answers, counted from 0."""
    answering: str = ""
    """Of a retrieval row: the passage the question is made from."""


def chance(*key: object) -> float:
    """Return a number in [0, 1) that depends on the key alone."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / (1 << 56)


def _dice(*key: object) -> Dice:
    return Dice(int(chance(*key) * (1 << 56)))


class Workshop:
    """Makes jobs, requests and rows from chunks."""

    def __init__(self, store: ChunkStore, registry: Registry, order: Order) -> None:
        self.store, self.registry, self.order = store, registry, order
        for task in order.tasks:
            registry.task(task)
        self._derived = [task for task in SOURCES if task in registry.tasks]

    def jobs(self, outline: Outline | None = None) -> Iterator[Job]:
        """Yield all jobs in order; `outline` counts them, and what is left out, as they pass."""
        outline = outline or Outline()
        number = 0
        for chunk in range(len(self.store)):
            identity = self.store[chunk].id
            for task in self.order.tasks:
                spec = self.registry.task(task)
                if chance(self.order.seed, identity, task) >= spec.probability:
                    continue
                if self.store.num_words(chunk) < spec.min_words:
                    outline.left_out[TOO_SHORT] += 1
                elif not self._has_company(chunk, task):
                    outline.left_out[ALONE] += 1
                else:
                    for draw in range(spec.generations):
                        outline.jobs[task] += 1
                        yield Job(number, task, chunk, draw)
                        number += 1

    def _has_company(self, chunk: int, task: str) -> bool:
        wanted = {"comparison": 1, "retrieval": (self.registry.task(task).passages or (2, 2))[0]}.get(task, 0)
        if not wanted:
            return True
        near = sum(self.store.overlap(chunk, other) for other in self.store.document_of(chunk))
        return len(self.store.split_of(chunk)) - near >= wanted

    def key(self, job: Job) -> str:
        """Return the name of a job, the same in every run."""
        return f"{self.store[job.chunk].id}/{job.task}/{job.draw}"

    def request(self, job: Job, attempt: int) -> Request | None:
        """Return what a model is asked; None where the row needs no model."""
        if job.task == "continuation":
            return None
        key = self.key(job)
        spec = self.registry.task(job.task)
        material = self._material(job, key)
        if job.task == "comparison":
            fields = dict(zip(("passage_a", "passage_b"), material.passages, strict=True))
        else:
            fields = {"passage": material.answering or material.passages[0]}
        paraphrase = int(chance(self.order.seed, key, "maker") * self.registry.num_paraphrases(job.task))
        prompt = self.registry.maker_prompt(job.task, fields, paraphrase)
        seed = int(chance(self.order.seed, key, "sample", attempt) * (1 << 31))
        return Request(prompt.text, self.schema(job), spec.max_tokens, spec.temperature, seed)

    def schema(self, job: Job) -> type[Answer]:
        """Return what a model's answer to the request must be."""
        return Question if job.task == "retrieval" else ANSWERS[job.task]

    def refuse(self, job: Job, value: Value) -> Rejected | None:
        """Return why an answer that keeps to its schema still teaches nothing, or None."""
        passage = self._material(job, self.key(job)).passages[0]
        if job.task == "rephrase" and isinstance(value, str):
            if plain(value).lower() == plain(passage).lower():
                return Rejected("copies the passage")
            if len(value.split()) < _MIN_REPHRASED * len(passage.split()):
                return Rejected("too short")
        if job.task == "comparison" and isinstance(value, str) and len(value.split()) < _MIN_COMPARISON_WORDS:
            return Rejected("too short")
        if isinstance(value, Quest) and _ABOUT_ITSELF.search(value.question):
            return Rejected("speaks of the passage")
        return _refuse_notes(passage, value) if isinstance(value, Notes) else None

    def rows(self, job: Job, value: Value | None) -> list[dict[str, Any]]:
        """Return the row of an accepted answer, and the rows of the tasks that are taken from it."""
        key = self.key(job)
        material = self._material(job, key)
        dice = _dice(self.order.seed, key, "row")
        spec = self.registry.task(job.task)
        style = _weighted(spec.styles, dice)
        fields = {"passage": material.passages[0]}
        if job.task == "continuation":
            fields["passage"], value = take_out(material.passages[0], style, dice)
        elif job.task == "comparison":
            fields = dict(zip(("passage_a", "passage_b"), material.passages, strict=True))
        elif job.task == "retrieval":
            assert isinstance(value, Quest)
            fields = {"question": value.question, "passages": number_passages(material.passages)}
            value = RetrievalResult(material.gold, value.why if material.gold is not None else NO_PASSAGE)
        assert value is not None
        found = [self._row(job.task, key, material, fields, value, (style, dice))]
        for task in self._derived:
            if SOURCES[task] == job.task and chance(self.order.seed, key, task) < self.registry.task(task).probability:
                found.append(self._derive(task, key, material, value))
        return found

    def _derive(self, task: str, key: str, material: _Material, value: Value) -> dict[str, Any]:
        dice = _dice(self.order.seed, key, task, "row")
        assert isinstance(value, tuple)
        item = dice.pick(value)
        fields = {"passage": material.passages[0]}
        answer: str
        if isinstance(item, QAPair):
            fields["question"] = item.question
            answer = item.answer if task == "answer" else item.question
        else:
            answer = str(item)
        style = _weighted(self.registry.task(task).styles, dice)
        return self._row(task, f"{key}/{task}", material, fields, answer, (style, dice))

    def _row(
        self, task: str, key: str, material: _Material, fields: Mapping[str, str], value: Value, form: tuple[str, Dice]
    ) -> dict[str, Any]:
        style, dice = form
        spec = self.registry.task(task)
        paraphrase = int(dice.share() * len(spec.instructions))
        prompt = self.registry.prompt(task, fields, style, paraphrase)
        first = material.chunks[0]
        return {
            **_lay_out(prompt, render(task, value, style), self.order.layout),
            "id": key,
            "task": task,
            "style": style,
            "gold": _plain_tree(value),
            "document": first.document,
            "chunk": first.id,
            "other_chunks": [chunk.id for chunk in material.chunks[1:]],
            "split": first.split,
            "model": "none" if task == "continuation" else self.order.model,
            "runtime": "none" if task == "continuation" else self.order.runtime,
            "seed": self.order.seed,
            "prompt_version": self.registry.prompt_version,
        }

    def _material(self, job: Job, key: str) -> _Material:
        spec = self.registry.task(job.task)
        dice = _dice(self.order.seed, key, "passages")
        own = self.store[job.chunk]
        passage = excerpt(own.text, spec.passage_words, dice)
        if job.task == "comparison":
            other = self.store[self._others(job.chunk, 1, dice)[0]]
            return _Material((own, other), (passage, excerpt(other.text, spec.passage_words, dice)))
        if job.task != "retrieval":
            return _Material((own,), (passage,))
        assert spec.passages is not None
        fewest, most = spec.passages
        count = fewest + int(dice.share() * (most - fewest + 1))
        answerable = dice.share() >= (spec.unanswerable or 0)
        others = [self.store[n] for n in self._others(job.chunk, count - answerable, dice, near_first=True)]
        texts = [excerpt(chunk.text, spec.passage_words, dice) for chunk in others]
        shuffled = dice.shuffled([*enumerate(texts), *([(-1, passage)] if answerable else [])])
        gold = next((place for place, (origin, _) in enumerate(shuffled) if origin == -1), None)
        passages = tuple(text for _, text in shuffled)
        return _Material((own, *others), passages, gold, answering=passage)

    def _others(self, chunk: int, count: int, dice: Dice, near_first: bool = False) -> list[int]:
        """Draw up to `count` chunks of the same split that share no words with this one.

        Args:
            near_first: take one from the same document first, where it has one: it is harder to tell apart.
        """
        found: list[int] = []
        if near_first:
            far = [other for other in self.store.document_of(chunk) if not self.store.overlap(chunk, other)]
            found += [dice.pick(far)] if far else []
        pool = self.store.split_of(chunk)
        for _ in range(_TRIES * count):
            if len(found) >= count:
                break
            other = dice.pick(pool)
            if other not in found and not self.store.overlap(chunk, other):
                found.append(other)
        else:  # a split so small that luck does not find the last ones
            rest = [n for n in pool if n not in found and not self.store.overlap(chunk, n)]
            found += dice.shuffled(rest)[: count - len(found)]
        return found[:count]


def _refuse_notes(passage: str, notes: Notes) -> Rejected | None:
    """Hold notes that a model made to what rule-made ones keep: the form, and what the passage says."""
    answer = render("notes", notes, "sections")
    problems = strict_compliance(answer).problems
    if problems:
        return Rejected(f"breaks the form ({problems[0]})")
    if support(passage, answer) < MIN_SUPPORT:
        return Rejected("says what the passage does not")
    return Rejected("copies the passage") if _copied_lines(passage, answer) > _MAX_COPIED else None


def _copied_lines(text: str, notes: str) -> int:
    """Count the lines of an answer, headers aside, that stand in the passage; case and the full stop do not matter."""
    lines = [line.removeprefix("- ").removesuffix(".") for line in notes.lower().split("\n") if line[-1:] != ":"]
    return sum(line in text.lower() for line in lines)


def _weighted(weights: Mapping[str, float], dice: Dice) -> str:
    mark = dice.share() * sum(weights.values())
    for name, weight in weights.items():
        mark -= weight
        if mark < 0:
            return name
    return name  # the sum of the weights was rounded down


def excerpt(text: str, most_words: int | None, dice: Dice) -> str:
    """Return whole sentences of a text, about `most_words` words of them from a place drawn; all of a shorter text."""
    if most_words is None or len(text.split()) <= most_words:
        return text
    stops = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    sentences = [text[start:stop] for start, stop in itertools.pairwise(stops) if text[start:stop].strip()]
    sizes = [len(sentence.split()) for sentence in sentences]
    starts = [i for i in range(len(sizes)) if sum(sizes[i:]) >= most_words]
    first = dice.pick(starts)
    last, size = first, 0
    while last < len(sizes) and size + sizes[last] <= most_words:
        size += sizes[last]
        last += 1
    if last > first:
        return "".join(sentences[first:last]).strip()
    spans = [match.span() for match in _WORD.finditer(sentences[first])]  # one sentence beyond the bound
    return sentences[first][spans[0][0] : spans[most_words - 1][1]]


def take_out(text: str, style: str, dice: Dice) -> tuple[str, str]:
    """Return a text without a part of it, and that part: the last tenth, the last fifth, or a tenth from the middle."""
    spans = [match.span() for match in _WORD.finditer(text)]
    size = max(1, round(len(spans) * (0.2 if style == "tail20" else 0.1)))
    if style != "infill":
        start = spans[-size][0]
        return text[:start].rstrip(), text[start:].strip()
    first = len(spans) // 5 + int(dice.share() * (len(spans) * 3 // 5 - size + 1))
    start, stop = spans[first][0], spans[first + size - 1][1]
    return f"{text[:start]}{GAP}{text[stop:]}", text[start:stop]


def _lay_out(prompt: Prompt, answer: str, layout: str) -> dict[str, Any]:
    if layout == "alpaca":
        return {"instruction": prompt.instruction, "input": prompt.body, "output": answer}
    if layout == "prompt-completion":
        return {"prompt": prompt.text, "completion": answer}
    return {"messages": [{"role": "user", "content": prompt.text}, {"role": "assistant", "content": answer}]}


def _plain_tree(value: Value) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return [item if isinstance(item, str) else asdict(item) for item in value]
    return asdict(value)
