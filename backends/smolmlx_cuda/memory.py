"""How torch says that memory has run out."""

from __future__ import annotations

import torch

_WORDS = (
    "can't allocate memory",  # the CPU's allocator
    "not enough memory",  # the same, on other systems
    "Cannot allocate memory",  # a file that could not be mapped
    "out of memory",  # CUDA's runtime, MPS
    "ALLOC_FAILED",  # cuBLAS and cuDNN
    "bad_alloc",
)


def ran_out(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in _WORDS)
