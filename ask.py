"""Ask a model about pictures or a video; boxes in its answer are drawn on the first picture.

    python ask.py runs/tiny/stage1 "Where is the chair?" a.jpg [b.jpg | v.mp4]

The shortest way through the project: sample -> example -> batch -> generate -> text. The prompt is
the question as typed, decoding is greedy, and the frames of a video carry their true times.
"""

from pathlib import Path

import numpy as np
from PIL import ImageDraw

from checkpoint import load_model
from data import Processor, Sample, collate
from model import generate
from pictures import Media, is_film, open_picture
from rewards import extract_answer, parse_boxes
from runtime import choose_device, compute_dtype, main_guard
from settings import PICTURES, Parser, add_flags


def draw_boxes(picture, boxes, scale):
    """Draw boxes on the original picture.

    scale: (x, y) factors from the original to the size in which the boxes were given.
    """
    draw = ImageDraw.Draw(picture)
    line = 2 + max(picture.size) // 300
    for box in boxes:
        corners = np.reshape(box["bbox_2d"], (2, 2)) / scale  # (corner, x and y)
        corners = corners.clip(0, np.subtract(picture.size, 1))
        (left, top), (right, bottom) = np.sort(corners, axis=0).tolist()
        draw.rectangle((left, top, right, bottom), outline="red", width=line)
        draw.text((left + 2 * line, top + 2 * line), box["label"], fill="red", font_size=8 * line)


def main():
    parser = Parser(__doc__)
    parser.add_argument("model", help="model directory")
    parser.add_argument("question")
    parser.add_argument("media", nargs="*", help="pictures and videos")
    names = ("max_completion_length", "device", "dtype", *PICTURES)
    add_flags(parser, names, max_completion_length=512, num_frames=32, video_seconds="real")
    args = parser.parse_args()

    device = choose_device(args.device)
    model = load_model(args.model, compute_dtype(args.dtype, device), device)
    processor = Processor(args.model, model.config, args)

    media = []
    for path in args.media:
        kind = "video" if is_film(path) else "image"
        media.append(Media(kind, path))
    sample = Sample(
        where="command line",
        id="",
        question=args.question,
        question_type="",
        answer="",
        media=tuple(media),
        prompt=args.question,
    )
    example = processor.example(sample, "direct", with_answer=False)
    rollout = generate(
        model,
        collate([example], model.config).to(device),
        args.max_completion_length,
        processor.stop_ids,
        banned=processor.banned(device),
    )
    answer = processor.decode(rollout.ids[0, : rollout.lengths[0]].tolist())
    print(answer)

    boxes = parse_boxes(extract_answer(answer, answer))
    pictures = [item for item in media if item.kind == "image"]
    if boxes and pictures:
        path = pictures[0].source
        out = f"{Path(path).stem}_boxes.png"
        picture = open_picture(path)
        draw_boxes(picture, boxes, processor.load(pictures[0]).scale)
        picture.save(out)
        print(f"{len(boxes)} boxes drawn on {path}: {out}")


if __name__ == "__main__":
    main_guard(main)
