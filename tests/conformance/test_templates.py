"""Our rendering of chat templates is that of transformers, which servers use, text and tokens alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smolmlx.data.chat import Tokenizer
from smolmlx.data.formats import open_source

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add ünits",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
TALKS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
    "system": [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ok"},
    ],
    "two": [{"role": r, "content": f"<b>{i}</b>\n\n"} for i, r in enumerate(("user", "assistant") * 2)],
    "thinking": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"},
        {"role": "user", "content": "日本"},
    ],
}


@pytest.mark.parametrize("folder", ["smollm2-135m-instruct", "qwen3"])
@pytest.mark.parametrize("prompt", [False, True], ids=["whole", "prompt"])
@pytest.mark.parametrize(
    "variables", [{}, {"enable_thinking": False}, {"tools": [TOOL]}], ids=["plain", "no thinking", "tools"]
)
@pytest.mark.parametrize("name", TALKS)
def test_text_and_tokens(assets: Path, folder: str, name: str, prompt: bool, variables: dict[str, Any]) -> None:
    ours = Tokenizer(assets / "tokenizers" / folder)
    theirs = load(assets / "tokenizers" / folder)
    text = theirs.apply_chat_template(TALKS[name], tokenize=False, add_generation_prompt=prompt, **variables)
    assert ours.render(TALKS[name], generation_prompt=prompt, **variables) == text
    assert ours.encode(text) == list(theirs(text, add_special_tokens=False)["input_ids"])


def test_real_rows(assets: Path) -> None:
    folder = assets / "tokenizers" / "smollm2-135m-instruct"
    ours, theirs = Tokenizer(folder), load(folder)
    for row in list(open_source(str(assets / "data" / "taskmaster_messages.jsonl")))[::40]:
        assert ours.render(row.messages) == theirs.apply_chat_template([dict(m) for m in row.messages], tokenize=False)


_loaded: dict[Path, Any] = {}


def load(folder: Path) -> Any:
    if folder not in _loaded:
        _loaded[folder] = transformers.AutoTokenizer.from_pretrained(folder)
    return _loaded[folder]
