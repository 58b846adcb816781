"""Several adapters in one run: each becomes what it becomes alone, goes on after a crash, and has files of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from crash_tools import interrupted
from fastpeft.apps.cli.app import app
from fastpeft.apps.training import checkpoints, run
from fastpeft.apps.training.config import TrainConfig, from_dict, load_config
from fastpeft.apps.training.errors import UserError
from fastpeft.apps.training.loop import Trainer
from fastpeft.apps.training.metrics import Silent, read_metrics
from fastpeft.apps.training.testing import make_tiny_model, write_jsonl
from fastpeft.apps.training.track import Track
from torch import Tensor
from typer.testing import CliRunner

from peft_kernels.testing import assert_no_worse, assert_same_bits

CPU = torch.device("cpu")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
# Other data, rates, optimizers, layouts and lengths of the run for each.
DIFFERENT = {
    "red": {"max_steps": 5, "batch_size": 2},
    "green": {"max_steps": 3, "seed": 3, "lora": {"r": 2, "target_modules": ["q_proj", "down_proj"]}, "packing": False,
              "batch_size": 3, "optimizer": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.1, "schedule": "linear"},
    "blue": {"max_steps": 4, "seed": 7, "gradient_accumulation": 2, "warmup": 2, "weight_decay": 0.1,
             "lora": {"use_dora": True}, "max_length": 48},
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_tiny_model(folder / "model")
    for i, name in enumerate(DIFFERENT):
        write_jsonl(folder / f"{name}.jsonl", 24 + 5 * i)
    return folder


def config(world: Path, output: Path, adapters: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    values = {
        "model": str(world / "model"), "output": str(output), "eval_fraction": 0.2, "max_length": 64,
        "dtype": "float32", "learning_rate": 1e-2, "lora": LORA, "fast_layers": False,
        "epsilon": 1e-3,  # so that Adam does not make much of gradients that are almost zero
        "adapters": {
            name: {"data": str(world / f"{name}.jsonl"), **own}
            for name, own in (DIFFERENT if adapters is None else adapters).items()
        },
    }  # fmt: skip
    return from_dict({**values, **changes})


def trainer(settings: TrainConfig, dtype: torch.dtype = torch.float32) -> Trainer:
    prepared = run.prepare_all(settings)
    model = run.adapted_model(*prepared).to(dtype)
    pad = prepared[0].tokenizer.pad_token_id
    tracks = [Track(p.name, p.config, p.train.examples, p.held_out.examples, pad) for p in prepared]
    for track in tracks:
        track.root.mkdir(parents=True, exist_ok=True)
    return Trainer(settings, model, tracks, pad, CPU, Silent())


def trained(t: Trainer, adapter: str) -> Tensor:
    """An adapter's trained tensors as one vector."""
    (track,) = (track for track in t.tracks if track.name == adapter)
    return torch.cat([p.detach().flatten() for p in track.parameters])


def alone(settings: TrainConfig, name: str, output: Path, dtype: torch.dtype) -> Tensor:
    one = from_dict({**settings.each()[name].to_dict(), "output": str(output)})
    t = trainer(one, dtype)
    t.run()
    return trained(t, "default")


def check_law(settings: TrainConfig, tmp_path: Path) -> None:
    """Each adapter of a run is as near to its run alone in float64 as its run alone in float32."""
    together = trainer(settings)
    start = {name: dict(by_name(together, name)) for name in settings.adapters}
    together.run()
    for name in settings.adapters:
        eager, exact = (alone(settings, name, tmp_path / f"{name}-{t}", t) for t in (torch.float32, torch.float64))
        scale = (exact.abs().max() * max(len(t.plan) for t in together.tracks)).expand_as(exact)  # each step rounds
        assert_no_worse(trained(together, name), eager, exact, scale)
        # ... which is nothing beside what training changes
        moved = max(float((p - start[name][n]).abs().max()) for n, p in by_name(together, name))
        assert moved > 1000 * torch.finfo(torch.float32).eps * float(scale.max())


def by_name(t: Trainer, adapter: str) -> list[tuple[str, Tensor]]:
    found = [(n, p.detach().clone()) for n, p in t.model.named_parameters() if adapter in n.split(".")]
    assert found
    return found


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_at_once_is_what_each_is_alone(world: Path, tmp_path: Path, quantize: str) -> None:
    check_law(config(world, tmp_path / "run", quantize=quantize), tmp_path)


