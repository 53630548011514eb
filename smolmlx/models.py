"""Where a base model lies and what its files say, without loading weights or an engine.

Reads config.json and safetensors headers only, so that a plan can name every trainable parameter, and refuse what
cannot be trained, before anything heavy starts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from smolmlx import peft_config
from smolmlx.base_config import EMBEDDING, HEAD, config_problems
from smolmlx.errors import BackendError, DataError, RecipeError
from smolmlx.first_weights import draw
from smolmlx.rundir import usual_mode
from smolmlx.signposts import find_results, listed
from smolmlx.weight_files import INDEX, MAX_HEADER_BYTES, PATTERN, parse_header, weight_files, weight_map

EMBEDDED = "tiny"
BASE_FILE = "base_model.json"
MLX_ADAPTER = "adapters.safetensors"
_BLOCK_BYTES = 64 << 20
_MAGNITUDE = ".lora_magnitude_vector"
_GGUF = (
    "GGUF is for llama.cpp, and neither loaded nor trained here. Run it with llama.cpp, or pass the safetensors folder or hub"
    " id that it was made from."
)


@dataclass(frozen=True)
class BaseModel:
    """A base model on disk, or one to be made from `config`."""

    name: str
    """As the user wrote it."""
    folder: Path
    revision: str | None
    """Commit of a hub id, when known."""
    config: Mapping[str, Any]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Unquantized shape of every weight, by Hugging Face name."""
        return {name: shape for name, (shape, _) in read_headers(self.folder).items()}

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The MLX quantization block of the config, if the base is already quantized."""
        found = self.config.get("quantization")
        return found if isinstance(found, dict) else None

    @property
    def tied(self) -> bool:
        """Whether head and embedding are one weight; a config that does not say (Gemma's do not) leaves it to the weights."""
        said = self.config.get("tie_word_embeddings")
        return HEAD not in self.shapes if said is None else bool(said)

    @property
    def context(self) -> int | None:
        """Most tokens of prompt and answer together that the model was trained for; None where its config does not say."""
        return self.config.get("max_position_embeddings")

    @property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Return module path -> (in, out) of every linear layer inside the transformer blocks."""
        quantization = self.quantization
        found = {}
        for name, shape in self.shapes.items():
            if not name.endswith(".weight") or len(shape) != 2 or ".layers." not in name:
                continue
            rows, columns = shape
            scales = self.shapes.get(name.removesuffix("weight") + "scales")
            if quantization and scales:
                columns = scales[1] * int(quantization["group_size"])
            found[name.removesuffix(".weight")] = (columns, rows)
        return found

    def num_parameters(self) -> int:
        """Count parameters, a tied head once; for a quantized base the count before quantization."""
        linears = self.linear_shapes()
        total = sum(rows * columns for rows, columns in linears.values())
        for name, shape in self.shapes.items():
            module = name.rpartition(".")[0]
            if module in linears and not name.endswith(".bias"):
                continue
            total += int(np.prod(shape))
        return total

    def fingerprint(self) -> str:
        """Hash of config and weights: cheap, and different for different bases."""
        config = json.dumps(dict(self.config), sort_keys=True, default=str)
        return hashlib.sha256(f"{config}{self.weights_fingerprint()}".encode()).hexdigest()[:16]

    def weights_fingerprint(self) -> str:
        """Hash of each weight file's first and last megabyte."""
        digest = hashlib.sha256()
        for path in weight_files(self.folder):
            with path.open("rb") as file:
                digest.update(file.read(1 << 20))
                file.seek(-min(1 << 20, path.stat().st_size), os.SEEK_END)
                digest.update(file.read())
        return digest.hexdigest()[:16]


def write_base(model: BaseModel, adapter: Path) -> None:
    """Leave in an adapter's folder which weights it was trained on. A file of its own: PEFT warns of keys it does not know."""
    tree = {"name": model.name, "revision": model.revision, "weights": model.weights_fingerprint()}
    (adapter / BASE_FILE).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def check_adapter_folder(folder: Path) -> dict[str, Any]:
    """Refuse a folder that is not a whole LoRA adapter in PEFT's form; return its config, whose values are then safe to use.

    Raises:
        RecipeError: another kind of adapter, or PEFT's two files are not there: with the way to PEFT's form, or to the
            adapter or model that lies in the folder.
        DataError: files that are broken or do not fit each other.
    """
    _refuse_no_adapter(folder)
    config = _read_config(folder / "adapter_config.json")
    if problems := peft_config.config_problems(config):
        raise DataError(f"{folder / 'adapter_config.json'}", problems)
    if problems := peft_config.other_kind(config):
        raise RecipeError(f"{folder}: not an adapter that can be used", problems)
    names = read_header(folder / "adapter_model.safetensors").keys() - {"__metadata__"}
    adapted, sized = ({name.partition(leaf)[0] for name in names if leaf in name} for leaf in (".lora_", _MAGNITUDE))
    odd = sorted(adapted - sized if config.get("use_dora") else sized)
    if odd:
        lack, said = ("no", "") if config.get("use_dora") else ("a", " not")
        raise DataError(
            f"{folder}: {odd[0]}: {lack} lora_magnitude_vector, though use_dora is{said} set ({len(odd)} such layers). "
            "Copy both files again from where the adapter was made."
        )
    return config


def _refuse_no_adapter(folder: Path) -> None:
    if all((folder / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors")):
        return
    if (folder / MLX_ADAPTER).is_file():
        raise RecipeError(
            f"{folder}: an adapter in mlx-lm's form; expected PEFT's. Convert it: smolmlx adapter convert {folder} OUT --to peft"
        )
    models, adapters = find_results(folder)
    hint = f" Did you mean {listed(adapters, 'or')}?" if adapters else ""
    if models and not adapters:
        hint = f" A whole model lies in {listed(models)}: pass that as --model, without --adapter."
    raise RecipeError(
        f"{folder}: not an adapter folder (needs adapter_config.json and adapter_model.safetensors).{hint}"
    )


class NotedBase(NamedTuple):
    """The base that an adapter was trained on, as written down beside it."""

    name: str
    revision: str | None
    """Commit of a hub model; None of any other."""
    weights: str
    """Fingerprint."""


def noted_base(adapter: Path) -> NotedBase | None:
    """Return what `write_base` left in an adapter's folder; None where it did not, as in other tools' adapters.

    Raises:
        DataError: it is there, and broken.
    """
    path = adapter / BASE_FILE
    if not path.is_file():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return NotedBase(str(tree["name"]), str(tree.get("revision") or "") or None, str(tree["weights"]))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: broken, so the base that the adapter was trained on is not known. Copy it again from where the adapter "
            "was made; without the file, any base of the same shapes is taken."
        ) from error


def check_base(model: BaseModel, adapter: Path) -> None:
    """Refuse a model that an adapter was not trained on; adapters of other tools do not say, and pass.

    Raises:
        RecipeError: other weights.
        DataError: a broken note of them.
    """
    note = noted_base(adapter)
    if note and note.weights != model.weights_fingerprint():
        raise RecipeError(
            f"{adapter}: made for another base model, {note.name}; {model.folder} has other weights. Pass the model it was trained "
            f"on; if they are the same weights in other files, delete {BASE_FILE} in the adapter's folder."
        )


def embedded_folder() -> Path:
    """Return the folder of the embedded tiny model, in a checkout or in an installed wheel."""
    return files_root() / "data" / "tiny" / "model"


def files_root() -> Path:
    """Return the folder that holds recipes/ and data/: the checkout, or `smolmlx/_files` of a wheel."""
    package = Path(__file__).resolve().parent
    return package / "_files" if (package / "_files").is_dir() else package.parent


def find_model(name: str, revision: str | None = None) -> BaseModel:
    """Locate a model by local folder, `tiny`, or hub id (from the cache when offline).

    Raises:
        RecipeError: a .gguf file, an adapter folder, another folder without a config, no such revision.
        DataError: broken files.
        BackendError: a hub id that is missing, gated or not reachable.
    """
    if name.lower().endswith(".gguf"):
        raise RecipeError(f"{name}: {_GGUF}")
    if name == EMBEDDED:
        return open_model(embedded_folder(), name)
    folder = local_folder(name)
    if folder:
        return open_model(folder, name)
    if looks_local(name):
        raise RecipeError(
            f"{name}: no such model folder. Pass a folder with config.json and {PATTERN}, a hub id, or 'tiny'."
        )
    folder, commit = _download(name, revision)
    return open_model(folder, name, commit)


def looks_local(name: str) -> bool:
    """Whether a name cannot be a hub id, which is owner/name; in `runs/` lie runs."""
    return name.startswith((".", "/", "~", "runs/")) or name.count("/") != 1 or name.endswith("/")


def local_folder(name: str) -> Path | None:
    """Return the folder that a name stands for, if it is one: names come from files of others, and may be no path at all."""
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError):  # too long; the home of nobody
        return None


def find_local(name: str) -> BaseModel | None:
    """Open `tiny`, or a name that is a model's folder on this machine; None for all others."""
    folder = embedded_folder() if name == EMBEDDED else local_folder(name)
    return open_model(folder, name) if folder and (folder / "config.json").is_file() else None


def open_model(folder: Path, name: str | None = None, revision: str | None = None) -> BaseModel:
    """Read the config of a local model folder.

    Raises:
        RecipeError: the folder is not a model's.
        DataError: files that are broken or incomplete, do not fit each other, or that loaders would not agree on.
    """
    name = name or str(folder)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise RecipeError(f"{name}: {_why_no_model(folder, name)}")
    config = _read_config(config_file)
    if not weight_files(folder):
        _refuse_no_weights(folder, name)
    model = BaseModel(name, folder, revision, with_rope_theta(config))
    problems = config_problems(model.config, model.shapes) or _weight_problems(model)
    if problems:
        raise DataError(f"{config_file}", problems)
    _refuse_two_heads(model)
    return model


def _weight_problems(model: BaseModel) -> list[str]:
    """Hold the stored weights of a Llama-type base to its config: what a loader finds missing, it may draw at random."""
    packed = model.quantization or "quantization_config" in model.config
    if model.config.get("model_type") != "llama" or packed or EMBEDDING not in model.shapes:
        return []
    try:
        expected = llama_shapes(model.config)
    except RecipeError as error:
        return [*error.problems] or [str(error)]
    except TypeError as error:  # a size for each layer
        return [f"its sizes are not those of model type llama ({error})."]
    missing = [name for name in expected if name not in model.shapes]
    if missing:
        return [f"its weight files lack {listed(missing)}. Fetch the folder again, whole."]
    other = [name for name, shape in expected.items() if model.shapes[name] != shape]
    found = [
        f"{name} is stored as {list(model.shapes[name])}, config.json makes it {list(expected[name])}."
        for name in other[:3]
    ]
    blocks = {int(name.split(".")[2]) for name in model.shapes if name.startswith("model.layers.")}
    if len(blocks) > model.num_layers:
        found.append(f"num_hidden_layers: {model.num_layers}, but the weights are of {len(blocks)}.")
    return found


def _why_no_model(folder: Path, name: str) -> str:
    """Say what a folder without a config is, and what to pass in its place."""
    if (folder / MLX_ADAPTER).is_file():
        return (
            f"this is an adapter in mlx-lm's form, not a base model. Convert it (smolmlx adapter convert {name} OUT --to peft),"
            " then pass OUT as --adapter and its base as --model."
        )
    if (folder / "adapter_config.json").is_file():
        return "this is an adapter folder, not a base model. Pass it as --adapter and its base as --model."
    if any(folder.glob("*.gguf")):
        return f"holds only GGUF files. {_GGUF}"
    return f"no config.json in this folder, so it is not a model. {_point_on(folder, name)}"


def _point_on(folder: Path, name: str) -> str:
    """Say which of the models and adapters in a folder to pass, and how."""
    models, adapters = find_results(folder)
    said = []
    if models:
        said.append(f"Pass the model in it: {listed(models, 'or')}.")
    if adapters:
        bases = sorted({note.name for adapter in adapters if (note := noted_base(adapter))})
        base = f" ({', '.join(bases)})" if bases else ""
        said.append(f"Pass the adapter in it as --adapter ({listed(adapters, 'or')}), and its base as --model{base}.")
    if not said and (folder / "recipe.yaml").is_file():
        said.append(f"It is a run that is not finished. Go on with: smolmlx train --resume {name}")
    return " ".join(said) or "Download the whole model folder."


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}). Download the file again.") from error
    if not isinstance(config, dict):
        raise DataError(f"{path}: expected a JSON table, found a {type(config).__name__}. Download the file again.")
    return config


