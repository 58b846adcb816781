"""`accelerate` where Triton serves: values in its interpreter (and on a GPU), launches of a layer on tensors without
memory, and the reasons that are shown where a layer keeps its own code.

The interpreter is chosen when Triton is imported, so `test_in_the_interpreter` starts this same file in a process of
its own; what is marked `on_device` runs there, and on a GPU where there is one.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("triton", reason="Triton is not installed")

import fastpeft
from fastpeft.apps.training import models
from fastpeft.families.projections import Given, Linears, in_one_call
from fastpeft.families.ways import BY_CHOICE, known_ways, ways_of
from fastpeft.weights.nf4_linear import NF4Linear
from forms import matrix
from interpreter_tools import DEVICE, not_interpreted, on_device, run_in_the_interpreter
from launch_tools import kernels_run, launches, meta_is_a_gpu
from transformers import CTRLConfig, CTRLLMHeadModel, LlamaConfig, LlamaForCausalLM

from peft_kernels import BackendUnavailable, dispatch, use_backend
from peft_kernels.testing import assert_no_worse

F32, BF16 = torch.float32, torch.bfloat16


@not_interpreted
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, "device")


def llama(dtype: torch.dtype, device: str, **sizes: int) -> LlamaForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2} | sizes
    config = LlamaConfig(num_hidden_layers=1, vocab_size=61, pad_token_id=0, eos_token_id=None, **sizes)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).requires_grad_(False)


def adapted(dtype: torch.dtype, nf4: bool, **options: Any) -> fastpeft.PeftModel:
    model = llama(dtype, "cpu")
    for p in model.parameters():  # larger than the usual start, so that mistakes are larger than rounding
        nn.init.normal_(p, std=0.2)
    if nf4:
        fastpeft.quantize_model(model, "nf4", double_quant=True, skip=["lm_head"])
    model = fastpeft.get_peft_model(model, fastpeft.LoraConfig(r=4, target_modules="all-linear", **options))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model.to(DEVICE)


def trained(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """The loss and every gradient; dropout draws the same masks each time."""
    torch.manual_seed(3)
    model.train().zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach().reshape(1), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])]


def exactly(model: nn.Module, ids: Tensor) -> list[Tensor]:
    with use_backend("reference"):
        return trained(copy.deepcopy(model).double(), ids)


def compare(fast: list[Tensor], plain: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """assert_no_worse of the largest errors: an element is one of many sums."""
    for ours, theirs, right in zip(fast, plain, exact, strict=True):
        worst = [(t.double() - right).abs().max().reshape(1) for t in (ours, theirs)]
        zero = torch.zeros_like(worst[0])
        assert_no_worse(worst[0].to(dtype), worst[1].to(dtype), zero, right.abs().max().reshape(1))


# Of one layer and the last norm. The embeddings are frozen: the first norm's input has no gradient, nor has q's.
STACKED = {
    "lora_linear_stacked.stacked_forward": 2, "lora_linear_stacked.stacked_backward": 1, "gated.forward": 2,
    "gated.backward": 1, "norms.norm": 3, "norms.norm_backward": 2,
}  # fmt: skip
CASES = {
    "nf4 bfloat16": (BF16, True, {}, False, STACKED),
    "nf4 bfloat16 dropout": (BF16, True, {"lora_dropout": 0.3}, False, STACKED),
    "nf4 float32": (F32, True, {}, False, STACKED),
    "dense bfloat16": (BF16, False, {}, False, STACKED),
    "dense float32": (F32, False, {}, False, STACKED),
    # the layer runs once more, and its input wants a gradient
    "checkpointing": (BF16, True, {"lora_dropout": 0.3}, True, STACKED | {
        "lora_linear_stacked.stacked_forward": 4, "lora_linear_stacked.stacked_backward": 2, "gated.forward": 3,
        "norms.norm": 5, "norms.norm_backward": 3}),
    "dora": (BF16, True, {"use_dora": True}, False, {
        "gated.forward": 1, "gated.backward": 1, "norms.norm": 3, "norms.norm_backward": 2}),
}  # fmt: skip


@on_device
@pytest.mark.parametrize("name", matrix(CASES, ["nf4 float32"]))
def test_device_training(name: str) -> None:
    """Loss and gradients as transformers' own layers give them on the reference, by the kernels that are named."""
    dtype, nf4, options, checkpointing, kernels = CASES[name]
    model, ids = adapted(dtype, nf4, **options), torch.randint(1, 61, (1, 7), device=DEVICE)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with use_backend("reference"):
        plain = trained(model, ids)
    exact = exactly(model, ids)
    with use_backend("triton"), kernels_run() as seen:
        report = fastpeft.accelerate(model)
        fast = trained(model, ids)
        assert report.served["norms", "rms_norm (triton)"] == 3
        assert [why for _, why in report.stays if why in BY_CHOICE.values()] == [BY_CHOICE["attention"]]
    compare(fast, plain, exact, dtype)
    assert {kernel: n for kernel, n in seen.items() if kernel in STACKED} == kernels


