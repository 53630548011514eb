"""smolmlx's preference stage on either engine, through the calls that `smolmlx train` makes."""

from __future__ import annotations

import time
from pathlib import Path

from job import Job, Recorder, read_job, write_result

from smolmlx import backend, plan, recipe, stages
from smolmlx.session import Event


def main() -> None:
    job, recorder = read_job(), Recorder()
    choice = backend.choose(job.options["engine"], job.device)
    resolved = plan.resolve(recipe.build(_recipe(job), source="benchmarks/dpo.py", folder=Path.cwd()), choice)
    assert resolved.pairs is not None
    for step in range(resolved.steps):
        for batch in resolved.pairs.step(step):
            width = batch.prefix.shape[1]
            recorder.add_batch(0, int(batch.weights.sum()), [len(batch.pairs), width, batch.tails.shape[1]])
    run = stages.start_run(resolved, Path(job.scratch), "bench")
    began = time.perf_counter()

    def watch(event: Event) -> None:
        if event.kind == "step":
            recorder.end_step(event.values["loss"])
        elif event.kind == "note" and event.values["text"].startswith("reference:"):
            recorder.reference_seconds = time.perf_counter() - began
            recorder.start()

    recorder.start()
    stages.train(resolved, choice, run, watch)
    settings = f"prompts {'shared' if resolved.pairs.shared else 'apart'}, checkpointing off, clipping 1.0"
    write_result(recorder, [name for name in choice.backend.versions() if name != "blas"], settings)


def _recipe(job: Job) -> dict[str, object]:
    return {
        "stage": "dpo",
        "model": {"id": job.model, "dtype": job.dtype},
        "data": {"train": f"{job.rows}/train.jsonl", "max_length": job.max_length},
        "train": {
            "batch_size": job.batch_size, "learning_rate": job.learning_rate, "schedule": "constant", "max_steps": job.steps,
            "epochs": 1000, "seed": job.seed,
        },
        "lora": {"r": job.rank, "alpha": job.alpha},
        "dpo": {"beta": job.options["beta"], "shared_prompt": job.options.get("shared", "auto")},
    }  # fmt: skip


if __name__ == "__main__":
    main()
