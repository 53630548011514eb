"""What the JSON files of a run hold, checked when they are read back: a broken one is named with the place in it, and no
reader has to look again. Keys that are not listed here may hold anything."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from smolmlx.errors import RunError
from smolmlx.rundir import RunDir

_SHOWN = 3
FINAL_LOSS = "mean of the last 5 % of steps"
"""What `Report.final_loss` is, in words."""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class _Model(_Part):
    id: str


class _Plan(_Part):
    stage: str
    model: _Model
    steps: int | None = None
    num_parameters: int | None = None
    num_trainable: int | None = None
    reasons: dict[str, int] = {}


class _Env(_Part):
    versions: dict[str, str] = {}
    command: list[str] = []


class Report(_Part):
    """What a finished run came to; also report.json."""

    steps: int
    num_tokens: int
    num_supervised: int
    seconds: float
    first_loss: float
    """Of the first step: nats per supervised token, or per pair."""
    final_loss: float
    """Mean over the supervised tokens of the last twentieth of the steps, in the same unit."""
    best_val_loss: float | None
    best_step: int | None
    last_val_loss: float | None = None
    """Of the last step; None also in reports that were written before it was kept."""
    stopped_early: bool
    peak_bytes: int | None
    tokens_per_second: float


class _Samples(_Part):
    before: list[str]
    prompts: list[str] | None = None
    after: list[str] | None = None

    @model_validator(mode="after")
    def _one_each(self) -> _Samples:
        if self.after is not None and not len(self.prompts or ()) == len(self.before) == len(self.after):
            raise ValueError("prompts, before and after differ in number")
        return self


class _Mean(_Part):
    mean: float
    low: float
    high: float


class _Interval(_Mean):
    num_rows: int


class _Difference(_Part):
    system: str
    control: str
    metric: str
    interval: _Interval
    sentence: str


class _Set(_Part):
    n: int
    systems: dict[str, dict[str, _Mean]]
    differences: list[_Difference]
    rows: dict[str, list[dict[str, Any]]]


class _Loss(_Part):
    loss: float
    perplexity: float | None
    accuracy: float


class _Sentence(_Part):
    sentence: str


class _Results(_Part):
    sets: dict[str, _Set] = {}
    systems: dict[str, _Loss] = {}
    differences: list[_Sentence] = []
    files: dict[str, dict[str, Any]] = {}


class _Stage(_Part):
    name: str


class _Pipeline(_Part):
    name: str
    stages: list[_Stage]


class Line(_Part):
    """One run of a sweep."""

    setting: str
    seed: int
    status: str
    error: str
    keys: dict[str, Any]
    """Dotted recipe key -> value: those that every table shows and those that the sweep varies."""
    figures: dict[str, float]
    """`train_loss`, `val_loss`, `steps`, `seconds`, ...; `<set>.<metric>` and its `_low` and `_high` from the evaluation."""
    run: str


class Spread(_Part):
    """A figure over the seeds of one setting."""

    mean: float
    sd: float | None
    """Sample standard deviation; None for one seed."""
    low: float
    high: float
    """Lowest and highest seed."""
    num_seeds: int


class _Comparison(_Part):
    setting: str
    metric: str
    verdict: str
    sentence: str


class _Best(_Part):
    metric: str
    leader: str
    shown: bool
    sentence: str


class _Sweep(_Part):
    name: str
    description: str
    recipe: str
    seeds: list[int]
    runs: list[Line]
    settings: dict[str, dict[str, Spread]]
    comparisons: list[_Comparison]
    best: list[_Best]


_SHAPES: dict[str, tuple[type[BaseModel], str]] = {
    "plan.json": (_Plan, ""),
    "env.json": (_Env, ""),
    "report.json": (Report, ""),
    "samples.json": (_Samples, ""),
    "results.json": (
        _Results,
        "Remove it, and run the same `smolmlx eval`, `train --resume` or `sweep` again: only scoring is done anew.",
    ),
    "pipeline.json": (_Pipeline, ""),
    "sweep.json": (_Sweep, "Run the same `smolmlx sweep` again: it trains nothing and writes it anew."),
}
"""File -> its shape, and how it is mended."""


def read(run: RunDir, name: str) -> dict[str, Any]:
    """Read one of a run's files; {} where it is not there.

    Raises:
        RunError: it is broken, with the first places where it is.
    """
    if not (run.path / name).is_file():
        return {}
    tree = run.read_json(name)
    shape, mend = _SHAPES[name]
    try:
        shape.model_validate(tree)
    except ValidationError as error:
        found = [f"{'.'.join(map(str, one['loc']))}: {one['msg'].lower()}" for one in error.errors()]
        more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise RunError(f"{run.path / name}: {'; '.join(found[:_SHOWN])}{more}. {mend or 'Was it edited?'}") from error
    return tree
