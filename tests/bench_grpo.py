"""Timings of GRPO: one step against TRL's GRPOTrainer, the shared prompt against a copy per completion, decoding.

    python bench_grpo.py step --peer-python TRL_VENV/bin/python   # pip install torch==2.13.0, then trl pillow
    python bench_grpo.py step                                     # ours alone, against its counted floor
    python bench_grpo.py shared
    python bench_grpo.py decode

step: the same weights (44 million, 151,936 words), fp32, 2 prompts of one 364x280 picture, 8 completions of 128 tokens
each, beta 0.01. Each side is a process of its own that waits while the other works; --repeat steps in turn after one
to warm up. Every figure is a median; peak memory is the process's largest resident set.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bench import median_seconds, peak_gib
from PIL import Image

from checkpoint import build_model, load_model, parse_config
from data import Media, Processor, Sample, collate
from grpo import group_batch, group_log_probs, parts, sample_groups, update_step
from model import Batch, generate
from rooms.tiny import CONFIG, initialize, train_tokenizer, write_model
from runtime import main_guard
from settings import Parser

TEXT = "How many chairs stand in the room that the picture shows? Think of each of them before you answer."
PICTURE = (280, 364)  # height, width
SMALL = CONFIG | {  # 44 million weights, 39 of them the words
    "vocab_size": 151936,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "vision_config": CONFIG["vision_config"]
    | {"hidden_size": 160, "intermediate_size": 440, "out_hidden_size": 256},
}
LARGE = SMALL | {  # 611 million weights, 1.2 GB in bf16: far more than any cache holds
    "torch_dtype": "bfloat16",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_config": SMALL["vision_config"] | {"out_hidden_size": 1536},
}
SETTINGS = argparse.Namespace(
    num_generations=8,
    max_completion_length=128,
    temperature=1.0,
    beta=0.01,
    epsilon=0.2,
    epsilon_high=None,
    loss_type="grpo",
    scale_rewards="group",
    mask_truncated_completions=False,
    micro_batch=8,
    seed=0,
    reward_funcs=["format", "accuracy"],
    reward_weights=[1.0, 1.0],
    min_pixels=None,
    max_pixels=None,
    num_frames=16,
    fps=None,
    video_seconds="grid",
    prompts=None,
    prompt_style="thinking",
)


# ---------------------------------------------------------------------------------------------- one step


def pictures(folder):
    """Paths of the two prompts' pictures."""
    paths = [Path(folder, f"picture{i}.png") for i in range(2)]
    for path in paths:
        if not path.is_file():
            noise = np.random.default_rng(len(path.name)).integers(
                0, 255, (*PICTURE, 3), dtype=np.uint8
            )
            Image.fromarray(noise).save(path)
    return paths


def our_step(directory):
    """A function that makes one optimizer step as grpo.main does, its tokens per prompt, its completions' lengths."""
    model, reference = (load_model(directory, torch.float32) for _ in range(2))
    reference.requires_grad_(False)
    processor = Processor(directory, model.config, SETTINGS)
    processor.stop_ids = (-1,)  # every completion has all its tokens
    samples = [
        Sample("bench", "0", TEXT, "object count", "3", media=(Media("image", str(path)),))
        for path in pictures(directory)
    ]
    banned, optimizer = (
        processor.banned("cpu"),
        torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True),
    )

    def step():
        groups = sample_groups(model, processor, samples, range(len(samples)), 1, SETTINGS, "cpu")
        for group, log_probs in zip(
            groups, group_log_probs(reference, groups, SETTINGS.micro_batch, banned, 1.0)
        ):
            group.reference = log_probs
        update_step(
            model,
            groups,
            sum(len(parts(g, SETTINGS.micro_batch)) for g in groups),
            SETTINGS,
            banned,
            sum(len(g.ids) for g in groups),
            sum(int(g.lengths.sum()) for g in groups),
        )
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert all((g.lengths == SETTINGS.max_completion_length).all() for g in groups)

    return step


def serve(step):
    """A side's process: a step for every line on stdin, its figures on a line of stdout."""
    for _ in sys.stdin:
        began = time.time()
        step()
        print("STEP", json.dumps({"seconds": time.time() - began, "peak": peak_gib()}), flush=True)


