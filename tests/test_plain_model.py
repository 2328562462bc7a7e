"""The plain model of examples/deepseek_v4 against transformers, and its promises on caches.

Everything is fp32 on the CPU. Errors are relative to the largest logit: the largest seen is
1.3e-6 (torch 2.13, transformers 5.17 and 5.23), what transformers' own cached decode differs
from its own prefill by.
"""

import dataclasses

import pytest
import torch

from examples.deepseek_v4 import (
    PRESETS,
    Config,
    Transformer,
    load_transformers,
    moe,
    randomize,
)
from examples.deepseek_v4.compressor import ring_slot
from examples.deepseek_v4.generate import generate, pad

TOLERANCE = 1e-5
LENGTHS = (3, 13, 37)  # shorter than any window; in between; past two windows of ratio 16
STEPS = 64
CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"
SIZES = dict(
    vocab_size=97,
    hidden_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=64,
    q_lora_rank=32,
    num_experts_per_tok=2,
    n_routed_experts=8,
    max_position_embeddings=512,
    layer_types=["sliding_attention", CSA, HCA, CSA],
    compress_rates={CSA: 4, HCA: 16},
    mlp_layer_types=["hash_moe", "moe", "moe", "moe"],
    sliding_window=8,
    o_groups=2,
    o_lora_rank=32,
    index_n_heads=16,  # with 4, one entry in 16 scores exactly 0 (relu): ties go either way
    index_head_dim=32,
    index_topk=4,  # of up to 25 entries, so that the choice matters
    swiglu_limit=1.0,  # within reach of these activations
    rms_norm_eps=1e-2,  # so that the eps are seen
    hc_eps=1e-2,
    partial_rotary_factor=0.25,
    attn_implementation="eager",
)
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=4096)