METHODS = {
    "lora": {},
    "vera": {"method": "vera", "adapter": {"r": 8, "target_modules": ["q_proj", "up_proj"]}, "learning_rate": 0.1},
    "ia3": {
        "method": "ia3",
        "adapter": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    },
    "oft": {"method": "oft", "adapter": {"oft_block_size": 8, "target_modules": ["q_proj", "v_proj"]}},
    "head": {"lora": {"target_modules": ["q_proj", "lm_head"]}},
    "prompt": {"method": "prompt_tuning", "adapter": {"num_virtual_tokens": 3, "prompt_tuning_init": "SAMPLE_VOCAB"}},
    "made": {"method": "p_tuning", "adapter": {"num_virtual_tokens": 4, "encoder_hidden_size": 8}},
    "prefix": {"method": "prefix_tuning", "adapter": {"num_virtual_tokens": 5}},
    "copy": {"lora": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "learning_rate": 1e-3},
}


@pytest.mark.parametrize("names", [
    ("lora", "vera", "ia3", "oft"), ("lora", "head"), ("copy", "lora"), ("prompt", "lora", "made", "prefix"),
])
def test_methods_may_differ(world: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    """Also where one of them adapts, or copies, the output head: the head's rows are tokens."""
    each = {name: {"data": str(world / "red.jsonl"), "batch_size": 2, **METHODS[name]} for name in names}
    check_law(config(world, tmp_path / "run", each, quantize="none", max_steps=2), tmp_path)


def lines(folder: Path) -> dict[str, list[tuple[Any, ...]]]:
    """The lines of metrics.jsonl by adapter, without times."""
    keys = ("step", "epoch", "loss", "held_out_loss", "lr", "grad_norm", "tokens", "learned_tokens")
    found: dict[str, list[tuple[Any, ...]]] = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        found.setdefault(line["adapter"], []).append(tuple(line.get(k) for k in keys))
    return found


def test_gradient_checkpointing_changes_no_bit(world: Path, tmp_path: Path) -> None:
    """With dropout: a layer that is run again has the same rows and drops the same elements."""
    lora = {**LORA, "lora_dropout": 0.1}
    plain = trainer(config(world, tmp_path / "a", lora=lora))
    plain.run()
    saving = trainer(config(world, tmp_path / "b", lora=lora, gradient_checkpointing=True))
    saving.run()
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    for name in DIFFERENT:
        assert_same_bits(trained(plain, name), trained(saving, name))


def test_resuming_continues_every_adapter(world: Path, tmp_path: Path) -> None:
    """After a crash in the fifth step, with one adapter that was at its end: the same lines and bits, with dropout."""
    settings = {"save_every": 2, "eval_every": 2, "lora": {**LORA, "lora_dropout": 0.1}}
    whole = trainer(config(world, tmp_path / "whole", **settings))
    whole.run()
    again = config(world, tmp_path / "broken", **settings)
    interrupted(trainer(again), 5)
    found = {name: [p.name for p in checkpoints.numbered(tmp_path / "broken" / name)] for name in DIFFERENT}
    assert found == {
        "red": ["checkpoint-2", "checkpoint-4"], "green": ["checkpoint-2", "checkpoint-3"],
        "blue": ["checkpoint-2", "checkpoint-4"],
    }  # fmt: skip
    torch.manual_seed(99)  # whatever the state is, the checkpoints' counts
    resumed = trainer(again)
    results = resumed.run(resume=True)
    assert {name: r.resumed_from for name, r in results.items()} == {"red": 4, "green": 3, "blue": 4}
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")
    assert {name: len(of) for name, of in lines(tmp_path / "whole").items()} == {"red": 6, "green": 4, "blue": 5}
    for name in DIFFERENT:
        assert_same_bits(trained(resumed, name), trained(whole, name))


def test_an_adapter_that_lost_its_checkpoint_catches_up(world: Path, tmp_path: Path) -> None:
    """Red's newest is damaged and green's all are: they do their steps once more, blue waits, nobody's curve bends."""
    settings = config(world, tmp_path, save_every=2)
    trainer(settings).run()
    before = lines(tmp_path)
    weights = tmp_path / "red" / "checkpoint-5" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    for folder in checkpoints.numbered(tmp_path / "green"):
        (folder / "training_state.json").unlink()
    with pytest.raises(UserError, match="green is intact"):
        trainer(settings).run(resume=True)
    resumed = trainer(settings)
    results = resumed.run(resume=True, restart=True)
    assert {name: r.resumed_from for name, r in results.items()} == {"red": 4, "green": 0, "blue": 4}
    assert results["blue"].tokens == 0
    after = lines(tmp_path)
    assert [line[0] for line in after["red"]] == [0, 1, 2, 3, 4, 5]
    for name, of in before.items():
        for old, new in zip(of, after[name], strict=True):
            for a, b in zip(old, new, strict=True):
                assert a == b or a == pytest.approx(b, rel=1e-4)  # written with six digits


def test_a_checkpoint_goes_on_as_a_run_of_its_adapter_alone(world: Path, tmp_path: Path) -> None:
    settings = config(world, tmp_path, save_every=2)
    interrupted(trainer(settings), 4)
    one = settings.each()["red"]
    result = trainer(one).run(resume=True)["default"]
    assert (result.resumed_from, result.steps) == (2, 5)


def test_only_what_is_in_the_batch_trains(world: Path, tmp_path: Path) -> None:
    """Green's three steps are over in the fourth: it has no gradients then; red, alone at last, takes the quick way."""
    t = trainer(config(world, tmp_path))
    seen: list[tuple[list[str], set[str]]] = []
    step = t._pass

    def watching(parts: Any) -> list[float]:
        names = [n for n, p in t.model.named_parameters() if p.requires_grad]
        seen.append(([part[0] for part in parts], {a for a in DIFFERENT for n in names if a in n.split(".")}))
        return step(parts)

    t._pass = watching  # type: ignore[method-assign]
    t.run()
    assert [(names, train) for names, train in seen if "red" in names] == [
        (["red", "green", "blue"], {"red", "green", "blue"})
    ] * 3 + [(["red", "blue"], {"red", "blue"}), (["red"], {"red"})]
    assert all(set(names) <= train for names, train in seen)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"a": 3}, "adapters.a: expected a mapping of settings, got 3"),
        ({"a.b": {}}, "adapter name 'a.b': expected 1 to 64 of the characters"),
        ({"__base__": {}}, "it stands for the model without an adapter; choose another name"),
        (
            {"a": {"quantize": "none"}},
            "adapters.a.quantize: quantize holds for the whole run; write it beside adapters",
        ),
        ({"a": {"learning_rte": 1}}, "adapters.a: unknown setting 'learning_rte'; did you mean 'learning_rate'?"),
        ({"a": {"data": "d", "learning_rate": -1}}, "adapters.a: learning_rate: expected a positive number, got -1.0"),
        ({"a": {}}, "adapters.a: the setting 'data' is missing"),
    ],
)
def test_bad_settings_name_the_adapter(adapters: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        from_dict({"model": "m", "adapters": adapters})
    assert message in str(error.value)


def test_settings_are_laid_over_those_of_the_run(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "model: m\ndata: d\neval_data: e\nlora: {r: 4, lora_alpha: 8}\nadapters:\n  a:\n    eval_fraction: 0.1\n"
        "  b:\n    data: other\n    lora: {r: 2}\n    optimizer: sgd\n  c: {method: vera, adapter: {r: 64}}\n"
    )
    each = load_config(str(file), ["adapters.b.lora.lora_alpha=1", "learning_rate=1", "output=o"]).each()
    a, b, c = each["a"], each["b"], each["c"]
    assert (a.data, a.eval_data, a.eval_fraction, a.lora) == ("d", None, 0.1, {"r": 4, "lora_alpha": 8})
    assert (b.data, b.eval_data, b.lora, b.optimizer) == ("other", "e", {"r": 2, "lora_alpha": 1}, "sgd")
    assert (c.method, c.adapter, c.learning_rate, c.output) == ("vera", {"r": 64}, 1.0, str(Path("o", "c")))
    assert all(one.adapters == {} for one in each.values())


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            {"lora": {"bias": "all"}},
            "adapters.b: bias='all' trains the base's biases, which the other adapters compute",
        ),
        ({"lora": {"init_lora_weights": "pissa"}}, "adapters.b: 'pissa' edits the base's weights"),
        ({"lora": {"alora_invocation_tokens": [1]}}, "adapters.b: aLoRA needs an invocation in each row"),
    ],
)
def test_what_would_change_the_base_is_refused(world: Path, own: dict[str, Any], message: str) -> None:
    settings = config(world, world / "none", {"a": {"data": str(world / "red.jsonl")}}, quantize="none")
    settings = from_dict(
        {**settings.to_dict(), "adapters": {**settings.adapters, "b": {**settings.adapters["a"], **own}}}
    )
    with pytest.raises(UserError, match=message):
        run.adapted_model(*run.prepare_all(settings))


