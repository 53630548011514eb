"""The one registry of research tasks, read from YAML: wording, layout, styles, decoding and probabilities.

Data generation, training rows, the API and evaluation take their prompts from here, so a model is asked as it was
trained. `prompt_version` stands in every row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import Formatter
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from smolmlx.errors import RecipeError, nearest
from smolmlx.recipe import parse_yaml
from smolmlx.tasks import MADE, ON_REQUEST

BUILT_IN = Path(__file__).with_name("tasks.yaml")
FIELDS: Mapping[str, frozenset[str]] = {
    "bullets": frozenset({"passage"}),
    "qa": frozenset({"passage"}),
    "triplets": frozenset({"passage"}),
    "rephrase": frozenset({"passage"}),
    "continuation": frozenset({"passage"}),
    "retrieval": frozenset({"question", "passages"}),
    "comparison": frozenset({"passage_a", "passage_b"}),
    "notes": frozenset({"passage"}),
    "answer": frozenset({"question", "passage"}),
    "question": frozenset({"passage"}),
    "fact": frozenset({"passage"}),
}
"""Task -> what its body must hold, in braces."""
SOURCES = {"answer": "qa", "question": "qa", "fact": "bullets"}
_LIST_STYLES = frozenset({"markdown", "python", "json"})
STYLES: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("bullets", "qa", "triplets"), _LIST_STYLES),
    **dict.fromkeys(("rephrase", "comparison", "answer", "question", "fact"), frozenset({"text"})),
    "retrieval": frozenset({"markdown", "json"}),
    "continuation": frozenset({"tail10", "tail20", "infill"}),
    "notes": frozenset({"sections"}),
}
_MAKER_FIELDS = frozenset({"passage"})

_Sentence = Annotated[str, Field(min_length=1)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Maker(_Entry):
    """What a model is asked while data are made, where that is not the task itself."""

    instructions: Annotated[tuple[_Sentence, ...], Field(min_length=1)]
    hint: str
    body: str


class TaskSpec(_Entry):
    """One task of the registry; tasks.yaml says what each key means."""

    instructions: Annotated[tuple[_Sentence, ...], Field(min_length=1)]
    body: str
    styles: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    hints: dict[str, str] = {}
    maker: Maker | None = None
    source: Annotated[str | None, Field(alias="from")] = None
    probability: Annotated[float, Field(ge=0, le=1)] = 0.25
    generations: Annotated[int, Field(ge=1, le=100)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)]
    max_tokens: Annotated[int, Field(ge=1)]
    min_words: Annotated[int, Field(ge=5)] = 40
    passage_words: Annotated[int, Field(ge=20)] | None = None
    passages: tuple[Annotated[int, Field(ge=2, le=20)], Annotated[int, Field(ge=2, le=20)]] | None = None
    """Fewest and most passages of a retrieval row."""
    unanswerable: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of retrieval rows whose passages do not hold the answer."""

    @model_validator(mode="after")
    def _in_order(self) -> TaskSpec:
        if self.passages and self.passages[0] > self.passages[1]:
            raise ValueError(f"passages: fewest {self.passages[0]} is above most {self.passages[1]}")
        return self


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request in two parts, as alpaca rows keep them; `text` is what a model sees."""

    instruction: str
    body: str

    @property
    def text(self) -> str:
        return f"{self.instruction}\n\n{self.body}"


class Registry(_Entry):
    """All tasks under one name and version."""

    name: Annotated[str, Field(min_length=1)]
    version: Annotated[int, Field(ge=1)]
    tasks: Annotated[dict[str, TaskSpec], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> Registry:
        problems = [problem for name, spec in self.tasks.items() for problem in _faults(name, spec)]
        for name, spec in self.tasks.items():
            if spec.source and spec.source not in self.tasks:
                problems.append(f"tasks.{name}.from: task '{spec.source}' is not in this file")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @cached_property
    def prompt_version(self) -> str:
        """Name, version and a hash of every word and number, so that an edited copy is never taken for the original."""
        tree = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return f"{self.name}/{self.version}+{hashlib.sha256(tree.encode()).hexdigest()[:8]}"

    def task(self, name: str) -> TaskSpec:
        """Return a task.

        Raises:
            RecipeError: this registry has no such task.
        """
        if name not in self.tasks:
            raise RecipeError(
                f"{name}: no such task in registry '{self.name}'.{nearest(name, self.tasks)} It has: {', '.join(self.tasks)}."
            )
        return self.tasks[name]

    def hint(self, name: str, style: str) -> str:
        """Return the sentence that asks for a style, behind the instruction; empty where the file has none for it."""
        return self.task(name).hints.get(style, "")

    def prompt(self, name: str, fields: Mapping[str, str], style: str | None = None, paraphrase: int = 0) -> Prompt:
        """Lay out a request; `style` defaults to the task's first, `paraphrase` 0 is the wording the API uses."""
        spec = self.task(name)
        hint = self.hint(name, style or next(iter(spec.styles)))
        return Prompt(f"{spec.instructions[paraphrase]} {hint}".rstrip(), spec.body.format(**fields))

    def maker_prompt(self, name: str, fields: Mapping[str, str], paraphrase: int) -> Prompt:
        """Lay out what a model is asked while data are made: the answer in JSON, or the maker's own request."""
        spec = self.task(name)
        if spec.maker is not None:
            instruction = f"{spec.maker.instructions[paraphrase]} {spec.maker.hint}".rstrip()
            return Prompt(instruction, spec.maker.body.format(**fields))
        hint = spec.hints.get("json", 'Write JSON: {"text": "..."}.')
        return Prompt(f"{spec.instructions[paraphrase]} {hint}", spec.body.format(**fields))

    def num_paraphrases(self, name: str) -> int:
        """Return how many wordings a maker's request for this task has."""
        spec = self.task(name)
        return len((spec.maker or spec).instructions)


