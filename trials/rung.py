"""python trials/rung.py RUN QUESTION_ID OUT.png"""

import json, sys, re
from pathlib import Path
from PIL import Image, ImageDraw, ImageFont

run, qid, out = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
L = lambda p: [json.loads(l) for l in open(p)]
font = lambda n: ImageFont.load_default(n)
q = [
    r
    for r in L(run / "eval/grpo/predictions.jsonl")
    if str(r["id"]) == qid and r["question_type"] == "relative direction"
][0]
img = q["images"][0]
src = {}
for r in L(run / "rooms/test/spld_spatial_data.jsonl"):
    src[str(r["question_id"]), r["question_type"]] = r
row = src[qid, "relative direction"]
g = [
    r
    for r in L(run / "eval/stage1/predictions.jsonl")
    if r["question_type"] == "localization" and r["images"][0] == img
]
g = max(g, key=lambda r: len(r["answer"]) if isinstance(r["answer"], list) else 0)
W, H = 900, 430
im = Image.new("RGB", (W, H), "white")
d = ImageDraw.Draw(im)
d.text((20, 16), "stage 1: see", font=font(20), fill="#222")
pic = Image.open(img).convert("RGB").resize((336, 336), Image.NEAREST)
im.paste(pic, (20, 50))


def parse(t):
    m = re.search(r"\[.*\]", t, re.S)
    return json.loads(m[0]) if m else []


true = g["answer"] if isinstance(g["answer"], list) else parse(g["answer"])
for b in true:
    x = [20 + 3 * v if i % 2 == 0 else 50 + 3 * v for i, v in enumerate(b["bbox_2d"])]
    d.rectangle([x[0] - 1, x[1] - 1, x[2] + 1, x[3] + 1], outline="black", width=6)
    d.rectangle(x, outline="white", width=3)
for b in parse(g["completion"]):
    x = [20 + 3 * v if i % 2 == 0 else 50 + 3 * v for i, v in enumerate(b["bbox_2d"])]
    d.rectangle(x, outline="#ff8c1a", width=3)
    w = d.textlength(b["label"].strip(), font=font(14))
    y = max(50, x[1] - 19)
    d.rectangle([x[0], y, x[0] + w + 8, y + 19], fill="#ff8c1a")
    d.text((x[0] + 4, y + 2), b["label"].strip(), font=font(14), fill="black")
d.rectangle([22, 400, 46, 414], outline="black", width=4)
d.rectangle([23, 401, 45, 413], outline="white", width=2)
d.text((54, 398), "true box", font=font(15), fill="#667")
d.rectangle([145, 400, 169, 414], outline="#ff8c1a", width=3)
d.text((178, 398), "stage 1's box", font=font(15), fill="#667")
x = 392
d.text((x, 16), "GRPO: reason", font=font(20), fill="#222")
d.text((x, 50), row["question"], font=font(16), fill="#222")
d.text((x, 78), "   ".join(row["options"]), font=font(15), fill="#667")
m = re.fullmatch(r"<think>(.*)</think><answer>(.*)</answer>", q["completion"].strip(), re.S)
y = 112
d.text((x, y), "<think>", font=font(14), fill="#667")
y += 22
for line in re.split(r"(?<=:) (?=right|left)|(?<=: )(?=right-|left-)", m[1].strip()):
    d.text((x, y), line.strip(), font=font(16), fill="#1f4e9c")
    y += 24
d.text((x, y), "</think>", font=font(14), fill="#667")
y += 22
d.text((x, y), f"<answer>{m[2].strip()}</answer>", font=font(16), fill="#1f4e9c")
y += 26
d.text((x, y), f"The true answer is {row['answer']}.", font=font(14), fill="#667")
y += 32
d.text(
    (x, y),
    "Two numbers are a place on a map in quarter meters: to the right and\nahead of the camera, which stands at 30 30.",
    font=font(13),
    fill="#667",
)
im.save(out, optimize=True)
print(q["completion"], row["answer"], g["completion"], true)
