"""What will run: every number resolved before weights load, so that an impossible request fails early and for a reason.

The plan decides everything about what is learned: tokens, masks, order, learning rates, the first weights. An engine
only computes, which is why two engines given one plan produce one curve.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from smolmlx import memory
from smolmlx.backend import Backend, Capabilities, Choice, load
from smolmlx.data.batches import BatchPlan, padded_tokens, plan_batches
from smolmlx.data.chat import Tokenizer
from smolmlx.data.encode import Encoding
from smolmlx.data.formats import MissingFile, Source, open_source
from smolmlx.data.pair_batches import PairPlan, plan_pairs
from smolmlx.data.store import TokenStore, encode_source
from smolmlx.errors import BackendError, DataError, RecipeError, nearest
from smolmlx.held_out import check_held_out, locate
from smolmlx.layout import choose_packing, choose_sharing
from smolmlx.models import EMBEDDED, BaseModel, files_root, find_model, llama_shapes
from smolmlx.recipe import Loaded, Recipe
from smolmlx.row_checks import beyond_context, check_account, check_ids, unscored
from smolmlx.schedule import count_steps, learning_rates, moments
from smolmlx.start_adapter import StartAdapter, find_adapter, with_adapter_lora

PEFT_PREFIX = "base_model.model."
FROM_CONFIG = "made from config"
"""What a model that is not there yet is called; plan.json of its run keeps it."""
LOGGER_PACKAGES = {"wandb": ("wandb",), "trackio": ("trackio",), "tensorboard": ("tensorboardX", "tensorboard")}
"""Logger -> packages of which one is needed. tensorboardX writes without torch; torch's writer needs tensorboard."""


