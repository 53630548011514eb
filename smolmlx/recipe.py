"""What the user wrote: a YAML file, checked strictly, with the origin of every value kept.

Unknown keys, wrong types and impossible combinations are all reported at once. Nothing here touches data, weights or
an engine; `plan.resolve` does that.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from smolmlx.errors import RecipeError
from smolmlx.problems import explain

Stage = Literal["pretrain", "sft", "dpo"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantize = Literal["none", "4bit", "8bit"]
Name = Annotated[str, Field(min_length=1)]
Names = Annotated[list[Name], Field(min_length=1)]
Steps = Annotated[int, Field(ge=1)]
DPO_LEARNING_RATE = 1e-6
"""Learning rate of stage dpo where a recipe gives none: preferences move a model that is already good (D1)."""
Decay = Annotated[float, Field(ge=0, lt=1, strict=True)]


class Section(BaseModel):
    """A frozen block of a recipe that refuses keys it does not know, and values that it would have to convert."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class Model(Section):
    id: Name | None = None
    """A hub id, a local folder, or `tiny` (the embedded model). Left out when `config` makes a model from scratch."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; the commit that was used is recorded in the run."""
    adapter: str | None = None
    """Start from this LoRA adapter instead of new weights: an adapter folder, a run's folder, or a pattern with `*` (the newest
    match). The `lora` section is then the adapter's own."""
    config: dict[str, Any] | None = None
    """A Llama-type config.json as a mapping: the model is made from scratch (stage pretrain)."""
    first_weights: Literal["normal", "induction"] = "normal"
    """First weights of a model made from `config`. induction: with heads that copy from the context, which training on few
    tokens does not find by itself."""
    tokenizer: Name | None = None
    """Folder of the tokenizer, when it is not the model's own (with `adapter`: the one the adapter was trained with)."""
    chat_template: str | None = None
    """`chatml`, `plain` or a path to a Jinja file, for a tokenizer that has none or has the wrong one. With `adapter`
    it is the adapter's where left out."""
    dtype: Dtype = "auto"
    """Weights' type. auto: bfloat16 on a device that has it, float32 on a CPU and for full-parameter training."""
    quantize: Quantize = "none"
    """Quantize the frozen base (QLoRA)."""


class Data(Section):
    train: Name | Names
    """File, list of files, local dataset folder or hub id."""
    validation: Name | Names | None = None
    """Like `train`; or a share of the train rows is held out with `validation_share`."""
    validation_share: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the train rows held out, chosen from the seed, when `validation` is not given."""
    format: str = "auto"
    """auto, or one of the names `smolmlx data inspect` prints."""
    columns: dict[str, str] = {}
    """Field the format wants -> column of the file, e.g. {prompt: question, completion: answer}."""
    system: str | None = None
    """A system message for every row that has none."""
    template_args: dict[str, Any] = {}
    """Extra variables for the chat template, e.g. {enable_thinking: false}."""
    loss_on: Literal["assistant", "completion", "all"] = "assistant"
    """assistant: every assistant turn and its end-of-turn token; completion: the last one; all: every token."""
    history: Literal["refuse", "last_turn"] = "refuse"
    """What to do when the chat template rewrites earlier turns, so that they cannot be trained as they are served."""
    max_length: int = Field(1024, ge=8)
    """Longest row in tokens."""
    overlong: Literal["drop", "truncate_prompt", "split"] = "drop"
    """Rows over max_length: drop them, cut their prompt from the left, or split the answer into continuation rows."""
    allow_affected: bool = False
    """Go on although more than half of the rows cannot be trained as they are."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Several rows behind each other in one, isolated. auto: whichever is estimated to be cheaper."""
    limit: int | None = Field(None, ge=1)
    """Use the first N rows of `train` only."""


