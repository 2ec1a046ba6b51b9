"""The training loop: accelerate does devices, precision, accumulation, processes; we the rest.

The rest is: step hooks, schedules, validation with the best state kept, the curves, and
checkpoints that resume exactly (on CPU to the bit).
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device
from torch import Tensor, nn

from edge_lora.errors import EdgeLoraError, UnknownNameError, UnsupportedError, unknown_name
from edge_lora.methods.attached import Attached
from edge_lora.methods.calibration import Batch, LossFunction, model_loss
from edge_lora.training.checkpoint import (
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from edge_lora.training.report import TrainReport

_log = logging.getLogger(__name__)

Schedule = Literal["linear", "cosine", "constant"]
_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "constant": lambda _: 1.0,
}


@dataclass(frozen=True)
class _Plan:
    """What a run was asked to do; a checkpoint resumes only under an equal plan."""

    method: str
    steps: int
    lr: float
    weight_decay: float
    schedule: str
    warmup_steps: int
    gradient_accumulation: int
    max_grad_norm: float | None
    mixed_precision: str
    validate_every: int
    seed: int


class _Trainee(nn.Module):
    """Model and adapter as one module, so that every process group and device move sees both."""

    def __init__(self, attached: Attached, loss: LossFunction) -> None:
        super().__init__()
        self.model = attached.model
        self.trained = attached.trained
        self._loss = loss

    def forward(self, batch: Batch) -> Tensor:
        return self._loss(self.model, batch)

    def set_training(self, training: bool) -> None:
        """Switch dropout on or off; BatchNorm keeps the base's statistics in either case."""
        self.train(training)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


class _Stream:
    """An endless stream of batches that knows its place: (epoch, batches taken in it)."""

    def __init__(self, batches: Iterable[Batch], rank: int = 0, world: int = 1) -> None:
        self._batches = batches
        self._rank, self._world = rank, world
        self.epoch, self.taken = 0, 0
        self._iterator: Iterator[Batch] | None = None

    def seek(self, epoch: int, taken: int) -> None:
        """Go to a place that an equal stream reported."""
        self.epoch, self.taken = epoch, taken
        self._iterator = islice(self._open(), taken, None)

    def _open(self) -> Iterator[Batch]:
        set_epoch = getattr(self._batches, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self.epoch)
        return islice(iter(self._batches), self._rank, None, self._world)

    def take(self) -> Batch:
        """Return the next batch; starts the next epoch where one ends."""
        if self._iterator is None:
            self._iterator = self._open()
        for batch in self._iterator:
            self.taken += 1
            return batch
        if self.taken == 0:
            raise EdgeLoraError(
                "batches is empty, or an iterator that is used up. "
                "Pass a list or another re-iterable"
            )
        self.epoch, self.taken, self._iterator = self.epoch + 1, 0, None
        return self.take()


