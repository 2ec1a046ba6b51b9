"""Text generation against transformers, and caches that follow the adapter."""

import numpy as np
import pytest

from edge_lora.errors import UnsupportedError
from edge_lora.runtime import open_bundle
from edge_lora.runtime.generate import Decoder, generate
from edge_lora.runtime.sampling import nucleus

PROMPTS = [[5, 9, 3, 7], [11, 2, 4], [8]]


@pytest.fixture(scope="module", params=["onnxruntime", "executorch"])
def session(request, bundle_for, make_adapter):
    with open_bundle(bundle_for(request.param), threads=2) as opened:
        opened.load_adapter(make_adapter("sparse", 7), "skill")
        yield opened


@pytest.fixture(autouse=True)
def _base(session):
    session.disable_adapters()


def test_greedy_equals_transformers(session, torch_model):
    import torch

    result = generate(session, PROMPTS[:1], max_new_tokens=12, stop=[])
    with torch.no_grad():
        expected = torch_model.generate(
            torch.tensor(PROMPTS[:1]),
            attention_mask=torch.ones(1, 4, dtype=torch.long),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )
    assert result.tokens[0] == expected[0, 4:].tolist()


def test_a_batch_of_uneven_prompts_equals_each_alone(session):
    together = generate(session, PROMPTS, max_new_tokens=8, stop=[]).tokens
    alone = [generate(session, [p], max_new_tokens=8, stop=[]).tokens[0] for p in PROMPTS]
    assert together == alone


def test_a_switch_in_the_middle_rebuilds_the_cache(session):
    decoder = Decoder(session, PROMPTS[:1])
    decoder.append(decoder.step().argmax(-1))
    session.set_adapter("skill")
    after = decoder.step()
    assert decoder.rebuilds == 1
    fresh = Decoder(session, [decoder.ids[0].tolist()]).step()
    np.testing.assert_array_equal(after, fresh)


def test_a_switch_in_the_middle_can_be_refused(session):
    decoder = Decoder(session, PROMPTS[:1], on_swap="refuse")
    decoder.append(decoder.step().argmax(-1))
    session.set_adapter("skill")
    with pytest.raises(UnsupportedError, match="switched while"):
        decoder.step()


def test_the_end_token_stops_one_sequence_only(session):
    free = generate(session, PROMPTS, max_new_tokens=8, stop=[]).tokens
    end = free[0][2]
    stopped = generate(session, PROMPTS, max_new_tokens=8, stop=[end]).tokens
    assert stopped[0] == free[0][: free[0].index(end)]
    assert stopped[1] == (free[1][: free[1].index(end)] if end in free[1] else free[1])


def test_sampling_repeats_with_its_seed(session):
    runs = [
        generate(session, PROMPTS, max_new_tokens=6, sample=nucleus(0.9, 1.5, seed), stop=[]).tokens
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_impossible_prompts_are_refused(session):
    for prompts in ([], [[1], []]):
        with pytest.raises(UnsupportedError, match="prompt is empty"):
            generate(session, prompts)
