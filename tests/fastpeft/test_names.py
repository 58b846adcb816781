"""Names that PEFT exports and this does not, one by one with the reason, so that nothing is missing silently."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from fnmatch import fnmatch

import pytest

peft = pytest.importorskip("peft")

# By reason: patterns of `module:name`, both without PEFT's own name.
GAPS = {
    "for a transformers before 4.53, where a cache was a tuple": """
        *:*_postprocess_past_key_value
    """,
    "a part of how PEFT computes; here it is done in another way": """
        tuners.adaption_prompt.config:* tuners.adaption_prompt.utils:* *:ShadowCarrier
        tuners.shadow.diffusion_models:*
        *:dispatch_* *:RankAllocator tuners.adamss.utils:* tuners.boft.layer:*
        tuners.c3a.utils:* tuners.glora.layer:Glora*Path tuners.loha.layer:* tuners.lokr.layer:*
        tuners.lora.arrow:* tuners.lora.corda:* tuners.lora.dora:* tuners.lora.eva:* tuners.lora.layer:LoraVariant
        tuners.lora.loraga:* tuners.lora.model:add_lora_tp_hooks_dtensor
        tuners.lora.monteclora:Buffered* tuners.lora.variants:* tuners.lora.velora:* tuners.lycoris_utils:*
        tuners.oft.layer:MultiplicativeDropoutLayer tuners.osf.utils:* tuners.poly.router:*outer
        tuners.randlora.layer:UniqueBaseGrad tuners.shira.mask_functions:random_mask tuners.waveft.wave*:*
        tuners.tuners_utils:check_adapters_to_merge tuners.tuners_utils:clone_module
        tuners.xlora.classifier:Temperature* tuners.xlora.layer:XLora?*Layer tuners.xlora.model:convert_*
        tuners.tuners_utils:onload_layer *:UPCAST_DTYPES config:PeftConfigMixin
        *:map_cache_to_layer_device_map
        utils*:_* *:set_additional_trainable_modules *:id_tensor_storage utils.integrations:*
        utils.loftq_utils:loftq_init utils.other:* utils.save_and_load:*
    """,
    "all types go together": """
        tuners.mixed*:COMPATIBLE_TUNER_TYPES
    """,
    "nothing that a configuration names is imported": """
        auto:*import_allowlist
    """,
    "the operations that PEFT converts tensors with; here it is one": """
        utils.transformers_weight_conversion:*
    """,
}
PATTERNS = [pattern for patterns in GAPS.values() for pattern in patterns.split()]


def exported(module) -> list[str]:
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    own = (n for n, v in vars(module).items() if inspect.isclass(v) or inspect.isfunction(v))
    return sorted(n for n in own if not n.startswith("_") and getattr(module, n).__module__ == module.__name__)


def missing() -> tuple[set[str], set[str]]:
    """(names, modules of PEFT that cannot be imported, for want of a package that PEFT does not ask for)"""
    found, unread = set(), set()
    for info in [None, *pkgutil.walk_packages(peft.__path__, "peft.")]:
        name = "peft" if info is None else info.name
        try:
            theirs = importlib.import_module(name)
        except ImportError:
            unread.add(name.removeprefix("peft."))
            continue
        try:
            ours = importlib.import_module(f"fast{name}")
        except ImportError:
            ours = None
        where = name.removeprefix("peft").lstrip(".")
        found |= {f"{where}:{n}" for n in exported(theirs) if not hasattr(ours, n)}
    return found, unread


@pytest.mark.filterwarnings("ignore")
def test_each_missing_name_has_its_reason_and_each_reason_its_names() -> None:
    lacking, unread = missing()
    assert sorted(n for n in lacking if not any(fnmatch(n, gap) for gap in PATTERNS)) == []
    stale = [gap for gap in PATTERNS if not any(fnmatch(n, gap) for n in lacking)]
    assert [gap for gap in stale if gap.partition(":")[0] not in unread] == []
