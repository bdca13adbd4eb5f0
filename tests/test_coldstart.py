"""coldstart.py: chosen chains are well formed, right, distinct and capped; sampling repeats.

An untrained model writes no chains, so the runs here judge by rewards of their own: every text is
well formed, and right by its length. Sampling, files and flags are the real ones.
"""

import doctest
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import launch, varied_reward
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import coldstart
from checkpoint import load_model
from coldstart import choose
from data import Processor, prompt_text, read_samples, style_of
from files import UserError
from rewards import REWARDS

REPOSITORY = Path(coldstart.__file__).parent
FEW = (
    *("--limit", 2, "--num-generations", 4),
    *("--max-completion-length", 8, "--batch-size", 5),
)


def test_doctests():
    results = doctest.testmod(coldstart)
    assert results.attempted >= 3 and results.failed == 0


# ----------------------------------------------------------------------------------------- choosing


def question(texts, right, kind="room size", formed=None):
    return {
        "type": kind,
        "completions": texts,
        "format": formed or [1.0] * len(texts),
        "accuracy": right,
    }


def test_every_rule_leaves_out_what_it_says():
    """Not well formed, not right enough, outside the band, twice the same, above the caps."""
    questions = [
        question(["a", "b", " a\n", "c"], [0.9, 0.8, 1.0, 0.7]),
        question(["w", "x"], [0.0, 1.0], formed=[0.0, 1.0]),
        question(["p", "q"], [1.0, 0.0]),
        question(["p", "q"], [1.0, 1.0]),
        question(["r", "s"], [1.0, 1.0], formed=[0.0, 1.0]),
    ]

    def kept(*rules):
        return choose(questions, *rules, seed=0)[0]

    assert kept(0, 1, 0.8, 9, None) == [
        (0, "a"),
        (0, "b"),
        (1, "x"),
        (2, "p"),
        (3, "p"),
        (3, "q"),
        (4, "s"),
    ]
    assert kept(0, 1, 0.8, 1, None) == [(0, "a"), (1, "x"), (2, "p"), (3, "p"), (4, "s")]
    assert kept(0, 1, 1.0, 9, None)[0] == (0, "a")  # its third completion, which says the same
    assert kept(0.6, 0.8, 0.8, 9, None) == [(0, "a"), (0, "b")]  # of 3/4, 1/2, 1/2, 1 and 1/2 right
    capped = kept(0, 1, 0.8, 9, 4)
    assert (
        len(capped) == 4 and capped == sorted(capped) and len({i for i, _ in capped}) == 4
    )  # first chains first
    assert kept(0, 1, 0.8, 9, 4) == capped and any(
        choose(questions, 0, 1, 0.8, 9, 4, seed)[0] != capped for seed in range(1, 9)
    )
    counts = choose(questions, 0.3, 0.6, 0.8, 9, None, 0)[1]["room size"]
    assert counts == {
        "questions": 5,
        "chains": 12,
        "well formed": 10,
        "accepted": 8,
        "in the band": 3,
        "kept": 3,
    }


@given(
    st.lists(
        st.lists(
            st.tuples(st.sampled_from("abc"), st.booleans(), st.sampled_from([0, 0.7, 0.8, 1])),
            min_size=1,
            max_size=5,
        ),
        max_size=6,
    ),
    st.integers(1, 3),
    st.none() | st.integers(1, 4),
)
def test_what_is_kept_is_right_distinct_and_within_the_caps(chains, per_question, per_type):
    questions = [
        question(
            [c[0] for c in q],
            [c[2] for c in q],
            kind=f"type {i % 2}",
            formed=[float(c[1]) for c in q],
        )
        for i, q in enumerate(chains)
    ]
    chosen, counts = choose(questions, 0, 1, 0.8, per_question, per_type, 0)
    assert len(set(chosen)) == len(chosen) == sum(
        c["kept"] for c in counts.values()
    ) and chosen == sorted(chosen, key=lambda pair: pair[0])
    for i, text in chosen:
        assert any(c[0] == text and c[1] and c[2] >= 0.8 for c in chains[i])
    for i, q in enumerate(chains):
        distinct = len({c[0] for c in q if c[1] and c[2] >= 0.8})
        mine = sum(pair[0] == i for pair in chosen)
        assert mine <= min(per_question, distinct) and (
            per_type or mine == min(per_question, distinct)
        )
    assert all(c["kept"] <= (per_type or 99) for c in counts.values())


