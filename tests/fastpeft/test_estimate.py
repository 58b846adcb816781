"""`fastpeft estimate`: a step without memory keeps what a real one keeps, for every method; settings that fit do."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fastpeft import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS
from fastpeft import get_peft_model, quantize_model, quantized_skeleton
from fastpeft.apps.cli.app import app
from fastpeft.apps.cli.estimate import parse_size
from fastpeft.apps.estimate import machines, parts, process, shapes
from fastpeft.apps.training.config import PROMPTS, TrainConfig, load_config
from fastpeft.apps.training.errors import UserError
from fastpeft.apps.training.forward import CompletionLoss
from fastpeft.apps.training.memory import enable_checkpoints
from fastpeft.apps.training.optim import make_optimizer
from fastpeft.apps.training.packing import Batch
from fastpeft.apps.training.run import adapter_config
from fastpeft.apps.training.testing import make_tiny_run
from forms import by_form, matrix
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
BASE = transformers.LlamaConfig(
    vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
SOME_LAYERS = "gradient_checkpointing=true checkpointing_keeps=0.5"
VALUES = ["adamss", "frod", "shira"]  # shapes come from weights
OTHERS = [*VALUES, "adaption_prompt", "cpt", "multitask_prompt_tuning", "poly", "xlora"]  # need more than a model
MORE = {
    "adalora": "adapter.total_step=10", "boft": "adapter.boft_block_size=4", "oft": "adapter.oft_block_size=32",
    "c3a": "adapter.block_size=32", "vblora": "adapter.vector_length=32",
    "trainable_tokens": "adapter.token_indices=[1,2]",
}  # fmt: skip


def settings(*words: str) -> TrainConfig:
    return load_config(None, ["model=-m-", "data=-d-", "max_length=64", "dtype=float32", *words])


def all_methods() -> list[str]:
    found = []
    for peft_type, config in CONFIGS.items():
        name = peft_type.value.lower()
        prompt = hasattr(config, "num_virtual_tokens")
        if name not in OTHERS and (not prompt or name in PROMPTS):
            found.append(name)
    return sorted({*found, "dora"})


@pytest.mark.parametrize("method", matrix(all_methods(), short=("lora", "dora", "vera", "ia3", "prefix_tuning")))
def test_every_method_is_estimated(method: str) -> None:
    config = settings(f"method={method}", "quantize=none", *MORE.get(method, "").split())
    found = parts.estimate(config, BASE, torch.float32, 0)
    memory = found["memory_bytes"]
    assert sum(memory.values()) == found["step_peak_bytes"]
    assert memory["gradients"] == 4 * found["trainable_parameters"] > 0
    assert memory["optimizer"] == 2 * memory["gradients"]
    kept = found["kept_bytes"]
    assert kept.get("with checkpointing", 0) <= kept["without"]
    assert found["step_flops"] >= 4 * 64 * sum(  # a product forward and one backward, but for the first layer's
        p.numel() for n, p in transformers.LlamaForCausalLM(BASE).named_parameters() if "layers.1" in n and p.dim() > 1
    )  # fmt: skip


def test_work_of_dora_on_layers_with_biases() -> None:
    """Work of LoRA, and of the norms; dropout computes W x once more."""
    base = transformers.OPTConfig(
        vocab_size=512, hidden_size=64, ffn_dim=128, num_hidden_layers=2, word_embed_proj_dim=64, num_attention_heads=4,
        max_position_embeddings=128,
    )  # fmt: skip
    lora, dora, dropped = (
        parts.estimate(settings(*words), base, torch.float32, 0, both=False)["step_flops"]
        for words in (("method=lora",), ("method=dora",), ("method=dora", "lora.lora_dropout=0.1"))
    )
    assert lora < dora < 1.5 * lora < dropped


@pytest.mark.parametrize("words", matrix(
    ["method=lora", "method=dora", "quantize=none", "gradient_checkpointing=true", "method=vera",
     "method=boft adapter.boft_block_size=4", "method=ia3", SOME_LAYERS],
    short=("method=lora", "quantize=none", SOME_LAYERS),
))  # fmt: skip
def test_a_step_without_memory_keeps_what_a_real_one_keeps(words: str) -> None:
    """Bytes that autograd keeps of the backbone's forward, by hooks of saved tensors, in both."""
    config = settings(*words.split())
    kept = []
    shape = shapes.run_shape(config, BASE, torch.float32)
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(BASE)).requires_grad_(False)
    if config.quantize != "none":
        model = quantize_model(model)
    model = get_peft_model(model, adapter_config(config))
    if config.fast_layers:
        shapes.models.speed_up(model)
    enable_checkpoints(config, model.get_base_model())
    assert shapes.bytes_of(model) == shapes.bytes_of(shape.model)
    for one, mode in ((shape.model, shape.mode), (model.train(), torch.no_grad())):
        sizes = {}
        own = {t.untyped_storage() for t in (*one.parameters(), *one.buffers())}

        def pack(t: Any, own: Any = own, sizes: Any = sizes) -> Any:
            if t.untyped_storage() not in own and t.is_floating_point():
                sizes[t.untyped_storage()] = t.untyped_storage().nbytes()
            return t

        with mode if one is shape.model else torch.enable_grad():
            ids = torch.zeros(1, 64, dtype=torch.long)
            batch = Batch(ids, torch.arange(64)[None], torch.arange(63), ids[0, 1:], 64)
            loss = CompletionLoss(one)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                if one is shape.model:
                    with parts.trace.Live([]):
                        loss(batch)
                else:
                    loss(batch)
        kept.append(sum(sizes.values()))
    assert kept[0] == kept[1] > 0


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adamw_8bit", "lion_8bit"])
def test_states_of_optimizers(optimizer: str) -> None:
    if "8bit" in optimizer:
        pytest.importorskip("bitsandbytes")
    large, small = torch.nn.Parameter(torch.zeros(64, 128)), torch.nn.Parameter(torch.zeros(8, 16))
    made = make_optimizer([("a", large), ("b", small)], settings(f"optimizer={optimizer}"))
    for p in (large, small):
        p.grad = torch.ones_like(p)
    made.step()
    for p in (large, small):
        real = sum(t.nbytes for k, t in made.state[p].items() if torch.is_tensor(t) and t.dim() and "qmap" not in k)
        assert parts.states(optimizer, p) == real


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("world"), 4)


