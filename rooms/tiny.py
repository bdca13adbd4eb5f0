"""A tiny model directory: Qwen2.5-VL's architecture with a few million random weights and a tokenizer of its own.

    python -m rooms.tiny --data runs/base/rooms/train runs/tiny/rooms/train --out runs/base/start
    python -m rooms.tiny --data runs/base/rooms/train runs/tiny/rooms/train --out runs/base/start --grow base   # not random

Everything that makes the laptop ladder small is a value in the files written here; no other code knows of it.
"""

import argparse
import re
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from checkpoint import build_model, load_model, parse_config, save_model
from data import PROMPTS, answer_text, load_tokenizer, prompt_text, read_samples, style_of
from files import UserError, write_json
from model import text_rope
from runtime import main_guard
from settings import Parser

CONFIG = {  # 2.3 million weights; width, depth and M-RoPE for sequences of about 100 tokens
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "torch_dtype": "float32",
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 100.0,
    "max_position_embeddings": 4096,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 4,
        "hidden_size": 128,
        "num_heads": 4,
        "intermediate_size": 256,
        "in_chans": 3,
        "out_hidden_size": 128,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 1,
        "hidden_act": "silu",
    },
}
WORDS = 1536  # of the tokenizer, special tokens apart
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)  # Qwen2.5's, in its order
PIECES = Regex(
    r'```json\n\[|\{"bbox_2d": \[|\], "label": "|"\},\n|"\}\]\n```'  # the JSON around boxes, whole
    r'|\n[A-D]\.|(?<!user|assistant)\n[A-Z][^\n\d{}"]*[.:]'  # an option's letter, a line of instructions, whole
    r"|</?think>|</?answer>|[0-9]{1,3}| ?[A-Za-z]+(?:-[A-Za-z]+)*| ?[^\sA-Za-z0-9]|\s+"
)
CHAT_TEMPLATE = (  # the chat format of data.Processor.example, for transformers
    "{% if messages[0].role != 'system' %}<|im_start|>system\n"
    + PROMPTS["system"]
    + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}"
    "<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def corpus(samples):
    """Every text the samples' conversations hold, and the numbers below 400 often enough to become tokens."""
    for sample in samples:
        if sample.messages:
            yield from (
                role + "\n" + text
                for role, parts in sample.messages
                for text in parts
                if isinstance(text, str)
            )
        else:
            yield "user\n" + prompt_text(sample, style_of(sample))
            yield answer_text(sample, style_of(sample), (1, 1))
    for _ in range(len(samples) // 50):
        yield "system\n" + PROMPTS["system"] + " ".join(map(str, range(400)))


def train_tokenizer(texts):
    """Byte-level BPE whose words are PIECES: a number of up to three digits or a fixed line is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(PIECES, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=WORDS,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def initialize(model, seed):
    """N(0, 1 / inputs) for matrices, a fifth of it where a block writes to the residual stream; biases zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            std = parameter[0].numel() ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight")):
                std *= 0.2
            parameter.normal_(0.0, 0.08 if "embed_tokens" in name else std, generator=generator)


def look_back(attention, config):
    """Begin with heads that attend to the token before: all that share the first key head, nearly by their biases alone.

    Rotated by p f, position times frequency, a key's bias (s, 0) and a query's (s cos f, -s sin f) have the product
    s^2 sum_f cos((query's p - key's p - 1) f): largest one token back. An induction head (Olsson et al. 2022), which looks
    up a word in the text, needs such a head below it, and small models are slow to find both at once (README). Other key
    heads stay random: where all looked back, none looked anything up.
    """
    cos, sin = text_rope(torch.ones(3, 1, 1), config, torch.float32)  # (1, 1, 1, D/2) of one token
    half, heads = config.head_dim // 2, config.num_attention_heads // config.num_key_value_heads
    key, queries = (slice(count * config.head_dim) for count in (1, heads))
    with torch.no_grad():
        attention.k_proj.weight[key] *= 0.1
        attention.k_proj.bias[:half] = 4
        attention.q_proj.weight[queries] *= 0.1
        attention.q_proj.bias[queries] = 4 * torch.cat((cos, -sin), dim=-1).flatten().repeat(heads)


def order_numbers(embedding, tokenizer):
    """Begin with like rows for like numbers: cosines and sines of n, as in sinusoidal positions, beside the noise.

    With a tied head neighbouring numbers then share what is learned: a corner at 57 says something about 58.
    Args: embedding (V, W), changed in place.
    """
    words = [(tokenizer.token_to_id(str(n)), n) for n in range(400)]
    ids, numbers = torch.tensor([pair for pair in words if pair[0] is not None]).T
    wavelengths = torch.logspace(4, 10, embedding.shape[1] // 2, base=2)  # 16 to 1,024
    angles = 2 * torch.pi * numbers[:, None] / wavelengths
    waves = torch.cat((angles.cos(), angles.sin()), dim=1) * embedding.std() * 2**0.5
    with torch.no_grad():
        embedding[ids] = (embedding[ids] + waves) * 0.5**0.5


def name_options(embedding, tokenizer):
    """Begin with an option's letter, the word "\\nC.", as the letter " C", which the base learns to say after what it marks.

    The base never reads the former; what it knows of the latter then holds for options. embedding (V, W), changed in place.
    """
    words = [
        [tokenizer.encode(text).ids for text in (f"\n{letter}.", f" {letter}")] for letter in "ABCD"
    ]
    with torch.no_grad():
        for option, letter in words:
            if (
                len(option) == len(letter) == 1
            ):  # not so in the tokenizer of a corpus without options
                embedding[option] = embedding[letter]


def grow(model, tokenizer, smaller):
    """Carry over the weights of a smaller model's directory, or one as large.

    Its decoder layers become the last ones, above new ones. A word that it knows keeps its embedding, another begins as
    the mean of the words that it was made of. UserError if more than layers and words differ, or layers are fewer here.
    """
    old, words = load_model(smaller, torch.float32), load_tokenizer(smaller)
    weights, new = dict(old.named_parameters()), len(model.model.layers) - len(old.model.layers)
    shapes = [
        (replace(config.text, vocab_size=0, num_hidden_layers=0), config.vision)
        for config in (old.config, model.config)
    ]
    if new < 0 or shapes[0] != shapes[1]:
        raise UserError(
            f"--grow {smaller}: expected tiny.CONFIG's shape, with at most {len(model.model.layers)} decoder layers"
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            layer = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
            if "embed_tokens" in name:
                for i in range(len(parameter)):
                    known = words.token_to_id(tokenizer.id_to_token(i))
                    parts = (
                        words.encode(tokenizer.decode([i], skip_special_tokens=False)).ids
                        if known is None
                        else [known]
                    )
                    parameter[i] = weights[name][parts].mean(dim=0)
            elif not layer:
                parameter.copy_(weights[name])
            elif int(layer[1]) >= new:
                parameter.copy_(weights[f"model.layers.{int(layer[1]) - new}.{layer[2]}"])


def write_model(out, source, tokenizer, max_pixels, seed, smaller=None):
    """Write a model directory of random weights, or grown from a `smaller` one. Returns: how many weights.

    source: config.json without its token ids."""
    out, ids = Path(out), {name: tokenizer.token_to_id(name) for name in SPECIAL}
    source = source | {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    model = build_model(parse_config(source)).to_empty(device="cpu")
    initialize(model, seed)
    order_numbers(model.model.embed_tokens.weight, tokenizer)
    look_back(model.model.layers[0].self_attn, model.config.text)
    if smaller:
        grow(model, tokenizer, smaller)
    name_options(model.model.embed_tokens.weight, tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": CHAT_TEMPLATE,
            "additional_special_tokens": list(SPECIAL[1:]),
        },
    )
    write_json(
        out / "generation_config.json",
        {
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
        },
    )
    write_json(
        out / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "min_pixels": 4 * 28 * 28,
            "max_pixels": max_pixels,
        },
    )
    save_model(out, model.named_parameters(), model.config)
    return sum(p.numel() for p in model.parameters())


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        help="folders with the *_data.jsonl whose text the tokenizer learns",
    )
    parser.add_argument("--out", required=True, help="model directory to write")
    parser.add_argument(
        "--size", type=int, default=112, help="pictures are shown at most this wide and high"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--grow", metavar="DIR", help="begin with this model's weights, of as many layers or fewer"
    )
    args = parser.parse_args()
    out = Path(args.out)
    if (out / "config.json").is_file():
        print(f"{out}: there already")
        return
    samples = []
    for folder in args.data:
        files = sorted(Path(folder).glob("*_data.jsonl"))
        if not files:
            raise UserError(
                f"{folder}: no *_data.jsonl in it; make rooms with: python -m rooms.scenes --out DIR"
            )
        samples += [s for file in files for s in read_samples(file, file.parent / "images")]

    tokenizer = train_tokenizer(corpus(samples))
    words = tokenizer.get_vocab_size()
    weights = write_model(
        out, CONFIG | {"vocab_size": words}, tokenizer, args.size**2, args.seed, args.grow
    )
    print(f"wrote {out}: {weights:,} weights, {words} words")


if __name__ == "__main__":
    main_guard(main)
