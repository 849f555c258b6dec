"""How a backbone is computed: `prepare` returns its model for one execution mode, or says why not.

Each module is one optimisation and can be deleted without the others. Importing this package loads no
torch: the command line reads :mod:`~sfm.backbones.execution.wait_policy` and
:mod:`~sfm.backbones.execution.allocator` before torch.
"""

from typing import TYPE_CHECKING, Any

from sfm.backbones.execution.modes import ExecutionMode as ExecutionMode
from sfm.backbones.execution.modes import ExecutionOption as ExecutionOption

if TYPE_CHECKING:
    from sfm.backbones.execution.preparation import PreparedModel as PreparedModel
    from sfm.backbones.execution.preparation import make_example_images as make_example_images
    from sfm.backbones.execution.preparation import optimize_backbone as optimize_backbone
    from sfm.backbones.execution.preparation import prepare as prepare


def __getattr__(name: str) -> Any:
    if name not in ("PreparedModel", "make_example_images", "optimize_backbone", "prepare"):
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from sfm.backbones.execution import preparation

    return getattr(preparation, name)
