"""`fastpeft train` where everything goes wrong, against the run that nothing interrupted; the same bits at the end.

A trial trains a tiny random model, resumed again and again: killed (SIGKILL, SIGTERM, SIGINT, twice) at random points,
with the disk filled (a small tmpfs, where one may be mounted) or files limited (RLIMIT_FSIZE), with files of its
checkpoints flipped, cut, removed or swapped in between, with a second run beside it. In the end metrics.jsonl, the
adapters and the last checkpoint are those of the uninterrupted run, every process has ended in time with the right exit
code, no error was called a defect, and nothing temporary is left. Half of the trials train two adapters in one run;
where one of them lost more steps than the other, it does those alone, and is compared up to rounding. `--seed` draws
the faults; their moments also depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..machine import ROOT
from ..measure import Stats
from ..results import Row
from .train_chaos_files import DISK, content, count_lines, listing, metrics, same, small_disk
from .train_chaos_process import Run, make_context

STEPS, OTHER_STEPS = 10, 6
ADAPTER = [f"adapter/{name}" for name in ("adapter_model.safetensors", "adapter_config.json", "fastpeft_training.json")]
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
FAULTS = (*SIGNALS, "twice", "disk", "limit", "second", "flip", "cut", "remove", "swap", "torn")
# The exit codes that are right, beside 0 of a run that was quicker than its fault.
RIGHT = {
    "SIGKILL": {-signal.SIGKILL}, "SIGTERM": {143, -signal.SIGTERM}, "SIGINT": {130}, "twice": {130, 143},
    "disk": {1}, "limit": {1},
}  # fmt: skip


@dataclass
class World:
    """Things that all trials share. whole: the output of a run that nothing interrupted; seconds: what it took; kept:
    where the outputs of trials go that went wrong."""

    folder: Path
    context: Any
    disk: Path | None
    kept: Path
    whole: dict[str, Path] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def words(self, name: str, output: Path) -> list[str]:
        return [str(self.folder / f"{name}.yaml"), f"output={output}"]


@dataclass
class Trial:
    """One output from its first run to its last. log: what happened; problems: what should not have."""

    world: World
    name: str
    output: Path
    draw: random.Random
    log: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    exact: bool = True

    def start(self, *options: str, limit: int | None = None) -> Run:
        return Run(self.world.context, [*self.world.words(self.name, self.output), *options], limit)

    def ended(self, run: Run, fault: str, right: set[int]) -> int | None:
        """Wait for a run; its exit code, which has to be one of the right ones."""
        code = run.end(60 + 30 * self.world.seconds[self.name])
        self.log.append(f"{fault}: exit code {code}")
        if code not in right:
            said = "did not end" if code is None else f"ended with {code}, expected one of {sorted(right)}"
            self.problems.append(f"{fault}: {said}: {run.text[-1500:]}")
        elif "defect" in run.text or "Traceback" in run.text:
            self.problems.append(f"{fault}: no error that a user can act on: {run.text[-1500:]}")
        return code

    # --- faults -------------------------------------------------------------------------------------------------------

    def meet(self, fault: str) -> None:
        """Let one fault happen to the output, and look at what is right just after it."""
        if fault in ("flip", "cut", "remove", "swap", "torn"):
            self.spoil(fault)
            return
        before = self.newest()
        options = self.resume_options()
        if fault == "second":
            self.two_at_once(options)
        elif fault == "limit":
            run = self.start(*options, limit=self.draw.choice((64, 700, 1500, 4000, 9000, 20000)))
            self.no_room(run, fault)
        elif fault == "disk":
            self.fill_disk(options)
        else:
            run = self.start(*options)
            self.wait(run)
            sent = self.draw.choice(("SIGTERM", "SIGINT")) if fault == "twice" else fault
            run.kill(SIGNALS[sent])
            if fault == "twice":
                time.sleep(self.draw.uniform(0, 0.02))
                run.kill(signal.SIGINT)
            self.ended(run, fault, RIGHT[fault] | {0} | ({-signal.SIGTERM} if fault == "twice" else set()))
        after = self.newest()
        lost = [name for name, step in before.items() if after.get(name, -1) < step]
        if lost and "--restart" not in options:
            self.problems.append(f"{fault}: the checkpoints {before} became {after}")

    def resume_options(self) -> list[str]:
        """Options that go on. Where no checkpoint is intact, `--resume` alone is refused and changes nothing, but for
        what a killed run left half-written and its lock, which go with the next run, whatever becomes of it."""
        from fastpeft import remove_leftovers
        from fastpeft.apps.training.output import LOCK_NAME, OWNER_NAME, WRITTEN

        whole = self.newest()
        self.exact &= len({min(whole.get(str(root), 0), OTHER_STEPS) for root in self.roots()}) == 1
        if not [root for root in self.roots() if any(root.glob("checkpoint-*")) and str(root) not in whole]:
            return ["--resume"]
        for root in self.roots():
            remove_leftovers(root, WRITTEN)
            for name in (LOCK_NAME, OWNER_NAME):
                (root / name).unlink(missing_ok=True)
        before = content(self.output)
        run = self.start("--resume")
        self.ended(run, "broken", {1})
        if "is intact" not in run.text:
            self.problems.append(f"broken: not said: {run.text[-500:]}")
        if content(self.output) != before:
            self.problems.append("broken: a refused --resume changed the output")
        return ["--resume", "--restart"]

    def wait(self, run: Run) -> None:
        """Wait for a random moment of a run: of its time, a line of its metrics, or something half-written."""
        points = ("time", "line", ".checkpoint-", "time", "line", ".checkpoint-", ".adapter.", "loss.png.")
        point = self.draw.choice(points)
        seconds, nth = self.draw.uniform(0, 0.9 * self.world.seconds[self.name]), self.draw.randrange(1, 4)
        lines = count_lines(self.output / "metrics.jsonl") + nth
        seen: set[str] = set()
        while run.running():
            now = time.monotonic() - run.begin
            if point == "time" and now > seconds:
                break
            count = count_lines(self.output / "metrics.jsonl")
            lines = lines if count else nth  # a new run has begun its own
            if point == "line" and count >= lines:
                break
            if point not in ("time", "line"):
                seen |= {name for root in self.roots() for name in listing(root) if name.startswith(point)}
                if len(seen) >= nth:
                    time.sleep(self.draw.uniform(0, 0.003))
                    break
            time.sleep(0.0005)
        self.log.append(f"at {point}")

    def two_at_once(self, options: list[str]) -> None:
        first = self.start(*options)
        time.sleep(self.draw.uniform(0, self.world.seconds[self.name]))
        second = self.start(*options)
        codes = [self.ended(run, "second", {0, 1}) for run in (first, second)]
        refused = [run for run, code in zip((first, second), codes, strict=True) if code == 1]
        if len(refused) == 2:
            self.problems.append(f"second: both were refused: {first.text[-500:]} {second.text[-500:]}")
        for run in refused:
            if "is in use by another training run" not in run.text or "process" not in run.text:
                self.problems.append(f"second: refused for another reason: {run.text[-500:]}")

    def fill_disk(self, options: list[str]) -> None:
        """Fill the disk in the middle of a run, but for a few kilobytes, and make room again after it."""
        filler = self.output.parent / "filler"
        left, before = self.draw.choice((0, 0, 4096, 16384, 65536)), self.draw.random() < 0.3
        run = None if before else self.start(*options)
        if run is not None:
            self.wait(run)
        need = shutil.disk_usage(filler.parent).free - left
        with filler.open("wb", buffering=0) as file, suppress(OSError):  # the run wrote meanwhile: it is full
            while need > 0:
                need -= file.write(bytes(need))
        self.no_room(run or self.start(*options), "disk")
        filler.unlink()

    def no_room(self, run: Run, fault: str) -> None:
        code = self.ended(run, fault, RIGHT[fault] | {0})
        if code == 1 and not ("error: output: " in run.text and "cannot" in run.text and any(
            why in run.text for why in ("No space left on device", "File too large"))):  # fmt: skip
            self.problems.append(f"{fault}: not named: {run.text[-1500:]}")

    def spoil(self, how: str) -> None:
        """Break files of the newest checkpoint, or of all of them."""
        root = self.draw.choice(self.roots())
        folders = sorted(root.glob("checkpoint-*"), key=lambda p: int(p.name.partition("-")[2]))
        if how == "torn":
            if (self.output / "metrics.jsonl").is_file():
                with (self.output / "metrics.jsonl").open("a") as file:
                    file.write('{"step": 1, "loss": 0.')
            return
        chosen = folders if self.draw.random() < 0.25 else folders[-1:]
        for folder in chosen:
            files = sorted(p for p in folder.iterdir() if p.is_file())
            file = self.draw.choice(files)
            data = file.read_bytes()
            self.log.append(f"{how} {folder.name}/{file.name}")
            if how == "flip" and data:
                at = self.draw.randrange(len(data))
                file.write_bytes(data[:at] + bytes([data[at] ^ (1 << self.draw.randrange(8))]) + data[at + 1 :])
            elif how == "cut":
                file.write_bytes(data[: self.draw.randrange(len(data) + 1)])
            elif how == "remove":
                file.unlink() if self.draw.random() < 0.7 else shutil.rmtree(folder)
            elif how == "swap" and len(folders) > 1:
                whole_folders = self.draw.random() < 0.3
                one, other = (folders[-1], folders[-2]) if whole_folders else (file, folders[-2] / file.name)
                if other.exists() and one != other:
                    between = root / "between"
                    one.rename(between)
                    other.rename(one)
                    between.rename(other)

    # --- what is right ------------------------------------------------------------------------------------------------

    def roots(self) -> list[Path]:
        return [self.output / name for name in ("a", "b")] if self.name == "several" else [self.output]

    def newest(self) -> dict[str, int]:
        """The step in each adapter's newest intact checkpoint."""
        from fastpeft import newest_valid

        found = {}
        for root in self.roots():
            folder = newest_valid(root)
            if folder is not None:
                found[str(root)] = int(json.loads((folder / "training_state.json").read_text())["step"])
        return found

    def finish(self) -> None:
        """Go on to the end, and compare with the run that nothing interrupted."""
        if self.ended(self.start(*self.resume_options()), "the end", {0}) != 0:
            return
        whole = self.world.whole[self.name]
        if not same(metrics(self.output), metrics(whole), 0 if self.exact else 0.02):
            pairs = zip_longest(metrics(self.output), metrics(whole))
            found, expected = next((a, b) for a, b in pairs if a != b)
            self.problems.append(f"metrics.jsonl differs: {found} is not {expected}")
        for root in self.roots():
            theirs = whole / root.relative_to(self.output)
            last = OTHER_STEPS if root.name == "b" else STEPS
            for file in [*ADAPTER, f"checkpoint-{last}/training_state.safetensors"]:
                found = (root / file).read_bytes() if (root / file).is_file() else b""
                if not found or (found != (theirs / file).read_bytes() and (self.exact or file.endswith("json"))):
                    self.problems.append(f"{root.name}/{file} is missing or differs")
        known = {"adapter", "metrics.jsonl", "loss.png", "a", "b"}
        left = {n for root in {self.output, *self.roots()} for n in listing(root) if not n.startswith("checkpoint-")}
        if left - known:
            self.problems.append(f"left behind: {sorted(left - known)}")


