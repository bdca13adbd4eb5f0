"""checkpoint.py: every layout of config.json and safetensors, against transformers; bad files."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import IMAGE, VISION_END, VISION_START, flat_config, hf_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import checkpoint
import data
from checkpoint import (
    build_model,
    checkpoint_tensors,
    load_config,
    load_model,
    parse_config,
    read_pixel_limits,
    read_stop_ids,
    save_model,
)
from data import mrope_positions
from files import UserError
from model import KVCache, TextConfig, VisionConfig

ROOT = Path(__file__).resolve().parents[1]

# The published sizes: (width, inner width, layers, heads, key-value heads, vocabulary, tied head,
# vision's inner width).
SIZES = {
    "3B": (2048, 11008, 36, 16, 2, 151936, True, 3420),
    "7B": (3584, 18944, 28, 28, 4, 152064, False, 3420),
    "32B": (5120, 27648, 64, 40, 8, 152064, False, 3456),
    "72B": (8192, 29568, 80, 64, 8, 152064, False, 3456),
}


def published(size):
    width, inner, layers, heads, kv_heads, words, tied, vision_inner = SIZES[size]
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "max_position_embeddings": 128000,
        "max_window_layers": 70,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": words,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": vision_inner,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": width,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
    }


def resaved(source):
    """As transformers 4.49-4.51 wrote it: vision_config holds what differs from class defaults."""
    vision = {
        key: source["vision_config"][key]
        for key in ("hidden_size", "in_chans", "out_hidden_size", "tokens_per_second")
    }
    rope = {
        "type": "default",
        "rope_type": "default",
        "mrope_section": source["rope_scaling"]["mrope_section"],
    }
    return source | {"vision_config": vision, "rope_scaling": rope}


def nested(source):
    """As transformers 5 writes it: text_config with rope_parameters."""
    outer = (
        "architectures",
        "model_type",
        "image_token_id",
        "video_token_id",
        "tie_word_embeddings",
        "vision_config",
    )
    text = {
        key: value
        for key, value in source.items()
        if key not in (*outer, "rope_scaling", "rope_theta", "torch_dtype")
    }
    rope = {"rope_theta": source["rope_theta"], "rope_type": "default", **source["rope_scaling"]}
    return {key: source[key] for key in outer} | {
        "dtype": source["torch_dtype"],
        "text_config": text | {"model_type": "qwen2_5_vl_text", "rope_parameters": rope},
    }


def without_source(config):
    return {key: value for key, value in vars(config).items() if key != "source"}


# ------------------------------------------------------------ config.json


@pytest.mark.parametrize("size", SIZES)
def test_published_shapes(size):
    """The fields that decide every tensor's shape, and the number of weights of two models."""
    config = parse_config(published(size))
    width, inner, layers, heads, kv_heads, words, tied, vision_inner = SIZES[size]
    assert config.text == TextConfig(
        words, width, inner, layers, heads, kv_heads, 1e-6, 1e6, (16, 24, 24), 128000
    )
    assert config.vision == VisionConfig(
        32, 1280, 16, vision_inner, 3, 14, 2, 2, 112, (7, 15, 23, 31), width, 2
    )
    assert (
        config.text.head_dim == 128
        and config.tie_word_embeddings == tied
        and config.dtype == torch.bfloat16
    )
    assert (config.image_token_id, config.video_token_id) == (151655, 151656)
    weights = sum(p.numel() for p in build_model(config).parameters())  # as the hub counts them
    assert size not in ("3B", "7B") or weights == {"3B": 3_754_622_976, "7B": 8_292_166_656}[size]


@pytest.mark.parametrize("size", ["3B", "7B"])
def test_three_layouts_are_one_config(size):
    """Fields that a re-saved vision_config lacks take the class defaults; theta may be nested."""
    source = published(size)
    expected = without_source(parse_config(source))
    assert without_source(parse_config(resaved(source))) == expected
    assert without_source(parse_config(nested(source))) == expected


def test_class_defaults():
    """An empty config.json is transformers' default model: each number by hand."""
    config = parse_config({"model_type": "qwen2_5_vl", "vision_config": {"out_hidden_size": 8192}})
    assert config.text == TextConfig(
        152064, 8192, 29568, 80, 64, 8, 1e-5, 1e6, (16, 24, 24), 32768, "silu"
    )
    assert config.vision == VisionConfig(
        32, 3584, 16, 3420, 3, 14, 2, 2, 112, (7, 15, 23, 31), 8192, 4, "silu"
    )
    assert not config.tie_word_embeddings and config.dtype == torch.bfloat16


def test_defaults_are_transformers():
    from transformers import Qwen2_5_VLConfig

    theirs = Qwen2_5_VLConfig()
    for ours, other in ((TextConfig(), theirs.text_config), (VisionConfig(), theirs.vision_config)):
        for name, value in vars(ours).items():
            if hasattr(other, name):
                expected = getattr(other, name)
                assert value == (tuple(expected) if isinstance(expected, list) else expected), name
    assert theirs.text_config.rope_parameters["rope_theta"] == TextConfig.rope_theta


