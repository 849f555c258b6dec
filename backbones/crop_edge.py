"""What random crops do at the edge of an image. Imports no numpy: the command line reads it at start-up."""

from typing import Literal

CropEdge = Literal["clip", "zero"]
"""Boxes that would be larger than the image are clipped to it, or show zeros outside of it."""
