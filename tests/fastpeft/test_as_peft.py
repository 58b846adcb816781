"""`fastpeft.as_peft()` and `fastpeft run`, each in a process of its own: `import peft` is fastpeft there, and a program
is run as Python runs it. What Trainer, TRL and diffusers do with it is in test_ecosystem_as_peft.py."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fastpeft
import peft_uses
import pytest
import torch
from fastpeft.apps.cli import run as cli_run
from fastpeft.config.base import CLASSES
from fastpeft.methods.method import METHODS
from fastpeft.methods.registry import every_method
from fastpeft.model import tuner
from forms import matrix
from torch import nn

llama = runpy.run_path(str(Path(__file__).with_name("model_tools.py")))["llama"]
ROOT = Path(fastpeft.__file__).parents[1]
RUN = ["-m", "fastpeft", "run"]


def python(*args: Any, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, and fastpeft where this process has it from."""
    options["env"] = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **options.get("env", {})}
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == code, done.stdout + done.stderr
    return done


EVERY_PATH = """
import importlib, importlib.util, sys
from importlib import metadata
import fastpeft
fastpeft.as_peft()
fastpeft.as_peft()
import peft
import peft.utils.transformers_weight_conversion
from fastpeft.compat.peft_names import PATHS
assert peft is fastpeft and importlib.util.find_spec("peft") is fastpeft.__spec__
for path in sorted(PATHS):
    spec = importlib.util.find_spec(f"peft.{path}")
    assert spec is not None and spec.loader is not None, path
    theirs, ours = (importlib.import_module(f"{package}.{path}") for package in ("peft", "fastpeft"))
    assert theirs is ours is sys.modules[f"peft.{path}"], path
    assert ours.__spec__.name == ours.__name__ == f"fastpeft.{path}", path
    assert importlib.util.find_spec(f"peft.{path}") is ours.__spec__, path
assert importlib.util.find_spec("peft.nothing") is None and importlib.util.find_spec("peft.utils.nothing") is None
try:
    import peft.tuners.nothing
except ModuleNotFoundError as error:
    assert error.name == "peft.tuners.nothing"
assert "torch" not in sys.modules
found = metadata.distribution("peft")
assert found.metadata["Name"] == "peft" and found.version == metadata.version("PEFT") == peft.__version__ == "0.22.0"
assert metadata.packages_distributions()["peft"][0] == "peft" and found.requires is None
print("good")
"""


@pytest.mark.parametrize("options", [[], ["-S"]], ids=["beside PEFT", "nothing installed"])
def test_each_module_of_peft_is_the_one_with_our_name(options: list[str]) -> None:
    env = {"PYTHONPATH": str(ROOT)} if options else {}
    assert python(*options, "-c", EVERY_PATH, env=env).stdout == "good\n"


TOO_LATE = """
import sys
from importlib import metadata
from types import ModuleType
import fastpeft
before, finders, version = dict(sys.modules), list(sys.meta_path), fastpeft.__version__
for name in ("peft", "transformers", "diffusers", "trl"):
    other = sys.modules[name] = ModuleType(name)
    try:
        fastpeft.as_peft()
        raise SystemExit(f"{name} was passed over")
    except RuntimeError as error:
        text = str(error)
        assert f"too late: {name} was imported" in text and "first lines" in text and "fastpeft run" in text, text
    assert sys.modules.pop(name) is other
    assert sys.meta_path == finders and fastpeft.__version__ == version
sys.modules["accelerate"] = ModuleType("accelerate")  # which looks for peft when it needs it
fastpeft.as_peft()
assert sys.modules["peft"] is fastpeft
print("good")
"""


def test_too_late_is_an_error_and_changes_nothing() -> None:
    assert python("-c", TOO_LATE).stdout == "good\n"


@pytest.mark.parametrize("package", ["transformers", "accelerate", "trl", "diffusers", "sentence_transformers"])
def test_each_name_of_pefts_that_these_packages_use_is_here(package: str) -> None:
    used = peft_uses.uses(package)
    if not used:
        pytest.skip(f"{package} is not installed, or uses nothing of peft")
    lacking = {}
    for name, files in used.items():
        path, _, last = name.replace("peft", "fastpeft", 1).rpartition(".")
        try:
            if path:
                getattr(importlib.import_module(path), last)
        except (ImportError, AttributeError):
            try:
                importlib.import_module(f"{path}.{last}")
            except ImportError:
                lacking[name] = sorted(files)
    assert lacking == {}


