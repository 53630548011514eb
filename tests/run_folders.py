"""Run folders as training and evaluation leave them, made without an engine: made-up curves, real scores of made-up answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from smolmlx import shelf
from smolmlx.evals.run import Evaluation, Settings, describe_file, read_rows, write
from smolmlx.evals.suites import compare_notes, control_outputs
from smolmlx.rundir import RunDir
from smolmlx.sweeps.definition import open_sweep
from smolmlx.sweeps.table import read_table, write_table

ROOT = Path(__file__).resolve().parents[1]
NOTES = ROOT / "data" / "notes"
INJECTED = "<script>window.injected = true</script></script><img src=x onerror='window.injected = true'>"

REPORT = {
    "steps": 100, "num_tokens": 540_000, "num_supervised": 230_000, "seconds": 465.2, "first_loss": 6.04, "final_loss": 2.2,
    "best_val_loss": 2.4, "best_step": 100, "stopped_early": False, "peak_bytes": 862_154_752, "tokens_per_second": 1160.0,
}  # fmt: skip
"""report.json of a finished run."""


def make_run(
    folder: Path,
    *,
    seed: int = 0,
    skill: float = 0.8,
    rows: int = 24,
    rate: float = 4e-3,
    stages: tuple[str, ...] = ("sft", "dpo"),
) -> Path:
    """Write a finished run; `skill` is how often a trained system answers well. The first answer holds `INJECTED`."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    run = RunDir(folder)
    recipe = {
        "stage": "sft",
        "description": "Notes from passages.",
        "model": {"id": "tiny"},
        "data": {"train": "data/notes/train.jsonl"},
        "train": {"learning_rate": rate},
        "lora": {"r": 8, "alpha": 16.0},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    run.write_json("plan.json", _plan(rate))
    run.write_json(
        "env.json",
        {
            "python": "3.11.7",
            "platform": "Linux",
            "device": "CPU",
            "versions": {"smolmlx": "0.1.0"},
            "command": ["smolmlx", "train"],
        },
    )
    _write_metrics(folder, rng)
    _write_adapter(folder / "adapter", rng)
    settings = Settings(str(NOTES / "test.jsonl"), ood=str(NOTES / "ood.jsonl"), limit=rows)
    evaluation = make_evaluation(settings, rng, skill, stages)
    write(evaluation, folder / "eval")
    run.write_json(
        "samples.json",
        {"prompts": ["Why is the sky blue?"], "before": [INJECTED], "after": ["Air scatters blue light."]},
    )
    run.write_json("report.json", REPORT)
    return folder


def make_pipeline(folder: Path, *, rows: int = 12) -> Path:
    """Write a finished pipeline of SFT, pairs and DPO; DPO's evaluation holds what SFT left, with the same answers."""
    make_run(folder / "sft", rows=rows, stages=("sft",))
    last = make_run(folder / "dpo", rows=rows)
    run = RunDir(last)
    run.write_json("plan.json", {**run.read_json("plan.json"), "stage": "dpo"})
    curves = [json.loads(line) for line in (last / "metrics.jsonl").read_text().splitlines()]
    for row in curves:
        key = "margin" if row["kind"] == "step" else "val_margin"
        row[key] = row["step"] / 200
        row.pop("val_perplexity", None)
    (last / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curves))
    (folder / "pairs").mkdir()
    stages = [{"name": name} for name in ("sft", "pairs", "dpo")]
    tree = {"name": "notes-pipeline", "description": "SFT, then DPO.", "stages": stages}
    RunDir(folder).write_json("pipeline.json", tree)
    return folder


def make_sweep(folder: Path, *, rows: int = 12, seeds: int = 2) -> Path:
    """Write a finished sweep of three settings, of which one answers far worse; the last run failed."""
    folder.mkdir(parents=True)
    recipe = {"model": {"id": "tiny"}, "data": {"train": "data/notes/train.jsonl"}, "lora": {"r": 8}}
    (folder / "base.yaml").write_text(yaml.safe_dump(recipe))
    settings = [
        {"name": "baseline"},
        {"name": "r 64", "lora.r": 64},
        {"name": "lr <1e-4>", "train.learning_rate": 1e-4},
    ]
    tree = {"recipe": "base.yaml", "description": "What rank and rate change.", "seeds": seeds, "list": settings}
    (folder / "my.yaml").write_text(yaml.safe_dump(tree))
    sweep = open_sweep(folder / "my.yaml", "sweep-my", shelf.find)
    for number, cell in enumerate(sweep.cells):
        if number == len(sweep.cells) - 1:
            outcome = {"status": "failed", "error": "the loss is not a number"}
            (folder / cell.folder).mkdir()
        else:
            outcome = {"status": "finished"}
            skill = {"baseline": 0.8, "r 64": 0.85}.get(cell.setting, 0.05)
            make_run(folder / cell.folder, seed=number, skill=skill, rows=rows, stages=("sft",))
        RunDir(folder / cell.folder).write_json("outcome.json", outcome)
    write_table(read_table(sweep, folder), folder)
    return folder


