# SPDX-License-Identifier: MIT-0
"""modvideo: a small video-language model that spends less on video. One file; the model needs torch
alone, the pictures numpy and Pillow.

    - a per-frame vision transformer with a convolutional stem, fed frames and frame differences
    - a GPT-style decoder: pre-norm, RMSNorm, rotary positions, scaled dot-product attention,
      a cache of keys and values
    - Mixture-of-Depths (MoD): in chosen layers only the highest-scoring vision tokens of each frame
      are processed (gathered, scattered back), the others skip the layer for real; text never skips
    - one description, `Reduction`, for every way of merging, clustering or dropping tokens
    - several questions per clip that share the vision tokens and do not see each other
    - exact FLOP counts, safe checkpoints, pictures of what was processed

    video (B, T, 3, height, width)                   text (B, Q, L) word ids
       |  PatchEmbed, per frame                        |  embedding
    patches (B*T, P, C)                                |
       |  VisionEncoder: n blocks, no mask             |
    patches (B*T, P, C)                                |
       |  projector                                    |
    vision tokens (B, N, C) ---- concatenated ---- text tokens (B, Q*L, C)
                                  |
                      (B, N + Q*L, C)  decoder layer 0      all tokens
                                  |    decoder layer 1      MoD: K of the N vision tokens, all text
                                  |    ...                  (others pass unchanged, not attended to)
                                  |    last decoder layer   all tokens
                      logits (B, Q, L, V), loss

Legend, used everywhere:
    B batch · T frames · P patches of one frame · N = T*P vision tokens before reduction ·
    M after reduction · Q questions a clip · L text tokens of one question · C channels · H heads ·
    K clusters, codes or selected tokens · S tokens of any sequence · V words of the vocabulary.
    Video is float in [0, 1].

Sections:
    1 configuration   2 transformer bricks   3 token reduction   4 vision encoder
    5 Mixture-of-Depths   6 the model   7 accounting   8 save, load, draw

Papers:
    Raposo et al., Mixture-of-Depths, arXiv 2404.02258    the routed update, equation 1
    Wu et al., VideoLLM-MoD, arXiv 2408.16730             selection per frame, on vision tokens only

Usage:
    vocab = ['<pad>', '<eos>', 'what', 'moves']
    config = ModVideoConfig(**PRESETS['tiny'], vocab=vocab, placement='all')
    model = ModVideo(config)
    video = torch.rand(2, 4, 3, 32, 32)                             # (B, T, 3, height, width)
    text = torch.tensor([[[2, 3]], [[2, 3]]])                       # (B, Q, L)
    logits, loss, aux = model(video, text)                          # (2, 1, 2, 4), None, dict
    answer = model.generate(video, text, max_new_tokens=3)          # (2, 1, 3)
    draw_tokens(video[0], aux['routes'][0]).save('tokens.png')      # what layer 0 processed

Left out: distributed training, tokenizers (a word is a token), pretrained weights, dropout.
"""
import math
import os
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# --------------------------------------------------------------------------------------------------
# 1. Configuration
# All that decides the model's shape, its vocabulary included, so that a checkpoint explains itself.
# stands alone
# --------------------------------------------------------------------------------------------------

PAD, EOS, IGNORE = 0, 1, -1  # '<pad>', '<eos>' in every vocabulary; the target that the loss skips

PRESETS = {
    'tiny': dict(frames=4, frame_size=32, encoder_layers=1, encoder_dim=64, encoder_heads=2,
                 n_layer=3, dim=64, n_head=2),                                # tests and smoke runs
    'cpu': dict(frames=8, frame_size=32, encoder_layers=1, encoder_dim=96, encoder_heads=3,
                n_layer=4, dim=96, n_head=3),                                   # 128 vision tokens
    'gpu': dict(frames=16, frame_size=64, encoder_layers=2, encoder_dim=256, encoder_heads=4,
                n_layer=8, dim=256, n_head=4),                                 # 1,024 vision tokens
    'deep': dict(frames=16, frame_size=64, encoder_layers=2, encoder_dim=256, encoder_heads=4,
                 n_layer=16, dim=256, n_head=4),
    'long': dict(frames=64, frame_size=128, encoder_layers=2, encoder_dim=256, encoder_heads=4,
                 n_layer=8, dim=256, n_head=4),                               # 16,384 vision tokens
}


