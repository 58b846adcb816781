"""The calls of the corpus: every entry point of the C ABI over small, odd and edge shapes, drawn from a seed.

`record(path, full)` makes the calls through the native binding and writes them down.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dora_tools
import torch
from abi_corpus import Recorder, entry_points
from abi_refused import refused
from format_cases import of_formats
from lora_tools import BF16, F32, FLOATS, Case, Stack, make
from mixture_tools import make_mixture
from multi_tools import make_multi
from rotation_tools import make_blocks, skew_blocks
from torch import Tensor

import peft_kernels as pk
from peft_kernels import adamw, native, softmax_slice
from peft_kernels.ops import butterfly_linear, butterfly_rotate, cayley, dora_linear, householder_rotate, pair_rotate
from peft_kernels.ops import grouped_linear as grouped
from peft_kernels.ops import lora_linear as lora
from peft_kernels.ops import lora_linear_stacked as stacked
from peft_kernels.ops import lora_mixture as mixture
from peft_kernels.ops import multi_lora_linear as multi
from peft_kernels.ops.lora_linear.native import pack

SEED = 18
# Columns and rows around the widths of registers, panels and chunks; ranks up to 300.
SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 130, 200, 257)
WHOLE = (32, 64, 128, 192, 256)  # columns of whole blocks: decoded in place
ROWS = (0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 33, 65)
RANKS = (0, 1, 2, 4, 7, 8, 9, 16, 17, 31, 33, 64, 65, 100, 300)
SPECIAL = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1e-40, 3e38, -3e38, 65504.0)


class Draw(random.Random):
    """Random numbers for a maker's `turn`-th call."""

    def __init__(self, seed: str, turn: int) -> None:
        super().__init__(seed)
        self.turn = turn



def numbers(rng: Draw, *shape: int, dtype: torch.dtype = F32, special: float = 0.1) -> Tensor:
    """Normal numbers; with the probability `special` some of them are infinite, NaN, subnormal or as large as can be.
    Sometimes at an odd place of a longer tensor."""
    count, ahead = torch.Size(shape).numel(), rng.choice((0, 0, 1, 3))
    t = torch.randn(count + ahead).to(dtype)
    if count and rng.random() < special:
        for _ in range(3):
            t[ahead + rng.randrange(count)] = rng.choice(SPECIAL)
    return t[ahead:].view(shape)


def draw(rng: Draw, **given: Any) -> Case:
    """One call of lora_linear; `given` over what is drawn."""
    quant = rng.choice(("nf4", "fp4", "dense", "nf4"))
    m, n = rng.choice(ROWS), rng.choice(SIZES)
    k = rng.choice(WHOLE if rng.random() < 0.5 else SIZES)
    if m > 20 or rng.random() < 0.1:
        n, k = min(n, 96), min(k, 130)
    options = {
        "dtype": rng.choice(FLOATS), "quant": quant, "blocksize": rng.choice((32, 64, 64, 128, 256, 4096)),
        "nested": rng.random() < 0.4, "w_dtype": rng.choice(FLOATS), "r": rng.choice(RANKS),
        "ab": rng.choice(FLOATS), "p": rng.choice((0.0, 0.0, 0.1, 0.9)), "bias": rng.random() < 0.5,
        "seed": rng.randrange(2**20), **given,
    }  # fmt: skip
    if rng.random() < 0.08:
        n, k = rng.choice(((0, k), (n, 0)))
    m, n, k = (options.pop(name, size) for name, size in (("m", m), ("n", n), ("k", k)))
    options["nested"] = options["nested"] and n * k > 0  # without blocks there is nothing to nest
    return make(m, n, k, **options)


def of_lora(rng: Draw) -> None:
    c = draw(rng)
    _, s = c.forward(lora.forward_op.op)
    c.backward(lora.backward_op.op, s if c.a is not None else None)
    paths = torch.zeros(1, dtype=torch.int64)
    flat = (*c.weight, c.n, c.a, c.b, c.scaling, c.bias, c.p, c.seed)
    if len(c.x):
        native.cpu().pk_cpu_lora_linear_paths(pack(1, c.x, *flat, s=s), 1, rng.randrange(len(c.x)), paths.data_ptr())