@pytest.mark.parametrize("layout", [dict, nested])
def test_transformers_reads_the_same_numbers(layout):
    """Both sides read one config.json: what transformers' config objects say is what ours say."""
    from transformers import Qwen2_5_VLConfig

    source = layout(published("3B"))
    ours, theirs = parse_config(source), Qwen2_5_VLConfig(**json.loads(json.dumps(source)))
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "max_position_embeddings",
    ):
        assert getattr(ours.text, name) == getattr(theirs.text_config, name), name
    for name in (
        "depth",
        "hidden_size",
        "num_heads",
        "intermediate_size",
        "window_size",
        "out_hidden_size",
        "tokens_per_second",
    ):
        assert getattr(ours.vision, name) == getattr(theirs.vision_config, name), name
    assert theirs.text_config.rope_parameters["rope_theta"] == ours.text.rope_theta
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize(
    "outer, inner, tied",
    [(True, None, True), (None, True, True), (False, True, True), (None, None, False)],
)
def test_tied_heads_as_transformers_decides(outer, inner, tied):
    """Releases before 5 wrote tie_word_embeddings into text_config."""
    source = nested(flat_config())
    source.pop("tie_word_embeddings")
    source.update({} if outer is None else {"tie_word_embeddings": outer})
    source["text_config"].update({} if inner is None else {"tie_word_embeddings": inner})
    assert parse_config(source).tie_word_embeddings == tied


REFUSED = [
    ({"model_type": "qwen2_vl"}, "model_type is 'qwen2_vl', expected 'qwen2_5_vl'"),
    ({"model_type": None}, "model_type is None"),
    (
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [2, 3, 3]}},
        "rope type is 'yarn', expected 'default' or 'mrope'",
    ),
    (
        {"rope_scaling": {"rope_type": "dynamic", "mrope_section": [2, 3, 3]}},
        "rope type is 'dynamic'",
    ),
    (
        {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 4]}},
        "mrope_section is .* add up to half the head dimension, 8",
    ),
    (
        {"rope_scaling": {"type": "mrope", "mrope_section": [4, 4]}},
        "mrope_section is .* expected three numbers",
    ),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, "3"]}}, "wrong type .TypeError"),
    ({"rope_scaling": "mrope"}, "wrong type"),
    ({"text_config": [1]}, "wrong type"),
    ({"vision_config": "big"}, "wrong type"),
    ({"use_sliding_window": True}, "use_sliding_window is True, expected False"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    (
        {"vision_config": {"out_hidden_size": 64, "hidden_act": "gelu"}},
        "vision_config hidden_act is 'gelu', expected 'silu'",
    ),
    ({"hidden_size": "64"}, "wrong type"),
    ({"num_attention_heads": 0}, "wrong type"),
    ({"transformers_weights": "other.safetensors"}, "transformers_weights is 'other.safetensors'"),
    ({"torch_dtype": "int8"}, "torch_dtype is 'int8', expected 'float32' or 'bfloat16' or 'float"),
    (
        {"vision_config": {"out_hidden_size": 64, "patch_size": 16}},
        r"patch_size, spatial_merge_size\) is \(3, 2, 16, 2\)",
    ),
]
MISFITS = [  # values that could be another model's, but not that of these weights
    {"num_attention_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}},
    {"num_key_value_heads": 3},
    {"num_hidden_layers": 1},
    {"num_hidden_layers": 3},
    {"num_hidden_layers": True},
    {"vocab_size": 149},
    {"intermediate_size": 95},
    {"tie_word_embeddings": False},
    {"vision_config": flat_config()["vision_config"] | {"out_hidden_size": 32}},
    {"vision_config": flat_config()["vision_config"] | {"depth": 2}},
]


@pytest.mark.parametrize("change, message", REFUSED, ids=[str(change) for change, _ in REFUSED])
def test_unsupported_configs_are_refused_by_name(change, message):
    """A value that is not implemented must never be ignored: the model would be silently wrong."""
    with pytest.raises(UserError, match="here.json: .*" + message) as error:
        parse_config(flat_config() | change, "here.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", MISFITS, ids=str)
def test_a_config_of_another_size_does_not_load(tmp_path, tensors, change):
    """No field is checked for its own sake where the shapes of the weights tell."""
    write_checkpoint(tmp_path / "model", flat_config() | change, tensors[True])
    with pytest.raises(UserError, match=r"weights do not fit config\.json") as error:
        load_model(tmp_path / "model")
    assert "\n" not in str(error.value)


def test_a_sliding_window_that_is_off_is_accepted():
    assert parse_config(published("7B") | {"sliding_window": 32768, "use_sliding_window": False})


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "nul", '"model"', "[" * 100_000, '{"a": 1} x', "\ufeff{}", "1" * 5000]
)
def test_broken_config_json_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json: "):
        load_config(tmp_path)


