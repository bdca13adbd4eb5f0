"""Timings of a model, of the data path, and of the same work in other libraries.

    python tests/bench.py load --model DIR --dtype bfloat16    # loading, prefill, decoding
    python tests/bench.py data                 # 26,610 rows, 2,000 videos, waiting for pictures
    python tests/bench.py peers                # beside transformers (pip install transformers)
    python tests/bench.py grpo --peer-python TRL_VENV/bin/python      # a GRPO step beside TRL's
    python tests/bench.py shared               # a group with one prompt, and with a copy for each

Seconds are medians of --repeat runs. Weights are random: seconds depend on the shapes alone.
`peers` and `grpo` start a process for each run of each side, in turn. It works once to warm up and
once for the clock; its peak is the largest resident memory, mapped files included. To compare two
checkouts, run the same command in both.
"""

import io
import json
import math
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import grpo
from checkpoint import load_model
from data import IGNORE, NO_PATCHES, Example, Processor, Sample, collate, mrope_positions, read_all
from files import UserError, read_json, read_jsonl, write_json, write_jsonl
from model import generate
from pictures import Media, to_patches
from rooms.render import mjpeg_avi
from rooms.tiny import CONFIG, train_tokenizer, write_model
from runtime import choose_device, main_guard
from settings import Parser, positive
from train_sft import Rows, accumulate_gradient

TEXT = "How many chairs stand in the room? Think of each of them before you answer."
TEXT_IDS = 250  # smaller ids are no special tokens in any tokenizer here
NEVER = (-1,)  # no token ends a completion
SMALL = CONFIG | {  # 44 million weights, 39 of them the embeddings
    "vocab_size": 151936,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "vision_config": CONFIG["vision_config"]
    | {"hidden_size": 160, "intermediate_size": 440, "out_hidden_size": 256},
}
MIDDLE = SMALL | {  # 113 million weights, 78 of them the embeddings
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "vision_config": SMALL["vision_config"]
    | {
        "depth": 8,
        "hidden_size": 320,
        "intermediate_size": 880,
        "out_hidden_size": 512,
        "window_size": 112,
        "fullatt_block_indexes": [3, 7],
    },
}
LARGE = SMALL | {  # 611 million weights, 1.2 GB in bf16: far more than any cache holds
    "torch_dtype": "bfloat16",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": SMALL["vision_config"] | {"out_hidden_size": 1536},
}
TASKS = {
    "images": "vision encoder, 8 pictures of 640x480",
    "video": "vision encoder, 32 frames of 336x252",
    "prefill": "prefill of 1,000 tokens with a picture of 640x480",
    "decode": "64 tokens of prefill, 32 decoded, 1 row",
    "sample": "64 tokens of prefill, 32 sampled, 16 rows",
    "train": "forward and backward, 1,500 tokens with a picture, 64 of them trained",
}
DECODED = {"prefill": (1, 1), "decode": (1, 32), "sample": (16, 32)}  # rows, tokens
GROUP, LENGTH = 8, 128  # completions of a prompt, tokens of a completion
GROUPS = (1, 4, 16)  # of the command shared

# ---------------------------------------------------------------------------------- shared


