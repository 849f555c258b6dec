"""Models written out as one function: the same bits, or the model as it was."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from sfm.backbones.execution.tracing import trace, trace_or_eager

EXAMPLE = torch.randn(1, 3, generator=torch.Generator().manual_seed(0))


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
        self.before, self.layer = nn.Identity(), Counted()
        self.after = nn.Sequential(nn.Identity(), nn.ReLU())

    def forward(self, values: Tensor) -> Tensor:
        return values + self.after(self.layer(self.before(values)))


def counted(module: nn.Module) -> bool:
    return isinstance(module, Counted)


def test_a_model_in_blocks_becomes_one_function_of_the_same_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.Identity(), Block())
    before = list(model.modules())
    line = trace_or_eager(model, EXAMPLE, counted)
    assert isinstance(line, fx.GraphModule)
    assert list(model.modules()) == before, "the model is left as it is"
    assert [module for module in line.modules() if counted(module)] == [model[0].layer, model[2].layer]
    assert not any(isinstance(module, nn.Identity | Block) for module in line.modules())
    other = torch.randn(5, 3)
    calls = model[0].layer.calls
    assert torch.equal(line(other), model(other))
    assert model[0].layer.calls == calls + 2, "a layer that stays is called, not written out"


def test_models_are_written_out_by_several_threads() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(*(Block() for _ in range(20))) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        lines = list(pool.map(lambda model: trace(model, counted), models))
    assert all(torch.equal(line(EXAMPLE), model(EXAMPLE)) for line, model in zip(lines, models, strict=True))


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
    """Does something else where no gradient is wanted."""

    def forward(self, values: Tensor) -> Tensor:
        return 2 * values if torch.is_grad_enabled() else 3 * values


class Recognising(nn.Module):
    """Does something else to several that are tensors."""

    def forward(self, values: Tensor) -> Tensor:
        return values - values.mean(0) if isinstance(values, Tensor) and len(values) > 1 else values


class Holding(nn.Module):
    """Multiplies by what it takes for a constant."""

    def forward(self, values: Tensor) -> Tensor:
        with torch.no_grad():
            share = 1 / (1 + values.square())
        return values * share


class Rounded(torch.autograd.Function):
    """Rounds, and passes the gradient on."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Rounding(nn.Module):
    """Has a way back of its own."""

    def forward(self, values: Tensor) -> Tensor:
        return Rounded.apply(3 * values)


class Exponential(torch.autograd.Function):
    """Keeps what it takes, not what it gives."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return values.exp()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (values,) = ctx.saved_tensors
        return gradient * values.exp()


class Saving(nn.Module):
    """Has the gradient of what is written out, to the bit, but keeps something else for it."""

    def forward(self, values: Tensor) -> Tensor:
        return Exponential.apply(2 * values)


class Making(nn.Module):
    """Uses a layer that is not one of its own."""

    def forward(self, values: Tensor) -> Tensor:
        return nn.Softmax(dim=1)(values)


KINDS = [Branching, Casting, Asking, Recognising, Holding, Rounding, Saving, Making]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_no_one_function_stays_itself(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind()
    assert trace_or_eager(model, EXAMPLE, counted) is model
