# SPDX-License-Identifier: MIT-0
"""The synthetic world: endless clips of coloured shapes, and questions whose answers are known.

    python data/shapes.py        draws clips with their questions into out/shapes.png, and prints for each
                                 type how often it is asked, its number of answers and its chance level

A clip holds one to three shapes on a textured, still background. The first and the third move slowly in one
direction, the second stands still and steps through the colour wheel. Two things happen, at different moments: a
shape appears, a shape vanishes, a ring flashes for a single frame, or the scene cuts. Each question ends with the
word that matters, so that the answer is one attention hop away. A batch is a function of (seed, split, step): the
same scenes and questions everywhere, the same noise on the same kind of device.
Legend: B clips, T frames, O = 3 shapes, Q questions a clip, K = 8 types of question, L text tokens.
"""
import math
import os
import zlib
from collections import Counter, namedtuple
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

COLOURS = ['red', 'yellow', 'green', 'cyan', 'blue', 'purple']    # the colour wheel, in order
PALETTE = torch.tensor([[.90, .15, .15], [.92, .88, .20], [.15, .75, .20],
                        [.20, .85, .90], [.20, .25, .92], [.80, .25, .85]])  # (6, 3) RGB in [0, 1]
SHAPES, RING = ['circle', 'square', 'triangle', 'cross'], 4       # the flash is a ring
DIRECTIONS, STILL = ['left', 'right', 'up', 'down'], 4
STEPS = torch.tensor([[-1., 0.], [1., 0.], [0., -1.], [0., 1.], [0., 0.]])  # (5, 2) x, y of each direction
COUNTS, SPLITS = ['one', 'two', 'three'], ['test', 'val', 'train']
EVENTS = ['appears', 'vanishes', 'flash', 'cut']
APPEARS, VANISHES, FLASH, CUT = range(4)
QUESTIONS = {                                      # '_' is where the named word goes. Answers, for example:
    'colour': 'what colour is the _',              # red
    'shape': 'what shape is _',                    # circle
    'direction': 'which way goes the _',           # left
    'count': 'how many shapes',                    # two
    'order': 'what happens first',                 # flash
    'moment': 'what colour is the flash',          # blue: one frame holds the answer
    'forecast': 'what colour is next for the _',   # green: its next step on the wheel, after the last frame
    'summary': 'describe'}                         # red circle appears then blue flash
KINDS = list(QUESTIONS)
COLOUR, SHAPE, DIRECTION, COUNT, ORDER, MOMENT, FORECAST, SUMMARY = range(8)
VOCAB = ['<pad>', '<eos>', *COLOURS, *SHAPES, *DIRECTIONS, *COUNTS, *EVENTS]
PROMPT = 'narrate'                                                # stands before every stream
VOCAB += sorted({'then', PROMPT, *' '.join(QUESTIONS.values()).split()} - {'_', *VOCAB})
ID = {word: i for i, word in enumerate([*VOCAB, '_'])}            # '_' never leaves this file
CAPTION_VOCAB = [*VOCAB, 'a', 'and', 'far', 'moves', 'near', 'stays']      # of sentences to find clips by
CAPTION_ID = {word: i for i, word in enumerate(CAPTION_VOCAB)}
PAD, EOS, IGNORE = 0, 1, -1

# What happens in B clips, before a pixel is drawn; ShapeWorld.sample says what each entry is.
Scene = namedtuple('Scene', 'present shape colour direction start stop event time subject flash cell jitter texture')


class Batch(NamedTuple):
    """What a dataset hands out."""
    video: torch.Tensor     # (B, T, 3, height, width) float in [0, 1]
    text: torch.Tensor      # (B, Q, L) int64: question, then answer, then padding (0)
    targets: torch.Tensor   # (B, Q, L) int64: the token after each one where it belongs to the answer, else -1
    kind: torch.Tensor      # (B, Q) int64: index into the dataset's list of question types
    after: torch.Tensor = None      # streams, where Q is 1. (B, L) int64: the frame behind which each word stands
    decisions: torch.Tensor = None  # (B, T) int64: the word that is to be said behind each frame, EOS for silence


