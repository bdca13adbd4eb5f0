"""Rejection sampling for the cold start: sample chains of thought from any checkpoint, keep those that end right.

    torchrun --nproc-per-node 4 grpo.py --sample-cold-start --model Qwen2.5-VL-7B-Instruct \
        --data spld_spatial_data.jsonl --per-type 180 --out cold.jsonl
    python train_sft.py --stage cold --data cold.jsonl ...

What is sampled is kept in cold.samples/ as it is made: an interrupted run goes on, and the same command with another
threshold, band or cap chooses anew among the same chains. The paper's 1,255 chains come from a 7B teacher in this way;
it does not say how it chose.
"""

import argparse
import json
import os
import random
from collections import defaultdict
from pathlib import Path

import torch

from checkpoint import load_model
from data import Processor, prompt_text, read_all
from eval import answer_once, claim, subset
from files import UserError, parse_line, read_lines, write_json
from grpo import complete, noise
from rewards import accuracy_reward, format_reward
from runtime import Ranks, main_guard
from settings import PICTURES, Parser, add_flags

SAMPLED = (
    "model",
    "data",
    "images",
    "drop_invalid",
    "dtype",
    *PICTURES,
    "num_generations",
    "max_completion_length",
    "temperature",
    "seed",
    "limit",
)  # what the chains depend on; the other flags only choose among them


def sample_chains(model, processor, samples, rows, args, device):
    """K chains for each of the rows, with both rewards. Noise as in GRPO: any number of processes samples the same."""
    K = args.num_generations
    uniforms = torch.cat(
        [noise(args.seed, 0, row, K, args.max_completion_length) for row in rows]
    ).to(device)
    return [
        {
            "index": row,
            "completions": group.texts,
            "format": format_reward(group.texts),
            "accuracy": accuracy_reward(group.texts, group.sample),
        }
        for row, group in zip(
            rows, complete(model, processor, samples, rows, K, uniforms, args, device)
        )
    ]


def choose(questions, low, high, min_accuracy, per_question, per_type, seed):
    """Keep well-formed and correct chains of questions that are neither too easy nor too hard.

    Args:    questions: [{"type", "asked" (whatever tells two questions apart), "completions", "format", "accuracy"}].
             low, high: share of a question's chains that may be right. min_accuracy: what a number must earn (MRA).
             per_question, per_type: at most so many; first chains before second ones, then by lot (None: all).
    Returns: [(question, its chain)] in order, and type -> counts.

    >>> chains = dict(completions=["a", "b ", "b", "c"], format=[1, 1, 1, 0], accuracy=[0.2, 1, 1, 1])
    >>> choose([dict(chains, type="room size", asked=1)], 0, 1, 0.8, 2, None, 0)[0]
    [(0, 'b')]
    """
    seen, found, counts, lot = set(), defaultdict(list), {}, random.Random(seed)
    for i, question in enumerate(questions):
        texts = [" ".join(text.split()) for text in question["completions"]]
        right = [
            ok == 1 and accuracy >= min_accuracy
            for ok, accuracy in zip(question["format"], question["accuracy"])
        ]
        of_type = counts.setdefault(
            question["type"],
            dict.fromkeys(
                (
                    "questions",
                    "chains",
                    "well formed",
                    "correct",
                    "accepted",
                    "solved",
                    "in the band",
                    "kept",
                ),
                0,
            ),
        )
        in_band = any(right) and low <= sum(right) / len(right) <= high
        for key, value in {
            "questions": 1,
            "chains": len(texts),
            "well formed": sum(question["format"]),
            "correct": sum(a >= min_accuracy for a in question["accuracy"]),
            "accepted": sum(right),
            "solved": any(right),
            "in the band": in_band,
        }.items():
            of_type[key] += int(value)
        distinct = dict.fromkeys(
            (str(question["asked"]), text) for text, ok in zip(texts, right) if ok and in_band
        )
        fresh = [name for name in distinct if name not in seen][:per_question]
        seen.update(fresh)
        originals = dict(
            zip(reversed(texts), reversed(question["completions"]))
        )  # the first of equal ones
        found[question["type"]] += [
            (place, lot.random(), i, originals[text].strip())
            for place, (_, text) in enumerate(fresh)
        ]
    kept = {kind: sorted(chains)[:per_type] for kind, chains in found.items()}
    for kind, chains in kept.items():
        counts[kind]["kept"] = len(chains)
    return [
        chain[2:]
        for chain in sorted(sum(kept.values(), []), key=lambda chain: (chain[2], chain[0]))
    ], counts


def table(counts):
    """The acceptance report: a line per type; shares are of all chains sampled."""
    lines = [
        f"{'':<20}{'questions':>10}{'well formed':>13}{'correct':>9}{'accepted':>10}{'solved':>8}{'in band':>9}{'kept':>7}"
    ]
    total = {
        key: sum(of_type[key] for of_type in counts.values()) for key in next(iter(counts.values()))
    }
    for kind, c in (*counts.items(), ("all", total)):
        shares = [f"{c[key] / c['chains']:.1%}" for key in ("well formed", "correct", "accepted")]
        lines.append(
            f"{kind:<20}{c['questions']:>10}{shares[0]:>13}{shares[1]:>9}{shares[2]:>10}{c['solved']:>8}"
            f"{c['in the band']:>9}{c['kept']:>7}"
        )
    return "\n".join(lines)


