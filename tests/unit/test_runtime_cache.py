import pytest

from edge_lora.runtime.cache import cache_folder, cache_key, store_bytes, trim


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_LORA_CACHE", str(tmp_path / "cache"))


def test_a_root_that_cannot_be_made_gives_a_temporary_one(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGE_LORA_CACHE", str(tmp_path / "file" / "below"))
    folder = cache_folder("patches")
    store_bytes(folder / "a", b"1")
    assert (folder / "a").read_bytes() == b"1"
    assert tmp_path not in folder.parents


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path):
    store_bytes(tmp_path / "missing" / "file", b"x")
    assert not (tmp_path / "missing").exists()


def test_nothing_half_written_is_left():
    store_bytes(cache_folder("patches") / "a", b"1" * 1000)
    assert [p.name for p in cache_folder("patches").iterdir()] == ["a"]


def test_trimming_keeps_the_latest():
    import os

    folder = cache_folder("patches")
    for i, name in enumerate("abcd"):
        (folder / name).write_bytes(b"0" * 10)
        os.utime(folder / name, (i, i))
    trim(folder, budget_bytes=25)
    assert sorted(p.name for p in folder.iterdir()) == ["c", "d"]


def test_keys_depend_on_every_part():
    keys = {
        cache_key("a", 1),
        cache_key("a", 2),
        cache_key("b", 1),
        cache_key("a", 1.5),
        cache_key("a1"),
    }
    assert len(keys) == 5
