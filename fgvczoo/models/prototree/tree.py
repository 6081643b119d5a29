"""The shape of a decision tree: which node follows on which answer, and how pruning changes it.

Nodes are numbered in pre-order of the complete tree (a node, its left subtree, its right subtree), from 0, the root; a
pruned tree keeps the numbers. Left: the prototype is absent. Right: it is present.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from fgvczoo.errors import FgvczooError

# Nothing reads a tree of more than a few hundred nodes; published ones have heights of 9 and 11.
MAX_HEIGHT = 16


@dataclass(frozen=True)
class Tree:
    """A binary tree of at least one branch.

    children: the left and the right child of each branch, branches ascending.
    """

    children: dict[int, tuple[int, int]]

    @classmethod
    def complete(cls, height: int) -> Tree:
        """The tree whose 2^height leaves all lie at depth `height`."""
        if not 1 <= height <= MAX_HEIGHT:
            raise FgvczooError(f"height={height}; expected 1..{MAX_HEIGHT}")
        children: dict[int, tuple[int, int]] = {}

        def grow(node: int, levels: int) -> None:
            if levels:
                right = node + 2**levels
                children[node] = node + 1, right
                grow(node + 1, levels - 1)
                grow(right, levels - 1)

        grow(0, height)
        return cls(children)

    @classmethod
    def of(cls, branches: Iterable[Sequence[int]], height: int) -> Tree:
        """From (node, left, right) of every branch, those that are left of a complete tree.

        Raises `FgvczooError` where they are no tree, or not of that height.
        """
        rows = [tuple(row) for row in branches]
        complete = cls.complete(height)
        children = {node: (left, right) for node, left, right in rows if type(node) is int}
        seen, todo = set(), [0]
        while todo:
            node = todo.pop()
            for side, child in enumerate(children.get(node, ())):
                # A child stands for the child of the complete tree that it descends from.
                first, last = complete.span(complete.children.get(node, (node, node))[side])
                if type(child) is not int or not first <= child <= last or child == node:
                    raise FgvczooError(f"branches: {child} is no node on its side below node {node}")
                todo.append(child)
            seen.add(node)
        if 0 not in children or len(children) != len(rows) or not children.keys() <= seen:
            raise FgvczooError(f"branches: {len(rows)} rows of node, left, right are no tree with the root 0")
        if any(child not in children and child in complete.children for child in seen):
            raise FgvczooError(f"branches: a node inside of a tree of height {height} has no children")
        return cls(dict(sorted(children.items())))

    def to_list(self) -> list[list[int]]:
        """The (node, left, right) that `of` takes."""
        return [[node, *children] for node, children in self.children.items()]

    def __len__(self) -> int:
        """The number of branches, each of which asks for a prototype."""
        return len(self.children)

    @property
    def branches(self) -> list[int]:
        """Nodes that ask, ascending."""
        return list(self.children)

    @cached_property
    def leaves(self) -> list[int]:
        """Nodes that answer, ascending, which is from left to right."""
        return sorted(child for pair in self.children.values() for child in pair if child not in self.children)

    @cached_property
    def levels(self) -> list[list[int]]:
        """The nodes by depth, from left to right in each."""
        levels = [[0]]
        while below := [child for node in levels[-1] for child in self.children.get(node, ())]:
            levels.append(below)
        return levels

    @cached_property
    def depth(self) -> dict[int, int]:
        """How many questions lead to each node."""
        return {node: depth for depth, level in enumerate(self.levels) for node in level}

    @cached_property
    def parent(self) -> dict[int, int]:
        """The branch above each node but the root."""
        return {child: node for node, pair in self.children.items() for child in pair}

    def path(self, node: int) -> list[tuple[int, bool]]:
        """The questions that lead to a node, from the root: (branch, whether its prototype is present)."""
        steps: list[tuple[int, bool]] = []
        while node:
            above = self.parent[node]
            steps.append((above, self.children[above][1] == node))
            node = above
        return steps[::-1]

    def span(self, node: int) -> tuple[int, int]:
        """The lowest and the highest number of a node's subtree."""
        last = node
        while last in self.children:
            last = self.children[last][1]
        return node, last

    def below(self, node: int) -> range:
        """The places in `leaves` of those under a node; of a leaf, its own."""
        first, last = self.span(node)
        return range(bisect_left(self.leaves, first), bisect_right(self.leaves, last))

    def pruned(self, flat_leaves: Collection[int]) -> Tree:
        """Without the subtrees whose leaves are all in `flat_leaves`, and without the question that led to each, which
        has become superfluous: its other answer takes its place.

        As in the authors' code a child of the root stays, whatever is below it. Where all leaves are flat, the root and
        its two outermost leaves stay.
        """
        flat = set(flat_leaves)
        for node in reversed(self.children):  # children before parents
            if all(child in flat for child in self.children[node]):
                flat.add(node)
        if 0 in flat:
            return Tree({0: (self.leaves[0], self.leaves[-1])})
        children = dict(self.children)
        replaced: dict[int, int] = {}
        for node in reversed(self.children):
            left, right = (replaced.get(child, child) for child in children[node])
            if node and (left in flat) != (right in flat) and node not in flat:
                replaced[node] = right if left in flat else left
                del children[node]
            else:
                children[node] = left, right
        # What hung below a subtree that went is still there.
        kept, todo = {}, [0]
        while todo:
            node = todo.pop()
            if node in children:
                kept[node] = children[node]
                todo += children[node]
        return Tree(dict(sorted(kept.items())))
