"""Projector and head trained on cross-entropy, together or one after the other.

Both begin where classifier inheritance does: the projector at zero, the head as the classifier that the
store holds. They show what is lost when the inherited classifier is not kept as it is, or when the projector
does not see the other backbone's features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from sfm.eval import inherit, probe
from sfm.eval.accuracy import Heads
from sfm.eval.inherit import Projectors
from sfm.eval.training import Group, Plan, Told, descend, nobody_told


@dataclass(frozen=True)
class Chain:
    """A projector and the head behind it, one pair per seed."""

    projectors: Projectors
    heads: Heads


def chain_gradients(chain: Chain, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradient of each seed's mean cross-entropy: of the projector's two tensors, then the head's.

    With ``Z = X W^T + b``, P the softmax of ``Z A^T + a``, Y the one-hot labels and ``E = (P - Y) / B``:
    ``dA = E^T Z``, ``da = sum E``, ``dW = (E A)^T X``, ``db = sum E A``.

    Parameters
    ----------
    chain : Chain
    features : Tensor, shape (seed, batch, feature)
    labels : Tensor of int64, shape (seed, batch)
    """
    projectors, heads = chain.projectors, chain.heads
    hidden = projected(projectors, features)
    logits = torch.baddbmm(heads.bias[:, None], hidden, heads.weight.transpose(1, 2))
    error = (logits.softmax(-1) - one_hot(labels, logits.shape[-1])) / labels.shape[1]
    back = error @ heads.weight
    return back.transpose(1, 2) @ features, back.sum(1), error.transpose(1, 2) @ hidden, error.sum(1)


def train_joint(
    pool: Tensor, labels: Tensor, classifier: Heads, plan: Plan, on_epoch: Told = nobody_told
) -> Chain:
    """Train projector (Adam at 1e-2 * B / 256) and head (1e-3 * B / 256) together.

    Parameters
    ----------
    pool : Tensor, shape (image, view, feature)
    labels : Tensor of int64, shape (image,)
    classifier : Heads
        One, of the distillation backbone's feature space; what the heads start as.
    plan : Plan
    on_epoch : callable, optional
        Told the epochs done and how many there are.

    Returns
    -------
    Chain
    """
    chain = beginning(pool, classifier, plan.seeds)
    descend(
        [projector_group(chain), head_group(chain)],
        lambda rows, looks: chain_gradients(chain, pool[rows, looks], labels[rows]),
        plan,
        on_epoch,
    )
    return chain


def train_stage(
    pool: Tensor, labels: Tensor, classifier: Heads, plan: Plan, on_epoch: Told = nobody_told
) -> Chain:
    """Train the projector before the fixed inherited classifier, then the head behind the fixed projector.

    Each of the two has all epochs, its own learning rate (see :func:`train_joint`) and its own cosine.

    Parameters
    ----------
    pool, labels, classifier, plan
        As for :func:`train_joint`.
    on_epoch : callable, optional
        Told the epochs done, of twice those of the plan.

    Returns
    -------
    Chain
    """
    chain = beginning(pool, classifier, plan.seeds)
    both = 2 * plan.epochs
    descend(
        [projector_group(chain)],
        lambda rows, looks: chain_gradients(chain, pool[rows, looks], labels[rows])[:2],
        plan,
        lambda done, _: on_epoch(done, both),
    )
    descend(
        [head_group(chain)],
        lambda rows, looks: probe.head_gradients(
            chain.heads, projected(chain.projectors, pool[rows, looks]), labels[rows]
        ),
        plan,
        lambda done, _: on_epoch(plan.epochs + done, both),
    )
    return chain


def beginning(pool: Tensor, classifier: Heads, seeds: int) -> Chain:
    """Return projectors at zero, and a copy of the inherited classifier for every seed."""
    width, features = classifier.weight.shape[2], pool.shape[2]
    return Chain(
        Projectors(pool.new_zeros((seeds, width, features)), pool.new_zeros((seeds, width))),
        Heads(
            classifier.weight.to(pool.dtype).repeat(seeds, 1, 1),
            classifier.bias.to(pool.dtype).repeat(seeds, 1),
        ),
    )


def projected(projectors: Projectors, features: Tensor) -> Tensor:
    """Map features (seed, batch, feature) to the other space: (seed, batch, target feature)."""
    return torch.baddbmm(projectors.bias[:, None], features, projectors.weight.transpose(1, 2))


def projector_group(chain: Chain) -> Group:
    """Return the projectors with their learning rate."""
    return Group([chain.projectors.weight, chain.projectors.bias], inherit.RATE)


def head_group(chain: Chain) -> Group:
    """Return the heads with their learning rate."""
    return Group([chain.heads.weight, chain.heads.bias], probe.RATE)
