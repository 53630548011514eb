"""Model ids, revisions, offline use and pushes, against a hub on loopback through huggingface_hub itself."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_cli_adapter import save_adapter

import hub_server
from hub_server import COMMIT, Hub

if importlib.util.find_spec("huggingface_hub") is None:
    pytest.skip("huggingface_hub is not installed: it is what speaks to a hub", allow_module_level=True)


@pytest.fixture(scope="module")
def hub(tiny_model: Path) -> Iterator[Hub]:
    with hub_server.serve() as found:
        found.folders["me/tiny"] = tiny_model
        found.gated.add("me/gated")
        yield found


def smolmlx(
    hub: Hub, cache: Path, *arguments: object, token: str = "hf_good", offline: bool = False
) -> tuple[int, str, str]:
    """Run the command line with this hub as its only one."""
    names = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_TOKEN": token, "HF_HUB_OFFLINE": str(int(offline))}
    names |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    code = "from smolmlx.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env={**os.environ, **names}
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def test_a_model_id_with_a_revision_and_then_offline(hub: Hub, tiny_model: Path, tmp_path: Path) -> None:
    """The adapter names a hub id and a tag: fetched once, found in the cache afterwards, the commit recorded."""
    adapter = save_adapter(tmp_path / "adapter", tiny_model, base_model_name_or_path="me/tiny", revision="v1")
    cache = tmp_path / "cache"
    code, _, err = smolmlx(hub, cache, "adapter", "merge", adapter, tmp_path / "none", offline=True)
    assert code == 3 and "not in the cache" in err
    code, _, err = smolmlx(hub, cache, "adapter", "merge", adapter, tmp_path / "first")
    assert code == 0, err
    assert (cache / "hub" / "models--me--tiny" / "snapshots" / COMMIT / "model.safetensors").exists()
    asked = hub.num_requests
    code, _, err = smolmlx(hub, cache, "adapter", "merge", adapter, tmp_path / "second", offline=True)
    assert code == 0 and hub.num_requests == asked, err
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--model", "me/gated"), "hf auth login"),
        (("--model", "me/nothing"), "no such model"),
        (("--model", "me/tiny", "--revision", "v9"), "v9"),
    ],
)
def test_one_clear_line(arguments: tuple[str, ...], word: str, hub: Hub, tiny_model: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", tiny_model)
    code, _, err = smolmlx(hub, tmp_path / "cache", "adapter", "merge", adapter, tmp_path / "out", *arguments)
    assert code == 3 and word in err and not (tmp_path / "out").exists()
    assert len(err.strip().splitlines()) <= 2, err


def test_push_when_asked(hub: Hub, tiny_model: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", tiny_model)
    hub.files.clear()
    common = ("export", "hf", adapter, tmp_path / "out", "--no-verify")
    code, _, err = smolmlx(hub, tmp_path / "cache", *common)
    assert code == 0 and not hub.created and not hub.files, err
    shutil.rmtree(tmp_path / "out")
    code, out, err = smolmlx(hub, tmp_path / "cache", *common, "--push", "me/tuned", "--private")
    assert code == 0 and f"{hub.url}/me/tuned" in out, err
    assert hub.created[0]["name"] == "tuned" and hub.created[0]["visibility"] == "private"
    for path in (tmp_path / "out").iterdir():
        assert hub.files[f"me/tuned/{path.name}"] == path.read_bytes()
    card = hub.files["me/tuned/README.md"].decode()
    assert "base_model:" not in card and "not verified: everything" in card, "its base is a folder here"
    assert json.loads(hub.files["me/tuned/config.json"])["model_type"] == "llama"


def test_a_push_that_is_refused_keeps_the_export(hub: Hub, tiny_model: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", tiny_model)
    arguments = ("export", "hf", adapter, tmp_path / "out", "--no-verify", "--push", "me/tuned", "--private")
    code, out, err = smolmlx(hub, tmp_path / "cache", *arguments, token="hf_bad")
    assert code == 3 and "hf auth login" in err and (tmp_path / "out" / "model.safetensors").is_file()
    assert f"hf upload me/tuned {tmp_path / 'out'} --private" in err and "not verified: everything" in out
    assert "not verified: everything" in (tmp_path / "out" / "README.md").read_text(), "an upload by hand has it too"


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_a_push_without_a_hub_keeps_the_export(name: str, tiny_model: Path, tmp_path: Path) -> None:
    """It was called a bug of smolmlx's, and nothing said where the export is."""
    if name.endswith("gguf"):
        pytest.importorskip("gguf", reason="the gguf package is not installed")
    target = ("gguf" if name.endswith("gguf") else "hf", tiny_model, tmp_path / name)
    nobody = Hub("http://127.0.0.1:9")
    code, out, err = smolmlx(
        nobody, tmp_path / "cache", "export", *target, "--no-verify", "--push", "me/tuned", "--json"
    )
    assert code == 3 and f"The export is kept: {tmp_path / name}." in err and "bug" not in err, err
    tree = json.loads(out)
    assert tree["path"] == str(tmp_path / name) and tree["address"] is None and (tmp_path / name).exists()


def test_a_hub_base_is_named_with_its_commit(hub: Hub, tiny_model: Path, tmp_path: Path) -> None:
    """On the card, for vLLM to serve, and in the adapter's own config, which named another base."""
    adapter = save_adapter(tmp_path / "adapter", tiny_model, base_model_name_or_path="/gone/base")
    arguments = ("export", "vllm", adapter, tmp_path / "out", "--no-verify", "--model", "me/tiny", "--revision", "v1")
    code, out, err = smolmlx(hub, tmp_path / "cache", *arguments)
    assert code == 0 and f"vllm serve me/tiny --revision {COMMIT} --enable-lora" in out, err
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/tiny", COMMIT)
    assert 'base_model: "me/tiny"' in (tmp_path / "out" / "README.md").read_text()
