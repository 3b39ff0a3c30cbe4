"""The prepared optimizer of an SDP model: Accelerate's, with a vote of all workers before each step."""

from accelerate.optimizer import AcceleratedOptimizer

from ..engine.optimizer import model_of
from ..engine.vote import Watch, all_take_step


class VotingOptimizer(AcceleratedOptimizer):
    """Accelerate's wrapper, of which an instance becomes this class (:meth:`take_place`).

    A step that the workers have voted down is told as Accelerate tells of one that a loss scaler skipped
    (``step_was_skipped``): the Trainer, and schedulers that Accelerate has prepared, then leave out theirs.
    """

    watch: Watch
    at_step: int | None
    num_steps: int

    @classmethod
    def take_place(cls, optimizer: AcceleratedOptimizer, watch: Watch) -> None:
        optimizer.__class__ = cls
        assert isinstance(optimizer, cls)
        # at_step: what the host calls the step; without it, they are counted.
        optimizer.watch, optimizer.at_step, optimizer.num_steps = watch, None, 0

    def zero_grad(self, set_to_none=None):
        if self.gradient_state.sync_gradients:
            self.watch.forget()  # the gradients are not taken
        super().zero_grad(set_to_none)

    def step(self, closure=None):
        if self.gradient_state.sync_gradients:
            self.num_steps += 1
            model, has_scaler = model_of(self.optimizer), self.scaler is not None
            assert model is not None  # only such an optimizer becomes one of these
            number = self.num_steps if self.at_step is None else self.at_step
            self._is_overflow = not all_take_step(model, self.optimizer, self.watch, number, finite=not has_scaler)
            if self._is_overflow:
                return
        super().step(closure)
