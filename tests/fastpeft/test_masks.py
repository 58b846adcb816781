"""Masks as ranges of keys: what a query sees is what transformers' masks say, and no mask is made where ours serve."""

from __future__ import annotations

import copy
import gc
import itertools
import runpy
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

import fastpeft
from fastpeft.apps.training.data import Example
from fastpeft.apps.training.forward import CompletionLoss
from fastpeft.apps.training.packing import collate
from fastpeft.families import masking as ours
from fastpeft.families.masks import LazyMask, Masks
from forms import by_form, matrix
from transformers import DataCollatorWithFlattening
from transformers import masking_utils as masking
from transformers.cache_utils import DynamicCache

from peft_kernels.testing import assert_no_worse

_tools = runpy.run_path(str(Path(__file__).with_name("families_tools.py")))
FAMILIES, adapted, exactly, tiny = (_tools[name] for name in ("FAMILIES", "adapted", "exactly", "tiny"))
LENGTHS = (5, 1, 9, 4)  # of documents, with a window of 5
# They run on over documents: states, and keys of several tokens.
STATES = {"falcon_h1", "nemotron_h", "lfm2", "lfm2_moe", "mamba", "qwen3_5", "qwen3_5_moe", "qwen3_next", "deepseek_v4"}


def served(**options: Any) -> tuple[Any, Any, Any]:
    """An accelerated model, its configuration, and one that is equal but not served."""
    model = tiny("mistral")
    for name, value in options.items():
        setattr(model.config, name, value)
    plain = copy.deepcopy(model.config)
    fastpeft.accelerate(model)
    return model, model.config, plain


PADDING = {"none": None, "whole": (0, 0), "left": (3, 0), "right": (0, 4), "both": (2, 3), "all": (11, 0)}
MAKERS = ("create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask",
          "create_bidirectional_mask", "create_bidirectional_sliding_window_mask")  # fmt: skip


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_ranges_are_what_the_masks_say(name: str, attention: str) -> None:
    """Of each kind of mask, padding and cache; None where transformers has None."""
    _model, config, plain = served(attention_chunk_size=4, _attn_implementation=attention)
    for padding, past, tokens in itertools.product(PADDING, (0, 6), (11, 1)):
        attended = None
        if PADDING[padding] is not None:
            attended = torch.ones(2, past + tokens, dtype=torch.long)
            left, right = PADDING[padding]
            attended[0, :left] = 0
            attended[0, past + tokens - right :] = 0
        cache = None
        if past:
            cache = DynamicCache(config=plain)
            for layer in range(2):
                cache.update(*(torch.zeros(2, 2, past, 16) for _ in range(2)), layer)
        found, right_one = (getattr(masking, name)(
            config=which, inputs_embeds=torch.zeros(2, tokens, 64), attention_mask=attended, past_key_values=cache,
        ) for which in (config, plain))  # fmt: skip
        assert (found is None) == (right_one is None)
        if found is None:
            continue
        assert type(found) is LazyMask, (padding, past, tokens)
        assert (found.shape, found.dtype) == (right_one.shape, right_one.dtype)
        keys = torch.arange(found.shape[-1])
        spans = found._seen.spans
        seen = (keys >= spans[..., :1]) & (keys < spans[..., 1:])
        assert torch.equal(seen.expand(2, -1, -1), (right_one if attention == "sdpa" else right_one == 0)[:, 0])
        assert found._made is None
        assert torch.equal(found + 0, right_one + 0)
        assert found._made is not None


@pytest.mark.parametrize(("family", "without"), [("gemma2", True), ("gpt_oss", True), ("bloom", False),
                                                  ("mistral", False)])  # fmt: skip
def test_one_query_of_eager_attention(family: str, without: bool) -> None:
    """Goes without a mask where the family's own code adds one only where it is given one, and nothing is padded."""
    model = tiny(family)
    model.config._attn_implementation = "eager"
    fastpeft.accelerate(model)
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 6, 16), torch.zeros(1, 2, 6, 16), 0)
    for tokens, padded in itertools.product((1, 3), (0, 2)):
        attended = torch.ones(1, 6 + tokens, dtype=torch.long)
        attended[:, :padded] = 0
        found = masking.create_causal_mask(
            config=model.config, inputs_embeds=torch.zeros(1, tokens, 64), attention_mask=attended,
            past_key_values=cache,
        )  # fmt: skip
        assert (found is None) == (without and tokens == 1 and not padded)


