"""From a folder that is neither a model nor an adapter to those that lie in it, which were meant.

Such folders: a run (adapter/ or model/), a pipeline (one run for each stage), a folder of runs, an export for vLLM (merged/).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_DEPTHS = ("", "*/", "*/*/")
"""Of what lies in a run, in a pipeline or a folder of runs, in a folder of pipelines."""
_SHOWN = 3


def find_results(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the whole models and the adapters of the runs and exports in a folder: the nearest, where they lie at several depths."""
    for depth in _DEPTHS:
        models = [found for name in ("model", "merged") for found in folder.glob(f"{depth}{name}")]
        models = sorted(found for found in models if (found / "config.json").is_file())
        adapters = sorted(
            found for found in folder.glob(f"{depth}adapter") if (found / "adapter_config.json").is_file()
        )
        if models or adapters:
            return models, adapters
    return [], []


def listed(folders: Sequence[Path | str], word: str = "and") -> str:
    """Return the first names in a sentence: 'a', 'a or b', 'a, b, c or 4 more'."""
    names = [str(folder) for folder in folders[:_SHOWN]]
    names += [f"{len(folders) - _SHOWN} more"] if len(folders) > _SHOWN else []
    return f" {word} ".join([", ".join(names[:-1]), names[-1]] if names[:-1] else names)
