"""Peak memory of one training step of the 3B model on N GPUs, simulated without a GPU.

    python tests/simulate_memory.py --gpus 4 --stage 2
    python tests/simulate_memory.py --gpus 8 --stage grpo --flags "--micro-batch 1"

torch's FakeTensorMode runs the real model, FSDP2 and autograd on tensors without numbers, over a
process group without processes. `Live` adds up the bytes of all storages that are alive. What CUDA
does in one kernel and the CPU in several (RMS norm, attention) is replaced by what CUDA keeps.
Not simulated: the CUDA context, NCCL's buffers, fragments of the allocator.

Prints JSON: gigabytes for "always", "update" and, for GRPO, "reference" and "rollout". The longest
row of the plan and of the simulation is one of 1,045 tokens with a film of 16 frames.
"""

import argparse
import collections
import dataclasses
import json
import math
import sys
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import model as model_module
from checkpoint import build_model, parse_config
from model import Batch, KVCache, choose_tokens
from runtime import adamw, gathered, recipe_settings, shard

aten = torch.ops.aten
GB = 1e9
BLOCK = 512  # CUDA's allocator rounds up to this many bytes
TOKENS = 1045
TARGETS = {"2": 3, "1": 100, "cold": 100}
GRIDS = [(8, 18, 24)]
CONFIG_3B = {  # Qwen2.5-VL-3B-Instruct's config.json
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "hidden_act": "silu",
    "max_position_embeddings": 128000,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 3420,
        "in_chans": 3,
        "patch_size": 14,
        "out_hidden_size": 2048,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "hidden_act": "silu",
    },
}


# ---------------------------------------------------------------------------------- live bytes


