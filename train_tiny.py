# SPDX-License-Identifier: MIT-0
"""Train a small video-language model in minutes, see the patches it processed, ask it about a clip.

    python train_tiny.py                                 the main job: MoD on the synthetic world
    python train_tiny.py --recipe dense                  the same model without routing
    python train_tiny.py --recipe stream                 a model that narrates while the video plays
    python train_tiny.py --stream CLIP                   let the newest such model watch a clip
    python train_tiny.py --recipe gamma --init-from RUN  convert a dense model (gamma-MoD)
    python train_tiny.py --study                         which layers to convert, at equal FLOPs
    python train_tiny.py --recipe tempme                 learn to find clips by sentences, in four ways
    python train_tiny.py --find "a red circle moves left"  rank clips by the newest such model
    python train_tiny.py --data FOLDER                   your own clips (see data/clips.py)
    python train_tiny.py --ask CLIP "what shape is red"  ask the newest trained model about a clip
    python train_tiny.py --resume out/RUN                go on with an interrupted run
    python train_tiny.py --bench                         time and memory of placements against dense
    python train_tiny.py --compare                       every recipe from one dense model, next to its paper

Everything a run makes goes into its folder, out/RUN: config.json, log.csv, ckpt.pt, result.json,
tokens.png, tokens.gif, clip.webp (the clip in these pictures), curve.png, and of a stream narration.png.
"""
import argparse
import csv
import difflib
import functools
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import sys
import textwrap
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from operator import ge, le
from pathlib import Path

BEGAN = time.time()     # importing torch takes seconds, and they count

import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data.clips import ClipFolder, read_clip, read_rows, resample, words
from data.shapes import PROMPT, ShapeWorld
from modvideo import (EOS, GATES, IGNORE, PAD, PRESETS, ROUTINGS, Block, KVCache, MoDBlock, ModVideo,
                      ModVideoConfig, Quantized, Reduction, Retriever, Router, choose_mod_layers, code_usage,
                      compose, configure_optimizer, count_flops, draw_tokens, from_clusters,
                      init_from, layer_ranks, load_checkpoint, merge_lora, num_params, pack, save_checkpoint,
                      token_density)

# What a preset trains with: clips a step, steps, questions a clip; for retrieval clips a step, steps on
# single frames, then on clips, rank of LoRA.
RUNS = {'tiny': dict(batch=8, steps=100, questions=4, pairs=16, frames=20, adapt=10, rank=8),
        'cpu': dict(batch=8, steps=1800, questions=8, pairs=64, frames=500, adapt=220, rank=8),
        'gpu': dict(batch=64, steps=2500, questions=8, pairs=128, frames=2000, adapt=1000, rank=4),
        'deep': dict(batch=32, steps=2500, questions=8, pairs=128, frames=2000, adapt=1000, rank=4),
        'long': dict(batch=8, steps=2500, questions=8, pairs=64, frames=2000, adapt=1000, rank=4)}
PLACEMENTS = ['interleaved', 'interleaved-deep', 'all', 'all-deep', 'early-exit', 'layer-skip']
RECIPES = {                        # what each asks of the configuration, unless a flag says otherwise
    'mod': dict(placement='interleaved'), 'dense': dict(placement='none'),
    'stream': dict(placement='interleaved', streaming=True),
    'gamma': dict(routing='sequence', gate='gamma'),
    'holitom': dict(placement='none', reduction='holitom'),
    'bvllm': dict(placement='none', reduction='bvllm'),
    'vqtoken': dict(placement='none', reduction='vqtoken'),
    'vq': dict(placement='none', reduction='vq'),
    'tempme': dict(encoder='tempme'), 'frames': dict(encoder='plain'), 'retrieval': dict(encoder='tempme'),
    **{name: dict(placement='none', reduction=name) for name in ('uniform', 'prune', 'tome', 'pool')}}
RETRIEVAL = ['tempme', 'frames', 'retrieval']        # their model is a Retriever
AS_IT_IS = ['holitom', 'prune', 'tome', 'pool']      # with --init-from these need no training
FIND_CLIPS = 256      # held-out clips, their sentences all different, that retrieval is measured on
EVAL_CLIPS = 512      # held-out clips of the synthetic world that the final accuracy is measured on
ROUNDS = 7            # of a benchmark, behind two to warm up
LONG_STREAM = 1000    # frames
WORDS = 32            # of an answer whose speed is measured


# --------------------------------------------------------------------------------------------------
# 1. Flags: one dataclass, turned into a command line
# --------------------------------------------------------------------------------------------------

def flag(default, group: str, text: str, choices=None, metavar=None):
    """A field that is a command-line flag."""
    return field(default=default,
                 metadata=dict(group=group, text=text, choices=choices, metavar=metavar))


@dataclass
class Settings:
    """Every flag with its default. 0, '' and 'auto': as preset, recipe or machine say."""
    recipe: str = flag('mod', 'what to train', 'mod routes vision tokens past layers, dense does '
                       'not, stream speaks between frames, gamma converts a dense model, holitom '
                       'merges vision tokens before the decoder, bvllm selects them by the question, '
                       'vqtoken makes a codebook of each clip, vq learns one for all; uniform (whole '
                       'frames), prune, tome and pool are baselines at the same number of tokens; tempme '
                       'finds clips by sentences: it trains frames (single ones), then retrieval four times',
                       [*RECIPES])
    data: str = flag('shapes', 'what to train',
                     "'shapes', the synthetic world, or a folder with clips.jsonl")
    preset: str = flag('auto', 'what to train', 'size of model and video', ['auto', *PRESETS])
    keep_ratio: float = flag(0.2, 'what to train',
                             "share of each frame's vision tokens that a routed layer processes")
    placement: str = flag('auto', 'what to train', f'which layers route: {", ".join(PLACEMENTS)}, '
                          'or a list such as 1,3; auto: as the recipe says, by rank for gamma')
    routing: str = flag('auto', 'what to train', 'who selects: a router in each frame or in the '
                        'sequence, or nobody', ['auto', *ROUTINGS])
    gate: str = flag('auto', 'what to train', "what a router's score does to an update",
                     ['auto', *GATES])
    encoder: str = flag('auto', 'what to train', 'plain encodes every frame alone, tempme merges frames '
                        'on the way; auto: as the recipe says', ['auto', 'plain', 'tempme'])
    lora_rank: int = flag(0, 'what to train', 'retrieval: learn only so many directions of each qkv, and '
                          'freeze the rest; 0 = learn everything; tempme: 0 = as the preset says')
    layers: int = flag(0, 'what to train', "decoder layers, or of retrieval both towers', 0 = the preset's")
    window: int = flag(0, 'what to train', 'frames that a stream remembers, 0 = all')
    init_from: str = flag('', 'what to train', f'run folder whose weights to begin with; '
                          f'{", ".join(AS_IT_IS)} then need no training, unless --steps asks for some')
    retain_ratio: float = flag(0.1, 'what to train', 'holitom: share of the vision tokens that stays')
    tau: float = flag(0.8, 'what to train', 'holitom: similarity above which a patch stands still')
    inner_layer: int = flag(0, 'what to train', 'holitom: decoder layer before which vision tokens '
                            'merge once more, 0 = none')
    inner_ratio: float = flag(0.5, 'what to train', 'holitom: share that is merged away there')
    budget: int = flag(0, 'what to train', 'bvllm and the baselines: the most vision tokens of a clip, '
                       '0 = a quarter')
    codes: str = flag('auto', 'what to train', "vqtoken: tokens of a clip, or 'adaptive'; vq: size of the "
                      'codebook; auto: 12 and 256')
    hard: bool = flag(False, 'what to train', 'bvllm: take whole frames in place of mixtures')
    skip_ratio: float = flag(0.51, 'what to train', 'gamma: share of all tokens that skip a '
                             'converted layer')
    dense_layers: int = flag(0, 'what to train', 'gamma: layers that stay dense, the last one and '
                             'those of highest rank, 0 = an eighth')
    frames: int = flag(0, 'what to train', "frames of a clip, 0 = the preset's; of a folder: "
                       "its clips' own, at most twice as many")
    grid: str = flag('4x4', 'what to train', 'columns x rows of a clip that is a sheet of frames')
    blind: bool = flag(False, 'how to train', "show it another clip's video in place of the right one: what "
                       'words alone can tell')
    steps: int = flag(0, 'how to train', 'optimizer steps, 0 = the preset\'s')
    batch: int = flag(0, 'how to train', 'clips a step, 0 = the preset\'s')
    lr: float = flag(0.01, 'how to train',
                     'learning rate of the matrices; the rest learns at 3 %% of it')
    seed: int = flag(0, 'how to train', 'decides the weights, the clips and their order')
    device: str = flag('auto', 'where', 'auto takes CUDA, else MPS, else the CPU',
                       ['auto', 'cuda', 'mps', 'cpu'])
    dtype: str = flag('auto', 'where', 'of the matrix products', ['auto', 'float32', 'bfloat16'])
    compile: bool = flag(False, 'where', 'torch.compile the model (a minute of waiting first)')
    deterministic: bool = flag(False, 'where',
                               'the same numbers on every run, on CUDA too (slower)')
    out: str = flag('', 'files', 'run folder, to write or to read the model from')
    resume: str = flag('', 'files', 'run folder to go on with, under its own settings')
    bench: bool = flag(False, 'instead of training',
                       'time and memory of each placement against dense')
    compare: bool = flag(False, 'instead of training', 'every recipe from one dense model: a table of what '
                         'each reaches and costs, next to its paper; goes on where it stopped')
    recipes: str = flag('', 'instead of training', "with --compare: rows, such as mod-all,vqtoken; '' = all")
    seeds: int = flag(0, 'instead of training', 'with --compare: how many, 0 = 3')
    study: bool = flag(False, 'instead of training', 'gamma-MoD with all layers, every second, '
                       'random ones, those of lowest rank, all at the same FLOPs')
    ask: list = flag((), 'instead of training',
                     'a clip (GIF, WebP, sheet, folder of images) and a question; answered on the CPU',
                     metavar=('CLIP', 'QUESTION'))
    stream: str = flag('', 'instead of training', 'a clip for a stream model to narrate, on the CPU')
    question: list = flag((), 'instead of training', 'with --stream: asked behind a frame, from 1 on',
                          metavar=('FRAME', 'QUESTION'))
    find: str = flag('', 'instead of training', 'a sentence; ranks the clips of --data by the newest '
                     'retrieval model, on the CPU', metavar='SENTENCE')
    theta: float = flag(0.5, 'instead of training', 'stay silent while P(silence) is at least this')


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence."""

    def error(self, message):
        self.exit(2, f'train_tiny: {message} (--help lists the flags)\n')


def parse(argv) -> Settings:
    """Command line -> Settings. With --resume, the run's own settings are the defaults."""
    parser = Parser(prog='train_tiny.py', description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {}
    for f in fields(Settings):
        group = groups.setdefault(f.metadata['group'],
                                  parser.add_argument_group(f.metadata['group']))
        how = dict(type=f.type, choices=f.metadata['choices'])
        if f.type is bool:
            how = dict(action='store_true')
        if f.type is list:
            how = dict(nargs=2, metavar=f.metadata['metavar'])
        shown = '' if f.type in (bool, list) else f' [{f.default}]' if f.default != '' else ''
        group.add_argument('--' + f.name.replace('_', '-'), default=f.default,
                           help=f.metadata['text'] + shown, **how)
    args = parser.parse_args(argv)
    if args.resume:
        saved = read_config(Path(args.resume))['settings']
        parser.set_defaults(**{f.name: saved[f.name] for f in fields(Settings)
                               if f.name in saved and f.name not in ('resume', 'out')})
        args = parser.parse_args(argv)
    settings = Settings(**vars(args))
    check(settings)
    return settings


# Flags that mean something to these recipes alone; --study and --bench have gamma in them, too.
ONLY = {'retain_ratio': ['holitom'], 'tau': ['holitom'], 'inner_layer': ['holitom'], 'inner_ratio': ['holitom'],
        'budget': ['bvllm', 'uniform', 'prune', 'tome', 'pool'], 'hard': ['bvllm'], 'codes': ['vqtoken', 'vq'],
        'skip_ratio': ['gamma'], 'dense_layers': ['gamma'], 'lora_rank': ['retrieval', 'tempme']}
INSTEAD = ['ask', 'stream', 'find', 'study', 'compare', 'bench']       # of training


def dashed(name: str) -> str:
    return '--' + name.replace('_', '-')


def given(s: Settings) -> dict:
    """The flags that differ from their defaults."""
    return {f.name: getattr(s, f.name) for f in fields(s) if getattr(s, f.name) not in (f.default, [])}


def check(s: Settings):
    """ValueError: values out of range, and flags that would do nothing."""
    said = given(s)
    for f in fields(s):
        if f.type is int and not 0 <= getattr(s, f.name) < 2 ** 63:
            raise ValueError(f'{dashed(f.name)} must be at least 0, below 2**63, got {getattr(s, f.name)}')
    for name in ('skip_ratio', 'theta'):
        if not 0 < getattr(s, name) < 1:
            raise ValueError(f'{dashed(name)} must be between 0 and 1, got {getattr(s, name)}')
    if not 0 < s.lr < math.inf:
        raise ValueError(f'--lr must be a number above 0, got {s.lr}')
    if s.question and not s.question[0].isdecimal():
        raise ValueError(f'--question wants the number of a frame first, got {s.question[0]!r}')
    if not (s.codes in ('auto', 'adaptive') or s.codes.isdecimal() and int(s.codes)):
        raise ValueError(f"--codes wants a number from 1 on or 'adaptive', got {s.codes!r}")
    if s.codes == 'adaptive' and s.recipe == 'vq':
        raise ValueError('--codes adaptive goes with --recipe vqtoken')
    if s.blind and s.batch == 1:
        raise ValueError('--blind shows the video of another clip of the batch; wanted --batch 2 or more')
    instead = [dashed(name) for name in INSTEAD if name in said]
    if len(instead) > 1:
        raise ValueError(f'{" and ".join(instead)} do not go together')
    for names, partner in (({'question'}, 'stream'), ({'recipes', 'seeds'}, 'compare')):
        for name in sorted(names & {*said} if partner not in said else []):
            raise ValueError(f'{dashed(name)} goes with {dashed(partner)}')
    if s.resume and s.out:
        raise ValueError(f'--resume goes on in its own folder, {s.resume}; leave --out away')
    if s.compile and s.bench:
        raise ValueError('--bench times the model as it is; leave --compile away')
    for name in {*said} & {'placement', 'routing', 'gate', 'keep_ratio'}:
        if s.recipe in ('dense', *RETRIEVAL) and not s.bench:
            raise ValueError(f'{dashed(name)} does not go with --recipe {s.recipe}, which routes nothing')
    sets = {'study': ['placement'], 'bench': [] if 'reduction' in RECIPES[s.recipe] else ['placement', 'encoder']}
    for what, name in ((what, name) for what, names in sets.items() for name in names):
        if what in said and name in said:
            raise ValueError(f'{dashed(name)} does not go with --{what}, which compares several')
    for name in [] if s.compare or s.resume else [name for name in ONLY if name in said]:
        if s.recipe not in ONLY[name] and not ('gamma' in ONLY[name] and (s.study or s.bench)):
            raise ValueError(f'{dashed(name)} goes with --recipe {" or ".join(ONLY[name])}')
    if s.recipe == 'frames' and s.encoder == 'tempme':
        raise ValueError('--recipe frames has nothing to merge; leave --encoder tempme away')
    if s.recipe == 'gamma' and 'keep_ratio' in said:
        raise ValueError('--keep-ratio does not go with --recipe gamma; --skip-ratio decides there')
    if s.recipe == 'tempme' and ('init_from' in said or 'encoder' in said):
        raise ValueError('--recipe tempme begins with single frames and sets --encoder and --init-from itself')
    parse_grid(s.grid)


def read_config(run: Path) -> dict:
    """What a run's config.json says: 'settings' and 'model'."""
    path = existing(run / 'config.json')
    try:
        config = json.loads(path.read_text())
        return dict(settings=dict(config['settings']), model=dict(config['model']))
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{path} is not the configuration of a run') from None


def write_whole(path: Path, text: str):
    """Write whole or not at all."""
    Path(f'{path}.part').write_text(text)
    os.replace(f'{path}.part', path)


def write_json(path: Path, value: dict):
    write_whole(path, json.dumps(value, indent=1))


def begin_with(folder: Path, asked: dict):
    """Note what the runs in a folder are made with, --out aside. ValueError: they were begun with something else."""
    path, asked = folder / 'asked.json', json.loads(json.dumps(asked))         # lists, as they are read again
    asked.pop('out', None)
    before = json.loads(path.read_text()) if path.exists() else asked
    for name, value in asked.items():
        if before.get(name) != value:
            raise ValueError(f'{folder} was begun with {dashed(name)} {before.get(name)}, not {value}; '
                             'name another folder with --out')
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, asked)


