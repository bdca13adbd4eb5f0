"""Supervised fine-tuning: stage 1 (see), stage 2 (understand), the cold start (reason).

    python train_sft.py --stage 1                        # the tiny model on procedural rooms
    python train_sft.py --stage base                     # hours: before the ladder begins
    torchrun --nproc-per-node 4 train_sft.py --stage 2 --preset paper --model DIR ...

One loop; the stages differ in their row of ladder.RECIPES only. A row of the data decides how it is
prompted and what is answered: boxes as JSON for a localization row, the bare answer for a question,
the chain of thought for a row that has one.
"""

import math
import random
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset

from data import IGNORE, Processor, collate, cost, read_all, style_of
from runtime import (
    Ranks,
    Run,
    adamw,
    load_sharded,
    main_guard,
    micro_batches,
    need_inputs,
    own_group,
    recipe_settings,
    rows_of_step,
    update_weights,
)
from settings import PICTURES, values


def with_replay(samples, earlier, ratio, seed):
    """Add rows of earlier stages so that they make up `ratio` of all.

    >>> with_replay(["new"] * 3, ["old"], 0.25, seed=0)
    ['new', 'new', 'new', 'old']
    """
    count = round(len(samples) * ratio / (1 - ratio))
    if count == 0:
        return samples
    return samples + random.Random(seed).choices(earlier, k=count)


def competence(step, steps, start):
    """Share of the rows, from the easy end of the file, that a step draws from.

    It grows in a straight line from `start` to 1, which it reaches after 3/4 of the run.

    Source: competence-based curriculum learning (Platanios et al. 2019).

    >>> [competence(step, 100, 0.25) for step in (0, 25, 75, 100)]
    [0.25, 0.5, 1.0, 1.0]
    """
    return min(1.0, start + (1 - start) * step / (0.75 * steps))


class Rows(Dataset):
    """Examples by (row, trained). A filler (trained False) keeps the ranks in step: no labels."""

    def __init__(self, samples, processor):
        self.samples, self.processor = samples, processor

    def __getitem__(self, item):
        row, trained = item
        sample = self.samples[row]
        example = self.processor.example(sample, style_of(sample))
        if not trained:
            example.labels.fill_(IGNORE)
        return example


def plan_steps(samples, first, steps, args, ranks):
    """Yield each step's rows and this rank's micro-batches of them: functions of (seed, step)."""
    for step in range(first + 1, steps + 1):
        window = competence(step, steps, args.curriculum)
        rows = rows_of_step(step, len(samples), args.batch_size, args.seed, window)
        costs = [cost(samples[row]) for row in rows]
        yield rows, micro_batches(rows, costs, args.micro_batch, ranks.rank, ranks.world)


def load_batches(samples, processor, plan, workers):
    """Iterate over the micro-batches of a plan, in the order in which the steps take them."""
    order = []
    for _, batches in plan:
        order += batches
    loader = DataLoader(
        Rows(samples, processor),
        batch_sampler=order,
        collate_fn=partial(collate, config=processor.config),
        num_workers=workers,
        worker_init_fn=own_group,
    )
    return iter(loader)


def train_step(model, batches, targets):
    """Mean negative log-likelihood of all answer tokens of one step, and its gradient.

    Args:    batches: this rank's micro-batches. targets: answer tokens of all ranks' batches.
    Returns: this rank's part of the loss. The parts of all ranks add up to the mean over all
             tokens, whatever the number of micro-batches and ranks.
    """
    losses = []
    for batch in batches:
        log_probs, _ = model(batch)  # (R,) of the answer tokens
        # One sum, divided once: the same gradient for every micro-batch size and world size.
        loss = -log_probs.sum() / targets
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).double().sum().item()  # the host waits here, once


def main():
    args = recipe_settings(__doc__)
    ranks = Ranks(args.device)

    # data
    need_inputs(args, ranks)
    samples = read_all(args.data, args.images)
    if args.replay:
        earlier = read_all(args.replay, args.images)
        samples = with_replay(samples, earlier, args.replay_ratio, args.seed)
    steps = math.ceil(args.epochs * len(samples) / args.batch_size)
    steps = min(steps, args.max_steps or steps)

    # model
    run = Run(args, ranks, samples)
    if run.finished:
        return
    model = load_sharded(
        args.model, ranks, args.dtype, args.activation_checkpointing, args.freeze_vision
    )
    processor = Processor(args.model, model.config, **values(args, PICTURES))
    optimizer = adamw(model, args)
    first = run.restore(model, optimizer)
    ranks.print(f"{len(samples)} rows, {steps} steps of {args.batch_size}")

    plan = list(plan_steps(samples, first, steps, args, ranks))
    loader = load_batches(samples, processor, plan, args.workers)
    model.train()
    for step, (rows, batches) in zip(run.steps(first, steps), plan):
        batches = [next(loader) for _ in batches]
        counts = ranks.sum(
            targets=sum(len(batch.targets) for batch in batches),  # a filler has none
            tokens=sum(int(batch.lengths.sum()) for batch in batches if len(batch.targets)),
        )
        # forward, backward
        batches = [batch.to(ranks.device) for batch in batches]
        loss = ranks.sum(loss=train_step(model, batches, counts["targets"]))["loss"]

        # update
        places = [samples[row].where for row in sorted(rows)]
        rate, norm = update_weights(model, optimizer, step, steps, args, loss, places)

        # log, save
        row = {
            "epoch": step * args.batch_size / len(samples),
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "num_tokens": counts["tokens"],
        }
        if run.end_step(model, optimizer, step, row):
            break
    else:
        run.finish(model, processor)
    ranks.close()


if __name__ == "__main__":
    main_guard(main)