@on_device
@pytest.mark.parametrize("nf4", matrix([True, False], [False]))
def test_device_generating(nf4: bool) -> None:
    """Prefill and tokens with the cache, a padded row among them, with the adapters and without."""
    model = adapted(F32, nf4).eval()
    ids = torch.randint(1, 61, (2, 5), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 2, "do_sample": False}
    with use_backend("reference"):
        want = model.generate(**given)
        with model.disable_adapter():
            without = model.generate(**given)
    with use_backend("triton"), kernels_run() as seen:
        fastpeft.accelerate(model)
        assert torch.equal(model.generate(**given), want)
        assert seen["lora_linear_stacked.stacked_forward"] == 2 * 2
        assert seen["gated.forward"] == 2
        with model.disable_adapter():
            assert torch.equal(model.generate(**given), without)


def large(adapter: dict[str, Any] | None, targets: Any = "all-linear") -> nn.Module:
    """A layer of Llama-3-8B's sizes on NF4 without memory."""
    model = llama(BF16, "meta", hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
                  num_key_value_heads=8)  # fmt: skip
    for part in (model.model.layers[0].self_attn, model.model.layers[0].mlp):
        for name, linear in list(part.named_children()):
            if type(linear) is nn.Linear:
                setattr(part, name, NF4Linear.empty(linear.in_features, linear.out_features, dtype=BF16))
    if adapter is not None:
        model = fastpeft.get_peft_model(model, fastpeft.LoraConfig(r=16, target_modules=targets, **adapter))
    return model.to("meta")


def step(model: nn.Module, tokens: int) -> tuple[Counter[str], Counter[str]]:
    """Launches of the first layer, forward and backward."""
    x = torch.empty(1, tokens, 4096, device="meta", dtype=BF16, requires_grad=True)
    turn = (torch.empty(1, tokens, 128, device="meta", dtype=BF16),) * 2
    model.zero_grad()
    with launches() as seen:
        y = model.get_base_model().model.layers[0](x, position_embeddings=turn)
        forward = Counter(seen)
        y.backward(torch.empty_like(y))
    return forward, seen - forward


def token(model: nn.Module) -> Counter[str]:
    """Launches of the first layer for a token with 16 before it in the cache."""
    from transformers import DynamicCache

    layer, turn = model.get_base_model().model.layers[0], (torch.empty(1, 1, 128, device="meta", dtype=BF16),) * 2
    past = DynamicCache()
    with torch.no_grad():
        past.update(*(torch.empty(1, 8, 16, 128, device="meta", dtype=BF16) for _ in range(2)), 0)
        with launches() as seen:
            layer(torch.empty(1, 1, 4096, device="meta", dtype=BF16), position_embeddings=turn, past_key_values=past)
    return seen


