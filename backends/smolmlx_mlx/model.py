"""Load mlx-lm's models, put LoRA on them, and translate names between PEFT and MLX.

B batch, T tokens, S supervised positions, D width, V vocabulary, R rank.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from smolmlx_mlx import blas

blas.ensure()

import mlx.core as mx  # noqa: E402 - after the BLAS
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402
from mlx_lm.tuner.dora import DoRALinear  # noqa: E402
from mlx_lm.tuner.lora import LoRALinear  # noqa: E402
from mlx_lm.tuner.utils import load_adapters  # noqa: E402
from mlx_lm.utils import dequantize_model, load_model  # noqa: E402

from smolmlx.adapters.convert import convert  # noqa: E402
from smolmlx.adapters.hf_config import readable  # noqa: E402
from smolmlx.errors import BackendError, RecipeError  # noqa: E402
from smolmlx.models import BaseModel, check_adapter_folder  # noqa: E402
from smolmlx.peft_config import DEFAULT_ALPHA, DEFAULT_RANK  # noqa: E402
from smolmlx.plan import PEFT_PREFIX  # noqa: E402
from smolmlx.session import Arrays, load_arrays  # noqa: E402
from smolmlx_mlx.cpu_math import use_fast_math  # noqa: E402
from smolmlx_mlx.engine import GROUP, odd_layers  # noqa: E402
from smolmlx_mlx.lora import EagerLoRALinear, KeyedDropout  # noqa: E402

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_BITS = {"4bit": 4, "8bit": 8}
_LEAVES = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "m"}


def load_base(folder: Path, config: Mapping[str, Any], dtype: str, quantize: str) -> nn.Module:
    """Load a base model in `dtype`, quantized if asked; on a CPU the quantized values are held in `dtype`.

    Raises:
        BackendError: mlx-lm has no such architecture.
        RecipeError: the weights do not fit the config, or cannot be quantized.
    """
    try:
        model, _ = load_model(folder, model_config=readable(config))
    except ValueError as error:
        if "not supported" in str(error):
            raise BackendError(
                f"{folder}: mlx-lm has no model of type '{config.get('model_type')}'. Try --backend cuda."
            ) from error
        why = " ".join(str(error).split())[:300]
        raise RecipeError(
            f"{folder}: the weights do not fit config.json: {why} Fetch the folder again, whole."
        ) from error
    except (TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise RecipeError(
            f"{folder}: mlx-lm cannot read config.json ({error}). Try --backend cuda, or mend the file."
        ) from error
    except SystemExit as error:  # mlx-lm's olmo, where its package is missing
        raise BackendError(
            f"{folder}: mlx-lm's '{config.get('model_type')}' needs the package named above. Install it, or try --backend cuda."
        ) from error
    model.set_dtype(DTYPES[dtype])
    if quantize != "none":
        odd = [path for path, module in model.named_modules() if _in_block(path, module) and not _can_quantize(module)]
        if odd:
            raise RecipeError(f"{folder}: {odd_layers(quantize, odd)}")
        nn.quantize(
            model,
            group_size=GROUP,
            bits=_BITS[quantize],
            class_predicate=_in_block,
        )
    if mx.default_device() == mx.cpu:
        dequantize_model(model)  # the same values; MLX multiplies quantized weights on one core, without the BLAS
        use_fast_math(model)
    model.freeze()
    mx.eval(model.parameters())
    return model


def _in_block(path: str, module: nn.Module) -> bool:
    return ".layers." in path and isinstance(module, nn.Linear)


def _can_quantize(module: nn.Module) -> bool:
    return bool(module.weight.shape[-1] % GROUP == 0)


def add_lora(
    model: nn.Module, targets: Mapping[str, Any], rank: int, scale: float, dropout: float = 0.0, dora: bool = False
) -> None:
    """Replace the target layers by mlx-lm's LoRA layers; only those train."""
    kind = DoRALinear if dora else LoRALinear
    modules = dict(model.named_modules())
    layers = [(path, kind.from_base(modules[path], r=rank, scale=scale, dropout=dropout)) for path in targets]
    for _, layer in layers:
        if dropout:
            layer.dropout.__class__ = KeyedDropout
        elif kind is LoRALinear:
            layer.__class__ = EagerLoRALinear
    model.update_modules(tree_unflatten(layers))
    model.freeze()
    for _, layer in layers:
        layer.unfreeze(keys=["lora_a", "lora_b", "m"] if dora else ["lora_a", "lora_b"], recurse=False)


def load_adapter(model: nn.Module, folder: Path, base: BaseModel | None = None) -> None:
    """Put a PEFT adapter folder on a base model.

    Args:
        base: what `model` was loaded from; else the one that the adapter names, where that is a folder here.

    Raises:
        RecipeError: not a LoRA adapter, or made for another base.
        DataError: broken files.
    """
    config = check_adapter_folder(folder)
    arrays = load_arrays(folder / "adapter_model.safetensors")
    more = any(config.get(key) for key in ("rank_pattern", "alpha_pattern", "target_parameters"))
    if more or not all(split_name(name)[1] for name in arrays):
        _load_converted(model, folder, base)
        return
    paths = sorted({split_name(name)[0] for name in arrays})
    modules = dict(model.named_modules())
    strangers = [path for path in paths if path not in modules]
    if strangers:
        raise RecipeError(
            f"{folder}: made for another base model: it adapts {strangers[0]} (and {len(strangers) - 1} more), which this model lacks."
        )
    rank, alpha = int(config.get("r", DEFAULT_RANK)), float(config.get("lora_alpha", DEFAULT_ALPHA))
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    add_lora(model, dict.fromkeys(paths), rank, scale, 0.0, bool(config.get("use_dora")))
    write_weights(model, arrays, folder)