def make_evaluation(settings: Settings, rng: np.random.Generator, skill: float, stages: tuple[str, ...]) -> Evaluation:
    """Score made-up answers with the real suite."""
    train = [row for row, _ in read_rows(str(NOTES / "train.jsonl"), settings, limited=False)]
    reports, outputs = {}, {}
    files = {"train": describe_file(str(NOTES / "train.jsonl"), settings, len(train))}
    for name, path in (("test", settings.data), ("ood", str(settings.ood))):
        rows = [row for row, _ in read_rows(path, settings)]
        answers: dict[str, Any] = {"base": [row.input[: 60 + 20 * (i % 5)] for i, row in enumerate(rows)]}
        for better, stage in enumerate(stages):
            good = rng.random(len(rows)) < skill + 0.1 * better
            answers[stage] = [
                row.reference if ok else _flawed(row.reference, i)
                for i, (row, ok) in enumerate(zip(rows, good, strict=True))
            ]
        answers[stages[0]][0] = f"{INJECTED}\n{answers[stages[0]][0]}"
        answers |= control_outputs(train, rows)
        reports[name] = compare_notes(rows, answers, also=[(stage, "base") for stage in stages], draws=500)
        outputs[name] = answers
        files[name] = describe_file(path, settings, len(rows))
    return Evaluation(settings, notes=reports, outputs=outputs, files=files)


def _flawed(reference: str, index: int) -> str:
    """Break a reference in one of four ways."""
    ways = (
        reference + "\nIt is important to note that quantum penguins agree.",
        reference.replace("Limitation:", "- A fourth bullet about submarines.\nLimitation:"),
        "This text discusses many topics.\n" + reference,
        reference[: len(reference) // 2],
    )
    return ways[index % len(ways)]


def _plan(rate: float) -> dict[str, Any]:
    return {
        "stage": "sft", "backend": "mlx", "why_backend": "asked for", "device": "cpu", "dtype": "float32",
        "model": {"id": "tiny", "revision": None, "fingerprint": "888c9a46e8c56be4"},
        "num_parameters": 4_327_680, "num_trainable": 442_368, "targets": ["q_proj", "v_proj"], "format": "alpaca",
        "rows": 400, "tokens": 136_749, "supervised": 56_921, "reasons": {"longer than max_length": 2},
        "batch_size": 16, "accumulation": 1, "steps": 100, "learning_rate_peak": rate, "learning_rate_last": rate / 10,
        "template": "3d56", "data_hash": "c66e", "fingerprint": "c1c8",
    }  # fmt: skip


def _write_metrics(folder: Path, rng: np.random.Generator) -> None:
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 101):
            loss = 2 + 4 * math.exp(-step / 18) + float(rng.normal(0, 0.12))
            row: dict[str, Any] = {
                "loss": loss,
                "learning_rate": 4e-3 * (1 - step / 101),
                "grad_norm": 1 + loss / 4,
                "accuracy": 0.9 - loss / 8,
            }
            file.write(json.dumps({"step": step, "kind": "step", **row}) + "\n")
            if step % 25 == 0:
                value = 2.2 + 4 * math.exp(-step / 18)
                row = {
                    "val_loss": value,
                    "val_perplexity": math.exp(value),
                    "val_accuracy": 0.88 - value / 8,
                    "best": True,
                }
                file.write(json.dumps({"step": step, "kind": "eval", **row}) + "\n")


def _write_adapter(folder: Path, rng: np.random.Generator) -> None:
    folder.mkdir()
    arrays = {}
    for layer in range(6):
        for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"):
            name = f"base_model.model.model.layers.{layer}.{module}"
            arrays[f"{name}.lora_A.weight"] = rng.normal(0, 0.1, (8, 32)).astype(np.float32)
            arrays[f"{name}.lora_B.weight"] = rng.normal(0, 0.02 * (layer + 1), (24, 8)).astype(np.float32)
    save_file(arrays, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "tiny"}))
