"""The label-robust score of DD-Ranking, for hard labels and linear heads on frozen backbones.

The score compares images with as many random real ones and with all real ones, by heads that are trained on
hard labels by one protocol. With accuracies as fractions, the hard-label recovery is
``HLR = all real - distilled``, the improvement over random ``IOR = distilled - random``, and the score

    LRS = (exp(a) - exp(-1)) / (exp(1) - exp(-1)),    a = w * IOR - (1 - w) * HLR,    w = 1/2.

The package ``ddranking`` (0.2.0) cannot compute it here: it trains networks of its own list from scratch on a
raw dataset, and takes the best epoch and learning rate on the test images. So this is its formula alone.

References
----------
Li et al., DD-Ranking: Rethinking the Evaluation of Dataset Distillation, arXiv 2505.13300.
"""

import math

from sfm.eval.caveats import find_random_baseline
from sfm.eval.result import AccuracyRow, Evaluation

WEIGHT_OF_IMPROVEMENT = 0.5
"""Weight of the improvement over random images; the default of ``ddranking``."""


def compute_label_robust_score(
    distilled_top1: float, random_top1: float, full_data_top1: float, weight: float = WEIGHT_OF_IMPROVEMENT
) -> float:
    """Return the label-robust score of accuracies, all as fractions.

    Examples
    --------
    >>> round(compute_label_robust_score(0.7, 0.5, 0.9), 4)
    0.2689
    """
    improvement, recovery = distilled_top1 - random_top1, full_data_top1 - distilled_top1
    alpha = weight * improvement - (1 - weight) * recovery
    return (math.exp(alpha) - math.exp(-1)) / (math.exp(1) - math.exp(-1))


def add_label_robust_scores(evaluation: Evaluation) -> Evaluation:
    """Return an evaluation whose rows of distilled images in mode ``linear`` have their score.

    A row has none without random real images of the same protocol through the same backbone.
    """
    full_data = {
        (row.backbone, row.image_size): row.top1 for row in evaluation.full_data if row.classifier == "linear"
    }

    def add_score(row: AccuracyRow) -> AccuracyRow:
        full_data_top1 = full_data.get((row.backbone, row.image_size))
        baseline = find_random_baseline(row, evaluation.rows)
        if (row.images, row.mode) != ("distilled", "linear") or baseline is None or full_data_top1 is None:
            return row.model_copy(update={"label_robust_score": None})
        score = compute_label_robust_score(row.top1_mean, baseline.top1_mean, full_data_top1)
        return row.model_copy(update={"label_robust_score": score})

    return evaluation.model_copy(update={"rows": [*map(add_score, evaluation.rows)]})
