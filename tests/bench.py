"""Timings: a checkpoint's load, prefill and decode; the same work here and in transformers; reading the data.

    python bench.py load --model Qwen2.5-VL-3B-Instruct --dtype bfloat16   # loading it and answering a question
    python bench.py peers                            # against transformers (pip install transformers) on random weights
    python bench.py peers --task train --side ours   # one task of one side alone, as `peers` does for peak memory
    python bench.py data --workers 1                 # index of 26,610 rows, waiting for pictures, memory over 2,000 videos

Every figure but loading, which is done once, is the median of --repeat runs; `peers` runs both sides in turn on the
same weights, dtype and inputs. Seconds depend on the shapes alone: any weights of the same config.json will do.
"""

import argparse
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from checkpoint import build_model, load_config, load_model, parse_config, save_model
from data import Media, Processor, Sample, collate, mrope_positions, read_all, to_patches
from files import UserError
from model import Batch, generate
from rooms.render import mjpeg_avi
from rooms.tiny import initialize
from runtime import main_guard
from settings import Parser
from train_sft import Rows, train_step

PEER = {  # about 110 million weights, 78 of them the words
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "torch_dtype": "float32",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "hidden_act": "silu",
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_config": {
        "depth": 8,
        "hidden_size": 320,
        "num_heads": 4,
        "intermediate_size": 880,
        "in_chans": 3,
        "out_hidden_size": 512,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [3, 7],
        "tokens_per_second": 2,
        "hidden_act": "silu",
    },
}
TASKS = {
    "images": "vision encoder, 8 pictures of 640x480",
    "video": "vision encoder, 32 frames of 336x252",
    "prefill": "prefill, one 640x480 picture and text, 1,000 tokens",
    "decode 1": "64 tokens prefill, 32 decode, 1 row",
    "decode 16": "64 tokens prefill, 32 decode, 16 rows sampled",
    "train": "forward + backward, 1,500 tokens, 64 supervised",
}


