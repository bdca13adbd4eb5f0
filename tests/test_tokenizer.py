"""The tokenizer and pictures of a model directory as other programs load them; special tokens."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY as REPO
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

import checkpoint
from checkpoint import load_config, load_model
from data import IGNORE, Processor, Sample, collate
from files import UserError
from model import generate
from pictures import Media
from rewards import accuracy_reward, format_reward

GROUNDED = "<|object_ref_start|>lamp<|object_ref_end|><|box_start|>(10, 20),(30, 40)<|box_end|>"
STRUCTURE = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


@pytest.fixture(scope="module")
def directories(tiny_model):
    return {"base": REPO / "base", "untrained": tiny_model}


@pytest.fixture(scope="module")
def base():
    return Processor(REPO / "base", load_config(REPO / "base"))


def with_tokenizer(folder, change, rows=0):
    """A Processor of base whose tokenizer.json is changed; the vocabulary has `rows` more rows."""
    shutil.copytree(REPO / "base", folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = load_config(folder)
    text = replace(config.text, vocab_size=config.text.vocab_size + rows)
    return Processor(folder, replace(config, text=text))


def added(*contents, special=True):
    """A change of tokenizer.json: more added tokens."""

    def change(content):
        tokens = content["added_tokens"]
        for text in contents:
            number = tokens[-1]["id"] + 1
            tokens.append(tokens[-1] | {"id": number, "content": text, "special": special})

    return change


def chat(answer, question="Where?"):
    turns = ("user", (question,)), ("assistant", (answer,))
    return Sample("f:1", "1", "", "chat", answer, messages=turns)


def tokens(processor, ids):
    return [processor.tokenizer.id_to_token(i) for i in ids]


# ------------------------------------------------------------ saved state


SAVED = {  # what training scripts leave in tokenizer.json
    "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 256},
        "direction": "Left",
        "pad_to_multiple_of": 8,
        "pad_id": 1163,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    },
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [1163], "tokens": ["<|endoftext|>"]}
        },
    },
}


@pytest.mark.parametrize("names", [["truncation"], ["padding"], ["post_processor"], list(SAVED)])
def test_saved_state_changes_no_ids(names, base, tmp_path):
    """A text is neither cut, padded nor begun with a token of its own."""
    change = {name: SAVED[name] for name in names}
    odd = with_tokenizer(tmp_path / "odd", lambda content: content.update(change))
    sample = chat("On the left of the table. " * 5, "Where is the lamp? " * 5)
    assert torch.equal(odd.example(sample, "direct").ids, base.example(sample, "direct").ids)


def test_saved_dropout_changes_no_ids(base, tmp_path):
    """BPE dropout would give other pieces of a text each time it is read."""
    odd = with_tokenizer(tmp_path / "odd", lambda content: content["model"].update(dropout=0.9))
    sample = chat("On the left of the table.", "Where is the lamp?")
    expected = base.example(sample, "direct").ids
    assert all(torch.equal(odd.example(sample, "direct").ids, expected) for _ in range(5))


# ------------------------------------------------------------ special tokens


def test_grounding_tokens_of_an_answer_are_tokens_and_are_trained(base):
    example = base.example(chat(GROUNDED), "direct")
    trained = example.labels[example.labels != IGNORE].tolist()
    assert tokens(base, trained)[::-1][:2] == ["<|im_end|>", "<|box_end|>"]
    names = "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"
    assert [name for name in tokens(base, trained) if name in names] == list(names)
    assert base.decode(trained) == GROUNDED
    assert accuracy_reward([base.decode(trained)], chat(GROUNDED)) == [1.0]


def test_the_same_tokens_of_a_user_are_text(base):
    """Whoever fills in a question cannot write tokens."""
    ids = base.example(chat("Yes.", f"Is {GROUNDED} there?"), "direct").ids.tolist()
    assert base.tokenizer.token_to_id("<|box_start|>") not in ids
    assert GROUNDED in base.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", STRUCTURE)
def test_structure_in_an_answer_is_text(name, base):
    """An answer cannot end its turn, nor claim the features of a picture."""
    text = f"It says {name} there.<|box_start|>"
    ids = base.encode_answer(text)
    assert base.tokenizer.token_to_id(name) not in ids and base.decode(ids) == text
    assert ids[-1] == base.tokenizer.token_to_id("<|box_start|>")
    assert ids[:-1] == base.encode(text.removesuffix("<|box_start|>"))  # in one piece


@pytest.mark.parametrize("special", [True, False])
def test_thinking_tokens_of_a_tuned_tokenizer(special, tmp_path):
    """As added tokens, special or not: one id each, read by the rewards as they are written."""
    names = "<reason>", "</reason>", "<reason>deep", "<think>", "</think>"
    odd = with_tokenizer(tmp_path / "odd", added(*names, special=special), rows=5)
    text = "<think>two beds</think>\n<answer>2</answer>"
    ids = odd.encode_answer(text)
    for name in ("<think>", "</think>"):
        assert ids.count(odd.tokenizer.token_to_id(name)) == 1
    assert odd.decode(ids) == text and format_reward([odd.decode(ids)]) == [1.0]
    assert tokens(odd, odd.encode_answer("<reason>deep</reason>")) == ["<reason>deep", "</reason>"]


def test_ends_and_padding_are_not_decoded(base):
    end, pad = (base.tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>"))
    ids = base.encode_answer(GROUNDED)
    assert base.decode([*ids, end, pad, pad]) == base.decode([*ids, pad]) == GROUNDED
    assert base.decode([]) == base.decode([end]) == ""


def test_an_end_of_turn_of_its_own_is_structure(tmp_path):
    """What generation_config.json names as an end is an end, not a word of an answer."""
    odd = with_tokenizer(tmp_path / "odd", added("<stop>"), rows=1)
    number = odd.tokenizer.token_to_id("<stop>")
    (tmp_path / "odd" / "generation_config.json").write_text(f'{{"eos_token_id": {number}}}')
    odd = Processor(tmp_path / "odd", odd.config)
    assert odd.stop_ids == (number,)
    assert number not in odd.encode_answer("a<stop>") and odd.decode([number]) == ""


def test_what_a_model_says_in_its_own_tokens_is_read(base):
    """A model whose weights make it say <|box_start|> for ever: the rollout's text has it."""
    model = load_model(REPO / "base")
    token = base.tokenizer.token_to_id("<|box_start|>")
    banned = torch.ones(model.config.text.vocab_size, dtype=torch.bool)
    banned[token] = False
    example = base.example(chat("x"), "direct", with_answer=False)
    batch = collate([example], model.config)
    rollout = generate(model, batch, 3, base.stop_ids, banned=banned)
    assert base.decode(rollout.ids[0].tolist()) == "<|box_start|>" * 3
    assert not base.banned("cpu")[token]  # and it may be said


