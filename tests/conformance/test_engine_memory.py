"""Out of memory in training, answering and scoring: one message with the knobs that are left, and nothing half-written.

torch's allocator is asked for more than there is. MLX's kills the process on a Linux CPU, so the error that it raises on
Metal is raised in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import lab as labs
from lab import Lab
from smolmlx import memory
from smolmlx.backend import Decoding
from smolmlx.data.batches import plan_batches
from smolmlx.errors import RunError

METAL = "[metal::malloc] Attempting to allocate 137438953472 bytes which is greater than the maximum allowed buffer size of 77309411328 bytes."
COMMAND = "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"


def exhaust_torch(*arguments: Any, **options: Any) -> Any:
    import torch

    return torch.empty(1 << 50, dtype=torch.uint8)


def exhaust_mlx(*arguments: Any, **options: Any) -> Any:
    raise RuntimeError(METAL)


EXHAUST: dict[str, Callable[..., Any]] = {"mlx": exhaust_mlx, "cuda": exhaust_torch}
LOSSES = {"mlx": "smolmlx_mlx.losses.Losses", "cuda": "smolmlx_cuda.model.Losses"}


@pytest.fixture(scope="module", params=list(EXHAUST))
def engine(request: pytest.FixtureRequest) -> str:
    """The engines with an allocator of their own; numpy's MemoryError is below."""
    if (reason := labs.why_missing(request.param)) is not None:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture
def exhaust(lab: Lab) -> Callable[..., Any]:
    return EXHAUST[lab.name]


def test_training(lab: Lab, exhaust: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = lab.plan(train__batch_size=6, train__accumulation=2)
    run = lab.start(plan)
    before = sorted(path.name for path in run.path.rglob("*"))
    step = {"mlx": "smolmlx_mlx.step.Stepper.step", "cuda": "smolmlx_cuda.model.Losses.totals"}[lab.name]
    monkeypatch.setattr(step, exhaust)
    with pytest.raises(RunError, match="out of memory while training, with 6 rows of up to") as caught:
        lab.train(plan, run)
    said = str(caught.value)
    assert caught.value.exit_code == 1
    assert "--set train.batch_size=3 --set train.accumulation=4 " in said and "gradient_checkpointing=true" in said
    assert sorted(path.name for path in run.path.rglob("*")) == before, "nothing is left beside what the run began with"


def test_answering(lab: Lab, exhaust: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    generator: Any = lab.generator(lab.plan())
    steps = {"mlx": "smolmlx_mlx.steps.MlxSteps.step", "cuda": "smolmlx_cuda.steps.TorchSteps.step"}
    monkeypatch.setattr(steps[lab.name], exhaust)
    with pytest.raises(RunError, match="out of memory while answering 4 prompts of up to 3 tokens at once") as caught:
        list(generator.generate([[5, 6, 7]] * 9, Decoding(batch_size=4, max_tokens=100)))
    assert "--batch-size 2 " in str(caught.value) and "--max-tokens 50 " in str(caught.value)


def test_scoring(lab: Lab, exhaust: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = lab.plan()
    generator = lab.generator(plan)
    monkeypatch.setattr(f"{LOSSES[lab.name]}.positions", exhaust)
    with pytest.raises(RunError, match="out of memory while scoring 8 rows of") as caught:
        list(generator.score(plan_batches(plan.train.store, batch_size=8).evaluation()))
    assert "--batch-size 4" in str(caught.value)


def test_loading(lab: Lab, exhaust: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = lab.plan()
    load = {
        "mlx": "smolmlx_mlx.generator.load_base",
        "cuda": "smolmlx_cuda.model.AutoModelForCausalLM.from_pretrained",
    }
    monkeypatch.setattr(load[lab.name], exhaust)
    with pytest.raises(RunError, match="out of memory while loading"):
        lab.generator(plan)


def test_other_errors_stay_what_they_are(
    lab: Lab, exhaust: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = lab.generator(lab.plan())

    def wrong(*arguments: Any) -> None:
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    monkeypatch.setattr(f"{LOSSES[lab.name]}.positions", wrong)
    with pytest.raises(RuntimeError, match="must match"):
        list(generator.score(plan_batches(lab.plan().train.store, batch_size=8).evaluation()))


@pytest.mark.parametrize("text", [METAL, COMMAND, "[malloc] Unable to allocate 8 bytes.", "std::bad_alloc"])
def test_errors_of_mlx(text: str) -> None:
    pytest.importorskip("mlx.core")
    from smolmlx_mlx.memory import ran_out

    assert ran_out(RuntimeError(text))
    assert not ran_out(RuntimeError("[matmul] Last dimension of first input must match second to last of second."))


def test_errors_of_torch() -> None:
    torch = pytest.importorskip("torch")
    from smolmlx_cuda.memory import ran_out

    assert ran_out(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert ran_out(RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"))
    assert ran_out(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    assert not ran_out(RuntimeError("CUDA error: device-side assert triggered"))


def test_numpy_runs_out_too() -> None:
    with pytest.raises(RunError, match="all of it"), memory.guard(lambda error: False, lambda: "all of it"):
        np.empty(1 << 60, np.uint8)