def of_stack(rng: Draw) -> None:
    first = draw(rng)
    m, k = first.x.shape
    others = [draw(rng, m=m, k=k, dtype=first.x.dtype) for _ in range(rng.choice((1, 2, 4)))]
    stack = Stack([first, *others])
    found = stack.forward(stacked.forward_op.op)
    stack.backward(stacked.backward_op.op, found[len(stack.cases) :], rng.random() < 0.8, rng.random() < 0.8)


def of_dora(rng: Draw) -> None:
    c = draw(rng, r=rng.choice(RANKS[1:]), n=rng.choice(SIZES))
    gain = dora_tools.make_gain(c.n)
    _, h, s = dora_tools.forward(c, gain, dora_linear.forward_op.op)
    dora_tools.backward(c, gain, h, s, dora_linear.backward_op.op)
    dora_tools.norm_op.squares_op.op(*c.weight, c.n, c.x.shape[1])
    dora_tools.norm_op.norm_op.op(*dora_tools.norm_args(c))


def of_multi(rng: Draw) -> None:
    base = draw(rng, r=0)
    ranks = [rng.choice((0, 1, 3, 8, 17)) for _ in range(rng.choice((0, 1, 2, 5)))]
    m, k = base.x.shape
    p = rng.choice((0.0, 0.0, 0.3))
    case = make_multi(m, base.n, k, ranks, ab=rng.choice(FLOATS), max_rank=max(ranks, default=0) + rng.choice((0, 2)),
                      dtype=base.x.dtype, quant="nf4", bias=base.bias is not None, p=p)  # fmt: skip
    _, s = case.forward(multi.forward_op.op)
    case.backward(multi.backward_op.op, s, rng.random() < 0.8, rng.random() < 0.8)


def of_mixture(rng: Draw) -> None:
    base = draw(rng, r=0)
    m, k = base.x.shape
    case = make_mixture(m, base.n, k, rng.choice((1, 2, 3, 8)), rng.choice((0, 1, 3, 8, 17)), ab=rng.choice(FLOATS),
                        zeros=rng.choice(("", "some", "top", "first", "all")), masked=rng.random() < 0.5)  # fmt: skip
    case.base = base  # drawn with dropout and without
    _, s = case.forward(mixture.forward_op.op)
    case.backward(mixture.backward_op.op, s, *(rng.random() < 0.8 for _ in range(3)))


def of_groups(rng: Draw) -> None:
    base = draw(rng, p=0.0)
    groups, k, turned = rng.choice((1, 2, 3, 5)), base.x.shape[1], rng.random() < 0.4
    ends = sorted(rng.randrange(len(base.x) + 1) for _ in range(groups))
    offsets = torch.tensor([0, *ends])
    w = numbers(rng, groups, *((k, base.n) if turned else (base.n, k)), dtype=rng.choice(FLOATS))
    weight = [w.mT if turned else w, *[None] * 4, 0, 64, 256]
    if rng.random() < 0.5 and base.weight[5] and groups == 1:
        weight = [*base.weight]
    a, b = (None if t is None else numbers(rng, groups, *t.shape, dtype=t.dtype) for t in (base.a, base.b))
    bias = None if base.bias is None else numbers(rng, groups, base.n, dtype=base.bias.dtype)
    grouped.forward_op.op(base.x, *weight, offsets, base.n, a, b, 0.5, bias)
    grouped.backward_op.op(base.dy, base.x, *weight, offsets, a, b, 0.5, rng.random() < 0.8,
                           a is not None and rng.random() < 0.8)  # fmt: skip


def weight_of(c: Case) -> Any:
    """The public function's weight of a case."""
    packed, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize = c.weight
    if not quant_type:
        return packed
    shape, name = (c.n, c.x.shape[1]), ("nf4", "fp4")[quant_type - 1]
    return pk.QuantWeight(packed, absmax, shape, name, blocksize, F32, nested_absmax, nested_code, nested_blocksize,
                          offset)  # fmt: skip


