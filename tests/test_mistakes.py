"""What users get wrong, for every script: exit code 2 and one line that names what and where.

Each row of COMMANDS is a command line and what its error must hold. Words in braces are paths of
`places`: {rooms} and {model} are good, everything else is broken in one way. A script runs in this
process, by its path and with its `if __name__ == "__main__"`, as a start costs seconds. No GPU is
there, whatever the machine has.
"""

import json
import os
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from data import read_samples
from files import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = {  # name -> path, of everything that a person can start
    path.name: path
    for folder in (".", "rooms", "look")
    for path in sorted((REPOSITORY / folder).glob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
}
SCRIPTS["bench.py"] = REPOSITORY / "tests" / "bench.py"

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
USER = {"role": "user", "content": "Hello"}
SAID = {"role": "assistant", "content": "Hi"}


def boxed(**box):
    return ROW | {"answer": [box]}


ROWS = {  # name of a data file -> (what stands in its second line, what the error must hold)
    "not_json": (
        b"{'question': 1}",
        "rows.jsonl:2: not JSON",
    ),
    "not_an_object": (
        [1, 2],
        "rows.jsonl:2: expected an object, found list",
    ),
    "not_utf8": (
        b'{"question": "caf\xe9"}',
        "rows.jsonl:2: not JSON",
    ),
    "half_a_surrogate": (
        b'{"question": "\\ud800"}',
        "rows.jsonl:2: not JSON",
    ),
    "no_question": (
        ROW | {"question": None},
        "rows.jsonl:2: question is missing, expected str",
    ),
    "no_image": (
        ROW | {"image": []},
        "rows.jsonl:2: image is [], expected a list of paths",
    ),
    "image_is_text": (
        ROW | {"image": "a.jpg"},
        'rows.jsonl:2: image is "a.jpg", expected list',
    ),
    "data_type": (
        ROW | {"data_type": "picture"},
        "rows.jsonl:2: data_type is 'picture', expected single_image, multi_view or video",
    ),
    "two_pictures": (
        ROW | {"image": ["a.jpg", "b.jpg"]},
        "rows.jsonl:2: 1 boxes in 2 pictures",
    ),
    "box_of_three": (
        boxed(bbox_2d=[1, 2, 3], label="lamp"),
        "expected bbox_2d with 4 numbers",
    ),
    "box_inside_out": (
        boxed(bbox_2d=[9, 2, 3, 4], label="lamp"),
        "expected 0 <= x1 < x2",
    ),
    "no_label": (
        boxed(bbox_2d=[1, 2, 3, 4]),
        "expected bbox_2d with 4 numbers and a label",
    ),
    "question_type": (
        ASKED | {"question_type": "colour"},
        "rows.jsonl:2: question_type is 'colour', expected one of",
    ),
    "letter": (
        ASKED | {"answer": "C"},
        "rows.jsonl:2: answer is 'C', expected the letter of one of the options",
    ),
    "number": (
        ASKED | {"question_type": "object count", "answer": "four"},
        "rows.jsonl:2: answer is 'four', expected a number",
    ),
    "options": (
        ASKED | {"options": "A, B"},
        'rows.jsonl:2: options is "A, B", expected a list of texts',
    ),
    "seconds": (
        ASKED | {"data_type": "video", "seconds_per_frame": -1},
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


# ---------------------------------------------------------------------------------- broken models
# Functions that break a good model directory in one way.


def set_config(**values):
    def breaks(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return breaks


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def cut(name, size):
    return lambda folder: os.truncate(folder / name, size)


def delete(*names):
    def breaks(folder):
        for name in names:
            (folder / name).unlink()

    return breaks


def delete_all(folder):
    for path in folder.iterdir():
        path.unlink()


def set_tensors(**tensors):
    """Names with _ in place of dots; None takes a tensor away."""

    def breaks(folder):
        weights = load_file(folder / "model.safetensors")
        for name, tensor in tensors.items():
            weights[name.replace("_", ".")] = tensor
        weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
        save_file(weights, folder / "model.safetensors")

    return breaks


INDEX = "model.safetensors.index.json"


def index_alone(text):
    """An index without the single file, which would be taken before it."""

    def breaks(folder):
        (folder / "model.safetensors").unlink()
        (folder / INDEX).write_text(text)

    return breaks


MODELS = {  # name of a model directory -> (what breaks it, what the error must hold)
    "empty": (
        delete_all,
        "not a model directory (no config.json in it)",
    ),
    "config_torn": (
        write("config.json", '{"model_type": '),
        "config.json: not readable as JSON",
    ),
    "config_list": (
        write("config.json", "[]"),
        "config.json: expected a JSON object, found list",
    ),
    "other_model": (
        set_config(model_type="llama"),
        "config.json: model_type is 'llama', expected 'qwen2_5_vl'",
    ),
    "rope": (
        set_config(rope_scaling={"type": "yarn"}),
        "config.json: rope type is 'yarn', expected 'default' or 'mrope'",
    ),
    "sliding": (
        set_config(use_sliding_window=True),
        "config.json: use_sliding_window is True, expected False",
    ),
    "heads": (
        set_config(num_attention_heads=7),
        "config.json: mrope_section is (4, 6, 6), expected three numbers that add up to",
    ),
    "half_the_heads": (
        set_config(num_attention_heads=2, rope_scaling={"mrope_section": [8, 12, 12]}),
        "weights do not fit config.json: 24, such as model.layers.0.self_attn.k_proj",
    ),
    "width": (
        set_config(hidden_size="wide"),
        "config.json: a value is of the wrong type (TypeError",
    ),
    "other_tokenizer": (
        set_config(vocab_size=1000),
        "tokenizer and model have other vocabularies: ",
    ),
    "other_width": (
        set_config(intermediate_size=256),
        "expected [256, 128]",
    ),
    "dtype": (
        set_config(torch_dtype="int4"),
        "config.json: torch_dtype is 'int4', expected 'float32' or 'bfloat16' or 'float16'",
    ),
    "no_weights": (
        delete("model.safetensors"),
        f"no model.safetensors and no {INDEX} in it",
    ),
    "torn_weights": (
        cut("model.safetensors", 5000),
        "model.safetensors: not a readable safetensors file",
    ),
    "missing": (
        set_tensors(model_norm_weight=None),
        "weights do not fit config.json: missing model.norm.weight",
    ),
    "extra": (
        set_tensors(more=torch.ones(2)),
        "weights do not fit config.json: unexpected more",
    ),
    "shape": (
        set_tensors(model_norm_weight=torch.ones(3)),
        "model.norm.weight has shape [3], expected [128]",
    ),
    "integers": (
        set_tensors(model_norm_weight=torch.ones(128).long()),
        "model.norm.weight is stored as I64, expected F32, BF16 or F16",
    ),
    "index": (
        index_alone('{"weight_map": {"a": "b.safetensors"}}'),
        "b.safetensors: not a readable safetensors file",
    ),
    "index_list": (
        index_alone("[]"),
        f"{INDEX}: expected a JSON object, found list",
    ),
    "index_empty": (
        index_alone("{}"),
        f"{INDEX}: expected an object with a 'weight_map'",
    ),
    "no_tokenizer": (
        delete("tokenizer.json"),
        "tokenizer.json: not a readable tokenizer",
    ),
    "torn_tokenizer": (
        cut("tokenizer.json", 900),
        "tokenizer.json: not a readable tokenizer",
    ),
    "no_limits": (
        delete("preprocessor_config.json"),
        "preprocessor_config.json: no such file",
    ),
    "no_generation": (
        delete("generation_config.json"),
        "generation_config.json: no such file",
    ),
    "torn_limits": (
        write("preprocessor_config.json", "{"),
        "preprocessor_config.json: not readable as JSON",
    ),
}


# ---------------------------------------------------------------------------------- the commands

SFT = "train_sft.py --stage 1 --model {model}"
SEE = SFT + " --data {grounding}"
RL = "grpo.py --model {model} --data {spatial}"
ROOMS = "eval.py --model {model} --bench rooms --data {rooms}/test --out {out}"
CHAINS = "coldstart.py --model {model} --data {spatial} --out {out}/cold.jsonl"
PLAN = "plan.py --stage 1 --model {model} --data {grounding} --gpus"
PROBE = "probes.py hints --model {model} --data {rooms}/train --out {out}"
SHOW = "show.py {grounding} --model {model} --out {out}.html --row"
PAPER = "--preset paper --model {model} --data {rooms}/train"

COMMANDS = (
    # train_sft.py: flags, paths, the folder
    ("train_sft.py", "the following arguments are required: --stage"),
    ("train_sft.py --stage 7", "argument --stage: invalid choice: '7'"),
    (SFT + " --learning-rat 1", "unknown argument --learning-rat, did you mean --learning-rate?"),
    (SFT + " --dry-run 4x80", "unknown argument --dry-run"),
    (SFT + " --beta 1", "unknown argument --beta"),
    (SFT + " --reward-weights 1 1", "unknown argument --reward-weights"),
    (SFT + " --max-steps 0", "--max-steps is 0, expected a positive number"),
    (SFT + " --max-steps ten", "argument --max-steps: invalid int value: 'ten'"),
    (SFT + " --learning-rate nan", "--learning-rate is nan, expected a positive number"),
    (SFT + " --betas 0.9", "--betas has 1 numbers, expected 2"),
    (SFT + " --betas 0.9 1.5", "--betas is 1.5, expected 0 or more and below 1"),
    (SFT + " --seed -1", "--seed is -1, expected 0 or more"),
    (SFT + " --workers -1", "--workers is -1, expected 0 or more"),
    (SFT + " --device tpu", "argument --device: invalid choice: 'tpu'"),
    (SFT + " --device cuda", "--device cuda: torch finds no GPU"),
    (SFT + " --dtype float16", "argument --dtype: invalid choice: 'float16'"),
    (SFT + " --data {rooms}/none.jsonl", "none.jsonl: not readable"),
    (SFT + " --data {rooms}", "rooms: not readable"),
    (SFT + " --data {void}", "void.jsonl: no rows in it"),
    (
        SEE + " --replay {rooms}/none.jsonl --replay-ratio 0.5",
        "none.jsonl: not readable",
    ),
    (
        SEE + " --min-pixels 50000 --max-pixels 10000",
        "--min-pixels is 50000, above --max-pixels 10000",
    ),
    (SEE + " --prompts {void}", "void.jsonl: not readable as JSON"),
    (SEE + " --prompts {prompts}", "prompts.json: unknown prompt 'hello'"),
    (SEE + " --prompts {slots}", "slots.json: prompt 'localize' lacks the slot {question}"),
    (SEE + " --resume {rooms}", "rooms: no trainer state there"),
    (SEE + " --model {rooms}/none", "none: not a model directory"),
    (SEE + " --out {void}", "void.jsonl: cannot write there"),
    (SEE + " --out {void}/out", "cannot write there"),
    (SEE + " --out {model}", "base: not empty; give another --out"),
    (SEE + " --out {rooms}", "rooms: not empty; continue it with --resume auto, or give another"),
    (SEE + " --out {rooms} --resume auto", "rooms: was begun with other settings: "),
    (SEE + " --out /sys/spatialladder", "/sys/spatialladder: cannot write there"),
    ("train_sft.py --stage 1 --preset paper --out {out}", "--model is missing"),
    # grpo.py
    (RL + " --num-generations 1", "--num-generations is 1, expected at least 2"),
    (RL + " --temperature 0", "--temperature is 0.0, expected a positive number"),
    (RL + " --temperature inf", "--temperature is inf, expected a positive number"),
    (RL + " --loss-type bnpo", "invalid choice: 'bnpo' (choose from 'grpo', 'dr_grpo', 'dapo')"),
    (RL + " --num-iterations 0", "--num-iterations is 0, expected a positive number"),
    (RL + " --epsilon -1", "--epsilon is -1.0, expected 0 or more"),
    (RL + " --reward-weights nan 1", "--reward-weights is nan, expected 0 or more"),
    (RL + " --reward-weights 1", "--reward-weights has 1 numbers, expected 2"),
    (RL + " --reward-funcs speed", "--reward-funcs: no reward 'speed', expected of format"),
    (RL + " --eval-every 5", "--eval-every 5 needs --eval-data"),
    (RL + " --stage 1", "unknown argument --stage"),
    (RL + " --workers 2", "unknown argument --workers"),
    (RL + " --sample-cold-start {out}", "unknown argument --sample-cold-start"),
    (RL + " --data {void}", "void.jsonl: no rows in it"),
    (RL + " --data {typeless}", "no accuracy reward for question_type ''"),
    (RL + " --model {rooms}/none", "none: not a model directory"),
    # coldstart.py
    ("coldstart.py --model {model} --data {spatial}", "--out is missing"),
    ("coldstart.py --data {spatial} --out {out}", "--model is missing"),
    (CHAINS + " --per-typ 9", "unknown argument --per-typ, did you mean --per-type?"),
    (CHAINS + " --per-type 0", "--per-type is 0, expected a positive number"),
    (CHAINS + " --min-accuracy 2", "--min-accuracy is 2.0, expected 0 to 1"),
    (CHAINS + " --difficulty 0.9 0.1", "--difficulty is 0.9 0.1, expected the lower share first"),
    (CHAINS + " --data {rooms}/none.jsonl", "none.jsonl: not readable"),
    (CHAINS + " --data {void}", "void.jsonl: no rows in it"),
    (CHAINS + " --data {grounding}", "jsonl:1: localization row, expected a question with an"),
    (CHAINS + " --data {spatial} {typeless}", "--data: files of several folders; give --images"),
    (CHAINS + " --model {rooms}/none", "none: not a model directory"),
    (CHAINS + " --out {void}", "void.jsonl: exists already; give another --out"),
    # eval.py
    ("eval.py --bench rooms --data {rooms} --out {out}", "--model is missing"),
    ("eval.py --model {model} --out {out}", "the following arguments are required: --bench"),
    ("eval.py --model {model} --bench rooms --out {out}", "--data is missing"),
    ("eval.py --model {model} --bench rooms --data {rooms}", "--out is missing"),
    (ROOMS + " --data {rooms}", "spld_grounding_data.jsonl: no such file; --bench takes"),
    (ROOMS + " --bench vsibenhc", "vsibenhc: no such file; --bench takes vsibench, "),
    (ROOMS + " --bench all", "all: no such file; --bench takes vsibench, "),
    (ROOMS + " --bench vsibench", "vsibench: no test-00000-of-00001.parquet in"),
    (ROOMS + " --bench {typeless}", "there is nothing to score by"),
    (ROOMS + " --scorer official", "--scorer official: rooms has spatialladder"),
    (ROOMS + " --model {rooms}/none", "none: not a model directory"),
    (ROOMS + " --out {model}", "base: not empty; give another --out"),
    (ROOMS + " --out {rooms}", "rooms: was begun with other settings: "),
    (ROOMS + " --limit 0", "--limit is 0, expected a positive number"),
    (ROOMS + " --limits 3", "unknown argument --limits, did you mean --limit?"),
    (ROOMS + " --num-frames 0", "--num-frames is 0, expected a positive number"),
    (ROOMS + " --predictions {void}/none", "void.jsonl/none: not readable"),
    (ROOMS + " --device cuda", "--device cuda: torch finds no GPU"),
    # ask.py
    ("ask.py {model}", "the following arguments are required: question"),
    ("ask.py {rooms}/none Where? {picture}", "none: not a model directory"),
    ("ask.py {model} Where? {rooms}/none.jpg", "none.jpg: not a readable picture"),
    ("ask.py {model} Where? {torn}", "torn.jpg: not a readable picture"),
    ("ask.py {model} Where? {picture} --max-pixel 9", "unknown argument --max-pixel, did you mean"),
    ("ask.py {model} Where? --max-completion-length 0", "--max-completion-length is 0, expected"),
    ("ask.py {model} Where? {picture} --device cuda", "--device cuda: torch finds no GPU"),
    # ladder.py
    ("ladder.py --preset paper", "--model is missing"),
    ("ladder.py --preset paper --model {model}", "--data is missing"),
    ("ladder.py --preset huge", "argument --preset: invalid choice: 'huge'"),
    ("ladder.py --out {rooms}", "rooms: was begun with other settings: "),
    ("ladder.py --out {model}", "base: not empty; give another --out"),
    ("ladder.py --out {void}", "void.jsonl: cannot write there"),
    ("ladder.py --nproc-per-node 0 --out {out}", "--nproc-per-node is 0, expected a positive"),
    ("ladder.py --limit 0 --out {out}", "--limit is 0, expected a positive number"),
    ("ladder.py --stages 1 --out {out}", "unknown argument --stages, did you mean --"),
    # rooms.scenes, rooms.tiny
    ("scenes.py", "the following arguments are required: --out"),
    ("scenes.py --out {out} --scenes -1", "--scenes is -1, expected 0 or more"),
    ("scenes.py --out {out} --processes 0", "--processes is 0, expected a positive number"),
    ("scenes.py --out {out} --size 100", "unknown argument --size"),
    ("scenes.py --out {out} --scale 0 1", "--scale is 0.0, expected a positive number"),
    ("scenes.py --out {out} --tasks plain", "argument --tasks: invalid choice: 'plain'"),
    ("scenes.py --out {model} --scenes 4", "base: not empty; give another --out"),
    ("scenes.py --out {rooms} --scenes 4", "rooms: was begun with other settings: rooms "),
    ("scenes.py --out {void}", "void.jsonl: cannot write there"),
    ("tiny.py --out {out}", "the following arguments are required: --data"),
    ("tiny.py --data {rooms} --out {out}", "rooms: no *_data.jsonl in it"),
    ("tiny.py --data {rooms}/none --out {out}", "none: no *_data.jsonl in it"),
    ("tiny.py --data {rooms}/train --out {out} --grow {model}", "unknown argument --grow"),
    ("tiny.py --data {rooms}/train --out {out} --seed x", "argument --seed: invalid int value"),
    # look.check, look.show
    ("check.py", "the following arguments are required: file"),
    ("check.py check {grounding}", "unknown argument /"),
    ("check.py {grounding} --max-tokens 9", "--model is missing"),
    ("check.py {rooms}/none.jsonl", "none.jsonl: not readable"),
    ("check.py {void}", "void.jsonl: no rows in it"),
    ("check.py {grounding} --model {rooms}/none", "none: not a model directory"),
    ("check.py {grounding} --image {rooms}", "unknown argument --image, did you mean --images?"),
    (SHOW + " 0", "spld_grounding_data.jsonl:0: there is no such row"),
    (SHOW + " 99999", "spld_grounding_data.jsonl:99999: there is no such row"),
    (SHOW + " last", "argument --row: invalid int value: 'last'"),
    (SHOW + " 1 --rows 2", "unknown argument --rows, did you mean --row?"),
    (SHOW + " 1 --model {rooms}/none", "none: not a model directory"),
    (SHOW + " 1 --images {rooms}/none", ".jpg: not a readable picture"),
    (SHOW + " 1 --out {void}/row.html", "row.html: cannot write there"),
    ("show.py {rooms}/none.jsonl --row 1 --model {model}", "none.jsonl: not readable"),
    ("show.py {grounding} --row 1", "the following arguments are required: --model"),
    # look.plan
    ("plan.py --stage 1 --model {model}", "the following arguments are required: --gpus"),
    ("plan.py --gpus 4x80 --model {model}", "the following arguments are required: --stage"),
    (PLAN + " 4", "--gpus is '4', expected number x gigabytes, such as 4x80"),
    (PLAN + " 0x80", "--gpus is '0x80', expected number x gigabytes, such as 4x80"),
    (PLAN + " 4x80 --stage 7", "argument --stage: invalid choice: '7'"),
    (PLAN + " 4x80 --learning-rat 1", "unknown argument --learning-rat, did you mean --learning-"),
    (PLAN + " 4x80 --micro-batch 0", "--micro-batch is 0, expected a positive number"),
    (PLAN + " 4x80 --model {rooms}/none", "none: not a model directory"),
    (PLAN + " 4x80 --data {rooms}/none.jsonl", "none.jsonl: not readable"),
    (PLAN + " 1x1 --model {big}", "--gpus 1x1: needs "),
    (
        PLAN + " 99x80 --stage grpo",
        "--prompts-per-step is 8, expected at least one for each of the 99 processes",
    ),
    # look.report, look.chains, look.compare
    ("report.py", "the following arguments are required: run"),
    ("report.py {rooms}/none", "none: no such directory; expected the --out of ladder.py"),
    ("report.py {ladders}/torn", "torn/grpo/log.jsonl:1: not JSON"),
    ("report.py {ladders}/1 --out {out}", "unknown argument --out"),
    ("chains.py", "the following arguments are required: run"),
    ("chains.py {rooms}/none", "none: no chains to read; expected true ones in "),
    ("chains.py {rooms}", "rooms: no chains to read; expected true ones in "),
    ("chains.py {ladders}/1 --out {out}", "unknown argument --out"),
    ("compare.py", "the following arguments are required: runs"),
    ("compare.py {rooms}/none", "none/config_run.json: no such file"),
    ("compare.py {rooms}", "rooms: no ladder there, expected an --out of ladder.py"),
    ("compare.py {ladders}/1 {ladders}/2", "2: has the seed of "),
    ("compare.py {ladders}/1", "1: there is no rung that all of them have evaluated"),
    ("compare.py {ladders}/1 --figure {out}", "unknown argument --figure, did you mean --figures?"),
    # look.probes
    ("probes.py look {rooms}", "argument what: invalid choice: 'look'"),
    ("probes.py hints", "one of the arguments run --model is required"),
    ("probes.py hints --model {model} --out {out}", "--data is missing"),
    ("probes.py hints --model {model} --data {rooms}/train", "--out is missing"),
    (
        "probes.py hints {ladders}/1 --model {model}",
        "argument --model: not allowed with argument run",
    ),
    ("probes.py hints {rooms}/none", "none/config_run.json: no such file"),
    ("probes.py hints {rooms}", "rooms: no ladder there, expected an --out of ladder.py"),
    (
        "probes.py all {ladders}/1 --num-generations 1",
        "--num-generations is 1, expected at least 2",
    ),
    (PROBE + " --data {rooms}/none", "none: not readable"),
    (PROBE + " --data {rooms}", "spld_grounding_data.jsonl: not readable"),
    (PROBE + " --data {spatial}", "spatial_data.jsonl: no rows for hints; "),
    (
        "probes.py entropy --model {model} --data {grounding} --out {out}",
        "grounding_data.jsonl: no rows for entropy; ",
    ),
    (PROBE + " --model {rooms}/none", "none: not a model directory"),
    (PROBE + " --out {void}", "void.jsonl/hints: cannot write there"),
    (PROBE + " --limit 0", "--limit is 0, expected a positive number"),
    (PROBE + " --limits 3", "unknown argument --limits, did you mean --limit?"),
    (PROBE + " --temperature 0", "--temperature is 0.0, expected a positive number"),
    # look.ablations
    ("ablations.py --ways none", "argument --ways: invalid choice: 'none'"),
    ("ablations.py --seeds two", "argument --seeds: invalid int value: 'two'"),
    ("ablations.py --seeds 0", "--seeds is 0, expected a positive number"),
    ("ablations.py --data-scale 0", "--scenes is 0, expected a positive number"),
    ("ablations.py --data-scales 1", "unknown argument --data-scales, did you mean --data"),
    ("ablations.py --preset paper", "--model is missing"),
    (f"ablations.py {PAPER}", "--test is missing; without it there is nothing to compare"),
    # tests/bench.py
    ("bench.py", "the following arguments are required: command"),
    ("bench.py walk", "argument command: invalid choice: 'walk'"),
    ("bench.py load --model {rooms}/none", "none: not a model directory"),
    ("bench.py load --repeat 0", "--repeat is 0, expected a positive number"),
    ("bench.py load --device cuda", "--device cuda: torch finds no GPU"),
    ("bench.py peers --side nobody", "argument --side: invalid choice: 'nobody'"),
    ("bench.py peers --task grpo", "GRPO and TRL are measured by: python tests/bench.py grpo"),
    ("bench.py grpo --peer-python NONE", "--peer-python NONE: no such program"),
    ("bench.py load --repeats 3", "unknown argument --repeats, did you mean --repeat?"),
    # broken rows and models
    *((SFT + f" --data {{rows}}/{name}/rows.jsonl", said) for name, (_, said) in ROWS.items()),
    *((SEE + f" --model {{models}}/{name}", said) for name, (_, said) in MODELS.items()),
)


# ---------------------------------------------------------------------------------- the test


@pytest.fixture(scope="module")
def places(rooms, tiny_model, tmp_path_factory):
    """What the braces stand for."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name, (row, _) in ROWS.items():
        line = row if isinstance(row, bytes) else json.dumps(row).encode()
        (folder / "rows" / name).mkdir(parents=True)
        (folder / "rows" / name / "rows.jsonl").write_bytes(
            json.dumps(ROW).encode() + b"\n" + line + b"\n"
        )
    for name, (breaks, _) in MODELS.items():
        shutil.copytree(tiny_model, folder / "models" / name)
        breaks(folder / "models" / name)
    shutil.copytree(tiny_model, folder / "big")
    set_config(vocab_size=4_000_000)(folder / "big")
    for name in ("1", "2", "torn/grpo"):
        (folder / "ladders" / name).mkdir(parents=True)
        (folder / "ladders" / name / "config_run.json").write_text('{"seed": 0, "scenes": 3600}')
    (folder / "ladders" / "torn" / "grpo" / "log.jsonl").write_text('{"step": 1, "lo')
    (folder / "void.jsonl").touch()
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "prompts.json").write_text('{"hello": "?"}')
    (folder / "slots.json").write_text('{"localize": "Boxes, please."}')
    typeless = ROW | {"answer": "yes", "solution": "It is."}
    (folder / "typeless.jsonl").write_text(json.dumps(typeless) + "\n")
    train = rooms / "train"
    names = ("rows", "models", "big", "ladders")
    return {
        **{name: folder / name for name in names},
        "rooms": rooms,
        "model": tiny_model,
        "void": folder / "void.jsonl",
        "torn": folder / "torn.jpg",
        "prompts": folder / "prompts.json",
        "slots": folder / "slots.json",
        "typeless": folder / "typeless.jsonl",
        "grounding": train / "spld_grounding_data.jsonl",
        "spatial": train / "spld_spatial_data.jsonl",
        "picture": next((train / "images").glob("*/*.jpg")),
    }


def files_of(folders):
    """When each file in some folders was written."""
    times = {}
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                times[path] = path.stat().st_mtime_ns
    return times


class AsTyped:
    """A script that `call` runs with its `if __name__ == "__main__"`."""

    def __init__(self, path):
        self.path, self.__name__ = path, path.stem

    def main(self):
        runpy.run_path(str(self.path), run_name="__main__")


@pytest.mark.parametrize(
    "command, expected",
    COMMANDS,
    ids=[f"{i} {command[:60]}" for i, (command, _) in enumerate(COMMANDS)],
)
def test_a_mistake_is_one_line(monkeypatch, capfd, call, places, tmp_path, command, expected):
    """Exit code 2, one line on stderr that names what and where; no file is written or touched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    inputs = [places["rooms"], places["model"], places["void"].parent]
    before = files_of(inputs)
    out = tmp_path / "out"
    name, *flags = [word.format(**places, out=out) for word in command.split()]
    if name in ("train_sft.py", "grpo.py") and "--out" not in flags:
        flags += ["--out", str(out)]
    capfd.readouterr()
    with pytest.raises(SystemExit) as error:
        call(AsTyped(SCRIPTS[name]), *flags)
    lines = capfd.readouterr().err.splitlines()
    assert error.value.code == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{name}: ")
    assert expected in lines[0]
    assert files_of(inputs) == before
    assert files_of([tmp_path]) == {}


def test_every_script_has_rows():
    """A wrong path, a wrong flag and a wrong value at least."""
    counts = dict.fromkeys(SCRIPTS, 0)
    for command, _ in COMMANDS:
        counts[command.split()[0]] += 1
    assert min(counts.values()) >= 4, counts


# ---------------------------------------------------------------------------------- noise

WORDS = st.sampled_from(
    (
        *("single_image", "video", "a.jpg", "B", "3.5"),
        *("user", "assistant", "text", "image", "", "<image>"),
    )
)


def containers(inner):
    return st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | WORDS,
    containers,
    max_leaves=9,
)
KEYS = (
    *("question_id", "question", "question_type", "options", "answer", "image", "data_type"),
    *("prompt", "solution", "messages", "seconds_per_frame"),
)
PARTS = st.lists(
    st.fixed_dictionaries({}, optional={"type": WORDS, "text": JSON, "image": JSON, "video": JSON})
)
MESSAGES = st.lists(
    st.fixed_dictionaries({}, optional={"role": WORDS, "content": JSON | PARTS}), max_size=3
)
CHANGES = st.dictionaries(st.sampled_from(KEYS), JSON | MESSAGES, max_size=4)


def changed(row, changes):
    return json.dumps(row | changes).encode()


LINES = st.binary(max_size=60) | st.builds(changed, st.sampled_from((ROW, ASKED, {})), CHANGES)


@given(st.lists(LINES, max_size=3))
def test_any_jsonl_file_is_read_or_refused(tmp_path_factory, lines):
    """Whatever stands in a file: samples, or a UserError of one line that begins with the file."""
    path = tmp_path_factory.getbasetemp() / "noise.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        samples = read_samples(path, "images")
    except UserError as error:
        assert str(error).startswith(f"{path}:")
        assert "\n" not in str(error)
    else:
        assert len(samples) <= sum(line.count(b"\n") + 1 for line in lines)
