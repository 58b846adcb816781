"""The table of PEFT's modules, and the part of Python's import that makes modules of its rows.

`fastpeft.<path>` can be imported for each path, though no file is there: a name in it is looked up in its home when it
is first used. PEFT's modules import each other's names and scripts take them from any, so every module here has every
name that the table knows; its own are those that `dir` shows.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PACKAGE = __name__.partition(".")[0]

# The homes of PEFT's names that are not public ones of `fastpeft` (those are in its `HOMES`), and `theirs=ours` where a
# name differs.
HOMES = {
    "recipes.adamss_callback": "AdamssAsaCallback",
    "recipes.arrow": "_resolve_adapter_source create_arrow_model",
    "methods.lora.variants.arrow": "ArrowLoraLinearLayer GKS_ADAPTER_PREFIX TASK_ADAPTER_PREFIX",
    "model.adapters": "cast_adapter_dtype delete_adapter set_adapter set_requires_grad",
    "saving.folder": "SAFETENSORS_WEIGHTS_NAME=SAFETENSORS_NAME WEIGHTS_NAME=PICKLE_NAME",
    "compat.peft_only": """
        ALLOWED_COMPUTE_DTYPES DUMMY_MODEL_CONFIG DoraCaching EMBEDDING_LAYER_NAMES MontecloraTrainerMixin
        SEQ_CLS_HEAD_NAMES TOKENIZER_CONFIG_NAME TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING _get_submodules
        check_if_peft_model check_target_module_exists dequantize_module_weight find_parameter_name_by_module
        get_device_map inspect_matched_modules is_xpu_available transpose update_forward_signature
        update_generate_signature update_signature
    """,
    "compat.quantization": """
        Bnb4bitBackend Bnb8bitBackend ForwardOnlyQuantizationBackend HqqBackend QuantizationBackend TorchaoBackend
        get_gptqmodel_quant_linear get_quantization_config get_quantization_kwargs quantization_extra_repr
        resolve_quantization_backend
    """,
    "compat.parallel_names": """
        LoraEmbeddingATPHolder LoraParallelLinear TpInfo check_deepspeed_zero3_enabled gather_params_ctx
        get_default_module_allowlist get_tp_plan_and_mesh
    """,
    "compat.empty_weights": "init_empty_weights skip_init_on_device",
    "config.base": "CONFIG_NAME",
    "files.whole": "dtensor_from_local_like",
    "model.distributed": "fsdp_auto_wrap_policy",
    "saving.hotswap": """
        CONFIG_KEYS_TO_CHECK check_hotswap_configs_compatible hotswap_adapter hotswap_adapter_from_state_dict
        prepare_model_for_compiled_hotswap
    """,
    "recipes.eva": """
        forward_fn_dict prepare_layer_inputs_fn_language_modeling prepare_model_inputs_fn_language_modeling
    """,
    "recipes.incremental_pca": "IncrementalPCA",
    "recipes.intruders": "reduce_intruder_dimension",
    "recipes.kappa": "KappaTuneSelector",
    "layer.containers": "BufferDict=AdapterDict",
    "layer.layer": "BaseTunerLayer=AdapterLayer",
    "saving.load": "infer_device",
    "methods.math.lycoris": "LycorisConfig",
    "model.merge_math": """
        calculate_majority_sign_mask dare_linear dare_ties disjoint_merge magnitude_based_pruning magnitude_prune prune
        random_pruning reshape_weight_task_tensors task_arithmetic ties
    """,
    "methods.poly": "PolyRouter",
    "recipes.optimizers.lorafa": "LoraFAOptimizer create_lorafa_optimizer",
    "recipes.optimizers.loraplus": "create_loraplus_optimizer",
    "recipes.optimizers.riemannian": "create_riemannian_optimizer",
    "inject.replicate": "replicate_layers",
    "layer.saved_modules": "AuxiliaryTrainingWrapper ModulesToSaveWrapper",
    "compat.third_party": "register_peft_method",
    "compat.transformers_keys": """
        build_peft_weight_mapping convert_peft_adapter_state_dict_for_transformers convert_peft_config_for_transformers
    """,
    "methods.lokr": "factorization=factorize",
    "recipes.scaling": "disable_input_dtype_casting rescale_adapter_scale",
    "methods.lora.start.corda": "CordaEigens",
    "methods.lora.variants.bdlora": "BlockDiagonalLinear",
    "methods.lora.variants.monteclora": "MontecloraSampler=Sampler",
    "config.targets": "INCLUDE_LINEAR_LAYERS_SHORTHAND=ALL_LINEAR",
    "inject.tokens": "TrainableTokensWrapper",
    "methods.xlora": "XLoraClassifier",
    "model.tuner": "BaseTuner MixedModel=BaseTuner",
    "networks.flux_shadow": "DetachedFluxShadowModel",
    "networks.shadow_alone": "DetachedShadowModel",
    "networks.shadow_cache": "ShadowCache",
    "prompts.encoder": "BasePromptEncoder",
}
_PATTERNS = ("TRANSFORMERS_MODELS_TO_", "is_")  # names that compat.peft_only makes by their pattern

# PEFT's modules, with names and with homes all of whose names they have.
_LORA = """
    ArrowConfig EvaConfig LoftQConfig LoraGAConfig recipes.eva convert_to_lora create_arrow_model preprocess_loraga
    save_as_lora
