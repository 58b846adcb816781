"""Files of adapters, for every method and variant: what is saved computes the same here and in PEFT; hostile ones."""

from __future__ import annotations

import gc
import json
import runpy
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastpeft
import pytest
import torch
from fastpeft.config.base import CONFIG_NAME
from fastpeft.config.types import PeftType
from torch import Tensor

from peft_kernels.testing import assert_no_worse, assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("life_tools.py")))
CASES = tools["CASES"]
MAIN = tools["MAIN"]
assert_matches = tools["assert_matches"]
assert_same_state = tools["assert_same_state"]
layers_of = tools["layers_of"]
run = tools["run"]
scatter = tools["scatter"]
state_of = tools["state_of"]
tiny = tools["tiny"]
train = tools["train"]
Case = Any
every = pytest.mark.parametrize("case", CASES, ids=repr)
main = pytest.mark.parametrize("case", MAIN, ids=repr)
pytestmark = pytest.mark.filterwarnings("ignore::fastpeft.config.types.PeftWarning", "ignore::UserWarning")


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


WRONG_IN_PEFT = {
    "TrainableTokens": "drops the bias of a linear layer",
    "BOFT-1": "has butterfly factors with its CUDA extension only, elsewhere it is silently 1",
    "Poly": "wants `task_ids` also where there is one task",
    "QaLora": "has QA-LoRA on GPTQ layers only, elsewhere it is silently plain LoRA",
}


def with_peft(case: Case, make: Any) -> Any:
    """The result of `make(peft)`, where PEFT has this kind and can make it here."""
    for name, what in WRONG_IN_PEFT.items():
        if repr(case).startswith(name) and case.place == "linear":
            pytest.skip(f"PEFT {what}")
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


# PEFT draws another stream: it keeps many draws in every layer, ours are made when they are needed. And it clusters
# the rows of an orthogonal matrix, which are all as far from one another: rounding decides.
OTHER_NUMBERS = ("MonteClora", "Adamss-1")


# What PEFT has in the adapter's file and not in `model.state_dict()`.
IN_FILES_ONLY = {"shira_indices", "frod_V", "frod_s_indices", "frod_s_size"}


@pytest.mark.parametrize("case", tools["EXAMPLES"], ids=repr)
def test_a_new_adapter_is_that_of_peft(case: Case) -> None:
    content = {**case.config().to_dict(), "peft_version": None}
    config = with_peft(case, lambda peft: peft.get_peft_config(content))
    base = tiny()
    torch.manual_seed(4)
    theirs = with_peft(case, lambda peft: peft.get_peft_model(base, config))
    base = tiny()
    torch.manual_seed(4)
    ours = fastpeft.get_peft_model(base, case.config())
    mine, other = ours.state_dict(), theirs.state_dict()
    assert other.keys() <= mine.keys()
    assert {key.split(".")[-2] for key in mine.keys() - other.keys()} <= IN_FILES_ONLY
    trained = [{n: p.shape for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
    assert trained[0].keys() == trained[1].keys()
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    for key, value in other.items() if not repr(case).startswith(OTHER_NUMBERS) else ():
        assert mine[key].dtype == value.dtype, key
        assert mine[key].shape == value.shape, key
        wide = value.double()  # integers too; a norm may be rounded otherwise
        assert_no_worse(mine[key].float(), value.float(), wide, wide.abs())


WITH_BIAS = [case for case in tools["MAIN"] if hasattr(case.config(), "bias")]


@pytest.mark.parametrize("bias", ["all", "{}_only"])
@pytest.mark.parametrize("case", WITH_BIAS, ids=repr)
def test_biases_that_train_are_those_of_peft(case: Case, bias: str) -> None:
    bias = bias.format(case.kind.method.peft_type.value.lower())
    content = {**case.config().to_dict(), "bias": bias, "peft_version": None}
    theirs = with_peft(case, lambda peft: peft.get_peft_model(tiny(), peft.get_peft_config(content)))
    ours = fastpeft.get_peft_model(tiny(), case.config(bias=bias))
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
    assert trained[0] == trained[1]
    assert any(name.endswith(".bias") for name in trained[0])
    saved = with_peft(case, lambda peft: peft.get_peft_model_state_dict(theirs))
    assert fastpeft.get_peft_model_state_dict(ours).keys() == saved.keys()
    base = tiny()
    with pytest.raises(NotImplementedError, match="everything"):
        fastpeft.get_peft_model(base, case.config(bias="everything"))
    assert not layers_of(base)


@every
def test_what_is_trained_here_goes_on_in_peft(case: Case, tmp_path: Path) -> None:
    model = case.model()
    before = run(model)
    train(model)
    output = run(model)
    assert not torch.equal(output, before)
    model.save_pretrained(tmp_path)
    theirs = with_peft(case, lambda peft: peft.PeftModel.from_pretrained(tiny(), tmp_path).eval())
    assert_matches(output, run(theirs), exactly_in_peft(case, tmp_path))


@every
def test_what_is_trained_in_peft_goes_on_here(case: Case, tmp_path: Path) -> None:
    content = {**case.config().to_dict(), "peft_version": None}
    config = with_peft(case, lambda peft: peft.get_peft_config(content))
    model = with_peft(case, lambda peft: peft.get_peft_model(tiny(), config))
    train(model)
    model.save_pretrained(tmp_path)
    ours = fastpeft.PeftModel.from_pretrained(tiny(), tmp_path).eval()
    assert_matches(run(ours), run(model), exactly_in_peft(case, tmp_path))


SIZES = ("r", "init_r", "n_frequency", "num_vectors", "u", "theta_d_length", "boft_block_size", "block_size")


def hostile(content: dict[str, Any], value: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """The configuration with `value` in place of each of its numbers, one at a time, by the number's name."""
    for field, old in content.items():
        if field.endswith("_pattern") and field != "layers_pattern":
            yield field, {**content, field: {"linear": value}}
        elif isinstance(old, dict):
            for name, inner in hostile(old, value):
                yield f"{field}.{name}", {**content, field: inner}
        elif isinstance(old, (int, float)) and not isinstance(old, bool) and old != value:
            yield field, {**content, field: value}


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@main
@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("value", [10**7, -1, 0, 1e308])
def test_hostile_numbers_fail_at_once_or_do_no_harm(case: Case, value: float, tmp_path: Path) -> None:
    case.model().save_pretrained(tmp_path)
    content = json.loads((tmp_path / CONFIG_NAME).read_text())
    for field, changed in hostile(content, value):
        (tmp_path / CONFIG_NAME).write_text(json.dumps(changed))
        makers = [lambda base: fastpeft.PeftModel.from_pretrained(base, tmp_path)]
        if field in content and isinstance(value, int):
            makers.append(lambda base, field=field, new=changed: fastpeft.get_peft_model(
                base, case.config(**{field: new[field]})
            ))  # fmt: skip
        for make in makers:
            base = tiny()
            # the thread's own time, without what the collector takes for all that other tests have left
            before, start = state_of(base), time.thread_time()
            try:
                model = make(base)
            except (ValueError, NotImplementedError):
                assert_same_state(base, before)
                assert not layers_of(base)
            else:
                assert field not in SIZES, field
                assert sum(p.numel() for p in model.parameters()) < 10**6, field
                assert torch.isfinite(run(model)).all(), field
            assert time.thread_time() - start < 1, field
