"""Unsloth, the faster path on NVIDIA: the only file that imports it.

Not run on a GPU by this project so far. Unsloth must be imported before trl, transformers and peft, so `prepare` is
called before this package imports any of them.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

from smolmlx.plan import Plan

_switched_off = False
"""The recipe at hand has `cuda.unsloth: off`; set when its plan is checked, before anything is imported."""


def installed() -> bool:
    return importlib.util.find_spec("unsloth") is not None


def check(plan: Plan) -> list[str]:
    """Note whether a plan wants Unsloth imported, and return why it cannot have what it asks for."""
    global _switched_off
    wanted = plan.recipe.cuda.get("unsloth", "auto")
    _switched_off = wanted in ("off", False)
    fast, why = decide(plan)
    if wanted in ("on", True) and not fast:
        return [f"cuda.unsloth: 'on', but this runs on {why}. Change that, or set cuda.unsloth: auto."]
    return []


def prepare(device: str) -> None:
    """Import Unsloth first where it may be used: on CUDA, unless the recipe or SMOLMLX_UNSLOTH says off."""
    if device == "cuda" and installed() and not _switched_off and os.environ.get("SMOLMLX_UNSLOTH") != "off":
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(tempfile.gettempdir()) / "unsloth_compiled_cache"))
        import unsloth  # noqa: F401


def decide(plan: Plan) -> tuple[bool, str]:
    """Return whether a plan runs on Unsloth, and why."""
    wanted = plan.recipe.cuda.get("unsloth", "auto")
    reasons = (
        (wanted in ("off", False), "cuda.unsloth is off"),
        (os.environ.get("SMOLMLX_UNSLOTH") == "off", "SMOLMLX_UNSLOTH is off"),
        (plan.recipe.cuda.get("attention", "sdpa") != "sdpa", "cuda.attention, which Unsloth chooses itself"),
        (plan.capabilities.device != "cuda", f"Unsloth's kernels are for NVIDIA, this is {plan.capabilities.device}"),
        (not installed(), "Unsloth is not installed (pip install 'smolmlx[unsloth]')"),
        (plan.full, "full-parameter training"),
        (plan.recipe.lora.dora, "DoRA"),
        (
            plan.recipe.lora.last_layers is not None or plan.recipe.lora.targets != "all-linear",
            "adapters on some layers only",
        ),
        (plan.dtype == "float32", "float32 weights"),
        (
            plan.pairs is not None and plan.pairs.shared,
            "prompts shared by two answers, verified on plain transformers only (dpo.shared_prompt: false)",
        ),
        (
            plan.train.packed and plan.pairs is None,
            "packed rows, whose isolation is verified on plain transformers only",
        ),
    )
    against = next((reason for holds, reason in reasons if holds), None)
    return (True, "Unsloth") if against is None else (False, f"plain TRL: {against}")


def load(folder: Path, plan: Plan) -> Any:
    """Load a base model and put an untrained adapter on it; Unsloth's 4-bit and checkpointing defaults are off."""
    from unsloth import FastLanguageModel

    from smolmlx_cuda.model import DTYPES

    recipe = plan.recipe
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=max(plan.train.widths),
        dtype=DTYPES[plan.dtype],
        load_in_4bit=recipe.model.quantize == "4bit",
        load_in_8bit=recipe.model.quantize == "8bit",
        use_gradient_checkpointing=recipe.train.gradient_checkpointing,
        use_exact_model_name=True,
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=recipe.lora.r,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=sorted({name.rpartition(".")[2] for name in plan.targets}),
        use_rslora=recipe.lora.rslora,
        bias="none",
        use_gradient_checkpointing=recipe.train.gradient_checkpointing,
        random_state=recipe.train.seed,
    )
