"""Evaluate a model: six benchmarks, rooms, or any jsonl in our format, from files to one table.

    python eval.py --model DIR --bench rooms --data runs/tiny/rooms/test --out DIR
    torchrun --nproc-per-node 4 eval.py --model DIR --bench vsibench --data VSI-Bench --out DIR
    python eval.py --bench FILE.jsonl --predictions ANSWERS.jsonl --out DIR    # of another engine

    samples -> answers (greedy, on the path of training) -> scores (benchmarks.py) -> scores.json

--prompt-style thinking asks for <think></think><answer></answer>, direct for the bare answer;
localization rows always answer in boxes. Each process holds a whole model and answers its share.
Answers are written as they are made: an interrupted evaluation goes on with the same command.
"""

import hashlib
import os
import random
import time
from collections import defaultdict
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import (
    BENCHES,
    OURS,
    add_baselines,
    given_answers,
    read_bench,
    score_rows,
    summarize,
    table,
)
from checkpoint import checkpoint_tensors, load_model
from data import Processor, collate, cost, picture_paths, read_all, style_of
from files import (
    CONFIG,
    UserError,
    append_jsonl,
    claim,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)
from model import generate
from rewards import CHOICE_TYPES, NUMBER_TYPES
from runtime import Ranks, compute_dtype, main_guard
from settings import PICTURES, Parser, add_flags, positive, values

# ---------------------------------------------------------------------------------- samples


def our_files(path):
    """The grounding and spatial rows of a folder; a file as it is."""
    if not Path(path).is_dir():
        return [Path(path)]
    return [Path(path) / f"spld_{kind}_data.jsonl" for kind in ("grounding", "spatial")]


def read_rows(bench, data, images):
    """Samples of a named benchmark, of the rooms in the folder `data`, or of one jsonl file.

    Returns: [Sample], [what the benchmark's aggregate needs of a row besides] (nothing for ours).
    """
    if bench in BENCHES:
        return read_bench(bench, data)
    # Rows of our own: all of one folder, or any file.
    files = our_files(data if bench == "rooms" else bench)
    for file in files:
        if not file.is_file():
            names = ", ".join(BENCHES)
            raise UserError(f"{file}: no such file; --bench takes {names}, rooms, or a jsonl file")
    samples = read_all(files, images)
    for sample in samples:
        # The type says how an answer is compared: as boxes, a letter or a number. A chat needs
        # none: its last turn is compared as text.
        known = sample.question_type in ("localization", *CHOICE_TYPES, *NUMBER_TYPES)
        if not known and not sample.messages:
            raise UserError(f"{sample.where}: no question_type in it: there is nothing to score by")
    return samples, [{}] * len(samples)


def subset(samples, extras, limit, seed):
    """At most `limit` rows of every question type, in their order; a seed draws the same ones."""
    if limit is None:
        return samples, extras
    by_type = defaultdict(list)
    for row, sample in enumerate(samples):
        by_type[sample.question_type].append(row)
    # Rows are numbers into samples, here and below.
    chosen = []
    for rows in by_type.values():
        # Each type has a generator of its own: what is drawn of one type does not depend on
        # the others.
        chosen += random.Random(seed).sample(rows, min(limit, len(rows)))
    chosen.sort()
    return [samples[row] for row in chosen], [extras[row] for row in chosen]


# ---------------------------------------------------------------------------------- answers


@torch.no_grad()
def answer_rows(model, processor, samples, rows, args, device):
    """Answer some samples greedily, in one batch.

    Args:    rows: numbers into samples.
             args: holds prompt_style and max_completion_length.
    Returns: a row of predictions.jsonl for each, without its score.
    """
    chosen = [samples[row] for row in rows]
    # The way of training (data.py), but a prompt ends where the assistant begins.
    examples = [
        processor.example(sample, style_of(sample, args.prompt_style), answer=False)
        for sample in chosen
    ]
    # No noise is given: each token is the most likely one. Banned are the tokens that GRPO bans.
    rollout = generate(
        model,
        collate(examples, processor.config).to(device),
        args.max_completion_length,
        processor.stop_ids,
        banned=processor.banned(device),
    )
    answers = []
    for i, (sample, example) in enumerate(zip(chosen, examples)):
        # the prompt as text, with one pad token for each picture, and how often it is repeated
        prompt, vision_tokens = processor.shown(example)
        answer = {
            "index": rows[i],
            "id": sample.id,
            "where": sample.where,
            "question_type": sample.question_type,
            "images": picture_paths(sample),
            "prompt": prompt,
            "vision_tokens": vision_tokens,
            # ids (B, C): the first `length` of a row are its completion, zeros follow
            "completion": processor.decode(rollout.ids[i, : rollout.lengths[i]].tolist()),
            "truncated": not rollout.finished[i].item(),
            # The model answers in pixels of the picture as it sees it: true boxes are scaled
            # to them before they are compared.
            "answer": example.boxes or sample.answer,
        }
        if sample.question_type == "localization":
            # the picture's size as the model saw it: a patch is 14 x 14 pixels
            _, h, w = example.grids[0]
            answer["size"] = [14 * w, 14 * h]
        answers.append(answer)
    return answers


def cut_torn_lines(out):
    """Remove what a killed process left behind its last whole line; it is answered again."""
    for path in out.glob("answers-rank*.jsonl"):
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def saved_answers(out):
    """Row number -> answer, of all processes and of all tries."""
    answers = {}
    for path in sorted(out.glob("answers-rank*.jsonl")):
        answers.update((row["index"], row) for _, row in read_jsonl(path))
    return answers


