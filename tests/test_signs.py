"""signs.py: each sign is seen in a run made to have it, and in no other."""

import json

import pytest

from look.signs import signs

SIZE = [112, 84]


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def located(prediction):
    return {"question_type": "localization", "prediction": prediction, "size": SIZE}


def found(run, answers, logs=None):
    """(rung, trouble) of all signs, and their sentences."""
    all_signs = list(signs(run, answers, dict.fromkeys(answers, ()) | (logs or {})))
    return [(name, bad) for name, (bad, _) in all_signs], [said for _, (_, said) in all_signs]


@pytest.mark.parametrize(
    "prediction, trouble, said",
    (
        ([[0, 0, 112, 84]], False, "100.0% of its localization answers are valid JSON, 0.0%"),
        ([[0, 0, 84, 112]], True, "100.0% of their boxes"),
        ([[0, 0, 84, 112], [0, 0, 9, 9]], True, "50.0% of their boxes"),
        ([], False, "0.0% of their boxes"),
        (None, True, "0.0% of its localization answers are valid JSON"),
    ),
)
def test_boxes(tmp_path, prediction, trouble, said):
    """Of every rung but the base, which was never taught them."""
    if prediction is not None:
        prediction = [{"bbox_2d": box, "label": "bed"} for box in prediction]
    rows = [located(prediction), {"question_type": "room size"}]
    verdicts, sentences = found(tmp_path, dict.fromkeys(("base", "stage1", "cold"), rows))
    assert verdicts == [("stage1", trouble), ("cold", trouble)]
    assert all(said in sentence for sentence in sentences)


@pytest.mark.parametrize(
    "train, held_out, low, trouble",
    ((0.9, 0.42, 0.38, True), (0.9, 0.6, 0.55, False), (0.45, 0.42, 0.38, False)),
)
def test_memory(tmp_path, train, held_out, low, trouble):
    """Knowing the training questions is trouble only where nothing is known of others."""
    write(tmp_path / "eval-train" / "stage2" / "scores.json", {"overall": train})
    scores = {"overall": held_out, "low": low, "blind": 0.4}
    write(tmp_path / "eval" / "stage2" / "scores.json", scores)
    assert found(tmp_path, {"stage1": [], "stage2": []})[0] == [("stage2", trouble)]


def reward_log(first, last, held_out):
    """20 steps with a noise of 0.02 * (2 / 3)**.5 in their fifths."""
    rows = [{"reward": first + 0.01 * (i % 2) + (last - first) * (i >= 10)} for i in range(20)]
    for row, value in zip((rows[0], rows[-1]), held_out):
        row["eval_rewards/accuracy/mean"] = value
    return rows


@pytest.mark.parametrize(
    "first, last, held_out, trouble",
    ((1.0, 1.5, (0.4, 0.4), True), (1.0, 1.5, (0.4, 0.5), False), (1.0, 1.001, (0.4, 0.3), False)),
)
def test_reward(tmp_path, first, last, held_out, trouble):
    """A rise within the noise is none."""
    verdicts, (said,) = found(tmp_path, {"grpo": []}, {"grpo": reward_log(first, last, held_out)})
    assert verdicts == [("grpo", trouble)] and "reward 1.005 -> " in said


def test_of_too_little_nothing_is_said(tmp_path):
    """Without held-out questions, or with a step or two, the reward may rise as it likes."""
    for rows in (reward_log(1.0, 1.5, ()), reward_log(1.0, 1.5, (0.4, 0.4))[::10]):
        verdicts, (said,) = found(tmp_path, {"grpo": []}, {"grpo": rows})
        assert verdicts == [("grpo", None)] and "too few to judge" in said


def test_attention(tmp_path):
    """Entropies of neighbouring rungs whose intervals do not meet; other models are passed over."""
    rows = []
    for name, value in (
        ("base", 0.8),
        ("x", 0.1),
        ("stage1", 0.9),
        ("stage2", 0.895),
        ("cold", 0.7),
    ):
        entropy = {"value": value, "low": value - 0.01, "high": value + 0.01}
        rows.append({"name": name, "entropy": entropy})
    write(tmp_path / "probes" / "attention.json", {"rows": rows})
    names = ("base", "stage1", "stage2", "cold", "grpo")
    verdicts, _ = found(tmp_path, dict.fromkeys(names, ()))
    assert verdicts == [("stage1", True), ("stage2", False), ("cold", False)]


def test_a_run_without_anything_has_no_sign(tmp_path):
    assert found(tmp_path, {"base": [], "grpo": []}) == ([], [])
