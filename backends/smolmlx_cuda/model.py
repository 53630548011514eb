"""Load transformers' models, put PEFT adapters on them, and read and write weights under canonical names.

B batch, T tokens, S supervised positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from smolmlx.data.batches import Batch
from smolmlx.errors import BackendError, DataError, RecipeError
from smolmlx.models import check_adapter_folder, read_header
from smolmlx.plan import PEFT_PREFIX, Plan
from smolmlx.session import Arrays
from smolmlx.signposts import listed
from smolmlx_cuda.memory import ran_out

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Logits beyond this are made in pieces, each recomputed in the backward pass.
_LOGIT_BYTES = 1 << 30
_CPU_LOGIT_BYTES = 256 << 20


def load_base(folder: Path, dtype: str, device: str, quantize: str = "none", attention: str = "sdpa") -> Any:
    """Load a base model onto a device.

    Raises:
        BackendError: transformers has no such architecture.
        RecipeError: the weights do not fit the config.
    """
    # Left out, not None, which makes transformers overlook the folder's own quantization and draw weights at random.
    quantization: dict[str, Any] = {}
    if quantize != "none":
        quantization["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=quantize == "4bit",
            load_in_8bit=quantize == "8bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=DTYPES[dtype],
        )
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            local_files_only=True,
            output_loading_info=True,
            **quantization,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackendError(f"{folder}: transformers cannot load this model: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:
        if ran_out(error):
            raise
        raise RecipeError(f"{folder}: the weights do not fit config.json: {str(error).splitlines()[0]}") from error
    if lacking := sorted(found["missing_keys"]):  # transformers draws them at random, and warns
        raise RecipeError(
            f"{folder}: the weights do not fit config.json: the files lack {listed(lacking)}. Fetch the folder again, whole."
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model if quantization else model.to(device)


def add_lora(model: Any, plan: Plan) -> Any:
    """Put an untrained PEFT adapter on a model; its weights are loaded afterwards."""
    lora = plan.recipe.lora
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=sorted(plan.targets),
        use_rslora=lora.rslora, use_dora=lora.dora, bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, config)


class Adapters:
    """Puts adapters on one loaded base and takes them off again; each is read once."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._names: dict[Path, str] = {}

    def use(self, folder: Path | None) -> Any:
        """Return the model with an adapter, or with none.

        Raises:
            RecipeError: not an adapter, or made for another base; the base is left bare then.
        """
        if isinstance(self._model, PeftModel):
            self._model.base_model.disable_adapter_layers()
        if folder is None:
            return self._model
        if folder not in self._names:
            name = f"adapter{len(self._names)}" if self._names else "default"
            self._model = load_adapter(self._model, folder, name)
            self._names[folder] = name
        self._model.base_model.enable_adapter_layers()
        self._model.set_adapter(self._names[folder])
        return self._model


def load_adapter(model: Any, folder: Path, name: str = "default") -> Any:
    """Put a PEFT adapter folder on a base model.

    Raises:
        RecipeError: not an adapter, or made for another base.
        DataError: broken files.
    """
    check_adapter_folder(folder)
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), name)
            found = model
        else:
            found = PeftModel.from_pretrained(model, str(folder), name)
    except SafetensorError as error:
        raise DataError(f"{folder / 'adapter_model.safetensors'}: cannot be read ({error}). Fetch it again.") from error
    except (RuntimeError, ValueError) as error:
        if ran_out(error):
            raise
        why = " ".join(str(error).split())[:300]
        raise RecipeError(
            f"{folder}: made for another base model. Pass the one that its adapter_config.json names. (PEFT says: {why})"
        ) from error
    # PEFT leaves out, without a word, tensors of layers that the base lacks. An embedding's factors end in the name.
    adapted = {
        canonical(path).partition(".lora_")[0] for path, _ in found.named_parameters() if f".{name}." in f"{path}."
    }
    stored = {
        name.partition(".lora_")[0] for name in read_header(folder / "adapter_model.safetensors") if ".lora_" in name
    }
    strangers = sorted(stored - adapted)
    if strangers:
        raise RecipeError(
            f"{folder}: made for another base model: it adapts {strangers[0].removeprefix(PEFT_PREFIX)} "
            f"(and {len(strangers) - 1} more), which this model lacks."
        )
    return found


