"""A model's forward with prompts: what of the arguments they change, for each task.

Virtual tokens stand before those of each row. Where rows have different numbers of them, theirs end together, the
others are masked, and positions are counted for each row, so that a row computes what it does alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config.types import PeftType, TaskType, warn
from ..inject.modules import input_embeddings
from ..layer.by_row.names import check_length
from ..prompts.batch import Prompts, prompts_of
from ..prompts.cache import filled_cache
from ..prompts.cpt import CPTEmbedding
from .prepare import is_checkpointing
from .tuner import AUXILIARY_KWARGS, BaseTuner

_ENCODER = frozenset({PeftType.PROMPT_TUNING, PeftType.P_TUNING})  # of an encoder-decoder only the encoder has these
_KEEPS_TYPES = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)
_IGNORED = -100


def forward(tuner: BaseTuner, rows: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The model's output for rows with prompts. Its logits have those of virtual tokens before the input's, where the
    prompt is vectors before the input. rows: a name for each row, or one for all."""
    given = _named(tuner.model.forward, args, kwargs)
    own = {name: given.pop(name) for name in (*AUXILIARY_KWARGS, "task_ids", "input_type_mask") if name in given}
    batch = Batch(tuner, rows, given, own.get("task_ids"))
    change = batch.seq2seq if batch.task == TaskType.SEQ_2_SEQ_LM else batch.one_model
    labels = given.get("labels")
    with tuner._enable_peft_forward_hooks(**given, **{n: v for n, v in own.items() if n in AUXILIARY_KWARGS}):
        change(given)
        if batch.cpt is None or labels is None:
            return tuner(**given)
        types = _types_for_cpt(batch.cpt, labels, own.get("input_type_mask"))
        given["labels"] = cpt = _labels_for_cpt(batch.cpt, labels, types)
        return CPTEmbedding.calculate_loss(tuner(**given), cpt, types, batch.cpt)


