"""The device: its memory, its limits, and the only calls that exist on Metal alone.

The Metal branches follow MLX's documentation (mx.metal.device_info, set_wired_limit, set_cache_limit) and were not run
on Metal by this project's tests, which run on a Linux CPU.
"""

from __future__ import annotations

import contextlib
import resource
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from smolmlx import memory
from smolmlx.errors import BackendError
from smolmlx_mlx import blas

blas.ensure()

import mlx.core as mx  # noqa: E402 - after the BLAS

__all__ = ["mx"]


def is_metal() -> bool:
    return bool(mx.metal.is_available())


def use(device: str | None) -> str:
    """Make `device` MLX's default and return its name, `gpu` or `cpu`.

    Raises:
        BackendError: a device MLX does not have here.
    """
    wanted = device or ("gpu" if has_gpu() else "cpu")
    if wanted in ("gpu", "metal"):
        if not has_gpu():
            raise BackendError("--device gpu: MLX sees no Metal GPU here. Use --device cpu, or leave --device out.")
        mx.set_default_device(mx.gpu)
        return "gpu"
    if wanted != "cpu":
        raise BackendError(f"--device {wanted}: the MLX engine knows gpu (Metal) and cpu.")
    mx.set_default_device(mx.cpu)
    return "cpu"


def has_gpu() -> bool:
    """Whether MLX has a GPU: Metal, or the CUDA build of MLX."""
    return is_metal() or bool(getattr(mx, "cuda", None) and mx.cuda.is_available())


def info() -> dict[str, Any]:
    return dict(mx.device_info()) if has_gpu() else {}


def name() -> str:
    found = str(mx.device_info().get("device_name", ""))
    return found or "GPU" if has_gpu() else f"CPU {found}".strip()


def memory_bytes() -> int | None:
    """Memory that training may use: the recommended working set on Metal, what the system has elsewhere."""
    if is_metal():
        return int(info()["max_recommended_working_set_size"])
    return memory.host_bytes()


def can_compile() -> bool:
    """mx.compile fuses element-wise work; on the CPU it needs a C++ compiler at run time."""
    return has_gpu() or sys.platform == "darwin" or shutil.which("g++") is not None or shutil.which("c++") is not None


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """On Metal keep the weights wired and bound the allocator's cache; put both back afterwards."""
    if not is_metal():
        yield
        return
    most = int(info()["max_recommended_working_set_size"])
    wired, cache = mx.set_wired_limit(most), mx.set_cache_limit(most // 8)
    try:
        yield
    finally:
        mx.synchronize()
        mx.set_wired_limit(wired)
        mx.set_cache_limit(cache)


def peak_bytes() -> int:
    """Most memory MLX's allocator has held, weights included (whole process on a CPU)."""
    if has_gpu():
        return int(mx.get_peak_memory())
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
