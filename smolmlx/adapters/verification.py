"""Nothing counts as exported until the program that will load it has loaded it and agreed.

The reference is the base with its adapter, loaded apart, in float32: its own greedy answer to fixed prompts, and its
logits along prompt and answer. The export is fed the same ids, so a difference is a difference in weights or in
arithmetic, never one that grew from an earlier token. The bare base is asked too: small limits in nats are no proof that
a small change is in the export, being nearer to the adapter than to the base is.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smolmlx import backend as backends
from smolmlx.adapters import adapter as adapters
from smolmlx.adapters.convert import convert
from smolmlx.backend import Decoding, FloatArray, Loading
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import VerificationError
from smolmlx.models import BaseModel, open_model

PROMPTS = (
    "Once upon a time",
    "def add(a, b):\n    return",
    "The three most common questions are:\n1.",
    "Grüße aus Köln: 12,5 %",
)
HARD_TEXTS = (
    "def f(x):\n\treturn {'a': [1, 2.5e-3], \"b\": x**2}  # ok?",
    "🙂👩‍👩‍👧‍👦 🇩🇪 ✨",
    "3.14159 1000000 007 1,234,567.89 2026-11-21",
    "  two spaces,   three,\ttab and a trailing one ",
    "\n\n  \n",
    "Съешь ещё этих мягких французских булок",
    "我能吞下玻璃而不伤身体。こんにちは、世界! 안녕하세요",
    "naïve café – “quotes” … don't can't I'LL we've",
    "https://example.org/a_b?c=%20&d=é#x <b>&amp;</b>",
    "ﬁ Ⅷ ½ é",
    "Cafe\u0301 nai\u0308ve A\u030angstro\u0308m \u0438\u0306",
)
_NUM_TOKENS = 64
Consumer = Callable[[Sequence[int]], FloatArray]
"""Ids -> logits [T, V]."""
NATS = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 2e-2, "q8_0": 2e-2, "8bit": 2e-2}
"""Mean KL divergence, in nats per token, up to which an export is the same model. Lower precisions are measured and not
judged, but by `_BROKEN`: what they lose depends on the model."""
_BROKEN = 2.0
_SEEN = 1e-9
"""Nats between adapter and bare base from which a change can be told from float32's own noise."""
_SHARE = 0.25
"""What that must be of the nats that the export is off: below, noise of a low precision may point either way."""
_TIE = 5e-3
"""Nats between two tokens up to which either is the greedy one: llama.cpp rounds GELU to float16, even in a float32 file."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt with the reference's greedy answer, and its logits at each position."""

    ids: tuple[int, ...]
    num_prompt: int
    logits: FloatArray
    bare: FloatArray | None = None
    """The same of the base alone, where there is an adapter."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How an export compares with its reference."""

    consumer: str
    """Program and version that loaded it."""
    reference: str
    nats: float
    """Mean KL divergence, KL(reference || export) in nats per token, over all positions."""
    largest: float
    """Largest difference of two log-probabilities that the reference gives more than e^-10."""
    greedy: float
    """Share of the reference's greedy tokens that the export would pick too; the two of a tie are one."""
    num_tokens: int
    limit: float
    """Of `nats`, by precision."""
    effect: float | None = None
    """Mean KL(reference || bare base): what the adapter does here."""
    to_base: float | None = None
    """Mean KL(bare base || export), which an export that holds the adapter's change exceeds `nats` by."""

    @property
    def can_tell(self) -> bool:
        """Whether the adapter does enough to see if it is in the export."""
        return self.effect is not None and self.effect > max(_SEEN, _SHARE * self.nats)

    @property
    def is_same(self) -> bool:
        """Whether its limit is that of the same model, not only that of one that is not broken."""
        return self.limit < _BROKEN