def answer_once(samples, size, ranks, out, answer):
    """Answer every sample once: what an interrupted run has written is not done again.

    Args:    size: samples in a batch; batches are shared out over the ranks.
             answer: rows (numbers into samples) -> an object with "index", the row, for each.
    Returns: on every rank, the answers in row order.
    """
    ranks.once(cut_torn_lines, out)
    saved = saved_answers(out)
    # Samples of like length stand together, so that little is padded. The longest come first:
    # what does not fit into memory shows at once, and no rank gets the longest last. Batches are
    # the same in every try: their rows are all saved, or all left.
    order = sorted(range(len(samples)), key=lambda row: (cost(samples[row]), row), reverse=True)
    batches = [order[first : first + size] for first in range(0, len(order), size)]
    mine = [batch for batch in batches[ranks.rank :: ranks.world] if not saved.keys() >= set(batch)]
    progress = {"disable": ranks.rank != 0, "mininterval": 2, "dynamic_ncols": True}
    for batch in tqdm(mine, desc="answers", **progress):
        # Every rank writes a file of its own: nobody waits for the others, and a kill loses no
        # more than the batches that are being answered.
        append_jsonl(out / f"answers-rank{ranks.rank}.jsonl", answer(batch))
    ranks.gather(None)  # wait until all ranks have written
    saved = saved_answers(out)
    return [saved[row] for row in range(len(samples))]


@cache
def model_hash(directory):
    """First 16 hex digits of the SHA-256 of a model's weight files."""
    digest = hashlib.sha256()
    for path in sorted({path for path, _ in checkpoint_tensors(directory).values()}):
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):  # 16 MB
                digest.update(chunk)
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------- main


def settings():
    """The flags, checked."""
    parser = Parser(__doc__)
    names = ("model", "images", "out", "seed", "device", "dtype", *PICTURES)
    names += ("prompt_style", "max_completion_length")
    add_flags(parser, names, num_frames=32)
    add = parser.add_argument
    add("--bench", required=True, help=f"{', '.join(BENCHES)}, rooms, or our kind of jsonl file")
    add("--data", help="folder of the benchmark or of the rooms")
    add("--scorer", choices=("spatialladder", "official"), default="spatialladder")
    add("--batch-size", type=int, default=32, help="samples that one device answers at once")
    add("--limit", type=int, help="at most this many rows of each question type, drawn by --seed")
    add("--predictions", help="another engine's answers (id, question_type, completion); no model")
    add("--blind-from", help="training rows: what do their answers say without a picture?")
    # The other numbers are rows of SETTINGS, which has their checks.
    parser.checks |= {"batch_size": positive, "limit": positive}
    args = parser.parse_args()
    parser.need(args, "out", "predictions" if args.predictions else "model")
    if args.bench in (*BENCHES, "rooms"):
        parser.need(args, "data")
    scorers = BENCHES.get(args.bench, OURS).scorers
    if args.scorer not in scorers:
        parser.error(f"--scorer {args.scorer}: {args.bench} has {', '.join(scorers)}")
    return args


def main():
    args, began = settings(), time.time()
    ranks, bench, out = Ranks(args.device), BENCHES.get(args.bench, OURS), Path(args.out)

    # 1. The questions. All are read before the model is, so that mistakes show at once; pictures
    #    are opened when their question is answered.
    benchmark, extras = read_rows(args.bench, args.data, args.images)
    samples, extras = subset(benchmark, extras, args.limit, args.seed)
    train = read_all(our_files(args.blind_from), None) if args.blind_from else []

    # 2. Who answers them: a model here, or another engine, which has done so already. The recipe
    #    is all that the answers and their scores depend on.
    names = vars(args).keys() - {"device", "out", "batch_size"}
    recipe = values(args, sorted(names))
    if args.predictions:
        answers = given_answers(args.predictions, samples, benchmark)
    else:
        model = load_model(args.model, compute_dtype(args.dtype, ranks.device), ranks.device)
        processor = Processor(args.model, model.config, args)
        recipe |= values(processor, ("min_pixels", "max_pixels")) | {"decoding": "greedy"}
        # A folder's weights may change under its name, as when a rung is trained anew.
        recipe["model_hash"] = ranks.once(model_hash, args.model)

    # 3. The answers, each rank its share. An output folder holds one evaluation: with the same
    #    recipe it goes on where it was interrupted, another recipe is refused.
    ranks.once(claim, out, recipe)
    ranks.once(write_json, out / CONFIG, recipe)
    if not args.predictions:
        # answer_once knows nothing of models: coldstart.py samples chains with it.
        def answer(rows):
            return answer_rows(model, processor, samples, rows, args, ranks.device)

        answers = answer_once(samples, args.batch_size, ranks, out, answer)

    # 4. The scores. rows: what predictions.jsonl holds, a row for each sample.
    if ranks.rank == 0:
        rows = [row | extra for row, extra in zip(answers, extras)]
        rows = score_rows(rows, bench, args.scorer, args.prompt_style == "thinking")
        rows = list(add_baselines(rows, samples, bench.scorers[args.scorer].match, train))
        write_jsonl(out / "predictions.jsonl", rows)
        scores = summarize(rows, bench, args.scorer, args.seed)
        scores |= {"recipe": recipe, "seconds": time.time() - began}
        if (out / "scores.json").is_file():
            # A second call finds all answers there: the time is that of the first.
            before = read_json(out / "scores.json")["seconds"]
            scores["seconds"] = max(scores["seconds"], before)
        write_json(out / "scores.json", scores)
        print(table(args.bench, scores, bench, args.scorer))
    ranks.close()


if __name__ == "__main__":
    main_guard(main)
