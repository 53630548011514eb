"""The corpus is a function of the installed text and the seed; the tokenizer gives back what it was given."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from smolmlx.data.corpus import write_corpus
from smolmlx.data.corpus_pages import (
    FORBIDDEN,
    Collection,
    Page,
    Passage,
    clean,
    collect,
    is_whole_sentence,
    passages,
    split_sentences,
)
from smolmlx.data.corpus_sections import sections
from smolmlx.data.corpus_sentences import ask_about, disguised, invented_name, shorten, subject_of
from smolmlx.data.corpus_views import VIEWS, chat_views
from smolmlx.data.tokenizer_training import train_tokenizer

EXCHANGE = re.compile(r"<\|im_start\|>user\n(.+?)<\|im_end\|>\n<\|im_start\|>assistant\n(.+?)<\|im_end\|>\n", re.DOTALL)
MODULE = '''
"""Mix two colours of paint in a small bucket, and tell how much of each one is left afterwards.

The bucket is never empty when the mixer starts. A mixer keeps one bucket for each colour that it has seen so far.
If the bucket overflows, the mixer stops (and says so), because the paint would reach the floor. Every reading is
given in litres. The `stir` method must be called before the paint dries.

>>> mix(1, 2)
3
"""

class Mixer:
    """Copyright 2020 by somebody, all rights reserved, and licensed under terms that nobody has read."""

    def stir(self, speed, seconds):
        """Stir the paint at one speed until the given time has passed, then wait for it to settle.

        Args:
            speed (`float`, *optional*): Turns of the paddle in one second.
            seconds (`int`):
                How long to stir before the paint is left alone.
        """
        raise SystemError("importing or running this file is a mistake")

def again():
    """Stir the paint at one speed until the given time has passed, then wait for it to settle."""

raise SystemError
'''
GUIDE = """# Guide

A brush holds *more* paint than a roller does, says the [old manual](https://example.org/x).

```python
brush = Brush()
```

| a | b |
|---|---|
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    package = tmp_path / "site" / "paint"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text(MODULE)
    (package / "tests" / "test_paint.py").write_text(
        '"""A docstring of a test, which does not belong to the corpus at all."""'
    )
    (package / "guide.md").write_text(GUIDE)
    info = tmp_path / "site" / "paint-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Name: paint\nVersion: 1.2\n\nPaint is a package that mixes the colours of a picture by rule.\n"
    )
    (info / "RECORD").write_text("paint/__init__.py,sha256=x,1\n")
    return tmp_path / "site"


def toy(site: Path) -> Collection:
    return collect(["paint", "absent"], sites=[site], library=site / "none", workers=1)


def test_a_package_gives_its_documentation_once_and_is_not_imported(site: Path) -> None:
    found = toy(site)
    assert found.missing == ("absent",)
    assert found.versions == {"paint": "1.2"}
    assert [page.source for page in found.pages] == [
        "paint/METADATA",
        "paint/__init__.py",
        "paint/__init__.py:Mixer.stir",
        "paint/guide.md",
    ]
    text = "\n".join(page.text for page in found.pages)
    assert "- speed (`float`, optional): Turns of the paddle in one second." in text
    assert "- seconds (`int`): How long to stir before the paint is left alone." in text
    assert "A brush holds more paint than a roller does, says the old manual." in text
    assert text.count("Stir the paint at one speed") == 1
    assert not re.search(r">>>|Brush\(\)|\||Copyright|of a test", text)


def test_markup_is_removed() -> None:
    blocks = clean(
        "Use :class:`~a.b.Norm` or ``norm`` as in `the guide <https://x.org>`_ of the package [1]_.\n\n"
        ".. code-block:: python\n\n    x = 1\n\n.. note::\n    The norm is never below zero for real input.\n\n"
        "Show it::\n\n    norm(x)\n"
    )
    assert [block.text for block in blocks] == [
        "Use `Norm` or `norm` as in the guide of the package.",
        "The norm is never below zero for real input.",
    ]


def test_sentences() -> None:
    assert split_sentences("Use a list, e.g. Python's own. It is fast.") == [
        "Use a list, e.g. Python's own.",
        "It is fast.",
    ]
    assert is_whole_sentence("The value of `x[0]` is returned to the caller.")
    assert not is_whole_sentence("x = f(y) returns a list of values.")
    assert not is_whole_sentence("and then the rest of it.")
    assert ask_about("The bucket is never empty.") == "What is the bucket?"
    assert ask_about("If it rains, the ground gets wet.") is None
    assert (
        shorten("The mixer stops at once (and says so), because the paint would reach the floor.")
        == "The mixer stops at once."
    )


