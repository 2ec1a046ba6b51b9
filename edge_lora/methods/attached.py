"""A model with a method attached: what is trained, how it becomes an adapter, how it comes off."""

import platform
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

import edge_lora
from edge_lora.adapter import Adapter, BaseIdentity, Delta
from edge_lora.codebook import Coded
from edge_lora.errors import EdgeLoraError, UnsupportedError, list_all
from edge_lora.forms import VALUE_DTYPES, Form, values_of
from edge_lora.slots import SlotKind, SlotTable

Config = Any
"""A method's own frozen dataclass."""


class Trained(nn.Module):
    """What a method added to a model: trainable parameters, masks and hooks.

    It is a module, so that parameters, device moves and state come from torch. A method subclasses
    it, installs itself in ``__init__`` and takes itself out in ``restore``.
    """

    def forms(self) -> dict[str, list[Form]]:
        """Return the fp32 forms of every adapted slot by name: the method's one duty."""
        raise NotImplementedError

    def restore(self) -> None:
        """Make the model the untouched base again, to the bit."""
        raise NotImplementedError

    def parameter_count(self) -> int:
        """Return how many numbers are free to move."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def before_step(self, step: int) -> None:
        """Run before the forward passes of optimizer step ``step`` (from 0)."""

    def after_step(self, step: int) -> None:
        """Run after optimizer step ``step``."""


class Method(Protocol):
    """A training method: a config dataclass and a way onto a model.

    Attributes:
        config_class: Frozen dataclass; its fields are the keywords of
            ``edge_lora.methods.attach``. A field with ``metadata={"recorded": False}`` stays out
            of the adapter's provenance.
        kinds: What sort of slots it can adapt; {"site"} alone: it stands beside modules.
    """

    config_class: ClassVar[type]
    kinds: ClassVar[frozenset[SlotKind]]

    @staticmethod
    def attach(model: nn.Module, slots: Mapping[str, Any], config: Config) -> Trained:
        """Install the method on ``model``, whose parameters are all frozen already.

        ``slots`` are of type SlotWeight, or Site where the method's kind is that.
        """


@dataclass(frozen=True)
class BaseState:
    """What attaching changes besides weights: which parameters train, and BatchNorm's buffers."""

    model: nn.Module
    requires_grad: list[tuple[nn.Parameter, bool]]
    buffers: dict[str, Tensor]

    @classmethod
    def freeze(cls, model: nn.Module) -> "BaseState":
        """Remember the state of ``model``, then freeze all its parameters."""
        state = cls(
            model,
            [(p, p.requires_grad) for p in model.parameters()],
            {name: buffer.detach().clone() for name, buffer in model.named_buffers()},
        )
        model.requires_grad_(False)
        return state

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        for parameter, flag in self.requires_grad:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for name, buffer in self.model.named_buffers():  # by name: a device move makes new tensors
            buffer.copy_(self.buffers[name])


