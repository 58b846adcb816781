"""The suite chaos in its short form, and that it sees what it is there to see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from forms import by_form

from bench.results import Row
from bench.suites import chaos

METRICS = {"fastpeft_engine_restarts_total": 0.0}
ANSWER = {"model": "a0", "status": 200, "same": True, "seconds": 1.0}
FAULT = {"fault": "bad_json", "status": 400, "right": True}
PROBE = {"health": 200, "seconds": 0.01}
MEMORY = [(i / 100, 100.0) for i in range(101)]


def missed(notes: list[str]) -> list[str]:
    return [note for note in notes if note.endswith("MISSED") or note.startswith("wrong: ")]


def test_nothing_is_lost_among_hostile_clients(tmp_path: Path) -> None:
    row = chaos.run(tmp_path, None, by_form(short=0.1, full_form=1.0), seed=1, threads=1)
    assert not missed(row.notes), "\n".join(row.notes)


def judged(honest: Any = ANSWER, hostile: Any = FAULT, health: Any = PROBE, memory: Any = MEMORY,
           restarts: float = 0.0, left: float = 0.0) -> list[str]:  # fmt: skip
    row = Row("chaos", {})
    seen = chaos.Seen(honest=[ANSWER, honest], hostile=[FAULT, hostile], health=[PROBE, health], memory=memory)
    chaos.judge(row, seen, {**METRICS, "fastpeft_engine_restarts_total": restarts}, {"open_requests": left})
    return missed(row.notes)


@pytest.mark.parametrize(("seen", "says"), [
    ({"honest": {**ANSWER, "same": False, "text": "another"}}, "1 wrong"),
    ({"honest": {**ANSWER, "same": False, "status": None, "text": "reset"}}, "1 of them lost"),
    ({"hostile": {**FAULT, "status": 500, "right": False}}, "1 with another status"),
    ({"health": {**PROBE, "seconds": 3.0}}, "the slowest 3.00 s"),
    ({"health": {**PROBE, "health": None}}, "1 not 200"),
    ({"memory": [(i / 100, 100.0 + i / 10) for i in range(101)]}, "resident memory"),
    ({"restarts": 1.0}, "1 restarts"),
    ({"left": 1.0}, "left open"),
])  # fmt: skip
def test_each_claim_can_be_missed(seen: dict[str, Any], says: str) -> None:
    assert judged() == []
    assert any(says in note for note in judged(**seen))
