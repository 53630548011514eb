"""Broken and hostile adapter files: refused with a reason and the right exit code, without reading what they promise."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from smolmlx.adapters import adapter as adapters
from smolmlx.adapters.convert import convert
from smolmlx.adapters.inspection import inspect
from smolmlx.errors import DataError, RecipeError, SmolError

PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")
Change = Callable[[Path], None]


def make_peft(folder: Path, **config: Any) -> Path:
    """A small PEFT adapter of random numbers."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    tensors = {}
    for path in PATHS:
        tensors[f"base_model.model.{path}.lora_A.weight"] = rng.standard_normal((4, 8), np.float32)
        tensors[f"base_model.model.{path}.lora_B.weight"] = rng.standard_normal((6, 4), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    tree = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(tree))
    return folder


def make_mlx(folder: Path, **parameters: Any) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir()
    tensors = {}
    for path in PATHS:
        tensors[f"{path}.lora_a"] = rng.standard_normal((8, 4), np.float32)
        tensors[f"{path}.lora_b"] = rng.standard_normal((4, 6), np.float32)
    save_file(tensors, folder / "adapters.safetensors")
    tree = {"num_layers": 2, "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0, **parameters}}
    (folder / "adapter_config.json").write_text(json.dumps(tree))
    return folder


def weights(folder: Path) -> Path:
    return next(path for path in folder.glob("adapter*.safetensors"))


def edit(change: Callable[[dict[str, Any]], None]) -> Change:
    """Return a function that changes the tensors of a folder."""

    def run(folder: Path) -> None:
        tensors = dict(load_file(weights(folder)))
        change(tensors)
        save_file(tensors, weights(folder))

    return run


def header(tree: Any, tail: bytes = b"") -> Change:
    """Return a function that replaces the weight file by a header and some bytes."""

    def run(folder: Path) -> None:
        text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
        weights(folder).write_bytes(len(text).to_bytes(8, "little") + text + tail)

    return run


def truncate(folder: Path) -> None:
    whole = weights(folder).read_bytes()
    weights(folder).write_bytes(whole[: len(whole) - 9])


def config(**changes: Any) -> Change:
    def run(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return run


def text(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content) and None


LORA_A = f"base_model.model.{PATHS[0]}.lora_A.weight"
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BROKEN: dict[str, tuple[Change, str]] = {
    "truncated": (truncate, "promises"),
    "empty": (text("adapter_model.safetensors", b""), "header"),
    "seven bytes": (text("adapter_model.safetensors", b"1234567"), "header"),
    "header bomb": (text("adapter_model.safetensors", (1 << 62).to_bytes(8, "little") + b"{}"), "header of 4611686018427387904"),
    "not JSON": (header(b"{oops"), "not JSON"),
    "not text": (header(b"\xff\xfe\x00"), "not JSON"),
    "deep JSON": (header(b"[" * 100_000), "not JSON"),
    "list": (header([1]), "not a table"),
    "a promise of terabytes": (header({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}), "promises"),
    "unknown dtype": (header({"a": {**ENTRY, "dtype": "F33"}}, bytes(8)), "dtype"),
    "negative shape": (header({"a": {**ENTRY, "shape": [-2]}}, bytes(8)), "shape"),
    "boolean shape": (header({"a": {**ENTRY, "shape": [True, 2]}}, bytes(8)), "shape"),
    "backward offsets": (header({"a": {**ENTRY, "data_offsets": [8, 0]}}, bytes(8)), "bytes for shape"),
    "overlap": (header({"a": ENTRY, "b": ENTRY}, bytes(8)), "overlap"),
    "hole": (header({"a": {**ENTRY, "data_offsets": [8, 16]}}, bytes(16)), "hole"),
    "more data than tensors": (header({"a": ENTRY}, bytes(16)), "promises 8"),
    "missing B": (edit(lambda t: t.pop(LORA_A.replace("_A", "_B"))), "lora_B is missing"),
    "extra tensor": (edit(lambda t: t.update({"base_model.model.model.norm.weight": np.ones(8, np.float32)})), "extra tensor"),
    "foreign name": (edit(lambda t: t.update({"norm": np.ones(8, np.float32)})), "extra tensor"),
    "wrong rank": (edit(lambda t: t.update({LORA_A: np.ones((3, 8), np.float32)})), "do not fit rank 4"),
    "three axes": (edit(lambda t: t.update({LORA_A: np.ones((4, 8, 1), np.float32)})), "do not fit"),
    "integers": (edit(lambda t: t.update({LORA_A: np.ones((4, 8), np.int32)})), "expected float32"),
    "target without tensors": (config(target_modules=["q_proj", "up_proj", "v_proj"]), "'v_proj' has no tensor"),
    "tensors without target": (config(target_modules=["q_proj"]), "does not match"),
    "config not JSON": (text("adapter_config.json", b"{"), "not valid JSON"),
    "config a list": (text("adapter_config.json", b"[]"), "expected a JSON table"),
    "config in UTF-16": (lambda folder: text("adapter_config.json", (folder / "adapter_config.json").read_text().encode("utf-16"))(folder), "not valid JSON"),
    "half a character in a name": (header({"a\ud800": ENTRY}, bytes(8)), "half a character"),
    "config too deep": (text("adapter_config.json", b"[" * 100_000), "not valid JSON"),
    "config too long": (text("adapter_config.json", b" " * (9 << 20)), "at most"),
    "config empty": (text("adapter_config.json", b"{}"), "peft_type: expected the kind of adapter"),
    "rank as text": (config(r="8"), "positive integer"),
    "alpha as text": (config(lora_alpha="8"), "expected a number"),
    "alpha not finite": (config(lora_alpha=float("inf")), "expected a number"),
    "pattern not a regex": (config(rank_pattern={"(": 4}), "regular expression"),
    "patterns a list": (config(alpha_pattern=[1]), "expected a table"),
    "targets a number": (config(target_modules=3), "target_modules"),
    "rank of a pattern 0": (config(rank_pattern={"q_proj": 0}), "rank_pattern: expected .* positive integer"),
    "rank of a pattern below 0": (
        config(rank_pattern={"q_proj": -1}, use_rslora=True),
        "rank_pattern: expected .* positive integer",
    ),
    "huge rank": (config(r=10**400), "r: expected a positive integer"),
    "huge alpha": (config(lora_alpha=10**400), "lora_alpha: expected a number"),
    "alpha beyond float32": (config(lora_alpha=1e39), "lora_alpha: expected a number"),
    "huge alpha of a pattern": (config(alpha_pattern={"q_proj": 10**400}), "alpha_pattern: expected a table"),
    "layers as text": (config(layers_to_transform="01"), "layers_to_transform: expected a list of layer numbers"),
    "parameters a number": (config(target_parameters=5), "target_parameters: expected a list of names"),
    "whole modules a number": (config(modules_to_save=5), "modules_to_save: expected a list of names"),
}  # fmt: skip
REFUSED: dict[str, tuple[Change, str]] = {
    "both weight files": (text("adapters.safetensors", b"x"), "holds both"),
    "not LoRA": (config(peft_type="IA3"), "peft_type"),
    "unknown setting": (config(use_magic={"a": 1}), "use_magic"),
    "aLoRA": (config(alora_invocation_tokens=[1]), "aLoRA"),
    "corda": (config(init_lora_weights="corda"), "init_lora_weights"),
}


@pytest.mark.parametrize("case", [*BROKEN, *REFUSED])
def test_refused(case: str, tmp_path: Path) -> None:
    folder = make_peft(tmp_path / "adapter")
    change, word = {**BROKEN, **REFUSED}[case]
    change(folder)
    tracemalloc.start()
    with pytest.raises(SmolError, match=word) as caught:
        convert(folder, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(caught.value, DataError if case in BROKEN else RecipeError)
    assert caught.value.exit_code == (4 if case in BROKEN else 2)
    assert peak < 8 << 20, "refusing a file must not cost its promised size"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (edit(lambda t: t.update({f"{PATHS[0]}.lora_a": np.ones((8, 5), np.float32)})), "do not fit rank 4"),
        (edit(lambda t: t.update({"model.norm.weight": np.ones(8, np.float32)})), "loader refuses it"),
        (edit(lambda t: t.update({f"{PATHS[0]}.m": np.ones(6, np.float32)})), "magnitude"),
        (edit(lambda t: t.pop(f"{PATHS[0]}.lora_b")), "lora_b is missing"),
        (config(lora_parameters={"rank": 4, "alpha": 8, "dropout": 0.0}), "'alpha' does not stand for it"),
        (config(lora_parameters={"rank": 4, "scale": 2.0, "keys": ["self_attn.q_proj"]}), "not among"),
        (config(lora_parameters=None), "lora_parameters"),
        (config(lora_parameters={"rank": 4, "scale": 10**400}), "scale: expected a number"),
        (config(lora_parameters={"rank": 4, "scale": 2.0, "dropout": 10**400}), "dropout: expected a number"),
        (config(num_layers="x"), "num_layers: expected a whole number .* found 'x'"),
        (config(num_layers=None), "num_layers: expected a whole number"),
        (config(num_layers=1), "layers.0.self_attn.q_proj: an extra module: num_layers is 1"),
        (config(fine_tune_type="dora"), "m is missing"),
        (config(fine_tune_type="lokr"), "none of mlx-lm's"),
    ],
)
def test_broken_mlx_adapters(change: Change, word: str, tmp_path: Path) -> None:
    folder = make_mlx(tmp_path / "adapter")
    change(folder)
    with pytest.raises((DataError, RecipeError), match=word):
        convert(folder, tmp_path / "out")


def test_a_saved_tie_must_be_one(tmp_path: Path) -> None:
    """PEFT saves the tied head beside an embedding of modules_to_save; which of two different ones it loads is chance."""
    folder = make_peft(tmp_path / "adapter", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    saved = {
        f"base_model.model.{name}.weight": np.ones((5, 8), np.float32) for name in ("model.embed_tokens", "lm_head")
    }
    edit(lambda t: t.update(saved))(folder)
    assert set(adapters.read(folder).full) == {"model.embed_tokens.weight", "lm_head.weight"}
    saved["base_model.model.lm_head.weight"][2] += 1
    edit(lambda t: t.update(saved))(folder)
    with pytest.raises(DataError, match=r"lm_head.weight: not in modules_to_save, and not the saved embedding"):
        adapters.read(folder)


def test_a_base_whose_name_is_no_path(tmp_path: Path) -> None:
    """One of 5000 letters ended as an OSError."""
    folder = make_peft(tmp_path / "adapter", base_model_name_or_path="/" + "m" * 5000)
    convert(folder, tmp_path / "out")
    assert any("not on this machine" in problem for problem in inspect(folder).problems)


def test_alpha_beside_scale_is_ignored(tmp_path: Path) -> None:
    """Old mlx-lm files carry both; the loader multiplies by scale."""
    folder = make_mlx(tmp_path / "adapter", alpha=1000.0)
    assert {module.scale for module in adapters.read(folder).modules} == {20.0}


@pytest.mark.parametrize("name", ["adapter_model-00001-of-00002.safetensors", "adapter_model.bin", "README.md"])
def test_no_weights(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(RecipeError, match="not an adapter folder"):
        adapters.read(tmp_path)


def test_a_broken_note_is_an_error_not_a_crash(tmp_path: Path) -> None:
    folder = make_peft(tmp_path / "adapter")
    convert(folder, tmp_path / "mlx")
    whole = '{"form":"peft","header":"{}","config":"[]","written":"","folded":{},"checksum":0}'
    for note in ("{}", '{"form": 1}', "[]", whole, whole.replace("0}", "[]}")):
        tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
        save_file(tensors, tmp_path / "mlx" / "adapters.safetensors", metadata={"smolmlx_origin": note})
        with pytest.raises(DataError):
            convert(tmp_path / "mlx", tmp_path / "out")


def scale(tensors: dict[str, Any]) -> None:
    tensors[f"{PATHS[0]}.lora_a"] *= 2


@pytest.mark.parametrize("case", ["kept", "no origin.safetensors", "broken origin.safetensors", "weights edited"])
def test_the_original_is_given_back_or_said_not_to_be(case: str, tmp_path: Path) -> None:
    """Folding a scale rounds, and what rounding took lies in a file of its own, which can get lost."""
    folder = make_peft(tmp_path / "adapter", alpha_pattern={"up_proj": 11.0})
    convert(folder, tmp_path / "mlx")
    bulk = tmp_path / "mlx" / "origin.safetensors"
    if case.startswith("no "):
        bulk.unlink()
    elif case.startswith("broken"):
        save_file({name: value ^ 255 for name, value in load_file(bulk).items()}, bulk)
    elif case == "weights edited":
        with safe_open(weights(tmp_path / "mlx"), "np") as file:
            note = file.metadata()
        tensors = dict(load_file(weights(tmp_path / "mlx")))
        scale(tensors)
        save_file(tensors, weights(tmp_path / "mlx"), metadata=note)
    back = convert(tmp_path / "mlx", tmp_path / "back")
    same = weights(tmp_path / "back").read_bytes() == weights(folder).read_bytes()
    assert back.restored == same == (case == "kept")
    assert same or "converted afresh" in back.notes[0]
    a = load_file(weights(tmp_path / "back"))[LORA_A]
    np.testing.assert_array_equal(a, load_file(weights(folder))[LORA_A] * (2 if case == "weights edited" else 1))


def test_one_huge_rank_does_not_fill_the_disk(tmp_path: Path) -> None:
    """4 MB that mlx-lm's one rank for all would make 1.6 GB."""
    folder = make_peft(tmp_path / "adapter", rank_pattern={"q_proj": 100_000})
    wide = {f"base_model.model.{PATHS[0]}.lora_A.weight": np.zeros((100_000, 5), np.float16)}
    wide[f"base_model.model.{PATHS[0]}.lora_B.weight"] = np.zeros((5, 100_000), np.float16)
    wide[f"base_model.model.{PATHS[1]}.lora_A.weight"] = np.zeros((4, 4000), np.float16)
    edit(lambda t: t.update(wide))(folder)
    tracemalloc.start()
    with pytest.raises(RecipeError, match=r"makes 1\.6 GB of 2\.0 MB"):
        convert(folder, tmp_path / "out")
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def test_a_path_in_a_config_is_only_a_name(tmp_path: Path) -> None:
    """Nothing is read or written at a path that a config names, other than a model's own files."""
    folder = make_peft(tmp_path / "adapter", base_model_name_or_path="../../../../etc", revision="../x")
    convert(folder, tmp_path / "mlx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "mlx"]
    assert sorted(path.name for path in (tmp_path / "mlx").iterdir()) == ["adapter_config.json", "adapters.safetensors"]


def test_inspection_tells_layers_from_experts(tmp_path: Path) -> None:
    folder = make_peft(tmp_path / "adapter")
    tensors = load_file(weights(folder))
    moved = {name.replace("0.self_attn.q_proj", "0.mlp.experts.7.q_proj"): value for name, value in tensors.items()}
    save_file(moved, weights(folder))
    assert inspect(folder).layers == (0, 1)


def test_inspection_names_problems(tmp_path: Path) -> None:
    found = inspect(make_mlx(tmp_path / "loud"))
    assert any("scale 20" in problem for problem in found.problems) and any("no base" in p for p in found.problems)
    folder = make_peft(tmp_path / "adapter", base_model_name_or_path="/no/such/folder")
    edit(lambda t: t.update({LORA_A: np.full((4, 8), np.nan, np.float32)}))(folder)
    edit(lambda t: t.update({LORA_A.replace("_A", "_B"): np.zeros((6, 4), np.float32)}))(folder)
    problems = "\n".join(inspect(folder).problems)
    assert "not finite" in problems and "B is zero" in problems and "/no/such/folder" in problems


DESCRIBED: dict[str, tuple[dict[str, Any], str, str]] = {
    "pissa": ({"init_lora_weights": "pissa"}, "", "changes the base weights"),
    "biases": ({"bias": "all"}, "model.layers.0.self_attn.q_proj.bias", "trained biases"),
    "lora bias": ({"lora_bias": True}, f"{PATHS[0]}.lora_B.bias", "a bias beside B"),
    "aLoRA": ({"alora_invocation_tokens": [1]}, "", "aLoRA"),
    "token rows": (
        {"trainable_token_indices": [1]},
        "model.embed_tokens.token_adapter.trainable_tokens_delta",
        "single rows of the embedding",
    ),
}


@pytest.mark.parametrize("kind", DESCRIBED)
def test_inspection_describes_what_is_refused_elsewhere(kind: str, tmp_path: Path) -> None:
    """It said only why the adapter is not converted, as if that had been asked."""
    changes, tensor, reason = DESCRIBED[kind]
    folder = make_peft(tmp_path / "adapter", **changes)
    if tensor:
        edit(lambda t: t.update({f"base_model.model.{tensor}": np.ones(6, np.float32)}))(folder)
    found = inspect(folder)
    assert (found.kind, found.ranks, found.scales, found.layers) == ("LoRA", {4: 2}, {2.0: 2}, (0, 1))
    assert found.num_parameters == 2 * 4 * (8 + 6) + (6 if tensor else 0)
    assert found.problems[0].startswith("not converted or merged: ") and reason in found.problems[0]
    with pytest.raises(RecipeError, match=reason):
        convert(folder, tmp_path / "out")


def test_inspection_describes_dora_on_an_embedding(tmp_path: Path) -> None:
    folder = make_peft(tmp_path / "adapter", use_dora=True, target_modules=["embed_tokens"])
    path = "base_model.model.model.embed_tokens.lora_"
    shapes = {f"{path}embedding_A": (4, 9), f"{path}embedding_B": (8, 4), f"{path}magnitude_vector": (1, 8)}
    save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, weights(folder))
    found = inspect(folder)
    assert (found.kind, found.targets) == ("DoRA", {"embed_tokens": 1}) and "per column" in found.problems[0]
