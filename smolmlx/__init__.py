"""smolmlx: fine-tune small language models with one recipe on MLX and on PyTorch."""
__version__ = "0.1.0"
