"""What generated programs have found wrong: each by the words that decide, the rest the first."""

from __future__ import annotations

from collections.abc import Mapping

# What was not fused, or not right, by the family and the words of a smallest program.
FOUND: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "turned back, heads behind the sequence in memory only": (
        "inv_rope_quant: turned back",
        {"layout": "heads by transpose", "rope": "real assignment_into_the_slice"},
    ),
    "heads in front of the sequence, behind it in memory": (
        "norm_rope_cache: of parts", {"sum": "heads first", "rope": "complex reference"},
    ),
    "groups and columns merged before the sums are rounded": (
        "inv_rope_grouped_bmm: projection",
        {"weights": "expand", "product": "bmm, as transformers",
         "cast of the weights": "fp32 product"},
    ),
    "blocks of weights, heads apart": (
        "inv_rope_grouped_bmm: projection",
        {"weights": "blocks", "product": "einsum, heads apart",
         "cast of the weights": "fp32 product"},
    ),
    "every second lane assigned, heads apart": (
        "inv_rope_grouped_bmm: projection",
        {"weights": "wide", "product": "einsum, heads apart", "rope": "real assignment_into_empty"},
    ),
    "a softmax in other steps": (
        "moe_router: by token id",
        {"dtype": "bf16", "wide": "yes", "scores": "softmax written out", "weights": "bounded",
         "find": "index", "seam in front": "contiguous", "x lies": "every second row"},
    ),
    "halves, of which the first holds some of the turned lanes": (
        "norm_rope_cache: kv written",
        {"lanes": "(96, 64)", "norm or none": "none", "rope": "rounded tables",
         "seam behind": "halves"},
    ),
}  # fmt: skip
# The same, where somebody else reads the inputs and results.
FOUND_BETWEEN: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "somebody else's cast of the logits": (
        "moe_router: by token id",
        {"dtype": "fp16", "wide": "yes", "rows": "1", "seam in front": "copy into empty",
         "x lies": "every second row"},
    ),
}  # fmt: skip
# What was not fused where a size is a symbol, or not right at another size.
FOUND_SIZES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "rows counted up to a symbol": (
        "moe_router: by top-k", {"rows": "3", "gather": "index", "scores": "sigmoid"},
    ),
    "rows cut apart and stacked, of a symbol's length": (
        "hyper_connections: in front of a sublayer",
        {"B": "3", "S": "3", "iterations": "1", "seam in front": "rows apart"},
    ),
}  # fmt: skip
