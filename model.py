"""Qwen2.5-VL from scratch: vision encoder, decoder, generation.

    model = checkpoint.load_model("path/to/Qwen2.5-VL-3B-Instruct")
    log_probs, entropies = model(batch)                       # training, scoring
    rollout = generate(model, batch, max_new_tokens=64, stop_ids=(151645, 151643))

Everything the model takes is one `Batch`; everything it does with it is `QwenVL.forward`.
Submodules carry the names of the checkpoint's tensors, so loading (checkpoint.py) needs no table of names.
There is no distributed code here: runtime.py shards the model from outside.

Letters in shapes: B rows, T tokens, P prompt tokens, C completion tokens, G completions in a group, R rows of a
rollout or scored tokens, V vocabulary, N patches, M merged vision tokens, H query heads, K key-value heads,
D head dimension, W width.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

HEAD_LOGITS = 2**22  # logits held at once where tokens are scored: 16 MB


# ---------------------------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder's shape. Defaults are those of transformers' class: re-saved files leave them out."""

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
    tokens_per_second: float = 4.0  # M-RoPE positions per second of video
    hidden_act: str = "silu"


@dataclass(frozen=True)
class TextConfig:
    """The decoder's shape, with transformers' class defaults."""

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


# ---------------------------------------------------------------------------------------------- what the model eats
@dataclass
class Batch:
    """Right-padded rows of token ids and the patches of all their pictures, in order of appearance.

    A batch without pictures carries one dummy picture whose features go nowhere (`vision_at` is empty): every rank
    then enters the vision tower, whose sharded weights are gathered by all ranks together.
    """

    ids: torch.Tensor  # (B, T) int64
    positions: torch.Tensor  # (3, B, T) int64: time, height, width
    lengths: torch.Tensor  # (B,) int64, tokens that are not padding
    patches: torch.Tensor  # (N, 3 * 2 * 14 * 14) float32
    grids: list  # [(t, h, w)] in patches, one per picture or video
    vision_at: torch.Tensor  # (M,) int64, places in the flattened ids that take the vision features
    predict_at: torch.Tensor  # (R,) int64, places in the flattened ids whose next token is scored
    targets: torch.Tensor  # (R,) int64, those next tokens
    group: tuple | None = None  # (G, C): the one row is [prompt | c1 | ... | cG], see SharedPrompt

    def to(self, device):
        moved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Batch(
            **{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in moved.items()}
        )


