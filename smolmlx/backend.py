"""The seam between the product and its engines: what an engine must offer, and how one is found.

Engines are entry points of the group `smolmlx.backends` and import this package, never the other way round.
"""

from __future__ import annotations

import importlib.util
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from smolmlx.errors import BackendError, RecipeError, nearest

if TYPE_CHECKING:
    from smolmlx.data.batches import Batch
    from smolmlx.data.chat import Tokenizer
    from smolmlx.generation.batching import Batcher
    from smolmlx.models import BaseModel
    from smolmlx.plan import Plan
    from smolmlx.session import Session

GROUP = "smolmlx.backends"
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do here. Tuples hold the values a recipe may ask for."""

    device: str
    """cpu, gpu (Metal), cuda or mps."""
    device_name: str
    dtype: str
    """What `model.dtype: auto` becomes."""
    dtype_reason: str
    dtypes: tuple[str, ...]
    stages: tuple[str, ...]
    methods: tuple[str, ...]
    quantize: tuple[str, ...]
    optimizers: tuple[str, ...]
    memory_bytes: int | None = None
    """Memory the device can use, when known."""
    compiles: bool = False
    """Whether `train.compile` decides anything here."""
    notes: tuple[str, ...] = ()
    """What a user should know: which path was chosen and why."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Value that cannot be honoured -> why, and what would help."""


@dataclass(frozen=True, slots=True)
class Regex:
    """Answers that match a regular expression as a whole (Rust's syntax: no look-around, no back-references)."""

    pattern: str


@dataclass(frozen=True, slots=True)
class OneOf:
    """Answers that are one of these texts."""

    options: tuple[str, ...]

    def __post_init__(self) -> None:
        if isinstance(self.options, str) or not all(isinstance(option, str) for option in self.options):
            raise RecipeError(f"OneOf: got {self.options!r}, expected a list of texts.")


Constraint = Mapping[str, Any] | type | Regex | OneOf
"""A JSON schema, a Pydantic model's class, a regular expression, or a choice."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How to continue a prompt. Temperature 0 is greedy and deterministic.

    In the order in which they act: repetition_penalty, no_repeat_ngram, schema, temperature, top_k, top_p, min_p.

    Raises:
        RecipeError: values outside their bounds, all of them listed.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    """Values below 1e-5 count as 0: logits divided by them would leave float32."""
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 32
    stop_ids: tuple[int, ...] = ()
    """Tokens that end an answer; empty takes the tokenizer's own."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0 among all."""
    min_p: float = 0.0
    """Draw among tokens at least this likely, as a share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Divides positive (multiplies negative) logits of tokens that the answer holds already; the prompt does not count."""
    no_repeat_ngram: int = 0
    """No n tokens in a row come twice in an answer; 0 is off. What the prompt says may be said."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, which then stops in front of them."""
    schema: Constraint | None = None
    """What every answer keeps to while it is written; it always ends whole within max_tokens."""

    def __post_init__(self) -> None:
        bounds = {
            "max_tokens": (_whole(self.max_tokens) >= 1, "at least 1"),
            "temperature": (0 <= _real(self.temperature) <= 1000, "0 (greedy) to 1000"),
            "top_p": (0 < _real(self.top_p) <= 1, "above 0, at most 1"),
            "seed": (_whole(self.seed) >= 0, "0 or more"),
            "batch_size": (_whole(self.batch_size) >= 1, "at least 1"),
            "top_k": (_whole(self.top_k) >= 0, "0 (off) or more"),
            "min_p": (0 <= _real(self.min_p) <= 1, "0 to 1"),
            "repetition_penalty": (0.001 <= _real(self.repetition_penalty) <= 1000, "0.001 to 1000; 1 is off"),
            "no_repeat_ngram": (_whole(self.no_repeat_ngram) >= 0, "0 (off) or more"),
            "stop": (
                isinstance(self.stop, tuple | list) and all(isinstance(text, str) and text for text in self.stop),
                "a list of texts, none of them empty",
            ),
        }
        problems = [
            f"{name}: got {getattr(self, name)!r}, expected {wanted}."
            for name, (fine, wanted) in bounds.items()
            if not fine
        ]
        if self.stop and self.schema is not None:
            problems.append("stop: would cut an answer that keeps to a schema, regex or choice. Leave one of them out.")
        if problems:
            raise RecipeError("how to decode", problems)


def _whole(value: Any) -> float:
    """Return a whole number, and NaN, which is within no bounds, for all else."""
    return value if isinstance(value, Integral) and not isinstance(value, bool) else math.nan  # type: ignore[return-value]


def _real(value: Any) -> float:
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan


@dataclass(frozen=True, slots=True)
class Completion:
    """Answer to the prompt at `index`."""

    index: int
    ids: tuple[int, ...]
    """Generated tokens, without the token that ended the answer."""
    finished: bool
    """False when max_tokens cut it."""
    text: str = ""
    """The answer without special tokens, and without the stop text that ended it (whose tokens `ids` still holds)."""
    num_prompt: int = 0
    """Tokens of the prompt."""
    num_forced: int = 0
    """Tokens of `ids` that the schema left no choice about, which cost no model step of their own."""
    shortened: bool = False
    """The schema's shortest way out was taken because max_tokens was near: whole by form, cut in what it says."""


