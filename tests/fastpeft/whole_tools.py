"""Tools of the tests of methods that act on whole modules: small models, in both libraries with the same values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fastpeft
import peft
import torch
import transformers
from torch import Tensor

IDS = torch.tensor([[3, 5, 7, 9, 2], [1, 4, 6, 8, 11]])
PADDED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
PROMPT = {"adapter_len": 3, "adapter_layers": 2}
SHADOW = {"r": 3, "shadow_dropout": 0.0, "init_weights": False}
ROUNDING = 2**9 * torch.finfo(torch.float32).eps
CAUSAL = {"task_type": "CAUSAL_LM"}


def base(kind: str = "llama", head: str = "ForCausalLM") -> Any:
    configs = {
        "llama": lambda: transformers.LlamaConfig(**SIZES, **HEADS),
        "mistral": lambda: transformers.MistralConfig(**SIZES, **HEADS, head_dim=6),  # 4 heads of 6 are no 16
        "gpt2": lambda: transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=4),
        "opt": lambda: transformers.OPTConfig(
            vocab_size=32, hidden_size=16, ffn_dim=24, num_hidden_layers=3, num_attention_heads=4,
            word_embed_proj_dim=16,
        ),
    }
    torch.manual_seed(0)
    config = configs[kind]()
    config.pad_token_id, config.num_labels = 0, 3
    names = {"llama": "Llama", "mistral": "Mistral", "gpt2": "GPT2", "opt": "OPT"}
    head = "LMHeadModel" if (kind, head) == ("gpt2", "ForCausalLM") else head
    return getattr(transformers, names[kind] + head)(config).eval()


def put(library: Any, name: str, options: dict[str, Any], *which: str) -> Any:
    torch.manual_seed(1)
    return library.get_peft_model(base(*which), getattr(library, name)(**options))


def scattered(model: Any, library: Any, seed: int = 2) -> Any:
    """The model with other values in its adapter, the same in either library, set to evaluate."""
    torch.manual_seed(seed)
    state = library.get_peft_model_state_dict(model)
    others = {key: torch.randn(state[key].shape).to(state[key].dtype) * 0.3 for key in sorted(state)}
    library.set_peft_model_state_dict(model, others)
    return model.eval()


def grads(model: Any, library: Any) -> dict[str, Tensor]:
    found = {p.data_ptr(): p.grad for p in model.parameters() if p.grad is not None and p.numel()}
    state = library.get_peft_model_state_dict(model)
    return {key: found[t.data_ptr()] for key, t in state.items() if t.data_ptr() in found}


def close(a: Any, b: Any) -> None:
    """Equal but for a few hundred roundings in float32."""
    torch.testing.assert_close(a, b, rtol=ROUNDING, atol=ROUNDING)


def outcome(model: Any, library: Any, **inputs: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out.loss.detach(), out.logits.detach(), grads(model, library)


def beside(name: str, options: dict[str, Any], *which: str, labels: Tensor = IDS) -> tuple[Any, Any]:
    """Ours and PEFT's with the same values, after a look at what they compute."""
    ours, theirs = (put(library, name, options, *which) for library in (fastpeft, peft))
    made, known = fastpeft.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert made.keys() == known.keys()
    if name == "ShadowConfig":  # drawn in PEFT's order
        assert all(torch.equal(made[key], value) for key, value in known.items())
    scattered(ours, fastpeft), scattered(theirs, peft)
    both = [
        outcome(model, library, input_ids=IDS, attention_mask=PADDED, labels=labels)
        for model, library in ((ours, fastpeft), (theirs, peft))
    ]
    close(*both)
    assert both[0][2]
    return ours.eval(), theirs.eval()


def both_ways(ours: Any, theirs: Any, tmp_path: Path, *which: str) -> None:
    """Each library reads what the other wrote, and computes the same."""
    expected = ours(IDS, attention_mask=PADDED).logits
    for (writer, model), reader in (((fastpeft, ours), peft), ((peft, theirs), fastpeft), ((fastpeft, ours), fastpeft)):
        folder = tmp_path / f"{writer.__name__}-{reader.__name__}"
        model.save_pretrained(folder)
        read = reader.PeftModel.from_pretrained(base(*which), folder).eval()
        close(read(IDS, attention_mask=PADDED).logits, expected)
        assert not any(p.is_meta for p in (*read.parameters(), *read.buffers()))
    with torch.no_grad():
        next(p for name, p in read.named_parameters() if ".default" in name).fill_(0)
    name = "default" if read.active_peft_config.task_type == "SEQ_CLS" else "second"
    read.load_adapter(folder, name)
    read.set_adapter(name)
    close(read(IDS, attention_mask=PADDED).logits, expected)