def test_no_model_directory(tmp_path):
    with pytest.raises(UserError, match="not a model directory"):
        load_config(tmp_path / "nothing")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
KEYS = sorted(
    {
        *flat_config(),
        *flat_config()["vision_config"],
        "text_config",
        "rope_parameters",
        "dtype",
        "rope_type",
        "mrope_section",
        "type",
    }
)


def parse_or_refuse(source):
    try:
        config = parse_config(source)
    except UserError as error:
        assert str(error).startswith("config.json: ") and "\n" not in str(error)
    else:
        assert config.source is source


@settings(max_examples=400)
@given(
    base=st.sampled_from([flat_config(), nested(flat_config()), {"model_type": "qwen2_5_vl"}]),
    changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3),
    section=st.sampled_from([None, "vision_config", "text_config", "rope_scaling"]),
)
def test_any_config_parses_or_is_refused(base, changes, section):
    """Whatever stands in config.json: a Config, or the one error type that prints as one line."""
    inner = base.get(section) if section else None
    source = base | (
        {section: (inner if isinstance(inner, dict) else {}) | changes} if section else changes
    )
    parse_or_refuse(source)


@settings(max_examples=100)
@given(JSON)
def test_any_json_is_a_config_or_refused(value):
    parse_or_refuse(value)


# ------------------------------------------------------------ weights in


def model_batch(config):
    """Words around a picture of fixed random patches."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([5, VISION_START] + [IMAGE] * 6 + [VISION_END, 9, 3, 7])
    example = data.Example(
        ids,
        torch.full_like(ids, data.IGNORE),
        mrope_positions(ids, [(1, 4, 6)], [None], config),
        torch.randn(24, 1176, generator=generator),
        [(1, 4, 6)],
    )
    return data.collate([example], config)


@torch.no_grad()
def logits_of(model):
    batch = model_batch(model.config)
    return model(batch, KVCache(batch.lengths))[0]


@torch.no_grad()
def their_logits(model):
    batch = model_batch(parse_config(flat_config()))
    return (
        model(
            input_ids=batch.ids,
            position_ids=batch.positions,
            pixel_values=batch.patches,
            image_grid_thw=torch.tensor(batch.grids),
        )
        .logits[0, -1]
        .float()
    )


def write_checkpoint(directory, source, tensors, files=1):
    """config.json and safetensors without our code: one file, or an index over `files` shards."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(source))
    names = sorted(tensors)
    if files == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {
        name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors"
        for i, name in enumerate(names)
    }
    for file in set(weight_map.values()):
        save_file(
            {n: tensors[n] for n in names if weight_map[n] == file},
            directory / file,
            metadata={"format": "pt"},
        )
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return directory


@pytest.fixture(scope="module")
def tensors(pair):
    """{tied: the tensors of a checkpoint in the published layout}."""
    return {
        tied: load_file(pair(flat_config(tie_word_embeddings=tied))[0] / "model.safetensors")
        for tied in (True, False)
    }


def longer(name):
    """The key that releases of transformers in between wrote."""
    return (
        f"model.{name}"
        if name.startswith("visual.")
        else name.replace("model.", "model.language_model.", 1)
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rename", [str, longer], ids=["published", "between"])
@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [dict, nested])
def test_every_layout_loads(tmp_path, tensors, tied, rename, files, dtype, layout):
    """Every parameter is the checkpoint's tensor, rounded as it is on disk; the model speaks."""
    stored = {rename(name): tensor.to(dtype) for name, tensor in tensors[tied].items()}
    assert ("lm_head.weight" in stored) == (not tied)
    write_checkpoint(
        tmp_path / "model", layout(flat_config(tie_word_embeddings=tied)), stored, files
    )
    model = load_model(tmp_path / "model", torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[tied][name].to(dtype).float()), name
    assert logits_of(model).isfinite().all()


def test_a_tied_head_that_was_saved_as_well_is_not_extra(tmp_path, tensors):
    stored = tensors[True] | {"lm_head.weight": tensors[True]["model.embed_tokens.weight"].clone()}
    write_checkpoint(tmp_path / "model", flat_config(), stored)
    assert torch.equal(
        logits_of(load_model(tmp_path / "model")),
        logits_of(load_model(write_checkpoint(tmp_path / "plain", flat_config(), tensors[True]))),
    )


def test_dtype_of_the_config_and_of_the_caller(tmp_path, tensors):
    write_checkpoint(tmp_path / "model", flat_config(torch_dtype="bfloat16"), tensors[True])
    assert {p.dtype for p in load_model(tmp_path / "model").parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_model(tmp_path / "model", torch.float32).parameters()} == {
        torch.float32
    }
    assert not load_model(tmp_path / "model").training


