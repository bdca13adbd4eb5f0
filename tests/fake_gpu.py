"""A GPU without a GPU: a device "gpu" that computes on the CPU, under CUDA's rules about devices.

    python tests/fake_gpu.py check      # every path of the trainers on the CPU and on "gpu"
    python tests/fake_gpu.py count      # waits and kernels at the depth of the 3B model

A tensor on "gpu" wraps a tensor on the CPU. Every operation passes `Device.call`, which refuses
what CUDA refuses, and counts where the host would wait for the device:
- An operation takes tensors of one device. Exceptions: copies; a CPU number (0 dimensions) in an
  operation on each element; CPU indices in indexing, which are copied and waited for.
- The host waits when it reads a value, when a shape depends on values (nonzero, a boolean index),
  and when it copies from or to the device without non_blocking.
Values are real, so loops, rewards and losses can be compared with the CPU's.

torch's FakeTensorMode would not do: it lets torch.stack take a CPU number among GPU numbers, which
CUDA refuses, and it has no values for the loops that depend on them.

A backend is registered for a whole process, so tests/test_device_rules.py runs this file as one.
REPO names the checkout to test; by default it is this file's.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

REPO = Path(os.environ.get("REPO") or Path(__file__).resolve().parents[1])
GPU = "gpu"
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXING = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
)
SHAPE_OF_VALUES = (
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
    aten._unique2.default,
    aten.equal.default,
)


class DeviceError(RuntimeError):
    """What CUDA would have refused."""


# ---------------------------------------------------------------------------------- the device


class BackendModule(_DummyBackendModule):
    """torch.gpu: what autograd and activation checkpointing want of a backend."""

    _initialized = True

    @staticmethod
    def device(index):
        return contextlib.nullcontext()

    @staticmethod
    def get_rng_state(device=None):
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state, device=None):
        pass

    @staticmethod
    def get_amp_supported_dtype():
        return [torch.bfloat16]


class GpuTensor(torch.Tensor):
    """A tensor on "gpu"; `inner` holds its numbers on the CPU."""

    device_rules = None  # the Device of this process

    @staticmethod
    def __new__(cls, inner):
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(GPU, 0),
        )
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return cls.device_rules.call(func, args, kwargs or {})

    def tolist(self):
        self.device_rules.wait("tolist")
        return self.inner.tolist()


class Device(TorchDispatchMode):
    """The rules. Register once in a process, before any backward; use as a context."""

    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()  # (reason, place in the project) -> times
        self.kernels = 0
        self.fused = 0  # above 0: inside an operation that is one kernel on CUDA
        GpuTensor.device_rules = self
        _setup_privateuseone_for_python_backend(GPU, BackendModule())
        # torch.tensor(..., device="gpu") is made on the CPU and copied, as it is for CUDA.
        torch._C._set_only_lift_cpu_tensors(True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.call(func, args, kwargs or {})

    def wait(self, reason):
        self.waits[reason, self.place()] += 1

    def place(self):
        """The line of the project that runs: the nearest frame in a file of the checkout."""
        frame = sys._getframe(1)
        while frame:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(REPO) and path.name != "fake_gpu.py":
                return f"{path.name}:{frame.f_lineno} {frame.f_code.co_name}"
            frame = frame.f_back
        return "backward"

    def call(self, func, args, kwargs):
        """Check an operation, count it, and compute it on the CPU."""
        flat, form = tree_flatten((args, kwargs))
        tensors = [value for value in flat if isinstance(value, torch.Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, GpuTensor)]
        theirs = [tensor for tensor in tensors if not isinstance(tensor, GpuTensor)]
        target = kwargs.get("device")
        target = None if target is None else torch.device(target).type
        if ours and theirs and func not in COPIES:
            self.check_mixed(func, args, theirs)
        self.count(func, args, kwargs, ours, target)

        # On the CPU, by the tensors inside; what they give is on "gpu" again.
        plain = [self.unwrap(value) for value in flat]
        plain_args, plain_kwargs = tree_unflatten(plain, form)
        out = func(*plain_args, **plain_kwargs)
        if func is aten._to_copy.default and any(out is value for value in plain):
            out = out.clone()
        if func is aten.copy_.default:
            to_gpu = isinstance(args[0], GpuTensor)
        elif target:
            to_gpu = target == GPU
        else:
            to_gpu = bool(ours)
        same = {id(tensor.inner): tensor for tensor in ours}  # in-place operations return theirs

        def wrap(value):
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in same:
                return same[id(value)]
            return GpuTensor(value) if to_gpu else value

        return tree_map(wrap, out)

    @staticmethod
    def unwrap(value):
        if isinstance(value, GpuTensor):
            return value.inner
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def check_mixed(self, func, args, theirs):
        """Raise DeviceError unless CUDA takes these CPU tensors beside its own."""
        numbers = all(tensor.ndim == 0 for tensor in theirs)
        if numbers and torch.Tag.pointwise in func.tags:
            return
        if func in INDEXING and isinstance(args[0], GpuTensor):
            indices = [id(index) for index in args[1]]
            if all(tensor.ndim == 0 or id(tensor) in indices for tensor in theirs):
                self.wait("CPU index")
                return
        raise DeviceError(f"{func} is given tensors of two devices at {self.place()}")

    def count(self, func, args, kwargs, ours, target):
        if ours and not func.is_view and not self.fused:
            self.kernels += 1
        name = func._schema.name.removeprefix("aten::")
        if ours and (func in SHAPE_OF_VALUES or func is aten._local_scalar_dense.default):
            self.wait(name)
        elif ours and func in INDEXING:
            if any(
                isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
            ):
                self.wait("boolean index")
        elif func is aten._to_copy.default and target:
            crosses = (target == GPU) != bool(ours)
            if crosses and not kwargs.get("non_blocking"):
                self.wait(f"copy to {target}")

    @contextlib.contextmanager
    def one_kernel(self):
        """What runs within is one kernel on CUDA, though the CPU makes it of several."""
        if not self.fused:
            self.kernels += 1
        self.fused += 1
        yield
        self.fused -= 1


# ---------------------------------------------------------------------------------- what is run


def random_picture(random, width, height):
    file = io.BytesIO()
    pixels = random.integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_samples():
    """One row of each kind: a picture, two pictures, a video, boxes, text alone."""
    from data import Sample
    from pictures import Media

    random = np.random.default_rng(0)
    a = Media("image", random_picture(random, 140, 112))
    b = Media("image", random_picture(random, 84, 112))
    frames = tuple(random_picture(random, 84, 84) for _ in range(4))
    film = Media("video", frames)
    box = {"bbox_2d": [1, 2, 30, 40], "label": "lamp"}
    options = ("A. left", "B. right")
    chain = "<think>so</think><answer>2</answer>"
    one = Sample("f:1", "1", "How many chairs?", "object count", "2", (), (a,), solution=chain)
    two = Sample("f:2", "2", "Which?", "relative direction", "A", options, (b, a), solution=chain)
    three = Sample("f:3", "3", "How large is it?", "room size", "20", (), (film,), solution=chain)
    four = Sample("f:4", "4", "Where is the lamp?", "localization", (box,), (), (a,))
    five = Sample("f:5", "5", "And unseen?", "object count", "1", solution=chain)
    return [one, two, three, four, five]


def run_paths(device):
    """Every path of the trainers on one device. Returns: what each gave, by name."""
    import coldstart
    import eval as evaluation
    import grpo
    import train_sft
    from checkpoint import load_model
    from data import Processor, collate, style_of
    from look import probes
    from runtime import adamw, clip_gradients, recipe_settings

    device = torch.device(device)
    samples = make_samples()
    args = recipe_settings("", "grpo", [])
    args.max_completion_length, args.num_generations, args.micro_batch = 8, 4, 2
    model = load_model(REPO / "base", torch.float32, device)
    processor = Processor(REPO / "base", model.config)
    banned = processor.banned(device)
    gave = {}

    # evaluation and ask.py, which is the same call of generate
    rows = evaluation.answer_rows(model, processor, samples, range(5), args, device)
    gave["answers"] = [row["completion"] for row in rows]
    chains = coldstart.sample_chains(model, processor, samples, [0, 1], args, device)
    gave["chains"] = [row["completions"] for row in chains]
    maps = probes.attention_maps(model, processor, [samples[0], samples[3]], device)
    gave["maps"] = [float(heat.std()) for heat in maps]

    # supervised fine-tuning, with and without activation checkpointing
    model.train()
    settings = argparse.Namespace(learning_rate=1e-4, betas=[0.9, 0.95], weight_decay=0.1)
    optimizer = adamw(model, settings)
    examples = [processor.example(sample, style_of(sample)) for sample in samples]
    batch = collate(examples, model.config).to(device)
    for checkpointing in (False, True):
        model.activation_checkpointing = checkpointing
        gave[f"loss, checkpointing {checkpointing}"] = train_sft.accumulate_gradient(
            model, [batch], 40
        )
        gave[f"norm, checkpointing {checkpointing}"] = clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    # GRPO: rollout, log-probs, update
    groups = grpo.sample_groups(model, processor, samples[:3], [0, 1, 2], 1, args, device)
    gave["sampled"] = [group.texts for group in groups]
    grpo.add_log_probs(groups, "old_log_probs", model, args, banned, device)
    for group in groups:
        group.advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
        group.reference_log_probs = tuple(some + 0.1 for some in group.old_log_probs)
    counts = {"sequences": 12, "kept_tokens": 100, "forwards": 7}  # one filler
    gave["sums"] = list(
        grpo.accumulate_gradient(model, groups, counts, args, banned, device).values()
    )
    gave["grpo norm"] = clip_gradients(model, 1.0)
    return gave, model, processor, banned, samples


def waits_of(device, steps):
    """Waits of a rollout without an end: the difference of two lengths is what a step costs."""
    from data import collate
    from model import generate

    _, model, processor, banned, samples = steps
    examples = [processor.example(sample, "direct", with_answer=False) for sample in samples[:2]]
    prompts = collate(examples, model.config).to(GPU)
    uniforms = torch.rand(4, 7).to(GPU)
    waits = []
    for length in (6, 7):
        device.waits.clear()
        generate(model, prompts, length, (-1,), 2, uniforms, banned)
        waits.append(device.waits.copy())
    in_a_step = waits[1] - waits[0]

    device.waits.clear()
    with torch.no_grad():
        model(prompts)
    return listed(in_a_step), listed(device.waits)


def listed(waits):
    return [[*where, times] for where, times in waits.items()]


def check():
    """Print what both devices gave, and the waits of a decoding step and of a forward."""
    device = Device()  # before any backward: autograd counts the devices at its first
    on_cpu = run_paths("cpu")[0]
    with device:
        run = run_paths(GPU)
        step, forward = waits_of(device, run)
    print(json.dumps({"cpu": on_cpu, "gpu": run[0], "step": step, "forward": forward}))


# ---------------------------------------------------------------------------------- counting


def deep_config():
    """The 3B model's depth in narrow layers: the same kernels, quick to compute."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": "float32",
        "vocab_size": 2000,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 36,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "image_token_id": 1998,
        "video_token_id": 1999,
        "vision_config": {
            "depth": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 48,
            "in_chans": 3,
            "patch_size": 14,
            "out_hidden_size": 64,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "hidden_act": "silu",
        },
    }


