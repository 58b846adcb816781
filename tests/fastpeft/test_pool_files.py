"""AdapterPool and files: what is refused, by name and with a reason, and what changes on the disk."""

from __future__ import annotations

import json
import os
import runpy
import shutil
from pathlib import Path
from typing import Any

import fastpeft
import pytest
import torch
from fastpeft import AdapterLoadError, AdapterPool
from fastpeft.config.base import CONFIG_NAME
from fastpeft.pool import UnknownAdapterError
from fastpeft.saving.folder import SAFETENSORS_NAME
from safetensors.torch import load_file, save_file
from torch import nn

from peft_kernels.testing import assert_same_bits

HERE = Path(__file__)
tools = runpy.run_path(str(HERE.with_name("pool_tools.py")))
write, llama, logits, content = (tools[name] for name in ("write", "llama", "logits", "content"))
tensors_tests = runpy.run_path(str(HERE.with_name("test_hostile_tensors.py")))
hostile = runpy.run_path(str(HERE.with_name("hostile_tools.py")))
Net, quick = hostile["Net"], hostile["quick"]


def acquire_fails(pool: AdapterPool, name: str, message: str) -> AdapterLoadError:
    with quick(), pytest.raises(AdapterLoadError, match=message) as caught:
        pool.acquire(name)
    assert caught.value.name == name
    assert caught.value.reason in str(caught.value)
    return caught.value


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- what is not served -----------------------------------------------------------------------------------------------

CONFIGS = {
    "dora": ({"use_dora": True}, "DoRA is refused"),
    "bias": ({"bias": "lora_only"}, "bias='lora_only' is refused"),
    "lora_bias": ({"lora_bias": True}, "lora_bias is refused"),
    "saved": ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*lm_head"),
    "method": ({"peft_type": "IA3"}, "the method is IA3"),
    "no_method": ({"peft_type": "NONSENSE"}, "the method is NONSENSE"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "aLoRA is refused"),
    "pissa": ({"init_lora_weights": "pissa"}, "changed the base weights"),
    "kasa": ({"kasa_config": {}}, "serves plain LoRA, not Kasa"),
    "parameters": ({"target_parameters": ["x"]}, r"not target_parameters=\['x'\]"),
    "tokens": ({"trainable_token_indices": [1]}, r"not trainable_token_indices=\[1\]"),
    "replicated": ({"layer_replication": [[0, 1]]}, "not layer_replication"),
    "outside": ({"target_modules": ["q_proj", "v_proj", "up_proj"]}, "targets .*up_proj.*outside of the pool's"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "'model.embed_tokens', a Embedding, is no linear"),
    "nowhere": ({"target_modules": ["nothing"]}, "select nothing in this model"),
    "fewer": ({"target_modules": ["q_proj"]}, "unexpected: .*v_proj"),
    "layers": ({"layers_to_transform": [0]}, "unexpected: .*layers.1"),
    "large": ({"r": 64}, "rank 64 is above the pool's max_rank=4"),
    "huge": ({"r": 60000}, "rank 60000 is above"),
    "too_huge": ({"r": 10**7}, "expected a positive integer"),
    "other_rank": ({"rank_pattern": {"q_proj": 3}}, "size mismatch for: .*q_proj.lora_A.* expected"),
    "alpha": ({"lora_alpha": 1e308}, "magnitude at most"),
    "slow": ({"target_modules": r"(?:.|..|[a-z]+|\w+|[^!]+)*[!?]"}, "took more than|backtracking"),
    "broken": ({"target_modules": "("}, "not a valid regular expression"),
    "list": ({"target_modules": {"a": 1}}, "must be a text or a list"),
}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> AdapterPool:
    root = tmp_path_factory.mktemp("adapters")
    write(root / "sound", 0)
    for i, (name, (changes, _)) in enumerate(CONFIGS.items()):
        change_config(write(root / name, i), **changes)
    pool = AdapterPool(llama(), root, max_resident=2, target_modules=["q_proj", "v_proj"], max_rank=4)
    assert set(pool.names()) == {"sound", *CONFIGS}
    return pool


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_no_plain_lora_for_this_pool_is_refused_for_itself_alone(pool: AdapterPool, name: str) -> None:
    read = pool.stats().failures
    error = acquire_fails(pool, name, CONFIGS[name][1])
    again = acquire_fails(pool, name, CONFIGS[name][1])
    assert again.reason == error.reason
    assert pool.stats().failures == read + 1  # the second answer is remembered
    with pytest.raises(AdapterLoadError):
        pool.prefetch(name)
    with pytest.raises(AdapterLoadError):
        pool.try_acquire(name)
    with pool.using(["sound"] * 3):
        assert logits(pool.model).isfinite().all()
    assert pool.stats().in_use == 0


def test_what_a_pool_is_made_from_is_the_sound_ones(tmp_path: Path) -> None:
    """Folders that cannot be served decide neither layers nor sizes."""
    write(tmp_path / "sound", 0)
    for i, (name, (changes, _)) in enumerate(CONFIGS.items()):
        change_config(write(tmp_path / name, i), **changes)
    (tmp_path / "sound" / "junk").mkdir()
    own = AdapterPool(llama(), tmp_path)
    assert {n.rpartition(".")[2] for n in own.layers} == {"q_proj", "v_proj", "up_proj"}  # one asks for up_proj
    assert own.stats().rows < 32 * 64 + 1
    own.acquire("sound").release()