# ---------------------------------------------------------------------------------------------- layers
def rotate(x, cos, sin):
    """Rotary embedding: numbers i of the two halves of x (..., D) turn as a pair, by angle i of cos, sin (..., D/2).

    >>> rotate(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).tolist()
    [1.0, -4.0, 3.0, 2.0]
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat(
        (torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)), dim=-1
    )


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

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


# ---------------------------------------------------------------------------------------------- vision encoder
def vision_angles(grids, config):
    """Rotary angles of every patch, (N, D/2): half of them turn with the row, half with the column.

    Patches come merge block by merge block: the blocks of a frame row by row, then the 2 x 2 patches of a block.
    """
    dim = config.hidden_size // config.num_heads // 2
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)  # (D/4,)
    m, places = config.spatial_merge_size, []
    for t, h, w in grids:
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        place = torch.stack((rows, columns), dim=-1).reshape(h // m, m, w // m, m, 2)
        places.append(place.transpose(1, 2).reshape(h * w, 2).repeat(t, 1))
    return (torch.cat(places)[:, :, None] * frequencies).flatten(
        1
    )  # (N, 2, 1) * (D/4,) -> (N, D/2)


def window_order(grids, config):
    """Sort merge blocks by attention window, windows of a frame row by row.

    Returns: order (M,): the block that stands at each place; sizes: blocks in each window.

    >>> order, sizes = window_order([(1, 4, 12)], VisionConfig(window_size=112))  # 2 x 6 blocks, windows 4 wide
    >>> order.tolist(), sizes
    ([0, 1, 2, 3, 6, 7, 8, 9, 4, 5, 10, 11], [8, 4])
    """
    side, m = (
        config.window_size // config.patch_size // config.spatial_merge_size,
        config.spatial_merge_size,
    )
    windows, first = [], 0
    for t, h, w in grids:
        frame, row, column = torch.meshgrid(
            *(torch.arange(n) for n in (t, h // m, w // m)), indexing="ij"
        )
        down, across = -(-h // m // side), -(-w // m // side)
        windows.append(((frame * down + row // side) * across + column // side).flatten() + first)
        first += t * down * across
    window = torch.cat(windows)
    return window.argsort(stable=True), window.bincount().tolist()


class Segments:
    """Attention within runs of consecutive patches: the runs are padded to one rectangle, one SDPA call does all."""

    def __init__(self, lengths, device):
        longest, starts = max(lengths), torch.tensor([0] + lengths[:-1]).cumsum(0)
        offsets = torch.arange(longest)
        self.keep = (offsets < torch.tensor(lengths)[:, None]).to(device)  # (S, L)
        self.index = (starts[:, None] + offsets).clamp(max=sum(lengths) - 1).to(device)  # (S, L)
        self.mask = None if min(lengths) == longest else self.keep[:, None, None, :]

    def attend(self, q, k, v):
        """(N, H, D) each -> (N, H, D)."""
        q, k, v = (x[self.index].transpose(1, 2) for x in (q, k, v))  # (S, H, L, D)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return out.transpose(1, 2)[self.keep]


class VisionAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, rope, segments):
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)  # (N, H, D)
        q, k = (rotate(y.float(), *rope).to(x.dtype) for y in (q, k))
        return self.proj(segments.attend(q, k, v).flatten(1))


class VisionBlock(nn.Module):
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
    """The checkpoint stores a Conv3d whose kernel is as large as its stride: on flattened patches it is a matrix."""

    def __init__(self, config):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(
            config.in_channels, config.hidden_size, kernel, stride=kernel, bias=False
        )

    def forward(self, patches):
        return F.linear(patches.to(self.proj.weight.dtype), self.proj.weight.flatten(1))


class PatchMerger(nn.Module):
    """Concatenate each 2 x 2 block of patches and project it to the decoder's width."""

    def __init__(self, config):
        super().__init__()
        self.wide = wide = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, 1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, config.out_hidden_size)
        )

    def forward(self, x):
        return self.mlp(self.ln_q(x).view(-1, self.wide))


class VisionEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(self, patches, grids, run):
        """patches (N, 1176), grids [(t, h, w)] -> (M, W of the decoder), M = N / 4, in the order of the patches."""
        block = self.config.spatial_merge_size**2
        order, sizes = window_order(grids, self.config)
        by_window = (
            (order[:, None] * block + torch.arange(block)).flatten().to(patches.device)
        )  # (N,)
        angles = vision_angles(grids, self.config).to(patches.device)[
            by_window, None
        ]  # (N, 1, D/2)
        rope = angles.cos(), angles.sin()
        windows = Segments([size * block for size in sizes], patches.device)
        frames = Segments([h * w for t, h, w in grids for _ in range(t)], patches.device)
        x = self.patch_embed(patches)[by_window]
        for index, layer in enumerate(self.blocks):
            x = run(
                layer, x, rope, frames if index in self.config.fullatt_block_indexes else windows
            )
        return self.merger(x)[order.argsort().to(x.device)]