OnText = Callable[[int, str], None]
"""Told (index, further text) as soon as text is certain."""


@dataclass(frozen=True, slots=True)
class Score:
    """Per supervised position of a batch, in the order of `Batch.index`; padding is left in."""

    log_probs: FloatArray
    """[S] log-probability of the target, nats."""
    correct: npt.NDArray[np.bool_]
    """[S] whether the target is the most likely token."""


@dataclass(frozen=True, slots=True)
class Loading:
    """How to load a base model for generation or scoring."""

    device: str | None = None
    dtype: str = "auto"
    quantize: str = "none"


class Trainer(Protocol):
    def fit(self, plan: Plan, session: Session) -> None:
        """Run the optimizer steps that `session` still wants, reporting each to it; leave the trained weights with it."""


class Generator(Protocol):
    def generate(
        self, prompts: Sequence[Sequence[int]], how: Decoding, on_text: OnText | None = None
    ) -> Iterator[Completion]:
        """Answer token prompts of different lengths in batches; completions come as they finish.

        Raises:
            RecipeError: `how.schema` holds what cannot be kept to, by name, before anything is generated.
        """

    def batcher(self, batch_size: int) -> Batcher:
        """Return what runs rows of different decoding together, as `generate` does; one at a time may run."""

    def use_adapter(self, adapter: Path | None) -> None:
        """Answer and score with another adapter on the same base, or with none.

        Raises:
            RecipeError: not an adapter, or made for another base; the base is left bare then.
        """

    def score(self, batches: Iterable[Batch]) -> Iterator[Score]:
        """Yield the log-probabilities of each batch's targets."""

    def logits(self, ids: Sequence[int]) -> FloatArray:
        """Return [T, V] float32 logits of one sequence (verification)."""


class Backend(Protocol):
    name: str

    def capabilities(self, device: str | None = None) -> Capabilities: ...
    def check(self, knobs: Mapping[str, Any]) -> Sequence[str]:
        """Return what is wrong with the recipe's block of engine knobs."""

    def check_plan(self, plan: Plan) -> Sequence[str]:
        """Return what cannot be done of a plan, where capabilities could not say so: this base's layers, a knob here.

        Raises:
            BackendError: the engine has no such architecture.
        """

    def trainer(self) -> Trainer: ...
    def generator(self, model: BaseModel, adapter: Path | None, tokenizer: Tokenizer, how: Loading) -> Generator: ...
    def versions(self) -> Mapping[str, str]: ...


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine that will run, where, and why."""

    backend: Backend
    device: str | None
    reason: str
    asked: bool = False
    """Whether --backend or --device named it, so that a command that goes on needs them too."""


def installed() -> dict[str, Callable[[], Backend]]:
    """Return engine name -> loader for every entry point; loading one imports its package."""
    return {point.name: point.load for point in entry_points(group=GROUP)}


def load(name: str) -> Backend:
    """Load an engine by name.

    Raises:
        BackendError: unknown, or its packages are not installed.
    """
    found = installed()
    if name not in found:
        raise BackendError(
            f"--backend {name}: unknown engine.{nearest(name, found)} Installed: {', '.join(found) or 'none'}."
        )
    try:
        backend: Backend = found[name]()
    except ImportError as error:
        raise BackendError(
            f"--backend {name}: its packages are not installed ({error}). pip install 'smolmlx[{name}]'."
        ) from error
    return backend


def choose(name: str = "auto", device: str | None = None) -> Choice:
    """Pick the engine: Metal -> mlx; NVIDIA -> cuda; else whichever is installed, on the CPU (mlx first).

    Raises:
        BackendError: nothing fits, with what to install.
    """
    if name != "auto":
        backend = load(name)
        backend.capabilities(device)  # an impossible device is refused here
        return Choice(backend, device, "asked for" + (f" with device {device}" if device else ""), asked=True)
    return replace(_choose_by_hardware(device), asked=device is not None)


def _choose_by_hardware(device: str | None) -> Choice:
    known = installed()
    if platform.system() == "Darwin" and platform.machine() == "arm64" and _has("mlx", known, "mlx.core"):
        return Choice(load("mlx"), device, "Apple Silicon")
    if _has("cuda", known, "torch") and has_nvidia() and device in (None, "cuda"):
        return Choice(load("cuda"), device, "an NVIDIA GPU is here")
    for candidate, module, where in (("mlx", "mlx.core", None), ("cuda", "torch", "cpu")):
        if _has(candidate, known, module):
            return Choice(
                load(candidate), device or where, "no GPU here; the CPU runs it, slowly for models over 100M parameters"
            )
    others = [other for other in known if other not in ("mlx", "cuda")]
    if others:
        return Choice(load(others[0]), device, "the only engine installed")
    raise BackendError(
        "no engine is installed. On a Mac: pip install 'smolmlx[mlx]'. On NVIDIA: pip install 'smolmlx[cuda]'."
    )


def has_nvidia() -> bool:
    """Whether an NVIDIA driver is present, without importing torch."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists() or Path("/dev/dxg").exists()


def _has(name: str, known: Mapping[str, Any], module: str) -> bool:
    parent = module.split(".", maxsplit=1)[0]
    return name in known and importlib.util.find_spec(parent) is not None