def positions(*lengths: int) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.mark.parametrize("name", MAKERS[:3])
def test_documents_of_a_packed_row(name: str) -> None:
    _model, config, plain = served(attention_chunk_size=4)
    rows = torch.cat((positions(*LENGTHS), positions(7, 12)))
    for given in (rows, rows[:1]):
        found, right = (getattr(masking, name)(
            config=which, inputs_embeds=torch.zeros(2, 19, 64), attention_mask=None, past_key_values=None,
            position_ids=given,
        ) for which in (config, plain))  # fmt: skip
        assert type(found) is LazyMask
        keys, spans = torch.arange(19), found._seen.spans
        assert torch.equal(((keys >= spans[..., :1]) & (keys < spans[..., 1:])).expand(2, -1, -1), right[:, 0])


def test_what_is_no_range_is_transformers_mask() -> None:
    _model, config, plain = served()
    holes = torch.ones(2, 11, dtype=torch.long)
    holes[0, 4:6] = 0
    blocks = torch.full((2, 11), -1)
    more: tuple[dict[str, Any], ...] = (
        {"attention_mask": holes}, {"block_sequence_ids": blocks},
        {"and_mask_function": lambda b, h, q, k: k != 3}, {"or_mask_function": lambda b, h, q, k: k == 3},
    )  # fmt: skip
    for each in more:
        given = {"inputs_embeds": torch.zeros(2, 11, 64), "attention_mask": None, "past_key_values": None} | each
        found, right = (masking.create_causal_mask(config=which, **given) for which in (config, plain))
        assert type(found) is Tensor
        assert torch.equal(found, right)


class Squares(TorchDispatchMode):
    """Notes functions that make a tensor with an entry for each query and key."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.seen = tokens, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if type(t) is Tensor and (t.shape.count(self.tokens) > 1 or max(t.shape, default=0) >= self.tokens**2):
                self.seen.add(str(func))
        return out


def step(model: Any, ids: Tensor, given: dict[str, Tensor], watch: Any = None) -> tuple[Tensor, Tensor]:
    """Logits, and gradients of what trains, made under `watch`."""
    model.zero_grad()
    with watch or nullcontext():
        logits = model(input_ids=ids, use_cache=False, **given).logits
        logits.square().sum().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def largest(fast: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The largest error is no worse than that of transformers' own code."""
    worst = [(t.double() - exact).abs().max().reshape(1) for t in (fast, plain)]
    zero = torch.zeros(1, dtype=torch.float64)
    assert_no_worse(worst[0].to(fast.dtype), worst[1].to(fast.dtype), zero, exact.abs().max().reshape(1))


@pytest.mark.parametrize("name", matrix(sorted(set(FAMILIES) - STATES), ("gemma2", "falcon")))
def test_a_packed_row_is_its_documents_apart(name: str) -> None:
    """Forward and backward, windows shorter than the documents, with no tensor of T x T elements."""
    torch.manual_seed(0)
    model = adapted(tiny(name), "dense", "lora").train()
    lengths = [n * 7 for n in LENGTHS]  # in all a number that no other size is
    ids = torch.randint(3, 97, (1, sum(lengths)))
    given = {"position_ids": positions(*lengths)}
    plain = step(model, ids, given)
    with exactly(model) as exact_model:
        apart = [step(exact_model, part, {}) for part in ids.split(lengths, 1)]
    exact = torch.cat([logits for logits, _ in apart], 1), sum(grads for _, grads in apart)
    report = fastpeft.accelerate(model)
    squares = Squares(sum(lengths))
    fast = step(model, ids, given, squares)
    for one, other, right in zip(fast, plain, exact, strict=True):
        largest(one, other, right)
    stays = any(part == "attention" for part, _ in report.stays)  # as transformers' code, which gets the mask
    assert bool(squares.seen) == stays
    report.remove()


