"""Programs: several sequences in one function, with other work between them and other readers."""

from __future__ import annotations

import ast
import functools
import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ._hand import SIZES, Hand, Site

Draw = Callable[[st.SearchStrategy[Any]], Any]
MODULES = (
    "norm_rope_cache", "norm_quant", "clamp_swiglu_quant", "inv_rope_quant", "hyper_connections",
    "moe_router", "compress_kv", "indexer", "attention", "inv_rope_grouped_bmm",
    "unsorted_topk", "known_range", "expert_sort",
)  # fmt: skip
SITES = (1, 1, 1, 2, 3)  # how many sequences a program has


@functools.cache
def families() -> Mapping[str, Callable[[Hand], Site]]:
    """Every family of sequences, by name."""
    found = {}
    for name in MODULES:
        module = importlib.import_module(f".{name}", __package__)
        found |= {f"{name}: {key}": make for key, make in module.FAMILIES.items()}
    return found


def site(draw: Draw, only: str = "") -> Site:
    names = [n for n in families() if only in n]
    return families()[draw(st.sampled_from(names))](Hand(draw))


def two_sizes(draw: Draw, only: str = "") -> tuple[Site, Site] | None:
    """A sequence and the same with one size another; None without a size that can be a symbol."""
    names = [n for n in families() if only in n]
    make = families()[draw(st.sampled_from(names))]
    first = make(Hand(draw))
    sizes = {n: ast.literal_eval(first.words[n]) for n in SIZES if n in first.words}
    ways = {n: w for n, size in sizes.items() if (w := list(_larger(size)))}
    if not ways:
        return None
    what = draw(st.sampled_from(sorted(ways)))
    other = str(draw(st.sampled_from(ways[what])))
    second = make(Hand(draw, {**first.words, what: other}))
    return first, second


def _larger(size: Any) -> Iterator[Any]:
    """The size with one number in it larger; of a size of one torch makes no symbol."""
    if isinstance(size, int):
        yield from (size + more for more in (1, 2, 7) if size > 1)
    else:
        for i, n in enumerate(size):
            yield from ((*size[:i], m, *size[i + 1 :]) for m in _larger(n))


def mutant(draw: Draw, only: str = "") -> tuple[Site, Site] | None:
    """A sequence and a copy of it with one piece exchanged for a wrong one; None without such a
    piece."""
    names = [n for n in families() if only in n]
    make = families()[draw(st.sampled_from(names))]
    first = Hand(draw)
    make(first)
    if not first.edits:
        return None
    what = draw(st.sampled_from(sorted(first.edits)))
    right, wrong = first.edits[what]
    # the original is drawn anew around the one spelling that the edits are edits of
    base = Hand(draw, {**first.words, what: right})
    original = make(base)
    if what not in base.edits:
        return None
    changed = Hand(draw, {**base.words, what: draw(st.sampled_from(wrong))})
    return original, make(changed)


def program(draw: Draw, only: str = "") -> Site:
    """One to three sequences one after another, as one function of all their inputs."""
    sites = [site(draw, only) for _ in range(draw(st.sampled_from(SITES)))]
    return joined(sites, draw(st.booleans()), draw(st.integers(0, 3)) == 0)


def joined(sites: Sequence[Site], between: bool = False, layers: bool = False) -> Site:
    """``between``: work that is none of theirs, and other readers of what they read and return.
    ``layers``: each that writes no cache once more, on other values with the same weights.
    """
    words = {str(i): repr(s) for i, s in enumerate(sites)}
    words["between"] = "other work" if between else "nothing"
    words["layers"] = "2" if layers else "1"

    def fn(*args: Any) -> list[Any]:
        out, rest = [], list(args)
        for s in sites:
            own, rest = rest[: len(s.inputs)], rest[len(s.inputs) :]
            if between:
                out.append(_other_work(own))
            out.append(s.fn(*own))
            if between:
                out.append(_other_reader(out[-1]))
            if layers and not _writes(s):
                out.append(s.fn(own[0] * 0.5, *own[1:]))
        return out

    times = [2 if layers and not _writes(s) else 1 for s in sites]
    counts, parts = Counter[str](), Counter[tuple[str, str]]()
    for s, n in zip(sites, times, strict=True):
        counts.update({fusion: n * count for fusion, count in s.counts.items()})
        parts.update({said: n * count for said, count in s.parts.items()})
    inputs = tuple(a for s in sites for a in s.inputs)
    return Site("program", words, fn, inputs, counts, all(s.exact for s in sites), parts)


def _writes(site: Site) -> bool:
    """Does it change one of its inputs?"""
    return bool({"write", "ring", "bytes"} & set(site.words))


def _other_work(args: list[Any]) -> Tensor:
    first = next(a for a in args if isinstance(a, Tensor))
    return first.float().abs().amax(-1)


def _other_reader(value: Any) -> Any:
    read = [t for t in tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()]
    return [torch.relu(t) if t.element_size() > 1 else t for t in read[:1]]
