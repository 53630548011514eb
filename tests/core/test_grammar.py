"""Grammars without an engine to speak of: the numpy one, untrained, draws; a validator judges every answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from pydantic import BaseModel

import lab as labs
from smolmlx import backend
from smolmlx.backend import Decoding, Generator, Loading, OneOf, Regex
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import RecipeError
from smolmlx.generation.batching import Batcher, run_all
from smolmlx.generation.constraint import read_constraint
from smolmlx.generation.grammar import Grammars, check, pack, unpack
from smolmlx.models import embedded_folder, open_model
from smolmlx.tasks.replies import REPEATED, Rejected, read
from smolmlx.tasks.schemas import ANSWERS, Question, Text, kept_schema, retrieval_schema
from toy_engine.generator import ToySteps

SUPPORTED: dict[str, Any] = {
    "enum": {"enum": ["a", 1, None, True, {"b": [1]}]},
    "const": {"const": {"k": "v"}},
    "types": {"type": ["integer", "null", "boolean"]},
    "number bounds": {"type": "number", "minimum": -2, "exclusiveMaximum": 7.5},
    "integer bounds": {"type": "integer", "exclusiveMinimum": 3, "maximum": 120},
    "multipleOf": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700},
    "string lengths": {"type": "string", "minLength": 3, "maxLength": 9},
    "pattern": {"type": "string", "pattern": "^[A-C]{2}-[0-9]+$"},
    "date": {"type": "string", "format": "date"},
    "date-time": {"type": "string", "format": "date-time"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "email": {"type": "string", "format": "email"},
    "items": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "prefixItems": {"type": "array", "prefixItems": [{"type": "integer"}, {"const": "x"}], "items": False, "minItems": 2},
    "optional property": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "null"}},
        "required": ["b"],
        "additionalProperties": False,
    },
    "other names": {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": {"type": "boolean"},
        "maxProperties": 3,
    },
    "additionalProperties": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3},
    "minProperties": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "minProperties": 2,
        "additionalProperties": False,
    },
    "patternProperties": {
        "type": "object",
        "patternProperties": {"^n_[a-z]+$": {"type": "integer"}},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    "anyOf": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "null"}, "maxItems": 2}]},
    "oneOf that exclude each other": {"oneOf": [{"type": "string", "maxLength": 4}, {"type": "boolean"}]},
    "allOf": {"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 50}]},
    "$ref and $defs": {
        "$defs": {"node": {
            "type": "object",
            "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["v", "next"],
            "additionalProperties": False,
        }},
        "$ref": "#/$defs/node",
    },
    "keywords that say nothing": {
        "type": "array",
        "items": {"type": "object", "additionalProperties": False, "propertyNames": {}, "unevaluatedProperties": True,
                  "dependentRequired": {}, "dependentSchemas": {}, "minProperties": 0, "patternProperties": {}, "required": []},
        "uniqueItems": False,
        "unevaluatedItems": True,
        "minItems": 0,
        "maxItems": 2,
    },
    "annotations": {"title": "T", "description": "D", "examples": [1], "default": 1, "type": "integer", "deprecated": True},
    "anything": {},
}  # fmt: skip
FORMATS = jsonschema.FormatChecker()
_rfc3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)
FORMATS.checks("date-time")(lambda text: _rfc3339.fullmatch(text) is not None)  # jsonschema's own needs a package
REFUSED: dict[str, Any] = {
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}, "then": {"minLength": 1}},
    "contains": {"type": "array", "contains": {"type": "integer"}},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^a"}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "unevaluatedItems": {"type": "array", "unevaluatedItems": False},
    "$dynamicRef": {"$dynamicRef": "#a"},
    "oneOf": {"oneOf": [{"type": "number"}, {"type": "integer"}]},
    "shoe-size": {"type": "string", "format": "shoe-size"},
    "minProperties": {"items": {"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 2}},
    "patternProperties": {"type": "object", "patternProperties": {"a": {"type": "integer"}}},
    "allOf": {"allOf": [{"properties": {"a": {"type": "integer"}}}, {"properties": {"b": {"type": "integer"}}}]},
    "http://elsewhere/x": {"$ref": "http://elsewhere/x"},
    "minimum": {"type": "integer", "minimum": 5, "maximum": 2},
}


class _NoSchema(BaseModel):
    call: Callable[[], int]


BROKEN: list[Any] = [
    {"type": "strin"}, {"enum": []}, Regex("[a-z"), Regex(""), OneOf(("",)), 3, "x", _NoSchema,
    {"type": "object", "properties": {"a": {"type": "string", "required": True}}},
]  # fmt: skip


@pytest.fixture(scope="module")
def generator(tiny_model: Path) -> Iterator[Generator]:
    with labs.toy_installed():
        engine = backend.choose("toy", "cpu").backend
        yield engine.generator(open_model(tiny_model), None, Tokenizer(tiny_model), Loading("cpu"))


@pytest.fixture(scope="module")
def grammars(tiny_model: Path) -> Grammars:
    tokenizer = Tokenizer(tiny_model)
    return Grammars(tokenizer, tokenizer.eos_ids)


class _Noise:
    """A model of any vocabulary that prefers nothing; takes the place of the numpy engine's."""

    def __init__(self, num_tokens: int) -> None:
        self._rows = np.random.default_rng(0).normal(size=(16, num_tokens)).astype(np.float32)

    def logits(self, last: Any) -> tuple[Any]:
        return (self._rows[last % len(self._rows)],)


