# SPDX-License-Identifier: MIT-0
"""The synthetic world: endless clips of coloured shapes, and questions whose answers are known.

    python data/shapes.py        draws clips with their questions into out/shapes.png, prints chance levels

A clip holds one to three shapes on a still, textured background. The first and the third move slowly in one
direction. The second stands still and steps through the colour wheel. Two of four things happen, at different
moments: a shape appears, a shape vanishes, a ring flashes for a single frame, the scene cuts. A question ends
with the word that matters, so its answer is one attention hop away. A batch is a function of (seed, split,
step): the same scenes and questions everywhere, the same noise on the same kind of device.
Legend: B clips, T frames, O = 3 shapes, Q questions a clip, K = 8 types of question, L text tokens.
"""
import os
import zlib
from dataclasses import dataclass, replace
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
COLOUR, SHAPE, SUMMARY = map(KINDS.index, ('colour', 'shape', 'summary'))
VOCAB = ['<pad>', '<eos>', *COLOURS, *SHAPES, *DIRECTIONS, *COUNTS, *EVENTS]
PROMPT = 'narrate'                                                # stands before every stream
VOCAB += sorted({'then', PROMPT, *' '.join(QUESTIONS.values()).split()} - {'_', *VOCAB})
CAPTION_VOCAB = [*VOCAB, 'a', 'and', 'far', 'moves', 'near']  # of sentences to find clips by
ID = {word: i for i, word in enumerate([*CAPTION_VOCAB, '_'])}    # '_' never leaves this file
PAD, EOS, IGNORE = 0, 1, -1

# What happens in B clips, before a pixel is drawn. ShapeWorld.sample says what each entry is.
Scene = NamedTuple('Scene', [(name, torch.Tensor) for name in (
    'present shape colour direction start stop event time subject flash cell jitter texture').split()])


class Batch(NamedTuple):
    """What a dataset hands out."""
    video: torch.Tensor     # (B, T, 3, height, width) float in [0, 1]
    text: torch.Tensor      # (B, Q, L) int64: question, then answer, then padding (0)
    targets: torch.Tensor   # (B, Q, L) int64: the next token where that belongs to the answer, else -1
    kind: torch.Tensor      # (B, Q) int64: index into the dataset's list of question types, -1: not measured
    after: torch.Tensor = None      # streams, where Q is 1. (B, L) int64: each word comes after this frame
    decisions: torch.Tensor = None  # (B, T) int64: the word to say after each frame, EOS for silence


class Captions(NamedTuple):
    """Clips with sentences, to find one by the other."""
    video: torch.Tensor     # (B, T, 3, height, width) float in [0, 1]
    text: torch.Tensor      # (B, L) int64 ids of CAPTION_VOCAB: a sentence, `<eos>`, then padding (0)
    turned: torch.Tensor = None     # (B,) bool: the twins differ in direction, else in order


