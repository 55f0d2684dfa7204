# SPDX-License-Identifier: MIT-0
"""modvideo: a small video-language model that spends less on video. One file; the model needs torch
alone, the pictures numpy and Pillow.

    - a per-frame vision transformer with a convolutional stem, fed frames and frame differences
    - a GPT-style decoder: pre-norm, RMSNorm, rotary positions, scaled dot-product attention,
      a cache of keys and values
    - Mixture-of-Depths (MoD): in chosen layers only the highest-scoring vision tokens of each frame
      are processed (gathered, scattered back), the others skip the layer for real; text never skips
    - streams: frames come one by one, words stand between them, the model speaks when it matters;
      a window keeps speed and memory level, layers cache only the tokens that they processed
    - gamma-MoD: a trained dense model converted, in the layers whose attention has the lowest rank
    - fewer vision tokens: HoliTom merges what stands still and keeps what is looked at, without any
      training, before and inside the decoder; B-VLLM selects frames and tokens by the question;
      VQToken turns a clip into a dozen cluster means and a map of where they came from
    - vector quantization with a learned codebook: straight-through, moving averages, revival
    - an encoder that merges neighbouring frames step by step (TempMe), for the decoder, or to find
      clips by sentences: two towers, contrastive loss, tuned through a few parameters (LoRA)
    - one description, `Reduction`, for every way of merging, clustering or dropping tokens
    - several questions per clip that share the vision tokens and do not see each other
    - FLOP counts, safe checkpoints, pictures of what was processed

    video (B, T, 3, height, width)                   text (B, Q, L) word ids
       |  PatchEmbed, per frame                        |  embedding
    patches (B*T, P, C)                                |
       |  VisionEncoder: n blocks, no mask             |      (TempMe: frames merge here)
    patches (B*T, P, C)                                |
       |  projector                                    |
    vision tokens (B, N, C)                            |
       |  HoliTom, B-VLLM, VQToken: N -> M tokens      |
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
    1 configuration   2 transformer bricks   3 token reduction   4 merging and clustering
    5 quantization   6 vision encoder   7 frame selection   8 Mixture-of-Depths   9 the model
    10 accounting   11 save, load, draw

Papers:
    Raposo et al., Mixture-of-Depths, arXiv 2404.02258    the routed update, equation 1
    Wu et al., VideoLLM-MoD, arXiv 2408.16730             selection per frame, on vision tokens only
    Chen et al., VideoLLM-online, arXiv 2406.11816        when to speak: the streaming loss
    Luo et al., gamma-MoD, arXiv 2410.13859               rank of attention, one router for all layers
    Shao et al., HoliTom, arXiv 2505.21334                segments, static tokens, merging in a layer
    Bolya et al., ToMe, arXiv 2210.09461                  merging in pairs
    Lu et al., B-VLLM, arXiv 2412.09919                   frames by the question, a budget of tokens
    Zhang et al., VQToken, arXiv 2503.16980               a codebook for each clip, an index map
    Shen et al., TempMe, arXiv 2409.01156                 merging inside the encoder, retrieval
    Hu et al., LoRA, arXiv 2106.09685                     learning a few directions of a frozen map
    van den Oord et al., VQ-VAE, arXiv 1711.00937         a learned codebook

Usage:
    vocab = ['<pad>', '<eos>', 'what', 'moves']
    config = ModVideoConfig(**PRESETS['tiny'], vocab=vocab, placement='all')
    model = ModVideo(config)
    video = torch.rand(2, 4, 3, 32, 32)                             # (B, T, 3, height, width)
    text = torch.tensor([[[2, 3]], [[2, 3]]])                       # (B, Q, L)
    logits, loss, aux = model(video, text)                          # (2, 1, 2, 4), None, dict
    answer = model.generate(video, text, max_new_tokens=3)          # (2, 1, 3)
    draw_tokens(video[0], aux['routes'][0]).save('tokens.png')      # what layer 0 processed
    model = ModVideo(ModVideoConfig(**PRESETS['tiny'], vocab=vocab, streaming=True, window=3))
    for moment in model.stream((frame, None) for frame in video.unbind(1)):
        print(moment['silence'], moment['said'])                    # (2,) P(silence), ids or None

Left out: distributed training, tokenizers (a word is a token), pretrained weights, dropout.
"""
import functools
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
# 'frame': a router in each layer, the best of every frame. 'sequence': one router for all layers, the
# best of the clip. 'random', 'uniform': as many of every frame, without a router.
ROUTINGS = ['frame', 'sequence', 'random', 'uniform']
GATES = {                                   # from the score r to the factor of a token's update
    'raposo': lambda r: r,
    'gamma': torch.sigmoid,      # of the MLP alone; a softmax over two scores, written as one score
    'zero': lambda r: 1 + 0.2 * r.tanh(),   # w = 0 at first: a converted dense model is as it was
    'none': torch.ones_like}
# Before the decoder: 'holitom' merges, 'bvllm' selects by the question, 'vqtoken' clusters a clip, 'vq'
# replaces each token by a code. Baselines: 'uniform' keeps whole frames, evenly spaced, 'prune' the most
# looked-at tokens, 'tome' merges in pairs, 'pool' averages over a grid.
REDUCTIONS = ['none', 'holitom', 'bvllm', 'vqtoken', 'vq', 'uniform', 'prune', 'tome', 'pool']

GPU = dict(frames=16, frame_size=64, encoder_layers=2, encoder_dim=256, encoder_heads=4, n_layer=8,
           dim=256, n_head=4, merge_image=0.25, merge_cross=0.4, merge_intra=0.2, tower_layers=6)
PRESETS = {
    'tiny': dict(frames=4, frame_size=32, encoder_layers=1, encoder_dim=64, encoder_heads=2,
                 n_layer=3, dim=64, n_head=2),                                # tests and smoke runs
    'cpu': dict(frames=8, frame_size=32, encoder_layers=1, encoder_dim=96, encoder_heads=3,
                n_layer=4, dim=96, n_head=3),                                   # 128 vision tokens
    'gpu': GPU,                                                               # 1,024 vision tokens
    'deep': dict(GPU, n_layer=16),
    'long': dict(GPU, frames=64, frame_size=128),                            # 16,384 vision tokens
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
    encoder: str = 'plain'            # or 'tempme': merges tokens on the way, across frames too
    merge_image: float = 0.07         # share of a frame's patches that merge in each early layer
    merge_cross: float = 0.3          # share of all tokens that merge when clips are joined,
    merge_intra: float = 0.1          # and inside the joined clip, behind attention
    # retrieval
    tower_layers: int = 4             # of both towers of a Retriever, as wide as the encoder
    lora_rank: int = 0                # 0 = everything learns
    # decoder
    n_layer: int = 4
    dim: int = 96                     # C
    n_head: int = 3                   # H
    # Mixture-of-Depths
    placement: str = 'none'           # which layers route: a name that mod_layers knows, or '1,3,4'
    keep_ratio: float = 0.2   # share of the vision tokens that a routed layer processes, rounded up
    routing: str = 'frame'            # one of ROUTINGS: who selects, among which tokens
    gate: str = 'raposo'              # one of GATES: what the router's score makes of an update
    routing_loss: float = 0.01        # weight of the router's own loss; 'sequence' only
    # fewer vision tokens
    reduction: str = 'none'           # one of REDUCTIONS, before the decoder
    retain_ratio: float = 0.1         # share of them that stays
    tau: float = 0.8                  # similarity above which a patch stands still
    inner_layer: int = 0              # decoder layer before which vision tokens merge again, 0 = none
    inner_ratio: float = 0.5          # share of them that is merged away there
    budget: int = 32                  # 'bvllm' and the baselines: the most vision tokens of a clip
    codes: int = 12                   # 'vqtoken': tokens of a clip, 0 = found for each; 'vq': all codes
    select_frames: int = 8            # 'bvllm': queries that look for frames
    hard: bool = False                # 'bvllm': a query takes one frame whole in place of a mixture
    # streaming
    streaming: bool = False  # text stands between frames, a frame's last token decides about speech
    window: int = 0                   # frames that a token still sees besides the prompt, 0 = all
    silence_weight: float = 1.0       # w of the streaming loss

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
        for name in ('keep_ratio', 'retain_ratio'):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f'{name} must be above 0 and at most 1, got {getattr(self, name)}')
        for name in ('inner_ratio', 'merge_image', 'merge_cross', 'merge_intra'):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f'{name} must be from 0 to below 1, got {getattr(self, name)}')
        for name, known in (('routing', ROUTINGS), ('gate', GATES), ('reduction', REDUCTIONS),
                            ('encoder', ['plain', 'tempme'])):
            if getattr(self, name) not in known:
                raise ValueError(f'{name} must be one of {", ".join(known)}, '
                                 f'got {getattr(self, name)!r}')
        if self.routing == 'frame' and self.gate == 'none':
            raise ValueError("gate 'none' would leave the routers without a gradient; "
                             "routing 'frame' wants another gate")
        if self.routing == 'sequence' and self.streaming:
            raise ValueError("routing 'sequence' looks at the whole clip, "
                             'a stream does not have it yet')
        if self.reduction == 'uniform' and self.budget < self.patches:
            raise ValueError(f'a budget of {self.budget} tokens holds no frame of {self.patches}')
        if self.codes < (self.reduction == 'vq') or self.budget < 1:
            raise ValueError(f'budget and codes must be at least 1, got {self.budget} and {self.codes}')
        if not 0 <= self.inner_layer < self.n_layer:
            raise ValueError(f'inner_layer must be from 0 to {self.n_layer - 1}, got {self.inner_layer}')
        if self.reduction == 'vq' and (self.streaming or self.inner_layer):
            raise ValueError("reduction 'vq' is for whole clips, without merging inside the decoder")
        if self.encoder == 'tempme' and self.reduction != 'none':
            raise ValueError("encoder 'tempme' merges already and goes with reduction 'none' alone, "
                             f'got {self.reduction!r}')
        if self.merges and (self.streaming or self.routing != 'frame'):
            raise ValueError("merging looks at the whole clip and goes with routing 'frame' alone, got "
                             f'streaming {self.streaming} and routing {self.routing!r}')
        if self.window < 0 or (self.window and not self.streaming):
            raise ValueError('window is a number of frames for streaming models, '
                             f'got {self.window}')

    @property
    def by_question(self) -> bool:
        """Whether a clip's vision tokens depend on the question, so that each question has its own."""
        return self.reduction == 'bvllm' or self.inner_layer > 0

    @property
    def merges(self) -> bool:
        """Whether a clip's vision tokens become fewer, and a different number in each clip."""
        return self.reduction not in ('none', 'vq') or self.inner_layer > 0 or self.encoder == 'tempme'

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

NEVER = 2 ** 40     # position of padding: later than any query, so no query sees it


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


def visible(query: Tensor, key: Tensor = None) -> Tensor:
    """Positions (B, S), (B, S') -> (B, 1, S, S') bool: which keys are not later than each query."""
    key = query if key is None else key
    return (key[:, None, :] <= query[:, :, None])[:, None]


def hashed(x: Tensor) -> Tensor:
    """Whole numbers (int64, not negative) -> as if drawn at random from 0 to 2**32 - 1."""
    x = (x + 1) * 1000003 % 2 ** 32
    for _ in range(2):                         # mix the bits of 32-bit numbers; products fit 63 bits
        x = ((x ^ (x >> 15)) * 1103515245 + 12345) % 2 ** 32
    return x


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
        return self.k, self.v, visible(position, self.position)

    def trim(self, keep):
        """Forget what keep: position (B, S) -> (B, S) bool says no to, and padding.

        By position, since the same index means another token in every layer.
        """
        if self.k is not None:
            kept = keep(self.position) & (self.position < NEVER)               # (B, S)
            column = kept.any(0).nonzero()[:, 0]              # held as long as one sample wants it
            self.k, self.v = self.k.index_select(2, column), self.v.index_select(2, column)
            self.position = self.position.masked_fill(~kept, NEVER).index_select(1, column)

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

    def project(self, x: Tensor, position: Tensor = None):
        """Queries, keys, values of x (B, S, C): (B, H, S, D) each."""
        B, S, C = x.shape
        q, k, v = self.qkv(x).view(B, S, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        return (q, k, v) if position is None else (rotary(q, position), rotary(k, position), v)

    def weights(self, x: Tensor, position: Tensor = None, mask: Tensor = None, row: Tensor = None) -> Tensor:
        """How much each token, or only token row (B,), looks at each other: (B, H, S, S) or (B, H, 1, S)."""
        q, k, _ = self.project(x, position)                                    # (B, H, S, D)
        if row is not None:
            q = q.take_along_dim(row[:, None, None, None], 2)                  # (B, H, 1, D)
        score = (q @ k.mT / math.sqrt(q.size(-1))).float()
        if mask is None and self.causal:
            mask = torch.ones(score.shape[2:], dtype=torch.bool, device=x.device).tril()
        return (score if mask is None else score.masked_fill(~mask, -math.inf)).softmax(-1)

    def forward(self, x: Tensor, position: Tensor = None, mask: Tensor = None,
                cache: KVCache = None) -> Tensor:
        """x (B, S, C), position (S,), (B, S) or None (no rotary) -> (B, S, C).

        mask: (S, S) or (B, 1, S, S) bool, True where a row sees a column; a filled cache makes its own.
        """
        q, k, v = self.project(x, position)
        if cache is not None:
            k, v, seen = cache.extend(k, v, position)
            mask = mask if seen is None else seen
        return self.mix(q, k, v, mask)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor = None) -> Tensor:
        """What project gave -> (B, S, C). mask: bool as in forward, or float to be added to the scores."""
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask,
                                           is_causal=self.causal and mask is None)
        return self.out(y.transpose(1, 2).flatten(2))


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
                cache: KVCache = None, mlp_gate: Tensor = None) -> Tensor:
        """x (B, S, C), mlp_gate (B, S, 1): a factor of the MLP's part -> f(x) (B, S, C)."""
        a = self.attention(self.norm1(x), position, mask, cache)
        m = self.mlp(self.norm2(x + a))
        return a + (m if mlp_gate is None else (m * mlp_gate).to(m.dtype))


