"""Stages of a pipeline that make rows from documents: `chunk` and `augment`, as the commands of those names do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from smolmlx.backend import Choice
from smolmlx.data.splits import Method
from smolmlx.errors import DataError, RecipeError
from smolmlx.evals.run import Meter
from smolmlx.recipe import Names
from smolmlx.rundir import RunDir
from smolmlx.synth import augment, runtimes
from smolmlx.synth.chunks import Cut, check_shares, write_chunks
from smolmlx.synth.documents import find_files
from smolmlx.synth.jobs import Order, Workshop
from smolmlx.synth.runtimes import Runtime
from smolmlx.synth.server import ServerRuntime, has_host
from smolmlx.synth.store import ChunkStore
from smolmlx.tasks.registry import Registry, order_tasks, read_registry


class Options(BaseModel):
    """What a stage that makes data is asked for; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def check(self) -> None:
        """Refuse values that cannot be honoured, without touching data or models. Raises RecipeError."""

    def missing(self) -> list[str]:
        """Return what is to be read and is not there, as `key: what`; `{stage}` is made later."""
        return []

    def is_done(self, folder: Path) -> bool:
        """Whether the stage has left its whole result in its folder."""
        return (folder / "manifest.json").is_file()


class Chunk(Options):
    """Chunks of documents, as `smolmlx data chunk` makes them."""

    documents: Annotated[Names, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
    """Files and folders."""
    words: Annotated[int, Field(ge=1)] = 500
    """Of a chunk."""
    overlap: Annotated[int, Field(ge=0)] = 100
    """Words shared with the chunk before."""
    shares: tuple[float, ...] = (0.8, 0.1, 0.1)
    """Train, validation and test, by whole documents."""
    seed: Annotated[int, Field(ge=0)] = 0

    def check(self) -> None:
        Cut(self.words, self.overlap).check()
        check_shares(Method(self.shares))

    def missing(self) -> list[str]:
        try:
            find_files([name for name in self.documents if "{" not in name])
        except DataError as error:
            return [f"documents: {problem}" for problem in error.problems]
        return []

    def make(self, folder: Path, choice: Choice, meter: Meter) -> dict[str, Any]:
        """Write the chunks; return their manifest."""
        cut, method = Cut(self.words, self.overlap), Method(self.shares, seed=self.seed)
        return write_chunks(self.documents, folder, cut, method, fewer_splits=f"--set '{folder.name}.shares=[1,0]'")


class Augment(Options):
    """Instruction rows from chunks, as `smolmlx data augment` makes them."""

    chunks: str
    """Folder that `data chunk` or an earlier stage wrote."""
    model: str | None = None
    """Hub id, folder or `tiny`, which is taken where nothing is given; with `server`, the name it goes by there."""
    adapter: str | None = None
    """Adapter folder."""
    server: str | None = None
    """Address of an OpenAI-compatible server, asked in place of an engine here; its key is in OPENAI_API_KEY."""
    tasks: list[str] | None = None
    """Left out, the seven."""
    tasks_file: str | None = None
    """Task registry in place of the built-in one; the stage that scores wants the same, as `evaluate.tasks_file`."""
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _one_maker(self) -> Augment:
        if self.server and self.adapter:
            raise ValueError("`adapter` has no effect with `server`")
        return self

    def check(self) -> None:
        if self.tasks_file is None or Path(self.tasks_file).is_file():
            order_tasks(self.tasks or (), self._registry())
        if self.server and not has_host(self.server):
            raise RecipeError(f"server {self.server}: expected an address such as http://127.0.0.1:8080/v1.")

    def missing(self) -> list[str]:
        paths = {"chunks": self.chunks, "adapter": self.adapter, "tasks_file": self.tasks_file}
        gone = {key: path for key, path in paths.items() if path and "{" not in path and not Path(path).exists()}
        return [f"{key}: {path}: no such file or folder" for key, path in gone.items()]

    def is_done(self, folder: Path) -> bool:
        """Jobs that failed, for want of a server say, are asked again."""
        return super().is_done(folder) and not RunDir(folder).read_json("manifest.json")["jobs"]["failed"]

    def make(self, folder: Path, choice: Choice, meter: Meter) -> dict[str, Any]:
        """Write the rows, or those that an earlier call has left to make; return their manifest."""
        registry = self._registry()
        with ChunkStore(Path(self.chunks)) as store:
            runtime = self._runtime(choice)
            order = Order(order_tasks(self.tasks or (), registry), self.seed, model=runtime.model, runtime=runtime.name)
            workshop = Workshop(store, registry, order)
            with meter("augmenting", augment.outline(workshop).total) as on_done:
                made = augment.augment(workshop, runtime, folder, on_progress=lambda totals: on_done(totals.done))
        augment.refuse_gaps(made)
        return made.manifest

    def _registry(self) -> Registry:
        return read_registry(Path(self.tasks_file) if self.tasks_file else None)

    def _runtime(self, choice: Choice) -> Runtime:
        if self.server is None:
            return runtimes.open_local(self.model or "tiny", self.adapter, choice)
        server = ServerRuntime(self.server, self.model, key=os.environ.get("OPENAI_API_KEY"))
        server.find_model()
        return server
