"""Write docs/benchmarks.md, its further pages and the README's table from the runs in bench/results:
`python tools/benchmarks_table.py [--check]`.

Every number is a median of a run that is recorded there, with its 20th and 80th percentile. A table takes the newest
run of its suite and machine that holds its rows, or, of the families and of training, the newest run of each row; older
runs in the same file are not shown.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks_cells import (
    Cases,
    Column,
    Line,
    asked_of,
    cases_of,
    command,
    commit,
    digits,
    duration,
    fastest,
    field_of,
    grid,
    limits_of,
    machine,
    newest,
    newest_of_each,
    ratio_of,
    read,
    samples,
    spread,
    time_of,
    times,
    versions,
    wrapped,
)
from made_files import write_or_check

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- made by tools/benchmarks_table.py: begin -->", "<!-- made by tools/benchmarks_table.py: end -->"


HEADS = {"benchmarks.md": """# Benchmarks

Whole models, DoRA, mixed batches and rotations; single layers and every method are in
[benchmarks_layers](benchmarks_layers.md), families of models in [benchmarks_families](benchmarks_families.md), a
training step beside its bound and its products in [benchmarks_training](benchmarks_training.md). Made by
`python tools/benchmarks_table.py` from the runs in `bench/results`; a test holds the files to them.

A cell is a median with its 20th and 80th percentile in brackets. The candidates of a row take turns within one run. How
fast a virtual machine is changes from minute to minute, so compare times within a row only, never between tables.
A ratio is one median over another: 2 means twice as fast, below 1 is slower. Where the tests of what was measured did
not pass there is none. `python -m bench --help` lists the suites and their options.

PEFT runs on bitsandbytes where a base is in 4 bits: in evaluation mode for forwards and decoding, in training mode for
training. On a CPU with bfloat16 products these are two ways: in evaluation it repacks the weight once and multiplies in
bfloat16 whatever the dtype of x, in training it decodes the whole weight for torch's matmul. We compute float32 input
in float32, which takes a Zen 4 twice the time of bfloat16.

**No number here is from a GPU**: the GPU kernels have not been run on one yet. `make gpu-report` makes such a report,
and `python -m bench --static` counts the instructions of every GPU kernel without one
([how to read it](kernels/without_a_gpu.md)).
""", "benchmarks_layers.md": """# Benchmarks of single layers and of every method

Made by `python tools/benchmarks_table.py`; how to read it is in [benchmarks](benchmarks.md).
""", "benchmarks_families.md": """# Benchmarks of the families of models

A training step and a decoded token of every family that is [described](families.md), on random models of one size: 4
layers, hidden size 1024, vocabulary 32,000, NF4 with double quantisation, mixtures of 8 dense experts of a quarter of
the width, LoRA r=16 on all linear layers, lora_dropout 0.05, bfloat16. Made by `python tools/benchmarks_table.py` from
`python -m bench --suite families`; how to read it is in [benchmarks](benchmarks.md).

