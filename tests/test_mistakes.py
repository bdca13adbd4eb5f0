"""What users get wrong, for every script: one line on stderr that names what and where, exit code 2, nothing written.

Each row is (script, its command line, what the line must hold). Words in braces are paths of `places`: {rooms} and
{model} are good, everything else is broken in one way. main is called in this process, as a start costs seconds.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import bench
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ask
import eval as evaluation
import grpo
import ladder
import train_sft
from data import read_samples
from files import UserError
from look import check, compare, probes, report
from rooms import scenes, tiny
from runtime import main_guard

SFT, RL, EVAL = (
    "train_sft.py --stage 1 --model {model}",
    "grpo.py --model {model}",
    "eval.py --model {model}",
)
PROBE = "probes.py hints --model {model}"
ROW = {
    "question_id": 1,
    "question": "Where is the lamp?",
    "image": ["a.jpg"],
    "data_type": "single_image",
    "answer": [{"bbox_2d": [1, 2, 30, 40], "label": "lamp"}],
}
ASKED = {
    "question_id": 1,
    "question": "Which?",
    "question_type": "relative distance",
    "options": ["A. lamp", "B. bed"],
    "answer": "B",
    "image": ["a.jpg"],
    "data_type": "single_image",
}
USER, SAID = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}

ROWS = {  # name of a data file -> (what stands in its second line, what the error must hold)
    "not_json": ("{'question': 1}", "rows.jsonl:2: not JSON"),
    "not_an_object": ([1, 2], "rows.jsonl:2: expected an object, found list"),
    "not_utf8": (b'{"question": "caf\xe9"}', "rows.jsonl:2: not JSON"),
    "half_a_surrogate": (b'{"question": "\\ud800"}', "rows.jsonl:2: not JSON"),
    "no_question": ({**ROW, "question": None}, "rows.jsonl:2: question is null, expected str"),
    "no_image": ({**ROW, "image": []}, "rows.jsonl:2: image is [], expected a list of paths"),
    "image_is_text": ({**ROW, "image": "a.jpg"}, 'rows.jsonl:2: image is "a.jpg", expected list'),
    "data_type": ({**ROW, "data_type": "picture"}, "rows.jsonl:2: data_type is 'picture'"),
    "two_pictures": ({**ROW, "image": ["a.jpg", "b.jpg"]}, "rows.jsonl:2: 1 boxes in 2 pictures"),
    "box_of_three": (
        {**ROW, "answer": [{"bbox_2d": [1, 2, 3], "label": "lamp"}]},
        "expected bbox_2d with 4 numbers",
    ),
    "box_inside_out": (
        {**ROW, "answer": [{"bbox_2d": [9, 2, 3, 4], "label": "lamp"}]},
        "expected 0 <= x1 < x2",
    ),
    "no_label": (
        {**ROW, "answer": [{"bbox_2d": [1, 2, 3, 4]}]},
        "expected bbox_2d with 4 numbers and a label",
    ),
    "question_type": (
        {**ASKED, "question_type": "colour"},
        "rows.jsonl:2: question_type is 'colour', expected one of",
    ),
    "letter": (
        {**ASKED, "answer": "C"},
        "rows.jsonl:2: answer is 'C', expected the letter of one of the options",
    ),
    "number": (
        {**ASKED, "question_type": "object count", "answer": "four"},
        "rows.jsonl:2: answer is 'four', expected a number",
    ),
    "options": (
        {**ASKED, "options": "A, B"},
        'rows.jsonl:2: options is "A, B", expected a list of texts',
    ),
    "seconds": (
        {**ASKED, "data_type": "video", "seconds_per_frame": -1},
        "seconds_per_frame is -1, expected a positive",
    ),
    "role": (
        {"messages": [{"role": "robot", "content": "x"}, SAID]},
        "rows.jsonl:2: role is 'robot'",
    ),
    "no_answer": (
        {"messages": [USER]},
        "rows.jsonl:2: messages must end with the assistant's turn",
    ),
    "part": (
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}, SAID]},
        "rows.jsonl:2: content part",
    ),
}
MODELS = {  # name of a model directory -> (what is done to a good one, what the error must hold)
    "empty": (
        lambda d: [p.unlink() for p in d.iterdir()],
        "not a model directory (no config.json in it)",
    ),
    "config_torn": (
        lambda d: (d / "config.json").write_text('{"model_type": '),
        "config.json: not readable as JSON",
    ),
    "config_list": (
        lambda d: (d / "config.json").write_text("[]"),
        "config.json: expected a JSON object, found list",
    ),
    "other_model": (
        lambda d: change(d, model_type="llama"),
        "model_type is 'llama', expected 'qwen2_5_vl'",
    ),
    "rope": (
        lambda d: change(d, rope_scaling={"type": "yarn"}),
        "rope type 'yarn' is not supported",
    ),
    "sliding": (lambda d: change(d, use_sliding_window=True), "sliding windows are not supported"),
    "heads": (lambda d: change(d, num_attention_heads=7), "7 heads do not divide width"),
    "width": (
        lambda d: change(d, hidden_size="wide"),
        "hidden_size is 'wide', expected something like",
    ),
    "dtype": (lambda d: change(d, torch_dtype="int4"), "torch_dtype is 'int4'"),
    "no_weights": (
        lambda d: (d / "model.safetensors").unlink(),
        "no model.safetensors and no model.safetensors.index.json",
    ),
    "torn_weights": (
        lambda d: os.truncate(d / "model.safetensors", 5000),
        "model.safetensors: not a readable safetensors file",
    ),
    "missing": (
        lambda d: tensors(d, lambda t: t.pop("model.norm.weight")),
        "missing model.norm.weight",
    ),
    "extra": (lambda d: tensors(d, lambda t: t.update(more=torch.ones(2))), "unexpected more"),
    "shape": (
        lambda d: tensors(d, lambda t: t.update({"model.norm.weight": torch.ones(3)})),
        "model.norm.weight has shape [3]",
    ),
    "integers": (
        lambda d: tensors(
            d, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].long()})
        ),
        "stored as I64",
    ),
    "index": (
        lambda d: (d / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "b.safetensors"}}'
        ),
        "names files that do not exist: b.safetensors",
    ),
    "index_list": (
        lambda d: (d / "model.safetensors.index.json").write_text("[]"),
        "expected an object with a 'weight_map'",
    ),
    "no_tokenizer": (
        lambda d: (d / "tokenizer.json").unlink(),
        "tokenizer.json: not a readable tokenizer",
    ),
    "torn_tokenizer": (
        lambda d: os.truncate(d / "tokenizer.json", 900),
        "tokenizer.json: not a readable tokenizer",
    ),
    "no_limits": (
        lambda d: (d / "preprocessor_config.json").unlink(),
        "preprocessor_config.json: no such file",
    ),
    "no_generation": (
        lambda d: (d / "generation_config.json").unlink(),
        "generation_config.json: no such file",
    ),
    "torn_limits": (
        lambda d: (d / "preprocessor_config.json").write_text("{"),
        "preprocessor_config.json: not readable as JSON",
    ),
}
COMMANDS = (
    # flags of the trainers
    ("train_sft.py", "the following arguments are required: --stage"),
    ("train_sft.py --stage 7", "argument --stage: invalid choice: '7'"),
    (SFT + " --learning-rat 1", "unknown argument --learning-rat, did you mean --learning-rate?"),
    (SFT + " --beta 1", "unknown argument --beta"),
    (SFT + " --max-steps 0", "--max-steps is 0, expected a positive number"),
    (SFT + " --max-steps ten", "argument --max-steps: invalid int value: 'ten'"),
    (SFT + " --learning-rate nan", "--learning-rate is nan, expected a positive number"),
    (SFT + " --betas 0.9", "--betas has 1 numbers, expected 2"),
    (SFT + " --seed -1", "--seed is -1, expected 0 to inf"),
    (SFT + " --workers -1", "--workers is -1, expected 0 to inf"),
    (SFT + " --betas 0.9 1.5", "--betas is 1.5, expected 0 to 0.9999"),
    (SFT + " --reward-weights 1 1", "unknown argument --reward-weights"),
    (SFT + " --device tpu", "argument --device: invalid choice: 'tpu'"),
    (SFT + " --dtype float16", "argument --dtype: invalid choice: 'float16'"),
    (SFT + " --data {rooms}/none.jsonl", "none.jsonl: not readable"),
    (SFT + " --data {rooms}", ": not readable"),
    (SFT + " --data {void}", "void.jsonl: no rows in it"),
    (
        SFT + " --data {grounding} --replay {rooms}/none.jsonl --replay-ratio 0.5",
        "none.jsonl: not readable",
    ),
    (
        SFT + " --data {grounding} --min-pixels 50000 --max-pixels 10000",
        "--min-pixels is 50000, above --max-pixels 10000",
    ),
    (SFT + " --data {grounding} --prompts {void}", "void.jsonl: not readable as JSON"),
    (SFT + " --data {grounding} --prompts {prompts}", "prompts.json: unknown prompt 'hello'"),
    (
        SFT + " --data {grounding} --prompts {slots}",
        "slots.json: prompt 'localize' lacks the slot {question}",
    ),
    (SFT + " --data {grounding} --resume {rooms}", "rooms: no trainer state there"),
    (SFT + " --data {grounding} --dry-run 4", "--dry-run is '4', expected GPUs x GB"),
    (
        "train_sft.py --stage 1 --preset paper --out {out}",
        "preset paper has no default for --model; give it",
    ),
    (
        "train_sft.py --stage 1 --data {grounding} --model {rooms}/none",
        "none: not a model directory",
    ),
    (SFT + " --data {grounding} --out {void}", "void.jsonl: cannot write there"),
    (SFT + " --data {grounding} --out {void}/out", "cannot write there"),
    (SFT + " --data {grounding} --out {rooms}", "rooms: not empty; continue it with --resume auto"),
    (
        SFT + " --data {grounding} --out /sys/spatialladder",
        "/sys/spatialladder: cannot write there",
    ),
    (RL + " --data {spatial} --num-generations 1", "--num-generations is 1, expected at least 2"),
    (RL + " --data {spatial} --temperature 0", "--temperature is 0.0, expected a positive number"),
    (
        RL + " --data {spatial} --temperature inf",
        "--temperature is inf, expected a positive number",
    ),
    (RL + " --data {spatial} --loss-type bnpo", "that is --loss-type dapo"),
    (
        RL + " --data {spatial} --num-iterations 0",
        "--num-iterations is 0, expected a positive number",
    ),
    (RL + " --data {spatial} --epsilon -1", "--epsilon is -1.0, expected 0 to inf"),
    (RL + " --data {spatial} --reward-weights nan 1", "--reward-weights is nan, expected 0 to inf"),
    (
        RL + " --data {spatial} --dry-run 99x80",
        "--prompts-per-step is 8, expected at least one for each of the 99 GPUs",
    ),
    (RL + " --data {void}", "void.jsonl: no rows in it"),
    (RL + " --data {typeless}", "no accuracy reward for question_type ''"),
    # evaluation
    ("eval.py --bench rooms --data {rooms} --out {out}", "--model is missing"),
    (EVAL + " --out {out}", "the following arguments are required: --bench"),
    (EVAL + " --bench rooms --out {out}", "--data is missing"),
    (EVAL + " --bench rooms --data {rooms}/test", "--out is missing"),
    (
        EVAL + " --bench rooms --data {rooms} --out {out}",
        "spld_grounding_data.jsonl: no such file; --bench takes",
    ),
    (EVAL + " --bench vsibenhc --out {out}", "vsibenhc: no such file; --bench takes"),
    (EVAL + " --bench all --data {rooms} --out {out}", "no benchmark in it; expected folders"),
    (EVAL + " --bench rooms --data {rooms}/test --out {rooms}", "not empty; give another --out"),
    (
        EVAL + " --bench rooms --data {rooms}/test --out {out} --limit 0",
        "--limit is 0, expected a positive number",
    ),
    (
        EVAL + " --bench rooms --data {rooms}/test --out {out} --limits 3",
        "unknown argument --limits, did you mean --limit?",
    ),
    (
        EVAL + " --bench rooms --data {rooms}/test --out {out} --num-frames 0",
        "--num-frames is 0, expected",
    ),
    (
        EVAL + " --bench rooms --data {rooms}/test --out {out} --predictions {void}/none",
        "not readable",
    ),
    (EVAL + " --bench {typeless} --out {out}", "there is nothing to score by"),
    # beside the path
    ("ask.py {rooms}/none Where? {picture}", "not a model directory"),
    ("ask.py {model} Where? {rooms}/none.jpg", "none.jpg: not a readable picture"),
    ("ask.py {model} Where? {void}", "void.jsonl: not a readable picture"),
    ("ask.py {model}", "the following arguments are required: question"),
    ("tiny.py --data {rooms} --out {out}", "no *_data.jsonl in it"),
    ("tiny.py --data {rooms}/train --out {out} --grow {rooms}/none", "none: not a model directory"),
    ("tiny.py --out {out}", "the following arguments are required: --data"),
    ("scenes.py", "the following arguments are required: --out"),
    ("scenes.py --out {out} --scenes -1", "--scenes is -1, expected"),
    ("scenes.py --out {out} --size 100", "size"),
    ("scenes.py --out {out} --tasks plain", "argument --tasks: invalid choice: 'plain'"),
    ("scenes.py --out {model} --scenes 4", "model"),
    ("check.py look {grounding}", "argument command: invalid choice: 'look'"),
    ("check.py check {grounding} --max-tokens 9", "--max-tokens needs --model"),
    ("check.py check {rooms}/none.jsonl", "none.jsonl: not readable"),
    ("check.py check {grounding} --model {rooms}/none", "none: not a model directory"),
    ("report.py {rooms}/none", "none"),
    ("report.py show {grounding} --model {model} --row 99999 --out {out}", "99999"),
    ("report.py show {grounding} --model {rooms}/none --row 1 --out {out}", "none"),
    ("bench.py load", "load needs --model, a model directory"),
    ("bench.py walk", "argument what: invalid choice: 'walk'"),
    ("ladder.py --preset paper", "--preset paper needs --model and --data"),
    ("ladder.py --preset huge", "argument --preset: invalid choice: 'huge'"),
    ("ladder.py --out {rooms}", "holds something else"),
    ("ladder.py --out {void}", "void.jsonl"),
    ("compare.py {rooms} {model} {rooms}", "a ladder of the seed of"),
    ("compare.py {rooms}/none", "no such file; climb it with: python ladder.py"),
    ("probes.py look {rooms}", "argument what: invalid choice: 'look'"),
    ("probes.py hints", "expected either the directory of a ladder or --model"),
    (
        "probes.py hints {rooms} --model {model}",
        "expected either the directory of a ladder or --model",
    ),
    ("probes.py hints {rooms}", "rooms: no ladder there; climb one with: python ladder.py --out"),
    (PROBE + " --out {out}", "--model needs --data"),
    (PROBE + " --data {rooms}/train", "--model needs --out"),
    (PROBE + " --data {rooms}/none --out {out}", "none: not readable"),
    (PROBE + " --data {rooms} --out {out}", "spld_grounding_data.jsonl: not readable"),
    (
        PROBE + " --data {spatial} --out {out}",
        "nothing to ask for hints; expected a question of relative direction",
    ),
    (
        "probes.py entropy --model {model} --data {grounding} --out {out}",
        "nothing to ask for entropy; expected questions with",
    ),
    ("probes.py hints --model {rooms}/none --data {rooms}/train --out {out}", "none"),
    (PROBE + " --data {rooms}/train --out {void}", "void.jsonl: cannot write results"),
    (
        PROBE + " --data {rooms}/train --out {out} --limit 0",
        "--limit is 0, expected a positive number",
    ),
    (PROBE + " --data {rooms}/train --out {out} --tolerance -1", "--tolerance is -1.0, expected 0"),
    (
        PROBE + " --data {rooms}/train --out {out} --layer 1",
        "unknown argument --layer, did you mean --layers?",
    ),
    (
        PROBE + " --data {rooms}/train --out {out} --num-generations 1",
        "--num-generations is 1, expected at least 2",
    ),
    (
        "probes.py attention --model {model} --data {rooms}/train --out {out} --heads 0 9",
        "--heads is 9, expected 0 to 3",
    ),
    ("ladder.py --nproc-per-node 0 --out {out}", "--nproc-per-node is 0, expected"),
    *((SFT + f" --data {{rows}}/{name}/rows.jsonl", said) for name, (_, said) in ROWS.items()),
    *(
        (f"train_sft.py --stage 1 --data {{grounding}} --model {{models}}/{name}", said)
        for name, (_, said) in MODELS.items()
    ),
)
SCRIPTS = {
    "train_sft.py": train_sft,
    "grpo.py": grpo,
    "eval.py": evaluation,
    "ask.py": ask,
    "tiny.py": tiny,
    "check.py": check,
    "scenes.py": scenes,
    "report.py": report,
    "bench.py": bench,
    "ladder.py": ladder,
    "compare.py": compare,
    "probes.py": probes,
}


def change(directory, **values):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | values))


def tensors(directory, alter):
    weights = load_file(directory / "model.safetensors")
    alter(weights)
    save_file(weights, directory / "model.safetensors")


@pytest.fixture(scope="module")
def places(rooms, tiny_model, tmp_path_factory):
    """What the braces stand for."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name, (row, _) in ROWS.items():
        (folder / "rows" / name).mkdir(parents=True)
        row = (
            row
            if isinstance(row, bytes)
            else (row if isinstance(row, str) else json.dumps(row)).encode()
        )
        (folder / "rows" / name / "rows.jsonl").write_bytes(
            json.dumps(ROW).encode() + b"\n" + row + b"\n"
        )
    for name, (breaks, _) in MODELS.items():
        shutil.copytree(tiny_model, folder / "models" / name)
        breaks(folder / "models" / name)
    (folder / "void.jsonl").touch()
    (folder / "prompts.json").write_text('{"hello": "?"}')
    (folder / "slots.json").write_text('{"localize": "Boxes, please."}')
    (folder / "typeless.jsonl").write_text(
        json.dumps(ROW | {"answer": "yes", "solution": "It is."}) + "\n"
    )
    train = rooms / "train"
    return {
        "rooms": rooms,
        "model": tiny_model,
        "rows": folder / "rows",
        "models": folder / "models",
        "void": folder / "void.jsonl",
        "prompts": folder / "prompts.json",
        "slots": folder / "slots.json",
        "typeless": folder / "typeless.jsonl",
        "grounding": train / "spld_grounding_data.jsonl",
        "spatial": train / "spld_spatial_data.jsonl",
        "cold": train / "spld_coldstart_data.jsonl",
        "picture": next((train / "images").glob("*/*.jpg")),
    }


