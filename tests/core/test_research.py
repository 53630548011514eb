"""The ten questions: asked as the registry says, typed answers, batches as singles, and questions that are never cut."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lab as labs
import smolmlx
from smolmlx.backend import Decoding
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import DataError, RecipeError
from smolmlx.evals.research import Asking, ResearchRow
from smolmlx.research import PaperResearcher, PassageCut, QAPair, RetrievalResult, Triplet
from smolmlx.research.budget import share_out
from smolmlx.research.researcher import BatchResearcher
from smolmlx.tasks.registry import BUILT_IN, read_registry

PASSAGE = "Adam keeps two moments. Momentum carries speed."


class Scripted:
    """A model that replies by rule, and remembers what it was asked."""

    def __init__(self, tokenizer: Tokenizer, reply: Callable[[str], str] | str) -> None:
        self.tokenizer, self.reply = tokenizer, reply
        self.prompts: list[str] = []
        self.decoding: list[dict[str, Any]] = []

    def generate(self, prompts: Sequence[str], **decoding: Any) -> list[str]:
        self.prompts += prompts
        self.decoding.append(decoding)
        return [self.reply if isinstance(self.reply, str) else self.reply(prompt) for prompt in prompts]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(tiny_model)


def ask(tokenizer: Tokenizer, reply: Callable[[str], str] | str, **options: Any) -> tuple[PaperResearcher, Scripted]:
    model = Scripted(tokenizer, reply)
    return PaperResearcher(model, **options), model


def test_ten_methods_are_typed(tokenizer: Tokenizer) -> None:
    def researcher(reply: str) -> PaperResearcher:
        return ask(tokenizer, reply, constrained=False)[0]

    assert researcher("- a\n* b").extract_bullets(PASSAGE) == ["a", "b"]
    assert researcher("**Question:** Who?\n**Answer:** She.").generate_qa_pairs(PASSAGE) == [QAPair("Who?", "She.")]
    assert researcher("- (Adam, keeps, moments)").extract_triplets(PASSAGE) == [Triplet("Adam", "keeps", "moments")]
    assert researcher(" Two. ").answer("How many?", PASSAGE) == "Two."
    assert researcher("In other words.").rephrase(PASSAGE) == "In other words."
    assert researcher("And so on.").continue_from(PASSAGE) == "And so on."
    assert researcher("Adam keeps two.").extract_fact(PASSAGE) == "Adam keeps two."
    assert researcher("What keeps two?").generate_question(PASSAGE) == "What keeps two?"
    assert researcher("Both move.").compare(PASSAGE, "Other.") == "Both move."
    found = researcher("**Passage:** 2\n**Why:** it says so").find_relevant("Which?", [PASSAGE, "Other."])
    assert found == RetrievalResult(1, "it says so")


@pytest.mark.parametrize(
    ("reply", "index"),
    [
        ("**Passage:** None\n**Why:** x", None),
        ("**Passage:** 3", None),
        ('{"passage": 1, "why": "x"}', 0),
        ("?", None),
        ("", None),
    ],
)
def test_retrieval_out_of_range_is_none(tokenizer: Tokenizer, reply: str, index: int | None) -> None:
    assert ask(tokenizer, reply)[0].find_relevant("Which?", ["a b", "c d"]).index == index


def test_json_answers_and_nonsense(tokenizer: Tokenizer) -> None:
    pairs = {"pairs": [{"question": "a?", "answer": "b"}]}
    assert ask(tokenizer, json.dumps(pairs))[0].generate_qa_pairs(PASSAGE) == [QAPair("a?", "b")]
    assert ask(tokenizer, "I do not know")[0].generate_qa_pairs(PASSAGE) == []
    for nothing in ('{"bullets": [" "]}', '{"bullets": []}', '[""]'):
        assert ask(tokenizer, nothing)[0].extract_bullets(PASSAGE) == []
    assert ask(tokenizer, "See [1].")[0].extract_bullets(PASSAGE) == ["See [1]."]
    assert ask(tokenizer, "(a, b)")[0].extract_triplets(PASSAGE) == []
    assert len(ask(tokenizer, "\n".join(f"- {i}" for i in range(9)))[0].extract_bullets(PASSAGE)) == 9


def test_batch_asks_once_and_keeps_order(tokenizer: Tokenizer) -> None:
    researcher, model = ask(tokenizer, lambda prompt: f"- {prompt.rpartition(chr(10))[2]}", constrained=False)
    passages = [f"passage number {i}" for i in range(7)]
    assert researcher.batch.extract_bullets(passages) == [[text] for text in passages]
    assert len(model.decoding) == 1 and researcher.batch.extract_bullets([]) == []
    assert [researcher.extract_bullets(text) for text in passages] == [[text] for text in passages]
    assert Decoding(**model.decoding[0]) == Decoding(max_tokens=600)
    researcher, model = ask(tokenizer, "x", sampling=Decoding(temperature=0.7, seed=3, batch_size=4))
    researcher.extract_fact(PASSAGE)
    assert Decoding(**model.decoding[0]) == Decoding(max_tokens=120, temperature=0.7, seed=3, batch_size=4)


def test_asked_as_the_registry_says(tokenizer: Tokenizer, tmp_path: Path) -> None:
    researcher, model = ask(tokenizer, "x", constrained=False)
    researcher.answer("Which?", PASSAGE)
    assert model.prompts == [read_registry().prompt("answer", {"question": "Which?", "passage": PASSAGE}).text]
    own = tmp_path / "mine.yaml"
    own.write_text(BUILT_IN.read_text().replace("Answer the question from the passage.", "Say it!"))
    researcher, model = ask(tokenizer, "x", registry=own)
    researcher.answer("Which?", PASSAGE)
    assert model.prompts[0].startswith("Say it!\n\nQuestion: Which?")
    researcher, model = ask(tokenizer, "x", constrained=False)
    researcher.find_relevant("Which?", ["one two", "three"])
    assert "Question: Which?\n\nPassage 1:\none two\n\nPassage 2:\nthree" in model.prompts[0]
    assert "**Passage:** " in model.prompts[0].split("\n")[0]


def test_constrained_passes_a_schema_for_each_kind(tokenizer: Tokenizer) -> None:
    model = Scripted(tokenizer, lambda prompt: json.dumps({"passage": 1, "why": "x"}))
    batch = BatchResearcher(model, read_registry(), constrained=True)
    found = batch.find_relevant([("a?", ["x", "y"]), ("b?", ["x", "y", "z"]), ("c?", ["u", "v"])])
    assert [result.index for result in found] == [0, 0, 0]
    allowed = [decoding["schema"]["properties"]["passage"]["enum"] for decoding in model.decoding]
    assert allowed == [[1, 2, None], [1, 2, 3, None]] and "JSON" in model.prompts[0]
    batch.answer([("a?", "x")])
    assert "schema" not in model.decoding[-1]


def test_constrained_is_the_default(tokenizer: Tokenizer) -> None:
    assert PaperResearcher(Scripted(tokenizer, "x")).batch.constrained
    assert not PaperResearcher(Scripted(tokenizer, "x"), constrained=False).batch.constrained


def test_bad_questions_are_refused(tokenizer: Tokenizer) -> None:
    researcher, model = ask(tokenizer, "x")
    with pytest.raises(DataError, match=r"2 problems\n.*question is blank\n.*passage 1 is blank"):
        researcher.answer(" ", "")
    with pytest.raises(DataError, match="0 passages; expected 1 to 20"):
        researcher.find_relevant("Which?", [])
    with pytest.raises(DataError, match="expected a list of passages"):
        researcher.batch.extract_bullets(PASSAGE)
    with pytest.raises(DataError, match="expected a list of passages"):
        researcher.find_relevant("Which?", PASSAGE)
    with pytest.raises(DataError, match="passage 1: got int, expected a text"):
        researcher.rephrase(3)  # type: ignore[arg-type]
    assert not model.prompts


def test_rows_that_are_no_pairs_are_refused(tokenizer: Tokenizer) -> None:
    batch = ask(tokenizer, "x")[0].batch
    with pytest.raises(DataError, match=r"compare: each row is a pair \(passage, passage\).*\n.*row 1: got tuple of 3"):
        batch.compare([("a", "b"), ("a", "b", "c")])  # type: ignore[list-item]
    with pytest.raises(DataError, match="row 0: got str"):
        batch.compare(["ab"])  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"a pair \(question, passage\)"):
        batch.answer([("q",)])  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"a pair \(question, passages\)"):
        batch.find_relevant([("q", ["a"], "b")])  # type: ignore[list-item]


def test_arguments_without_effect_or_sense_are_refused(tokenizer: Tokenizer) -> None:
    for context in (0, -5, "x", True):
        with pytest.raises(RecipeError, match=r"context: got .*, expected a number of tokens"):
            ask(tokenizer, "x", context=context)
    with pytest.raises(
        RecipeError, match=r"2 problems\n.*sampling.max_tokens: has no effect.*\n.*sampling.schema: has no"
    ):
        ask(tokenizer, "x", sampling=Decoding(max_tokens=3, schema={"type": "object"}))
    with pytest.raises(RecipeError, match=r"sampling: got .*, expected a Decoding"):
        ask(tokenizer, "x", sampling={"temperature": 0.7})
    for model in (None, 123):
        with pytest.raises(RecipeError, match=f"got {model}; expected a run"):
            PaperResearcher(model)  # type: ignore[arg-type]


def test_json_is_asked_for_where_it_is_enforced_whatever_styles_rows_have(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The API and suite research ask the same of a registry whose rows are never in JSON."""
    own = tmp_path / "mine.yaml"
    own.write_text(BUILT_IN.read_text().replace("styles: {markdown: 2, python: 1, json: 1}", "styles: {markdown: 1}"))
    registry = read_registry(own)
    researcher, model = ask(tokenizer, "x", registry=registry)
    researcher.extract_bullets(PASSAGE)
    made = registry.prompt("bullets", {"passage": PASSAGE}, "markdown").text
    row = ResearchRow("1", "bullets", "markdown", ({"role": "user", "content": made},), ("a",))
    asked, how = Asking(tokenizer, registry, Decoding()).request(row)
    assert how.schema is not None and "Write JSON" in model.prompts[0]
    assert asked == tokenizer.encode(tokenizer.prompt([{"role": "user", "content": model.prompts[0]}]))


