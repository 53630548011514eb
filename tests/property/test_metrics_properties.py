"""Any string goes through every metric and parser without an exception, and every score stays in its range."""

from __future__ import annotations

import json
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from smolmlx.evals.bootstrap import bootstrap_mean, difference_sentence
from smolmlx.evals.controls import nearest_rows, random_reference
from smolmlx.evals.judge import Choice, Marks, parse_reply
from smolmlx.evals.metrics import common_subsequence, is_formulaic, reference_overlap, rouge_l, rouge_n, set_f1
from smolmlx.evals.notes import (
    BOILERPLATE,
    HEADERS,
    MAX_RUBRIC,
    compat_bullets,
    compat_compliance,
    content,
    follow_up_valid,
    rubric,
    sections,
    strict_compliance,
)
from smolmlx.evals.parsers import parse_bullets, parse_qa, parse_retrieval, parse_triplets
from smolmlx.evals.suites import EvalRow, score_note
from smolmlx.evals.text import STOP_WORDS, content_tokens, lexical_diversity, rubric_tokens, specificity, word_count

PIECES = (
    *(f"{name}:" for name in HEADERS),
    *("## Summary", "**Limitation**", "key points :", "- ", "* ", "-", "\n", "\n\n", "\r\n", " ", "\t", "?", ".", "a"),
    *("### Q1", "**Question:**", "**Answer:**", "**Passage:** 2", "**Why:**", "Passage:", "(a, b, c)", "- (s, r, o)"),
    *(
        '{"passage": 2, "why": "x"}',
        "[",
        "]",
        "{",
        "}",
        '"',
        ",",
        ":",
        "null",
        "```json\n",
        "```",
        "gradient",
        "é",
        "2",
    ),
)
# Plain text rarely holds a header, so half of the strings are built from what the readers look for.
TEXT = st.text() | st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=25).map("".join)
WORDS = st.text("abcdefg hij", min_size=1).map(str.strip).filter(lambda text: any(map(str.isalpha, text)))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["passage", "why", "question", "answer", "subject", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(TEXT)
def test_tokens_stay_within_their_alphabets(text: str) -> None:
    assert all(len(token) >= 3 and token not in STOP_WORDS and token.isascii() for token in content_tokens(text))
    assert all(token.isascii() and token.isalpha() and token.islower() for token in rubric_tokens(text))
    assert word_count(text) >= 0
    assert 0 <= specificity(text) <= 1
    assert 0 <= lexical_diversity(text) <= 1


@given(TEXT, TEXT, TEXT)
def test_reference_scores_stay_in_range(output: str, reference: str, source: str) -> None:
    found = reference_overlap(output, reference, source)
    values = [found.precision, found.recall, found.f1, found.key_term_recall, found.unsupported]
    values += [found.content_alignment, rouge_n(output, reference), rouge_n(output, reference, 2)]
    values += [rouge_l(output, reference), set_f1(content_tokens(output), content_tokens(reference))]
    assert all(0 <= value <= 1 for value in values)
    assert is_formulaic(output, [reference]) in (True, False)


@given(TEXT)
def test_a_text_agrees_with_itself(text: str) -> None:
    found = reference_overlap(text, text, "")
    assert found.content_alignment == (1.0 if content_tokens(text) else 0.0)


@given(st.lists(st.sampled_from("abc")), st.lists(st.sampled_from("abc")))
def test_common_subsequence_equals_the_textbook_table(left: list[str], right: list[str]) -> None:
    row = [0] * (len(right) + 1)
    for mine in left:
        above = row
        row = [0]
        for position, other in enumerate(right):
            row.append(above[position] + 1 if mine == other else max(row[-1], above[position + 1]))
    assert common_subsequence(left, right) == row[-1]


@given(TEXT)
def test_template_readers_accept_any_text(text: str) -> None:
    strict = strict_compliance(text)
    assert strict.passed == (not strict.problems)
    assert not compat_compliance(text).passed or compat_compliance(text, "compat_v1").passed
    assert not follow_up_valid(text) or follow_up_valid(text, compat=True)
    assert compat_bullets(text) >= 0
    assert tuple(sections(text)) == HEADERS
    assert 0 <= rubric(text).total <= MAX_RUBRIC
    assert sum(content(text).section_words) <= word_count(text)


@given(WORDS, st.lists(WORDS, min_size=3, max_size=3), WORDS, WORDS, TEXT)
def test_a_note_from_the_template_passes_and_any_flaw_fails(
    summary: str, points: list[str], limitation: str, question: str, extra: str
) -> None:
    bullets = "\n".join(f"- {point}" for point in points)
    note = f"Summary: {summary}\nKey Points:\n{bullets}\nLimitation: {limitation}\nFollow-up Question: {question}?"
    assert strict_compliance(note).problems == ()
    assert compat_compliance(note).passed
    if extra.strip():
        assert not strict_compliance(f"{extra}\n{note}").passed
    if extra.strip() and not extra.strip().endswith("?"):
        assert not strict_compliance(f"{note}\n{extra}").passed
    assert not strict_compliance(note.replace(bullets, f"{bullets}\n- {extra}a")).passed


@given(TEXT | JSON.map(json.dumps), st.integers(0, 5))
def test_parsers_accept_any_text(text: str, num_passages: int) -> None:
    found = parse_retrieval(text, num_passages)
    assert found.index is None or 0 <= found.index < num_passages
    assert all(parse_bullets(text)) and bool(parse_bullets(text)) == bool(text.strip())
    assert all(pair.question and pair.answer for pair in parse_qa(text))
    assert all(part.subject and part.relation and part.object for part in parse_triplets(text))


@given(TEXT, TEXT, TEXT)
def test_a_score_holds_only_numbers_in_range(output: str, reference: str, source: str) -> None:
    score = score_note(EvalRow("x", source, reference), output)
    shares = [score.content_alignment, score.f1, score.key_term_recall, score.unsupported]
    assert all(0 <= share <= 1 for share in [*shares, score.lexical_diversity, score.specificity])
    assert min(score.num_words, score.num_bullets, score.words_per_point) >= 0
    assert score.rubric == sum(score.rubric_parts)


@given(st.lists(TEXT, min_size=1, max_size=6), st.lists(TEXT, max_size=3), st.integers(0, 9))
def test_controls_accept_any_text(train: list[str], test: list[str], seed: int) -> None:
    for found in nearest_rows(train, test):
        assert 0 <= found.row < len(train)
        assert 0 <= found.similarity <= 1
    drawn = random_reference(train, test, seed=seed)
    assert all(made in train for made in drawn)
    assert all(made != own or set(train) == {own} for made, own in zip(drawn, test, strict=True))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.integers(0, 3))
