"""Triton's last IR above machine code, TTGIR, read for a form that its pipeliner gets wrong on Blackwell.

Two products of a loop that add to one accumulator (`acc = dot(a, b, acc); acc = dot(c, d, acc)`) may be put into
different stages there, so that the first of the next pass starts before the second of this one has ended
(triton-lang/triton#10821; Triton 3.6 to 3.8, tiles of 64 rows and more on sm_100). Nothing in the machine code says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

Flow = frozenset[int]  # products, by their line in the text, whose sums a value or a piece of tensor memory may hold
NONE: Flow = frozenset()
_VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
_OP = re.compile(r"(?:(%[\w$.-]+)(?::(\d+))? = )?\"?([a-z_]+\.[\w.]+)\"?")
_PRODUCTS = {"tt.dot", "ttng.warp_group_dot", "ttng.tc_gen5_mma", "ttng.tc_gen5_mma_scaled"}
# what changes a value's layout, or each of its elements: a sum stays the sum that it was
_THROUGH = ("arith.", "math.", "ttg.convert_layout", "tt.reshape", "tt.trans", "ttng.warp_group_dot_wait")
_VIEWS = ("ttg.memdesc_", "ttng.tmem_subslice")
_UNREAD = ("scf.while", "ttg.warp_specialize", "cf.")


@dataclass
class _Block:
    """Lines of a region, and blocks in their places."""

    head: str = ""
    number: int = 0
    place: str = ""  # in the source
    body: list[_Block] = field(default_factory=list)
    other: list[_Block] | None = None  # of an scf.if


def shared_accumulators(text: str) -> int:
    """Products on tensor cores, in loops, that add to what another product of the same loop has summed.

    Through registers, tensor memory, branches and from one pass to the next. ValueError: control flow that is not read.
    """
    return len(_Reader(text).found)


class _Reader:
    def __init__(self, text: str) -> None:
        self.mma = {m[1] for m in re.finditer(r"^(#\w+) = #ttg\.nvidia_mma<", text, re.M)}
        self.values: dict[str, Flow] = {}
        self.memory: dict[str, Flow] = {}
        self.views: dict[str, str] = {}
        self.loop_of: dict[int, int] = {}
        self.whole: dict[int, str] = {}  # of a product the source's, where the compiler may have made several of one
        self.found: set[tuple[int, int]] = set()
        self.block(_parse(text), 0)

    def root(self, name: str) -> str:
        return self.views.get(name, name)

    def block(self, lines: list[_Block], loop: int) -> list[Flow]:
        """Values that the region yields. loop: the line of the innermost loop around it, 0 where there is none."""
        yields: list[Flow] = []
        for line in lines:
            m = _OP.match(line.head)
            if m is None:
                self.block(line.body, loop)
                continue
            name, op = m[1], m[3]
            used = _VALUE.findall(re.sub(r"\[[^]]*\]", "", line.head[m.end() :].split(" : ")[0]))  # without tokens
            if op.startswith(_UNREAD):
                raise ValueError(f"TTGIR has {op}, which bench/static/ttgir.py does not read: {line.head}")
            if op == "scf.yield":
                yields = [self.values.get(v, NONE) for v in used]
            elif op == "scf.for":
                self.for_loop(line, name)
            elif op == "scf.if":
                self.branches(line, name, loop)
            elif op in _PRODUCTS:
                self.product(line, name, op, used, loop)
            else:
                self.plain(line, name, int(m[2] or 1), op, used)
                self.block(line.body, loop)
        return yields

    def assign(self, name: str | None, flows: list[Flow]) -> None:
        if name is not None:
            names = [name] if len(flows) == 1 else [f"{name}#{i}" for i in range(len(flows))]
            self.values.update(zip(names, flows, strict=True))

    def for_loop(self, line: _Block, name: str | None) -> None:
        m = re.search(r"iter_args\((.*?)\) ->", line.head)
        pairs = [pair.split(" = ") for pair in m[1].split(", ")] if m else []
        carried = [self.values.get(init, NONE) for _, init in pairs]
        while True:  # until nothing new comes around
            before = (list(carried), dict(self.memory), set(self.found))
            self.values.update(zip((argument for argument, _ in pairs), carried, strict=True))
            yields = self.block(line.body, line.number)
            carried = [a | b for a, b in zip(carried, yields, strict=True)] if pairs else []
            for place, flow in before[1].items():  # it may make no pass
                self.memory[place] = self.memory.get(place, NONE) | flow
            if before == (carried, self.memory, self.found):
                break
        self.assign(name, carried)

    def branches(self, line: _Block, name: str | None, loop: int) -> None:
        start = dict(self.memory)
        first = self.block(line.body, loop)
        after, self.memory = self.memory, start
        second = self.block(line.other or [], loop)
        for place, flow in after.items():
            self.memory[place] = self.memory.get(place, NONE) | flow
        if first:
            self.assign(name, [a | b for a, b in zip(first, second, strict=True)])

    def product(self, line: _Block, name: str | None, op: str, used: list[str], loop: int) -> None:
        layout = re.search(r"(#\w+)>$", line.head)
        if op == "tt.dot" and (layout is None or layout[1] not in self.mma):
            return  # on the float32 units, in order
        in_memory = op.startswith("ttng.tc_gen5")
        place = self.root(used[2])
        added = self.memory.get(place, NONE) if in_memory else self.values.get(used[2], NONE)
        if in_memory and used[3] == "%false":  # does not add
            added = NONE
        self.loop_of[line.number] = loop
        # with its left operand in registers a warp group's product is cut into several, in order and on purpose
        self.whole[line.number] = line.place if op == "ttng.warp_group_dot" else str(line.number)
        for a in added:
            if loop and self.loop_of[a] == loop and self.whole[a] != self.whole[line.number]:
                self.found.add((a, line.number))
        if in_memory:
            self.memory[place] = frozenset({line.number})
        else:
            self.assign(name, [frozenset({line.number})])

    def plain(self, line: _Block, name: str | None, results: int, op: str, used: list[str]) -> None:
        if op == "ttng.tmem_store":
            place = self.root(used[1])
            certain = used[-1] == "%true"
            self.memory[place] = self.values.get(used[0], NONE) | (NONE if certain else self.memory.get(place, NONE))
        elif name is None:
            return
        elif op == "ttng.tmem_alloc":
            self.memory[name] = self.values.get(used[0], NONE) if used else NONE
        elif op == "ttng.tmem_load":
            self.assign(name, [self.memory.get(self.root(used[0]), NONE)])
        elif op.startswith(_VIEWS):
            self.views[name] = self.root(used[0])
        elif op.startswith(_THROUGH):
            flows = [self.values.get(v, NONE) for v in used]
            self.assign(name, flows if results > 1 else [NONE.union(*flows)])


def _parse(text: str) -> list[_Block]:
    """The text's lines, each with the regions that it opens."""
    top: list[_Block] = []
    open_blocks: list[list[_Block]] = [top]
    for number, raw in enumerate(text.splitlines(), 1):
        line, _, place = raw.strip().partition(" loc(")
        if not line or line.startswith(("#", "//", "^bb")):
            continue
        if line.startswith("} else {"):
            open_blocks.pop()
            owner = open_blocks[-1][-1]
            owner.other = []
            open_blocks.append(owner.other)
            continue
        if line.startswith("}"):
            open_blocks.pop()
            continue
        block = _Block(line, number, place)
        open_blocks[-1].append(block)
        if raw.rstrip().endswith("{"):
            open_blocks.append(block.body)
    return top
