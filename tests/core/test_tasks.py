"""The task registry: whole, replaceable, strict; and every style of every task read back as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from smolmlx.data.notes import Notes
from smolmlx.errors import RecipeError
from smolmlx.evals.notes import HEADERS
from smolmlx.evals.parsers import QAPair, RetrievalResult, Triplet
from smolmlx.tasks import MADE, ON_REQUEST, replies, schemas
from smolmlx.tasks.registry import BUILT_IN, FIELDS, SOURCES, STYLES, read_registry
from smolmlx.tasks.replies import Rejected

TEXTS: dict[str, str] = {name: f"<{name}>" for names in FIELDS.values() for name in names}
line = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp", "Zs")) | st.just(" "), max_size=60)
line = line.map(schemas.plain).filter(bool)


def write(path: Path, change: dict[str, Any]) -> Path:
    """Write the built-in registry with `tasks.<task>.<key>` replaced; None takes a key away."""
    tree = yaml.safe_load(BUILT_IN.read_text())
    for dotted, value in change.items():
        *parents, key = dotted.split(".")
        place = tree
        for name in parents:
            place = place.setdefault(name, {})
        if value is None:
            place.pop(key)
        else:
            place[key] = value
    path.write_text(yaml.safe_dump(tree))
    return path


def test_built_in_has_all_tasks_and_its_own_words() -> None:
    registry = read_registry()
    assert set(registry.tasks) == set(FIELDS) == {*MADE, *ON_REQUEST, *SOURCES} == set(schemas.ANSWERS)
    assert all(len(set(spec.instructions)) == len(spec.instructions) > 1 for spec in registry.tasks.values())
    for name, spec in registry.tasks.items():
        for style in spec.styles:
            for paraphrase in range(len(spec.instructions)):
                prompt = registry.prompt(name, TEXTS, style, paraphrase)
                assert all(TEXTS[field] in prompt.body for field in FIELDS[name])
                assert prompt.text == f"{prompt.instruction}\n\n{prompt.body}"
        if name in MADE:
            assert spec.probability == 0.25 and spec.temperature in (0.2, 0.5)


def test_literal_braces_in_a_passage_survive() -> None:
    prompt = read_registry().prompt("answer", {"question": "{x}?", "passage": "set {1, 2} and {{y}}"})
    assert "{x}?" in prompt.body and "set {1, 2} and {{y}}" in prompt.body


def test_replaced_from_a_file(tmp_path: Path) -> None:
    built_in = read_registry()
    assert read_registry(BUILT_IN).prompt_version == built_in.prompt_version
    other = read_registry(write(tmp_path / "mine.yaml", {"name": "mine", "tasks.fact.instructions": ["One fact!"]}))
    assert other.prompt("fact", TEXTS).text == "One fact!\n\nPassage:\n<passage>"
    assert other.prompt_version.startswith("mine/1+") and other.prompt_version[-8:] != built_in.prompt_version[-8:]
    few = read_registry(write(tmp_path / "few.yaml", {"tasks": {"rephrase": built_in.tasks["rephrase"].model_dump()}}))
    with pytest.raises(RecipeError, match=r"no such task in registry 'smolmlx-research'.*It has: rephrase"):
        few.prompt("bullets", TEXTS)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tasks.bulets": {"instructions": ["x"]}}, "tasks.bulets.body: Field required"),
        ({"tasks.fact.temprature": 1}, "tasks.fact.temprature: unknown key. Did you mean 'temperature'?"),
        (
            {"tasks.fact.colour": "red"},
            "tasks.fact.colour: unknown key. Known: instructions, body, styles, hints, maker, from",
        ),
        ({"tasks.retrieval.maker.hnt": "x"}, "tasks.retrieval.maker.hnt: unknown key. Did you mean 'hint'?"),
        ({"vrsion": 1}, "vrsion: unknown key. Did you mean 'version'?"),
        ({"tasks.fact.temperature": 9}, "tasks.fact.temperature: Input should be less than or equal to 2"),
        ({"tasks.fact.body": "no field"}, "tasks.fact.body: expected exactly {passage}, got nothing"),
        ({"tasks.fact.body": "{passage} {oops}"}, "got {oops}, {passage}"),
        ({"tasks.fact.body": "{passage"}, "braces do not match"),
        ({"tasks.fact.body": "{passage!z}"}, "tasks.fact.body: a field is its name in braces alone"),
        ({"tasks.fact.body": "{passage:>z}"}, "tasks.fact.body: a field is its name in braces alone"),
        ({"tasks.bullets.styles": {"markdwn": 1}}, "Did you mean 'markdown'?"),
        ({"tasks.bullets.unanswerable": 0.5}, "only retrieval has this key"),
        ({"tasks.retrieval.maker": None}, "tasks.retrieval.maker: missing"),
        ({"tasks.retrieval.passages": [5, 3]}, "fewest 5 is above most 3"),
        ({"tasks.answer.from": None}, "tasks.answer.from: expected qa, got nothing"),
        ({"tasks.qa": None}, "tasks.answer.from: task 'qa' is not in this file"),
        ({"version": 0}, "version: "),
    ],
)
def test_faults_are_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError) as error:
        read_registry(write(tmp_path / "bad.yaml", change))
    assert says in str(error.value) and "bad.yaml" in str(error.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_registry(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    with pytest.raises(RecipeError, match="not valid YAML"):
        read_registry(tmp_path / "latin.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match="not valid YAML"):
        read_registry(tmp_path / "broken.yaml")


VALUES: dict[str, st.SearchStrategy[schemas.Value]] = {
    "bullets": st.lists(line, min_size=1, max_size=6, unique_by=str.lower).map(tuple),
    "qa": st.lists(st.builds(QAPair, line, line), min_size=1, max_size=3, unique_by=lambda i: str(i).lower()).map(
        tuple
    ),
    "triplets": st.lists(
        st.builds(Triplet, line, line, line), min_size=1, max_size=2, unique_by=lambda i: str(i).lower()
    ).map(tuple),
    "retrieval": st.builds(RetrievalResult, st.none() | st.integers(0, 19), line),
    # A line that looks like a header cannot be told from one.
    "notes": st.lists(
        line.filter(lambda text: not any(name.lower() in text.lower() for name in HEADERS)),
        min_size=6,
        max_size=6,
        unique_by=str.lower,
    ).map(lambda lines: Notes(lines[0], tuple(lines[1:4]), lines[4], lines[5])),
}


@pytest.mark.parametrize("task", VALUES)
@settings(deadline=None)
@given(data=st.data())
def test_every_style_is_read_back(task: str, data: st.DataObject) -> None:
    value = data.draw(VALUES[task])
    for style in sorted(STYLES[task]):
        written = replies.render(task, value, style)
        assert replies.read(schemas.ANSWERS[task], written) == value
        assert replies.read_freely(task, written) == value


@settings(deadline=None)
@given(st.text(max_size=200), st.sampled_from(sorted(schemas.ANSWERS)))
def test_reading_never_raises(text: str, task: str) -> None:
    replies.read_freely(task, text)
    value = replies.read(schemas.ANSWERS[task], text)
    if not isinstance(value, Rejected):
        schemas.to_answer(schemas.ANSWERS[task], value)


@pytest.mark.parametrize(
    ("task", "reply", "reason"),
    [
        ("bullets", "", replies.EMPTY),
        ("bullets", '{"bullets": []}', "invalid bullets: too short"),
        ("bullets", '{"bullets": ["a", "A"]}', replies.REPEATED),
        ("bullets", '{"bullets": ["a", " "]}', replies.EMPTY),
        ("bullets", "\n".join(f"- point {i}" for i in range(7)), "invalid bullets: too long"),
        ("bullets", '{"bullets": ["' + "x" * 301 + '"]}', "invalid bullets: string too long"),
        ("bullets", "Just a sentence.", replies.UNREADABLE),
        ("qa", "I cannot do that.", replies.UNREADABLE),
        ("qa", '{"pairs": [{"question": "a?"}]}', "invalid pairs.answer: missing"),
        ("triplets", '{"triplets": [{"subject": "a", "relation": "b", "object": 3}]}', "invalid triplets.object: string type"),
        ("retrieval", '{"passage": 0, "why": "x"}', "invalid passage: greater than equal"),
        ("rephrase", '{"text": "  "}', replies.EMPTY),
        ("notes", '{"summary": "a", "key_points": ["b", "c"], "limitation": "d", "question": "e?"}', "invalid key_points: too short"),
        ("notes", "Summary:\na\nKey Points:\n- b\n- B\n- c\nLimitation:\nd\nFollow-up Question:\ne?", replies.REPEATED),
        ("notes", "Summary:\na\nLimitation:\nd", replies.UNREADABLE),
    ],
)  # fmt: skip
def test_refusals_have_a_reason(task: str, reply: str, reason: str) -> None:
    assert replies.read(schemas.ANSWERS[task], reply) == Rejected(reason)


def test_replies_without_a_schema_are_read_tolerantly() -> None:
    read = replies.read
    assert read(schemas.Bullets, "Sure!\n1. one\n2. two") == ("one", "two")
    assert read(schemas.Bullets, "['it''s', \"so\"]") == ("its", "so")
    assert read(schemas.Pairs, "[('a?', 'b')]") == (QAPair("a?", "b"),)
    assert read(schemas.Triplets, "[('a', 'b', 'c')]") == (Triplet("a", "b", "c"),)
    assert read(schemas.Text, "In other words.\n") == "In other words."
    assert read(schemas.Text, '```json\n{"text": "Fenced."}\n```') == "Fenced."
    assert read(schemas.Text, '{"a": 1} is JSON') == '{"a": 1} is JSON'
    assert read(schemas.Question, '{"question": "What?", "why": "Line 1."}') == schemas.Quest("What?", "Line 1.")
    assert read(schemas.Question, "What?") == Rejected(replies.UNREADABLE)
    assert replies.read_freely("bullets", "Just a sentence.") == ("Just a sentence.",)
    assert replies.read_freely("retrieval", "**Passage:** 9\n**Why:** x", 3) == RetrievalResult(None, "x")


def test_schemas_are_strict_and_bounded() -> None:
    for schema in {*schemas.ANSWERS.values(), schemas.Question}:
        tree = schema.model_json_schema()
        objects = [tree, *tree.get("$defs", {}).values()]
        assert all(o["additionalProperties"] is False and set(o["required"]) == set(o["properties"]) for o in objects)
    triplet = schemas.Triplets.model_json_schema()["$defs"]["_Statement"]["properties"]
    assert [triplet[name]["maxLength"] for name in ("subject", "relation", "object")] == [120, 120, 160]
    assert schemas.retrieval_schema(3)["properties"]["passage"] == {"enum": [1, 2, 3, None]}