def test_a_tokenizer_with_another_video_pad_is_refused(base):
    other = replace(base.config, video_token_id=base.config.video_token_id - 4)
    with pytest.raises(UserError, match=r"<\|video_pad\|> at .* the model 1174 and"):
        Processor(REPO / "base", other)


# ------------------------------------------------------------ limits of pictures and of frames


def test_frames_have_limits_of_their_own(tmp_path):
    """As transformers saves them; a flag is for both."""
    shutil.copytree(REPO / "base", tmp_path / "model")
    video = {"size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 28}}
    (tmp_path / "model" / "video_preprocessor_config.json").write_text(json.dumps(video))
    path = str(tmp_path / "a.png")
    Image.new("RGB", (112, 112)).save(path)
    config = load_config(tmp_path / "model")
    picture, film = Media("image", path), Media("video", (path, path))
    plain = Processor(tmp_path / "model", config)
    assert plain.load(picture).grid == (1, 8, 8) and plain.load(film).grid == (1, 2, 2)
    small = Processor(tmp_path / "model", config, max_pixels=56 * 56)
    assert small.load(picture).grid == small.load(film).grid == (1, 4, 4)
    checkpoint.set_pixel_limits(tmp_path / "model", small.limits)
    saved = Processor(tmp_path / "model", config)
    assert saved.load(picture).grid == saved.load(film).grid == (1, 4, 4)


# ------------------------------------------------------------ transformers
# test_clients.py compares whole chats.


@pytest.mark.parametrize("name", ["base", "untrained"])
def test_autotokenizer_has_the_same_ends(name, directories):
    theirs = AutoTokenizer.from_pretrained(directories[name])
    ours = Processor(directories[name], load_config(directories[name]))
    assert theirs.eos_token_id == ours.special["<|im_end|>"] and theirs.pad_token == "<|endoftext|>"


def join_line_breaks(content):
    """A change of tokenizer.json: two and three line breaks are one token, as in published ones."""
    pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    pattern["Regex"] = pattern["Regex"].replace(r"|\n|\s+", r"|\s+")
    model = content["model"]
    for old, left, right in (("Ġsofas", "Ċ", "Ċ"), ("Ġbeds", "ĊĊ", "Ċ")):
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) != old]
        model["merges"].append([left, right])
        model["vocab"][left + right] = model["vocab"].pop(old)


