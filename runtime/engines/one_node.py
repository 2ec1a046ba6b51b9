"""The smallest ONNX models, as bytes, without the ``onnx`` package: one MatMul with a constant.

ONNX files are protocol buffers (https://protobuf.dev/programming-guides/encoding): a message is a
run of (field number, wire type, payload). Only the fields that ONNX Runtime needs are written;
the numbers are those of ``onnx.proto``.
"""

import numpy as np
from numpy.typing import NDArray

_VARINT, _LENGTH = 0, 2
_FLOAT = 1  # TensorProto.DataType


def matmul_model(weight: NDArray[np.float32]) -> bytes:
    """Return a model of one node: ``y`` (m, out) = ``x`` (m, in) @ ``weight`` (in, out)."""
    in_features, out_features = weight.shape
    tensor = (
        _number(1, in_features)
        + _number(1, out_features)
        + _number(2, _FLOAT)
        + _bytes(8, b"w")
        + _bytes(9, np.ascontiguousarray(weight).tobytes())
    )
    node = _bytes(1, b"x") + _bytes(1, b"w") + _bytes(2, b"y") + _bytes(4, b"MatMul")
    graph = (
        _bytes(1, node)
        + _bytes(2, b"one_node")
        + _bytes(5, tensor)
        + _bytes(11, _value(b"x", in_features))
        + _bytes(12, _value(b"y", out_features))
    )
    opset = _bytes(1, b"") + _number(2, 20)
    return _number(1, 10) + _bytes(7, graph) + _bytes(8, opset)


def _value(name: bytes, columns: int) -> bytes:
    rows = _bytes(1, _bytes(2, b"m"))  # dim_param
    shape = rows + _bytes(1, _number(1, columns))  # dim_value
    tensor_type = _number(1, _FLOAT) + _bytes(2, shape)
    return _bytes(1, name) + _bytes(2, _bytes(1, tensor_type))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(value)


def _bytes(field: int, payload: bytes) -> bytes:
    return _varint(field << 3 | _LENGTH) + _varint(len(payload)) + payload


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
