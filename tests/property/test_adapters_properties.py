"""Conversion there and back over random shapes, ranks, patterns and types: the same bytes, and the same change."""

from __future__ import annotations

import functools
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from smolmlx.adapters import adapter as adapters
from smolmlx.adapters import folding, tensors
from smolmlx.adapters.convert import convert
from smolmlx.adapters.inspection import inspect
from smolmlx.adapters.tensors import Made, from_floats, to_floats
from smolmlx.errors import DataError, RecipeError

LEAVES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
DTYPES = st.sampled_from(["F32", "F16", "BF16"])
NUMBERS = st.floats(0.015625, 1024.0, width=32)


def raw(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Made:
    """Random values of a type, some tiny and some large."""
    values = rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 4, shape)
    words = from_floats(values.astype(np.float32), dtype)
    return Made(dtype, words.shape, lambda: words)


@st.composite
def peft_folders(draw: Any) -> tuple[dict[str, Made], dict[str, Any]]:
    """Tensors and config of a PEFT adapter with patterns."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    r, dora, dtype = draw(st.integers(1, 6)), draw(st.booleans()), draw(DTYPES)
    paths = [f"model.layers.{i}.{leaf}" for i in range(draw(st.integers(1, 3))) for leaf in LEAVES]
    chosen = draw(st.lists(st.sampled_from(paths), min_size=1, unique=True))
    ranks = {re.escape(path): draw(st.integers(1, 6)) for path in chosen if draw(st.booleans())}
    alphas = {re.escape(path): draw(NUMBERS) for path in chosen if draw(st.booleans())}
    made = {}
    for path in chosen:
        rank, (rows, columns) = ranks.get(re.escape(path), r), rng.integers(1, 9, 2)
        name = f"base_model.model.{path}."
        made[f"{name}lora_A.weight"] = raw(rng, (rank, int(columns)), dtype)
        made[f"{name}lora_B.weight"] = raw(rng, (int(rows), rank), draw(DTYPES))
        if dora:
            made[f"{name}lora_magnitude_vector"] = raw(rng, (int(rows),), dtype)
    tied, parameters = not dora and draw(st.booleans()), []
    if tied:
        made |= tied_embedding(rng, r, dtype)
        chosen = [*chosen, "model.embed_tokens"]
    if not dora and draw(st.booleans()):
        parameters = draw(st.lists(st.sampled_from(["gate_up_proj", "down_proj"]), min_size=1, unique=True))
        made |= stacked_experts(rng, parameters, r, dtype)
    config = {
        "peft_type": "LORA", "r": r, "lora_alpha": draw(NUMBERS), "target_modules": chosen, "rank_pattern": ranks,
        "alpha_pattern": alphas, "use_rslora": draw(st.booleans()), "use_dora": dora, "ensure_weight_tying": tied,
        "target_parameters": [f"mlp.experts.{name}" for name in parameters] or None,
    }  # fmt: skip
    return made, config


def tied_embedding(rng: np.random.Generator, rank: int, dtype: str) -> dict[str, Made]:
    """An embedding and the head that PEFT saves with it, crosswise."""
    a, b = raw(rng, (rank, 9), dtype), raw(rng, (5, rank), dtype)
    prefix = "base_model.model."
    return {
        f"{prefix}model.embed_tokens.lora_embedding_A": a,
        f"{prefix}model.embed_tokens.lora_embedding_B": b,
        f"{prefix}lm_head.lora_A.weight": Made(dtype, (rank, 5), lambda: b.words().T),
        f"{prefix}lm_head.lora_B.weight": Made(dtype, (9, rank), lambda: a.words().T),
    }


def stacked_experts(rng: np.random.Generator, parameters: list[str], rank: int, dtype: str) -> dict[str, Made]:
    """Experts as PEFT wraps them: with both parameters adapted, down_proj is the outer one."""
    count, inner = int(rng.integers(1, 4)), int(rng.integers(1, 6))
    found = {}
    for parameter in parameters:
        rows, columns = (7, inner) if parameter == "down_proj" else (2 * inner, 7)
        outer = ".base_layer" if parameter == "gate_up_proj" and len(parameters) == 2 else ""
        path = f"base_model.model.model.layers.0.mlp.experts{outer}"
        found[f"{path}.lora_A.weight"] = raw(rng, (count * rank, columns), dtype)
        found[f"{path}.lora_B.weight"] = raw(rng, (rows, rank * count), dtype)
    return found


@st.composite
def mlx_folders(draw: Any) -> tuple[dict[str, Made], dict[str, Any]]:
    """Tensors and config of an mlx-lm adapter: LoRA with stacked experts among them, or DoRA."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rank, dtype, dora = draw(st.integers(1, 6)), draw(DTYPES), draw(st.booleans())
    made = {}
    for layer in range(draw(st.integers(1, 2))):
        for leaf in draw(st.lists(st.sampled_from(LEAVES), min_size=1, unique=True)):
            rows, columns = (int(n) for n in rng.integers(1, 9, 2))
            made[f"model.layers.{layer}.{leaf}.lora_a"] = raw(rng, (columns, rank), dtype)
            made[f"model.layers.{layer}.{leaf}.lora_b"] = raw(rng, (rank, rows), dtype)
            if dora:
                made[f"model.layers.{layer}.{leaf}.m"] = raw(rng, (rows,), dtype)
        if dora:  # which mlx-lm has not for experts
            continue
        experts, inner = int(rng.integers(1, 4)), int(rng.integers(1, 6))
        for part in draw(st.lists(st.sampled_from(["gate_proj", "up_proj", "down_proj"]), unique=True)):
            ends = (inner, 7) if part == "down_proj" else (7, inner)
            path = f"model.layers.{layer}.mlp.switch_mlp.{part}"
            made[f"{path}.lora_a"] = raw(rng, (experts, rank, ends[0]), dtype)
            made[f"{path}.lora_b"] = raw(rng, (experts, ends[1], rank), dtype)
    parameters = {"rank": rank, "scale": draw(NUMBERS), "dropout": 0.0 if dora else draw(st.sampled_from([0.0, 0.1]))}
    return made, {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": draw(st.sampled_from([-1, 0, 2])),
        "lora_parameters": parameters,
    }