@dataclass
class ModVideoConfig:
    """The shape of a model. Raises ValueError where fields contradict each other."""
    vocab: list           # the words; id = place in the list; the first two are '<pad>' and '<eos>'
    # video
    frames: int = 8                   # T. The model itself takes any number of frames
    frame_size: int = 32              # height and width in pixels
    patch_size: int = 8               # P = (frame_size / patch_size)**2
    # vision encoder
    encoder_layers: int = 1
    encoder_dim: int = 96
    encoder_heads: int = 3
    # decoder
    n_layer: int = 4
    dim: int = 96                     # C
    n_head: int = 3                   # H
    # Mixture-of-Depths
    placement: str = 'none'           # which layers route: 'none' or a name that mod_layers knows
    keep_ratio: float = 0.2      # share of a frame's tokens that a routed layer processes, rounded up

    def __post_init__(self):
        if list(self.vocab[:2]) != ['<pad>', '<eos>']:
            raise ValueError(f'the vocabulary starts with {list(self.vocab[:2])}, '
                             "wanted ['<pad>', '<eos>']")
        if self.patch_size % 4 or self.frame_size % self.patch_size:
            raise ValueError('patch_size must be a multiple of 4 that divides frame_size, '
                             f'got patch_size {self.patch_size} and frame_size {self.frame_size}')
        for dim, heads in ((self.dim, self.n_head), (self.encoder_dim, self.encoder_heads)):
            if dim % (2 * heads):
                raise ValueError('channels per head must be even, '
                                 f'got {dim} channels and {heads} heads')
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f'keep_ratio must be above 0 and at most 1, got {self.keep_ratio}')

    @property
    def patches(self) -> int:
        """P, the patches of one frame."""
        return (self.frame_size // self.patch_size) ** 2


# --------------------------------------------------------------------------------------------------
# 2. Transformer bricks
# One pre-norm block serves the encoder (sees everything) and the decoder (sees the past; rotary
# positions, Su et al., arXiv 2104.09864). It returns its *update*; callers add it, gated or not.
# stands alone
# --------------------------------------------------------------------------------------------------

NEVER = 2 ** 20     # position of padding: later than any query, so no query sees it


def rotary(x: Tensor, position: Tensor, base: float = 10000.0) -> Tensor:
    """Turn channel pairs (i, i + D/2) of x (B, H, S, D) by position * base**(-2i/D).

    position: (S,) or (B, S) int.
    """
    half = x.size(-1) // 2
    frequency = base ** (-torch.arange(half, device=x.device) / half)          # (D/2,)
    angle = position[..., None, :, None] * frequency                 # (1, S, D/2) or (B, 1, S, D/2)
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half], x[..., half:]                                        # (B, H, S, D/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)   # (B, H, S, D)


class KVCache:
    """Keys, values, positions that an attention layer has seen. Layers may hold unequal numbers."""

    def __init__(self):
        self.k = self.v = self.position = None     # (B, H, S, D), (B, H, S, D), (B, S)

    def extend(self, k: Tensor, v: Tensor, position: Tensor):
        """Append -> all keys, all values, who sees whom: (B, 1, new, all) bool, None if causal."""
        position = position.expand(k.size(0), -1)
        if self.k is None:
            self.k, self.v, self.position = k, v, position
            return k, v, None
        self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        self.position = torch.cat([self.position, position], 1)
        return self.k, self.v, self.position[:, None, None, :] <= position[:, None, :, None]

    def repeat(self, times: int):
        """Each sample gets `times` rows in turn, for several questions: B becomes B * times."""
        if self.k is not None:
            self.k, self.v, self.position = (
                a.repeat_interleave(times, 0) for a in (self.k, self.v, self.position))


class Attention(nn.Module):
    """Multi-head self-attention. `causal`: a token sees itself and the past if no mask is set."""

    def __init__(self, dim: int, n_head: int, causal: bool = True):
        super().__init__()
        self.n_head, self.causal = n_head, causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, position: Tensor = None, mask: Tensor = None,
                cache: KVCache = None) -> Tensor:
        """x (B, S, C), position (S,), (B, S) or None (no rotary), mask (S, S) bool -> (B, S, C)."""
        B, S, C = x.shape
        q, k, v = self.qkv(x).view(
            B, S, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)     # (B, H, S, D) each
        if position is not None:
            q, k = rotary(q, position), rotary(k, position)
        if cache is not None:
            k, v, mask = cache.extend(k, v, position)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask,
                                           is_causal=self.causal and mask is None)
        return self.out(y.transpose(1, 2).reshape(B, S, C))


