"""The committed notes data set keeps its promises, rebuilds byte for byte, and the validator finds every fault."""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from smolmlx.data.notes import (
    DIFFICULTIES,
    FIELDS,
    MORE_TOPICS,
    OTHER_TOPIC,
    TOPICS,
    Problem,
    input_sha256,
    validate_notes,
)
from smolmlx.errors import DataError, VerificationError
from smolmlx.evals.notes import strict_compliance
from smolmlx.synth.notes import (
    INPUT_WORDS,
    OUTPUT_WORDS,
    SEED,
    SPLIT_CONCEPTS,
    SPLIT_ROWS,
    Dice,
    build_files,
    check_files,
    main,
    note_words,
    read_concepts,
    support,
)

NOTES = Path(__file__).parents[2] / "data" / "notes"
FILES = [NOTES / f"{split}.jsonl" for split in (*SPLIT_ROWS, "ood")]

Row = dict[str, str]


def rules(text: str) -> Sequence[str]:
    return strict_compliance(text).problems


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [row for split in SPLIT_ROWS for row in read(NOTES / f"{split}.jsonl")]


@pytest.fixture(scope="module")
def rebuilt() -> dict[str, str]:
    return build_files(NOTES, SEED)


def test_all_files_pass_the_validator_under_the_strict_rule() -> None:
    assert [str(problem) for problem in validate_notes(FILES, rules)] == []


def test_counts_are_those_of_the_card(rows: list[Row]) -> None:
    assert Counter(row["split"] for row in rows) == SPLIT_ROWS
    assert Counter(row["source"] for row in rows) == {"gold": 72, "rule": 528}
    assert {row["topic"] for row in rows} == {*TOPICS, *MORE_TOPICS}
    assert {row["difficulty"] for row in rows} == set(DIFFICULTIES)
    assert len({row["pattern"] for row in rows if row["source"] == "rule"}) >= 12
    assert [row["id"] for row in rows] == [f"notes-{number:04d}" for number in range(1, 601)]


def test_no_concept_is_in_two_splits(rows: list[Row]) -> None:
    splits = defaultdict(set)
    for row in rows:
        splits[row["concept"]].add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert Counter(next(iter(found)) for found in splits.values()) == SPLIT_CONCEPTS | {"train": 400}


def test_every_split_holds_all_topics_and_difficulties(rows: list[Row]) -> None:
    for split in SPLIT_ROWS:
        more = MORE_TOPICS if split == "train" else ()
        assert {row["topic"] for row in rows if row["split"] == split} == {*TOPICS, *more}
        levels = {row["concept"]: row["difficulty"] for row in rows if row["split"] == split}
        counts = Counter(levels.values())
        assert max(counts.values()) - min(counts.values()) <= 1


def test_rows_are_laid_out_alike_and_inputs_and_answers_never_repeat(rows: list[Row]) -> None:
    everything = rows + read(NOTES / "ood.jsonl")
    assert {tuple(row) for row in everything} == {FIELDS}
    assert len({row["input_sha256"] for row in everything}) == len(everything)
    assert len({row["output"] for row in everything}) == len(everything)


def test_lengths_and_support_hold_for_every_row(rows: list[Row]) -> None:
    for row in rows + read(NOTES / "ood.jsonl"):
        assert INPUT_WORDS[0] <= len(row["input"].split()) <= INPUT_WORDS[1], row["id"]
        assert OUTPUT_WORDS[0] <= len(note_words(row["output"])) <= OUTPUT_WORDS[1], row["id"]
        assert support(row["input"], row["output"]) >= 0.55, row["id"]


def test_answers_of_one_split_never_stand_in_another(rows: list[Row]) -> None:
    questions = defaultdict(set)
    for row in rows:
        questions[row["output"].rsplit("\n", 1)[1]].add(row["split"])
    assert [question for question, splits in questions.items() if len(splits) > 1] == []


def test_no_placeholder_is_left_in_a_row(rows: list[Row]) -> None:
    assert [row["id"] for row in rows if "{" in row["input"] + row["output"]] == []


def test_out_of_distribution_rows_are_enough_and_from_elsewhere() -> None:
    ood = read(NOTES / "ood.jsonl")
    assert len(ood) >= 40
    assert {row["topic"] for row in ood} == {OTHER_TOPIC}
    assert {row["split"] for row in ood} == {"ood"}


def test_rebuild_is_byte_identical(rebuilt: dict[str, str]) -> None:
    for name, content in rebuilt.items():
        assert (NOTES / name).read_bytes() == content.encode("utf-8"), f"{name}: run python -m smolmlx.synth.notes"