def randomize_reference(reference, seed=0):
    """Weights away from the neutral values of transformers' initialisation, which hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in reference.state_dict().items():
        if name.endswith("tid2eid"):
            rows = torch.rand(len(weight), SIZES["n_routed_experts"], generator=generator)
            weight.copy_(rows.topk(weight.shape[1]).indices)
        elif weight.dim() == 1:
            weight.normal_(float("norm" in name), 0.3, generator=generator)
        else:
            wide = "position_bias" in name or "embed" in name
            std = 1.0 if wide else 1.5 * weight.shape[-1] ** -0.5
            weight.normal_(0.0, std, generator=generator)


def build(**changes):
    """A transformers model and ours with the same weights."""
    hf = pytest.importorskip("transformers.models.deepseek_v4")
    config = hf.DeepseekV4Config(**{**SIZES, **changes})
    reference = hf.DeepseekV4ForCausalLM(config).eval().requires_grad_(False)
    randomize_reference(reference)
    model = Transformer(Config.from_transformers(config))
    load_transformers(model, reference.state_dict())
    return reference, model


@pytest.fixture(scope="module")
def pair():
    return build(rope_parameters=YARN)


def random_prompts(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(97, (n,), generator=generator).tolist() for n in lengths]


def error(ours, wanted):
    assert ours.shape == wanted.shape and wanted.isfinite().all()
    return ((ours - wanted).abs().max() / wanted.abs().max()).item()


def greedy_reference(reference, prompt):
    """One prompt alone, on its own cache: the logits of prompt end and steps, and tokens."""
    from transformers import DynamicCache

    cache = DynamicCache(config=reference.config)
    tokens, logits = torch.tensor([prompt]), []
    for _ in range(STEPS + 1):
        out = reference(tokens, past_key_values=cache, use_cache=True).logits[:, -1]
        tokens = out.argmax(-1, keepdim=True)
        logits.append(out)
    return torch.cat(logits)  # [STEPS + 1, vocab]


def caches(model):
    names = ("window", "kv_state", "gate_state", "entries")
    return {n: b for n, b in model.named_buffers() if n.rpartition(".")[2] in names}


@pytest.mark.parametrize("length", [2, 12, 70])
def test_prefill(pair, length):
    reference, model = pair
    model.allocate(1, length)
    tokens, positions = pad(random_prompts([length]), "cpu")
    assert error(model(tokens, positions, prefill=True), reference(tokens).logits) < TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        dict(scoring_func="sigmoid"),
        dict(scoring_func="softmax"),
        dict(sliding_window=5, rope_parameters=None),
        dict(mlp_layer_types=["moe"] * 4, hc_mult=2, hc_sinkhorn_iters=3),
    ],
    ids=["sigmoid", "softmax", "plain-rope", "two-streams"],
)
def test_prefill_variants(changes, monkeypatch):
    # transformers documents softmax as a score function and has no such activation.
    activations = pytest.importorskip("transformers.activations")
    monkeypatch.setitem(activations.ACT2FN, "softmax", (torch.nn.Softmax, {"dim": -1}))
    reference, model = build(**changes)
    model.allocate(1, 70)
    tokens, positions = pad(random_prompts([70]), "cpu")
    assert error(model(tokens, positions, prefill=True), reference(tokens).logits) < TOLERANCE


def test_batch_of_different_lengths_decodes_like_each_alone(pair):
    reference, model = pair
    prompts = random_prompts(LENGTHS)
    wanted = torch.stack([greedy_reference(reference, prompt) for prompt in prompts])

    model.allocate(len(prompts), max(LENGTHS) + STEPS)
    tokens, positions = pad(prompts, "cpu")
    logits = [model.prefill(tokens, positions)]
    for step in range(STEPS):
        position = torch.tensor(LENGTHS).unsqueeze(1) + step
        logits.append(model.decode(logits[-1].argmax(-1, keepdim=True), position)[:, 0])
    logits = torch.stack(logits, dim=1)

    assert error(logits, wanted) < TOLERANCE
    assert torch.equal(logits.argmax(-1), wanted.argmax(-1))
    assert len(wanted.argmax(-1).unique()) > 10  # or else the comparison of tokens means little
    assert torch.equal(generate(model, prompts, STEPS + 1), wanted.argmax(-1))


def test_several_tokens_per_step_and_drafts_that_are_dropped(pair):
    """Steps of four tokens, the last two of them wrong and decoded again two steps further."""
    reference, model = pair
    length, total = 6, 80
    (text,) = random_prompts([total + 2])
    wanted = reference(torch.tensor([text])).logits[0]
    model.allocate(1, total + 2, next_n=4)
    model.prefill(*pad([text[:length]], "cpu"))
    for start in range(length, total, 2):
        draft = [(t + 1) % 97 for t in text[start + 2 : start + 4]]
        tokens = torch.tensor([text[start : start + 2] + draft])
        logits = model.decode(tokens, torch.arange(start, start + 4).unsqueeze(0))[0, :2]
        assert error(logits, wanted[start : start + 2]) < TOLERANCE
    with pytest.raises(ValueError, match="5 tokens in a step, allocated for 4"):
        model.decode(torch.zeros(1, 5, dtype=torch.int64), torch.arange(5).unsqueeze(0))


def test_padding_leaves_caches_alone(pair):
    """A row of padding keeps all it has, in prefill and in decode; the other row does not."""
    _, model = pair
    model.allocate(2, 64, next_n=2)
    model.prefill(*pad(random_prompts([40, 30]), "cpu"))

    def kept():
        return {name: cache[:, :-1].clone() for name, cache in caches(model).items()}

    tokens, positions = pad(random_prompts([20, 20], seed=2), "cpu")
    positions[0] = -1
    for forward in (
        lambda: model.prefill(tokens, positions),
        lambda: model.decode(torch.tensor([[5, 6], [7, 8]]), torch.tensor([[-1, -1], [30, 31]])),
    ):
        before = kept()
        forward()
        after = kept()
        assert all(torch.equal(before[name][0], after[name][0]) for name in before)
        assert all(not torch.equal(before[name][1], after[name][1]) for name in before)

    # A padded draft behind a real token neither: the next step sees what a step alone would.
    model.allocate(1, 64, next_n=2)
    text = torch.tensor(random_prompts([30]))
    model.prefill(text[:, :20], torch.arange(20).unsqueeze(0))
    for p in range(20, 29):
        tokens = torch.stack((text[:, p], text[:, 0]), dim=1)
        logits = model.decode(tokens, torch.tensor([[p, -1]]))[:, 0]
    wanted = model(text, torch.arange(30).unsqueeze(0), prefill=True)[:, 28]
    assert error(logits, wanted) < TOLERANCE


def test_a_prompt_longer_than_the_ring_writes_no_slot_twice():
    """Which of two writes to one slot wins is up to the device."""
    positions = torch.tensor([[*range(11)], [*range(6), *[-1] * 5], [-1] * 11])
    assert ring_slot(positions, 8).tolist() == [
        [8, 8, 8, 3, 4, 5, 6, 7, 0, 1, 2],
        [0, 1, 2, 3, 4, 5, *[8] * 5],
        [8] * 11,
    ]


def test_caches_are_written_in_place(pair):
    _, model = pair
    model.allocate(3, 64)
    addresses = {name: cache.data_ptr() for name, cache in caches(model).items()}
    assert len(addresses) == 4 + 3 * 3 + 2 * 3  # windows; csa, hca, csa; two indexers
    generate(model, random_prompts(LENGTHS), 8)
    assert {name: cache.data_ptr() for name, cache in caches(model).items()} == addresses
    assert all(cache[:, :-1].any() for cache in caches(model).values())


def test_one_graph_each_and_no_recompilation(pair):
    from torch._dynamo.testing import CompileCounter

    _, model = pair
    torch._dynamo.reset()
    prompts = random_prompts(LENGTHS)
    model.allocate(len(prompts), 64)
    wanted = generate(model, prompts, 20)
    counters = CompileCounter(), CompileCounter()
    prefill = torch.compile(model.prefill, backend=counters[0], fullgraph=True)
    decode = torch.compile(model.decode, backend=counters[1], fullgraph=True)
    assert torch.equal(generate(model, prompts, 2, prefill, decode), wanted[:, :2])
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(generate(model, prompts, 20, prefill, decode), wanted)
    assert [counter.frame_count for counter in counters] == [1, 1]


def test_mtp_head_against_modules_of_transformers():
    """The head as DeepSeek composes it, out of a transformers layer with no cache."""
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    reference, _ = build(
        layer_types=["sliding_attention"], num_hidden_layers=1, mlp_layer_types=["moe"]
    )
    config = reference.config
    model = Transformer(dataclasses.replace(Config.from_transformers(config), n_mtp_layers=1))
    randomize(model)
    load_transformers(model, reference.state_dict())
    mtp = model.mtp
    mtp.layer.load_state_dict(model.layers[0].state_dict())
    head = modeling.DeepseekV4HyperHead(config)
    head.load_state_dict(mtp.hc_head.state_dict())

    tokens, positions = pad(random_prompts([31]), "cpu")
    model.allocate(1, 32)
    streams = model.streams(tokens[:, :-1], positions[:, :-1], True)
    got = model.mtp_logits(streams, tokens[:, 1:], positions[:, :-1], True)

    def norm(x, weight):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, config.rms_norm_eps)

    embedded = mtp.e_proj(norm(model.embed_tokens(tokens[:, 1:]), mtp.enorm.weight))
    x = embedded.unsqueeze(2) + mtp.h_proj(norm(streams, mtp.hnorm.weight))
    ropes = {"main": reference.model.rotary_emb(embedded, positions[:, :-1], "main")}
    near = torch.ones(30, 30).tril().triu(1 - config.sliding_window)
    x = reference.model.layers[0](
        x,
        position_embeddings=ropes,
        position_ids=positions[:, :-1],
        attention_mask=near.log()[None, None],
    )
    assert error(got, model.lm_head(norm(head(x), mtp.norm.weight))) < TOLERANCE

    model.allocate(1, 32)
    model.mtp_logits(streams[:, :20], tokens[:, 1:21], positions[:, :20], True)
    for p in range(20, 30):
        at = slice(p, p + 1)
        logits = model.mtp_logits(streams[:, at], tokens[:, p + 1 : p + 2], positions[:, at], False)
        assert error(logits, got[:, at]) < TOLERANCE


def test_presets():
    """Flash has the sizes transformers defaults to; parameter counts are the published ones."""
    hf = pytest.importorskip("transformers.models.deepseek_v4")
    ratios = [0, 0] + [4, 128] * 20 + [4]
    rope = dict(YARN, factor=16.0, original_max_position_embeddings=65536)
    config = hf.DeepseekV4Config(compress_ratios=ratios, rope_parameters=rope)
    flash = dataclasses.replace(Config.from_transformers(config), n_mtp_layers=1)
    assert flash == PRESETS["flash"]
    for name, billions in (("flash", 284), ("pro", 1600)):
        with torch.device("meta"):
            model = Transformer(dataclasses.replace(PRESETS[name], n_mtp_layers=0))
        count = sum(weight.numel() for weight in model.parameters())
        assert count == pytest.approx(billions * 1e9, rel=0.02)


def test_rows_without_a_grouped_product_come_in_parts(monkeypatch):
    """Where each row copies its expert's matrix, many rows would be many copies at a time."""
    rows, weights = torch.randn(11, 8), torch.randn(3, 4, 8)
    experts = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3])  # one that is elsewhere, at the end
    whole = moe.grouped_mm(rows, weights, experts)
    monkeypatch.setattr(moe, "COPIES", 4)
    parts = moe.grouped_mm(rows, weights, experts)
    torch.testing.assert_close(parts[:-1], whole[:-1], rtol=0, atol=1e-6)
    torch.testing.assert_close(whole[4], weights[1] @ rows[4])
