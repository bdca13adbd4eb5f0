"""Qwen2.5-VL from scratch: vision encoder, decoder, generation.

    model = checkpoint.load_model("path/to/Qwen2.5-VL-3B-Instruct")
    log_probs, entropies = model(batch)                     # training, scoring
    rollout = generate(model, batch, max_new_tokens=64, stop_ids=(151645, 151643))

Everything the model takes is one `Batch`; everything it does with it is `QwenVL.forward`.
Submodules carry the names of the checkpoint's tensors, so loading needs no table of names.
There is no distributed code here: runtime.py shards the model from outside.

A forward never waits for the GPU: sizes are computed on the CPU, and tensors that are made there
are sent with `to_device`.

Letters in shapes: B sequences, T tokens, P prompt tokens, C completion tokens, G completions in a
group, R = B * G completions of a rollout, n scored tokens, V vocabulary, N patches, M merged vision
tokens, H query heads, K key-value heads, D head dimension, S keys, W width.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

HEAD_LOGITS = 2**22  # logits held at once where tokens are scored: 16 MB
# While decoding, the number of keys grows in steps of this size: kernels see few shapes, and masks
# have aligned rows, which CUDA's memory-efficient attention wants.
KEY_BLOCK = 128
BANNED = -1e30  # logit of a banned token: p = 0. With -inf, 0 * log 0 would be NaN.
DRAW_BLOCK = 512  # tokens of the vocabulary whose probabilities are added up first in sampling


# ---------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder's shape, with the defaults of transformers' class.

    Files that transformers saves again leave out what equals a default.
    """

    depth: int = 32
    hidden_size: int = 3584
    num_heads: int = 16
    intermediate_size: int = 3420
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    window_size: int = 112  # pixels
    fullatt_block_indexes: tuple = (7, 15, 23, 31)
    out_hidden_size: int = 3584
    tokens_per_second: float = 4.0  # M-RoPE positions in a second of video
    hidden_act: str = "silu"

    @property
    def head_dim(self):
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class TextConfig:
    """The decoder's shape, with the defaults of transformers' class."""

    vocab_size: int = 152064
    hidden_size: int = 8192
    intermediate_size: int = 29568
    num_hidden_layers: int = 80
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    mrope_section: tuple = (16, 24, 24)  # frequencies that turn with time, height, width
    max_position_embeddings: int = 32768
    hidden_act: str = "silu"

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Config:
    """A whole model. `source` is the config.json it was read from, which is what is saved again."""

    text: TextConfig
    vision: VisionConfig
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    dtype: torch.dtype  # that weights are saved in
    source: dict


# ---------------------------------------------------------------------------------- the input


def to_device(tensor, device):
    """Copy to a device. The host does not wait: to a GPU the copy goes from pinned memory."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass
class Batch:
    """Right-padded sequences of token ids, and the patches of all their pictures in their order.

    A batch without pictures carries one dummy picture whose features go nowhere (`vision_at` is
    empty). So every rank runs the vision encoder, whose sharded weights all ranks gather together.
    """

    ids: torch.Tensor  # (B, T) int64
    positions: torch.Tensor  # (3, B, T) int64: time, height, width
    lengths: torch.Tensor  # (B,) int64: tokens that are not padding; of a group, the prompt's
    patches: torch.Tensor  # (N, 3 * 2 * 14 * 14) float32
    grids: list  # [(t, h, w)] in patches, one for each picture or video
    vision_at: torch.Tensor  # (M,) int64: indices into the flattened ids, of the vision tokens
    predict_at: torch.Tensor  # (n,) int64: places in the flattened ids that predict the targets
    targets: torch.Tensor  # (n,) int64: the tokens that are scored there
    group_shape: tuple | None = None  # (G, C): the one sequence is [prompt | c1 | ... | cG]

    def to(self, device):
        tensors = {}
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                tensors[name] = to_device(value, device)
        return dataclasses.replace(self, **tensors)


# ---------------------------------------------------------------------------------- layers


def rotate(x, cos, sin):
    """Rotary embedding: the pair (x[i], x[i + D / 2]) is rotated by angle i.

    Args: x (..., D). cos, sin (..., D / 2).

    >>> cos, sin = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])  # of 0 and of 90 degrees
    >>> rotate(torch.tensor([1.0, 2.0, 3.0, 4.0]), cos, sin).tolist()  # (1, 3) stays, (2, 4) turns
    [1.0, -4.0, 3.0, 2.0]
    """
    a, b = x.chunk(2, dim=-1)
    # a * cos - b * sin and b * cos + a * sin; addcmul saves a kernel and a tensor for each.
    turned_a = torch.addcmul(a * cos, b, sin, value=-1)
    turned_b = torch.addcmul(b * cos, a, sin)
    return torch.cat((turned_a, turned_b), dim=-1)


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, then scale its numbers."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU. The vision encoder's linears have a bias, the decoder's do not."""

    def __init__(self, width, inner, bias):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# ---------------------------------------------------------------------------------- vision encoder