def existing(path: Path) -> Path:
    """The path, or one clear sentence."""
    if not path.exists():
        raise ValueError(f'{path} does not exist')
    return path


# --------------------------------------------------------------------------------------------------
# 2. Setting up: machine, data, model
# --------------------------------------------------------------------------------------------------

def pick_machine(s: Settings):
    """Fill in device, dtype, preset, steps, batch, say so -> autocast context of forward passes."""
    available = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(),
                 'cpu': True}
    if s.device == 'auto':
        s.device = next(d for d in available if available[d])
    elif not available[s.device]:
        raise ValueError(f'--device {s.device}: this machine has none, '
                         'or this torch was built without it')
    s.dtype = ('bfloat16' if s.device == 'cuda' else 'float32') if s.dtype == 'auto' else s.dtype
    s.preset = ('gpu' if s.device == 'cuda' else 'cpu') if s.preset == 'auto' else s.preset
    finds = s.recipe in RETRIEVAL
    if not (s.recipe in AS_IT_IS and s.init_from and s.placement == 'auto'):    # merging alone needs no training
        s.steps = s.steps or RUNS[s.preset][
            'steps' if not finds else 'frames' if s.recipe == 'frames' else 'adapt']
    s.batch = s.batch or RUNS[s.preset]['pairs' if finds else 'batch']
    if s.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
        torch.backends.cuda.enable_mem_efficient_sdp(False)  # its backward is not deterministic
        torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_float32_matmul_precision('high')
    print(f'{machine_name(s.device)}, {s.dtype}, '
          f'torch {torch.__version__}, preset {s.preset}, recipe {s.recipe}, seed {s.seed}')
    return lambda: (torch.autocast(s.device, torch.bfloat16) if s.dtype == 'bfloat16'
                    else nullcontext())


def machine_name(device: str) -> str:
    name = {'cuda': lambda: torch.cuda.get_device_name(), 'mps': lambda: 'Apple GPU',
            'cpu': lambda: f'{torch.get_num_threads()} threads'}[device]()
    return f'{device} ({name})'


def load_data(s: Settings):
    """The dataset that --data names, at the preset's frame size. Fills in the number of frames."""
    preset, grid = PRESETS[s.preset], parse_grid(s.grid)
    shape = dict(size=preset['frame_size'], questions=RUNS[s.preset]['questions'], seed=s.seed)
    if s.data == 'shapes':
        s.frames = s.frames or preset['frames']
        return ShapeWorld(frames=s.frames, **shape)
    if s.recipe in RETRIEVAL and not s.find:
        raise ValueError(f'--recipe {s.recipe} needs a sentence for every clip, --data shapes has them; '
                         f'{s.data} has questions')
    if s.recipe == 'stream':
        raise ValueError(f'--recipe stream needs clips that say what happens when, --data shapes does; '
                         f'{s.data} has questions about whole clips')
    if not s.frames:                                         # real motion is fast: keep every frame
        first = read_rows(Path(s.data))[0]
        clip = read_clip(Path(s.data) / first['file'], first.get('grid', grid))
        s.frames = min(len(clip), 2 * preset['frames'])
    if s.frames < 2:
        raise ValueError(f'a clip needs at least 2 frames, got {s.frames}; see --frames and --grid')
    return ClipFolder(s.data, frames=s.frames, grid=grid, **shape)


def parse_grid(text: str):
    try:
        columns, rows = (int(n) for n in text.lower().split('x'))
        if columns > 0 and rows > 0:
            return columns, rows
    except ValueError:
        pass
    raise ValueError(f'--grid wants COLUMNSxROWS, such as 4x4, got {text!r}')


