"""Model cards, the `README.md` beside an adapter, and the way of an adapter to the Hub."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..config.base import CONFIG_NAME
from ..config.types import PeftType, TaskType, warn
from ..config.version import format_version
from ..files.atomic import MANIFEST_NAME, write_text
from ..files.hub import CARD_NAME, push_to_hub
from ..saving.folder import PICKLE_NAME, SAFETENSORS_NAME
from .tuner import BaseTuner

VERSIONS = "### Framework versions"
ADAPTER_OF = "base_model:adapter:"  # the tag that ties an adapter to its base model


def create_or_update_model_card(model: Any, output_dir: str | os.PathLike[str], tags: Iterable[str] = ()) -> None:
    """Write `README.md` as PEFT does: the library, the base model, tags and the version of the format.

    A card that is there keeps its text and what else its header holds. tags: further ones. Raises ValueError for a
    card whose header cannot be read, and leaves it as it is. Needs huggingface_hub, which comes with transformers.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = Path(output_dir) / CARD_NAME
    try:
        card = ModelCard.load(path) if path.exists() else None
    except Exception as error:  # a parser raises whatever the file makes it raise
        raise ValueError(f"{path} should begin with a header in YAML, or have none: {error}") from None
    card = ModelCard.from_template(ModelCardData()) if card is None else card
    data, base, config = card.data, model.get_base_model(), BaseTuner.get_model_config(model)
    data["library_name"] = "peft"
    if not data.get("pipeline_tag") and isinstance(model, model.by_task[TaskType.CAUSAL_LM.value]):
        data["pipeline_tag"] = "text-generation"
    if "_name_or_path" in config:
        data["base_model"] = config["_name_or_path"]
    kept = {tag for tag in data.get("tags") or () if not tag.startswith(ADAPTER_OF)}
    if found := kept | set(tags) | set(getattr(base, "model_tags", None) or ()) | _own_tags(model, base):
        data["tags"] = sorted(found)
    lines, version = card.text.splitlines(), f"- PEFT {format_version()}"
    if version not in lines and VERSIONS in lines:
        lines.insert(lines.index(VERSIONS) + 2, version)
    elif version not in lines:
        lines.append(f"{VERSIONS}\n\n{version}")
    card.text = "\n".join(lines)
    write_text(path, str(card))


def _own_tags(model: Any, base: Any) -> set[str]:
    """Tags by which the Hub finds an adapter."""
    tags = set()
    transformers = sys.modules.get("transformers")  # it was imported if the model is one of its models
    if transformers is not None and isinstance(base, transformers.PreTrainedModel):
        tags.add("transformers")
    if any(config.peft_type == PeftType.LORA for config in model.peft_config.values()):
        tags.add("lora")
    if hasattr(base, "name_or_path"):
        tags.add(f"{ADAPTER_OF}{base.name_or_path}")
    return tags


def update_card(model: Any, folder: str | os.PathLike[str]) -> None:
    """The model card of adapters that were just saved: a card that cannot be read stays as it is, with a warning."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return  # a model that is none of transformers', on a machine without the Hub's library
    try:
        create_or_update_model_card(model, folder)
    except ValueError as error:
        warn(f"The model card is left as it is. {error}", 3)


def push_adapters(model: Any, folder: str | os.PathLike[str], names: Iterable[str], push: dict[str, Any]) -> None:
    """Commit adapters of `names`, as they lie in `folder`, and their card to the Hub."""

    def write(repository: str) -> None:
        for name in names:
            place = "" if name == "default" else name
            os.makedirs(os.path.join(repository, place), exist_ok=True)
            found = [n for n in (SAFETENSORS_NAME, PICKLE_NAME) if os.path.isfile(os.path.join(folder, place, n))]
            for file in (CONFIG_NAME, *found[:1], MANIFEST_NAME):
                shutil.copyfile(os.path.join(folder, place, file), os.path.join(repository, place, file))
        if os.path.isfile(card := os.path.join(folder, CARD_NAME)):
            shutil.copyfile(card, os.path.join(repository, CARD_NAME))

    push_to_hub(write, **{"commit_message": "Upload model"} | push)


def push_model(
    model: Any, repo_id: str, *, commit_message: str = "Upload model", commit_description: str | None = None,
    private: bool | None = None, token: bool | str | None = None, revision: str | None = None, create_pr: bool = False,
    max_shard_size: object = None, tags: Iterable[str] = (), **saving: Any,
) -> Any:  # fmt: skip
    """Commit the adapters to a repository of the Hub, `user/name` or a `name` of the token's user, made if missing.

    The repository's model card keeps what it holds. revision: a branch, made where it is missing. tags: of the card.
    max_shard_size: without effect, since an adapter is one file. saving: arguments of `save_pretrained`. Returns
    huggingface_hub's CommitInfo.
    """

    def write(folder: str) -> None:
        model.save_pretrained(folder, **saving)
        if tags:
            create_or_update_model_card(model, folder, tags)

    return push_to_hub(
        write, repo_id, commit_message=commit_message, commit_description=commit_description, private=private,
        token=token, revision=revision, create_pr=create_pr,
    )  # fmt: skip
