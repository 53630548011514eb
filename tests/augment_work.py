"""Documents, a registry and a reading of results that tests of augmentation share."""

from __future__ import annotations

from pathlib import Path

import lab as labs
from smolmlx.tasks import MADE
from smolmlx.tasks.registry import Registry


def prose(document: int, sentences: int) -> str:
    """Return sentences that no other document has."""
    parts = [
        f"Document {document} says in sentence {i} that {labs.sentence(document * 97 + i)}." for i in range(sentences)
    ]
    return "\n\n".join(" ".join(parts[i : i + 5]) for i in range(0, len(parts), 5))


def always(registry: Registry, probability: float = 1.0) -> Registry:
    """Return a registry in which every chunk gets every task."""
    tree = registry.model_dump(by_alias=True)
    for name in MADE:
        tree["tasks"][name]["probability"] = probability
    return Registry.model_validate(tree)


def published(folder: Path) -> dict[str, bytes]:
    """Return the bytes of everything but the journal, whose order is that of the answers."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "journal.jsonl"}