# --------------------------------------------------------------------------------------------- runs


@pytest.fixture
def sample(call, rooms, tiny_model, tmp_path, monkeypatch):
    """Run it into a folder of its own; the chains' file, or None if it is not there."""
    monkeypatch.setitem(REWARDS, "format", lambda texts, sample: [1.0] * len(texts))
    monkeypatch.setitem(REWARDS, "accuracy", varied_reward)

    def run(
        *flags,
        out=tmp_path / "one" / "cold.jsonl",
        data=rooms / "train" / "spld_spatial_data.jsonl",
        model=tiny_model,
    ):
        out.parent.mkdir(exist_ok=True)
        call(coldstart, *FEW, "--model", model, "--data", data, "--out", out, *flags)
        return out

    return run


def test_rows_are_those_of_the_source_with_prompt_and_chain(sample, rooms):
    """The paper's fields, the source's picture paths, and the trainer reads a cold start."""
    out, source = sample(), rooms / "train" / "spld_spatial_data.jsonl"
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    sources = [json.loads(line) for line in source.read_text().splitlines()]
    answers = [
        json.loads(line)
        for line in (out.with_suffix(".samples") / "answers-rank0.jsonl").read_text().splitlines()
    ]
    said = {
        text.strip()
        for answer in answers
        for text, right in zip(answer["completions"], answer["accuracy"])
        if right >= 0.8
    }
    read = read_samples(out, source.parent / "images")
    assert len(rows) == len(read) > 3
    for row, sample_ in zip(rows, read):
        assert {"question_id", "prompt", "solution", "image", "data_type"} <= set(row) and row[
            "solution"
        ] in said
        assert {
            key: value for key, value in row.items() if key not in ("prompt", "solution")
        } in sources
        original = next(
            s
            for s in read_samples(source, source.parent / "images")
            if s.question == sample_.question and s.media == sample_.media
        )
        assert (
            row["prompt"] == prompt_text(original, "thinking") and style_of(sample_) == "thinking"
        )
    report = json.loads((out.with_suffix(".samples") / "report.json").read_text())
    assert sum(row["kept"] for row in report.values()) == len(rows)
    assert all(
        row["questions"] <= 2 and row["chains"] == 4 * row["questions"] for row in report.values()
    )


def test_choosing_anew_samples_nothing(sample, monkeypatch):
    """Other thresholds work on the same chains; with those of before the same file comes out."""
    out = sample()
    first = out.read_bytes()
    monkeypatch.setattr(coldstart, "sample_chains", lambda *_: pytest.fail("sampled again"))
    sample("--min-accuracy", 0.1, "--per-question", 3)
    assert len(out.read_bytes().splitlines()) > len(first.splitlines())
    sample()
    assert out.read_bytes() == first


def test_an_interrupted_run_goes_on(sample, tmp_path):
    """Cut in the middle of a line: only what is missing is sampled, and the result is the same."""
    out = sample()
    whole, answers = out.read_bytes(), out.with_suffix(".samples") / "answers-rank0.jsonl"
    out.unlink()
    answers.write_bytes(answers.read_bytes()[:-400])
    sample()
    assert out.read_bytes() == whole
    assert sample("--seed", 1, out=tmp_path / "other" / "cold.jsonl").read_bytes() != whole


def test_noise_belongs_to_the_row(rooms, tiny_model):
    """A row's chains are the same whichever rows are sampled beside it."""
    samples = read_samples(rooms / "train" / "spld_spatial_data.jsonl", rooms / "train" / "images")
    model = load_model(tiny_model, torch.float32)
    processor = Processor(tiny_model, model.config)
    args = SimpleNamespace(**coldstart.JUDGED, prompt_style="thinking", temperature=1.0, seed=0)
    args.num_generations, args.max_completion_length = 2, 8

    def chains(*rows):
        return coldstart.sample_chains(model, processor, samples, rows, args, "cpu")

    assert chains(2) == chains(1, 2)[1:]


