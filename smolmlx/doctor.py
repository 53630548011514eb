"""Checks of the engines and of this machine, for `smolmlx doctor`."""

from __future__ import annotations

import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from typing import Any

from smolmlx import __version__, backend
from smolmlx.data.store import cache_folder
from smolmlx.errors import BackendError
from smolmlx.models import embedded_folder


@dataclass(frozen=True, slots=True)
class Check:
    """What was found of one engine."""

    name: str
    passed: bool
    summary: str
    details: tuple[str, ...] = ()
    fix: str = ""


def check() -> list[Check]:
    """Check every installed engine, and name those that could be installed."""
    names = list(backend.installed())
    return [_check(name) for name in names] or [
        Check("engines", False, "none installed", fix="pip install 'smolmlx[mlx]' or 'smolmlx[cuda]'")
    ]


def _check(name: str) -> Check:
    """Try an engine on its best device, then on the CPU."""
    fix = ""
    for device in (None, "cpu"):
        try:
            engine = backend.load(name)
            capabilities = engine.capabilities(device)
        except BackendError as error:
            problem = fix = str(error)
            continue
        versions = ", ".join(f"{key} {value}" for key, value in engine.versions().items())
        where = capabilities.device_name if device is None else f"{capabilities.device_name} only, with --device cpu"
        details = [versions, f"dtype {capabilities.dtype} ({capabilities.dtype_reason})", *capabilities.notes]
        details += [f"no {value}: {why}" for value, why in capabilities.missing.items()]
        return Check(name, True, where, tuple(details), fix if device else "")
    return Check(name, False, problem, fix=f"pip install 'smolmlx[{name}]'" if "not installed" in problem else "")


def verdict() -> str:
    """Say what `--backend auto` would choose, and the state of everything else."""
    try:
        choice = backend.choose()
        chosen = f"--backend auto takes {choice.backend.name}: {choice.reason}"
    except BackendError as error:
        chosen = str(error)
    space = shutil.disk_usage(cache_folder().parent if cache_folder().parent.exists() else ".").free
    tiny = "present" if (embedded_folder() / "model.safetensors").is_file() else "missing"
    return (
        f"{chosen}\nsmolmlx {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}; "
        f"embedded model {tiny}; cache {cache_folder()} ({space / 1e9:.0f} GB free)"
    )


def to_json(checks: list[Check]) -> dict[str, Any]:
    return {
        "smolmlx": __version__,
        "python": sys.version.split()[0],
        "engines": [asdict(item) for item in checks],
        "verdict": verdict(),
    }
