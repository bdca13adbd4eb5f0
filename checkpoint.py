"""Model directories in the hub layout: config.json in its three layouts, safetensors in and out.

    model = load_model("path/to/Qwen2.5-VL-3B-Instruct", dtype=torch.bfloat16)
    save_model("out", model.named_parameters(), model.config, side_files="path/to/Qwen2.5-VL-...")

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

from files import UserError, read_json, reason, write_json
from model import Config, QwenVL, TextConfig, VisionConfig
from pictures import MEAN, STD

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
# What transformers takes for a picture or a video: the first that is there. A section of None is
# the whole file; a processor_config.json has sections since release 5.
PREPROCESSOR_FILES = {
    "video": (
        ("processor_config.json", "video_processor"),
        ("video_preprocessor_config.json", None),
        ("preprocessor_config.json", None),
        ("processor_config.json", "image_processor"),
    ),
    "image": (
        ("processor_config.json", "image_processor"),
        ("preprocessor_config.json", None),
    ),
}
# Area of a picture or frame where no file names it, as in the classes of transformers
PIXEL_LIMITS = {"image": (56 * 56, 1280 * 28 * 28), "video": (128 * 28 * 28, 768 * 28 * 28)}
# What pictures.py does to every picture
PREPROCESSING = {
    "do_resize": True,
    "resample": 3,  # bicubic
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(MEAN),
    "image_std": list(STD),
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}


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
    Where two keys have one meaning, transformers' choice is taken.

    Args:    source: the parsed JSON object. where: its path, for errors.
    Raises:  UserError for a model, rope type, activation ... that model.py does not implement.
    """
    try:
        text = source.get("text_config") or source
        vision = source.get("vision_config") or {}
        rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
        dtype = source.get("dtype") or source.get("torch_dtype") or "bfloat16"
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
        ("transformers_weights", config.source.get("transformers_weights"), [None]),
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
    """Where each tensor of a checkpoint lies: {its name in model.py: (open file, its name there)}.

    A single file is taken before an index, as transformers does.
    """
    directory = Path(directory)
    if (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{directory}: has an adapter_config.json beside config.json: merge the adapter into "
            "the weights, or take it away"
        )
    single = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    if single.is_file():
        names = [single.name]
    elif index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(
                f"{index}: expected an object with a 'weight_map' from tensor names to files"
            )
        names = dict.fromkeys(map(str, weight_map.values()))  # each file once
    else:
        raise UserError(
            f"{directory}: no model.safetensors and no model.safetensors.index.json in it"
        )
    tensors = {}
    for name in names:
        path = directory / name
        if path.parent != directory:
            raise UserError(f"{index}: names {name!r:.80}, expected a file of its own folder")
        file = open_safetensors(path)
        for key in file.keys():  # noqa: SIM118  it is no dict
            # Releases of transformers between 4.52 and 5 wrote the longer prefixes.
            ours = key.replace("model.language_model.", "model.", 1)
            ours = ours.replace("model.visual.", "visual.", 1)
            if ours in tensors:
                raise UserError(f"{directory}: {key:.80} and {tensors[ours][1]:.80} are one tensor")
            tensors[ours] = file, key
    return tensors


