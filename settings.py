"""Every setting of every run in one table: its type, its default, what it may be and what it means.

A recipe (ladder.py) holds only what differs from these defaults, and a flag wins over both. Scripts
take rows of this table as flags: `add_flags(parser, ("model", "out"))`.
"""

import argparse
import difflib
import math
import sys
from dataclasses import dataclass
from typing import Any

from files import UserError

# ---------------------------------------------------------------------------------- checks
# A check takes a number and returns what was expected instead, or None if the number will do.


def positive(number):
    return None if 0 < number < math.inf else "a positive number"


def not_negative(number):
    return None if 0 <= number < math.inf else "0 or more"


def share(number):
    return None if 0 <= number <= 1 else "0 to 1"


def below_one(number):
    return None if 0 <= number < 1 else "0 or more and below 1"


# ---------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Setting:
    """One row of the table. kind: a type; [type] for several values; a tuple for a choice."""

    kind: Any
    default: Any
    help: str
    check: Any = None
    # When a run goes on: how it is done, not what is done; a path, whose contents may not.
    may_change: bool = False


SETTINGS = {
    # where things are
    "model": Setting(str, None, "model directory", may_change=True),
    "data": Setting([str], None, "jsonl files to read", may_change=True),
    "images": Setting(
        str,
        None,
        "folder that picture paths are relative to (default: images beside each file)",
        may_change=True,
    ),
    "out": Setting(
        str, None, "folder to write; a trainer's becomes a model directory", may_change=True
    ),
    "resume": Setting(
        str,
        None,
        "auto: go on from the newest trainer state in --out; or a state's path",
        may_change=True,
    ),
    # rows
    "replay": Setting([str], None, "jsonl files of earlier stages to mix in", may_change=True),
    "replay_ratio": Setting(float, 0.0, "share of all rows that are replayed", below_one),
    "curriculum": Setting(
        float, 1.0, "share of the rows, from the file's beginning, for the first steps", share
    ),
    "seed": Setting(int, 0, "of data order and sampling", not_negative),
    "workers": Setting(int, 0, "processes that read and resize pictures", not_negative, True),
    # pictures and prompts
    "min_pixels": Setting(int, None, "smallest area of a picture (default: the model's)", positive),
    "max_pixels": Setting(int, None, "largest area of a picture (default: the model's)", positive),
    "input_as": Setting(
        ("transformers", "qwen-vl-utils", "authors"),
        "transformers",
        "whose sizes of pictures and frames, and numbers of frames (docs/data.md)",
    ),
    "num_frames": Setting(int, 16, "frames taken from a video file, spread evenly", positive),
    "fps": Setting(float, None, "frames per second of a video file, not --num-frames", positive),
    "max_frames": Setting(int, 768, "frames of a video file at most, with --fps", positive),
    "video_seconds": Setting(
        ("grid", "real"), "grid", "time of frames: one second for each pair, or their true times"
    ),
    "prompts": Setting(
        str, None, "JSON file with prompt texts to use in place of ours", may_change=True
    ),
    "prompt_style": Setting(
        ("thinking", "direct"), "thinking", "ask for a chain of thought, or for the bare answer"
    ),
    # optimizer
    "epochs": Setting(float, 1.0, "passes over the data", positive),
    "max_steps": Setting(int, None, "optimizer steps at most, whatever the epochs", positive),
    "batch_size": Setting(int, 8, "examples in an optimizer step, over all processes", positive),
    "micro_batch": Setting(
        int, 8, "examples (SFT) or completions (GRPO) that a device holds at once", positive, True
    ),
    "learning_rate": Setting(float, 1e-5, "peak learning rate of AdamW", positive),
    "lr_scheduler_type": Setting(("cosine", "linear"), "cosine", "how the rate decays to zero"),
    "warmup_ratio": Setting(float, 0.0, "share of the steps in which the rate rises", share),
    "weight_decay": Setting(float, 0.0, "on matrices only", not_negative),
    "betas": Setting([float], [0.9, 0.999], "AdamW's two decay rates", below_one),
    "max_grad_norm": Setting(float, 1.0, "clip the global gradient norm to this", positive),
    # GRPO
    "prompts_per_step": Setting(int, 8, "prompts in a rollout, over all processes", positive),
    "num_generations": Setting(int, 8, "completions for each prompt: the group", positive),
    "max_completion_length": Setting(int, 1024, "tokens that a completion may have", positive),
    "temperature": Setting(float, 1.0, "of sampling; log-probs are divided by it too", positive),
    "beta": Setting(float, 0.01, "weight of the KL penalty; 0: no reference model", not_negative),
    "epsilon": Setting(float, 0.2, "the ratio is clipped below 1 - epsilon", not_negative),
    "epsilon_high": Setting(
        float, None, "and above 1 + epsilon_high (default: epsilon)", not_negative
    ),
    "num_iterations": Setting(int, 1, "optimizer steps for each rollout", positive),
    "loss_type": Setting(("grpo", "dr_grpo", "dapo"), "grpo", "how token losses are averaged"),
    "scale_rewards": Setting(
        ("group", "none"), "group", "divide advantages by the group's standard deviation, or not"
    ),
    "mask_truncated_completions": Setting(
        bool, False, "leave completions that hit the length limit out of the loss"
    ),
    "reward_funcs": Setting([str], ["format", "accuracy"], "rewards, by name in rewards.REWARDS"),
    "reward_weights": Setting(
        [float], [1.0, 1.0], "their weights, in the same order", not_negative
    ),
    "eval_every": Setting(
        int, 0, "optimizer steps between answers to held-out questions; 0: never", not_negative
    ),
    "eval_data": Setting([str], None, "jsonl files of held-out questions", may_change=True),
    "eval_limit": Setting(int, 64, "held-out questions that are answered", positive),
    # the machine
    "save_every": Setting(
        int, 0, "optimizer steps between trainer states; 0: only when stopped", not_negative, True
    ),
    "keep_last": Setting(int, 2, "trainer states that are kept", positive, True),
    "device": Setting(("cpu", "cuda"), None, "default: cuda if there is one", may_change=True),
    "threads": Setting(
        int, None, "CPU threads that torch computes with (default: one a core)", positive, True
    ),
    "dtype": Setting(
        ("float32", "bfloat16"),
        None,
        "what is computed in (default: bfloat16 on a GPU); trained weights are float32",
    ),
    "activation_checkpointing": Setting(
        bool,
        False,
        "compute layers again in the backward: less memory, a third more work",
        may_change=True,
    ),
    "freeze_vision": Setting(bool, False, "do not train the vision encoder and its merger"),
}

