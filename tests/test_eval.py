"""eval.py from files to headline: six benchmarks as distributed, kills, shards, other engines."""

import itertools
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import keep_log_probs, launch
from test_benchmarks import LAYOUTS

import data
import eval as evaluation
import grpo
from benchmarks import BENCHES
from checkpoint import build_model, load_config, load_model, parse_config, save_model
from data import Processor, read_all
from files import UserError
from settings import PICTURES

REPO = Path(__file__).resolve().parents[1]


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def always(tiny_model, tmp_path_factory):
    """A model that gives one answer to everything.

    Layers write nothing, and the head maps each token to the next. The answer's tokens must differ
    from one another.
    """

    def make(answer):
        source = load_config(tiny_model).source | {"tie_word_embeddings": False}
        model = build_model(parse_config(source)).to_empty(device="cpu")
        given = load_model(tiny_model, torch.float32)
        processor = Processor(tiny_model, model.config)
        # An answer is encoded apart from the prompt, which ends in a new line.
        ids = [processor.tokenizer.encode(text).ids for text in ("\n", answer)]
        chain = [*itertools.chain(*ids), processor.special["<|im_end|>"]]
        assert len(set(chain)) == len(chain)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name != "lm_head.weight":
                    silent = name.startswith("model.") and name.endswith(
                        ("o_proj.weight", "down_proj.weight")
                    )
                    parameter.copy_(given.get_parameter(name) * (not silent))
            model.lm_head.weight.zero_()
            for token, following in itertools.pairwise(chain):
                model.lm_head.weight[following] = model.model.embed_tokens.weight[token]
        directory = tmp_path_factory.mktemp("always")
        save_model(directory, model.named_parameters(), model.config, tiny_model)
        return directory

    return make


