"""VeRA, PVeRA, RandLoRA, VB-LoRA, Uni-LoRA, TinyLoRA and FRoD beside live PEFT, and what they cost.

The laws (test_laws.py), golden files (test_golden.py) and the life of an adapter (test_life.py) hold them too; what
their layers share, test_shared.py.
"""

from __future__ import annotations

import copy
import json
import runpy
from pathlib import Path

import fastpeft
import peft
import pytest
import torch
from fastpeft.config.base import CONFIG_NAME, PeftConfig
from fastpeft.layer.layer import AdapterLayer
from fastpeft.methods.randlora import _Update
from fastpeft.methods.registry import get_method
from fastpeft.testing import SAMPLE_BASES, add_adapter, assert_law
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from peft_kernels.testing import assert_no_worse, assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("shared_tools.py")))
CASES, IDS, TARGETS, Net, configuration, model, pair, spread, trained = (
    tools[name] for name in ("CASES", "IDS", "TARGETS", "Net", "configuration", "model", "pair", "spread", "trained")
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("case", CASES)
def test_configurations_have_the_fields_of_peft(case):
    ours, theirs = configuration(fastpeft, case).to_dict(), configuration(peft, case).to_dict()
    assert ours.keys() == theirs.keys()
    kind = CASES[case][0]
    assert PeftConfig.from_peft_type(peft_type=kind).to_dict() == {
        **peft.get_peft_config({"peft_type": kind}).to_dict(), "peft_version": "0.21.2", "task_type": None,
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_seed_gives_the_numbers_of_peft(case):
    ours, theirs = pair(case)
    mine, other = fastpeft.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert mine.keys() == other.keys()
    for key in mine:
        assert_same_bits(mine[key], other[key])
    # PEFT's embeddings with TinyLoRA forget `save_projection`.
    assert set(ours.state_dict()) == {key for key in theirs.state_dict() if "emb.tinylora_P" not in key}
    ours.load_state_dict(ours.state_dict())
    assert trained(ours).keys() == trained(theirs).keys()
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_peft(case, mode):
    kind = CASES[case][0]
    # The kernel that the others are fused into draws its own dropout.
    dropout = {f"{kind.lower()}_dropout": 0.3} if mode == "train" and kind not in ("UNILORA", "TINYLORA") else {}
    ours, theirs = pair(case, **dropout)
    spread(ours, theirs)
    exact = copy.deepcopy(theirs).double()
    results = []
    for m in (ours, theirs, exact):
        m.train(mode == "train")
        torch.manual_seed(3)
        y = m(IDS)
        (y * torch.arange(y.numel()).view(y.shape) / y.numel()).sum().backward()
        results.append({"y": y.detach(), **{n: p.grad for n, p in trained(m).items()}})
    mine, other, best = results
    if mode == "train":  # float64 draws other numbers, so that the same formula is compared in float32 alone
        best = {key: value.double() for key, value in other.items()}
    assert mine.keys() == other.keys()
    for key, value in mine.items():
        # A deep model: what rounding does in one layer goes through the others.
        scale = 40 * best[key].abs().max().expand(best[key].shape)
        assert_no_worse(value, other[key], best[key], scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["vera", "pvera", "randlora", "vblora", "unilora", "tinylora", "frod"])
def test_half_precision_bases(case, dtype):
    ours, theirs = pair(case, dtype=dtype)
    mine, other = fastpeft.get_peft_model_state_dict(ours.eval()), peft.get_peft_model_state_dict(theirs)
    for key in mine if case != "frod" else ():
        assert_same_bits(mine[key], other[key])
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype is torch.float32, name
    spread(ours)
    y = ours(IDS)
    assert y.dtype is dtype
    y.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in trained(ours).values())
    merged = copy.deepcopy(ours).merge_and_unload()
    exact = copy.deepcopy(ours).double()(IDS)
    assert_no_worse(merged(IDS), y.detach(), exact.detach(), 8 * exact.detach().abs().max().expand(exact.shape))


# Details of single methods


def test_pvera_draws_in_training_and_where_it_is_told_to():
    ours, theirs = pair("pvera", sample_at_inference=True)
    spread(ours, theirs)
    outputs = []
    for m in (ours.eval(), theirs.eval()):
        torch.manual_seed(4)
        outputs.append(m(IDS).detach())
    assert_no_worse(*outputs, outputs[1].double(), outputs[1].double().abs() * 8 + 1)
    assert not torch.equal(ours(IDS), ours(IDS))
    with pytest.raises(ValueError, match="draws at inference"):
        ours.merge_adapter()
    seeded, theirs = pair("pvera-seed")
    spread(seeded, theirs)
    torch.manual_seed(0)
    first, second = seeded.train()(IDS).detach(), seeded(IDS).detach()
    assert not torch.equal(first, second)
    for drawn in (first, second):
        y = theirs.train()(IDS).detach()
        assert_no_worse(drawn, y, y.double(), y.double().abs() * 8 + 1)
    assert torch.equal(seeded.eval()(IDS), seeded(IDS))


def test_frod_follows_the_projections_of_its_file(tmp_path):
    """U is computed from V and the base weight, so that it must be the V of the file. PEFT keeps the U of another V."""
    m = model(fastpeft, "frod", regularization_alpha=10.0)
    m.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps({**config, "regularization_alpha": 1e-3}))
    torch.manual_seed(0)
    base = Net()
    expected = base(IDS).detach()
    loaded = fastpeft.PeftModel.from_pretrained(base, tmp_path)
    # The identity, as it was when saved.
    y = loaded(IDS).detach()
    assert_no_worse(y, expected, expected.double(), 8 * expected.double().abs() + 1)


