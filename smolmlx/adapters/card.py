"""The card of an export: what it was made from, and what was verified of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from smolmlx.adapters.origin import find_origin
from smolmlx.adapters.verification import describe

if TYPE_CHECKING:
    from smolmlx.adapters.exports import Export, Source

NAME = "README.md"


def card(done: Export, source: Source) -> str:
    """Return the card as Markdown, with the hub's front matter; only a hub id is named as its base there."""
    origin = find_origin(source.base, source.adapter)
    library = {"hf": "transformers", "vllm": "transformers", "mlx": "mlx", "gguf": "gguf"}[done.target]
    head = [f"base_model: {json.dumps(origin.name)}"] if origin.is_hub_id else []
    head += [f"library_name: {library}", "tags: [smolmlx]"]
    title = done.path.stem if done.path.suffix.lower() == ".gguf" else done.path.absolute().name
    if origin.tuned:
        made = f"Fine-tuned from {origin.words}, and exported with smolmlx ({done.precision})."
    else:
        made = f"This is {origin.words}, exported with smolmlx ({done.precision})."
    lines = [f"* {text}" for text in (*map(describe, done.agreements), *done.notes)]
    lines += [f"* not verified: {text}" for text in done.unverified]
    return "\n".join(["---", *head, "---", "", f"# {title}", "", made, "", *lines, ""])