@dataclass(frozen=True)
class Plan:
    """One stage of training, resolved."""

    loaded: Loaded
    backend: str
    why_backend: str
    capabilities: Capabilities
    dtype: str
    model: BaseModel
    tokenizer: Tokenizer
    format_name: str
    train: BatchPlan
    validation: BatchPlan | None
    steps: int
    learning_rates: npt.NDArray[np.float64]
    """[steps]; learning rate of each optimizer step."""
    eval_steps: frozenset[int]
    """Numbers of finished steps after which the validation set is scored."""
    save_steps: frozenset[int]
    targets: Mapping[str, tuple[int, int]]
    """Module path -> (in, out) of every layer that gets a LoRA adapter; empty for full training."""
    notes: tuple[str, ...]
    """Choices a user should know about, in sentences."""
    pairs: PairPlan | None = None
    """Micro-batches of stage dpo; `train` then decides their order."""
    validation_pairs: PairPlan | None = None
    start: StartAdapter | None = None
    """The adapter training starts from; None starts from new weights."""

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def full(self) -> bool:
        return self.recipe.train.method == "full"

    @property
    def weights_name(self) -> str:
        """File name of the trained weights, in checkpoints and in the run."""
        return "model.safetensors" if self.full else "adapter_model.safetensors"

    @property
    def scale(self) -> float:
        """Factor of B A in the weight update: alpha/r, or alpha/sqrt(r) with rsLoRA."""
        lora = self.recipe.lora
        return lora.alpha / math.sqrt(lora.r) if lora.rslora else lora.alpha / lora.r

    @cached_property
    def num_trainable(self) -> int:
        if self.full:
            return self.num_parameters
        lora = self.recipe.lora
        return sum(
            lora.r * (width_in + width_out) + (width_out if lora.dora else 0)
            for width_in, width_out in self.targets.values()
        )

    @cached_property
    def num_parameters(self) -> int:
        return self.model.num_parameters()

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations a trained token takes, about: 6 a parameter, or 4 where the base's weights get no gradient.

        Times tokens/s, against the peak of the device, it tells how well the device is used (attention scores not counted).
        """
        return (6 if self.full else 4) * self.num_parameters

    @cached_property
    def memory_bytes(self) -> int:
        """Estimated peak memory; see `memory.estimate`."""
        return memory.estimate(self)

    @property
    def muon_ratio(self) -> float:
        """What the learning rate of muon's matrices is times; both follow one schedule."""
        train = self.recipe.train
        return train.muon_learning_rate / train.learning_rate if train.muon_learning_rate else 10.0

    def trains_with_muon(self, name: str, ndim: int) -> bool:
        """Whether muon trains this weight: the matrices of the blocks, not embeddings, heads, norms and biases."""
        return self.recipe.train.optimizer == "muon" and ndim == 2 and ".layers." in name

    def fingerprint(self) -> str:
        """Hash of all that decides what is learned; a checkpoint belongs to one fingerprint, an engine does not matter."""
        recipe = self.recipe.model_dump(mode="json", include={"stage", "model", "train", "lora", "eval"})
        for section, free in (
            ("train", ("gradient_checkpointing", "mixed_precision", "compile", "optimizer")),
            ("model", ("dtype", "id", "tokenizer", "adapter")),
        ):
            for key in free:
                recipe[section].pop(key)
        if self.pairs is not None:
            recipe["dpo"] = self.recipe.dpo.model_dump(mode="json", exclude={"shared_prompt", "cache"})
        if self.start is not None:
            recipe["start"] = self.start.content_hash()
        recipe["moments"] = {"adamw_8bit": "8bit", "muon": "muon"}.get(self.recipe.train.optimizer, "float32")
        digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
        digest.update(f"{self.steps} {self.train.digest()} {self.model.fingerprint()}".encode())
        digest.update((self.validation.digest() if self.validation else "").encode())
        digest.update(self.learning_rates.tobytes())
        return digest.hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Return what `smolmlx plan --json` prints and plan.json holds."""
        lengths = self.train.store.lengths
        return {
            "stage": self.recipe.stage,
            "backend": self.backend,
            "why_backend": self.why_backend,
            "device": self.capabilities.device,
            "dtype": self.dtype,
            "model": {"id": self.model.name, "revision": self.model.revision, "fingerprint": self.model.fingerprint()},
            "num_parameters": self.num_parameters,
            "num_trainable": self.num_trainable,
            "targets": sorted({name.rpartition(".")[2] for name in self.targets}),
            "format": self.format_name,
            "template": self.tokenizer.fingerprint(),
            "rows": self.num_rows,
            "rows_read": self.train.store.account.rows,
            "reasons": dict(self.train.store.account.reasons),
            "tokens": int(lengths.sum()),
            "supervised": int(self.train.store.supervised.sum()),
            "longest": int(lengths.max()),
            "packed": self.train.packed and self.pairs is None,
            "packs": self.train.num_rows,
            "widths": list(self.train.widths),
            "padded_tokens": self.pairs.padded_tokens() if self.pairs else padded_tokens(self.train),
            "validation_rows": self.validation.num_rows if self.validation else 0,
            **self._dpo_json(),
            "batch_size": self.train.batch_size,
            "accumulation": self.train.accumulation,
            "steps_per_epoch": self.train.steps_per_epoch,
            "steps": self.steps,
            "learning_rate_first": float(self.learning_rates[0]),
            "learning_rate_peak": float(self.learning_rates.max()),
            "learning_rate_last": float(self.learning_rates[-1]),
            "eval_steps": sorted(self.eval_steps)[:50],
            "memory_bytes": self.memory_bytes,
            "device_memory_bytes": self.capabilities.memory_bytes,
            "data_hash": self.train.digest(),
            "fingerprint": self.fingerprint(),
            "notes": list(self.notes),
        }

    @property
    def num_rows(self) -> int:
        """Rows that are trained: pairs in stage dpo."""
        return len(self.pairs) if self.pairs is not None else len(self.train.store)

    def _dpo_json(self) -> dict[str, Any]:
        if self.pairs is None:
            return {}
        return {
            "dpo": {
                "shared_prompt": self.pairs.shared,
                "prefix_widths": list(self.pairs.prefix_widths),
                "tail_widths": list(self.pairs.tail_widths),
                "start_adapter": str(self.start.folder) if self.start else None,
            }
        }


def resolve(loaded: Loaded, choice: Choice, on_rows: Callable[[int], None] | None = None) -> Plan:
    """Turn a recipe into a plan for one engine on this machine.

    Args:
        on_rows: told how many rows have been tokenized, for a progress display.

    Raises:
        RecipeError: values that cannot be honoured, all at once.
        DataError: rows that cannot be trained.
    """
    recipe = loaded.recipe
    capabilities = choice.backend.capabilities(choice.device)
    problems = [
        *_unsupported(recipe, capabilities, choice.backend.name),
        *_missing_loggers(recipe),
        *check_knobs(recipe, choice.backend),
    ]
    if problems:
        raise RecipeError(loaded.source, problems)
    model = (
        _from_config(recipe)
        if recipe.model.config is not None
        else find_model(_model_name(loaded), recipe.model.revision)
    )
    if recipe.model.revision and model.revision is None:
        raise RecipeError(f"model.revision: is for a hub id; '{recipe.model.id}' is a folder. Leave it out.")
    _check_blocks(model)
    adapter = find_adapter(recipe.model.adapter, loaded.folder) if recipe.model.adapter else None
    if adapter is not None:
        loaded = with_adapter_lora(loaded, adapter)
        recipe = loaded.recipe
    targets = {} if recipe.train.method == "full" else select_targets(model, recipe)
    if adapter is not None:
        adapter.check(model, targets, recipe.lora.r)
    tokenizer = open_tokenizer(loaded, model, adapter)
    if idle := tokenizer.idle_variables(recipe.data.template_args):
        raise RecipeError(f"data.template_args: {', '.join(idle)}: the chat template does not use this. Leave it out.")
    if taken := tokenizer.taken_variables(recipe.data.template_args):
        raise RecipeError(
            f"data.template_args: {', '.join(taken)}: every chat template is given this already. Leave it out."
        )
    check_held_out(loaded)
    source, train_store, validation_store = _encode(loaded, tokenizer, on_rows)
    check_ids(tokenizer, model, train_store)
    notes = [*capabilities.notes, *_skipped_files(source), *_other_template(tokenizer, adapter)]
    notes += [*unscored(validation_store, recipe), *beyond_context(model, train_store)]
    pairs = validation_pairs = None
    if recipe.stage == "dpo":
        pairs = choose_sharing(recipe, train_store, model, tokenizer.pad_id, notes)
        validation_pairs = validation_store and plan_pairs(
            validation_store, batch_size=recipe.train.batch_size, shuffle=False, shared=pairs.shared, pad_id=tokenizer.pad_id
        )  # fmt: skip
        train, validation = pairs.order, validation_pairs and validation_pairs.order
    else:
        train = choose_packing(recipe, train_store, model, tokenizer.pad_id, notes)
        validation = validation_store and plan_batches(
            validation_store, batch_size=recipe.train.batch_size, pack_to=None, shuffle=False, pad_id=tokenizer.pad_id
        )
    steps = count_steps(recipe.train, train.steps_per_epoch)
    notes += _without_effect(loaded, capabilities, steps, train.batch_size)
    widest = "float32" if recipe.train.method == "full" else capabilities.dtype  # small updates would vanish in 16 bits
    dtype = widest if recipe.model.dtype == "auto" else recipe.model.dtype
    plan = Plan(
        loaded, choice.backend.name, choice.reason, capabilities, dtype, model, tokenizer, source.form.name, train, validation or None,
        steps, learning_rates(recipe.train, steps),
        eval_steps=moments(recipe.eval.every, steps, train.steps_per_epoch) | {steps} if validation else frozenset(),
        save_steps=moments(recipe.save.every, steps, train.steps_per_epoch),
        targets=targets, notes=tuple(notes), pairs=pairs, validation_pairs=validation_pairs or None, start=adapter,
    )  # fmt: skip
    refused = choice.backend.check_plan(plan)
    if refused:
        raise RecipeError(loaded.source, refused)
    tight = memory.check(plan)
    return replace(plan, notes=(*plan.notes, tight)) if tight else plan


def _check_blocks(model: BaseModel) -> None:
    """Refuse a base whose blocks are not laid out like Llama's: neither an adapter nor an estimate has a place there."""
    if "num_hidden_layers" not in model.config or not model.linear_shapes():
        kind = model.config.get("model_type")
        raise RecipeError(
            f"{model.name}: no linear layers named `*.layers.N.*`, or no num_hidden_layers in its config.json (model "
            f"type '{kind}'), so there is nothing to train. Take a Llama-type base."
        )