def inputs(tuner: BaseTuner, rows: Sequence[str], given: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Arguments of a decoder with prompts, and how many tokens stand before the input's. A row is one text, which
    begins at its first column: positions that are given are passed over."""
    changed = {name: value for name, value in given.items() if name != "position_ids"}
    length = length_of(changed)
    Batch(tuner, rows, changed, None).one_model(changed)
    return changed, length_of(changed) - length


class Batch:
    """One call's rows and their prompts. given: its arguments, which the methods change for the model."""

    def __init__(self, tuner: BaseTuner, rows: Sequence[str], given: Mapping[str, Any], tasks: Any) -> None:
        self.tuner, self.named = tuner, tuner.prompts()
        self.model: Any = tuner.model
        of = [self.named[name] for name in dict.fromkeys(rows) if name in self.named]
        self.task = _task(of[0][2], self.model)
        first = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if first is None:
            raise ValueError("You have to provide either input_ids or inputs_embeds")
        self.count, self.device = first.shape[0], first.device
        if rows is not tuner.prompt_encoder.active_adapters:
            check_length(first, rows)
        self.rows = list(rows) if len(rows) == self.count else list(rows) * self.count
        self.tasks = None if tasks is None else torch.as_tensor(tasks, device=self.device).reshape(-1)
        configs = [config for _, _, config in of]
        mixed = len(set(self.rows)) > 1
        self.cpt: Any = configs[0] if not mixed and configs[0].peft_type == PeftType.CPT else None
        self.kinds = {config.peft_type for config in configs}
        if mixed and len({self._form(name) for name in self.rows}) > 1 and _counts_places(self.model):
            raise ValueError(
                f"Rows of a {type(self.model).__name__} need prompts of one length: it counts positions from the first "
                "virtual token, so that a row with a shorter prompt would get others than alone. Pass such rows in "
                "batches of their own."
            )
        if any(method.in_cache for method, _, _ in of):
            self._check_cache()

    def _form(self, name: str) -> tuple[bool, int]:
        """Where a row has virtual tokens, in the cache or not, and how many."""
        if name not in self.named:
            return False, 0
        method, _, config = self.named[name]
        return method.in_cache, config.num_virtual_tokens

    def _check_cache(self) -> None:
        if self.model.training and is_checkpointing(self.model):
            raise ValueError(
                "A prefix does not work with gradient checkpointing: layers that are computed again have no cache, "
                "which holds it. Turn it off with gradient_checkpointing_disable()."
            )
        if not _takes(self.model, "past_key_values"):
            raise ValueError("Model does not support past key values which are required for prefix tuning.")

    def prompts(self, like: Tensor, repeats: int = 1, decoder: bool = False) -> Prompts:
        rows = [name for name in self.rows for _ in range(repeats)]
        tasks = self.tasks
        if tasks is not None and repeats > 1 and len(tasks) == self.count:
            tasks = tasks.repeat_interleave(repeats)
        return prompts_of(self.named, rows, tasks, like, decoder)

    def like(self) -> Tensor:
        """A tensor of the dtype and on the device of the model's activations."""
        words = input_embeddings(self.model)
        # a quantised table has no parameters
        owners: list[nn.Module] = [self.model] if words is None else [words, self.model]
        return next(p for owner in owners for p in owner.parameters() if p.is_floating_point())

    def words(self, given: dict[str, Any]) -> Tensor:
        """The vectors of the input, in place of its tokens."""
        ids, found = given.pop("input_ids", None), given.get("inputs_embeds")
        if found is None:
            embeddings = input_embeddings(self.model)
            assert embeddings is not None  # else there is no such prompt
            found = embeddings(ids)
        return found  # type: ignore[no-any-return]

    def one_model(self, given: dict[str, Any]) -> None:
        """A decoder, or an encoder: everything stands in its one sequence."""
        keeps = self.task in _KEEPS_TYPES
        if not keeps and given.get("token_type_ids") is not None:
            warn("Token type ids are not supported for parameter efficient tuning. Ignoring token type ids", 4)
            given["token_type_ids"] = None
        prompts = self.prompts(self.like())
        length = length_of(given)
        old = given.get("past_key_values")
        if old is not None and old.get_seq_length():  # it goes on: the prompts are in it
            extend_mask(given, "attention_mask", prompts, self.count, length)
            if given.get("position_ids") is not None:
                given["position_ids"] = given["position_ids"] + self._own(prompts)
            return
        if prompts.embeds is not None:
            words = self.words(given)
            given["inputs_embeds"] = torch.cat([prompts.embeds.to(words.dtype), words], dim=1)
            if given.get("token_type_ids") is not None:
                types = given["token_type_ids"]
                given["token_type_ids"] = torch.cat([types.new_zeros(self.count, prompts.inserted), types], dim=1)
            if given.get("labels") is not None and self.task in (TaskType.CAUSAL_LM, TaskType.TOKEN_CLS):
                given["labels"] = _before(given["labels"], prompts.inserted, _IGNORED)
        if prompts.pairs is not None:
            given["past_key_values"] = filled_cache(prompts.pairs, self.model)
        self._positions(given, prompts, length)
        extend_mask(given, "attention_mask", prompts, self.count, length)

    def _own(self, prompts: Prompts) -> Tensor | int:
        """Virtual tokens before each row's input [rows, 1]."""
        return prompts.tokens if prompts.mask is None else prompts.mask.sum(1, keepdim=True)

    def _positions(self, given: dict[str, Any], prompts: Prompts, length: int) -> None:
        ids = given.get("position_ids")
        if prompts.mask is not None and _takes(self.model, "position_ids"):
            ids = torch.arange(length, device=self.device)[None] if ids is None else ids
            ids = (ids + self._own(prompts)).expand(self.count, -1)
            start = prompts.mask.cumsum(1)[:, prompts.before :] - 1
            given["position_ids"] = torch.cat([start.clamp(min=0), ids], dim=1)
        elif ids is not None and prompts.embeds is None:
            given["position_ids"] = ids + prompts.tokens
        elif ids is not None:
            warn("Position ids are not supported for parameter efficient tuning. Ignoring position ids.", 4)
            given["position_ids"] = None

    def seq2seq(self, given: dict[str, Any]) -> None:
        """An encoder-decoder: a prefix is the decoder's, vectors are the encoder's, and of multitask prompt tuning the
        decoder's too."""
        for name, what in (("position_ids", "Position"), ("token_type_ids", "Token type")):
            if given.get(name) is not None:
                warn(f"{what} ids are not supported for parameter efficient tuning. Ignoring {what.lower()} ids.", 4)
                given.pop(name)
        prompts = self.prompts(self.like(), decoder=True)
        if prompts.pairs is not None:
            given["past_key_values"] = filled_cache(prompts.pairs, self.model)
            if given.get("decoder_attention_mask") is not None or prompts.mask is not None:
                self.mask_prefix(given, prompts, self._decoder_length(given))
        if prompts.embeds is not None:
            rest = self.before_encoder(given, prompts)
            if rest is not None and self.kinds - _ENCODER:
                self._before_decoder(given, rest)

    def mask_prefix(self, given: dict[str, Any], prompts: Prompts, length: int) -> None:
        """Let the decoder's mask say what of the cache a row has. length: of the decoder's input."""
        own = Prompts(None, prompts.pairs, None if prompts.mask is None else prompts.mask[:, : prompts.before])
        extend_mask(given, "decoder_attention_mask", own, self.count, length)

    def before_encoder(self, given: dict[str, Any], prompts: Prompts) -> Tensor | None:
        """Put prompts before the encoder's input; gives what is the decoder's of them, if they have that."""
        assert prompts.embeds is not None
        length, words = length_of(given), self.words(given)
        embeds, rest = prompts.embeds.to(words.dtype), None
        of = [self.named[name][2] for name in self.rows if name in self.named]
        if prompts.mask is None and of[0].num_transformer_submodules == 2:
            embeds, rest = embeds[:, : of[0].num_virtual_tokens], embeds[:, of[0].num_virtual_tokens :]
        elif prompts.mask is not None and any(config.num_transformer_submodules == 2 for config in of):
            raise ValueError("Rows of an encoder-decoder can differ where each num_transformer_submodules is 1.")
        given["inputs_embeds"] = torch.cat([embeds, words], dim=1)
        encoder = Prompts(embeds, None, None if prompts.mask is None else prompts.mask[:, prompts.before :])
        extend_mask(given, "attention_mask", encoder, self.count, length)
        return rest

    def _before_decoder(self, given: dict[str, Any], embeds: Tensor) -> None:
        words, ids = given.pop("decoder_inputs_embeds", None), given.pop("decoder_input_ids", None)
        labels: Any = given.get("labels")
        table = input_embeddings(self.model)
        assert table is not None
        if words is None:
            config = self.model.config
            words = table(
                shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id) if ids is None else ids
            )
        if labels is not None:
            given["labels"] = _before(labels, embeds.shape[1], _IGNORED)
        if given.get("decoder_attention_mask") is not None:
            given["decoder_attention_mask"] = _before(given["decoder_attention_mask"], embeds.shape[1], 1)
        given["decoder_inputs_embeds"] = torch.cat([embeds, words], dim=1)

    def _decoder_length(self, given: Mapping[str, Any]) -> int:
        names = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
        return int(next(given[name].shape[1] for name in names if given.get(name) is not None))


