"""The part of the manifest about inputs and outputs: what each is called, its dtype and shape."""

from __future__ import annotations

from dataclasses import dataclass

from edge_lora.bundle_fields import collect, mapping, member, sequence, symbolic_axes, text

_DTYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "bfloat16", "float32", "float64",
)  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of the graph.

    Attributes:
        name: As the graph calls it.
        dtype: NumPy's name, "float32".
        shape: Of each dimension the size, or the name if it is symbolic.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def read_specs(
    value: object, key: str, problems: list[str], where: str = "bundle"
) -> tuple[TensorSpec, ...]:
    """Return the tensors that a stranger's manifest lists; note in ``problems`` what is wrong."""
    records = collect(problems, sequence, value, key, where) or []
    found = [collect(problems, _read_spec, record, key) for record in records]
    return tuple(spec for spec in found if spec is not None)


def _read_spec(value: object, key: str) -> TensorSpec:
    record = mapping(value, "record", key)
    name = text(member(record, "name", key), "name", key)
    where = f"{key}: {name}"
    return TensorSpec(
        name,
        text(member(record, "dtype", where), "dtype", where, _DTYPES),
        symbolic_axes(member(record, "shape", where), "shape", where),
    )