def engine_knobs(recipe: Recipe, backend: str) -> Mapping[str, Any]:
    """Return the recipe's block for an engine; an engine of another name has none."""
    return {"mlx": recipe.mlx, "cuda": recipe.cuda}.get(backend, {})


def _unsupported(recipe: Recipe, capabilities: Capabilities, backend: str) -> Iterator[str]:
    asked = (
        ("stage", recipe.stage, capabilities.stages),
        ("train.method", recipe.train.method, capabilities.methods),
        ("model.quantize", recipe.model.quantize, capabilities.quantize),
        ("train.optimizer", recipe.train.optimizer, capabilities.optimizers),
        ("model.dtype", recipe.model.dtype, ("auto", *capabilities.dtypes)),
    )
    for key, value, supported in asked:
        if value not in supported:
            why = capabilities.missing.get(value)
            yield f"{key}: backend '{backend}' on {capabilities.device} does not support '{value}' (supports: {', '.join(supported)}).{f' {why}' if why else ''}"
    if recipe.train.mixed_precision and "bfloat16" not in capabilities.dtypes:
        yield f"train.mixed_precision: backend '{backend}' on {capabilities.device} has no bfloat16."


def check_knobs(recipe: Recipe, chosen: Backend | None = None) -> Iterator[str]:
    """Yield what each engine that is installed finds wrong with its own block, whichever runs the recipe."""
    if chosen is not None:
        yield from chosen.check(engine_knobs(recipe, chosen.name))
    for name in ("mlx", "cuda"):
        if (knobs := engine_knobs(recipe, name)) and (chosen is None or chosen.name != name):
            try:
                yield from load(name).check(knobs)
            except BackendError:  # not installed here
                continue


