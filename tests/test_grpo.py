"""grpo.py against its formulas the plain way: each completion beside its own copy of the prompt.

The plain way uses nothing of grpo.py: positions from mrope_positions on the whole row, ordinary
causal rows, one loss term for each completion. TRL's formulas are those of
trl/trainer/grpo_trainer.py (`_compute_loss`, 0.2x), for padded rows.
"""

import base64
import dataclasses
import doctest
import io
import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import keep_log_probs, varied_reward
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import data
import grpo
import rewards
from checkpoint import load_config, load_model
from data import IGNORE, Example, Processor, collate, mrope_positions, read_all
from files import UserError
from grpo import (
    Group,
    accumulate_gradient,
    add_log_probs,
    group_advantages,
    group_batch,
    kl_k3,
    noise,
    policy_loss,
    sample_groups,
    split_group,
)
from model import generate
from pictures import Media
from rooms.render import mjpeg_avi
from runtime import recipe_settings

KINDS = ("single_image", "multi_view", "video", "video file")
LENGTHS = ((5, 9, 1, 7), (3, 2, 6, 6))  # of two groups' completions
FINISHED = ((True, False, True, True), (True, True, False, True))


@pytest.fixture(scope="module")
def world(rooms, tiny_model, tmp_path_factory):
    """Model, a perturbed reference, one from before an update, processor, banned words and a row of
    each kind.
    """

    def perturbed(size, seed):
        model, generator = (
            load_model(tiny_model, torch.float32),
            torch.Generator().manual_seed(seed),
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(
                    size
                    * parameter.abs().mean()
                    * torch.randn(parameter.shape, generator=generator)
                )
        return model

    model = load_model(tiny_model, torch.float32)
    samples = read_all([rooms / "train" / "spld_spatial_data.jsonl"], None)
    rows = {
        kind: next(
            row
            for row, s in enumerate(samples)
            if s.data_type == kind and (kind == "video") == isinstance(s.media[0].source, tuple)
        )
        for kind in KINDS[:3]
    }
    film = samples[rows["video"]]
    path = tmp_path_factory.mktemp("film") / "video.avi"
    path.write_bytes(
        mjpeg_avi([Path(frame).read_bytes() for frame in film.media[0].source], 112, 2)
    )
    rows["video file"] = len(samples)
    samples.append(dataclasses.replace(film, media=(Media("video", str(path)),)))
    processor = Processor(tiny_model, model.config)
    return SimpleNamespace(
        model=model,
        reference=perturbed(0.2, 1),
        before=perturbed(0.1, 2),
        processor=processor,
        banned=processor.banned("cpu"),
        samples=samples,
        rows=rows,
    )


def settings(*flags, **changes):
    """A GRPO run's settings."""
    args = recipe_settings("", "grpo", list(map(str, flags)))
    return SimpleNamespace(**vars(args) | {"micro_batch": 4, "max_completion_length": 12} | changes)


def make_groups(world, kind, args):
    """Two groups of four random completions of unequal lengths, some of them truncated, for rows of
    one kind.
    """
    generator, groups = torch.Generator().manual_seed(0), []
    words = (~world.banned).nonzero()[:, 0]
    for lengths, finished in zip(map(torch.tensor, LENGTHS), map(torch.tensor, FINISHED)):
        example = world.processor.example(
            world.samples[world.rows[kind]], "thinking", with_answer=False
        )
        C = int(lengths.max())
        ids = words[torch.randint(len(words), (4, C), generator=generator)] * (
            torch.arange(C) < lengths[:, None]
        )
        reward = torch.rand(4, generator=generator)
        groups.append(
            Group(
                world.samples[world.rows[kind]],
                collate([example], world.processor.config),
                ids,
                lengths,
                finished,
                [],
                reward=reward,
                advantages=group_advantages(reward, args.scale_rewards),
            )
        )
    return groups


def plain_log_probs(model, world, group, args):
    """[(length,)] of every completion, each computed in a row of its own."""
    config, sample = world.processor.config, group.sample
    prompt = world.processor.example(sample, "thinking", with_answer=False)
    seconds = [1.0 if media.kind == "video" else None for media in sample.media]
    rows = []
    for ids, length in zip(group.ids, group.lengths):
        whole = torch.cat((prompt.ids, ids[:length]))
        labels = torch.cat((torch.full_like(prompt.ids, IGNORE), ids[:length]))
        positions = mrope_positions(whole, prompt.grids, seconds, config)
        rows.append(Example(whole, labels, positions, prompt.patches, prompt.grids))
    return model(collate(rows, config), None, world.banned, args.temperature)[0].split(
        group.lengths.tolist()
    )


def plain_loss(groups, now, old, reference, args):
    """The loss as the papers write it, one completion after another. now, old, reference:
    [[(length,)]].
    """
    high, terms, tokens = args.epsilon if args.epsilon_high is None else args.epsilon_high, [], 0
    for g, group in enumerate(groups):
        centred = group.reward - group.reward.mean()
        advantages = (
            centred / (group.reward.std() + 1e-4) if args.scale_rewards == "group" else centred
        )
        for i, advantage in enumerate(advantages):
            ratio, d = (now[g][i] - old[g][i]).exp(), reference[g][i] - now[g][i]
            token = -torch.min(
                ratio * advantage, ratio.clamp(1 - args.epsilon, 1 + high) * advantage
            ) + args.beta * (d.exp() - d - 1)
            kept = bool(group.finished[i]) or not args.mask_truncated_completions
            terms.append(kept * (token.mean() if args.loss_type == "grpo" else token.sum()))
            tokens += kept * len(token)
    divisors = {
        "grpo": len(terms),
        "dr_grpo": len(terms) * args.max_completion_length,
        "dapo": tokens,
    }
    return sum(terms) / divisors[args.loss_type]


def gradients(model):
    taken = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return taken


def counts_of(groups, args, fillers=0):
    """What step_counts gives for one rank."""
    kept_tokens = 0
    for group in groups:
        for length, finished in zip(group.lengths, group.finished):
            if finished or not args.mask_truncated_completions:
                kept_tokens += int(length)
    return {
        "sequences": sum(len(group.ids) for group in groups),
        "kept_tokens": kept_tokens,
        "forwards": sum(len(split_group(group, args.micro_batch)) for group in groups) + fillers,
    }


def shared_update(world, groups, args, fillers=0):
    """Loss and gradients of grpo.accumulate_gradient."""
    counts = counts_of(groups, args, fillers)
    sums = accumulate_gradient(world.model, groups, counts, args, world.banned, "cpu")
    return sums["loss"], gradients(world.model)


def log_probs_of(model, world, groups, size=4, temperature=1.0):
    """Each group's log-probs; the groups themselves stay as they are."""
    args = SimpleNamespace(micro_batch=size, temperature=temperature)
    copies = [dataclasses.replace(group) for group in groups]
    add_log_probs(copies, "old_log_probs", model, args, world.banned, "cpu")
    return [group.old_log_probs for group in copies]


def assert_same(mine, theirs, loss_tolerance=1e-6, tolerance=1e-5):
    """Losses and, relative to each tensor's largest entry, gradients."""
    assert abs(mine[0] - theirs[0]) <= loss_tolerance
    assert mine[1].keys() == theirs[1].keys()
    for name, expected in theirs[1].items():
        assert (mine[1][name] - expected).abs().max() <= tolerance * expected.abs().max(), name


# -------------------------------------------------------------------------- the formulas


def test_doctests():
    """The worked examples in grpo.py's docstrings hold."""
    results = doctest.testmod(grpo)
    assert results.attempted >= 4 and results.failed == 0


@given(st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=9))
def test_advantages_are_numpys_standard_scores(values):
    """The unbiased std and 1e-4 of the authors' code; `none` only centres."""
    r = np.array(values)
    mine = group_advantages(torch.tensor(values))
    np.testing.assert_allclose(mine, (r - r.mean()) / (r.std(ddof=1) + 1e-4), rtol=1e-3, atol=2e-2)
    np.testing.assert_allclose(
        group_advantages(torch.tensor(values), "none"), r - r.mean(), atol=1e-6
    )
    assert abs(mine.sum()) < 1e-2


