"""What a model folder says is read from config and headers; what cannot be trained is refused with what to use instead."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import save_file

from smolmlx import models
from smolmlx.errors import BackendError, DataError, RecipeError
from smolmlx.signposts import listed


@pytest.fixture(scope="module")
def smollm2(assets: Path) -> models.BaseModel:
    """SmolLM2-135M: its published config, and the shapes that follow from it."""
    config = json.loads((assets / "tokenizers/smollm2-135m-instruct/config.json").read_text())
    model = models.BaseModel("smollm2", Path(), None, config)
    model.__dict__["shapes"] = models.llama_shapes(config)
    return model


def lora_size(model: models.BaseModel, rank: int) -> int:
    return sum(rank * (a + b) for a, b in model.linear_shapes().values())


def test_parameter_counts_of_smollm2(smollm2: models.BaseModel) -> None:
    assert smollm2.num_parameters() == 134_515_008
    assert lora_size(smollm2, 32) == 9_768_960
    assert lora_size(smollm2, 6) == 1_831_680
    assert smollm2.num_parameters() + lora_size(smollm2, 32) == 144_283_968
    assert smollm2.tied and smollm2.num_layers == 30 and len(smollm2.linear_shapes()) == 30 * 7


def test_linear_shapes_are_in_out(smollm2: models.BaseModel) -> None:
    shapes = smollm2.linear_shapes()
    assert shapes["model.layers.0.self_attn.k_proj"] == (576, 192)
    assert shapes["model.layers.29.mlp.down_proj"] == (1536, 576)


def test_real_model(assets: Path) -> None:
    model = models.find_model(str(assets / "models/stories260k"))
    assert model.num_parameters() == 260_032
    assert model.shapes == models.llama_shapes(model.config)


def test_made_model_is_a_function_of_the_seed(tmp_path: Path) -> None:
    config = {
        "vocab_size": 32,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        made = models.make_model(config, folder, seed)
        assert made.shapes == models.llama_shapes(config)
    first, same, other = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert first == same != other
    assert models.open_model(folders[0]).fingerprint() == models.open_model(folders[1]).fingerprint()
    assert models.open_model(folders[0]).fingerprint() != models.open_model(folders[2]).fingerprint()


def test_untied_head_is_counted() -> None:
    config = {
        "vocab_size": 10,
        "hidden_size": 4,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    tied = models.llama_shapes({**config, "tie_word_embeddings": True})
    assert set(models.llama_shapes(config)) - set(tied) == {"lm_head.weight"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"vocab_size": 8, "hidden_size": 4},
            ["intermediate_size: missing", "num_hidden_layers: missing", "num_attention_heads: missing"],
        ),
        (
            {
                "vocab_size": 8,
                "hidden_size": 5,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
            ["divide"],
        ),
        (
            {
                "vocab_size": 8,
                "hidden_size": 12,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 3,
                "num_key_value_heads": 2,
            },
            ["divide"],
        ),
    ],
)
def test_impossible_configs_are_refused(config: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        models.llama_shapes(config)
    assert all(word in str(caught.value) for word in words)


def test_rope_theta_is_lifted_to_the_top() -> None:
    """mlx-lm reads only the top level and would silently use 10000."""
    assert models.with_rope_theta({"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}})["rope_theta"] == 1e5
    assert models.with_rope_theta({"rope_theta": 5, "rope_parameters": {"rope_theta": 7}})["rope_theta"] == 5
    assert models.with_rope_theta({"a": 1}) == {"a": 1}
    nested = {"full_attention": {"rope_theta": 3e5}, "sliding_attention": {"rope_theta": 5e3}}
    found = models.with_rope_theta({"rope_parameters": nested})
    assert (found["rope_theta"], found["rope_local_base_freq"]) == (3e5, 5e3)


def test_quantized_shapes_are_unpacked(tmp_path: Path) -> None:
    """A 4-bit MLX weight packs eight columns into one integer; the scales say how wide the layer is."""
    arrays = {
        "model.embed_tokens.weight": np.zeros((10, 64), np.float32),
        "model.layers.0.mlp.up_proj.weight": np.zeros((128, 8), np.uint32),
        "model.layers.0.mlp.up_proj.scales": np.zeros((128, 1), np.float32),
        "model.layers.0.mlp.up_proj.biases": np.zeros((128, 1), np.float32),
    }
    save_file(arrays, tmp_path / "model.safetensors")
    model = models.BaseModel("q", tmp_path, None, {"quantization": {"group_size": 64, "bits": 4}})
    assert model.linear_shapes() == {"model.layers.0.mlp.up_proj": (64, 128)}
    assert model.num_parameters() == 10 * 64 + 64 * 128


class TestRefusals:
    def test_gguf_file(self) -> None:
        with pytest.raises(RecipeError, match="safetensors") as caught:
            models.find_model("model.Q4_K_M.gguf")
        assert caught.value.exit_code == 2

    def test_gguf_folder(self, tmp_path: Path) -> None:
        (tmp_path / "model.gguf").touch()
        with pytest.raises(RecipeError, match="GGUF"):
            models.find_model(str(tmp_path))
        (tmp_path / "config.json").write_text("{}")  # as repositories of GGUF files often have it
        with pytest.raises(RecipeError, match="GGUF"):
            models.find_model(str(tmp_path))

    @pytest.mark.parametrize("name", ["./nowhere", "runs/nope", "a/b/c"])
    def test_missing_folder(self, name: str) -> None:
        with pytest.raises(RecipeError, match="no such model folder"):
            models.find_model(name)

    def test_missing_hub_id_while_offline(self) -> None:
        pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
        with pytest.raises(BackendError, match="not in the cache") as caught:
            models.find_model("nobody/no-such-model")
        assert caught.value.exit_code == 3

    @pytest.mark.parametrize("name", ["foo/bar baz", "foo/..bar", "foo/bar:latest"])
    def test_neither_folder_nor_hub_id(self, name: str) -> None:
        pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
        with pytest.raises(RecipeError, match="not a hub id either"):
            models.find_model(name)

    def test_wrong_revision_is_not_a_missing_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

        def answer(name: str, **options: object) -> str:
            raise hub.errors.RevisionNotFoundError("404", response=mock.MagicMock())

        monkeypatch.setattr(hub, "snapshot_download", answer)
        with pytest.raises(BackendError, match="some/model: the hub has no revision 'v9'"):
            models.find_model("some/model", "v9")

    def test_adapter_folder(self, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text("{}")
        with pytest.raises(RecipeError, match="adapter folder, not a base model"):
            models.find_model(str(tmp_path))

    def test_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match=r"no config\.json"):
            models.find_model(str(tmp_path))

    def test_config_without_weights(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(DataError, match="only a config"):
            models.find_model(str(tmp_path))
        (tmp_path / "pytorch_model.bin").touch()
        with pytest.raises(DataError, match="pickle"):
            models.find_model(str(tmp_path))

    def test_broken_config(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(DataError, match="not valid JSON"):
            models.find_model(str(tmp_path))
        (tmp_path / "config.json").write_text("[]")
        with pytest.raises(DataError, match="expected a JSON table"):
            models.find_model(str(tmp_path))

    def test_a_name_too_long_for_a_path(self) -> None:
        with pytest.raises(RecipeError, match="no such model folder"):
            models.find_model("m" * 5000)

    @pytest.mark.parametrize("keep", [4, 40, -10], ids=["no header", "half a header", "half the data"])
    def test_truncated_weights(self, tmp_path: Path, keep: int) -> None:
        save_file({"a.layers.0.weight": np.ones((64, 64), np.float32)}, tmp_path / "whole")
        (tmp_path / "model.safetensors").write_bytes((tmp_path / "whole").read_bytes()[:keep])
        with pytest.raises(DataError, match="again"):
            models.read_headers(tmp_path)

    def test_header_that_is_not_json(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"oops")
        with pytest.raises(DataError, match="not JSON"):
            models.read_headers(tmp_path)


def make_run(folder: Path, **notes: str) -> Path:
    """A run's folder with an adapter of two files; `notes` go to base_model.json."""
    (folder / "adapter").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "adapter" / name).touch()
    if notes:
        (folder / "adapter" / models.BASE_FILE).write_text(json.dumps(notes))
    return folder