def examples(texts):
    """A few of many texts, for one line.

    >>> examples(["a", "b"]), examples(["a", "b", "c", "d"])
    ('a; b', '4, such as a; b; c')
    """
    shown = "; ".join(text[:80] for text in texts[:3])[:200]
    if len(texts) > 3:
        return f"{len(texts)}, such as {shown}"
    return shown


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
    Raises:  UserError that counts the tensors that are missing, extra, or of another shape or type.
    """
    config = model.config
    stored = checkpoint_tensors(directory)
    wanted = dict(model.named_parameters())
    if config.tie_word_embeddings and "lm_head.weight" in stored:
        take_tied_head(stored, directory, config.dtype)
    missing = [f"missing {name}" for name in wanted if name not in stored]
    extra = [f"unexpected {name}" for name in stored if name not in wanted]
    misfits = []
    for name, (file, key) in stored.items():
        if name not in wanted:
            continue
        data = file.get_slice(key)  # nothing is read yet
        shape = list(wanted[name].shape)
        if data.get_shape() != shape:
            misfits.append(f"{name} has shape {data.get_shape()}, expected {shape}")
        elif data.get_dtype() not in STORED_DTYPES:  # copy_ would convert integers
            misfits.append(f"{name} is stored as {data.get_dtype()}, expected F32, BF16 or F16")
        else:
            tensor, first = local(wanted[name])
            if len(tensor):
                tensor.copy_(data[first : first + len(tensor)])
    # The first of each kind, then the second of each: the examples show every kind.
    problems = sorted([*enumerate(missing), *enumerate(extra), *enumerate(misfits)])
    if problems:
        found = examples([problem for _, problem in problems])
        hint = ""
        if "quantization_config" in config.source:
            hint = " (quantized weights are not read)"
        raise UserError(f"{directory}: weights do not fit config.json{hint}: {found}")


def take_tied_head(stored, directory, dtype):
    """Take lm_head.weight out of the stored tensors of a tied model, where it says nothing new.

    Raises: UserError if it differs from the embedding. (transformers 5 unties such a model.)
    """
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if embedding not in stored:  # the one that was saved is both
        stored[embedding] = stored.pop(head)
        return
    tensors = []
    for file, key in (stored[embedding], stored.pop(head)):
        tensors.append(file.get_tensor(key).to(dtype))
    if not torch.equal(*tensors):
        raise UserError(
            f"{directory}: config.json says tie_word_embeddings, but {head} differs from "
            f"{embedding}: set it to false to train and use both, or remove {head}"
        )


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
             pixel_limits: as read_pixel_limits gives them, for the saved files to say.
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

    if side_files is not None:
        for name in SIDE_FILES:
            if (Path(side_files) / name).is_file():
                shutil.copyfile(Path(side_files) / name, directory / name)
    if pixel_limits is not None:
        set_pixel_limits(directory, pixel_limits)
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


# ---------------------------------------------------------------------------------- side files


def read_stop_ids(directory, tokens):
    """The ids that end a completion, or () where generation_config.json names none.

    Qwen2.5-VL has two, <|im_end|> and <|endoftext|>. tokens: how many tokens there are.
    """
    path = Path(directory) / "generation_config.json"
    stops = read_json(path).get("eos_token_id")
    if stops is None:
        return ()
    ids = tuple(stops) if isinstance(stops, list) else (stops,)
    valid = [stop for stop in ids if type(stop) is int and 0 <= stop < tokens]
    if not ids or len(valid) < len(ids):
        raise UserError(
            f"{path}: eos_token_id is {stops!r:.80}, expected ids of tokens, below {tokens}"
        )
    return ids


def read_pixel_limits(directory):
    """{"image": (smallest, largest) area of a picture, "video": of a frame}, as in transformers."""
    return {kind: limits_of(directory, kind) for kind in PREPROCESSOR_FILES}


def limits_of(directory, kind):
    """The smallest and the largest area. UserError where a file asks for what pictures.py lacks."""
    found = next(preprocessors(directory, kind), None)
    if found is None:
        raise UserError(f"{Path(directory) / 'preprocessor_config.json'}: no such file")
    where, settings, _, _ = found
    for key, expected in PREPROCESSING.items():
        value = settings.get(key)
        if value is not None and value != expected:
            raise UserError(f"{where}: {key} is {value!r:.80}, expected {expected}")
    size = settings.get("size") or {}
    if not isinstance(size, dict):
        raise UserError(f"{where}: size is {size!r:.80}, expected shortest_edge and longest_edge")
    limits = []
    names = ("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")
    for (key, edge), default in zip(names, PIXEL_LIMITS[kind]):
        value = settings.get(key)  # as Qwen wrote it; transformers 5 writes sizes, which are areas
        if value is None:
            value = size.get(edge) if size else default
        if type(value) not in (int, float) or not 1 <= value < math.inf:
            found = f"{key} (or size: {edge}) is {value!r:.80}"
            raise UserError(f"{where}: {found}, expected a positive number")
        limits.append(value)
    return tuple(limits)


def preprocessors(directory, kind):
    """Yield (where, settings, path, content of the file) of each place that has settings.

    kind: "image" or "video"; the first place is the one that counts.
    """
    for name, section in PREPROCESSOR_FILES[kind]:
        where = path = Path(directory) / name
        if not path.is_file():
            continue
        settings = content = read_json(path)
        if section is not None:
            where = f"{path}: {section}"
            settings = content.get(section)
        if settings is None:
            continue
        if not isinstance(settings, dict):
            raise UserError(f"{where} is {settings!r:.80}, expected an object")
        yield where, settings, path, content


def set_pixel_limits(directory, limits):
    """Make every file say these limits, so that no reader takes others."""
    if read_pixel_limits(directory) == limits:
        return
    for kind, (low, high) in limits.items():
        for _, settings, path, content in preprocessors(directory, kind):
            settings |= {"min_pixels": low, "max_pixels": high}
            if "size" in settings:  # where transformers 5 reads them
                settings["size"] = {"shortest_edge": low, "longest_edge": high}
            write_json(path, content)
