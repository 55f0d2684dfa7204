# SPDX-License-Identifier: MIT-0
"""Real clips: read one clip of any size and length, or a folder of them with their questions.

A clip is an animated GIF, WebP or PNG, a folder of images, or a sheet. The images of a folder follow in the
order of their names, digits as numbers. A sheet is a still image, no GIF: frames in a grid, row by row.
Frames count as evenly spaced, whatever a file says. A folder of clips has a `clips.jsonl`, one object a line:

    {"file": "0.webp", "split": "train", "label": "left", "qa": [["which way does the car turn ?", "left"]]}

`file` is needed, and `qa` or else a `caption`, which answers `describe`. `split` is train, val or test. A
missing test or val split is the last tenth of the training clips. In training all values of `label` weigh
alike. Of more than 8 questions about a clip (preset tiny: 4) a training step draws 8, val and test ask all.
`grid` is [columns, rows] of this sheet. Words lose case and punctuation; texts that then agree are refused.
"""
import copy
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from reprlib import repr as short

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from data.shapes import SPLITS, Batch, check, pack_text, seeded, send, table

IMAGES = ['.png', '.jpg', '.jpeg', '.webp', '.gif', '.bmp']
LIMIT = 2 ** 26            # pixels of a frame: 0.2 GB. A file, read frame by frame, may hold 8 times as many
GRID_TAG = 0x010e          # the EXIF field in which save_clip notes the grid of a sheet
INSIDE = "_-'\u200c\u200d"  # of a word, next to letters. The last two join letters and do not show
LONGEST = 1000             # words of a question or an answer: every text is padded to the longest
lower = lambda text: unicodedata.normalize('NFC', text.lower())   # a letter and its accents become one


def words(text: str) -> list:
    """'Which way does it turn?' -> ['which', 'way', 'does', 'it', 'turn']. Accents and vowel signs stay."""
    inside = lambda c: c in INSIDE or unicodedata.category(c)[0] in 'LMN'     # letters, marks, numbers
    kept = ''.join(c if inside(c) else ' ' for c in lower(text)).split()
    return [word.strip(INSIDE[1:]) for word in kept if word.strip(INSIDE[1:])]