# ---------------------------------------------------------------------------------------------- decoder
def text_rope(positions, config, dtype):
    """cos and sin of positions (3, B, T), each (B, 1, T, D/2). mrope_section says how many of the frequencies, from the
    fastest on, turn with time, then with height, then with width."""
    frequencies = config.rope_theta ** (
        -torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    )
    axis = torch.arange(3, device=positions.device).repeat_interleave(
        torch.tensor(config.mrope_section, device=positions.device)
    )
    angles = (positions[axis].permute(1, 2, 0).float() * frequencies)[
        :, None
    ]  # (D/2, B, T) -> (B, 1, T, D/2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def attend_causal(q, k, v, mask=None):
    """q (B, H, T, D) against k, v (B, K, S, D): each of the K key-value heads serves H / K query heads."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


class Causal:
    """Rows of their own. A token sees what stands before it, so right padding needs no mask."""

    def attend(self, layer, q, k, v):
        return attend_causal(q, k, v)


class SharedPrompt:
    """One row [prompt | c1 | ... | cG]: G completions of C tokens see the prompt and themselves, not one another.

    The linear layers run on P + G * C tokens instead of G * (P + C), and attention is two calls without a dense
    (P + G*C)^2 mask. Equal to G separate rows up to rounding.
    """

    def __init__(self, group, tokens, device):
        self.G, self.C = group
        self.P = tokens - self.G * self.C
        own = torch.ones(self.C, self.C, dtype=torch.bool, device=device).tril()
        self.mask = torch.cat((own.new_ones(self.C, self.P), own), dim=1)  # (C, P + C)

    def attend(self, layer, q, k, v):
        q_prompt, k_prompt, v_prompt = (x[:, :, : self.P] for x in (q, k, v))
        prompt = attend_causal(q_prompt, k_prompt, v_prompt)
        q, k, v = (
            x[0, :, self.P :].unflatten(1, (self.G, self.C)).transpose(0, 1) for x in (q, k, v)
        )  # (G, H, C, D)
        k = torch.cat((k_prompt.expand(self.G, -1, -1, -1), k), dim=2)  # (G, K, P + C, D)
        v = torch.cat((v_prompt.expand(self.G, -1, -1, -1), v), dim=2)
        completions = attend_causal(q, k, v, self.mask)
        return torch.cat((prompt, completions.transpose(0, 1).flatten(1, 2)[None]), dim=2)


class KVCache:
    """Keys and values of all layers while decoding; each row keeps its own length.

    The first forward (prefill) stores what the prompt needs; `expand` copies it to G rows with room to grow; each
    further forward brings one token a row, written at the row's own length. Later keys are hidden by a length mask.
    """

    def __init__(self, lengths):
        self.lengths = lengths  # (R,) tokens held for each row
        self.keys, self.values = [], []  # per layer (R, K, S, D)
        self.decoding = False

    def expand(self, group, room):
        def grow(x):  # (B, K, P, D) -> (B*G, K, P + room, D)
            return F.pad(x, (0, 0, 0, room)).repeat_interleave(group, dim=0)

        self.keys, self.values = [grow(k) for k in self.keys], [grow(v) for v in self.values]
        self.lengths = self.lengths.repeat_interleave(group)
        self.decoding = True

    def keep(self, rows):
        """Drop all other rows."""
        self.keys, self.values = [k[rows] for k in self.keys], [v[rows] for v in self.values]
        self.lengths = self.lengths[rows]

    def attend(self, layer, q, k, v):
        if not self.decoding:
            self.keys.append(k)
            self.values.append(v)
            return attend_causal(q, k, v)
        rows, used = torch.arange(len(k), device=k.device), self.used
        self.keys[layer][rows, :, self.lengths - 1] = k[:, :, 0]
        self.values[layer][rows, :, self.lengths - 1] = v[:, :, 0]
        k, v = self.keys[layer][:, :, :used], self.values[layer][:, :, :used]
        grouped = q.unflatten(1, (k.shape[1], -1))[
            :, :, :, 0
        ]  # (R, K, H/K, D): the H/K queries of a key-value head
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=self.mask)
        return out.flatten(1, 2)[:, :, None]  # (R, H, 1, D)

    def begin_step(self):
        """Once per decoding step, for all layers: each row gets one more key; which of all keys may it see?"""
        self.lengths = self.lengths + 1
        self.used = int(self.lengths.max())
        self.mask = (torch.arange(self.used, device=self.lengths.device) < self.lengths[:, None])[
            :, None, None
        ]


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, kv_width)
        self.v_proj = nn.Linear(config.hidden_size, kv_width)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, rope, layout):
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H or K, T, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = layout.attend(self.layer, rotate(q, *rope), rotate(k, *rope), v)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
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
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


# ---------------------------------------------------------------------------------------------- the model
def score_tokens(hidden, targets, head, banned=None, temperature=1.0):
    """Log-probability of each target and entropy of the distribution it is drawn from.

    Args:    hidden (R, W), targets (R,), head (V, W), banned (V,) bool: words with probability zero.
    Returns: log_probs (R,), entropies (R,) in nats, both fp32; entropies carry no gradient.
    """
    return TokenScores.apply(hidden / temperature, targets, head, banned)


def ban(logits, banned):
    """Give banned words the lowest finite number, in place: probability 0, and 0 * log 0 = 0. logits (R, V) fp32."""
    return logits if banned is None else logits.masked_fill_(banned, torch.finfo(torch.float32).min)


def tiles(hidden, targets, head, banned):
    """HEAD_LOGITS logits at a time: words, their logits (R, n), which targets are among them (R,), at which column (R, 1)."""
    count = max(1, HEAD_LOGITS // max(1, len(hidden)))
    for first in range(0, len(head), count):
        words = slice(first, first + count)
        logits = ban(
            F.linear(hidden, head[words]).float(), None if banned is None else banned[words]
        )
        column = targets - first
        yield (
            words,
            logits,
            (column >= 0) & (column < logits.shape[1]),
            column.clamp(0, logits.shape[1] - 1)[:, None],
        )


class TokenScores(torch.autograd.Function):
    """score_tokens tile by tile: all logits of 151,936 words would fill the memory. A tile's softmax times its share of the
    whole is the softmax over all words; the gradient of log p[target] is onehot(target) - p. The backward computes logits
    again. softmax, not exp: where exp underflows, as at banned words, a CPU needs four times as long for it."""

    @staticmethod
    def forward(ctx, hidden, targets, head, banned):
        chosen, log_masses, entropies = torch.zeros(len(hidden), device=hidden.device), [], []
        for _, logits, here, column in tiles(hidden, targets, head, banned):
            chosen = torch.where(here, logits.gather(1, column)[:, 0], chosen)
            top = logits.amax(1)
            p = logits.sub_(top[:, None]).softmax(1)
            log_mass = -p.amax(
                1
            ).log()  # log of the sum of exp(logit - top): the top's own p is 1 / sum
            log_masses.append(top + log_mass)
            entropies.append(log_mass - (p * logits).sum(1))
        total = torch.stack(log_masses).logsumexp(0)
        shares = (torch.stack(log_masses) - total).exp()  # (tiles, R)
        entropy = (torch.special.entr(shares) + shares * torch.stack(entropies)).sum(
            0
        )  # which tile, then which word
        ctx.save_for_backward(hidden, targets, head, shares)
        ctx.banned = banned
        ctx.mark_non_differentiable(entropy)
        return chosen - total, entropy

    @staticmethod
    def backward(ctx, gradient, _):
        hidden, targets, head, shares = ctx.saved_tensors
        to_hidden, to_head = torch.zeros_like(hidden, dtype=torch.float32), torch.empty_like(head)
        for (words, logits, here, column), share in zip(
            tiles(hidden, targets, head, ctx.banned), shares
        ):
            down = logits.softmax(1).mul_((-gradient * share)[:, None])  # (R, n)
            down = down.scatter_add_(1, column, (gradient * here)[:, None]).to(head.dtype)
            to_hidden += down @ head[words]
            to_head[words] = down.T @ hidden
        return to_hidden.to(hidden.dtype), None, to_head, None


class QwenVL(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.visual = VisionEncoder(config.vision)
        self.model = Decoder(config.text)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)

    def run(self, layer, *inputs):
        """A layer's forward; with activation checkpointing its inner values are computed again in the backward."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def forward(self, batch, cache=None, banned=None, temperature=1.0):
        """Score the batch's targets, or, with a cache, give the logits of the token that comes next.

        Returns: without a cache (log_probs (R,), entropies (R,)), see score_tokens;
                 with one, logits (B, V) after each row's last token.
        """
        x = self.model.embed_tokens(batch.ids)  # (B, T, W)
        decoding = cache is not None and cache.decoding
        if decoding:
            cache.begin_step()
        else:
            features = self.visual(batch.patches, batch.grids, self.run)[: len(batch.vision_at)]
            x = x.flatten(0, 1).index_copy(0, batch.vision_at, features).view_as(x)
        layout = cache or (
            SharedPrompt(batch.group, x.shape[1], x.device) if batch.group else Causal()
        )
        rope = text_rope(batch.positions, self.config.text, x.dtype)
        for layer in self.model.layers:
            x = self.run(layer, x, rope, layout)
        head = (
            self.model.embed_tokens.weight
            if self.config.tie_word_embeddings
            else self.lm_head.weight
        )
        if cache is None:
            x = x.flatten(0, 1)[batch.predict_at]
            return score_tokens(self.model.norm(x), batch.targets, head, banned, temperature)
        last = (
            self.model.norm(x[torch.arange(len(x), device=x.device), batch.lengths - 1])
            / temperature
        )  # (B, W)
        return ban(
            (head @ last.T).T.float(), banned
        )  # this way round: for a few rows in fp32 the CPU is faster at it


