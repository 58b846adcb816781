"""IA3, BEFT, LN tuning, trainable tokens, SHiRA, SuperTuning, AdaMSS, Lily and PEANuT beside live PEFT."""

from __future__ import annotations

import copy
import runpy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fastpeft
import peft
import pytest
import torch
from fastpeft.methods.math.kmeans import cluster
from fastpeft.tuners.adamss.asa_callback import AdamssAsaCallback
from peft.utils import constants
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from peft_kernels.testing import assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("simple_tools.py")))
IDS, Net, check, llama, load, make, shake, trained = (
    tools[name] for name in ("IDS", "Net", "check", "llama", "load", "make", "shake", "trained")
)

LINEARS = ["up", "down"]
SKLEARN_LABELS = [1, 4, 1, 0, 0, 3, 3, 2, 4, 2, 3, 0, 4, 1, 1, 3, 0, 2, 4, 1]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("IA3", {"target_modules": [*LINEARS, "proj"], "feedforward_modules": ["down"], "init_ia3_weights": False}),
    ("IA3", {"target_modules": ["conv", "up"], "feedforward_modules": ["conv"], "init_ia3_weights": False}),
    ("IA3", {"target_modules": r".*(up|conv)", "feedforward_modules": r".*\.1\.up", "init_ia3_weights": False}),
    ("Beft", {"target_modules": LINEARS, "init_weights": False}),
    ("LNTuning", {"target_modules": ["norm"]}),
    ("LNTuning", {"target_modules": ["norm", "up", "proj", "emb"]}),
    ("TrainableTokens", {"target_modules": ["emb"], "token_indices": [7, 2, 0], "init_weights": False}),
    ("TrainableTokens", {"target_modules": ["down"], "token_indices": [7, 2], "init_weights": False}),
    ("Shira", {"target_modules": LINEARS, "r": 3, "init_weights": False}),
    ("Shira", {"target_modules": LINEARS, "r": 1, "random_seed": 5, "init_weights": False}),
    ("Supertuning", {"target_modules": LINEARS, "sparsity": 0.7, "init_weights": False}),
    ("Supertuning", {"target_modules": LINEARS, "sparsity": 0.9, "select_top": False, "r": 3, "init_weights": False}),
    ("Supertuning", {"target_modules": ["up"], "save_precomputed_indices": False, "init_weights": False}),
    ("Lily", {"target_modules": LINEARS, "r": 3, "init_weights": False}),
    ("Lily", {"target_modules": LINEARS, "r": 3, "stride_A": 2, "num_B": 3, "scaling": 0.3, "init_weights": False}),
    ("Peanut", {"target_modules": LINEARS, "r": 3, "init_weights": False}),
    ("Peanut", {"target_modules": LINEARS, "r": 3, "depth": 2, "act_fn": "silu", "scaling": 0.5}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_everything_is_pefts(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = make(fastpeft, name, options), make(peft, name, options)
    mine, other = trained(ours), trained(theirs)
    assert list(mine) == list(other)
    for key, value in other.items():
        assert_same_bits(mine[key], value)
    for model in (ours, theirs):
        shake(model)
    exact = copy.deepcopy(theirs).double()
    outputs = [m(IDS) for m in (ours, theirs, exact)]
    if options["target_modules"] == ["down"]:  # PEFT drops the bias of a Linear with trained rows: here it has none
        assert ours.base_model.model.layers[0].down.bias is None
    check(*(o.detach() for o in outputs))
    grads = [
        torch.autograd.grad(output.square().sum(), [*trained(model).values()])
        for output, model in zip(outputs, (ours, theirs, exact), strict=True)
    ]
    for triple in zip(*grads, strict=True):
        check(*triple)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    assert all(files[0][key].dtype == value.dtype for key, value in files[1].items())
    check(load(fastpeft, tmp_path / "theirs")(IDS).detach(), outputs[1].detach(), outputs[2].detach())
    check(load(peft, tmp_path / "ours")(IDS).detach(), outputs[1].detach(), outputs[2].detach())
    with torch.no_grad(), ours.disable_adapter():
        check(ours(IDS), Net()(IDS), Net().double()(IDS))
    if name == "Lily":
        with pytest.raises(ValueError, match="no merged form"):
            ours.merge_adapter()
    elif not (name == "Beft" and "down" in options["target_modules"]):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs.merge_adapter()
            check(ours.merge_and_unload()(IDS), theirs(IDS), outputs[2].detach())


def test_low_cpu_mem_usage_and_half_precision_bases() -> None:
    for name, options in CASES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = getattr(fastpeft, f"{name}Config")(**options)
            empty = fastpeft.get_peft_model(Net(), config, low_cpu_mem_usage=True)
            half = fastpeft.get_peft_model(Net().to(torch.bfloat16), getattr(fastpeft, f"{name}Config")(**options))
            theirs = peft.get_peft_model(Net().to(torch.bfloat16), getattr(peft, f"{name}Config")(**options))
        assert [t.shape for t in trained(empty).values()] == [t.shape for t in trained(half).values()]
        dtypes = {n: p.dtype for n, p in theirs.named_parameters() if p.requires_grad}
        assert {n: p.dtype for n, p in trained(half).items()} == dtypes
        out = half(IDS)
        assert out.dtype is torch.bfloat16
        out.float().square().sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained(half).values())


@pytest.mark.parametrize("name", ["Beft", "Supertuning", "Lily", "Peanut", "Adamss"])
def test_low_cpu_mem_usage_leaves_what_trains_on_the_meta_device(name: str) -> None:
    config = getattr(fastpeft, f"{name}Config")(target_modules=["up"])
    empty = fastpeft.inject_adapter_in_model(config, Net(), low_cpu_mem_usage=True)
    assert {t.device.type for t in trained(empty).values()} == {"meta"}


def test_default_targets_are_pefts() -> None:
    tables = {"IA3": "IA3", "BEFT": "BEFT", "SHIRA": "SHIRA", "SUPERTUNING": "SUPERTUNING", "LILY": "LILY",
              "PEANUT": "PEANUT", "ADAMSS": "ADAMSS", "LN_TUNING": "LNTUNING"}  # fmt: skip
    for kind, name in tables.items():
        ours = dict(fastpeft.methods.registry.get_method(kind).default_targets)
        theirs = dict(getattr(constants, f"TRANSFORMERS_MODELS_TO_{name}_TARGET_MODULES_MAPPING"))
        if kind == "LN_TUNING":  # PEFT copies a module that is no layer as a whole
            assert {t.split(".")[0] for t in ours.pop("llava")} == set(theirs.pop("llava"))
        assert {k: set(v) if isinstance(v, list) else v for k, v in ours.items()} == {
            k: set(v) if isinstance(v, list) else v for k, v in theirs.items()
        }, kind
    table = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    for model_type, ends in table.items():
        opened = fastpeft.methods.registry.get_method("IA3").open_fields(fastpeft.IA3Config(), nn.Module(), model_type)
        assert opened == {"feedforward_modules": set(ends)}


# IA3


def test_ia3_takes_a_models_defaults_and_says_what_is_missing() -> None:
    ours, theirs = (lib.get_peft_model(llama(), lib.IA3Config()) for lib in (fastpeft, peft))
    assert list(trained(ours)) == list(trained(theirs))
    for field in ("target_modules", "feedforward_modules"):
        assert getattr(ours.peft_config["default"], field) == getattr(theirs.peft_config["default"], field)
    with pytest.raises(ValueError, match="Please specify `feedforward_modules`"):
        fastpeft.get_peft_model(Net(), fastpeft.IA3Config(target_modules=["up"]))
    with pytest.raises(ValueError, match="should be a subset"):
        fastpeft.IA3Config(target_modules=["up"], feedforward_modules=["down"])


@pytest.mark.parametrize("bits", [4, 8])
def test_ia3_merges_into_bitsandbytes_layers_which_peft_refuses(bits: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    made = bnb.nn.Linear4bit(64, 64) if bits == 4 else bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    model = nn.Sequential(made).to("cpu")
    config = fastpeft.IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False)
    ours = fastpeft.get_peft_model(model, config).eval()
    x = torch.randn(5, 64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = ours(x)
        ours.merge_adapter()
        assert (ours(x) - before).norm() < 0.2 * before.norm()  # what quantising once more costs
        ours.unmerge_adapter()
        assert_same_bits(ours(x), before)


# BEFT, LN tuning


def test_beft_without_a_bias_warns_works_and_does_not_merge() -> None:
    with pytest.warns(fastpeft.PeftWarning, match="has no bias term"):
        model = fastpeft.get_peft_model(Net(), fastpeft.BeftConfig(target_modules=["down"], init_weights=False))
    with pytest.raises(ValueError, match="has no bias"):
        model.merge_adapter()


def test_ln_tuning_on_any_norm_and_with_other_adapters() -> None:
    torch.manual_seed(0)
    model = fastpeft.get_peft_model(llama(), fastpeft.LNTuningConfig())
    assert len(trained(model)) == 5
    model.add_adapter("lora", fastpeft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    shake(model)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        alone = model(ids).logits
        model.set_adapter(["default", "lora"])
        both = model(ids).logits
        assert not torch.equal(alone, both)
        merged = model.merge_and_unload()(ids).logits
    check(merged, both, both.double())
    quantised = nn.Sequential(fastpeft.quantize_model(nn.Sequential(nn.Linear(64, 64)))[0])
    with pytest.raises(ValueError, match="quantised weight cannot be trained"):
        fastpeft.get_peft_model(quantised, fastpeft.LNTuningConfig(target_modules=["0"]))


# AdaMSS


def test_adamss_clusters_as_scikit_learn_does() -> None:
    """Clusters of scikit-learn 1.9, KMeans(5, init="random", n_init=1, max_iter=10, random_state=123456789)."""
    found = cluster(torch.sin(torch.arange(60.0) ** 1.7).view(20, 3), 5)
    labels = torch.empty(20, dtype=torch.long)
    for i, members in enumerate(found):
        labels[members] = i
    assert labels.tolist() == SKLEARN_LABELS


def test_adamss_trains_fewer_and_fewer_subspaces() -> None:
    options = {"target_modules": LINEARS, "r": 6, "num_subspaces": 3, "use_asa": True, "asa_target_subspaces": 4,
               "init_warmup": 1, "final_warmup": 9, "mask_interval": 2, "init_weights": None}  # fmt: skip
    model = make(fastpeft, "Adamss", options)
    before = model(IDS)
    counts = []
    for step in range(12):
        model(IDS).square().sum().backward()
        model.base_model.update_and_allocate(step)
        model.zero_grad()
        counts.append(sum(p.requires_grad for n, p in model.named_parameters() if "adamss_A" in n))
    assert counts[0] == counts[1] == 12
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 4
    assert_same_bits(model(IDS), before)  # they stop being trained, they still act
    model = make(fastpeft, "Adamss", options)
    for step in range(1, 3):
        model(IDS).square().sum().backward()
        AdamssAsaCallback().on_optimizer_step(None, SimpleNamespace(global_step=step), None, model=model)
    assert sum(p.requires_grad for n, p in model.named_parameters() if "adamss_A" in n) == counts[2] < 12
    for wrong in ({"mask_interval": 0}, {"init_warmup": 9}, {"asa_target_subspaces": 0}, {"asa_schedule_exponent": 0}):
        with pytest.raises(ValueError, match="must be"):
            fastpeft.AdamssConfig(**{**options, **wrong})


# Lily, PEANuT


def test_lily_shares_and_keeps_sharing(tmp_path: Path) -> None:
    model = make(fastpeft, "Lily", {"target_modules": LINEARS, "r": 3, "stride_A": 2, "init_weights": False})
    model.save_pretrained(tmp_path)
    for net in (model, fastpeft.PeftModel.from_pretrained(Net(), tmp_path), copy.deepcopy(model).double()):
        first, second = net.base_model.model.layers[0], net.base_model.model.layers[1]
        assert first.up.lily_B["default"].weight is second.up.lily_B["default"].weight
        assert first.up.lily_A["default"].weight is second.up.lily_A["default"].weight
        assert first.up.lily_router["default"].weight is not second.up.lily_router["default"].weight
    for options in ({"stride_A": 0}, {"num_B": 1}):
        with pytest.raises(ValueError, match="must be at least"):
            fastpeft.LilyConfig(**options)


def test_peanut_reads_the_weight_that_is_there() -> None:
    """Merged twice PEFT reads its own update; on 8-bit it merges garbage."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(bnb.nn.Linear8bitLt(32, 32, has_fp16_weights=False)).to("cpu")
    config = fastpeft.PeanutConfig(target_modules=["0"], r=2, init_weights=False, scaling=0.1)
    ours = fastpeft.get_peft_model(model, config).eval()
    x = torch.randn(5, 32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = ours(x)
        ours.merge_adapter()
        assert (ours(x) - before).norm() < 0.05 * before.norm()
    with pytest.raises(ValueError, match="Unsupported `act_fn`"):
        fastpeft.PeanutConfig(act_fn="no such")


# Cost


@pytest.mark.parametrize(
    ("name", "options", "most"),
    [
        ("IA3", {"feedforward_modules": []}, 1.0), ("Beft", {}, 1.0), ("Shira", {}, 1.1), ("Supertuning", {}, 1.1),
        ("Lily", {}, 1.05), ("Adamss", {}, 1.02), ("Peanut", {}, 1.12),
    ],
)  # fmt: skip
def test_flops_are_those_that_the_math_needs(name: str, options: dict[str, Any], most: float) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(2048, 2048)).requires_grad_(False)
    model = fastpeft.get_peft_model(base, getattr(fastpeft, f"{name}Config")(target_modules=["0"], **options))
    x, dy = torch.randn(512, 2048, requires_grad=True), torch.ones(512, 2048)
    with FlopCounterMode(display=False) as counter:
        model(x).backward(dy)
    assert counter.get_total_flops() <= most * 4 * 512 * 2048 * 2048
