"""What every training run needs and no reader should meet twice: flags, ranks, sharding, checkpoints, the log.

Nothing here knows what is being trained. One process and many run the same lines: collectives of one are no-ops.
"""

import argparse
import difflib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

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

from checkpoint import build_model, load_config, load_weights, read_json, save_model, write_json
from ladder import FLAGS, MADE_BY, RECIPES
from rewards import UserError


# ---------------------------------------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    """argparse with dashes or underscores, errors of one line, and the nearest name for an unknown flag."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)  # else --lr would be taken for --lr-scheduler-type

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")

    def parse_args(self, argv=None):
        argv = sys.argv[1:] if argv is None else argv
        argv = [a.split("=")[0].replace("_", "-") + a[len(a.split("=")[0]):] if a.startswith("--") else a for a in argv]
        args, unknown = self.parse_known_args(argv)
        if unknown:
            names = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], names, 1, 0)
            self.error(f"unknown argument {unknown[0]}" + (f", did you mean {near[0]}?" if near else ""))
        return args


FREE = ("resume", "device", "workers", "micro_batch", "save_every", "keep_last", "dry_run")  # may change when a run continues
POSITIVE = ("epochs", "max_steps", "batch_size", "micro_batch", "learning_rate", "max_grad_norm", "min_pixels",
            "max_pixels", "num_frames", "fps", "prompts_per_step", "max_completion_length", "num_iterations",
            "keep_last", "limit", "max_tokens", "temperature", "eval_limit")
AT_MOST = {"betas": 0.9999, "replay_ratio": 0.99, "warmup_ratio": 1, "curriculum": 1}


def add_flags(parser, names):
    """Flags by their rows in ladder.FLAGS; all default to None, which means: as the recipe says."""
    for name in names:
        kind, text = FLAGS[name]
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif isinstance(kind, (tuple, dict)):
            parser.add_argument(flag, choices=tuple(kind), help=text)
        elif isinstance(kind, list):
            parser.add_argument(flag, nargs="+", type=kind[0], help=text)
        else:
            parser.add_argument(flag, type=kind, help=text)


def recipe_settings(doc, argv=None, stage=None):
    """The settings of a training run: its recipe's row, with what the flags say in its place.

    Args:    stage: the row of ladder.RECIPES[preset]; None takes it from --stage.
    Returns: Namespace of the row's keys, `preset`, `stage` and the flags every run has.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(RECIPES), default="tiny", help="column of RECIPES in ladder.py")
    stages = [name for name in RECIPES["tiny"] if name != "grpo"]
    if stage is None:
        parser.add_argument("--stage", choices=stages, required=True, help="row of RECIPES in ladder.py")
    rows = [RECIPES["tiny"][name] for name in (stages if stage is None else [stage])]
    add_flags(parser, dict.fromkeys(name for row in rows for name in row))
    args = vars(parser.parse_args(argv))
    args["stage"] = stage or args["stage"]
    row = RECIPES[args["preset"]][args["stage"]]
    for name, value in args.items():
        if value is None:
            args[name] = row.get(name)
    for name in ("model", "data", "out"):
        if args[name] is None:
            parser.error(f"preset {args['preset']} has no default for --{name}; give it")
    refuse_bad_values(parser, args := argparse.Namespace(**args))
    return args


def refuse_bad_values(parser, args):
    """End with one line at the first flag whose number makes no sense."""
    for name, value in vars(args).items():
        flag, most = f"--{name.replace('_', '-')}", AT_MOST.get(name, math.inf)
        for number in value if isinstance(value, list) else [value]:
            if name in POSITIVE and number is not None and not 0 < number < math.inf:
                parser.error(f"{flag} is {number}, expected a positive number")
            if isinstance(number, (int, float)) and not 0 <= number <= most:
                parser.error(f"{flag} is {number}, expected 0 to {most}")
        if name == "betas" and len(value) != 2:
            parser.error(f"{flag} has {len(value)} numbers, expected 2")


def need_inputs(args, ranks):
    """Make the tiny preset's rooms and random weights where they are missing; name the command for a missing rung."""
    given = [*args.data, *(vars(args).get("replay") or ()), args.model]  # GRPO replays nothing
    todo = []
    for made, command in MADE_BY.items():
        inputs = [path for path in given if Path(path).is_relative_to(made)]
        complete = Path(made) / ("meta.json" if made.endswith("rooms") else "config.json")
        if not inputs or ranks.gather(complete.is_file())[0]:  # rank 0 decides for all: it may be quick to make it
            continue
        words = shlex.split(command)[1:]
        if words[0] not in ("scenes.py", "tiny.py"):
            raise UserError(f"{made}: no model there yet; make it with: {command}")
        todo.append((made, command, words))
        given += words
    for made, command, (script, *flags) in reversed(todo):
        ranks.print(f"$ {command}")
        failed = ranks.rank == 0 and subprocess.run([sys.executable, Path(__file__).parent / script, *flags]).returncode
        if ranks.gather(failed)[0]:
            raise UserError(f"{made}: could not be made with: {command}")