def _refuse_no_weights(folder: Path, name: str) -> None:
    if any(folder.glob("*.gguf")):
        raise RecipeError(f"{name}: its weights are GGUF files. {_GGUF}")
    other = "the folder has only a config"
    if any(folder.glob("*.bin")):
        other = "pytorch_model.bin is a pickle, which is not read"
    elif named := sorted(path.name for path in folder.glob("*.safetensors")):
        other = f"{named[0]} is a name that neither transformers nor mlx-lm loads"
    raise DataError(f"{name}: no {PATTERN} weights ({other}). Download the weights, or convert them to safetensors.")


def _refuse_two_heads(model: BaseModel) -> None:
    """Refuse a head of its own beside a tie: transformers 5 keeps both then, mlx-lm the embedding alone.

    Raises:
        DataError
    """
    parts = [f"{name.removesuffix('weight')}{leaf}" for name in (HEAD, EMBEDDING) for leaf in ("weight", "scales")]
    pairs = [pair for pair in zip(parts[:2], parts[2:], strict=True) if set(pair) <= set(model.shapes)]
    if model.config.get("tie_word_embeddings") and not all(_same(model.folder, *pair) for pair in pairs):
        raise DataError(
            f"{model.name}: config.json says tie_word_embeddings, but {HEAD} is stored and is not {EMBEDDING}: transformers"
            " would use both, mlx-lm the embedding alone. Set tie_word_embeddings to false in config.json where the head"
            f" was trained, or save the model again without {HEAD}."
        )