def test_what_is_wrong_with_one_adapter_names_it(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapters\.a: data: expected a jsonl file, .*nothing is not a file"):
        run.prepare_all(config(world, tmp_path, {"a": {"data": "nothing"}}))
    red = {"data": str(world / "red.jsonl")}
    with pytest.raises(UserError, match=r"adapters\.a: no example is left"):
        run.prepare_all(config(world, tmp_path, {"a": {**red, "max_length": 2, "truncate": "drop"}}))
    for wrong, message in (({"r": 0}, "lora: LoraConfig: r = 0"), ({"target_modules": ["nothing"]}, "Target modules")):
        with pytest.raises(UserError, match=rf"adapters\.b: {message}"):
            run.adapted_model(*run.prepare_all(config(world, tmp_path, {"a": red, "b": {**red, "lora": wrong}})))


def test_divergence_names_the_adapter(world: Path, tmp_path: Path) -> None:
    t = trainer(config(world, tmp_path))
    t.loss.self_check = lambda *_: None  # type: ignore[method-assign]
    with torch.no_grad():
        next(p for n, p in t.model.named_parameters() if ".green." in n).fill_(float("nan"))
    with pytest.raises(UserError, match=r"adapter green, step 1: the loss is nan"):
        t.run()


def test_on_the_command_line(world: Path, tmp_path: Path) -> None:
    """The plan, the run, its files, resuming after the end, and an adapter that answers."""
    file = tmp_path / "config.yaml"
    settings = config(world, tmp_path / "run", fast_layers=True).to_dict()
    file.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items()))

    def result_of(*words: str) -> dict[str, Any]:
        done = CliRunner().invoke(app, [words[0], "--json", *words[1:]])
        assert done.exit_code == 0, done.output
        parsed: dict[str, Any] = json.loads(done.stdout)
        return parsed

    plan = result_of("train", str(file), "--dry-run")
    assert {name: one["steps"] for name, one in plan["adapters"].items()} == {"red": 5, "green": 3, "blue": 4}
    assert plan["trainable_parameters"] == sum(one["trainable_parameters"] for one in plan["adapters"].values())
    assert not (tmp_path / "run").exists()
    assert "green: rows a step" in CliRunner().invoke(app, ["train", str(file), "--dry-run"]).stdout
    result = result_of("train", str(file))
    assert {p.name for p in (tmp_path / "run").iterdir()} == {*DIFFERENT, "metrics.jsonl", "loss.png"}
    for name, one in result["adapters"].items():
        assert one["adapter"] == str(tmp_path / "run" / name / "adapter")
        assert one["held_out_after"] < one["held_out_before"]
        files = {p.name for p in Path(one["adapter"]).iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "fastpeft_training.json"} <= files
    shown = CliRunner().invoke(app, ["train", str(file), "--resume"])
    assert shown.exit_code == 0, shown.output
    assert "green: held-out loss" in shown.stdout
    answer = result_of(
        "generate", "--adapter", str(tmp_path / "run" / "blue" / "adapter"), "--max-new-tokens", "4", "hi"
    )
    assert answer["answers"][0]["tokens"] == 4


