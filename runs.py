"""The shell of a run: its processes, its ends, its log, checkpoints and files.

Nothing of the method is here. `Run` is what stands around a training loop; post-training and
pre-training share it.
"""

import contextlib
import ctypes
import dataclasses
import datetime
import io
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import tyro
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from torch.utils.data import DataLoader
from tqdm import tqdm

SKIPS_IN_A_ROW = 5  # so many steps without a finite loss and gradient end a run
NO_MEMORY = "out of GPU memory: a smaller --crop, --batch-size or --group-size needs less"


class RunError(ValueError):
    """A run cannot start or go on; the text says why and what to do, in one sentence."""


class ProcessError(RunError):
    """Another process of the run has ended, or hangs."""


class Stopped(Exception):  # noqa: N818 (no error: the user asked for it)
    """The run was asked to end; the text says by what."""


# ------------------------------------------------------------------------------- a program's flags


def program(name, function, argv=None, errors=()):
    """Runs function(argv), a program called `name`, with its flags, those of the command line by
    default; returns its exit code.

    What the user can mend (RunError, `errors`, files that cannot be read or written, memory that
    runs out) becomes one sentence on standard error and exit code 2.
    """
    try:
        return function(sys.argv[1:] if argv is None else argv)
    except (RunError, *errors) as error:
        message = str(error)
    except OSError as error:  # a folder that cannot be written, a full disk
        message = str(error)
    except torch.OutOfMemoryError:
        message = NO_MEMORY
    except KeyboardInterrupt:
        message = "stopped; a run goes on from its last checkpoint with --resume RUN"
    finally:
        leave()
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return 2


# Ranges stand beside the fields of a program's flags; `flags` checks them.
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Workers = Annotated[int, Field(ge=0, le=256)]
MultipleOf8 = Annotated[int, Field(ge=8, multiple_of=8)]
AbsolutePath = Annotated[str, AfterValidator(os.path.abspath)]


def flags(config, name, about, argv, default=None):
    """The dataclass `config` filled from a program's flags; `default` in its place. A wrong flag
    ends the program, exit code 2. Raises RunError for a value out of its field's range."""
    options = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    given = dict(default=default) if default else {}
    parsed = tyro.cli(config, prog=name, description=about, args=argv, config=options, **given)
    return validated(config, dataclasses.asdict(parsed))


def validated(config, values):
    """The dataclass `config` of {field: value}, its values in the ranges that stand beside its
    fields. Raises RunError for one that is not."""
    try:
        return TypeAdapter(config).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        names = [part for part in first["loc"] if isinstance(part, str)]
        flag = f"--{names[-1].replace('_', '-')}"
        said = first["msg"].replace("Input should", "it should")
        raise RunError(f"{flag} is {first['input']}: {said}") from None


def check_tile(tile):
    """Raises RunError unless a tile is 0, none, or wide enough for two overlaps of 32 px."""
    if tile and (tile % 8 or tile <= 64):
        raise RunError(f"--tile is {tile}: it must be 0 or a multiple of 8 above 64")


def check_file(flag, path):
    if path and not Path(path).is_file():
        raise RunError(f"{flag}: there is no file {path}")