def seconds_of(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def median_seconds(work, repeat):
    """Median of `repeat` runs, after one that warms up."""
    work()
    return statistics.median(seconds_of(work) for _ in range(repeat))


def peak_gib():
    """Largest resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def noise(width, height):
    """A picture of noise."""
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(picture, kind):
    """The bytes of a picture's file."""
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def write_random(folder, config):
    """Write a model directory of random weights that never ends a completion."""
    weights = write_model(folder, config, train_tokenizer([TEXT]), 1024 * 28 * 28, 0)
    # The sampler never gives the picture's pad token.
    pad = read_json(Path(folder, "config.json"))["image_token_id"]
    write_json(Path(folder, "generation_config.json"), {"eos_token_id": pad})
    threads = torch.get_num_threads()
    print(
        f"{weights / 1e6:.0f} million random weights, {threads} threads, torch {torch.__version__}"
    )


def prompt_with_picture(directory, config, width, height):
    """An Example up to where the assistant begins."""
    media = (Media("image", encoded(noise(width, height), "PNG")),)
    sample = Sample("bench", "0", TEXT, "object count", "3", media=media)
    return Processor(directory, config).example(sample, "thinking", with_answer=False)


# ---------------------------------------------------------------------------------- load


def measure_load(args, folder):
    """Load a checkpoint, read a picture, decode; how fast weights are read beside a memory copy."""
    if args.model is None:
        args.model = folder
        write_random(folder, LARGE)
    dtype = getattr(torch, args.dtype)
    began = time.perf_counter()
    model = load_model(args.model, dtype, args.device)
    size = sum(p.nbytes for p in model.parameters()) / 1e9
    print(f"load     {time.perf_counter() - began:8.2f} s   {size:.2f} GB of weights", flush=True)
    example = prompt_with_picture(args.model, model.config, 640, 480)
    batch = collate([example], model.config).to(args.device)
    prefill, whole = (
        median_seconds(partial(generate, model, batch, tokens, NEVER), args.repeat)
        for tokens in (1, 17)
    )
    token = (whole - prefill) / 16
    print(f"prefill  {prefill:8.2f} s   {len(example.ids)} tokens with a picture of 640x480")
    read = sum(p.nbytes for p in model.model.parameters()) / 1e9  # a tied head is in there
    print(f"decode   {token:8.3f} s   a token; reads {read / token:.1f} GB/s of weights")
    print(f"peak     {peak_gib():8.2f} GiB")
    source = torch.ones(2**27, dtype=dtype, device=args.device)
    target = torch.empty_like(source)
    copied = source.nbytes / 1e9 / median_seconds(partial(target.copy_, source), 5)
    print(f"copy              a copy in memory moves {copied:.1f} GB/s")


# ---------------------------------------------------------------------------------- peers


def example_of(task, config):
    """The input of a task: noise, and random tokens of which the last 64 are trained."""
    pictures = []
    if task == "video":
        pictures = [to_patches([noise(336, 252)] * 32, (252, 336))]
    elif task not in ("decode", "sample"):
        count = 8 if task == "images" else 1
        pictures = [to_patches([noise(640, 480)], (476, 644))] * count
    grids = [grid for _, grid in pictures]
    pads = sum(map(math.prod, grids)) // 4
    length = {"prefill": 1000, "train": 1500}.get(task, pads + 64)
    text = np.random.default_rng(0).integers(TEXT_IDS, size=length - pads)
    ids = torch.cat((torch.full((pads,), config.image_token_id), torch.from_numpy(text)))
    labels = ids.clone()
    labels[:-64] = IGNORE
    positions = mrope_positions(ids, grids, [None] * len(grids), config)
    patches = torch.cat([patches for patches, _ in pictures] or [NO_PATCHES])
    return Example(ids, labels, positions, patches, grids)


def our_work(directory, task, dtype):
    """A function that does a task once."""
    model = load_model(directory, dtype)
    batch = collate([example_of(task, model.config)], model.config)

    def work():
        if task in ("images", "video"):
            with torch.no_grad():
                model.visual(batch.patches, batch.grids, model.call_layer)
        elif task == "train":
            model.zero_grad()
            (-model(batch)[0].mean()).backward()
        else:
            rows, tokens = DECODED[task]
            uniforms = torch.rand(rows, tokens) if rows > 1 else None
            generate(model, batch, tokens, NEVER, rows, uniforms)

    return work


def their_work(directory, task, dtype):
    """The same in transformers."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    from checkpoint import load_config

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=dtype).eval()
    config = load_config(directory)
    example = example_of(task, config)
    ids = example.ids[None]
    grids = torch.tensor(example.grids)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if len(grids):
        inputs["pixel_values"] = example.patches
        inputs["image_grid_thw"] = grids
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()

    def work():
        if task in ("images", "video"):
            with torch.no_grad():
                model.model.visual(example.patches.to(dtype), grids)
        elif task == "train":
            model.zero_grad()
            model(**inputs, labels=example.labels[None]).loss.backward()
        else:
            rows, tokens = DECODED[task]
            model.generate(
                **inputs,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=rows > 1,
                top_k=0,
                num_return_sequences=rows,
                pad_token_id=0,
            )

    return work


def measure_side(args, folder):
    """One process of one side: prints its seconds and its peak memory as JSON."""
    if args.task == "grpo":
        step = {"ours": our_step, "trl": trl_step}[args.side]
        seconds = step(Path(args.model), Path(folder))
    else:
        work = {"ours": our_work, "transformers": their_work}[args.side]
        work = work(args.model, args.task, getattr(torch, args.dtype))
        work()  # warms up
        seconds = seconds_of(work)
    print(json.dumps({"seconds": seconds, "peak": peak_gib()}))


def run_sides(title, task, pythons, args):
    """Run the sides of a task in turn, and print their medians. pythons: {side: python}."""
    runs = {side: [] for side in pythons}
    for _ in range(args.repeat):
        for side, python in pythons.items():
            command = [python, __file__, "side", "--side", side, "--task", task]
            command += ["--model", args.model, "--dtype", args.dtype]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            runs[side].append(json.loads(output.splitlines()[-1]))
    print(title)
    for side, results in runs.items():
        seconds = statistics.median(result["seconds"] for result in results)
        peak = statistics.median(result["peak"] for result in results)
        print(f"    {side:<14}{seconds:8.2f} s{peak:8.2f} GiB", flush=True)


def measure_peers(args, folder):
    if args.model is None:
        args.model = folder
        write_random(folder, MIDDLE)
    sides = [args.side] if args.side else ["ours", "transformers"]
    for task in [args.task] if args.task else TASKS:
        run_sides(TASKS[task], task, dict.fromkeys(sides, sys.executable), args)


# ---------------------------------------------------------------------------------- GRPO


def write_questions(folder):
    """Two prompts for each of two steps."""
    rows = []
    (folder / "images").mkdir()
    for number in range(4):
        noise(364, 280).save(folder / "images" / f"{number}.png")
        row = {"question_id": number, "question": TEXT, "question_type": "object count"}
        rows.append(row | {"answer": "3", "image": [f"{number}.png"], "data_type": "single_image"})
    write_jsonl(folder / "rows.jsonl", rows)


def measure_grpo(args, folder):
    """A step on two prompts; without --peer-python ours alone."""
    if args.peer_python and shutil.which(args.peer_python) is None:
        raise UserError(f"--peer-python {args.peer_python}: no such program")
    args.model = folder
    write_random(folder, SMALL)
    write_questions(Path(folder))
    pythons = {"ours": sys.executable}
    if args.peer_python:
        pythons["trl"] = args.peer_python
    title = (
        f"GRPO step, 2 prompts with a picture of 364x280, {GROUP} completions of {LENGTH} tokens"
    )
    run_sides(title, "grpo", pythons, args)


def our_step(directory, folder):
    """Seconds of the second step of grpo.py."""
    flags = {
        "model": directory,
        "data": directory / "rows.jsonl",
        "out": folder / "out",
        "prompts-per-step": 2,
        "max-steps": 2,
        "num-generations": GROUP,
        "max-completion-length": LENGTH,
        "beta": 0.01,
        "learning-rate": 1e-6,
        "device": "cpu",
        "threads": torch.get_num_threads(),
    }
    sys.argv = ["grpo.py"]
    for name, value in flags.items():
        sys.argv += [f"--{name}", str(value)]
    grpo.main()
    *_, (_, row) = read_jsonl(folder / "out" / "log.jsonl")
    assert row["completions/mean_length"] == LENGTH
    return row["step_time"]


def trl_step(directory, folder):
    """Seconds of the second step of TRL's GRPOTrainer."""
    from datasets import Dataset
    from transformers import (
        AutoTokenizer,
        ProcessorMixin,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        TrainerCallback,
    )
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from trl import GRPOConfig, GRPOTrainer

    class PictureProcessor(Qwen2_5_VLProcessor):
        """The class itself needs a processor of videos, and for that torchvision."""

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            self.image_token = "<|image_pad|>"
            self.video_token = "<|video_pad|>"
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds = time.perf_counter() - self.began

    def rewards(completions, **_):
        return [float(number % 3) for number in range(len(completions))]

    template = json.loads((directory / "tokenizer_config.json").read_text())["chat_template"]
    processor = PictureProcessor(
        Qwen2VLImageProcessorPil.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
        template,
    )
    content = [{"type": "image"}, {"type": "text", "text": TEXT}]
    rows = []
    for _, row in read_jsonl(directory / "rows.jsonl"):
        picture = Image.open(directory / "images" / row["image"][0])
        rows.append({"prompt": [{"role": "user", "content": content}], "image": picture})
    clock = Clock()
    trainer = GRPOTrainer(
        Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32),
        rewards,
        GRPOConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            max_steps=2,
            learning_rate=1e-6,
            per_device_train_batch_size=2 * GROUP,
            num_generations=GROUP,
            max_completion_length=LENGTH,
            beta=0.01,
            loss_type="grpo",
            temperature=1.0,
            generation_kwargs={"min_new_tokens": LENGTH},
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        callbacks=[clock],
    )
    trainer.train()
    return clock.seconds