class MLP(nn.Module):
    """Two linear maps with a GELU between them, on every token alone."""

    def __init__(self, dim: int, expansion: int = 4):
        super().__init__()
        self.up, self.down = (nn.Linear(dim, expansion * dim, bias=False),
                              nn.Linear(expansion * dim, dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., C)."""
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """A pre-norm transformer block f. forward returns the update f(x); the layer is x + f(x)."""

    def __init__(self, dim: int, n_head: int, causal: bool = True):
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(dim), Attention(dim, n_head, causal)
        self.norm2, self.mlp = nn.RMSNorm(dim), MLP(dim)

    def forward(self, x: Tensor, position: Tensor = None, mask: Tensor = None,
                cache: KVCache = None) -> Tensor:
        """x (B, S, C) -> f(x) (B, S, C)."""
        a = self.attention(self.norm1(x), position, mask, cache)
        return a + self.mlp(self.norm2(x + a))


# --------------------------------------------------------------------------------------------------
# 3. Token reduction
# Pruning, merging, clustering, quantizing and de-duplicating are one act: every input token goes to
# one output slot with a weight, or is dropped. A method only decides (a `Reduction`);
# `reduce_tokens` does it.
# stands alone
# --------------------------------------------------------------------------------------------------

class Reduction(NamedTuple):
    """Where every one of N tokens goes. Slots are in ascending position, padding last."""
    assign: Tensor      # (B, N) int64: output slot of each input token; -1 = dropped
    weight: Tensor      # (B, N) float32: its share of that slot; the shares of a slot sum to 1
    position: Tensor    # (B, M) int64: the input index at which the slot stands; N for padding
    mask: Tensor   # (B, M) bool: False where a sample has fewer slots than the longest of its batch


def _flat_slots(assign: Tensor, M: int) -> Tensor:
    """(B, N) slots -> (B*N,) rows of a flat (B, M + 1) table; its last column takes the dropped."""
    B = assign.size(0)
    slot = torch.where(assign < 0, M, assign)                                  # (B, N)
    return (slot + (M + 1) * torch.arange(B, device=assign.device)[:, None]).flatten()


def reduce_tokens(x: Tensor, reduction: Reduction) -> Tensor:
    """Weighted sum of each slot's tokens, in float32: x (B, N, C) -> (B, M, C); padding is zero."""
    (B, N, C), M = x.shape, reduction.position.size(1)
    rows = (x.float() * reduction.weight[..., None]).view(B * N, C)
    out = rows.new_zeros(B * (M + 1), C).index_add(0, _flat_slots(reduction.assign, M), rows)
    return out.view(B, M + 1, C)[:, :M].to(x.dtype)                            # (B, M, C)


def expand(y: Tensor, reduction: Reduction) -> Tensor:
    """Un-merge y (B, M, C) -> (B, N, C): a copy of its slot for each token, zeros for dropped."""
    B, M, C = y.shape
    padded = torch.cat([y, y.new_zeros(B, 1, C)], 1).view(B * (M + 1), C)  # a sample's last row: 0
    return padded.index_select(0, _flat_slots(reduction.assign, M)).view(B, -1, C)


def slot_sizes(reduction: Reduction, size: Tensor = None) -> Tensor:
    """Input tokens of each slot: (B, M) float32. size (B, N): what the inputs stand for already."""
    B, M = reduction.position.shape
    size = torch.ones_like(reduction.weight) if size is None else size.float()
    table = size.new_zeros(B * (M + 1)).index_add(
        0, _flat_slots(reduction.assign, M), size.flatten())
    return table.view(B, M + 1)[:, :M]


def compose(first: Reduction, second: Reduction) -> Reduction:
    """One reduction that does `first` (N -> M1), then `second` (M1 -> M2)."""
    kept = first.assign >= 0                                                   # (B, N)
    slot = first.assign.clamp(min=0)
    assign = torch.where(kept, second.assign.gather(1, slot), -1)              # (B, N)
    weight = first.weight * second.weight.gather(1, slot) * (assign >= 0)      # (B, N)
    N, M1 = first.assign.size(1), first.position.size(1)
    stand = second.position.clamp(max=M1 - 1)
    position = torch.where(second.mask, first.position.gather(1, stand), N)    # (B, M2)
    return Reduction(assign, weight, position, second.mask)


def from_clusters(assign: Tensor, num_clusters: int, position: Tensor = None) -> Reduction:
    """The reduction that averages clusters.

    assign (B, N): int64 in [0, num_clusters), or -1 to drop the token. position (B, num_clusters):
    where each cluster stands; None: at its first member. Slots are reordered to ascending position;
    clusters without members become padding.
    """
    (B, N), device = assign.shape, assign.device
    flat = _flat_slots(assign, num_clusters)
    index = torch.arange(N, device=device).expand(B, N)
    table = torch.full((B * (num_clusters + 1),), N, device=device)
    first = table.scatter_reduce(
        0, flat, index.flatten(), 'amin').view(B, -1)[:, :num_clusters]        # (B, K)
    position = first if position is None else torch.where(first < N, position, N)
    position, order = position.sort(dim=1, stable=True)          # (B, K) ascending, empty ones last
    slot = order.argsort(1)                                                 # (B, K) cluster -> slot
    assign = torch.where(assign < 0, -1, slot.gather(1, assign.clamp(min=0)))  # (B, N)
    plain = Reduction(assign, (assign >= 0).float(), position, position < N)
    share = 1 / slot_sizes(plain).clamp(min=1)                                 # (B, K)
    return plain._replace(weight=plain.weight * share.gather(1, assign.clamp(min=0)))


def pack(keep: Tensor) -> Reduction:
    """Keep some tokens, drop the others: keep (B, N) bool. M is the most that a sample keeps."""
    N, device = keep.size(1), keep.device
    count = keep.sum(1)                                                        # (B,)
    M = int(count.max())                                           # waits for the device: M is data
    assign = torch.where(keep, keep.cumsum(1) - 1, -1)                         # (B, N)
    position = torch.where(keep, torch.arange(N, device=device), N).sort(1).values[:, :M]  # (B, M)
    return Reduction(assign, keep.float(), position, position < N)


# --------------------------------------------------------------------------------------------------
# 4. Vision encoder
# A vision transformer (Dosovitskiy et al., arXiv 2010.11929) on each frame alone. Its stem is
# convolutional (Xiao et al., arXiv 2106.14881) and also reads the change since the previous frame,
# the only place where motion is cheap.
# needs section 2
# --------------------------------------------------------------------------------------------------

def keep_scale(layers: nn.Sequential):
    """Initialize so that the output is about as large as the input (He et al., arXiv 1502.01852).

    torch's default shrinks it to a tenth on the way, and the biases drown the picture.
    """
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity='relu')
            nn.init.zeros_(layer.bias)


