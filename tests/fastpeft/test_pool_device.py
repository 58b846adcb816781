"""AdapterPool on a GPU: the same answers, graphs that see what is loaded later, and the order of copies and uses."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpeft import AdapterPool

from peft_kernels.testing import assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("pool_tools.py")))
write, llama, logits, content = (tools[name] for name in ("write", "llama", "logits", "content"))
X = tools["X"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i, name in enumerate("abcd"):
        write(tmp_path / name, i, r=(4, 12, 3, 8)[i])
    return tmp_path


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_slots_hold_the_files_on_every_device(root: Path, device: str) -> None:
    pool, same = AdapterPool(llama().to(device), root, max_resident=2), AdapterPool(llama(), root, max_resident=4)
    for name in "abcdab":
        with pool.acquire(name) as slot, same.acquire(name) as other:
            for layer, (a, b, scaling) in content(same, other).items():
                parts = content(pool, slot)[layer]
                assert_same_bits(parts[0].cpu(), a)
                assert_same_bits(parts[1].cpu(), b)
                assert parts[2] == scaling
        with pool.using([name, None, "a"]):
            assert logits(pool.model, X.to(device)).isfinite().all()


@pytest.mark.gpu
@torch.no_grad()
def test_a_recorded_graph_sees_what_is_loaded_later(root: Path) -> None:
    pool = AdapterPool(llama().cuda(), root, max_resident=2)
    layer = pool.layers["model.layers.0.self_attn.q_proj"]
    x = torch.randn(3, 16, device="cuda")
    slots = torch.full((3,), -1, dtype=torch.int64, device="cuda")
    pool.assign(slots)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    answers = []
    for name in "abcdab":
        with pool.acquire(name) as slot:
            slots.fill_(int(slot))
            graph.replay()
            assert_same_bits(y.cpu(), layer(x).cpu())
            answers.append(y.clone())
    assert torch.equal(answers[0], answers[4])
    assert not torch.equal(answers[0], answers[1])


class Recorder:
    """Stands for a stream and for the events recorded on it: what was launched, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.events = 0
        recorder = self

        class Event:
            def record(self, stream: Any) -> None:
                recorder.events += 1
                self.name = f"e{recorder.events}"
                recorder.log.append(f"record {self.name}")

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self)

    def wait_event(self, event: Any) -> None:
        self.log.append(f"wait {event.name}")


def test_a_copy_waits_for_the_last_use_of_its_rows_and_a_use_for_the_copy(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU work is only launched: a slot may be copied over after it was used, and used after it was copied."""
    pool = AdapterPool(llama(), root, max_resident=1, max_staged=2)
    loads = [pool._loads.begin(name) for name in "ab"]
    for load in loads:
        load.future.result()
    stream = Recorder(monkeypatch)
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda t, *a, **k: (stream.log.append("copy"), copy(t, *a, **k))[1])
    pool._buffers.device = torch.device("cuda", 0)
    first, again = pool.acquire("a"), pool.acquire("a")
    first.release()
    again.release()
    second = pool.try_acquire("b")
    assert second is not None
    monkeypatch.undo()
    log = [entry for i, entry in enumerate(stream.log) if entry != "copy" or stream.log[i - 1] != "copy"]
    copied, used, last, replaced = "e1", "e2", "e3", "e4"
    assert log[:3] == ["copy", f"record {copied}", f"wait {copied}"]
    assert log[3:6] == [f"wait {copied}", f"record {used}", f"record {last}"]
    assert set(log[6 : log.index("copy", 6)]) == {f"wait {last}"}
    assert log[-3:] == ["copy", f"record {replaced}", f"wait {replaced}"]
    pool._buffers.device = torch.device("cpu")
