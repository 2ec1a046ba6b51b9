"""Nested ranks, row scales and bottlenecks that no reader may trust."""

import numpy as np
from hostile_files import FLOATS, adapter, low_rank_head, low_rank_tensors, sparse_head


def ones(*shape):
    return ("F32", list(shape), np.ones(shape, np.float32).tobytes())


def nested(ranks=(1, 2, 4), rank_scale=(4.0, 2.0, 1)):
    """Return a low-rank form of rank 4 that works at smaller ranks too."""
    head = low_rank_head(ranks=list(ranks), rank_scale=list(rank_scale))
    return adapter([head], {"w/0/A": ones(4, 3), "w/0/Bt": ones(4, 2)})


def row_scale(axis="row", tensor=None, **changes):
    head = {"form": "row_scale", "scale": 0.5, "axis": axis, **changes}
    head = {k: v for k, v in head.items() if v is not None}
    return adapter([head], {"w/0/val": tensor or ones(2)})


def bottleneck(tensors=None, **changes):
    """Return a bottleneck of rank 2 at a site of 2 outputs and 3 inputs."""
    head = {"form": "bottleneck", "scale": 1.0, "act": "relu", "placement": "parallel", **changes}
    tensors = {"down": ones(2, 3), "up": ones(2, 2), **(tensors or {})}
    return adapter(
        [{k: v for k, v in head.items() if v is not None}],
        {f"w/0/{k}": v for k, v in tensors.items() if v is not None},
    )


SOUND = {
    "nested ranks": nested(),
    "only the whole rank": nested((4,), (1.0,)),
    "nested ranks, empty": nested((), ()),
    "row scale": row_scale(),
    "column scale": row_scale("col", ones(3)),
    "row scale beside low rank": adapter(
        [low_rank_head(), {"form": "row_scale", "scale": 1, "axis": "row"}],
        {**low_rank_tensors(), "w/1/val": ones(2)},
    ),
    "row scale with a mode, which it has not": row_scale(mode="set"),
    "bottleneck": bottleneck(),
    "sequential bottleneck": bottleneck({"down": ones(2, 2)}, placement="sequential"),
    "bottleneck with biases": bottleneck({"down_b": ones(2), "up_b": ones(2)}, act="gelu_tanh"),
    "bottleneck with one bias": bottleneck({"up_b": ones(2)}, act="none"),
    "two bottlenecks": adapter(
        [{"form": "bottleneck", "scale": 1, "act": "gelu", "placement": "parallel"}] * 2,
        {f"w/{i}/{k}": ones(*s) for i in (0, 1) for k, s in (("down", (1, 3)), ("up", (2, 1)))},
    ),
}

HOSTILE = {
    "ranks descending": nested((2, 1, 4)),
    "ranks repeated": nested((2, 2, 4)),
    "ranks from 0": nested((0, 2, 4)),
    "ranks that end early": nested((1, 2, 3)),
    "ranks beyond the rank": nested((1, 4, 8)),
    "ranks of 2^64": nested((1, 2, 2**64 + 4)),
    "ranks of 2^32 and 4": nested((1, 2, 2**32 + 4)),
    "ranks negative": nested((-1, 2, 4)),
    "ranks of floats": nested((1.0, 2.0, 4.0)),
    "ranks of text": nested(("1", "2", "4")),
    "ranks true": nested((True, 2, 4)),
    "ranks a number": adapter([low_rank_head(ranks=1, rank_scale=[1.0])], low_rank_tensors()),
    "ranks an object": adapter(
        [low_rank_head(ranks={"1": 1}, rank_scale=[1.0])], low_rank_tensors()
    ),
    "ranks null": adapter([low_rank_head(ranks=None)], low_rank_tensors()),
    "rank scale missing": adapter([low_rank_head(ranks=[1])], low_rank_tensors()),
    "rank scale without ranks": adapter([low_rank_head(rank_scale=[1.0])], low_rank_tensors()),
    "rank scales too few": nested(rank_scale=(4.0, 2.0)),
    "rank scales too many": nested(rank_scale=(4.0, 2.0, 1.0, 1.0)),
    "rank scales of text": nested(rank_scale=("4", "2", "1")),
    "rank scales true": nested(rank_scale=(True, True, True)),
    "rank scales null": nested(rank_scale=(None, 2.0, 1.0)),
    "rank scale a number": adapter([low_rank_head(ranks=[1], rank_scale=1.0)], low_rank_tensors()),
    "row scale of columns": row_scale("col"),
    "column scale of rows": row_scale("row", ones(3)),
    "row scale of two axes": row_scale("row", ones(2, 1)),
    "row scale of the whole": row_scale("row", ones(2, 3)),
    "row scale without axis": row_scale(None),
    "row scale of unknown axis": row_scale("diagonal"),
    "row scale of NaN": row_scale("row", ("F32", [2], b"\xff" * 8)),
    "row scale under a wrong name": adapter(
        [{"form": "row_scale", "scale": 1.0, "axis": "row"}], {"w/0/values": ones(2)}
    ),
    "row scale beside one that replaces": adapter(
        [{"form": "row_scale", "scale": 1.0, "axis": "row"}, sparse_head(mode="set")],
        {"w/0/val": ones(2), "w/1/idx": ("U8", [2], b"\x01\x03"), "w/1/val": ones(2)},
    ),
    "bottleneck of rank 0": bottleneck({"down": ones(0, 3), "up": ones(2, 0)}),
    "bottleneck, ranks differ": bottleneck({"up": ones(2, 3)}),
    "bottleneck, down transposed": bottleneck({"down": ones(3, 2)}),
    "bottleneck, down of one axis": bottleneck({"down": ones(6)}),
    "bottleneck, up of one axis": bottleneck({"up": ones(4)}),
    "bottleneck, down without axes": bottleneck({"down": ("F32", [], FLOATS[:4])}),
    "bottleneck, down missing": bottleneck({"down": None}),
    "bottleneck, up missing": bottleneck({"up": None}),
    "bottleneck, sequential with the width of the input": bottleneck(placement="sequential"),
    "bottleneck, down bias too long": bottleneck({"down_b": ones(3)}),
    "bottleneck, up bias too long": bottleneck({"up_b": ones(3)}),
    "bottleneck, bias of two axes": bottleneck({"up_b": ones(1, 2)}),
    "bottleneck, unknown bias": bottleneck({"bias": ones(2)}),
    "bottleneck, NaN": bottleneck({"up": ("F32", [2, 2], b"\xff" * 16)}),
    "bottleneck, bias infinite": bottleneck({"up_b": ("F16", [2], b"\x00\x7c" * 2)}),
    "bottleneck, unknown activation": bottleneck(act="silu"),
    "bottleneck, no activation": bottleneck(act=None),
    "bottleneck, unknown placement": bottleneck(placement="before"),
    "bottleneck, no placement": bottleneck(placement=None),
    "bottleneck, encoded bias that is not there": bottleneck(enc={"up_b": [0, 2]}),
    "bottleneck beside a weight's form": adapter(
        [
            {"form": "bottleneck", "scale": 1.0, "act": "none", "placement": "parallel"},
            low_rank_head(),
        ],
        {
            "w/0/down": ones(1, 3),
            "w/0/up": ones(2, 1),
            **{k.replace("/0/", "/1/"): v for k, v in low_rank_tensors().items()},
        },
    ),
}