class PatchEmbed(nn.Module):
    """Frames, their changes -> patch tokens, by three convolutions of total stride patch_size."""

    def __init__(self, dim: int, patch_size: int = 8, channels: int = 6):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, 32, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(64, dim, 3, stride=patch_size // 4, padding=1))
        keep_scale(self.stem)

    def forward(self, video: Tensor) -> Tensor:
        """video (B, T, 3, height, width) -> (B*T, P, C). The change of the first frame is zero."""
        change = torch.cat([torch.zeros_like(video[:, :1]), video[:, 1:] - video[:, :-1]], 1)
        frames = torch.cat([video - 0.45, change], 2).flatten(0, 1) / 0.2  # (B*T, 6, height, width)
        return self.stem(frames).flatten(2).transpose(1, 2)                    # (B*T, P, C)


class VisionEncoder(nn.Module):
    """PatchEmbed, learned places in the frame, blocks in which its patches see each other."""

    def __init__(self, dim: int, n_layer: int, n_head: int, patches: int, patch_size: int = 8):
        super().__init__()
        self.embed = PatchEmbed(dim, patch_size)
        self.place = nn.Parameter(0.2 * torch.randn(patches, dim))             # (P, C)
        self.blocks = nn.ModuleList(Block(dim, n_head, causal=False) for _ in range(n_layer))
        self.norm = nn.RMSNorm(dim)

    def forward(self, video: Tensor) -> Tensor:
        """video (B, T, 3, height, width) -> (B*T, P, C)."""
        x = self.embed(video) + self.place
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)


# --------------------------------------------------------------------------------------------------
# 5. Mixture-of-Depths
# A routed layer processes the K vision tokens that its router scores highest and leaves the others
# as they are (Raposo et al., equation 1: x + r f(x) for the selected, r = w·x). The choice is made
# frame by frame (VideoLLM-MoD): it looks across one frame and never at a later one, so training,
# prefill and streaming choose alike.
# MoDBlock stands alone, around any block that returns its update
# --------------------------------------------------------------------------------------------------

def mod_layers(placement: str, depth: int) -> list:
    """The layers that route, by the names of VideoLLM-MoD, table 2. ValueError: an unknown name."""
    layers = {'none': [], 'interleaved': range(1, depth, 2), 'interleaved-deep': range(3, depth, 2),
              'all': range(depth), 'all-deep': range(2, depth)}
    if placement not in layers:
        raise ValueError(f'placement must be one of {", ".join(layers)}, got {placement!r}')
    return list(layers[placement])


def capacity(ratio: float, n: int) -> int:
    """How many of n tokens are processed: at least one; the epsilon keeps 0.07 * 100 at 7."""
    return max(1, math.ceil(ratio * n - 1e-9))


class Route(NamedTuple):
    """Which tokens a routed layer processes."""
    index: Tensor       # (B, K) int64, ascending: the selected tokens
    gate: Tensor        # (B, K) float32: factor of each one's update
    logits: Tensor      # (B, N) float32: the score of every routable token