def _without_effect(loaded: Loaded, capabilities: Capabilities, steps: int, batch_size: int) -> Iterator[str]:
    """Say which settings do nothing in so short a run, or on this engine; another run of the recipe may need them."""
    recipe = loaded.recipe
    if batch_size < recipe.train.batch_size:
        rows = "pairs" if recipe.stage == "dpo" else "rows"
        yield f"train.batch_size: {recipe.train.batch_size}, but an epoch has {batch_size} {rows}: all are in one batch."
    if recipe.train.max_steps and "train.max_steps" in loaded.origins and steps < recipe.train.max_steps:
        yield f"train.max_steps: {recipe.train.max_steps:,}, but train.epochs: {recipe.train.epochs:g} ends the run after {steps:,}."
    if recipe.train.method == "full" and recipe.model.dtype not in ("auto", "float32"):
        yield (
            f"model.dtype: {recipe.model.dtype} with train.method: full loses every update below a rounding step of its weight, which "
            "at usual rates are most. Take auto with train.mixed_precision: true."
        )
    if recipe.train.warmup > max(1, steps):
        yield f"train.warmup: {recipe.train.warmup:g} steps, but the run has {steps}: its rate only rises."
    for key, every, instead in (
        ("eval.every", recipe.eval.every, "only its end is evaluated"),
        ("save.every", recipe.save.every, "no checkpoint is written on the way"),
    ):
        if isinstance(every, int) and every > steps:
            yield f"{key}: {every} steps, but the run has {steps}: {instead}."
    length, prompts = (loaded.origins.get(f"samples.{key}") for key in ("max_tokens", "prompts"))
    only_emptied = length == "recipe" and prompts is not None  # what was beside the prompts is no choice of its own
    if length and not recipe.samples.prompts and not only_emptied:
        yield "samples.max_tokens: has no effect without samples.prompts."
    if "train.compile" in loaded.origins and not capabilities.compiles:
        yield f"train.compile: has no effect: this engine does not compile its training step on {capabilities.device}."


