"""`pytest tests/golden --record` writes the golden files anew; look at the diff before committing it."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "files"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="record golden files instead of comparing")


class Golden:
    """Compares text with a file, or records it."""

    def __init__(self, record: bool) -> None:
        self.record = record

    def check(self, name: str, text: str) -> None:
        path = FOLDER / name
        if self.record:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path} is missing: pytest tests/golden --record"
        assert text == path.read_text(encoding="utf-8"), (
            f"{path.name} changed; if that is meant: pytest tests/golden --record"
        )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(bool(request.config.getoption("--record")))
