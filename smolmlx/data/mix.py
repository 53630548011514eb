"""Rows of several sources in one file, each with its share, chosen and ordered by a seed.

No row comes twice. The same sources, weights and seed give the same bytes. All rows are held in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smolmlx.data.clean import Layout, choose_layout, json_line, lay_out, read_pairs, replacing
from smolmlx.data.formats import Source
from smolmlx.data.splits import file_hash
from smolmlx.errors import DataError, RecipeError

_MADE_BY = "smolmlx data mix"
_FILE = "train.jsonl"


def mix(
    sources: Mapping[str, Source],
    weights: Mapping[str, float],
    out_dir: Path,
    *,
    rows: int | None = None,
    seed: int = 0,
    to: Layout = "auto",
) -> dict[str, Any]:
    """Write train.jsonl and, last, manifest.json; return the manifest.

    Args:
        weights: of each source, above 0; its share of the rows is its weight over the sum of all.
        rows: how many in all; None takes as many as the shares allow.

    Raises:
        RecipeError: rows of different kinds, more rows than there are, or a folder whose files would be lost.
        DataError: rows that cannot be read.
        RunError: `out_dir` cannot be written.
    """
    _check_folder(sources, out_dir)
    layout = _common_layout(sources, to)
    lines = {name: _read_lines(source, layout) for name, source in sources.items()}
    counts = count_rows({name: len(found) for name, found in lines.items()}, weights, rows)
    mixed: list[bytes] = []
    for number, (name, found) in enumerate(lines.items()):
        order = np.random.default_rng([seed, number]).permutation(len(found))
        mixed += [found[i] for i in order[: counts[name]]]
    body = b"".join(mixed[i] for i in np.random.default_rng([seed, len(lines)]).permutation(len(mixed)))
    total = sum(weights.values())
    manifest = {
        "made_by": _MADE_BY,
        "seed": seed,
        "to": layout,
        "rows": len(mixed),
        "sources": {
            name: {
                "files": {str(path): file_hash(path) for path in source.files},
                "format": source.form.name,
                "weight": weights[name],
                "share": weights[name] / total,
                "rows_read": len(lines[name]),
                "rows": counts[name],
            }
            for name, source in sources.items()
        },
        "files": {"train": {"path": _FILE, "rows": len(mixed), "sha256": hashlib.sha256(body).hexdigest()}},
    }
    with replacing(out_dir / _FILE) as file:
        file.write(body)
    with replacing(out_dir / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n")
    return manifest


def count_rows(sizes: Mapping[str, int], weights: Mapping[str, float], rows: int | None) -> dict[str, int]:
    """Return how many rows each source gives: its share, rounded so that they add up to `rows`.

    Raises:
        RecipeError: a source has fewer, or would give none.
    """
    total = sum(weights.values())
    wanted = math.floor(min(sizes[name] * total / weights[name] for name in sizes) + 1e-9) if rows is None else rows
    exact = {name: wanted * weights[name] / total for name in sizes}
    counts = {name: math.floor(share + 1e-9) for name, share in exact.items()}
    # The largest remainders round up; where all rows were asked for, only as far as a source has some left.
    room = [name for name in sizes if rows is not None or counts[name] < sizes[name]]
    for name in sorted(room, key=lambda name: counts[name] - exact[name])[: wanted - sum(counts.values())]:
        counts[name] += 1
    problems = [
        f"{name}: has {sizes[name]:,} rows, and its share is {count:,}. Lower --rows or its weight."
        for name, count in counts.items()
        if count > sizes[name]
    ]
    problems += [f"{name}: its share is no row. Raise --rows or its weight." for name, n in counts.items() if not n]
    if problems:
        raise RecipeError("what to mix", problems)
    return counts


def _check_folder(sources: Mapping[str, Source], out_dir: Path) -> None:
    target, manifest = out_dir / _FILE, out_dir / "manifest.json"
    if target.resolve() in {path.resolve() for source in sources.values() for path in source.files}:
        raise RecipeError(f"{out_dir}: the mix would overwrite one of its sources. Choose another folder.")
    present = [path.name for path in (target, manifest) if path.exists()]
    if present and not (manifest.is_file() and f'"{_MADE_BY}"' in manifest.read_text(encoding="utf-8")):
        raise RecipeError(
            f"{out_dir}: holds {', '.join(present)}, not written by `{_MADE_BY}`. Choose another folder, or move them."
        )


def _common_layout(sources: Mapping[str, Source], to: Layout) -> Layout:
    layouts = {name: choose_layout(source, to) for name, source in sources.items()}
    if len(set(layouts.values())) > 1:
        listed = [f"{name}: {layout}" for name, layout in layouts.items()]
        hint = " --to messages takes the chosen answers of pairs." if "text" not in layouts.values() else ""
        raise RecipeError(f"rows of different kinds cannot be mixed.{hint}", listed)
    return next(iter(layouts.values()))


def _read_lines(source: Source, layout: Layout) -> Sequence[bytes]:
    problems: list[str] = []
    lines = [
        json_line(lay_out(raw, example, source, layout), example.where) for raw, example in read_pairs(source, problems)
    ]
    if problems:
        raise DataError(", ".join(str(path) for path in source.files), problems)
    return lines
