"""Grammars that answers keep to, and where one row stands in its grammar.

A JSON schema, a regular expression or a choice is compiled once per tokenizer by llguidance, the fastest of the libraries
behind Outlines for this (a mask takes microseconds); each row walks a copy of its own. Engines only apply the masks.
llguidance is imported inside functions, so that nothing is loaded where no answer is constrained.
"""

from __future__ import annotations

import json
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, PydanticUserError

from smolmlx.backend import Constraint, OneOf, Regex
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import BackendError, RecipeError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Words = npt.NDArray[np.uint32]
"""A set of tokens as bits, 32 to a word, lowest bit first."""

# As json.dumps writes, which is how answers stand in training rows.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_CLOSERS = ('"', "}", "]")
_CHARACTERS = (
    *"0aA1ntf",
    *sorted(set(string.ascii_letters + string.digits) - set("0aA1ntf")),
    *sorted(set(string.punctuation) - set("[{")),
    *" [{",
)
"""Fillers first, what opens a structure last."""
_LONGEST_WAY = 4096
"""Tokens within which an answer of every grammar must fit."""
_SCHEMAS_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_SCHEMAS = frozenset({"items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf"})
_TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")
_IDLE: Mapping[str, Sequence[Any]] = {
    "uniqueItems": (False,),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "propertyNames": (True, {}),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
}
"""Keywords that are refused, except where their value says nothing."""
_FEW = 40
"""Characters allowed, below which a place lies between values rather than inside a text."""
_MOST_KNOWN = 256
"""Grammars remembered for a tokenizer: a server may be asked for any number."""


class Walk:
    """One row's way through a grammar."""

    def __init__(self, grammar: Grammar, matcher: LLMatcher) -> None:
        self.grammar, self._matcher = grammar, matcher

    def allowed(self) -> Words:
        """Return the tokens that may come next, [(V + 31) // 32] words; those that end an answer are among them where it is whole."""
        # llguidance returns a word more than there are tokens for where the vocabulary is a multiple of 32.
        return np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: len(self.grammar.ends)]

    def take(self, token: int) -> None:
        """Go on by a token that `allowed` names."""
        accepted = self._matcher.consume_token(token)
        assert accepted, self._matcher.get_error()

    def forced(self) -> list[int]:
        """Return the tokens that must come next because the grammar leaves no choice; possibly none."""
        return list(self._matcher.compute_ff_tokens())

    @property
    def whole(self) -> bool:
        """Whether the answer may end here."""
        return bool(self._matcher.is_accepting())

    @property
    def over(self) -> bool:
        """Whether nothing but an end may follow."""
        return bool(self._matcher.is_stopped()) or (self.whole and self._only_ends())

    def _only_ends(self) -> bool:
        return not (self.allowed() & ~self.grammar.ends).any()

    def copy(self) -> Walk:
        return Walk(self.grammar, self._matcher.deep_copy())

    def way_out(self, limit: int) -> list[int] | None:
        """Return at most `limit` tokens that make the answer whole, or None where no such way is found.

        Brackets and quotes are closed first; else the single character that leads where the way has
        been least.
        This is a short way, not always the shortest.
        """
        walk, path, seen = self.copy(), list[int](), Counter[bytes]()
        while not walk.whole:
            step = walk.forced() or [walk._toward_end(seen)]
            path += step
            if len(path) > limit:
                return None
            for token in step:
                walk.take(token)
        return path

    def _toward_end(self, seen: Counter[bytes]) -> int:
        """Return a token that leads on from here; `seen` counts the masks of the places that the way has led through."""
        allowed = self.allowed()
        here, known = allowed.tobytes(), self.grammar.dull
        steps = [token for token in self.grammar.characters if has(allowed, token)]
        # Where most characters may come, a bracket is text like any other; only the quote ends it.
        closers = self.grammar.closers if len(steps) < _FEW else self.grammar.closers[:1]
        for token in closers:
            if has(allowed, token):
                return token
        seen[here] += 1
        if here not in known:
            masks = []
            for token in steps:
                probe = self.copy()
                probe.take(token)
                masks.append(probe.allowed().tobytes())
                if not seen[masks[-1]]:
                    break
            if set(masks) == {here}:  # a stretch of a minimum length: what is taken makes no difference
                known.add(here)
            elif masks:
                best = min(range(len(masks)), key=lambda i: (seen[masks[i]], masks[i] == here))
                seen[masks[best]] += 1
                return steps[best]
        return steps[0] if steps else int(np.flatnonzero(unpack(allowed))[0])


