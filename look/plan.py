"""What a training run needs, before a GPU hour is spent on it.

    python -m look.plan --gpus 4x80 --stage 2 --preset paper --model DIR --data FILE.jsonl
    python -m look.plan --gpus 8x24 --stage grpo --preset paper --model DIR --data FILE.jsonl

Takes the flags of train_sft.py and grpo.py. Reads config.json, the tokenizer and the headers of the
pictures, no weights, and writes nothing. Every number follows from shapes. It was not measured on
GPUs: tests/simulate_memory.py checks it, and RESERVE is left for what neither counts.
"""

import argparse
import math
import re
import sys

from checkpoint import build_model, load_config
from data import Processor, read_all, style_of
from files import UserError, text_table
from grpo import check_settings
from ladder import RECIPES
from model import HEAD_LOGITS
from runtime import compute_dtype, main_guard, recipe_settings, run_length
from settings import Parser

GB = 1e9
RESERVE = 0.1  # of a GPU's memory: the CUDA context, NCCL's buffers, fragments
FP32 = 4  # bytes


# ---------------------------------------------------------------------------------- what is kept
# A layer's forward keeps for its backward the inputs of its products. In numbers for each token or
# patch, with W the width and I the width within the MLP: input, norm, queries, attention's output,
# second input, second norm (6 W), and gate, silu(gate), up, product (4 I).


def decoder_layer_bytes(config, prompt, group, itemsize):
    """What a decoder layer keeps for one row of `prompt` tokens, or of [prompt | c1 | ... | cG].

    Args: group: (G, C), or None.
    """
    keys_and_values = 2 * config.num_key_value_heads * config.head_dim
    numbers = 6 * config.hidden_size + keys_and_values + 4 * config.intermediate_size
    if not group:
        return itemsize * prompt * numbers
    G, C = group
    # The two parts' attention is put together once more, and each completion has keys of its own.
    tokens = prompt + G * C
    extra = tokens * config.hidden_size + G * (prompt + C) * keys_and_values
    return itemsize * (tokens * numbers + extra)


def vision_block_bytes(config, patches, itemsize):
    """What a vision block keeps. Its values are a view of W of 3 W numbers, which all stay."""
    numbers = 10 * config.hidden_size + 4 * config.intermediate_size
    return itemsize * patches * numbers


# ---------------------------------------------------------------------------------- memory