HEADLINES = {  # benchmark -> the model's answer to everything, its score over the rows of LAYOUTS
    "vsibench": ("B 3", (0.6 + 0 + 0) / 3),  # 3 of 4 beds; A; the directions lack two levels
    "spbench-si": ("C 4", (0 + 1) / 2),
    "spbench-mv": ("C 96", (0.6 + 1) / 2),  # 120 cm, C
    "cvbench": ("C", ((1 + 0) / 2 + 0) / 2),
    "sparbench": ("B 1.2", (0.6 + 1 + 0 + 0) / 4),  # 1.5 m, B, a view change, A
    "viewspatial": ("B 3", 0.5),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_benchmark_runs_from_its_files_to_the_headline(name, always, call, tmp_path, capsys):
    """Real parquet, jpg and mp4 files, the real generation, and a headline computed by hand."""
    answer, headline = HEADLINES[name]
    LAYOUTS[name][0](tmp_path / "data")
    call(
        evaluation,
        "--model",
        always(answer),
        "--bench",
        name,
        "--data",
        tmp_path / "data",
        "--out",
        tmp_path / "out",
        "--prompt-style",
        "direct",
        "--num-frames",
        4,
        "--device",
        "cpu",
    )
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    rows = read_rows(tmp_path / "out" / "predictions.jsonl")
    assert scores["overall"] == pytest.approx(headline, abs=1e-12) and scores["n"] == len(rows)
    assert (scores["skipped"], scores["truncated"]) == (0, 0)
    samples, _ = evaluation.read_rows(name, tmp_path / "data", None)
    for row, sample in zip(rows, samples, strict=True):
        assert (row["id"], row["answer"], row["completion"]) == (sample.id, sample.answer, answer)
        assert len(row["vision_tokens"]) == len(sample.media) == row["prompt"].count("_pad|>")
        slices = 2 if sample.media[0].kind == "video" else 1  # of two frames
        assert row["vision_tokens"][0] == 4 * slices  # 56 x 56 pixels
    recipe = {
        "scorer": "spatialladder",
        "prompt_style": "direct",
        "num_frames": 4,
        "decoding": "greedy",
        "seed": 0,
        "max_pixels": 112 * 112,
        "min_pixels": 4 * 28 * 28,
    }
    assert recipe.items() <= scores["recipe"].items()
    # One key more or less, and no evaluation that was begun before goes on.
    others = {"bench", "blind_from", "data", "dtype", "images", "limit", "made_of", "model"}
    others |= {"max_completion_length", "predictions"}
    assert scores["recipe"].keys() == {*recipe, *others, *PICTURES}
    assert len(scores["recipe"]["made_of"]["model"]) == 16
    printed = capsys.readouterr().out
    assert f"{100 * headline:.1f}" in printed and str(BENCHES[name].paper["overall"][1]) in printed


def test_a_prompt_that_fits_is_answered(rooms, tiny_model):
    """Evaluation asks for no room behind it: a completion seldom has its full length."""
    [sample, *_] = read_all([rooms / "train" / "spld_spatial_data.jsonl"], None)
    model = load_model(tiny_model, torch.float32)
    processor = Processor(tiny_model, model.config)
    length = len(processor.example(sample, "direct", with_answer=False).ids)
    text = replace(model.config.text, max_position_embeddings=length)
    processor.config = replace(model.config, text=text)
    args = SimpleNamespace(prompt_style="direct", max_completion_length=2, temperature=1.0)
    [row] = evaluation.answer_rows(model, processor, [sample], [0], args, "cpu")
    assert row["truncated"] or row["completion"]
    with pytest.raises(UserError, match="--max-completion-length 2 does not fit behind"):
        grpo.sample_completions(model, processor, [sample], 1, None, args, "cpu", reserve=2)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_picture_reaches_the_answers(name, tiny_model, tmp_path, monkeypatch):
    """Inverting any one picture or frame of a sample changes the log-probs of what is decoded."""
    LAYOUTS[name][0](tmp_path)
    samples, _ = evaluation.read_rows(name, tmp_path, None)
    model = load_model(tiny_model, torch.float32)
    processor = Processor(tiny_model, model.config, num_frames=4)
    args = SimpleNamespace(prompt_style="thinking", max_completion_length=2, temperature=1.0)
    original, generate = data.to_patches, grpo.generate
    rollouts, shown = [], []

    def observed(*args, **options):
        rollouts.append(generate(*args, **options))
        return rollouts[-1]

    keep_log_probs(monkeypatch)
    monkeypatch.setattr(grpo, "generate", observed)

    def log_probs(row, changed=None):
        """changed: (which picture or video of the sample, which frame of it)."""
        shown.clear()
        places = itertools.count()

        def inverted(frames, size):
            place = next(places)
            shown.extend((place, i) for i in range(len(frames)))
            return original(
                [
                    frame.point(lambda v: 255 - v) if changed == (place, i) else frame
                    for i, frame in enumerate(frames)
                ],
                size,
            )

        monkeypatch.setattr(data, "to_patches", inverted)
        evaluation.answer_rows(model, processor, samples, [row], args, "cpu")
        return rollouts[-1].log_probs

    for row, sample in enumerate(samples):
        plain = log_probs(row)
        places = list(shown)
        assert len(places) == (4 if sample.media[0].kind == "video" else len(sample.media))
        assert torch.equal(plain, log_probs(row))
        for changed in places:
            assert not torch.equal(plain, log_probs(row, changed)), (
                f"{changed} of {sample.where} is not seen"
            )


# ----------------------------------------------------------------------------- interrupted, sharded


@pytest.fixture
def flags(tiny_model, rooms, tmp_path):
    """Flags of an evaluation whose answers differ from row to row.

    Its model's layers outweigh its embeddings.
    """
    model, folder = load_model(tiny_model), tmp_path / "loud"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(30 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1)
    save_model(folder, model.named_parameters(), model.config, tiny_model)
    return [
        "--model",
        folder,
        "--bench",
        "rooms",
        "--data",
        rooms / "test",
        "--prompt-style",
        "direct",
        "--max-completion-length",
        6,
        "--batch-size",
        4,
    ]


def test_an_interrupted_evaluation_gives_the_same_predictions(flags, call, tmp_path, monkeypatch):
    """Whatever a kill leaves: nothing, some lines, a line cut anywhere, or all but the scores."""
    call(evaluation, *flags, "--out", tmp_path / "whole")
    whole = (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    answers = (tmp_path / "whole" / "answers-rank0.jsonl").read_bytes()
    assert len({row["completion"] for row in map(json.loads, whole.splitlines())}) > 1
    character = next(
        i for i, byte in enumerate(answers) if byte >= 0x80
    )  # the first byte of several
    lines = [i + 1 for i, byte in enumerate(answers) if byte == ord("\n")]
    assert len(lines) > 8
    for n, cut in enumerate(
        (None, 0, 1, character + 1, lines[2], lines[3], lines[4] - 1, lines[4] + 7, len(answers))
    ):
        out = tmp_path / str(n)
        out.mkdir()
        (out / "config_run.json.tmp").write_text("{")
        if cut is not None:
            shutil.copy(tmp_path / "whole" / "config_run.json", out)
            (out / "answers-rank0.jsonl").write_bytes(answers[:cut])
            (out / "predictions.jsonl.tmp").write_bytes(whole[:100])
        call(evaluation, *flags, "--out", out)
        assert (out / "predictions.jsonl").read_bytes() == whole, f"cut at {cut}"
    monkeypatch.setattr(evaluation, "answer_rows", lambda *_: pytest.fail("answered again"))
    (tmp_path / "whole" / "scores.json").unlink()
    call(evaluation, *flags, "--out", tmp_path / "whole")
    assert (tmp_path / "whole" / "predictions.jsonl").read_bytes() == whole


@pytest.mark.slow
def test_ranks_share_an_evaluation_and_survive_a_kill(flags, tmp_path):
    """Two processes give what one gives, and so does one that goes on where two were killed."""
    flags = [*flags, "--batch-size", 1, "--max-completion-length", 64]
    assert launch(REPO / "eval.py", *flags, "--out", tmp_path / "one").returncode == 0
    assert launch(REPO / "eval.py", *flags, "--out", tmp_path / "two", processes=2).returncode == 0
    whole = (tmp_path / "one" / "predictions.jsonl").read_bytes()
    assert (tmp_path / "two" / "predictions.jsonl").read_bytes() == whole
    out = tmp_path / "killed"
    run = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            REPO / "eval.py",
            *map(str, flags),
            "--out",
            out,
        ],
        stderr=subprocess.DEVNULL,
    )
    while (
        run.poll() is None
        and sum(path.stat().st_size for path in out.glob("answers-rank*.jsonl")) < 2000
    ):
        time.sleep(0.02)
    run.terminate()  # torchrun kills its workers, which do not hear of it
    run.wait()
    assert not (out / "predictions.jsonl").exists() and list(out.glob("answers-rank*.jsonl"))
    assert launch(REPO / "eval.py", *flags, "--out", out).returncode == 0
    assert (out / "predictions.jsonl").read_bytes() == whole


