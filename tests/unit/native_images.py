"""Images of plain NumPy memory for tests of the compiled core, packed as engines pack."""

import numpy as np

from edge_lora import Adapter, BaseIdentity, Delta, native


def panel_offsets(in_features, out_features):
    """Return offsets (in, out) of ONNX Runtime's fp32 panels, and how many elements they span."""
    k, n = np.arange(in_features)[:, None], np.arange(out_features)[None, :]
    padded = -(-out_features // 16) * 16
    rows = np.minimum(256, in_features - k // 256 * 256)
    offsets = k // 256 * 256 * padded + n // 16 * 16 * rows + k % 256 * 16 + n % 16
    return offsets, in_features * padded


def shuffled_offsets(in_features, out_features):
    """Return a layout with lines of 8 outputs, inputs in a random order and padding between."""
    order = np.random.default_rng(11).permutation(in_features)
    n = np.arange(out_features)[None, :]
    offsets = n // 8 * 8 * (in_features + 3) + order[:, None] * 8 + n % 8 + 5
    return offsets, -(-out_features // 8) * 8 * (in_features + 3) + 5


def plain_offsets(stored):
    def offsets(in_features, out_features):
        grid = np.arange(in_features * out_features)
        if stored == "oi":
            return grid.reshape(out_features, in_features).T, grid.size
        return grid.reshape(in_features, out_features), grid.size

    return offsets


PACKINGS = {
    "panels": panel_offsets,
    "shuffled": shuffled_offsets,
    "oi": plain_offsets("oi"),
    "io": plain_offsets("io"),
}


def address_of(array):
    return array.ctypes.data


class Packed:
    """One slot ``w``: its weight, its file, and one block for each of ``packings``."""

    def __init__(self, folder, shape, packings=("panels",), stored="io", seed=0, name="w"):
        self.name, self.shape = name, shape
        out_features, in_features = shape
        self.weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        self.path = folder / f"{name}.bin"
        on_disk = self.weight if stored == "oi" else np.ascontiguousarray(self.weight.T)
        self.path.write_bytes(b"#" * 12 + on_disk.tobytes())
        self.stored, self.places = stored, []
        for packing in packings:
            offsets, elements = PACKINGS[packing](in_features, out_features)
            probe = np.zeros(elements, np.float32)
            probe[offsets] = native.Layout.probe_values(in_features, out_features, "io")
            layout = native.Layout.from_probe(
                address_of(probe), probe.nbytes, in_features, out_features
            )
            block = np.full(elements, 0.25, np.float32)
            block[offsets] = self.weight.T
            self.places.append((layout, offsets, block))

    def add_to(self, image):
        out_features, in_features = self.shape
        image.add_slot(self.name, in_features, out_features, str(self.path), 12, self.stored)
        for layout, _, block in self.places:
            assert image.add_place(self.name, layout, address_of(block), block.nbytes)

    def blocks(self):
        return [block.copy() for _, _, block in self.places]

    def weights(self):
        """Return the weight that each block holds, (out, in)."""
        return [np.ascontiguousarray(block[offsets].T) for _, offsets, block in self.places]


def image_of(*slots, threads=2):
    image = native.Image(threads)
    for slot in slots:
        slot.add_to(image)
    return image


def adapter_file(folder, forms_of, shapes, alpha=1.0, name="a"):
    """Write an adapter of slot -> forms and open it in the core."""
    deltas = {slot: Delta(shapes[slot], "F32", tuple(forms)) for slot, forms in forms_of.items()}
    path = folder / f"{name}.safetensors"
    Adapter(name, "test", BaseIdentity("0"), deltas, alpha).save(path)
    return native.AdapterFile(str(path))
