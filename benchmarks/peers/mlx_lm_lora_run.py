"""mlx-lm-lora's SFT trainer; it masks the prompt without the generation prompt, so it trains that as well."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from job import Job, Recorder, load_blas, read_job, write_result

load_blas()

import mlx.core as mx  # noqa: E402 - after the BLAS
import mlx.optimizers as optim  # noqa: E402
import numpy as np  # noqa: E402
from mlx_lm import load  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers  # noqa: E402
from mlx_lm_lora.trainer.datasets import CacheDataset, load_dataset  # noqa: E402
from mlx_lm_lora.trainer.sft_trainer import SFTTrainingArgs, iterate_batches, train_sft  # noqa: E402
from mlx_watch import Watch, counted, held_out_loss, mean_targets, stub_metal  # noqa: E402


def main() -> None:
    job, recorder = read_job(), Recorder()
    np.random.seed(job.seed)
    mx.random.seed(job.seed)
    stub_metal()
    model, tokenizer = load(job.model)
    model.freeze()
    lora = {"rank": job.rank, "scale": job.alpha / job.rank, "dropout": 0.0}
    linear_to_lora_layers(model, len(model.layers), lora)
    loaded, _, _ = load_dataset(SimpleNamespace(data=job.rows, train=True, test=False, mask_prompt=True), tokenizer)
    rows = CacheDataset(loaded)
    recorder.targets_per_row = mean_targets(rows)
    recorder.start()
    train_sft(
        model,
        optim.AdamW(learning_rate=job.learning_rate, bias_correction=True, weight_decay=0.0),
        rows,
        args=_arguments(job),
        iterate_batches=lambda **options: counted(recorder, iterate_batches(**options)),
        training_callback=Watch(recorder),
    )
    recorder.held_out_loss = held_out_loss(model, job.held_out)
    settings = "mask_prompt; bias correction on (off by default); no clipping"
    write_result(recorder, ["mlx", "mlx-lm", "mlx-lm-lora"], settings)


def _arguments(job: Job) -> SFTTrainingArgs:
    return SFTTrainingArgs(
        batch_size=job.batch_size,
        iters=job.steps,
        steps_per_report=1,
        steps_per_save=10**9,
        max_seq_length=job.max_length,
        adapter_file=str(Path(job.scratch) / "adapters.safetensors"),
    )


if __name__ == "__main__":
    main()