def _missing_loggers(recipe: Recipe) -> Iterator[str]:
    for name in recipe.loggers:
        packages = LOGGER_PACKAGES[name]
        if not any(importlib.util.find_spec(package) for package in packages):
            yield f"loggers: '{name}' is not installed: pip install {packages[0]}."


def _from_config(recipe: Recipe) -> BaseModel:
    """A model that does not exist yet: its shapes come from the config; weights are drawn when the run starts."""
    config = dict(recipe.model.config or {})
    shapes = llama_shapes(config)
    model = BaseModel(FROM_CONFIG, Path(), None, {"model_type": "llama", **config})
    model.__dict__["shapes"] = shapes  # fills the cached property, since no file holds them yet
    return model


def _model_name(loaded: Loaded) -> str:
    """Return `model.id`, or the folder that it names from the recipe's folder or among the shipped files."""
    name = str(loaded.recipe.model.id)
    found = name if name == EMBEDDED else locate(name, loaded)
    return found if Path(found).is_dir() else name


def open_tokenizer(loaded: Loaded, model: BaseModel, adapter: StartAdapter | None = None) -> Tokenizer:
    """Open the tokenizer a recipe trains with: the one it names, or else the start adapter's, or the model's own."""
    named = loaded.recipe.model.tokenizer
    folder = adapter.folder if adapter and adapter.has_tokenizer else model.folder
    if named:
        folder = Path(locate(named, loaded))
        if not folder.is_dir():
            raise RecipeError(f"model.tokenizer: {named}: no such folder.")
    template = loaded.recipe.model.chat_template
    return Tokenizer(folder, locate(template, loaded) if template else None)


def _other_template(tokenizer: Tokenizer, adapter: StartAdapter | None) -> Iterator[str]:
    """Say where training goes on with another tokenizer or template than the start adapter was trained with."""
    if adapter and adapter.has_tokenizer and Tokenizer(adapter.folder).fingerprint() != tokenizer.fingerprint():
        yield (
            f"model.tokenizer, model.chat_template: not what the adapter in {adapter.folder} was trained with, which is used where"
            " both are left out."
        )


def select_targets(model: BaseModel, recipe: Recipe) -> dict[str, tuple[int, int]]:
    """Return module path -> (in, out) of the layers a recipe wants adapted.

    Raises:
        RecipeError: a name that matches nothing, or tied embeddings and heads.
    """
    lora = recipe.lora
    linear = model.linear_shapes()
    if lora.last_layers and lora.last_layers > model.num_layers:
        raise RecipeError(f"lora.last_layers: {lora.last_layers}, but {model.name} has {model.num_layers} blocks.")
    if lora.last_layers:
        linear = {
            name: shape for name, shape in linear.items() if _layer_of(name) >= model.num_layers - lora.last_layers
        }
    if lora.targets == "all-linear":
        return linear
    chosen: dict[str, tuple[int, int]] = {}
    problems = []
    for target in lora.targets:
        found = {name: shape for name, shape in linear.items() if name == target or name.endswith(f".{target}")}
        chosen |= found
        if not found:
            problems.append(_missing_target(target, model, linear))
    if problems:
        raise RecipeError("lora.targets", problems)
    return {name: linear[name] for name in linear if name in chosen}


