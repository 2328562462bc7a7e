"""Sizes of a DeepSeek-V4, and the presets ``tiny``, ``flash`` and ``pro``."""

from __future__ import annotations

import dataclasses
from typing import Any

LAYER_KINDS = {
    "sliding_attention": "window",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN stretching of the rope frequencies of the layers with a compressor."""

    factor: float = 16.0
    original_max_len: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclasses.dataclass(frozen=True)
class Config:
    """One field per size. ``layers`` names each layer's attention: "window", "csa" or "hca".

    A shorter model of the same shapes: ``replace(config, layers=config.layers[:4])``.
    """

    layers: tuple[str, ...]
    vocab_size: int = 129280
    hidden_size: int = 4096
    norm_eps: float = 1e-6
    n_hash_layers: int = 3  # the first layers route by token id, the others by score
    n_mtp_layers: int = 0  # 0 or 1: the multi-token-prediction head, a window layer of its own

    n_heads: int = 64
    head_dim: int = 512  # [nope | rope]: the rope dims are the last ones
    rope_dim: int = 64
    q_lora_rank: int = 1024
    o_groups: int = 8
    o_lora_rank: int = 1024
    window: int = 128

    csa_ratio: int = 4
    hca_ratio: int = 128
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512

    rope_theta: float = 10000.0  # window layers
    compress_rope_theta: float = 160000.0  # csa and hca layers
    yarn: Yarn | None = Yarn()  # csa and hca layers

    n_experts: int = 256
    top_k: int = 6
    expert_size: int = 2048
    score_func: str = "sqrtsoftplus"
    routed_scale: float = 1.5
    swiglu_limit: float = 10.0

    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6

    @staticmethod
    def from_transformers(hf: Any) -> Config:
        """The Config of a ``transformers.DeepseekV4Config``. It has no MTP head: they drop it."""
        n_hash = hf.mlp_layer_types.count("hash_moe")
        if "hash_moe" in hf.mlp_layer_types[n_hash:]:
            raise ValueError(f"hash layers must come first, got {hf.mlp_layer_types}")
        main, compress = hf.rope_parameters["main"], hf.rope_parameters["compress"]
        if main["rope_type"] != "default":
            raise ValueError(f"window layers have plain rope, got {main}")
        return Config(
            layers=tuple(LAYER_KINDS[kind] for kind in hf.layer_types),
            vocab_size=hf.vocab_size,
            hidden_size=hf.hidden_size,
            norm_eps=hf.rms_norm_eps,
            n_hash_layers=n_hash,
            n_heads=hf.num_attention_heads,
            head_dim=hf.head_dim,
            rope_dim=int(hf.head_dim * main["partial_rotary_factor"]),
            q_lora_rank=hf.q_lora_rank,
            o_groups=hf.o_groups,
            o_lora_rank=hf.o_lora_rank,
            window=hf.sliding_window,
            csa_ratio=hf.compress_rates["compressed_sparse_attention"],
            hca_ratio=hf.compress_rates["heavily_compressed_attention"],
            index_n_heads=hf.index_n_heads,
            index_head_dim=hf.index_head_dim,
            index_topk=hf.index_topk,
            rope_theta=main["rope_theta"],
            compress_rope_theta=compress["rope_theta"],
            yarn=_yarn(compress),
            n_experts=hf.n_routed_experts,
            top_k=hf.num_experts_per_tok,
            expert_size=hf.moe_intermediate_size,
            score_func=hf.scoring_func,
            routed_scale=hf.routed_scaling_factor,
            swiglu_limit=hf.swiglu_limit,
            hc_mult=hf.hc_mult,
            hc_sinkhorn_iters=hf.hc_sinkhorn_iters,
            hc_eps=hf.hc_eps,
        )


def _yarn(rope: dict[str, Any]) -> Yarn | None:
    """Reads the "compress" entry of ``hf.rope_parameters``."""
    if rope["rope_type"] == "default":
        return None
    if rope["rope_type"] != "yarn" or rope.get("attention_factor") != 1.0:
        raise ValueError(f"expected plain rope, or YaRN with attention_factor=1.0, got {rope}")
    return Yarn(
        factor=rope["factor"],
        original_max_len=rope["original_max_position_embeddings"],
        beta_fast=rope.get("beta_fast") or Yarn.beta_fast,
        beta_slow=rope.get("beta_slow") or Yarn.beta_slow,
    )


def _alternating(first: str, n_layers: int) -> tuple[str, ...]:
    """Two layers of kind ``first``, then csa and hca in turn."""
    return (first, first) + tuple("hca" if i % 2 else "csa" for i in range(n_layers - 2))


PRESETS = {
    "tiny": Config(
        layers=("window", "csa", "hca", "csa"),
        vocab_size=128,
        hidden_size=64,
        n_hash_layers=1,
        n_mtp_layers=1,
        n_heads=4,
        head_dim=64,
        rope_dim=16,
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=32,
        window=8,
        hca_ratio=16,
        index_n_heads=16,  # with 4, one entry in 16 scores exactly 0 (relu): ties
        index_head_dim=32,
        index_topk=4,
        n_experts=8,
        top_k=2,
        expert_size=32,
    ),
    "flash": Config(layers=_alternating("window", 43), n_mtp_layers=1),
    "pro": Config(
        layers=_alternating("hca", 61),
        hidden_size=7168,
        n_mtp_layers=1,
        n_heads=128,
        q_lora_rank=1536,
        o_groups=16,
        index_topk=1024,
        n_experts=384,
        expert_size=3072,
        routed_scale=2.5,
    ),
}