def leaf(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().clone().requires_grad_()


def twice(call: Callable[[Tensor], Any], x: Tensor, graph: bool) -> None:
    """Prepare the call and make it again; with its backward."""
    for _ in range(2):
        with torch.set_grad_enabled(graph):
            given = x.detach().clone().requires_grad_(graph)
            ys = call(given)
        if graph:
            ys = [ys] if isinstance(ys, Tensor) else [*ys]
            torch.autograd.backward(ys, [torch.randn_like(y) for y in ys])


def of_prepared(rng: Draw) -> None:
    graph, c = rng.random() < 0.7, draw(rng, r=rng.choice(RANKS[1:]), m=rng.choice(ROWS[1:]), n=rng.choice(SIZES))
    k, p = c.x.shape[1], c.p
    a, b, weight = leaf(c.a), leaf(c.b), weight_of(c)
    which = rng.turn % 5
    if which == 0:
        call = pk.PreparedCall(pk.lora_linear)
        twice(lambda x: call(x, weight, a, b, 0.5, c.bias, p), c.x, graph)
    elif which == 1:
        magnitude = torch.rand(c.n).requires_grad_(rng.random() < 0.8)
        call = pk.PreparedCall(pk.dora_linear_normed)
        twice(lambda x: call(x, weight, a, b, magnitude, 0.5, c.bias, p), c.x, graph)
    elif which == 2:
        other = draw(rng, k=k, m=1, r=rng.choice((0, 4)), n=rng.choice(SIZES))
        of_a, of_b = leaf(other.a), leaf(other.b)
        projections = [pk.Projection(weight, a, b, 0.5, c.bias, p),
                       pk.Projection(weight_of(other), of_a, of_b, 1.0, None, 0.0)]  # fmt: skip
        call = pk.PreparedCall(pk.lora_linear_stacked)
        twice(lambda x: call(x, *projections), c.x, graph)
    elif which == 3 and k:
        rows = [rng.randrange(-1, 2) for _ in range(len(c.x))]
        second = [leaf(numbers(rng, 3, k, special=0).to(c.a.dtype)), leaf(numbers(rng, c.n, 3).to(c.b.dtype))]
        layer = pk.RowProjection(weight, [a, second[0]], [b, second[1]], [0.5, 2.0], pk.RowPlan(rows), c.bias, p)
        call = pk.PreparedCall(pk.lora_linear_by_row)
        twice(lambda x: call(x[:, None], layer), c.x, True)
    elif which == 4:
        magnitude = torch.rand(c.n)
        call = pk.PreparedCall(pk.dora_linear)
        twice(lambda x: call(x, weight, a, b, magnitude, torch.rand(c.n) + 0.5), c.x, False)


def of_rotations(rng: Draw) -> None:
    dtype, rows = rng.choice(FLOATS), rng.choice((*ROWS, 130))
    m, b = rng.choice(((1, 1), (1, 3), (1, 4), (1, 7), (1, 16), (1, 33), (1, 64), (2, 4), (3, 6), (4, 2), (4, 8)))
    d = b * 2 ** (m - 1) * rng.choice((1, 2, 3))
    x, dy = (numbers(rng, rows, d, dtype=dtype) for _ in range(2))
    shared, transposed = rng.random() < 0.3, rng.random() < 0.5
    blocks = make_blocks(m, 1 if shared else d // b, b)
    butterfly_rotate.forward_op.op(x, blocks, transposed)
    butterfly_rotate.backward_op.op(dy, x, blocks, transposed, rng.random() < 0.7, True)
    r = rng.choice((0, 1, 2, 5, 8, 17, 33))
    u, v = (numbers(rng, r, d, special=0) / d**0.5 for _ in range(2))
    _, s = householder_rotate.forward_op.op(x, u, v)
    householder_rotate.backward_op.op(dy, x, u, v, s, rng.random() < 0.7, rng.random() < 0.8)
    half = rng.choice((1, 2, 3, 8, 17))
    x = numbers(rng, rows, 2 * half * rng.choice((1, 2, 5)), dtype=dtype)
    first, second = (numbers(rng, x.shape[1]) for _ in range(2))
    pair_rotate.forward_op.op(x, first, second, half)
    pair_rotate.backward_op.op(torch.randn_like(x), x, first, second, half, rng.random() < 0.7, rng.random() < 0.8)


def of_cayley(rng: Draw) -> None:
    q = skew_blocks(rng.choice((0, 1, 2, 5)), rng.choice((1, 2, 3, 4, 7, 8, 16, 17, 33, 48)), 0.5)
    terms = rng.choice((0, 0, 1, 2, 5, 30))
    r = cayley.forward_op.op(q, terms)
    cayley.backward_op.op(torch.randn_like(q), q, r, terms)


def of_turned(rng: Draw) -> None:
    m, b = rng.choice(((1, 4), (1, 16), (2, 4), (3, 8), (1, 7)))
    k = b * 2 ** (m - 1) * rng.choice((1, 2, 4))
    c = draw(rng, r=0, p=0.0, k=k)
    blocks = make_blocks(m, rng.choice((1, k // b)) if m == 1 else k // b, b)
    gain = dora_tools.make_gain(c.n) if c.n and rng.random() < 0.5 else None
    _, h = butterfly_linear.forward_op.op(c.x, blocks, *c.weight, c.n, gain, c.bias, gain is not None)
    need = (rng.random() < 0.8, rng.random() < 0.8, gain is not None)
    if any(need):
        butterfly_linear.backward_op.op(c.dy, c.x, blocks, *c.weight, gain, h, *need)


def of_elements(rng: Draw) -> None:
    dtype, n = rng.choice(FLOATS), rng.choice((0, *SIZES, 5000))
    gate, up, dh = (numbers(rng, n, dtype=dtype, special=0.5) for _ in range(3))
    pk.gated(gate, up)
    torch.autograd.backward(pk.gated(leaf(gate), leaf(up)), dh)
    act, limit = rng.choice(("silu", "gelu", "gelu_tanh", "relu", "relu2")), rng.choice((0.0, 1.0))
    torch.autograd.backward(pk.gated(leaf(gate), None, act, limit=limit), dh)
    rows, n = rng.choice(ROWS), rng.choice(SIZES)
    both = leaf(numbers(rng, rows, 2 * n, dtype=dtype))
    h = pk.gated(both, None, act, fused=rng.choice(("halves", "pairs")), limit=limit, shift=1.0)
    torch.autograd.backward(h, torch.randn_like(h))
    rows, n = rng.choice(ROWS), rng.choice(SIZES)
    x, weight = leaf(numbers(rng, rows, n, dtype=dtype)), leaf(numbers(rng, n, dtype=rng.choice(FLOATS)))
    wide = leaf(numbers(rng, rows, 2, 3 * n, dtype=dtype))[..., n : 2 * n]
    for given in (x, wide):
        dy = torch.randn_like(given).to(dtype)
        for trained in (weight, weight.detach(), None):
            torch.autograd.backward(pk.rms_norm(given, trained, 1e-5, 0.0 if trained is None else 1.0), dy)
            torch.autograd.backward(pk.layer_norm(given, trained, trained, 1e-5), dy)


def of_attention(rng: Draw) -> None:
    batch, t, groups = rng.choice((0, 1, 2)), rng.choice((0, 1, 2, 7, 16, 33, 65, 100)), rng.choice((1, 2))
    heads, d, dtype = groups * rng.choice((1, 2, 3)), rng.choice((2, 4, 6, 16, 34, 64)), rng.choice(FLOATS)
    keys, width = t if rng.random() < 0.5 else rng.choice((0, 1, 9, 64, 300, 700)), rng.choice((2, 16, 34))
    q = leaf(numbers(rng, batch, t, heads, d, dtype=dtype))
    k, v = (leaf(numbers(rng, batch, keys, groups, n, dtype=dtype)) for n in (d, width))
    options = {"causal": rng.random() < 0.6, "window": rng.choice((0, 0, 5, 40)), "softcap": rng.choice((0.0, 2.0))}
    if keys == t and rng.random() < 0.6:
        angles = torch.randn(rng.choice((1, batch)) if batch else 1, t, rng.choice((d, d // 4 * 2)))
        cos = angles.cos().to(rng.choice(FLOATS))
        options |= {"cos": cos, "sin": angles.sin().to(cos.dtype), "interleaved": rng.random() < 0.5}
    if rng.random() < 0.4:
        options["keep"] = torch.rand(rng.choice((1, max(batch, 1))), rng.choice((1, max(t, 1))), keys) < 0.6
        options["keep"] = options["keep"] if t else options["keep"][:, :0]
    if rng.random() < 0.3:
        options["spans"] = (torch.rand(batch, t, 2) * (keys + 1)).int().sort(-1).values
    if rng.random() < 0.3:
        options["bias"] = torch.randn(1, heads, t, keys).to(rng.choice(FLOATS))
    if rng.random() < 0.3:
        options |= {"slopes": torch.rand(heads), "sinks": torch.randn(heads)}
    if rng.random() < 0.4:
        options |= {"dropout_p": rng.choice((0.1, 0.6)), "seed": torch.tensor([rng.randrange(2**62)])}
    y = pk.attention(q, k, v, scale=d**-0.5, **options)
    torch.autograd.backward(y, torch.randn_like(y))
    with torch.no_grad():
        pk.attention(q[:, :1], k, v, scale=d**-0.5, dropout_p=rng.choice((0.0, 0.2)))  # one query


def of_quantising(rng: Draw) -> None:
    w = numbers(rng, rng.choice((0, *SIZES, 1000, 8193)), dtype=rng.choice(FLOATS), special=0.3)
    # no special values where scales are nested: their mean would be NaN
    nested = rng.random() < 0.5
    w = torch.nan_to_num(w, 0.0, 1.0, -1.0).clamp(-100, 100) if nested else w
    given = pk.quantize_4bit(w, rng.choice(("nf4", "fp4")), rng.choice((32, 64, 128, 4096)), nested,
                             rng.choice((32, 64, 256)))  # fmt: skip
    pk.dequantize_4bit(given, rng.choice(FLOATS))


def of_optimizer(rng: Draw) -> None:
    sizes = [rng.choice((0, *SIZES, 9000)) for _ in range(rng.choice((1, 2, 6)))]
    states = [(torch.randn(n), numbers(rng, n, special=0.2), torch.randn(n), torch.rand(n), torch.tensor(float(i // 2)))
              for i, n in enumerate(sizes)]  # fmt: skip
    adamw.norm([state[1] for state in states])
    adamw.update(states, 1e-3, (0.9, 0.999), 1e-8, rng.choice((0.0, 0.01)), rng.choice((1.0, 0.3)))


def of_softmax(rng: Draw) -> None:
    rows, width = rng.choice((0, *SIZES)), rng.choice(SIZES)
    targets = torch.randint(-1, 3 * width, (rows,))
    state = softmax_slice.begin(targets)
    for start in (0, width):
        scores = numbers(rng, rows, width, dtype=rng.choice(FLOATS), special=0.1)
        softmax_slice.add(state, scores, targets, start, rng.choice((1.0, 0.3)))


def of_fingerprints(rng: Draw) -> None:
    tensors = [numbers(rng, rng.choice(SIZES), 3, dtype=t) for t in (F32, BF16, torch.float64)]
    tensors += [torch.arange(rng.choice(SIZES), dtype=torch.uint8), torch.randn(9, 40).t()[::3], torch.tensor(1.0)]
    samples = native.Samples(tensors, 8)
    assert samples.unchanged()
    tensors[1].data[:] = 7
    assert not samples.unchanged()
    assert not native.cpu().pk_cpu_unchanged(0, 0, 3, bytes(3))  # no such width


def plain(_rng: Draw) -> None:
    """Calls that take no memory."""
    library = native.cpu()
    for name, function in entry_points().items():
        if not function.parameters:
            getattr(library, name)()
    for name in (b"scalar", b"", None, b"z80", b"x" * 300):
        library.pk_cpu_set_level(name)
    library.pk_last_error()


# what makes calls -> how often, in the short form and in the full one
MAKERS: dict[Callable[[Draw], None], tuple[int, int]] = {
    plain: (1, 1), refused: (1, 1), of_lora: (16, 600), of_stack: (4, 120), of_dora: (6, 120), of_multi: (6, 150),
    of_mixture: (6, 120), of_groups: (8, 150),
    of_prepared: (10, 200), of_rotations: (6, 60), of_cayley: (4, 30), of_turned: (4, 40), of_elements: (3, 30),
    of_attention: (4, 40), of_quantising: (4, 40), of_formats: (6, 90), of_optimizer: (2, 12), of_softmax: (3, 40),
    of_fingerprints: (1, 4),
}  # fmt: skip


def record(path: Path, full: bool, seed: int = SEED) -> Recorder:
    """Write the corpus, and close it."""
    threads, recorder = torch.get_num_threads(), Recorder(path)
    try:
        for maker, (short, often) in MAKERS.items():
            for i in range(often if full else short):
                label = f"{maker.__name__} {i}"
                rng = Draw(f"{seed} {label}", i)
                torch.manual_seed(rng.randrange(2**31))
                torch.set_num_threads(rng.choice((1, 2, 3, 5)))
                with recorder.recording(label), pk.use_backend("native"):
                    maker(rng)
    finally:
        torch.set_num_threads(threads)
        recorder.close()
    return recorder
