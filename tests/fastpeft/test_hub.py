"""Adapters on the Hub, both ways, and their model cards: against a Hub on this machine, beside PEFT."""

from __future__ import annotations

import copy
import runpy
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fastpeft
import peft
import pytest
import torch
from fastpeft.config import __version__ as FORMAT
from huggingface_hub import ModelCard
from peft_versions import INSTALLED, needs_peft
from torch import nn

from peft_kernels.testing import assert_same_bits

here = Path(__file__)
local_hub = runpy.run_path(str(here.with_name("hub_tools.py")))["local_hub"]
tools = runpy.run_path(str(here.with_name("model_tools.py")))
llama, X = tools["llama"], tools["X"]
BOTH = pytest.mark.parametrize("library", [fastpeft, peft], ids=["ours", "peft"])


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with local_hub(tmp_path / "cache", monkeypatch) as found:
        yield found


def config(library: ModuleType, **options: Any) -> Any:
    return library.LoraConfig(**tools["config"](**options))


def base(name: str = "") -> Any:
    model = llama()
    model.name_or_path = model.config._name_or_path = name
    return model


def adapted(library: ModuleType, name: str = "", seed: int = 1, **options: Any) -> Any:
    model = library.get_peft_model(base(name), config(library, task_type="CAUSAL_LM", **options))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


def saved(folder: Path, seed: int, **options: Any) -> dict[str, torch.Tensor]:
    """Tensors of an adapter, which is put into a folder."""
    model = adapted(fastpeft, seed=seed, **options)
    model.save_pretrained(folder)
    return dict(fastpeft.get_peft_model_state_dict(model))


def state(library: ModuleType, model: Any) -> dict[str, torch.Tensor]:
    return dict(library.get_peft_model_state_dict(model))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_same_bits(found[key], value)


# ---- from the Hub ------------------------------------------------------------------------------------------------


@BOTH
def test_revision_subfolder_token_and_cache(library: ModuleType, hub: Any, tmp_path: Path) -> None:
    """As PEFT's: each way to read gets the revision, the subfolder and the token of its call."""
    wanted = saved(tmp_path / "a", seed=1)
    hub.put("me/lora", tmp_path / "a", "v2", "deep/one")
    saved(tmp_path / "b", seed=2)
    hub.put("me/lora", tmp_path / "b", "main", "deep/one")
    where = {"revision": "v2", "subfolder": "deep/one", "token": "hf_secret", "cache_dir": str(tmp_path / "own")}
    assert library.PeftConfig.from_pretrained("me/lora", **where).r == 4
    model = library.PeftModel.from_pretrained(base(), "me/lora", **where)
    assert_same(state(library, model), wanted)
    model.load_adapter("me/lora", "second", **where)
    assert_same(dict(library.get_peft_model_state_dict(model, adapter_name="second")), wanted)
    assert set(library.load_peft_weights("me/lora", device="cpu", **where)) == set(wanted)
    assert hub.tokens() == {"hf_secret"}
    assert {path.split("/")[4] for _, path, _ in hub.asked} == {"v2"}
    assert list((tmp_path / "own").glob("models--me--lora"))
    assert not list((tmp_path / "cache").glob("models--*"))


def test_what_is_cached_is_read_without_asking(hub: Any, tmp_path: Path) -> None:
    """force_download fetches it anew; local_files_only takes what the cache has, and what it lacks is an error."""
    wanted = saved(tmp_path / "a", seed=1)
    hub.put("me/lora", tmp_path / "a")
    fastpeft.PeftModel.from_pretrained(base(), "me/lora")
    hub.asked.clear()
    loaded = fastpeft.PeftModel.from_pretrained(base(), "me/lora", local_files_only=True)
    assert_same(state(fastpeft, loaded), wanted)
    assert not hub.asked
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at 'me/other'"):
        fastpeft.PeftModel.from_pretrained(base(), "me/other", local_files_only=True)
    fastpeft.load_peft_weights("me/lora")
    assert all(method == "HEAD" for method, _, _ in hub.asked)
    fastpeft.load_peft_weights("me/lora", force_download=True)
    assert [path for method, path, _ in hub.asked if method == "GET"] == [
        "/me/lora/resolve/main/adapter_config.json", "/me/lora/resolve/main/adapter_model.safetensors",
    ]  # fmt: skip