def main_guard(main):
    """Run a script's main: a user's mistake is one line on stderr and exit code 2, any other error says where it was."""
    code = 0
    try:
        main()
    except Exception as error:
        steps = [frame.f_locals["step"] for frame, _ in traceback.walk_tb(error.__traceback__) if "step" in frame.f_locals]
        rank = [f"rank {os.environ['RANK']}"] if int(os.environ.get("WORLD_SIZE", 1)) > 1 else []
        where = ", ".join(rank + [f"step {step}" for step in steps[:1]])  # of the script's loop: the outermost
        if not isinstance(error, UserError):  # ours, or a time-out of the backend: all of it is shown
            error.add_note(where)
            raise
        line = str(error).strip().splitlines()[-1].removeprefix("rewards.UserError: ")  # after a DataLoader's traceback
        line = ": ".join(filter(None, (Path(sys.argv[0]).name, where, line)))
        sys.stderr.write(line + "\n")  # in one piece: ranks write to the same terminal
        code = 2
    if dist.is_initialized():  # else gloo's threads abort the interpreter at its exit
        dist.destroy_process_group()
    sys.exit(code)


# ---------------------------------------------------------------------------------------------- ranks


class Ranks:
    """The processes of this run: torchrun's, or one."""

    def __init__(self, device=None):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no GPU")
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        self.launched = "RANK" in os.environ  # by torchrun
        if self.launched:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def sum(self, *values):
        """Add numbers up over all ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value):
        """Every rank's value, on every rank, in rank order."""
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def print(self, *text):
        if self.rank == 0:
            print(*text, flush=True)

    def close(self):
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------- model and optimizer


