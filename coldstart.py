"""Rejection sampling for the cold start: chains of thought of a model, those that end right.

    torchrun --nproc-per-node 4 coldstart.py --model Qwen2.5-VL-7B-Instruct \\
        --data spld_spatial_data.jsonl --per-type 180 --out cold.jsonl
    python train_sft.py --stage cold --data cold.jsonl ...

All chains are saved in the folder cold.samples/ as they are sampled: an interrupted run goes on,
and the same command with another threshold, band or cap chooses anew among the same chains. The
paper's 1,255 chains come from a 7B model in this way; it does not say how they were chosen.
"""

import random
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

from checkpoint import load_config, load_model
from data import Processor, prompt_text, read_all
from eval import answer_once, subset
from files import (
    CONFIG,
    MADE_OF,
    UserError,
    claim,
    made_of,
    read_jsonl,
    text_table,
    write_json,
    write_jsonl,
)
from grpo import sample_groups
from runtime import Ranks, check_lengths, compute_dtype, main_guard
from settings import MAY_CHANGE, PICTURES, Parser, add_flags, positive, share, values

# What the chains depend on; the other flags choose among them.
SAMPLING = (
    "model",
    "data",
    "images",
    "dtype",
    "seed",
    "num_generations",
    "max_completion_length",
    "temperature",
    *PICTURES,
)
# Chains are judged as in GRPO. Each reward is kept by itself, their sum is not used.
JUDGED = {"reward_funcs": ("format", "accuracy"), "reward_weights": (1, 1), "scale_rewards": "none"}
SHARES = ("well formed", "accepted")  # counted in chains
QUESTIONS = ("in the band", "kept")


def sample_chains(model, processor, samples, rows, args, device):
    """Chains for some samples, with both rewards; any number of processes samples the same.

    Args:    rows: numbers into samples.
    Returns: {"completions": texts, "format": rewards, "accuracy": rewards} for each.
    """
    chosen = [samples[row] for row in rows]
    # As in GRPO, each chain's noise depends on seed and row only.
    groups = sample_groups(model, processor, chosen, rows, 0, args, device)
    return [{"completions": group.texts, **group.rewards} for group in groups]


def distinct(chains):
    """Chains as written. Those that differ in white space only are one chain.

    >>> distinct(["a  b", " a b", "c"])
    ['a  b', 'c']
    """
    kept = {}
    for text in chains:
        kept.setdefault(" ".join(text.split()), text.strip())
    return [*kept.values()]


def choose(questions, low, high, min_accuracy, per_question, per_type, seed):
    """Choose well-formed and correct chains of questions that are neither too easy nor too hard.

    Args:    questions: [{"type", "completions", "format", "accuracy"}].
             low, high: share of a question's chains that may be right: the band.
             min_accuracy: what a number must earn (MRA).
             per_question, per_type: the caps; None: no cap. All first chains of a type come
             before any second one, in random order.
    Returns: [(number of the question, its chain)] in order, and type -> counts.

    >>> chains = {"completions": ["a", "b ", "b", "c"], "format": [1, 1, 1, 0]}
    >>> question = chains | {"accuracy": [0.2, 1, 1, 1], "type": "room size"}
    >>> choose([question], 0, 1, 0.8, 2, None, 0)[0]
    [(0, 'b')]
    """
    counts = defaultdict(Counter)
    candidates = defaultdict(list)  # type -> (place in its question, order, question, chain)
    order = random.Random(seed)
    for number, question in enumerate(questions):
        count = len(question["completions"])
        judged = zip(question["completions"], question["format"], question["accuracy"])
        accepted = [text for text, ok, score in judged if ok and score >= min_accuracy]
        in_band = low <= len(accepted) / count <= high
        chains = distinct(accepted) if in_band else []
        for place, chain in enumerate(chains[:per_question]):
            candidates[question["type"]].append((place, order.random(), number, chain))
        counts[question["type"]].update(
            {
                "questions": 1,
                "chains": count,
                "well formed": int(sum(question["format"])),
                "accepted": len(accepted),
                "in the band": int(bool(chains)),
                "kept": 0,  # known when all are counted
            }
        )

    chosen = []
    for kind, group in candidates.items():
        kept = sorted(group)[:per_type]
        counts[kind]["kept"] = len(kept)
        chosen += [(number, place, text) for place, _, number, text in kept]
    return [(number, text) for number, _, text in sorted(chosen)], counts


