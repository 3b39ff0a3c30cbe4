"""Regions: several ranges of one tensor, along any of its dims, stored in shards."""

import pytest
import torch

from hf_sdp.plan.region import Box, Region, intersection, numel, relative, view

REGIONS = {
    "whole": Region.whole("x", (7, 5)),
    "rows": Region("x", (((2, 5),), ((0, 5),))),
    "fused rows": Region("x", (((0, 2), (3, 4), (5, 7)), ((0, 5),))),
    "columns": Region("x", (((0, 7),), ((1, 2), (4, 5)))),
    "rows and columns": Region("x", (((0, 1), (4, 7)), ((0, 2), (3, 4)))),
}
FULL = torch.arange(35).view(7, 5)


def index(region: Region) -> list[torch.Tensor]:
    return [torch.cat([torch.arange(a, b) for a, b in ranges]) for ranges in region.ranges]


@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
def test_values_are_those_that_indexing_gives(region):
    expected = FULL[torch.meshgrid(*index(region), indexing="ij")]
    assert region.shape == tuple(expected.shape) and region.numel == expected.numel()
    assert torch.equal(region.of(FULL), expected)
    values = region.of(FULL)
    assert values.untyped_storage().nbytes() == values.nbytes  # memory of its own


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
def test_shards_are_cut_as_fsdp2_cuts_them(region, num_shards):
    """FSDP2 takes torch.chunk along dim 0; what is missing is empty."""
    chunks = list(torch.chunk(region.of(FULL), num_shards))
    for i in range(num_shards):
        shard = region.shard(i, num_shards)
        expected = chunks[i] if i < len(chunks) else region.of(FULL)[:0]
        assert shard.shape == tuple(expected.shape)
        assert torch.equal(shard.of(FULL), expected)


@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
def test_boxes_tile_the_region_and_views_share_its_memory(region):
    local = torch.zeros(region.shape, dtype=FULL.dtype)
    for box, piece in region.views(local):
        assert numel(box) == piece.numel()
        piece.copy_(view(FULL, box))
    assert torch.equal(local, region.of(FULL))


def test_a_tensor_without_dims_and_one_without_elements():
    scalar = Region.whole("x", ())
    assert scalar.shape == () and scalar.numel == 1 and torch.equal(scalar.of(torch.tensor(3.0)), torch.tensor(3.0))
    empty = Region.whole("x", (0, 3))
    assert empty.shape == (0, 3) and empty.numel == 0 and not empty.pieces


def test_what_two_boxes_have_in_common():
    a: Box = ((0, 4), (2, 6))
    b: Box = ((3, 9), (0, 3))
    assert intersection(a, b) == ((3, 4), (2, 3))
    assert intersection(a, ((4, 5), (2, 6))) is None
    assert relative(((3, 4), (2, 3)), a) == ((3, 4), (0, 1))