def test_a_prompt_s_network_goes_on_after_a_crash(world: Path, tmp_path: Path) -> None:
    """P-tuning's file has the prompt alone; a checkpoint has what makes it, too."""
    each = {"red": {"data": str(world / "red.jsonl"), **METHODS["made"]}}
    settings = {"quantize": "none", "max_steps": 3, "save_every": 1}
    whole = trainer(config(world, tmp_path / "whole", each, **settings))
    whole.run()
    interrupted(trainer(config(world, tmp_path / "broken", each, **settings)), 3)
    torch.manual_seed(99)
    resumed = trainer(config(world, tmp_path / "broken", each, **settings))
    assert resumed.run(resume=True)["red"].resumed_from == 2
    assert_same_bits(trained(resumed, "red"), trained(whole, "red"))


def test_prompts_that_need_more_than_texts_are_refused(world: Path, tmp_path: Path) -> None:
    each = {"red": {"data": str(world / "red.jsonl"), "method": "cpt"}}
    with pytest.raises(UserError, match="cpt needs examples or tasks"):
        trainer(config(world, tmp_path, each))
    prompt = {"data": str(world / "red.jsonl"), "method": "p_tuning"}
    with pytest.raises(UserError, match="packing=true"):
        config(world, tmp_path, {"red": prompt, "blue": {"data": str(world / "blue.jsonl"), "packing": True}})