def keep_freed_memory():
    """Has glibc keep what is freed. It would give every block over 32 MB back to the kernel, which
    clears each page of the next one: a forward of 384×256 px then takes 1.8 times as long. Another
    C library is left as it is."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def check_device(device):
    """Prepares a device. Raises RunError unless it works here."""
    try:
        if device == "cuda" and local_rank() < torch.cuda.device_count():
            torch.cuda.set_device(local_rank())  # else every process would take memory of the first
        torch.empty(0, device=device)
        if torch.device(device).type == "cpu":
            keep_freed_memory()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0][:100]
        raise RunError(f"--device {device!r} is no device of this machine ({reason})") from None


def is_url(text):
    return text.startswith(("http://", "https://"))


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def on_gpu(device):
    return torch.device(device).type == "cuda"


# ---------------------------------------------------------------------------- the run's processes
# torchrun starts W of them and tells each its RANK, 0 … W − 1. Without it there is one, of rank 0.

HANGS_AFTER = datetime.timedelta(minutes=30)  # one that dies is noticed at once


def local_rank():
    return int(os.environ.get("LOCAL_RANK", 0))


def join(wanted):
    """Joins the other processes that torchrun started, if it did.

    Returns the device of this one: `wanted`, or of several GPUs its own. Raises RunError where
    there is none for it.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return wanted
    if "LOCAL_RANK" not in os.environ:
        raise RunError("WORLD_SIZE is set without torchrun: unset it, or start with torchrun")
    if on_gpu(wanted):
        there = torch.cuda.device_count()
        if torch.device(wanted).index is not None or local_rank() >= there:
            raise RunError(f"--device {wanted}: process i takes cuda:i, and there are {there} GPUs")
        wanted = f"cuda:{local_rank()}"
        torch.cuda.set_device(wanted)
    if not dist.is_initialized():
        with collective():
            backend = "cpu:gloo,cuda:nccl" if on_gpu(wanted) else "gloo"
            dist.init_process_group(backend, timeout=HANGS_AFTER)
    return wanted


def leave():
    """Leaves the processes that `join` joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text):
    """Prints beside progress bars; the first process speaks for all."""
    if rank() == 0:
        tqdm.write(text)


def say_skipped(problems, shown=20):
    """Names what is left out of training, the first ones in full, and counts it."""
    problems = list(dict.fromkeys(problems))
    for problem in problems[:shown]:
        say(f"skipped: {problem}")
    if problems:
        more = f"; {len(problems) - shown} more are not shown" if len(problems) > shown else ""
        say(f"{len(problems)} image(s) or pair(s) skipped in training{more}")


@contextlib.contextmanager
def collective():
    """Around what all processes do at the same time: raises ProcessError if one is gone."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo has no class of its own
        reason = str(error).split("\n")[0].split(". ")[0][-200:]
        raise ProcessError(f"another process of this run ended or hangs ({reason})") from None


def gather(value):
    """[value of process 0, of process 1, …] in every process. What JSON can hold travels, as text:
    nothing is unpickled."""
    if processes() == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    with collective():
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(processes())]
        dist.all_gather(sizes, torch.tensor([len(text)]))
        padded = torch.nn.functional.pad(text, (0, max(map(int, sizes)) - len(text)))
        texts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(texts, padded)
    return [json.loads(t[: int(n)].numpy().tobytes()) for t, n in zip(texts, sizes)]


def same_everywhere(what, value):
    """Raises RunError if `value` differs between the processes, as when a machine sees another
    folder."""
    for i, other in enumerate(gather(value)):
        if other != value:
            raise RunError(f"process {i} has another {what}: all need the same files and paths")


def parallel_map(function, items, desc, stop=None):
    """[function(item) for item in items] in every process, each of which does a part of them.

    Item i is done by process i modulo their number. The results must be what JSON can hold.
    desc: what to call the progress bar. stop: a `Stop`, looked at before each item.
    """
    results, at_once = [], 64 * processes()  # so that a process that is gone is noticed soon
    bar = tqdm(total=len(items), desc=desc, leave=False, disable=rank() > 0)
    for first in range(0, len(items), at_once):
        part, mine = items[first : first + at_once], []
        for item in part[rank() :: processes()]:
            if stop:
                stop.check()
            mine.append(function(item))
            bar.update(processes())
        done = [None] * len(part)
        for i, of_one in enumerate(gather(mine)):
            done[i :: processes()] = of_one
        results += done
    bar.close()
    return results


