"""`add_weighted_adapter` and the sums behind it, against PEFT's."""

from __future__ import annotations

import warnings
from typing import Any

import fastpeft
import peft
import pytest
import torch
from fastpeft.model.combine import FACTORS, UPDATES
from fastpeft.utils import merge_utils
from peft.utils import merge_utils as peft_merge_utils
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_kernels.testing import assert_no_worse, assert_same_bits

TARGETS = ["linear", "conv1d_gpt2", "emb", "conv", "point"]
KINDS = [*FACTORS, "cat", *UPDATES]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 12)
        self.linear = nn.Linear(12, 10)
        self.conv1d_gpt2 = Conv1D(8, 10)
        self.conv = nn.Conv2d(1, 7, 3, padding=1)
        self.point = nn.Conv2d(7, 6, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.conv1d_gpt2(self.linear(self.emb(ids)))
        return self.head(h) + self.point(self.conv(h[:, None])).mean()


def pair(*adapters: dict[str, Any]) -> tuple[Any, Any]:
    """The same model with the same adapters, a, b, c ..., here and in PEFT."""
    made = []
    for library in (fastpeft, peft):
        torch.manual_seed(0)
        model = Net().eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fan_in_fan_out
            for i, options in enumerate(adapters):
                config = library.LoraConfig(**{"target_modules": TARGETS, "init_lora_weights": False, **options})
                if i == 0:
                    model = library.get_peft_model(model, config, "a")
                else:
                    model.add_adapter("abc"[i], config)
        made.append(model)
    return made[0], made[1]


def combine(model: Any, *args: Any, **options: Any) -> dict[str, Tensor]:
    """The combined updates by layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        model.add_weighted_adapter(*args, "new", **options)
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    return {n: m.get_delta_weight("new").detach() for n, m in layers.items() if "new" in m.scaling}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() != set()
    for name, value in theirs.items():
        norm = value.double().norm()
        assert norm > 0
        # What an SVD rounds by, more where singular values lie close together.
        assert_no_worse(ours[name], value, value.double(), 8 * norm.expand(value.shape))


@pytest.mark.parametrize("weights", [[0.7, 0.6], [1.5, -0.4]])
@pytest.mark.parametrize("kind", KINDS)
def test_every_combination_is_pefts(kind: str, weights: list[float]) -> None:
    models = pair({"r": 4, "lora_alpha": 6}, {"r": 4, "lora_alpha": 3})
    options: dict[str, Any] = {"combination_type": kind}
    if kind not in ("svd", "cat", "linear"):
        options["density"] = 0.4
    if "ties" in kind:
        options["majority_sign_method"] = "frequency"
    ours, theirs = (combine(model, ["a", "b"], weights, **options) for model in models)
    assert_same(ours, theirs)
    assert models[0].active_adapters == ["a"]
    layer = models[0].base_model.model.linear
    assert layer.scaling["new"] == 1.0
    assert not any(p.requires_grad for n, p in models[0].named_parameters() if ".new" in n)
    assert models[0].peft_config["new"].r == models[1].peft_config["new"].r == (8 if kind == "cat" else 4)


@pytest.mark.parametrize("kind", ["svd", "cat", "ties_svd"])
def test_ranks_and_targets_may_differ(kind: str) -> None:
    models = pair({"r": 4}, {"r": 2, "target_modules": ["linear", "emb"]}, {"r": 3, "rank_pattern": {"linear": 5}})
    options = {"density": 0.5} if "ties" in kind else {}
    args = (["a", "b", "c"], [1.0, 0.5, -0.3])
    assert_same(*(combine(m, *args, combination_type=kind, **options) for m in models))


def test_svd_options() -> None:
    for options in ({"svd_rank": 2}, {"svd_clamp": 0.9}, {"svd_full_matrices": False}, {"svd_rank": 5}):
        models = pair({"r": 4}, {"r": 3})
        ours, theirs = (combine(m, ["a", "b"], [0.8, 0.5], **options) for m in models)
        assert_same(ours, theirs)


def test_one_adapter_is_linear_whatever_is_asked() -> None:
    models = pair({"r": 4, "lora_alpha": 6})
    ours, theirs = (combine(m, ["a"], [0.5], combination_type="svd") for m in models)
    assert_same(ours, theirs)
    half = models[1].base_model.model.linear.get_delta_weight("a").double() / 2
    assert_no_worse(ours["linear"], theirs["linear"], half, half.norm().expand(half.shape))


def test_svd_of_a_rank_above_the_layers_size_and_rslora_are_right() -> None:
    """PEFT fails at the first and scales the second once more."""
    model, _ = pair({"r": 6, "use_rslora": True, "lora_alpha": 5}, {"r": 6, "use_rslora": True})
    layers = {n: getattr(model.base_model.model, n) for n in TARGETS}
    a, b = ({n: m.get_delta_weight(name).double() for n, m in layers.items()} for name in "ab")
    exact = {n: 0.5 * a[n] - 2 * b[n] for n in layers}
    for kind in ("svd", "cat"):
        for name, value in combine(model, ["a", "b"], [0.5, -2.0], combination_type=kind, svd_rank=12).items():
            assert_no_worse(value, exact[name].float(), exact[name], exact[name].norm().expand(value.shape))
        model.delete_adapter("new")


def test_biases_and_copied_modules_come_along() -> None:
    options: dict[str, Any] = {"target_modules": ["linear"], "r": 2}
    model, _ = pair({**options, "lora_bias": True, "modules_to_save": ["head"], "lora_alpha": 6}, options)
    layer = model.base_model.model.linear
    nn.init.normal_(layer.lora_B["a"].bias)
    model.base_model.model.head.modules_to_save["a"].weight.data += 1
    combine(model, ["a", "b"], [0.5, 3.0])
    bias = layer.lora_B["a"].bias.detach()
    assert_no_worse(layer.lora_B["new"].bias, bias * 1.5, bias.double() * 1.5)
    head = model.base_model.model.head.modules_to_save
    assert_same_bits(head["new"].weight, head["a"].weight)


def test_errors_are_pefts_and_change_nothing() -> None:
    model, theirs = pair({"r": 4}, {"r": 2}, {"r": 4, "target_modules": "linear"})
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((["a", "x"], [1.0, 1.0], "new"), {}),
        ((["a", "b"], [1.0, 1.0], "new"), {"combination_type": "linear"}),
        ((["a", "b"], [1.0, 1.0], "new"), {"combination_type": "nonsense"}),
        ((["a", "c"], [1.0, 1.0], "new"), {}),
    ]
    for args, options in calls:
        with pytest.raises(ValueError, match=r"\w") as expected:
            theirs.add_weighted_adapter(*args, **options)
        with pytest.raises(ValueError, match=r"\w") as found:
            model.add_weighted_adapter(*args, **options)
        assert str(found.value)[:40] == str(expected.value)[:40]
    for args, options in (
        ((["a", "b"], [1.0], "new"), {}),
        (([], [], "new"), {}),
        ((["a", "b"], [1.0, 1.0], "new"), {"combination_type": "ties_svd"}),
    ):
        with pytest.raises(ValueError, match=r"weights|Found no adapter|density"):
            model.add_weighted_adapter(*args, **options)
    assert list(model.peft_config) == ["a", "b", "c"]
    assert "new" not in model.base_model.model.linear.methods
    model.add_weighted_adapter(["b"], [1.0], "a")  # a name that exists: nothing
    both = pair({"r": 2, "modules_to_save": ["head"]}, {"r": 2, "modules_to_save": ["head"]})[0]
    with pytest.raises(ValueError, match="modules_to_save"):
        both.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new")


@pytest.mark.parametrize("how", ["linear", "cat", "svd", "ties_svd"])
def test_aloras_of_one_invocation_are_combined_as_pefts(how: str) -> None:
    options = {"r": 2, "target_modules": ["linear"], "alora_invocation_tokens": [1, 2]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the task is not CAUSAL_LM
        ours, theirs = pair(options, options, {**options, "alora_invocation_tokens": [3]})
        for model in (ours, theirs):
            model.add_weighted_adapter(["a", "b"], [0.5, -2.0], "new", combination_type=how, density=0.5)
    assert_same(*({"": m.base_model.model.linear.get_delta_weight("new").detach()} for m in (ours, theirs)))
    assert ours.peft_config["new"].alora_invocation_tokens == [1, 2]
    with pytest.raises(ValueError, match="'a' and 'c' differ in `alora_invocation_tokens`"):
        ours.add_weighted_adapter(["a", "c"], [1.0, 1.0], "more")


def test_trained_rows_are_summed() -> None:
    """PEFT leaves them as the base model has them, and those of the first adapter alone."""
    torch.manual_seed(0)
    model = fastpeft.get_peft_model(Net(), fastpeft.LoraConfig(target_modules=["linear"]), "a")
    for name, rows in (("b", [0, 3]), ("c", [5, 3])):
        model.add_adapter(name, fastpeft.LoraConfig(target_modules=["linear"], trainable_token_indices={"emb": rows}))
    layer = model.base_model.model.emb.token_adapter
    table = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        for name in ("b", "c"):
            layer.trainable_tokens_delta[name].normal_()
    model.add_weighted_adapter(["a", "b", "c"], [1.0, 0.5, -2.0], "new")
    found = layer.merged_weight(["new"])[0].t()
    for name, weight in (("b", 0.5), ("c", -2.0)):
        rows = layer.token_indices[name]
        table[rows] += weight * (layer.trainable_tokens_delta[name] - layer.base_layer.weight[rows]).detach()
    assert_same_bits(found.detach(), table)
    model.base_model.set_adapter(["b"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged rows: `unmerge_adapter`"):
        model.add_weighted_adapter(["b", "c"], [1.0, 1.0], "more")
    assert "more" not in model.peft_config


def test_other_methods_say_that_they_do_not_combine() -> None:
    torch.manual_seed(0)
    model = fastpeft.get_peft_model(Net(), fastpeft.LoraConfig(target_modules=["linear"]), "a")
    model.add_adapter("b", fastpeft.BeftConfig(target_modules=["linear"]))
    with pytest.raises(TypeError, match="BEFT does not support add_weighted_adapter"):
        model.add_weighted_adapter(["b"], [1.0], "new")
    with pytest.raises(ValueError, match="of one method, got BEFT, LORA"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new")
    model.add_adapter("d", fastpeft.LoraConfig(target_modules=["linear"], use_dora=True))
    with pytest.raises(ValueError, match="'d' is a Dora"):
        model.add_weighted_adapter(["a", "d"], [1.0, 1.0], "new")


def test_ia3_is_pefts() -> None:
    found = []
    for library in (fastpeft, peft):
        torch.manual_seed(0)
        first = {"target_modules": ["linear", "head"], "feedforward_modules": ["head"], "init_ia3_weights": False}
        model = library.get_peft_model(Net(), library.IA3Config(**first), "a")
        second = {"target_modules": ["linear"], "feedforward_modules": [], "init_ia3_weights": False}
        model.add_adapter("b", library.IA3Config(**second))
        model.add_weighted_adapter(["a", "b"], [0.5, -2.0], "new")
        layers = {n: m.ia3_l["new"].data for n, m in model.named_modules() if hasattr(m, "ia3_l") and "new" in m.ia3_l}
        assert model.peft_config["new"].target_modules == {"linear", "head"}
        assert model.peft_config["new"].feedforward_modules == {"head"}
        found.append(layers)
    assert found[0].keys() == found[1].keys()
    for name, value in found[1].items():
        assert_same_bits(found[0][name], value)
    mixed = fastpeft.get_peft_model(Net(), fastpeft.IA3Config(**first), "a")
    mixed.add_adapter("b", fastpeft.IA3Config(target_modules=["head"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="in some of the adapters only"):
        mixed.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new")
    assert "new" not in mixed.peft_config


@pytest.mark.parametrize("name", [n for n in vars(peft_merge_utils) if n in dir(merge_utils) and n[0].islower()])
def test_merge_utils_are_pefts(name: str) -> None:
    ours, theirs = getattr(merge_utils, name), getattr(peft_merge_utils, name)
    if not callable(ours):
        return
    torch.manual_seed(1)
    tensors, weights = [torch.randn(5, 7) for _ in range(3)], torch.tensor([0.5, -1.0, 2.0])
    stacked = torch.stack(tensors)
    calls: dict[str, list[tuple[Any, ...]]] = {
        "reshape_weight_task_tensors": [(stacked, weights)],
        "magnitude_based_pruning": [(tensors[0], 0.3)],
        "random_pruning": [(tensors[0], 0.3, True), (tensors[0], 0.6, False)],
        "prune": [(tensors[0], 0.3, "magnitude"), (tensors[0], 0.3, "random", True), (tensors[0], 1.0, "random")],
        "calculate_majority_sign_mask": [(stacked,), (stacked, "frequency")],
        "disjoint_merge": [(stacked, stacked > 0)],
        "task_arithmetic": [(tensors, weights)],
        "ties": [(tensors, weights, 0.5), (tensors, weights, 0.5, "frequency")],
        "dare_ties": [(tensors, weights, 0.5, "frequency")],
        "dare_linear": [(tensors, weights, 0.5)],
        "magnitude_prune": [(tensors, weights, 0.5)],
    }
    for args in calls[name]:
        results = []
        for function in (ours, theirs):
            torch.manual_seed(2)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results.append(function(*args))
        assert torch.equal(*results)


def test_prune_refuses_what_peft_refuses() -> None:
    for density, method, error in ((-0.1, "random", "Density"), (0.5, "other", "Unknown method")):
        for module in (merge_utils, peft_merge_utils):
            with pytest.raises(ValueError, match=error):
                module.prune(torch.ones(3), density, method)
    with pytest.raises(RuntimeError, match="Unimplemented mask method"):
        merge_utils.calculate_majority_sign_mask(torch.ones(2, 3), "other")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0, float("nan")]}, "weights should be numbers of magnitude at most"),
        ({"weights": [1.0, float("inf")]}, "weights should be numbers"),
        ({"weights": [1.0, 1e30]}, "weights should be numbers"),
        ({"svd_rank": 0, "combination_type": "svd"}, "`svd_rank` should be a positive integer"),
        ({"svd_rank": -1, "combination_type": "svd"}, "`svd_rank` should be a positive integer"),
        ({"svd_rank": 2.5, "combination_type": "svd"}, "`svd_rank` should be a positive integer"),
        ({"density": float("nan"), "combination_type": "ties"}, "`density` should be a share"),
        ({"svd_clamp": 2.0, "combination_type": "svd"}, "`svd_clamp` should be a share"),
    ],
)
def test_values_that_cannot_combine_are_refused(options: dict[str, Any], message: str) -> None:
    model = two_loras()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(["a", "b"], adapter_name="new", **{"weights": [1.0, 1.0], **options})
    assert list(model.peft_config) == ["a", "b"]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_what_peft_accepts_in_silence_is_accepted_with_a_warning() -> None:
    model = two_loras()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.warns(fastpeft.PeftWarning, match="an adapter 'b' already"):
        model.add_weighted_adapter(["a"], [3.0], "b")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.warns(UserWarning, match=r"density 2\.0 is greater"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", combination_type="ties", density=2.0)
    with pytest.warns(fastpeft.PeftWarning, match="modules_to_save: nothing in the model matches zzz"):
        model.add_adapter("d", fastpeft.LoraConfig(target_modules=["0"], modules_to_save=["zzz", "score"]))


def test_merging_names_that_there_are_not() -> None:
    for merge in ("merge_adapter", "merge_and_unload"):
        model = two_loras()
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"adapter_names has \['unknown'\], there are \['a', 'b'\]"):
            getattr(model, merge)(adapter_names=["a", "unknown"])
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_dictionary_is_no_configuration() -> None:
    options: Any = {"peft_type": "LORA", "target_modules": ["0"]}
    model, adapted = nn.Sequential(nn.Linear(4, 4)), two_loras()
    for use in (
        lambda: fastpeft.get_peft_model(model, options),
        lambda: fastpeft.PeftModel(model, options),
        lambda: fastpeft.inject_adapter_in_model(options, model),
        lambda: adapted.add_adapter("c", options),
    ):
        with pytest.raises(TypeError, match=r"such as LoraConfig.*, got dict\. get_peft_config"):
            use()
    assert type(model[0]) is nn.Linear
    assert list(adapted.peft_config) == ["a", "b"]


def two_loras() -> Any:
    config = fastpeft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
    model = fastpeft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config, "a")
    model.add_adapter("b", config)
    return model
