"""Any text survives any kind of file, and any conversation is masked exactly where the assistant speaks."""

from __future__ import annotations

import csv
import gzip
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smolmlx.data.chat import Tokenizer, encode_rendered, find_spans
from smolmlx.data.encode import encode_document
from smolmlx.data.formats import open_source

# Surrogates and unassigned code points are not text.
text = st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=60)
words = text.filter(
    lambda s: "<|" not in s
)  # a special token in a row's text is that token, by the tokenizer's own rule
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(tiny_model)


@quick
@given(
    rows=st.lists(st.tuples(text, text), min_size=1, max_size=8),
    suffix=st.sampled_from([".jsonl", ".jsonl.gz", ".json", ".csv"]),
    mark=st.booleans(),
    ascii_only=st.booleans(),
)
def test_text_survives_files(rows: list[tuple[str, str]], suffix: str, mark: bool, ascii_only: bool) -> None:
    trees = [{"prompt": a, "completion": b} for a, b in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        encoding = "utf-8-sig" if mark else "utf-8"
        if suffix == ".csv":
            with path.open("w", encoding=encoding, newline="") as file:
                writer = csv.DictWriter(file, ["prompt", "completion"])
                writer.writeheader()
                writer.writerows(trees)
        else:
            lines = [json.dumps(tree, ensure_ascii=ascii_only) for tree in trees]
            joined = "[" + ",".join(lines) + "]" if suffix == ".json" else "\n".join(lines)
            data = joined.encode(encoding)
            path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
        found = [(e.messages[0]["content"], e.messages[1]["content"]) for e in open_source(str(path))]
    assert found == rows


@quick
@given(turns=st.lists(st.tuples(words, words), min_size=1, max_size=4), system=st.none() | words)
def test_every_answer_is_learned_and_nothing_else(
    tokenizer: Tokenizer, turns: list[tuple[str, str]], system: str | None
) -> None:
    messages = [{"role": "system", "content": system}] if system is not None else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rendered = find_spans(tokenizer, messages)
    encoded = encode_rendered(tokenizer, rendered)
    learned = [i for i, supervised in zip(encoded.ids, encoded.mask, strict=True) if supervised]
    assert tokenizer.decode(learned, skip_special=False) == "".join(f"{answer}<|im_end|>" for _, answer in turns)
    assert tokenizer.decode(encoded.ids, skip_special=False) == rendered.text
    assert len(encoded.turn_ends) == len(turns)
    assert all(encoded.mask[end - 1] and not encoded.mask[end] for end in encoded.turn_ends)
    # Trained as served: the first prompt is tokenized on its own when serving.
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    prompt = tokenizer.encode(tokenizer.prompt(messages[:first]))
    assert encoded.ids[: len(prompt)] == prompt


@quick
@given(document=words)
def test_documents_end_once(tokenizer: Tokenizer, document: str) -> None:
    ids = encode_document(document, tokenizer)
    assert tokenizer.decode(ids, skip_special=False) == f"{document}<|endoftext|>"
