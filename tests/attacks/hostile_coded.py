"""Files whose values are codes: books, statistics and encodings that no reader may trust."""

import numpy as np
from hostile_files import FLOATS, adapter, dense_head, low_rank_head, sparse_head

NAN, INF = float("nan"), float("inf")
CODES = b"\x2a"  # six codes of one bit


def blob_of(stats=((0.0, 1.0),), codes=CODES):
    return np.array(stats, "<f4").tobytes() + codes


def book_of(levels=(-1.0, 1.0), group="tensor"):
    return {"book": list(levels), "group": group}


def coded(blob=None, enc=(0, 2, 3), books=None, tensor=("U8",), **changes):
    """Return a coded dense form of a (2, 3) slot, sound unless an argument makes it otherwise."""
    blob = blob_of() if blob is None else blob
    encodings = {"val": list(enc)} if isinstance(enc, tuple) else enc
    dtype, *shape = tensor
    return adapter(
        [dense_head(enc=encodings)],
        {"w/0/val": (dtype, shape[0] if shape else [len(blob)], blob)},
        codebooks=[book_of()] if books is None else books,
        **changes,
    )


def grouped(group, groups, codes=CODES, levels=(-1.0, 1.0)):
    return coded(blob_of([(0.5, 2.0)] * groups, codes), books=[book_of(levels, group)])


def levels_of(bits):
    return np.linspace(-2, 2, 2**bits).tolist()


SOUND = {
    "coded, 1 bit": coded(),
    "coded, 2 bits": grouped("tensor", 1, b"\x1b\x06", levels_of(2)),
    "coded, 4 bits": grouped("tensor", 1, b"\x10\x32\xfe", levels_of(4)),
    "coded, 8 bits": grouped("tensor", 1, bytes([0, 1, 2, 127, 254, 255]), levels_of(8)),
    "coded by rows": grouped("row", 2),
    "coded in groups of 4, the last one short": grouped(4, 2),
    "coded in groups of 1": grouped(1, 6),
    "coded in a group of more than there are": grouped(2**32 - 1, 1),
    "spread 0 and minus 0": coded(blob_of([(1.0, 0.0), (1.0, -0.0)]), books=[book_of(group="row")]),
    "the largest level that is finite": coded(blob_of([(0.0, 3.4e38)])),
    "a book that nothing uses": coded(books=[book_of(), book_of(levels_of(2), 3)]),
    "a book of whole numbers": coded(books=[book_of((-1, 1))]),
    "unknown key in a codebook": coded(books=[{**book_of(), "name": "x"}]),
    "no encodings": adapter(
        [dense_head(enc={})], {"w/0/val": ("F32", [2, 3], FLOATS)}, codebooks=[]
    ),
    "coded factors": adapter(
        [low_rank_head(enc={"A": [0, 1, 3], "Bt": [0, 1, 2]})],
        {
            "w/0/A": ("U8", [9], blob_of(codes=b"\x05")),
            "w/0/Bt": ("U8", [9], blob_of(codes=b"\x01")),
        },
        codebooks=[book_of()],
    ),
    "one factor coded": adapter(
        [low_rank_head(enc={"A": [0, 1, 3]})],
        {"w/0/A": ("U8", [9], blob_of(codes=b"\x05")), "w/0/Bt": ("F32", [1, 2], FLOATS[:8])},
        codebooks=[book_of()],
    ),
    "no coded entries": adapter(
        [sparse_head(k=0, enc={"val": [0, 0]})],
        {"w/0/idx": ("U8", [0], b""), "w/0/val": ("U8", [0], b"")},
        codebooks=[book_of()],
    ),
    "a coded number": adapter(
        slots={
            "w": {"shape": [], "dtype": "F32", "forms": [dense_head(enc={"val": [0]})]},
        },
        tensors={"w/0/val": ("U8", [9], blob_of(codes=b"\x01"))},
        codebooks=[book_of()],
    ),
}