def _layer_of(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def _missing_target(target: str, model: BaseModel, linear: Mapping[str, Any]) -> str:
    if target in ("lm_head", "embed_tokens"):
        tied = " This model ties them, and an adapter on one would untie them." if model.tied else ""
        return f"{target}: adapters on embeddings and heads are not supported.{tied} Use the layers inside the blocks."
    suffixes = sorted({name.rpartition(".")[2] for name in linear})
    return f"{target}: no such linear layer.{nearest(target, suffixes)} Known: {', '.join(suffixes)}."


def _encode(
    loaded: Loaded, tokenizer: Tokenizer, on_rows: Callable[[int], None] | None
) -> tuple[Source, TokenStore, TokenStore | None]:
    recipe = loaded.recipe
    data = recipe.data
    how = encoding(recipe)
    options: dict[str, Any] = {
        "form": data.format,
        "columns": data.columns,
        "system": data.system,
        "folders": (loaded.folder, files_root()),
    }
    source = _open_rows(recipe, data.train, **options)
    if problems := source.idle_columns():
        raise RecipeError("data.columns (field: column)", problems)
    if recipe.stage == "dpo":
        how = replace(how, loss_on="pair")
        if source.form.kind != "preference":
            raise DataError(
                f"{source.files[0]}: format '{source.form.name}' has one answer a row; stage dpo needs two. Give columns prompt, chosen "
                "and rejected (`smolmlx data pairs` makes such rows from notes), or map yours with data.columns."
            )
    share, seed = data.validation_share, recipe.train.seed

    def held_out(index: int) -> bool:
        return bool(np.random.default_rng([seed, 0x5A11, index]).random() < share)

    keep = (lambda index: not held_out(index)) if share else None
    name = f"share {share} seed {seed}"
    train = encode_source(
        source,
        tokenizer,
        how,
        keep=keep,
        keep_name=f"not {name}" if share else "all",
        limit=data.limit,
        on_rows=on_rows,
    )
    check_account(train, loaded, data.train)
    validation = None
    if data.validation is not None:
        other = _open_rows(recipe, data.validation, split="validation", **options)
        validation = encode_source(other, tokenizer, how, on_rows=on_rows)
    elif share:
        validation = encode_source(
            source, tokenizer, how, keep=held_out, keep_name=name, limit=data.limit, on_rows=on_rows
        )
    if validation is not None and not len(validation):
        raise DataError(
            f"{data.validation or data.train}: no validation row can be scored (see data.max_length and the share)."
        )
    return source, train, validation


def _open_rows(recipe: Recipe, named: str | list[str], **options: Any) -> Source:
    try:
        return open_source(named, **options)
    except MissingFile as error:
        if recipe.stage != "dpo":
            raise
        raise MissingFile(f"{error} Make pairs with: smolmlx data pairs NOTES... OUT_DIR") from error


def _skipped_files(source: Source) -> Iterator[str]:
    names = [path.name for path in source.skipped]
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        yield (
            f"data.train: {', '.join(names[:5])}{more} of the folder not taken, by the split that their names say. Name a file "
            "itself to train on it."
        )


def encoding(recipe: Recipe) -> Encoding:
    """Return how a recipe turns rows into tokens."""
    data = recipe.data
    return Encoding(
        data.max_length, data.loss_on, data.history, data.overlong,
        chunks=recipe.stage == "pretrain", template_args=data.template_args,
    )  # fmt: skip


def initial_adapter(plan: Plan) -> dict[str, npt.NDArray[np.float32]]:
    """Draw the first adapter in PEFT's names: A uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5), B zero.

    Drawn with numpy from the plan's seed, so that every engine starts from the same numbers.
    """
    rank = plan.recipe.lora.r
    rng = np.random.default_rng([plan.recipe.train.seed, 0x10A])
    arrays = {}
    for name in sorted(plan.targets):
        width_in, width_out = plan.targets[name]
        bound = 1.0 / math.sqrt(width_in)
        arrays[f"{PEFT_PREFIX}{name}.lora_A.weight"] = rng.uniform(-bound, bound, (rank, width_in)).astype(np.float32)
        arrays[f"{PEFT_PREFIX}{name}.lora_B.weight"] = np.zeros((width_out, rank), np.float32)
    return arrays


def adapter_config(plan: Plan) -> dict[str, Any]:
    """Return the adapter_config.json that PEFT reads."""
    lora = plan.recipe.lora
    suffixes = sorted({name.rpartition(".")[2] for name in plan.targets})
    everywhere = {n for n in plan.model.linear_shapes() if n.rpartition(".")[2] in suffixes}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": plan.model.name if plan.model.revision else str(plan.model.folder),
        "revision": plan.model.revision,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": suffixes if everywhere == set(plan.targets) else sorted(plan.targets),
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