@pytest.mark.parametrize("files", [1, 2])
def test_misfits_are_counted_and_every_kind_has_an_example(tmp_path, tensors, files):
    """Missing, extra, wrongly shaped and integer tensors: one line that one can read."""
    stored = dict(tensors[True])
    stored.pop("visual.merger.ln_q.weight"), stored.pop("model.norm.weight")
    stored["model.extra.weight"] = torch.zeros(3)
    stored["model.embed_tokens.weight"] = torch.zeros(149, 64)
    stored["visual.patch_embed.proj.weight"] = torch.zeros(32, 1176)
    stored["model.layers.0.mlp.up_proj.weight"] = stored["model.layers.0.mlp.up_proj.weight"].to(
        torch.int8
    )
    write_checkpoint(tmp_path / "model", flat_config(), stored, files)
    with pytest.raises(UserError) as error:
        load_model(tmp_path / "model")
    beginning = (
        r".*/model: weights do not fit config\.json: 6, such as missing (model\.norm|visual)"
    )
    assert re.match(beginning, str(error.value))
    assert "; unexpected model.extra.weight" in str(error.value)
    assert str(error.value).count(";") == 2 and "\n" not in str(error.value)


MISFIT = {  # a change of the weights -> the whole of what is said about it
    "model.embed_tokens.weight has shape [149, 64], expected [150, 64]": (
        lambda stored: stored.update({"model.embed_tokens.weight": torch.zeros(149, 64)})
    ),
    "visual.patch_embed.proj.weight has shape [32, 1176], expected [32, 3, 2, 14, 14]": (
        lambda stored: stored.update({"visual.patch_embed.proj.weight": torch.zeros(32, 1176)})
    ),
    "model.norm.weight is stored as I8, expected F32, BF16 or F16": (
        lambda stored: stored.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)})
    ),
    "missing model.norm.weight": lambda stored: stored.pop("model.norm.weight"),
    "unexpected model.extra.weight": (
        lambda stored: stored.update({"model.extra.weight": torch.zeros(3)})
    ),
}


@pytest.mark.parametrize("message", MISFIT)
def test_one_misfit_is_named(tmp_path, tensors, message):
    stored = dict(tensors[True])
    MISFIT[message](stored)
    write_checkpoint(tmp_path / "model", flat_config(), stored)
    with pytest.raises(UserError) as error:
        load_model(tmp_path / "model")
    assert str(error.value).endswith(f": weights do not fit config.json: {message}")


RENAMED = {  # how all names of a foreign checkpoint read, and its config
    "a wrapped model": (lambda name: f"module.{name}", {}),
    "a compiled model": (lambda name: f"_orig_mod.base_model.model.{name}", {}),
    "quantized": (
        lambda name: name.replace(".weight", ".qweight"),
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
    ),
}


@pytest.mark.parametrize("kind", RENAMED)
def test_a_checkpoint_of_other_names_is_one_short_line(tmp_path, tensors, kind):
    """With the count, a name that is missing and one that is there instead."""
    rename, change = RENAMED[kind]
    stored = {rename(name): tensor for name, tensor in tensors[True].items()}
    model = write_checkpoint(tmp_path / "model", flat_config() | change, stored)
    with pytest.raises(UserError, match=r": \d\d+, such as missing .*; unexpected .*") as error:
        load_model(model)
    message = str(error.value)
    assert "\n" not in message and len(message) - len(str(tmp_path)) < 300
    assert ("quantized weights are not read" in message) == bool(change)


def test_a_tied_head_that_differs_is_refused_by_both_names(tmp_path, tensors):
    """Neither is dropped without a word; untied as the line says, both are used."""
    torch.manual_seed(0)
    head = torch.randn(150, 64)
    stored = tensors[True] | {"lm_head.weight": head}
    write_checkpoint(tmp_path / "model", flat_config(), stored)
    with pytest.raises(
        UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"
    ):
        load_model(tmp_path / "model")
    write_checkpoint(tmp_path / "model", flat_config(tie_word_embeddings=False), stored)
    model = dict(load_model(tmp_path / "model").named_parameters())
    assert torch.equal(model["lm_head.weight"], head)
    assert torch.equal(
        model["model.embed_tokens.weight"], tensors[True]["model.embed_tokens.weight"]
    )