QUESTION = "Which of these many optimizers keeps two running moments of the gradient, and why?"


def lengths(model: Scripted) -> list[int]:
    chats = [model.tokenizer.prompt([{"role": "user", "content": prompt}]) for prompt in model.prompts]
    return [len(model.tokenizer.encode(chat)) for chat in chats]


@pytest.mark.parametrize("context", [600, 900])
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_questions_are_never_cut(tokenizer: Tokenizer, context: int, data: st.DataObject) -> None:
    texts = st.lists(st.sampled_from(labs.WORDS), min_size=1, max_size=400).map(" ".join)
    passages = data.draw(st.lists(texts, min_size=1, max_size=4))
    researcher, model = ask(tokenizer, "x", context=context, constrained=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PassageCut)
        researcher.find_relevant(QUESTION, passages)
        researcher.answer(QUESTION, passages[0])
    assert all(QUESTION in prompt for prompt in model.prompts)
    for used, decoding in zip(lengths(model), model.decoding, strict=True):
        assert used + decoding["max_tokens"] <= context
    shown = [part.partition("\n")[2] for part in model.prompts[0].split("\n\nPassage ")[1:]]
    assert len(shown) == len(passages)
    assert all(text and whole.startswith(text) for text, whole in zip(shown, passages, strict=True))


