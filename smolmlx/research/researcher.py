"""`PaperResearcher`: ten typed questions to a model, asked as it was trained, and answers of the type they should have.

researcher = PaperResearcher("runs/research-...")
researcher.extract_bullets(passage)                      # ["...", "..."]
researcher.batch.answer([("What keeps two moments?", passage), ...])
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from smolmlx.backend import Decoding
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import DataError, RecipeError
from smolmlx.evals.parsers import QAPair, RetrievalResult, Triplet
from smolmlx.research.budget import Asked, Budget, Fill, fill_numbered, fill_pair, fill_single
from smolmlx.tasks.registry import Registry, read_registry
from smolmlx.tasks.replies import Rejected, read, read_freely
from smolmlx.tasks.schemas import ANSWERS, Text, Value, asked_style, kept_schema

if TYPE_CHECKING:
    from smolmlx.api import Model, Run

_MOST_PASSAGES = 20


@runtime_checkable
class Answering(Protocol):
    """What a researcher needs of a model; `smolmlx.load` returns one."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    def generate(self, prompts: Sequence[str], **decoding: Any) -> list[str]: ...


class BatchResearcher:
    """The ten questions for many passages at a time; answers come in the order of what was asked.

    The bounds that methods name hold for constrained answers; others are as long as the model made them.
    """

    def __init__(
        self,
        model: Answering,
        registry: Registry,
        *,
        context: int | None = None,
        constrained: bool,
        sampling: Decoding = Decoding(),
    ) -> None:
        self.model, self.registry, self.constrained, self.sampling = model, registry, constrained, sampling
        self.budget = Budget(model.tokenizer, registry, context)

    def extract_bullets(self, passages: Sequence[str]) -> list[list[str]]:
        """Return the main points of each passage, one to six."""
        return [list(cast("tuple[str, ...]", value)) for value in self._ask("bullets", _each(passages))]

    def generate_qa_pairs(self, passages: Sequence[str]) -> list[list[QAPair]]:
        """Return questions that each passage answers, with their answers, one to three."""
        return [list(cast("tuple[QAPair, ...]", value)) for value in self._ask("qa", _each(passages))]

    def extract_triplets(self, passages: Sequence[str]) -> list[list[Triplet]]:
        """Return facts of each passage as subject, relation and object, one or two."""
        return [list(cast("tuple[Triplet, ...]", value)) for value in self._ask("triplets", _each(passages))]

    def answer(self, asked: Sequence[tuple[str, str]]) -> list[str]:
        """Answer each (question, passage) from its passage."""
        _refuse_other_pairs("answer", asked, "(question, passage)")
        return self._texts("answer", [Asked({"question": question}, (passage,)) for question, passage in asked])

    def rephrase(self, passages: Sequence[str]) -> list[str]:
        """Say each passage in other words."""
        return self._texts("rephrase", _each(passages))

    def continue_from(self, passages: Sequence[str]) -> list[str]:
        """Write what comes next in each text."""
        return self._texts("continuation", _each(passages))

    def extract_fact(self, passages: Sequence[str]) -> list[str]:
        """State one fact of each passage."""
        return self._texts("fact", _each(passages))

    def generate_question(self, passages: Sequence[str]) -> list[str]:
        """Ask a question that each passage answers."""
        return self._texts("question", _each(passages))

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """Say what the two passages of each pair share and where they differ."""
        _refuse_other_pairs("compare", pairs, "(passage, passage)")
        return self._texts("comparison", [Asked({}, (one, other)) for one, other in pairs], fill_pair)

    def find_relevant(self, asked: Sequence[tuple[str, Sequence[str]]]) -> list[RetrievalResult]:
        """Find which of its passages answers each question: its index from 0, or None, and why."""
        _refuse_other_pairs("find_relevant", asked, "(question, passages)")
        for question, passages in asked:
            _refuse_one_text(passages)
            if not 1 <= len(passages) <= _MOST_PASSAGES:
                raise DataError(
                    f"find_relevant({question!r}): {len(passages)} passages; expected 1 to {_MOST_PASSAGES}."
                )
        found = [Asked({"question": question}, tuple(passages)) for question, passages in asked]
        return [cast(RetrievalResult, value) for value in self._ask("retrieval", found, fill_numbered)]

    def _texts(self, task: str, asked: Sequence[Asked], fill: Fill = fill_single) -> list[str]:
        return [cast(str, value) for value in self._ask(task, asked, fill)]

    def _ask(self, task: str, asked: Sequence[Asked], fill: Fill = fill_single) -> list[Value]:
        """Ask for all answers in as few calls as there are schemas."""
        _refuse_blank(task, asked)
        prompts = [self.budget.prompt(task, one, self._style(task), fill) for one in asked]
        answers: list[Value] = [""] * len(asked)
        for schema, rows in self._groups(task, asked):
            replies = self.model.generate([prompts[row] for row in rows], **self._decoding(task, schema))
            for row, reply in zip(rows, replies, strict=True):
                answers[row] = self._read(task, reply, len(asked[row].passages))
        return answers

    def _style(self, task: str) -> str:
        """Ask for JSON where it will be enforced, else for the form that small models keep best."""
        styles = self.registry.task(task).styles
        own = next((style for style in ("markdown", "tail20", "text") if style in styles), next(iter(styles)))
        return asked_style(task, own, self.constrained)

    def _groups(self, task: str, asked: Sequence[Asked]) -> list[tuple[Any, list[int]]]:
        """Return each schema with its rows; one without a schema where the answer is free text."""
        if not self.constrained or ANSWERS[task] is Text:
            return [(None, list(range(len(asked))))] if asked else []
        if task != "retrieval":
            return [(kept_schema(task, 1), list(range(len(asked))))] if asked else []
        sizes: dict[int, list[int]] = {}
        for row, one in enumerate(asked):
            sizes.setdefault(len(one.passages), []).append(row)
        return [(kept_schema(task, size), rows) for size, rows in sizes.items()]

    def _decoding(self, task: str, schema: Mapping[str, Any] | None) -> dict[str, Any]:
        given = {field.name: getattr(self.sampling, field.name) for field in fields(Decoding) if field.name != "schema"}
        given["max_tokens"] = self.budget.answer_tokens(task)
        return given if schema is None else {**given, "schema": schema}

    def _read(self, task: str, reply: str, num_passages: int) -> Value:
        value = read(ANSWERS[task], reply, num_passages)
        if not isinstance(value, Rejected):
            if isinstance(value, RetrievalResult) and value.index is not None and value.index >= num_passages:
                return RetrievalResult(None, value.reasoning)
            return value
        return read_freely(task, reply, num_passages)


