"""The static cache for transformers' DeepSeek-V4: the same tokens as on transformers' own cache,
in one graph, at fixed addresses.

fp32 on the CPU, a window of 8 and compressors of 4 and 16, so that 60 columns pass each border
several times. Logits differ by 4e-6 of a largest logit of 7 at most (torch 2.13, transformers
5.17 and 5.23): the static cache's sums run over more, masked, keys.
"""

import subprocess
import sys

import pytest
import torch

from .test_plain_model import SIZES, TOLERANCE, YARN, error, randomize_reference

LENGTHS = (3, 13, 37)
LONGEST = max(LENGTHS)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def hf():
    pytest.importorskip("transformers.models.deepseek_v4")
    from dsv4fuse.models import hf

    return hf


@pytest.fixture(scope="module")
def model(hf):
    return build(hf)


def build(hf):
    """A layer of each kind."""
    from transformers.models.deepseek_v4 import DeepseekV4Config, DeepseekV4ForCausalLM

    sizes = dict(SIZES, num_hidden_layers=3)
    for kinds in ("layer_types", "mlp_layer_types"):
        sizes[kinds] = sizes[kinds][:3]
    config = DeepseekV4Config(**sizes, rope_parameters=YARN)
    model = DeepseekV4ForCausalLM(config).eval().requires_grad_(False)
    randomize_reference(model)
    model.config._experts_implementation = "grouped_mm"  # "eager" breaks the graph
    return model