def _same(folder: Path, *names: str) -> bool:
    """Whether two stored weights are equal, bit by bit."""
    found = []
    for path in weight_files(folder):
        header = read_header(path)
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        for name in set(names) & set(header):
            first, end = header[name]["data_offsets"]
            words = (
                np.memmap(path, np.uint8, "r", start + first, (end - first,)) if end > first else np.zeros(0, np.uint8)
            )
            found.append((header[name]["dtype"], header[name]["shape"], words))
    (*kind, one), (*other, two) = found
    blocks = (slice(at, at + _BLOCK_BYTES) for at in range(0, len(one), _BLOCK_BYTES))
    return kind == other and all(np.array_equal(one[block], two[block]) for block in blocks)


def with_rope_theta(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config whose rope_theta stands at the top level, where mlx-lm looks for it.

    transformers 5 saves it only inside `rope_parameters`; mlx-lm 0.32's Llama then silently uses 10000. Gemma 3 has one
    table for each kind of layer, and mlx-lm a name of its own for the local one.
    """
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and isinstance(rope.get("full_attention"), dict):
        local = rope.get("sliding_attention") or {}
        tops = {"rope_theta": rope["full_attention"].get("rope_theta"), "rope_local_base_freq": local.get("rope_theta")}
        return {**{name: theta for name, theta in tops.items() if theta is not None}, **config}
    if isinstance(rope, dict) and "rope_theta" in rope and "rope_theta" not in config:
        return {**config, "rope_theta": rope["rope_theta"]}
    return dict(config)


def read_headers(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return weight name -> (shape, safetensors dtype) over all shards of a folder.

    Raises:
        DataError: a file that is truncated or not safetensors, a shard that lacks what the index says it has, or a weight in
            two of them.
    """
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    where: dict[str, str] = {}
    problems = []
    for path in weight_files(folder):
        for name, entry in read_header(path).items():
            if name == "__metadata__":
                continue
            if name in found:
                problems.append(f"{name}: in {where[name]} and in {path.name}; loaders differ in which they take.")
            found[name], where[name] = (tuple(entry["shape"]), str(entry["dtype"])), path.name
    for name, file in weight_map(folder).items():
        if where.get(name) != file:
            problems.append(f"{name}: {INDEX} says it is in {file}, which lacks it. Fetch that file again.")
    if problems:
        raise DataError(str(folder), problems)
    return found


def read_header(path: Path) -> dict[str, Any]:
    """Return the JSON header of one safetensors file; see `read_headers`."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise DataError(
                f"{path}: not a whole safetensors file (header of {length} bytes in a file of {size}). Fetch it again."
            )
        try:
            header = parse_header(file.read(length))
        except ValueError as error:
            raise DataError(f"{path}: not a whole safetensors file: {error}. Fetch the file again.") from error
    try:
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path}: a tensor without offsets in its header. Fetch the file again.") from error
    if ends and size < 8 + length + max(ends):
        raise DataError(
            f"{path}: truncated: {size} bytes, but its header promises {8 + length + max(ends)}. Fetch it again."
        )
    return header


def make_model(config: Mapping[str, Any], folder: Path, seed: int, first_weights: str = "normal") -> BaseModel:
    """Draw the first weights of a Llama-type model (see `first_weights.draw`) and save them as a model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    full = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32", **config}
    weights = draw(full, llama_shapes(full), first_weights, seed)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    usual_mode(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(full, indent=2) + "\n", encoding="utf-8")
    return BaseModel("from config", folder, None, full)


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every weight of a dense Llama-type model (grouped-query attention, SwiGLU, RMSNorm).

    Raises:
        RecipeError: the config lacks a key or its sizes do not fit each other.
    """
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [f"model.config.{key}: missing." for key in keys if key not in config]
    if missing:
        raise RecipeError("model.config", missing)
    vocab, width, inner, layers, heads = (int(config[key]) for key in keys)
    kv_heads = int(config.get("num_key_value_heads", heads))
    if width % heads or heads % kv_heads:
        raise RecipeError(
            f"model.config: {width} wide with {heads} heads and {kv_heads} key-value heads does not divide evenly."
        )
    head = int(config.get("head_dim") or width // heads)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for layer in range(layers):
        block = f"model.layers.{layer}."
        shapes |= {
            f"{block}input_layernorm.weight": (width,),
            f"{block}self_attn.q_proj.weight": (heads * head, width),
            f"{block}self_attn.k_proj.weight": (kv_heads * head, width),
            f"{block}self_attn.v_proj.weight": (kv_heads * head, width),
            f"{block}self_attn.o_proj.weight": (width, heads * head),
            f"{block}post_attention_layernorm.weight": (width,),
            f"{block}mlp.gate_proj.weight": (inner, width),
            f"{block}mlp.up_proj.weight": (inner, width),
            f"{block}mlp.down_proj.weight": (width, inner),
        }
    shapes["model.norm.weight"] = (width,)
    if not config.get("tie_word_embeddings", False):
        shapes[HEAD] = (vocab, width)
    return shapes


def _download(name: str, revision: str | None) -> tuple[Path, str | None]:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise BackendError(
            f"{name}: not a local folder, and huggingface_hub is not installed. pip install 'smolmlx[mlx]' or [cuda]."
        ) from error
    patterns = ["*.json", PATTERN, "*.jinja", "tokenizer.model", "merges.txt"]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise BackendError(f"{name}: gated. Accept its terms on its hub page, then run `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise BackendError(f"{name}: no such model on the hub (or it is private: `hf auth login`).") from error
    except HFValidationError as error:
        raise RecipeError(
            f"{name}: no such model folder, and not a hub id either (owner/name: letters, digits, '-', '_' and '.')."
        ) from error
    except RevisionNotFoundError as error:
        raise BackendError(
            f"{name}: the hub has no revision '{revision}' of it. Give a commit, tag or branch of that model."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise BackendError(
            f"{name}: not a local folder, not in the cache, and the hub cannot be reached. Pass a folder, or go online once."
        ) from error
    return folder, folder.name
