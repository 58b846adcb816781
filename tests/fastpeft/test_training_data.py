"""Reading jsonl, encoding with what is learned, truncation, packing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastpeft.apps.training.data import Encoder, Example
from fastpeft.apps.training.errors import UserError
from fastpeft.apps.training.lines import JsonLines, split
from fastpeft.apps.training.order import Order
from fastpeft.apps.training.packing import Plan, collate, lay_out
from fastpeft.apps.training.testing import make_byte_tokenizer

CHAT, PLAIN = make_byte_tokenizer(chat=True), make_byte_tokenizer(chat=False)


def text(example: Example, learned: bool) -> str:
    ids = [i for i, m in zip(example.input_ids, example.learn, strict=True) if m == learned]
    decoded: str = CHAT.decode(ids)
    return decoded


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'prompt': 1}", "data.jsonl:2: not valid JSON"),
        ("[1]", "data.jsonl:2: expected a JSON object, got a list"),
        ('{"prompt": "a"}', "data.jsonl:2: missing completion (found: prompt)"),
        ("{}", "missing prompt and completion (found: nothing)"),
        ('{"prompt": "a", "completion": 3}', "data.jsonl:2: expected text in 'completion', got a number"),
        ('{"prompt": "a", "completion": " "}', "data.jsonl:2: the completion is empty"),
        ('{"messages": []}', "data.jsonl:2: messages: expected a list of messages, got a list"),
        ('{"messages": "hi"}', "expected a list of messages, got text"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "messages[0]: unknown role 'robot'"),
        ('{"messages": [{"role": "user", "content": null}]}', "messages[0]: expected text in 'content', got null"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no message has the role assistant"),
        (r'{"prompt": "a", "completion": "\ud800"}', r"data.jsonl:2: completion: \ud800 at character 0 is half of a"),
        (r'{"prompt": "a\udfff", "completion": "b"}', r"data.jsonl:2: prompt: \udfff at character 1 is half of a"),
        (r'{"messages": [{"role": "assistant", "content": "\udc00"}]}', r"messages[0].content: \udc00 at character 0"),
        ("[" * 200_000 + "]" * 200_000, "data.jsonl:2: lists or objects are nested too deeply"),
        ('{"a":' * 200_000, "data.jsonl:2: lists or objects are nested too deeply"),
        ('{"prompt": "a", "completion": ' + "1" * 5000 + "}", "data.jsonl:2: Exceeds the limit"),
        ('{"prompt": NaN, "completion": "b"}', "data.jsonl:2: expected text in 'prompt', got a number"),
        ('{"prompt": "a", "completion": [["b"]]}', "data.jsonl:2: expected text in 'completion', got a list"),
        ('{"messages": [[{"role": "user"}]]}', "data.jsonl:2: messages[0]: expected an object with role and content"),
        ('{"messages": [{"role": ["user"], "content": "x"}]}', "data.jsonl:2: messages[0]: unknown role ['user']"),
        ('{"messages": [{"role": "%s", "content": "x"}]}' % ("r" * 10**6), "data.jsonl:2: messages[0]: unknown role"),
        ('{"%s": 1}' % ("k" * 10**6), "data.jsonl:2: missing prompt and completion"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        JsonLines(str(file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_what_only_the_template_or_the_split_meets_is_named(tmp_path: Path) -> None:
    strict = make_byte_tokenizer()
    strict.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}x"
    turns = [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(UserError, match=r"d\.jsonl:7: the chat template refuses it \(TemplateError: no system turn\)"):
        Encoder(strict).dataset([("d.jsonl:7", {"messages": turns})])
    strict.chat_template = "{% for m in messages %}{{ m['name'] }}<|end|>{% endfor %}"
    named = [{"role": "user", "content": "u"}, {**turns[1], "name": "\ud800"}]
    with pytest.raises(UserError, match=r"d\.jsonl:7: \\ud800 at character 7 is half of a surrogate pair"):
        Encoder(strict).dataset([("d.jsonl:7", {"messages": named})])
    with pytest.raises(UserError, match=r"prompt: \\ud800 at character 0"):
        Encoder(PLAIN).prompt_ids("\ud800")
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(UserError, match=r"d\.jsonl:7: lists or objects are nested too deeply"):
        split([("d.jsonl:7", {"prompt": "a", "completion": "b", "more": deep})], 0.5)


def test_blank_lines_bom_and_encoding(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(
        b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\r\n\n  \n{"prompt": "c", "completion": "\xc3\xa9"}'
    )
    assert [where.rpartition(":")[2] for where, _ in JsonLines(str(file))] == ["1", "4"]
    file.write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(UserError, match=r"data\.jsonl:2: not UTF-8"):
        JsonLines(str(file))
    file.write_bytes(b"\n\n")
    with pytest.raises(UserError, match="holds no records"):
        JsonLines(str(file))
    with pytest.raises(UserError, match="is not a file"):
        JsonLines(str(tmp_path / "absent.jsonl"))


def test_only_the_completion_is_learned() -> None:
    example = Encoder(CHAT).encode({"prompt": "1+1?", "completion": "2"})
    assert text(example, learned=True) == "2<|end|>"
    assert text(example, learned=False) == "<|user|>1+1?<|end|>\n<|assistant|>"
    example = Encoder(PLAIN).encode({"prompt": "1+1=", "completion": "2"})
    assert text(example, learned=True) == "2<|end|>"
    assert text(example, learned=False) == "1+1="
    assert example.learned == 2


def test_every_assistant_turn_is_learned_and_nothing_else() -> None:
    turns = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    example = Encoder(CHAT).encode({"messages": [{"role": r, "content": c} for r, c in turns]})
    assert text(example, learned=True) == "b<|end|>d<|end|>"
    assert text(example, learned=False) == (
        "<|system|>S<|end|>\n<|user|>a<|end|>\n<|assistant|>\n<|user|>c<|end|>\n<|assistant|>"
    )


@pytest.mark.parametrize("tokenizer", [CHAT, PLAIN], ids=["chat", "plain"])
def test_a_prompt_has_the_same_tokens_in_training_and_inference(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer)
    example = encoder.encode({"prompt": "héllo ", "completion": " wörld"})
    assert example.input_ids[: example.learn.index(True)] == encoder.prompt_ids("héllo ")


def test_templates() -> None:
    with pytest.raises(UserError, match="no chat template"):
        Encoder(PLAIN, template="chat")
    with pytest.raises(UserError, match="messages need a chat template"):
        Encoder(PLAIN).encode({"messages": [{"role": "assistant", "content": "x"}]})
    assert text(Encoder(CHAT, template="plain").encode({"prompt": "a", "completion": "b"}), learned=False) == "a"
    rewriting = make_byte_tokenizer()
    rewriting.chat_template = "{{ messages|length }}{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    with pytest.raises(UserError, match="rewrites earlier turns"):
        Encoder(rewriting).encode({"messages": [{"role": r, "content": "x"} for r in ("user", "assistant")]})


def test_truncation() -> None:
    record = {"prompt": "abcdef", "completion": "uvwxyz"}  # 13 tokens with the end
    where = [("f:1", record)]
    cut = Encoder(PLAIN, max_length=9, truncate="completion").dataset(where)
    assert (text(cut.examples[0], False), text(cut.examples[0], True), cut.cut) == ("abcdef", "uvw", 1)
    cut = Encoder(PLAIN, max_length=9, truncate="prompt").dataset(where)
    assert (text(cut.examples[0], False), text(cut.examples[0], True), cut.cut) == ("ef", "uvwxyz<|end|>", 1)
    short = ("f:2", {"prompt": "a", "completion": "b"})
    dropped = Encoder(PLAIN, max_length=9, truncate="drop").dataset([*where, short])
    assert (len(dropped.examples), dropped.dropped) == (1, 1)
    with pytest.raises(UserError, match="f:1: 13 tokens are more than max_length=9"):
        Encoder(PLAIN, max_length=9, truncate="error").dataset([short, *where])
    # Cutting the completion away entirely leaves nothing to learn.
    with pytest.raises(UserError, match="no example is left"):
        Encoder(PLAIN, max_length=6, truncate="completion").dataset(where)
    assert Encoder(PLAIN, max_length=6, truncate="completion").dataset([*where, short]).dropped == 1


def examples(count: int) -> list[Example]:
    made = []
    for i in range(count):
        length = 3 + (i * 7) % 23
        made.append(Example([i] * length, [False] + [True] * (length - 1)))
    return made


def rows_of_epoch(lengths: list[int], epoch: int, seed: int, max_length: int, packing: bool) -> list[list[int]]:
    order = Order([(len(lengths), None)], seed)
    return lay_out(order.block(epoch, 0), lengths.__getitem__, order.key(epoch, 0), max_length, packing)


def test_rows_hold_every_example_once_and_are_full() -> None:
    lengths = [len(e) for e in examples(200)]
    rows = rows_of_epoch(lengths, epoch=0, seed=3, max_length=64, packing=True)
    assert sorted(i for row in rows for i in row) == list(range(200))
    fill = [sum(lengths[i] for i in row) for row in rows]
    assert max(fill) <= 64
    assert sum(fill) / (64 * len(rows)) > 0.9
    assert rows == rows_of_epoch(lengths, epoch=0, seed=3, max_length=64, packing=True)
    assert rows != rows_of_epoch(lengths, epoch=1, seed=3, max_length=64, packing=True)
    assert rows != rows_of_epoch(lengths, epoch=0, seed=4, max_length=64, packing=True)


def plan(**changes: Any) -> Plan:
    settings = {"seed": 0, "max_length": 64, "packing": False, "batch_size": 2, "gradient_accumulation": 3}
    return Plan(examples(20), **{**settings, "epochs": 1.0, "max_steps": 0, **changes})


def test_plan() -> None:
    assert len(plan()) == 4  # 20 examples, 6 a step
    assert len(plan(epochs=2.0)) == 8
    assert len(plan(epochs=1.5)) == 6
    assert len(plan(max_steps=9)) == 9
    assert [epoch for epoch, _ in plan(max_steps=9).steps] == [0] * 4 + [1] * 4 + [2]
    seen = [i for _, passes in plan().steps for rows in passes for row in rows for i in row]
    assert sorted(seen) == list(range(20))
    assert plan().fingerprint == plan(epochs=3.0).fingerprint
    assert plan().fingerprint != plan(seed=1).fingerprint


def test_collate() -> None:
    a, b, c = Example([1, 2, 3], [False, True, True]), Example([4, 5], [False, True]), Example([6, 7], [True, True])
    batch = collate([[a, b], [c]], pad_id=0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    # Each example's first token is predicted by nothing, not by the example before it.
    assert list(zip(batch.where.tolist(), batch.targets.tolist(), strict=True)) == [(0, 2), (1, 3), (3, 5), (5, 7)]
    assert batch.tokens == 7
    assert collate([[a], [c]], pad_id=0).position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_encoded_records_survive_json(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"prompt": "\u2028", "completion": "line\nbreak"}) + "\n", encoding="utf-8")
    (_, record), = JsonLines(str(file))  # fmt: skip
    assert text(Encoder(PLAIN).encode(record), learned=True) == "line\nbreak<|end|>"


MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}"
    "{% if not loop.last %}{{ m['content'][:1] }}{% else %}{{ m['content'] }}{% endif %}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_template_that_marks_what_the_assistant_writes_is_believed() -> None:
    """Also where it rewrites earlier turns, as those do that leave out what was thought."""
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = MARKED
    turns = [("user", "a"), ("assistant", "bcd"), ("user", "e"), ("assistant", "fgh")]
    record = {"messages": [{"role": r, "content": c} for r, c in turns]}
    example = Encoder(tokenizer).encode(record)
    assert text(example, learned=True) == "b<|end|>fgh<|end|>"
    assert text(example, learned=False) == (
        "<|user|>a<|end|>\n<|assistant|>\n<|user|>e<|end|>\n<|assistant|>"
    )
    one = Encoder(tokenizer).encode({"prompt": "a", "completion": "bcd"})
    assert one.input_ids[: one.learn.index(True)] == Encoder(tokenizer).prompt_ids("a")
    tokenizer.chat_template = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(UserError, match="rewrites earlier turns"):
        Encoder(tokenizer).encode(record)
    tokenizer.chat_template = MARKED.replace("'assistant' %}{%", "'tool' %}{%")
    with pytest.raises(UserError, match=r"d:3: the chat template marks nothing of it with \{% generation %\}"):
        Encoder(tokenizer).encode(record, "d:3")


def test_an_answer_that_begins_otherwise_than_it_is_asked_for_is_refused() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = f"{tokenizer.chat_template}{{% if add_generation_prompt %}}<think>{{% endif %}}"
    with pytest.raises(UserError, match=r"begins an answer otherwise than it asks for one \('.*<think>'"):
        Encoder(tokenizer).encode({"prompt": "a", "completion": "b"})