def average_gradients(parameters, loss):
    """Averages the gradients over the processes, in place; returns the average of their losses.

    All processes have gradients of the same parameters.
    """
    if processes() == 1:
        return loss
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([loss.reshape(1), *(g.reshape(-1) for g in gradients)])
    with collective():
        dist.all_reduce(flat)
    loss, *parts = (flat / processes()).split([1, *(g.numel() for g in gradients)])
    for gradient, part in zip(gradients, parts):
        gradient.copy_(part.view_as(gradient))
    return loss[0]


def averaged(module, decay):
    """An AveragedModel of a module: an exponential moving average of its weights, over fewer steps
    while there are few. With decay 0 it is the module as it is."""

    def average(averages, weights, n):
        now = min(decay, (1 + int(n)) / (10 + int(n)))
        torch.optim.swa_utils.get_ema_multi_avg_fn(now)(averages, weights, n)

    return torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=average)


# How the numbers of all processes become one; whatever else is logged is averaged.
HOW = {"judge/failures": sum, "judge/starts": sum, "judge/wait": max}


def merge(metrics):
    """One {name: number} of those of all processes; a name that some lack is averaged over the
    rest."""
    merged = {}
    for name in dict.fromkeys(name for each in metrics for name in each):
        values = [each[name] for each in metrics if name in each]
        merged[name] = HOW[name](values) if name in HOW else sum(values) / len(values)
    return merged


# ---------------------------------------------------------------------------------- ways to end


