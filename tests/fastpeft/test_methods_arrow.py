"""Arrow beside live PEFT: outputs, gradients, files, adapters that come later, and what is refused."""

from __future__ import annotations

import itertools
import runpy
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
from fastpeft import ArrowConfig, LoraConfig, create_arrow_model
from fastpeft.methods.math import cache
from torch import Tensor, nn

tools = runpy.run_path(str(Path(__file__).with_name("variants_tools.py")))
IDS, Net, close = (tools[name] for name in ("IDS", "Net", "close"))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::fastpeft.config.types.PeftWarning")


def saved(folder: Path, **more: Any) -> str:
    base = Net()  # which seeds
    torch.manual_seed(sum(map(ord, folder.name)))
    options = {"r": 3, "target_modules": ["up", "gpt"], "init_lora_weights": False, "lora_alpha": 5, **more}
    fastpeft.get_peft_model(base, LoraConfig(**options)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("experts")
    return [saved(folder / name, lora_alpha=alpha) for name, alpha in (("a", 5), ("b", 3), ("c", 4), ("general", 6))]


def model_of(package: Any, paths: list[str], general: bool = True, **options: Any) -> Any:
    config = package.ArrowConfig(**{"top_k": 2, "rng_seed": 7, "use_gks": general, **options})
    made: Any = package.create_arrow_model(Net(), paths[:-1], config, paths[-1:] if general else None)
    return made


def run(model: nn.Module, trained: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The output, and gradients of the embeddings and of the experts' tensors that train."""
    model.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("emb" in name or any(f".{n}." in name for n in trained))
        parameter.grad = None
    y = model(IDS)
    (y * torch.arange(y.numel()).view_as(y).sin()).sum().backward()
    return {"y": y.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("general", [False, True], ids=["plain", "gks"])
def test_arrow_computes_as_pefts_does(paths: list[str], general: bool) -> None:
    ours, theirs = (model_of(package, paths, general, router_temperature=0.7) for package in (fastpeft, peft))
    for trained in ((), ("task_0", "task_2")):
        found, expected = run(ours, trained), run(theirs, trained)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            close(value, expected[name], times=8)
    # the fused layers are those that are composed
    with torch.no_grad():
        first = ours(IDS)
        for _, layer in ours.base_model.adapter_layers():
            layer.cast_input_dtype_enabled = False
            layer.changed()
        close(ours(IDS), first, times=8)


def test_the_process_generator_draws_what_it_draws_in_peft(paths: list[str]) -> None:
    found = []
    for package in (fastpeft, peft):
        model = model_of(package, paths, False, rng_seed=None).eval()
        torch.manual_seed(3)
        found.append(model(IDS).detach())
        assert torch.equal(model.train().eval()(IDS), found[-1])
    close(*found)


def test_files_go_both_ways(paths: list[str], tmp_path: Path) -> None:
    """A file has the whole adapter: PEFT writes what is left of it without the general ones, and subtracts them again
    from that. PEFT does not read the router's file, which here is read, whoever wrote it."""
    ours, theirs = (model_of(package, paths).eval() for package in (fastpeft, peft))
    expected = ours(IDS).detach()
    ours.save_pretrained(tmp_path)
    tasks = ["task_0", "task_1", "task_2", "gks_0"]
    close(model_of(peft, [str(tmp_path / name) for name in tasks]).eval()(IDS), expected)
    theirs.save_pretrained(tmp_path / "first")
    for folder in (tmp_path, tmp_path / "first"):
        model = fastpeft.PeftModel.from_pretrained(Net(), folder / "task_0", adapter_name="task_0")
        for name in (*tasks[1:], "arrow_router"):
            model.load_adapter(folder / name, name)
        model.set_adapter("arrow_router")
        close(model.eval()(IDS), expected)
    theirs(IDS)
    theirs.save_pretrained(tmp_path / "theirs")
    again = model_of(peft, [str(tmp_path / "theirs" / name) for name in tasks]).eval()
    with pytest.raises(AssertionError):
        close(again(IDS), expected)
    state = fastpeft.load_peft_weights(tmp_path / "theirs" / "task_0")
    own = fastpeft.load_peft_weights(tmp_path / "task_0")
    assert state.keys() == own.keys()
    assert not any(torch.equal(value, own[key]) for key, value in state.items())
    routers = [fastpeft.PeftConfig.from_pretrained(f / "arrow_router") for f in (tmp_path, tmp_path / "first")]
    assert routers[0].arrow_config == routers[1].arrow_config


def test_adapters_that_come_later_take_part(paths: list[str]) -> None:
    whole, fewer = model_of(fastpeft, paths).eval(), model_of(fastpeft, [paths[0], paths[1], paths[3]]).eval()
    expected = whole(IDS)
    assert not torch.equal(fewer(IDS), expected)
    fewer.load_adapter(paths[2], "another")
    fewer.set_adapter("another")
    fewer(IDS)
    fewer.set_adapter("arrow_router")
    close(fewer.eval()(IDS), expected)
    fewer.delete_adapter("another")
    changed = fewer.base_model.model.up.lora_A["task_0"].weight
    before = fewer(IDS)
    with torch.no_grad():
        changed.mul_(-2)  # PEFT's prototypes are those of the weights that were there first
    after = fewer(IDS)
    assert not torch.equal(after, before)
    changed.data.mul_(-2)  # which leaves no version
    assert not torch.equal(fewer(IDS), after)


def test_nothing_is_kept_of_what_trains_where_elements_cannot_be_compared(
    paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a fused optimizer's step leaves no version."""

    class Blind:
        known = False

        def __init__(self, tensors: list[Tensor]) -> None:
            pass

    def write() -> None:
        for name, parameter in model.named_parameters():
            if ".task_0." in name:
                parameter.data.mul_(-2)

    monkeypatch.setattr(cache, "Fingerprint", Blind)
    model = model_of(fastpeft, paths).eval()
    with torch.no_grad():
        frozen = model(IDS)
        assert torch.equal(model(IDS), frozen)
        model.set_requires_grad("task_0")
        trained = [model(IDS)]
        for _ in range(2):
            write()
            trained.append(model(IDS))
        model.set_requires_grad("task_0", False)
        assert torch.equal(model(IDS), trained[-1])
        write()  # while it trained again, say; the mode is another in between
        model.train().eval()
        trained.append(model(IDS))
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(trained))


def test_arrow_refuses_what_does_not_fit(paths: list[str], tmp_path: Path) -> None:
    def bad(match: str, *more: str, error: type[Exception] = ValueError, **options: Any) -> None:
        base = Net()
        with pytest.raises(error, match=match):
            create_arrow_model(base, [*paths[:1], *more], ArrowConfig(**{"top_k": 1, **options}))
        assert type(base.up) is nn.Linear
        assert not getattr(base, "peft_config", None)

    bad("rank mismatch: 2 != 3", saved(tmp_path / "rank", r=2))
    bad("target_modules mismatch: it lacks gpt", saved(tmp_path / "targets", target_modules=["up"]))
    bad("must only target Linear", saved(tmp_path / "emb", target_modules=["emb"]), error=TypeError)
    bad("must only target Linear", saved(tmp_path / "conv", target_modules=["conv"]), error=TypeError)
    bad("must only target Linear", saved(tmp_path / "dora", use_dora=True), error=TypeError)
    bad("should provide general LoRA paths", use_gks=True)
    for options in ({"top_k": 0}, {"router_temperature": 0.0}, {"gks_adapter_names": "gks_0"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ArrowConfig(**options)
    with pytest.raises(ValueError, match="should contain at least one adapter path"):
        create_arrow_model(Net(), [], ArrowConfig())
    model = model_of(fastpeft, paths, top_k=4)
    with pytest.raises(ValueError, match="up has 3 LoRA adapters, expected top_k=4"):
        model(IDS)
    with pytest.raises(RuntimeError, match="Cannot merge an active Arrow router adapter"):
        model.merge_and_unload()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up"]))
    with pytest.raises(ValueError, match="rank mismatch: 2 != 3"):
        model(IDS)
    model.delete_adapter("other")
    model.add_adapter("other", LoraConfig(r=3, target_modules=["up"], use_dora=True))
    with pytest.raises(ValueError, match="mixes plain LoRA adapters, 'other' is a Dora"):
        model(IDS)


def test_arrow_on_a_four_bit_base(paths: list[str]) -> None:
    quantised = fastpeft.quantize_model(Net(), skip=["gpt", "head"])
    config = ArrowConfig(top_k=2, rng_seed=7)
    model = create_arrow_model(quantised, paths[:-1], config).eval()
    layer = model.base_model.model.up
    x = torch.randn(2, 6, 24, requires_grad=True)
    found = []
    for cast in (True, False):  # the kernel, and the composition
        layer.cast_input_dtype_enabled = cast
        layer.changed()
        y = layer(x)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
    for ours, expected in zip(*found, strict=True):
        close(ours, expected, times=8)
    assert not torch.equal(found[0][0], layer.base_layer(x))
