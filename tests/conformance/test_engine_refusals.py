"""What an engine cannot do is refused while planning, with its reason; what it says it can do, it does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import get_args

import pytest
from safetensors.numpy import load_file, save_file

from lab import ENGINES, Lab, make_tiny, toy_installed
from smolmlx import backend, recipe
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import BackendError, RecipeError
from smolmlx.models import open_model

ASKED = {
    "model.quantize": get_args(recipe.Quantize),
    "model.dtype": get_args(recipe.Dtype),
    "train.optimizer": get_args(recipe.Train.model_fields["optimizer"].annotation),
    "train.method": get_args(recipe.Train.model_fields["method"].annotation),
}
KINDS = {
    "model.quantize": "quantize",
    "model.dtype": "dtypes",
    "train.optimizer": "optimizers",
    "train.method": "methods",
}


@pytest.mark.parametrize("key", ASKED)
def test_every_value_is_planned_or_refused_with_a_reason(lab: Lab, key: str, tmp_path: Path) -> None:
    capabilities = lab.choice.backend.capabilities(lab.choice.device)
    supported = getattr(capabilities, KINDS[key])
    wide = make_tiny(tmp_path / "wide", hidden_size=64, intermediate_size=128)
    for value in ASKED[key]:
        changes = {key.replace(".", "__"): value}
        if value == "muon":
            changes["train__method"] = "full"  # it is for nothing else
        if key == "model.quantize":  # MLX's groups are 64 wide
            changes["model__id"] = str(wide)
        if value in supported or (key, value) == ("model.dtype", "auto"):
            lab.plan(**changes)
            continue
        with pytest.raises(RecipeError) as caught:
            lab.plan(**changes)
        problem = next(problem for problem in caught.value.problems if problem.startswith(key))
        assert problem.startswith(f"{key}: backend '{lab.name}' on {capabilities.device} does not support '{value}'")
        assert f"supports: {', '.join(supported)}" in problem or "supports: auto" in problem
        if key != "model.dtype":
            assert capabilities.missing[value] in problem, "an engine says why, and what would help"


def test_capabilities_name_known_values_only(lab: Lab) -> None:
    capabilities = lab.choice.backend.capabilities(lab.choice.device)
    for key, kind in KINDS.items():
        assert set(getattr(capabilities, kind)) <= set(ASKED[key])
    assert set(capabilities.stages) <= set(get_args(recipe.Stage))
    assert capabilities.dtype in capabilities.dtypes and capabilities.dtype_reason and capabilities.device_name
    assert lab.choice.backend.versions()


def test_an_engine_without_dpo_says_why(lab: Lab, pair_rows: Path) -> None:
    capabilities = lab.choice.backend.capabilities(lab.choice.device)
    changes = {"stage": "dpo", "data": {"train": str(pair_rows), "max_length": 128}}
    if "dpo" in capabilities.stages:
        assert lab.plan(**changes).pairs is not None
        return
    with pytest.raises(RecipeError, match="does not support 'dpo'") as caught:
        lab.plan(**changes)
    assert capabilities.missing["dpo"] in str(caught.value)


def test_a_base_that_lacks_weights_is_refused_by_name(lab: Lab, tmp_path: Path) -> None:
    """transformers draws what is missing at random, and goes on."""
    if lab.name not in recipe.Recipe.model_fields:
        pytest.skip("the toy engine has no models of other types")
    base = make_tiny(tmp_path / "base")
    tree = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps({**tree, "model_type": "mistral", "architectures": ["MistralForCausalLM"]})
    )
    tensors = load_file(base / "model.safetensors")
    whole, tokenizer = open_model(base), lab.plan().tokenizer
    lab.choice.backend.generator(whole, None, tokenizer, backend.Loading(lab.choice.device))
    del tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(
        RecipeError, match=r"weights do not fit config.json: .*model\.norm\.weight.* Fetch the folder again"
    ):
        lab.choice.backend.generator(open_model(base), None, tokenizer, backend.Loading(lab.choice.device))


def test_unknown_knobs_are_refused(lab: Lab) -> None:
    if lab.name not in recipe.Recipe.model_fields:
        assert lab.choice.backend.check({"zzz": 1})
        pytest.skip(f"a recipe has no block for engine {lab.name}; its own check was asked")
    with pytest.raises(RecipeError, match=rf"{lab.name}\.zzz: unknown key"):
        lab.plan(**{lab.name: {"zzz": 1}})


def test_block_for_an_unknown_engine_is_refused(lab: Lab) -> None:
    with pytest.raises(RecipeError, match="tpu: unknown key"):
        lab.plan(tpu={"zzz": 1})


def changed(tiny_model: Path, folder: Path, **config: object) -> Path:
    """Copy a model under a config that says something else."""
    made = shutil.copytree(tiny_model, folder)
    old = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**old, **config}))
    return made


def test_unknown_architecture_is_refused_while_planning(lab: Lab, tiny_model: Path, tmp_path: Path) -> None:
    if lab.name == "toy":
        pytest.skip("the toy engine has one model for all")
    model = changed(tiny_model, tmp_path / "strange", model_type="zzz", architectures=["ZzzForCausalLM"])
    with pytest.raises(BackendError, match="'zzz'") as caught:
        lab.plan(model__id=str(model))
    assert caught.value.exit_code == 3


def test_known_architectures_are_planned(lab: Lab, tiny_model: Path, tmp_path: Path) -> None:
    """mistral goes by Llama's name in mlx-lm."""
    for kind in ("mistral", "qwen2"):
        assert lab.plan(model__id=str(changed(tiny_model, tmp_path / kind, model_type=kind))).steps