def peak_gib():
    """Largest resident memory of this process so far, mapped files included, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure_load(args):
    """Load a checkpoint, look at a picture, answer with 16 tokens. Prints one line each."""
    device, began = args.device, time.time()
    model = load_model(args.model, getattr(torch, args.dtype), device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    print(
        f"load         {time.time() - began:8.2f} s   peak {peak_gib():6.2f} GiB, weights {weights:.2f} GiB",
        flush=True,
    )
    processor = Processor(
        args.model,
        model.config,
        argparse.Namespace(
            min_pixels=None,
            max_pixels=None,
            num_frames=16,
            fps=None,
            video_seconds="grid",
            prompts=None,
        ),
    )
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=np.uint8)).save(
        picture, "PNG"
    )
    sample = Sample(
        "bench",
        "0",
        "",
        "",
        "",
        media=(Media("image", picture.getvalue()),),
        prompt="What is in the picture?",
    )
    batch = collate([processor.example(sample, "direct", answer=False)], model.config).to(device)
    ends, runs = [], []  # when each forward of a run ended; (prefill, decode per token) of each run
    model.register_forward_hook(lambda *_: ends.append(time.time()))
    for _ in range(args.repeat):
        began = time.time()
        ends.clear()
        generate(model, batch, 16, (-1,), banned=processor.banned(device))
        runs.append((ends[0] - began, (ends[-1] - ends[0]) / 15))
    prefill, decode = (statistics.median(times) for times in zip(*runs))
    print(
        f"prefill      {prefill:8.2f} s   {batch.ids.shape[1]} tokens, a picture of 640x480 among them"
    )
    print(f"decode       {decode:8.3f} s   per token, of 16; peak {peak_gib():6.2f} GiB")


def inputs(task, config):
    """Patches, grids and token ids of a task, random but the same on both sides."""
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 255, (480, 640, 3), dtype=np.uint8)) for _ in range(8)
    ]
    if task == "video":
        seen = [to_patches([picture.resize((336, 252)) for picture in pictures * 4], (252, 336))]
    else:
        count = {"images": 8, "prefill": 1, "train": 1}.get(task, 0)
        seen = [to_patches([picture, picture], (476, 644)) for picture in pictures[:count]]
    grids = [grid for _, grid in seen]
    pads = sum(t * h * w // 4 for t, h, w in grids)
    length = {"prefill": 1000, "train": 1500}.get(task, pads + 64)
    words = torch.from_numpy(rng.integers(0, 151000, length - pads))
    ids = torch.cat((torch.full((pads,), config.image_token_id), words))
    return torch.cat([patches for patches, _ in seen] or [torch.zeros(4, 1176)]), grids, ids


def ours(directory, task, dtype):
    """A function that does the task once."""
    model = load_model(directory, dtype)
    patches, grids, ids = inputs(task, model.config)
    if task in ("images", "video"):
        return lambda: torch.no_grad()(model.visual)(patches, grids, model.run)
    positions = mrope_positions(ids, grids, [None] * len(grids), model.config)[:, None]
    places = torch.arange(len(ids) - 65, len(ids) - 1) if task == "train" else torch.arange(0)
    batch = Batch(
        ids[None],
        positions,
        torch.tensor([len(ids)]),
        patches,
        grids or [(1, 2, 2)],
        (ids == model.config.image_token_id).nonzero()[:, 0],
        places,
        ids[places + 1],
    )
    if task == "train":

        def step():
            model.zero_grad()
            (-model(batch)[0].mean()).backward()

        return step
    if task == "decode 16":  # sampled, as their 16 rows are
        return lambda: generate(model, batch, 32, (-1,), group=16, uniforms=torch.rand(16, 32))
    return lambda: generate(model, batch, 1 if task == "prefill" else 32, (-1,))


def theirs(directory, task, dtype):
    """The same in transformers."""
    try:
        from transformers import Qwen2_5_VLForConditionalGeneration
    except ImportError as error:
        raise UserError(
            f"transformers cannot be imported ({error}): pip install transformers"
        ) from None
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=dtype).eval()
    patches, grids, ids = inputs(task, parse_config(PEER))
    grids = torch.tensor(grids)
    if task in ("images", "video"):
        return lambda: torch.no_grad()(model.model.visual)(patches.to(dtype), grids)
    given = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    if len(grids):
        given |= {
            "pixel_values": patches,
            "image_grid_thw": grids,
            "mm_token_type_ids": (ids == 151655).int()[None],
        }
    if task == "train":
        labels = ids.clone()[None]
        labels[:, :-64] = -100

        def step():
            model.zero_grad()
            model(**given, labels=labels).loss.backward()

        return step
    tokens, rows = 1 if task == "prefill" else 32, 16 if task == "decode 16" else 1
    return lambda: model.generate(
        **given,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=rows > 1,
        top_k=0,
        num_return_sequences=rows,
        pad_token_id=0,
    )


def seconds_of(work):
    began = time.time()
    work()
    return time.time() - began


def median_seconds(work, repeat):
    """Median of `repeat` runs after one that warms up."""
    return statistics.median([seconds_of(work) for _ in range(repeat + 1)][1:])


def measure_peers(args):
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        directory = args.model or folder
        if args.model is None:
            model = build_model(parse_config(PEER)).to_empty(device="cpu")
            initialize(model, 0)
            save_model(folder, model.named_parameters(), model.config)
            print(
                f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} million random weights, {args.dtype}, "
                f"{torch.get_num_threads()} threads, torch {torch.__version__}",
                flush=True,
            )
        if args.side:  # one side alone, for its peak memory
            work = {"ours": ours, "theirs": theirs}[args.side](directory, args.task, dtype)
            print(json.dumps({"seconds": seconds_of(work), "peak": peak_gib()}))
            return
        # Peaks come first: a child's largest memory counts from what its parent held when it was started.
        peaks = [
            json.loads(
                subprocess.run(
                    [
                        sys.executable,
                        __file__,
                        "peers",
                        "--task",
                        "train",
                        "--side",
                        side,
                        "--model",
                        directory,
                        "--dtype",
                        args.dtype,
                    ],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                ).stdout.splitlines()[-1]
            )["peak"]
            for side in ("ours", "theirs")
            if args.task in (None, "train")
        ]
        print(f"{'':<52}{'ours':>9}{'peer':>9}{'ratio':>8}")
        if peaks:
            print(
                f"{'peak memory of training':<52}{peaks[0]:>7.2f}Gi{peaks[1]:>7.2f}Gi{peaks[1] / peaks[0]:>7.2f}x",
                flush=True,
            )
        for task in [args.task] if args.task else TASKS:
            sides = [make(directory, task, dtype) for make in (ours, theirs)]
            runs = [[seconds_of(work) for work in sides] for _ in range(args.repeat + 1)][
                1:
            ]  # the first warms up
            mine, peer = (statistics.median(run[i] for run in runs) for i in (0, 1))
            print(f"{TASKS[task]:<52}{mine:>8.2f}s{peer:>8.2f}s{peer / mine:>7.2f}x", flush=True)
            del sides


def write_data_set(folder):
    """SpatialLadder-26k in size and kinds of rows, over 64 pictures of 1296x968 and a video file of 16 frames."""
    rng, names = np.random.default_rng(0), [f"scene0000_00/{n}.jpg" for n in range(64)]
    (folder / "images" / "scene0000_00").mkdir(parents=True)

    def jpeg(width, height):  # soft noise, about as many bytes as a photograph
        file = io.BytesIO()
        noise = rng.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((width, height)).save(file, "JPEG", quality=90)
        return file.getvalue()

    for name in names:
        (folder / "images" / name).write_bytes(jpeg(1296, 968))
    (folder / "images" / "video.avi").write_bytes(
        mjpeg_avi([jpeg(640, 640) for _ in range(16)], 640, 2)
    )
    kinds = [("single_image", 1, 5929), ("multi_view", 8, 5752), ("video", 16, 9000)]
    with open(folder / "spld_grounding_data.jsonl", "w") as file:
        for n in range(5929):
            answer = [{"bbox_2d": [296, 166, 408, 277], "label": "whiteboard"}]
            file.write(
                json.dumps(
                    {
                        "question_id": n,
                        "question": "Is the whiteboard to the door's left or right?",
                        "answer": answer,
                        "image": [names[n % 64]],
                        "data_type": "single_image",
                    }
                )
                + "\n"
            )
    with open(folder / "spld_spatial_data.jsonl", "w") as file:
        for kind, pictures, count in kinds:
            for n in range(count):
                images = [names[(n + i) % 64] for i in range(pictures)]
                file.write(
                    json.dumps(
                        {
                            "question_id": n,
                            "question": "From the camera's perspective, is the whiteboard to the door's left "
                            "or right?",
                            "options": ["A. left", "B. right"],
                            "answer": "B",
                            "question_type": "relative direction",
                            "data_type": kind,
                            "image": ["video.avi"] if kind == "video" and n % 2 else images,
                        }
                    )
                    + "\n"
                )
    return [folder / f"spld_{kind}_data.jsonl" for kind in ("grounding", "spatial")]


def measure_data(args):
    """What the data path costs: the index of a data set, waiting for pictures in training, memory over many videos."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_data_set(Path(folder))
        began = time.time()
        samples = read_all(files, None)
        print(
            f"index        {time.time() - began:8.2f} s   {len(samples):,} rows", end="", flush=True
        )
        tracemalloc.start()
        read_all(files, None)
        print(f", peak {tracemalloc.get_traced_memory()[1] / 1e6:.0f} MB", flush=True)
        tracemalloc.stop()

        small, tiny = Path(folder) / "small", Path(folder) / "tiny"  # for a tokenizer
        small.mkdir()
        (small / "spld_data.jsonl").write_text("".join(file.open().readline() for file in files))
        subprocess.run(
            [sys.executable, Path(__file__).parent / "tiny.py", "--data", small, "--out", tiny],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        config = load_config(tiny)
        processor = Processor(
            tiny,
            config,
            argparse.Namespace(
                min_pixels=16 * 28 * 28,
                max_pixels=128 * 28 * 28,
                num_frames=16,
                fps=None,
                video_seconds="grid",
                prompts=None,
            ),
        )

        videos = [sample for sample in samples if sample.data_type == "video"]
        for n, sample in enumerate(videos[: args.videos], 1):
            processor.example(sample, "direct")
            if n in (args.videos // 10, args.videos):
                print(
                    f"videos       {peak_gib():8.3f} GiB peak after {n:,}: 16 frames, half of them files",
                    flush=True,
                )

        tokens = {key: value for key, value in config.source.items() if key.endswith("token_id")}
        model = build_model(parse_config(PEER | tokens)).to_empty(device="cpu")
        initialize(model, 0)

        order = [
            [(row, True)] for row in range(8 * (args.steps + 1))
        ]  # rows of one picture, 8 to a step
        loader = iter(
            DataLoader(
                Rows(samples, processor),
                batch_sampler=order,
                num_workers=args.workers,
                collate_fn=partial(collate, config=model.config),
            )
        )
        waited, trained = 0.0, 0.0
        for step in range(args.steps + 1):
            began = time.time()
            batches = [next(loader) for _ in range(8)]
            got = time.time()
            train_step(model, batches, sum(len(batch.targets) for batch in batches))
            if step:  # the first step starts the workers
                waited, trained = waited + got - began, trained + time.time() - got
        print(
            f"wait         {waited / args.steps:8.3f} s   of {(waited + trained) / args.steps:.2f} s a step of 8 "
            f"pictures of 1296x968, {100 * waited / (waited + trained):.1f}%, {args.workers} workers",
            flush=True,
        )


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("load", "peers", "data"))
    parser.add_argument("--model", help="model directory (peers: random weights if not given)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--task", choices=tuple(TASKS))
    parser.add_argument("--side", choices=("ours", "theirs"))
    parser.add_argument(
        "--workers", type=int, default=1, help="data: processes that read and resize pictures"
    )
    parser.add_argument(
        "--steps", type=int, default=20, help="data: optimizer steps that are timed"
    )
    parser.add_argument("--videos", type=int, default=2000, help="data: videos that are read")
    args = parser.parse_args()
    if args.what == "load" and not args.model:
        parser.error("load needs --model, a model directory")
    if args.side and not args.task:
        parser.error("--side needs --task")
    {"load": measure_load, "peers": measure_peers, "data": measure_data}[args.what](args)


if __name__ == "__main__":
    main_guard(main)