def _task(config: Any, model: Any) -> TaskType:
    """The task of a prompt, that of its model where the configuration says none."""
    if config.task_type is not None:
        return TaskType(config.task_type)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return TaskType.SEQ_2_SEQ_LM
    can = getattr(model, "can_generate", None)
    return TaskType.CAUSAL_LM if can is not None and can() else TaskType.FEATURE_EXTRACTION


@functools.cache
def _names(function: Any) -> tuple[tuple[str, ...], bool]:
    """The names of a function's parameters, without `self`, and True if it takes others too."""
    found = inspect.signature(function).parameters.values()
    names = tuple(p.name for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != "self")
    return names, any(p.kind == p.VAR_KEYWORD for p in found)


def _named(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name."""
    return {**dict(zip(_names(getattr(function, "__func__", function))[0], args, strict=False)), **kwargs}


def _takes(model: nn.Module, name: str) -> bool:
    """True if a model's forward takes an argument, or hands it on to the model inside, which does."""
    names, others = _names(type(model).forward)
    inner = getattr(model, getattr(model, "base_model_prefix", ""), None) if others else None
    return name in names or (isinstance(inner, nn.Module) and name in _names(type(inner).forward)[0])


def _counts_places(model: nn.Module) -> bool:
    """True if a model tells positions by places in the sequence alone: it learns or computes a vector for each, and
    takes no `position_ids`. Relative positions (T5) and those of the mask need none."""
    return not _takes(model, "position_ids") and any(
        "position" in name.rpartition(".")[2] for name, _ in model.named_modules()
    )


def length_of(given: Mapping[str, Any]) -> int:
    found = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
    return int(found.shape[1])


def _before(tensor: Tensor, count: int, value: int) -> Tensor:
    return torch.cat([tensor.new_full((len(tensor), count), value), tensor], dim=1)


def extend_mask(given: dict[str, Any], name: str, prompts: Prompts, rows: int, length: int) -> None:
    """Let an attention mask [rows, tokens] say what the prompts have, too."""
    mask = given.get(name)
    if mask is None:
        if prompts.mask is None:
            return
        mask = torch.ones(rows, length, dtype=torch.long, device=prompts.mask.device)
    if mask.dim() != 2:
        raise ValueError(f"`{name}` should be [rows, tokens] for a model with a prompt, got {tuple(mask.shape)}")
    if prompts.mask is None:
        given[name] = _before(mask, prompts.tokens, 1)
    else:
        given[name] = torch.cat([prompts.mask.to(mask), mask], dim=1)


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """The decoder's input for labels [rows, tokens]: one token later, after the start token; padding for -100."""
    if pad_token_id is None:
        raise ValueError("self.model.config.pad_token_id has to be defined.")
    found = torch.cat([torch.full_like(input_ids[:, :1], decoder_start_token_id), input_ids[:, :-1]], dim=1)
    return found.masked_fill(found == _IGNORED, pad_token_id)


def _types_for_cpt(config: Any, labels: Tensor, types: Tensor | None) -> Tensor:
    """Types of the tokens, the examples' and the input's, which has numbers above theirs."""
    types = torch.full_like(labels, 4) if types is None else types.to(labels.device)
    own = torch.tensor(config.cpt_tokens_type_mask, device=labels.device, dtype=types.dtype)
    return torch.cat([own.expand(len(labels), -1), torch.where(types > 0, types + own.max(), types)], dim=1)


def _labels_for_cpt(config: Any, labels: Tensor, types: Tensor) -> Tensor:
    own = torch.tensor(config.cpt_token_ids, device=labels.device, dtype=labels.dtype).expand(len(labels), -1)
    return torch.cat([own, labels], dim=1).masked_fill(~((types > 0) & (types % 4 == 0)), _IGNORED)
