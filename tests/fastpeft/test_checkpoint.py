"""Adapter folders: written whole or not at all, verified, exported for servers."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import fastpeft
import pytest
import torch
from fastpeft import atomic
from fastpeft.checkpoint import (
    CONFIG_NAME,
    SAFETENSORS_NAME,
    KeyMismatchError,
    get_peft_model_state_dict,
    load_adapter_file,
    save_adapter,
    set_peft_model_state_dict,
)
from fastpeft.safety import AdapterFileError
from fastpeft.serving import export_for_serving, inspect_adapter
from safetensors.torch import load_file
from torch import nn

from peft_kernels.testing import assert_no_worse, assert_same_bits


def adapter(value: float) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """A plausible adapter, different in every file for different values."""
    key = "base_model.model.up.lora_{}.weight"
    tensors = {key.format("A"): torch.full((2, 8), value), key.format("B"): torch.full((8, 2), value)}
    return tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": value, "target_modules": ["up"]}


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def model_with(value: float | None = None, **options: object) -> fastpeft.PeftModel:
    base = nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)})
    base.forward = lambda x: base["down"](torch.tanh(base["up"](x)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = fastpeft.get_peft_model(base, fastpeft.LoraConfig(target_modules=["up", "down"], r=2, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_() if value is None else parameter.fill_(value)
    return model.eval()


# --- writing ----------------------------------------------------------------------------------------------------------


def test_files_are_readable_by_others_and_have_a_manifest(tmp_path):
    out = tmp_path / "a"
    save_adapter(out, *adapter(1.0))
    assert {p.name for p in out.iterdir()} == {CONFIG_NAME, SAFETENSORS_NAME, atomic.MANIFEST_NAME}
    for path in out.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
    atomic.verify_manifest(out)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_saving_again_replaces_what_is_ours_and_keeps_the_rest(tmp_path):
    out = tmp_path / "a"
    save_adapter(out, *adapter(1.0))
    (out / "tokenizer.json").write_text("{}")
    (out / "other").mkdir()
    (out / "other" / "x").write_text("x")
    (out / "link").symlink_to("tokenizer.json")
    save_adapter(out, *adapter(2.0))
    assert json.loads((out / CONFIG_NAME).read_text())["lora_alpha"] == 2.0
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "other" / "x").read_text() == "x"
    assert os.readlink(out / "link") == "tokenizer.json"
    atomic.verify_manifest(out)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_keep_false_replaces_the_folder(tmp_path):
    out = tmp_path / "a"
    save_adapter(out, *adapter(1.0))
    with atomic.atomic_directory(out, keep=False) as folder:
        (folder / "x").write_text("new")
    assert {p.name for p in out.iterdir()} == {"x", atomic.MANIFEST_NAME}


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(NotADirectoryError), atomic.atomic_directory(tmp_path / "a"):
        pass
    assert (tmp_path / "a").read_text() == "x"


@pytest.mark.parametrize("exchange", [True, False])
def test_saving_into_the_current_folder(tmp_path, monkeypatch, exchange):
    """The folder that a process stands in keeps its identity."""
    save_adapter(tmp_path, *adapter(1.0))
    monkeypatch.chdir(tmp_path)
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    inode = tmp_path.stat().st_ino
    save_adapter(".", *adapter(2.0))
    assert tmp_path.stat().st_ino == inode
    assert json.loads(Path(CONFIG_NAME).read_text())["lora_alpha"] == 2.0
    atomic.verify_manifest(tmp_path)


def test_without_exchange_files_are_replaced_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    out = tmp_path / "a"
    save_adapter(out, *adapter(1.0))
    (out / "keep").write_text("x")
    save_adapter(out, *adapter(2.0))
    assert json.loads((out / CONFIG_NAME).read_text())["lora_alpha"] == 2.0
    assert (out / "keep").read_text() == "x"
    atomic.verify_manifest(out)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


STEPS = ["write_manifest", "_sync_tree", "_sync", "_put_in_place", "_exchange", "_link_missing"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("existing", [True, False])
def test_an_error_at_any_step_leaves_the_old_folder(tmp_path, monkeypatch, step, existing):
    out = tmp_path / "a"
    if existing:
        save_adapter(out, *adapter(1.0))
    elif step in ("_exchange", "_link_missing"):
        pytest.skip("not called for a new folder")
    before = content(tmp_path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(atomic, step, fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(out, *adapter(2.0))
    assert content(tmp_path) == before


KILL = """
import os, signal, sys
from fastpeft import atomic
calls = 0
def tracer(frame, event, arg):
    global calls
    if event == "line" and frame.f_code.co_filename == atomic.__file__:
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
    return tracer
