"""The work and the output of `train`, `merge` and `inspect`; ``app`` parses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..training import gguf_base, models
from ..training.config import TrainConfig
from ..training.errors import UserError
from .output import size, table

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def plan(config: TrainConfig) -> dict[str, Any]:
    from ..estimate.describe import describe
    from ..training.run import prepare_all

    return describe(config, prepare_all(config))


def measured_plan(config: TrainConfig) -> dict[str, Any]:
    """The plan, and its first steps taken."""
    from ..estimate.describe import describe
    from ..training.measure import STEPS, measure
    from ..training.metrics import Console
    from ..training.run import prepare_all

    if config.objective == "dpo":
        raise UserError("--plan takes steps of our own loop, which does not learn preferences", "use --dry-run")
    prepared = prepare_all(config)
    with Console() as progress:
        progress.say(f"taking {STEPS} steps to measure them; nothing of them is kept")
        return {**describe(config, prepared), "measured": measure(config, prepared, progress)}


def show_plan(plan: dict[str, Any]) -> None:
    adapters = plan.get("adapters", {"": plan})
    share = 100 * plan["trainable_parameters"] / plan["parameters"]
    rows = [
        ("model", f"{plan['model']}, {plan['quantize']}, computing in {plan['dtype']} on {plan['device']}"),
        ("parameters", f"{plan['parameters']:,}"),
        ("trainable", f"{plan['trainable_parameters']:,} ({share:.2f} %)"),
    ]
    for name, one in adapters.items():
        of, about = f"{name}: " if name else "", "about " if one["by_estimate"] else ""
        rows += [
            (f"{of}data", f"{one['examples']:,} examples, {one['held_out_examples']:,} held out"),
            (f"{of}tokens an epoch",
             f"{about}{one['tokens_per_epoch']:,}, of which learned {one['learned_tokens_per_epoch']:,}"),
            (f"{of}too long", f"{about}{one['examples_cut']} cut, {one['examples_dropped']} dropped"),
            (f"{of}steps", f"{one['steps']:,} over {one['epochs']} epoch(s), {one['warmup_steps']} of them warm-up"),
            (f"{of}rows a step", f"{one['rows_per_step']}, filled to {100 * one['row_fill']:.0f} %"),
        ]  # fmt: skip
    rows += [(f"memory: {name}", size(count)) for name, count in plan["memory_bytes"].items()]
    if "memory_unknown" in plan:
        rows.append(("memory: estimate", f"none: {plan['memory_unknown']}"))
    else:
        rows += [("memory: peak of loading", size(plan["loading_peak_bytes"])),
                 ("memory: estimate of a step", size(plan["memory_total_bytes"]))]  # fmt: skip
    if "measured" in plan:
        rows += _measured(plan["measured"])
    table("Plan (nothing was kept)" if "measured" in plan else "Plan (nothing was trained)", ("what", "value"), rows)
    print("settings:")
    for key, value in plan["config"].items():
        print(f"  {key}: {json.dumps(value)}")


def _measured(found: dict[str, Any]) -> list[tuple[str, str]]:
    from ..training.metrics import duration

    steps = ", ".join(f"{seconds:.2f}" for seconds in found["step_seconds"])
    return [
        ("measured: steps", f"{steps} s, {found['tokens_per_s']:.0f} tokens/s"),
        ("measured: memory", f"peak {size(found['peak_bytes'])} in these steps, {size(found['process_peak_bytes'])} "
                             f"with loading the model; {size(found['empty_bytes'])} before that"),
        ("time: estimate", f"{duration(found['seconds'])}, of it {duration(found['evaluation_seconds'])} evaluation; "
                           f"before it {duration(found['loading_seconds'])} to load the model"),
    ]  # fmt: skip


def train(config: TrainConfig, resume: bool, restart: bool, trainer: str) -> dict[str, Any]:
    from ..training.metrics import Console
    from ..training.output import CURVE_NAME, METRICS_NAME
    from ..training.run import prepare_all, train_all

    with Console() as progress:
        prepared = prepare_all(config)
        for p in prepared:
            if p.train.cut or p.train.dropped:
                of = f"{p.name}: " if config.adapters else ""
                about = "about " if p.train.about else ""
                lost = f"{about}{p.train.cut} examples cut, {p.train.dropped} dropped"
                progress.say(f"{of}max_length={p.config.max_length}: {lost}")
        results, _ = train_all(config, prepared, progress, resume, restart=restart, trainer=trainer)
    root = Path(config.output)
    curve = root / CURVE_NAME  # not there where matplotlib is not
    whole = {"output": str(root), "metrics": str(root / METRICS_NAME),
             "loss_curve": str(curve) if curve.exists() else None}  # fmt: skip
    ran = {
        p.name: {
            "adapter": str(Path(p.config.output) / "adapter"),
            "steps": results[p.name].steps,
            "resumed_from": results[p.name].resumed_from,
            "held_out_before": results[p.name].held_out_before,
            "held_out_after": results[p.name].held_out_after,
            "tokens": results[p.name].tokens,
        }
        for p in prepared
    }
    last = results[prepared[-1].name]
    return {
        **whole,
        **({"adapters": ran, "tokens": sum(r.tokens for r in results.values())} if config.adapters else ran["default"]),
        "seconds": last.seconds,
        "peak_memory_mb": last.peak_memory_mb,
    }


def show_training(result: dict[str, Any]) -> None:
    ran = result.get("adapters", {"": result})
    finished = result["tokens"] == 0 and all(one["resumed_from"] >= one["steps"] for one in ran.values())
    if finished:
        print("the run is finished: it took all its steps before, and nothing was trained")
    for name, one in ran.items():
        of = f"{name}: " if name else ""
        if one["held_out_before"] is not None and one["held_out_after"] is not None:
            print(f"{of}held-out loss {one['held_out_before']:.4f} -> {one['held_out_after']:.4f}")
        if name:
            did = f"all {one['steps']} steps" if finished else f"{one['steps']} steps, {one['tokens']:,} tokens"
            print(f"{of}{did}   adapter: {one['adapter']}")
    if finished:
        print("for more steps, raise epochs or max_steps; --restart begins anew")
    if "adapters" in result:
        if not finished:
            print(f"{result['tokens']:,} tokens in {result['seconds']:.0f} s")
        print(f"curves: {result['loss_curve'] or 'none'}   metrics: {result['metrics']}")
        return
    if not finished:
        print(f"{result['steps']} steps, {result['tokens']:,} tokens in {result['seconds']:.0f} s")
    print(f"adapter: {result['adapter']}   curve: {result['loss_curve'] or 'none'}   metrics: {result['metrics']}")


def merge(
    adapter: Path, output: Path, model: str | None, dtype: str, onto: str, gguf: str | None = None
) -> dict[str, Any]:  # fmt: skip
    """Merge in float32 and round once, to ``dtype``, or to ``gguf``, a type of GGUF files; the folder, or the file,
    appears whole or not at all."""
    from ... import MERGED_GGUF_TYPES
    from ..training.inference import adapter_note, base_of

    if dtype not in _DTYPES:
        raise UserError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}", "use --dtype bf16")
    if gguf and gguf not in MERGED_GGUF_TYPES:
        raise UserError(f"gguf: expected one of {', '.join(MERGED_GGUF_TYPES)}, got {gguf!r}", "use --gguf Q8_0")
    if onto not in ("original", "quantized"):
        raise UserError(f"onto: expected original or quantized, got {onto!r}", "use --onto original")
    if output.exists() and (gguf or not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not an empty folder", "choose another output")
    note = adapter_note(str(adapter))
    storage = str(note.get("quantize", "none"))
    if onto == "quantized" and storage == "none":
        raise UserError(f"{adapter} was not trained here on a quantised base", "use --onto original")
    name = model or base_of(str(adapter), note)
    if gguf and not gguf_base.names_gguf(name):
        raise UserError(f"--gguf takes keys and tokenizer from the base's GGUF file, and {name} is none",
                        "merge into a folder, and convert it by llama.cpp's convert_hf_to_gguf.py")  # fmt: skip
    # onto the file's own values, unless the base was another in training
    if gguf and (onto == "original" or storage == gguf_base.STORAGE):
        made = _merge_in_file(adapter, output, name, gguf)
        if made is not None:
            return {"output": str(output), "adapter": str(adapter), "onto": onto, "dtype": gguf, **made}
    elif gguf:
        _say_dense(f"--onto quantized merges onto the base in {storage}")
    source = models.resolve(name)

    import torch

    from ... import PeftModel, atomic_directory, save_merged_gguf

    base = models.load_model(source, torch.float32, torch.device("cpu"))
    if onto == "quantized":
        _round_to_four_bits(base, storage, note)
    merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload(safe_merge=True)
    if gguf:
        with models.quiet_transformers():
            made = save_merged_gguf(merged, models.resolve(name, "gguf").location, output, gguf)
        return {"output": str(output), "base": source.note, "adapter": str(adapter), "onto": onto, "dtype": gguf,
                "parameters": sum(p.numel() for p in merged.parameters()), "bytes": output.stat().st_size,
                **made}  # fmt: skip
    chosen: torch.dtype = getattr(torch, _DTYPES[dtype])
    merged = merged.to(chosen)
    merged.config.dtype = chosen
    tokenizer = models.load_tokenizer(source)
    with models.quiet_transformers(), atomic_directory(output, keep=False) as temporary:
        merged.save_pretrained(str(temporary))
        tokenizer.save_pretrained(str(temporary))
    return {
        "output": str(output),
        "base": source.note,
        "adapter": str(adapter),
        "onto": onto,
        "dtype": _DTYPES[dtype],
        "parameters": sum(p.numel() for p in merged.parameters()),
        "bytes": sum(f.stat().st_size for f in output.rglob("*") if f.is_file()),
    }


def _merge_in_file(adapter: Path, output: Path, name: str, gguf: str) -> dict[str, Any] | None:
    """Merge a tensor at a time, over the base's blocks; None, and a line that says why, where that cannot be."""
    import torch

    from ... import PeftConfig, PeftModel, needs_dense_merge, save_merged_gguf

    source = models.resolve(name, gguf_base.STORAGE)
    if (reason := needs_dense_merge(PeftConfig.from_pretrained(str(adapter)))) is not None:
        _say_dense(reason)
        return None
    base = models.load_base(source, torch.float32, torch.device("cpu"), gguf_base.STORAGE, {})
    count = gguf_base.elements(base)
    model = PeftModel.from_pretrained(base, str(adapter))
    if (reason := needs_dense_merge(model)) is not None:
        _say_dense(reason)
        return None
    with models.quiet_transformers():
        made = save_merged_gguf(model, source.location, output, gguf)
    return {"base": source.note, "parameters": count, "bytes": output.stat().st_size, **made}