def test_tinylora_in_a_square_embedding():
    layer = AdapterLayer(nn.Embedding(16, 16), "emb")
    add_adapter(layer, "a", get_method("TINYLORA"), configuration(fastpeft, "tinylora"))
    assert_law(layer, ["a"], IDS)


def test_tinylora_decomposes_a_weight_once_and_again_when_it_changes(monkeypatch):
    m = model(fastpeft, "tinylora")
    calls = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(1) or svd(*a, **k))
    m.add_adapter("b", configuration(fastpeft, "tinylora"))
    assert calls == []
    layer = m.base_model.model.up
    assert_same_bits(layer.tinylora_A["b"], layer.tinylora_A["default"])
    assert layer.tinylora_A["b"].data_ptr() != layer.tinylora_A["default"].data_ptr()
    with torch.no_grad():
        layer.weight.mul_(2)
    m.add_adapter("c", configuration(fastpeft, "tinylora"))
    assert len(calls) == 1
    assert not torch.equal(layer.tinylora_A["c"], layer.tinylora_A["default"])


def test_randlora_gradients():
    for inward, size in ((True, (6, 9)), (False, (9, 6))):
        torch.manual_seed(0)
        parts = [torch.randn(s, dtype=torch.float64) for s in ((4, size[0]), (2, 3), (3, 6), (2, 6), (9, 6))]
        for tensor in parts[:3]:
            tensor.requires_grad_()
        assert torch.autograd.gradcheck(lambda *p, inward=inward: _Update.apply(*p, inward), parts)


