"""Model directories in the hub layout: config.json in its three layouts, safetensors in and out.

    model = load_model("path/to/Qwen2.5-VL-3B-Instruct", dtype=torch.bfloat16)
    save_model("out", model.named_parameters(), model.config, side_files="path/to/Qwen2.5-VL-3B-Instruct")

A directory is a model once config.json is in it: saving removes that file first and writes it last.
"""

import dataclasses
import math
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from files import UserError, read_json, write_json
from model import Config, QwenVL, TextConfig, VisionConfig

SHARD_BYTES = 5 * 10**9  # a saved file holds at most this much, as on the hub
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "generation_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)


# ---------------------------------------------------------------------------------------------- configuration


def parse_config(source, where="config.json"):
    """Read any of the three layouts config.json comes in.

    Flat as published, flat as re-saved (vision_config lists only what differs from the class defaults), and nested
    text_config with rope_parameters (transformers 5).

    Args:    source: the parsed JSON object. where: its path, for errors.
    Raises:  UserError for a model_type, rope type or sliding window that this file does not implement.
    """
    if not isinstance(source, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(source).__name__}")
    if source.get("model_type") != "qwen2_5_vl":
        raise UserError(
            f"{where}: model_type is {source.get('model_type')!r}, expected 'qwen2_5_vl'"
        )
    text = _section(source, "text_config", where) or source
    rope = _section(text, "rope_parameters", where) or _section(text, "rope_scaling", where)
    values = dict(
        text,
        rope_theta=rope.get("rope_theta", text.get("rope_theta", TextConfig.rope_theta)),
        mrope_section=rope.get("mrope_section", TextConfig.mrope_section),
    )
    vision = dict(_section(source, "vision_config", where))
    vision["in_channels"] = vision.get(
        "in_channels", vision.get("in_chans", VisionConfig.in_channels)
    )
    dtype = source.get("torch_dtype") or source.get("dtype") or "bfloat16"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"{where}: torch_dtype is {dtype!r}, expected float32, bfloat16 or float16")
    config = Config(
        text=_from_fields(TextConfig, values, where),
        vision=_from_fields(VisionConfig, vision, where),
        tie_word_embeddings=bool(
            source.get("tie_word_embeddings") or text.get("tie_word_embeddings")
        ),
        image_token_id=source.get("image_token_id", 151655),
        video_token_id=source.get("video_token_id", 151656),
        dtype=getattr(torch, dtype),
        source=source,
    )
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in ("default", "mrope"):
        raise UserError(
            f"{where}: rope type {rope_type!r} is not supported, expected 'default' or 'mrope'"
        )
    if text.get("use_sliding_window"):
        raise UserError(f"{where}: use_sliding_window is true; sliding windows are not supported")
    for part in (config.text, config.vision):
        if part.hidden_act != "silu":
            raise UserError(f"{where}: hidden_act is {part.hidden_act!r}, expected 'silu'")
    t, v = config.text, config.vision
    for name in ("image_token_id", "video_token_id"):
        if type(getattr(config, name)) is not int or not 0 <= getattr(config, name) < t.vocab_size:
            raise UserError(
                f"{where}: {name} is {getattr(config, name)!r}, expected a token id below {t.vocab_size}"
            )
    if t.hidden_size % t.num_attention_heads or t.num_attention_heads % t.num_key_value_heads:
        raise UserError(
            f"{where}: {t.num_attention_heads} heads do not divide width {t.hidden_size}, "
            f"or {t.num_key_value_heads} key-value heads do not divide them"
        )
    if len(t.mrope_section) != 3 or 2 * sum(t.mrope_section) != t.head_dim:
        raise UserError(
            f"{where}: mrope_section {list(t.mrope_section)} must be three numbers that add up to half the "
            f"head dimension, {t.head_dim / 2:g}"
        )
    if v.out_hidden_size != t.hidden_size or v.hidden_size % (4 * v.num_heads):
        raise UserError(
            f"{where}: vision_config out_hidden_size {v.out_hidden_size} must equal the text's "
            f"hidden_size {t.hidden_size}, and 4 * num_heads divide hidden_size {v.hidden_size}"
        )
    patch = (v.in_channels, v.temporal_patch_size, v.patch_size, v.spatial_merge_size)
    if patch != (3, 2, 14, 2) or v.window_size < 28:
        raise UserError(
            f"{where}: vision_config has in_channels, temporal_patch_size, patch_size, spatial_merge_size "
            f"{patch} and window_size {v.window_size}, expected (3, 2, 14, 2) and at least 28"
        )
    return config


def _section(parent, key, where):
    """The object at `key`, {} where it is absent or null."""
    if not isinstance(parent.get(key), (dict, type(None))):
        raise UserError(f"{where}: {key} is {parent[key]!r:.80}, expected an object")
    return parent.get(key) or {}


def _from_fields(cls, values, where):
    """Build a config dataclass from the keys it knows, checking that each has the type of its default."""
    chosen = {}
    for field in dataclasses.fields(cls):
        value = values.get(field.name, field.default)
        value = tuple(value) if isinstance(value, list) else value
        kind = (int, float) if isinstance(field.default, float) else type(field.default)
        positive = not isinstance(value, (int, float)) or 0 < value < math.inf
        whole = not isinstance(value, tuple) or all(
            type(item) is int and item >= 0 for item in value
        )
        if not isinstance(value, kind) or isinstance(value, bool) or not positive or not whole:
            raise UserError(
                f"{where}: {field.name} is {value!r:.80}, expected something like {field.default!r}"
            )
        chosen[field.name] = value
    return cls(**chosen)


def load_config(directory):
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory}: not a model directory (no config.json in it)")
    return parse_config(read_json(directory / "config.json"), str(directory / "config.json"))