class Attached:
    """A frozen model plus the trainable part that a method added.

    Attributes:
        model: The caller's own model object, adapted in place.
        method: Name of the method.
        config: Its frozen config.
        slots: Slot table of the untouched base.
        trained: The method's part.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str,
        config: Config,
        slots: SlotTable,
        trained: Trained,
        on_detach: Callable[[], None],
    ) -> None:
        self.model = model
        self.method = method
        self.config = config
        self.slots = slots
        self.trained = trained
        self._on_detach: Callable[[], None] | None = on_detach

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the trainable parameters: hand them to any optimizer."""
        return (p for p in self.trained.parameters() if p.requires_grad)

    @property
    def parameter_count(self) -> int:
        """How many numbers are trained."""
        return self.trained.parameter_count()

    def before_step(self, step: int) -> None:
        """Tell the method that optimizer step ``step`` begins."""
        self.trained.before_step(step)

    def after_step(self, step: int) -> None:
        """Tell the method that optimizer step ``step`` is done."""
        self.trained.after_step(step)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of all that training changes (and the masks), for an exact resume."""
        return {key: value.detach().clone() for key, value in self.trained.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the state of an equal attachment; refuses another shape or slot set."""
        own = self.trained.state_dict()
        problems = [f"{key}: missing" for key in own.keys() - state.keys()]
        problems += [f"{key}: not part of this attachment" for key in state.keys() - own.keys()]
        problems += [
            f"{key}: state has {tuple(state[key].shape)}, attachment wants {tuple(own[key].shape)}"
            for key in own.keys() & state.keys()
            if state[key].shape != own[key].shape
        ]
        if problems:
            title = f"state does not fit this {self.method!r} attachment"
            raise UnsupportedError(
                f"{list_all(title, sorted(problems))}\nAttach with the same slots and config first"
            )
        self.trained.load_state_dict(dict(state))

    def lower(self, name: str = "adapter", dtype: str = "F16") -> Adapter:
        """Return what was trained as an adapter; the attachment stays in place.

        Args:
            name: Readable name.
            dtype: "F16" (default: half the bytes, 2⁻¹¹ relative error of the delta), "BF16" or
                "F32" (exact). Values that were trained as codes stay the codes that they are.

        Raises:
            UnsupportedError: Unknown dtype, or values too large for it (or NaN) after training.
            EdgeLoraError: If detached already.
        """
        self._require_attached()
        if dtype not in VALUE_DTYPES:
            raise UnsupportedError(f"value dtype {dtype!r} is none of {', '.join(VALUE_DTYPES)}")
        deltas: dict[str, Delta] = {}
        problems: list[str] = []
        for slot_name, forms in self.trained.forms().items():
            slot = self.slots[slot_name]
            rounded = tuple(_with_dtype(form, VALUE_DTYPES[dtype]) for form in forms)
            if not all(_is_finite(form) for form in rounded):
                problems.append(slot_name)
            deltas[slot.name] = Delta(slot.shape, slot.dtype, rounded, slot.slot_hash)
        if problems:
            raise UnsupportedError(
                f"{list_all(f'values are not finite in {dtype}', problems)}\n"
                "Training diverged, or the values need dtype='F32'"
            )
        base = BaseIdentity(self.slots.fingerprint, self.slots.base_id)
        return Adapter(name, self.method, base, deltas, provenance=self._provenance())

    def detach(self) -> nn.Module:
        """Take the method off and return the model: the same module objects, the base to the bit.

        ``lower`` before detaching.
        """
        self._require_attached()()
        self._on_detach = None
        return self.model

    def _require_attached(self) -> Callable[[], None]:
        if self._on_detach is None:
            raise EdgeLoraError(f"this {self.method!r} attachment is already detached")
        return self._on_detach

    def _provenance(self) -> dict[str, Any]:
        recorded = {
            f.name: getattr(self.config, f.name)
            for f in fields(self.config)
            if f.metadata.get("recorded", True)
        }
        versions = {"edge_lora": edge_lora.__version__, "torch": str(torch.__version__)}
        return {
            "config": recorded,
            "parameters": self.parameter_count,
            "versions": {**versions, "python": platform.python_version()},
        }


def _with_dtype(form: Form, dtype: np.dtype) -> Form:
    with np.errstate(over="ignore"):  # an overflow is reported by name, for all slots at once
        rounded: dict[str, Any] = {
            name: values.astype(dtype)
            for name, values in values_of(form).items()
            if not isinstance(values, Coded)
        }
    return replace(form, **rounded)


def _is_finite(form: Form) -> bool:
    numbers = [v.stats if isinstance(v, Coded) else v for v in values_of(form).values()]
    return all(bool(np.isfinite(array.astype(np.float32)).all()) for array in numbers)


def module_key(slot_name: str) -> str:
    """Return a slot's name as a key of ``nn.ModuleDict``, which takes no dots."""
    return slot_name.replace(".", "/")


def slot_seed(seed: int, slot_name: str) -> int:
    """Return a seed of its own for every slot, so that no two slots share a mask or an init."""
    return random.Random(f"{seed}/{slot_name}").getrandbits(
        63
    )  # sha512 of the text, on any machine
