"""Backbones in mixed precision: as ``torch.autocast`` would have them, with weights converted once."""

import copy
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from sfm.backbones.build import Backbone

Precision = Literal["float32", "bf16"]


class Mixed(nn.Module):
    """A model whose forward pass is in bfloat16 where that is safe, and in float32 elsewhere."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images to features, as the model does."""
        with torch.autocast(images.device.type, torch.bfloat16):
            feature: Tensor = self.model(images)
        return feature


def in_precision(backbone: Backbone, precision: Precision) -> Backbone:
    """Return a backbone that computes in a precision; images and features are float32 all the same.

    Parameters
    ----------
    backbone : Backbone
        Left as it is.
    precision : {"float32", "bf16"}
        "bf16" is what extraction means by it: autocast around the forward pass.
    """
    if precision == "float32":
        return backbone
    model = copy.deepcopy(backbone.model)
    for module in model.modules():
        # Autocast would convert these anew, and keep what it converted, in every forward pass.
        if type(module) in (nn.Linear, nn.Conv2d):
            module.to(torch.bfloat16)
    return replace(backbone, model=Mixed(model))