def canonical(name: str) -> str:
    """Return the stored name of a parameter: PEFT's without its adapter name."""
    return name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector").replace(".default", "")


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    return {canonical(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def read_weights(model: Any) -> Arrays:
    return {name: to_numpy(parameter) for name, parameter in trainable(model).items()}


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    found: np.ndarray[Any, np.dtype[Any]] = tensor.detach().cpu().float().numpy().copy()
    return found


def write_weights(model: Any, arrays: Arrays) -> None:
    """Copy canonical arrays into the trainable parameters.

    Raises:
        RecipeError: names or shapes that do not fit.
    """
    parameters = trainable(model)
    with torch.no_grad():
        for name, value in arrays.items():
            if name not in parameters or tuple(parameters[name].shape) != value.shape:
                raise RecipeError(f"weights made for another model: {name} has shape {value.shape} there.")
            parameters[name].copy_(torch.from_numpy(np.ascontiguousarray(value)))


class Losses:
    """Nats and correct targets at the supervised positions; logits are made for those alone."""

    def __init__(self, model: Any, mixed: bool = False) -> None:
        self.model = model
        self.mixed = mixed
        self.body, self.head = split_head(model)
        self.vocabulary = int(model.config.get_text_config().vocab_size)

    def positions(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (nats, correct) of each supervised position: [S], [S].

        Args:
            inputs: as made by `to_inputs`.
        """
        device = inputs["ids"].device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.mixed):
            return self._positions(inputs)

    def _positions(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        # use_cache must be off: a cache makes transformers drop the isolation of packed documents.
        hidden = self.body(input_ids=inputs["ids"], position_ids=inputs.get("positions"), use_cache=False)
        return self.score(hidden.reshape(-1, hidden.shape[-1])[inputs["index"]], inputs["labels"])

    def score(self, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (nats, correct) of each label [S], from the body's output at the positions before them, [S, D]."""
        limit = _LOGIT_BYTES if hidden.is_cuda else _CPU_LOGIT_BYTES
        rows = max(64, limit // (4 * self.vocabulary))
        if hidden.shape[0] <= rows:
            return self._piece(hidden, labels)
        pieces = [
            checkpoint(self._piece, part, of_part, use_reentrant=False)
            for part, of_part in zip(hidden.split(rows), labels.split(rows), strict=True)
        ]
        return torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces])

    def _piece(self, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.head(hidden).float()  # [S, V]
        nats = cross_entropy(logits, labels, reduction="none")
        with torch.no_grad():
            correct = logits.argmax(dim=1) == labels
        return nats, correct

    def totals(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (nats, correct) summed over a batch."""
        nats, correct = self.positions(inputs)
        return (nats * inputs["weights"]).sum(), (correct * inputs["weights"]).sum()


def split_head(model: Any) -> tuple[Callable[..., torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """Return (body, head) such that head(body(ids)) equals the model's logits.

    Found by comparing on three tokens; a model that does more between the two gives all logits, passed through.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    inner, head = base.base_model, base.get_output_embeddings()

    def body(**inputs: Any) -> torch.Tensor:
        found: torch.Tensor = inner(**inputs).last_hidden_state
        return found

    def whole(**inputs: Any) -> torch.Tensor:
        found: torch.Tensor = base(**inputs).logits
        return found

    probe = torch.tensor([[1, 2, 3]], device=base.device)
    training = model.training
    model.eval()
    with torch.no_grad():
        same = (
            inner is not base
            and head is not None
            and torch.allclose(whole(input_ids=probe), head(body(input_ids=probe)), atol=1e-3)
        )
    model.train(training)
    return (body, head) if same else (whole, lambda logits: logits)


def to_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """Return the tensors of a batch; positions only where rows are packed, since they are what isolates documents."""
    found = {
        "ids": torch.from_numpy(batch.ids).long(),
        "index": torch.from_numpy(batch.index).long(),
        "labels": torch.from_numpy(batch.labels).long(),
        "weights": torch.from_numpy(batch.weights),
    }
    if batch.packed:
        found["positions"] = torch.from_numpy(batch.positions).long()
    return found
