"""A static cache for DeepSeek-V4 of ``transformers`` (5.17 and later): one graph per decode step.

    cache = StaticV4Cache(model, batch=3, max_len=1024)
    model.generate(**padded, past_key_values=cache)           # compiles its decode on a GPU

    step = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    step(token, attention_mask=mask, position_ids=position, past_key_values=cache)

``transformers``' own cache grows by concatenation and counts in Python integers: a new graph
for each step. Here every buffer has its size from the start and its address for good, and the
count of tokens is a tensor. The first forward is a prefill and computes exactly what it computes
on ``transformers``' cache; each later one takes any number of tokens, in shapes that depend on
that number alone.

Equal to ``transformers``' own cache means equal in batches of different lengths too: windows of
the compressors are counted from the first column of the batch, padding included, as there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers.cache_utils import Cache
    from transformers.masking_utils import create_masks_for_generate
except ImportError as error:
    raise ImportError(
        "dsv4fuse.models.hf needs transformers 5.17 or later: pip install 'transformers>=5.17'"
    ) from error

from dsv4fuse.models._hf_layers import HCA, LAYERS


class StaticV4Cache(Cache):
    """For ``batch`` sequences of up to ``max_len`` columns, padding included, of this model.

    The model is prepared for it (see ``prepare``) and works with any other cache as before.
    One cache serves one batch after the other: ``reset()`` in between.
    """

    layers: list[Any]

    def __init__(self, model: nn.Module, batch: int, max_len: int) -> None:
        prepare(model)
        dtype = model.get_input_embeddings().weight.dtype
        layers: list[Any] = []
        counters: dict[torch.device, Tensor] = {}
        for block in model.base_model.layers:
            attention = block.self_attn
            like = torch.empty(0, dtype=dtype, device=attention.kv_proj.weight.device)
            layer = LAYERS[attention.layer_type](attention, batch, max_len, like)
            layer.counts = like.device not in counters
            if layer.counts:
                counters[like.device] = layer.buffer((), torch.int64)
            layer.cumulative_length = counters[like.device]
            layers.append(layer)
        super().__init__(layers=layers)

    def mask(self, query_length: int, attention_mask: Tensor | None, like: Tensor) -> Tensor:
        """The additive mask ``[B, 1, S, keys]`` of the window, of like's dtype and device, for the
        next S columns: 0, or the lowest number. attention_mask ``[B, any]`` is False or 0 for
        columns of padding; columns it does not have are none."""
        layer = self.layers[0]
        n_keys, first = layer.get_mask_sizes(query_length)
        queries = torch.arange(query_length, device=like.device) + self.get_seq_length()
        keys = torch.arange(n_keys, device=like.device) + first
        distance = queries.unsqueeze(-1) - keys
        seen = ((distance >= 0) & (distance < layer.window)).expand(layer.batch_size, 1, -1, -1)
        if attention_mask is not None:
            real = attention_mask.to(device=like.device, dtype=torch.bool)
            real = real.index_select(1, keys.clamp(max=real.shape[1] - 1))
            seen = seen & real[:, None, None]
        zero = torch.zeros((), dtype=like.dtype, device=like.device)  # weights may be distributed
        return torch.where(seen, zero, torch.finfo(like.dtype).min)


def prepare(model: nn.Module) -> None:
    """What a cache cannot do from inside, on this instance of the model only; for other caches
    all of it steps aside.

    - A hook before the model's forward makes the mask of the window: ``transformers`` asks how
      many columns were seen, a tensor here, and takes a branch on it.
    - ``generate`` makes its masks outside of the graph; its ``create_masks_for_generate`` is
      given the same mask.
    - A hook behind each compressor without an indexer masks the entries that are not there yet:
      in decode the model returns no mask, as its own cache holds no other entries.
    """
    if "create_masks_for_generate" in vars(model):
        return
    model.create_masks_for_generate = _masks_for_generate
    model.base_model.register_forward_pre_hook(_mask_window, with_kwargs=True)
    for block in model.base_model.layers:
        if block.self_attn.layer_type == HCA:
            block.self_attn.compressor.register_forward_hook(_mask_entries)


def _cache(given: dict[str, Any]) -> Any:
    """The cache among keyword arguments; transformers 5.24 renamed it."""
    return given.get("cache", given.get("past_key_values"))


def _masks_for_generate(**given: Any) -> Any:
    cache, inputs = _cache(given), given["inputs_embeds"]
    if isinstance(cache, StaticV4Cache):
        return cache.mask(inputs.shape[1], given["attention_mask"], inputs)
    return create_masks_for_generate(**given)


def _mask_window(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    cache, mask = _cache(kwargs), kwargs.get("attention_mask")
    if not isinstance(cache, StaticV4Cache) or isinstance(mask, dict):
        return None
    if mask is None or mask.dim() == 2:
        inputs = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        length = next(x.shape[1] for x in inputs if x is not None)
        kwargs = kwargs | {"attention_mask": cache.mask(length, mask, module.embed_tokens.weight)}
    return args, kwargs


def _mask_entries(module: nn.Module, args: Any, output: Any) -> Any:
    entries, bias = output
    cache, layer_idx = args[3:]
    if bias is not None or not isinstance(cache, StaticV4Cache) or cache.layers[layer_idx].first:
        return output
    absent = torch.arange(entries.shape[2], device=entries.device) >= (
        cache.layers[layer_idx].closed()
    )
    bias = entries.new_zeros(absent.shape).masked_fill(absent, -torch.inf)
    return entries, bias.expand(entries.shape[0], 1, 1, -1)