@pytest.fixture(scope="module", params=["embedded", "stories260k", "smollm2-135m-base"])
def shipped(request: pytest.FixtureRequest) -> tuple[Batcher, Tokenizer]:
    """What draws with a tokenizer as it is shipped, whose vocabulary is a multiple of 32."""
    if request.param == "embedded":
        folder = embedded_folder()
    else:
        (folder,) = [path for path in request.getfixturevalue("assets").glob("*/*") if path.name == request.param]
    tokenizer = Tokenizer(folder)
    assert tokenizer.vocab_size % 32 == 0
    return Batcher(ToySteps(_Noise(tokenizer.vocab_size)), tokenizer, 8), tokenizer  # type: ignore[arg-type]


def draws(generator: Generator, schema: Any, count: int, max_tokens: int = 60) -> list[str]:
    prompts = [[10 + i % 290] for i in range(count)]
    how = Decoding(max_tokens=max_tokens, temperature=1.5, schema=schema, batch_size=64)
    found = list(generator.generate(prompts, how))
    assert len(found) == count and all(len(one.ids) <= max_tokens for one in found)
    return [one.text for one in found]


@pytest.mark.parametrize("task", ["question maker", *ANSWERS])
def test_a_thousand_draws_of_task_schemas_are_valid(generator: Generator, task: str) -> None:
    """About a hundred draws for each of twelve schemas, within a budget that most would overrun."""
    schema = ANSWERS.get(task, Question)
    found = draws(generator, schema, 96, max_tokens=90)
    for text in found:
        schema.model_validate_json(text)
    assert len(set(found)) > 20


def test_no_item_is_blank_where_an_engine_keeps_it(grammars: Grammars) -> None:
    for schema, fits in ((kept_schema("bullets", 1), False), (ANSWERS["bullets"], True)):
        walk = grammars.compile(schema, 200).start()
        for token in grammars.tokenizer.encode('{"bullets": ["'):
            walk.take(token)
        ids = grammars.tokenizer.encode(' "]}')
        assert (walk._matcher.try_consume_tokens(ids) == len(ids)) == fits


@pytest.mark.parametrize("task", [name for name in ANSWERS if ANSWERS[name] is not Text])
def test_kept_answers_are_accepted(generator: Generator, task: str) -> None:
    for text in draws(generator, kept_schema(task, 3), 24, max_tokens=90):
        value = read(ANSWERS[task], text, 3)
        assert not isinstance(value, Rejected) or value.reason == REPEATED


@pytest.mark.parametrize("size", [1, 2, 5, 20])
def test_retrieval_names_only_passages_that_there_are(generator: Generator, size: int) -> None:
    found = {json.loads(text)["passage"] for text in draws(generator, retrieval_schema(size), 64)}
    assert found <= {*range(1, size + 1), None} and len(found) > min(size, 3) / 2


@pytest.mark.parametrize("feature", SUPPORTED)
def test_features_that_are_kept_to(generator: Generator, feature: str) -> None:
    validator = jsonschema.Draft202012Validator(SUPPORTED[feature], format_checker=FORMATS)
    for text in draws(generator, SUPPORTED[feature], 24, max_tokens=80):
        validator.validate(json.loads(text))


@pytest.mark.parametrize("feature", SUPPORTED)
def test_features_are_kept_to_in_vocabularies_as_shipped(shipped: tuple[Batcher, Tokenizer], feature: str) -> None:
    validator = jsonschema.Draft202012Validator(SUPPORTED[feature], format_checker=FORMATS)
    how = Decoding(max_tokens=48, temperature=1.0, schema=SUPPORTED[feature])
    for found in run_all(shipped[0], [[n] for n in range(4)], how, None):
        validator.validate(json.loads(found.text))


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [(OneOf(("yes", "yes please")), "yes( please)?"), (OneOf(("no",)), "no"), (Regex("[a-c]+ ?x?"), "[a-c]+ ?x?")],
)
def test_texts_that_may_end_or_go_on(shipped: tuple[Batcher, Tokenizer], constraint: Any, pattern: str) -> None:
    for found in run_all(shipped[0], [[n] for n in range(6)], Decoding(32, 1.0, schema=constraint), None):
        assert re.fullmatch(pattern, found.text), found


