"""The life of an adapter, for every method and variant: it is added, switched, mixed, merged, trained, saved, loaded.

What a method computes, the laws say (test_laws.py); here is what happens to its tensors in a model.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import pickle
import runpy
import time
import warnings
from pathlib import Path
from typing import Any

import fastpeft
import pytest
import torch
from fastpeft.checkpoint import CONFIG_NAME, SAFETENSORS_NAME
from fastpeft.config import PeftType
from fastpeft.layer import AdapterLayer
from fastpeft.method import get_method
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from peft_kernels.testing import assert_no_worse, assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("kind_tools.py")))
IDS = torch.arange(24).view(4, 6) % 31

pytestmark = pytest.mark.filterwarnings("ignore::fastpeft.config.PeftWarning", "ignore::UserWarning")


class Tiny(nn.Module):
    """Layers of the sizes of the sample bases. Names begin with their kind: some configurations choose by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 24)
        self.linear = nn.Linear(24, 20)
        self.linear_back = nn.Linear(20, 24)
        self.norm = nn.LayerNorm(24)
        self.checkpointing = False
        self.config = PretrainedConfig()

    def prepare_inputs_for_generation(self) -> None:
        """PEFT asks for it in a causal language model."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        h = self.embedding(input_ids)
        if self.checkpointing and self.training:
            return checkpoint(self.block, h, use_reentrant=False)
        return self.block(h)

    def block(self, h: Tensor) -> Tensor:
        return self.norm(h + self.linear_back(torch.tanh(self.linear(h))))


def tiny(dtype: torch.dtype = torch.float32) -> Tiny:
    torch.manual_seed(0)
    return Tiny().to(dtype).eval()


# Where a kind can go, the first that it can; the rest of the test cases are embeddings.
PLACES = {"linear": ["linear", "linear_back"], "embedding": ["embedding"], "norm": ["norm"]}


@functools.cache
def accepts(kind: Any, place: str) -> bool:
    try:
        fastpeft.get_peft_model(tiny(), kind.config(target_modules=PLACES[place]))
    except ValueError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Case:
    kind: Any
    place: str

    def __repr__(self) -> str:
        return f"{self.kind}-{self.place}"

    def config(self, **more: Any) -> Any:
        return self.kind.config(target_modules=PLACES[self.place], **more)

    def model(self, seed: int = 1, name: str = "default", dtype: torch.dtype = torch.float32) -> Any:
        """A model with one adapter that does something."""
        model = fastpeft.get_peft_model(tiny(dtype), self.config(), name)
        return scatter(model, name, seed).eval()

    @property
    def merges(self) -> bool:
        layer = layers_of(self.model())[0]
        return layer.methods["default"].mergeable_in(layer.view("default"), layer.info) is None


def scatter(model: nn.Module, name: str, seed: int) -> Any:
    """Other values for an adapter's parameters."""
    torch.manual_seed(seed)
    found = [p for key, p in model.named_parameters() if name in key.split(".") and p.is_floating_point()]
    assert found
    with torch.no_grad():
        for parameter in found:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def layers_of(model: nn.Module) -> list[AdapterLayer]:
    return [m for m in model.modules() if isinstance(m, AdapterLayer)]


KINDS = tools["kinds"]()
CASES = [Case(k, p) for k in KINDS for p in PLACES if accepts(k, p) and (p != "norm" or not accepts(k, "linear"))]
every = pytest.mark.parametrize("case", CASES, ids=repr)
# On linear layers, or where it goes if it does not go there.
MAIN = list({id(case.kind): case for case in reversed(CASES)}.values())[::-1]
main = pytest.mark.parametrize("case", MAIN, ids=repr)
LORA = Case(next(k for k in KINDS if k.method.peft_type == PeftType.LORA), "linear")


def run(model: nn.Module, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **kwargs)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert_same_bits(after[key], value)


