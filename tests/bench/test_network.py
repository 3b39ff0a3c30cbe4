"""Links of limited bandwidth between workers."""

import os
import subprocess

import pytest
import torch
import torch.distributed as dist

from hf_sdp.bench import network
from hf_sdp.bench.workers import launch
from hf_sdp.errors import SDPConfigError


def test_limited_network_needs_root(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SDPConfigError, match="not root"), network.limited_network(2, 1e9):
        pass


def reduced_on_the_wire() -> int:
    """Bytes this worker sends for an all-reduce of 1 MiB."""
    dist.barrier()
    before = network.bytes_on_the_wire()
    dist.all_reduce(torch.ones(2**18))
    dist.barrier()
    return network.bytes_on_the_wire() - before


def _namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith(f"hf-sdp-{os.getpid()}-")]


def test_limited_network():
    """Workers talk over their limited links, each with its own counter; all is removed, also after an error."""
    try:
        with network.limited_network(1, 1e9):
            pass
    except SDPConfigError as error:
        pytest.skip(str(error))
    with pytest.raises(ZeroDivisionError), network.limited_network(2, 1e9) as names:
        assert len(_namespaces()) == 3
        command = ["tc", "-n", names[1], "qdisc", "show", "dev", network.INTERFACE]
        assert "tbf" in (shown := subprocess.run(command, capture_output=True, text=True).stdout) and "1Gbit" in shown
        for sent in launch(reduced_on_the_wire, 2, namespaces=names, timeout_s=60):
            assert 2**20 < sent < 1.2 * 2**20  # what a ring of two sends, and headers
        1 / 0  # noqa: B018
    assert not _namespaces()
