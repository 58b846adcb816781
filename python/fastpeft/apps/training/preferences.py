"""Records of prompt, chosen and rejected answer, for learning to prefer the one (DPO)."""

from __future__ import annotations

from dataclasses import dataclass

from .data import Encoder, Example, Record, check_fields, check_messages
from .errors import UserError


@dataclass(frozen=True)
class Pair(Example):
    """Two rows one after the other: prompt and chosen answer, prompt and rejected answer; ``learn`` marks the answers.

    prompt: tokens of the prompt, the same in both rows. first: tokens of the first row.
    """

    prompt: int = 0
    first: int = 0

    @property
    def columns(self) -> dict[str, list[int]]:
        """Token ids under the names that TRL's collator reads."""
        return {
            "prompt_ids": self.input_ids[: self.prompt],
            "chosen_ids": self.input_ids[self.prompt : self.first],
            "rejected_ids": self.input_ids[self.first + self.prompt :],
        }


def make_pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> Pair:
    learn = [ids is not prompt for ids in (prompt, chosen, prompt, rejected) for _ in ids]
    return Pair(prompt + chosen + prompt + rejected, learn, len(prompt), len(prompt) + len(chosen))


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

    def encode(self, record: Record, where: str = "record") -> Pair:
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
        return make_pair(chosen[:start], chosen[start:], rejected[start:])

    def _shorten(self, example: Example, where: str) -> Pair | None:
        assert isinstance(example, Pair)
        prompt, chosen, rejected = example.columns.values()
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
            return make_pair(prompt[excess:], chosen, rejected) if excess < len(prompt) else None
        room = self.max_length - len(prompt)
        if self.truncate == "drop" or room <= 0:
            return None
        return make_pair(prompt, chosen[:room], rejected[:room])
