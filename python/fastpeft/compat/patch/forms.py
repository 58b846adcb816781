"""Entries of adapters that PEFT keeps in another form than our methods read, or not at all; and layers where PEFT's
forward computes something else than ours: there it stays, so that a patched model has PEFT's numbers.

Modules of ours share PEFT's parameters and buffers, so that nothing is copied and whoever replaces one is followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

from ...methods.frod import Frod
from ...methods.glora import Path
from ...methods.lora.variants.dora import Dora, Magnitude
from ...methods.lora.variants.monteclora import MonteClora
from ...methods.method import Method
from ...methods.oft import OFTRotationModule
from ...methods.poly import Poly
from ...weights.base import BaseWeight
from .stays import Stays


class Entry(NamedTuple):
    """An adapter's entry of PEFT's layer, None where it has none, with what it belongs to."""

    value: Any
    attribute: str
    adapter: str
    layer: Any
    base: BaseWeight


def _sharing(ours: nn.Module, theirs: nn.Module) -> nn.Module:
    ours.__dict__["_parameters"], ours.__dict__["_buffers"] = theirs._parameters, theirs._buffers
    ours.training = theirs.training
    return ours


def _magnitude(entry: Entry) -> nn.Module:
    return _sharing(Magnitude(entry.value.weight.detach()), entry.value)


def _rotation(entry: Entry) -> nn.Module:
    theirs = entry.value
    if entry.base.kind.startswith("conv") and any(n != 1 for n in entry.layer.base_layer.kernel_size):
        raise Stays("PEFT's OFT adds up rotated patches that overlap, which is no rotation of the weight")
    names = ("coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms")
    config: Any = SimpleNamespace(**{name: getattr(theirs, name) for name in names}, init_weights=True)
    return _sharing(OFTRotationModule(config, 1, theirs.block_size), theirs)


_PATHS = {"GloraLoraPath": "lora", "GloraVectorPath": "vector", "GloraScalarPath": "constant"}


def _path(entry: Entry) -> nn.Module:
    path = Path("constant", (1,), 1, True)
    path.form = _PATHS.get(type(entry.value).__name__, "none")
    if entry.attribute[-1] in "CDE" and entry.base.bias is None:
        path.form = "none"  # they act on the bias
    return _sharing(path, entry.value)


def _order(entry: Entry) -> torch.Tensor:
    device = entry.layer.base_layer.weight.device
    return torch.stack(torch.sort(torch.tensor(entry.layer.token_indices[entry.adapter], device=device)))


def _shape(entry: Entry) -> tuple[int, int]:
    return entry.layer.out_features, entry.layer.in_features


# By attribute of PEFT's layers: our form of its entry. By an attribute that they have: others that they lack.
FORMS: dict[str, Callable[[Entry], Any]] = {
    "lora_magnitude_vector": _magnitude, "oft_R": _rotation, "oft_embedding_R": _rotation,
    **{f"glora_{letter}": _path for letter in "ABCDE"},
    "oft_dropout": lambda entry: nn.Identity(),  # PEFT's forward has none
}  # fmt: skip
LACKING: dict[str, dict[str, Callable[[Entry], Any]]] = {
    "oft_embedding_R": {"oft_dropout": lambda entry: nn.Identity()},
    "fourierft_spectrum": {"fourierft_shape": _shape},
    "waveft_spectrum": {"waveft_shape": _shape},
    "trainable_tokens_delta": {"trainable_tokens_order": _order},
    "parameter_name": {"experts": lambda entry: entry.base.shape[0] if entry.base.kind == "experts" else 0},
    "tinylora_v": {
        "tinylora_group": lambda entry: entry.layer._tinylora_v_key[entry.adapter],
        "tinylora_table": lambda entry: entry.base.kind == "embedding",
    },
}


# Containers that all layers of a model have, with the adapters of all of them.
OF_ALL_LAYERS = {
    "vera_A", "vera_B", "pvera_A", "pvera_B", "randlora_A", "randlora_B", "vblora_vector_bank", "unilora_theta_d",
    "tinylora_v", "frod_V", "frod_s_indices", "frod_s_size",
}  # fmt: skip
# By an attribute of PEFT's layers: another that older versions lack, whose layers compute otherwise.
NEWER = {
    "osf_svd_params": "_osf_U_low_init", "pvera_lambda_b": "pvera_generator", "tinylora_v": "_tinylora_v_key",
    "unilora_indices_A": "unilora_scales_A", "parameter_name": "_did_swap_in_out_features",
}  # fmt: skip


def own_forms(layer: Any, adapter: str, base: BaseWeight) -> Iterator[tuple[str, Any]]:
    """(attribute, our form of the adapter's entry there). Raises Stays where the entry has none."""
    for attribute, form in FORMS.items():
        container = getattr(layer, attribute, None)
        if container is not None and adapter in container:
            yield attribute, form(Entry(container[adapter], attribute, adapter, layer, base))
    for attribute, forms in LACKING.items():
        if hasattr(layer, attribute):
            for name, form in forms.items():
                yield name, form(Entry(None, name, adapter, layer, base))


def limits(method: Method, layer: Any, adapter: str, base: BaseWeight) -> Iterator[tuple[str, str]]:
    """("training" or "gradients", why PEFT's own forward has to act then). Raises Stays where it has to always."""
    if any(hasattr(layer, name) and not hasattr(layer, new) for name, new in NEWER.items()):
        raise Stays("this version of PEFT keeps the method's tensors in another form")
    if isinstance(method, Dora) and base.kind != "linear":
        raise Stays("DoRA of a convolution or an embedding has no kernel, and PEFT's formula takes less time")
    if isinstance(method, Poly):
        raise Stays("its router is a module of PEFT's, and its rows get their tasks in another way")
    if isinstance(method, Frod):
        raise Stays("PEFT's FRoD needs no product with the base weight, which ours does")
    if getattr(layer, "hra_apply_GS", {}).get(adapter) and not base.quantized:  # there PEFT has no product of its own
        raise Stays("PEFT's Gram-Schmidt normalises what rounding leaves of dependent vectors")
    if hasattr(layer, "trainable_tokens_delta") and getattr(layer.base_layer, "bias", None) is not None:
        raise Stays("PEFT's trainable tokens leave out the bias of a linear layer")
    if isinstance(method, MonteClora):
        yield "training", "PEFT's sampler of MonteCLoRA draws, and its loss reads the draws"
    if hasattr(layer, "c3a_kernel"):
        yield "gradients", "PEFT's gradients of C3A are not those of its output"
    if adapter in getattr(layer, "hada_t1", ()):
        yield "gradients", "PEFT's gradients of LoHa's Tucker form are not those of its output"