def test_a_tied_head_in_place_of_the_embedding_is_both(tmp_path, tensors):
    """As transformers 5 loads it."""
    from transformers import AutoModelForImageTextToText

    stored = dict(tensors[True])
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    write_checkpoint(tmp_path / "model", flat_config(), stored)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32)
    model = load_model(tmp_path / "model")
    assert torch.equal(theirs.get_input_embeddings().weight, stored["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, stored["lm_head.weight"])
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_a_single_file_is_taken_before_an_index(tmp_path, tensors):
    """As transformers does: a merged model that was saved over its shards is the new one."""
    from transformers import AutoModelForImageTextToText

    old = {name: tensor / 2 for name, tensor in tensors[True].items()}
    write_checkpoint(tmp_path / "model", flat_config(), old, files=2)
    write_checkpoint(tmp_path / "model", flat_config(), tensors[True])
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for model in (load_model(tmp_path / "model").model, theirs.model.language_model):
        assert torch.equal(model.norm.weight, tensors[True]["model.norm.weight"])


def test_two_names_of_one_tensor_are_refused(tmp_path, tensors):
    stored = tensors[True] | {"model.language_model.norm.weight": torch.zeros(64)}
    write_checkpoint(tmp_path / "model", flat_config(), stored)
    with pytest.raises(UserError, match=r"model\.norm\.weight are one tensor|norm\.weight and "):
        load_model(tmp_path / "model")


def test_an_adapter_beside_the_weights_is_refused(tmp_path, tensors):
    """transformers adds it where peft is installed; here it would be left out."""
    write_checkpoint(tmp_path / "model", flat_config(), tensors[True])
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter_config\.json beside config\.json: merge"):
        load_model(tmp_path / "model")


def test_keys_of_one_meaning_are_chosen_between_as_in_transformers():
    """dtype before torch_dtype, rope_scaling before rope_parameters."""
    from transformers import Qwen2_5_VLConfig

    source = nested(flat_config())
    source |= {"dtype": "bfloat16", "torch_dtype": "float16"}
    source["text_config"]["rope_scaling"] = {
        "rope_type": "default",
        "mrope_section": [4, 2, 2],
        "rope_theta": 5000.0,
    }
    theirs = Qwen2_5_VLConfig(**json.loads(json.dumps(source)))
    rope = theirs.text_config.rope_parameters
    assert theirs.dtype == torch.bfloat16 or theirs.dtype == "bfloat16"
    config = parse_config(source)
    assert config.dtype == torch.bfloat16
    assert config.text.mrope_section == tuple(rope["mrope_section"]) == (4, 2, 2)
    assert config.text.rope_theta == rope["rope_theta"] == 5000.0


def test_an_untied_config_with_tied_weights_is_refused(tmp_path, tensors):
    """Never a head made up from the embeddings."""
    write_checkpoint(tmp_path / "model", flat_config(tie_word_embeddings=False), tensors[True])
    with pytest.raises(UserError, match=r"missing lm_head\.weight"):
        load_model(tmp_path / "model")


def test_index_naming_a_missing_shard(tmp_path, tensors):
    write_checkpoint(tmp_path / "model", flat_config(), tensors[True], 3)
    (tmp_path / "model" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors: not a readable safe"):
        load_model(tmp_path / "model")


def test_index_naming_the_wrong_shard(tmp_path, tensors):
    """A tensor is read from the file that has it."""
    write_checkpoint(tmp_path / "model", flat_config(), tensors[True], 2)
    path = tmp_path / "model" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    right = index["weight_map"]["model.norm.weight"]
    (wrong,) = set(index["weight_map"].values()) - {right}
    index["weight_map"]["model.norm.weight"] = wrong
    path.write_text(json.dumps(index))
    model = load_model(tmp_path / "model")
    assert torch.equal(model.model.norm.weight, tensors[True]["model.norm.weight"])


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -1000])
def test_truncated_safetensors(tmp_path, tensors, keep):
    write_checkpoint(tmp_path / "model", flat_config(), tensors[True])
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model.safetensors: not a readable safetensors file"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize(
    "at, value", [(0, b"\xff" * 8), (8, b"}"), (20, b"\xff\xfe\x00"), (8, b"[" * 64)]
)
def test_corrupted_safetensors_header(tmp_path, tensors, at, value):
    write_checkpoint(tmp_path / "model", flat_config(), tensors[True])
    path = tmp_path / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[at : at + len(value)] = value
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model.safetensors: not a readable safetensors file"):
        load_model(tmp_path / "model")


def test_no_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(flat_config()))
    with pytest.raises(UserError, match=r"no model\.safetensors and no model\.safetensors\.index"):
        load_model(tmp_path)


@settings(max_examples=200)
@given(
    st.one_of(
        JSON,
        st.builds(lambda w: {"weight_map": w}, JSON),
        st.builds(
            lambda w: {"weight_map": w}, st.dictionaries(st.text(max_size=6), st.text(max_size=12))
        ),
    )
)
@example({"weight_map": {"": "/0"}})  # a past bug: an absolute name left the folder
def test_any_index_is_read_or_refused(tmp_path_factory, value):
    """File names with NULs, surrogates, dots and slashes included."""
    directory = tmp_path_factory.getbasetemp() / "index"
    directory.mkdir(exist_ok=True)
    (directory / "model.safetensors.index.json").write_text(json.dumps(value))
    try:
        checkpoint_tensors(directory)
    except UserError as error:
        assert str(error).startswith(str(directory))


# ------------------------------------------------------------ weights out


SIDE = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"a": 1}',
    "generation_config.json": "{}",
    "chat_template.jinja": "{{ x }}",
    "preprocessor_config.json": (
        '{"patch_size": 14, "max_pixels": 9, "size": {"shortest_edge": 1, "longest_edge": 9}}'
    ),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 100_000])
