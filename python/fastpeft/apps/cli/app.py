"""The commands. Each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .estimate import command as estimate_command
from .export import command as export_command
from .output import Cached, Debug, Json, progress_bar, session, size, table, utf8_streams
from .serve import command as serve_command

app = typer.Typer(
    name="fastpeft",
    help="Parameter-efficient fine-tuning on fused kernels: train, use, merge and inspect adapters on 4-bit models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _all_commands() -> None:
    utf8_streams()


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for the report, the curve and the adapter.")] = Path(
        "runs/quickstart"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 48,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune SmolLM2-135M on Python's own documentation, and show what changed."""
    with session(as_json, debug) as out:
        from ..demo.quickstart import run, show

        result = run(output, steps)
        out.emit(result, lambda: show(result))


@app.command()
def demo_adapters(
    output: Annotated[Path, typer.Option(help="Folder for the report, the plots and the adapters.")] = Path(
        "runs/demo-adapters"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each adapter.")] = 40,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train three adapters in one run, and let them answer side by side in one batch."""
    with session(as_json, debug) as out:
        from ..demo.adapters import run, show

        result = run(output, steps)
        out.emit(result, lambda: show(result))


@app.command()
def train(
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="[CONFIG.yaml] [key=value]...",
            help="A YAML file, and settings that override it.",
            show_default=False,
        ),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan (parameters, memory, steps) and stop.")
    ] = False,
    plan_only: Annotated[
        bool, typer.Option("--plan", help="As --dry-run, and take three steps: time and memory; keep nothing of them.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest intact checkpoint in output.")
    ] = False,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            help="Begin anew, without the earlier run's checkpoints and adapter; with --resume only if all are broken.",
        ),
    ] = False,
    trainer: Annotated[
        str, typer.Option(help="own, or hf: transformers' and TRL's, for DPO, reports, stopping early.")
    ] = "own",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train an adapter on jsonl files of prompt/completion or messages.

    Ctrl-C and SIGTERM end it after the step it is in, with a checkpoint; once more ends it at once.

    Example: fastpeft train model=smollm2 data=train.jsonl output=runs/mine lora.r=8 epochs=2
    """
    with session(as_json, debug) as out:
        from ..training.config import load_config
        from ..training.trainers import check_trainer

        path = None if "=" in settings[0] and not Path(settings[0]).is_file() else settings[0]
        config = load_config(path, settings if path is None else settings[1:])
        from . import commands

        check_trainer(config, trainer)
        if dry_run or plan_only:
            plan = commands.measured_plan(config) if plan_only else commands.plan(config)
            out.emit(plan, lambda: commands.show_plan(plan))
        else:
            result = commands.train(config, resume, restart, trainer)
            out.emit(result, lambda: commands.show_training(result))


app.command("estimate")(estimate_command)


@app.command()
def generate(
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="One or more prompts; - reads one from stdin.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Folder, Hub id, .gguf or smollm2; default: the adapter's base.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 picks the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    quantize: Annotated[str, typer.Option(help="auto (as trained), none, nf4 or fp4.")] = "auto",
    cache_quantized: Cached = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:N].")] = "auto",
    template: Annotated[str, typer.Option(help="auto, chat or plain.")] = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer prompts with a model, with or without an adapter."""
    with session(as_json, debug) as out:
        import sys

        from ..training.inference import Answerer

        texts = [sys.stdin.read().strip() if p == "-" else p for p in prompts]
        answerer = Answerer.load(
            model, None if adapter is None else str(adapter), quantize=quantize, dtype=dtype, device=device,
            template=template, cache_quantized=cache_quantized, say=lambda line: print(line, file=sys.stderr),
        )  # fmt: skip
        for why in answerer.slow:
            print(f"layers: {why}", file=sys.stderr)
        answers = answerer.answer(texts, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        result = {
            "model": answerer.note,
            "adapter": None if adapter is None else str(adapter),
            "answers": [
                {"prompt": p, "answer": a.text, "tokens": a.tokens, "complete": a.complete}
                for p, a in zip(texts, answers, strict=True)
            ],
            "tokens_per_s": sum(a.tokens for a in answers) / max(1e-9, sum(a.seconds for a in answers)),
        }

        def human() -> None:
            for text, answer in zip(texts, answers, strict=True):
                if len(texts) > 1:
                    print(f"> {text}")
                print(answer.text + ("\n" if len(texts) > 1 else ""))

        out.emit(result, human)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    output: Annotated[Path, typer.Argument(help="Folder for the full model; with --gguf a file.")],
    model: Annotated[str | None, typer.Option(help="Base model; default: the adapter's own.")] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    onto: Annotated[
        str,
        typer.Option(help="original: the base as published. quantized: the base as rounded to 4 bits in training."),
    ] = "original",
    gguf: Annotated[str | None, typer.Option(help="Q8_0, Q4_0 or F16: one GGUF file, of a base that is one.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter into its base and save a full model folder."""
    with session(as_json, debug) as out:
        from . import commands

        result = commands.merge(adapter, output, model, dtype, onto, gguf)
        out.emit(
            result,
            lambda: print(
                f"{result['output']}: {result['parameters']:,} parameters, {result['dtype']}, {size(result['bytes'])}"
            ),
        )


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder, or a GGUF file of a model or an adapter.")],
    keys: Annotated[bool, typer.Option("--keys", help="List every tensor.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show an adapter's method, ranks, keys, size and where it can be served; a GGUF file's too. Loads no model."""
    with session(as_json, debug) as out:
        from . import commands

        result = commands.inspect(adapter)
        out.emit(result, lambda: commands.show_inspection(result, keys))


app.command("export")(export_command)


@app.command()
def convert_bin(
    adapter: Annotated[Path, typer.Argument(metavar="FOLDER", help="Adapter folder with an adapter_model.bin.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write an adapter's pickle as safetensors beside it; a process of its own reads it, as tensors only."""
    with session(as_json, debug) as out:
        from fastpeft import convert_bin

        result = {"folder": str(adapter), "tensors": convert_bin(adapter)}
        out.emit(result, lambda: print(f"{adapter}: {result['tensors']} tensors, written as adapter_model.safetensors"))


@app.command()
def tune(
    model: Annotated[
        str | None, typer.Argument(help="Folder, Hub id, .gguf or smollm2: tune for its linear layers.")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="OUTxIN", help="Tune for a layer of this size; may be repeated.")
    ] = None,
    rows: Annotated[str, typer.Option(help="Numbers of rows (tokens in a step); each stands for its power of two.")] = (
        "1,16,64,256,1024,4096"
    ),
    r: Annotated[int, typer.Option("--rank", min=1, help="Rank of the adapter.")] = 16,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    blocksize: Annotated[int, typer.Option(min=32, help="Elements that share a scale.")] = 64,
    dropout: Annotated[float, typer.Option(min=0.0, max=0.99)] = 0.0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time the launch configurations of the Triton kernels on this GPU, and keep the fastest for later runs.

    Example: fastpeft tune --shape 14336x4096 --shape 4096x14336 --rows 1,512
    """
    with session(as_json, debug) as out:
        from . import tune as tuner

        shapes = [tuner.parse_shape(s) for s in shape or []]
        counts, x_dtype = tuner.parse_rows(rows), tuner.parse_dtype(dtype)
        gpu = tuner.find_gpu()
        shapes += [] if model is None else tuner.shapes_of_model(model)
        layers = tuner.layers_of(shapes, r, x_dtype, blocksize, dropout)
        with progress_bar() as report:
            result = tuner.run(layers, counts, gpu, report)
        out.emit(result, lambda: tuner.show(result))


app.command("serve")(serve_command)


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    command: Annotated[
        list[str], typer.Argument(metavar="SCRIPT|MODULE [ARGS]...", help="The program and its own arguments.")
    ],
    module: Annotated[bool, typer.Option("-m", help="Run a module, as `python -m` does.")] = False,
    patch: Annotated[
        bool, typer.Option("--patch", help="Let it use PEFT itself, whose layers run on fastpeft's kernels.")
    ] = False,
) -> None:
    """Run a Python program, unchanged, for which `import peft` is fastpeft, whether PEFT is installed or not.

    Example: fastpeft run -m trl.scripts.sft --model_name_or_path smollm2 --dataset_name data --use_peft
    """
    from .run import execute

    execute(command, module, patch)


@app.command()
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Show versions, devices, and which backend serves which op and why; works when torch or a library is broken."""
    with session(as_json, debug) as out:
        from .doctor import examine, show

        report = examine()
        out.emit(report, lambda: show(report, table))
        if not report["usable"]:
            raise typer.Exit(1)