The bound of a step is its products (forward, and for the gradient of the input; an adapter's three times) at the
bfloat16 peak that was measured in the same run; that of a token is the bytes of the weights at the measured speed of
memory. In the 20 families that are used most, in our judgement, `accelerate` is to be 1.5 times as fast as PEFT on
bitsandbytes in a step and twice in a token, or to take at most 1.6 times the bound of the step, twice that of the
token. BERT, RoBERTa and T5 are to be 1.2 times as fast in a step of 8 x 128 tokens, ViT, CLIP and Whisper no slower.
""", "benchmarks_training.md": """# A training step beside its bound

QLoRA steps as in [benchmarks](benchmarks.md), which says how to read a table: NF4 with double quantisation, LoRA r=16
on all seven projections, dropout 0, a loss over every token. Made by `python tools/benchmarks_table.py` from
`python -m bench --suite qlora --only products`, and `llama-1b`, `llama-products`, `long`, `long-products`, `longest` or
`checkpointing` in its place, which run by name alone; `--m 2048` chooses a row's tokens.

**The bound** of a step is its FLOPs at the peak of products. FLOPs: a frozen weight is multiplied forward and for the
gradient of its input (dX), an adapter's also for its own, the output head twice; causal attention has two products
forward and four backward over the positions that are seen. What is computed again (scores in attention's backward,
layers under gradient checkpointing) does not count, nor do norms, the softmax of the loss and all else that is no
product. The peak is what the instructions for bfloat16's dot products (float32: FMA) give in registers on all threads;
each process measures it before each of its steps (`bench/peak.cpp`), as a virtual machine's speed changes by the
minute. "Of the bound" 1.5 is a step of 1.5 times that time.

**The table of products** is from one process, in which a step and each product alone take turns. A product goes through
copies of its weight, 4-bit with an adapter of its own, that no cache holds together; its input is warm, as in a step.
M x N x K is of the frozen weight (of dA and dB: of their rank), layers of one input are one call, as in the model. The
last dimension of attention's is a head's. "Forward" and "dX" have the adapter in them, "no adapter" is the frozen
weight alone. "Its products alone" adds up forward and backward, calls times median, where a backward counts as one call
or as dX and dA, dB apart, whichever takes less: those that have a share in "of the step". "Step less attention" is the
step without attention's two calls.

Asked is at most 1.5 times the bound (Llama: 1.35), or, where the products alone take more than 1.2 times the bound,
1.25 times their time; of long rows 1.6 times the bound. Gradient checkpointing is to take at most 1.35 times a step
without it and to keep at most 0.45 of the activations, which is held of `fastpeft.checkpoint_layers`: about one layer
in three keeps what it computed. With every layer it keeps far less, and takes longer. `saved_mib` are the tensors that
autograd saves in a forward, `held_mib` how much more memory the process has after it.
"""}

MODES = {
    "ours-bf16-own": "fastpeft, bfloat16, own loss and layers",
    "ours-f32-own": "fastpeft, float32, own loss and layers",
    "ours-bf16-fast": "fastpeft, bfloat16, own layers", "ours-f32-fast": "fastpeft, float32, own layers",
    "ours-bf16": "fastpeft, bfloat16, as a drop-in", "ours-f32": "fastpeft, float32, as a drop-in",
    "bnb-bf16": "PEFT + bitsandbytes, bfloat16", "bnb-f32": "PEFT + bitsandbytes, float32",
    "ours-bf16-own-ckpt": "fastpeft, bfloat16, own loss and layers, checkpointing",
    "ours-bf16-own-some": "fastpeft, bfloat16, own loss and layers, checkpointing of 2 layers in 3",
    "bnb-bf16-ckpt": "PEFT + bitsandbytes, bfloat16, checkpointing",
    "ours-bf16-one": "fastpeft, bfloat16, one adapter with all tokens",
    "dense-bf16": "PEFT on dense weights, bfloat16", "dense-f32": "PEFT on dense weights, float32",
    "ours-bf16-once": "fastpeft, bfloat16, at once", "ours-f32-once": "fastpeft, float32, at once",
    "ours-bf16-after": "fastpeft, bfloat16, one after another",
    "ours-f32-after": "fastpeft, float32, one after another",
    "bnb-bf16-after": "PEFT + bitsandbytes, bfloat16, one after another",
    "bnb-f32-after": "PEFT + bitsandbytes, float32, one after another",
}  # fmt: skip


@dataclass
class Table:
    """One table of a suite: a row for each case that begins with `row`, or, without columns, for each candidate."""

    suite: str
    title: str
    row: str
    text: str = ""
    columns: list[Column] = field(default_factory=list)
    strip: str = ""  # left out of the name of a row
    page: str = "benchmarks.md"
    runs: Callable[[list[Line], str], list[Line]] = newest


def dtypes(label: str, ours: str, theirs: str) -> list[Column]:
    return [(f"ours, {label}", time_of(ours)), (f"theirs, {label}", time_of(theirs)),
            ("ratio", ratio_of([ours], [theirs]))]  # fmt: skip


LAYERS, FAMILIES, TRAINING = "benchmarks_layers.md", "benchmarks_families.md", "benchmarks_training.md"
OF_FAMILIES: list[Column] = [
    ("PEFT + bitsandbytes", time_of("bnb-bf16")), ("fastpeft", time_of("ours-bf16")),
    ("with `accelerate`", time_of("ours-bf16-own")), ("PEFT's speed = 1", ratio_of(["ours-bf16-own"], ["bnb-bf16"])),
    ("bound = 1", field_of("ours-bf16-own", "of the bound")), ("asked", asked_of("ours-bf16-own")),
]  # fmt: skip
DROP_IN = ("PEFT", "patch", "patch, layers, loss", "ours")
TABLES = [
    Table("qlora", "A QLoRA training step", "step, ",
          "SmolLM2-135M in NF4 with double quantisation, LoRA r=16 on all seven projections, float32 adapters, dropout "
          "0, a loss over every token and torch's fused AdamW in every mode. \"As a drop-in\" runs transformers' model "
          "code and loss; \"own loss and layers\" is what `fastpeft train` uses on a CPU."),
    Table("qlora", "Decoding a token", "decode, a token",
          "The same model in evaluation mode, one sequence, by `generate()`. \"Own layers\" is what `fastpeft "
          "generate` uses on a CPU; it replaces some of transformers' model code, reversibly."),
    Table("dropin", "One Trainer script", "Trainer, ",
          "SmolLM2 in bitsandbytes' NF4, LoRA r=16 on all linear layers, 4 x 128 tokens, bfloat16 with float32 "
          "adapters, by transformers' Trainer: with PEFT, with `fastpeft.patch(model)`, with `patch(model, "
          "layers=True, loss=True)`, and with `fastpeft.get_peft_model` and `accelerate(model, loss=True)`. MiB are "
          "the peak of training above the process after its imports.",
          [*((name, time_of(name)) for name in DROP_IN),
           *((f"{name}, PEFT's speed = 1", ratio_of([name], ["PEFT"])) for name in DROP_IN[1:]),
           *((f"MiB, {name}", field_of(name, "above_mib")) for name in DROP_IN)], "Trainer, "),
    *(Table("dropin", title, rows, text, [("PEFT", time_of("PEFT")), ("patched", time_of("patch")),
                                          ("PEFT's speed = 1", ratio_of(["patch"], ["PEFT"]))], rows)
      for title, rows, text in (
        ("A step of a small UNet", "UNet, ",
         "Forward and backward of a UNet of diffusers with PEFT's LoRA, r=8, on one kind of its layers, float32. Its "
         "own attention and convolutions take most of the time."),
        ("A small UNet's layers", "UNet's layers, ",
         "The same layers alone, one after another, each with the input that it has in the UNet."))),
    Table("layers", "One 4-bit layer, forward", "forward ",
          "NF4 with double quantisation, in evaluation, beside bitsandbytes' `Linear4bit`; in x out features, M rows "
          "of x. The last column is the fastest of either side over all dtypes.",
          [*dtypes("bfloat16", "ours bf16", "bnb eval bf16"), *dtypes("float32", "ours f32", "bnb eval f32"),
           ("any dtype", ratio_of(["ours bf16", "ours f32"], ["bnb eval bf16", "bnb eval f32", "bnb train bf16",
                                                                  "bnb train f32"]))], "forward ", LAYERS),
    Table("layers", "One QLoRA layer, forward and backward", "train ",
          "LoRA r=16 with dropout p, beside PEFT on bitsandbytes.",
          [*dtypes("bfloat16", "ours bf16", "PEFT+bnb bf16"), *dtypes("float32", "ours f32", "PEFT+bnb f32")],
          "train ", LAYERS),
    Table("layers", "Instruction sets", "levels ", "The same layer's forward, float32, at a forced level.",
          [("AVX2", time_of("avx2")), ("AVX-512", time_of("avx512")), ("ratio", ratio_of(["avx512"], ["avx2"]))],
          "levels ", LAYERS),
    Table("layers", "Weights in other formats", "formats ",
          "A layer whose weight has another format beside the same layer in NF4 with plain scales; forward+backward is "
          "with LoRA r=16. A ratio of 1 is NF4's speed.",
          [column for label, d in (("bfloat16", "bf16"), ("float32", "f32")) for column in (
              (f"NF4, {label}", time_of(f"NF4 {d}")), (f"this, {label}", time_of(f"ours {d}")),
              ("ratio", ratio_of([f"ours {d}"], [f"NF4 {d}"])))],
          "formats ", LAYERS),
    Table("dora", "DoRA, forward and backward", "train ",
          "r=16, the norm included, M tokens, dropout p. PEFT runs on bitsandbytes where the base is NF4.",
          [("our DoRA", time_of("DoRA")), ("our LoRA", time_of("LoRA")), ("PEFT's DoRA", time_of("PEFT DoRA")),
           ("our LoRA's speed = 1", ratio_of(["DoRA"], ["LoRA"])),
           ("PEFT's speed = 1", ratio_of(["DoRA"], ["PEFT DoRA"]))],
          "train "),
    Table("dora", "DoRA, inference", "inference ", "The norms are kept between calls.",
          [("our DoRA", time_of("DoRA")), ("our LoRA", time_of("LoRA")),
           ("our LoRA's speed = 1", ratio_of(["DoRA"], ["LoRA"]))], "inference "),
    Table("multi", "An adapter for each row of a batch", "mixed ",
          "One layer, 64 rows, LoRA r=16, the rows spread evenly over 1 to 64 adapters. \"As a model\" and PEFT are a "
          "one-layer `PeftModel` called with `adapter_names`; PEFT runs on bitsandbytes where the base is NF4. \"No "
          "adapter\" goes through more copies of W than the others do, so that none stays in a cache.",
          [("no adapter", time_of("base")), *((n, time_of(n)) for n in ("1", "8", "16", "64")),
           *((f"{label}, {n}", time_of(f"{key} {n}")) for n in (16, 64)
             for label, key in (("as a model", "model"), ("PEFT", "PEFT"))),
           ("ratio, 64", ratio_of(["model 64"], ["PEFT 64"]))], "mixed "),
    Table("multi", "Decoding with an adapter for each row", "decode, ",
          "SmolLM2 with 16 adapters on all seven projections, 16 rows; a token of each row is one step."),
    Table("multi-train", "Training four adapters on one base", "a step of ",
          "SmolLM2 in NF4, LoRA r=16; \"one after another\" is what four runs take for a step of each."),
    Table("pool", "AdapterPool: thousands of adapters on disk", "",
          "SmolLM2 in NF4, adapters of r=4 on q and v; requests choose theirs by Zipf's law, eight at a time."),
    Table("serve", "fastpeft serve under load", "", "64 clients on SmolLM2 and 64 adapters, 32 of them resident."),
    Table("ortho", "Orthogonal methods", "",
          "Forward and backward of one layer at PEFT's defaults; tokens are M. \"Frozen\" is the layer alone, through "
          "torch where its weight is dense, so ours can be below it.",
          [("frozen", time_of("frozen")), ("ours", time_of("ours")), ("PEFT", time_of("PEFT")),
           ("PEFT's speed = 1", ratio_of(["ours"], ["PEFT"]))]),
    Table("methods", "Every method", "",
          "Forward and backward of one float32 layer of 2048 x 2048 with 512 tokens at PEFT's defaults, in training. "
          "FLOPs are over those of the frozen layer; kept bytes are over those of x.",
          [("frozen", time_of("frozen")), ("ours", time_of("ours")), ("PEFT", time_of("PEFT")),
           ("PEFT's speed = 1", ratio_of(["ours"], ["PEFT"])),
           *((f"{label}, {who}", field_of(who, key)) for label, key in (("FLOPs", "FLOPs/frozen"), ("kept", "kept/x"))
             for who in ("ours", "PEFT"))], page=LAYERS),
    Table("families", "A training step", "step, ",
          "Forward, loss, backward and AdamW on 4 x 128 tokens, every one learned; encoders on 8 rows.", OF_FAMILIES,
          "step, ", FAMILIES, newest_of_each),
    Table("families", "A decoded token", "token, ",
          "One sequence after 16 tokens, by `generate()`, the prompt not counted; PEFT in evaluation mode.",
          OF_FAMILIES, "token, ", FAMILIES, newest_of_each),
    *(Table("qlora", title, row, text, page=TRAINING, runs=newest_of_each) for title, row, text in (
        ("The products of a step", "products, SmolLM2-135M, 4 x 128", ""),
        ("A larger model", "large, ",
         "A random Llama of 1.07 billion parameters: 16 layers of hidden size 2048, MLPs of 8192, 32 heads of 64 over "
         "8, a tied vocabulary of 49,152."),
        ("The products of its step", "products, Llama", ""),
        ("Long rows", "long, ", "One row. Memory is the peak of the process."),
        ("The products of long rows", "products, SmolLM2-135M, 1 x", ""),
        ("Gradient checkpointing", "checkpointing, ", ""))),
]  # fmt: skip


EXTRAS = {"bound_s": "bound s", "forward": "forward s", "backward": "backward s", "cpu_s": "CPU s",
          "tokens/s": "tokens/s", "peak_mib": "peak MiB"}  # fmt: skip
KNOWN = {"candidate", "row", "bench", "suite", "time", "commit", "machine", "bounds", "speedups", "median_s", "min_s",
         "p20_s", "p80_s", "samples", "what", "r", "tokens", "dropout", "gflops", "gbs", "loss", "command", "bnb",
         "K", "N", "M", "base", "adapters", "requests", "resident", "rounds", "limits", "model", "rows", "length",
         "mode", "peak_gflops"}  # fmt: skip


def shown(value: Any) -> str:
    return digits(value) if isinstance(value, float) else str(value)


def candidates(cases: Cases) -> str:
    """A row for each candidate, the fastest first, with what else its line says; products in their order."""
    lines = [line for case in cases.values() for line in case.values()]
    keys = [*EXTRAS, *dict.fromkeys(k for line in lines for k in sorted(line) if k not in KNOWN and k not in EXTRAS)]
    rows = []
    for title, case in cases.items():
        in_order = title.startswith("products, ")
        for name, line in case.items() if in_order else sorted(case.items(), key=lambda item: item[1]["median_s"]):
            cells = [spread(line), *(shown(line.get(k, "")) for k in keys), limits_of(line)]
            rows.append([title, MODES.get(name, name), *cells])
    labels = ["median", *(EXTRAS.get(k, k) for k in keys), "asked at most"]
    if len(cases) == 1:
        return grid([next(iter(cases)), *labels], [row[1:] for row in rows])
    return grid(["", "", *labels], rows)


def section(table: Table, name: str, lines: list[Line]) -> str:
    cases = cases_of(lines)
    first = lines[0]
    if table.columns:
        names = {title: title.removeprefix(table.strip) for title in cases}
        rows = [[names[title], *(cell(case) for _, cell in table.columns)] for title, case in cases.items()]
        rows = [row for row in rows if any(row[1:])]
        body = grid(["", *(label for label, _ in table.columns)], rows)
    else:
        body = candidates(cases)
    said = (f"{machine(first, name)}; {versions(first)}; commit {commit(*lines)}, {first['time'][:10]}; "
            f"`{command(first)}`, {samples(lines)}.")  # fmt: skip
    return "\n\n".join([f"## {table.title}", wrapped(table.text), wrapped(said), body])


def document(page: str, folder: Path = RESULTS) -> str:
    found, others = read(folder, {t.suite for t in TABLES})
    parts = [HEADS[page].rstrip()]
    for table in (t for t in TABLES if t.page == page):
        for name, lines in sorted(found.get(table.suite, {}).items()):
            run = table.runs(lines, table.row)
            if run:
                parts.append(section(table, name, run))
    if others and page == next(iter(HEADS)):
        said = [f"- `bench/results/{n}`" + ": two commits in turns" * n.startswith("ab-") for n in others]
        parts.append("## Results without a table\n\n" + "\n".join(said))
    return "\n\n".join(parts) + "\n"


@dataclass
class Summary:
    """A row of the README's table: a row of a suite, and the candidates of its columns, of which the fastest counts."""

    title: str
    suite: str
    row: str
    peft: tuple[str, ...]
    drop_in: tuple[str, ...]
    own: tuple[str, ...] = ()


SUMMARY = [
    Summary("QLoRA step of a Trainer script, SmolLM2-135M, 4 x 128 tokens, dropout 0.05", "dropin",
            "Trainer, dropout 0.05", ("PEFT",), ("patch",), ("patch, layers, loss",)),
    Summary("decoding a token, SmolLM2-135M", "qlora", "decode, a token",
            ("bnb-bf16", "bnb-f32"), ("ours-bf16", "ours-f32"), ("ours-bf16-fast", "ours-f32-fast")),
    Summary("DoRA layer, forward + backward, NF4 2048 x 2048, 512 tokens", "dora", "train NF4 2048x2048 M=512 p=0",
            ("PEFT DoRA",), ("DoRA",)),
    Summary("64 adapters in a batch of 64 rows, NF4 2048 x 2048", "multi", "mixed NF4 2048x2048 M=64",
            ("PEFT 64",), ("model 64",)),
]  # fmt: skip


def summary(folder: Path = RESULTS) -> str:
    """The README's table: the newest run of each row, whatever its machine."""
    found, _ = read(folder, {t.suite for t in TABLES})
    rows, used = [], []
    for item in SUMMARY:
        of_suite = found.get(item.suite, {}).items()
        runs = [(name, newest([x for x in lines if x["row"] == item.row], item.row)) for name, lines in of_suite]
        runs = [run for run in runs if run[1]]
        if not runs:
            raise SystemExit(f"bench/results has no row {item.row!r}: run --suite {item.suite}, or change SUMMARY")
        name, lines = max(runs, key=lambda run: run[1][0]["time"])
        case = cases_of(lines)[item.row]
        theirs = fastest(case, item.peft)
        cells = [] if theirs is None else [duration(theirs["median_s"])]
        for names in (item.drop_in, item.own):
            mine = fastest(case, names)
            if mine is None or theirs is None:
                cells.append("–")
            else:
                faster = times(mine, theirs)
                cells.append(f"**{duration(mine['median_s'])}**" + (f" ({faster}x)" if faster else ""))
        rows.append([item.title, *cells])
        used.append((name, lines[0]))
    head = ["", "PEFT + bitsandbytes", "fastpeft as a drop-in", "with its own loss and layers"]
    where = "; ".join(dict.fromkeys(machine(line, name) for name, line in used))
    which = "; ".join(dict.fromkeys(versions(line) for _, line in used))
    commits = ", ".join(dict.fromkeys(commit(line) for _, line in used))
    text = (f"Medians on {where}; {which}; commits {commits}. **Nothing has been run on a GPU yet.** Each cell is the "
            "faster of bfloat16 and float32 where both were run. The spread, more tables and where we are slower: "
            "[docs/benchmarks.md](docs/benchmarks.md).")  # fmt: skip
    return grid(head, rows) + "\n\n" + wrapped(text)


def readme(text: str) -> str:
    """The README's text with a new table between the two marks."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{README.name} needs the lines {BEGIN!r} and {END!r} once each, around the table")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{summary()}\n{END}{rest.partition(END)[2]}"


def documents() -> dict[Path, str]:
    made = {ROOT / "docs" / page: document(page) for page in HEADS}
    return made | {README: readme(README.read_text(encoding="utf-8"))}


if __name__ == "__main__":
    sys.exit(write_or_check(documents()))