def describe(found: Agreement) -> str:
    """Return an agreement as a sentence that claims no more than its limit shows."""
    asked = f"{found.consumer} against {found.reference}: mean KL divergence {found.nats:.2g} nats per token"
    same = f"{found.greedy:.1%} of {found.num_tokens} greedy tokens the same"
    if found.is_same:
        return f"verified: {asked} (limit {found.limit:g}), {same}"
    return f"not broken, but not the same model: {asked} (refused above {found.limit:g} at this precision), {same}"


def compare(samples: Sequence[Sample], consumer: Consumer, names: tuple[str, str], precision: str) -> Agreement:
    """Compare an export with the reference.

    Args:
        names: what loaded the export, and what the reference was made with.
        precision: of the export; a key of NATS, or anything else where drift is expected.

    Raises:
        VerificationError: it drifts, or does not even give numbers.
    """
    nats, effect, to_base, largest, same, answered, positions = 0.0, 0.0, 0.0, 0.0, 0, 0, 0
    for sample in samples:
        found = consumer(sample.ids)
        if found.shape[0] != len(sample.ids) or not np.isfinite(found).all():
            raise VerificationError(
                f"{names[0]}: logits of shape {list(found.shape)}, or not finite, for {len(sample.ids)} ids."
            )
        width = min(found.shape[1], sample.logits.shape[1])  # a padded vocabulary is longer
        ours, theirs = _log_softmax(sample.logits[:, :width]), _log_softmax(found[:, :width])
        nats += _divergence(ours, theirs)
        if sample.bare is not None:
            bare = _log_softmax(sample.bare[:, :width])
            effect += _divergence(ours, bare)
            to_base += _divergence(bare, theirs)
        likely = ours > -10
        largest = max(largest, float(np.abs(ours - theirs)[likely].max()))
        positions += len(sample.ids)
        reference = ours[sample.num_prompt - 1 : -1]
        picked = theirs[sample.num_prompt - 1 : -1].argmax(axis=1)
        lost = reference.max(axis=1) - reference[np.arange(len(picked)), picked]
        same += int((lost <= _TIE).sum())
        answered += len(picked)
    adapted = any(sample.bare is not None for sample in samples)
    agreement = Agreement(
        *names, max(0.0, nats / positions), largest, same / max(1, answered), answered, NATS.get(precision, _BROKEN),
        max(0.0, effect / positions) if adapted else None, max(0.0, to_base / positions) if adapted else None,
    )  # fmt: skip
    _refuse_drift(agreement, precision)
    return agreement


def _refuse_drift(found: Agreement, precision: str) -> None:
    exact = precision == "float32"
    if found.nats > found.limit or (exact and found.greedy < 1):
        raise VerificationError(
            f"{found.consumer} does not agree with {found.reference}: mean KL divergence {found.nats:.2g} nats per token (limit"
            f" {found.limit:g}), {found.greedy:.1%} of {found.num_tokens} greedy tokens the same. The export was not kept;"
            " --no-verify keeps it."
        )
    if found.can_tell and found.to_base is not None and found.to_base <= found.nats:
        raise VerificationError(
            f"{found.consumer} does not agree with {found.reference}: it is nearer to the bare base"
            f" (mean KL divergence {found.to_base:.2g} nats per token) than to the adapter ({found.nats:.2g}), so the adapter is not in it, or"
            f" {precision} rounds it away: take a higher precision. The export was not kept; --no-verify keeps it."
        )


def compare_ids(tokenizer: Tokenizer, encode: Callable[[str], Sequence[int]], name: str) -> int:
    """Check that a program cuts hard texts into the same ids; returns how many texts.

    Raises:
        VerificationError: it does not, with the first such text.
    """
    for text in HARD_TEXTS:
        ours, theirs = tokenizer.encode(text), list(encode(text))
        if ours != theirs:
            raise VerificationError(
                f"{name} cuts {text!r} into {theirs[:12]}..., the tokenizer into {ours[:12]}.... Its vocabulary or"
                " pre-tokenizer is not the same. The export was not kept; --no-verify keeps it."
            )
    return len(HARD_TEXTS)