def test_cut_passages_are_warned_about_and_end_well(tokenizer: Tokenizer) -> None:
    researcher, model = ask(tokenizer, "x", context=700, constrained=False)
    text = " ".join(f"Sentence {i} has words." for i in range(200))
    with pytest.warns(PassageCut, match=r"answer: cut to fit the model's context of 700: passage 1: the first \d+ of"):
        researcher.answer(QUESTION, text)
    assert model.prompts[0].endswith("has words.")
    with pytest.warns(PassageCut, match="passage 2: ") as caught:
        researcher.compare("A short one.", text)
    assert "passage 1" not in str(caught[0].message) and "A short one." in model.prompts[-1]


def test_a_long_text_is_gone_on_with_from_its_end(tokenizer: Tokenizer) -> None:
    researcher, model = ask(tokenizer, "x", context=700)
    text = " ".join(f"Sentence {i} has words." for i in range(200))
    with pytest.warns(PassageCut, match=r"continuation: .* passage 1: the last \d+ of \d+ tokens kept"):
        researcher.continue_from(text)
    shown = model.prompts[0].partition("Text:\n")[2]
    assert shown.startswith("Sentence ") and text.endswith(shown)
    assert lengths(model)[0] + model.decoding[0]["max_tokens"] <= 700


@given(
    st.lists(st.sampled_from([*labs.WORDS, "end.", "\n\n"]), min_size=1, max_size=60).map(" ".join), st.integers(1, 60)
)
def test_the_end_of_a_text_is_its_end(tokenizer: Tokenizer, text: str, num_tokens: int) -> None:
    budget = ask(tokenizer, "x")[0].batch.budget
    found = budget.cut_start(text, num_tokens)
    assert text.endswith(found) and (found == text or len(found.split()) == 1 or budget.count(found) <= num_tokens)


