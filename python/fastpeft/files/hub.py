"""Files of adapters in local folders and on the Hub."""

from __future__ import annotations

import os
from typing import Any


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

        accepted = ("revision", "token", "cache_dir", "force_download", "local_files_only", "repo_type")
        options = {k: v for k, v in hub_kwargs.items() if k in accepted}
        return str(hf_hub_download(os.fspath(name_or_path), filename, subfolder=subfolder, **options))
    except Exception as error:
        raise ValueError(f"Can't find '{filename}' at '{name_or_path}': {error}") from error
