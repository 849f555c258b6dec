import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfm.backbones import views
from sfm.backbones.crop_edge import CropEdge
from sfm.backbones.crops import draw_crops
from sfm.distill.resample import (
    apply_several_crops_per_image,
    compute_bilinear_taps,
    make_sparse_matrix,
    resample_rows,
)


@given(
    rows=st.integers(1, 12), columns=st.integers(1, 12), per_row=st.integers(1, 4), seed=st.integers(0, 999)
)
def test_resample_rows_and_its_backward_match_dense_matrix_products(
    rows: int, columns: int, per_row: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    places, weights = rng.integers(columns, size=(rows, per_row)), rng.normal(size=(rows, per_row))
    dense = np.zeros((rows, columns))
    np.add.at(dense, (np.arange(rows)[:, None], places), weights)
    matrix = torch.from_numpy(dense).float()
    table = torch.from_numpy(rng.normal(size=(columns, 5))).float().requires_grad_()
    towards = torch.from_numpy(rng.normal(size=(rows, 5))).float()
    result = resample_rows(table, make_sparse_matrix(places, weights, columns, torch.device("cpu")))
    torch.testing.assert_close(result, matrix @ table, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad((result * towards).sum(), table)
    torch.testing.assert_close(gradient, matrix.T @ towards, atol=1e-5, rtol=1e-5)


EDGES = st.sampled_from(["clip", "zero"])


@given(size=st.integers(1, 30), out=st.integers(1, 30), edge=EDGES, seed=st.integers(0, 999))
def test_bilinear_taps_match_the_interpolation_matrix(size: int, out: int, edge: CropEdge, seed: int) -> None:
    rng = np.random.default_rng(seed)
    start, length = rng.uniform(-3, size, 4), rng.uniform(0.1, size + 5, 4)
    mirror = rng.uniform(size=4) < 0.5
    pixels, weights = compute_bilinear_taps(start, length, size, out, mirror, edge)
    dense = np.zeros((4, out, size))
    np.add.at(dense, (np.arange(4)[:, None, None], np.arange(out)[:, None], pixels), weights)
    matrix = views.make_interpolation_matrices(start, length, size, out, mirror, edge=edge).numpy()
    np.testing.assert_allclose(dense, matrix, atol=1e-6)


@given(
    each=st.integers(1, 3),
    count=st.integers(1, 3),
    size=st.integers(8, 20),
    edge=EDGES,
    seed=st.integers(0, 999),
)
@settings(max_examples=30)
def test_apply_several_crops_per_image_matches_apply_crops_and_its_gradient(
    each: int, count: int, size: int, edge: CropEdge, seed: int
) -> None:
    crops = draw_crops(np.random.default_rng(seed), count * each, size, edge=edge)
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    ours, theirs = (
        apply_several_crops_per_image(images, crops, 12),
        views.apply_crops(images.repeat_interleave(each, 0), crops, 12),
    )
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    towards = torch.rand(ours.shape, generator=torch.Generator().manual_seed(seed + 1))
    (one,) = torch.autograd.grad((ours * towards).sum(), images)
    (two,) = torch.autograd.grad((theirs * towards).sum(), images)
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
