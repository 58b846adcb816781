"""Prompts: real PEFT's outputs, gradients and files; rows with different ones; generation; what is refused."""

from __future__ import annotations

import copy
from typing import Any

import fastpeft
import pytest
import torch
from forms import matrix

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = 5
ENDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
BERT = {**SMALL, "intermediate_size": 48, "max_position_embeddings": 128, "num_labels": 2}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {  # the model's class, its configuration's and its arguments
    "llama": ("LlamaForCausalLM", "LlamaConfig", {
        **SMALL, **ENDS, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {
        **ENDS, "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {
        "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "pad_token_id": 0,
        "eos_token_id": 1, "decoder_start_token_id": 0}),
    "bert": ("BertModel", "BertConfig", BERT),
    "bert-cls": ("BertForSequenceClassification", "BertConfig", BERT),
    "bert-tokens": ("BertForTokenClassification", "BertConfig", BERT),
    "bert-answers": ("BertForQuestionAnswering", "BertConfig", BERT),
}  # fmt: skip
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "FEATURE_EXTRACTION",
         "bert-cls": "SEQ_CLS", "bert-tokens": "TOKEN_CLS", "bert-answers": "QUESTION_ANS"}  # fmt: skip
PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", {}),
    "vocabulary": ("PromptTuningConfig", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 20}),
    "lstm": ("PromptEncoderConfig", {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12}),
    "prefix": ("PrefixTuningConfig", {}),
    "projected": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 16}),
    "tasks": ("MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2}),
    "cartridge": ("CartridgeConfig", {"num_frozen_tokens": 2}),
    "cpt": ("CPTConfig", {
        "cpt_token_ids": [3, 4, 5, 6, 7], "cpt_tokens_type_mask": [1, 2, 3, 4, 5], "opt_weighted_loss_type": "decay",
        "opt_loss_decay_factor": 0.9}),
}  # fmt: skip


def base(name: str = "llama", **options: Any) -> Any:
    cls, config, arguments = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, cls)(getattr(transformers, config)(**arguments, **options)).eval()


def config_of(lib: Any, prompt: str, task: str | None = "CAUSAL_LM", **options: Any) -> Any:
    cls, own = PROMPTS[prompt]
    length = {} if prompt == "cpt" else {"num_virtual_tokens": TOKENS}
    return getattr(lib, cls)(task_type=task, **{**length, **own, **options})


def made(lib: Any, prompt: str, name: str = "llama", **options: Any) -> Any:
    model = base(name)
    torch.manual_seed(7)
    return lib.get_peft_model(model, config_of(lib, prompt, TASKS[name], **options)).eval()


def inputs(name: str, prompt: str) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (3, 7), generator=drawn)
    mask = torch.ones_like(ids)
    mask[1, slice(0, 2) if TASKS[name] == "CAUSAL_LM" else slice(5, 7)] = 0
    found = {"input_ids": ids, "attention_mask": mask}
    found |= {"task_ids": torch.tensor([0, 2, 1])} if prompt == "tasks" else {}
    labels = {"CAUSAL_LM": ids, "SEQ_2_SEQ_LM": ids[:, :4].clone(), "TOKEN_CLS": ids % 2}
    labels["SEQ_CLS"] = torch.tensor([0, 1, 1])
    if TASKS[name] in labels:
        found["labels"] = labels[TASKS[name]]
    elif TASKS[name] == "QUESTION_ANS":
        found |= {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([2, 3, 4])}
    return found


def scores(output: Any) -> torch.Tensor:
    return next(output[key] for key in ("logits", "start_logits", "last_hidden_state") if key in output)


