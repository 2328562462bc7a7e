"""The layers of the static cache in hf.py, one class for each kind of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticLayer

CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"


class WindowLayer(StaticLayer):
    """The sliding window: a ring ``keys`` of ``[B, 1, window, head_dim]``; values are the keys.

    ``cumulative_length`` (int64, no axes) counts the columns of the batch seen so far. All layers
    on a device share it; the one that ``counts`` moves it on.
    """

    cumulative_length: Any
    keys: Any

    is_sliding = True
    is_croppable = False

    def __init__(self, attention: nn.Module, batch: int, max_len: int, like: Tensor) -> None:
        super().__init__(max_len)
        self.window, self.like, self.batch_size = attention.sliding_window, like, batch
        self.keys = self.values = self.buffer((batch, 1, self.window, attention.head_dim))
        self.is_initialized, self.counts = True, False
        # The only Python state, and it changes only in the first forward: started is whether
        # there was one, first whether this is it. n is how many columns the forward has.
        self.started, self.first, self.n = False, True, 0

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        buffer = self.like.new_zeros(shape, dtype=dtype)
        torch._dynamo.mark_static_address(buffer)
        return buffer

    def buffers(self) -> list[Tensor]:
        """All that a request has in this layer, batch first."""
        return [self.keys]

    def reset(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()
        self.cumulative_length.zero_()
        self.started = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for buffer in self.buffers():
            buffer.copy_(buffer.index_select(0, beam_idx.to(buffer.device)))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the buffers are made with the layer."""

    def get_seq_length(self) -> Any:
        return self.cumulative_length if self.started else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """Number of keys that update will return, and the column of the first of them."""
        if not self.started:
            return query_length, 0
        first = (self.cumulative_length - (self.window - 1)).clamp(min=0)
        return self.window - 1 + query_length, first

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """key_states ``[B, 1, S, D]``. Returns them after the window − 1 keys before them, in the
        order of their columns, as keys and values. With fewer columns before them than that, as
        many keys at the end mean nothing; causality hides those."""
        batch, n = key_states.shape[0], key_states.shape[2]
        if batch != self.batch_size:
            raise ValueError(f"the static cache is for {self.batch_size} sequences, got {batch}")
        if n > self.max_cache_len:
            raise ValueError(f"the static cache is for {self.max_cache_len} columns, got {n}")
        self.first, self.started, self.n = not self.started, True, n
        if self.counts:
            self.cumulative_length.add_(self.n)
        kept = min(self.n, self.window)
        every = torch.arange(self.window - 1 + self.n, device=self.keys.device)
        start = self.cumulative_length - self.n
        slots = (start + every[self.n - kept : self.n]) % self.window
        if self.first:
            keys = key_states
        elif self.n > 1:  # the ring before they overwrite what the first of them sees
            columns = (start - (self.window - 1)).clamp(min=0) + every
            new = (self.window + columns - start).clamp(max=self.window - 1 + self.n)
            rows = torch.where(columns < start, columns % self.window, new)
            keys = torch.cat((self.keys, key_states), dim=2).index_select(2, rows)
        self.keys.index_copy_(2, slots, key_states[:, :, self.n - kept :])
        if not self.first and self.n == 1:
            oldest = (start - (self.window - 1)).clamp(min=0)
            keys = self.keys.index_select(2, (oldest + every) % self.window)
        return keys, keys


