"""`python -m bench --op OP`, `--suite SUITE` or `--static`; see --help."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from . import checks, machine, results
from .measure import cuda_clock, threads, wall_clock
from .suites import PARTS

OPS = ("lora_linear", "lora_linear_stacked", "multi_lora_linear", "lora_mixture", "dora_norm", "dora_linear", "gated",
       "grouped_linear", "norms", "attention", "rotations", "quantize_4bit", "dequantize_4bit")  # fmt: skip
SUITES = ("layers", "qlora", "methods", "dora", "pool", "multi", "multi-train", "serve", "chaos", "ortho",
          "dropin", "train-chaos", "families", "load")  # fmt: skip
CHECKED = {"layers": ["lora_linear"], "qlora": ["lora_linear", "fastpeft"], "methods": ["fastpeft"],
           "dora": ["dora_linear", "dora_norm", "fastpeft"], "pool": ["multi_lora_linear", "pool"],
           "multi": ["multi_lora_linear", "routing"],
           "multi-train": ["multi_lora_linear", "train_adapters"],
           "serve": ["multi_lora_linear", "pool", "serve"], "ortho": ["rotations", "fastpeft"],
           "chaos": ["serve"], "dropin": ["lora_linear", "fastpeft", "causal_loss"],
           "train-chaos": ["training_loop", "training_output"],
           "families": ["lora_linear", "fastpeft", "causal_loss", "families"],
           "load": ["streaming_load", "cached_models"]}  # fmt: skip


def gpu_bounds() -> dict[str, Any]:
    """The ceilings of this machine's GPU. SystemExit where there is none."""
    from .gpu import device
    from .gpu.parts import ceilings

    try:
        return ceilings.bounds(device.find(Path("runs", "gpu")))
    except device.NoDevice as e:
        sys.exit(f"error: {e}")


def shape(text: str) -> tuple[int, int]:
    """`576x1536` -> (576, 1536), in features x out features."""
    try:
        k, n = (int(v) for v in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"a shape is INxOUT, such as 576x1536, got {text!r}") from None
    if min(k, n) < 1:
        raise argparse.ArgumentTypeError(f"a shape needs positive sizes, got {text!r}")
    return k, n


