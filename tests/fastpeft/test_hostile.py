"""Hostile and broken adapter files: a clear error in under a second, and the model as it was, to the bit."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fastpeft
import pytest
import torch
from fastpeft import safety
from fastpeft.checkpoint import CONFIG_NAME, PICKLE_NAME, SAFETENSORS_NAME, load_adapter_file
from fastpeft.safety import AdapterFileError, check_adapter_name, path_inside, read_header
from safetensors.torch import load_file, save_file
from torch import nn

SECONDS = 1.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}) for _ in range(3)]
        )
        self.emb = nn.Embedding(10, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.emb(ids)
        for layer in self.layers:
            h = h + layer["down"](torch.tanh(layer["up"](h)))
        return h


CONFIG = {"target_modules": ["up", "down", "emb"], "r": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound adapter. Loading it once also pays for what is imported on first use."""
    folder = tmp_path_factory.mktemp("good")
    model = fastpeft.get_peft_model(Net(), fastpeft.LoraConfig(**CONFIG))
    model.save_pretrained(folder)
    fastpeft.PeftModel.from_pretrained(Net(), folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "a")
    (tmp_path / "a" / "fastpeft_manifest.json").unlink()
    return tmp_path / "a"


def snapshot(model: nn.Module) -> Any:
    """Everything that a failed load could have changed: modules by identity, tensors by bytes, flags."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        {name: (id(module), type(module), module.training) for name, module in model.named_modules()},
        {name: (id(t), t.requires_grad, t.detach().clone().numpy().tobytes()) for name, t in tensors.items()},
        copy.deepcopy({k: v.to_dict() for k, v in getattr(model, "peft_config", {}).items()}),
        list(getattr(model, "active_adapters", [])),
    )


@contextmanager
def quick() -> Iterator[None]:
    """Processor time, of this process and of those it started: on a busy machine the clock says little."""
    begin = sum(os.times()[:4])
    yield
    seconds = sum(os.times()[:4]) - begin
    assert seconds < SECONDS, f"took {seconds:.2f} s of processor time"


ERRORS = (ValueError, TypeError, OSError, NotImplementedError)


def refuse(folder: Path, message: str, **options: Any) -> None:
    """The folder must be refused by from_pretrained and by load_adapter, whatever is in the model already."""
    fresh = Net()
    before = snapshot(fresh)
    with quick(), pytest.raises(ERRORS, match=message):
        fastpeft.PeftModel.from_pretrained(fresh, folder, **options)
    assert snapshot(fresh) == before
    model = fastpeft.get_peft_model(Net(), fastpeft.LoraConfig(target_modules=["up"], r=2))
    before = snapshot(model)
    with quick(), pytest.raises(ERRORS, match=message):
        model.load_adapter(folder, "other", **options)
    assert snapshot(model) == before
    assert model(torch.arange(10)).isfinite().all()


# --- the configuration ------------------------------------------------------------------------------------------------


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BAD_VALUES = {
    "huge_rank": ({"r": 10**7}, "r = 10000000"),
    "rank_larger_than_the_file": ({"r": 60000}, "size mismatch"),
    "negative_rank": ({"r": -4}, "r = -4"),
    "zero_rank": ({"r": 0}, "r = 0"),
    "text_rank": ({"r": "4"}, "r = '4'"),
    "true_rank": ({"r": True}, "r = True"),
    "half_rank": ({"r": 2.5}, "r = 2.5"),
    "list_rank": ({"r": [4]}, r"r = \[4\]"),
    "huge_alpha": ({"lora_alpha": 1e308}, "lora_alpha"),
    "huge_integer_alpha": ({"lora_alpha": 10**30}, "lora_alpha|number"),
    "text_alpha": ({"lora_alpha": "16"}, "lora_alpha"),
    "huge_rank_pattern": ({"rank_pattern": {"up": 10**7}}, "rank_pattern"),
    "wrong_rank_pattern": ({"rank_pattern": {"up": 3}}, "size mismatch"),
    "rank_pattern_list": ({"rank_pattern": [3]}, "rank_pattern"),
    "huge_alpha_pattern": ({"alpha_pattern": {"up": 1e300}}, "alpha_pattern"),
    "dropout": ({"lora_dropout": 1.5}, "lora_dropout"),
    "no_method": ({"peft_type": None}, "peft_type"),
    "unknown_method": ({"peft_type": "os.system"}, "os.system"),
    "unknown_task": ({"task_type": "ROOT"}, "ROOT"),
    "unknown_bias": ({"bias": "everything"}, "everything"),
    "no_such_module": ({"target_modules": ["q_proj"]}, "q_proj"),
    "fewer_modules_than_the_file": ({"target_modules": ["up"]}, "unexpected"),
    "more_modules_than_the_file": ({"modules_to_save": ["layers.2.up"]}, "missing|cannot|unexpected"),
    "trained_biases_are_missing": ({"bias": "lora_only"}, "missing.*bias"),
    "long_pattern": ({"target_modules": "a" * 5000}, "at most"),
    "long_suffix": ({"target_modules": ["a" * 5000]}, "at most"),
    "many_patterns": ({"rank_pattern": {f"x{i}": 4 for i in range(5000)}}, "entries"),
    "target_number": ({"target_modules": 7}, "target_modules must be"),
    "broken_regex": ({"target_modules": "(up"}, "regular expression"),
    "deep": ({"loftq_config": json.loads("[" * 40 + "]" * 40)}, "nested"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_values(folder, name):
    changes, message = BAD_VALUES[name]
    change_config(folder, **changes)
    refuse(folder, message)


CATASTROPHES = {
    "target": {"target_modules": "(.*.*)*x!"},
    "nested": {"target_modules": r"((l|a|y|e|r|s|\.|\d|u|p)+)+!"},
    "exclude": {"exclude_modules": r"(.*.*)*x!"},
    "rank_pattern": {"rank_pattern": {"(.*.*.*)*x!": 4}},
    "layers_pattern": {"layers_to_transform": [0], "layers_pattern": ["(.*.*)*x!"]},
    "many_patterns": {"rank_pattern": {rf"(a|b|.)*(.*)*x{i}!": 4 for i in range(60)}},
    "back_reference": {"target_modules": r"(.*)(.*)(.*)(.*)\1\2\3\4(.*)*!"},
}


@pytest.mark.parametrize("name", CATASTROPHES)
def test_catastrophic_patterns(folder, name):
    """Either the pattern is decided in time or it is refused; the rest of the file cannot be right then."""
    change_config(folder, **CATASTROPHES[name])
    refuse_or_load(folder)


def refuse_or_load(folder: Path) -> None:
    model = Net()
    before = snapshot(model)
    with quick():
        try:
            fastpeft.PeftModel.from_pretrained(model, folder)
            failed = False
        except ERRORS:
            failed = True
    if failed:
        assert snapshot(model) == before


BAD_JSON = {
    "empty": (b"", "not valid json"),
    "list": (b"[]", "expected a json object"),
    "binary": (bytes(range(256)), "not valid json"),
    "nan": (b'{"peft_type": "LORA", "lora_alpha": NaN}', "NaN"),
    "infinity": (b'{"peft_type": "LORA", "lora_alpha": -Infinity}', "Infinity"),
    "exponent": (b'{"peft_type": "LORA", "lora_alpha": 1e999}', "lora_alpha|number"),
    "twice": (b'{"peft_type": "LORA", "r": 4, "r": 8}', "twice"),
    "nested": (b'{"peft_type": "LORA", "x": ' + b"[" * 100000 + b"]" * 100000 + b"}", "not valid json|nested"),
    "digits": (b'{"peft_type": "LORA", "r": ' + b"9" * 100000 + b"}", "not valid json|expected"),
    "large": (b'{"x": "' + b"x" * (5 << 20) + b'"}', "too large"),
    "text": (b'{"peft_type": "LORA", "revision": "' + b"x" * 100000 + b'"}', "characters"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json(folder, name):
    data, message = BAD_JSON[name]
    (folder / CONFIG_NAME).write_bytes(data)
    refuse(folder, message)


def test_unknown_fields_are_dropped_with_a_warning(folder):
    change_config(folder, from_the_future={"a": [1, 2]})
    with pytest.warns(UserWarning, match="from_the_future"):
        fastpeft.PeftModel.from_pretrained(Net(), folder)


def test_nothing_named_in_a_configuration_is_imported(folder, tmp_path, monkeypatch):
    (tmp_path / "evil_library.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    change_config(
        folder,
        auto_mapping={"base_model_class": "Evil", "parent_library": "evil_library"},
        megatron_core="evil_library",
        base_model_name_or_path=str(tmp_path),
    )
    fastpeft.PeftModel.from_pretrained(Net(), folder)
    assert "evil_library" not in sys.modules
    with pytest.raises(Exception):  # noqa: B017, PT011 (whatever the reason, nothing is imported)
        fastpeft.AutoPeftModel.from_pretrained(folder)
    assert "evil_library" not in sys.modules


# --- the tensors ------------------------------------------------------------------------------------------------------


def write_raw(path: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


RAW = {
    "empty": (None, b"", "shorter than"),
    "seven_bytes": (None, b"1234567", "shorter than"),
    "only_a_length": (None, (50).to_bytes(8, "little"), "truncated"),
    "huge_header": (None, (1 << 62).to_bytes(8, "little") + b"{}", "its header claims"),
    "header_over_the_limit": (None, (safety.MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "the limit is"),
    "not_json": (b"\xff\xfe{}", b"", "not valid json"),
    "list": ([], b"", "expected a json object"),
    "nested": (b'{"a":' + b"[" * 50000, b"", "not valid json"),
    "twice": (b'{"a":{"dtype":"F32"},"a":{"dtype":"F32"}}', b"1234", "twice"),
    "millions": (b'{"a":[' + b"{}," * 1000000 + b"0]}", b"", "more than"),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"0" * 12, "overlaps"),
    "same_place": ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, b"0" * 8, "overlaps"),
    "gap": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"0" * 12, "gap"),
    "late_start": ({"a": entry([1], 4, 8)}, b"0" * 8, "gap"),
    "left_over": ({"a": entry([1], 0, 4)}, b"0" * 400, "the file has"),
    "past_the_end": ({"a": entry([100], 0, 400)}, b"0" * 4, "the file has"),
    "reversed": ({"a": entry([1], 4, 0)}, b"0" * 4, "offsets"),
    "negative": ({"a": entry([1], -4, 0)}, b"0" * 4, "data_offsets"),
    "wrong_size": ({"a": entry([3], 0, 4)}, b"0" * 4, "needs 12 bytes"),
    "overflow": ({"a": entry([1 << 62, 1 << 62, 4], 0, 0)}, b"", "needs"),
    "negative_shape": ({"a": entry([-1, -1], 0, 4)}, b"0" * 4, "shape"),
    "float_shape": ({"a": entry([1.0], 0, 4)}, b"0" * 4, "shape"),
    "bool_shape": ({"a": entry([True], 0, 4)}, b"0" * 4, "shape"),
    "many_dims": ({"a": entry([1] * 1000, 0, 4)}, b"0" * 4, "shape"),
    "no_shape": ({"a": {"dtype": "F32"}}, b"", "expected dtype"),
    "entry_text": ({"a": "b"}, b"", "expected dtype"),
    "dtype": ({"a": entry([1], 0, 4, "PICKLE")}, b"0" * 4, "unknown dtype"),
    "dtype_list": ({"a": entry([1], 0, 4, ["F32"])}, b"0" * 4, "unknown dtype"),
    "metadata": ({"__metadata__": {"a": {"b": 1}}}, b"", "__metadata__"),
    "nothing": ({}, b"", "missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", RAW)
def test_bad_headers(folder, name):
    header, data, message = RAW[name]
    path = folder / SAFETENSORS_NAME
    if header is None:
        path.write_bytes(data)
    else:
        write_raw(path, header, data)
    refuse(folder, message)


@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_truncated_files(folder, part):
    path = folder / SAFETENSORS_NAME
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    refuse(folder, "truncated")


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / SAFETENSORS_NAME)
    change(tensors)
    save_file(tensors, folder / SAFETENSORS_NAME)


KEY = "base_model.model.layers.1.up.lora_A.weight"


def poison(value: float, dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[KEY] = tensors[KEY].to(dtype)
        tensors[KEY][1, 2] = value

    return change


BAD_TENSORS = {
    "nan": (poison(float("nan"), torch.float32), "NaN or infinite values in .*layers.1.up"),
    "inf": (poison(float("inf"), torch.float32), "NaN or infinite"),
    "minus_inf_half": (poison(float("-inf"), torch.float16), "NaN or infinite"),
    "nan_bfloat16": (poison(float("nan"), torch.bfloat16), "NaN or infinite"),
    "both_infinities": (lambda t: t[KEY].view(-1)[:2].copy_(torch.tensor([float("inf"), float("-inf")])), "NaN or inf"),
    "missing": (lambda t: t.pop(KEY), "missing: " + KEY),
    "extra": (lambda t: t.update({"base_model.model.layers.9.up.lora_A.weight": torch.zeros(4, 8)}), "unexpected"),
    "extra_kind": (lambda t: t.update({KEY.replace("lora_A", "lora_C"): torch.zeros(4, 8)}), "unexpected.*lora_C"),
    "base_weight": (lambda t: t.update({"base_model.model.layers.1.up.weight": torch.zeros(12, 8)}), "unexpected"),
    "base_layer": (lambda t: t.update({KEY.replace("lora_A", "base_layer"): torch.zeros(12, 8)}), "unexpected"),
    "path": (lambda t: t.update({"../../etc/passwd": torch.zeros(1)}), "unexpected"),
    "transposed": (lambda t: t.update({KEY: t[KEY].t().contiguous()}), "size mismatch"),
    "rank": (lambda t: t.update({KEY: torch.zeros(5, 8)}), "size mismatch"),
    "flat": (lambda t: t.update({KEY: t[KEY].reshape(-1)}), "size mismatch"),
    "integers": (lambda t: t.update({KEY: t[KEY].to(torch.int32)}), "not floating-point"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors(folder, name):
    change, message = BAD_TENSORS[name]
    change_tensors(folder, change)
    refuse(folder, message)


def test_an_error_names_few_of_many_keys(folder):
    change_tensors(folder, lambda t: t.update({f"x.{i}": torch.zeros(1) for i in range(5000)}))
    with pytest.raises(AdapterFileError) as caught:
        fastpeft.PeftModel.from_pretrained(Net(), folder)
    assert "4992 more" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_sums_that_overflow_are_not_taken_for_infinite(folder):
    large = torch.finfo(torch.float64).max
    change_tensors(folder, lambda t: t.update({KEY: torch.full((4, 8), large, dtype=torch.float64)}))
    _, state = load_adapter_file(folder)
    assert state[KEY].isfinite().all()


# --- files, paths and names -------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def test_pickles_are_refused_and_never_run(folder, tmp_path):
    mark = tmp_path / "exploded"
    (folder / SAFETENSORS_NAME).unlink()
    torch.save({KEY: Bomb(mark)}, folder / PICKLE_NAME)
    refuse(folder, "allow_pickle")
    refuse(folder, "not a file of tensors", allow_pickle=True)
    (folder / PICKLE_NAME).write_bytes(pickle.dumps(Bomb(mark)))
    refuse(folder, "not a file of tensors", allow_pickle=True)
    assert not mark.exists()


def test_an_honest_pickle_loads_when_asked(folder):
    tensors = load_file(folder / SAFETENSORS_NAME)
    (folder / SAFETENSORS_NAME).unlink()
    torch.save(tensors, folder / PICKLE_NAME)
    refuse(folder, "allow_pickle")
    model = fastpeft.PeftModel.from_pretrained(Net(), folder, allow_pickle=True)
    assert torch.equal(fastpeft.get_peft_model_state_dict(model)[KEY], tensors[KEY])


def test_pickles_that_claim_more_than_they_hold(folder):
    tensors = load_file(folder / SAFETENSORS_NAME)
    (folder / SAFETENSORS_NAME).unlink()
    tensors[KEY] = torch.zeros(1).expand(1 << 20, 1 << 20)
    torch.save(tensors, folder / PICKLE_NAME)
    refuse(folder, "claim more", allow_pickle=True)
    torch.save([1, 2], folder / PICKLE_NAME)
    refuse(folder, "dictionary of tensors", allow_pickle=True)


def test_pipes_and_devices_are_not_read(folder):
    for name in (SAFETENSORS_NAME, CONFIG_NAME):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refuse(folder, "not a regular file|Can't find")
    (folder / CONFIG_NAME).unlink()
    (folder / CONFIG_NAME).symlink_to("/dev/zero")
    refuse(folder, "not a regular file|Can't find")
    (folder / CONFIG_NAME).unlink()
    (folder / CONFIG_NAME).mkdir()
    refuse(folder, "not a regular file|Can't find")


@pytest.mark.parametrize("missing", [CONFIG_NAME, SAFETENSORS_NAME])
def test_missing_files(folder, missing):
    (folder / missing).unlink()
    refuse(folder, missing)


@pytest.mark.parametrize("subfolder", ["..", "../a", "x/../../a", "/etc", "link"])
def test_subfolders_stay_inside(folder, subfolder):
    inner = folder / "inner"
    shutil.copytree(folder, inner)
    (inner / "link").symlink_to(folder.parent)
    refuse(inner, "leaves its folder", subfolder=subfolder)


@pytest.mark.parametrize("name", ["no/such/folder", "../x", "", "a" * 5000, "-x/y", "x/..", "C:\\x"])
def test_names_that_are_no_folder(name):
    model = Net()
    before = snapshot(model)
    with quick(), pytest.raises(ERRORS):
        fastpeft.PeftModel.from_pretrained(model, name)
    assert snapshot(model) == before


def test_a_file_is_no_folder(folder):
    refuse(folder / SAFETENSORS_NAME, "folder was expected|neither|Can't find")


NAMES = ["default/x", "../x", "a.b", "", "x" * 65, "a b", "ä", "a\n", "a\0", ".", "..", "/", "a/", 7, None, b"a"]


@pytest.mark.parametrize("name", NAMES)
def test_adapter_names_with_anything_else_in_them(folder, name):
    with pytest.raises(AdapterFileError, match="adapter name"):
        check_adapter_name(name)
    model = Net()
    before = snapshot(model)
    with pytest.raises((AdapterFileError, TypeError)):
        fastpeft.PeftModel.from_pretrained(model, folder, adapter_name=name)
    assert snapshot(model) == before
    with pytest.raises((AdapterFileError, TypeError)):
        fastpeft.get_peft_model(model, fastpeft.LoraConfig(**CONFIG), adapter_name=name)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["a", "train", "keys", "weight", "_modules", "x" * 64, "0", "-", "__init__", "A-b_9"])
def test_every_permitted_adapter_name_works(folder, name, tmp_path):
    model = fastpeft.PeftModel.from_pretrained(Net(), folder, adapter_name=name)
    model.save_pretrained(tmp_path / "out")
    expected = load_file(folder / SAFETENSORS_NAME)
    found = load_file(tmp_path / "out" / name / SAFETENSORS_NAME)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_path_inside(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "out").symlink_to(tmp_path)
    assert path_inside(tmp_path / "in", "x") == tmp_path / "in" / "x"
    for bad in ("..", "../in2", "out", "out/x", "/", "x/../.."):
        with pytest.raises(AdapterFileError):
            path_inside(tmp_path / "in", bad)


def test_a_large_honest_header_is_quick(tmp_path):
    """46 thousand tensors: LoRA on every expert of a large mixture."""
    names = [f"base_model.model.model.layers.{i // 768}.mlp.experts.{i % 768}.x.lora_A.weight" for i in range(46080)]
    header = {name: entry([1], 4 * i, 4 * i + 4) for i, name in enumerate(names)}
    write_raw(tmp_path / "x", header, b"0" * (4 * len(names)))
    with quick():
        assert len(read_header(tmp_path / "x").tensors) == len(names)
