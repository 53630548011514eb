"""Write a base with adapters folded in as a plain model folder: float32 sums, rounded once, streamed by rows.

The result is what transformers, mlx-lm and vLLM load: weights, a config that all read, tokenizer, template and the ids
that end an answer. Tied weights stay tied; a quantized base is dequantized; adapter files are never beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from smolmlx.adapters import tensors
from smolmlx.adapters.adapter import read
from smolmlx.adapters.base import Weights
from smolmlx.adapters.convert import copy_side_files, refuse_used
from smolmlx.adapters.delta import Changes, Term, find_changes, row_blocks
from smolmlx.adapters.hf_config import limits, readable
from smolmlx.adapters.names import HEAD_WEIGHT
from smolmlx.adapters.tensors import WIDTHS, Made, Words, from_floats, to_floats
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import RecipeError, RunError
from smolmlx.models import BaseModel, check_base
from smolmlx.peft_config import is_number
from smolmlx.rundir import publish
from smolmlx.weight_files import INDEX

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_NAMES = {code: name for name, code in DTYPES.items()}
GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"
_SHARD_BYTES = 5_000_000_000
ERASED = 0.05
"""A change that loses more than this share of its norm to rounding is reported."""


@dataclass(slots=True)
class Merged:
    """What was written, and what rounding did to the change."""

    folder: Path
    dtype: str
    num_changed: int
    tied: bool
    erased: dict[str, float] = field(default_factory=dict)
    """Weight -> share of its change's norm that the dtype could not hold, where above ERASED."""
    lost: float = 0.0
    """The same over all weights."""
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Tally:
    """Squares of the wanted change and of what rounding took from it."""

    wanted: float = 0.0
    error: float = 0.0

    @property
    def lost(self) -> float:
        return (self.error / self.wanted) ** 0.5 if self.wanted else 0.0


def merge(
    base: BaseModel,
    adapters: Sequence[tuple[Path, float]],
    out: Path,
    *,
    dtype: str = "auto",
    untie: bool = False,
) -> Merged:
    """Merge W + sum of c * dW over adapters and publish the folder in one rename.

    Args:
        adapters: folders with their coefficients; none gives a plain (dequantized, retyped) copy of the base.
        dtype: of the result; auto is the base's own.
        untie: write the head on its own where an adapter changes only one side of a tied pair.

    Raises:
        RecipeError: adapters of another base, a tie that would break, an output folder in use.
        DataError: broken files.
        RunError: values beyond the range of the dtype; RecipeError where a coefficient brings them there.
    """
    done = write_merged(base, adapters, out, dtype=dtype, untie=untie)
    done.notes += limits(base.config)
    return done


