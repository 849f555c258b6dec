"""A resolved config for tests of steps, without a store."""

from sfm.distill.resolved_config import ResolvedDistillConfig


def make_resolved_config(*, classes: int, **changes: object) -> ResolvedDistillConfig:
    """Return the config of a run of some classes at 32 px on a CPU, with changes."""
    values = {
        "dataset": "",
        "classes": [f"class{index}" for index in range(classes)],
        "backbone": "",
        "image_size": 32,
        "objective": "sfm",
        "alpha": 1.0,
        "ipc": 1,
        "centres": "sub-class",
        "views": 1,
        "steps": 100,
        "learning_rate": 1e-2,
        "final_rate": 1.0,
        "grow_every": 4,
        "seed": 0,
        "micro_batch": 6,
        "gradient": "exact",
        "graphs": 0,
        "device": "cpu",
        "precision": "float32",
        "devices": 1,
        "threads": 1,
    }
    return ResolvedDistillConfig.model_validate(values | changes)