def test_a_way_out_is_short_in_vocabularies_as_shipped(shipped: tuple[Batcher, Tokenizer]) -> None:
    """Some write a brace as a byte only."""
    tokenizer = shipped[1]
    properties = {"a": {"type": "number"}, "b": {"type": "array", "items": {"type": "string"}}}
    for names in (["a"], ["a", "b"]):
        tree = {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
        way = Grammars(tokenizer, tokenizer.eos_ids).compile(tree, 24).start().way_out(24)
        assert way is not None and list(json.loads(tokenizer.decode(way))) == names


@pytest.mark.parametrize("pattern", [r"cost: [0-9]{2}\$", r"^[ab]{3}\\$", r"^x[0-9]$"])
def test_only_anchors_are_taken_off_a_pattern(generator: Generator, pattern: str) -> None:
    for text in draws(generator, Regex(pattern), 4):
        assert re.fullmatch(pattern, text)


def test_a_declared_name_does_not_come_again_with_escapes(grammars: Grammars) -> None:
    others = {"properties": {"a": {"type": "integer"}, "ab": {}}, "additionalProperties": {"type": "boolean"}}
    taken = {'{"a": 1, "\\u0061": true}': False, '{"a": 1, "a": true}': False, '{"a": 1, "b": 1}': False}
    taken |= dict.fromkeys(('{"a": 1, "b": true}', '{"a": 1, "abc": true}', '{"a": 1, "\\n": true, "": false}'), True)
    for text, fits in taken.items():
        walk = grammars.compile(others, 200).start()
        ids = grammars.tokenizer.encode(text)
        assert fits == (walk._matcher.try_consume_tokens(ids) == len(ids) and walk.whole), text


@pytest.mark.parametrize("feature", REFUSED)
def test_features_that_are_refused_by_name(feature: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(feature)) as caught:
        check(REFUSED[feature])
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "schema", [{"type": "strin"}, {"type": ["null", "strin"]}, {"type": "array", "items": {"type": "strin"}}]
)
def test_a_type_that_is_none_is_named(schema: Any) -> None:
    with pytest.raises(RecipeError, match=r"'strin' is no type of JSON schema\. Types: string, number,"):
        check(schema)


@pytest.mark.parametrize("schema", BROKEN)
def test_what_is_no_schema_is_refused(schema: Any) -> None:
    with pytest.raises(RecipeError):
        check(schema)


class TestWays:
    @pytest.mark.parametrize("task", ANSWERS)
    def test_a_way_out_is_valid_from_anywhere(self, grammars: Grammars, task: str) -> None:
        """Walk at random, and from each place on the way take the way out."""
        dice = np.random.default_rng(0)
        grammar = grammars.compile(ANSWERS[task], 200)
        walk, ids = grammar.start(), list[int]()
        tokenizer = grammars.tokenizer
        for _ in range(40):
            way = walk.way_out(100)
            assert way is not None
            ANSWERS[task].model_validate_json(tokenizer.decode([*ids, *way]))
            allowed = np.flatnonzero(unpack(walk.allowed() & ~grammar.ends))
            if not len(allowed):
                break
            token = int(dice.choice(allowed))
            walk.take(token)
            ids.append(token)

    def test_forced_tokens_are_the_only_ones(self, grammars: Grammars) -> None:
        walk = grammars.compile(ANSWERS["triplets"], 200).start()
        forced = walk.forced()
        assert grammars.tokenizer.decode(forced).startswith('{"triplets": [{"subject": "')

    def test_compiled_once(self, grammars: Grammars) -> None:
        assert grammars.compile(ANSWERS["qa"], 200) is grammars.compile(ANSWERS["qa"], 300)


def test_bits_round_trip() -> None:
    tokens = [0, 1, 31, 32, 63, 64, 99]
    assert np.flatnonzero(unpack(pack(tokens, 100))).tolist() == tokens


class TestRead:
    def test_file_class_regex_choice(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "s.json").write_text('{"type": "integer"}')
        (tmp_path / "mine.py").write_text("from pydantic import BaseModel\nclass Note(BaseModel):\n    text: str\n")
        monkeypatch.chdir(tmp_path)
        assert read_constraint("s.json", None, ()) == {"type": "integer"}
        assert getattr(read_constraint("mine:Note", None, ()), "__name__", "") == "Note"
        assert read_constraint(None, "a+", ()) == Regex("a+")
        assert read_constraint(None, None, ("x", "y")) == OneOf(("x", "y"))
        assert read_constraint(None, None, ()) is None

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            (("missing.json", None, ()), "no such file"),
            (("json:loads", None, ()), "BaseModel"),
            (("nowhere:X", None, ()), "cannot be imported"),
            ((":X", None, ()), "no such file"),
            ((".foo:X", None, ()), "no such file"),
            (("", None, ()), "no such file"),
            (("broken:X", None, ()), "cannot be imported from .*NameError"),
            ((None, "", ()), "got an empty text"),
            ((None, "a", ("b",)), "--regex and --choice"),
        ],
    )
    def test_refuses(self, given: tuple[Any, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "broken.py").write_text("nothing_is_called_this\n")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(RecipeError, match=said):
            read_constraint(*given)
