"""Evaluate a checkpoint: six benchmarks, rooms, or any jsonl in our format, from files to one table.

    python eval.py --model DIR --bench rooms --data runs/tiny/rooms/test --out DIR
    torchrun --nproc-per-node 4 eval.py --model DIR --bench vsibench --data BENCHMARKS/VSI-Bench --out DIR
    python eval.py --model DIR --bench all --data BENCHMARKS --out DIR   # those in folders with their names on the hub
    python eval.py --predictions FILE.jsonl --bench spbench-si --data DIR --out DIR        # another engine's answers

Every sample is answered greedily through the same path that training takes (data.py); --prompt-style thinking asks
for <think></think><answer></answer>, direct for the bare answer; localization rows always answer in boxes. One
replica of the model per process. Answers are written as they are made, so an interrupted evaluation goes on.
"""

import argparse
import hashlib
import json
import os
import random
import time
from collections import defaultdict
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import BENCHES, OURS, add_baselines, read_bench, score_rows, summarize, table
from checkpoint import checkpoint_tensors, load_model
from data import Processor, collate, cost, read_all, style_of
from files import UserError, parse_line, read_json, read_lines, write_json
from model import generate
from rewards import CHOICE_TYPES, NUMBER_TYPES, parse_boxes
from runtime import Ranks, main_guard
from settings import Parser, add_flags


def read_rows(bench, data, images):
    """Samples of a named benchmark, of the rooms (both files of a folder), or of one jsonl file.

    Returns: [Sample], [what the benchmark's aggregate needs of a row besides] (nothing for ours).
    """
    if bench in BENCHES:
        return read_bench(bench, data)
    files = (
        [Path(data) / f"spld_{kind}_data.jsonl" for kind in ("grounding", "spatial")]
        if bench == "rooms"
        else [bench]
    )
    for file in files:
        if not Path(file).is_file():
            raise UserError(
                f"{file}: no such file; --bench takes {', '.join(BENCHES)}, all, rooms, or a jsonl file"
            )
    samples = read_all(files, images)
    for sample in samples:
        if (
            sample.question_type not in ("localization", *CHOICE_TYPES, *NUMBER_TYPES)
            and not sample.messages
        ):
            raise UserError(f"{sample.where}: no question_type in it: there is nothing to score by")
    return samples, [{}] * len(samples)


def subset(samples, extras, limit, seed):
    """At most `limit` rows of every question type, the same ones for the same seed, in their order."""
    if limit is None:
        return samples, extras
    by_type = defaultdict(list)
    for row, sample in enumerate(samples):
        by_type[sample.question_type].append(row)
    rows = sorted(
        row
        for rows in by_type.values()
        for row in random.Random(seed).sample(rows, min(limit, len(rows)))
    )
    return [samples[row] for row in rows], [extras[row] for row in rows]


@torch.no_grad()
def answer_rows(model, processor, samples, rows, args, device):
    """Greedy answers to some rows (numbers into samples), decoded in one batch. Returns: their prediction rows."""
    examples = [
        processor.example(samples[row], style_of(samples[row], args.prompt_style), answer=False)
        for row in rows
    ]
    rollout = generate(
        model,
        collate(examples, processor.config).to(device),
        args.max_completion_length,
        processor.stop_ids,
        banned=processor.banned(device),
    )
    answers = []
    for i, (row, example) in enumerate(zip(rows, examples)):
        sample = samples[row]
        prompt, vision_tokens = processor.shown(example)
        answer = {
            "index": row,
            "id": sample.id,
            "where": sample.where,
            "question_type": sample.question_type,
            "images": [
                path
                for media in sample.media
                for path in media.sources
                if not isinstance(path, bytes)
            ],
            "prompt": prompt,
            "vision_tokens": vision_tokens,
            "completion": processor.decode(rollout.ids[i, : rollout.lengths[i]].tolist()),
            "truncated": not rollout.finished[i].item(),
            "answer": example.boxes or sample.answer,
        }
        if sample.question_type == "localization":
            t, h, w = example.grids[0]
            answer["size"] = [14 * w, 14 * h]
        answers.append(answer)
    return answers


def finished_rows(out):
    """Answers that an interrupted evaluation left, by row number; a line cut in the middle does not count."""
    rows = {}
    for path in sorted(out.glob("answers-rank*.jsonl")):
        for line in path.read_bytes().split(b"\n")[:-1]:
            row = json.loads(line)
            rows[row["index"]] = row
    return rows


