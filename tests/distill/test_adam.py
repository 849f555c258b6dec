from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from sfm.distill.adam import adam_step, init_adam

COUNT = 7


@given(cuts=st.lists(st.integers(1, COUNT - 1), unique=True), steps=st.integers(1, 4))
def test_partial_adam_steps_match_torch_adam(cuts: list[int], steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(COUNT, 3, side, side) for side in (1, 2, 5)]
    ours = [torch.randn(shape, generator=generator) for shape in shapes]
    theirs = [level.clone().requires_grad_() for level in ours]
    state, optimizer = init_adam(ours), torch.optim.Adam(theirs, lr=0.02)
    edges = [0, *sorted(cuts), COUNT]
    for _ in range(steps):
        gradients = [torch.randn(shape, generator=generator) for shape in shapes]
        for start, end in pairwise(edges):
            part = slice(start, end)
            adam_step(ours, state, 0.02, part, [gradient[part] for gradient in gradients])
        state.step_count += 1
        for level, gradient in zip(theirs, gradients, strict=True):
            level.grad = gradient
        optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other.detach(), atol=1e-6, rtol=1e-5)
