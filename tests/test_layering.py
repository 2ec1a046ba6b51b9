"""Who may import whom, as data. An import that breaks the table fails and names its line."""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "edge_lora.export": ROOT / "export",
    "edge_lora.runtime": ROOT / "runtime",
    "edge_lora": ROOT / "edge_lora",
}
TORCH = {"torch", "transformers", "accelerate", "onnx", "onnxscript", "onnx_ir", "peft"}
ENGINES = {"onnxruntime", "executorch", "edge_lora_executorch"}

MAY_IMPORT = {
    "nouns": {"nouns"},
    "native": {"nouns", "native"},
    "methods": {"nouns", "methods"},
    "training": {"nouns", "methods", "training"},
    "bases": {"nouns"},
    "timeseries": {"nouns", "methods", "training", "bases", "timeseries"},
    "export": {"nouns", "methods", "export"},
    "runtime": {"nouns", "native", "runtime"},
    "demo": {"nouns", "demo", "bases", "methods", "training", "export", "runtime"},
    "cli": {
        "nouns", "native", "methods", "training", "bases", "timeseries", "export", "runtime",
        "demo", "cli",
    },
}  # fmt: skip
"""Layer -> the layers that it may import."""
LIGHT = {"nouns", "native", "runtime", "cli"}
"""Layers that load without torch: it may appear inside functions of the command line only."""


def layer_of(module):
    parts = module.split(".")
    if len(parts) == 1:
        return "nouns"
    if parts[1] in MAY_IMPORT:
        return parts[1]
    if parts[1] == "_core":
        return "core"
    return "cli" if parts[1] == "__main__" else "nouns"


@dataclass(frozen=True)
class Import:
    """One import statement."""

    importer: str
    imported: str
    place: str
    is_lazy: bool

    def __str__(self) -> str:
        return f"{self.place}: {self.importer} imports {self.imported}"


def modules():
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            relative = path.relative_to(folder)
            if relative.parts[0] in ("export", "runtime") and package == "edge_lora":
                continue  # the links to the real folders
            name = ".".join([package, *relative.with_suffix("").parts]).removesuffix(".__init__")
            yield name, path


def imports_of(name, path):
    """Return every import with whether it only runs inside a function or for the type checker."""
    found = []

    def visit(node, is_lazy):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            found.extend(Import(name, alias.name, place, is_lazy) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            found.extend(
                Import(name, f"{node.module}.{alias.name}", place, is_lazy) for alias in node.names
            )
        for child in ast.iter_child_nodes(node):
            visit(child, is_lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


IMPORTS = [found for name, path in modules() for found in imports_of(name, path)]
OURS = [found for found in IMPORTS if found.imported.split(".")[0] == "edge_lora"]


def test_there_is_something_to_check():
    assert len(OURS) > 50
    assert {layer_of(name) for name, _ in modules()} >= {"nouns", "methods", "export", "runtime"}


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_a_layer_imports_only_what_it_may(layer):
    broken = [
        str(found)
        for found in OURS
        if layer_of(found.importer) == layer
        and layer_of(found.imported) not in MAY_IMPORT[layer] | {"core"}
    ]
    assert not broken, "\n".join(broken)


def test_only_native_imports_the_compiled_core():
    broken = [
        str(f) for f in OURS if layer_of(f.imported) == "core" and layer_of(f.importer) != "native"
    ]
    assert not broken, "\n".join(broken)


def test_light_layers_import_no_torch():
    broken = [
        str(found)
        for found in IMPORTS
        if layer_of(found.importer) in LIGHT
        and found.imported.split(".")[0] in TORCH
        and not (layer_of(found.importer) == "cli" and found.is_lazy)
    ]
    assert not broken, "\n".join(broken)


def test_only_an_engine_of_its_own_file_is_imported_when_a_module_loads():
    """``import edge_lora.runtime`` must work where no engine is installed."""
    broken = [
        str(found)
        for found in IMPORTS
        if not found.importer.startswith("edge_lora.runtime.engines.")
        and layer_of(found.importer) in LIGHT
        and found.imported.split(".")[0] in ENGINES
        and not found.is_lazy
    ]
    assert not broken, "\n".join(broken)


def test_nothing_prints_but_the_command_line():
    """``click.echo`` is the command line's; library code logs."""
    for name, path in modules():
        if layer_of(name) in ("cli", "demo"):
            continue
        calls = [
            node.lineno
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "click.echo")
        ]
        assert not calls, f"{path}: prints on lines {calls}"
