"""Process groups are shared, have the user's timeout, and end before the interpreter does."""

from datetime import timedelta

import torch
import torch.distributed as dist

from hf_sdp import SDPConfig, patch_model
from hf_sdp.bench.fake_world import fake_world
from hf_sdp.compat import default_timeout
from hf_sdp.engine.shard import shard
from hf_sdp.engine.sharded import get_sharded
from tests.support.models import tiny_model
from tests.support.workers import COLLECTIVE_TIMEOUT_S, run_workers

CONFIGS = [dict(), dict(sharding="none"), dict(num_subnetworks=2, level="block")]


def _all_groups() -> list[dist.ProcessGroup]:
    return list(dist.distributed_c10d._world.pg_map)


def _timeout(group: dist.ProcessGroup) -> timedelta:
    return group._get_backend(torch.device("cpu")).options._timeout


def prepare_twice():
    models, counts = [], []
    for _ in range(2):
        for config in CONFIGS:
            models.append(shard(patch_model(tiny_model(), SDPConfig(**config)), torch.device("cpu")))
        counts.append(len(_all_groups()))
    control_groups = {get_sharded(model, "").control_group for model in models}
    return counts, len(control_groups), {_timeout(group) for group in _all_groups()}


def test_models_share_groups_and_every_group_has_the_timeout_of_the_default_one():
    for counts, num_control_groups, timeouts in run_workers(prepare_twice):
        assert counts[0] == counts[1] and num_control_groups == 1
        assert timeouts == {timedelta(seconds=COLLECTIVE_TIMEOUT_S)}


def test_groups_are_made_anew_in_another_world_and_a_worker_makes_those_that_it_is_in():
    for _ in range(2):
        with fake_world(64):
            shard(patch_model(tiny_model(), SDPConfig(sharding="none")), torch.device("cpu"))
            ranks = [tuple(dist.get_process_group_ranks(group)) for group in _all_groups()]
            assert len(set(ranks)) == len(ranks) and all(0 in r for r in ranks)
            assert [r for r in ranks if len(r) == 1] == [(0,)]
            assert default_timeout() is None