def loss(output: Any) -> torch.Tensor:
    return output["loss"] if "loss" in output else scores(output).square().mean()


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but for the order of sums of some hundred numbers."""
    atol = 256 * torch.finfo(wanted.dtype).eps * max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    named = model.named_parameters()
    return {name.rpartition("prompt_encoder.")[2]: p for name, p in named if "prompt_encoder" in name}


CASES = [(name, prompt) for name in MODELS for prompt in PROMPTS
         if (prompt != "cpt" or TASKS[name] == "CAUSAL_LM")
         and (prompt != "tasks" or name not in ("bert", "bert-answers"))  # PEFT passes no task_ids there
         and (name != "bert-tokens" or prompt in ("prefix", "projected", "cartridge"))]  # else PEFT's labels are short
SHORT = [*(("llama", p) for p in PROMPTS), ("t5", "prefix"), ("t5", "tasks"), ("t5", "mlp"), ("bert-cls", "prompt"),
         ("bert-cls", "prefix"), ("bert-tokens", "cartridge"), ("bert-answers", "mlp"), ("bert", "prompt")]  # fmt: skip


@pytest.mark.parametrize(("name", "prompt"), matrix(CASES, SHORT))
def test_outputs_gradients_and_files_are_those_of_peft(name: str, prompt: str, tmp_path: Any) -> None:
    theirs, ours, given = made(peft, prompt, name), made(fastpeft, prompt, name), inputs(name, prompt)
    wanted, found = theirs(**given), ours(**given)
    close(scores(found), scores(wanted))
    close(loss(found), loss(wanted))
    loss(wanted).backward()
    loss(found).backward()
    expected = {key: p.grad for key, p in trained(theirs).items() if p.grad is not None}
    assert {key: p.grad for key, p in trained(ours).items() if p.grad is not None}.keys() == expected.keys()
    for key, grad in expected.items():
        close(trained(ours)[key].grad, grad)
    for model, folder in ((theirs, "theirs"), (ours, "ours")):
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        model.save_pretrained(tmp_path / folder)
    with torch.no_grad():
        after = scores(theirs(**given))
        for lib, folder in ((fastpeft, "theirs"), (peft, "ours"), (fastpeft, "ours")):
            loaded = lib.PeftModel.from_pretrained(base(name), tmp_path / folder).eval()
            close(scores(loaded(**given)), after)


@pytest.mark.parametrize("prompt", matrix(PROMPTS, ["prompt", "prefix"]))
def test_a_padded_row_generates_what_it_does_alone(prompt: str) -> None:
    """Absolute positions show it: PEFT's vectors before the input count padding as positions, which is wrong."""
    name = "gpt2"
    model, ids = made(fastpeft, prompt, name), inputs(name, prompt)["input_ids"]
    mask = inputs(name, prompt)["attention_mask"]
    tasks = {"task_ids": torch.tensor([1])} if prompt == "tasks" else {}
    for beams in (1, 3):
        options = {**tasks, "num_beams": beams, "max_new_tokens": 6, "do_sample": False}
        batch = model.generate(input_ids=ids, attention_mask=mask, **options)
        alone = model.generate(input_ids=ids[1:2, 2:], **options)
        assert batch[1, 7:].tolist() == alone[0, 5:].tolist()


@pytest.mark.parametrize(("name", "prompt"), matrix(
    [(n, p) for n in ("llama", "t5") for p in PROMPTS if n == "llama" or p != "cpt"],
    [("llama", "prompt"), ("llama", "prefix"), ("t5", "prefix"), ("t5", "mlp")]))  # fmt: skip
def test_generation_is_that_of_peft(name: str, prompt: str) -> None:
    theirs, ours, ids = made(peft, prompt, name), made(fastpeft, prompt, name), inputs(name, prompt)["input_ids"]
    tasks = {"task_ids": torch.tensor([1])} if prompt == "tasks" else {}
    beams = {} if prompt == "tasks" else {"num_beams": 3, "num_return_sequences": 2}  # PEFT's beams have no tasks
    for options in ({"max_new_tokens": 6}, {"max_length": 12}, {"max_new_tokens": 4, **beams}):
        wanted = theirs.generate(input_ids=ids, do_sample=False, **options, **tasks)
        assert ours.generate(input_ids=ids, do_sample=False, **options, **tasks).tolist() == wanted.tolist()
        if "max_new_tokens" in options:  # with this transformers PEFT's fail
            static = {"do_sample": False, "cache_implementation": "static", **options, **tasks}
            assert ours.generate(input_ids=ids, **static).tolist() == wanted.tolist()


