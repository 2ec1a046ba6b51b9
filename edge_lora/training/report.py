"""What a training run did: its curves and its best step."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from edge_lora.errors import UnsupportedError


@dataclass
class TrainReport:
    """The curves of one run, also across resumes.

    Attributes:
        steps: Optimizer steps, from 1.
        losses: Mean training loss of each step.
        validation_steps: Steps after which validation ran.
        validation_losses: Its mean loss.
        best_step: Step of the lowest validation loss; the attachment ends with that state. None
            without validation.
        seconds: Wall time of all sessions of the run.
        resumed_from: Step that this session started from; 0 for a fresh start.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    best_step: int | None = None
    seconds: float = 0.0
    resumed_from: int = 0

    @property
    def best_validation_loss(self) -> float | None:
        """Lowest validation loss so far."""
        return min(self.validation_losses, default=None)

    def to_json(self) -> str:
        """Return all fields as JSON."""
        return json.dumps(asdict(self), indent=2)

    def save_plot(self, path: str | Path) -> Path:
        """Draw the curves into an image file; needs matplotlib.

        Raises:
            UnsupportedError: If matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise UnsupportedError(
                "plots need matplotlib. Install it with: pip install 'edge-lora[plot]'"
            ) from error
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.steps, self.losses, label="training", linewidth=1)
        if self.validation_steps:
            axes.plot(self.validation_steps, self.validation_losses, "o-", label="validation")
        if self.best_step is not None:
            axes.axvline(self.best_step, linestyle=":", color="gray", label="best")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.legend()
        figure.savefig(Path(path), dpi=120)
        return Path(path)
