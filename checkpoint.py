"""Model directories in the hub layout: config.json in its three layouts, safetensors in and out.

    model = load_model("path/to/Qwen2.5-VL-3B-Instruct", dtype=torch.bfloat16)
    save_model("out", model.named_parameters(), model.config, side_files="path/to/Qwen2.5-VL-...")

A directory is a model once config.json is in it: saving removes that file first and writes it last.
"""

import dataclasses
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from files import UserError, read_json, reason, write_json
from model import Config, QwenVL, TextConfig, VisionConfig

SHARD_BYTES = 5 * 10**9  # a saved file holds at most this much, as on the hub
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED_DTYPES = ("F32", "BF16", "F16")  # as safetensors calls them
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


# ---------------------------------------------------------------------------------- configuration


def load_config(directory):
    """The Config of a model directory."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(f"{directory}: not a model directory (no config.json in it)")
    return parse_config(read_json(path), str(path))


def parse_config(source, where="config.json"):
    """Read any of the three layouts config.json comes in.

    Flat as published, flat as re-saved (vision_config lists only what differs from the class
    defaults), and nested text_config with rope_parameters (transformers 5).

    Refused is what would otherwise be wrong in silence. A wrong size shows when weights are loaded.

    Args:    source: the parsed JSON object. where: its path, for errors.
    Raises:  UserError for a model, rope type, activation ... that model.py does not implement.
    """
    if not isinstance(source, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(source).__name__}")
    try:
        text = source.get("text_config") or source
        vision = source.get("vision_config") or {}
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        dtype = source.get("torch_dtype") or source.get("dtype") or "bfloat16"
        config = Config(
            text=with_defaults(TextConfig, text | rope),  # rope_theta stands in either
            vision=with_defaults(VisionConfig, {"in_channels": vision.get("in_chans", 3)} | vision),
            tie_word_embeddings=bool(
                source.get("tie_word_embeddings") or text.get("tie_word_embeddings")
            ),
            image_token_id=source.get("image_token_id", 151655),
            video_token_id=source.get("video_token_id", 151656),
            dtype=DTYPES.get(dtype),
            source=source,
        )
        rope_type = rope.get("rope_type") or rope.get("type") or "default"
        refuse_unknown(config, dtype, rope_type, bool(text.get("use_sliding_window")))
    except (AttributeError, TypeError, ArithmeticError) as error:
        raise UserError(f"{where}: a value is of the wrong type ({reason(error)})") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return config


def refuse_unknown(config, dtype, rope_type, sliding):
    """Raise UserError for the first value that model.py or data.py do not implement."""
    t, v = config.text, config.vision
    patch = (v.in_channels, v.temporal_patch_size, v.patch_size, v.spatial_merge_size)
    patch_name = "in_channels, temporal_patch_size, patch_size, spatial_merge_size"
    implemented = (
        ("model_type", config.source.get("model_type"), ["qwen2_5_vl"]),
        ("rope type", rope_type, ["default", "mrope"]),
        ("use_sliding_window", sliding, [False]),
        ("hidden_act", t.hidden_act, ["silu"]),
        ("vision_config hidden_act", v.hidden_act, ["silu"]),
        ("torch_dtype", dtype, list(DTYPES)),
        (f"vision_config ({patch_name})", patch, [(3, 2, 14, 2)]),
    )
    for name, value, expected in implemented:
        if value not in expected:
            options = " or ".join(map(repr, expected))
            raise UserError(f"{name} is {value!r:.80}, expected {options}")
    # With two numbers model.py would rotate by two axes and leave the width out.
    if len(t.mrope_section) != 3 or 2 * sum(t.mrope_section) != t.head_dim:
        raise UserError(
            f"mrope_section is {t.mrope_section}, expected three numbers that add up to half the "
            f"head dimension, {t.head_dim / 2:g}"
        )


def with_defaults(cls, values):
    """A config dataclass from those keys that it has. Lists become tuples."""
    fields = {}
    for field in dataclasses.fields(cls):
        value = values.get(field.name, field.default)
        fields[field.name] = tuple(value) if isinstance(value, list) else value
    return cls(**fields)


# ---------------------------------------------------------------------------------- weights in


def build_model(config):
    """The model on the meta device: shapes without memory. load_weights fills it."""
    with torch.device("meta"):
        return QwenVL(config)


def checkpoint_tensors(directory):
    """Where each tensor of a checkpoint lies: {its name in model.py: (file, its name there)}."""
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.is_file():
        weight_map = read_json(index)
        weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
        if not isinstance(weight_map, dict):
            raise UserError(
                f"{index}: expected an object with a 'weight_map' from tensor names to files"
            )
    elif single.is_file():
        with open_safetensors(single) as file:
            weight_map = dict.fromkeys(file.keys(), single.name)
    else:
        raise UserError(
            f"{directory}: no model.safetensors and no model.safetensors.index.json in it"
        )
    files = {str(file) for file in weight_map.values()}
    missing = [file for file in sorted(files) if not (directory / file).is_file()]
    if missing:
        raise UserError(f"{index}: names files that do not exist: {', '.join(missing)}")
    tensors = {}
    for name, file in weight_map.items():
        # Releases of transformers between 4.52 and 5 wrote the longer prefixes.
        ours = name.replace("model.language_model.", "model.", 1)
        ours = ours.replace("model.visual.", "visual.", 1)
        tensors[ours] = (directory / file, name)
    return tensors


def open_safetensors(path):
    """A safetensors file, whose tensors are read one by one."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def whole(parameter):
    """A parameter that is not sharded: the tensor held here, and its first row in the whole."""
    return parameter, 0


