"""Upload an export to the model hub; only when asked."""

from __future__ import annotations

import importlib.util
import shlex

from smolmlx.adapters import card
from smolmlx.adapters.exports import Export, Source
from smolmlx.errors import BackendError, RecipeError


def refuse(repo: str) -> None:
    """Refuse before the work starts where an upload cannot follow.

    Raises:
        BackendError: huggingface_hub is not installed.
        RecipeError: no repository can have this name.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise BackendError("--push needs huggingface_hub. pip install huggingface_hub.")
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RecipeError(
            f"--push {repo}: not a repository's name. Expected owner/name of letters, digits, '-', '_' and '.': 96 characters"
            " at most, none of '-' and '.' at either end, no .git at the end."
        ) from error


def push(done: Export, source: Source, repo: str, private: bool) -> str:
    """Upload an export with its card to the hub; returns the address.

    Raises:
        BackendError: the hub cannot be reached, or refuses.
    """
    refuse(repo)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # Its bases are the HTTP library's own errors (httpx2 now, other ones before), of which a lost connection is one.
    failures = (*HfHubHTTPError.__bases__, OSError, ValueError)
    api = HfApi()
    try:
        address = str(api.create_repo(repo, private=private, exist_ok=True))
        if done.path.is_file():
            api.upload_file(path_or_fileobj=str(done.path), path_in_repo=done.path.name, repo_id=repo)
            api.upload_file(path_or_fileobj=card.card(done, source).encode(), path_in_repo=card.NAME, repo_id=repo)
        else:
            api.upload_folder(folder_path=str(done.path), repo_id=repo)
    except failures as error:
        why = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        remedy = (
            "Log in with `hf auth login`" if isinstance(error, HfHubHTTPError) else "See that the hub can be reached"
        )
        by_hand = shlex.join(["hf", "upload", repo, str(done.path), *(["--private"] if private else [])])
        raise BackendError(
            f"--push {repo}: {why}. The export is kept: {done.path}. {remedy}, then: {by_hand}"
        ) from error
    return address
