"""Settings: types, unknown keys, overrides; every error is one line that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastpeft.apps.training.config import TrainConfig, from_dict, load_config
from fastpeft.apps.training.errors import UserError
from fastpeft.apps.training.run import adapter_config

BASE = {"model": "m", "data": "d"}


def test_yaml_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: m\ndata: d\nlearning_rate: 2e-4\nlora:\n  r: 4\n  target_modules: [q_proj]\nwarmup: 10\n")
    config = load_config(
        str(file), ["lora.r=8", "learning_rate=1e-3", "packing=false", "eval_data=null", "quantize=none"]
    )
    assert config.learning_rate == 1e-3
    assert config.lora == {"r": 8, "target_modules": ["q_proj"]}
    assert config.warmup == 10.0
    assert (config.packing, config.eval_data, config.quantize) == (False, None, "none")
    # YAML 1.1 reads 2e-4, without a dot, as text.
    assert load_config(str(file), []).learning_rate == 2e-4


def test_a_single_override_keeps_the_other_lora_defaults() -> None:
    config = load_config(None, ["model=m", "data=d", "lora.r=2"])
    assert config.lora == {**TrainConfig(model="m", data="d").lora, "r": 2}


def test_config_round_trips() -> None:
    config = from_dict({**BASE, "betas": [0.8, 0.95]})
    assert from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rte": 1}, "unknown setting 'learning_rte'; did you mean 'learning_rate'?"),
        ({"zzz": 1}, "unknown setting 'zzz'; known: adapter"),
        ({"batch_size": "two"}, "batch_size: expected a whole number, got 'two'"),
        ({"batch_size": 1.5}, "batch_size: expected a whole number, got 1.5"),
        ({"batch_size": True}, "batch_size: expected a whole number, got True"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"packing": "maybe"}, "packing: expected true or false, got 'maybe'"),
        ({"learning_rate": -1}, "learning_rate: expected a positive number, got -1.0"),
        ({"learning_rate": "nan"}, "learning_rate: expected a positive number"),
        ({"epochs": float("inf")}, "epochs: expected a positive number"),
        ({"schedule": "cosin"}, "wsd, got 'cosin'; did you mean 'cosine'?"),
        ({"optimizer": "adam8"}, "optimizer: expected one of"),
        ({"quantize": "int8"}, "quantize: expected one of auto, none, nf4, fp4, gguf, got 'int8'"),
        ({"betas": [0.9]}, "betas: expected two numbers"),
        ({"betas": 0.9}, "betas: expected a list, got 0.9"),
        ({"lora": 3}, "lora: expected a mapping, got 3"),
        ({"eval_fraction": 1.0}, "eval_fraction: expected at least 0 and below 1"),
        ({"eval_fraction": 0.1, "eval_data": "e"}, "both eval_data and eval_fraction are set"),
    ],
)  # fmt: skip
def test_bad_settings(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_dict({**BASE, **values})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_malformed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the setting 'data' is missing"):
        from_dict({"model": "m"})
    with pytest.raises(UserError, match="is not a file"):
        load_config(str(tmp_path / "absent.yaml"), [])
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1\n")
    with pytest.raises(UserError, match="is not valid YAML") as caught:
        load_config(str(bad), [])
    assert "\n" not in str(caught.value)
    bad.write_text("- a\n- b\n")
    with pytest.raises(UserError, match="expected 'key: value' lines, got a list"):
        load_config(str(bad), [])
    with pytest.raises(UserError, match="expected key=value, got 'resume'"):
        load_config(None, ["resume"])
    with pytest.raises(UserError, match="model is not a mapping"):
        load_config(None, ["model=m", "model.x=1"])


def test_lora_settings_are_checked() -> None:
    with pytest.raises(UserError, match=r"unknown setting lora\.lora_alfa; did you mean 'lora_alpha'\?"):
        adapter_config(from_dict({**BASE, "lora": {"lora_alfa": 3}}))
    assert adapter_config(from_dict({**BASE, "lora": {"r": 3}})).r == 3
    assert adapter_config(from_dict({**BASE, "method": "dora"})).use_dora
    other = adapter_config(from_dict({**BASE, "method": "IA3", "adapter": {"feedforward_modules": []}}))
    assert (other.peft_type, other.target_modules) == ("IA3", "all-linear")
    with pytest.raises(UserError, match="unknown method 'loraa'"):
        adapter_config(from_dict({**BASE, "method": "loraa"}))
    prompt = adapter_config(from_dict({**BASE, "method": "prompt_tuning", "adapter": {"num_virtual_tokens": 5}}))
    assert (prompt.peft_type, prompt.num_virtual_tokens) == ("PROMPT_TUNING", 5)
    assert adapter_config(from_dict({**BASE, "method": "p_tuning"})).num_virtual_tokens == 20
    with pytest.raises(UserError, match="method cpt needs examples or tasks"):
        adapter_config(from_dict({**BASE, "method": "cpt"}))
    with pytest.raises(UserError, match=r"unknown setting adapter\.r"):
        adapter_config(from_dict({**BASE, "method": "ia3", "adapter": {"r": 3}}))
    with pytest.raises(UserError, match="for other methods"):
        adapter_config(from_dict({**BASE, "adapter": {"r": 3}}))
    with pytest.raises(UserError, match="lora: "):
        adapter_config(from_dict({**BASE, "lora": {"target_modules": "x", "task_type": "NOT_ONE"}}))
