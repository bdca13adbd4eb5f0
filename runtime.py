"""What all training runs share.

    settings    recipe_settings, run_length, check_lengths, need_inputs
    processes   main_guard, choose_device, Ranks
    model       load_sharded, gathered, whole_tensors
    optimizer   adamw, scheduled_rate, update_weights
    rows        rows_of_step, micro_batches
    the run     Run: output folder, trainer states, log

One process and many run the same lines: a collective of one process does nothing.
"""

import argparse
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from threading import Thread

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from checkpoint import build_model, load_config, load_weights, save_model
from data import chunks, style_of
from files import (
    CONFIG,
    MADE_OF,
    OF_PICTURE,
    UserError,
    append_jsonl,
    changes,
    claim,
    fingerprint,
    made_of,
    parse_line,
    read_json,
    reason,
    write_json,
    write_text,
    writing,
)
from ladder import MADE_BY, RECIPES, launch
from settings import GRPO, MAY_CHANGE, SETTINGS, SFT, Parser, add_flags

# NCCL ends a run whose ranks wait longer for one another: one rank may make rooms meanwhile, or
# write a large model to a slow disk.
PATIENCE = timedelta(hours=4)
PASSED_ON = 5  # seconds in which torchrun passes on a signal that its processes got as well
MEMORY_HINT = (
    "out of GPU memory; lower --micro-batch, --max-pixels or --prompts-per-step (eval.py, "
    "coldstart.py: --batch-size), add --activation-checkpointing, or take more GPUs"
)


# ---------------------------------------------------------------------------------- settings


def recipe_settings(doc, stage=None, argv=None):
    """The settings of a training run: defaults, then its recipe, then the flags that were given.

    Args:    stage: row of ladder.RECIPES[preset]; None takes it from --stage.
    Returns: Namespace of settings, `preset` and `stage`.
    """
    parser = Parser(doc)
    parser.add_argument("--preset", choices=tuple(RECIPES), default="tiny", help="see ladder.py")
    if stage is None:
        stages = [name for name in RECIPES["tiny"] if name != "grpo"]
        parser.add_argument(
            "--stage",
            choices=stages,
            required=True,
            help="1: boxes; 2: questions; cold: chains of thought; base: before the ladder",
        )
    # Every flag's default is None here, so that what was given can be told from what was not.
    names = GRPO if stage == "grpo" else SFT
    add_flags(parser, names, **dict.fromkeys(names))
    parsed = vars(parser.parse_args(argv))
    given = {name: value for name, value in parsed.items() if value is not None}

    stage = stage or given["stage"]
    defaults = {name: SETTINGS[name].default for name in names}
    recipe = dict(RECIPES[given["preset"]][stage])
    if "data" in given:  # the preset's own rooms are not mixed into a user's rows, nor made for it
        recipe.pop("replay", None)
    if "epochs" in given:  # the recipe's limit does not cut them short
        recipe.pop("max_steps", None)
    args = argparse.Namespace(**defaults | recipe | given | {"stage": stage})
    parser.need(args, "model", "data", "out")
    if given.get("replay_ratio"):
        parser.need(args, "replay")
    if "replay" in given and "replay_ratio" not in recipe | given:
        parser.error("--replay-ratio is missing")  # nothing would be replayed
    if len(args.betas) != 2:
        parser.error(f"--betas has {len(args.betas)} numbers, expected 2")
    return args


def run_length(args, rows, size):
    """How many optimizer steps a run has, and in words what ends it.

    Args:    rows: of the data. size: how many of them a step draws; in GRPO a rollout.

    >>> run_length(argparse.Namespace(epochs=2.0, max_steps=None), rows=10, size=8)
    (3, '--epochs 2')
    >>> run_length(argparse.Namespace(epochs=2.0, max_steps=1), rows=10, size=8)
    (1, '--max-steps 1 (0.8 of --epochs 2)')
    """
    iterations = vars(args).get("num_iterations", 1)
    steps, end = math.ceil(args.epochs * rows / size) * iterations, f"--epochs {args.epochs:g}"
    limit = args.max_steps or steps
    if limit < steps:
        epochs = limit * size / iterations / rows
        return limit, f"--max-steps {limit} ({epochs:.3g} of {end})"
    if limit > steps:
        end += f" (before --max-steps {limit})"
    return steps, end