class Captions(NamedTuple):
    """Clips with sentences, to find one by the other."""
    video: torch.Tensor     # (B, T, 3, height, width) float in [0, 1]
    text: torch.Tensor      # (B, L) int64 ids of CAPTION_VOCAB: a sentence, `<eos>`, then padding (0)
    turned: torch.Tensor = None     # (B,) bool: the other clip of the pair differs in direction, else in order


@dataclass
class ShapeWorld:
    """Endless seeded clips: `batch(split, step, batch_size, device)`. Lengths are in frame widths."""
    frames: int = 8          # T
    size: int = 32           # height and width in pixels
    questions: int = 8       # Q
    seed: int = 0
    radius: float = 0.17     # of a shape. Smaller is harder
    travel: float = 0.33     # way a moving shape makes during the clip. Shorter is harder
    noise: float = 0.02      # standard deviation of the noise added to every frame
    contrast: float = 0.05   # of the background's texture
    vocab, kinds, caption_vocab = VOCAB, KINDS, CAPTION_VOCAB

    def __post_init__(self):
        if self.frames < 4:
            raise ValueError(f'a clip of shapes needs at least 4 frames for its two events, got {self.frames}')

    def batch(self, split: str, step: int, batch_size: int, device='cpu') -> Batch:
        """The clips of one step. split: 'train', 'val' or 'test', which share no background, hence no clip."""
        generator = seeded(self.seed, split, step)
        scene = self.sample(split, batch_size, generator)
        words = (a.to(device) for a in self.ask(scene, generator))
        return Batch(self.draw(scene, device, generator.initial_seed()), *words)

    def sample(self, split: str, B: int, generator: torch.Generator) -> Scene:
        """Decide what happens in B clips. All but jitter are whole numbers or bool."""
        def rand(*shape): return torch.rand(B, *shape, generator=generator)
        def randint(high, *shape): return torch.randint(high, (B, *shape), generator=generator)
        def shuffle(n): return rand(n).argsort(-1)                # (B, n) a permutation a clip
        T, each = self.frames, torch.arange(3)                    # (O,)
        event = shuffle(4)[:, :2]                                 # (B, 2) two of EVENTS, in order of time
        early, late = max(1, T // 4), min(T - 2, 3 * T // 4)
        time = early + shuffle(late - early + 1)[:, :2].sort(-1).values   # (B, 2) the frame of each
        pair = (event <= VANISHES).all(-1)                        # (B,) one appears, another vanishes
        count = 1 + torch.where(pair, 1 + randint(2), randint(3))         # (B,)
        present = each < count[:, None]                           # (B, O)
        order = (rand(3) + 1.0 * ~present).argsort(-1)            # (B, O) the present ones first
        second = (event == VANISHES) & (count > 1)[:, None]       # (B, 2) what vanishes did not appear
        subject = torch.where(second, order[:, 1:2], order[:, :1])        # (B, 2) the shape it happens to
        start, stop = lifetime(event, time, subject, present, T)

        first = randint(6, 1)                                     # (B, 1) the wheel shape's colours:
        other = (first + 2 + shuffle(4)) % 6                      # first, first + 1. (B, 4) the rest
        base, flash = torch.stack([other[:, 0], first[:, 0], other[:, 1]], 1), other[:, 2]  # (B, O), (B,)
        turn = torch.arange(T) * 2 // T * (each == 1)[:, None]    # (O, T) steps on the wheel so far
        colour = (base[..., None] + turn) % 6                     # (B, O, T) index into COLOURS
        direction = torch.stack([randint(4), torch.full((B,), STILL), randint(4)], 1)  # (B, O) index into STEPS
        cell = torch.stack([shuffle(4), shuffle(4)], 1)           # (B, 2, 4) quadrants before, after the cut:
        jitter = 0.06 * (rand(4, 2) - 0.5)                        # (B, 4, 2) and way off, flash last
        digit = 2 + randint(8, 2) if split == 'train' else SPLITS.index(split)  # (B, 2) tells the split
        texture = 10 * randint(10 ** 5, 2) + digit                # (B, 2) grounds before, after the cut
        shape = shuffle(4)[:, :3]                                 # (B, O) index into SHAPES, all different
        return Scene(present, shape, colour, direction, start, stop, event, time, subject, flash, cell,
                     jitter, texture)

    def draw(self, scene: Scene, device='cpu', seed=0, at: torch.Tensor = None) -> torch.Tensor:
        """Paint B scenes on the device: (B, T, 3, size, size) float32 in [0, 1]. at (B, n): these frames alone."""
        def when(event): return torch.where(scene.event == event, scene.time, T).amin(1, keepdim=True)  # (B, 1)
        T, size, B = self.frames, self.size, len(scene.shape)
        t = torch.arange(T).expand(B, T) if at is None else at    # (B, T) or (B, n), n is T from here
        after = t >= when(CUT)                                    # (B, T) never, if nothing cuts
        cell = torch.where(after[..., None], scene.cell[:, 1:], scene.cell[:, :1])  # (B, T, 4)
        way = self.travel * (t / (T - 1) - 0.5)                   # (B, T)
        step = STEPS[F.pad(scene.direction, (0, 1), value=STILL)]         # (B, 4, 2)
        centre = 0.25 + 0.5 * torch.stack([cell % 2, cell // 2], -1)      # (B, T, 4, 2) x, y
        centre = centre + scene.jitter[:, None] + way[..., None, None] * step[:, None]
        seen = torch.cat([seen_at(scene, t), (t == when(FLASH))[:, None]], 1)     # (B, 4, T)
        colour = scene.colour.gather(2, t[:, None].expand(-1, 3, -1))     # (B, O, T)
        flash = scene.flash[:, None, None].expand(-1, 1, t.size(1))       # (B, 1, T)
        colour = PALETTE[torch.cat([colour, flash], 1)]           # (B, 4, T, 3)
        shape = F.pad(scene.shape, (0, 1), value=RING)[..., None, None, None]  # (B, 4, 1, 1, 1)

        axis = (torch.arange(size, device=device) + 0.5) / size   # (size,) pixel centres
        centre, seen, colour, shape, after = (a.to(device) for a in (centre, seen, colour, shape, after))
        ground = paint_background(scene.texture.to(device), axis, self.contrast)  # (B, 2, 3, size, size)
        video = torch.where(after[..., None, None, None], ground[:, 1:], ground[:, :1])  # (B, T, 3, size, size)
        for o in range(4):
            x, y = ((axis - centre[:, :, o, i, None]) / self.radius for i in (0, 1))  # (B, T, size) in radii
            depth = -outline(shape[:, o], x[:, :, None], y[..., None]) * self.radius * size  # in pixels, > 0 inside
            cover = (depth + 0.5).clamp(0, 1) * seen[:, o, :, None, None]  # (B, T, size, size) anti-aliased
            video = torch.lerp(video, colour[:, o, :, :, None, None], cover[:, :, None])
        noise = torch.randn(video.shape, device=device, generator=torch.Generator(device).manual_seed(seed))
        return (video + self.noise * noise).clamp(0, 1)

    def stream(self, split: str, step: int, batch_size: int, device='cpu') -> Batch:
        """The clips of one step as they would be watched: the two events told behind the frames that first show them,
        Q questions behind random frames about what was seen so far, the last one for the story at the end.
        """
        generator = seeded(self.seed, split, step)
        scene, (B, T, Q) = self.sample(split, batch_size, generator), (batch_size, self.frames, self.questions)
        at = torch.randint(1, T, (B, Q), generator=generator)     # (B, Q) the frame behind which each is asked
        kind = torch.randint(SUMMARY, (B, Q), generator=generator)
        at[:, -1], kind[:, -1] = T - 1, SUMMARY
        question, answer, _ = self.questions_at(scene, generator, kind, at)
        told = clauses(scene)                                     # (B, 2, 3)
        first = torch.where(told[..., 0] == PAD, told[..., 2], told[..., 0])  # (B, 2) the first word of each
        decisions = torch.full((B, T), EOS).scatter(1, scene.time, first)

        told = F.pad(told, (0, 1), value=EOS)                     # (B, 2, 4)
        learned = told.masked_fill((told != PAD).cumsum(-1) <= 1, IGNORE)  # the first word is a decision's target
        asked, width = torch.cat([question, answer], -1), question.size(-1) + answer.size(-1)
        turn = torch.cat([F.pad(told, (0, width - 4)), asked], 1)         # (B, 2 + Q, width)
        wanted = torch.cat([F.pad(learned, (0, width - 4)),
                            torch.cat([torch.full_like(question, IGNORE), answer], -1)], 1)
        wanted = wanted.masked_fill(turn == PAD, IGNORE)
        time, order = torch.cat([scene.time, at], 1).sort(dim=1, stable=True)  # (B, 2 + Q) told before asked
        after = time[..., None].expand(-1, -1, width).flatten(1)  # (B, (2 + Q) * width)
        turn, wanted = (a.gather(1, order[..., None].expand_as(a)).flatten(1) for a in (turn, wanted))
        text, targets, after = drop_padding(*(
            F.pad(a, (1, 0), value=v) for a, v in ((turn, ID[PROMPT]), (wanted, IGNORE), (after, -1))))
        targets = F.pad(targets[:, 1:], (0, 1), value=IGNORE)     # the word behind each
        words = (a.to(device) for a in (text[:, None], targets[:, None], torch.zeros(B, 1).long(), after, decisions))
        return Batch(self.draw(scene, device, generator.initial_seed()), *words)

    def captions(self, split: str, step: int, batch_size: int, device='cpu') -> Captions:
        """Clips of one shape in pairs, i and i + batch_size // 2, that only a direction or the order of events tells
        apart."""
        generator = seeded(self.seed, split, step, 'captions')
        scene, half = self.sample(split, 64 + 4 * batch_size, generator), (batch_size + 1) // 2
        alone = (scene.present.sum(1) == 1).nonzero()[:half, 0]           # more than a quarter of the scenes
        scene = Scene(*(a[alone] for a in scene))
        turned = torch.rand(len(scene.shape), generator=generator) < 0.5
        scene = Scene(*(torch.cat(pair)[:batch_size] for pair in zip(scene, twin_of(scene, turned, self.frames))))
        text, = drop_padding(describe(scene))
        return Captions(self.draw(scene, device, generator.initial_seed()), text.to(device),
                        torch.cat([turned, turned])[:batch_size].to(device))

    def captioned_frames(self, split: str, step: int, batch_size: int, device='cpu') -> Captions:
        """Single frames, T = 1, and what they show and where, which says nothing about direction or order."""
        generator = seeded(self.seed, split, step, 'frames')
        scene = self.sample(split, batch_size, generator)
        at = torch.randint(self.frames, (batch_size, 1), generator=generator)     # (B, 1)
        text, = drop_padding(describe(scene, at))
        return Captions(self.draw(scene, device, generator.initial_seed(), at), text.to(device))

    def ask(self, scene: Scene, generator: torch.Generator):
        """Text, targets (B, Q, L) and kind (B, Q): Q questions about each whole scene, the types in turn."""
        B, Q = len(scene.shape), self.questions
        kind = (torch.arange(Q) + torch.arange(B)[:, None]) % len(KINDS)  # (B, Q)
        question, answer, kind = self.questions_at(scene, generator, kind, torch.full((B, Q), self.frames - 1))
        return (*pack_text(question, answer), kind)

    def questions_at(self, scene: Scene, generator: torch.Generator, kind: torch.Tensor, at: torch.Tensor):
        """Questions of the types `kind` (B, Q), asked behind the frames `at` (B, Q) about what was seen by then.

        -> question (B, Q, Lq), answer (B, Q, La), with padding anywhere, and kind. A type that does not apply (no
        flash, say) is replaced by another question on shape or direction; where nothing can be asked all is padding.
        """
        (B, Q), rows = kind.shape, torch.arange(len(scene.shape))[:, None]
        now, start, stop = at[..., None], scene.start[:, None], scene.stop[:, None]
        still = (scene.direction == STILL)[:, None]               # (B, 1, O)
        seen = scene.present[:, None] & (start <= now)            # (B, Q, O)
        able = (seen & ~still)[:, :, None].repeat(1, 1, len(KINDS), 1)    # (B, Q, K, O) what each type may be about;
        able[:, :, DIRECTION] &= torch.minimum(stop, now + 1) - start > 1  # a colour names these shapes for good
        time = torch.where(scene.event == FLASH, scene.time, self.frames).amin(1)[:, None]  # (B, 1) of the flash
        able[:, :, MOMENT] &= (time <= at)[..., None]
        able[:, :, ORDER] &= (scene.time[:, :1] <= at)[..., None]
        able[:, :, FORECAST] = still & seen & (now < stop)        # still there
        able[:, :, SUMMARY] &= now == self.frames - 1
        valid, q = able.any(-1), torch.arange(Q)                  # (B, Q, K)
        spare = 1 + torch.randint(2, (B, Q), generator=generator)         # SHAPE or DIRECTION
        spare = torch.where(valid[rows, q, spare], spare, SHAPE)
        kind = torch.where(valid[rows, q, kind], kind, spare)     # (B, Q)

        luck = torch.rand(B, Q, 3, generator=generator)           # (B, Q, O)
        subject = luck.masked_fill(~able[rows, q, kind], -1).argmax(-1)   # (B, Q) which shape is asked about
        colour = scene.colour[rows, subject, at]                  # (B, Q) at that time
        shape, named = ID['circle'] + scene.shape[rows, subject], ID['red'] + colour
        answers = torch.broadcast_tensors(                        # K times (B, Q): one word for each type
            named, shape, ID['left'] + scene.direction[rows, subject],
            ID['one'] - 1 + seen.sum(-1), ID['appears'] + scene.event[:, :1],
            ID['red'] + scene.flash[:, None], ID['red'] + (colour + 1) % 6, torch.tensor(PAD))
        answer = torch.stack(answers, -1).gather(-1, kind[..., None])     # (B, Q, 1)
        story = torch.where((kind == SUMMARY)[..., None], tell(scene)[:, None], PAD)  # (B, Q, 7)
        answer = F.pad(torch.cat([answer, story], -1), (0, 1), value=EOS)
        question = table([text.split() for text in QUESTIONS.values()], ID)[kind]  # (B, Q, longest)
        name = torch.where(kind == SHAPE, named, shape)[..., None]        # (B, Q, 1)
        question = torch.where(question == ID['_'], name, question)
        empty = ~valid[rows, q, kind][..., None]                  # (B, Q, 1)
        return question.masked_fill(empty, PAD), answer.masked_fill(empty, PAD), kind


def clauses(scene: Scene) -> torch.Tensor:
    """What is told of the two events of B scenes: (B, 2, 3) ids: colour, shape, event, with gaps of padding."""
    rows, kind = torch.arange(len(scene.shape))[:, None], scene.event     # (B, 1), (B, 2)
    colour = scene.colour[rows, scene.subject, scene.time - (kind == VANISHES).long()]  # (B, 2) when last seen
    colour = ID['red'] + torch.where(kind == FLASH, scene.flash[:, None], colour)
    shape = ID['circle'] + scene.shape[rows, scene.subject]       # (B, 2)
    return torch.stack([torch.where(kind == CUT, PAD, colour), torch.where(kind <= VANISHES, shape, PAD),
                        ID['appears'] + kind], -1)


def tell(scene: Scene) -> torch.Tensor:
    """The story of B scenes: (B, 7) ids, `red circle appears then blue flash`, with gaps of padding."""
    return F.pad(clauses(scene), (0, 1), value=ID['then']).flatten(1)[:, :-1]  # without the last `then`


def lifetime(event, time, subject, present, T: int):
    """(B, O) each: the first frame that shows a shape, the first one that no longer does."""
    hit, e, t = subject[..., None] == torch.arange(3), event[..., None], time[..., None]  # (B, 2, O), twice (B, 2, 1)
    return torch.where(hit & (e == APPEARS), t, 0).amax(1), torch.where(hit & (e == VANISHES), t, T).amin(1) * present


def twin_of(scene: Scene, turned: torch.Tensor, T: int) -> Scene:
    """B scenes that differ in one thing: turned (B,) bool, the first shape goes the other way, else the two events
    swap places."""
    swapped = [torch.where(turned[:, None], a, a.flip(1)) for a in (scene.event, scene.subject)]
    start, stop = lifetime(swapped[0], scene.time, swapped[1], scene.present, T)
    direction = scene.direction.clone()
    direction[:, 0] = torch.where(turned, direction[:, 0] ^ 1, direction[:, 0])   # left, right; up, down
    return scene._replace(direction=direction, event=swapped[0], subject=swapped[1], start=start, stop=stop)


def seen_at(scene: Scene, t: torch.Tensor) -> torch.Tensor:
    """Which shapes the frames t (B, n) of B scenes show: (B, O, n) bool."""
    t = t[:, None]
    return (t >= scene.start[..., None]) & (t < scene.stop[..., None])


def describe(scene: Scene, at: torch.Tensor = None) -> torch.Tensor:
    """A sentence for each of B scenes, (B, L) ids of CAPTION_VOCAB with gaps of padding and `<eos>` behind.

    `a red circle moves left and a blue square stays then flash then cut`, colours as first seen; of frame `at` (B, 1)
    alone what it shows and where: `a red circle up far left and a blue flash`; far and near are off a quarter's middle.
    """
    (B, T), word = (len(scene.shape), scene.colour.size(2)), CAPTION_ID
    constant = lambda name: torch.full((B,), word[name])
    t = scene.start.clamp(max=T - 1) if at is None else at.expand(B, 3)   # (B, O)
    there = scene.present if at is None else seen_at(scene, at)[..., 0]
    what = word['red'] + scene.colour.gather(2, t[..., None])[..., 0], word['circle'] + scene.shape
    if at is None:
        moves = scene.direction != STILL
        does = [torch.where(moves, word['moves'], word['stays']),
                torch.where(moves, word['left'] + scene.direction, PAD)]
        ending = torch.stack([constant('then'), word['appears'] + scene.event[:, 0],
                              constant('then'), word['appears'] + scene.event[:, 1]], 1)
    else:
        cut = torch.where(scene.event == CUT, scene.time, T).amin(1, keepdim=True)
        cell = torch.where(at >= cut, scene.cell[:, 1], scene.cell[:, 0])[:, :3]  # (B, O)
        way, does = 2 * at / (T - 1) - 1, []                              # -1 to 1
        for side, first, axis in ((cell // 2, 'up', 1), (cell % 2, 'left', 0)):
            off = way * STEPS[scene.direction][..., axis] * (2 * side - 1)  # (B, O) outwards
            away = torch.where(off > 1 / 3, word['far'], torch.where(off < -1 / 3, word['near'], PAD))
            does += [away, word[first] + side]
        flash = ((scene.event == FLASH) & (scene.time == at)).any(1, keepdim=True)        # (B, 1)
        ending = torch.stack([constant('and'), constant('a'), word['red'] + scene.flash, constant('flash')], 1)
        ending = torch.where(flash, ending, PAD)
    joint = [torch.full_like(scene.shape, word[name]) for name in ('and', 'a')]
    clause = torch.where(there[..., None], torch.stack([*joint, *what, *does], -1), PAD)  # (B, O, words)
    text = torch.cat([clause.flatten(1), ending], 1)                      # (B, L)
    first = (text == word['and']) & ((text != PAD).cumsum(1) == 1)        # no `and` in front
    return F.pad(text.masked_fill(first, PAD), (0, 1), value=EOS)


def seeded(*what) -> torch.Generator:
    """A generator whose state is a function of the arguments (a CPU generator reads 32 bits of its seed)."""
    return torch.Generator().manual_seed(zlib.crc32(repr(what).encode()))


def table(texts, ids: dict) -> torch.Tensor:
    """Lists of words -> (number of lists, longest) ids, with padding behind."""
    return pad_sequence([torch.tensor([ids[word] for word in text]) for text in texts], batch_first=True)


def pack_text(question: torch.Tensor, answer: torch.Tensor):
    """Ids (..., Lq) and (..., La), padded anywhere -> text, targets (..., L) as in Batch, padded behind."""
    tokens = torch.cat([question, answer], -1)                    # (..., Lq + La)
    wanted = torch.cat([torch.full_like(question, IGNORE), answer.masked_fill(answer == PAD, IGNORE)], -1)
    tokens, wanted = drop_padding(tokens, wanted)                 # (..., L + 1)
    return tokens[..., :-1], wanted[..., 1:]


def drop_padding(tokens: torch.Tensor, *others):
    """Move padding among ids (..., n) behind them, the others alike, and cut off what no row needs."""
    order = (tokens == PAD).long().argsort(dim=-1, stable=True)[..., :int((tokens != PAD).sum(-1).max())]
    return [a.gather(-1, order) for a in (tokens, *others)]


def outline(shape, x, y):
    """Signed distance (roughly, in radii) from the outline of shape 0..4 centred at 0; negative inside."""
    ax, ay, r = x.abs(), y.abs(), torch.hypot(x, y)
    d = torch.where(shape == 0, r - 0.85, torch.maximum(ax, ay) - 0.95)   # circle, square
    d = torch.where(shape == 2, torch.maximum(y - 0.8, 0.87 * ax - 0.5 * y - 0.5), d)  # triangle
    cross = torch.minimum(torch.maximum(ax - 1.1, ay - 0.27), torch.maximum(ax - 0.27, ay - 1.1))
    d = torch.where(shape == 3, cross, d)
    return torch.where(shape == RING, (r - 1).abs() - 0.25, d)


def paint_background(texture, axis, contrast):
    """Numbers (...,) -> still grey textures (..., 3, size, size): six plane waves whose directions they decide."""
    i, k = torch.arange(3, device=axis.device)[:, None], torch.arange(1, 7, device=axis.device)
    bits = texture[..., None, None] * (2 * i + 3) * (k * k + 40) * 7919 % 1009 / 1009  # (..., 3, 6) in [0, 1)
    fx, fy, phase = bits[..., None, None].unbind(-4)              # (..., 6, 1, 1)
    wave = torch.cos(2 * math.pi * (8 * (fx - 0.5) * axis + 8 * (fy - 0.5) * axis[:, None] + phase))
    grey = 0.42 + contrast * wave.mean(-3) * 2                    # (..., size, size)
    return grey[..., None, :, :] + 0.02 * (bits[..., 0, :3] - 0.5)[..., None, None]  # a little colour


def main():
    """Draw six clips with questions and answers; print how often each type is asked, and its chance level."""
    world, generator = ShapeWorld(size=64), seeded(0)
    scene = world.sample('train', 4096, generator)
    text, targets, kind = world.ask(scene, generator)
    video = F.pad(world.draw(Scene(*(a[:6] for a in scene))), (0, 2), value=1)  # (6, T, 3, 64, 66)
    sheet = Image.new('RGB', (860, 6 * 150), 'white')
    for b, strip in enumerate(video.permute(0, 3, 1, 4, 2).flatten(2, 3)):  # (64, T * 66, 3)
        sheet.paste(Image.fromarray((255 * strip).byte().numpy()), (4, 10 + 150 * b))
        for q in range(world.questions):
            words = [VOCAB[i] for i in text[b, q] if i > EOS]
            words.insert(int((targets[b, q] != IGNORE).int().argmax()) + 1, '?')
            ImageDraw.Draw(sheet).text((540, 8 + 150 * b + 17 * q), ' '.join(words), fill='black')
    os.makedirs('out', exist_ok=True)
    sheet.save('out/shapes.png')
    print(f'drawn: out/shapes.png\n{"type":10} {"asked":>6} {"answers":>8} {"chance":>7}   in {len(kind)} clips')
    for i, name in enumerate(KINDS):
        answers = Counter(tuple(row[row > EOS].tolist()) for row in targets[kind == i])
        asked, most = sum(answers.values()), max(answers.values())
        print(f'{name:10} {asked:6} {len(answers):8} {most / asked:7.1%}')


if __name__ == '__main__':
    main()