def train(
    attached: Attached,
    batches: Iterable[Batch],
    *,
    steps: int,
    lr: float,
    weight_decay: float = 0.0,
    schedule: Schedule = "linear",
    warmup_steps: int = 0,
    gradient_accumulation: int = 1,
    max_grad_norm: float | None = None,
    mixed_precision: Literal["no", "bf16", "fp16"] = "no",
    loss: LossFunction = model_loss,
    validation: Sequence[Batch] | None = None,
    validate_every: int | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 100,
    resume: bool = True,
    seed: int = 0,
    cpu: bool = False,
    progress: bool = True,
    stop_after: int | None = None,
) -> TrainReport:
    """Train what ``attached`` has attached, with AdamW.

    Args:
        attached: From ``edge_lora.methods.attach``. Model and adapter are moved to accelerate's
            device.
        batches: Re-iterable of batches (a list, ``TextBatches``, a DataLoader); starts over when
            exhausted. ``set_epoch`` is called on it where it exists. Several processes take turns.
        steps: Optimizer steps of the whole run.
        lr: Peak learning rate.
        weight_decay: AdamW's decoupled decay; it moves SHiRA's masked-out weights with
            ``trainer="masked"``.
        schedule: Decay to 0 after the warm-up, or constant.
        warmup_steps: Steps of linear warm-up.
        gradient_accumulation: Batches per optimizer step.
        max_grad_norm: Clip the global gradient norm to this.
        mixed_precision: Autocast, as accelerate spells it.
        loss: Loss of (model, batch); by default ``model(**batch).loss``.
        validation: Held-out batches. With them, the state of the lowest loss is kept.
        validate_every: Steps between validations; by default a tenth of the run. The last step
            always is.
        checkpoint_dir: Folder for the checkpoint; None keeps none.
        checkpoint_every: Steps between checkpoints.
        resume: Go on from the checkpoint in ``checkpoint_dir`` if there is one.
        seed: Of dropout and other randomness while training.
        cpu: Stay on the CPU even where there is a GPU.
        progress: Show a bar on stderr, if that is a terminal.
        stop_after: End this session after so many steps, with a checkpoint: for limited time slots.

    Returns:
        The curves of the whole run, earlier sessions included.

    Raises:
        UnknownNameError: Unknown schedule.
        UnsupportedError: Impossible numbers, a loss that is NaN, or a checkpoint of another run.
    """
    if schedule not in _DECAYS:
        raise UnknownNameError(unknown_name("schedule", schedule, list(_DECAYS)))
    if steps < 1 or gradient_accumulation < 1 or checkpoint_every < 1 or not lr > 0:
        raise UnsupportedError(
            "steps, gradient_accumulation and checkpoint_every must be at least 1 and lr above 0"
        )
    plan = _Plan(
        attached.method, steps, lr, weight_decay, schedule, warmup_steps, gradient_accumulation,
        max_grad_norm, mixed_precision, validate_every or max(1, steps // 10), seed,
    )  # fmt: skip
    with _accelerator(plan, cpu) as accelerator:
        run = _Run(attached, plan, batches, validation, loss, accelerator)
        if checkpoint_dir is not None and resume:
            run.resume(Path(checkpoint_dir))
        run.go(
            None if checkpoint_dir is None else Path(checkpoint_dir),
            checkpoint_every,
            steps if stop_after is None else min(steps, run.step + stop_after),
            progress and accelerator.is_main_process,
        )
    return run.report


class _accelerator(AbstractContextManager[Accelerator]):  # noqa: N801
    """An Accelerator whose precision does not stick to the process."""

    def __init__(self, plan: _Plan, cpu: bool) -> None:
        AcceleratorState._reset_state()
        self._accelerator = Accelerator(
            gradient_accumulation_steps=plan.gradient_accumulation,
            mixed_precision=plan.mixed_precision,
            cpu=cpu,
        )

    def __enter__(self) -> Accelerator:
        return self._accelerator

    def __exit__(self, *_: object) -> None:
        self._accelerator.free_memory()
        AcceleratorState._reset_state()


class _Run:
    """The moving parts of one run."""

    def __init__(
        self,
        attached: Attached,
        plan: _Plan,
        batches: Iterable[Batch],
        validation: Sequence[Batch] | None,
        loss: LossFunction,
        accelerator: Accelerator,
    ) -> None:
        torch.manual_seed(plan.seed)
        self.attached, self.plan, self.validation = attached, plan, validation
        self.accelerator = accelerator
        self.report = TrainReport()
        self.step = 0
        self.best: dict[str, Tensor] | None = None
        trainee = _Trainee(attached, loss)
        self.trainee = accelerator.prepare(trainee)
        optimizer = torch.optim.AdamW(
            list(attached.parameters()), lr=plan.lr, weight_decay=plan.weight_decay
        )
        # In this order: with a gradient scaler, accelerate wraps the step that the scheduler marks.
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        self.optimizer = accelerator.prepare(optimizer)
        self.stream = _Stream(batches, accelerator.process_index, accelerator.num_processes)

    def _lr_factor(self, step: int) -> float:
        warmup, steps = self.plan.warmup_steps, self.plan.steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return _DECAYS[self.plan.schedule]((step - warmup) / max(1, steps - warmup))

    def go(self, folder: Path | None, checkpoint_every: int, end: int, progress: bool) -> None:
        """Train to step ``end``."""
        was_training = self.attached.model.training
        started = time.monotonic() - self.report.seconds
        try:
            with _progress_bar(self.plan.steps, progress) as show:
                while self.step < end:
                    self._one_step()
                    if self._is_time_to_validate():
                        self._validate()
                    self.report.seconds = time.monotonic() - started
                    if folder is not None and (
                        self.step % checkpoint_every == 0 or self.step == end
                    ):
                        self._save(folder)
                    show(self.step, self.report)
        finally:
            self.attached.model.train(was_training)
        if self.best is not None and self.step == self.plan.steps:
            self.attached.load_state_dict(self.best)

    def _one_step(self) -> None:
        self._unwrapped().set_training(True)
        self.attached.before_step(self.step)
        losses = []
        for _ in range(self.plan.gradient_accumulation):
            batch = send_to_device(self.stream.take(), self.accelerator.device)
            with self.accelerator.accumulate(self.trainee):
                loss = self.trainee(batch)
                losses.append(loss.detach())
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and self.plan.max_grad_norm is not None:
                    self.accelerator.clip_grad_norm_(
                        list(self.attached.parameters()), self.plan.max_grad_norm
                    )
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.scheduler.step()
        self.attached.after_step(self.step)
        self.step += 1
        mean = self.accelerator.reduce(torch.stack(losses).float().mean(), "mean").item()
        if not math.isfinite(mean):
            raise UnsupportedError(
                f"the loss is {mean} at step {self.step}. Lower the learning rate"
            )
        self.report.steps.append(self.step)
        self.report.losses.append(mean)

    def _unwrapped(self) -> _Trainee:
        trainee: _Trainee = self.accelerator.unwrap_model(self.trainee)
        return trainee

    def _is_time_to_validate(self) -> bool:
        if not self.validation:
            return False
        return self.step % self.plan.validate_every == 0 or self.step == self.plan.steps

    @torch.no_grad()
    def _validate(self) -> None:
        self._unwrapped().set_training(False)
        losses = [
            self.trainee(send_to_device(batch, self.accelerator.device)).float()
            for batch in self.validation or ()
        ]
        mean = torch.stack(losses).mean().item()
        best = self.report.best_validation_loss
        self.report.validation_steps.append(self.step)
        self.report.validation_losses.append(mean)
        if best is None or mean < best:
            self.report.best_step = self.step
            self.best = self.attached.state_dict()

    def _save(self, folder: Path) -> None:
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        path = save_checkpoint(
            folder,
            {
                "run": asdict(self.plan),
                "step": self.step,
                "attached": self.attached.state_dict(),
                "best": self.best,
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "random": random_state(),
                "stream": (self.stream.epoch, self.stream.taken),
                "report": asdict(self.report),
            },
        )
        _log.info("step %d: checkpoint %s", self.step, path)

    def resume(self, folder: Path) -> None:
        """Go to the place where the checkpoint in ``folder`` was written, if there is one."""
        state = load_checkpoint(folder, asdict(self.plan))
        if state is None:
            return
        self.attached.load_state_dict(state["attached"])
        self.best = state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.stream.seek(*state["stream"])
        self.report = TrainReport(**{**state["report"], "resumed_from": self.step})
        set_random_state(state["random"])
        _log.info("resumed at step %d from %s", self.step, folder)


class _progress_bar(AbstractContextManager[Callable[[int, TrainReport], None]]):  # noqa: N801
    """A bar on stderr with the loss; nothing at all where stderr is not a terminal."""

    def __init__(self, steps: int, wanted: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._bar: Any = nullcontext()
        self._task: Any = None
        if wanted and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("training", total=steps)

    def __enter__(self) -> Callable[[int, TrainReport], None]:
        self._bar.__enter__()
        return self._show

    def _show(self, step: int, report: TrainReport) -> None:
        if self._task is None:
            return
        text = f"step {step}  loss {report.losses[-1]:.4f}"
        if report.validation_losses:
            text += f"  validation {report.validation_losses[-1]:.4f}"
        self._bar.update(self._task, completed=step, description=text)

    def __exit__(self, *details: Any) -> None:  # noqa: ANN401
        self._bar.__exit__(*details)
