"""Block tables, reference counts, prefix sharing and eviction, against tables of examples and a naive oracle."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headrace.cache.block_manager import BlockManager, TokenReader
from headrace.errors import ConfigError

Tokens = tuple[int, ...]


def reader(token_ids: Tokens) -> TokenReader:
    return lambda start, stop: token_ids[start:stop]


def admit(manager: BlockManager, seq_id: int, token_ids: Tokens) -> int:
    """Allocate with whatever the cache has; returns the tokens found there."""
    shared = manager.cached_prefix(reader(token_ids), len(token_ids))
    manager.allocate(seq_id, len(token_ids), shared)
    return len(shared) * manager.block_size


def compute(manager: BlockManager, seq_id: int, token_ids: Tokens) -> None:
    """Admit a sequence and declare all of it computed."""
    admit(manager, seq_id, token_ids)
    manager.commit(seq_id, reader(token_ids), len(token_ids))


def num_cached(manager: BlockManager, token_ids: Tokens) -> int:
    return len(manager.cached_prefix(reader(token_ids), len(token_ids))) * manager.block_size


def snapshot(manager: BlockManager, token_ids: Tokens, seq_ids: tuple[int, ...]) -> tuple[object, ...]:
    tables = tuple(manager.block_table(seq_id) for seq_id in seq_ids)
    return manager.num_free_blocks, manager.num_cached_blocks, num_cached(manager, token_ids), tables


@pytest.mark.parametrize(("num_blocks", "block_size", "name"), [(0, 4, "num_blocks"), (4, 0, "block_size")])
def test_sizes_must_be_positive(num_blocks: int, block_size: int, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0; it must be a whole number of at least 1"):
        BlockManager(num_blocks, block_size, enable_prefix_caching=True)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3), (40, 10)])
def test_allocate_takes_whole_blocks(num_tokens: int, num_blocks: int) -> None:
    manager = BlockManager(10, 4, enable_prefix_caching=True)
    table = manager.allocate(7, num_tokens)
    assert len(table) == len(set(table)) == num_blocks == manager.num_blocks_for(num_tokens)
    assert manager.block_table(7) == table
    assert manager.num_free_blocks == 10 - num_blocks
    assert manager.usage == pytest.approx(num_blocks / 10)
    manager.free(7)
    assert manager.num_free_blocks == 10


def test_append_adds_a_block_only_at_a_boundary() -> None:
    manager = BlockManager(10, 4, enable_prefix_caching=True)
    manager.allocate(0, 3)
    assert [len(manager.try_append(0, n)) for n in range(3, 14)] == [0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1]
    assert len(manager.try_append(0, 24)) == 2
    assert manager.try_append(0, 1) == ()


@pytest.mark.parametrize(
    ("cached", "asked", "expected"),
    [
        ((), (1, 2, 3, 4, 5), 0),
        ((1, 2, 3), (1, 2, 3, 4, 5), 0),
        ((1, 2, 3, 4), (1, 2, 3, 4, 5), 4),
        ((1, 2, 3, 4), (1, 2, 3, 4), 0),
        ((1, 2, 3, 4), (1, 2), 0),
        ((1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 6, 7), 4),
        ((1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 3, 4, 5, 6, 7, 8), 4),
        ((1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 3, 4, 5, 6, 7, 8, 9), 8),
        ((1, 2, 3, 4, 5, 6, 7, 8), (9, 2, 3, 4, 5, 6, 7, 8, 9), 0),
        ((1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 3, 4, 5, 6, 7, 9, 9), 4),
        ((1, 2, 3, 4, 5, 6, 7, 8), (5, 6, 7, 8, 1, 2, 3, 4, 9), 0),
    ],
)
@pytest.mark.parametrize("is_alive", [True, False], ids=["alive", "freed"])
def test_prefix_hit(cached: Tokens, asked: Tokens, expected: int, is_alive: bool) -> None:
    manager = BlockManager(10, 4, enable_prefix_caching=True)
    compute(manager, 0, cached)
    head = manager.block_table(0)
    if not is_alive:
        manager.free(0)
    assert admit(manager, 1, asked) == expected
    assert manager.block_table(1)[: expected // 4] == head[: expected // 4]
    assert not set(manager.block_table(1)[expected // 4 :]) & set(head if is_alive else ())
    manager.check_integrity()


def test_blocks_are_found_only_once_computed() -> None:
    manager = BlockManager(10, 2, enable_prefix_caching=True)
    tokens = (1, 2, 3, 4, 5, 6, 7)
    admit(manager, 0, tokens)
    found = []
    for num_computed_tokens in range(8):
        manager.commit(0, reader(tokens), num_computed_tokens)
        found.append(num_cached(manager, tokens))
    assert found == [0, 0, 2, 2, 4, 4, 6, 6]
    manager.commit(0, reader(tokens), 3)
    assert num_cached(manager, tokens) == 6


def test_nothing_is_found_without_prefix_caching() -> None:
    manager = BlockManager(10, 2, enable_prefix_caching=False)
    compute(manager, 0, (1, 2, 3, 4))
    assert num_cached(manager, (1, 2, 3, 4, 5)) == 0
    assert manager.num_cached_blocks == 0


def test_equal_blocks_computed_side_by_side_are_both_kept() -> None:
    manager = BlockManager(10, 2, enable_prefix_caching=True)
    tokens = (1, 2, 3, 4, 5)
    for seq_id in (0, 1):
        manager.allocate(seq_id, 5)
    for seq_id in (0, 1):
        manager.commit(seq_id, reader(tokens), 5)
    assert manager.cached_prefix(reader(tokens), 5) == manager.block_table(0)[:2]
    manager.free(0)
    assert manager.cached_prefix(reader(tokens), 5) == manager.block_table(1)[:2], "a held block costs no free one"
    manager.allocate(2, 14)  # evicts the copies of the first sequence
    assert num_cached(manager, tokens) == 4
    manager.check_integrity()


@pytest.mark.parametrize("enable_prefix_caching", [True, False], ids=["caching", "no_caching"])
@pytest.mark.parametrize(
    ("num_computed_tokens", "num_tokens", "num_shared"),
    [(0, 9, 0), (3, 9, 0), (7, 9, 1), (9, 9, 2), (9, 7, 1), (9, 3, 0)],
)
def test_fork_shares_full_computed_blocks(
    enable_prefix_caching: bool, num_computed_tokens: int, num_tokens: int, num_shared: int
) -> None:
    manager = BlockManager(10, 4, enable_prefix_caching)
    tokens = tuple(range(9))
    manager.allocate(0, 9)
    manager.commit(0, reader(tokens), num_computed_tokens)
    shared = manager.forkable_prefix(0, num_tokens)
    assert shared == manager.block_table(0)[:num_shared]
    table = manager.allocate(1, 9, shared)
    assert table[:num_shared] == shared
    assert manager.num_free_blocks == 10 - 3 - (3 - num_shared)
    manager.check_integrity()
    manager.free(0)
    manager.check_integrity()
    assert manager.block_table(1) == table
    manager.free(1)
    assert manager.num_free_blocks == 10


def test_least_recently_used_goes_first_and_tails_before_heads() -> None:
    manager = BlockManager(5, 2, enable_prefix_caching=True)
    old, young = (1, 2, 3, 4), (5, 6, 7, 8)
    compute(manager, 0, old)
    compute(manager, 1, young)
    manager.free(0)
    manager.free(1)
    found = []
    for num_blocks in range(6):
        manager.allocate(9, num_blocks * 2)
        found.append((num_cached(manager, (*old, 0)), num_cached(manager, (*young, 0))))
        manager.free(9)
        manager.check_integrity()
    assert found == [(4, 4), (4, 4), (2, 4), (0, 4), (0, 2), (0, 0)]


def test_a_hit_makes_a_prefix_recent() -> None:
    manager = BlockManager(4, 2, enable_prefix_caching=True)
    first, second = (1, 2), (3, 4)
    compute(manager, 0, first)
    compute(manager, 1, second)
    manager.free(0)
    manager.free(1)
    assert admit(manager, 2, (*first, 9)) == 2
    manager.free(2)
    manager.allocate(3, 6)
    assert (num_cached(manager, (*first, 9)), num_cached(manager, (*second, 9))) == (2, 0)


def test_blocks_without_content_are_used_before_cached_ones_are_evicted() -> None:
    manager = BlockManager(4, 2, enable_prefix_caching=True)
    compute(manager, 0, (1, 2, 3, 4, 5))
    manager.free(0)
    manager.allocate(1, 4)
    assert num_cached(manager, (1, 2, 3, 4, 5)) == 4


def test_reuse_of_free_cached_blocks_needs_room_too() -> None:
    manager = BlockManager(3, 2, enable_prefix_caching=True)
    compute(manager, 0, (1, 2, 3, 4))
    manager.free(0)
    manager.allocate(1, 2)
    shared = manager.cached_prefix(reader((1, 2, 3, 4, 5)), 5)
    assert len(shared) == 2
    assert not manager.can_allocate(5, shared), "two of the two free blocks are the shared ones"
    assert manager.can_allocate(4, shared)
    assert not manager.can_allocate(4, shared, num_reserved_blocks=1)


def test_refusals_leave_everything_as_it_was() -> None:
    manager = BlockManager(4, 2, enable_prefix_caching=True)
    tokens = (1, 2, 3, 4, 5)
    compute(manager, 0, tokens)
    before = snapshot(manager, tokens, (0,))
    shared = manager.cached_prefix(reader(tokens), 5)
    with pytest.raises(RuntimeError, match=r"sequence 1 needs room for 8 tokens \(4 blocks\), but only 1 of 4 blocks"):
        manager.allocate(1, 8, shared)
    assert manager.try_append(0, 9) is None
    with pytest.raises(ValueError, match="sequence 0 holds blocks already"):
        manager.allocate(0, 2)
    with pytest.raises(ValueError, match="2 shared blocks of 2 tokens exceed 3 tokens"):
        manager.allocate(1, 3, shared)
    with pytest.raises(ValueError, match="sequence 0 has room for 6 tokens, but 8 are said to be computed"):
        manager.commit(0, reader((*tokens, 6, 7, 8)), 8)
    assert snapshot(manager, tokens, (0,)) == before
    manager.check_integrity()


@pytest.mark.parametrize("method", ["block_table", "free", "try_append", "commit", "forkable_prefix"])
def test_unknown_sequence(method: str) -> None:
    manager = BlockManager(4, 2, enable_prefix_caching=True)
    arguments = {"try_append": (1,), "forkable_prefix": (1,), "commit": (reader((1, 2)), 2)}
    with pytest.raises(ValueError, match=r"sequence 5 holds no block table; allocate\(\) one first"):
        getattr(manager, method)(5, *arguments.get(method, ()))


def test_check_integrity_sees_damage() -> None:
    manager = BlockManager(4, 2, enable_prefix_caching=True)
    compute(manager, 0, (1, 2, 3, 4, 5))
    manager.check_integrity()
    manager._ref_count[manager.block_table(0)[0]] += 1
    with pytest.raises(AssertionError, match="reference count of block"):
        manager.check_integrity()


class CollidingToken(int):
    """A token id whose hash says nothing; tuples of equal length then all have one hash."""

    def __hash__(self) -> int:
        return 0


def random_history(seed: int, token_type: type[int]) -> list[object]:
    """What a random run of a small cache shows from outside."""
    rng = random.Random(seed)
    manager = BlockManager(12, 2, enable_prefix_caching=True)
    alive: dict[int, Tokens] = {}
    seen: list[object] = []
    for seq_id in range(60):
        tokens = tuple(token_type(rng.randrange(3)) for _ in range(rng.randrange(1, 9)))
        shared = manager.cached_prefix(reader(tokens), len(tokens))
        if manager.can_allocate(len(tokens), shared):
            seen.append((shared, manager.allocate(seq_id, len(tokens), shared)))
            manager.commit(seq_id, reader(tokens), len(tokens))
            alive[seq_id] = tokens
        while len(alive) > rng.randrange(4):
            victim = rng.choice(sorted(alive))
            manager.free(victim)
            del alive[victim]
        manager.check_integrity()
        seen.append((manager.num_free_blocks, manager.num_cached_blocks))
    return seen


@pytest.mark.parametrize("seed", range(5))
def test_behaviour_is_the_same_when_every_hash_collides(seed: int) -> None:
    one, other = ((CollidingToken(1), CollidingToken(2)), (CollidingToken(0), CollidingToken(1)))
    assert hash(one) == hash(other)
    assert one != other
    history = random_history(seed, int)
    assert history == random_history(seed, CollidingToken)
    assert any(isinstance(event, tuple) and event[0] for event in history), "no hit: the run proves nothing"


class BlockManagerMachine(RuleBasedStateMachine):
    """Random use of a small cache beside a model that remembers what every block holds."""

    @initialize(num_blocks=st.integers(1, 10), block_size=st.integers(1, 3), enable=st.booleans())
    def start(self, num_blocks: int, block_size: int, enable: bool) -> None:
        self.manager = BlockManager(num_blocks, block_size, enable)
        self.tokens: dict[int, Tokens] = {}
        self.num_computed: dict[int, int] = {}
        # All tokens up to the end of the block, for every block that was published and not given away since.
        self.content: dict[int, Tokens] = {}
        self.next_id = 0

    def longest_cached_prefix(self, tokens: Tokens) -> int:
        size, published = self.manager.block_size, set(self.content.values())
        num_tokens = 0
        while num_tokens + size < len(tokens) and tokens[: num_tokens + size] in published:
            num_tokens += size
        return num_tokens

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.tokens)))

    def open_table(self, tokens: Tokens, shared: tuple[int, ...]) -> None:
        seq_id, size = self.next_id, self.manager.block_size
        for index, block_id in enumerate(shared):
            if self.manager.enable_prefix_caching:
                assert self.content[block_id] == tokens[: (index + 1) * size]
        if not self.manager.can_allocate(len(tokens), shared):
            with pytest.raises(RuntimeError):
                self.manager.allocate(seq_id, len(tokens), shared)
            return
        table = self.manager.allocate(seq_id, len(tokens), shared)
        assert table[: len(shared)] == shared
        for block_id in table[len(shared) :]:
            self.content.pop(block_id, None)
        self.next_id += 1
        self.tokens[seq_id], self.num_computed[seq_id] = tokens, len(shared) * size

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12).map(tuple))
    def admit(self, tokens: Tokens) -> None:
        shared = self.manager.cached_prefix(reader(tokens), len(tokens))
        assert len(shared) * self.manager.block_size == self.longest_cached_prefix(tokens)
        self.open_table(tokens, shared)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = self.pick(data)
        tokens = self.tokens[parent][: data.draw(st.integers(1, len(self.tokens[parent])))]
        shared = self.manager.forkable_prefix(parent, len(tokens))
        num_full = min(self.num_computed[parent], len(tokens)) // self.manager.block_size
        assert shared == self.manager.block_table(parent)[:num_full]
        self.open_table(tokens, shared)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), max_size=5).map(tuple))
    def append(self, data: st.DataObject, more: Tokens) -> None:
        seq_id = self.pick(data)
        tokens = (*self.tokens[seq_id], *more)
        before = self.manager.block_table(seq_id)
        num_missing = self.manager.num_blocks_for(len(tokens)) - len(before)
        has_room = num_missing <= self.manager.num_free_blocks
        new = self.manager.try_append(seq_id, len(tokens))
        if not has_room:
            assert new is None
            assert self.manager.block_table(seq_id) == before
            return
        assert self.manager.block_table(seq_id) == (*before, *new)
        assert len(before) + len(new) == self.manager.num_blocks_for(len(tokens))
        self.tokens[seq_id] = tokens
        for block_id in new:
            self.content.pop(block_id, None)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        seq_id = self.pick(data)
        tokens, size = self.tokens[seq_id], self.manager.block_size
        num_computed = data.draw(st.integers(self.num_computed[seq_id], len(tokens)))
        self.manager.commit(seq_id, reader(tokens), num_computed)
        if self.manager.enable_prefix_caching:
            for index in range(num_computed // size):
                self.content[self.manager.block_table(seq_id)[index]] = tokens[: (index + 1) * size]
        self.num_computed[seq_id] = num_computed

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        seq_id = self.pick(data)
        self.manager.free(seq_id)
        del self.tokens[seq_id], self.num_computed[seq_id]

    @invariant()
    def is_sound(self) -> None:
        self.manager.check_integrity()
        held = {block_id for seq_id in self.tokens for block_id in self.manager.block_table(seq_id)}
        assert self.manager.num_free_blocks == self.manager.num_blocks - len(held)
        assert self.manager.num_cached_blocks == len(self.content)


BlockManagerMachine.TestCase.settings = settings(deadline=None, max_examples=200, stateful_step_count=40)
TestBlockManagerMachine = BlockManagerMachine.TestCase
