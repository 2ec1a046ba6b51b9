"""The names that users' code relies on. A change here is a change of the public API."""

import importlib

import pytest

PUBLIC = {
    "edge_lora": [
        "Adapter", "BaseIdentity", "Block", "Bottleneck", "Delta", "Dense", "EdgeLoraError",
        "LowRank", "RowScale", "Slot", "SlotTable", "Sparse", "__version__",
        "from_peft", "to_peft",
    ],
    "edge_lora.methods": [
        "Attached", "attach", "check_options", "find_weights", "get_method", "list_methods",
        "slot_table",
    ],
    "edge_lora.training": ["TextBatches", "TrainReport", "read_pairs", "split_pairs", "train"],
    "edge_lora.export": ["export_bundle"],
    "edge_lora.runtime": ["Session", "SwapStats", "open_bundle"],
}  # fmt: skip


@pytest.mark.parametrize("module", PUBLIC)
def test_all_is_the_snapshot(module):
    found = importlib.import_module(module)
    assert sorted(found.__all__) == sorted(PUBLIC[module])
    assert all(hasattr(found, name) for name in found.__all__)


def test_a_session_has_the_verbs_users_already_type():
    from edge_lora.runtime import Session

    for name in (
        "load_adapter", "set_adapter", "set_adapters", "disable_adapters", "delete_adapter",
        "using", "run", "close", "adapters", "active_adapters", "state_id", "route", "inputs",
        "outputs",
    ):  # fmt: skip
        assert hasattr(Session, name), name
