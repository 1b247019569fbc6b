"""Random trees for property tests."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from speculation.tree import TokenTree

Path = tuple[int, ...]


@st.composite
def token_trees(
    draw: st.DrawFn, vocab_size: int = 5, max_nodes: int = 14, root: int | None = None, source: str = ""
) -> TokenTree:
    """Any valid tree over the vocabulary, in any order of nodes that puts parents first."""
    token_ids = [draw(st.integers(0, vocab_size - 1)) if root is None else root]
    parents = [-1]
    edges: set[tuple[int, int]] = set()
    for _ in range(draw(st.integers(0, max_nodes))):
        edge = (draw(st.integers(0, len(parents) - 1)), draw(st.integers(0, vocab_size - 1)))
        if edge not in edges:
            edges.add(edge)
            parents.append(edge[0])
            token_ids.append(edge[1])
    return TokenTree(tuple(token_ids), tuple(parents), source=source)


@st.composite
def confident_trees(
    draw: st.DrawFn, vocab_size: int = 5, max_nodes: int = 14, root: int | None = None, source: str = ""
) -> TokenTree:
    """As token_trees, with confidences: certain nodes, equally probable ones, and some whose probability underflows."""
    tree = draw(token_trees(vocab_size, max_nodes, root, source))
    steps = st.sampled_from([0.0, 1e-17, 0.5, 800.0]) | st.floats(0, 5)
    confidences = [0.0]
    for parent in tree.parents[1:]:
        confidences.append(confidences[parent] - draw(steps))
    return replace(tree, confidences=tuple(confidences))


def token_path(tree: TokenTree, node: int) -> Path:
    """Tokens from below the root down to the node."""
    return tuple(tree.token_ids[ancestor] for ancestor in tree.path(node))


def token_paths(tree: TokenTree) -> list[Path]:
    """The token path of every node, in node order."""
    return [token_path(tree, node) for node in range(len(tree))]
