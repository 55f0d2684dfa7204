# SPDX-License-Identifier: MIT-0
"""Train a small video-language model in minutes, see the patches it processed, ask it about a clip.

    python train_tiny.py                                   the main job: MoD on the synthetic world
    python train_tiny.py --recipe holitom                  a row of RECIPES, and first what it begins with
    python train_tiny.py --recipe gamma --init-from RUN    the same from a model that is trained already
    python train_tiny.py --data FOLDER                     your own clips (see data/clips.py)
    python train_tiny.py --ask CLIP "what shape is red"    ask the newest trained model about a clip
    python train_tiny.py --stream CLIP                     let the newest model of --recipe stream watch it
    python train_tiny.py --find "a red circle moves left"  rank clips, newest model of --recipe retrieval
    python train_tiny.py --eval out/RUN --data FOLDER      measure a trained model on other clips
    python train_tiny.py --resume out/RUN                  go on with an interrupted run
    python train_tiny.py --bench                           time and memory of rows, untrained
    python train_tiny.py --compare                         train, measure and tabulate rows
    torchrun --nproc-per-node=2 train_tiny.py              one model, trained by two processes

A run's folder, out/RUN, holds config.json, log.csv, ckpt.pt, result.json, clip.webp and pictures.
"""
import argparse
import copy
import difflib
import itertools
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, NamedTuple, get_args

BEGAN = time.time()     # importing torch takes seconds, and they count
as_typed = subprocess.list2cmdline if os.name == 'nt' else shlex.join      # words -> a line of the shell

if __name__ == '__main__':
    def stopped_early(*_):      # Ctrl-C while torch is imported
        print('train_tiny: stopped; go on with:', as_typed(['python', *sys.argv]), file=sys.stderr)
        os._exit(130)

    signal.signal(signal.SIGINT, stopped_early)

import torch
from PIL import Image, ImageDraw
from torch import distributed
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from data.clips import LONGEST, ClipFolder, read_clip, read_rows, save_clip, words
from data.shapes import PROMPT, Batch, ShapeWorld, check
from modvideo import (EOS, IGNORE, PAD, PARTS, PRESETS, REDUCERS, ROUTINGS, ModVideoConfig,
                      choose_mod_layers, compose, configure_optimizer, count_flops, draw_tokens, init_from,
                      layer_ranks, load_checkpoint, merge_lora, num_params, options_of, pack,
                      save_checkpoint)

EVAL_CLIPS = 512      # held-out clips of the synthetic world that the final accuracy is measured on
FIND_CLIPS = 256      # held-out clips, their sentences all different, that retrieval is measured on
SHARES = 0.5, 0.25, 0.15, 0.1, 0.05      # of the vision tokens, for which methods without training are drawn
CURVE_CLIPS = 128     # held-out clips of each such point
ROUNDS = 7            # of a measurement, after two to warm up
WORDS = 32            # of an answer whose speed is measured
COST_CLIPS = 8        # held-out clips over which tokens and FLOPs are averaged
# cuDNN's attention is 10 % faster, but plans anew for each number of tokens, for longer than a step takes.
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
RANK, WORLD = (int(os.environ.get(name, n)) for name, n in (('RANK', 0), ('WORLD_SIZE', 1)))   # of torchrun

# ---- 1. The training loop ----------------------------------------------------------------------------------
# It knows nothing of this project's data or tasks: any model, batches from a function of the step, any loss.

