# SPDX-License-Identifier: MIT-0
"""Tests of everything: pytest -q test_modvideo.py. Docstrings name the bugs they catch."""
import ast
import copy
import csv
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import types
import typing
from collections import Counter
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import modvideo as mv
import train_tiny
from data import clips, donkeycar, shapes
from train_tiny import Plan

torch.set_num_threads(1)          # more threads only wait for each other at these sizes
ROOT = Path(__file__).parent
SOURCE, README = ((ROOT / name).read_text() for name in ('modvideo.py', 'README.md'))
BLOCKS = re.findall(r'```python\n(.*?)```', README, re.S)
VOCAB = ['<pad>', '<eos>', *'abcdefgh']
SMALL = dict(vocab=VOCAB, frames=4, frame_size=16, patch_size=4, encoder_layers=2, encoder_dim=32,
             encoder_heads=2, n_layer=4, dim=32, n_head=2)                     # P = 16
FIELDS = {field.name for field in dataclasses.fields(mv.ModVideoConfig)}


@pytest.fixture(autouse=True)
def seeded(monkeypatch, tmp_path):
    """A test draws the same numbers, whichever ran before it, and works in a folder of its own."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.chdir(tmp_path)


def make(placement='all', seed=0, v=vars(mv), **changes):
    """A small model; what is no field of the configuration is an option of its parts. v: a file's names."""
    torch.manual_seed(seed)
    options = {name: changes.pop(name) for name in [*changes] if name not in FIELDS}
    config = v['ModVideoConfig'](**{**SMALL, 'placement': placement, 'options': options, **changes})
    return config.build('model', config)


