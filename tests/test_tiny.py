"""What the random start of the tiny model holds."""

import pytest
import torch
from bench_grpo import LARGE, SMALL
from tokenizers import Tokenizer

from checkpoint import build_model, load_model, parse_config
from files import UserError
from model import Causal, rotate, text_rope
from rooms.tiny import CONFIG, train_tokenizer, write_model


def test_first_heads_look_back(tiny_model):
    """Those of the first key head attend most to the token before, whatever the words; the others do not."""
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
    before = scores.softmax(-1)[0].diagonal(-1, 1, 2)  # (H, 59)
    queries = config.num_attention_heads // config.num_key_value_heads
    assert before[:queries].min() > 0.5 and before[queries:].mean() < 0.2


def test_words_that_are_one_token(tiny_model):
    """Numbers, sides with a hyphen, an option's letter; but not what a user or the model begins to say."""

    def tokens(tokenizer, text):
        return [tokenizer.decode([i]) for i in tokenizer.encode(text, add_special_tokens=False).ids]

    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    assert tokens(tokenizer, "\nA. left-front\nB. back 312") == [
        "\nA.",
        " left-front",
        "\nB.",
        " back",
        " ",
        "312",
    ]
    assert "\n" in tokens(tokenizer, "user\nSeen from the camera.") and "\n" in tokens(
        tokenizer, "assistant\nThe lamp."
    )
    assert "\n" not in tokens(tokenizer, "\nReply with a single number only.")
    tokenizer = train_tokenizer(["user\nIs it left?\nSay yes or no.assistant\nIt is. "] * 9)
    assert tokens(tokenizer, "\nSay yes or no.") == ["\nSay yes or no."]
    assert tokens(tokenizer, "assistant\nIt is.") == ["assistant", "\n", "It", " is", "."]


def test_options_are_named_by_letters(tiny_model):
    """What a model knows of a letter then holds for an option."""
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    embedding = load_model(tiny_model, torch.float32).model.embed_tokens.weight
    pairs = [
        [tokenizer.encode(text).ids for text in (f"\n{letter}.", f" {letter}")] for letter in "ABC"
    ]
    assert all(len(option) == len(letter) == 1 and option != letter for option, letter in pairs)
    assert all(torch.equal(embedding[option], embedding[letter]) for option, letter in pairs)


@pytest.mark.parametrize(
    "change", ({"num_hidden_layers": 8}, {"hidden_size": 64, "num_attention_heads": 2})
)
def test_a_model_of_another_shape_does_not_grow(change, tmp_path):
    words = train_tokenizer(["left lamp"] * 9)
    config = CONFIG | {"vocab_size": words.get_vocab_size()}
    other = (
        config
        | change
        | {
            "vision_config": CONFIG["vision_config"]
            | {"out_hidden_size": change.get("hidden_size", 128)}
        }
    )
    write_model(tmp_path / "other", other, words, 112**2, 0)
    with pytest.raises(
        UserError,
        match="--grow .*other: expected tiny.CONFIG's shape, with at most 6 decoder layers",
    ):
        write_model(tmp_path / "grown", config, words, 112**2, 0, tmp_path / "other")
    assert not (tmp_path / "grown").exists()


def test_the_models_of_the_speed_tables_have_the_sizes_they_are_said_to_have():
    """They are tiny.CONFIG's but for a few values: a change of its depth once passed to them unseen."""
    sizes = [
        sum(p.numel() for p in build_model(parse_config(config)).parameters())
        for config in (SMALL, LARGE)
    ]
    assert [round(size / 1e6) for size in sizes] == [44, 611]


def test_a_grown_model_says_what_it_said(tmp_path):
    """New layers that write nothing change nothing; known words keep their embeddings, new ones are the mean of their parts."""
    one, two = train_tokenizer(["left lamp"] * 9), train_tokenizer(["left-lamp bin"] * 9)
    write_model(
        tmp_path / "small",
        CONFIG | {"vocab_size": one.get_vocab_size(), "num_hidden_layers": 2},
        one,
        112**2,
        0,
    )
    write_model(
        tmp_path / "same",
        CONFIG | {"vocab_size": one.get_vocab_size()},
        one,
        112**2,
        1,
        tmp_path / "small",
    )
    write_model(
        tmp_path / "other",
        CONFIG | {"vocab_size": two.get_vocab_size()},
        two,
        112**2,
        1,
        tmp_path / "small",
    )
    small, same, other = (
        load_model(tmp_path / name, torch.float32) for name in ("small", "same", "other")
    )
    for layer in same.model.layers[:4]:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.zeros_(projection.weight)
    ids = torch.tensor([one.encode("left lamp left left").ids])
    layout, rope = (
        Causal(),
        text_rope(torch.arange(ids.shape[1]).expand(3, 1, -1), small.config.text, torch.float32),
    )
    outputs = []
    for model in (small.model, same.model):
        x = model.embed_tokens(ids)
        for layer in model.layers:
            x = layer(x, rope, layout)
        outputs.append(model.norm(x))
    assert torch.equal(*outputs)
    old, new = small.model.embed_tokens.weight, other.model.embed_tokens.weight
    assert torch.equal(
        new[two.token_to_id("left-lamp")], old[one.encode("left-lamp").ids].mean(dim=0)
    )
    assert torch.equal(new[two.token_to_id("<|im_end|>")], old[one.token_to_id("<|im_end|>")])