def read_clip(path, grid=(4, 4), frames=None, size=None) -> torch.Tensor:
    """All frames of a clip, or so many, evenly spaced: (n, 3, height, width) uint8.

    grid: columns and rows of a sheet. size: of the central square of each frame; larger ones are not held.
    """
    path, grid = Path(path), tuple(grid)
    pick = lambda n: [i * n // frames for i in range(frames)] if frames else range(n)
    if path.is_dir():
        image = lambda f: f.suffix.lower() in IMAGES and f.name[0] != '.' and f.is_file()
        parts = lambda f: [int(p) if p.isdecimal() else p for p in re.split(r'(\d+)', f.stem.lower())]
        files = sorted(filter(image, path.iterdir()), key=lambda f: (parts(f), f.name))
        check(files, f'{path}: the folder holds no image, wanted one ({", ".join(IMAGES)}) for each frame')
        clip = [read_image(files[i], (1, 1), lambda n: [0], size)[0] for i in pick(len(files))]
    else:
        clip = read_image(path, grid, pick, size)
    check(len({f.shape for f in clip}) == 1, f'{path}: its frames differ in size, wanted one size')
    return torch.stack(clip)


def read_image(path: Path, grid, pick, size) -> list:
    """The frames pick(how many there are) of one image file, a sheet of this grid if it is a still one."""
    check(path.is_file(), f'{path}: ' + ('neither a file nor a folder' if path.exists() else 'no such file'))
    check(path.stat().st_size, f'{path}: the file is empty, wanted an image')
    try:
        with Image.open(path, formats=['PNG', 'JPEG', 'WEBP', 'GIF', 'BMP']) as image:
            poster = getattr(image, 'default_image', False)       # an animated PNG's, which is no frame
            count = 1 if image.format == 'MPO' else getattr(image, 'n_frames', 1) - poster
            pixels = image.width * image.height                   # MPO: one photo, then what belongs to it
            check(pixels <= LIMIT and count * pixels <= 8 * LIMIT, f'{count} frames of {pixels:,} pixels, '
                  f'wanted at most {LIMIT:,} in each and {8 * LIMIT:,} in all; make it smaller')
            if poster:
                image.paste(0, (0, 0, *image.size))               # it must not shine through later frames
            if count > 1 or image.format == 'GIF':
                return [fit(as_shown(image, i + poster), size) for i in pick(count)]
            noted = re.fullmatch(r'([1-9]\d{0,3})x([1-9]\d{0,3})', str(image.getexif().get(GRID_TAG, '')))
            sheet, (columns, rows) = as_shown(image, poster), map(int, noted.groups()) if noted else grid
            width, height = sheet.size
            check(width % columns == height % rows == 0,
                  f'a sheet of {width}x{height} pixels does not divide into {columns}x{rows} frames; '
                  'say how it is laid out with --grid, or "grid" in clips.jsonl')
            w, h = width // columns, height // rows
            cells = [(x, y, x + w, y + h) for y in range(0, height, h) for x in range(0, width, w)]
            return [fit(sheet.crop(cells[i]), size) for i in pick(len(cells))]
    except Exception as error:                                    # Pillow raises many kinds
        raise ValueError(f'{path}: not a readable image ({error})') from None


def as_shown(image: Image.Image, i: int) -> Image.Image:
    """Frame i in RGB as a viewer shows it: upright, on black, 16 bits of grey as 8."""
    image.seek(i)
    frame = ImageOps.exif_transpose(image)
    if frame.mode[0] in 'IF':
        grey = np.asarray(frame).astype(np.int64)
        grey = np.where(grey == frame.info.get('transparency'), 0, grey >> 8)
        frame = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    black = Image.new('RGBA', frame.size, 'black')
    return Image.alpha_composite(black, frame.convert('RGBA')).convert('RGB')


def fit(frame: Image.Image, size) -> torch.Tensor:
    """An RGB image, or its largest central square in this size -> (3, height, width) uint8."""
    frame = ImageOps.fit(frame, (size, size), Image.Resampling.BILINEAR) if size else frame
    return torch.from_numpy(np.array(frame)).permute(2, 0, 1)


def save_clip(video: torch.Tensor, path):
    """Write (T, 3, height, width) in [0, 1] as a WebP sheet. Lossless: read_clip reads the very same. Where
    no grid holds them all and has sides that WebP can have, as for 521 frames, the last ones are left out."""
    rows_of = lambda n: max(rows for rows in range(1, n + 1) if n % rows == 0 and rows * rows <= n)
    fits = lambda n: max(rows_of(n) * video.size(2), n // rows_of(n) * video.size(3)) < 2 ** 14
    T = next(filter(fits, range(len(video), 0, -1)), 0)
    check(T, f'a frame of {tuple(video.shape[2:])} is more than WebP holds, or there is none')
    video, rows, exif = video[:T], rows_of(T), Image.Exif()
    pixels = (video.cpu() * 255).round().byte().unflatten(0, (rows, -1)).permute(0, 3, 1, 4, 2)
    exif[GRID_TAG] = f'{T // rows}x{rows}'       # pixels: (rows, height, columns, width, 3)
    Image.fromarray(pixels.flatten(2, 3).flatten(0, 1).numpy()).save(path, lossless=True, exif=exif)


def read_rows(folder: Path) -> list:
    """The objects of clips.jsonl, checked. ValueError names the file and the line."""
    path, rows = folder / 'clips.jsonl', []
    check(folder.is_dir(), f'--data {folder}: no such folder')
    check(path.is_file(), f'--data {folder}: the folder holds no clips.jsonl')
    for number, line in enumerate(path.read_bytes().split(b'\n'), 1):
        if not line.strip():
            continue
        where = f'{path}, line {number}'
        try:
            rows.append(json.loads(line.decode('utf-8-sig')))     # some editors put a mark in front
        except (ValueError, RecursionError) as error:
            raise ValueError(f'{where}: not JSON, or not UTF-8 ({error})') from None
        check_row(rows[-1], where)
    check(rows, f'{path}: no clip is listed')
    file, times = Counter(row['file'] for row in rows).most_common(1)[0]
    check(times == 1, f'{path}: {file} stands on {times} lines; wanted one a clip, with all its questions')
    return rows


def check_row(row, where: str):
    """ValueError: a line of clips.jsonl that is not as the top of this file says. `qa` is filled in."""
    check(isinstance(row, dict) and type(row.get('file')) is str and row['file'] and '\0' not in row['file'],
          f'{where}: wanted an object with "file", the name of a clip, got {short(row)}')
    check(row.get('split', 'train') in SPLITS,
          f'{where}: split must be train, val or test, got {short(row.get("split"))}')
    grid = row.get('grid', [4, 4])
    check(isinstance(grid, list) and [type(n) for n in grid] == [int, int] and min(grid) > 0,
          f'{where}: grid must be [columns, rows], got {short(grid)}')
    qa = row.setdefault('qa', [['describe', row.get('caption')]])
    pairs = isinstance(qa, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in qa)
    fits = lambda text: isinstance(text, str) and 0 < len(words(text)) <= LONGEST
    check(qa and pairs and all(fits(text) for pair in qa for text in pair),
          f'{where}: wanted "qa": [[question, answer], ...] or "caption", of 1 to {LONGEST} words each')
    label = row.get('label')
    check(label is None or type(label) in (str, int, float) and label == label,           # not NaN
          f'{where}: label must be a word or a number, got {short(label)}')


def check_texts(folder: Path, texts):
    """ValueError: texts that differ in more than case and punctuation are the same words to the model."""
    seen = {}
    for text in texts:
        plain = re.sub(r'[.,;:!?]+(?=\s|$)', ' ', lower(text)).split()
        other, words_of = seen.setdefault(tuple(words(text)), (text, plain))
        check(words_of == plain, f'{folder}: the texts {other!r} and {text!r} are the same words to the '
                                 'model; write one of them otherwise, as in "minus 1"')


class ClipFolder:
    """A folder of clips, used as ShapeWorld is: vocab, kinds, batch(split, step, batch_size, device)."""

    def __init__(self, folder, frames=8, size=32, questions=8, seed=0, grid=(4, 4), vocab=None):
        """vocab: of a model that is measured. Then only the test clips are read, if any are named so."""
        folder, self.seed, self.questions = Path(folder), seed, questions
        rows = read_rows(folder)
        rows = [row for row in rows if vocab and row.get('split') == 'test'] or rows
        clips = [read_clip(folder / row['file'], row.get('grid', grid), frames, size) for row in rows]
        self.video = torch.stack(clips)                           # (n, T, 3, size, size) uint8
        print(f'{folder}: {len(rows)} clips, resampled to {frames} frames of {size}x{size}')
        self.split = torch.tensor([SPLITS.index(row.get('split', 'train')) for row in rows])  # (n,)
        for i, name in enumerate(SPLITS):
            train = self.members('train')
            if not len(self.members(name)) and (name == 'test' or not vocab):     # cut off the training clips
                check(len(train) > 1, f'{folder}: no clip for the {name} split, {len(rows)} clips in all')
                self.split[train[-max(1, len(train) // 10):]] = i
        count = Counter(rows[i].get('label') for i in self.members('train'))      # all labels weigh alike
        self.weight = torch.tensor([1 / max(1, count[row.get('label')]) for row in rows])     # (n,)
        for texts in zip(*(pair for row in rows for pair in row['qa'])):          # questions, then answers
            check_texts(folder, texts)
        asked, told = zip(*((words(q), [*words(a), '<eos>']) for row in rows for q, a in row['qa']))
        used = sorted(set().union(*asked, *told) - {'<eos>'})
        self.vocab = vocab or ['<pad>', '<eos>', *used]
        unknown = [word for word in used if word not in self.vocab]
        check(not unknown, f'{folder}: the model never saw the words {", ".join(unknown[:9])}')
        ids = {word: i for i, word in enumerate(self.vocab)}
        tokens = torch.cat([table(asked, ids), -table(told, ids)], 1)     # (rows of qa, longest + longest)
        self.text, self.targets = (a[:, :-1] for a in pack_text(tokens))  # (rows of qa, L)
        names = [' '.join(text) for text in asked]
        self.kinds = list(dict.fromkeys(names)) if len(set(names)) <= 12 else ['question']
        self.kind = torch.tensor([self.kinds.index(n) if n in self.kinds else 0 for n in names])
        self.count = torch.tensor([len(row['qa']) for row in rows])       # (n,) questions about each clip
        self.first = self.count.cumsum(0) - self.count            # (n,) its first row of text
        self.most = int(self.count.max())                         # questions of one clip

    def halved(self):
        """The same clips, every second frame of them."""
        check(self.video.size(1) > 3, f'--coarse wants clips of 4 frames or more, got {self.video.size(1)}')
        other = copy.copy(self)
        other.video = self.video[:, ::2]
        return other

    def members(self, split: str) -> torch.Tensor:
        """Indices of the clips of a split."""
        return (self.split == SPLITS.index(split)).nonzero()[:, 0]

    def batch(self, split: str, step: int, batch_size: int, device='cpu') -> Batch:
        """Training: seeded random clips, augmented. val and test: in order, each once, then none."""
        generator, pick, trains = seeded(self.seed, split, step), self.members(split), split == 'train'
        pick = (pick[torch.multinomial(self.weight[pick], batch_size, True, generator=generator)] if trains
                else pick[step * batch_size:(step + 1) * batch_size])     # (B,)
        count = self.count[pick, None]                            # (B, 1)
        each = torch.arange(self.most if trains else max(self.count[pick].tolist(), default=0))
        order = each % count                                      # (B, Q) a short list is asked again,
        if trains:                                                # in an order of its own
            luck = torch.rand(batch_size, self.most, generator=generator) + (each >= count)
            order = luck.argsort(-1).gather(1, order)[:, :self.questions]
        row = self.first[pick, None] + order
        kind = self.kind[row].masked_fill(each[:order.size(1)] >= count, -1)      # which is not measured
        video, *texts = send(device, self.video[pick], self.text[row], self.targets[row], kind)
        video = augmented(video, generator) if trains else video.float() / 255
        return Batch(video, *texts)


def augmented(video: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(B, T, 3, height, width) uint8 -> in [0, 1], on its device, all frames of a clip alike: moved, zoomed,
    blurred, its colours faded or strengthened, its contrast, tint and brightness changed."""
    about = lambda middle, width, *shape: send(
        video.device, middle + width * (2 * torch.rand(len(video), *shape, generator=generator) - 1))[0]
    zoom, shift = about(1, 0.1, 1, 1), about(0, 0.16, 2, 1)       # half the frame is 1
    theta = torch.cat([zoom * torch.eye(2, device=video.device), shift], -1)      # (B, 2, 3)
    flat = video.flatten(1, 2).float() / 255                      # (B, T * 3, height, width)
    grid = F.affine_grid(theta, flat.shape, align_corners=False)  # (B, height, width, 2)
    flat = F.grid_sample(flat, grid, padding_mode='border', align_corners=False)
    soft = F.avg_pool2d(F.pad(flat, (1, 1, 1, 1), mode='replicate'), 3, 1)
    video = torch.lerp(flat, soft, about(0.25, 0.25, 1, 1, 1)).view_as(video)
    video = torch.lerp(video.mean(2, keepdim=True), video, about(1, 0.5, 1, 1, 1, 1))         # from grey
    mean = video.mean((1, 2, 3, 4), keepdim=True)
    video = mean + (video - mean) * about(1, 0.3, 1, 1, 1, 1)
    return (video * about(1, 0.15, 1, 3, 1, 1) + about(0, 0.15, 1, 1, 1, 1)).clamp(0, 1)