@pytest.mark.parametrize("scale", ("group", "none"))
def test_equal_rewards_are_exactly_equal(scale):
    """The mean of 8 x 1.9 is not 1.9 in float32: what is left must not become an advantage."""
    assert torch.full((8,), 1.9).mean() != torch.tensor(1.9)
    for G in (2, 3, 4, 8, 16, 64):
        for reward in (0.0, 0.1, 0.7, 1.3, 1.9, -1.9, 1e-6, 1e6 / 3):
            advantages = group_advantages(torch.full((G,), reward), scale)
            assert advantages.tolist() == [0.0] * G
    least = torch.tensor([1.9] * 7 + [1.9000001])  # the next number is another reward
    assert group_advantages(least, scale)[7] > 0


def test_k3_estimates_the_kl_without_bias():
    """Its expectation under the policy is KL(policy || reference); the direction and the sign are
    easily swapped.
    """
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 50, generator=generator, dtype=torch.float64).log_softmax(-1)
    expected = (policy.exp() * (policy - reference)).sum()
    assert torch.allclose((policy.exp() * kl_k3(policy, reference)).sum(), expected)


@given(st.floats(-1e6, 1e6) | st.floats(-1e-2, 1e-2), st.floats(-1e6, 1e6) | st.floats(-1e-2, 1e-2))
def test_k3_never_overflows(policy, reference):
    """One token that the policy has all but forgotten must not turn loss or gradient into inf or
    nan; and near zero, where a policy starts, rounding must not make it negative.
    """
    log_prob = torch.tensor(policy, requires_grad=True)
    kl = kl_k3(log_prob, torch.tensor(reference))
    kl.backward()
    assert kl >= -1e-9 and torch.isfinite(kl) and torch.isfinite(log_prob.grad)


