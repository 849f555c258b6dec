"""Corrected means: targets on which an early-stopped head is trained better than on the class means."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from sfm.distill.config import DistillConfig
from sfm.distill.corrected_means import (
    CorrectionOptions,
    compute_head_error_bound,
    correct_centres,
    estimate_ceiling,
    fit_early_stopped_head,
    measure_accuracy_on_gaussian_samples,
)
from sfm.distill.run import distill
from sfm.distill.run_estimate import estimate_distillation
from sfm.errors import InputError
from sfm.random_streams import make_rng
from sfm.stats_store.class_moments import Float64Array

CLASSES, FEATURES = 4, 24
BRIEF = CorrectionOptions(distance_weight=3, max_iterations=15)


@pytest.fixture(scope="module")
def means() -> Float64Array:
    """Class means of features that are positive, as behind a ReLU."""
    return 0.5 + 0.4 * make_rng(0, 1).random((CLASSES, FEATURES))


@pytest.fixture(scope="module")
def covariance() -> Float64Array:
    """Covariance within classes, most of it along a few directions."""
    loadings = make_rng(0, 2).standard_normal((FEATURES, 3))
    return 0.02 * (loadings @ loadings.T) + 0.002 * np.eye(FEATURES)


@pytest.fixture(scope="module")
def corrected(means: Float64Array, covariance: Float64Array) -> Float64Array:
    return correct_centres(means, means[:, None], covariance, BRIEF)


def cosine(first: Float64Array, second: Float64Array) -> float:
    """Cosine between the deviations of centres from their mean, which the flow is proportional to."""
    one, other = (each.reshape(-1, FEATURES) - each.reshape(-1, FEATURES).mean(0) for each in (first, second))
    return float((one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum()))


def train_as_evaluated(centres: Float64Array) -> torch.Tensor:
    """Train a head by torch's Adam: 1,000 epochs, cosine to zero, from zero, with a bias."""
    rows = torch.from_numpy(centres).flatten(0, 1)
    labels = torch.arange(len(centres)).repeat_interleave(centres.shape[1])
    head = torch.nn.Linear(FEATURES, len(centres), dtype=torch.float64)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3 * len(rows) / 256)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)
    for _ in range(1000):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(rows), labels).backward()
        optimizer.step()
        scheduler.step()
    return head.weight.detach()


def test_the_head_in_thirty_steps_is_the_one_of_a_thousand(means: Float64Array) -> None:
    centres = means[:, None]
    quick = fit_early_stopped_head(torch.from_numpy(centres), 30).flatten()
    assert torch.cosine_similarity(quick, train_as_evaluated(centres).flatten(), dim=0) > 0.97


