"""What an answer of each task must be, as Pydantic models: a schema for constrained decoding and the check of every reply.

The models are the JSON form; `value` turns one into what the library hands out (strings and the types of
`evals.parsers`), so that JSON, Markdown and Python answers all end in the same value.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from smolmlx.data.notes import Notes
from smolmlx.evals.parsers import QAPair, RetrievalResult, Triplet


@dataclass(frozen=True, slots=True)
class Quest:
    """A question that one passage answers, and where: what retrieval rows are made from."""

    question: str
    why: str


Value = str | tuple[str, ...] | tuple[QAPair, ...] | tuple[Triplet, ...] | RetrievalResult | Quest | Notes

_Line = Annotated[str, Field(min_length=1, max_length=300)]
_Name = Annotated[str, Field(min_length=1, max_length=120)]
_NOT_BLANK = r"[^\s\x00-\x1f]"
_Long = Annotated[str, Field(min_length=1, max_length=160)]


def plain(text: str) -> str:
    """Return a text on one line, with single spaces: items of a list must survive every style."""
    return " ".join(text.split())


class Answer(BaseModel):
    """Base of all schemas: unknown fields are refused, as servers with strict schemas demand."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @abstractmethod
    def value(self) -> Value:
        """Return what the library hands out."""


class Bullets(Answer):
    """The points of a passage."""

    bullets: Annotated[list[_Line], Field(min_length=1, max_length=6)]

    def value(self) -> tuple[str, ...]:
        return tuple(map(plain, self.bullets))


class _Pair(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    question: _Line
    answer: Annotated[str, Field(min_length=1, max_length=600)]


class Pairs(Answer):
    """Questions with their answers."""

    pairs: Annotated[list[_Pair], Field(min_length=1, max_length=3)]

    def value(self) -> tuple[QAPair, ...]:
        return tuple(QAPair(plain(pair.question), plain(pair.answer)) for pair in self.pairs)


class _Statement(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    subject: _Name
    relation: _Name
    object: _Long


class Triplets(Answer):
    """Facts as subject, relation, object."""

    triplets: Annotated[list[_Statement], Field(min_length=1, max_length=2)]

    def value(self) -> tuple[Triplet, ...]:
        return tuple(Triplet(plain(t.subject), plain(t.relation), plain(t.object)) for t in self.triplets)


class Text(Answer):
    """Free text; its length is bounded by the tokens a task may use."""

    text: Annotated[str, Field(min_length=1)]

    def value(self) -> str:
        return self.text.strip()


class NotesAnswer(Answer):
    """Notes on a passage: always three key points."""

    summary: _Line
    key_points: Annotated[list[_Line], Field(min_length=3, max_length=3)]
    limitation: _Line
    question: _Line

    def value(self) -> Notes:
        return Notes(
            plain(self.summary), tuple(map(plain, self.key_points)), plain(self.limitation), plain(self.question)
        )


class Question(Answer):
    """A question for a retrieval row, made from the passage that answers it."""

    question: _Line
    why: _Line

    def value(self) -> Quest:
        return Quest(plain(self.question), plain(self.why))


class Retrieval(Answer):
    """The passage that answers a question, counted from 1; null where none does."""

    passage: Annotated[int, Field(ge=1, le=20)] | None
    why: _Line

    def value(self) -> RetrievalResult:
        return RetrievalResult(None if self.passage is None else self.passage - 1, plain(self.why))


ANSWERS: dict[str, type[Answer]] = {
    "bullets": Bullets,
    "qa": Pairs,
    "triplets": Triplets,
    "rephrase": Text,
    "continuation": Text,
    "retrieval": Retrieval,
    "comparison": Text,
    "notes": NotesAnswer,
    "answer": Text,
    "question": Text,
    "fact": Text,
}
"""Task -> schema of its answer."""


def retrieval_schema(num_passages: int) -> dict[str, Any]:
    """Return the JSON schema of a retrieval answer that can only name one of `num_passages` passages, or null."""
    tree = Retrieval.model_json_schema()
    tree["properties"]["passage"] = {"enum": [*range(1, num_passages + 1), None]}
    return tree


def kept_schema(task: str, num_passages: int) -> dict[str, Any]:
    """Return the JSON schema that an engine keeps an answer to: the task's, and no text in it is blank.

    Servers are not asked for the latter: not all of them take a pattern beside a length.
    """
    tree = retrieval_schema(num_passages) if task == "retrieval" else ANSWERS[task].model_json_schema()
    found: dict[str, Any] = _without_blanks(tree)
    return found


def asked_style(task: str, own: str, constrained: bool) -> str:
    """Return the style in which a task is asked for: JSON where the answer is kept to its schema, else `own`."""
    return "json" if constrained and ANSWERS[task] is not Text else own


def _without_blanks(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_without_blanks(inner) for inner in tree]
    if not isinstance(tree, dict):
        return tree
    found = {key: _without_blanks(inner) for key, inner in tree.items()}
    return {**found, "pattern": _NOT_BLANK} if found.get("minLength") else found


def to_answer(schema: type[Answer], value: Value) -> Answer:
    """Return a value as an object of its schema, with the bounds checked.

    Raises:
        pydantic.ValidationError: the value is outside the bounds.
    """
    return schema.model_validate(_tree(schema, value))


def _tree(schema: type[Answer], value: Value) -> dict[str, Any]:
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, RetrievalResult):
        return {"passage": None if value.index is None else value.index + 1, "why": value.reasoning}
    if isinstance(value, Quest):
        return asdict(value)
    if isinstance(value, Notes):
        return asdict(value) | {"key_points": list(value.key_points)}
    (field,) = schema.model_fields
    return {field: [item if isinstance(item, str) else asdict(item) for item in value]}
