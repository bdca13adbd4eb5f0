"""What the random start of the tiny model holds."""

import torch
from tokenizers import Tokenizer

from checkpoint import load_model
from model import rotate, text_rope
from rooms.tiny import NUMBERS, train_tokenizer


def test_first_heads_look_back(tiny_model):
    """Those of the first key head attend most to the token before, the others do not."""
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
    """Numbers, sides with a hyphen, an option's letter; but not the first words of a turn."""

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
    for letter in "ABC":
        option = tokenizer.encode(f"\n{letter}.").ids
        plain = tokenizer.encode(f" {letter}").ids
        assert len(option) == len(plain) == 1
        assert option != plain
        assert torch.equal(embedding[option], embedding[plain])


def test_numbers_begin_in_order(tiny_model):
    """Rows of neighbouring numbers are more alike than those of numbers far apart."""
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    embedding = load_model(tiny_model, torch.float32).model.embed_tokens.weight.detach()
    ids = [tokenizer.token_to_id(str(number)) for number in range(NUMBERS)]
    ids = [i for i in ids if i is not None]
    rows = torch.nn.functional.normalize(embedding[ids], dim=1)
    alike = rows @ rows.T
    assert len(rows) > 300
    assert alike.diagonal(1).mean() > 0.4 > 0.1 > alike.diagonal(200).mean()
