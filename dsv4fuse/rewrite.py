"""Replacing a candidate's nodes by its fused op, where that is legal."""

from __future__ import annotations

import torch
from torch import fx

from dsv4fuse.fusion import Candidate
from dsv4fuse.plans import Declined
from dsv4fuse.readers import needed, readers


def apply(
    graph: fx.Graph,
    candidate: Candidate,
    traced: fx.Graph,
    newer: dict[fx.Node, fx.Node],
) -> None:
    """Insert the planned graph and re-point the replaced nodes; raises Declined if illegal.

    ``newer`` maps nodes that earlier calls replaced to what stands for them now.
    """
    inputs = [newer.get(n, n) for n in candidate.inputs]
    last = max(inputs, default=None)
    replaced = (*candidate.outputs, *candidate.updates)
    read, shown = (set().union(*sets) for sets in zip(*map(readers, replaced), strict=True))
    dead = {u for u in read | shown if not needed(u, replaced)}  # they end in what is replaced
    read -= dead
    early = next((u for u in sorted(read) if last is not None and not last < u), None)
    if last is not None and early is not None:
        raise Declined(
            f"{early.name} reads the result before {last.name}, which the fused op needs, is there."
        )
    first = min(read, default=(last or candidate.root).next)
    for cache, update in zip(candidate.caches, candidate.updates, strict=True):
        _unread(cache, update, first)
    placeholders = [n for n in traced.nodes if n.op == "placeholder"]
    env = dict(zip(placeholders, inputs, strict=True))
    results: tuple[fx.Node, ...] = ()
    with graph.inserting_before(first):
        for node in traced.nodes:
            if node.op == "output":
                results = tuple(env[n] for n in node.args[0])
            elif node.op == "call_function":
                copy = env[node] = graph.node_copy(node, env.__getitem__)
                for name in ("stack_trace", "nn_module_stack"):
                    if name in candidate.root.meta:
                        copy.meta[name] = candidate.root.meta[name]
            elif node.op != "placeholder":
                raise Declined(f"The fused op needs a constant of its own ({node.target}).")
    dead |= _moved_behind(graph, first, sorted(v for v in shown - dead if v < first), dead)
    for old, new in zip(replaced, results, strict=True):
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in dead)
        newer[old] = new


def _moved_behind(
    graph: fx.Graph, first: fx.Node, views: list[fx.Node], dead: set[fx.Node]
) -> set[fx.Node]:
    """Views that stood in front of the fused op come behind it; copies stay for dead readers."""
    copies: dict[fx.Node, fx.Node] = {}
    for view in views:
        with graph.inserting_before(view):
            copies[view] = graph.node_copy(view, lambda n: copies.get(n, n))
        view.replace_all_uses_with(copies[view], delete_user_cb=lambda user: user in dead)
        first.prepend(view)
    return set(copies.values())


def _unread(cache: fx.Node, update: fx.Node, first: fx.Node) -> None:
    """Declines if anything that stays reads the old version of a cache once it is written."""
    gone, stack = {update}, [update]
    while stack:  # what only the replaced update needed goes with it
        for source in stack.pop().all_input_nodes:
            if source not in gone and source.op == "call_function" and set(source.users) <= gone:
                gone.add(source)
                stack.append(source)
    for user in cache.users:
        home = user.target is torch.ops.aten.copy_.default and user.args[0] is cache
        if user not in gone and not user < first and not home:
            raise Declined(f"{user.name} reads the cache between its old and its new version.")