@pytest.mark.parametrize("layout", [dict, nested])
def test_saved_here_loads_in_transformers(tmp_path, pair, monkeypatch, tied, shard_bytes, layout):
    """Equal logits there and here, from one file and from shards; nothing is missing or extra."""
    from transformers import AutoModelForImageTextToText

    source = layout(flat_config(tie_word_embeddings=tied))
    _, ours, _ = pair(flat_config(tie_word_embeddings=tied), 5)
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", shard_bytes)
    save_model(tmp_path / "out", ours.named_parameters(), parse_config(source))
    files = sorted(p.name for p in tmp_path.joinpath("out").glob("*.safetensors"))
    assert (len(files) > 3) == (shard_bytes == 100_000)
    theirs, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    assert torch.allclose(their_logits(theirs), logits_of(ours), atol=2e-5)
    assert torch.equal(logits_of(load_model(tmp_path / "out", torch.float32)), logits_of(ours))
    for file in files[:-1]:  # full shards, none above the limit unless it holds one tensor
        held = load_file(tmp_path / "out" / file)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= shard_bytes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_by_transformers_loads_here(tmp_path, tied, shard_size, dtype):
    theirs = hf_model(flat_config(tie_word_embeddings=tied), 6).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (shard_size == "100KB")
    ours = load_model(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {dtype}
    theirs = type(theirs).from_pretrained(
        tmp_path, dtype=torch.float32
    )  # .float() would keep rounded rotary tables
    assert torch.allclose(logits_of(ours.float()), their_logits(theirs), atol=2e-5)


def test_saved_files(tmp_path, pair):
    """Published names, the config's dtype, the config as it was read, side files, limits."""
    _, ours, _ = pair(flat_config())
    config = parse_config(flat_config(torch_dtype="bfloat16"))
    for name, text in SIDE.items():
        (tmp_path / name).write_text(text)
    save_model(
        tmp_path / "out",
        ours.named_parameters(),
        config,
        tmp_path,
        dict.fromkeys(("image", "video"), (3136, 100_352)),
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == flat_config(
        torch_dtype="bfloat16"
    )
    for name in set(SIDE) - {"preprocessor_config.json"}:
        assert (tmp_path / "out" / name).read_text() == SIDE[name]
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == {
        "patch_size": 14,
        "min_pixels": 3136,
        "max_pixels": 100_352,
        "size": {"shortest_edge": 3136, "longest_edge": 100_352},
    }
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == {name for name, _ in ours.named_parameters()}
        assert file.get_slice("model.embed_tokens.weight").get_dtype() == "BF16"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        [*SIDE, "config.json", "model.safetensors"]
    )
    assert (
        len({p.stat().st_mode for p in (tmp_path / "out").iterdir()}) == 1
    )  # whoever reads the config reads the weights


def test_saving_again_leaves_no_stale_shards(tmp_path, pair, monkeypatch):
    """From shards to one file and back, over an interrupted save: exactly one model is there."""
    models = [pair(flat_config(), seed)[1] for seed in (0, 1)]
    (tmp_path / "writing-7.tmp").write_bytes(b"half")
    for shard_bytes, model in (
        (50_000, models[0]),
        (200_000, models[1]),
        (10**9, models[0]),
        (100_000, models[1]),
    ):
        monkeypatch.setattr(checkpoint, "SHARD_BYTES", shard_bytes)
        save_model(tmp_path, model.named_parameters(), model.config)
        held = {p.name for p in tmp_path.iterdir()}
        index = (
            json.loads((tmp_path / "model.safetensors.index.json").read_text())
            if shard_bytes < 10**9
            else None
        )
        files = (
            set(index["weight_map"].values()) | {"model.safetensors.index.json"}
            if index
            else {"model.safetensors"}
        )
        assert held == files | {"config.json"}
        assert index is None or index["metadata"]["total_size"] == sum(
            4 * p.numel() for p in model.parameters()
        )
        assert torch.equal(logits_of(load_model(tmp_path)), logits_of(model))


@pytest.mark.parametrize("after", [0, 1, 20])
def test_an_interrupted_save_is_no_model(tmp_path, pair, monkeypatch, after):
    """Killed while tensors are written, over an older model: without config.json it is none."""
    _, ours, _ = pair(flat_config())
    save_model(tmp_path, ours.named_parameters(), ours.config)
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 50_000)

    def interrupted():
        for i, item in enumerate(ours.named_parameters()):
            if i == after:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        save_model(tmp_path, interrupted(), ours.config)
    with pytest.raises(UserError, match="not a model directory"):
        load_model(tmp_path)
    save_model(tmp_path, ours.named_parameters(), ours.config)  # the next save mends it
    assert torch.equal(logits_of(load_model(tmp_path)), logits_of(ours)) and not list(
        tmp_path.glob("*.tmp")
    )


# ------------------------------------------------------------ side files