def test_an_output_directory_holds_one_evaluation(flags, always, call, tmp_path):
    """Other flags or other weights under the same name would mix two evaluations in one score."""
    model = tmp_path / "model"
    shutil.copytree(flags[1], model)
    flags = ["--model", model, *flags[2:], "--limit", 1, "--out", tmp_path / "out"]
    call(evaluation, *flags)
    with pytest.raises(
        UserError, match="was begun with other settings: seed 0, now 1; give another"
    ):
        call(evaluation, *flags, "--seed", 1)
    shutil.copytree(always("3"), model, dirs_exist_ok=True)
    expected = f"was begun with other settings: other contents of model {model}; give another"
    with pytest.raises(UserError, match=expected):
        call(evaluation, *flags)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(UserError, match="full: not empty; give another --out"):
        call(evaluation, *flags[:-1], tmp_path / "full")


def test_a_limit_draws_the_same_rows_for_a_seed(rooms):
    samples, extras = evaluation.read_rows("rooms", rooms / "train", None)
    drawn = [
        [s.where for s in evaluation.subset(samples, extras, 2, seed)[0]] for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    kinds = [s.question_type for s in samples]
    expected = sum(min(2, kinds.count(kind)) for kind in set(kinds))
    assert len(drawn[0]) == expected and drawn[0] == [
        s.where for s in samples if s.where in drawn[0]
    ]


# ------------------------------------------------------------------------------------ other engines


BOXES = [{"bbox_2d": [0, 0, 10, 10], "label": "bed"}, {"bbox_2d": [20, 0, 30, 10], "label": "desk"}]
HALF = "```json\n" + json.dumps([BOXES[0] | {"bbox_2d": [0, 0, 10, 5]}]) + "\n```"
OURS = [
    {
        "question_id": 1,
        "question": "How many beds?",
        "answer": "4",
        "question_type": "object count",
        "options": None,
    },
    {
        "question_id": 2,
        "question": "Which is nearer?",
        "answer": "B",
        "question_type": "relative distance",
        "options": ["A. bed", "B. desk"],
    },
    {"question_id": 2, "question": "Where is the bed?", "answer": BOXES},
]
GIVEN = [
    {
        "id": 1,
        "question_type": "object count",
        "completion": "<think>x</think><answer>3</answer>",
        "answer": 4,
    },
    {
        "id": "2",
        "question_type": "relative distance",
        "completion": "<answer>(B) desk</answer>",
        "answer": "B",
    },
    {"id": "2", "question_type": "localization", "completion": HALF},
]


@pytest.fixture
def ours(tmp_path):
    """Three rows of our own kind and another engine's answers to them; scores need no pictures."""
    rows = [row | {"image": ["gone.jpg"], "data_type": "single_image"} for row in OURS]
    for name, lines in (("rows", rows), ("given", GIVEN)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return [
        "--bench",
        tmp_path / "rows.jsonl",
        "--predictions",
        tmp_path / "given.jsonl",
        "--out",
        tmp_path / "out",
    ]


def test_another_engines_answers_are_scored_without_a_model(ours, call, tmp_path, capsys):
    """By hand: MRA of 3 for 4, a right letter, half a box of two; a missing row counts as wrong."""
    call(evaluation, *ours)
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["overall"] == pytest.approx((0.6 + 1) / 2) and scores["skipped"] == 0
    found = {"mean_iou": 0.25, "precision": 1.0, "recall": 0.5, "valid_json": 1.0, "n": 1}
    assert scores["localization"] | found == scores["localization"]
    assert "count as wrong" not in capsys.readouterr().out
    (tmp_path / "given.jsonl").write_text(json.dumps(GIVEN[0]) + "\n")
    call(evaluation, *ours)
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["overall"] == pytest.approx(0.6 / 2) and scores["skipped"] == 2
    assert scores["localization"]["valid_json"] == 0.0
    assert "2 samples without a completion: they count as wrong." in capsys.readouterr().out


def test_our_own_predictions_score_the_same_as_another_engines(flags, call, tmp_path):
    call(evaluation, *flags, "--out", tmp_path / "model")
    call(
        evaluation,
        *flags[2:],
        "--predictions",
        tmp_path / "model" / "predictions.jsonl",
        "--out",
        tmp_path / "file",
    )
    first, second = (
        json.loads((tmp_path / name / "scores.json").read_text()) for name in ("model", "file")
    )
    assert first["types"] == second["types"] and first["localization"] == second["localization"]
    assert (first["overall"], first["low"], first["high"]) == (
        second["overall"],
        second["low"],
        second["high"],
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ("{", "given.jsonl:4: not JSON"),
        (
            {"id": 3, "completion": ""},
            "given.jsonl:4: question_type is missing, expected str",
        ),
        (
            {"id": 1, "question_type": "room size", "completion": ""},
            "given.jsonl:4: id '1' of 'room size' is not in the bench",
        ),
        (GIVEN[0], "given.jsonl:4: id '1' of 'object count' stands twice"),
    ],
)
def test_malformed_predictions_are_one_line(change, message, ours, call, tmp_path):
    with open(tmp_path / "given.jsonl", "a") as file:
        file.write(change if isinstance(change, str) else json.dumps(change))
    with pytest.raises(UserError) as error:
        call(evaluation, *ours)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "row, answer, message",
    [
        (
            0,
            "5",
            "given.jsonl:1: answer is '5', expected '4' as in the benchmark",
        ),  # ids that count from elsewhere
        (2, "B", """given.jsonl:3: answer is 'B', expected a list of boxes"""),
    ],
)
def test_predictions_to_other_questions_are_refused(row, answer, message, ours, call, tmp_path):
    rows = [given | ({"answer": answer} if n == row else {}) for n, given in enumerate(GIVEN)]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(given) + "\n" for given in rows))
    with pytest.raises(UserError) as error:
        call(evaluation, *ours)
    assert str(error.value).endswith(message)


