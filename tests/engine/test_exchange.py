"""Routes: every worker's own view of one exchange fits those of all others."""

import torch

from hf_sdp import SDPConfig, make_plan
from hf_sdp.bench.fake_world import fake_world
from hf_sdp.engine.exchange import Route, find_route
from hf_sdp.plan.placement import Placement, owners
from hf_sdp.plan.region import Region, view
from tests.support.models import tiny_config

WORLD = 8


def cases(options: dict):
    """``(sources, targets, full parameter)`` of evaluation and of consolidation."""
    config = SDPConfig(coverage=0.5, **options)
    plan = make_plan(tiny_config(intermediate_size=48), config, config.num_subnetworks or WORLD)
    placement = Placement(WORLD, plan.num_subnetworks, config.sharding)
    evaluation = Placement(WORLD, plan.num_subnetworks, "full")
    owned = owners(plan, placement)
    cut = [next(name for name in plan.cut if kind in name) for kind in ("down_proj", "up_proj")]
    for name in [*cut, "model.embed_tokens.weight", "model.norm.weight"]:
        whole = Region.whole(name, plan.shapes[name])
        full = torch.arange(float(whole.numel)).reshape(whole.shape)
        yield owned[name], list(evaluation.owned(whole, plan.everyone)), full
        yield owned[name], [(0, whole)], full


def fits(sources, targets, full: torch.Tensor, routes: list[Route]) -> None:
    """What the workers send is, in this order, what the others expect: the values of the full parameter."""

    def pieces(regions, rank: int, order) -> list[torch.Tensor]:
        mine = [value for r, region in regions if r == rank for _, value in region.views(region.of(full))]
        return [view(mine[index], box).reshape(-1) for index, box in order] or [torch.empty(0)]

    sent = {}  # (from, to) -> values
    for rank, route in enumerate(routes):
        values = torch.cat(pieces(sources, rank, route.send)).split(route.send_sizes)
        sent |= {(rank, to): part for to, part in enumerate(values)}
    for rank, route in enumerate(routes):
        assert route.receive_sizes == [sent[other, rank].numel() for other in range(WORLD)]
        got = torch.cat([sent[other, rank] for other in range(WORLD)])
        assert torch.equal(got, torch.cat(pieces(targets, rank, route.receive)))
        assert got.numel() == sum(region.numel for r, region in targets if r == rank)


def test_routes_of_all_workers_fit_together():
    options = (dict(), dict(level="block"), dict(num_subnetworks=4), dict(sharding="none"))
    exchanges = [case for chosen in options for case in cases(chosen)]
    routes = []
    for rank in range(WORLD):
        with fake_world(WORLD, rank):
            routes.append([find_route(sources, targets) for sources, targets, _ in exchanges])
    for case, of_all in zip(exchanges, zip(*routes, strict=True), strict=True):
        fits(*case, of_all)
