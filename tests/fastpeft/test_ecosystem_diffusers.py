"""Our layers in a model of diffusers, which finds them as it finds PEFT's: switched, scaled, fused, saved, removed."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
from peft_versions import needs_peft
from torch import Tensor, nn

from peft_kernels.testing import assert_same_bits

pytestmark = pytest.mark.ecosystem
tools = runpy.run_path(str(Path(__file__).with_name("ecosystem_tools.py")))
peft_tools = runpy.run_path(str(Path(__file__).with_name("peft_tools.py")))
unet, assert_as_good = tools["unet"], peft_tools["assert_as_good"]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"]  # linear and convolutions


def injected(library: Any, *names: str, **options: Any) -> Any:
    """A UNet with adapters of the same values for each library, in it without a wrapper."""
    model = unet()
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        config = library.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False, **options)
        library.inject_adapter_in_model(config, model, name)
    model._hf_peft_config_loaded = True
    return model.eval()


def output(model: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """dtype: of the input; the model's."""
    dtype = dtype or next(model.parameters()).dtype
    torch.manual_seed(2)
    x, context = (torch.randn(shape).to(dtype) for shape in ((2, 4, 8, 8), (2, 3, 16)))
    with torch.no_grad():
        return model(x, 5, encoder_hidden_states=context).sample


def assert_same_outputs(ours: nn.Module, theirs: nn.Module) -> Tensor:
    found = output(ours)
    assert_as_good([found], [output(theirs)], [output(copy.deepcopy(theirs).double())])
    return found


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_unets_adapters_live_as_pefts(options: dict[str, Any]) -> None:
    if options:
        needs_peft(">=0.20", "those before have the magnitudes of adapters that are not active trained as well")
    ours, theirs = models = [injected(library, "a", "b", **options) for library in (fastpeft, peft)]
    seen = [output(unet())]

    def each(name: str, *args: Any, **kwargs: Any) -> None:
        for model in models:
            getattr(model, name)(*args, **kwargs)
        seen.append(assert_same_outputs(ours, theirs))
        assert trained(ours) == trained(theirs)

    each("set_adapter", "a")
    both = ["a"] if options else ["a", "b"]  # of two DoRAs the second acts on the first's layer here (decision 26)
    each("set_adapters", both, weights=[0.5, 0.7][: len(both)])
    assert ours.active_adapters() == theirs.active_adapters() == both
    each("set_adapters", both, weights=[{"down": 0.5, "mid": 0.1, "up": 2.0}, 1.0][: len(both)])
    each("set_adapters", "b", weights=0.3)
    assert all((a - b).abs().max() > 1e-3 * a.abs().max() for a, b in zip(seen[1:], seen[:-1], strict=True))
    each("disable_lora")
    assert_same_bits(seen[-1], seen[0])
    each("enable_lora")
    each("disable_adapters")
    each("enable_adapters")
    each("fuse_lora", lora_scale=0.5)
    each("unfuse_lora")
    each("fuse_lora", safe_fusing=True, adapter_names=["b"])
    each("unfuse_lora")
    each("delete_adapters", "b")
    assert list(ours.peft_config) == ["a"]
    each("set_adapter", "a")
    each("unload_lora")
    assert_same_bits(seen[-1], seen[0])
    assert [type(m) for m in ours.modules()] == [type(m) for m in unet().modules()]


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_unets_adapter_is_saved_and_loaded(tmp_path: Path) -> None:
    ours, theirs = (injected(library, "a") for library in (fastpeft, peft))
    for model, name in ((ours, "ours"), (theirs, "theirs")):
        model.save_lora_adapter(tmp_path / name, adapter_name="a")
    from safetensors.torch import load_file

    files = [load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    for key, value in files[1].items():
        assert_same_bits(files[0][key], value)
    needs_peft(">=0.21", "the file has a configuration of the newest, which diffusers gives it as it is")
    loaded = unet().eval()
    name = "pytorch_lora_weights.safetensors"
    loaded.load_lora_adapter(tmp_path / "ours", weight_name=name, adapter_name="a", prefix=None)
    assert_as_good([output(loaded)], [output(theirs)], [output(copy.deepcopy(theirs).double())])


def test_weights_are_stored_in_eight_bits_but_for_our_adapters() -> None:
    """`enable_layerwise_casting` passes over adapters, and has the layers take their input as it is."""
    models = [injected(library, "a") for library in (fastpeft, peft)]
    for model in models:
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    dtypes = [{name: parameter.dtype for name, parameter in model.named_parameters()} for model in models]
    assert dtypes[0] == dtypes[1]
    assert {*dtypes[0].values()} == {torch.float32, torch.float8_e4m3fn}
    exact = injected(peft, "a").double()
    for name, parameter in exact.named_parameters():
        parameter.data = parameter.data.to(dtypes[0][name]).double()
    ours, theirs = (output(model, torch.float32) for model in models)
    assert_as_good([ours], [theirs], [output(exact)])


def test_diffusers_takes_our_configuration() -> None:
    made = []
    for library in (fastpeft, peft):
        model = unet()
        torch.manual_seed(1)
        model.add_adapter(library.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False), "a")
        made.append(output(model.eval()))
    assert_same_bits(*made)
    assert not torch.equal(made[0], output(unet()))


def test_pipelines_unwrap_our_models() -> None:
    from diffusers.pipelines.pipeline_loading_utils import _unwrap_model

    base = unet()
    assert _unwrap_model(fastpeft.get_peft_model(base, fastpeft.LoraConfig(target_modules=TARGETS))) is base
