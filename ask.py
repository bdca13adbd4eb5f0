"""Ask a checkpoint about pictures or a video; boxes in the answer are drawn on the first picture.

    python ask.py runs/tiny/stage1 "Where is the chair?" a.jpg [b.jpg | v.mp4]

The prompt is the question as typed. Decoding is greedy; the frames of a video carry their true times.
"""

import argparse
from pathlib import Path

import torch
from PIL import ImageDraw

from checkpoint import load_model
from data import Media, Processor, Sample, collate, open_picture
from model import generate
from rewards import extract_answer, parse_boxes
from runtime import main_guard
from settings import Parser, add_flags

VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm")


def draw_boxes(picture, boxes, scale):
    """Draw boxes on the original picture. scale: (x, y) factors from it to the size that the boxes were given in."""
    draw, line = ImageDraw.Draw(picture), 2 + max(picture.size) // 300
    for box in boxes:
        corners = [
            min(max(c / scale[i % 2], 0), picture.size[i % 2] - 1)
            for i, c in enumerate(box["bbox_2d"])
        ]
        (left, right), (top, bottom) = sorted(corners[::2]), sorted(corners[1::2])
        draw.rectangle((left, top, right, bottom), outline="red", width=line)
        draw.text((left + 2 * line, top + 2 * line), box["label"], fill="red", font_size=8 * line)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model directory; computes in the dtype of its config.json")
    parser.add_argument("question")
    parser.add_argument("media", nargs="*", help=f"pictures, and videos ({' '.join(VIDEOS)})")
    parser.add_argument("--max-completion-length", type=int, default=512)
    add_flags(parser, ("min_pixels", "max_pixels", "num_frames", "fps", "device"))
    parser.set_defaults(
        num_frames=32,
        video_seconds="real",
        prompts=None,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    args = parser.parse_args()

    model = load_model(args.model, device=args.device)
    processor = Processor(args.model, model.config, args)
    media = tuple(
        Media("video" if Path(path).suffix.lower() in VIDEOS else "image", path)
        for path in args.media
    )
    sample = Sample("command line", "", args.question, "", "", media=media, prompt=args.question)
    batch = collate([processor.example(sample, "direct", answer=False)], model.config).to(
        args.device
    )
    said = generate(
        model,
        batch,
        args.max_completion_length,
        processor.stop_ids,
        banned=processor.banned(args.device),
    )
    answer = processor.decode(said.ids[0, : said.lengths[0]].tolist())
    print(answer)

    boxes, pictures = (
        parse_boxes(extract_answer(answer, answer)),
        [m for m in media if m.kind == "image"],
    )
    if boxes and pictures:
        picture, out = (
            open_picture(pictures[0].source),
            f"{Path(pictures[0].source).stem}_boxes.png",
        )
        draw_boxes(picture, boxes, processor.load(pictures[0])[3])
        picture.save(out)
        print(f"{len(boxes)} boxes drawn on {pictures[0].source}: {out}")


if __name__ == "__main__":
    main_guard(main)
