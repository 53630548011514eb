"""mlx-tune's SFTTrainer; it hands its rows to mlx-lm's trainer, with an optimizer that does not correct Adam's bias."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from job import Recorder, load_blas, read_job, write_result

load_blas()

import mlx.core as mx  # noqa: E402 - after the BLAS
import numpy as np  # noqa: E402
from mlx_lm.tuner.trainer import iterate_batches, train  # noqa: E402
from mlx_tune import FastLanguageModel, SFTConfig, SFTTrainer, sft_trainer, train_on_responses_only  # noqa: E402
from mlx_watch import Watch, counted, held_out_loss, mean_targets  # noqa: E402


def main() -> None:
    job, recorder = read_job(), Recorder()
    np.random.seed(job.seed)
    mx.random.seed(job.seed)
    model, tokenizer = FastLanguageModel.from_pretrained(job.model, max_seq_length=job.max_length)
    model = FastLanguageModel.get_peft_model(model, r=job.rank, lora_alpha=job.alpha, lora_dropout=0.0)
    lines = (Path(job.rows) / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    config = SFTConfig(
        output_dir=job.scratch,
        per_device_train_batch_size=job.batch_size,
        gradient_accumulation_steps=1,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_steps=job.steps,
        logging_steps=1,
        save_steps=10**9,
        max_seq_length=job.max_length,
        val_batches=0,
    )
    trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=config)
    trainer = train_on_responses_only(trainer)

    def watched(**options: Any) -> None:
        # The trainer takes no callback, so it is given to the function that it calls.
        recorder.targets_per_row = mean_targets(options["train_dataset"])
        recorder.start()
        train(
            **options,
            iterate_batches=lambda **batch: counted(recorder, iterate_batches(**batch)),
            training_callback=Watch(recorder),
        )

    sft_trainer.mlx_train = watched
    trainer.train()
    recorder.held_out_loss = held_out_loss(model.model, job.held_out)
    write_result(recorder, ["mlx", "mlx-lm", "mlx-tune"], "responses only; no bias correction; no clipping")


if __name__ == "__main__":
    main()
