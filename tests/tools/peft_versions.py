"""The installed PEFT: `needs_peft` skips what its version does not have or does wrong. `make test-matrix` runs several
versions; with the newest nothing is skipped."""

from __future__ import annotations

from fnmatch import fnmatch
from importlib import metadata

import pytest
from packaging.specifiers import SpecifierSet

INSTALLED = metadata.version("peft")
# Golden cases (patterns of tests/golden/cases.py) by the first version that has their method or option.
CASES_SINCE = {
    "0.19": "adamss* bdlora* gralora* lily* parameters* peanut* psoft* pvera* tinylora* oft_embedding",
    "0.20": "beft* deft* frod* glora* hira* mica monteclora* unilora* velora*",
    "0.21": "kasa* supertuning*",
}


def peft_is(versions: str) -> bool:
    """True if the installed PEFT is one of the versions, `>=0.21` or `!=0.20.*`."""
    return SpecifierSet(versions).contains(INSTALLED, prereleases=True)


def needs_peft(versions: str, why: str) -> None:
    """Skip the test that runs where the installed PEFT is none of the versions; why: what the others do."""
    if not peft_is(versions):
        pytest.skip(f"needs peft{versions}, and {INSTALLED} is installed: {why}")


def needs_case(name: str) -> None:
    """Skip the test that runs where the installed PEFT cannot load a golden case."""
    for version, patterns in CASES_SINCE.items():
        if any(fnmatch(name, pattern) for pattern in patterns.split()):
            needs_peft(f">={version}", f"those before do not have, or keep in another shape, what {name} is made of")
