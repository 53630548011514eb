"""smolmlx on either engine, through the calls that `smolmlx train` makes."""

from __future__ import annotations

from pathlib import Path

from job import Job, Recorder, read_job, write_result

from smolmlx import backend, plan, recipe, stages
from smolmlx.session import Event


def main() -> None:
    job, recorder = read_job(), Recorder()
    choice = backend.choose(job.options["engine"], job.device)
    loaded = recipe.build(_recipe(job), source="benchmarks/sft.py", folder=Path.cwd())
    resolved = plan.resolve(loaded, choice)
    for step in range(resolved.steps):
        for batch in resolved.train.step(step):
            recorder.add_batch(batch.num_tokens, batch.num_supervised, [*batch.ids.shape, len(batch.index)])
    recorder.targets_per_row = float(resolved.train.store.supervised.mean())
    run = stages.start_run(resolved, Path(job.scratch), "bench")

    def watch(event: Event) -> None:
        if event.kind == "step":
            recorder.end_step(event.values["loss"])
        elif event.kind == "eval":
            recorder.held_out_loss = event.values["val_loss"]

    recorder.start()
    stages.train(resolved, choice, run, watch)
    train = resolved.recipe.train
    checkpointing = "on" if train.gradient_checkpointing else "off"
    settings = f"packing off, compile {train.compile}, checkpointing {checkpointing}, clipping 1.0"
    write_result(recorder, [name for name in choice.backend.versions() if name != "blas"], settings)


def _recipe(job: Job) -> dict[str, object]:
    """The job in smolmlx's words; held-out rows are scored by the engine after the last step."""
    return {
        "model": {"id": job.model, "dtype": job.dtype},
        "data": {
            "train": f"{job.rows}/train.jsonl",
            "validation": f"{job.rows}/held_out.jsonl",
            "max_length": job.max_length,
            "packing": "off",
        },
        "train": {
            "batch_size": job.batch_size,
            "learning_rate": job.learning_rate,
            "schedule": "constant",
            "max_steps": job.steps,
            "epochs": 1000,
            "seed": job.seed,
            "gradient_checkpointing": bool(job.options.get("checkpointing", False)),
        },
        "lora": {"r": job.rank, "alpha": job.alpha},
        "eval": {"every": "end", "keep_best": False},
    }


if __name__ == "__main__":
    main()
