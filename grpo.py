"""Stage 3: group relative policy optimization (GRPO) with a KL penalty, from prompts to weights.

    python grpo.py                                        # the tiny model after its cold start
    torchrun --nproc-per-node 4 grpo.py --preset paper --model DIR --data FILE.jsonl --out DIR

One step: sample a group of G completions for each of a few prompts; reward each completion (format
and accuracy); its advantage is how much better it is than its group; raise the log-probs of the
better, lower those of the worse, and stay near the reference model. Vision encoder and prompt are
computed once for each group in the rollout, and in the update once for each --micro-batch of its
completions. Such a part is one sequence [prompt | c1 | ... | cG] (model.SharedPrompt): P + G * C
tokens, not G * (P + C).

Where this differs from the authors' trainer, and why: docs/departures.md.

Letters in shapes, as in model.py: B prompts, P prompt tokens, C completion tokens, G completions in
a group (in the update: in a part of it), n scored tokens.
"""

import dataclasses
import math
import time
from itertools import zip_longest

import numpy as np
import torch

from checkpoint import load_config
from data import Processor, Sample, chunks, collate, picture_paths, read_all, style_of
from files import UserError
from model import Batch, generate, to_device
from rewards import REWARDS, call_reward, check_row
from runtime import (
    Ranks,
    Run,
    adamw,
    check_lengths,
    gathered,
    load_sharded,
    main_guard,
    need_inputs,
    recipe_settings,
    rows_of_step,
    run_length,
    update_weights,
)

LOG_RATIO_LIMIT = 20.0  # keeps exp(d) finite; beyond it a token's KL has no gradient
SUMS = ("loss", "kl", "entropy", "clipped")  # names of what loss_terms adds up, in its order

# ---------------------------------------------------------------------------------- the formulas


def group_advantages(rewards, scale="group", eps=1e-4):
    """How much better each completion is than its group: (r - mean) / (std + eps).

    Args:    rewards (G,), G >= 2. scale: "none" does not divide (Dr. GRPO, Liu et al. 2025).
    Returns: (G,); equal rewards give exact zeros.
    Source:  DeepSeekMath (Shao et al. 2024), outcome supervision. The std is unbiased and eps is
             1e-4, as in the authors' trainer.

    >>> advantages = group_advantages(torch.tensor([2.0, 0.0, 0.0, 0.0]))  # mean 0.5, std 1
    >>> [round(advantage, 5) for advantage in advantages.tolist()]
    [1.49985, -0.49995, -0.49995, -0.49995]
    """
    # Handled separately: the mean of equal rewards may be rounded (8 x 1.9 leaves 1e-7), which a
    # division by eps = 1e-4 would turn into an advantage of 1e-3.
    if rewards.min() == rewards.max():
        return torch.zeros_like(rewards)
    centred = rewards - rewards.mean()
    return centred if scale == "none" else centred / (rewards.std() + eps)


