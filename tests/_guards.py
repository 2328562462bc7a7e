"""The guards of correctness: the lines that keep a wrong result out, and a test that misses each.

A guard is named by the text that stands in its file once, by what stands there when the guard is
deleted, and by a test that then fails. tests/test_guards.py does both. Whoever moves or adds a
guard does so here as well.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Guard:
    """``old`` → ``new`` in ``file`` deletes it; ``test`` is then red."""

    name: str
    file: str
    old: str
    new: str
    test: str


def _mutant(name: str) -> str:
    return f"test_spellings.py::test_mutant[norm_rope_cache-{name}]"


def _signed(name: str) -> str:
    return f"test_spellings.py::test_spelling[sparse_sink_attention-by gather: {name}]"


_VERIFY, _REWRITE, _WRITES = "dsv4fuse/verify.py", "dsv4fuse/rewrite.py", "dsv4fuse/writes.py"
_RULES, _SLOTS = "dsv4fuse/rules.py", "dsv4fuse/slots.py"

GUARDS = [
    # ---- the check on random inputs
    Guard("check: value", _VERIFY,
          "if worst <= max(own + allowed, ALIKE * own):", "if True:",
          "test_verify.py::test_seen[a value]"),
    Guard("check: how many differ", _VERIFY, "if part > DIFFERENT else None", "if False else None",
          "test_verify.py::test_many_small_differences[all-dtype0]"),
    Guard("router: a wrapping index", "patterns/_routing.py",
          "along or gathered.node.target is aten.index.Tensor", "along",
          "test_spellings.py::test_mutant[moe_router-hash: entries wrap in an index]"),
    Guard("check: NaN", _VERIFY, "if not torch.equal(x.isnan(), y.isnan()):", "if False:",
          "test_verify.py::test_seen[a NaN that is gone]"),
    Guard("check: infinities", _VERIFY,
          "if not torch.equal(x.where(x.isinf(), 0), y.where(y.isinf(), 0)):", "if False:",
          "test_verify.py::test_seen[the other infinity]"),
    Guard("check: dtype", _VERIFY,
          "if (a.dtype, a.shape, strides(a)) != (b.dtype, b.shape, strides(b)):",
          "if (a.shape, strides(a)) != (b.shape, strides(b)):",
          "test_verify.py::test_seen[dtype]"),
    Guard("check: strides", _VERIFY,
          "if (a.dtype, a.shape, strides(a)) != (b.dtype, b.shape, strides(b)):",
          "if (a.dtype, a.shape) != (b.dtype, b.shape):",
          "test_verify.py::test_seen[strides]"),
    Guard("check: whatever is taken", "dsv4fuse/pipeline.py",
          "if found.wrong:", "if False:",
          "test_exact.py::test_farther_than_the_module_is_rejected"),
    Guard("check: memory", _VERIFY,
          "            return NO_MEMORY", "            return None",
          "test_faults.py::test_out_of_memory_in_the_check"),
    # ---- what may be rewritten
    Guard("rewrite: dtype", _REWRITE, "if a.dtype != b.dtype:", "if False:",
          "test_rewrite.py::test_declined[dtype]"),
    Guard("rewrite: shape", _REWRITE, '(("shape", a.shape, b.shape), ("strides",', '(("strides",',
          "test_rewrite.py::test_declined[shape]"),
    Guard("rewrite: strides", _REWRITE, ', ("strides", a.stride(), b.stride()))', ",)",
          "test_rewrite.py::test_declined[strides]"),
    Guard("rewrite: parts of the cache", _REWRITE,
          "if node not in candidate.caches and base_of(node) in candidate.caches:", "if False:",
          _mutant("rows of the cache itself")),
    Guard("rewrite: readers of the old cache", _REWRITE,
          "if user not in gone and not user < first and not home:", "if False:",
          _mutant("read between")),
    Guard("rewrite: early readers", _REWRITE, "if last is not None and early is not None:",
          "if False:", "test_rewrite.py::test_a_reader_in_front_of_an_input"),
    # ---- what is a write to a cache
    Guard("write: accumulate", _WRITES, "if not _alike(target, base) or accumulate or len(",
          "if not _alike(target, base) or len(", _mutant("write: accumulated")),
    Guard("write: step", _WRITES, " or step != 1 or ", " or ", _mutant("write: every second row")),
    Guard("write: lanes", _WRITES,
          "if len(shape_of(value)) < 1 or shape_of(value)[-1] != shape_of(cache)[-1]:",
          "if len(shape_of(value)) < 1:",
          "test_writes.py::test_none[one number for all lanes]"),
    Guard("write: numbers of rows", _WRITES,
          'if any(t.meta["val"].dtype not in rules.INTEGERS for t in tensors):',
          "if False:", "test_writes.py::test_none[a choice of rows, not their numbers]"),
    Guard("write: one row for many", _WRITES,
          "if missing < 0 or any(a < missing for a in named):", "if missing < 0:",
          "test_writes.py::test_none[one row for all slots]"),
    Guard("write: scattered rows", _WRITES,
          "if not _alike(target, base) or axis == len(whole) or rows is None:",
          "if not _alike(target, base) or axis == len(whole):",
          _mutant("write: scattered with the next row")),
    Guard("write: overlapping pieces", _SLOTS, "not (apart and whole)", "not whole",
          _mutant("write: pieces that overlap")),
    Guard("write: rows left out", _SLOTS, "not (apart and whole)", "not apart",
          _mutant("write: a row left out")),
    Guard("write: sequences", _SLOTS, "if place != other or not", "if not",
          _mutant("write: pieces of other sequences")),
    Guard("chosen: what the mask hides", "patterns/_chosen.py",
          " and rules.number(t.args[1]) == 0\n", "\n", _signed("hidden from one on")),
    Guard("chosen: of which index", "patterns/_chosen.py", "if named in shown and", "if",
          _signed("another index is hidden")),
    Guard("chosen: by what it hides", "patterns/_chosen.py", "if below and fill == -math.inf else",
          "if below else", _signed("hidden by a number")),
    Guard("chosen: which it hides", "patterns/_chosen.py", '("lt" if hides else "ge")',
          "t.op", _signed("hidden where not negative")),
    Guard("top-k: values", "patterns/unsorted_topk.py", "if read != {1} or", "if 1 not in read or",
          "test_spellings.py::test_mutant[unsorted_topk-values are read]"),
    Guard("top-k: along the scatter's axis", "patterns/unsorted_topk.py",
          "axes.get(index) == dim % node.meta[\"val\"].dim()", "index in axes",
          "test_spellings.py::test_mutant[unsorted_topk-along another axis]"),
    Guard("top-k: the same for each", "patterns/unsorted_topk.py",
          "return axis if all(_alike(a, axis - rank) for a in others) else None", "return axis",
          "test_spellings.py::test_mutant[unsorted_topk-places are added]"),
    Guard("top-k: each for itself", "patterns/unsorted_topk.py",
          "if torch.Tag.pointwise not in getattr(node.target, \"tags\", ()):", "if False:",
          "test_spellings.py::test_mutant[unsorted_topk-summed up]"),
    Guard("top-k: all there are", "patterns/unsorted_topk.py",
          "return static and topk.args[1] ==", "return static and topk.args[1] <=",
          "test_spellings.py::test_spelling[unsorted_topk-all but one]"),
    Guard("top-k: whose scores nobody reads", "patterns/unsorted_topk.py",
          "and node.users and found.issuperset(node.users)", "and found.intersection(node.users)",
          "test_unsorted_topk.py::test_scores_that_are_read_stay"),
    Guard("top-k: what is drawn", "patterns/unsorted_topk.py",
          "if torch.Tag.nondeterministic_seeded in getattr(node.target, \"tags\", ()):",
          "if False:", "test_unsorted_topk.py::test_random_numbers_are_drawn"),
    # ---- what is the same value
    Guard("match: dtype", "dsv4fuse/match.py",
          "return p.dtype == g.dtype or (hole.wide and rules.widens(g.dtype, p.dtype))",
          "return True", "test_rewrite.py::test_a_value_of_another_dtype_is_no_match"),
    Guard("lower: alpha", "dsv4fuse/lower.py", ' or node.kwargs.get("alpha", 1) != 1:', ":",
          _mutant("factor of a sum")),
    Guard("views: a rounded number", "dsv4fuse/views.py",
          "torch.tensor(value, dtype=dtype).item()", "value", _mutant("rounded eps")),
    Guard("terms: the sign of a zero", "dsv4fuse/terms.py",
          'repr(args) if op == "const" else args', "args",
          "test_meanings.py::test_numbers_are_one_term_only_where_they_are_one"),
    Guard("rule: narrow after wide", _RULES,
          'if x.op == "cast" and x.args[0].dtype is d and widens(d, x.dtype):',
          'if x.op == "cast" and x.args[0].dtype is d:',
          "test_rules_held.py::test_a_rounding_is_kept"),
    Guard("rule: a bound that rounds", _RULES,
          't.op != "const" or holds(t.args[0], x.dtype) for t in x.args', "True for t in x.args",
          "test_rules_held.py::test_a_bound_that_rounds_keeps_its_dtype"),
    Guard("rule: crossed bounds", _RULES, "and lo.args[0] <= hi.args[0] and", "and",
          "test_rules_held.py::test_crossed_clamps_keep_their_order"),
    Guard("rule: the sign of a bound", _RULES,
          "if repr(held) not in (repr(bound), repr(rounded(bound, d))):",
          "if held not in (bound, rounded(bound, d)):",
          "test_rules_held.py::test_where_with_the_other_zero_is_no_clamp"),
    Guard("rule: the count of a mean", _RULES, " or math.prod(extents) != n.args[0]:", ":",
          "test_rules_held.py::test_a_sum_over_another_number_is_no_mean"),
    Guard("rule: fp16 overflows", _RULES, "if d not in (torch.float32, torch.float64):\n",
          "if False:\n", "test_rules_held.py::test_a_silu_in_fp16_is_not_rewritten"),
    # ---- the ways in, and files
    Guard("gradients", "dsv4fuse/backend.py",
          "if compat.will_be_differentiated(gm, example_inputs):", "if False:",
          "test_bad_input.py::test_gradients_pass_through_with_a_note"),
    Guard("reports: format", "dsv4fuse/report.py",
          'if not isinstance(data, dict) or data.get("format") != _FORMAT:',
          "if not isinstance(data, dict):",
          "test_faults.py::test_reports_of_another_form_are_none[{'format': 2}]"),
    Guard("times: numbers", "dsv4fuse/cache.py",
          "if not all(math.isfinite(t) and t > 0 for t in times):", "if False:",
          "test_faults.py::test_damaged_times_are_none"),
    Guard("identity: versions", "dsv4fuse/cache.py", '"environment": _environment(),', "",
          "test_cache_files.py::test_uuid_follows_the_interpreter_switch_and_torch"),
    # ---- kernels
    Guard("kernel: slots", "kernels/_rows.py", "hit = live & (slot >= 0) & (slot < count)",
          "hit = live & (slot < count)", "test_kernel_cache_write.py::test_cache_strided_view"),
    Guard("kernel: pages", "kernels/_rows.py", "hit &= (page >= 0) & (page < pages)", "pass",
          "test_kernel_cache_write.py::test_pages_that_are_not_there"),
    Guard("kernel: rounding of the norm's rsqrt", "kernels/_norms.py",
          "            rstd = round_few(rstd, XD)", "            pass",
          "test_kernel_norm_rope.py::test_norm_rope_faithful[dtype0-rstd-None-once-bf16]"),
    Guard("kernel: rounding before the weight", "kernels/_norms.py",
          "if not PRECISE and (NORM != 1 or not HAS_W):", "if False:",
          "test_kernel_norm_rope.py::test_norm_rope_faithful[dtype0-weight-weight7-once-bf16]"),
    Guard("kernel: NaN in a clamp", "kernels/_common.py",
          "return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)", "return tl.minimum(a, b)",
          "test_kernel_swiglu.py::test_silu_of_every_16_bit_value"),
    Guard("kernel: padding of the scales", "kernels/clamp_swiglu_quant.py",
          "shape = (groups, common.align4(tokens)) if col_major",
          "shape = (groups, tokens) if col_major",
          "test_kernel_swiglu.py::test_clamp_swiglu_quant[1-3072-128-True-fp32]"),
    Guard("kernel: zeros in the padding", "kernels/clamp_swiglu_quant.py",
          "padded = common.align4(tokens) if col_major else tokens", "padded = tokens",
          "test_kernel_swiglu.py::test_clamp_swiglu_quant[1-3072-128-True-fp32]"),
    Guard("kernel: dense rows", "kernels/_norm_rope.py",
          'common.require(t.stride(-1) == 1, "the last axis of q and kv must be dense")', "pass",
          "test_bad_input.py::test_lanes_that_are_not_dense"),
    Guard("kernel: launches while others are described", "kernels/_flash_hopper_op.py",
          "if replaced():", "if False:",
          "test_attention_hopper.py::test_not_launched_where_launches_are_described"),
    Guard("kernel: a tile that is still read", "kernels/_indexer_producer.py",
          "mbarrier.wait(s.empty.index(c % SLOTS), ((c // SLOTS) & 1) ^ 1)", "pass",
          "test_indexer_hopper.py::test_exact_on_integers[(2, 5, 300)-dtype0]"),
    Guard("kernel: keys that nobody sees", "kernels/_indexer_producer.py",
          "for tile in range(hi, end):", "for tile in range(end, end):",
          "test_indexer_hopper.py::test_ranges[causal-dtype0]"),
    Guard("kernel: rows for 16-byte copies", "kernels/_hopper.py",
          "if t.data_ptr() % 32 == 0 and t.stride(-1) == 1 and not any(s % 16 for s in steps):",
          "if True:", "test_attention_hopper.py::test_rows_at_odd_places_are_copied"),
    Guard("kernel: dtypes", "kernels/clamp_swiglu_quant.py",
          'common.require(gate.dtype == up.dtype, f"gate is {gate.dtype}, up is {up.dtype}")',
          "pass", "test_kernels.py::test_misuse_is_explained"),
]  # fmt: skip
