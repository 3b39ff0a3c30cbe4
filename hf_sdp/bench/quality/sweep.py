"""Learning rates: the best of a sweep for each method, tuned with one seed."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .methods import Method
from .results import Job, Results


@dataclass(frozen=True)
class Tuned:
    """A method of which several learning rates may have been tried.

    Attributes:
        name: of the runs at the best one.
        rate: the best one; None in files that do not say.
        tried: all of them, with the same seed, in order.
    """

    name: str
    rate: float | None
    tried: tuple[float, ...]

    @property
    def is_at_edge(self) -> bool:
        """Then a rate beyond it may be better still."""
        return len(self.tried) > 1 and self.rate in (self.tried[0], self.tried[-1])


def tuned(runs: dict[str, dict[str, dict]]) -> dict[str, Tuned]:
    """Method name without a rate -> which of its runs count. The seed with most rates decides."""
    by_method: dict[str, dict[str, dict[str, dict]]] = {}
    for name, seeds in runs.items():
        by_method.setdefault(name.partition("/")[0], {})[name] = seeds
    found = {}
    for method, names in by_method.items():
        num_rates = Counter(int(seed) for seeds in names.values() for seed in seeds)
        seed = str(min(num_rates, key=lambda seed: (-num_rates[seed], seed)))
        of_seed = {name: seeds[seed] for name, seeds in names.items() if seed in seeds}
        best = min(of_seed, key=lambda name: final_loss(of_seed[name]))
        rates = [run["learning_rate"] for run in of_seed.values() if "learning_rate" in run]
        found[method] = Tuned(best, of_seed[best].get("learning_rate"), tuple(sorted(rates)))
    return found


def final_loss(run: dict) -> float:
    """Comparable also when it is not a number: training that diverged is the worst."""
    loss = run["curve"][-1][1]
    return math.inf if math.isnan(loss) else loss


def at_best_rates(runs: dict[str, dict[str, dict]]) -> dict[str, dict[str, dict]]:
    """Method name without a rate -> seed -> run at its best rate."""
    return {method: runs[best.name] for method, best in tuned(runs).items()}


def tuning_jobs(methods: Sequence[Method], rates: Sequence[float], seed: int) -> list[Job]:
    """The middle rate of every method, so that there is a comparison early; then the others, method by method."""
    middle = statistics.mean(map(math.log, rates))
    first, *others = sorted(dict.fromkeys(rates), key=lambda rate: (round(abs(math.log(rate) - middle), 6), rate))
    return [(m.at(first), seed) for m in methods] + [(m.at(rate), seed) for m in methods for rate in others]


def jobs_at_best(results: Results, methods: Sequence[Method], seeds: Sequence[int]) -> list[Job]:
    """Of methods that have been tuned."""
    best = tuned(results.runs)
    return [(method.at(best[method.name].rate), seed) for method in methods for seed in seeds]


def warnings(runs: dict[str, dict[str, dict]]) -> list[str]:
    """What a reader of a table must know of its learning rates; empty where no method has one of its own."""
    if not any("/" in name for name in runs):
        return []
    found = tuned(runs)
    edges = [f"{method} ({best.rate:g} of {_numbers(best.tried)})" for method, best in found.items() if best.is_at_edge]
    alone = [method for method, best in found.items() if len(best.tried) < 2]
    found_out = {"BEST LEARNING RATE AT THE EDGE OF THE SWEEP": edges, "LEARNING RATE NOT TUNED": alone}
    return [f"{what}: {', '.join(methods)}." for what, methods in found_out.items() if methods]


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