def serve_trl(directory):
    """The same in TRL: its trainer's steps wait for lines on stdin."""
    from datasets import Dataset
    from transformers import (
        ProcessorMixin,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2Tokenizer,
        TrainerCallback,
    )
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from trl import GRPOConfig, GRPOTrainer

    class PictureProcessor(
        Qwen2_5_VLProcessor
    ):  # the class itself wants a video processor, and that torchvision
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id, self.video_token_id = map(
                tokenizer.convert_tokens_to_ids, (self.image_token, self.video_token)
            )
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            control.should_training_stop = not sys.stdin.readline()
            self.began = time.time()

        def on_step_end(self, args, state, control, **_):
            print(
                "STEP",
                json.dumps({"seconds": time.time() - self.began, "peak": peak_gib()}),
                flush=True,
            )

    images = Qwen2VLImageProcessorPil.from_pretrained(directory)
    words = Qwen2Tokenizer.from_pretrained(directory)
    template = json.loads(Path(directory, "tokenizer_config.json").read_text())["chat_template"]
    processor = PictureProcessor(images, words, template)
    question = [{"type": "image"}, {"type": "text", "text": TEXT}]
    rows = [
        {"prompt": [{"role": "user", "content": question}], "image": Image.open(path)}
        for path in pictures(directory)
    ]
    settings = GRPOConfig(
        output_dir=str(Path(directory, "trl")),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        max_steps=1000,
        learning_rate=1e-6,
        per_device_train_batch_size=len(rows) * SETTINGS.num_generations,
        num_generations=SETTINGS.num_generations,
        max_completion_length=SETTINGS.max_completion_length,
        beta=SETTINGS.beta,
        loss_type="grpo",
        temperature=1.0,
        generation_kwargs={"min_new_tokens": SETTINGS.max_completion_length},
    )
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    GRPOTrainer(
        model,
        lambda completions, **_: [float(i % 3) for i in range(len(completions))],
        settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        callbacks=[Turns()],
    ).train()


def matrix_rate():
    """Floating-point operations per second of fp32 matrix products on this machine."""
    a, b = torch.randn(2, 2048, 2048)
    return 2 * 2048**3 / median_seconds(lambda: a @ b, 7)


