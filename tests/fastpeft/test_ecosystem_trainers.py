"""Our models in the trainers of transformers and TRL, beside PEFT's: the same losses, adapters and files."""

from __future__ import annotations

import copy
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
import transformers
from peft_versions import peft_is
from torch import Tensor, nn

from peft_kernels.testing import assert_same_bits

pytestmark = pytest.mark.ecosystem
tools = runpy.run_path(str(Path(__file__).with_name("ecosystem_tools.py")))
adapted, llama, logits, lora, losses, rows, texts, tokenizer, trained, trainer, trl_trainer = (
    tools[n]
    for n in (
        "adapted", "llama", "logits", "lora", "losses", "rows", "texts", "tokenizer", "trained", "trainer",
        "trl_trainer",
    )
)
assert_as_good = runpy.run_path(str(Path(__file__).with_name("peft_tools.py")))["assert_as_good"]
STEPS = 20
PAIRS = {"chosen": ["abcd", "cdef", "aaaa", "bbbb"], "rejected": ["efgh", "ghij", "zzzz", "yyyy"]}
Make = Callable[..., Any]


def products(model: Any) -> dict[str, Tensor]:
    """scaling B A of every layer, by its name."""
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer))
    return {n: m.scaling["default"] * m.lora_B["default"].weight @ m.lora_A["default"].weight for n, m in layers}


def assert_same_training(ours: Any, theirs: Any) -> None:
    """Trainers after their training: losses within 2e-3, products within 2 % (Frobenius)."""
    found, expected = losses(ours), losses(theirs)
    assert len(found) == len(expected) > 0
    assert found == pytest.approx(expected, rel=2e-3, abs=1e-6)
    assert len({round(loss, 5) for loss in found}) > 1
    a, b = products(ours.model), products(theirs.model)
    assert a.keys() == b.keys()
    for name, product in b.items():
        assert product.norm() > 0
        assert (a[name] - product).norm() <= 0.02 * product.norm(), name


def train(made: Any, **options: Any) -> None:
    torch.manual_seed(3)  # of what a trainer draws: noise, completions, the order of the data
    made.train(**options)


def with_trainer(model: Any, folder: Path, **options: Any) -> Any:
    return trainer(model, folder, **options)


def with_sft(model: Any, folder: Path, **options: Any) -> Any:
    return trl_trainer("SFT", model, folder, texts(), **options)


@pytest.mark.parametrize("make", [with_trainer, with_sft], ids=["Trainer", "SFTTrainer"])
def test_twenty_steps_are_pefts(make: Make, tmp_path: Path) -> None:
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "steps": STEPS}
    made = [make(adapted(library), tmp_path / library.__name__, **options) for library in (fastpeft, peft)]
    for each in made:
        train(each)
        each.save_model(str(Path(each.args.output_dir) / "saved"))
    assert_same_training(*made)
    folders = [Path(each.args.output_dir) / "saved" for each in made]
    assert_same_files(*folders)
    loaded = peft.PeftModel.from_pretrained(llama(), folders[0])
    assert_as_good([logits(made[0].model)], [logits(loaded)], [logits(copy.deepcopy(loaded).double())])


def assert_same_files(ours: Path, theirs: Path) -> None:
    """The adapter alone, with PEFT's keys and configuration."""
    names = [{f.name for f in folder.iterdir()} - {"README.md", "fastpeft_manifest.json"} for folder in (ours, theirs)]
    assert names[0] == names[1]
    assert "model.safetensors" not in names[0]
    from safetensors import safe_open

    keys = [{*safe_open(folder / "adapter_model.safetensors", "pt").keys()} for folder in (ours, theirs)]
    assert keys[0] == keys[1]
    read = [json.loads((folder / "adapter_config.json").read_text()) for folder in (ours, theirs)]
    for content in read:
        content["target_modules"].sort()  # PEFT writes a set as it comes
        if peft_is("<0.21"):  # fields that came later, and how it says that a base has no name
            left_out = content.keys() - read[1].keys() | {"peft_version", "base_model_name_or_path"}
            for name in left_out & content.keys():
                del content[name]
    assert read[0] == read[1]


COMPLETIONS = {"prompt": ["ab"] * 4, "completion": ["cd", "ef", "gh", "ij"]}
# TRL's trainer, its data, its options, those of the adapter.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "packing": ("SFT", {}, {"packing": True, "max_length": 16, "packing_strategy": "wrapped"}, {}),
    "completions": ("SFT", COMPLETIONS, {}, {}),
    "smoothing": ("SFT", {}, {"label_smoothing_factor": 0.1}, {}),
    "whole logits": ("SFT", {}, {"loss_type": "nll"}, {}),
    "dft": ("SFT", {}, {"loss_type": "dft"}, {}),
    "head": ("SFT", {}, {}, {"modules_to_save": ["lm_head"]}),
    "tokens": ("SFT", {}, {}, {"trainable_token_indices": [3, 4]}),
    "dora": ("SFT", {}, {}, {"use_dora": True}),
    "kto": ("KTO", {**COMPLETIONS, "label": [True, False, True, False]}, {}, {}),
    "dpo with a head": ("DPO", {"prompt": ["ab"] * 4, **PAIRS}, {}, {"modules_to_save": ["lm_head"]}),
    "references first": ("DPO", {"prompt": ["ab"] * 4, **PAIRS}, {"precompute_ref_log_probs": True}, {}),
}


@pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
def test_trls_options_work_as_with_peft(case: tuple[str, Any, Any, Any], tmp_path: Path) -> None:
    kind, data, options, adapter = case
    made = [
        trl_trainer(kind, adapted(library, **adapter), tmp_path / library.__name__, texts(**data), **options)
        for library in (fastpeft, peft)
    ]
    for each in made:
        train(each)
    assert_same_training(*made)


OPTIONS: dict[str, dict[str, Any]] = {
    "label smoothing": {"label_smoothing_factor": 0.1},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "accumulation": {"gradient_accumulation_steps": 2},
    "bfloat16": {"bf16": True},
    "noise": {"neftune_noise_alpha": 5.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_trainers_options_work_as_with_peft(options: dict[str, Any], tmp_path: Path) -> None:
    made = [trainer(adapted(library), tmp_path / library.__name__, **options) for library in (fastpeft, peft)]
    for each in made:
        train(each)
    assert_same_training(*made)


def accuracy(prediction: Any) -> dict[str, float]:
    right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
    return {"accuracy": float(right.mean())}


def test_evaluation_resuming_and_the_best_model(tmp_path: Path) -> None:
    """The model with the largest loss is called the best, so that it is not the last."""
    options = {
        "eval_dataset": rows(), "compute_metrics": accuracy, "eval_strategy": "steps", "eval_steps": 1,
        "save_strategy": "steps", "save_steps": 1, "learning_rate": 10.0, "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss", "greater_is_better": True,
    }  # fmt: skip
    made = [trainer(adapted(library), tmp_path / library.__name__, steps=5, **options) for library in (fastpeft, peft)]
    for each in made:
        train(each)
    ours, theirs = made
    assert losses(ours, "eval_loss") == pytest.approx(losses(theirs, "eval_loss"), rel=2e-3)
    assert losses(ours, "eval_accuracy") == losses(theirs, "eval_accuracy")
    best = [Path(each.state.best_model_checkpoint) for each in made]
    assert best[0].name == best[1].name == "checkpoint-2"
    assert_same_training(ours, theirs)
    loaded = fastpeft.PeftModel.from_pretrained(llama(), best[0])
    for key, value in fastpeft.get_peft_model_state_dict(loaded).items():
        assert_same_bits(fastpeft.get_peft_model_state_dict(ours.model)[key], value)
    assert not (best[0] / "model.safetensors").exists()
    again = trainer(adapted(fastpeft), tmp_path / "again", steps=5, **options)
    train(again, resume_from_checkpoint=str(tmp_path / "fastpeft" / "checkpoint-2"))
    assert losses(again, "eval_loss") == losses(ours, "eval_loss")


def with_dpo(model: Any, folder: Path, **options: Any) -> Any:
    return trl_trainer("DPO", model, folder, texts(prompt=["ab"] * 4, **PAIRS), **options)


def with_grpo(model: Any, folder: Path, **options: Any) -> Any:
    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [len(text) + text.count("a") for text in completions]

    given = {"reward_funcs": reward}
    options = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, **options}
    return trl_trainer("GRPO", model, folder, texts(prompt=["ab", "cd", "ef", "gh"]), given=given, **options)


def classifier(library: Any) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(llama().config)
    config.num_labels = 1
    base = transformers.LlamaForSequenceClassification(config)
    torch.manual_seed(1)
    return library.get_peft_model(base, lora(library, task_type="SEQ_CLS"))


def with_reward(model: Any, folder: Path, **options: Any) -> Any:
    return trl_trainer("Reward", model, folder, texts(**PAIRS), learning_rate=0.1, **options)


@pytest.mark.parametrize(
    ("make", "model"),
    [(with_dpo, adapted), (with_grpo, adapted), (with_reward, classifier)],
    ids=["DPO", "GRPO", "Reward"],
)
def test_preferences_are_learnt_as_with_peft(make: Make, model: Make, tmp_path: Path) -> None:
    made = [make(model(library), tmp_path / library.__name__) for library in (fastpeft, peft)]
    for each in made:
        train(each)
        each.save_model(str(Path(each.args.output_dir) / "saved"))
    assert_same_training(*made)
    # The reference is a copy of the adapter, no second model.
    assert list(made[0].model.peft_config) == list(made[1].model.peft_config)
    assert getattr(made[0], "ref_model", None) is None
    assert_same_files(*(Path(each.args.output_dir) / "saved" for each in made))


def four_bits(folder: Path) -> nn.Module:
    llama().save_pretrained(folder)
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.float32)


@pytest.mark.parametrize("make", [with_trainer, with_sft], ids=["Trainer", "SFTTrainer"])
def test_a_model_in_four_bits_is_trained(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    made = []
    for library in (fastpeft, peft):
        base = library.prepare_model_for_kbit_training(four_bits(tmp_path / "base"))
        torch.manual_seed(1)
        model = library.get_peft_model(base, lora(library, task_type="CAUSAL_LM"))
        assert isinstance(model.get_base_model().model.layers[0].self_attn.q_proj, peft.tuners.lora.Linear4bit)
        made.append(make(model, tmp_path / library.__name__, learning_rate=0.1))
        made[-1].train()
    ours, theirs = made
    assert losses(ours) == pytest.approx(losses(theirs), rel=2e-2)
    assert {p.dtype for p in trained(ours.model).values()} == {p.dtype for p in trained(theirs.model).values()}