def check_lengths(processor, samples, style=None, with_answer=True, reserve=0):
    """Raise UserError for the first row that is longer than the model's context.

    For most rows a quick upper bound is enough: no text has more tokens than bytes, and no picture
    more than --max-pixels allow. The others are measured by their pictures' headers. A video file
    would have to be decoded for that: such a row is measured when it is used.

    Args:    as for Processor.example.
    """
    for sample in samples:
        row_style = style_of(sample, style)
        # An upper bound of its tokens: each part brings at most 9 of the chat format's own.
        most = reserve + 9
        for _, parts in processor.turns(sample, row_style, with_answer):
            for part in parts:
                most += 9
                if isinstance(part, str):
                    most += len(part.encode())
                else:
                    _, pixels = processor.limits[part.kind]
                    most += (pixels // 28**2 + 1) * len(part.sources)  # a token is 28 x 28 pixels
        files = any(media.is_video_file for media in sample.media)
        if most > processor.config.text.max_position_embeddings and not files:
            processor.example(sample, row_style, with_answer, pixels=False, reserve=reserve)


def make_missing(paths):
    """Make the tiny preset's rooms if a path needs them; name the command for a missing rung."""
    # MADE_BY names what a command needs after what it makes, so a missing rung is told before its
    # missing data.
    for folder, command in MADE_BY.items():
        needed = any(Path(path).is_relative_to(folder) for path in paths)
        complete = any((Path(folder) / name).exists() for name in ("config.json", "train"))
        if complete or not needed:
            continue
        if " -m rooms." not in command:  # a training: it takes long and is not started unasked
            raise UserError(f"{folder}: no model there yet; make it with: {command}")
        words = shlex.split(command)
        make_missing([word for word in words if word != folder])
        print(f"$ {command}", flush=True)
        if launch(words).wait():
            raise UserError(f"{folder}: could not be made with: {command}")


def need_inputs(args, ranks):
    """See make_missing; one process makes what all need."""
    replay = vars(args).get("replay") or []
    ranks.once(make_missing, [*args.data, *replay, args.model])


# ---------------------------------------------------------------------------------- processes


def main_guard(main):
    """Run a script's main: a user's mistake is one line on stderr and exit code 2."""
    code = 0
    try:
        main()
    except (UserError, torch.OutOfMemoryError) as error:
        if isinstance(error, UserError):
            # An error in a DataLoader's worker comes with the worker's traceback before it.
            line = str(error).rpartition("files.UserError: ")[2].strip()
        else:
            line = MEMORY_HINT
        rank = [f"rank {os.environ['RANK']}"] if int(os.environ.get("WORLD_SIZE", 1)) > 1 else []
        # Written in one piece: all ranks write to the same terminal.
        sys.stderr.write(": ".join([Path(sys.argv[0]).name, *rank, line]) + "\n")
        code = 2
    except KeyboardInterrupt:  # Ctrl-C where no run saves its state first
        sys.stderr.write(f"{Path(sys.argv[0]).name}: stopped\n")
        code = 128 + signal.SIGINT
    # After an error, destroying NCCL's group would wait for collectives that other ranks may never
    # join. Of gloo, threads that are left would abort the interpreter at its exit.
    if dist.is_initialized() and not (code and dist.get_backend() == "nccl"):
        dist.destroy_process_group()
    if "RANK" in os.environ:
        # torchrun's processes end here, past the interpreter's own exit, in which one of hundreds
        # was seen to abort all the same ("terminate called", exit code -6).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def choose_device(name=None):
    """The device of this process: the CPU, or the GPU with this process's local rank."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= gpus:
        processes = os.environ["LOCAL_WORLD_SIZE"]
        raise UserError(f"{processes} processes on a node with {gpus} GPUs; lower --nproc-per-node")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    # cuDNN's attention is known to plan anew for each length of the keys (20 ms and more were
    # reported on H100s): while decoding, every few steps. The other kernels need no plan.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def compute_dtype(name, device):
    """--dtype, by default bfloat16 on a GPU and float32 on a CPU."""
    return getattr(torch, name or ("bfloat16" if device.type == "cuda" else "float32"))


class Ranks:
    """The processes of this run: torchrun's, or this one alone. threads: see settings.SETTINGS."""

    def __init__(self, device=None, threads=None):
        if threads:
            torch.set_num_threads(threads)
        self.device = choose_device(device)
        options = {"backend": "gloo"}
        if self.device.type == "cuda":
            options = {"backend": "nccl", "device_id": self.device, "timeout": PATIENCE}
        self.launched = "RANK" in os.environ  # by torchrun
        if self.launched:
            dist.init_process_group(**options)
        else:
            # A group of one: the same collectives, checkpoints and sharding, without a network.
            dist.init_process_group(**options, store=dist.HashStore(), rank=0, world_size=1)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def sum(self, *numbers):
        """Add numbers up over all ranks: a list of as many floats."""
        # float64: counts of tokens stay exact, and the order of ranks does not show.
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_named(self, numbers):
        """The same for a dict; all ranks have the same names."""
        return dict(zip(numbers, self.sum(*numbers.values())))

    def gather(self, value):
        """Every rank's value, on every rank, in rank order."""
        gathered_values = [None] * self.world
        dist.all_gather_object(gathered_values, value)
        return gathered_values

    def once(self, function, *arguments):
        """Call on rank 0 alone. Its result, or its UserError, is that of every rank."""
        # Where rank 0 alone raised an error, the others would wait for it for ever.
        result = problem = None
        if self.rank == 0:
            try:
                result = function(*arguments)
            except UserError as error:
                problem = str(error)
        result, problem = self.gather((result, problem))[0]
        if problem:
            raise UserError(problem)
        return result

    def print(self, *text):
        if self.rank == 0:
            print(*text, flush=True)


# ---------------------------------------------------------------------------------- model


def load_sharded(args, ranks):
    """The model of --model, with fp32 weights, that computes in --dtype.

    It is built on the meta device, sharded, then filled with the rows that this rank holds.
    Sharded (FSDP2) under torchrun, on a GPU, or for bfloat16; fp32 on a CPU runs the bare module.
    Gradients are reduced in fp32 and summed: each rank divides by the count of all ranks.
    """
    dtype = compute_dtype(args.dtype, ranks.device)
    model = build_model(load_config(args.model))  # on the meta device: shapes without memory
    model.activation_checkpointing = args.activation_checkpointing
    model.visual.requires_grad_(not args.freeze_vision)
    if ranks.launched or ranks.device.type == "cuda" or dtype != torch.float32:
        shard(model, init_device_mesh(ranks.device.type, (ranks.world,)), dtype)
    # Memory for this rank's rows only; each rank reads no more of the files than these.
    model.to_empty(device=ranks.device)
    load_weights(model, args.model, held_rows)
    return model


def shard(model, mesh, dtype):
    """Shard every layer, then what is left: embeddings, norm, head, patch embedding and merger."""
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # A layer's weights are gathered for its forward and again for its backward, and let go after
    # each. What no layer holds belongs to the model itself, which comes last.
    # Inputs are not cast: positions and rotary angles stay in fp32 (cast_forward_inputs above).
    for layer in (*model.visual.blocks, *model.model.layers, model):
        fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    # FSDP would divide by the number of ranks. The loss is divided by the count of all ranks'
    # tokens instead, so gradients are only added up.
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo sums only if both are set


def sharded_modules(model):
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def held_rows(parameter):
    """The part of a parameter that this rank holds, and the number of its first row."""
    if not isinstance(parameter, DTensor):
        return parameter, 0
    # FSDP cuts a tensor along its first axis into equal parts.
    mesh, rows = parameter.device_mesh, len(parameter)
    rows_each = -(-rows // mesh.size())  # rounded up; the last ranks may hold fewer, or none
    return parameter.to_local(), min(rows, rows_each * mesh.get_local_rank())


def whole_tensors(model):
    """Yield (name, whole tensor) of every parameter, one at a time; all ranks must iterate."""
    for name, parameter in model.named_parameters():
        yield name, parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


@contextmanager
def gathered(model):
    """Hold the whole weights on every rank.

    Ranks may then run different numbers of forwards without waiting for one another.
    """
    # Gathering is a collective: with sharded weights each forward of a rank would need one of all.
    for module in sharded_modules(model):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in sharded_modules(model):
        module.reshard()
        module.set_reshard_after_forward(True, recurse=False)


# ---------------------------------------------------------------------------------- optimizer


def adamw(model, args):
    """AdamW on the fp32 weights; weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    # Decay pulls weights towards 0. Norms' scales and biases have no reason to be there.
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=args.learning_rate, betas=tuple(args.betas), eps=1e-8, fused=True
    )


def scheduled_rate(step, steps, args):
    """Learning rate of step 1..steps: linear warm-up, then cosine or linear decay towards zero.

    >>> args = argparse.Namespace(learning_rate=1.0, warmup_ratio=0.5, lr_scheduler_type="linear")
    >>> [scheduled_rate(step, 4, args) for step in (1, 2, 3, 4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    # AdamW's first steps rest on averages of few gradients: they are made small.
    warmup = round(steps * args.warmup_ratio)
    if step <= warmup:
        return args.learning_rate * step / warmup
    done = (step - 1 - warmup) / (steps - warmup)
    if args.lr_scheduler_type == "linear":
        return args.learning_rate * (1 - done)
    return args.learning_rate * (1 + math.cos(math.pi * done)) / 2


def clip_gradients(model, max_norm):
    """Scale all gradients to a global norm of at most max_norm. Returns: the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    # Of sharded gradients the norm is a DTensor: each rank has the part of its own rows.
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def update_weights(model, optimizer, step, steps, args, loss, where):
    """Clip the gradients and take one step of the optimizer.

    Args:    where: this step's rows ("file.jsonl:17"), for the error.
    Returns: the learning rate, and the global gradient norm before it was clipped.
    Raises:  UserError, with the weights as they were, if loss or norm is not finite.
    """
    norm = clip_gradients(model, args.max_grad_norm)
    # One bad number would spread to every weight, and the run would go on with them.
    if not (math.isfinite(loss) and math.isfinite(norm)):
        rows = ", ".join(dict.fromkeys(where))
        raise UserError(
            f"step {step}: loss {loss}, gradient norm {norm}; not applied. "
            f"Rows of this step: {rows}"
        )
    rate = scheduled_rate(step, steps, args)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return rate, norm


# ---------------------------------------------------------------------------------- rows


def rows_of_step(step, count, batch_size, seed, window=1.0):
    """Row numbers of SFT step or GRPO rollout 1, 2, ...: a pure function, so any can be repeated.

    Epochs follow one another without a gap; each is a new permutation of all rows. With a window
    below 1 rows are drawn from that share at the file's beginning: of a file that goes from easy
    to hard, the easier part.

    >>> sorted(rows_of_step(1, 6, 4, 0) + rows_of_step(2, 6, 4, 0)[:2])
    [0, 1, 2, 3, 4, 5]
    >>> max(rows_of_step(1, 100, 50, 0, window=0.1)) < 10
    True
    """
    if window < 1:
        easy = math.ceil(window * count)
        return np.random.default_rng((seed, step)).integers(0, easy, batch_size).tolist()
    # Places in the endless sequence of epochs. A step may reach from one epoch into the next.
    places = range((step - 1) * batch_size, step * batch_size)
    epochs = {place // count for place in places}
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(count) for epoch in epochs}
    return [int(orders[place // count][place % count]) for place in places]


def micro_batches(rows, costs, size, rank, world):
    """This rank's share of one step: lists of (row, trained), equally many on every rank.

    Rows of similar cost stand together, so that little is padded. Fillers are not trained.

    >>> micro_batches([7, 8, 9], [3, 1, 2], 2, rank=1, world=2)
    [[(7, True)]]
    >>> micro_batches([7, 8, 9], [3, 1, 2], 2, rank=3, world=4)
    [[(7, False)]]
    """
    size = min(size, math.ceil(len(rows) / world))  # larger ones would leave ranks without rows
    # All ranks sort alike, so that each knows its share without asking the others.
    ordered = [row for _, row in sorted(zip(costs, rows))]
    batches = []
    for some in chunks(ordered, size):
        batches.append([(row, True) for row in some])
    # All ranks must make equally many forwards: their weights are gathered together.
    while len(batches) % world:
        batches.append([(rows[0], False)])
    return batches[rank::world]


def leave_process_group(worker):
    """Move a DataLoader's worker to a process group of its own, of the operating system.

    Ctrl-C reaches all of a group, and the last step, which is finished after it, needs its workers.
    A worker's own signals are not the run's.
    """
    os.setpgrp()
    signal.set_wakeup_fd(-1)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_DFL)


# ---------------------------------------------------------------------------------- the run


def inputs(args, samples):
    """The fingerprints of what a run is made of: the model, the rows, the pictures, the prompts."""
    names = ("data", "replay", "eval_data", "prompts")
    prints = made_of(args.model, {name: getattr(args, name, None) for name in names})
    pictures = []
    for media in samples[0].media if samples else ():  # they stand for all: there may be 100,000
        pictures += media.sources
    return prints | {"images": fingerprint(pictures, OF_PICTURE)}


class Run:
    """An output folder: config_run.json, log.jsonl, resume/step-N, in the end the model itself.

    Args: samples: the rows that are trained on.
    """

    def __init__(self, args, ranks, samples=()):
        self.args, self.ranks, self.out = args, ranks, Path(args.out)
        self.stopping = False  # Ctrl-C or SIGTERM came
        self.saved = 0  # step of the newest trainer state
        # What a later start with --resume is compared with: the settings, and fingerprints of what
        # the run is made of.
        self.config = vars(args) | {MADE_OF: ranks.once(inputs, args, samples)}
        ranks.once(claim, self.out, self.config, MAY_CHANGE, bool(args.resume))
        ranks.print("settings:", json.dumps(self.config))
        self.finished = (self.out / "config.json").is_file()
        if self.finished:
            ranks.print(f"{self.out}: finished already")
        # Each signal is also written to a pipe as a byte, at once, whatever the main thread does.
        signals, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self.stop)
        Thread(target=self.listen, args=(signals,), daemon=True).start()

    def stop(self, number, frame):
        """Finish the step, save, end."""
        self.stopping = True

    def listen(self, signals):
        """End at once when a second signal comes. A thread, because the main one may be stuck.

        Under torchrun one Ctrl-C may come twice, by itself and passed on: both count as the first.
        """
        first = None  # when the first signal came
        while True:
            number = os.read(signals, 1)[0]
            if number not in (signal.SIGTERM, signal.SIGINT):
                continue
            now = time.monotonic()
            if first is None:
                first = now
            elif not self.ranks.launched or now - first > PASSED_ON:
                break
        # os._exit ends this process alone. DataLoader's workers would be left behind.
        for worker in multiprocessing.active_children():
            worker.kill()
        sys.stderr.write(f"{Path(sys.argv[0]).name}: ended by a second signal, nothing is saved\n")
        os._exit(128 + number)

    # ------------------------------------------------------------------ trainer states

    def restore(self, model, optimizer):
        """Load the newest readable trainer state, or the one that --resume names.

        Weights, the optimizer's moments and the number of the step are all the state there is:
        learning rate, data order and the noise of rollouts are functions of (seed, step).

        Returns: the number of steps that are done.
        """
        # Names have six digits, so that their order is that of the steps.
        choice = self.args.resume
        states = sorted((self.out / "resume").glob("step-??????"), reverse=True)
        if choice and choice != "auto":
            if not (Path(choice) / ".metadata").is_file():
                raise UserError(f"--resume {choice}: no trainer state there (no .metadata in it)")
            states = [Path(choice)]
        self.ranks.once(write_json, self.out / CONFIG, self.config)
        # Nothing of an interrupted save is used: a state counts once it has its own name.
        if self.ranks.rank == 0:
            for left in self.out.glob("resume/*.tmp"):
                shutil.rmtree(left)
        if not (choice and states):
            self.ranks.once(self.cut_log, 0)
            return 0
        for path in states:
            step = self.load_state(path, model, optimizer)
            if step is not None:
                self.ranks.print(f"resumed {path}")
                self.go_on_from(path, step, model, optimizer)
                return step
        raise UserError(f"{self.out}: none of its {len(states)} trainer states can be read")

    def go_on_from(self, path, step, model, optimizer):
        """Leave the old way: states and rows of later steps, which will be done again.

        The states go first, the newest before the others: wherever this is interrupted, the newest
        state that is left has all of its log.
        """
        here = self.out / "resume" / f"step-{step:06d}"
        if path.resolve() != here.resolve():  # of another folder
            begun = read_json(path / "meta.json").get("config", self.config)
            changed = changes(begun, self.config, MAY_CHANGE)
            if changed:
                self.ranks.print(f"{path}: of a run with other settings: {changed}")
            self.save(model, optimizer, step)  # `auto` is to find it here
        self.saved = step
        self.ranks.once(self.leave_states, here)
        self.ranks.once(self.cut_log, step)

    def leave_states(self, last):
        """Make the states after `last` no candidates for `auto`.

        Who names a state with --resume goes back: what came after it is removed. With `auto` they
        are states that could not be read. These are kept under another name: the disk may have had
        a passing error.
        """
        for path in sorted(last.parent.glob("step-??????"), reverse=True):
            if path <= last:
                break
            with writing(path):
                if self.args.resume == "auto":
                    aside = path.with_suffix(".unreadable")
                    shutil.rmtree(aside, ignore_errors=True)
                    os.replace(path, aside)
                    print(f"{path}: kept as {aside.name}", flush=True)
                else:
                    shutil.rmtree(path)
                    print(f"{path}: removed, its steps are done again", flush=True)

    def load_state(self, path, model, optimizer):
        """Fill model and optimizer from a trainer state. Returns: its step, None if unreadable."""
        try:
            # torch.distributed.checkpoint fills tensors in place: first ones of the right shapes,
            # sharded as they are now, whatever the number of processes that saved them.
            model_state, optimizer_state = get_state_dict(model, optimizer)
            state = {"model": model_state, "optimizer": optimizer_state}
            dcp.load(state, checkpoint_id=str(path))
            set_state_dict(
                model,
                optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )
            return read_json(path / "meta.json")["step"]
        except torch.OutOfMemoryError:  # nothing is wrong with the file
            raise
        except (Exception, dcp.CheckpointException) as error:  # a torn file shows in many ways
            problem = reason(error)
        self.ranks.print(f"{path}: not readable ({problem}), trying the one before")
        return None

    def save(self, model, optimizer, step):
        """Write the trainer state beside and rename it into place; keep the newest --keep-last."""
        folder = self.out / "resume"
        final = folder / f"step-{step:06d}"
        beside = folder / f"{final.name}.tmp"
        model_state, optimizer_state = get_state_dict(model, optimizer)
        with writing(beside, "the trainer state", dcp.CheckpointException):
            dcp.save(
                {"model": model_state, "optimizer": optimizer_state}, checkpoint_id=str(beside)
            )
            if self.ranks.rank == 0:
                meta = {"step": step, "config": self.config}
                write_json(beside / "meta.json", meta)
                # Renaming is all or nothing: a state under its own name is whole.
                shutil.rmtree(final, ignore_errors=True)
                os.replace(beside, final)
                states = [path for path in sorted(folder.glob("step-??????")) if path <= final]
                for old in states[: -self.args.keep_last]:
                    shutil.rmtree(old)
        self.saved = step
        dist.barrier()

    # ------------------------------------------------------------------ log

    def cut_log(self, step):
        """Drop the rows of steps that will be done again."""
        for name in ("log.jsonl", "rollouts.jsonl"):
            path = self.out / name
            if path.is_file():
                # Every whole line ends in "\n". What follows the last one was torn by a kill.
                lines = path.read_text(encoding="utf-8").split("\n")[:-1]
                kept = [line for line in lines if parse_line(line.encode(), path)["step"] <= step]
                write_text(path, "".join(line + "\n" for line in kept))

    def append(self, name, rows):
        """Add rows to a log; all ranks call it. A full disk ends all of them."""
        self.ranks.once(append_jsonl, self.out / name, rows)

    # ------------------------------------------------------------------ the loop

    def steps(self, done, steps):
        """Step numbers done + 1 ... steps, with a progress bar on rank 0."""
        self.total, self.clock = steps, time.perf_counter()
        self.bar = tqdm(
            range(done + 1, steps + 1),
            desc=f"{self.args.stage:>5}",
            initial=done,
            total=steps,
            disable=self.ranks.rank != 0,
            mininterval=2,
            dynamic_ncols=True,
        )
        return self.bar

    def end_step(self, model, optimizer, step, entry, boundary=True):
        """Log a step and save when it is time. Returns: True when the run is to stop here.

        boundary: False between the updates on one rollout, where nothing is saved.
        """
        seconds = time.perf_counter() - self.clock
        timing = {"step_time": seconds, "tokens_per_second": entry["num_tokens"] / seconds}
        self.append("log.jsonl", [{"step": step, **entry, **timing}])
        self.bar.set_postfix(loss=f"{entry['loss']:.3f}", refresh=False)

        # A signal reaches ranks at different moments. They agree here to stop after this step.
        stop = boundary and self.ranks.sum(self.stopping)[0] > 0
        due = self.args.save_every and step - self.saved >= self.args.save_every
        if stop or (boundary and due and step < self.total):
            self.save(model, optimizer, step)
        if stop:
            self.ranks.print(
                f"stopped after step {step} of {self.total}; continue with: {self.command()}"
            )
        self.clock = time.perf_counter()  # saving is not part of the next step
        return stop

    def command(self):
        """The command that continues this run; on several nodes add their rendezvous flags."""
        # torchrun sets no variable that says how it was called itself.
        launcher = ["python"]
        if self.ranks.launched:
            launcher = ["torchrun", f"--nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}"]
        resume = [] if self.args.resume == "auto" else ["--resume", "auto"]
        return shlex.join([*launcher, *sys.argv, *resume])

    def finish(self, model, processor):
        """Write the model directory; with config.json in it the run is complete."""
        if self.ranks.rank == 0:
            with writing(self.out, "the model", SafetensorError):
                tensors = whole_tensors(model)
                save_model(self.out, tensors, model.config, self.args.model, processor.limits)
        else:
            for _ in whole_tensors(model):  # gathering takes all ranks; rank 0 writes
                pass
        dist.barrier()
        self.ranks.print(f"wrote {self.out}")