def block_flops(S: int, C: int, expansion: int = 4) -> int:
    """Block on S tokens, C channels; a token: qkv, out 4C², MLP 2*expansion*C², attention 2SC."""
    return 2 * S * (4 * C * C + 2 * expansion * C * C) + 4 * S * S * C


# --------------------------------------------------------------------------------------------------
# 3. Token reduction
# Pruning, merging, clustering, quantizing and de-duplicating are one act: every input token goes to
# one output slot with a weight, or is dropped. A method only decides (a `Reduction`);
# `reduce_tokens` does it.
# stands alone
# --------------------------------------------------------------------------------------------------

class Reduction(NamedTuple):
    """Where every one of N tokens goes. Padding is last; unless its maker says otherwise, slots are
    in ascending position."""
    assign: Tensor      # (B, N) int64: output slot of each input token; -1 = dropped
    weight: Tensor      # (B, N) float32: its share of that slot; the shares of a slot sum to 1
    position: Tensor    # (B, M) int64: the input index at which the slot stands; N for padding
    mask: Tensor   # (B, M) bool: False where a sample has fewer slots than the longest of its batch


def flat_slots(assign: Tensor, M: int) -> Tensor:
    """(B, N) slots -> (B*N,) rows of a flat (B, M + 1) table; its last column takes the dropped."""
    return (assign % (M + 1) + (M + 1) * torch.arange(len(assign), device=assign.device)[:, None]).flatten()


def slot_sums(x: Tensor, assign: Tensor, M: int) -> Tensor:
    """The sum of what each of M slots gets: x (B, N, C) or (B, N), assign (B, N) -> (B, M, C) or (B, M)."""
    B = len(x)
    table = x.new_zeros(B * (M + 1), *x.shape[2:]).index_add(0, flat_slots(assign, M), x.flatten(0, 1))
    return table.unflatten(0, (B, M + 1))[:, :M]


def look_up(table: Tensor, index: Tensor, missing) -> Tensor:
    """table (B, K) at index (B, N) -> (B, N), `missing` at -1 (dropped) and at K (padding)."""
    return F.pad(table, (0, 1), value=missing).gather(1, index % (table.size(1) + 1))


def reduce_tokens(x: Tensor, reduction: Reduction) -> Tensor:
    """Weighted sum of each slot's tokens, in float32: x (B, N, C) -> (B, M, C); padding is zero."""
    rows = x.float() * reduction.weight[..., None]                             # (B, N, C)
    return slot_sums(rows, reduction.assign, reduction.position.size(1)).to(x.dtype)


def expand(y: Tensor, reduction: Reduction) -> Tensor:
    """Un-merge y (B, M, C) -> (B, N, C): a copy of its slot for each token, zeros for dropped."""
    padded = F.pad(y, (0, 0, 0, 1)).flatten(0, 1)                  # (B*(M + 1), C) a sample's last row: zeros
    rows = padded.index_select(0, flat_slots(reduction.assign, y.size(1)))     # (B*N, C)
    return rows.view(*reduction.assign.shape, y.size(2))


def slot_sizes(reduction: Reduction, size: Tensor = None) -> Tensor:
    """Input tokens of each slot: (B, M) float32. size (B, N): what the inputs stand for already."""
    size = torch.ones_like(reduction.weight) if size is None else size.float()
    return slot_sums(size, reduction.assign, reduction.position.size(1))


def compose(first: Reduction, second: Reduction) -> Reduction:
    """One reduction that does `first` (N -> M1), then `second` (M1 -> M2)."""
    assign = look_up(second.assign, first.assign, -1)                          # (B, N)
    weight = first.weight * look_up(second.weight, first.assign, 0)            # (B, N)
    position = look_up(first.position, second.position, first.assign.size(1))  # (B, M2)
    return Reduction(assign, weight, position, second.mask)


def first_members(assign: Tensor, K: int) -> Tensor:
    """assign (B, N), -1 = none -> (B, K): the first token of each of K slots, N where it has none."""
    B, N = assign.shape
    index = torch.arange(N, device=assign.device).expand(B, N)
    table = torch.full((B, K + 1), N, device=assign.device)
    return table.scatter_reduce(1, assign % (K + 1), index, 'amin')[:, :K]


def from_clusters(assign: Tensor, num_clusters: int, position: Tensor = None) -> Reduction:
    """The reduction that averages clusters.

    assign (B, N): int64 in [0, num_clusters), or -1 to drop the token. position (B, num_clusters):
    where each cluster stands; None: at its first member. Slots are reordered to ascending position;
    clusters without members become padding.
    """
    N, first = assign.size(1), first_members(assign, num_clusters)             # (B, K)
    position = first if position is None else torch.where(first < N, position, N)
    position, order = position.sort(dim=1, stable=True)          # (B, K) ascending, empty ones last
    return mean_of(look_up(order.argsort(1), assign, -1), position)


def mean_of(assign: Tensor, position: Tensor) -> Reduction:
    """Slots that are the plain mean of their members: assign (B, N), position (B, M), N at padding."""
    (B, N), M = assign.shape, position.size(1)
    count = slot_sums(torch.ones(B, N, device=assign.device), assign, M)       # (B, M)
    return Reduction(assign, look_up(1 / count.clamp(min=1), assign, 0), position, position < N)


def pack(keep: Tensor) -> Reduction:
    """Keep some tokens, drop the others: keep (B, N) bool. M is the most that a sample keeps."""
    N, M = keep.size(1), int(keep.sum(1).max())                    # waits for the device: M is data
    assign = torch.where(keep, keep.cumsum(1) - 1, -1)                         # (B, N)
    index = torch.arange(N, device=keep.device)
    position = torch.where(keep, index, N).sort(1).values[:, :M]               # (B, M)
    return Reduction(assign, keep.float(), position, position < N)


# --------------------------------------------------------------------------------------------------
# 4. Merging and clustering
# Which tokens say the same? In pairs (ToMe, Bolya et al., arXiv 2210.09461), around density peaks
# (DPC-KNN, Du et al., 2016) or means (k-means, Lloyd, 1982), over time (HoliTom, Shao et al., arXiv
# 2505.21334). Similarities and distances are float32. All but pairs in a frame look at the whole
# clip: for offline use only.
# needs section 3
# --------------------------------------------------------------------------------------------------

def exact(function):
    """Run it outside autocast: what is alike is decided in float32, whatever the compute dtype."""
    @functools.wraps(function)
    def run(*args, **more):
        first = next(a for a in (*args, *more.values()) if isinstance(a, Tensor))
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **more)
    return run


def precise(x: Tensor) -> Tensor:
    """float64, so that ratios round as they do in Python; Apple's GPUs have float32 at most."""
    return x.float() if x.device.type == 'mps' else x.double()


def unit(x: Tensor) -> Tensor:
    """Vectors of length one, in float32; zero stays zero."""
    return F.normalize(x.float(), dim=-1, eps=1e-6)


def best_of(score: Tensor, count, among: Tensor) -> Tensor:
    """The `count` highest of the scores that are `among`: bool, as they are. Ties: the earlier one."""
    rank = score.float().masked_fill(~among, -math.inf).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return among & (rank < count)


@exact
def bipartite_soft_matching(metric: Tensor, r, protected: int = 0, size: Tensor = None,
                            pairing='parity', mask: Tensor = None) -> Reduction:
    """ToMe: merge the r sources that resemble a destination most: N tokens -> N - r.

    metric (B, N, C), r int or (B,) int64, the first `protected` tokens never merge. pairing:
    'parity', the tokens at even places (protected ones counted) are sources, odd ones destinations;
    or (N,) bool, True for sources. size (B, N): what tokens stand for already, their weight in a
    mean. mask (B, N) bool: False is padding, which is dropped. At most half of the tokens merge.
    Slots: protected, sources that stay, destinations.
    """
    (B, N, _), device = metric.shape, metric.device
    place = torch.arange(N, device=device)
    source = (place % 2 == 0) if isinstance(pairing, str) else pairing.to(device)
    a, b = (place[(place >= protected) & (source == which)] for which in (True, False))
    real = torch.ones(B, N, dtype=torch.bool, device=device) if mask is None else mask
    if len(b) == 0:                                                            # nobody to merge with
        return pack(real)
    most = torch.minimum(real[:, a].sum(1), (real.sum(1) - protected) // 2) * real[:, b].any(1)
    r = torch.minimum(torch.as_tensor(r, device=device), most).clamp(min=0)    # (B,)
    u = unit(metric.detach())
    score = (u[:, a] @ u[:, b].mT).masked_fill(~real[:, None, b], -math.inf)   # (B, A, D)
    best, choice = score.max(-1)
    gone = ~real                                                               # (B, N) without a slot
    gone[:, a] |= best_of(best, r[:, None], real[:, a])
    front = torch.cat([place[:protected], a, b])                               # (N,) in slot order
    assign = torch.empty(B, N, dtype=torch.long, device=device)
    assign[:, front] = (~gone[:, front]).cumsum(1) - 1
    assign[:, a] = torch.where(gone[:, a], assign[:, b].gather(1, choice), assign[:, a])
    M = int((~gone).sum(1).max())                                  # waits for the device: M is data
    assign = assign.masked_fill(~real, -1)
    position = torch.full((B, M + 1), N, device=device).scatter(
        1, torch.where(gone, M, assign), place.expand(B, N))[:, :M]            # (B, M)
    size = real.float() if size is None else size.float() * real
    plain = Reduction(assign, size, position, position < N)
    total = look_up(slot_sizes(plain, size), assign, 1)                        # (B, N)
    return plain._replace(weight=size / total.clamp(min=1e-6))


def tome(x: Tensor, budget: int) -> Reduction:
    """ToMe until `budget` of x (B, N, C) remain: rounds in which at most half of the tokens merge."""
    size, whole = None, pack(torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))
    while x.size(1) > budget:
        step = bipartite_soft_matching(x, x.size(1) - budget, size=size)
        x, size, whole = reduce_tokens(x, step), slot_sizes(step, size), compose(whole, step)
    return from_clusters(whole.assign, x.size(1))