def test_recomputing_the_steps_of_a_large_head_gives_the_same_gradient(
    means: Float64Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = []
    for limit in (2**22, 0):
        monkeypatch.setattr("sfm.distill.corrected_means.MAX_STEPPED_WEIGHTS", limit)
        centres = torch.from_numpy(means[:, None].copy()).requires_grad_()
        fit_early_stopped_head(centres, 30).square().sum().backward()
        gradients.append(centres.grad)
    assert torch.equal(*gradients)


def test_the_bound_is_the_error_of_two_classes_and_above_that_of_more(
    means: Float64Array, covariance: Float64Array
) -> None:
    for classes in (2, CLASSES):
        arrays = means[:classes] - means.mean(0), means[:classes], 4 * covariance
        error = 1 - measure_accuracy_on_gaussian_samples(*arrays, seed=0)
        bound = float(compute_head_error_bound(*map(torch.from_numpy, arrays)))
        assert error > 0.05
        assert bound == pytest.approx(error, abs=0.005) if classes == 2 else bound > error


def test_a_head_trained_on_corrected_means_has_more_drawn_samples_right(
    means: Float64Array, covariance: Float64Array, corrected: Float64Array
) -> None:
    real, better = (estimate_ceiling(means, each, covariance, seed=5) for each in (means[:, None], corrected))
    assert better > real + 0.02
    assert 0.8 < cosine(corrected, means) < 0.999


def test_a_heavier_distance_keeps_the_targets_nearer(
    means: Float64Array, covariance: Float64Array, corrected: Float64Array
) -> None:
    heavy = CorrectionOptions(distance_weight=300, max_iterations=15)
    near = correct_centres(means, means[:, None], covariance, heavy)
    assert cosine(near, means) > cosine(corrected, means)


def test_isotropic_classes_hardly_change_their_flow(
    means: Float64Array, covariance: Float64Array, corrected: Float64Array
) -> None:
    """What is left is the difference between a head of Adam and the means."""
    isotropic = np.eye(FEATURES) * np.trace(covariance) / FEATURES
    assert cosine(correct_centres(means, means[:, None], isotropic), means) > 0.98
    assert cosine(corrected, means) < 0.95


def test_neither_order_nor_sign_of_classes_and_features_matters(
    means: Float64Array, covariance: Float64Array, corrected: Float64Array
) -> None:
    """Adam works on each number alone: those are the symmetries of a head, other rotations are not."""
    rng = make_rng(0, 3)
    classes, features = rng.permutation(CLASSES), rng.permutation(FEATURES)
    signs = rng.choice([-1.0, 1.0], FEATURES)
    shuffled = means[classes][:, features] * signs
    other = correct_centres(
        shuffled, shuffled[:, None], covariance[np.ix_(features, features)] * np.outer(signs, signs), BRIEF
    )
    np.testing.assert_allclose(other, corrected[classes][..., features] * signs, atol=2e-3)


def test_equal_statistics_give_equal_bits(
    means: Float64Array, covariance: Float64Array, corrected: Float64Array
) -> None:
    assert np.array_equal(correct_centres(means, means[:, None], covariance, BRIEF), corrected)


@pytest.fixture(scope="session")
def spread_store(
    tmp_path_factory: pytest.TempPathFactory, features: np.ndarray, publish_entry: Callable[..., str]
) -> str:
    """The entry ``patterns`` with moments, and ``equal``, whose samples do not vary within classes."""
    path = tmp_path_factory.mktemp("store")
    deviations = features - features.mean(1, keepdims=True)
    arrays = {
        "train/count": np.full(len(features), features.shape[1]),
        "train/mean": features.mean(1),
        "train/within_scatter": np.einsum("csf,csg->fg", deviations, deviations),
        "train/centre_2": features.reshape(len(features), 2, 4, -1).mean(2).astype(np.float32),
        "train/centre_count_2": np.full((len(features), 2), 4),
    }
    publish_entry(path, "patterns", arrays)
    publish_entry(
        path, "equal", arrays | {"train/within_scatter": np.zeros_like(arrays["train/within_scatter"])}
    )
    return str(path)


@pytest.fixture
def correcting(config: DistillConfig, spread_store: str, monkeypatch: pytest.MonkeyPatch) -> DistillConfig:
    monkeypatch.setattr(CorrectionOptions.__init__, "__defaults__", (100.0, 0.01, 3))
    return config.model_copy(update={"store": spread_store, "objective": "sfm-corrected", "steps": 2})


def test_a_run_records_its_targets_and_what_they_allow(correcting: DistillConfig) -> None:
    distill(correcting.model_copy(update={"ipc": 2}))
    record = json.loads((correcting.out / "run.json").read_text())
    assert record["resolved"]["feature_decay"] == 0.9
    assert record["targets"]["digest"] == record["resolved"]["targets"]
    (target,) = record["targets"]["backbones"]
    assert 0.5 < target["cosine"] < 1
    assert 0 < target["ceilings"]["real"] <= target["ceilings"]["corrected"] <= 1


def test_images_are_written_before_their_targets_are_estimated(
    correcting: DistillConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PulledPlugError(Exception):
        pass

    def pull_the_plug(*_: object) -> None:
        raise PulledPlugError

    with monkeypatch.context() as patch:
        patch.setattr("sfm.distill.run.estimate_targets", pull_the_plug)
        with pytest.raises(PulledPlugError):
            distill(correcting)
    assert len(list(correcting.out.glob("images/*/*.png"))) == 4
    assert json.loads((correcting.out / "run.json").read_text())["targets"].keys() == {"digest", "options"}
    record = distill(correcting.model_copy(update={"resume": True})).record
    assert len(record["targets"]["backbones"]) == 1
    assert json.loads((correcting.out / "run.json").read_text()) == record


def test_a_dry_run_tells_what_targets_allow(correcting: DistillConfig) -> None:
    (computed,) = estimate_distillation(correcting).backbones
    (own,) = estimate_distillation(correcting.model_copy(update={"objective": "sfm"})).backbones
    assert computed.targets
    assert own.targets
    assert own.targets.cosine == 1
    assert own.targets.ceilings.corrected is None
    assert own.targets.ceilings.real == computed.targets.ceilings.real
    assert not correcting.out.exists()


def test_the_correction_is_among_the_classes_that_are_distilled(
    correcting: DistillConfig, features: np.ndarray
) -> None:
    distill(correcting.model_copy(update={"classes": ("class0", "class2")}))
    targets = safetensors.numpy.load_file(correcting.out / "targets.safetensors")
    deviations = (features - features.mean(1, keepdims=True)).reshape(-1, features.shape[-1])
    covariance = deviations.T @ deviations / (len(deviations) - len(features))
    means = features.mean(1)[[0, 2]]
    expected = correct_centres(means, means[:, None], covariance)
    np.testing.assert_allclose(targets["0/own_centres"], expected, atol=1e-3)
    np.testing.assert_array_equal(targets["0/class_means"], targets["0/own_centres"][:, 0])


def test_entries_without_scatter_within_classes_are_refused(
    correcting: DistillConfig, store: str, tmp_path: Path
) -> None:
    for update in ({"store": store}, {"dataset": "equal"}):
        with pytest.raises(InputError, match=r"no scatter within classes .*: extract it again, or choose"):
            distill(correcting.model_copy(update=update))
        (estimate,) = estimate_distillation(
            correcting.model_copy(update=update | {"objective": "sfm"})
        ).backbones
        assert estimate.targets is None
    assert not [path for path in correcting.out.rglob("*") if path.name != ".lock"]