"""
_STATE = "saving.base_state saving.folder saving.load saving.state_dict"
_QUANTISED = "get_gptqmodel_quant_linear get_quantization_config"
_UTILS = f"{_STATE} compat.peft_only model.distributed model.prepare layer.saved_modules config.targets inject.tokens"
_TYPES = "PeftType TaskType register_peft_method"
_MODULES = {
    "auto": "model.auto",
    "config": "CONFIG_NAME PeftConfig PeftType PromptLearningConfig TaskType",
    "functional": "model.adapters get_peft_model_state_dict inject_adapter_in_model set_peft_model_state_dict",
    "helpers": "compat.peft_only recipes.kappa recipes.scaling",
    "import_utils": "is_xpu_available",
    "mapping": "compat.peft_only inject_adapter_in_model",
    "mapping_func": "MODEL_TYPE_TO_PEFT_MODEL_MAPPING get_peft_model",
    "mixed_model": "PeftMixedModel",
    "optimizers": "recipes.optimizers.lorafa recipes.optimizers.loraplus recipes.optimizers.riemannian",
    "optimizers.lorafa": "recipes.optimizers.lorafa",
    "optimizers.loraplus": "recipes.optimizers.loraplus",
    "optimizers.riemannian": "recipes.optimizers.riemannian",
    "peft_model": "model.status model.tasks",
    "tuners": f"model.tuner recipes.cartridge {_LORA}",
    "tuners._buffer_dict": "BufferDict",
    "tuners.adamss.asa_callback": "recipes.adamss_callback",
    "tuners.lora.arrow": "recipes.arrow methods.lora.variants.arrow",
    "tuners.lora.conversion": "recipes.convert",
    "tuners.lora.corda": "recipes.corda methods.lora.start.corda",
    "tuners.lora.eva": "recipes.eva methods.lora.start.eva",
    "tuners.lora.intruders": "recipes.intruders",
    "tuners.lora.loraga": "recipes.loraga methods.lora.start.loraga",
    "tuners.lora.monteclora": "MontecloraSampler",
    "tuners.lora.tp_layer": "LoraParallelLinear get_default_module_allowlist",
    "tuners.lora.variants": "BlockDiagonalLinear",
    "tuners.shadow": "networks.shadow_alone networks.shadow_cache",
    "tuners.shadow.diffusion_models": "networks.flux_shadow",
    "tuners.shadow.layers": "networks.shadow_alone networks.shadow_cache",
    "tuners.mixed": "MixedModel",
    "tuners.mixed.model": "MixedModel",
    "tuners.poly.router": "methods.poly",
    "tuners.tuners_utils": "model.adapters compat.peft_only layer.layer inject.replicate model.tuner prompts.encoder",
    "tuners.xlora.classifier": "methods.xlora",
    "utils": f"""
        {_UTILS} {_TYPES} compat.quantization NoMatchingPeftModuleError PeftError PeftWarning replace_lora_weights_loftq
    """,
    "utils.constants": "compat.peft_only saving.folder config.targets",
    "utils.error": "NoMatchingPeftModuleError PeftError",
    "utils.hotswap": "saving.hotswap",
    "utils.incremental_pca": "recipes.incremental_pca",
    "utils.integrations": """
        TpInfo check_deepspeed_zero3_enabled compat.empty_weights dequantize_module_weight dtensor_from_local_like
        gather_params_ctx
    """,
    "utils.loftq_utils": "recipes.loftq",
    "utils.merge_utils": "model.merge_math",
    "utils.other": f"{_UTILS} {_QUANTISED}",
    "utils.peft_types": _TYPES,
    "utils.quantization_utils": "compat.quantization",
    "utils.save_and_load": _STATE,
    "utils.transformers_weight_conversion": "compat.transformers_keys",
    "utils.warning": "PeftWarning",
}
# PEFT's `tuners.<method>`, called as our files of methods are.
_METHODS = """
    adalora adamss adaption_prompt beft boft c3a deft delora fourierft frod glora gralora hira hra ia3 lily ln_tuning
    loha lokr lora miss oft osf peanut poly psoft pvera randlora road shadow shira supertuning tinylora
    trainable_tokens unilora vblora vera waveft xlora
