import random

from networkx.utils import UnionFind

from hf_sdp.plan.worker_graph import components


def test_components_are_those_of_networkx():
    draw = random.Random(0)
    for _ in range(500):
        num_nodes = draw.randint(1, 12)
        sets = [
            tuple(draw.sample(range(num_nodes), draw.randint(1, min(3, num_nodes)))) for _ in range(draw.randint(0, 6))
        ]
        expected = UnionFind(range(num_nodes))
        for members in sets:
            expected.union(*members)
        assert sorted(map(sorted, components(num_nodes, sets))) == sorted(map(sorted, expected.to_sets()))
