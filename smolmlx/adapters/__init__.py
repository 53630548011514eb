"""Adapters beyond training: convert between PEFT and mlx-lm, look inside, merge, and export what other programs load."""
