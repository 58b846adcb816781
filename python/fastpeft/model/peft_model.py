"""PeftModel: a thin facade over a tuner, with PEFT's names."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from ..config.base import PeftConfig, check_is_config
from ..config.seen_as_peft import SeenAsPeft
from ..config.types import TaskType, warn
from ..files.hub import pushing
from ..files.whole import is_partitioned, is_sharded, may_write
from ..inject.plan import InjectionPlan
from ..layer.by_row.call import now
from ..methods.registry import method_of
from ..saving.folder import open_adapter, save_adapter
from ..saving.load import plan_loading
from ..saving.plain_lora import as_plain_lora
from ..saving.state_dict import check_writable, get_peft_model_state_dict
from ..weights.nf4_store import NF4Store
from . import adapters, card, prompted, prompted_generation
from .prepare import enable_input_gradients, is_checkpointing, is_quantized
from .status import count_parameters, get_layer_status, get_model_status
from .tuner import AUXILIARY_KWARGS, BaseTuner, tuner_class


class PeftModel(SeenAsPeft, nn.Module):
    """A base model with adapters. Attributes that it lacks are those of the tuner, then of the base model.

    model: changed in place (its target modules are replaced by adapter layers), unless an error is raised.
    autocast_adapter_dtype: keep adapters in float32 on float16 and bfloat16 bases. low_cpu_mem_usage: make the
    adapter's tensors on the meta device, to be filled by `load_adapter`.
    """

    by_task: ClassVar[dict[str, type[PeftModel]]] = {}  # the classes of `tasks.py`
    head_names: ClassVar[tuple[str, ...]] = ()  # of a head that is new: it is trained in full and saved

    def __init_subclass__(cls, task: TaskType | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if task is not None:
            PeftModel.by_task[task.value] = cls

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default",
        autocast_adapter_dtype: bool = True, low_cpu_mem_usage: bool = False, _plan: InjectionPlan | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_is_config(peft_config)
        self.peft_type = peft_config.peft_type
        with self._preparing(peft_config):
            self.base_model: BaseTuner = tuner_class(method_of(peft_config))(
                model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage,
                autocast_adapter_dtype=autocast_adapter_dtype, plan=_plan,
            )  # fmt: skip
        self.training = self.base_model.training = model.training
        if is_checkpointing(model):
            enable_input_gradients(model)
        # Some models split their matrices to imitate tensor parallelism, which adapter layers have no part in.
        if hasattr(getattr(model, "config", None), "pretraining_tp"):
            model.config.pretraining_tp = 1  # type: ignore[union-attr]

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Names of quantised weights: DDP, which asks for this, would send them to all processes in every forward."""
        layers = [(path, module) for path, module in self.named_modules() if isinstance(module, NF4Store)]
        return [f"{path}.{name}" for path, layer in layers for name, held in layer._buffers.items() if held is not None]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
        return getattr(self.base_model, name)

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self.base_model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        return self.active_adapters[0] if len(self.active_adapters) == 1 else self.active_adapters

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapters[0]]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """True if an adapter takes part in the model's forward."""
        layers = [layer for _, layer in self.base_model.adapter_modules()]
        return any(layer.active_adapters and not layer.disable_adapters for layer in layers)

    @property
    def special_peft_forward_args(self) -> set[str]:
        """The arguments of `forward` that are not for the base model."""
        return set(self.base_model.forward_args)

    @property
    def modules_to_save(self) -> set[str] | None:
        return {name for c in self.peft_config.values() for name in getattr(c, "modules_to_save", None) or ()} or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        return getattr(self.base_model, "dtype", None)

    def get_base_model(self) -> nn.Module:
        return self.base_model.model

    get_nb_trainable_parameters = count_parameters
    get_layer_status = get_layer_status
    get_model_status = get_model_status

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Make the output of the embeddings require gradients, unless the model is quantised."""
        if not is_quantized(model):
            enable_input_gradients(model)

    # Computing

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward. adapter_names: an adapter for each row of the batch ("__base__" for none)."""
        tuner = self.base_model
        if now.state.call is None and not tuner._hooked and AUXILIARY_KWARGS.isdisjoint(kwargs):
            return tuner.model(*args, **kwargs)
        if (rows := tuner.prompted_rows(kwargs.get("adapter_names"))) is not None:
            return prompted.forward(tuner, rows, args, kwargs)
        with tuner._enable_peft_forward_hooks(*args, **kwargs):
            return (tuner if tuner._hooked else tuner.model)(*args, **_without(tuner.forward_args, kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`. adapter_names: an adapter for each row of the inputs, which beams repeat."""
        if (rows := self.base_model.prompted_rows(kwargs.get("adapter_names"))) is not None:
            return prompted_generation.generate(self.base_model, rows, args, kwargs)
        base: Any = self.get_base_model()
        own = self.base_model.forward_args
        defaults = {"generation_config": getattr(base, "generation_config", None)}
        with self.base_model._enable_peft_forward_hooks(*args, **{**defaults, **kwargs}):
            return base.generate(*args, **{**_without(own, kwargs), **self.base_model.generate_options})

    def prompted_inputs(self, **inputs: Any) -> tuple[dict[str, Any], int]:
        """Arguments of the base model, or of its backbone, with the prompts of the rows, and how many tokens now stand
        before the input's. `forward` is that of the whole model; this is for a loss of one's own."""
        rows = self.base_model.prompted_rows(None)
        return (inputs, 0) if rows is None else prompted.inputs(self.base_model, rows, inputs)

    # Adapters come and go

    def add_adapter(
        self, adapter_name: str, peft_config: PeftConfig, low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:  # fmt: skip
        """Add an untrained adapter, of any method. It is not made active."""
        with self._preparing(peft_config):
            self.base_model.add(
                adapter_name, peft_config, low_cpu_mem_usage=low_cpu_mem_usage,
                autocast_adapter_dtype=autocast_adapter_dtype,
            )  # fmt: skip

    @classmethod
    @contextmanager
    def _preparing(cls, peft_config: PeftConfig, inference_mode: bool | None = None) -> Iterator[None]:
        """Add the task's head to a configuration's `modules_to_save`, and set its mode; taken back on an error."""
        check_is_config(peft_config)
        before, mode = getattr(peft_config, "modules_to_save", None), peft_config.inference_mode
        peft_config.inference_mode = mode if inference_mode is None else inference_mode
        if cls.head_names and "modules_to_save" not in getattr(peft_config, "not_in_peft", ()) and hasattr(
            peft_config, "modules_to_save"
        ):
            peft_config.modules_to_save = list(dict.fromkeys([*(before or ()), *cls.head_names]))
        try:
            yield
        except Exception:
            peft_config.inference_mode = mode
            if hasattr(peft_config, "modules_to_save"):
                peft_config.modules_to_save = before
            raise

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make an adapter the active one, or several in this order."""
        self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Remove an adapter, or several. If no active one is left, the first of the others becomes active."""
        self.base_model.delete_adapter(adapter_name)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Turn gradients of adapters on or off without changing which are active. TypeError while a prompt is active,
        as in PEFT."""
        if (config := self.active_peft_config).is_prompt_learning:
            kind = str(getattr(config.peft_type, "value", config.peft_type))
            raise TypeError(f"Setting `requires_grad` is not supported for prompt learning methods like {kind}.")
        adapters.set_requires_grad(self, adapter_names, requires_grad)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Context in which the model computes as its base model does. Contexts nest."""
        modules = [module for _, module in self.base_model.adapter_modules()]
        before = {module.disable_adapters for module in modules}
        if len(before) > 1:
            warn(
                "The model contains some adapter layers that are enabled and others that are disabled. After exiting "
                "the disable_adapter context, all adapters will be enabled.", 2,
            )  # fmt: skip
        kept = {p for p in self.parameters() if p.requires_grad}
        self.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            kept.update(p for p in self.parameters() if p.requires_grad)  # of an adapter made active meanwhile
            for module in modules if False in before else ():
                module.enable_adapters(True)
            # Enabling trains the active adapters; what did not train before (an adapter for inference) must not now.
            for parameter in (p for module in modules for p in module.parameters()):
                if parameter.requires_grad and parameter not in kept:
                    parameter.requires_grad_(False)

    # Files

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None, save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True, path_initial_model_for_weight_conversion: str | bool | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Write each adapter (or the selected ones) as `adapter_config.json` and `adapter_model.safetensors`.

        The adapter `default` goes into the folder itself, others into folders of their names below it. state_dict: take
        the values from here. safe_serialization: False writes `adapter_model.bin`, a pickle, with a warning.
        path_initial_model_for_weight_conversion: the folder of a PiSSA, OLoRA, CorDA or LoRA-GA adapter as it was saved
        before training; what is written is then a plain LoRA of the original base, with twice the rank. True: take what
        the adapter took from the base from this model, which knows it (for KaSA too).
        A model that FSDP2 or ZeRO-3 shards: every process must call this, and the first one writes. With state_dict it
        alone has to; others may, with is_main_process=False, and do nothing (under ZeRO-3 also without state_dict).
        Beside them `README.md`, the model card, is made or kept up to date. push_to_hub: commit all of this to the
        repository `repo_id` of the Hub, with the arguments of `push_to_hub`.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")
        selected = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        unknown = [name for name in selected if name not in self.peft_config]
        if unknown:
            raise ValueError(f"selected_adapters names {unknown}, there are {list(self.peft_config)}.")
        check_writable(self)
        given = kwargs.get("state_dict")
        if not is_main_process and (given is not None or any(is_partitioned(p) for p in self.parameters())):
            return  # of what accelerate's `get_state_dict` gathers the first process alone has something
        writes = may_write(any(is_sharded(p) for p in self.parameters()), is_main_process)
        for name in selected:
            tensors = get_peft_model_state_dict(
                self, state_dict=given, adapter_name=name,
                save_embedding_layers=save_embedding_layers,  # type: ignore[arg-type]
            )  # fmt: skip
            config = self.peft_config[name]
            if path_initial_model_for_weight_conversion is not None:
                tensors, config = as_plain_lora(
                    self.base_model, name, tensors, path_initial_model_for_weight_conversion
                )
            folder = save_directory if name == "default" else os.path.join(save_directory, name)
            save_adapter(folder, tensors, self._config_for_file(config), writes, safe_serialization)
        if writes:
            card.update_card(self, save_directory)
            if (push := pushing(kwargs, save_directory)) is not None:
                card.push_adapters(self, save_directory, selected, push)

    create_or_update_model_card = card.create_or_update_model_card
    push_to_hub = card.push_model

    def _config_for_file(self, config: PeftConfig) -> dict[str, Any]:
        config.check_values()
        content = config.to_dict()
        content["inference_mode"] = True
        if content["base_model_name_or_path"] is None:
            content["base_model_name_or_path"] = getattr(self.get_base_model(), "name_or_path", None) or None
        if config.task_type is None:
            base = type(self.get_base_model())
            content["auto_mapping"] = {"base_model_class": base.__name__, "parent_library": base.__module__}
        return content

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, model_id: str | os.PathLike[str], adapter_name: str = "default",
        is_trainable: bool = False, config: PeftConfig | None = None, autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False, low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None, **kwargs: Any,
    ) -> PeftModel:  # fmt: skip
        """A PeftModel over `model` with the adapter that a folder or Hub repository holds.

        Everything is checked before `model` is changed. config: use this instead of the file's configuration; it
        becomes the adapter's, with `inference_mode` set by is_trainable, unless an error is raised.
        ignore_mismatched_sizes: leave out tensors of another size, with a warning. allow_bin: also take a folder's
        `adapter_model.bin`, which a process of its own reads as tensors only, under a memory limit. The Hub's arguments
        are revision, subfolder, token, cache_dir, force_download, local_files_only and further ones of huggingface_hub.
        """
        if config is not None and not isinstance(config, PeftConfig):
            raise ValueError(f"The input config must be a PeftConfig, got {type(config)}")
        source = open_adapter(model_id, **kwargs)
        config = source.peft_config() if config is None else config
        if key_mapping is None and not config.is_prompt_learning:  # of files from before transformers moved modules
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", None)
        model_class = class_for(config, cls)
        with model_class._preparing(config, inference_mode=not is_trainable):
            loaded = plan_loading(source, config, model, adapter_name, key_mapping, kwargs, autocast_adapter_dtype)
            peft_model = model_class(model, config, adapter_name, _plan=loaded.plan)
            loaded.fill(peft_model, is_trainable)
        return peft_model

    def load_adapter(
        self, model_id: str | os.PathLike[str], adapter_name: str, is_trainable: bool = False,
        torch_device: str | None = None, autocast_adapter_dtype: bool = True, ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False, key_mapping: Mapping[str, str] | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Load a trained adapter under a new name, or new values for one of that name. It is not made active.

        Everything is checked before the model is changed. Returns what was missing and unexpected: for a file that
        passed the checks, nothing. torch_device: ignored; an adapter lives where its layers do.
        """
        source, base = open_adapter(model_id, **kwargs), self.get_base_model()
        config = source.peft_config()
        if adapter_name in self.peft_config:
            loaded = plan_loading(source, config, base, adapter_name, key_mapping, kwargs, is_new=False)
            return loaded.fill(self, is_trainable)
        with self._preparing(config, inference_mode=not is_trainable):
            loaded = plan_loading(source, config, base, adapter_name, key_mapping, kwargs, autocast_adapter_dtype)
            self.base_model.add(adapter_name, config, plan=loaded.plan)
        result = loaded.fill(self, is_trainable)
        if is_trainable:
            adapters.set_requires_grad(self, adapter_name)
        return result


def _without(names: Collection[str], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in names}


def class_for(config: PeftConfig, default: type[PeftModel] = PeftModel) -> type[PeftModel]:
    """The PeftModel class for a configuration's task."""
    return PeftModel.by_task.get(str(getattr(config.task_type, "value", config.task_type)), default)
