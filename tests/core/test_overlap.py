"""Near duplicates and leaks: planted ones are found, others are not, and cost is bounded."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolmlx.data import near, phrases
from smolmlx.data.audit import PairAudit, audit
from smolmlx.data.dedupe import dedupe
from smolmlx.data.formats import Source, open_source
from smolmlx.errors import DataError, RecipeError

pytest.importorskip("rensa", reason="rensa is not installed")

WORDS = [
    f"{first}{last}"
    for first in "bcdfghjklm"
    for last in ("amber", "ondel", "istra", "ulep", "evno", "orta", "ikal", "asti")
]
NOTES = Path(__file__).parents[2] / "data" / "notes"


def text(seed: int, words: int = 40) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


def change(original: str, words: int) -> str:
    """Replace words at the end: each costs three triples at most."""
    parts = original.split()
    return " ".join([*parts[: len(parts) - words], *(f"new{i}" for i in range(words))])


def jaccard(first: str, second: str) -> float:
    a, b = set(near.shingles(first)), set(near.shingles(second))
    return len(a & b) / len(a | b)


def write(path: Path, rows: list[dict[str, Any]]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return open_source(str(path))


def row(asked: str, answered: str, **more: Any) -> dict[str, Any]:
    return {"prompt": asked, "completion": answered, **more}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_sketches_estimate_the_jaccard_index() -> None:
    for changed in range(0, 30, 3):
        pair = [text(changed), change(text(changed), changed)]
        made = near.sketch(pair)
        assert (made[0] == made[1]).mean() == pytest.approx(jaccard(*pair), abs=0.13)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_meet_a_pair_at_the_threshold(threshold: float) -> None:
    bands, width = near.band_shape(threshold)
    assert bands * width <= near.NUM_HASHES and 1 - (1 - threshold**width) ** bands >= 0.99


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 12)), min_size=1, max_size=40))
def test_what_is_dropped_is_like_an_earlier_kept_row(made: list[tuple[int, int]]) -> None:
    sketches = near.sketch([change(text(seed), changed) for seed, changed in made])
    keeper, similarity = near.find_keepers(sketches, 0.8)
    for i, kept in enumerate(keeper):
        assert kept <= i and keeper[kept] == kept
        assert similarity[i] >= 0.8 and similarity[i] == (sketches[i] == sketches[kept]).mean()


def test_rows_that_all_look_alike_cost_a_bounded_number_of_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    met = []
    real = near._compare
    monkeypatch.setattr(near, "_compare", lambda *given: (met.append(len(given[3])), real(*given)))
    stem = text(0, 60)
    for count in (400, 800):
        met.clear()
        near.find_matches(near.sketch([f"{stem} {text(i, 14)}" for i in range(count)]), threshold=0.8)
        bands, _ = near.band_shape(0.8)
        assert 0 < sum(met) <= count * bands * 16


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=20))
def test_any_text_can_be_sketched(texts: list[str]) -> None:
    made = near.sketch(texts)
    assert made.shape == (len(texts), near.NUM_HASHES) and made.dtype == np.uint32


def test_dedupe_keeps_the_first_of_each_and_the_order(tmp_path: Path) -> None:
    rows = [row(f"q {i}", text(i), n=i) for i in range(6)]
    rows.insert(3, row("Q  0", text(0).upper(), n=30))
    rows.append(row("q 1", change(text(1), 1), n=31))
    found = dedupe(write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    assert (found.rows, found.kept, found.exact, found.near) == (8, 6, 1, 1)
    assert read(tmp_path / "out.jsonl") == [r for r in rows if r["n"] < 30]
    (twin,) = found.twins
    assert twin.where.endswith("in.jsonl:8") and twin.of.endswith("in.jsonl:2") and 0.8 <= twin.similarity < 1
    exact = dedupe(write(tmp_path / "in.jsonl", rows), tmp_path / "exact.jsonl", threshold=1.0)
    assert (exact.kept, exact.near) == (7, 0)


def test_dedupe_by_one_part(tmp_path: Path) -> None:
    rows = [row(text(i), "yes") for i in range(3)] + [row(change(text(0), 1), "no")]
    source = write(tmp_path / "in.jsonl", rows)
    assert dedupe(source, tmp_path / "a.jsonl", part="answer").kept == 2
    assert dedupe(source, tmp_path / "b.jsonl", part="input").kept == 3


def test_dedupe_against_held_out_rows(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [row(text(i), f"a {i}") for i in range(5)])
    test = write(tmp_path / "test.jsonl", [row(text(0), "other"), row(change(text(1), 1), "words")])
    found = dedupe(train, tmp_path / "out.jsonl", part="input", against=[test])
    assert (found.held_out_exact, found.held_out_near, found.kept) == (1, 1, 3)
    assert [r["completion"] for r in read(tmp_path / "out.jsonl")] == ["a 2", "a 3", "a 4"]
    with pytest.raises(DataError, match="no row is left"):
        dedupe(train, tmp_path / "none.jsonl", against=[train])


def test_planted_leaks_are_found_and_named(tmp_path: Path) -> None:
    train = [row(text(i), f"{text(100 + i)}\nWhy {i}?", concept=f"c{i}") for i in range(20)]
    test = [
        row(text(50), text(150), concept="d0"),
        row(text(3).upper(), text(151), concept="d1"),
        row(change(text(4), 2), text(152), concept="d2"),
        row(text(51), f"{text(105)}\nWhy 5?", concept="d3"),
        row(text(52), change(f"{text(106)} b", 1), concept="d4"),
        row(text(53), f"{text(153)}\nwhy  7?", concept="d5"),
        row(text(54), text(154), concept="c8"),
        row(text(55), "", concept="d6"),
    ]
    splits = {"train": write(tmp_path / "train.jsonl", train), "test": write(tmp_path / "test.jsonl", test)}
    (pair,) = audit(splits, group="concept")
    found = {finding.kind: finding for finding in pair.findings}
    assert {kind: finding.count for kind, finding in found.items()} == {
        "same input": 1, "nearly the same input": 1, "input found verbatim": 1, "same answer": 1, "nearly the same answer": 1, "answer found verbatim": 1, "closing question found": 2, "same group": 1,
    }  # fmt: skip
    assert (pair.leaked, pair.rows) == (6, 8)
    (twin,) = found["nearly the same input"].first
    assert twin.where.endswith("test.jsonl:3") and twin.of.endswith("train.jsonl:5")


def test_an_answer_and_a_question_are_found_wherever_training_says_them(tmp_path: Path) -> None:
    asked = "Which of these would hold for longer inputs?"
    train = [
        row(f"Compare: ({text(100)}), please.", text(0)),
        row(text(1), f"{text(2)}\n{asked}\nOne more line."),
        row(f"{text(3)}\nWhy not?", f"Follow-up: {asked} And {text(4)}"),
        *(row(text(i), text(i + 1000)) for i in range(2000, 2600)),
    ]
    test = [
        row(text(1000), text(100).upper()),  # inside an input
        row(text(1001), f"{text(101)}\n{asked}"),
        row(text(1002), f"{text(102)}\nWhy  not?"),  # too short to be looked for but as a line
        row(text(1003), f"{text(103)}\nWhy?"),
        row(text(1004), " ".join(text(3000).split()[3:30])),  # a part of an answer
        row(text(1005), f"{text(3001)} more"),  # more than an answer
        row(text(1006), " ".join(text(3002).split()[:4])),  # four words prove nothing
    ]
    splits = {"train": write(tmp_path / "train.jsonl", train), "test": write(tmp_path / "test.jsonl", test)}
    found = {f.kind: f for f in audit(splits, threshold=1.0)[0].findings}
    answers, questions = found["answer found verbatim"], found["closing question found"]
    assert [(t.where[-1], t.of.rpartition(":")[2]) for t in answers.first] == [("1", "1"), ("5", "4")]
    assert [(t.where[-1], t.of.rpartition(":")[2]) for t in questions.first] == [("2", "2"), ("3", "3")]
    assert (answers.count, questions.count, answers.of) == (2, 2, 7)


def count(kind: str, pair: PairAudit) -> int:
    return next(finding.count for finding in pair.findings if finding.kind == kind)


def test_an_input_is_found_whatever_the_words_around_it(tmp_path: Path) -> None:
    passage, made = text(1), {"a": text(2, 25), "b": text(3, 25)}
    splits = {
        name: write(tmp_path / f"{name}.jsonl", [row(f"{asked}\n \n{passage}\n", text(ord(name)))])
        for name, asked in made.items()
    }
    splits["c"] = write(tmp_path / "c.jsonl", [{"instruction": "Sum up.", "input": passage.upper(), "output": text(6)}])
    pages = write(tmp_path / "d.jsonl", [{"text": f"{text(7)} {passage}. {text(8)}"}])
    for pair in audit(splits) + audit({"d": pages, **splits})[:3] + audit(dict(reversed(splits.items()))):
        assert (count("input found verbatim", pair), pair.leaked) == (1, 1), (pair.earlier, pair.later)


def test_what_is_no_input_is_not_looked_for(tmp_path: Path) -> None:
    closing = text(9, 14)
    train = [row(f"{text(1)}\n\n{closing}", text(50)), row(text(2), f"{text(51)} {text(3)}"), row(text(4), text(52))]
    test = [
        *(row(f"{text(100 + i)}\n\n{closing}", text(150 + i)) for i in range(11)),  # an instruction that they share
        row(f"{text(10)}\n\n{text(3)}", text(60)),  # known from an answer only
        row(f"{text(11)}\n\n{' '.join(text(4).split()[:11])}", text(61)),  # too short
    ]
    made = {"train": write(tmp_path / "train.jsonl", train), "test": write(tmp_path / "test.jsonl", test)}
    assert audit(made, threshold=1.0)[0].leaked == 0
    made["test"] = write(tmp_path / "test.jsonl", test[1:])  # ten rows may share a passage
    assert audit(made, threshold=1.0)[0].leaked == 10


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("ab"), max_size=24), max_size=8),
    st.lists(st.lists(st.sampled_from("ab"), max_size=16), max_size=8),
)
def test_phrases_are_found_where_a_substring_search_finds_them(texts: list[list[str]], wanted: list[list[str]]) -> None:
    keys = phrases.phrase_keys([phrases.hash_words(" ".join(words)) for words in wanted])
    index = phrases.Phrases()
    index.add(keys)
    found = set(index.search([phrases.hash_words(" ".join(words)) for words in texts]))
    expected = {
        (key, at)
        for key, words in zip(keys, wanted, strict=True)
        for at, text in enumerate(texts)
        if len(words) >= phrases.MIN_WORDS and "".join(words) in "".join(text)
    }
    assert found == expected and [key is None for key in keys] == [len(words) < phrases.MIN_WORDS for words in wanted]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_words_of_ascii_are_those_of_any_text(text: str) -> None:
    more = phrases.hash_words(f"{text} é")
    assert list(phrases.hash_words(text)) == list(more[:-1])


def test_groups_are_counted_once_each(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [row("q", "a", concept="shared"), row("r", "b", concept="own")])
    test = write(
        tmp_path / "test.jsonl", [row(text(i), text(9 + i), concept="shared" if i < 3 else "new") for i in range(4)]
    )
    (pair,) = audit({"train": train, "test": test}, group="concept")
    (group,) = (f for f in pair.findings if f.kind == "same group")
    assert (group.count, group.of, group.share, pair.leaked) == (1, 2, 0.5, 3)


def test_a_clean_split_is_clean(tmp_path: Path) -> None:
    splits = {name: write(tmp_path / f"{name}.jsonl", [row(text(i), text(1000 + i)) for i in range(*span)]) for name, span in (("a", (0, 200)), ("b", (200, 300)), ("c", (300, 330)))}  # fmt: skip
    pairs = audit(splits)
    assert [(p.earlier, p.later, p.leaked) for p in pairs] == [("a", "b", 0), ("a", "c", 0), ("b", "c", 0)]


def test_the_shipped_notes_share_no_concept_and_no_passage() -> None:
    splits = {name: open_source(str(NOTES / f"{name}.jsonl")) for name in ("train", "test", "ood")}
    for pair in audit(splits, group="concept"):
        counts = {finding.kind: finding.count for finding in pair.findings}
        kinds = ("same group", "same input", "nearly the same input", "input found verbatim")
        assert [counts[kind] for kind in kinds] == [0] * 4


def test_wrong_wishes_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [row("q", "a", concept="x")])
    with pytest.raises(RecipeError, match="at least two splits"):
        audit({"a": source})
    with pytest.raises(RecipeError, match="Did you mean 'concept'"):
        audit({"a": source, "b": source}, group="concpt")
    with pytest.raises(RecipeError, match="expected a similarity"):
        dedupe(source, tmp_path / "out.jsonl", threshold=0.2)