@BOTH
def test_the_adapter_alone_loads_its_base(library: ModuleType, hub: Any, tmp_path: Path) -> None:
    """AutoPeftModel: Hub arguments reach the adapter, revision and subfolder not the base model."""
    needs_peft(">=0.20" if library is peft else ">=0", "AutoPeftModel loads the adapter of no revision but main")
    base().save_pretrained(tmp_path / "base")
    model = adapted(library, str(tmp_path / "base"))
    model.save_pretrained(tmp_path / "a")
    hub.put("me/lora", tmp_path / "a", "v2")
    loaded = library.AutoPeftModelForCausalLM.from_pretrained("me/lora", revision="v2", token="hf_secret")
    assert_same(state(library, loaded), state(library, model))
    assert {token for _, path, token in hub.asked if "/me/lora/" in path} == {"hf_secret"}
    assert_same_bits(loaded.eval()(X).logits, model.eval()(X).logits)


@BOTH
def test_embeddings_grow_with_the_adapters_tokenizer(library: ModuleType, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    base().save_pretrained(tmp_path / "base")
    grown, folder = base(str(tmp_path / "base")), tmp_path / "a"
    grown.resize_token_embeddings(tokens := grown.config.vocab_size + 5)
    library.get_peft_model(grown, config(library, task_type="CAUSAL_LM")).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(tokens)}, "w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    found = library.AutoPeftModelForCausalLM.from_pretrained(folder).get_input_embeddings()
    assert found.weight.shape[0] == tokens


def test_an_unknown_repository_is_an_error_and_the_model_as_it_was(hub: Any) -> None:
    model = base()
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at 'me/none'"):
        fastpeft.PeftModel.from_pretrained(model, "me/none")
    assert not hasattr(model, "peft_config")


# ---- to the Hub --------------------------------------------------------------------------------------------------


def test_push_to_hub_and_back(hub: Any, tmp_path: Path) -> None:
    """PEFT loads what was pushed; the repository's own card keeps its text."""
    model = adapted(fastpeft, "org/base")
    model.add_adapter("other", config(fastpeft))
    hub.files["me/lora"] = {"main": {"README.md": b"---\nlicense: mit\n---\nOur text.\n"}}
    model.push_to_hub(
        "me/lora", commit_message="first", commit_description="more", private=True, token="hf_secret", tags=["mine"]
    )  # fmt: skip
    assert hub.created[0].get("private") or hub.created[0]["visibility"] == "private"  # by huggingface_hub's version
    assert hub.tokens() == {"hf_secret"}
    commit = hub.commits[0]
    assert (commit["repo"], commit["revision"], commit["summary"]) == ("me/lora", "main", "first")
    assert commit["description"] == "more"
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert {*names, *(f"other/{name}" for name in names[1:])} <= {*commit["files"]}
    pushed = ModelCard(hub.files["me/lora"]["main"]["README.md"].decode())
    assert "Our text." in pushed.text
    assert (pushed.data.license, pushed.data.base_model) == ("mit", "org/base")
    assert {"mine", "lora"} <= {*pushed.data.tags}
    for name, folder in (("default", None), ("other", "other")):
        loaded = peft.PeftModel.from_pretrained(base(), "me/lora", subfolder=folder)
        assert_same(state(peft, loaded), dict(fastpeft.get_peft_model_state_dict(model, adapter_name=name)))