@pytest.mark.slow
def test_two_processes_sample_as_one(sample, rooms, tiny_model, tmp_path):
    """Chains depend on seed, question and number only."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys\nsys.path[:0] = [{str(REPOSITORY)!r}, {str(Path(__file__).parent)!r}]\n"
        "import coldstart, conftest, rewards, runtime\n"
        "rewards.REWARDS['format'] = lambda texts, sample: [1.0] * len(texts)\n"
        "rewards.REWARDS['accuracy'] = conftest.varied_reward\n"
        "runtime.main_guard(coldstart.main)\n"
    )
    done = launch(
        driver,
        *FEW,
        "--model",
        tiny_model,
        "--data",
        rooms / "train" / "spld_spatial_data.jsonl",
        "--out",
        tmp_path / "two.jsonl",
        processes=2,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "two.jsonl").read_bytes() == sample().read_bytes()
    assert len(list((tmp_path / "two.samples").glob("answers-rank*.jsonl"))) == 2


# ---------------------------------------------------------------------------------------- bad input


def test_a_teacher_of_another_vocabulary_is_refused(sample, tiny_model, tmp_path):
    """More tokens in the tokenizer than in the model, as when files of two models were mixed."""
    teacher = shutil.copytree(tiny_model, tmp_path / "teacher")
    tokenizer = Tokenizer.from_file(str(teacher / "tokenizer.json"))
    tokenizer.add_tokens(["onemoreword"])
    tokenizer.save(str(teacher / "tokenizer.json"))
    with pytest.raises(
        UserError, match=r"teacher: tokenizer and model have other vocabularies: \d+ \w+ with"
    ):
        sample(model=teacher)


def test_a_file_of_someone_else_is_kept(sample, tmp_path):
    taken = tmp_path / "taken.jsonl"
    taken.write_text("thesis")
    with pytest.raises(UserError, match=r"taken.jsonl: exists already; give another --out"):
        sample(out=taken)
    assert taken.read_text() == "thesis" and not taken.with_suffix(".samples").exists()


def test_other_sampling_settings_do_not_mix(sample):
    sample()
    changed = "num_generations 4, now 3, temperature 1.0, now 0.5; give another --out"
    with pytest.raises(UserError, match=f"was begun with other settings: {changed}"):
        sample("--num-generations", 3, "--temperature", 0.5)


def test_nothing_kept_is_an_error(sample, tmp_path, monkeypatch, capsys):
    """After the table that shows why, and without an empty file for the trainer."""
    monkeypatch.setitem(REWARDS, "format", lambda texts, sample: [0.0] * len(texts))
    with pytest.raises(UserError, match="no chain was kept; the table above says why"):
        sample()
    assert (
        "well formed" in capsys.readouterr().out and not (tmp_path / "one" / "cold.jsonl").exists()
    )


def test_rows_without_a_checkable_answer_are_named(sample, rooms):
    with pytest.raises(
        UserError, match=r"spld_grounding_data.jsonl:1: localization row, expected a question"
    ):
        sample(data=rooms / "train" / "spld_grounding_data.jsonl")


@pytest.mark.parametrize(
    "flags, expected",
    (
        (["--num-generations", 0], "--num-generations is 0, expected a positive number"),
        (["--temperature", 0], "--temperature is 0.0, expected a positive number"),
        (["--min-accuracy", 1.5], "--min-accuracy is 1.5, expected 0 to 1"),
        (
            ["--difficulty", 0.9, 0.1],
            "--difficulty is 0.9 0.1, expected the lower share first",
        ),
        (["--per-typ", 3], "unknown argument --per-typ, did you mean --per-type?"),
        (
            ["--data", "a/x.jsonl", "b/y.jsonl"],
            "--data: files of several folders; give --images, where all pictures lie",
        ),
    ),
    ids=str,
)
def test_wrong_flags_are_one_line(sample, capsys, flags, expected):
    with pytest.raises(SystemExit) as error:
        sample(*flags)
    assert (
        error.value.code == 2
        and capsys.readouterr().err.splitlines()[-1] == f"coldstart.py: {expected}"
    )


def test_no_room_for_the_chains(sample):
    with pytest.raises(UserError, match="--max-completion-length 4090 does not fit"):
        sample("--max-completion-length", 4090)
