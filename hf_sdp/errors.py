"""What hf_sdp raises. Every class is also the built-in exception a caller would expect."""


class SDPConfigError(ValueError):
    """The configuration, the model, or the launched world cannot be used as asked. Nothing was changed."""


class SDPStateError(RuntimeError):
    """A patched model was used in a way its state does not allow (not prepared, one worker only, ...)."""