def assert_close(a: Tensor, b: Tensor, exact: Tensor) -> None:
    """Both are as near to the exact result as float32 allows: neither errs more than the other by more than that."""
    size = exact.abs().max().expand(exact.shape)
    for one, other in ((a, b), (b, a)):
        worst = (other.double() - exact).abs().max()
        assert_no_worse(one, (exact + worst).to(one.dtype), exact, size)


def exactly(model: Any) -> Tensor:
    return run(copy.deepcopy(model).double())


def test_every_method_is_here() -> None:
    from fastpeft.method import registry

    assert {case.kind.method.peft_type for case in CASES} == set(registry())


@every
def test_switching_disabling_and_deleting(case: Case) -> None:
    base = run(tiny())
    model = case.model(name="a")
    first = run(model)
    assert not torch.equal(first, base)
    with model.disable_adapter():
        disabled = run(model)
    assert_same_bits(run(model), first)

    model.add_adapter("b", case.config())
    assert not any(m.training for layer in layers_of(model) for m in layer.modules() if type(m) is nn.Dropout)
    scatter(model, "b", 2)
    other = next(c for c in (LORA, *MAIN) if c.kind.method is not case.kind.method)
    model.add_adapter("c", other.config())
    scatter(model, "c", 3)
    assert_same_bits(run(model), first)
    model.set_adapter("b")
    assert not torch.equal(run(model), first)
    model.set_adapter("c")
    assert not torch.equal(run(model), first)
    model.set_adapter("a")
    assert_same_bits(run(model), first)

    model.delete_adapter("b")
    model.delete_adapter("c")
    assert not [key for key in model.state_dict() if ".b." in key or key.endswith((".b", ".c")) or ".c." in key]
    assert_same_bits(run(model), first)
    model.base_model.disable_adapter_layers()
    assert_same_bits(run(model), disabled)
    model.base_model.enable_adapter_layers()
    assert_same_bits(run(model), first)
    assert_same_bits(run(model.unload()), base)


@every
def test_only_active_adapters_train(case: Case) -> None:
    model = case.model(name="a")
    model.add_adapter("b", case.config())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(n.endswith(".a") or ".a." in n for n in trained)
    model.set_requires_grad("a", False)
    assert not [n for n, p in model.named_parameters() if p.requires_grad]
    model.set_requires_grad("a")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    model.set_adapter("b", inference_mode=True)
    assert not [n for n, p in model.named_parameters() if p.requires_grad]


@every
def test_each_row_of_a_batch_has_its_own_adapter(case: Case) -> None:
    model = case.model(name="a")
    model.add_adapter("b", case.config())
    scatter(model, "b", 2)
    rows = ["b", "__base__", "a", "b"]
    mixed = run(model, adapter_names=rows)
    wide = copy.deepcopy(model).double()
    for name in ("a", "b", "__base__"):
        own = [i for i, row in enumerate(rows) if row == name]
        alone = []
        for each in (model, wide):
            if name == "__base__":
                with each.disable_adapter():
                    alone.append(run(each, IDS[own]))
            else:
                each.set_adapter(name)
                alone.append(run(each, IDS[own]))
        assert_close(mixed[own], *alone)


@every
def test_merging_and_taking_back(case: Case) -> None:
    model = case.model()
    before, output, exact = state_of(model), run(model), exactly(model)
    if not case.merges:
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="cannot be merged"):
                merge()
        assert_same_state(model, before)
        return
    model.merge_adapter(safe_merge=True)
    assert_close(run(model), output, exact)
    model.unmerge_adapter()
    assert_same_state(model, before)
    assert_same_bits(run(model), output)
    merged = copy.deepcopy(model).merge_and_unload()
    assert not layers_of(merged)
    assert merged.state_dict().keys() >= tiny().state_dict().keys()
    assert_close(run(merged), output, exact)


