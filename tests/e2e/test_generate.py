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


def test_a_second_step_without_a_token_is_refused(session):
    decoder = Decoder(session, PROMPTS[:1])
    decoder.step()
    with pytest.raises(UnsupportedError, match=r"append\(\) the next one first"):
        decoder.step()
    decoder.append(np.array([3]))
    decoder.step()


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


def test_an_adapter_that_breaks_the_numbers_leaves_nothing_in_the_cache(session, make_adapter):
    before = generate(session, PROMPTS[:1], max_new_tokens=6, stop=[]).tokens
    session.load_adapter(make_adapter("low_rank", alpha=1e30, slots="model.layers.*"), "huge")
    with session.using("huge"):
        assert np.isnan(Decoder(session, [list(range(1, 60))]).step()).any()
    assert generate(session, PROMPTS[:1], max_new_tokens=6, stop=[]).tokens == before
    session.delete_adapter("huge")


def test_too_many_tokens_are_refused_once(session):
    length = session.manifest.config["context_length"]
    with pytest.raises(UnsupportedError, match=f"{length + 1} tokens, the model takes at most"):
        generate(session, [[1] * (length + 1)], stop=[])
    with pytest.raises(UnsupportedError, match="at most"):
        generate(session, [[1] * (length - 1)], max_new_tokens=4, stop=[])


def test_decoders_that_take_turns_do_not_disturb_each_other(session):
    alone = [generate(session, [p], max_new_tokens=6, stop=[]).tokens[0] for p in PROMPTS]
    decoders = [Decoder(session, [prompt]) for prompt in PROMPTS]
    tokens = [[] for _ in PROMPTS]
    for _ in range(6):
        for decoder, made in zip(decoders, tokens, strict=True):
            chosen = decoder.step().argmax(-1)
            made.append(int(chosen[0]))
            decoder.append(chosen)
    assert tokens == alone


def test_runs_in_between_do_not_disturb_a_decoder(session):
    from edge_lora.runtime.canary import canary_feeds

    alone = generate(session, PROMPTS[:1], max_new_tokens=6, stop=[]).tokens[0]
    decoder, made = Decoder(session, PROMPTS[:1]), []
    for _ in range(6):
        chosen = decoder.step().argmax(-1)
        made.append(int(chosen[0]))
        decoder.append(chosen)
        session.run(canary_feeds(session.manifest))
    assert made == alone


def test_impossible_prompts_are_refused(session):
    for prompts in ([], [[1], []]):
        with pytest.raises(UnsupportedError, match="prompt is empty"):
            generate(session, prompts)