# ---------------------------------------------------------------------------------------------- generation
@dataclass
class Rollout:
    """R = B * G sampled completions; row b * G + g is completion g of prompt b."""

    ids: torch.Tensor  # (R, C) int64, zeros after a row's end
    lengths: torch.Tensor  # (R,) int64, the end-of-turn token included
    log_probs: torch.Tensor  # (R, C) fp32, of the sampled tokens; zeros after a row's end
    finished: torch.Tensor  # (R,) bool, False where max_new_tokens cut the row


def pick(logits, uniform):
    """Choose one token a row: the most likely (uniform None), or by inverse CDF from one uniform number a row.

    The same uniforms give the same tokens however rows are batched or spread over processes.

    Args:    logits (R, V), uniform (R,) in [0, 1) or None.
    Returns: tokens (R,), their log-probabilities (R,).

    >>> pick(torch.tensor([0.5, 0.25, 0.25]).log()[None], torch.tensor([0.6]))[0].item()
    1
    """
    p = logits.softmax(-1)
    if uniform is None:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        cdf = p.cumsum(-1, dtype=torch.float64)
        tokens = torch.searchsorted(cdf, uniform.double()[:, None] * cdf[:, -1:], right=True)
    return tokens[:, 0], p.gather(-1, tokens)[:, 0].log()


