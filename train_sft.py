"""Supervised fine-tuning: stage 1 (see), stage 2 (understand), the cold start (reason).

    python train_sft.py --stage 1                        # the tiny model on procedural rooms
    python train_sft.py --stage base                     # a base from random weights (hours)
    torchrun --nproc-per-node 4 train_sft.py --stage 2 --preset paper --model DIR ...

One loop; the stages differ in their row of ladder.RECIPES only. A row of the data decides how it is
prompted and what is answered: boxes as JSON for a localization row, the bare answer for a question,
the chain of thought for a row that has one.
"""

import random
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset

from checkpoint import load_config
from data import IGNORE, Processor, collate, cost, read_all, style_of
from runtime import (
    Ranks,
    Run,
    adamw,
    check_lengths,
    leave_process_group,
    load_sharded,
    main_guard,
    micro_batches,
    need_inputs,
    recipe_settings,
    rows_of_step,
    run_length,
    update_weights,
)


def with_replay(samples, earlier, ratio, seed):
    """Add rows of earlier stages so that they make up `ratio` of all.

    >>> with_replay(["new"] * 3, ["old"], 0.25, seed=0)
    ['new', 'new', 'new', 'old']
    """
    # old / (new + old) = ratio, solved for old
    count = round(len(samples) * ratio / (1 - ratio))
    if count == 0:
        return samples
    # With repetition: there may be fewer of them than are wanted.
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
    """What the loader reads: item (row, trained) is the Example of sample number `row`.

    trained False: a filler without labels, so that every rank makes equally many forwards.
    """

    def __init__(self, samples, processor):
        self.samples, self.processor = samples, processor

    def __getitem__(self, item):
        row, trained = item
        sample = self.samples[row]
        example = self.processor.example(sample, style_of(sample))
        # A filler goes through the model as any row does and adds nothing to loss and gradient.
        if not trained:
            example.labels.fill_(IGNORE)
        return example


def plan_steps(samples, done, steps, args, ranks):
    """Yield, for each step, its row numbers and this rank's micro-batches of them.

    Both depend on (seed, step) only, so a resumed run continues exactly.
    """
    for step in range(done + 1, steps + 1):
        window = competence(step, steps, args.curriculum)
        rows = rows_of_step(step, len(samples), args.batch_size, args.seed, window)
        costs = [cost(samples[row]) for row in rows]
        yield rows, micro_batches(rows, costs, args.micro_batch, ranks.rank, ranks.world)


def load_batches(samples, processor, plan, workers):
    """Iterate over the micro-batches of a plan, in the order in which the steps take them."""
    # Reading pictures takes as long as a small model's step. The loader's workers (--workers) read
    # the next micro-batches while the model computes.
    order = []  # one list of (row, trained) for each micro-batch
    for _, step_batches in plan:
        order += step_batches
    loader = DataLoader(
        Rows(samples, processor),
        batch_sampler=order,
        collate_fn=partial(collate, config=processor.config),
        num_workers=workers,
        worker_init_fn=leave_process_group,
    )
    return iter(loader)


def accumulate_gradient(model, batches, num_targets):
    """Mean negative log-likelihood of all answer tokens of one step; its gradient is left in .grad.

    Args:    batches: this rank's micro-batches. num_targets: answer tokens of all ranks' batches.
    Returns: this rank's part of the loss. The parts of all ranks add up to the mean over all
             tokens, whatever the number of micro-batches and ranks.
    """
    losses = []
    for batch in batches:
        log_probs, _ = model(batch)  # (n,) of the answer tokens
        # Divided by the count of all ranks' tokens, not of this batch: the same gradient for every
        # micro-batch size and world size.
        loss = -log_probs.sum() / num_targets
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).double().sum().item()  # the host waits here, not for each batch


def main():
    args = recipe_settings(__doc__)
    ranks = Ranks(args.device, args.threads)

    # data
    need_inputs(args, ranks)
    samples = read_all(args.data, args.images)
    source = ", ".join(args.data)
    if args.replay:
        earlier = read_all(args.replay, args.images)
        mixed = with_replay(samples, earlier, args.replay_ratio, args.seed)
        replayed = len(mixed) - len(samples)
        source = f"{len(samples)} of {source}, {replayed} replayed of {', '.join(args.replay)}"
        samples = mixed
    steps, until = run_length(args, len(samples), args.batch_size)
    run = Run(args, ranks, samples)
    if run.finished:
        return
    processor = Processor(args.model, load_config(args.model), args)
    ranks.once(check_lengths, processor, samples)

    # model
    model = load_sharded(args, ranks)
    optimizer = adamw(model, args)
    done = run.restore(model, optimizer)
    length = f"{steps} steps of {args.batch_size}, until {until}"
    ranks.print(f"{len(samples)} rows, {length}: {source}")

    # Which rows each step takes is known before the first step, so workers can read ahead.
    plan = list(plan_steps(samples, done, steps, args, ranks))
    loader = load_batches(samples, processor, plan, args.workers)
    for step, (rows, step_batches) in zip(run.steps(done, steps), plan):
        # All micro-batches of the step first: the loss is divided by the count of all targets,
        # which is known when all have been read.
        batches = [next(loader) for _ in step_batches]
        real = [batch for batch in batches if len(batch.targets)]  # a filler has none
        num_targets, num_tokens = ranks.sum(
            sum(len(batch.targets) for batch in real),
            sum(int(batch.lengths.sum()) for batch in real),
        )

        # forward, backward
        batches = [batch.to(ranks.device) for batch in batches]
        (loss,) = ranks.sum(accumulate_gradient(model, batches, num_targets))

        # update
        where = [samples[row].where for row in sorted(rows)]
        rate, norm = update_weights(model, optimizer, step, steps, args, loss, where)

        # log, save
        entry = {
            "epoch": step * args.batch_size / len(samples),
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "num_tokens": num_tokens,
        }
        if run.end_step(model, optimizer, step, entry):
            break
    else:  # no break: all steps are done
        run.finish(model, processor)


if __name__ == "__main__":
    main_guard(main)
