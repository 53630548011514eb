"""Rows to tokens, once for every engine: formats, chat masks, splits, packing, batches."""