def measure_shared(args, folder):
    """Prefill and update of a group that shares its prompt, and of a copy for each completion."""
    write_random(folder, SMALL)
    model = load_model(folder, torch.float32)
    example = prompt_with_picture(folder, model.config, 364, 280)
    prompt = collate([example], model.config)
    P = len(example.ids)
    following = example.positions.max() + 1 + torch.arange(LENGTH)
    positions = torch.cat((example.positions, following.expand(3, -1)), dim=1)
    ignored = torch.full((P,), IGNORE)

    def update(batch):
        model.zero_grad()
        (-model(batch)[0].mean()).backward()

    print(f"P = {P} tokens, completions of {LENGTH}: seconds with one prompt, and with copies")
    print("   G   prefill    copies    update    copies")
    for G in GROUPS:
        ids = torch.randint(TEXT_IDS, (G, LENGTH))
        shared = grpo.group_batch(prompt, ids, torch.full((G,), LENGTH))
        rows = []
        for row in ids:
            tokens, labels = torch.cat((example.ids, row)), torch.cat((ignored, row))
            rows.append(Example(tokens, labels, positions, example.patches, example.grids))
        copies = collate([example] * G, model.config)
        work = (
            partial(generate, model, prompt, 1, NEVER, G),
            partial(generate, model, copies, 1, NEVER),
            partial(update, shared),
            partial(update, collate(rows, model.config)),
        )
        seconds = [median_seconds(one, args.repeat) for one in work]
        print(f"{G:4}" + "".join(f"{number:10.2f}" for number in seconds), flush=True)


