"""`smolmlx data`: what is printed, which exit code comes back, and that help stays light."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from smolmlx import cli
from smolmlx.data.tokenizer_training import train_tokenizer

Row = dict[str, Any]
NOTES = Path(__file__).parents[2] / "data" / "notes"
VERBS = ("inspect", "validate", "prepare", "split", "corpus", "chunk", "augment", "pairs")


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run `smolmlx data ...` in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMOLMLX_CACHE", str(tmp_path / ".cache"))

    def data(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["smolmlx", "data", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return data


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level tokenizer with a ChatML template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["question one", "answer two"], 270, folder)
    return str(folder)


def write(name: str, rows: list[Row]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def pairs(count: int) -> list[Row]:
    return [{"prompt": f"question {i}", "completion": f"answer {i}", "kind": "ab"[i % 2]} for i in range(count)]


def test_inspect_shows_what_is_trained(run: Run, tokenizer: str) -> None:
    found = run("inspect", write("rows.jsonl", [*pairs(9), pairs(1)[0]]), "--tokenizer", tokenizer, "--row", "2")
    assert found.code == 0 and found.err == ""
    for line in ("prompt-completion (chat)", "prompt, completion, kind", "1 exact duplicate (first rows.jsonl:10)"):
        assert line in found.out
    assert "row 2 (rows.jsonl:2):" in found.out
    assert "<|im_start|>assistant\n«answer 1<|im_end|>»" in found.out


def test_inspect_counts_lengths_shares_and_lost_rows(run: Run, tokenizer: str) -> None:
    rows = [*pairs(3), {"prompt": "why?", "completion": "because " * 40, "note": "long"}]
    path = write("rows.jsonl", rows)
    (found,) = run("inspect", path, "--tokenizer", tokenizer, "--max-length", "64", "--json").json["files"]
    assert found["columns"] == {"prompt": 4, "completion": 4, "kind": 3, "note": 1}
    tokens = found["tokens"]
    assert tokens["lengths"]["max"] > 64 > tokens["lengths"]["median"] and tokens["trained_rows"] == 3
    assert tokens["affected_rows"] == {"longer than max_length": 1}
    pieces = found["shown"]["pieces"]
    assert [piece["text"] for piece in pieces if piece["trained"]] == ["answer 0<|im_end|>"]
    share = tokens["supervised_share"]
    assert share == pytest.approx(3 * trained_tokens(tokenizer, "answer 0") / tokens["tokens"], abs=0.02)


def trained_tokens(folder: str, answer: str) -> int:
    from smolmlx.data.chat import Tokenizer

    return len(Tokenizer(Path(folder)).encode(f"{answer}<|im_end|>"))


def test_inspect_takes_text_pairs_and_rows_without_an_answer(run: Run, tokenizer: str) -> None:
    text = write("text.jsonl", [{"text": "a reef"}])
    preference = write("pairs.jsonl", [{"prompt": "a?", "chosen": "good", "rejected": "bad"}])
    asked = write("asked.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    found = run("inspect", text, preference, asked, "--tokenizer", tokenizer)
    assert found.code == 0
    assert "«a reef<|endoftext|>»" in found.out and "tokens of prompt + chosen" in found.out
    assert "no supervised token  1 (first asked.jsonl:1)" in found.out and "user: hi" in found.out


def test_inspect_needs_no_tokenizer(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("smolmlx.models.embedded_folder", lambda: tmp_path / "none")
    found = run("inspect", write("rows.jsonl", pairs(2)))
    assert found.code == 0 and "assistant: answer 0" in found.out and "add --model or --tokenizer" in found.err


def test_validate_lists_every_problem(run: Run) -> None:
    ask, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
    rows = [
        [ask, answer],
        [ask],
        [ask, {**answer, "content": " "}],
        [answer, ask],
        [ask, {"role": "bot", "content": "x"}],
    ]
    path = write("rows.jsonl", [{"id": min(i, 3), "messages": turns} for i, turns in enumerate(rows)])
    with Path(path).open("a") as file:
        file.write("{oops\n" + json.dumps({"id": 1, "messages": [ask, answer]}) + "\n")
    good = write("good.jsonl", pairs(3))
    found = run("validate", path, good)
    assert found.code == 4 and found.out == "good.jsonl: ok, 3 rows, format prompt-completion\n"
    expected = (
        "rows.jsonl: 6 problems",
        "rows.jsonl:2: no assistant turn",
        "rows.jsonl:3: empty turn",
        "rows.jsonl:4: bad role order",
        "rows.jsonl:5: message 2 has unknown role 'bot'",
        "rows.jsonl:6: not valid JSON",
        "rows.jsonl:7: duplicate id '1', first used at rows.jsonl:2",
    )
    assert [line for line in expected if line not in found.err] == []
    report = run("validate", path, good, "--json")
    assert report.code == 4 and not report.json["ok"]
    assert [len(entry["problems"]) for entry in report.json["files"]] == [6, 0]


def test_validate_knows_the_notes_task(run: Run) -> None:
    assert "ok, 75 rows, format notes" in run("validate", str(NOTES / "validation.jsonl")).out
    row = json.loads((NOTES / "validation.jsonl").read_text(encoding="utf-8").splitlines()[0])
    path = write("notes.jsonl", [{**row, "topic": "cooking", "output": "Summary: no.", "input_sha256": "0"}])
    found = run("validate", path)
    assert found.code == 4
    for problem in ("unknown topic 'cooking'", "input_sha256 mismatch", "answer not compliant: Limitation"):
        assert problem in found.err
    assert "missing field 'instruction'" in run("validate", write("rows.jsonl", pairs(1)), "--notes").err


def test_prepare_prints_reasons_and_writes_rows(run: Run) -> None:
    path = write("rows.jsonl", [*pairs(3), pairs(1)[0], {"prompt": "x", "completion": ""}])
    found = run("prepare", path, "clean.jsonl")
    assert found.code == 0
    lines = found.out.splitlines()
    assert lines[:4] == [
        "rows read          5",
        "- exact duplicate  1  first rows.jsonl:4",
        "- empty turn       1  first rows.jsonl:5",
        "rows kept          3",
    ]
    assert run("prepare", path, "clean.jsonl", "--keep-duplicates", "--json").json["dropped"] == {"empty turn": 1}
    assert run("validate", "clean.jsonl").code == 0
    mapped = write("mapped.jsonl", [{"Frage": "a?", "Antwort": "b"}])
    assert run("prepare", mapped, "de.jsonl", "--column", "prompt=Frage", "--column", "response=Antwort").code == 0
    assert list(json.loads(Path("de.jsonl").read_text())) == ["messages"]


def test_split_prints_and_returns_its_manifest(run: Run) -> None:
    path = write("rows.jsonl", pairs(40))
    found = run("split", path, "out", "--stratify", "kind", "--seed", "5", "--json").json
    assert {name: entry["rows"] for name, entry in found["files"].items()} == {"train": 32, "validation": 4, "test": 4}
    assert found["strata"]["a"] == {"train": 16, "validation": 2, "test": 2}
    shown = run("split", path, "out", "--shares", "50,50")
    assert shown.code == 0 and "out: 40 rows of rows.jsonl, random, seed 0" in shown.out and "50.0%" in shown.out
    left = run("split", path, "out", "--counts", "10,5,5")
    assert "20 rows are in no split" in left.err


def test_corpus_and_its_tokenizer(run: Run) -> None:
    found = run("corpus", "out", "--package", "pluggy", "--tokenizer", "tok", "--vocab-size", "300", "--json")
    assert found.code == 0 and found.json["documents"]["prose"] > 0 and found.json["vocab_size"] == 300
    assert Path("tok/tokenizer.json").is_file() and Path("out/train.jsonl").is_file()
    assert run("inspect", "out", "--tokenizer", "tok").code == 0
    assert run("corpus", "none", "--package", "no_such_package").code == 4 and not Path("none").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("inspect", "missing.jsonl"), 4, "missing.jsonl: no such file"),
        (("inspect", "missing.jsonl", "gone.csv"), 4, "2 problems"),
        (("inspect", "empty.jsonl"), 4, "no rows"),
        (("inspect", "unknown.jsonl"), 4, "unknown schema: columns foo"),
        (("inspect", "bad.jsonl"), 4, "bad.jsonl:2: not valid JSON"),
        (("inspect", "rows.jsonl", "--row", "9"), 2, "--row 9: rows.jsonl has 3 rows"),
        (("inspect", "rows.jsonl", "--tokenizer", "nowhere"), 2, "--tokenizer nowhere: no such folder"),
        (("inspect", "rows.jsonl", "--tokenizer", "a", "--model", "b"), 2, "choose one of them"),
        (("inspect", "rows.jsonl", "--column", "promt=x"), 2, "no format has a field 'promt'"),
        (("inspect", "rows.jsonl", "--column", "x"), 2, "expected FIELD=NAME"),
        (("inspect",), 2, "Missing argument"),
        (("validate", "missing.jsonl"), 4, "no such file"),
        (("validate", "unknown.jsonl"), 4, "unknown schema"),
        (("prepare", "rows.jsonl", "rows.jsonl"), 2, "is the input"),
        (("prepare", "rows.jsonl", "out.csv"), 2, "name it out.jsonl"),
        (("prepare", "rows.jsonl", "o.jsonl", "--min-chars", "9", "--max-chars", "3"), 2, "no row can be kept"),
        (("prepare", "rows.jsonl", "o.jsonl", "--min-chars", "999"), 4, "too short: 3, first rows.jsonl:1"),
        (("split", "bad.jsonl", "out"), 4, "bad.jsonl:2: not valid JSON"),
        (("split", "rows.jsonl", "out", "--shares", "a,b"), 2, "--shares a,b: expected numbers"),
        (("split", "rows.jsonl", "out", "--counts", "1.5,2"), 2, "expected whole numbers"),
        (("split", "rows.jsonl", "out", "--counts", "1,1", "--shares", ".5,.5"), 2, "choose one of them"),
        (("split", "rows.jsonl", "out"), 4, "too few"),
        (("corpus", "out", "--vocab-size", "300"), 2, "no effect without --tokenizer"),
        (("corpus", "out", "--tokenizer", "t", "--vocab-size", "9"), 2, "at least 259"),
        (("inspct", "rows.jsonl"), 2, "Did you mean 'inspect'?"),
        (("split", "rows.jsonl", "out", "--ratio", ".9,.1"), 2, "Did you mean '--shares'?"),
        (("split", "rows.jsonl", "out", "--shares", "0.8", "0.1", "0.1"), 2, "commas: --shares 0.8,0.1,0.1"),
        (("split", "rows.jsonl", "out", "bad.jsonl"), 2, "Several paths match the pattern; name one"),
    ],
)
def test_errors_say_what_is_wrong(run: Run, arguments: tuple[str, ...], code: int, says: str) -> None:
    write("rows.jsonl", pairs(3))
    write("unknown.jsonl", [{"foo": 1}])
    write("empty.jsonl", [])
    Path("bad.jsonl").write_text(json.dumps(pairs(1)[0]) + "\n{oops\n")
    found = run(*arguments)
    assert found.code == code and says in found.err and "Traceback" not in found.err and found.out == ""


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples(run: Run, verb: str) -> None:
    found = run(verb, "--help")
    assert found.code == 0 and f"smolmlx data {verb} " in found.out.split("Examples:")[1]


def test_help_imports_no_array_library() -> None:
    heavy = "numpy', 'torch', 'mlx', 'tokenizers', 'safetensors', 'jinja2"
    code = (
        "import sys; from smolmlx.cli import cli\n"
        f"for verb in {VERBS}:\n    cli.main(['data', verb, '--help'], standalone_mode=False)\n"
        f"assert not {{'{heavy}'}} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_rows_are_not_written_under_the_name_of_another_format(run: Run, tmp_path: Path) -> None:
    """They were JSON lines in a .csv, which no command could read again."""
    pytest.importorskip("rensa", reason="rensa is not installed")
    found = run("dedupe", str(NOTES / "ood.jsonl"), "b.csv")
    assert found.code == 2 and "b.jsonl" in found.err and not (tmp_path / "b.csv").exists()
