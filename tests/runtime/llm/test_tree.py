"""Token trees: refused when malformed, and their derived numbers against a slow obvious twin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import BadRequest
from edgekit.runtime.llm.tree import TokenTree


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    """Any tree of up to ten nodes; every node has its own token, so no sibling repeats."""
    size = draw(st.integers(1, 10))
    parents = [-1] + [draw(st.integers(0, node - 1)) for node in range(1, size)]
    return TokenTree(tuple(range(size)), tuple(parents))


def ancestors(tree: TokenTree, node: int) -> list[int]:
    """From the root to `node`."""
    path = [node]
    while tree.parents[path[0]] >= 0:
        path.insert(0, tree.parents[path[0]])
    return path


@pytest.mark.parametrize(
    ("tokens", "parents", "words"),
    [
        ((), (), "one parent per token"),
        ((1, 2), (-1,), "one parent per token"),
        ((1,), (0,), "the first of them -1"),
        ((1, 2), (-1, 1), "before its children"),
        ((1, 2), (-1, -1), "before its children"),
        ((1, 2, 2), (-1, 0, 0), "sibling"),
    ],
)
def test_malformed_trees_are_never_born(tokens, parents, words):
    """Every rule of the docstring is checked at birth."""
    with pytest.raises(BadRequest, match=words):
        TokenTree(tokens, parents)


@given(trees())
def test_masks_and_depths_are_those_of_the_paths(tree):
    """A node sees its ancestors and itself, and lies as deep as it has ancestors."""
    for node in range(len(tree)):
        path = ancestors(tree, node)
        assert np.flatnonzero(tree.sees()[node]).tolist() == sorted(path)
        assert tree.depths[node] == len(path) - 1


@given(trees(), st.integers(0, 9), st.integers(1, 10))
def test_pruning_keeps_whole_paths(tree, depth, nodes):
    """Pruning is the first nodes that are shallow enough, each with the ancestors it had."""
    pruned = tree.pruned(depth, nodes)
    kept = [node for node in range(len(tree)) if tree.depths[node] <= depth][:nodes]
    assert [[pruned.tokens[a] for a in ancestors(pruned, node)] for node in range(len(pruned))] == [
        [tree.tokens[a] for a in ancestors(tree, node)] for node in kept
    ]


@given(trees(), st.lists(st.integers(100, 200), max_size=4))
def test_a_lead_comes_before_every_path(tree, lead):
    """Hanging a tree from earlier tokens prefixes each path with them."""
    longer = tree.after(lead)
    for node in range(len(tree)):
        path = [longer.tokens[a] for a in ancestors(longer, node + len(lead))]
        assert path == lead + [tree.tokens[a] for a in ancestors(tree, node)]


@given(trees(), st.integers(0, 10))
def test_a_token_names_at_most_one_child(tree, token):
    """`child` finds the node with this parent and token, or nothing."""
    for node in range(len(tree)):
        wanted = [n for n in range(len(tree)) if tree.parents[n] == node and tree.tokens[n] == token]
        assert tree.child(node, token) == (wanted[0] if wanted else None)


def test_a_chain_is_a_chain():
    """The tree without branches, and only it, says so."""
    assert TokenTree.chain(3).is_chain
    assert TokenTree.chain(3, (4, 5)) == TokenTree((3, 4, 5), (-1, 0, 1))
    assert not TokenTree((1, 2, 3), (-1, 0, 0)).is_chain
