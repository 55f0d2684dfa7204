# SPDX-License-Identifier: MIT-0
"""Real clips: read one clip of any size and length, or a folder of them with their questions.

A clip is an animated GIF, WebP or PNG, a folder of images, or a sheet. The images of a folder follow in the
order of their names, digits as numbers. A sheet is one still image: its frames in a grid, row by row. Frames
count as evenly spaced, whatever a file says. A folder of clips has a `clips.jsonl`, one object a line:

    {"file": "0.webp", "split": "train", "label": "left", "qa": [["which way does the car turn ?", "left"]]}

`file` is needed, and `qa` or a `caption`, which answers `describe`. `split` is train, val or test. A missing
test or val split is the last tenth of the training clips. In training all values of `label` weigh alike.
`grid` is [columns, rows] of this sheet. Words lose case and punctuation; answers then the same are refused.
"""
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence
from torch.nn import functional as F

from data.shapes import SPLITS, Batch, check, pack_text, seeded, table

IMAGES = ['.png', '.jpg', '.jpeg', '.webp', '.gif', '.bmp']
LIMIT = 2 ** 27            # pixels in all frames of a clip: 0.4 GB
GRID_TAG = 0x010e          # the EXIF field in which save_clip notes the grid of a sheet


def words(text: str) -> list:
    """'Which way does it turn?' -> ['which', 'way', 'does', 'it', 'turn']. Accents and vowel signs stay."""
    inside = lambda c: c in "_'-" or unicodedata.category(c)[0] in 'LMN'      # letters, marks, numbers
    kept = ''.join(c if inside(c) else ' ' for c in text.lower()).split()
    return [word.strip("'-") for word in kept if word.strip("'-")]


def read_clip(path, grid=(4, 4)) -> torch.Tensor:
    """All frames of a clip: (n, 3, height, width) uint8. grid: columns and rows of a sheet."""
    path = Path(path)
    if path.is_dir():
        files = [f for f in path.iterdir() if f.suffix.lower() in IMAGES and f.name[0] != '.' and f.is_file()]
        parts = lambda f: [int(part) if part.isdecimal() else part for part in re.split(r'(\d+)', f.name)]
        frames = [read_image(f)[0][0] for f in sorted(files, key=parts)]
        check(frames, f'{path}: the folder holds no image, wanted one ({", ".join(IMAGES)}) for each frame')
    else:
        frames, noted = read_image(path)
        columns, rows = noted or grid
        if len(frames) == 1 and path.suffix.lower() != '.gif':    # a sheet
            height, width, _ = frames[0].shape
            check(width % columns == height % rows == 0,
                  f'{path}: a sheet of {width}x{height} pixels does not divide into {columns}x{rows} frames; '
                  'say how it is laid out with --grid, or "grid" in clips.jsonl')
            frames = [cell for row in np.split(frames[0], rows) for cell in np.split(row, columns, axis=1)]
    check(len({f.shape for f in frames}) == 1, f'{path}: its frames differ in size, wanted one size')
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def read_image(path: Path):
    """Frames of one image file, a list of (height, width, 3) uint8, and the grid noted in it, or None."""
    check(path.exists(), f'{path}: no such file or folder')
    check(path.is_file(), f'{path}: neither a file nor a folder')
    check(path.stat().st_size, f'{path}: the file is empty, wanted an image')
    try:
        with Image.open(path) as image:
            pixels = image.width * image.height * getattr(image, 'n_frames', 1)
            check(pixels <= LIMIT, f'{pixels:,} pixels in all, wanted at most {LIMIT:,}; make it smaller')
            noted = re.fullmatch(r'([1-9]\d{0,3})x([1-9]\d{0,3})', str(image.getexif().get(GRID_TAG, '')))
            frames = [as_shown(frame) for frame in ImageSequence.Iterator(image)]
            poster = len(frames) > 1 and getattr(image, 'default_image', False)       # of an animated PNG
            return frames[poster:], noted and tuple(map(int, noted.groups()))
    except Exception as error:                                    # Pillow raises many kinds
        raise ValueError(f'{path}: not a readable image ({error})') from None