class PaperResearcher:
    """Ten typed questions to one model; `batch` asks them for many passages at once."""

    def __init__(
        self,
        model: Answering | Model | Run | str | Path | tuple[str | Path, str | Path],
        *,
        registry: Registry | str | Path | None = None,
        constrained: bool = True,
        context: int | None = None,
        sampling: Decoding = Decoding(),
        backend: str = "auto",
        device: str | None = None,
    ) -> None:
        """Take a loaded model, or load one as `smolmlx.load` does: a run, a model folder, a hub id, a (model, adapter) pair.

        Args:
            registry: task registry, or its YAML file, for a model trained on other prompts.
            constrained: keep answers to their schema while they are written. Without it they are read tolerantly.
            context: most tokens of prompt and answer; None takes the model's own.
            sampling: how answers are drawn; greedy unless said otherwise. Its max_tokens and schema are left out: answers
                are as long as the registry lets them be, and keep to the task's own schema.

        Raises:
            RecipeError: no such model, a registry that is not whole, or arguments that cannot be honoured.
        """
        _check_arguments(context, sampling)
        loaded, own_context = _open(model, backend, device)
        self.batch = BatchResearcher(
            loaded,
            registry if isinstance(registry, Registry) else read_registry(Path(registry) if registry else None),
            context=own_context if context is None else context,
            constrained=constrained,
            sampling=sampling,
        )

    def extract_bullets(self, passage: str) -> list[str]:
        """Return the main points of a passage, one to six."""
        return self.batch.extract_bullets([passage])[0]

    def generate_qa_pairs(self, passage: str) -> list[QAPair]:
        """Return questions that a passage answers, with their answers, one to three."""
        return self.batch.generate_qa_pairs([passage])[0]

    def extract_triplets(self, passage: str) -> list[Triplet]:
        """Return facts of a passage as subject, relation and object, one or two."""
        return self.batch.extract_triplets([passage])[0]

    def answer(self, question: str, passage: str) -> str:
        """Answer a question from a passage."""
        return self.batch.answer([(question, passage)])[0]

    def rephrase(self, passage: str) -> str:
        """Say a passage in other words."""
        return self.batch.rephrase([passage])[0]

    def continue_from(self, passage: str) -> str:
        """Write what comes next in a text."""
        return self.batch.continue_from([passage])[0]

    def extract_fact(self, passage: str) -> str:
        """State one fact of a passage."""
        return self.batch.extract_fact([passage])[0]

    def generate_question(self, passage: str) -> str:
        """Ask a question that a passage answers."""
        return self.batch.generate_question([passage])[0]

    def compare(self, a: str, b: str) -> str:
        """Say what two passages share and where they differ."""
        return self.batch.compare([(a, b)])[0]

    def find_relevant(self, question: str, passages: Sequence[str]) -> RetrievalResult:
        """Find which passage answers a question: its index from 0, or None, and why."""
        return self.batch.find_relevant([(question, passages)])[0]