HOSTILE = {
    "a byte too few": coded(blob_of(codes=b"")),
    "a byte too many": coded(blob_of(codes=CODES + b"\0")),
    "a size that no float holds": adapter(
        [dense_head(enc={"val": [0, 10**200, 10**200]})],
        {"w/0/val": ("U8", [9], blob_of())},
        codebooks=[book_of(group=1)],
    ),
    "a rank over 65536": adapter(
        slots={
            "w": {
                "shape": [1, 1],
                "forms": [low_rank_head(enc={"A": [0, 65537, 1], "Bt": [0, 65537, 1]})],
            }
        },
        tensors={f"w/0/{key}": ("U8", [8201], blob_of(codes=bytes(8193))) for key in ("A", "Bt")},
        codebooks=[book_of()],
    ),
    "no statistics": coded(CODES),
    "half a mean": coded(b"\0\0"),
    "nothing": coded(b""),
    "padding bit set": coded(blob_of(codes=b"\x6a")),
    "highest padding bit set": coded(blob_of(codes=b"\xaa")),
    "a group too few": coded(blob_of([(0.0, 1.0)]), books=[book_of(group="row")]),
    "a group too many": coded(blob_of([(0.0, 1.0)] * 3), books=[book_of(group="row")]),
    "mean NaN": coded(blob_of([(NAN, 1.0)])),
    "mean infinite": coded(blob_of([(-INF, 1.0)])),
    "spread NaN": coded(blob_of([(0.0, NAN)])),
    "spread infinite": coded(blob_of([(0.0, INF)])),
    "spread negative": coded(blob_of([(0.0, -1e-30)])),
    "last spread negative": coded(blob_of([(0, 1), (0, -1)]), books=[book_of(group="row")]),
    "a level that overflows": coded(blob_of([(3e38, 3e38)])),
    "a product that overflows": coded(blob_of([(0.0, 3e38)]), books=[book_of((-1.0, 2.0))]),
    "bits 0: one level": coded(books=[book_of((0.0,))]),
    "bits 1.58: three levels": coded(books=[book_of((-1.0, 0.0, 1.0))]),
    "bits 3: eight levels": coded(books=[book_of(levels_of(3))]),
    "257 levels": coded(books=[book_of(np.arange(257.0))]),
    "no levels": coded(books=[book_of(())]),
    "bad book that nothing uses": coded(books=[book_of(), book_of((1.0,))]),
    "book descending": coded(books=[book_of((1.0, -1.0))]),
    "book with equal levels": coded(books=[book_of((1.0, 1.0))]),
    "book with levels equal in fp32": coded(books=[book_of((1.0, 1.0 + 1e-12))]),
    "book with plus and minus zero": coded(books=[book_of((-0.0, 0.0))]),
    "book beyond fp32": coded(books=[book_of((-1.0, 1e39))]),
    "book of text": coded(books=[book_of(("-1", "1"))]),
    "book of true and false": coded(books=[book_of((False, True))]),
    "book of null": coded(books=[book_of((None, 1.0))]),
    "book nested": coded(books=[book_of(([-1.0], [1.0]))]),
    "book missing": coded(books=[{"group": "tensor"}]),
    "book a number": coded(books=[{"book": 1, "group": "tensor"}]),
    "group missing": coded(books=[{"book": [-1.0, 1.0]}]),
    "group 0": coded(books=[book_of(group=0)]),
    "group 0 that nothing uses": coded(books=[book_of(), book_of(group=0)]),
    "group negative": coded(books=[book_of(group=-1)]),
    "group 2^32": coded(books=[book_of(group=2**32)]),
    "group 2^64": coded(books=[book_of(group=2**64)]),
    "group a float": coded(books=[book_of(group=3.0)]),
    "group true": coded(books=[book_of(group=True)]),
    "group null": coded(books=[book_of(group=None)]),
    "group unknown": coded(books=[book_of(group="col")]),
    "codebooks an object": coded(books={"0": book_of()}),
    "codebooks null": coded(books=[None]),
    "codebook a list": coded(books=[[-1.0, 1.0]]),
    "codebooks missing": adapter(
        [dense_head(enc={"val": [0, 2, 3]})], {"w/0/val": ("U8", [9], blob_of())}
    ),
    "codebook out of range": coded(enc=(1, 2, 3)),
    "codebook 2^70": coded(enc=(2**70, 2, 3)),
    "codebook negative": coded(enc=(-1, 2, 3)),
    "codebook a float": coded(enc=(0.0, 2, 3)),
    "codebook true": coded(books=[book_of(), book_of()], enc=(True, 2, 3)),
    "enc a list": coded(enc=[[0, 2, 3]]),
    "enc null": coded(enc=None),
    "enc text": coded(enc="val"),
    "encoding null": coded(enc={"val": None}),
    "encoding a number": coded(enc={"val": 0}),
    "encoding an object": coded(enc={"val": {"0": 2}}),
    "encoding empty": coded(enc=()),
    "encoding of ten numbers": coded(enc=(0, 2, 3, 1, 1, 1, 1, 1, 1, 1)),
    "shape transposed": coded(enc=(0, 3, 2)),
    "shape flat": coded(enc=(0, 6)),
    "shape too large": coded(enc=(0, 2, 4)),
    "shape with a zero": coded(enc=(0, 0, 3)),
    "shape negative": coded(enc=(0, -2, -3)),
    "shape a float": coded(enc=(0, 2.0, 3)),
    "shape of text": coded(enc=(0, "2", "3")),
    "shape of 2^62 values": coded(enc=(0, 2**31, 2**31)),
    "shape overflows to 6": coded(enc=(0, 2**63, 2, 1, 6)),
    "shape 2^70": coded(enc=(0, 2**70, 3)),
    "shape overflows to nothing": coded(b"", enc=(0, 2**63, 4, 0)),
    "enc for an unknown field": coded(enc={"val": [0, 2, 3], "values": [0, 2, 3]}),
    "enc for the indices": adapter([sparse_head(enc={"idx": [0, 2]})], codebooks=[book_of()]),
    "enc for another form's field": adapter(
        [sparse_head(enc={"A": [0, 2]})], codebooks=[book_of()]
    ),
    "enc for plain values": coded(FLOATS, tensor=("F32", [2, 3])),
    "enc for plain values of as many bytes": coded(blob_of()[:8], tensor=("F16", [4])),
    "codes of two axes": coded(tensor=("U8", [9, 1])),
    "codes of uint32": coded(blob_of(codes=bytes(4)), tensor=("U32", [3])),
    "codes without enc": adapter([dense_head()], {"w/0/val": ("U8", [6], bytes(6))}),
    "more sparse codes than indices": adapter(
        [sparse_head(enc={"val": [0, 3]})],
        {"w/0/idx": ("U8", [2], b"\x01\x03"), "w/0/val": ("U8", [9], blob_of(codes=b"\x01"))},
        codebooks=[book_of()],
    ),
    "sparse codes of two axes": adapter(
        [sparse_head(enc={"val": [0, 2, 1]})],
        {"w/0/idx": ("U8", [2], b"\x01\x03"), "w/0/val": ("U8", [9], blob_of(codes=b"\x01"))},
        codebooks=[book_of()],
    ),
}
