"""Supervised fine-tuning: stage 1 (see), stage 2 (understand), the cold start (reason). One loop, stages are data.

    python train_sft.py --stage 1                                  # the tiny model on procedural rooms
    python train_sft.py --stage base                               # hours: what the tiny model is before the ladder
    torchrun --nproc-per-node 4 train_sft.py --stage 2 --preset paper --model DIR --data FILE.jsonl --out DIR

A row decides how it is asked and what is answered: boxes as JSON for a localization row, the bare answer for a
question, the chain of thought for a row that has one. The stages differ in their row of ladder.RECIPES only.
"""

import math
import random
from functools import partial

from torch.utils.data import DataLoader, Dataset

from data import IGNORE, Processor, collate, cost, read_all, style_of
from files import UserError
from look.plan import dry_run, step_flops
from runtime import (
    Ranks,
    Run,
    adamw,
    clip_gradients,
    load_sharded,
    main_guard,
    micro_batches,
    need_inputs,
    own_group,
    recipe_settings,
    rows_of_step,
    scheduled_rate,
)


def with_replay(samples, earlier, ratio, seed):
    """Add rows of earlier stages so that they make up `ratio` of all.

    >>> with_replay(["new"] * 3, ["old"], 0.25, seed=0)
    ['new', 'new', 'new', 'old']
    """
    count = round(len(samples) * ratio / (1 - ratio))
    return samples + random.Random(seed).choices(earlier, k=count) if count else samples


def competence(step, steps, start):
    """Share of the rows, from the easy end of the file, that a step draws from: grows from `start` to 1 at 3/4 of the run.

    Source: competence-based curriculum learning (Platanios et al. 2019), linear.

    >>> [competence(step, 100, 0.25) for step in (0, 25, 75, 100)]
    [0.25, 0.5, 1.0, 1.0]
    """
    return min(1.0, start + (1 - start) * step / (0.75 * steps))


class Rows(Dataset):
    """Examples by (row, trained): a filler (trained False) keeps ranks in step and has no label."""

    def __init__(self, samples, processor):
        self.samples, self.processor = samples, processor

    def __getitem__(self, item):
        row, trained = item
        sample = self.samples[row]
        example = self.processor.example(sample, style_of(sample))
        if not trained:
            example.labels.fill_(IGNORE)
        return example


def train_step(model, batches, targets, lap=lambda part: None):
    """Mean negative log-likelihood of all answer tokens of one optimizer step, and its gradient.

    Args:    batches: this rank's micro-batches. targets: answer tokens in all ranks' batches together.
             lap: is told when a `forward` and when a `backward` has ended.
    Returns: this rank's part of the loss: the parts add up to the mean over all tokens, whatever the number of
             micro-batches and ranks.
    """
    total = 0.0
    for batch in batches:
        log_probs, _ = model(batch)
        loss = -log_probs.sum() / targets
        total += loss.item()  # waits for the device: what follows is the backward's time
        lap("forward")
        loss.backward()
        lap("backward")
    return total


def main():
    args = recipe_settings(__doc__)
    ranks = Ranks(args.device)

    # data
    need_inputs(args, ranks)
    tell = ranks.print if args.drop_invalid else None
    samples = read_all(args.data, args.images, tell, args.data_types)
    if args.replay:
        samples = with_replay(
            samples, read_all(args.replay, args.images, tell), args.replay_ratio, args.seed
        )
    steps = math.ceil(args.epochs * len(samples) / args.batch_size)
    steps = min(steps, args.max_steps or steps)
    if args.dry_run:
        return dry_run(args, samples, steps)

    # model
    run = Run(args, ranks)
    if run.finished:
        return
    model = load_sharded(
        args.model,
        ranks,
        args.dtype,
        args.reshard_after_forward,
        args.activation_checkpointing,
        args.freeze_vision,
    )
    processor = Processor(args.model, model.config, args)
    optimizer = adamw(model, args)
    first = run.restore(model, optimizer)
    ranks.print(f"{len(samples)} rows, {steps} steps of {args.batch_size}")

    # loop
    plan = []
    for step in range(first + 1, steps + 1):
        rows = rows_of_step(
            step, len(samples), args.batch_size, args.seed, competence(step, steps, args.curriculum)
        )
        size = min(
            args.micro_batch, math.ceil(len(rows) / ranks.world)
        )  # larger ones would leave ranks without rows
        costs = [cost(samples[row]) for row in rows]
        plan.append((rows, micro_batches(rows, costs, size, ranks.rank, ranks.world)))
    loader = iter(
        DataLoader(
            Rows(samples, processor),
            batch_sampler=[batch for _, batches in plan for batch in batches],
            collate_fn=partial(collate, config=model.config),
            num_workers=args.workers,
            worker_init_fn=own_group,
        )
    )
    model.train()
    for step, (rows, batches) in zip(run.steps(first, steps), plan):
        batches = [next(loader).to(ranks.device) for _ in batches]
        real = [b for b in batches if len(b.targets)]  # fillers have none
        tokens, targets, patches = ranks.sum(
            sum(int(b.lengths.sum()) for b in real),
            sum(len(b.targets) for b in real),
            sum(len(b.patches) for b in real),
        )
        run.lap("data")
        for group in optimizer.param_groups:
            group["lr"] = scheduled_rate(step, steps, args)
        loss = ranks.sum(train_step(model, batches, targets, run.lap))[0]
        norm = clip_gradients(model, args.max_grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(
                f"loss {loss}, gradient norm {norm}; not applied. Rows of this step: "
                + ", ".join(samples[row].where for row in sorted(set(rows)))
            )
        optimizer.step()
        optimizer.zero_grad()
        run.lap("optimizer")
        if run.end_step(
            model,
            optimizer,
            step,
            steps,
            {
                "epoch": step * args.batch_size / len(samples),
                "loss": loss,
                "grad_norm": norm,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "num_tokens": tokens,
                "model_flops": step_flops(model, tokens, targets, patches),
            },
        ):
            break
    else:
        run.finish(model, processor)
    ranks.close()


if __name__ == "__main__":
    main_guard(main)
