# SPDX-License-Identifier: MIT-0
"""Make a folder of clips from a DonkeyCar recording (a tub: catalog_*.catalog files and an images folder).

    python data/donkeycar.py mycar/data data/drive --test-from 0.8
    python train_tiny.py --data data/drive

A clip is 16 frames, 0.1 s apart, on one sheet. Its mirror image is a clip too. Its label is what the driver
did: left, right, straight, right-then-left or left-then-right, from the mean steering of its two halves.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageOps

FRAMES, STRIDE, SIZE, STEP_MS = 16, 8, 64, 100     # STRIDE: frames between starts. SIZE: pixels of a side


def read_tub(tub: Path) -> list:
    """The records of a tub in order of time: [(milliseconds, image path, steering in [-1, 1])]."""
    records, images, manifest = [], tub / 'images', tub / 'manifest.json'
    last = manifest.read_text().strip().rsplit('\n', 1)[-1] if manifest.exists() else '{}'
    try:
        deleted = set(json.loads(last).get('deleted_indexes', ()))
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f'{manifest}: its last line is not what a recording ends with ({error!r})') from None
    for catalog in sorted(tub.glob('catalog_*.catalog')):
        for number, line in enumerate(catalog.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                when = float(row['_timestamp_ms'])
                record = when, images / row['cam/image_array'], float(row['user/angle'])
                if row.get('_index') not in deleted and record[1].exists():       # deleted ones stay listed
                    records.append(record)
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                raise ValueError(f'{catalog}, line {number}: not a record ({error!r})') from None
    return sorted(records)


def cut_clips(records: list) -> list:
    """Lists of FRAMES records that are STEP_MS apart (no gap above twice that), one every STRIDE records."""
    run, clips = [], []
    for record in records:
        if run and record[0] - run[-1][0] > 2 * STEP_MS:
            run = []
        if not run or record[0] - run[-1][0] >= 0.9 * STEP_MS:    # thin a faster recording out
            run.append(record)
            if len(run) >= FRAMES and (len(run) - FRAMES) % STRIDE == 0:
                clips.append(run[-FRAMES:])
    return clips


def describe(angles: list, threshold: float) -> dict:
    """Label and questions of a clip whose halves have these mean angles."""
    turns = ['left' if angle < 0 else 'right' for angle in angles if abs(angle) >= threshold]
    turns = list(dict.fromkeys(turns)) or ['straight']
    way = ' then '.join(turns)
    return {'label': way.replace(' ', '-'), 'qa': [
        ['which way does the car turn ?', way], ['which way does it turn first ?', turns[0]],
        ['which way does it turn last ?', turns[-1]]]}


def write_clips(clips: list, out: Path, args) -> list:
    """Write each clip and its mirror image as a sheet, and clips.jsonl. Return what stands in it."""
    rows, half, seen = [], FRAMES // 2, set()
    out.mkdir()
    for i, clip in enumerate(clips):
        share = i / len(clips) / args.test_from
        split = 'train' if share < 0.9 else 'val' if share < 1 else 'test'
        if split != 'train' and seen.intersection(clip):          # shares frames with a training clip
            continue
        seen.update(clip if split == 'train' else ())
        images = [ImageOps.fit(Image.open(image).convert('RGB'), (SIZE, SIZE)) for _, image, _ in clip]
        angles = [sum(angle for *_, angle in part) / half for part in (clip[:half], clip[half:])]
        for name in (f'{i:04}.webp', f'{i:04}m.webp'):            # the clip, then its mirror image
            sheet = Image.new('RGB', (4 * SIZE, 4 * SIZE))
            for j, image in enumerate(images):
                sheet.paste(image, (j % 4 * SIZE, j // 4 * SIZE))
            sheet.save(out / name, quality=80)
            rows.append({'file': name, 'split': split, **describe(angles, args.threshold)})
            images, angles = [ImageOps.mirror(image) for image in images], [-angle for angle in angles]
    (out / 'clips.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
    return rows


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('tub', type=Path, help='folder of the recording')
    parser.add_argument('out', type=Path, help='folder to make')
    parser.add_argument('--threshold', type=float, default=0.15, help='steering below it is straight [0.15]')
    parser.add_argument('--test-from', type=float, default=0.8, help='share at which test clips begin [0.8]')
    args = parser.parse_args(argv)
    try:
        if not 0 < args.test_from < 1 or not args.threshold >= 0:
            raise ValueError('--test-from is a share between 0 and 1, --threshold at least 0')
        if args.out.exists():
            raise ValueError(f'{args.out} exists; name a folder that does not')
        clips = cut_clips(read_tub(args.tub))
        if not clips:
            raise ValueError(f'{args.tub}: no catalog_*.catalog with a run of {FRAMES} frames without a gap')
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
            rows = write_clips(clips, Path(folder, 'clips'), args)
            Path(folder, 'clips').rename(args.out)                # all of it or nothing
    except (ValueError, OSError) as error:
        print(f'donkeycar: {error}', file=sys.stderr)
        return 2
    print(f'{len(rows)} clips in {args.out}, {sum(r["split"] == "test" for r in rows)} of them for test')
    return 0


if __name__ == '__main__':
    sys.exit(main())
