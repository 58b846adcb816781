"""AdapterPool and prompts: what is read, what is refused and why, and the virtual tokens that they take."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpeft import AdapterLoadError, AdapterPool
from fastpeft.config.base import CONFIG_NAME
from fastpeft.pool import PoolFull
from fastpeft.saving.folder import SAFETENSORS_NAME
from safetensors.torch import load_file, save_file
from serve_prompts_tools import PROMPTS, write_prompt

from peft_kernels.testing import assert_no_worse

pytestmark = pytest.mark.filterwarnings("ignore")
tools = runpy.run_path(str(Path(__file__).with_name("pool_tools.py")))
llama, write, logits = tools["llama"], tools["write"], tools["logits"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two LoRAs and prompts for `llama()`: vectors of 5 tokens, keys and values of 16."""
    root = tmp_path_factory.mktemp("adapters")
    for name in ("one", "two"):
        write(root / name, 0)
    write_prompt(llama(), "prompt", root / "vectors")
    write_prompt(llama(), "prefix", root / "pairs")
    write_prompt(llama(), "task", root / "task")
    return root


def made(model: Any, vectors: torch.Tensor) -> torch.Tensor:
    """The keys and values that transformers keeps of vectors in a whole forward."""
    with torch.no_grad():
        kept = model(inputs_embeds=vectors[None].to(model.dtype), use_cache=True).past_key_values
    return torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in kept.layers])


def pool_of(root: Path, **options: Any) -> AdapterPool:
    return AdapterPool(llama(), root, **{"max_resident": 3, "max_virtual_tokens": None, **options})


def test_a_prompt_is_the_keys_and_values_that_a_model_has_of_it(root: Path) -> None:
    pool = pool_of(root)
    for name, tokens in (("vectors", 5), ("pairs", 16)):
        with pool.acquire(name) as lease:
            prompt = lease.prompt
            assert prompt is not None
            found = prompt.key_values(pool.model)
            assert prompt.vectors is None
            assert found is prompt.key_values(pool.model)  # made once
            assert found.shape == (2, 2, *found.shape[2:3], tokens, found.shape[-1])
        held = load_file(root / name / SAFETENSORS_NAME)["prompt_embeddings"]
        if name == "vectors":
            eager, exact = (made(model, held) for model in (llama(), llama().double()))
            # what rounding does in one layer goes through all that follow
            assert_no_worse(found, eager, exact, 8 * (exact.abs() + exact.abs().mean()))
        else:  # PEFT's: layer after layer keys, then values, of all heads
            assert torch.equal(found.permute(3, 0, 1, 2, 4).flatten(1), held)
    with pool.acquire("one") as lease:
        assert lease.prompt is None


def test_rows_cannot_have_a_prompt_by_itself(root: Path) -> None:
    pool = pool_of(root)
    with pytest.raises(ValueError, match="is a prompt, which no layer has"), pool.using(["one", "vectors"]):
        pass
    assert pool.stats().in_use == 0
    with pool.using(["one", None, "two"]):
        assert logits(pool.model).isfinite().all()


def test_prompts_share_virtual_tokens_and_slots(root: Path) -> None:
    pool = pool_of(root)
    stats = pool.stats()
    assert stats.virtual_tokens == 16 + 6 + 5  # what its three largest have together
    empty = stats.nbytes
    heads, layers, width = 2, 2, llama().config.hidden_size // llama().config.num_attention_heads
    heads = llama().config.num_key_value_heads
    with pool.acquire("vectors"):
        assert pool.stats().nbytes - empty == 5 * layers * 2 * heads * width * 4
    pool.acquire("pairs").release()
    pool.acquire("one").release()
    assert pool.resident() == ["vectors", "pairs", "one"]
    pool.acquire("two").release()  # there is room for its rows, not for a fourth
    assert pool.resident() == ["pairs", "one", "two"]
    pool.acquire("task").release()
    assert pool.resident() == ["one", "two", "task"]
    pool.remove("task")
    assert (pool.stats().virtual_tokens_taken, pool.stats().nbytes) == (0, empty)


def test_a_prompt_waits_for_virtual_tokens_that_others_hold(root: Path) -> None:
    """Fewer than all have: who was used longest ago makes room, who is used does not."""
    bytes_of_tokens = 4 * 2 * 2 * llama().config.num_key_value_heads * (
        llama().config.hidden_size // llama().config.num_attention_heads
    )
    budget = pool_of(root).stats().nbytes + 4 * 20 * bytes_of_tokens
    pool = pool_of(root, byte_budget=budget, max_resident=8)
    most = pool.stats().virtual_tokens
    assert most == budget // 4 // bytes_of_tokens >= 16
    assert pool.stats().nbytes + most * bytes_of_tokens <= budget
    pool._slots.tokens = 20
    pool.acquire("vectors").release()
    with pool.acquire("pairs"):
        assert pool.resident() == ["pairs"]
        assert pool.try_acquire("vectors") is None
        pool.prefetch("vectors")
        with pytest.raises(PoolFull, match="16 of 20 virtual tokens are taken"):
            pool.acquire("vectors", timeout=0.05)
        with pool.acquire("one"):  # which needs none
            pass
    pool.acquire("vectors").release()
    assert pool.resident() == ["one", "vectors"]


