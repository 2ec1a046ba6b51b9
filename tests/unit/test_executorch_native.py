"""The ExecuTorch module: runs equal torch, and packed weights can be found, probed and patched."""

import gc
import hashlib
import mmap
import os
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_lora import native
from edge_lora.errors import BundleError, NativeError, UnsupportedError

module = pytest.importorskip("edge_lora_executorch")
torch = pytest.importorskip("torch")
pytest.importorskip("executorch.exir")
Program = module.Program

pytestmark = pytest.mark.torch

SHAPES = {"wide": (33, 30), "odd": (30, 17), "narrow": (17, 5), "one": (5, 1)}  # (in, out)
NO_BIAS = {"odd", "one"}


class Chain(torch.nn.Module):
    """Linear layers whose outputs are no multiples of any tile, with and without bias."""

    def __init__(self):
        super().__init__()
        for name, (inputs, outputs) in SHAPES.items():
            layer = torch.nn.Linear(inputs, outputs, bias=name not in NO_BIAS)
            self.add_module(name, layer)

    def forward(self, x):
        for layer in self.children():
            x = torch.tanh(layer(x))
        return x


class Plain(torch.nn.Module):
    """An operator that is not delegated, and an output that is an input."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(11, 6)

    def forward(self, ids, x):
        return self.table(ids), x


def lower(module, inputs, delegate=True, planned=False, dynamic_shapes=None):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    planning = MemoryPlanningPass(alloc_graph_input=planned, alloc_graph_output=planned)
    config = ExecutorchBackendConfig(memory_planning_pass=planning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ExecuTorch's own
        program = torch.export.export(module, inputs, dynamic_shapes=dynamic_shapes)
        partitioners = [XnnpackPartitioner()] if delegate else []
        edge = to_edge_transform_and_lower(program, partitioner=partitioners)
        return edge.to_executorch(config).buffer


@pytest.fixture(scope="module")
def chain():
    torch.manual_seed(0)
    return Chain().eval()


@pytest.fixture(scope="module")
def program_file(chain, tmp_path_factory):
    rows = torch.export.Dim("rows", max=8)
    path = tmp_path_factory.mktemp("executorch") / "model.pte"
    path.write_bytes(lower(chain, (torch.randn(3, 33),), dynamic_shapes=({0: rows},)))
    return path


def mapped(path: Path):
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)


@pytest.fixture
def memory_file() -> Iterator[int]:
    descriptor = os.memfd_create("packed")
    yield descriptor
    os.close(descriptor)


def weight(chain, name):
    return chain.get_submodule(name).weight.detach().numpy()


def key(chain, name):
    """Return the name of the packed weight: of its values, then of its bias's."""
    parts = [weight(chain, name)]
    if name not in NO_BIAS:
        parts.append(chain.get_submodule(name).bias.detach().numpy())
    return "".join(hashlib.sha256(part.tobytes()).hexdigest() for part in parts)


def wanted(chain, path, names=tuple(SHAPES)):
    raw = path.read_bytes()
    return [(key(chain, n), raw.find(weight(chain, n).tobytes()), *SHAPES[n]) for n in names]


def expected(chain, x):
    with torch.no_grad():
        return chain(torch.from_numpy(x)).numpy()