def write_merged(
    base: BaseModel, adapters: Sequence[tuple[Path, float]], out: Path, *, dtype: str, untie: bool
) -> Merged:
    """Merge as `merge` does, without its notes on what mlx-lm computes otherwise: an export asks mlx-lm itself."""
    refuse_used(out)
    made = prepare(base, adapters, dtype=dtype, untie=untie)
    ends = _end_ids(made.tokenizer)
    with publish(out) as temporary:
        _write_shards(temporary, made.tensors)
        _write_json(temporary / "config.json", made.config)
        copy_side_files(made.tokenizer, temporary)
        copy_side_files(base.folder, temporary, [GENERATION])  # no more: a template of the base's would win
        _write_generation(temporary, base.folder, ends)
    return made.report(out)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A merge that is planned: every tensor is computed when its words are asked for."""

    tensors: dict[str, Made]
    config: dict[str, Any]
    dtype: str
    tied: bool
    num_changed: int
    notes: list[str]
    tokenizer: Path
    """The folder whose tokenizer and template go with the result."""
    tallies: dict[str, _Tally]

    def report(self, out: Path) -> Merged:
        """Say what was written; to be called after the tensors have been made."""
        erased = {name: tally.lost for name, tally in sorted(self.tallies.items()) if tally.lost > ERASED}
        whole = _Tally(sum(t.wanted for t in self.tallies.values()), sum(t.error for t in self.tallies.values()))
        return Merged(out, self.dtype, self.num_changed, self.tied, erased, whole.lost, self.notes)


def prepare(
    base: BaseModel, adapters: Sequence[tuple[Path, float]], *, dtype: str = "auto", untie: bool = False
) -> Prepared:
    """Plan a merge; see `merge`."""
    for folder, weight in adapters:
        if not is_number(weight):
            raise RecipeError(f"--weight {weight} of {folder}: expected a number that float32 holds.")
        check_base(base, folder)
    weights = Weights(base)
    _refuse_other_tie(weights)
    opened = [(read(folder), weight) for folder, weight in adapters]
    opened = [(adapter, weight) for adapter, weight in opened if weight]  # 0 switches one off
    changes = find_changes(opened, weights)
    code = _pick_dtype(weights, dtype)
    tied = weights.tied and not _breaks_tie(changes, weights, untie)
    if weights.tied and not tied:
        changes = {**changes, HEAD_WEIGHT: _head_terms(changes, weights)}
    notes = []
    if weights.quantized:
        notes.append("the base was quantized: its weights are whole again, and larger")
    if weights.tied and not tied:
        notes.append("head and embedding are two weights now (tie_word_embeddings is false)")
    tallies: dict[str, _Tally] = {}
    made = _plan(weights, changes, code, tied, tallies)
    config = {**readable(base.config, dtype=_NAMES[code]), "tie_word_embeddings": tied}
    folders = [*(adapter.folder for adapter, _ in opened), base.folder]
    tokenizer = next((folder for folder in folders if _brings_tokenizer(folder)), base.folder)
    notes += [
        f"{folder / TEMPLATE} is left out: there is no tokenizer beside it. Copy it over the result's, if it was trained with it"
        for folder in folders[:-1]
        if (folder / TEMPLATE).is_file() and not _brings_tokenizer(folder)
    ]
    return Prepared(made, config, _NAMES[code], tied, len(changes), notes, tokenizer, tallies)


def _pick_dtype(weights: Weights, dtype: str) -> str:
    if dtype != "auto":
        if dtype not in DTYPES:
            raise RecipeError(f"--dtype {dtype}: expected auto, {', '.join(DTYPES)}.")
        return DTYPES[dtype]
    sizes: dict[str, int] = {}
    for name in weights.names:
        if weights.is_float(name):
            sizes[weights.dtype(name)] = sizes.get(weights.dtype(name), 0) + int(np.prod(weights.shape(name)))
    code = max(sizes, key=lambda code: sizes[code]) if sizes else "F32"
    return code if code in _NAMES else "F32"  # of float64


def _refuse_other_tie(weights: Weights) -> None:
    if weights.tied and weights.find(_embedding_name(weights)) is None:
        kind = weights.model.config.get("model_type")
        raise RecipeError(
            f"{weights.model.name}: ties its head to an embedding that is not called embed_tokens ({kind}), which is not"
            " merged here. Merge with PEFT: PeftModel.merge_and_unload()."
        )


def _breaks_tie(changes: Changes, weights: Weights, untie: bool) -> bool:
    """Whether an adapter changes head and embedding differently though the base ties them."""
    embedding = _embedding_name(weights)
    terms, others = _head_terms(changes, weights), list(changes.get(embedding, ()))
    if not weights.tied or terms == others:
        return False
    stored = weights.find(embedding)
    assert stored is not None
    same = all(
        np.array_equal(
            _total(terms, weights.rows(stored, rows), rows), _total(others, weights.rows(stored, rows), rows)
        )
        for rows in row_blocks(weights.shape(stored))
    )
    if same:
        return False
    if not untie:
        raise RecipeError(
            "this adapter changes head and embedding differently, and the base ties them, so no tied model equals it."
            " Pass --untie to write both, or train with ensure_weight_tying and no rank_pattern or alpha_pattern on the embedding."
        )
    return True


def _head_terms(changes: Changes, weights: Weights) -> list[Term]:
    """Return what changes a tied head: mlx-lm calls the embedding for it, PEFT leaves it the base's."""
    followed = [term for term in changes.get(_embedding_name(weights), ()) if term.adapter.form == "mlx"]
    return [*changes.get(HEAD_WEIGHT, ()), *followed]


def _embedding_name(weights: Weights) -> str:
    return next((name for name in weights.names if name.endswith("embed_tokens.weight")), "model.embed_tokens.weight")


def _total(terms: Sequence[Term], base: tensors.Floats, rows: slice) -> tensors.Floats:
    found = np.zeros_like(base)
    for term in terms:
        found += term.change(base, rows)
    return found


def _plan(weights: Weights, changes: Changes, code: str, tied: bool, tallies: dict[str, _Tally]) -> dict[str, Made]:
    """Return every tensor of the merged model; a value is computed when it is written."""
    made: dict[str, Made] = {}
    names = list(weights.names)
    embedding = _embedding_name(weights)
    if weights.tied:  # one copy, under the name that every loader looks for
        names = [name for name in names if name != HEAD_WEIGHT]
        names += [embedding] if embedding not in names else []
        names += [HEAD_WEIGHT] if not tied else []
    for name in names:
        stored = weights.find(name)
        assert stored is not None
        if not weights.is_float(stored):
            made[name] = Made(weights.dtype(stored), weights.shape(stored), partial(weights.words, stored))
            continue
        tally = tallies.setdefault(name, _Tally()) if name in changes else _Tally()
        for path, rows in _outputs(name, weights.shape(stored)):
            shape = weights.shape(stored) if rows is None else weights.shape(stored)[1:]
            job = _Job(weights, stored, changes.get(name, ()), code, rows, tally)
            made[path] = Made(code, shape, job)
    return made