"""
METHODS = tuple(_METHODS.split())
_PROMPTS = ["cartridge", "cpt", "multitask_prompt_tuning", "p_tuning", "prefix_tuning", "prompt_tuning"]
_MODULES |= {f"tuners.{name}{file}": f"prompts.{name}" for name in _PROMPTS for file in ("", ".config", ".model")}
_MODULES["tuners.cartridge"] += " recipes.cartridge"
_MODULES["tuners.cartridge.utils"] = "recipes.cartridge"
_METHOD_PATHS = {
    f"tuners.{method}{file}": method for method in METHODS for file in ("", ".bnb", ".config", ".layer", ".model")
}
# PEFT's files of LoRA over weights of other quantisers, and the class of layers in each
FOREIGN = {"gptq": "GPTQLoraLinear", "awq": "AwqLoraLinear", "hqq": "HqqLoraLinear", "torchao": "TorchaoLoraLinear",
           "aqlm": "AqlmLoraLinear", "eetq": "EetqLoraLinear", "inc": "IncLoraLinear", "te": "TeLinear"}  # fmt: skip
_METHOD_PATHS |= {f"tuners.lora.{file}": "lora" for file in FOREIGN} | {"tuners.adalora.gptq": "adalora"}
_METHOD_PATHS |= {f"tuners.shadow.{file}": "shadow" for file in ("diffusion_models", "layers")}
PATHS = {*_MODULES, *_METHOD_PATHS}
_HOME = {name.partition("=")[0]: (home, name) for home, names in HOMES.items() for name in names.split()}


def _of_method() -> Any:
    return importlib.import_module(f"{PACKAGE}.compat.layer_classes")


def names(path: str) -> list[str]:
    """The names of PEFT's module `path` that are here."""
    package = sys.modules[PACKAGE]
    row = {*_MODULES.get(path, _LORA if path == "tuners.lora" else "").split()}
    homes = {**package.HOMES, **{name: home for name, (home, _) in _HOME.items()}}
    found = row.difference(homes.values()) | {name for name, home in homes.items() if home in row}
    if path in _METHOD_PATHS:
        found.update(_of_method().names(_METHOD_PATHS[path]))
    elif path == "tuners":
        found.update(n for n in package.__all__ if n.endswith(("Config", "Model")) and not n.startswith("Peft"))
        found.update(n for n, home in homes.items() if home.removeprefix("prompts.") in _PROMPTS)
    return sorted(found)


def find(module: str, name: str) -> Any:
    """The object that PEFT's module has as `name`, or AttributeError. module: the full name here.

    A package of ours that has a path of PEFT's too can offer its names with `__getattr__ = partial(find, __name__)`.
    """
    path, package = module.removeprefix(f"{PACKAGE}."), sys.modules[PACKAGE]
    if name == "__all__":
        return names(path)
    if f"{path}.{name}" in PATHS:
        return importlib.import_module(f"{module}.{name}")
    if not name.startswith("__"):
        value = None
        if path in _METHOD_PATHS:
            value = _of_method().attribute(_METHOD_PATHS[path], name)
        elif path == "tuners" and name.endswith("Layer"):
            value = _of_method().any_layer(name)
        if value is not None:
            return value
        if name in _HOME or name.startswith(_PATTERNS):
            home, called = _HOME.get(name, ("compat.peft_only", name))
            return getattr(importlib.import_module(f"{PACKAGE}.{home}"), called.rpartition("=")[2])
        if name in package.HOMES or name.endswith(("Config", "Model")):
            return getattr(package, name)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


class PeftModule(ModuleType):
    """A module of PEFT's, whose names are looked up when they are used."""

    def __getattr__(self, name: str) -> Any:
        value = find(self.__name__, name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        path = self.__name__.removeprefix(f"{PACKAGE}.")
        below = {p.removeprefix(f"{path}.").partition(".")[0] for p in PATHS if p.startswith(f"{path}.")}
        return sorted({*vars(self), *names(path), *below})


class _Finder(MetaPathFinder, Loader):
    """The finder of those modules that have no file here."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        package, _, inner = fullname.partition(".")
        if package != PACKAGE or inner not in PATHS or PathFinder.find_spec(fullname, path) is not None:
            return None
        is_package = any(other.startswith(f"{inner}.") for other in PATHS)
        return ModuleSpec(fullname, self, origin=__name__, is_package=is_package)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return PeftModule(spec.name, f"`{spec.name.replace(PACKAGE, 'peft', 1)}`.")

    def exec_module(self, module: ModuleType) -> None:
        """Nothing runs: names are looked up when they are used."""


def install() -> None:
    """Let Python find these modules, before it asks finders that might take them from another copy of this package."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
