"""What the JSON files of a run hold, checked when they are read back: a broken one is named with the place in it, and no
reader has to look again. Keys that are not listed here may hold anything."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from smolmlx.errors import RunError
from smolmlx.rundir import RunDir

_SHOWN = 3


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


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


class _Report(_Part):
    steps: int
    num_tokens: int
    num_supervised: int
    seconds: float
    first_loss: float
    final_loss: float
    best_val_loss: float | None
    best_step: int | None
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


class _SweepRun(_Part):
    setting: str
    seed: int
    status: str
    error: str
    keys: dict[str, Any]
    figures: dict[str, float]
    run: str


class _Spread(_Part):
    mean: float
    sd: float | None
    low: float
    high: float
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
    runs: list[_SweepRun]
    settings: dict[str, dict[str, _Spread]]
    comparisons: list[_Comparison]
    best: list[_Best]


_SHAPES: dict[str, tuple[type[BaseModel], str]] = {
    "plan.json": (_Plan, ""),
    "env.json": (_Env, ""),
    "report.json": (_Report, ""),
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
