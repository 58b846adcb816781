"""PeftConfig: the fields that every method shares, written once; json in and out.

Field names, defaults and the file `adapter_config.json` are those of PEFT 0.21. A method adds its own dataclass below
`TargetConfig` in its file under `methods/`.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..files.atomic import write_text
from ..files.checks import NotAnAdapterError, read_json
from ..files.hub import find_adapter_file, push_to_hub, pushing
from .limits import MAX_RANK, check_bytes, check_config, check_numbers
from .seen_as_peft import SeenAsPeft
from .types import PeftType, TaskType, peft_type, warn
from .version import format_version

CONFIG_NAME = "adapter_config.json"

CLASSES: dict[str, type[Any]] = {}  # by the `peft_type` of their method; the methods' files fill it
loaders: list[Callable[[], None]] = []  # import whatever defines them; the package, which stands above, adds to these


def class_of(peft_type: str) -> type[Any]:
    """The configuration class of a method. NotImplementedError for a type that was added to PeftType and has none."""
    for load in loaders:
        load()
    if (found := CLASSES.get(peft_type)) is None:
        have = ", ".join(sorted(CLASSES))
        raise NotImplementedError(f"No method {peft_type} is registered (`register_peft_method`); there are: {have}.")
    return found


@dataclass
class PeftConfig(SeenAsPeft):
    """Fields of every adapter. `task_type` and `peft_type` accept their names as text."""

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    # What only lives in memory and is left out of files.
    runtime_fields: ClassVar[tuple[str, ...]] = ()
    # What PEFT's configuration of this method lacks: it works here, and is left out of files while it has its default.
    not_in_peft: ClassVar[tuple[str, ...]] = ()
    # The method of this class, which is then the value of `peft_type`: `class VeraConfig(TargetConfig, own_type=...)`.
    own_type: ClassVar[PeftType | None] = None
    # All values of fields that have few, and the least value of others.
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    least: ClassVar[Mapping[str, int]] = {}
    is_prompt_learning: ClassVar[bool] = False
    is_adaption_prompt: ClassVar[bool] = False

    def __init_subclass__(cls, own_type: str | None = None) -> None:
        if own_type is not None:
            cls.own_type = PeftType(own_type)
            CLASSES[own_type] = cls

    def __post_init__(self) -> None:
        self.check_values()
        self.peft_type = self.own_type or self.peft_type
        if self.task_type is not None:
            try:
                self.task_type = TaskType(self.task_type)
            except ValueError:
                names = ", ".join(t.value for t in TaskType)
                message = f"Invalid task type: {self.task_type!r}. Must be one of the following task types: {names}."
                raise ValueError(message) from None
        if self.peft_type is not None:
            self.peft_type = peft_type(self.peft_type)
        if self.peft_version is None:
            self.peft_version = format_version()
        for name, values in self.choices.items():
            check_choice(self, name, *values)
        for name, least in self.least.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)!r}")

    def check_values(self) -> None:
        """Raise ValueError with the field, its value and what was expected, for what a file could not hold or would be
        refused when it is read: it is no sooner made, put into a model or saved than it could be loaded."""
        types = {f.name: str(f.type) for f in dataclasses.fields(self) if f.name not in self.runtime_fields}
        values, where = {name: getattr(self, name) for name in types}, type(self).__name__
        check_config({**values, "peft_type": self.own_type or self.peft_type or "none"}, where)
        check_numbers(values, types, where)
        check_bytes(self.to_dict(), where)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as json holds it: enums as text, sets as sorted lists, nested configurations as dicts."""
        fields = {f.name: f.default for f in dataclasses.fields(self) if f.name not in self.runtime_fields}
        values = {name: getattr(self, name) for name in fields}
        return {n: _plain(v) for n, v in values.items() if n not in self.not_in_peft or v != fields[n]}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json` into `save_directory`, which is made where it is missing.

        auto_mapping_dict: stored as `auto_mapping`, as PEFT does for models without a task type. push_to_hub: commit
        it to the repository `repo_id`, too.
        """
        if os.path.isfile(save_directory):
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        self.check_values()
        content = self.to_dict()
        if kwargs.get("auto_mapping_dict") is not None:
            content["auto_mapping"] = kwargs["auto_mapping_dict"]
        write_text(os.path.join(save_directory, CONFIG_NAME), json.dumps(content, indent=2, sort_keys=True))
        if (push := pushing(kwargs, save_directory)) is not None:
            self.push_to_hub(**push, auto_mapping_dict=kwargs.get("auto_mapping_dict"))

    def push_to_hub(
        self, repo_id: str, *, commit_message: str = "Upload config", auto_mapping_dict: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:  # fmt: skip
        """Commit `adapter_config.json` to a repository of the Hub, which is made where it is missing.

        options: commit_description, private, token, revision, create_pr. Returns huggingface_hub's CommitInfo.
        """

        def write(folder: str) -> None:
            self.save_pretrained(folder, auto_mapping_dict=auto_mapping_dict)

        return push_to_hub(write, repo_id, commit_message=commit_message, **options)

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """The configuration of the class that `peft_type` names (this class where it is missing).

        Fields that the class does not know are dropped with a warning: they come from a newer version of a file.
        """
        named = kwargs.get("peft_type")
        config_cls: type[PeftConfig] = cls if named is None else class_of(peft_type(named).value)
        known = {f.name for f in dataclasses.fields(config_cls)} - set(config_cls.runtime_fields)
        if unknown := sorted(set(kwargs) - known):
            warn(
                f"Unexpected keyword arguments {unknown} for class {config_cls.__name__}, these are ignored. The "
                "configuration was probably written by a newer version of PEFT."
            )
        return config_cls(**{name: value for name, value in kwargs.items() if name in known})

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: object = "adapter configuration") -> PeftConfig:
        """A configuration from a file's content, its values checked for sense before any is used."""
        if "peft_type" not in content:
            raise NotAnAdapterError(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: {{'peft_type'}}. "
                f"Is {where} an adapter's?", "its configuration names no method",
            )  # fmt: skip
        check_config(content, where)
        return cls.from_peft_type(**content)

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """The content of a configuration file, without the fields that only live in memory."""
        content = read_json(path_json_file)
        content.pop("runtime_config", None)
        return content

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read `adapter_config.json` from a folder or, where there is no such folder, from the Hub."""
        path = find_adapter_file(pretrained_model_name_or_path, CONFIG_NAME, subfolder=subfolder, **kwargs)
        return cls.from_dict(cls.from_json_file(path), path)


def check_is_config(value: object) -> None:
    """TypeError for what is no configuration, such as its fields in a dictionary."""
    if not isinstance(value, PeftConfig):
        how = " get_peft_config makes one of a dictionary." if isinstance(value, Mapping) else ""
        raise TypeError(f"expected a configuration such as LoraConfig(...), got {type(value).__name__}.{how}")


@dataclass
class TargetConfig(PeftConfig):
    """Fields of every method that acts on modules of a model.

    target_modules: names (a module matches by its full name or by a suffix of it that starts after a dot), a regular
        expression for the full name, "all-linear", or None for the default of the model's architecture.
    exclude_modules: the same, for what must not match. layers_to_transform: indices of the layers to adapt, where a
        module's layer is the first number in its name, or the one after `layers_pattern`.
    modules_to_save: modules that are trained in full and saved with the adapter.
    """

    # A text in target_modules is the end of names, rather than an expression.
    text_is_end: ClassVar[bool] = False
    # Targets are modules as a whole, rather than layers with a weight.
    whole_modules: ClassVar[bool] = False
    # Layers are chosen among the targets by `layers_to_transform`, rather than by the method.
    by_layer: ClassVar[bool] = True

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(names := getattr(self, name), (list, tuple)):
                setattr(self, name, set(names))
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and not self.layers_to_transform and self.layers_to_transform != 0:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")

    def narrowed(self, names: list[str]) -> list[str]:
        """Those of the modules that the fields above select, in the model's order, that the method adapts."""
        return names


@dataclass
class PromptLearningConfig(PeftConfig):
    """Fields of every prompt.

    num_virtual_tokens: the prompt's length. token_dim: the width of one, num_attention_heads and num_layers: how keys
    and values are split; the model says them where they are None. num_transformer_submodules: 2 for an encoder and a
    decoder, else 1. modules_to_save: modules that are trained in full and saved with the prompt.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    is_prompt_learning: ClassVar[bool] = True


@dataclass
class HasBias:
    """bias: which biases of the base model are trained too: "none", "all", or those of the adapted layers, which is
    "<method>_only" ("lora_only")."""

    bias: str = "none"


@dataclass
class HasInitWeights:
    """init_weights: start as the identity (True), or with random values that show in a test (False)."""

    init_weights: bool = True


@dataclass
class HasFanInFanOut:
    """fan_in_fan_out: True for layers that store their weight as [in, out] (Conv1D); corrected where it is wrong."""

    fan_in_fan_out: bool = False


@dataclass
class HasProjection:
    """projection_prng_key: the seed of the frozen projections. save_projection: put them into files; where they are in
    none, they are computed again on loading."""

    projection_prng_key: int = 0
    save_projection: bool = True


def _plain(value: Any) -> Any:
    """`value` as json holds it."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(v) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def check_ranks(r: object, pattern: Mapping[str, object] | None = None, field: str = "r") -> None:
    """ValueError for ranks that are none."""
    for name, value in {field: r, **{f"rank_pattern[{k!r}]": v for k, v in (pattern or {}).items()}}.items():
        if type(value) is not int or not 1 <= value <= MAX_RANK:
            raise ValueError(f"`{name}` should be a positive integer value of at most {MAX_RANK}, got {value!r}")


def check_probabilities(config: Any) -> None:
    """ValueError for a dropout that is no probability below one."""
    for name, value in vars(config).items():
        if name.endswith("dropout"):
            check(config, name, 0.0 <= value < 1.0, "in [0, 1)")


def check(config: Any, field: str, good: bool, expected: str) -> None:
    """ValueError for the value of a field unless it is good."""
    if not good:
        raise ValueError(f"`{field}` should be {expected}, got {getattr(config, field)!r}")


def check_choice(config: Any, field: str, *allowed: Any, also: str = "") -> None:
    """ValueError for a value that is none of those allowed. also: what PEFT says of it, after a space."""
    if getattr(config, field) not in allowed:
        *others, last = (repr(value) for value in allowed)
        valid = f"{', '.join(others)} or {last}"
        raise ValueError(f"Invalid {field} value: {getattr(config, field)!r}. Valid values are: {valid}.{also}")