# Torch's attention between our kernels: its rotation of q and k, and the two sums around attention and MLP.
ROTATION = {"mul": 4, "neg": 2, "cat": 2, "add": 4, "attention": 1}
ROTATION_BACK = {"mul": 4, "neg": 2, "slice_backward": 4, "clone": 2, "attention_backward": 1}
OWN_NORMS = {"_to_copy": 4, "pow": 2, "mean": 2, "add": 2, "rsqrt": 2, "mul": 4}  # of transformers: eight launches each
OWN_NORMS_BACK = {"_to_copy": 4, "mul": 14, "pow": 4, "sum": 2, "div": 2, "add": 4}
PANELS = {"lora_linear.decode": 28, "addmm_": 28}  # of all weights, from 2048 rows on
PANELS_BACK = {"lora_linear.decode": 29, "addmm_": 29}
LAUNCHES: dict[int, list[Counter[str]]] = {
    512: [
        Counter(ROTATION) + Counter(OWN_NORMS) + Counter({
            "lora_linear.project": 7, "lora_linear.forward": 7, "silu": 1, "mul": 1}),
        Counter(ROTATION_BACK) + Counter(OWN_NORMS_BACK) + Counter({
            "lora_linear.outer": 14, "lora_linear.backward": 7, "lora_linear.reduce": 21, "silu_backward": 1, "mul": 2,
            "add": 7}),
        Counter(ROTATION) + Counter({  # cat, contiguous: a stack's A's side by side, and its S apart again
            "norms.norm": 2, "lora_linear_stacked.stacked_forward": 2, "lora_linear.forward": 2,
            "lora_linear.project": 4, "gated.forward": 1, "cat": 2, "contiguous": 5}),
        Counter(ROTATION_BACK) + Counter({
            "norms.norm_backward": 2, "lora_linear_stacked.stacked_backward": 2, "lora_linear.backward": 2,
            "lora_linear.outer": 11, "lora_linear.reduce": 18, "gated.forward": 1, "gated.backward": 1, "add": 6,
            "cat": 2, "copy_": 5}),
    ],
    4096: [
        Counter(ROTATION) + Counter(OWN_NORMS) + Counter(PANELS) + Counter({
            "lora_linear.project": 7, "lora_linear.forward": 7, "silu": 1, "mul": 1}),
        Counter(ROTATION_BACK) + Counter(OWN_NORMS_BACK) + Counter(PANELS_BACK) + Counter({
            "lora_linear.outer": 14, "lora_linear.backward": 7, "lora_linear.reduce": 21, "silu_backward": 1, "mul": 2,
            "add": 7}),
        Counter(ROTATION) + Counter(PANELS) + Counter({
            "norms.norm": 2, "lora_linear.forward": 7, "lora_linear.project": 4,
            "gated.forward": 1, "cat": 2, "contiguous": 5}),
        Counter(ROTATION_BACK) + Counter(PANELS_BACK) + Counter({
            "norms.norm_backward": 2, "lora_linear.backward": 7, "lora_linear.outer": 11,
            "lora_linear.reduce": 20, "gated.forward": 1, "gated.backward": 1, "add": 6, "cat": 2, "copy_": 5}),
    ],
}  # fmt: skip


@not_interpreted
def test_launches_of_a_layer() -> None:
    """A layer of Llama-3-8B with LoRA on all its linear layers: as it was, forward and backward, then quicker.

    `reduce`: outer products are summed over parts of the rows, those with dS twice; so is dx, with panels.
    """
    model = large({}).train()
    with meta_is_a_gpu():
        step(model, 512)  # makes tables that stay
        own = {m: step(model, m) for m in LAUNCHES}
        fastpeft.accelerate(model)
        for m, expected in LAUNCHES.items():
            assert [*own[m], *step(model, m)] == expected, m
    totals = {m: [c.total() for c in counts] for m, counts in LAUNCHES.items()}
    assert totals == {512: [45, 95, 31, 63], 4096: [101, 153, 90, 126]}


@not_interpreted
def test_launches_of_a_token() -> None:
    """Decoding: a layer's token with a cache."""
    model = large({}).eval()
    with meta_is_a_gpu():
        token(model)
        own = token(model)
        fastpeft.accelerate(model)
        fast = token(model)
    cache = Counter({"cat": 2})
    assert own == cache + Counter(ROTATION) + Counter(OWN_NORMS) + Counter({
        "lora_linear.project": 7, "lora_linear.forward": 7, "silu": 1, "mul": 1})  # fmt: skip
    assert fast == cache + Counter({
        "norms.norm": 2, "lora_linear_stacked.stacked_forward": 2, "lora_linear.forward": 2,
        "lora_linear.project": 4, "gated.forward": 1, "attention": 1, "add": 2,
        "cat": 2 + 1, "mul": 1, "addcmul_": 2})  # A's of two stacks; the rotation  # fmt: skip
    assert (own.total(), fast.total()) == (47, 22)