def changed(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / CONFIG_NAME
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def with_tensors(make: Any) -> Any:
    def change(folder: Path) -> None:
        save_file(make(load_file(folder / SAFETENSORS_NAME)), folder / SAFETENSORS_NAME)

    return change


BAD: dict[str, tuple[str, Any, str, str]] = {  # like which, changed how, the reason, and what a stranger sees of it
    "long": ("vectors", changed(num_virtual_tokens=17), "num_virtual_tokens 17 is above the pool's max_virtual_tokens"
             "=16", "its num_virtual_tokens is above the pool's max_virtual_tokens=16"),
    "huge": ("vectors", changed(num_virtual_tokens=60000), "num_virtual_tokens 60000 is above", "is above"),
    "none": ("vectors", changed(num_virtual_tokens=0), "positive integer", "cannot be used with this model"),
    "fewer": ("vectors", changed(num_virtual_tokens=4), "size mismatch for: prompt_embeddings", "do not fit"),
    "width": ("vectors", changed(token_dim=8), "should be the width of the input embeddings", "cannot be used"),
    "layers": ("pairs", changed(num_layers=3), "of another model's layers, heads or widths: .*3", "another model's"),
    "heads": ("pairs", changed(num_attention_heads=3), "another model's", "another model's"),
    "wide": ("pairs", changed(token_dim=64), "another model's", "another model's"),
    "classes": ("vectors", changed(task_type="SEQ_CLS"), "task SEQ_CLS, not CAUSAL_LM", "not CAUSAL_LM"),
    "pair": ("vectors", changed(num_transformer_submodules=2), "an encoder and a decoder", "a decoder"),
    "saved": ("vectors", changed(modules_to_save=["lm_head"]), "modules of the model beside", "beside the prompt"),
    "tasks": ("task", changed(num_tasks=2), "several tasks, and a request names none", "several tasks"),
    "ranks": ("task", changed(num_ranks=40), "num_ranks 40 is above", "above the pool's max_virtual_tokens"),
    "missing": ("task", with_tensors(lambda t: {"prompt_embeddings": t["prompt_embeddings"]}), "missing: prefix_task",
                "missing: 2"),
    "more": ("vectors", with_tensors(lambda t: {**t, "other": torch.zeros(1)}), "unexpected: other", "unexpected: 1"),
    "integers": ("vectors", with_tensors(lambda t: {k: v.int() for k, v in t.items()}), "not floating-point",
                 "do not fit"),
    "nan": ("pairs", with_tensors(lambda t: {k: v * torch.nan for k, v in t.items()}), "NaN|not finite", "NaN|finite"),
}  # fmt: skip


@pytest.fixture(scope="module")
def spoilt(root: Path, tmp_path_factory: pytest.TempPathFactory) -> AdapterPool:
    folder = tmp_path_factory.mktemp("spoilt")
    for name in ("one", "vectors", "pairs"):
        shutil.copytree(root / name, folder / name)
    for name, (like, change, *_) in BAD.items():
        change(shutil.copytree(root / like, folder / name))
    return pool_of(folder, max_virtual_tokens=16)


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_prompt_of_this_model_is_refused_for_itself_alone(spoilt: AdapterPool, name: str) -> None:
    _, _, reason, rule = BAD[name]
    with pytest.raises(AdapterLoadError, match=reason) as caught:
        spoilt.acquire(name)
    assert str(spoilt.registry.directory) not in caught.value.rule
    assert re.search(rule, caught.value.rule)
    with pytest.raises(AdapterLoadError, match=reason):  # remembered
        spoilt.acquire(name)
    spoilt.acquire("vectors").release()
    assert spoilt.stats().in_use == 0


def test_values_beyond_the_range_of_the_model_s_dtype(root: Path, tmp_path: Path) -> None:
    large = shutil.copytree(root / "vectors", tmp_path / "large")
    with_tensors(lambda tensors: {key: t * 1e9 for key, t in tensors.items()})(large)
    pool = AdapterPool(llama().half(), tmp_path, max_resident=1, max_virtual_tokens=None)
    with pytest.raises(AdapterLoadError, match=r"beyond the range of torch\.float16"):
        pool.acquire("large")


def test_prompts_are_served_to_who_asks_for_them_alone(root: Path) -> None:
    pool = AdapterPool(llama(), root, max_resident=2)
    with pytest.raises(AdapterLoadError, match="the method is PROMPT_TUNING, only LORA is served"):
        pool.acquire("vectors")
    assert (pool.stats().virtual_tokens, pool.stats().virtual_tokens_taken) == (0, 0)
    with pytest.raises(ValueError, match="max_virtual_tokens must not be negative"):
        pool_of(root, max_virtual_tokens=-1)
    with pool_of(root, max_virtual_tokens=5) as short:
        short.acquire("vectors").release()
        with pytest.raises(AdapterLoadError, match="num_virtual_tokens 16 is above the pool's max_virtual_tokens=5"):
            short.acquire("pairs")


def test_every_method_s_files_are_read(tmp_path: Path) -> None:
    for seed, name in enumerate(PROMPTS):
        write_prompt(llama(), name, tmp_path / name, seed)
    pool = pool_of(tmp_path, max_resident=len(PROMPTS))
    assert not pool.layers
    for name in PROMPTS:
        with pool.acquire(name) as lease:
            assert lease.prompt is not None
            assert lease.prompt.key_values(pool.model).isfinite().all()
