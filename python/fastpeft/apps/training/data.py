"""From a jsonl file to token ids with a mark on what is to be learned: the completion, or the assistant's turns."""

from __future__ import annotations

import bisect
import itertools
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, overload

from .errors import UserError
from .lines import Records, digest_of
from .order import BLOCK, Order
from .records import Record, check_record, check_text, shortened

_SAMPLE = 1024  # records of a large file that are encoded to know about all


@dataclass(frozen=True)
class Example:
    """``input_ids`` and, of the same length, ``learn``: True where the token is to be predicted."""

    input_ids: list[int]
    learn: list[bool]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def learned(self) -> int:
        """Tokens that count in the loss; the first token of a sequence has nothing to be predicted from."""
        return sum(self.learn[1:])


class Kept(Sequence[Example]):
    """Examples in five bytes a token."""

    def __init__(self, examples: Iterable[Example] = ()) -> None:
        self._ids, self._learn, self._ends = array("i"), bytearray(), array("q", [0])
        for example in examples:
            self.append(example)

    def append(self, example: Example) -> None:
        self._ids.extend(example.input_ids)
        self._learn += bytes(example.learn)
        self._ends.append(len(self._ids))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = slice(self._ends[index], self._ends[index + 1])
        return Example(self._ids[part].tolist(), [bool(learned) for learned in self._learn[part]])


class Lazy(Sequence["Example | None"]):
    """Examples of records that are read and encoded when they are used; None for one that is left out.

    digest: of the records.
    """

    def __init__(self, encode: Callable[[int], Example | None], count: int, digest: str) -> None:
        self._encode, self._count, self.digest = encode, count, digest
        self._kept, self._places = Kept(), dict[int, int | None]()

    def load(self, indices: Iterable[int]) -> None:
        """Encode these, and keep them until others are loaded."""
        kept, places = Kept(), dict[int, int | None]()
        for index in sorted(set(indices)):
            example = self[index]
            places[index] = None if example is None else len(kept)
            if example is not None:
                kept.append(example)
        self._kept, self._places = kept, places

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Example | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example | None]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example | None] | None:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index in self._places:
            place = self._places[index]
            return None if place is None else self._kept[place]
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._encode(index)


class Corpus(Sequence["Example | None"]):
    """The examples of one or several files, one file after the other.

    files: examples and weight of each. parts: how many each has, and its weight.
    """

    def __init__(self, files: Sequence[tuple[Sequence[Example | None], float | None]]) -> None:
        self._files = [examples for examples, _ in files]
        self._starts = list(itertools.accumulate(map(len, self._files), initial=0))
        self.parts = [(len(examples), weight) for examples, weight in files]
        self.digest = " ".join(f.digest for f in self._files if isinstance(f, Lazy))

    @classmethod
    def of(cls, examples: Sequence[Example | None]) -> Corpus:
        return examples if isinstance(examples, cls) else cls([(examples, None)])

    def load(self, indices: Sequence[int]) -> None:
        """Encode these, and keep them until others are loaded."""
        for file, first, last in zip(self._files, self._starts, self._starts[1:], strict=False):
            if isinstance(file, Lazy):
                file.load(i - first for i in indices if first <= i < last)

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Example | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example | None]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example | None] | None:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = bisect.bisect_right(self._starts, index) - 1
        return self._files[file][index - self._starts[file]]


