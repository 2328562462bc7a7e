"""Replacing a candidate's nodes by its fused op, where that is legal."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dsv4fuse import compat
from dsv4fuse.fusion import Candidate, has_kernel
from dsv4fuse.readers import needed, readers
from dsv4fuse.terms import short
from dsv4fuse.views import base_of


class Declined(Exception):
    """A candidate that cannot be taken; the message is the sentence for the report."""


def plan(candidate: Candidate) -> fx.GraphModule:
    """The fused op as a small graph over the candidate's inputs; raises Declined.

    Its outputs are the candidate's outputs, then the new version of each of its caches.
    """
    if candidate.unsupported:
        raise Declined(candidate.unsupported)
    for node in candidate.inputs:
        if node not in candidate.caches and base_of(node) in candidate.caches:
            raise Declined(f"{node.name} is a part of the cache that the fused op would write.")
    try:
        if has_kernel(candidate.fusion):
            importlib.import_module(f"dsv4fuse.kernels.{candidate.fusion}")
    except ImportError as error:
        raise Declined(f"The kernel cannot be loaded on this machine: {error}.") from error
    fakes = [n.meta["val"] for n in candidate.inputs]
    caches = [candidate.inputs.index(c) for c in candidate.caches]

    def fused(*tensors: Any) -> tuple[Any, ...]:
        return (*candidate.call(*tensors), *(tensors[i] for i in caches))

    on_gpu = any(isinstance(f, Tensor) and f.is_cuda for f in fakes)
    try:
        like = [n.meta["val"] for n in candidate.outputs]
        # On a CPU an op is its reference, and in a package no op but that.
        kept = not on_gpu and not compat.packaging()
        traced = compat.trace_fused(fused, fakes, like, keep_ops=kept)
    except ValueError as error:  # what a kernel's own checks raise
        raise Declined(str(error).strip()) from error
    large = compat.large_number(traced.graph)
    if large is not None:
        raise Declined(f"torch {torch.__version__} cannot compile its launch, which takes {large}.")
    results = next(n for n in traced.graph.nodes if n.op == "output").args[0]
    for old, new in zip((*candidate.outputs, *candidate.updates), results, strict=True):
        _same(old, new)
    return traced


def _same(old: fx.Node, new: fx.Node) -> None:
    """Declines unless the new value stands for the old one in every respect."""
    a, b = old.meta["val"], new.meta["val"]
    if a.dtype != b.dtype:
        raise Declined(f"The module keeps {short(a.dtype)} here, the kernel {short(b.dtype)}.")
    for what, x, y in (("shape", a.shape, b.shape), ("strides", a.stride(), b.stride())):
        if len(x) != len(y) or not all(
            statically_known_true(m == n) or (what == "strides" and a.shape[i] == 1)
            for i, (m, n) in enumerate(zip(x, y, strict=True))
        ):
            raise Declined(
                f"The module's result has {what} {list(x)}, the kernel's would have {list(y)}."
            )


def apply(
    graph: fx.Graph,
    candidate: Candidate,
    traced: fx.GraphModule,
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
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    env = dict(zip(placeholders, inputs, strict=True))
    results: tuple[fx.Node, ...] = ()
    with graph.inserting_before(first):
        for node in traced.graph.nodes:
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
