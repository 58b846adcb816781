"""Configurations of adapters that are broken or hostile: a clear error in under a second, the model as it was."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import fastpeft
import pytest
from fastpeft.config.base import CONFIG_NAME

tools = runpy.run_path(str(Path(__file__).with_name("hostile_tools.py")))
good = tools["good"]
folder = tools["folder"]
ERRORS = tools["ERRORS"]
Net = tools["Net"]
change_config = tools["change_config"]
quick = tools["quick"]
refuse = tools["refuse"]
snapshot = tools["snapshot"]


BAD_VALUES = {
    "huge_rank": ({"r": 10**7}, "r = 10000000"),
    "rank_larger_than_the_file": ({"r": 60000}, "size mismatch"),
    "negative_rank": ({"r": -4}, "r = -4"),
    "zero_rank": ({"r": 0}, "r = 0"),
    "text_rank": ({"r": "4"}, "r = '4'"),
    "true_rank": ({"r": True}, "r = True"),
    "half_rank": ({"r": 2.5}, "r = 2.5"),
    "list_rank": ({"r": [4]}, r"r = \[4\]"),
    "huge_alpha": ({"lora_alpha": 1e308}, "lora_alpha"),
    "huge_integer_alpha": ({"lora_alpha": 10**30}, "lora_alpha|number"),
    "text_alpha": ({"lora_alpha": "16"}, "lora_alpha"),
    "huge_rank_pattern": ({"rank_pattern": {"up": 10**7}}, "rank_pattern"),
    "wrong_rank_pattern": ({"rank_pattern": {"up": 3}}, "size mismatch"),
    "rank_pattern_list": ({"rank_pattern": [3]}, "rank_pattern"),
    "huge_alpha_pattern": ({"alpha_pattern": {"up": 1e300}}, "alpha_pattern"),
    "dropout": ({"lora_dropout": 1.5}, "lora_dropout"),
    "no_method": ({"peft_type": None}, "peft_type"),
    "unknown_method": ({"peft_type": "os.system"}, "os.system"),
    "unknown_task": ({"task_type": "ROOT"}, "ROOT"),
    "unknown_bias": ({"bias": "everything"}, "everything"),
    "no_such_module": ({"target_modules": ["q_proj"]}, "q_proj"),
    "fewer_modules_than_the_file": ({"target_modules": ["up"]}, "unexpected"),
    "more_modules_than_the_file": ({"modules_to_save": ["layers.2.up"]}, "missing|cannot|unexpected"),
    "trained_biases_are_missing": ({"bias": "lora_only"}, "missing.*bias"),
    "long_pattern": ({"target_modules": "a" * 5000}, "at most"),
    "long_suffix": ({"target_modules": ["a" * 5000]}, "at most"),
    "many_names": ({"rank_pattern": {f"x{i}": 4 for i in range(70000)}}, "entries"),
    "many_targets": ({"target_modules": [f"x{i}" for i in range(70000)]}, "entries"),
    "many_patterns": ({"rank_pattern": {f"x{i}.*": 4 for i in range(5000)}}, "5000 expressions"),
    "many_patterns_of_dots": ({"alpha_pattern": {f"x.{i}": 4 for i in range(5000)}}, "5000 patterns"),
    "no_rank_in_a_pattern": ({"rank_pattern": {"up": None}}, "rank_pattern"),
    "no_alpha_in_a_pattern": ({"alpha_pattern": {"up": None}}, "alpha_pattern"),
    "text_dropout": ({"lora_dropout": "0.1"}, "lora_dropout = '0.1': expected a number"),
    "saved_number": ({"modules_to_save": [7]}, "modules_to_save = 7"),
    "target_number": ({"target_modules": 7}, "target_modules must be"),
    "broken_regex": ({"target_modules": "(up"}, "regular expression"),
    "deep": ({"loftq_config": json.loads("[" * 40 + "]" * 40)}, "nested"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_values(folder, name):
    changes, message = BAD_VALUES[name]
    change_config(folder, **changes)
    refuse(folder, message)


CATASTROPHES = {
    "target": {"target_modules": "(.*.*)*x!"},
    "nested": {"target_modules": r"((l|a|y|e|r|s|\.|\d|u|p)+)+!"},
    "exclude": {"exclude_modules": r"(.*.*)*x!"},
    "rank_pattern": {"rank_pattern": {"(.*.*.*)*x!": 4}},
    "layers_pattern": {"layers_to_transform": [0], "layers_pattern": ["(.*.*)*x!"]},
    "many_patterns": {"rank_pattern": {rf"(a|b|.)*(.*)*x{i}!": 4 for i in range(60)}},
    "back_reference": {"target_modules": r"(.*)(.*)(.*)(.*)\1\2\3\4(.*)*!"},
    "no_character_that_must_be_there": {"target_modules": r"(l|a|y|e|r|s|\.|\d|\w\w|.)*[!?]"},
    "many_of_them": {"rank_pattern": {rf"(a|b|.)*(.*)*{i}[!?]": 4 for i in range(60)} | {"(.|..)*[!?]": 4}},
    "written_out": {"target_modules": "(?:(?:(?:[ab]{1000}){1000}){1000}){1000}"},
    "long_and_many": {"alpha_pattern": {f"(a{i}|b|[c-f]|.)*" * 50 + "[!?]": 4 for i in range(60)}},
}


@pytest.mark.parametrize("name", CATASTROPHES)
def test_catastrophic_patterns(folder, name):
    """Either the pattern is decided in time or it is refused; the rest of the file cannot be right then."""
    change_config(folder, **CATASTROPHES[name])
    refuse_or_load(folder)


def refuse_or_load(folder: Path) -> None:
    model = Net()
    before = snapshot(model)
    with quick():
        try:
            fastpeft.PeftModel.from_pretrained(model, folder)
            failed = False
        except ERRORS:
            failed = True
    if failed:
        assert snapshot(model) == before


BAD_JSON = {
    "empty": (b"", "not valid json"),
    "list": (b"[]", "expected a json object"),
    "binary": (bytes(range(256)), "not valid json"),
    "nan": (b'{"peft_type": "LORA", "lora_alpha": NaN}', "NaN"),
    "infinity": (b'{"peft_type": "LORA", "lora_alpha": -Infinity}', "Infinity"),
    "exponent": (b'{"peft_type": "LORA", "lora_alpha": 1e999}', "lora_alpha|number"),
    "twice": (b'{"peft_type": "LORA", "r": 4, "r": 8}', "twice"),
    "nested": (b'{"peft_type": "LORA", "x": ' + b"[" * 100000 + b"]" * 100000 + b"}", "not valid json|nested"),
    "digits": (b'{"peft_type": "LORA", "r": ' + b"9" * 100000 + b"}", "not valid json|expected"),
    "large": (b'{"x": "' + b"x" * (17 << 20) + b'"}', "too large"),
    "values": (b'{"peft_type": "LORA", "x": [' + b"{}," * (1 << 20) + b"{}]}", "more than"),
    "text": (b'{"peft_type": "LORA", "revision": "' + b"x" * 100000 + b'"}', "characters"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json(folder, name):
    data, message = BAD_JSON[name]
    (folder / CONFIG_NAME).write_bytes(data)
    refuse(folder, message)


def test_unknown_fields_are_dropped_with_a_warning(folder):
    change_config(folder, from_the_future={"a": [1, 2]})
    with pytest.warns(UserWarning, match="from_the_future"):
        fastpeft.PeftModel.from_pretrained(Net(), folder)


def test_nothing_named_in_a_configuration_is_imported(folder, tmp_path, monkeypatch):
    (tmp_path / "evil_library.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    change_config(
        folder,
        auto_mapping={"base_model_class": "Evil", "parent_library": "evil_library"},
        megatron_core="evil_library",
        base_model_name_or_path=str(tmp_path),
    )
    fastpeft.PeftModel.from_pretrained(Net(), folder)
    assert "evil_library" not in sys.modules
    with pytest.raises(Exception):  # noqa: B017, PT011 (whatever the reason, nothing is imported)
        fastpeft.AutoPeftModel.from_pretrained(folder)
    assert "evil_library" not in sys.modules