class Train(Section):
    method: Literal["lora", "full"] = "lora"
    """lora: an adapter on the frozen base; full: every weight."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the train rows; a last partial one is rounded up to whole steps."""
    max_steps: int | None = Field(None, ge=1)
    """At most this many optimizer steps, where `epochs` would be more. The schedule is laid over these steps."""
    batch_size: int = Field(8, ge=1)
    """Rows (or packs) per micro-batch."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches per optimizer step."""
    learning_rate: float = Field(2e-4, gt=0)
    """The highest learning rate, reached after the warm-up. Stage dpo: 1e-6 where none is given."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup: float = Field(0.0, ge=0)
    """Below 1: share of all steps; from 1: number of steps."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Where linear and cosine end, as a share of learning_rate."""
    optimizer: Literal["adamw", "adamw_fused", "adamw_8bit", "muon"] = "adamw"
    """What an engine lacks is refused, with what to take instead. muon (with `method: full`) is for the blocks' matrices; the
    rest trains with AdamW."""
    muon_learning_rate: float | None = Field(None, gt=0)
    """Highest learning rate of the matrices that muon trains; left out, ten times learning_rate."""
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.999)
    """AdamW's decay rates of the two moments, each from 0 to below 1."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled; never on norms and biases."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Clip the global gradient norm."""
    mixed_precision: bool = False
    """Matrix products in bfloat16 over float32 weights and moments (method: full)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = True
    """Compile the training step where the engine can and it pays."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Decides row order, held-out rows, first adapter weights and dropout."""


class Lora(Section):
    r: int = Field(16, ge=1)
    """Rank of the update."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha/r (alpha/sqrt(r) with rslora)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of adapter inputs set to zero while training."""
    targets: Literal["all-linear"] | Names = "all-linear"
    """Names as in PEFT: `q_proj`, or a full path."""
    rslora: bool = False
    """Rank-stabilized scaling, alpha/sqrt(r)."""
    dora: bool = False
    """Weight-decomposed LoRA: a trained magnitude for each output."""
    last_layers: int | None = Field(None, ge=1)
    """Only the last N transformer blocks."""


class Dpo(Section):
    loss: Literal["dpo", "ipo", "hinge", "orpo"] = "dpo"
    """dpo: -log sigmoid(beta d); ipo: (d - 1/(2 beta))^2; hinge: max(0, 1 - beta d), where d is how much more the policy than the
    reference prefers the chosen answer, in nats. orpo: no reference; nats of the chosen answer plus beta times the odds ratio's."""
    beta: float = Field(0.1, gt=0)
    """How strongly the policy is held to the reference (dpo, ipo, hinge), or the weight of the preference (orpo)."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of the pairs that are taken to be the wrong way round (dpo)."""
    length_normalized: bool = False
    """Log-probabilities per token instead of per answer, so that a longer answer weighs no more."""
    sft_weight: float = Field(0.0, ge=0)
    """Weight of the chosen answer's mean nats per token, added to the loss (rpo): keeps what the answer says."""
    shared_prompt: Literal["auto"] | bool = "auto"
    """Compute a prompt once for both answers. auto: where that is estimated to be cheaper."""
    cache: bool = True
    """Keep the reference's log-probabilities on disk for later runs on the same start, rows and template."""


class Eval(Section):
    every: Steps | Literal["epoch", "end"] = "epoch"
    """Steps between evaluations on the validation rows, each epoch, or once at the end."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many evaluations without a better validation loss."""
    keep_best: bool = True
    """Leave the weights of the best evaluation behind instead of the last ones."""


class Save(Section):
    every: Steps | Literal["epoch"] | None = None
    """Steps between checkpoints; none: only when interrupted."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of model/ after full-parameter training."""
    keep_last: int = Field(2, ge=1)
    """Checkpoints kept, those of interruptions among them; older ones are deleted."""


class Samples(Section):
    prompts: list[str] = []
    """Answered before and after training, same template and decoding, into samples.md."""
    max_tokens: int = Field(160, ge=1)
    """Longest answer."""


Suite = Literal["notes", "loss", "research"]
SUITES: tuple[str, ...] = get_args(Suite)
_ANSWERED = ("notes", "research")
_USERS: Mapping[str, Sequence[str]] = {
    "schema": ("notes",),
    "constrained": ("research",),
    **dict.fromkeys(("tasks_file", "registry"), ("research",)),
    **dict.fromkeys(("train", "ood", "max_tokens", "repetition_penalty", "no_repeat_ngram"), _ANSWERED),
    **dict.fromkeys(("temperature", "seed", "top_p", "top_k", "min_p", "stop", "stop_ids"), _ANSWERED),
}
"""Setting of an evaluation -> the suites that use it; every suite uses what is not listed."""