def _outputs(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, int | None]]:
    """MLX stacks experts under a name of its own; transformers and mlx-lm both read them one by one."""
    layer, found, part = name.rpartition(".switch_mlp.")
    if not found or len(shape) != 3:
        yield name, None
        return
    for expert in range(shape[0]):
        yield f"{layer}.experts.{expert}.{part}", expert


@dataclass(frozen=True, slots=True)
class _Job:
    """Makes the words of one tensor."""

    weights: Weights
    stored: str
    terms: Sequence[Term]
    code: str
    expert: int | None
    tally: _Tally

    def __call__(self) -> Words:
        if self.expert is not None:
            one: Words = self._block(slice(self.expert, self.expert + 1))[0]
            return one
        shape = self.weights.shape(self.stored)
        if not self.terms and not self.weights.quantized and self.weights.dtype(self.stored) == self.code:
            return self.weights.words(self.stored)
        if not shape:
            return self._block(slice(None))
        found = np.empty(shape, f"<u{WIDTHS[self.code]}")
        for rows in row_blocks(shape):
            found[rows] = self._block(rows)
        return found

    def _block(self, rows: slice) -> Words:
        base = self.weights.rows(self.stored, rows) if rows != slice(None) else self.weights.floats(self.stored)
        wanted = base + _total(self.terms, base, rows) if self.terms else base
        words = from_floats(wanted, self.code)
        if self.terms:
            stored = to_floats(words, self.code)
            self._check(base, stored, rows)
            self.tally.wanted += float(np.square(wanted - base, dtype=np.float64).sum())
            self.tally.error += float(np.square(wanted - stored, dtype=np.float64).sum())
        elif self.code == "F16":
            self._check(base, to_floats(words, self.code), rows)
        return words

    def _check(self, base: tensors.Floats, stored: tensors.Floats, rows: slice) -> None:
        if np.isfinite(stored).all() or not np.isfinite(base).all():
            return
        whole = base + _total([replace(term, weight=1.0) for term in self.terms], base, rows)
        if np.isfinite(to_floats(from_floats(whole, self.code), self.code)).all():
            weights = ", ".join(f"{term.weight:g}" for term in self.terms)
            raise RecipeError(
                f"--weight {weights}: brings {self.stored} beyond the range of {_NAMES[self.code]}. Pass a smaller one, or"
                " a wider --dtype."
            )
        raise RunError(
            f"{self.stored}: values beyond the range of {_NAMES[self.code]}, or an adapter with values that are not"
            " finite (smolmlx adapter inspect). Pass --dtype bfloat16 or float32."
        )


def _write_shards(folder: Path, made: Mapping[str, Made]) -> None:
    """Write one file, or several of at most 5 GB with an index."""
    shards: list[dict[str, Made]] = [{}]
    size = 0
    for name in sorted(made):
        own = WIDTHS[made[name].dtype] * int(np.prod(made[name].shape))
        if size and size + own > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = made[name]
        size += own
    if len(shards) == 1:
        tensors.write(folder / "model.safetensors", shards[0], {"format": "pt"})
        return
    table: dict[str, str] = {}
    for index, shard in enumerate(shards, 1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        tensors.write(folder / file, shard, {"format": "pt"})
        table |= dict.fromkeys(shard, file)
    total = sum(WIDTHS[one.dtype] * int(np.prod(one.shape)) for one in made.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": table})


def _brings_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or (folder / "tokenizer.model").is_file()


def _end_ids(tokenizer: Path) -> tuple[int, ...]:
    """Return the ids that end an answer: the template's end of turn, and the tokenizer's eos."""
    return Tokenizer(tokenizer).eos_ids if (tokenizer / "tokenizer.json").is_file() else ()


def _write_generation(folder: Path, base: Path, ends: Sequence[int]) -> None:
    """Set the ids that end an answer: those of the tokenizer, and what the base already listed."""
    path = folder / GENERATION
    found: dict[str, Any] = tensors.read_json(path) if path.is_file() else {}
    ids: list[Any] = list(ends)
    known = tensors.read_json(base / GENERATION) if (base / GENERATION).is_file() else {}
    for listed in (known.get("eos_token_id"), tensors.read_json(folder / "config.json").get("eos_token_id")):
        ids += listed if isinstance(listed, list) else [listed]
    ids = [i for i in dict.fromkeys(ids) if i is not None]
    if ids:
        _write_json(path, {**found, "eos_token_id": ids if len(ids) > 1 else ids[0]})


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(tree), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