def arch(text: str) -> int:
    """`sm_90` or `90` -> 90."""
    from .static.gpus import ARCHS

    digits = text.removeprefix("sm_")
    if not digits.isdigit() or int(digits) not in ARCHS:
        known = ", ".join(f"sm_{a}" for a in ARCHS)
        raise argparse.ArgumentTypeError(f"an architecture is one of {known}, got {text!r}")
    return int(digits)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--op", choices=OPS)
    what.add_argument("--suite", choices=SUITES)
    what.add_argument("--static", action="store_true", help="every GPU kernel as machine code; needs no GPU")
    p.add_argument("--backends", nargs="+", metavar="B", help="of an op: native, reference, triton, cuda")
    p.add_argument("--shapes", nargs="+", type=shape, metavar="INxOUT")
    p.add_argument("--m", nargs="+", type=int, help="rows of x; of the long rows of qlora: tokens")
    p.add_argument("--dtype", nargs="+", choices=("f32", "bf16", "f16"), default=["bf16", "f32"])
    p.add_argument("--dropout", type=float, default=0.0)
    p.add_argument("--threads", type=int)
    p.add_argument("--device", default="cpu", help="of an op: cpu (the default) or cuda")
    p.add_argument("--only", nargs="+", help="parts of a suite: forward, train, levels, formats; or step, "
                   "products, decode (of qlora also llama-1b, llama-products, long, long-products, longest, "
                   "checkpointing, which run by name alone; of load llama-7b); or dropout, plain, unet; families of "
                   "the suite families")
    p.add_argument("--methods", nargs="+", metavar="M", help="of the suites methods and ortho, such as boft dora")
    p.add_argument("--rounds", type=int, default=15, help="samples of each candidate")
    p.add_argument("--sample-s", type=float, default=0.02, help="seconds of one sample")
    p.add_argument("--budget-s", type=float, default=20.0, help="seconds of one row")
    p.add_argument("--modes", nargs="+", help="of the suites qlora, dropin and families, such as ours-bf16 bnb-bf16")
    p.add_argument("--step-rounds", type=int, default=7, help="steps, or generations, of each mode")
    p.add_argument("--minutes", type=float, help="of the suites chaos (default 10, with --quick 1) and train-chaos (5)")
    p.add_argument("--seed", type=int, default=0, help="of the suites chaos and train-chaos: what is drawn")
    p.add_argument("--model", type=Path, help="folder of a causal language model; default: SmolLM2 of the quickstart")
    p.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        nargs="?",
        const=Path("-"),
        help="default: bench/results/NAME-MACHINE.jsonl; of --static: also with no FILE, one object a line; "
        "of --against: with no FILE, bench/results/ab-SUITE-MACHINE.jsonl, and without it no file",
    )
    p.add_argument("--against", type=Path, metavar="CHECKOUT", help="of a suite: our rows in turns with those of "
                   "another checkout, which has its native library built: is one slower here?")  # fmt: skip
    p.add_argument("--arch", nargs="+", type=arch, metavar="sm_90", help="of --static; default: all")
    p.add_argument("--kernels", nargs="+", metavar="K", help="of --static: ops or kernels, such as lora_linear outer")
    p.add_argument("--most", type=int, help="of --static: at most so many specialisations an architecture")
    p.add_argument("--jobs", type=int, default=2, help="of --static: processes that compile")
    p.add_argument("--plot", type=Path, metavar="PNG")
    p.add_argument("--quick", action="store_true", help="few rows and short samples")
    p.add_argument(
        "--skip-checks", action="store_true", help="do not run the tests first; then no speed-up is reported"
    )
    return p


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    if args.static:
        from .static import report

        return report.main(args)
    if args.against is None and args.json == Path("-"):
        p.error("--json needs a FILE, except with --static and --against")
    if args.quick:
        args.rounds, args.sample_s, args.budget_s = min(args.rounds, 7), min(args.sample_s, 0.01), 6.0
    only = args.only
    args.only = only or PARTS
    args.threads = threads(args.threads)
    if args.against is not None:
        from .ab import compare

        return compare.main(args, only)
    name = args.op or args.suite
    verdict = checks.check_all([args.op] if args.op else CHECKED[args.suite], args.skip_checks)
    print(verdict.text, file=sys.stderr)
    info = machine.describe(args.threads)
    bounds = machine.bounds(args.threads) if args.device == "cpu" else gpu_bounds()
    print(machine.line(info))
    print(machine.bounds_line(bounds))
    module = importlib.import_module(f"bench.{'ops' if args.op else 'suites'}.{name.replace('-', '_')}")
    header = results.header(info, bounds, machine.commit(), name)
    path = args.json or results.default_path(name, machine.name(args.threads))
    rows = []
    for row in module.rows(args):
        row.measure(args.rounds, args.sample_s, args.budget_s, wall_clock if args.device == "cpu" else cuda_clock)
        # written row by row, so that an interrupted run keeps what it measured
        results.write_lines(results.as_lines([row], header, verdict.passed), path)
        rows.append(row)
        print(f"measured: {row.title}", file=sys.stderr)
    title = f"python -m bench {' '.join(argv or sys.argv[1:])}"
    results.print_rows(rows, bounds, verdict.passed, title, info["bnb"])
    refused = {k: v for row in rows for k, v in row.case.get("refused", {}).items()}
    for backend, why in refused.items():
        print(f"{backend} was not run: {why}")
    if args.plot:
        results.plot_rows(rows, args.plot, f"{name}, {info['cpu']}, {info['threads']} threads")
    print(f"{path}: {len(rows)} rows at commit {header['commit']}")
    return 0 if (verdict.passed or args.skip_checks) and not any(row.missed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