@pytest.mark.parametrize("case", [c for c in CASES if "emb" not in CASES[c][1].get("target_modules", ())])
def test_quantised_bases(case):
    """PEFT has VeRA, PVeRA and RandLoRA there; its Uni-LoRA has no effect on bitsandbytes' layers."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    dense = nn.Linear(64, 32)
    four = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    eight = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    for quantised in (four, eight):
        quantised.load_state_dict(dense.state_dict())
        quantised.to("cpu")
    x = torch.randn(3, 64)
    for base in (four, eight, SAMPLE_BASES["nf4"].make()):
        holder = nn.Sequential()
        holder.add_module("up", base)
        x = torch.randn(3, 64 if base in (four, eight) else 24)
        short = {"vector_length": 4} if "vblora" in case else {}
        adapted = model(fastpeft, case, base=holder, target_modules=["up"], **short).eval()
        spread(adapted)
        layer = adapted.base_model.model.up
        with torch.no_grad():
            with adapted.disable_adapter():
                before = adapted(x)
            added = adapted(x) - before
            delta = layer.get_delta_weight("default").to(x.dtype)
            assert delta.abs().max() > 0
            assert_no_worse(added, x @ delta.t(), (x.double() @ delta.double().t()), 8 * before.abs().double() + 8)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("VERA", {"r": 0}, "`r` should be a positive integer"),
        ("VERA", {"r": 1 << 20}, "r = 1048576: expected"),
        ("VERA", {"vera_dropout": 1.5}, "vera_dropout"),
        ("VERA", {"projection_prng_key": "x"}, "projection_prng_key"),
        ("VERA", {"target_modules": ["emb"]}, "cannot adapt 'emb'"),
        ("PVERA", {"generator_seed": 1 << 70}, "generator_seed"),
        ("RANDLORA", {"r": -1}, "r = -1: expected"),
        ("VBLORA", {"vector_length": 5}, "must be divisible by `vector_length`"),
        ("VBLORA", {"vector_length": 8, "topk": 300}, "`topk`=300 should be at most"),
        ("UNILORA", {"theta_d_length": 0}, "theta_d_length"),
        ("UNILORA", {"theta_d_length": 10**9}, "is more than the"),
        ("UNILORA", {"proj_seed": -1}, "proj_seed"),
        ("UNILORA", {"init_theta_d_bound": 0}, "init_theta_d_bound"),
        ("TINYLORA", {"weight_tying": 1.5}, "weight_tying"),
        ("TINYLORA", {"u": 0}, "`u` should be a positive integer"),
        ("TINYLORA", {"r": 5000, "u": 5000}, "have more than"),
        ("TINYLORA", {"init_weights": "zeros"}, "init_weights"),
        ("FROD", {"sparse_rate": 1.5}, "sparse_rate"),
    ],
)
def test_what_makes_no_sense_is_refused(kind, options, message):
    base = Net()
    modules = dict(base.named_modules())
    with pytest.raises(ValueError, match=message):
        fastpeft.get_peft_model(
            base, fastpeft.get_peft_config({"peft_type": kind, "target_modules": TARGETS, **options})
        )
    assert dict(base.named_modules()) == modules


def test_frod_refuses_layers_of_one_role_with_different_inputs():
    base = nn.Sequential(nn.ModuleDict({"a": nn.Linear(8, 8)}), nn.ModuleDict({"a": nn.Linear(6, 8)}))
    config = fastpeft.get_peft_config({"peft_type": "FROD", "target_modules": ["a"], "progressbar": False})
    with pytest.raises(ValueError, match="different numbers of inputs"):
        fastpeft.get_peft_model(base, config)


# What it costs: FLOPs of forward and backward over the frozen layer's, as derived in each file.
LEAST = {"vera": 1.25, "pvera": 1.25, "randlora": 3.0, "vblora": 1.01, "frod": 3.0}


@pytest.mark.parametrize("case", LEAST)
def test_flops_and_saved_bytes(case):
    size, tokens = 512, 64
    options = {"vera": {"r": 64}, "pvera": {"r": 64}, "randlora": {"r": 32}, "vblora": {"r": 2, "vector_length": 64}}
    base = nn.Sequential()
    base.add_module("up", nn.Linear(size, size))
    m = model(fastpeft, case, base=base, target_modules=["up"], **options.get(case, {"sparse_rate": 0.01})).eval()
    x = torch.randn(tokens, size, requires_grad=True)
    held = {t.untyped_storage().data_ptr() for t in [x, *m.parameters(), *m.buffers()]}
    saved = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in held:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = m(x)
        y.backward(torch.ones_like(y))
    frozen = 2 * 2 * tokens * size * size
    assert counter.get_total_flops() <= 1.2 * LEAST[case] * frozen
    assert sum(saved.values()) <= 1.5 * x.numel() * x.element_size()
