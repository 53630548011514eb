"""The MLX engine: mlx-lm's models and LoRA layers, our own compiled training step.

mlx is imported by the modules of this package, which are imported when they are first needed: on Linux a fast BLAS must
be in the process before `mlx.core` is (see `blas`).
"""

from smolmlx_mlx.engine import MlxBackend

backend = MlxBackend()
__all__ = ["backend"]
