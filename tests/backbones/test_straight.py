"""Models written out as one function: the same bits, or the model as it was."""

import pytest
import torch
from torch import Tensor, fx, nn

from sfm.backbones.straight import straight

EXAMPLE = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


class Counted(nn.Linear):
    """Counts how often it is called."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.calls = 0

    def forward(self, values: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(values)


class Block(nn.Module):
    """Adds what a layer gives to what it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.layer, self.after = (
            nn.Identity(),
            Counted(),
            nn.Sequential(nn.Identity(), nn.ReLU()),
        )

    def forward(self, values: Tensor) -> Tensor:
        return values + self.after(self.layer(self.before(values)))


def counted(module: nn.Module) -> bool:
    return isinstance(module, Counted)


def test_a_model_in_blocks_becomes_one_function_of_the_same_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.Identity(), Block())
    before = list(model.modules())
    line = straight(model, EXAMPLE, counted)
    assert isinstance(line, fx.GraphModule)
    assert list(model.modules()) == before, "the model is left as it is"
    assert [module for module in line.modules() if counted(module)] == [model[0].layer, model[2].layer]
    assert not any(isinstance(module, nn.Identity | Block) for module in line.modules())
    other = torch.randn(5, 3)
    calls = model[0].layer.calls
    assert torch.equal(line(other), model(other))
    assert model[0].layer.calls == calls + 2, "a layer that stays is called, not written out"


class Branching(nn.Module):
    """Does one thing or another, as its values are."""

    def forward(self, values: Tensor) -> Tensor:
        return values if values.sum() > 0 else -values


class Casting(nn.Module):
    """Multiplies in bfloat16, which is no step of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, values: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.layer(values).float()


class Asking(nn.Module):
    """Does something else where a gradient is wanted."""

    def forward(self, values: Tensor) -> Tensor:
        return 2 * values if torch.is_grad_enabled() and values.requires_grad is True else 3 * values


class Recognising(nn.Module):
    """Does something else to what is not a tensor."""

    def forward(self, values: Tensor) -> Tensor:
        return 2 * values if isinstance(values, Tensor) else 3 * values


@pytest.mark.parametrize("kind", [Branching, Casting, Asking, Recognising])
def test_a_model_that_is_no_one_function_stays_itself(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind()
    assert straight(model, EXAMPLE, counted) is model
