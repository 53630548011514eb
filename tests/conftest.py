"""What all tests share: real files, a tiny model built in place, and the engines that are installed here.

No network: hub libraries are told to stay offline before any of them is imported.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Before numpy, mlx or torch is imported. One thread: these matrices are so small that more threads only wait for each
# other, four times as long where cores are busy.
_SETTINGS = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_SETTINGS |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name, _value)

# A shell gives background jobs an ignored Ctrl-C, which the programs under test would inherit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import lab as labs  # noqa: E402

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's cache out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOLMLX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real tokenizers, models and data."""
    if not ASSETS.is_dir():
        pytest.skip(f"{ASSETS} is missing: real tokenizers, models and data lie there")
    return ASSETS


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama-type model of random weights with a byte-level tokenizer and a ChatML template."""
    return labs.make_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def chat_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 conversations of one or two exchanges, of different lengths."""
    return labs.write_chat(tmp_path_factory.mktemp("rows") / "chat.jsonl")


@pytest.fixture(scope="session")
def pair_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 preference pairs, of different lengths."""
    return labs.write_pairs(tmp_path_factory.mktemp("rows") / "pairs.jsonl")


@pytest.fixture(scope="session")
def text_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 documents of plain text."""
    return labs.write_text(tmp_path_factory.mktemp("rows") / "text.jsonl")


@pytest.fixture(scope="session", params=list(labs.ENGINES))
def engine(request: pytest.FixtureRequest) -> str:
    """The name of each engine in turn; skips with the reason where it cannot run."""
    name = str(request.param)
    if (reason := labs.why_missing(name)) is not None:
        pytest.skip(reason)
    return name


@pytest.fixture
def lab(engine: str, tiny_model: Path, chat_rows: Path, tmp_path: Path) -> Iterator[labs.Lab]:
    """Each installed engine in turn (the numpy one too), with a short recipe on the tiny model."""
    with labs.toy_installed():
        yield labs.make_lab(engine, tiny_model, chat_rows, tmp_path)


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process, in an empty folder: arguments to (exit code, stdout, stderr)."""
    from smolmlx.cli import main

    monkeypatch.chdir(tmp_path)
    # A library that was first imported in an earlier test may still log to that test's stderr, which is closed.
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["smolmlx", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run
