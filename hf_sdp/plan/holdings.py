"""``Holdings``: a plan as arrays, so that what thousands of subnetworks hold is one matrix product."""

from dataclasses import dataclass

import numpy as np

from .plan import Holders, Plan


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
        # The planner gives units the same tuple many times: by identity, so that not each is hashed, N numbers long.
        distinct = {id(h): h for holders in plan.unit_holders.values() for h in holders}
        sets = tuple(sorted(set(distinct.values())))
        position = {holders: index for index, holders in enumerate(sets)}
        index_of = {key: position[holders] for key, holders in distinct.items()}
        members = np.zeros((plan.num_subnetworks, len(sets)), dtype=bool)
        for index, holders in enumerate(sets):
            members[list(holders), index] = True
        units = [
            np.bincount([index_of[id(h)] for h in plan.unit_holders[m.name]], minlength=len(sets)) for m in plan.modules
        ]
        return cls(sets, members, np.stack(units))

    @property
    def num_holders(self) -> np.ndarray:
        """Holders of each set, int64, shape ``(H,)``."""
        return self.members.sum(0)

    def held(self, per_unit: np.ndarray) -> np.ndarray:
        """What each subnetwork holds, shape ``(N,)``, of an amount given for one unit of each module, shape ``(modules,)``."""
        return self.members @ (per_unit @ self.units)
