"""How MLX says that memory has run out.

On a Linux CPU MLX 0.32 does not: it writes through the null pointer and the process is gone.
"""

from __future__ import annotations

_WORDS = (
    "malloc]",  # [malloc], [metal::malloc]: more than the device or one buffer may hold
    "unable to allocate",
    "insufficient memory",  # a Metal command buffer
    "out of memory",  # CUDA's runtime
    "bad_alloc",
)


def ran_out(error: Exception) -> bool:
    text = str(error).lower()
    return any(word in text for word in _WORDS)