def test_a_long_packed_row_makes_no_mask() -> None:
    """A mask of 16,384 tokens is 1 GiB in float32."""
    tokens = by_form(short=2048, full_form=16384)
    ids, place = torch.randint(3, 97, (1, tokens)), torch.arange(tokens)
    squares = Squares(tokens)
    # Padding before a row, or as long as the window behind it, leaves queries that see nothing. Gemma 2's attention, by
    # a mask of numbers, makes something of them: it is the model's own then.
    for name, seen in (("gemma2", place < tokens - 4), ("mistral", place >= 100)):
        model = tiny(name, layers=2)
        fastpeft.accelerate(model)
        model.get_input_embeddings().weight.requires_grad_()
        step(model, ids, {"position_ids": positions(*[tokens // 8] * 8)}, squares)
        step(model, ids, {"attention_mask": seen.long()[None]}, squares)
    assert squares.seen == set()


def test_training_and_collators_of_others_pack_by_boundaries() -> None:
    """`fastpeft train`, and transformers' Trainer with DataCollatorWithFlattening (TRL's padding_free)."""
    torch.manual_seed(0)
    model = tiny("mistral")
    documents = [torch.randint(3, 97, (n,)).tolist() for n in LENGTHS]
    given = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": ids} for ids in documents])
    batch = collate([[Example(ids, [True] * len(ids)) for ids in documents]], 0)

    def losses(of: Any) -> tuple[Tensor, Tensor]:
        return CompletionLoss(of)(batch), of(**given, use_cache=False).loss

    plain = losses(model)
    with exactly(model) as exact_model:
        exact = losses(exact_model)
    fastpeft.accelerate(model, loss=True)
    squares = Squares(sum(LENGTHS))
    with squares:
        fast = losses(model)
    for three in zip(fast, plain, exact, strict=True):
        largest(*three)
    assert squares.seen == set()


def packed_logits(model: Any) -> Tensor:
    ids = torch.randint(3, 97, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = model(ids, use_cache=False, position_ids=positions(*LENGTHS)).logits
    return found


def exact_logits(model: Any) -> Tensor:
    with exactly(model) as exact_model:
        return packed_logits(exact_model)


def test_layers_with_code_of_their_own_get_the_real_mask() -> None:
    torch.manual_seed(0)
    model = tiny("gemma2")
    plain, exact = packed_logits(model), exact_logits(model)
    fastpeft.accelerate(model)
    attention = model.model.layers[1].self_attn
    attention.config = copy.copy(model.config)
    for asked in ("sdpa", "eager"):
        attention.config._attn_implementation = asked  # of one layer
        largest(packed_logits(model), plain, exact)
    attention.train()
    attention.attention_dropout = 1e-9  # drops nothing
    largest(packed_logits(model), plain, exact)


@pytest.fixture
def no_others() -> Iterator[None]:
    """No other accelerated model lives, whatever tests of other files have left."""
    others = dict(ours._served)
    ours._served.clear()
    ours._remove()
    yield
    ours._served.update(others)
    if others:
        ours._install()


@pytest.mark.usefixtures("no_others")
def test_models_that_share_a_configuration() -> None:
    torch.manual_seed(0)
    one = tiny("mistral")
    other, third = type(one)(one.config), type(one)(one.config)
    for model in (other, third):
        model.load_state_dict(one.state_dict())
    assert other.config is one.config
    plain, exact = packed_logits(one), exact_logits(one)
    reports = [fastpeft.accelerate(model) for model in (one, other)]
    for model in (one, other, third):
        largest(packed_logits(model), plain, exact)
    reports[0].remove()
    for model in (one, third):
        assert torch.equal(packed_logits(model), plain)
    with Squares(sum(LENGTHS)) as squares:
        largest(packed_logits(other), plain, exact)
    assert squares.seen == set()
    assert masking.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is not masking.sdpa_mask
    reports[1].remove()
    assert masking.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is masking.sdpa_mask


@pytest.mark.usefixtures("no_others")
def test_nothing_is_left_of_a_model_that_is_gone() -> None:
    model, _config, _plain = served()
    del model, _config
    gc.collect()
    assert masking.ALL_MASK_ATTENTION_FUNCTIONS["eager"] is masking.eager_mask


def test_copies_learn_of_it() -> None:
    """At their first mask; weights that are the same give the same bits."""
    model = tiny("mistral")
    fastpeft.accelerate(model)
    copied = copy.deepcopy(model)
    right = packed_logits(model)
    for made in (True, False):
        with Squares(sum(LENGTHS)) as squares:
            assert torch.equal(packed_logits(copied), right)
        assert bool(squares.seen) == made


def test_a_mask_that_somebody_writes_to() -> None:
    _model, config, _plain = served()
    mask = masking.create_causal_mask(config, torch.zeros(1, 19, 64), None, None, positions(*LENGTHS))
    found = Masks()
    assert found.seen(mask, 19, True) == mask._seen
    mask[..., 18, 17] = False
    seen = found.seen(mask, 19, True)
    assert seen is not None
    assert seen.keep is not None
    assert not seen.keep[0, 18, 17]


@pytest.mark.full_form
@pytest.mark.parametrize("layers", [False, True])
def test_compiled_models_and_layers(layers: bool) -> None:
    """The whole in a graph, which makes its own mask, and layers in one each, which get one from outside."""
    torch.manual_seed(0)
    model = tiny("gemma2")
    plain, exact = packed_logits(model), exact_logits(model)
    fastpeft.accelerate(model)
    torch._dynamo.reset()
    if layers:
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        largest(packed_logits(compiled), plain, exact)
    torch._dynamo.reset()


def test_a_static_cache_without_padding() -> None:
    """Its first call has no mask, fewer queries than keys, and a causal order from the first key on."""
    torch.manual_seed(0)
    model = tiny("llama")
    given = {"input_ids": torch.randint(3, 97, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    right = model.generate(**given, **options)
    fastpeft.accelerate(model)
    assert torch.equal(model.generate(**given, **options), right)