def write_side_files(directory, **files):
    """preprocessor=, processor=, video=: what these files hold."""
    names = {
        "preprocessor": "preprocessor_config.json",
        "processor": "processor_config.json",
        "video": "video_preprocessor_config.json",
        "generation": "generation_config.json",
    }
    for name, content in files.items():
        (directory / names[name]).write_text(json.dumps(content))


def size(low, high):
    return {"size": {"shortest_edge": low, "longest_edge": high}}


PLAIN = {"min_pixels": 3136, "max_pixels": 9000}
DEFAULT_VIDEO = (128 * 28 * 28, 768 * 28 * 28)
LIMITS = {  # files -> limits of pictures, of frames
    "published": ({"preprocessor": PLAIN}, (3136, 9000), (3136, 9000)),
    "sizes": ({"preprocessor": size(4000, 5000)}, (4000, 5000), (4000, 5000)),
    "both, the pixels win": (
        {"preprocessor": PLAIN | size(4000, 5000)},
        (3136, 9000),
        (3136, 9000),
    ),
    "one of both": (
        {"preprocessor": {"max_pixels": 9000} | size(4000, 5000)},
        (4000, 9000),
        (4000, 9000),
    ),
    "nothing": ({"preprocessor": {}}, (56 * 56, 1280 * 28 * 28), DEFAULT_VIDEO),
    "transformers 5": (
        {"processor": {"image_processor": size(4000, 5000), "video_processor": size(4001, 5001)}},
        (4000, 5000),
        (4001, 5001),
    ),
    "transformers 5, default frames": (
        {"processor": {"image_processor": PLAIN, "video_processor": {}}},
        (3136, 9000),
        DEFAULT_VIDEO,
    ),
    "old and new": (
        {"preprocessor": PLAIN, "processor": {"image_processor": size(4000, 5000)}},
        (4000, 5000),
        (3136, 9000),
    ),
    "old and a processor without sections": (
        {"preprocessor": PLAIN, "processor": {"processor_class": "Qwen2_5_VLProcessor"}},
        (3136, 9000),
        (3136, 9000),
    ),
    "transformers 4": (
        {"preprocessor": PLAIN, "video": size(4001, 5001)},
        (3136, 9000),
        (4001, 5001),
    ),
    "all": (
        {
            "preprocessor": PLAIN,
            "video": size(4001, 5001),
            "processor": {"image_processor": {}, "video_processor": size(4002, 5002)},
        },
        (56 * 56, 1280 * 28 * 28),
        (4002, 5002),
    ),
}


