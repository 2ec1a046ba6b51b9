"""A tiny exported language model and adapters for it, made once per test run."""

import os
from dataclasses import replace

import numpy as np
import pytest

from edge_lora import Adapter, BaseIdentity, Block, Delta, Dense, LowRank, RowScale, Sparse
from edge_lora.bundle import read_manifest
from edge_lora.codebook import encode
from edge_lora.forms import matrix_shape


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("EDGE_LORA_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def torch_model():
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def bundle(torch_model, tmp_path_factory):
    from edge_lora.export import export_bundle

    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    export_bundle(torch_model, folder, task="causal-lm", slots="inputs", progress=False)
    return folder


@pytest.fixture(scope="session")
def program_bundle(torch_model, tmp_path_factory):
    """Return the tiny language model as an ExecuTorch program over the same slots.

    Lowering takes long, so the workers of one test run share it.
    """
    pytest.importorskip("edge_lora_executorch")
    import fcntl

    from edge_lora.export import export_bundle

    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "tiny-program"
    with (root / "tiny-program.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "bundle.json").is_file():
            export_bundle(
                torch_model, folder, task="causal-lm", slots="inputs", engines=("executorch",),
                progress=False,
            )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def bundle_for(request):
    """Return a function that gives the tiny language model's bundle for an engine."""
    names = {"onnxruntime": "bundle", "executorch": "program_bundle"}
    return lambda engine: request.getfixturevalue(names[engine])


def form_of(kind, shape, rng):
    out_features, in_features = matrix_shape(shape)
    size = out_features * in_features
    match kind:
        case "sparse":
            index = np.sort(rng.choice(size, size // 50, replace=False)).astype(np.uint32)
            return (Sparse(index, rng.standard_normal(index.size).astype(np.float16)),)
        case "line":
            lines = rng.choice(size // 16, size // 800, replace=False)
            group, column = np.divmod(lines, in_features)
            rows = group[:, None] * 16 + np.arange(16)
            index = np.sort((rows * in_features + column[:, None]).ravel()).astype(np.uint32)
            return (Sparse(index, rng.standard_normal(index.size).astype(np.float32), 0.5),)
        case "low_rank":
            a = rng.standard_normal((4, in_features)).astype(np.float32)
            b = rng.standard_normal((4, out_features)).astype(np.float32)
            return (LowRank(a, b, 0.05),)
        case "dense":
            return (Dense(rng.standard_normal((out_features, in_features)).astype(np.float32)),)
        case "rows":
            index = np.sort(rng.choice(out_features, 3, replace=False)).astype(np.uint32)
            return (Block("row", index, rng.standard_normal((3, in_features), np.float32)),)
        case "columns":
            index = np.sort(rng.choice(in_features, 3, replace=False)).astype(np.uint32)
            return (Block("col", index, rng.standard_normal((3, out_features), np.float32)),)
        case "set":
            index = np.sort(rng.choice(size, 9, replace=False)).astype(np.uint32)
            return (Sparse(index, rng.standard_normal(9).astype(np.float32), 1.0, "set"),)
        case "coded":
            (form,) = form_of("low_rank", shape, rng)
            return (replace(form, a=encode(form.a, 1, "row"), bt=encode(form.bt, 4)),)
        case "dora":
            gain = rng.standard_normal(out_features).astype(np.float32)
            return (*form_of("low_rank", shape, rng), RowScale(gain, 0.1))
        case "ia3":
            return (RowScale(rng.standard_normal(in_features).astype(np.float32), 0.1, "col"),)
        case "mixed":
            return (*form_of("low_rank", shape, rng), *form_of("sparse", shape, rng))


def adapter_maker(bundle, folder):
    """Return a function that writes an adapter of one kind for a bundle."""
    import fnmatch

    manifest = read_manifest(bundle)

    def make(kind="sparse", seed=0, slots="*", alpha=1.0, name=None):
        rng = np.random.default_rng(seed)
        deltas = {
            slot: Delta(s.shape, s.dtype, form_of(kind, s.shape, rng), s.slot_hash)
            for slot, s in manifest.slots.items()
            if fnmatch.fnmatchcase(slot, slots)
        }
        adapter = Adapter(
            name=name or f"{kind}-{seed}",
            method="made for tests",
            base=BaseIdentity(manifest.fingerprint, manifest.base_id),
            deltas=deltas,
            alpha=alpha,
        )
        path = folder / f"{kind}-{seed}-{abs(hash((slots, alpha, name)))}.safetensors"
        adapter.save(path)
        return path

    return make


@pytest.fixture(scope="session")
def make_adapter(bundle, tmp_path_factory):
    """Return a function that writes an adapter of one kind for the tiny language model."""
    return adapter_maker(bundle, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="session")
def mlp():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(24, 48), torch.nn.GELU(), torch.nn.Linear(48, 48), torch.nn.ReLU(),
        torch.nn.Linear(48, 5),
    ).eval()  # fmt: skip


@pytest.fixture(scope="session")
def mlp_bundle(mlp, tmp_path_factory):
    import torch

    from edge_lora.export import export_bundle

    folder = tmp_path_factory.mktemp("mlp") / "bundle"
    x = torch.randn(3, 24)
    export_bundle(mlp, folder, example_inputs={"input": x}, slots="inputs", progress=False)
    return folder


@pytest.fixture(scope="session")
def make_mlp_adapter(mlp_bundle, tmp_path_factory):
    """Return a function that writes an adapter of one kind for the small MLP."""
    return adapter_maker(mlp_bundle, tmp_path_factory.mktemp("mlp-adapters"))


@pytest.fixture(scope="session")
def feeds(bundle):
    from edge_lora.runtime.canary import canary_feeds

    return canary_feeds(read_manifest(bundle))
