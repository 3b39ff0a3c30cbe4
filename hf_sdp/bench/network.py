"""A network of limited bandwidth between workers on one machine: one network namespace a worker, all on one bridge.

    worker 0: hf-sdp-PID-0/eth0 ---- w0 \\
    worker 1: hf-sdp-PID-1/eth0 ---- w1 -- bridge, in a namespace of its own: hf-sdp-PID-hub
    ...

Each worker has a full-duplex link: what it sends and what it receives are limited (token bucket filters, tc-tbf(8), on
both ends of its veth pair). The machine's own network is not touched. Needs Linux, root, and the commands ``ip`` and
``tc`` of iproute2.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator

from ..errors import SDPConfigError

INTERFACE = "eth0"
"""Name of a worker's interface in its namespace."""
_CLONE_NEWNET = 0x40000000  # <linux/sched.h>
_limited = False  # whether this process has entered a namespace


@contextlib.contextmanager
def limited_network(num_workers: int, rate: float) -> Iterator[list[str]]:
    """Namespaces, one a worker, whose links carry at most ``rate`` bits per second each way.

    All of it is removed at the end, also after an error or Ctrl-C. After SIGKILL ``ip netns list`` shows what is left,
    and ``ip netns delete`` removes it.
    Raises: SDPConfigError where the machine does not allow it.
    """
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"):
        lacks = "this user is not root" if os.geteuid() != 0 else "ip and tc (iproute2) are not installed"
        raise SDPConfigError(f"A limited bandwidth needs network namespaces on Linux: {lacks}. Leave the limit out.")
    prefix = f"hf-sdp-{os.getpid()}"
    hub, names = f"{prefix}-hub", [f"{prefix}-{i}" for i in range(num_workers)]
    made: list[str] = []
    try:
        for name in (hub, *names):
            made.append(name)  # before: what was made in part is removed as well
            _run("ip", "netns", "add", name)
        _run("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", hub, "link", "set", "bridge", "up")
        for i, name in enumerate(names):
            _connect(hub, name, i, rate)
        yield names
    finally:
        for name in made:  # the interfaces go with them
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=30, check=False)


def _connect(hub: str, name: str, index: int, rate: float) -> None:
    end = f"w{index}"
    _run(*f"ip -n {hub} link add {end} type veth peer name {INTERFACE} netns {name}".split())
    # No IPv6: its addresses cannot be used for the first second, and gloo might choose one.
    _run(*f"ip -n {name} link set {INTERFACE} addrgenmode none".split())
    _run(*f"ip -n {name} address add 10.77.{index // 250}.{index % 250 + 1}/16 dev {INTERFACE}".split())
    # The burst is 2 ms long, or two of the largest packets (64 KiB) where that is more. What waits longer than 100 ms
    # is dropped, and TCP slows down.
    limit = f"tbf rate {rate:.0f}bit burst {max(128 * 1024, int(rate / 8 * 2e-3))} latency 100ms"
    for namespace, interface in ((name, INTERFACE), (hub, end)):
        _run(*f"tc -n {namespace} qdisc add dev {interface} root {limit}".split())
    _run(*f"ip -n {hub} link set {end} master bridge up".split())
    _run(*f"ip -n {name} link set lo up".split())
    _run(*f"ip -n {name} link set {INTERFACE} up".split())


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise SDPConfigError(
            f"This machine does not allow a limited bandwidth: `{' '.join(command)}` failed: {done.stderr.strip()}. "
            "Leave the limit out."
        )


def enter(namespace: str) -> None:
    """Move this thread, and the threads it starts from now on, into a namespace of :func:`limited_network`."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")
    global _limited
    _limited = True


def bytes_on_the_wire() -> int | None:
    """Bytes that this worker's link has carried away from it so far, headers included (what ``ip -s link`` shows as
    sent); None outside of a limited network, where all workers share one loopback device."""
    if not _limited:
        return None
    with open("/proc/thread-self/net/dev") as file:
        counters = next(line for line in file if line.strip().startswith(f"{INTERFACE}:"))
    return int(counters.split(":")[1].split()[8])