def measure_step(args):
    with tempfile.TemporaryDirectory() as folder:
        weights = write_model(folder, SMALL, train_tokenizer([TEXT]), 1024 * 28 * 28, 0)
        print(
            f"{weights / 1e6:.0f} million weights, fp32, {torch.get_num_threads()} threads, torch {torch.__version__}"
        )
        pythons = {"ours": sys.executable} | ({"trl": args.peer_python} if args.peer_python else {})
        sides = {
            name: subprocess.Popen(
                [python, __file__, "serve", "--side", name, "--model", folder],
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for name, python in pythons.items()
        }
        results = {name: [] for name in sides}
        for _ in range(args.repeat + 1):
            for name, process in sides.items():
                process.stdin.write("step\n")
                process.stdin.flush()
                line = next(line for line in process.stdout if line.startswith("STEP"))
                results[name].append(json.loads(line.removeprefix("STEP")))
                print(f"  {name}: {line.strip()}", flush=True)
        for process in sides.values():
            process.stdin.close()
            process.wait()
        from torch.utils.flop_counter import FlopCounterMode  # here: it imports much

        with FlopCounterMode(display=False) as counter:
            our_step(folder)()
        work, rate = counter.get_total_flops(), matrix_rate()
    median = {
        name: float(np.median([row["seconds"] for row in rows[1:]]))
        for name, rows in results.items()
    }
    peak = {name: rows[-1]["peak"] for name, rows in results.items()}
    print(f"\n{'GRPO step':<34}{'seconds':>9}{'peak GiB':>10}")
    for name in median:
        print(f"{name:<34}{median[name]:>9.2f}{peak[name]:>10.2f}")
    print(
        f"{'floor: work / matrix rate':<34}{work / rate:>9.2f}   {work / 1e9:,.0f} GFLOP at {rate / 1e9:,.0f} GFLOP/s; "
        f"ours takes {median['ours'] * rate / work:.1f} times as long"
    )
    if "trl" in median:
        print(
            f"{'trl / ours':<34}{median['trl'] / median['ours']:>8.1f}x{peak['trl'] / peak['ours']:>9.1f}x"
        )


# ---------------------------------------------------------------------------------------------- the shared prompt


def measure_shared(args):
    """Seconds of vision + prefill and of one update, for groups that share their prompt and for a copy each."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, SMALL, train_tokenizer([TEXT]), 1024 * 28 * 28, 0)
        model = load_model(folder, torch.float32)
        processor = Processor(folder, model.config, SETTINGS)
        sample = Sample(
            "bench",
            "0",
            TEXT,
            "object count",
            "3",
            media=(Media("image", str(pictures(folder)[0])),),
        )
        example = processor.example(sample, "thinking", answer=False)
    P, C = len(example.ids), SETTINGS.max_completion_length
    print(
        f"a prompt of P = {P} tokens, one picture of {PICTURE[1]}x{PICTURE[0]} in it; completions of C = {C} tokens; fp32"
    )
    print(
        f"{'G':>4}{'tokens P+G*C':>14}{'G*(P+C)':>9}{'prefill shared':>16}{'copies':>9}{'update shared':>15}{'copies':>9}"
    )
    for G in (1, 2, 4, 8, 16):
        ids, lengths = torch.randint(1000, (G, C)), torch.full((G,), C)
        prompt = collate([example], model.config)
        shared = group_batch(prompt, ids, lengths)
        alone = [group_batch(prompt, row[None], lengths[:1]) for row in ids]
        copies = collate([example] * G, model.config)
        copies = Batch(
            torch.cat([b.ids for b in alone]),
            torch.cat([b.positions for b in alone], 1),
            lengths + P,
            copies.patches,
            copies.grids,
            torch.cat([prompt.vision_at + i * (P + C) for i in range(G)]),
            torch.cat([b.predict_at + i * (P + C) for i, b in enumerate(alone)]),
            ids.flatten(),
        )

        def update(batch):
            model.zero_grad()
            (-model(batch)[0].mean()).backward()

        seconds = [
            median_seconds(work, args.repeat)
            for work in (
                lambda: generate(model, prompt, 1, (-1,), G),
                lambda: generate(model, collate([example] * G, model.config), 1, (-1,)),
                lambda: update(shared),
                lambda: update(copies),
            )
        ]
        print(
            f"{G:>4}{P + G * C:>14}{G * (P + C):>9}{seconds[0]:>16.2f}{seconds[1]:>9.2f}{seconds[2]:>15.2f}"
            f"{seconds[3]:>9.2f}",
            flush=True,
        )


# ---------------------------------------------------------------------------------------------- decoding


def measure_decode(args):
    """Weights read per second while one row is decoded, beside what copying memory moves per second."""
    model = build_model(parse_config(LARGE)).to(torch.bfloat16).to_empty(device="cpu")
    initialize(model, 0)
    read = sum(
        p.nbytes for p in model.model.parameters()
    )  # tied: the words are read once, by the head
    ids = torch.arange(64)[None]
    batch = Batch(
        ids,
        ids.expand(3, 1, -1),
        torch.tensor([64]),
        torch.zeros(4, 1176),
        [(1, 2, 2)],
        ids[0, :0],
        ids[0, :0],
        ids[0, :0],
    )
    source = torch.ones(2**29, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    token, copy = [], []
    for _ in range(args.repeat + 1):  # in turn: both see the same machine
        short, long = (median_seconds(lambda: generate(model, batch, n, (-1,)), 1) for n in (1, 17))
        token.append((long - short) / 16)
        copy.append(median_seconds(lambda: target.copy_(source), 5))
    token, copied = float(np.median(token[1:])), source.nbytes / float(np.median(copy[1:]))
    print(
        f"bf16, {read / 1e9:.2f} GB read per token, {torch.get_num_threads()} threads: {token * 1e3:.1f} ms a token, "
        f"{read / token / 1e9:.1f} GB/s"
    )
    print(
        f"memory copy: {copied / 1e9:.1f} GB/s copied, {2 * copied / 1e9:.1f} GB/s read and written together; decoding "
        f"reads at {read / token / copied:.0%} of the one, {read / token / copied / 2:.0%} of the other"
    )


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "shared", "decode", "serve"))
    parser.add_argument(
        "--peer-python",
        help="python of an environment that has trl; without it ours is measured alone",
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--side", choices=("ours", "trl"), help="serve: the process that step starts for a side"
    )
    parser.add_argument("--model", help="serve: its model directory")
    args = parser.parse_args()
    if args.what == "serve":
        return serve(our_step(args.model)) if args.side == "ours" else serve_trl(args.model)
    {"step": measure_step, "shared": measure_shared, "decode": measure_decode}[args.what](args)


if __name__ == "__main__":
    main_guard(main)