def _faults(name: str, spec: TaskSpec) -> list[str]:
    place = f"tasks.{name}"
    if name not in FIELDS:
        return [f"{place}: unknown task.{nearest(name, FIELDS)} Known: {', '.join(FIELDS)}"]
    problems = []
    if spec.source != SOURCES.get(name):
        problems.append(f"{place}.from: expected {SOURCES.get(name) or 'nothing'}, got {spec.source or 'nothing'}")
    for what, styles in (("styles", spec.styles), ("hints", spec.hints)):
        for style in sorted(set(styles) - STYLES[name] - ({"json"} if what == "hints" else set())):
            known = ", ".join(sorted(STYLES[name]))
            problems.append(f"{place}.{what}: unknown style '{style}'.{nearest(style, STYLES[name])} Known: {known}")
    problems += _body_faults(f"{place}.body", spec.body, FIELDS[name])
    if spec.maker is not None:
        problems += _body_faults(f"{place}.maker.body", spec.maker.body, _MAKER_FIELDS)
    wanted = {"maker": spec.maker, "passages": spec.passages, "unanswerable": spec.unanswerable}
    for key, value in wanted.items():
        if (value is not None) != (name == "retrieval"):
            problems.append(f"{place}.{key}: " + ("missing" if value is None else "only retrieval has this key"))
    return problems


def _body_faults(place: str, body: str, fields: frozenset[str]) -> list[str]:
    try:
        parsed = [part for part in Formatter().parse(body) if part[1] is not None]
    except ValueError as error:
        return [f"{place}: braces do not match ({error}); a literal brace is written twice"]
    if any(spec or conversion for _, _, spec, conversion in parsed):
        return [f"{place}: a field is its name in braces alone, without ! or : behind it"]
    found = {str(name) for _, name, _, _ in parsed}
    if found == fields:
        return []
    named = ", ".join(f"{{{name}}}" for name in sorted(found)) or "nothing"
    return [f"{place}: expected exactly {', '.join(f'{{{name}}}' for name in sorted(fields))}, got {named}"]


def number_passages(passages: Sequence[str]) -> str:
    """Lay passages out with the numbers, from 1, that an answer names."""
    return "\n\n".join(f"Passage {number}:\n{passage}" for number, passage in enumerate(passages, 1))


def read_registry(path: Path | None = None) -> Registry:
    """Read a registry file; without one, the built-in registry.

    Raises:
        RecipeError: missing, not YAML, or with entries that do not fit, all of them listed.
    """
    path = path or BUILT_IN
    try:
        tree: Any = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    try:
        return Registry.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(str(path), _problems(error)) from error


def order_tasks(asked: Collection[str], registry: Registry) -> tuple[str, ...]:
    """Return the tasks to make from chunks: those asked for, else all that need not be named.

    They come in an order of their own, so that the order in which they are named changes nothing.

    Raises:
        RecipeError: tasks that are not made from chunks, all of them listed.
    """
    known = (*MADE, *ON_REQUEST)
    unknown = [
        f"task {task}: unknown.{nearest(task, known)} Known: {', '.join(known)}" for task in asked if task not in known
    ]
    if unknown:
        raise RecipeError("data augment", unknown)
    return tuple(task for task in known if task in (asked or {*registry.tasks} & {*MADE}))


_SECTIONS: Mapping[int, type[BaseModel]] = {1: Registry, 3: TaskSpec, 4: Maker}
"""Parts of a key's dotted name, as in tasks.qa.maker.hint, -> what it is a key of."""


def _problems(error: ValidationError) -> list[str]:
    found = []
    for entry in error.errors(include_url=False):
        place = ".".join(map(str, entry["loc"]))
        message = entry["msg"].removeprefix("Value error, ")
        if entry["type"] == "extra_forbidden":
            fields = _SECTIONS[len(entry["loc"])].model_fields.items()
            known = [field.alias or name for name, field in fields]
            message = f"unknown key.{nearest(str(entry['loc'][-1]), known) or ' Known: ' + ', '.join(known) + '.'}"
        found += [f"{place}: {message}"] if place else message.split("\n")
    return found