# ---------------------------------------------------------------------------------- data


def write_data_set(folder, size):
    """SpatialLadder-26k in kinds of rows and size: 64 pictures of 1296x968, a file of 16 frames.

    size: share of its 26,610 rows. Returns: the two jsonl files.
    """
    images = folder / "images"
    images.mkdir()
    names = [f"{number}.jpg" for number in range(64)]
    photo = encoded(noise(162, 121).resize((1296, 968)), "JPEG")  # soft: as large as a photograph
    for name in names:
        (images / name).write_bytes(photo)
    frame = encoded(noise(80, 80).resize((640, 640)), "JPEG")
    (images / "video.avi").write_bytes(mjpeg_avi([frame] * 16, 640, 2))
    question = "From the camera's perspective, is the whiteboard to the door's left or right?"
    box = {"bbox_2d": [296, 166, 408, 277], "label": "whiteboard"}
    direction = {
        "options": ["A. left", "B. right"],
        "answer": "B",
        "question_type": "relative direction",
    }
    grounding, spatial = [], []
    for number in range(int(5929 * size)):
        row = {"question_id": number, "question": question, "image": [names[number % 64]]}
        grounding.append(row | {"answer": [box], "data_type": "single_image"})
    for kind, pictures, count in (
        ("single_image", 1, 5929),
        ("multi_view", 8, 5752),
        ("video", 16, 9000),
    ):
        for number in range(int(count * size)):
            image = [names[(number + i) % 64] for i in range(pictures)]
            if kind == "video" and number % 2:
                image = ["video.avi"]
            row = {"question_id": number, "question": question, "image": image, "data_type": kind}
            spatial.append(row | direction)
    files = [folder / f"spld_{kind}_data.jsonl" for kind in ("grounding", "spatial")]
    for file, rows in zip(files, (grounding, spatial)):
        write_jsonl(file, rows)
    return files


