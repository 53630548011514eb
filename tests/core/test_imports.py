"""The dependency rule of design/architecture.md, read from the source with `ast`; and what `--help` may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "smolmlx"
ENGINES = {path.name: path for path in sorted((ROOT / "backends").iterdir()) if (path / "__init__.py").is_file()}

# A module may import from its own layer and from those below. 0 is the ground.
LAYERS = {
    "errors": 0,
    "problems": 0,  # what is wrong with a recipe's values: needs errors alone
    "recipe": 0,  # what the user wrote: needs errors alone
    "first_weights": 0,  # numbers from a config: needs errors alone
    "base_config": 0,  # what a base's config must say: needs nothing
    "peft_config": 0,  # what an adapter's config must say: needs nothing
    "weight_files": 0,  # which files hold weights, and their headers: needs errors alone
    "models": 1,  # what a model folder says, read from headers: facts for the plan, like data
    "memory": 1,  # what to say when memory runs out; plan and backend are named there for type checkers only
    "signposts": 0,  # which folders in a folder are models and adapters: needs nothing
    "rundir": 1,  # where files lie
    "run_files": 1,  # what the JSON files there hold
    "start_adapter": 1,  # what an adapter folder says, read from headers: a fact for the plan, like models
    "preferences": 1,  # the losses of preference training, in any engine's arrays: needs recipe and errors alone
    "schedule": 1,  # steps and learning rates of a recipe: needs recipe and errors alone
    "data": 1,  # rows to tokens
    "backend": 2,  # the protocols; plan and session are named there for type checkers only
    "held_out": 2,  # the rows a model will be scored on
    "row_checks": 2,  # what is refused and said of a plan's rows
    "layout": 2,  # choices of the plan that are estimates of cost
    "plan": 2,  # reads Capabilities and Choice from backend: the two describe one seam, from its two sides
    "references": 2,  # what the start policy gives each answer: asked of an engine, kept beside the session's state
    "session": 2,  # the state an engine reports to: part of the same seam
    "generation": 3,  # how tokens are chosen and rows scheduled: shared by the engines, which import it
    "synth": 3,
    "evals": 3,
    "adapters": 3,
    "reports": 3,
    "sweeps": 3,
    "loggers": 3,  # reports metrics to services by name
    "tasks": 3,  # wording, schemas and reading of the research tasks: shared by synth, evals and research
    "stages": 4,
    "data_stages": 4,  # stages of a pipeline that make data: composes synth and tasks for pipelines
    "pipelines": 4,  # several stages, and the data made between them: composes recipe, stages and synth for the verbs
    "shelf": 4,  # which recipes there are and which runs a name means: composes recipe, models and rundir for the verbs
    "doctor": 4,  # looks at every engine and the files: composes what lies below for one verb
    "bench": 4,  # times what stages run: composes stages and the seam for one verb
    "serving": 4,  # a generator over HTTP: composes generation and the seam for one verb
    "research": 5,  # typed tasks over a loaded model: stands on the API's `load`
    "api": 5,  # the verbs for Python; __init__ hands them out lazily
    "": 5,  # smolmlx/__init__.py: the public API, one name per verb
    "console": 5,  # printing is the command line's alone; the library is silent
    "cli": 6,
    "__main__": 7,
}
HEAVY = {
    "mlx",
    "mlx_lm",
    "torch",
    "transformers",
    "trl",
    "peft",
    "unsloth",
    "datasets",
    "outlines",
    "llguidance",
    "accelerate",
    "bitsandbytes",
}


def imports(path: Path, *, lazy: bool) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of what a file imports at module level; `lazy` adds imports inside functions.

    What stands under `if TYPE_CHECKING:` is for type checkers and left out.
    """

    def walk(nodes: list[ast.stmt]) -> Iterator[ast.stmt]:
        for node in nodes:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                yield node
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                yield from walk(node.orelse)
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if lazy:
                    yield from walk(node.body)
            else:
                for name in ("body", "orelse", "finalbody"):
                    yield from walk(getattr(node, name, []))
                for handler in getattr(node, "handlers", []):
                    yield from walk(handler.body)

    for node in walk(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            # `from smolmlx import plan` names a module; `from smolmlx.plan import Plan` does not.
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def part(dotted: str) -> str:
    """Return the part of smolmlx that a dotted name lies in; '' is the package itself."""
    name = dotted.removeprefix("smolmlx").lstrip(".").partition(".")[0]
    return name if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file() else ""


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def test_every_part_has_a_layer() -> None:
    parts = {part(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in sources(PACKAGE)} - {
        "__init__",
        "_files",
    }
    assert parts <= set(LAYERS), "give each new module a layer and a reason"


@pytest.mark.parametrize("lazy", [False, True], ids=["module level", "everywhere"])
def test_imports_point_down(lazy: bool) -> None:
    wrong = []
    for path in sources(PACKAGE):
        own = part(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
        for line, name in imports(path, lazy=lazy):
            if name.partition(".")[0] != "smolmlx":
                continue
            other = part(name)
            known = own in LAYERS and other in LAYERS  # else test_every_part_has_a_layer says so
            if known and name != "smolmlx.__version__" and LAYERS[other] > LAYERS[own]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: '{own}' imports '{name}'")
    assert not wrong, "\n".join(wrong)


def test_product_names_no_array_library_at_module_level() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources(PACKAGE)
        for line, name in imports(path, lazy=False)
        if name.partition(".")[0] in HEAVY
    ]
    assert not found, "\n".join(found)


def test_product_never_imports_an_engine() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources(PACKAGE)
        for line, name in imports(path, lazy=True)
        if name.partition(".")[0] in {*ENGINES, "backends"}
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_do_not_know_each_other(engine: str) -> None:
    others = {*ENGINES, "backends"} - {engine}
    found = [
        f"{p.name}:{line}: {name}"
        for p in sources(ENGINES[engine])
        for line, name in imports(p, lazy=True)
        if name.partition(".")[0] in others
    ]
    assert not found, "\n".join(found)


def test_engines_do_not_reach_into_the_command_line() -> None:
    above = {"cli", "stages", "console", "synth", "evals", "reports", "sweeps", "bench"}
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for folder in ENGINES.values()
        for path in sources(folder)
        for line, name in imports(path, lazy=True)
        if name.startswith("smolmlx.") and part(name) in above
    ]
    assert not found, "\n".join(found)


def test_one_file_imports_unsloth() -> None:
    allowed = ROOT / "backends" / "smolmlx_cuda" / "unsloth.py"
    found = [
        path
        for folder in (PACKAGE, *ENGINES.values())
        for path in sources(folder)
        if path != allowed and any(name.partition(".")[0] == "unsloth" for _, name in imports(path, lazy=True))
    ]
    assert not found


def test_engines_share_no_base_class() -> None:
    """Classes of one engine derive from libraries or from nothing, never from a class of ours beside a protocol."""
    from smolmlx import backend

    protocols = {name for name in vars(backend) if not name.startswith("_")}
    for folder in ENGINES.values():
        for path in sources(folder):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    assert not {ast.unparse(base) for base in node.bases} & protocols, f"{path.name}: {node.name}"


def loaded_by(*arguments: str) -> set[str]:
    """Return the top-level packages in the process after a command line has run."""
    code = (
        "import sys\nfrom smolmlx.cli import main\nsys.argv = ['smolmlx', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "print('\\n' + 'LOADED ' + ' '.join(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.rpartition("LOADED ")[2].split())


def verbs() -> list[str]:
    from smolmlx.cli import VERBS

    return [verb for verb in VERBS if (PACKAGE / "cli" / f"{verb}.py").is_file() or (PACKAGE / "cli" / verb).is_dir()]


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in verbs())], ids=" ".join)
def test_help_loads_no_array_library(arguments: list[str]) -> None:
    found = loaded_by(*arguments)
    assert not found & HEAVY
    # numpy takes 0.1 s of the 0.3 s that --help may take, so it is out too.
    assert "numpy" not in found


def test_package_loads_no_array_library() -> None:
    code = "import sys, smolmlx; print(' '.join(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not set(done.stdout.split()) & HEAVY