def address_space():
    """Return the bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


def rows(count=3, seed=1):
    return np.random.default_rng(seed).standard_normal((count, 33)).astype(np.float32)


def block_of(program, name):
    offset, size = program.entries()[name]
    return program.packed()[offset : offset + size].view(np.float32)


def test_runs_equal_torch(chain, program_file):
    program = Program(mapped(program_file))
    assert module.version.startswith("1.5.1")
    assert program.inputs == [("float32", (8, 33))]
    assert program.outputs == [("float32", (8, 1))]
    for count in (3, 8, 1):  # sizes change, and earlier results stay as they are
        first = program.run([rows(count, count)])[0]
        kept = first.copy()
        assert first.shape == (count, 1)
        np.testing.assert_allclose(first, expected(chain, rows(count, count)), atol=1e-6)
        program.run([rows(count, 99)])
        np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("planned", [False, True])
def test_programs_that_are_not_delegated(planned):
    module = Plain().eval()
    ids, x = torch.tensor([[1, 10, 0]]), torch.randn(2, 2)
    program = Program(
        np.frombuffer(lower(module, (ids, x), delegate=False, planned=planned), np.uint8).copy()
    )
    assert [dtype for dtype, _ in program.inputs] == ["int64", "float32"]
    looked_up, same = program.run([ids.numpy(), x.numpy()])
    np.testing.assert_array_equal(looked_up, module(ids, x)[0].detach().numpy())
    np.testing.assert_array_equal(same, x.numpy())
    assert not np.shares_memory(same, x.numpy())


def test_what_is_not_delegated_is_read_in_place():
    module = Plain().eval()
    inputs = (torch.tensor([[4]]), torch.zeros(1))
    raw = np.frombuffer(lower(module, inputs, delegate=False), np.uint8).copy()
    values = module.table.weight.detach().numpy()
    offset = raw.tobytes().find(values.tobytes())
    program = Program(raw)
    raw[offset : offset + values.nbytes].view(np.float32)[4 * 6 + 2] = 7.5
    assert program.run([i.numpy() for i in inputs])[0][0, 0, 2] == 7.5


def test_entries_have_the_names_of_weights_and_biases(chain, program_file, memory_file):
    program = Program(mapped(program_file), memory_file)
    assert set(program.entries()) == {key(chain, name) for name in SHAPES}
    with pytest.raises(NativeError, match="without packed_fd"):
        Program(mapped(program_file)).entries()


def test_probing_leaves_what_packing_makes(chain, program_file, memory_file):
    pte = mapped(program_file)
    probed = Program.open_probed(pte, wanted(chain, program_file), memory_file)
    assert pte.tobytes() == program_file.read_bytes()
    np.testing.assert_allclose(probed.run([rows()])[0], expected(chain, rows()), atol=1e-6)

    other = os.memfd_create("other")
    packed = Program(mapped(program_file), other)
    os.close(other)
    for name in SHAPES:  # to the byte, padding included
        np.testing.assert_array_equal(
            block_of(probed, key(chain, name)).view(np.uint32),
            block_of(packed, key(chain, name)).view(np.uint32),
        )


@pytest.mark.parametrize("name", SHAPES)
def test_a_patch_through_the_mapping_changes_the_run_and_goes(
    chain, program_file, memory_file, name
):
    program = Program.open_probed(
        mapped(program_file), wanted(chain, program_file, [name]), memory_file
    )
    layout = native.Layout.from_bytes(program.layouts[0])
    image = native.Image(1)
    _, offset, inputs, outputs = wanted(chain, program_file, [name])[0]
    image.add_slot(name, inputs, outputs, str(program_file), offset, "oi")
    block = block_of(program, key(chain, name))
    assert image.add_place(name, layout, block.ctypes.data, block.nbytes)
    before = program.packed().tobytes()
    base = program.run([rows()])[0]

    # Every single value, so that none of them lies where only padding is read.
    patched = chain.get_submodule(name)
    original = patched.weight.detach().clone()
    values = np.random.default_rng(3).standard_normal((outputs, inputs)).astype(np.float32)
    old = [image.poke(name, i, float(v)) for i, v in enumerate(values.ravel())]
    try:
        with torch.no_grad():
            patched.weight.copy_(torch.from_numpy(values))
        after = program.run([rows()])[0]
        np.testing.assert_allclose(after, expected(chain, rows()), atol=1e-6)
        assert np.abs(after - base).max() > 1e-3
    finally:
        with torch.no_grad():
            patched.weight.copy_(original)
    for i, v in enumerate(old):
        image.poke(name, i, v)
    assert program.packed().tobytes() == before
    np.testing.assert_array_equal(program.run([rows()])[0], base)
    image.close()


def test_programs_over_different_files_are_independent(chain, program_file):
    def double(program):
        block_of(program, key(chain, "wide"))[:] *= 2

    descriptors = [os.memfd_create(str(i)) for i in range(2)]
    first, second = (Program(mapped(program_file), d) for d in descriptors)
    base = second.run([rows()])[0]
    double(first)
    assert np.abs(first.run([rows()])[0] - base).max() > 1e-3
    np.testing.assert_array_equal(second.run([rows()])[0], base)

    # The number of a closed descriptor is used again while its program lives.
    for descriptor in descriptors:
        os.close(descriptor)
    again = os.memfd_create("again")
    assert again in descriptors
    third = Program(mapped(program_file), again)
    os.close(again)
    np.testing.assert_array_equal(third.run([rows()])[0], base)
    double(third)
    np.testing.assert_array_equal(second.run([rows()])[0], base)


def test_programs_over_one_file_share_its_weights(chain, program_file, memory_file):
    first = Program(mapped(program_file), memory_file)
    base = first.run([rows()])[0]
    second = Program(mapped(program_file), memory_file)
    block_of(first, key(chain, "wide"))[:] *= 2
    changed = first.run([rows()])[0]
    assert np.abs(changed - base).max() > 1e-3
    np.testing.assert_array_equal(second.run([rows()])[0], changed)
    first.close()
    second.close()
    third = Program(mapped(program_file), memory_file)  # nothing is packed anew
    np.testing.assert_array_equal(third.run([rows()])[0], changed)
    with pytest.raises(NativeError, match="holds weights already"):
        Program.open_probed(mapped(program_file), [], memory_file)


def test_arrays_outlive_the_program(program_file, memory_file):
    program = Program(mapped(program_file), memory_file)
    result, packed = program.run([rows()])[0], program.packed()
    kept = result.copy(), packed.tobytes()
    program.close()
    del program
    gc.collect()
    np.testing.assert_array_equal(result, kept[0])
    assert packed.tobytes() == kept[1]


def test_a_closed_program_lets_its_file_go(program_file):
    memory = np.memmap(program_file, np.uint8, "c")
    held = weakref.ref(memory)
    program = Program(memory)
    del memory
    gc.collect()
    assert held() is not None
    program.close()
    gc.collect()
    assert held() is None


def test_a_small_result_of_a_program_that_gives_large_ones_is_small():
    class Repeat(torch.nn.Module):
        def forward(self, x):
            return x + torch.zeros(1, 1 << 13)

    sizes = ({0: torch.export.Dim("rows", max=1 << 11)},)  # 64 MiB of results
    file = lower(Repeat(), (torch.ones(3, 1),), delegate=False, dynamic_shapes=sizes)
    program = Program(np.frombuffer(file, np.uint8).copy())
    one = np.ones((1, 1), np.float32)
    kept = [program.run([one])[0]]
    before = address_space()
    kept += [program.run([one])[0] for _ in range(4)]
    assert address_space() - before < 16 << 20
    assert all((array == 1).all() and array.shape == (1, 1 << 13) for array in kept)


def test_closed_programs_refuse(program_file):
    program = Program(mapped(program_file))
    program.close()
    program.close()
    with pytest.raises(NativeError, match="closed"):
        program.run([rows()])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "0 inputs are given, the program takes 1"),
        ([rows(), rows()], "2 inputs are given"),
        ([rows().astype(np.float64)], "input 0 is float64, the program takes float32"),
        ([rows(9)], r"input 0 has shape \(9, 33\), the program takes at most \(8, 33\)"),
        ([rows()[0]], r"input 0 has shape \(33,\)"),
        ([rows()[:, :30]], "not contiguous"),
        ([np.ascontiguousarray(rows()[:, :30])], "failed to run the program: "),
        ([rows()[:0]], "input 0 is empty"),
        ([[1.0]], "input 0 is not an array"),
        ([None], "input 0 is not an array"),
    ],
)
def test_inputs_that_do_not_fit(program_file, inputs, message):
    program = Program(mapped(program_file))
    with pytest.raises(NativeError, match=message):
        program.run(inputs)
    assert program.run([rows()])[0].shape == (3, 1)  # nothing is broken by it


def test_threads(chain, program_file):
    one, two = Program(mapped(program_file)), Program(mapped(program_file), threads=2)
    for program in (one, two):
        np.testing.assert_allclose(program.run([rows()])[0], expected(chain, rows()), atol=1e-6)
    with pytest.raises(NativeError, match=r"threads is 3, but programs with 2 threads are open"):
        Program(mapped(program_file), threads=3)
    with pytest.raises(NativeError, match="must be 1 to 1024"):
        Program(mapped(program_file), threads=0)
    two.close()
    three = Program(mapped(program_file), threads=3)
    np.testing.assert_allclose(three.run([rows()])[0], expected(chain, rows()), atol=1e-6)


def test_runs_of_many_threads_take_turns(chain, program_file):
    program = Program(mapped(program_file))
    results: dict[int, np.ndarray] = {}

    def work(seed):
        for _ in range(50):
            results[seed] = program.run([rows(1 + seed, seed)])[0]

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for seed, result in results.items():
        np.testing.assert_allclose(result, expected(chain, rows(1 + seed, seed)), atol=1e-6)
    assert len(results) == 4


def test_cut_and_foreign_files(program_file):
    whole = np.fromfile(program_file, np.uint8)
    for size in (*range(0, 200, 9), *range(200, whole.size, 997)):
        with pytest.raises(BundleError, match="cannot load the program"):
            Program(whole[:size].copy())
    for at in range(0, 60, 4):  # where the file says what it is, and how large
        damaged = whole.copy()
        damaged[at] ^= 0xFF
        try:
            Program(damaged).run([rows()])
        except (BundleError, UnsupportedError, NativeError):
            continue  # or that byte has no meaning
    with pytest.raises(NativeError, match="multiple of 16 bytes"):
        Program(np.concatenate([whole[:1], whole])[1:])


def test_files_and_slots_that_cannot_be(chain, program_file, memory_file):
    pte = mapped(program_file)
    with pytest.raises(NativeError, match="packed_fd 1048575"):
        Program(pte, 1048575)
    reading, writing = os.pipe()
    with pytest.raises(NativeError, match="must be a plain file"):
        Program(pte, writing)
    os.close(reading)
    os.close(writing)
    sha = key(chain, "wide")
    for slot in [(sha, pte.size - 8, 33, 30), (sha, 2**63, 33, 30), (sha, 0, 2**62, 2**62)]:
        with pytest.raises(NativeError, match="does not lie in a program"):
            Program.open_probed(pte, [slot], memory_file)
    unknown = ("0" * 64, *wanted(chain, program_file, ["wide"])[0][1:])
    with pytest.raises(UnsupportedError, match="did not pack"):
        Program.open_probed(pte, [unknown], memory_file)
    assert pte.tobytes() == program_file.read_bytes()


def test_a_damaged_index_is_refused(program_file, memory_file):
    program = Program(mapped(program_file), memory_file)
    footer = program.packed()[-20:]
    sound = footer.copy()
    for at, message in ((0, "name"), (8, "cut short"), (12, "no index"), (16, "version 253")):
        footer[at] ^= 0xFF
        with pytest.raises(UnsupportedError, match=message):
            program.entries()
        footer[:] = sound
    assert program.entries()


def test_needs_no_torch_and_stands_beside_the_official_module(program_file):
    script = """
import sys
import numpy as np
from edge_lora_executorch import Program
program = Program(np.fromfile(sys.argv[1], np.uint8))
x = np.ones((2, 33), np.float32)
ours = program.run([x])[0]
assert "torch" not in sys.modules
import torch
from executorch.runtime import Runtime
method = Runtime.get().load_program(sys.argv[1]).load_method("forward")
assert np.array_equal(method.execute([torch.from_numpy(x)])[0].numpy(), ours)
assert np.array_equal(program.run([x])[0], ours)
from edge_lora.errors import NativeError
try:
    program.run([np.ones((2, 30), np.float32)])
except NativeError as error:
    assert len(str(error).partition("failed to run the program: ")[2]) > 30, error
else:
    raise AssertionError("no error")
"""
    command = [sys.executable, "-W", "ignore", "-c", script, str(program_file)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