def table(counts):
    """The acceptance report: a line for each type; two shares are of all sampled chains."""
    total = sum(counts.values(), Counter())
    rows = [("", "questions", *SHARES, *QUESTIONS)]
    for kind, count in (*counts.items(), ("all", total)):
        shares = [f"{count[name] / count['chains']:.1%}" for name in SHARES]
        numbers = [count[name] for name in QUESTIONS]
        rows.append((kind, count["questions"], *shares, *numbers))
    return text_table(rows)


def chosen_rows(chosen, samples, files, prompts):
    """The cold start: each source row with its prompt, and the chain as `solution`."""
    sources = {}
    for file in files:
        sources |= dict(read_jsonl(file))
    rows = []
    for number, text in chosen:
        sample = samples[number]
        prompt = prompt_text(sample, "thinking", prompts)
        rows.append(sources[sample.where] | {"prompt": prompt, "solution": text})
    return rows


def settings():
    """The flags, checked."""
    parser = Parser(__doc__)
    add_flags(parser, (*SAMPLING, "device"), num_generations=8)
    add = parser.add_argument
    add("--out", help="jsonl file to write; all chains lie beside it in a folder FILE.samples")
    add("--limit", type=int, help="at most this many questions of each type, drawn by --seed")
    add("--batch-size", type=int, default=8, help="questions that one device samples at once")
    add("--min-accuracy", type=float, default=0.8, help="what a number must earn (MRA)")
    add(
        "--difficulty",
        nargs=2,
        type=float,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="only questions of whose chains a share between these two is right",
    )
    add("--per-question", type=int, default=1, help="chains that are kept of a question")
    add("--per-type", type=int, help="chains that are kept of a question type")
    parser.checks |= dict.fromkeys(("limit", "batch_size", "per_question", "per_type"), positive)
    parser.checks |= {"min_accuracy": share, "difficulty": share}
    parser.set_defaults(prompt_style="thinking", **JUDGED)
    args = parser.parse_args()
    parser.need(args, "model", "data", "out")
    if args.difficulty[0] > args.difficulty[1]:
        low, high = args.difficulty
        parser.error(f"--difficulty is {low} {high}, expected the lower share first")
    if not args.images and len({Path(file).parent for file in args.data}) > 1:
        parser.error("--data: files of several folders; give --images, where all pictures lie")
    return args


def read_questions(args):
    """The rows to ask, at most --limit of each type. Boxes and chats have no chain to judge."""
    samples = read_all(args.data, args.images)
    for sample in samples:
        if sample.question_type == "localization" or sample.messages:
            kind = sample.question_type
            raise UserError(f"{sample.where}: {kind} row, expected a question with an answer")
    return subset(samples, samples, args.limit, args.seed)[0]


def main():
    args = settings()
    ranks = Ranks(args.device)
    out, folder = Path(args.out), Path(args.out).with_suffix(".samples")

    # 1. The questions.
    samples = read_questions(args)
    if out.exists() and not folder.is_dir():
        raise UserError(f"{out}: exists already; give another --out")

    # 2. Their chains, saved as they are sampled: the folder goes on with the same settings and the
    #    same teacher. A chain belongs to its question, wherever that stands.
    config = values(args, (*SAMPLING, "limit"))
    config[MADE_OF] = ranks.once(made_of, args.model, {"prompts": args.prompts})
    ranks.once(claim, folder, config, MAY_CHANGE)
    processor = Processor(args.model, load_config(args.model), args)
    reserve = args.max_completion_length
    ranks.once(check_lengths, processor, samples, args.prompt_style, False, reserve)
    model = load_model(args.model, compute_dtype(args.dtype, ranks.device), ranks.device)
    ranks.once(write_json, folder / CONFIG, config)

    answer = partial(sample_chains, model, processor, samples, args=args, device=ranks.device)
    chains = answer_once(samples, args.batch_size, ranks, folder, answer)

    # 3. The chains that stay.
    if ranks.rank == 0:
        questions = []
        for sample, row in zip(samples, chains):
            questions.append(row | {"type": sample.question_type})
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
            raise UserError(f"{args.model}: no chain was kept; the table above says why")
        write_jsonl(out, chosen_rows(chosen, samples, args.data, processor.prompts))
        images = args.images or Path(args.data[0]).parent / "images"
        print(f"wrote {len(chosen)} chains to {out}; train on them with:")
        print(f"python train_sft.py --stage cold --data {out} --images {images}")


if __name__ == "__main__":
    main_guard(main)
