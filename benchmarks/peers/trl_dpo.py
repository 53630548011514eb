"""TRL's DPOTrainer with its defaults and the reference's log-probabilities precomputed."""

from __future__ import annotations

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}

import json
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from job import Recorder, read_job, write_result
from peft import LoraConfig
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer


class Watch(TrainerCallback):  # type: ignore[misc]
    """Starts the clock at the first step and ends each step when its loss has been logged."""

    def __init__(self, recorder: Recorder, began: float) -> None:
        self.recorder, self.began = recorder, began

    def on_step_begin(self, *arguments: Any, **options: Any) -> None:
        if self.recorder.reference_seconds is None:
            self.recorder.reference_seconds = time.perf_counter() - self.began
            self.recorder.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **options: Any) -> None:
        if logs and "loss" in logs:
            self.recorder.end_step(float(logs["loss"]))


def main() -> None:
    job, recorder = read_job(), Recorder()
    began = time.perf_counter()
    trainer = DPOTrainer(
        model=job.model,
        args=DPOConfig(
            output_dir=job.scratch, max_steps=job.steps, per_device_train_batch_size=job.batch_size, learning_rate=job.learning_rate,
            lr_scheduler_type="constant", max_length=job.max_length, seed=job.seed, beta=job.options["beta"],
            precompute_ref_log_probs=True, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
            use_cpu=job.device == "cpu", bf16=False, model_init_kwargs={"dtype": job.dtype},
        ),
        train_dataset=_rows(Path(job.rows) / "train.jsonl"),
        peft_config=LoraConfig(r=job.rank, lora_alpha=job.alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Watch(recorder, began)],
    )  # fmt: skip
    trainer.train()
    settings = f"defaults, checkpointing {'on' if trainer.args.gradient_checkpointing else 'off'}, clipping 1.0"
    write_result(recorder, ["torch", "transformers", "trl", "peft", "accelerate"], settings)


def _rows(path: Path) -> Dataset:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
            }
            for row in rows
        ]
    )


if __name__ == "__main__":
    main()