def build_model(s: Settings, vocab: list, **changes) -> ModVideo:
    """The model of the recipe, its weights a function of the seed. changes: of its configuration."""
    torch.manual_seed(s.seed)
    config = dict(PRESETS[s.preset], frames=s.frames, keep_ratio=s.keep_ratio, window=s.window,
                  retain_ratio=s.retain_ratio, tau=s.tau, hard=s.hard, lora_rank=s.lora_rank,
                  inner_ratio=s.inner_ratio, **RECIPES[s.recipe])
    if 'reduction' in config:
        config['inner_layer'] = s.inner_layer
        config['budget'] = s.budget or config['frames'] * (
            config['frame_size'] // ModVideoConfig.patch_size) ** 2 // 4
        codes = {'auto': 256 if s.recipe == 'vq' else 12, 'adaptive': 0}
        config['codes'] = codes[s.codes] if s.codes in codes else int(s.codes)
    if s.layers:
        config['tower_layers' if s.recipe in RETRIEVAL else 'n_layer'] = s.layers
    if s.encoder != 'auto':
        config['encoder'] = s.encoder
    if s.recipe != 'dense':
        flags = {name: getattr(s, name) for name in ('placement', 'routing', 'gate')}
        config.update({name: value for name, value in flags.items() if value != 'auto'})
    config = ModVideoConfig(vocab=list(vocab), **{**config, **changes})
    for name in ('routing', 'gate') if config.placement == 'none' and not s.bench else ():
        if getattr(s, name) != 'auto':
            raise ValueError(f'{dashed(name)}: no layer of this model routes; see --placement')
    if s.recipe in RETRIEVAL:
        return Retriever(config).to(s.device)
    model = ModVideo(config).to(s.device)
    if config.placement != 'none' and not model.mod_layers and not s.bench:
        raise ValueError(f'--placement {config.placement} routes no layer of {config.n_layer} '
                         '(the last one stays dense); try --placement all')
    return model


def prepare_model(s: Settings, data) -> ModVideo:
    """The model as training begins: new, continued from other weights, or converted by gamma-MoD."""
    if s.recipe != 'gamma':
        model = build_model(s, data.caption_vocab if s.recipe in RETRIEVAL else data.vocab)
        if s.init_from and not s.resume:
            init_from(model, load_checkpoint(existing(Path(s.init_from) / 'ckpt.pt'))[0])
        return model
    if s.resume:                                            # the layers that the ranks chose then
        saved = read_config(Path(s.resume))['model']
        return build_model(s, data.vocab, placement=saved['placement'], keep_ratio=saved['keep_ratio'])
    if not s.init_from:
        print('--recipe gamma without --init-from: the dense model is trained first')
        s.init_from = str(run_training(replace(
            s, recipe='dense', placement='auto', out=s.out and f'{s.out}-dense')))
    dense, _ = load_checkpoint(existing(Path(s.init_from) / 'ckpt.pt'), s.device)
    if dense.mod_layers or dense.config.streaming:
        raise ValueError(f'--init-from {s.init_from}: that model is not dense')
    s.layers = dense.config.n_layer
    placement = s.placement if s.placement != 'auto' else arank_layers(s, dense, data)
    model = build_model(s, data.vocab, placement=placement, keep_ratio=keep_of_skip(s, data))
    init_from(model, dense)
    return model


def keep_of_skip(s: Settings, data) -> float:
    """Share of the vision tokens to keep so that --skip-ratio of all tokens, text too, skip."""
    batch = data.batch('train', 0, 1)
    N = batch.video.size(1) * (PRESETS[s.preset]['frame_size'] // ModVideoConfig.patch_size) ** 2
    keep = 1 - s.skip_ratio * (N + batch.text[0].numel()) / N
    if keep <= 0:
        raise ValueError(f'--skip-ratio {s.skip_ratio}: only {N} of {N + batch.text[0].numel()} '
                         'tokens are vision and may skip')
    return keep


def arank_layers(s: Settings, dense: ModVideo, data, clips: int = 16) -> str:
    """Print ranks by layer, choose the layers to convert -> placement. The last one stays dense."""
    ranks = []
    for step in range(clips):
        batch = data.batch('train', step, 1, s.device)
        ranks.append(layer_ranks(dense, batch.video, batch.text[:, :1]))
    ranks = torch.stack(ranks).mean(0).cpu()                                   # (2, layers)
    num_dense = s.dense_layers or max(1, len(ranks[0]) // 8)
    if num_dense >= len(ranks[0]):
        raise ValueError(f'--dense-layers {num_dense}: the model has {len(ranks[0])} layers, one must route')
    chosen = choose_mod_layers(ranks[0, :-1], num_dense - 1)
    print(f'\nlayer  ARank  effective rank   over {clips} clips; the lowest {len(chosen)} are converted')
    for i, (rank, effective) in enumerate(ranks.T.tolist()):
        print(f'{i:5} {rank:6.1f} {effective:15.1f}   {"MoD" if i in chosen else "dense"}')
    return ','.join(map(str, sorted(chosen)))


def open_run(s: Settings, model: ModVideo) -> Path:
    """The run's folder, new unless it is resumed. An existing one is never written over."""
    if s.resume:
        run = existing(Path(s.resume) / 'ckpt.pt').parent
        if read_config(run)['model'] != asdict(model.config):
            raise ValueError(f'{run} was trained with another configuration than these flags give')
        return run
    if s.out:
        run = Path(s.out)
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            hint = f', or go on with it: --resume {run}' if (run / 'ckpt.pt').exists() else ''
            raise ValueError(f'--out {run} exists; name another folder{hint}')
    else:
        name = f'{s.recipe}-{Path(s.data).name}-{s.preset}-seed{s.seed}'
        names = (name + (f'-{i}' if i > 1 else '') for i in itertools.count(1))
        run = next(Path('out', n) for n in names if not Path('out', n).exists())
    run.mkdir(parents=True, exist_ok=True)
    return run


# --------------------------------------------------------------------------------------------------
# 3. Training
# --------------------------------------------------------------------------------------------------

def is_right(logits, targets):
    """(..., n, V), (..., n) -> (...) bool: every word to be learned is the most probable one.

    Of questions, this is greedy decoding of the whole answer and its end.
    """
    return ((logits.argmax(-1) == targets) | (targets == IGNORE)).all(-1)


def schedule(step: int, steps: int) -> float:
    """Learning-rate factor: up over 50 steps, level, then down to zero over the last half."""
    return min(1, (step + 1) / 50, (steps - step) / (0.5 * steps))


def save_run(run: Path, model, optimizers: list, log: list, step: int, seconds: float):
    """Checkpoint and log.csv: all that a resumed run needs."""
    save_checkpoint(run / 'ckpt.pt', model, optimizers=[o.state_dict() for o in optimizers],
                    step=step, log=log, seconds=seconds)
    with open(run / 'log.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, ['step', 'loss', 'accuracy', 'val_accuracy', 'lr', 'seconds'])
        writer.writeheader()
        writer.writerows(log)


def resume_run(run: Path, model, optimizers: list):
    """Load what save_run wrote into the model and its optimizers -> log, steps done, seconds."""
    saved, extra = load_checkpoint(run / 'ckpt.pt')
    model.load_state_dict(saved.state_dict())
    for optimizer, state in zip(optimizers, extra['optimizers']):
        optimizer.load_state_dict(state)
    return extra['log'], extra['step'], extra['seconds']


def draw_batch(s: Settings, data, split: str, step: int, size: int):
    """A batch of what the recipe learns from, on its device."""
    draw = {'stream': 'stream', 'frames': 'captioned_frames', 'retrieval': 'captions'}.get(s.recipe, 'batch')
    batch = getattr(data, draw)(split, step, size, s.device)
    return batch._replace(video=batch.video.roll(1, 0)) if s.blind and split == 'train' else batch


def wanted_words(batch):
    """What logits are compared with: (B, Q, L), of a stream (B, T + L)."""
    return batch.targets if batch.after is None else torch.cat(
        [batch.decisions, batch.targets[:, 0]], 1)


def asked_words(targets):
    """(B, Q, L) -> (B, Q): words of each question; the last of them predicts the answer's first."""
    return (targets != IGNORE).int().argmax(-1) + 1


def train_step(forward, model, optimizers: list, batch, autocast) -> torch.Tensor:
    """One step: (2,) loss and accuracy of the batch (questions, whole streams, or sentences that find
    their clip), on the device."""
    finds = isinstance(model, Retriever)
    given = batch[:2] if finds else (
        *batch[:3], batch.after, batch.decisions, asked_words(batch.targets))
    with autocast():
        logits, loss, *_ = forward(*given)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    wanted = torch.arange(len(logits), device=logits.device)[:, None] if finds else wanted_words(batch)
    right = is_right(logits[:, None] if finds else logits, wanted).float().mean()
    return torch.stack([loss.detach(), right])


def read(recent: list, done: int, lr: float):
    """Mean loss and accuracy of the last steps. ValueError names the first that is not finite."""
    values = torch.stack(recent).cpu()                                     # (steps, 2)
    if not values.isfinite().all():
        bad = done - len(recent) + 1 + int((~values.isfinite()).any(1).nonzero()[0])
        raise ValueError(f'the loss is not finite at step {bad}; nothing was saved since the last '
                         f'checkpoint; try a lower --lr than {lr}')
    return values.mean(0).tolist()


@contextmanager
def catch_ctrl_c():
    """A list that Ctrl-C fills, so that a step is never cut in two; a second Ctrl-C stops at once."""
    stop, previous = [], signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT,
                  lambda *_: (stop.append(True), signal.signal(signal.SIGINT, previous)))
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def train(s: Settings, model, data, run: Path, autocast, stop: list) -> dict:
    """Train until s.steps, or until stop is filled: then save and exit. Returns log and cost."""
    optimizers = configure_optimizer(model, s.lr)
    rates = [[group['lr'] for group in o.param_groups] for o in optimizers]
    forward = torch.compile(model) if s.compile else model
    log, first, before = [], 0, 0.0
    if s.resume:
        log, first, before = resume_run(run, model, optimizers)
        if first > s.steps or first == s.steps and (run / 'result.json').exists():
            raise ValueError(f'{run} already has {first} steps; ask for more of them with --steps')
        (run / 'result.json').unlink(missing_ok=True)                      # it goes on: not finished
    write_json(run / 'config.json', dict(settings=asdict(s), model=asdict(model.config)))
    every = max(1, s.steps // 100)                                         # a row of the log
    start, recent, times = time.time(), [], []
    bar = tqdm(range(first, s.steps), initial=first, total=s.steps, desc=s.recipe, mininterval=1,
               dynamic_ncols=True)
    tick = time.time()
    for step in bar:
        done = step + 1
        for optimizer, lrs in zip(optimizers, rates):
            for group, lr in zip(optimizer.param_groups, lrs):
                group['lr'] = lr * schedule(step, s.steps)
        batch = draw_batch(s, data, 'train', step, s.batch)
        recent.append(train_step(forward, model, optimizers, batch, autocast))
        if done % every and done < s.steps and not stop:              # reading waits for the device
            continue
        loss, accuracy = read(recent, done, s.lr)
        times.append((time.time() - tick) / len(recent))
        recent, val = [], ''
        if done % (10 * every) == 0 or done == s.steps:
            val = round(evaluate(model, data, 'val', s, autocast, clips=min(128, EVAL_CLIPS))['accuracy'], 4)
            bar.write(f'step {done:5}  loss {loss:.3f}  accuracy {accuracy:6.1%}  '
                      f'held-out {val:6.1%}')
        seconds = round(before + time.time() - start, 1)
        log.append(dict(step=done, loss=round(loss, 4), accuracy=round(accuracy, 4),
                        val_accuracy=val, lr=optimizers[0].param_groups[0]['lr'], seconds=seconds))
        codes = code_report(model, batch.video)
        bar.set_postfix(loss=f'{loss:.3f}', acc=f'{accuracy:.1%}', **codes, refresh=False)
        if val != '' or stop:
            save_run(run, model, optimizers, log, done, seconds)
        if stop and done < s.steps:
            bar.close()
            print(f'stopped after step {done}, saved; '
                  f'go on with: python train_tiny.py --resume {run}')
            raise SystemExit(130)
        tick = time.time()
    step_ms = 1000 * (statistics.median(times) if times else before / max(1, first))
    return dict(log=log, seconds_before=before, steps=s.steps, step_ms=round(step_ms, 2))


@torch.no_grad()
def code_report(model, video) -> dict:
    """How many codes of a learned codebook some clips use, and the perplexity; {} without one."""
    if model.config.reduction != 'vq':
        return {}
    model.eval()
    usage, perplexity = code_usage(model.encode_video(video)[2].index_map, model.config.codes)
    model.train()
    return dict(codes_used=f'{usage.item():.1%}', perplexity=f'{perplexity.item():.1f}')


@torch.no_grad()
def evaluate(model, data, split, s: Settings, autocast, clips: int = EVAL_CLIPS) -> dict:
    """Accuracy on held-out clips: overall, by type, balanced over a type's answers, blind, chance.

    A question is right if its whole answer is. Blind: the same questions with another clip's video.
    Chance: always the most frequent answer of the type.
    """
    if s.recipe == 'stream':
        return evaluate_stream(model, data, split, s, autocast, clips)
    if s.recipe in RETRIEVAL:
        return evaluate_retrieval(model, data, split, s, autocast, min(clips, FIND_CLIPS))
    model.eval()
    right, blind, kind, answers = [], [], [], []
    for step in range(math.ceil(clips / 64)):
        batch = data.batch(split, step, min(64, clips), s.device)
        if not len(batch.text):
            break
        other = batch.video.roll(max(1, len(batch.video) // 2), 0)
        for videos, scores in ((batch.video, right), (other, blind)):
            for part in zip(videos.split(s.batch), batch.text.split(s.batch),
                            batch.targets.split(s.batch)):                 # as many as training fits
                with autocast():
                    logits = model(*part[:2], asked=asked_words(part[2]))[0]
                scores.append(is_right(logits, part[2]).flatten())
        if len(batch.video) == 1:                                          # no other clip to show
            blind[-1] = torch.full_like(blind[-1], float('nan'), dtype=torch.float)
        kind.append(batch.kind.flatten())
        answers += [tuple(a[a != IGNORE].tolist()) for a in batch.targets.flatten(0, 1).cpu()]
    model.train()
    right, blind, kind = (torch.cat([x.float() for x in a]).cpu() for a in (right, blind, kind))
    by_type, balanced, chance = {}, {}, {}
    for i, name in enumerate(data.kinds):
        rows = (kind == i).nonzero()[:, 0].tolist()
        if not rows:
            continue
        groups = {}
        for r in rows:
            groups.setdefault(answers[r], []).append(float(right[r]))
        by_type[name] = float(right[rows].float().mean())
        balanced[name] = statistics.mean(statistics.mean(g) for g in groups.values())
        chance[name] = max(len(g) for g in groups.values()) / len(rows)
    share = {name: float((kind == i).float().mean()) for i, name in enumerate(data.kinds)}
    return dict(accuracy=float(right.float().mean()), blind_accuracy=float(blind.nanmean()),
                accuracy_by_type=by_type, balanced_accuracy_by_type=balanced, chance_by_type=chance,
                blind_by_type={name: float(blind[kind == data.kinds.index(name)].nanmean())
                               for name in chance},
                chance=sum(share[name] * chance[name] for name in chance), questions=len(right))


def turn_scores(logits, wanted, position, T: int, theta: float) -> dict:
    """Teacher-forced scores of streams: logits (B, T + L, V), wanted and position (B, T + L).

    A turn is a run of silences, then the words that are said, up to their '<eos>'.
    nll: mean -log P of the words that should be said (exp of it is LM-PPL). lm_correctness: index of
    the first wrong word of a turn / its words, mean over turns. fluency: correct silences and correct
    words before the first mistake of their turn, over all that is supervised. accuracy: turns whose
    every word is right.
    """
    order = position.argsort(dim=1, stable=True)
    chosen, chance = logits.argmax(-1), logits.softmax(-1)[..., EOS]
    speech = logits.index_fill(-1, torch.tensor([PAD, EOS], device=logits.device), -math.inf)
    chosen[:, :T] = torch.where(chance[:, :T] >= theta, EOS, speech[:, :T].argmax(-1))
    decision = torch.zeros_like(wanted, dtype=torch.bool)
    decision[:, :T] = True
    nll = F.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=IGNORE, reduction='none')
    chosen, wanted, decision, nll = (a.gather(1, order) for a in (chosen, wanted, decision, nll))
    known = wanted != IGNORE
    word = known & ~(decision & (wanted == EOS))                               # (B, n)
    ends = word & (wanted == EOS)
    turn = ends.cumsum(1) - ends.long()                                        # (B, n) its number

    def good(among):
        """Those among (B, n) before the first mistake of their turn."""
        wrong = (among & (chosen != wanted)).long()
        before = wrong.cumsum(1) - wrong
        at_start = torch.full_like(before, before.size(1)).scatter_reduce(1, turn, before, 'amin')
        return among & (wrong.cumsum(1) == at_start.gather(1, turn))

    count = lambda a: torch.zeros_like(turn).scatter_add(1, turn, a.long())    # (B, turns)
    said, words_of = count(good(word)), count(word)
    share = (said / words_of)[words_of > 0]
    return dict(nll=nll[word].mean().item(), lm_correctness=share.mean().item(),
                fluency=(good(known).sum() / known.sum()).item(),
                accuracy=(share == 1).float().mean().item())


def timing_scores(spoke, should) -> dict:
    """How a model that runs freely times its narration: spoke, should (B, T) bool.

    time_diff: mean over narrations of |frame at which it first speaks - frame at which it should|
    (TimeDiff, in frames), looked for between the narrations before and behind; if it stays silent
    there, up to the end of that stretch. silence: silent frames among those at which nothing is to
    be told. spoken: narrations made in their very frame.
    """
    T, off = should.size(1), []
    for said, due in zip(spoke.tolist(), should.tolist()):
        times = [t for t in range(T) if due[t]]
        for before, t, behind in zip([-1, *times], times, [*times[1:], T]):
            first = next((f for f in range(before + 1, behind) if said[f]), behind)
            off.append(abs(first - t))
    return dict(time_diff=statistics.mean(off), silence=(~spoke[~should]).float().mean().item(),
                spoken=spoke[should].float().mean().item())


@torch.no_grad()
def evaluate_stream(model, data, split, s: Settings, autocast, clips: int) -> dict:
    """Scores on held-out streams: teacher-forced (blind too: another clip's video) and running free."""
    model.eval()
    rows, spoke, should = [], [], []
    for step in range(math.ceil(clips / 64)):
        batch = data.stream(split, step, min(64, clips), s.device)
        prompt = torch.full_like(batch.text[:, 0, :1], data.vocab.index(PROMPT))
        with autocast():
            scores = []
            for video in (batch.video, batch.video.roll(1, 0)):
                logits, _, aux = model(video, batch.text, None, batch.after)
                scores.append(turn_scores(
                    logits, wanted_words(batch), aux['position'], video.size(1), s.theta))
            frames = ((frame, None) for frame in batch.video.unbind(1))
            chance = [moment['silence'] for moment in model.stream(frames, prompt, s.theta)]
        rows.append(dict(scores[0], blind_accuracy=scores[1]['accuracy']))
        spoke.append(torch.stack(chance, 1).cpu() < s.theta)
        should.append(batch.decisions.cpu() != EOS)
    model.train()
    mean = {name: statistics.mean(row[name] for row in rows) for name in rows[0]}
    return {**mean, 'lm_ppl': math.exp(mean.pop('nll')),
            **timing_scores(torch.cat(spoke), torch.cat(should)), 'clips': sum(map(len, spoke))}


def recall(similarity) -> dict:
    """(n, n), row i belongs to column i -> R@1, R@5, R@10 in percent, median rank from 1 on.

    Ties are counted once: the earlier of equal columns is first.
    """
    own, place = similarity.diag()[:, None], torch.arange(len(similarity), device=similarity.device)
    ahead = (similarity > own) | (similarity == own) & (place < place[:, None])
    rank = ahead.sum(1)                                                        # (n,) 0 = found first
    return {**{f'R@{k}': 100 * (rank < k).float().mean().item() for k in (1, 5, 10)},
            'median rank': (rank + 1).float().quantile(0.5).item()}


@torch.no_grad()
def evaluate_retrieval(model, data, split, s: Settings, autocast, clips: int) -> dict:
    """Held-out clips whose sentences all differ, in pairs that differ in a direction or in the order of
    events: recall both ways, R-Sum, and how often a clip prefers its own to its twin's (chance 50 %)."""
    model.eval()
    seen, found, half = set(), [], 32
    for step in itertools.count():
        batch = data.captions(split, step, 2 * half, s.device)
        sentences, new = [tuple(id for id in row if id != PAD) for row in batch.text.tolist()], []
        for i in range(half):
            pair = {sentences[i], sentences[i + half]}
            if not pair & seen and len(seen) < clips:
                seen |= pair
                new += [i, i + half]
        with autocast():
            found.append((model.encode_video(batch.video[new]), model.encode_text(batch.text[new]),
                          batch.turned[new]))
        if len(seen) >= clips:
            break
    model.train()
    video, text, turned = (torch.cat(a).cpu() for a in zip(*found))
    similarity, other = text @ video.T, torch.arange(len(text)) ^ 1
    ways = {'sentence to clip': recall(similarity), 'clip to sentence': recall(similarity.T)}
    right = (similarity.diag() > similarity[other, other ^ 1]).float()
    return dict(accuracy=ways['sentence to clip']['R@1'] / 100, recall=ways,
                r_sum=sum(way[f'R@{k}'] for way in ways.values() for k in (1, 5, 10)),
                direction_pairs=right[turned].mean().item(), order_pairs=right[~turned].mean().item(),
                clips=len(text))


def num_learning(model) -> int:
    """Number of parameters that learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def peak_memory_mb(device: str) -> float:
    """Most memory taken so far: of the GPU's allocator, or of this process."""
    if device == 'cuda':
        return torch.cuda.max_memory_allocated() / 2 ** 20
    try:
        import resource
    except ImportError:         # Windows
        return float('nan')
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2 ** 20 if sys.platform == 'darwin' else 2 ** 10)


# --------------------------------------------------------------------------------------------------
# 4. Showing: the table, answers in words, pictures
# --------------------------------------------------------------------------------------------------

def print_table(result: dict):
    if 'r_sum' in result:
        print(f'\n{result["clips"]} held-out clips {"R@1":>12} {"R@5":>7} {"R@10":>7} {"median rank":>12}')
        for way, row in result['recall'].items():
            print(f'{way:25} ' + ' '.join(f'{row[f"R@{k}"]:7.1f}' for k in (1, 5, 10))
                  + f' {row["median rank"]:12.1f}')
        print(f'R-Sum {result["r_sum"]:.1f}; the right one of two sentences that differ in a direction '
              f'{result["direction_pairs"]:.1%}, in the order of events {result["order_pairs"]:.1%} (chance 50%)')
        return
    if 'lm_ppl' in result:
        print(f'\n{result["clips"]} held-out streams')
        for name, what in (('lm_ppl', 'LM-PPL'), ('lm_correctness', 'LM-Correctness'),
                           ('fluency', 'Fluency'), ('accuracy', 'turns without a mistake'),
                           ('blind_accuracy', "the same, shown another clip's video"),
                           ('time_diff', 'TimeDiff, frames'), ('spoken', 'narrated in the very frame'),
                           ('silence', 'silent when nothing happens')):
            shown = f'{result[name]:.3f}' if name in ('lm_ppl', 'time_diff') else f'{result[name]:.1%}'
            print(f'{what:38} {shown:>8}')
        return
    print(f'\n{"type":34} {"accuracy":>8} {"balanced":>8} {"blind":>7} {"chance":>7}')
    for name, accuracy in result['accuracy_by_type'].items():
        print(f'{name[:34]:34} {accuracy:8.1%} {result["balanced_accuracy_by_type"][name]:8.1%} '
              f'{result["blind_by_type"][name]:7.1%} {result["chance_by_type"][name]:7.1%}')
    print(f'{"all":34} {result["accuracy"]:8.1%} {"":8} {result["blind_accuracy"]:7.1%} '
          f'{result["chance"]:7.1%}   {result["questions"]} questions about held-out clips')
    print(f'{result["decoder_tokens"]:.1f} vision tokens enter the decoder, TokDense {result["tok_density"]:.3f}'
          + (f', codes in use {result["codes_used"]}, perplexity {result["perplexity"]}'
             if 'codes_used' in result else ''))


def say(ids, vocab: list) -> str:
    """Word ids -> words, without padding and end marks."""
    return ' '.join(vocab[i] for i in torch.as_tensor(ids).tolist() if i not in (PAD, EOS)) or '(nothing)'


def split_question(text, targets):
    """Ids of one question (L,) and of its answer, without the end mark."""
    asked = text[:int((targets != IGNORE).nonzero()[0]) + 1]
    return asked, targets[(targets != IGNORE) & (targets != EOS)]


@torch.no_grad()
def show_answers(model, data, s: Settings, count: int = 5):
    """Print answers in words, a mistake among them if there is one."""
    batch = data.batch('test', 0, 8, s.device)
    pairs = [split_question(*pair) for pair in zip(batch.text.flatten(0, 1), batch.targets.flatten(0, 1))]
    asked = torch.nn.utils.rnn.pad_sequence([q for q, _ in pairs], batch_first=True, padding_value=PAD)
    longest, lines = max(len(a) for _, a in pairs) + 1, []
    answers = model.generate(batch.video, asked.view(*batch.text.shape[:2], -1), longest).flatten(0, 1)
    for pair, answer in zip(pairs, answers):
        question, truth, said = (say(ids, data.vocab) for ids in (*pair, answer))
        lines.append((said == truth, f'  {question}? {said}', truth))
    wrong = [line for line in lines if not line[0]][:1]
    right = [line for line in lines if line[0]]
    right = right[::max(1, len(right) // count)][:count - len(wrong)]
    print()
    for ok, line, truth in right + wrong:
        print(line + ('' if ok else f'   <- wrong, it is: {truth}'))


def label(image: Image.Image, text: str) -> Image.Image:
    """The image with a line of text above it."""
    out = Image.new('RGB', (max(image.width, 8 * len(text)), image.height + 16), 'white')
    out.paste(image, (0, 16))
    ImageDraw.Draw(out).text((2, 2), text, fill='black')
    return out


def stack(images: list) -> Image.Image:
    """Images one below the other."""
    out = Image.new('RGB', (max(i.width for i in images), sum(i.height for i in images)), 'white')
    for n, image in enumerate(images):
        out.paste(image, (0, sum(i.height for i in images[:n])))
    return out


@torch.no_grad()
def draw_clip(model, video, text, path: Path, title: str):
    """The patches each routed layer processed: path.png has all frames, path.gif one at a time."""
    _, _, aux = model(video[None], text[None])
    T, scale, P, video = len(video), max(1, 128 // video.size(-1)), model.config.patches, video.cpu()
    frames = draw_tokens(video, pack(torch.ones(1, T * P, dtype=torch.bool)), scale=scale)
    rows, names, kept = [label(frames, title)], ['clip'], aux.get('reduction')
    inner, at = aux.get('inner'), model.config.inner_layer
    if isinstance(kept, Quantized):
        kept = from_clusters(kept.index_map.flatten(1), model.config.codes)
    if isinstance(kept, torch.Tensor):                    # B-VLLM's mixtures: the strongest frame of each
        taken = kept[0].argmax(-1).cpu()[:, None] == torch.arange(T)                  # (K, T)
        kept = pack(taken.any(0).repeat_interleave(P)[None])
        aux['routes'], inner = {}, None                               # of its tokens, which are no patches
    shown = {} if kept is None else {'kept': kept}
    if inner is not None:
        inner = inner if kept is None else compose(kept, inner)
        shown[f'left behind layer {at - 1}'] = inner
    for layer, route in aux['routes'].items():
        slots = kept if inner is None or layer < at else inner
        if slots is not None:                              # the patches of the slots that are processed
            chosen = torch.zeros(route.logits.size(1) + 1, dtype=torch.bool, device=text.device)
            chosen[route.index[0] if route.mask is None else route.index[0][route.mask[0]]] = True
            route = slots._replace(assign=slots.assign.where(chosen[slots.assign], -1))  # -1 reads False
        shown[f'processed by layer {layer}'] = route
    for name, what in shown.items():
        n = int((what.assign >= 0).sum()) if isinstance(what, Reduction) else what.index.size(1)
        slots = len(what.assign[what.assign >= 0].unique()) if isinstance(what, Reduction) else n
        rows.append(label(draw_tokens(video, what, scale=scale), f'{name}: {n} of {T * P} patches'
                          + (f' in {slots} tokens' if slots != n else '')))
        names.append(name)
    stack(rows).save(f'{path}.png')
    width = frames.width // T + 2
    film = [stack([label(row.crop((t * width, 16, t * width + width - 2, row.height)), name)
                   for row, name in zip(rows, names)]) for t in range(T)]
    film[0].save(f'{path}.gif', save_all=True, append_images=film[1:],
                 duration=300, loop=0)


@torch.no_grad()
def narrate(model, video, path: Path, theta: float, asked: dict):
    """Play (T, 3, height, width), print what the model says when, draw frames with the words below.

    asked: from the number of a frame, counted from 1, to the words of a question behind it.
    """
    c, scale = model.config, max(1, 128 // video.size(-1))
    encode = lambda question: torch.tensor([encode_question(question, c.vocab)])
    frames = ((frame[None], encode(asked[t]) if t in asked else None)
              for t, frame in enumerate(video, 1))
    sheet = draw_tokens(video, pack(torch.ones(1, len(video) * c.patches, dtype=torch.bool)), scale=scale)
    width = sheet.width // len(video) + 2
    strip = Image.new('RGB', (sheet.width, sheet.height + 80), 'white')
    strip.paste(sheet, (0, 0))
    for t, moment in enumerate(model.stream(frames, encode(PROMPT), theta), 1):
        lines = [] if moment['said'] is None else [say(moment['said'][0], c.vocab)]
        if t in asked:
            lines.append(f'{asked[t]}? {say(moment["answer"][0], c.vocab)}')
        print(f'  frame {t:3} of {len(video)}   silence {moment["silence"].item():6.1%}   '
              + '   '.join(lines), flush=True)
        text = '\n'.join(row for line in [f'{t}', *lines] for row in textwrap.wrap(line, width // 7))
        ImageDraw.Draw(strip).text(((t - 1) * width + 2, sheet.height + 2), text, fill='black')
    strip.save(path)


def save_clip(video, path: Path):
    """Write (T, 3, height, width) in [0, 1] as an animated WebP, without loss."""
    frames = [Image.fromarray(f)
              for f in (video.permute(0, 2, 3, 1).cpu() * 255).round().byte().numpy()]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=200, lossless=True)


def draw_curve(log: list, path: Path, width: int = 640, height: int = 240):
    """Loss (grey, own scale), accuracy in training (blue), held out (red dots) over the steps."""
    image = Image.new('RGB', (width, height + 20), 'white')
    draw = ImageDraw.Draw(image)
    last, top = log[-1]['step'], max(row['loss'] for row in log)
    place = lambda row, y: (10 + (width - 20) * row['step'] / last, 10 + (height - 20) * (1 - y))
    for y in (0, 0.25, 0.5, 0.75, 1):
        draw.line([(10, place(log[0], y)[1]), (width - 10, place(log[0], y)[1])], fill='#dddddd')
        draw.text((12, place(log[0], y)[1] + 1), f'{y:.0%}', fill='#999999')
    draw.line([place(row, row['loss'] / top) for row in log], fill='#888888', width=2)
    draw.line([place(row, row['accuracy']) for row in log], fill='#2060d0', width=2)
    for x, y in (place(row, row['val_accuracy']) for row in log if row['val_accuracy'] != ''):
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill='#d03020')
    text = f'{last} steps. blue: accuracy in training, red: held out, grey: loss (top = {top:.2f})'
    draw.text((10, height + 2), text, fill='black')
    image.save(path)


# --------------------------------------------------------------------------------------------------
# 5. What the script does: train, ask, narrate, find, study, bench
# --------------------------------------------------------------------------------------------------

def run_training(s: Settings, began: float = None) -> Path:
    """Train, evaluate on the test split, show, fill the run folder. began: the command's start."""
    began = began or time.time()
    autocast = pick_machine(s)
    if s.device == 'cuda':
        torch.cuda.reset_peak_memory_stats()                                   # of this run alone
    data = load_data(s)
    model = prepare_model(s, data)
    run = open_run(s, model)
    batch = draw_batch(s, data, 'train', 0, 1)
    N, cost = batch.video.size(1) * model.config.patches, clip_cost(s, model, data, clips=1)
    learns = num_learning(model)
    print(f'{num_params(model):,} parameters, {learns:,} of them learn, {N} vision tokens, layers process '
          f'{cost["vision_by_layer"]} of them, {cost["gflops"]:.2f} GFLOPs a clip; {s.steps} steps of {s.batch} '
          + ('clips' if s.recipe in RETRIEVAL else f'clips with {batch.text.size(1)} questions') + f' -> {run}')
    if s.steps:
        with catch_ctrl_c() as stop:
            trained = train(s, model, data, run, autocast, stop)
    else:
        if s.resume:
            raise ValueError(f'{run} needed no training; ask for some with --steps')
        write_json(run / 'config.json', dict(settings=asdict(s), model=asdict(model.config)))
        save_run(run, model, configure_optimizer(model, s.lr), [], 0, 0.0)
        trained = dict(log=[], seconds_before=0.0, steps=0, step_ms=0.0)
    log, before = trained.pop('log'), trained.pop('seconds_before')
    scores = evaluate(model, data, 'test', s, autocast,
                      clips=EVAL_CLIPS if s.data == 'shapes' else 10 ** 9)
    cost = clip_cost(s, model, data)                          # a trained encoder may merge otherwise
    if s.recipe not in RETRIEVAL:
        scores['tok_density'] = round(token_density(100 * scores['accuracy'], cost['decoder_tokens']), 3)
    if model.config.reduction == 'vq':
        scores.update(code_report(model, draw_batch(s, data, 'test', 0, 64).video))
    result = dict(recipe=s.recipe, seed=s.seed, device=s.device, torch=torch.__version__,
                  dtype=s.dtype, preset=s.preset, data=s.data, placement=model.config.placement,
                  **trained, **scores, vision_tokens=N, **cost, parameters=num_params(model), learns=learns,
                  peak_memory_mb=round(peak_memory_mb(s.device), 1))
    print_table(result)
    show_run(s, model.eval(), data, run)
    if log:
        draw_curve(log, run / 'curve.png')
    result['seconds'] = round(before + time.time() - began, 1)
    write_json(run / 'result.json', result)
    print(f'\n{result["seconds"]:.0f} s, {trained["step_ms"]:.0f} ms a step. In {run}: '
          + ', '.join(sorted(path.name for path in run.iterdir())))
    return run


@torch.no_grad()
def clip_cost(s: Settings, model, data, clips: int = 8) -> dict:
    """Vision tokens of each layer and GFLOPs of a clip, mean over some; paper_share: of dense, by the
    formula that merging papers use, 4 n C² + 2 n² C + 2 n C m for n vision tokens and an MLP of m."""
    c, rows, flops = model.config, [], []
    paper = lambda tokens: sum(4 * n * c.dim ** 2 + 2 * n * n * c.dim + 8 * n * c.dim ** 2 for n in tokens)
    model.eval()
    if s.recipe in RETRIEVAL:
        T = 1 if s.recipe == 'frames' else c.frames
        flops, rows = model.encoder.flops(T, (c.frame_size, c.frame_size)) / 1e9, model.encoder.counts(T)
        model.train()
        return dict(vision_by_layer=[F * n for F, _, n in rows], gflops=round(flops, 4))
    enter = []                                                 # vision tokens that the decoder is given
    for step in range(clips if c.merges else 1):
        batch = draw_batch(s, data, 'train', step, 1)
        Q, L = batch.text.shape[1:]
        aux = model(*batch[:2], asked=asked_words(batch.targets))[2]
        parts = count_flops(model, batch.video.shape, L, Q, aux)
        flops.append([parts[part] / 1e9 for part in ('total', 'decoder')])
        rows.append([n - L * (1 if c.by_question else Q) for n in aux['tokens']])
        enter.append(aux['routes'][0].logits.size(1) if 0 in aux['routes'] else rows[-1][0])
    model.train()
    N = batch.video.size(1) * c.patches
    return dict(vision_by_layer=[round(statistics.mean(layer), 1) for layer in zip(*rows)],
                decoder_tokens=round(statistics.mean(enter), 1),
                gflops=round(statistics.mean(total for total, _ in flops), 4),
                decoder_gflops=round(statistics.mean(decoder for _, decoder in flops), 4),
                paper_share=round(statistics.mean(map(paper, rows)) / paper([N] * c.n_layer), 4))


def liveliest(video) -> int:
    """Which of (B, T, 3, height, width) moves most, cuts and flashes aside."""
    change = (video[:, 1:] - video[:, :-1]).abs().mean((2, 3, 4)).cpu()        # (B, T - 1)
    return int(change.median(1).values.argmax())


def show_run(s: Settings, model, data, run: Path):
    """Answers or narration in words, the pictures of one held-out clip, how to go on."""
    if s.recipe in RETRIEVAL:
        return show_retrieval(s, model, data, run)
    test = draw_batch(s, data, 'test', 0, 64)
    b = liveliest(test.video)
    video = test.video[b]
    save_clip(video, run / 'clip.webp')
    if s.recipe == 'stream':
        print()
        narrate(model.cpu(), video.cpu(), run / 'narration.png', s.theta, {})
        title, text, command = PROMPT, test.text[b, :, :1].cpu(), f'--stream {run}/clip.webp'
    else:
        show_answers(model, data, s)
        asked, told = split_question(test.text[b, 0], test.targets[b, 0])
        question, text = say(asked, data.vocab), asked[None]                    # (1, L) without its answer
        title, command = f'{question}? {say(told, data.vocab)}', f'--ask {run}/clip.webp "{question}"'
    draw_clip(model, video.to(text.device), text, run / 'tokens', title)
    print(f'\ngo on with: python train_tiny.py --out {run} {command}')


def encode_question(question: str, vocab: list) -> list:
    """Words -> ids; unknown ones are named together with the nearest known ones."""
    known = {word: i for i, word in enumerate(vocab)}
    asked = words(question)
    unknown = [w for w in asked if w not in known]
    if unknown or not asked:
        near = [f'{w!r} (nearest known: '
                f'{", ".join(difflib.get_close_matches(w, vocab[2:], 3, 0.3) or vocab[2:5])})'
                for w in unknown]
        raise ValueError('the question has no words' if not asked
                         else f'the model never saw {", ".join(near)}')
    return [known[w] for w in asked]


@torch.no_grad()
def show_retrieval(s: Settings, model, data, run: Path, among: int = 64):
    """tokens.png: what merged of one held-out clip; find.png: the first five clips for its sentence."""
    batch = data.captions('test', 0, among, s.device)
    merged, names = model.encoder(batch.video[:1])[2], [say(ids, data.caption_vocab) for ids in batch.text]
    title, scale = names[0], max(1, 128 // batch.video.size(-1))
    whole = pack(torch.ones_like(merged.assign, dtype=torch.bool))
    stack([label(draw_tokens(batch.video[0].cpu(), what, scale=scale), name) for what, name in (
        (whole, title), (merged, f'{merged.position.size(1)} tokens'))]).save(run / 'tokens.png')
    save_clip(batch.video[0], run / 'clip.webp')
    rank_clips(model, batch.video, names, title, run / 'find.png')
    print(f'\ngo on with: python train_tiny.py --out {run} --find "a red circle moves left"')


@torch.no_grad()
def rank_clips(model, video, names: list, sentence: str, path: Path, best: int = 5):
    """Print and draw the clips (n, T, 3, height, width) that fit a sentence best."""
    ids = torch.tensor([[*encode_question(sentence, model.config.vocab), EOS]], device=video.device)
    fit = model.encode_text(ids) @ torch.cat([model.encode_video(part) for part in video.split(16)]).T
    top, rows = fit[0].topk(min(best, len(video))), []
    print(f'\n{sentence}')
    for value, i in zip(top.values.tolist(), top.indices.tolist()):
        print(f'  {value:6.3f}   {names[i]}')
        frames = pack(torch.ones(1, video.size(1) * model.config.patches, dtype=torch.bool))
        rows.append(label(draw_tokens(video[i].cpu(), frames, scale=max(1, 96 // video.size(-1))),
                          f'{value:.3f}  {names[i]}'))
    stack([label(rows[0], f'{sentence}:'), *rows[1:]]).save(path)


def run_find(s: Settings):
    """Rank clips of a folder, or 64 held-out ones of the synthetic world, by a sentence."""
    run, model = open_model(s, '--find', 'retrieval')
    c = model.config
    merge_lora(model)
    if s.data == 'shapes':
        world = ShapeWorld(frames=c.frames, size=c.frame_size, seed=s.seed)
        batch = world.captions('test', 0, 64)
        video, names = batch.video, [say(ids, c.vocab) for ids in batch.text]
    else:
        folder, grid = Path(s.data), parse_grid(s.grid)
        rows = read_rows(folder)
        names = [row['file'] for row in rows]
        video = torch.stack([resample(read_clip(folder / row['file'], row.get('grid', grid)), c.frames, c.frame_size)
                             for row in rows]).float() / 255
    path = run / 'find.png'
    rank_clips(model, video, names, s.find, path)
    print(f'the best of {len(names)} clips: {path}')


def stages(s: Settings) -> dict:
    """What --recipe tempme trains from the single frames on: name -> encoder, rank of LoRA or 0."""
    rank = s.lora_rank or RUNS[s.preset]['rank']
    return {'lora-merging': ('tempme', rank), 'lora': ('plain', rank),
            'full-merging': ('tempme', 0), 'full': ('plain', 0)}


BEGUN = {'config.json', 'ckpt.pt', 'log.csv', 'clip.webp', 'tokens.png', 'tokens.gif'}     # of an unfinished run


def finish(s: Settings) -> dict:
    """The result of the run in --out: as it is, gone on with, or trained from its start."""
    run = Path(s.out)
    if not (run / 'result.json').exists():
        saved = read_config(run)['settings'] if (run / 'ckpt.pt').exists() else {}
        if saved.get('steps'):
            run_training(replace(s, resume=s.out, out=''))
        else:
            if run.is_dir() and {path.name.replace('.part', '') for path in run.iterdir()} <= BEGUN:
                shutil.rmtree(run)                         # what died before its first checkpoint
            run_training(s)
    return json.loads((run / 'result.json').read_text())


def run_tempme(s: Settings):
    """Train plain towers on single frames, adapt them to clips in four ways, compare. What is finished
    already in --out is not trained again."""
    machine = replace(s)
    pick_machine(machine)                                       # steps and batch are each stage's own
    s = replace(s, preset=machine.preset, device=machine.device)
    if s.data != 'shapes':
        load_data(s)                                            # says why not
    folder = Path(s.out or f'out/tempme-{s.preset}-seed{s.seed}')
    begin_with(folder, asdict(s))
    runs = {}
    for name, (encoder, rank) in {'frames': ('plain', 0), **stages(s)}.items():
        first = name == 'frames'
        print(f'\n{name}')
        runs[name] = finish(replace(
            s, recipe='frames' if first else 'retrieval', encoder=encoder, lora_rank=rank,
            init_from='' if first else str(folder / 'frames'), out=str(folder / name)))
    print(f'\n{"":13} {"R@1":>6} {"R-Sum":>6} {"direction":>9} {"order":>6} {"learns":>10} {"tokens":>6} {"GFLOPs":>7} '
          f'{"step ms":>8} {"seconds":>8}')
    for name, r in runs.items():
        print(f'{name:13} {r["recall"]["sentence to clip"]["R@1"]:6.1f} {r["r_sum"]:6.1f} '
              f'{r["direction_pairs"]:9.1%} {r["order_pairs"]:6.1%} {r["learns"]:10,} {r["vision_by_layer"][-1]:6} '
              f'{r["gflops"]:7.3f} {r["step_ms"]:8.0f} {r["seconds"]:8.0f}')
    write_json(folder / 'result.json', runs)


def run_stream(s: Settings):
    """Let a model narrate a clip while it plays."""
    run, model, video = open_clip(s, s.stream, streaming=True)
    asked = {int(s.question[0]): s.question[1].rstrip('?')} if s.question else {}
    for question in asked.values():
        encode_question(question, model.config.vocab)                    # unknown words are named now
    if asked and not 1 <= min(asked) <= len(video):
        raise ValueError(f'--question: the frames are 1 to {len(video)}, got {min(asked)}')
    path = run / f'stream-{Path(s.stream).stem}.png'
    narrate(model, video, path, s.theta, asked)
    print(f'frames with the words below: {path}')


def open_model(s: Settings, flag: str, kind: str):
    """The run that --out names, or the newest under out/ whose model is of this kind -> run, model.

    kind: 'questions', 'streams' or 'retrieval'.
    """
    def kind_of(run):
        config = read_config(run)
        return ('retrieval' if config['settings'].get('recipe') in RETRIEVAL
                else 'streams' if config['model'].get('streaming') else 'questions')

    train = {'questions': '', 'streams': ' --recipe stream', 'retrieval': ' --recipe tempme'}[kind]
    found = [path.parent for where in ('*', '*/*') for path in Path('out').glob(f'{where}/ckpt.pt')
             if (path.parent / 'config.json').exists()]
    runs = [Path(s.out)] if s.out else sorted(
        (run for run in found if kind_of(run) == kind), key=lambda run: -(run / 'ckpt.pt').stat().st_mtime)
    if not runs:
        raise ValueError(f'{flag} found no model for it under out/; '
                         f'train one first: python train_tiny.py{train}')
    for whole in (runs[0], runs[0].parent)[:1 if s.out else 2]:                 # of a whole --recipe tempme
        if kind == 'retrieval' and (whole / 'full-merging/ckpt.pt').exists():
            runs[0] = whole / 'full-merging'
    model, _ = load_checkpoint(existing(runs[0] / 'ckpt.pt'))
    if kind_of(runs[0]) != kind:
        raise ValueError(f'{flag}: the model of {runs[0]} was trained for {kind_of(runs[0])}')
    return runs[0], model.eval()


def open_clip(s: Settings, clip: str, streaming: bool):
    """The run to use, its model, and a clip as the model sees it: (T, 3, size, size) in [0, 1]."""
    run, model = open_model(s, '--stream' if streaming else '--ask', 'streams' if streaming else 'questions')
    c, frames = model.config, read_clip(clip, parse_grid(s.grid))
    print(f'{run}: {clip}, {len(frames)} frames of {frames.size(3)}x{frames.size(2)}'
          f', seen as {c.frames} of {c.frame_size}x{c.frame_size}')
    return run, model, resample(frames, c.frames, c.frame_size).float() / 255


@torch.no_grad()
def run_ask(s: Settings):
    """Answer one question about one clip: answer, probability, runners-up, what was looked at."""
    clip, question = s.ask
    run, model, video = open_clip(s, clip, streaming=False)
    c, video = model.config, video[None]                                     # (1, T, 3, size, size)
    ids = torch.tensor(encode_question(question, c.vocab))[None, None]         # (1, 1, L)
    answer = model.generate(video, ids, max_new_tokens=16)[0, 0]
    answer = answer[:max(1, int((answer != PAD).sum()))]
    whole = torch.cat([ids[0, 0], answer])[None, None]
    logits = model(video, whole, asked=torch.tensor([[ids.size(2)]]))[0]
    chances = F.softmax(logits[0, 0, ids.size(2) - 1:], -1)                    # (answer + 1, V)
    chance = chances[:-1].gather(1, answer[:, None]).prod().item()
    said = [c.vocab[i] for i in answer.tolist() if i not in (PAD, EOS)]
    print(f'{question.rstrip("?")}? {" ".join(said) or "(nothing)"}   {chance:.1%}')
    best = chances[0].topk(min(4, len(c.vocab)))
    others = [f'{c.vocab[i]} {p:.1%}'
              for p, i in zip(best.values.tolist(), best.indices.tolist()) if i != answer[0]]
    print(f'{"instead of" if len(said) < 2 else "beginning otherwise than with"} '
          f'{said[0] if said else "nothing"}: ' + ', '.join(others[:3]))
    path = run / f'ask-{Path(clip).stem}'
    draw_clip(model, video[0], ids[0], path,
              f'{question.rstrip("?")}? {" ".join(said)}   {chance:.1%}')
    print(f'what was looked at: {path}.png, {path}.gif')


def run_study(s: Settings):
    """gamma-MoD by placement at equal FLOPs: convert one dense model in four ways, train, compare."""
    asked = asdict(s)                                          # without what the machine fills in
    pick_machine(s)
    folder = Path(s.out or f'out/study-{s.preset}-seed{s.seed}')
    begin_with(folder, asked)
    if not s.init_from:
        s.init_from = f'{folder}/dense'
        finish(replace(s, recipe='dense', placement='auto', study=False, init_from='', out=s.init_from))
    data = load_data(s)
    depth = read_config(Path(s.init_from))['model']['n_layer']
    s = replace(s, recipe='gamma', study=False, dense_layers=s.dense_layers or depth // 2)
    by_rank = prepare_model(s, data)
    layers, count = range(depth - 1), len(by_rank.mod_layers)
    luck = torch.randperm(len(layers), generator=torch.Generator().manual_seed(s.seed))[:count]
    batch = data.batch('train', 0, 1)
    cost = lambda model: count_flops(model, batch.video.shape, batch.text.size(2), batch.text.size(1))
    N, wanted, rows = batch.video.size(1) * by_rank.config.patches, cost(by_rank)['total'], []
    for name, chosen in (('rank', by_rank.mod_layers), ('all', layers), ('every second', layers[::2]),
                         ('random', luck.sort().values.tolist())):
        placement = ','.join(map(str, chosen))
        trial = replace(s, placement=placement, out=str(folder / name.replace(' ', '-')))
        model = build_model(trial, data.vocab, placement=placement)

        def price(k):
            model.config.keep_ratio = k / N
            return cost(model)['total']
        k = min(range(1, N + 1, max(1, N // 128)), key=lambda k: abs(price(k) - wanted))
        trial.skip_ratio = (1 - k / N) * N / (N + batch.text[0].numel())
        result = finish(trial)
        rows.append((name, placement, 1 - k / N, result['gflops'], result['accuracy']))
    print(f'\n{"placement":13} {"layers":20} {"vision skipped":>14} {"GFLOPs":>7} {"accuracy":>8}')
    for name, placement, skipped, gflops, accuracy in rows:
        print(f'{name:13} {placement:20} {skipped:14.1%} {gflops:7.3f} {accuracy:8.1%}')


def clock(device: str):
    """How to wait for the device, and how many seconds a function takes."""
    sync = {'cuda': torch.cuda.synchronize, 'mps': torch.mps.synchronize}.get(device, lambda: None)

    def seconds(run) -> float:
        sync()
        start = time.perf_counter()
        run()
        sync()
        return time.perf_counter() - start
    return sync, seconds


def in_turn(seconds, runs: dict, rounds: int = None) -> dict:
    """Time functions in turn, so that what slows the machine down slows all: name -> seconds, without the
    first two, which warm up."""
    times = {name: [] for name in runs}
    for _ in tqdm(range((rounds or ROUNDS) + 2), desc='timing', dynamic_ncols=True):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return {name: each[2:] for name, each in times.items()}


def stepper(s: Settings, model, batch, autocast):
    """A function that makes a training step."""
    optimizers = configure_optimizer(model, s.lr)
    return lambda: train_step(model, model, optimizers, batch, autocast)


def run_bench(s: Settings):
    """Time, memory, FLOPs, cache of each placement against dense: in turn, medians, ratios."""
    autocast = pick_machine(s)
    data = load_data(s)
    sync, seconds = clock(s.device)
    if s.recipe in RETRIEVAL:
        return bench_retrieval(s, data, seconds, autocast)
    batch = draw_batch(s, data, 'train', 0, s.batch)
    if 'reduction' in RECIPES[s.recipe]:
        return bench_answers(s, data, batch, seconds, autocast)
    making = statistics.median(
        seconds(lambda: draw_batch(s, data, 'train', i, s.batch)) for i in range(5))
    variants = {'dense': dict(placement='none'), **{name: dict(placement=name) for name in PLACEMENTS}}
    if s.recipe != 'stream':
        depth = s.layers or PRESETS[s.preset]['n_layer']
        converted = ','.join(map(str, range(max(1, depth // 8) - 1, depth - 1)))
        variants[f'gamma, skip {s.skip_ratio}'] = dict(
            RECIPES['gamma'], placement=converted, keep_ratio=keep_of_skip(s, data))

    def runs_of(name):
        model = build_model(s, data.vocab, **variants[name])

        @torch.no_grad()
        def look():
            with autocast():
                model(*batch[:2], None, batch.after)
        return {(name, 'step'): stepper(s, model, batch, autocast), (name, 'look'): look}

    times = in_turn(seconds, {key: run for name in variants for key, run in runs_of(name).items()})
    rows = {}
    for name in variants:
        model = build_model(s, data.vocab, **variants[name])
        Q, L = batch.text.shape[1:]
        forward = count_flops(model, batch.video.shape, L, Q)['total']
        rows[name] = dict(
            ms=[1000 * statistics.median(times[name, what]) for what in ('step', 'look')],
            share=[statistics.median(a / b for a, b in zip(times[name, what], times['dense', what]))
                   for what in ('step', 'look')], layers=len(model.mod_layers),
            step=3 * forward + optimizer_flops(model, s.lr),                   # backward: twice forward
            forward=forward, memory=step_memory_mb(s.device, stepper(s, model, batch, autocast)),
            cache=cache_bytes(model, batch.video[:1]))
    print_bench(rows, s)
    print(f'{s.batch} clips a step, keep ratio {s.keep_ratio}; making them takes {1000 * making:.1f} ms')
    if s.recipe == 'stream':
        return bench_long_stream(build_model(replace(s, window=s.window or 16), data.vocab), s, autocast)
    for what, ratio in routing_overhead(s.device, sync).items():
        print('one MoD block, 512 channels, 208 of 1,040 tokens, against the block on those alone: '
              f'{ratio:.2f} {what}')


def print_bench(rows: dict, s: Settings):
    kind = ('peak memory' if s.device == 'cuda' else 'kept for backward') + ' MB'
    print(f'\n{"placement":17} {"routed":>6} {"step ms":>8} {"time":>5} {"inference ms":>12} {"time":>5}  '
          f'{"FLOPs: step":>11} {"forward":>7} {kind:>20} {"share":>5} {"KV cache":>8}')
    for name, row in rows.items():
        share = {key: row[key] / rows['dense'][key] for key in ('step', 'forward', 'memory', 'cache')}
        print(f'{name:17} {row["layers"]:6} {row["ms"][0]:8.1f} {row["share"][0]:5.2f} '
              f'{row["ms"][1]:12.1f} {row["share"][1]:5.2f}  {share["step"]:11.2f} {share["forward"]:7.2f} '
              f'{row["memory"]:20.1f} {share["memory"]:5.2f} {share["cache"]:8.2f}')
    print('time, FLOPs, share, KV cache: as a share of dense')


@torch.no_grad()
def cache_bytes(model, video) -> int:
    """Bytes of all keys and values that a clip leaves in the cache."""
    caches = [KVCache() for _ in model.blocks]
    vision, position, _ = model.encode_video(video)
    model.decode(vision, position, video.size(1), vision.size(1), caches=caches)
    return sum(a.nbytes for cache in caches if cache.k is not None for a in (cache.k, cache.v))


@torch.no_grad()
def answer_times(models: dict, batch, seconds, autocast, rounds: int) -> dict:
    """Seconds until the first token is known, and for WORDS more, of models in turn: {name: (first, rest)}.

    Without a word to say, generate reads the clip and the question; the head's one product is left out.
    """
    for model in models.values():
        model.eval().head.weight[:2] = 0                                      # hardly ever an end mark

    def answer(model, n):
        with autocast():
            model.generate(batch.video, batch.text[:, :1], n)
    times = in_turn(seconds, {(name, n): (lambda model=model, n=n: answer(model, n))
                              for name, model in models.items() for n in (0, WORDS)}, rounds)
    return {name: (statistics.median(times[name, 0]), statistics.median(
        b - a for a, b in zip(times[name, 0], times[name, WORDS]))) for name in models}


def bench_answers(s: Settings, data, batch, seconds, autocast):
    """Time to the first token of an answer, and speed of the rest, against dense, in turn."""
    models = {'dense': build_model(replace(s, recipe='dense'), data.vocab), s.recipe: build_model(s, data.vocab)}
    times = answer_times(models, batch, seconds, autocast, ROUNDS // 2)
    for name, (first, rest) in times.items():
        cost = clip_cost(s, models[name], data)
        print(f'{name:8} {1000 * first:8.0f} ms to the first token, {times["dense"][0] / first:.2f} times '
              f'as fast as dense; {len(batch.text) * WORDS / rest:8.1f} tokens/s, '
              f'{times["dense"][1] / rest:.2f} times; vision tokens by layer {cost["vision_by_layer"]}, '
              f'{cost["gflops"]:.2f} GFLOPs a clip, {cost["paper_share"]:.1%} of the decoder by the papers\' formula')


def retrieval_times(make: dict, batch, seconds, autocast, s: Settings) -> dict:
    """Of Retrievers in turn: {name: (seconds to encode the clips, of a training step, its memory in MB)}.

    make: name -> a function that makes the model, so that each is alone when its memory is measured.
    """
    memory = {name: step_memory_mb(s.device, stepper(s, new(), batch, autocast)) for name, new in make.items()}

    @torch.no_grad()
    def encode(model):
        with autocast():
            model.encode_video(batch.video)
    runs = {}
    for name, new in make.items():
        model = new()
        runs[name, 'encode'] = lambda model=model: encode(model)
        runs[name, 'step'] = stepper(s, model, batch, autocast)
    times = {key: statistics.median(each) for key, each in in_turn(seconds, runs).items()}
    return {name: (times[name, 'encode'], times[name, 'step'], memory[name]) for name in make}


def bench_retrieval(s: Settings, data, seconds, autocast):
    """Encoding clips, and training on them, with merging against without: in turn, medians, ratios."""
    batch = data.captions('train', 0, s.batch, s.device)
    make = {name: functools.partial(build_model, replace(s, recipe='retrieval', encoder=encoder, lora_rank=rank),
                                    data.caption_vocab) for name, (encoder, rank) in stages(s).items()}
    times, models = retrieval_times(make, batch, seconds, autocast, s), {name: new() for name, new in make.items()}
    print(f'\n{"":13} {"encode ms":>9} {"faster":>6} {"step ms":>8} {"faster":>6} {"memory MB":>9} {"share":>5} '
          f'{"GFLOPs":>7} {"share":>5} {"tokens":>6} {"learns":>17}')
    for name, (encode, step, memory) in times.items():
        plain, model, other = times[name.split('-')[0]], models[name], models[name.split('-')[0]]
        flops, full = (m.encoder.flops(s.frames, batch.video.shape[3:]) / 1e9 for m in (model, other))
        learns = num_learning(model)
        print(f'{name:13} {1000 * encode:9.0f} {plain[0] / encode:6.2f} {1000 * step:8.0f} {plain[1] / step:6.2f} '
              f'{memory:9.0f} {memory / plain[2]:5.2f} {flops:7.2f} {flops / full:5.2f} '
              f'{model.encoder.num_tokens(s.frames):6} {learns:10,} {learns / num_params(model):6.2%}')
    print(f'{s.batch} clips; faster, share: against the same without merging')


def bench_long_stream(model, s: Settings, autocast):
    """Frames per second and keys held along a stream, its frames in turn from a random clip."""
    c, frames = model.config, LONG_STREAM
    if c.window > frames - 200:
        raise ValueError(f'--window must be at most {frames - 200} to be timed, got {c.window}')
    clip = torch.rand(16, 1, 3, c.frame_size, c.frame_size, device=s.device)
    ticks, held = [], []
    prompt = torch.full((1, 1), c.vocab.index(PROMPT), device=s.device)
    with autocast():
        for moment in model.stream(((clip[t % 16], None) for t in range(frames)), prompt, theta=0.0):
            float(moment['silence'])                                       # waits for the device
            ticks.append(time.perf_counter())
            held.append(sum(moment['held']))
    speed = [1 / statistics.median(b - a for a, b in zip(ticks[t:], ticks[t + 1:t + 100]))
             for t in (c.window, frames - 100)]
    print(f'\nstream of {frames} frames, window {c.window}: {speed[0]:.1f} frames/s over the first 100 '
          f'behind the window, {speed[-1]:.1f} over the last 100 ({speed[-1] / speed[0]:.2f}); keys held '
          f'{held[c.window]} and {held[-1]}')


def optimizer_flops(model: ModVideo, lr: float) -> int:
    """FLOPs of the matrix products inside one step of the optimizers, counted by torch."""
    optimizers = configure_optimizer(model, lr)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with FlopCounterMode(display=False) as counter:
        for optimizer in optimizers:
            optimizer.step()
    return counter.get_total_flops()


def routing_overhead(device: str, sync) -> dict:
    """Time with scoring, gathering, scattering, as ratio to the block on the kept tokens alone."""
    block, router = MoDBlock(Block(512, 8)).to(device), Router(512).to(device)
    x, position = torch.randn(2, 16 * 65, 512, device=device), torch.arange(16 * 65, device=device)
    kept = x[:, :208].contiguous()                                # 13 of the 65 tokens of 16 frames

    def seconds(run, x, backward):
        x = x.detach().requires_grad_(backward)
        sync()
        start = time.perf_counter()
        with torch.set_grad_enabled(backward):
            y = run(x)
        if backward:
            y.sum().backward()
        sync()
        return time.perf_counter() - start

    def ratio(backward):
        pairs = [(seconds(lambda x: block(x, router(x, 16, 0.2), position), x, backward),
                  seconds(lambda x: x + block.block(x, position[:208]), kept, backward))
                 for _ in range(3 * ROUNDS + 2)]
        return statistics.median(a / b for a, b in pairs[2:])

    return {'forward': ratio(False), 'forward and backward': ratio(True)}


def step_memory_mb(device: str, step) -> float:
    """Memory of a training step: allocator's peak on CUDA, else bytes kept for the backward."""
    if device == 'cuda':
        step()                                                 # makes the optimizers' averages
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2 ** 20
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(kept.values()) / 2 ** 20


# --------------------------------------------------------------------------------------------------
# 6. The comparison: every recipe from one dense model, what it reaches and costs, next to its paper
# --------------------------------------------------------------------------------------------------

MOD = '--placement {deep} --gate zero'
COMPARED = {     # flags; all but the first two begin with the dense model of their seed, `derived` of its steps
    'dense': '--recipe dense', 'blind': '--recipe dense --blind',
    'mod-interleaved': '--recipe mod --gate zero', 'mod-all-deep': f'--recipe mod {MOD}',
    'mod-all': '--recipe mod --placement all --gate zero', 'gamma-mod': '--recipe gamma',
    'holitom-untrained': '--recipe holitom --retain-ratio 0.1 --inner-layer {half}',
    'holitom': '--recipe holitom --retain-ratio 0.5', 'bvllm': '--recipe bvllm', 'uniform': '--recipe uniform',
    'vqtoken': '--recipe vqtoken', 'vqtoken-adaptive': '--recipe vqtoken --codes adaptive',
    'tempme': '--recipe dense --encoder tempme', 'mod+holitom': f'--recipe holitom --retain-ratio 0.5 {MOD}',
    'mod+vqtoken': f'--recipe vqtoken {MOD}', 'mod+tempme': f'--recipe mod --encoder tempme {MOD}',
    'retrieval': '--recipe tempme'}
DERIVED = 0.2


SHARED = ['preset', 'data', 'grid', 'frames', 'layers', 'keep_ratio', 'steps', 'batch', 'lr', 'device', 'dtype',
          'deterministic']           # flags that --compare hands on to its rows


def as_flags(values: dict) -> list:
    """{'keep_ratio': 0.1, 'blind': True} -> ['--keep-ratio', '0.1', '--blind']."""
    return [word for name, value in values.items()
            for word in ([dashed(name)] if value is True else [dashed(name), str(value)])]


def compare_flags(s: Settings, name: str, seed: int, folder: Path) -> list:
    """The command line of one row, without its folder."""
    depth, own = s.layers or PRESETS[s.preset]['n_layer'], ('dense', 'blind', 'retrieval')
    flags = COMPARED[name].format(half=max(1, depth // 2), deep='all-deep' if depth > 3 else 'all').split()
    hand = {key: value for key, value in given(s).items() if key in SHARED and key != 'preset'}
    hand = dict(preset=s.preset, seed=seed, **{**hand, 'device': s.device, 'steps': s.steps or RUNS[s.preset]['steps']})
    if name == 'holitom-untrained' or name == 'retrieval' and not s.steps:
        del hand['steps']                                                      # each stage has its own
    elif name not in own:
        hand['steps'] = max(1, round(DERIVED * hand['steps']))
    if name == 'retrieval':
        hand.pop('layers', None)
    flags += as_flags(hand)
    return flags if name in own else [*flags, '--init-from', str(folder / f'seed{seed}/dense')]


def run_row(s: Settings, name: str, seed: int, folder: Path):
    """Train one row, or go on where it was interrupted, unless it is finished -> result, command."""
    flags, run = compare_flags(s, name, seed, folder), folder / f'seed{seed}' / name
    trial = parse([*flags, '--out', str(run)])
    if not (run / 'result.json').exists():
        print(f'\n== {name}, seed {seed}')
        if name == 'retrieval':
            run_tempme(trial)
        else:
            finish(trial)
    return json.loads((run / 'result.json').read_text()), shlex.join(['python', 'train_tiny.py', *flags])


def time_rows(s: Settings, folder: Path, names: list, data, autocast) -> dict:
    """Training step, answers and memory of the trained models of one seed, in turn: medians."""
    _, seconds = clock(s.device)
    load = lambda name: load_checkpoint(folder / name / 'ckpt.pt', s.device)[0]
    batch = draw_batch(s, data, 'train', 0, s.batch)
    memory = {name: step_memory_mb(s.device, stepper(s, load(name), batch, autocast)) for name in names}
    models = {name: load(name) for name in names}
    answers = answer_times(models, batch, seconds, autocast, 2 * ROUNDS)           # before steps change them
    steps = {name: stepper(s, model.train(), batch, autocast) for name, model in models.items()}
    steps = in_turn(seconds, steps, 2 * ROUNDS)
    rows = {}
    for name, (first, rest) in answers.items():
        step = statistics.median(steps[name])
        rows[name] = dict(step_ms=1000 * step, clips_per_s=s.batch / step, memory_mb=memory[name],
                          first_ms=1000 * first, tokens_per_s=WORDS * s.batch / rest)
    return rows


def rows_to_compare(s: Settings, folder: Path, seeds) -> list:
    """The rows that --recipes names, 'dense', with which all begin, and those that are finished already."""
    asked = s.recipes.split(',') if s.recipes else [*COMPARED]
    for name in asked:
        if name not in COMPARED:
            raise ValueError(f'--recipes: {name!r} is none of {", ".join(COMPARED)}')
    if s.data != 'shapes':
        asked = [name for name in asked if name != 'retrieval']                # it needs sentences
    done = lambda name: all((folder / f'seed{seed}/{name}/result.json').exists() for seed in seeds)
    return [name for name in COMPARED if name in ('dense', *asked) or done(name)]


def run_compare(s: Settings):
    """--compare: train what is missing, time all rows, write tables and pictures."""
    for name in given(s):
        if name not in (*SHARED, 'compare', 'recipes', 'seeds', 'seed', 'out'):
            raise ValueError(f'{dashed(name)} does not go with --compare, whose rows set it themselves')
    told = replace(s)                                          # without what the machine fills in
    autocast = pick_machine(s)
    told.preset, told.device = s.preset, s.device
    clips = '' if s.data == 'shapes' else f'-{Path(s.data).name}'
    folder, seeds, rows = Path(s.out or f'out/compare-{s.preset}{clips}'), range(s.seed, s.seed + (s.seeds or 3)), {}
    names = rows_to_compare(s, folder, seeds)
    begin_with(folder, {name: getattr(told, name) for name in SHARED})
    for seed, name in itertools.product(seeds, names):
        result, command = run_row(told, name, seed, folder)
        rows.setdefault(name, dict(command=command, seeds=[]))['seeds'].append(result)
    retrieval = rows.pop('retrieval', None)
    s = replace(s, recipe='dense')
    data, first = load_data(s), folder / f'seed{seeds[0]}'
    timed = time_rows(s, first, list(rows), data, autocast)
    if retrieval:
        make = {name: lambda name=name: load_checkpoint(first / f'retrieval/{name}/ckpt.pt', s.device)[0]
                for name in ('full', 'full-merging')}
        retrieval['times'] = retrieval_times(
            make, data.captions('train', 0, s.batch, s.device), clock(s.device)[1], autocast, s)
    for name, row in rows.items():
        row.update(summarize(row['seeds']), **timed[name])
        if name not in ('dense', 'blind'):
            clip_picture(s, folder, f'seed{seeds[0]}/{name}', data)
    report = dict(device=machine_name(s.device), torch=torch.__version__, dtype=s.dtype, preset=s.preset,
                  seeds=list(seeds), rows=rows, retrieval=retrieval, claims=claims(rows, retrieval))
    draw_pareto(rows, folder / 'results.png')
    text = write_report(report)
    write_whole(folder / 'results.md', text)
    write_json(folder / 'results.json', report)
    print(f'\n{text}\nIn {folder}: results.json, results.md, results.png, a picture of one clip for every method')


def summarize(results: list) -> dict:
    """Mean and standard deviation over seeds of what a row's runs measured."""
    accuracy, mean = [r['accuracy'] for r in results], lambda of: statistics.mean(map(of, results))
    types = {name: mean(lambda r: r['accuracy_by_type'][name]) for name in results[0]['accuracy_by_type']}
    return dict(accuracy=statistics.mean(accuracy), std=statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0,
                by_type=types, layers=[round(statistics.mean(layer), 1) for layer in
                                       zip(*(r['vision_by_layer'] for r in results))],
                chance=results[0]['chance'], vision_tokens=results[0]['vision_tokens'], learns=results[0]['learns'],
                **{key: mean(lambda r: r[key]) for key in (
                    'gflops', 'decoder_gflops', 'paper_share', 'tok_density', 'blind_accuracy')})


def clip_picture(s: Settings, folder: Path, name: str, data):
    """What a row's model makes of one held-out clip, the same for all: NAME.png beside the tables."""
    model, batch = load_checkpoint(folder / name / 'ckpt.pt', s.device)[0].eval(), data.batch('test', 0, 64, s.device)
    b = liveliest(batch.video)
    asked, _ = split_question(batch.text[b, 0], batch.targets[b, 0])
    draw_clip(model, batch.video[b], asked[None], folder / Path(name).name,
              f'{Path(name).name}: {say(asked, data.vocab)}')


def change(key):
    """-0.42: so much less than the row it is compared with."""
    return lambda row, base: share(key)(row, base) - 1


def share(key):
    return lambda row, base: row[key] / max(base[key], 1e-9)


def speed_up(key):
    """2.28: so many times as fast, of a time."""
    return lambda row, base: base[key] / row[key]


def points(row, base) -> float:
    return 100 * (row['accuracy'] - base['accuracy'])


def moment_points(row, base):
    """Percentage points of questions about a moment; None where the data have none."""
    return 100 * (row['by_type']['moment'] - base['by_type']['moment']) if 'moment' in row['by_type'] else None


def token_share(row, base) -> float:
    return row['layers'][0] / row['vision_tokens']


def converted(row, base) -> float:
    """Share of the layers that process fewer vision tokens than there are."""
    return sum(n < row['vision_tokens'] for n in row['layers']) / len(row['layers'])


SMALL = 'a clip has {vision_tokens} vision tokens here, thousands in the paper'
SHORT = f'a row is trained for {DERIVED:.0%} of the dense steps'
BRIEF = 'the towers are adapted for some hundred steps'
CLAIMS = [     # paper, row, compared with; claim, the paper's figure, ours, from where on it is reached, else why not
    ('VideoLLM-MoD', 'mod-all-deep', 'dense', [
        ('training time', '-42 %', change('step_ms'), '{:+.1%}', le, -0.42, SMALL),
        ('training memory', '-30 %', change('memory_mb'), '{:+.1%}', le, -0.30, SMALL),
        ('accuracy kept, within 0.5 points', '0', points, '{:+.2f} points', ge, -0.5, SHORT)]),
    ('gamma-MoD', 'gamma-mod', 'dense', [
        ('training time', '-31.0 %', change('step_ms'), '{:+.1%}', le, -0.31, SMALL),
        ('throughput (ours: to the first token)', '+53.2 %', lambda row, base: base['first_ms'] / row['first_ms'] - 1,
         '{:+.1%}', ge, 0.532, SMALL),
        ('accuracy', '-1.5 %', points, '{:+.2f} points', ge, -1.5, SHORT),
        ('layers converted', '> 90 % (its code: 87.5 %)', converted, '{:.1%}', ge, 0.875,
         'the last layer stays dense')]),
    ('HoliTom', 'holitom-untrained', 'dense', [
        ('FLOPs by its formula', '6.9 %', lambda row, base: row['paper_share'], '{:.1%}', le, 0.069, SMALL),
        ('accuracy kept, untrained', '99.1 %', share('accuracy'), '{:.1%}', ge, 0.991, SMALL),
        ('time to first token', '2.28 times', speed_up('first_ms'), '{:.2f} times', ge, 2.28, SMALL),
        ('decoding', '1.32 times', share('tokens_per_s'), '{:.2f} times', ge, 1.32, SMALL)]),
    ('VQToken', 'vqtoken', 'dense', [
        ('share of the tokens', '0.07 %', token_share, '{:.2%}', le, 0.0007, SMALL),
        ('accuracy', '-0.66 points', points, '{:+.2f} points', ge, -0.66, SHORT)]),
    ('B-VLLM', 'bvllm', 'uniform', [
        ('questions about a moment, against uniform frames', '+10 %', moment_points, '{:+.1f} points', ge, 10, SHORT)]),
    ('TempMe', 'lora-merging', 'lora', [
        ('output tokens', '-95 %', change('tokens'), '{:+.1%}', le, -0.95, SMALL),
        ('encoder FLOPs', '-51 % (against an earlier method)', change('gflops'), '{:+.1%}', le, -0.51, SMALL),
        ('R-Sum with LoRA', '+4.4 %', change('r_sum'), '{:+.1%}', ge, 0.044, BRIEF),
        ('parameters that learn, at most 1 %', '0.50 M', lambda row, base: row['learns'] / row['parameters'],
         '{:.2%}', le, 0.01, 'the model is a hundred times as small')]),
    ('TempMe', 'full-merging', 'full', [
        ('R-Sum, all weights', '+7.9 %', change('r_sum'), '{:+.1%}', ge, 0.079, BRIEF),
        ('encoding speed', '1.8 times', speed_up('encode_s'), '{:.2f} times', ge, 1.8, SMALL),
        ('training speed', '1.57 times', speed_up('step_s'), '{:.2f} times', ge, 1.57, SMALL),
        ('training memory', '75.2 %', share('memory_mb'), '{:.1%}', le, 0.752, SMALL)])]


def stage_rows(retrieval: dict) -> dict:
    """The stages of the retrieval recipe, means over its seeds, and the times of those that were timed."""
    rows = {}
    for name, first in retrieval['seeds'][0].items():
        rows[name] = dict(tokens=first['vision_by_layer'][-1], **{
            key: statistics.mean(seed[name][key] for seed in retrieval['seeds'])
            for key in ('gflops', 'r_sum', 'accuracy', 'learns', 'parameters')})
    for name, measured in retrieval['times'].items():
        rows[name].update(zip(('encode_s', 'step_s', 'memory_mb'), measured))
    return rows


def claims(rows: dict, retrieval) -> list:
    """[paper, what, its figure, ours, reached, why not]: of the rows that there are."""
    made, N = [], rows['dense']['vision_tokens']
    rows = {**rows, **(stage_rows(retrieval) if retrieval else {})}
    for paper, name, base, said in CLAIMS:
        for what, figure, measure, shown, reaches, bound, why in said if name in rows and base in rows else []:
            ours = measure(rows[name], rows[base])
            if ours is not None:
                reached = reaches(ours, bound)
                made.append([paper, what, figure, shown.format(ours), reached,
                             '' if reached else why.format(vision_tokens=N)])
    return made


def write_report(report: dict) -> str:
    """Both tables in Markdown."""
    rows, dense = report['rows'], report['rows']['dense']
    head = ['recipe', 'accuracy', *dense['by_type'], 'vision tokens by layer', 'decoder GFLOPs', 'GFLOPs', 'step ms',
            'clips/s', 'memory MB', 'first token ms', 'tokens/s', 'TokDense', 'learns', 'command']
    percent = lambda x: f'{100 * x:.1f}'
    against = lambda row, key: f'{row[key]:.1f} ({row[key] / dense[key]:.2f})'
    spread = lambda row: f' ± {percent(row["std"])}' if len(report['seeds']) > 1 else ''
    lines = [head, ['---'] * len(head)]
    for name, row in rows.items():
        lines.append([
            name, percent(row['accuracy']) + spread(row), *map(percent, row['by_type'].values()),
            ' '.join(f'{n:g}' for n in row['layers']), f'{row["decoder_gflops"]:.3f}', f'{row["gflops"]:.3f}',
            *(against(row, key) for key in ('step_ms', 'clips_per_s', 'memory_mb', 'first_ms', 'tokens_per_s')),
            f'{row["tok_density"]:.2f}', f'{row["learns"]:,}', f'`{row["command"]}`'])
    lines.append(['chance', percent(dense['chance']), *[''] * (len(head) - 2)])
    table = lambda lines: ['| ' + ' | '.join(line) + ' |' for line in lines]
    out = [f'{report["device"]}, torch {report["torch"]}, {report["dtype"]}, preset {report["preset"]}, '
           f'seeds {report["seeds"]}; in brackets: against dense in the same run; times and commands: of the first '
           'seed', '', *table(lines)]
    out += ['', *table([['paper', 'claim', 'its figure', 'here', 'reached', 'why not'], ['---'] * 6,
                        *([*line[:4], 'yes' if line[4] else 'no', line[5]] for line in report['claims'])])]
    if report['retrieval']:
        out += ['', f'retrieval: `{report["retrieval"]["command"]}`', '']
        out += [f'- {name}: R@1 {percent(r["accuracy"])}, R-Sum {r["r_sum"]:.1f}, {r["gflops"]:.3f} GFLOPs, '
                f'{r["learns"]:,.0f} parameters learn' for name, r in stage_rows(report['retrieval']).items()]
    return '\n'.join(out) + '\n'


def draw_pareto(rows: dict, path: Path, width: int = 720, height: int = 420):
    """Accuracy (by the logarithm of the error) over the measured time to the first token, as a share of dense; the
    front that nothing beats."""
    image = Image.new('RGB', (width, height), 'white')
    draw = ImageDraw.Draw(image)
    points = {name: (row['first_ms'] / rows['dense']['first_ms'], row['accuracy']) for name, row in rows.items()
              if name != 'blind'}
    rise = lambda accuracy: -math.log(max(1 - accuracy, 1e-3))
    low, high = (f(rise(y) for _, y in points.values()) for f in (min, max))
    left, right = (math.log(f(x for x, _ in points.values())) for f in (min, max))
    left, right, low, high = left - 0.05, right + 0.5, low - 0.2, high + 0.1           # room for labels
    place = lambda x, y: (50 + (width - 70) * (math.log(x) - left) / (right - left),
                          20 + (height - 60) * (high - rise(y)) / (high - low))
    for y in (0.01, 0.05, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995):
        if low < rise(y) < high:
            draw.line([place(math.exp(left), y), place(math.exp(right), y)], fill='#dddddd')
            draw.text((4, place(1, y)[1] - 6), f'{y:.1%}', fill='#666666')
    for i in range(5):
        x = math.exp(left + (right - left) * i / 5)
        draw.text((place(x, 0)[0] - 8, height - 34), f'{x:.2f}', fill='#666666')
    front = [p for p in sorted(points.values())
             if not any(x <= p[0] and y >= p[1] and (x, y) != p for x, y in points.values())]
    draw.line([place(*p) for p in front], fill='#d03020', width=2)
    written = []                                                               # where labels stand
    for name, point in sorted(points.items(), key=lambda item: -item[1][1]):
        x, y = place(*point)
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill='#d03020' if point in front else '#2060d0')
        label_y = y - 6
        while any(abs(label_y - v) < 11 and u < x + 7 + 6 * len(name) and x < u + 7 + 6 * n for u, v, n in written):
            label_y += 2                                                       # below those before it
        written.append((x, label_y, len(name)))
        draw.line([(x, y), (x + 6, label_y + 6)], fill='#999999')
        draw.text((x + 7, label_y), name, fill='black')
    draw.text((50, height - 18), 'time to the first token as a share of dense (log); red: nothing is faster and better',
              fill='black')
    image.save(path)


def main(argv=None, began: float = None) -> int:
    """Returns the exit status: 0, or 2 after one sentence about what was wrong."""
    began = began or time.time()
    try:
        s = parse(argv)
        if s.ask:
            run_ask(s)
        elif s.stream:
            run_stream(s)
        elif s.find:
            run_find(s)
        elif s.study:
            run_study(s)
        elif s.compare:
            run_compare(s)
        elif s.bench:
            run_bench(s)
        elif s.recipe == 'tempme':
            run_tempme(s)
        else:
            run_training(s, began)
    except torch.cuda.OutOfMemoryError:
        print('train_tiny: the GPU is out of memory; try a smaller --batch or --preset', file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f'train_tiny: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('\ntrain_tiny: stopped; --resume RUN goes on from its last checkpoint', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main(began=BEGAN))
