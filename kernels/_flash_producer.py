"""What the Hopper attention kernel (``_flash_hopper``) loads, and the warps that load it."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ._common import long
from ._gluon import barrier, load_async

D = gl.constexpr(512)
ROWS = gl.constexpr(64)
KEYS = gl.constexpr(64)
# Barriers in shared memory: each of two tiles is full (0, 1) or empty, and the queries are read.
EMPTY, Q_READ = gl.constexpr(2), gl.constexpr(4)
# A warp loads whole rows, 16 bytes a lane.
LOADED = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0]))
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


class Shared(NamedTuple):
    """Shared memory: the queries; two tiles of keys, and of each its keys' rows (-1: no key) and
    the mask's values; the weights and their remainders; the maxima of both halves of a tile; the
    barriers."""

    q: Any
    k: Any
    row: Any
    mask: Any
    weights: Any
    rest: Any
    halves: Any
    bars: Any


class Work(NamedTuple):
    """What the programs divide among them: blocks of tokens × parts of the heads, ``parts``, each
    with its keys in ``splits``."""

    length: Any
    blocks: Any
    near: Any
    far: Any
    parts: Any
    splits: Any
    count_ptr: Any
    HEADS: Any
    TOKENS: Any
    WIDTH: Any
    NEAR: Any
    FAR: Any
    LIST: Any
    SPLIT: Any
    EARLY: Any  # the mask's kind where all rows have the same mask, which is loaded with the keys


@gluon.jit
def pieces(work):
    """How many parts there are, each split of one counted."""
    n = work.parts
    if work.SPLIT:
        n = n * work.splits
    return n


@gluon.jit
def piece(done, work):
    """(part, split) of a turn. Late tokens see most keys: they come first."""
    part, split = pieces(work) - 1 - done, done * 0
    if work.SPLIT:
        split = part // work.parts
        part = part % work.parts
    return part, split


@gluon.jit
def place(part, work):
    """Block of tokens, batch row and first token of a part of the work."""
    block = part // ((work.HEADS + work.WIDTH - 1) // work.WIDTH)
    return block, long(block // work.blocks), long((block % work.blocks) * work.TOKENS)


@gluon.jit
def near_tiles(part, work):
    """How many tiles of near keys a part has."""
    block, _, _ = place(part, work)
    tiles = part * 0
    if work.NEAR:
        tiles = gl.cdiv(work.near, KEYS)
    if work.LIST:
        tiles = gl.load(work.count_ptr + block)
    return tiles


@gluon.jit
def tiles_of(split, near, work):
    """The first tile of a split, and behind its last; at least one, which may have no key."""
    first, end = near * 0, near
    if work.FAR:
        end += gl.cdiv(work.far, KEYS)
    if work.SPLIT:
        each = gl.cdiv(end, work.splits)
        first = gl.minimum(each * split, end)
        end = gl.minimum(first + each, end)
    return first, gl.maximum(end, first + 1)


@gluon.jit
def zero(x):
    """0, of which no compiler knows: what depends on it is computed where it is needed, and not
    kept in registers through all loops."""
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [x], dtype=gl.int32, is_pure=False,
                                     pack=1)  # fmt: skip


@gluon.jit
def rows_of(part, work, s_b, s_s, s_h, LAYOUT: gl.constexpr):
    """Where a part's rows (heads of tokens) are in a tensor, and which of them there are."""
    _, b, first = place(part, work)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)) + zero(part)
    parts: gl.constexpr = (work.HEADS + work.WIDTH - 1) // work.WIDTH
    head = (part % parts) * work.WIDTH
    if work.TOKENS == 1:
        head += row
        at = b * s_b + first * s_s + long(head) * s_h
        live = head < work.HEADS
    else:
        head += row % work.WIDTH
        token = row // work.WIDTH
        at = b * s_b + first * s_s + (long(token) * s_s + long(head) * s_h)
        live = (head < work.HEADS) & (first + token < work.length)
    return at, live


@gluon.jit
def _copy(to, at, live):
    """Rows from ``at``, zeros where there are none."""
    d = gl.arange(0, D, gl.SliceLayout(0, LOADED))
    load_async(to, at[:, None] + d[None, :], mask=live[:, None])