@pytest.mark.parametrize("files, image, video", LIMITS.values(), ids=LIMITS)
def test_limits_are_those_that_transformers_takes(tmp_path, files, image, video):
    """Pictures against its own class; its class of videos needs torchvision."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    write_side_files(tmp_path, **files)
    assert read_pixel_limits(tmp_path) == {"image": image, "video": video}
    theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path).size
    assert (theirs["shortest_edge"], theirs["longest_edge"]) == image


@pytest.mark.parametrize("files, image, video", LIMITS.values(), ids=LIMITS)
def test_saved_limits_agree_in_all_files(tmp_path, files, image, video):
    """Whichever file a reader takes them from. What nobody changed is left as it was."""
    write_side_files(tmp_path, **files)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    checkpoint.set_pixel_limits(tmp_path, {"image": image, "video": video})
    assert before == {path.name: path.read_text() for path in tmp_path.iterdir()}
    checkpoint.set_pixel_limits(tmp_path, dict.fromkeys(("image", "video"), (5000, 6000)))
    for name in before:
        content = json.loads((tmp_path / name).read_text())
        places = [content]
        if name == "processor_config.json":
            places = [
                content[key] for key in ("image_processor", "video_processor") if key in content
            ]
        for place in places:
            assert (place["min_pixels"], place["max_pixels"]) == (5000, 6000)
            assert place.get("size", size(5000, 6000)["size"]) == size(5000, 6000)["size"]
    assert set(read_pixel_limits(tmp_path).values()) == {(5000, 6000)}


SIDE_MISTAKES = [
    ("preprocessor", [], "preprocessor_config.json: expected a JSON object, found list"),
    ("preprocessor", "x", "preprocessor_config.json: expected a JSON object, found str"),
    ("preprocessor", {"max_pixels": "many"}, "max_pixels (or size: longest_edge) is 'many', expe"),
    ("preprocessor", {"min_pixels": 0}, "min_pixels (or size: shortest_edge) is 0, expected a pos"),
    ("preprocessor", {"min_pixels": True}, "min_pixels (or size: shortest_edge) is True, expected"),
    ("preprocessor", {"size": 448}, "size is 448, expected shortest_edge and longest_edge"),
    (
        "preprocessor",
        {"size": {"height": 4, "width": 4}},
        "min_pixels (or size: shortest_edge) is N",
    ),
    ("preprocessor", {"patch_size": 16}, "preprocessor_config.json: patch_size is 16, expected 14"),
    ("preprocessor", {"merge_size": 1}, "preprocessor_config.json: merge_size is 1, expected 2"),
    (
        "preprocessor",
        {"image_mean": [0.5, 0.5, 0.5]},
        "image_mean is [0.5, 0.5, 0.5], expected [0.",
    ),
    (
        "preprocessor",
        {"image_std": "x" * 999},
        "image_std is 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
    ),
    ("preprocessor", {"do_normalize": False}, "do_normalize is False, expected True"),
    ("preprocessor", {"rescale_factor": 1.0}, "rescale_factor is 1.0, expected 0.0039"),
    (
        "processor",
        {"image_processor": 5},
        "processor_config.json: image_processor is 5, expected an",
    ),
    (
        "processor",
        {"image_processor": {"patch_size": 16}},
        "processor_config.json: image_processor: patch_size is 16, expected 14",
    ),
    ("video", {"max_pixels": -1}, "video_preprocessor_config.json: max_pixels (or size: longest_"),
    ("generation", 5, "generation_config.json: expected a JSON object, found int"),
    ("generation", {"eos_token_id": "<|im_end|>"}, "eos_token_id is '<|im_end|>', expected ids of"),
    ("generation", {"eos_token_id": []}, "eos_token_id is [], expected ids of tokens, below 150"),
    (
        "generation",
        {"eos_token_id": [1, None]},
        "eos_token_id is [1, None], expected ids of tokens",
    ),
    ("generation", {"eos_token_id": [[1]]}, "eos_token_id is [[1]], expected ids of tokens"),
    ("generation", {"eos_token_id": 150}, "eos_token_id is 150, expected ids of tokens, below 150"),
    ("generation", {"eos_token_id": -1}, "eos_token_id is -1, expected ids of tokens, below 150"),
    ("generation", {"eos_token_id": 1.5}, "eos_token_id is 1.5, expected ids of tokens"),
    ("generation", {"eos_token_id": True}, "eos_token_id is True, expected ids of tokens"),
]


@pytest.mark.parametrize("name, content, message", SIDE_MISTAKES)
def test_a_mistake_in_a_side_file_is_one_line(tmp_path, name, content, message):
    write_side_files(tmp_path, preprocessor=PLAIN, generation={})
    write_side_files(tmp_path, **{name: content})
    with pytest.raises(UserError) as error:
        read_pixel_limits(tmp_path)
        read_stop_ids(tmp_path, 150)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) - len(str(tmp_path)) < 300


@pytest.mark.parametrize(
    "given, expected", [(7, (7,)), ([7, 149], (7, 149)), (0, (0,)), (None, ())], ids=str
)
def test_stop_ids(tmp_path, given, expected):
    write_side_files(tmp_path, generation={"eos_token_id": given})
    assert read_stop_ids(tmp_path, 150) == expected
    write_side_files(tmp_path, generation={"temperature": 0.1})
    assert read_stop_ids(tmp_path, 150) == ()


@settings(max_examples=200)
@given(
    name=st.sampled_from(["preprocessor", "processor", "video", "generation"]),
    content=JSON
    | st.dictionaries(
        st.sampled_from(
            ["size", "min_pixels", "patch_size", "eos_token_id", "image_processor", "image_mean"]
        ),
        JSON,
    ),
)
def test_any_side_file_is_read_or_refused(tmp_path_factory, name, content):
    directory = tmp_path_factory.getbasetemp() / "side"
    directory.mkdir(exist_ok=True)
    write_side_files(directory, preprocessor=PLAIN, generation={}, processor={}, video={})
    write_side_files(directory, **{name: content})
    try:
        limits = read_pixel_limits(directory)
        stops = read_stop_ids(directory, 150)
    except UserError as error:
        assert str(directory) in str(error) and len(str(error)) < len(str(directory)) + 300
    else:
        assert all(low >= 1 and high >= 1 for low, high in limits.values())
        assert all(0 <= stop < 150 for stop in stops)


# ------------------------------------------------------------ memory


MEASURE = """
import sys, threading
import torch
from checkpoint import load_model

def anonymous():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) * 1024

load_model(sys.argv[2])  # what a first load allocates for good
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
model = load_model(sys.argv[1], torch.bfloat16)
done.set()
thread.join()
print(max(peak, anonymous()) - before, sum(2 * p.numel() for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="RssAnon is Linux's")
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_loading_holds_the_weights_once(tmp_path, pair, stored):
    """Anonymous memory while 200 MB of bf16 weights, mostly one embedding, load: 1.1 times that."""
    config = parse_config(
        flat_config(
            hidden_size=512,
            num_hidden_layers=4,
            intermediate_size=1024,
            vocab_size=151_936,
            rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
        )
    )
    large = build_model(config).to(stored).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in large.parameters():
            parameter.fill_(0.5)
    write_checkpoint(tmp_path / "large", config.source, dict(large.named_parameters()))
    small, _, _ = pair(flat_config())
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "large", small],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    grown, weights = map(int, result.stdout.split())
    assert weights > 1.6e8 and grown <= 1.1 * weights