def test_saving_pushes_what_it_saved(hub: Any, tmp_path: Path) -> None:
    """save_pretrained(push_to_hub=True): the folder's name is the repository's; other files in the folder stay here."""
    model = adapted(fastpeft)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "optimizer.pt").write_bytes(b"large")
    (folder / "README.md").write_text("Local text.\n")
    model.save_pretrained(folder, push_to_hub=True, revision="next", token="hf_secret", create_pr=False)
    commit = hub.commits[0]
    assert (commit["repo"], commit["revision"], commit["summary"]) == ("me/mine", "next", "Upload model")
    assert "optimizer.pt" not in commit["files"]
    assert b"Local text." in hub.files["me/mine"]["next"]["README.md"]
    assert hub.files["me/mine"]["main"] == {}
    loaded = fastpeft.PeftModel.from_pretrained(base(), "me/mine", revision="next")
    assert_same(state(fastpeft, loaded), state(fastpeft, model))
    model.save_pretrained(folder, push_to_hub=True, is_main_process=False)
    assert len(hub.commits) == 1


def test_a_configuration_is_pushed(hub: Any, tmp_path: Path) -> None:
    config(fastpeft).push_to_hub("me/settings")
    config(fastpeft, lora_dropout=0.25).save_pretrained(tmp_path / "c", push_to_hub=True, repo_id="me/settings")
    assert [commit["files"] for commit in hub.commits] == [["adapter_config.json"]] * 2
    assert peft.PeftConfig.from_pretrained("me/settings").lora_dropout == 0.25


def test_a_model_that_cannot_be_saved_commits_nothing(hub: Any) -> None:
    with pytest.raises(ValueError, match="selected_adapters names"):
        adapted(fastpeft).push_to_hub("me/lora", selected_adapters=["other"])
    assert not hub.commits


def test_a_pickle_is_pushed_when_asked_for(hub: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="writes adapter_model.bin, a pickle"):
        adapted(fastpeft).save_pretrained(
            tmp_path / "lora", safe_serialization=False, push_to_hub=True, repo_id="me/lora"
        )
    assert [name for name in hub.commits[0]["files"] if name.startswith("adapter_model")] == ["adapter_model.bin"]


# ---- model cards -------------------------------------------------------------------------------------------------


def card(model: Any, folder: Path, text: str | None = None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    if text is not None:
        (folder / "README.md").write_text(text)
    model.save_pretrained(folder)
    return (folder / "README.md").read_text()


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)


