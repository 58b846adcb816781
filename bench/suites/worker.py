"""One mode of the whole model in a process of its own, driven over pipes by whole.py.

A process per mode, because bitsandbytes' eval mode changes its layers for good and peak memory is per process. The
processes take turns, so a slow spell of the machine hits every mode alike. Protocol: a JSON object a line each way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..flops import saved_bytes
from ..machine import Peak
from ..measure import Turns
from ..pipes import driven
from . import products
from .bounds import costs

CHECKPOINTING, SOME = "-ckpt", "-some"  # behind a mode: of each layer, or of all but every third
PROMPT = "What does the os module of Python do? Explain it at length."
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def memory_mib(field: str) -> float | None:
    """VmHWM (peak resident memory) or VmRSS of this process; None where the system does not tell."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return None


def reset_peak() -> None:
    """Give freed memory back and start the peak anew, so that it is of the run and not of loading."""
    import ctypes
    import gc

    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        pass


def load(
    mode: str, folder: str, dropout: float, device: str, adapters: int = 1, auto: str = "AutoModelForCausalLM",
    skip: list[str] | None = None, **lora: Any,
) -> Any:  # fmt: skip
    """The adapter model of a mode, `<ours|bnb|dense>-<bf16|f32>`, on a device. adapters: `default`, `a1`, `a2` ...

    auto: the class of transformers that loads it. skip: layers that stay dense, None: the output head. lora: fields of
    the configuration that differ from a causal model's with Llama's layers."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind, dtype_name = mode.split("-")[:2]
    dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[dtype_name]
    extra: dict[str, Any] = {}
    if kind == "bnb":
        from ..bnb import use_kernel

        use_kernel()
        extra = {"device_map": device, "quantization_config": transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skip,
        )}  # fmt: skip
    model = getattr(transformers, auto).from_pretrained(folder, dtype=dtype, **extra)
    package: Any
    if kind == "ours":
        import fastpeft as package

        package.quantize_model(model, "nf4", double_quant=True, skip=["lm_head"] if skip is None else skip)
    else:
        import peft as package
    options = {"r": 16, "lora_alpha": 32, "lora_dropout": dropout, "target_modules": TARGETS, "task_type": "CAUSAL_LM",
               **lora}  # fmt: skip
    adapted = package.get_peft_model(model, package.LoraConfig(**options))
    for i in range(1, adapters):
        adapted.add_adapter(f"a{i}", package.LoraConfig(**options))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=g) * 1e-3)
            elif "lora_A" in name:
                p.copy_(torch.randn(p.shape, generator=g) / p.shape[1] ** 0.5)
    return adapted if kind == "bnb" else adapted.to(device)


def waiting(device: Any) -> Callable[[], float]:
    """A clock that reads when everything queued on the device is done."""
    import torch

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def accelerate(model: Any, mode: str) -> None:
    """The additions of `-own` (fastpeft's training) and `-fast` (its decoding) to transformers' model code."""
    if mode.endswith(("-fast", "-own")):
        from fastpeft.families import switch

        switch.accelerate(model)


def tokens_of(model: Any, rows: int, length: int) -> dict[str, Any]:
    """Inputs of a causal model: random tokens, each of which is learned."""
    import torch

    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, model.config.vocab_size, (rows, length), generator=generator).to(model.device)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


class TrainStep:
    """One whole step: forward, loss, backward, AdamW. The loss is the model's own, or with `-own` fastpeft's, which on
    a CPU takes AdamW from there, too; `-ckpt` behind that computes each decoder layer again in the backward, `-some`
    all but every third. `-own` alone keeps freed memory in the process, as `fastpeft train` does.

    given: the model's arguments."""

    def __init__(self, model: Any, mode: str, given: dict[str, Any]) -> None:
        import torch

        self.model, self.given = model, given
        own = mode.removesuffix(CHECKPOINTING).removesuffix(SOME)
        model.train()
        accelerate(model, own)
        if mode.endswith(SOME):
            from fastpeft.recipes.checkpointing import checkpoint_layers

            checkpoint_layers(model)
        elif own != mode:
            base = model.get_base_model()
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.disable_input_require_grads()  # for reentrant checkpoints; here it only costs
        self._now = waiting(model.device)
        trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self._own: Any = None
        if own.endswith("-own"):
            from fastpeft.apps.training.forward import CompletionLoss
            from fastpeft.apps.training.memory import keep_freed_memory
            from fastpeft.apps.training.packing import Batch

            if model.device.type == "cpu":
                import fastpeft

                self._optimizer = fastpeft.AdamW(trained, lr=1e-4)
                if own == mode:
                    keep_freed_memory()
            ids = given["input_ids"]
            rows, length = ids.shape
            where = torch.arange(rows * length, device=ids.device).view(rows, length)[:, :-1].flatten()
            position_ids = torch.arange(length, device=ids.device).expand(rows, length)
            self._batch = Batch(ids, position_ids, where, ids[:, 1:].flatten(), rows * length)
            self._own = CompletionLoss(model)

    def loss(self) -> Any:
        if self._own is None:
            return self.model(**self.given).loss
        return self._own(self._batch) / self._batch.targets.numel()

    def __call__(self) -> dict[str, float]:
        start = self._now()
        loss = self.loss()
        forward = self._now()
        loss.backward()
        backward = self._now()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        end = self._now()
        return {
            "s": end - start,
            "forward": forward - start,
            "backward": backward - forward,
            "loss": float(loss.detach()),
        }

    def kept(self) -> dict[str, float]:
        """MiB that a forward keeps for its backward: the tensors that autograd saves (saved_mib), and what the process
        holds more of memory after it (held_mib)."""
        reset_peak()
        before = memory_mib("VmRSS")
        with saved_bytes(self.model, self.given["input_ids"]) as saved:
            loss = self.loss()
        reset_peak()
        after = memory_mib("VmRSS")
        del loss
        held = {} if before is None or after is None else {"held_mib": after - before}
        return {"saved_mib": saved[0] / 2**20, **held}


def adapters_trainer(model: Any, mode: str, adapters: int, length: int) -> Callable[[], dict[str, float]]:
    """A step of each adapter with a row of `length` tokens: of all at once, or `-after` as runs of one at a time; or
    `-one` step of one adapter with all the rows."""
    import torch

    model.train()
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(0, model.config.vocab_size, (adapters, length), generator=g)
    now = waiting(model.device)
    if mode.startswith("ours"):
        steps = _loop_steps(model, mode, ids)
    else:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        rows = ids.to(model.device).unsqueeze(1)

        def steps() -> float:
            total = 0.0
            for row in rows:
                loss = model(input_ids=row, labels=row, use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                total += float(loss.detach())
            return total / len(rows)

    def step() -> dict[str, float]:
        start = now()
        loss = steps()
        return {"s": now() - start, "loss": loss}

    return step


def _loop_steps(model: Any, mode: str, ids: Any) -> Callable[[], float]:
    """Steps of fastpeft's training loop: one with a row of `ids` for each adapter, or `-after` one a row, or one of
    `-one` adapter with all rows."""
    import itertools

    from fastpeft.apps.training.config import TrainConfig
    from fastpeft.apps.training.data import Example
    from fastpeft.apps.training.loop import Trainer
    from fastpeft.apps.training.metrics import Silent
    from fastpeft.apps.training.track import Track

    accelerate(model, "-own")
    rows = [Example(row, [True] * len(row)) for row in ids.tolist()]
    names = list(model.peft_config)
    batch = len(rows) if mode.endswith("-one") else 1
    config = TrainConfig(model="-", data="-", packing=False, max_steps=10_000, learning_rate=1e-4, batch_size=batch)
    given = [[row] for row in rows] if mode.endswith("-once") else [rows]
    tracks = [Track(name, config, own, [], 0) for name, own in zip(names, given, strict=True)]
    trainer = Trainer(config, model, tracks, 0, model.device, Silent())
    for track in tracks:
        trainer._use([track])
        track.start(model)
    count = itertools.count()

    def steps() -> float:
        lines = [line for _ in given[0][::batch] for line in trainer._step(next(count), tracks)]
        return sum(line["loss"] for line in lines) / len(lines)

    return steps


def decoder(model: Any, mode: str, folder: str, tokens: int, rows: int = 1) -> Callable[[], dict[str, Any]]:
    """Greedy `generate` of exactly `tokens` tokens for one prompt, or for it in `rows` rows with an adapter each;
    seconds per token of a row, prompt included."""
    import torch
    import transformers

    model.eval()
    accelerate(model, mode)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, **inputs}
    if rows > 1:
        options |= {name: t.repeat(rows, 1) for name, t in inputs.items()}
        options["adapter_names"] = [*model.peft_config][:rows]
    now = waiting(model.device)

    def decode() -> dict[str, Any]:
        with torch.no_grad():
            start = now()
            out = model.generate(**options)
            took = now() - start
        new = out[:, inputs["input_ids"].shape[1] :]
        return {"s": took / tokens, "tokens": tokens, "ids": new.flatten().tolist()}

    return decode


class Products:
    """A step and, in turns with it, each of its products alone (products.py)."""

    def __init__(self, model: Any, step: TrainStep, task: dict[str, Any]) -> None:
        self.step, self.rounds = step, 0
        self.timed = products.timed(model, task["rows"], task["length"], task["dropout"])
        self.turns = Turns([candidate for _, candidate in self.timed], task["sample_s"])
        self.turns.warm()

    def about(self) -> dict[str, Any]:
        return {"products": [asdict(product) for product, _ in self.timed]}

    def __call__(self) -> dict[str, Any]:
        done = self.step()
        self.turns.round(self.rounds)
        self.rounds += 1
        return {**done, "each": {name: stats.samples[-1] for name, stats in self.turns.stats.items()}}


def bound(task: dict[str, Any], model: Any) -> Callable[[], dict[str, float]]:
    """Measures this process's peak of products, and the seconds of a step at it; nothing where no bound is known."""
    if not task.get("peak") or task["what"] not in ("step", "train-adapters", "products"):
        return dict
    adapters = len(model.peft_config)
    flops = costs(model, task["rows"], task["length"], adapters)["step_flops"]
    peak, bf16 = Peak(Path(task["peak"])), "-bf16" in task["mode"]

    def measured() -> dict[str, float]:
        rate = peak.best_products(task["threads"], bf16)
        return {"peak_gflops": rate, "bound_s": flops / 1e9 / rate}

    return measured


def job(task: dict[str, Any], model: Any) -> Callable[[], dict[str, Any]]:
    """The work of each turn. It ran once before, or, where the task has `warm`, did so on as many tokens a row."""
    what, mode, rows, length = (task[name] for name in ("what", "mode", "rows", "length"))
    if what in ("step", "products"):
        step = first = TrainStep(model, mode, tokens_of(model, rows, length))
        if task.get("warm", length) < length:
            first = TrainStep(model, mode, tokens_of(model, rows, task["warm"]))
        reset_peak()
        first()
        return Products(model, step, task) if what == "products" else step
    if what == "train-adapters":
        run: Callable[[], dict[str, Any]] = adapters_trainer(model, mode, rows, length)
    else:
        run = decoder(model, mode, task["folder"], task["tokens"], len(model.peft_config))
    reset_peak()
    run()
    return run


def main() -> None:
    task, told, reply = driven()
    import torch

    torch.set_num_threads(task["threads"])
    on_gpu = task["device"] != "cpu"
    at_once = task["rows"] if task["what"] == "train-adapters" and task["mode"].endswith("-once") else 1
    mixed = 16 if task["what"] == "decode-mixed" else at_once
    model = load(task["mode"], task["folder"], task["dropout"], task["device"], mixed)
    ceiling = bound(task, model)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    run = job(task, model)
    about = run.about() if isinstance(run, Products) else {}
    reply({"ready": True, **about, **(run.kept() if task.get("kept") and isinstance(run, TrainStep) else {})})
    for _ in told:
        least = ceiling()
        # seconds of all threads: on a busy machine it says more than the clock does
        before = time.process_time()
        done = run()
        done["cpu_s"] = (time.process_time() - before) / done.get("tokens", 1)
        peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else memory_mib("VmHWM")
        reply({**done, **least, "peak_mib": peak})


if __name__ == "__main__":
    main()