def answer_once(samples, size, ranks, out, answer):
    """Every sample's answer, made once: written as soon as made, kept when an interrupted run goes on.

    Args:    size: samples in a batch; the batches are shared out over the ranks. answer: rows (numbers into samples) ->
             as many objects with "index", the row.
    Returns: on every rank, the answers in row order.
    """
    order = sorted(
        range(len(samples)), key=lambda row: (cost(samples[row]), row), reverse=True
    )  # longest first
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    done = finished_rows(out)
    todo = [
        batch
        for batch in batches[ranks.rank :: ranks.world]
        if not all(row in done for row in batch)
    ]
    path = out / f"answers-rank{ranks.rank}.jsonl"
    if path.is_file():
        os.truncate(
            path, path.read_bytes().rfind(b"\n") + 1
        )  # a line cut in the middle is answered again
    with open(path, "a", encoding="utf-8") as file:
        for batch in tqdm(
            todo, desc="answers", disable=ranks.rank != 0, mininterval=2, dynamic_ncols=True
        ):
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answer(batch)))
            file.flush()
    ranks.gather(None)  # all have written
    done = finished_rows(out)
    return [done[row] for row in range(len(samples))]


def answer_all(model, processor, samples, args, ranks, out):
    """Answer every sample with the model. Returns: answers in row order."""
    return answer_once(
        samples,
        args.batch_size,
        ranks,
        out,
        lambda rows: answer_rows(model, processor, samples, rows, args, ranks.device),
    )


@cache
def model_hash(directory):
    """First 16 hex digits of the SHA-256 of a model's weight files."""
    digest = hashlib.sha256()
    for path in sorted({path for path, _ in checkpoint_tensors(directory).values()}):
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def given_answers(path, samples, benchmark):
    """Another engine's completions in the samples' order; a sample without one counts as wrong.

    Rows hold id, question_type and completion. Where they hold `answer` too, it must be the sample's: ids that count
    otherwise do not pass unseen. The answer of a localization row is its true boxes in the pixels that the engine saw
    (as in our own predictions.jsonl); without it the completion's boxes are taken to be in pixels of the file.

    Args:    benchmark: all samples of it, of which `samples` are scored.
    Raises:  UserError for a row without the three, that no sample has, that stands twice or answers something else.
    """
    given, truths = {}, {(s.id, s.question_type): s.answer for s in benchmark}
    if len(truths) < len(benchmark):
        raise UserError(
            f"--predictions {path}: the benchmark has rows of equal id and question_type"
        )
    for where, line in read_lines(path):
        row = parse_line(line, where)
        missing = [
            key
            for key in ("id", "question_type", "completion")
            if not isinstance(row.get(key), (str, int))
        ]
        if missing:
            raise UserError(
                f"{where}: expected id, question_type and completion, found {', '.join(row)}"
            )
        name = str(row["id"]), row["question_type"]
        if name not in truths or name in given:
            raise UserError(
                f"{where}: id {name[0]} of {name[1]!r} "
                + ("stands twice" if name in given else "is not in the benchmark")
            )
        given[name] = {"completion": str(row["completion"])}
        if name[1] == "localization" and "answer" in row:
            given[name]["answer"] = parse_boxes(json.dumps(row["answer"]))
            if not given[name]["answer"]:
                raise UserError(
                    f"{where}: answer is {json.dumps(row['answer'])[:80]}, expected a list of boxes"
                )
        elif "answer" in row and str(row["answer"]) != truths[name]:
            raise UserError(
                f"{where}: answer is {row['answer']!r}, expected {truths[name]!r} as in the benchmark"
            )
    return [
        {
            "id": s.id,
            "where": s.where,
            "question_type": s.question_type,
            "answer": s.answer,
            "completion": "",
            "skipped": (s.id, s.question_type) not in given,
        }
        | given.get((s.id, s.question_type), {})
        for s in samples
    ]


