"""What a training run needs, before a GPU hour is spent on it: `--dry-run GPUSxGB` of train_sft.py and grpo.py.

    python train_sft.py --stage 2 --preset paper --model DIR --data FILE.jsonl --out DIR --dry-run 4x80
    python grpo.py --preset paper --model DIR --data FILE.jsonl --out DIR --dry-run 8x24

Reads config.json, the tokenizer and the headers of the pictures, no weights, and writes nothing. Weights, gradients,
moments, key-value cache and logits follow from shapes; activations are what one layer of each kind keeps for its
backward pass on this machine, times the layers. Planned, not measured on GPUs: RESERVE is left for what is not counted.
"""

import argparse
import math
import re
from functools import cache

import torch

from checkpoint import build_model, load_config
from data import Processor, style_of
from files import UserError
from ladder import RECIPES
from model import (
    HEAD_LOGITS,
    Causal,
    DecoderLayer,
    Segments,
    SharedPrompt,
    VisionBlock,
    text_rope,
    window_order,
)

GB = 1e9
RESERVE = 0.1  # of a GPU's memory: the driver, NCCL's buffers, fragments
SMALL = 512  # about this many tokens and patches are run through a layer to see what it keeps
REMEDIES = (
    {"reshard_after_forward": True},
    {"activation_checkpointing": True},
    {"micro_batch": 1},
    {"freeze_vision": True},
    {"beta": 0.0},
)  # from what only takes time to what changes the result
PLACES = (
    "model",
    "data",
    "images",
    "out",
    "replay",
    "resume",
    "device",
    "workers",
    "save_every",
    "keep_last",
    "seed",
    "dry_run",
    "prompts",
    "max_steps",
    "reshard_after_forward",
    "activation_checkpointing",
    "micro_batch",
)


def step_flops(model, tokens, targets, patches, forwards=1):
    """Floating-point operations of one optimizer step by the weights' shapes alone, over all ranks.

    A weight costs 2 a vector that it multiplies and forward, 4 more in the backward if it is trained. Vectors: tokens
    for the decoder's layers, targets for the head, patches for the vision encoder, a fourth of them for its merger.
    Left out: attention's products of queries, keys and values (at 1,000 tokens 3% of the 3B decoder's), and whatever
    is computed a second time. Divided by seconds and by the GPUs' peak this is the model FLOPs utilization (PaLM,
    Chowdhery et al. 2022, appendix B).

    Args: forwards: of every token: 1 in SFT; in GRPO one for each of rollout, old log-probs, reference and update.
    """
    head = "model.embed_tokens.weight" if model.config.tie_word_embeddings else "lm_head.weight"
    total = 0
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            vectors = (
                patches / 4
                if "merger" in name
                else patches
                if name.startswith("visual.")
                else targets
                if name == head
                else tokens
                if ".layers." in name
                else 0
            )
            total += vectors * weight.numel() * (2 * forwards + 4 * weight.requires_grad)
    return total


# ---------------------------------------------------------------------------------------------- activations