TEXTS = {
    "new": None,
    "kept": "---\nlicense: mit\nlanguage:\n- en\npipeline_tag: summarization\nmeta: hello\n---\n# Mine\n\nText.\n",
    "older": "---\nlicense: mit\n---\n# Mine\n\n### Framework versions\n\n- PEFT 0.18.0\n- other 1\n",
    "no header": "Only text.\n",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("kind", ["causal", "unnamed", "ia3", "plain"])
def test_cards_are_pefts(kind: str, text: str | None, tmp_path: Path) -> None:
    """Byte for byte, twice in a row."""
    found = []
    for library in (fastpeft, peft):
        if kind == "plain":
            model = library.get_peft_model(Plain(), library.LoraConfig(target_modules=["q_proj"]))
        elif kind == "ia3":
            options = {"target_modules": ["q_proj"], "feedforward_modules": []}
            model = library.get_peft_model(base("org/base"), library.IA3Config(**options))
        else:
            name = "org/base" if kind == "causal" else ""
            given = base(name)
            given.add_model_tags(["theirs", "more"])
            model = library.get_peft_model(given, config(library, task_type="CAUSAL_LM"))
        folder = tmp_path / library.__name__
        found.append([card(model, folder, text), card(model, folder)])
    assert found[0] == [made.replace(f"PEFT {INSTALLED}", f"PEFT {FORMAT}") for made in found[1]]
    assert "library_name: peft" in found[0][0]


def test_tags_of_a_card_stay(tmp_path: Path) -> None:
    """PEFT forgets them; the tag of another base model is not kept."""
    text = "---\ntags:\n- sft\n- base_model:adapter:org/old\n---\nText.\n"
    tags = ModelCard(card(adapted(fastpeft, "org/base"), tmp_path, text)).data.tags
    assert tags == ["base_model:adapter:org/base", "lora", "sft", "transformers"]


def test_a_card_that_cannot_be_read_stays_and_the_adapter_is_saved(tmp_path: Path) -> None:
    model, text = adapted(fastpeft), "---\n: [\n---\nText.\n"
    (tmp_path / "README.md").write_text(text)
    with pytest.warns(fastpeft.PeftWarning, match="The model card is left as it is"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"README.md should begin with a header in YAML"):
        model.create_or_update_model_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == text
    assert_same(fastpeft.load_peft_weights(tmp_path, device="cpu"), state(fastpeft, model))


def test_an_edited_card_leaves_a_folder_whole(tmp_path: Path) -> None:
    """The manifest does not speak of cards."""
    with fastpeft.atomic_directory(tmp_path / "checkpoint-1") as folder:
        adapted(fastpeft).save_pretrained(folder)
    (tmp_path / "checkpoint-1/README.md").write_text("Mine.\n")
    assert fastpeft.newest_valid(tmp_path) == tmp_path / "checkpoint-1"


# ---- a configuration of one's own, and deleting several -----------------------------------------------------------


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_given_configuration_becomes_the_adapters(is_trainable: bool, tmp_path: Path) -> None:
    needs_peft(">=0.21", "their LoraConfig has fewer fields than ours, those of 0.21")
    saved(tmp_path, seed=1)
    told = []
    for library in (fastpeft, peft):
        given = config(library, task_type="CAUSAL_LM", lora_dropout=0.5, inference_mode=is_trainable)
        model = library.PeftModel.from_pretrained(base(), tmp_path, config=given, is_trainable=is_trainable)
        assert model.peft_config["default"] is given
        assert any(p.requires_grad for p in model.parameters()) is is_trainable
        told.append(given.to_dict() | {"target_modules": given.target_modules})
    assert told[0] == told[1] | {"peft_version": told[0]["peft_version"]}


@BOTH
def test_fields_of_a_newer_version_are_left_out(library: ModuleType, tmp_path: Path) -> None:
    """In PEFT's words, which scripts filter by."""
    file = tmp_path / "adapter_config.json"
    file.write_text('{"peft_type": "LORA", "r": 4, "foo": 1, "bar": 2}')
    words = r"Unexpected keyword arguments \['bar', 'foo'\] for class LoraConfig, these are ignored"
    with pytest.warns(UserWarning, match=words):
        assert library.PeftConfig.from_pretrained(tmp_path).r == 4


def test_a_given_configuration_that_does_not_fit_is_left_alone(tmp_path: Path) -> None:
    saved(tmp_path, seed=1)
    given = config(fastpeft, r=2, task_type="CAUSAL_LM")
    before = copy.deepcopy(given.to_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        fastpeft.PeftModel.from_pretrained(base(), tmp_path, config=given)
    assert given.to_dict() == before
    with pytest.raises(ValueError, match="must be a PeftConfig"):
        fastpeft.PeftModel.from_pretrained(base(), tmp_path, config={"r": 4})


def test_several_adapters_are_deleted_together() -> None:
    """As by PEFT one after another; on an error none is."""
    ours, theirs = adapted(fastpeft), adapted(peft)
    for library, model in ((fastpeft, ours), (peft, theirs)):
        for name in "abc":
            model.add_adapter(name, config(library))
        model.set_adapter("b")
    with pytest.raises(ValueError, match="Adapter none, never does not exist"):
        ours.delete_adapter(["a", "none", "never"])
    ours.merge_adapter(["a"])
    with pytest.raises(ValueError, match=r"Cannot delete adapter.*'a'.* while they are merged"):
        ours.delete_adapter(["b", "a"])
    assert list(ours.peft_config) == ["default", "a", "b", "c"]
    ours.unmerge_adapter()
    ours.delete_adapter(["b", "a", "b"])
    for name in ("b", "a"):
        theirs.delete_adapter(name)
    assert list(ours.peft_config) == list(theirs.peft_config) == ["default", "c"]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.active_adapters == ["c"]  # by name
    from fastpeft.functional import delete_adapter

    assert delete_adapter(ours.get_base_model(), ["c", "default"]) is None
    assert not [name for name, _ in ours.named_parameters() if "lora_" in name]