class Router(nn.Module):
    """One linear score a token, r = w·x, computed in float32 whatever the compute dtype."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim).uniform_(-1, 1) / math.sqrt(dim))    # (C,)

    def forward(self, x: Tensor, group: int, ratio: float) -> Route:
        """Select the best `capacity(ratio, n)` of each of `group` equal runs of n tokens.

        x (B, N, C); group = T: the best of each frame; group = 1: the best of the whole sequence
        (a later token can then push out an earlier one: offline use only). Ties: the earlier wins.
        """
        B, N, C = x.shape
        if N % group:
            raise ValueError(f'{N} tokens do not divide into {group} groups of equal size')
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            logits = F.linear(x.to(wide), self.weight.to(wide)[None]).squeeze(-1)  # (B, N)
        k = capacity(ratio, N // group)
        rank = logits.detach().view(B, group, -1).argsort(
            dim=-1, descending=True, stable=True)                          # (B, group, n)
        start = torch.arange(0, N, N // group, device=x.device)            # (group,) first of each
        index = (rank[..., :k].sort(-1).values + start[:, None]).flatten(1)  # (B, K), K = group * k
        return Route(index, logits.gather(1, index), logits)


class MoDBlock(nn.Module):
    """Runs a block on the selected tokens alone: x + gate * f(x) for them, x for the others."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, route: Route, position: Tensor, mask: Tensor = None,
                cache: KVCache = None) -> Tensor:
        """x (B, S, C), position (S,) or (B, S) -> (B, S, C).

        The route speaks of the first N = route.logits.size(1) tokens. Those behind them (text)
        always go through, ungated. mask and cache are the block's and speak of the K + S - N tokens
        that it is given; they keep their original positions.
        """
        (B, S, C), N = x.shape, route.logits.size(1)
        text = torch.arange(N, S, device=x.device).expand(B, S - N)
        index = torch.cat([route.index, text], 1)                              # (B, K + S - N)
        row = (index + S * torch.arange(B, device=x.device)[:, None]).flatten()  # rows of `flat`
        flat = x.reshape(B * S, C)
        chosen = flat.index_select(0, row).view(B, -1, C)                      # (B, K + S - N, C)
        update = self.block(chosen, position.expand(B, S).gather(1, index), mask, cache)
        gate = F.pad(route.gate, (0, S - N), value=1.0)                # (B, K + S - N) one for text
        update = (update * gate[..., None]).to(x.dtype)
        return flat.index_add(0, row, update.view(-1, C)).view(B, S, C)


# --------------------------------------------------------------------------------------------------
# 6. The model
# Vision tokens stand first, in order of time; the questions of a clip follow, all starting at
# position N: they read the vision tokens and themselves, never each other. Positions decide
# causality, so a skipped token leaves a gap, no shift.
# needs sections 1, 2, 4, 5
# --------------------------------------------------------------------------------------------------

