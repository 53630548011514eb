"""Where things lie in a run's folder, and how they are written: whole or not at all."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolmlx.errors import RunError

if TYPE_CHECKING:
    from filelock import AcquireReturnProxy, FileLock


@dataclass(frozen=True, slots=True)
class RunDir:
    """A run's folder; README.md, "Where things lie", shows its layout."""

    path: Path

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The whole model, where full training was asked for."""
        return self.path / "model"

    @property
    def start(self) -> Path:
        """The weights every engine starts from."""
        return self.path / "start"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def done(self) -> bool:
        return (self.path / "report.json").is_file()

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"{step:06d}"

    def list_checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = [path for path in self.checkpoints.glob("[0-9]*") if (path / "state.json").is_file()]
        return sorted(found, key=lambda path: int(path.name))

    def last_checkpoint(self) -> Path | None:
        found = self.list_checkpoints()
        return found[-1] if found else None

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON file of the run.

        Raises:
            RunError: missing or broken.
        """
        path = self.path / name
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RunError(f"{path}: missing. Is {self.path} a run folder?") from error
        except ValueError as error:
            raise RunError(f"{path}: not valid JSON ({error}).") from error
        if not isinstance(tree, dict):
            raise RunError(
                f"{path}: holds {type(tree).__name__} '{str(tree)[:40]}' where smolmlx writes an object. Was it edited?"
            )
        return tree

    def write_json(self, name: str, tree: Mapping[str, Any]) -> None:
        write_text(self.path / name, json.dumps(tree, indent=2, default=str) + "\n")


def create(name: str, parent: Path) -> RunDir:
    """Make runs/<recipe>-<yyyymmdd-hhmmss>-<4 hex>/.

    Raises:
        RunError: the folder cannot be made.
    """
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = parent / f"{name}-{stamp}-{secrets.token_hex(2)}"
    with writing(path):
        path.mkdir(parents=True)
    return RunDir(path)


def hold(lock: Path, busy: str) -> AcquireReturnProxy[FileLock]:
    """Take a lock file until the end of a `with`, or until `.lock.release()`, which keeps a second process out; the system lets go of it when the process ends, however it does.

    Raises:
        RunError: another process has it (`busy`), or it cannot be written.
    """
    from filelock import FileLock, Timeout

    held = FileLock(lock, blocking=False)
    with writing(lock.parent):
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            return held.acquire()
        except Timeout as error:
            raise RunError(busy) from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write below `path` into a message: disk full, read-only, no permission.

    Raises:
        RunError
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path}: cannot write: {error.strerror or error}. Free some space, or choose another folder."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Replace a file in one rename, so that a reader sees the old text or the new one."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def usual_mode(path: Path) -> None:
    """Give a file or folder the mode that a plain open() would have; tempfile and safetensors make theirs private."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


@contextlib.contextmanager
def publish(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it takes the place of `folder` in one rename when all went well."""
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            yield temporary
            usual_mode(temporary)
            if folder.exists():
                old = folder.with_name(f".old-{folder.name}-{os.getpid()}")
                folder.rename(old)
                temporary.rename(folder)
                shutil.rmtree(old)
            else:
                temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