def run(*words: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["estimate", *words, "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_only_headers_are_read(world: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((world / "model" / "config.json").read_bytes())
    there = run(str(world / "model"), "max_length=64", "--gpu", "24GB")
    assert there["gpu"] == {"name": "a GPU of 24GB", "memory_bytes": 24 * 10**9, "fits": True}
    assert there["step_seconds"]["at_least"] is None
    alone = run(str(tmp_path), "max_length=64", "--gpu", "l4")
    assert alone["memory_bytes"] == there["memory_bytes"]
    assert alone["step_seconds"]["how"].startswith("a lower bound")


def test_what_fits_is_a_command(world: Path) -> None:
    words = [str(world / "model"), "max_length=512", "batch_size=64"]
    whole = run(*words, "--gpu", "24GB")
    room = (machines.CUDA_BYTES + whole["peak_bytes"]) // 2
    found = run(*words, "--gpu", "24GB", "--fit", f"{room}B")
    assert found["peak_bytes"] <= room
    assert "gradient_checkpointing=true" in found["fit"]["command"]
    given = found["fit"]["settings"]
    some = run(*words, "gradient_checkpointing=true", "checkpointing_keeps=0.5", "--gpu", "24GB")["kept_bytes"]
    assert whole["kept_bytes"]["with checkpointing"] < some["with checkpointing"] < some["without"]
    again = parts.estimate(
        load_config(None, [f"model={world / 'model'}", "data=-d-", *found["fit"]["command"].split()[4:]]),
        shapes.configuration(str(world / "model")), torch.bfloat16, machines.CUDA_BYTES, both=False,
    )  # fmt: skip
    assert again["peak_bytes"] == found["peak_bytes"]
    assert given["batch_size"] * given.get("gradient_accumulation", 1) == 64
    prefix = run(*words, "method=prefix_tuning", "--gpu", "24GB", "--fit", f"{room}B")  # takes no checkpoints
    assert "gradient_checkpointing" not in prefix["fit"]["settings"]
    words[1:] = ["max_length=128", "batch_size=1"]  # little is left to try
    done = CliRunner().invoke(app, ["estimate", *words, "--gpu", "24GB", "--fit", "1MB"])
    assert done.exit_code == 1
    assert "no settings of this model fit" in done.output


@pytest.mark.parametrize("method", VALUES)
def test_methods_whose_shapes_come_from_weights_say_so(method: str) -> None:
    with pytest.raises(UserError, match=r"depend on the values of the model's weights.*--plan"):
        parts.estimate(settings(f"method={method}", "quantize=none"), BASE, torch.float32, 0)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no dense experts"):
        parts.estimate(settings("quantize_experts=true"), BASE, torch.float32, 0)
    other = copy.deepcopy(BASE)
    other.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(UserError, match="quantised by gptq"):
        parts.estimate(settings(), other, torch.float32, 0)
    assert [parse_size(t) for t in ("24GB", "1.5 GiB", "7")] == [24 * 10**9, 3 << 29, 7]
    for text in ("much", "1.2.3GB"):
        with pytest.raises(UserError, match="expected a size"):
            parse_size(text)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises((UserError, ValueError), match=r"config|JSON"):
        shapes.configuration(str(tmp_path))
    with pytest.raises(UserError, match="expected a size as 24GB or one of t4"):
        machines.card("rtx1", parse_size)


def test_the_table_of_models_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its smallest model in the short form; all of it takes a minute."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import memory_table

    every = tuple(memory_table.MODELS)
    names = by_form(short=every[:1], full_form=every)
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    for name in names:
        assert memory_table.row(name) in text, "run python tools/memory_table.py"


def test_only_a_cpu_has_a_heap() -> None:
    for words, on_gpu, has in (((), False, True), ((), True, False), (("gradient_checkpointing=true",), False, False)):
        found = parts.estimate(settings(*words), BASE, torch.float32, 1000, both=False, on_gpu=on_gpu)
        assert ("heap" in found["memory_bytes"]) is has


SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("config", "experts"),
    [
        (transformers.LlamaConfig(**SMALL, vocab_size=96, intermediate_size=96), False),
        (transformers.FalconConfig(**SMALL, vocab_size=96), False),  # a subclass of nn.Linear
        (transformers.GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=96), False),  # Conv1D, a tied head
        (transformers.Qwen3MoeConfig(**SMALL, **MIXTURE, vocab_size=96, head_dim=16), True),
    ],
    ids=["llama", "falcon", "gpt2", "mixture"],
)
def test_a_skeleton_has_the_layers_of_a_quantised_model(config: Any, experts: bool) -> None:
    models = []
    for device, quantise in (("cpu", quantize_model), ("meta", quantized_skeleton)):
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config))
        models.append(quantise(model, skip=["lm_head", "layers.1"], experts=experts))
    real, empty = ({n: (t.shape, t.dtype) for n, t in (*m.named_parameters(), *m.named_buffers())} for m in models)
    assert real == empty
    assert [(n, type(m).__name__) for n, m in models[0].named_modules()] == [
        (n, type(m).__name__) for n, m in models[1].named_modules()
    ]
    assert shapes.bytes_of(models[0]) == shapes.bytes_of(models[1])


def test_a_mixture_is_estimated() -> None:
    base = transformers.Qwen3MoeConfig(**SMALL, **MIXTURE, vocab_size=96, head_dim=16)
    dense, packed = (
        parts.estimate(settings(f"quantize_experts={given}"), base, torch.float32, 0, both=False)["memory_bytes"]
        for given in ("no", "yes")
    )
    numbers = 2 * 4 * 3 * 64 * 64  # of all experts, which are too small for scales in 8 bits
    assert dense["base"] - packed["base"] == numbers * (4 - (4 + 32 / 64) / 8)
    assert dense["adapter"] == packed["adapter"]


def test_the_process_takes_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    process._step()
    assert int(capsys.readouterr().out) > 0


@pytest.mark.full_form
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_process_is_measured() -> None:
    """A process that takes a step is larger than one that imports torch."""
    program = "import torch; print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.process_bytes() > 1024 * int(done.stdout)