class Adapters:
    """Puts adapters on one loaded base and takes them off again; each is read once."""

    def __init__(self, model: nn.Module, base: BaseModel | None = None) -> None:
        self._model, self._source = model, base
        self._base = dict(tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))
        self._known: dict[Path, list[tuple[str, nn.Module]]] = {}

    def use(self, folder: Path | None) -> None:
        """Answer with an adapter, or with none.

        Raises:
            RecipeError: not a LoRA adapter, or made for another base; the base is left bare then.
        """
        self._model.update_modules(tree_unflatten(list(self._base.items())))
        if folder is None:
            return
        if folder in self._known:
            self._model.update_modules(tree_unflatten(self._known[folder]))
            return
        load_adapter(self._model, folder, self._source)
        modules = dict(self._model.named_modules())
        self._known[folder] = [(path, modules[path]) for path, own in self._base.items() if modules[path] is not own]


def _load_converted(model: nn.Module, folder: Path, base: BaseModel | None) -> None:
    """Load what is more than LoRA of one rank and scale on linear layers, in the form that mlx-lm itself reads."""
    with tempfile.TemporaryDirectory(prefix="smolmlx-") as parent:
        found = convert(folder, Path(parent) / "mlx", "mlx", base)
        try:
            load_adapters(model, str(found.folder))
        except ValueError as error:
            raise RecipeError(
                f"{folder}: made for another base model: {str(error).splitlines()[-1].strip()}"
            ) from error
        mx.eval(model.parameters())


def split_name(name: str) -> tuple[str, str]:
    """Split a PEFT tensor name into module path and leaf, e.g. ('model.layers.0.mlp.up_proj', 'lora_A.weight')."""
    bare = name.removeprefix(PEFT_PREFIX)
    if bare.endswith("lora_magnitude_vector.weight"):
        bare = bare.removesuffix(".weight")
    for leaf in _LEAVES:
        if bare.endswith(f".{leaf}"):
            return bare.removesuffix(f".{leaf}"), leaf
    return bare, ""


def to_mlx(name: str) -> str:
    """Translate a canonical (PEFT or HF) tensor name to MLX's parameter path."""
    path, leaf = split_name(name)
    return f"{path}.{_LEAVES[leaf]}" if leaf else path


def from_mlx(path: str) -> str:
    """Translate an MLX parameter path to its canonical name."""
    for leaf, short in _LEAVES.items():
        if path.endswith(f".{short}"):
            return f"{PEFT_PREFIX}{path.removesuffix(short)}{leaf}"
    return path


def read_arrays(tree: Any) -> Arrays:
    """Return a tree of MLX arrays as float32 numpy under canonical names, in PEFT's orientation."""
    found = {}
    for path, array in tree_flatten(tree):
        value = np.array(array.astype(mx.float32))
        found[from_mlx(path)] = np.ascontiguousarray(value.T) if path.endswith((".lora_a", ".lora_b")) else value
    return found


def to_tree(arrays: Arrays) -> list[tuple[str, mx.array]]:
    """Return canonical numpy arrays as (MLX path, float32 array)."""
    found = []
    for name, value in arrays.items():
        path = to_mlx(name)
        found.append(
            (path, mx.array(np.ascontiguousarray(value.T) if path.endswith((".lora_a", ".lora_b")) else value))
        )
    return found


def write_weights(model: nn.Module, arrays: Arrays, source: Path | None = None) -> None:
    """Load canonical arrays into a model's parameters, keeping each parameter's type for whole models.

    Raises:
        RecipeError: a tensor of another shape than the model's.
    """
    current = dict(tree_flatten(model.parameters()))
    fresh = []
    for path, value in to_tree(arrays):
        if path not in current or current[path].shape != value.shape:
            raise RecipeError(
                f"{source or 'weights'}: made for another base model: {path} is {value.shape}, the model has {getattr(current.get(path), 'shape', 'none')}."
            )
        adapter = path.endswith((".lora_a", ".lora_b", ".m"))
        fresh.append((path, value if adapter else value.astype(current[path].dtype)))
    model.update(tree_unflatten(fresh))
    mx.eval(model.parameters())


class PackedMask:
    """Stands where mlx-lm expects a cache and gives each layer a block-diagonal mask, so that packed rows stay apart.

    Rotary attention is relative, so positions need no reset at a document's start.
    """

    offset = 0
    is_causal = True
    """No token sees a later one."""

    def __init__(self, segments: mx.array) -> None:
        """segments: [B, T]."""
        self.segments = segments

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Return [B, 1, T, T]: same document, not later, and inside the window of a sliding-window layer."""
        place = mx.arange(length)
        mask = (self.segments[:, None, :, None] == self.segments[:, None, None, :]) & (place[:, None] >= place[None])
        return mask & (place[:, None] < place[None] + window_size) if window_size else mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values


Head = Callable[[mx.array], mx.array]


def split_head(model: nn.Module) -> tuple[Callable[..., mx.array], Head, nn.Module]:
    """Return (body, head, owner): body(ids, cache) -> [B, T, D] and head([S, D]) -> [S, V], so that logits are made where needed.

    `owner` is the module that holds the head's weights.

    Models that do more between the two (scaling, soft capping) are found by comparing with the model's own output; for
    them the body returns all logits and the head passes them through.
    """
    inner = getattr(model, "model", None)
    if inner is not None:
        tied = "lm_head" not in model
        owner = inner.embed_tokens if tied else model.lm_head
        head: Head = owner.as_linear if tied else owner
        probe = mx.array([[1, 2, 3]])
        own, ours = model(probe), head(inner(probe))
        if own.shape == ours.shape and bool(mx.allclose(own, ours, atol=1e-3).item()):
            return inner, head, owner
    return model, lambda logits: logits, nn.Identity()