@gluon.jit
def _keys(j, number, tiles, work, rows, index_at, i_sk, mask_at, m_st, WRAP: gl.constexpr):
    """The rows of a tile's keys, -1 for no key, and the mask's values."""
    lane = gl.arange(0, KEYS, LINE)
    row = number * KEYS + lane
    column = row
    seen = row < work.near
    if work.FAR:
        k = (j - tiles) * KEYS + lane
        inside = (k >= 0) & (k < work.far)
        index = gl.load(index_at + k * i_sk, mask=inside, other=-1).to(gl.int64)
        if WRAP:
            index = gl.where(index < 0, index + rows, index)
        seen = seen & (k < 0)
        row = gl.where(seen, row, index.to(gl.int32))
        column = gl.where(seen, column, work.near + k)
        seen = seen | (inside & (index.to(gl.uint64) < rows.to(gl.uint64)))
    elif work.LIST:
        seen = seen & (j < tiles)
    x = 0.0 * lane
    if work.EARLY:
        x = gl.load(mask_at + long(column) * m_st, mask=seen, other=0).to(gl.float32)
    return gl.where(seen, row, -1), x


@gluon.jit
def produce(
    s, work, q_ptr, kv_ptr, far_ptr, index_ptr, page_ptr, mask_ptr, tiles_ptr, rows, pages, most,
    q_sb, q_ss, q_sh, kv_sb, kv_ss, kv_st, far_sb, far_st, i_sb, i_ss, i_sk, p_sb, p_ss, m_sb,
    m_ss, m_st, PAGED: gl.constexpr, WRAP: gl.constexpr,
):  # fmt: skip
    """Four warps: tiles of keys and queries, part after part."""
    c = gl.program_id(0) * 0
    turn = c
    for done in range(gl.program_id(0), pieces(work), gl.num_programs(0)):
        part, split = piece(done, work)
        block, b, first = place(part, work)
        tiles = near_tiles(part, work)
        lo, hi = tiles_of(split, tiles, work)
        number_at = tiles_ptr + long(block) * most
        page, limit = b, long(rows)
        if PAGED:
            page = long(gl.load(page_ptr + b * p_sb + first * p_ss))
            page = gl.where(page < 0, page + pages, page)
            limit = gl.where((page >= 0) & (page < pages), limit, 0)
        index_at = index_ptr + b * i_sb + first * i_ss
        mask_at = mask_ptr + b * m_sb + first * m_ss
        number = lo
        if work.LIST:
            number = gl.load(number_at + lo, mask=lo < tiles, other=0)
        row, x = _keys(lo, number, tiles, work, limit, index_at, i_sk, mask_at, m_st, WRAP)
        for j in range(lo, hi):
            slot = c & 1
            number = j + 1
            if work.LIST:  # one tile ahead of the loads that need it
                number = gl.load(number_at + number, mask=number < tiles, other=0)
            mbarrier.wait(s.bars.index(EMPTY + slot), (c >> 1 & 1) ^ 1)
            s.row.index(slot).store(row)
            if work.EARLY:
                s.mask.index(slot).store(x)
            at, step = kv_ptr + b * kv_sb + first * kv_ss, kv_st
            if work.FAR:
                if not work.NEAR or j >= tiles:
                    at, step = far_ptr + page * far_sb, far_st
            mine = s.row.index(slot).load(gl.SliceLayout(1, LOADED))
            _copy(s.k.index(slot), at + long(gl.maximum(mine, 0)) * step, mine >= 0)
            async_copy.commit_group()
            if j == lo:  # part of the first tile, as far as barriers know
                mbarrier.wait(s.bars.index(Q_READ), (turn & 1) ^ 1)
                q_at, live = rows_of(part, work, q_sb, q_ss, q_sh, LOADED)
                _copy(s.q, q_ptr + q_at, live)
                async_copy.commit_group()
            # The next tile's rows are on their way while this one is waited for.
            row, x = _keys(j + 1, number, tiles, work, limit, index_at, i_sk, mask_at, m_st, WRAP)
            async_copy.wait_group(0)
            fence_async_shared()
            barrier()
            mbarrier.arrive(s.bars.index(slot), count=1)
            c += 1
        turn += 1
