"""Who reads a value of a graph, and whether anything that leaves the graph needs it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from dsv4fuse import joins, views


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def readers(node: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
    """(the nodes that read a value, directly or through views, those views)."""
    found: set[fx.Node] = set()
    between: set[fx.Node] = set()
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if user.target in views.VIEWS and user not in between:
            between.add(user)
            stack += user.users
        elif user.target not in views.VIEWS:
            found.add(user)
    return found, between


def needed(node: fx.Node, without: Iterable[fx.Node]) -> bool:
    """Does anything that leaves the graph depend on node, other than through the nodes given?"""
    done, stack = set(without), [node]
    while stack:
        user = stack.pop()
        if user.op == "output" or user.target is torch.ops.aten.copy_.default:
            return True
        if user not in done:
            done.add(user)
            stack += joins.dependents(user)
    return False