def _check_arguments(context: Any, sampling: Decoding) -> None:
    problems = []
    if context is not None and (type(context) is not int or context < 1):
        problems.append(f"context: got {context!r}, expected a number of tokens, or None for the model's own.")
    if not isinstance(sampling, Decoding):
        problems.append(f"sampling: got {sampling!r}, expected a Decoding, e.g. Decoding(temperature=0.7).")
    elif sampling.max_tokens != Decoding().max_tokens:
        problems.append(
            "sampling.max_tokens: has no effect, as each task's is in the registry (`max_tokens`). Leave it out."
        )
    if isinstance(sampling, Decoding) and sampling.schema is not None:
        problems.append("sampling.schema: has no effect, as each task has its own. Leave it out.")
    if problems:
        raise RecipeError("PaperResearcher", problems)


def _open(model: Any, backend: str, device: str | None) -> tuple[Answering, int | None]:
    from smolmlx.api import Model, Run, load

    if isinstance(model, Run | str | Path | tuple):
        model = load(model, backend=backend, device=device)
    elif backend != "auto" or device is not None:
        warnings.warn("backend and device have no effect on a model that is loaded already", stacklevel=3)
    if isinstance(model, Model):
        return cast(Answering, model), model.base.context
    if not isinstance(model, Answering):
        raise RecipeError(
            f"PaperResearcher: got {model!r}; expected a run, a model's folder or hub id, a (model, adapter) pair, or what"
            " smolmlx.load returns."
        )
    return model, None


def _each(passages: Sequence[str]) -> list[Asked]:
    _refuse_one_text(passages)
    return [Asked({}, (passage,)) for passage in passages]


def _refuse_one_text(passages: Sequence[str]) -> None:
    """Refuse a text where a list belongs: its letters would be taken for passages."""
    if isinstance(passages, str):
        raise DataError("expected a list of passages, got one text: write [text], or ask about a single passage.")


def _refuse_other_pairs(method: str, asked: Sequence[Any], wanted: str) -> None:
    """Refuse rows that are no pairs; a text of two letters would be taken for one."""
    problems = [
        f"row {number}: got {type(row).__name__}{f' of {len(row)}' if isinstance(row, tuple | list) else ''}"
        for number, row in enumerate(asked)
        if not isinstance(row, tuple | list) or len(row) != 2
    ]
    if problems:
        raise DataError(f"{method}: each row is a pair {wanted}", problems)


def _refuse_blank(task: str, asked: Sequence[Asked]) -> None:
    problems = []
    for number, one in enumerate(asked):
        texts = {**one.fixed, **{f"passage {i}": text for i, text in enumerate(one.passages, 1)}}
        for name, text in texts.items():
            if not isinstance(text, str):
                problems.append(f"row {number}: {name}: got {type(text).__name__}, expected a text")
            elif not text.strip():
                problems.append(f"row {number}: {name} is blank")
    if problems:
        raise DataError(task, problems)