class Grammar:
    """A compiled grammar of one tokenizer."""

    def __init__(self, matcher: LLMatcher, ends: Words, closers: Sequence[int], characters: Sequence[int]) -> None:
        """Take a fresh matcher.

        Args:
            ends: tokens that end an answer.
            closers: tokens that lead out of a structure, best first.
            characters: tokens of a single character.
        """
        self._matcher, self.ends, self.closers, self.characters = matcher, ends, closers, characters
        self.dull: set[bytes] = set()
        """Masks of places where no single character changes what may follow."""
        shortest = self.start().way_out(_LONGEST_WAY)
        self.shortest = None if shortest is None else len(shortest)
        """Tokens of the shortest known answer."""
        self.margin = 16 + 2 * (self.shortest or 0)
        """Tokens left of an answer's budget below which each step must leave a way out."""

    def start(self) -> Walk:
        return Walk(self, self._matcher.deep_copy())


class Grammars:
    """Compiles constraints for one tokenizer and remembers them."""

    def __init__(self, tokenizer: Tokenizer, ends: Sequence[int]) -> None:
        self.tokenizer, self.num_tokens = tokenizer, tokenizer.vocab_size
        self._tokenizer = _load(tokenizer, tuple(ends), self.num_tokens)
        self._ends = pack([end for end in ends if end < self.num_tokens], self.num_tokens)
        # Asked of llguidance, which knows how a vocabulary writes a space, and which characters it only has as bytes.
        written = ([self._tokenizer.greedy_tokenize(text) for text in texts] for texts in (_CLOSERS, _CHARACTERS))
        self._closers, self._characters = ([ids[0] for ids in texts if len(ids) == 1] for texts in written)
        self._known: dict[str, Grammar] = {}

    def compile(self, constraint: Constraint, max_tokens: int) -> Grammar:
        """Return the grammar of a constraint.

        Raises:
            RecipeError: a feature that no grammar can hold, by name; or no answer fits into `max_tokens`.
        """
        from llguidance import LLMatcher

        source = to_source(constraint)
        if source not in self._known:
            matcher = LLMatcher(self._tokenizer, source)
            if matcher.is_error():
                raise RecipeError(_fault(constraint, matcher.get_error()))
            if len(self._known) >= _MOST_KNOWN:
                self._known.pop(next(iter(self._known)))
            self._known[source] = Grammar(matcher, self._ends, self._closers, self._characters)
        grammar = self._known[source]
        if grammar.shortest is None or grammar.shortest > max_tokens:
            needed = f"the shortest known one takes {grammar.shortest or f'more than {_LONGEST_WAY}'}"
            raise RecipeError(f"schema: no answer fits into max_tokens {max_tokens}: {needed}. Raise max_tokens.")
        return grammar


@lru_cache(maxsize=8)
def grammars(tokenizer: Tokenizer, ends: tuple[int, ...]) -> Grammars:
    """Return the grammars of a tokenizer for answers that end with one of `ends`; the same each time."""
    return Grammars(tokenizer, ends)


def to_source(constraint: Constraint) -> str:
    """Return a constraint as llguidance reads it.

    Raises:
        RecipeError: not a constraint, or one without any answer.
    """
    matcher = _library().LLMatcher
    if isinstance(constraint, Regex):
        if not constraint.pattern:
            raise RecipeError("regex: expected a pattern, got an empty text.")
        return str(matcher.grammar_from_regex(_without_anchors(constraint.pattern)))
    if isinstance(constraint, OneOf):
        if not constraint.options or not all(constraint.options):
            raise RecipeError("choice: expected one or more texts, none of them empty.")
        return str(matcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, constraint.options))))
    if isinstance(constraint, type) and issubclass(constraint, BaseModel):
        try:
            constraint = constraint.model_json_schema()
        except PydanticUserError as error:
            raise RecipeError(f"schema: {constraint!r} has no JSON schema: {error.message}.") from error
    if not isinstance(constraint, Mapping):
        raise RecipeError(f"schema: expected a JSON schema, a Pydantic model, Regex or OneOf; got {constraint!r}.")
    return str(matcher.grammar_from_json_schema(_tighten(constraint), overrides=_LAYOUT))


def _without_anchors(pattern: str) -> str:
    """Take ^ and $ off, which say nothing new of what is always matched whole; an escaped dollar is text."""
    body = pattern.removesuffix("$")
    num_backslashes = len(body) - len(body.rstrip("\\"))
    return (pattern if num_backslashes % 2 else body).removeprefix("^")


