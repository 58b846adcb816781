"""The version of PEFT that a configuration is written with: its format's, in `peft_version`.

It is `fastpeft.config.__version__`, where PEFT has it too and whoever tests against several versions sets it. Of a
development version the commit is named as well, since that alone says which it is.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from typing import Any

from .types import warn


def format_version() -> str:
    """The version for `peft_version`, such as "0.21.2"; of a development version "0.22.0.dev0@COMMIT" or "@UNKNOWN"."""
    package: Any = sys.modules[__package__]
    version: str = package.__version__
    if ".dev" not in version:
        return version
    commit = None
    try:
        commit = package._get_commit_hash("peft")
    except Exception as error:  # whatever the metadata of an installation makes it raise
        warn(f"A dev version of PEFT is used but there was an error while trying to determine the commit hash: {error}")
    return f"{version}@{commit or 'UNKNOWN'}"


def commit_of(package: str) -> str | None:
    """The commit from which pip installed a package, None where it was not installed from a repository."""
    try:
        found = metadata.distribution(package).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    commit = json.loads(found).get("vcs_info", {}).get("commit_id") if found else None
    return None if commit is None else str(commit)