@not_interpreted
def test_reasons_are_shown() -> None:
    """Lines of `train`, `generate` and `serve` (`models.speed_up`), and the report's, where layers keep their code."""
    assert models.speed_up(CTRLLMHeadModel(CTRLConfig(n_layer=1, n_embd=8, n_head=2, dff=8, vocab_size=7))) == [
        "nothing to accelerate: CTRLLMHeadModel: no layer of a described family (docs/families.md)"
    ]
    (line,) = models.speed_up(llama(F32, "meta"))
    assert "no layer is quicker on meta in float32: no kernel serves" in line
    with meta_is_a_gpu():
        assert models.speed_up(large({})) == []
        assert models.speed_up(large({"use_dora": True}, ["q_proj", "down_proj"])) == [
            "1 q, k and v as they were: q_proj: no single plain LoRA is active: Dora",
            "1 MLPs as they were: down_proj: no single plain LoRA is active: Dora",
        ]
        model = large({})
        report = fastpeft.accelerate(model)
        listener = model.get_base_model().model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
        assert report.stays == {("attention", BY_CHOICE["attention"]): 1,
                                ("MLPs", "up_proj: hooks listen to its calls"): 1}  # fmt: skip
        listener.remove()
        model.disable_adapter_layers()
        assert report.stays["q, k and v", "q_proj: its adapters are disabled"] == 1
        assert report.shortfalls == ["1 q, k and v as they were: q_proj: its adapters are disabled",
                                     "1 MLPs as they were: gate_proj: its adapters are disabled"]  # fmt: skip


@not_interpreted
def test_patch_takes_them_to_layers_of_peft() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(BF16, "meta"), peft.LoraConfig(r=4, target_modules="all-linear")).to("meta")
    with meta_is_a_gpu():
        report = fastpeft.patch(model, layers=True)
        assert report.more.served["q, k and v", "lora_linear_stacked (triton)"] == 1
        assert report.more.shortfalls == []
        assert "1 attention as they were: torch's own attention is taken on a GPU" in str(report)
        fastpeft.unpatch(model)


@not_interpreted
def test_a_gpu_without_triton_keeps_the_models_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    model = large({})
    classes = [type(m) for m in model.modules()]
    with meta_is_a_gpu():
        monkeypatch.setattr(dispatch, "_installed", lambda package: False)
        (line,) = models.speed_up(model)
        assert "triton needs the package triton, which is not installed" in line
        report = fastpeft.accelerate(model, loss=True)
        assert report.losses == 1
        assert (report.modules, len(report.reasons)) == (0, 1)
        assert report.reasons[0] in str(report)
        report.remove()
    assert [type(m) for m in model.modules()] == classes


@not_interpreted
def test_the_ways_follow_the_backends_that_serve() -> None:
    x = torch.zeros(2, 3)
    plain = ways_of(x)
    asked = known_ways(x.device, x.dtype)
    parts = ("norm", "stack", "mlp", "attention", "head", "launches")
    assert [getattr(plain, part) for part in parts] == [True] * 5 + [False]
    assert [getattr(asked, part) for part in parts] == [True] * 5 + [False]
    with use_backend("reference"):
        assert [getattr(ways_of(x), part) for part in parts] == [True] * 5 + [False]
    with meta_is_a_gpu():
        gpu = known_ways(torch.device("meta"), BF16)
        assert [getattr(gpu, part) for part in parts] == [True] * 3 + [False] * 2 + [True]
        double = known_ways(torch.device("meta"), torch.float64)
        assert not double.any
        assert "triton does not serve torch.float64" in double.why_none()


@not_interpreted
def test_a_forced_backend_that_cannot_serve_says_so() -> None:
    """Not the model's own code in silence."""
    model = llama(F32, "cpu")
    fastpeft.accelerate(model)
    with use_backend(rms_norm="cuda"), pytest.raises(BackendUnavailable, match="rms_norm has no cuda backend"):
        model(input_ids=torch.ones(1, 3, dtype=torch.int64))


@not_interpreted
def test_given_answers_once_for_its_own_input() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.scale = nn.Linear(64, 2), nn.Linear(64, 2), 3.0

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.scale
            return torch.stack((self.a(x), self.a(x), self.b(x + 1), self.b(x)))

    module, x, calls = Two(), torch.randn(4, 64), []
    of = Linears()
    of.call = calls.append
    assert in_one_call(module, ("a", "b"), x, of) == {}, "layers that are called as modules"
    fastpeft.quantize_model(module, "nf4")
    one, two = torch.zeros(4, 2), torch.ones(4, 2)

    def call(x: Tensor, *layers: Any) -> list[Tensor]:
        calls.append(x)
        return [one, two]

    of.call = call
    others = in_one_call(module, ("a", "b"), x, of)
    assert not calls, "nobody asked yet"
    assert others["a"].weight is module.a.weight
    found = Two.forward(Given(module, others), x)
    assert len(calls) == 1
    assert torch.equal(found[0], one)
    assert torch.equal(found[1], module.a(x)), "a second call is the layer's"
    assert torch.equal(found[2], module.b(x + 1)), "so is that of another input"
    assert torch.equal(found[3], two)
    assert module.seen == 3.0