def test_clipped_tokens_have_no_gradient():
    """`clipped` says exactly which tokens the clip has cut off; a separate upper bound moves only
    the upper one.
    """
    log_probs = torch.tensor([1.1, 1.25, 1.35, 0.9, 0.75]).log().repeat(2).requires_grad_()
    advantages = torch.tensor([1.0] * 5 + [-1.0] * 5)
    for high, expected in (
        (0.2, [0, 1, 1, 0, 0, 0, 0, 0, 0, 1]),
        (0.3, [0, 0, 1, 0, 0, 0, 0, 0, 0, 1]),
    ):
        loss, clipped = policy_loss(log_probs, torch.zeros(10), advantages, 0.2, high)
        (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
        assert clipped.int().tolist() == expected == (gradient == 0).int().tolist()


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("loss_type", ("grpo", "dr_grpo", "dapo"))
def test_loss_is_trls(loss_type, masked):
    """Loss and gradient for given log-probs equal TRL's expressions on padded (rows, tokens)
    tensors.

    dapo: TRL divides by num_items_in_batch. We take it as the tokens in the loss, as its other
    trainers do; its GRPOTrainer counts those of masked completions as well.
    """
    args = settings(
        loss_type=loss_type, mask_truncated_completions=masked, epsilon_high=0.28, beta=0.04
    )
    generator = torch.Generator().manual_seed(3)
    lengths, finished = (
        torch.tensor([5, 9, 1, 7, 4, 9]),
        torch.tensor([True, False, True, True, True, False]),
    )
    now, old, reference = (-2 + 0.3 * torch.randn(6, 9, generator=generator) for _ in range(3))
    inside, rewards_ = torch.arange(9) < lengths[:, None], torch.rand(6, generator=generator)

    # TRL: advantages, per_token_loss, completion_mask, then the reduction of each loss type
    grouped = rewards_.view(-1, 6)
    advantages = (rewards_ - grouped.mean(1)) / (grouped.std(1) + 1e-4)
    per_token_logps = now.clone().requires_grad_()
    coef_1 = torch.exp(per_token_logps - old)
    coef_2 = torch.clamp(coef_1, 1 - 0.2, 1 + 0.28)
    per_token_loss = -torch.min(coef_1 * advantages[:, None], coef_2 * advantages[:, None])
    per_token_kl = torch.exp(reference - per_token_logps) - (reference - per_token_logps) - 1
    per_token_loss = per_token_loss + 0.04 * per_token_kl
    mask = inside * (finished[:, None] if masked else 1)
    expected = {
        "grpo": ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean(),
        "dr_grpo": (per_token_loss * mask).sum()
        / (per_token_loss.size(0) * args.max_completion_length),
        "dapo": (per_token_loss * mask).sum() / mask.sum(),
    }[loss_type]
    expected.backward()

    mine = now[inside].requires_grad_()
    ids, config = torch.zeros(6, 9).long(), SimpleNamespace(image_token_id=1, video_token_id=1)
    prompt = Example(ids[0], torch.full((9,), IGNORE), ids[:3], torch.zeros(0, 1176), [])
    group = Group(
        None,
        collate([prompt], config),
        ids,
        lengths,
        finished,
        [],
        reward=rewards_,
        advantages=group_advantages(rewards_),
        old_log_probs=old[inside].split(lengths.tolist()),
        reference_log_probs=reference[inside].split(lengths.tolist()),
    )
    args.micro_batch = 6

    def model(*_, **__):
        return mine, torch.zeros(len(mine))

    sums = accumulate_gradient(model, [group], counts_of([group], args), args, None, "cpu")
    assert counts_of([group], args)["kept_tokens"] == int(mask.sum())
    assert abs(sums["loss"] - expected.item()) <= 1e-6
    assert torch.allclose(mine.grad, per_token_logps.grad[inside], atol=1e-7)


# -------------------------------------------------------------------------- the shared prompt


@pytest.mark.parametrize("iterations", (1, 2))
@pytest.mark.parametrize("loss_type", ("grpo", "dr_grpo", "dapo"))
@pytest.mark.parametrize("kind", KINDS)
def test_update_equals_the_naive_way(world, kind, loss_type, iterations):
    """One sequence that shares its prompt trains as a row per completion does: pictures, views,
    video, all losses.

    In the second iteration the policy has moved on from the sampler (old log-probs of other
    weights, some ratios clipped); the reference differs always.
    """
    args = settings(loss_type=loss_type, beta=0.04, temperature=0.9, num_iterations=iterations)
    groups = make_groups(world, kind, args)
    for group, log_probs in zip(
        groups, log_probs_of(world.reference, world, groups, 4, args.temperature)
    ):
        group.reference_log_probs = log_probs
    now = [plain_log_probs(world.model, world, group, args) for group in groups]
    with torch.no_grad():
        reference = [plain_log_probs(world.reference, world, group, args) for group in groups]
    old = [[x.detach() for x in group] for group in now]
    if iterations == 2:
        for group, log_probs in zip(
            groups, log_probs_of(world.before, world, groups, 4, args.temperature)
        ):
            group.old_log_probs = log_probs
        with torch.no_grad():
            old = [plain_log_probs(world.before, world, group, args) for group in groups]
    loss = plain_loss(groups, now, old, reference, args)
    loss.backward()
    plain = loss.item(), gradients(world.model)
    assert_same(shared_update(world, groups, args), plain)


@pytest.mark.parametrize(
    "changes",
    (
        {"mask_truncated_completions": True},
        {"mask_truncated_completions": True, "loss_type": "dapo"},
        {"epsilon_high": 0.5, "epsilon": 0.05},
        {"scale_rewards": "none"},
        {"beta": 0.0},
    ),
    ids=str,
)
def test_options_reach_the_loss(world, changes):
    """Each option changes the update as its formula says, and does change it."""

    def update(**changes):
        args = settings(**{"beta": 0.04} | changes)
        groups = make_groups(world, "multi_view", args)
        for model, name in (
            (world.before, "old_log_probs"),
            (world.reference, "reference_log_probs"),
        ):
            for group, log_probs in zip(
                groups, log_probs_of(model, world, groups, 4, args.temperature)
            ):
                setattr(group, name, log_probs)
        return groups, args, shared_update(world, groups, args)

    groups, args, mine = update(**changes)
    now = [plain_log_probs(world.model, world, group, args) for group in groups]
    old = [group.old_log_probs for group in groups]
    reference = [group.reference_log_probs for group in groups]
    loss = plain_loss(groups, now, old, reference, args)
    loss.backward()
    assert_same(mine, (loss.item(), gradients(world.model)))
    usual = update()[2]
    assert any(
        (mine[1][name] - usual[1][name]).abs().max() > 0.01 * usual[1][name].abs().max()
        for name in usual[1]
    )


@pytest.mark.parametrize("loss_type", ("grpo", "dr_grpo", "dapo"))
def test_micro_batches_and_fillers_change_nothing(world, loss_type):
    """1, 2 or 3 completions at once, and a forward repeated to keep step with other ranks, give the
    same gradient.
    """
    args = settings(loss_type=loss_type, beta=0.04)
    groups = make_groups(world, "video", args)
    for model, name in ((world.before, "old_log_probs"), (world.reference, "reference_log_probs")):
        for group, log_probs in zip(
            groups, log_probs_of(model, world, groups, 3, args.temperature)
        ):
            setattr(group, name, log_probs)
    whole = shared_update(world, groups, args)
    for size, fillers in ((1, 0), (2, 0), (3, 0), (4, 2)):
        args.micro_batch = size
        assert_same(shared_update(world, groups, args, fillers), whole)


def test_a_group_without_a_finished_completion_trains_nothing(world):
    """All truncated and masked: loss and gradients are zero, not 0 / 0."""
    args = settings(mask_truncated_completions=True, loss_type="dapo")
    group = make_groups(world, "single_image", args)[0]
    group.finished = torch.zeros(4, dtype=torch.bool)
    loss, grads = shared_update(world, [group], args)
    assert loss == 0 and all((g == 0).all() for g in grads.values())


def test_first_update_has_zero_policy_loss_but_a_gradient(world):
    """With the grpo loss the standardized advantages of a group add up to zero, so the loss starts
    at 0.
    """
    args = settings(beta=0.0)
    groups = make_groups(world, "single_image", args)
    loss, grads = shared_update(world, groups, args)
    assert abs(loss) < 1e-6 and grads["model.norm.weight"].abs().max() > 1e-3


def test_group_batch_targets_every_token_once(world):
    """Completions' tokens are the targets in order, first ones predicted at the prompt's end,
    padding never.
    """
    group = make_groups(world, "single_image", settings())[0]
    batch = group_batch(group.prompt, group.ids, group.lengths)
    P, C = group.prompt.ids.shape[1], group.ids.shape[1]
    places = [[P - 1] + [P + g * C + i for i in range(n - 1)] for g, n in enumerate(LENGTHS[0])]
    assert batch.predict_at.tolist() == [place for completion in places for place in completion]
    assert batch.targets.tolist() == [
        token for g, n in enumerate(LENGTHS[0]) for token in group.ids[g, :n].tolist()
    ]


# -------------------------------------------------------------------------- rollouts


def sampled(world, rows, args, monkeypatch, step=1, share=(0, 1)):
    """sample_groups and the Rollout inside it. share: rank and number of processes."""
    rank, processes = share
    places = [rank + i * processes for i in range(len(rows))]
    samples = [world.samples[row] for row in rows]
    kept = []
    with monkeypatch.context() as patch:
        original = grpo.generate

        def generates(*arguments, **options):
            kept.append(original(*arguments, **options))
            return kept[0]

        keep_log_probs(patch)
        patch.setattr(grpo, "generate", generates)
        groups = sample_groups(world.model, world.processor, samples, places, step, args, "cpu")
        return groups, kept[0]


@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_rollout_log_probs_equal_the_trained_ones(world, monkeypatch, temperature):
    """What the sampler drew from is what the update differentiates: same bans, temperature,
    pictures, positions.
    """
    args = settings(num_generations=3, temperature=temperature)
    rows = list(world.rows.values())
    groups, rollout = sampled(world, rows, args, monkeypatch)
    inside = torch.arange(rollout.ids.shape[1]) < rollout.lengths[:, None]
    again = log_probs_of(world.model, world, groups, 2, temperature)
    assert len(groups) == len(rows) and [g.ids.shape[0] for g in groups] == [3] * len(rows)
    again = torch.cat([*itertools.chain(*again)])
    assert (again - rollout.log_probs[inside]).abs().max() <= 1e-4


def test_a_group_does_not_depend_on_its_company(world, monkeypatch):
    """Rows sampled together and alone give the same completions: ranks may share prompts out as
    they like.
    """
    args = settings(num_generations=3, max_completion_length=20)
    rows = list(world.rows.values())[:3]
    together, _ = sampled(world, rows, args, monkeypatch)
    for ranks in (1, 2, 3):
        for rank in range(ranks):
            share, _ = sampled(world, rows[rank::ranks], args, monkeypatch, share=(rank, ranks))
            for mine, group in zip(share, together[rank::ranks], strict=True):
                assert mine.texts == group.texts
                assert torch.equal(mine.ids, group.ids)
                assert mine.sample is group.sample
                assert torch.equal(mine.advantages, group.advantages)


def test_noise_depends_on_its_place_only():
    """Seed, step, place in the step and completion set it; how much is drawn beside it does not."""
    base = noise(3, 5, 7, 4, 16)
    assert torch.equal(base, noise(3, 5, 7, 6, 30)[:4, :16]) and base.dtype == torch.float32
    others = [noise(4, 5, 7, 4, 16), noise(3, 6, 7, 4, 16), noise(3, 5, 8, 4, 16)]
    rows = torch.cat([base, *others])
    assert len(rows.unique(dim=0)) == 16 and rows.min() >= 0 and rows.max() < 1


def test_a_prompt_drawn_twice_is_sampled_twice(world, monkeypatch):
    """One row twice in one step: its two groups are six samples, not three that count twice."""
    (first, second), _ = sampled(world, [0, 0], settings(num_generations=3), monkeypatch)
    assert first.sample is second.sample
    assert len({*first.texts, *second.texts}) == 6


def test_fewer_prompts_than_a_step_draws(call, rooms, tiny_model, tmp_path):
    """3 prompts, 6 groups a step: every prompt twice, no group a copy of another."""
    lines = (rooms / "train" / "spld_spatial_data.jsonl").read_text().splitlines(True)
    (tmp_path / "three.jsonl").write_text("".join(lines[:3]))
    flags = ("--model", tiny_model, "--data", tmp_path / "three.jsonl", *FEW)
    flags += ("--images", rooms / "train" / "images", "--out", tmp_path / "out")
    call(grpo, *flags, "--prompts-per-step", 6, "--max-steps", 1)
    rows = read_rows(tmp_path / "out" / "rollouts.jsonl")
    places = [int(row["where"].rpartition(":")[2]) for row in rows]
    assert sorted(places) == [1, 1, 2, 2, 3, 3]
    assert len({tuple(row["completions"]) for row in rows}) == 6


def test_sampling_repeats_with_its_seed(world, monkeypatch):
    args, row = settings(num_generations=4), [world.rows["single_image"]]
    first, again, later = (
        sampled(world, row, args, monkeypatch, step)[0][0].texts for step in (1, 1, 2)
    )
    assert first == again != later and len(set(first)) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_every_picture_reaches_every_forward(world, monkeypatch, kind):
    """Darkening any one picture or frame changes SFT, rollout, policy and reference (a past bug
    elsewhere: video and later pictures were dropped from the log-prob forwards, and training went
    on).
    """
    args, row = settings(num_generations=2, max_completion_length=4), world.rows[kind]
    sample, original = world.samples[row], data.to_patches

    def outcome():
        groups, rollout = sampled(world, [row], args, monkeypatch)
        groups[0].ids, groups[0].lengths = completions or (groups[0].ids, groups[0].lengths)
        (reference,) = log_probs_of(world.reference, world, groups, 2, 1.0)
        counts = counts_of(groups, args)
        entropy = accumulate_gradient(world.model, groups, counts, args, world.banned, "cpu")[
            "entropy"
        ]
        world.model.zero_grad()
        with torch.no_grad():
            sft = world.model(
                collate([world.processor.example(sample, "direct")], world.processor.config)
            )[0]
        return (groups[0].ids, groups[0].lengths), (
            sft,
            rollout.log_probs,
            torch.cat(reference),
            torch.tensor(entropy),
        )

    completions = None
    completions, plain = outcome()
    assert all(torch.equal(a, b) for a, b in zip(plain, outcome()[1]))
    # (number of the to_patches call, number of the frame in it; a still picture is given twice)
    pictures = []
    with monkeypatch.context() as patch:
        calls = itertools.count()
        patch.setattr(
            data,
            "to_patches",
            lambda frames, size: (
                pictures.extend((call, i) for call in [next(calls)] for i in range(len(frames)))
                or original(frames, size)
            ),
        )
        world.processor.example(sample, "direct")
    pictures = [(call, i) for call, i in pictures if sample.media[0].kind == "video" or i == 0]
    frames = len(world.samples[world.rows["video"]].media[0].source)
    assert len(pictures) == {"single_image": 1, "multi_view": len(sample.media)}.get(kind, frames)
    for changed in pictures:
        with monkeypatch.context() as patch:
            calls = itertools.count()

            def darkened(frames, size, calls=calls, changed=changed):
                call, still = next(calls) % len(sample.media), sample.media[0].kind == "image"
                seen = []
                for i, frame in enumerate(frames):
                    dark = changed == (call, 0 if still else i)
                    seen.append(frame.point(lambda value: value // 2) if dark else frame)
                return original(seen, size)

            patch.setattr(data, "to_patches", darkened)
            for name, a, b in zip(("SFT", "rollout", "reference", "policy"), plain, outcome()[1]):
                assert not torch.equal(a, b), f"{changed} of {kind} does not reach {name}"


# -------------------------------------------------------------------------- a run


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


FEW = (
    "--num-generations",
    3,
    "--max-completion-length",
    8,
    "--prompts-per-step",
    4,
    "--max-steps",
    2,
)
KEYS = [
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "num_tokens",
    "tokens_per_second",
    "step_time",
    "reward",
    "rewards/accuracy/mean",
    "rewards/accuracy/std",
    "rewards/format/mean",
    "rewards/format/std",
    "reward_std",
    "frac_reward_zero_std",
    "kl",
    "entropy",
    "clip_ratio",
    "completions/mean_length",
    "completions/clipped_ratio",
    "rollout_time",
    "update_time",
]


def test_rollouts_hold_the_conversation_of_a_chat(call, tiny_model, tmp_path, capsys):
    """All that was said up to the answer, in the words of --prompts."""
    file = io.BytesIO()
    Image.new("RGB", (56, 56), "red").save(file, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    Image.new("RGB", (56, 56), "blue").save(tmp_path / "a.png")
    turns = [
        {"role": "user", "content": "<image><image>How wide?"},
        {"role": "assistant", "content": "85"},
        {"role": "user", "content": "And high?"},
        {"role": "assistant", "content": "200"},
    ]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns, "images": [uri, "a.png"]}))
    (tmp_path / "prompts.json").write_text('{"system": "Be brief."}')
    flags = ["--model", tiny_model, "--data", tmp_path / "rows.jsonl", "--images", tmp_path]
    flags += ["--prompts", tmp_path / "prompts.json", "--out", tmp_path / "out", "--max-steps", 1]
    flags += ["--prompts-per-step", 1, "--num-generations", 2, "--max-completion-length", 4]
    call(grpo, *flags, "--reward-funcs", "accuracy", "--reward-weights", 1)
    (row,) = read_rows(tmp_path / "out" / "rollouts.jsonl")
    assert row["images"] == [str(tmp_path / "a.png")] and row["answer"] == "200"
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert row["prompt"] == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{picture}{picture}How wide?"
        "<|im_end|>\n<|im_start|>assistant\n85<|im_end|>\n<|im_start|>user\nAnd high?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    line = f"1 prompts, 1 steps of 1 groups of 2, until --epochs 1: {tmp_path}/rows.jsonl\n"
    assert line in capsys.readouterr().out


def test_a_run_writes_log_and_rollouts(call, rooms, tiny_model, tmp_path, monkeypatch):
    """Whole groups of whole steps are logged under the agreed keys, and the metrics are those of
    the rollouts.
    """
    monkeypatch.setitem(rewards.REWARDS, "accuracy", varied_reward)
    data_file, out = rooms / "train" / "spld_spatial_data.jsonl", tmp_path / "out"
    call(grpo, "--model", tiny_model, "--data", data_file, "--out", out, *FEW)
    log, rollouts = read_rows(out / "log.jsonl"), read_rows(out / "rollouts.jsonl")
    assert [row["step"] for row in log] == [1, 2] and all(set(row) == set(KEYS) for row in log)
    assert [row["step"] for row in rollouts] == [1] * 4 + [2] * 4 and len(
        {row["where"] for row in rollouts}
    ) == 8
    for row in rollouts:
        assert " ".join(row) == (
            "step where question_type prompt answer images completions lengths finished rewards "
            "reward advantages"
        )
        assert all(
            len(values) == 3
            for values in (row["completions"], row["advantages"], *row["rewards"].values())
        )
        assert row["rewards"]["accuracy"] == varied_reward(row["completions"], None)
    first = [row for row in rollouts if row["step"] == 1]
    accuracy = np.array([row["rewards"]["accuracy"] for row in first])
    total = accuracy + np.array([row["rewards"]["format"] for row in first])
    assert log[0]["reward"] == pytest.approx(total.mean())
    assert log[0]["rewards/accuracy/mean"] == pytest.approx(accuracy.mean())
    assert log[0]["rewards/accuracy/std"] == pytest.approx(accuracy.std())
    assert log[0]["reward_std"] == pytest.approx(total.std(1, ddof=1).mean())
    assert log[0]["frac_reward_zero_std"] == pytest.approx((total.std(1) == 0).mean())
    assert abs(log[0]["loss"]) < 1e-6
    assert (
        log[0]["kl"] == pytest.approx(0, abs=1e-9) and log[1]["kl"] > 0 and log[0]["grad_norm"] > 0
    )
    assert (out / "config.json").is_file()


def test_held_out_questions_are_answered_greedily(call, rooms, tiny_model, tmp_path, monkeypatch):
    """After step 1 and every N-th, the same ones; what is logged is the mean reward of plain greedy
    answers, and the run is not changed by the asking.
    """
    monkeypatch.setitem(rewards.REWARDS, "accuracy", varied_reward)
    data_file, questions = (
        rooms / "train" / "spld_spatial_data.jsonl",
        rooms / "test" / "spld_spatial_data.jsonl",
    )
    flags = ("--model", tiny_model, "--data", data_file, *FEW, "--max-steps", 3)
    call(
        grpo,
        *flags,
        "--out",
        tmp_path / "asked",
        "--eval-every",
        3,
        "--eval-data",
        questions,
        "--eval-limit",
        5,
    )
    call(grpo, *flags, "--out", tmp_path / "plain")
    asked, plain = (
        read_rows(tmp_path / "asked" / "log.jsonl"),
        read_rows(tmp_path / "plain" / "log.jsonl"),
    )
    keys = {"eval_rewards/accuracy/mean", "eval_rewards/format/mean"}
    assert [keys <= set(row) for row in asked] == [True, False, True] and not any(
        keys & set(row) for row in plain
    )
    assert [row["grad_norm"] for row in asked] == [row["grad_norm"] for row in plain]
    model, samples = load_model(tmp_path / "asked", torch.float32), read_all([questions], None)
    processor, texts = Processor(tiny_model, model.config), []
    for sample in samples[:: max(1, len(samples) // 5)][:5]:
        ids = collate([processor.example(sample, "thinking", with_answer=False)], model.config)
        rollout = generate(model, ids, 8, processor.stop_ids, banned=processor.banned("cpu"))
        texts.append(processor.decode(rollout.ids[0, : rollout.lengths[0]].tolist()))
    assert asked[2]["eval_rewards/accuracy/mean"] == pytest.approx(
        np.mean(varied_reward(texts, None))
    )


def test_stage_1_goes_on_by_reinforcement(call, rooms, tiny_model, tmp_path, monkeypatch):
    """Localization rows are asked for boxes, as stage 1 asks, and paid by their IoU in the pixels
    the model sees.
    """
    judged = []
    monkeypatch.setitem(
        rewards.REWARDS,
        "accuracy",
        lambda texts, sample: judged.append(sample) or varied_reward(texts, sample),
    )
    call(
        grpo,
        "--model",
        tiny_model,
        "--data",
        rooms / "train" / "spld_grounding_data.jsonl",
        "--out",
        tmp_path / "out",
        *FEW,
        "--reward-funcs",
        "accuracy",
        "--reward-weights",
        2,
        "--max-pixels",
        56 * 56,
        "--min-pixels",
        28 * 28,
    )
    log, rollouts = (
        read_rows(tmp_path / "out" / "log.jsonl"),
        read_rows(tmp_path / "out" / "rollouts.jsonl"),
    )
    assert (
        log[0]["reward"] == pytest.approx(2 * log[0]["rewards/accuracy/mean"])
        and log[0]["grad_norm"] > 0
    )
    assert all(
        "bounding box" in row["prompt"] and list(row["rewards"]) == ["accuracy"] for row in rollouts
    )
    assert len(judged) == len(rollouts) and all(
        c <= 56 for s in judged for box in s.answer for c in box["bbox_2d"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ("grpo", "dr_grpo", "dapo"))
def test_the_reward_rises(call, rooms, tiny_model, tmp_path, monkeypatch, loss_type):
    """A reward for digits teaches an untrained model to write digits: the sign of the whole update
    is right.
    """
    monkeypatch.setitem(
        rewards.REWARDS,
        "accuracy",
        lambda texts, sample: [
            sum(c.isdigit() for c in text) / max(1, len(text)) for text in texts
        ],
    )
    call(
        grpo,
        "--model",
        tiny_model,
        "--data",
        rooms / "train" / "spld_spatial_data.jsonl",
        "--out",
        tmp_path / "out",
        "--num-generations",
        16,
        "--max-completion-length",
        4,
        "--prompts-per-step",
        2,
        "--max-steps",
        10,
        "--learning-rate",
        1e-2,
        "--beta",
        0,
        "--loss-type",
        loss_type,
    )
    reward = [row["rewards/accuracy/mean"] for row in read_rows(tmp_path / "out" / "log.jsonl")]
    assert np.mean(reward[-3:]) > np.mean(reward[:3]) + 0.3  # measured: from 0.35 to 0.95


# -------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, expected",
    (
        (("--num-generations", 1), "--num-generations is 1"),
        (
            ("--reward-funcs", "format", "style"),
            "no reward 'style', expected of format, accuracy",
        ),
        (
            ("--reward-weights", 1),
            "--reward-weights has 1 numbers, expected 2: one for each of format, accuracy",
        ),
        (("--eval-every", 5), "--eval-every 5 needs --eval-data"),
        (("--data", "BROKEN"), "broken.jsonl:1: "),
        (
            ("--reward-funcs", "format", "accuracy", "format", "--reward-weights", 1, 1, 5),
            "--reward-funcs names 'format' twice",
        ),
        (
            ("--max-completion-length", 4090),
            "spld_spatial_data.jsonl:1: --max-completion-length 4090 does not fit behind ",
        ),
        (("--max-completion-length", 5000), "; the model's context has 4096"),
        (("--data", "EMPTY"), "no rows in it"),
        (("--model", "nowhere"), "not a model directory"),
    ),
    ids=str,
)
def test_bad_input_is_one_line(call, rooms, tiny_model, tmp_path, flags, expected):
    """A user's mistake names flag, value and what was expected, before anything is trained."""
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text("{}\n")
    flags = [
        str(tmp_path / f"{flag.lower()}.jsonl") if flag in ("EMPTY", "BROKEN") else flag
        for flag in flags
    ]
    with pytest.raises(UserError) as error:
        call(
            grpo,
            "--model",
            tiny_model,
            "--data",
            rooms / "train" / "spld_spatial_data.jsonl",
            "--out",
            tmp_path / "out",
            *FEW,
            *flags,
        )
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out" / "log.jsonl").exists()


# ---------------------------------------------------------------------- rewards of one's own


def spread_of_lengths(completions, sample):
    """A reward that compares a group's completions: the shortest earns 1, the longest 0."""
    sizes = [len(text) for text in completions]
    return [(max(sizes) - size) / max(1, max(sizes) - min(sizes)) for size in sizes]


def test_a_reward_sees_its_whole_group(call, rooms, tiny_model, tmp_path, monkeypatch):
    """Every call has all completions of one prompt; none is made to see whether it works."""
    groups = []

    def reward(completions, sample):
        groups.append(len(completions))
        completions.sort()  # its own list: the texts stay with their log-probs
        return spread_of_lengths(completions, sample)

    monkeypatch.setitem(rewards.REWARDS, "spread", reward)
    data_file, out = rooms / "train" / "spld_spatial_data.jsonl", tmp_path / "out"
    flags = ("--reward-funcs", "format", "spread", "--reward-weights", 1, 0.5)
    call(grpo, "--model", tiny_model, "--data", data_file, "--out", out, *FEW, *flags)
    rows = read_rows(out / "rollouts.jsonl")
    assert groups == [3] * len(rows) == [3] * 8
    for row in rows:
        assert row["rewards"]["spread"] == spread_of_lengths(sorted(row["completions"]), None)
        total = np.array(row["rewards"]["format"]) + 0.5 * np.array(row["rewards"]["spread"])
        assert row["reward"] == pytest.approx(total)
    assert any(row["completions"] != sorted(row["completions"]) for row in rows)


def test_the_docs_reward_trains(call, rooms, tiny_model, tmp_path, monkeypatch):
    """docs/grpo.md's example of a reward of one's own, with the flags that stand below it."""
    text = (Path(grpo.__file__).parent / "docs" / "grpo.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (flags,) = re.findall(r"is switched on by `(.*?)`", text, re.DOTALL)
    monkeypatch.setattr(rewards, "REWARDS", dict(rewards.REWARDS))
    monkeypatch.setattr(grpo, "REWARDS", rewards.REWARDS)  # which names it knows
    exec(code, {"REWARDS": rewards.REWARDS})
    data_file, out = rooms / "train" / "spld_spatial_data.jsonl", tmp_path / "out"
    call(grpo, "--model", tiny_model, "--data", data_file, "--out", out, *FEW, *flags.split())
    for row in read_rows(out / "rollouts.jsonl"):
        assert row["rewards"]["short"] == [1.0] * 3  # of 8 tokens each
    assert read_rows(out / "log.jsonl")[0]["rewards/short/mean"] == 1.0


def test_equal_sums_of_other_parts_are_equal(world, monkeypatch):
    """0.1 + 0.2 and 0 + 0.3 differ in float64: such a group teaches nothing and is counted so."""
    assert 0.1 + 0.2 != 0.3
    monkeypatch.setitem(rewards.REWARDS, "a", lambda texts, sample: [0.1, 0.0, 0.3, 0.1])
    monkeypatch.setitem(rewards.REWARDS, "b", lambda texts, sample: [0.2, 0.3, 0.0, 0.2])
    args = settings(num_generations=4, reward_funcs=["a", "b"], reward_weights=[1.0, 1.0])
    groups, _ = sampled(world, [0, 1], args, monkeypatch)
    assert all(group.advantages.tolist() == [0.0] * 4 for group in groups)
    ranks = SimpleNamespace(sum=lambda *numbers: list(numbers))
    metrics = grpo.rollout_metrics(groups, ranks)
    assert metrics["frac_reward_zero_std"] == 1.0
    assert metrics["reward_std"] == 0.0


def test_metrics_of_a_rollout_by_hand(world, monkeypatch):
    """Two groups of two completions, each number put in by hand."""
    groups, _ = sampled(world, [0, 1], settings(num_generations=2), monkeypatch)
    numbers = [([0.0, 2.0], [1, 3], [True, False]), ([1.0, 1.0], [4, 4], [True, True])]
    for group, (reward, lengths, finished) in zip(groups, numbers):
        group.rewards = {"accuracy": reward}
        group.reward = torch.tensor(reward)
        group.advantages = group_advantages(group.reward)
        group.lengths = torch.tensor(lengths)
        group.finished = torch.tensor(finished)
    metrics = grpo.rollout_metrics(groups, SimpleNamespace(sum=lambda *sums: list(sums)))
    assert metrics == pytest.approx(
        {
            "reward": 1.0,
            "reward_std": 2**0.5 / 2,  # of the groups: the square root of 2, and 0
            "frac_reward_zero_std": 0.5,
            "completions/mean_length": 3.0,
            "completions/clipped_ratio": 0.25,
            "rewards/accuracy/mean": 1.0,
            "rewards/accuracy/std": 0.5**0.5,
        }
    )


@pytest.mark.parametrize("iterations", (1, 2))
def test_updates_are_compared_with_the_policy_that_sampled(
    iterations, call, rooms, tiny_model, tmp_path, monkeypatch
):
    """One update needs no log-probs of its own; of two, both have those from before the first."""
    monkeypatch.setitem(rewards.REWARDS, "accuracy", varied_reward)
    olds = []

    def observed(model, groups, *others):
        olds.append(groups[0].old_log_probs)
        return accumulate_gradient(model, groups, *others)

    monkeypatch.setattr(grpo, "accumulate_gradient", observed)
    flags = ("--data", rooms / "train" / "spld_spatial_data.jsonl", "--out", tmp_path / "out")
    call(grpo, "--model", tiny_model, *flags, *FEW, "--num-iterations", iterations)
    assert len(olds) == 2
    if iterations == 1:
        assert olds == [None, None]
    else:
        assert olds[0] is not None and olds[0] is olds[1]


def test_a_reward_that_fails_its_group_is_named(call, rooms, tiny_model, tmp_path, monkeypatch):
    """In a run: one line with row and reward, before anything is trained."""
    monkeypatch.setitem(rewards.REWARDS, "one", lambda texts, sample: [float(len(texts[0]))])
    data_file, out = rooms / "train" / "spld_spatial_data.jsonl", tmp_path / "out"
    flags = ("--reward-funcs", "one", "--reward-weights", 1)
    with pytest.raises(UserError) as error:
        call(grpo, "--model", tiny_model, "--data", data_file, "--out", out, *FEW, *flags)
    expected = r"\S+spld_spatial_data.jsonl:\d+: reward 'one' returned a list of 1, expected a "
    assert re.match(expected + "list of 3 finite numbers", str(error.value))
    assert not (out / "log.jsonl").exists()


@pytest.mark.parametrize("flag", ("--data", "--eval-data"))
def test_rows_that_no_reward_can_score_show_at_once(
    call, rooms, tiny_model, tmp_path, monkeypatch, flag
):
    """The last row of a file, training or held out, before the model is read."""
    files = dict.fromkeys(("--data", "--eval-data"), rooms / "train" / "spld_spatial_data.jsonl")
    lines = files[flag].read_text().splitlines()[:5]
    row = json.loads((rooms / "train" / "spld_coldstart_data.jsonl").read_text().splitlines()[0])
    row = {key: value for key, value in row.items() if key not in ("question_type", "answer")}
    files[flag] = tmp_path / "mine.jsonl"
    files[flag].write_text("\n".join([*lines, json.dumps(row)]) + "\n")
    monkeypatch.setattr(grpo, "load_sharded", lambda *_: pytest.fail("read the model"))
    flags = ("--data", files["--data"], "--eval-data", files["--eval-data"], "--eval-every", 1)
    flags += ("--model", tiny_model, "--images", rooms / "train" / "images")
    with pytest.raises(UserError, match=r"mine.jsonl:6: no accuracy reward for question_type ''"):
        call(grpo, *flags, "--out", tmp_path / "out", *FEW)


# ---------------------------------------------------------------------- limits


def longer(line, words):
    row = json.loads(line)
    return json.dumps(row | {"question": row["question"] + " Look well." * words}) + "\n"


@pytest.mark.parametrize("flag", ("--data", "--eval-data"))
def test_a_prompt_beyond_the_context_shows_at_once(
    call, rooms, tiny_model, tmp_path, monkeypatch, flag
):
    """The row is named before the model is read, and the completions are not blamed."""
    files = dict.fromkeys(("--data", "--eval-data"), rooms / "train" / "spld_spatial_data.jsonl")
    lines = files[flag].read_text().splitlines(True)[:5]
    files[flag] = tmp_path / "mine.jsonl"
    files[flag].write_text("".join([*lines, longer(lines[0], 3000)]))
    monkeypatch.setattr(grpo, "load_sharded", lambda *_: pytest.fail("read the model"))
    flags = ("--data", files["--data"], "--eval-data", files["--eval-data"], "--eval-every", 1)
    flags += ("--model", tiny_model, "--images", rooms / "train" / "images")
    with pytest.raises(UserError) as error:
        call(grpo, *flags, "--out", tmp_path / "out", *FEW)
    expected = r"\S+mine.jsonl:6: \d+ tokens; the model's context has 4096"
    assert re.fullmatch(expected, str(error.value))


def test_prompts_leave_room_for_completions(world, tiny_model):
    """Also where the length is only known when the row is used, as of a video file."""
    (sample, *_) = world.samples
    processor = Processor(tiny_model, world.model.config)
    prompt = len(processor.example(sample, "thinking", with_answer=False).ids)
    text = dataclasses.replace(world.model.config.text, max_position_embeddings=prompt + 7)
    processor.config = dataclasses.replace(world.model.config, text=text)
    args = settings(max_completion_length=8, num_generations=2, prompts_per_step=1)
    ranks = SimpleNamespace(rank=0, world=1, device="cpu")
    expected = f"--max-completion-length 8 does not fit behind {prompt} tokens"
    with pytest.raises(UserError, match=expected):
        grpo.sample_groups(world.model, processor, [sample], [0], 1, args, "cpu")
    with pytest.raises(UserError, match=expected):
        grpo.held_out_metrics(world.model, processor, [sample], args, ranks)


def test_a_completion_that_just_fits_is_sampled(call, rooms, tiny_model, tmp_path):
    """Prompt and completion may fill the context; one token more may not."""
    data_file = rooms / "train" / "spld_spatial_data.jsonl"
    (tmp_path / "one.jsonl").write_text(data_file.read_text().splitlines(True)[0])
    (sample,) = read_all([tmp_path / "one.jsonl"], rooms / "train" / "images")
    processor = Processor(tiny_model, load_config(tiny_model))
    prompt = len(processor.example(sample, "thinking", with_answer=False).ids)
    small = tmp_path / "small"
    shutil.copytree(tiny_model, small)
    config = json.loads((small / "config.json").read_text())
    config["max_position_embeddings"] = prompt + 8
    (small / "config.json").write_text(json.dumps(config))
    flags = ("--model", small, "--data", tmp_path / "one.jsonl", *FEW, "--prompts-per-step", 1)
    flags += ("--images", rooms / "train" / "images", "--max-steps", 1)
    call(grpo, *flags, "--out", tmp_path / "out")
    (row,) = read_rows(tmp_path / "out" / "rollouts.jsonl")
    assert max(row["lengths"]) == 8
    expected = f"one.jsonl:1: --max-completion-length 9 does not fit behind {prompt} tokens; "
    with pytest.raises(UserError, match=expected + f"the model's context has {prompt + 8}"):
        call(grpo, *flags, "--out", tmp_path / "other", "--max-completion-length", 9)
