"""Evaluate a model: six benchmarks, rooms, or any jsonl in our format, from files to one table.

    python eval.py --model DIR --bench rooms --data runs/tiny/rooms/test --out DIR
    torchrun --nproc-per-node 4 eval.py --model DIR --bench vsibench --data VSI-Bench --out DIR
    python eval.py --bench FILE.jsonl --predictions ANSWERS.jsonl --out DIR    # of another engine

    samples -> answers (greedy, on the path of training) -> scores (benchmarks.py) -> scores.json

--prompt-style thinking asks for <think></think><answer></answer>, direct for the bare answer;
localization rows always answer in boxes. Each process holds a whole model and answers its share.
Answers are written as they are made: an interrupted evaluation goes on with the same command.
"""

import json
import os
import random
import time
from collections import Counter, defaultdict
from functools import partial
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
from checkpoint import load_config, load_model
from data import Processor, chunks, cost, picture_paths, read_all
from files import (
    CONFIG,
    MADE_OF,
    OF_PICTURE,
    UserError,
    append_jsonl,
    claim,
    fingerprint,
    made_of,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)
from grpo import sample_completions
from rewards import CHOICE_TYPES, NUMBER_TYPES
from runtime import Ranks, check_lengths, compute_dtype, main_guard
from settings import MAY_CHANGE, PICTURES, Parser, add_flags, positive, values

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
             args: holds prompt_style, max_completion_length and temperature.
    Returns: for each what predictions.jsonl has of it beside facts(sample) and the score.
    """
    chosen = [samples[row] for row in rows]
    # As GRPO samples, one completion a prompt. Without noise each token is the most likely one.
    groups = sample_completions(model, processor, chosen, 1, None, args, device)
    answers = []
    for group in groups:
        prompt, vision_tokens = group.shown
        answer = {
            "prompt": prompt,
            "vision_tokens": vision_tokens,
            "completion": group.texts[0],
            "truncated": not group.finished[0].item(),
            "answer": group.sample.answer,  # true boxes in pixels as the model sees them
        }
        if group.sample.question_type == "localization":
            # the picture's size as the model saw it: a patch is 14 x 14 pixels
            _, h, w = group.prompt.grids[0]
            answer["size"] = [14 * w, 14 * h]
        answers.append(answer)
    return answers


def facts(sample):
    """What predictions.jsonl says of a row: where it stands now, and what is to be seen in it."""
    return {
        "id": sample.id,
        "where": sample.where,
        "question_type": sample.question_type,
        "images": picture_paths(sample),
    }


# ---------------------------------------------------------------------------------- stored answers
# Rows may be mended, sorted or added between two tries. An answer belongs to what was asked.


def asked(samples):
    """A name for each row by what it asks: its texts and the contents of its pictures.

    Each of several rows that ask the same has a name of its own: they are several samples.
    """
    prints = {}  # source -> fingerprint: a picture stands in many rows
    times = Counter()
    names = []
    for sample in samples:
        question = [sample.question, sample.question_type, sample.options, sample.prompt]
        question += [sample.answer, sample.data_type]
        for role, parts in sample.messages or ():
            question += [role, *[part if isinstance(part, str) else "" for part in parts]]
        for media in sample.media:
            question += [media.kind, media.seconds_per_frame]
            for source in media.sources:
                if source not in prints:
                    prints[source] = fingerprint([source], OF_PICTURE)
                question.append(prints[source])
        name = fingerprint([json.dumps(question).encode()])
        times[name] += 1
        names.append(f"{name}-{times[name]}")
    return names


def saved_answers(out):
    """Name -> answer, of all processes and of all tries.

    What a killed process left behind its last whole line is cut off: it is answered again.
    """
    answers = {}
    for path in sorted(out.glob("answers-rank*.jsonl")):
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        answers |= {row.pop("key", None): row for _, row in read_jsonl(path)}
    return answers


def answer_once(samples, size, ranks, out, answer):
    """Answer every sample once: what an interrupted run has written is not done again.

    Args:    size: samples in a batch; batches are shared out over the ranks.
             answer: rows (numbers into samples) -> an object for each.
    Returns: on every rank, the answers in row order.
    """
    names = ranks.once(asked, samples)
    saved = ranks.once(saved_answers, out)
    kept = sum(name in saved for name in names)
    if saved and not kept:
        raise UserError(f"{out}: its answers are to other questions; give another --out")
    if saved:
        ranks.print(f"{out}: has {kept} of {len(names)} answers")
    # Samples of like length stand together, so that little is padded. The longest come first:
    # what does not fit into memory shows at once, and no rank gets the longest last. Batches of
    # one size are the same in every try: their rows are all saved, or all left.
    order = sorted(range(len(samples)), key=lambda row: (cost(samples[row]), row), reverse=True)
    left = []
    for batch in chunks(order, size)[ranks.rank :: ranks.world]:
        if any(names[row] not in saved for row in batch):
            left.append(batch)
    # Only rank 0 shows a bar: its share is as large as the others'.
    progress = {"disable": ranks.rank != 0, "mininterval": 2, "dynamic_ncols": True}
    for batch in tqdm(left, desc="answers", **progress):
        rows = [{"key": names[row], **given} for row, given in zip(batch, answer(batch))]
        # Every rank writes a file of its own: nobody waits for the others, and a kill loses no
        # more than the batches that are being answered.
        append_jsonl(out / f"answers-rank{ranks.rank}.jsonl", rows)
    ranks.gather(None)  # wait until all ranks have written
    saved = ranks.once(saved_answers, out)
    return [saved[name] for name in names]


# ---------------------------------------------------------------------------------- main


def settings():
    """The flags, checked."""
    parser = Parser(__doc__)
    names = ("model", "images", "out", "seed", "device", "threads", "dtype", *PICTURES)
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
    # sample_completions reads it. No greedy answer depends on it, so it is not in the recipe.
    parser.set_defaults(temperature=1.0)
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
    ranks = Ranks(args.device, args.threads)
    bench, out = BENCHES.get(args.bench, OURS), Path(args.out)

    # 1. The questions, before the model: mistakes show at once. Pictures are opened when needed.
    benchmark, extras = read_rows(args.bench, args.data, args.images)
    samples, extras = subset(benchmark, extras, args.limit, args.seed)
    train = read_all(our_files(args.blind_from), None) if args.blind_from else []

    # 2. Who answers them: a model here, or another engine, which has done so already. The recipe
    #    is all that the answers and their scores depend on.
    names = vars(args).keys() - {"device", "threads", "out", "batch_size", "temperature"}
    recipe = values(args, sorted(names))
    if args.predictions:
        answers = given_answers(args.predictions, samples, benchmark)
        recipe["predictions"] = os.path.realpath(args.predictions)
    else:
        processor = Processor(args.model, load_config(args.model), args)
        ranks.once(check_lengths, processor, samples, args.prompt_style, False)
        recipe |= values(processor, ("min_pixels", "max_pixels")) | {"decoding": "greedy"}
        recipe[MADE_OF] = ranks.once(made_of, args.model, {"prompts": args.prompts})

    # 3. The answers, each rank its share. An output folder holds one evaluation: with the same
    #    recipe it goes on where it was interrupted, another recipe is refused. Where the model and
    #    the rows lie is free: the model's contents are in the recipe, answers belong to questions.
    ranks.once(claim, out, recipe, (*MAY_CHANGE, "bench", "blind_from"))
    if not args.predictions:
        model = load_model(args.model, compute_dtype(args.dtype, ranks.device), ranks.device)
    ranks.once(write_json, out / CONFIG, recipe)
    if not args.predictions:
        # answer_once knows nothing of models: coldstart.py samples chains with it.
        answer = partial(answer_rows, model, processor, samples, args=args, device=ranks.device)
        answers = answer_once(samples, args.batch_size, ranks, out, answer)

    # 4. The scores. rows: what predictions.jsonl holds, a row for each sample.
    if ranks.rank == 0:
        parts = zip(map(facts, samples), answers, extras)
        rows = [about | answer | extra for about, answer, extra in parts]
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


if __name__ == "__main__":
    main_guard(main)
