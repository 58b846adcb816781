"""Poly beside live PEFT: training, generation, batches of several adapters, and what is refused."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
from torch import Tensor

tools = runpy.run_path(str(Path(__file__).with_name("variants_tools.py")))
IDS, Net, close, pair, run = (tools[name] for name in ("IDS", "Net", "close", "pair", "run"))
TASKS = torch.tensor([2, 0, 2])
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::fastpeft.config.types.PeftWarning")


def options(**more: Any) -> Any:
    return lambda package: {"target_modules": ["up", "head"], "task_type": "CAUSAL_LM", "r": 2, "n_tasks": 3,
                            "init_weights": False, **more}  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"n_tasks": 5, "n_skills": 3}], ids=["by_task", "by_row"])
def test_poly_starts_computes_and_trains_as_pefts_does(more: dict[str, Any]) -> None:
    """In training the weights of each row are drawn, with PEFT's numbers."""
    ours, theirs = pair(options(**more), "PolyConfig")
    mine, expected = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(mine[key], value)
    for train in (False, True):
        found, wanted = run(ours, train, task_ids=TASKS), run(theirs, train, task_ids=TASKS)
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            close(value, wanted[name], times=8)


def test_what_is_kept_in_evaluation_follows_the_adapter() -> None:
    model = fastpeft.get_peft_model(Net(), fastpeft.PolyConfig(**options()(None))).eval()
    with torch.no_grad():
        first = model(IDS, task_ids=TASKS)
        assert torch.equal(model(IDS, task_ids=TASKS), first)
        for name in ("poly_lora_A", "poly_lora_B", "poly_router"):
            entry = getattr(model.base_model.model.up, name)["default"]
            (entry.module_logits if name == "poly_router" else entry).mul_(-1.5)
            changed = model(IDS, task_ids=TASKS)
            assert not torch.equal(changed, first)
            first = changed
    close(model(IDS, task_ids=TASKS), first)  # with gradients nothing is kept


def test_rows_of_a_batch_with_several_adapters() -> None:
    torch.manual_seed(0)
    model = fastpeft.get_peft_model(Net(), fastpeft.PolyConfig(**options()(None)), "a")
    model.add_adapter("b", fastpeft.PolyConfig(**options(n_tasks=4, n_splits=2, target_modules=["up"])(None)))
    lora = {"r": 2, "target_modules": ["up"], "init_lora_weights": False}
    model.add_adapter("lora", fastpeft.LoraConfig(**lora))
    alone = {}
    for name in ("a", "b", "lora"):
        model.set_adapter(name)
        alone[name] = model.eval()(IDS, task_ids=TASKS)
    names = ["b", "lora", "a"]
    mixed = model(IDS, task_ids=TASKS, adapter_names=names)
    for i, name in enumerate(names):
        close(mixed[i], alone[name][i])


def generated(package: Any, tmp: Path, **how: Any) -> Tensor:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 31}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    if not tmp.exists():
        torch.manual_seed(1)
        config = package.PolyConfig(task_type="SEQ_2_SEQ_LM", r=4, n_tasks=3, init_weights=False)
        model = package.get_peft_model(base, config).eval()
        model.save_pretrained(tmp)
    else:
        model = package.PeftModel.from_pretrained(base, tmp)
    tokens: Tensor = model.generate(input_ids=IDS, task_ids=TASKS, max_new_tokens=5, min_new_tokens=5, **how)
    return tokens


def test_generation_and_files_of_an_encoder_and_decoder(tmp_path: Path) -> None:
    ours, theirs = generated(fastpeft, tmp_path / "ours"), generated(peft, tmp_path / "theirs")
    assert torch.equal(ours, theirs)
    assert torch.equal(generated(fastpeft, tmp_path / "theirs"), theirs)
    assert torch.equal(generated(peft, tmp_path / "ours"), theirs)
    # beams repeat the rows of the decoder alone, with which PEFT cannot do
    assert generated(fastpeft, tmp_path / "ours", num_beams=2).shape == theirs.shape


def test_poly_refuses_what_makes_no_sense() -> None:
    model = fastpeft.get_peft_model(Net(), fastpeft.PolyConfig(**options()(None)))
    for ids, told in (
        (None, "task_ids should not be None"),
        (torch.tensor([0, 1, 3]), "Only 3 tasks available. Found task id = 3"),
        (torch.tensor([0, -1, 2]), "Only 3 tasks available. Found task id = -1"),
        (torch.tensor([0, 1]), "task_ids has 2 tasks, but a layer's input has 3 rows"),
        (torch.tensor([0.0, 1.0, 2.0]), "one integer for each row"),
    ):
        with pytest.raises(ValueError, match=told):
            model(IDS, task_ids=ids)
    with model.disable_adapter():
        assert torch.equal(model(IDS), Net()(IDS))
    with pytest.raises(ValueError, match="each task has another weight"):
        model.merge_adapter()
    for bad, told in (({"n_splits": 5}, "divisible by n_splits"), ({"r": 0}, "`r` should be a positive integer"),
                      ({"poly_type": "mhr"}, "Invalid poly_type"), ({"n_tasks": 0}, "`n_tasks`")):  # fmt: skip
        base = Net()
        with pytest.raises(ValueError, match=told):
            fastpeft.get_peft_model(base, fastpeft.PolyConfig(**options(**bad)(None)))
        assert not hasattr(base, "peft_config")
        assert type(base.up) is torch.nn.Linear
