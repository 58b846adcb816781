"""A softmax by slices of the native library, at every level, beside torch's in float32 and against float64."""

from __future__ import annotations

import pytest
import torch
from lora_tools import level_fixture, needs_native, threads
from torch import Tensor

from peft_kernels import softmax_slice
from peft_kernels.testing import assert_no_worse, assert_same_bits

level = level_fixture()
pytestmark = needs_native
ROWS, COLUMNS = 37, 141


def swept(z: Tensor, targets: Tensor, width: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, softmax without its targets, the state) of scores that come `width` columns at a time."""
    state, parts = softmax_slice.begin(targets), []
    for start in range(0, z.shape[1], width):
        part = z[:, start : start + width].clone(memory_format=torch.contiguous_format)
        rescale = softmax_slice.add(state, part, targets, start, scale)
        parts = [p * rescale.unsqueeze(1) for p in parts] + [part.float()]
    top, total, at_target = state
    return top + total.log() - at_target, torch.cat(parts, 1) / total.unsqueeze(1), state


def exact(z: Tensor, targets: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scores = z.to(dtype) * scale
    losses = torch.nn.functional.cross_entropy(scores, targets, reduction="none")
    return losses, scores.softmax(1).scatter(1, targets.unsqueeze(1), 0.0)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 16, 50, COLUMNS])
def test_losses_and_probabilities(dtype: torch.dtype, width: int) -> None:
    z, targets = (6 * torch.randn(ROWS, COLUMNS)).to(dtype), torch.randint(0, COLUMNS, (ROWS,))
    z[3] = -200.0  # rows whose largest score comes late, and stands far above
    z[3, -1] = 90.0
    scale = 0.37
    losses, p, _ = swept(z, targets, width, scale)
    eager, right = exact(z, targets, scale, torch.float32), exact(z, targets, scale, torch.float64)
    size = (z.double() * scale).abs().amax(1)
    assert_no_worse(losses, eager[0], right[0], size + 1)
    assert_no_worse(p.to(dtype), eager[1].to(dtype), right[1], (right[1] * (1 + size.unsqueeze(1))))


@pytest.mark.usefixtures("level")
def test_what_is_no_number_is_none_in_the_result() -> None:
    for value in (float("nan"), float("inf")):
        z, targets = torch.randn(3, 40), torch.tensor([0, 20, 39])
        z[1, 21] = value
        losses, _, _ = swept(z, targets, 16)
        assert losses.isfinite().tolist() == [True, False, True]


def test_threads_and_rows_do_not_matter() -> None:
    z, targets = torch.randn(ROWS, 4096).bfloat16(), torch.randint(0, 4096, (ROWS,))
    with threads(1):
        alone = swept(z, targets, 2048)
    for given, other in zip(alone, swept(z, targets, 2048), strict=True):
        assert_same_bits(given, other)
    for given, other in zip(alone[:2], swept(z[5:9], targets[5:9], 2048), strict=False):
        assert_same_bits(given[5:9].contiguous(), other)


def test_no_rows_and_bad_tensors() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    assert softmax_slice.add(softmax_slice.begin(empty), torch.zeros(0, 5), empty, 0).shape == (0,)
    targets, z = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 4)
    state = softmax_slice.begin(targets)
    for given in ((state[:2], z, targets), (state, z[:1], targets), (state, z.t(), targets), (state, z[:, :0], targets),
                  (state, z.double(), targets), (state, z, targets.int()), (state.double(), z, targets),
                  (state, z[:, ::2], targets)):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            softmax_slice.add(*given, 0)
    gone = torch.zeros(2, 4)
    gone.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="softmax_slice"):
        softmax_slice.add(state, gone, targets, 0)
    assert softmax_slice.reason(z) is None
    for other in (z.double(), z.to("meta")):
        assert "takes float32" in (softmax_slice.reason(other) or "")