def test_uses_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "def f():\n    import peft.a as b, peft\n    from peft.c import d as e\n    return b.x.y, peft.z, other.w"
    (tmp_path / "user_of_peft").mkdir()
    (tmp_path / "user_of_peft" / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert {*peft_uses.uses("user_of_peft")} == {"peft.a", "peft", "peft.c.d", "peft.a.x.y", "peft.a.x", "peft.z"}


# ---- fastpeft run ------------------------------------------------------------------------------------------------

FACTS = """
import os, sys, types
import helper
main = sys.modules["__main__"]
def where(path):
    return None if path is None else os.path.realpath(path)
print([sys.argv, where(sys.path[0]), __name__, where(__file__), where(__cached__), __package__, __doc__,
       getattr(__spec__, "name", None), type(__loader__).__name__, main.__dict__ is globals(), helper.__name__,
       isinstance(__builtins__, types.ModuleType), sorted(n for n in globals() if not n.startswith("__")), "main" in
       sys.modules["__main__"].__dict__])
class Kept: pass
import atexit, pickle
atexit.register(lambda: print(type(pickle.loads(pickle.dumps(Kept()))) is Kept))
"""


def program(folder: Path, text: str) -> dict[str, list[str]]:
    """A program in each of the forms that Python runs: the arguments that name it."""
    package = folder / "inner" / "package"
    package.mkdir(parents=True)
    for name in ("script.py", "__main__.py", "inner/module.py", "inner/package/__main__.py"):
        (folder / name).write_text(text)
        (folder / name).with_name("helper.py").write_text("")
    (package / "__init__.py").write_text("")
    (folder / "inner" / "helper.py").write_text("")
    with zipfile.ZipFile(folder / "app.zip", "w") as file:
        file.writestr("__main__.py", text)
        file.writestr("helper.py", "")
    (folder / "link").mkdir()
    (folder / "link" / "to.py").symlink_to(folder / "script.py")
    return {
        "script": ["script.py"], "in a folder": ["inner/module.py"], "link": [str(folder / "link" / "to.py")],
        "folder": ["."], "zip": ["app.zip"], "module": ["-m", "inner.module"], "package": ["-m", "inner.package"],
    }  # fmt: skip


@pytest.mark.parametrize(
    "form", matrix(["script", "in a folder", "link", "folder", "zip", "module", "package"], ["link", "module"])
)
def test_a_program_finds_what_it_finds_under_python(tmp_path: Path, form: str) -> None:
    arguments = [*program(tmp_path, FACTS)[form], "-m", "--patch", "--", "-h", "x y"]
    found = python(*RUN, *arguments, cwd=tmp_path).stdout
    assert found == python(*arguments, cwd=tmp_path).stdout
    assert found.endswith("]\nTrue\n")


ENDS = {
    "exit with a number": "raise SystemExit(7)",
    "exit with a text": "import sys; sys.exit('gone')",
    "error": "def f():\n    1 / 0\ntry:\n    f()\nexcept ZeroDivisionError as e:\n    raise KeyError('x') from e",
    "no syntax": "x = (1,\ny = 2",
    "interrupt": "raise KeyboardInterrupt",
    "own hook": "import sys\nsys.excepthook = lambda *error: print('mine', error[0])\nraise ValueError",
    "no such module": "import nothing_of_the_kind",
}


@pytest.mark.parametrize(("end", "form"), matrix(
    [(end, form) for end in ENDS for form in ("script", "module")],
    [("exit with a text", "script"), ("error", "script"), ("no syntax", "script"), ("interrupt", "script")],
))  # fmt: skip
def test_it_ends_as_under_python(tmp_path: Path, end: str, form: str) -> None:
    name = program(tmp_path, ENDS[end])[form]
    ours, theirs = (
        subprocess.run(
            [sys.executable, *how, *name], capture_output=True, text=True, cwd=tmp_path, check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        for how in (RUN, [])
    )  # fmt: skip
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout)
    frozen = [line for line in theirs.stderr.splitlines() if "frozen runpy" not in line]
    if form == "script" or end != "no syntax":
        assert ours.stderr.splitlines() == frozen
    assert "fastpeft" not in ours.stderr


def test_what_cannot_be_run_says_so(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "__init__.py").write_text("")
    for args, code, text in (
        (["nothing.py"], 2, f"can't open file '{tmp_path}/nothing.py'"),
        (["-m", "nothing.at.all"], 1, "No module named nothing.at.all"),
        (["-m", "bare"], 1, "is a package and cannot be directly executed"), (["bare"], 1, "can't find '__main__'"),
        (["--pacth", "x.py"], 2, "no such option: --pacth"), (["-m"], 2, "a SCRIPT or -m MODULE is missing"),
    ):  # fmt: skip
        done = python(*RUN, *args, code=code, cwd=tmp_path)
        assert text in done.stderr
        assert "Traceback" not in done.stderr


SPAWNS = """
import multiprocessing, sys
import peft, fastpeft
def work(depth, results):
    import transformers_or_not
    results.put((peft is fastpeft, peft.__version__, sys.argv))
    if depth:
        child = multiprocessing.get_context("spawn").Process(target=work, args=(depth - 1, results))
        child.start(); child.join()
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    child = context.Process(target=work, args=(1, results))
    child.start(); child.join()
    print([results.get() for _ in range(2)])
"""


@pytest.mark.parametrize("form", matrix(["script", "module"], ["script"]))
def test_processes_that_it_spawns_see_it_too(tmp_path: Path, form: str) -> None:
    name = program(tmp_path, SPAWNS)[form]
    (tmp_path / "transformers_or_not.py").write_text("")
    found = python(*RUN, *name, "a", cwd=tmp_path).stdout
    argv = str(tmp_path / "inner" / "module.py") if form == "module" else "script.py"
    assert found == f"{[(True, '0.22.0', [argv, 'a'])] * 2}\n"


def test_patch_is_called_before_the_program_and_peft_stays_pefts(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import sys; print(sys.argv, 'peft' in sys.modules)")
    code = "import fastpeft, sys\nfastpeft.patch = lambda: print('patched')\n" \
           "from fastpeft.apps.cli.run import main\nmain(sys.argv[1:])"  # fmt: skip
    found = python("-c", code, "--patch", "script.py", "--patch", cwd=tmp_path).stdout
    assert found == "patched\n['script.py', '--patch'] False\n"


def test_the_command_line_lists_it(monkeypatch: pytest.MonkeyPatch) -> None:
    typer_testing = pytest.importorskip("typer.testing")
    from fastpeft.apps.cli.app import app

    called: list[Any] = []
    monkeypatch.setattr(cli_run, "execute", lambda *args: called.append(args))
    runner = typer_testing.CliRunner()
    assert "`import peft` is fastpeft" in " ".join(runner.invoke(app, ["run", "--help"]).stdout.split())
    assert runner.invoke(app, ["run", "--patch", "-m", "module", "-m", "--patch", "-h"]).exit_code == 0
    assert called == [(["module", "-m", "--patch", "-h"], True, True)]


# ---- methods of other packages -----------------------------------------------------------------------------------


@pytest.fixture
def registered() -> Any:
    """`register_peft_method`, in a package without Poly; what it registers is taken out again."""
    every_method()
    methods, classes, names = dict(METHODS), dict(CLASSES), dict(vars(tuner))
    for table, key in ((METHODS, fastpeft.PeftType.POLY), (CLASSES, "POLY"), (vars(tuner), "PolyModel")):
        table.pop(key, None)
    yield fastpeft.utils.register_peft_method
    for table, before in ((METHODS, methods), (CLASSES, classes), (vars(tuner), names)):
        for key in [*table]:
            if key not in before:
                del table[key]
        table.update(before)


def test_a_method_of_another_package_is_trained_saved_and_loaded(registered: Any, tmp_path: Path) -> None:
    from dataclasses import dataclass

    @dataclass
    class PolyConfig(fastpeft.LoraConfig):
        strength: float = 2.0

        def __post_init__(self) -> None:
            super().__post_init__()
            self.peft_type = fastpeft.PeftType.POLY

    class PolyModel(fastpeft.LoraModel):
        def strengths(self) -> list[float]:
            return [config.strength for config in self.peft_config.values()]

    registered(name="poly", config_cls=PolyConfig, model_cls=PolyModel, prefix="lora_", is_mixed_compatible=True)
    assert fastpeft.PEFT_TYPE_TO_CONFIG_MAPPING["POLY"] is PolyConfig
    assert fastpeft.PEFT_TYPE_TO_TUNER_MAPPING["POLY"] is PolyModel
    assert fastpeft.PEFT_TYPE_TO_PREFIX_MAPPING["POLY"] == "lora_"
    model = fastpeft.get_peft_model(llama(), PolyConfig(target_modules=["q_proj"], strength=3.0, r=2))
    assert type(model.base_model) is PolyModel
    assert model.strengths() == [3.0]
    ids = torch.arange(4).view(1, 4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 if p.requires_grad else 0.0)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "POLY"
    again = fastpeft.PeftModel.from_pretrained(llama(), tmp_path)
    assert again.peft_config["default"].strength == 3.0
    assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    plain = fastpeft.get_peft_model(llama(), fastpeft.LoraConfig(target_modules=["q_proj"], r=2))
    assert plain.peft_config["default"].peft_type == fastpeft.PeftType.LORA
    with pytest.raises(KeyError, match="already a method 'poly'"):
        registered(name="poly", config_cls=PolyConfig, model_cls=PolyModel, prefix="lora_")


def test_methods_that_cannot_be_run_here_are_refused(registered: Any) -> None:
    from fastpeft.tuners.tuners_utils import BaseTuner

    class Config(fastpeft.LoraConfig):
        pass

    class Own(BaseTuner):
        prefix = "poly_"

        def _create_and_replace(self) -> None: ...

    class Rebuilt(fastpeft.LoraModel):
        def _create_new_module(self) -> None: ...

    class LoraModel(fastpeft.LoraModel):
        pass

    class Bare(fastpeft.LoraModel):
        pass

    good = {"name": "poly", "config_cls": Config, "model_cls": Bare, "prefix": "lora_"}
    before = dict(METHODS), dict(CLASSES), {*vars(tuner)}
    for changes, error, text in (
        ({"model_cls": Own, "prefix": None}, NotImplementedError, "Own writes _create_and_replace anew.*run --patch"),
        ({"model_cls": Rebuilt}, NotImplementedError, "Rebuilt writes _create_new_module anew"),
        ({"model_cls": nn.Module}, NotImplementedError, "derives from none of fastpeft's tuner classes"),
        ({"model_cls": None}, NotImplementedError, "derives from none"),
        ({"config_cls": fastpeft.PeftConfig}, TypeError, "subclass of LoraConfig"),
        ({"model_cls": LoraModel}, ValueError, "already a tuner class LoraModel"),
        ({"prefix": "poly_"}, ValueError, "Bare.prefix is 'lora_'"),
        ({"name": "Poly"}, ValueError, "lower case"),
        ({"name": "poly_"}, ValueError, "lower case"),
        ({"name": "mine"}, ValueError, "Unknown PEFT type: 'MINE'"),
        ({"name": "lora"}, KeyError, "already a method 'lora'"),
        ({"name": "prompt_tuning"}, KeyError, "already a method 'prompt_tuning'"),
    ):
        with pytest.raises(error, match=text):
            registered(**{**good, **changes})
        assert (dict(METHODS), dict(CLASSES), {*vars(tuner)}) == before


# ---- with transformers -------------------------------------------------------------------------------------------


def without_peft(folder: Path) -> dict[str, str]:
    """The environment of a Python that has every package of this one but PEFT."""
    folder.mkdir()
    taken = {"peft"}  # an environment may have others behind it, with other versions (tools/test_matrix.py)
    for place in [Path(p) for p in dict.fromkeys(sys.path) if Path(p).name in ("site-packages", "dist-packages")]:
        found = [entry for entry in place.iterdir() if entry.name.partition("-")[0] not in taken]
        for entry in found:
            (folder / entry.name).symlink_to(entry)
        taken |= {entry.name.partition("-")[0] for entry in found}
    own = [str(Path(find_spec(name).submodule_search_locations[0]).parent) for name in ("fastpeft", "peft_kernels")]
    return {"PYTHONPATH": os.pathsep.join([*own, str(folder)])}


@pytest.mark.full_form
def test_transformers_without_peft(tmp_path: Path) -> None:
    """add_adapter, load_adapter and the like, in an environment where PEFT is not installed."""
    environment = without_peft(tmp_path / "packages")
    looks = "from importlib.util import find_spec; print(find_spec('peft'), find_spec('transformers') is not None)"
    assert python("-S", "-c", looks, env=environment).stdout == "None True\n"
    script = Path(peft_uses.__file__).with_name("peft_program.py")
    done = python("-S", *RUN, script, tmp_path, "adapters_of_transformers", env=environment)
    told = json.loads(done.stdout.splitlines()[-1])
    assert "error" not in told, told
    base, one, disabled, enabled, loaded, again = told["found"]
    assert base == disabled
    assert base != one == enabled == loaded == again