def as_shown(frame: Image.Image) -> np.ndarray:
    """A frame as a viewer shows it: (height, width, 3) uint8, upright, on black, 16 bits of grey as 8."""
    frame = ImageOps.exif_transpose(frame)
    if frame.mode[0] in 'IF':
        frame = Image.fromarray((np.asarray(frame).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if frame.has_transparency_data:
        frame = frame.convert('RGBA')
        frame = Image.alpha_composite(Image.new('RGBA', frame.size, (0, 0, 0, 255)), frame)
    return np.array(frame.convert('RGB'))


def save_clip(video: torch.Tensor, path):
    """Write (T, 3, height, width) in [0, 1] as a WebP sheet. Lossless: read_clip reads the very same."""
    T, exif = len(video), Image.Exif()
    rows = max(n for n in range(1, T + 1) if T % n == 0 and n * n <= T)       # no side too long for WebP
    pixels = (video.cpu() * 255).round().byte().unflatten(0, (rows, -1)).permute(0, 3, 1, 4, 2)
    exif[GRID_TAG] = f'{T // rows}x{rows}'       # pixels: (rows, height, columns, width, 3)
    Image.fromarray(pixels.flatten(2, 3).flatten(0, 1).numpy()).save(path, lossless=True, exif=exif)


def resample(clip: torch.Tensor, frames: int, size: int) -> torch.Tensor:
    """(n, 3, height, width) -> (frames, 3, size, size) uint8: evenly spaced, the largest central square."""
    side = min(clip.shape[2:])
    top, left = ((n - side) // 2 for n in clip.shape[2:])
    clip = clip[torch.arange(frames) * len(clip) // frames, :, top:top + side, left:left + side].float()
    return F.interpolate(clip, (size, size), mode='bilinear', antialias=True).round().clamp(0, 255).byte()


def read_rows(folder: Path) -> list:
    """The objects of clips.jsonl, checked. ValueError names the file and the line."""
    path, rows = folder / 'clips.jsonl', []
    check(folder.is_dir(), f'--data {folder}: no such folder')
    check(path.exists(), f'--data {folder}: the folder holds no clips.jsonl')
    try:
        lines = path.read_text(encoding='utf-8-sig').split('\n')           # some editors put a mark in front
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8 text ({error})') from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f'{path}, line {number}'
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f'{where}: not JSON ({error})') from None
        check(isinstance(row, dict) and isinstance(row.get('file'), str),
              f'{where}: wanted an object with "file", got {line[:60]}')
        check('\0' not in row['file'] and str(row.get('split', 'train')) in SPLITS,
              f'{where}: split must be train, val or test, got {row.get("split", row["file"])!r}')
        grid = row.get('grid', [4, 4])
        check(isinstance(grid, list) and [type(n) for n in grid] == [int, int] and min(grid) > 0,
              f'{where}: grid must be [columns, rows], got {grid!r}')
        qa = row.setdefault('qa', [['describe', row.get('caption')]])
        pairs = isinstance(qa, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in qa)
        check(qa and pairs and all(isinstance(s, str) and words(s) for pair in qa for s in pair),
              f'{where}: wanted "qa": [[question, answer], ...] or "caption"')
        check(isinstance(row.get('label'), (str, int, float, type(None))),
              f'{where}: label must be a word or a number, got {row.get("label")!r}')
        rows.append(row)
    check(rows, f'{path}: no clip is listed')
    return rows


def check_answers(folder: Path, answers: list):
    """ValueError: answers that differ in more than case and punctuation are the same words to the model."""
    seen = {}
    for answer in answers:
        plain = re.sub(r'[.,;:!?]+(?=\s|$)', ' ', answer.lower()).split()
        other, words_of = seen.setdefault(tuple(words(answer)), (answer, plain))
        check(words_of == plain, f'{folder}: the answers {other!r} and {answer!r} are the same words to the '
                                 'model; write one of them otherwise, as in "minus 1"')


class ClipFolder:
    """A folder of clips, used as ShapeWorld is: vocab, kinds, batch(split, step, batch_size, device)."""

    def __init__(self, folder, frames=8, size=32, questions=8, seed=0, grid=(4, 4), augment=True, vocab=None):
        """vocab: of a model that is measured. Then only the test clips are read, if any are named so."""
        folder, self.seed, self.augment = Path(folder), seed, augment
        rows, clips, changed = read_rows(folder), [], 0
        rows = [row for row in rows if vocab and row.get('split') == 'test'] or rows
        for row in rows:
            clip = read_clip(folder / row['file'], row.get('grid', grid))
            changed += clip.shape != (frames, 3, size, size)
            clips.append(resample(clip, frames, size))
        if changed:
            print(f'{folder}: {changed} of {len(rows)} clips resampled to {frames} frames of {size}x{size}')
        self.video = torch.stack(clips)                           # (n, T, 3, size, size) uint8
        self.split = torch.tensor([SPLITS.index(row.get('split', 'train')) for row in rows])  # (n,)
        for i, name in enumerate(SPLITS):
            train = self.members('train')
            if not len(self.members(name)) and (name == 'test' or not vocab):     # cut off the training clips
                check(len(train) > 1,
                      f'{folder}: no clip for the {name} split, it holds {len(rows)} clips in all')
                self.split[train[-max(1, len(train) // 10):]] = i
        count = Counter(rows[i].get('label') for i in self.members('train'))      # all labels weigh alike
        self.weight = torch.tensor([1 / max(1, count[row.get('label')]) for row in rows])     # (n,)
        check_answers(folder, [answer for row in rows for _, answer in row['qa']])
        asked, told = zip(*((words(q), [*words(a), '<eos>']) for row in rows for q, a in row['qa']))
        used = sorted(set().union(*asked, *told) - {'<eos>'})
        self.vocab = vocab or ['<pad>', '<eos>', *used]
        unknown = [word for word in used if word not in self.vocab]
        check(not unknown, f'{folder}: the model never saw the words {", ".join(unknown[:9])}')
        ids = {word: i for i, word in enumerate(self.vocab)}
        self.text, self.targets = pack_text(table(asked, ids), table(told, ids))  # (all rows of qa, L)
        names = [' '.join(text) for text in asked]
        self.kinds = list(dict.fromkeys(names)) if len(set(names)) <= 12 else ['question']
        self.kind = torch.tensor([self.kinds.index(n) if n in self.kinds else 0 for n in names])
        self.count = torch.tensor([len(row['qa']) for row in rows])       # (n,) questions about each clip
        self.first = self.count.cumsum(0) - self.count            # (n,) its first row of text
        self.most = int(self.count.max())                         # questions of one clip
        self.questions = min(questions, self.most)                # Q

    def members(self, split: str) -> torch.Tensor:
        """Indices of the clips of a split."""
        return (self.split == SPLITS.index(split)).nonzero()[:, 0]

    def batch(self, split: str, step: int, batch_size: int, device='cpu') -> Batch:
        """Training: seeded random clips, augmented. val and test: in order, each once, then none."""
        generator, pick = seeded(self.seed, split, step), self.members(split)
        order = torch.arange(self.questions)                      # (Q,)
        if split == 'train':
            pick = pick[torch.multinomial(self.weight[pick], batch_size, True, generator=generator)]
            order = torch.rand(batch_size, self.most, generator=generator).argsort(-1)[:, :self.questions]
        else:
            pick = pick[step * batch_size:(step + 1) * batch_size]        # (B,)
        row = self.first[pick, None] + order % self.count[pick, None]     # (B, Q) a short list is asked again
        video = self.video[pick].float() / 255                    # (B, T, 3, size, size)
        if split == 'train' and self.augment:
            video = shift_and_colour(video, generator)
        return Batch(video.to(device), *(a[row].to(device) for a in (self.text, self.targets, self.kind)))


def shift_and_colour(video: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Move each clip by up to 8 % and change its brightness, contrast and tint, all frames alike."""
    rand = lambda *shape: torch.rand(len(video), *shape, generator=generator)
    shift = 0.16 * (2 * rand(2, 1) - 1)                           # (B, 2, 1) half the frame is 1
    gain, offset = 0.8 + 0.4 * rand(1, 3, 1, 1), 0.2 * rand(1, 1, 1, 1) - 0.1     # (B, 1, 3 or 1, 1, 1)
    theta = torch.cat([torch.eye(2).expand(len(video), 2, 2), shift], -1)  # (B, 2, 3)
    flat = video.flatten(1, 2)                                    # (B, T * 3, size, size)
    grid = F.affine_grid(theta, flat.shape, align_corners=False)  # (B, size, size, 2)
    flat = F.grid_sample(flat, grid, padding_mode='border', align_corners=False)
    return (flat.view_as(video) * gain + offset).clamp(0, 1)
