# SPDX-License-Identifier: MIT-0
"""Real clips: read one clip of any size and length, or a folder of them with their questions.

A clip is an animated GIF or WebP, a folder of images (frames in the order of their names), or a sheet: one
still image that holds its frames in a grid, row by row. Frames count as evenly spaced in time, whatever durations
the file gives. A folder of clips has a `clips.jsonl`, one object a line:

    {"file": "0000.webp", "split": "train", "label": "left", "qa": [["which way does the car turn ?", "left"]]}

`file` is needed, and `qa` (or `caption`, which then answers `describe`). `split` is train, val or test; a test or
val split that is missing is the last tenth of the training clips. `label` balances how often each kind of clip is
drawn in training. `grid`: [columns, rows] of this sheet. Words are lower-cased, punctuation is dropped.
"""
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch.nn import functional as F

from data.shapes import SPLITS, Batch, pack_text, seeded, table

IMAGES = {'.png', '.jpg', '.jpeg', '.webp', '.gif', '.bmp'}


def words(text: str) -> list:
    """'Which way does it turn?' -> ['which', 'way', 'does', 'it', 'turn']."""
    return re.findall(r"\w+(?:['-]\w+)*", text.lower())


def read_clip(path, grid=(4, 4)) -> torch.Tensor:
    """All frames of a clip: (n, 3, height, width) uint8. grid: columns and rows of a sheet."""
    path, (columns, rows) = Path(path), grid
    if path.is_dir():
        frames = [read_image(f)[0] for f in sorted(path.iterdir()) if f.suffix.lower() in IMAGES]
        if not frames:
            raise ValueError(f'{path}: the folder holds no image, wanted one for each frame')
    else:
        frames = read_image(path)
        if len(frames) == 1 and path.suffix.lower() != '.gif':    # a sheet
            height, width, _ = frames[0].shape
            if width % columns or height % rows:
                raise ValueError(f'{path}: a sheet of {width}x{height} pixels does not divide into {columns}x{rows} '
                                 'frames; say how it is laid out with --grid, or "grid" in clips.jsonl')
            frames = [cell for row in np.split(frames[0], rows) for cell in np.split(row, columns, axis=1)]
    if len({f.shape for f in frames}) > 1:
        raise ValueError(f'{path}: its frames differ in size, wanted one size')
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def read_image(path: Path) -> list:
    """The frames of one image file: a list of (height, width, 3) uint8 arrays."""
    try:
        with Image.open(path) as image:
            return [np.asarray(frame.convert('RGB')) for frame in ImageSequence.Iterator(image)]
    except FileNotFoundError:
        raise ValueError(f'{path}: no such file or folder') from None
    except Exception as error:                                    # Pillow raises many kinds
        reason = f'not a readable image ({error})' if path.stat().st_size else 'the file is empty, wanted an image'
        raise ValueError(f'{path}: {reason}') from None


