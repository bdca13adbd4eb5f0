"""A tiny model directory: Qwen2.5-VL's architecture, random weights and a tokenizer of its own.

    python -m rooms.tiny --data runs/base/rooms/train runs/tiny/rooms/train --out runs/base/start

Everything that makes the laptop ladder small is a value in the files written here; no other code
knows of it.
"""

from pathlib import Path
from string import ascii_lowercase, digits

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from checkpoint import PREPROCESSING, build_model, parse_config, save_model
from data import PROMPTS, answer_text, prompt_text, read_all, style_of
from files import UserError, write_json
from model import text_rope
from rooms.render import SIZE
from runtime import main_guard
from settings import Parser

CONFIG = {  # 2.3 million weights; M-RoPE for sequences of about 100 tokens
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
VOCABULARY = 1536  # of the tokenizer, special tokens apart
NUMBERS = 400  # numbers below this are tokens
SPECIAL = (  # Qwen2.5's, in its order
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
)
PIECES = Regex(
    r'```json\n\[|\{"bbox_2d": \[|\], "label": "|"\},\n|"\}\]\n```'  # the JSON around boxes, whole
    r'|(?<!user|assistant)\n[A-Z][^\n\d{}"]*[.:]'  # an instruction
    r"|</?think>|</?answer>|\.[0-9]+| ?[0-9]{1,3}| ?[A-Za-z]+(?:-[A-Za-z]+)*"
    r"| ?[^\sA-Za-z0-9]|\n|\s+"
)
# A space is put before a number, a word and an option's letter, so that each is the same token
# everywhere. Before a number: wherever none stands, but not within "bbox_2d" and 1.5. Before words
# and letters: at the start of a line and after a tag. The first word of an answer gets none,
# because an answer is encoded apart from "assistant\n".
AFTER_LINE_OR_TAG = r"(?<=\n|think>|answer>)(?<!assistant\n)"
SPACED = {digit: rf"(?<![ _.\d]){digit}" for digit in digits}
SPACED |= {letter: rf"{AFTER_LINE_OR_TAG}{letter}" for letter in ascii_lowercase}
SPACED |= {letter: rf"{AFTER_LINE_OR_TAG}{letter}\b" for letter in "ABCD"}
# In what is decoded there is none: texts come back as they were written.
SPACES = r"(?<![^\n>\[(-]) (?=\d)|(?<=\n|think>|answer>) (?=[a-zA-D])"
CHAT_TEMPLATE = (  # the chat format of data.Processor, for transformers
    "{% if messages[0].role != 'system' %}<|im_start|>system\n"
    + PROMPTS["system"]
    + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}"
    "<|vision_start|><|{{ part.type }}_pad|><|vision_end|>"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# ---------------------------------------------------------------------------------- the tokenizer


def corpus(samples):
    """Every text of the samples, and the numbers below NUMBERS often enough to become tokens."""
    for sample in samples:
        for role, parts in sample.messages or ():
            for part in parts:
                if role == "assistant":
                    # After a newline its first word gets a space (SPACED), as in a sentence.
                    yield role
                    yield f"\n{part}"
                elif isinstance(part, str):
                    yield f"{role}\n{part}"
        if not sample.messages:
            yield "user\n" + prompt_text(sample, style_of(sample))
            yield answer_text(sample, style_of(sample))
    numbers = " ".join(map(str, range(NUMBERS)))
    for _ in range(len(samples) // 50):
        yield f"system\n{PROMPTS['system']}{numbers}"


def train_tokenizer(texts):
    """Byte-level BPE within PIECES: a number below NUMBERS or a fixed line is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(pattern), f" {text}") for text, pattern in SPACED.items()]
    )
    split = pre_tokenizers.Split(PIECES, "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    without_spaces = decoders.Replace(Regex(SPACES), "")
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), without_spaces])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


# ---------------------------------------------------------------------------------- the weights


def initialize(model, seed):
    """Random weights in place: N(0, 1 / inputs) for matrices; biases are zero.

    A matrix that writes to the residual stream begins at a fifth of that.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                std = parameter[0].numel() ** -0.5
                if "embed_tokens" in name:
                    std = 0.08
                elif name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight")):
                    std *= 0.2
                parameter.normal_(0.0, std, generator=generator)


def look_back(attention, config):
    """Let the heads of the first key head begin by attending to the token one, two, ... before.

    They do so nearly by their biases alone. Rotated by position times frequency f, the biases
    (s, 0) of a key at p and (s cos nf, -s sin nf) of a query at q have the product
    s^2 sum_f cos((q - p - n) f), which is largest n tokens back. An induction head (Olsson et al.
    2022), which looks up what followed a token before, needs such a head below it, and small models
    are slow to find both at once. The second number of a place stands two tokens after the name.
    The other heads stay random: where all looked back, none looked anything up.
    """
    heads = config.num_attention_heads // config.num_key_value_heads
    back = torch.arange(1, heads + 1).expand(3, 1, -1)
    cos, sin = text_rope(back, config, torch.float32)  # (1, 1, heads, D/2)
    key = slice(config.head_dim)
    queries = slice(heads * config.head_dim)
    attention.k_proj.weight[key] *= 0.1
    attention.k_proj.bias[: config.head_dim // 2] = 4
    attention.q_proj.weight[queries] *= 0.1
    attention.q_proj.bias[queries] = 4 * torch.cat((cos, -sin), dim=-1).flatten()


def order_numbers(embedding, tokenizer):
    """Begin with like rows (of (V, W)) for like numbers: cosines and sines of n beside the noise.

    With a tied head neighbouring numbers then share what is learned: a corner at 57 says something
    about 58.
    """
    wavelengths = torch.logspace(4, 10, embedding.shape[1] // 2, base=2)  # 16 to 1,024
    std = embedding.std()
    for number in range(NUMBERS):
        row = tokenizer.token_to_id(f"Ġ{number}")
        if row is not None:
            angles = 2 * torch.pi * torch.tensor(number) / wavelengths
            wave = torch.cat((angles.cos(), angles.sin())) * std * 2**0.5
            embedding[row] = (embedding[row] + wave) * 0.5**0.5


# ---------------------------------------------------------------------------------- the directory


def side_files(token, max_pixels):
    """The small files beside config.json and tokenizer.json. token: name -> id."""
    end = token("<|endoftext|>")
    return {
        "tokenizer_config.json": {
            # transformers 5's Qwen2Tokenizer puts Qwen2's pieces in place of PIECES.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": CHAT_TEMPLATE,
            "additional_special_tokens": list(SPECIAL[1:]),
        },
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},  # transformers' processor reads it
        "generation_config.json": {"eos_token_id": [token("<|im_end|>"), end], "pad_token_id": end},
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "min_pixels": 4 * 28 * 28,
            "max_pixels": max_pixels,
            **PREPROCESSING,  # vLLM does not normalize without a mean and a std
        },
    }


def write_model(out, source, tokenizer, max_pixels, seed):
    """Write a model directory of random weights. Returns: how many weights.

    source: config.json without its token ids.
    """
    out = Path(out)
    token = tokenizer.token_to_id
    end, end_of_turn = token("<|endoftext|>"), token("<|im_end|>")
    source = source | {
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
        "bos_token_id": end,
        "eos_token_id": end_of_turn,
    }
    model = build_model(parse_config(source)).to_empty(device="cpu")
    initialize(model, seed)
    embedding = model.model.embed_tokens.weight
    with torch.no_grad():
        order_numbers(embedding, tokenizer)
        look_back(model.model.layers[0].self_attn, model.config.text)

    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    files = side_files(token, max_pixels)
    for name, content in files.items():
        write_json(out / name, content)
    save_model(out, model.named_parameters(), model.config)
    return sum(parameter.numel() for parameter in model.parameters())


def main():
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, nargs="+", help="folders of the tokenizer's text")
    parser.add_argument("--out", required=True, help="model directory to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out = Path(args.out)
    if (out / "config.json").is_file():
        print(f"{out}: there already")
        return
    files = []
    for folder in args.data:
        found = sorted(Path(folder).glob("*_data.jsonl"))
        if not found:
            raise UserError(f"{folder}: no *_data.jsonl in it; see python -m rooms.scenes --help")
        files += found
    tokenizer = train_tokenizer(corpus(read_all(files, None)))
    tokens = tokenizer.get_vocab_size()
    weights = write_model(out, CONFIG | {"vocab_size": tokens}, tokenizer, SIZE**2, args.seed)
    print(f"wrote {out}: {weights:,} weights, {tokens} tokens")


if __name__ == "__main__":
    main_guard(main)