@torch.no_grad()
def generate(
    model, batch, max_new_tokens, stop_ids, group=1, uniforms=None, banned=None, temperature=1.0
):
    """Continue every prompt of the batch `group` times. Vision tower and prefill run once per prompt.

    Rows end at any of `stop_ids`; finished rows leave the batch once they are a quarter of it.

    Args:    uniforms: (B * group, max_new_tokens) in [0, 1), the noise of sampling; None decodes greedily.
    Returns: Rollout, on the batch's device.
    """
    rows, device = len(batch.ids) * group, batch.ids.device
    rollout = Rollout(
        torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device),
        torch.zeros(rows, dtype=torch.long, device=device),
        torch.zeros(rows, max_new_tokens, device=device),
        torch.zeros(rows, dtype=torch.bool, device=device),
    )
    stops = torch.tensor(stop_ids, device=device)
    cache = KVCache(batch.lengths)
    logits = model(batch, cache, banned, temperature).repeat_interleave(group, dim=0)
    cache.expand(group, max_new_tokens)
    live = torch.arange(
        rows, device=device
    )  # which row of the rollout each row of the cache belongs to
    padding = torch.arange(batch.ids.shape[1], device=device) >= batch.lengths[:, None]
    position = (
        batch.positions.amax(0).masked_fill(padding, -1).amax(1).repeat_interleave(group) + 1
    )  # (R,)
    for step in range(max_new_tokens):
        tokens, log_probs = pick(logits, None if uniforms is None else uniforms[live, step])
        going = ~rollout.finished[live]
        rollout.ids[live, step] = tokens * going
        rollout.log_probs[live, step] = log_probs * going
        rollout.lengths[live] += going
        rollout.finished[live] |= torch.isin(tokens, stops)
        going = ~rollout.finished[live]
        going_rows = int(going.sum())
        if going_rows == 0 or step + 1 == max_new_tokens:
            break
        if going_rows <= 0.75 * len(live):
            cache.keep(going)
            live, tokens, position = live[going], tokens[going], position[going]
        logits = model(
            dataclasses.replace(
                batch,
                ids=tokens[:, None],
                positions=position.expand(3, -1)[:, :, None],
                lengths=torch.ones_like(tokens),
            ),
            cache,
            banned,
            temperature,
        )
        position = position + 1
    return rollout