def text(n_columns, side="left", lengths=LENGTHS, seed=1):
    """Tokens, mask and positions ``[B, n_columns]``: prompts padded to LONGEST, then more."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 97, (len(lengths), n_columns), generator=generator)
    mask = torch.ones_like(tokens)
    for row, length in enumerate(lengths):
        gap = slice(LONGEST - length) if side == "left" else slice(length, LONGEST)
        tokens[row, gap], mask[row, gap] = 0, 0
    return tokens, mask, (mask.cumsum(1) - 1).clamp(min=0)


def own(model):
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def generated(model, n, **others):
    tokens, mask, _ = text(LONGEST)
    out = model.generate(
        tokens, attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=0,
        eos_token_id=None, **others,
    )  # fmt: skip
    assert out.shape == (len(LENGTHS), LONGEST + n)
    return out[:, LONGEST:]


def counting(graphs, inner):
    """What generate compiles its decode with; each graph is appended to ``graphs``."""
    from transformers import CompileConfig

    def compiler(gm, inputs):
        graphs.append(gm)
        return inner(gm, inputs)

    config = CompileConfig(backend=compiler, mode=None, fullgraph=True)
    config.to_dict = lambda: dict(backend=compiler, fullgraph=True)  # its own copies the backend
    config._compile_all_devices = True
    return config


def addresses(cache):
    return [buffer.data_ptr() for layer in cache.layers for buffer in layer.buffers()]


def test_generate_is_one_graph_and_the_tokens_of_the_own_cache(hf, model, monkeypatch):
    from dsv4fuse.kernels import _common

    from dsv4fuse import Report, backend

    monkeypatch.setattr(_common, "INTERPRETED", False)
    steps, graphs, options = 40, [], {"select": "always", "inner": "eager"}
    wanted = generated(model, steps)
    assert len(wanted.unique()) > 10  # or else equal tokens mean little
    cache = hf.StaticV4Cache(model, len(LENGTHS), LONGEST + steps)
    before = addresses(cache)
    assert len(before) == len(set(before)) == 3 + 2 * 3 + 3 + 2 * 2
    config = counting(graphs, lambda gm, x: backend.dsv4fuse(gm, x, options=options))
    compiling = dict(compile_config=config, past_key_values=cache)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(generated(model, steps, **compiling), wanted)
        cache.reset()
        assert torch.equal(generated(model, 12, **compiling), wanted[:, :12])
    assert len(graphs) == 1 and addresses(cache) == before
    report = Report.of(model)
    assert {"norm_rope_cache", "clamp_swiglu_quant", "inv_rope_quant"} <= report.counts().keys()
    assert report.counts()["compress_kv"] == 3 and not report.with_status("rejected")
    written = [s.fusion for s in report.with_status("taken") if "cache write" in s.reason]
    assert sorted(written) == ["compress_kv"] * 3 + ["norm_rope_cache"] * 3


@pytest.mark.long
def test_generate_256_tokens(hf, model):
    wanted = generated(model, 256)
    cache = hf.StaticV4Cache(model, len(LENGTHS), LONGEST + 256)
    graphs = []
    config = counting(graphs, lambda gm, _: gm)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = generated(model, 256, past_key_values=cache, compile_config=config)
    assert torch.equal(found, wanted) and len(graphs) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["inductor", "dsv4fuse"])
def test_generate_under_cuda_graphs(hf, backend):
    from torch._dynamo.utils import counters
    from transformers import CompileConfig

    from dsv4fuse import backend as ours

    model = build(hf).cuda()
    tokens, mask, _ = (x.cuda() for x in text(LONGEST))
    given = dict(attention_mask=mask, max_new_tokens=256, do_sample=False, pad_token_id=0)
    wanted = model.generate(tokens, eos_token_id=None, **given)
    given["past_key_values"] = hf.StaticV4Cache(model, len(LENGTHS), LONGEST + 256)
    compiler = ours.dsv4fuse if backend == "dsv4fuse" else backend
    given["compile_config"] = CompileConfig(backend=compiler, fullgraph=True)
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(model.generate(tokens, eos_token_id=None, **given), wanted)
    assert not counters["inductor"]["cudagraph_skips"]


def test_a_plain_decode_loop(hf, model):
    """Padded on the right, the mask always as long as the cache."""
    tokens, mask, positions = text(LONGEST + 40, "right")
    cache, reference, graphs = hf.StaticV4Cache(model, 3, LONGEST + 40), own(model), []
    step = torch.compile(model, backend=counting(graphs, lambda gm, _: gm).backend, fullgraph=True)
    for at in range(LONGEST - 1, LONGEST + 40):
        columns = slice(at if at >= LONGEST else 0, at + 1)
        given = dict(position_ids=positions[:, columns].contiguous())
        forward = step if at >= LONGEST else model
        with torch.compiler.set_stance("fail_on_recompile" if at > LONGEST else "default"):
            found = forward(
                tokens[:, columns].contiguous(), attention_mask=mask, past_key_values=cache, **given
            ).logits
        given["attention_mask"] = mask[:, : at + 1]
        wanted = model(tokens[:, columns], past_key_values=reference, **given).logits
        assert error(found, wanted) < TOLERANCE
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "sizes",
    [(2, 1, 3, 5, 1, 1, 17, 4, 7, 1, 1, 1, 1, 9, 2), (1, 1, 2, 20, 16, 8, 8), (40, 5, 5, 5, 1, 1)],
)
def test_forwards_of_any_number_of_columns(hf, model, sizes):
    tokens, mask, positions = text(sum(sizes))
    cache, reference, at = hf.StaticV4Cache(model, 3, sum(sizes)), own(model), 0
    for n in sizes:
        given = dict(position_ids=positions[:, at : at + n])
        columns, at = tokens[:, at : at + n], at + n
        given["attention_mask"] = mask[:, :at]
        found = model(columns, past_key_values=cache, **given).logits
        assert error(found, model(columns, past_key_values=reference, **given).logits) < TOLERANCE
        assert int(cache.get_seq_length()) == at


def test_without_a_mask_or_positions(hf, model):
    tokens = text(30, lengths=(LONGEST, LONGEST))[0]
    cache, reference = hf.StaticV4Cache(model, 2, 30), own(model)
    for columns in tokens.split([10, *[1] * 12, 8], dim=1):
        found = model(columns, past_key_values=cache).logits
        wanted = model(columns, past_key_values=reference, use_cache=True).logits
        assert error(found, wanted) < TOLERANCE


def test_rows_change_places(hf, model):
    """What beam search asks for: the rows continue as those that they were copied from."""
    tokens, mask, positions = text(LONGEST + 30)
    chosen = torch.tensor([2, 0, 2])
    mixed, sorted_ = (hf.StaticV4Cache(model, 3, LONGEST + 30) for _ in range(2))
    prompt = dict(attention_mask=mask[:, :LONGEST], position_ids=positions[:, :LONGEST])
    model(tokens[:, :LONGEST], past_key_values=mixed, **prompt)
    mixed.reorder_cache(chosen)
    tokens, mask, positions = tokens[chosen], mask[chosen], positions[chosen]
    prompt = dict(attention_mask=mask[:, :LONGEST], position_ids=positions[:, :LONGEST])
    model(tokens[:, :LONGEST], past_key_values=sorted_, **prompt)
    for at in range(LONGEST, LONGEST + 30):
        given = dict(attention_mask=mask, position_ids=positions[:, at : at + 1])
        found, wanted = (
            model(tokens[:, at : at + 1], past_key_values=cache, **given).logits
            for cache in (mixed, sorted_)
        )
        assert error(found, wanted) < TOLERANCE


def test_other_caches_work_as_before(hf):
    model = build(hf)
    tokens, mask, positions = text(50)

    def logits():
        cache = own(model)
        return [
            model(
                tokens[:, columns],
                attention_mask=mask[:, : columns.stop],
                position_ids=positions[:, columns],
                past_key_values=cache,
            ).logits
            for columns in (slice(0, 37), slice(37, 38), slice(38, 50))
        ]

    before, generation = logits(), generated(model, 4)
    hf.StaticV4Cache(model, 3, 50)
    hf.StaticV4Cache(model, 2, 50)
    assert all(torch.equal(x, y) for x, y in zip(before, logits(), strict=True))
    assert torch.equal(generated(model, 4), generation)
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert len(hooks) == 2  # the body, and the one compressor without an indexer


def test_what_does_not_fit_is_refused(hf, model):
    cache = hf.StaticV4Cache(model, 2, 30)
    with pytest.raises(ValueError, match="for 2 sequences, got 3"):
        model(text(LONGEST)[0], past_key_values=cache)
    with pytest.raises(ValueError, match="for 30 columns, got 37"):
        model(text(LONGEST, lengths=LENGTHS[:2])[0], past_key_values=cache)


def test_without_transformers(checkout):
    code = """
import sys
sys.modules["transformers"] = None
import dsv4fuse.models
try:
    import dsv4fuse.models.hf
except ImportError as error:
    print(error)
"""
    run = dict(cwd=checkout, capture_output=True, text=True, timeout=120)
    done = subprocess.run([sys.executable, "-c", code], **run)
    assert "needs transformers 5.17 or later: pip install" in done.stdout, done.stderr