@pytest.mark.parametrize("breaks, ours", [("\n", ["Ċ", "Ċ"]), ("\n\n", ["Ċ", "ĊĊ"])])
def test_an_answer_that_begins_with_line_breaks(breaks, ours, tmp_path):
    """Ours goes on where generation begins; the template joins them to the head's line break."""
    odd = with_tokenizer(tmp_path / "odd", join_line_breaks)
    sample = chat(f"{breaks}Yes.")
    ids = odd.example(sample, "direct").ids.tolist()
    asked = odd.example(sample, "direct", with_answer=False).ids.tolist()
    assert ids[: len(asked)] == asked
    assert tokens(odd, ids[len(asked) - 1 :])[: len(ours)] == ours

    theirs = AutoTokenizer.from_pretrained(tmp_path / "odd")
    turns = [{"role": role, "content": parts[0]} for role, parts in sample.messages]
    text = theirs.apply_chat_template(turns, tokenize=False)
    joined = theirs.encode(text, add_special_tokens=False)
    assert tokens(odd, joined)[len(asked) - 1] == "Ċ" + "Ċ" * len(breaks)
    assert odd.tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("name", ["base", "untrained"])
def test_a_picture_has_the_patches_that_autoimageprocessor_gives(name, directories, tmp_path):
    directory = directories[name]
    pixels = np.random.default_rng(0).integers(0, 256, (90, 150, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    theirs = AutoImageProcessor.from_pretrained(directory, backend="pil")(
        Image.open(tmp_path / "a.png"), return_tensors="pt"
    )
    ours = Processor(directory, load_config(directory)).load(
        Media("image", str(tmp_path / "a.png"))
    )
    assert ours.grid == tuple(theirs["image_grid_thw"][0].tolist())
    torch.testing.assert_close(ours.patches, theirs["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["base", "untrained"])
def test_normalization_is_written(name, directories):
    """vLLM reads it there, and takes what is absent as none."""
    content = json.loads((directories[name] / "preprocessor_config.json").read_text())
    assert content["image_mean"] == [0.48145466, 0.4578275, 0.40821073]
    assert content["image_std"] == [0.26862954, 0.26130258, 0.27577711]


@pytest.mark.parametrize("name", ["base", "untrained"])
def test_a_prompt_with_a_picture_is_autoprocessors(name, directories, tmp_path):
    """Text and pictures together, from the directory alone."""
    pytest.importorskip("torchvision", reason="AutoProcessor's class of videos needs torchvision")
    from transformers import AutoProcessor

    directory = directories[name]
    Image.new("RGB", (150, 90), "red").save(tmp_path / "a.png")
    picture = Media("image", str(tmp_path / "a.png"))
    sample = Sample("f:1", "1", "", "", "", media=(picture,), prompt="Where is the bed?")
    ours = Processor(directory, load_config(directory)).example(sample, "direct", with_answer=False)
    theirs = AutoProcessor.from_pretrained(directory)
    parts = [{"type": "image"}, {"type": "text", "text": "Where is the bed?"}]
    text = theirs.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    made = theirs(text=[text], images=[Image.open(tmp_path / "a.png")], return_tensors="pt")
    assert ours.ids.tolist() == made["input_ids"][0].tolist()
    torch.testing.assert_close(ours.patches, made["pixel_values"], rtol=0, atol=0.05)