@pytest.fixture
def net(tmp_path: Path) -> tuple[AdapterPool, Path]:
    """A pool over a small network with one sound adapter, and the folder of another one, which is to be spoilt."""
    config = fastpeft.LoraConfig(target_modules=["up", "down"], r=4, lora_alpha=8, init_lora_weights=False)
    for name in ("sound", "bad"):
        fastpeft.get_peft_model(Net(), config).save_pretrained(tmp_path / name)
        (tmp_path / name / "fastpeft_manifest.json").unlink()
    return AdapterPool(Net(), tmp_path, max_resident=1), tmp_path / "bad"


@pytest.mark.parametrize("name", tensors_tests["RAW"])
def test_broken_headers(net: tuple[AdapterPool, Path], name: str) -> None:
    pool, folder = net
    header, data, message = tensors_tests["RAW"][name]
    path = folder / SAFETENSORS_NAME
    if header is None:
        path.write_bytes(data)
    else:
        hostile["write_raw"](path, header, data)
    acquire_fails(pool, "bad", message)
    pool.acquire("sound").release()


@pytest.mark.parametrize("name", tensors_tests["BAD_TENSORS"])
def test_broken_tensors(net: tuple[AdapterPool, Path], name: str) -> None:
    pool, folder = net
    change, message = tensors_tests["BAD_TENSORS"][name]
    tensors_tests["change_tensors"](folder, change)
    acquire_fails(pool, "bad", message)
    pool.acquire("sound").release()


def test_shapes_are_checked_before_anything_is_allocated(net: tuple[AdapterPool, Path], monkeypatch: Any) -> None:
    pool, folder = net
    tensors = {k: v.repeat(1, 50) for k, v in load_file(folder / SAFETENSORS_NAME).items()}
    save_file(tensors, folder / SAFETENSORS_NAME)
    monkeypatch.setattr("fastpeft.saving.folder.read_tensors", lambda *_: pytest.fail("tensors were read"))
    acquire_fails(pool, "bad", "size mismatch")


def test_values_beyond_the_range_of_the_pool_s_dtype(net: tuple[AdapterPool, Path]) -> None:
    pool, folder = net
    small = AdapterPool(Net(), folder.parent, dtype=torch.float16)
    tensors = load_file(folder / SAFETENSORS_NAME)
    tensors[next(iter(tensors))][0, 0] = 1e6
    save_file(tensors, folder / SAFETENSORS_NAME)
    acquire_fails(small, "bad", "beyond the range of torch.float16")
    pool.acquire("bad").release()


def test_a_reason_is_short_whatever_a_file_says(net: tuple[AdapterPool, Path]) -> None:
    pool, folder = net
    save_file({"x" * 100000 + str(i): torch.zeros(1) for i in range(9)}, folder / SAFETENSORS_NAME)
    assert len(acquire_fails(pool, "bad", "").reason) <= 1000


def test_pickles_are_not_read(net: tuple[AdapterPool, Path]) -> None:
    pool, folder = net
    torch.save(load_file(folder / SAFETENSORS_NAME), folder / "adapter_model.bin")
    (folder / SAFETENSORS_NAME).unlink()
    acquire_fails(pool, "bad", "a pickle, which can run code")


def test_files_that_are_no_files(net: tuple[AdapterPool, Path]) -> None:
    pool, folder = net
    (folder / SAFETENSORS_NAME).unlink()
    acquire_fails(pool, "bad", "holds no adapter_model.safetensors")
    os.mkfifo(folder / SAFETENSORS_NAME)
    acquire_fails(pool, "bad", "not a regular file")
    shutil.rmtree(folder)
    acquire_fails(pool, "bad", "is gone")


@pytest.mark.parametrize("name", ["../sound", "sound/", "/etc", "", ".", "..", "a.b", "a ", "é", "x" * 65, "sound\n"])
def test_names_that_are_paths_are_nobody_s(net: tuple[AdapterPool, Path], name: str) -> None:
    pool, folder = net
    for ask in (pool.acquire, pool.try_acquire, pool.prefetch, pool.remove):
        with pytest.raises(UnknownAdapterError, match="there is no adapter of this name"):
            ask(name)
    with pytest.raises(ValueError, match="expected 1 to 64"):
        pool.add(name, folder)


def test_folders_with_names_that_cannot_be_and_links_out_of_the_directory(tmp_path: Path) -> None:
    write(tmp_path / "in" / "good", 0)
    write(tmp_path / "in" / "bad.name", 1)
    (tmp_path / "in" / "link").symlink_to(write(tmp_path / "outside", 2))
    (tmp_path / "in" / "inner").symlink_to(tmp_path / "in" / "good")
    (tmp_path / "in" / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "in" / "loop").symlink_to("loop")
    write(tmp_path / "in" / "__base__", 3)  # in a batch it stands for no adapter
    (tmp_path / "in" / "empty").mkdir()
    (tmp_path / "in" / "file").write_text("x")
    pool = AdapterPool(llama(), tmp_path / "in")
    assert pool.names() == ["good", "inner"]
    assert set(pool.registry.refused) == {"bad.name", "link", "__base__"}
    assert "leaves its folder" in pool.registry.refused["link"]