@pytest.fixture(scope="module")
def mixed() -> Any:
    """A model with prompts of several methods and lengths, and a LoRA."""
    model = made(fastpeft, "prompt", "gpt2")
    for name, prompt, options in (
        ("short", "mlp", {"num_virtual_tokens": 2}), ("prefix", "prefix", {}), ("first", "cartridge",
        {"num_virtual_tokens": 3})):  # fmt: skip
        model.add_adapter(name, config_of(fastpeft, prompt, **options))
    model.add_adapter("lora", fastpeft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False))
    return model.eval()


ROWS = ["default", "prefix", "__base__", "short", "lora", "first", "default"]


def test_a_mixed_batch_computes_each_row_as_alone(mixed: Any) -> None:
    ids = torch.randint(3, 64, (len(ROWS), 6), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = mixed(input_ids=ids, adapter_names=ROWS).logits[:, -6:]
        new = mixed.generate(input_ids=ids, adapter_names=ROWS, max_new_tokens=5, do_sample=False)
        for row, name in enumerate(ROWS):
            if name != "__base__":
                mixed.set_adapter(name)
            one = mixed.get_base_model() if name == "__base__" else mixed
            with mixed.disable_adapter() if name == "__base__" else torch.no_grad():
                alone = one(input_ids=ids[row : row + 1])
                close(found[row], alone.logits[0, -6:])
                wanted = one.generate(input_ids=ids[row : row + 1], max_new_tokens=5, do_sample=False)[0].tolist()
            assert new[row].tolist()[: len(wanted)] == wanted
        beams = mixed.generate(input_ids=ids, adapter_names=ROWS, max_new_tokens=4, num_beams=2, do_sample=False)
        mixed.set_adapter("prefix")
        assert beams[1].tolist() == mixed.generate(input_ids=ids[1:2], max_new_tokens=4, num_beams=2)[0].tolist()


def test_a_mixed_batch_needs_a_name_for_each_row(mixed: Any) -> None:
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        mixed(input_ids=torch.ones(3, 4, dtype=torch.long), adapter_names=["default", "prefix"])
    with pytest.raises(ValueError, match="non-existing adapter"):
        mixed(input_ids=torch.ones(2, 4, dtype=torch.long), adapter_names=["default", "nobody"])


def test_a_prefix_is_a_view_for_all_rows() -> None:
    model = made(fastpeft, "prefix")
    layer = model.get_prompt(batch_size=64).layers[0]
    assert layer.keys.shape == (64, 2, TOKENS, 8)
    assert layer.keys.stride(0) == 0
    assert layer.keys.untyped_storage().data_ptr() == model.prompt_encoder["default"].embedding.weight.data_ptr()


@pytest.mark.parametrize("prompt", matrix(PROMPTS, ["prompt", "lstm", "cartridge"]))
def test_a_given_state_dict_is_what_is_saved(prompt: str, tmp_path: Any) -> None:
    """Trainer and accelerate save so."""
    model = made(fastpeft, prompt, "llama")
    given = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    wanted = {key: tensor.clone() for key, tensor in fastpeft.get_peft_model_state_dict(model).items()}
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.zero_()
    model.save_pretrained(tmp_path, state_dict=given)
    found = fastpeft.load_peft_weights(tmp_path)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor)
    with pytest.raises(fastpeft.AdapterFileError, match="lacks"):
        fastpeft.get_peft_model_state_dict(model, {k: t for k, t in given.items() if "prompt_encoder" not in k})