def files_of(*folders):
    return {
        path: path.stat().st_mtime_ns
        for folder in folders
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    "command, expected",
    COMMANDS,
    ids=[f"{i} {command[:60]}" for i, (command, _) in enumerate(COMMANDS)],
)
def test_a_mistake_is_one_line(monkeypatch, capfd, call, places, tmp_path, command, expected):
    """Exit code 2, one line on stderr that names what and where, no traceback, and no file written or touched."""
    monkeypatch.chdir(tmp_path)
    before = files_of(
        *{str(path) for path in places.values() if path.is_dir()}, places["void"].parent
    )
    script, *flags = [word.format(**places, out=tmp_path / "out") for word in command.split()]
    if script in ("train_sft.py", "grpo.py") and "--out" not in flags:
        flags += ["--out", str(tmp_path / "out")]
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit) as error:
        call(main_of(SCRIPTS[script]), *flags)
    lines = capfd.readouterr().err.splitlines()
    assert error.value.code == 2 and len(lines) == 1 and expected in lines[0], lines
    assert (
        files_of(*{str(path) for path in places.values() if path.is_dir()}, places["void"].parent)
        == before
    )
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


class main_of:
    """A script whose main runs under its guard, as `call` takes it."""

    def __init__(self, script):
        self.script, self.__name__ = script, script.__name__

    def main(self):
        main_guard(self.script.main) if hasattr(self.script, "main_guard") else self.script.main()