@pytest.mark.parametrize("name", ("vsibench", "sparbench"))
def test_the_official_scorer_says_that_the_prompt_is_ours(name, call, tmp_path, capsys):
    """The answer is taken out of a chain first: else the first token would be <think>."""
    LAYOUTS[name][0](tmp_path / "data")
    rows = [
        {
            "id": s.id,
            "question_type": s.question_type,
            "completion": f"<think>x</think><answer>{s.answer}</answer>",
        }
        for s in evaluation.read_rows(name, tmp_path / "data", None)[0]
    ]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(
        evaluation,
        "--bench",
        name,
        "--data",
        tmp_path / "data",
        "--predictions",
        tmp_path / "given.jsonl",
        "--scorer",
        "official",
        "--out",
        tmp_path / "out",
    )
    assert f"{name}, official scorer, our prompt" in capsys.readouterr().out
    overall = json.loads((tmp_path / "out" / "scores.json").read_text())["overall"]
    assert overall == pytest.approx(
        {"vsibench": (1 + 1 + 1 / 3) / 3, "sparbench": 1.0}[name]
    )  # easy of three levels


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--bench", "vsi-bench", "--data", "D"],
            "vsi-bench: no such file; --bench takes vsibench, spbench-si, spbench-mv, "
            "cvbench, sparbench, viewspatial, rooms, or a jsonl file",
        ),
        (
            ["--bench", "cvbench", "--data", "D"],
            "cvbench: no test_2d.parquet in D; it comes with nyu-visionx/CV-Bench",
        ),
        (["--bench", "rooms", "--data", "D"], "spld_grounding_data.jsonl: no such file"),
        (["--bench", "cvbench"], "--data is missing"),
        (["--bench", "rooms", "--data", "D", "--limit", 0], "--limit is 0"),
        (["--bench", "rooms", "--data", "D", "--batch-size", 0], "--batch-size is 0"),
        (
            ["--bench", "rooms", "--data", "D", "--max-pixels", -1],
            "--max-pixels is -1, expected a positive number",
        ),
        (
            ["--bench", "rooms", "--data", "D", "--num-frames", 0],
            "--num-frames is 0, expected a positive number",
        ),
        (
            ["--bench", "cvbench", "--data", "D", "--scorer", "official"],
            "--scorer official: cvbench has spatialladder",
        ),
    ],
)
def test_user_mistakes_are_one_line_before_the_model_is_read(
    flags, message, call, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(evaluation, "load_model", lambda *_: pytest.fail("the model was read"))
    monkeypatch.chdir(tmp_path)
    Path("D").mkdir()
    with pytest.raises((UserError, SystemExit)) as error:
        call(evaluation, "--model", "M", "--out", "O", *flags)
    text = str(error.value) if error.type is UserError else capsys.readouterr().err.strip()
    assert message in text and "\n" not in text and not Path("O").exists()


@pytest.mark.parametrize(
    "name, broken, place",
    [
        ("cvbench", None, "test_3d.parquet:1: picture given as bytes: not a readable picture"),
        ("viewspatial", "val2017/000000001.jpg", "ViewSpatial-Bench.json:2: "),
        ("vsibench", "arkitscenes/41069025.mp4", "test-00000-of-00001.parquet:3: "),
    ],
)
def test_an_unreadable_picture_or_video_names_its_row(
    name, broken, place, tiny_model, call, tmp_path, monkeypatch
):
    """The authors leave such rows out, or ask them without the picture."""
    if broken is None:
        monkeypatch.setattr("test_benchmarks.jpg", lambda: b"no picture")
    LAYOUTS[name][0](tmp_path / "data")
    if broken:
        (tmp_path / "data" / broken).write_bytes(b"nothing")
    with pytest.raises(UserError) as error:
        call(
            evaluation,
            "--model",
            tiny_model,
            "--bench",
            name,
            "--data",
            tmp_path / "data",
            "--out",
            tmp_path / "out",
            "--max-completion-length",
            2,
            "--batch-size",
            1,
        )
    assert (
        place in str(error.value)
        and "not a readable" in str(error.value)
        and "\n" not in str(error.value)
    )
    assert not (tmp_path / "out" / "predictions.jsonl").exists()


def test_chats_are_scored_word_for_word(always, call, tmp_path):
    """The prompt is all turns before the last, which is the answer; types are those of the rows."""

    def chat(answer, *before, **more):
        return {
            "messages": [
                *before,
                {"role": "user", "content": "Count."},
                {"role": "assistant", "content": answer},
            ],
            **more,
        }

    earlier = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}
    rows = [
        chat("C 4"),
        chat("C 5"),
        chat("C 4 ", *earlier, question_type="count"),
        chat("c 4", question_type="point"),
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(
        evaluation,
        "--model",
        always("C 4"),
        "--bench",
        tmp_path / "chat.jsonl",
        "--out",
        tmp_path / "out",
        "--prompt-style",
        "direct",
        "--max-completion-length",
        8,
    )
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert {kind: part["score"] for kind, part in scores["types"].items()} == {
        "chat": 0.5,
        "chat: count": 1.0,
        "chat: point": 0.0,
    }
    prompts = [row["prompt"] for row in read_rows(tmp_path / "out" / "predictions.jsonl")]
    assert [prompt.count("Hello") for prompt in prompts] == [0, 0, 1, 0] and all(
        "Hi" not in p for p in prompts[:2]
    )


def test_prompts_of_a_file_are_taken(flags, call, tmp_path):
    (tmp_path / "prompts.json").write_text(
        '{"thinking choice": "Look.\\n{question}\\n{options}", "system": "Be brief."}'
    )
    call(
        evaluation,
        *flags,
        "--prompt-style",
        "thinking",
        "--limit",
        1,
        "--prompts",
        tmp_path / "prompts.json",
        "--out",
        tmp_path / "out",
    )
    for row in read_rows(tmp_path / "out" / "predictions.jsonl"):
        assert row["prompt"].startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
        assert ("Look.\n" in row["prompt"]) == (
            row["question_type"].split()[0] in ("relative", "appearance")
        )
    (tmp_path / "prompts.json").write_text('{"thinking": "{question}"}')
    with pytest.raises(
        UserError,
        match=r"prompts.json: unknown prompt 'thinking', expected one of system, localize, direct",
    ):
        call(
            evaluation, *flags, "--prompts", tmp_path / "prompts.json", "--out", tmp_path / "other"
        )
