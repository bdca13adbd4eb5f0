"""Stage 3: group relative policy optimization (GRPO) with a KL penalty, from prompts to weights in one file.

    python grpo.py                                              # the tiny model after its cold start
    torchrun --nproc-per-node 4 grpo.py --preset paper --model DIR --data FILE.jsonl --out DIR
    python grpo.py --sample-cold-start --model TEACHER --data FILE.jsonl --out FILE.jsonl    # chains for a cold start

One step: sample a group of G completions for each of a few prompts; reward each completion (format + accuracy);
its advantage is how much better it is than its group; raise the log-probs of the better, lower those of the worse,
and stay near the reference model. Vision tower and prompt are computed once per group, in the rollout and in the
update: a group is the one sequence [prompt | c1 | ... | cG] (model.SharedPrompt), P + G * C tokens, not G * (P + C).

Departures from the authors' code (their grpo_trainer.py, line numbers at commit 87320be):
 1. Video reaches policy and reference. Theirs passes only pictures to the log-prob forwards (qwen_module.py:34).
 2. Completions are sampled from the distribution that is trained. Theirs inherits top_k = 50 (384-389).
 3. Log-probs, ratios and sums are fp32 and the KL exponent is clamped. Theirs are bf16, unclamped (508-515, 842).
 4. Everything after the first end token of either kind is masked. Theirs knows one of the two (677-681).
 5. Losses are summed and divided once over all ranks, so ranks and micro-batches do not change the gradient.

Letters in shapes: P prompt tokens, C completion tokens, G completions in a group, n scored tokens of a batch.
"""

import dataclasses
import math
import sys
from itertools import zip_longest

import numpy as np
import torch

from data import Processor, collate, prompt_text, read_all, style_of
from files import UserError
from look.plan import dry_run, step_flops
from model import Batch, generate
from rewards import REWARDS
from runtime import (
    Ranks,
    Run,
    adamw,
    clip_gradients,
    gathered,
    load_sharded,
    main_guard,
    need_inputs,
    recipe_settings,
    rows_of_step,
    scheduled_rate,
)

LOG_RATIO_LIMIT = 20.0  # exp(20) = 5e8: beyond it k3 only overflows
PATIENCE = 10  # steps that one of these may stay above half before a line says so
WATCHED = {
    "frac_reward_zero_std": "of the groups had equal rewards and taught nothing: raise --num-generations or "
    "--temperature, or give --data that is not always, nor never, answered right",
    "completions/clipped_ratio": "of the completions were cut off: raise --max-completion-length",
}


# ---------------------------------------------------------------------------------------------- the formulas


def group_advantages(rewards, scale="group", eps=1e-4):
    """How much better each completion is than its group: (r - mean) / (std + eps), the std unbiased.

    Args:    rewards (G,), G >= 2. scale: "none" leaves out the division (Dr. GRPO, Liu et al. 2025).
    Returns: (G,); equal rewards give zeros.
    Source:  DeepSeekMath (Shao et al. 2024), outcome supervision; unbiased std and eps as the authors' code (756-763).

    >>> [round(advantage, 5) for advantage in group_advantages(torch.tensor([2.0, 0.0, 0.0, 0.0])).tolist()]
    [1.49985, -0.49995, -0.49995, -0.49995]
    """
    centred = rewards - rewards.mean()
    return centred if scale == "none" else centred / (rewards.std() + eps)


