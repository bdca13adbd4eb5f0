"""signs.py: each sign is seen in a run made to have it, and in no other."""

import json

import pytest
from conftest import launch

from look import signs


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def located(prediction):
    return {"question_type": "localization", "prediction": prediction, "size": [112, 84]}


def reward_log(first, last, held_out):
    rows = [
        {"reward": first + 0.01 * (i % 2) + (last - first) * (i >= 10)} for i in range(20)
    ]  # noise: 0.02 * (2 / 3)**.5
    for row, value in zip((rows[0], rows[-1]), held_out):
        row["eval_rewards/accuracy/mean"] = value
    return rows


@pytest.mark.parametrize(
    "prediction, trouble, said",
    (
        (
            [{"bbox_2d": [0, 0, 112, 84], "label": "bed"}],
            False,
            "100.0% of its localization answers are valid JSON, 0.0%",
        ),
        ([{"bbox_2d": [0, 0, 84, 112], "label": "bed"}], True, "100.0% of their boxes"),
        (None, True, "0.0% of its localization answers are valid JSON"),
    ),
)
def test_boxes(tmp_path, prediction, trouble, said):
    """Also of a rung above the one that learned boxes, and where boxes are only replayed; not of one that was never taught them."""
    for name, files in (
        ("stage1", {"data": ["rooms/spld_grounding_data.jsonl"]}),
        ("grpo-no2", {"data": ["rooms/x.jsonl"]}),
        (
            "cold-no2",
            {"data": ["x.jsonl"], "replay": ["spld_grounding_data.jsonl"], "replay_ratio": 0.0},
        ),
        (
            "stage2-no1",
            {"data": ["x.jsonl"], "replay": ["spld_grounding_data.jsonl"], "replay_ratio": 0.0},
        ),
        (
            "stage2-long",
            {"data": ["x.jsonl"], "replay": ["spld_grounding_data.jsonl"], "replay_ratio": 0.2},
        ),
    ):
        write(
            tmp_path / "eval" / name / "predictions.jsonl",
            located(prediction),
            {"question_type": "room size"},
        )
        write(tmp_path / name / "config_run.json", files)
    found = list(signs.signs(tmp_path))
    assert [(name, verdict) for name, verdict, _ in found] == [
        (name, trouble) for name in ("stage1", "stage2-long", "cold-no2", "grpo-no2")
    ]
    assert all(said in sentence for _, _, sentence in found)


@pytest.mark.parametrize(
    "train, held_out, low, trouble",
    ((0.9, 0.42, 0.38, True), (0.9, 0.6, 0.55, False), (0.45, 0.42, 0.38, False)),
)
def test_memory(tmp_path, train, held_out, low, trouble):
    """Knowing the training questions is trouble only where nothing is known of others."""
    for folder, score in (
        ("eval-train", {"overall": train}),
        ("eval", {"overall": held_out, "low": low, "blind": 0.4}),
    ):
        write(tmp_path / folder / "stage2" / "scores.json", score)
    ((name, found, _),) = signs.signs(tmp_path)
    assert (name, found) == ("stage2", trouble)


@pytest.mark.parametrize(
    "first, last, held_out, trouble",
    ((1.0, 1.5, (0.4, 0.4), True), (1.0, 1.5, (0.4, 0.5), False), (1.0, 1.001, (0.4, 0.3), False)),
)
def test_reward(tmp_path, first, last, held_out, trouble):
    """A rise within the noise is none."""
    write(tmp_path / "grpo" / "log.jsonl", *reward_log(first, last, held_out))
    ((name, found, said),) = signs.signs(tmp_path)
    assert (name, found) == ("grpo", trouble) and "reward 1.005 -> " in said


def test_of_too_little_nothing_is_said(tmp_path):
    """Without held-out questions, or with a step or two, the reward may rise as it likes."""
    for rows in (reward_log(1.0, 1.5, ()), reward_log(1.0, 1.5, (0.4, 0.4))[::10]):
        write(tmp_path / "grpo" / "log.jsonl", *rows)
        ((name, found, said),) = signs.signs(tmp_path)
        assert (name, found) == ("grpo", None) and "too few to judge" in said


def test_attention(tmp_path):
    """Entropies of neighbouring rungs whose intervals do not meet."""
    rows = [
        {"name": name, "entropy": {"value": value, "low": value - 0.01, "high": value + 0.01}}
        for name, value in (("base", 0.8), ("stage1", 0.9), ("stage2", 0.895), ("cold", 0.7))
    ]
    write(tmp_path / "probes" / "attention.json", {"rows": rows})
    assert [(name, found) for name, found, _ in signs.signs(tmp_path)] == [
        ("stage1", True),
        ("stage2", False),
        ("cold", False),
    ]


def test_a_run_is_asked_for():
    done = launch(signs.__file__, "nowhere")
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "signs.py: nowhere: no ladder there; climb one with: python ladder.py --out nowhere"
    ]


def test_every_line_begins_with_a_verdict(tmp_path):
    write(tmp_path / "eval" / "stage1" / "predictions.jsonl", located(None))
    write(tmp_path / "stage1" / "config_run.json", {"data": ["spld_grounding_data.jsonl"]})
    write(tmp_path / "grpo" / "log.jsonl", *reward_log(1.0, 1.0, (0.4, 0.4)))
    write(tmp_path / "grpo-no1" / "log.jsonl", *reward_log(1.0, 1.0, ()))
    assert [line[:8] for line in signs.verdicts(tmp_path)] == ["TROUBLE ", "ok      ", "unknown "]
