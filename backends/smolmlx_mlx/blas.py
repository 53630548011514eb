"""Load a fast BLAS before mlx.core on Linux.

The `mlx[cpu]` wheel carries the reference BLAS, whose matrix products run at a few GFLOP/s. A BLAS that is already in
the process with global symbols takes its place and makes a training step about 14 times faster. Nothing to do on macOS,
where MLX uses Accelerate and Metal.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from smolmlx import memory

ADVICE = "apt-get install libopenblas0-pthread, or pip install mkl (x86-64)"


@dataclass(frozen=True, slots=True)
class Blas:
    """What was found. `fast` is False when matrix products will crawl."""

    name: str
    path: str | None
    fast: bool


_loaded: Blas | None = None
_library: ctypes.CDLL | None = None
_SET_THREADS = ("openblas_set_num_threads", "MKL_Set_Num_Threads")


def ensure() -> Blas:
    """Load the best BLAS of this machine once; later calls return what the first found.

    Must run before `mlx.core` is imported anywhere in the process.
    """
    global _loaded
    if _loaded is None:
        _loaded = _load()
    return _loaded


def set_threads(count: int) -> bool:
    """Let a call of the BLAS use `count` threads; False where none was loaded here that can be told."""
    for name in _SET_THREADS:
        if _library is not None and (setter := getattr(_library, name, None)):
            setter(count)
            return True
    return False


def _load() -> Blas:
    global _library
    if sys.platform != "linux":
        return Blas("Accelerate", None, True)
    memory.keep_freed()
    _feed_all_lanes()
    if "mlx.core" in sys.modules:
        return Blas("unknown (mlx was imported before smolmlx)", None, False)
    for name, path in _candidates():
        try:
            _library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return Blas(name + _kernels(_library), str(path), True)
    return Blas("reference BLAS of the mlx wheel", None, False)


def _kernels(library: ctypes.CDLL) -> str:
    """Return " (name of the kernels)" where the library tells them, else nothing: a processor it takes for an older one is half as fast."""
    ask = getattr(library, "openblas_get_corename", None)
    if ask is None:
        return ""
    ask.restype = ctypes.c_char_p
    return f" ({ask().decode()} kernels)"


def _feed_all_lanes() -> None:
    """Let MLX go through a graph breadth first, up to this width, so that the streams of all cores get work in turn.

    It hands out a bounded number of operations at a time. By default it goes deep where a graph is wider than 20: a step
    over pairs then gave one core hundreds of operations in a row while the other waited (a third longer steps: benchmarks/README.md).
    """
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "100")


def _candidates() -> list[tuple[str, Path]]:
    """OpenBLAS of the distribution, then MKL of a wheel in this environment."""
    triple = f"{platform.machine()}-linux-gnu"
    folders = [Path("/usr/lib") / triple, Path("/usr/lib64"), Path("/usr/lib"), Path(sys.prefix) / "lib"]
    # The libblas.so.3 beside OpenBLAS exports cblas and Fortran symbols alike; libopenblas.so.0 does so elsewhere.
    names = ("openblas-pthread/libblas.so.3", "openblas-openmp/libblas.so.3", "libopenblas.so.0", "libopenblas.so")
    found = [("OpenBLAS", folder / name) for name in names for folder in folders]
    found += [("MKL", path) for path in sorted((Path(sys.prefix) / "lib").glob("libmkl_rt.so*"), reverse=True)]
    return [(name, path) for name, path in found if path.exists()]