def write_rows(path, chosen, samples, prompts):
    """The cold-start file: each source row with its prompt and the chain as `solution`; written whole or not at all."""
    wanted = {samples[i].where for i, _ in chosen}
    files = dict.fromkeys(where.rpartition(":")[0] for where in wanted)
    sources = {
        where: parse_line(line, where)
        for file in files
        for where, line in read_lines(file)
        if where in wanted
    }
    beside = Path(f"{path}.tmp")
    beside.write_text(
        "".join(
            json.dumps(
                sources[samples[i].where]
                | {"prompt": prompt_text(samples[i], "thinking", prompts), "solution": text},
                ensure_ascii=False,
            )
            + "\n"
            for i, text in chosen
        ),
        encoding="utf-8",
    )
    os.replace(beside, path)


def settings():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample-cold-start", action="store_true", required=True)
    add_flags(
        parser,
        (
            "model",
            "data",
            "images",
            "drop_invalid",
            *PICTURES,
            "num_generations",
            "max_completion_length",
            "temperature",
            "seed",
            "device",
            "dtype",
        ),
    )
    parser.add_argument(
        "--out",
        help="jsonl file to write; what was sampled lies beside it in a folder FILE.samples",
    )
    parser.add_argument(
        "--limit", type=int, help="ask at most this many questions of each type, drawn by --seed"
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, help="questions sampled at once on one device"
    )
    parser.add_argument(
        "--min-accuracy", type=float, default=0.8, help="mean relative accuracy a number must earn"
    )
    parser.add_argument(
        "--difficulty",
        nargs=2,
        type=float,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="keep questions of whose chains a share between these is right",
    )
    parser.add_argument("--per-question", type=int, default=1, help="chains kept of a question")
    parser.add_argument("--per-type", type=int, help="chains kept of a question type")
    parser.set_defaults(
        num_generations=8,
        max_completion_length=1024,
        temperature=1.0,
        seed=0,
        num_frames=16,
        video_seconds="grid",
        prompt_style="thinking",
        drop_invalid=False,
    )
    args = parser.parse_args()
    for name in ("model", "data", "out"):
        if getattr(args, name) is None:
            parser.error(f"--{name} is missing")
    for name in (
        "limit",
        "batch_size",
        "num_generations",
        "max_completion_length",
        "per_question",
        "per_type",
        "temperature",
    ):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected above 0")
    if not 0 < args.min_accuracy <= 1:
        parser.error(f"--min-accuracy is {args.min_accuracy}, expected above 0 to 1")
    if not 0 <= args.difficulty[0] <= args.difficulty[1] <= 1:
        parser.error(
            f"--difficulty is {args.difficulty[0]} {args.difficulty[1]}, expected two shares, the lower first"
        )
    if not args.images and len({Path(file).parent for file in args.data}) > 1:
        parser.error(
            "--data: the files lie in several folders; give --images, which pictures of all are relative to"
        )
    return args


def main():
    args = settings()
    ranks = Ranks(args.device)
    out, folder = Path(args.out), Path(args.out).with_suffix(".samples")

    # what to ask
    samples = read_all(args.data, args.images, ranks.print if args.drop_invalid else None)
    for sample in samples:
        if sample.question_type == "localization" or sample.messages:
            raise UserError(
                f"{sample.where}: {sample.question_type} row, expected a question with an answer to check"
            )
    samples, _ = subset(samples, samples, args.limit, args.seed)
    if out.exists() and not folder.is_dir():
        raise UserError(f"{out}: exists already; give another --out")
    problem = ranks.gather(
        claim(folder, {k: getattr(args, k) for k in SAMPLED}) if ranks.rank == 0 else None
    )[0]
    if problem:
        raise UserError(problem)

    # sample
    dtype = args.dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32")
    model = load_model(args.model, getattr(torch, dtype), ranks.device)
    processor = Processor(args.model, model.config, args)
    answers = answer_once(
        samples,
        args.batch_size,
        ranks,
        folder,
        lambda rows: sample_chains(model, processor, samples, rows, args, ranks.device),
    )

    # choose
    if ranks.rank == 0:
        questions = [
            row
            | {
                "type": s.question_type,
                "asked": (prompt_text(s, "thinking", processor.prompts), s.media),
            }
            for s, row in zip(samples, answers)
        ]
        chosen, counts = choose(
            questions,
            *args.difficulty,
            args.min_accuracy,
            args.per_question,
            args.per_type,
            args.seed,
        )
        write_json(folder / "report.json", counts)
        print(table(counts))
        if not chosen:
            raise UserError(
                f"{args.model}: none of its chains was kept; the table above says where they fell out"
            )
        write_rows(out, chosen, samples, processor.prompts)
        images = args.images or Path(args.data[0]).parent / "images"
        print(
            f"wrote {len(chosen)} chains to {out}; train on them with: python train_sft.py --stage cold --data {out} "
            f"--images {images}"
        )
    ranks.close()


if __name__ == "__main__":
    main_guard(main)