def pool_grid(T: int, side: int, budget: int) -> Tensor:
    """Uniform pooling: the cell of each token of T frames of side * side patches, (N,) int64.

    Frames fall into a equal parts, both sides of a frame into b, with the most cells a * b² of at most
    `budget`; of equals the one with the most parts of time.
    """
    b = max(range(1, side + 1), key=lambda b: (min(T, budget // b ** 2) * b * b, -b))
    return grid_cells(T, side, min(T, budget // b ** 2), b)


def grid_cells(T: int, side: int, a: int, b: int) -> Tensor:
    """(T * side * side,) int64: which of a * b * b cells of time and space each patch is in."""
    time, place = torch.arange(T) * a // T, torch.arange(side) * b // side
    return ((time[:, None, None] * b + place[:, None]) * b + place).flatten()


@exact
def dpc_knn(x: Tensor, num_clusters, k: int = 7, mask: Tensor = None):
    """Density-peak clustering: centres are dense and far from anything denser.

    x (B, N, C), num_clusters int or (B,) int64, mask (B, N) bool: the tokens that take part.
    density = exp(-mean squared distance to the k nearest, itself included, k at most the number of
    clusters); centres have the highest density * distance to the nearest denser token.
    -> centers (B, K) int64, ascending, N where a sample has fewer; assign (B, N) int64: the nearest
    centre's place in the list, -1 outside the mask. Ties: the earlier token.
    """
    B, N, C = x.shape
    mask = torch.ones(B, N, dtype=torch.bool, device=x.device) if mask is None else mask
    count = torch.minimum(torch.as_tensor(num_clusters, device=x.device), mask.sum(1))     # (B,)
    both = mask[:, :, None] & mask[:, None, :]                                 # (B, N, N)
    distance = torch.cdist(x.float(), x.float(), compute_mode='donot_use_mm_for_euclid_dist')
    distance = distance / math.sqrt(C)                                         # (B, N, N) exact at 0
    far = distance.masked_fill(~both, math.inf)
    near = far.square().topk(min(k, N), largest=False).values                  # (B, N, k)
    k = count.clamp(1, min(k, N))[:, None]                                     # (B, 1)
    some = torch.arange(near.size(-1), device=x.device) < k[..., None]         # (B, 1, k)
    density = (-near.masked_fill(~some, 0).sum(-1) / k).exp()                  # (B, N)
    denser = (density[:, None, :] > density[:, :, None]) & both
    gap = distance.masked_fill(~denser, math.inf).amin(-1)                     # (B, N)
    widest = distance.masked_fill(~both, 0).amax((1, 2))[:, None]
    score = density * torch.where(gap.isinf(), widest, gap)                    # (B, N)
    centers = pack(best_of(score, count[:, None], mask)).position              # (B, K)
    reach = F.pad(far, (0, 1), value=math.inf).take_along_dim(centers[:, None], 2)     # (B, N, K)
    assign = reach.argmin(-1) if centers.size(1) else torch.full((B, N), -1, device=x.device)
    return centers, torch.where(mask & (count > 0)[:, None], assign, -1)


def cluster_sums(x: Tensor, assign: Tensor, K: int):
    """x (B, N, C), assign (B, N), -1 = none of them -> sums (B, K, C) and counts (B, K) of clusters."""
    return slot_sums(x, assign, K), slot_sums(torch.ones_like(x[..., 0]), assign, K)


@exact
def nearest(x: Tensor, centers: Tensor, metric: str) -> Tensor:
    """The centre of each token: x (B, N, C), centers (B, K, C) -> (B, N) int64. Ties: the first.

    |x - c|² is smallest where x·c - |c|²/2 is largest; the angle, where x·c/|c| is.
    """
    if metric == 'cosine':
        return torch.bmm(x, unit(centers).mT).argmax(-1)
    return torch.baddbmm(-0.5 * centers.square().sum(-1)[:, None], x, centers.mT).argmax(-1)


def spread_centers(x: Tensor, K: int, mask: Tensor, generator: torch.Generator = None,
                   trials: int = 8) -> Tensor:
    """k-means++ (Arthur & Vassilvitskii, 2007), greedy: x (B, N, C), mask (B, N) -> (B, K, C).

    A token becomes the next centre with a chance in proportion to its squared distance to the nearest
    centre so far; of `trials` such tokens the one stays that leaves the smallest sum of them. The
    first k of K centres are what K = k would give. The same chances for each sample of a batch.
    """
    (B, N, C), device = x.shape, x.device
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    luck = torch.rand(K, trials, generator=generator).to(precise(x[:0]))       # in [0, 1)
    square, rows = x.square().sum(-1), torch.arange(B, device=device)          # (B, N), (B,)
    last = (mask * torch.arange(N, device=device)).amax(1, keepdim=True)       # (B, 1) taken if all gaps are 0
    far, chosen = mask.to(x.dtype), []                     # (B, N) squared distance; at first any token
    for k in range(K):
        edge = precise(far).cumsum(1)                                          # (B, N)
        pick = torch.searchsorted(edge, luck[k] * edge[:, -1:], right=True).minimum(last)
        tried = x[rows[:, None], pick]                                         # (B, trials, C)
        gap = square[..., None] - 2 * x @ tried.mT + square.gather(1, pick)[:, None]
        gap = gap.clamp(min=0).masked_fill(~mask[..., None], 0)                # (B, N, trials)
        gap = gap if k == 0 else torch.minimum(gap, far[..., None])
        best = gap.sum(1).argmin(-1)                                           # (B,)
        far = gap[rows, :, best]
        chosen.append(tried[rows, best])
    return torch.stack(chosen, 1)


@exact
@torch.no_grad()
def kmeans(x: Tensor, num_clusters: int, iters: int = 10, init: Tensor = None, metric: str = 'l2',
           generator: torch.Generator = None, mask: Tensor = None):
    """Lloyd's algorithm: x (B, N, C) -> centroids (B, K, C) float32, assign (B, N) int64.

    init (B, K, C), or None: spread_centers with the generator, or with a seed of 0. metric 'l2', or
    'cosine': of tokens of length one, but means as they come. mask (B, N) bool: tokens that take part;
    the others get -1. assign is the nearest of the centroids that are returned. Clusters are in order
    of their first token; an empty one keeps its centre, those stand last. ValueError: another metric.
    """
    if metric not in ('l2', 'cosine'):
        raise ValueError(f"metric must be 'l2' or 'cosine', got {metric!r}")
    K, x = num_clusters, unit(x) if metric == 'cosine' else x.float()
    mask = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
    centers = spread_centers(x, K, mask, generator) if init is None else init.float()
    for _ in range(iters):
        sums, members = cluster_sums(x, nearest(x, centers, metric).where(mask, -1), K)
        centers = torch.where(members[..., None] > 0, sums / members[..., None].clamp(min=1), centers)
    assign = nearest(x, centers, metric).where(mask, -1)                       # (B, N)
    order = first_members(assign, K).argsort(dim=1, stable=True)               # (B, K)
    return centers.take_along_dim(order[..., None], 1), look_up(order.argsort(1), assign, -1)


@exact
@torch.no_grad()
def silhouette(x: Tensor, assign: Tensor, K: int) -> Tensor:
    """Mean silhouette by cosine distance, exact in O(N K C): x (B, N, C), assign (B, N) -> (B,).

    (b - a) / max(a, b): a, mean distance to the other tokens of the own cluster; b, to those of the
    nearest other cluster (Rousseeuw, 1987). A mean of 1 - u·v over v is 1 - u·(sum of v)/n.
    """
    u, real = unit(x), assign >= 0
    sums, count = cluster_sums(u, assign, K)                                   # (B, K, C), (B, K)
    along = u @ sums.mT                                                        # (B, N, K)
    own = assign.clamp(min=0)[..., None]                                       # (B, N, 1)
    n = count.gather(1, own[..., 0])                                           # (B, N)
    itself = u.square().sum(-1)                                                # 1, or 0 of a zero token
    a = 1 - (along.gather(2, own)[..., 0] - itself) / (n - 1).clamp(min=1)
    apart = (1 - along / count.clamp(min=1)[:, None]).masked_fill((count == 0)[:, None], math.inf)
    b = apart.scatter(2, own, math.inf).amin(-1)                               # (B, N)
    score = (b - a) / torch.maximum(a, b).clamp(min=1e-6)
    score = score.masked_fill(~real | (n < 2) | b.isinf(), 0)    # alone in a cluster: 0 by definition
    return score.sum(1) / real.sum(1).clamp(min=1)


@exact
@torch.no_grad()
def select_k(x: Tensor, least: int = 4, most: int = 32, iters: int = 3):
    """k-means by cosine with the number of clusters that has the best silhouette, for each sample.

    x (B, N, C) -> count (B,) int64, centroids (B, most, C), assign (B, N) of that very fit. All fits
    begin with the same k-means++ centres, as many of them as they need; so close to the end few
    iterations do.
    """
    u, fits = unit(x), []
    init = spread_centers(u, most, torch.ones_like(u[..., 0], dtype=torch.bool))
    for k in range(least, most + 1):
        centers, assign = kmeans(u, k, iters, init[:, :k], 'cosine')
        fits.append((silhouette(u, assign, k), F.pad(centers, (0, 0, 0, most - k)), assign))
    score, centers, assign = (torch.stack(a, 1) for a in zip(*fits))           # (B, fits), ...
    sample, best = torch.arange(len(x), device=x.device), score.argmax(1)      # of equals the fewest
    return best + least, centers[sample, best], assign[sample, best]


def temporal_segments(similarity: Tensor, tau: float, max_len: int = None):
    """HoliTom's segments: cut T frames so that the most tokens repeat what the frame before showed.

    similarity (B, T - 1, P): of each patch with itself one frame later. A patch is static in a
    segment if every step inside is above tau; merging it saves length - 1 tokens. The best of all
    partitions, by dynamic programming: best[i] = max over lengths w of best[i - w] + gain. Ties: the
    shortest last segment. max_len: of a segment, None = any, 0 or 1 = every frame alone.
    -> segment (B, T) int64, 0, 0, 1, 1, 1, 2 ...; gain (B,) int64, the tokens saved.
    """
    (B, steps, P), device = similarity.shape, similarity.device
    T = steps + 1
    longest = min(T, max(1, T if max_len is None else max_len))
    step = torch.arange(1, T, device=device)[:, None]                          # (T - 1, 1)
    broken = torch.where(similarity > tau, 0, step)                            # (B, T - 1, P)
    run = step - broken.cummax(1).values           # (B, T - 1, P) still steps up to here
    table = torch.zeros(B, steps, T, dtype=torch.long, device=device)
    table.scatter_add_(2, run, torch.ones_like(run))                           # patches by run length
    still = table.flip(2).cumsum(2).flip(2)                   # (B, T - 1, T) patches with run >= n
    gains = still * torch.arange(T, device=device)            # of the segment of n + 1 frames
    best = torch.zeros(B, T + 1, dtype=torch.long, device=device)              # of the first i frames
    length = torch.ones(B, T, dtype=torch.long, device=device)      # of the segment that ends there
    for i in range(2, T + 1):
        w = min(i, longest)
        total = best[:, i - w:i].flip(1) + gains[:, i - 2, :w]                 # (B, w)
        best[:, i], choice = total.max(1)      # the first of equals: the shortest
        length[:, i - 1] = choice + 1
    begins = torch.zeros(B, T, dtype=torch.long, device=device)
    end = torch.full((B, 1), T, device=device)                                 # one behind the last
    for _ in range(T):
        end = (end - length.gather(1, (end - 1).clamp(min=0))).clamp(min=0)
        begins.scatter_(1, end, 1)
    return begins.cumsum(1) - 1, best[:, T]


@exact
def holitom(x: Tensor, saliency: Tensor, retain_ratio: float = 0.10, tau: float = 0.8,
            beta: float = 0.6, k: int = 7, max_len: int = None) -> Reduction:
    """HoliTom before the decoder: merge what stands still, keep what is looked at. No training.

    x (B, T, P, C), saliency (B, T, P): attention that each token receives. Static tokens of a segment
    become one, their mean over time; of these, density peaks stay and take the others in, themselves
    with weight beta (None: a plain mean). Of the other tokens the most salient stay. What time saves,
    space may spend: the ratio is retain_ratio over the share that time leaves, at most one.
    """
    (B, T, P, C), N, u, device = x.shape, x.size(1) * x.size(2), unit(x), x.device
    if not (retain_ratio >= 0 and x.isfinite().all() and saliency.isfinite().all()):
        raise ValueError(f'retain_ratio must be at least 0, got {retain_ratio}, and no token or saliency '
                         'NaN or infinite')
    similarity = (u[:, 1:] * u[:, :-1]).sum(-1)                                # (B, T - 1, P)
    segment, gain = temporal_segments(similarity, tau, max_len)
    share = precise(N - gain) / N                                              # (B,)
    ratio = (retain_ratio / share).clamp(max=1)                                # (B,)

    # Of every segment s: which patches stand still all through it, and their means over time.
    S = int(segment.max()) + 1                                                 # waits for the device
    frames = F.one_hot(segment, S).float()                                     # (B, T, S)
    length = frames.sum(1)                                                     # (B, S)
    moved = (segment[:, 1:] == segment[:, :-1])[..., None] & (similarity <= tau)
    static = (frames[:, 1:].mT @ moved.float() == 0) & (length > 1)[..., None]  # (B, S, P)
    mean = (frames.mT @ x.float().flatten(2)).view(B * S, P, C) / length.clamp(min=1).view(-1, 1, 1)

    # Density peaks among them; center: the patch that the group of each static patch stands at.
    peaks = (static.sum(-1) * ratio[:, None]).round().long()                   # (B, S)
    some = peaks.flatten().nonzero()[:, 0]                  # (n,) segments in which anything stays
    center = torch.full((B * S, P), P, device=device)
    if len(some):
        peak, group = dpc_knn(mean[some], peaks.flatten()[some], k, static.view(B * S, P)[some])
        center[some] = look_up(peak, group, P)
    center = center.view(B, S, P)
    members = torch.zeros(B, S, P + 1, device=device).scatter_add(
        2, center, torch.ones(B, S, P, device=device)).gather(2, center)       # (B, S, P) of its group
    alone = 1 / members
    if beta is not None:
        others = (1 - beta) / (members - 1).clamp(min=1)
        at_center = center == torch.arange(P, device=device)
        alone = torch.where(members == 1, 1.0, torch.where(at_center, beta, others))
    begin = frames.argmax(1)[..., None]                                        # (B, S, 1) first frame
    slot = torch.where(center < P, begin * P + center, -1)                     # (B, S, P)

    # Back to tokens: where each goes, -1 = dropped, and its share.
    own = segment[..., None].expand(B, T, P)
    still = static.gather(1, own)                                              # (B, T, P)
    quota = ((P - static.sum(-1)) * ratio[:, None]).ceil().gather(1, segment)  # (B, T) of moving ones
    kept = best_of(saliency, quota[..., None], ~still)                         # (B, T, P)
    index = torch.arange(N, device=device).view(T, P)
    goes = torch.where(still, slot.gather(1, own), torch.where(kept, index, -1)).flatten(1)  # (B, N)
    weight = torch.where(still, alone.gather(1, own) / length.gather(1, segment)[..., None],
                         kept.float()).flatten(1) * (goes >= 0)
    stands = torch.zeros(B, N + 1, dtype=torch.bool, device=device).scatter(1, goes % (N + 1), True)
    slots = pack(stands[:, :N])
    return slots._replace(assign=look_up(slots.assign, goes, -1), weight=weight)


@exact
def holitom_inner(h: Tensor, score: Tensor, vision: Tensor, drop_ratio: float = 0.5,
                  mask: Tensor = None) -> Reduction:
    """HoliTom inside the decoder: of the vision tokens the best by score stay and take in the others.

    h (B, S, C), score (B, S): attention of the last question token, vision (B, S) bool; all other
    tokens stay, but for padding, where mask (B, S) is False. A vision token that goes joins the one
    that stays and resembles it most (cosine); a slot is the mean of its members, where it stood.
    """
    B, S, _ = h.shape
    count = precise(vision.sum(1, keepdim=True))                               # (B, 1)
    keep = (count * (1 - drop_ratio)).round()                                  # half to even
    kept = best_of(score, keep, vision)                                        # (B, S)
    u = unit(h)
    alike = (u @ u.mT).masked_fill(~kept[:, None, :], -math.inf)               # (B, S, S)
    stays = kept | ~vision if mask is None else (kept | ~vision) & mask
    index = torch.arange(S, device=h.device).expand(B, S)
    goes = torch.where(stays, index, torch.where(vision & (keep > 0), alike.argmax(-1), -1))
    slots = pack(stays)
    return mean_of(look_up(slots.assign, goes, -1), slots.position)


# --------------------------------------------------------------------------------------------------
# 5. Quantization
# How few vectors can stand for a clip? VQToken (Zhang et al., arXiv 2503.16980): a codebook for each
# clip, by k-means, and a map of where every code occurs. Standard vector quantization (van den Oord
# et al., arXiv 1711.00937): one learned codebook for all clips. One step of the second with decay 0
# is one step of k-means. VQToken looks at the whole clip: for offline use only.
# needs sections 2 (`hashed`), 3, 4
# --------------------------------------------------------------------------------------------------

def code_usage(indices: Tensor, num_codes: int):
    """Share of the codes that occur, and their perplexity, exp(-sum p log p): 0-dim tensors."""
    count = torch.bincount(indices.flatten(), minlength=num_codes).float()
    p = count / count.sum().clamp(min=1)
    return (count > 0).float().mean(), torch.special.entr(p).sum().exp()


class Quantized(NamedTuple):
    """What became of the tokens of a clip."""
    index_map: Tensor   # (B, T, P) int64: the code of each token
    loss: Tensor        # (): the commitment loss


class VectorQuantizer(nn.Module):
    """Replace each vector by the nearest of num_codes codes, which follow the vectors as they change.

    codebook (K, C) = embed_avg / cluster_size, two moving averages. In training the first batch places
    the codes (k-means), and a code that falls below `revive` vectors a batch starts anew at one of them.
    """

    def __init__(self, num_codes: int, dim: int, decay: float = 0.99, commitment: float = 0.25,
                 revive: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.decay, self.commitment, self.revive, self.eps = decay, commitment, revive, eps
        self.register_buffer('codebook', torch.randn(num_codes, dim))          # (K, C)
        self.register_buffer('embed_avg', self.codebook.clone())               # m: sum of its vectors
        self.register_buffer('cluster_size', torch.ones(num_codes))            # n: how many they are
        self.register_buffer('calls', torch.zeros((), dtype=torch.long))       # seeds the revival
        self.started = False

    def get_extra_state(self):
        return self.started

    def set_extra_state(self, state):
        self.started = state

    def forward(self, x: Tensor):
        """x (..., C) -> quantized (..., C), indices (...), commit_loss.

        Straight-through: x + sg(code - x), whose gradient is that of x. The loss pulls x towards its
        code: commitment * mean (x - sg(code))². In training the codes move, behind that.
        """
        flat = x.reshape(-1, x.size(-1)).float()                               # (n, C)
        if self.training and not self.started:
            self.move(flat, kmeans(flat[None], len(self.codebook))[1][0], 0.0)
            self.started = True
        indices = nearest(flat.detach()[None], self.codebook[None], 'l2')[0]   # (n,)
        code = self.codebook.index_select(0, indices)                          # (n, C)
        loss = self.commitment * F.mse_loss(flat, code)
        if self.training:
            self.move(flat, indices, self.decay)
            self.revive_dead(flat)
        quantized = (flat + (code - flat).detach()).to(x.dtype)
        return quantized.view_as(x), indices.view(x.shape[:-1]), loss

    @torch.no_grad()
    def move(self, x: Tensor, indices: Tensor, decay: float):
        """Towards x (n, C), whose codes are indices (n,): averages first, then the division."""
        sums, count = (a[0] for a in cluster_sums(x[None], indices[None], len(self.codebook)))
        self.embed_avg.lerp_(sums, 1 - decay)
        self.cluster_size.lerp_(count, 1 - decay)
        total = self.cluster_size.sum()                  # Laplace smoothing leaves it as it is
        size = (self.cluster_size + self.eps) / (total + len(count) * self.eps) * total
        self.codebook.copy_(self.embed_avg / size[:, None])

    @torch.no_grad()
    def revive_dead(self, x: Tensor):
        """Codes that hardly occur become rows of x (n, C), chosen by the number of calls."""
        K, dead = len(self.codebook), self.cluster_size < self.revive
        row = hashed(torch.arange(K, device=x.device) + self.calls * K) % len(x)
        self.codebook.copy_(torch.where(dead[:, None], x[row], self.codebook))
        self.embed_avg.copy_(torch.where(dead[:, None], self.revive * x[row], self.embed_avg))
        self.cluster_size.clamp_(min=self.revive)
        self.calls += 1


class VQToken(nn.Module):
    """A clip in K tokens: means of its clusters, each told by attention where the codes occur.

    VQ-Attention takes queries and keys from the codes and values from an MLP over the map of a code.
    The paper flattens the map of ids; their order is arbitrary, and other ids for the same clusters
    would give other tokens. Here a code's map is its share of every cell of a small grid of time and
    space, so that ids do not matter, and there are K tokens for a clip of any length.
    """

    def __init__(self, dim: int, num_codes: int = 12, n_head: int = 4, grid=(8, 4), least: int = 4, most: int = 32):
        super().__init__()
        self.num_codes, self.n_head, self.grid, self.least, self.most = num_codes, n_head, grid, least, most
        self.iters = 10 if num_codes else 3                                    # of k-means
        self.norm = nn.RMSNorm(dim)
        self.query, self.key, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.value = nn.Sequential(nn.Linear(grid[0] * grid[1] ** 2, dim), nn.GELU(), nn.Linear(dim, dim))
        # At first a code attends to itself, as its query is its key, and is told where it occurs.
        nn.init.normal_(self.query.weight, std=1 / math.sqrt(dim))
        self.key.load_state_dict(self.query.state_dict())
        nn.init.normal_(self.out.weight, std=0.1 / math.sqrt(dim))             # a little; it is mostly the mean

    def occupancy(self, index_map: Tensor, K: int) -> Tensor:
        """(B, T, P) -> (B, K, cells): how much of each cell of the grid a code fills, 0 to 1."""
        (B, T, P), (a, b) = index_map.shape, self.grid
        cells, cell = a * b * b, grid_cells(T, math.isqrt(P), a, b).to(index_map.device)       # (N,)
        place = index_map.flatten(1) * cells + cell                            # (B, N)
        filled = slot_sums(torch.ones_like(place, dtype=torch.float), place, K * cells)
        size = torch.bincount(cell, minlength=cells).clamp(min=1)              # (cells,)
        return filled.unflatten(1, (K, cells)) / size

    def forward(self, x: Tensor):
        """x (B, T, P, C) -> tokens (B, K, C), mask (B, K), index_map (B, T, P) int64.

        Codes are in order of their first token. mask is False, and the token zero, where a clip has
        fewer codes than the others or fewer different tokens than codes.
        """
        B, T, P, C = x.shape
        x = x.flatten(1, 2)                                                    # (B, N, C)
        if self.num_codes:
            assign = kmeans(x, self.num_codes, self.iters, metric='cosine')[1]             # (B, N)
        else:                                                  # as many as have the best silhouette
            assign = select_k(x, self.least, self.most, self.iters)[2]
        K = self.num_codes or int(assign.max()) + 1              # waits for the device: K is data
        reduction = from_clusters(assign, K)
        codes, mask = reduce_tokens(x, reduction), reduction.mask              # (B, K, C), (B, K)
        index_map = reduction.assign.view(B, T, P)
        split = lambda y: y.view(B, K, self.n_head, -1).transpose(1, 2)        # (B, H, K, D)
        near = self.norm(codes)
        value = self.value(self.occupancy(index_map, K).to(codes.dtype))       # (B, K, C)
        y = F.scaled_dot_product_attention(split(self.query(near)), split(self.key(near)), split(value),
                                           attn_mask=mask[:, None, None])
        tokens = codes + self.out(y.transpose(1, 2).flatten(2)).to(codes.dtype)
        return tokens * mask[..., None], mask, index_map


def token_density(accuracy_percent: float, tokens: float) -> float:
    """TokDense of VQToken: percentage points of accuracy for each token that the decoder is given."""
    return accuracy_percent / tokens


# --------------------------------------------------------------------------------------------------
# 6. Vision encoder
# A vision transformer (Dosovitskiy et al., arXiv 2010.11929) on each frame alone. Its stem is
# convolutional (Xiao et al., arXiv 2106.14881) and also reads the change since the previous frame,
# the only place where motion is cheap. Behind it: one that merges frames on the way (TempMe).
# needs section 2; TempMe sections 3, 4
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
        self.channels = channels           # 6, or 3: frames without their changes
        self.stem = nn.Sequential(
            nn.Conv2d(channels, 32, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(64, dim, 3, stride=patch_size // 4, padding=1))
        keep_scale(self.stem)

    def forward(self, video: Tensor, previous: Tensor = None) -> Tensor:
        """video (B, T, 3, height, width) -> (B*T, P, C).

        previous (B, 1, 3, height, width): the frame before; None: the first did not change.
        """
        frames = video - 0.45
        if self.channels == 6:
            before = video[:, :1] if previous is None else previous
            change = video - torch.cat([before, video[:, :-1]], 1)
            frames = torch.cat([frames, change], 2)                            # (B, T, 6, height, width)
        return self.stem(frames.flatten(0, 1) / 0.2).flatten(2).transpose(1, 2)    # (B*T, P, C)

    def flops(self, size) -> int:
        """FLOPs of the stem on one frame of size (height, width)."""
        total = 0
        for conv in self.stem:
            if isinstance(conv, nn.Conv2d):
                size = tuple(-(-side // conv.stride[0]) for side in size)
                kernel = conv.in_channels * conv.kernel_size[0] ** 2
                total += 2 * size[0] * size[1] * conv.out_channels * kernel
        return total


class VisionEncoder(nn.Module):
    """PatchEmbed, learned places in the frame, blocks in which its patches see each other."""

    def __init__(self, dim: int, n_layer: int, n_head: int, patches: int, patch_size: int = 8,
                 channels: int = 6):
        super().__init__()
        self.embed = PatchEmbed(dim, patch_size, channels)
        self.place = nn.Parameter(0.2 * torch.randn(patches, dim))             # (P, C)
        self.blocks = nn.ModuleList(Block(dim, n_head, causal=False) for _ in range(n_layer))
        self.norm = nn.RMSNorm(dim)

    def forward(self, video: Tensor, previous: Tensor = None, want_saliency: bool = False):
        """video (B, T, 3, height, width), the frame before it or None -> (B*T, P, C), saliency.

        saliency (B*T, P), or None if not wanted: the attention that each patch receives in the last
        layer, mean over heads and queries; it sums to one. Only this layer's map is computed.
        """
        x, saliency = self.embed(video, previous) + self.place, None
        for block in self.blocks:
            before, x = x, x + block(x)
        if want_saliency:
            saliency = block.attention.weights(block.norm1(before).detach()).mean((1, 2))
        return self.norm(x), saliency

    def flops(self, T: int, size) -> int:
        """FLOPs on T frames of size (height, width)."""
        P, C = self.place.shape
        return T * (self.embed.flops(size) + len(self.blocks) * block_flops(P, C))


# TempMe (Shen et al., arXiv 2409.01156): the encoder merges while it encodes. First inside each frame,
# then neighbouring frames become one clip, step by step, until the whole video is one. A summary token
# (CLS) of each frame is never merged. It looks at the whole clip: for offline use only.

class MergeStep(NamedTuple):
    """What a layer merges."""
    factor: int     # so many neighbouring clips become one before attention
    cross: int      # tokens that then merge across them, before attention
    inner: int      # tokens that merge behind attention


def merge_schedule(n_layer: int, frames: int, patches: int, image: float = 0.04, cross: float = 0.3,
                   intra: float = 0.1) -> list:
    """A MergeStep for each layer, for any number of frames (TempMe, section 3; its shares are defaults).

    The prime factors of `frames` are dealt to at most three layers (a third of them, if there are few),
    the last but one and those before it: 12 -> 2, 2, 3. Earlier layers merge `image` of a frame's
    patches; these layers `cross` of all tokens across clips and `intra` of the rest inside; so does the
    last. At most half of the patches merge at once.
    """
    primes, rest = [], frames
    while rest > 1:
        primes.append(next(p for p in range(2, rest + 1) if rest % p == 0))
        rest //= primes[-1]
    parts = [1] * max(1, min(3, n_layer // 3))
    for prime in reversed(primes):
        parts[parts.index(min(parts))] *= prime
    factors = sorted(part for part in parts if part > 1)
    first = max(0, n_layer - 1 - len(factors)) if factors else n_layer
    n, c, steps = patches + 1, 1, []                        # tokens of a clip, summaries among them
    share = lambda n, ratio: int(n * ratio + 1e-9)
    for i in range(n_layer):
        M = factors[i - first] if first <= i < first + len(factors) else 1
        n, c = n * M, c * M
        across = min((n - c) // 2, share(n, cross)) if M > 1 else 0
        inside = min((n - across - c) // 2, share(patches, image) if i < first else share(n - across, intra))
        steps.append(MergeStep(M, across, inside))
        n -= across + inside
    return steps


def merge_tokens(x: Tensor, size, metric: Tensor, r: int, protected: int, pairing='parity'):
    """ToMe on x (B, n, C) whose tokens stand for size (B, n), None = one each -> x, size, Reduction."""
    if r == 0:
        return x, size, None
    step = bipartite_soft_matching(metric, r, protected, size, pairing)
    return reduce_tokens(x, step), slot_sizes(step, size), step


def image_block(block, x: Tensor, size, r: int, protected: int = 1):
    """A Block that merges r of x (B, n, C) between attention and MLP, by their keys -> as merge_tokens.

    Proportional attention (ToMe, section 3): softmax(q·k / sqrt(D) + log size of the key).
    """
    q, k, v = block.attention.project(block.norm1(x))                          # (B, H, n, D)
    bias = None if size is None else size.log()[:, None, None, :].to(q.dtype)
    x = x + block.attention.mix(q, k, v, bias)
    x, size, step = merge_tokens(x, size, k.detach().mean(1), r, protected)
    return x + block.mlp(block.norm2(x)), size, step


def joined_order(M: int, n: int, c: int, device=None) -> Tensor:
    """(M*n,): which of M clips' n tokens each, one clip behind the other, stands where after join_clips."""
    return join_clips(torch.arange(M * n, device=device).view(M, n, 1), M, c).flatten()


def join_clips(x: Tensor, M: int, c: int) -> Tensor:
    """M neighbours of x (B*F, n, C), c summaries in front, become one: (B*F/M, M*n, C), M*c in front."""
    x = x.view(-1, M, *x.shape[1:])                                            # (B*F/M, M, n, C)
    return torch.cat([x[:, :, :c].flatten(1, 2), x[:, :, c:].flatten(1, 2)], 1)


def clip_block(block, x: Tensor, size, place: Tensor, step: MergeStep, c: int, pairing=None):
    """A Block on clips x (B*F, n, C) with c summaries each, step.factor = M of which become one.

    place (F, C): a vector for every clip, so that order is seen. pairing: as in bipartite_soft_matching;
    None: between clips, from even ones to odd ones. (A split by parity of place is blind to twins: the
    same patch of two clips has the same parity when clips are even.) -> x (B*F/M, n', C), size,
    the two Reductions.
    """
    M, n = step.factor, x.size(1)
    clip = joined_order(M, n, c, x.device) // n                                # (M*n,) of each token
    x, size = join_clips(x, M, c), size if size is None else join_clips(size[..., None], M, c)[..., 0]
    metric = x.detach()
    x = (x.view(-1, len(place) // M, M * n, x.size(2)) + place.view(-1, M, x.size(2))[:, clip]).view_as(x)
    x, size, first = merge_tokens(
        x, size, metric, step.cross, M * c, clip % 2 == 0 if pairing is None else pairing)
    x, size, second = image_block(block, x, size, step.inner, M * c)
    return x, size, first, second


class TempMeEncoder(VisionEncoder):
    """A vision encoder with a summary token a frame, which merges tokens on the way (TempMe).

    Without `merges` it is the plain encoder of each frame alone, with summaries.
    """

    def __init__(self, dim: int, n_layer: int, n_head: int, patches: int, patch_size: int = 8,
                 channels: int = 6, frames: int = 8, merges: bool = True, image: float = 0.04,
                 cross: float = 0.3, intra: float = 0.1, place_std: float = 0.0):
        super().__init__(dim, n_layer, n_head, patches, patch_size, channels)
        self.frames = frames
        self.cls = nn.Parameter(0.2 * torch.randn(dim))                        # (C,)
        self.steps = merge_schedule(n_layer, frames, patches, image, cross, intra) if merges else (
            [MergeStep(1, 0, 0)] * n_layer)
        clips, self.clip_place = frames, nn.ParameterDict()                    # before they are joined
        for i, step in enumerate(self.steps):
            if step.factor > 1:
                self.clip_place[str(i)] = nn.Parameter(place_std * torch.randn(clips, dim))
                clips //= step.factor

    def counts(self, T: int) -> list:
        """Of each layer: how many clips, tokens of each in attention, tokens of each in the MLP."""
        clips, n, rows = T, len(self.place) + 1, []
        for step in self.steps:
            clips, n = clips // step.factor, n * step.factor - step.cross
            rows.append((clips, n, n - step.inner))
            n -= step.inner
        return rows

    def num_tokens(self, T: int) -> int:
        """M, the tokens that come out."""
        clips, _, n = self.counts(T)[-1]
        return clips * n

    def flops(self, T: int, size) -> int:
        """FLOPs on T frames of size (height, width), the similarities that decide what merges included."""
        C, D, c, total = len(self.cls), len(self.cls) // self.blocks[0].attention.n_head, 1, 0
        for step, (clips, n, after) in zip(self.steps, self.counts(T)):
            joined, c = n + step.cross, c * step.factor                        # tokens before they merge
            if step.cross:
                a = (joined - c) // step.factor * ((step.factor + 1) // 2)     # patches of even clips
                total += clips * 2 * a * (joined - c - a) * C
            if step.inner:
                a = (n + 1) // 2 - (c + 1) // 2                                # patches at even places
                total += clips * 2 * a * (n - c - a) * D
            total += clips * (8 * n * C * C + 4 * n * n * C + 16 * after * C * C)  # attention, MLP
        return T * self.embed.flops(size) + total

    def forward(self, video: Tensor):
        """video (B, T, 3, height, width) -> tokens (B, M, C), summaries (B, T, C), Reduction of patches.

        The tokens are the summaries, each where its frame begins, and what became of the patches, in
        ascending position. ValueError: another number of frames than the clips' places were made for.
        """
        (B, T), device = video.shape[:2], video.device
        if self.clip_place and T != self.frames:
            raise ValueError(f'this encoder merges clips of {self.frames} frames, got {T}')
        x = self.embed(video) + self.place                                     # (B*T, P, C)
        P = x.size(1)
        x = torch.cat([self.cls.to(x.dtype).expand(B * T, 1, -1), x], 1)
        size, c = None, 1
        slot = torch.arange(1, P + 1, device=device).expand(B * T, P)          # of each patch in its clip
        for i, (block, step) in enumerate(zip(self.blocks, self.steps)):
            M, n, merged = step.factor, x.size(1), []
            if M > 1:
                x, size, *merged = clip_block(block, x, size, self.clip_place[str(i)], step, c)
                index = joined_order(M, n, c, device)
                start = (torch.arange(len(slot), device=device) % M * n)[:, None]
                slot, c = index.argsort()[slot + start].view(-1, M * slot.size(1)), c * M
            else:
                x, size, *merged = image_block(block, x, size, step.inner, c)
            for reduction in merged:
                slot = slot if reduction is None else reduction.assign.gather(1, slot)
        return self.by_position(self.norm(x), slot, B, T, c)

    def by_position(self, x: Tensor, slot: Tensor, B: int, T: int, c: int):
        """Clips x (B*F, n, C), c summaries in front, and the slot of each patch (B*F, T*P/F) -> as forward.

        A slot stands at its first patch, a summary where its frame begins.
        """
        n, clips, device = x.size(1), len(x) // B, x.device
        slot = (slot + n * (torch.arange(len(slot), device=device) % clips)[:, None]).view(B, -1)  # (B, T*P)
        front = torch.arange(clips * n, device=device) % n < c                 # (F*n,) summaries
        stand = first_members(slot, clips * n)                                 # (B, F*n)
        stand[:, front] = slot.size(1) // T * torch.arange(T, device=device)
        stand, order = stand.sort(dim=1, stable=True)                          # (B, M)
        tokens = x.reshape(B, clips * n, -1).take_along_dim(order[..., None], 1)
        return tokens, x[:, :c].reshape(B, T, -1), mean_of(order.argsort(1).gather(1, slot), stand)


class LoRA(nn.Module):
    """A frozen linear map W and a small one that learns: y = W x + B A x (Hu et al., arXiv 2106.09685).

    A (rank, in), B (out, rank), which is zero at first.
    """

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return self.linear(x) + F.linear(F.linear(x, self.lora_a), self.lora_b)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The same map as one matrix, W + B A."""
        self.linear.weight += self.lora_b @ self.lora_a
        return self.linear.requires_grad_(True)


def add_lora(model: nn.Module, rank: int):
    """Freeze the model; what learns is LoRA in every qkv, and the places of clips."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, Attention):
            module.qkv = LoRA(module.qkv, rank).to(module.qkv.weight.device)
        if isinstance(module, TempMeEncoder):
            module.clip_place.requires_grad_(True)


def merge_lora(model: nn.Module):
    """Fold what LoRA learned into the weights: as fast and as large as it was, and all of it learns."""
    for module in list(model.modules()):
        if isinstance(module, Attention) and isinstance(module.qkv, LoRA):
            module.qkv = module.qkv.merged()
    model.requires_grad_(True)


# --------------------------------------------------------------------------------------------------
# 7. Frame selection
# Of many frames a question needs few. B-VLLM (Lu et al., arXiv 2412.09919): learned queries read the
# question and a summary of each frame, mix the frames that matter, drop mixtures that repeat each
# other, and sample a few tokens from each, never more than a budget. It looks at the whole clip.
# needs sections 2, 3, 4
# --------------------------------------------------------------------------------------------------

@exact
def merge_duplicates(selector: Tensor, threshold: float = 0.75) -> Reduction:
    """Rows that select alike become one: selector (B, K, T) -> Reduction of the K rows.

    Row i repeats the earlier row j that it resembles most if (1 + cosine) / 2 is above threshold.
    Chains end at their first row, with all their members.
    """
    B, K, _ = selector.shape
    u, row = unit(selector), torch.arange(K, device=selector.device)
    alike = ((1 + u @ u.mT) / 2).masked_fill(row >= row[:, None], -1)          # (B, K, K) earlier ones
    value, parent = alike.max(-1)
    root = torch.where(value > threshold, parent, row)                         # (B, K)
    for _ in range(K.bit_length()):                                            # to the end of the chain
        root = root.gather(1, root)
    return from_clusters(root, K)


class FrameSelector(nn.Module):
    """B-VLLM: (B, T, P, C) and a question -> at most `budget` tokens of the frames that matter.

    Unlike the paper's, the queries start evenly spread over the frames, and over the patches of one:
    alike at first, they would all be one blurred frame after de-duplication. And what a query takes of
    a frame is a mean of its tokens, not a new feature, so a trained decoder can read it at once.
    """

    def __init__(self, dim: int, n_head: int, budget: int, num_frames: int = 8, num_tokens: int = 16,
                 temperature: float = 0.5, hard: bool = False):
        super().__init__()
        if num_frames > budget:
            raise ValueError(f'a budget of {budget} tokens is too small for {num_frames} frames')
        self.budget, self.temperature, self.hard = budget, temperature, hard
        self.frame_queries = nn.Parameter(torch.randn(num_frames, dim))        # (K, C)
        self.token_queries = nn.Parameter(torch.randn(num_tokens, dim))        # (n, C)
        self.blocks = nn.ModuleList(Block(dim, n_head, causal=False) for _ in range(2))
        self.keys = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.focus = nn.Parameter(torch.tensor([2.0, 2.0]))   # how strongly queries keep to their place
        self.register_buffer('calls', torch.zeros((), dtype=torch.long))       # seeds the noise

    def ask(self, i: int, queries: Tensor, words: Tensor, known: Tensor, x: Tensor) -> Tensor:
        """How much queries (K, C) want of each of x (B, S, C): logits (B, K, S) float32.

        They read words (B, L, C), mask known (B, L), and x in block i, then compare themselves with x.
        """
        (B, S, _), K, device = x.shape, len(queries), x.device
        both = torch.cat([queries.expand(B, -1, -1).to(x.dtype), words, x], 1)
        seen = F.pad(known, (K, S), value=True)                                # (B, K + L + S)
        position = torch.cat([torch.arange(n, device=device) for n in (K, words.size(1), S)])
        position[:K] = 0                                                       # queries stand at 0
        both = both + self.blocks[i](both, position, seen[:, None, None])
        with torch.autocast(device.type, enabled=False):
            wish = self.keys[i](both[:, :K].float())                           # (B, K, C)
            logits = wish @ unit(x - x.mean(1, keepdim=True)).mT               # (B, K, S)
        own, place = ((torch.arange(n, device=device) + 0.5) / n for n in (K, S))      # in (0, 1)
        return logits - self.focus[i] * (K * (own[:, None] - place)).square()

    def forward(self, x: Tensor, words: Tensor, known: Tensor):
        """x (B, T, P, C), words (B, L, C) with mask known (B, L) -> tokens, position, selector.

        tokens (B, M, C), M at most budget; position (B, M): strongest frame * P + the token's number
        among that frame's, NEVER at padding; selector (B, K, T): what each query takes of each frame,
        rows sum to one. Training adds Gumbel noise, a function of the number of calls; evaluation
        adds none.
        """
        B, T, P, C = x.shape
        logits = self.ask(0, self.frame_queries, words, known, x.mean(2))      # (B, K, T)
        if self.training:
            index = torch.arange(logits.numel(), device=x.device).view_as(logits)
            chance = ((hashed(index + self.calls * index.numel()) >> 9) + 0.5) / 2 ** 23  # in (0, 1)
            logits, self.calls = logits - (-chance.log()).log().to(logits.dtype), self.calls + 1
        selector = (logits / self.temperature).softmax(-1)                     # (B, K, T)
        if self.hard:                                                # straight-through: one frame each
            one = F.one_hot(selector.argmax(-1), T).to(selector.dtype)
            selector = one + selector - selector.detach()
        shares, frame = self.distinct(selector)                                # (B, k, T), (B, k)
        mixed = (shares.to(x.dtype) @ x.flatten(2)).view(-1, P, C)             # (B * k, P, C)
        k, real = frame.size(1), frame < T                                     # (B, k)
        words, known = words.repeat_interleave(k, 0), known.repeat_interleave(k, 0)
        wish = self.ask(1, self.token_queries, words, known, mixed) / self.temperature
        tokens = wish.softmax(-1).to(x.dtype) @ mixed                          # (B * k, n, C)
        tokens, mask = self.to_budget(tokens, real)                            # (B * k, m, C), (B * k, m)
        m = tokens.size(1)
        place = frame.clamp(max=T - 1)[..., None] * P + torch.arange(m, device=x.device).clamp(max=P - 1)
        slots = pack(mask.view(B, k * m))
        position = look_up(place.flatten(1), slots.position, NEVER)            # (B, M)
        return reduce_tokens(tokens.reshape(B, k * m, C), slots), position, selector

    def distinct(self, selector: Tensor):
        """(B, K, T) -> the k of them that differ (B, k, T), in order of their strongest frame (B, k); T at padding."""
        kept = merge_duplicates(selector.detach())
        k = int(kept.mask.sum(1).max())                      # waits for the device: how many differ
        shares = reduce_tokens(selector, kept)[:, :k]
        frame = shares.argmax(-1).masked_fill(~kept.mask[:, :k], selector.size(2))
        frame, order = frame.sort(dim=1, stable=True)
        return shares.take_along_dim(order[..., None], 1), frame

    def to_budget(self, tokens: Tensor, real: Tensor):
        """Merge each frame's tokens (B * k, n, C) down to budget // frames, by ToMe with sizes.

        real (B, k): frames that exist -> tokens (B * k, m, C), mask (B * k, m).
        """
        share = self.budget // real.sum(1).clamp(min=1)                        # (B,) tokens a frame
        quota = (share[:, None] * real).flatten()                              # (B * k,)
        mask = real.view(-1, 1).expand(tokens.shape[:2])                       # (B * k, n)
        size = mask.float()
        for _ in range(tokens.size(1).bit_length()):                           # each at most halves
            step = bipartite_soft_matching(tokens, mask.sum(1) - quota, size=size, mask=mask)
            tokens, size, mask = reduce_tokens(tokens, step), slot_sizes(step, size), step.mask
        return tokens, mask


# --------------------------------------------------------------------------------------------------
# 8. Mixture-of-Depths
# A routed layer processes the K vision tokens that its router scores highest and leaves the others
# as they are (Raposo et al., equation 1: x + r f(x) for the selected, r = w·x). VideoLLM-MoD chooses
# frame by frame: it looks across one frame and never at a later one, so training, prefill and
# streaming choose alike. gamma-MoD chooses among a whole clip (offline use only), with one router
# for all layers and for text, in the layers of a trained model whose attention has the lowest rank.
# needs sections 1 (`GATES`), 2, 3; MoDBlock works around any block that returns its update
# --------------------------------------------------------------------------------------------------

def mod_layers(placement: str, depth: int) -> list:
    """The layers that route, by the names of VideoLLM-MoD, table 2, or as a list: '1,3,4'.

    The baselines 'early-exit' and 'layer-skip' process no vision token at all in their layers.
    ValueError: an unknown name, or a layer that does not exist.
    """
    layers = {'none': [], 'interleaved': range(1, depth, 2), 'interleaved-deep': range(3, depth, 2),
              'all': range(depth), 'all-deep': range(2, depth),
              'early-exit': range(2, depth), 'layer-skip': range(1, depth, 2)}
    if placement in layers:
        return list(layers[placement])
    if all(number.strip().isdecimal() for number in placement.split(',')):
        chosen = sorted({int(number) for number in placement.split(',')})
        if chosen[-1] < depth:
            return chosen
        raise ValueError(f'placement {placement!r}: there are {depth} layers, from 0 on')
    raise ValueError(f'placement must be one of {", ".join(layers)}, or layers such as 1,3,4; '
                     f'got {placement!r}')


def capacity(ratio: float, n: int) -> int:
    """How many of n tokens are processed: at least one; the epsilon keeps 0.07 * 100 at 7."""
    return max(1, math.ceil(ratio * n - 1e-9))


class Route(NamedTuple):
    """Which tokens a routed layer processes."""
    index: Tensor       # (B, K) int64, ascending: the selected tokens
    gate: Tensor        # (B, K) float32: factor of each one's update
    logits: Tensor      # (B, N) float32: the score of every routable token
    mask: Tensor = None     # (B, K) bool: False where a sample selects fewer; None = all are real


def select_tokens(score: Tensor, group: int, k: int, forced: Tensor = None) -> Tensor:
    """The k best of each of `group` equal runs of tokens: score (B, N) -> (B, group * k) ascending.

    forced (B, N) or (N,) bool: these take part of their run's k. Ties: the earlier token wins.
    """
    B, N = score.shape
    if N % group:
        raise ValueError(f'{N} tokens do not divide into {group} groups of equal size')
    if forced is not None:
        score = score.masked_fill(forced, math.inf)
    rank = score.view(B, group, -1).argsort(dim=-1, descending=True, stable=True)  # (B, group, n)
    start = torch.arange(group, device=score.device) * (N // group)            # (group,) first of each
    return (rank[..., :k].sort(-1).values + start[:, None]).flatten(1)


def select_ragged(score: Tensor, frame: Tensor, ratio: float) -> Tensor:
    """The best `ratio` of the tokens that each frame has left: score, frame (B, N) -> (B, N) bool.

    frame: int64 from 0 on, ascending, -1 for padding behind.
    """
    real = frame >= 0
    home = torch.where(real, frame, NEVER)                                     # (B, N) padding last
    first = torch.searchsorted(home, home)                         # (B, N) where its frame begins
    count = torch.searchsorted(home, home, right=True) - first                 # (B, N) of its frame
    order = score.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, home.gather(1, order).argsort(dim=1, stable=True))  # by frame, then score
    rank = order.argsort(1) - first                                            # (B, N) in its frame
    return real & (rank < (ratio * precise(count) - 1e-9).ceil().clamp(min=1))     # as capacity() says


class Router(nn.Module):
    """One linear score a token, r = w·x, computed in float32 whatever the compute dtype."""

    def __init__(self, dim: int, gate: str = 'raposo'):
        super().__init__()
        self.gate, width = gate, 0 if gate == 'zero' else 1 / math.sqrt(dim)
        self.weight = nn.Parameter(torch.empty(dim).uniform_(-width, width))   # (C,)

    def forward(self, x: Tensor, group, ratio: float, text: int = 0, forced: Tensor = None) -> Route:
        """Select the best `capacity(ratio, n)` of each of `group` equal runs of n vision tokens.

        x (B, N, C); group = T: the best of each frame; group = 1: the best of the whole sequence
        (a later token can then push out an earlier one: offline use only); or the frame of each
        token, (B, N) int64, -1 for padding, where frames have unequal numbers. text: so many tokens
        at the end of x are words, selected always and besides. forced: see select_tokens.
        """
        B, S, C = x.shape
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            logits = F.linear(x.to(wide), self.weight.to(wide)[None]).squeeze(-1)  # (B, S)
        N, mask = S - text, None
        if isinstance(group, Tensor):
            chosen = pack(select_ragged(logits.detach(), group, ratio))
            index, mask = chosen.position.clamp(max=S - 1), chosen.mask        # (B, K)
        else:
            index = select_tokens(logits.detach()[:, :N], group, capacity(ratio, N // group), forced)
        words = torch.arange(N, S, device=x.device).expand(B, text)            # (B, text)
        index = torch.cat([index, words], 1)                                   # (B, K + text)
        return Route(index, GATES[self.gate](logits.gather(1, index)), logits, mask)


def routing_loss(route: Route) -> Tensor:
    """gamma-MoD's loss of a router: cross-entropy of its scores with what was selected."""
    selected = torch.zeros_like(route.logits).scatter(1, route.index, 1.0)     # (B, N)
    return F.binary_cross_entropy_with_logits(route.logits, selected)


def fixed_route(kind: str, position: Tensor, group: int, k: int, forced: Tensor = None,
                layer: int = 0) -> Route:
    """Baselines without a router: position (B, N) -> k tokens of each of `group` runs, gate one.

    'uniform': evenly spaced, the last one among them. 'random': by a hash of position and layer,
    so that whole sequence and stream agree.
    """
    B, N = position.shape
    if kind == 'uniform':
        place = torch.arange(N, device=position.device) % (N // group)
        score = ((place + 1) * k // (N // group) - place * k // (N // group)).expand(B, N)
    else:
        score = hashed(position + layer * 7919)
    index = select_tokens(score.float(), group, k, forced)
    return Route(index, torch.ones(index.shape, device=index.device), score.float())


class MoDBlock(nn.Module):
    """Runs a block on the selected tokens alone: x + gate * f(x) for them, x for the others.

    gates_mlp: the gate scales the block's MLP alone, x + attention + gate * MLP (gamma-MoD).
    """

    def __init__(self, block: nn.Module, gates_mlp: bool = False):
        super().__init__()
        self.block, self.gates_mlp = block, gates_mlp

    def forward(self, x: Tensor, route: Route, position: Tensor, mask: Tensor = None,
                cache: KVCache = None) -> Tensor:
        """x (B, S, C), position (S,) or (B, S), mask (S, S) or (B, 1, S, S) -> (B, S, C).

        The route speaks of the first N = route.logits.size(1) tokens. Those behind them (text)
        always go through, ungated. The block gets K + S - N tokens, at their original positions,
        and their part of the mask; what the cache gets are these tokens, too.
        """
        (B, S, C), N = x.shape, route.logits.size(1)
        text = torch.arange(N, S, device=x.device).expand(B, S - N)
        index = torch.cat([route.index, text], 1)                              # (B, K + S - N)
        if index.size(1) == 0:                                          # a frame that skips a layer
            return x
        sample = torch.arange(B, device=x.device)[:, None]                     # (B, 1)
        row = (index + S * sample).flatten()                           # rows of `flat`
        flat = x.reshape(B * S, C)
        chosen = flat.index_select(0, row).view(B, -1, C)                      # (B, K + S - N, C)
        place = position.expand(B, S).gather(1, index)                         # (B, K + S - N)
        if mask is not None:                                    # rows and columns of the chosen
            mask = mask.view(-1, S, S).expand(B, S, S)[
                sample[..., None], index[..., None], index[:, None]][:, None]
        if route.mask is not None:                         # padding: seen by none, updates nothing
            real = F.pad(route.mask, (0, S - N), value=True)                   # (B, K + S - N)
            place = torch.where(real, place, NEVER)
            alone = torch.eye(real.size(1), dtype=torch.bool, device=x.device)
            mask = visible(place) if mask is None else mask & real[:, None, None, :] | alone
        gate = F.pad(route.gate, (0, S - N), value=1.0)[..., None]  # (B, K + S - N, 1) one for text
        if self.gates_mlp:
            update = self.block(chosen, place, mask, cache, gate)
        else:
            update = self.block(chosen, place, mask, cache) * gate
        if route.mask is not None:
            update = update * real[..., None]
        return flat.index_add(0, row, update.to(x.dtype).view(-1, C)).view(B, S, C)


def attention_rank(attention: Tensor, rtol: float = None):
    """gamma-MoD's ARank, and the effective rank: attention (B, H, S, S) -> two of (H,), mean over B.

    ARank is the numerical rank of the map below its diagonal: the singular values above
    rtol * the largest, in float32, rtol S * 2**-23 if None. Up to S - 1, which a *uniform* map has:
    it measures how far attention sinks stretch the range of values, not redundancy. The effective
    rank, exp(entropy of the normalized singular values), has no tolerance.
    """
    values = torch.linalg.svdvals(attention.float().tril(-1))                  # (B, H, S)
    rtol = attention.size(-1) * torch.finfo(torch.float32).eps if rtol is None else rtol
    rank = (values > rtol * values[..., :1]).sum(-1).float()                   # (B, H)
    share = values / values.sum(-1, keepdim=True).clamp(min=1e-30)             # (B, H, S)
    return rank.mean(0), torch.special.entr(share).sum(-1).exp().mean(0)


def choose_mod_layers(ranks: Tensor, num_dense: int) -> list:
    """Which layers to convert: ranks (layers,) -> all but the num_dense highest, lowest first."""
    if not 0 <= num_dense < len(ranks):
        raise ValueError(f'num_dense must be 0 to {len(ranks) - 1}, got {num_dense}')
    return ranks.argsort(stable=True)[:len(ranks) - num_dense].tolist()


# --------------------------------------------------------------------------------------------------
# 9. The model
# Vision tokens stand first, in order of time; the questions of a clip follow, all starting at
# position N: they read the vision tokens and themselves, never each other. In a stream words stand
# between frames. Positions decide causality, so a skipped token leaves a gap, no shift.
# needs sections 1 to 8
# --------------------------------------------------------------------------------------------------

def question_mask(n_vision: int, Q: int, L: int, device=None) -> Tensor:
    """(S, S) bool, S = n_vision + Q*L: i sees j if j is not later and is vision or i's question."""
    place = torch.arange(n_vision + Q * L, device=device)
    owner = torch.where(place < n_vision, -1, (place - n_vision) // L)  # (S,) question, -1 = vision
    return (place <= place[:, None]) & ((owner == -1) | (owner == owner[:, None]))


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
        shape = c.encoder_dim, c.encoder_layers, c.encoder_heads, c.patches, c.patch_size
        if c.encoder == 'tempme':
            self.encoder = TempMeEncoder(*shape, frames=c.frames, image=c.merge_image, cross=c.merge_cross,
                                         intra=c.merge_intra)
        else:
            self.encoder = VisionEncoder(*shape)
        self.projector = nn.Sequential(
            nn.Linear(c.encoder_dim, c.dim), nn.GELU(), nn.Linear(c.dim, c.dim))
        keep_scale(self.projector)
        self.embed = nn.Embedding(len(c.vocab), c.dim)
        if c.reduction == 'bvllm':
            self.selector = FrameSelector(
                c.dim, c.n_head, c.budget, c.select_frames, min(16, c.patches), hard=c.hard)
        if c.reduction == 'vqtoken':
            self.vqtoken = VQToken(c.dim, c.codes, c.n_head)
        if c.reduction == 'vq':
            self.quantizer = VectorQuantizer(c.codes, c.dim)
        self.mod_layers = mod_layers(c.placement, c.n_layer)
        self.skips_all = c.placement in ('early-exit', 'layer-skip')
        if not c.streaming and not self.skips_all:
            # Nothing behind the last layer reads vision, unless frames decide about speech: a
            # router there would learn nothing, so the layer stays dense.
            self.mod_layers = [i for i in self.mod_layers if i < c.n_layer - 1]
        self.blocks = nn.ModuleList(Block(c.dim, c.n_head) for _ in range(c.n_layer))
        for i in self.mod_layers:
            self.blocks[i] = MoDBlock(self.blocks[i], gates_mlp=c.gate == 'gamma')
        names = {'frame': map(str, self.mod_layers), 'sequence': ['shared']}.get(c.routing, [])
        names = [] if self.skips_all or not self.mod_layers else names
        self.routers = nn.ModuleDict({name: Router(c.dim, c.gate) for name in names})
        self.norm = nn.RMSNorm(c.dim)
        self.head = nn.Linear(c.dim, len(c.vocab), bias=False)
        small_updates(self, c.n_layer)

    def encode_video(self, video: Tensor, previous: Tensor = None, question: Tensor = None):
        """video (B, T, 3, frame_size, frame_size) -> tokens (B, N, C), positions (N,) int64, None.

        With a reduction: tokens (B, M, C), positions (B, M), NEVER at padding, and the Reduction, or
        of 'bvllm' the selector (B, K, T), of 'vq' the Quantized. question (B * Q, L) int64, if they
        depend on it: B becomes B * Q. previous (B, 1, 3, frame_size, frame_size): the frame before,
        None at the beginning.
        """
        c, size, (B, T) = self.config, self.config.frame_size, video.shape[:2]
        if video.dim() != 5 or video.shape[2:] != (3, size, size):
            raise ValueError(f'video must be (B, T, 3, {size}, {size}), got {tuple(video.shape)}')
        if c.encoder == 'tempme':
            x, _, reduction = self.encoder(video)                              # (B, M, C)
            tokens = self.projector(x).to(self.embed.weight.dtype)
            return self.for_questions(tokens, reduction.position, question, reduction)
        looks = c.reduction in ('holitom', 'prune')
        x, saliency = self.encoder(video, previous, looks)                     # (B*T, P, C), (B*T, P)
        # The dtype of the text tokens, whatever autocast says.
        x = self.projector(x).view(B, T, -1, c.dim).to(self.embed.weight.dtype)   # (B, T, P, C)
        if c.reduction == 'bvllm':
            x = x.repeat_interleave(len(question) // B, 0)
            return self.selector(x, self.embed(question), question != PAD)
        place = torch.arange(T * x.size(2), device=x.device)                   # (N,)
        if c.reduction == 'vq':
            x, index_map, loss = self.quantizer(x)
            return x.flatten(1, 2), place, Quantized(index_map, loss)
        if c.reduction == 'vqtoken':
            tokens, mask, index_map = self.vqtoken(x)                          # (B, K, C), (B, K)
            reduction = from_clusters(index_map.flatten(1), mask.size(1))
        else:
            with torch.no_grad():
                reduction = self.reduce(x, saliency)
            tokens = x.flatten(1, 2) if reduction is None else reduce_tokens(x.flatten(1, 2), reduction)
        if reduction is not None:
            place = torch.where(reduction.mask, reduction.position, NEVER)     # (B, M)
        return self.for_questions(tokens, place, question, reduction)

    def for_questions(self, tokens: Tensor, place: Tensor, question: Tensor, reduction):
        """What encode_video returns: each question has tokens of its own, if they will depend on it."""
        if self.config.by_question:
            again, place = len(question) // len(tokens), place.expand(tokens.shape[:2])
            tokens, place = (a.repeat_interleave(again, 0) for a in (tokens, place))
        return tokens, place, reduction

    def reduce(self, x: Tensor, saliency: Tensor):
        """What becomes of tokens x (B, T, P, C) with saliency (B*T, P) before the decoder; None: all stay."""
        (B, T, P, _), c, device = x.shape, self.config, x.device
        if c.reduction == 'holitom':
            return holitom(x, saliency.view(B, T, P), c.retain_ratio, c.tau)
        if c.reduction == 'tome':
            return tome(x.flatten(1, 2), c.budget)
        if c.reduction == 'pool':
            cell = pool_grid(T, math.isqrt(P), c.budget)                       # (N,)
            return from_clusters(cell.to(device).expand(B, -1), int(cell.max()) + 1)
        if c.reduction == 'prune':
            every = torch.ones(B, T * P, dtype=torch.bool, device=device)
            return pack(best_of(saliency.view(B, -1), c.budget, every))
        if c.reduction == 'uniform':
            n = min(T, c.budget // P)
            frames = (torch.arange(n, device=device) * 2 + 1) * T // (2 * n)   # the middles of n parts
            keep = torch.zeros(T, dtype=torch.bool, device=device).index_fill(0, frames, True)
            return pack(keep.repeat_interleave(P).expand(B, -1))

    def forward(self, video: Tensor, text: Tensor, targets: Tensor = None, after: Tensor = None,
                decisions: Tensor = None, asked: Tensor = None):
        """Predict the next word at every place of every question.

        video (B, T, 3, height, width) float, text (B, Q, L) int64, targets (B, Q, L) int64 with -1
        where nothing is to be learned -> logits (B, Q, L, V), loss (mean cross-entropy over the
        targets, or None), aux: 'routes', a dict from routed layer to Route; 'tokens', the number of
        tokens that each layer processed; 'routing_loss'; 'reduction'; 'inner'. after, decisions: see
        forward_stream. asked (B, Q): words of each question without its answer; None: all of them.
        Where vision depends on the question, what aux holds has B * Q samples.
        """
        if text.dim() != 3:
            raise ValueError(f'text must be (B, Q, L), got {tuple(text.shape)}')
        if self.config.streaming:
            return self.forward_stream(video, text, targets, after, decisions)
        (B, Q, L), shape, question = text.shape, text.shape, None
        if self.config.by_question:                       # each question is a clip of its own from here
            asked = (text != PAD).sum(-1) if asked is None else asked          # (B, Q)
            text, asked, B, Q = text.reshape(B * Q, 1, L), asked.reshape(B * Q, 1), B * Q, 1
            question = text[:, 0].where(torch.arange(L, device=text.device) < asked, PAD)  # (B, L)
        vision, place, reduction = self.encode_video(video, None, question)    # (B, N, C), (N,)
        N, start = vision.size(1), video.size(1) * self.config.patches
        x = torch.cat([vision, self.embed(text).flatten(1, 2)], 1)             # (B, N + Q*L, C)
        word = start + torch.arange(L, device=x.device).repeat(Q)              # (Q*L,)
        mask = question_mask(N, Q, L, x.device) if Q > 1 else None    # one question: plainly causal
        last = N - 1 + asked[:, 0] if self.config.inner_layer else None        # (B,)
        if self.config.merges:                               # padding behind the vision of some clips
            position = torch.cat([place.expand(B, N), word.expand(B, Q * L)], 1)
            # By position, not by place in x: a frame's summary and its first patch share one.
            mask = visible(position) if mask is None else visible(position) & (mask | mask.T)
        else:
            position = torch.cat([place, word])
        x, aux = self.decode(x, position, video.size(1), N, mask, last=last)
        aux['reduction'] = reduction
        logits = self.head(self.norm(x[:, -Q * L:])).float().view(*shape, -1)  # (B, Q, L, V)
        if targets is None:
            return logits, None, aux
        loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=IGNORE)
        if self.config.reduction == 'vq':
            loss = loss + reduction.loss
        return logits, loss + self.config.routing_loss * aux['routing_loss'], aux

    def route(self, i: int, x: Tensor, position: Tensor, T: int, N: int):
        """The route of layer i for x (B, S, C), its first N tokens T frames; None: all tokens."""
        c = self.config
        if i not in self.mod_layers or not (N or c.routing == 'sequence'):
            return None
        if self.skips_all:
            none = x.new_zeros(len(x), 0)
            return Route(none.long(), none, x.new_zeros(len(x), N))
        if c.routing == 'sequence':                                 # scores what the layer will see
            return self.routers['shared'](
                self.blocks[i].block.norm1(x), 1, c.keep_ratio, text=x.size(1) - N)
        if c.merges:                                               # frames have unequal numbers left
            frame = torch.where(position < NEVER, position // c.patches, -1)[:, :N]    # (B, N)
            return self.routers[str(i)](x[:, :N], frame, c.keep_ratio)
        n = N // T                                                             # tokens of a frame
        # The last token of a frame of a stream decides about speech.
        forced = torch.arange(N, device=x.device) % n == n - 1 if c.streaming else None    # (N,)
        if c.routing == 'frame':
            return self.routers[str(i)](x[:, :N], T, c.keep_ratio, forced=forced)
        position = position.expand(x.size(0), -1)[:, :N]                       # (B, N)
        return fixed_route(c.routing, position, T, capacity(c.keep_ratio, n), forced, i)

    def merge_again(self, i: int, before: Tensor, x: Tensor, position: Tensor, N: int, last: Tensor):
        """HoliTom's merging at layer i > 0: x (B, S, C), position (B, S) and N, all with fewer vision.

        before: what layer i - 1 was given. last (B,): place in x of each last question word, whose
        attention there decides; it is causal, so no answer has a say.
        """
        block = self.blocks[i - 1]
        block = block.block if isinstance(block, MoDBlock) else block
        seen = visible(position.gather(1, last[:, None]), position)            # (B, 1, 1, S)
        score = block.attention.weights(block.norm1(before), position, seen, last).mean((1, 2))    # (B, S)
        real = position[:, :N] < NEVER
        merged = holitom_inner(x[:, :N], score[:, :N], real, self.config.inner_ratio, real)
        stands = look_up(position[:, :N], merged.position, NEVER)              # (B, M)
        position = torch.cat([stands, position[:, N:]], 1)
        x = torch.cat([reduce_tokens(x[:, :N], merged), x[:, N:]], 1)
        return x, position, stands.size(1), merged

    def decode(self, x: Tensor, position: Tensor, T: int, N: int, mask: Tensor = None, caches=None,
               last: Tensor = None):
        """All layers on x (B, S, C), its first N tokens T frames of vision -> x (B, S, C), aux."""
        aux = {'routes': {}, 'tokens': [], 'routing_loss': 0.0}
        text, before = x.size(1) - N, None
        for i, block in enumerate(self.blocks):
            if i == self.config.inner_layer and last is not None:          # of models that merge inside
                x, position, N, aux['inner'] = self.merge_again(i, before, x, position, N, last)
                mask = visible(position)
            cache, before = caches[i] if caches else None, x
            route = self.route(i, x, position, T, N)
            if route is None:
                block = block.block if isinstance(block, MoDBlock) else block
                x = x + block(x, position, mask, cache)
                aux['tokens'].append(N + text)
                continue
            x = block(x, route, position, mask, cache)
            if self.config.routing == 'sequence' and self.routers:
                aux['routing_loss'] = aux['routing_loss'] + routing_loss(route)
            K = route.index.size(1) - (route.logits.size(1) - N)              # of the vision tokens
            aux['routes'][i] = Route(
                route.index[:, :K], route.gate[:, :K], route.logits[:, :N], route.mask)
            aux['tokens'].append(K + text)
        return x, aux

    def say(self, word: Tensor, position: Tensor, caches: list, max_new_tokens: int, vision=None):
        """Read words, then go on greedily until the end mark; the caches get all that was read.

        word (B, L) int64, padded behind with 0, from `position` (B, 1) on; a sample without words
        says nothing. vision: tokens (B, N, C) and their positions (B, N), to be read together with
        the words -> said (B, at most max_new_tokens), 0 after the end; the next position (B, 1).
        """
        said, ended = [], (word == PAD).all(1, keepdim=True)                   # (B, 1)
        while True:
            real = word != PAD
            place = torch.where(real, position + torch.arange(word.size(1), device=word.device), NEVER)
            count = real.sum(1, keepdim=True)                                  # (B, 1)
            if vision is None:
                x, _ = self.decode(self.embed(word), place, 0, 0, caches=caches)
            else:
                tokens, where = vision
                place, N, vision = torch.cat([where, place], 1), tokens.size(1), None
                x, _ = self.decode(torch.cat([tokens, self.embed(word)], 1), place, 0, N,
                                   visible(place), caches, N - 1 + count[:, 0])
                x = x[:, -word.size(1):]
            position = position + count
            if len(said) >= max_new_tokens or bool(ended.all()):
                break
            last = x.take_along_dim((count - 1).clamp(min=0)[..., None], 1)    # (B, 1, C)
            word = self.head(self.norm(last)).argmax(-1).masked_fill(ended, PAD)
            said.append(word)
            ended = (word == EOS) | (word == PAD)
        return torch.cat(said, 1) if said else word[:, :0], position

    @torch.no_grad()
    def generate(self, video: Tensor, text: Tensor, max_new_tokens: int) -> Tensor:
        """Greedy answers: text (B, Q, L) -> (B, Q, max_new_tokens), 0 after the end.

        Questions are padded with 0 behind. The vision tokens are run once; their keys and values
        serve every question of the clip.
        """
        (B, Q, _), T = text.shape, video.size(1)
        caches, words = [KVCache() for _ in self.blocks], text.flatten(0, 1)   # (B*Q, L)
        vision, place, _ = self.encode_video(video, None, words)
        start = torch.full((B * Q, 1), T * self.config.patches, device=text.device)
        if self.config.inner_layer:
            answer, _ = self.say(words, start, caches, max_new_tokens, (vision, place))
        else:
            mask = visible(place) if self.config.merges else None
            self.decode(vision, place, T, vision.size(1), mask, caches)
            for cache in caches:
                cache.repeat(1 if self.config.by_question else Q)
            answer, _ = self.say(words, start, caches, max_new_tokens)
        return F.pad(answer, (0, max_new_tokens - answer.size(1)), value=PAD).view(B, Q, -1)

    # Streaming (VideoLLM-MoD, from VideoLLM-online, Chen et al., arXiv 2406.11816). At the last
    # vision token of a frame the model predicts what follows it: the first word of what it says
    # now, or '<eos>', which is silence.

    def forward_stream(self, video: Tensor, text: Tensor, targets: Tensor = None,
                       after: Tensor = None, decisions: Tensor = None):
        """The whole of a stream at once, to train and to score.

        text (B, 1, L); after (B, L): the frame behind which each word stands, ascending, -1 before
        the video (the prompt); None: all behind the last. targets (B, 1, L): the next word at each
        word; decisions (B, T): what follows each frame; -1 where nothing is to be learned.
        -> logits (B, T + L, V): T decisions, then the words; loss: the mean of -log P(word) over
        words and of -w log P(silence) over frames to be silent at; aux, with 'position' (B, T + L).
        """
        (B, T), (Q, L), text = video.shape[:2], text.shape[1:], text[:, 0]
        if Q != 1:
            raise ValueError(f'a stream has one line of text, wanted (B, 1, L), got {Q} lines')
        after = torch.full_like(text, T - 1) if after is None else after
        vision, place, _ = self.encode_video(video)                            # (B, N, C), (N,)
        N, P, device, real = vision.size(1), self.config.patches, text.device, text != PAD
        earlier = after[:, None] < torch.arange(T, device=device)[:, None]     # (B, T, L)
        before = (real[:, None] & earlier).sum(-1)                             # (B, T) words
        word = torch.where(real, torch.arange(L, device=device) + P * (after + 1), NEVER)  # (B, L)
        position = torch.cat([place + before.repeat_interleave(P, 1), word], 1)    # (B, N + L)
        mask = visible(position)                                           # (B, 1, N + L, N + L)
        if self.config.window:
            frame = torch.cat([(place // P).expand(B, N), after], 1)               # (B, N + L)
            gone = frame[:, None, :] <= frame[:, :, None] - self.config.window
            mask = mask & ~(gone & (frame >= 0)[:, None, :])[:, None]          # the prompt stays
        x = torch.cat([vision, self.embed(text)], 1)                           # (B, N + L, C)
        x, aux = self.decode(x, position, T, N, mask)
        pick = torch.cat([torch.arange(P - 1, N, P, device=device),
                          torch.arange(N, N + L, device=device)])              # (T + L,)
        aux['position'] = position[:, pick]
        logits = self.head(self.norm(x[:, pick])).float()                      # (B, T + L, V)
        if targets is None:
            return logits, None, aux
        wanted = torch.cat([decisions, targets[:, 0]], 1)                      # (B, T + L)
        each = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORE,
                               reduction='none').view_as(wanted)
        silent = F.pad(decisions == EOS, (0, L))                               # (B, T + L)
        each = torch.where(silent, self.config.silence_weight * each, each)
        return logits, each.sum() / (wanted != IGNORE).sum().clamp(min=1), aux

    @torch.no_grad()
    def stream(self, frames, prompt: Tensor = None, theta: float = 0.5, max_new_tokens: int = 16):
        """Watch frames as they come; speak, or stay silent while P(silence) is at least theta.

        frames: any iterable of (frame (B, 3, height, width), question (B, L) int64 or None), a
        question arriving behind its frame; prompt (B, L): read first. Words are padded behind with
        0. Yields for each frame a dict: 'silence' (B,) the probability, 'said' and 'answer' (B, n)
        ids, or None, 'held' the number of keys of each layer. With config.window = W all but the
        prompt and the last W frames is forgotten, so a stream of any length runs in bounded memory.
        """
        if not self.config.streaming:
            raise ValueError('this model was not made for streams; wanted config.streaming = True')
        P, W, caches = self.config.patches, self.config.window, [KVCache() for _ in self.blocks]
        previous, starts = None, []                    # starts: (B, 1) each, where the frames begin
        for frame, question in frames:
            if previous is None:
                position = torch.zeros(len(frame), 1, dtype=torch.long, device=frame.device)
                if prompt is not None:
                    _, position = self.say(prompt, position, caches, 0)
                prompt_end = position
            starts.append(position)
            if W and len(starts) > W:                        # this frame and the W - 1 before it stay
                starts.pop(0)
                for cache in caches:
                    cache.trim(lambda place: (place < prompt_end) | (place >= starts[0]))
            vision, place, _ = self.encode_video(frame[:, None], previous)
            x, _ = self.decode(vision, position + place, 1, P, caches=caches)
            previous, position = frame[:, None], position + P
            logits = self.head(self.norm(x[:, -1])).float()                    # (B, V)
            silence = logits.softmax(-1)[:, EOS]
            logits[:, [PAD, EOS]] = -math.inf
            word = torch.where(silence < theta, logits.argmax(-1), PAD)[:, None]   # (B, 1)
            said = answer = None
            if bool((word != PAD).any()):
                said, position = self.say(word, position, caches, max_new_tokens - 1)
                said = torch.cat([word, said], 1)
            if question is not None:
                answer, position = self.say(question, position, caches, max_new_tokens)
            held = [0 if cache.k is None else cache.k.size(2) for cache in caches]
            yield dict(silence=silence, said=said, answer=answer, held=held)


class Retriever(nn.Module):
    """Finds the clip for a sentence and the sentence for a clip: two towers, one space (TempMe).

    config.encoder 'tempme' merges frames, 'plain' encodes each alone. The encoder sees frames without
    their changes, as that of an image-text model does. Unlike the paper's, the places of clips do not
    start at zero: from there, what comes first and what last stayed unlearned for 300 steps and more.
    """

    def __init__(self, config: ModVideoConfig):
        super().__init__()
        self.config = c = config
        C = c.encoder_dim
        self.encoder = TempMeEncoder(
            C, c.tower_layers, c.encoder_heads, c.patches, c.patch_size, 3, c.frames,
            c.encoder == 'tempme', c.merge_image, c.merge_cross, c.merge_intra, place_std=1.0)
        self.embed = nn.Embedding(len(c.vocab), C)
        self.blocks = nn.ModuleList(Block(C, c.encoder_heads) for _ in range(c.tower_layers))
        self.norm = nn.RMSNorm(C)
        self.see, self.read = (nn.Linear(C, C, bias=False) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))            # of the similarities
        small_updates(self, c.tower_layers)
        if c.lora_rank:
            add_lora(self, c.lora_rank)

    def encode_video(self, video: Tensor) -> Tensor:
        """video (B, T, 3, frame_size, frame_size) -> (B, C) of length one: the mean over the frames'
        summaries, each of length one before."""
        return unit(unit(self.see(self.encoder(video)[1])).mean(1))

    def encode_text(self, text: Tensor) -> Tensor:
        """text (B, L) int64, padded behind with 0 -> (B, C) of length one, read at the last word."""
        x, position = self.embed(text), torch.arange(text.size(1), device=text.device)
        for block in self.blocks:
            x = x + block(x, position)
        last = ((text != PAD).sum(1) - 1).clamp(min=0)                         # (B,)
        return unit(self.read(self.norm(x[torch.arange(len(x), device=x.device), last])))

    def forward(self, video: Tensor, text: Tensor):
        """Clips and their sentences: similarity (B, B), rows are sentences, and the symmetric InfoNCE loss
        (van den Oord et al., arXiv 1807.03748). The same sentence elsewhere in a batch is no negative."""
        sentences, clips = self.encode_text(text), self.encode_video(video)    # (B, C) each
        similarity = exact(torch.matmul)(sentences, clips.T)                   # (B, B) in [-1, 1], float32
        same = (text[:, None] == text[None]).all(-1)
        same.fill_diagonal_(False)
        logits = (self.log_scale.exp() * similarity).masked_fill(same, -math.inf)
        own = torch.arange(len(text), device=text.device)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return similarity, loss


@torch.no_grad()
def layer_ranks(model: ModVideo, video: Tensor, text: Tensor, rtol: float = None) -> Tensor:
    """ARank and effective rank of every decoder layer of a dense model: (2, layers)."""
    rows = []

    def look(attention, args):
        rows.append(torch.stack(attention_rank(attention.weights(*args[:3]), rtol)).mean(1))

    hooks = [block.attention.register_forward_pre_hook(look) for block in model.blocks]
    try:
        model(video, text)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(rows, 1)


def init_from(model: nn.Module, dense: nn.Module):
    """Copy the weights of `dense` into a model that differs in what it skips, merges, selects or freezes.

    What `dense` does not have stays new: routers, selectors, codebooks, places of clips, LoRA.
    """
    if type(model) is not type(dense):
        raise ValueError(f'the weights are of a {type(dense).__name__}, wanted a {type(model).__name__}')
    bare = lambda name: name.replace('.block.', '.').replace('.linear.', '.')      # of MoDBlock, LoRA
    plain = {bare(name): p for name, p in dense.state_dict().items()}
    own = {name: plain[bare(name)] for name in model.state_dict() if bare(name) in plain}
    for name in ('vocab', 'n_layer', 'n_head', 'dim', 'encoder_layers', 'encoder_heads', 'encoder_dim',
                 'frame_size', 'patch_size', 'tower_layers'):
        mine, other = getattr(model.config, name), getattr(dense.config, name)
        if mine != other:
            raise ValueError(f'the weights are of a model with another {name}: {other}, wanted {mine}')
    model.load_state_dict(own, strict=False)


# --------------------------------------------------------------------------------------------------
# 10. Accounting
# What a forward pass costs, and the optimizer. A multiply-add counts as two FLOPs; attention is
# counted in full, as torch.utils.flop_counter counts it, although causal kernels skip half of it;
# element-wise work is left out.
# needs sections 2, 6, 8, 9
# --------------------------------------------------------------------------------------------------

def num_params(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def count_flops(model: ModVideo, video_shape, text_len: int, questions: int = 1,
                aux: dict = None) -> dict:
    """FLOPs of one forward pass by part, and their 'total'.

    video_shape: (B, T, 3, height, width); text_len: L; questions: Q. aux: of a forward pass, to
    count the tokens that each layer really processed; None: what the configuration says. Dense and
    routed models: exactly as torch counts. With merging: the padded tokens of the batch; what finding
    the clusters costs is left out, and of 'bvllm' the queries' frames count before de-duplication.
    """
    c, (B, T, _, height, width) = model.config, video_shape
    if c.merges and aux is None:
        raise ValueError('with merging the cost depends on the clip; wanted aux of a forward pass')
    again = questions if c.by_question else 1                  # each question is a clip of its own
    text, P, N = questions * text_len // again, c.patches, T * c.patches
    M = model.encoder.num_tokens(T) if c.encoder == 'tempme' else N            # tokens of the encoder
    K = 0 if model.skips_all else (
        capacity(c.keep_ratio, N) if c.routing == 'sequence' else T * capacity(c.keep_ratio, P))
    tokens = aux['tokens'] if aux else [
        (K if i in model.mod_layers else N) + text for i in range(c.n_layer)]
    scored = [route.logits.size(1) for route in aux['routes'].values()] if aux else (
        [N] * len(model.mod_layers))
    scored = [n + text * (c.routing == 'sequence') for n in scored] if model.routers else []
    flops = {
        'encoder': model.encoder.flops(T, (height, width)),
        'projector': 2 * M * (c.encoder_dim * c.dim + c.dim * c.dim),
        'reduction': 0,
        'routers': again * 2 * sum(scored) * c.dim,
        'decoder': again * sum(block_flops(S, c.dim) for S in tokens),
        'head': again * 2 * (text + T * c.streaming) * c.dim * len(c.vocab)}
    look = lambda S, rows, C: 6 * S * C * C + 2 * rows * S * C                 # queries, keys, values, scores
    if c.reduction in ('holitom', 'prune'):                                    # saliency
        flops['reduction'] = T * look(P, P, c.encoder_dim)
    if c.inner_layer:
        flops['reduction'] += again * look(aux['inner'].assign.size(1) + text, 1, c.dim)
    if c.reduction == 'bvllm':              # all queries' frames, though some turn out to be duplicates
        K, n = len(model.selector.frame_queries), len(model.selector.token_queries)
        flops['reduction'] += again * (
            block_flops(K + text + T, c.dim) + K * block_flops(n + text + P, c.dim)
            + 2 * K * c.dim * (c.dim + T + T * P))
    if c.reduction == 'vqtoken':
        K, n = aux['reduction'].position.size(1), c.dim
        fits = [K] if c.codes else range(model.vqtoken.least, model.vqtoken.most + 1)
        search = 2 * 8 * max(fits) + sum(2 * k * (model.vqtoken.iters + 1 + (not c.codes)) for k in fits)
        cells = model.vqtoken.value[0].in_features
        flops['reduction'] += N * n * search + 2 * K * (cells * n + 4 * n * n) + 4 * K * K * n
    if c.reduction == 'vq':
        flops['reduction'] = 2 * N * c.codes * c.dim
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

    The small share matters: at 10 % the stem outruns the attention that reads it; training stalls. What
    adapts a frozen model, LoRA and the places of clips, learns at 30 %; then AdamW may be alone.
    """
    learns = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in learns if 'blocks' in name and p.dim() == 2 and 'lora_' not in name]
    small = [p for name, p in learns if 'lora_' in name or 'clip_place' in name]
    chosen = {id(p) for p in [*matrices, *small]}
    others = [dict(params=[p for _, p in learns if id(p) not in chosen], lr=0.03 * lr),
              dict(params=small, lr=0.3 * lr)]
    adam = torch.optim.AdamW([group for group in others if group['params']], betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(matrices, lr, weight_decay=weight_decay), adam] if matrices else [adam]


# --------------------------------------------------------------------------------------------------
# 11. Save, load, draw
# Checkpoints hold tensors and plain values: loading cannot run code. Pictures: what was processed.
# needs sections 1, 3, 8, 9, 10
# --------------------------------------------------------------------------------------------------

def save_checkpoint(path, model: nn.Module, **extra):
    """Write model, config, `extra` (tensors, numbers, strings, lists, dicts); all or nothing."""
    data = dict(extra, kind=type(model).__name__, config=asdict(model.config), model=model.state_dict())
    torch.save(data, f'{path}.part')
    os.replace(f'{path}.part', path)


def load_checkpoint(path, device='cpu'):
    """Read what save_checkpoint wrote -> model, extra. ValueError if the file is something else."""
    try:
        data = torch.load(path, map_location=device, weights_only=True)
        config, weights = data.pop('config'), data.pop('model')
        kind = ModVideo
        if data.pop('kind', '') == 'Retriever':
            kind = Retriever
        model = kind(ModVideoConfig(**config)).to(device)
        model.load_state_dict(weights)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:      # torch.load raises a dozen types for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f'{path} is not a checkpoint of this model: {reason[:160]}') from None
    return model, data


def draw_tokens(video: Tensor, tokens, sample: int = 0, scale: int = 3, segment: Tensor = None):
    """Draw what became of the patches of a clip: a PIL image, the frames in a row.

    video (T, 3, height, width) in [0, 1]; tokens: a Route (skipped patches are dimmed) or Reduction
    (dropped ones are dimmed, ones merged into a slot share a colour), of which `sample` is drawn.
    segment (T,): a black gap separates frames of different segments.
    """
    import colorsys

    import numpy as np
    from PIL import Image
    T = len(video)
    if isinstance(tokens, Route):
        slot = torch.full_like(tokens.logits[sample], -1, dtype=torch.long)
        slot[tokens.index[sample]] = torch.arange(tokens.index.size(1), device=slot.device)
    else:
        slot = tokens.assign[sample]
    slot = slot.cpu()                                                          # (N,) -1 = dimmed
    side = math.isqrt(slot.numel() // T)
    if T * side * side != slot.numel():
        raise ValueError(f'{slot.numel()} tokens are not {T} frames of a square grid of patches')
    frames = video.float().cpu().clamp(0, 1).permute(0, 2, 3, 1).numpy()     # (T, height, width, 3)
    frames = frames.repeat(scale, 1).repeat(scale, 2)
    height, width = frames.shape[1:3]
    slots = F.interpolate(slot.view(T, 1, side, side).float(), (height, width))[:, 0].long().numpy()
    grey = frames.mean(-1, keepdims=True)
    picture = np.where(slots[..., None] < 0, 0.25 * grey + 0.08, frames)
    members = torch.bincount(slot[slot >= 0], minlength=1).numpy()
    hue = np.array([colorsys.hsv_to_rgb(i * 0.618 % 1, 0.9, 1) for i in range(len(members))])
    merged = (slots >= 0) & (members[slots.clip(0)] > 1)                       # shares its slot
    picture = np.where(merged[..., None], 0.5 * picture + 0.5 * hue[slots.clip(0)], picture)
    picture[:, ::height // side] *= 0.6                                        # the grid of patches
    picture[:, :, ::width // side] *= 0.6
    row = np.ones((height, T * (width + 2) - 2, 3))
    for t in range(T):
        row[:, t * (width + 2):t * (width + 2) + width] = picture[t]
        if segment is not None and t and segment[t] != segment[t - 1]:
            row[:, t * (width + 2) - 6:t * (width + 2) + 4] = 0
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
    vision, _, _ = model.encode_video(video)
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
