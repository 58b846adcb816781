"""Models of every described family: with `accelerate` no worse than without, beside float64, and undone."""

from __future__ import annotations

import ast
import copy
import inspect
import itertools
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import fastpeft
from fastpeft.families import known
from fastpeft.families.registry import families, parts
from forms import matrix

_tools = runpy.run_path(str(Path(__file__).with_name("families_tools.py")))
FAMILIES = _tools["FAMILIES"]
adapted, compare, draws, errors_of, exactly, logits_and_gradients, tiny, worst = (
    _tools[name] for name in ("adapted", "compare", "draws", "errors_of", "exactly", "logits_and_gradients", "tiny",
                              "worst")
)  # fmt: skip
F32, BF16 = torch.float32, torch.bfloat16
SHORT = ("gemma2", "phi3", "cohere")  # caps, norms with an offset and windows; fused projections; neighbours and means
# base, adapter, training, padding, checkpointing
SETTINGS = (
    ("dense", "none", False, False, False), ("dense", "lora", True, True, False), ("nf4", "lora", True, False, True),
    ("nf4", "dora", True, True, False), ("nf4", "none", False, True, False),
)  # fmt: skip


def inputs(rows: int, tokens: int, padded: bool) -> dict[str, Tensor]:
    ids = torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def tiny_model(name: str, draw: int, dtype: torch.dtype, shape: str, setting: Any) -> Any:
    base, adapter, training, _, checkpointing = setting
    model = adapted(tiny(name, dtype, shape, draw=draw), base, adapter).train(training)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model


@pytest.mark.parametrize(("name", "dtype", "setting", "shape"), matrix(
    itertools.product(FAMILIES, (F32, BF16), SETTINGS, ("groups", "one")),
    lambda name, dtype, setting, shape: name in SHORT and shape == "groups" and (dtype is F32) == (setting[0] == "nf4"),
))  # fmt: skip
def test_outputs_and_gradients(name: str, dtype: torch.dtype, setting: Any, shape: str) -> None:
    given, trained = inputs(2, 11, setting[3]), setting[1] != "none"
    compare([errors_of(tiny_model(name, draw, dtype, shape, setting), given, trained, dtype) for draw in draws(name)],
            dtype)  # fmt: skip


def test_every_description_has_a_model_here() -> None:
    here = Path(__file__)
    others = {*runpy.run_path(str(here.with_name("vision_tools.py")))["FAMILIES"]}
    others |= {family for family, *_ in runpy.run_path(str(here.with_name("encoder_tools.py")))["ENCODERS"].values()}
    assert set(families()) - others == set(FAMILIES) - others


@pytest.mark.parametrize("name", families())
def test_a_description_is_a_short_file_without_a_forward(name: str) -> None:
    """Data: functions say something of a module in one line, and imports are of the words, or of another family."""
    text = (Path(known.__path__[0]) / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    nodes = list(ast.walk(ast.parse(text)))
    assert not [n for n in nodes if isinstance(n, ast.AsyncFunctionDef | ast.ClassDef | ast.Import)]
    for function in (n for n in nodes if isinstance(n, ast.FunctionDef)):
        assert [a.arg for a in function.args.args] == ["module"]
        assert [type(line) for line in function.body] == [ast.Return]
    assert {n.module for n in nodes if isinstance(n, ast.ImportFrom)} <= {"description", None}
    assert parts(name)


TOKENS = 32
STATIC = (("dense", True, True), ("dense", False, True))  # without padding a first call has no mask, but keys to come
NO_STATIC = ("gemma4", "nemotron_h", "deepseek_v4")


def behind(model: Any, report: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """How far the exact logits of the chosen tokens are below the largest, at most; eager's largest error."""
    report.remove()
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "position_ids" in inspect.signature(model.get_base_model().forward).parameters:
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        eager = model(**given).logits[:, -TOKENS - 1 : -1]
        with exactly(model) as exact_model:
            exact = exact_model(**given).logits[:, -TOKENS - 1 : -1]
    chosen = exact.gather(-1, ids[:, -TOKENS:, None]).squeeze(-1)
    return (exact.amax(-1) - chosen).max(), (eager.double() - exact).abs().max()


@pytest.mark.parametrize(("name", "dtype", "base", "padded", "static"), matrix(
    [(name, dtype, base, padded, static) for name in FAMILIES for dtype in (F32, BF16)
     for base, padded, static in (("dense", False, False), ("nf4", True, False), *STATIC)],
    lambda name, dtype, base, padded, static: name in SHORT and base == "nf4" and dtype is BF16,
))  # fmt: skip
def test_generating(name: str, dtype: torch.dtype, base: str, padded: bool, static: bool) -> None:
    """Greedy tokens are equal in float32; in bfloat16 each one's exact logit is as near to the largest as eager's."""
    if static and name in NO_STATIC:
        pytest.skip("transformers has no static cache for it")
    model = adapted(tiny(name, dtype), base, "lora")
    given = inputs(2, 8, padded)
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False}
    if static:
        options |= {"cache_implementation": "static", "disable_compile": True}
    plain = model.generate(**given, **options)
    report = fastpeft.accelerate(model)
    fast = model.generate(**given, **options)
    assert fast.shape == plain.shape == (2, 8 + TOKENS)
    if dtype is F32:
        assert torch.equal(fast, plain)
        return
    mask = torch.cat((given["attention_mask"], torch.ones(2, TOKENS, dtype=torch.long)), -1)
    short, error = behind(model, report, fast, mask)
    assert short <= error


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_training_after_inference_mode(name: str) -> None:
    """Nothing that a forward in inference mode kept is used by a later one; a mask of it has no version to compare."""
    model, given = tiny(name), inputs(2, 11, True)
    given["attention_mask"] = given["attention_mask"].flip(-1)  # BLOOM's blind queries are NaN in float64
    seen, wide = given["attention_mask"].bool(), copy.deepcopy(model).double()
    with torch.inference_mode():
        plain, exact = model(**given).logits[seen], wide(**given).logits[seen]
        fastpeft.accelerate(model)
        fast = model(**given).logits[seen]
        compare([[(worst(fast, exact), worst(plain, exact), exact.abs().max())]], F32)
    logits_and_gradients(model, given, False)
