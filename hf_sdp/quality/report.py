"""Tables and plots of results."""

from .results import Results


def show(results):
    pass


def write_report(results):
    pass