def _tighten(schema: Any) -> Any:
    """Return a schema of the same meaning that llguidance holds, or refuse what it takes but does not hold.

    Free property names may come twice, and then count once. And a declared name may come again as a free one whose letters are
    escaped, "\\u0061" for "a"; names that keep to a pattern are never escaped so.
    """
    if not isinstance(schema, Mapping):
        return schema
    fewest, required = schema.get("minProperties", 0), schema.get("required", [])
    if not isinstance(required, list):
        raise RecipeError(f"schema: required: got {required!r}, expected a list of names in the object they belong to.")
    if isinstance(fewest, int) and fewest > max(1, len(required)):
        raise RecipeError(_fault({}, "it uses ['minProperties'] beyond what is required"))
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in _TYPES:
            raise RecipeError(f"schema: type: {kind!r} is no type of JSON schema. Types: {', '.join(_TYPES)}.")
    found = {key: value for key, value in schema.items() if value not in _IDLE.get(key, ())}
    for key, value in list(found.items()):
        if key in _SCHEMAS_BY_NAME and isinstance(value, Mapping):
            found[key] = {name: _tighten(inner) for name, inner in value.items()}
        elif key in _SCHEMAS:
            found[key] = [_tighten(inner) for inner in value] if isinstance(value, list) else _tighten(value)
    others = found.get("additionalProperties", True)
    if others is not False and found.get("patternProperties"):
        raise RecipeError(_fault({}, "it uses ['patternProperties'] without additionalProperties: false"))
    if others is not False and isinstance(found.get("properties"), dict) and found["properties"]:
        found["patternProperties"] = {f"(?s)^{_none_of(list(found['properties']))}$": others}
        found["additionalProperties"] = False
    return found


def _none_of(names: Sequence[str]) -> str:
    """Return a pattern of all texts but these."""
    tails: dict[str, list[str]] = {}
    for name in filter(None, names):
        tails.setdefault(f"\\x{{{ord(name[0]):x}}}", []).append(name[1:])
    ways = [f"[^{''.join(tails)}].*" if tails else "..*"]
    ways += [f"{first}{_none_of(rest)}" for first, rest in tails.items()]
    return f"({'|'.join(ways)})" + ("" if "" in names else "?")


def check(constraint: Constraint) -> None:
    """Refuse what no grammar can hold, without a tokenizer.

    Raises:
        RecipeError: the feature, by name.
    """
    message = _library().LLMatcher.validate_grammar(to_source(constraint))
    if message and not message.startswith("WARNING"):
        raise RecipeError(_fault(constraint, message))


def pack(tokens: Sequence[int], num_tokens: int) -> Words:
    """Return a set of tokens as bits."""
    flags = np.zeros((num_tokens + 31) // 32 * 32, np.uint8)
    flags[list(tokens)] = 1
    return np.packbits(flags, bitorder="little").view(np.uint32)


def has(words: Words, token: int) -> bool:
    """Whether a token is in a set."""
    return bool(words[token >> 5] >> np.uint32(token & 31) & np.uint32(1))


def unpack(words: Words) -> npt.NDArray[np.bool_]:
    """Return bits as flags: [..., W] words to [..., 32 W]."""
    return np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little").astype(np.bool_)


def _fault(constraint: Constraint, message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    cause = next((line for line in lines if line.startswith("error:")), lines[0]).removeprefix("error: ")
    cause = cause.replace("Unimplemented keys: ", "it uses ").replace('"', "'")
    if cause.endswith("are not disjoint"):
        cause = "its patternProperties overlap, or it joins by allOf or $ref objects that each leave other names free"
    if isinstance(constraint, Regex):
        return (
            f"regex {constraint.pattern!r}: {cause}. Patterns are Rust's: no look-around, no back-references, no \\b."
        )
    if isinstance(constraint, OneOf):
        return f"choice: {cause}."
    return f"schema: {cause}, which answers cannot be kept to while they are written. Leave it out of the schema and check it afterwards."


def _load(tokenizer: Tokenizer, ends: tuple[int, ...], num_tokens: int) -> LLTokenizer:
    # llguidance goes by its first end token; it must be one of the vocabulary.
    known = tuple(end for end in ends if end < num_tokens)
    if not known:
        raise RecipeError("schema: the tokenizer has no token that ends an answer, so a constrained one could not end.")
    return _library().LLTokenizer(tokenizer.fast.to_str(), n_vocab=num_tokens, eos_token=list(known))


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise BackendError(
            "schema: constrained answers need llguidance. pip install 'smolmlx[mlx]' or 'smolmlx[cuda]', which bring it."
        ) from error
    return llguidance
