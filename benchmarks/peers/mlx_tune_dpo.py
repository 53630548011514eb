"""mlx-tune's DPOTrainer; its reference is the base, scored pair by pair before the first step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from job import Job, Recorder, load_blas, read_job, write_result

load_blas()

import mlx.core as mx  # noqa: E402 - after the BLAS
import numpy as np  # noqa: E402
from mlx_tune import DPOConfig, DPOTrainer, FastLanguageModel, _perf  # noqa: E402


class Timed:
    """Wraps the step that mlx-tune compiles: a step ends where the next one is asked for, so its evaluation is inside."""

    def __init__(self, step: Callable[..., Any], recorder: Recorder, began: float) -> None:
        self.step, self.recorder, self.began = step, recorder, began
        self.loss: Any = None

    def __call__(self, *arguments: Any) -> Any:
        if self.loss is None:
            self.recorder.reference_seconds = time.perf_counter() - self.began
            self.recorder.start()
        else:
            self.recorder.end_step(float(self.loss.item()))
        self.loss = self.step(*arguments)
        return self.loss


def main() -> None:
    job, recorder = read_job(), Recorder()
    np.random.seed(job.seed)
    mx.random.seed(job.seed)
    model, tokenizer = FastLanguageModel.from_pretrained(job.model, max_seq_length=job.max_length)
    model = FastLanguageModel.get_peft_model(model, r=job.rank, lora_alpha=job.alpha, lora_dropout=0.0)
    trainer = DPOTrainer(model=model, train_dataset=[{}], tokenizer=tokenizer, args=_config(job))
    # The same tokens as the others; its own way would leave the chat template out.
    trainer._prepare_dpo_batches = lambda: _pairs(Path(job.rows) / "ids.jsonl")
    began, compiled_step = time.perf_counter(), _perf.compiled_step
    steps: list[Timed] = []

    def timed(*arguments: Any, **options: Any) -> Timed:
        steps.append(Timed(compiled_step(*arguments, **options), recorder, began))
        return steps[0]

    _perf.compiled_step = timed
    trainer.train()
    recorder.end_step(float(steps[0].loss.item()))
    settings = "the reference scored pair by pair, checkpointing on, no bias correction, cosine, no clipping"
    write_result(recorder, ["mlx", "mlx-lm", "mlx-tune"], settings)


def _config(job: Job) -> DPOConfig:
    return DPOConfig(
        beta=job.options["beta"], output_dir=job.scratch, learning_rate=job.learning_rate, per_device_train_batch_size=job.batch_size,
        gradient_accumulation_steps=1, max_steps=job.steps, logging_steps=1, save_steps=10**9, max_seq_length=job.max_length,
    )  # fmt: skip


def _pairs(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        {
            "chosen_ids": row["chosen"], "rejected_ids": row["rejected"], "chosen_length": len(row["chosen"]),
            "rejected_length": len(row["rejected"]), "prompt_length": 0,
        }
        for row in rows
    ]  # fmt: skip


if __name__ == "__main__":
    main()
