"""IA3, BEFT, LN tuning, trainable tokens, SHiRA, SuperTuning, AdaMSS, Lily and PEANuT beside live PEFT."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fastpeft
import peft
import pytest
import torch
import torch.nn.functional as F
from fastpeft.clusters import cluster
from fastpeft.fits import KeyMismatchError
from fastpeft.sparse import sparse_linear
from fastpeft.tuners.adamss.asa_callback import AdamssAsaCallback
from peft.utils import constants
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from peft_kernels.testing import assert_no_worse, assert_same_bits

LINEARS = ["up", "down"]
SKLEARN_LABELS = [1, 4, 1, 0, 0, 3, 3, 2, 4, 2, 3, 0, 4, 1, 1, 3, 0, 2, 4, 1]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12, bias=False)
        self.proj, self.norm = Conv1D(12, 12), nn.LayerNorm(12)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(h + self.proj(self.down(torch.tanh(self.up(h)))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(9, 12, padding_idx=2)
        self.layers = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv2d(4, 8, 3, groups=2, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.emb(ids)
        for layer in self.layers:
            h = layer(h)
        return self.conv(h.unflatten(-1, (4, 3, 1)).flatten(0, 1))


IDS = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, 8, 2]])
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


def make(library: Any, name: str, options: dict[str, Any], **more: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out, a bias that is not there
        config = getattr(library, f"{name}Config")(**options)
        net = Net().eval()
        torch.manual_seed(1)
        return library.get_peft_model(net, config, **more).eval()


def trained(model: Any) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def shake(model: Any) -> None:
    """What training does: other values, the same here and there."""
    torch.manual_seed(3)
    with torch.no_grad():
        for _, p in sorted(trained(model).items()):
            p.add_(torch.randn_like(p) * 0.2)


def check(actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    assert_no_worse(actual, eager, exact, 4 * (exact.abs() + exact.abs().mean()))


def load(library: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.PeftModel.from_pretrained(Net(), folder).eval()


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


def test_default_targets_are_pefts() -> None:
    tables = {"IA3": "IA3", "BEFT": "BEFT", "SHIRA": "SHIRA", "SUPERTUNING": "SUPERTUNING", "LILY": "LILY",
              "PEANUT": "PEANUT", "ADAMSS": "ADAMSS", "LN_TUNING": "LNTUNING"}  # fmt: skip
    for kind, name in tables.items():
        ours = dict(fastpeft.method.get_method(kind).default_targets)
        theirs = dict(getattr(constants, f"TRANSFORMERS_MODELS_TO_{name}_TARGET_MODULES_MAPPING"))
        if kind == "LN_TUNING":  # PEFT copies a module that is no layer as a whole
            assert {t.split(".")[0] for t in ours.pop("llava")} == set(theirs.pop("llava"))
        assert {k: set(v) if isinstance(v, list) else v for k, v in ours.items()} == {
            k: set(v) if isinstance(v, list) else v for k, v in theirs.items()
        }, kind
    table = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    for model_type, ends in table.items():
        opened = fastpeft.method.get_method("IA3").open_fields(fastpeft.IA3Config(), nn.Module(), model_type)
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


# Trainable tokens


def test_trained_rows_of_a_linear_layer_keep_its_bias() -> None:
    """PEFT drops the bias."""
    options = {"target_modules": ["up"], "token_indices": [3, 1], "init_weights": False}
    model = make(fastpeft, "TrainableTokens", options)
    layer = model.base_model.model.layers[0].up
    x = torch.randn(4, 12)
    w, b = layer.weight.detach().clone(), layer.bias.detach()
    w[[3, 1]] = layer.trainable_tokens_delta["default"].detach()
    check(layer(x).detach(), F.linear(x, w, b), F.linear(x.double(), w.double(), b.double()))


def test_token_indices_are_checked() -> None:
    for tokens, error in (([], "non-negative"), ([-1], "non-negative"), ([1, 1], "once"), ([9], "has 9 rows")):
        with pytest.raises(ValueError, match=error):
            make(fastpeft, "TrainableTokens", {"target_modules": ["emb"], "token_indices": tokens})


def llama(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=30, tie_word_embeddings=tied, num_key_value_heads=1, **small)).eval()


TOKEN_CASES: list[tuple[str, dict[str, Any]]] = [
    ("TrainableTokens", {"token_indices": [7, 1, 5]}),
    ("Lora", {"trainable_token_indices": [7, 1, 5], "target_modules": ["q_proj"]}),
    ("Lora", {"trainable_token_indices": {"embed_tokens": [7, 1], "lm_head": [7, 1]}, "target_modules": ["q_proj"]}),
    ("Lora", {"trainable_token_indices": {"embed_tokens": [7, 1], "lm_head": [2]}, "target_modules": ["q_proj"]}),
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("name", "options"), TOKEN_CASES, ids=str)
def test_trained_tokens_of_language_models(name: str, options: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    ids = torch.tensor([[1, 2, 5, 7, 9, 1], [0, 7, 7, 3, 1, 4]])
    ours, theirs = (
        lib.get_peft_model(llama(tied), getattr(lib, f"{name}Config")(**options)) for lib in (fastpeft, peft)
    )
    assert sorted(trained(ours)) == sorted(trained(theirs))
    shake(theirs)
    state = peft.get_peft_model_state_dict(theirs)
    assert fastpeft.get_peft_model_state_dict(ours).keys() == state.keys()
    fastpeft.set_peft_model_state_dict(ours, state)
    exact = copy.deepcopy(theirs).double()
    outputs = [m(ids).logits for m in (ours, theirs, exact)]
    check(*(o.detach() for o in outputs))
    for output in outputs:
        output.square().sum().backward()
    reference, precise = trained(theirs), trained(exact)
    for key, p in trained(ours).items():
        check(p.grad, reference[key].grad, precise[key].grad)  # type: ignore[arg-type]
    ours.save_pretrained(tmp_path)
    with torch.no_grad():
        for library in (fastpeft, peft):
            loaded = library.PeftModel.from_pretrained(llama(tied), tmp_path).eval()
            check(loaded(ids).logits, outputs[1].detach(), outputs[2].detach())
            assert len({id(p) for n, p in loaded.named_parameters() if "tokens_delta" in n}) == len(
                [n for n in trained(theirs) if "tokens_delta" in n]
            )
        with ours.disable_adapter():
            base = llama(tied)(ids).logits
            check(ours(ids).logits, base, llama(tied).double()(ids).logits)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours.merge_adapter()
            check(ours(ids).logits, outputs[1].detach(), outputs[2].detach())
            ours.unmerge_adapter()
            merged = fastpeft.PeftModel.from_pretrained(llama(tied), tmp_path).merge_and_unload()
            check(merged(ids).logits, outputs[1].detach(), outputs[2].detach())
            assert type(merged.get_input_embeddings()) is nn.Embedding


def test_trained_tokens_beside_an_adapter_come_and_go() -> None:
    ids = torch.arange(8)[None]
    model = llama()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    options: dict[str, Any] = {"trainable_token_indices": [1, 2], "target_modules": ["q_proj"]}
    ours = fastpeft.get_peft_model(model, fastpeft.LoraConfig(**options))
    shake(ours)
    first = ours(ids).logits
    ours.add_adapter("b", fastpeft.LoraConfig(**{**options, "trainable_token_indices": [2, 5]}))
    ours.set_adapter("b")
    assert not torch.equal(ours(ids).logits, first)
    ours.set_adapter("default")
    assert_same_bits(ours(ids).logits, first)
    mixed = ours(ids.repeat(3, 1), adapter_names=["__base__", "default", "b"]).logits
    check(mixed[1:2].detach(), first.detach(), first.detach().double())
    ours.delete_adapter("b")
    assert not any(n.endswith(".b") or ".b." in n for n, _ in ours.named_parameters())
    assert ours.unload().state_dict().keys() == before.keys()
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_trained_tokens_that_make_no_sense_are_refused() -> None:
    for options, error, message in (
        ({"trainable_token_indices": [1], "modules_to_save": ["model.embed_tokens"]}, ValueError, "not in both"),
        ({"trainable_token_indices": [1], "target_modules": ["embed_tokens"]}, TypeError, "cannot be applied"),
        ({"trainable_token_indices": {"nothing": [1]}}, ValueError, "not found"),
        ({"trainable_token_indices": [31]}, ValueError, "has 30 rows"),
        (
            {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}, "ensure_weight_tying": True},
            ValueError, "Cannot ensure weight tying",
        ),
    ):  # fmt: skip
        model = llama()
        names = [n for n, _ in model.named_modules()]
        with pytest.raises(error, match=message):
            fastpeft.get_peft_model(model, fastpeft.LoraConfig(**{"target_modules": ["q_proj"], **options}))
        assert [n for n, _ in model.named_modules()] == names


# SHiRA, SuperTuning


def test_shira_with_a_mask_of_ones_own(tmp_path: Path) -> None:
    def diagonals(base: nn.Module, r: int) -> Tensor:
        weight: Any = base.weight
        mask = torch.zeros_like(weight).flatten()
        mask[: r * sum(weight.shape)] = 1
        return mask.view_as(weight)

    models = []
    for library in (fastpeft, peft):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = library.ShiraConfig(target_modules=["up"], r=2, mask_type="mine", init_weights=False)
        config.mask_fn = diagonals
        torch.manual_seed(1)
        models.append(library.get_peft_model(Net(), config).eval())
    ours, theirs = models
    check(ours(IDS).detach(), theirs(IDS).detach(), copy.deepcopy(theirs).double()(IDS).detach())
    ours.save_pretrained(tmp_path)
    check(load(fastpeft, tmp_path)(IDS).detach(), ours(IDS).detach(), copy.deepcopy(theirs).double()(IDS).detach())
    with pytest.warns(fastpeft.PeftWarning, match="is not known"):
        config = fastpeft.ShiraConfig(target_modules=["up"], mask_type="mine")
    with pytest.raises(ValueError, match=r"set `config\.mask_fn`"):
        fastpeft.get_peft_model(Net(), config)
    config = fastpeft.ShiraConfig(target_modules=["up"], r=1)
    config.mask_fn = lambda base, r, **_: torch.ones_like(base.weight)
    with pytest.raises(ValueError, match="has 240 ones, but r=1 asks for 32"):
        fastpeft.get_peft_model(Net(), config)
    with pytest.raises(ValueError, match="more than the 240"):
        fastpeft.get_peft_model(Net(), fastpeft.ShiraConfig(target_modules=["up"], r=9))


@pytest.mark.parametrize("value", [-1, 20])
def test_positions_outside_the_weight_are_refused(value: int, tmp_path: Path) -> None:
    make(fastpeft, "Shira", {"target_modules": ["up"], "r": 1}).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if "indices" in k)
    tensors[key][0, 3] = value
    save_file(tensors, file)
    with pytest.raises(KeyMismatchError, match="outside the weight's shape"):
        load(fastpeft, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tokens", [3, 400])
@pytest.mark.parametrize(
    ("name", "options"), [("Shira", {"r": 5}), ("Supertuning", {"sparsity": 0.8, "select_top": False})]
)
def test_sparse_updates_on_either_side(name: str, options: dict[str, Any], tokens: int, dtype: torch.dtype) -> None:
    """For few tokens S acts on activations, for many in the weight: as the dense layer does in float64."""
    torch.manual_seed(0)
    config = getattr(fastpeft, f"{name}Config")(target_modules=["0"], init_weights=False, **options)
    model = fastpeft.get_peft_model(nn.Sequential(nn.Linear(60, 50)).to(dtype), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    values = next(iter(trained(model).values()))
    x, dy = torch.randn(2, tokens, 60, dtype=dtype, requires_grad=True), torch.randn(2, tokens, 50, dtype=dtype)
    y = model(x)
    y.backward(dy)
    results = []
    for wide in (dtype, torch.float64):
        delta = layer.get_delta_weight("default").detach().to(wide)
        w = (layer.weight.detach().to(wide) + delta).requires_grad_()
        inputs = x.detach().to(wide).requires_grad_()
        out = F.linear(inputs, w, layer.bias.detach().to(wide))
        out.backward(dy.to(wide))
        results.append((out.detach(), inputs.grad, w.grad[delta != 0]))  # type: ignore[index]
    scale = dy.double().abs().mean() * max(60, tokens)  # terms of a sum
    order = torch.argsort(fastpeft_positions(layer))
    for mine, eager, exact in zip((y.detach(), x.grad, values.grad[order]), *results, strict=True):
        assert_no_worse(mine, eager, exact, (exact.abs().mean() + scale).expand(exact.shape))


def fastpeft_positions(layer: Any) -> Tensor:
    if hasattr(layer, "shira_indices"):
        rows, columns = layer.shira_indices["default"].long()
        return rows * layer.in_features + columns
    return layer.supertuning_indices["default"].long()


def test_sparse_products_in_double_precision_have_the_right_gradients() -> None:
    torch.manual_seed(0)
    indices = torch.randperm(30)[:11].int()
    values = torch.randn(11, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, v: sparse_linear(a, v, indices, (5, 6)), (x, values))


def test_supertuning_refuses_what_cannot_be() -> None:
    for options, error in (
        ({"sparsity": 1.0}, "sparsity must be in"), ({"r": 0}, "positive integer"), ({"lora_alpha": 2.0}, "explicit r"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=error):
            fastpeft.SupertuningConfig(**options)
    with pytest.raises(ValueError, match="leaves no trainable entries"):
        fastpeft.get_peft_model(Net(), fastpeft.SupertuningConfig(target_modules=["up"], sparsity=0.9999))


# AdaMSS


def test_adamss_clusters_as_scikit_learn_does() -> None:
    """What KMeans(5, init="random", n_init=1, max_iter=10, random_state=123456789) of scikit-learn 1.9 finds."""
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


# Tied weights


TIED: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": r".*(q_proj|embed_tokens)"},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize("options", TIED, ids=str)
def test_tied_layers_share_their_adapters(options: dict[str, Any], tmp_path: Path) -> None:
    ids = torch.arange(8)[None]
    options = {"r": 3, "ensure_weight_tying": True, "init_lora_weights": False, **options}
    models = []
    for library in (fastpeft, peft):
        torch.manual_seed(1)
        models.append(library.get_peft_model(llama(), library.LoraConfig(**options)).eval())
    ours, theirs = models
    state = {k: v + 0.1 for k, v in peft.get_peft_model_state_dict(theirs, save_embedding_layers=False).items()}
    mine = fastpeft.get_peft_model_state_dict(ours, save_embedding_layers=False)
    assert mine.keys() == state.keys()
    fastpeft.set_peft_model_state_dict(ours, state)
    wide = peft.get_peft_model(llama(), peft.LoraConfig(**options)).eval().double()  # PEFT's cannot be copied
    for model in (theirs, wide):
        peft.set_peft_model_state_dict(model, state)
    with torch.no_grad():
        exact = wide(ids).logits
        check(ours(ids).logits, theirs(ids).logits, exact)
    ours(ids).logits.square().sum().backward()
    saves = "modules_to_save" in options
    for model in (ours, fastpeft.get_peft_model(llama(), fastpeft.LoraConfig(**options)).double()):
        body = model.base_model.model
        if saves:
            head = body.lm_head.modules_to_save["default"].weight
            assert head is body.model.embed_tokens.modules_to_save["default"].weight
        else:
            up = body.lm_head.lora_B["default"].weight
            assert up.data_ptr() == body.model.embed_tokens.lora_embedding_A["default"].data_ptr()
    grads = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert all(g is not None for g in grads.values())
    ours.save_pretrained(tmp_path, save_embedding_layers=False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in (fastpeft, peft):
            loaded = library.PeftModel.from_pretrained(llama(), tmp_path).eval()
            check(loaded(ids).logits, theirs(ids).logits, exact)
        merged = fastpeft.PeftModel.from_pretrained(llama(), tmp_path).merge_and_unload()
        check(merged(ids).logits, theirs(ids).logits, exact)


def test_asking_for_tying_where_there_is_none_warns() -> None:
    for model, options, message in (
        (llama(False), {"target_modules": ["embed_tokens"]}, "were found in the model"),
        (llama(), {"target_modules": ["q_proj"]}, "are added in either"),
    ):
        with pytest.warns(fastpeft.PeftWarning, match=message):
            fastpeft.get_peft_model(model, fastpeft.LoraConfig(ensure_weight_tying=True, **options))
