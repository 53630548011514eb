"""mlx-lm-lora's DPO trainer with a second model as the reference; it scores the prompts of both answers as well."""

from __future__ import annotations

import json
from pathlib import Path

from job import Job, Recorder, load_blas, read_job, write_result

load_blas()

import mlx.core as mx  # noqa: E402 - after the BLAS
import mlx.optimizers as optim  # noqa: E402
import numpy as np  # noqa: E402
from mlx_lm import load  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers  # noqa: E402
from mlx_lm_lora.trainer.dpo_trainer import DPOTrainingArgs, train_dpo  # noqa: E402
from mlx_watch import Watch, stub_metal  # noqa: E402


def main() -> None:
    job, recorder = read_job(), Recorder()
    np.random.seed(job.seed)
    mx.random.seed(job.seed)
    stub_metal()
    model, _ = load(job.model)
    reference, _ = load(job.model)
    model.freeze()
    reference.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": job.rank, "scale": job.alpha / job.rank, "dropout": 0.0})
    lines = (Path(job.rows) / "ids.jsonl").read_text(encoding="utf-8").splitlines()
    recorder.reference_seconds = 0.0
    recorder.start()
    train_dpo(
        model,
        reference,
        optim.AdamW(learning_rate=job.learning_rate, bias_correction=True, weight_decay=0.0),
        [json.loads(line) for line in lines],
        args=_arguments(job),
        training_callback=Watch(recorder),
    )
    write_result(recorder, ["mlx", "mlx-lm", "mlx-lm-lora"], "second model; prompts scored too; no clipping")


def _arguments(job: Job) -> DPOTrainingArgs:
    return DPOTrainingArgs(
        batch_size=job.batch_size, iters=job.steps, steps_per_report=1, steps_per_save=10**9, max_seq_length=job.max_length,
        beta=job.options["beta"], adapter_file=str(Path(job.scratch) / "adapters.safetensors"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