def test_a_question_beyond_the_context_is_refused(tokenizer: Tokenizer) -> None:
    researcher, _ = ask(tokenizer, "x", context=700, constrained=False)
    with pytest.raises(DataError, match="no room is left for 1 passage"):
        researcher.answer("why " * 400, PASSAGE)


@given(st.lists(st.integers(0, 100), min_size=1, max_size=6), st.integers(0, 400))
def test_room_is_shared_fairly(sizes: list[int], room: int) -> None:
    parts = share_out(sizes, room)
    assert sum(parts) <= room and all(part <= size for part, size in zip(parts, sizes, strict=True))
    assert sum(parts) == min(room, sum(sizes)) or min(room, sum(sizes)) - sum(parts) < len(sizes)
    cut = [part for part, size in zip(parts, sizes, strict=True) if part < size]
    assert max(cut, default=0) - min(cut, default=0) <= 1


@pytest.fixture
def toy() -> Iterator[None]:
    with labs.toy_installed():
        yield


def test_a_model_folder_by_name(toy: None, tiny_model: Path) -> None:
    """The numpy engine answers; a model of random weights says nothing, but every answer has its type."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PassageCut)
        researcher = PaperResearcher(tiny_model, backend="toy", device="cpu", context=420)
        assert isinstance(researcher.extract_bullets(PASSAGE), list)
        assert isinstance(researcher.find_relevant("Which?", [PASSAGE]), RetrievalResult)
        loaded = smolmlx.load(tiny_model, backend="toy", device="cpu")
        assert PaperResearcher(loaded, context=420).answer("Who?", PASSAGE) == researcher.answer("Who?", PASSAGE)
        with pytest.warns(UserWarning, match="have no effect"):
            PaperResearcher(loaded, device="cpu")
    assert PaperResearcher(loaded).batch.budget.context == labs.TINY["max_position_embeddings"]
    with pytest.raises(RecipeError, match="no such model folder"):
        PaperResearcher("./nowhere", backend="toy")
