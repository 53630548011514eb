"""Token rows on disk, memory-mapped and cached by content, so that 300,000 rows cost little memory and are made once."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from smolmlx.data.chat import Encoded, Tokenizer
from smolmlx.data.encode import Account, Encoding, encode_rows
from smolmlx.data.formats import Source
from smolmlx.data.pairs import encode_pairs
from smolmlx.errors import DataError, RunError

_VERSION, _PAIRS_VERSION = (
    "4",
    "4.1",
)  # raise when layout, meaning of a mask or what is refused changes: old caches are then not read

IntArray = npt.NDArray[np.int32]
LongArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenStore:
    """Rows of token ids and masks.

    `ids` and `mask` are flat; row i is the half-open range offsets[i]:offsets[i+1].
    """

    folder: Path
    ids: IntArray
    mask: npt.NDArray[np.uint8]
    offsets: LongArray
    account: Account

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> LongArray:
        """Tokens of each row."""
        return np.asarray(np.diff(self.offsets), np.int64)

    @cached_property
    def supervised(self) -> LongArray:
        """Targets of each row: supervised tokens, less a supervised first token (nothing predicts it)."""
        if not len(self):
            return np.zeros(0, np.int64)
        starts = self.offsets[:-1]
        return np.asarray(np.add.reduceat(self.mask, starts, dtype=np.int64) - self.mask[starts], np.int64)

    def row(self, index: int) -> tuple[IntArray, npt.NDArray[np.bool_]]:
        """Return ids and mask of one row."""
        start, end = self.offsets[index], self.offsets[index + 1]
        return self.ids[start:end], self.mask[start:end].astype(bool)

    @property
    def key(self) -> str:
        return self.folder.name


def cache_folder() -> Path:
    """Folder of everything that can be made again: $SMOLMLX_CACHE, else the user's cache folder."""
    given = os.environ.get("SMOLMLX_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "smolmlx"


def encode_source(
    source: Source,
    tokenizer: Tokenizer,
    how: Encoding,
    *,
    keep: Callable[[int], bool] | None = None,
    keep_name: str = "all",
    limit: int | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> TokenStore:
    """Tokenize a source, or reopen what an earlier call made from the same bytes, tokenizer and options.

    Args:
        keep: takes the index of a row and says whether it belongs to this store (splits of one file);
            `keep_name` stands for it in the cache key.
        on_rows: called now and then with the number of rows read so far.

    Raises:
        DataError: rows that cannot be read; see `formats.Source` and `encode.encode_rows`.
        RunError: the cache folder cannot be written.
    """
    options = json.dumps({**asdict(how), "template_args": dict(how.template_args)}, sort_keys=True)
    names = ", ".join(path.name for path in source.files)  # the account names them
    version = _PAIRS_VERSION if how.loss_on == "pair" else _VERSION
    parts = (version, names, source.content_hash(), tokenizer.fingerprint(), options, keep_name, str(limit))
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
    folder = cache_folder() / "tokens" / key
    if folder.exists():
        with contextlib.suppress(DataError):  # half deleted or cut off: it is made again
            return open_store(folder)
        shutil.rmtree(folder, ignore_errors=True)
    account = Account()
    examples = (example for index, example in enumerate(itertools.islice(source, limit)) if keep is None or keep(index))
    encode = encode_pairs if how.loss_on == "pair" else encode_rows
    write_store(folder, _counted(encode(examples, tokenizer, how, account), account, on_rows), account)
    return open_store(folder)


def _counted(rows: Iterable[Encoded], account: Account, on_rows: Callable[[int], None] | None) -> Iterable[Encoded]:
    for index, row in enumerate(rows):
        if on_rows and index % 256 == 0:
            on_rows(account.rows)
        yield row


def write_store(folder: Path, rows: Iterable[Encoded], account: Account) -> None:
    """Write rows as flat arrays, streaming, and publish the folder in one rename."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".tokens-", dir=folder.parent))
    except OSError as error:
        raise RunError(
            f"{folder.parent}: the cache cannot be written ({error.strerror}). Set SMOLMLX_CACHE to a folder that can."
        ) from error
    offsets = array("q", [0])
    try:
        with (temporary / "ids.i32").open("wb") as ids_file, (temporary / "mask.u8").open("wb") as mask_file:
            for row in rows:
                np.asarray(row.ids, np.int32).tofile(ids_file)
                np.asarray(row.mask, np.uint8).tofile(mask_file)
                offsets.append(offsets[-1] + len(row.ids))
        np.asarray(offsets, np.int64).tofile(temporary / "offsets.i64")
        meta = {"rows": account.rows, "reasons": dict(account.reasons), "first": account.first}
        (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        if folder.exists():  # another process was faster; its rows are the same
            shutil.rmtree(temporary)
        else:
            temporary.rename(folder)
    except OSError as error:
        raise RunError(
            f"{folder.parent}: writing the token cache failed ({error.strerror}). Free some space or set SMOLMLX_CACHE."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_store(folder: Path) -> TokenStore:
    """Map the arrays of a store into memory without reading them.

    Raises:
        DataError: the files do not belong together.
    """
    broken = f"{folder}: a broken token cache. Delete the folder; it will be made again."
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        account = Account(meta["rows"])
        account.reasons.update(meta["reasons"])
        account.first.update(meta["first"])
        offsets = np.fromfile(folder / "offsets.i64", np.int64)
        ids, mask = _map(folder / "ids.i32", np.int32), _map(folder / "mask.u8", np.uint8)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(broken) from error
    if not len(offsets) or len(ids) != offsets[-1] or len(mask) != offsets[-1]:
        raise DataError(broken)
    return TokenStore(folder, ids, mask, offsets, account)


def _map(path: Path, dtype: type[np.generic]) -> Any:
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


def from_rows(rows: Sequence[Encoded], folder: Path) -> TokenStore:
    """Write and open a store of rows at hand (tests, benchmarks)."""
    write_store(folder, rows, Account(len(rows)))
    return open_store(folder)