class Stop:
    """A flag: within it SIGTERM, Ctrl-C and the end of `minutes` ask the run to end. Whoever works
    for long looks at it now and then (`check`). A second Ctrl-C ends the program at once."""

    NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}

    def __init__(self, minutes=None):
        self.asked, self.minutes = None, minutes
        self.deadline = time.monotonic() + 60 * minutes if minutes else math.inf

    def __enter__(self):
        self.before = {number: signal.signal(number, self.notice) for number in self.NAMES}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def notice(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = self.asked or self.NAMES[number]

    @property
    def reason(self):
        """What asked the run to end, None if nothing has."""
        late = time.monotonic() > self.deadline
        return self.asked or (f"--max-minutes {self.minutes:g}" if late else None)

    def check(self):
        """Raises Stopped if the run was asked to end."""
        if self.reason:
            raise Stopped(self.reason)


class Run:
    """The shell around a training loop, the same for every one.

        with Run(folder, stop, again, save_every=100) as run:
            run.start(state, "irpo")
            for batch in run.batches(crops, …):
                … loss.backward()
                run.update([optimizer], loss, metrics)

    state has step, seen and total (crops), live and averaged (modules), checkpoint() -> dict.
    Whatever ends the block early leaves last.pt as it was after the last whole step, and one
    sentence: RunError, or Stopped if the run was asked to end.
    """

    def __init__(
        self,
        folder,
        stop,
        again,
        device="cpu",
        workers=None,
        save_every=100,
        keep_every=0,
        failures=(),
    ):
        """again: what goes on with the run; device: of the batches; workers: processes that load
        images, None: 4 beside a GPU, else none; failures: exceptions that are no bugs."""
        self.folder, self.stop, self.again = Path(folder), stop, again
        self.device, self.gpu = device, on_gpu(device)
        self.workers = (4 if self.gpu else 0) if workers is None else workers
        self.save_every, self.keep_every = save_every, keep_every
        self.failures = (OSError, torch.OutOfMemoryError, RunError, *failures)
        self.state = self.reason = None
        self.skipped, self.is_whole = 0, True

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if not self.state:
            return
        if error and self.is_whole:
            self.save("last.pt")
        self.bar.close()
        with contextlib.suppress(OSError):  # a full disk was named when it was written to
            self.log.close()
        if error is None:
            return
        reason, step = self.stop.reason, f"after step {self.state.step}"
        if isinstance(error, Stopped):
            raise Stopped(f"{error}, {step}") from None
        if isinstance(error, ProcessError) and reason:  # asked to end, as the other one was
            raise Stopped(f"{reason}, {step}; another process of this run had ended") from None
        if isinstance(error, self.failures):
            message = NO_MEMORY if isinstance(error, torch.OutOfMemoryError) else error
            raise RunError(f"{message}, {step}; {self.again} goes on") from None

    def start(self, state, desc, shown=(), steps=None):
        """Opens the log and the progress bar. shown: metrics the bar shows, {label: name}; steps:
        of the whole run, where `batches` are asked for in several parts."""
        self.steps, self.shown = steps, dict(shown)
        self.log = Log(self.folder, state.step)
        self.bar = tqdm(initial=state.step, desc=desc, unit="step", disable=rank() > 0)
        self.state = state
        self.start_clock()

    def start_clock(self):
        """The time of a step counts from here."""
        self.begun = time.perf_counter()

    def batches(self, crops, size, until=None):
        """Batches of `size` crops for this process, on its device, from the state's next crop on
        until `until` (state.total) were seen by all; the last step is filled from the next
        epoch."""
        state, until = self.state, until or self.state.total
        self.crops = size * processes()  # of one step
        steps = range(state.seen + rank() * size, until + rank() * size, self.crops)
        self.bar.total = self.steps or state.step + len(steps)
        loader = DataLoader(
            crops,
            batch_sampler=(range(first, first + size) for first in steps),
            num_workers=self.workers,
            pin_memory=self.gpu,
            collate_fn=crops.collate,
        )
        batches = iter(loader)
        if self.workers:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises in the midst of a step
        for _ in steps:
            try:
                batch = next(batches)
            except Exception as error:
                if not isinstance(error, self.failures) and "DataLoader worker" not in str(error):
                    raise  # a bug
                words = str(error).strip().splitlines()[-1]  # a worker's traceback stands before
                reason = words.removeprefix("data.DataError: ")
                raise RunError(f"images could not be loaded: {reason}") from None
            self.names = batch.names
            yield batch._replace(
                degraded=batch.degraded.to(self.device, non_blocking=True),
                gt=batch.gt.to(self.device, non_blocking=True),
            )

    def descend(self, optimizers, loss, max_norm=math.inf):
        """One step of the optimizers on gradients averaged over the processes, unless the loss or
        the gradient is not finite. max_norm: the norm that gradients are reduced to.

        The state is that of no whole step until `update`. Returns {name: number}.
        """
        # A process that is gone shows here, where no GPU waits for it.
        self.reason = next(filter(None, gather(self.stop.reason)), None)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        parameters = [p for group in groups for p in group["params"]]
        loss = average_gradients(parameters, loss.detach().float())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if max_norm < math.inf:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        norm, loss = torch.stack([norm, loss]).tolist()  # one wait for a GPU
        is_finite = math.isfinite(norm) and math.isfinite(loss)
        if is_finite:
            self.is_whole = False
            for optimizer in optimizers:
                optimizer.step()
        rates = {group["name"]: group["lr"] for group in groups}
        return {"loss/total": loss, "grad_norm": norm, **rates, "skipped": int(not is_finite)}

    def update(self, optimizers, loss, metrics, max_norm=math.inf):
        """`descend`, and the step is whole: averages the weights, counts, logs `metrics` ({name:
        scalar} of this process), saves, looks at `stop`. Raises RunError when SKIPS_IN_A_ROW steps
        were not finite."""
        state = self.state
        metrics = metrics | self.descend(optimizers, loss, max_norm)
        state.averaged.update_parameters(state.live)
        state.step, state.seen = state.step + 1, state.seen + self.crops
        self.is_whole = True
        self.skipped = self.skipped + 1 if metrics["skipped"] else 0
        self.write(metrics)
        if self.skipped == SKIPS_IN_A_ROW:
            raise RunError(
                f"loss or gradient were not finite {self.skipped} times in a row, "
                f"the last time on {', '.join(self.names)}"
            )
        if self.keep_every and state.step % self.keep_every == 0:
            self.save(f"step-{state.step:06d}.pt")
        if state.step % self.save_every == 0:
            self.save("last.pt")
        if self.reason:
            raise Stopped(self.reason)
        self.start_clock()

    def write(self, metrics):
        """The metrics of all processes, into the log and the progress bar."""
        tensors = {name: v.detach().float() for name, v in metrics.items() if torch.is_tensor(v)}
        metrics |= zip(tensors, torch.stack([*tensors.values()]).tolist() if tensors else [])
        metrics = merge(gather(metrics))
        metrics["step_time"] = time.perf_counter() - self.begun
        self.log.write(self.state.step, metrics)
        shown = {label: metrics[name] for label, name in self.shown.items() if name in metrics}
        self.bar.set_postfix({label: f"{v:.4f}" for label, v in shown.items()}, refresh=False)
        self.bar.update()
        if self.state.seen >= self.state.total:
            self.bar.close()

    def tell(self, metrics, words):
        """What a validation found: {name: number} for TensorBoard, words for the progress bar."""
        self.log.show(self.state.step, metrics)
        self.bar.set_description_str(words)
        self.start_clock()

    def save(self, name):
        save_checkpoint(self.folder / name, self.state.checkpoint())


# -------------------------------------------------------------------------------- files of a run


def write_atomic(path, content):
    """Writes bytes, or pieces of them, so that a kill or a full disk leaves the previous file
    intact."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        said = f"{path} could not be written ({error.strerror})"
        raise RunError(f"{said}; what was there before is intact") from None


def save_checkpoint(path, state):
    """Writes a checkpoint; the first process does."""
    if rank() == 0:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(path, buffer.getvalue())


def save_json(path, value):
    """Writes JSON; the first process does."""
    if rank() == 0:
        write_atomic(path, json.dumps(value, indent=1).encode())


def load_json(path):
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise RunError(f"{path} is not JSON ({error})") from None


def refuse_existing(path):
    """Raises RunError if a run folder has something in it already, other than the log of a judge
    that could not start."""
    path = Path(path)
    harmless = re.compile(r"judge(-\d+)?\.log|.*\.tmp")
    there = not path.is_dir() or any(not harmless.fullmatch(f.name) for f in path.iterdir())
    if path.exists() and there:
        raise RunError(f"{path} exists: continue it with --resume {path}, or choose another --out")


class Log:
    """metrics.jsonl and TensorBoard, one row a step; the first process writes. A resumed run drops
    what was logged after its checkpoint."""

    def __init__(self, folder, step=0):
        self.path, self.file = Path(folder) / "metrics.jsonl", None
        if rank():
            return
        from torch.utils.tensorboard import SummaryWriter  # late: it is slow to load

        kept = (row for row in read_metrics(folder) if row["step"] <= step)
        write_atomic(self.path, (json.dumps(row).encode() + b"\n" for row in kept))
        self.file = open(self.path, "a")  # noqa: SIM115 (it stays open)
        self.board = SummaryWriter(folder, purge_step=step + 1 if step else None)

    def write(self, step, metrics):
        """A row. Of a skipped step some metrics are not finite: they are left out."""
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        try:
            if self.file:
                self.file.write(json.dumps({"step": step, **metrics}) + "\n")
                self.file.flush()
            self.show(step, metrics)
        except OSError as error:
            raise RunError(f"the log {self.path} could not be written ({error.strerror})") from None

    def show(self, step, metrics):
        """Writes to TensorBoard alone."""
        for name, value in metrics.items() if self.file else ():
            self.board.add_scalar(name, value, step)

    def close(self):
        if self.file:
            self.file.close()
            self.board.close()


def read_metrics(folder):
    """Yields the rows of metrics.jsonl, if it is there; a last line that a kill cut short is left
    out."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return
    with open(path) as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return