class HCALayer(WindowLayer):
    """A window, and the state of the compressors ``names``, in the attributes and by the methods
    that the model knows from its own cache layers.

    For each name: ``buffer_kv`` and ``buffer_gate`` ``[B, rate, C]``, the columns of the window
    that is open; ``compressed_kv`` ``[B, ceil(max_len / rate), D]``, the entries. In a decode step
    the model compresses the open window each time; that entry counts once its window is closed.
    """

    names: tuple[str, ...] = ("compressor",)

    def __init__(self, attention: nn.Module, batch: int, max_len: int, like: Tensor) -> None:
        super().__init__(attention, batch, max_len, like)
        modules = (attention.compressor, getattr(attention.compressor, "indexer", None))
        self.compressors = dict(zip(self.names, modules, strict=False))
        self.compress_rate = attention.compressor.compress_rate
        self.buffer_kv, self.buffer_gate, self.compressed_kv = {}, {}, {}
        for name, module in self.compressors.items():
            rows = (batch, self.compress_rate, module.kv_proj.out_features)
            self.buffer_kv[name], self.buffer_gate[name] = self.buffer(rows), self.buffer(rows)
            entries = (batch, -(-max_len // self.compress_rate), module.head_dim)
            self.compressed_kv[name] = self.buffer(entries)

    def buffers(self) -> list[Tensor]:
        states = (self.buffer_kv, self.buffer_gate, self.compressed_kv)
        return super().buffers() + [state[name] for state in states for name in self.names]

    def closed(self) -> Tensor:
        """How many windows are closed, this forward's columns included."""
        return self.cumulative_length // self.compress_rate

    def closed_before(self) -> Tensor:
        return (self.cumulative_length - self.n) // self.compress_rate

    def store_compression_weights(
        self, name: str, kv: Tensor, gate: Tensor
    ) -> tuple[Tensor, Tensor, Any]:
        """kv, gate ``[B, S, C]``. Returns them from the start of the open window on, as many
        windows as S columns can touch, and the column that the first of these starts at. What is
        behind the last column means nothing."""
        rate, states = self.compress_rate, (self.buffer_kv[name], self.buffer_gate[name])
        if self.first:
            usable = self.n // rate * rate
            for state, new in zip(states, (kv, gate), strict=True):
                state[:, : self.n - usable] = new[:, usable:]
            return kv[:, :usable], gate[:, :usable], 0
        start = self.cumulative_length - self.n
        held = start % rate
        if self.n == 1:
            for state, new in zip(states, (kv, gate), strict=True):
                state.index_copy_(1, held.view(1), new)
            return *states, start - held
        # Behind the rows of the open window come the new ones; where it was open for `held`.
        every = torch.arange((self.n + rate - 1) // rate * rate, device=kv.device)
        opened = (held + self.n) // rate * rate + every[:rate]
        chunk, rest = (
            torch.where(row < held, row, rate + row - held).clamp(max=rate + self.n - 1)
            for row in (every, opened)
        )
        kv, gate = torch.cat((states[0], kv), dim=1), torch.cat((states[1], gate), dim=1)
        for state, new in zip(states, (kv, gate), strict=True):
            state.copy_(new.index_select(1, rest))
        kv, gate = kv.index_select(1, chunk), gate.index_select(1, chunk)
        return kv, gate, start - held

    def update_compressor_states(self, name: str, compressed: Tensor) -> Tensor:
        """compressed ``[B, N, D]``: entries of the windows that store_compression_weights
        returned. Returns all entries; those that are not complete yet must be masked."""
        entries, n = self.compressed_kv[name], compressed.shape[1]
        if self.first:
            entries[:, :n] = compressed
            return compressed
        where = self.closed_before() + torch.arange(n, device=entries.device)
        entries.index_copy_(1, where, compressed)
        return entries


class CSALayer(HCALayer):
    """Two compressors whose windows overlap: ``overlap_kv`` and ``overlap_gate``
    ``[B, rate, D]`` are the first series of the last closed window."""

    names = ("compressor", "indexer")

    def __init__(self, attention: nn.Module, batch: int, max_len: int, like: Tensor) -> None:
        super().__init__(attention, batch, max_len, like)
        self.overlap_kv, self.overlap_gate = {}, {}
        for name, module in self.compressors.items():
            rows = (batch, self.compress_rate, module.head_dim)
            gate = torch.promote_types(like.dtype, module.position_bias.dtype)  # it is added
            self.overlap_kv[name] = self.buffer(rows)
            self.overlap_gate[name] = self.buffer(rows, gate).fill_(-torch.inf)

    def buffers(self) -> list[Tensor]:
        states = (self.overlap_kv, self.overlap_gate)
        return super().buffers() + [state[name] for state in states for name in self.names]

    def reset(self) -> None:
        super().reset()
        for gate in self.overlap_gate.values():
            gate.fill_(-torch.inf)  # before the first window there is none

    def update_overlap_state(
        self, name: str, chunk_kv: Tensor, chunk_gate: Tensor, head_dim: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """chunk_kv, chunk_gate ``[B, N, rate, 2 D]``. Returns what was kept of the window before
        them, and keeps that of the last one that is closed."""
        states = (self.overlap_kv[name], self.overlap_gate[name])
        if self.first:
            for state, chunk in zip(states, (chunk_kv, chunk_gate), strict=True):
                state.copy_(chunk[:, -1, :, :head_dim])
            return None, None
        closed = self.closed() - self.closed_before()
        last = (closed - 1).clamp(min=0).view(1)
        before = tuple(state.clone() for state in states)
        for state, chunk in zip(states, (chunk_kv, chunk_gate), strict=True):
            new = chunk[:, 0] if chunk.shape[1] == 1 else chunk.index_select(1, last).squeeze(1)
            state.copy_(torch.where(closed > 0, new[..., :head_dim], state))
        return before


LAYERS = {"sliding_attention": WindowLayer, CSA: CSALayer, HCA: HCALayer}