def as_one_kernel(device, function):
    """A function that is a single kernel on CUDA."""

    def counted(*arguments, **options):
        with device.one_kernel():
            return function(*arguments, **options)

    return counted


def count():
    """Print waits and kernels of a decoding step, a forward and an SFT micro-batch."""
    import train_sft
    from checkpoint import build_model, parse_config
    from model import Batch, generate

    config = parse_config(deep_config(), "config")
    model = build_model(config).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    tokens, grid = 1045, (8, 18, 24)  # 16 frames of the paper's size
    vision = grid[0] * grid[1] * grid[2] // 4
    batch = Batch(
        ids=torch.full((1, tokens), 5),
        positions=torch.arange(tokens).expand(3, 1, -1),
        lengths=torch.tensor([tokens]),
        patches=torch.zeros(4 * vision, 3 * 2 * 14 * 14),
        grids=[grid],
        vision_at=torch.arange(vision),
        predict_at=torch.arange(tokens - 65, tokens - 1),
        targets=torch.full((64,), 7),
    )
    device = Device()
    F.rms_norm = as_one_kernel(device, F.rms_norm)
    F.scaled_dot_product_attention = as_one_kernel(device, F.scaled_dot_product_attention)
    rows = []

    def counted(name, run):
        device.waits.clear()
        device.kernels = 0
        run()
        rows.append((name, sum(device.waits.values()), device.kernels))
        return device.waits.copy()

    with device:
        model = model.to(GPU)
        batch = batch.to(GPU)
        uniforms = torch.rand(4, 9).to(GPU)
        with torch.no_grad():
            where = counted("forward", lambda: model(batch))
        for length in (8, 9):
            counted("rollout", lambda n=length: generate(model, batch, n, (-1,), 4, uniforms))
        (_, *shorter), (_, *longer) = rows.pop(-2), rows.pop(-1)
        rows.append(("decoding step", longer[0] - shorter[0], longer[1] - shorter[1]))
        model.activation_checkpointing = True
        counted(
            "SFT micro-batch, checkpointed",
            lambda: train_sft.accumulate_gradient(model, [batch], 64),
        )
    for name, waits, kernels in rows:
        print(f"{name:<30} {waits:>4} waits {kernels:>6} kernels")
    print("waits of a forward:", listed(where))


def main():
    torch.set_num_threads(1)
    sys.path.insert(0, str(REPO))
    torch.manual_seed(0)
    {"check": check, "count": count}[sys.argv[1]]()


if __name__ == "__main__":
    main()
