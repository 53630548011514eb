"""Every format is detected and read from every kind of file; everything that is wrong with a file is said with its line."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from smolmlx.data.formats import FORMATS, Example, open_source
from smolmlx.errors import DataError

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}
ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "alpaca": {"instruction": "Q", "input": "", "output": "A"},
    "prompt-completion": {"prompt": "Q", "completion": "A"},
    "prompt-response": {"prompt": "Q", "response": "A"},
    "instruction-response": {"instruction": "Q", "response": "A"},
    "question-answer": {"question": "Q", "answer": "A"},
    "input-output": {"input": "Q", "output": "A"},
    "text": {"text": "Q A"},
    "preference": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    "preference-implicit": {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "B"}]},
}


def write_jsonl(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def read(path: str | list[str], **options: Any) -> list[Example]:
    return list(open_source(path, **options))


def refusal(path: str | list[str], **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    assert caught.value.exit_code == 4
    return caught.value


def test_every_format_has_a_row_here() -> None:
    assert set(ROWS) == {form.name for form in FORMATS}


@pytest.mark.parametrize("name", ROWS)
def test_format_is_detected_and_read(tmp_path: Path, name: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[name]] * 2)
    source = open_source(path)
    assert source.form.name == name
    first, second = source
    assert (first.where, second.where) == (f"{path}:1", f"{path}:2")
    if name == "text":
        assert first.text == "Q A"
    elif name.startswith("preference"):
        assert (first.messages, first.chosen, first.rejected) == ((USER,), (ANSWER,), ({**ANSWER, "content": "B"},))
    else:
        assert first.messages == (USER, ANSWER)


@pytest.mark.parametrize("name", ROWS)
def test_format_can_be_named(tmp_path: Path, name: str) -> None:
    row = {**ROWS["text"], **ROWS[name]}
    (example,) = read(write_jsonl(tmp_path / "rows.jsonl", [row]), form=name)
    assert example.where.endswith(":1")


class TestFiles:
    def rows(self) -> list[dict[str, str]]:
        return [{"prompt": 'Übung, "1"\nzwei', "completion": "null"}, {"prompt": "b", "completion": "日本"}]

    def check(self, path: str) -> None:
        found = [(e.messages[0]["content"], e.messages[1]["content"]) for e in read(path)]
        assert found == [(row["prompt"], row["completion"]) for row in self.rows()]

    @pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
    @pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv"])
    def test_text_files(self, tmp_path: Path, suffix: str, mark: str) -> None:
        path = tmp_path / f"rows{suffix}"
        if suffix == ".csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                file.write(mark)
                writer = csv.DictWriter(file, ["prompt", "completion"])
                writer.writeheader()
                writer.writerows(self.rows())
        else:
            rows = self.rows()
            text = json.dumps(rows) if ".json." in f"{suffix}." else "".join(json.dumps(row) + "\n" for row in rows)
            data = (mark + text).encode()
            path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
        self.check(str(path))

    def test_parquet(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "rows.parquet", self.rows())
        self.check(str(tmp_path / "rows.parquet"))

    def test_parquet_of_messages(self, tmp_path: Path) -> None:
        """Parquet fills absent keys of a struct with null; those are not part of a message."""
        rows = [{"messages": [USER, ANSWER]}, {"messages": [{**USER, "name": "x"}, ANSWER]}]
        write_parquet(tmp_path / "rows.parquet", rows)
        assert [e.messages for e in read(str(tmp_path / "rows.parquet"))] == [
            (USER, ANSWER),
            ({**USER, "name": "x"}, ANSWER),
        ]

    def test_array_inside_an_object(self, tmp_path: Path) -> None:
        (tmp_path / "rows.json").write_text(json.dumps({"version": 1, "data": self.rows()}))
        self.check(str(tmp_path / "rows.json"))

    def test_blank_lines_are_skipped_and_counted(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(["", json.dumps(self.rows()[0]), "  ", json.dumps(self.rows()[1])]))
        assert [e.where for e in read(str(path))] == [f"{path}:2", f"{path}:4"]
        self.check(str(path))

    def test_messages_as_json_in_a_csv_cell(self, tmp_path: Path) -> None:
        with (tmp_path / "rows.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["messages"], [json.dumps([USER, ANSWER])]])
        assert read(str(tmp_path / "rows.csv"))[0].messages == (USER, ANSWER)

    def test_markdown_is_one_document(self, tmp_path: Path) -> None:
        (tmp_path / "a.md").write_text("# A\n\nb\n")
        assert [e.text for e in read(str(tmp_path / "a.md"))] == ["# A\n\nb\n"]

    def test_several_files_in_order(self, tmp_path: Path) -> None:
        paths = [write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}]) for name in "ba"]
        assert [e.text for e in read(paths)] == ["b", "a"]

    def test_dataset_folder_by_split(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        write_jsonl(tmp_path / "data" / "train-00000-of-00001.jsonl", [{"text": "t"}])
        write_jsonl(tmp_path / "data" / "validation-00000-of-00001.jsonl", [{"text": "v"}])
        (tmp_path / "dataset_infos.json").write_text("{}")
        assert [e.text for e in read(str(tmp_path))] == ["t"]
        assert [e.text for e in read(str(tmp_path), split="validation")] == ["v"]
        assert "split 'test'" in str(refusal(str(tmp_path), split="test"))

    def test_words_of_a_split_are_whole_words(self, tmp_path: Path) -> None:
        """latest.jsonl and device.jsonl were taken for test and dev, and left out without a word."""
        for name in ("latest", "device", "x_test", "test-2", "dev", "sub/eval/a"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
        source = open_source(str(tmp_path))
        assert [path.stem for path in source.files] == ["device", "latest"]
        assert [path.stem for path in source.skipped] == ["dev", "a", "test-2", "x_test"]
        assert [e.text for e in read(str(tmp_path), split="validation")] == ["dev"]
        assert [e.text for e in read(str(tmp_path), split="test")] == ["sub/eval/a", "test-2", "x_test"]

    def test_relative_paths_are_tried_beside_the_recipe(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "rows.jsonl", [{"text": "x"}])
        assert len(read("rows.jsonl", folders=(tmp_path,))) == 1


class TestShapes:
    def test_columns_are_mapped(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "r.jsonl", [{"frage": "Q", "antwort": "A"}])
        assert "antwort, frage" in str(refusal(path))
        assert read(path, columns={"prompt": "frage", "completion": "antwort"})[0].messages == (USER, ANSWER)

    def test_alpaca_input_is_joined(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "r.jsonl", [{"instruction": "I", "input": "x", "output": "A"}])
        assert read(path)[0].messages[0]["content"] == "I\n\nx"

    def test_system_is_added_once(self, tmp_path: Path) -> None:
        rows = [{"messages": [USER, ANSWER]}, {"messages": [{"role": "system", "content": "own"}, USER, ANSWER]}]
        first, second = read(write_jsonl(tmp_path / "r.jsonl", rows), system="S")
        assert first.messages == (SYSTEM, USER, ANSWER)
        assert second.messages[0]["content"] == "own" and len(second.messages) == 3

    def test_system_column_wins(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "r.jsonl", [{**ROWS["alpaca"], "system": "row"}])
        assert read(path, system="S")[0].messages[0]["content"] == "row"

    def test_conversational_prompt_completion(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "r.jsonl", [{"prompt": [SYSTEM, USER], "completion": [ANSWER]}])
        assert read(path)[0].messages == (SYSTEM, USER, ANSWER)

    def test_numbers_are_text(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "6*7", "completion": 42}])
        assert read(path)[0].messages[1]["content"] == "42"

    def test_sharegpt_names(self, tmp_path: Path) -> None:
        turns = [{"from": "system", "value": "S"}, {"from": "user", "value": "Q"}, {"from": "Assistant", "value": "A"}]
        assert read(write_jsonl(tmp_path / "r.jsonl", [{"conversations": turns}]))[0].messages == (SYSTEM, USER, ANSWER)


class TestRefusals:
    def test_missing_file(self, tmp_path: Path) -> None:
        assert "no such file" in str(refusal("./none.jsonl")) and "recipe" not in str(refusal("./none.jsonl"))
        assert "then from the recipe's" in str(refusal("./none.jsonl", folders=(tmp_path,)))

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("question;answer\na;b\n", "looks separated by ';'; this reads commas"),
            ("Question,Answer\na,b\n", "Question: did you mean question?"),
            ("Question,Answer\na,b\n", "--column question=Question --column answer=Answer"),
        ],
    )
    def test_a_table_that_is_nearly_known(self, tmp_path: Path, text: str, said: str) -> None:
        (tmp_path / "r.csv").write_text(text)
        assert said in str(refusal(str(tmp_path / "r.csv")))

    def test_names_of_sharegpt_as_roles(self, tmp_path: Path) -> None:
        rows = [{"messages": [{"role": "human", "content": "Q"}, {"role": "gpt", "content": "A"}]}]
        assert "Write 'user', or ShareGPT's layout" in str(refusal(write_jsonl(tmp_path / "r.jsonl", rows)))

    def test_missing_hub_id_while_offline(self) -> None:
        pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
        assert "not in the hub cache" in str(refusal("nobody/no-such-rows"))

    @pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv", "r.jsonl.gz"])
    def test_empty_file(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
        found = str(refusal(str(tmp_path / name)))
        assert "no rows" in found or "not valid JSON" in found

    def test_empty_array(self, tmp_path: Path) -> None:
        (tmp_path / "r.json").write_text("[]")
        assert "no rows" in str(refusal(str(tmp_path / "r.json")))

    def test_unknown_suffix(self, tmp_path: Path) -> None:
        (tmp_path / "r.xlsx").touch()
        assert ".parquet" in str(refusal(str(tmp_path / "r.xlsx")))

    def test_unknown_format_name(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "r.jsonl", [{"text": "x"}])
        assert "Did you mean 'sharegpt'" in str(refusal(path, form="share-gpt"))

    def test_unknown_schema_shows_the_columns(self, tmp_path: Path) -> None:
        found = str(refusal(write_jsonl(tmp_path / "r.jsonl", [{"foo": 1, "bar": 2}])))
        assert "bar, foo" in found and "data.columns" in found and "prompt-completion (prompt, completion)" in found

    @pytest.mark.parametrize("columns", [{}, {"question": "prompt"}])
    def test_pairs_without_a_prompt_column_are_named_once(self, tmp_path: Path, columns: dict[str, str]) -> None:
        row = {"system": "S", "question": "why", "chosen": "red", "rejected": "blue"}
        path = write_jsonl(tmp_path / "r.jsonl", [row] * 12)
        found = refusal(path, columns=columns)
        assert not found.problems and "no prompt column in 12 rows (columns system, question, chosen, rej" in str(found)
        assert "data.columns: {prompt: question}" in str(found) and "--column prompt=question" in str(found)
        assert len(read(path, columns={"prompt": "question"})) == 12

    def test_every_bad_line_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        path.write_text('{"text": "ok"}\n{oops\n[1]\n{"txt": "x"}\n{"text": 3.5}\n{"text": ["a"]}\n')
        found = refusal(str(path))
        assert [line.removeprefix(f"{path}:")[:1] for line in found.problems] == ["2", "3", "4", "6"]
        assert "not valid JSON" in found.problems[0] and "expected an object, got list" in found.problems[1]
        assert "missing field 'text'" in found.problems[2] and "should be text, got list" in found.problems[3]

    def test_commas_without_quotes(self, tmp_path: Path) -> None:
        """What stood behind the second comma was dropped, and the rest trained as a whole answer."""
        path = tmp_path / "r.csv"
        path.write_text("prompt,completion\nhi,Yes\nhi,Yes, it is, indeed\nhi\n")
        found = refusal(str(path))
        assert found.problems[0].startswith(f"{path}:3: more fields than the header")
        assert found.problems[1].endswith("missing field 'completion' of format 'prompt-completion' (has: prompt)")

    @pytest.mark.parametrize("name", ["r.txt", "r.md"])
    def test_documents_that_are_not_utf8(self, name: str, tmp_path: Path) -> None:
        """Bytes that are none were trained as replacement characters."""
        (tmp_path / name).write_bytes("Übung".encode("latin-1"))
        assert "cannot be read as UTF-8 text" in str(refusal(str(tmp_path / name)))

    def test_a_line_is_named_with_one_number(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        path.write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n{"text": \n{"text": "ok"}\n')
        bad, cut = refusal(str(path)).problems
        assert bad.startswith(f"{path}:2: cannot be read as UTF-8 text")
        assert cut == f"{path}:3: not valid JSON: Expecting value, column 9"

    def test_many_problems_are_counted(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "r.jsonl", [{"text": "ok"}, *([{"x": 1}] * 30)])
        found = refusal(path)
        assert len(found.problems) == 30 and str(found).endswith("... and 10 more")

    def test_json_lines_in_a_json_file(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "r.json", [{"text": "a"}, {"text": "b"}])
        assert "name it .jsonl" in str(refusal(str(tmp_path / "r.json")))

    @pytest.mark.parametrize(
        ("row", "words"),
        [
            ({"messages": []}, "not empty"),
            ({"messages": "hello"}, "should be a list"),
            ({"messages": "[oops"}, "not valid JSON"),
            ({"messages": [{"content": "x"}]}, "role and content"),
            ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'"),
            ({"messages": [{"role": "user", "content": None}]}, "no text content"),
            ({"conversations": [{"from": "martian", "value": "x"}]}, "from 'martian'"),
            ({"conversations": [{"from": "human"}]}, "from and value"),
            ({"prompt": "x", "completion": True}, "should be text, got bool"),
            ({"prompt": "x", "chosen": "a", "rejected": 3}, "should be a list"),
            ({"chosen": [ANSWER], "rejected": [ANSWER]}, "share no prompt"),
            ({"text": "cut \ud800 here"}, r"holds \ud800, half of a character"),
            ({"messages": [{"role": "user", "content": "\udfff"}]}, r"holds \udfff, half of a character"),
            ({"prompt": "x", "chosen": "a", "rejected": "\ud801"}, r"holds \ud801, half of a character"),
        ],
    )
    def test_bad_row(self, tmp_path: Path, row: dict[str, Any], words: str) -> None:
        path = write_jsonl(tmp_path / "r.jsonl", [row])
        (problem,) = refusal(path).problems
        assert problem.startswith(f"{path}:1: ") and words in problem

    @pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv"])
    def test_text_that_is_not_utf8(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b'{"text": "caf\xe9"}\n')
        assert str(tmp_path / name) in str(refusal(str(tmp_path / name)))

    @pytest.mark.parametrize(
        "data", [b"not gzip", gzip.compress(b'{"text": "x"}\n' * 50)[:-12]], ids=["not gzip", "cut"]
    )
    def test_broken_gzip(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "r.jsonl.gz").write_bytes(data)
        assert "r.jsonl.gz" in str(refusal(str(tmp_path / "r.jsonl.gz")))

    def test_damaged_gzip(self, tmp_path: Path) -> None:
        data = bytearray(gzip.compress(b'{"text": "x"}\n' * 50))
        data[12:20] = b"\xff" * 8
        (tmp_path / "r.jsonl.gz").write_bytes(bytes(data))
        assert "r.jsonl.gz" in str(refusal(str(tmp_path / "r.jsonl.gz")))

    def test_broken_parquet(self, tmp_path: Path) -> None:
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        (tmp_path / "r.parquet").write_bytes(b"PAR1 but not really")
        assert "r.parquet" in str(refusal(str(tmp_path / "r.parquet")))

    def test_csv_row_that_is_too_short(self, tmp_path: Path) -> None:
        (tmp_path / "r.csv").write_text("prompt,completion\na,b\nc\n")
        (problem,) = refusal(str(tmp_path / "r.csv")).problems
        assert "r.csv:3: missing field 'completion'" in problem


REAL = {
    "taskmaster_messages.jsonl": ("messages", 800),
    "gsm8k_prompt_completion.jsonl": ("prompt-completion", 1500),
    "self_instruct_alpaca.jsonl": ("alpaca", 252),
    "fastchat_sharegpt.json": ("sharegpt", 120),
    "preference_messages.jsonl": ("preference", 199),
}


@pytest.mark.parametrize("name", REAL)
def test_real_file(assets: Path, name: str) -> None:
    source = open_source(str(assets / "data" / name))
    rows = list(source)
    assert (source.form.name, len(rows)) == REAL[name]
    assert all(any(m["role"] == "assistant" for m in (*row.messages, *row.chosen)) for row in rows)


def test_content_hash_follows_what_is_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", [{"text": "x"}])
    first = open_source(path).content_hash()
    assert open_source(path).content_hash() == first
    assert open_source(path, system="S").content_hash() != first
    write_jsonl(tmp_path / "r.jsonl", [{"text": "y"}])
    assert open_source(path).content_hash() != first


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_that_is_nested_too_deep(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_text('{"messages": ' + "[" * 200_000 + "\n")
    error = refusal(str(path))
    assert "rows" in str(error) and "not valid JSON" in str(error)


def test_messages_in_a_cell_that_are_nested_too_deep(tmp_path: Path) -> None:
    assert ":1: messages are not valid JSON" in str(
        refusal(write_jsonl(tmp_path / "rows.jsonl", [{"messages": "[" * 200_000}]))
    )


def test_neither_a_file_nor_a_hub_id() -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    assert "foo/bar baz: no such file, and not a hub id" in str(refusal("foo/bar baz"))
    assert "empty list" in str(refusal([]))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": float("nan"), "completion": "A"},
        {"prompt": "Q", "completion": float("inf")},
        {"prompt": "Q", "completion": "A", "system": float("nan")},
        {"instruction": "Q", "input": float("nan"), "output": "A"},
        {"text": float("nan")},
    ],
)
def test_numbers_that_stand_for_nothing_are_not_text(tmp_path: Path, row: dict[str, Any]) -> None:
    error = refusal(write_jsonl(tmp_path / "rows.jsonl", [{**row, "score": float("nan")}]))
    assert "rows.jsonl:1: field" in str(error) and "should be text" in str(error)


def test_nan_in_a_column_that_is_not_read(tmp_path: Path) -> None:
    row = {"prompt": "Q", "completion": "A", "score": float("nan"), "system": None}
    assert len(read(write_jsonl(tmp_path / "rows.jsonl", [row]))) == 1