@dataclass
class Dataset:
    """Examples, and what happened to those that were too long.

    cut, dropped: how many. tokens, learned: of an epoch. longest: tokens of one. about: these numbers were taken from a
    sample, as not everything was encoded.
    """

    examples: Sequence[Example | None] = ()
    cut: int = 0
    dropped: int = 0
    tokens: int = 0
    learned: int = 0
    longest: int = 0
    about: bool = False

    @classmethod
    def mixed(cls, files: Sequence[Dataset], weights: Sequence[float | None]) -> Dataset:
        """All of several files, with the weight of each."""
        if len(files) == 1:
            return files[0]
        corpus = Corpus([(file.examples, weight) for file, weight in zip(files, weights, strict=True)])
        order = Order(corpus.parts, 0)
        often = [order.in_epoch(part) for part in range(len(files))]
        counts = {
            name: round(sum(getattr(file, name) * times for file, times in zip(files, often, strict=True)))
            for name in ("tokens", "learned")
        }
        longest, about = max(file.longest for file in files), any(file.about for file in files)
        cut, dropped = sum(file.cut for file in files), sum(file.dropped for file in files)
        return cls(corpus, cut, dropped, longest=longest, about=about, **counts)


@contextmanager
def _refusing(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a template is a program of the model's, which may raise anything
        raise UserError(
            f"{where}: the chat template refuses it ({type(error).__name__}: {shortened(str(error))})",
            "write the turns that the model's template takes",
        ) from error


class Encoder:
    """Turns records into examples with one tokenizer and one template rule.

    Every segment (prompt, answer, what stands between turns) is tokenized on its own, so a trained prompt has exactly
    the tokens that the same prompt has at inference, whatever the tokenizer would merge across the boundary.
    """

    def __init__(
        self, tokenizer: Any, template: str = "auto", max_length: int = 512, truncate: str = "completion"
    ) -> None:
        self.tokenizer = tokenizer
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if template == "chat" and not has_template:
            raise UserError("template=chat, but the tokenizer has no chat template", "use template=plain")
        self.chat = template == "chat" or (template == "auto" and has_template)
        self._marks = self.chat and re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()) is not None
        self.max_length = max_length
        self.truncate = truncate
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-sequence token", "set eos_token in tokenizer_config.json")

    def dataset(self, records: Records) -> Dataset:
        """Encode records; ``where`` of each names the line in errors.

        Up to `BLOCK` of them at once: they are kept, without those that are left out. More are encoded when they are
        used, and counted by a sample from all over them.
        """
        count, kept = len(records), Kept()
        result = Dataset(kept)
        chosen: Sequence[int] = range(count)
        if count > BLOCK:
            result.examples = Lazy(lambda i: self._usable(*records[i])[0], count, digest_of(records))
            result.about = True
            chosen = [i * count // _SAMPLE for i in range(_SAMPLE)]
        for i in chosen:
            example, cut = self._usable(*records[i])
            result.cut += cut
            if example is None:
                result.dropped += 1
                continue
            result.tokens += len(example)
            result.learned += example.learned
            result.longest = max(result.longest, len(example))
            if not result.about:
                kept.append(example)
        if not result.tokens:
            raise UserError(
                f"no example is left: all {result.dropped} {'of a sample ' if result.about else ''}are longer than "
                f"max_length={self.max_length}",
                "raise max_length",
            )
        for name in ("cut", "dropped", "tokens", "learned"):
            setattr(result, name, round(getattr(result, name) * count / len(chosen)))
        return result

    def _usable(self, where: str, record: Record) -> tuple[Example | None, bool]:
        """(an example of at most `max_length` tokens or None, True if it was cut)."""
        example = self.encode(record, where)
        shorter = self._shorten(example, where)
        return shorter, shorter is not None and len(shorter) < len(example)

    def encode(self, record: Record, where: str = "record") -> Example:
        check_record(record, where)
        messages = record.get("messages")
        if messages is None:
            if not self.chat:
                return self._join([(record["prompt"], False), (record["completion"], True)], start=True, end=True)
            messages = [
                {"role": "user", "content": record["prompt"]},
                {"role": "assistant", "content": record["completion"]},
            ]
        elif not self.chat:
            raise UserError(
                f"{where}: messages need a chat template, which this tokenizer lacks", "use prompt and completion"
            )
        return self._join(self._segments(messages, where), start=False, end=False)

    def prompt_ids(self, prompt: str) -> list[int]:
        """The tokens in front of the answer to ``prompt``, the same at training and at inference."""
        check_text(prompt, "prompt")
        if not self.chat:
            return self._start() + self._tokens(prompt)
        return self._tokens(self._render([{"role": "user", "content": prompt}], generate=True))

    def _segments(self, messages: list[dict[str, str]], where: str) -> list[tuple[str, bool]]:
        """The rendered conversation cut at the bounds of the assistant's turns: where the template marks them, else
        where the renderings of its beginnings end."""
        if self._marks:
            return self._marked(messages, where)
        segments: list[tuple[str, bool]] = []
        done = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], generate=True, where=where)
            after = self._render(messages[: index + 1], generate=False, where=where)
            if not before.startswith(done):
                raise UserError(
                    f"{where}: the chat template rewrites earlier turns, so what is to be learned cannot be cut out",
                    "use prompt and completion, one assistant turn a record, or a template with {% generation %}",
                )
            if not after.startswith(before):
                raise UserError(
                    f"{where}: the chat template rewrites earlier turns, or begins an answer otherwise than it asks "
                    f"for one ({shortened(repr(before[-40:]))}), so what is to be learned cannot be cut out",
                    "use template=plain with prompt and completion, or a template with {% generation %}",
                )
            segments += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
        return segments

    def _marked(self, messages: list[dict[str, str]], where: str) -> list[tuple[str, bool]]:
        """Segments by a template that says with ``{% generation %}`` what the assistant writes."""
        from transformers.utils.chat_template_utils import render_jinja_template

        with _refusing(where):
            rendered: Any = render_jinja_template(
                [[{k: v for k, v in m.items() if v is not None} for m in messages]],
                chat_template=self.tokenizer.get_chat_template(), return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )  # fmt: skip
        (text,), (ranges,) = rendered
        check_text(text, where)
        segments: list[tuple[str, bool]] = []
        done = 0
        for first, last in ranges:
            segments += [(text[done:first], False), (text[first:last], True)]
            done = last
        if not any(learned and part for part, learned in segments):
            raise UserError(
                f"{where}: the chat template marks nothing of it with {{% generation %}}",
                "correct the template, or use template=plain with prompt and completion",
            )
        return segments

    def _render(self, messages: list[dict[str, str]], generate: bool, where: str = "prompt") -> str:
        with _refusing(where):
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        check_text(text, where)
        return text

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _start(self) -> list[int]:
        """The tokens that this tokenizer puts in front of plain text, usually none or the begin token."""
        bos = self.tokenizer.bos_token_id
        first: list[int] = self.tokenizer("a")["input_ids"][:1]
        return [bos] if bos is not None and first == [bos] else []

    def _join(self, segments: list[tuple[str, bool]], start: bool, end: bool) -> Example:
        ids = self._start() if start else []
        learn = [False] * len(ids)
        eos = self.tokenizer.eos_token_id
        for text, learned in segments:
            tokens = self._tokens(text)
            marks = [learned] * len(tokens)
            if learned and eos in tokens:  # a template's newline after the end token is never generated
                last = len(tokens) - 1 - tokens[::-1].index(eos)
                marks[last + 1 :] = [False] * (len(tokens) - last - 1)
            ids += tokens
            learn += marks
        if end:
            ids.append(eos)
            learn.append(True)
        while learn and not learn[-1]:  # nothing learns from what follows the last learned token
            ids.pop()
            learn.pop()
        return Example(ids, learn)

    def _shorten(self, example: Example, where: str) -> Example | None:
        excess = len(example) - self.max_length
        if excess <= 0:
            return example
        if self.truncate == "error":
            raise UserError(
                f"{where}: {len(example)} tokens are more than max_length={self.max_length}",
                "raise max_length or set truncate",
            )
        if self.truncate == "drop":
            return None
        if self.truncate == "completion":
            shorter = Example(example.input_ids[: self.max_length], example.learn[: self.max_length])
        else:
            shorter = Example(example.input_ids[excess:], example.learn[excess:])
        return shorter if shorter.learned else None
