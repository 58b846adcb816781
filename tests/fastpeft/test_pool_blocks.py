"""The blocks of rows that AdapterPool hands out."""

from __future__ import annotations

from fastpeft.pool.blocks import Occupant, RowBlocks, block_size, least_recent
from hypothesis import given, settings
from hypothesis import strategies as st


def test_block_sizes() -> None:
    assert [block_size(r) for r in (1, 4, 8, 9, 16, 17, 33, 64, 65)] == [8, 8, 8, 16, 16, 32, 64, 64, 128]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 300), st.lists(st.tuples(st.integers(1, 100), st.booleans(), st.integers(0, 99)), max_size=60))
def test_blocks_never_overlap_and_what_is_given_back_can_be_had_again(
    rows: int, steps: list[tuple[int, bool, int]]
) -> None:
    blocks = RowBlocks(rows)
    held: dict[int, int] = {}
    for rank, give, which in steps:
        if give and held:
            start = sorted(held)[which % len(held)]
            del held[start]
            blocks.give(start)
        else:
            size = block_size(rank)
            start = blocks.take(size)
            # A free region at a multiple of its size is always found.
            taken = {row for s, n in held.items() for row in range(s, s + n)}
            regions = range(0, rows // 8 * 8 - size + 1, size)
            assert (start is None) == (not any(taken.isdisjoint(range(s, s + size)) for s in regions))
            if start is not None:
                assert start % size == 0
                assert start + size <= rows
                assert taken.isdisjoint(range(start, start + size))
                held[start] = size
        assert blocks.taken == sum(held.values())
    for start in held:
        blocks.give(start)
    whole = 1 << (rows // 8 * 8).bit_length() - 1 if rows >= 8 else None
    assert whole is None or blocks.take(whole) == 0


@settings(max_examples=150, deadline=None)
@given(
    st.integers(2, 20),
    st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=20),
    st.integers(1, 64),
)
def test_victims_make_room_and_are_those_used_longest_ago(
    eights: int, adapters: list[tuple[int, bool]], rank: int
) -> None:
    blocks, size = RowBlocks(8 * eights), block_size(rank)
    occupants = []
    for key, (r, free) in enumerate(adapters):
        start = blocks.take(block_size(r))
        if start is not None:
            occupants.append(Occupant(key, start, block_size(r), used=(key * 7) % 31, free=free))
    if blocks.take(size) is not None:
        return
    victims = blocks.victims(size, occupants)
    by_key = {o.key: o for o in occupants}
    regions = range(0, 8 * eights - size + 1, size)
    inside = {s: [o for o in occupants if o.start < s + size and s < o.start + o.size] for s in regions}
    possible = {s: max(o.used for o in os) for s, os in inside.items() if all(o.free for o in os)}
    if victims is None:
        assert not possible
        return
    assert all(by_key[k].free for k in victims)
    assert max(by_key[k].used for k in victims) == min(possible.values())
    for k in victims:
        blocks.give(by_key[k].start)
    assert blocks.take(size) is not None


def test_the_least_recent_one() -> None:
    def occupant(key: int, used: int, free: bool = True) -> Occupant:
        return Occupant(key, 8 * key, 8, used, free)

    assert least_recent([]) is None
    assert least_recent([occupant(0, 5, False)]) is None
    assert least_recent([occupant(0, 5), occupant(1, 2, False), occupant(2, 3)]) == [2]
