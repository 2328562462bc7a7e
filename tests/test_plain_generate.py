"""Prefill in chunks and self-speculation of the plain model of examples/deepseek_v4: the numbers
of one prefill, and the tokens of plain greedy decoding."""

import dataclasses

import pytest
import torch

from examples.deepseek_v4 import PRESETS, Transformer, randomize
from examples.deepseek_v4.generate import generate, pad, read
from examples.deepseek_v4.speculate import advance, generate_with_drafts

from .test_plain_model import TOLERANCE, caches, error, random_prompts

LENGTHS = (3, 13, 37)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def build(vocab_size=97, **changes):
    model = Transformer(dataclasses.replace(PRESETS["tiny"], vocab_size=vocab_size, **changes))
    randomize(model)
    return model


@pytest.fixture(scope="module")
def model():
    return build()


def kept(model):
    """What the caches hold, without the spare rows."""
    return {name: cache[:, :-1].clone() for name, cache in caches(model).items()}


@pytest.mark.parametrize("chunk", [3, 4, 7, 16, 64])
def test_chunks_equal_one_prefill(model, chunk):
    prompts = random_prompts((*LENGTHS, 70))
    model.allocate(4, 128)
    wanted = model.prefill(*pad(prompts, "cpu"))
    before = kept(model)
    tokens = generate(model, prompts, 8)

    model.allocate(4, 128)
    columns = pad(prompts, "cpu", chunk)
    assert error(read(*columns, chunk, model.prefill), wanted) < TOLERANCE
    for name, cache in kept(model).items():
        assert (cache - before[name]).abs().max() <= TOLERANCE * before[name].abs().max(), name
    assert torch.equal(generate(model, prompts, 8, chunk=chunk), tokens)


def test_all_logits_of_a_chunk_and_rows_that_start_apart(model):
    """Each row goes on from where it is, at whatever place in its windows."""
    (text,) = random_prompts([90])
    text = torch.tensor(text)
    model.allocate(1, 96)
    wanted = model(text[None], torch.arange(90)[None], prefill=True)[0]
    starts = (5, 16, 33, 2)
    model.allocate(4, 96, next_n=3)
    model.prefill(*pad([text[:start].tolist() for start in starts], "cpu"))
    # A rejected draft lies in the rings behind each start.
    drafts = torch.tensor(starts)[:, None] + torch.arange(2)
    model.decode((text[drafts] + 1) % 97, drafts)
    lengths = (57, 41, 20, 0)
    positions = torch.full((4, 57), -1)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        positions[row, :length] = torch.arange(start, start + length)
    logits = model(text[positions.clamp(min=0)], positions, prefill=True, past=True)
    real = positions >= 0
    assert error(logits[real], wanted[positions[real]]) < TOLERANCE


def test_a_chunk_leaves_rows_of_padding_alone(model):
    model.allocate(2, 64)
    model.prefill(*pad(random_prompts([40, 30]), "cpu"))
    before = kept(model)
    positions = torch.stack((torch.full((20,), -1), torch.arange(30, 50)))
    model.prefill(torch.tensor(random_prompts([20, 20], seed=2)), positions, past=True)
    after = kept(model)
    names = [name for name in before if "mtp" not in name]
    assert all(torch.equal(before[name][0], after[name][0]) for name in names)
    assert all(not torch.equal(before[name][1], after[name][1]) for name in names)


@pytest.mark.parametrize(("next_n", "chunk"), [(2, None), (3, 8), (4, None)])
def test_drafts_do_not_change_the_tokens(next_n, chunk):
    """Three tokens in the vocabulary, so that chance makes one draft in three right."""
    model = build(vocab_size=3)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, (n,), generator=generator).tolist() for n in LENGTHS]
    model.allocate(3, 37 + 50)
    wanted = generate(model, prompts, 50)
    assert len(wanted.unique()) > 1
    model.allocate(3, 37 + 50 + next_n, next_n)
    found, gains = generate_with_drafts(model, prompts, 50, chunk)
    assert torch.equal(found, wanted)
    assert len(gains) < 49  # some drafts were right
    assert sum(gains) >= 3 * 49


def test_all_drafts_right_and_all_wrong(monkeypatch):
    """With drafts from outside: next_n tokens a step, or one."""
    from examples.deepseek_v4 import speculate

    model, n = build(), 41
    (prompt,) = random_prompts([13])
    model.allocate(1, 13 + n + 4, 4)
    wanted = generate(model, [prompt], n + 4)
    for off, steps in ((0, 10), (1, 40)):

        def known(model, streams, position, off=off):
            at = (position - 13 + torch.arange(1, 4)).clamp(0, n + 3)
            return (wanted[0, at] + off) % 97

        monkeypatch.setattr(speculate, "draft", known)
        found, gains = generate_with_drafts(model, [prompt], n)
        assert torch.equal(found, wanted[:, :n]) and len(gains) == steps


def test_the_mtp_layer_forgets_wrong_drafts():
    """Its cache after a generation is that of a prefill of the same tokens."""
    model, n = build(vocab_size=3), 30
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, (9,), generator=generator).tolist()
    model.allocate(1, 64, 3)
    found, _ = generate_with_drafts(model, [prompt], n)
    text = torch.tensor([*prompt, *found[0].tolist()])[None]
    length = 9 + n - 3  # all steps have seen these, the last one perhaps more
    ring = model.mtp.layer.self_attn.window[0, :-1].clone()
    model.allocate(1, 64, 3)
    positions = torch.arange(length)[None]
    streams = model.streams(text[:, :length], positions, True)
    model.mtp_streams(streams, text[:, 1 : length + 1], positions, True)
    wanted = model.mtp.layer.self_attn.window[0, :-1]
    window = model.config.window
    rows = torch.arange(length - window + 3, length) % (window + 2)
    assert error(ring[rows], wanted[rows]) < TOLERANCE


def test_a_step_is_one_graph():
    from torch._dynamo.testing import CompileCounter

    model, counter = build(vocab_size=3, layers=("csa",)), CompileCounter()
    prompts = [[0, 1, 2, 1], [2, 2]]
    model.allocate(2, 40, 3)
    wanted, gains = generate_with_drafts(model, prompts, 20)
    compiled = torch.compile(advance, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found, again = generate_with_drafts(
            model, prompts, 20, step=lambda tokens, position: compiled(model, tokens, position)
        )
    assert torch.equal(found, wanted) and gains == again and counter.frame_count == 1


def test_chunks_are_two_graphs():
    """The first one and all others."""
    from torch._dynamo.testing import CompileCounter

    model, counter = build(layers=("csa",)), CompileCounter()
    prompts = random_prompts((11, 30))
    model.allocate(2, 40)
    wanted = generate(model, prompts, 3)
    prefill = torch.compile(model.prefill, backend=counter, fullgraph=True)
    for _ in range(2):
        assert torch.equal(generate(model, prompts, 3, prefill, chunk=8), wanted)
        assert counter.frame_count == 2


def test_what_is_missing_for_drafts_is_named(model):
    model.allocate(1, 20)
    with pytest.raises(ValueError, match=r"allocate\(\.\.\., next_n=2\)"):
        generate_with_drafts(model, [[1]], 3)