def evaluate(args, ranks, model, processor, benchmark, out):
    """One benchmark, from read_rows to out/scores.json. model, processor: None with --predictions."""
    bench, began = BENCHES.get(args.bench, OURS), time.time()

    # what to answer
    samples, extras = subset(*benchmark, args.limit, args.seed)
    train = []
    if args.blind_from:  # a folder's grounding and spatial rows, or one file
        train = read_all(
            sorted(Path(args.blind_from).glob("spld_[gs]*_data.jsonl")) or [args.blind_from], None
        )
    recipe = {"scorer": args.scorer, "seed": args.seed}
    if args.predictions:
        answers = given_answers(args.predictions, samples, benchmark[0])
        recipe["predictions"] = args.predictions
    else:
        recipe |= {
            "model": model_hash(args.model) if ranks.rank == 0 else None,
            "decoding": "greedy",
            "min_pixels": processor.min_pixels,
            "max_pixels": processor.max_pixels,
        }
        recipe |= {
            key: vars(args)[key]
            for key in (
                "num_frames",
                "fps",
                "video_seconds",
                "prompt_style",
                "max_completion_length",
            )
        }
    asked = {
        key: value
        for key, value in vars(args).items()
        if key not in ("device", "out", "predictions")
    }
    asked["model_hash"] = recipe.get(
        "model"
    )  # another model under the same name is another evaluation
    problem = ranks.gather(claim(out, asked) if ranks.rank == 0 else None)[0]
    if problem:
        raise UserError(problem)

    # answer
    if not args.predictions:
        answers = answer_all(model, processor, samples, args, ranks, out)

    # score
    if ranks.rank == 0:
        rows = [row | extra for row, extra in zip(answers, extras)]
        rows = score_rows(rows, bench, args.scorer, args.prompt_style == "thinking")
        rows = list(add_baselines(rows, samples, bench.scorers[args.scorer][0], train))
        lines = out / "predictions.jsonl.tmp"
        lines.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
        os.replace(lines, out / "predictions.jsonl")
        scores = summarize(rows, bench, args.scorer, args.seed)
        scores |= {
            "truncated": sum(row.get("truncated", False) for row in rows) / len(rows),
            "skipped": sum(row.get("skipped", False) for row in rows),
            "recipe": recipe,
            "seconds": time.time() - began,
        }
        before = read_json(out / "scores.json") if (out / "scores.json").is_file() else scores
        scores["seconds"] = max(
            scores["seconds"], before["seconds"]
        )  # not the moment it takes to find all done
        write_json(out / "scores.json", scores)
        print(table(args.bench, scores, bench, args.scorer))


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, ("model", "images", "out", "device", "dtype", *PICTURES))
    parser.add_argument(
        "--bench",
        required=True,
        help=f"{', '.join(BENCHES)}, all, rooms, or our kind of jsonl file",
    )
    parser.add_argument(
        "--data", help="the benchmark's folder; of all, the folder that holds theirs"
    )
    parser.add_argument(
        "--prompt-style",
        choices=("direct", "thinking"),
        default="thinking",
        help="how questions are asked",
    )
    parser.add_argument("--scorer", choices=("spatialladder", "official"), default="spatialladder")
    parser.add_argument("--max-completion-length", type=int, default=1024)
    parser.add_argument(
        "--batch-size", type=int, default=32, help="samples decoded at once on one device"
    )
    parser.add_argument(
        "--limit", type=int, help="at most this many rows of each question type, drawn by --seed"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--predictions",
        help="another engine's answers, rows of id, question_type, completion; no model",
    )
    parser.add_argument(
        "--blind-from",
        help="folder or jsonl of training rows: what their answers say without a picture",
    )
    parser.set_defaults(num_frames=32, video_seconds="grid")
    args = parser.parse_args()
    named = args.bench in (*BENCHES, "rooms", "all")
    for name in (
        "out",
        "predictions" if args.predictions else "model",
        *(("data",) if named else ()),
    ):
        if getattr(args, name) is None:
            parser.error(f"--{name} is missing")
    refuse_bad_values(parser, args)
    if args.predictions and args.bench == "all":
        parser.error("--predictions goes with one benchmark, not with all")
    benches = found_benches(args.data) if args.bench == "all" else {args.bench: args.data}
    for name in benches:
        if args.scorer not in BENCHES.get(name, OURS).scorers:
            parser.error(
                f"--scorer {args.scorer}: {name} has {', '.join(BENCHES.get(name, OURS).scorers)}"
            )
    benchmarks = {name: read_rows(name, data, args.images) for name, data in benches.items()}
    ranks, model, processor = Ranks(args.device), None, None
    if not args.predictions:
        dtype = args.dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32")
        model = load_model(args.model, getattr(torch, dtype), ranks.device)
        processor = Processor(args.model, model.config, args)
    for name, data in benches.items():
        out = Path(args.out, name) if args.bench == "all" else Path(args.out)
        one = argparse.Namespace(**vars(args) | {"bench": name, "data": data and str(data)})
        evaluate(one, ranks, model, processor, benchmarks[name], out)
    ranks.close()


if __name__ == "__main__":
    main_guard(main)
