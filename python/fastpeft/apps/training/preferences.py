"""Records of prompt, chosen and rejected answer, for learning to prefer the one (DPO)."""

from __future__ import annotations

from .data import Encoder, Example
from .errors import UserError
from .records import Record, check_fields, check_messages


def pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> Example:
    """Two rows, one after the other: prompt and chosen answer, prompt and rejected answer; the answers are learned."""
    parts = (prompt, chosen, prompt, rejected)
    learn = [number % 2 == 1 for number, ids in enumerate(parts) for _ in ids]
    return Example([i for ids in parts for i in ids], learn)


def columns(example: Example) -> dict[str, list[int]]:
    """The parts of a pair, under the names that TRL's collator reads. A prompt has one token at least."""
    ids, prompt = example.input_ids, example.learn.index(True)
    second = example.learn.index(False, prompt)
    return {"prompt_ids": ids[:prompt], "chosen_ids": ids[prompt:second], "rejected_ids": ids[second + prompt :]}


def check_pair(record: object, where: str) -> None:
    """Raise unless ``record`` has ``prompt`` (text, or a list of messages), and text in ``chosen`` and ``rejected``."""
    messages = record.get("prompt") if isinstance(record, dict) else None
    prompts = () if isinstance(messages, list) else ("prompt",)
    check_fields(record, prompts, ("chosen", "rejected"), where, "objective=dpo needs prompt, chosen and rejected")
    if isinstance(messages, list):
        check_messages(messages, f"{where}: prompt")
        if messages[-1]["role"] == "assistant":
            raise UserError(f"{where}: the prompt ends with an assistant's turn", "leave that to chosen and rejected")
    if isinstance(record, dict) and record["chosen"] == record["rejected"]:
        raise UserError(f"{where}: chosen and rejected are the same text", "remove the line")


class PairEncoder(Encoder):
    """Turns records into pairs; each row is what `Encoder` makes of the prompt and that answer."""

    def encode(self, record: Record, where: str = "record") -> Example:
        check_pair(record, where)
        prompt = record["prompt"]
        rows = []
        for key in ("chosen", "rejected"):
            answer = record[key]
            if isinstance(prompt, list):
                given: Record = {"messages": [*prompt, {"role": "assistant", "content": answer}]}
            else:
                given = {"prompt": prompt, "completion": answer}
            rows.append(super().encode(given, where))
        # Earlier turns of the assistant are learned elsewhere; of a pair, the answer is what follows the last prompt.
        starts = [len(row) - row.learn[::-1].index(False) if False in row.learn else 0 for row in rows]
        (chosen, rejected), start = (row.input_ids for row in rows), starts[0]
        if starts[1] != start or chosen[:start] != rejected[:start]:
            raise UserError(
                f"{where}: the chat template writes the prompt otherwise before each answer", "use template=plain"
            )
        if start == 0:
            raise UserError(f"{where}: the prompt has no token", "write a prompt, or use a template that begins a turn")
        return pair(chosen[:start], chosen[start:], rejected[start:])

    def _shorten(self, example: Example, where: str) -> Example | None:
        prompt, chosen, rejected = columns(example).values()
        longest = len(prompt) + max(len(chosen), len(rejected))
        excess = longest - self.max_length
        if excess <= 0:
            return example
        if self.truncate == "error":
            raise UserError(
                f"{where}: {longest} tokens are more than max_length={self.max_length}",
                "raise max_length or set truncate",
            )
        if self.truncate == "prompt":
            return pair(prompt[excess:], chosen, rejected) if excess < len(prompt) else None
        room = self.max_length - len(prompt)
        if self.truncate == "drop" or room <= 0:
            return None
        return pair(prompt, chosen[:room], rejected[:room])
