"""Which physical KV block belongs to which sequence: ids and counts only, no tensors.

A sequence's block table lists the blocks that hold its tokens, `block_size` tokens each. Two sequences may hold the
same block if it is full and they agree on every token up to its end, because a token's keys and values depend on all
tokens before it. Blocks that nobody holds stay findable by their content until their room is needed.

Prefixes are compared, never only hashed: the cached blocks form a tree whose edges are the token ids of one full block,
so reaching a node means that every token from the first one on was equal, whatever the hash function did.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from headrace.config.checks import check_at_least_one

# Token ids of positions start to stop. A function, so that a decode step does not build the whole sequence.
TokenReader = Callable[[int, int], tuple[int, ...]]


@dataclass(eq=False, slots=True)
class _PrefixNode:
    """The tokens from a sequence's first one to the end of some full block; the root is the empty prefix.

    token_ids: of the last block alone.
    block_ids: the blocks that hold it, in order of publication; more than one where sequences computed it side by side.
    """

    parent: "_PrefixNode | None"
    token_ids: tuple[int, ...]
    block_ids: list[int] = field(default_factory=list)
    children: "dict[tuple[int, ...], _PrefixNode]" = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class _BlockTable:
    """Blocks of one live sequence.

    num_full_blocks: how many, from the first, are full of computed tokens and never written again.
    prefix: where those full blocks end in the tree; stays at the root without prefix caching.
    """

    block_ids: list[int]
    num_full_blocks: int
    prefix: _PrefixNode


class BlockManager:
    """Gives blocks to sequences, shares them by prefix, and takes them back.

    Owns the block tables, the reference counts, the free list and the tree of cached prefixes. Knows nothing about
    tensors, steps or queues. Every change is all or nothing: a call that raises has changed nothing.

    Invariants (`check_integrity`):
        free + used == num_blocks, and no block is both.
        ref_count[b] == number of tables that hold b; no table holds a block twice.
        A cached block belongs to one node; the full blocks of a table follow one path down the tree.
        A node's parent holds a block too: what is evicted first is what no other cached prefix is built on.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        check_at_least_one("num_blocks", num_blocks)
        check_at_least_one("block_size", block_size)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_count = [0] * num_blocks
        # In order of reuse: blocks without content first, then the least recently used.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._tables: dict[int, _BlockTable] = {}
        self._root = _PrefixNode(None, ())
        self._node_of: dict[int, _PrefixNode] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds, those with reusable content included."""
        return len(self._free)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that can be found by their content, held or not."""
        return len(self._node_of)

    @property
    def usage(self) -> float:
        """Fraction of the blocks held by sequences."""
        return 1 - len(self._free) / self.num_blocks

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def block_table(self, seq_id: int) -> tuple[int, ...]:
        return tuple(self._table(seq_id).block_ids)

    def cached_prefix(self, tokens: TokenReader, num_tokens: int) -> tuple[int, ...]:
        """Blocks that hold the longest cached prefix of a sequence of num_tokens tokens, in order.

        Never all of its tokens: at least one is left to compute, since the cache holds no logits. The blocks are not
        taken yet; hand them to `allocate` before anything else changes.
        """
        block_ids: list[int] = []
        node = self._root
        for start in range(0, num_tokens - self.block_size, self.block_size):
            child = node.children.get(tokens(start, start + self.block_size))
            if child is None:
                break
            # Of equal blocks, one that is held anyway costs no free block.
            block_ids.append(max(child.block_ids, key=self._ref_count.__getitem__))
            node = child
        return tuple(block_ids)

    def forkable_prefix(self, parent_seq_id: int, num_tokens: int) -> tuple[int, ...]:
        """The parent's full computed blocks among its first num_tokens tokens, with or without prefix caching.

        A partial last block is left out and computed again by the child: nobody writes to a shared block, so nothing is
        copied on write.
        """
        parent = self._table(parent_seq_id)
        return tuple(parent.block_ids[: min(num_tokens // self.block_size, parent.num_full_blocks)])

    def can_allocate(self, num_tokens: int, shared: tuple[int, ...] = (), num_reserved_blocks: int = 0) -> bool:
        """Whether `allocate` would succeed and leave num_reserved_blocks free."""
        num_revived = sum(not self._ref_count[block_id] for block_id in shared)
        num_new = self.num_blocks_for(num_tokens) - len(shared)
        return num_new + num_revived + num_reserved_blocks <= len(self._free)

    def allocate(self, seq_id: int, num_tokens: int, shared: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Open the table of a new sequence with room for num_tokens tokens; returns all of its blocks.

        shared: what `cached_prefix` or `forkable_prefix` returned; held in common instead of taken from the free list.

        Raises:
            ValueError: the sequence has a table already, or shares more than its num_tokens tokens.
            RuntimeError: too few free blocks; ask `can_allocate` first.
        """
        if seq_id in self._tables:
            raise ValueError(f"sequence {seq_id} holds blocks already; free() it before it is allocated again")
        if len(shared) * self.block_size > num_tokens:
            raise ValueError(f"{len(shared)} shared blocks of {self.block_size} tokens exceed {num_tokens} tokens")
        if not self.can_allocate(num_tokens, shared):
            raise self._out_of_blocks(seq_id, num_tokens)
        for block_id in shared:
            self._hold(block_id)
        new = [self._take_free_block() for _ in range(self.num_blocks_for(num_tokens) - len(shared))]
        prefix = self._node_of.get(shared[-1], self._root) if shared else self._root
        self._tables[seq_id] = _BlockTable([*shared, *new], len(shared), prefix)
        return (*shared, *new)

    def try_append(self, seq_id: int, num_tokens: int) -> tuple[int, ...] | None:
        """Grow a table until it has room for num_tokens tokens in all; returns the blocks added, often none.

        None if too few blocks are free, and then nothing has changed.
        """
        block_ids = self._table(seq_id).block_ids
        if num_tokens <= len(block_ids) * self.block_size:
            return ()
        num_missing = self.num_blocks_for(num_tokens) - len(block_ids)
        if num_missing > len(self._free):
            return None
        new = tuple([self._take_free_block() for _ in range(num_missing)])
        block_ids.extend(new)
        return new

    def commit(self, seq_id: int, tokens: TokenReader, num_computed_tokens: int) -> None:
        """Declare the sequence's first num_computed_tokens tokens computed, and publish the blocks they fill.

        A block whose content is published already is kept beside the first one.
        """
        table = self._table(seq_id)
        num_full_blocks = num_computed_tokens // self.block_size
        if num_full_blocks <= table.num_full_blocks:
            return
        if num_full_blocks > len(table.block_ids):
            raise ValueError(
                f"sequence {seq_id} has room for {len(table.block_ids) * self.block_size} tokens, "
                f"but {num_computed_tokens} are said to be computed"
            )
        if self.enable_prefix_caching:
            for index in range(table.num_full_blocks, num_full_blocks):
                start = index * self.block_size
                table.prefix = self._publish(
                    table.prefix, tokens(start, start + self.block_size), table.block_ids[index]
                )
        table.num_full_blocks = num_full_blocks

    def free(self, seq_id: int) -> None:
        """Close a table. Its cached blocks can be found until they are evicted, the last of the sequence first."""
        table = self._tables.pop(seq_id, None)
        if table is None:
            raise ValueError(f"sequence {seq_id} holds no block table; allocate() one first")
        for block_id in reversed(table.block_ids):
            self._ref_count[block_id] -= 1
            if not self._ref_count[block_id]:
                self._free[block_id] = None
                if block_id not in self._node_of:
                    self._free.move_to_end(block_id, last=False)

    def check_integrity(self) -> None:
        """Raise AssertionError if an invariant of the class is broken. Walks everything: for tests and debugging."""
        held = [block_id for table in self._tables.values() for block_id in table.block_ids]
        for block_id in range(self.num_blocks):
            assert self._ref_count[block_id] == held.count(block_id), f"reference count of block {block_id}"
            assert (block_id in self._free) != (self._ref_count[block_id] > 0), f"block {block_id} is free and held"
        assert len(self._free) + len(set(held)) == self.num_blocks, "free and used blocks do not add up"
        for seq_id, table in self._tables.items():
            self._check_table(seq_id, table)
        self._check_tree()

    def _table(self, seq_id: int) -> _BlockTable:
        table = self._tables.get(seq_id)
        if table is None:
            raise ValueError(f"sequence {seq_id} holds no block table; allocate() one first")
        return table

    def _out_of_blocks(self, seq_id: int, num_tokens: int) -> RuntimeError:
        return RuntimeError(
            f"sequence {seq_id} needs room for {num_tokens} tokens ({self.num_blocks_for(num_tokens)} blocks), "
            f"but only {len(self._free)} of {self.num_blocks} blocks are free; free() another sequence first"
        )

    def _hold(self, block_id: int) -> None:
        if not self._ref_count[block_id]:
            del self._free[block_id]
        self._ref_count[block_id] += 1

    def _take_free_block(self) -> int:
        block_id, _ = self._free.popitem(last=False)
        self._ref_count[block_id] = 1
        node = self._node_of.pop(block_id, None)
        if node is not None:
            self._unpublish(node, block_id)
        return block_id

    def _publish(self, prefix: _PrefixNode, token_ids: tuple[int, ...], block_id: int) -> _PrefixNode:
        node = prefix.children.get(token_ids)
        if node is None:
            node = prefix.children[token_ids] = _PrefixNode(prefix, token_ids)
        node.block_ids.append(block_id)
        self._node_of[block_id] = node
        return node

    def _unpublish(self, node: _PrefixNode, block_id: int) -> None:
        node.block_ids.remove(block_id)
        if not node.block_ids and node.parent is not None:
            # No cached prefix continues this one. Whoever held a block of such a continuation held a block of this node
            # beside it and freed that one later, so the continuation was evicted first.
            assert not node.children, f"block {block_id} was evicted before the blocks that continue it"
            del node.parent.children[node.token_ids]

    def _check_table(self, seq_id: int, table: _BlockTable) -> None:
        assert len(set(table.block_ids)) == len(table.block_ids), f"sequence {seq_id} holds a block twice"
        assert table.num_full_blocks <= len(table.block_ids), f"sequence {seq_id} has more full blocks than blocks"
        prefix = self._root
        for index, block_id in enumerate(table.block_ids):
            node = self._node_of.get(block_id)
            if index < table.num_full_blocks and self.enable_prefix_caching:
                assert node is not None, f"block {block_id} of sequence {seq_id} is full but not published"
                assert node.parent is prefix, f"block {block_id} of sequence {seq_id} is cached under another prefix"
                prefix = node
            else:
                assert node is None, f"block {block_id} of sequence {seq_id} is cached while it is written"
        assert table.prefix is prefix, f"sequence {seq_id} would publish under another prefix"

    def _check_tree(self) -> None:
        found: dict[int, _PrefixNode] = {}
        for node in self._walk_tree():
            assert node.block_ids, "a cached prefix lost its blocks before its continuations did"
            assert len(node.token_ids) == self.block_size, "a cached block is not full"
            for block_id in node.block_ids:
                assert block_id not in found, f"block {block_id} is cached under two prefixes"
                found[block_id] = node
        assert found == self._node_of, "the tree of prefixes and the nodes of blocks differ"

    def _walk_tree(self) -> Iterator[_PrefixNode]:
        stack = [self._root]
        while stack:
            node = stack.pop()
            if node is not self._root:
                yield node
            for token_ids, child in node.children.items():
                assert child.token_ids == token_ids, "an edge of the tree has other tokens than its node"
                assert child.parent is node, "an edge of the tree leads to another node's child"
                stack.append(child)
