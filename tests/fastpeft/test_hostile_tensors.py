"""Tensor files that are broken or hostile: a clear error in under a second, the model as it was."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import fastpeft
import pytest
import torch
from fastpeft.files.checks import AdapterFileError
from fastpeft.files.safetensors import MAX_HEADER_BYTES
from fastpeft.saving.folder import SAFETENSORS_NAME, load_adapter_file
from safetensors.torch import load_file, save_file

tools = runpy.run_path(str(Path(__file__).with_name("hostile_tools.py")))
good = tools["good"]
folder = tools["folder"]
KEY = tools["KEY"]
Net = tools["Net"]
entry = tools["entry"]
refuse = tools["refuse"]
write_raw = tools["write_raw"]


RAW = {
    "empty": (None, b"", "header too small"),
    "seven_bytes": (None, b"1234567", "claims more than"),
    "only_a_length": (None, (50).to_bytes(8, "little"), "truncated"),
    "huge_header": (None, (1 << 62).to_bytes(8, "little") + b"{}", "claims more than"),
    "header_over_the_limit": (None, (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "claims more than"),
    "not_json": (b"\xff\xfe{}", b"", "invalid UTF-8"),
    "list": ([], b"", "invalid type: sequence"),
    "nested": (b'{"a":' + b"[" * 50000, b"", "recursion limit"),
    "twice": (b'{"a":%b,"a":%b}' % ((json.dumps(entry([1], 0, 4)).encode(),) * 2), b"1234", "twice"),
    "millions": (b'{"a":[' + b"{}," * 1000000 + b"0]}", b"", "more than"),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"0" * 12, "invalid offset for tensor `b`"),
    "same_place": ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, b"0" * 8, "invalid offset"),
    "gap": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"0" * 12, "invalid offset for tensor `b`"),
    "late_start": ({"a": entry([1], 4, 8)}, b"0" * 8, "invalid offset"),
    "left_over": ({"a": entry([1], 0, 4)}, b"0" * 400, "not fully covered"),
    "past_the_end": ({"a": entry([100], 0, 400)}, b"0" * 4, "not fully covered"),
    "reversed": ({"a": entry([1], 4, 0)}, b"0" * 4, "invalid offset"),
    "negative": ({"a": entry([1], -4, 0)}, b"0" * 4, "integer `-4`"),
    "wrong_size": ({"a": entry([3], 0, 4)}, b"0" * 4, "invalid shape"),
    "overflow": ({"a": entry([1 << 62, 1 << 62, 4], 0, 0)}, b"", "overflow"),
    "huge_and_empty": ({"a": entry([1 << 63, 0], 0, 0)}, b"", "shape"),
    "huge_together_and_empty": ({"a": entry([1 << 40, 1 << 23, 0], 0, 0)}, b"", "shape"),
    "negative_shape": ({"a": entry([-1, -1], 0, 4)}, b"0" * 4, "integer `-1`"),
    "float_shape": ({"a": entry([1.0], 0, 4)}, b"0" * 4, "floating point"),
    "bool_shape": ({"a": entry([True], 0, 4)}, b"0" * 4, "boolean"),
    "many_dims": ({"a": entry([1] * 1000, 0, 4)}, b"0" * 4, "shape"),
    "no_shape": ({"a": {"dtype": "F32"}}, b"", "missing field `shape`"),
    "entry_text": ({"a": "b"}, b"", "expected struct TensorInfo"),
    "dtype": ({"a": entry([1], 0, 4, "PICKLE")}, b"0" * 4, "unknown variant `PICKLE`"),
    "dtype_of_half_bytes": ({"a": entry([2], 0, 1, "F4")}, b"0", "F4 of shape .* expected"),
    "dtype_list": ({"a": entry([1], 0, 4, ["F32"])}, b"0" * 4, "invalid type: sequence"),
    "metadata": ({"__metadata__": {"a": {"b": 1}}}, b"", "expected a string"),
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
