"""Mixed precision for backbones: ``torch.autocast`` with weights converted once, not in every pass."""

import copy
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from sfm.backbones.build import Backbone

Precision = Literal["float32", "bf16"]


class BFloat16AutocastModel(nn.Module):
    """A model whose forward pass is in bfloat16 where that is safe, and in float32 elsewhere."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images to features, as the model does."""
        with torch.autocast(images.device.type, torch.bfloat16):
            feature: Tensor = self.model(images)
        return feature


def convert_precision(backbone: Backbone, precision: Precision) -> Backbone:
    """Return a backbone that computes in a precision; images and features stay float32.

    Parameters
    ----------
    backbone : Backbone
        Left as it is.
    precision : {"float32", "bf16"}
        "bf16" is autocast around the forward pass, as in extraction.
    """
    if precision == "float32":
        return backbone
    model = copy.deepcopy(backbone.model)
    for module in model.modules():
        # Autocast would convert these in every forward pass, and keep the copies until backward.
        if type(module) in (nn.Linear, nn.Conv2d):
            module.to(torch.bfloat16)
    return replace(backbone, model=BFloat16AutocastModel(model))