def train(model, draw, loss, steps: int, lr: float = 0.01, first: int = 0, optimizers: list = None,
          report=lambda row: None, stop: list = None, name: str = 'train') -> list:
    """Train from step `first` to `steps` -> the log, a dict for about every hundredth of the steps.

    draw(step) -> a batch. loss(model, batch) -> loss and accuracy, 0-dim tensors; with several processes,
    parts that add up to them. report(row of the log) is called with each; if it calls model.eval(), it calls
    model.train() after it. optimizers: None: those of configure_optimizer at lr; of others lr is not used.
    The rate of each is what it was, times `schedule`: bring no scheduler. stop: a list; once something is in
    it, training ends with a row. Without torchrun the GPU is waited for once a row.
    """
    optimizers = optimizers or configure_optimizer(model, lr)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group.setdefault('initial_lr', group['lr'])
    every, log, recent, tick = max(1, steps // 100), [], [], time.time()
    bar = tqdm(range(first, steps), name, steps, initial=first, mininterval=1, dynamic_ncols=True,
               disable=RANK > 0)
    for step in bar:
        for group in groups:
            group['lr'] = group['initial_lr'] * schedule(step, steps)
        value, right = loss(model, draw(step))
        learn(optimizers, value)
        recent.append(torch.stack([value.detach().float(), right.float()]))
        done, last = step + 1, bool(stop)                      # a later Ctrl-C stops after the next step
        if WORLD > 1 and stop is not None:                     # where one process stops, all do
            told = value.new_tensor([float(last)])
            add_up([told])
            last = bool(told > 0)
            stop += [True] * (last and not stop)
        if done % every == 0 or done == steps or last:
            mean_loss, accuracy = finite_mean(recent, done, model)
            log.append(dict(step=done, loss=round(mean_loss, 4), accuracy=round(accuracy, 4),
                            lr=groups[0]['lr'], ms=1000 * (time.time() - tick) / len(recent)))
            bar.set_postfix(loss=f'{mean_loss:.3f}', acc=f'{accuracy:.1%}', refresh=False)
            report(log[-1])
            recent, tick = [], time.time()
        if last:
            break
    return log


def learn(optimizers: list, value):
    """One step down the gradient of a loss, added up over the processes of torchrun, its norm at most 1."""
    value.backward()
    learned = [p for optimizer in optimizers for group in optimizer.param_groups for p in group['params']]
    for p in [p for p in learned if WORLD > 1 and p.requires_grad and p.grad is None]:
        p.grad = torch.zeros_like(p)                           # another process may have a gradient of it
    add_up([p.grad for p in learned if p.grad is not None])
    torch.nn.utils.clip_grad_norm_(learned, 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def add_up(tensors: list):
    """Sum each tensor over the processes of torchrun, all in one message."""
    if WORLD > 1:
        flat = torch.cat([a.flatten() for a in tensors])
        distributed.all_reduce(flat)
        for a, total in zip(tensors, flat.split([a.numel() for a in tensors])):
            a.copy_(total.view_as(a))


def schedule(step: int, steps: int) -> float:
    """Learning-rate factor: up over 50 steps, level, then down to zero over the last half."""
    return min(1, (step + 1) / 50, (steps - step) / (0.5 * steps))


def finite_mean(recent: list, done: int, model) -> list:
    """Mean loss and accuracy of the last steps. ValueError names the first that is not finite."""
    values = torch.stack(recent)                                               # (steps, 2)
    add_up([values])
    values = values.cpu()
    good = values.isfinite().all(1)
    # The square of a larger weight nears 3e38, float32's limit. A comparison with NaN is false.
    good[-1] &= torch.stack([(p.abs() < 1e18).all() for p in model.parameters()]).all().cpu()
    if not good.all():
        bad = done - len(recent) + 1 + int((~good).nonzero()[0])
        raise ValueError(f'the loss or the weights are not finite at step {bad}; nothing was saved since the '
                         'last checkpoint; try a lower --lr')
    return values.mean(0).tolist()


# ---- 2. Tasks ----------------------------------------------------------------------------------------------
# What is learned from a dataset: draw a batch, its loss, how well a model does, how to show it, what to time.

def is_right(logits, targets):
    """(..., n, V), (..., n) -> (...) bool: every word to be learned is the most probable one."""
    return ((logits.argmax(-1) == targets) | (targets == IGNORE)).all(-1)


def means(values: list, keys: list) -> dict:
    """Mean of the values that share a key."""
    groups = {}
    for key, value in zip(keys, values):
        groups.setdefault(key, []).append(value)
    return {key: statistics.fmean(groups[key]) for key in sorted(groups)}


def average(values: list):
    """Mean of numbers, of lists place by place (to 0.1), of dicts key by key; of anything else the first."""
    first = values[0]
    if isinstance(first, dict):
        return {key: average([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [round(average(part), 1) for part in zip(*values)]
    return statistics.mean(values) if all(isinstance(value, (int, float)) for value in values) else first


class Questions:
    """Several questions about each clip. Accuracy: a question is right if its whole answer is."""
    kind, model, needs = 'questions', {}, ''       # key in RUNS, options of the model, what --data must have
    source, vocab_name = ('batch', 'batch'), 'vocab'   # of the dataset: methods (held-out, training), words
    without = 'window', 'silence_weight'           # options that would do nothing
    columns = 'accuracy step_ms memory_mb first_ms tokens_per_s decoder_gflops tok_density'.split()

    def __init__(self, s, data):
        check(not self.needs or s.data == 'shapes', f'--recipe {s.recipe} needs --data shapes: {self.needs}')
        check(s.batch != 1 or s.eval or s.bench or not (RECIPES[s.recipe].blind or self.kind == 'retrieval'),
              f'--recipe {s.recipe} learns from other clips of a batch; wanted --batch 2 or more')
        self.s, self.data, self.vocab = s, data, getattr(data, self.vocab_name)
        # Coarse clips first (Wu et al., arXiv 1912.00998): less to compute, and what moves is seen sooner.
        self.coarse = data.halved() if s.coarse_steps() else data

    def draw(self, split: str, step: int, size: int):
        """A batch on the run's device. A blind run trains with the video of another clip of the batch."""
        trains = split == 'train'
        data = self.coarse if trains and step < self.s.coarse_steps() else self.data
        batch = getattr(data, self.source[trains])(split, step, size, self.s.device)
        blind = trains and RECIPES[self.s.recipe].blind
        return batch._replace(video=batch.video.roll(1, 0)) if blind else batch

    def held_out(self, split: str, clips: int, size: int = 64):
        """Batches of at most `size` held-out clips."""
        batches = (self.draw(split, step, min(size, clips)) for step in range(math.ceil(clips / size)))
        return itertools.takewhile(lambda batch: len(batch.text), batches)

    def few(self, batch):
        """A batch with no more questions about a clip than a training step has."""
        text, targets = (a[:, :self.data.questions] for a in (batch.text, batch.targets))
        return batch._replace(text=text, targets=targets)

    def liveliest(self):
        """Held-out clip that moves most (T, 3, height, width), a question's ids (L,), words, its answer."""
        batch = self.draw('test', 0, min(64, EVAL_CLIPS))
        change = (batch.video[:, 1:] - batch.video[:, :-1]).abs().mean((2, 3, 4)).cpu()      # (B, T - 1)
        video, text, targets = (a[int(change.median(1).values.argmax())] for a in batch[:3])
        asked, told = split_question(text[0], targets[0])
        return video, asked, in_words(asked, self.vocab), in_words(told, self.vocab)

    def wanted(self, batch):
        """Which words the logits should choose."""
        return batch.targets

    def forward(self, model, batch, targets=None):
        """What the model makes of a batch: logits, loss, aux."""
        asked = (batch.targets != IGNORE).int().argmax(-1) + 1         # (B, Q) words of each question
        with nullcontext() if model.reducer.steady else sdpa_kernel(ANY_LENGTH):
            return model(batch.video, batch.text, targets, asked)

    def loss(self, model, batch):
        """-> loss, share of what is right: 0-dim tensors. Of several processes, this one's part of both: the
        loss weighs by its share of the words to learn, what is right by its share of the clips."""
        own = Batch(*(a.tensor_split(WORLD)[RANK] for a in batch if a is not None))
        logits, loss, _ = self.forward(model, own, own.targets)
        right = is_right(logits, self.wanted(own)).float().mean()
        mine, all_words = ((self.wanted(a) != IGNORE).sum() for a in (own, batch))
        return loss * (mine / all_words.clamp(min=1)), right * len(own.text) / len(batch.text)

    @torch.no_grad()
    def evaluate(self, model, split: str, clips: int, blind: bool = True) -> dict:
        """Shares of right answers on held-out clips: overall, by type, balanced over a type's answers, by a
        type's most frequent answer (chance), and, if asked, with another clip's video (blind)."""
        right, guessed, rows, infos = [], [], [], []
        for batch in self.held_out(split, clips):
            shown = [(batch.video, right)]
            if blind and len(batch.video) > 1:                 # the last batch may have no other clip to show
                shown.append((batch.video.roll(len(batch.video) // 2, 0), guessed))
            # As many clips at a time as training fits, fewer where more is asked about each.
            asked = self.data.questions
            size = max(1, self.s.batch * asked // max(asked, batch.text.size(1)))
            for video, found in shown:
                for part in map(Batch, *(a.split(size) for a in (video, *batch[1:4]))):
                    with self.s.autocast():
                        logits, _, aux = self.forward(model, part)
                    found += is_right(logits, part.targets)[part.kind >= 0].float().tolist()
                    infos += [aux['reduced'].info] if found is right else []
            rows += [(kind, *answer[answer != IGNORE].tolist()) for kind, answer in
                     zip(batch.kind.flatten().tolist(), batch.targets.flatten(0, 1).cpu()) if kind >= 0]
        kinds, by_answer, counts = [kind for kind, *_ in rows], means(right, rows), Counter(rows)
        most = {kind: max(n for row, n in counts.items() if row[0] == kind) for kind in sorted({*kinds})}
        types = dict(accuracy=means(right, kinds),
                     blind=dict.fromkeys(sorted({*kinds}), math.nan) | means(guessed, kinds),
                     balanced_accuracy=means([*by_answer.values()], [kind for kind, *_ in by_answer]),
                     chance={kind: n / kinds.count(kind) for kind, n in most.items()})
        of_all = {key: torch.cat([info[key] for info in infos]) if torch.is_tensor(value) else value
                  for key, value in infos[0].items()}
        return dict(accuracy=statistics.fmean(right), blind_accuracy=statistics.fmean(guessed or [math.nan]),
                    questions=len(rows), chance=sum(most.values()) / len(rows), **model.reducer.facts(of_all),
                    **{f'{key}_by_type': {self.data.kinds[kind]: share for kind, share in found.items()}
                       for key, found in types.items()})

    def cost(self, model) -> dict:
        """Vision tokens of each layer, their keys and values, GFLOPs of a clip, mean over some. paper_share:
        FLOPs of the blocks on vision tokens alone, as a share of dense, as papers that merge count it."""
        c, found = model.config, []
        paper = lambda tokens: sum(24 * n * c.dim ** 2 + 4 * n * n * c.dim for n in tokens)
        for batch in self.held_out('test', COST_CLIPS, 1):
            batch = self.few(batch)
            flops, (_, _, aux) = count_flops(model, lambda: self.forward(model.eval(), batch))
            (Q, L), N = batch.text.shape[1:], batch.video.size(1) * c.patches
            layers = [n - L * (1 if model.by_question else Q) for n in aux['tokens']]
            found.append(dict(vision_by_layer=layers, decoder_tokens=aux['reduced'].tokens.size(1),
                              cache_kb=8 * c.dim * sum(layers) / 1000,         # keys, values, 4 bytes each
                              gflops=flops['total'] / 1e9, decoder_gflops=flops['blocks'] / 1e9,
                              paper_share=paper(layers) / paper([N] * c.n_layer)))
        return average(found)

    def timed(self, model, batch):
        """-> functions to time, and what makes columns of their median seconds. Here: all that comes before
        an answer's first word; the same and WORDS words."""
        ends = torch.tensor([-math.inf] * 2 + [0.0] * (len(self.vocab) - 2))
        model.head.bias = torch.nn.Parameter(ends.to(model.head.weight))       # never ends
        answer = lambda n: model.generate(batch.video, batch.text[:, :1], n)
        return [lambda: answer(0), lambda: answer(WORDS)], lambda first, whole: dict(
            first_ms=1000 * first, tokens_per_s=WORDS * len(batch.text) / max(whole - first, 1e-9))

    def print_table(self, result: dict):
        """The scores, by type of question."""
        found = [result[f'{key}_by_type'] for key in ('accuracy', 'balanced_accuracy', 'blind', 'chance')]
        codes = ', codes in use {codes_used:.1%}, perplexity {perplexity:.1f}' * ('codes_used' in result)
        print('', table([['type', 'accuracy', 'balanced', 'blind', 'chance'],
                         *([name, *(of[name] for of in found)] for name in found[0]),
                         ['all', result['accuracy'], '', result['blind_accuracy'], result['chance']]]),
              ('{questions} questions about held-out clips\n{decoder_tokens:.1f} vision tokens enter the '
               'decoder, TokDense {tok_density:.3f}' + codes).format(**result), sep='\n')

    def show(self, model, run: Path) -> str:
        """Some answers, pictures of one held-out clip -> the flags that go on with it."""
        batch, right, wrong = self.few(self.draw('test', 0, 8)), [], []
        pairs = [split_question(*pair) for pair in zip(batch.text.flatten(0, 1), batch.targets.flatten(0, 1))]
        asked, told = (torch.nn.utils.rnn.pad_sequence(a, True, PAD) for a in zip(*pairs))
        said = model.generate(batch.video, asked.view(*batch.text.shape[:2], -1), told.size(1) + 1)
        for ids in zip(asked, told, said.flatten(0, 1)):
            question, truth, answer = (in_words(a, self.vocab) for a in ids)
            note = '' if answer == truth else f'   <- wrong, it is: {truth}'
            (wrong if note else right).append(f'  {question}? {answer}{note}')
        # Up to five, at most one of them a mistake.
        print('', *right[::max(1, len(right) // 5)][:5 - len(wrong[:1])], *wrong[:1], sep='\n')
        video, asked, question, answer = self.liveliest()
        whole(run / 'clip.webp', lambda part: save_clip(video, part))
        draw_clip(model, video, asked[None], run / 'tokens', f'{question}? {answer}')
        return as_typed(['--ask', str(run / 'clip.webp'), question])


class Streams(Questions):
    """Narrate and answer while a video plays. Accuracy: faultless turns; in a training step, streams."""
    kind, model, needs = 'streams', dict(streaming=True), 'clips that say what happens when'
    source, without = ('stream', 'stream'), ()
    columns = 'accuracy fluency time_diff step_ms memory_mb frames_per_s cache_kb decoder_gflops'.split()

    def wanted(self, batch):
        """Decisions (B, T), then words (B, L), as in the logits."""
        return torch.cat([batch.decisions, batch.targets[:, 0]], 1)

    def forward(self, model, batch, targets=None):
        logits, loss, aux = model(batch.video, batch.text, targets, None, batch.after, batch.decisions)
        return torch.cat([aux['decisions'], logits[:, 0]], 1), loss, aux       # (B, T + L, V)

    @torch.no_grad()
    def evaluate(self, model, split: str, clips: int, blind: bool = True) -> dict:
        """Scores on held-out streams: teacher-forced (once more with other videos if blind), running free."""
        rows, spoke, due = [], [], []
        for batch in self.held_out(split, clips):
            prompt, scores = torch.full_like(batch.text[:, 0, :1], self.vocab.index(PROMPT)), []
            frame = torch.arange(batch.video.size(1), device=prompt.device)
            after = torch.cat([frame.expand_as(batch.decisions), batch.after], 1)      # frame before each
            with self.s.autocast():
                for shown in [batch, batch._replace(video=batch.video.roll(1, 0))] if blind else [batch]:
                    parts = zip(*(a.split(self.s.batch) for a in shown))       # as many as training fits
                    logits = torch.cat([self.forward(model, Batch(*part))[0] for part in parts])
                    scores.append(turn_scores(logits, self.wanted(batch), after, len(frame), self.s.theta))
                frames = ((frame, None) for frame in batch.video.unbind(1))
                silence = [moment['silence'] for moment in model.stream(frames, prompt, self.s.theta)]
            rows.append(dict(scores[0], blind_accuracy=scores[1]['accuracy'] if blind else math.nan))
            spoke.append(torch.stack(silence, 1).cpu() < self.s.theta)
            due.append(batch.decisions.cpu() != EOS)
        mean = average(rows)
        return dict(mean, clips=sum(map(len, spoke)), **timing_scores(torch.cat(spoke), torch.cat(due)))

    def timed(self, model, batch):
        watch = lambda: list(model.stream(((x, None) for x in batch.video.unbind(1)), None, 0.0))
        return [watch], lambda took: dict(frames_per_s=batch.video.size(1) / took)

    def print_table(self, result: dict):
        shares = {'LM-Correctness': 'lm_correctness', 'Fluency': 'fluency',
                  'turns without a mistake': 'accuracy', "the same, another clip's video": 'blind_accuracy',
                  'narrated in the very frame': 'spoken', 'silent when nothing happens': 'silence'}
        print('', table([[f'{result["clips"]} held-out streams', ''], ['LM-PPL', f'{result["lm_ppl"]:.3f}'],
                         *([name, result[key]] for name, key in shares.items()),
                         ['TimeDiff, frames', f'{result["time_diff"]:.3f}']]), sep='\n')

    def show(self, model, run: Path) -> str:
        video = self.liveliest()[0].cpu()
        whole(run / 'clip.webp', lambda part: save_clip(video, part))
        print()
        narrate(model.cpu(), video, run / 'narration.png', self.s.theta, {})
        draw_clip(model, video, torch.tensor([[self.vocab.index(PROMPT)]]), run / 'tokens', PROMPT)
        return as_typed(['--stream', str(run / 'clip.webp')])


def turn_scores(logits, wanted, after, T: int, theta: float) -> dict:
    """Teacher-forced scores of streams: logits (B, T + L, V), wanted and after which frame (B, T + L).

    A turn: silences, then words up to their '<eos>'. Of each, then their mean, as in VideoLLM-online's code:
    lm_ppl, exp(mean -log P of its words); lm_correctness: index of its first wrong word / its words; fluency:
    the same with its silences counted. accuracy: turns whose every word is right.
    """
    chosen, silent = logits.argmax(-1), logits[:, :T].softmax(-1)[..., EOS] >= theta
    chosen[:, :T] = torch.where(silent, EOS, EOS + 1 + logits[:, :T, EOS + 1:].argmax(-1))     # or a word
    word = wanted != IGNORE                                                    # (B, T + L)
    word[:, :T] &= wanted[:, :T] != EOS
    nll, turns = F.cross_entropy(logits.mT, wanted, ignore_index=IGNORE, reduction='none'), []
    order = after.argsort(dim=1, stable=True)                                  # in time
    parts = word & (wanted == EOS), wanted != IGNORE, chosen == wanted, word, nll      # (B, T + L) each
    for ends, kept, *row in zip(*(part.gather(1, order).cpu() for part in parts)):
        cuts = ends[kept].nonzero()[:, 0] + 1
        for fine, said, loss in zip(*(part[kept].tensor_split(cuts) for part in row)):     # of a turn
            if said.any():                                                     # or it is silent to the end
                turns.append([loss[said].mean().exp(), fine[said].cumprod(0).float().mean(),
                              fine.cumprod(0).float().mean()])
    ppl, share, fluency = torch.tensor(turns).T
    return dict(lm_ppl=ppl.mean().item(), lm_correctness=share.mean().item(), fluency=fluency.mean().item(),
                accuracy=(share == 1).float().mean().item())


def timing_scores(spoke, should) -> dict:
    """How a model that runs freely times its narration: spoke, should (B, T) bool. spoken: in the very frame.
    time_diff (TimeDiff): mean |frame due - first frame spoken between the narrations before and after it|;
    where it stays silent there, the frame of the next one counts."""
    T, off = should.size(1), []
    for said, due in zip(spoke.tolist(), should.tolist()):
        times = [t for t in range(T) if due[t]]
        for before, t, after in zip([-1, *times], times, [*times[1:], T]):
            first = next((f for f in range(before + 1, after) if said[f]), after)
            off.append(abs(first - t))
    return dict(time_diff=statistics.mean(off), silence=(~spoke[~should]).float().mean().item(),
                spoken=spoke[should].float().mean().item())


class Retrieval(Questions):
    """Clips and sentences find each other. Accuracy: sentences whose clip is found first (R@1)."""
    kind, model, needs = 'retrieval', dict(model='retriever'), 'a sentence for every clip'
    source, vocab_name, single = ('captions', 'captions'), 'caption_vocab', False
    without = ('dim n_head encoder_layers placement keep_ratio routing reducer stage window silence_weight '
               'gate').split()
    columns = 'accuracy r_sum direction_pairs order_pairs step_ms memory_mb encode_ms gflops'.split()

    def loss(self, model, batch):
        """-> loss, share of sentences whose clip is found first among the batch."""
        similarity, loss = model(batch.video, batch.text)      # (B, B) sentence by clip
        own = torch.arange(len(similarity), device=similarity.device)[:, None]
        return loss, is_right(similarity[:, None], own).float().mean()

    @torch.no_grad()
    def evaluate(self, model, split: str, clips: int, blind: bool = True) -> dict:
        """Recall both ways, R-Sum, how often a clip prefers its own sentence to its twin's, which differs in
        a direction or in the order of events: 50 % by chance. All sentences differ. No blind score."""
        seen, found, clips = set(), [], min(clips, FIND_CLIPS)
        for batch in self.held_out(split, 10 ** 9):
            sentences, new = [in_words(ids, self.vocab) for ids in batch.text], []
            half = len(sentences) // 2
            for i, pair in enumerate(zip(sentences[:half], sentences[half:])):
                if seen.isdisjoint(pair) and len(seen) < clips:
                    seen.update(pair)
                    new += [i, i + half]
            with self.s.autocast():
                found.append((model.encode_video(batch.video[new]), model.encode_text(batch.text[new]),
                              batch.turned[new]))
            if len(seen) >= clips:
                break
        video, text, turned = (torch.cat(a).cpu() for a in zip(*found))
        similarity, own = text @ video.T, torch.arange(len(text))      # (n, n) sentence by clip, (n,)
        ways = {'sentence to clip': recall(similarity), 'clip to sentence': recall(similarity.T)}
        right = (similarity.diag() > similarity[own ^ 1, own]).float()     # own ^ 1: its twin
        return dict(accuracy=ways['sentence to clip']['R@1'] / 100, recall=ways, clips=len(text),
                    r_sum=sum(way[f'R@{k}'] for way in ways.values() for k in (1, 5, 10)),
                    direction_pairs=right[turned].mean().item(), order_pairs=right[~turned].mean().item())

    def cost(self, model) -> dict:
        """Tokens of each layer of the encoder, GFLOPs of encoding a clip, or a single frame."""
        c, T = model.config, 1 if self.single else model.config.frames
        video = next(model.parameters()).new_zeros(1, T, 3, c.frame_size, c.frame_size)
        encoder = copy.deepcopy(model.encoder)
        merge_lora(encoder)                                    # as it is used
        flops, _ = count_flops(encoder, lambda: encoder(video))
        return dict(vision_by_layer=[clips * n for clips, _, n in model.encoder.counts(T)],
                    gflops=round(flops['total'] / 1e9, 4))

    def timed(self, model, batch):
        merge_lora(model)                                      # as it is used
        encode = lambda: model.encode_video(batch.video)
        return [encode], lambda took: dict(encode_ms=1000 * took)

    def print_table(self, result: dict):
        ways = result['recall']
        print('', table([[f'{result["clips"]} held-out clips', *ways['sentence to clip']],
                         *([way, *(f'{n:.1f}' for n in row.values())] for way, row in ways.items())]),
              'R-Sum {r_sum:.1f}; the right one of two sentences that differ in a direction '
              '{direction_pairs:.1%}, in the order of events {order_pairs:.1%} (chance 50%)'.format(**result),
              sep='\n')

    def show(self, model, run: Path) -> str:
        """tokens.png: what merged of one held-out clip; find.png: the first five clips for its sentence."""
        batch = self.draw('test', 0, 64)
        names, first = [in_words(ids, self.vocab) for ids in batch.text], batch.video[0]
        merged = None if self.single else model.encoder(batch.video[:1]).reduction
        tokens = len(first) * model.config.patches if self.single else merged.position.size(1)
        rows = [(names[0], draw_big(first)), (f'{tokens} tokens', draw_big(first, merged))]
        whole(run / 'tokens.png', stack(rows).save)
        whole(run / 'clip.webp', lambda part: save_clip(first, part))
        rank_clips(model, batch.video, names, names[0], run / 'find.png')
        return '--find "a red circle moves left"'


class Frames(Retrieval):
    """The same, trained with single frames: what retrieval begins with."""
    source, single = ('captions', 'captioned_frames'), True


def recall(similarity) -> dict:
    """(n, n), row i belongs to column i -> R@1, R@5, R@10 in percent, median rank from 1 on. The earlier of
    equal columns is first, what is not a number last."""
    order = similarity.nan_to_num(-math.inf).argsort(dim=1, descending=True, stable=True)
    own = torch.arange(len(order), device=order.device)[:, None]
    rank = (order == own).int().argmax(1)                                      # (n,) 0 = found first
    return {**{f'R@{k}': 100 * (rank < k).float().mean().item() for k in (1, 5, 10)},
            'median rank': (rank + 1).float().quantile(0.5).item()}


# ---- 3. Recipes --------------------------------------------------------------------------------------------
# One table. A row says what it begins with, what it changes, how long it trains; --recipe runs one, and first
# what it begins with; --compare and --bench walk those of a task. Every reducer of modvideo.py has a row.

class Recipe(NamedTuple):
    """A row. A value of `changes` may be a function of the preset."""
    changes: dict = {}         # options of the model
    begins: str = ''           # the row whose weights it starts with
    share: float = 1.0         # of the preset's steps
    task: type = Questions
    aside: bool = False        # --compare runs it only where --rows names it
    blind: bool = False        # trained with another clip's video: what words alone can tell

    def steps(self, whole: int) -> int:
        """Its share of so many steps, one at least if it trains."""
        return max(int(self.share > 0), round(self.share * whole))


HALF = lambda preset: max(1, preset['n_layer'] // 2)
SECOND = lambda preset: ','.join(map(str, range(0, preset['n_layer'] - 1, 2)))
AS_MANY = lambda preset: 1 - 0.75 * HALF(preset) / max(1, preset['n_layer'] - 1)
RANKED, RANDOM = (lambda preset, way=way: f'{way}:{HALF(preset)}' for way in ('rank', 'random'))
DEEP = dict(placement=lambda preset: 'all-deep' if preset['n_layer'] > 3 else 'all', gate='zero')
MERGED, TEMPME = dict(reducer='holitom', retain_ratio=0.5), dict(encoder='tempme')
HOLITOM = dict(reducer='holitom', tau=0.97)                # chosen on validation clips of preset wide
LATE = lambda preset: round(18 / 28 * preset['n_layer'])   # the stage's layer, as deep as HoliTom's
LORA = dict(lora_rank=lambda preset: 2 if preset['dim'] < 256 else 4)     # at most 1 % of the weights
GAMMA = dict(routing='gamma', keep_ratio=0.25)
# Shares that merge: in frames of many patches twice as many, and across clips 0.4, as in the paper's B/16.
MANY = lambda many, few: lambda preset: many if preset['frame_size'] > 32 else few
JOINED = dict(TEMPME, merge_image=MANY(0.15, 0.07), merge_cross=MANY(0.4, 0.3))
RECIPES = {
    'dense': Recipe(), 'blind': Recipe(aside=True, blind=True),
    'gaps': Recipe(dict(reducer='gaps'), 'dense'),             # what most rows begin with
    'mod': Recipe(dict(placement='interleaved'), aside=True),                  # from scratch: the main job
    'mod-interleaved': Recipe(dict(placement='interleaved'), 'gaps', 0.2),     # as VideoLLM-MoD places it
    'mod-all-deep': Recipe(DEEP, 'gaps', 0.2),
    'mod-all': Recipe(dict(placement='all', gate='zero'), 'gaps', 0.2),
    # 0.45 of 1,024 vision tokens: half of all tokens skip, as in the paper.
    'gamma': Recipe(dict(GAMMA, placement='rank', keep_ratio=0.45), 'gaps', 0.2),
    # Which layers? Half of them skip three quarters, or all of them as many tokens together, which costs
    # 3 to 15 % fewer FLOPs, as attention is quadratic.
    'gamma-ranked': Recipe(dict(GAMMA, placement=RANKED), 'gaps', 0.2, aside=True),
    'gamma-random': Recipe(dict(GAMMA, placement=RANDOM), 'gaps', 0.2, aside=True),
    'gamma-second': Recipe(dict(GAMMA, placement=SECOND), 'gaps', 0.2, aside=True),
    'gamma-all': Recipe(dict(GAMMA, placement='all', keep_ratio=AS_MANY), 'gaps', 0.2, aside=True),
    'holitom': Recipe(HOLITOM, 'gaps', 0.0),
    'holitom-inner': Recipe(dict(HOLITOM, stage='holitom', stage_layer=LATE), 'gaps', 0.0),
    'holitom-trained': Recipe(MERGED, 'gaps', 0.2),
    'uniform': Recipe(dict(reducer='uniform'), 'gaps', 0.2),                   # trained as long as bvllm
    'vqtoken-adaptive': Recipe(dict(reducer='vqtoken', codes=0), 'gaps', 0.2, aside=True),
    'tempme': Recipe(TEMPME, 'gaps', 0.2),
    'mod+holitom': Recipe(MERGED | DEEP, 'gaps', 0.2),
    'mod+vqtoken': Recipe(dict(DEEP, reducer='vqtoken'), 'gaps', 0.2),
    'mod+tempme': Recipe(TEMPME | DEEP, 'gaps', 0.2),
    'stream-dense': Recipe(task=Streams), 'stream': Recipe(dict(placement='interleaved'), task=Streams),
    'frames': Recipe(task=Frames),                                             # then clips, in four ways
    'full': Recipe({}, 'frames', 0.44, Retrieval), 'lora': Recipe(LORA, 'frames', 0.44, Retrieval),
    'retrieval': Recipe(JOINED, 'frames', 0.44, Retrieval),
    'lora-merging': Recipe(LORA | JOINED, 'frames', 0.44, Retrieval)}
for name in [name for name in REDUCERS if name != 'none']:
    RECIPES.setdefault(name, Recipe(dict(reducer=name), 'gaps', 0.0 if REDUCERS[name].untrained else 0.2))


class Plan(NamedTuple):
    """What a preset trains a kind of task with."""
    batch: int                 # clips a step
    steps: int
    coarse: float = 0.0        # share of the steps, the first ones, on coarse clips
    lr: float = 0.01           # of the matrices


# Of each preset: the plan of a kind of task, and how many questions a clip is asked.
RUNS = {'tiny': dict(questions=Plan(8, 100), streams=Plan(8, 100), retrieval=Plan(16, 20), asked=4),
        'cpu': dict(questions=Plan(8, 1600, lr=0.006), streams=Plan(8, 1800),
                    retrieval=Plan(64, 500), asked=8),
        'wide': dict(questions=Plan(16, 1900, coarse=0.6, lr=0.006), streams=Plan(16, 1300),
                     retrieval=Plan(32, 600), asked=8),
        'gpu': dict(questions=Plan(64, 1200), streams=Plan(64, 1200), retrieval=Plan(128, 2000), asked=8),
        'deep': dict(questions=Plan(32, 2500), streams=Plan(32, 2500), retrieval=Plan(128, 2000), asked=8),
        'long': dict(questions=Plan(8, 2500), streams=Plan(8, 2500), retrieval=Plan(64, 2000), asked=8)}


def load_data(s, vocab: list = None):
    """The dataset of --data; sets s.model['frames']. vocab: of a trained model; ValueError: other words."""
    preset, grid = {**PRESETS[s.preset], **s.model}, parse_grid(s.grid)
    shape = dict(size=preset['frame_size'], questions=RUNS[s.preset]['asked'], seed=s.seed)
    if s.data == 'shapes':
        return ShapeWorld(frames=preset['frames'], **shape)
    if 'frames' not in s.model:      # real motion is fast: all frames of the first clip, up to a limit
        first = read_rows(Path(s.data))[0]
        frames = len(read_clip(Path(s.data, first['file']), first.get('grid', grid), size=1))
        s.model = dict(s.model, frames=min(frames, 2 * preset['frames']))
    check(s.model['frames'] > 1, 'a clip needs at least 2 frames, got 1; see --frames and --grid')
    return ClipFolder(s.data, frames=s.model['frames'], grid=grid, vocab=vocab, **shape)


def build(s, task, dense=None):
    """The model of a row: the preset, what the row changes, the flags, in this order. Its weights are a
    function of the seed, or those of `dense`. ValueError: a flag that does not fit, or does nothing."""
    preset, recipe = {**PRESETS[s.preset], **s.model}, RECIPES[s.recipe]
    changes = {name: value(preset) if callable(value) else value for name, value in recipe.changes.items()}
    values = {**preset, **recipe.task.model, **changes, **s.model}
    own = {f.name: values.pop(f.name) for f in fields(ModVideoConfig) if f.name in values}
    config = ModVideoConfig(vocab=list(task.vocab), options=values, **own)
    if config.placement.startswith(('rank', 'random')):
        fits = dense is not None and not getattr(dense, 'mod_layers', True) and not dense.config.streaming
        check(fits, f'--placement {config.placement} chooses layers of a dense model; see --init-from')
        config.placement = ','.join(map(str, sorted(chosen_layers(s, task, dense, config.placement))))
    torch.manual_seed(s.seed)
    model = config.build('model', config).to(s.device)
    routes = {'keep_ratio', 'routing', *options_of(ROUTINGS[config.routing])}
    idle = {*recipe.task.without} | (set() if getattr(model, 'mod_layers', [0]) else routes)
    for name in idle & {*s.model}:
        raise ValueError(f'{dashed(name)} would do nothing with --recipe {s.recipe}: no layer of it routes, '
                         'or it has no such part')
    check(config.placement == 'none' or model.mod_layers, f'--placement {config.placement} routes no layer '
          f'of {config.n_layer} (the last one stays dense); try --placement all')
    if dense is not None:
        if not config.options.get('lora_rank'):
            merge_lora(dense)                                  # what LoRA learned is part of the weights
        init_from(model, dense)
    return model


def untrained(s, data):
    """The model of a row, begun from untrained weights. ValueError: flags that do not fit the row."""
    task, first = RECIPES[s.recipe].task(s, data), base_of(s)
    dense = build(first, task) if first.recipe else None
    with redirect_stdout(None), torch.no_grad():               # ranks of such weights say nothing
        model = build(s, task, dense).eval()
        task.loss(model, task.draw('train', 0, 2))             # some numbers are refused by the first pass
    return model


def base_of(s, **more):
    """Settings of what a row begins with: of the model's options those that decide its shape."""
    shape = {name: value for name, value in s.model.items() if name in (*PRESETS[s.preset], 'patch_size')}
    return replace(s, recipe=RECIPES[s.recipe].begins, model=shape, **more)


def chosen_layers(s, task, dense, which: str, clips: int = 8) -> list:
    """Which layers of a dense model to convert, not the last. 'rank': those whose attention has the lowest
    rank, all but an eighth. 'rank:2': two. 'random:2': any two. ValueError: another number or word."""
    depth, (way, _, count) = dense.config.n_layer, which.partition(':')
    count = depth - max(1, depth // 8) if way == which else int(count) if count.isdecimal() else 0
    check(0 < count < depth and way in ('rank', 'random'), f'--placement {which}: wanted rank or random, and '
          f'from 1 to {depth - 1} layers, such as rank:1')
    if way == 'random':
        return torch.randperm(depth - 1, generator=torch.Generator().manual_seed(s.seed))[:count].tolist()
    batches = (task.draw('train', s.steps + step, 1) for step in range(clips))       # after the coarse ones
    ranks = sum(layer_ranks(dense.eval(), batch.video, batch.text[:, :1]).cpu() for batch in batches) / clips
    chosen = choose_mod_layers(ranks[0, :-1], depth - 1 - count)
    print(f'\nlayer  ARank  effective rank   over {clips} clips; the lowest {len(chosen)} are converted')
    for i, (rank, effective) in enumerate(ranks.T.tolist()):
        print(f'{i:5} {rank:6.1f} {effective:15.1f}   {"MoD" if i in chosen else "dense"}')
    return chosen


# ---- 4. Runs -----------------------------------------------------------------------------------------------

def whole(path, make):
    """make(a temporary path), which then takes its place: a file is there whole or not at all."""
    part = Path(path).with_name(f'train_tiny.part{os.getpid()}{Path(path).suffix}')
    try:
        make(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write(path, what):
    """Write text, or a dict as JSON, in which NaN and infinity become null, as a whole file."""
    if isinstance(what, dict):
        what = json.dumps(json.loads(json.dumps(what), parse_constant=lambda _: None), indent=1)
    whole(path, lambda part: part.write_text(what, encoding='utf-8'))


def read_json(path: Path, made=dict):
    """What `made` makes of a file that a run wrote. ValueError: it is something else."""
    try:
        return made(json.loads(path.read_text(encoding='utf-8')))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'{path} is not what a run wrote ({type(error).__name__})') from None


def settings_of(run: Path):
    """The Settings in a run's config.json. ValueError: it is not what this version wrote."""
    s = read_json(run / 'config.json', lambda file: Settings(**file['settings']))
    own = {f.name: (*get_args(f.type), type(f.default)) for f in fields(s)}
    kinds = {**own, **model_flags(), 'model': [dict]}
    for values in (vars(s), s.model):
        for name, value in values.items():
            fits = type(value) is not str or value in CHOICES.get(name, [value])
            check(type(value) in kinds.get(name, ()) and fits, f'{run / "config.json"} is not what this '
                  f'version wrote: {name} is {value!r}')
    return s


def must_agree(folder: Path, before: dict, asked: dict):
    """ValueError: what is asked of a folder is not what it was begun with."""
    for name, value in asked.items():
        wanted = 'the default' if value is None else value
        flag = name if name == 'model' else dashed(name)
        check(name in before and before[name] == value, f'{folder} was begun with another {flag} '
              f'than {wanted}, or by another version of this script; leave that out, or begin elsewhere')


class Run:
    """A run's folder: made, saved into, resumed, finished. An existing one is never written over."""
    COLUMNS = 'step', 'loss', 'accuracy', 'val_accuracy', 'lr', 'seconds'      # of log.csv
    LOCK = 'train_tiny.lock'                                   # a file that is there while it runs
    PART = re.compile(r'train_tiny\.part\d+\..+|ckpt\.pt\.part\d+')   # of whole(), save_checkpoint, if killed

    def __init__(self, s):
        self.s, self.log, self.before, self.optimizers, self.done = s, [], 0.0, None, 0    # before: seconds
        name = f'out/{s.recipe}-{s.name_of_data()}-{s.preset}-seed{s.seed}'
        free = (Path(name + (f'-{i}' if i > 1 else '')) for i in itertools.count(1))
        self.path = Path(s.resume or s.out or next(path for path in free if not path.exists()))
        if RANK:                                               # the first process writes
            self.path = Path(tempfile.mkdtemp(), 'run')
        self.check_free()

    def check_free(self):
        """ValueError: something is in the folder of a new run, other than what a killed one left."""
        if self.path.exists() and not self.s.resume:
            inside = self.path.iterdir() if self.path.is_dir() else [self.path]
            files = {path.name for path in inside if not self.PART.fullmatch(path.name)} - {self.LOCK}
            hint = f', or go on with it: --resume {self.path}' if 'ckpt.pt' in files else ''
            check(files <= {'config.json', 'log.csv'}, f'--out {self.path} exists; name another folder{hint}')
            if files:
                settings_of(self.path)                         # killed before a checkpoint; not a stranger's

    def claim(self):
        """Make the folder, for this process alone where files lock. ValueError: another one was faster."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.path / self.LOCK, 'w')
        try:
            import fcntl
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f'another process trains in {self.path}; name another folder') from None
        except (ImportError, OSError):                         # Windows, a file system without locks
            pass
        self.check_free()
        for path in [path for path in self.path.iterdir() if self.PART.fullmatch(path.name)]:
            path.unlink()                                      # of one that was killed while it wrote

    def begin(self, task):
        """The model: as an interrupted run left it, or new; what its row begins with is trained first."""
        s = self.s
        if s.resume:
            model, extra = load_checkpoint(Path(s.resume, 'ckpt.pt'), s.device)
            check(model.config.vocab == [*task.vocab], f'{self.path} was trained on clips with other words')
            self.read_progress(model, **extra)
            if self.done > s.steps or self.done == s.steps and (self.path / 'result.json').exists():
                raise ValueError(f'{self.path} already has {self.done} steps; ask for more with --steps')
            return model
        if RECIPES[s.recipe].begins and not s.init_from:
            first = base_of(s, steps=0, out=f'{self.path}-{RECIPES[s.recipe].begins}')
            print(f'--recipe {s.recipe} begins with {first.recipe}, which trains first, in {first.out}')
            untrained(s, task.data)                            # refuses what does not fit
            if Path(first.out, 'config.json').exists():        # begun by a run that was stopped
                saved, own = settings_of(Path(first.out)), 'recipe preset data grid seed batch coarse lr'
                names = [*own.split(), *saved.model, *first.model]
                must_agree(Path(first.out), saved.flags(), {name: first.flags().get(name) for name in names})
            finish(first)
            s.init_from = first.out
        dense = load_checkpoint(Path(s.init_from, 'ckpt.pt'), s.device)[0] if s.init_from else None
        return build(s, task, dense)

    def read_progress(self, model, optimizers=None, log=None, **other):
        """What save() wrote besides the model. ValueError: it is something else."""
        try:
            self.optimizers = configure_optimizer(model, self.s.rate())
            for optimizer, saved in zip(self.optimizers, optimizers, strict=True):
                optimizer.load_state_dict({**optimizer.state_dict(), 'state': saved['state']})
                for p, own in optimizer.state.items():
                    check(all(a.shape in (p.shape, ()) for a in own.values()), 'a state of another optimizer')
            self.log = [{name: row[name] for name in (*self.COLUMNS, 'ms')} for row in log]
            numbers = [value for row in self.log for value in row.values() if value != '']
            check(all(map(math.isfinite, numbers)), 'a log of something else')
            for row in self.log[-1:]:
                self.done, self.before = row['step'].__index__(), row['seconds']
        except Exception:       # of damaged states torch raises many types
            raise ValueError(f'{self.path / "ckpt.pt"} holds a model, but no run to go on with') from None

    def save(self, model):
        """Checkpoint and log.csv: all that a resumed run needs."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        save_checkpoint(self.path / 'ckpt.pt', model, optimizers=states, log=self.log)
        lines = [self.COLUMNS, *([str(row[name]) for name in self.COLUMNS] for row in self.log)]
        write(self.path / 'log.csv', '\n'.join(map(','.join, lines)) + '\n')

    def train(self, model, task):
        """The steps left, held-out accuracy at each tenth. KeyboardInterrupt: Ctrl-C; all is saved."""
        s, start, stop = self.s, time.time(), []
        every, fast = 10 * max(1, s.steps // 100), torch.compile(model) if s.compile else model

        def report(row):
            self.log.append(dict(row, val_accuracy='', seconds=round(self.before + time.time() - start, 1)))
            tenth = row['step'] == s.steps or not stop and row['step'] % every == 0
            if tenth:
                found = task.evaluate(model.eval(), 'val', min(64, EVAL_CLIPS), blind=False)['accuracy']
                self.log[-1]['val_accuracy'] = round(found, 4)
                tqdm.write(f'step {row["step"]:5}  loss {row["loss"]:.3f}  accuracy {row["accuracy"]:6.1%}  '
                           f'held-out {found:6.1%}')
                model.train()
            if tenth or stop:
                self.save(model)

        def pressed(*_):
            """Ctrl-C ends training after the step, so that none is cut in two; a second one stops at once."""
            stop.append(True)
            signal.signal(signal.SIGINT, usual)
            os.write(2, b'\nstopping after this step\n')       # a signal may come while stderr is written

        usual = signal.signal(signal.SIGINT, pressed)
        try:
            train(model.train(), lambda step: task.draw('train', step, s.batch),
                  s.autocast()(lambda _, batch: task.loss(fast, batch)), s.steps, s.rate(), self.done,
                  self.optimizers, report, stop, s.recipe)
        finally:
            signal.signal(signal.SIGINT, usual)
        if stop:
            raise KeyboardInterrupt


def run_recipe(s, began: float = None):
    """Train, evaluate and show a row. began: when the script did, if this is all that it was asked for; then
    KeyboardInterrupt, of Ctrl-C, comes with the flags that go on."""
    start = began or time.time()
    set_up(s)
    task, run = RECIPES[s.recipe].task(s, load_data(s)), Run(s)
    model = run.begin(task)
    if s.device == 'cuda':
        torch.cuda.reset_peak_memory_stats()                   # not of what it begins with
    cost = task.cost(model)
    if s.coarse_steps() and not s.resume:
        task.loss(model, task.draw('train', 0, max(2, WORLD)))     # fails here if coarse clips do not fit
    if not (s.steps or s.resume) and task.kind == 'questions' and num_params(model.reducer):
        raise ValueError(f'reducer {model.config.reducer!r} has weights, and this row trains none; say '
                         'untrained = False in its class, or --steps')
    learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run.claim()                                                # not before the first pass, which may refuse
    (run.path / 'result.json').unlink(missing_ok=True)         # it goes on: not finished
    noted = dict(settings=asdict(replace(s, resume='', out='')), model=asdict(model.config))
    write(run.path / 'config.json', noted)
    try:
        print(f'{num_params(model):,} parameters, {learns:,} of them learn, layers process '
              f'{cost["vision_by_layer"]} vision tokens, {cost["gflops"]:.2f} GFLOPs a clip; {s.steps} steps '
              f'of {s.batch} clips -> {run.path}')
        run.optimizers = run.optimizers or configure_optimizer(model, s.rate())
        if s.steps > run.done:
            run.train(model, task)
        elif not s.resume:
            run.save(model)
        whole_steps = [row['ms'] for row in run.log if row['step'] > s.coarse_steps()]
        result = {name: getattr(s, name) for name in 'recipe seed device dtype preset data steps'.split()}
        result.update(torch=torch.__version__, placement=model.config.placement, **scores_of(task, model),
                      step_ms=round(statistics.median(whole_steps or [0.0]), 2),
                      parameters=num_params(model), learns=learns,
                      vision_tokens=model.config.frames * model.config.patches,
                      peak_memory_mb=round(peak_memory_mb(s.device), 1))
        task.print_table(result)
        go_on = task.show(model.eval(), run.path)
        if run.log:
            draw_curve(run.log, run.path / 'curve.png')
        result['seconds'] = round(run.before + time.time() - start, 1)
        write(run.path / 'result.json', result)
    except KeyboardInterrupt:
        alone = began and (run.path / 'ckpt.pt').exists()      # else what asked for this run goes on with it
        raise KeyboardInterrupt(*(['--resume', run.path] if alone else [])) from None
    run.lock.close()
    (run.path / run.LOCK).unlink()
    print(f'\ngo on with: python train_tiny.py {as_typed(["--out", str(run.path)])} {go_on}\n'
          f'{result["seconds"]:.0f} s, {result["step_ms"]:.0f} ms a step. In {run.path}: '
          + ', '.join(sorted(path.name for path in run.path.iterdir())))


def scores_of(task, model) -> dict:
    """Scores on all held-out clips, and what they cost."""
    scores = task.evaluate(model.eval(), 'test', EVAL_CLIPS if task.s.data == 'shapes' else 10 ** 9)
    scores.update(task.cost(model))
    if 'decoder_tokens' in scores:
        scores['tok_density'] = round(100 * scores['accuracy'] / scores['decoder_tokens'], 3)      # TokDense
    return scores


def finish(s) -> dict:
    """The result of the run in --out: as it is, gone on with, or trained from its start."""
    path = Path(s.out)
    if not (path / 'result.json').exists():
        resumes = (path / 'ckpt.pt').exists()
        run_recipe(replace(s, resume=s.out, out='') if resumes else replace(s))
    return read_json(path / 'result.json')


# ---- 5. Words and pictures ---------------------------------------------------------------------------------

def in_words(ids, vocab: list) -> str:
    """Word ids -> words, without padding and end marks."""
    return ' '.join(vocab[i] for i in torch.as_tensor(ids).tolist() if i not in (PAD, EOS)) or '(nothing)'


def split_question(text, targets):
    """Ids of one question (L,) and of its answer, without the end mark."""
    asked = text[:int((targets != IGNORE).nonzero()[0]) + 1]
    return asked, targets[(targets != IGNORE) & (targets != EOS)]


def encode_question(question: str, vocab: list) -> list:
    """Words -> ids. ValueError names unknown words, and the nearest known ones."""
    asked = words(question)
    nearest = lambda word: ', '.join(difflib.get_close_matches(word, vocab[2:], 3, 0.3) or vocab[2:5])
    unknown = [f'{word!r} (nearest known: {nearest(word)})' for word in asked if word not in vocab]
    check(asked, 'the question has no words')
    check(not unknown, f'the model never saw {", ".join(unknown)}')
    return [vocab.index(word) for word in asked]


def table(lines: list, bar: str = '') -> str:
    """Aligned columns; numbers become shares. bar '|': a table in Markdown, its head is the first line."""
    lines = [[cell if isinstance(cell, str) else f'{cell:.1%}' for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines[1:1] = [['-' * max(3, width) for width in widths]] if bar else []
    return '\n'.join(f'{bar} {f" {bar} ".join(map(str.ljust, line, widths))} {bar}'.strip() for line in lines)


def stack(rows: list) -> Image.Image:
    """Pairs of text and image, one below the other, each image below its text."""
    rows = [(text[:200], image) for text, image in rows]       # a picture is as wide as its titles
    width = max(max(image.width, 8 * len(text)) for text, image in rows)
    out, y = Image.new('RGB', (width, sum(image.height + 16 for _, image in rows)), 'white'), 0
    for text, image in rows:
        ImageDraw.Draw(out).text((2, y + 2), text, fill='black')
        out.paste(image, (0, y + 16))
        y += image.height + 16
    return out


def draw_big(video, what=None):
    """Frames (T, 3, height, width), enlarged to some 128 pixels, with what became of their patches."""
    T, size = len(video), video.size(-1)
    what = what or pack(torch.ones(1, T * max(1, size // 8) ** 2, dtype=torch.bool))     # all, of 8 x 8
    side = math.isqrt(what.assign.size(1) // T)
    return draw_tokens(video.cpu(), what, scale=max(1, 128 // size), grid=(side, side))


@torch.no_grad()
def draw_clip(model, video, text, path: Path, title: str):
    """Draw what a model made of video (T, 3, height, width), text (1, L): path.png, and moving: path.gif."""
    _, _, aux = model(video[None], text[None])
    T, N, reduced, shown = len(video), len(video) * model.config.patches, aux['reduced'], {}
    kept = torch.isin(torch.arange(N, device=video.device), reduced.position)[None]            # (1, N)
    slots = later = reduced.reduction or pack(kept)
    if reduced.tokens.size(1) < N or reduced.info:
        shown['kept'] = model.reducer.picture(reduced) or slots
    if 'stage' in aux:
        later = shown['left by the stage'] = compose(slots, aux['stage'].reduction)
    for layer, route in aux['routes'].items() if model.reducer.in_place else ():
        here = later if 'stage' in aux and layer >= model.stage.layer else slots
        index = route.index[0] if route.mask is None else route.index[0][route.mask[0]]
        chosen = torch.isin(here.assign, index)                # the patches of the slots that are processed
        shown[f'processed by layer {layer}'] = here._replace(assign=here.assign.where(chosen, -1))
    rows, captions = {'clip': draw_big(video)}, [title]
    for name, what in shown.items():
        rows[name], left = draw_big(video, what), what.assign[what.assign >= 0]
        groups = len(left.unique())                            # of VQ: patches of one code, not merged
        made = 'groups' if name == 'kept' and groups != reduced.tokens.size(1) else 'tokens'
        merged = f' in {groups} {made}' if groups < len(left) else ''
        captions.append(f'{name}: {len(left)} of {N} patches{merged}')
    whole(f'{path}.png', stack([*zip(captions, rows.values())]).save)
    step = (rows['clip'].width + 2) // T
    film = [stack([(name, image.crop((x, 0, x + step - 2, image.height))) for name, image in rows.items()])
            for x in range(0, T * step, step)]
    whole(f'{path}.gif', lambda part: film[0].save(part, save_all=True, append_images=film[1:],
                                                   duration=300, loop=0))


def narrate(model, video, path: Path, theta: float, asked: dict):
    """Play (T, 3, height, width), print and draw what is said when. asked: frame, from 1 on -> a question."""
    vocab = model.config.vocab
    encode = lambda question: torch.tensor([encode_question(question, vocab)])
    ids, sheet = {t: encode(question) for t, question in asked.items()}, draw_big(video)
    frames = ((frame[None], ids.get(t)) for t, frame in enumerate(video, 1))
    width, texts = (sheet.width + 2) // len(video), []
    for t, moment in enumerate(model.stream(frames, encode(PROMPT), theta), 1):
        lines = [] if moment['said'] is None else [in_words(moment['said'][0], vocab)]
        if t in asked:
            lines.append(f'{asked[t]}? {in_words(moment["answer"][0], vocab)}')
        silence = f'silence {moment["silence"].item():6.1%}'
        print('   '.join([f'  frame {t:3} of {len(video)}', silence, *lines]), flush=True)
        texts.append('\n'.join(row for line in [f'{t}', *lines] for row in textwrap.wrap(line, width // 7)))
    below = 20 + 14 * max(text.count('\n') for text in texts)
    strip = Image.new('RGB', (sheet.width, sheet.height + below), 'white')
    strip.paste(sheet, (0, 0))
    for t, text in enumerate(texts):
        ImageDraw.Draw(strip).text((t * width + 2, sheet.height + 2), text, fill='black')
    whole(path, strip.save)


@torch.no_grad()
def rank_clips(model, video, names: list, sentence: str, path: Path):
    """Print and draw the five clips (n, T, 3, height, width) that fit a sentence best."""
    ids = torch.tensor([[*encode_question(sentence, model.config.vocab), EOS]], device=video.device)
    fit = model.encode_text(ids) @ torch.cat([model.encode_video(part) for part in video.split(16)]).T
    top, rows = fit[0].topk(min(5, len(video))), []
    print(f'\n{sentence}')
    for value, i in zip(top.values.tolist(), top.indices.tolist()):
        print(f'  {value:6.3f}   {names[i]}')
        rows.append((f'{value:.3f}  {names[i]}', draw_big(video[i])))
    whole(path, stack([(f'{sentence}:', stack(rows[:1])), *rows[1:]]).save)


def chart(path: Path, size: tuple, across: dict, up: dict, caption: str, lines=(), dots=(), labels=()):
    """Draw marks {place: text} of both axes, lines (points, colour, width), dots (point, colour), and labels
    (point, text, colour), which stand in a column at the right, the highest point's first."""
    image, (width, height) = Image.new('RGB', size, 'white'), size
    xs, ys = zip(*(point for points, *_ in lines for point in points), *(point for point, _ in dots))
    (left, right), (low, high) = ((min(all_of), max(all_of)) for all_of in ([*xs, *across], [*ys, *up]))
    end, draw = width - (150 if labels else 20), ImageDraw.Draw(image)
    place = lambda point: (50 + (end - 50) * (point[0] - left) / (right - left or 1),
                           height - 50 - (height - 60) * (point[1] - low) / (high - low or 1))
    for y, text in up.items():
        draw.line([place((left, y)), place((right, y))], fill='#dddddd')
        draw.text((4, place((left, y))[1] - 6), text, fill='#666666')
    for x, text in across.items():
        draw.text((place((x, low))[0] - 8, height - 36), text, fill='#666666')
    draw.text((50, height - 18), caption, fill='black')
    for i, (point, text, colour) in enumerate(sorted(labels, key=lambda label: -label[0][1])):
        y = 10 + (height - 60) * i / len(labels)
        draw.line([place(point), (end + 20, y + 6)], fill='#cccccc')
        draw.text((end + 22, y), text, fill=colour)
    for points, colour, thick in lines:
        draw.line([*map(place, points)], fill=colour, width=thick)
    for (x, y), colour in ((place(point), colour) for point, colour in dots):
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)
    whole(path, image.save)


def draw_curve(log: list, path: Path):
    """Loss (grey, own scale), accuracy in training (blue), held out (red dots) over the steps."""
    top = max(row['loss'] for row in log) or 1.0
    points = lambda key, of=1.0: [(row['step'], row[key] / of) for row in log if row[key] != '']
    chart(path, (640, 260), {0: '0', log[-1]['step']: f'{log[-1]["step"]}'},
          {y / 4: f'{y / 4:.0%}' for y in range(5)},
          f'blue: accuracy in training, red: held out, grey: loss (top = {top:.2f})',
          [(points('loss', top), '#888888', 2), (points('accuracy'), '#2060d0', 2)],
          [(point, '#d03020') for point in points('val_accuracy')])


# ---- 6. Measuring and comparing ----------------------------------------------------------------------------

def peak_memory_mb(device: str) -> float:
    """Most memory taken so far: of the GPU's allocator, or of this process."""
    if device == 'cuda':
        return torch.cuda.max_memory_allocated() / 2 ** 20
    if sys.platform == 'win32':
        return 0.0
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == 'darwin' else 10)


def step_memory_mb(device: str, step) -> float:
    """Memory of a training step: allocator's peak on CUDA, else bytes kept for the backward."""
    if device == 'cuda':
        step()                                                 # makes the optimizers' averages
        torch.cuda.reset_peak_memory_stats()
        step()
        return peak_memory_mb(device)
    kept = {}                                                  # place in memory -> bytes

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(kept.values()) / 2 ** 20


def measure(task, names: list, make) -> dict:
    """Training step, memory, what the task times, of models in turn: medians. make(name) -> a new model."""
    s, batch, runs, meaning = task.s, task.draw('train', task.s.steps, task.s.batch), [], {}
    sync = {'cuda': torch.cuda.synchronize, 'mps': torch.mps.synchronize}.get(s.device, lambda: None)

    def training(model):
        """A function that makes a step."""
        optimizers, loss = configure_optimizer(model.train(), s.rate()), s.autocast()(task.loss)
        return lambda: learn(optimizers, loss(model, batch)[0])

    rows = {name: dict(memory_mb=step_memory_mb(s.device, training(make(name)))) for name in names}
    for name in names:
        looks, meaning[name] = task.timed(make(name).eval(), batch)
        functions = [training(make(name)), *(torch.no_grad()(s.autocast()(look)) for look in looks)]
        runs += [(name, function, []) for function in functions]
    # In turn: what slows one slows all.
    for _ in tqdm(range(ROUNDS + 2), 'timing', dynamic_ncols=True):
        for _, run, took in runs:
            sync()
            start = time.perf_counter()
            run()
            sync()
            took.append(time.perf_counter() - start)
    for name, row in rows.items():
        step, *others = (statistics.median(took[2:]) for of, _, took in runs if of == name)    # two warm up
        row.update(step_ms=1000 * step, **meaning[name](*others))
    return rows


def table_of(rows: dict, columns) -> str:
    """Results in Markdown; times, memory and speed as they are, and as a share of the first row."""
    first = next(iter(rows.values()))

    def cell(key, value) -> str:
        if value is None:
            return ''
        if isinstance(value, list):
            return ' '.join(f'{n:g}' for n in (value if len({*value}) > 1 else value[:1]))
        if key in ('accuracy', 'fluency') or key.endswith('pairs'):
            return f'{100 * value:.1f} %'
        if key.endswith(('_ms', '_mb', '_s', '_kb', 'gflops')) and first.get(key):
            share = f'({value / first[key]:.2f})'
            return f'{value:.0f} {share}' if value >= 999.5 else f'{value:.3g} {share}'
        return f'{value:.4g}' if value < 1e4 else f'{value:,.0f}'

    return table([['recipe', *columns], *([name, *(cell(key, row.get(key)) for key in columns)]
                                          for name, row in rows.items())], '|')


def rows_of(s) -> list:
    """The rows that --rows names, or those of --recipe's task, and what they begin with."""
    deep = {**PRESETS[s.preset], **s.model}['encoder_layers'] > 1              # has layers to merge in
    fits = lambda row: (row.task.kind == RECIPES[s.recipe].task.kind and (s.bench or not row.aside)
                        and (deep or row.task is Retrieval or 'encoder' not in row.changes))
    asked = s.rows.split(',') if s.rows else [name for name, row in RECIPES.items() if fits(row)]
    for name in asked:                                         # grows while it is walked
        check(name in RECIPES, f'--rows: {name!r} is none of {", ".join(RECIPES)}')
        asked += {RECIPES[name].begins} - {'', *asked}
    return [name for name in RECIPES if name in asked]


def run_bench(s):
    """The rows of one task, untrained, by the same measurement that --compare makes after training."""
    set_up(s)
    task_type = RECIPES[s.recipe].task
    names = [name for name in rows_of(s) if RECIPES[name].task is task_type and not RECIPES[name].blind]
    check(names, f'--rows {s.rows}: none has the task of --recipe {s.recipe}')
    s.coarse = 0.0                                             # whole clips are tried and timed
    task = task_type(s, load_data(s))
    models = {name: untrained(replace(s, recipe=name), task.data).cpu() for name in names}
    make = lambda name: copy.deepcopy(models[name]).to(s.device)
    rows = {name: {**task.cost(make(name)), **found} for name, found in measure(task, names, make).items()}
    columns = ['vision_by_layer', *(key for key in task_type.columns if key in rows[names[0]])]
    print(f'\n{table_of(rows, columns)}\n\n{s.batch} clips a step, untrained weights, medians of {ROUNDS} '
          'rounds in turn; in brackets: of the first row')


# How the claims of papers are tested: paper, row here, row it is compared with, what, the paper's figure, how
# the two are compared (see MEASURES), by which key of their results, and the bound that ours must reach.
# VideoLLM-MoD: by the best placement here, not its own, which is the row mod-interleaved.
CLAIMS = [
    ('VideoLLM-MoD', 'mod-all-deep', 'dense', 'time, all-deep', '-42 %', 'change', 'step_ms', -0.42),
    ('VideoLLM-MoD', 'mod-all-deep', 'dense', 'memory, all-deep', '-30 %', 'change', 'memory_mb', -0.30),
    ('VideoLLM-MoD', 'mod-all-deep', 'gaps', 'accuracy, all-deep', '0 to -0.5', 'points', 'accuracy', -0.5),
    ('gamma-MoD', 'gamma', 'dense', 'training time', '-31.0 %', 'change', 'step_ms', -0.31),
    ('gamma-MoD', 'gamma', 'dense', 'throughput (first token)', '1.532 times', 'faster', 'first_ms', 1.532),
    ('gamma-MoD', 'gamma', 'gaps', 'accuracy', '-1.5 %', 'change', 'accuracy', -0.015),
    ('gamma-MoD', 'gamma', 'dense', 'layers converted', '> 90 % (code: 87.5 %)', 'value', 'converted', 0.875),
    ('HoliTom', 'holitom-inner', 'dense', 'FLOPs by its formula', '6.9 %', 'value', 'paper_share', 0.069),
    ('HoliTom', 'holitom-inner', 'gaps', 'accuracy kept, untrained', '99.1 %', 'share', 'accuracy', 0.991),
    ('HoliTom', 'holitom-inner', 'dense', 'time to first token', '2.28 times', 'faster', 'first_ms', 2.28),
    ('HoliTom', 'holitom-inner', 'dense', 'decoding', '1.32 times', 'times', 'tokens_per_s', 1.32),
    ('VQToken', 'vqtoken', 'dense', 'share of the tokens', '0.07 %', 'value', 'token_share', 0.0007),
    ('VQToken', 'vqtoken', 'gaps', 'accuracy', '-0.66 points', 'points', 'accuracy', -0.66),
    ('B-VLLM', 'bvllm', 'uniform', 'accuracy', '+10 %', 'points', 'accuracy', 10),
    ('TempMe', 'lora-merging', 'lora', 'output tokens', '-95 %', 'change', 'tokens', -0.95),
    ('TempMe', 'lora-merging', 'lora', 'encoder FLOPs', '-51 %', 'change', 'gflops', -0.51),
    ('TempMe', 'lora-merging', 'lora', 'R-Sum with LoRA', '+4.4 %', 'change', 'r_sum', 0.044),
    ('TempMe', 'lora-merging', 'lora', 'weights that learn', '0.50 M, 0.33 %', 'value', 'learning', 0.0033),
    ('TempMe', 'retrieval', 'full', 'R-Sum, all weights', '+7.9 %', 'change', 'r_sum', 0.079),
    ('TempMe', 'lora-merging', 'lora', 'encoding speed', '1.8 times', 'faster', 'encode_ms', 1.8),
    ('TempMe', 'retrieval', 'full', 'training speed', '1.57 times', 'faster', 'step_ms', 1.57),
    ('TempMe', 'retrieval', 'full', 'training memory', '75.2 %', 'share', 'memory_mb', 0.752)]
MEASURES = {'change': (lambda a, b: a / b - 1, '{:+.1%}'), 'share': (lambda a, b: a / b, '{:.1%}'),
            'times': (lambda a, b: a / b, '{:.2f} times'), 'faster': (lambda a, b: b / a, '{:.2f} times'),
            'points': (lambda a, b: 100 * (a - b), '{:+.2f} points'), 'value': (lambda a, b: a, '{:.2%}')}
SMALL_IS_GOOD = {'step_ms', 'memory_mb', 'paper_share', 'token_share', 'tokens', 'gflops', 'learning'}


def claims(rows: dict) -> list:
    """[paper, what, its figure, ours, reached], of the claims whose rows there are."""
    made = []
    for paper, row, base, what, figure, how, key, bound in CLAIMS:
        a, b = (rows.get(name, {}).get(key) for name in (row, base))
        if a is not None and (how == 'value' or (b is not None if how == 'points' else b)):    # no share of 0
            ours, small = MEASURES[how][0](a, b), key in SMALL_IS_GOOD and how != 'faster'
            reached = ours <= bound if small else ours >= bound
            made.append([paper, what, figure, MEASURES[how][1].format(ours), reached])
    return made


def summarize(results: list) -> dict:
    """Means over seeds of what a row's runs measured, and what the claims want of them."""
    row = {key: value for key, value in average(results).items() if key != 'seed' and type(value) is not str}
    accuracy = [result['accuracy'] for result in results]
    by_type, layers, N = row.pop('accuracy_by_type', {}), row['vision_by_layer'], row['vision_tokens']
    fewer = [n < N for result in results for n in result['vision_by_layer']]     # of each run's own layers
    return dict(row, std=statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0, by_type=by_type,
                moment=by_type.get('moment'), learning=row['learns'] / row['parameters'], tokens=layers[-1],
                token_share=layers[0] / N, converted=statistics.mean(fewer))


def row_of(s, name: str, seed: int, folder: Path):
    """Settings of a row of a comparison: of the model's options those that mean something to its task."""
    row, here = RECIPES[name], folder / f'seed{seed}'
    steps = row.steps(s.steps or replace(s, recipe=name).plan().steps)
    return replace(s, recipe=name, seed=seed, steps=steps, out=str(here / name),
                   init_from=str(here / row.begins) if row.begins else '', compare=False, rows='', seeds=0,
                   coarse=None if row.begins or row.task is Frames else s.coarse,
                   theta=s.theta if row.task is Streams else Settings.theta,
                   model={key: value for key, value in s.model.items() if key not in row.task.without})


def command_of(s) -> str:
    """The command that makes such a run in a folder of its own."""
    plain, command = vars(Settings()), ['python', 'train_tiny.py']
    for key, value in s.flags().items():
        if key not in ('model', 'out') and value != plain.get(key):
            command += [dashed(key)] + [str(value)] * (value is not True)
    return as_typed(command)


def run_compare(s):
    """--compare: train what is missing, time the rows of a task in turn, write tables and pictures."""
    set_up(s)
    folder = Path(s.out or f'out/compare-{s.preset}' + (s.data != 'shapes') * f'-{s.name_of_data()}')
    data, asked, rows, curves = load_data(s), rows_of(s), {}, {}
    for name in asked:                                         # refuses what does not fit, before training
        if not (folder / f'seed{s.seed}/{name}/result.json').exists():
            untrained(row_of(s, name, s.seed, folder), data)
    check(s.coarse is None or any(row_of(s, name, 0, folder).coarse is not None for name in asked),
          '--coarse would do nothing: none of these rows trains with clips from scratch')
    note = folder / 'asked.json'
    fixed = asdict(replace(s, out='', rows='', recipe=Settings.recipe, seeds=0, ask=[], question=[]))
    if note.exists():
        must_agree(folder, read_json(note), fixed)
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f'--out {folder} exists, and no comparison was begun in it; name another folder')
    folder.mkdir(parents=True, exist_ok=True)
    write(note, fixed)
    seeds = range(s.seed, s.seed + (s.seeds or 3))
    done = lambda name: all((folder / f'seed{seed}/{name}/result.json').exists() for seed in seeds)
    for name in [name for name in RECIPES if name in asked or done(name)]:
        own = [row_of(s, name, seed, folder) for seed in seeds]
        results = [finish(row) for row in own]
        try:
            rows[name] = dict(summarize(results), command=command_of(own[0]))
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise ValueError(f'a result.json of row {name} in {folder} is not what a run wrote '
                             f'({type(error).__name__})') from None
    for task_type in dict.fromkeys(RECIPES[name].task for name in rows):
        names = [name for name in rows if RECIPES[name].task is task_type]
        load = lambda name: load_checkpoint(folder / f'seed{seeds[0]}/{name}/ckpt.pt', s.device)[0]
        own = replace(s, recipe=names[0])
        task = task_type(replace(own, batch=s.batch or own.plan().batch), data)
        for name, found in measure(task, names, load).items():
            rows[name] |= found
        if task_type is Questions:
            curves = {base: untrained_curves(task, load(base)) for base in ('dense', 'gaps') if base in names}
            video, ids, question, _ = task.liveliest()
            for name in names:
                draw_clip(load(name).eval(), video, ids[None], folder / name, f'{name}: {question}')
    report = dict(device=machine_name(s.device), torch=torch.__version__, dtype=s.dtype, preset=s.preset,
                  seeds=list(seeds), rows=rows, curves=curves, claims=claims(rows))
    text = write_report(report)
    if len(rows) > 1 and 'dense' in rows:
        draw_results({name: row for name, row in rows.items() if 'first_ms' in row}, curves,
                     folder / 'results.png')
    write(folder / 'results.md', text)
    write(folder / 'results.json', report)
    print(f'\n{text}\nIn {folder}: ' + ', '.join(sorted(path.name for path in folder.glob('results.*')))
          + ', one clip as every method sees it' * bool(curves))


def untrained_curves(task, model) -> dict:
    """What methods that need no training make of a model: reducer -> [[decoder GFLOPs, accuracy], ...]."""
    curves, T, P = {}, model.config.frames, model.config.patches
    for name in [name for name, cls in REDUCERS.items() if cls.untrained and cls.leaving]:
        for share in tqdm(SHARES, f'{name}, untrained', dynamic_ncols=True):
            row = replace(task.s, recipe=name, model={**task.s.model, **REDUCERS[name].leaving(share, T, P)})
            method = build(row, task, model).eval()
            accuracy = task.evaluate(method, 'test', CURVE_CLIPS, blind=False)['accuracy']
            curves.setdefault(name, []).append((task.cost(method)['decoder_gflops'], accuracy))
    return curves


def write_report(report: dict) -> str:
    """In Markdown: a table for each task, the claims, the commands."""
    rows, out = report['rows'], []
    for task_type in dict.fromkeys(RECIPES[name].task for name in rows):
        types = lambda row: {f'{name} %': 100 * share for name, share in row.get('by_type', {}).items()}
        own = {name: dict(row, std=100 * row['std'], **types(row)) for name, row in rows.items()
               if RECIPES[name].task is task_type}
        columns = ['accuracy', 'std', *types([*own.values()][0]), 'vision_by_layer', *task_type.columns[1:]]
        out += [table_of(own, [*columns, 'learns']), '']
    out += [table([['paper', 'claim', 'its figure', 'here', 'reached'],
                   *([*line, 'yes' if reached else 'no'] for *line, reached in report['claims'])], '|'), '']
    out += [f'- {name}: `{row["command"]}`' for name, row in rows.items()]
    head = '{device}, torch {torch}, {dtype}, preset {preset}, seeds {seeds}'.format(**report)
    head += '; std in points; times and commands of the first seed; in brackets: of the first row\n'
    return '\n'.join([head, *out, ''])


def draw_results(rows: dict, curves: dict, path: Path):
    """Accuracy (logarithm of the error) over decoder FLOPs: rows are points, the front that nothing beats is
    red; lines are what is not trained, thick where the model has seen gaps."""
    full, rise = rows['dense']['decoder_gflops'], lambda accuracy: -math.log(max(1 - accuracy, 1e-3))
    place = lambda flops, accuracy: (math.log(flops / full), rise(accuracy))
    points = {name: place(row['decoder_gflops'], row['accuracy']) for name, row in rows.items()
              if not RECIPES[name].blind}
    front = [(x, y) for x, y in sorted(points.values())
             if not any(a <= x and b >= y and (a, b) != (x, y) for a, b in points.values())]
    colours = dict(zip(REDUCERS, itertools.cycle('#20a040 #c07000 #8040c0 #008090 #a03070 #707000'.split())))
    lines = {(name, base): [place(*point) for point in line] for base, found in curves.items()
             for name, line in found.items()}
    xs, ys = zip(*points.values(), *itertools.chain(*lines.values()))
    shares = [0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5]
    scores = [0.01, 0.05, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995]
    chart(path, (720, 480), {math.log(x): f'{x}' for x in shares if min(xs) <= math.log(x) <= max(xs)},
          {rise(y): f'{y:.1%}' for y in scores if min(ys) < rise(y) < max(ys)},
          'decoder FLOPs as a share of dense (log); red: nothing is cheaper and better; lines: not trained',
          [*((line, colours[name], 1 + (base == 'gaps')) for (name, base), line in lines.items()),
           (front, '#d03020', 2)],
          [(point, '#d03020' if point in front else '#2060d0') for point in points.values()],
          [*((point, name, 'black') for name, point in points.items()),
           *((line[-1], name, colours[name]) for (name, _), line in lines.items())])


# ---- 7. Command line ---------------------------------------------------------------------------------------
# The script's own flags are the fields of Settings. Those of the model are made from ModVideoConfig and from
# the options of its parts, so that a class, its flags and their help cannot disagree.

@dataclass
class Settings:
    """The script's own flags. None, '', 'auto' and 0 (but of seed): as preset, recipe or machine say."""
    recipe: Annotated[str, 'what to train: a row of RECIPES, and first what it begins with'] = 'mod'
    data: Annotated[str, "'shapes', the synthetic world, or a folder with clips.jsonl"] = 'shapes'
    preset: Annotated[str, 'size of model and video'] = 'auto'
    init_from: Annotated[str, 'run folder whose weights to begin with'] = ''
    grid: Annotated[str, 'columns x rows of a clip that is a sheet of frames'] = '4x4'
    steps: Annotated[int, "optimizer steps of this row alone, 0 = its share of the preset's"] = 0
    batch: Annotated[int, "clips a step, 0 = the preset's"] = 0
    coarse: Annotated[float, 'share of the steps, the first ones, that see clips of half as many frames '
                      "[the preset's, in rows from scratch]"] = None
    lr: Annotated[float, "of matrices, also in what the row begins with [the preset's, with LoRA 0.03]; "
                  "LoRA's weights learn with 30 % of it, all others with 3 %"] = 0.0
    seed: Annotated[int, 'decides the weights, the clips and their order'] = 0
    device: Annotated[str, 'auto: CUDA, else MPS, else the CPU'] = 'auto'
    dtype: Annotated[str, 'of the matrix products'] = 'auto'
    compile: Annotated[bool, 'torch.compile the model: minutes of waiting first; with graph breaks in '
                       'gaps, holitom, vq, --codes 0, and MoD on what a reducer left'] = False
    deterministic: Annotated[bool, 'the same numbers on every run, on CUDA too (slower)'] = False
    out: Annotated[str, 'folder of a run or comparison, to write or to read the model from'] = ''
    resume: Annotated[str, 'run folder to go on with, under its own settings; more --steps stretch '
                      'its schedule'] = ''
    ask: Annotated[list, 'a question about a GIF, WebP, PNG, sheet or folder of images; on the CPU'] = ()
    stream: Annotated[str, 'a clip for a stream model to narrate, on the CPU'] = ''
    question: Annotated[list, 'with --stream: asked after a frame, from 1 on'] = ()
    theta: Annotated[float, 'of streams: stay silent while P(silence) is at least this'] = 0.5
    find: Annotated[str, 'ranks the clips of --data by a retrieval model, on the CPU'] = ''
    eval: Annotated[str, 'run folder whose model is measured on the test clips of --data'] = ''
    bench: Annotated[bool, "time and memory of all rows of the recipe's task, untrained"] = False
    compare: Annotated[bool, "a table of rows of the recipe's task, trained, next to what their papers say; "
                       'goes on where it stopped'] = False
    rows: Annotated[str, "with --compare, --bench: rows such as dense,mod-all [those of the task]"] = ''
    seeds: Annotated[int, 'with --compare: how many, 0 = 3'] = 0
    model: dict = field(default_factory=dict)      # options of the model that were given

    def flags(self) -> dict:
        """All of them, and the options of the model, in one dict."""
        return {**vars(self), **self.model}

    def name_of_data(self) -> str:
        """'shapes', or the last part of a folder's path."""
        return Path(os.path.abspath(self.data)).name

    def plan(self) -> Plan:
        """What the preset trains the recipe's task with."""
        return RUNS[self.preset][RECIPES[self.recipe].task.kind]

    def rate(self) -> float:
        """The learning rate: --lr, or the preset's. The few weights of LoRA learn with a larger one."""
        lora = {**RECIPES[self.recipe].changes, **self.model}.get('lora_rank')
        return self.lr or (0.03 if lora else self.plan().lr)

    def coarse_steps(self) -> float:
        """How many of the first steps see coarse clips."""
        row = RECIPES[self.recipe]
        if self.coarse is not None or not self.steps:
            return self.steps * (self.coarse or 0) * (row.task is not Frames)
        shape = {**PRESETS[self.preset], 'encoder': 'plain', **self.model}
        never = row.begins or self.data != 'shapes' or shape['frames'] < 8 or shape['encoder'] != 'plain'
        return 0 if never else self.steps * self.plan().coarse

    def autocast(self):
        """The context, or decorator, of forward passes."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == 'bfloat16')


CHOICES = dict(PARTS, recipe=RECIPES, preset=['auto', *PRESETS], device=['auto', 'cuda', 'mps', 'cpu'],
               dtype=['auto', 'float32', 'bfloat16'])
METAVARS = dict(ask=('CLIP', 'QUESTION'), question=('FRAME', 'QUESTION'), stream='CLIP', find='SENTENCE')
TOGETHER = dict(question=['stream'], seeds=['compare'], rows=['compare', 'bench'])      # wants one of these
READS = dict(ask='grid out', stream='grid out question theta', find='grid out data seed',      # and no other
             eval='data grid device batch dtype')
REFUSES = dict(bench='coarse compile init_from lr out resume steps theta', resume='out',
               compare='init_from resume')


def model_flags() -> dict:
    """The options of the model, from ModVideoConfig and the classes of its parts: name -> type, help."""
    flags, owners = {f.name: get_args(f.type) for f in fields(ModVideoConfig) if get_args(f.type)}, {}
    taken = {f.name for cls in (Settings, ModVideoConfig) for f in fields(cls)}
    for part, name, cls in ((part, *item) for part, classes in PARTS.items() for item in classes.items()):
        for key, option in options_of(cls).items():
            check(key not in taken, f'{part} {name}: its option {key} has the name of another flag')
            check(get_args(option.annotation), f"{part} {name}: option {key} wants Annotated[type, 'help']")
            default = 'has to be given' if option.default is option.empty else option.default
            owners.setdefault((key, part, *get_args(option.annotation), default), []).append(name)
    for (key, part, kind, text, default), names in owners.items():             # several classes may have it
        before = f'{flags[key][1]}; ' if key in flags else ''
        flags[key] = kind, f'{before}{part} {", ".join(names)}: {text} [{default}]'
    return flags


def parse(argv) -> Settings:
    """Command line -> Settings. With --resume, the run's own settings are the defaults."""
    parser = argparse.ArgumentParser('train_tiny.py', description=__doc__, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f'train_tiny: {message} (--help lists the flags)\n')
    jobs = parser.add_mutually_exclusive_group()
    group = parser.add_argument_group('the model, where preset and recipe do not say what you want')
    own = {f.name: (*get_args(f.type), f.default) for f in fields(Settings) if get_args(f.type)}
    for name, (kind, text, *default) in {**own, **model_flags()}.items():
        text += f' [{default[0]}]' if default and default[0] else ''
        how = {bool: dict(action='store_true'), list: dict(nargs=2, metavar=METAVARS.get(name))}.get(
            kind, dict(type=kind, choices=CHOICES.get(name), metavar=METAVARS.get(name)))
        place = jobs if name in JOBS else parser if name in own else group
        place.add_argument(dashed(name), help=text.replace('%', '%%'), **how)
    for before, word in zip(['', *argv], argv):
        if not word.strip() or word.startswith('--') and word.endswith('='):
            raise ValueError(f'an empty argument after {before or "train_tiny.py"}; wanted a value')
    model = vars(parser.parse_args(argv))
    given = {name: model.pop(name) for name in own if name in model}
    s = Settings(**given, model=model)
    if s.resume:
        saved = settings_of(Path(s.resume))
        fixed = {name: given[name] for name in ('recipe', 'preset', 'seed', 'init_from') if name in given}
        must_agree(Path(s.resume), {**PRESETS.get(saved.preset, {}), **saved.flags()}, {**fixed, **model})
        s = replace(saved, **given)
    check_flags(s, {*given})
    return s


def dashed(name: str) -> str:
    """The flag of a setting."""
    return '--' + name.replace('_', '-')


def parse_grid(text: str):
    """'4x3' -> columns, rows."""
    sides = [int(side) if side.isdecimal() else 0 for side in text.lower().split('x')]
    check(len(sides) == 2 and all(sides), f'--grid wants COLUMNSxROWS, such as 4x4, got {text!r}')
    return sides


def check_flags(s: Settings, given: set):
    """ValueError: values out of range, and flags that would do nothing."""
    parse_grid(s.grid)
    for name, value in s.flags().items():
        least = -1 if name == 'tau' else int(name in (*PRESETS['tiny'], 'patch_size'))     # sizes: 1
        if type(value) in (int, float) and not least <= value < 2 ** 31:       # NaN, too
            raise ValueError(f'{dashed(name)} must be finite, at least {least}, below 2**31, got {value}')
    check((s.coarse or 0) < 1, f'--coarse is a share of the steps, from 0 to below 1, got {s.coarse}')
    row = RECIPES[s.recipe]
    if s.coarse and (row.task is Frames or not (row.share or s.steps)):
        raise ValueError(f'--coarse would do nothing with --recipe {s.recipe}: single frames, or no steps')
    check(0 < s.theta < 1, f'--theta must be between 0 and 1, got {s.theta}')
    check('lr' not in given or s.lr > 0, 'wanted --lr above 0, got 0')
    if s.question and not s.question[0].isdecimal():
        raise ValueError(f'--question wants the number of a frame first, got {s.question[0]!r}')
    for name in [name for name in TOGETHER if name in given and not given & {*TOGETHER[name]}]:
        raise ValueError(f'{dashed(name)} goes with {" or ".join(map(dashed, TOGETHER[name]))}')
    refused = {job: (given | {*s.model}) - {job, *reads.split()} for job, reads in READS.items()}
    refused.update((job, given & {*flags.split()}) for job, flags in REFUSES.items())
    for job in [job for job in refused if job in given and refused[job]]:
        raise ValueError(f'--{job} takes no {", ".join(map(dashed, sorted(refused[job])))}')
    check(not {'rows', 'compare', 'recipe'} <= given, '--rows says which rows; leave --recipe out')
    check(s.data == 'shapes' or not {'find', 'seed'} <= given, '--seed would do nothing: it is of shapes')
    check('theta' not in given or s.stream or 'stream' in s.rows or row.task is Streams, '--theta would do '
          'nothing: no stream is asked for')
    check('grid' not in given or s.data != 'shapes' or s.ask or s.stream, '--grid is of clips of your own; '
          'name them with --data')
    check(not s.init_from or row.begins or s.resume, f'--recipe {s.recipe} begins from scratch; leave '
          '--init-from out, or name a row that begins with another, such as mod-all')


def machine_name(device: str) -> str:
    """The device, in words, and how many processes train together."""
    name = torch.cuda.get_device_name() if device == 'cuda' else f'{torch.get_num_threads()} threads'
    return f'{device} ({name})' + f', {WORLD} processes' * (WORLD > 1)


def set_up(s: Settings):
    """Fill in device, dtype, preset, steps, batch, and say so."""
    has = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    s.device = next(device for device in has if has[device]) if s.device == 'auto' else s.device
    check(has[s.device], f'--device {s.device}: this machine has none, or this torch was built without it')
    cuda, recipe = s.device == 'cuda', RECIPES[s.recipe]
    native = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    s.dtype = s.dtype.replace('auto', 'bfloat16' if native else 'float32')
    s.preset = s.preset.replace('auto', 'gpu' if cuda else 'cpu')
    shape = {**PRESETS[s.preset], **s.model}
    if not s.compare:
        s.batch = s.batch or s.plan().batch
        s.steps = s.steps or recipe.steps(s.plan().steps)
    pixels = s.batch * shape['frames'] * shape['frame_size'] ** 2
    check(pixels <= 2 ** 32, f'a step of --batch {s.batch} has {pixels:,} pixels, wanted at most 2**32')
    if WORLD > 1:                                              # torchrun: the first process alone speaks
        base = recipe.begins and not (s.init_from or s.resume)                 # which it would train first
        if s.bench or s.compare or s.eval or base or recipe.task.kind == 'retrieval':
            raise ValueError(f'--recipe {s.recipe} needs one process with these flags; use no torchrun')
        check(s.batch >= WORLD, f'--batch {s.batch} is less than {WORLD} processes')
        local = int(os.environ.get('LOCAL_RANK', RANK))
        check(s.device == 'cpu' or cuda and local < torch.cuda.device_count(), f'process {local} has no '
              f'{s.device} device of its own; start fewer processes, or say --device cpu')
        if cuda:
            torch.cuda.set_device(local)
        if not distributed.is_initialized():
            distributed.init_process_group('nccl' if cuda else 'gloo')
        if RANK:
            sys.stdout = open(os.devnull, 'w')         # errors of any process are printed
    if s.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
        torch.backends.cuda.enable_cudnn_sdp(False)            # its backward is not deterministic
    print(f'{machine_name(s.device)}, {s.dtype}, torch {torch.__version__}, preset {s.preset}, '
          f'recipe {s.recipe}, seed {s.seed}')


def kind_of(run: Path) -> str:
    """The task that a run's model was trained for."""
    try:
        return RECIPES[settings_of(run).recipe].task.kind
    except (ValueError, OSError):
        return 'something else'


def open_model(s: Settings, flag: str, kind: str, clip: str = ''):
    """The run of --out, or the newest of this kind under out/ -> run, model, a clip as the model sees it."""
    runs = [Path(s.out)] if s.out else [path.parent for path in Path('out').glob('**/ckpt.pt')
                                        if kind_of(path.parent) == kind]
    row = {'questions': '', 'streams': ' --recipe stream', 'retrieval': ' --recipe retrieval'}[kind]
    check(runs, f'{flag} found no model under out/; train one first: python train_tiny.py{row}')
    run = max(runs, key=lambda run: (run / 'ckpt.pt').stat().st_mtime)
    model, _ = load_checkpoint(run / 'ckpt.pt')
    check(kind_of(run) == kind, f'{flag}: the model of {run} was trained for {kind_of(run)}')
    c, video = model.config, None
    if clip:
        video = read_clip(clip, parse_grid(s.grid), c.frames, c.frame_size).float() / 255      # (T, 3, ...)
        print(f'{run}: {clip}, seen as {c.frames} frames of {c.frame_size}x{c.frame_size}')
    return run, model.eval(), video


@torch.no_grad()
def run_ask(s: Settings):
    """Answer one question about one clip: answer, probability, runners-up, what was looked at."""
    run, model, video = open_model(s, '--ask', 'questions', s.ask[0])
    vocab, question = model.config.vocab, s.ask[1].rstrip('?')
    ids = torch.tensor(encode_question(question, vocab))                       # (L,)
    answer = model.generate(video[None], ids[None, None], max_new_tokens=LONGEST + 1)[0, 0]
    answer = answer[:max(1, int((answer != PAD).sum()))]
    text, asked = torch.cat([ids, answer])[None, None], torch.tensor([[len(ids)]])     # (1, 1, L), (1, 1)
    chances = F.softmax(model(video[None], text, asked=asked)[0][0, 0, len(ids) - 1:], -1)   # (answer + 1, V)
    chance, said = chances[:-1].gather(1, answer[:, None]).prod().item(), in_words(answer, vocab)
    title, best = f'{question}? {said}   {chance:.1%}', chances[0].topk(min(4, len(vocab))).indices.tolist()
    others = [f'{vocab[i]} {chances[0, i].item():.1%}' for i in best if i != answer[0]]
    print(f'{title}\ninstead of {said.split()[0]}: ' + ', '.join(others[:3]))
    path = run / f'ask-{Path(s.ask[0]).stem[:60]}'
    draw_clip(model, video, ids[None], path, title)
    print(f'what was looked at: {path}.png, {path}.gif')


def run_stream(s: Settings):
    """Let a model narrate a clip while it plays."""
    run, model, video = open_model(s, '--stream', 'streams', s.stream)
    asked = {int(s.question[0]): s.question[1].rstrip('?')} if s.question else {}
    if not {*asked} <= {*range(1, len(video) + 1)}:
        raise ValueError(f'--question: the frames are 1 to {len(video)}, got {s.question[0]}')
    path = run / f'stream-{Path(s.stream).stem[:60]}.png'
    narrate(model, video, path, s.theta, asked)
    print(f'frames with the words below: {path}')


def run_find(s: Settings):
    """Rank clips of a folder, or 64 held-out ones of the synthetic world, by a sentence."""
    run, model, _ = open_model(s, '--find', 'retrieval')
    c = model.config
    merge_lora(model)
    if s.data == 'shapes':
        batch = ShapeWorld(frames=c.frames, size=c.frame_size, seed=s.seed).captions('test', 0, 64)
        video, names = batch.video, [in_words(ids, c.vocab) for ids in batch.text]
    else:
        rows, grid = read_rows(Path(s.data)), parse_grid(s.grid)
        names = [row['file'] for row in rows]
        video = torch.stack([read_clip(Path(s.data, row['file']), row.get('grid', grid), c.frames,
                                       c.frame_size) for row in rows]).float() / 255
    rank_clips(model, video, names, s.find, run / 'find.png')
    print(f'the best of {len(names)} clips: {run / "find.png"}')


def run_eval(s: Settings):
    """The table at the end of a run, for other clips: printed, and written into the run's folder."""
    run, saved = Path(s.eval), settings_of(Path(s.eval))
    s = replace(saved, data=s.data, grid=s.grid, device=s.device, eval=s.eval, batch=s.batch or saved.batch,
                dtype=saved.dtype if s.dtype == 'auto' else s.dtype)
    set_up(s)
    model, _ = load_checkpoint(run / 'ckpt.pt', s.device)
    s.model['frames'] = model.config.frames
    task = RECIPES[s.recipe].task(s, load_data(s, model.config.vocab))
    if list(task.vocab) != list(model.config.vocab):
        raise ValueError(f'{run} was trained on {saved.data}, it has other words; name clips with --data')
    result = dict(run=str(run), data=s.data, torch=torch.__version__, **scores_of(task, model))
    task.print_table(result)
    write(run / f'eval-{s.name_of_data()}.json', result)
    print(f'\nwritten: {run}/eval-{s.name_of_data()}.json')


JOBS = dict(ask=run_ask, stream=run_stream, find=run_find, eval=run_eval, bench=run_bench,
            compare=run_compare)


def main(argv=None, began: float = None) -> int:
    """Returns the exit status: 0, 2 after one sentence about what was wrong, 130 after Ctrl-C."""
    began, argv = began or time.time(), sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):                    # a console may lack letters of an answer
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='replace')
    status = 2
    try:
        s = parse(argv)
        # 'high' is TF32. In a compiled graph it would enter what `exact` keeps it out of.
        torch.set_float32_matmul_precision('highest' if s.compile else 'high')
        job = next((job for name, job in JOBS.items() if getattr(s, name)), None)
        job(s) if job else run_recipe(s, began)
        return 0
    except (MemoryError, RuntimeError) as error:
        full = isinstance(error, MemoryError) or re.search('(out of|enough|allocate) memory', str(error))
        if not full:
            raise
        message = 'there is not enough memory; try a smaller --batch, --frames or --preset'
    except FileNotFoundError as error:
        message = f'{error.filename} does not exist'
    except (ValueError, OSError) as error:
        message = error
    except KeyboardInterrupt as stop:
        python = ['torchrun', f'--nproc-per-node={WORLD}'] if WORLD > 1 else ['python']
        again = as_typed([*python, 'train_tiny.py', *map(str, stop.args or argv)])
        status, message = 130, f'stopped; go on with: {again}'
    if not RANK or status == 2:                                # another process has no folder to go on with
        print(f'train_tiny: {message}', file=sys.stderr)
    return status


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() if RANK else nullcontext() as tempfile.tempdir:     # for Run.path
        status = main(began=BEGAN)
    if WORLD > 1:       # threads of its group now and then abort a process that ends in the usual way
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