def kept_bytes(layer, *inputs):
    """Bytes that a layer's forward keeps for its backward, its weights aside."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(*inputs)
    return sum(kept.values()) - sum(
        kept.get(p.untyped_storage().data_ptr(), 0) for p in layer.parameters()
    )


def empty_layer(cls, *arguments, dtype):
    with torch.device("meta"):
        layer = cls(*arguments)
    return (
        layer.to(dtype)
        .to_empty(device="cpu")
        .requires_grad_()
        .apply(lambda module: [torch.nn.init.zeros_(p) for p in module.parameters(recurse=False)])
    )


@cache
def decoder_layer_bytes(config, prompt, group, dtype):
    """What one decoder layer keeps for a row of `prompt` tokens, or for [prompt | c1 | ... | cG] with group (G, C)."""
    G, C = group or (0, 0)
    shrink = max(1, (prompt + G * C) / SMALL)
    P, C = math.ceil(prompt / shrink), math.ceil(C / shrink)
    tokens = P + G * C
    x = torch.zeros(1, tokens, config.hidden_size, dtype=dtype, requires_grad=True)
    rope = text_rope(torch.zeros(3, 1, tokens, dtype=torch.long), config, dtype)
    layout = SharedPrompt((G, C), tokens, "cpu") if group else Causal()
    return kept_bytes(empty_layer(DecoderLayer, config, 0, dtype=dtype), x, rope, layout) * shrink


@cache
def vision_block_bytes(config, grids, dtype):
    """The largest of what a windowed and a full block keep for pictures of these grids, padding of windows included."""
    patches = sum(t * h * w for t, h, w in grids)
    t, h, w = grids[0]  # one frame is run
    x = torch.zeros(h * w, config.hidden_size, dtype=dtype, requires_grad=True)
    rope = 2 * (torch.zeros(h * w, 1, config.hidden_size // config.num_heads // 2),)
    windows = Segments([4 * size for size in window_order([(1, h, w)], config)[1]], "cpu")
    block = empty_layer(VisionBlock, config, dtype=dtype)
    return (
        max(kept_bytes(block, x, rope, s) for s in (windows, Segments([h * w], "cpu")))
        * patches
        / (h * w)
    )


# ---------------------------------------------------------------------------------------------- memory


def held(parameters, gpus):
    """Numbers of these parameters that the fullest of `gpus` ranks holds: each is cut into equal runs of rows.

    >>> held([torch.empty(5, 3)], 2)  # 3 rows and 2
    9
    """
    return sum(-(-len(p) // gpus) * p[0].numel() for p in parameters)


def memory(config, args, gpus, longest):
    """Bytes on one GPU. longest: the data's Example with most tokens, in one row with those with most patches.

    Returns: (what is always there, what is there besides while weights are updated, and while completions are sampled),
             three dicts of named parts. The peak is the sum of the first and the larger of the others.
    """
    model = build_model(config)
    model.visual.requires_grad_(not args.freeze_vision)
    layers = [list(module.parameters()) for module in (*model.visual.blocks, *model.model.layers)]
    inside = {id(p) for layer in layers for p in layer}
    every, root = list(model.parameters()), [p for p in model.parameters() if id(p) not in inside]
    trained = [p for p in every if p.requires_grad]
    size = {
        kind: [sum(p.numel() for p in unit if p.requires_grad or kind == "all") for unit in layers]
        for kind in ("all", "trained")
    }
    dtype = getattr(torch, args.dtype or "bfloat16")
    b, text, vision, rl = dtype.itemsize, config.text, config.vision, args.stage == "grpo"

    always = {
        "weights, fp32": 4 * held(every, gpus),
        "optimizer, two fp32 moments": 8 * held(trained, gpus),
    }
    if rl and args.beta:
        always["reference, fp32"] = 4 * held(every, gpus)

    # update
    rows = 1 if rl else min(args.micro_batch, math.ceil(args.batch_size / gpus))
    group = (
        (min(args.micro_batch, args.num_generations), args.max_completion_length) if rl else None
    )
    tokens = rows * longest.tokens + (math.prod(group) if rl else 0)
    patches = rows * sum(t * h * w for t, h, w in longest.grids)
    layer = rows * decoder_layer_bytes(text, longest.tokens, group, dtype)
    block = (
        rows * vision_block_bytes(vision, tuple(longest.grids), dtype) * (not args.freeze_vision)
        if longest.grids
        else 0
    )
    if args.activation_checkpointing:  # the inputs of all, and the inside of the one being computed
        inputs = b * (
            text.num_hidden_layers * tokens * text.hidden_size
            + vision.depth * patches * vision.hidden_size * (not args.freeze_vision)
        )
        activations = inputs + max(layer, block)
    else:
        activations = text.num_hidden_layers * layer + vision.depth * block
    root_size, root_trained = (
        sum(p.numel() for p in root),
        sum(p.numel() for p in root if p.requires_grad),
    )
    scored = math.prod(group) if rl else rows * longest.targets
    tile = scored * min(max(1, HEAD_LOGITS // scored), text.vocab_size)
    update = {
        "gradients, fp32": 4 * held(trained, gpus),
        # a layer, the next one and its arrival; the embeddings stay throughout
        "gathered weights": b
        * (root_size + (3 * max(size["all"]) if args.reshard_after_forward else sum(size["all"]))),
        "gradients before they are reduced": 2 * b * root_trained + (b + 4) * max(size["trained"]),
        "activations": activations,
        "logits": 3 * 4 * tile
        + 4
        * scored
        * text.hidden_size,  # a tile, its gradient and a product; the gradient of hidden
    }
    if not rl:
        return always, update, {}

    # rollout
    prompts = math.ceil(args.prompts_per_step / gpus)
    completions = prompts * args.num_generations
    cache = (
        2
        * text.num_hidden_layers
        * text.num_key_value_heads
        * text.head_dim
        * b
        * completions
        * (longest.tokens + args.max_completion_length)
    )
    rollout = {
        "gathered weights": b * sum(p.numel() for p in every),
        "key-value cache": cache,
        "its copy when rows leave": 0.75 * cache,
        "prefill": max(
            prompts * decoder_layer_bytes(text, longest.tokens, None, dtype), prompts * block
        ),
        "logits": 24
        * completions
        * text.vocab_size,  # bf16, fp32 twice, float64 probabilities and their sums
    }
    return always, update, rollout


def peak(parts):
    always, *phases = (sum(part.values()) for part in parts)
    return always + max(phases)


# ---------------------------------------------------------------------------------------------- the dry run


def longest_rows(args, samples, config):
    """Tokens of all rows as they are trained on, and one imagined row with the most tokens, targets and pictures."""
    processor, total = Processor(args.model, config, args), 0
    longest = argparse.Namespace(tokens=0, targets=0, grids=[], where=None)
    for sample in samples:
        rl = args.stage == "grpo"
        example = processor.example(
            sample, "thinking" if rl else style_of(sample), answer=not rl, pixels=False
        )
        total += len(example.ids)
        if len(example.ids) > longest.tokens:
            longest.tokens, longest.where = len(example.ids), sample.where
        longest.targets = max(longest.targets, int((example.labels >= 0).sum()))
        longest.grids = max(
            longest.grids, example.grids, key=lambda grids: sum(t * h * w for t, h, w in grids)
        )
    return total, longest


def remedy(config, args, gpus, longest, usable):
    """The first flag, else the fewest flags taken in turn, else the number of GPUs, with which the run fits."""
    fits = lambda flags, n: (
        peak(memory(config, argparse.Namespace(**vars(args) | flags), n, longest)) <= usable
    )
    remedies = (*REMEDIES[:3], {"prompts_per_step": gpus}, *REMEDIES[3:])
    changes = [
        change
        for change in remedies
        if all(vars(args).get(name, value) != value for name, value in change.items())
    ]
    together = [
        {name: value for change in changes[:i] for name, value in change.items()}
        for i in range(2, len(changes) + 1)
    ]
    for flags in changes + together:
        if fits(flags, gpus):
            return " ".join(
                f"--{name.replace('_', '-')}" + ("" if value is True else f" {value:g}")
                for name, value in flags.items()
            )
    for n in (gpus * 2**i for i in range(1, 11)):
        if fits({}, n):
            return f"{n} GPUs"
    return "none of its flags and no number of GPUs"


def dry_run(args, samples, steps):
    """Print what the run of these settings needs. UserError if it cannot fit, with what would make it fit."""
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", args.dry_run)
    if not match:
        raise UserError(f"--dry-run is {args.dry_run!r}, expected GPUs x GB, such as 4x80")
    gpus, usable = int(match[1]), int(match[2]) * GB * (1 - RESERVE)
    rl = args.stage == "grpo"
    if rl and args.prompts_per_step < gpus:
        raise UserError(
            f"--prompts-per-step is {args.prompts_per_step}, expected at least one for each of the {gpus} GPUs"
        )
    config = load_config(args.model)
    model = build_model(config)
    count = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in (("all", model), ("vision", model.visual))
    }
    trained = count["all"] - count["vision"] * args.freeze_vision
    total, longest = longest_rows(args, samples, config)
    parts = memory(config, args, gpus, longest)

    print(f"planned, not measured on GPUs: {gpus} of {match[2]} GB")
    print(f"parameters    {count['all'] / 1e9:.3f} billion, {trained / 1e9:.3f} of them trained")
    print(
        f"rows          {len(samples):,}, {total / len(samples):,.0f} tokens on average, {longest.tokens:,} at most "
        f"({longest.where}); most patches {sum(t * h * w for t, h, w in longest.grids):,}"
    )
    if rl:
        rollouts, G = math.ceil(steps / args.num_iterations), args.num_generations
        tokens = (
            rollouts
            * args.prompts_per_step
            * (total / len(samples) + G * args.max_completion_length)
        )
        print(
            f"steps         {steps:,} of {args.prompts_per_step} groups of {G}; at most {tokens / 1e6:,.1f} million "
            f"tokens, {rollouts * args.prompts_per_step * G * args.max_completion_length / 1e6:,.1f} of them sampled"
        )
    else:
        print(
            f"steps         {steps:,} of {args.batch_size} rows; {steps * args.batch_size * total / len(samples) / 1e6:,.1f} "
            f"million tokens"
        )
    state = 12 * trained + 4 * (count["all"] - trained)
    print(
        f"disk          {state / GB:.1f} GB a trainer state"
        + (f", every {args.save_every} steps" if args.save_every else ", only when stopped")
        + f", {args.keep_last} kept and one more while it is written; "
        f"{count['all'] * config.dtype.itemsize / GB:.1f} GB the model"
    )
    print("GB per GPU")
    for phase, part in zip(("always", "while updating", "while sampling"), parts):
        for name, size in part.items():
            print(f"  {size / GB:8.2f}  {name}, {phase}")
    print(f"  {peak(parts) / GB:8.2f}  at the peak, of {usable / GB:.1f} that can be used")
    paper = RECIPES["paper"][args.stage]
    changed = [
        f"{key} {vars(args)[key]} (paper {value})"
        for key, value in paper.items()
        if key not in PLACES and vars(args)[key] != value
    ]
    print("differs from the paper's recipe: " + (", ".join(changed) or "in nothing"))
    if peak(parts) > usable:
        raise UserError(
            f"--dry-run {args.dry_run}: needs {peak(parts) / GB:.1f} GB on each GPU, {usable / GB:.1f} can be used; "
            f"it would fit with {remedy(config, args, gpus, longest, usable)}"
        )
