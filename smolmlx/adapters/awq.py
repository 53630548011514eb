"""Quantize a merged model to 4 bits by AWQ (https://arxiv.org/abs/2306.00978) for vLLM, through llm-compressor.

llm-compressor (Apache-2.0, of the vLLM project) took AutoAWQ's place, which is no longer maintained. It needs an NVIDIA
GPU, and rows to run through the model: channels that they excite most keep the most precision.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from smolmlx import backend as backends
from smolmlx.data.chat import Tokenizer
from smolmlx.data.encode import Account, Encoding, encode_rows
from smolmlx.data.formats import open_source
from smolmlx.errors import BackendError, DataError, RecipeError
from smolmlx.models import BaseModel

NUM_ROWS, MAX_TOKENS = 256, 2048
"""Rows that are run through the model at most, and tokens of each: llm-compressor's own examples."""
_GROUPS = (128, 64, 32)
"""Weights that share a scale, as vLLM's kernels take them; SmolLM2-135M's 576 columns do not divide by 128."""


def refuse(calibration: str | None) -> None:
    """Refuse what cannot work here, before anything is written.

    Raises:
        RecipeError: no rows to calibrate with.
        BackendError: no NVIDIA GPU, or llm-compressor is not installed; all reasons at once.
    """
    reasons = []
    if not backends.has_nvidia():
        reasons.append("no NVIDIA GPU was found. Run it where there is one, or use: smolmlx export gguf --type q4_k_m")
    if importlib.util.find_spec("llmcompressor") is None:
        reasons.append("llm-compressor is not installed. pip install 'smolmlx[awq]'")
    if reasons:
        raise BackendError("--quantize awq", reasons)
    if calibration is None:
        raise RecipeError("--quantize awq needs rows to calibrate with: --calibration train.jsonl, as in training.")


def read_calibration(name: str, tokenizer: Tokenizer) -> list[list[int]]:
    """Return token ids of the first rows of a file, in the template of training.

    Raises:
        DataError: a file that cannot be read, or no row in it.
    """
    how = Encoding(MAX_TOKENS, loss_on="all", history="last_turn", overlong="truncate_prompt")
    rows = encode_rows(open_source(name), tokenizer, how, Account())
    found = [row.ids for row in itertools.islice(rows, NUM_ROWS)]
    if not found:
        raise DataError(f"--calibration {name}: no row could be used. Look at it: smolmlx data inspect {name}")
    return found


def group_size(base: BaseModel) -> int:
    """Return the largest group that divides every linear layer's width.

    Raises:
        RecipeError: there is none.
    """
    widths = {width_in for width_in, _ in base.linear_shapes().values()}
    found = next((size for size in _GROUPS if not any(width % size for width in widths)), None)
    if found is None:
        raise RecipeError(
            f"--quantize awq: layers of {min(widths)} columns do not divide into groups of {_GROUPS[-1]}."
        )
    return found


def quantize(merged: Path, out: Path, rows: Sequence[Sequence[int]], group: int) -> None:
    """Write `merged` with 4-bit weights, in the compressed-tensors format that vLLM and transformers load."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto", local_files_only=True)
    columns = {"input_ids": [list(row) for row in rows], "attention_mask": [[1] * len(row) for row in rows]}
    # Symmetric: transformers 5.23 does not load the packed zero points that compressed-tensors 0.19 writes.
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    scheme = QuantizationModifier(
        config_groups={"linear": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
    )
    with contextlib.redirect_stdout(sys.stderr):
        oneshot(
            model=model,
            processor=AutoTokenizer.from_pretrained(merged, local_files_only=True),
            dataset=Dataset.from_dict(columns),
            recipe=[AWQModifier(duo_scaling="both"), scheme],
            num_calibration_samples=len(rows),
            max_seq_length=MAX_TOKENS,
        )
        model.save_pretrained(out, save_compressed=True)
    (out / "recipe.yaml").unlink(missing_ok=True)  # llm-compressor's; here that name means an unfinished run
