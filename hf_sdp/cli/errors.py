"""What the command line refuses."""


class CommandError(ValueError):
    """Bad input of a subcommand: printed as one line, exit code 2."""
