"""What the random start of the tiny model holds."""
import torch
from tokenizers import Tokenizer

from checkpoint import load_model
from model import rotate, text_rope


def test_first_heads_look_back(tiny_model):
    """Head h of the first layer attends most to the token h + 1 places before, whatever the words."""
    model = load_model(tiny_model, torch.float32)
    config, decoder = model.config.text, model.model
    ids = torch.randint(config.vocab_size, (1, 60), generator=torch.Generator().manual_seed(0))
    layer = decoder.layers[0]
    with torch.no_grad():
        x = layer.input_layernorm(decoder.embed_tokens(ids))
        rope = text_rope(torch.arange(60).expand(3, 1, -1), config, torch.float32)
        q, k = (rotate(p(x).unflatten(-1, (-1, config.head_dim)).transpose(1, 2), *rope)
                for p in (layer.self_attn.q_proj, layer.self_attn.k_proj))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = (q @ k.mT / config.head_dim**0.5).masked_fill(torch.ones(60, 60).triu(1).bool(), -torch.inf)
    for head, weights in enumerate(scores.softmax(-1)[0]):
        back = torch.arange(head + 1, 60)
        assert (weights.argmax(-1)[head + 1:] == back - head - 1).all()
        assert weights[back, back - head - 1].min() > 0.5


def test_words_that_are_one_token(tiny_model):
    """Numbers, sides with a hyphen, an option's letter; but not what a user or the model begins to say."""
    def tokens(text):
        return [tokenizer.decode([i]) for i in tokenizer.encode(text, add_special_tokens=False).ids]

    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    assert tokens("\nA. left-front\nB. back 312") == ["\nA.", " left-front", "\nB.", " back", " ", "312"]
    assert "\n" in tokens("user\nSeen from the camera.") and "\n" in tokens("assistant\nThe lamp.")
    assert "\n" not in tokens("\nReply with a single number only.")
