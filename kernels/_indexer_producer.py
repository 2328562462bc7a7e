"""What the Hopper indexer kernel (``_indexer_hopper``) loads, and the warps that load it."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ._common import long
from ._gluon import barrier, load_async

D, KEYS = gl.constexpr(128), gl.constexpr(128)  # of a tile
TOKENS = gl.constexpr(4)  # of a program
SLOTS = gl.constexpr(4)  # tiles of keys in shared memory
# 16 bytes a lane.
LOADED = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
LOADED_BYTES = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))
CLEARED = gl.constexpr(gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0]))
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


class Shared(NamedTuple):
    """Shared memory: queries and weights of either pair of tokens; tiles of keys, two as they come
    if they are to be widened, and barriers that say of each that it is full, or empty."""

    q: Any
    w: Any
    k: Any
    raw: Any
    full: Any
    empty: Any


class Keys(NamedTuple):
    """Keys, and of each the scale."""

    k_ptr: Any
    k_sb: Any
    k_st: Any
    ks_ptr: Any
    ks_sb: Any
    ks_st: Any
    keys: Any
    HAS_KS: Any
    WIDEN: Any


class Rows(NamedTuple):
    """The results, and which keys each token sees."""

    out_ptr: Any
    out_sb: Any
    out_st: Any
    tokens: Any
    start_ptr: Any
    start_sb: Any
    start_st: Any
    end_ptr: Any
    end_sb: Any
    end_st: Any
    HAS_START: Any
    HAS_END: Any
    CLEAN: Any


class Work(NamedTuple):
    """What the programs divide among them: ``parts``, each four tokens of ``blocks`` of a batch row
    and ``span`` tiles of their keys, of which there are ``spans`` such pieces."""

    parts: Any
    blocks: Any
    spans: Any
    span: Any


@gluon.jit
def part_of(done, work, k, rows):
    """Batch row, first token, tiles begin..end of a turn, and those lo..hi of which any is seen."""
    part = work.parts - 1 - done  # late tokens see most keys: they come first
    block = part // work.spans
    b, first = long(block // work.blocks), (block % work.blocks) * TOKENS
    begin = (part % work.spans) * work.span
    end = gl.minimum(begin + work.span, gl.cdiv(k.keys, KEYS))
    token = first + gl.arange(0, TOKENS, LINE)
    there = token < rows.tokens
    low, high = k.keys * 0, k.keys
    if rows.HAS_START:
        at = rows.start_ptr + b * rows.start_sb + long(token) * rows.start_st
        start = gl.load(at, mask=there, other=2147483647)
        low = gl.min(gl.minimum(gl.maximum(start, 0), k.keys).to(gl.int32), 0)
    if rows.HAS_END:
        at = rows.end_ptr + b * rows.end_sb + long(token) * rows.end_st
        stop = gl.load(at, mask=there, other=0)
        high = gl.max(gl.minimum(gl.maximum(stop, 0), k.keys).to(gl.int32), 0)
    lo = gl.minimum(gl.maximum(low // KEYS, begin), end)
    return b, first, begin, end, lo, gl.maximum(gl.minimum(gl.cdiv(high, KEYS), end), lo)


@gluon.jit
def _clear(b, first, tile, k, rows):
    """Minus infinity for a tile that nobody sees."""
    token = first + gl.arange(0, TOKENS, gl.SliceLayout(1, CLEARED))
    key = tile * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, CLEARED))
    at = rows.out_ptr + b * rows.out_sb + (long(token) * rows.out_st)[:, None] + key[None, :]
    empty = gl.full([TOKENS, KEYS], float("-inf"), gl.float32, CLEARED)
    live = (token < rows.tokens)[:, None] & (key < k.keys)[None, :]
    gl.store(at, empty.to(rows.out_ptr.dtype.element_ty), mask=live)


@gluon.jit
def _empty(s, c):
    """Where tile c goes, when nobody reads what was there."""
    mbarrier.wait(s.empty.index(c % SLOTS), ((c // SLOTS) & 1) ^ 1)
    return s.k.index(c % SLOTS)


@gluon.jit
def _announce(s, c, WIDEN: gl.constexpr):
    """Tile c has come."""
    if WIDEN:
        barrier()
        _empty(s, c).store(s.raw.index(c & 1).load(LOADED_BYTES).to(s.k.dtype))
    fence_async_shared()
    barrier()
    mbarrier.arrive(s.full.index(c % SLOTS), count=1)


@gluon.jit
def produce(s, k, rows, work):
    """Four warps: tiles of keys, part after part. A tile is announced when the next one has been
    asked for, so that two are on their way."""
    layout: gl.constexpr = LOADED_BYTES if k.WIDEN else LOADED
    row = gl.arange(0, KEYS, gl.SliceLayout(1, layout))
    lane = gl.arange(0, D, gl.SliceLayout(0, layout))
    offset = (row * k.k_st)[:, None] + lane[None, :]
    c = gl.program_id(0) * 0
    for done in range(gl.program_id(0), work.parts, gl.num_programs(0)):
        b, first, begin, end, lo, hi = part_of(done, work, k, rows)
        for tile in range(lo, hi):
            at = k.k_ptr + (b * k.k_sb + long(tile * KEYS) * k.k_st)
            live = (row < k.keys - tile * KEYS)[:, None]
            if k.WIDEN:
                load_async(s.raw.index(c & 1), at + offset, mask=live)
            else:
                load_async(_empty(s, c), at + offset, mask=live)
            async_copy.commit_group()
            if c > 0:
                async_copy.wait_group(1)
                _announce(s, c - 1, k.WIDEN)
            c += 1
        if rows.CLEAN:
            for tile in range(begin, lo):
                _clear(b, first, tile, k, rows)
            for tile in range(hi, end):
                _clear(b, first, tile, k, rows)
    if c > 0:
        async_copy.wait_group(0)
        _announce(s, c - 1, k.WIDEN)