@every
def test_a_safe_merge_of_a_broken_adapter_changes_nothing(case: Case) -> None:
    model = case.model()
    if not case.merges:
        pytest.skip("it has no merged form")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "default" in key.split("."):
                parameter.fill_(float("nan"))
    before = state_of(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaN"):
            merge(safe_merge=True)
        assert_same_state(model, before)
        assert all(not layer.merged_adapters for layer in layers_of(model))


@every
def test_a_saved_adapter_computes_the_same_bits(case: Case, tmp_path: Path) -> None:
    model = case.model()
    output, state = run(model), fastpeft.get_peft_model_state_dict(model)
    assert all(torch.isfinite(v).all() for v in state.values() if v.is_floating_point())
    model.save_pretrained(tmp_path)
    for low in (False, True):
        loaded = fastpeft.PeftModel.from_pretrained(tiny(), tmp_path, low_cpu_mem_usage=low).eval()
        assert not [n for n, t in (*loaded.named_parameters(), *loaded.named_buffers()) if t.is_meta]
        assert_same_bits(run(loaded), output)
        assert not [n for n, p in loaded.named_parameters() if p.requires_grad]
        again = fastpeft.get_peft_model_state_dict(loaded)
        assert again.keys() == state.keys()
        for key, value in state.items():
            assert_same_bits(again[key], value)
    second = case.model(seed=7, name="other")
    second.load_adapter(tmp_path, "default")
    second.set_adapter("default")
    assert_same_bits(run(second), output)


@main
def test_state_dict_of_one_adapter_among_several(case: Case) -> None:
    model = case.model(name="a")
    model.add_adapter("a_b", case.config())
    scatter(model, "a_b", 2)
    alone = fastpeft.get_peft_model_state_dict(case.model())
    first, second = (fastpeft.get_peft_model_state_dict(model, adapter_name=n) for n in ("a", "a_b"))
    assert first.keys() == second.keys() == alone.keys()
    for key, value in alone.items():
        assert_same_bits(first[key], value)
    model.set_adapter("a_b")
    before = run(model)
    model.set_adapter("a")
    result = fastpeft.set_peft_model_state_dict(model, second, adapter_name="a")
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same_bits(run(model), before)
    key = next(k for k, v in second.items() if v.is_floating_point())
    with pytest.raises((ValueError, RuntimeError), match=r"size|shape"):
        fastpeft.set_peft_model_state_dict(model, {**second, key: torch.ones(2, 3, 5)}, "a")
    assert_same_bits(run(model), before)


def loss_of(output: Tensor) -> Tensor:
    return (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()


def train(model: Any, steps: int = 3) -> None:
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model(IDS)).backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p in parameters)
        optimizer.step()
    model.eval()


WRONG_IN_PEFT = {
    "TrainableTokens": "drops the bias of a linear layer",
    "QaLora": "has QA-LoRA on GPTQ layers only, elsewhere it is silently plain LoRA",
}


def with_peft(case: Case, make: Any) -> Any:
    """What `make(peft)` gives, where PEFT has this kind and can make it here."""
    if repr(case).split("-")[0] in WRONG_IN_PEFT and case.place == "linear":
        pytest.skip(f"PEFT {WRONG_IN_PEFT[repr(case).split('-')[0]]}")
    if case.kind.method.peft_type == PeftType.ADAMSS:
        pytest.importorskip("sklearn", reason="PEFT clusters with scikit-learn")
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(peft)


def exactly_in_peft(case: Case, folder: Path) -> Tensor:
    theirs = with_peft(case, lambda peft: peft.PeftModel.from_pretrained(tiny(), folder).eval().double())
    try:
        return run(theirs)
    except RuntimeError:  # it keeps tensors that `double` does not reach
        return run(with_peft(case, lambda p: p.PeftModel.from_pretrained(tiny(torch.float64), folder).eval().double()))


