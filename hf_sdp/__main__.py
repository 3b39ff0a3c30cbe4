"""``python -m hf_sdp``."""

from .cli import main

main()