def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Return the ids of what the reference is asked."""
    texts = [*PROMPTS]
    if tokenizer.template_text is not None:
        texts.append(tokenizer.prompt(({"role": "user", "content": PROMPTS[2]},)))
    return [ids for ids in (tokenizer.encode(text)[:256] for text in texts) if ids]


def make_samples(engine: str, base: BaseModel, adapter: Path | None, tokenizer: Tokenizer) -> list[Sample]:
    """Ask the reference: base and adapter (in PEFT's form), loaded apart by an engine, in float32."""
    asked = prompts(tokenizer)
    with loaded(engine, base, adapter, tokenizer) as generator:
        answers = {c.index: c.ids for c in generator.generate(asked, Decoding(max_tokens=_NUM_TOKENS))}
        whole = [(*prompt, *answers[index]) for index, prompt in enumerate(asked)]
        tuned = [generator.logits(ids) for ids in whole]
        if adapter is not None:
            generator.use_adapter(None)
        bare = [generator.logits(ids) if adapter else None for ids in whole]
        return [Sample(ids, len(asked[i]), tuned[i], bare[i]) for i, ids in enumerate(whole)]


@contextlib.contextmanager
def loaded(engine: str, base: BaseModel, adapter: Path | None, tokenizer: Tokenizer) -> Iterator[backends.Generator]:
    """Load a model by an engine in float32, and let go of it afterwards: two at once may not fit."""
    device = "cpu" if engine == "cuda" and not backends.has_nvidia() else None
    generator = backends.load(engine).generator(base, adapter, tokenizer, Loading(device, "float32"))
    try:
        yield generator
    finally:
        del generator
        gc.collect()


@contextlib.contextmanager
def peft_form(adapter: Path | None, base: BaseModel) -> Iterator[Path | None]:
    """Yield an adapter in PEFT's format, which is what engines load.

    Raises:
        RecipeError: PEFT's format cannot hold it.
    """
    if adapter is None or adapters.detect(adapter) == "peft":
        yield adapter
        return
    with tempfile.TemporaryDirectory(prefix="smolmlx-") as folder:
        yield convert(adapter, Path(folder) / "peft", "peft", base).folder


def reference_engine(base: BaseModel, adapter: Path | None) -> str | None:
    """Return the engine that can load base and adapter; transformers with PEFT first, but for MLX-quantized bases."""
    order = ["mlx"] if base.quantization else ["cuda", "mlx"]
    return next((engine for engine in order if is_installed(engine)), None)


def is_installed(engine: str) -> bool:
    packages = {"cuda": ("torch", "transformers", "peft"), "mlx": ("mlx", "mlx_lm")}[engine]
    return all(importlib.util.find_spec(package) for package in packages)


def check_folder(engine: str, folder: Path, samples: Sequence[Sample], reference: str, precision: str) -> Agreement:
    """Load an exported folder with its consumer's library and compare.

    Raises:
        BackendError: the library has no such model.
        VerificationError: it drifts.
    """
    with loaded(engine, open_model(folder), None, Tokenizer(folder)) as generator:
        return compare(samples, generator.logits, (library(engine), reference), precision)


def library(engine: str) -> str:
    """Return the library an engine stands on, with its version."""
    from importlib.metadata import version

    package = {"cuda": "transformers", "mlx": "mlx-lm"}[engine]
    return f"{package} {version(package)}"


def _divergence(reference: FloatArray, other: FloatArray) -> float:
    """Return KL(reference || other), summed over positions, of log-probabilities [T, V]."""
    return float((np.exp(reference) * (reference - other)).sum())


def _log_softmax(logits: FloatArray) -> FloatArray:
    values = logits.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    found: FloatArray = values - np.log(np.exp(values).sum(axis=1, keepdims=True))
    return found