# A slice is a pair of frames of a video, or one picture; attention never crosses slices. Patches
# come merge block by merge block: the blocks of a slice row by row, then the 2 x 2 patches of a
# block. Within the encoder the merge blocks are sorted by attention window, and at its end they are
# put back in order.


def vision_angles(grids, config):
    """Rotary angles of every patch: half of them turn with the row, half with the column.

    Returns: (N, D / 2), on the CPU.
    """
    dim = config.head_dim // 2
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)  # (D/4,)
    m = config.spatial_merge_size
    places = []
    for t, h, w in grids:
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        place = torch.stack((rows, columns), dim=-1)  # (h, w, 2)
        place = place.reshape(h // m, m, w // m, m, 2).transpose(1, 2)  # merge block by merge block
        places.append(place.reshape(h * w, 2).repeat(t, 1))  # (t*h*w, 2)
    angles = torch.cat(places)[:, :, None] * frequencies  # (N, 2, D/4)
    return angles.flatten(1)


def window_order(grids, config):
    """Sort merge blocks (2 x 2 patches) by attention window, the windows of a slice row by row.

    Returns: order (M,): order[i] is the block that becomes number i. sizes: blocks in each window.

    2 x 6 blocks, windows 4 blocks wide and high: a window of 2 x 4 and one of 2 x 2.

    >>> order, sizes = window_order([(1, 4, 12)], VisionConfig(window_size=112))
    >>> order.tolist(), sizes
    ([0, 1, 2, 3, 6, 7, 8, 9, 4, 5, 10, 11], [8, 4])
    """
    m = config.spatial_merge_size
    side = config.window_size // config.patch_size // m  # blocks
    windows = []
    first = 0
    for t, h, w in grids:
        slice_, row, column = torch.meshgrid(
            torch.arange(t), torch.arange(h // m), torch.arange(w // m), indexing="ij"
        )
        down = math.ceil(h // m / side)  # windows of a slice
        across = math.ceil(w // m / side)
        window = (slice_ * down + row // side) * across + column // side
        windows.append(window.flatten() + first)
        first += t * down * across
    window = torch.cat(windows)  # (M,) number of each block's window
    return window.argsort(stable=True), window.bincount().tolist()


class Segments:
    """Attention within segments of consecutive patches: the windows, or whole slices.

    One SDPA call does all. Equal segments are a view of the patches; unequal ones are padded to one
    rectangle (E segments, L patches), whose padding is masked.
    """

    def __init__(self, lengths, device):
        longest = max(lengths)
        self.shape = (len(lengths), longest)  # (E, L)
        self.mask = self.index = self.unpad = None
        if min(lengths) == longest:
            return
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        offsets = torch.arange(longest)
        real = offsets < torch.tensor(lengths)[:, None]  # (E, L), False for padding
        # Which patch stands where; padding reads some patch, and the mask hides it.
        index = (starts[:, None] + offsets).clamp(max=sum(lengths) - 1)  # (E, L)
        self.mask = to_device(real, device)[:, None, None, :]  # for (E, H, L, L)
        self.index = to_device(index.flatten(), device)  # (E*L,)
        self.unpad = to_device(real.flatten().nonzero()[:, 0], device)  # (N,) back again

    def attend(self, q, k, v):
        """(N, H, D) each -> (N, H, D)."""
        if self.mask is not None:
            q, k, v = (x.index_select(0, self.index) for x in (q, k, v))  # (E*L, H, D)
        q, k, v = (x.unflatten(0, self.shape).transpose(1, 2) for x in (q, k, v))  # (E, H, L, D)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        out = out.transpose(1, 2).flatten(0, 1)  # (E*L, H, D)
        return out if self.mask is None else out.index_select(0, self.unpad)


class VisionAttention(nn.Module):
    """Attention of patches within their segment; rotary embedding in fp32."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, rope, segments):
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)  # (N, H, D)
        q = rotate(q.float(), *rope).to(x.dtype)
        k = rotate(k.float(), *rope).to(x.dtype)
        return self.proj(segments.attend(q, k, v).flatten(1))


class VisionBlock(nn.Module):
    """Attention and MLP, each after a norm and added to what came in."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, 1e-6)
        self.norm2 = RMSNorm(config.hidden_size, 1e-6)
        self.attn = VisionAttention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x, rope, segments):
        x = x + self.attn(self.norm1(x), rope, segments)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """The checkpoint stores a Conv3d with kernel = stride: on flattened patches it is a matrix."""

    def __init__(self, config):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(
            config.in_channels, config.hidden_size, kernel, stride=kernel, bias=False
        )

    def forward(self, patches):
        weight = self.proj.weight.flatten(1)  # (W, 1176)
        return F.linear(patches.to(weight.dtype), weight)


class PatchMerger(nn.Module):
    """Concatenate the 2 x 2 patches of each block and project them to the decoder's width."""

    def __init__(self, config):
        super().__init__()
        self.wide = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, 1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(self.wide, self.wide),
            nn.GELU(),
            nn.Linear(self.wide, config.out_hidden_size),
        )

    def forward(self, x):
        return self.mlp(self.ln_q(x).view(-1, self.wide))  # (N, W) -> (M, W of the decoder)


class VisionEncoder(nn.Module):
    """A ViT over the patches of all pictures: windows in most blocks, whole slices in a few."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(self, patches, grids, call_layer):
        """One feature for each merge block, in the order of the patches.

        Args:    patches (N, 1176). grids: [(t, h, w)]. call_layer: see QwenVL.call_layer.
        Returns: (M, W of the decoder), M = N / 4.
        """
        device = patches.device
        order, sizes = window_order(grids, self.config)  # of the M blocks
        per_block = self.config.spatial_merge_size**2
        by_window = (order[:, None] * per_block + torch.arange(per_block)).flatten()  # (N,) patches

        # Rotary embedding by a patch's row and column.
        angles = to_device(vision_angles(grids, self.config)[by_window], device)[:, None]
        rope = angles.cos(), angles.sin()  # (N, 1, D/2)

        # Who attends to whom: within a window, or within a whole slice.
        windows = Segments([size * per_block for size in sizes], device)
        slice_sizes = []
        for t, h, w in grids:
            slice_sizes += t * [h * w]
        slices = Segments(slice_sizes, device)

        x = self.patch_embed(patches).index_select(0, to_device(by_window, device))  # (N, W)
        for index, block in enumerate(self.blocks):
            whole = index in self.config.fullatt_block_indexes
            x = call_layer(block, x, rope, slices if whole else windows)
        merged = self.merger(x)  # (M, W of the decoder), by window
        return merged.index_select(0, to_device(order.argsort(), device))


# ---------------------------------------------------------------------------------- attention
# Who attends to whom is decided by a "layout": sequences of their own (Causal), a group behind its
# prompt (SharedPrompt), or the keys of earlier steps (KVCache). So the layers hold no mask code.
# Their `layer` is the number of the layer that attends; only the cache needs it.


def text_rope(positions, config, dtype):
    """cos and sin for `rotate`, from positions on three axes.

    mrope_section says how many frequencies, from the fastest on, turn with time, then with height,
    then with width.

    Args:    positions (3, B, T).
    Returns: cos, sin, (B, 1, T, D / 2) each.
    """
    steps = torch.arange(0, config.head_dim, 2, device=positions.device)
    frequencies = config.rope_theta ** (-steps.float() / config.head_dim)  # (D/2,)
    angles = []
    for axis, some in zip(positions.float(), frequencies.split(config.mrope_section)):
        angles.append(axis[..., None] * some)  # (B, T, section)
    angles = torch.cat(angles, dim=-1)[:, None]  # (B, 1, T, D/2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def attend_causal(q, k, v):
    """q (B, H, T, D) against k, v (B, K, T, D): each key-value head serves H / K query heads."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def attend_masked(q, k, v, mask):
    """q (B, H, T, D) against k, v (B, K, S, D); mask (T, S) or (B, 1, 1, S): True where q sees k.

    The H / K query heads of a key-value head stand one after another as more queries: no copy of
    the keys, and no kernel that has to know grouped heads and masks at once.
    """
    shared = q.shape[1] // k.shape[1]
    if mask.shape[-2] > 1:
        mask = mask.repeat(shared, 1)  # (H/K * T, S)
    queries = q.unflatten(1, (-1, shared)).flatten(2, 3)  # (B, K, H/K * T, D)
    out = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask)
    return out.unflatten(2, (shared, -1)).flatten(1, 2)  # (B, H, T, D)


class Causal:
    """Separate sequences. A token sees what stands before it, so right padding needs no mask."""

    def attend(self, layer, q, k, v):
        return attend_causal(q, k, v)


class SharedPrompt:
    """One row [prompt | c1 | ... | cG]: completions see the prompt and themselves, not each other.

    The linear layers run on P + G * C tokens instead of G * (P + C), and attention is two calls
    without a dense (P + G*C)^2 mask. Equal to G separate sequences up to rounding. A completion is
    padded on the right: its own tokens stand before the padding and never see it.
    """

    def __init__(self, group_shape, tokens, device):
        self.G, self.C = group_shape
        self.P = tokens - self.G * self.C
        own = torch.ones(self.C, self.C, dtype=torch.bool, device=device).tril()
        self.mask = torch.cat((own.new_ones(self.C, self.P), own), dim=1)  # (C, P + C)

    def attend(self, layer, q, k, v):
        split = (self.P, self.G * self.C)
        q_prompt, q = q.split(split, dim=2)
        k_prompt, k = k.split(split, dim=2)
        v_prompt, v = v.split(split, dim=2)
        prompt = attend_causal(q_prompt, k_prompt, v_prompt)  # (1, H, P, D)

        # The completions become a batch, each with the prompt's keys before its own:
        # (1, H or K, G*C, D) -> (G, H or K, C, D).
        q, k, v = (x[0].unflatten(1, (self.G, self.C)).transpose(0, 1) for x in (q, k, v))
        k = torch.cat((k_prompt.expand(self.G, -1, -1, -1), k), dim=2)  # (G, K, P + C, D)
        v = torch.cat((v_prompt.expand(self.G, -1, -1, -1), v), dim=2)
        completions = attend_masked(q, k, v, self.mask)  # (G, H, C, D)

        completions = completions.transpose(0, 1).flatten(1, 2)[None]  # (1, H, G*C, D)
        return torch.cat((prompt, completions), dim=2)


class KVCache:
    """Keys and values of all layers while decoding; each sequence keeps its own length.

    The first forward (prefill) stores the prompts' keys; `expand` copies them to the completions of
    each group, with space to grow; each further forward brings one token a sequence, written at the
    sequence's own length. Later keys are hidden by a length mask. The number of keys in use is
    counted on the CPU, so that no step waits for the GPU, and rounded up to KEY_BLOCK.
    """

    def __init__(self, lengths):
        self.lengths = lengths  # (B,) keys of each sequence; (R,) after expand, fewer after keep
        self.keys, self.values = [], []  # of each layer (B, K, P, D); (R, K, S, D) after expand
        self.used = 0  # upper bound of the longest sequence's keys
        # Of the present step, set by begin_step:
        self.sequences = None  # (R,) 0, 1, 2, ...
        self.write_at = None  # (R,) where each sequence's new key goes
        self.seen = 0  # keys that are attended to, masked or not
        self.mask = None  # (R, 1, 1, seen) True for a key that its sequence has

    def expand(self, G, reserve):
        """B prompts become B * G sequences with space for more keys; decoding begins."""
        self.used = self.keys[0].shape[2]

        def grow(x):  # (B, K, P, D) -> (R, K, P + reserve, D)
            return F.pad(x, (0, 0, 0, reserve)).repeat_interleave(G, dim=0)

        self.keys = [grow(k) for k in self.keys]
        self.values = [grow(v) for v in self.values]
        self.lengths = self.lengths.repeat_interleave(G)

    def keep(self, kept):
        """Keep only these sequences. kept: int64 indices."""
        self.keys = [k.index_select(0, kept) for k in self.keys]
        self.values = [v.index_select(0, kept) for v in self.values]
        self.lengths = self.lengths[kept]

    def begin_step(self):
        """Once in a decoding step, for all layers: where the new keys go, which keys are seen."""
        device = self.lengths.device
        self.sequences = torch.arange(len(self.lengths), device=device)
        self.write_at = self.lengths
        self.lengths = self.lengths + 1
        self.used += 1
        blocks = math.ceil(self.used / KEY_BLOCK)
        self.seen = min(blocks * KEY_BLOCK, self.keys[0].shape[2])
        index = torch.arange(self.seen, device=device)
        self.mask = (index < self.lengths[:, None])[:, None, None]

    def attend(self, layer, q, k, v):
        if self.mask is None:  # prefill: no decoding step has begun
            self.keys.append(k)
            self.values.append(v)
            return attend_causal(q, k, v)
        # Each sequence's new key goes to a place of its own: (R, K, D) into (R, K, S, D).
        self.keys[layer][self.sequences, :, self.write_at] = k[:, :, 0]
        self.values[layer][self.sequences, :, self.write_at] = v[:, :, 0]
        k = self.keys[layer][:, :, : self.seen]
        v = self.values[layer][:, :, : self.seen]
        return attend_masked(q, k, v, self.mask)


# ---------------------------------------------------------------------------------- decoder


class Attention(nn.Module):
    """Grouped-query attention with a bias on queries, keys and values."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, kv_width)
        self.v_proj = nn.Linear(config.hidden_size, kv_width)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H or K, T, D)

    def forward(self, x, rope, layout):
        q = rotate(self.heads(self.q_proj(x)), *rope)
        k = rotate(self.heads(self.k_proj(x)), *rope)
        v = self.heads(self.v_proj(x))
        out = layout.attend(self.layer, q, k, v)  # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, W)


class DecoderLayer(nn.Module):
    """Attention and MLP, each after a norm and added to what came in."""

    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=False)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rope, layout):
        x = x + self.self_attn(self.input_layernorm(x), rope, layout)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The decoder's parts; QwenVL.forward runs them."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


# ---------------------------------------------------------------------------------- the head


def ban(logits, banned):
    """Make banned tokens impossible, in place.

    Args: logits (n, v) fp32. banned (v,) bool, or None.
    """
    if banned is None:
        return logits
    return logits.masked_fill_(banned, BANNED)


def score_tokens(hidden, targets, head, banned=None, temperature=1.0):
    """Log-probability of each target, and entropy of the distribution that it is drawn from.

        log_p = (hidden @ head.T / temperature).log_softmax(-1)      (n, V)
        return log_p.gather(-1, targets), -(log_p.exp() * log_p).sum(-1)

    This is all that TokenScores computes, without ever holding (n, V) logits. Logits are linear in
    hidden, so that dividing hidden by the temperature does the same.

    Args:    hidden (n, W), targets (n,), head (V, W), banned (V,) bool: tokens of probability 0.
    Returns: log_probs (n,), entropies (n,) in nats, both fp32; entropies carry no gradient.
    """
    return TokenScores.apply(hidden / temperature, targets, head, banned)


def vocabulary_pieces(hidden, targets, head, banned):
    """Go through the vocabulary in pieces of v tokens, HEAD_LOGITS logits at a time.

    Yields: span: slice of the piece. logits (n, v) fp32. here (n,) bool: the target is in this
            piece. column (n, 1): where in it; 0 or v - 1 if it is in another.
    """
    size = max(1, HEAD_LOGITS // max(1, len(hidden)))
    for first in range(0, len(head), size):
        span = slice(first, first + size)
        logits = F.linear(hidden, head[span]).float()
        logits = ban(logits, None if banned is None else banned[span])
        column = targets - first
        here = (column >= 0) & (column < logits.shape[1])
        yield span, logits, here, column.clamp(0, logits.shape[1] - 1)[:, None]


class TokenScores(torch.autograd.Function):
    """score_tokens, a piece of the vocabulary at a time, with its gradient by hand.

    All logits of 151,936 tokens would fill the memory. So a piece's logits z (n, v) are made, used
    and dropped, and made again in the backward. Write p for the softmax of a piece by itself, L_i
    for the log of the sum of exp(z) over piece i, L for the same over the whole vocabulary.

    Forward:   L = logsumexp(L_1, L_2, ...)      log p(target) = z[target] - L
               share_i = exp(L_i - L)            the probability that a token is in piece i
               To draw a token is to draw a piece, then a token in it, so the entropy is
               entropy(shares) + sum of share_i * entropy(p of piece i).
    Backward:  The derivative of z[target] - L with respect to z[j] is [j == target] - softmax[j],
               and softmax over the whole vocabulary is share_i * p. With g the gradient that
               arrives for log p(target), the gradient of piece i's logits is
               dz = g * ([j == target] - share_i * p)
               and from z = hidden @ head^T follow d_hidden = dz @ head and d_head = dz^T @ hidden.

    Why not autograd with a checkpoint for each piece: all that is needed is the softmax kernel.
    logsumexp's backward calls exp, which on a CPU takes long where the result underflows, as it
    does for most tokens of a trained model. docs/speed.md has the figures.
    """

    @staticmethod
    def forward(ctx, hidden, targets, head, banned):
        z_target = torch.zeros(len(hidden), device=hidden.device)
        log_sums, entropies = [], []  # of each piece
        for _, z, here, column in vocabulary_pieces(hidden, targets, head, banned):
            z_target = torch.where(here, z.gather(1, column)[:, 0], z_target)
            p = z.softmax(1)
            # L_i = z[j] - log p[j] for every j. Taken at the likeliest j: its p cannot underflow.
            log_sum = z.amax(1) - p.amax(1).log()
            log_sums.append(log_sum)
            entropies.append(log_sum - (p * z).sum(1))  # -sum of p * log p
        log_sums = torch.stack(log_sums)  # (pieces, n)
        L = log_sums.logsumexp(0)
        shares = (log_sums - L).exp()
        entropy = (torch.special.entr(shares) + shares * torch.stack(entropies)).sum(0)

        ctx.save_for_backward(hidden, targets, head, shares)
        ctx.banned = banned
        ctx.mark_non_differentiable(entropy)
        return z_target - L, entropy

    @staticmethod
    def backward(ctx, g, _):
        hidden, targets, head, shares = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        d_head = torch.empty_like(head)
        pieces = vocabulary_pieces(hidden, targets, head, ctx.banned)
        for (span, z, here, column), share in zip(pieces, shares):
            dz = z.softmax(1).mul_((-g * share)[:, None])  # (n, v)
            dz.scatter_add_(1, column, (g * here)[:, None])  # 0 where the target is elsewhere
            dz = dz.to(head.dtype)
            d_hidden += dz @ head[span]
            d_head[span] = dz.T @ hidden
        return d_hidden.to(hidden.dtype), None, d_head, None


# ---------------------------------------------------------------------------------- the model


class QwenVL(nn.Module):
    """Vision encoder, decoder and head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.visual = VisionEncoder(config.vision)
        self.model = Decoder(config.text)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)

    def call_layer(self, layer, *inputs):
        """Call a layer; with checkpointing its activations are computed again in the backward."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
        return layer(*inputs)

    def head(self):
        """The head's weight (V, W): the embeddings' if they are tied."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def embed(self, batch):
        """Embeddings of the tokens (B, T, W), with vision features in place of pad tokens."""
        x = self.model.embed_tokens(batch.ids)  # (B, T, W)
        features = self.visual(batch.patches, batch.grids, self.call_layer)  # (M, W)
        features = features[: len(batch.vision_at)]  # none of a dummy picture
        return x.flatten(0, 1).index_copy(0, batch.vision_at, features).view_as(x)

    def forward(self, batch, cache=None, banned=None, temperature=1.0):
        """Score the batch's targets, or, with an empty cache, fill it with the prompts (prefill).

        Both are `forward`, because FSDP gathers sharded weights for a call of the module only.

        Returns: without a cache (log_probs (n,), entropies (n,)), see score_tokens;
                 with one, logits (B, V) of the token after each prompt.
        """
        if cache is not None:
            layout = cache
        elif batch.group_shape:
            layout = SharedPrompt(batch.group_shape, batch.ids.shape[1], batch.ids.device)
        else:
            layout = Causal()
        x = self.embed(batch)
        rope = text_rope(batch.positions, self.config.text, x.dtype)
        for layer in self.model.layers:
            x = self.call_layer(layer, x, rope, layout)
        x = x.flatten(0, 1)  # (B*T, W)
        if cache is None:
            x = self.model.norm(x.index_select(0, batch.predict_at))  # (n, W)
            return score_tokens(x, batch.targets, self.head(), banned, temperature)
        first = torch.arange(len(batch.ids), device=x.device) * batch.ids.shape[1]
        last = first + batch.lengths - 1  # (B,) each prompt's last token
        return self.logits(x.index_select(0, last), banned, temperature)

    def decode(self, tokens, position, cache, banned=None, temperature=1.0):
        """One more token for each sequence. FSDP's weights must be gathered (runtime.gathered).

        Args:    tokens (R,), position (R,): the same on all three axes. R: those in the cache.
        Returns: logits (R, V) of the token that follows.
        """
        cache.begin_step()
        x = self.model.embed_tokens(tokens[:, None])  # (R, 1, W)
        positions = position.expand(3, -1)[:, :, None]  # (3, R, 1)
        rope = text_rope(positions, self.config.text, x.dtype)
        for layer in self.model.layers:
            # layer.forward, not layer(): past FSDP's hooks, which take as long as the layer itself.
            x = layer.forward(x, rope, cache)
        return self.logits(x[:, 0], banned, temperature)

    def logits(self, x, banned, temperature):
        """Last norm and head: hidden states (R, W) -> logits (R, V) in fp32."""
        x = self.model.norm(x) / temperature
        # This way round a CPU is faster at a few rows in fp32. The copy makes each row's logits lie
        # together: with it the softmax that follows takes a third of the time (docs/speed.md).
        return ban((self.head() @ x.T).T.contiguous().float(), banned)


# ---------------------------------------------------------------------------------- generation


@dataclass
class Rollout:
    """R = B * G sampled completions; number b * G + g is completion g of prompt b."""

    ids: torch.Tensor  # (R, C) int64, zeros after a completion's end
    lengths: torch.Tensor  # (R,) int64, the end-of-turn token included
    finished: torch.Tensor  # (R,) bool, False where max_new_tokens cut the completion

    def append(self, step, live, tokens, stops):
        """Write the tokens of one step.

        Args:    live: which of the R completions each of the tokens belongs to.
        Returns: going, bool for each of live: has not ended with this token or before.
        """
        was_going = ~self.finished[live]
        self.ids[live, step] = tokens * was_going
        self.lengths[live] += was_going
        self.finished[live] |= torch.isin(tokens, stops)
        return ~self.finished[live]


def draw(p, uniform):
    """One token for each sequence by inverse CDF: the first whose running sum of p is above u.

    In two levels: first the block of DRAW_BLOCK tokens, then the token in it. One running sum of
    151,936 probabilities in float64 takes several times as long as the softmax (docs/speed.md).

    The same uniforms give the same tokens, however sequences are batched or spread over processes.
    Blocks are added up in fp32, so a block's edge may lie off by 1e-7 of its probability; a token
    of probability 0 is never drawn.

    Args:    p (R, V) fp32. uniform (R,) in [0, 1).
    Returns: tokens (R,).

    0.6 lies beyond the first token's 0.5 and within the second's 0.5 to 0.75.

    >>> draw(torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([0.6])).item()
    1
    """
    padded = F.pad(p, (0, -p.shape[1] % DRAW_BLOCK))
    blocks = padded.unflatten(1, (-1, DRAW_BLOCK))  # (R, blocks, 512)
    sums = blocks.sum(-1).double()  # (R, blocks)
    cdf = sums.cumsum(-1)
    target = uniform.double()[:, None] * cdf[:, -1:]  # the CDF ends at 1 only up to rounding
    block = torch.searchsorted(cdf, target, right=True)  # (R, 1)

    # What is left of u within the block. Rounding may bring it out of the block by a little.
    rest = target - (cdf - sums).gather(1, block)
    chosen = blocks.take_along_dim(block[:, :, None], dim=1)[:, 0]  # (R, 512)
    cdf = chosen.cumsum(-1, dtype=torch.float64)
    zero = torch.zeros_like(rest)
    rest = torch.minimum(rest, cdf[:, -1:].nextafter(zero)).maximum(zero)
    return (block * DRAW_BLOCK + torch.searchsorted(cdf, rest, right=True))[:, 0]


def choose_tokens(logits, uniform):
    """One token for each sequence, (R,): drawn with a uniform number, or the likeliest.

    Args:    logits (R, V). uniform (R,) in [0, 1), or None for the likeliest.
    """
    if uniform is None:
        return logits.argmax(-1)
    return draw(logits.softmax(-1), uniform)


def next_positions(batch):
    """(B,) the position of the token that follows each prompt: the largest so far plus one."""
    padding = torch.arange(batch.ids.shape[1], device=batch.ids.device) >= batch.lengths[:, None]
    return batch.positions.amax(0).masked_fill(padding, -1).amax(1) + 1


@torch.no_grad()
def generate(
    model, batch, max_new_tokens, stop_ids, G=1, uniforms=None, banned=None, temperature=1.0
):
    """Continue every prompt of the batch G times; each prompt is computed once.

    A completion ends at any of `stop_ids`; ended ones leave the cache once they are a quarter of
    it. The host waits for the device once in a step: to know how many go on. FSDP's weights must be
    gathered (runtime.gathered).

    Args:    uniforms: (B * G, max_new_tokens) in [0, 1), the noise; None decodes greedily.
    Returns: Rollout, on the batch's device.
    """
    R, device = len(batch.ids) * G, batch.ids.device
    rollout = Rollout(
        ids=torch.zeros(R, max_new_tokens, dtype=torch.long, device=device),
        lengths=torch.zeros(R, dtype=torch.long, device=device),
        finished=torch.zeros(R, dtype=torch.bool, device=device),
    )
    stops = to_device(torch.tensor(stop_ids), device)
    cache = KVCache(batch.lengths)
    logits = model(batch, cache, banned, temperature).repeat_interleave(G, dim=0)  # (R, V)
    cache.expand(G, max_new_tokens)
    position = next_positions(batch).repeat_interleave(G)  # (R,)

    # live[i]: which of the R completions row i of the cache is. Rows of ended ones are dropped.
    live = torch.arange(R, device=device)
    for step in range(max_new_tokens):
        uniform = None if uniforms is None else uniforms[live, step]
        tokens = choose_tokens(logits, uniform)
        going = rollout.append(step, live, tokens, stops)
        count = int(going.sum())  # the host waits here
        if count == 0 or step + 1 == max_new_tokens:
            break
        if count <= 0.75 * len(live):
            kept = going.nonzero()[:, 0]
            cache.keep(kept)
            live, tokens, position = live[kept], tokens[kept], position[kept]
        logits = model.decode(tokens, position, cache, banned, temperature)
        position = position + 1
    return rollout
