"""TRL's SFTTrainer with its defaults, on prompt-completion rows."""

from __future__ import annotations

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from job import Job, Recorder, read_job, write_result
from peft import LoraConfig
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


class Watch(TrainerCallback):  # type: ignore[misc]
    """Ends a step when its loss has been logged, which is right after the step."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_train_begin(self, *arguments: Any, **options: Any) -> None:
        self.recorder.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **options: Any) -> None:
        if logs and "loss" in logs:
            self.recorder.end_step(float(logs["loss"]))


def main() -> None:
    job, recorder = read_job(), Recorder()
    trainer = SFTTrainer(
        model=job.model,
        args=_arguments(job),
        train_dataset=_rows(Path(job.rows) / "train.jsonl"),
        peft_config=LoraConfig(r=job.rank, lora_alpha=job.alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Watch(recorder)],
    )
    targets = [sum(label != -100 for label in row[1:]) for row in trainer.train_dataset["labels"]]
    recorder.targets_per_row = sum(targets) / len(targets)
    trainer.data_collator = _counted(recorder, trainer.data_collator)
    trainer.train()
    recorder.held_out_loss = _held_out_loss(trainer.model, job.held_out)
    settings = f"defaults, checkpointing {'on' if trainer.args.gradient_checkpointing else 'off'}, clipping 1.0"
    write_result(recorder, ["torch", "transformers", "trl", "peft", "accelerate"], settings)


def _arguments(job: Job) -> SFTConfig:
    """TRL's defaults, except for what makes the work the same and the device a CPU."""
    return SFTConfig(
        output_dir=job.scratch,
        max_steps=job.steps,
        per_device_train_batch_size=job.batch_size,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        max_length=job.max_length,
        seed=job.seed,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=job.device == "cpu",
        bf16=False,
        model_init_kwargs={"dtype": job.dtype},
        **job.options,
    )


def _rows(path: Path) -> Dataset:
    """Its prompt-completion form: `assistant_only_loss` refuses SmolLM2's template."""
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    return Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows])


def _counted(recorder: Recorder, collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def collate_and_count(rows: Any) -> Any:
        batch = collate(rows)
        labels = batch["labels"]
        recorder.add_batch(batch["attention_mask"].sum(), (labels[:, 1:] != -100).sum(), labels.shape)
        return batch

    return collate_and_count


def _held_out_loss(model: Any, rows: list[dict[str, list[int]]]) -> float:
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["ids"][:-1]], device=model.device)).logits[0].float().cpu()
            nats = cross_entropy(logits, torch.tensor(row["ids"][1:]), reduction="none")
            total += float((nats * torch.tensor(row["mask"][1:])).sum())
            count += sum(row["mask"][1:])
    return total / count


if __name__ == "__main__":
    main()