def test_life_of_prompts() -> None:
    model, ids = made(fastpeft, "prompt"), torch.arange(3, 9)[None]
    with torch.no_grad():
        plain = base()(ids).logits
        prompted = model(ids).logits[:, TOKENS:]
        with model.disable_adapter():
            close(model(ids).logits, plain)
        assert (prompted - plain).abs().max() > 1e-3
        model.add_adapter("other", config_of(fastpeft, "prefix"))
        assert not any(p.requires_grad for n, p in model.named_parameters() if ".other." in n)
        model.set_adapter("other")
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [
            "base_model.prompt_encoder.other.embedding.weight"
        ]
        copied = copy.deepcopy(model)
        close(copied(ids).logits, model(ids).logits)
        model.delete_adapter("other")
        assert model.active_adapters == ["default"]
        close(model(ids).logits[:, TOKENS:], prompted)
    with pytest.raises(AttributeError, match="is a prompt"):
        model.merge_and_unload()
    with pytest.raises(TypeError, match="not supported for prompt learning methods like PROMPT_TUNING"):
        model.set_requires_grad("default")
    with pytest.raises(TypeError, match="invalid PeftModel instance"):
        model.get_layer_status()


def test_labels_of_tokens_count_where_peft_fails() -> None:
    """PEFT's labels of a token classifier are shorter than what vectors before the input give logits for."""
    given = inputs("bert-tokens", "prompt")
    with pytest.raises(ValueError, match="batch_size"):
        made(peft, "prompt", "bert-tokens")(**given)
    found = made(fastpeft, "prompt", "bert-tokens")(**given)
    wanted = torch.nn.functional.cross_entropy(found.logits[:, TOKENS:].flatten(0, 1), given["labels"].flatten())
    close(found.loss, wanted)


@pytest.mark.parametrize("prompt", ["mlp", "projected", "prompt", "cartridge"])
def test_a_loaded_prompt_trains_on(prompt: str, tmp_path: Any) -> None:
    made(fastpeft, prompt).save_pretrained(tmp_path)
    given = inputs("llama", prompt)
    model = fastpeft.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    before = model(**given).logits.detach()
    model(**given).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert (model(**given).logits - before).abs().max() > 1e-6
    again = made(fastpeft, prompt)  # with its network, whose prompt a file cannot tell
    again.load_adapter(tmp_path, "default", is_trainable=True)
    close(again(**given).logits, before)


def test_a_prefix_from_a_cache_and_cartridges_as_one(tmp_path: Any) -> None:
    """A prefix that starts as the cache of tokens gives what those tokens before the input give."""
    ids = torch.randint(3, 64, (1, 12), generator=torch.Generator().manual_seed(3))
    for part, prompt in (("a", "cartridge"), ("b", "prefix")):
        model = made(fastpeft, prompt)
        with torch.no_grad():
            with model.disable_adapter():
                whole = model(input_ids=ids, use_cache=True)
            prompt_of = fastpeft.initialize_kv_prefix_from_past_key_values(model, past_key_values=whole.past_key_values)
            close(model(input_ids=ids[:, TOKENS:]).logits, whole.logits[:, TOKENS:])
        theirs = peft.prompt_embeddings_from_past_key_values(whole.past_key_values, num_virtual_tokens=TOKENS)
        close(prompt_of, theirs)
        model.save_pretrained(tmp_path / part)
    with pytest.raises(ValueError, match="is not a CARTRIDGE adapter"):
        fastpeft.compose_cartridge_adapters([tmp_path / "a", tmp_path / "b"], output_path=tmp_path / "ab")
    fastpeft.compose_cartridge_adapters([tmp_path / "a", tmp_path / "a"], output_path=tmp_path / "aa")
    both = peft.PeftModel.from_pretrained(base(), tmp_path / "aa")
    assert both.active_peft_config.num_virtual_tokens == 2 * TOKENS
    close(both.prompt_encoder["default"].weight[TOKENS:], prompt_of)


@pytest.mark.parametrize("start", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_tasks_start_from_those_of_a_file(start: str, tmp_path: Any) -> None:
    made(fastpeft, "tasks").save_pretrained(tmp_path)
    options = {"num_tasks": 1, "prompt_tuning_init": start, "prompt_tuning_init_task": 1,
               "prompt_tuning_init_state_dict_path": str(tmp_path / "adapter_model.safetensors")}  # fmt: skip
    theirs, ours = (made(lib, "tasks", **options) for lib in (peft, fastpeft))
    for key, tensor in trained(theirs).items():
        close(trained(ours)[key], tensor)


class _Tokenizer:
    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 50 for letter in text]}


