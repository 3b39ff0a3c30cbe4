"""Of the linear layers of a block: which are column-wise, which are row-wise, and what lies between them."""

from collections.abc import Collection, Iterable

from .base import CannotCut
from .recording import Recording


def columns_and_rows(recording: Recording, number: int, linears: Collection[str]) -> tuple[list[str], list[str]]:
    """Rows: those from whose output no other one is computed. Columns: the last ones before them.

    Args:
        number: of the layer's call.
        linears: names of the block's linear layers, in forward order.
    Returns: columns and rows; neither where no linear layer comes after another one.
    """
    call = recording.calls[number]
    made_by: dict[int, str] = {}
    arguments: dict[str, list[int]] = {}
    for n in range(number + 1, len(recording.calls)):
        inner = recording.calls[n]
        if inner.first >= call.last:
            break
        if inner.module in linears and inner.outputs and inner.outputs[0].operation is not None:
            made_by[inner.outputs[0].operation] = inner.module
            given = [i for i in inner.arguments.values() if i is not None]
            arguments.setdefault(inner.module, []).extend(given)
    nearest: dict[int, frozenset[str]] = {}
    for n in range(call.first, call.last):
        before = _union(nearest.get(i) for i in recording.operations[n].inputs)
        nearest[n] = frozenset({made_by[n]}) if n in made_by else before
    feeds = {name: _union(nearest.get(i) for i in given) for name, given in arguments.items()}
    fed = _union(feeds.values())
    rows = [name for name in linears if feeds.get(name) and name not in fed]
    before_rows = _union(feeds[name] for name in rows)
    # What other layers than rows are computed from is all heads' (compressed keys and values of latent attention).
    shared = _union(of_one for name, of_one in feeds.items() if name not in rows)
    return [name for name in linears if name in before_rows - shared], rows


def read_between(recording: Recording, number: int, columns: Collection[str], rows: Collection[str]) -> set[str]:
    """Parameters from which the rows' inputs are computed, and the columns' outputs are not."""
    first = recording.calls[number].first
    inside = [c for c in recording.calls[number + 1 :] if c.first < recording.calls[number].last]
    made = {o.operation for c in inside if c.module in columns for o in c.outputs}
    waiting = {n for c in inside if c.module in rows for n in c.arguments.values() if n is not None}
    seen: set[int] = set()
    while waiting:
        n = waiting.pop()
        if n >= first and n not in seen and n not in made:
            seen.add(n)
            waiting.update(recording.operations[n].inputs)
    return {name for n in seen for name in recording.operations[n].parameters}


def refuse_what_is_read_elsewhere(recording: Recording, tensors: Iterable[str]) -> None:
    """A tensor that is cut has to be read by its own module: there it is put together, and its gradient masked.

    Raises: CannotCut.
    """
    known = set(tensors)
    for operation in recording.operations:
        for name in known & set(operation.parameters):
            owner = name.rpartition(".")[0]
            if all(recording.calls[n].module != owner for n in recording.within(operation.call)):
                raise CannotCut(f"{name} is read where {owner} is not called")


def _union(sets: Iterable[frozenset[str] | None]) -> frozenset[str]:
    return frozenset(name for some in sets if some for name in some)