@dataclass
class ShapeWorld:
    """Endless seeded clips: `batch(split, step, batch_size, device)`. Lengths are in frame widths."""
    frames: int = 8          # T
    size: int = 32           # height and width in pixels
    questions: int = 8       # Q
    seed: int = 0
    radius: float = 0.17     # of a shape. Smaller is harder
    travel: float = 0.33     # of a moving shape during the clip. Shorter is harder
    noise: float = 0.02      # standard deviation of the noise added to every frame
    contrast: float = 0.05   # of the background's texture
    vocab, kinds, caption_vocab = VOCAB, KINDS, CAPTION_VOCAB

    def __post_init__(self):
        check(self.frames > 3, f'a clip of shapes needs at least 4 frames for two events, got {self.frames}')

    def halved(self):
        """The same world in half as many frames."""
        check(self.frames > 7, f'--coarse wants clips of 8 frames or more, got {self.frames}')
        return replace(self, frames=self.frames // 2)

    def batch(self, split: str, step: int, batch_size: int, device='cpu') -> Batch:
        """The clips of one step. split: 'train', 'val' or 'test'. No two of them share a background."""
        generator = seeded(self.seed, split, step)
        scene = self.sample(split, batch_size, generator)
        words = send(device, *self.ask(scene, generator))
        return Batch(self.draw(scene, device, generator.initial_seed()), *words)

    def sample(self, split: str, B: int, generator: torch.Generator) -> Scene:
        """Decide what happens in B clips. All but jitter are whole numbers or bool."""
        rand = lambda *shape: torch.rand(B, *shape, generator=generator)
        randint = lambda high, *shape: torch.randint(high, (B, *shape), generator=generator)
        shuffle = lambda n: rand(n).argsort(-1)                   # (B, n) a permutation a clip
        T, each = self.frames, torch.arange(3)                    # (O,)
        event = shuffle(4)[:, :2]                                 # (B, 2) two of EVENTS, in order of time
        early, late = max(1, T // 4), min(T - 2, 3 * T // 4)
        time = early + shuffle(late - early + 1)[:, :2].sort(-1).values   # (B, 2) the frame of each
        pair = (event <= VANISHES).all(-1)                        # (B,) one appears, another vanishes
        count = 1 + torch.where(pair, 1 + randint(2), randint(3))         # (B,)
        present = each < count[:, None]                           # (B, O)
        order = (rand(3) + 1.0 * ~present).argsort(-1)            # (B, O) the present ones first
        second = (event == VANISHES) & (count > 1)[:, None]       # (B, 2) what vanishes did not appear
        subject = order.gather(1, second.long())                  # (B, 2) the shape it happens to
        hit, frame, what = subject[..., None] == each, time[..., None], event[..., None]  # (B, 2, O or 1)
        start = torch.where(hit & (what == APPEARS), frame, 0).amax(1)    # (B, O) the first frame with it,
        stop = torch.where(hit & (what == VANISHES), frame, T).amin(1) * present  # (B, O) the first after it

        first = randint(6, 1)                                     # (B, 1) the wheel shape's colours:
        other = (first + 2 + shuffle(4)) % 6                      # first, first + 1. (B, 4) the rest
        base, flash = torch.stack([other[:, 0], first[:, 0], other[:, 1]], 1), other[:, 2]  # (B, O), (B,)
        turn = torch.arange(T) * 2 // T * (each == 1)[:, None]    # (O, T) steps on the wheel so far
        colour = (base[..., None] + turn) % 6                     # (B, O, T) index into COLOURS
        direction = torch.stack([randint(4), torch.full((B,), STILL), randint(4)], 1)  # (B, O) of STEPS
        cell = torch.stack([shuffle(4), shuffle(4)], 1)           # (B, 2, 4) quadrants before, after the cut
        jitter = 0.06 * (rand(4, 2) - 0.5)                        # (B, 4, 2) x, y from its middle. Flash last
        digit = 2 + randint(8, 2) if split == 'train' else SPLITS.index(split)  # (B, 2) tells the split
        texture = 10 * randint(10 ** 5, 2) + digit                # (B, 2) grounds before, after the cut
        shape = shuffle(4)[:, :3]                                 # (B, O) index into SHAPES, all different
        return Scene(present, shape, colour, direction, start, stop, event, time, subject, flash, cell,
                     jitter, texture)

    def draw(self, scene: Scene, device='cpu', seed=0, at: torch.Tensor = None) -> torch.Tensor:
        """Paint n frames of B scenes on the device, `at` (B, n) or all: (B, n, 3, size, size) in [0, 1]."""
        T, size = self.frames, self.size
        t = torch.arange(T).expand(len(scene.shape), T) if at is None else at     # (B, n)
        after = t >= when(scene, CUT)                             # (B, n) never, if nothing cuts
        cell = torch.where(after[..., None], scene.cell[:, 1:], scene.cell[:, :1])  # (B, n, 4)
        way = self.travel * (t / (T - 1) - 0.5)                   # (B, n)
        step = STEPS[F.pad(scene.direction, (0, 1), value=STILL)]         # (B, 4, 2)
        centre = 0.25 + 0.5 * torch.stack([cell % 2, cell // 2], -1)      # (B, n, 4, 2) x, y
        centre = centre + scene.jitter[:, None] + way[..., None, None] * step[:, None]
        flash = when(scene, FLASH)                                # (B, 1)
        start, stop = torch.cat([scene.start, flash], 1), torch.cat([scene.stop, flash + 1], 1)   # (B, 4)
        seen = (start[..., None] <= t[:, None]) & (t[:, None] < stop[..., None])  # (B, 4, n)
        colour = torch.cat([scene.colour, scene.flash[:, None, None].expand(-1, 1, T)], 1)        # (B, 4, T)
        colour = PALETTE[colour.gather(2, t[:, None].expand(-1, 4, -1))]  # (B, 4, n, 3)
        shape = F.pad(scene.shape, (0, 1), value=RING)[..., None, None, None]     # (B, 4, 1, 1, 1)

        axis = (torch.arange(size, device=device) + 0.5) / size   # (size,) pixel centres
        centre, seen, colour, shape, after, texture = send(
            device, centre, seen, colour, shape, after, scene.texture)
        ground = paint_background(texture, axis, self.contrast)   # (B, 2, 3, size, size)
        video = torch.where(after[..., None, None, None], ground[:, 1:], ground[:, :1])
        for o in range(4):                                        # video: (B, n, 3, size, size)
            x, y = ((axis - centre[:, :, o, i, None]) / self.radius for i in (0, 1))  # (B, n, size) radii
            depth = -outline(shape[:, o], x[:, :, None], y[..., None]) * self.radius * size  # in pixels
            cover = (depth + 0.5).clamp(0, 1) * seen[:, o, :, None, None]         # (B, n, size, size)
            video = torch.lerp(video, colour[:, o, :, :, None, None], cover[:, :, None])
        other = torch.Generator(device).manual_seed(seed + 1)     # the scene's own would give it away
        return (video + self.noise * torch.randn(video.shape, device=device, generator=other)).clamp(0, 1)

    def stream(self, split: str, step: int, batch_size: int, device='cpu') -> Batch:
        """The clips of one step as they would be watched. Each event is told after the frame that first
        shows it. Q questions come after random frames, about what was seen so far. The last comes at the end
        and asks for the story."""
        B, T, Q = batch_size, self.frames, self.questions
        generator = seeded(self.seed, split, step)
        scene = self.sample(split, B, generator)
        at = torch.randint(1, T, (B, Q), generator=generator)     # (B, Q) each is asked after this frame
        kind = torch.randint(SUMMARY, (B, Q), generator=generator)
        at[:, -1], kind[:, -1] = T - 1, SUMMARY
        asked, _ = self.questions_at(scene, generator, kind, at)  # (B, Q, n)
        told = clauses(scene)                                     # (B, 2, 3) the first word asks for the rest
        decisions = torch.full((B, T), EOS).scatter(1, scene.time, told[..., 0])
        told = F.pad(told * torch.tensor([1, -1, -1]), (0, 1), value=-EOS)        # (B, 2, 4)
        tokens = torch.cat([F.pad(told, (0, asked.size(-1) - 4)), asked], 1)      # (B, 2 + Q, n)
        after = torch.cat([scene.time, at], 1)[..., None].expand_as(tokens).flatten(1)
        order = after.argsort(stable=True)                        # told before asked
        text, targets, after = pack_text(tokens.flatten(1).gather(1, order), after.gather(1, order))
        text, targets, after = (F.pad(a, (1, 0), value=first) for a, first in (   # (B, L)
            (text, ID[PROMPT]), (targets, IGNORE), (after, -1)))
        words = text[:, None], targets[:, None], torch.zeros(B, 1).long(), after, decisions
        return Batch(self.draw(scene, device, generator.initial_seed()), *send(device, *words))

    def captions(self, split: str, step: int, batch_size: int, device='cpu') -> Captions:
        """Clips of one shape, `a red circle moves left then flash then cut`; i and i + (batch_size + 1) // 2
        differ in a direction or in the order of events."""
        generator = seeded(self.seed, split, step, 'captions')
        scene = self.sample(split, 64 + 4 * batch_size, generator)
        alone = (scene.present.sum(1) == 1).nonzero()[:(batch_size + 1) // 2, 0]  # 28 % of all
        scene = Scene(*(a[alone] for a in scene))
        turned = torch.rand(len(alone), generator=generator) < 0.5
        scene = Scene(*(torch.cat(a)[:batch_size] for a in zip(scene, twin_of(scene, turned, self.frames))))
        colour, shape = ID['red'] + scene.colour[:, 0, 0], ID['circle'] + scene.shape[:, 0]       # (B,) each
        way, (first, second) = ID['left'] + scene.direction[:, 0], (ID['appears'] + scene.event).unbind(1)
        text = side_by_side('a', colour, shape, 'moves', way, 'then', first, 'then', second, '<eos>')
        words = send(device, text, torch.cat([turned, turned])[:batch_size])
        return Captions(self.draw(scene, device, generator.initial_seed()), *words)

    def captioned_frames(self, split: str, step: int, batch_size: int, device='cpu') -> Captions:
        """Single frames, T = 1: what they show and where. Nothing about direction or order."""
        generator = seeded(self.seed, split, step, 'frames')
        scene = self.sample(split, batch_size, generator)
        at = torch.randint(self.frames, (batch_size, 1), generator=generator)     # (B, 1)
        video = self.draw(scene, device, generator.initial_seed(), at)
        return Captions(video, *send(device, describe(scene, at)))

    def ask(self, scene: Scene, generator: torch.Generator):
        """Text, targets (B, Q, L) and kind (B, Q): Q questions about each whole scene, the types in turn."""
        kind = (torch.arange(self.questions) + torch.arange(len(scene.shape))[:, None]) % len(KINDS)  # (B, Q)
        tokens, kind = self.questions_at(scene, generator, kind, torch.full_like(kind, self.frames - 1))
        text, targets = pack_text(tokens)
        return text[..., :-1], targets[..., :-1], kind

    def questions_at(self, scene: Scene, generator: torch.Generator, kind: torch.Tensor, at: torch.Tensor):
        """Questions of the types `kind` (B, Q) after the frames `at` (B, Q), about what was seen by then ->
        ids (B, Q, n), the answer's below 0, padded anywhere, and kind (B, Q). A type that does not apply
        (no flash, say) becomes shape or direction. Where nothing can be asked all is padding."""
        (B, Q), rows, q = kind.shape, torch.arange(len(kind))[:, None], torch.arange(kind.size(1))
        now, start, stop = at[..., None], scene.start[:, None], scene.stop[:, None]
        seen = scene.present[:, None] & (start <= now)            # (B, Q, O)
        still = (scene.direction == STILL)[:, None]               # (B, 1, O)
        plain = seen & ~still                                     # (B, Q, O) those of one colour
        colour = scene.colour[rows, :, at]                        # (B, Q, O)
        able, answer = (side_by_side(*a) for a in zip(            # (B, Q, O, K) both. Of each type in turn:
            (plain, ID['red'] + colour),                          # the shapes it may be about, its answer
            (plain, ID['circle'] + scene.shape[:, None]),
            (plain & (torch.minimum(stop, now + 1) - start > 1), ID['left'] + scene.direction[:, None]),
            (plain, ID['one'] - 1 + seen.sum(-1, keepdim=True)),
            (plain & (scene.time[:, :1, None] <= now), ID['appears'] + scene.event[:, :1, None]),
            (plain & (when(scene, FLASH)[..., None] <= now), ID['red'] + scene.flash[:, None, None]),
            (still & seen & (now < stop), ID['red'] + (colour + 1) % 6),
            (plain & (now == self.frames - 1), '<pad>')))
        valid = able.any(2)                                       # (B, Q, K)
        for other in (1 + torch.randint(2, (B, Q), generator=generator), SHAPE):  # a direction may not apply
            kind = torch.where(valid[rows, q, kind], kind, other)         # (B, Q)
        able = able[rows, q, :, kind]                             # (B, Q, O)
        luck = torch.rand(B, Q, 3, generator=generator)           # (B, Q, O)
        answer = answer[rows, q, luck.masked_fill(~able, -1).argmax(-1)]  # (B, Q, K) about one shape
        name = torch.where(kind == SHAPE, answer[..., COLOUR], answer[..., SHAPE])[..., None]
        story = F.pad(clauses(scene), (0, 1), value=ID['then']).flatten(1)[:, None, :-1]  # (B, 1, 7)
        story = torch.where((kind == SUMMARY)[..., None], story, PAD)     # (B, Q, 7)
        answer = F.pad(torch.cat([answer.gather(-1, kind[..., None]), story], -1), (0, 1), value=EOS)
        question = table([text.split() for text in QUESTIONS.values()], ID)[kind]  # (B, Q, longest)
        tokens = torch.cat([torch.where(question == ID['_'], name, question), -answer], -1)
        return torch.where(able.any(-1, keepdim=True), tokens, PAD), kind


def side_by_side(*parts) -> torch.Tensor:
    """Tensors that broadcast to (...,), or words, which become ids -> (..., number of parts)."""
    parts = [torch.tensor(ID[part]) if isinstance(part, str) else part for part in parts]
    return torch.stack(torch.broadcast_tensors(*parts), -1)


def clauses(scene: Scene) -> torch.Tensor:
    """What is told of the two events of B scenes: (B, 2, 3) `red circle appears`, padding after the first."""
    rows, kind = torch.arange(len(scene.shape))[:, None], scene.event     # (B, 1), (B, 2)
    last = scene.time - (kind == VANISHES).long()                 # (B, 2) the frame that shows its colour
    colour = torch.where(kind == FLASH, scene.flash[:, None], scene.colour[rows, scene.subject, last])
    shape = (ID['circle'] + scene.shape[rows, scene.subject]).masked_fill(kind > VANISHES, PAD)   # (B, 2)
    event, cut = ID['appears'] + kind, kind == CUT                # (B, 2)
    return side_by_side(torch.where(cut, event, ID['red'] + colour), shape, event.masked_fill(cut, PAD))


def twin_of(scene: Scene, turned: torch.Tensor, T: int) -> Scene:
    """B other scenes: the first shape goes the other way where turned (B,), else the events swap places."""
    event, subject = (torch.where(turned[:, None], a, a.flip(1)) for a in (scene.event, scene.subject))
    direction = scene.direction ^ (turned[:, None] & (torch.arange(3) == 0))      # left, right; up, down
    twin = scene._replace(direction=direction, event=event, subject=subject)
    start = torch.where(scene.start > 0, when(twin, APPEARS), 0)  # (B, O)
    stop = torch.where((scene.stop > 0) & (scene.stop < T), when(twin, VANISHES), scene.stop)     # (B, O)
    return twin._replace(start=start, stop=stop)


def when(scene: Scene, event: int) -> torch.Tensor:
    """The frame of this event: (B, 1), T where it does not happen."""
    return torch.where(scene.event == event, scene.time, scene.colour.size(2)).amin(1, keepdim=True)


def describe(scene: Scene, at: torch.Tensor) -> torch.Tensor:
    """(B, L): what frame `at` (B, 1) shows: `a red circle up far left and a blue flash`, each one's quarter,
    and whether it has moved out (`far`) or in (`near`) from its middle."""
    shown, t = (scene.start <= at) & (at < scene.stop), at.expand(-1, 3)          # (B, O)
    cell = torch.where(at >= when(scene, CUT), scene.cell[:, 1], scene.cell[:, 0])[:, :3]     # (B, O)
    side = torch.stack([cell % 2, cell // 2], -1)                 # (B, O, 2) x, y
    way = 2 * at[..., None] / (scene.colour.size(2) - 1) - 1      # (B, 1, 1) from -1 to 1
    off = way * STEPS[scene.direction] * (2 * side - 1)           # (B, O, 2) outwards
    x, y = torch.where(off > 1 / 3, ID['far'], torch.where(off < -1 / 3, ID['near'], PAD)).unbind(-1)
    colour = ID['red'] + scene.colour.gather(2, t[..., None])[..., 0]     # (B, O)
    clause = side_by_side('and', 'a', colour, ID['circle'] + scene.shape, y, ID['up'] + side[..., 1], x,
                          ID['left'] + side[..., 0]).where(shown[..., None], PAD)             # (B, O, 8)
    flash = side_by_side('and', 'a', ID['red'] + scene.flash, 'flash')    # (B, 4)
    text = torch.cat([clause.flatten(1), flash.where(at == when(scene, FLASH), PAD)], 1)
    first = (text == ID['and']) & ((text != PAD).cumsum(1) == 1)  # no `and` in front
    return pack_text(F.pad(text.masked_fill(first, PAD), (0, 1), value=EOS))[0]


def check(fine, reason: str):
    """ValueError with this reason, unless fine."""
    if not fine:
        raise ValueError(reason)


def seeded(*what) -> torch.Generator:
    """A generator whose state is a function of the arguments (a CPU generator reads 32 bits of its seed)."""
    return torch.Generator().manual_seed(zlib.crc32(repr(what).encode()))


def send(device, *tensors) -> list:
    """The tensors on a device. A GPU fetches them while the host goes on; elsewhere that is not safe."""
    return [a.to(device, non_blocking=torch.device(device).type == 'cuda') for a in tensors]


def table(texts, ids: dict) -> torch.Tensor:
    """Lists of words -> (number of lists, longest) ids, with padding after the words."""
    return pad_sequence([torch.tensor([ids[word] for word in text]) for text in texts], batch_first=True)


def pack_text(tokens: torch.Tensor, *others):
    """Ids (..., n), padded anywhere, those of answers below 0 -> text, targets (..., L) as in Batch: padding
    goes to the end, what no row needs of it away. The others move alike."""
    order = (tokens == PAD).long().argsort(dim=-1, stable=True)[..., :int((tokens != PAD).sum(-1).max())]
    tokens, *others = (a.gather(-1, order) for a in (tokens, *others))
    targets = F.pad(torch.where(tokens < 0, -tokens, IGNORE), (0, 1), value=IGNORE)[..., 1:]
    return tokens.abs(), targets, *others


def outline(shape, x, y):
    """Signed distance (roughly, in radii) from the outline of shape 0 to 4 centred at 0. Negative inside."""
    ax, ay, r = x.abs(), y.abs(), torch.hypot(x, y)
    long, thin = torch.maximum(ax, ay), torch.minimum(ax, ay)
    d = torch.where(shape == 0, r - 0.85, long - 0.95)            # circle, square
    d = torch.where(shape == 2, torch.maximum(y - 0.8, 0.87 * ax - 0.5 * y - 0.5), d)     # triangle
    d = torch.where(shape == 3, torch.maximum(long - 1.1, thin - 0.27), d)        # cross
    return torch.where(shape == RING, (r - 1).abs() - 0.25, d)


def paint_background(texture, axis, contrast):
    """Numbers (...,) -> still grey textures (..., 3, size, size): six plane waves that the numbers choose."""
    i, k = torch.arange(3, device=axis.device)[:, None], torch.arange(1, 7, device=axis.device)
    bits = texture[..., None, None] * (2 * i + 3) * (k * k + 40) * 7919 % 1000003 / 1000003  # (..., 3, 6)
    fx, fy, phase = bits[..., None, None].unbind(-4)              # (..., 6, 1, 1)
    wave = torch.cos(2 * torch.pi * (8 * (fx - 0.5) * axis + 8 * (fy - 0.5) * axis[:, None] + phase))
    grey = 0.42 + contrast * wave.mean(-3) * 2                    # (..., size, size)
    return grey[..., None, :, :] + 0.02 * (bits[..., 0, :3] - 0.5)[..., None, None]  # a little colour


def main():
    """Draw six clips with questions and answers. Print how often each type is asked, and its chance level."""
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
    print(f'drawn: out/shapes.png\n{"type":10} {"asked":>6} {"answers":>8} {"chance":>7}   '
          f'in {len(kind)} clips')
    for i, name in enumerate(KINDS):
        count = targets[kind == i].unique(dim=0, return_counts=True)[1]   # of each answer
        print(f'{name:10} {count.sum():6} {len(count):8} {count.max() / count.sum():7.1%}')


if __name__ == '__main__':
    main()
