"""What the random start of the tiny model holds."""

import json

import pytest
import torch
from tokenizers import Tokenizer

from checkpoint import load_config, load_model
from data import Processor, Sample, answer_text, read_samples, style_of
from model import rotate, text_rope
from rewards import accuracy_reward, format_reward, parse_boxes
from rooms.reckon import SIDES
from rooms.render import FURNITURE
from rooms.tiny import NUMBERS, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return Tokenizer.from_file(str(tiny_model / "tokenizer.json"))


def tokens(tokenizer, text):
    """The tokens of a text, as they are in the vocabulary."""
    found = tokenizer.encode(text, add_special_tokens=False).tokens
    return [token.replace("Ġ", " ").replace("Ċ", "\n") for token in found]


# ---------------------------------------------------------------------------------- the weights


def test_first_heads_look_back(tiny_model):
    """Of the first key head, head 0 attends to the token before, head 1 to the one before that.

    The other heads attend to neither.
    """
    model = load_model(tiny_model, torch.float32)
    config, decoder = model.config.text, model.model
    ids = torch.randint(config.vocab_size, (1, 60), generator=torch.Generator().manual_seed(0))
    layer = decoder.layers[0]
    with torch.no_grad():
        x = layer.input_layernorm(decoder.embed_tokens(ids))
        rope = text_rope(torch.arange(60).expand(3, 1, -1), config, torch.float32)
        q, k = (
            rotate(p(x).unflatten(-1, (-1, config.head_dim)).transpose(1, 2), *rope)
            for p in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = (q @ k.mT / config.head_dim**0.5).masked_fill(
            torch.ones(60, 60).triu(1).bool(), -torch.inf
        )
    attention = scores.softmax(-1)[0]  # (H, 60, 60)
    queries = config.num_attention_heads // config.num_key_value_heads
    assert queries == 2
    for head, back in enumerate((1, 2)):
        before = attention.diagonal(-back, 1, 2)  # (H, 60 - back)
        others = torch.cat((before[:head], before[head + 1 :]))
        assert before[head].min() > 0.5 and others.mean() < 0.2


def test_numbers_begin_in_order(tiny_model, tokenizer):
    """Rows of neighbouring numbers are more alike than those of numbers far apart."""
    embedding = load_model(tiny_model, torch.float32).model.embed_tokens.weight.detach()
    ids = [tokenizer.token_to_id(f"Ġ{number}") for number in range(NUMBERS)]
    ids = [i for i in ids if i is not None]
    rows = torch.nn.functional.normalize(embedding[ids], dim=1)
    alike = rows @ rows.T
    assert len(rows) == NUMBERS
    assert alike.diagonal(1).mean() > 0.4 > 0.1 > alike.diagonal(200).mean()


# ---------------------------------------------------------------------------------- the tokenizer


@pytest.mark.parametrize(
    "text, expected",
    (
        ("12", (" 12",)),
        ("right 12 back 0.", (" 12", " back", " 0", ".")),
        ("[21, 27]", ("[", " 21", ",", " 27", "]")),
        ("<answer>12</answer>", ("<answer>", " 12", "</answer>")),
        ("<answer>C</answer>", ("<answer>", " C", "</answer>")),
        ("\nB. left-back", ("\n", " B", ".", " left-back")),
        (": right-back B", (":", " right-back", " B")),
        ("399: 1", (" 399", ":", " 1")),
        # What follows a dot is of the same number.
        ("1.5", (" 1", ".5")),
        ("<answer>10.0</answer>", ("<answer>", " 10", ".0", "</answer>")),
        # A name that begins a line or a chain of thought.
        ("user\nlamp 33", ("user", "\n", " lamp", " 33")),
        ("<think>bed 21 27", ("<think>", " bed", " 21", " 27")),
    ),
)
def test_a_word_is_one_token_wherever_it_stands(tokenizer, text, expected):
    """A number, a name or an option's letter: as if a space stood before it."""
    assert tokens(tokenizer, text)[-len(expected) :] == [*expected]


@pytest.mark.parametrize("answer", ("B", "lamp 3 30.", "left-back", "nothing bed.", "12", "1.5"))
def test_an_answer_is_encoded_as_within_its_chat(tiny_model, answer):
    """Encoded apart from the head before it, it has the ids that transformers' template gives."""
    processor = Processor(tiny_model, load_config(tiny_model))
    head = processor.encode("assistant\n")
    assert head + processor.encode_answer(answer) == processor.encode(f"assistant\n{answer}")


@pytest.mark.parametrize("text", ("bbox_2d", "\nCount bin.", "(B)", "[ 1.25, 3]", "A. bed, B"))
def test_no_space_is_put_elsewhere(tokenizer, text):
    """Not within a name, nor before a capital that begins a word."""
    assert "".join(tokens(tokenizer, text)) == text


def test_names_and_sides_are_one_token(tokenizer):
    for word in (*FURNITURE, *SIDES):
        assert tokens(tokenizer, f"a {word}")[1:] == [f" {word}"]


def test_lines_that_are_one_token(tokenizer):
    """Instructions, and the JSON around boxes; but not the first words of a turn."""
    assert "\n" in tokens(tokenizer, "user\nSeen from the camera.")
    assert "\n" in tokens(tokenizer, "assistant\nThe lamp.")
    assert "\n" not in tokens(tokenizer, "\nReply with a single number only.")
    boxes = '```json\n[{"bbox_2d": [1, 2, 30, 100], "label": "bed"}]\n```'
    assert tokens(tokenizer, boxes) == [
        "```json\n[",
        '{"bbox_2d": [',
        *(" 1", ",", " 2", ",", " 30", ",", " 100"),
        '], "label": "',
        "bed",
        '"}]\n```',
    ]
    tokenizer = train_tokenizer(["user\nIs it left?\nSay yes or no.assistant\nIt is. "] * 9)
    assert tokens(tokenizer, "\nSay yes or no.") == ["\nSay yes or no."]
    assert tokens(tokenizer, "assistant\nIt is.") == ["assistant", "\n", "It", " is", "."]


@pytest.mark.parametrize("kind", ("grounding", "spatial", "coldstart"))
def test_what_is_read_back_is_right(rooms, tiny_model, kind):
    """Every answer of some rooms, in tokens and back: the space before a number changes nothing."""
    processor = Processor(tiny_model, load_config(tiny_model))
    samples = read_samples(rooms / "train" / f"spld_{kind}_data.jsonl", rooms)
    assert len(samples) > 20
    for sample in samples:
        text = answer_text(sample, style_of(sample))
        decoded = processor.decode(processor.encode_answer(text))
        assert accuracy_reward([decoded], sample) == [1.0]
        assert decoded.replace(" ", "") == text.replace(" ", "")
        if kind == "grounding":
            boxes = json.loads(decoded.removeprefix("```json").removesuffix("```"))
            assert boxes == parse_boxes(decoded) == list(sample.answer)
        if kind == "coldstart":
            assert format_reward([decoded]) == [1.0]


def test_an_answer_with_a_space_is_parsed():
    """As the tokenizer writes them."""
    lamp = Sample("f:1", "1", "?", "relative distance", "B", ("A. bed", "B. lamp"))
    size = Sample("f:2", "2", "?", "object size", "130")
    written = ["<think> bed</think><answer> B</answer>", " B", "<answer> A</answer>"]
    assert accuracy_reward(written, lamp) == [1.0, 1.0, 0.0]
    assert accuracy_reward(["<answer> 130</answer>", " 130"], size) == [1.0, 1.0]
