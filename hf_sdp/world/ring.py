"""What a worker sends in a collective, as a ring sends it."""

ONE_WAY, BOTH_WAYS = 1, 2
"""Times around the ring: an all-gather or reduce-scatter, and an all-reduce."""


def sent_in_ring(nbytes, members, rounds):
    """Bytes that each of ``members`` sends, for ``nbytes`` in all and ``rounds`` around the ring; numbers or arrays."""
    return rounds * nbytes * (members - 1) / members