def question_mask(n_vision: int, Q: int, L: int, device=None) -> Tensor:
    """(S, S) bool, S = n_vision + Q*L: i sees j if j is not later and is vision or i's question."""
    place = torch.arange(n_vision + Q * L, device=device)
    owner = torch.where(place < n_vision, -1, (place - n_vision) // L)  # (S,) question, -1 = vision
    return (place <= place[:, None]) & ((owner == -1) | (owner == owner[:, None]))


class ModVideo(nn.Module):
    """Video and questions in, answers out."""

    def __init__(self, config: ModVideoConfig):
        super().__init__()
        self.config = c = config
        self.encoder = VisionEncoder(
            c.encoder_dim, c.encoder_layers, c.encoder_heads, c.patches, c.patch_size)
        self.projector = nn.Sequential(
            nn.Linear(c.encoder_dim, c.dim), nn.GELU(), nn.Linear(c.dim, c.dim))
        keep_scale(self.projector)
        self.embed = nn.Embedding(len(c.vocab), c.dim)
        # The last layer stays dense: nothing behind it reads vision, a router would learn nothing.
        self.mod_layers = [i for i in mod_layers(c.placement, c.n_layer) if i < c.n_layer - 1]
        self.blocks = nn.ModuleList(Block(c.dim, c.n_head) for _ in range(c.n_layer))
        for i in self.mod_layers:
            self.blocks[i] = MoDBlock(self.blocks[i])
        self.routers = nn.ModuleDict({str(i): Router(c.dim) for i in self.mod_layers})
        self.norm = nn.RMSNorm(c.dim)
        self.head = nn.Linear(c.dim, len(c.vocab), bias=False)
        # A layer adds two updates; this size keeps their sum over all layers below that of x.
        for name, p in self.named_parameters():
            if name.endswith(('attention.out.weight', 'mlp.down.weight')):
                nn.init.normal_(p, std=0.5 / math.sqrt(2 * c.n_layer * p.size(1)))

    def encode_video(self, video: Tensor):
        """video (B, T, 3, frame_size, frame_size) -> tokens (B, N, C), positions (N,) int64."""
        size = self.config.frame_size
        if video.dim() != 5 or video.shape[2:] != (3, size, size):
            raise ValueError(f'video must be (B, T, 3, {size}, {size}), got {tuple(video.shape)}')
        x = self.projector(self.encoder(video))                                # (B*T, P, C)
        # The dtype of the text tokens, whatever autocast says.
        x = x.view(video.size(0), -1, x.size(-1)).to(self.embed.weight.dtype)  # (B, N, C)
        return x, torch.arange(x.size(1), device=x.device)

    def forward(self, video: Tensor, text: Tensor, targets: Tensor = None):
        """Predict the next word at every place of every question.

        video (B, T, 3, height, width) float, text (B, Q, L) int64, targets (B, Q, L) int64 with -1
        where nothing is to be learned -> logits (B, Q, L, V), loss (mean cross-entropy over the
        targets, or None), aux: 'routes', a dict from routed layer to Route; 'tokens', the number of
        tokens that each layer processed.
        """
        if text.dim() != 3:
            raise ValueError(f'text must be (B, Q, L), got {tuple(text.shape)}')
        B, Q, L = text.shape
        vision, position = self.encode_video(video)                            # (B, N, C), (N,)
        N = vision.size(1)
        x = torch.cat([vision, self.embed(text).flatten(1, 2)], 1)             # (B, N + Q*L, C)
        position = torch.cat([position, N + torch.arange(L, device=x.device).repeat(Q)])
        x, aux = self.decode(x, position, video.size(1), N, (Q, L))
        logits = self.head(self.norm(x[:, N:])).float().view(B, Q, L, -1)      # (B, Q, L, V)
        if targets is None:
            return logits, None, aux
        return logits, F.cross_entropy(
            logits.flatten(0, 2), targets.flatten(), ignore_index=IGNORE), aux

    def decode(self, x: Tensor, position: Tensor, T: int, N: int, questions=(1, 0), caches=None):
        """All layers on x (B, S, C), its first N tokens T frames of vision -> x (B, S, C), aux."""
        aux = {'routes': {}, 'tokens': []}
        masks = {}                                            # one for each number of vision tokens
        for i, block in enumerate(self.blocks):
            cache = caches[i] if caches else None
            route = (self.routers[str(i)](x[:, :N], T, self.config.keep_ratio)
                     if i in self.mod_layers and N else None)
            n = N if route is None else route.index.size(1)
            if questions[0] > 1 and n not in masks:                 # one question is plainly causal
                masks[n] = question_mask(n, *questions, x.device)
            if route is None:
                block = block.block if isinstance(block, MoDBlock) else block
                x = x + block(x, position, masks.get(n), cache)
            else:
                x = block(x, route, position, masks.get(n), cache)
                aux['routes'][i] = route
            aux['tokens'].append(n + x.size(1) - N)
        return x, aux

    @torch.no_grad()
    def generate(self, video: Tensor, text: Tensor, max_new_tokens: int) -> Tensor:
        """Greedy answers: text (B, Q, L) -> (B, Q, max_new_tokens), 0 after the end.

        Questions are padded with 0 behind. The vision tokens are run once; their keys and values
        serve every question of the clip.
        """
        (B, Q, L), T = text.shape, video.size(1)
        vision, position = self.encode_video(video)
        N = vision.size(1)
        caches = [KVCache() for _ in self.blocks]
        self.decode(vision, position, T, N, caches=caches)
        for cache in caches:
            cache.repeat(Q)
        word = text.flatten(0, 1)                                              # (B*Q, L)
        length = (word != PAD).sum(1, keepdim=True)                            # (B*Q, 1)
        place = torch.arange(L, device=word.device)
        position = torch.where(place < length, N + place, NEVER)               # (B*Q, L)
        last = (length - 1).clamp(min=0)                             # where the answer is predicted
        answer = []
        for step in range(max_new_tokens):
            x, _ = self.decode(self.embed(word), position, T, 0, caches=caches)
            x = x.gather(1, last[..., None].expand(-1, 1, x.size(2)))          # (B*Q, 1, C)
            word = self.head(self.norm(x)).argmax(-1)                          # (B*Q, 1)
            if answer:
                ended = (answer[-1] == EOS) | (answer[-1] == PAD)
                word = torch.where(ended, PAD, word)
            answer.append(word)
            position, last = N + length + step, torch.zeros_like(last)
            if bool(((word == EOS) | (word == PAD)).all()):
                break
        answer = torch.cat(answer, 1)                                          # (B*Q, words so far)
        return F.pad(answer, (0, max_new_tokens - answer.size(1)), value=PAD).view(B, Q, -1)


# --------------------------------------------------------------------------------------------------
# 7. Accounting
# What a forward pass costs, and the optimizer. A multiply-add counts as two FLOPs; attention is
# counted in full, as torch.utils.flop_counter counts it, although causal kernels skip half of it;
# element-wise work is left out.
# needs sections 2, 4, 5, 6
# --------------------------------------------------------------------------------------------------

def num_params(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def block_flops(S: int, C: int, expansion: int = 4) -> int:
    """Block on S tokens, C channels; a token: qkv, out 4C², MLP 2*expansion*C², attention 2SC."""
    return 2 * S * (4 * C * C + 2 * expansion * C * C) + 4 * S * S * C


def count_flops(model: ModVideo, video_shape, text_len: int, questions: int = 1,
                aux: dict = None) -> dict:
    """FLOPs of one forward pass by part, and their 'total'.

    video_shape: (B, T, 3, height, width); text_len: L; questions: Q. aux: of a forward pass, to
    count the tokens that each layer really processed; None: what the configuration says.
    """
    c, (B, T, _, height, width) = model.config, video_shape
    text, stem, size = questions * text_len, 0, (height, width)
    for conv in model.encoder.embed.stem:
        if isinstance(conv, nn.Conv2d):
            stride, kernel = conv.stride[0], conv.kernel_size[0]
            size = tuple(-(-s // stride) for s in size)
            stem += 2 * size[0] * size[1] * conv.out_channels * conv.in_channels * kernel ** 2
    P = size[0] * size[1]
    N, K = T * P, T * capacity(c.keep_ratio, P)
    tokens = aux['tokens'] if aux else [
        (K if i in model.mod_layers else N) + text for i in range(c.n_layer)]
    flops = {
        'encoder': T * (stem + c.encoder_layers * block_flops(P, c.encoder_dim)),
        'projector': 2 * N * (c.encoder_dim * c.dim + c.dim * c.dim),
        'routers': 2 * N * c.dim * len(model.mod_layers),
        'decoder': sum(block_flops(S, c.dim) for S in tokens),
        'head': 2 * text * c.dim * len(c.vocab)}
    flops = {part: B * n for part, n in flops.items()}
    return {**flops, 'total': sum(flops.values())}


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized steps, for the matrices inside the blocks (Jordan et al., 2024).

    Newton-Schulz iterations push the singular values of each step towards one. torch.optim.Muon
    does this in bfloat16, which a CPU without bfloat16 units emulates hundreds of times slower;
    here it runs in the dtype of the weights, all matrices of one shape at once.
    """

    def __init__(self, params, lr: float = 0.01, momentum: float = 0.95,
                 weight_decay: float = 0.05):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for shape in sorted({p.shape for p in group['params']}):
                params = [p for p in group['params'] if p.shape == shape]
                grads = []
                for p in params:
                    average = self.state[p].setdefault('momentum', torch.zeros_like(p))
                    average.lerp_(p.grad, 1 - group['momentum'])
                    grads.append(p.grad.lerp(average, group['momentum']))  # Nesterov: look ahead
                steps = orthogonalize(torch.stack(grads))                      # (n, rows, columns)
                # This rate changes the output by the same amount at any shape.
                rate = group['lr'] * max(1, shape[0] / shape[1]) ** 0.5
                for p, step in zip(params, steps):
                    p.mul_(1 - group['lr'] * group['weight_decay']).sub_(step, alpha=rate)


def orthogonalize(x: Tensor, iterations: int = 5) -> Tensor:
    """Move the singular values of every matrix of x (n, rows, columns) near one.

    Newton-Schulz: x <- a x + (b A + c A²) x with A = x xᵀ.
    """
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        A = x @ x.mT
        x = 3.4445 * x + (-4.7750 * A + 2.0315 * A @ A) @ x         # coefficients of the cited work
    return x.mT if tall else x


def configure_optimizer(model: nn.Module, lr: float = 0.01, weight_decay: float = 0.05) -> list:
    """Two optimizers: Muon at lr for the matrices of all blocks, AdamW at 3 % of lr for the rest.

    The small share matters: at 10 % the stem outruns the attention that reads it; training stalls.
    """
    matrices = [p for name, p in model.named_parameters() if 'blocks' in name and p.dim() == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(matrices, lr, weight_decay=weight_decay),
            torch.optim.AdamW(others, 0.03 * lr, betas=(0.9, 0.95), weight_decay=0.0)]


# --------------------------------------------------------------------------------------------------
# 8. Save, load, draw
# Checkpoints hold tensors and plain values: loading cannot run code. Pictures: what was processed.
# needs sections 1, 3, 5, 6
# --------------------------------------------------------------------------------------------------

def save_checkpoint(path, model: ModVideo, **extra):
    """Write model, config, `extra` (tensors, numbers, strings, lists, dicts); all or nothing."""
    data = dict(extra, config=asdict(model.config), model=model.state_dict())
    torch.save(data, f'{path}.part')
    os.replace(f'{path}.part', path)


def load_checkpoint(path, device='cpu'):
    """Read what save_checkpoint wrote -> model, extra. ValueError if the file is something else."""
    try:
        data = torch.load(path, map_location=device, weights_only=True)
        config, weights = data.pop('config'), data.pop('model')
        model = ModVideo(ModVideoConfig(**config)).to(device)
        model.load_state_dict(weights)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:      # torch.load raises a dozen types for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f'{path} is not a checkpoint of this model: {reason[:160]}') from None
    return model, data


def draw_tokens(video: Tensor, tokens, sample: int = 0, scale: int = 3):
    """Draw what became of the patches of a clip: a PIL image, the frames in a row.

    video (T, 3, height, width) in [0, 1]; tokens: a Route (skipped patches are dimmed) or Reduction
    (dropped ones are dimmed, ones merged into a slot share a colour), of which `sample` is drawn.
    """
    import colorsys

    import numpy as np
    from PIL import Image
    T, _, height, width = video.shape
    if isinstance(tokens, Route):
        slot = torch.full_like(tokens.logits[sample], -1, dtype=torch.long)
        slot[tokens.index[sample]] = torch.arange(tokens.index.size(1), device=slot.device)
    else:
        slot = tokens.assign[sample]
    slot = slot.cpu()                                                          # (N,) -1 = dimmed
    side = math.isqrt(slot.numel() // T)
    if T * side * side != slot.numel():
        raise ValueError(f'{slot.numel()} tokens are not {T} frames of a square grid of patches')
    grow = lambda a, h, w: F.interpolate(a[:, None].float(), (h, w))[:, 0].numpy()
    frames = video.float().cpu().clamp(0, 1).permute(0, 2, 3, 1).numpy()     # (T, height, width, 3)
    frames = frames.repeat(scale, 1).repeat(scale, 2)
    height, width = frames.shape[1:3]
    slots = grow(slot.view(T, side, side), height, width).astype(int)          # (T, height, width)
    grey = frames.mean(-1, keepdims=True)
    picture = np.where(slots[..., None] < 0, 0.25 * grey + 0.08, frames)
    members = torch.bincount(slot.clamp(min=0)[slot >= 0], minlength=1).numpy()
    hue = np.array([colorsys.hsv_to_rgb(i * 0.618 % 1, 0.9, 1) for i in range(len(members))])
    merged = (slots >= 0) & (members[slots.clip(0)] > 1)                       # shares its slot
    picture = np.where(merged[..., None], 0.5 * picture + 0.5 * hue[slots.clip(0)], picture)
    picture[:, ::height // side] *= 0.6                                        # the grid of patches
    picture[:, :, ::width // side] *= 0.6
    row = np.ones((height, T * (width + 2) - 2, 3))
    for t in range(T):
        row[:, t * (width + 2):t * (width + 2) + width] = picture[t]
    return Image.fromarray((row * 255).round().astype('uint8'))


def main():
    """Self-check: shapes, parameters, FLOPs dense and routed, what an untrained router picks."""
    from pathlib import Path
    vocab = ['<pad>', '<eos>', 'what', 'moves', 'square']
    torch.manual_seed(0)
    dense = ModVideo(ModVideoConfig(**PRESETS['cpu'], vocab=vocab))
    model = ModVideo(ModVideoConfig(**PRESETS['cpu'], vocab=vocab, placement='all'))
    c = model.config
    video = torch.full((2, c.frames, 3, c.frame_size, c.frame_size), 0.3)
    for t in range(c.frames):                                           # a white square moves right
        video[:, t, :, 10:18, 2 + 2 * t:10 + 2 * t] = 0.9
    text = torch.tensor([[2, 3, 4], [2, 3, 0]]).expand(2, 2, 3)                # (B, Q, L)
    vision, _ = model.encode_video(video)
    logits, loss, aux = model(video, text, torch.full_like(text, 4))
    answer = model.generate(video, text, max_new_tokens=2)
    route = aux['routes'][0]
    rows = [('video', video, '(B, T, 3, height, width)'), ('vision tokens', vision, '(B, N, C)'),
            ('router scores', route.logits, '(B, N)'), ('routed tokens', route.index, '(B, K)'),
            ('text', text, '(B, Q, L)'), ('logits', logits, '(B, Q, L, V)'),
            ('answer', answer, '(B, Q, new)')]
    for name, tensor, legend in rows:
        print(f'{name:14} {str(tuple(tensor.shape)):22} {legend}')
    print(f'parameters     {num_params(model):,} (dense {num_params(dense):,})')
    print(f'tokens/layer   {aux["tokens"]}')
    print(f'loss           {loss.item():.2f} before training (log V = {math.log(len(vocab)):.2f})')
    full, routed = (count_flops(m, (1, *video.shape[1:]), 10, questions=8) for m in (dense, model))
    print(f'\n{"MFLOPs a clip":14} {"dense":>8} {"MoD":>8} {"ratio":>6}     '
          '8 questions of 10 tokens')
    for part in full:
        share = f'{routed[part] / full[part]:6.2f}' if full[part] else '     -'
        print(f'{part:14} {full[part] / 1e6:8.1f} {routed[part] / 1e6:8.1f} {share}')
    path = Path('out/modvideo.png')
    path.parent.mkdir(exist_ok=True)
    draw_tokens(video[0], route).save(path)
    print(f'\nwhat the untrained router of layer 0 picks: {path}')


if __name__ == '__main__':
    main()