def test_a_text_starts_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: _Tokenizer())
    options = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "abc", "tokenizer_name_or_path": "x"}
    theirs, ours = (made(lib, "prompt", **options) for lib in (peft, fastpeft))
    close(trained(ours)["default.embedding.weight"], trained(theirs)["default.embedding.weight"])


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("prompt", {"num_virtual_tokens": 128}, "leaves no room for an input"),
    ("prefix", {"num_virtual_tokens": None}, "`num_virtual_tokens` should be a positive integer"),
    ("prompt", {"num_virtual_tokens": 10**9}, "`num_virtual_tokens` should be a positive integer"),
    ("prompt", {"token_dim": 31}, "`token_dim` should be the width of the input embeddings, 32"),
    ("prompt", {"prompt_tuning_init": "HERE"}, "`prompt_tuning_init` should be one of"),
    ("mlp", {"encoder_reparameterization_type": "GRU"}, "Prompt encoder type not recognized"),
    ("tasks", {"num_tasks": 0}, "`num_tasks` should be a positive integer"),
    ("tasks", {"prompt_tuning_init": "EXACT_SOURCE_TASK"}, "prompt_tuning_init_state_dict_path needs"),
    ("cpt", {"cpt_token_ids": [1, 2, 3, 4, 99]}, "`cpt_token_ids` should be tokens of the model"),
]


@pytest.mark.parametrize(("prompt", "options", "message"), BAD)
def test_what_makes_no_sense_is_refused_and_the_model_is_as_it_was(
    prompt: str, options: dict[str, Any], message: str
) -> None:
    model = base()
    before = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        fastpeft.get_peft_model(model, config_of(fastpeft, prompt, **options))
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == before
    assert not hasattr(model, "peft_config")


def test_errors_of_calls() -> None:
    with pytest.raises(ValueError, match="tokenizer_name_or_path can't be None"):
        fastpeft.PromptTuningConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text="a")
    with pytest.raises(ValueError, match="task_ids cannot be None"):
        made(fastpeft, "tasks")(torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="`task_ids` should be from 0 to 2"):
        made(fastpeft, "tasks")(torch.ones(1, 3, dtype=torch.long), task_ids=torch.tensor([3]))
    model = base()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        fastpeft.get_peft_model(model, config_of(fastpeft, "prefix"))
    later = made(fastpeft, "prefix")
    later.get_base_model().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        later.train()(torch.ones(1, 3, dtype=torch.long))
    two = made(fastpeft, "prompt")
    two.add_adapter("b", config_of(fastpeft, "mlp"))
    with pytest.raises(ValueError, match="Only one prompt can be active"):
        two.set_adapter(["default", "b"])
    with pytest.raises(ValueError, match="does not support prompt learning"):
        fastpeft.inject_adapter_in_model(config_of(fastpeft, "prompt"), base())


def test_gradient_checkpointing_of_vectors_gives_the_same_gradients() -> None:
    given, found = inputs("llama", "prompt"), []
    for recomputes in (False, True):
        model = made(fastpeft, "prompt").train()
        if recomputes:
            model.get_base_model().gradient_checkpointing_enable()
        model(**given).loss.backward()
        found.append(trained(model)["default.embedding.weight"].grad)
    close(found[0], found[1])


def test_a_file_of_another_size_is_refused_before_anything_changes(tmp_path: Any) -> None:
    made(fastpeft, "prefix").save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"num_virtual_tokens": 5', '"num_virtual_tokens": 6'))
    model = base()
    with pytest.raises(fastpeft.AdapterFileError, match="prompt_embeddings"):
        fastpeft.PeftModel.from_pretrained(model, tmp_path)
    assert not hasattr(model, "peft_config")


def test_training_knows_which_methods_are_prompts() -> None:
    from fastpeft.apps.training.config import PROMPTS as TRAINED
    from fastpeft.methods.registry import every_method

    prompts = {kind.value.lower() for kind, method in every_method().items() if method.prompts}
    assert prompts - TRAINED == {"cpt", "multitask_prompt_tuning"}  # these need more than texts
    assert prompts >= TRAINED
