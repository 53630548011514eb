"""smolmlx: fine-tune small language models with one recipe on MLX and on PyTorch.

The verbs of the command line as functions. Names are looked up when first used, so that importing the package loads no
array library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Model", "Run", "SweepRun", "__version__", "convert_adapter", "evaluate", "load", "sweep", "train"]

if TYPE_CHECKING:
    from smolmlx.api import Model, Run, SweepRun, convert_adapter, evaluate, load, sweep, train

_IN_API = {"Model", "Run", "SweepRun", "convert_adapter", "evaluate", "load", "sweep", "train"}


def __getattr__(name: str) -> Any:
    if name in _IN_API:
        return getattr(importlib.import_module("smolmlx.api"), name)
    raise AttributeError(f"module 'smolmlx' has no attribute '{name}'")