def changes(adapter: adapters.Adapter) -> dict[str, np.ndarray[Any, Any]]:
    """The low-rank change of every weight in float64, under mlx-lm's names."""
    from smolmlx.adapters import names

    found = {}
    for module in adapter.modules:
        if module.path == names.HEAD:  # tied here: mlx-lm has it in the embedding
            continue
        a, b = (factor.astype(np.float64) for factor in adapter.factors(module))
        whole = module.scale * (b @ a if module.kind == "experts" else (a @ b).T)
        if module.kind == "experts" and adapter.form == "peft":
            paths = names.mlx_paths(module.path, "experts")
            found |= dict(zip(paths, np.split(whole, len(paths), axis=1), strict=True))
        else:
            found[module.path] = whole
    return found


def check(made: dict[str, Made], config: dict[str, Any], file: str, folder: Path) -> None:
    source = folder / "source"
    source.mkdir()
    tensors.write(source / file, made, {"format": "pt"})
    (source / "adapter_config.json").write_text(json.dumps(config, indent=3))
    convert(source, folder / "there")
    before, after = changes(adapters.read(source)), changes(adapters.read(folder / "there"))
    assert {name for name, value in after.items() if value.any()} <= set(before) <= set(after)
    for name, value in before.items():
        # One rounding of B to float32 where it is scaled: relative to the size of the products' terms.
        size = max(1e-30, float(np.abs(value).max()))
        np.testing.assert_allclose(after[name], value, rtol=1e-5, atol=1e-5 * size)
    back = convert(folder / "there", folder / "back")
    assert back.restored, back.notes
    for name in (file, "adapter_config.json"):
        assert (folder / "back" / name).read_bytes() == (source / name).read_bytes()