@settings(max_examples=50)
def test_an_interval_holds_its_mean_and_stays_within_the_values(values: list[float], seed: int) -> None:
    interval = bootstrap_mean(values, draws=50, seed=seed)
    slack = 1e-9 * max(1.0, *map(abs, values))
    assert min(values) - slack <= interval.low <= interval.mean <= interval.high <= max(values) + slack
    said = difference_sentence(interval, "m", "a", "b")
    assert ("no difference shown" in said) == (not interval.shows_difference)


def test_ten_thousand_strings_through_every_metric_and_parser() -> None:
    """Random text and random arrangements of what the readers look for, three at a time; Hypothesis above seeks corners."""
    rng = random.Random(20261121)
    texts = [_random_text(rng) for _ in range(10_000)]
    for number, output in enumerate(texts):
        reference, source = texts[number - 1], texts[number - 2]
        score = score_note(EvalRow("x", source, reference), output)
        shares = [score.content_alignment, score.precision, score.recall, score.f1, score.key_term_recall]
        shares += [score.unsupported, score.lexical_diversity, score.specificity, rouge_l(output, reference)]
        shares += [rouge_n(output, reference), rouge_n(output, reference, 2)]
        shares.append(set_f1(parse_bullets(output), parse_bullets(reference)))
        assert all(0 <= share <= 1 for share in shares), output
        assert 0 <= score.rubric <= MAX_RUBRIC and all(0 <= part <= 3 for part in score.rubric_parts)
        assert min(score.num_words, score.num_bullets, score.words_per_point) >= 0
        assert score.compliance == (not score.problems) and (not score.compat or score.compat_v1)
        assert is_formulaic(output, BOILERPLATE) == score.formulaic
        num_passages = number % 4
        index = parse_retrieval(output, num_passages).index
        assert index is None or 0 <= index < num_passages
        assert bool(parse_bullets(output)) == bool(output.strip())
        assert all(pair.question and pair.answer for pair in parse_qa(output))
        assert all(part.subject and part.relation and part.object for part in parse_triplets(output))
        for schema in (Marks, Choice):
            reply = parse_reply(output, schema)
            assert reply is None or schema.model_validate(reply)


def _random_text(rng: random.Random) -> str:
    words = ("gradient", "model", "the", "reef", "x" * 30, '{"winner": "first"}', "-1", "1e999", "\\u0000")
    kinds = (
        lambda: rng.choice(PIECES),
        lambda: rng.choice(words) + " ",
        lambda: "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x110000)))) for _ in range(3)),
    )
    return "".join(rng.choice(kinds)() for _ in range(rng.randrange(30)))