def kl_k3(log_probs, reference):
    """KL(policy || reference) of each token: exp(d) - d - 1 with d = reference - policy.

    An unbiased estimate from the one token that was sampled; it is never negative.

    Source: Schulman, "Approximating KL divergence" (k3); DeepSeekMath equation 4.

    >>> kl_k3(torch.tensor([0.0]), torch.tensor([0.0])).item()
    0.0
    """
    d = (reference - log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return d.expm1() - d  # exp(d) - 1 without cancellation: most d are near 0


def policy_loss(log_probs, old, advantages, epsilon, epsilon_high):
    """Clipped surrogate of each token: -min(ratio * A, clip(ratio, 1 - eps, 1 + eps_high) * A).

    Source:  PPO (Schulman et al. 2017) equation 7; DAPO (Yu et al. 2025) for the upper bound.
    Returns: loss (n,), clipped (n,) bool: tokens whose gradient the clip has cut off.

    >>> now, old, advantages = torch.tensor([0.5]), torch.tensor([0.0]), torch.tensor([1.0])
    >>> loss, clipped = policy_loss(now, old, advantages, epsilon=0.2, epsilon_high=0.2)
    >>> round(loss.item(), 4), clipped.item()  # the ratio is exp(0.5) = 1.65
    (-1.2, True)
    """
    ratio = (log_probs - old).exp()
    plain = ratio * advantages
    # Where the ratio has gone far enough in the wanted direction, the bounded term is the smaller
    # one. It does not depend on log_probs, so the token has no gradient any more.
    bounded = ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantages
    return -torch.minimum(plain, bounded), bounded < plain


def token_weights(lengths, kept, loss_type, max_length, sequences, kept_tokens):
    """The weight of each completion's tokens in the loss, which is one weighted sum.

    grpo     mean over a completion's tokens, then over completions   1 / (length * sequences)
    dr_grpo  sum over tokens, divided by a constant                   1 / (max_length * sequences)
    dapo     mean over all kept tokens of the step                    1 / kept_tokens

    Args:    lengths (G,). kept (G,) bool: False for a truncated completion that is left out.
             sequences (left-out ones too), kept_tokens: of the whole step and all ranks.
    Returns: (G,)
    Source:  DeepSeekMath; Liu et al. 2025; Yu et al. 2025.

    >>> token_weights(torch.tensor([2, 4]), torch.tensor([True, True]), "grpo", 8, 2, 6).tolist()
    [0.25, 0.125]
    """
    if loss_type == "grpo":
        divisor = lengths * sequences
    elif loss_type == "dr_grpo":
        divisor = torch.full_like(lengths, max_length * sequences)
    else:
        divisor = torch.full_like(lengths, kept_tokens)
    return kept / divisor.clamp(min=1)


# ---------------------------------------------------------------------------------- groups


@dataclasses.dataclass
class Group:
    """One prompt, its sampled completions and what becomes of them.

    All but the log-probs is on the CPU, where batches are made of it.
    """

    sample: Sample
    prompt: Batch  # of one row
    ids: torch.Tensor  # (G, C) int64
    lengths: torch.Tensor  # (G,) int64
    finished: torch.Tensor  # (G,) bool: ended by itself
    texts: list
    rewards: dict | None = None  # of each kind: name -> G floats
    reward: torch.Tensor | None = None  # (G,) their weighted sum
    advantages: torch.Tensor | None = None  # (G,)
    # Tuples of G tensors, (length,) each, by the forward that the update uses: generate's differ by
    # rounding, and ratios would not be exactly 1. Old: by the policy that sampled; None with one
    # update for each rollout. Reference: by the reference model; None without KL penalty.
    old_log_probs: tuple | None = None
    reference_log_probs: tuple | None = None
    shown: tuple = ()  # the prompt as text and how often its pads repeat; see Processor.shown


def split_group(group, size):
    """Groups of at most `size` completions each, with the same prompt: one forward takes one."""
    split = []
    for first in range(0, len(group.ids), size):
        part = dataclasses.replace(group)
        # Texts and rewards stay whole: they are for the log, no forward reads them.
        names = ("ids", "lengths", "finished", "advantages", "old_log_probs", "reference_log_probs")
        for name in names:
            of_completions = getattr(group, name)
            if of_completions is not None:
                setattr(part, name, of_completions[first : first + size])
        split.append(part)
    return split


def noise(seed, step, place, G, C):
    """(G, C) uniforms of one group, a function of where it stands: world size changes nothing.

    Args:    place: the prompt's place in its step, not its row: a row that is drawn twice in a step
             is sampled twice.
    """
    # One generator for each completion: a group of 8 begins with the completions of a group of 4.
    draws = []
    for completion in range(G):
        generator = np.random.default_rng((seed, step, place, completion))
        draws.append(generator.random(C, dtype=np.float32))
    return torch.from_numpy(np.stack(draws))


def sample_completions(model, processor, samples, G, uniforms, args, device, reserve=0):
    """G completions for each of the samples, all in one batch; greedy where uniforms is None.

    Args:    uniforms (B * G, C). reserve: tokens that have to fit behind a prompt.
    Returns: [Group] without rewards. A localization sample's boxes are in pixels as the model sees
             them.
    """
    # Prompts alone, up to where the assistant begins.
    examples = []
    for sample in samples:
        style = style_of(sample, args.prompt_style)
        examples.append(processor.example(sample, style, with_answer=False, reserve=reserve))
    rollout = generate(
        model,
        collate(examples, processor.config).to(device),
        args.max_completion_length,
        processor.stop_ids,
        G=G,
        uniforms=uniforms,
        banned=processor.banned(device),
        temperature=args.temperature,
    )
    # What follows is done on the CPU: texts, rewards, and the batches of the update.
    all_ids = rollout.ids.cpu()
    all_lengths = rollout.lengths.cpu()
    all_finished = rollout.finished.cpu()

    groups = []
    for i, (sample, example) in enumerate(zip(samples, examples)):
        own = slice(i * G, (i + 1) * G)
        lengths = all_lengths[own]
        ids = all_ids[own, : int(lengths.max())]  # (G, C), where C is now this group's longest
        texts = [processor.decode(ids[g, : lengths[g]].tolist()) for g in range(G)]
        if example.boxes:  # the reward compares boxes on the picture that the model was shown
            sample = dataclasses.replace(sample, answer=example.boxes)
        prompt = collate([example], processor.config)  # alone: without padding
        shown = processor.shown(example)
        finished = all_finished[own]
        groups.append(Group(sample, prompt, ids, lengths, finished, texts, shown=shown))
    return groups


def sample_groups(model, processor, samples, places, step, args, device):
    """Sample and reward G completions for each of the samples.

    Args:    samples: this rank's of the step. places: the place of each in the whole step.
    """
    G, C = args.num_generations, args.max_completion_length
    uniforms = torch.cat([noise(args.seed, step, place, G, C) for place in places])  # (B * G, C)
    uniforms = to_device(uniforms, device)
    groups = sample_completions(model, processor, samples, G, uniforms, args, device, reserve=C)
    for group in groups:
        group.rewards = {}
        # Added up in float64, then rounded: 0.1 + 0.2 and 0.3 are equal rewards.
        total = torch.zeros(G, dtype=torch.float64)
        for name, weight in zip(args.reward_funcs, args.reward_weights):
            group.rewards[name] = call_reward(name, group.texts, group.sample)
            total += weight * torch.tensor(group.rewards[name], dtype=torch.float64)
        group.reward = total.float()
        group.advantages = group_advantages(group.reward, args.scale_rewards)
    return groups


def group_batch(prompt, ids, lengths):
    """The group as one sequence [prompt | c1 | ... | cG]; its completions' tokens are the targets.

    All completions start at the same position. A completion's first token is predicted at the
    prompt's last place, each later one at the place of the token before it.

    Args:    prompt: Batch of one row. ids (G, C), lengths (G,).
    Returns: Batch whose targets are the n = sum(lengths) tokens, completion by completion.
    """
    (G, C), P = ids.shape, prompt.ids.shape[1]
    positions = prompt.positions.max() + 1 + torch.arange(C)  # (C,)
    positions = positions.repeat(G).expand(3, 1, -1)  # (3, 1, G*C)
    # Completion g begins at place P + g * C; what stands before it there is completion g - 1.
    predict_at = P + torch.arange(G * C).view(G, C) - 1
    predict_at[:, 0] = P - 1
    inside = torch.arange(C) < lengths[:, None]  # (G, C), False for padding
    # What is not replaced is the prompt's: pictures, their places (it stands first), its length.
    return dataclasses.replace(
        prompt,
        ids=torch.cat((prompt.ids[0], ids.flatten()))[None],  # (1, P + G*C)
        positions=torch.cat((prompt.positions, positions), dim=2),  # (3, 1, P + G*C)
        predict_at=predict_at[inside],  # (n,)
        targets=ids[inside],  # (n,)
        group_shape=(G, C),
    )


@torch.no_grad()
def add_log_probs(groups, name, model, args, banned, device):
    """Set old_log_probs or reference_log_probs of each group: by a model, without gradient.

    A tuple of G tensors, (length,) each: what the update compares with.
    """
    # With the weights gathered, ranks whose groups need more forwards keep nobody waiting.
    with gathered(model):
        for group in groups:
            of_group = []
            for part in split_group(group, args.micro_batch):
                batch = group_batch(part.prompt, part.ids, part.lengths).to(device)
                log_probs, _ = model(batch, banned=banned, temperature=args.temperature)  # (n,)
                of_group += log_probs.split(part.lengths.tolist())
            setattr(group, name, tuple(of_group))


# ---------------------------------------------------------------------------------- the update


def kept_completions(group, args):
    """(G,) bool: the completions that the loss counts."""
    if args.mask_truncated_completions:
        return group.finished
    return torch.ones_like(group.finished)


def step_counts(groups, args, ranks):
    """What the losses of all ranks are divided by, and how many forwards every rank makes.

    Returns: {"sequences", "kept_tokens", "tokens", "prompt_tokens", "forwards"}, over all ranks.
    """
    kept_tokens = [(group.lengths * kept_completions(group, args)).sum() for group in groups]
    counts = ranks.sum_named(
        {
            "sequences": sum(len(group.ids) for group in groups),
            "kept_tokens": sum(kept_tokens),
            "tokens": sum(group.lengths.sum() for group in groups),
            "prompt_tokens": sum(group.prompt.lengths.sum() for group in groups),
        }
    )
    counts = {name: int(count) for name, count in counts.items()}
    forwards = sum(len(split_group(group, args.micro_batch)) for group in groups)
    return counts | {"forwards": max(ranks.gather(forwards))}


def loss_terms(model, part, kept, counts, args, banned, device):
    """The loss of a part of a group: one weighted sum over its tokens.

    Returns: loss, a scalar that carries the gradient; (4,) the numbers that SUMS names, without it.
    """
    batch = group_batch(part.prompt, part.ids, part.lengths).to(device)
    # The same banned tokens and the same temperature as in sampling: the distribution that is
    # trained is the one that the completions were drawn from.
    log_probs, entropies = model(batch, banned=banned, temperature=args.temperature)  # (n,) each
    weights = token_weights(
        part.lengths,
        kept,
        args.loss_type,
        args.max_completion_length,
        counts["sequences"],
        counts["kept_tokens"],
    )
    # One number a completion becomes one a token: (G,) -> (n,).
    weights = to_device(weights.repeat_interleave(part.lengths), device)
    advantages = to_device(part.advantages.repeat_interleave(part.lengths), device)

    # One update for each rollout, no old log-probs: the policy is the one that sampled, all ratios
    # are 1. They still carry the gradient: that of ratio * A is A times that of the log-prob.
    old = log_probs.detach() if part.old_log_probs is None else torch.cat(part.old_log_probs)
    # Without a reference (beta 0) the KL is that to the old policy: logged, of weight nothing.
    reference = old if part.reference_log_probs is None else torch.cat(part.reference_log_probs)
    epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    policy, clipped = policy_loss(log_probs, old, advantages, args.epsilon, epsilon_high)
    kl = kl_k3(log_probs, reference)

    loss = (weights * (policy + args.beta * kl)).sum()
    sums = torch.stack((loss, kl.sum(), entropies.sum(), clipped.sum()))
    return loss, sums.detach()


def accumulate_gradient(model, groups, counts, args, banned, device):
    """Accumulate the gradient of one optimizer step over this rank's groups.

    A rank with fewer parts than counts["forwards"] repeats its first one as a filler.

    Returns: this rank's SUMS, by name.
    """
    parts = []
    for group in groups:
        parts += split_group(group, args.micro_batch)
    totals = []
    for i in range(counts["forwards"]):
        # All ranks gather the sharded weights together, so all make equally many forwards. A filler
        # goes through forward and backward with weights of zero.
        filler = i >= len(parts)
        part = parts[0] if filler else parts[i]
        kept = torch.zeros_like(part.finished) if filler else kept_completions(part, args)
        loss, sums = loss_terms(model, part, kept, counts, args, banned, device)
        loss.backward()
        if not filler:
            totals.append(sums)
    totals = torch.stack(totals).double().sum(0)
    return dict(zip(SUMS, totals.tolist()))  # the host waits here, not for each part


# ---------------------------------------------------------------------------------- log


def rollout_rows(groups, step, ranks):
    """What rollouts.jsonl keeps of every group of a step, those of all ranks in the rows' order."""
    rows = []
    for group in groups:
        sample = group.sample
        rows.append(
            {
                "step": step,
                "where": sample.where,
                "question_type": sample.question_type,
                "prompt": group.shown[0],
                "answer": sample.answer,
                "images": picture_paths(sample),
                "completions": group.texts,
                "lengths": group.lengths.tolist(),
                "finished": group.finished.tolist(),
                "rewards": group.rewards,
                "reward": group.reward.tolist(),
                "advantages": group.advantages.tolist(),
            }
        )
    # Rank 0's first row, rank 1's first row, ...: the rows were dealt out by turns.
    by_turns = zip_longest(*ranks.gather(rows))
    return [row for turn in by_turns for row in turn if row is not None]


def mean_and_std(values, ranks):
    """Mean and standard deviation of the values of all ranks."""
    count, total, squares = ranks.sum(len(values), sum(values), sum(v * v for v in values))
    mean = total / count
    return mean, math.sqrt(max(0.0, squares / count - mean**2))


def rollout_metrics(groups, ranks):
    """Means over all completions and groups of a step, over all ranks, under TRL's names."""

    def of_all(name):
        """One number for each completion of this rank."""
        return torch.cat([getattr(group, name) for group in groups]).tolist()

    # A group of equal rewards teaches nothing: its advantages are 0. Where this share grows, the
    # prompts are too easy or too hard.
    equal = [not group.advantages.any() for group in groups]
    numbers = {
        "reward": of_all("reward"),
        "reward_std": [group.reward.std().item() for group in groups],
        "frac_reward_zero_std": equal,
        "completions/mean_length": of_all("lengths"),
        "completions/clipped_ratio": [not finished for finished in of_all("finished")],
    }
    metrics = {name: mean_and_std(values, ranks)[0] for name, values in numbers.items()}
    for name in groups[0].rewards:
        rewards = np.concatenate([group.rewards[name] for group in groups]).tolist()
        mean, deviation = mean_and_std(rewards, ranks)
        metrics |= {f"rewards/{name}/mean": mean, f"rewards/{name}/std": deviation}
    return metrics


def held_out_metrics(model, processor, samples, args, ranks):
    """Mean rewards of greedy answers to held-out samples, over all ranks."""
    mine = samples[ranks.rank :: ranks.world]
    # As many completions at once as in a rollout.
    size = args.prompts_per_step // ranks.world * args.num_generations
    totals = dict.fromkeys(args.reward_funcs, 0.0)
    with gathered(model):
        for some in chunks(mine, size):
            groups = sample_completions(
                model,
                processor,
                some,
                G=1,
                uniforms=None,  # greedy: the likeliest token, without noise
                args=args,
                device=ranks.device,
                reserve=args.max_completion_length,
            )
            for group in groups:
                for name in totals:
                    totals[name] += call_reward(name, group.texts, group.sample)[0]
    totals = ranks.sum_named(totals)
    return {f"eval_rewards/{name}/mean": total / len(samples) for name, total in totals.items()}


# ---------------------------------------------------------------------------------- main


def check_settings(args, world):
    """Refuse settings that contradict one another."""
    if args.num_generations < 2:
        raise UserError(
            f"--num-generations is {args.num_generations}, expected at least 2: one completion has "
            "no group"
        )
    unknown = [name for name in args.reward_funcs if name not in REWARDS]
    if unknown:
        known = ", ".join(REWARDS)
        raise UserError(f"--reward-funcs: no reward {unknown[0]!r}, expected of {known}")
    for name in args.reward_funcs:
        if args.reward_funcs.count(name) > 1:
            raise UserError(f"--reward-funcs names {name!r} twice; give it once, with one weight")
    if args.prompt_style == "direct" and "format" in args.reward_funcs:
        raise UserError(
            "--prompt-style direct asks for no tags, and --reward-funcs format pays for them; "
            "leave one out"
        )
    if len(args.reward_weights) != len(args.reward_funcs):
        raise UserError(
            f"--reward-weights has {len(args.reward_weights)} numbers, expected "
            f"{len(args.reward_funcs)}: one for each of {', '.join(args.reward_funcs)}"
        )
    if args.eval_every and not args.eval_data:
        raise UserError(f"--eval-every {args.eval_every} needs --eval-data, the held-out questions")
    if args.prompts_per_step < world:
        raise UserError(
            f"--prompts-per-step is {args.prompts_per_step}, expected at least one for each of the "
            f"{world} processes"
        )


def read_prompts_and_questions(args):
    """The samples to train on and the held-out ones; the rewards can score each of them."""
    samples = read_all(args.data, args.images)
    held_out = read_all(args.eval_data, args.images) if args.eval_every else []
    # Every stride-th row, not the first ones: rows of one room stand together.
    stride = max(1, len(held_out) // args.eval_limit)
    held_out = held_out[::stride][: args.eval_limit]
    for name in args.reward_funcs:
        for sample in samples + held_out:
            check_row(name, sample)
    return samples, held_out


def main():
    args = recipe_settings(__doc__, stage="grpo")
    ranks = Ranks(args.device, args.threads)
    check_settings(args, ranks.world)

    # data
    need_inputs(args, ranks)
    samples, held_out = read_prompts_and_questions(args)
    steps, until = run_length(args, len(samples), args.prompts_per_step)
    run = Run(args, ranks, samples)
    if run.finished:
        return
    processor = Processor(args.model, load_config(args.model), args)
    reserve = args.max_completion_length
    ranks.once(check_lengths, processor, samples + held_out, args.prompt_style, False, reserve)

    # policy and reference: the reference is the model that the policy starts from, and stays so
    model = load_sharded(args, ranks)
    reference_model = None
    if args.beta:
        reference_model = load_sharded(args, ranks).requires_grad_(False)
    banned = processor.banned(ranks.device)
    optimizer = adamw(model, args)
    done = run.restore(model, optimizer)
    G = args.num_generations
    size = f"{args.prompts_per_step} groups of {G}"
    source = ", ".join(args.data)
    ranks.print(f"{len(samples)} prompts, {steps} steps of {size}, until {until}: {source}")

    for step in run.steps(done, steps):
        began = time.perf_counter()
        if (step - 1) % args.num_iterations == 0:
            # sample, reward, advantage: one rollout for every num_iterations updates
            rollout = (step - 1) // args.num_iterations + 1
            rows = rows_of_step(rollout, len(samples), args.prompts_per_step, args.seed)
            # The step's prompts are dealt out to the ranks by turns.
            places = range(ranks.rank, len(rows), ranks.world)
            mine = [samples[rows[place]] for place in places]
            with gathered(model):
                groups = sample_groups(model, processor, mine, places, step, args, ranks.device)
            run.append("rollouts.jsonl", rollout_rows(groups, step, ranks))
            metrics = rollout_metrics(groups, ranks)
            counts = step_counts(groups, args, ranks)
            # With one update for each rollout the old log-probs are those of the update itself.
            if args.num_iterations > 1:
                add_log_probs(groups, "old_log_probs", model, args, banned, ranks.device)
            if args.beta:
                add_log_probs(
                    groups, "reference_log_probs", reference_model, args, banned, ranks.device
                )
        sampled = time.perf_counter()

        # update
        sums = accumulate_gradient(model, groups, counts, args, banned, ranks.device)
        sums = ranks.sum_named(sums)
        where = [samples[row].where for row in sorted(rows)]
        rate, norm = update_weights(model, optimizer, step, steps, args, sums["loss"], where)
        updated = time.perf_counter()

        # held-out questions, log, save
        asked = {}
        if args.eval_every and (step == 1 or step % args.eval_every == 0):
            asked = held_out_metrics(model, processor, held_out, args, ranks)
        entry = {
            "epoch": step * args.prompts_per_step / args.num_iterations / len(samples),
            "loss": sums["loss"],
            "learning_rate": rate,
            "grad_norm": norm,
            "num_tokens": counts["prompt_tokens"] + counts["tokens"],
            **metrics,
            "kl": sums["kl"] / counts["tokens"],
            "entropy": sums["entropy"] / counts["tokens"],
            "clip_ratio": sums["clipped"] / counts["tokens"],
            **asked,
            "rollout_time": sampled - began,
            "update_time": updated - sampled,
        }
        # A state can be saved only between two rollouts: it does not hold their groups.
        boundary = step % args.num_iterations == 0
        if run.end_step(model, optimizer, step, entry, boundary):
            break
    else:  # no break: all steps are done
        run.finish(model, processor)


if __name__ == "__main__":
    main_guard(main)
