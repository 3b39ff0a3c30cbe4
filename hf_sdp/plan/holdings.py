"""``Holdings``: a plan as arrays, so that what thousands of subnetworks hold is one matrix product."""

from dataclasses import dataclass

import numpy as np

from .holders import Holders
from .plan import Plan


@dataclass(frozen=True)
class Holdings:
    """Units grouped by holder set: there are few sets, however many units.

    Attributes:
        sets: the H distinct holder sets of units, sorted (that of the shared parameters only if units have it too).
        members: which subnetwork is in which set, bool, shape ``(N, H)``.
        units: how many units of each maskable module have which set, int64, shape ``(modules, H)``; in forward order.
    """

    sets: tuple[Holders, ...]
    members: np.ndarray
    units: np.ndarray

    @classmethod
    def of(cls, plan: Plan) -> "Holdings":
        used = sorted({number for units in plan.set_of_unit.values() for number in units})
        column = {number: index for index, number in enumerate(used)}
        sets = tuple(plan.holder_sets[number] for number in used)
        members = np.zeros((plan.num_subnetworks, len(sets)), dtype=bool)
        for index, holders in enumerate(sets):
            members[list(holders), index] = True
        units = [
            np.bincount([column[number] for number in plan.set_of_unit[m.name]], minlength=len(sets))
            for m in plan.modules
        ]
        return cls(sets, members, np.stack(units))

    def sets_with(self, chosen: np.ndarray) -> list[Holders]:
        """The sets for which ``chosen``, bool of shape ``(H,)``, is true."""
        return [self.sets[index] for index in np.flatnonzero(chosen)]

    @property
    def num_holders(self) -> np.ndarray:
        """Holders of each set, int64, shape ``(H,)``."""
        return self.members.sum(0)

    def held(self, per_unit: np.ndarray) -> np.ndarray:
        """What each subnetwork holds, shape ``(N,)``.

        ``per_unit``: the amount of one unit of each module, shape ``(modules,)``.
        """
        return self.members @ (per_unit @ self.units)
