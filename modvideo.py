# SPDX-License-Identifier: MIT-0
"""modvideo: a small video-language model that spends less on video. It needs torch; the pictures need Pillow.

    video (B, T, 3, height, width)                   text (B, Q, L) word ids
       |  encoder, each frame alone                    |  embedding
    vision tokens (B, T, P, C)                         |
       |  reducer: N -> M tokens                       |
    vision tokens (B, M, C) ---- concatenated ---- text tokens (B, Q*L, C)
                                  |
                      (B, M + Q*L, C)  decoder layer 0      all tokens
                                  |    decoder layer 1      MoD: K of the M vision tokens, all text
                                  |    (stage: M -> fewer)  (others pass unchanged, not attended to)
                                  |    last decoder layer   all tokens
                      logits (B, Q, L, V), loss

Legend: B batch · T frames · P patches of one frame · N = T*P vision tokens before reduction · M after it ·
    Q questions a clip · L text tokens of one question · C channels · H heads · D channels of a head ·
    K clusters, codes or selected tokens · S tokens of any sequence · V words. Video is float in [0, 1].

The core runs alone: 1 configuration   2 transformer bricks   3 vision encoder   4 Mixture-of-Depths
    5 the model   6 save and load. After it each method is a class that enters itself in a dictionary of the
    core: 7 token reduction   8 ToMe   9 HoliTom   10 clusters and codes   11 B-VLLM   12 TempMe and
    retrieval   13 gamma-MoD   14 accounting, pictures, optimizer

Usage:
    vocab = ['<pad>', '<eos>', 'what', 'moves']
    model = ModVideo(ModVideoConfig(**PRESETS['tiny'], vocab=vocab, placement='all'))
    video = torch.rand(2, 4, 3, 32, 32)                             # (B, T, 3, height, width)
    text = torch.tensor([[[2, 3]], [[2, 3]]])                       # (B, Q, L)
    logits, loss, aux = model(video, text)                          # (2, 1, 2, 4), None, dict
    answer = model.generate(video, text, max_new_tokens=3)          # (2, 1, 3)
    draw_tokens(video[0], aux['routes'][0]).save('tokens.png')      # what layer 0 processed
"""
import contextlib
import copy
import inspect
import io
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.module_tracker import ModuleTracker

# ---- 1. Configuration --------------------------------------------------------------------------------------
# All that decides the model's shape, so that a checkpoint explains itself. Five parts are classes that enter
# themselves here by name; options are keyword-only arguments, `name: Annotated[type, 'help'] = default`.
# stands alone

PAD, EOS, IGNORE = 0, 1, -1     # '<pad>', '<eos>' in every vocabulary; the target that the loss skips
ENCODERS, REDUCERS, STAGES, ROUTINGS, MODELS = {}, {}, {'none': None}, {}, {}
PARTS = dict(encoder=ENCODERS, reducer=REDUCERS, stage=STAGES, routing=ROUTINGS, model=MODELS)

GPU = dict(frames=16, frame_size=64, encoder_layers=2, encoder_dim=256, encoder_heads=4, n_layer=8,
           dim=256, n_head=4)
PRESETS = {
    'tiny': dict(frames=4, frame_size=32, encoder_layers=1, encoder_dim=64, encoder_heads=2,
                 n_layer=3, dim=64, n_head=2),                                # tests and smoke runs
    'cpu': dict(frames=8, frame_size=32, encoder_layers=1, encoder_dim=96, encoder_heads=3,
                n_layer=4, dim=96, n_head=3),                                 # 128 vision tokens
    'wide': dict(frames=16, frame_size=64, encoder_layers=1, encoder_dim=96, encoder_heads=3,
                 n_layer=8, dim=64, n_head=2),                                # 1,024 vision tokens
    'gpu': GPU,                                                               # 1,024 vision tokens
    'deep': dict(GPU, n_layer=16),
    'long': dict(GPU, frames=64, frame_size=128),                             # 16,384 vision tokens
}


def options_of(part) -> dict:
    """The options of a class, its keyword-only arguments: name -> inspect.Parameter."""
    arguments = inspect.signature(part).parameters if part else {}
    return {name: a for name, a in arguments.items() if a.kind is a.KEYWORD_ONLY}


@dataclass
class ModVideoConfig:
    """The shape of a model. Raises ValueError where fields contradict each other."""
    vocab: list           # the words; id = place in the list; the first two are '<pad>' and '<eos>'
    frames: Annotated[int, 'frames of a clip; encoder tempme takes no other number'] = 8
    frame_size: Annotated[int, 'height and width of a frame in pixels'] = 32
    patch_size: Annotated[int, 'pixels of a side of a patch'] = 8
    encoder: Annotated[str, 'how frames become tokens'] = 'plain'
    encoder_layers: Annotated[int, 'layers of the vision encoder'] = 1
    encoder_dim: Annotated[int, 'channels of the vision encoder'] = 96
    encoder_heads: Annotated[int, 'attention heads of the vision encoder'] = 3
    n_layer: Annotated[int, 'layers of the decoder; of retrieval, of both towers'] = 4
    dim: Annotated[int, 'channels of the decoder'] = 96
    n_head: Annotated[int, 'attention heads of the decoder'] = 3
    placement: Annotated[str, 'layers that route: all, interleaved, each [-deep], none, or 1,2'] = 'none'
    keep_ratio: Annotated[float, 'share of the vision tokens that a routed layer takes, rounded up'] = 0.2
    routing: Annotated[str, 'who selects: a router for each frame (frame), or another way'] = 'frame'
    reducer: Annotated[str, 'what makes vision tokens fewer before the decoder'] = 'none'
    stage: Annotated[str, 'what makes vision tokens fewer inside the decoder'] = 'none'
    window: Annotated[int, 'frames that a stream remembers, the prompt aside; 0 = all (generate: all)'] = 0
    silence_weight: Annotated[float, 'weight of silent frames in the loss of a stream'] = 1.0
    streaming: bool = False          # text stands between frames, a frame's last token decides about speech
    model: str = 'modvideo'
    options: dict = field(default_factory=dict)          # of the chosen parts: {'gate': 'zero'}

    def __post_init__(self):
        if list(self.vocab[:2]) != ['<pad>', '<eos>']:
            raise ValueError(f"the vocabulary starts with {list(self.vocab[:2])}, wanted ['<pad>', '<eos>']")
        sizes = {name: value for name, value in vars(self).items()
                 if type(value) is int and name not in ('window', 'silence_weight')}
        weights = sum(n * max(dim, 256) ** 2 for n, dim in (
            (self.n_layer, self.dim), (self.encoder_layers, self.encoder_dim)))    # a block has 12 * dim²
        wide = [1000 * n for n in self.options.values() if type(n) is int]     # so 10**6 is the most
        if min(sizes.values()) < 1 or max(weights, self.frames * self.frame_size ** 2, *wide, 0) > 10 ** 9:
            raise ValueError('sizes must be at least 1, and a billion pixels, 12 billion weights, a million '
                             f'codes or tokens are the most; got {sizes | self.options}')
        if self.patch_size % 4 or self.frame_size % self.patch_size:
            raise ValueError('patch_size must be a multiple of 4 that divides frame_size, '
                             f'got patch_size {self.patch_size} and frame_size {self.frame_size}')
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f'keep_ratio must be above 0 and at most 1, got {self.keep_ratio}')
        if self.window < 0 or (self.window and not self.streaming):
            raise ValueError(f'window is a number of frames for streaming models, got {self.window}')
        self.check_options()
        self.patches = (self.frame_size // self.patch_size) ** 2               # P, of one frame
        parts = ('encoder', self.encoder), ('reducer', self.reducer), ('stage', self.stage)    # may merge
        merges = [f'{part} {name!r}' for part, name in parts if name not in ('plain', 'none')]
        if self.streaming and (merges or ROUTINGS[self.routing].whole_clip):
            raise ValueError(f'{[*merges, f"routing {self.routing!r}"][0]} sees the whole clip, not a stream')
        if merges and not ROUTINGS[self.routing].ragged:
            raise ValueError(f'routing {self.routing!r} wants all tokens of a frame, not {merges[0]}')
        if ENCODERS[self.encoder].merges and self.reducer != 'none':
            raise ValueError(f'{merges[0]} merges already and goes with reducer none, got {merges[1]}')

    def check_options(self):
        """ValueError: a part that does not exist, an option that no chosen part has, or that is missing."""
        known, chosen = {}, []
        for part, classes in PARTS.items():
            name = getattr(self, part)
            if name not in classes:
                raise ValueError(f'{part} must be one of {", ".join(classes)}, got {name!r}')
            known.update(own := options_of(classes[name]))
            chosen += [f'{part} {name!r}'] if own else []
            for key, option in own.items():
                if option.default is option.empty and key not in self.options:
                    raise ValueError(f'{chosen[-1]} wants {key}: {get_args(option.annotation)[1]}')
        if other := [key for key in self.options if key not in known]:
            raise ValueError(f'{other[0]} is no option of {" or ".join(chosen or PARTS)}: {", ".join(known)}')

    def build(self, part: str, *arguments):
        """An object of the class chosen for a part, from these and its own options; None for stage none."""
        chosen = PARTS[part][getattr(self, part)]
        own = {name: self.options[name] for name in options_of(chosen) if name in self.options}
        return chosen and chosen(*arguments, **own)

# ---- 2. Transformer bricks ---------------------------------------------------------------------------------
# One pre-norm block serves the encoder (sees everything) and the decoder (sees the past; rotary positions, Su
# et al., arXiv 2104.09864). It returns its *update*; callers add it, gated or not.
# stands alone

NEVER = 2 ** 40     # position of padding: later than any query, so no query sees it


def rotary(x: Tensor, position: Tensor, base: float = 10000.0) -> Tensor:
    """Turn pairs 2i, 2i + 1 of x (B, S, H, D) by position * base**(-2i/D); position (S,) or (B, S)."""
    half, wide = x.size(-1) // 2, torch.float if x.device.type == 'mps' else torch.double
    turns = base ** (-torch.arange(half, dtype=wide, device=x.device) / half) / (2 * math.pi)      # (D/2,)
    angle = 2 * math.pi * (position[..., None, None] * turns).frac().float()   # float32 counts to 2**24 alone
    turn = torch.polar(torch.ones_like(angle), angle)                # (S, 1, D/2) or (B, S, 1, D/2) complex
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (half, 2))
    return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2).to(x.dtype)     # (B, S, H, D)


def visible(query: Tensor, key: Tensor = None) -> Tensor:
    """Positions (B, S), (B, S') -> (B, 1, S, S') bool: which keys are not later than each query."""
    key = query if key is None else key
    return (key[:, None, :] <= query[:, :, None])[:, None]


def additive(mask: Tensor, x: Tensor):
    """A bool mask as what is added to the scores of x, 0 or -inf. None and float masks stay as they are."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)


class KVCache:
    """Keys, values, positions that an attention layer has seen. Layers may hold unequal numbers."""
    k = v = position = None                        # (B, H, S, D), (B, H, S, D), (B, S)

    def extend(self, k: Tensor, v: Tensor, position: Tensor, mask: Tensor = None):
        """Append k, v (B, H, new, D) -> all k, v, a mask (B, 1, new, all); the given one, if empty before."""
        position = position.expand(k.size(0), -1)
        if self.k is None:
            self.k, self.v, self.position = k, v, position
            return k, v, mask
        if len(k) > len(self.k):                               # several questions about each sample follow
            self.k, self.v, self.position = (
                a.repeat_interleave(len(k) // len(a), 0) for a in (self.k, self.v, self.position))
        self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        self.position = torch.cat([self.position, position], 1)
        return self.k, self.v, visible(position, self.position)

    def trim(self, keep):
        """Forget padding, and the positions that keep says no to: keep((B, S) int64) -> (B, S) bool."""
        if self.k is not None:
            kept = keep(self.position) & (self.position < NEVER)               # (B, S)
            column = kept.any(0).nonzero()[:, 0]              # held as long as one sample wants it
            self.k, self.v = self.k.index_select(2, column), self.v.index_select(2, column)
            self.position = self.position.masked_fill(~kept, NEVER).index_select(1, column)


class Attention(nn.Module):
    """Multi-head self-attention. `causal`: a row that the mask does not cover sees itself and the past."""

    def __init__(self, dim: int, n_head: int, causal: bool = True):
        super().__init__()
        if dim % (2 * n_head):
            raise ValueError(f'channels per head must be even, got {dim} channels and {n_head} heads')
        self.n_head, self.causal = n_head, causal
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def project(self, x: Tensor, position: Tensor = None):
        """Queries, keys, values of x (B, S, C): (B, H, S, D) each."""
        H, D = self.n_head, x.size(2) // self.n_head
        qk, v = self.qkv(x).unflatten(2, (3 * H, D)).split([2 * H, H], 2)      # (B, S, 2H, D), (B, S, H, D)
        q, k = (qk if position is None else rotary(qk, position)).chunk(2, 2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def weights(self, x: Tensor, position=None, mask: Tensor = None, row: Tensor = None) -> Tensor:
        """Attention of each token, or of token row (B,) alone by its mask: (B, H, S, S) or (B, H, 1, S)."""
        q, k, _ = self.project(x, position)                                    # (B, H, S, D)
        if row is not None:
            q = q.take_along_dim(row[:, None, None, None], 2)                  # (B, H, 1, D)
        score = (q @ k.mT / math.sqrt(q.size(-1))).float()                     # (B, H, S, S) or (B, H, 1, S)
        n = self.unmasked(score.size(2), mask)
        score[:, :, :n] += torch.full((n, x.size(1)), -math.inf, device=x.device).triu(1)      # the future
        score[:, :, n:] += 0 if mask is None else additive(mask, score)
        return score.softmax(-1).masked_fill(score.amax(-1, keepdim=True) == -math.inf, 0)     # sees none: 0

    def unmasked(self, rows: int, mask: Tensor) -> int:
        """How many of these rows come before the mask's and so see all their past; 0 if not causal."""
        return rows - (0 if mask is None else mask.size(-2)) if self.causal else 0

    def forward(self, x: Tensor, position=None, mask: Tensor = None, cache: KVCache = None) -> Tensor:
        """x (B, S, C), position (S,), (B, S) or None (no rotary) -> (B, S, C).

        mask (R, S) or (B, 1, R, S), of the last R tokens, bool (True: seen) or float, added to the scores.
        """
        q, k, v = self.project(x, position)
        if cache is not None:                                          # a filled cache makes the mask itself
            k, v, mask = cache.extend(k, v, position, mask)
        return self.mix(q, k, v, mask)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor = None) -> Tensor:
        """What project gave -> (B, S, C)."""
        look, n = F.scaled_dot_product_attention, self.unmasked(q.size(2), mask)
        if 0 < n < q.size(2):
            first, last = q.split([n, q.size(2) - n], 2)       # slices would copy four times in backward
            past = look(first, k[:, :, :n], v[:, :, :n], is_causal=True)               # (B, H, n, D)
            y = torch.cat([past, look(last, k, v, mask)], 2)                           # (B, H, S, D)
        else:
            y = look(q, k, v, mask, is_causal=self.causal and mask is None)
        return self.out(y.transpose(1, 2).flatten(2))                          # (B, S, C)


class Block(nn.Module):
    """A pre-norm transformer block f. forward returns the update f(x); the layer is x + f(x)."""

    def __init__(self, dim: int, n_head: int, causal: bool = True):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
        up, down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)
        self.attention = Attention(dim, n_head, causal)
        self.mlp = nn.Sequential(OrderedDict(up=up, gelu=nn.GELU(), down=down))

    def forward(self, x: Tensor, position=None, mask: Tensor = None, cache: KVCache = None) -> Tensor:
        """x (B, S, C) -> f(x) (B, S, C)."""
        a = self.attention(self.norm1(x), position, mask, cache)
        return a + self.mlp(self.norm2(x + a))


class Reduced(NamedTuple):
    """What an encoder or a reducer hands on."""
    tokens: Tensor             # (B, M, C); of an encoder that merges nothing (B*T, P, C)
    position: Tensor = None    # (B, M) or (M,) int64, ascending: t*P + p; NEVER at padding; None: in place
    reduction: tuple = None    # a Reduction of all N tokens; None: those at `position` stayed, no other
    loss: Tensor = 0.0         # added to the model's
    info: dict = {}            # what else a reader would look at; the default is shared: replace it

# ---- 3. Vision encoder -------------------------------------------------------------------------------------
# A vision transformer (Dosovitskiy et al., arXiv 2010.11929) on each frame alone. Its stem is convolutional
# (Xiao et al., arXiv 2106.14881) and also reads the change since the frame before: motion.
# needs sections 1, 2

def keep_scale(layers: nn.Sequential):
    """Weights that keep the size of what passes (He et al., arXiv 1502.01852); torch's default shrinks it."""
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity='relu')
            nn.init.zeros_(layer.bias)


