"""The oldest Python that is promised is the oldest that the pinned and required packages have."""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def read_least(text: str) -> tuple[int, ...]:
    found = re.search(r">=\s*(3\.\d+)", text)
    return tuple(map(int, found[1].split("."))) if found else (3, 0)


LEAST = read_least(PROJECT[PROJECT.index("requires-python") :])


@pytest.fixture
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", ROOT / "scripts" / "install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_pinned_package_needs_a_newer_python() -> None:
    pins = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    needs = {}
    for name in pins:
        try:
            needs[name] = read_least(metadata(name).get("Requires-Python") or "")
        except PackageNotFoundError:
            continue
    assert needs and {name: least for name, least in needs.items() if least > LEAST} == {}


def test_all_say_the_same(install: ModuleType) -> None:
    word = ".".join(map(str, LEAST))
    assert install.LEAST_PYTHON == LEAST
    assert f'target-version = "py{word.replace(".", "")}"' in PROJECT and f"Python :: {word}" in PROJECT
    for page in ("README.md", "CONTRIBUTING.md"):
        assert re.findall(r"Python (3\.\d+) or newer", (ROOT / page).read_text(encoding="utf-8")) == [word]


def test_an_old_python_is_refused_before_anything_is_made(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["install.py", "--venv", str(tmp_path / "venv")])
    monkeypatch.setattr(sys, "version_info", (3, 10, 14, "final", 0))
    with pytest.raises(SystemExit, match=r"needs Python 3\.11 or newer.*make PYTHON=python3\.11"):
        install.main()
    assert not (tmp_path / "venv").exists()


def test_every_make_target_has_a_rule() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.+)$", text, re.MULTILINE)
    assert phony is not None
    assert [name for name in phony[1].split() if not re.search(rf"^{name}:", text, re.MULTILINE)] == []
