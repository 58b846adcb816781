"""Files larger than memory are mapped, and a kept model that is larger than a process may have takes a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpeft import quantized_skeleton
from fastpeft.files.mapped import map_bytes
from fastpeft.files.safetensors import map_tensors, read_header
from fastpeft.weights.cached import identity, keep

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux refuses mappings; others may")
ROOT = Path("/sys/fs/cgroup")
STEP = """
import json, os, sys
folder, cache, group = sys.argv[1:]
if group:
    open(os.path.join(group, "cgroup.procs"), "w").write(str(os.getpid()))
import torch
from fastpeft import LoraConfig, get_peft_model, load_cached_model

model = load_cached_model(folder, cache, torch.bfloat16, say=lambda line: print(line, file=sys.stderr))
size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
torch.manual_seed(0)
model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM"))
ids = torch.arange(16)[None]
loss = model(input_ids=ids, labels=ids).loss
loss.backward()
print(json.dumps({"model": size, "loss": loss.item()}))
"""


def memory() -> int:
    """Bytes of memory and swap of this machine."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal"))


def test_a_file_larger_than_memory_is_mapped(tmp_path: Path) -> None:
    """A sparse one, whose pages take no room on the disk."""
    count = 2 * memory()
    header = json.dumps({"w": {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}}).encode()
    file = tmp_path / "large.safetensors"
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        try:
            stream.truncate(8 + len(header) + count)
        except OSError:
            pytest.skip("no files of that size here")
    w = map_tensors(read_header(file))["w"]
    assert len(w) == count
    w[-1] = 7  # in this process alone
    assert w[-2:].tolist() == [0, 7]
    assert map_bytes(file, file.stat().st_size)[-1] == 0


def test_a_file_that_is_shorter_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"abc")
    assert bytes(map_bytes(tmp_path / "short", 3).tolist()) == b"abc"
    with pytest.raises(OSError, match="short"):
        map_bytes(tmp_path / "short", 5000)


@pytest.fixture
def group() -> Iterator[tuple[Path, str]]:
    """A new control group of memory, and the name of its limit's file."""
    old = (ROOT / "memory").is_dir()
    path = (ROOT / "memory" if old else ROOT) / f"fastpeft-{uuid.uuid4().hex[:8]}"
    limit = "memory.limit_in_bytes" if old else "memory.max"
    try:
        path.mkdir()
    except OSError:
        pytest.skip("no control group can be made here")
    try:
        if not (path / limit).is_file():
            pytest.skip("no control group of memory here")
        yield path, limit
    finally:
        path.rmdir()


def kept_model(folder: Path, cache: Path) -> None:
    """A model in NF4 as `load_cached_model` keeps it, of a dense one that nobody has: its bytes are random."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=4096, intermediate_size=14336, num_hidden_layers=8, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    config.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = quantized_skeleton(model, double_quant=False).to_empty(device="cpu")
    some = torch.randint(256, (1 << 20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype is torch.uint8:
            tensor.view(-1).copy_(some.repeat(tensor.numel() // len(some) + 1)[: tensor.numel()])
        else:
            tensor.data.fill_(0.02)
    keep(model, cache, identity(folder, torch.bfloat16, {}))


@pytest.mark.full_form
def test_a_kept_model_larger_than_memory_takes_a_step(tmp_path: Path, group: tuple[Path, str]) -> None:
    """In a control group with three quarters of the model's bytes: its pages come from the file, and go again."""
    folder, cache = tmp_path / "dense", tmp_path / "kept"
    kept_model(folder, cache)
    file = cache / "model.safetensors"
    with file.open("rb") as stream:  # pages that are there already are another's
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    place, limit = group
    (place / limit).write_text(str(file.stat().st_size * 3 // 4))
    found: list[dict[str, Any]] = []
    for where in (str(place), ""):
        words = [sys.executable, "-c", STEP, str(folder), str(cache), where]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "opened the quantised model" in done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert found[0] == found[1]
    assert found[0]["model"] > int((place / limit).read_text())