def test_the_same_seed_gives_the_same_bytes(site: Path, tmp_path: Path) -> None:
    written = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        report = write_corpus(tmp_path / name, seed, collection=toy(site))
        written.append([(tmp_path / name / f"{split}.jsonl").read_bytes() for split in ("train", "validation")])
        rows = [json.loads(line) for split in written[-1] for line in split.splitlines()]
        assert report.documents["prose"] == sum(row["kind"] == "prose" for row in rows) == 4
        assert sum(report.characters.values()) == sum(len(row["text"]) for row in rows)
        assert {key for row in rows for key in row} == {"text", "kind", "source"}
        assert str(tmp_path) not in json.dumps(rows)
    assert written[0] == written[1] != written[2]
    assert json.loads((tmp_path / "a" / "card.json").read_text())["versions"] == {"paint": "1.2"}


def test_chat_views_are_single_exchanges_about_a_passage(site: Path) -> None:
    rows = chat_views(toy(site).pages, seed=0, num_characters=10_000)
    assert rows == chat_views(toy(site).pages, seed=0, num_characters=10_000)
    assert len(rows) >= 4
    assert sum(len(row.text) for row in chat_views(toy(site).pages, seed=0, num_characters=900)) <= 900
    for row in rows:
        assert EXCHANGE.fullmatch(row.text)
        assert row.kind == "chat"


@pytest.fixture
def passage(site: Path) -> Passage:
    page: Page = next(page for page in toy(site).pages if page.source == "paint/__init__.py")
    return next(passages(page, np.random.default_rng(0)))


@pytest.mark.parametrize("index", range(len(VIEWS)))
def test_each_view_answers_and_fills_its_wordings(passage: Passage, index: int) -> None:
    view = VIEWS[index]
    made = [found for seed in range(5) if (found := view.make(passage, np.random.default_rng(seed)))]
    assert made
    for answer, slots in made:
        assert answer == answer.strip() != ""
        assert not any(header in answer for header in FORBIDDEN)
        assert all("{" not in wording.format(**slots) for wording in view.wordings)


SUBJECT = (
    "A paint mixer keeps one bucket for each colour.",
    "Paint mixer owners clean the paint mixer daily.",
    "It never empties a bucket before the paint mixer stops.",
    "Readings come in litres.",
    "Nobody stirs twice.",
)


def test_a_subject_goes_by_another_name_throughout() -> None:
    page = Page("toy.py", "", ())
    passage = Passage(page, SUBJECT)
    assert subject_of(passage) == "paint mixer"
    assert subject_of(Passage(page, ("Readings come in litres.",))) is None
    seen = {invented_name(np.random.default_rng(seed)) for seed in range(50)}
    assert len(seen) > 40 and all(name == name.strip().lower() for name in seen)
    for seed in range(20):
        told = disguised(passage, np.random.default_rng(seed))
        assert "paint mixer" not in told.text.lower()
        assert len(told.sentences) == len(SUBJECT)
        assert told.sentences[1][0].isupper()
        assert told.text.split()[:1] == ["A"]


def test_sections_stand_under_the_headings_asked_for() -> None:
    passage = Passage(Page("toy.py", "", ()), SUBJECT)
    made = [found for seed in range(60) if (found := sections(passage, np.random.default_rng(seed)))]
    assert len(made) > 30
    for answer, slots in made:
        headings = [line[:-1] for line in answer.split("\n") if line.endswith(":")]
        assert [re.sub(r" \(.*", "", asked) for asked in slots["x"].split(", ")] == headings
        bullets = [line for line in answer.split("\n") if line.startswith("* ")]
        asked = re.search(r"\((\w+) bullets\)", slots["x"])
        assert asked and {"two": 2, "three": 3, "four": 4}[asked[1]] == len(bullets)
        points = [answer.index(bullet) for bullet in bullets]
        assert points == sorted(points) and len(set(bullets)) == len(bullets)
    assert any("paint mixer?" in answer for answer, _ in made), "some questions end with the passage's subject"


def test_validation_holds_whole_sources(site: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "out", 0, collection=toy(site), validation_share=0.5)
    sources = [
        {json.loads(line)["source"] for line in (tmp_path / "out" / f"{split}.jsonl").read_text().splitlines()}
        for split in ("train", "validation")
    ]
    assert not sources[0] & sources[1]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([MODULE, GUIDE], 400, folder)
    return folder


def test_tokenizer_round_trip_and_special_ids(tokenizer_folder: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    assert [tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [0, 1, 2]
    assert tokenizer.get_vocab_size() <= 400
    for text in ("plain text", " two  spaces\n\ttab", "naïve ☃ 日本語 🦆\u200d", "\x00\x7f", "don't , stop .", MODULE):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    chat = "<|im_start|>user\nhi<|im_end|>\n"
    assert tokenizer.decode(tokenizer.encode(chat).ids, skip_special_tokens=False) == chat
    assert tokenizer.encode(chat).ids[0] == 1


def test_tokenizer_configuration(tokenizer_folder: Path) -> None:
    import jinja2

    config = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (None, "<|im_end|>", "<|endoftext|>")
    rendered = jinja2.Template(config["chat_template"]).render(
        messages=[{"role": "user", "content": "hi"}], add_generation_prompt=True
    )
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ValueError, match="vocab_size: 100"):
        train_tokenizer([], 100, tokenizer_folder)