class Live(TorchDispatchMode):
    """Bytes of all storages that are alive, by what they were made for (`label`), and the peak."""

    def __init__(self):
        super().__init__()
        self.sizes = {}  # storage -> [bytes, label, finalizer]
        self.label = ""
        self.bytes = collections.Counter()
        self.peak = 0
        self.at_peak = {}

    def total(self):
        return sum(self.bytes.values())

    def restart(self):
        """Begin a new peak."""
        self.peak = 0

    def add(self, count, label):
        self.bytes[label] += count
        if self.total() > self.peak:
            self.peak = self.total()
            self.at_peak = dict(self.bytes)

    def note(self, tensor):
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        storage = tensor.untyped_storage()
        if tensor.device.type == "meta" or storage._cdata in self.sizes:
            return
        count = -(-storage.nbytes() // BLOCK) * BLOCK
        end = weakref.finalize(storage, self.forget, storage._cdata)
        self.sizes[storage._cdata] = [count, self.label, end]
        self.add(count, self.label)

    def forget(self, key):
        count, label, _ = self.sizes.pop(key)
        self.bytes[label] -= count

    def resized(self, storage):
        """FSDP frees and takes its buffers by resizing their storages."""
        entry = self.sizes.get(storage._cdata)
        if entry:
            count = -(-storage.nbytes() // BLOCK) * BLOCK
            grown = count - entry[0]
            entry[0] = count
            self.add(grown, entry[1])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(kind is DTensor for kind in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.note(leaf)
        return out


live = Live()
resize_storage = torch.UntypedStorage.resize_


def resize_and_note(storage, size):
    resize_storage(storage, size)
    live.resized(storage)
    return storage


# ---------------------------------------------------------------------------------- CUDA's kernels


class FusedNorm(torch.autograd.Function):
    """CUDA's RMS norm keeps its input, the weight and one fp32 number for each row."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(x, weight, scale)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), None


def fused_norm(x, shape, weight, eps):
    return FusedNorm.apply(x, weight, eps)


def cuda_attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    """Flash attention without a mask; with one the efficient kernel, which takes a bias."""
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    bias = torch.zeros_like(attn_mask, dtype=q.dtype)
    bias = bias.masked_fill_(attn_mask.logical_not(), -math.inf)
    keys = bias.shape[-1]
    if keys % 16:  # its rows must be aligned
        bias = F.pad(bias, (0, 16 - keys % 16))[..., :keys]
    bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    learns = torch.is_grad_enabled()
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, learns, 0.0, is_causal)[0]


window_order = model_module.window_order


def real_window_order(grids, config):
    """The sizes of windows must be numbers; the order of blocks need not."""
    with unset_fake_temporarily():
        order, sizes = window_order(grids, config)
    return torch.zeros(len(order), dtype=torch.long), sizes


class FakeSegments(model_module.Segments):
    """Segments whose indices hold no numbers."""

    def __init__(self, lengths, device):
        longest = max(lengths)
        self.shape = (len(lengths), longest)
        self.mask = self.index = self.unpad = None
        if min(lengths) < longest:
            self.mask = torch.ones(len(lengths), 1, 1, longest, dtype=torch.bool)
            self.index = torch.zeros(len(lengths) * longest, dtype=torch.long)
            self.unpad = torch.zeros(sum(lengths), dtype=torch.long)


def stand_in_for_cuda():
    torch.UntypedStorage.resize_ = resize_and_note
    F.rms_norm = fused_norm
    F.scaled_dot_product_attention = cuda_attention
    model_module.window_order = real_window_order
    model_module.Segments = FakeSegments


# ---------------------------------------------------------------------------------- one step


def sharded_model(config, mesh, activation_checkpointing=False, freeze_vision=False):
    """As runtime.load_sharded makes it, without reading weights."""
    model = build_model(config)
    model.activation_checkpointing = activation_checkpointing
    model.visual.requires_grad_(not freeze_vision)
    shard(model, mesh, torch.bfloat16)
    return model.to_empty(device="cpu")


def make_batch(rows, targets):
    patches = sum(t * h * w for t, h, w in GRIDS)
    return Batch(
        ids=torch.zeros(rows, TOKENS, dtype=torch.long),
        positions=torch.zeros(3, rows, TOKENS, dtype=torch.long),
        lengths=torch.full((rows,), TOKENS),
        patches=torch.zeros(rows * patches, 3 * 2 * 14 * 14),
        grids=GRIDS * rows,
        vision_at=torch.arange(rows * patches // 4),
        predict_at=torch.arange(rows * targets),
        targets=torch.zeros(rows * targets, dtype=torch.long),
    )


def make_group(G, C):
    """[prompt | c1 | ... | cG] with completions of the full length."""
    prompt = make_batch(1, 0)
    scored = G * C
    return dataclasses.replace(
        prompt,
        ids=torch.zeros(1, TOKENS + scored, dtype=torch.long),
        positions=torch.zeros(3, 1, TOKENS + scored, dtype=torch.long),
        predict_at=torch.arange(scored),
        targets=torch.zeros(scored, dtype=torch.long),
        group_shape=(G, C),
    )


def peak_of(run):
    """Bytes at the peak of the second of two runs: the first one makes the gradients."""
    for _ in range(2):
        live.restart()
        run()
    return live.peak


def train(model, batch, banned):
    log_probs, _ = model(batch, None, banned, 1.0)
    log_probs.sum().backward()


@torch.no_grad()
def roll_out(model, prompts, G, C, banned):
    """Prefill, two decoding steps with the cache filled to its end, and rows that leave."""
    live.restart()
    with gathered(model):
        batch = make_batch(prompts, 0)
        cache = KVCache(batch.lengths)
        logits = model(batch, cache, banned, 1.0).repeat_interleave(G, dim=0)
        cache.expand(G, C)
        cache.used = TOKENS + C - 3
        rows = prompts * G
        for _ in range(2):
            tokens = choose_tokens(logits, torch.rand(rows))
            position = torch.zeros(rows, dtype=torch.long)
            logits = model.decode(tokens, position, cache, banned)
        cache.keep(torch.arange(int(rows * 0.75)))
    return live.peak


def simulate(args, gpus):
    """The bytes of each phase, by name."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    mesh = init_device_mesh("cpu", (gpus,))
    config = parse_config(CONFIG_3B, "3B")
    stand_in_for_cuda()
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        live.label = "weights"
        model = sharded_model(config, mesh, args.activation_checkpointing, args.freeze_vision)
        reference = None
        if args.stage == "grpo" and args.beta:
            live.label = "reference"
            reference = sharded_model(config, mesh).requires_grad_(False)
        live.label = "moments"
        optimizer = adamw(model, args)
        moments = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                moments += [torch.empty_like(parameter.to_local()) for _ in range(2)]
        bytes_of = {"always": live.total()}

        live.label = "step"
        if args.stage != "grpo":
            rows = min(args.micro_batch, math.ceil(args.batch_size / gpus))
            batch = make_batch(rows, TARGETS[args.stage])
            bytes_of["update"] = peak_of(lambda: train(model, batch, None))
        else:
            banned = torch.zeros(config.text.vocab_size, dtype=torch.bool)
            G, C = args.num_generations, args.max_completion_length
            prompts = math.ceil(args.prompts_per_step / gpus)
            bytes_of["rollout"] = roll_out(model, prompts, G, C, banned)
            batch = make_group(min(args.micro_batch, G), C)
            if reference is not None:
                live.restart()
                with torch.no_grad(), gathered(reference):
                    reference(batch, None, banned, 1.0)
                bytes_of["reference"] = live.peak
            bytes_of["update"] = peak_of(lambda: train(model, batch, banned))
    return bytes_of


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--stage", default="2", choices=("1", "2", "cold", "grpo"))
    parser.add_argument("--flags", default="", help="further flags of the trainer")
    command = parser.parse_args()
    torch.set_num_threads(1)
    argv = ["--preset", "paper", "--model", "m", "--data", "d", "--out", "o"]
    argv += command.flags.split()
    rl = command.stage == "grpo"
    if not rl:
        argv += ["--stage", command.stage]
    args = recipe_settings("", "grpo" if rl else None, argv)
    bytes_of = simulate(args, command.gpus)
    print(
        "at the last peak:", {k: round(v / GB, 2) for k, v in live.at_peak.items()}, file=sys.stderr
    )
    print(json.dumps({name: count / GB for name, count in bytes_of.items()}))


if __name__ == "__main__":
    main()
