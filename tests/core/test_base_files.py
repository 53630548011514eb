"""Bases that libraries would read in different ways, or not at all, are refused by name before anything is made of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from smolmlx.adapters.merge import merge
from smolmlx.errors import DataError
from smolmlx.models import open_model
from smolmlx.weight_files import MAX_HEADER_BYTES, parse_header

UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to be damaged."""
    return shutil.copytree(tiny_model, tmp_path / "base")


def edit_config(base: Path, **changes: Any) -> None:
    tree = {**json.loads((base / "config.json").read_text()), **changes}
    (base / "config.json").write_text(json.dumps({key: value for key, value in tree.items() if value != "gone"}))


def edit_weights(base: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors")


def shard(base: Path, *, keep: bool = False) -> dict[str, str]:
    """Split the weights in two files with an index; `keep` leaves the single file beside them."""
    tensors = load_file(base / "model.safetensors")
    names = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    table = {name: names[place % 2] for place, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: tensors[name] for name in tensors if table[name] == file}, base / file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    if not keep:
        (base / "model.safetensors").unlink()
    return table


def merged(base: Path) -> dict[str, Any]:
    out = base.with_name("merged")
    merge(open_model(base), [], out)
    return dict(load_file(out / "model.safetensors"))


def test_a_tie_that_the_weights_deny(base: Path) -> None:
    """transformers 5 unties then and mlx-lm does not, so what was merged spoke differently in the two."""
    edit_config(base, tie_word_embeddings=True)
    edit_weights(base, lambda t: t.update({"lm_head.weight": t[EMBEDDING].copy()}))
    assert "lm_head.weight" not in merged(base), "an equal head is a tied one"
    shutil.rmtree(base.with_name("merged"))
    edit_weights(base, lambda t: t["lm_head.weight"].__setitem__((3, 1), 7.0))
    with pytest.raises(DataError, match="tie_word_embeddings to false"):
        merged(base)
    edit_config(base, tie_word_embeddings=False)
    assert merged(base)["lm_head.weight"][3, 1] == 7.0


def test_two_sets_of_weights(base: Path) -> None:
    """transformers loads the single file, mlx-lm whatever comes last."""
    shard(base, keep=True)
    with pytest.raises(DataError, match="two sets of weights") as caught:
        merged(base)
    assert "model-00001-of-00002.safetensors" in str(caught.value)
    (base / "model.safetensors.index.json").unlink()
    with pytest.raises(DataError, match="two sets of weights"):
        merged(base)
    (base / "model.safetensors").unlink()
    assert UP in merged(base), "mlx-lm needs no index"


def test_an_index_of_the_single_file_is_no_second_set(base: Path) -> None:
    """mlx-lm writes one beside every model."""
    table = dict.fromkeys(load_file(base / "model.safetensors"), "model.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    assert UP in merged(base)


def test_a_weight_in_two_files(base: Path) -> None:
    table = shard(base)
    second = base / "model-00002-of-00002.safetensors"
    tensors = load_file(second)
    twice = next(name for name, file in table.items() if file != second.name)
    save_file({**tensors, twice: np.zeros(3, np.float32)}, second)
    with pytest.raises(DataError, match=rf"{twice}: in model-00001-of-00002.safetensors and in model-00002"):
        merged(base)
    save_file(tensors, second)
    save_file({"x": np.zeros(3, np.float32)}, base / "model-00003-of-00002.safetensors")
    with pytest.raises(DataError, match=r"model-00003-of-00002.safetensors is not in"):
        merged(base)


def test_a_shard_that_lacks_a_weight(base: Path) -> None:
    file = base / shard(base)[UP]
    tensors = load_file(file)
    tensors.pop(UP)
    save_file(tensors, file)
    with pytest.raises(DataError, match=f"{UP}: .* says it is in {file.name}, which lacks it"):
        merged(base)


@pytest.mark.parametrize("index", [b"{", b"[]", b'{"weight_map": {}}', b'{"weight_map": {"a": 1}}', b"[" * 100_000])
def test_a_broken_index(index: bytes, base: Path) -> None:
    (base / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(DataError, match="Fetch the file again"):
        open_model(base)


def test_a_block_that_lacks_a_weight(base: Path) -> None:
    edit_weights(base, lambda t: t.pop(UP))
    with pytest.raises(DataError, match=f"its weight files lack {UP}. Fetch the folder again, whole"):
        merged(base)
    edit_config(base, model_type="stablelm")  # whose names are not known by heart
    with pytest.raises(DataError, match=f"{UP}: missing, though other blocks have it"):
        merged(base)


def test_only_what_libraries_load(base: Path) -> None:
    """Mistral's hub folders have the same weights again, under other names, as consolidated.safetensors."""
    plain, fingerprint = merged(base), open_model(base).weights_fingerprint()
    save_file({"layers.0.wq": np.ones((2, 2), np.float32)}, base / "consolidated.safetensors")
    shutil.rmtree(base.with_name("merged"))
    assert set(merged(base)) == set(plain) == set(open_model(base).shapes)
    assert open_model(base).weights_fingerprint() == fingerprint
    (base / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"consolidated.safetensors is a name that neither"):
        open_model(base)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_numbers_without_an_axis(dtype: str, base: Path) -> None:
    """np.ascontiguousarray gives them one, which ended in an assertion of ours."""
    edit_weights(base, lambda t: t.update({"model.scale": np.full((), 1.5, np.float32), "count": np.array(3)}))
    merge(open_model(base), [], base.with_name("out"), dtype=dtype)
    shapes = open_model(base.with_name("out")).shapes
    assert shapes["model.scale"] == shapes["count"] == ()


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no architecture": ({"model_type": "gone"}, "model_type: expected"),
    "an end that is text": ({"eos_token_id": "x"}, "eos_token_id: expected a token id .* found 'x'"),
    "a tie that is text": ({"tie_word_embeddings": "no"}, "tie_word_embeddings: expected true or false, found 'no'"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads: expected a positive integer, found 0"),
    "layers of text": ({"num_hidden_layers": "2"}, "num_hidden_layers: expected a positive integer"),
    "a number of thousands of digits": ({"hidden_size": 10**4000}, "hidden_size: expected a positive integer"),
    "no number of heads": ({"num_attention_heads": "gone"}, "num_attention_heads: missing"),
    "heads that do not divide the width": ({"num_attention_heads": 3}, "3 heads .* does not divide evenly"),
    "a rotation of text": ({"rope_theta": "x"}, "rope_theta: expected a number above 0"),
    "a layer more than is stored": ({"num_hidden_layers": 3}, "its weight files lack model.layers.2"),
    "a layer less than is stored": ({"num_hidden_layers": 1}, "num_hidden_layers: 1, but the weights are of 2"),
    "a width for each layer": ({"intermediate_size": [8, 8]}, "not those of model type llama"),
    "other inner widths": ({"intermediate_size": 8}, "mlp.gate_proj.weight is stored as"),
    "another vocabulary": ({"vocab_size": 7}, rf"vocab_size: 7, but {EMBEDDING} is stored as"),
    "another width": ({"hidden_size": 12}, rf"hidden_size: 12, but {EMBEDDING} is stored as"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_no_library_can_use(case: str, base: Path) -> None:
    changes, words = CONFIGS[case]
    edit_config(base, **changes)
    with pytest.raises(DataError, match=words) as caught:
        open_model(base)
    assert "config.json" in str(caught.value) and caught.value.exit_code == 4


def test_all_problems_of_a_config_at_once(base: Path) -> None:
    edit_config(base, num_attention_heads=-1, eos_token_id=[1, None], vocab_size=True)
    with pytest.raises(DataError) as caught:
        open_model(base)
    assert len(caught.value.problems) == 3


def entry(number: int) -> bytes:
    name = f"base_model.model.model.layers.{number % 90}.mlp.experts.{number}.gate_proj.lora_A.weight"
    return json.dumps(
        {name: {"dtype": "F32", "shape": [1, 4], "data_offsets": [16 * number, 16 * number + 16]}}
    ).encode()[1:-1]


def test_a_header_of_many_tensors_is_read() -> None:
    """One adapter for each expert of a large model makes headers of several megabytes."""
    note = {"format": "pt", 'a "note"': '{"with": ["}", "\\u00e9"]}'}
    pieces = [b'"__metadata__": ' + json.dumps(note).encode(), *(entry(number) for number in range(25_000))]
    header = b" { " + b" ,\n".join(pieces) + b" } \n"
    assert parse_header(b'{"__metadata__":null}') == {"__metadata__": None}, "as mlx writes it"
    assert len(header) > 3_000_000 and parse_header(header) == json.loads(header)


SIZE = MAX_HEADER_BYTES - 1000
BOMBS: dict[str, Callable[[], bytes]] = {
    "lists": lambda: b'{"a":{"dtype":"F32","shape":[' + b"[]," * (SIZE // 3) + b"[]]}}",
    "lists at the top": lambda: b"[" + b"[]," * (SIZE // 3) + b"[]]",
    "tensors": lambda: b"{" + b",".join(b'"%07d":{}' % i for i in range(SIZE // 13)) + b"}",
    "notes": lambda: b'{"__metadata__":{' + b'"a":"",' * (SIZE // 7) + b'"a":""}}',
    "one wide letter": lambda: b'{"__metadata__":{"a":"' + b"x" * SIZE + "\U0001f600".encode() + b'"}}',
    "escapes": lambda: b'{"' + b"\\\\" * (SIZE // 2) + b'":{}}',
}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not keep to a limit of memory")
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_header_bomb_costs_little(bomb: str, tmp_path: Path) -> None:
    """31 MB of empty lists once took 866 MB and a minute before they were refused."""
    path = tmp_path / "model.safetensors"
    header = BOMBS[bomb]()
    assert MAX_HEADER_BYTES - 2000 < len(header) <= MAX_HEADER_BYTES
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom smolmlx.adapters.tensors import TensorFile\n"
        "from smolmlx.errors import DataError\nsize = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (160 << 20),) * 2)\n"
        "try: TensorFile(Path(sys.argv[1]))\nexcept DataError: print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr[-500:]


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"{}}", b'{"a"}', b'{"a":{}', b'{"a":{},}', b'{"a":{},"a":{}}', b'{"a":[]}', b'{"__metadata__":{"a":1}}', b'{"a\\u":{}}', b'{"\xff":{}}'],
)  # fmt: skip
def test_headers_that_are_none(header: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"header|metadata|describe"):
        parse_header(header)
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DataError, match=r"model\.safetensors"):
        open_model(tmp_path)
