"""Text data: files, splits, padding, labels, order."""

import pytest
import torch

from edge_lora.errors import EdgeLoraError
from edge_lora.training import TextBatches, read_pairs, split_pairs
from edge_lora.training.data import IGNORED


class ByteTokenizer:
    """Bytes as tokens, 1 before a text, 0 as the end."""

    eos_token_id = 0
    pad_token_id = None

    def encode(self, text, add_special_tokens=True):
        return ([1] if add_special_tokens else []) + list(text.encode())


def test_read_pairs(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "", "completion": "ç"}\n')
    assert read_pairs(path) == [("a", "b"), ("", "ç")]


def test_read_pairs_names_every_bad_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{oops\n[1]\n{"prompt": 3}\n')
    with pytest.raises(EdgeLoraError) as caught:
        read_pairs(path)
    message = str(caught.value)
    assert "line 1" not in message
    assert "line 2: Expecting property name" in message
    assert "line 3: is a list" in message
    assert "line 4: 'prompt' is 3" in message


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_read_pairs_refuses_an_empty_file(text, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(EdgeLoraError, match="no lines"):
        read_pairs(path)


def test_split_is_seeded_and_loses_nothing():
    pairs = [(str(i), "x") for i in range(50)]
    training, validation = split_pairs(pairs, 0.2, seed=3)
    assert len(validation) == 10
    assert sorted(training + validation) == sorted(pairs)
    assert split_pairs(pairs, 0.2, seed=3) == (training, validation)
    assert split_pairs(pairs, 0.2, seed=4) != (training, validation)


def test_labels_are_the_completion_and_the_end_only():
    batches = TextBatches([("ab", "c"), ("d", "efg")], ByteTokenizer(), shuffle=False)
    (batch,) = list(batches)
    a, b, c, d, e, f, g = b"abcdefg"
    assert batch["input_ids"].tolist() == [[1, a, b, c, 0, 0], [1, d, e, f, g, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    i = IGNORED
    assert batch["labels"].tolist() == [[i, i, i, c, 0, i], [i, i, e, f, g, 0]]
    assert {t.dtype for t in batch.values()} == {torch.int64}


def test_epochs_shuffle_anew_and_reproducibly():
    pairs = [(chr(97 + i), "x") for i in range(20)]

    def order(epoch, seed=0):
        batches = TextBatches(pairs, ByteTokenizer(), batch_size=3, seed=seed)
        batches.set_epoch(epoch)
        assert len(batches) == len(list(batches)) == 7
        return [row[1] for batch in batches for row in batch["input_ids"].tolist()]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != order(0, seed=1)
    assert sorted(order(0)) == sorted(order(1)) == [97 + i for i in range(20)]


def test_too_long_pairs_are_named():
    with pytest.raises(EdgeLoraError, match=r"pair 1: 13 tokens"):
        TextBatches([("a", "b"), ("a" * 10, "b")], ByteTokenizer(), max_tokens=12)
