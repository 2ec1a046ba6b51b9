"""Sites: names, widths and pairs, read off a model without running it."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from edge_lora.errors import ShapeError, UnknownNameError
from edge_lora.methods.sites import (
    default_sites,
    find_sites,
    input_of,
    match_sites,
    output_of,
    with_output,
)


class Pair(NamedTuple):
    """What some modules return."""

    hidden: torch.Tensor
    other: int


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm2 = nn.LayerNorm(6)
        self.mlp = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))


def vit():
    model = nn.Module()
    model.blocks = nn.ModuleList([Block(), Block()])
    return model


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_widths_are_those_of_the_running_model(family, request, token_batches):
    model = request.getfixturevalue(family)
    seen = {}
    hooks = [
        site.module.register_forward_hook(
            lambda module, args, kwargs, output, site=site: seen.update(
                {site.name: (output_of(output).shape[-1], input_of(args, kwargs).shape[-1])}
            ),
            with_kwargs=True,
        )
        for name, site in find_sites(model).items()
        if name.rsplit(".", 1)[-1] in ("mlp", "self_attn", "attn", "0", "1", "c_fc")
    ]
    model(**token_batches[0])
    assert len(hooks) == len(seen) > 5
    sites = find_sites(model)
    assert {name: sites[name].shape for name in seen} == seen


def test_default_sites_are_the_mlps(tiny_llama):
    assert list(default_sites(tiny_llama)) == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_pairs_join_modules_of_one_parent():
    sites = match_sites(vit(), ["*.norm2->*.mlp"])
    assert list(sites) == ["blocks.0.norm2->blocks.0.mlp", "blocks.1.norm2->blocks.1.mlp"]
    site = sites["blocks.1.norm2->blocks.1.mlp"]
    assert site.shape == (6, 6)
    assert isinstance(site.source, nn.LayerNorm)
    assert not site.is_plain


def test_exact_names_pair_anywhere():
    (site,) = match_sites(vit(), ["blocks.0.norm2->blocks.1.mlp.0"]).values()
    assert site.shape == (12, 6)
    slot = site.slot()
    assert (slot.name, slot.shape, slot.kind, slot.slot_hash) == (site.name, (12, 6), "site", "")


def test_sites_come_in_the_order_of_the_model():
    assert list(match_sites(vit(), ["blocks.1.mlp", "*.norm2->*.mlp", "blocks.0"])) == [
        "blocks.0", "blocks.0.norm2->blocks.0.mlp", "blocks.1.mlp", "blocks.1.norm2->blocks.1.mlp",
    ]  # fmt: skip


def test_patterns_that_match_nothing_are_refused():
    with pytest.raises(UnknownNameError, match=r"'\*\.mpl'[\s\S]*'mlp' \(2\)"):
        match_sites(vit(), ["*.mpl"])
    with pytest.raises(UnknownNameError, match=r"'\*\.norm1->\*\.mlp' pairs no"):
        match_sites(vit(), ["*.norm1->*.mlp"])


def test_a_width_that_was_misread_is_refused_at_the_first_forward():
    site = find_sites(vit())["blocks.0.mlp"]
    site.check(torch.zeros(2, 6), torch.zeros(2, 6))
    with pytest.raises(ShapeError, match=r"'blocks\.0\.mlp'.*\(6, 5\)"):
        site.check(torch.zeros(2, 5), torch.zeros(2, 6))


def test_outputs_in_a_tuple_keep_their_company():
    y = torch.zeros(2)
    assert with_output((y, "weights"), y + 1)[1] == "weights"
    assert torch.equal(output_of(with_output((y, "weights"), y + 1)), y + 1)


def test_a_named_tuple_stays_one():
    found = with_output(Pair(torch.zeros(2), 3), torch.ones(2))
    assert type(found) is Pair
    assert found.hidden.tolist() == [1, 1]
    assert found.other == 3
