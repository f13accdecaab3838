"""The sections of a recipe about the frozen weights: what they are stored in, and where."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from toolkit.recipe.bounds import Positive, Section
from toolkit.recipe.sizes import Size

__all__ = ["PlacementSection", "QuantizationSection"]


class QuantizationSection(Section):
    """What is stored in 8 or 4 bit. Router, norms, embeddings and head always keep their own dtype."""

    experts: Literal["int8", "int4", "mxfp4", "source", "none"] = "int8"
    """Expert stacks: int8 with one scale per output row; int4 or mxfp4, about half of that and coarser; source, which
    keeps the four bits of a checkpoint that has them; or none, the compute dtype. A stack whose inputs are no multiple
    of 64 stays int8."""
    budget: Size | None = None
    """With int4: bytes of all stacks, as 16GiB; as many layers as it holds are int8, those whose loss gains most."""
    linears: Literal["int8", "bnb", "none"] = "int8"
    """Attention, shared-expert and dense linears: weight-only int8; bitsandbytes' `Linear8bitLt`, which rounds
    activations too; or left alone."""
    activations: Literal["none", "int8"] = "none"
    """`int8` splits the rows that experts compute in forward into two int8 digits, for the int8 tensor cores of a card;
    refused before step 1 where it raises the held-out loss by more than 0.5%."""
    error_compensation: Literal["none", "gptq"] = "none"
    """`gptq` rounds the int8 parts again, layer by layer, to keep their outputs on training examples as close as
    possible: same storage and speed, some minutes more before step 1."""
    calibration_samples: Positive = 512
    """Training examples that `gptq` and `budget` look at, up to 262,144 tokens of them."""

    @model_validator(mode="after")
    def _something_to_compensate(self) -> QuantizationSection:
        if self.activations == "int8" and self.experts not in ("int8", "int4"):
            raise ValueError("activations: int8 needs experts: int8 or int4")
        if self.budget is not None and self.experts != "int4":
            raise ValueError("budget says how many layers of int4 are int8 instead: set experts: int4, or remove it")
        if self.error_compensation != "none" and self.experts not in ("int8", "int4") and self.linears != "int8":
            raise ValueError("error_compensation needs experts in int8 or int4, or linears in int8")
        return self


class PlacementSection(Section):
    """Where frozen expert stacks and the embedding table live while the rest of the model is on the device."""

    experts: Literal["auto", "resident", "host", "disk"] = "auto"
    """`auto` keeps every stack on the device if the plan says that it fits, and otherwise streams the fewest layers
    whose copies computation hides well; `resident` never streams; `host` and `disk` stream from pinned memory or from
    an int8 file."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Share of the MoE layers to stream; without it, as many as the plan needs."""
    embedding: Literal["device", "host"] = "device"
    """`host` keeps the embedding table in host memory beside a card, which frees its bytes there and costs one wait for
    the card each pass. Not for models whose head is the same table. On a CPU it changes nothing."""

    @model_validator(mode="after")
    def _something_to_share(self) -> PlacementSection:
        if self.experts == "resident" and self.share is not None:
            raise ValueError("share says how much is streamed, and experts: resident streams nothing: keep one")
        return self