def held(parameters, gpus):
    """Numbers of these parameters that the fullest of `gpus` ranks holds.

    Each is cut into equal runs of rows: of 5 rows on 2 GPUs the first holds 3.

    >>> import torch
    >>> held([torch.empty(5, 3)], 2)
    9
    """
    return sum(-(-len(p) // gpus) * p[0].numel() for p in parameters)


def count(parameters):
    return sum(p.numel() for p in parameters)


def memory(config, args, gpus, longest):
    """Bytes on one GPU, by what they are for.

    Args:    longest: tokens, targets, patches of the longest row.
    Returns: what is always there, and a dict of phases: what each needs besides.
    """
    model = build_model(config)
    model.visual.requires_grad_(not args.freeze_vision)
    every = list(model.parameters())
    trained = [p for p in every if p.requires_grad]
    layers = [list(layer.parameters()) for layer in (*model.visual.blocks, *model.model.layers)]
    inside = {id(p) for layer in layers for p in layer}
    root = [p for p in every if id(p) not in inside]  # embeddings, merger, ...: stays gathered
    largest = max(count(layer) for layer in layers)

    always = {
        "weights, fp32": FP32 * held(every, gpus),
        "two moments, fp32": 2 * FP32 * held(trained, gpus),
    }
    if args.stage == "grpo" and args.beta:
        always["reference, fp32"] = FP32 * held(every, gpus)

    itemsize = compute_dtype(args.dtype or "bfloat16", None).itemsize
    gradients = {"gradients, fp32": FP32 * held(trained, gpus)}
    activations, scored = row_bytes(config, args, gpus, longest, itemsize)
    head = config.text.vocab_size * config.text.hidden_size
    piece = min(HEAD_LOGITS, scored * config.text.vocab_size)
    phases = {
        # In a layer's backward: its weights, the next layer's and their arrival; its gradient, and
        # the same in fp32 on its way to be reduced. The head's gradient has been made already.
        "backward": gradients
        | {
            "gathered weights": itemsize * (count(root) + 3 * largest),
            "the head's gradient": itemsize * head,
            "a layer's gradient": (itemsize + FP32) * largest,
            "activations": activations,
            "logits": 3 * FP32 * piece,
        },
        # After it: the gradients of embeddings, merger, ..., and the same in fp32.
        "reduction": gradients
        | {
            "gathered weights": itemsize * count(root),
            "root's gradients": (itemsize + FP32) * count(p for p in root if p.requires_grad),
        },
    }
    if args.stage == "grpo":
        phases["rollout"] = rollout_bytes(config, args, gpus, longest, itemsize, count(every))
    return always, phases


def row_bytes(config, args, gpus, longest, itemsize):
    """Bytes of activations in an update, and the number of tokens that are scored at once."""
    text, vision = config.text, config.vision
    if args.stage == "grpo":
        rows = 1
        group = (min(args.micro_batch, args.num_generations), args.max_completion_length)
        scored = math.prod(group)
        tokens = longest.tokens + scored
    else:
        rows = min(args.micro_batch, math.ceil(args.batch_size / gpus))
        group = None
        scored = rows * longest.targets
        tokens = rows * longest.tokens
    patches = 0 if args.freeze_vision else rows * longest.patches  # that are kept
    layer = rows * decoder_layer_bytes(text, longest.tokens, group, itemsize)
    block = vision_block_bytes(vision, patches, itemsize)
    if not args.activation_checkpointing:
        return text.num_hidden_layers * layer + vision.depth * block, scored
    # The inputs of all layers, and the inside of the one that is computed again.
    inputs = text.num_hidden_layers * tokens * text.hidden_size
    inputs += vision.depth * patches * vision.hidden_size
    return itemsize * inputs + max(layer, block), scored


def rollout_bytes(config, args, gpus, longest, itemsize, weights):
    """What sampling needs on one GPU: whole weights and the key-value cache of all completions."""
    text = config.text
    completions = math.ceil(args.prompts_per_step / gpus) * args.num_generations
    keys = longest.tokens + args.max_completion_length
    numbers = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    cache = itemsize * numbers * completions * keys
    return {
        "gathered weights": itemsize * weights,
        "key-value cache": cache,
        "its copy when rows leave": 0.75 * cache,
        # bf16 twice (columns, rows), fp32, its softmax, and the softmax padded to whole blocks
        "logits": 16 * completions * text.vocab_size,
    }


def peak(always, phases):
    """Bytes at the fullest moment."""
    return sum(always.values()) + max(sum(parts.values()) for parts in phases.values())


# ---------------------------------------------------------------------------------- the rows


def longest_row(args, config, samples):
    """Tokens of all rows as they are trained on, and one row with the most of everything.

    Returns: total, Namespace(tokens, targets, patches, where).
    """
    processor = Processor(args.model, config, args)
    rl = args.stage == "grpo"
    total = 0
    longest = argparse.Namespace(tokens=0, targets=0, patches=0, where=None)
    for sample in samples:
        style = style_of(sample, args.prompt_style if rl else None)
        example = processor.example(sample, style, with_answer=not rl, pixels=False)
        tokens = len(example.ids)
        total += tokens
        if tokens > longest.tokens:
            longest.tokens, longest.where = tokens, sample.where
        longest.targets = max(longest.targets, int((example.labels >= 0).sum()))
        patches = sum(t * h * w for t, h, w in example.grids)
        longest.patches = max(longest.patches, patches)
    return total, longest


# ---------------------------------------------------------------------------------- the plan


def read_command(argv):
    """The trainer's settings, the number of GPUs and their gigabytes."""
    parser = Parser(__doc__)
    stages = tuple(RECIPES["tiny"])
    parser.add_argument("--gpus", required=True, help="number x gigabytes of each, such as 4x80")
    parser.add_argument("--stage", required=True, choices=stages, help="what is trained")
    command, flags = parser.parse_known_args(argv)
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", command.gpus)
    if not match:
        raise UserError(f"--gpus is {command.gpus!r}, expected number x gigabytes, such as 4x80")
    # A trainer needs --out; a plan writes nothing there.
    args = recipe_settings(__doc__, command.stage, ["--out", "nowhere", *flags])
    return args, int(match[1]), int(match[2])


def main():
    args, gpus, gigabytes = read_command(sys.argv[1:])
    config = load_config(args.model)
    samples = read_all(args.data, args.images)
    total, longest = longest_row(args, config, samples)
    if args.stage == "grpo":
        check_settings(args, gpus)
        drawn, unit = args.prompts_per_step, f"groups of {args.num_generations}"
    else:
        drawn, unit = args.batch_size, "rows"
    steps, end = run_length(args, len(samples), drawn)

    # the run
    model = build_model(config)
    weights = count(model.parameters())
    frozen = count(model.visual.parameters()) if args.freeze_vision else 0
    print(f"planned, not measured: {gpus} GPUs of {gigabytes} GB")
    print(f"weights     {weights / 1e9:.3f} billion, {(weights - frozen) / 1e9:.3f} trained")
    print(
        f"rows        {len(samples):,}, {total / len(samples):,.0f} tokens on average, at most "
        f"{longest.tokens:,} ({longest.where}) and {longest.patches:,} patches"
    )
    print(f"steps       {steps:,} of {drawn} {unit}: {end}")
    state = 3 * FP32 * (weights - frozen) + FP32 * frozen
    print(
        f"disk        {state / GB:.1f} GB for each of {args.keep_last + 1} trainer states, "
        f"{weights * config.dtype.itemsize / GB:.1f} GB for the model"
    )

    # the memory
    always, phases = memory(config, args, gpus, longest)
    rows = [("GB on each GPU", "", "")]
    for phase, parts in {"always": always, **phases}.items():
        rows += [(f"  {name}", phase, f"{size / GB:.2f}") for name, size in parts.items()]
    needed = peak(always, phases)
    usable = gigabytes * GB * (1 - RESERVE)
    rows.append(("at the peak", f"of {usable / GB:.1f}", f"{needed / GB:.2f}"))
    print(text_table(rows))
    if needed > usable:
        raise UserError(
            f"--gpus {gpus}x{gigabytes}: needs {needed / GB:.1f} GB on each GPU, "
            f"{usable / GB:.1f} can be used; take more GPUs, lower --micro-batch, --max-pixels or "
            "--prompts-per-step, or add --activation-checkpointing"
        )


if __name__ == "__main__":
    main_guard(main)
