"""Documents of every kind to text, chunks by the published counts, and no document in two splits."""

from __future__ import annotations

import gzip
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolmlx import cli
from smolmlx.data.splits import Method
from smolmlx.errors import DataError, RecipeError
from smolmlx.synth import markup
from smolmlx.synth.chunks import Cut, cut_text, write_chunks
from smolmlx.synth.documents import CHUNKS, DUPLICATE, NO_TEXT, UNREADABLE, Document, LeftOut, decode, read_documents


def words(count: int, name: str = "w") -> str:
    return " ".join(f"{name}{i}" for i in range(count))


def read(*names: Path) -> tuple[dict[str, Document], LeftOut]:
    left_out = LeftOut()
    return {document.id: document for document in read_documents([str(n) for n in names], left_out)}, left_out


def make_pdf(pages: list[list[str]]) -> bytes:
    """Return a PDF with one line of text below the other."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>"]
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects.append(f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode())
    objects.append(b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    for number, lines in enumerate(pages):
        shown = "".join(f"({line}) Tj 0 -16 Td " for line in lines)
        stream = f"BT /F1 12 Tf 72 720 Td {shown}ET".encode()
        page = f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * number} 0 R "
        objects.append(f"{page}/Resources << /Font << /F1 3 0 R >> >> >>".encode())
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size = len(objects) + 1
    out_table = b"xref\n0 %d\n0000000000 65535 f \n%s" % (size, table)
    return out + out_table + b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (size, len(out))


@pytest.mark.parametrize(("count", "sizes"), [(1100, [500, 500, 300]), (900, [500, 500]), (400, [400]), (0, [])])
def test_published_counts(count: int, sizes: list[int]) -> None:
    assert [size for _, size, _ in cut_text(words(count), Cut())] == sizes


@settings(deadline=None)
@given(st.integers(0, 400), st.integers(1, 60), st.integers(0, 59))
def test_chunks_cover_every_word(count: int, size: int, overlap: int) -> None:
    cut = Cut(size, min(overlap, size - 1))
    text = words(count).replace("w3 ", "w3\n\n")
    chunks = list(cut_text(text, cut))
    seen: set[int] = set()
    for start, length, chunk in chunks:
        assert chunk.split() == [f"w{i}" for i in range(start, start + length)] and chunk in text
        assert not set(range(start, start + length)) <= seen, "wholly inside what came before"
        seen |= set(range(start, start + length))
    assert seen == set(range(count))


def test_bad_sizes() -> None:
    with pytest.raises(RecipeError, match="--overlap 5: expected 0 to 4, less than --words 5"):
        Cut(5, 5).check()


def test_markdown() -> None:
    source = (
        "---\ntitle: x\n---\n# Head\n:label:`sec`\n\nSee [the *site*](http://x.y) and ![image](a.png), :numref:`fig`.\n"
        "- one\n- two $a_1 * b_2 * c$\n\n```python\nif x:\n    y\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n$$\\{a\\\\b\\}$$\n"
    )
    text = markup.markdown_text(source)
    assert "title: x" not in text and "http" not in text and ":label:" not in text
    assert "See the site and , fig." in text
    assert "- one\n- two $a_1 * b_2 * c$" in text
    assert "if x:\n    y" in text and "1\t2" in text and "$$\\{a\\\\b\\}$$" in text
    assert markup.markdown_text("It costs $5 or $6.") == "It costs $5 or $6."


def test_html() -> None:
    page = (
        "<html><head><title>t</title><style>p{}</style></head><body><nav>menu</nav><script>x()</script>"
        "<main><h1>Head</h1><p>One\n <b>two</b> &amp; three<br>four</p><ul><li>a</li>\n<li>b</li></ul>"
        "<pre>x\n  y</pre></main><footer>foot</footer></body></html>"
    )
    assert markup.html_text(page) == "Head\n\nOne two & three\nfour\n\n- a\n- b\n\nx\n  y"
    assert markup.html_text("<p>no main") == "no main"
    header = "<header><nav>menu</nav><h1>{}</h1>by</header><p>text</p>"
    for part in ("article", "main"):
        page = f"<body>{header.format('Site')}<{part}>{header.format('Title')}</{part}></body>"
        assert markup.html_text(page) == "Title\n\nby\n\ntext"
    article = f"<article>{header.format('Title')}</article>"
    text = markup.html_text(f"<body>{header.format('Site')}{article * 2}</body>")
    assert text.count("Title") == 2 and "Site" not in text
    assert markup.html_text("") == ""
    assert decode("<meta charset='latin-1'>\xe9".encode("latin-1"), html=True).endswith("é")


def test_latex() -> None:
    source = (
        "\\newcommand{\\x}{y}\n\\begin{document}\n\\section{Head}% note\nText~\\citep[see][]{a,b} with \\emph{stress}, "
        "\\texttt{code} and $a_{1} \\le 2$ (\\ref{t}).\n\\begin{table}\\caption{What it \\textbf{shows}.}\n"
        "\\begin{tabular}{ll}1 & 2\\\\\\end{tabular}\\end{table}\n\\begin{itemize}\\item one\\item two\\end{itemize}\n"
        "\\end{document} behind"
    )
    text = markup.latex_text(source)
    assert text.startswith("Head\n\nText with stress, code and $a_{1} \\le 2$.")
    assert "What it shows." in text and "1 & 2" not in text and "behind" not in text and "note" not in text
    assert "one" in text and "two" in text


def test_latex_comments_end_where_latex_ends_them(tmp_path: Path) -> None:
    """A % in an address, in code or behind a backslash is no comment, and \\input in code or a comment takes nothing in."""
    (tmp_path / "main.tex").write_text(
        "% \\begin{document} \\input{part}\n\\begin{document}\nSee \\url{http://x.org/a%20b} and \\href{http://x.org/c%20d}{here}, 5\\% "
        "left,\\\\% a note\nmore.\n\\begin{verbatim}\n50% \\input{part}\n\\end{verbatim}\nOne % a note\n% a note\nline \\verb|%|. % a note\n\n"
        "%\nLast.\n\\end{document}\n"
    )
    (tmp_path / "part.tex").write_text("Own part.\n")
    found = {document.id: document.text for document in read_documents([str(tmp_path)], LeftOut())}
    assert set(found) == {"main.tex", "part.tex"}, "a file that is taken in nowhere is a document of its own"
    text = found["main.tex"]
    main = tmp_path / "main.tex"
    main.write_bytes(main.read_bytes().replace(b"\n", b"\r\n"))
    assert next(read_documents([str(main)], LeftOut())).text == text
    assert "and here, 5% left," in text and "note" not in text and "Own part" not in text and "50" not in text
    assert "One line." in " ".join(text.split()) and text.endswith("\n\nLast.")


def test_latex_inputs_are_one_document(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "main.tex").write_text("Start.\n\\input{parts/a}\n%\\input{parts/b}\n\\include{missing}\nEnd.")
    (tmp_path / "parts" / "a.tex").write_text("Part A \\input{parts/c.tex}")
    (tmp_path / "parts" / "c.tex").write_text("Part C")
    (tmp_path / "parts" / "b.tex").write_text("Part B")
    found, _ = read(tmp_path)
    assert set(found) == {"main.tex", "parts/b.tex"}
    assert found["main.tex"].text.split() == ["Start.", "Part", "A", "Part", "C", "End."]


def test_latex_inputs_stay_in_the_folder_that_was_named(tmp_path: Path) -> None:
    (tmp_path / "secret.tex").write_text("Secret")
    source = tmp_path / "in"
    (source / "one").mkdir(parents=True)
    (source / "shared.tex").write_text("Shared")
    outside = f"\\input{{{tmp_path}/secret.tex}} \\input{{../../secret}} \\input{{/etc/hostname}}"
    (source / "one" / "main.tex").write_text(f"Start {outside} \\input{{../shared}} \\input{{{'x' * 300}}} end.")
    found, left_out = read(source)
    assert {name: document.text.split() for name, document in found.items()} == {
        "one/main.tex": ["Start", "Shared", "end."]
    }
    assert not left_out.entries
    found, _ = read(source / "one" / "main.tex")
    assert found["main.tex"].text.split() == ["Start", "end."]


def test_latex_files_that_take_each_other_in_are_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.tex").write_text("A \\input{b}")
    (tmp_path / "b.tex").write_text("B \\input{a} \\input{b}")
    found, _ = read(tmp_path)
    assert {name: document.text.split() for name, document in found.items()} == {"a.tex": ["A", "B"]}


def test_a_broken_document_stops_no_other(tmp_path: Path) -> None:
    whole = make_pdf([["One."], ["Two."]])
    (tmp_path / "page.pdf").write_bytes(whole.replace(b"/Type /Page /Parent 2 0 R", b"/Type /Nope /Parent 9 0 R"))
    (tmp_path / "deep.html").write_text("<div>" * 3000 + "text")
    (tmp_path / "good.txt").write_text("good")
    found, left_out = read(tmp_path)
    assert "good.txt" in found and "deep.html" not in found
    details = {where: detail for reason, where, detail in left_out.entries if reason == UNREADABLE}
    assert "nested too deeply" in details["deep.html"] and "cannot be read as PDF" in details["page.pdf"]


def test_pdf(tmp_path: Path) -> None:
    body = [["Journal of Tests", f"Page {i} tells some-", f"thing about tea {i}.", f"{i}"] for i in range(1, 6)]
    (tmp_path / "a.pdf").write_bytes(make_pdf(body))
    (tmp_path / "scan.pdf").write_bytes(make_pdf([[]]))
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    found, left_out = read(tmp_path)
    text = found["a.pdf"].text
    assert list(found) == ["a.pdf"] and all(f"something about tea {i}." in text for i in range(1, 6))
    assert "Journal" not in text and "Page 1 tells" in text and not any(line.isdigit() for line in text.split("\n"))
    assert {(reason, where) for reason, where, _ in left_out.entries} == {
        (NO_TEXT, "scan.pdf"),
        (UNREADABLE, "broken.pdf"),
    }


def test_rows_duplicates_and_what_is_left_out(tmp_path: Path) -> None:
    rows = [{"id": "x", "text": "one two"}, {"text": "three"}, {"id": "x", "text": "four"}, {"body": "?"}, {"text": ""}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    (tmp_path / "zipped.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "five"}).encode()))
    (tmp_path / "same.txt").write_text("One  TWO")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "utf16.txt").write_text("six", encoding="utf-16")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "image.png").write_bytes(b"")
    found, left_out = read(tmp_path)
    assert set(found) == {"rows.jsonl#x", "rows.jsonl#2", "rows.jsonl#x@3", "zipped.jsonl.gz#1", "utf16.txt"}
    reasons = defaultdict(list)
    for reason, where, _ in left_out.entries:
        reasons[reason].append(where)
    assert reasons[DUPLICATE] == ["same.txt"] and reasons[NO_TEXT] == ["rows.jsonl#5"]
    assert reasons[UNREADABLE] == ["latin.txt", "rows.jsonl#4", "rows.jsonl"]


def test_names_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.docx").write_text("")
    with pytest.raises(DataError, match="3 problems") as error:
        read(tmp_path / "empty", tmp_path / "a.docx", tmp_path / "none.md")
    assert "unknown kind of document. Known: .txt, .md" in str(error.value) and "no such file" in str(error.value)
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"no document that can be used.*\n.*blank.txt: no text"):
        write_chunks([str(tmp_path / "blank.txt")], tmp_path / "out", Cut(), Method())


def library(folder: Path, documents: int = 20) -> Path:
    for i in range(documents):
        path = folder / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(words(40 + 37 * i, f"d{i}w"))
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_splits_are_by_document_and_repeatable(tmp_path: Path) -> None:
    source = library(tmp_path / "in")
    made = write_chunks([str(source)], tmp_path / "a", Cut(50, 10), Method(seed=3))
    again = write_chunks([str(source)], tmp_path / "b", Cut(50, 10), Method(seed=3))
    assert made["files"] == again["files"] and made["documents"] == 20
    homes = defaultdict(set)
    for row in rows_of(tmp_path / "a"):
        homes[row["document"]].add(row["split"])
        assert len(row["text"].split()) == row["words"] and row["id"].startswith(row["document"])
    assert len(homes) == 20 and all(len(found) == 1 for found in homes.values())
    shares = {name: entry["rows"] / made["chunks"] for name, entry in made["files"].items()}
    assert shares == pytest.approx({"train": 0.8, "validation": 0.1, "test": 0.1}, abs=0.03)
    assert {entry["id"]: entry["split"] for entry in made["document_list"]} == {d: s.pop() for d, s in homes.items()}
    other = write_chunks([str(source)], tmp_path / "a", Cut(50, 10), Method((1.0, 0.0), seed=4))
    assert set(other["files"]) == {"train"} and not (tmp_path / "a" / "test.jsonl").exists()


@pytest.mark.parametrize("sizes", [(10, 10, 10), (30, 20, 10, 10, 10), (900, 20, 20), (500, 500, 500, 20)])
def test_few_documents_fill_every_split(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}.txt").write_text(words(size, f"d{i}w"))
    made = write_chunks([str(tmp_path)], tmp_path / "out", Cut(50, 10), Method(seed=1))
    assert set(made["files"]) == {"train", "validation", "test"}
    homes = {row["document"]: row["split"] for row in rows_of(tmp_path / "out")}
    assert len(homes) == len(sizes) == sum(entry["documents"] for entry in made["files"].values())
    assert len(rows_of(tmp_path / "out")) == made["chunks"] == sum(entry["chunks"] for entry in made["document_list"])
    assert made["files"]["train"]["rows"] == max(entry["rows"] for entry in made["files"].values())


def test_chunks_are_no_documents(tmp_path: Path) -> None:
    """Read a second time with the documents they were cut from, they would come into other splits."""
    source = library(tmp_path / "in")
    made = [write_chunks([str(source)], source / "cut", Cut(50, 10), Method()) for _ in range(2)]
    assert made[0]["files"] == made[1]["files"] and made[1]["documents"] == 20
    assert [entry["document"] for entry in made[1]["left_out"][CHUNKS]] == [
        "cut/test.jsonl",
        "cut/train.jsonl",
        "cut/validation.jsonl",
    ]
    below = write_chunks([str(source)], source / "part0" / "chunks", Cut(50, 10), Method())
    again = write_chunks([str(tmp_path)], tmp_path / "out", Cut(50, 10), Method())
    assert below["documents"] == again["documents"] == 20 and len(again["left_out"][CHUNKS]) == 6


def test_same_names_in_two_folders(tmp_path: Path) -> None:
    library(tmp_path / "x", 2)
    library(tmp_path / "y", 3)
    found, left_out = read(tmp_path / "x", tmp_path / "y")
    assert len(found) == 3 and len({d.text for d in found.values()}) == 3 and len(left_out.entries) == 2


def data(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["smolmlx", "data", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    source = library(tmp_path / "in")
    (source / "broken.pdf").write_bytes(b"%PDF")
    assert data(monkeypatch, "chunk", source, "out", "--words", 50, "--overlap", 10) == 0
    shown = capsys.readouterr()
    assert "train" in shown.out and "Next: smolmlx data augment out rows" in shown.out
    assert "left out, cannot be read: 1, first broken.pdf" in shown.err
    assert data(monkeypatch, "chunk", source, "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 20
    (tmp_path / "one.md").write_text("# One\n\nparagraph")
    assert data(monkeypatch, "chunk", "one.md", "alone") == 4
    assert "1 document(s) cannot fill the splits" in (said := capsys.readouterr().err) and "--shares 1,0" in said
    assert "counts" not in said, "chunks have no counts"
    assert data(monkeypatch, "chunk", "one.md", "alone", "--shares", "1,0") == 0
    assert data(monkeypatch, "chunk", "one.md", "alone", "--shares", "a") == 2
    assert data(monkeypatch, "chunk", "one.md", "alone", "--shares", "nan,1") == 2
    assert capsys.readouterr().err and data(monkeypatch, "chunk", "one.md", "alone", "--shares", "1") == 2
    assert "data chunk: 1 problem" in capsys.readouterr().err
    assert data(monkeypatch, "chunk", f"{source}/", source) == 2
    assert "among the documents" in capsys.readouterr().err and not (source / "train.jsonl").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.jsonl").write_text("{}")
    assert data(monkeypatch, "chunk", source, "mine") == 2
    assert "not written by `smolmlx data chunk`" in capsys.readouterr().err


def test_real_documents(assets: Path, tmp_path: Path) -> None:
    made = write_chunks([str(assets / "text")], tmp_path / "out", Cut(), Method())
    assert made["documents"] == 24 and made["left_out"] == {}
    rows = rows_of(tmp_path / "out")
    assert len(rows) == made["chunks"] > 150 and {row["split"] for row in rows} == {"train", "validation", "test"}
    text = " ".join(row["text"] for row in rows)
    assert "\\citep" not in text and ":label:" not in text and "](http" not in text
