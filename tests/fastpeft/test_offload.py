"""accelerate's offloading to the host's memory and to disk: outputs, gradients, merging, saving and loading of adapted
models whose tensors a hook brings, beside the same model that has them."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path
from typing import Any

import fastpeft
import pytest
import torch
from forms import matrix
from safetensors.torch import load_file

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("peft")
assert_equal = runpy.run_path(str(Path(__file__).with_name("peft_tools.py")))["assert_equal"]
tools = runpy.run_path(str(Path(__file__).with_name("sharing_tools.py")))
make, IDS, CASES, Net = tools["make"], tools["IDS"], tools["CASES"], tools["Net"]
BIASED = [case for case, (_, options) in CASES.items() if options.get("bias")]
NOT_MERGED = ("LilyConfig", "BeftConfig", "arrow", "xlora")  # they have no merged form, or the layer no bias for it
# PVeRA draws its noise from the generator.
EVERY = [case for case in CASES if case != "PveraConfig"]


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)


def offload(model: Any, way: str, folder: Path, buffers: bool = False) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if way == "cpu":
            return accelerate.cpu_offload(model, execution_device="cpu")
        if way == "disk":
            return accelerate.disk_offload(model, folder / "disk", execution_device="cpu", offload_buffers=buffers)
        places = {"embed": "cpu", "layers.0": "disk", "layers.1": "cpu", "lm_head": "disk"}
        return accelerate.dispatch_model(model, places, offload_dir=folder / "places", force_hooks=True)


@pytest.mark.parametrize(
    ("case", "way"),
    matrix(
        [(case, way) for case in EVERY for way in ("cpu", "disk")],
        [("all", "cpu"), ("dora", "disk"), ("OFTConfig", "cpu"), ("arrow", "disk"), ("xlora", "cpu")],
    ),
)
def test_an_offloaded_model_computes_merges_and_is_saved(case: str, way: str, tmp_path: Path) -> None:
    here, model = make(fastpeft, case).eval(), make(fastpeft, case).eval()
    wanted = output(here)
    state = {key: tensor.clone() for key, tensor in fastpeft.get_peft_model_state_dict(here).items()}
    offload(model, way, tmp_path, buffers=case != "FrodConfig")  # accelerate looks for its V under every layer
    assert any(p.is_meta for p in model.parameters())
    assert_equal(output(model), wanted)
    model.save_pretrained(tmp_path / "saved")
    assert_equal(load_file(tmp_path / "saved/adapter_model.safetensors"), state)
    if case not in NOT_MERGED:
        model.merge_adapter()
        assert_equal(output(model), wanted)
        model.unmerge_adapter()
        assert_equal(output(model), wanted)
        assert any(p.is_meta for p in model.parameters())
    other = {key: t * -0.5 if t.is_floating_point() else t for key, t in state.items()}
    for each in (here, model):
        fastpeft.set_peft_model_state_dict(each, other)
    assert_equal(fastpeft.get_peft_model_state_dict(model), other)
    assert_equal(output(model), output(here))
    fastpeft.set_peft_model_state_dict(model, state)
    assert_equal(output(model), wanted)
    if case not in NOT_MERGED:
        assert_equal(output(model.merge_and_unload()), wanted)


# Arrow's is several, X-LoRA's for another base.
@pytest.mark.parametrize("case", matrix([case for case in EVERY if case not in ("arrow", "xlora")], ["head", "all"]))
def test_an_adapter_on_an_offloaded_base(case: str, tmp_path: Path) -> None:
    here = make(fastpeft, case).eval()
    here.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(0)
    base = offload(Net().eval(), "places", tmp_path)
    options = {"device_map": "auto", "offload_folder": tmp_path / "more"}
    load = fastpeft.PeftModel.from_pretrained
    if case in BIASED:
        with pytest.raises(ValueError, match="Load the base model without offloading"):
            load(base, tmp_path / "adapter", is_trainable=True, **options)
        assert not any(isinstance(m, fastpeft.PeftModel) or hasattr(m, "peft_config") for m in base.modules())
    model = load(base, tmp_path / "adapter", is_trainable=case not in BIASED, **options).eval()
    assert_equal(output(model), output(here))
    if case in BIASED:
        return
    for each in (here, model):
        each(IDS).square().mean().backward()
    wanted = {n: p.grad for n, p in here.named_parameters() if p.grad is not None}
    assert_equal({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, wanted)
