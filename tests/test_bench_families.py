"""The bench of the families: what it runs, what its bounds are, what counts as met, and what becomes of failures."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from forms import matrix

from bench.measure import Stats
from bench.results import Claim, Row
from bench.suites import PARTS, bounds, families, families_models, families_worker

# widths that bitsandbytes can repack: multiples of 64
TINY = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 96, "intermediate_size": 128}  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families_models, "USUAL", families_models.USUAL | TINY)


def loaded(family: str, mode: str, folder: Path) -> families_worker.Loaded:
    task = {"dropout": 0.05, "rows": 2, "length": 8, "tokens": 3}
    return families_worker.Loaded(mode, {**task, **asdict(families_models.build(family, folder))})


def test_every_described_causal_family_has_a_model_of_the_size() -> None:
    names = families_models.causal()
    assert names[:20] == list(families_models.MARKED)
    assert set(families_models.OPTIONS) <= set(names)
    for name in names:
        config = families_models.configuration(name)
        assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (4, 1024, 32_000), name


def test_only_names_families_and_parts() -> None:
    assert families.chosen(Namespace(only=["gpt2", "llama"])) == (["gpt2", "llama"], ["step", "token"])
    assert families.chosen(Namespace(only=["bert", "step"])) == (["bert"], ["step"])
    every = families.chosen(Namespace(only=PARTS))
    assert every == ([*families_models.causal(), *families_models.OTHERS], ["step", "token"])
    with pytest.raises(SystemExit, match=r"families: llama, .*; got \['lama'\]"):
        families.chosen(Namespace(only=["lama"]))


@pytest.mark.parametrize(("theirs", "bound", "met"), [(1.5, 0.1, True), (1.4, 0.1, False), (1.4, 0.7, True)])
def test_a_target_is_met_by_speed_or_by_the_bound(theirs: float, bound: float, met: bool) -> None:
    claim = Claim("PEFT", ["ours"], ["bnb"], 1.5, most=1.6, bound_s=bound)
    (found,) = Row("r", {}, {"ours": Stats([1.0]), "bnb": Stats([theirs])}, [claim]).ratios()
    assert (found["met"], found["of_bound"], found["ratio"]) == (met, 1 / bound, theirs)


def test_bounds_of_a_model(small: None, tmp_path: Path) -> None:
    """Each linear layer twice, an adapter thrice, the output head too; bytes as they are stored."""
    model = loaded("llama", "ours-bf16", tmp_path).model
    found = bounds.costs(model, 2, 8)
    shapes = 2 * [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    weights, adapters = sum(k * n for k, n in shapes), 16 * sum(k + n for k, n in shapes)
    products = 2 * 16 * (2 * (weights + 96 * 64) + 3 * adapters)
    attention = 2 * 2 * 6 * 2 * 64 * 8 * 9 // 2  # layers, rows, products, 2 of a multiply-add, features, pairs
    assert (found["quantized"], found["trained"], found["step_flops"]) == (14, adapters, products + attention)
    scales = sum(-(-k * n // 64) for k, n in shapes)  # a byte each, and a second level above
    least = weights / 2 + scales + 4 * adapters + 2 * 96 * 64
    assert least < found["token_bytes"] < 1.5 * least


def test_experts_count_as_a_token_has_them(small: None, tmp_path: Path) -> None:
    model = loaded("mixtral", "ours-bf16", tmp_path).model
    experts = [m for m in model.modules() if type(m).__name__ == "MixtralExperts"]
    whole = bounds.costs(model, 1, 1)
    for module in experts:
        module.forward = None
        module.__class__ = type("Other", (type(module),), {})  # no longer counted
    weights = 2 * 3 * 64 * families_models.EXPERT_WIDTH
    without = bounds.costs(model, 1, 1)
    assert whole["step_flops"] - without["step_flops"] == 2 * 2 * 2 * weights  # 2 of 8 experts, forward and backward
    assert whole["token_bytes"] - without["token_bytes"] == 2 * 2 * weights


@pytest.mark.parametrize(("family", "mode"), matrix(
    [*((family, mode) for family in ("llama", "qwen3_moe", "gpt2") for mode in families.MODES),
     *((family, mode) for family in families_models.OTHERS for mode in families.MODES[:2])],
    [("llama", families.MODES[2])],
))  # fmt: skip
def test_a_mode_runs_steps_and_tokens(small: None, tmp_path: Path, family: str, mode: str) -> None:
    if mode.startswith("bnb"):
        pytest.importorskip("bitsandbytes")
    found = loaded(family, mode, tmp_path)
    assert found.found["quantized"] > 0
    assert all(found.run("step")["loss"] > 0 for _ in range(2))
    if family in families_models.OTHERS:
        return
    token = found.run("token")
    assert len(token["ids"]) == 4
    assert token["s"] > 0


class Scripted:
    """Modes that reply what a test says."""

    def __init__(self, failing: str) -> None:
        self.names, self.failing = list(families.MODES), failing

    def ask(self, mode: str, **order: Any) -> dict[str, Any]:
        if order["do"] == "load":
            return {"quantized": 3, "trained": 7, "step_flops": 4e9, "token_bytes": 1e6}
        return {"error": "broken"} if (mode, order["do"]) == (self.failing, "step") else {"s": 1.0}


def test_a_mode_that_fails_is_left_out_and_named(small: None, tmp_path: Path) -> None:
    family = families.Family(Scripted("bnb-bf16"), "llama", tmp_path)  # type: ignore[arg-type]
    row = family.row("step", 3, {"gflops_bf16": 2.0, "gbs": 1.0})
    assert {mode: stats.samples for mode, stats in row.stats.items()} == {m: [1.0] * 3 for m in families.MODES[1:]}
    assert row.notes == ["llama: bnb-bf16 does not run: broken"]
    assert (row.claims[0].bound_s, row.claims[0].target, row.claims[0].most) == (2.0, 1.5, 1.6)
    assert row.extra["of the bound"] == dict.fromkeys(families.MODES[1:], 0.5)