def measure_data(args, folder):
    """The index of a data set, memory over many videos, how long training waits for pictures."""
    files = write_data_set(Path(folder), args.size)
    began, before = time.perf_counter(), peak_gib()
    samples = read_all(files, None)
    seconds, grown = time.perf_counter() - began, peak_gib() - before
    print(f"index   {seconds:8.2f} s   {len(samples):,} rows, {1024 * grown:.0f} MiB", flush=True)

    write_random(folder, MIDDLE)
    model = load_model(folder, torch.float32)
    pixels = {"min_pixels": 16 * 28 * 28, "max_pixels": 128 * 28 * 28}
    processor = Processor(folder, model.config, **pixels)
    videos = [sample for sample in samples if sample.data_type == "video"]
    videos = videos[: int(2000 * args.size)]
    for number, sample in enumerate(videos, 1):
        processor.example(sample, "direct")
        if number in (len(videos) // 10, len(videos)):
            print(f"videos  {peak_gib():8.2f} GiB peak after {number:,} of 16 frames", flush=True)

    steps = args.repeat + 1
    order = [[(row, True)] for row in range(8 * steps)]  # 8 rows of one picture to a step
    loader = DataLoader(
        Rows(samples, processor),
        batch_sampler=order,
        num_workers=1,
        collate_fn=partial(collate, config=model.config),
    )
    batches = iter(loader)
    waits, whole = [], []
    for _ in range(steps):
        began = time.perf_counter()
        step = [next(batches) for _ in range(8)]
        waits.append(time.perf_counter() - began)
        accumulate_gradient(model, step, sum(len(batch.targets) for batch in step))
        whole.append(time.perf_counter() - began)
    wait, step = np.mean(waits[1:]), np.mean(whole[1:])  # the first step starts the worker
    print(f"wait    {wait:8.3f} s   of {step:.2f} s a step of 8 pictures of 1296x968, one worker")


COMMANDS = {
    "load": measure_load,
    "data": measure_data,
    "peers": measure_peers,
    "grpo": measure_grpo,
    "shared": measure_shared,
    "side": measure_side,
}


def main():
    parser = Parser(__doc__)
    parser.add_argument("command", choices=COMMANDS, help="side: what peers and grpo start")
    parser.add_argument("--model", help="load, peers: model directory (default: random weights)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="load: where")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--task", choices=(*TASKS, "grpo"), help="peers: one of its tasks")
    sides = ("ours", "transformers", "trl")
    parser.add_argument("--side", choices=sides, help="peers: ours or transformers alone")
    parser.add_argument("--peer-python", help="grpo: python of an environment that has trl")
    parser.add_argument("--size", type=float, default=1.0, help="data: share of the rows")
    parser.checks |= {"repeat": positive, "size": positive}
    args = parser.parse_args()
    if args.command == "peers" and (args.task == "grpo" or args.side == "trl"):
        parser.error("GRPO and TRL are measured by: python tests/bench.py grpo")
    args.device = choose_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        COMMANDS[args.command](args, folder)


if __name__ == "__main__":
    main_guard(main)
