"""Memory that is too small is said before it runs out; and where it really does, a PyTorch run in a process of limited
size ends with advice (MLX does not survive that on a Linux CPU)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import lab as labs
from smolmlx import memory

Call = Callable[..., tuple[int, str, str]]

# The limit is set where training begins, some room above what the process has by then.
PROGRAM = """
import resource, sys
from smolmlx_cuda import trainer

def run(engine, scratch, real=trainer.Engine.run):
    pages = int(open("/proc/self/statm").read().split()[0])
    most = pages * resource.getpagesize() + (64 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    real(engine, scratch)

trainer.Engine.run = run
from smolmlx.cli import main
main()
"""


@pytest.fixture(params=["mlx", "cuda"])
def asked(request: pytest.FixtureRequest, tiny_model: Path, chat_rows: Path, tmp_path: Path) -> tuple[str, ...]:
    """A recipe, and an engine on the CPU."""
    if (reason := labs.why_missing(request.param)) is not None:
        pytest.skip(reason)
    (tmp_path / "my.yaml").write_text(
        f"model: {{id: {tiny_model}}}\ndata: {{train: {chat_rows}, max_length: 128}}\n"
        "train: {batch_size: 2, max_steps: 2}\nlora: {r: 2}\n"
    )
    return "my.yaml", "--backend", request.param, "--device", "cpu"


@pytest.mark.parametrize("verb", ["plan", "train"])
def test_what_cannot_fit_is_refused(
    call: Call, asked: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    _, out, _ = call("plan", *asked, "--json")
    monkeypatch.setattr(memory, "host_bytes", lambda: json.loads(out)["memory_bytes"])
    rows = labs.write_chat(tmp_path / "many.jsonl", 4000)
    code, _, err = call(verb, *asked, "--set", f"data.train={rows}", "--set", "train.batch_size=4000")
    assert code == 2 and "of memory, and the device has" in err and "train.accumulation=" in err
    assert "train.batch_size=2000" not in err, "half of it does not fit either"
    assert not (tmp_path / "runs").exists()


def test_what_may_not_fit_is_said_by_plan_and_train(
    call: Call, asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "host_bytes", lambda: 300_000_000)  # less than the process takes
    code, _, err = call("plan", *asked)
    assert code == 0 and "and the device has 0.3 GB" in err
    code, out, _ = call("plan", *asked, "--json")
    tree = json.loads(out)
    assert tree["device_memory_bytes"] == 300_000_000 < tree["memory_bytes"]
    assert any("and the device has 0.3 GB" in note for note in tree["notes"])
    code, _, err = call("train", *asked)
    assert code == 0 and "and the device has 0.3 GB" in err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc are Linux's")
def test_a_run_that_outgrows_its_memory(tiny_model: Path, tmp_path: Path) -> None:
    if (reason := labs.why_missing("cuda")) is not None:
        pytest.skip(reason)
    rows = labs.write_chat(tmp_path / "rows.jsonl", 2000)
    (tmp_path / "my.yaml").write_text(
        f"model: {{id: {tiny_model}}}\ndata: {{train: {rows}, max_length: 256, packing: 'on'}}\n"
        "train: {batch_size: 300, max_steps: 2}\nlora: {r: 2}\n"
    )
    program = "from smolmlx_cuda import engine; engine._prepare()\n" + PROGRAM  # as an engine is opened
    command = [sys.executable, "-c", program, "train", "my.yaml", "--backend", "cuda", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    assert "RunError: out of memory while training, with " in done.stderr, done.stderr
    assert "--set train.batch_size=150 --set train.accumulation=2 " in done.stderr
    assert "Traceback" not in done.stderr and "Unexpected" not in done.stderr
    # Two messages of libraries below that ask for nothing a user could do.
    assert "gemm_4bit_forward" not in done.stderr and "is_gradient_checkpointing" not in done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    left = {path.name for path in run.iterdir()}
    assert left <= {"recipe.yaml", "plan.json", "env.json", "start", "metrics.jsonl"}, "nothing half-written"
    assert not list(tmp_path.rglob(".*")), "no temporary files"
