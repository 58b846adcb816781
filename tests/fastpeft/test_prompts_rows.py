"""Rows of an encoder-decoder with prompts of their own, settings of `generate` with a prompt, and joined cartridges."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import fastpeft
import pytest
import torch

transformers = pytest.importorskip("transformers")
close = runpy.run_path(str(Path(__file__).with_name("peft_tools.py")))["close"]
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(1))
START = torch.tensor([[0, 5, 9], [0, 7, 4]])


def t5() -> Any:
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0))  # fmt: skip


def bart() -> Any:
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration(transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=0,
        decoder_start_token_id=0))  # fmt: skip


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, pad_token_id=0, eos_token_id=1)).eval()


def two(base: Any, name: str, lengths: tuple[int, int], **options: Any) -> Any:
    """The model with prompts "a" and "b" of these lengths."""
    model = None
    for adapter, length in zip("ab", lengths, strict=True):
        config = getattr(fastpeft, name)(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=length, **options)
        if model is None:
            model = fastpeft.get_peft_model(base, config, adapter)
        else:
            model.add_adapter(adapter, config)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "prompt_encoder" in key:
                p.normal_()
    return model.eval()


def assert_rows_are_as_alone(model: Any, **how: Any) -> None:
    with torch.no_grad():
        mixed = model(input_ids=IDS, decoder_input_ids=START, adapter_names=["a", "b"]).logits
    options = {"max_new_tokens": 5, "do_sample": False, **how}
    new = model.generate(input_ids=IDS, adapter_names=["a", "b"], **options)
    for i, name in enumerate("ab"):
        model.set_adapter(name)
        with torch.no_grad():
            alone = model(input_ids=IDS[i : i + 1], decoder_input_ids=START[i : i + 1]).logits
        assert alone.abs().max() > 0.25  # so that this is less than 1e-5 of the largest
        close(mixed[i], alone[0])
        own = {key: value[i : i + 1] if isinstance(value, torch.Tensor) else value for key, value in options.items()}
        wanted = model.generate(input_ids=IDS[i : i + 1], **own)[0].tolist()
        assert new[i].tolist()[: len(wanted)] == wanted


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"decoder_input_ids": START}], ids=lambda how: "-".join(how))
def test_prefixes_of_other_lengths_where_positions_are_relative(how: dict[str, Any]) -> None:
    assert_rows_are_as_alone(two(t5(), "PrefixTuningConfig", (2, 5)), **how)


def test_prompts_of_one_length_where_positions_are_counted() -> None:
    assert_rows_are_as_alone(two(bart(), "PrefixTuningConfig", (4, 4)))


@pytest.mark.parametrize(("name", "options"), [
    ("PrefixTuningConfig", {}), ("PromptTuningConfig", {"num_transformer_submodules": 1}),
])  # fmt: skip
def test_prompts_of_other_lengths_where_positions_are_counted(name: str, options: dict[str, Any]) -> None:
    """The shorter prompt's row would count from the longer one's."""
    model = two(bart(), name, (2, 5), **options)
    for rows in (["a", "b"], ["a", "__base__"]):
        with pytest.raises(ValueError, match="need prompts of one length"):
            model(input_ids=IDS, decoder_input_ids=START, adapter_names=rows)
        with pytest.raises(ValueError, match="need prompts of one length"):
            model.generate(input_ids=IDS, adapter_names=rows, max_new_tokens=3)


@pytest.mark.parametrize("name", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_what_a_generation_config_leaves_open_is_the_models(name: str) -> None:
    base = gpt2()
    base.generation_config.update(num_beams=3, max_length=10, do_sample=False)
    model = fastpeft.get_peft_model(base, getattr(fastpeft, name)(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    given = transformers.GenerationConfig(pad_token_id=0, eos_token_id=1)
    found = model.generate(input_ids=IDS, generation_config=given)
    assert found.shape[1] <= 10
    assert found.tolist() == model.generate(input_ids=IDS, num_beams=3, max_length=10, do_sample=False).tolist()


def test_cartridges_are_joined_in_either_kind_of_file(tmp_path: Any) -> None:
    config = fastpeft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    fastpeft.get_peft_model(gpt2(), config).save_pretrained(tmp_path / "one")
    with pytest.warns(UserWarning, match="a pickle, which can run code"):
        fastpeft.compose_cartridge_adapters(
            [tmp_path / "one"] * 2, output_path=tmp_path / "two", safe_serialization=False
        )
    one = fastpeft.load_peft_weights(tmp_path / "one")["prompt_embeddings"]
    found = torch.load(tmp_path / "two" / "adapter_model.bin", weights_only=True)["prompt_embeddings"]
    assert torch.equal(found, one.repeat(2, 1))