def sample(B=2, T=4, Q=2, L=5, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(B, T, 3, 16, 16, generator=g), torch.randint(2, 10, (B, Q, L), generator=g)


def close(a, b, tol=1e-5):
    assert a.shape == b.shape, f'{tuple(a.shape)} against {tuple(b.shape)}'
    assert not a.numel() or (a - b).abs().max() <= tol, f'differ by {(a - b).abs().max():.2e}'


def other_words(text, begin=3, end=None):
    """The same text with another word at every place from `begin` on."""
    words = text.clone()
    words[..., begin:end] = 2 + (words[..., begin:end] - 1) % 8
    return words


def heed_every_key(model, factor):
    """Larger weights, so that what the decoder says depends on every key."""
    for p in model.blocks.parameters():
        p.data *= factor if p.dim() == 2 else 1


@functools.cache
def golden(name, prefix=''):
    """name.npz of data/golden by case: {'dp/1': {'sim': tensor, ...}, ...}; 'meta' is parsed JSON."""
    cases = {}
    for key, value in np.load(ROOT / f'data/golden/{name}.npz').items():
        case, _, field = key.rpartition('/')
        cases.setdefault(case, {})[field] = (
            json.loads(str(value)) if value.dtype.kind == 'U' else torch.from_numpy(value))
    return {case: g for case, g in cases.items() if case.startswith(prefix)}


@contextmanager
def at_most(kind, limit):
    """A limit of the operating system on what this process takes."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


# ---- bricks and the model ------------------------------------------------------------------------

def test_attention_equals_torchs_own_layer_whatever_the_mask():
    """Catches a wrong split of qkv into heads, a wrong scale, a missing causal mask; float and bool masks
    that differ, rows above a mask that see ahead, NaN in an empty row, weights without positions; positions
    that blur after hours of a stream."""
    theirs, x = nn.MultiheadAttention(32, 4, bias=False, batch_first=True), torch.randn(2, 9, 32)
    every, past = torch.ones(9, 9, dtype=torch.bool), torch.ones(9, 9, dtype=torch.bool).tril()
    mask, place = past & (torch.arange(9) != 3), 3 * torch.arange(9)
    mask[6:] &= torch.rand(3, 9) < 0.5
    mask[7] = False                                                            # a row that sees none
    for causal, part, seen in (
            (False, None, every), (True, None, past), (True, mask, mask), (True, mv.additive(mask, x), mask),
            (True, mask.expand(2, 1, 9, 9), mask), (True, mask[6:], torch.cat([past[:6], mask[6:]]))):
        mine = mv.Attention(32, 4, causal)
        theirs.in_proj_weight.data, theirs.out_proj.weight.data = mine.qkv.weight.data, mine.out.weight.data
        wanted, looks = theirs(x, x, x, attn_mask=~seen, average_attn_weights=False)
        close(mine(x, None, part), wanted.nan_to_num())                        # theirs is NaN in an empty row
        weights, turned, v = mine.weights(x, None, part), mine.weights(x, place, part), mine.project(x)[2]
        close(weights, looks.nan_to_num(), 1e-6)
        assert not weights.masked_select(~seen).any()
        close(mine(x, place, part), mine.out((turned @ v).transpose(1, 2).flatten(2)))
    a, b = torch.randn(2, 1, 1, 4, 32)
    turned = lambda a, place: mv.rotary(a, torch.tensor([place]))
    dot = lambda begin: (turned(a, begin) * turned(b, begin + 3)).sum(-1)
    close(dot(0), dot(2 ** 30), 1e-4)


@pytest.mark.parametrize('placement', ['none', 'interleaved', 'all', 'all-deep'])
@pytest.mark.parametrize('training', [True, False])
def test_later_frames_and_words_never_change_the_past(placement, training):
    """Catches top-k over the whole sequence, a mask that leaks, a normalization over time."""
    model, (video, text) = make(placement).train(training), sample()
    changed = torch.cat([video[:, :2], 1 - video[:, 2:]], 1)
    seen = [model.encode_video(v) for v in (video, changed)]
    before, after = (model.decode(s.tokens, s.position, 64)[0] for s in seen)
    close(before[:, :32], after[:, :32], 0)
    assert (before[:, 32:] - after[:, 32:]).abs().max() > 1e-3                # it does reach its own frames
    a, b = model(video, text)[0], model(video, other_words(text))[0]
    close(a[:, :, :3], b[:, :, :3], 1e-6)
    assert (a[:, :, 3:] - b[:, :, 3:]).abs().max() > 1e-3


STILL = dict(retain_ratio=0.4, tau=0.9)
OPTIONS = {**{name: dict(budget=20) for name, cls in mv.REDUCERS.items() if issubclass(cls, mv.Budgeted)},
           'holitom': STILL, 'bvllm': dict(budget=20, select_frames=4), 'vq': dict(codes=16),
           'vqtoken': dict(codes=5)}
NEEDED = dict(reducer=OPTIONS, stage=dict.fromkeys(('holitom', 'drop'), dict(stage_layer=1)))
DENSE = {name: dict(reducer=name, placement='none', **OPTIONS.get(name, {})) for name in mv.REDUCERS}
ROUTED = {f'{name} and mod': dict(changes, placement='all') for name, changes in DENSE.items()}
WAYS = {**DENSE, **ROUTED, 'early exit': dict(placement='all-deep', routing='skip'),
        'gamma': dict(placement='0,2', routing='gamma', keep_ratio=0.4),
        'random': dict(routing='random'), 'evenly': dict(routing='uniform'),
        'tempme': dict(placement='none', encoder='tempme'), 'tempme and mod': dict(encoder='tempme'),
        'tempme inside': dict(placement='none', encoder='tempme', stage='holitom', stage_layer=2),
        'holitom inside': dict(placement='1', reducer='holitom', **STILL, stage='holitom', stage_layer=2),
        'drop inside': dict(stage='drop', stage_layer=2, stage_ratio=0.4),
        'drop after holitom': dict(reducer='holitom', **STILL, stage='drop', stage_layer=2),
        'holitom twice': dict(reducer='holitom', **STILL, stage='holitom', stage_layer=2, stage_ratio=0.4),
        'adaptive and mod': dict(reducer='vqtoken', codes=0),
        'more frames than tokens': dict(reducer='bvllm', budget=8, frames=8),
        'a frame of many': dict(reducer='uniform', budget=16, frames=8),
        'few in the end': dict(reducer='holitom', frames=8, stage='holitom', stage_layer=2, stage_ratio=0.9)}


def of_every_kind(changes):
    """A model, two clips of which the first stands still, questions of different lengths."""
    T = 24 if 'frames' in changes else 4                       # more than the model was configured for
    model, (video, text) = make(**changes).eval(), sample(T=T)
    if 'retain_ratio' in changes:                              # then clips keep unequal numbers of tokens
        video[0, 1:] = video[0, :1]
    text[0, 1, 4:], text[1, 0, 3:] = 0, 0
    return model, video, text


@pytest.mark.parametrize('way', WAYS)
def test_an_answer_depends_on_its_clip_and_its_question_alone(way):
    """Catches samples or questions that mix, padding that is seen, a word that changes the past; a stage that
    no word decides."""
    model, video, text = of_every_kind(WAYS[way])
    together = model(video, text)[0]
    close(together.flip(1), model(video, text.flip(1))[0])
    close(together, model(video, F.pad(text, (0, 3)))[0][:, :, :5])
    for b, q in itertools.product(range(2), range(2)):
        n = int((text[b, q] > 0).sum())
        close(together[b:b + 1, q:q + 1, :n], model(video[b:b + 1], text[b:b + 1, q:q + 1, :n])[0])
    asked = torch.full((2, 2), 3)                              # the answer begins after three words
    before, after = (model(video, t, asked=asked)[0] for t in (text, other_words(text)))
    close(before[:, :, :3], after[:, :, :3], 1e-6)
    assert (before[:, :, 3:] - after[:, :, 3:]).abs().max() > 1e-3
    early = (before - together)[:, :, :3].abs().max()
    assert early > 1e-4 or model.stage is None, 'the last word decides'


@pytest.mark.parametrize('way', WAYS)
def test_generate_equals_greedy_decoding_without_a_cache(way):
    """Catches wrong positions of new words, padding of questions, rows that mix, words after '<eos>', more
    frames than tokens left, mixtures at equal positions, layers that skip all."""
    model, video, text = of_every_kind(WAYS[way])
    heed_every_key(model, 4)
    model.embed.weight.data *= 2
    model.head.weight.data[mv.PAD] = 0                         # they seldom end without an end mark
    made = model.generate(video, text, max_new_tokens=4)
    for b, q in itertools.product(range(2), range(2)):
        ids = torch.cat([text[b, q][text[b, q] > 0], made[b, q]])[None, None]
        n = ids.size(2) - 4                                    # words of the question
        best = model(video[b:b + 1], ids, asked=torch.tensor([[n]]))[0][0, 0, n - 1:-1].argmax(-1)
        ended = (best <= mv.EOS).cumsum(0) > (best <= mv.EOS).long()           # after the first end mark
        assert torch.equal(made[b, q], best.masked_fill(ended, 0))
    assert len(made.unique()) >= 3 and not model.generate(video, 0 * text, 2).any()
    word = int(made[0, 0, 0])                                  # where it is the end mark, nothing follows it
    model.head.weight.data[[mv.EOS, word]] = model.head.weight.data[[word, mv.EOS]]
    assert model.generate(video, text, 4)[0, 0].tolist() == [mv.EOS, 0, 0, 0]


@pytest.mark.parametrize('way', WAYS)
def test_the_contract_of_every_way(way):
    """Catches positions out of order, padding, too many tokens, clips that keep equal numbers, lost
    gradients, NaN, options, costs, tokens that a stage owes; a part that hands on bfloat16, so that answers
    are made in another precision."""
    (model, video, text), dtypes = of_every_kind(WAYS[way]), set()
    (logits, _, aux), N = model(video, text), 16 * video.size(1)
    reduced, rows = aux['reduced'], 4 if model.by_question else 2
    (many, M, C), place = reduced.tokens.shape, reduced.position.expand(len(reduced.tokens), -1)
    assert (many, C) == (rows, 32) and place.shape == (rows, M) and M <= WAYS[way].get('budget', N)
    assert (place.diff(dim=1) >= 0).all() and (place[:, 0] >= 0).all()
    assert ((place < N) | (place == mv.NEVER)).all() and (reduced.tokens[place == mv.NEVER] == 0).all()
    left = (place < mv.NEVER).sum(1)
    assert 'retain_ratio' not in WAYS[way] or left.unique().numel() > 1 and left.max() < N
    if reduced.reduction is not None:                        # where every patch went, and padding is the same
        kept = reduced.reduction.mask                          # a stage repeats the tokens for each question
        assert reduced.reduction.assign.shape == (len(kept), N)
        assert torch.equal(kept.repeat_interleave(rows // len(kept), 0), place < mv.NEVER)
    assert not model.encoder.merges or M == math.prod(model.encoder.counts(4)[-1][::2])
    words = 5 if model.by_question else 10
    assert all(n < M + words or M <= 4 if i in model.mod_layers else n == M + words
               for i, n in enumerate(aux['tokens'][:2]))
    if model.stage is not None:
        made, due = aux['stage'], (left.double() * (1 - model.stage.ratio)).round()
        assert torch.equal((made.position < mv.NEVER).sum(1), due.long())
        assert made.reduction.assign.shape == (rows, M) and aux['tokens'][2] < aux['tokens'][0]
    mv.save_checkpoint('m.pt', model)
    again = mv.load_checkpoint('m.pt')[0].eval()
    assert torch.equal(again(video, text)[0], logits) and again.config == model.config
    assert all(isinstance(value, torch.Tensor) for value in model.state_dict().values())
    for layer in model.blocks:
        layer.register_forward_hook(lambda _, args, out: dtypes.update([args[0].dtype, out.dtype]))
    with torch.autocast('cpu', torch.bfloat16):
        assert model(video, text)[0].dtype == torch.float32
        model.generate(video, text, 2)
    assert dtypes == {torch.float32}, 'the residual stream'
    picture, facts = model.reducer.picture(reduced), model.reducer.facts(reduced.info)
    assert picture is None or mv.draw_tokens(video[0], picture, grid=(4, 4))
    assert all(math.isfinite(number) for number in facts.values())
    with pytest.raises(ValueError, match='not finite'):
        model(video * float('nan'), text)
    assert model(video, text, torch.full_like(text, -1))[1].isfinite()
    logits, loss, aux = model.train()(video, text, text)
    wanted = F.cross_entropy(logits.flatten(0, 2), text.flatten())
    close(loss, wanted + aux['reduced'].loss + aux['routing_loss'])
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for part in (model.encoder, model.projector, model.reducer):
        assert all(p.grad.any() for p in part.parameters())


def test_some_patches_of_each_frame_are_routed_frame_by_frame():
    """Catches positions that are alike in all clips taken for whole frames, so that frames compete; padding
    that is counted; how many are chosen remembered for another number of tokens, or another ratio."""
    kept = torch.cat([torch.arange(16 * t + t % 2, 16 * t + 16 - 6 * (t == 3), 2) for t in range(4)])
    model, (video, text) = make(), sample()
    model.reducer.forward = lambda x, _: mv.Reduced(x.flatten(1, 2)[:, kept], kept)        # a chequered one
    for one, *inputs in ((model, video, text), of_every_kind(WAYS['holitom and mod'])):
        aux = one(*inputs)[2]
        place = aux['reduced'].position.expand(2, -1)
        for route, b in itertools.product(aux['routes'].values(), range(2)):
            index = route.index[b][route.mask[b]]              # of each frame, as many as are due; all words
            left, taken = ((row[row < mv.NEVER] // 16).bincount(minlength=4).tolist()
                           for row in (place[b], place[b, index[:-10]]))
            assert taken == [math.ceil(0.2 * n) for n in left] and len(index) == sum(taken) + 10
            assert torch.equal(index[-10:], place.size(1) + torch.arange(10))
    assert torch.equal(model.generate(video, text, 1)[..., 0], model(video, text)[0][:, :, -1].argmax(-1))
    place, x, routing = kept.expand(2, -1), torch.randn(2, len(kept), 32), model.routing
    for N, routing.keep_ratio in ((9, 0.2), (len(kept), 0.2), (len(kept), 0.7)):       # K is counted anew
        counts = (kept[:N] // 16).bincount().tolist()
        assert routing(0, None, x[:, :N], place, N).index.size(1) == sum(
            mv.capacity(routing.keep_ratio, n) for n in counts)


@pytest.mark.parametrize('way', [
    dict(), dict(streaming=True), dict(WAYS['gamma'], placement='0,1'),
    dict(encoder='tempme', placement='none'),
    dict(reducer='vqtoken', codes=5, placement='none', stage='drop', stage_layer=2)], ids=str)
def test_a_training_step_is_one_graph(way):
    """Catches what splits a compiled model: a number that is data, an object it cannot trace; recompiling."""
    torch.compiler.reset()
    model, graphs = make(**dict(n_layer=3, encoder_layers=1 + ('encoder' in way)) | way).train(), []
    fast = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for seed in range(2):
        video, text = sample(Q=1, seed=seed)
        answer = fast(video, text, text, decisions=text[:, 0, :4])
        close(answer[1], model(video, text, text, decisions=text[:, 0, :4])[1])
    assert len(graphs) == 1


def test_inference_compiles_and_exports():
    """Catches a check or a length that breaks the graph, a batch size that is frozen in it."""
    model, (video, text), B = make('all').eval(), sample(), torch.export.Dim('B', min=2, max=64)
    fast = torch.compile(model, backend='eager', fullgraph=True)
    for n in (5, 4):                                           # the second length becomes a symbol
        close(fast(video, text[:, :1, :n])[0], model(video, text[:, :1, :n])[0])
    program = torch.export.export(model, sample(), dynamic_shapes=[{0: B}, {0: B}])
    close(program.module()(*sample(B=5))[0], model(*sample(B=5))[0])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize('way', WAYS)
def test_every_way_runs_in_another_precision(way, dtype):
    """Catches float32 that is mixed with the model's own dtype, or a selection that is not finite in it."""
    model, video, text = of_every_kind(WAYS[way])
    logits, loss, _ = model.to(dtype).train()(video.to(dtype), text, text)
    loss.backward()
    assert logits.isfinite().all() and loss.isfinite() and model.embed.weight.grad.dtype == dtype
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.eval().generate(video.to(dtype), text, 2).shape == (2, 2, 2)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_another_default_dtype_changes_nothing(dtype):
    """Catches angles, noise and codes in what a program has set as torch's default."""
    def taken():
        gaps = mv.Gaps(8, gaps=1.0).train()
        return [gaps(torch.zeros(1, 6, 16, 8, dtype=torch.float)).position.tolist() for _ in range(20)]
    before = taken()
    torch.set_default_dtype(dtype)
    try:
        assert taken() == before
        for reducer in ('gaps', 'vq', 'bvllm'):
            model, (video, text) = make(reducer=reducer).train(), sample()
            assert model(video.to(dtype), text, text)[1].isfinite()
        assert mv.chances(torch.arange(999)).dtype == torch.float and mv.chances(torch.arange(999)).max() < 1
    finally:
        torch.set_default_dtype(torch.float)


# ---- Mixture-of-Depths ---------------------------------------------------------------------------

def test_exactly_k_tokens_a_frame_even_with_ties():
    """Catches k - 1 tokens, more with ties, those of the first frame, a decision that is skipped or extra;
    ways without a router whose frames get uneven numbers, or places that repeat."""
    def fixed(kind, ratio=0.3, n=10, T=4, i=0):
        frames = torch.zeros(3, T * n, 8), torch.arange(T * n), T * n
        return mv.ROUTINGS[kind](8, [i], ratio, n)(i, None, *frames)
    for ratio, n, k in (
            (0.2, 10, 2), (0.3, 10, 3), (0.07, 100, 7), (0.2, 16, 4), (0.01, 16, 1), (1.0, 16, 16)):
        assert mv.capacity(ratio, n) == k
        router, frame, routes = mv.RaggedRouter(8), torch.arange(4 * n) // n, []
        for x in (torch.randn(3, 4 * n, 8), torch.zeros(3, 4 * n, 8)):
            routes += [router(x, 4, ratio), router(x, frame, ratio)]           # frames by number, by token
            assert torch.equal(routes[-2].index, routes[-1].index)
        routes += [fixed('uniform', ratio, n), fixed('random', ratio, n)]
        assert all((route.gate == 1).all() for route in routes[-2:])
        for index in [route.index for route in routes]:
            assert torch.equal(index // n, torch.arange(4).repeat_interleave(k).expand(3, -1))
            assert (index.diff(dim=1) > 0).all()
    index = fixed('random').index
    assert len((index[0] % 10).view(4, 3).unique(dim=0)) > 1               # other places in other frames
    assert not torch.equal(index, fixed('random', i=1).index)
    assert fixed('uniform').index[0, :3].tolist() == [3, 6, 9]
    many = fixed('random', 0.2, 64, 500).index[0] % 64
    assert many.bincount(minlength=64).float().div(500 * 13 / 64).sub(1).abs().max() < 0.4
    # Of equal scores the earlier token wins. A forced one takes part of its frame's k.
    assert mv.Router(8)(torch.zeros(1, 8, 8), 2, 0.5).index.tolist() == [[0, 1, 4, 5]]
    x, last = torch.randn(2, 24, 8), torch.tensor([[7, 15, 23]] * 2)
    route = mv.Router(8)(x, 3, 0.25, forced=torch.arange(24) % 8 == 7)
    best = route.logits.view(2, 3, 8)[..., :7].argmax(-1) + torch.tensor([0, 8, 16])
    assert torch.equal(route.index.view(2, 3, 2), torch.stack([best, last], -1))
    router = mv.RaggedRouter(8)
    for forced in (None, torch.arange(24) % 8 == 7, torch.arange(24) < 2):     # frames by number, by token
        two = [router(x, group, 0.25, forced=forced) for group in (3, torch.arange(24) // 8)]
        assert torch.equal(two[0].index, two[1].index)
    with pytest.raises(ValueError, match='a mask of all 6 rows, got 1'):       # it would serve every row
        mv.RaggedBlock(mv.Block(8, 2))(x, two[1], torch.arange(24), torch.ones(1, 24, dtype=torch.bool))


FRAMES = torch.tensor([[-2, -2, -1, 0, 0, 0, -1, 1, 1, 1, 1, -1, -1],
                       [-2, -1, 0, 0, 0, 0, 0, -1, 2, 2, -1, -1, -1],
                       [-1, 0, 0, 1, 1, 1, 1, 1, -1, 3, -1, -1, -1]])       # two, one and no padding in front
EVEN = torch.tensor([[0] * 4 + [1] * 4 + [2] * 4 + [-1]] * 3)                    # whole frames and a word


@pytest.mark.parametrize('frame', [EVEN, FRAMES], ids=['whole frames', 'ragged'])
@pytest.mark.parametrize('ratio', [0.5, 1.0])
def test_a_routed_block_is_raposos_equation(frame, ratio):
    """Catches k - 1 tokens, a gated residual, new positions, a skipped token that is seen or changed; words
    that skip or are gated, padding chosen, seen, changed or learned from, a ragged k."""
    x, real, even = torch.randn(3, 13, 32), frame > -2, frame is EVEN
    router, block, losses = mv.RaggedRouter(32), mv.RaggedBlock(mv.Block(32, 2)), []
    position = 3 * (real.cumsum(1) - 1).clamp(min=0)                   # text generators count real tokens
    mask = torch.ones(13, 13, dtype=torch.bool).tril() & real[:, None]
    mask = None if even else mask[:, None] | torch.eye(13, dtype=torch.bool)
    route = router(x, 3, ratio, 1) if even else router(x, frame, ratio)
    taken = torch.ones_like(route.index, dtype=torch.bool) if even else route.mask
    y, one = (block(x, r, position, mask) for r in (route, route._replace(gate=taken.float())))
    assert y.isfinite().all() and (route.logits[~real] == -math.inf).all()
    score, same = x @ router.weight.detach(), frame[:, None] == frame[..., None]       # (3, 13), (3, 13, 13)
    better = (same & (score[:, None] > score[..., None])).sum(-1)       # how many of its frame are better
    due = (frame == -1) | real & (better < (ratio * same.sum(-1)).ceil())      # words, the best of a frame
    assert torch.equal(y[~due], x[~due])                                # padding and skipped ones, to the bit
    for b in range(3):
        chosen, alone = due[b].nonzero()[:, 0], real[b].nonzero()[:, 0]
        assert torch.equal(route.index[b][taken[b]], chosen)
        gate, wanted = torch.where(frame[b, chosen] == -1, 1.0, score[b, chosen]), x[b].clone()
        wanted[chosen] += gate[:, None] * block.block(x[b:b + 1, chosen], position[b:b + 1, chosen])[0]
        close(y[b], wanted)
        if ratio == 1:                                                  # with gates of one the dense block
            close(one[b, alone], block(x[b:b + 1, alone], None, position[b:b + 1, alone])[0])
        single = router(x[b:b + 1, alone], frame[b:b + 1, alone], ratio)
        assert torch.equal(alone[single.index[0]], chosen)
        target = torch.zeros(len(alone)).index_fill(0, single.index[0], 1)
        losses.append(F.binary_cross_entropy_with_logits(single.logits[0], target, reduction='none'))
        close(mv.routing_loss(single), losses[-1].mean(), 1e-6)
    close(mv.routing_loss(route), torch.cat(losses).mean(), 1e-6)
    if even:                                                   # positions are for rotary alone
        plain = mv.MoDBlock(block.block)
        close(plain(x, route, None), plain(x, route, torch.zeros(13).long()))
    wide = route._replace(gate=route.gate.double(), logits=route.logits.double())
    close(mv.routing_loss(wide).float(), mv.routing_loss(route), 1e-6)


class LibraryLayer(mv.Block):
    """A decoder layer as common libraries call it. Its rotary tables are the positions themselves."""

    def forward(self, x, attention_mask, position_ids, past_key_values, position_embeddings):
        q, k, v = self.attention.project(self.norm1(x), position_embeddings[0][..., 0])
        if past_key_values is not None:
            held = past_key_values.get(self, (k[:, :, :0], v[:, :, :0]))
            k, v = past_key_values[self] = [torch.cat(pair, 2) for pair in zip(held, (k, v))]
        x = x + self.attention.mix(q, k, v, attention_mask)
        return (x + self.mlp(self.norm2(x)),)


def test_the_readmes_layer_of_a_library():
    """Catches an adapter that is not dense at capacity 1, or whose cache or batch changes what comes out."""
    space, frame = {}, F.pad(FRAMES, (0, 3), value=-1)
    exec(next(block for block in BLOCKS if 'Routed' in block), space)
    dense = [LibraryLayer(32, 2) for _ in range(4)]
    wrapped = [space['Routed'](layer, 32, 0.5) for layer in dense[1:3]]
    layers = [dense[0], *wrapped, dense[3]]
    for layer in wrapped:
        nn.init.normal_(layer.router.weight)

    def run(x, frame, layers, cache=None):                      # x: the last of the tokens that frame names
        new, S, real = x.size(1), frame.size(1), frame > -2
        position = (real.cumsum(1) - 1).clamp(min=0)[:, -new:]
        past = torch.ones(S, S, dtype=torch.bool).tril()[-new:]
        mask = torch.where(past & real[:, None, None], 0.0, torch.finfo(torch.float32).min)
        for layer in layers:
            layer.frame = frame
            made = layer(x, mask, position, past_key_values=cache, position_embeddings=[position[..., None]])
            x = made[0] if isinstance(made, tuple) else made
        return x

    x, real, cache = torch.randn(3, 16, 32), frame > -2, {}
    whole = run(x, frame, layers)
    steps = [run(x[:, begin:end], frame[:, :end], layers, cache)
             for begin, end in ((0, 13), (13, 14), (14, 15), (15, 16))]
    close(torch.cat(steps, 1)[real], whole[real])
    for b in range(3):
        close(run(x[b:b + 1, real[b]], frame[b:b + 1, real[b]], layers)[0], whole[b, real[b]])
    for layer in wrapped:
        layer.ratio, layer.router.weight.data[:] = 1.0, 0
    close(run(x, frame, layers)[real], run(x, frame, dense)[real])


def test_gradient_reaches_every_router_and_is_right():
    """Catches a router that only selects (gradient None), one after the last layer (near zero)."""
    model, (video, text) = make('all').double(), sample()
    assert model.mod_layers == [0, 1, 2] == [int(i) for i in model.routing.routers]        # not the last
    loss = lambda: model(video.double(), text, text.roll(-1, -1))[1]
    loss().backward()
    assert all(router.weight.grad.norm() > 1e-4 for router in model.routing.routers.values())
    weight, values = model.routing.routers['1'].weight, []
    step = 2e-3 * F.normalize(weight.grad, dim=0)       # the loss itself is float32; no choice changes yet
    for factor in (1, -2):
        weight.data += factor * step
        values.append(loss().detach())
    numeric = values[0] - values[1]
    assert abs(numeric - 2 * weight.grad @ step) < 0.03 * abs(numeric)


def llama(w, prefix=''):
    """The authors' block: a Block with SwiGLU."""
    block, of = mv.Block(16, 2), lambda name: w[f'{prefix}{name}.weight']
    block.norm1, block.norm2 = nn.RMSNorm(16, 1e-6), nn.RMSNorm(16, 1e-6)
    block.norm1.weight.data, block.norm2.weight.data = of('input_layernorm'), of('post_attention_layernorm')
    q, k, v = (of(f'self_attn.{name}_proj') for name in 'qkv')
    q, k = (a.view(2, 2, 4, 16).transpose(1, 2).flatten(0, 2) for a in (q, k))     # pairs are i, i + D/2
    block.attention.qkv.weight.data = torch.cat([q, k, v])
    block.attention.out.weight.data = of('self_attn.o_proj')
    gate, up, down = (of(f'mlp.{name}_proj') for name in ('gate', 'up', 'down'))
    del block.mlp
    block.mlp = lambda h: F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)
    return block


def test_attention_rank_equals_gamma_mods_code():
    """Catches a diagonal that counts, another tolerance, heads averaged before their ranks; ranks of maps
    without positions, of other layers, the maximum of the heads, hooks that stay."""
    for name, g in golden('mod', 'arank/').items():
        rank, effective = mv.attention_rank(g['attn'][None])
        assert torch.equal(rank, g['head_ranks'].float()), name
        assert abs(rank.mean() - g['avg']) < 1e-6 and effective.shape == rank.shape
    both = torch.stack([torch.zeros(2, 8, 8), torch.ones(2, 8, 8)])
    assert mv.attention_rank(both)[0].tolist() == [3.5, 3.5]                   # mean of 0 and S - 1
    orthogonal = torch.eye(9)[None, None].roll(-1, -1)                         # 8 equal values
    assert abs(mv.attention_rank(orthogonal)[1] - 8) < 1e-4
    assert mv.choose_mod_layers(torch.tensor([5.0, 2.0, 9.0, 2.0, 7.0]), 2) == [1, 3, 0]
    model, (video, text) = make('none'), sample(Q=1)
    x = torch.cat([model.encode_video(video).tokens, model.embed(text[:, 0])], 1)
    for layer, found in zip(model.blocks, mv.layer_ranks(model, video, text).T):
        attention, position = layer.block.attention, torch.arange(64 + 5)
        seen = attention.weights(layer.block.norm1(x), position)
        close(found, torch.stack(mv.attention_rank(seen)).mean(1))
        x = layer(x, None, position)
        assert not attention._forward_pre_hooks


def test_gamma_mod_equals_the_authors_code():
    """Catches a gate on the attention, text that is not gated, a loss over the routable alone; top-k by
    frame, words that change what vision is routed, a loss that is lost or unweighted."""
    g, w, place = golden('mod')['gmod/train'], golden('mod')['gmod/weights'], torch.arange(1100)
    x, real = g['x'].clone().requires_grad_(), g['attention_mask']
    routing, block = mv.GammaRouting(16, [0], 0.5, 1059), llama(w)
    project = block.attention.project                          # the authors number the selected, 0..k-1
    block.attention.project = lambda h, _: project(h, torch.arange(h.size(1)))
    routing.router.weight.data = w['router.weight'][1] - w['router.weight'][0]
    route = routing(0, block, x, place, 1059)                                  # 41 of text
    close(route.logits.sigmoid(), g['route_prob'])
    assert torch.equal(route.index, g['selected'])
    mask = torch.ones(1100, 1100, dtype=torch.bool).tril() & real[:, None] & real[:, :, None]
    y, aux = mv.GammaBlock(block)(x, route, place, mask[:, None]), mv.routing_loss(route)
    close(y, g['y'], 2e-5)
    assert abs(aux - g['aux']) < 1e-6 and routing.loss([route]) == 0.01 * aux
    ((y ** 2).mean() + 0.01 * aux).backward()
    slope = routing.router.weight.grad
    close(torch.stack([-slope, slope]), g['grad_router'], 2e-5)
    close(x.grad.sum((0, 1)), g['grad_x_sum'], 2e-5)
    model, (video, text) = make('0,2', routing='gamma', keep_ratio=0.4, routing_loss=0.02), sample()
    _, _, aux = model(video, text, text)                                       # of a clip and its questions
    own = 0.02 * sum(mv.routing_loss(route) for route in aux['routes'].values())
    assert [*aux['routes']] == [0, 2] and make(routing='gamma').routing.weight == 0.01
    close(aux['routing_loss'], own, 1e-6)                                      # all of it is in the loss
    assert len(list(model.routing.parameters())) == 1                          # one for all layers
    index = aux['routes'][2].index                                             # ceil(0.4 * 64) and words
    assert aux['tokens'] == [26 + 10, 74, 26 + 10, 74] and (index[:, 26:] == torch.arange(64, 74)).all()
    assert torch.equal(index, model(video, other_words(text))[2]['routes'][2].index)
    assert (index[:, :26] // 16).flatten().bincount(minlength=4).unique().numel() > 1, 'chosen frame by frame'


def test_videollm_mod_equals_the_authors_code():
    """Catches top-k over all frames, lost positions, a cache that holds skipped tokens."""
    g, w, wanted = (golden('mod')[f'vmod{part}'] for part in ('', '/weights', '/unweighted'))
    order = g['v_mask'][0].long().argsort(descending=True, stable=True)        # vision in front
    x, position, caches = g['x'][:, order], order[None], [mv.KVCache() for _ in range(4)]
    for i in range(4):
        block, route = mv.MoDBlock(llama(w, f'layers.{i}.')), None
        if i % 2:
            router = mv.Router(16)
            router.weight.data = w[f'layers.{i}.router.weight'][0]
            route = router(x, 3, 0.2, 12)
            chosen = torch.zeros(1, 42, dtype=torch.bool).index_fill(1, order[route.index[0]], True)
            assert torch.equal(chosen, wanted[f'selected_layer{i}'])
            route = route._replace(gate=torch.ones_like(route.gate))
        x = block(x, route, position, mv.visible(position), caches[i])
        close(x[:, order.argsort()], wanted['hidden'][i], 2e-5)
    y = F.rms_norm(x[:, order.argsort()], (16,), w['norm.weight'], 1e-6)
    close(y, wanted['y_final_norm'], 2e-5)
    assert [c.k.size(2) for c in caches] == wanted['kv_len'].tolist()


def test_layer_lists_equal_the_authors_and_keep_odd_depths():
    """Catches odd depths that lose a layer and placements that start elsewhere than the paper's."""
    names = {'mod': 'interleaved', 'modall': 'all', 'moddeep': 'interleaved-deep',
             'moddeepall': 'all-deep', 'earlyexit': 'all-deep', 'layerskip': 'interleaved'}
    for key, depth in itertools.product(names, (4, 32)):
        assert mv.mod_layers(names[key], depth) == golden('mod')['vmod/layers'][f'{key}_{depth}'].tolist()
    for name, wanted in (('interleaved', [1, 3]), ('all-deep', [2, 3, 4]), ('none', []), ('3, 1', [1, 3])):
        assert mv.mod_layers(name, 5) == wanted
    for depth in (32, 40):             # of gamma-MoD's layers four stay dense (its authors' choice)
        ranks = torch.zeros(depth)
        ranks[[0, 1, 2, depth - 1]] = 1
        wanted = golden('mod')['gmod/layers'][f'arank_mod_{depth}'].tolist()
        assert sorted(mv.choose_mod_layers(ranks, 4)) == wanted
    for changes in (dict(n_layer=5), dict(streaming=True), dict(routing='skip')):
        assert make('interleaved', **changes).mod_layers == [1, 3]
    assert make('interleaved').mod_layers == [1]               # nothing reads vision after the last layer


def test_zero_gate_converts_without_a_change():
    """Catches weights lost in the conversion, a gate that is not exactly one, one that cannot learn."""
    dense, (video, text) = make('none', seed=3), sample()
    for ratio in (1.0, 0.5):
        model = make('all', gate='zero', keep_ratio=ratio)
        mv.init_from(model, dense)
        assert ratio < 1 or torch.equal(model(video, text)[0], dense(video, text)[0])
    model(video, text, text)[1].backward()
    assert all(p.grad.norm() > 1e-5 for p in model.routing.parameters())
    back = make('none')
    mv.init_from(back, model)                                                   # and the other way
    assert torch.equal(back(video, text)[0], dense(video, text)[0])


# ---- streaming -----------------------------------------------------------------------------------

def streamer(placement='interleaved', **changes):
    model = make(placement, streaming=True, **changes).eval()
    heed_every_key(model, 3)
    model.head.weight.data[mv.EOS] *= 3                              # silence and speech, both
    return model


def decided(model, video, text, **more):
    """Logits of the decisions and of the words in one tensor (B, T + L, V); loss, aux."""
    logits, loss, aux = model(video, text, **more)
    return torch.cat([aux['decisions'], logits[:, 0]], 1), loss, aux


def play(model, video, prompt, questions, theta=0.0):
    """Run a stream -> silence (B, T), the text as it stood: ids (B, 1, L), after (B, L); the moments."""
    moments = list(model.stream(zip(video.unbind(1), questions), prompt, theta, max_new_tokens=3))
    said = [(-1, prompt)]
    for t, (moment, question) in enumerate(zip(moments, questions)):
        said += [(t, words) for words in (moment['said'], question, moment['answer']) if words is not None]
    ids = torch.cat([words for _, words in said], 1)
    after = torch.cat([torch.full_like(words, t) for t, words in said], 1)
    ids, _, after = shapes.pack_text(ids, after)
    return torch.stack([m['silence'] for m in moments], 1), ids[:, None], after, moments


@pytest.mark.parametrize('placement', ['none', 'interleaved', 'interleaved-deep', 'all', 'all-deep'])
@pytest.mark.parametrize('routing,window,B', [('frame', 0, 4), ('frame', 2, 4), ('random', 1, 1),
                                              ('uniform', 3, 1), ('skip', 0, 4), ('skip', 2, 4)])
def test_stream_equals_the_whole(placement, routing, window, B):
    """Catches positions of a cache's length, wrong windows, rows that shift others, unlikely words."""
    model, (video, text) = streamer(placement, window=window, routing=routing), sample(B=B, T=6, seed=5)
    prompt, asked = text[:, 0, :2].clone(), text[:, 1].clone()
    prompt[-1, 1:], asked[0, 3:] = 0, 0                                  # of different lengths
    asked[1:2] = 0                                                       # one sample is asked nothing
    questions = [asked if t in (1, 4) else None for t in range(6)]
    theta = play(model, video, prompt, questions)[0].median().item()
    silence, ids, after, moments = play(model, video, prompt, questions, theta)
    logits, _, aux = decided(model, video, ids, after=after)
    last = torch.arange(15, 96, 16)                                      # of each frame: it decides
    assert routing == 'skip' or all(torch.isin(last, r.index[0]).all() for r in aux['routes'].values())
    close(logits[:, :6].softmax(-1)[..., mv.EOS], silence)
    assert B == 1 or (silence < theta).any() and (silence >= theta).any()
    best = logits.argmax(-1)                                             # (B, 6 + L)
    for b in range(B):                                                   # and the same words, greedily
        n = 6 + int((prompt[b] > 0).sum())                               # where the next word stands
        for t, moment in enumerate(moments):
            said, heard, answer = ([] if w is None else w[b][w[b] > 0].tolist()
                                   for w in (moment['said'], questions[t], moment['answer']))
            first = [2 + int(logits[b, t, 2:].argmax())] if said else []
            assert said == [*first, *best[b, n:n + len(said) - 1].tolist()][:len(said)]
            n += len(said) + len(heard)
            assert answer == best[b, n - 1:n - 1 + len(answer)].tolist()
            n += len(answer)


def test_window_forgets_all_but_the_prompt():
    """Catches a window that drops the prompt, grows, keeps old frames, words, padding, skipped tokens."""
    model, (video, text) = streamer(window=2), sample(T=6, Q=1)
    prompt, asked = text[:, 0, :2], text[:, 0].clone()
    asked[1] = 0                                                             # padding, of one sample alone
    held = [m['held'] for m in play(model, video, prompt, [None, asked, *[None] * 4])[3]]
    assert held[0] == [2 + 16, 2 + 4] * 2 and held[4] == held[5] == [2 + 32, 2 + 2 * 4] * 2
    early, model = torch.cat([1 - video[:, :3], video[:, 3:]], 1), streamer('none', n_layer=1, window=2)
    a, b = (play(model, v, prompt, [None] * 6)[0] for v in (video, early))
    # Frame 3 tells its change from frame 2, frame 4 sees that, frame 5 does not.
    assert torch.equal(a[:, 5], b[:, 5]) and (a[:, 4] - b[:, 4]).abs().max() > 1e-4


def test_streaming_loss_is_the_papers_and_every_router_learns_from_it():
    """Catches silence weighted twice or not at all, another mean, a last router that nothing trains."""
    assert streamer('all', silence_weight=0).config.silence_weight == 0        # a legal weight
    model, (video, text) = streamer('all', silence_weight=0.3).train(), sample(Q=1)
    after = torch.tensor([[-1, 0, 1, 1, 2]]).expand(2, -1)
    decisions, targets = torch.tensor([[1, 3, 1, 1], [4, 1, 1, -1]]), text.roll(-1, -1)
    targets[0, 0, 0], targets[:, 0, -1], targets[:, 0, 2] = -1, -1, mv.EOS     # the end of a turn too
    logits, loss, _ = decided(model, video, text, targets=targets, after=after, decisions=decisions)
    wanted = torch.cat([decisions, targets[:, 0]], 1)                          # (2, 4 + 5)
    factor = torch.where((wanted == mv.EOS) & (torch.arange(9) < 4), 0.3, 1.0)
    nll = -logits.log_softmax(-1).gather(2, wanted.clamp(min=0)[..., None])[..., 0]
    close(loss, (factor * nll)[wanted >= 0].mean())
    loss.backward()
    norms = [p.grad.norm() for p in model.routing.parameters()]
    assert len(norms) == 4 and min(norms) > 1e-3 * max(norms), norms
    assert sum(name.startswith('routing.') for name in model.state_dict()) == 4


@pytest.mark.parametrize('training', [True, False])
def test_a_stream_never_looks_ahead(training):
    """Catches selection or attention that reaches a later frame, or words that stand after."""
    model, (video, text) = streamer('all').train(training), sample(Q=1, L=6)
    after = torch.tensor([[-1, 0, 0, 1, 2, 3]]).expand(2, -1)
    logits, _, aux = decided(model, video, text, after=after)
    other = torch.cat([video[:, :2], 1 - video[:, 2:]], 1)
    changed = decided(model, other, other_words(text, 4), after=after)[0]
    close(logits[:, [0, 1, 4, 5, 6, 7]], changed[:, [0, 1, 4, 5, 6, 7]], 1e-6)
    assert (logits[:, 2] - changed[:, 2]).abs().max() > 1e-3
    close(model(video, text)[0], model(video, text, after=torch.full((2, 6), 3))[0], 0)
    position = aux['position'][0]                              # each word moves all after it by one
    assert position[15:64:16].tolist() == [16, 34, 51, 68]
    assert position[64:].tolist() == [0, 17, 18, 35, 52, 69]


# ---- token reduction -----------------------------------------------------------------------------

def slot_sizes(reduction, size=None):
    """Input tokens of each slot (B, M). size (B, N): what the inputs stand for already."""
    size = torch.ones_like(reduction.weight) if size is None else size
    return mv.slot_sums(size, reduction.assign, reduction.position.size(1))


def members_mean(x, assign):
    """Plain means of the tokens x (N, C) of each slot, in order of slots."""
    return torch.stack([x[assign == slot].mean(0) for slot in range(int(assign.max()) + 1)])


def test_reductions_sum_expand_and_compose():
    """Catches slots that are off by one, weights that do not multiply, dropped tokens that come back,
    bfloat16 sums (256 + 1 = 256 on a GPU), gradients other than each token's share; float64 that is rounded,
    small sizes that do not count, tokens that lose to those that take no part."""
    assign, x = torch.randint(-1, 8, (3, 20)), torch.randn(3, 20, 5)
    first = mv.from_clusters(assign, 8)
    y = mv.reduce_tokens(x, first)
    back = y.take_along_dim(first.assign.clamp(min=0)[..., None], 1) * (assign >= 0)[..., None]
    close(mv.expand(y, first), back, 0)
    close(mv.reduce_tokens(back, first), y, 1e-6)
    second = mv.from_clusters(torch.where(first.mask, torch.arange(8) % 3, -1), 3)
    both = mv.compose(first, second)
    close(mv.reduce_tokens(x, both), mv.reduce_tokens(y, second), 1e-6)
    sizes = slot_sizes(second, slot_sizes(first))
    assert torch.equal(slot_sizes(both), sizes) and sizes.sum() == (assign >= 0).sum()
    begin = (both.assign[:, None] == torch.arange(3)[:, None]).long().argmax(-1)
    assert torch.equal(both.position, begin) and both.mask.all()
    x, one = (1 + torch.rand(1, 1000, 64)).bfloat16(), mv.from_clusters(torch.zeros(1, 1000).long(), 1)
    exact = x.double().mean(1, keepdim=True)
    assert ((mv.reduce_tokens(x, one) - exact).abs() <= 2 ** -8 * exact).all()         # one rounding
    assert slot_sizes(one).item() == 1000
    x = torch.randn(1, 6, 2, requires_grad=True)
    mv.reduce_tokens(x, mv.from_clusters(torch.tensor([[0, 0, 1, -1, 0, 1]]), 2)).sum().backward()
    close(x.grad[0, :, 0], torch.tensor([1 / 3, 1 / 3, 1 / 2, 0, 1 / 3, 1 / 2]), 1e-6)
    pairs, place = torch.tensor([[0, 0, 1]]), torch.tensor([[0, 2]])
    assert torch.autograd.gradcheck(lambda x: mv.reduce_tokens(x, mv.mean_of(pairs, place)), (
        torch.randn(1, 3, 2, dtype=torch.double, requires_grad=True),))
    small = mv.mean_of(pairs, place, torch.tensor([[1e-8, 3e-8, 1.0]]))
    close(small.weight, torch.tensor([[0.25, 0.75, 1.0]]))
    among = torch.tensor([False, True, True])
    assert torch.equal(mv.best_of(torch.tensor([-math.inf, -math.inf, 1.0]), 2, among), among)


def test_gaps_take_tokens_away_in_training_alone():
    """Catches gaps in an answer, one kind of them alone, too few left, what a resumed run sees anew."""
    def kind(one):
        if one.tokens.size(1) == 96 or one.reduction is not None:
            return 'whole' if one.reduction is None else 'detail'
        if one.position.dim() == 2:
            return 'changed'
        by_frame = one.position.bincount(minlength=96).view(6, 16)
        return 'frames' if (by_frame.diff() == 0).all() else 'patches'
    x, (reducer, copied) = torch.randn(2, 6, 16, 8), (mv.Gaps(8, gaps=0.8, least=0.2) for _ in range(2))
    assert reducer.eval()(x).tokens.size(1) == 96 and reducer.calls == 0
    reducer.train()
    made = [reducer(x) for _ in range(200)]
    sizes, counts = [one.tokens.size(1) for one in made], Counter(map(kind, made))
    assert min(sizes) >= 0.2 * 96 / 2.3 and sum(sizes) / 200 < 75
    assert 0.3 < sum(n < 0.2 ** 0.5 * 96 for n in sizes) / sum(n < 96 for n in sizes) < 0.7
    assert len(counts) == 5 and min(counts.values()) > 20 and counts['whole'] < 60, counts
    for one in made:
        if one.reduction is None:
            taken = x.flatten(1, 2).take_along_dim(one.position.expand(2, -1)[..., None], 1)
            assert torch.equal(one.tokens, taken) and (one.position.diff() > 0).all()
    still = x[:, :1].repeat(1, 6, 1, 1)
    still[:, :, 5] = x[:, :, 5]                                # one patch moves: what repeats goes first
    for place in [one.position for one in [reducer(still) for _ in range(50)] if kind(one) == 'changed']:
        assert (((place < 16) | (place % 16 == 5)).sum(1) == min(place.size(1), 21)).all()
    copied.load_state_dict(reducer.state_dict())
    assert copied.calls == 250 and torch.equal(copied.train()(x).tokens, reducer(x).tokens)
    assert not torch.equal(made[0].tokens[:, :1], made[1].tokens[:, :1])
    with torch.device('meta'):                                 # the counter is for the host
        assert mv.Gaps(8).calls.device.type == 'cpu'
    with pytest.raises(ValueError, match='least above 0'):
        mv.Gaps(8, least=0.0)


def test_baselines_keep_to_the_budget():
    """Catches a grid over the budget, ToMe that drops tokens or sizes, pruning by frame, the first frames."""
    for T, side, budget in ((8, 4, 12), (8, 4, 64), (8, 4, 500), (3, 5, 1), (16, 8, 7), (7, 3, 20)):
        made = mv.pool(torch.randn(1, T, side ** 2, 4), budget)
        M = made.tokens.size(1)
        assert (made.reduction.assign >= 0).all() and made.reduction.mask.all()
        assert min(budget, T * side ** 2) / 2.3 < M <= budget and M == {12: 12, 500: 128}.get(budget, M)
    x = torch.randn(2, 50, 8)
    for n in (50, 30, 7, 1):
        merged = mv.tome(x, n)
        assert merged.mask.all() and merged.position.size(1) == n and (merged.assign >= 0).all()
        close(mv.reduce_tokens(x, merged)[0], members_mean(x[0], merged.assign[0]))
    y, size = x, None                                      # round by round, each token with its size
    while y.size(1) > 7:
        step = mv.bipartite_soft_matching(y, y.size(1) - 7, size=size)
        y, size = mv.reduce_tokens(y, step), slot_sizes(step, size)
    close(mv.reduce_tokens(x, mv.tome(x, 7)).sort(1).values, y.sort(1).values)
    model, (video, text) = make('none', reducer='prune', budget=20), sample()
    looked = model.encoder(video, None, True).info['saliency'].view(2, -1)
    assert torch.equal(model.encode_video(video).position, looked.topk(20).indices.sort(1).values)
    assert make('none', reducer='tome').encode_video(video).tokens.size(1) == 16         # a quarter
    assert mv.pool(torch.randn(1, 8, 16, 4), 16).reduction.position[0, 4] == 32   # finer in time
    for name, cls in mv.REDUCERS.items():
        if cls.untrained and cls.leaving:                                      # half of 64 tokens, about
            few = make(reducer=name, **cls.leaving(0.5, 4, 16)).encode_video(video)
            assert 28 <= few.tokens.size(1) <= 34, name
    position = make('none', reducer='uniform', budget=33).encode_video(video).position
    assert (position // 16).tolist() == [[1] * 16 + [3] * 16] * 2


def test_segments_equal_holitoms_code_and_brute_force():
    """Catches '>=' tau, ties that go to longer segments, a dynamic programme that misses the optimum."""
    def cut(similarity, tau, longest):
        segment, gain = mv.temporal_segments(similarity[None], tau, longest)
        number, lengths = segment[0].unique_consecutive(return_counts=True)
        assert torch.equal(number, torch.arange(len(number)))
        return gain.item(), lengths.tolist()
    cases = golden('holitom', 'dp/')
    assert len(cases) > 20
    for name, g in cases.items():
        tau, longest = g['tau_maxwindow'].tolist()
        lengths = [b - a + 1 for a, b in g['segments'].tolist()]
        assert cut(g['sim'], tau, int(longest)) == (g['total'].item(), lengths), name
    for case in range(200):
        T, P, longest = (int(torch.randint(1, high, ())) for high in (9, 4, 12))
        still, found = torch.rand(T - 1, P) < 0.7, []
        for cuts in itertools.product((0, 1), repeat=T - 1):
            ends = [i + 1 for i in range(T - 1) if cuts[i]] + [T]
            spans = list(zip([0, *ends], ends))
            lengths = [b - a for a, b in spans]
            gain = sum(int(still[a:b - 1].all(0).sum()) * (b - a - 1) for a, b in spans)
            if max(lengths) <= longest:                        # ties: shortest, read from the end
                found.append((-gain, lengths[::-1], lengths))
        gain, _, lengths = min(found)
        assert cut(still.float(), 0.5, longest) == (-gain, lengths), case


def test_clusters_equal_holitoms_code():
    """Catches a point that is not its own neighbour; densities of zero; k cut to the number of clusters: then
    every density is one, and what stands alone is taken; copies of one token that take every centre."""
    for name, g in golden('holitom', 'dpc/').items():
        m, k = g['m_k'].tolist()
        centers, assign = mv.dpc_knn(g['x'][None], m, k)
        assert torch.equal(centers[0], g['centres']), name
        x = torch.cat([g['x'], 99 + torch.rand(5, g['x'].size(1))])[None].expand(2, -1, -1)
        mask = (torch.arange(x.size(1)) < len(g['x'])).expand(2, -1)            # and inside a batch
        both, inside = mv.dpc_knn(x, torch.tensor([m, 2]), k, mask)
        assert torch.equal(both[0], g['centres']) and (both[1, 2:] == x.size(1)).all()
        assert torch.equal(inside[0, :-5], assign[0]) and (inside[:, -5:] == -1).all()
    for scale in (0.1, 1, 25):                                 # at 25 every density is zero in float32
        x = scale * torch.randn(1, 40, 8)
        far = torch.cdist(x.double(), x.double())[0] / 8 ** 0.5                # the equation, in float64
        density = (-far.topk(7, largest=False).values.square().mean(-1)).exp()
        gap = far.masked_fill(density <= density[:, None], math.inf).amin(-1)
        score = density * gap.where(gap < math.inf, far.max())
        assert torch.equal(mv.dpc_knn(x, 6)[0][0], score.topk(6).indices.sort().values), scale
    x = torch.cat([torch.randn(1, 1, 8) + 40, torch.randn(1, 30, 8)], 1)        # one is an outlier
    for count, k in itertools.product((1, 2), (5, 7, 99)):
        centers = mv.dpc_knn(x, count, k)[0][0]
        densest = torch.cdist(x[0], x[0]).square().topk(min(k, 31), largest=False).values.sum(1).argmin()
        assert densest in centers and (count == 2 or 0 not in centers)
    x = torch.randn(1, 30, 8)
    x[:, 5:13] = x[:, 5:6]
    centers, assign = mv.dpc_knn(x, 6)
    assert len(x[0, centers[0]].unique(dim=0)) == len(assign.unique()) == 6


def released_dpc_knn(x, count, k, mask, most, dpc_knn=mv.dpc_knn):
    """The rule of HoliTom's code, not of its paper: no more neighbours than clusters."""
    rows = [dpc_knn(x[i:i + 1], n, min(k, max(n, 1)), mask[i:i + 1], most)
            for i, n in enumerate(count.tolist())]
    return map(torch.cat, zip(*rows))


def test_holitom_equals_its_authors_code(monkeypatch):
    """Catches ratios rounded elsewhere, beta on the wrong side, salient tokens by another order; crashes and
    NaN at one frame, no token, zero vectors; 0.2 * 275 / 275 above 0.2, 0.07 * 100 above 7."""
    same = torch.randn(1, 1, 9, 8).expand(1, 6, 9, 8)
    x = torch.cat([same[:, :, :4], torch.randn(1, 6, 5, 8)], 2)
    for clip, ratio, wanted in ((x[:, :1], 0.34, 4), (same, 1.0, 9), (same, 0.05, 3), (x, 0.0, 0),
                                (torch.zeros(1, 6, 9, 8), 0.5, 30), (torch.randn(1, 6, 9, 64), 1.0, 54),
                                (torch.randn(1, 11, 25, 64), 0.2, 55),
                                (torch.randn(1, 8, 100, 64), 0.07, 56)):
        reduction = mv.holitom(clip, torch.rand(clip.shape[:3]), ratio)
        assert reduction.position.size(1) == wanted, (ratio, reduction.position.shape)
        assert mv.reduce_tokens(clip.flatten(1, 2), reduction).isfinite().all()
    monkeypatch.setattr(mv, 'dpc_knn', released_dpc_knn)
    cases = golden('holitom', 'outer/')
    assert len(cases) >= 8
    for name, g in cases.items():
        m, (T, P, C) = g['meta'], g['X'].shape
        beta = None if m.get('no_beta') else m['beta']
        reduction = mv.holitom(g['X'][None], g['attn'][None], m['R'], m['tau'], beta, m['K'], m['max_window'])
        place, order = (g['frame'] * P + g['pos']).sort()
        assert torch.equal(reduction.position[0], place), name
        close(mv.reduce_tokens(g['X'].view(1, T * P, C), reduction)[0], g['tokens'][order])
        close(mv.slot_sums(reduction.weight, reduction.assign, len(place)), torch.ones(1, len(place)))


def test_holitom_inner_equals_its_authors_choice_and_is_a_true_mean():
    """Catches dropped tokens joined to dropped ones, and the released halving in place of a mean."""
    for g in golden('holitom', 'inner/').values():
        h, (start, n, ratio) = g['hidden_in'].clone(), g['start_len_r'].tolist()
        place = torch.arange(h.size(1)).expand(h.shape[:2])
        vision = (place >= start) & (place < start + n)
        reduction = mv.holitom_inner(h, g['attn'][:, :, -1].mean(1), vision, ratio, rows=5)
        assert torch.equal(reduction.position[0], g['keep'])
        home = reduction.position[0][reduction.assign[0]]                      # (S,) where each went
        assert torch.equal(home[g['non_topk']], g['topk'][g['target'][0]])
        close(mv.reduce_tokens(h, reduction)[0], members_mean(h[0], reduction.assign[0]))
        for j in g['non_topk'].tolist():                       # the released rule, in place of the mean
            h[0, home[j]] = (h[0, home[j]] + h[0, j]) / 2
        close(h[:, g['keep']], g['hidden'])
    few = mv.holitom_inner(torch.randn(1, 4, 8), torch.rand(1, 4), torch.ones(1, 4, dtype=torch.bool))
    assert few.position.shape == (1, 2)                                        # no word beside vision


def test_decisions_are_float32_under_autocast():
    """Catches merging by bfloat16, which differs between batch sizes and machines; TF32, by the newer switch
    of torch, too, and a switch that is another one afterwards."""
    matmul = torch.backends.cuda.matmul
    for way in ('tf32', 'ieee', matmul.fp32_precision):
        matmul.fp32_precision = way
        with mv.exact():
            assert matmul.fp32_precision == 'ieee'
        assert matmul.fp32_precision == way
    with torch.no_grad(), mv.exact(grad=True):
        assert not torch.is_grad_enabled()
    x = torch.randn(3, 1, 64, 32).repeat(1, 6, 1, 1)           # half of it stands still, two clips have a cut
    x[::2, 3:] = torch.randn(3, 1, 64, 32)[::2]
    x[:, :, 32:] += torch.randn(3, 6, 32, 32)
    x, saliency = x + 0.05 * torch.randn(3, 6, 64, 32), torch.rand(3, 6, 64)
    flat, vision, router = x.flatten(1, 2), torch.ones(3, 384, dtype=torch.bool), mv.RaggedRouter(32)
    quantizer, noise = mv.VectorQuantizer(200, 32).eval(), torch.randn(20, 60, 16)
    for decide in (lambda: router(flat, 6, 0.25), lambda: router(flat, torch.arange(384) // 64, 0.25),
                   lambda: mv.bipartite_soft_matching(flat, 90), lambda: mv.kmeans(flat, 60),
                   lambda: mv.holitom(x + 1, saliency, 0.4), lambda: mv.dpc_knn(flat, 60),
                   lambda: mv.holitom_inner(flat, saliency.flatten(1), vision),
                   lambda: mv.merge_duplicates(flat.softmax(-1)), lambda: mv.select_k(noise, 4, 32),
                   lambda: quantizer(flat[0])[:2],
                   lambda: [mv.silhouette(flat, torch.arange(384).expand(3, -1) % 7, 7)]):
        with torch.autocast('cpu', torch.bfloat16):
            inside = decide()
        for a, b in zip(inside, decide()):
            assert a is b is None or a.dtype == b.dtype and torch.equal(a, b)


def test_bipartite_matching_equals_tomes_code():
    """Catches a protected token that merges, sizes lost, slots in another order (chains depend on it); a zero
    token that draws every source (NaN), tokens that have nobody to merge with."""
    cases = dict(golden('tome'))
    g = cases.pop('tome/chain')
    x, size, total = g['x'], torch.ones(g['x'].shape[:2]), None
    for i, r in enumerate(g['r'].tolist()):
        step = mv.bipartite_soft_matching(x, r, 1, size)
        total = step if total is None else mv.compose(total, step)
        x, size = mv.reduce_tokens(x, step), slot_sizes(step, size)
        close(x, g[f'x_{i}'])
        assert torch.equal(size, g[f'size_{i}'][..., 0]) and torch.equal(total.assign, g[f'source_idx_{i}'])
    for name, g in cases.items():
        protected = int(g['cls_num'] if 'cls_num' in g else g['class_token'] + g['distill_token'])
        size = g['size_in'][..., 0]
        step = mv.bipartite_soft_matching(g['metric'], int(g['r']), protected, size)
        assert torch.equal(step.assign, g['source_idx']), name
        close(mv.reduce_tokens(g['x'], step), g['x_out'])
        assert torch.equal(slot_sizes(step, size), g['size_out'][..., 0])
    zero = torch.cat([torch.randn(1, 3, 4), torch.zeros(1, 1, 4), torch.randn(1, 4, 4)], 1)
    step = mv.bipartite_soft_matching(zero, 3)
    assert mv.reduce_tokens(zero, step).isfinite().all() and (step.assign[0] == step.assign[0, 3]).sum() < 4
    assert mv.bipartite_soft_matching(torch.randn(2, 1, 4), 1).assign.tolist() == [[0], [0]]
    assert torch.equal(mv.bipartite_soft_matching(zero, 0).assign[0], torch.arange(8))      # left in order
    many = torch.randn(1, 3000, 4)                             # more than are compared at once
    alike, target = (mv.unit(many)[0, ::2] @ mv.unit(many)[0, 1::2].T).max(1)
    gone, slot = alike.topk(100).indices, mv.bipartite_soft_matching(many, 100).assign[0]
    assert torch.equal(slot[::2][gone], slot[1::2][target[gone]]) and len(slot.unique()) == 2900


@pytest.mark.parametrize('patch', [4, 8, 12, 16, 32])
def test_every_pixel_is_seen(patch):
    """Catches pixels between the strides of the stem."""
    encoder, video = mv.VisionEncoder(32, 1, 2, 4, patch), torch.rand(1, 2, 3, 2 * patch, 2 * patch)
    tokens = encoder(video.requires_grad_()).tokens
    tokens.square().sum().backward()
    assert tokens.shape == (2, 4, 32) and (video.grad.abs().amax(2) > 0).all()


def test_saliency_is_the_attention_received():
    """Catches attention given in place of received, an encoder that saliency changes, its gradient; a stage
    that keeps what is looked at the least, by another layer or word."""
    encoder, (video, text) = make().encoder, sample(Q=1)
    made, plain, (first, block) = encoder(video, want_saliency=True), encoder(video), encoder.blocks
    assert torch.equal(made.tokens, plain.tokens) and not plain.info
    assert not made.info['saliency'].requires_grad
    x = encoder.embed(video) + encoder.place
    assert 0.5 < encoder.embed(video).std() < 2
    close(made.info['saliency'], block.attention.weights(block.norm1(x + first(x))).mean((1, 2)))
    for stage in ('drop', 'holitom'):                          # the last word's attention, a layer before
        model = make('none', stage=stage, stage_layer=2)
        x = torch.cat([model.encode_video(video, None, text[:, 0]).tokens, model.embed(text[:, 0])], 1)
        x, block = model.blocks[0](x, None, torch.arange(69)), model.blocks[1].block
        looks = block.attention.weights(block.norm1(x), torch.arange(69))[:, :, -1, :64].mean(1)
        stays = model(video, text)[2]['stage'].position
        assert torch.equal(stays, looks.topk(32).indices.sort(1).values)


def test_kmeans_equals_vqtokens_code_and_finds_what_brute_force_finds():
    """Catches labels of the step before their centres, centres normalized again, plain distances, centres
    that are not means, other ids for a batch; empty clusters that become NaN or zero tokens, half precision
    in the distances."""
    g = golden('vq')['kmeans']
    x = g['tokens'].flatten(0, 1)[None]
    fit = lambda n: [a[0] for a in mv.kmeans(x, 6, n, g['init'][None], 'cosine')]
    close(mv.unit(x)[0], g['x_unit'], 1e-6)
    for steps in (1, 2, 50):
        close(fit(steps)[0].sort(0).values, g[f'centroids_{steps}'].sort(0).values)
        labels = g[f'labels_{steps}'].tolist()           # the released ones are of the step before
        assert fit(steps - 1)[1].tolist() == [[*dict.fromkeys(labels)].index(label) for label in labels]
    g = golden('vq')['km_l2']
    centers, assign = mv.kmeans(g['x'], 10, 10, g['init'])
    mine, theirs = (torch.cat([means[0], count[:, None].float()], 1) for means, count in (
        (centers, assign[0].bincount(minlength=10)), (g['means'], g['bins'][0])))
    close(mine[mine[:, 0].argsort()], theirs[theirs[:, 0].argsort()])
    x = torch.randn(4, 9, 2)
    centers, assign = mv.kmeans(x, 2, 10)
    loss = lambda x, side: sum(((p - p.mean(0)) ** 2).sum() for p in (x[side], x[~side]))
    sides = torch.tensor([*itertools.product([False, True], repeat=9)][1:-1])
    for b in range(4):
        best = min(loss(x[b], side) for side in sides)
        assert best <= loss(x[b], assign[b] == 0) <= 1.3 * best                # a local optimum, a good one
        close(centers[b], members_mean(x[b], assign[b]))
        assert assign[b, 0] == 0 and torch.equal(assign[b:b + 1], mv.kmeans(x[b:b + 1], 2, 10)[1])
    few = (torch.zeros(1, 6, 4), torch.ones(1, 6, 4), torch.eye(4)[None, :3].repeat(1, 2, 1))
    for x, metric in itertools.product(few, ('l2', 'cosine')):                 # fewer than clusters
        centers, assign = mv.kmeans(x, 5, metric=metric)
        assert centers.isfinite().all() and assign.max() == len(x[0].unique(dim=0)) - 1
        close(centers[0][assign[0]], x[0] if metric == 'l2' else mv.unit(x[0]))
    far = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [50.0, 50.0]]])        # nobody's centre stays where it was
    close(mv.kmeans(torch.rand(1, 20, 2), 3, init=far)[0][:, 2], far[:, 2])
    assert torch.equal(mv.kmeans(torch.randn(2, 6, 8), 9)[1], torch.arange(6).expand(2, -1))
    turned = torch.randn(8, 6, 2).bfloat16().permute(2, 1, 0)           # neither contiguous nor float32
    for a, b in zip(mv.kmeans(turned, 3), mv.kmeans(turned.float().contiguous(), 3)):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_the_number_of_clusters_is_found_by_the_mean_silhouette():
    """Catches a score that ignores the labels, an offset, a fit thrown away and made again; a token counted
    among its own neighbours, singletons that score one."""
    wanted = torch.tensor([5, 9, 14, 18, 23, 28] * 3)                          # how many are planted
    x = torch.stack([mv.unit(torch.randn(K, 32))[torch.arange(512) % K] for K in wanted.tolist()])
    x = mv.unit(x + 0.1 * torch.randn(x.shape))
    count, centers, assign = mv.select_k(x, 2, 32)
    assert ((count - wanted).abs() <= 1).float().mean() >= 0.9
    k = int(count[0])
    assert mv.select_k(x[:1], 2, k)[0] == k
    fit = mv.kmeans(x[:1], k, init=mv.spread_centers(x[:1], 32)[:, :k], metric='cosine')
    assert torch.equal(assign[0], fit[1][0])
    close(centers[0, :k], fit[0][0])
    x, assign = torch.randn(1, 12, 5), torch.tensor([[0, 1, 2, 2, 1, 1, 0, 2, 3, 1, 2, 0]])
    far, scores = 1 - mv.unit(x[0]) @ mv.unit(x[0]).T, []
    for i, own in enumerate(assign[0]):                                        # by the definition
        means = [far[i, (assign[0] == k) & (torch.arange(12) != i)].mean() for k in range(4)]
        a, b = means.pop(own), min(means)                                      # a nan: it stands alone
        scores.append((b - a) / max(a, b))
    close(mv.silhouette(x, assign, 4), torch.stack(scores).nan_to_num().mean()[None])


usage = lambda index, K: mv.LearnedCodes(8, codes=K).facts(dict(index_map=index))


def test_vector_quantizer_equals_a_widely_used_library():
    """Catches sums divided before the average, a gradient that reaches the codes; no smoothing (0 / 0 for a
    code that catches nothing), or another formula of it."""
    for g in golden('vq', 'vq_').values():
        vq = mv.VectorQuantizer(6, 8, g['decay'].item(), g['beta'].item(), revive=0.0, eps=g['eps'].item())
        vq.load_state_dict(dict(codebook=g['embed0'], cluster_size=g['cluster_size0'],
                                embed_avg=g['embed_avg0'], calls=torch.tensor(1)))   # its codes are placed
        x = g['x'].clone().requires_grad_()
        quantized, indices, loss = vq(x)
        assert torch.equal(indices, g['indices'])
        close(quantized, g['quantized'])
        close(loss, g['loss'])
        close(torch.autograd.grad(loss, x, retain_graph=True)[0], g['grad_x_from_loss'])
        close(torch.autograd.grad(quantized, x, g['grad_out'])[0], g['grad_x_from_q'])
        assert usage(indices, 6)['perplexity'] == pytest.approx(g['perplexity'].item(), abs=1e-4)
        vq(x)
        quantized, indices, _ = vq.eval()(x)
        close(vq.codebook, g['embed2'])                                # evaluation moves nothing
        close(vq.cluster_size, g['cluster_size2'])
        assert torch.equal(indices, g['eval_indices_after2'])
        close(quantized, g['eval_quantized_after2'])
        assert torch.equal(quantized, vq.codebook[indices])                    # bit by bit
    x, codes = torch.randn(200, 8), torch.cat([torch.randn(9, 8), torch.full((1, 8), 1e3)])
    vq = mv.VectorQuantizer(10, 8, decay=0.0, revive=0.0, eps=0.5)
    vq.codebook.copy_(codes)
    vq.calls.fill_(1)
    vq(x)
    caught = F.one_hot(torch.cdist(x, codes).argmin(1), 10).float()            # (200, 10) by the last: none
    close(vq.codebook, caught.T @ x / ((caught.sum(0) + 0.5) / 205 * 200)[:, None])


def test_codes_start_at_clusters_and_dead_ones_revive():
    """Catches codes that die for good, a revival that the average overwrites, another one every run."""
    centers = 5 * torch.randn(8, 4)
    x = centers[torch.arange(400) % 8] + 0.01 * torch.randn(400, 4)
    def trained():
        vq = mv.VectorQuantizer(8, 4)                                            # of other random codes each
        vq(x)
        assert (torch.cdist(centers, vq.codebook).amin(1) < 0.1).all()           # k-means at first
        vq.codebook[3:], vq.embed_avg[3:], vq.cluster_size[3:] = 1e4, 0, 0       # five of them get lost
        vq(x)
        assert (vq.codebook.abs() < 100).all() and (vq.cluster_size >= vq.revive).all()
        close(vq.embed_avg / vq.cluster_size[:, None], vq.codebook, 1e-2)      # or the next step snaps back
        for _ in range(30):
            vq(x)
        return vq
    vq, copy = trained(), mv.VectorQuantizer(8, 4)
    assert torch.equal(vq.codebook, trained().codebook) and usage(vq(x)[1], 8)['codes_used'] >= 0.75
    copy.load_state_dict(vq.state_dict())
    assert copy.calls == vq.calls > 30 and torch.equal(copy(x)[1], vq(x)[1])
    assert copy.half().codebook.dtype == torch.float32                         # codes stay float32
    vq.cluster_size[3:] = 0
    for bad in (torch.full((9, 4), math.nan), x.index_fill(0, torch.arange(9), math.nan)):
        vq(bad)
        assert vq.codebook.isfinite().all()
    with torch.device('meta'):
        empty = mv.VectorQuantizer(8, 4)
    empty.to_empty(device='cpu').load_state_dict(vq.state_dict())
    assert torch.equal(empty.eval()(x)[1], vq.eval()(x)[1])


@pytest.mark.parametrize('reentrant', [True, False])
def test_checkpointing_changes_neither_codes_nor_gradients(reentrant):
    """Catches a codebook that moves again when activations are computed again, those of other codes, luck."""
    x, words, known = torch.randn(2, 8, 16, 32), torch.randn(2, 3, 32), torch.ones(2, 3, dtype=torch.bool)
    again = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=reentrant)
    loss = lambda made: made.tokens.square().sum() + made.loss
    for name, options in (('vq', dict(codes=8)), ('gaps', dict(gaps=1.0)), ('bvllm', {})):
        found = []
        for run in (lambda f, x: f(x), again):
            torch.manual_seed(0)
            reducer, inside = mv.REDUCERS[name](32, **options), x.clone().requires_grad_()
            for _ in range(3):
                run(lambda x: loss(reducer(x.tanh(), None, words, known)), inside).backward()
            found.append((inside.grad, *reducer.buffers()))
        assert all(map(torch.equal, *found)) and found[0][-1] == 3             # the last one counts the calls


def test_vqtoken_at_its_edges():
    """Catches ids that change the tokens, padding that is attended to, K that depends on T; codes that no
    patch is left for."""
    x = torch.randn(3, 5, 16, 32)
    x[1, :, 3:] = x[1, :1, 3:4]                                       # few different tokens
    x[2] = x[2, :1, :1]                                               # one
    for codes in (0, 6):
        vq = mv.VQToken(32, codes=codes)
        tokens, _, made, *_ = vq(x)
        assert made.mask[2].sum() == 1 and (tokens[~made.mask] == 0).all() and tokens.isfinite().all()
        for b in range(3):
            n, alone = int(made.mask[b].sum()), vq(x[b:b + 1])
            close(tokens[b, :n], alone.tokens[0, :n])
            assert torch.equal(alone.reduction.assign[0], made.assign[b])
    assert {vq(clip).tokens.shape for clip in (x[2:], x[:1], x[:1, :1])} == {(1, 6, 32)}
    assert mv.VQToken(32, codes=500)(x).tokens.shape == (3, 80, 32)
    # Other ids for the same clusters are the same tokens in another order; shares of a cell sum to one.
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for T, cells in ((5, 80), (16, 128)):                             # fewer frames than cells, two in each
        y = torch.randn(1, T, 16, 32, requires_grad=True)
        index = vq(y).reduction.assign.view(1, T, 16)
        occupied = vq.occupancy(index, 6)
        close(vq.occupancy(order[index], 6)[:, order], occupied)
        close(occupied.sum(1).sort(descending=True).values[:, :cells], torch.ones(1, cells))
    nn.init.zeros_(vq.out.weight)                                     # the codes alone are means
    tokens = vq(y).tokens
    close(tokens[0], members_mean(y[0].flatten(0, 1), index[0].flatten()))
    tokens.square().sum().backward()
    assert (y.grad.abs().sum(-1) > 0).all()


def test_merging_of_duplicates_equals_bvllms_code_but_keeps_chains():
    """Catches a threshold on the bare cosine, and the released code's loss: the end of a chain."""
    soft, chain = golden('bvllm')['soft'], golden('bvllm')['chain']
    for g, wanted in ((soft, soft['y']), (chain, torch.tensor([[37.0], [1000.0]]))):   # 37: of 1, 10 and 100
        step = mv.merge_duplicates(g['sel'][None])
        close(mv.reduce_tokens(g['x'].flatten(1)[None], step)[step.mask], wanted.flatten(1))
    assert mv.FrameSelector(32).facts(dict(selector=torch.eye(4).expand(3, 4, 4))) == dict(frames=4)


@pytest.mark.parametrize('budget', [1, 3, 7, 33, 64, 80, 99])
def test_the_budget_is_met_whatever_is_left(budget):
    """Catches fewer tokens than the budget, above all of one frame, a frame that gives most of them."""
    selector = mv.FrameSelector(32, 2, budget=budget, select_frames=5).eval()
    x, words, known = torch.randn(6, 5, 16, 32) * 3, torch.randn(6, 3, 32), torch.ones(6, 3).bool()
    selector.sharpness.data[0] = 0.0                               # all queries alike: one is left
    tokens, position, *_, info = selector(x, None, words, known)
    assert tokens.shape == (6, min(budget, 80), 32) and tokens.isfinite().all() and (position < 80).all()
    assert (position.diff(dim=1) >= 0).all() and (position < 16).all()
    likes = [selector.affinity(x[:, :1, 3], x[:, :, 0] + shared, torch.ones(1, 1), 5) for shared in (0, 9)]
    close(*likes, 1e-4)
    assert mv.merge_duplicates(info['selector']).mask.sum() == 6
    nn.init.zeros_(selector.wish.weight)                           # nothing is wanted: all keep their places
    selector.sharpness.data[:] = 999.0
    tokens, position, *_ = selector(x, None, words, known)
    share = ((position // 16)[..., None] == torch.arange(5)).sum(1)                        # (6, 5) by frame
    assert (share.amax(1) - share.amin(1) <= 1).all()
    if budget >= 80:
        close(tokens, x.flatten(1, 2))


def test_frames_are_chosen_by_the_question():
    """Catches queries that keep to their own place in time, or that want the same whatever is asked."""
    shown, words, known = 2 * torch.randn(16, 16), torch.randn(16, 32), torch.ones(32, 1).bool()
    selector = mv.FrameSelector(32, 2, budget=16)
    optimizers = mv.configure_optimizer(selector, 0.03)
    for _ in range(50):                                        # each frame shows one of 16 things, a number
        what, asked = torch.rand(32, 16).argsort(1), torch.randint(16, (32,))
        number = torch.randn(32, 16, 1, 16)                                    # on all of its 4 patches
        x = torch.cat([shown[what][:, :, None], number], 3) + 0.3 * torch.randn(32, 16, 4, 32)
        told = selector(x, None, words[asked][:, None], known).tokens[..., 16:].mean(1)
        here = what == asked[:, None]                                          # (32, 16) the frame asked for
        train_tiny.learn(optimizers, (told - number[here][:, 0]).square().mean())
    look = lambda asked: selector.eval()(x, None, words[asked][:, None], known).info['selector']
    weight, other = look(asked), look((asked + 1) % 16)                        # (32, K, 16)
    assert weight.mean(1)[here].mean() > 0.5 > 0.2 > other.mean(1)[here].mean()
    assert (weight.sum(1).argmax(1) != other.sum(1).argmax(1)).float().mean() > 0.8
    assert mv.merge_duplicates(weight).mask.sum(1).float().mean() < 2.5        # of four queries


def test_gumbel_noise_in_training_alone_and_repeatable():
    """Catches noise at evaluation or of the global generator, a selector that reads no question."""
    model, (video, text) = make(**WAYS['bvllm']).eval(), sample(Q=1)
    picked = lambda model, text=text: model(video, text)[2]['reduced'].info['selector']
    assert torch.equal(picked(model), picked(model))
    assert not torch.equal(picked(model), picked(model, other_words(text, 0, 1)))
    state = {k: v.clone() for k, v in model.train().state_dict().items()}
    first = picked(model)
    assert not torch.equal(first, picked(model))
    model.load_state_dict(state)                                     # the count of calls is saved, too
    torch.manual_seed(99)
    assert torch.equal(first, picked(model))
    chance = mv.hashed(torch.arange(10 ** 5)) / 2 ** 32
    assert abs(chance.mean() - 0.5) < 0.01 and abs(chance.std() - 12 ** -0.5) < 0.01
    edges = mv.chances(torch.tensor([24702298, 0, 2 ** 24]))         # the hash of the first one is all ones
    assert (-(-edges.log()).log()).isfinite().all()
    assert mv.FrameSelector(36, n_head=4).blocks[0].attention.n_head == 2      # as many as divide it
    model = make(hard=True, **WAYS['bvllm']).eval()
    model(video, text, text)[1].backward()
    assert model.reducer.sharpness.grad.all()
    reduced = model(video, text)[2]['reduced']
    hard, picture = reduced.info['selector'], model.reducer.picture(reduced)
    assert torch.equal(picture.mask.sum(1), 16 * (hard.amax(1) > 0.5).sum(1))
    assert (picture.position[:, 0] // 16 == (hard.amax(1) > 0.5).long().argmax(1)).all()
    close(hard, F.one_hot(hard.argmax(-1), 4).float(), 1e-6)


# ---- TempMe and retrieval ------------------------------------------------------------------------

def clip_brick(w):
    """A block of CLIP (LayerNorm, biases, QuickGELU) with LoRA on qkv, as TempMe's code has it."""
    block = mv.Block(32, 2, causal=False)
    block.norm1, block.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
    block.attention.qkv, block.attention.out = mv.LoRA(nn.Linear(32, 96), 4), nn.Linear(32, 32)
    block.mlp.up, block.mlp.down = nn.Linear(32, 128), nn.Linear(128, 32)
    block.mlp.gelu.forward = lambda h: h * torch.sigmoid(1.702 * h)
    theirs = {'norm': 'ln_', 'mlp.up': 'mlp.c_fc', 'mlp.down': 'mlp.c_proj', 'attention.out': 'attn.out_proj',
              'attention.qkv.linear.': 'attn.in_proj_', 'attention.qkv.lora_': 'attn.TVPt_LoRA_'}
    for field, p in block.named_parameters():
        mine = next(filter(field.startswith, theirs))
        p.data.copy_(w[field.replace(mine, theirs[mine])])
    return block


def same_sets(x, size, g, front):
    """The first `front` rows as in g, the others alike in any order."""
    assert x.shape == g['y'].shape
    for a, b, m, n in zip(x, g['y'], size, g['size_out'][..., 0]):
        match = torch.cat([torch.arange(front), front + torch.cdist(a[front:], b[front:]).argmin(1)])
        assert torch.equal(match.sort().values, torch.arange(len(a))) and torch.equal(m, n[match])
        close(a, b[match], 2e-5)


def test_merging_blocks_equal_tempmes_code_but_twins_merge():
    """Catches merging before attention, keys without LoRA, sizes left out of attention, CLS that merge; the
    split by parity, under which the same patch of two still clips can never merge."""
    g, block = golden('tempme')['block/img'], clip_brick(golden('tempme')['block/img/w'])
    _, _, r, cls, *_ = g['meta'].tolist()
    x, size, slot = mv.image_block(block, g['x'], g['size_in'][..., 0], r, cls)
    same_sets(x, size, g, cls)
    assert (slot[:, 0] == 0).all()
    g, w = golden('tempme')['block/clip'], golden('tempme')['block/clip/w']
    M, first, last, cls, _, cls_out, *_ = g['meta'].tolist()
    place, size = w['TVPt_Video_Positional_embedding'][0, :, 0], g['size_in'][..., 0]
    x, size, _ = mv.join_clips(g['x'], size, place, M, first, cls, 'parity')
    x, size, _ = mv.image_block(clip_brick(w), x, size, last, cls_out)
    same_sets(x, size, g, cls_out)
    x = torch.randn(1, 17, 32) + 0.01 * torch.randn(2, 17, 32)                         # CLS and 16 patches
    for pairing, wanted in ((None, 12), ('parity', 0)):
        _, size, slot = mv.join_clips(x, None, torch.zeros(2, 32), 2, 12, 1, pairing)
        one, other = slot[0, 2:].view(2, 16)
        assert ((one == other) & (size[0][one] == 2)).sum() == wanted and size.sum() == 34     # they alone


def test_merge_schedule_is_the_papers_and_goes_with_any_number_of_frames():
    """Catches counts without CLS, twelve frames built in, a shallow encoder that joins all at once."""
    counts = lambda layers, T, patches, image, cross, intra: mv.TempMeEncoder(
        8, layers, 2, patches, 8, T, merge_image=image, merge_cross=cross, merge_intra=intra).counts(T)
    assert [(F, n) for F, _, n in counts(12, 12, 49, 2 / 49, 0.3, 0.1)] == [
        *((12, 50 - 2 * i) for i in range(1, 9)), (6, 44), (3, 56), (1, 107), (1, 97)]
    assert counts(12, 12, 196, 16 / 196, 0.3, 0.2)[-1][2] == 119               # a published setting
    for layers, frames in itertools.product((2, 3, 4, 12), (1, 2, 7, 12, 16, 60)):
        rows = counts(layers, frames, 16, 0.9, 0.9, 0.9)
        assert rows[-1][0] == 1 and rows == sorted(rows, key=lambda row: -row[0])
        assert all(n > frames // F for F, _, n in rows), (layers, frames)
        assert rows[0][0] == frames, 'the first layer sees each frame alone'
    factors = lambda *numbers: [[M for M, _ in step.joins] for step in mv.merge_schedule(*numbers)]
    assert factors(6, 16, 64) == [[]] * 3 + [[2, 2], [2, 2], []] and factors(2, 16, 64) == [[], [2, 2, 2, 2]]
    assert factors(12, 7, 16) == [[]] * 10 + [[7], []] and factors(1, 1, 16) == [[]]    # a prime number, one


@pytest.mark.parametrize('T,layers', [(4, 3), (6, 5), (7, 2), (12, 9)])
def test_every_patch_is_traced_to_its_token(T, layers):
    """Catches slots that lose count when clips are joined: sizes must be what the tokens stand for."""
    encoder = mv.TempMeEncoder(32, layers, 2, 16, 4, T, merge_image=0.3, merge_cross=0.4)
    video = sample(T=T)[0]
    for block in encoder.blocks:                       # tokens stay sums of what went in, to be told apart
        nn.init.zeros_(block.attention.out.weight)
        nn.init.zeros_(block.mlp.down.weight)
    clip, places = torch.arange(T), 0                             # of every frame, at each join
    for place, (M, _) in zip(encoder.clip_place, [join for step in encoder.steps for join in step.joins]):
        nn.init.normal_(place)
        places, clip = places + place[clip], clip // M
    close(encoder.summaries(video), encoder.final_norm(encoder.cls + places).expand(2, T, 32), 2e-5)
    for place in encoder.clip_place:
        nn.init.zeros_(place)
    tokens, position, where, *_ = encoder(video)
    sizes = slot_sizes(where)
    assert tokens.shape == (2, math.prod(encoder.counts(T)[-1][::2]), 32)
    assert (where.assign >= 0).all() and where.mask.all()
    patches = (encoder.embed(video) + encoder.place).reshape(2, T * 16, 32)
    close(encoder.final_norm(mv.reduce_tokens(patches, where)), tokens * (sizes > 0)[..., None], 2e-5)
    assert torch.equal(encoder(video[1:]).reduction.assign, where.assign[1:])
    assert position[sizes == 0].tolist() == [*range(0, T * 16, 16)] * 2     # summaries: where frames begin
    first = (where.assign[:, None] == torch.arange(tokens.size(1))[:, None]).long().argmax(-1)
    assert torch.equal(position[sizes > 0], first[sizes > 0])         # others at their first patch
    assert (position.diff(dim=1) >= 0).all()


def retriever(seed=0, **changes):
    return make('none', seed, model='retriever', **{'n_layer': 3, 'encoder': 'tempme', **changes})


SENTENCES = torch.tensor([[2, 3, 4, 1], [5, 6, 1, 0], [2, 3, 4, 1]])


def test_lora_starts_as_the_model_and_merges_into_it():
    """Catches LoRA that changes the model at once, freezes too little, or is slower when merged; one name
    that is read as letters, a model whose configuration is another library's, a layer that reads its weights,
    a sum in half precision."""
    other = nn.ModuleDict(dict(w=nn.Linear(4, 4), view=nn.Linear(4, 4), look=nn.MultiheadAttention(4, 2)))
    other.config = types.SimpleNamespace(name='x')
    mv.add_lora(other, 2, names='view', learns='we')
    assert type(other['w']) is nn.Linear and type(other['view']) is mv.LoRA
    assert not other['w'].bias.requires_grad
    mv.merge_lora(other)
    assert type(other['view']) is nn.Linear and other.config.name == 'x'
    twice = nn.ModuleDict(dict(q=nn.Linear(4, 4)))             # one layer by two names
    twice['k'] = twice['q']
    mv.add_lora(twice, 2, names=('q', 'k'))
    assert all(type(part) is mv.LoRA for part in twice.values())
    mv.add_lora(other, 2, names='out_proj')
    x, p = torch.randn(3, 4), other['look'].out_proj.lora_b
    other['look'](x, x, x)[0].sum().backward()
    assert p.grad.abs().sum() > 0
    nn.init.normal_(p)
    with torch.autocast('cpu', torch.bfloat16):
        merged = other['look'].out_proj.merged().weight
    close(merged, other['look'].out_proj.weight)
    plain, lora, video = retriever(), retriever(1, lora_rank=2), sample(B=3)[0]
    told = lambda model: model(video, SENTENCES)[0]
    before = told(plain)
    mv.init_from(lora, plain)
    close(told(lora), before, 1e-6)
    assert [*mv.Retriever(lora.config).state_dict()] == [*lora.state_dict()]   # its options say so
    frozen = {n: p.clone() for n, p in lora.named_parameters() if not p.requires_grad}
    learns = {n: p for n, p in lora.named_parameters() if p.requires_grad}
    assert all('lora_' in n or 'clip_place' in n for n in learns)
    assert sum(p.numel() for p in learns.values()) == 6 * 2 * (32 + 96) + (4 + 2) * 32
    for _ in range(3):
        train_tiny.learn(mv.configure_optimizer(lora), lora(video, SENTENCES)[1])
    after, weights = told(lora), dict(lora.named_parameters())
    assert (after - before).abs().max() > 1e-5 and all(torch.equal(p, weights[n]) for n, p in frozen.items())
    assert lora.blocks[0].attention.qkv.merged().weight.requires_grad
    close(told(lora), after)                                                   # to look at it changes nothing
    mv.merge_lora(lora)
    close(told(lora), after)
    assert all(p.requires_grad for p in lora.parameters())
    assert [n for n, _ in lora.named_parameters()] == [n for n, _ in plain.named_parameters()]
    mv.save_checkpoint('merged.pt', lora)                                      # as what it is now
    close(told(mv.load_checkpoint('merged.pt')[0]), after)
    wide = retriever(**mv.PRESETS['gpu'], patch_size=8, lora_rank=4)           # 1 % is promised
    assert sum(p.numel() for p in wide.parameters() if p.requires_grad) <= 0.01 * mv.num_params(wide)


def test_contrastive_loss_and_embeddings():
    """Catches a loss of one direction, equal sentences as negatives, padding that is read."""
    model, video, text = retriever(n_layer=2, encoder='plain'), sample(B=3)[0], SENTENCES
    (similarity, loss), frames = model(video, text), mv.unit(model.see(model.encoder.summaries(video)))
    close(model.encode_text(text[1:2, :3]), model.encode_text(text[1:2]), 1e-6)
    close(similarity, model.encode_text(text) @ model.encode_video(video).T)
    assert retriever(merge_cross=0.6).encoder.counts(4) != retriever().encoder.counts(4)
    with torch.autocast('cpu', torch.bfloat16):                             # what is alike is told in float32
        assert model(video, text)[0].dtype == torch.float32
    s = (10 * similarity).exp().double()
    rows, columns = ([t[i, i] / sum(t[i, j] for j in range(3) if i == j or 1 in (i, j)) for i in range(3)]
                     for t in (s, s.T))
    close(loss, -torch.stack([*rows, *columns]).log().mean().float())
    close(model.encode_video(video), mv.unit(frames.mean(1)))
    alone = torch.stack([model.encode_video(video[:, t:t + 1]) for t in range(4)], 1)
    close(alone, frames)                                                    # the plain tower: one by one


# ---- accounting, checkpoints, pictures, errors ---------------------------------------------------

@pytest.mark.parametrize('changes', [
    *WAYS.values(), dict(placement='interleaved', routing='skip'), dict(streaming=True),
    dict(mv.PRESETS['cpu'], patch_size=8), dict(encoder='tempme', encoder_layers=4, frames=8)], ids=str)
def test_flops_by_hand(changes):
    """Catches operations that torch's counter omits, a part that is counted twice or not at all."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    model = make(**changes).eval()
    c, Q = model.config, 1 if 'streaming' in changes else 3
    video, text = torch.rand(2, c.frames, 3, c.frame_size, c.frame_size), torch.randint(2, 8, (2, Q, 5))
    flops, (_, _, aux) = mv.count_flops(model, lambda: model(video, text))
    assert flops['total'] == sum(v for part, v in flops.items() if part != 'total')
    words, rows, C, places = 5 * Q, 2, c.dim, 10 * Q + 2 * c.frames * c.streaming
    if model.by_question:                                      # each question is a clip of its own
        words, rows = 5, 2 * Q
    alone = words if Q > 1 and not model.by_question and aux['position'].dim() == 1 else 0     # vision's rows
    assert flops['head'] == 2 * places * C * len(VOCAB) and min(flops.values()) >= 0 < flops['encoder']
    assert flops['blocks'] == sum(rows * (24 * S * C * C + 4 * S * S * C - 4 * (S - words) * alone * C)
                                  for S in aux['tokens'])
    learns = len([*model.routing.parameters()])
    assert c.routing != 'skip' or not learns and all(aux['tokens'][i] == words for i in model.mod_layers)
    frames = isinstance(model.routing, mv.RaggedRouting) and (aux['position'].dim() == 1 or c.streaming)
    again = lambda route: frames * (route.index.size(1) - words)               # of the chosen: the gate
    scores = sum(2 * rows * C * (route.logits.size(1) + again(route)) for route in aux['routes'].values())
    assert flops['routing'] == (scores if learns else 0)
    with sdpa_kernel(SDPBackend.MATH):                         # attention as products of matrices
        assert mv.count_flops(model, lambda: model(video, text))[0] == flops


def test_orthogonalize_against_singular_values():
    """Catches a Newton-Schulz step with swapped coefficients, a forgotten transpose, rounding that grows."""
    for shape in ((4, 32, 32), (2, 96, 32), (3, 32, 96)):
        x = torch.randn(shape)
        u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
        inner = (u.mT @ mv.orthogonalize(x).double() @ vh.mT).diagonal(dim1=-2, dim2=-1)
        assert ((inner > 0.3) | (s < 1e-1 * s.amax(-1, keepdim=True))).all() and (inner < 1.3).all()
    few = torch.randn(2, 64, 4) @ torch.randn(2, 4, 128)                       # no fifth direction appears
    for x in (few, few.bfloat16()):
        with torch.autocast('cpu', torch.bfloat16):
            made = mv.orthogonalize(x)
        assert made.dtype == x.dtype and torch.linalg.svdvals(made.float()).max() < 1.3


def test_optimizers_do_what_their_docstrings_say():
    """Catches other rates, a Muon without momentum, look-ahead, decay or shape, weights moved or missing."""
    rates = lambda model: [g['lr'] for o in mv.configure_optimizer(model, 1.0) for g in o.param_groups]
    assert rates(make()) == [1.0, 0.03] and rates(retriever(lora_rank=2)) == [0.3]
    assert rates(nn.ModuleDict(dict(blocks=nn.Linear(2, 2, bias=False)))) == [1.0]
    model = make(streaming=True)
    held = [p for o in mv.configure_optimizer(model) for group in o.param_groups for p in group['params']]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))        # each once
    assert mv.num_params(model) == sum(p.numel() for p in held)
    for shape in ((6, 3), (3, 6)):
        p, still = (nn.Parameter(torch.randn(shape)) for _ in range(2))
        average, wanted, before = torch.zeros(shape), p.detach().clone(), still.detach().clone()
        muon = mv.Muon([p, still], 0.1, momentum=0.9, weight_decay=0.5)
        for g in torch.randn(2, *shape):
            def closure():
                p.grad = g.clone()
                return 'loss'
            assert muon.step(closure) == 'loss'
            average = 0.9 * average + 0.1 * g
            step = mv.orthogonalize((0.1 * g + 0.9 * average)[None])[0]
            wanted = (1 - 0.1 * 0.5) * wanted - 0.1 * max(1, shape[0] / shape[1]) ** 0.5 * step
        close(p.detach(), wanted)
        assert torch.equal(still, before)                      # it has no gradient
    with pytest.raises(ValueError, match='Muon is for matrices, got .*3, 3'):
        mv.Muon([nn.Parameter(torch.randn(2, 4, 3, 3))])


def test_checkpoints_are_exact_and_atomic_and_cannot_run_code():
    """Catches a save that destroys the one before or leaves litter, another class, pickle, a flipped bit."""
    model, path, video = retriever(lora_rank=2), Path('m.pt'), sample(B=3)[0]
    mv.save_checkpoint(path, model, step=7)
    for bad in (lambda: 0, np.float64(1)):                         # cannot be written, could not be read
        with pytest.raises(ValueError, match='m.pt is not written'):
            mv.save_checkpoint(path, model, bad=bad)
    with pytest.raises(ValueError, match="m.pt is not written: .* 'config'"):
        mv.save_checkpoint(path, model, config='mine')
    with pytest.raises(RuntimeError):                          # of torch: the file is fine
        mv.load_checkpoint(path, 'nowhere')
    compiled = torch.compile(model, backend='eager')
    with at_most(resource.RLIMIT_FSIZE, 5000), pytest.raises(OSError):         # a disk that is nearly full
        mv.save_checkpoint(path, compiled)
    assert [p.name for p in Path().iterdir()] == ['m.pt']
    other, extra = mv.load_checkpoint(path)
    assert not other.training                                  # or gaps, noise, codes go on
    assert torch.equal(model(video, SENTENCES)[0], other(video, SENTENCES)[0]) and extra == {'step': 7}
    assert other.config == model.config and type(other) is mv.Retriever
    mv.save_checkpoint(path, copy.deepcopy(model).bfloat16())
    assert mv.load_checkpoint(path)[0].embed.weight.dtype == torch.bfloat16
    mv.save_checkpoint(path, compiled, step=7)
    whole, bits = path.read_bytes(), model.log_scale.detach().numpy().tobytes()        # written the same
    evil = type('Evil', (), dict(__reduce__=lambda self: (Path('ran').touch, ())))()       # would run code
    for content in ({'config': {}, 'model': evil}, {'config': {'heads': 3}, 'model': {}}, {'a': 1},
                    b'hello', whole[:5000], whole.replace(bits, bits[::-1])):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(ValueError, match='is not a checkpoint of this version') as error:
            mv.load_checkpoint(path)
        assert str(error.value).isprintable()
    assert not Path('ran').exists()
    other.config.vocab.append('one more')
    mv.save_checkpoint(path, other)
    with pytest.raises(ValueError, match='is not a checkpoint of .* size mismatch for embed'):
        mv.load_checkpoint(path)


@pytest.mark.parametrize('words', [0, 10])
def test_pictures_show_what_was_processed(words):
    """Catches bright patches that are not routed, another sample, words drawn."""
    video = torch.full((2, 3, 16, 16), 0.8)
    value = lambda image, t, patch: image.getpixel((t * 34 + patch % 4 * 8 + 4, patch // 4 * 8 + 4))
    index = torch.tensor([[0, 21, *range(32, 32 + words)]])
    route = mv.Route(index, torch.ones(index.shape), torch.zeros(1, 32 + words))
    picture = mv.draw_tokens(video, route, scale=2, grid=(4, 4))
    assert picture.size == (2 * 34 - 2, 32) and picture.getpixel((33, 20)) == (255, 255, 255)
    bright = [(t, p) for t in range(2) for p in range(16) if sum(value(picture, t, p)) > 450]
    assert bright == [(0, 0), (1, 5)]
    assign = torch.full((2, 32), -1)
    assign[1, [2, 18, 6]] = torch.tensor([0, 0, 1])
    picture = mv.draw_tokens(video, mv.from_clusters(assign, 2), 1, 2, (4, 4))
    assert value(picture, 0, 2) == value(picture, 1, 2) != value(picture, 0, 6) == (204, 204, 204)
    picture = mv.draw_tokens(video, mv.pack(torch.arange(32)[None] % 3 == 0), 0, 2, (4, 4))
    assert value(picture, 0, 0) == value(picture, 0, 3) == (204, 204, 204), 'dropped ones are no slot 0'
    if not words:
        with pytest.raises(ValueError, match='32 tokens are not 2 frames of 2 x 2 patches'):
            mv.draw_tokens(video, route)                       # patches of 4 pixels
    picture = mv.draw_tokens(torch.ones(1, 3, 30, 30), mv.pack(torch.ones(1, 16) > 0), 0, 1, (4, 4))
    edges = (np.asarray(picture)[1, :, 0] < 255).nonzero()[0].tolist()
    assert edges == [0, 8, 15, 23]                             # where patches begin


def test_wrong_shapes_and_configurations_are_named():
    """Catches errors that come from deep inside torch, or not at all. See BAD_FLAGS for more of them."""
    model, (video, text), x = make(), sample(), torch.randn(1, 6, 9, 4)
    calls = {
        r'video must be \(B, T, 3, 16, 16\), float in': lambda: model(video[..., :8], text),
        'float in .* got .* torch.uint8': lambda: model((255 * video).byte(), text),
        r'text must be \(B, Q, L\) with a word at least, got': lambda: model(video, text[0]),
        'with a word at least': lambda: model(video, text[:, :, :0]),
        r'with a word at least, got \(1, 2, 5\)': lambda: model(video, text[:1]),
        'with words for 2 clips': lambda: model.generate(video, text[:1], 2),
        r'got \(2, 0, 3, 16, 16\)': lambda: model(video[:, :0], text),
        'drop_ratio must be from 0 to 1': lambda: mv.holitom_inner(x[0], x[0, ..., 0], x[0, ..., 0] > 0, 1.5),
        'budget must be at least 1, or 0': lambda: make(reducer='pool', budget=-1)(video, text),
        'not made for streams': lambda: next(iter(model.stream([(video[:, 0], None)]))),
        'one line of text': lambda: streamer()(video, text),
        'another n_layer: 4, wanted 3': lambda: mv.init_from(make('all', n_layer=3), model),
        r'another reducer.*: \(4, 32\), wanted \(8': lambda: mv.init_from(
            make(reducer='vq', codes=8), make(reducer='vq', codes=4)),
        '7 tokens do not divide': lambda: mv.Router(4)(torch.randn(1, 7, 4), 2, 0.5),
        'num_dense of 0 to 2 .* num_dense 3': lambda: mv.choose_mod_layers(torch.ones(3), 3),
        'wanted one rank a layer, .* ranks .2, 3': lambda: mv.choose_mod_layers(torch.ones(2, 3), 1),
        'square grid of patches, such as 8 x 8, got 12': lambda: mv.VQToken(4)(torch.randn(1, 2, 12, 4)),
        'NaN': lambda: mv.holitom(x * float('nan'), x[..., 0]),
        'retain_ratio': lambda: mv.holitom(x, x[..., 0], -0.1),
        "got 'l1'": lambda: mv.kmeans(x[0], 2, metric='l1'),
        'select_frames must be at least 1': lambda: mv.FrameSelector(32, 2, select_frames=0),
        'no linear layer is named': lambda: mv.add_lora(model, 2, ['nowhere']),
        'window is a number of frames': lambda: streamer(window=-1),
        'wanted a mask': lambda: mv.mask_of(torch.ones(3, 3), torch.zeros(1, 2).long(), 4),
        'is none; wanted at least 1': lambda: mv.tome(x[0], 0),
        'another n_head': lambda: mv.init_from(make('all', n_head=4), model),
        'another frame_size': lambda: mv.init_from(make('all', frame_size=32, patch_size=8), model),
        'merge_lora first': lambda: mv.init_from(retriever(), retriever(lora_rank=2)),
        'the rank is below 1': lambda: mv.add_lora(model, 0),
        'say grid=': lambda: mv.draw_tokens(video[0], mv.pack(torch.ones(1, 30, dtype=torch.bool))),
        'routing must be one of': lambda: make(routing='best'),
        'sizes must be at least 1, and a billion': lambda: make(n_layer=10 ** 6, dim=2, n_head=1),
        "are the most; got .*'dim': 30000": lambda: make(dim=30000, n_head=1),
        "'codes': 10": lambda: make(reducer='vq', codes=10 ** 12),
        'a billion pixels': lambda: make(frames=10 ** 6, frame_size=64),
        'the vocabulary starts with': lambda: make(vocab=['a', 'b']),
        'retain_ratio must be above 0': lambda: make(reducer='holitom', retain_ratio=0.0),
        'wants 2 layers': lambda: make(encoder='tempme', encoder_layers=1)}
    for words, call in calls.items():
        with pytest.raises(ValueError, match=words):
            call()


def test_the_self_checks_run(capsys):
    """Catches a broken first impression, of the model or of the synthetic world."""
    mv.main()
    shapes.main()
    out = capsys.readouterr().out
    assert 'vision tokens' in out and 'MoD' in out and 'forecast' in out
    assert Image.open('out/modvideo.png').width > 100 and Image.open('out/shapes.png').height > 300


# ---- the file itself -----------------------------------------------------------------------------

PARTS = re.split(r'(?m)^# ---- (\d+)\. .* -+$', SOURCE)                      # text, number, text, number, ...
IMPORTS, SECTIONS = PARTS[0], dict(zip(map(int, PARTS[1::2]), PARTS[2::2]))
END = '# ==== the core ends here'
CORE = max(n for n, text in SECTIONS.items() if END in text)


NEEDS = {n: [i for line in re.findall(r'(?m)^# needs sections .*$', text)
             for a, b in re.findall(r'(\d+)(?: to (\d+))?', line) for i in range(int(a), int(b or a) + 1)]
         for n, text in SECTIONS.items()}                                      # '1, 3 to 5' -> [1, 3, 4, 5]
CODE = {n: compile(text, f'section {n}', 'exec') for n, text in {0: IMPORTS, **SECTIONS}.items()}


def build(sections):
    """What these sections alone define."""
    space = {'__name__': 'part'}
    for n in [0, *sorted(sections)]:
        exec(CODE[n], space)
    return space


def try_core(v):
    """Build a small model of the core, learn three steps and answer -> its aux."""
    model, (video, text) = make(v=v), sample()
    before, losses = [p.clone() for p in model.parameters()], []
    optimizers = v.get('configure_optimizer', lambda m: [torch.optim.AdamW(m.parameters(), 3e-3)])(model)
    for _ in range(3):
        _, loss, aux = model(video, text, text)
        train_tiny.learn(optimizers, loss)
        losses.append(loss.item())
    assert losses[2] < losses[0] and not any(map(torch.equal, model.parameters(), before))
    assert model.generate(video, text, 2).shape == (2, 2, 2)
    assert 'count_flops' not in v or v['count_flops'](model, lambda: model(video, text))[0]['total'] > 0
    assert 'draw_tokens' not in v or v['draw_tokens'](video[0], aux['routes'][0], grid=(4, 4)).width > 64
    if 'save_checkpoint' in v:
        v['save_checkpoint']('m.pt', model)
        assert torch.equal(v['load_checkpoint']('m.pt')[0](video, text)[0], model(video, text)[0])
    return aux


def try_section(number, v):
    """Use what a section defines; parts of a model and what they cost on tokens alone, without the model."""
    x, flat, place = torch.randn(2, 4, 16, 32), torch.randn(2, 10, 32), torch.arange(10)
    block = v['Block'](32, 2) if number > 1 else None
    parts = [(part, name, cls) for part, kinds in v.get('PARTS', {}).items() for name, cls in kinds.items()
             if cls and f'class {cls.__name__}(' in SECTIONS[number]]
    for part, name, cls in parts:
        if part == 'encoder':
            assert cls(32, 3, 2, 16, 4, 4)(sample()[0], want_saliency=True).tokens.size(2) == 32
        elif part == 'reducer':
            reducer = cls(32, **OPTIONS.get(name, {}))
            made = reducer(x, torch.rand(2, 4, 16), flat, torch.ones(2, 10).bool())
            assert made.tokens.size(2) == 32
            assert reducer.picture(made) is not None or made.position is not None
        elif part == 'stage':
            stage = cls(4, stage_layer=1)
            assert stage.run(block, flat, flat, place.expand(2, -1), 8, torch.tensor([9, 9]))[2] == 4
        elif part == 'routing':
            route = cls(32, [0], 0.5, 4)(0, block, flat, place, 8)
            assert cls.layer(block)(flat, route, place).isfinite().all()
        elif name == 'retriever':
            assert retriever(v=v, lora_rank=2)(sample()[0], sample()[1][:, 0])[1].isfinite()
    if number == 1:
        assert v['options_of'](None) == {} and v['PRESETS']
    elif number == 2:
        block(flat, place, cache=v['KVCache']())
    elif number in (5, 6, 14):
        try_core(v)
    else:
        assert parts, 'nothing is tried'


@pytest.mark.parametrize('number', SECTIONS)
def test_a_section_needs_what_it_says_and_is_needed_by_no_other(number):
    """Catches a section that cannot be lifted with those its header names, or one named in vain; methods that
    hold on to each other: one goes with those that need it, the rest trains."""
    assert ('# stands alone' in SECTIONS[number]) == (not NEEDS[number])
    try_section(number, build([*NEEDS[number], number]))
    for unnecessary in NEEDS[number]:
        with pytest.raises(Exception):
            try_section(number, build({*NEEDS[number], number} - {unnecessary}))
    if number > CORE:
        gone = {n for n in SECTIONS if n == number or number in NEEDS[n]}
        v = build(set(SECTIONS) - gone)
        assert try_core(v)['tokens'] == [16 + 10] * 3 + [74] and ('Muon' in v) == (14 not in gone)
        for part, kinds in v['PARTS'].items():                                 # all that is left can be built
            for name in kinds:
                assert make('1', v=v, **{part: name}, **NEEDED.get(part, {}).get(name, {}))


def test_pieces_are_lifted_as_the_readme_says():
    """Catches a table of what to carry that leaves something out."""
    def take(number, *names, until=None, kind=()):
        """Define statements of a section: those before one, of these names, of a kind."""
        body = ast.parse(SECTIONS[number]).body
        named = [getattr(node, 'name', '') for node in body]
        before = named.index(until) if until else 0
        chosen = [node for i, node in enumerate(body)
                  if i < before or named[i] in names or isinstance(node, kind)]
        exec(compile(ast.Module(chosen, []), f'section {number}', 'exec'), v)
    v, x, frame = build([]), torch.randn(2, 16, 8), torch.arange(16) // 4
    take(4, until='mod_layers')
    block, changed = lambda x, *_: 0 * x + 1, lambda y: (y != x).any(-1).sum()
    assert changed(v['MoDBlock'](block)(x, v['Router'](8)(x, 4, 0.25), frame)) == 2 * 4
    take(7, 'pack', 'RaggedRouter', 'RaggedBlock', until='pack')
    assert changed(v['RaggedBlock'](block)(x, v['RaggedRouter'](8)(x, frame, 0.25), frame)) == 2 * 4
    v = build([])
    take(4, 'tokens_at')
    take(7, 'pack', until='pack')
    merged = v['from_clusters'](frame.expand(2, -1), 4)
    means = x.unflatten(1, (4, 4)).mean(2).repeat_interleave(4, 1)
    close(v['expand'](v['reduce_tokens'](x, merged), merged), means)
    for number in (8, 9, 10):
        take(number, 'VectorQuantizer', kind=ast.FunctionDef)
    both = torch.ones(2, 16, dtype=torch.bool)
    for made in (v['tome'](x, 5), v['holitom'](x.view(2, 4, 4, 8), torch.rand(2, 4, 4), 0.5),
                 v['holitom_inner'](x, torch.rand(2, 16), both)):
        assert v['reduce_tokens'](x, made).isfinite().all()
    assert v['kmeans'](x, 3)[0].shape == (2, 3, 8) and v['select_k'](x, 2, 4)[0].shape == (2,)
    assert v['VectorQuantizer'](4, 8).train()(x)[0].shape == x.shape


def test_the_core_runs_alone():
    """Catches a core that needs what comes after it, by name or by string, or that outgrew a beginner."""
    core, v = SOURCE.split(END)[0], build(range(1, CORE + 1))
    assert len(core.splitlines()) <= 800
    nodes, later = [*ast.walk(ast.parse(core))], vars(mv).keys() - v.keys()
    parts = {name for part, kinds in mv.PARTS.items() for name in kinds if name not in v['PARTS'][part]}
    assert not later & {node.id for node in nodes if isinstance(node, ast.Name)}
    strings = {node.value for node in nodes if isinstance(node, ast.Constant)}
    assert strings & (parts | later) <= {'routing_loss'} and len(parts) > 12 and len(later) > 60
    frames = [(frame, None) for frame in sample()[0].unbind(1)]
    moments = list(make(v=v, streaming=True, window=2).eval().stream(frames))
    assert len(moments) == 4 and moments[3]['held'] == moments[2]['held']


# ---- the synthetic world -------------------------------------------------------------------------

def test_world_is_seeded_and_balanced_and_splits_share_nothing():
    """Catches unseeded draws, batches that repeat, backgrounds that were trained on, noise that tells what
    happens, a world in which the most frequent answer is right far above chance."""
    world, generator = shapes.ShapeWorld(size=16), torch.Generator().manual_seed(0)
    a, b = world.batch('train', 3, 4), world.batch('train', 3, 4)
    assert all(torch.equal(x, y) for x, y in zip(a[:4], b))
    quiet = dataclasses.replace(world, noise=0.0).batch('train', 3, 4)
    assert 0.015 < (a.video - quiet.video).std() < 0.021
    assert not torch.equal(a.video, world.batch('train', 4, 4).video)
    axis, grounds = torch.arange(4) / 4, []
    for split in shapes.SPLITS:
        numbers = world.sample(split, 500, torch.Generator().manual_seed(0)).texture
        painted = shapes.paint_background(numbers.flatten(), axis, 0.05).flatten(1)
        grounds.append(set(map(tuple, painted.tolist())))
    assert not any(a & b for a, b in itertools.combinations(grounds, 2)) and len(grounds[2]) > 900
    scene, tell = world.sample('train', 4, shapes.seeded(0)), lambda video: (video - video.mean(1, True))[0]
    seed = shapes.seeded(0).initial_seed()
    noise = shapes.ShapeWorld(size=16, noise=1.0).draw(scene, seed=seed)
    drawn = torch.randn(noise.shape, generator=torch.Generator().manual_seed(seed))
    assert abs(torch.corrcoef(torch.stack([tell(noise).flatten(), tell(drawn).flatten()]))[0, 1]) < 0.1
    _, targets, kind = world.ask(world.sample('train', 4000, generator), generator)
    for name, answers in dict(colour=6, shape=4, direction=4, count=3, order=4, moment=6, forecast=6).items():
        words = targets[kind == shapes.KINDS.index(name)].amax(-1)
        share = words.bincount().max() / len(words)
        assert len(words) > 1500 and share < 1 / answers + 0.05, (name, float(share))


def expected_answer(scene, b, kind, name, T):
    """The answer in plain Python, from the first T frames of the scene alone; name: the word asked about."""
    shape, flash = [shapes.SHAPES[s] for s in scene.shape[b]], shapes.COLOURS[scene.flash[b]]
    seen = {o: range(int(scene.start[b, o]), min(T, int(scene.stop[b, o])))    # the frames that show it
            for o in range(3) if scene.present[b, o] and scene.start[b, o] < T}
    colour = {o: [shapes.COLOURS[c] for c in scene.colour[b, o, :T]] for o in seen}
    happened = {shapes.EVENTS[e]: (int(t), int(o))
                for e, t, o in zip(scene.event[b], scene.time[b], scene.subject[b]) if t < T}
    if kind in ('count', 'order', 'moment'):
        assert kind != 'moment' or 'flash' in happened
        return dict(count=shapes.COUNTS[len(seen) - 1], order=next(iter(happened), None), moment=flash)[kind]
    if kind == 'summary':
        clauses = {'flash': f'{flash} flash', 'cut': 'cut'}
        for event, (time, o) in happened.items():
            if event not in clauses:
                t = seen[o][0 if event == 'appears' else -1]
                assert time == t + (event == 'vanishes')
                clauses[event] = f'{colour[o][t]} {shape[o]} {event}'
        return ' then '.join(clauses[event] for event in happened)
    (o,) = [o for o in seen if name == shape[o] or name in [colour[o][t] for t in seen[o]]]    # the one named
    assert kind != 'colour' or len({*colour[o]}) == 1
    assert kind != 'direction' or len(seen[o]) > 1
    assert kind != 'forecast' or seen[o][-1] == T - 1
    next_colour = shapes.COLOURS[(shapes.COLOURS.index(colour[o][-1]) + 1) % 6]
    way = [*shapes.DIRECTIONS, None][scene.direction[b, o]]
    return dict(shape=shape[o], colour=colour[o][0], direction=way, forecast=next_colour)[kind]


in_words = lambda ids: [None if i == -1 else shapes.VOCAB[i] for i in ids.tolist()]


def read_turn(words, scene, b, T):
    """A turn after T frames, '<eos>' in the end -> its kind (None: told unasked), its answer, which must be
    right, and for each of its words but the last the target that follows."""
    turn, kind, question = ' '.join(words[:-1]), None, ''
    for name, asked in shapes.QUESTIONS.items():
        match = re.fullmatch(f"({asked.replace('_', '[a-z]+')}) .+", turn)
        kind, question = (name, match[1]) if match else (kind, question)
    n, answer = len(question.split()), turn.removeprefix(question).strip()
    assert kind is None or answer == expected_answer(scene, b, kind, question.split()[-1], T), turn
    return kind, answer, [None] * (n - 1) + words[max(1, n):]


@pytest.mark.parametrize('frames', [4, 8, 16])
def test_every_answer_follows_from_the_scene(frames):
    """Catches wrong or ambiguous answers, those that need later frames, narration a frame late, targets that
    are off by one."""
    world, kinds = shapes.ShapeWorld(frames=frames, size=8), set()
    generator = torch.Generator().manual_seed(5)
    scene = world.sample('train', 100, generator)
    text, targets, kind = world.ask(scene, generator)
    for b, q in itertools.product(range(100), range(8)):
        words = [*in_words(text[b, q][text[b, q] > shapes.EOS]), '<eos>']
        told, _, wanted = read_turn(words, scene, b, frames)
        assert told == shapes.KINDS[kind[b, q]]
        assert in_words(targets[b, q]) == wanted + [None] * (targets.size(2) - len(wanted))
    assert set(kind.flatten().tolist()) == set(range(len(shapes.KINDS)))
    batch, scene = world.stream('train', 3, 100), world.sample('train', 100, shapes.seeded(0, 'train', 3))
    for b in range(100):
        real = batch.text[b, 0] != shapes.PAD
        text, after, wanted, told = in_words(batch.text[b, 0][real]), [-1], [None], {}
        while len(wanted) < len(text):
            begin = len(wanted)
            words, t = text[begin:text.index('<eos>', begin) + 1], int(batch.after[b, begin])
            kind, answer, follow = read_turn(words, scene, b, t + 1)
            if kind is None:
                told[t] = answer
            wanted, after = wanted + [*follow, None], after + [t] * len(words)
            kinds.add(kind)
        assert text[0] == shapes.PROMPT and batch.after[b][real].tolist() == after
        assert in_words(batch.targets[b, 0]) == wanted + [None] * int((~real).sum())
        assert ' then '.join(told.values()) == expected_answer(scene, b, 'summary', None, frames)
        assert [*told] == scene.time[b].tolist()
        first = [told.get(t, '<eos>').split()[0] for t in range(frames)]
        assert in_words(batch.decisions[b]) == first
    assert kinds == {None, *shapes.KINDS}


def test_pixels_show_the_scene():
    """Catches a wrong place, colour or frame, a flash that lasts, a cut mistimed, a part drawn otherwise."""
    world = shapes.ShapeWorld(frames=8, size=64, noise=0.0)
    scene = world.sample('test', 40, torch.Generator().manual_seed(2))
    video = world.draw(scene)
    assert video.shape == (40, 8, 3, 64, 64) and video.min() >= 0 and video.max() <= 1
    outlines = set()
    for b, t in itertools.product(range(40), range(8)):
        when = {shapes.EVENTS[e]: int(at) for e, at in zip(scene.event[b], scene.time[b])}
        cells = scene.cell[b, int(t >= when.get('cut', 99))]
        point = 0.25 + 0.5 * torch.stack([cells % 2, cells // 2], 1) + scene.jitter[b]         # (4, 2)
        point[:3] += shapes.STEPS[scene.direction[b]] * world.travel * (t / 7 - 0.5)           # centres, and
        point[3, 0] -= world.radius                                     # of the ring the left edge
        colour = [*scene.colour[b, :, t], scene.flash[b]]
        there = [*(scene.start[b] <= t) & (t < scene.stop[b]), t == when.get('flash')]
        is_shown = lambda o, x, y: (video[b, t, :, y, x] - shapes.PALETTE[colour[o]]).abs().max() < 0.01
        for o, (x, y) in enumerate((64 * point).int()):
            shown = is_shown(o, x, y)
            edge = (64 * (point[o] + world.radius * torch.tensor([[.7, .7], [.7, -.7], [1, 0]]))).int()
            if shown and o < 3 and edge.min() >= 0 and edge.max() < 64 and min(
                    (point[o] - p).norm() for i, p in enumerate(point) if i != o) > 2.5 * world.radius:
                outlines.add((int(scene.shape[b, o]), *(bool(is_shown(o, *place)) for place in edge)))
            apart = min((point[o] - point[p]).norm() for p in range(3) if p != o)
            assert shown == there[o] or apart <= 1.2 * world.radius, (b, t, o)     # something covers it
        change = (video[b, t] - video[b, t - 1]).abs()                  # the background, at a cut alone
        assert t == 0 or change[:, :2, :2].max() < 0.01 or t == when['cut'] and change.max() > 0.1
    assert outlines == {(0, 0, 0, 0), (1, 1, 1, 0), (2, 1, 0, 0), (3, 0, 0, 1)}        # each has its own
    at = torch.arange(40)[:, None] % 8
    close(world.draw(scene, at=at)[:, 0], video[torch.arange(40), at[:, 0]])


def test_sentences_say_what_the_clips_show():
    """Catches twins that differ elsewhere, sentences that leak direction into single frames."""
    say = lambda row: ' '.join(shapes.CAPTION_VOCAB[i] for i in row.tolist() if i > 1)
    world, seed = shapes.ShapeWorld(size=8), shapes.seeded(0, 'train', 3, 'captions')
    batch, scene = world.captions('train', 3, 400), world.sample('train', 1664, seed)
    scene = shapes.Scene(*(a[scene.present.sum(1) == 1][:200] for a in scene))
    assert batch.video.shape == (400, 8, 3, 8, 8) and 0.3 < batch.turned.float().mean() < 0.7
    twin = shapes.twin_of(scene, batch.turned[:200], 8)
    both = shapes.Scene(*map(torch.cat, zip(scene, twin)))
    texts = [say(row) for row in batch.text]
    for b, text in enumerate(texts):
        changed = {(p, q) for p, q in zip(text.split(), texts[(b + 200) % 400].split()) if p != q}
        first, second = (shapes.EVENTS[e] for e in both.event[b])
        assert re.fullmatch(f'a (?!.* and a ).*then {first} then {second}', text)
        (o,) = both.present[b].nonzero()[:, 0].tolist()
        assert both.start[b, o] < both.stop[b, o]
        way = [*shapes.DIRECTIONS, None][both.direction[b, o]]
        assert way is None or f'{shapes.SHAPES[both.shape[b, o]]} moves {way}' in text
        opposite = {('left', 'right'), ('right', 'left'), ('up', 'down'), ('down', 'up')}
        if batch.turned[b]:
            assert len(changed) == 1 and changed < opposite
        else:                                                          # and colours, seen at another time
            assert {(first, second), (second, first)} <= changed and not changed & opposite
    frames = world.captioned_frames('train', 0, 300)
    assert frames.video.shape == (300, 1, 3, 8, 8) and frames.turned is None
    texts = [say(row) for row in frames.text]
    assert not any(word in text for text in texts for word in ('moves', 'stays', 'then', 'cut', 'appears'))
    assert any('flash' in text for text in texts) and any(' and a ' in text for text in texts)
    assert all(not text or text.startswith('a ') for text in texts)
    seed = shapes.seeded(0, 'train', 0, 'frames')
    scene, at = world.sample('train', 300, seed), torch.randint(8, (300,), generator=seed).tolist()
    for b, (text, t) in enumerate(zip(texts, at)):
        happened = dict(zip(scene.event[b].tolist(), scene.time[b].tolist()))
        cells = scene.cell[b, int(t >= happened.get(shapes.CUT, 99))]
        for shape, *told in re.findall(r'(\w+)(?: (far|near))? (up|down)(?: (far|near))? (left|right)', text):
            o = scene.shape[b].tolist().index(shapes.SHAPES.index(shape))
            moved, side = (2 * t / 7 - 1) * shapes.STEPS[scene.direction[b, o]], divmod(int(cells[o]), 2)
            for (off, way), ways, here, move in zip((told[:2], told[2:]), ('up down', 'left right'), side,
                                                    moved.flip(0)):
                out = move if here else -move                  # from the middle of the frame
                assert way == ways.split()[here]
                assert off == ('far' if out > 1 / 3 else 'near' if out < -1 / 3 else '')


# ---- clip folders --------------------------------------------------------------------------------

def noise_frames(n=16, size=8, seed=0):
    return np.random.RandomState(seed).randint(0, 255, (n, size, size, 3), dtype=np.uint8)


def write_sheet(path, frames):
    sheet = frames.reshape(4, 4, *frames.shape[1:]).transpose(0, 2, 1, 3, 4)
    Image.fromarray(sheet.reshape(4 * frames.shape[1], -1, 3)).save(path)


def write_folder(folder, rows):
    """A folder of clips, a sheet of noise for each row of clips.jsonl."""
    folder.mkdir(exist_ok=True)
    for i, row in enumerate(rows):
        write_sheet(folder / row['file'], noise_frames(seed=i))
    (folder / 'clips.jsonl').write_text('\n'.join(map(json.dumps, rows)))
LEFT_OR_RIGHT = [dict(file=f'{i}.png', qa=[['Which way ?', ['left', 'right'][i % 2]]]) for i in range(20)]


def test_every_format_of_a_clip_gives_the_same_frames():
    """Catches frames out of order, a sheet read by columns, one picture of many, a clip without credit; equal
    neighbours stored as one, after which every later frame is seen too early."""
    frames = noise_frames()
    first, *others = images = [Image.fromarray(f) for f in frames]
    write_sheet('sheet.png', frames)
    first.save('clip.webp', save_all=True, append_images=others, lossless=True, duration=50)
    Path('folder').mkdir()
    for i, image in enumerate(images):
        image.save(f'folder/{i:03}.png')
    for name in ('sheet.png', 'clip.webp', 'folder'):
        assert np.array_equal(clips.read_clip(name).permute(0, 2, 3, 1), frames), name
    small = clips.read_clip('sheet.png', (2, 4), 5, 4)
    assert small.shape == (5, 3, 4, 4) and small.dtype == torch.uint8
    middle = clips.fit(Image.fromarray(frames[0][:4]), 4)
    assert np.array_equal(middle.permute(1, 2, 0), frames[0][:4, 2:6])
    for T, kept in ((1, 1), (7, 7), (8, 8), (600, 600), (1373, 1372)):         # 1373 is a prime
        video = torch.from_numpy(noise_frames(1, 12)).permute(0, 3, 1, 2).repeat(T, 1, 1, 1)
        video[T // 2:] = 255 - video[T // 2:]
        clips.save_clip(video / 255, 'saved.webp')
        assert torch.equal(clips.read_clip('saved.webp'), video[:kept])
    credits = (ROOT / 'data/natural/CREDITS.md').read_text()
    for row in clips.read_rows(ROOT / 'data/natural'):
        assert clips.read_clip(ROOT / 'data/natural' / row['file']).shape == (16, 3, 64, 64)
        assert row['file'] in credits


def shown(image, kind, **how):
    """What is read of an image that is saved in this format: (n, height, width, 3)."""
    image.save('picture', kind, save_all='append_images' in how, **how)
    return clips.read_clip('picture', (1, 1)).permute(0, 2, 3, 1).numpy()


row_of = lambda *pixels, dtype=np.uint8: Image.fromarray(np.array([pixels], dtype))
grey = lambda *values: [[[value] * 3 for value in values]]
GREY16 = row_of(0, 32768, 65535, dtype=np.uint16)
BLACK, RED, BLUE, GREEN, CLEAR = [0] * 3, [255, 0, 0], [0, 0, 255], [0, 255, 0, 255], [9, 9, 9, 0]
FIRST, SECOND = row_of([*RED, 255], CLEAR, CLEAR), row_of(CLEAR, [*BLUE, 255], CLEAR)
ALONE, BOTH = ([[RED, BLACK, BLACK], [left, BLUE, BLACK]] for left in (BLACK, RED))
FILM, DEPTH = dict(append_images=[FIRST, SECOND], default_image=True, blend=1), Image.new('L', (6, 2))
PICTURES = {                   # a picture, its format, how it is saved, the row that is shown of each frame
    'grey of 16 bits': (GREY16, 'png', {}, grey(0, 128, 255)),
    'one of them clear': (GREY16, 'png', dict(transparency=65535), grey(0, 128, 0)),
    'grey and alpha': (row_of([200, 255], [200, 128], [200, 0]), 'png', {}, grey(200, 100, 0)),
    'palette': (row_of(0, 9, 90).convert('P'), 'png', dict(transparency=90), grey(0, 9, 0)),
    'palette, alphas': (row_of(0, 1, 2).convert('P'), 'png', dict(transparency=b'\xff\0\xff'), grey(0, 0, 2)),
    'one bit': (row_of(0, 255).convert('1'), 'png', {}, grey(0, 255)),
    'hidden colours': (row_of([240, 30, 10, 0], [240, 30, 10, 0]), 'png', {}, grey(0, 0)),
    'frames disposed of': (FIRST, 'gif', dict(disposal=2, append_images=[SECOND]), ALONE),
    'a poster': (row_of(GREEN, GREEN, GREEN), 'png', FILM, BOTH),
    'a poster, frames disposed of': (row_of(GREEN, GREEN, GREEN), 'png', dict(FILM, disposal=1), ALONE),
    'a photo and its depth': (row_of(BLACK, BLACK, BLACK), 'mpo', dict(append_images=[DEPTH]), grey(0, 0, 0))}


@pytest.mark.parametrize('name', PICTURES)
def test_a_picture_is_read_as_it_is_shown(name):
    """Catches 16 bits that are clipped, colours below what is transparent, palettes taken for grey, a poster
    that plays or shines through, frames that stay though they were disposed of."""
    image, kind, how, rows = PICTURES[name]
    assert shown(image, kind, **how).tolist() == [[row] for row in rows]


@pytest.mark.parametrize('turn', range(1, 9))
def test_orientation_tags_are_obeyed(turn):
    """Catches pictures of phones that lie on their side, in a file, a folder, an animation."""
    exif, frames = Image.Exif(), noise_frames(2, 4)[:, :3]
    exif[0x112] = turn
    wanted = frames.transpose(0, 2, 1, 3) if turn > 4 else frames
    wanted = wanted[:, :, ::-1] if turn in (2, 3, 6, 7) else wanted
    wanted = wanted[:, ::-1] if turn in (3, 4, 7, 8) else wanted
    first, second = map(Image.fromarray, frames)
    for kind, film in itertools.product(('png', 'webp'), ({}, dict(append_images=[second]))):
        made = shown(first, kind, exif=exif, lossless=True, **film)
        assert np.array_equal(made, wanted[:1 + len(film)]), (kind, film)


def test_frames_of_a_folder_play_in_the_order_of_their_names(tmp_path):
    """Catches 10 before 2, capitals first, litter that counts as a frame, a pipe that is waited for."""
    names = 'b.png b01.png b1.png B2.PNG b2a.png b2b9.png b2b10.png b010.png c.jpeg'.split()
    for i, name in reversed([*enumerate(names)]):
        Image.new('RGB', (8, 8), (20 * i,) * 3).save(tmp_path / name)
    for litter in ('._b1.png', '.hidden.png', 'Thumbs.db', 'notes.txt'):
        (tmp_path / litter).write_bytes(b'litter')
    os.mkfifo(tmp_path / 'b3.png')
    assert clips.read_clip(tmp_path)[:, 0, 0, 0].tolist() == [20 * i for i in range(len(names))]
    for path in (tmp_path / 'b3.png', '/dev/zero'):
        with pytest.raises(ValueError, match='neither a file nor a folder'):
            clips.read_clip(path)


def test_no_more_of_a_clip_is_held_than_is_needed(tmp_path, monkeypatch):
    """Catches a few kilobytes that become gigabytes, long clips refused though few frames are used."""
    monkeypatch.setattr(clips, 'LIMIT', 1000)
    film = [Image.new('L', (30, 30), i) for i in range(9)]
    for count, wide, fine in ((8, 30, True), (9, 30, False), (1, 40, False)):
        first, *rest = (image.resize((wide, 30)) for image in film[:count])
        first.save(tmp_path / 'x.gif', save_all=True, append_images=rest)
        with nullcontext() if fine else pytest.raises(ValueError, match='make it smaller'):
            assert clips.read_clip(tmp_path / 'x.gif', frames=3, size=5)[:, 0, 2, 2].tolist() == [0, 2, 5]


def test_texts_are_read_as_they_stand():
    """Catches vowel signs and joiners that are dropped, one word in two spellings of its accents; answers and
    questions that become the same words without a sentence about it; lines that are cut inside a text."""
    for text in ('caf\xe9', '\u0928\u0938\u094d\u0924', '\u0645\u06cc\u200c\u062e', "don't", 'x_1', '\uff11'):
        assert clips.words(f'<{text}>!') == [text]
    assert clips.words('cafe\u0301 - \u200d CAF\u00c9') == ['caf\u00e9'] * 2
    alike = [('a b', 'a, b.'), ('Left', 'left!'), ('\uff11', '1'), ('e\u0301', '\xe9')]
    for pair in [('-1', '1'), ('C', 'C++'), ('<5', '>5'), ('0.5', '0 5'), ('50%', '50'), ('a/b', 'a b'),
                 ('$1', '1'), *alike]:
        clips.check_row(dict(file='x', qa=[[*pair]]), 'line 1')                   # each of them alone is fine
        with nullcontext() if pair in alike else pytest.raises(ValueError, match='the same words'):
            clips.check_texts(Path('clips'), pair)
    text = 'a\u2028b\x85c\u2029'
    lines = ['{"file":\r"y", "caption": "d"}\r', '', f'{{"file": "x", "caption": "{text}"}}']
    Path('clips.jsonl').write_bytes('\n'.join(lines).encode('utf-8-sig'))
    y, x = clips.read_rows(Path())
    assert y['file'] == 'y' and x['qa'] == [['describe', text]]


def test_clip_folder_batches(tmp_path, capsys):
    """Catches validation clips of the test split, augmented test clips, another clip's answers; frames that
    are augmented apart, so that a still clip moves; clips that are changed alike."""
    write_folder(tmp_path, [dict(row, label=f'{i % 8 == 0}') for i, row in enumerate(LEFT_OR_RIGHT)])
    data = clips.ClipFolder(tmp_path, frames=4, size=16)
    close(data.weight[:17], torch.tensor([1 / 14 if i % 8 else 1 / 3 for i in range(17)]))
    assert '20 clips, resampled to 4 frames of 16x16' in capsys.readouterr().out
    train, val, test = (set(data.members(s).tolist()) for s in ('train', 'val', 'test'))
    assert test == {18, 19} and val == {17} and not train & {17, 18, 19} and data.kinds == ['which way']
    batch = data.batch('test', 0, 8)
    assert len(batch.video) == 2 and torch.equal(batch.video, data.video[18:].float() / 255)
    assert torch.equal(data.halved().batch('test', 0, 8).video, batch.video[:, ::2])
    assert len(data.batch('test', 1, 8).text) == 0
    for i, target in zip((18, 19), batch.targets):
        assert [data.vocab[w] for w in target[0] if w >= 0] == [['left', 'right'][i % 2], '<eos>']
    a, b = data.batch('train', 5, 8), data.batch('train', 5, 8)
    assert torch.equal(a.video, b.video) and a.video.min() >= 0 and a.video.max() <= 1
    still = data.video[:1, :1].repeat(3, 4, 1, 1, 1)
    made, again = (clips.augmented(still, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(made, again) and made.shape == still.shape and 0 <= made.min() < made.max() <= 1
    close(made, made[:, :1].expand_as(made), 1e-6)
    still[..., :8], still[..., 8:] = 200, 50                   # bright on the left, and so it stays
    bright = clips.augmented(still, torch.Generator())
    assert (bright[..., :4].mean((1, 2, 3, 4)) > bright[..., 12:].mean((1, 2, 3, 4))).all()
    assert (made[0] - made[1]).abs().max() > 0.1 and (made - data.video[:1, :1] / 255).abs().mean() > 0.02


def test_all_questions_about_a_clip_are_measured_once():
    """Catches a ninth question that nobody asks, one that counts twice where another clip has more; training
    that draws some of them twice and others half as often."""
    rows = [dict(row, split='test', qa=[[f'what is {i}', f'{i}'] for i in range(n)])
            for row, n in zip(LEFT_OR_RIGHT, (2, 12, 9))]
    write_folder(Path('clips'), [*rows, *LEFT_OR_RIGHT[3:7]])
    data = clips.ClipFolder('clips', frames=4, size=16)
    batch = data.batch('test', 0, 2)
    asked = [[data.vocab[i] for i in ids[targets > 1]] for ids, targets in zip(batch.text, batch.targets)]
    assert asked == [[*map(str, [0, 1] * 6)], [*map(str, range(12))]] and data.questions == 8
    assert data.kinds == ['question']                          # more than twelve are one kind
    assert (batch.kind >= 0).sum(1).tolist() == [2, 12] and data.batch('test', 0, 1).text.size(1) == 2
    data.split[2] = shapes.SPLITS.index('train')
    data.weight = (torch.arange(len(data.split)) == 2).float()         # training draws this clip alone
    drawn = data.batch('train', 0, 400).targets.amax(-1)       # (400, 8) a word tells the question
    assert all(len(row.unique()) == 8 for row in drawn)
    assert drawn.flatten().unique(return_counts=True)[1].float().sub(400 * 8 / 9).abs().max() < 60
    data.split[0], data.weight = data.split[2], (torch.arange(len(data.split)) == 0).float()
    assert ((data.batch('train', 0, 4).kind >= 0).sum(1) == 2).all()           # the others are asked again


def test_donkeycar_import(capsys):
    """Catches mirrored clips with the original's label, clips across a gap, unsorted catalogs."""
    run, lines = lambda words: donkeycar.main(words.split()), []
    Path('tub/images').mkdir(parents=True)
    for i, angle in enumerate([0.0] * 16 + [-0.5] * 16 + [0.6] * 8 + [-0.6] * 8 + [0.0] * 8):
        image = Image.new('RGB', (16, 12), (i, 0, 0))
        image.paste((i, 0, 255), (0, 0, 8, 12))                                # blue on the left
        image.save(f'tub/images/{i}.jpg')
        when = 100 * i + 60000 * min(i // 16, 2)                               # two pauses
        for later in (0, 50):                                                  # twice as fast as it is read
            lines.append(json.dumps({'_timestamp_ms': when + later, 'cam/image_array': f'{i}.jpg',
                                     'user/angle': angle, '_index': len(lines)}))
    lines.append(json.dumps({**json.loads(lines[0]), '_timestamp_ms': 123490, '_index': 999}))
    Path('tub/manifest.json').write_text('{"deleted_indexes": [999]}')
    for name, part in enumerate((lines[30:], lines[:30])):
        Path(f'tub/catalog_{name}.catalog').write_text('\n'.join(part))
    assert run('tub out --test-from 0.53') == 0
    rows = clips.read_rows(Path('out'))
    assert [(r['label'], r['split']) for r in rows] == [
        ('straight', 'train'), ('straight', 'train'), ('left', 'train'), ('right', 'train'),
        ('right-then-left', 'val'), ('left-then-right', 'val'), ('left', 'test'), ('right', 'test')]
    first, mirrored = (clips.read_clip(Path('out', row['file'])) for row in rows[4:6])
    assert min(first[:, 2, :, :32].float().mean(), mirrored[:, 2, :, 32:].float().mean()) > 200
    assert first.shape == (16, 3, 64, 64) and first[:, 0].float().mean((1, 2)).diff().gt(-2).all()
    assert run('tub late --test-from 0.7') == 0                    # no test clip shares frames with another
    assert {row['split'] for row in clips.read_rows(Path('late'))} == {'train'}
    for flags in ('--test-from 80', '--test-from nan', '--threshold -1'):
        assert run(f'tub odd {flags}') == 2 and not Path('odd').exists()
    assert run('tub out') == 2                                     # never over an existing folder
    assert run('. new') == 2 and not Path('new').exists()
    Path('new.part').mkdir()                                       # somebody else's
    Path('tub/images/3.jpg').write_text('no picture')
    assert run('tub new') == 2
    assert {p.name for p in Path().iterdir()} == {'tub', 'out', 'late', 'new.part'}    # none half-written
    for odd in ({}, {'_timestamp_ms': None}, {'_timestamp_ms': 'noon'}, {'user/angle': 10 ** 400}):
        Path('tub/catalog_1.catalog').write_text(json.dumps(odd and {**json.loads(lines[0]), **odd}))
        assert run('tub new') == 2 and 'line 1' in capsys.readouterr().err, odd


# ---- the training script -------------------------------------------------------------------------

TINY = '--preset tiny --batch 4 --device cpu'.split()
COCKATOO, ROCKET = (ROOT / f'data/natural/{name}.webp' for name in ('cockatoo', 'rocket_cut'))
FEW = dict(EVAL_CLIPS=8, CURVE_CLIPS=4, COST_CLIPS=2, SHARES=(), ROUNDS=1, WORDS=4, FIND_CLIPS=32,
           RUNS={'tiny': dict(questions=Plan(4, 5), streams=Plan(4, 5), retrieval=Plan(8, 4), asked=4)})
vars(train_tiny).update(FEW)                                   # all runs are small


def called(flags, *more):
    """Run the script -> its exit status, what it wrote to stdout and to stderr."""
    out, said = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(said):
        try:
            argv = [*flags.split(), *map(str, more)]
            tiny = [] if {word[2:] for word in argv} & {*train_tiny.READS} else TINY
            status = train_tiny.main([*tiny, *argv])
        except SystemExit as stop:
            status = stop.code
    print(out.getvalue(), end='')
    return status, out.getvalue(), said.getvalue().strip()


def go(flags, *more):
    """Run the script; it succeeds -> what it printed."""
    status, out, said = called(flags, *more)
    assert status == 0, said
    return out


def refused(words, flags, *more):
    """The script ends with status 2 and one sentence that says so; no file is made or changed."""
    files = lambda: {path: path.is_file() and path.read_bytes() for path in Path().rglob('*')}
    before = files()
    status, _, said = called(flags, *more)
    assert status == 2 and words in said, (flags, more, status, said)
    assert len(said.splitlines()) == 1 and 'Traceback' not in said, said
    assert files() == before, flags


def in_step(patch, n, change):
    """The loss of the n-th training step becomes change(loss) -> a list that grows by one each step."""
    real, steps = train_tiny.Questions.loss, []

    def loss(*args):
        steps.append(n)
        value, right = real(*args)
        return change(value) if len(steps) == n else value, right

    patch.setattr(train_tiny.Questions, 'loss', loss)
    return steps


def shared_run(flags):
    """A fixture: a run that several tests look at."""
    @pytest.fixture(scope='module')
    def run(tmp_path_factory):
        path = tmp_path_factory.mktemp('runs') / 'run'
        go(flags, '--out', path)
        return path
    return run


trained = shared_run('--steps 12')
streaming = shared_run('--recipe stream --window 3 --steps 3')
compared = shared_run('--compare --steps 5 --rows mod-all --seeds 2')
result_of = lambda run, name='result.json': json.loads(Path(run, name).read_text())
weights_of = lambda run: mv.load_checkpoint(Path(run, 'ckpt.pt'))[0].state_dict()
losses = lambda run: [row['loss'] for row in csv.DictReader(open(Path(run, 'log.csv')))]
press_ctrl_c = lambda loss: signal.raise_signal(signal.SIGINT) or loss


def same_weights(*runs):
    a, b = map(weights_of, runs)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def begun(flags):
    """Task and model of a row as its training begins, from an untrained base."""
    s = train_tiny.parse([*TINY, *flags.split()])
    train_tiny.set_up(s)
    data = train_tiny.load_data(s)
    return train_tiny.RECIPES[s.recipe].task(s, data), train_tiny.untrained(s, data)


def pasted(printed):
    """The arguments of the command that was printed last, as a shell reads them."""
    words = shlex.split(re.findall('go on with: (.*)', printed)[-1])
    assert words[:2] == ['python', 'train_tiny.py']
    return words[2:]


def test_coarse_clips_come_first(monkeypatch):
    """Catches coarse clips in every step or in none, held-out clips that are coarse, a base without them."""
    drawn, draw, splits, evaluate = [], shapes.ShapeWorld.batch, [], train_tiny.Questions.evaluate
    monkeypatch.setattr(train_tiny.Questions, 'evaluate', lambda task, model, split, *more, **how: (
        splits.append(split) or evaluate(task, model, split, *more, **how)))
    monkeypatch.setattr(shapes.ShapeWorld, 'batch', lambda world, split, step, *more: drawn.append(
        (split, step, world.frames)) or draw(world, split, step, *more))
    go('--frames 8 --recipe dense --steps 5 --coarse 0.5 --out run')
    assert {(step, frames) for split, step, frames in drawn if split == 'train'} == {
        (0, 4), (1, 4), (2, 4), (3, 8), (4, 8)}
    assert {frames for split, _, frames in drawn if split != 'train'} == {8} and splits == ['val', 'test']
    monkeypatch.setitem(train_tiny.RUNS['tiny'], 'questions', Plan(4, 4, coarse=0.5, lr=0.02))
    for flags, steps, rate in (('dense', 2, 0.02), ('mod-all', 0, 0.02), ('dense --frames 6', 0, 0.02),
                               ('stream', 0, 0.01), ('mod --lr 0.5', 2, 0.5)):
        s = begun(f'--frames 8 --recipe {flags}')[0].s                         # a preset's, of long clips
        assert (s.coarse_steps(), s.rate()) == (steps, rate), flags
    refused('merges clips of 8 frames, got 4', '--frames 8 --coarse 0.5 --recipe tempme --encoder-layers 2')


def test_a_run_writes_everything(trained, streaming):
    """Catches a missing file, key or score, percentages where shares are wanted."""
    files = {*'config.json log.csv ckpt.pt result.json tokens.png tokens.gif clip.webp curve.png'.split()}
    assert {path.name for path in trained.iterdir()} == files
    assert {path.name for path in streaming.iterdir()} == files | {'narration.png'}
    result, scores = map(result_of, (trained, streaming))
    assert result.keys() >= {*(
        'recipe seed device torch dtype preset data placement seconds balanced_accuracy_by_type gflops '
        'paper_share tok_density step_ms parameters learns peak_memory_mb').split()}
    assert result['vision_tokens'] == 64 and result['steps'] == 12
    assert result['vision_by_layer'] == [64, 16, 64]
    assert set(result['accuracy_by_type']) == set(shapes.KINDS)
    assert all(0 <= result[key] <= 1 for key in ('accuracy', 'blind_accuracy', 'chance'))
    for key in 'lm_ppl lm_correctness fluency time_diff silence accuracy blind_accuracy cache_kb'.split():
        assert scores[key] >= 0, key
    assert mv.load_checkpoint(streaming / 'ckpt.pt')[0].config.window == 3
    assert Image.open(trained / 'tokens.gif').n_frames == 4
    assert clips.read_clip(trained / 'clip.webp').shape == (4, 3, 32, 32)
    rows = list(csv.DictReader(open(trained / 'log.csv')))
    assert [int(r['step']) for r in rows] == list(range(1, 13))
    assert [r['step'] for r in rows if r['val_accuracy']] == ['10', '12']


def test_a_resumed_run_ends_like_an_uninterrupted_one(trained, monkeypatch):
    """Catches Ctrl-C that loses work, or, while torch is imported, a traceback or another status than 130; a
    resume without optimizers, a command that breaks at a space."""
    Path('torch.py').write_text('import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n')    # in its place
    done = subprocess.run([sys.executable, ROOT / 'train_tiny.py', '--out', 'my run'], capture_output=True,
                          text=True, env=dict(os.environ, PYTHONPATH=os.getcwd()))
    assert done.returncode == 130 and 'Traceback' not in done.stderr, done.stderr
    assert pasted(done.stderr.replace(f'{ROOT}/', '')) == ['--out', 'my run']
    run, before = Path('cut here'), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        in_step(patch, 8, press_ctrl_c)
        status, _, said = called('--steps 12 --out', run)
        patch.setattr(train_tiny.Run, 'begin', lambda *_: signal.raise_signal(signal.SIGINT))     # too early
        assert pasted(called('--steps 14 --lr 0.003 --resume', run)[2])[-4:] == [
            '--lr', '0.003', '--resume', str(run)]
    assert status == 130 and signal.getsignal(signal.SIGINT) is before
    refused('begun with another --n-layer than 4', '--n-layer 4 --resume', run)
    train_tiny.parse(['--n-layer', '3', '--resume', str(run)])         # as the preset says
    assert not (run / 'result.json').exists() and len(losses(run)) == 8
    assert train_tiny.main(pasted(said)) == 0
    assert same_weights(trained, run) and losses(trained) == losses(run)
    a, b = result_of(trained), result_of(run)
    assert all(a[k] == b[k] for k in ('accuracy', 'blind_accuracy', 'accuracy_by_type', 'steps', 'recipe'))
    with monkeypatch.context() as patch:
        in_step(patch, 1, press_ctrl_c)
        assert called('--steps 15 --resume', run)[0] == 130 and not (run / 'result.json').exists()
    saved = torch.load(run / 'ckpt.pt', weights_only=True)
    adam = copy.deepcopy(saved['optimizers'])
    next(iter(adam[1]['state'].values()))['exp_avg'] = [1.0]
    for name, value in (('optimizers', [{}, {}]), ('optimizers', adam), ('log', [{}]), ('log', None),
                        *(('log', [saved['log'][0] | {key: 'x'}]) for key in ('loss', 'step', 'seconds'))):
        torch.save({**saved, name: value}, run / 'ckpt.pt')
        refused('holds a model, but no run to go on with', '--steps 14 --resume', run)


def test_the_seed_decides_everything_and_folders_are_not_shared():
    """Catches chance, a seed that nothing reads, a run written over, a last line that cannot be pasted."""
    for _ in range(2):
        printed = go('--steps 2 --seed 3')
        torch.rand(3)                                          # what others draw does not matter
    runs = [Path(f'out/mod-shapes-tiny-seed{end}') for end in ('3', '3-2')]
    assert {*Path('out').iterdir()} == {*runs} and same_weights(*runs) and losses(runs[0]) == losses(runs[1])
    (task, model), (other, another) = begun('--seed 3'), begun('--seed 4')
    assert not torch.equal(model.embed.weight, another.embed.weight)
    for split in shapes.SPLITS:
        assert not torch.equal(task.draw(split, 0, 2).video, other.draw(split, 0, 2).video)
    assert train_tiny.main(pasted(printed)) == 0 and (runs[1] / 'ask-clip.png').exists()


def test_a_run_is_written_by_one_process_and_whole(monkeypatch):
    """Catches two processes in one folder, a full disk that costs a good file, a dead run in the way; no run
    where files cannot be locked."""
    run = Path('run')
    other, late = (train_tiny.Run(train_tiny.parse(['--out', 'run'])) for _ in range(2))  # nothing is there
    other.claim()
    with pytest.raises(ValueError, match='another process trains in'):
        late.claim()
    refused('another process trains in', '--steps 1 --out', run)
    other.lock.close()                                                         # as if it was killed
    (run / 'config.json').write_text('{"settings": {}, "model": {}}')
    for name in ('train_tiny.part1.log.csv', 'ckpt.pt.part1'):
        (run / name).write_text('cut')
    go('--steps 1 --out', run)
    assert not [*run.glob('*.lock'), *run.glob('*part*')] and result_of(run)['steps'] == 1
    before = {path: path.read_bytes() for path in run.iterdir()}
    log = [dict.fromkeys(train_tiny.Run.COLUMNS, 1)]
    for write in (lambda: train_tiny.write(run / 'result.json', {}),
                  lambda: train_tiny.draw_curve(log, run / 'curve.png')):
        with at_most(resource.RLIMIT_FSIZE, 1), pytest.raises(OSError):        # a disk that is full
            write()
    assert {path: path.read_bytes() for path in run.iterdir()} == before

    def unlocked(*_):
        raise OSError(38, 'Function not implemented')
    monkeypatch.setattr('fcntl.flock', unlocked)
    go('--steps 1 --out free')


def train_together(name):
    """Train two rows, the second of which begins with the first, then go on with that."""
    for i, more in enumerate(['mod', f'vqtoken --init-from {name}0']):
        go(f'--batch 5 --steps 4 --out {name}{i} --recipe', *more.split())
    go(f'--steps 6 --resume {name}0')


def in_one_of_two(name):
    """What each of two processes does that train one model."""
    train_together(name)
    vq, books = mv.VectorQuantizer(8, 4, revive=4.0).train(), [torch.empty(8, 4) for _ in range(2)]
    for step in range(3):
        vq(torch.randn(20 + train_tiny.RANK, 4, generator=torch.Generator().manual_seed(train_tiny.RANK)))
        for own in (vq.before, vq.codebook):                   # as the codes were placed, and as they became
            torch.distributed.all_gather(books, own)
            assert torch.equal(*books) and vq.cluster_size.sum() > 38
    torch.manual_seed(0)
    own = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])    # a part for each process
    train_tiny.train(own, lambda step: None, lambda model, _: (model[train_tiny.RANK].weight.sum(),) * 2, 3)
    for p in own.parameters():
        books = [torch.empty_like(p) for _ in range(2)]
        torch.distributed.all_gather(books, p.detach())
        assert torch.equal(*books)
    stop, total = [True] * train_tiny.RANK, lambda model, _: (model.weight.sum(),) * 2     # Ctrl-C in one
    with redirect_stderr(open(os.devnull, 'w')):
        log = train_tiny.train(nn.Linear(2, 2), lambda step: None, total, 5, stop=stop)
    assert [row['step'] for row in log] == [1] and stop
    sys.stdout.flush()
    os._exit(0)                                                # as the script ends, too


def test_two_processes_train_one_model(capsys):
    """Catches a gradient of one half, unequal parts weighted alike, two writers, two codebooks, gradients
    that only one has, one that goes on when the other was stopped."""
    with socket.create_server(('localhost', 0)) as free:
        env = dict(os.environ, PYTHONPATH=str(ROOT), MASTER_ADDR='localhost', OMP_NUM_THREADS='1',
                   MASTER_PORT=f'{free.getsockname()[1]}', WORLD_SIZE='2')
    code = 'import test_modvideo; test_modvideo.in_one_of_two("two")'
    running = [subprocess.Popen([sys.executable, '-c', code], text=True, env=env | dict(RANK=rank),
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in '01']
    train_together('one')
    said = [process.communicate(timeout=100)[0] for process in running]
    assert not any(process.returncode for process in running), said
    assert ', 2 processes, float32' in said[0] and not said[1]
    assert ' processes,' not in capsys.readouterr().out and len([*Path().iterdir()]) == 2 * 2
    for i in range(2):
        torch.testing.assert_close(*(weights_of(f'{name}{i}') for name in ('one', 'two')), rtol=0, atol=1e-6)
        assert losses(f'one{i}') == pytest.approx(losses(f'two{i}'), abs=2e-4)


def test_the_training_loop_takes_any_model_and_dataset():
    """Catches a loop that knows clips, questions or the configuration; a rate that is zero or never falls; a
    step that Ctrl-C loses; of this project's model, a frozen one, targets that do not match the logits; steps
    that shrink by gradients of weights that no optimizer has."""
    task, own = begun('--placement all')
    batch = task.draw('train', 0, 2)
    log = train_tiny.train(own.train(), lambda step: batch, task.loss, steps=50, lr=0.03)
    assert log[-1]['accuracy'] > 0.9 > log[0]['accuracy'], 'one batch must be learned by heart'
    model = nn.ModuleDict(dict(blocks=nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))))
    secret, start = torch.randn(8, 4), copy.deepcopy(model.state_dict())

    def draw(step):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step))
        return x, (x @ secret).argmax(1)

    def loss(model, batch):
        logits = model['blocks'](batch[0])
        return F.cross_entropy(logits, batch[1]), (logits.argmax(1) == batch[1]).float().mean()

    def run(first=0, stop_at=None, optimizers=None):
        """Train 200 steps, a row is two, pressing Ctrl-C in one -> the rows."""
        stop, seen = [], []
        pressed = lambda step: stop.extend([True] * (step == stop_at)) or draw(step)
        log = train_tiny.train(model, pressed, loss, 200, 0.05, first, optimizers, seen.append, stop=stop)
        assert seen == log
        return [{**row, 'ms': 0} for row in log]

    whole = run()
    assert [row['step'] for row in whole] == [*range(2, 201, 2)]
    assert [row['lr'] for row in whole] == [0.05 * train_tiny.schedule(n, 200) for n in range(1, 200, 2)]
    assert whole[0]['loss'] > 1.2 and whole[29]['loss'] < 0.6 and loss(model, draw(10 ** 6))[1] > 0.9
    model.load_state_dict(start)
    made = mv.configure_optimizer(model, 0.05)
    before = run(stop_at=102, optimizers=made)                 # in the middle of a row
    first, *after = run(first=103, optimizers=made)
    assert (before[-1]['step'], first['step']) == (103, 104)
    assert before[:-1] + after == whole[:51] + whole[52:]
    assert whole[51]['loss'] == pytest.approx((before[-1]['loss'] + first['loss']) / 2, abs=1e-4)
    ends = []
    for others_learn in (False, True):                         # the last layer's optimizer has no others
        model.load_state_dict(start)
        model['blocks'][0].requires_grad_(others_learn)
        run(optimizers=[torch.optim.SGD(model['blocks'][2].parameters(), 0.3)])
        ends.append(copy.deepcopy(model.state_dict()))
    assert all(map(torch.equal, ends[0].values(), ends[1].values()))
    rates = [train_tiny.schedule(step, 1000) for step in range(1000)]          # up, level, down to zero
    assert rates[0] == 0.02 and rates[49] == 1 == rates[500] and rates[750] == 0.5 and 0 < rates[-1] < 0.01


@pytest.mark.parametrize('steps,bad,change', [
    (30, 5, lambda loss: loss * math.nan), (300, 5, lambda loss: loss * math.nan),     # 300: rows of 3
    (3, 3, lambda loss: loss + (loss - loss.detach()).sqrt())])        # its value is fine, its slope is not
def test_a_loss_that_is_not_finite_names_its_step(monkeypatch, steps, bad, change):
    """Catches NaN that is saved, another step than the first bad one, a last update nobody looks at."""
    in_step(monkeypatch, bad, change)
    status, _, said = called(f'--steps {steps} --out run')
    assert status == 2 and f'not finite at step {bad};' in said
    assert not Path('run/result.json').exists() and not Path('run/ckpt.pt').exists()


def test_the_newest_model_of_a_kind_is_asked_and_watches(trained, streaming):
    """Catches an answer without its probability, a clip that is not played to its end, another kind of
    model, another folder's trouble."""
    for i, run in enumerate((trained, streaming)):
        shutil.copytree(run, f'out/{i}')
    shutil.copytree(trained, 'out/old')
    os.utime('out/old/ckpt.pt', (0, 0))
    Path('out/broken').mkdir()
    Path('out/broken/ckpt.pt').write_text('hello')
    name = Path('電' * 80 + '.webp')                            # as long as a file's name may be
    shutil.copy(COCKATOO, name)
    assert '.png' in go('--ask', name, 'describe') and Path(f'out/0/ask-{"電" * 60}.gif').exists()
    out = go('--ask', COCKATOO, 'What shape is red?')
    assert re.search(r'What shape is red\? .*\d\.\d%', out) and str(Path('out/0/ask-cockatoo.png')) in out
    assert Path('out/0/ask-cockatoo.png').exists() and Image.open('out/0/ask-cockatoo.gif').n_frames == 4
    watch = ['--stream', ROCKET, '--question']
    out = go('--theta 0.9999', *watch, '2', 'what shape is red')
    assert re.findall(r'frame +(\d) of 4', out) == ['1', '2', '3', '4']
    assert re.search('frame +1 .*%   [a-z]', out)
    assert re.findall(r'frame +(\d).* what shape is red\?', out) == ['2']
    strip = Image.open('out/1/stream-rocket_cut.png')
    assert strip.width > 500 and (np.asarray(strip.convert('L'))[-60:] < 100).any(), 'no words below'
    assert not re.search('frame +1 .*%   [a-z]', go('--theta 1e-9', *watch[:2]))
    told = torch.full((1, 24), shapes.ID['triangle'])          # a model that has much to say
    model = types.SimpleNamespace(config=types.SimpleNamespace(vocab=shapes.VOCAB))
    model.stream = lambda frames, *_: (dict(silence=torch.zeros(1), said=told, answer=told) for _ in frames)
    train_tiny.narrate(model, torch.rand(4, 3, 32, 32), Path('long.png'), 0.5, {2: 'describe'})
    assert Image.open('long.png').height > 128 + 12 * 25, 'words are cut off'
    refused('was trained for streams', '--out out/1 --ask', ROCKET, 'describe')
    refused('are 1 to 4', '', *watch, '9', 'what shape is red')


def test_bench_prints_ratios():
    """Catches a bench that does not compare, rows of another task in it, and columns of nothing."""
    cells = table_rows(go('--bench --rows mod-all,holitom,stream'))
    assert {row for _, row in cells} == {'dense', 'gaps', 'mod-all', 'holitom'} and all(cells.values())
    for column in ('step_ms', 'memory_mb', 'first_ms', 'tokens_per_s', 'decoder_gflops'):
        assert '(1.00)' in cells[column, 'dense']
        assert re.search(r'\d \(\d+\.\d\d\)', cells[column, 'holitom']), column
    x = torch.ones(2 ** 18, requires_grad=True)                                # 1 MB
    assert train_tiny.step_memory_mb('cpu', lambda: (x * x).sum().backward()) == 1
    cells = table_rows(go('--bench --recipe stream'))                          # what skips leaves no keys
    assert float(cells['cache_kb', 'stream'].split()[0]) < float(cells['cache_kb', 'stream-dense'].split()[0])


def test_scores_of_streams_by_hand():
    """Catches turns that run into each other, an index counted from the wrong word, silences as words, a
    signed difference, a narration matched with another event, silence never counted; a --batch that training
    heeds and measuring does not, parts measured against others' words."""
    # Two frames, then five words; in time: silence, [first word, word, eos], silence, [answer, eos].
    wanted = torch.tensor([[1, 3, -1, 4, 1, 5, 1], [1, 1, -1, -1, -1, -1, -1]])
    after = torch.tensor([[0, 1, 1, 1, 1, 1, 1]]).repeat(2, 1)
    logits = F.one_hot(torch.tensor([[1, 3, 0, 7, 1, 5, 1], [1, 6, 0, 0, 0, 0, 0]]), 8).float() * 20
    scores = train_tiny.turn_scores(logits, wanted, after, 2, 0.5)
    assert abs(scores['lm_correctness'] - (1 / 3 + 1) / 2) < 1e-6              # the second word is wrong
    assert scores['accuracy'] == 0.5 and abs(scores['fluency'] - (2 / 4 + 1) / 2) < 1e-6
    assert abs(scores['lm_ppl'] / ((math.exp(20 / 3) + 1) / 2) - 1) < 1e-3
    quiet = train_tiny.turn_scores(logits * 0, wanted, after, 2, 0.1)       # P(silence) 1/8: silent
    assert quiet['fluency'] == 1 / 8
    spoke = torch.tensor([[0, 1, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]]).bool()
    should = torch.tensor([[0, 0, 1, 0, 0, 1], [0, 0, 0, 1, 0, 0]]).bool()
    scores = train_tiny.timing_scores(spoke, should)
    assert scores['time_diff'] == (1 + 0 + 3) / 3 and scores['spoken'] == pytest.approx(1 / 3)
    assert scores['silence'] == pytest.approx(8 / 9)
    (task, model), found, sizes = begun('--recipe stream --n-layer 2'), [], []
    model.encoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    for task.s.batch in (3, 8):
        sizes.clear()
        found.append(task.evaluate(model.eval(), 'val', 8))
        assert {*sizes} >= {task.s.batch} and found[0] == pytest.approx(found[-1], abs=1e-4)


def test_evaluation_by_hand():
    """Catches accuracy counted by word, or with padding and questions in it; an end mark among the words;
    balanced scores that weigh by frequency, a blind score that sees its clip, a wrong chance, facts of the
    last clips alone, questions that count again."""
    targets = torch.tensor([[[-1, 3, 1, -1], [-1, 3, 1, -1]]])
    logits = F.one_hot(torch.tensor([[[0, 3, 1, 2], [0, 3, 2, 2]]]), 5).float()
    assert train_tiny.is_right(logits, targets).tolist() == [[True, False]]
    asked, told = train_tiny.split_question(torch.tensor([2, 3, 4, 1]), torch.tensor([-1, 4, 1, -1]))
    assert train_tiny.in_words(asked, ['<pad>', '<eos>', 'who', 'is']) == 'who is' and told.tolist() == [4]
    answers = torch.tensor([[2, 4, 2], [2, 5, 2], [2, 5, 2], [3, 5, 3]])     # (clips, kinds and one again)
    video = torch.tensor([2.0, 2, 3, 3]).view(4, 1, 1, 1, 1)
    targets = torch.stack([torch.full_like(answers, -1), answers], -1)         # (B, Q, L)
    batch = shapes.Batch(video, targets.clamp(min=2), targets, torch.tensor([0, 1, -1]).expand(4, 3))
    data = types.SimpleNamespace(kinds=['colour', 'count'], vocab=[*'abcdef'], questions=2)
    data.batch = lambda *_: batch

    def seer(video, text, targets, asked):                     # colours it sees, counts are always 4
        sizes.append(len(video))
        words = F.pad(video.flatten(1).long(), (0, 2), value=4)
        logits = F.one_hot(words, 6)[:, :, None].expand(-1, -1, 2, -1).float()
        return logits, None, dict(reduced=mv.Reduced(None, info=dict(seen=video.flatten())))

    sizes = []
    seer.reducer = types.SimpleNamespace(steady=True, facts=lambda info: dict(seen=info['seen'].tolist()))
    task = train_tiny.Questions(train_tiny.Settings(batch=3, device='cpu'), data)
    scores = task.evaluate(seer, 'test', 4)
    assert {*sizes} == {2}                                     # 3 clips of 2 questions are 2 of 3
    assert scores['seen'] == [2, 2, 3, 3]                      # of all parts, of their own clips
    assert scores['accuracy_by_type'] == {'colour': 0.75, 'count': 0.25} and scores['accuracy'] == 0.5
    assert scores['balanced_accuracy_by_type'] == pytest.approx({'colour': (2 / 3 + 1) / 2, 'count': 0.5})
    assert scores['blind_by_type'] == {'colour': 0.25, 'count': 0.25} and scores['blind_accuracy'] == 0.25
    assert scores['chance_by_type'] == {'colour': 0.75, 'count': 0.75} and scores['chance'] == 0.75
    blind = train_tiny.Questions(train_tiny.Settings(recipe='blind'), data)        # learns from words alone
    assert torch.equal(blind.draw('train', 0, 4).video, video.roll(1, 0))
    assert torch.equal(blind.draw('val', 0, 4).video, video)


def test_recall_and_twins_by_hand():
    """Catches a constant similarity that finds everything, ranks from 0, the wrong direction; directions
    counted as orders, a clip compared with its twin's score in place of its own."""
    similarity = torch.tensor([[.9, .1, .2], [.8, .5, .1], [.3, .2, .1]])
    found, other, flat = map(train_tiny.recall, (similarity, similarity.T, torch.zeros(4, 4)))
    assert found['R@1'] == pytest.approx(100 / 3) and found['median rank'] == 2 and other['median rank'] == 1
    assert train_tiny.recall(torch.tensor([[math.nan, .1], [.2, math.nan]]))['R@1'] == 0     # they come last
    assert flat['R@1'] == 25 and flat['R@5'] == 100 and flat['median rank'] == 2.5
    turned = torch.arange(32) % 2 == 0                                       # pair i is rows i and i + 32

    def read(text):                                                          # of odd pairs it takes the twin
        x = torch.eye(64)[text[:, 0] - 2]
        return x.where((text % 2 == 0), x.roll(32, 1))

    batch = shapes.Captions(torch.eye(64), torch.arange(64)[:, None] + 2, turned.repeat(2))
    data = types.SimpleNamespace(caption_vocab=[f'{i}' for i in range(66)], captions=lambda *_: batch)
    finder = types.SimpleNamespace(encode_video=lambda video: video, encode_text=read)
    s = train_tiny.Settings(recipe='retrieval', device='cpu')
    scores = train_tiny.Retrieval(s, data).evaluate(finder, 'test', 8)
    assert scores['direction_pairs'] == 1 and scores['order_pairs'] == 0 and scores['clips'] == 8
    assert scores['recall']['sentence to clip']['R@1'] == 50 and scores['accuracy'] == 0.5


def test_every_row_of_the_table_builds_and_costs_what_it_says():
    """Catches a reducer without a row, options that its parts do not have, merging that leaves everything, a
    density in tokens of layer 0, placements of unequal cost, rows whose cost is of other clips, a comparison
    that trains for hours what nobody asked for, rows that no command runs."""
    merges = lambda changes: changes.get('reducer', 'vq') not in ('vq', 'gaps') or 'encoder' in changes
    assert {*mv.REDUCERS} - {'none'} <= {*train_tiny.RECIPES}
    for name, recipe in train_tiny.RECIPES.items():
        deep = '--encoder-layers 2 ' * (recipe.task.kind == 'questions')       # at least, to merge
        task, model = begun(f'{deep}--recipe {name}')
        tokens = task.cost(model)['vision_by_layer']
        N = 64 if task.kind != 'retrieval' else 17 if task.single else 4 * 17
        assert (tokens[-1] < N) == merges(recipe.changes) and max(tokens) <= N, (name, tokens)
        assert len({*tokens}) > 1 or recipe.changes.get('placement', 'none') == 'none', (name, tokens)
        assert recipe.begins in [*train_tiny.RECIPES][:[*train_tiny.RECIPES].index(name)] + [''], name
        assert recipe.share > 0 or model.reducer.untrained, name
    for depth in (4, 5):
        studied = [begun(f'--recipe gamma-{row} --n-layer {depth}')
                   for row in ('ranked', 'random', 'second', 'all')]
        flops, layers = zip(*((task.cost(model)['gflops'], model.mod_layers) for task, model in studied))
        assert max(flops) <= 1.02 * min(flops) and layers[2] == [*range(0, depth - 1, 2)]
        assert layers[3] == [*range(depth - 1)] and len({*map(len, layers[:3])}) == 1
    task, model = begun('--recipe dense')
    task.data.questions = 8                                    # their lengths differ from clip to clip
    assert task.cost(model)['gflops'] == task.cost(begun('--recipe gaps')[1])['gflops']
    task, model = begun('--placement all --keep-ratio 0.25')
    cost = task.cost(model)
    assert cost['decoder_tokens'] == 64 and cost['vision_by_layer'] == [16, 16, 64]
    assert cost['cache_kb'] == pytest.approx(8 * 64 * 96 / 1000) and cost['decoder_gflops'] < cost['gflops']
    moves = lambda video: (video[1:] - video[:-1]).abs().mean((1, 2, 3)).median()
    assert moves(task.liveliest()[0]) == max(map(moves, task.draw('test', 0, 8).video))
    paper = lambda n: 4 * n * 64 * 64 + 2 * n * n * 64 + 2 * n * 64 * 256      # the formula of merging papers
    assert cost['paper_share'] == pytest.approx((2 * paper(16) + paper(64)) / (3 * paper(64)), abs=1e-4)
    rows = lambda flags: train_tiny.rows_of(train_tiny.parse(['--preset', 'wide', *flags.split()]))
    asked, clips = rows('--compare'), rows('--compare --recipe retrieval')
    assert asked[:2] == ['dense', 'gaps'] and rows('--compare --recipe stream') == ['stream-dense', 'stream']
    assert all(train_tiny.RECIPES[name].share <= 0.2 for name in asked[2:])    # of the dense steps
    assert {name for _, *pair, _, _, _, _, _ in train_tiny.CLAIMS for name in pair} <= {*asked, *clips}
    assert {'blind', 'mod', 'gamma-all'} <= {*rows('--bench')} - {*asked}


def test_gamma_recipe_converts_a_dense_run(monkeypatch):
    """Catches a conversion from random weights, ranks that nothing reads, a resume that ranks anew."""
    flags = '--n-layer 4 --steps 2 --recipe gamma --placement rank:2 --keep-ratio 0.25 --init-from dense'
    row = r'(?m)^ +(\d) +(\d+\.\d) +\d+\.\d +(MoD|dense)$'
    table = lambda out: re.findall(row, go(f'{flags} --out {out}'))
    ranks = torch.tensor([[3.0, 1.0, 2.0, 0.0], [1.0, 3.0, 2.0, 0.0]])         # ARank, effective rank
    go('--n-layer 4 --steps 2 --recipe dense --seed 1 --out dense')
    with monkeypatch.context() as patch:
        patch.setattr(train_tiny, 'layer_ranks', lambda *_: ranks)
        assert [what for *_, what in table('gamma')] == ['dense', 'MoD', 'MoD', 'dense']
    model = mv.load_checkpoint('gamma/ckpt.pt')[0]
    assert model.mod_layers == [1, 2] and result_of('gamma')['vision_by_layer'] == [64, 16, 16, 64]
    close(*(weights_of(name)['embed.weight'] for name in ('gamma', 'dense')), 0.1)         # of another seed
    assert 'ARank' not in go('--steps 3 --resume gamma')
    assert mv.load_checkpoint('gamma/ckpt.pt')[0].config == model.config and len(losses('gamma')) == 3
    model, found = mv.load_checkpoint('dense/ckpt.pt')[0], table('again')
    model.reducer, model.config.reducer = mv.Gaps(64), 'gaps'                  # the same weights
    mv.save_checkpoint('dense/ckpt.pt', model)
    assert len(found) == 4 and found == table('more')


def test_a_row_first_trains_what_it_begins_with():
    """Catches weights not taken, a base trained twice or for other steps than its own, recipes that do not
    run, a conversion without training that trains, costs of dense."""
    flags = '--recipe holitom --retain-ratio 0.5 --frames 6 --stage-layer 1 --out run --stage'
    said = go(f'{flags} holitom')
    assert all(f'begins with {name}, which trains first' in said for name in ('gaps', 'dense'))
    a, b, c = map(weights_of, ('run', 'run-gaps', 'run-gaps-dense'))
    assert all(torch.equal(a[name], b[name]) for name in a) and any((c[name] != a[name]).any() for name in a)
    assert [result_of(name)['steps'] for name in ('run', 'run-gaps', 'run-gaps-dense')] == [0, 5, 5]
    assert result_of('run-gaps')['vision_by_layer'] == [96] * 3
    for name, more in (('run', ''), ('bvllm', '--budget 16'), ('vqtoken', '--codes 8 --placement 0,1'),
                       ('vq', '--codes 32')):
        said = more and go(f'--recipe {name} {more} --frames 6 --steps 1 --out {name} --init-from run-gaps')
        result = result_of(name)
        assert name == 'vq' or max(result['vision_by_layer']) < 60 and result['paper_share'] < 0.8, name
        density = 100 * result['accuracy'] / result['decoder_tokens']
        assert result['tok_density'] == pytest.approx(density, abs=1e-3)
    assert re.search(r'codes in use \d+\.\d%, perplexity \d', said)
    go('--out vqtoken --ask', COCKATOO, 'how many shapes')
    model = begun('--recipe vqtoken --codes 0')[1]                             # as many as fit each clip
    assert model.config.options == {'codes': 0}
    refused('already has 0 steps', '--resume run')                             # and keeps them
    go('--steps 2 --resume run')
    assert any((a[name] != p).any() for name, p in weights_of('run').items()) and len(losses('run')) == 2
    before = Path('run-gaps/ckpt.pt').stat().st_mtime_ns
    shutil.rmtree('run')                                       # cut after what it begins with
    go(f'{flags} drop')
    few, _, half = result_of('run')['vision_by_layer']
    assert Path('run-gaps/ckpt.pt').stat().st_mtime_ns == before and half == pytest.approx(few / 2, abs=0.6)
    shutil.rmtree('run')
    for other in ('--frames 8', '--frames 6 --lr 0.02', '--frames 6 --n-layer 4', ''):     # than its base has
        refused('run-gaps was begun with another', f'--recipe holitom {other} --out run')


def test_retrieval_trains_is_found_and_is_refused_elsewhere():
    """Catches ways that do not start from the frames, frozen weights that learn, a row that begins with a
    run of LoRA and forgets what it learned, a find without order."""
    go('--batch 8 --steps 2 --recipe lora-merging --out run')
    go('--batch 4 --steps 1 --recipe full --out full --init-from run-frames')
    full, both, base = map(result_of, ('full', 'run', 'run-frames'))
    (task, lora), (other, merging) = map(begun, ('--recipe lora', '--recipe retrieval'))
    assert both['learns'] < 0.05 * both['parameters'] and full['learns'] == full['parameters']
    assert task.s.rate() == 0.03                               # of LoRA
    assert both['gflops'] < task.cost(lora)['gflops'] and base['steps'] == 4
    assert full['vision_by_layer'][-1] > 1.5 * other.cost(merging)['vision_by_layer'][-1]
    for name, p in lora.named_parameters():
        if 'lora_b' in name:
            nn.init.normal_(p)
    plain = train_tiny.build(train_tiny.replace(task.s, recipe='full'), task, copy.deepcopy(lora))
    video = task.draw('test', 0, 2).video
    close(plain.encode_video(video), lora.encode_video(video))
    began, frozen, learned = (weights_of(name)['embed.weight'] for name in ('run-frames', 'run', 'full'))
    assert torch.equal(began, frozen) and not torch.equal(began, learned)
    find = lambda flags: re.findall(r'(?m)^ +(-?\d\.\d{3}) ', go(flags, '--find', 'a red circle moves left'))
    found = find('--out run')
    ranks = [float(number) for number in found]
    assert found != find('--out run --seed 5')                 # other clips
    assert len(ranks) == 5 and ranks == sorted(ranks, reverse=True)
    assert Image.open('run/find.png').width > 200 and Path('run/tokens.png').exists()
    natural = ROOT / 'data/natural'
    assert 'best of 7 clips' in go('--out run --data', natural, '--find', 'a red circle')
    refused("'dog' (nearest known", '--out run --find', 'a red dog')
    refused('trained for retrieval', '--out run --ask', COCKATOO, 'red')
    refused('retriever, wanted modvideo', '--recipe mod-all --init-from run')
    refused('a sentence for every clip', '--recipe frames --data', natural)


def png(*size):
    file = io.BytesIO()
    Image.new('RGB', size).save(file, 'png')
    return file.getvalue()


GOOD, ROW = '{"file": "0.png", "qa": [["which way", "left"]]}', '{"file": "0.png", "caption": "a", '
BAD_FOLDERS = [                                                # clips.jsonl, the sentence, 0.png if any
    ('', 'no clip is listed'), (GOOD + '\n{oops', 'line 2: not JSON'), ('[1]', 'got [1]'),
    (GOOD + '\n' + GOOD, '0.png stands on 2 lines'),
    ('{"qa": []}', 'line 1: wanted an object with "file"'), (ROW + '"split": "tset"}', "got 'tset'"),
    ('{"file": "0.png"}', 'line 1: wanted "qa"'), (ROW + '"label": ' + '[' * 10 ** 5, 'not JSON'),
    (ROW[:9], 'not JSON'), (ROW + '"grid": ' + '[' * 500 + ']' * 500 + '}', 'grid must be'),
    (ROW + '"grid": [true, 4]}', 'grid must be'), (ROW + '"grid": "4x4"}', 'grid must be ['),
    (ROW[:9] + '""}', 'wanted'), (ROW + '"label": NaN}', 'got nan'), (ROW + '"\udce9"', 'not UTF-8'),
    ('{"file": "a\\u0000", "caption": "a"}', 'wanted an object'), (GOOD, '0.png: no such file'),
    ('{"file": "\\ud800", "caption": "a"}', 'no such file'), (ROW + '"label": ["a"]}', 'label must be'),
    ('{"file": "0.png", "caption": "' + 'a ' * 1001 + '"}', 'of 1 to 1000 words'),
    (ROW + f'"grid": [{"9" * 400}, 1]}}', 'does not divide', png(32, 32)), (GOOD, 'file is empty', b''),
    (GOOD, 'not a readable image', b'hello'), (GOOD, 'does not divide into 4x4 frames', png(30, 31)),
    (GOOD, '0.png: not a readable image', png(32, 32)[:60]), (GOOD, 'no clip for the', png(32, 32))]
BAD_FLAGS = {
    '--compare --rows holitom --frames 2': 'at least 4 frames', '--compare --init-from x': 'takes no --init',
    '--recipe mod-all --init-from nowhere': 'does not exist', '--recipe blind --batch 1': '--batch 2 or more',
    '--rows dense': '--rows goes with --compare or --bench', '--batch 2000000000': 'wanted at most 2**32',
    '--compare --rows mod-al': "'mod-al' is none of dense", '--compare --bench': 'not allowed with argument',
    '--recipe dense --init-from x': 'begins from scratch', '--steps -1': '--steps must be finite, at least 0',
    '--compare --rows vq --recipe vq': 'leave --recipe out', '--question 2 how': 'goes with --stream',
    '--stepz 3': 'unrecognized arguments: --stepz 3', '--seed 9999999999': '2**31', '--lr 0': '--lr above 0',
    '--coarse 1': 'from 0 to below 1', '--lr nan': '--lr must be finite', '--device cuda': 'has none',
    '--compare --budget 4': 'budget is no option', '--steps many': "invalid int value: 'many'",
    '--bench --compile': '--bench takes no --compile', '--seeds 2': '--seeds goes with --compare',
    '--bench --coarse 0.5': 'takes no --coarse', '--recipe best': "invalid choice: 'best'",
    '--recipe holitom --coarse 0.5': 'would do nothing', '--recipe mod-all --coarse 0.5': '--coarse wants',
    '--recipe gamma-all --n-layer 1': 'routes no layer of 1', '--grid 4': '--grid wants COLUMNSxROWS',
    '--bench --rows stream': 'none has the task', '--bench --out x': 'takes no --out',
    '--bench --recipe holitom --init-from x --steps 3': 'takes no --init-from, --steps',
    '--bench --recipe stream --theta 0.3': 'takes no --theta', '--resume run --out x': 'takes no --out',
    '--compare --rows dense --theta 0.3': '--theta would do nothing',
    '--compare --rows blind --batch 1': '--batch 2 or more', '--recipe frames --batch 1': 'wanted --batch 2',
    '--find red --data x --seed 2': '--seed would do nothing',
    '--compare --recipe retrieval --coarse 0.5': '--coarse would do nothing',
    '--question x how': 'number of a frame', '--theta 2': '--theta must be between',
    '--theta 0.9': '--theta would do nothing', '--grid 3x3': '--grid is of clips of your own',
    '--recipe lora --encoder-layers 2': 'would do nothing', '--reducer holitom --tau -2': 'at least -1',
    # the model, in the words of its own options
    '--recipe dense --keep-ratio 0.5': '--keep-ratio would do nothing', '--keep-ratio nan': 'must be finite',
    '--stage drop --stage-layer 3': 'stage_layer must be from 1 to 2', '--window 2': 'frames for streaming',
    '--recipe dense --routing gamma': '--routing would do nothing', '--silence-weight 2': 'would do nothing',
    '--reducer holitom --routing uniform': 'all tokens of a frame', '--placement 1,2': 'of the 2 layers',
    '--recipe gamma --placement rank:9': 'from 1 to 2 layers', '--keep-ratio 0': 'keep_ratio must be above 0',
    '--recipe retrieval --merge-image 2': 'from 0 to below 1', '--recipe holitom --gate zero': 'do nothing',
    '--placement rank:1': 'chooses layers of a dense model', '--recipe uniform --budget 3': 'holds no frame',
    '--recipe retrieval --dim 32': '--dim would do nothing', '--recipe frames --placement all': 'do nothing',
    '--frame-size 30': 'patch_size must be a multiple of 4', '--reducer holitom --tau 3': 'tau from -1 to 1',
    '--recipe gamma --placement rank:x': 'such as rank:1', '--stage drop': 'wants stage_layer: decoder layer',
    '--recipe stream --reducer holitom': 'the whole clip', '--placement interleaved-deep': 'routes no layer',
    '--n-layer 0': '--n-layer must be finite, at least 1', '--gate none': 'gate must be one of raposo, zero',
    '--placement sometimes': 'placement must be one of', '--recipe stream --routing gamma': 'the whole clip',
    '--encoder tempme --reducer vq': 'merges already', '--lora-rank 3': 'lora_rank is no option of',
    '--reducer best': "invalid choice: 'best'", '--recipe vq --codes 0': 'at least 1 code',
    # an option of another part is refused by its name, together with those that there are
    '--reducer holitom --budget 4': "no option of reducer 'holitom' or routing 'frame': retain_ratio, tau",
    '--reducer prune --tau 0.5': "tau is no option of reducer 'prune' or routing 'frame': budget, gate",
    '--recipe gamma --gate zero': "gate is no option of routing 'gamma': routing_loss",
    # run was trained for questions; broken and empty hold no run
    '--recipe prune --reducer vqtoken --init-from run': 'weights, and this row trains none',
    '--recipe gamma --init-from run': 'chooses layers of a dense model', '--out c.webp': 'exists; name',
    '--recipe retrieval --init-from run': 'modvideo, wanted retriever', '--data missing': 'no such folder',
    '--find red': 'python train_tiny.py --recipe retrieval', '--out run --find red': 'trained for questions',
    '--out run --stream c.webp': 'was trained for questions', '--data empty': 'holds no clips.jsonl',
    '--keep-ratio 0.5 --steps 14 --resume run': 'was begun with another --keep-ratio',
    '--steps 5 --resume run': 'already has 12 steps', '--resume run': 'already has 12 steps',
    '--compare --resume run': 'takes no --resume', '--resume missing': 'does not exist',
    '--resume broken': 'is not what a run wrote', '--out run': 'go on with it: --resume run',
    '--compare --out broken': 'no comparison was begun in it', '--out run --ask c.webp ?': 'has no words',
    '--steps 2 --n-head 2 --ask c.webp red': '--ask takes no --n-head, --steps',
    '--out run --ask c.webp shpe': "'shpe' (nearest known: shape",
    '--out run --ask empty red': 'the folder holds no image', '--n-head 5': 'must be even',
    '--out run --ask none.gif red': 'no such file', '--out missing --ask c.webp red': 'does not exist',
    '--grid 3x3 --out run --ask still.png red': 'does not divide into 3x3', '--patch-size 0': 'at least 1',
    '--out broken --ask c.webp red': 'is not a checkpoint of this version'
}


def test_bad_input_is_one_sentence_and_exit_2(trained, monkeypatch):
    """Catches tracebacks, silence, and run folders left behind by a run that could not start."""
    shutil.copytree(trained, 'run')
    shutil.copy(COCKATOO, 'c.webp')
    Image.new('RGB', (32, 32)).save('still.png')
    for folder in ('broken', 'empty', 'clips'):
        Path(folder).mkdir()
    Path('broken/ckpt.pt').write_text('hello')
    settings = json.loads(Path('run/config.json').read_text())['settings']
    for odd in (dict(batch='8'), dict(device='tpu'), dict(theta=None), dict(grid=5),
                dict(model=dict(frames='x'))):
        Path('broken/config.json').write_text(json.dumps(dict(settings={**settings, **odd})))
        refused('is not what this version wrote', '--steps 99 --resume broken')
    Path('broken/config.json').write_text('{}')
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    for flags, words in BAD_FLAGS.items():
        refused(words, flags)
    for flags in (['--resume', ''], ['--ask', '', ''], ['--find', ' '], ['--init-from='], ['--out', '']):
        refused('an empty argument after', '', *flags)
    refused('clips that say what happens', '--recipe stream --data', ROOT / 'data/natural')
    for lines, words, *image in BAD_FOLDERS:
        Path('clips/clips.jsonl').write_text(lines, errors='surrogateescape')
        for content in image:
            Path('clips/0.png').write_bytes(content)
        refused(words, '--data clips')
    for name in 'notes.txt film.part1.rar talk.mp4.part lock ckpt.pt.part train_tiny.parts'.split():
        Path(name).mkdir()                                     # as if of a killed run
        Path(name, name).write_text('mine')
        refused('exists; name another folder', f'--out {name}')
    with monkeypatch.context() as patch:
        patch.setattr(train_tiny, 'WORLD', 2)
        for flags in ('--compare', '--bench', '--recipe gaps', '--recipe frames', '--eval run'):
            refused('needs one process with these flags', flags)
        refused('--batch 1 is less than 2 processes', '--batch 1')
    full = torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20 MiB.')
    monkeypatch.setattr(train_tiny, 'set_up', mock.Mock(side_effect=full))
    refused('there is not enough memory', '')
    monkeypatch.setattr(train_tiny, 'set_up', mock.Mock(side_effect=RuntimeError('an illegal memory access')))
    with pytest.raises(RuntimeError):                          # a fault, with its traceback
        train_tiny.main([])


def whole_precision(batch):
    """A dataset's batch, which must not be drawn in bfloat16: it would move what is resampled."""
    def drawn(*args, **more):
        assert not torch.is_autocast_enabled('cpu')
        return batch(*args, **more)
    return drawn


def test_clip_folders_train(monkeypatch):
    """Catches recipes and datasets that only the default path was tried on, clips drawn under autocast, long
    answers that are cut."""
    story = ' '.join(f'word{i}' for i in range(20))
    write_folder(Path('clips'), [dict(file=f'{i}.png', caption=story) for i in range(20)])
    go('--steps 60 --data clips --out long')                   # every answer is read to its end
    assert f'describe? {story} ' in go('--out long --ask clips/0.png describe')
    write_folder(Path('clips'), LEFT_OR_RIGHT)
    monkeypatch.setattr(train_tiny.ClipFolder, 'batch', whole_precision(train_tiny.ClipFolder.batch))
    loss, cast = train_tiny.Questions.loss, []
    monkeypatch.setattr(train_tiny.Questions, 'loss', lambda *args: (
        cast.append(torch.is_autocast_enabled('cpu')) or loss(*args)))
    monkeypatch.setattr(torch, 'compile', lambda model: cast.append('compiled') or model)
    go('--steps 2 --recipe dense --deterministic --dtype bfloat16 --compile --data clips --out run')
    assert cast == ['compiled', True, True] and torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == 'highest'
    result = result_of('run')
    assert list(result['accuracy_by_type']) == ['which way'] and result['placement'] == 'none'
    assert result['vision_tokens'] == 8 * 16                   # twice the preset's frames, not all 16
    go('--steps 1 --recipe holitom-trained --data clips --init-from run --out merged')
    go('--steps 2 --resume merged')
    before, rows = Path('run/ckpt.pt').read_bytes(), [dict(row, split='test') for row in LEFT_OR_RIGHT[:6]]
    rows[1]['qa'] = rows[1]['qa'] * 9
    monkeypatch.setattr(train_tiny, 'EVAL_CLIPS', 2)           # of the synthetic world; of one's own all
    write_folder(Path('clips'), rows)                          # nothing to train on
    go('--eval run --data clips')
    found = result_of('run', 'eval-clips.json')
    assert found['questions'] == 14 and found['blind_accuracy'] >= 0 and found['decoder_tokens'] == 128
    assert Path('run/ckpt.pt').read_bytes() == before
    write_folder(Path('clips'), [dict(rows[0], qa=[['Which car ?', 'a tram']])])
    refused('the model never saw the words a, car, tram', '--eval run --data clips')
    refused('it has other words; name clips with --data', '--eval run')


def test_comparison_trains_what_is_missing_and_says_how(compared, monkeypatch):
    """Catches rows trained twice, a command that gives another number, tables of what was not measured."""
    flags = '--compare --steps 5 --out compare'
    shutil.copytree(compared, 'compare')
    report = result_of('compare', 'results.json')
    assert list(report['rows']) == ['dense', 'gaps', 'mod-all'] and report['seeds'] == [0, 1]
    for name, row in report['rows'].items():
        runs = [result_of(f'compare/seed{k}/{name}') for k in (0, 1)]
        assert row['accuracy'] == pytest.approx(sum(r['accuracy'] for r in runs) / 2)
        assert row['std'] == pytest.approx(abs(runs[0]['accuracy'] - runs[1]['accuracy']) / 2 ** 0.5)
        assert runs[0]['steps'] == {'dense': 5, 'gaps': 5, 'mod-all': 1}[name]
        assert all(row[key] > 0 for key in ('step_ms', 'first_ms', 'tokens_per_s', 'memory_mb'))
        first, few = row['vision_by_layer'][0], sum(n < 64 for n in row['vision_by_layer'])
        assert (row['token_share'], row['converted'], row['learning']) == (first / 64, few / 3, 1)
    assert Image.open('compare/results.png').width == 720 and Path('compare/mod-all.png').exists()
    before = {path: path.stat().st_mtime_ns for path in Path('compare').glob('seed*/*/ckpt.pt')}
    monkeypatch.setattr(train_tiny, 'SHARES', (0.5, 0.25))
    out = go(f'{flags} --rows holitom-inner,stream --seeds 1')                 # adds rows
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    report, text = result_of('compare', 'results.json'), Path('compare/results.md').read_text()
    rows, curves, cells = report['rows'], report['curves'], table_rows(text)
    assert text in out and ('fluency', 'stream') in cells
    assert [*rows] == ['dense', 'gaps', 'mod-all', 'holitom-inner', 'stream']
    assert {*curves} == {'dense', 'gaps'}
    assert {*curves['gaps']} >= {'uniform', 'prune', 'pool', 'tome', 'holitom'}
    assert all(mv.REDUCERS[name].untrained for name in curves['gaps'])
    assert all(line[0][0] > line[1][0] > 0 for found in curves.values() for line in found.values())
    row, share = rows['holitom-inner'], rows['holitom-inner']['step_ms'] / rows['dense']['step_ms']
    assert cells['accuracy', 'holitom-inner'] == f'{100 * row["accuracy"]:.1f} %'
    assert cells['moment %', 'holitom-inner'] == f'{100 * row["by_type"]["moment"]:.4g}'
    assert cells['step_ms', 'holitom-inner'] == f'{row["step_ms"]:.3g} ({share:.2f})'
    assert cells['here', 'HoliTom', 'FLOPs by its formula'] == f'{row["paper_share"]:.2%}'
    assert train_tiny.main([*shlex.split(row['command'])[2:], *TINY, '--out', 'again']) == 0
    assert result_of('again')['accuracy'] == row['accuracy']
    s = train_tiny.parse([*TINY, '--compare', '--rows', 'dense,stream', '--theta', '0.2'])
    asked = [train_tiny.command_of(train_tiny.row_of(s, name, 0, Path())) for name in ('dense', 'stream')]
    assert ['--theta 0.2' in command for command in asked] == [False, True]
    refused('begun with another --lr', f'{flags} --lr 0.02')
    Path('compare/seed0/dense/result.json').write_text('{"accuracy": 1, "vision_tokens": 64}')
    refused('a result.json of row dense in', f'{flags} --rows mod-all --seeds 1')


def test_a_comparison_goes_on_where_it_stopped(compared, monkeypatch):
    """Catches rows trained from their start, taken for finished, or stuck; a folder that is emptied."""
    s, row = train_tiny.parse([*TINY, '--compare', '--steps', '5']), Path('seed0/dense')
    whole, own = compared / row, train_tiny.row_of(s, 'dense', 0, Path())
    run, command = lambda: train_tiny.finish(own), train_tiny.command_of(own)
    assert command.startswith('python train_tiny.py --recipe dense --preset tiny --steps 5 --batch 4')
    steps = in_step(monkeypatch, 4, press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        run()
    for _ in range(2):                                         # the second time it was cut while it evaluated
        result = run()
        assert result['accuracy'] == result_of(whole)['accuracy'] and len(steps) == 5
        assert same_weights(row, whole)
        (row / 'result.json').unlink()
    config = row / 'config.json'
    for text, ends in ((config.read_text(), nullcontext()),                    # killed before a checkpoint
                       ('{}', pytest.raises(ValueError, match='not what a run wrote'))):     # a stranger's
        shutil.rmtree(row)
        row.mkdir()
        config.write_text(text)
        with ends:
            assert run()['accuracy'] == result['accuracy']
    assert config.read_text() == '{}'


EDGES = {     # row: key: as good as the paper, and not; next to what its base has
    'mod-all-deep': dict(step_ms=(58, 59), memory_mb=(70, 71), accuracy=(.8951, .8949)),
    'gamma': dict(step_ms=(69, 70), first_ms=(65, 66), accuracy=(.8866, .8864), converted=(.875, .87)),
    'holitom-inner': dict(paper_share=(.069, .07), accuracy=(.892, .8915), first_ms=(43, 44),
                          tokens_per_s=(13.3, 13.1)),
    'vqtoken': dict(token_share=(.0007, .00071), accuracy=(.8935, .8933)), 'bvllm': dict(accuracy=(.91, .89)),
    'lora-merging': dict(tokens=(50, 51), gflops=(.49, .5), r_sum=(418, 417), learning=(.0033, .0034),
                         encode_ms=(1.0, 1.01)),
    'retrieval': dict(r_sum=(432, 431), step_ms=(100, 101), memory_mb=(75, 76))}


def test_claims_compare_with_the_papers():
    """Catches a claim that is always reached, whose sign is turned, or that is made of nothing."""
    base = dict(step_ms=100, memory_mb=100, first_ms=100, tokens_per_s=10)
    found = dict(tokens=1000, gflops=1, r_sum=400, encode_ms=1.8, step_ms=157, memory_mb=100)
    rows = dict({name: {key: good for key, (good, _) in keys.items()} for name, keys in EDGES.items()},
                dense=base, gaps=dict(accuracy=.9), uniform=dict(accuracy=.8), lora=found, full=found)
    made = train_tiny.claims(rows)
    assert len(made) == len(train_tiny.CLAIMS) == sum(map(len, EDGES.values()))
    assert all(line[-1] for line in made), made
    for claim in train_tiny.CLAIMS:
        paper, name, _, what, figure, _, key, _ = claim
        worse = {**rows, name: {**rows[name], key: EDGES[name][key][1]}}
        missed = [line[:3] for line in train_tiny.claims(worse) if not line[-1]]
        assert missed == [[paper, what, figure]], (claim, missed)
    assert train_tiny.claims(dict(dense=base)) == []
    nothing = train_tiny.claims({**rows, 'gaps': dict(accuracy=0.0)})          # of which nobody keeps a share
    assert len(nothing) == len(made) - 2 and not any('kept' in line[1] for line in nothing)
    result = dict(accuracy=0.5, vision_tokens=64, learns=1, parameters=2)
    both = [dict(result, vision_by_layer=layers) for layers in ([64, 16, 16, 64], [16, 64, 16, 64])]
    assert train_tiny.summarize(both)['converted'] == 0.5      # of each run, not of their mean


# ---- a pretended GPU -----------------------------------------------------------------------------
# Tensors that hold the CPU's numbers and say that they are on cuda:0. What CUDA refuses is refused: two
# devices in one operation, NumPy, a generator of the other device. Waits for the device are counted.

ATEN, CUDA = torch.ops.aten, torch.device('cuda:0')
INDEXING = 'index', 'index_put', 'index_put_', '_index_put_impl_'
WAITING = 'nonzero masked_select _local_scalar_dense equal bincount _unique2 unique_dim'.split()
# These take a number from the CPU, as pointwise operations do.
WITH_SCALARS = 'masked_fill masked_fill_ where fill_ _foreach_mul_ _foreach_mul _foreach_div_'.split()
on_gpu = lambda x: isinstance(x, OnGPU)
held_by = lambda x: x.held if on_gpu(x) else x
is_cuda = lambda device: device is not None and torch.device(device).type == 'cuda'


def each_tensor(function, x):
    """The same lists and tuples with function(tensor) for each tensor: torch's own walk takes far longer."""
    if isinstance(x, torch.Tensor):
        return function(x)
    return type(x)([each_tensor(function, a) for a in x]) if type(x) in (list, tuple) else x


class OnGPU(torch.Tensor):
    """C++ takes it for a tensor on the CPU, so that autograd needs no GPU."""
    __torch_function__ = torch._C._disabled_torch_function_impl
    __torch_dispatch__ = None                                                  # Operations comes first
    device, is_cuda, is_cpu = (property(lambda self, value=value: value) for value in (CUDA, True, False))

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype)

    def __init__(self, held):
        self.held = held

    def __reduce_ex__(self, protocol):
        return self.held.detach().__reduce_ex__(protocol)                      # saved as what it holds


class Operations(TorchDispatchMode):
    """Sees every operation, those inside autograd, too. waits: how often the host waited, by what for."""
    waits, inside = Counter(), False                           # inside: in a call that is given such tensors

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        found, there = [], is_cuda(kwargs.get('device'))
        each_tensor(found.append, (args, *kwargs.values()))
        held = {id(a.held): a for a in found if on_gpu(a)}
        plain, indexes = [a for a in found if not on_gpu(a)], name in INDEXING and on_gpu(args[0])
        if 'device' in kwargs:
            kwargs['device'] = torch.device('cpu')
        if plain and (there or held and func is ATEN.copy_.default):
            self.waits['copy'] += 1
        elif plain and held:
            many = any(a.dim() for a in plain)
            self.waits['index on the CPU'] += indexes and many
            scalar = torch.Tag.pointwise in func.tags or name in WITH_SCALARS
            if not indexes and (many or not scalar):
                raise RuntimeError(f'{func}: tensors on two devices, cuda:0 and cpu')
        sizes = name in WAITING or func is ATEN.repeat_interleave.Tensor and kwargs.get('output_size') is None
        if held and (sizes or indexes and any(on_gpu(a) and a.dtype is torch.bool for a in args[1])):
            self.waits[name] += 1
        args, values = each_tensor(held_by, (args, [*kwargs.values()]))
        out = func(*args, **dict(zip(kwargs, values)))
        if not (held or there or self.inside and not plain):
            return out
        held.update({id(a): a for a in plain})                                # what was changed in place
        return each_tensor(lambda a: held[id(a)] if id(a) in held else OnGPU(a), out)


class Calls(TorchFunctionMode):
    """Sees what Python calls."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name, first = kwargs or {}, getattr(func, '__name__', ''), args[0] if args else None
        device, generator, now = kwargs.get('device'), kwargs.get('generator'), Operations
        inside = any(on_gpu(a) or type(a) in (list, tuple) and any(map(on_gpu, a))
                     for a in (*args, *kwargs.values()))
        if on_gpu(first) and name in ('numpy', '__array__'):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if generator is not None and is_cuda(generator.device) != (is_cuda(device) if device else inside):
            raise RuntimeError(f'{name}: a generator of another device than the tensor')
        if name in ('to', 'cpu', 'cuda') and isinstance(first, torch.Tensor):
            later = kwargs.pop('non_blocking', False)
            return self.move(first, [name] if name != 'to' else [*args[1:], *kwargs.values()], later)
        if name == 'tolist' and on_gpu(first):
            now.waits[name] += 1
            return first.held.tolist()
        if name in ('tensor', 'as_tensor') and is_cuda(device) and not on_gpu(first):
            now.waits['copy'] += 1
            return OnGPU(func(*args, **{**kwargs, 'device': 'cpu'}))
        before, waits = now.inside, now.waits
        now.inside = before or inside
        now.waits = Counter() if name == 'one_hot' else waits                 # which does not look, on CUDA
        try:
            return func(*args, **kwargs)
        finally:
            now.inside, now.waits = before, waits

    def move(self, x, to, later=False):
        """x.to(device, dtype or another tensor). The host waits, unless the GPU fetches it later."""
        dtypes = [getattr(a, 'dtype', a) for a in to if isinstance(a, (torch.dtype, torch.Tensor))]
        devices = [getattr(a, 'device', a) for a in to if isinstance(a, (str, torch.device, torch.Tensor))]
        if devices and is_cuda(devices[0]) != on_gpu(x):
            Operations.waits['copy'] += on_gpu(x) or not later
            x = x.held.detach().clone() if on_gpu(x) else OnGPU(x.detach().clone())
        return torch.Tensor.to(x, dtypes[0]) if dtypes else x


class Seeds(torch._C.Generator):
    """A generator that says of which device it is."""
    device = None
    __new__ = lambda cls, device='cpu': torch._C.Generator.__new__(cls, 'cpu')

    def __init__(self, device='cpu'):
        self.device = torch.device(device)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU, as far as Python can tell."""
    autocast, load = torch.autocast, torch.load
    loaded = lambda path, map_location=None, **more: tree_map_only(
        torch.Tensor, torch.Tensor.clone, load(path, 'cpu', **more))
    grouped = lambda lists, *_: {(lists[0][0].device, lists[0][0].dtype): (lists, [*range(len(lists[0]))])}
    for name, value in {
            'Generator': Seeds, 'autocast': lambda device, *rest, **more: autocast('cpu', *rest, **more),
            'load': loaded, '_C._group_tensors_by_device_and_dtype': grouped,
            'cuda.is_available': lambda: True, 'cuda._lazy_init': lambda: None,
            'cuda.get_device_name': lambda: 'pretended', 'cuda.is_bf16_supported': lambda **_: True,
            'cuda.max_memory_allocated': lambda: 2 ** 20, 'cuda.synchronize': lambda: None,
            'cuda.reset_peak_memory_stats': lambda: None}.items():
        monkeypatch.setattr(f'torch.{name}', value)
    for name in ('torch.optim.optimizer', 'torch.utils._foreach_utils'):       # several tensors at a time
        monkeypatch.setattr(sys.modules[name], '_foreach_supported_types', [nn.Parameter, OnGPU])
    monkeypatch.setattr(torch.__future__, '_overwrite_module_params_on_conversion', True)
    with Operations() as operations, Calls():
        yield operations


HOST_WAITS = {      # how often the host waits in a training step, at most; never in that of any other recipe
    'holitom': 1, 'holitom-inner': 1, 'holitom-trained': 1, 'mod+holitom': 2,
    'vqtoken-adaptive': 1, 'mod+vqtoken': 1, 'mod+tempme': 1, 'vq': 1}


@pytest.mark.parametrize('recipe', {                           # the first of those alike
    (row.task, row.changes.get('reducer'), *row.changes): name
    for name, row in reversed(train_tiny.RECIPES.items())}.values())
def test_a_step_on_a_pretended_gpu(gpu, recipe):
    """Catches tensors left on the CPU, an index or generator of the other device, waits for numbers; cuDNN's
    attention, which plans anew for each number of tokens, where that changes from step to step."""
    deep = '--encoder-layers 2 ' * (train_tiny.RECIPES[recipe].task.kind == 'questions')       # to merge
    task, model = begun(f'{deep}--batch 2 --device cuda --recipe {recipe}')
    s, optimizers = task.s, mv.configure_optimizer(model.train(), task.s.rate())
    cudnn, varies = [], recipe == 'gaps' or 'holitom' in recipe or 'adaptive' in recipe
    model.register_forward_pre_hook(lambda *_: cudnn.append(torch.backends.cuda.cudnn_sdp_enabled()))
    for step in range(2):                                      # the first one places codes and averages
        gpu.waits.clear()
        batch = task.draw('train', step, s.batch)
        with s.autocast():
            loss, _ = task.loss(model, batch)
        train_tiny.learn(optimizers, loss)
    waits = Counter(gpu.waits)
    task.timed(model.eval(), batch)[0][0]()                    # answers, streams, encodes
    assert math.isfinite(loss.item()) and waits.total() <= HOST_WAITS.get(recipe, 0), waits
    assert cudnn == [not varies] * 2 and torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize('flags', [
    '--steps 1', '--steps 1 --recipe stream --window 2 --n-layer 2 --deterministic',
    '--steps 1 --recipe dense --stage drop --stage-layer 1',
    '--steps 1 --recipe frames', '--bench --rows dense', f'--steps 1 --data {ROOT}/data/natural'])
def test_the_script_on_a_pretended_gpu(gpu, flags):
    """Catches pictures, scores, checkpoints, answers, measurements that work on a CPU alone."""
    go(f'--device cuda {flags}' + ' --out run' * ('bench' not in flags))


# ---- mutated inputs ------------------------------------------------------------------------------
# FUZZ=5000 python -m pytest -k fuzz tries so many inputs of each kind, FUZZ_SEED=1 others.

ODD = [None, True, -1, 0, 2 ** 31, 10 ** 400, 1e308, -1e-9, math.nan, '', '.', '\0', '\ud800', '\x1b[1m',
       'x' * 5000, [], {}, [[[]]], {'a': {}}, [1] * 3000, functools.reduce(lambda x, _: [x], range(400), 0)]
WILD = {int: '0 1 2 3 7 -1 2147483647 9999999999 x', float: '0 1 0.5 -0.5 1e-30 1e30 nan inf 0.99 x',
        str: 'x . / 0 1 2 0,1 1x1 2x8 rank:1 \xe9', list: '1 2 x /', bool: ''}


def damaged(data: bytes, rng) -> bytes:
    """The same with bytes changed, repeated, cut out, moved."""
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at, n = rng.randrange(len(data) + 1), rng.choice([1, 2, 4, 8, 40])
        piece = rng.choice([b'', rng.randbytes(n), b'\xff' * n, b'\0' * n, data[at:at + n] * 2, data[:n]])
        data = data[:at] + piece + data[at + rng.choice([0, n]):]
    return data[:rng.choice([len(data)] * 4 + [rng.randrange(len(data) + 1)])]


def odd(value, rng):
    """A copy with one part of it left out or something else."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(ODD)
    value, key = copy.copy(value), rng.choice([*value] if isinstance(value, dict) else range(len(value)))
    if rng.random() < 0.1:
        del value[key]
    else:
        value[key] = odd(value[key], rng)
    return value


def damage(path, rng):
    """Damage a file of bytes, JSON or a checkpoint in place."""
    if rng.random() < 0.5:
        path.write_bytes(damaged(path.read_bytes(), rng))
    elif path.suffix == '.pt':
        torch.save(odd(torch.load(path), rng), path)
    else:
        lines = path.read_text().split('\n') if path.suffix == '.jsonl' else [path.read_text()]
        path.write_text('\n'.join(json.dumps(odd(json.loads(line), rng)) for line in lines))


def fuzz_pictures(rng, path):
    first, *rest = (Image.fromarray(f) for f in noise_frames(3, 12))
    kind = rng.choice(['png', 'png', 'gif', 'webp', 'jpeg', 'bmp'])
    films = rng.random() < 0.5 and kind not in ('jpeg', 'bmp')
    film = dict(save_all=True, append_images=rest) if films else {}
    still = rng.choice([first, first.convert('P'), first.convert('LA'), GREY16])
    (still if kind == 'png' and not film else first).save(path, kind, **film)
    path.write_bytes(damaged(path.read_bytes(), rng))
    with suppress(ValueError, OSError):
        clips.read_clip(path, (1, 1), 4, 8)


def fuzz_lines(rng, path):
    write_folder(path, [dict(file=f'{i}.png', split=split, label='a', qa=[['what', 'b'], ['-1', 'c d']])
                        for i, split in enumerate(shapes.SPLITS)])
    damage(path / 'clips.jsonl', rng)
    with suppress(ValueError, OSError):
        clips.ClipFolder(path, 4, 8).batch('train', 0, 2)


def tolerated(*words):
    """The script ends with status 0, or with 2 after one sentence."""
    status, _, said = called('', *words)
    last = said.splitlines()[-1:]
    assert status == 0 or status == 2 and last and last[0].startswith('train_tiny: '), (words, status, last)


def fuzz_files(rng, path):
    job = rng.choice([*Path('kept').iterdir()])
    shutil.copytree(job, path)
    damage(rng.choice([p for p in path.rglob('*') if p.suffix in ('.json', '.pt')]), rng)
    if job.name == 'compare':
        tolerated(*'--compare --rows dense --seeds 1 --steps 2 --out'.split(), path)
    else:
        tolerated('--out', path, '--ask', COCKATOO, 'what shape is red')
        tolerated('--steps', 13, '--resume', path)


def fuzz_flags(rng, path):
    own = {f.name: typing.get_args(f.type) for f in dataclasses.fields(train_tiny.Settings)}
    flags, given = {**own, **train_tiny.model_flags()}, ['--steps', 1, '--out', path]
    for name in rng.sample([name for name in flags if flags[name] and name not in UNTRIED], 2):
        kind = flags[name][0]
        values = [*train_tiny.CHOICES.get(name, ())] or WILD[kind].split()
        given += [train_tiny.dashed(name), *rng.choices(values, k={bool: 0, list: 2}.get(kind, 1))]
    tolerated(*given)


UNTRIED = 'out compare bench batch preset deterministic compile'.split()       # all rows, or minutes
FUZZED = {fuzz_pictures: 50, fuzz_lines: 100, fuzz_files: 2, fuzz_flags: 6}    # how many of each, by default


@pytest.mark.parametrize('kind', FUZZED, ids=lambda kind: kind.__name__)
def test_fuzz(kind, tmp_path, monkeypatch, request):
    """Catches tracebacks, inputs that hang for 20 seconds or take 8 GB. The folder's name is the number."""
    monkeypatch.setattr(PngImagePlugin.ChunkStream, 'crc', PngImagePlugin.ChunkStream.crc_skip)
    if kind is fuzz_files:
        shutil.copytree(request.getfixturevalue('trained'), 'kept/run')
        if 'FUZZ' in os.environ:
            go('--compare --rows dense --seeds 1 --steps 2 --out kept/compare')
    handler = signal.signal(signal.SIGALRM, lambda *_: pytest.fail('it hangs'))
    with at_most(resource.RLIMIT_AS, 2 ** 33 + int(Path('/proc/self/statm').read_text().split()[0]) * 4096):
        for i in range(int(os.environ.get('FUZZ', FUZZED[kind]))):
            signal.alarm(20)
            kind(random.Random(f'{os.environ.get("FUZZ_SEED")} {i}'), tmp_path / f'{i}')
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)


# ---- methods of your own -------------------------------------------------------------------------

class TemporalPool(mv.Reducer):
    """Averages each patch over `step` frames."""

    def __init__(self, dim: int, *, step: typing.Annotated[int, 'frames that become one'] = 2):
        super().__init__(dim)
        self.step = step

    def forward(self, x, saliency=None, words=None, known=None):
        T, P = x.shape[1:3]
        return mv.pool(x, math.ceil(T / self.step) * P, math.isqrt(P))


class EveryOther(mv.Stage):
    """Every other token."""

    def decide(self, x, score, real):
        return mv.pack(real & (torch.arange(x.size(1)) % 2 == 0))


def test_a_new_reducer_and_a_new_stage_are_one_class_each(monkeypatch):
    """Catches a list of methods anywhere but in the class itself, an inherited option that is lost."""
    monkeypatch.setitem(mv.REDUCERS, 'temporal-pool', TemporalPool)
    monkeypatch.setitem(mv.STAGES, 'every-other', EveryOther)
    script = types.ModuleType('train_tiny')                    # imported anew
    monkeypatch.setitem(sys.modules, 'train_tiny', script)
    exec(compile((ROOT / 'train_tiny.py').read_text(), 'train_tiny.py', 'exec'), vars(script))
    monkeypatch.setitem(globals(), 'train_tiny', script)
    vars(script).update(FEW)
    text = ' '.join(go('--help').split())
    assert 'reducer temporal-pool: frames that become one [2]' in text and '--step STEP' in text
    assert ',temporal-pool}' in text and '{none,holitom,drop,every-other}' in text
    assert 'stage holitom, drop, every-other: decoder layer before which' in text
    go('--compare --rows temporal-pool --seeds 1 --steps 4 --out compare')
    assert '| temporal-pool |' in Path('compare/results.md').read_text()
    run, dense = (result_of(f'compare/seed0/{name}') for name in ('temporal-pool', 'dense'))
    assert run['vision_by_layer'] == [32] * 3 and run['recipe'] == 'temporal-pool'
    assert Path('compare/temporal-pool.png').exists() and run['gflops'] < dense['gflops']
    assert Path('compare/seed0/temporal-pool/tokens.png').exists()
    refused("tau is no option of reducer 'temporal-pool' or routing 'frame': step, gate",
            '--recipe temporal-pool --tau 0.5 --out never')
    refused("stage 'every-other' wants stage_layer: decoder layer", '--stage every-other --out never')
    go('--recipe dense --steps 1 --out x',
       *'--reducer temporal-pool --step 4 --stage every-other --stage-layer 1'.split())
    assert result_of('x')['vision_by_layer'] == [16, 8, 8] and Path('x/tokens.png').exists()


# ---- the README keeps its word -------------------------------------------------------------------

def table_rows(text):
    """(words above it, what it is a row of) -> cell, of all tables of results in Markdown."""
    found = {}
    for block in re.findall(r'(?:^\|.*\n?)+', text, re.M):
        head, _, *lines = [[cell.strip(' `*') for cell in line.strip()[1:-1].split('|')]
                           for line in block.splitlines()]
        keys = 2 if head[:2] == ['paper', 'claim'] else 1
        for line in lines if keys == 2 or head[0] == 'recipe' else ():
            assert len(line) == len(head), line
            found.update({(name, *line[:keys]): cell for name, cell in zip(head[keys:], line[keys:])})
    return found


def test_readme_says_what_was_measured():
    """Catches a number in a table that is not in data/results, results that nobody can look up."""
    told, named = {}, sorted({*re.findall(r'data/results/[\w./-]+\.json', README)})
    for name in named:
        told.update(table_rows(train_tiny.write_report(json.loads((ROOT / name).read_text()))))
    shown = {where: cell for where, cell in table_rows(README).items() if where[0] != 'use it when'}
    wrong = {where: (cell, told.get(where)) for where, cell in shown.items() if cell != told.get(where)}
    assert named and not wrong, wrong
    assert len({row for _, *row in shown for row in row}) > 5, 'where is the table?'


def test_examples_run(monkeypatch):
    """Catches examples of the README, or of the header, that drifted from the code."""
    monkeypatch.syspath_prepend(str(ROOT))
    Path('data').symlink_to(ROOT / 'data')
    usage = [line.strip() for line in mv.__doc__.split('Usage:')[1].splitlines()]
    for block in [*BLOCKS, '\n'.join(['from modvideo import *', *usage])]:
        torch.manual_seed(0)
        exec(compile(block, 'example', 'exec'), {'__name__': 'example'})
    assert Path('tokens.png').exists()


def test_readme_is_short_and_names_what_exists():
    """Catches files, line counts, links, tests, rows that drifted; a README that grows."""
    tests = ''.join(path.read_text() for path in ROOT.glob('test_*.py'))
    text = re.sub(r'```bibtex.*?```', '', README, flags=re.S)
    assert len(README.splitlines()) <= 250 and len(text.split()) <= 2500
    made = ('tokens.png tokens.gif curve.png shapes.png modvideo.png clips.jsonl results.md results.json '
            'result.json config.json narration.png find.png holitom.png').split()
    for name in re.findall(r'`((?:data/|\.github/)?[\w/]+\.(?:py|md|jsonl|json|png|gif))`', text):
        assert (ROOT / name).exists() or name in made, name
    for name in re.findall(r'\]\(([^)#:]+)\)', text):
        assert (ROOT / name).exists(), name
    assert all(f'def {name}(' in tests for name in re.findall(r'`(test_\w+)`', text))
    assert {*re.findall(r'--recipe ([a-z][\w+-]*)', text)} <= {*train_tiny.RECIPES}
    counts = re.findall(r'`([\w/]+\.py)` \| (\d+) ', text)
    assert len(counts) >= 6
    for name, said in counts:
        lines = len((ROOT / name).read_text().splitlines())
        assert abs(lines - int(said)) <= 0.1 * lines, f'{name}: README says {said}, it has {lines}'


def test_help_lists_every_flag(capsys):
    """Catches a flag without help, a part whose options are hidden, a README with flags that are gone."""
    listed = ' '.join(go('--help').split()).split('options: ')[1]
    with pytest.raises(SystemExit, match='0'):
        donkeycar.main(['--help'])
    helps = ' '.join(capsys.readouterr().out.split())          # of both scripts
    wanted = [*train_tiny.RECIPES] + [f'{train_tiny.dashed(f.name)} '
                                      for f in dataclasses.fields(train_tiny.Settings) if f.name != 'model']
    for part, classes in mv.PARTS.items():
        wanted += [f'--{part} {{{",".join(classes)}}}'] if part != 'model' else []
        for name, cls in classes.items():
            for key, option in mv.options_of(cls).items():
                wanted += [f'{train_tiny.dashed(key)} ', option.annotation.__metadata__[0]]
                assert re.search(f'{part}[^:]* {name}[:,]', listed), (name, key)
    assert not [text for text in wanted if text not in listed]
    for flag in re.findall(r'(?<![\w-])--[a-z][a-z-]*', README):
        assert re.search(f'{flag}(?![a-z-])', helps), flag


def test_house_style():
    """Catches lines over 110 columns, functions over 60 lines, files without a licence line."""
    for path in [*ROOT.glob('*.py'), *ROOT.glob('data/*.py')]:
        text = path.read_text()
        assert text.startswith('# SPDX-License-Identifier: MIT-0'), path
        assert max(map(len, text.splitlines())) <= 110, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f'{path}: {node.name}'