def make_whole(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_folder_of_runs_in_place_of_their_adapters(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "one")
    for folder in (run, tmp_path / "runs", tmp_path):
        with pytest.raises(
            RecipeError, match=rf"not an adapter folder .* Did you mean {re.escape(f'{run}/adapter')}\?"
        ):
            models.check_adapter_folder(folder)
    make_run(tmp_path / "runs" / "two")
    with pytest.raises(RecipeError, match=r"one/adapter or .*two/adapter\?"):
        models.check_adapter_folder(tmp_path / "runs")
    whole = make_whole(tmp_path / "full" / "model")
    with pytest.raises(RecipeError, match=f"{whole}: pass that as --model, without --adapter"):
        models.check_adapter_folder(tmp_path / "full")


def test_an_adapter_of_mlx_lm_in_place_of_pefts(tmp_path: Path) -> None:
    """Passed as --model it asked for --adapter, and passed as that for PEFT's files."""
    for name in ("adapter_config.json", "adapters.safetensors"):
        (tmp_path / name).touch()
    for check in (models.check_adapter_folder, models.open_model):
        with pytest.raises(RecipeError, match=rf"smolmlx adapter convert {tmp_path} OUT --to peft"):
            check(tmp_path)


def test_a_folder_that_holds_models_or_adapters_in_place_of_a_model(tmp_path: Path) -> None:
    """It said to download the whole model folder."""
    run = make_run(tmp_path / "pipe" / "sft", name="tiny", weights="0")
    for folder in (run, tmp_path / "pipe"):
        with pytest.raises(RecipeError) as caught:
            models.open_model(folder)
        assert f"as --adapter ({run}/adapter), and its base as --model (tiny)." in str(caught.value)
    for where in ("full/model", "served/merged"):
        whole = make_whole(tmp_path / where)
        with pytest.raises(RecipeError, match=f"Pass the model in it: {whole}."):
            models.open_model(whole.parent)
    with pytest.raises(RecipeError, match=r"full/model or .*/served/merged"):
        models.open_model(tmp_path)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.yaml").touch()
    with pytest.raises(RecipeError, match=r"smolmlx train --resume .*begun"):
        models.open_model(tmp_path / "begun")


def test_many_folders_are_counted() -> None:
    folders = [Path(name) for name in "abcde"]
    assert [listed(folders[:count]) for count in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
    assert listed(folders, "or") == "a, b, c or 2 more"


GOOD = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def make_adapter(folder: Path, config: str) -> Path:
    """An adapter of one layer whose config is `config`."""
    folder.mkdir(exist_ok=True)
    factors = {f"base_model.model.q.lora_{side}.weight": np.ones((2, 2), np.float32) for side in "AB"}
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(config)
    return folder


@pytest.mark.parametrize(
    ("config", "kind", "said"),
    [
        ("{", DataError, "not valid JSON"),
        ("[1]", DataError, "expected a JSON table"),
        ("{}", DataError, "peft_type: expected"),
        (json.dumps({**GOOD, "r": "x"}), DataError, "r: expected a positive integer"),
        (json.dumps({**GOOD, "use_dora": True}), DataError, "no lora_magnitude_vector, though use_dora is set"),
        (json.dumps({**GOOD, "peft_type": "IA3"}), RecipeError, "'IA3' is not LORA"),
    ],
)
def test_adapters_that_are_refused(config: str, kind: type[Exception], said: str, tmp_path: Path) -> None:
    """They ended as a bug of this program, or, of another kind, answered as if they were LoRA."""
    with pytest.raises(kind, match=said):
        models.check_adapter_folder(make_adapter(tmp_path, config))


def test_an_adapter_that_is_cut(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path, json.dumps(GOOD))
    assert models.check_adapter_folder(folder) == GOOD
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(DataError, match="truncated"):
        models.check_adapter_folder(folder)


@pytest.mark.parametrize("note", ["{", "[]", '{"name": "tiny"}'])
def test_a_broken_note_of_the_base(note: str, tmp_path: Path) -> None:
    """It switched the check of the base off."""
    assert models.noted_base(tmp_path) is None
    (tmp_path / models.BASE_FILE).write_text(note)
    with pytest.raises(DataError, match="broken, so the base"):
        models.noted_base(tmp_path)
