"""``hf-sdp plan``."""

import click

from ..planner import make_plan
from .models import load_config
from .options import json_option, model_argument, sdp_config, sdp_options, workers_option


@click.command()
@model_argument
@workers_option
@sdp_options
@json_option
def plan(model: str, workers: int, as_json: bool, **options) -> None:
    """Who holds what."""
    config = sdp_config(**options)
    made = make_plan(load_config(model), config, config.num_subnetworks or workers)
    print(made.hash)
