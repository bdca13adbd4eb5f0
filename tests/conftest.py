"""Shared by the tests: the repository on the path, and tiny checkpoints written by transformers,
the oracle.
"""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
torch.set_num_threads(1)  # the models are tiny: more threads only wait for one another
settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # nothing by the clock
settings.load_profile("untimed")

WORDS, VISION_START, VISION_END, IMAGE, VIDEO = (
    144,
    144,
    145,
    146,
    147,
)  # text ids are those below WORDS


def keep_log_probs(patch):
    """Rollouts get log_probs (R, C): of their tokens, by the logits that these were chosen from."""
    import model

    choose, append = model.choose_tokens, model.Rollout.append
    last = {}

    def chooses(logits, uniform):
        last["log_probs"] = logits.log_softmax(-1)
        return choose(logits, uniform)

    def appends(rollout, step, live, tokens, stops):
        if not hasattr(rollout, "log_probs"):
            rollout.log_probs = torch.zeros(rollout.ids.shape)
        going = ~rollout.finished[live]
        of_tokens = last["log_probs"].gather(1, tokens[:, None])[:, 0]
        rollout.log_probs[live[going], step] = of_tokens[going]
        return append(rollout, step, live, tokens, stops)

    patch.setattr(model, "choose_tokens", chooses)
    patch.setattr(model.Rollout, "append", appends)


def flat_config(vision=None, **text):
    """A tiny model's config.json as published: text fields at the top level, vision_config
    complete.
    """
    return (
        {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "torch_dtype": "float32",
            "vocab_size": 150,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "vision_start_token_id": VISION_START,
            "vision_end_token_id": VISION_END,
            "bos_token_id": 148,
            "eos_token_id": 149,
        }
        | text
        | {
            "vision_config": {
                "depth": 3,
                "hidden_size": 32,
                "num_heads": 2,
                "intermediate_size": 48,
                "in_chans": 3,
                "patch_size": 14,
                "out_hidden_size": text.get("hidden_size", 64),
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": 56,
                "fullatt_block_indexes": [1],
                "tokens_per_second": 2,
                "hidden_act": "silu",
            }
            | (vision or {})
        }
    )


def hf_model(source, seed=0):
    """transformers' model of a config.json, in fp32, with weights large enough that every part of
    it matters.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**source)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.1 * noise + ("norm" in name or "ln_q" in name))
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """(directory, ours, theirs) of a config: transformers writes the checkpoint,
    checkpoint.load_model reads it.
    """
    made = {}

    def make(source, seed=0):
        import checkpoint

        key = (str(source), seed)
        if key not in made:
            directory = tmp_path_factory.mktemp("model")
            theirs = hf_model(source, seed)
            theirs.save_pretrained(directory)
            made[key] = directory, checkpoint.load_model(directory, torch.float32), theirs
        return made[key]

    return make


# -------------------------------------------------------------------------- rooms and scripts


@pytest.fixture(scope="session")
def rooms(tmp_path_factory):
    """A dozen procedural rooms with every kind of row."""
    from rooms import scenes

    folder = tmp_path_factory.mktemp("data") / "rooms"
    scenes.write_rooms(folder, scenes=12, seed=0, test_scenes=2, processes=1)
    return folder


@pytest.fixture(scope="session")
def tiny_model(rooms, tmp_path_factory):
    """The directory of tiny.py's untrained model for these rooms."""
    from rooms import tiny

    folder = tmp_path_factory.mktemp("models") / "base"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["tiny.py", "--data", str(rooms / "train"), "--out", str(folder)]
        )
        tiny.main()
    return folder


@pytest.fixture
def call(monkeypatch):
    """Call a script's main with flags as its command line would, in this process; leaves no process
    group behind.
    """
    import signal

    import torch.distributed as dist

    import files

    def call_main(script, *flags):
        handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
        monkeypatch.setattr(sys, "argv", [f"{script.__name__.split('.')[-1]}.py", *map(str, flags)])
        try:
            script.main()
        finally:
            files.let_go()
            if dist.is_initialized():
                dist.destroy_process_group()
            for name, handler in handlers.items():
                signal.signal(name, handler)

    return call_main


def varied_reward(texts, sample):
    """An accuracy reward that differs within a group even for an untrained model, which never
    answers right.
    """
    return [len(text) % 5 / 4 for text in texts]


def keep_gradients(script, path):
    """Make a script save the whole gradients of its first step, before they are clipped."""
    import os

    clip, wanted = script.clip_gradients, [path]

    def clips(model, max_norm):
        if wanted:
            whole = {
                name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
                for name, p in model.named_parameters()
            }
            path = wanted.pop()
            if os.environ.get("RANK", "0") == "0":
                torch.save(whole, path)
        return clip(model, max_norm)

    script.clip_gradients = clips


def launch(script, *flags, processes=1, **environment):
    """Run a script as a person does, under torchrun where there are several processes.

    script: the path of a file, or "package.module" for python -m. Returns: its CompletedProcess.
    """
    import os
    import subprocess

    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    if not str(script).endswith(".py"):
        command.append("-m")
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [*command, str(script), *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(paths),
            **environment,
        },
    )
