"""Files of adapters in local folders and on the Hub."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

CARD_NAME = "README.md"
# Arguments of huggingface_hub's downloads; what else a caller passes is for others.
HUB_OPTIONS = (
    "revision", "token", "cache_dir", "force_download", "local_files_only", "repo_type", "local_dir", "user_agent",
    "library_name", "library_version", "etag_timeout", "headers", "endpoint",
)  # fmt: skip


def find_adapter_file(
    name_or_path: str | os.PathLike[str], filename: str, subfolder: str | None = None, **hub_kwargs: Any
) -> str:
    """The path of `filename` in a local folder or, where that has none, in the Hub's cache after a download."""
    folder = os.path.join(name_or_path, subfolder) if subfolder else os.fspath(name_or_path)
    path = os.path.join(folder, filename)
    if os.path.isfile(path):
        return path
    if os.path.isdir(folder):
        raise ValueError(f"Can't find '{filename}' at '{folder}'")
    try:
        from huggingface_hub import hf_hub_download

        options = {k: v for k, v in hub_kwargs.items() if k in HUB_OPTIONS}
        return str(hf_hub_download(os.fspath(name_or_path), filename, subfolder=subfolder, **options))
    except Exception as error:
        raise ValueError(f"Can't find '{filename}' at '{name_or_path}': {error}") from error


def known_file(name_or_path: str, filename: str, revision: str | None = None) -> Path | None:
    """The path of a file in a local folder or in the Hub's cache, None where there is none. Nothing is downloaded."""
    path = Path(name_or_path, filename)
    if path.is_file():
        return path
    with suppress(ImportError, ValueError):  # a name that is no repository's
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name_or_path, filename, revision=revision)
        return Path(found) if isinstance(found, str) else None
    return None


def push_to_hub(
    write: Callable[[str], object], repo_id: str, *, commit_message: str, commit_description: str | None = None,
    private: bool | None = None, token: bool | str | None = None, revision: str | None = None, create_pr: bool = False,
) -> Any:  # fmt: skip
    """Commit what `write` puts into a folder to a repository of the Hub, which is made where it is missing.

    The folder holds the repository's model card, if it has one, for `write` to go on with. repo_id: `user/name`, or
    `name` for the token's user. revision: a branch, made where it is missing. Returns huggingface_hub's CommitInfo.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        try:
            card = api.hf_hub_download(repo_id, CARD_NAME, revision=revision)
            shutil.copyfile(card, os.path.join(folder, CARD_NAME))
        except (EntryNotFoundError, RevisionNotFoundError):
            pass  # a new repository, or a new branch
        write(folder)
        files = {p.relative_to(folder).as_posix(): p for p in sorted(Path(folder).rglob("*")) if p.is_file()}
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.create_commit(
            repo_id, [CommitOperationAdd(name, path) for name, path in files.items()], commit_message=commit_message,
            commit_description=commit_description, revision=revision, create_pr=create_pr,
        )  # fmt: skip


def pushing(options: dict[str, Any], directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Arguments of `push_to_hub` among those of a `save_pretrained(push_to_hub=True)`; None if it is not to push.

    The repository is by default one with the folder's name, as in transformers."""
    if not options.get("push_to_hub"):
        return None
    names = ("commit_message", "commit_description", "private", "token", "revision", "create_pr")
    repo_id = options.get("repo_id") or os.path.basename(os.path.abspath(directory))
    return {"repo_id": repo_id} | {name: options[name] for name in names if options.get(name) is not None}