import torch
from fastpeft.checkpoint import save_adapter
key = "base_model.model.up.lora_A.weight"
sys.settrace(tracer)
save_adapter(sys.argv[1], {key: torch.full((2, 8), 2.0)}, {"peft_type": "LORA", "lora_alpha": 2.0})
sys.settrace(None)
print("lines", calls)
"""


@pytest.mark.slow
def test_a_process_killed_at_any_line_leaves_one_whole_folder(tmp_path):
    """SIGKILL at lines spread over the whole of a save: the folder is always all old or all new."""
    command = [sys.executable, "-c", textwrap.dedent(KILL)]
    old, new = tmp_path / "old", tmp_path / "new"
    key = "base_model.model.up.lora_A.weight"
    save_adapter(old, {key: torch.full((2, 8), 1.0)}, {"peft_type": "LORA", "lora_alpha": 1.0})
    save_adapter(new, {key: torch.full((2, 8), 2.0)}, {"peft_type": "LORA", "lora_alpha": 2.0})
    out = tmp_path / "run" / "a"
    save_adapter(out, {key: torch.full((2, 8), 1.0)}, {"peft_type": "LORA", "lora_alpha": 1.0})
    done = subprocess.run([*command, str(out), "-1"], capture_output=True, text=True, check=True)
    lines = int(done.stdout.split()[-1])
    seen = set()
    for at in sorted({1 + i * (lines - 1) // 7 for i in range(8)}):
        save_adapter(out, {key: torch.full((2, 8), 1.0)}, {"peft_type": "LORA", "lora_alpha": 1.0})
        died = subprocess.run([*command, str(out), str(at)], capture_output=True, text=True, check=False)
        assert died.returncode == -signal.SIGKILL
        found = content(out)
        assert found in (content(old), content(new))
        seen.add(found == content(new))
    assert seen == {True, False}  # the kills fell on both sides of the commit
    save_adapter(out, {key: torch.full((2, 8), 1.0)}, {"peft_type": "LORA", "lora_alpha": 1.0})
    assert [p.name for p in out.parent.iterdir()] == ["a"]  # what the dead processes left is gone


def test_leftovers_of_living_writers_stay(tmp_path):
    mine = tmp_path / f".a.tmp-{atomic._host()}-{os.getpid()}-0123abcd"
    other = tmp_path / ".a.tmp-elsewhere-1-0123abcd"
    mine.mkdir()
    other.mkdir()
    save_adapter(tmp_path / "a", *adapter(1.0))
    assert mine.exists()
    assert other.exists()


# --- manifests --------------------------------------------------------------------------------------------------------


def test_newest_valid_passes_over_what_is_broken(tmp_path):
    for step in (5, 10, 40, 100, 200):
        save_adapter(tmp_path / f"checkpoint-{step}", *adapter(float(step)))
    assert atomic.newest_valid(tmp_path).name == "checkpoint-200"
    (tmp_path / "checkpoint-200" / atomic.MANIFEST_NAME).unlink()
    weights = tmp_path / "checkpoint-100" / SAFETENSORS_NAME
    weights.write_bytes(weights.read_bytes()[:-1])
    changed = bytearray((tmp_path / "checkpoint-40" / SAFETENSORS_NAME).read_bytes())
    changed[-1] ^= 1
    (tmp_path / "checkpoint-40" / SAFETENSORS_NAME).write_bytes(changed)
    (tmp_path / "checkpoint-x").mkdir()
    assert atomic.newest_valid(tmp_path).name == "checkpoint-10"
    (tmp_path / "checkpoint-10" / CONFIG_NAME).unlink()
    assert atomic.newest_valid(tmp_path).name == "checkpoint-5"
    (tmp_path / "checkpoint-5" / atomic.MANIFEST_NAME).write_text("{")
    assert atomic.newest_valid(tmp_path) is None
    assert atomic.newest_valid(tmp_path / "missing") is None


def test_a_manifest_cannot_point_outside(tmp_path):
    out = tmp_path / "a"
    save_adapter(out, *adapter(1.0))
    (out / atomic.MANIFEST_NAME).write_text(json.dumps({"files": {"../secret": {"bytes": 1, "sha256": ""}}}))
    with pytest.raises(AdapterFileError, match="leaves its folder"):
        atomic.verify_manifest(out)


def test_files_that_changed_since_load_with_a_warning(tmp_path):
    """PEFT may have saved into the folder since: what it holds counts, and the manifest is reported as stale."""
    save_adapter(tmp_path, *adapter(1.0))
    (tmp_path / "b").mkdir()
    save_adapter(tmp_path / "b", *adapter(2.0))
    os.replace(tmp_path / "b" / SAFETENSORS_NAME, tmp_path / SAFETENSORS_NAME)
    with pytest.warns(UserWarning, match="changed since"):
        _, state = load_adapter_file(tmp_path)
    assert float(next(iter(state.values()))[0, 0]) == 2.0


# --- state dicts ------------------------------------------------------------------------------------------------------


def test_save_takes_shared_and_strided_tensors(tmp_path):
    a = torch.randn(8, 2)
    save_adapter(tmp_path, {"a": a.t(), "b": a, "c": a[2:4], "d": a}, {"peft_type": "LORA"})
    found = load_file(tmp_path / SAFETENSORS_NAME)
    for key, value in {"a": a.t(), "b": a, "c": a[2:4], "d": a}.items():
        assert_same_bits(found[key], value.contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_comes_back(tmp_path, dtype):
    tensors = {"x": torch.randn(3, 5).to(dtype), "y": torch.randn(()).to(dtype), "z": torch.empty(0, 4, dtype=dtype)}
    save_adapter(tmp_path, tensors, {"peft_type": "LORA"})
    _, state = load_adapter_file(tmp_path)
    for key, value in tensors.items():
        assert_same_bits(state[key], value)


def test_state_dict_argument_supplies_the_values():
    model = model_with()
    full = {key: value + 1 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    state = get_peft_model_state_dict(model, state_dict=full)
    for key, value in get_peft_model_state_dict(model).items():
        assert_same_bits(state[key], value + 1)
    full.pop(next(key for key in full if "lora_A" in key))
    with pytest.raises(KeyMismatchError, match="lora_A"):
        get_peft_model_state_dict(model, state_dict=full)


def test_set_state_dict_reports_and_refuses():
    model = model_with()
    state = {key: value.clone() for key, value in get_peft_model_state_dict(model_with()).items()}
    first = next(iter(state))
    before = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    # one tensor of another size: nothing at all is changed
    with pytest.raises(RuntimeError, match="size mismatch for"):
        set_peft_model_state_dict(model, {**state, first: state[first][:1]})
    for key, value in get_peft_model_state_dict(model).items():
        assert_same_bits(value, before[key])
    with pytest.warns(UserWarning, match="another size"):
        result = set_peft_model_state_dict(model, {**state, first: state[first][:1]}, ignore_mismatched_sizes=True)
    assert len(result.missing_keys) == 1
    removed = state.pop(first)
    result = set_peft_model_state_dict(model, {**state, "base_model.model.up.lora_C.weight": removed})
    assert result.missing_keys == [first.replace(".weight", ".default.weight")]
    assert result.unexpected_keys == ["base_model.model.up.lora_C.weight"]
    # base weights in an adapter file are not let in
    result = set_peft_model_state_dict(model, {"base_model.model.up.base_layer.weight": torch.zeros(8, 8)})
    assert result.unexpected_keys == ["base_model.model.up.base_layer.weight"]


def test_low_cpu_mem_usage_fills_meta_adapters(tmp_path):
    model = model_with()
    model.save_pretrained(tmp_path)
    base = model_with().unload()
    loaded = fastpeft.PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in loaded.parameters())
    for key, value in get_peft_model_state_dict(loaded).items():
        assert_same_bits(value, get_peft_model_state_dict(model)[key])


def tiny_llama(vocab: int = 32, tie: bool = False) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tie,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_embeddings_are_saved_when_the_vocabulary_grew(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = fastpeft.get_peft_model(base, fastpeft.LoraConfig(target_modules=["q_proj"], r=2))
    assert not any("embed" in key for key in get_peft_model_state_dict(model))
    assert any("embed" in key for key in get_peft_model_state_dict(model, save_embedding_layers=True))
    base.resize_token_embeddings(40)
    with pytest.warns(UserWarning, match="resized"):
        state = get_peft_model_state_dict(model)
    names = [key for key in state if "lora" not in key]
    assert names == ["base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"]
    with pytest.warns(UserWarning, match="resized"):
        model.save_pretrained(tmp_path / "adapter")
    other = type(base).from_pretrained(tmp_path / "base")
    with pytest.raises(KeyMismatchError, match="embed_tokens"):
        fastpeft.PeftModel.from_pretrained(other, tmp_path / "adapter")
    other.resize_token_embeddings(40)
    loaded = fastpeft.PeftModel.from_pretrained(other, tmp_path / "adapter")
    ids = torch.arange(40)[None]
    assert_same_bits(loaded(ids).logits, model(ids).logits)


# --- serving ----------------------------------------------------------------------------------------------------------


def test_inspect(tmp_path):
    model_with(use_rslora=True, rank_pattern={"down": 4}, lora_dropout=0.1).save_pretrained(tmp_path)
    report = inspect_adapter(tmp_path)
    assert report.method == "LORA"
    assert report.ranks == {2: 1, 4: 1}
    assert report.scalings == {8 / 2**0.5: 1, 8 / 4**0.5: 1}
    assert report.parameters == 2 * 8 * 2 + 2 * 8 * 4
    assert report.bytes == 4 * report.parameters
    assert report.manifest == "intact"
    assert any("rank_pattern" in reason for reason in report.serving["vllm"])
    assert not any("rsLoRA" in reason for reason in report.serving["vllm"])
    assert any("rsLoRA" in reason for reason in report.serving["sglang"])
    assert json.loads(json.dumps(dict(report)))["path"] == str(tmp_path)


def test_plain_adapters_are_served_as_they_are(tmp_path):
    model_with().save_pretrained(tmp_path)
    assert inspect_adapter(tmp_path).serving == {"vllm": [], "sglang": []}


SERVED = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {"rank_pattern": {"down": 5}, "alpha_pattern": {"up": 3}},
    "all": {"use_rslora": True, "rank_pattern": {"down": 5}, "alpha_pattern": {"up": 3}},
}


@pytest.mark.parametrize("source", ["model", "folder"])
@pytest.mark.parametrize("name", SERVED)
def test_export_computes_the_same_with_plain_r_and_alpha(tmp_path, name, source):
    model = model_with(**SERVED[name])
    model.save_pretrained(tmp_path / "in")
    config = export_for_serving(model if source == "model" else tmp_path / "in", tmp_path / "out")
    report = inspect_adapter(tmp_path / "out")
    assert report.serving == {"vllm": [], "sglang": []}
    assert list(report.ranks) == [config["r"]]
    assert type(config["lora_alpha"]) is int
    assert report.scalings == {config["lora_alpha"] / config["r"]: 2}
    x = torch.randn(5, 8)
    exact = fastpeft.PeftModel.from_pretrained(model_base(model), tmp_path / "in").double()(x.double())
    served = fastpeft.PeftModel.from_pretrained(model_base(model), tmp_path / "out").eval()
    worst = (model(x).double() - exact).abs().max()  # each element is held to the largest error, not to its luck
    assert_no_worse(served(x), (exact + worst).float(), exact, exact.abs().max().expand(exact.shape))


def model_base(model: fastpeft.PeftModel) -> nn.Module:
    """The base model again, of the same weights, without the adapter."""
    up, down = nn.Linear(8, 8), nn.Linear(8, 8)
    for new, old in ((up, model.base_model.model["up"]), (down, model.base_model.model["down"])):
        new.load_state_dict(old.base_layer.state_dict())
    base = nn.ModuleDict({"up": up, "down": down})
    base.forward = lambda x: base["down"](torch.tanh(base["up"](x)))
    return base


def test_export_of_a_plain_adapter_keeps_its_bytes(tmp_path):
    model = model_with()
    export_for_serving(model, tmp_path)
    _, state = load_adapter_file(tmp_path)
    for key, value in get_peft_model_state_dict(model).items():
        assert_same_bits(state[key], value)


@pytest.mark.parametrize("options", [{"bias": "all"}, {"lora_bias": True}, {"modules_to_save": ["down"]}])
def test_export_refuses_what_servers_cannot_hold(tmp_path, options):
    model = model_with(**options)
    with pytest.raises(ValueError, match="no serving-safe form"):
        export_for_serving(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "in")
    assert inspect_adapter(tmp_path / "in").serving["vllm"] != []
