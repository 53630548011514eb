"""Buffers that were freed are used again where an engine asks for it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import numpy as np
from smolmlx import memory

def step():
    held = [np.ones(1 << 21) for _ in range(8)]  # 16 MB each

{first}
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_buffers_are_kept() -> None:
    def faults(first: str) -> int:
        found = subprocess.run([sys.executable, "-c", FAULTS.format(first=first)], capture_output=True, check=True)
        return int(found.stdout)

    plain, kept = faults(""), faults("memory.keep_freed()")
    assert kept < plain / 4, f"{kept} page faults for buffers that were freed before, {plain} by default"
