"""Write a merged model as GGUF through the `gguf` package: names, order of rotary halves, hyperparameters, types.

What llama.cpp computes differently from a config is refused, not approximated.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from smolmlx.adapters.gguf_vocab import adds_special, read_vocabulary
from smolmlx.adapters.hf_config import sliding_window
from smolmlx.adapters.merge import Prepared
from smolmlx.adapters.tensors import Floats, to_floats
from smolmlx.base_config import is_size
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import BackendError, DataError, RecipeError, RunError, nearest
from smolmlx.peft_config import is_number

if TYPE_CHECKING:
    from gguf import GGUFWriter

PLAIN_TYPES = ("f32", "f16", "bf16", "q8_0")
K_TYPES = ("q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
_QUANTIZE = """
import sys, gguf, llama_cpp
source, out, kind = sys.argv[1:]
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = int(gguf.LlamaFileType[f"MOSTLY_{kind}"])
sys.exit(llama_cpp.llama_model_quantize(source.encode(), out.encode(), settings))
"""


@dataclass(frozen=True, slots=True)
class Architecture:
    """How llama.cpp stores a model type."""

    name: str
    interleaved: bool = False
    """Whether rotary pairs are neighbours, so that rows of q and k are reordered."""
    norm_plus_one: bool = False
    """Whether norms are stored with the 1 added that the model adds."""


ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True),
    "smollm3": Architecture("smollm3", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", norm_plus_one=True),
    "gemma2": Architecture("gemma2", norm_plus_one=True),
    "gemma3_text": Architecture("gemma3", norm_plus_one=True),
}


def find_type(name: str) -> str:
    """Return a type by its name in any case.

    Raises:
        RecipeError: there is none of that name.
    """
    known, kind = (*PLAIN_TYPES, *K_TYPES), name.lower()
    if kind in known:
        return kind
    longer = [f"'{one}'" for one in known if kind and one.startswith(kind)]
    hint = f" Did you mean {' or '.join(longer)}?" if longer else nearest(kind, known)
    raise RecipeError(f"--type {name}: expected {', '.join(known)}.{hint}")


def write_gguf(prepared: Prepared, out: Path, kind: str, name: str) -> None:
    """Write `out` in one of PLAIN_TYPES; one tensor is in memory at a time. What rounding takes is added to the tallies.

    Raises:
        BackendError: the gguf package is not installed.
        RecipeError: an architecture, tokenizer or setting that llama.cpp does not hold.
    """
    gguf = import_gguf()
    config = prepared.config
    architecture = find_architecture(config)
    writer = gguf.GGUFWriter(out, architecture.name)
    writer.add_type("model")
    writer.add_name(name)
    _add_hyperparameters(writer, config, architecture, kind)
    _add_tokenizer(writer, prepared.tokenizer, config)
    names = gguf.get_tensor_name_map(_arch_key(gguf, architecture), int(config["num_hidden_layers"]))
    jobs = []
    for stored in sorted(prepared.tensors, key=_natural):
        made = prepared.tensors[stored]
        target = names.get_name(stored, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise RecipeError(f"{stored}: llama.cpp's {architecture.name} has no place for this weight.")
        jobs.append((target, stored, _type_of(gguf, made.shape, kind)))
    factors = _rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for target, stored, type_ in jobs:
        shape = prepared.tensors[stored].shape
        packed = gguf.quant_shape_to_byte_shape(shape, type_)
        if type_ in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            dtype = np.dtype(np.float32 if type_ == gguf.GGMLQuantizationType.F32 else np.float16)
            writer.add_tensor_info(target, shape, dtype, int(np.prod(packed)))
        else:
            writer.add_tensor_info(target, packed, np.dtype(np.uint8), int(np.prod(packed)), type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for _, stored, type_ in jobs:
        made = prepared.tensors[stored]
        values = _arranged(to_floats(np.ascontiguousarray(made.words()), made.dtype), stored, config, architecture)
        words = gguf.quants.quantize(values, type_)
        writer.write_tensor_data(words)
        if stored in prepared.tallies:
            lost = values - gguf.quants.dequantize(words, type_)
            prepared.tallies[stored].error += float(np.square(lost, dtype=np.float64).sum())
    writer.close()


def import_gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise BackendError("export gguf needs the gguf package. pip install 'smolmlx[gguf]'.") from error
    return gguf


def check(prepared: Prepared) -> None:
    """Refuse what cannot be written, before anything heavy; see `write_gguf`."""
    import_gguf()
    find_architecture(prepared.config)
    read_vocabulary(prepared.tokenizer, int(prepared.config["vocab_size"]))
    head = _head_size(prepared.config)
    heads = int(prepared.config["num_attention_heads"])
    counts = {"q_proj": heads, "k_proj": int(prepared.config.get("num_key_value_heads") or heads)}
    for name, made in prepared.tensors.items():
        count = counts.get(name.split(".")[-2] if "." in name else "")
        if count is not None and made.shape[0] != count * head:
            raise DataError(
                f"{name} has {made.shape[0]} rows, where num_attention_heads, num_key_value_heads and head_dim of config.json"
                f" give {count} heads of {head}. Fetch the base again."
            )


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """Return how llama.cpp stores this model.

    Raises:
        RecipeError: not one of those that are written here, or with settings that llama.cpp ignores.
    """
    kind = str(config.get("model_type"))
    found = ARCHITECTURES.get(kind)
    if found is None:
        raise RecipeError(
            f"model_type {kind}: GGUF is written for {', '.join(ARCHITECTURES)}. Use llama.cpp's converter on `export hf`."
        )
    problems = _number_problems(config)
    if problems:
        raise RecipeError("this config cannot be written as GGUF", problems)
    head = _head_size(config)
    if kind in ("gemma2", "gemma3_text") and float(config.get("query_pre_attn_scalar", head)) != head:
        problems.append(
            f"query_pre_attn_scalar: {config['query_pre_attn_scalar']}: llama.cpp scales by the head's {head}."
        )
    if kind == "gemma3_text" and any(
        (layer == "full_attention") != ((i + 1) % 6 == 0) for i, layer in enumerate(config.get("layer_types") or [])
    ):
        problems.append("layer_types: llama.cpp expects every sixth layer to attend in full.")
    if kind == "smollm3" and any(
        bool(flag) != ((i + 1) % 4 != 0) for i, flag in enumerate(config.get("no_rope_layers") or [])
    ):
        problems.append("no_rope_layers: llama.cpp leaves out positions in every fourth layer.")
    if kind in ("qwen2", "qwen3", "smollm3") and config.get("use_sliding_window"):
        problems.append("use_sliding_window: llama.cpp attends in full here.")
    if kind == "mistral" and sliding_window(config) is not None:
        problems.append(f"sliding_window: {config['sliding_window']}: llama.cpp attends in full here.")
    if kind == "gemma2" and any(
        (layer == "full_attention") != (i % 2 == 1) for i, layer in enumerate(config.get("layer_types") or [])
    ):
        problems.append("layer_types: llama.cpp expects every second layer to attend in full.")
    scaling = _rope_scaling(config)
    if scaling.get("rope_type", "default") not in ("default", "linear", "llama3"):
        problems.append(f"rope_scaling: {scaling['rope_type']!r}; default, linear and llama3 are written.")
    if problems:
        raise RecipeError("this model would be another one in llama.cpp", problems)
    return found


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _number_problems(config: Mapping[str, Any]) -> list[str]:
    """Say which values are not the numbers that the header of a GGUF needs."""
    kind, problems = config.get("model_type"), []
    counts, numbers = ["hidden_size", "num_attention_heads"], []
    if kind in ("gemma2", "gemma3_text"):
        counts.append("sliding_window")
    if kind == "gemma2":  # without a number llama.cpp does not go uncapped, it takes its default
        numbers += ["attn_logit_softcapping", "final_logit_softcapping"]
    tables: dict[str, Any] = {name: config[name] for name in ("rope_scaling", "rope_parameters") if config.get(name)}
    problems += [
        f"{name}: {table!r}; expected a table." for name, table in tables.items() if not isinstance(table, dict)
    ]
    if not problems:
        scaling = _rope_scaling(config)
        wanted = {"linear": _LLAMA3[:1], "llama3": _LLAMA3}.get(str(scaling["rope_type"]), ())
        found = [(f"rope_scaling.{key}", scaling.get(key)) for key in wanted]
        problems += [f"{key}: {value!r}; expected a number above 0." for key, value in found if not _is_positive(value)]
    optional = (
        "rms_norm_eps",
        "rope_theta",
        "rope_local_base_freq",
        "query_pre_attn_scalar",
        "max_position_embeddings",
    )
    numbers += [key for key in optional if config.get(key) is not None]
    for key in numbers:
        if not _is_positive(config.get(key)):
            problems.append(f"{key}: {config.get(key)!r}; expected a number above 0.")
    for key in counts:
        if not is_size(config.get(key)):
            problems.append(f"{key}: {config.get(key)!r}; expected a whole number above 0.")
    return problems


def _is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _rope_scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if isinstance(found.get("full_attention"), dict):
        found = found["full_attention"]
    return {**found, "rope_type": found.get("rope_type", found.get("type", "default"))}


def _theta(config: Mapping[str, Any], layer: str = "full_attention") -> float:
    rope = config.get("rope_parameters") or {}
    inner = rope.get(layer)
    if isinstance(inner, dict) and "rope_theta" in inner:
        return float(inner["rope_theta"])
    if layer == "sliding_attention" and config.get("rope_local_base_freq"):  # Gemma 3 before transformers 5
        return float(config["rope_local_base_freq"])
    return float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0)


def _head_size(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _add_hyperparameters(writer: GGUFWriter, config: Mapping[str, Any], architecture: Architecture, kind: str) -> None:
    gguf = import_gguf()
    heads = int(config["num_attention_heads"])
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_context_length(int(config.get("max_position_embeddings", 2048)))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(_head_size(config))
    writer.add_value_length(_head_size(config))
    writer.add_rope_dimension_count(_head_size(config))
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    writer.add_rope_freq_base(_theta(config))
    scaling = _rope_scaling(config)
    if scaling["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
    if architecture.name in ("gemma2", "gemma3"):
        writer.add_sliding_window(int(config["sliding_window"]))
    if architecture.name == "gemma2":
        writer.add_attn_logit_softcapping(float(config["attn_logit_softcapping"]))
        writer.add_final_logit_softcapping(float(config["final_logit_softcapping"]))
    if architecture.name == "gemma3":
        writer.add_rope_freq_base_swa(_theta(config, "sliding_attention"))
    types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[types[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: GGUFWriter, folder: Path, config: Mapping[str, Any]) -> None:
    tokenizer = Tokenizer(folder)
    vocabulary = read_vocabulary(folder, int(config["vocab_size"]))
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    bos, eos = adds_special(tokenizer)
    writer.add_add_bos_token(bos)
    writer.add_add_eos_token(eos)
    first = tokenizer.special("bos_token")
    bos_id = tokenizer.token_id(first) if first else config.get("bos_token_id")
    if bos_id is not None:
        writer.add_bos_token_id(int(bos_id))
    if tokenizer.eos_ids:  # the end of a turn comes first: a chat stops where the fine-tune stopped
        writer.add_eos_token_id(tokenizer.eos_ids[0])
    writer.add_pad_token_id(tokenizer.pad_id)
    if tokenizer.template_text:
        writer.add_chat_template(tokenizer.template_text)


def _type_of(gguf: Any, shape: tuple[int, ...], kind: str) -> Any:
    """Norms and biases stay float32; rows that do not divide into blocks of 32 stay float16."""
    types = gguf.GGMLQuantizationType
    if len(shape) == 1 or kind == "f32":
        return types.F32
    if kind == "q8_0":
        return types.Q8_0 if shape[-1] % 32 == 0 else types.F16
    return types.F16 if kind == "f16" else types.BF16


def _arranged(values: Floats, name: str, config: Mapping[str, Any], architecture: Architecture) -> Floats:
    """Return a weight as llama.cpp computes with it."""
    if architecture.norm_plus_one and name.endswith("norm.weight"):
        return values + np.float32(1)
    if architecture.interleaved and (".q_proj." in name or ".k_proj." in name):
        heads = int(config["num_attention_heads"])
        if ".k_proj." in name:
            heads = int(config.get("num_key_value_heads") or heads)
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
    return values


def _rope_factors(config: Mapping[str, Any]) -> Floats | None:
    """Return what divides each rotary frequency, for Llama 3's scaling (transformers' `_compute_llama3_parameters`)."""
    scaling = _rope_scaling(config)
    if scaling["rope_type"] != "llama3":
        return None
    size = _head_size(config)
    lengths = 2 * np.pi * _theta(config) ** (np.arange(0, size, 2) / size)
    old, factor = float(scaling["original_max_position_embeddings"]), float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    smooth = np.clip((old / lengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _arch_key(gguf: Any, architecture: Architecture) -> Any:
    return next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def quantize(source: Path, out: Path, kind: str) -> str:
    """Make a k-quant with a llama.cpp that is on this machine; returns which, and how many tensors it could not make so.

    It runs as a program of its own, since it tells of every tensor; that is shown where it fails.

    Raises:
        BackendError: there is none.
        RunError: it failed.
    """
    name, command = _quantizer(kind)
    done = subprocess.run(
        [*command, str(source), str(out), kind.upper()], capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        raise RunError(f"{name} could not make {kind} of {source}: {done.stderr.strip()[-300:]}")
    other = re.search(r"\d+ of \d+ tensor\(s\) required fallback quantization", done.stderr)
    return f"{name}; {other[0]}" if other else name


def _quantizer(kind: str) -> tuple[str, list[str]]:
    """Return the name of a llama.cpp, and a command that takes a source, an output and a type."""
    program = shutil.which("llama-quantize")
    if program:
        return program, [program]
    if importlib.util.find_spec("llama_cpp") is None:
        raise BackendError(
            f"--type {kind}: k-quants are made by llama.cpp, and neither llama-quantize (on PATH) nor llama-cpp-python is here."
            " Install one, or take --type q8_0."
        )
    return f"llama-cpp-python {version('llama-cpp-python')}", [sys.executable, "-P", "-c", _QUANTIZE]