class Turned(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.one, self.two = layer, nn.Linear(6, 6)


def test_layers_of_a_kind_that_the_kernels_do_not_take(tmp_path: Path) -> None:
    from transformers.pytorch_utils import Conv1D

    shapes = {"one": (6, 6), "two": (6, 6)}
    for name in ("two", "one"):
        fastpeft.get_peft_model(Turned(nn.Linear(6, 6)), fastpeft.LoraConfig(target_modules=[name], r=2)
                                ).save_pretrained(tmp_path / name)  # fmt: skip
    for layer, what in ((Conv1D(6, 6), "Conv1D"), (nn.Embedding(*shapes["one"]), "Embedding")):
        pool = AdapterPool(Turned(layer), tmp_path)
        assert set(pool.layers) == {"two"}
        acquire_fails(pool, "one", f"'one', a {what}, ")
        pool.acquire("two").release()


# --- what changes on the disk -----------------------------------------------------------------------------------------


def test_a_repaired_adapter_is_read_again(net: tuple[AdapterPool, Path]) -> None:
    pool, folder = net
    path = folder / SAFETENSORS_NAME
    sound = path.read_bytes()
    path.write_bytes(sound[:100])
    acquire_fails(pool, "bad", "truncated")
    acquire_fails(pool, "bad", "truncated")
    path.write_bytes(sound[:200])
    acquire_fails(pool, "bad", "truncated")
    assert pool.stats().failures == 2
    path.write_bytes(sound)
    pool.acquire("bad").release()
    assert pool.resident() == ["bad"]


def test_a_file_that_changes_while_it_is_read_is_not_believed(net: tuple[AdapterPool, Path], monkeypatch: Any) -> None:
    from fastpeft.pool import files as pool_files

    pool, _ = net
    opened = pool_files.open_adapter

    times = iter(range(1, 1000))

    def open_and_touch(where: Path) -> Any:
        source = opened(where)
        os.utime(where / SAFETENSORS_NAME, ns=(0, next(times, 0)))
        return source

    monkeypatch.setattr(pool_files, "open_adapter", open_and_touch)
    acquire_fails(pool, "bad", "changed while it was read")
    times = iter((2000,))  # once, and then it stays so after the first change
    pool.acquire("bad").release()


def test_rescan_finds_what_came_what_went_and_what_was_changed(tmp_path: Path) -> None:
    for i, name in enumerate(("stays", "goes", "changes")):
        write(tmp_path / name, i)
    pool = AdapterPool(llama(), tmp_path, max_resident=4)
    assert pool.rescan() == ([], [], [])
    held = {name: pool.acquire(name) for name in pool.names()}
    before = {name: [t.clone() for t in content(pool, slot)["model.layers.0.self_attn.q_proj"][:2]]
              for name, slot in held.items()}  # fmt: skip
    shutil.rmtree(tmp_path / "goes")
    write(tmp_path / "comes", 7)
    shutil.rmtree(tmp_path / "changes")
    write(tmp_path / "changes", 8, r=3)
    assert pool.rescan() == (["comes"], ["goes"], ["changes"])
    assert pool.names() == ["changes", "comes", "stays"]
    assert pool.resident() == ["stays"]
    with pytest.raises(UnknownAdapterError):
        pool.acquire("goes")
    new = pool.acquire("changes")
    assert int(new) not in set(map(int, held.values()))
    for name, slot in held.items():  # who held one has it as it was
        for t, was in zip(content(pool, slot)["model.layers.0.self_attn.q_proj"], before[name], strict=False):
            assert_same_bits(t, was)
    assert content(pool, new)["model.layers.0.self_attn.q_proj"][0].shape[0] == 3
    assert pool.acquire("stays") == held["stays"]
    for lease in held.values():
        lease.release()
    assert pool.stats().in_use == 2
    assert pool.stats().resident == 2
    assert pool.stats().rows_taken == 16  # the old ones went with their leases


def test_adapters_of_other_folders_are_added_and_removed(tmp_path: Path) -> None:
    write(tmp_path / "pool" / "a", 0)
    other = write(tmp_path / "elsewhere", 1)
    pool = AdapterPool(llama(), tmp_path / "pool")
    pool.add("b", other)
    assert pool.names() == ["a", "b"]
    assert "b" in pool
    assert "c" not in pool
    with pytest.raises(ValueError, match="already"):
        pool.add("a", other)
    with pytest.raises(FileNotFoundError, match="not an adapter"):
        pool.add("c", tmp_path)
    pool.pin("b")
    assert pool.rescan() == ([], [], [])  # it was never of the directory
    pool.remove("b")
    assert pool.names() == ["a"]
    assert pool.resident() == []
    assert pool.stats().pinned == 0
    pool.remove("a")
    assert pool.rescan() == (["a"], [], [])
