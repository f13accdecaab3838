"""A training step on tensors that have shapes and no memory, so that a plan counts activations."""

from toolkit.rehearsal.step import Step, fake_model, rehearse, run_step

__all__ = ["Step", "fake_model", "rehearse", "run_step"]
