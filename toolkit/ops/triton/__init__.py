"""The expert computation for CUDA cards. Importing this needs torch and triton, and nothing else that is not ours."""

from toolkit.ops.triton.layer import expert_layer, expert_layer_w8a8

__all__ = ["expert_layer", "expert_layer_w8a8"]