def test_check_names_each_file_that_differs(
    rebuilt: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("smolmlx.synth.notes.build_files", lambda folder, seed: rebuilt)
    assert main(["--out", str(tmp_path)]) == 0
    assert main(["--out", str(tmp_path), "--check"]) == 0
    (tmp_path / "test.jsonl").write_text("changed", encoding="utf-8")
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(VerificationError) as caught:
        check_files(tmp_path)
    assert caught.value.problems == ("train.jsonl: is missing", "test.jsonl: differs from a rebuild")
    assert main(["--out", str(tmp_path), "--check"]) == 5
    assert "test.jsonl: differs" in capsys.readouterr().err


def test_dice_keep_their_stream() -> None:
    # The data set hangs on these numbers; another numpy must give the same ones.
    dice = Dice(17)
    assert [dice.pick(range(1000)) for _ in range(4)] == [845, 160, 557, 368]


def test_a_faulty_concept_bank_lists_every_fault(tmp_path: Path) -> None:
    source = (NOTES / "concepts" / "systems.yaml").read_text(encoding="utf-8")
    (tmp_path / "systems.yaml").write_text(
        source.replace("difficulty: advanced", "difficulty: hard", 1).replace('?"', '."', 1), encoding="utf-8"
    )
    shutil.copy(NOTES / "concepts" / "systems.yaml", tmp_path / "cooking.yaml")
    with pytest.raises(DataError) as caught:
        read_concepts(tmp_path, TOPICS)
    text = str(caught.value)
    assert "unknown difficulty 'hard'" in text
    assert "does not end with '?'" in text
    assert "unknown topic 'cooking'" in text
    assert "used 2 times" in text


def changed(**fields: str) -> Callable[[list[Row]], None]:
    return lambda rows: rows[1].update(fields)


def without(name: str) -> Callable[[list[Row]], None]:
    def remove(rows: list[Row]) -> None:
        del rows[1][name]

    return remove


INJECTIONS: list[tuple[Callable[[list[Row]], None], str]] = [
    *((without(name), f"missing field '{name}'") for name in FIELDS),
    (changed(extra="x"), "unknown field 'extra'"),
    (changed(concept=" "), "field 'concept' is empty"),
    (changed(topic="cooking"), "unknown topic 'cooking'"),
    (changed(topic=OTHER_TOPIC), "unknown topic 'other'"),
    (changed(difficulty="hard"), "unknown difficulty 'hard'"),
    (changed(split="dev"), "unknown split 'dev'"),
    (changed(source="web"), "unknown source 'web'"),
    (changed(instruction="Summarise."), "instruction is not the one of the notes task"),
    (changed(input_sha256="0" * 64), "input_sha256 mismatch"),
    (changed(output="Summary:\nToo little."), "answer not compliant: "),
    (lambda rows: rows[1].update(id=rows[0]["id"]), "duplicate id"),
    (lambda rows: rows[1].update(input=rows[0]["input"].upper()), "duplicate input"),
    (lambda rows: rows[1].update(concept=rows[0]["concept"], split="test"), "in two splits"),
]


@pytest.mark.parametrize(("inject", "message"), INJECTIONS, ids=[message for _, message in INJECTIONS])
def test_each_injected_fault_is_found_at_its_line(
    tmp_path: Path, rows: list[Row], inject: Callable[[list[Row]], None], message: str
) -> None:
    some = [dict(row) for row in rows[:3]]
    inject(some)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    found = [problem for problem in validate_notes(path, rules) if message in problem.message]
    assert {(problem.path, problem.line) for problem in found} == {(path, 2)}


def test_all_faults_of_all_files_are_listed(tmp_path: Path, rows: list[Row]) -> None:
    broken, repeated, missing = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.jsonl"
    broken.write_text(f'{json.dumps(rows[0])}\n\n{{"id": 3\n[]\n{{"id": 3}}\n', encoding="utf-8")
    repeated.write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    problems = [str(problem) for problem in validate_notes([broken, repeated, missing], rules)]
    assert any(text.startswith(f"{broken}:3: not JSON") for text in problems)
    assert f"{broken}:4: expected one JSON object, found list" in problems
    assert f"{broken}:5: field 'id' must be text, found int" in problems
    assert f"{repeated}:1: duplicate id '{rows[0]['id']}', first used at {broken}:1" in problems
    assert f"{missing}: no such file or folder. Check the path." in problems


def test_an_empty_file_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n", encoding="utf-8")
    assert validate_notes([path], rules) == [Problem(path, 0, "holds no rows")]


def test_input_hash_ignores_case_and_whitespace() -> None:
    assert input_sha256("  Two\n words ") == input_sha256("two words")
    assert input_sha256("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
