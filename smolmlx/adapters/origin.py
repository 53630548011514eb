"""What an export was made from, in words for its card and its header: a path of this machine tells a stranger nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolmlx.models import EMBEDDED, BaseModel, noted_base
from smolmlx.plan import FROM_CONFIG
from smolmlx.rundir import RunDir


@dataclass(frozen=True, slots=True)
class Origin:
    """The model that was exported or, where it was tuned here, the one that it was tuned from."""

    name: str
    """As recorded: a hub id, `tiny` or a path."""
    is_hub_id: bool
    tuned: bool

    @property
    def words(self) -> str:
        if self.is_hub_id:
            return self.name
        return "`tiny`, smolmlx's own model" if self.name == EMBEDDED else f"the local model `{self._last}`"

    @property
    def title(self) -> str:
        """What a GGUF is called in its header."""
        return f"{self._last} fine-tuned" if self.tuned else self._last

    @property
    def _last(self) -> str:
        return Path(self.name).absolute().name


def find_origin(base: BaseModel, adapter: Path | None) -> Origin:
    """Look up what was tuned: beside the adapter, or in the run that a whole model lies in."""
    if base.revision:
        return Origin(base.name, True, adapter is not None)
    if adapter is not None:
        trained = noted_base(adapter)
        return Origin(trained.name, trained.revision is not None, True) if trained else Origin(base.name, False, True)
    run = RunDir(base.folder.absolute().parent)
    found = _read(run.path / "plan.json").get("model") if run.model == base.folder.absolute() else None
    if not isinstance(found, dict) or "id" not in found:
        return Origin(base.name, False, False)
    if found["id"] == FROM_CONFIG:  # trained from nothing: the run is its only name
        return Origin(run.path.name, False, False)
    return Origin(str(found["id"]), bool(found.get("revision")), True)


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON file's table; empty where there is none, which other tools' adapters need not have."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}