def make_world(folder: Path, disk: Path | None, kept: Path, names: tuple[str, ...], context: Any) -> World:
    """Model, data, settings, and a run that nothing interrupts of each name."""
    from fastpeft.apps.training.testing import make_tiny_model, write_jsonl

    make_tiny_model(folder / "model", layers=1)
    data = str(write_jsonl(folder / "data.jsonl", 16))
    shared = {
        "model": str(folder / "model"), "max_length": 48, "dtype": "float32", "learning_rate": 1e-2, "eval_every": 4,
        "eval_fraction": 0.25, "lora": {"r": 2, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"]},
    }  # fmt: skip
    own = {"data": data, "max_steps": STEPS, "save_every": 3}
    other = {"data": data, "max_steps": OTHER_STEPS, "save_every": 3, "method": "dora", "optimizer": "sgd",
             "keep_checkpoints": 1}  # fmt: skip
    without = {**shared, "lora": {"r": 2, "target_modules": ["q_proj", "down_proj"]}}
    settings = {"one": {**shared, **own}, "several": {**without, "adapters": {"a": own, "b": other}}}
    world = World(folder, context, disk, kept)
    for name in names:
        (folder / f"{name}.yaml").write_text(json.dumps(settings[name]))  # JSON is YAML
        world.whole[name], world.seconds[name] = folder / f"whole-{name}", 60.0
        run = Run(context, world.words(name, world.whole[name]))
        if run.end(300) != 0:
            raise RuntimeError(f"the uninterrupted run failed: {run.text}")
        world.seconds[name] = run.seconds
    return world


def run_trial(world: World, name: str, seed: str, faults: tuple[str, ...] | None = None) -> Trial:
    """A trial of drawn faults, or of these, in a folder that is removed unless something was wrong."""
    draw = random.Random(seed)
    if faults is None:
        faults = tuple(draw.choices(FAULTS, k=draw.randrange(1, 6)))
    if world.disk is None:
        faults = tuple("limit" if fault == "disk" else fault for fault in faults)
    parent = world.disk if world.disk is not None and "disk" in faults else world.folder
    trial = Trial(world, name, parent / f"trial-{seed}", draw, [f"trial {seed} of {name}: {', '.join(faults)}"])
    for fault in faults:
        trial.meet(fault)
        if trial.problems:
            break
    else:
        trial.finish()
    if trial.problems:
        kept = world.kept / trial.output.name
        shutil.copytree(trial.output, kept, dirs_exist_ok=True)
        trial.log.append(f"kept in {kept}")
    shutil.rmtree(trial.output, ignore_errors=True)
    return trial


def rows(args: argparse.Namespace) -> Iterator[Row]:
    from rich.progress import track

    names = ("one", "several")
    kept = Path(tempfile.gettempdir()) / f"train-chaos-{os.getpid()}"
    minutes = args.minutes or (0.5 if args.quick else 5.0)
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="fastpeft-chaos-") as name, small_disk(Path(name)) as disk:
        folder = Path(name)
        world = make_world(folder, disk, kept, names, make_context())
        plain = subprocess.run(
            [sys.executable, "-m", "fastpeft", "train", *world.words("one", folder / "plain")], cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        as_plain = plain.returncode == 0 and metrics(folder / "plain") == metrics(world.whole["one"])
        trials: list[Trial] = []
        seconds: list[float] = []
        for i in track(range(10**6), description=f"trials for {minutes:g} minutes", total=None):
            begin = time.monotonic()
            trials.append(run_trial(world, names[i % 2], f"{args.seed}-{i}"))
            seconds.append(time.monotonic() - begin)
            for problem in trials[-1].problems:
                print("\n".join([*trials[-1].log, problem]), file=sys.stderr)
            if time.monotonic() > end:
                break
    yield verdict(args, world, trials, seconds, as_plain)


def verdict(args: argparse.Namespace, world: World, trials: list[Trial], seconds: list[float], as_plain: bool) -> Row:
    row = Row(f"{len(trials)} trials, seed {args.seed}",
              {"suite": "train-chaos", "trials": len(trials), "seed": args.seed})  # fmt: skip
    row.stats = {"trial": Stats(seconds), "uninterrupted run": Stats(list(world.seconds.values()))}
    faults = Counter(fault for trial in trials for fault in trial.log[0].partition(": ")[2].split(", "))
    ends = Counter(line for trial in trials for line in trial.log if "exit code" in line)
    disks = f"a tmpfs of {DISK >> 10} KiB" if world.disk is not None else "RLIMIT_FSIZE alone: no tmpfs may be mounted"
    row.notes = [
        "faults: " + ", ".join(f"{n} x {fault}" for fault, n in sorted(faults.items())),
        "runs: " + ", ".join(f"{n} x {end}" for end, n in sorted(ends.items())),
        f"disks were filled by {disks}; the seed draws faults, the machine their exact moments",
    ]
    bad = [trial for trial in trials if trial.problems]
    rounded = [trial for trial in trials if not trial.exact]
    for what, met in (
        (f"{len(trials)} trials end as the run that nothing interrupted, {len(trials) - len(rounded)} of them bit for "
         f"bit, {len(rounded)} up to rounding (adapters that lost different steps); {len(bad)} did not", not bad),
        ("a run of `python -m fastpeft train` gives the lines that the trials are compared with", as_plain),
    ):
        row.notes.append(f"{what}: {'met' if met else 'MISSED'}")
        row.missed |= not met
    row.notes += [f"{trial.log}: {problem}" for trial in bad[:5] for problem in trial.problems]
    return row