def _say_dense(reason: str) -> None:
    print(f"{reason}: the base is converted to float32, and merged as a whole", file=sys.stderr)


def _round_to_four_bits(model: Any, storage: str, note: dict[str, Any]) -> None:
    """Replace each weight by what its 4-bit form stands for: the base that the adapter was trained to correct."""
    from ... import dequantize_model

    own = dict(model.named_modules())
    dequantize_model(models.quantize(model, storage, note))
    for name, layer in list(model.named_modules()):
        if layer is not own[name]:  # a layer of its own class again, such as GPT-2's, which stores [in, out]
            turned = type(own[name]).__name__ == "Conv1D"
            own[name].weight.data.copy_(layer.weight.t() if turned else layer.weight)
            model.set_submodule(name, own[name])


def inspect(adapter: Path) -> dict[str, Any]:
    from ... import inspect_adapter, inspect_gguf
    from ..training.inference import adapter_note

    if adapter.is_file() and gguf_base.names_gguf(str(adapter)):
        return dict(inspect_gguf(adapter))
    if not adapter.is_dir():
        raise UserError(f"{adapter} is not a folder", "give the folder of an adapter, or a .gguf file")
    note = adapter_note(str(adapter))
    result: dict[str, Any] = dict(inspect_adapter(str(adapter)))
    if note:
        result["trained_on"] = note
    return result