def resample(clip: torch.Tensor, frames: int, size: int) -> torch.Tensor:
    """(n, 3, height, width) -> (frames, 3, size, size) uint8: evenly spaced frames, the largest central square."""
    side = min(clip.shape[2:])
    top, left = ((n - side) // 2 for n in clip.shape[2:])
    clip = clip[torch.arange(frames) * len(clip) // frames, :, top:top + side, left:left + side].float()
    return F.interpolate(clip, (size, size), mode='bilinear', antialias=True).round().clamp(0, 255).byte()


def read_rows(folder: Path) -> list:
    """The objects of clips.jsonl, checked. ValueError names the file and the line."""
    path, rows = folder / 'clips.jsonl', []
    if not path.exists():
        reason = 'the folder holds no clips.jsonl' if folder.is_dir() else 'no such folder'
        raise ValueError(f'--data {folder}: {reason}')
    try:
        lines = path.read_text(encoding='utf-8-sig').splitlines()          # some editors put a mark in front
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8 text ({error})') from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f'{path}, line {number}'
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f'{where}: not JSON ({error})') from None
        if not isinstance(row, dict) or not isinstance(row.get('file'), str):
            raise ValueError(f'{where}: wanted an object with "file", got {line[:60]}')
        if row.get('split', 'train') not in SPLITS:
            raise ValueError(f'{where}: split must be train, val or test, got {row["split"]!r}')
        grid = row.get('grid', [4, 4])
        if not isinstance(grid, list) or [type(n) for n in grid] != [int, int] or min(grid) < 1:
            raise ValueError(f'{where}: grid must be [columns, rows], got {grid!r}')
        qa = row.setdefault('qa', [['describe', row.get('caption')]])
        pairs = isinstance(qa, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in qa)
        if not qa or not pairs or not all(isinstance(s, str) and words(s) for pair in qa for s in pair):
            raise ValueError(f'{where}: wanted "qa": [[question, answer], ...] or "caption"')
        if not isinstance(row.get('label'), (str, int, float, type(None))):
            raise ValueError(f'{where}: label must be a word or a number, got {row["label"]!r}')
        rows.append(row)
    if not rows:
        raise ValueError(f'{path}: no clip is listed')
    return rows


class ClipFolder:
    """A folder of clips with the interface of ShapeWorld: vocab, kinds, batch(split, step, batch_size, device)."""

    def __init__(self, folder, frames=8, size=32, questions=8, seed=0, grid=(4, 4), augment=True):
        folder, self.seed, self.augment = Path(folder), seed, augment
        rows = read_rows(folder)
        clips, changed = [], 0
        for row in rows:
            clip = read_clip(folder / row['file'], row.get('grid', grid))
            changed += clip.shape != (frames, 3, size, size)
            clips.append(resample(clip, frames, size))
        if changed:
            print(f'{folder}: {changed} of {len(rows)} clips resampled to {frames} frames of {size}x{size}')
        self.video = torch.stack(clips)                           # (n, T, 3, size, size) uint8
        self.split = torch.tensor([SPLITS.index(row.get('split', 'train')) for row in rows])  # (n,)
        for i, name in enumerate(SPLITS):                         # what is missing is cut off the training clips
            train = self.members('train')
            if not len(self.members(name)) and len(train) > 1:
                self.split[train[-max(1, len(train) // 10):]] = i
            if not len(self.members(name)):
                raise ValueError(f'{folder}: no clip for the {name} split, it holds {len(rows)} clips in all')

        labels, train = [row.get('label') for row in rows], self.members('train').tolist()
        count = Counter(labels[i] for i in train)
        self.weight = torch.tensor([1 / max(1, count[label]) for label in labels])  # (n,) labels share alike

        asked, told = zip(*((words(q), words(a)) for row in rows for q, a in row['qa']))
        self.vocab = ['<pad>', '<eos>', *sorted({word for text in asked + told for word in text})]
        ids = {word: i for i, word in enumerate(self.vocab)}
        answers = table([text + ['<eos>'] for text in told], ids)
        self.text, self.targets = pack_text(table(asked, ids), answers)   # (questions of all clips, L)
        names = [' '.join(text) for text in asked]
        self.kinds = list(dict.fromkeys(names)) if len(set(names)) <= 12 else ['question']
        self.kind = torch.tensor([self.kinds.index(n) if n in self.kinds else 0 for n in names])
        self.count = torch.tensor([len(row['qa']) for row in rows])       # (n,) questions of each clip
        self.first = self.count.cumsum(0) - self.count            # (n,) its first row of text
        self.most = int(self.count.max())                         # questions of one clip
        self.questions = min(questions, self.most)                # Q

    def members(self, split: str) -> torch.Tensor:
        """Indices of the clips of a split."""
        return (self.split == SPLITS.index(split)).nonzero()[:, 0]

    def batch(self, split: str, step: int, batch_size: int, device='cpu') -> Batch:
        """Training: seeded random clips, augmented. val and test: in order, each once; empty behind the end."""
        generator, pick, order = seeded(self.seed, split, step), self.members(split), torch.arange(self.questions)
        if split == 'train':
            pick = pick[torch.multinomial(self.weight[pick], batch_size, True, generator=generator)]
            order = torch.rand(batch_size, self.most, generator=generator).argsort(-1)[:, :self.questions]  # (B, Q)
        else:
            pick = pick[step * batch_size:(step + 1) * batch_size]        # (B,)
        row = self.first[pick, None] + order % self.count[pick, None]     # (B, Q) a short list is asked again
        video = self.video[pick].float() / 255                    # (B, T, 3, size, size)
        if split == 'train' and self.augment:
            video = shift_and_colour(video, generator)
        return Batch(video.to(device), *(a[row].to(device) for a in (self.text, self.targets, self.kind)))


def shift_and_colour(video: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Move each clip by up to 8 % and change its brightness, contrast and tint, all frames alike."""
    def rand(*shape): return torch.rand(len(video), *shape, generator=generator)
    shift = 0.16 * (2 * rand(2, 1) - 1)                           # (B, 2, 1) half the frame is 1
    gain, offset = 0.8 + 0.4 * rand(1, 3, 1, 1), 0.2 * rand(1, 1, 1, 1) - 0.1  # (B, 1, 3, 1, 1), (B, 1, 1, 1, 1)
    theta = torch.cat([torch.eye(2).expand(len(video), 2, 2), shift], -1)  # (B, 2, 3)
    flat = video.flatten(1, 2)                                    # (B, T * 3, size, size)
    grid = F.affine_grid(theta, flat.shape, align_corners=False)  # (B, size, size, 2)
    flat = F.grid_sample(flat, grid, padding_mode='border', align_corners=False)
    return (flat.view_as(video) * gain + offset).clamp(0, 1)