# ---------------------------------------------------------------------------------------------- weights


def build_model(config):
    """The model on the meta device: shapes without memory. load_weights fills it."""
    with torch.device("meta"):
        return QwenVL(config)


def checkpoint_tensors(directory):
    """Where each tensor of a checkpoint lies, under the names of this file: {our name: (file, name in the file)}."""
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index)
        weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            raise UserError(
                f"{index}: expected an object with a 'weight_map' from tensor names to files"
            )
    elif (directory / "model.safetensors").is_file():
        with open_safetensors(directory / "model.safetensors") as file:
            weight_map = dict.fromkeys(file.keys(), "model.safetensors")
    else:
        raise UserError(
            f"{directory}: no model.safetensors and no model.safetensors.index.json in it"
        )
    missing = sorted({file for file in weight_map.values() if not (directory / file).is_file()})
    if missing:
        raise UserError(f"{index}: names files that do not exist: {', '.join(missing)}")
    found = {}
    for (
        name,
        file,
    ) in weight_map.items():  # releases of transformers in between wrote the longer prefixes
        ours = name.replace("model.language_model.", "model.", 1).replace(
            "model.visual.", "visual.", 1
        )
        found[ours] = (directory / file, name)
    return found


def open_safetensors(path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def load_weights(model, directory, local=lambda parameter: (parameter, 0)):
    """Fill a model's parameters from a checkpoint, reading only the rows that are held here.

    Args:    local: parameter -> (the tensor held here, its first row in the whole); runtime.py passes its own for
             sharded parameters. Any of fp32, bf16, fp16 on disk is converted to the parameter's dtype.
    Raises:  UserError listing every missing, extra or wrongly shaped tensor.
    """
    found, wanted = checkpoint_tensors(directory), dict(model.named_parameters())
    if model.config.tie_word_embeddings:
        found.pop("lm_head.weight", None)  # a tied head that was saved as well
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in wanted]
    files = {}
    for name, (path, key) in found.items():
        if name in wanted:
            files.setdefault(path, []).append((name, key))
    for path, names in files.items():
        with open_safetensors(path) as file:
            present = set(file.keys())
            for name, key in names:
                if key not in present:
                    problems.append(f"missing {key} in {path.name}")
                    continue
                stored, wanted_shape = file.get_slice(key), list(wanted[name].shape)
                if stored.get_shape() != wanted_shape:
                    problems.append(
                        f"{name} has shape {stored.get_shape()}, expected {wanted_shape}"
                    )
                if stored.get_dtype() not in ("F32", "BF16", "F16"):
                    problems.append(
                        f"{name} is stored as {stored.get_dtype()}, expected F32, BF16 or F16"
                    )
    if problems:
        raise UserError(f"{directory}: weights do not fit config.json: " + "; ".join(problems))
    with torch.no_grad():
        for path, names in files.items():
            with open_safetensors(path) as file:
                for name, key in names:
                    tensor, first = local(wanted[name])
                    if len(tensor):
                        tensor.copy_(file.get_slice(key)[first : first + len(tensor)])


def load_model(directory, dtype=None, device="cpu"):
    """A whole model on one device, ready for inference. dtype: config.json's, if None."""
    config = load_config(directory)
    model = build_model(config).to(dtype or config.dtype).to_empty(device=device)
    load_weights(model, directory)
    return model.eval()


def save_model(directory, tensors, config, side_files=None, pixel_limits=None):
    """Write a model directory in the hub layout; it is a model only once config.json is in place.

    config.json is removed first and written last, so a directory that has one is complete. Weights are stored in
    config.dtype, in files of at most SHARD_BYTES.

    Args:    tensors: iterable of (name, whole tensor), consumed one at a time.
             side_files: the directory whose tokenizer, preprocessor, chat template ... are carried over.
             pixel_limits: {"min_pixels", "max_pixels"} to put into preprocessor_config.json, as trained.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").unlink(missing_ok=True)
    for left in directory.glob("writing-*.tmp"):  # by a save that was interrupted
        left.unlink()
    shards, shard, size, total = [], {}, 0, 0

    def flush():
        path = directory / f"writing-{len(shards)}.tmp"
        path.touch()
        mode = path.stat().st_mode
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(mode)  # save_file lets nobody but the owner read
        shards.append((path, list(shard)))

    for name, tensor in tensors:
        tensor = tensor.detach().to("cpu", config.dtype).contiguous()
        bytes_here = tensor.numel() * tensor.element_size()
        if shard and size + bytes_here > SHARD_BYTES:
            flush()
            shard, size = {}, 0
        shard[name] = tensor
        size, total = size + bytes_here, total + bytes_here
    flush()
    for old in [
        *directory.glob("model*.safetensors"),
        *directory.glob("model*.safetensors.index.json"),
    ]:
        old.unlink()
    weight_map = {}
    for i, (path, names) in enumerate(shards):
        name = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        )
        os.replace(path, directory / name)
        weight_map.update((tensor, name) for tensor in names)
    if len(shards) > 1:
        write_json(
            directory / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
    if side_files is not None and Path(side_files).resolve() != directory.resolve():
        for name in SIDE_FILES:
            if (Path(side_files) / name).is_file():
                shutil.copyfile(Path(side_files) / name, directory / name)
    if pixel_limits is not None:
        preprocessor = read_json(directory / "preprocessor_config.json")
        if "size" in preprocessor:
            preprocessor["size"] = {
                "shortest_edge": pixel_limits["min_pixels"],
                "longest_edge": pixel_limits["max_pixels"],
            }
        write_json(directory / "preprocessor_config.json", preprocessor | pixel_limits)
    write_json(directory / "config.json", config.source)
