"""Make the development environment: a venv with both engines in tested versions, and a fast BLAS on Linux.

Everything is optional but the venv itself: where torch or mlx has no wheel, the engine that can be installed is, and
what is missing is said. Standard library only, since nothing is installed yet.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEAST_PYTHON = (3, 11)
OPENBLAS = Path(f"/usr/lib/{platform.machine()}-linux-gnu/openblas-pthread/libblas.so.3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", default=".venv")
    venv = Path(parser.parse_args().venv)
    if sys.version_info < LEAST_PYTHON:
        least = ".".join(map(str, LEAST_PYTHON))
        sys.exit(
            f"smolmlx needs Python {least} or newer (mlx-lm, numpy, transformers and trl do); {sys.executable} is {platform.python_version()}. "
            f"Name a newer one: make PYTHON=python{least} ..."
        )
    run(sys.executable, "-m", "venv", str(venv))
    python = str(venv / "bin" / "python")
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    # torch first and pinned: a looser request would fetch gigabytes of CUDA packages onto a machine without a GPU.
    run(*pip, torch_requirement())
    extras = "mlx,cuda,dev,parquet,report,dedupe,judge,gguf"
    run(*pip, "--constraint", str(ROOT / "constraints.txt"), "--editable", f"{ROOT}[{extras}]")
    install_blas(pip)
    run(str(venv / "bin" / "smolmlx"), "doctor")


def torch_requirement() -> str:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line.split("#")[0].strip() for line in lines if line.startswith("torch=="))


def install_blas(pip: tuple[str, ...]) -> None:
    """MLX's CPU wheel is 14 times slower without one: Debian's OpenBLAS where we may install it, else MKL from PyPI."""
    if sys.platform != "linux" or OPENBLAS.exists():
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = {"check": False, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(["apt-get", "update", "-qq"], **quiet)
        subprocess.run(["apt-get", "install", "-y", "-qq", "libopenblas0-pthread"], **quiet)
    if not OPENBLAS.exists() and platform.machine() == "x86_64":
        run(*pip, "mkl")


def run(*command: str) -> None:
    print("+", " ".join(command), flush=True)
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"failed: {' '.join(command)}")


if __name__ == "__main__":
    main()