class Evaluate(Section):
    suite: Suite = "notes"
    """notes: answers scored against references and controls; loss: nats per token; research: rows of `data augment` answered again."""
    data: Name
    """Held-out rows the trained model is scored on."""
    train: str | None = None
    """Rows that controls take their answers from: copy and random (notes), copy (research)."""
    ood: str | None = None
    """Out-of-distribution rows, scored apart."""
    max_tokens: int = Field(256, ge=1)
    """Longest answer (notes, research)."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Makes tokens that an answer holds already less likely, for all systems alike; 1 is off."""
    no_repeat_ngram: int = Field(0, ge=0)
    """No so many tokens in a row come twice in an answer, for all systems alike; 0 is off."""
    batch_size: int = Field(32, ge=1)
    """Prompts answered together."""
    limit: int | None = Field(None, ge=1)
    """Score the first N rows only."""
    constrained: bool = True
    """Keep answers to their schemas, as PaperResearcher does (research)."""
    tasks_file: Name | None = None
    """Task registry that the rows were made with, where it is not the built-in one (research)."""


class Recipe(Section):
    """One stage of training."""

    stage: Stage = "sft"
    """`pretrain` trains on text, every token; `sft` trains on conversations, the answers only; `dpo` trains on pairs of answers,
    the start being the reference."""
    description: str = ""
    """One line, shown by `smolmlx recipes ls`."""
    model: Model = Model()
    data: Data
    train: Train = Train()
    lora: Lora = Lora()
    dpo: Dpo = Dpo()
    eval: Eval = Eval()
    save: Save = Save()
    samples: Samples = Samples()
    evaluate: Evaluate | None = None
    loggers: list[Literal["wandb", "tensorboard", "trackio"]] = []
    """Metric services to report to, beside metrics.jsonl; each needs its own package."""
    mlx: dict[str, Any] = {}
    """Knobs of the MLX engine, checked by it."""
    cuda: dict[str, Any] = {}
    """Knobs of the PyTorch engine, checked by it."""

    @model_validator(mode="before")
    @classmethod
    def _gentle_dpo(cls, tree: Any) -> Any:
        """Give stage dpo a learning rate of its own where none was written."""
        if not isinstance(tree, dict) or tree.get("stage") != "dpo" or not isinstance(tree.get("train", {}), dict):
            return tree
        return {**tree, "train": {"learning_rate": DPO_LEARNING_RATE, **tree.get("train", {})}}

    @model_validator(mode="after")
    def _combinations(self) -> Recipe:
        problems = list(_impossible(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self


def find_idle(suite: str, given: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (setting, why) for what a suite has no use for, and others have."""
    for key in given:
        users = _USERS.get(key)
        if users and suite not in users:
            yield key, f"is for suite {' and '.join(users)}, not for suite {suite}"


def _impossible(recipe: Recipe) -> Iterator[str]:
    """Yield every combination of values that no engine could honour."""
    model, data, train = recipe.model, recipe.data, recipe.train
    if (model.id is None) == (model.config is None):
        yield "model: give either `id` (a model to start from) or `config` (a model made from scratch)."
    if train.warmup > 1 and train.warmup != int(train.warmup):
        yield f"train.warmup: {train.warmup:g} is neither a share of the steps (below 1) nor a whole number of them."
    if model.config is not None and recipe.stage != "pretrain":
        yield f"model.config: a model made from scratch knows nothing to fine-tune (stage {recipe.stage}). Use stage: pretrain."
    if model.config is not None and train.method == "lora":
        yield "train.method: 'lora' needs a base model; a model made from scratch trains with method: full."
    if model.config is not None and model.tokenizer is None:
        yield "model.tokenizer: a model made from scratch needs a tokenizer folder."
    if train.method == "full" and model.quantize != "none":
        yield f"model.quantize: '{model.quantize}' weights are frozen; full training needs quantize: none."
    if model.config is not None and model.revision is not None:
        yield "model.revision: is for a hub id; a model made from `config` has none."
    if model.first_weights != "normal" and model.config is None:
        yield f"model.first_weights: '{model.first_weights}' is for a model made from `config`; `id` has its own weights."
    if train.mixed_precision and train.method == "lora":
        yield "train.mixed_precision: is for method: full; for an adapter set model.dtype: bfloat16, which rounds the frozen weights alone."
    if train.mixed_precision and model.dtype not in ("auto", "float32"):
        yield f"train.mixed_precision: keeps float32 weights; leave model.dtype: {model.dtype} out."
    if train.optimizer == "muon" and train.method == "lora":
        yield "train.optimizer: 'muon' is for whole matrices (method: full); LoRA's thin factors train with adamw."
    if train.muon_learning_rate and train.optimizer != "muon":
        yield f"train.muon_learning_rate: has no effect with optimizer: {train.optimizer}. Set optimizer: muon, or leave it out."
    if train.method == "full" and (chosen := _chosen(recipe.lora)):
        keys = ", ".join(f"lora.{key}" for key in chosen)
        yield f"{keys}: no adapter is trained with train.method: full. Leave `lora` out (--set lora={{}})."
    if train.method == "lora" and recipe.save.dtype != "float32":
        yield "save.dtype: is for method: full; an adapter is saved in float32. Leave it out."
    if train.schedule == "constant" and train.min_lr_ratio:
        yield "train.min_lr_ratio: has no effect with schedule: constant. Leave it out, or take linear or cosine."
    if recipe.stage == "pretrain":
        answers = recipe.samples.prompts or recipe.evaluate is not None  # which take system and template_args
        idle = ("history", "overlong", *(() if answers else ("system", "template_args")))
        unused = [key for key in _chosen(data) if key in idle]
        for name in [*unused, *(["packing"] if data.packing == "on" else [])]:
            yield f"data.{name}: has no effect with stage pretrain, which joins all text and cuts rows of max_length. Leave it out."
    if data.validation is None and not data.validation_share:
        for key in _chosen(recipe.eval):
            default = json.dumps(Eval.model_fields[key].get_default()).strip('"')
            yield f"eval.{key}: needs data.validation or data.validation_share. Leave it out, or set it to its default (--set eval.{key}={default})."
    if recipe.evaluate is not None:
        for key, why in find_idle(recipe.evaluate.suite, _chosen(recipe.evaluate)):
            yield f"evaluate.{key}: {why}. Leave it out."
    if recipe.stage == "pretrain" and data.loss_on == "completion":
        yield "data.loss_on: 'completion' has no meaning for stage pretrain, which trains on every token."
    if data.validation is not None and data.validation_share:
        yield "data.validation_share: give a validation file or a share, not both. Leave one out, e.g. --set data.validation=null."
    if recipe.lora.dora and recipe.lora.dropout > 0:
        yield "lora.dropout: the engines' DoRA formulas differ with dropout; set lora.dropout to 0."
    if model.adapter is not None and train.method == "full":
        yield "model.adapter: full training has no adapter. Merge it into the base first (smolmlx adapter merge), and name that model."
    yield from _impossible_dpo(recipe)


def _impossible_dpo(recipe: Recipe) -> Iterator[str]:
    data, dpo = recipe.data, recipe.dpo
    if recipe.stage != "dpo":
        if dpo != Dpo():
            yield f"dpo: has no effect with stage: {recipe.stage}. Set stage: dpo, or leave the section out."
        return
    if data.packing == "on":
        yield "data.packing: pairs are not packed; dpo.shared_prompt is what saves work. Leave packing out."
    if data.loss_on == "all":
        yield "data.loss_on: 'all' would compare the prompts too; pairs are compared by their answers. Leave it out."
    if data.overlong == "split":
        yield "data.overlong: 'split' would cut an answer in two. Use drop (the pair) or truncate_prompt."
    if recipe.train.mixed_precision:
        yield "train.mixed_precision: rounds what is compared with the reference; stage dpo trains float32 weights. Leave it out."
    if dpo.label_smoothing and dpo.loss != "dpo":
        yield f"dpo.label_smoothing: is for loss: dpo, not for {dpo.loss}. Leave it out."
    if dpo.loss == "orpo":
        for key, value in (("length_normalized", dpo.length_normalized), ("sft_weight", dpo.sft_weight)):
            if value:
                yield f"dpo.{key}: orpo has it built in. Leave it out."
    if dpo.shared_prompt is True and recipe.train.gradient_checkpointing:
        yield "dpo.shared_prompt: gradients do not reach a shared prompt through gradient checkpointing. Set one of the two to false."


def _chosen(section: Section) -> list[str]:
    """Return the keys of a section whose value is not the default."""
    fields = type(section).model_fields
    return [key for key, field in fields.items() if getattr(section, key) != field.get_default()]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A recipe with where it came from and the origin of each value that is not a default."""

    recipe: Recipe
    source: str
    """Path or name, for messages."""
    origins: Mapping[str, str]
    """Dotted key -> `recipe`, `--set`, or a flag such as `--max-steps`; all other keys are defaults."""
    folder: Path
    """Relative paths in the recipe are tried against the working folder, then against this one."""


class _Yaml(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text and on/off as booleans; people mean a number and a word. A key given twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{name}' is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own class attribute
        first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:bool"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Yaml.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """Parse YAML in which 1e-4 is a number.

    Raises:
        yaml.YAMLError: the text is not YAML.
    """
    return yaml.load(text, Loader=_Yaml)


_DATA = (".jsonl", ".jsonl.gz", ".json.gz", ".csv", ".parquet", ".txt", ".md")
"""Ends of the names of data files, without .json, which is YAML too."""


def read(path: Path) -> dict[str, Any]:
    """Read a recipe file as a plain mapping.

    Raises:
        RecipeError: no such file, not YAML, or not a mapping.
    """
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe file. `smolmlx recipes ls` lists the shipped ones.")
    if path.name.lower().endswith(_DATA):
        raise RecipeError(f"{path}: data, not a recipe. Name a recipe, and the data with --set data.train={path}.")
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also: not UTF-8, a date that is none
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    if tree is None:
        raise RecipeError(f"{path}: is empty. `smolmlx recipes show quickstart` prints a recipe to begin with.")
    if not isinstance(tree, dict):
        raise RecipeError(
            f"{path}: expected a mapping of sections (model, data, train, ...), got {type(tree).__name__}."
        )
    return tree


def build(
    tree: Mapping[str, Any],
    *,
    source: str,
    folder: Path,
    overrides: Sequence[str] = (),
    flags: Mapping[str, tuple[str, Any]] | None = None,
) -> Loaded:
    """Check a recipe mapping, with `key=value` overrides and flags laid over it.

    Args:
        overrides: `--set` arguments, each `dotted.key=value`; the value is read as YAML.
        flags: dotted key -> (flag as typed, value), e.g. {"train.max_steps": ("--max-steps", 3)}.

    Raises:
        RecipeError: with every unknown key, wrong type and impossible combination.
    """
    merged = _copy(tree)
    origins = dict.fromkeys(_leaves(merged), "recipe")
    for text in overrides:
        key, value = parse_override(text)
        _put(merged, key, value)
        _replace(origins, key, value, "--set")
    for key, (flag, value) in (flags or {}).items():
        _put(merged, key, value)
        _replace(origins, key, value, flag)
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as error:
        problems = list(explain([dict(item) for item in error.errors()], origins, Recipe))
        head = source if any(not said.startswith("--") for said in problems) else "the command line"
        raise RecipeError(head, problems) from error
    return Loaded(recipe, source, origins, folder)


def load(path: Path, overrides: Sequence[str] = (), flags: Mapping[str, tuple[str, Any]] | None = None) -> Loaded:
    """Read and check a recipe file; see `build`."""
    return build(read(path), source=str(path), folder=path.resolve().parent, overrides=overrides, flags=flags)


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Return every value of a recipe under its dotted key, defaults included."""
    return dict(_leaf_items(recipe.model_dump(mode="json")))


def flatten_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a recipe mapping, as it was written, under their dotted keys."""
    return dict(_leaf_items(tree))


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in tree.items()}


def _leaf_items(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaf_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _leaves(tree: Mapping[str, Any]) -> Iterator[str]:
    return (key for key, _ in _leaf_items(tree))


def parse_override(text: str, option: str = "--set", example: str = "train.learning_rate=1e-4") -> tuple[str, Any]:
    """Read `key=value`, the value as YAML.

    Raises:
        RecipeError: another shape, naming the option.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"{option} {text}: expected key=value, for example {option} {example}.")
    try:
        return key.strip(), parse_yaml(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        fault = getattr(error, "problem", None) or error
        quoted = shlex.quote(f"{key}={json.dumps(value)}")
        raise RecipeError(
            f"{option} {text}: the value is not valid YAML ({fault}). As text: {option} {quoted}"
        ) from error


def _put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise RecipeError(f"--set {dotted}: '{parent}' is a value, not a section.")
    tree[last] = value


def _replace(origins: dict[str, str], dotted: str, value: Any, origin: str) -> None:
    """Note where a value comes from; of a whole section, where each of its values does."""
    for key in [key for key in origins if key == dotted or key.startswith(f"{dotted}.")]:
        del origins[key]
    origins.update(dict.fromkeys(_leaves({dotted: value}), origin))