@torch.no_grad()
def load_weights(model, directory, local=whole):
    """Fill a model's parameters from a checkpoint, reading only the rows that are held here.

    Args:    local: see `whole`; runtime.py passes its own for sharded parameters. fp32, bf16 and
             fp16 on disk are converted to the parameter's dtype.
    Raises:  UserError listing every tensor that is missing, extra, or has another shape or type.
    """
    stored = checkpoint_tensors(directory)
    wanted = dict(model.named_parameters())
    if model.config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)  # a tied head that was saved as well
    problems = [f"missing {name}" for name in wanted if name not in stored]
    problems += [f"unexpected {name}" for name in stored if name not in wanted]
    files = {}  # path -> the tensors that are read from it
    for name, (path, key) in stored.items():
        if name in wanted:
            files.setdefault(path, []).append((name, key))
    for path, names in files.items():
        with open_safetensors(path) as file:
            keys = set(file.keys())
            for name, key in names:
                if key not in keys:
                    problems.append(f"missing {key} in {path.name}")
                    continue
                data = file.get_slice(key)
                shape = list(wanted[name].shape)
                if data.get_shape() != shape:
                    problems.append(f"{name} has shape {data.get_shape()}, expected {shape}")
                elif data.get_dtype() not in STORED_DTYPES:  # copy_ would convert integers
                    problems.append(
                        f"{name} is stored as {data.get_dtype()}, expected F32, BF16 or F16"
                    )
                else:
                    tensor, first = local(wanted[name])
                    if len(tensor):
                        tensor.copy_(data[first : first + len(tensor)])
    if problems:
        raise UserError(f"{directory}: weights do not fit config.json: " + "; ".join(problems))


def load_model(directory, dtype=None, device="cpu"):
    """A whole model on one device, ready for inference. dtype: config.json's, if None."""
    config = load_config(directory)
    model = build_model(config).to(dtype or config.dtype).to_empty(device=device)
    load_weights(model, directory)
    return model.eval()


# ---------------------------------------------------------------------------------- weights out


def save_model(directory, tensors, config, side_files=None, pixel_limits=None):
    """Write a model directory in the hub layout; it is a model only once config.json is in place.

    config.json is removed first and written last, so a directory that has one is complete. Weights
    are stored in config.dtype, in files of at most SHARD_BYTES.

    Args:    tensors: iterable of (name, whole tensor), consumed one at a time.
             side_files: the directory whose tokenizer, preprocessor, chat template ... are copied.
             pixel_limits: {"min_pixels", "max_pixels"} to put into preprocessor_config.json.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").unlink(missing_ok=True)
    for old in directory.glob("writing-*.tmp"):  # by a save that was interrupted
        old.unlink()

    # The files' names hold how many there are: they are known at the end.
    contents = []  # of each file, the names of its tensors
    total = 0
    for shard in shards(tensors, config.dtype):
        write_shard(directory / f"writing-{len(contents)}.tmp", shard)
        contents.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    for old in directory.glob("model*.safetensors*"):
        old.unlink()
    weight_map = {}
    for i, names in enumerate(contents):
        file = "model.safetensors"
        if len(contents) > 1:
            file = f"model-{i + 1:05d}-of-{len(contents):05d}.safetensors"
        os.replace(directory / f"writing-{i}.tmp", directory / file)
        weight_map |= dict.fromkeys(names, file)
    if len(contents) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)

    if side_files is not None and Path(side_files).resolve() != directory.resolve():
        for name in SIDE_FILES:
            if (Path(side_files) / name).is_file():
                shutil.copyfile(Path(side_files) / name, directory / name)
    if pixel_limits is not None:
        set_pixel_limits(directory / "preprocessor_config.json", pixel_limits)
    write_json(directory / "config.json", config.source)


def shards(tensors, dtype):
    """Yield {name: tensor} of at most SHARD_BYTES each, one tensor at least."""
    shard, size = {}, 0
    for name, tensor in tensors:
        tensor = tensor.detach().to("cpu", dtype).contiguous()
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard.clear()  # not {}: the caller holds this one until it gets the next
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def write_shard(path, shard):
    path.touch()
    mode = path.stat().st_mode
    save_file(shard, path, metadata={"format": "pt"})
    path.chmod(mode)  # save_file lets nobody but the owner read


def set_pixel_limits(path, limits):
    preprocessor = read_json(path)
    if "size" in preprocessor:  # where transformers 5 reads them
        preprocessor["size"] = {
            "shortest_edge": limits["min_pixels"],
            "longest_edge": limits["max_pixels"],
        }
    write_json(path, preprocessor | limits)
