"""The families of errors a user can meet, each with its exit code (README.md, "Exit codes").

An error says what was passed, what was expected and what to type next; `problems` lists everything that is wrong with
one input at once. Our own broken invariants are `assert`s, not these.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

SHOWN = 20
"""Problems that are printed; an error holds all."""


class SmolError(Exception):
    """Base of all errors meant for users; `exit_code` is what the command line returns.

    Its text is `head` and the first SHOWN of `problems`.
    """

    exit_code = 1

    def __init__(self, head: str, problems: Sequence[str] = ()) -> None:
        self.head, self.problems = head, tuple(problems)
        lines = [
            f"{head.removesuffix('.')}: {len(problems)} problem{'s' if len(problems) > 1 else ''}" if problems else head
        ]
        lines += [f"  {problem}" for problem in problems[:SHOWN]]
        lines += [f"  ... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        super().__init__("\n".join(lines))


class RunError(SmolError):
    """The run itself failed: NaN loss, out of memory, disk full."""

    exit_code = 1


class RecipeError(SmolError):
    """Bad usage or a recipe that cannot be honoured."""

    exit_code = 2


class BackendError(SmolError):
    """No engine, no device, or an environment that cannot do what was asked."""

    exit_code = 3


class DataError(SmolError):
    """Rows that cannot be read or cannot teach anything; files of a model or an adapter that are broken."""

    exit_code = 4


class VerificationError(RunError):
    """Something that was produced does not equal what it should be."""

    exit_code = 5


COMMON = {
    **dict.fromkeys(("lr", "learning-rate"), "train.learning_rate"),
    **dict.fromkeys(("steps", "iters", "num-steps"), "train.max_steps"),
    **dict.fromkeys(("epoch", "num-epochs", "num-train-epochs"), "train.epochs"),
    **dict.fromkeys(("batch", "bs", "per-device-train-batch-size"), "train.batch_size"),
    **dict.fromkeys(("grad-accum", "gradient-accumulation-steps"), "train.accumulation"),
    **dict.fromkeys(("warmup-steps", "warmup-ratio"), "train.warmup"),
    **dict.fromkeys(("wd", "decay"), "train.weight_decay"),
    **dict.fromkeys(("rank", "lora-r", "lora-rank"), "lora.r"),
    **dict.fromkeys(("target-modules", "lora-targets"), "lora.targets"),
    **dict.fromkeys(("seq-len", "max-len", "max-seq-length"), "data.max_length"),
    "lora-alpha": "lora.alpha",
    "lora-dropout": "lora.dropout",
    **dict.fromkeys(("ratio", "ratios"), "shares"),
    "output-dir": "out",
    "max-new-tokens": "max_tokens",
    "temp": "temperature",
}
"""Names that other tools have -> ours: a key of a recipe, whose last part may be an option too, or an option."""


def common(name: str) -> str | None:
    """Return our name for one that is common in the field."""
    return COMMON.get(name.lower().lstrip("-").replace("_", "-"))


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return " Did you mean 'x'?" for the closest known name, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean '{match[0]}'?" if match else ""