def kl_k3(log_probs, reference):
    """Unbiased, non-negative estimate of KL(policy || reference) per token: exp(d) - d - 1 with d = ref - policy.

    Source: Schulman, "Approximating KL divergence" (k3); DeepSeekMath equation 4.

    >>> kl_k3(torch.tensor([0.0]), torch.tensor([0.0])).item()
    0.0
    """
    d = (reference - log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return d.expm1() - d  # exp(d) - 1 without cancellation: most d are near 0


def policy_loss(log_probs, old, advantages, epsilon, epsilon_high):
    """Clipped surrogate per token, to be minimized: -min(ratio * A, clip(ratio, 1 - eps, 1 + eps_high) * A).

    Source:  PPO (Schulman et al. 2017) equation 7; DAPO (Yu et al. 2025) for the separate upper bound.
    Returns: loss (n,), clipped (n,) bool: tokens whose gradient the clip has cut off.

    >>> loss, clipped = policy_loss(torch.tensor([0.5]), torch.tensor([0.0]), torch.tensor([1.0]), 0.2, 0.2)
    >>> round(loss.item(), 4), clipped.item()
    (-1.2, True)
    """
    ratio = (log_probs - old).exp()
    plain, bounded = ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantages
    return -torch.minimum(plain, bounded), bounded < plain


def token_weights(lengths, kept, loss_type, max_length, sequences, tokens):
    """What every token of a completion counts for in the loss, so that the loss is one weighted sum.

    grpo     mean over a completion's tokens, then over completions     1 / (length * sequences)   [DeepSeekMath]
    dr_grpo  sum over tokens, divided by a constant                     1 / (max_length * sequences)   [Liu et al.]
    dapo     mean over all tokens of the step                           1 / tokens   [Yu et al.]

    Args:    lengths (G,), kept (G,) bool: False for a truncated completion that is left out of the loss.
             sequences, tokens: of the whole step, all ranks; tokens of kept completions.
    Returns: (G,)

    >>> token_weights(torch.tensor([2, 4]), torch.tensor([True, True]), "grpo", 8, 2, 6).tolist()
    [0.25, 0.125]
    """
    divisor = {
        "grpo": lengths * sequences,
        "dr_grpo": torch.full_like(lengths, max_length * sequences),
        "dapo": torch.full_like(lengths, tokens),
    }[loss_type]
    return kept / divisor.clamp(min=1)


# ---------------------------------------------------------------------------------------------- groups


@dataclasses.dataclass
class Group:
    """One prompt, its sampled completions and what became of them."""

    sample: object  # data.Sample
    prompt: Batch  # of one row
    ids: torch.Tensor  # (G, C) int64
    lengths: torch.Tensor  # (G,) int64
    finished: torch.Tensor  # (G,) bool: ended by itself
    texts: list
    rewards: dict | None = None  # name -> (G,) float32
    reward: torch.Tensor | None = None  # (G,) weighted sum
    advantages: torch.Tensor | None = None  # (G,)
    old: torch.Tensor | None = None  # (n,) log-probs at the time of sampling
    reference: torch.Tensor | None = None  # (n,)


def noise(seed, step, row, group, length):
    """(G, length) uniforms that depend on nothing but their place: any number of processes samples the same."""
    return torch.from_numpy(
        np.stack(
            [
                np.random.default_rng((seed, step, row, g)).random(length, dtype=np.float32)
                for g in range(group)
            ]
        )
    )


def complete(model, processor, samples, rows, G, uniforms, args, device):
    """G completions for each of the rows (numbers into samples), all in one batch; greedy where uniforms is None.

    Returns: Groups without rewards; the boxes of a localization sample are in pixels as the model sees them.
    """
    examples = [
        processor.example(samples[row], style_of(samples[row], args.prompt_style), answer=False)
        for row in rows
    ]
    room = processor.config.text.max_position_embeddings - max(len(e.ids) for e in examples)
    if room < args.max_completion_length:
        raise UserError(
            f"--max-completion-length {args.max_completion_length} does not fit: the longest prompt leaves "
            f"{room} tokens of the model's context"
        )
    rollout = generate(
        model,
        collate(examples, processor.config).to(device),
        args.max_completion_length,
        processor.stop_ids,
        G,
        uniforms,
        processor.banned(device),
        args.temperature,
    )
    groups = []
    for i, (row, example) in enumerate(zip(rows, examples)):
        part = slice(i * G, (i + 1) * G)
        lengths = rollout.lengths[part]
        ids = rollout.ids[part, : int(lengths.max())]
        sample = (
            dataclasses.replace(samples[row], answer=example.boxes)
            if example.boxes
            else samples[row]
        )
        groups.append(
            Group(
                sample,
                collate([example], processor.config).to(device),
                ids,
                lengths,
                rollout.finished[part],
                [processor.decode(ids[g, : lengths[g]].tolist()) for g in range(G)],
            )
        )
    return groups


def sample_groups(model, processor, samples, rows, step, args, device):
    """Sample and reward G completions for each of the rows (numbers into samples)."""
    G, C = args.num_generations, args.max_completion_length
    uniforms = torch.cat([noise(args.seed, step, row, G, C) for row in rows]).to(device)
    groups = complete(model, processor, samples, rows, G, uniforms, args, device)
    for group in groups:
        group.rewards = {
            name: torch.tensor(REWARDS[name](group.texts, group.sample))
            for name in args.reward_funcs
        }
        group.reward = sum(
            weight * value for weight, value in zip(args.reward_weights, group.rewards.values())
        )
        if not torch.isfinite(group.reward).all():
            raise UserError(
                f"{group.sample.where}: rewards are not finite: {group.reward.tolist()}"
            )
        group.advantages = group_advantages(group.reward, args.scale_rewards)
    return groups


def group_batch(prompt, ids, lengths):
    """The group as one sequence [prompt | c1 | ... | cG], its completions' tokens as targets, row after row.

    A completion's first token is predicted at the prompt's last place; all completions start at the same position.

    Args:    prompt: Batch of one row. ids (G, C), lengths (G,).
    Returns: Batch whose targets are the n = sum(lengths) tokens, completion by completion.
    """
    (G, C), P, device = ids.shape, prompt.ids.shape[1], ids.device
    following = prompt.positions.max() + 1 + torch.arange(C, device=device)
    inside = torch.arange(C, device=device) < lengths[:, None]  # (G, C)
    before = P + torch.arange(G * C, device=device).view(G, C) - 1
    before[:, 0] = P - 1
    return dataclasses.replace(
        prompt,
        ids=torch.cat((prompt.ids[0], ids.flatten()))[None],
        group=(G, C),
        positions=torch.cat((prompt.positions, following.repeat(G).expand(3, 1, -1)), dim=2),
        lengths=prompt.lengths + G * C,
        predict_at=before[inside],
        targets=ids[inside],
    )


def parts(group, size):
    """Slices of at most `size` completions: what one forward takes."""
    return [slice(i, i + size) for i in range(0, len(group.ids), size)]


def group_log_probs(model, groups, size, banned, temperature):
    """Log-probs of each group's completion tokens, (n,) per group, without gradient."""
    with torch.no_grad(), gathered(model):
        return [
            torch.cat(
                [
                    model(group_batch(g.prompt, g.ids[p], g.lengths[p]), None, banned, temperature)[
                        0
                    ]
                    for p in parts(g, size)
                ]
            )
            for g in groups
        ]


# ---------------------------------------------------------------------------------------------- the update


def update_step(model, groups, forwards, args, banned, sequences, tokens, lap=lambda part: None):
    """Accumulate the gradient of one optimizer step over this rank's groups.

    Args:    forwards: how many forwards every rank makes; a rank with fewer repeats one with weight zero.
             sequences, tokens: of the whole step, all ranks.
             lap: is told when a `forward` and when a `backward` has ended.
    Returns: this rank's sums: policy loss, KL loss, KL, entropy, clipped tokens, tokens.
    """
    work = [(group, part) for group in groups for part in parts(group, args.micro_batch)]
    sums = torch.zeros(6, dtype=torch.float64)
    for i in range(forwards):
        group, part = work[i] if i < len(work) else work[0]
        lengths, kept = (
            group.lengths[part],
            group.finished[part] | (not args.mask_truncated_completions),
        )
        kept = kept & (i < len(work))
        log_probs, entropies = model(
            group_batch(group.prompt, group.ids[part], lengths), None, banned, args.temperature
        )
        first = int(group.lengths[: part.start].sum())
        mine = slice(first, first + len(log_probs))
        old = log_probs.detach() if group.old is None else group.old[mine]
        weights, advantages = (
            x.to(log_probs.device).repeat_interleave(lengths)
            for x in (  # (completions,) -> (n,)
                token_weights(
                    lengths, kept, args.loss_type, args.max_completion_length, sequences, tokens
                ),
                group.advantages[part],
            )
        )
        policy, clipped = policy_loss(
            log_probs,
            old,
            advantages,
            args.epsilon,
            args.epsilon if args.epsilon_high is None else args.epsilon_high,
        )
        kl = kl_k3(log_probs, old if group.reference is None else group.reference[mine])
        loss = (weights * (policy + args.beta * kl)).sum()
        if i < len(work):
            sums += (
                torch.stack(
                    (
                        (weights * policy).sum(),
                        args.beta * (weights * kl).sum(),
                        kl.sum(),
                        entropies.sum(),
                        clipped.sum(),
                        torch.tensor(len(log_probs)),
                    )
                )
                .detach()
                .double()
                .cpu()
            )
        lap("forward")
        loss.backward()
        lap("backward")
    return sums.tolist()


def rollout_metrics(groups, ranks):
    """Means over all completions and groups of a step, over all ranks, under the names of design and TRL."""

    def moments(values):
        n, total, squares = ranks.sum(len(values), sum(values), sum(v * v for v in values))
        return total / n, math.sqrt(max(0.0, squares / n - (total / n) ** 2))

    row = {"reward": moments([r for g in groups for r in g.reward.tolist()])[0]}
    for name in groups[0].rewards:
        row[f"rewards/{name}/mean"], row[f"rewards/{name}/std"] = moments(
            [r for g in groups for r in g.rewards[name].tolist()]
        )
    row["reward_std"] = moments([g.reward.std().item() for g in groups])[0]
    row["frac_reward_zero_std"] = moments([float(g.reward.std() == 0) for g in groups])[0]
    row["completions/mean_length"] = moments([n for g in groups for n in g.lengths.tolist()])[0]
    row["completions/clipped_ratio"] = moments(
        [float(not f) for g in groups for f in g.finished.tolist()]
    )[0]
    return row


def watch(row, counts):
    """Yield a line once a share of WATCHED has stayed above half for PATIENCE steps; counts (a dict) holds how long."""
    for key, text in WATCHED.items():
        counts[key] = counts.get(key, 0) + 1 if row[key] > 0.5 else 0
        if counts[key] == PATIENCE:
            yield f"warning: for {PATIENCE} steps more than half {text}"


def held_out_metrics(model, processor, samples, args, ranks):
    """Mean rewards of greedy answers to held-out samples: what training reward must not run away from."""
    mine = range(ranks.rank, len(samples), ranks.world)
    size = (
        max(1, args.prompts_per_step // ranks.world) * args.num_generations
    )  # as many rows as a rollout has
    totals = dict.fromkeys(args.reward_funcs, 0.0)
    with gathered(model):
        for first in range(0, len(mine), size):
            for group in complete(
                model, processor, samples, mine[first : first + size], 1, None, args, ranks.device
            ):
                for name in totals:
                    totals[name] += REWARDS[name](group.texts, group.sample)[0]
    return {
        f"eval_rewards/{name}/mean": total / len(samples)
        for name, total in zip(totals, ranks.sum(*totals.values()))
    }


def rollout_rows(groups, step, style):
    """What rollouts.jsonl keeps of every group."""
    return [
        {
            "step": step,
            "where": g.sample.where,
            "question_type": g.sample.question_type,
            "prompt": prompt_text(g.sample, style_of(g.sample, style)),
            "answer": g.sample.answer,
            "images": [path for media in g.sample.media for path in media.sources],
            "completions": g.texts,
            "rewards": {name: r.tolist() for name, r in g.rewards.items()},
            "advantages": g.advantages.tolist(),
        }
        for g in groups
    ]


def check_settings(args):
    """Refuse what no run can mean."""
    if args.num_generations < 2:
        raise UserError(
            f"--num-generations is {args.num_generations}, expected at least 2: one completion has no group"
        )
    if args.loss_type == "bnpo":
        raise UserError(
            "--loss-type bnpo divides by the tokens of a micro-batch; here one count of the whole step divides, "
            "whatever the micro-batch: that is --loss-type dapo"
        )
    unknown = [name for name in args.reward_funcs if name not in REWARDS]
    if unknown:
        raise UserError(
            f"--reward-funcs: no reward {unknown[0]!r}, expected of {', '.join(REWARDS)}"
        )
    if args.prompt_style == "direct" and "format" in args.reward_funcs:
        raise UserError(
            "--prompt-style direct asks for no tags, and --reward-funcs format pays for them; leave one out"
        )
    if len(args.reward_weights) != len(args.reward_funcs):
        raise UserError(
            f"--reward-weights has {len(args.reward_weights)} numbers, expected {len(args.reward_funcs)}: "
            f"one for each of {', '.join(args.reward_funcs)}"
        )
    if args.eval_every and not args.eval_data:
        raise UserError(f"--eval-every {args.eval_every} needs --eval-data, the held-out questions")


def main():
    args = recipe_settings(__doc__, stage="grpo")
    check_settings(args)
    ranks = Ranks(args.device)
    if args.prompts_per_step < ranks.world:
        raise UserError(
            f"--prompts-per-step is {args.prompts_per_step}, expected at least one for each of the "
            f"{ranks.world} processes"
        )

    # data
    need_inputs(args, ranks)
    tell = ranks.print if args.drop_invalid else None
    samples = read_all(args.data, args.images, tell, args.data_types)
    for name in args.reward_funcs:
        for sample in samples:
            REWARDS[name]([], sample)  # raises for a row that cannot be scored
    held_out = read_all(args.eval_data, args.images, tell) if args.eval_every else []
    held_out = held_out[:: max(1, len(held_out) // args.eval_limit)][: args.eval_limit]
    steps = math.ceil(args.epochs * len(samples) / args.prompts_per_step) * args.num_iterations
    steps = min(steps, args.max_steps or steps)
    if args.dry_run:
        return dry_run(args, samples, steps)

    # policy and reference
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
    reference = (
        load_sharded(args.model, ranks, args.dtype).requires_grad_(False) if args.beta else None
    )
    processor = Processor(args.model, model.config, args)
    banned = processor.banned(ranks.device)
    optimizer = adamw(model, args)
    first = run.restore(model, optimizer)
    ranks.print(
        f"{len(samples)} prompts, {steps} steps of {args.prompts_per_step} groups of {args.num_generations}"
    )

    counts = {}
    model.train()
    for step in run.steps(first, steps):
        # sample, reward, advantage
        iteration = (step - 1) % args.num_iterations
        if iteration == 0:
            rows = rows_of_step(
                (step - 1) // args.num_iterations + 1,
                len(samples),
                args.prompts_per_step,
                args.seed,
            )
            with gathered(model):
                groups = sample_groups(
                    model,
                    processor,
                    samples,
                    rows[ranks.rank :: ranks.world],
                    step,
                    args,
                    ranks.device,
                )
            metrics = rollout_metrics(groups, ranks)
            per_rank = ranks.gather(rollout_rows(groups, step, args.prompt_style))
            run.append(
                "rollouts.jsonl",
                [row for some in zip_longest(*per_rank) for row in some if row is not None],
            )
            run.lap("rollout")
            # log-probs of policy and reference before the first update
            forwards = max(ranks.gather(sum(len(parts(g, args.micro_batch)) for g in groups)))
            if args.num_iterations > 1:
                for group, old in zip(
                    groups,
                    group_log_probs(model, groups, args.micro_batch, banned, args.temperature),
                ):
                    group.old = old
            if reference is not None:
                for group, log_probs in zip(
                    groups,
                    group_log_probs(reference, groups, args.micro_batch, banned, args.temperature),
                ):
                    group.reference = log_probs
            kept = [
                g.lengths * (g.finished | (not args.mask_truncated_completions)) for g in groups
            ]
            sequences, kept_tokens, scored, all_tokens, patches = ranks.sum(
                sum(len(g.ids) for g in groups),
                sum(int(k.sum()) for k in kept),
                sum(int(g.lengths.sum()) for g in groups),
                sum(int(g.prompt.lengths) + int(g.lengths.sum()) for g in groups),
                sum(len(g.prompt.patches) for g in groups),
            )
        # update
        for group in optimizer.param_groups:
            group["lr"] = scheduled_rate(step, steps, args)
        policy, kl_loss, kl, entropy, clipped, tokens = ranks.sum(
            *update_step(
                model, groups, forwards, args, banned, int(sequences), int(kept_tokens), run.lap
            )
        )
        norm = clip_gradients(model, args.max_grad_norm)
        if not (math.isfinite(policy + kl_loss) and math.isfinite(norm)):
            raise UserError(
                f"loss {policy + kl_loss}, gradient norm {norm}; not applied. Rows of this step: "
                + ", ".join(samples[row].where for row in sorted(rows))
            )
        optimizer.step()
        optimizer.zero_grad()
        run.lap("optimizer")
        # held-out questions, log, save
        due = args.eval_every and (step == 1 or step % args.eval_every == 0)
        held_out_row = held_out_metrics(model, processor, held_out, args, ranks) if due else {}
        run.lap("eval")
        for line in watch(metrics, counts):
            ranks.print(line)
        if run.end_step(
            model,
            optimizer,
            step,
            steps,
            {
                "epoch": step * args.prompts_per_step / args.num_iterations / len(samples),
                "loss": policy + kl_loss,
                "loss/policy": policy,
                "loss/kl": kl_loss,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "grad_norm": norm,
                "num_tokens": all_tokens,
                **metrics,
                "kl": kl / tokens,
                "entropy": entropy / tokens,
                "clip_ratio": clipped / tokens,
                **held_out_row,
                "update_time": sum(
                    run.spent[part] for part in ("forward", "backward", "optimizer")
                ),
                "model_flops": step_flops(
                    model,
                    all_tokens,
                    scored,
                    patches,
                    forwards=1
                    + (iteration == 0) * (1 + (args.num_iterations > 1) + (reference is not None)),
                ),
            },
            boundary=step % args.num_iterations == 0,
        ):
            break
    else:
        run.finish(model, processor)
    ranks.close()


if __name__ == "__main__":
    if {"--sample-cold-start", "--sample_cold_start"} & set(sys.argv):
        from coldstart import main  # beside the reading path
    main_guard(main)
