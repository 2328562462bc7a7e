"""Index maps: which element of a base tensor each element of a view reads.

A view (reshape, transpose, slice, expand, ... in any combination) is a tuple of ``Index``, one
per axis of the base, each an affine sum of *digits* of the view's coordinates:

    index = offset + Σ stride · digit,      digit(c, div, size) = (c // div) % size

A digit also knows the extent of its coordinate.

Two chains of views that read the same elements have equal maps, whatever ops spelled them. Sizes
are ints or sympy expressions of the graph's symbols; nothing is ever turned into a number. A view
that the algebra cannot express gives None and stays opaque.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.functions import FloorDiv

from dsv4fuse import compat

Size: TypeAlias = "int | sympy.Expr"


@dataclass(frozen=True)
class Digit:
    coord: int
    div: Size
    size: Size
    extent: Size

    @property
    def whole(self) -> bool:
        return self.div == 1 and self.size == self.extent


@dataclass(frozen=True)
class Index:
    offset: Size
    terms: tuple[tuple[Size, Digit], ...] = ()

    def whole(self) -> int | None:
        """The coordinate that this index is, unchanged; None for anything else."""
        if self.offset == 0 and len(self.terms) == 1 and self.terms[0][0] == 1:
            digit = self.terms[0][1]
            return digit.coord if digit.whole else None
        return None


Map = tuple[Index, ...]
ZERO = Index(0)


def as_size(value: int | torch.SymInt) -> Size:
    """An int, or the sympy expression behind a SymInt: its hint only where no other is possible.

    Torch leaves a quotient as it is although a guard of the graph has settled it: (s + 1) // 4 = 1.
    """
    if not isinstance(value, torch.SymInt):
        return int(value)
    expr = value.node.expr
    if expr.is_Integer:
        return int(expr)
    hint = compat.hint(value) if expr.has(FloorDiv) else None
    return hint if hint is not None and statically_known_true(value == hint) else expr


def sizes_of(tensor: torch.Tensor) -> tuple[Size, ...]:
    shape = tuple(tensor.shape)
    return shape if set(map(type, shape)) <= {int} else tuple(map(as_size, shape))


def divides(a: Size, b: Size) -> bool:
    """True when b is known to be a multiple of a."""
    if isinstance(a, int) and isinstance(b, int):
        return a != 0 and b % a == 0
    quotient = sympy.cancel(sympy.sympify(b) / a)
    return bool(sympy.denom(quotient) == 1)


def quotient(b: Size, a: Size) -> Size:
    """b / a, for a that divides b."""
    if isinstance(a, int) and isinstance(b, int):
        return b // a
    q = sympy.cancel(sympy.sympify(b) / a)
    return int(q) if q.is_Integer else q


def at_least_zero(e: Size) -> bool:
    """True when e ≥ 0 is known; symbols of a graph are sizes, hence positive."""
    if isinstance(e, int):
        return e >= 0
    e = sympy.expand(e)
    return bool(e == 0 or e.is_nonnegative)


def product(sizes: Sequence[Size]) -> Size:
    out: Size = 1
    for s in sizes:
        out = out * s
    return sympy.expand(out) if isinstance(out, sympy.Expr) else out


def index(offset: Size, terms: Sequence[tuple[Size, Digit]]) -> Index:
    """The canonical Index: unit digits dropped, neighbouring digits of a coordinate joined."""
    kept = [t for t in terms if t[1].size != 1]
    kept.sort(key=lambda t: (t[1].coord, str(t[1].div)))
    joined = True
    while joined:
        joined = False
        for i, (si, di) in enumerate(kept):
            for j, (sj, dj) in enumerate(kept):
                if (
                    i != j
                    and di.coord == dj.coord
                    and di.div == dj.div * dj.size
                    and si == sj * dj.size
                ):
                    kept[j] = (sj, Digit(dj.coord, dj.div, dj.size * di.size, dj.extent))
                    del kept[i]
                    joined = True
                    break
            if joined:
                break
    return Index(offset, tuple(kept))


@functools.lru_cache(maxsize=4096)
def identity(sizes: tuple[Size, ...]) -> Map:
    return tuple(
        ZERO if n == 1 else Index(0, ((1, Digit(k, 1, n, n)),)) for k, n in enumerate(sizes)
    )


def affine(i: Index, start: Size, step: Size = 1) -> Index:
    """start + step · i."""
    return index(start + step * i.offset, [(step * s, d) for s, d in i.terms])


def moved(
    i: Index, places: Mapping[int, int], size: Callable[[Size], Size] = lambda n: n
) -> tuple[object, ...]:
    """i with other coordinates (-1 for one that has no place) and sizes, to be compared."""
    terms = (
        (places.get(d.coord, -1), *map(size, (s, d.div, d.size, d.extent))) for s, d in i.terms
    )
    return (size(i.offset), *sorted(terms, key=str))


def whole_axes(m: Map, shape: tuple[Size, ...]) -> bool:
    """Does each leading index run through the whole of its axis, rather than a part of it?"""
    return all(
        n == 1 if i == ZERO else i.terms[0][1].extent == n for i, n in zip(m, shape, strict=False)
    )


def within(m: Map, space: Sequence[Size]) -> bool:
    """Does m read no coordinates but those of a space whose axes are so long?"""
    digits = (d for i in m for _, d in i.terms)
    return all(d.coord < len(space) and d.extent == space[d.coord] for d in digits)


def bounds(i: Index) -> tuple[Size, Size]:
    """Smallest and largest value (strides are non-negative)."""
    return i.offset, i.offset + sum(s * (d.size - 1) for s, d in i.terms)


def split(i: Index, modulus: Size) -> tuple[Index, Index] | None:
    """(i // modulus, i % modulus), or None when the digits do not fall apart there."""
    high: list[tuple[Size, Digit]] = []
    low: list[tuple[Size, Digit]] = []
    for stride, d in i.terms:
        if divides(modulus, stride):
            high.append((quotient(stride, modulus), d))
        elif divides(stride, modulus) and divides(quotient(modulus, stride), d.size):
            inner = quotient(modulus, stride)
            low.append((stride, Digit(d.coord, d.div, inner, d.extent)))
            high.append((1, Digit(d.coord, d.div * inner, quotient(d.size, inner), d.extent)))
        else:
            low.append((stride, d))
    if isinstance(i.offset, int) and isinstance(modulus, int):
        offset_high, offset_low = divmod(i.offset, modulus)
    elif divides(modulus, i.offset):
        offset_high, offset_low = quotient(i.offset, modulus), 0
    else:
        offset_high, offset_low = 0, i.offset
    rest = index(offset_low, low)
    if not at_least_zero(modulus - 1 - bounds(rest)[1]):
        return None
    return index(offset_high, high), rest


def _blocks(a: Sequence[Size], b: Sequence[Size]) -> list[tuple[range, range]] | None:
    """Pairs of axis ranges of two shapes that hold the same elements."""
    out, i, j = [], 0, 0
    while i < len(a) or j < len(b):
        lengths = (
            (m, n)
            for total in range(1, len(a) - i + len(b) - j + 1)
            for m in range(0, min(total, len(a) - i) + 1)
            for n in (total - m,)
            if n <= len(b) - j and product(a[i : i + m]) == product(b[j : j + n])
        )
        found = next(lengths, None)
        if found is None:
            return None
        out.append((range(i, i + found[0]), range(j, j + found[1])))
        i, j = i + found[0], j + found[1]
    return out


def reshape(m: Map, view: Sequence[Size], base: Sequence[Size]) -> Map | None:
    """The map into ``base`` of a reshape of it to ``view``, read through m."""
    blocks = None if 0 in view else _blocks(view, base)
    if blocks is None:
        return None
    out: list[Index] = [ZERO] * len(base)
    for view_axes, base_axes in blocks:
        linear, stride = ZERO, 1
        for axis in reversed(view_axes):
            scaled = affine(m[axis], 0, stride)
            linear = index(linear.offset + scaled.offset, (*linear.terms, *scaled.terms))
            stride = stride * view[axis]
        for axis in reversed(base_axes[1:] if len(base_axes) else base_axes):
            parts = split(linear, base[axis])
            if parts is None:
                return None
            linear, out[axis] = parts
        if len(base_axes):
            out[base_axes[0]] = linear
    return tuple(out)


def restrict(i: Index, coord: int, start: Size, size: Size, step: int = 1) -> Index | None:
    """i where coordinate ``coord`` runs over ``start + step · c`` for c < size instead.

    None when a digit of the coordinate straddles the new range.
    """
    offset: Size = i.offset
    terms: list[tuple[Size, Digit]] = []
    for stride, d in i.terms:
        if d.coord != coord:
            terms.append((stride, d))
            continue
        part = _restrict_digit(d, start, size, step)
        if part is None:
            return None
        offset += stride * part.offset
        terms += [(stride * s, e) for s, e in part.terms]
    return index(offset, terms)


def _restrict_digit(d: Digit, start: Size, size: Size, step: int) -> Index | None:
    """(start + step·c) // div % d.size as an index of c < size."""
    moving = index(start, [(step, Digit(d.coord, 1, size, size))])
    if d.whole:
        return moving
    inside = split(moving, d.div * d.size) if d.div * d.size != d.extent else (ZERO, moving)
    if inside is None:
        return None
    parts = split(inside[1], d.div)
    return None if parts is None else parts[0]
