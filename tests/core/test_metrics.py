"""The worked examples of the metric definitions, to the digit, and the holes that the strict rule closes."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace

import pytest

from smolmlx.evals.metrics import (
    Overlap,
    common_subsequence,
    dpo_loss,
    is_formulaic,
    perplexity,
    reference_overlap,
    rouge_l,
    rouge_n,
    set_f1,
    token_weighted_mean,
)
from smolmlx.evals.notes import (
    compat_bullets,
    compat_compliance,
    content,
    follow_up_valid,
    rubric,
    sections,
    strict_compliance,
)
from smolmlx.evals.parsers import (
    QAPair,
    RetrievalResult,
    Triplet,
    parse_bullets,
    parse_qa,
    parse_retrieval,
    parse_triplets,
)
from smolmlx.evals.suites import (
    METRICS,
    EvalRow,
    compare_notes,
    control_outputs,
    loss_csv,
    loss_dict,
    loss_difference,
    loss_markdown,
    notes_dict,
    notes_markdown,
    notes_rows_csv,
    notes_summary_csv,
    score_notes,
    sum_up,
    summarise_loss,
)
from smolmlx.evals.text import (
    FILLER_WORDS,
    STOP_WORDS,
    content_tokens,
    lexical_diversity,
    rubric_tokens,
    specificity,
    word_count,
)

NOTE = """Summary: Dropout regularises wide layers.
Key Points:
- Units are dropped at random during training.
- Inference rescales the weights.
- Small layers gain little.
Limitation: Only image data was tried.
Follow-up Question: Does dropout help recurrent layers?"""


# Tokens


def test_word_lists_have_the_published_sizes() -> None:
    assert (len(STOP_WORDS), len(FILLER_WORDS)) == (67, 46)


def test_content_tokens_split_and_filter_as_defined() -> None:
    assert content_tokens("Follow-up: the N x N Café naïve α-helix, C++ GPT-4 gpt_4 x2! Models rate RATE") == [
        "follow-up",
        "caf",
        "helix",
        "c++",
        "gpt-4",
        "gpt_4",
        "rate",
        "rate",
    ]


def test_content_tokens_keep_trailing_signs_and_start_at_a_letter() -> None:
    assert content_tokens("3abc well- 2ab _tail") == ["abc", "well-", "tail"]


def test_rubric_tokens_and_words() -> None:
    assert rubric_tokens("Don't use GPT4 or a_b, Café-bar") == ["don", "t", "use", "or", "bar"]
    assert word_count("  one two\n\tthree ") == 3
    assert specificity("the cat is red") == 0.5
    assert specificity("42") == lexical_diversity("42") == 0.0
    assert lexical_diversity("cat cat Cat dog") == 0.5


# Reference overlap


def test_overlap_worked_example() -> None:
    wanted = [f"term{chr(97 + i // 7)}{chr(97 + i % 7)}" for i in range(49)]
    reference = wanted + wanted[-22:]
    output = [*wanted[:4], "grounded", *[f"stray{i}" for i in range(41)]]
    found = reference_overlap(" ".join(output), " ".join(reference), "grounded source")
    assert (len(output), len(reference), len(set(reference))) == (46, 71, 49)
    assert (found.precision, found.recall) == (4 / 46, 4 / 71)
    assert found.f1 == 8 / 117
    assert round(found.f1, 6) == 0.068376
    assert [round(part, 6) for part in (0.60 * found.f1, 0.25 * found.key_term_recall)] == [0.041026, 0.020408]
    assert round(0.15 * (1 - found.unsupported), 6) == 0.016304
    assert round(found.content_alignment, 6) == 0.077738


@pytest.mark.parametrize(
    ("output", "reference", "expected"),
    [
        ("", "gradient descent", Overlap(0.0, 0.0, 0.0, 0.0, 1.0)),
        ("gradient descent", "", Overlap(0.0, 0.0, 0.0, 0.0, 1.0)),
        ("", "", Overlap(0.0, 0.0, 0.0, 0.0, 1.0)),
        ("gradient gradient", "gradient", Overlap(0.5, 1.0, 2 / 3, 1.0, 0.0)),
    ],
)
def test_overlap_edges(output: str, reference: str, expected: Overlap) -> None:
    assert reference_overlap(output, reference, "") == expected


def test_unsupported_counts_repeats_and_accepts_the_input() -> None:
    assert reference_overlap("alpha beta gamma gamma", "alpha", "beta").unsupported == 0.5


def test_formulaic_ignores_case_and_empty_phrases() -> None:
    assert is_formulaic("It is IMPORTANT to note that", ["important to Note"])
    assert not is_formulaic("anything", ["", "absent"])


def test_set_and_rouge_scores() -> None:
    assert set_f1([1, 2, 2], [2, 3]) == 0.5
    assert (set_f1([], []), set_f1([], [1])) == (1.0, 0.0)
    # Lin (2004), section 3: P "police kill the gunman", R "police killed the gunman": LCS = 3, so F = 3/4.
    assert rouge_l("police kill the gunman", "police killed the gunman") == 0.75
    assert rouge_l("the gunman kill police", "police killed the gunman") == 0.5
    assert rouge_n("the cat sat", "the cat ran") == pytest.approx(2 / 3)
    assert rouge_n("the cat sat", "the cat ran", 2) == 0.5
    assert rouge_n("", "") == rouge_l("", "") == rouge_n("word", "word", 2) == 0.0
    assert common_subsequence(list("ABCBDAB"), list("BDCABA")) == 4


# Compliance


def test_the_template_passes_every_rule() -> None:
    assert strict_compliance(NOTE).problems == ()
    assert strict_compliance(NOTE).passed
    assert compat_compliance(NOTE).passed
    assert compat_compliance(NOTE, "compat_v1").passed


@pytest.mark.parametrize(
    "text",
    [
        NOTE.replace("\n", "\r\n"),
        f"\n\n{NOTE}\n\n",
        NOTE.replace(": ", ":\n\n").replace("\nLimitation", "\n\nLimitation"),
        NOTE.replace("Does dropout", "Under a rate of 0.5, e.g. Srivastava et al. 2014, does dropout"),
        NOTE.replace("Does dropout", 'Asked "why?" by readers, does dropout'),
        NOTE.replace("Does dropout", "Well... does dropout"),
        NOTE.replace("Does dropout", "At 9 a.m. and approx. twice the max. rate, does dropout"),
    ],
    ids=[
        "crlf",
        "blank lines around",
        "text after the header's line",
        "decimals and abbreviations",
        "quoted question",
        "dots",
        "abbreviations before lower case",
    ],
)
def test_strict_accepts(text: str) -> None:
    assert strict_compliance(text).problems == ()


SWAPPED = "\n".join([*NOTE.split("\n")[5:6], *NOTE.split("\n")[:5], *NOTE.split("\n")[6:]])
HOLES = {
    "text after the question": f"{NOTE}\nI hope this helps.",
    "empty summary": NOTE.replace("Dropout regularises wide layers.", ""),
    "empty limitation": NOTE.replace("Only image data was tried.", ""),
    "order": SWAPPED,
    "duplicate": NOTE.replace("Limitation: Only", "Limitation: One.\nLimitation: Only"),
    "preamble": f"Sure, here is the note.\n{NOTE}",
    "prose among the bullets": NOTE.replace("- Small", "In short:\n- Small"),
    "two questions": NOTE.replace("Does dropout", "Is it slow? Does dropout"),
    "a statement first": NOTE.replace("Does dropout", "It is fast. Does dropout"),
    "a statement in lower case first": NOTE.replace("Does dropout", "it rains. does dropout"),
    "glued questions": NOTE.replace("Does dropout", "Why?Does dropout"),
    "star bullets": NOTE.replace("- ", "* "),
    "other case": NOTE.replace("Summary:", "SUMMARY :"),
    "no letters in a section": NOTE.replace("Only image data was tried.", "..."),
}


@pytest.mark.parametrize("text", HOLES.values(), ids=HOLES.keys())
def test_strict_closes_the_holes_of_compat(text: str) -> None:
    assert compat_compliance(text).passed
    assert not strict_compliance(text).passed


BROKEN = {
    "fourth bullet": NOTE.replace("- Small", "- A fourth.\n- Small"),
    "two bullets": NOTE.replace("- Small layers gain little.\n", ""),
    "no bullets": NOTE.replace("- ", ""),
    "bullet on the header's line": NOTE.replace("Key Points:\n- Units", "Key Points: - Units"),
    "blank bullet": NOTE.replace("- Small layers gain little.", "- "),
    "missing header": NOTE.replace("Limitation: ", ""),
    "header inside a line": NOTE.replace("\nLimitation", " Limitation"),
    "no question": NOTE.replace("?", "."),
    "empty question": NOTE.replace("Does dropout help recurrent layers?", ""),
    "answered question": f"{NOTE} Yes.",
    "empty": "",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_both_rules_refuse(text: str) -> None:
    assert not strict_compliance(text).passed
    assert not compat_compliance(text).passed


def test_strict_names_every_problem() -> None:
    text = "Hello\nKey Points:\n- one\nfree text\nSummary:\nFollow-up Question: One. Two"
    assert strict_compliance(text).problems == (
        "Limitation: no header",
        "headers out of order: Key Points, Summary, Follow-up Question",
        "text before the first header",
        "Summary: the section is empty",
        "Key Points: 1 bullets, 3 expected",
        "Key Points: something other than '- ' bullets",
        "Follow-up Question: does not end in '?'",
        "Follow-up Question: more than one sentence",
    )


def test_compat_v1_needs_only_the_follow_up_header() -> None:
    text = NOTE.replace("?", ".")
    assert compat_compliance(text, "compat_v1").passed
    assert not compat_compliance(text).passed


def test_compat_counts_from_the_first_mention_to_the_next_limitation() -> None:
    assert compat_bullets(f"The key points: are\n- early\n{NOTE}") == 4
    assert compat_bullets("Key Points:\n- a\n-no blank\n - indented\n* b\n-\nx") == 2
    assert compat_bullets("Limitation: none\nKey Points:\n- a\n- b") == 2
    assert compat_bullets(NOTE.replace("- Inference", "A Limitation: here\n- Inference")) == 1


def test_follow_up_valid_strictly_and_as_published() -> None:
    assert follow_up_valid(NOTE)
    assert follow_up_valid(f"{NOTE}\nMore.", compat=True)
    assert not follow_up_valid(f"{NOTE}\nMore.")
    assert not follow_up_valid("Is it?")


# Rubric and content


def test_sections_read_tolerant_headers() -> None:
    text = (
        "## Summary\nshort\n**Key Points:**\n- a\n### **Limitation**:\nfew\n**follow-up question**\nwhy?\nSummary: two"
    )
    assert sections(text) == {
        "Summary": "short",
        "Key Points": "- a",
        "Limitation": "few",
        "Follow-up Question": "why?",
    }
    assert sections("Summary without colon")["Summary"] == ""


@pytest.mark.parametrize(
    ("summary", "score"),
    [
        ("word " * 7, 0),
        ("word " * 8, 1),
        ("word " * 14, 1),
        ("word " * 8 + "the " * 7, 2),
        ("word " * 9 + "the " * 6, 3),
    ],
)
def test_rubric_summary(summary: str, score: int) -> None:
    assert rubric(f"Summary: {summary}").summary == score


@pytest.mark.parametrize(("words", "score"), [(0, 0), (4, 0), (5, 1), (9, 1), (10, 2), (14, 2), (15, 3)])
def test_rubric_bullets(words: int, score: int) -> None:
    assert rubric("Key Points:\n" + f"- {'word ' * words}\n" * 3).bullets == score


def test_rubric_bullets_take_the_mean() -> None:
    assert rubric(f"Key Points:\n- {'word ' * 4}\n- {'word ' * 6}").bullets == 1


@pytest.mark.parametrize(
    ("limitation", "score"),
    [
        ("", 0),
        ("None.", 0),
        ("not identified", 0),
        ("No limitations", 0),
        ("N/A", 0),
        ("none given here", 1),
        ("word " * 7, 1),
        ("word " * 8, 2),
        ("word " * 18, 2),
        ("word " * 9 + "the " * 10, 2),
        ("word " * 10 + "the " * 10, 3),
    ],
)
def test_rubric_limitation(limitation: str, score: int) -> None:
    assert rubric(f"Limitation: {limitation}").limitation == score


@pytest.mark.parametrize(
    ("question", "score"), [("", 0), ("tell me", 1), ("word " * 6 + "word?", 2), ("word " * 7 + "word?", 3)]
)
def test_rubric_follow_up(question: str, score: int) -> None:
    assert rubric(f"Follow-up Question: {question}").follow_up == score


def test_rubric_total_and_content_of_a_note() -> None:
    assert rubric(NOTE).total == 0 + 1 + 1 + 2
    made = content(NOTE)
    assert made.section_words == (4, 18, 5, 5)
    assert (made.num_bullets, made.is_question) == (3, True)
    assert made.words_per_point == (7 + 4 + 4) / 3


# Losses


def test_token_weighted_means() -> None:
    assert token_weighted_mean([(2.0 * 10, 10), (1.0 * 30, 30)]) == 1.25
    assert token_weighted_mean([(2.0 * 4, 4), (1.0 * 12, 12)]) == 1.25
    with pytest.raises(ValueError, match="no tokens"):
        token_weighted_mean([])


def test_perplexity_and_dpo_loss() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1.25) == math.exp(1.25)
    assert perplexity(1e6) == math.inf
    assert round(dpo_loss(0), 6) == 0.693147
    assert round(dpo_loss(13.5), 4) == 0.2305
    assert round(dpo_loss(20), 6) == 0.126928
    assert dpo_loss(-1e6) == 1e5
    assert dpo_loss(1e6) == 0.0


# Parsers


def test_parse_bullets() -> None:
    assert parse_bullets("- a\n* b\nc") == ("a", "b")
    assert parse_bullets("  no bullet\nat all ") == ("no bullet\nat all",)
    assert parse_bullets(" \n") == ()


@pytest.mark.parametrize(
    "text",
    [
        "### Q1\n**Question:** What?\n**Answer:** That.\n\n### Q2\n**Question:** Who?\n**Answer:** She,\nand he.",
        "**Question:** What?\n**Answer:** That.\n**Question**: Who?\n**Answer**: She,\nand he.",
        "### Q1: What?\n**Answer:** That.\n### Q2. Who?\n**Answer:** She,\nand he.",
        json.dumps([{"question": "What?", "answer": "That."}, {"question": "Who?", "answer": "She,\nand he."}]),
        'Here:\n```json\n{"qa_pairs": [{"question": "What?", "answer": "That."},'
        ' {"question": "Who?", "answer": "She,\\nand he."}]}\n```',
    ],
    ids=["blocks", "no headings", "question in the heading", "json", "fenced json object"],
)
def test_parse_qa(text: str) -> None:
    assert parse_qa(text) == (QAPair("What?", "That."), QAPair("Who?", "She,\nand he."))


def test_parse_qa_leaves_out_halves() -> None:
    assert parse_qa("### Q1\n**Question:** What?\n### Q2\n**Answer:** lost") == ()
    assert parse_qa('**Question:** Is {"a": 1} JSON?\n**Answer:** Yes.') == (QAPair('Is {"a": 1} JSON?', "Yes."),)


@pytest.mark.parametrize(
    "text",
    [
        "- (LoRA, trains, few weights)\n- (Adam, keeps, two moments)\nand so on",
        "(LoRA, trains, few weights),\n2. ('Adam', 'keeps', 'two moments').",
        '[["LoRA", "trains", "few weights"], ["Adam", "keeps", "two moments"], ["short"]]',
        'Sure: [{"subject": "LoRA", "relation": "trains", "object": "few weights"},'
        ' {"subject": "Adam", "predicate": "keeps", "object": "two moments"}]',
    ],
    ids=["lines", "loose lines", "json arrays", "json objects"],
)
def test_parse_triplets(text: str) -> None:
    assert parse_triplets(text) == (Triplet("LoRA", "trains", "few weights"), Triplet("Adam", "keeps", "two moments"))


def test_parse_triplets_edges() -> None:
    assert parse_triplets("- (a, b, c, d)") == (Triplet("a", "b", "c, d"),)
    assert parse_triplets("- (a, b)\n- (a, , c)\n(a, b, c") == ()
    assert parse_triplets('["a", "b", "c"]') == (Triplet("a", "b", "c"),)


@pytest.mark.parametrize(
    ("text", "index", "why"),
    [
        ("**Passage:** 2\n**Why:** x", 1, "x"),
        ("**Passage:** 2 as it says. **Why:** x\ny", 1, "x\ny"),
        ("Passage: [3]\nWhy: x", 2, "x"),
        ('{"passage": 2, "why": "x"}', 1, "x"),
        ('```json\n{"passage": "2", "why": "x"}\n```', 1, "x"),
        ("**Passage:** None\n**Why:** x", None, "x"),
        ("**Passage:** null", None, ""),
        ("**Passage:** 4 **Why:** x", None, "x"),
        ("**Passage:** 0", None, ""),
        ("**Passage:** -1", None, ""),
        ("**Passage:** 1.5", None, ""),
        ('{"passage": null, "why": "x"}', None, "x"),
        ('{"passage": true}', None, ""),
        ('{"passage": 9}', None, ""),
        ("no idea", None, ""),
    ],
)
def test_parse_retrieval(text: str, index: int | None, why: str) -> None:
    assert parse_retrieval(text, 3) == RetrievalResult(index, why)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"passage": ' + "9" * 5000 + "}", "**Passage:** " + "9" * 5000])
def test_parsers_survive_hostile_json(text: str) -> None:
    assert parse_retrieval(text, 3).index is None
    assert (parse_qa(text), parse_triplets(text)) == ((), ())


# Suites

ROWS = tuple(EvalRow(f"n{i}", f"dropout layers number word{i}", NOTE) for i in range(8))
TRAIN = tuple(EvalRow(f"t{i}", f"train text{i}", f"reference text{i}") for i in range(4))


def test_score_notes_gathers_every_metric() -> None:
    first, second = score_notes(ROWS[:2], [NOTE, f"{NOTE}\nIt is important to note."])
    assert (first.id, first.compliance, first.content_alignment, first.rubric) == ("n0", True, 1.0, 4)
    assert sum(first.rubric_parts) == first.rubric
    assert (second.compliance, second.compat, second.formulaic) == (False, True, True)
    assert second.problems == (
        "Follow-up Question: text after the first line",
        "Follow-up Question: does not end in '?'",
    )
    with pytest.raises(ValueError, match="2 rows but 1 outputs"):
        score_notes(ROWS[:2], [NOTE])


def test_compare_notes_puts_controls_beside_the_model() -> None:
    outputs = {"base": [""] * 8, "sft": [NOTE] * 8, **control_outputs(TRAIN, ROWS)}
    report = compare_notes(ROWS, outputs, draws=200)
    said = {(d.system, d.control, d.metric): d.sentence for d in report.differences}
    assert report.num_rows == 8
    assert {(system, control) for system, control, _ in said} == {
        ("sft", control) for control in ("base", "copy control", "random control")
    }
    assert said["sft", "base", "compliance"] == (
        "strict compliance: sft is higher than base by 1 (95 % interval +1 to +1, n=8)."
    )
    assert "no difference shown between sft and base" in said["sft", "base", "formulaic"]
    assert report.summary["sft"]["compliance"].mean == 1.0
    assert set(report.summary["base"]) == set(METRICS)


def test_compare_notes_takes_further_pairs_and_refuses_unknown_names() -> None:
    report = compare_notes(ROWS, {"sft": [NOTE] * 8, "dpo": [NOTE] * 8}, also=[("dpo", "sft")], draws=50)
    assert {(d.system, d.control) for d in report.differences} == {("dpo", "sft")}
    assert all("no difference shown" in d.sentence for d in report.differences)
    with pytest.raises(ValueError, match="absent"):
        compare_notes(ROWS, {"sft": [NOTE] * 8}, also=[("sft", "absent")])
    with pytest.raises(ValueError, match="no rows"):
        compare_notes([], {"sft": []})


def test_too_few_groups_are_said_once() -> None:
    rows = [replace(row, group="one") for row in ROWS]
    report = compare_notes(rows, {"base": [""] * 8, "sft": [NOTE] * 8}, draws=50)
    (sentence,) = sum_up(report.differences)
    assert "fewer than 6 groups (here 1) cannot show one" in sentence and "strict compliance, " in sentence
    assert "n=8 in 1 group;" in report.differences[0].sentence
    assert sentence in notes_markdown(report) and "| strict compliance | 0.000 | 1.000 |" in notes_markdown(report)
    enough = compare_notes(ROWS, {"base": [""] * 8, "sft": [NOTE] * 8}, draws=50).differences
    assert sum_up(enough) == [difference.sentence for difference in enough]


def test_notes_report_is_the_same_each_time_in_json_csv_and_markdown() -> None:
    outputs = {"a|b": [NOTE, ""] * 4, **control_outputs(TRAIN, ROWS, seed=3)}
    first, second = (compare_notes(ROWS, outputs, draws=100, seed=5) for _ in range(2))
    for write in (notes_rows_csv, notes_summary_csv, notes_markdown):
        assert write(first) == write(second)
    assert json.dumps(notes_dict(first), allow_nan=False) == json.dumps(notes_dict(second), allow_nan=False)
    rows = list(csv.DictReader(io.StringIO(notes_rows_csv(first))))
    assert len(rows) == 3 * 8
    assert (rows[0]["system"], rows[0]["id"], rows[0]["compliance"], rows[1]["compliance"]) == ("a|b", "n0", "1", "0")
    assert len(notes_summary_csv(first).splitlines()) == 1 + 3 * len(METRICS)
    table = notes_markdown(first).splitlines()
    assert table[0] == "| metric (n=8) | a\\|b | copy control | random control |"
    assert table[2].startswith("| strict compliance | 0.500 [")


def test_losses_are_compared_row_by_row() -> None:
    base = [(3.0 * n, n, 0) for n in (5, 9, 2, 30, 11, 4, 7, 8)]
    better = [(nats - 0.5 * n, n, 0) for nats, n, _ in base]
    found = loss_difference("sft", better, "base", base)
    assert found.interval.mean == pytest.approx(-0.5) and "loss: sft is lower than base by 0.5" in found.sentence
    mixed = [(nats + (-1) ** i, n, 0) for i, (nats, n, _) in enumerate(base)]
    assert "no difference shown" in loss_difference("sft", mixed, "base", base).sentence
    with pytest.raises(ValueError, match="different rows"):
        loss_difference("sft", better[1:], "base", base)


def test_loss_suite() -> None:
    summary = summarise_loss([(20.0, 10, 4), (30.0, 30, 16)])
    assert (summary.loss, summary.perplexity, summary.accuracy) == (1.25, math.exp(1.25), 0.5)
    assert (summary.num_rows, summary.num_tokens) == (2, 40)
    assert loss_dict(summary)["suite"] == "loss"
    assert (summary.low, summary.high) == (1.0, 2.0), "of two rows, one may be drawn twice"
    assert loss_csv({"base": summary}, "x.jsonl", "ab").splitlines() == [
        "system,num_rows,num_tokens,loss,perplexity,accuracy,low,high,data,sha256",
        f"base,2,40,1.25,{math.exp(1.25)},0.5,1.0,2.0,x.jsonl,ab",
    ]
    line = "| base | 1.2500 [1.0000, 2.0000] | 3.49034 | 0.5 | 40 | 2 |"
    assert loss_markdown({"base": summary}).splitlines()[2] == line
    assert loss_dict(summarise_loss([(1e6, 1, 0)]))["perplexity"] is None
    with pytest.raises(ValueError, match="no tokens"):
        summarise_loss([(0.0, 0, 0)])