def show_inspection(result: dict[str, Any], with_keys: bool) -> None:
    """The report as a table; ``with_keys`` adds every tensor."""
    if "architecture" in result:
        _show_gguf(result, with_keys)
        return
    rows = [
        ("method", str(result["method"])),
        ("base model", str(result["base_model"])),
        ("task", str(result["task_type"])),
        ("ranks", _counts(result["ranks"], "modules")),
        ("scalings", _counts(result["scalings"], "modules")),
        ("targets", _targets(result["target_modules"])),
        ("tensors", f"{len(result['tensors'])}, {_counts(result['dtypes'], 'tensors')}"),
        ("size", f"{result['parameters']:,} parameters, {size(result['bytes'])}"),
        ("manifest", str(result["manifest"])),
    ]
    rows += [(f"option {name}", json.dumps(value)) for name, value in result["options"].items()]
    rows += [(f"trained on: {name}", json.dumps(value)) for name, value in result.get("trained_on", {}).items()]
    for server, reasons in result["serving"].items():
        rows.append((f"serving with {server}", "; ".join(reasons) or "yes, as it is"))
    table(result["path"], ("what", "value"), rows)
    if with_keys:
        table("tensors", ("key", "shape"), [(k, "x".join(map(str, s))) for k, s in result["tensors"].items()])


def _show_gguf(result: dict[str, Any], with_keys: bool) -> None:
    rows = [("GGUF", f"{result['type']}, architecture {result['architecture']}"), ("name", str(result["name"]))]
    if (adapter := result["adapter"]) is not None:
        rows += [
            ("method", str(adapter["method"])),
            ("alpha", str(adapter["alpha"])),
            ("ranks", _counts(adapter["ranks"], "modules")),
            ("scalings", _counts(adapter["scalings"], "modules")),
            ("targets", _counts(adapter["targets"], "modules")),
        ]
    rows += [(f"type {name}", f"{one['tensors']} tensors, {one['elements']:,} elements, {size(one['bytes'])}")
             for name, one in result["types"].items()]  # fmt: skip
    rows.append(("size", f"{len(result['tensors'])} tensors, {result['elements']:,} elements, {size(result['bytes'])} "
                         f"of {size(result['file_bytes'])}"))  # fmt: skip
    table(result["path"], ("what", "value"), rows)
    if with_keys:
        table("tensors", ("name", "shape", "type"), [
            (name, "x".join(map(str, one["shape"])), one["type"]) for name, one in result["tensors"].items()
        ])  # fmt: skip


def _counts(counts: dict[Any, int], of: str) -> str:
    return ", ".join(f"{value} ({number} {of})" for value, number in counts.items()) or "none"


def _targets(targets: object) -> str:
    return ", ".join(sorted(map(str, targets))) if isinstance(targets, (list, tuple, set)) else str(targets)
