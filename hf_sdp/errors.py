"""What hf_sdp raises. Every class is also the built-in exception a caller would expect."""


class SDPConfigError(ValueError):
    """The configuration, the model, or the launched world cannot be used as asked. Nothing was changed."""


class SDPStateError(RuntimeError):
    """A patched model, a checkpoint or another worker is not in the state that is needed: not prepared, damaged, ..."""
