"""Holder sets. Few are distinct, so a plan numbers them: a unit's holders are a number."""

from collections.abc import Iterable, Mapping, Sequence

Holders = tuple[int, ...]
"""Subnetworks, sorted."""


def numbered(
    unit_holders: Mapping[str, Sequence[Holders]], always: Iterable[Holders]
) -> tuple[tuple[Holders, ...], dict[str, tuple[int, ...]]]:
    """The distinct holder sets, sorted, and for each module the number of each unit's set.

    Args:
        unit_holders: module name -> the holders of each of its units.
        always: sets that get a number even when no unit has them.
    """
    # A set of thousands of subnetworks is slow to hash, and the planner gives the same tuple to many units: each
    # object is hashed once. Equal sets that are two objects get one number all the same.
    objects = {id(holders): holders for units in unit_holders.values() for holders in units}
    sets = tuple(sorted({*always, *objects.values()}))
    position = {holders: index for index, holders in enumerate(sets)}
    number = {key: position[holders] for key, holders in objects.items()}
    return sets, {name: tuple(number[id(holders)] for holders in units) for name, units in unit_holders.items()}