def load_sharded(directory, ranks, dtype=None, reshard_after_forward=True, activation_checkpointing=False,
                 freeze_vision=False):
    """A model with fp32 weights that computes in `dtype`: built on the meta device, sharded, filled row by row.

    Sharded (FSDP2) under torchrun, on a GPU, or for bfloat16; plain fp32 on a CPU runs the bare module. Gradients are
    reduced in fp32 and summed: the loss is divided once, by the count over all ranks.
    """
    dtype = getattr(torch, dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32"))
    model = build_model(load_config(directory))
    model.activation_checkpointing, model.reshard_after_forward = activation_checkpointing, reshard_after_forward
    model.visual.requires_grad_(not freeze_vision)
    if ranks.launched or ranks.device.type == "cuda" or dtype != torch.float32:
        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in (*model.visual.blocks, *model.model.layers, model):
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
        for module in sharded_modules(model):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo sums only if both are set
    model.to_empty(device=ranks.device)
    load_weights(model, directory, held_rows)
    return model


def sharded_modules(model):
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def held_rows(parameter):
    """The part of a parameter that this rank holds and the number of its first row."""
    if not isinstance(parameter, DTensor):
        return parameter, 0
    mesh, rows = parameter.device_mesh, len(parameter)
    return parameter.to_local(), min(rows, -(-rows // mesh.size()) * mesh.get_local_rank())


def whole_tensors(model):
    """(name, whole tensor) of every parameter, gathered one at a time; all ranks must iterate."""
    for name, parameter in model.named_parameters():
        yield name, parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


@contextmanager
def gathered(model):
    """Hold the whole weights on every rank: ranks may then run different numbers of forwards without waiting."""
    for module in sharded_modules(model):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in sharded_modules(model):
        module.reshard()
        module.set_reshard_after_forward(model.reshard_after_forward, recurse=False)


def adamw(model, args):
    """AdamW on the fp32 weights; weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if (p.ndim > 1) == matrix], "weight_decay": decay}
              for matrix, decay in ((True, args.weight_decay), (False, 0.0))]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=tuple(args.betas), eps=1e-8, fused=True)


def scheduled_rate(step, steps, args):
    """Learning rate of step 1..steps: linear warm-up, then cosine or linear decay to zero.

    >>> args = argparse.Namespace(learning_rate=1.0, warmup_ratio=0.5, lr_scheduler_type="linear")
    >>> [scheduled_rate(step, 4, args) for step in (1, 2, 3, 4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    warmup = round(steps * args.warmup_ratio)
    if step <= warmup:
        return args.learning_rate * step / warmup
    done = (step - 1 - warmup) / (steps - warmup)
    return args.learning_rate * (1 - done if args.lr_scheduler_type == "linear" else (1 + math.cos(math.pi * done)) / 2)


def clip_gradients(model, max_norm):
    """Scale all gradients to a global norm of at most max_norm. Returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


# ---------------------------------------------------------------------------------------------- order of the rows


def rows_of_step(step, count, batch_size, seed, window=1.0):
    """Row numbers of optimizer step 1, 2, ...: a pure function, so any step can be repeated anywhere.

    Epochs follow one another without a gap; each is a new permutation of all rows. With a window below 1 rows are
    drawn from that share at the file's beginning instead: of a file that goes from easy to hard, the easier part.

    >>> sorted(rows_of_step(1, 6, 4, 0) + rows_of_step(2, 6, 4, 0)[:2])
    [0, 1, 2, 3, 4, 5]
    >>> max(rows_of_step(1, 100, 50, 0, window=0.1)) < 10
    True
    """
    if window < 1:
        return np.random.default_rng((seed, step)).integers(0, math.ceil(window * count), batch_size).tolist()
    places = range((step - 1) * batch_size, step * batch_size)
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(count) for epoch in {p // count for p in places}}
    return [int(orders[place // count][place % count]) for place in places]


def micro_batches(rows, costs, size, rank, world):
    """This rank's share of one step: lists of (row, trained), equally many on every rank.

    Rows of like cost stand together, so that little is padded. Fillers (trained False) make the shares equal.

    >>> micro_batches([7, 8, 9], [3, 1, 2], 2, rank=1, world=2)
    [[(7, True)]]
    >>> micro_batches([7, 8, 9], [3, 1, 2], 2, rank=2, world=4)
    [[(7, False)]]
    """
    ordered = [row for _, row in sorted(zip(costs, rows))]
    batches = [[(row, True) for row in ordered[i:i + size]] for i in range(0, len(ordered), size)]
    batches += [[(rows[0], False)]] * (-len(batches) % world)
    return batches[rank::world]


# ---------------------------------------------------------------------------------------------- the run


def reason(error):
    """An error on one line, the last: torch puts the traceback of the process that failed before it."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[-1][:150]


def own_group(worker):
    """A DataLoader's worker leaves the process group: Ctrl-C reaches all of a group, and the step needs its workers."""
    os.setpgrp()


@contextmanager
def writing(path, what):
    """A full disk, a directory that may not be written: one line."""
    try:
        yield
    except (OSError, SafetensorError, dcp.CheckpointException) as error:
        raise UserError(f"{path}: cannot write {what} ({reason(error)})") from None


class Run:
    """An output directory: config_run.json, log.jsonl, resume/step-N, and in the end the model itself."""

    def __init__(self, args, ranks):
        self.args, self.ranks, self.out = args, ranks, Path(args.out)
        self.stopping, self.saved, self.spent = False, 0, {}
        self.config = {key: value for key, value in vars(args).items() if key not in FREE}
        problem = ranks.gather(self.claim() if ranks.rank == 0 else None)[0]
        if problem:
            raise UserError(problem)
        self.finished = (self.out / "config.json").is_file()
        if self.finished:
            ranks.print(f"{self.out}: finished already")
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self.stop)

    def claim(self):
        """Look at the directory on rank 0: empty, or another try at the same run. Returns what is wrong, if anything."""
        config = self.out / "config_run.json"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if config.is_file() and self.args.resume:
                before = read_json(config)
                changed = [key for key in self.config if before.get(key) != self.config[key]]
                if changed:
                    return (f"{self.out}: was begun with other settings: " + ", ".join(
                        f"{key} {before.get(key)!r}, now {self.config[key]!r}" for key in changed))
            elif any(path.suffix != ".tmp" for path in self.out.iterdir()):  # that one is of a try killed at once
                return f"{self.out}: not empty; continue it with --resume auto, or give another --out"
            for left in self.out.glob("resume/*.tmp"):  # by a save that was interrupted
                shutil.rmtree(left)
        except OSError as error:
            return f"{self.out}: cannot write there ({error.strerror})"
        print("settings:", json.dumps(self.config), flush=True)

    def stop(self, number, frame):
        """Ctrl-C or SIGTERM: finish the step, save, end. A second one ends at once, but torchrun passes its own on."""
        if self.stopping and not self.ranks.launched:
            raise KeyboardInterrupt
        self.stopping = True

    def restore(self, model, optimizer):
        """Load the newest readable trainer state, or the one that --resume names. Returns the steps already done.

        Weights, the optimizer's moments and the number of the step are all the state there is: learning rate, data
        order, curriculum and the noise of rollouts are functions of (seed, step), and no other random number is drawn.
        """
        choice, states = self.args.resume, sorted((self.out / "resume").glob("step-??????"), reverse=True)
        if choice and choice != "auto":
            if not (Path(choice) / ".metadata").is_file():
                raise UserError(f"--resume {choice}: no trainer state there (no .metadata in it)")
            states = [Path(choice)]
        if self.ranks.rank == 0:
            with writing(self.out, "there"):
                write_json(self.out / "config_run.json", self.config)
        for path in states if choice else []:
            try:
                names = get_state_dict(model, optimizer)
                state = {"model": names[0], "optimizer": names[1]}
                dcp.load(state, checkpoint_id=str(path))
                set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
                step = read_json(path / "meta.json")["step"]
            except (Exception, dcp.CheckpointException) as error:  # the latter is none; a torn file shows in many ways
                self.ranks.print(f"{path}: not readable ({reason(error)}), trying the one before")
                continue
            self.ranks.print(f"resumed {path}")
            self.cut_log(step)
            self.saved = step
            return step
        if states and choice:
            raise UserError(f"{self.out}: none of its {len(states)} trainer states can be read")
        self.cut_log(0)
        return 0

    def cut_log(self, step):
        """Drop the log's rows of steps that will be done again."""
        for name in ("log.jsonl", "rollouts.jsonl"):
            path = self.out / name
            if self.ranks.rank == 0 and path.is_file():
                rows = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
                        if line.endswith("\n") and json.loads(line)["step"] <= step]
                beside = Path(f"{path}.tmp")
                with writing(path, "there"):
                    beside.write_text("".join(rows), encoding="utf-8")
                    os.replace(beside, path)

    def append(self, name, rows):
        if self.ranks.rank == 0:
            with writing(self.out / name, "there"), open(self.out / name, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))

    def save(self, model, optimizer, step):
        """Write the trainer state beside and rename it into place; keep the newest --keep-last."""
        folder = self.out / "resume"
        final, beside = folder / f"step-{step:06d}", folder / f"step-{step:06d}.tmp"
        names = get_state_dict(model, optimizer)
        with writing(beside, "the trainer state"):
            dcp.save({"model": names[0], "optimizer": names[1]}, checkpoint_id=str(beside))
            if self.ranks.rank == 0:
                write_json(beside / "meta.json", {"step": step, "world": self.ranks.world, "config": self.config})
                shutil.rmtree(final, ignore_errors=True)
                os.replace(beside, final)
                for old in [path for path in sorted(folder.glob("step-??????")) if path <= final][:-self.args.keep_last]:
                    shutil.rmtree(old)
        self.saved = step
        dist.barrier()

    def lap(self, part):
        """Count the time since the last call as spent on this part of the step: `data`, `forward`, ..."""
        now = time.perf_counter()
        self.spent[part] = self.spent.get(part, 0.0) + now - self.clock
        self.clock = now

    def end_step(self, model, optimizer, step, steps, row, boundary=True):
        """Log a step, save when it is time. Returns True when the run is to stop here.

        boundary: False inside the iterations over one rollout, where nothing is saved and no run stops.
        """
        seconds = sum(self.spent.values())
        row = {"step": step, **row, **{f"{part}_time": spent for part, spent in self.spent.items()}, "step_time": seconds}
        row |= {"tokens_per_second": row["num_tokens"] / seconds, "model_flops_per_second": row["model_flops"] / seconds}
        self.append("log.jsonl", [row])
        self.bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
        stop = boundary and self.ranks.sum(self.stopping)[0] > 0
        due = self.args.save_every and step - self.saved >= self.args.save_every and step < steps
        if stop or boundary and due:
            self.save(model, optimizer, step)
        if stop:
            self.ranks.print(f"stopped after step {step} of {steps}; continue with: {self.command()}")
        self.spent, self.clock = dict.fromkeys(self.spent, 0.0), time.perf_counter()  # saving is not a step's
        return stop

    def command(self):
        """The command that continues this run (on several nodes, with their rendezvous flags besides)."""
        launcher = ["torchrun", f"--nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}"] if self.ranks.launched else ["python"]
        return shlex.join([*launcher, *sys.argv, *(["--resume", "auto"] if self.args.resume != "auto" else [])])

    def steps(self, first, steps):
        """Step numbers first + 1 ... steps, with a progress bar on rank 0."""
        self.clock = time.perf_counter()
        self.bar = tqdm(range(first + 1, steps + 1), initial=first, total=steps, disable=self.ranks.rank != 0,
                        mininterval=2, desc=f"{self.args.stage:>5}", dynamic_ncols=True)
        return self.bar

    def finish(self, model, processor):
        """Write the model directory; with config.json in it the run is complete."""
        if self.ranks.rank == 0:
            limits = {"min_pixels": processor.min_pixels, "max_pixels": processor.max_pixels}
            with writing(self.out, "the model"):
                save_model(self.out, whole_tensors(model), model.config, self.args.model, limits)
        else:
            for _ in whole_tensors(model):
                pass
        dist.barrier()
        self.ranks.print(f"wrote {self.out}")