class VisionEncoder(nn.Module):
    """Convolutions, learned places in the frame, blocks in which the patches of a frame see each other."""
    merges = False       # True: forward returns fewer tokens than patches, with their position

    def __init__(self, dim: int, n_layer: int, n_head: int, patches: int, patch_size: int = 8,
                 frames: int = None, channels: int = 6):           # frames: T, for encoders that join frames
        super().__init__()
        self.stem = nn.Sequential(                                             # of total stride patch_size
            nn.Conv2d(channels, 32, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(64, dim, max(3, patch_size // 4), patch_size // 4, padding=int(patch_size < 12)))
        keep_scale(self.stem)
        self.place = nn.Parameter(0.2 * torch.randn(patches, dim))             # (P, C)
        self.blocks = nn.ModuleList(Block(dim, n_head, causal=False) for _ in range(n_layer))
        self.final_norm = nn.LayerNorm(dim, bias=False)

    def embed(self, video: Tensor, previous: Tensor = None) -> Tensor:
        """video (B, T, 3, height, width) -> (B*T, P, C). previous (B, 1, 3, ...): the frame before it."""
        frames = video - 0.45                            # (B, T, 3, height, width) less an ordinary mean
        if self.stem[0].in_channels == 6:                # 3 channels: changes are left out
            before = video[:, :1] if previous is None else previous            # None: nothing changed
            frames = torch.cat([frames, video - torch.cat([before, video[:, :-1]], 1)], 2)
        return self.stem(frames.flatten(0, 1) / 0.2).flatten(2).transpose(1, 2)    # 0.2: an ordinary spread

    def forward(self, video: Tensor, previous: Tensor = None, want_saliency: bool = False) -> Reduced:
        """video (B, T, 3, height, width), the frame before it -> tokens (B*T, P, C).

        info 'saliency' (B*T, P): the attention a patch receives in the last layer, mean over heads, queries.
        """
        x, info = self.embed(video, previous) + self.place, {}                 # (B*T, P, C)
        for block in self.blocks:
            before, x = x, x + block(x)
        if want_saliency:
            info['saliency'] = block.attention.weights(block.norm1(before)).mean((1, 2)).detach()
        return Reduced(self.final_norm(x), info=info)


ENCODERS['plain'] = VisionEncoder

# ---- 4. Mixture-of-Depths ----------------------------------------------------------------------------------
# A routed layer leaves all tokens as they are but K, which its router scores highest: they become x + r f(x),
# r = w·x (Raposo et al., arXiv 2404.02258, equation 1). VideoLLM-MoD (Wu et al., arXiv 2408.16730) chooses
# vision tokens frame by frame, never by a later one, so training, prefill and streaming choose alike.
# needs sections 1, 2; MoDBlock works around any block(x, position, mask, cache) that returns its update

# An update's factor. 'zero': first r = 0, so 1, for trained layers (p-MoD, Zhang et al., arXiv 2412.04449).
GATES = {'raposo': lambda r: r, 'zero': lambda r: 1 + 0.2 * r.tanh()}


class Route(NamedTuple):
    """Which tokens a routed layer processes."""
    index: Tensor           # (B, K) int64, ascending; here K counts the selected tokens and all words
    gate: Tensor            # (B, K) float32: factor of each one's update
    logits: Tensor          # (B, S) float32: the score of every token; a Router's without gradient
    mask: Tensor = None     # (B, K) bool: False at padding, where a sample selects fewer; None = all are real


def tokens_at(x: Tensor, index: Tensor):
    """x (B, S, ...) at index (B, K): (B, K, ...), and which rows of x.flatten(0, 1) these are."""
    row = (index + x.size(1) * torch.arange(x.size(0), device=x.device)[:, None]).flatten()   # (B*K,)
    return x.flatten(0, 1).index_select(0, row).view(*index.shape, *x.shape[2:]), row  # gather would keep x


class MoDBlock(nn.Module):
    """A layer whose block processes the routed tokens alone: x + gate * f(x) for them, x for the others."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, route: Route, position: Tensor, mask: Tensor = None, cache=None) -> Tensor:
        """x (B, S, C), position (S,) or (B, S), mask as of Attention, of all rows or the words -> (B, S, C).

        route None: every token. Else the block and its cache get the K tokens, at their own positions.
        """
        if route is None:
            return x + self.block(x, position, mask, cache)
        chosen, row = tokens_at(x, route.index)                                            # (B, K, C), (B*K,)
        place = None if position is None else position.expand(x.shape[:2]).gather(1, route.index)   # (B, K)
        update = self.update(chosen, route, place, mask_of(mask, route.index, x.size(1)), cache)
        return x.flatten(0, 1).index_add(0, row, update.to(x.dtype).flatten(0, 1)).view_as(x)

    def update(self, x: Tensor, route: Route, position: Tensor, mask: Tensor, cache) -> Tensor:
        """The gated update of the routed tokens x (B, K, C); K is 0 where a frame skips the layer."""
        return x if x.size(1) == 0 else route.gate[..., None] * self.block(x, position, mask, cache)


def mask_of(mask: Tensor, index: Tensor, S: int):
    """Mask (R, S) or (B, 1, R, S), of all S rows or the words, at tokens index (B, K): (B, 1, R or K, K)."""
    if mask is None:
        return None
    B, R, last = index.size(0), mask.size(-2), min(mask.size(-2), index.size(1))
    if R > S or mask.size(-1) != S or mask.numel() not in (R * S, B * R * S):
        raise ValueError(f'wanted a mask (R, {S}) or (B, 1, R, {S}), R at most {S}; got {tuple(mask.shape)}')
    sample, row = torch.arange(B, device=index.device)[:, None, None], index[:, -last:] - (S - R)
    return mask.reshape(-1, R, S).expand(B, R, S)[sample, row[..., None], index[:, None]][:, None]


class Router(nn.Module):
    """One linear score a token, r = w·x, computed in float32 whatever the compute dtype."""

    def __init__(self, dim: int, gate: str = 'raposo'):
        super().__init__()
        if gate not in GATES:
            raise ValueError(f'gate must be one of {", ".join(GATES)}, got {gate!r}')
        self.gate, width = gate, 0 if gate == 'zero' else 1 / math.sqrt(dim)
        self.weight = nn.Parameter(torch.empty(dim).uniform_(-width, width))   # (C,)

    def score(self, x: Tensor) -> Tensor:
        """x (B, S, C) -> (B, S)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return x.to(wide) @ self.weight.to(wide)             # matrix times vector: never in TF32

    def forward(self, x: Tensor, group: int, ratio: float, words: int = 0, forced: Tensor = None) -> Route:
        """Select the best k = `capacity(ratio, n)` of each run of n vision tokens; words always go through.

        x (B, S, C): `group` runs of vision tokens, equally long, then `words` of text. group = T: the best of
        each frame; group = 1: of the clip (a later token can push out an earlier one: offline use only).
        forced (N,) bool: selected whatever their score, within their run's k. Ties: the earlier token.
        """
        N = x.size(1) - words
        if isinstance(group, Tensor) or N % group:
            raise ValueError(f'{N} tokens do not divide into {group} groups of equal size; see RaggedRouter')
        with torch.no_grad():
            route = best_route(self.score(x), N, group, capacity(ratio, N // group), forced)
        chosen, _ = tokens_at(x, route.index[:, :route.index.size(1) - words]) # (B, group * k, C)
        gate = GATES[self.gate](self.score(chosen))            # the others get no gradient and no memory
        return Route(route.index, F.pad(gate, (0, words), value=1.0), route.logits)


def capacity(ratio: float, n: int) -> int:
    """How many of n tokens are processed: at least one; the epsilon keeps 0.07 * 100 at 7."""
    return max(1, math.ceil(ratio * n - 1e-9))


def best_route(score: Tensor, N: int, group: int, k: int, forced: Tensor = None) -> Route:
    """By score (B, S): the k best of each of `group` equal runs of N vision tokens; all words; gates 1."""
    vision, first = score.detach()[:, :N], torch.arange(group, device=score.device) * (N // group)
    vision = vision if forced is None else vision.masked_fill(forced, math.inf)
    rank = vision.unflatten(1, (group, -1)).argsort(dim=-1, descending=True, stable=True)  # (B, group, n)
    index = (rank[..., :k].sort(-1).values + first[:, None]).flatten(1)        # (B, group * k) ascending
    words = torch.arange(N, score.size(1), device=score.device).expand(score.size(0), -1)  # (B, words)
    index = torch.cat([index, words], 1)
    return Route(index, torch.ones_like(index, dtype=score.dtype), score)


def mod_layers(placement: str, depth: int) -> list:
    """Which of `depth` layers route, by the names of VideoLLM-MoD, table 2, or '1,2'. ValueError: others."""
    layers = {'none': [], 'interleaved': range(1, depth, 2), 'interleaved-deep': range(3, depth, 2),
              'all': range(depth), 'all-deep': range(2, depth)}
    if placement in layers:
        return list(layers[placement])
    chosen = [number.strip() for number in placement.split(',')]
    if not all(number.isdecimal() and int(number) < depth for number in chosen):
        raise ValueError(f'placement must be one of {", ".join(layers)}, or such as 1,2 of the {depth} '
                         f'layers from 0 on that may route; got {placement!r}')
    return sorted({int(number) for number in chosen})


class FrameRouting(nn.Module):
    """Each routed layer has a router, which selects the best of every frame. The base of other ways."""
    layer = MoDBlock       # what every decoder layer is
    whole_clip = False     # True: it looks at the whole clip, so a stream cannot have it
    ragged = False         # False: it wants all tokens of every frame
    last_layer = False     # True: the last layer may route even where no loss reads its vision tokens
    kind = Router          # what every router is
    loss = staticmethod(lambda routes: 0.0)    # what the routes of all layers add to the model's loss

    def __init__(self, dim: int, layers: list, keep_ratio: float, patches: int, streaming: bool = False, *,
                 gate: Annotated[str, 'factor of updates: raposo, the score; zero, one at first'] = 'raposo'):
        super().__init__()
        self.keep_ratio, self.patches, self.streaming = keep_ratio, patches, streaming
        self.routers = nn.ModuleDict({str(i): self.kind(dim, gate) for i in layers})

    def forward(self, i: int, block: nn.Module, x: Tensor, position: Tensor, N: int):
        """The Route of layer i for x (B, S, C), its first N tokens vision; None: all tokens go through."""
        if N == 0:                                                             # words alone
            return None
        forced = self.deciding(torch.arange(N, device=x.device))               # (N,) or None
        return self.routers[str(i)](x, N // self.patches, self.keep_ratio, x.size(1) - N, forced)

    def deciding(self, index: Tensor):
        """Which of index (N,) decide about speech, (N,) bool: the last of each frame; None: no stream."""
        return index % self.patches == self.patches - 1 if self.streaming else None


ROUTINGS['frame'] = FrameRouting      # section 7 puts one in its place that takes fewer tokens, too

# ---- 5. The model ------------------------------------------------------------------------------------------
# Vision tokens stand first, in time order; the questions of a clip follow, all starting at position N; they
# read vision and themselves, not each other. In a stream (VideoLLM-online, Chen et al., arXiv 2406.11816)
# text stands between frames, and at the last token of a frame the model predicts what it says then, or
# '<eos>', silence. Positions decide causality: a skipped token leaves a gap, no shift.
# needs sections 1 to 4

class Reducer(nn.Module):
    """Hands the decoder every vision token as it is. The base of methods that hand it fewer, or others."""
    by_question = False        # True: each question has vision tokens of its own; forward is given its words
    wants_saliency = False     # True: forward is given the attention of each patch, unless by_question
    untrained = True           # False: a trained dense model must first learn to read what it returns
    steady = True              # False: how many tokens it returns changes from batch to batch
    in_place = True            # False: its tokens stand for no patches, so no picture shows which are routed
    leaving = None             # or a function (share, T, P) -> options that leave this share of the tokens
    picture = staticmethod(lambda reduced: reduced.reduction)      # to draw; None: as `position` says
    facts = staticmethod(lambda info: {})      # what to report of the info of all clips: name -> number

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Tensor, saliency: Tensor = None, words: Tensor = None, known=None) -> Reduced:
        """x (B, T, P, C), saliency (B, T, P), words (B, L, C), known (B, L) bool: no padding -> a Reduced."""
        return Reduced(x.flatten(1, 2), torch.arange(x.size(1) * x.size(2), device=x.device))


REDUCERS['none'] = Reducer


def small_updates(model: nn.Module, n_layer: int):
    """A layer adds two updates; this size keeps their sum over n_layer layers below that of x."""
    for name, p in model.named_parameters():
        if name.endswith(('attention.out.weight', 'mlp.down.weight')):
            nn.init.normal_(p, std=0.5 / math.sqrt(2 * n_layer * p.size(1)))


class ModVideo(nn.Module):
    """Video and questions in, answers out; or a stream of frames in, and words when they matter."""

    def __init__(self, config: ModVideoConfig):
        super().__init__()
        self.config = c = config
        self.encoder = c.build('encoder', c.encoder_dim, c.encoder_layers, c.encoder_heads, c.patches,
                               c.patch_size, c.frames)
        self.projector = nn.Sequential(nn.Linear(c.encoder_dim, c.dim), nn.GELU(), nn.Linear(c.dim, c.dim))
        keep_scale(self.projector)
        self.embed = nn.Embedding(len(c.vocab), c.dim)
        self.reducer, self.stage = c.build('reducer', c.dim), c.build('stage', c.n_layer)
        routing = ROUTINGS[c.routing]
        last = c.streaming or routing.last_layer       # else no loss reads vision there: no router learns
        self.mod_layers = mod_layers(c.placement, c.n_layer - (0 if last else 1))
        self.blocks = nn.ModuleList(routing.layer(Block(c.dim, c.n_head)) for _ in range(c.n_layer))
        self.routing = c.build('routing', c.dim, self.mod_layers, c.keep_ratio, c.patches, c.streaming)
        self.final_norm = nn.LayerNorm(c.dim, bias=False)
        self.head = nn.Linear(c.dim, len(c.vocab), bias=False)
        small_updates(self, c.n_layer)
        self.by_question = self.reducer.by_question or self.stage is not None  # a question has its own vision

    def encode_video(self, video: Tensor, previous: Tensor = None, question: Tensor = None) -> Reduced:
        """video (B, T, 3, height, width) float -> the vision tokens that the decoder is given.

        previous (B, 1, 3, height, width): the frame before, None at the beginning. question (B * Q, L) int64:
        if vision depends on it, tokens and positions have B * Q rows.
        """
        size, (B, T) = self.config.frame_size, video.shape[:2]
        if video.shape[2:] != (3, size, size) or not video.numel() or not video.is_floating_point():
            raise ValueError(f'video must be (B, T, 3, {size}, {size}), float in [0, 1], '
                             f'got {tuple(video.shape)}, {video.dtype}')
        again = len(question) // B if self.by_question else 1                  # questions of each clip
        encoded = self.encoder(video, previous, self.reducer.wants_saliency)
        x = self.projector(encoded.tokens).to(self.embed.weight.dtype)     # as text; (B*T, P, C) or (B, M, C)
        if not (self.training or torch.compiler.is_compiling() or x.isfinite().all()):
            raise ValueError('vision tokens are not finite: NaN or infinite numbers in the video, or weights')
        if encoded.position is not None:                                       # the encoder merged already
            reduced = encoded._replace(tokens=x)
        elif self.reducer.by_question:                                         # B becomes B * Q
            x = x.view(B, T, -1, x.size(-1)).repeat_interleave(again, 0)       # (B*Q, T, P, C)
            reduced, again = self.reducer(x, None, self.embed(question), question != PAD), 1
        else:
            saliency = encoded.info['saliency'].view(B, T, -1) if self.reducer.wants_saliency else None
            reduced = self.reducer(x.view(B, T, -1, x.size(-1)), saliency)
        tokens, place = reduced.tokens.to(x.dtype), reduced.position
        if self.stage is not None or place.size(-1) != T * self.config.patches:            # some are gone
            tokens, place = (a.repeat_interleave(again, 0) for a in (tokens, place.expand(tokens.shape[:2])))
        return reduced._replace(tokens=tokens, position=place)                 # of B or B*Q clips

    def forward(self, video: Tensor, text: Tensor, targets: Tensor = None, asked: Tensor = None,
                after: Tensor = None, decisions: Tensor = None):
        """Predict the next word at every place of every question.

        video (B, T, 3, height, width) float, text, targets (B, Q, L) int64, -1 where nothing is to learn ->
        logits (B, Q, L, V), loss (mean cross-entropy and the methods' own, or None), aux: 'routes' by layer,
        'tokens' each layer processed, 'position', 'reduced', 'stage' (Reduced), 'routing_loss'. asked (B, Q):
        words of each question without its answer, None: all. Streams: after (B, L): see place_stream;
        decisions (B, T), needed with targets: what follows each frame; aux['decisions'] (B, T, V): logits.
        """
        c, shape, T, L = self.config, text.shape, video.size(1), text.size(-1)
        if len(shape) != 3 or shape[0] != video.size(0) or not text.numel() or c.streaming and shape[1] > 1:
            raise ValueError(f'text must be (B, Q, L) with a word at least, got {tuple(shape)}; a stream has '
                             'one line of text')
        asked = (text != PAD).sum(-1) if asked is None else asked              # (B, Q)
        if self.by_question:            # every question becomes a clip: from here on B is B * Q, and Q is 1
            text, asked = text.reshape(-1, 1, L), asked.reshape(-1, 1)
        known = torch.arange(L, device=text.device) < asked.reshape(-1, 1)     # (B*Q, L) without the answer
        reduced = self.encode_video(video, question=text.flatten(0, 1).where(known, PAD))
        M, place = reduced.tokens.size(1), reduced.position                    # (B, M) or (M,)
        x = torch.cat([reduced.tokens, self.embed(text).flatten(1, 2)], 1)     # (B, M + Q*L, C)
        arrange = self.place_stream if c.streaming else self.place_questions
        position, mask = arrange(place, text, T, after)                        # of S = M + Q*L tokens
        x, aux = self.decode(x, position, M, mask, last=M - 1 + asked[:, 0])   # with a stage Q is 1
        aux.update(position=position, reduced=reduced)
        scores, wanted, weight = self.next_word(x[:, -text[0].numel():]), targets, 1.0         # (B, Q*L, V)
        logits = scores.view(*shape, -1)
        if c.streaming:
            aux['decisions'] = self.next_word(x[:, c.patches - 1:M:c.patches]) # (B, T, V)
        if targets is None:
            return logits, None, aux
        if c.streaming:
            scores = torch.cat([aux['decisions'], scores], 1)                  # (B, T + L, V)
            wanted = torch.cat([decisions, targets[:, 0]], 1)                  # (B, T + L)
            weight = torch.where(F.pad(decisions == EOS, (0, L)), c.silence_weight, 1.0).flatten()
        each = F.cross_entropy(scores.flatten(0, 1), wanted.flatten(), ignore_index=IGNORE, reduction='none')
        loss = (each * weight).sum() / (wanted != IGNORE).sum().clamp(min=1)   # 0 if nothing is to learn
        return logits, loss + reduced.loss + aux['routing_loss'], aux

    def place_questions(self, place: Tensor, text: Tensor, T: int, after=None):
        """Vision at place (M,) or (B, M), text (B, Q, L) -> position; mask, who sees whom, None: the past."""
        (_, Q, L), M, device = text.shape, place.size(-1), text.device
        word = T * self.config.patches + torch.arange(L, device=device).repeat(Q)  # (Q*L,) all start alike
        position = torch.cat([place, word.expand(*place.shape[:-1], -1)], -1)      # (S,) or (B, S)
        if Q == 1 and place.dim() == 1:
            return position, None                                              # plainly causal
        owner, all_places = torch.arange(-M, Q * L, device=device) // L, position.view(-1, M + Q * L)
        first = M if place.dim() == 1 else 0             # whole frames are plainly causal: no mask for them
        same = (owner < 0) | (owner == owner[first:, None])    # (R, S); owner (S,): question, or < 0: vision
        return position, visible(all_places[:, first:], all_places) & same     # (1 or B, 1, R, S)

    def place_stream(self, place: Tensor, text: Tensor, T: int, after: Tensor = None):
        """The same for a stream: text (B, 1, L) stands between frames, and a window forgets the earlier ones.

        after (B, L): the frame after which each word stands, ascending, -1: before the video; None: the last.
        """
        text, P, device = text[:, 0], self.config.patches, text.device
        after, real = torch.full_like(text, T - 1) if after is None else after, text != PAD    # (B, L)
        earlier = after[:, None] < torch.arange(T, device=device)[:, None]     # (B, T, L)
        before = (real[:, None] & earlier).sum(-1)                             # (B, T) words before a frame
        word = torch.arange(text.size(1), device=device) + P * (after + 1)     # (B, L)
        position = torch.cat([place + before.repeat_interleave(P, 1), word.where(real, NEVER)], 1)  # (B, S)
        mask = visible(position)                                               # (B, 1, S, S)
        if self.config.window:                         # the prompt stays, as if it stood after all frames
            frame = torch.cat([(place // P).expand(len(text), -1), after.where(after >= 0, T)], 1)   # (B, S)
            mask = mask & (frame[:, None, None] > frame[:, None, :, None] - self.config.window)
        return position, mask

    def decode(self, x: Tensor, position: Tensor, N: int, mask: Tensor = None, caches: list = None,
               last: Tensor = None):
        """All layers on x (B, S, C), its first N tokens vision (M at first, fewer after a stage) -> x, aux.
        last (B,): place in x of each question's last word, for a stage."""
        aux, before, mask = {'routes': {}, 'tokens': []}, x, additive(mask, x)     # once for all layers
        for i, layer in enumerate(self.blocks):
            if self.stage is not None and N and i == self.stage.layer:
                x, position, N, aux['stage'] = self.stage.run(
                    self.blocks[i - 1].block, before, x, position, N, last)
                mask = additive(visible(position), x)
            route = self.routing(i, layer.block, x, position, N) if i in self.mod_layers else None
            before, x = x, layer(x, route, position, mask, caches[i] if caches else None)
            aux['tokens'].append(x.size(1) if route is None else route.index.size(1))
            if route is not None:
                aux['routes'][i] = route
        aux['routing_loss'] = self.routing.loss([*aux['routes'].values()])
        return x, aux

    def next_word(self, x: Tensor) -> Tensor:
        """States (..., C) -> logits of the word that follows each, (..., V) float32."""
        return self.head(self.final_norm(x)).float()

    def read_words(self, words: Tensor, position: Tensor, caches: list, vision: Reduced = None):
        """Read words (B, L) int64, padded with 0 at the end, from `position` (B, 1) on, into the caches.

        vision: read before them, in one go. -> the last word's state (B, 1, C), the next position (B, 1).
        """
        real, x, N, mask = words != PAD, self.embed(words), 0, None            # (B, L), (B, L, C)
        place = torch.where(real, position + torch.arange(words.size(1), device=words.device), NEVER)
        count = real.sum(1, keepdim=True)                                      # (B, 1)
        if vision is not None:
            x, place = torch.cat([vision.tokens, x], 1), torch.cat([vision.position, place], 1)
            N, mask = vision.tokens.size(1), visible(place)
        x, _ = self.decode(x, place, N, mask, caches, N - 1 + count[:, 0])
        return x[:, -words.size(1):].take_along_dim((count - 1).clamp(min=0)[..., None], 1), position + count

    def speak(self, state: Tensor, position: Tensor, caches: list, most: int, ended: Tensor, must=False):
        """Say the most probable next word, again and again, to the end mark or `most`; caches get them, too.

        state (B, 1, C): of the last token read. ended (B, 1) bool: samples that say nothing. must: the others
        say a word at least. -> said (B, n) int64, 0 after the end; the next position (B, 1).
        """
        said = [ended[:, :0].long()]
        while len(said) <= most and not bool(ended.all()):                     # waits for the device
            logits = self.next_word(state)                                     # (B, 1, V)
            if must and len(said) == 1:
                logits[..., [PAD, EOS]] = -math.inf
            said.append(logits.argmax(-1).masked_fill(ended, PAD))             # (B, 1)
            ended = (said[-1] == EOS) | (said[-1] == PAD)
            state, position = self.read_words(said[-1], position, caches)
        return torch.cat(said, 1), position

    @torch.no_grad()
    def generate(self, video: Tensor, text: Tensor, max_new_tokens: int) -> Tensor:
        """Greedy answers, in eval mode: text (B, Q, L) -> (B, Q, max_new_tokens); 0 pads both at the end."""
        if text.dim() != 3 or len(text) != len(video) or not text.numel():
            raise ValueError(f'wanted text (B, Q, L) with words for {len(video)} clips, got {text.shape}')
        (B, Q, _), caches, words = text.shape, [KVCache() for _ in self.blocks], text.flatten(0, 1)
        start = torch.full_like(words[:, :1], video.size(1) * self.config.patches)         # (B*Q, 1)
        reduced = self.encode_video(video, question=words)
        if self.stage is None:               # read once: its keys and values serve every question of a clip
            place = reduced.position                           # two may share a position: no plain past
            mask = visible(place) if place.dim() == 2 else None
            self.decode(reduced.tokens, place, reduced.tokens.size(1), mask, caches)
        state, position = self.read_words(words, start, caches, None if self.stage is None else reduced)
        answer, _ = self.speak(state, position, caches, max_new_tokens, (words == PAD).all(1, keepdim=True))
        return F.pad(answer, (0, max_new_tokens - answer.size(1)), value=PAD).view(B, Q, -1)

    @torch.no_grad()
    def stream(self, frames, prompt: Tensor = None, theta: float = 0.5, max_new_tokens: int = 16):
        """Watch frames as they come; speak, or stay silent while P(silence) is at least theta.

        frames: any iterable of (frame (B, 3, height, width), question (B, L) int64 or None), asked after it;
        prompt (B, L): read first; 0 pads words. Yields a dict a frame: 'silence' (B,), its probability, ids
        'said' and 'answer' (B, n), or None, 'held', the keys of each layer. With config.window = W all but
        the prompt and the last W frames is forgotten: memory stays level.
        """
        if not self.config.streaming:
            raise ValueError('this model was not made for streams; wanted config.streaming = True')
        P, W, caches = self.config.patches, self.config.window, [KVCache() for _ in self.blocks]
        previous, starts = None, []                    # starts: (B, 1) each, where the frames begin
        for frame, question in frames:
            if previous is None:
                prompt = frame.new_zeros(len(frame), 1, dtype=torch.long) if prompt is None else prompt
                position = prompt_end = self.read_words(prompt, torch.zeros_like(prompt[:, :1]), caches)[1]
            starts = [*starts, position][-W:] if W else []   # of the last W frames, which stay
            for cache in caches if W else ():
                cache.trim(lambda place: (place < prompt_end) | (place >= starts[0]))
            vision = self.encode_video(frame[:, None], previous)
            x, _ = self.decode(vision.tokens, position + vision.position, P, caches=caches)
            previous, position = frame[:, None], position + P
            silence, said, answer = self.next_word(x[:, -1]).softmax(-1)[:, EOS], None, None   # (B,)
            if bool((silence < theta).any()):
                quiet = silence[:, None] >= theta
                said, position = self.speak(x[:, -1:], position, caches, max_new_tokens, quiet, must=True)
            if question is not None:
                state, position = self.read_words(question, position, caches)
                quiet = (question == PAD).all(1, keepdim=True)
                answer, position = self.speak(state, position, caches, max_new_tokens, quiet)
            held = [0 if cache.k is None else cache.k.size(2) for cache in caches]
            yield dict(silence=silence, said=said, answer=answer, held=held)


MODELS['modvideo'] = ModVideo

# ---- 6. Save and load --------------------------------------------------------------------------------------
# Checkpoints hold tensors and plain values: loading cannot run code.
# needs sections 1 to 5

def save_checkpoint(path, model: nn.Module, **extra):
    """Write model, config, `extra` (tensors, numbers, strings, lists, dicts), whole or not at all.

    ValueError: it could not be read again, as it holds something else. OSError: the disk is full, and such.
    """
    model, data = getattr(model, '_orig_mod', model), io.BytesIO()             # of torch.compile
    try:
        torch.save(dict(config=asdict(model.config), model=model.state_dict(), **extra), data)
        torch.load(io.BytesIO(data.getvalue()), map_location='meta', weights_only=True)
    except Exception as error:
        raise ValueError(f'{path} is not written: {reason_of(error)}') from None
    part = Path(f'{path}.part{os.getpid()}')                                   # of this process alone
    try:
        part.write_bytes(data.getvalue())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def reason_of(error: Exception) -> str:
    """What an error of torch says, in one line, without the control characters that files smuggle in."""
    if isinstance(error, pickle.PickleError):
        return 'there is more than tensors, numbers, strings, lists and dicts in it'
    return ascii((' '.join(str(error).split()) or type(error).__name__)[:160])[1:-1]


def load_checkpoint(path, device='cpu'):
    """Read what save_checkpoint wrote -> model in eval mode, extra (on the CPU). ValueError: another file."""
    content = Path(path).read_bytes()
    try:
        if damaged := zipfile.ZipFile(io.BytesIO(content)).testzip():          # torch checks no sums
            raise ValueError(f'{damaged} is damaged')
        data = torch.load(io.BytesIO(content), map_location='cpu', weights_only=True)
        config, weights = ModVideoConfig(**data.pop('config')), data.pop('model')
        model = config.build('model', config).to(weights['embed.weight'].dtype)
        model.load_state_dict(weights)
    except Exception as error:      # torch.load raises a dozen types for a damaged file
        raise ValueError(f'{path} is not a checkpoint of this version of the model: '
                         f'{reason_of(error)}') from None
    return model.to(device).eval(), data


# ==== the core ends here ====================================================================================
# Everything above runs without anything below. Each section below can be deleted, with those that need it.

# ---- 7. Token reduction ------------------------------------------------------------------------------------
# Pruning, merging, clustering, quantizing are one act: a token goes to one output slot with a weight, or is
# dropped. A method decides, as a `Reduction`; `reduce_tokens` does it. Three baselines show how little a
# reducer needs; Gaps trains a model to read what is left; a router for frames that lost tokens follows.
# needs sections 1, 2, 4, 5

class Reduction(NamedTuple):
    """Where each of N tokens goes. Padding is last; slots ascend by position where nothing else is said."""
    assign: Tensor      # (B, N) int64: output slot of each input token; -1 = dropped
    weight: Tensor      # (B, N) float32: its share of that slot; the shares of a slot sum to 1
    position: Tensor    # (B, M) int64: the input index at which the slot stands; N for padding
    mask: Tensor        # (B, M) bool: False where a sample has fewer slots than the longest of its batch


@contextlib.contextmanager
def exact(grad: bool = False):
    """Switches off autocast, TF32 and, unless grad=True, gradients, so that choices are made in float32.

    A compiled graph drops such switches: inside torch.compile TF32 stays as the program has set it.
    """
    matmul, eager = torch.backends.cuda.matmul, not torch.compiler.is_compiling()
    before = matmul.fp32_precision if eager else None
    try:
        if eager:
            matmul.fp32_precision = 'ieee'
        off = lambda kind: torch.autocast(kind, enabled=False)
        with off('cpu'), off('cuda'), off('mps'), torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            yield
    finally:
        if eager:
            matmul.fp32_precision = before


def precise(x: Tensor) -> Tensor:
    """float64, so that ratios round as they do in Python; Apple's GPUs have float32 at most."""
    return x.float() if x.device.type == 'mps' else x.double()


def unit(x: Tensor) -> Tensor:
    """Vectors of length one, in float32; zero stays zero."""
    return F.normalize(x.float(), dim=-1, eps=1e-6)


def hashed(x: Tensor) -> Tensor:
    """Whole numbers (int64, not negative) -> as if drawn at random from 0 to 2**32 - 1."""
    x = (x + 1) * 1000003 % 2 ** 32
    for _ in range(2):                         # mix the bits of 32-bit numbers; products fit 63 bits
        x = ((x ^ (x >> 15)) * 1103515245 + 12345) % 2 ** 32
    return x


def chances(index: Tensor) -> Tensor:
    """Whole numbers, not negative -> float32, as if drawn evenly from (0, 1): the same on every device."""
    return ((hashed(index) >> 9).float() + 0.5) / 2 ** 23


def best_of(score: Tensor, count, among: Tensor) -> Tensor:
    """(..., n) bool: the `count` highest of score (..., n) where `among` is True. Ties: the earlier one."""
    score = score.float().clamp(min=-3e38).masked_fill(~among, -math.inf)      # a score may be -inf, too
    return among & (score.argsort(dim=-1, descending=True, stable=True).argsort(-1) < count)


def slot_sums(x: Tensor, assign: Tensor, M: int) -> Tensor:
    """What each of M slots gets, summed: x (B, N[, C]), assign (B, N), -1 or M: no slot -> (B, M[, C])."""
    row = assign % (M + 1) + (M + 1) * torch.arange(x.size(0), device=x.device)[:, None]   # (B, N) in table
    table = x.new_zeros(x.size(0) * (M + 1), *x.shape[2:])
    return table.index_add(0, row.flatten(), x.flatten(0, 1)).unflatten(0, (-1, M + 1))[:, :M]


def look_up(table: Tensor, index: Tensor, missing) -> Tensor:
    """table (B, K) or (B, K, C) at index (B, N) -> (B, N) or (B, N, C); `missing` at -1 and at K."""
    padded = F.pad(table, [0, 0] * (table.dim() - 2) + [0, 1], value=missing)  # (B, K + 1) or (B, K + 1, C)
    return tokens_at(padded, index % padded.size(1))[0]


def first_members(assign: Tensor, K: int) -> Tensor:
    """assign (B, N), -1 = none -> (B, K): the first token of each of K slots, N where it has none."""
    B, N = assign.shape
    table = torch.full((B, K + 1), N, device=assign.device)
    index = torch.arange(N, device=assign.device).expand(B, N)
    return table.scatter_reduce(1, assign % (K + 1), index, 'amin')[:, :K]


def reduce_tokens(x: Tensor, reduction: Reduction) -> Tensor:
    """Weighted sum of each slot's tokens, in float32 at least: x (B, N, C) -> (B, M, C); padding is zero."""
    rows = x.to(torch.promote_types(x.dtype, torch.float)) * reduction.weight[..., None]   # (B, N, C)
    return slot_sums(rows, reduction.assign, reduction.position.size(1)).to(x.dtype)


def expand(y: Tensor, reduction: Reduction) -> Tensor:
    """Un-merge y (B, M, C) -> (B, N, C): a copy of its slot for each token, zeros for dropped."""
    return look_up(y, reduction.assign, 0)


def compose(first: Reduction, second: Reduction) -> Reduction:
    """One reduction that does `first` (N -> M1), then `second` (M1 -> M2)."""
    assign = look_up(second.assign, first.assign, -1)                          # (B, N)
    weight = first.weight * look_up(second.weight, first.assign, 0)            # (B, N)
    position = look_up(first.position, second.position, first.assign.size(1))  # (B, M2)
    return Reduction(assign, weight, position, second.mask)


def from_clusters(assign: Tensor, num_clusters: int) -> Reduction:
    """Each cluster's mean, in order of first members: assign (B, N) int64 below num_clusters, -1 = none."""
    position, order = first_members(assign, num_clusters).sort(dim=1, stable=True)     # (B, K) empty last
    return mean_of(look_up(order.argsort(1), assign, -1), position)


def mean_of(assign: Tensor, position: Tensor, size: Tensor = None) -> Reduction:
    """Slots that are the mean of their members: assign (B, N), position (B, M), N at padding; size (B, N):
    how many tokens a member stands for, None = one."""
    size = torch.ones_like(assign, dtype=torch.float) if size is None else size.float()
    total = look_up(slot_sums(size, assign, position.size(1)), assign, math.inf)           # (B, N)
    return Reduction(assign, size / total.clamp(min=1e-30), position, position < assign.size(1))


def pack(keep: Tensor, M: int = None) -> Reduction:
    """Keep some tokens, drop the others: keep (B, N) bool. M: the most that a sample keeps, if known."""
    N, M = keep.size(1), int(keep.sum(1).max()) if M is None else M
    assign = torch.where(keep, keep.cumsum(1) - 1, -1)                         # (B, N)
    position = first_members(assign, M)                                        # (B, M)
    return Reduction(assign, keep.float(), position, position < N)


def reduced_by(x: Tensor, reduction: Reduction) -> Reduced:
    """What a reducer returns that turns tokens x (B, T, P, C) into the slots of a reduction."""
    position = torch.where(reduction.mask, reduction.position, NEVER)          # (B, M)
    return Reduced(reduce_tokens(x.flatten(1, 2), reduction), position, reduction)


class Budgeted(Reducer):
    """The base of reducers that are told how many tokens may stay."""
    leaving = staticmethod(lambda share, T, P: dict(budget=max(1, round(share * T * P))))

    def __init__(self, dim: int, *,
                 budget: Annotated[int, 'the most vision tokens of a clip, 0 = a quarter'] = 0):
        super().__init__(dim)
        if budget < 0:
            raise ValueError(f'budget must be at least 1, or 0 for a quarter of them, got {budget}')
        self.budget = budget

    def most(self, x: Tensor) -> int:
        """The most tokens of a clip of x (B, T, P, C)."""
        N = x.size(1) * x.size(2)
        return min(N, self.budget) or max(1, N // 4)


class Uniform(Budgeted):
    """Whole frames, the middles of n equal parts of the clip. ValueError: the budget holds no frame."""
    leaving = staticmethod(lambda share, T, P: dict(budget=P * max(1, round(share * T))))

    def forward(self, x, saliency=None, words=None, known=None) -> Reduced:
        T, P = x.shape[1:3]
        n = min(T, self.most(x) // P)
        if n < 1:
            raise ValueError(f'a budget of {self.most(x)} tokens holds no frame of {P}')
        frame = (torch.arange(n, device=x.device) * 2 + 1) * T // (2 * n)      # (n,)
        position = torch.arange(T * P, device=x.device).view(T, P)[frame].flatten()        # (n * P,)
        return Reduced(x[:, frame].flatten(1, 2), position)


class Prune(Budgeted):
    """The most looked-at tokens of the clip."""
    wants_saliency = True

    def forward(self, x, saliency=None, words=None, known=None) -> Reduced:
        order = saliency.flatten(1).argsort(dim=1, descending=True, stable=True)       # (B, N)
        position = order[:, :self.most(x)].sort(dim=1).values                  # (B, M)
        return Reduced(tokens_at(x.flatten(1, 2), position)[0], position)


class Pool(Budgeted):
    """Means over a grid of time and space: its cells are the same in every clip."""

    def forward(self, x, saliency=None, words=None, known=None) -> Reduced:
        return pool(x, self.most(x))


def pool(x: Tensor, budget: int, b: int = None) -> Reduced:
    """Means over the cells of a grid, b to a side of the frame (None: such that most cells fit), and in time
    as many as the budget allows: x (B, T, P, C) -> tokens (B, M, C)."""
    T, P = x.shape[1:3]
    b = b or max(range(1, math.isqrt(P) + 1), key=lambda b: (min(T, budget // b ** 2) * b * b, -b))
    a = min(T, budget // b ** 2)
    return reduced_by(x, from_clusters(grid_cells(T, P, a, b, x.device).expand(x.size(0), -1), a * b * b))


def grid_cells(T: int, P: int, a: int, b: int, device) -> Tensor:
    """(T * P,) int64: which of a * b * b equal cells of time, height and width each patch is in."""
    side = math.isqrt(P)
    if side ** 2 != P:                                         # or a summary token is among them
        raise ValueError(f'wanted frames of a square grid of patches, such as 8 x 8, got {P} patches')
    time, place = (torch.arange(n, device=device) * m // n for n, m in ((T, a), (side, b)))
    return ((time[:, None, None] * b + place[:, None]) * b + place).flatten()


class Gaps(Reducer):
    """Every token; but in training most batches lose some, so that the model learns to read what is left.

    Patches (PatchDropout, Liu et al., arXiv 2208.07220), what repeats the frame before (after Run-Length
    Tokenization, Choudhury et al., arXiv 2411.05222), whole frames, or detail: means over a coarse grid of
    time or space. Large models learn the same from images and from clips of every length.
    """
    steady = False

    def __init__(self, dim: int, *,
                 gaps: Annotated[float, 'share of the training batches that lose tokens'] = 0.9,
                 least: Annotated[float, 'share of the tokens that a gap leaves at least, rounded to frames '
                                  'and grids; half of the gaps leave less than its square root'] = 0.05):
        super().__init__(dim)
        if not 0 <= gaps <= 1 or not 0 < least <= 1:
            raise ValueError(f'gaps must be from 0 to 1, least above 0 and at most 1, got {gaps} and {least}')
        self.gaps, self.least = gaps, least
        self.register_buffer('calls', torch.zeros((), dtype=torch.long, device='cpu'))   # seeds what is lost

    def _apply(self, fn, *args, **more):
        return self                                            # the counter stays on the host: nothing waits

    def forward(self, x, saliency=None, words=None, known=None) -> Reduced:
        if not self.training:
            return super().forward(x)
        self.calls += not ModuleTracker().is_bw          # not in backward, where checkpointing repeats a call
        generator, (_, T, P, _) = torch.Generator().manual_seed(int(self.calls)), x.shape
        rand = lambda n: torch.rand(n, generator=generator, device='cpu', dtype=torch.float)
        luck, share, kind, finer = rand(4).tolist()
        if luck >= self.gaps:
            return super().forward(x)
        n, kind = math.ceil(self.least ** share * T * P), int(4 * kind)
        if kind == 0:                                          # detail: from all of time to all of space
            finest = math.isqrt(min(n, P))                     # cells to a side of the frame
            coarsest = min(finest, math.ceil((n / T) ** 0.5))
            return pool(x, n, coarsest + int(finer * (finest + 1 - coarsest)))
        group = P if kind == 1 else 1                                          # whole frames, or patches
        score = rand(T * P // group).repeat_interleave(group)                  # (N,)
        score = score.to(x.device, non_blocking=x.is_cuda)
        if kind == 3:  # chances grow with the change since the frame before (Efraimidis & Spirakis, 2006)
            change = (x - F.pad(x, (0, 0, 0, 0, 1, 0))[:, :-1]).detach().float().norm(dim=-1)  # (B, T, P)
            score = score.log() / change.flatten(1).clamp(min=1e-6)            # (B, N)
        position = score.topk(max(1, n // group) * group).indices.sort().values        # (M,) or (B, M)
        return Reduced(tokens_at(x.flatten(1, 2), position.expand(x.size(0), -1))[0], position)


class RaggedRouter(Router):
    """A Router for vision tokens that stand anywhere, in frames of unequal numbers."""

    def forward(self, x: Tensor, group, ratio: float, words: int = 0, forced: Tensor = None,
                most: int = None) -> Route:
        """x (B, S, C), group (S,) or (B, S): frame of each token, -1 = a word, -2 = padding; or an int.

        forced (S,), of words too. most: K, if it is known; else the host waits for the device: K is data.
        """
        if not isinstance(group, Tensor):
            return super().forward(x, group, ratio, words, forced)
        logits, frame = self.score(x), group.expand(x.shape[:2])               # (B, S) each
        order = logits.detach() if forced is None else logits.detach().masked_fill(forced, math.inf)
        order = order.argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, frame.gather(1, order).argsort(dim=1, stable=True))    # by frame, then score
        home = frame.gather(1, order).contiguous()                             # (B, S) ascending
        first = torch.searchsorted(home, home)                                 # (B, S) where its frame begins
        count = torch.searchsorted(home, home, right=True) - first             # (B, S) tokens of its frame
        place = torch.arange(x.size(1), device=x.device) - first            # (B, S) 0 = the best of its frame
        best = place < (ratio * precise(count) - 1e-9).ceil().clamp(min=1)
        kept = pack(best.gather(1, order.argsort(1)) & (frame > -2) | (frame == -1), most)
        text = look_up(frame, kept.position, -2) == -1                         # (B, K)
        gate = GATES[self.gate](look_up(logits, kept.position, 0)).masked_fill(text, 1.0) * kept.mask
        index = kept.position.clamp(max=x.size(1) - 1)                         # (B, K)
        return Route(index, gate, logits.masked_fill(frame == -2, -math.inf), kept.mask)


class RaggedBlock(MoDBlock):
    """A MoDBlock that takes the routes of a RaggedRouter: padding is seen by none and changes nothing.

    mask None: each token sees the past. An encoder's sees all: give torch.ones(S, S, dtype=torch.bool).
    """

    def update(self, x: Tensor, route: Route, position: Tensor, mask: Tensor, cache) -> Tensor:
        if route.mask is not None:
            eye = torch.eye(x.size(1), dtype=torch.bool, device=x.device)
            mask = torch.ones_like(eye).tril() if mask is None else mask
            if mask.size(-2) < x.size(1):
                raise ValueError(f'wanted a mask of all {x.size(1)} rows, got {mask.size(-2)}')
            least = torch.finfo(mask.dtype).min if mask.is_floating_point() else False
            mask = mask.where(route.mask[:, None, None] | eye, least)  # (B, 1, K, K); an empty row gives NaN
            if cache is not None and position is not None:
                position = torch.where(route.mask, position, NEVER)            # no later query sees padding
        return super().update(x, route, position, mask, cache)


class RaggedRouting(FrameRouting):
    """FrameRouting that also takes clips whose frames have unequal numbers of tokens left."""
    layer, kind, ragged = RaggedBlock, RaggedRouter, True
    seen = None, None, None     # of the last call: position, (N, keep_ratio), the K that these gave

    def forward(self, i: int, block: nn.Module, x: Tensor, position: Tensor, N: int):
        if N == 0 or self.streaming or position.dim() == 1:                    # words alone, or whole frames
            return super().forward(i, block, x, position, N)
        frame = torch.where(position < NEVER, position // self.patches, -2)[:, :N]     # (B, N)
        frame, (place, same, most) = F.pad(frame, (0, x.size(1) - N), value=-1), self.seen     # (B, S)
        most = most if place is position and same == (N, self.keep_ratio) else None
        route = self.routers[str(i)](x, frame, self.keep_ratio, most=most)
        self.seen = position, (N, self.keep_ratio), route.index.size(1)
        return route


REDUCERS.update(gaps=Gaps, uniform=Uniform, prune=Prune, pool=Pool)
ROUTINGS['frame'] = RaggedRouting        # in the place of FrameRouting, which it extends

# ---- 8. ToMe -----------------------------------------------------------------------------------------------
# Which tokens say the same? Merging in pairs (Bolya et al., arXiv 2210.09461): half of the tokens look for
# the most similar one in the other half, and the best pairs become one token.
# needs sections 1, 2, 4, 5, 7

@exact()
def bipartite_soft_matching(metric: Tensor, r: int, protected: int = 0, size: Tensor = None,
                            pairing='parity') -> Reduction:
    """ToMe: merge the r sources that resemble a destination most, at most half: N tokens -> N - r.

    metric (B, N, C); the first `protected` tokens never merge. pairing: 'parity', even places are sources,
    odd ones destinations; or the places of both (A,), (D,). size (B, N): what tokens stand for already.
    Slots: protected, sources that stay, destinations.
    """
    (B, N, _), device = metric.shape, metric.device
    if pairing == 'parity':
        place = torch.arange(N, device=device)[protected:]
        pairing = place[protected % 2::2], place[1 - protected % 2::2]
    (sources, targets), every = pairing, torch.ones(B, N, dtype=torch.bool, device=device)     # (A,), (D,)
    r = min(r, len(sources), (N - protected) // 2)
    if r <= 0 or not len(targets):                                             # nothing to merge
        return pack(every, N)
    u = unit(metric)
    ends = u[:, targets].mT                                                    # (B, C, D)
    found = [(some @ ends).max(-1) for some in u[:, sources].split(1024, 1)]   # all at once would be N² / 4
    best, choice = (torch.cat(a, 1) for a in zip(*found))                    # (B, A) the most similar target
    gone = best_of(best, r, every[:, sources])                                 # (B, A) sources that merge
    stays = every.index_copy(1, sources, ~gone)                              # (B, N) with a slot of their own
    front = torch.cat([torch.arange(protected, device=device), sources, targets])      # (N,) in slot order
    slot = (stays[:, front].cumsum(1) - 1)[:, front.argsort()].where(stays, -1)        # (B, N)
    joined = torch.where(gone, slot[:, targets].gather(1, choice), slot[:, sources])   # (B, A)
    return mean_of(slot.index_copy(1, sources, joined), first_members(slot, N - r), size)


def merge_tokens(x: Tensor, size, metric: Tensor, r: int, protected: int, pairing='parity', slot=None):
    """ToMe on x (B, n, C), tokens that stand for size (B, n), None = one each -> x, size, slot.

    slot (B, N): which of the n tokens each of N earlier ones is part of, None: the n are the earlier ones;
    returned for the new tokens (r = 0: as given).
    """
    if r == 0:
        return x, size, slot
    step = bipartite_soft_matching(metric, r, protected, size, pairing)
    size = torch.ones_like(step.weight) if size is None else size.float()
    slot = step.assign if slot is None else step.assign.gather(1, slot)
    return reduce_tokens(x, step), slot_sums(size, step.assign, step.position.size(1)), slot


@torch.no_grad()
def tome(x: Tensor, budget: int) -> Reduction:
    """ToMe until `budget` of x (B, N, C) remain: rounds in which at most half of the tokens merge."""
    if budget < 1:
        raise ValueError(f'a budget of {budget} tokens is none; wanted at least 1')
    size, slot = None, torch.arange(x.size(1), device=x.device).expand(x.size(0), -1)      # (B, N)
    while x.size(1) > budget:
        x, size, slot = merge_tokens(x, size, x, x.size(1) - budget, 0, slot=slot)
    return from_clusters(slot, x.size(1))


class ToMe(Budgeted):
    """Tokens of the clip merged in pairs, in rounds, until the budget is met."""

    def forward(self, x, saliency=None, words=None, known=None) -> Reduced:
        return reduced_by(x, tome(x.flatten(1, 2), self.most(x)))


REDUCERS['tome'] = ToMe

# ---- 9. HoliTom --------------------------------------------------------------------------------------------
# Merge what stands still, keep what is looked at, without training (Shao et al., arXiv 2505.21334). Dynamic
# programming finds segments of still patches, each patch becomes one token, and density peaks (DPC-KNN, Du et
# al., 2016) thin those out. A `Stage` acts inside the decoder. It looks at the whole clip: offline use only.
# needs sections 1, 2, 4, 5, 7

@exact()
def dpc_knn(x: Tensor, num_clusters, k: int = 7, mask: Tensor = None, most: int = None):
    """Density-peak clustering: centres have the highest density * distance to the nearest denser token.

    x (B, N, C), num_clusters int or (B,), mask (B, N): who takes part -> centers (B, K), ascending, N at
    padding; assign (B, N): the nearest centre's place in the list, -1 outside the mask. density =
    exp(-mean squared distance to the k nearest that take part, itself included); of equal ones the earlier is
    the denser (HoliTom's code: neither). most: K, if it is known.
    """
    B, N, C = x.shape
    mask = torch.ones(B, N, dtype=torch.bool, device=x.device) if mask is None else mask
    count, both = mask.sum(1, keepdim=True), mask[:, :, None] & mask[:, None, :]       # (B, 1), (B, N, N)
    y = precise(x)
    square = y.square().sum(-1)                                                # (B, N)
    # |a - b|² / C by a matrix product, which is fast; a rest that is rounding alone becomes zero.
    least = 8 * C * torch.finfo(y.dtype).eps * square[:, None]                 # (B, 1, N)
    far = torch.baddbmm(square[:, None], y, y.mT, alpha=-2).add_(square[..., None])    # (B, N, N)
    far = far.masked_fill_(far <= least, 0).div_(C).sqrt_().float().masked_fill_(~both, math.inf)
    near = far.square().topk(min(k, N), largest=False).values                  # (B, N, k)
    density = -near.where(near < math.inf, 0).sum(-1) / count.clamp(1, near.size(-1))  # (B, N) its logarithm
    rank = density.argsort(dim=1, descending=True, stable=True).argsort(1)     # (B, N) ties: the earlier one
    gap = far.where(rank[:, None] < rank[..., None], math.inf).amin(-1)        # (B, N) to a denser one
    widest = far.where(both, 0).amax((1, 2))[:, None]                          # (B, 1)
    score = density + gap.minimum(widest).log().clamp(min=-1e30)               # (B, N) its logarithm
    wanted = torch.as_tensor(num_clusters, device=x.device).view(-1, 1)        # (B or 1, 1)
    centers = pack(best_of(score, wanted, mask), most).position                # (B, K)
    reach = F.pad(far, (0, 1), value=math.inf).take_along_dim(centers[:, None], 2)     # (B, N, K)
    assign = reach.argmin(-1) if centers.size(1) else centers.new_full((B, N), -1)
    return centers, assign.where(mask & (wanted > 0), -1)


def temporal_segments(similarity: Tensor, tau: float, max_len: int = None):
    """HoliTom's segments: cut T frames so that the most tokens repeat what the frame before showed.

    similarity (B, T - 1, P): of each patch with itself one frame later. A patch above tau in all steps inside
    a segment saves length - 1 tokens. max_len: of a segment, None = any, 0 or 1 = every frame alone.
    -> segment (B, T) int64, such as 0, 0, 1, 1, 1, 2; gain (B,) int64, the tokens saved.
    """
    (B, steps, P), device = similarity.shape, similarity.device
    T, row = steps + 1, torch.arange(B, device=device)
    saved = torch.arange(T if max_len is None else max(1, max_len), device=device)   # by length, of one patch
    frame = torch.arange(T, device=device)[:, None]                            # (T, 1)
    broken = torch.where(F.pad(similarity, (0, 0, 1, 0)) > tau, 0, frame)      # (B, T, P)
    run = frame - broken.cummax(1).values                                   # (B, T, P) still steps up to here
    best = torch.zeros(B, T + 1, dtype=torch.long, device=device)         # tokens saved in the first i frames
    begins = torch.zeros(B, T + 1, T, dtype=torch.long, device=device)         # 1 where their segments begin
    # Dynamic programming: best[i] = max over lengths w of best[i - w] + gain. Ties: the shortest w.
    for i in range(1, T + 1):
        still = (run[:, i - 1, :, None] >= saved[:i]).sum(1)                   # (B, w) patches
        total = best[:, i - still.size(1):i].flip(1) + saved[:i] * still       # (B, w)
        best[:, i], choice = total.max(1)
        start = i - 1 - choice                                                 # (B,)
        begins[:, i] = begins[row, start].scatter(1, start[:, None], 1)
    return begins[:, T].cumsum(1) - 1, best[:, T]


@exact()
def holitom(x: Tensor, saliency: Tensor, retain_ratio: float = 0.10, tau: float = 0.8,
            beta: float = 0.6, k: int = 7, max_len: int = None) -> Reduction:
    """HoliTom before the decoder: merge what stands still, keep what is looked at. No training.

    x (B, T, P, C), saliency (B, T, P): attention that each token receives. Of the tokens that merging over
    time leaves, as many stay as make up retain_ratio of all T * P. tau, max_len: as in temporal_segments;
    beta: as in merge_static; k: as in dpc_knn (the authors' code: no more than there are peaks).
    """
    (B, T, P, _), u = x.shape, unit(x)
    similarity = (u[:, 1:] * u[:, :-1]).sum(-1)                                # (B, T - 1, P)
    del u                                                                      # as large as x
    segment, gain = temporal_segments(similarity, tau, max_len)                # (B, T), (B,)
    ratio = (retain_ratio / (precise(T * P - gain) / (T * P))).clamp(max=1)[:, None]   # (B, 1)
    # 1. Which patches stand still all through their segment. There are S = T segments at most, some empty.
    frames = F.one_hot(segment, T).float()                                     # (B, T, S)
    moved = (segment[:, 1:] == segment[:, :-1])[..., None] & (similarity <= tau)       # (B, T - 1, P)
    static = (frames[:, 1:].mT @ moved.float() == 0) & (frames.sum(1) > 1)[..., None]  # (B, S, P)
    # 2. Of the others keep the most looked-at of each frame.
    own = segment[..., None].expand(B, T, P)                                   # the segment of each token
    still = static.gather(1, own)                                              # (B, T, P)
    quota = ((P - static.sum(-1)) * ratio - 1e-9).ceil().gather(1, segment)    # (B, T)
    kept = best_of(saliency, quota[..., None], ~still)                         # (B, T, P)
    # 3. Merge what stands still over time, and around density peaks in space.
    peaks = (static.sum(-1) * ratio).round().long()                            # (B, S)
    total = x.sum(dtype=torch.float) + saliency.sum(dtype=torch.float)         # finite if all are
    counts = (peaks > 0).sum(), peaks.max(), (kept.sum((1, 2)) + peaks.sum(1)).max(), total.isfinite().long()
    rows, K, M, fine = torch.stack(counts).tolist()                            # waits for the device
    if not (retain_ratio >= 0 and -1 <= tau <= 1 and fine):
        raise ValueError('wanted retain_ratio of at least 0, tau from -1 to 1, and no token or saliency NaN '
                         f'or infinite; got retain_ratio {retain_ratio} and tau {tau}')
    slot, share = merge_static(x, frames, static, peaks, rows, K, beta, k)     # (B, S, P) each
    # 4. One slot for each token: its group's, its own, or none.
    index = torch.arange(T * P, device=x.device).view(T, P).where(kept, -1)
    target = torch.where(still, slot.gather(1, own), index).flatten(1)         # (B, N) an index
    weight = torch.where(still, share.gather(1, own), kept.float()).flatten(1)
    slots = pack(slot_sums(torch.ones_like(target), target, T * P) > 0, M)
    return slots._replace(assign=look_up(slots.assign, target, -1), weight=weight * (target >= 0))


def merge_static(x: Tensor, frames: Tensor, static: Tensor, peaks: Tensor, rows: int, K: int, beta: float,
                 k: int):
    """Where static patches go: slot (B, S, P), an index t*P + p, -1 = nowhere, and each token's share of it.

    Their means over time are clustered, around peaks (B, S), at most K, in `rows` segments. A slot stands in
    the segment's first frame; its peak has weight beta, the others of its group share the rest (None: mean).
    """
    (B, T, P, C), S, device = x.shape, frames.size(2), x.device
    length = frames.sum(1)[..., None].clamp(min=1)                          # (B, S, 1) frames of each segment
    mean = (frames.mT @ x.float().flatten(2) / length).view(B * S, P, C)
    center, peaks = torch.full((B * S, P), P, device=device), peaks.flatten()  # the peak each patch goes to
    if rows:                                                                   # segments in which any stays
        row = (peaks == 0).long().argsort(stable=True)[:rows]
        peak, group = dpc_knn(mean[row], peaks[row], k, static.view(B * S, P)[row], K)
        center[row] = look_up(peak, group, P)
    members = look_up(slot_sums(torch.ones_like(mean[..., 0]), center, P), center, 1)    # (B*S, P) in a group
    own, at_peak = 1 / members if beta is None else beta, center == torch.arange(P, device=device)
    others = (1 - own) / (members - 1).clamp(min=1)
    share = torch.where(at_peak, own, others).where(members > 1, 1.0)
    begin, center = frames.argmax(1)[..., None], center.view(B, S, P)          # (B, S, 1) first frame
    return torch.where(center < P, begin * P + center, -1), share.view(B, S, P) / length


class HoliTom(Reducer):
    """HoliTom before the decoder: as many tokens as the clip needs."""
    wants_saliency, steady = True, False
    leaving = staticmethod(lambda share, T, P: dict(retain_ratio=share))

    def __init__(self, dim: int, *,
                 retain_ratio: Annotated[float, 'share of the vision tokens that stays'] = 0.1,
                 tau: Annotated[float, 'similarity above which a patch stands still'] = 0.8):
        super().__init__(dim)
        if not 0 < retain_ratio <= 1 or not -1 <= tau <= 1:
            raise ValueError('retain_ratio must be above 0 and at most 1, tau from -1 to 1, '
                             f'got {retain_ratio} and {tau}')
        self.retain_ratio, self.tau = retain_ratio, tau

    def forward(self, x, saliency=None, words=None, known=None) -> Reduced:
        return reduced_by(x, holitom(x, saliency, self.retain_ratio, self.tau))


class Stage(nn.Module):
    """Drops inside the decoder what the question looks at the least (FastV, Chen et al., arXiv 2403.06764).

    The base of others: a subclass has its own decide(x, score, real) -> Reduction.
    """

    def __init__(self, n_layer: int, *,
                 stage_layer: Annotated[int, 'decoder layer before which the stage acts, from 1 on'],
                 stage_ratio: Annotated[float, 'share of the vision tokens that goes there'] = 0.5):
        super().__init__()
        if not 0 < stage_layer < n_layer or not 0 <= stage_ratio < 1:
            raise ValueError(f'stage_layer must be from 1 to {n_layer - 1} and stage_ratio from 0 to below '
                             f'1, got {stage_layer} and {stage_ratio}')
        self.layer, self.ratio = stage_layer, stage_ratio

    def most(self, x: Tensor) -> int:
        """How many of x (B, N, C) stay at most; one more on Apple's GPUs, which round in float32."""
        return round(x.size(1) * (1 - self.ratio)) + (x.device.type == 'mps')

    def decide(self, x: Tensor, score: Tensor, real: Tensor) -> Reduction:
        """What becomes of the vision tokens x (B, N, C), by score (B, N); real (B, N) bool: no padding."""
        keep = (precise(real.sum(1, keepdim=True)) * (1 - self.ratio)).round()         # (B, 1)
        return pack(best_of(score, keep, real), self.most(x))

    def run(self, block: Block, before: Tensor, x: Tensor, position: Tensor, N: int, last: Tensor):
        """Fewer vision tokens in x (B, S, C) -> x, position (B, S), N, Reduced.

        block: of the layer before, whose input was before (B, S, C). last (B,): place of the question's last
        word, whose attention there is the score.
        """
        seen = visible(position.gather(1, last[:, None]), position)            # (B, 1, 1, S)
        score = block.attention.weights(block.norm1(before), position, seen, last).mean((1, 2))    # (B, S)
        made = self.decide(x[:, :N], score[:, :N], real=position[:, :N] < NEVER)
        place = look_up(position[:, :N], made.position, NEVER)                 # (B, M)
        reduced = Reduced(reduce_tokens(x[:, :N], made), place, made)
        x = torch.cat([reduced.tokens, x[:, N:]], 1)                           # (B, M + words, C)
        return x, torch.cat([place, position[:, N:]], 1), place.size(1), reduced


@exact()
def holitom_inner(h: Tensor, score: Tensor, vision: Tensor, drop_ratio: float = 0.5,
                  mask: Tensor = None, rows: int = 1024, most: int = None) -> Reduction:
    """HoliTom inside the decoder: of the vision tokens the best by score stay and take in the others.

    h (B, S, C), score (B, S), vision (B, S) bool; other tokens stay, but for padding, where mask (B, S) is
    False. What goes joins the one that stays and resembles it most (cosine), `rows` at once, in a plain mean.
    most: the most tokens of a sample that stay, if it is known.
    """
    if not 0 <= drop_ratio <= 1:
        raise ValueError(f'drop_ratio must be from 0 to 1, got {drop_ratio}')
    if not h.size(1):
        return pack(vision, 0)
    keep = (precise(vision.sum(1, keepdim=True)) * (1 - drop_ratio)).round()   # (B, 1) half to even
    kept = best_of(score, keep, vision)                                        # (B, S)
    goes, u = vision & ~kept, unit(h)
    slots = pack(~goes if mask is None else ~goes & mask, most)
    into = torch.empty_like(slots.assign)      # made first: between the products it would split free memory
    for part, found in zip(u.split(rows, 1), into.split(rows, 1)):
        found.copy_((part @ u.mT).masked_fill_(~kept[:, None], -math.inf).argmax(-1))
    joined = slots.assign.where(kept, -1).gather(1, into)                      # (B, S) -1: nobody stays
    return mean_of(torch.where(goes, joined, slots.assign), slots.position)


class HoliTomStage(Stage):
    """HoliTom's second stage: what the question looks at the least merges into what it resembles."""

    def decide(self, x: Tensor, score: Tensor, real: Tensor) -> Reduction:
        return holitom_inner(x, score, real, self.ratio, real, most=self.most(x))


REDUCERS['holitom'] = HoliTom
STAGES.update(holitom=HoliTomStage, drop=Stage)

# ---- 10. Clusters and codes --------------------------------------------------------------------------------
# How few vectors can stand for a clip? VQToken (Zhang et al., arXiv 2503.16980): a codebook for each clip, by
# k-means (Lloyd, 1982), and where each code occurs (for offline use only: it looks at the whole clip). Vector
# quantization (van den Oord et al., arXiv 1711.00937): one learned codebook for all clips.
# needs sections 1, 2, 4, 5, 7

@exact()
def nearest(x: Tensor, centers: Tensor, metric: str) -> Tensor:
    """The centre of each token: x (B, N, C), centers (B, K, C) -> (B, N) int64. Ties: the first."""
    if metric == 'cosine':                             # the angle is smallest where x·c/|c| is largest
        return torch.bmm(x, unit(centers).mT).argmax(-1)
    # |x - c|² is smallest where x·c - |c|²/2 is largest.
    return torch.baddbmm(-0.5 * centers.square().sum(-1)[:, None], x, centers.mT).argmax(-1)


def spread_centers(x: Tensor, K: int, trials: int = 8) -> Tensor:
    """k-means++ (Arthur & Vassilvitskii, 2007), greedy: x (B, N, C) -> (B, K, C).

    The chance of a token to be the next centre is in proportion to its squared distance to the nearest so
    far; of `trials` tokens drawn so, the one that leaves the smallest sum of these is taken. All samples of a
    batch use the same random numbers, and the first k centres are what K = k would give.
    """
    luck = precise(chances(torch.arange(K * trials, device=x.device).view(K, trials)))
    square, rows = x.square().sum(-1), torch.arange(x.size(0), device=x.device)            # (B, N), (B,)
    far, chosen = torch.ones_like(square), []              # (B, N) squared distance; at first any token
    for k in range(K):
        # Whole numbers: a sum of floats is not the same each time on a GPU.
        edge = (far / far.amax(1, keepdim=True).clamp(min=1e-30) * 2 ** 30).long().cumsum(1)        # (B, N)
        pick = torch.searchsorted(edge, (luck[k] * edge[:, -1:]).long(), right=True).clamp(max=x.size(1) - 1)
        tried = x[rows[:, None], pick]                                         # (B, trials, C)
        gap = (square[..., None] - x @ (2 * tried).mT + square.gather(1, pick)[:, None]).clamp(min=0)
        gap = gap.minimum(far[..., None]) if k else gap
        best = gap.sum(1).argmin(-1)                                           # (B,)
        far = gap[rows, :, best]
        chosen.append(tried[rows, best])
    return torch.stack(chosen, 1)


@exact()
def kmeans(x: Tensor, num_clusters: int, iters: int = 10, init: Tensor = None, metric: str = 'l2'):
    """Lloyd's algorithm: x (B, N, C) -> centroids (B, K, C) float32, assign (B, N) int64.

    init (B, K, C), None: spread_centers. metric 'l2', or 'cosine': of tokens of length one, but means as they
    come. Clusters are in order of their first token; an empty one keeps its centre and stands last.
    """
    if metric not in ('l2', 'cosine'):
        raise ValueError(f"metric must be 'l2' or 'cosine', got {metric!r}")
    K, x = num_clusters, unit(x) if metric == 'cosine' else x.float()
    centers, rows = spread_centers(x, K) if init is None else init.float(), F.pad(x, (0, 1), value=1.0)
    for _ in range(iters):
        sums = slot_sums(rows, nearest(x, centers, metric), K)         # (B, K, C + 1) counts are last
        centers = torch.where(sums[..., -1:] > 0, sums[..., :-1] / sums[..., -1:].clamp(min=1), centers)
    assign = nearest(x, centers, metric)                                       # (B, N)
    order = first_members(assign, K).argsort(dim=1, stable=True)               # (B, K)
    return centers.take_along_dim(order[..., None], 1), look_up(order.argsort(1), assign, -1)


@exact()
def silhouette(x: Tensor, assign: Tensor, K: int) -> Tensor:
    """Mean silhouette by cosine distance, exact in O(N K C): x (B, N, C), assign (B, N) -> (B,).

    (b - a) / max(a, b): a, mean distance to the others of its cluster; b, to the nearest other cluster
    (Rousseeuw, 1987). A mean of 1 - u·v over v is 1 - u·(sum of v)/n.
    """
    u, own = unit(x), F.one_hot(assign, K).float()                             # (B, N, C), (B, N, K)
    sums, count = own.mT @ u, own.sum(1)                                       # (B, K, C), (B, K)
    others = count[:, None] - own                                              # (B, N, K) without itself
    along = u @ sums.mT - own * u.square().sum(-1, keepdim=True)
    distance = 1 - along / others.clamp(min=1)                                 # (B, N, K)
    a = (distance * own).sum(-1)                                               # (B, N)
    b = distance.masked_fill((own > 0) | (count == 0)[:, None], math.inf).amin(-1)
    alone = (others * own).sum(-1) == 0                                        # (B, N) 0 by definition
    return ((b - a) / torch.maximum(a, b).clamp(min=1e-6)).masked_fill(alone | b.isinf(), 0).mean(1)


@exact()
def select_k(x: Tensor, least: int = 4, most: int = 32, iters: int = 3):
    """k-means by cosine with the number of clusters that has the best silhouette, for each sample.

    x (B, N, C) -> count (B,) int64, centroids (B, most, C), assign (B, N). The fit with k clusters begins
    with the first k of the same k-means++ centres, so few iterations do.
    """
    u, fits = unit(x), []
    init = spread_centers(u, most)
    for k in range(least, most + 1):
        centers, assign = kmeans(u, k, iters, init[:, :k], 'cosine')
        fits.append((silhouette(u, assign, k), F.pad(centers, (0, 0, 0, most - k)), assign))
    score, centers, assign = (torch.stack(a, 1) for a in zip(*fits))           # (B, fits), ...
    sample, best = torch.arange(x.size(0), device=x.device), score.argmax(1)   # of equals the fewest
    return best + least, centers[sample, best], assign[sample, best]


class VQToken(Reducer):
    """A clip in K tokens: means of its clusters, each told by attention where the codes occur.

    VQ-Attention takes queries and keys from the codes, values from an MLP over the map of a code. The paper
    flattens the map of ids, whose order is arbitrary. Here a code's map is its share of every cell of a grid
    of time and space, so ids do not matter, and a clip of any length has K tokens. Here the result is added
    to the codes, which the paper replaces with it, and adaptive K begins at 4, the paper's at 12.
    """
    untrained = False

    def __init__(self, dim: int, n_head: int = 4, grid=(16, 4), *,
                 codes: Annotated[int, 'tokens of a clip, 0 = as many as fit it best'] = 12):
        """grid: cells of time, and of a side of a frame."""
        super().__init__(dim)
        if codes < 0 or dim % n_head:
            raise ValueError(f'codes must be at least 0, and {n_head} heads divide {dim} channels; '
                             f'got {codes} codes')
        self.codes, self.n_head, self.grid, self.steady = codes, n_head, grid, codes > 0
        self.norm = nn.LayerNorm(dim, bias=False)
        self.query, self.key, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.value = nn.Sequential(nn.Linear(grid[0] * grid[1] ** 2, dim), nn.GELU(), nn.Linear(dim, dim))
        # At first a code attends to itself, as its query is its key, and is told where it occurs.
        nn.init.normal_(self.query.weight, std=1 / math.sqrt(dim))
        self.key.load_state_dict(self.query.state_dict())
        nn.init.normal_(self.out.weight, std=0.1 / math.sqrt(dim))           # a little; it is mostly the mean

    def occupancy(self, index_map: Tensor, K: int) -> Tensor:
        """(B, T, P) -> (B, K, cells): how much of each cell of the grid a code fills, 0 to 1."""
        T, P, cells = *index_map.shape[1:], self.value[0].in_features
        cell = grid_cells(T, P, *self.grid, index_map.device)[None]            # (1, N)
        place = index_map.flatten(1) * cells + cell                            # (B, N)
        one = torch.ones_like(place, dtype=torch.float)
        filled = slot_sums(one, place, K * cells).unflatten(1, (K, cells))
        return filled / slot_sums(one[:1], cell, cells).clamp(min=1)

    def forward(self, x, saliency=None, words=None, known=None) -> Reduced:
        """x (B, T, P, C) -> tokens (B, K, C), in order of their first patch; the map: reduction.assign."""
        flat, K = x.flatten(1, 2), min(self.codes, x.size(1) * x.size(2))      # (B, N, C)
        assign = kmeans(flat, K, metric='cosine')[1] if K else select_k(flat)[2]
        K = K or int(assign.max()) + 1                                       # waits for the device: K is data
        reduced = reduced_by(x, from_clusters(assign, K))
        mask, codes = reduced.reduction.mask, reduced.tokens                   # (B, K), (B, K, C)
        near, index_map = self.norm(codes), reduced.reduction.assign.view(x.shape[:3])
        value = self.value(self.occupancy(index_map, K).to(codes.dtype))       # (B, K, C)
        q, k, v = (y.unflatten(2, (self.n_head, -1)).transpose(1, 2)
                   for y in (self.query(near), self.key(near), value))         # (B, H, K, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        tokens = codes + self.out(y.transpose(1, 2).flatten(2)).to(codes.dtype)
        return reduced._replace(tokens=tokens * mask[..., None])


def together(x: Tensor, how: str) -> Tensor:
    """x over all processes, where several train one model: their 'sum', or what the 'first' has."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if how == 'sum':
            torch.distributed.all_reduce(x)
        else:
            torch.distributed.broadcast(x, 0)
    return x


class VectorQuantizer(nn.Module):
    """Replace each vector by the nearest of num_codes codes, which follow the vectors as they change.

    codebook (K, C) = embed_avg / cluster_size, two moving averages. In training the first batch places the
    codes (k-means), and a code that falls below `revive` vectors a batch starts anew at one of them.
    """

    def __init__(self, num_codes: int, dim: int, decay: float = 0.9, commitment: float = 0.25,
                 revive: float = 0.1, eps: float = 1e-5):
        super().__init__()
        if num_codes < 1:
            raise ValueError(f'a codebook wants at least 1 code, got {num_codes}')
        self.decay, self.commitment, self.revive, self.eps = decay, commitment, revive, eps
        self.register_buffer('codebook', torch.randn(num_codes, dim).float())  # (K, C)
        self.register_buffer('embed_avg', self.codebook.clone())               # m: sum of its vectors
        self.register_buffer('cluster_size', torch.ones(num_codes).float())    # n: how many they are
        self.register_buffer('calls', torch.zeros((), dtype=torch.long))   # steps so far; 0: codes not placed

    def _apply(self, fn, *args, **more):
        """Moves as every module does, but codes and averages stay float32 in a half-precision model."""
        def moved(buffer):
            new = fn(buffer)                                                   # may make it anew, as on meta
            return new if new.dtype == buffer.dtype else buffer.to(new.device)
        return super()._apply(moved, *args, **more)

    def forward(self, x: Tensor):
        """x (..., C) -> quantized (..., C), indices (...), commitment * mean (x - sg(code))²."""
        flat = x.reshape(-1, x.size(-1)).float()                               # (n, C)
        if not flat.size(0):
            raise ValueError(f'wanted at least one vector, got {tuple(x.shape)}')
        # Checkpointing computes the last forward again in backward, and wants what it had before.
        learns = self.training and not ModuleTracker().is_bw
        first = learns and not self.calls                                      # waits for the device
        if first:
            self.codebook.copy_(together(kmeans(flat[None], len(self.codebook))[0][0], 'first'))
        if learns:
            self.before = self.codebook.clone()
        codebook = self.before if self.training else self.codebook             # (K, C)
        indices = nearest(flat[None], codebook[None], 'l2')[0]                 # (n,)
        code = codebook.index_select(0, indices)                               # (n, C)
        loss = self.commitment * F.mse_loss(flat, code)
        if learns:
            self.learn(flat, indices, 0.0 if first else self.decay)
        quantized = (code + (flat - flat.detach())).to(x.dtype)              # straight-through: gradient of x
        return quantized.view_as(x), indices.view(x.shape[:-1]), loss

    @torch.no_grad()
    def learn(self, x: Tensor, indices: Tensor, decay: float):
        """Move to x (n, C), whose codes are indices (n,): averages first, then the division. Codes that
        hardly occur become rows of x, chosen by the number of calls."""
        indices = indices.where(x.isfinite().all(1), -1)                     # NaN would spoil a code for ever
        K, rows = len(self.codebook), F.pad(x, (0, 1), value=1.0)
        sums = together(slot_sums(rows[None], indices[None], K)[0], 'sum')     # (K, C + 1) the last: counts
        self.embed_avg.lerp_(sums[:, :-1], 1 - decay)
        self.cluster_size.lerp_(sums[:, -1], 1 - decay)
        total = self.cluster_size.sum()                  # Laplace smoothing leaves it as it is
        size = (self.cluster_size + self.eps) / (total + K * self.eps) * total
        row = x[hashed(torch.arange(K, device=x.device) + self.calls * K) % len(x)]
        row = together(row, 'first')                                           # (K, C)
        dead = ((self.cluster_size < self.revive) & row.isfinite().all(1))[:, None]
        self.codebook.copy_(torch.where(dead, row, self.embed_avg / size[:, None]))
        self.embed_avg.copy_(torch.where(dead, self.revive * row, self.embed_avg))
        self.cluster_size.clamp_(min=self.revive)
        self.calls += 1


class LearnedCodes(Reducer):
    """Each token becomes the nearest code of one learned codebook; info 'index_map' (B, T, P)."""
    untrained = False

    def __init__(self, dim: int, *, codes: Annotated[int, 'size of the codebook'] = 256):
        super().__init__(dim)
        self.quantizer = VectorQuantizer(codes, dim)

    def forward(self, x, saliency=None, words=None, known=None) -> Reduced:
        x, index_map, loss = self.quantizer(x)
        return super().forward(x)._replace(loss=loss, info=dict(index_map=index_map))

    def picture(self, reduced: Reduced) -> Reduction:
        """Patches of one code share a colour."""
        return from_clusters(reduced.info['index_map'].flatten(1), len(self.quantizer.codebook))

    def facts(self, info: dict) -> dict:
        """Share of the codes that occur, and their perplexity, exp(-sum p log p)."""
        count = info['index_map'].flatten().bincount(minlength=len(self.quantizer.codebook)).float()
        entropy = torch.special.entr(count / count.sum()).sum()
        return dict(codes_used=(count > 0).float().mean().item(), perplexity=entropy.exp().item())


REDUCERS.update(vqtoken=VQToken, vq=LearnedCodes)

# ---- 11. B-VLLM --------------------------------------------------------------------------------------------
# Of many frames a question needs few (Lu et al., arXiv 2412.09919): learned queries read the question, mix
# the frames whose mean resembles what they want, drop mixtures that repeat each other, and sample tokens from
# each, as many as a budget says. It looks at the whole clip: for offline use only.
# needs sections 1, 2, 4, 5, 7

@exact()
def merge_duplicates(selector: Tensor, threshold: float = 0.75) -> Reduction:
    """Rows alike by (1 + cosine) / 2 above threshold become one: selector (B, K, T) -> Reduction of rows."""
    u, K = unit(selector), selector.size(1)
    row = torch.arange(K, device=selector.device)
    alike = ((1 + u @ u.mT) / 2).masked_fill(row >= row[:, None], -1)          # (B, K, K) to earlier rows
    value, parent = alike.max(-1)
    root = torch.where(value > threshold, parent, row)                         # (B, K)
    for _ in range(K.bit_length()):                                            # to the end of the chain
        root = root.gather(1, root)
    return from_clusters(root, K)


class FrameSelector(Budgeted):
    """B-VLLM: a clip and a question -> `budget` tokens of the frames that matter, neither more nor fewer.

    Smaller than the paper's two Q-Formers: queries read the question, not each other nor the frames; a cosine
    takes the place of q·k. Each leans towards a place of its own in time or in a frame, as new queries are
    alike, and alike ones become one; the question outweighs that. Each frame is asked for as many tokens as
    the budget leaves it, means of patches, where the paper merges what is too many. No noise in evaluation.
    """
    by_question, untrained, in_place = True, False, False

    def __init__(self, dim: int, n_head: int = 4, num_tokens: int = 16, temperature: float = 0.5, *,
                 budget: Annotated[int, 'vision tokens of a clip, 0 = a quarter'] = 0,
                 select_frames: Annotated[int, 'queries that look for frames'] = 4,
                 hard: Annotated[bool, 'a query takes one frame whole in place of a mixture'] = False):
        """num_tokens: learned queries for tokens; a frame's tokens, more or fewer, spread over them."""
        super().__init__(dim, budget=budget)
        if select_frames < 1:
            raise ValueError(f'select_frames must be at least 1, got {select_frames}')
        self.temperature, self.hard, self.K = temperature, hard, select_frames
        # Small, so that what a query wants is mostly what it reads.
        self.queries = nn.Parameter(0.1 * torch.randn(select_frames + num_tokens, dim))        # (K + n, C)
        self.blocks = nn.ModuleList([Block(dim, math.gcd(n_head, dim // 2), causal=False)])
        self.norm, self.wish = nn.LayerNorm(dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.sharpness = nn.Parameter(torch.tensor([3.0, 6.0]))        # of the choice of frames, of patches
        self.register_buffer('calls', torch.zeros((), dtype=torch.long))       # seeds the noise

    def ask(self, words: Tensor, known: Tensor) -> Tensor:
        """What the queries want, having read words (B, L, C): (B, K + n, C) float32."""
        (B, L, _), ahead = words.shape, len(self.queries)                      # K + n
        both = torch.cat([self.queries.expand(B, -1, -1).to(words.dtype), words], 1)   # (B, K + n + L, C)
        position = F.pad(torch.arange(L, device=words.device), (ahead, 0))             # queries at 0
        seen = F.pad(known, (ahead, 0), value=False)[:, None, None]                # words alone are read
        both = both + self.blocks[0](both, position, seen)
        with exact(grad=True):
            return F.linear(self.norm(both[:, :ahead]).float(), self.wish.weight.float())

    def affinity(self, wish: Tensor, x: Tensor, own: Tensor, width) -> Tensor:
        """How much wish (..., K, C) wants each of x (..., S, C) -> (..., K, S): 1.5 * cosine with x less its
        mean, plus up to 1 near the place `own` (..., K, 1), from 0 to 1; a greater `width` is narrower."""
        place = (torch.arange(x.size(-2), device=x.device) + 0.5) / x.size(-2) # (S,) in (0, 1), as own
        with exact(grad=True):
            alike = 1.5 * (unit(wish) @ unit(x - x.mean(-2, keepdim=True)).mT) # (..., K, S)
        return alike + (-((own - place) * width).square()).exp()

    def forward(self, x, saliency=None, words=None, known=None) -> Reduced:
        """x (B, T, P, C), words (B, L, C) with mask known (B, L) -> M tokens, info 'selector' (B, K, T).

        selector: what each query takes of each frame. A token's position is in the frame of which its mixture
        takes the most. Training adds Gumbel noise, seeded by the number of calls.
        """
        (B, T, P, C), K, device = x.shape, self.K, x.device
        wish, frames = self.ask(words, known), x.mean(2)                       # (B, K + n, C), (B, T, C)
        own = (torch.arange(K, device=device)[:, None] + 0.5) / K
        logits = self.sharpness[0] * self.affinity(wish[:, :K], frames, own, K)                # (B, K, T)
        if self.training:
            self.calls += not ModuleTracker().is_bw      # not in backward, where checkpointing repeats a call
            index = torch.arange(logits.numel(), device=device).view_as(logits)
            noise = -(-chances(index + self.calls * index.numel()).log()).log()
            logits = logits + noise.to(logits.dtype)
        selector = (logits / self.temperature).softmax(-1)                     # (B, K, T)
        if self.hard:                                                # straight-through: one frame each
            one = F.one_hot(selector.argmax(-1), T).to(selector.dtype)
            selector = one + selector - selector.detach()
        kept = merge_duplicates(selector)
        shares = reduce_tokens(selector, kept)                                 # (B, K, T)
        frame, order = shares.argmax(-1).where(kept.mask, T).sort(dim=1, stable=True)      # (B, K)
        shares = shares.take_along_dim(order[..., None], 1)                    # those that differ, in time
        mixed = (shares.to(x.dtype) @ x.flatten(2)).unflatten(2, (P, C))       # (B, K, P, C)
        tokens, position = self.sample(mixed, frame, wish[:, K:], self.most(x), T)
        return Reduced(tokens, position, info=dict(selector=selector, patches=P))

    def sample(self, mixed: Tensor, frame: Tensor, wish: Tensor, M: int, T: int):
        """M tokens, evenly from those of mixed (B, K, P, C) with frame (B, K) below T, and their places."""
        (B, K, P, C), slot = mixed.shape, torch.arange(M, device=mixed.device)
        k = (frame < T).sum(1, keepdim=True)                                   # (B, 1) frames that differ
        home = slot * k // M                                                   # (B, M) the frame of a token,
        begin, end = (((home + i) * M + k - 1) // k for i in (0, 1))            # its tokens,
        number, n = slot - begin, end - begin                                  # its number among them
        wish = wish.take_along_dim((number * wish.size(1) // n)[..., None], 1)         # (B, M, C)
        own, width = ((number + 0.5) / n)[:, None, :, None], n.clamp(max=P)[:, None, :, None]  # (B, 1, M, 1)
        alike = self.affinity(wish[:, None], mixed, own, width).transpose(1, 2)                # (B, M, K, P)
        logits = self.sharpness[1] / self.temperature * alike
        there = torch.arange(K, device=mixed.device) == home[..., None]        # (B, M, K)
        logits = logits.masked_fill(~there[..., None], -math.inf).flatten(2)   # (B, M, K * P)
        tokens = logits.softmax(-1).to(mixed.dtype) @ mixed.flatten(1, 2)      # (B, M, C)
        position, order = (frame.gather(1, home) * P + number * P // n).sort(dim=1, stable=True)
        return tokens.take_along_dim(order[..., None], 1), position

    def picture(self, reduced: Reduced) -> Reduction:
        """The strongest frame of each mixture, whole."""
        selector = reduced.info['selector']                                    # (B, K, T)
        taken = F.one_hot(selector.argmax(-1), selector.size(2)).amax(1) > 0   # (B, T)
        return pack(taken.repeat_interleave(reduced.info['patches'], 1))

    def facts(self, info: dict) -> dict:
        return dict(frames=merge_duplicates(info['selector']).mask.sum(1).float().mean().item())


REDUCERS['bvllm'] = FrameSelector

# ---- 12. TempMe and retrieval ------------------------------------------------------------------------------
# The encoder merges patches while it encodes (Shen et al., arXiv 2409.01156): inside each frame, then across
# neighbouring frames, until the whole clip is one (for offline use only). Retriever finds clips by sentences;
# LoRA (Hu et al., arXiv 2106.09685) adapts a frozen model by learning a few directions of its maps.
# needs sections 1 to 5, 7, 8

class MergeStep(NamedTuple):
    """What a layer merges."""
    joins: tuple    # before attention, in turn: (M, r), M neighbouring clips become one, then r tokens merge
    inner: int      # tokens that merge after attention
    tokens: int     # of each clip in attention


def merge_schedule(n_layer: int, frames: int, patches: int, image: float = 0.041, cross: float = 0.3,
                   intra: float = 0.1) -> list:
    """A MergeStep for each layer, for any number of frames (TempMe, section 3; its shares are defaults).

    The prime factors of `frames` are dealt to at most three layers, the last of them the last but one:
    12 -> 2, 2, 3. Earlier layers merge `image` of a frame's patches; these `cross` of all tokens at each join
    and `intra` of the rest inside; the last `intra`. At most half of the patches merge at once.
    """
    if n_layer < 2 and frames > 1:
        raise ValueError(f'merging frames wants 2 layers, the first for each frame alone, got {n_layer}')
    primes, rest = [], frames
    while rest > 1:
        primes.append(next(p for p in range(2, rest + 1) if rest % p == 0))
        rest //= primes[-1]
    parts = [[] for _ in range(max(1, min(3, n_layer // 3)))]
    for prime in reversed(primes):
        min(parts, key=math.prod).append(prime)
    parts = sorted(filter(None, parts), key=math.prod)
    first = max(1, n_layer - 1 - len(parts)) if parts else n_layer
    n, c, steps = patches + 1, 1, []                        # tokens of a clip, summaries among them
    share = lambda n, ratio: int(n * ratio + 1e-9)
    for i, factors in enumerate(([[]] * first + parts + [[]])[:n_layer]):
        joins = []
        for M in factors:
            n, c = n * M, c * M
            joins.append((M, min((n - c) // 2, share(n, cross))))
            n -= joins[-1][1]
        inside = min((n - c) // 2, share(patches, image) if i < first else share(n, intra))
        steps.append(MergeStep(tuple(joins), inside, n))
        n -= inside
    return steps


def image_block(block, x: Tensor, size, r: int, protected: int = 1, slot=None):
    """A Block that merges r of x (B, n, C) between attention and MLP, by their keys -> as merge_tokens."""
    q, k, v = block.attention.project(block.norm1(x))                          # (B, H, n, D)
    # Proportional attention (ToMe, section 3): softmax(q·k / sqrt(D) + log size of the key).
    bias = None if size is None else size.log()[:, None, None, :].to(q.dtype)
    x = x + block.attention.mix(q, k, v, bias)
    x, size, slot = merge_tokens(x, size, k.detach().mean(1), r, protected, slot=slot)
    return x + block.mlp(block.norm2(x)), size, slot


def gather_clips(x: Tensor, M: int, c: int) -> Tensor:
    """M neighbours of x (B*F, n, ...), c summaries in front, become one: (B*F/M, M*n, ...), M*c in front."""
    x = x.unflatten(0, (-1, M))                                                # (B*F/M, M, n, ...)
    return torch.cat([x[:, :, :c].flatten(1, 2), x[:, :, c:].flatten(1, 2)], 1)


def join_clips(x: Tensor, size, place: Tensor, M: int, r: int, c: int, pairing=None, slot=None):
    """M of the clips x (B*F, n, C), with c summaries each, become one, and r tokens merge -> as merge_tokens.

    place (F, C): a vector for every clip, so that order is seen. pairing: None = from even clips to odd ones,
    as parity of place never pairs the same patch of two clips.
    """
    patch = torch.arange(M * c, M * x.size(1), device=x.device).view(M, -1)    # where each clip's patches are
    pairing = (patch[::2].flatten(), patch[1::2].flatten()) if pairing is None else pairing
    metric, size = gather_clips(x, M, c), size if size is None else gather_clips(size, M, c)
    x = (x.unflatten(0, (-1, len(place))) + place[:, None]).flatten(0, 1)      # (B*F, n, C)
    return merge_tokens(gather_clips(x, M, c), size, metric, r, M * c, pairing, slot)


class TempMeEncoder(VisionEncoder):
    """A vision encoder with a summary token a frame, which merges tokens on the way (TempMe)."""
    merges = True

    def __init__(self, dim: int, n_layer: int, n_head: int, patches: int, patch_size: int = 8,
                 frames: int = 8, channels: int = 6, place_std: float = 0.0, joins: bool = True, *,
                 merge_image: Annotated[
                     float, "share of a frame's patches that merge in each early layer"] = 0.07,
                 merge_cross: Annotated[float, 'share of all tokens that merge when clips are joined'] = 0.3,
                 merge_intra: Annotated[float, 'share that merges inside the joined clip'] = 0.1):
        """frames: T, for the places of clips. joins False: each frame alone. 0.07: 1 of 16 patches merges."""
        super().__init__(dim, n_layer, n_head, patches, patch_size, frames, channels)
        shares = merge_image, merge_cross, merge_intra
        if not all(0 <= share < 1 for share in shares):
            raise ValueError(f'merge_image, merge_cross, merge_intra must be from 0 to below 1, got {shares}')
        self.frames = frames
        self.cls = nn.Parameter(0.2 * torch.randn(dim))                        # (C,)
        self.steps = (merge_schedule(n_layer, frames, patches, *shares) if joins
                      else [MergeStep((), 0, patches + 1)] * n_layer)
        self.clip_place = nn.ParameterList()               # of the clips before each join
        for M in [M for step in self.steps for M, _ in step.joins]:
            self.clip_place.append(nn.Parameter(place_std * torch.randn(frames, dim)))
            frames //= M

    def counts(self, T: int) -> list:
        """Of each layer: how many clips, tokens of each in attention, tokens of each in the MLP."""
        rows = []
        for step in self.steps:
            T //= math.prod(M for M, _ in step.joins)
            rows.append((T, step.tokens, step.tokens - step.inner))
        return rows

    def forward(self, video: Tensor, previous: Tensor = None, want_saliency: bool = False) -> Reduced:
        """video (B, T, 3, height, width) -> tokens (B, M, C), each where its first patch is, or its frame."""
        x, slot, clips = self.merge(video)                                     # (B * clips, n, C)
        (B, T), n, device = video.shape[:2], x.size(1), x.device
        slot = (slot + n * (torch.arange(len(slot), device=device) % clips)[:, None]).view(B, -1)   # (B, T*P)
        row, c = torch.arange(clips * n, device=device), T // clips            # c: summaries of a clip
        frame = slot.size(1) // T * (row // n * c + row % n)                   # of a summary, its first patch
        place = frame.where(row % n < c, first_members(slot, clips * n))       # (B, clips * n)
        place, order = place.sort(dim=1, stable=True)                          # (B, M)
        tokens = x.reshape(B, clips * n, -1).take_along_dim(order[..., None], 1)
        return Reduced(tokens, place, mean_of(order.argsort(1).gather(1, slot), place))

    def summaries(self, video: Tensor) -> Tensor:
        """video (B, T, 3, height, width) -> the summary of every frame, (B, T, C)."""
        x, _, clips = self.merge(video)                                        # (B * clips, n, C)
        return x[:, :video.size(1) // clips].reshape(*video.shape[:2], -1)

    def merge(self, video: Tensor):
        """-> x (B * clips, n, C), summaries in front; the slot of each patch in its clip; how many clips."""
        (B, T), device = video.shape[:2], video.device
        if self.clip_place and T != self.frames:
            raise ValueError(f'this encoder merges clips of {self.frames} frames, got {T}')
        x = self.embed(video) + self.place                                     # (B*T, P, C)
        x, P = torch.cat([self.cls.to(x.dtype).expand(B * T, 1, -1), x], 1), x.size(1)
        size, c, places = None, 1, iter(self.clip_place)                       # c: summaries of a clip
        slot = torch.arange(1, P + 1, device=device).expand(B * T, P)          # of each patch in its clip
        for block, step in zip(self.blocks, self.steps):
            for M, r in step.joins:
                n, before = x.size(1), torch.arange(len(slot), device=device)[:, None] % M     # clips before
                slot = (slot + (M - 1) * c + before * (n - c)).view(-1, M * slot.size(1))
                x, size, slot = join_clips(x, size, next(places), M, r, c, slot=slot)
                c *= M
            x, size, slot = image_block(block, x, size, step.inner, c, slot)
        return self.final_norm(x), slot, T // c


class LoRA(nn.Module):
    """A frozen linear map W and a small one that learns: y = W x + B A x. A (rank, in), B (out, rank)."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.linear, like = linear.requires_grad_(False), linear.weight
        self.lora_a = nn.Parameter(like.new_empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(like.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    weight = property(lambda self: self.linear.weight + self.lora_b @ self.lora_a)     # some layers read it
    bias = property(lambda self: self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + F.linear(F.linear(x, self.lora_a), self.lora_b)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The same map as one matrix, W + B A; this LoRA stays as it is."""
        linear = copy.deepcopy(self.linear).requires_grad_(True)
        linear.weight += (self.lora_b.cpu().double() @ self.lora_a.cpu().double()).to(linear.weight)
        return linear


def add_lora(model: nn.Module, rank: int, names=('qkv',), learns=('clip_place',)):
    """LoRA in the linear layers whose names end so; all else is frozen, but for what `learns` names.

    merge_lora comes before save_checkpoint, which knows the LoRA of a configuration alone.
    """
    names, learns = ((a,) if isinstance(a, str) else tuple(a) for a in (names, learns))
    # In _modules a layer of two names stands twice; named_children would tell one of them.
    found = [(parent, name) for parent in model.modules() for name, child in parent._modules.items()
             if name.endswith(names) and isinstance(child, nn.Linear) and not isinstance(parent, LoRA)]
    if rank < 1 or not found and not any(isinstance(module, LoRA) for module in model.modules()):
        raise ValueError(f'no linear layer is named {" or ".join(names)}, or the rank is below 1: {rank}')
    for parent, name in found:
        setattr(parent, name, LoRA(getattr(parent, name), rank))
    for name, p in model.named_parameters():
        p.requires_grad_(any(part in name for part in ('lora_', *learns)))


def merge_lora(model: nn.Module):
    """Fold what LoRA learned into the weights, W + B A: as fast as before, and every weight learns."""
    if hasattr(getattr(model, 'config', None), 'options'):     # a checkpoint of it has no LoRA, either
        model.config = copy.copy(model.config)
        model.config.options = {key: a for key, a in model.config.options.items() if key != 'lora_rank'}
    for name, part in list(model.named_modules()):
        if isinstance(part, LoRA):
            model.set_submodule(name, part.merged())
    model.requires_grad_(True)


class Retriever(nn.Module):
    """Finds the clip for a sentence and the sentence for a clip: two towers, one space (TempMe).

    config.encoder 'tempme' merges frames, 'plain' encodes each alone, without their changes, as an image-text
    model does. Unlike the paper's, places of clips do not start at zero: from there, order is learned late.
    """

    def __init__(self, config: ModVideoConfig, *,
                 lora_rank: Annotated[int, 'learn so many directions of each qkv alone, 0 = everything'] = 0):
        super().__init__()
        self.config = c = config
        C, own = c.encoder_dim, {key: a for key, a in c.options.items() if key in options_of(TempMeEncoder)}
        self.encoder = TempMeEncoder(C, c.n_layer, c.encoder_heads, c.patches, c.patch_size, c.frames,
                                     channels=3, place_std=1.0, joins=c.encoder == 'tempme', **own)
        self.embed = nn.Embedding(len(c.vocab), C)
        self.blocks = nn.ModuleList(Block(C, c.encoder_heads) for _ in range(c.n_layer))
        self.final_norm = nn.LayerNorm(C, bias=False)
        self.see, self.read = (nn.Linear(C, C, bias=False) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))            # of the similarities
        small_updates(self, c.n_layer)
        if rank := lora_rank or c.options.get('lora_rank', 0):
            add_lora(self, rank)

    def encode_video(self, video: Tensor) -> Tensor:
        """video (B, T, 3, height, width) -> (B, C) of length one: the mean of the frames' summaries."""
        return unit(unit(self.see(self.encoder.summaries(video))).mean(1))

    def encode_text(self, text: Tensor) -> Tensor:
        """text (B, L) int64, padded with 0 at the end -> (B, C) of length one, read at the last word."""
        x, position = self.embed(text), torch.arange(text.size(1), device=text.device)
        for block in self.blocks:
            x = x + block(x, position)
        last = ((text != PAD).sum(1) - 1).clamp(min=0)                         # (B,)
        return unit(self.read(self.final_norm(x[torch.arange(x.size(0), device=x.device), last])))

    def forward(self, video: Tensor, text: Tensor):
        """Similarity (B, B), rows are sentences, and InfoNCE loss (van den Oord et al., arXiv 1807.03748)."""
        sentences, clips = self.encode_text(text), self.encode_video(video)    # (B, C) each
        with exact(grad=True):
            similarity = sentences @ clips.T                                   # (B, B) in [-1, 1], float32
        same = (text[:, None] == text[None]).all(-1).fill_diagonal_(False)     # equal sentences: no negatives
        logits = (self.log_scale.exp() * similarity).masked_fill(same, -math.inf)
        own = torch.arange(len(text), device=text.device)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return similarity, loss


ENCODERS['tempme'] = TempMeEncoder
MODELS['retriever'] = Retriever

# ---- 13. gamma-MoD -----------------------------------------------------------------------------------------
# A trained dense model, converted (Luo et al., arXiv 2410.13859): layers whose attention has the lowest rank
# route, and one router for all of them chooses among a whole clip (for offline use only). And baselines that
# choose without a router.
# needs sections 1, 2, 4, 5, 7 (`hashed`)

class GammaBlock(MoDBlock):
    """The gate scales the block's MLP alone: x + attention + gate * MLP."""

    def update(self, x: Tensor, route: Route, position: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
        a = self.block.attention(self.block.norm1(x), position, mask, cache)   # (B, K, C)
        m = self.block.mlp(self.block.norm2(x + a))
        return a + (route.gate[..., None] * m).to(m.dtype)


class GammaRouting(FrameRouting):
    """One router for all layers: the best of the clip, by a layer's normalized input; words too are gated."""
    layer, whole_clip = GammaBlock, True

    def __init__(self, dim: int, layers: list, keep_ratio: float, patches: int, streaming: bool = False, *,
                 routing_loss: Annotated[float, "weight of the router's own loss"] = 0.01):
        super().__init__(dim, [], keep_ratio, patches)
        self.weight = routing_loss
        self.router = Router(dim) if layers else None

    def forward(self, i: int, block: nn.Module, x: Tensor, position: Tensor, N: int) -> Route:
        # The paper's softmax over two scores is the sigmoid of one.
        score = self.router.score(block.norm1(x))                              # (B, S)
        route = best_route(score, N, 1, capacity(self.keep_ratio, N))
        return Route(route.index, score.gather(1, route.index).sigmoid(), score)

    def loss(self, routes: list):
        return self.weight * sum(routing_loss(route) for route in routes)


def routing_loss(route: Route) -> Tensor:
    """gamma-MoD's loss of its router: cross-entropy of all scores with what was selected, padding aside."""
    real, chosen = route.logits > -math.inf, torch.ones_like(route.gate)       # (B, S), (B, K)
    chosen = chosen if route.mask is None else chosen * route.mask
    selected = torch.zeros_like(route.logits).scatter_reduce(1, route.index, chosen, 'amax')   # (B, S)
    loss = F.binary_cross_entropy_with_logits(route.logits.where(real, 0), selected, reduction='none')
    return (loss * real).sum() / real.sum()


class UniformRouting(FrameRouting):
    """Evenly spaced tokens of a frame, its last among them. The base of ways without a router, gate one."""
    count = staticmethod(capacity)

    def __init__(self, dim: int, layers: list, keep_ratio: float, patches: int, streaming: bool = False):
        super().__init__(dim, [], keep_ratio, patches, streaming)
        self.k = self.count(keep_ratio, patches)               # tokens of each frame

    def forward(self, i: int, block: nn.Module, x: Tensor, position: Tensor, N: int):
        if N == 0:
            return None
        place = torch.arange(N, device=x.device) % self.patches                # (N,) in its frame
        score = self.score(i, position[..., :N], place).float().expand(len(x), N)          # (B, N)
        score = F.pad(score, (0, x.size(1) - N))                               # (B, S)
        return best_route(score, N, N // self.patches, self.k, self.deciding(place))

    def score(self, i: int, position: Tensor, place: Tensor) -> Tensor:
        """Which tokens layer i prefers: position (N,) or (B, N), place (N,) in its frame -> either."""
        return (place + 1) * self.k // self.patches - place * self.k // self.patches


class RandomRouting(UniformRouting):
    """Random tokens: by a hash of position and layer, so that whole sequence and stream agree."""

    def score(self, i: int, position: Tensor, place: Tensor) -> Tensor:
        return hashed(position + i * 7919)


class SkipRouting(UniformRouting):
    """No vision token at all: with placement all-deep early exit, with interleaved layer skipping."""
    last_layer, count = True, staticmethod(lambda ratio, n: 0)


ROUTINGS.update(gamma=GammaRouting, uniform=UniformRouting, random=RandomRouting, skip=SkipRouting)


def attention_rank(attention: Tensor):
    """gamma-MoD's ARank, and the effective rank: attention (B, H, S, S) -> two of (H,), mean over B.

    ARank: how many singular values of the map below its diagonal are above S * 2**-23 * the largest. A
    *uniform* map has S - 1, the most: ARank tells how far sinks stretch the values, not redundancy.
    Effective rank: exp(entropy of the normalized singular values).
    """
    values = torch.linalg.svdvals(attention.float().tril(-1))                  # (B, H, S)
    least = attention.size(-1) * torch.finfo(torch.float32).eps * values[..., :1]
    rank = (values > least).sum(-1).float()                                    # (B, H)
    share = values / values.sum(-1, keepdim=True).clamp(min=1e-30)             # (B, H, S)
    return rank.mean(0), torch.special.entr(share).sum(-1).exp().mean(0)


def choose_mod_layers(ranks: Tensor, num_dense: int) -> list:
    """Which layers to convert: ranks (layers,), as layer_ranks(...)[0] -> all but the num_dense highest."""
    if ranks.dim() != 1 or not 0 <= num_dense < len(ranks):
        raise ValueError(f'wanted one rank a layer, and num_dense of 0 to {len(ranks) - 1} of them, '
                         f'got ranks {tuple(ranks.shape)} and num_dense {num_dense}')
    return ranks.argsort(stable=True)[:len(ranks) - num_dense].tolist()


@torch.no_grad()
def layer_ranks(model: ModVideo, video: Tensor, text: Tensor) -> Tensor:
    """ARank and effective rank of every decoder layer of a dense model: (2, layers)."""
    rows = []
    look = lambda part, args: rows.append(torch.stack(attention_rank(part.weights(*args[:3]))).mean(1))
    with contextlib.ExitStack() as hooks:
        for layer in model.blocks:
            hooks.enter_context(layer.block.attention.register_forward_pre_hook(look))
        model(video, text)
    return torch.stack(rows, 1)


def init_from(model: nn.Module, dense: nn.Module):
    """Copy the weights of `dense` into a model that differs in method; what `dense` lacks stays new."""
    names = 'model vocab n_layer n_head dim encoder_layers encoder_heads frame_size patch_size'.split()
    pairs = [(name, getattr(dense.config, name), getattr(model.config, name)) for name in names]
    mine, bare = model.state_dict(), lambda name: name.replace('.linear.', '.')        # without LoRA's part
    plain = {bare(name): p for name, p in dense.state_dict().items()}
    if lost := [name for name in plain if 'lora_' in name and name not in mine]:
        raise ValueError(f'the new model has no {lost[0]}; merge_lora first, so that it is not lost')
    own = {name: plain[bare(name)] for name in mine if bare(name) in plain}
    pairs += [(name, tuple(p.shape), tuple(mine[name].shape)) for name, p in own.items()]
    for name, other, wanted in pairs:
        if other != wanted:
            raise ValueError(f'the weights are of a model with another {name}: {str(other)[:60]}, '
                             f'wanted {str(wanted)[:60]}')
    model.load_state_dict(own, strict=False)

# ---- 14. Accounting, pictures, optimizer -------------------------------------------------------------------
# What a pass costs: a multiply-add is two FLOPs, causal attention counts in full, element-wise work does not.
# What became of each patch, as a picture. Muon (Jordan et al., 2024) trains the matrices of the blocks.
# needs sections 1 to 5, 7 (`exact`)

def num_params(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def count_flops(model: nn.Module, run):
    """FLOPs of run(), which calls the model -> of each part, of the 'rest', the 'total'; what run gave.

    A part counts where its forward is called from the model's; of other methods, such as generate, all is
    'rest'. torch counts nothing for nn.LSTM, nor for nn.MultiheadAttention in eval mode.
    """
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
    aten, matrix_vector = torch.ops.aten, lambda a, b, **more: 2 * math.prod(a)
    attention = lambda q, k, v, *args, **more: sdpa_flop_count(q, k, v)
    omitted = {aten.mv: matrix_vector, aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=omitted) as counter:
        result = run()
    found, root, flops = counter.get_flop_counts(), type(model).__name__, {}
    for name, part in model.named_children():                              # a list is not called as a whole
        called = [f'{name}.{i}' for i in range(len(part))] if isinstance(part, nn.ModuleList) else [name]
        flops[name] = sum(sum(found.get(f'{root}.{one}', {}).values()) for one in called)
    total = counter.get_total_flops()
    return {**flops, 'rest': total - sum(flops.values()), 'total': total}, result


def draw_tokens(video: Tensor, tokens, sample: int = 0, scale: int = 3, grid=None):
    """Draw what became of the patches of a clip: a PIL image, the frames in a row.

    video (T, 3, height, width) in [0, 1]; tokens: of `sample`, a Route of all N vision tokens, before all
    words (skipped patches are dimmed), or a Reduction (dropped ones too; merged ones share a colour).
    grid: rows, columns of patches in a frame; None: 8 pixels a side. ValueError: no fit.
    """
    from PIL import Image
    (T, _, height, width), slot = video.shape, getattr(tokens, 'assign', None)
    (rows, columns), route = grid or (height // 8, width // 8), slot is None
    if route:                                                          # slot (B, N + words): its own, or -1
        chosen = tokens.index if tokens.mask is None else tokens.index.where(tokens.mask, -1)
        slot = torch.full_like(tokens.logits, -1).long().scatter_reduce(1, tokens.index, chosen, 'amax')
    N, slot = T * rows * columns, slot[sample]
    if len(slot) < N or (slot[N:] < 0).any() or not route and len(slot) > N:       # words are never skipped
        raise ValueError(f'{len(slot)} tokens are not {T} frames of {rows} x {columns} patches; say grid=')
    slot = slot[:N, None].cpu()                                                # (N, 1) words stand after them
    shared = (slot + 1).flatten().bincount()[slot + 1] > 1                     # (N, 1) with another patch
    hue = 0.5 + 0.5 * torch.cos(2 * math.pi * (0.618 * slot - torch.arange(3) / 3))        # (N, 3) of a slot
    light = torch.where(slot < 0, 0.25, torch.where(shared, 0.5, 1.0)).expand(-1, 3)       # (N, 3)
    tint = torch.where(slot < 0, 0.08, torch.where(shared, 0.5 * hue, 0.0))                # (N, 3)
    light, tint = (F.interpolate(a.view(T, rows, columns, 3).movedim(-1, 1), (height * scale, width * scale))
                   for a in (light, tint))                                     # (T, 3, height, width) * scale
    frames = light * F.interpolate(video.float().cpu().clamp(0, 1), scale_factor=scale) + tint
    edges = lambda n, pixels: (torch.arange(n) * pixels + n - 1) // n          # where patches begin
    frames[:, :, edges(rows, height * scale)] *= 0.6
    frames[..., edges(columns, width * scale)] *= 0.6
    frames = F.pad(frames, (0, 2), value=1.0)                                  # a white gap after each frame
    picture = frames.permute(2, 0, 3, 1).flatten(1, 2)[:, :-2]                 # (height, width of all, 3)
    return Image.fromarray((picture * 255).round().byte().numpy())


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized steps, for the matrices inside the blocks, all of one shape at once.

    torch.optim.Muon computes in bfloat16, which a CPU without such units emulates hundreds of times slower.
    """

    def __init__(self, params, lr: float = 0.01, momentum: float = 0.95, weight_decay: float = 0.05):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        for p in [p for group in self.param_groups for p in group['params'] if p.dim() != 2]:
            raise ValueError(f'Muon is for matrices, got a parameter of shape {tuple(p.shape)}')

    @torch.no_grad()
    def step(self, closure=None):
        """One step; closure: computes the loss again and returns it, as for every torch optimizer."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            learns = [p for p in group['params'] if p.grad is not None]
            for shape in sorted({p.shape for p in learns}):
                params = [p for p in learns if p.shape == shape]
                grads = [p.grad for p in params]
                for p in [p for p in params if not self.state[p]]:
                    self.state[p]['momentum'] = torch.zeros_like(p)
                averages = [self.state[p]['momentum'] for p in params]
                torch._foreach_lerp_(averages, grads, 1 - group['momentum'])           # one launch for all
                ahead = torch._foreach_lerp(grads, averages, group['momentum'])        # Nesterov
                steps = orthogonalize(torch.stack(ahead))                      # (n, rows, columns)
                # This rate changes the output by the same amount at any shape.
                rate = group['lr'] * max(1, shape[0] / shape[1]) ** 0.5
                torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
                torch._foreach_sub_(params, steps.unbind(), alpha=rate)
        return loss


@exact()
def orthogonalize(x: Tensor) -> Tensor:
    """Singular values near one, of x (n, rows, columns), by five steps of Newton and Schulz: x <- S x.

    S = a + b A + c A², A = x xᵀ. A becomes S A S, as all of these commute: the products are small ones. In
    float32: each step makes what rounding adds to A some ten times larger.
    """
    tall, dtype = x.size(-2) > x.size(-1), x.dtype
    x = (x.mT if tall else x).to(torch.promote_types(dtype, torch.float32))
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    one, A = torch.eye(x.size(-2), device=x.device, dtype=x.dtype), x @ x.mT   # (rows, rows), (n, rows, rows)
    step_of = lambda A: 3.4445 * one - 4.7750 * A + 2.0315 * A @ A   # coefficients of the cited work
    S = all_steps = step_of(A)
    for _ in range(4):
        A = S @ A @ S
        S = step_of(A)
        all_steps = S @ all_steps
    x = (all_steps @ x).to(dtype)
    return x.mT if tall else x


def configure_optimizer(model: nn.Module, lr: float = 0.01, weight_decay: float = 0.05) -> list:
    """Muon at lr, with weight_decay, for matrices with 'blocks' in their names; AdamW, without, at 30 % of lr
    for LoRA and places of clips, at 3 % for all else."""
    # The small share matters: at 10 % the stem outruns the attention that reads it, and training stalls.
    learns = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in learns if 'blocks' in name and p.dim() == 2 and 'lora_' not in name]
    small = [p for name, p in learns if 'lora_' in name or 'clip_place' in name]
    chosen = {*matrices, *small}
    others = [p for _, p in learns if p not in chosen]
    groups = [dict(params=p, lr=share * lr) for p, share in ((others, 0.03), (small, 0.3)) if p]
    muon = [Muon(matrices, lr, weight_decay=weight_decay)] if matrices else []
    return muon + ([torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)] if groups else [])


def main():
    """Self-check: shapes, parameters, FLOPs dense and routed, what an untrained router picks."""
    text, video = torch.tensor([[2, 3, 4], [2, 3, 0]]).expand(2, 2, 3), torch.full((2, 8, 3, 32, 32), 0.3)
    for t in range(8):                                                         # a white square moves right
        video[:, t, :, 10:18, 2 + 2 * t:10 + 2 * t] = 0.9
    for name, placement in (('dense', 'none'), ('MoD', 'all')):
        torch.manual_seed(0)
        config = ModVideoConfig(['<pad>', '<eos>', 'what', 'moves', 'square'], placement=placement)
        model = ModVideo(config)
        flops, (logits, _, aux) = count_flops(model, lambda: model(video, text))
        print(f'MFLOPs, {name:5}', *(f'{part} {n / 1e6:.1f}' for part, n in flops.items() if n), sep='   ')
    shapes = {'video (B, T, 3, height, width)': video, 'vision tokens (B, N, C)': aux['reduced'].tokens,
              'route (B, K + Q*L)': aux['routes'][0].index, 'logits (B, Q, L, V)': logits,
              'answer (B, Q, new)': model.generate(video, text, max_new_tokens=2)}
    for name, tensor in shapes.items():
        print(f'{name:32}{tuple(tensor.shape)}')
    os.makedirs('out', exist_ok=True)
    draw_tokens(video[0], aux['routes'][0]).save('out/modvideo.png')
    print(f'{num_params(model):,} parameters; what the untrained router of layer 0 picks: out/modvideo.png')


if __name__ == '__main__':
    main()