@every
def test_what_is_trained_here_goes_on_in_peft(case: Case, tmp_path: Path) -> None:
    model = case.model()
    before = run(model)
    train(model)
    output = run(model)
    assert not torch.equal(output, before)
    model.save_pretrained(tmp_path)
    theirs = with_peft(case, lambda peft: peft.PeftModel.from_pretrained(tiny(), tmp_path).eval())
    assert_close(output, run(theirs), exactly_in_peft(case, tmp_path))


@every
def test_what_is_trained_in_peft_goes_on_here(case: Case, tmp_path: Path) -> None:
    content = {**case.config().to_dict(), "peft_version": None}
    config = with_peft(case, lambda peft: peft.get_peft_config(content))
    model = with_peft(case, lambda peft: peft.get_peft_model(tiny(), config))
    train(model)
    model.save_pretrained(tmp_path)
    ours = fastpeft.PeftModel.from_pretrained(tiny(), tmp_path).eval()
    assert_close(run(ours), run(model), exactly_in_peft(case, tmp_path))


@every
def test_copies_and_pickles_are_independent(case: Case) -> None:
    model = case.model()
    output = run(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(run(other), output)
        assert {n for n, p in other.named_parameters() if p.requires_grad} == {
            n for n, p in model.named_parameters() if p.requires_grad
        }
        scatter(other, "default", 9)
        assert not torch.equal(run(other), output)
        assert_same_bits(run(model), output)


@every
def test_gradient_checkpointing_changes_no_gradient(case: Case) -> None:
    model = case.model().train()
    gradients = []
    for checkpointing in (False, True):
        model.get_base_model().checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(5)
        loss_of(model(IDS)).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0]
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        assert_same_bits(gradients[1][name], value)


@every
def test_float32_adapters_on_a_bfloat16_base(case: Case) -> None:
    model = case.model(dtype=torch.bfloat16)
    method = layers_of(model)[0].methods["default"]
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32 if method.autocast else torch.bfloat16}
    output = run(model)
    assert output.dtype == torch.bfloat16
    wide = run(copy.deepcopy(model).double())
    # As far from float64 as a merged layer or the frozen model is: bfloat16 has 8 bits.
    assert (output - wide).abs().max() < 0.1 * wide.abs().max()
    train(model)
    assert all(torch.isfinite(p).all() for p in model.parameters())


SIZES = ("r", "init_r", "n_frequency", "num_vectors", "u", "theta_d_length", "boft_block_size", "block_size")


@main
@pytest.mark.parametrize("value", [10**7, -1])
def test_hostile_sizes_fail_at_once_and_change_nothing(case: Case, value: int, tmp_path: Path) -> None:
    case.model().save_pretrained(tmp_path)
    content = json.loads((tmp_path / CONFIG_NAME).read_text())
    fields = [f for f, v in content.items() if isinstance(v, int) and not isinstance(v, bool)]
    file = (tmp_path / SAFETENSORS_NAME).stat().st_size
    for field in fields:
        base = tiny()
        before = state_of(base)
        start, refused = time.perf_counter(), False
        try:
            model = fastpeft.get_peft_model(base, case.config(**{field: value}))
            assert sum(p.numel() for p in model.parameters()) < 10**6, field
        except (ValueError, NotImplementedError):
            refused = True
            assert_same_state(base, before)
            assert not layers_of(base)
        assert time.perf_counter() - start < 1, field
        assert refused or field not in SIZES, field

        (tmp_path / CONFIG_NAME).write_text(json.dumps({**content, field: value}))
        base, start = tiny(), time.perf_counter()
        try:
            fastpeft.PeftModel.from_pretrained(base, tmp_path)
        except (ValueError, NotImplementedError):
            assert_same_state(base, before)
            assert not layers_of(base)
        else:
            assert field not in SIZES, field
        assert time.perf_counter() - start < 1, field
    assert (tmp_path / SAFETENSORS_NAME).stat().st_size == file


def test_the_lora_case_is_lora() -> None:
    assert get_method("LORA") is LORA.kind.method