# ---------------------------------------------------------------------------------------------- noise

WORDS = st.sampled_from(
    [
        "single_image",
        "video",
        "a.jpg",
        "B",
        "3.5",
        "user",
        "assistant",
        "text",
        "image",
        "",
        "<image>",
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | WORDS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=9,
)
KEYS = (
    "question_id",
    "question",
    "question_type",
    "options",
    "answer",
    "image",
    "data_type",
    "prompt",
    "solution",
    "messages",
    "seconds_per_frame",
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": WORDS,
            "content": JSON
            | st.lists(
                st.fixed_dictionaries(
                    {}, optional={"type": WORDS, "text": JSON, "image": JSON, "video": JSON}
                )
            ),
        },
    ),
    max_size=3,
)
CHANGES = st.dictionaries(st.sampled_from(KEYS), JSON | MESSAGES, max_size=4)


@given(
    st.lists(
        st.binary(max_size=60)
        | st.builds(
            lambda row, change: json.dumps(row | change).encode(),
            st.sampled_from((ROW, ASKED, {})),
            CHANGES,
        ),
        max_size=3,
    )
)
def test_any_jsonl_file_is_read_or_refused(tmp_path_factory, lines):
    """Whatever stands in a file: samples, or one UserError of one line that begins with the file."""
    path = tmp_path_factory.getbasetemp() / "noise.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        samples = read_samples(path, "images")
    except UserError as error:
        assert str(error).startswith(f"{path}:") and "\n" not in str(error)
    else:
        assert len(samples) <= sum(line.count(b"\n") + 1 for line in lines)
