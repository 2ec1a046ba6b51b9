import os
import threading

import pytest

from edge_lora.errors import UnsupportedError
from edge_lora.runtime.stream import source


def test_lines_come_as_they_are_written():
    read_end, write_end = os.pipe()
    os.write(write_end, b"a\r\nb\nc")
    chunks = source.lines_of(read_end)
    assert next(chunks) == ["a", "b"]
    os.write(write_end, "é\n".encode())
    assert next(chunks) == ["cé"]
    os.write(write_end, b"last \xff")
    os.close(write_end)
    assert list(chunks) == [["last \ufffd"]]
    os.close(read_end)


def test_a_line_without_an_end_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(source, "LONGEST_LINE_BYTES", 10)
    path = tmp_path / "x"
    path.write_bytes(b"0123456789ABC")
    with path.open("rb") as file, pytest.raises(UnsupportedError, match="longer than 10 bytes"):
        list(source.lines_of(file.fileno()))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(source, "POLL_S", 0.005)


def next_within(chunks, seconds=5):
    """Return the next chunk; a generator that waits for ever fails the test, not the suite."""
    found = []
    thread = threading.Thread(target=lambda: found.append(next(chunks)), daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, "no line arrived"
    return found[0]


def test_a_growing_file_is_followed(tmp_path, quick):
    path = tmp_path / "x"
    path.write_text("a\nb")
    chunks = source.lines_of_growing(path)
    assert next_within(chunks) == ["a"]
    with path.open("a") as file:
        file.write("c\nd\n")
    assert next_within(chunks) == ["bc", "d"]


def test_a_file_is_read_to_its_end_before_the_one_that_replaced_it(tmp_path, quick, monkeypatch):
    path, restarts, slept = tmp_path / "x", [], []

    def rotate(_):
        """Write the last lines and replace the file, all while the reader sleeps."""
        if not slept:
            with path.open("a") as file:
                file.write("2\n3\nno end")
            path.rename(tmp_path / "x.1")
            path.write_text("4\n")
        slept.append(1)

    path.write_text("1\n")
    monkeypatch.setattr(source.time, "sleep", rotate)
    chunks = source.lines_of_growing(path, lambda: restarts.append(len(slept)))
    assert [next_within(chunks) for _ in range(4)] == [["1"], ["2", "3"], ["no end"], ["4"]]
    assert restarts == [1]


@pytest.mark.parametrize("how", ["cut short", "replaced"])
def test_another_file_is_read_from_its_start(tmp_path, quick, how):
    path, other = tmp_path / "x", tmp_path / "y"
    path.write_text("first\nsecond\n")
    chunks = source.lines_of_growing(path)
    assert next_within(chunks) == ["first", "second"]
    if how == "replaced":
        other.write_text("new and longer than before\n")
        other.rename(path)
        assert next_within(chunks) == ["new and longer than before"]
    else:
        path.write_text("new\n")
        assert next_within(chunks) == ["new"]