@given(peft_folders())
@settings(max_examples=60, deadline=None)
def test_peft_there_and_back(case: tuple[dict[str, Made], dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(*case, "adapter_model.safetensors", Path(folder))


@given(mlx_folders())
@settings(max_examples=60, deadline=None)
def test_mlx_there_and_back(case: tuple[dict[str, Made], dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(*case, "adapters.safetensors", Path(folder))


@functools.cache
def sound_folder(form: str) -> tuple[dict[str, bytes], list[bytes]]:
    """Files of a small adapter, and what is read from them."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made, leaves = {}, ("lora_A.weight", "lora_B.weight") if form == "peft" else ("lora_a", "lora_b")
        for path in (f"model.layers.{i}.{leaf}" for i in range(2) for leaf in LEAVES):
            shapes = ((2, 5), (3, 2)) if form == "peft" else ((5, 2), (2, 3))
            prefix = "base_model.model." if form == "peft" else ""
            made |= {
                f"{prefix}{path}.{leaf}": raw(rng, shape, "F32") for leaf, shape in zip(leaves, shapes, strict=True)
            }
        weights = "adapter_model.safetensors" if form == "peft" else "adapters.safetensors"
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "k_proj", "up_proj"],
        }
        if form == "mlx":
            config = {"num_layers": 2, "lora_parameters": {"rank": 2, "scale": 2.0, "dropout": 0.0}}
        tensors.write(folder / weights, made, {"format": "pt", "note": "from a run"})
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return {path.name: path.read_bytes() for path in folder.iterdir()}, contents(folder)


def contents(folder: Path) -> list[bytes]:
    """What is read from an adapter folder."""
    found = adapters.read(folder)
    return [
        part for module in found.modules for part in (module.path.encode(), *(w.tobytes() for w in found.words(module)))
    ]


@given(st.sampled_from(["peft", "mlx"]), st.booleans(), st.floats(0, 1, exclude_max=True), st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_a_damaged_file_is_refused_or_read_the_same(form: str, cut: bool, where: float, byte: int) -> None:
    """Cut anywhere, or with one byte of its header changed; no other error comes out."""
    files, wanted = sound_folder(form)
    with tempfile.TemporaryDirectory() as name:
        for file, content in files.items():
            if file.endswith(".safetensors"):
                header = 8 + int.from_bytes(content[:8], "little")
                at = int(where * (len(content) if cut else header))
                content = content[:at] if cut else content[:at] + bytes([byte]) + content[at + 1 :]
            (Path(name) / file).write_bytes(content)
        try:
            assert contents(Path(name)) == wanted and not cut
            inspect(Path(name))
        except (DataError, RecipeError):
            pass


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50), st.sampled_from(["F32", "F16", "BF16"]), NUMBERS)
def test_fold_is_undone_for_any_bits(bits: list[int], dtype: str, by: float) -> None:
    """Infinities, NaNs with payloads and subnormal numbers included."""
    words = np.array(bits, np.uint32).astype(np.uint32 if dtype == "F32" else np.uint16)
    folded = folding.fold(words, dtype, by)
    kept, back = folding.difference(words, folded, dtype, by), folding.unfold(folded, dtype, by)
    np.testing.assert_array_equal(back if kept is None else folding.mend(back, dtype, kept), words)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_bfloat16_rounds_to_nearest_even(values: list[float]) -> None:
    """Against the definition: the nearest of the two neighbours, the even one when halfway."""
    array = np.array(values, np.float32)
    found = to_floats(from_floats(array, "BF16"), "BF16").astype(np.float64)
    low = (array.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        high = (((array.view(np.uint32) >> 16) + 1) << 16).astype(np.uint32).view(np.float32).astype(np.float64)
    exact = array.astype(np.float64)
    finite = np.isfinite(high) & np.isfinite(exact)
    nearest = np.minimum(np.abs(exact - low), np.abs(exact - high))
    assert (np.abs(found - exact)[finite] == nearest[finite]).all()
    halfway = finite & (np.abs(exact - low) == np.abs(exact - high))
    assert ((from_floats(array, "BF16")[halfway] & 1) == 0).all()