PICTURES = (  # what Processor takes
    *("min_pixels", "max_pixels", "input_as", "num_frames", "fps", "max_frames", "video_seconds"),
    "prompts",
)
ONLY_SFT = ("replay", "replay_ratio", "curriculum", "workers", "batch_size")
ONLY_GRPO = (
    *("prompt_style", "prompts_per_step", "num_generations", "max_completion_length"),
    *("temperature", "beta", "epsilon", "epsilon_high", "num_iterations", "loss_type"),
    *("scale_rewards", "mask_truncated_completions", "reward_funcs", "reward_weights"),
    *("eval_every", "eval_data", "eval_limit"),
)
SFT = tuple(name for name in SETTINGS if name not in ONLY_GRPO)
GRPO = tuple(name for name in SETTINGS if name not in ONLY_SFT)
MAY_CHANGE = tuple(name for name, setting in SETTINGS.items() if setting.may_change)


# ---------------------------------------------------------------------------------- flags


def flag(name):
    """A setting's name as a flag.

    >>> flag("max_pixels")
    '--max-pixels'
    """
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """argparse with dashes or underscores, one-line errors and the nearest name to a wrong flag.

    Numbers are held to the checks of SETTINGS and of `add_flags`.
    """

    def __init__(self, doc):
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # else --lr would be taken for --lr-scheduler-type
        )
        self.checks = {}  # name of a flag -> its check

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")

    def parse_args(self, argv=None):
        words = [with_dashes(word) for word in (sys.argv[1:] if argv is None else argv)]
        args, unknown = self.parse_known_args(words)
        if unknown:
            hint = ""
            if unknown[0].startswith("-"):
                names = [name for action in self._actions for name in action.option_strings]
                near = difflib.get_close_matches(unknown[0].split("=")[0], names, 1, 0)
                hint = f", did you mean {near[0]}?"
            self.error(f"unknown argument {unknown[0]}{hint}")
        try:
            for name, check in self.checks.items():
                check_number(name, getattr(args, name, None), check)
        except UserError as error:
            self.error(str(error))
        return args

    def need(self, args, *names):
        """End with one line if one of these flags was not given."""
        for name in names:
            if getattr(args, name) is None:
                self.error(f"{flag(name)} is missing")


def with_dashes(word):
    """A flag with dashes for underscores; its value stays as it is.

    >>> with_dashes("--max_steps=a_b")
    '--max-steps=a_b'
    """
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def check_number(name, value, check):
    """Raise UserError if a number, or one of a list of numbers, does not pass the check."""
    for number in value if isinstance(value, (list, tuple)) else [value]:
        expected = None if number is None else check(number)
        if expected:
            raise UserError(f"{flag(name)} is {number}, expected {expected}")


def add_flags(parser, names, **defaults):
    """Add rows of SETTINGS as flags. defaults: in place of the table's."""
    for name in names:
        setting = SETTINGS[name]
        kind = setting.kind
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif isinstance(kind, tuple):
            options = {"choices": kind}
        elif isinstance(kind, list):
            options = {"type": kind[0], "nargs": "+"}
        else:
            options = {"type": kind}
        default = defaults.get(name, setting.default)
        parser.add_argument(flag(name), help=setting.help, default=default, **options)
        if setting.check:
            parser.checks[name] = setting.check


def values(args, names):
    """The settings of these names, as a dict."""
    return {name: getattr(args, name) for name in names}
