"""`python tools/freeze_tuned.py RUN`: rows of peft_kernels/tuned from what a GPU run measured, with source "measured".

RUN is a folder of tools/gpu_run.py. Configurations come from its part `tune`, the panels' limits from the forced pairs
of `lora_linear` and `panels`; `elements` of the panels stays as it is. Measured rows stand before the others and claim
what was measured: so many rows of x and ranks at most, this size of elements and blocks. Refused are numbers of a fake
device, kernels that the run's tests found wrong, and a GPU whose architecture has no table of its own.

Afterwards the budgets of the static report ask for the new rows: `python -m bench --static`, and `make test`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.gpu import answers, files
from bench.gpu.verdicts import Verdicts
from peft_kernels import tuning

LIMITS = ("bits", "plain", "max_r", "min_blocksize")  # what measured rows of one kind share, beside max_M


class Refused(Exception):
    """Why nothing is written."""


def read(run: Path) -> list[dict[str, Any]]:
    """The rows of a run that tables come from. Raises `Refused`."""
    digest = files.settings(run).get("digest")
    if digest is None:
        raise Refused(f"{run}: expected the folder of a run of tools/gpu_run.py, found no settings.json with a digest")
    rows = [row for part in answers.PARTS for row in files.rows(run / f"{part}.jsonl", digest).values()]
    made_up = [row["title"] for row in rows if row.get("fake") or "stands_in" in row]
    if files.settings(run).get("fake") or made_up:
        raise Refused(f"{run}: a fake device's numbers are made up; tables take those of a GPU")
    for row in rows:
        if "timed" in row and row["arch"] != f"sm_{row['capability']}":
            own = f"sm_{row['capability']}"
            raise Refused(f"{run}: measured on {own}, which the table of {row['arch']} serves: expected a GPU of "
                          f"{row['arch']}, or a table {own}.json")  # fmt: skip
    return rows


def merged(arch: str, found: dict[str, Any]) -> dict[str, Any]:
    """The table of an architecture with what was measured; only what it says itself and what is new."""
    own: dict[str, Any] = json.loads((tuning.FOLDER / f"{arch}.json").read_text())
    whole = tuning.table(arch)
    kernels = {**own.get("kernels", {})}
    for kernel, rows in found["kernels"].items():
        facts = {_facts(row) for row in rows}
        kept = [row for row in whole["kernels"][kernel]
                if row["source"] != "measured" or _facts(row) not in facts]  # fmt: skip
        new = [{k: v for k, v in row.items() if (k, v) != ("programs", whole["programs"])} for row in rows]
        kernels[kernel] = new + kept
    table = {**own, **({"kernels": kernels} if kernels else {})}
    if set(found["panels"]) == {"from_M", "from_M_dense"}:
        table["panels"] = {**whole["panels"], **found["panels"], "source": "measured"}
    return table


def _facts(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in LIMITS)


def text(table: dict[str, Any]) -> str:
    """As the tables are written: a row a line."""
    parts = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in table.items() if k != "kernels"]
    if "kernels" in table:
        kernels = (f"    {json.dumps(kernel)}: [\n" + ",\n".join(f"      {json.dumps(row)}" for row in rows) + "\n    ]"
                   for kernel, rows in table["kernels"].items())  # fmt: skip
        parts.append('  "kernels": {\n' + ",\n".join(kernels) + "\n  }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("run", type=Path, metavar="RUN", help="the folder of a GPU run")
    p.add_argument("--tables", type=Path, default=tuning.FOLDER, metavar="DIR", help="where the table is written")
    args = p.parse_args(argv)
    try:
        rows = read(args.run)
        found = answers.proposed(rows, Verdicts.read(args.run).wrong)
        for why in found["refused"]:
            print(f"left as it is: {why}")
        if found["arch"] is None:
            raise Refused(f"{args.run}: its part `tune` has timed nothing")
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not found["kernels"] and len(found["panels"]) < 2:
        print("error: nothing is left to write", file=sys.stderr)
        return 1
    path = args.tables / f"{found['arch']}.json"
    path.write_text(text(merged(found["arch"], found)))
    count = sum(map(len, found["kernels"].values()))
    print(f"{path}: {count} measured rows of {', '.join(found['kernels']) or 'no kernel'}; panels {found['panels']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