def test_base_that_is_stored_quantized(lab: Lab, tiny_model: Path, tmp_path: Path) -> None:
    model = changed(tiny_model, tmp_path / "stored", quantization={"group_size": 64, "bits": 4})
    if lab.name == "cuda":
        with pytest.raises(BackendError, match="MLX's format"):
            lab.plan(model__id=str(model))
        with pytest.raises(BackendError, match=r"MLX's format.* --backend mlx"):
            how = backend.Loading("cpu")
            lab.choice.backend.generator(open_model(model), None, Tokenizer(tiny_model), how)
    elif lab.name == "mlx":
        with pytest.raises(RecipeError, match="quantized already"):
            lab.plan(model__id=str(model), model__quantize="8bit")
        with pytest.raises(RecipeError, match="frozen"):
            lab.plan(model__id=str(model), train__method="full")


def test_layers_that_cannot_be_quantized(lab: Lab, assets: Path) -> None:
    if lab.name != "mlx":
        pytest.skip("MLX alone quantizes in groups of 64")
    stories = assets / "models" / "stories260k"
    with pytest.raises(RecipeError, match="multiple of 64") as caught:
        lab.plan(model__id=str(stories), model__quantize="4bit", model__chat_template="plain")
    assert caught.value.problems[0].startswith("model.quantize: '4bit'")


def test_unknown_device_is_refused(lab: Lab) -> None:
    with pytest.raises(BackendError, match="--device abacus") as caught:
        backend.choose(lab.name, "abacus")
    assert caught.value.exit_code == 3


def test_engine_is_found_by_name(lab: Lab) -> None:
    assert lab.choice.backend.name == lab.name in backend.installed()
    assert lab.choice.reason == "asked for with device cpu"


def test_unknown_engine_names_the_nearest() -> None:
    with toy_installed(), pytest.raises(BackendError, match="Did you mean 'toy'") as caught:
        backend.choose("tory")
    assert "Installed: " in str(caught.value)


def test_cuda_without_a_gpu_says_what_to_type() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendError, match="--device cpu"):
        backend.choose("cuda")


class TestAuto:
    """`--backend auto` on machines that are not this one."""

    @pytest.fixture
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> object:
        def make(system: str, packages: set[str], nvidia: bool, names: tuple[str, ...] = tuple(ENGINES)) -> None:
            class Paper:
                def __init__(self, name: str) -> None:
                    self.name = name

            monkeypatch.setattr(backend, "installed", lambda: {name: (lambda name=name: Paper(name)) for name in names})
            monkeypatch.setattr(
                backend, "_has", lambda name, known, module: name in known and module.partition(".")[0] in packages
            )
            monkeypatch.setattr(backend, "has_nvidia", lambda: nvidia)
            monkeypatch.setattr(backend.platform, "system", lambda: system)
            monkeypatch.setattr(backend.platform, "machine", lambda: "arm64" if system == "Darwin" else "x86_64")
            monkeypatch.setattr(backend, "load", lambda name: Paper(name))

        return make

    @pytest.mark.parametrize(
        ("system", "packages", "nvidia", "wanted"),
        [
            ("Darwin", {"mlx", "torch"}, False, ("mlx", None, "Apple Silicon")),
            ("Linux", {"mlx", "torch"}, True, ("cuda", None, "an NVIDIA GPU is here")),
            ("Linux", {"mlx", "torch"}, False, ("mlx", None, "no GPU here")),
            ("Linux", {"torch"}, False, ("cuda", "cpu", "no GPU here")),
            ("Linux", {"mlx"}, True, ("mlx", None, "no GPU here")),
            ("Darwin", {"torch"}, False, ("cuda", "cpu", "no GPU here")),
        ],
    )
    def test_choice(
        self, machine: object, system: str, packages: set[str], nvidia: bool, wanted: tuple[str, ...]
    ) -> None:
        machine(system, packages, nvidia)  # type: ignore[operator]
        chosen = backend.choose()
        assert (chosen.backend.name, chosen.device) == wanted[:2] and chosen.reason.startswith(wanted[2])

    def test_third_engine_alone(self, machine: object) -> None:
        machine("Linux", set(), False, ("toy",))  # type: ignore[operator]
        assert backend.choose().backend.name == "toy"

    def test_none(self, machine: object) -> None:
        machine("Linux", set(), False, ())  # type: ignore[operator]
        with pytest.raises(BackendError, match="pip install"):
            backend.choose()


def test_a_model_whose_package_is_missing_is_an_error(tmp_path: Path) -> None:
    """mlx-lm's olmo ends the process where ai2-olmo is not installed."""
    pytest.importorskip("smolmlx_mlx.blas", reason="the MLX engine is not installed").ensure()
    from smolmlx_mlx.model import load_base

    folder = make_tiny(tmp_path / "olmo")
    config = {**json.loads((folder / "config.json").read_text()), "model_type": "olmo"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackendError, match="mlx-lm's 'olmo' needs the package named above"):
        load_base(folder, config, "float32", "none")
