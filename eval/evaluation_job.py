"""Open and check everything that the evaluation of one run needs, before anything is trained."""

from collections.abc import Sequence
from dataclasses import dataclass

from sfm.backbones.build import Backbone
from sfm.errors import InputError
from sfm.eval.class_subset import ClassSubsetStatistics
from sfm.eval.config import EvaluateConfig
from sfm.eval.distilled_labels import read_run_soft_labels, require_soft_labels_of_images
from sfm.eval.distilled_run import DistilledRun, ForeignRecord
from sfm.eval.evaluated_backbones import (
    EvaluatedBackbone,
    LoadBackbone,
    load_evaluated_backbones,
    open_source_statistics,
    reuse_or_load_teacher_backbone,
)
from sfm.eval.mode_training import TARGET_FEATURE_MODES
from sfm.eval.result import NoteText
from sfm.soft_label_files import SoftLabels
from sfm.stats_store.cards import Summary
from sfm.stats_store.digests import compute_array_digest
from sfm.stats_store.store import Entry, Store


@dataclass(frozen=True)
class EvaluationJob:
    """One run to evaluate, with everything it needs opened and checked.

    Attributes
    ----------
    config : EvaluateConfig
    run : DistilledRun
    store : Store
    all_source_statistics : list of ClassSubsetStatistics
        The statistics distilled from, of every backbone distilled on.
    eval_backbones : list of EvaluatedBackbone
        The backbones to evaluate on.
    teacher : EvaluatedBackbone or None
        The first backbone distilled on, where a mode needs its features on another backbone, or real images
        need its labels.
    soft_labels : SoftLabels or None
        Of the distilled images, where mode ``soft`` needs them.
    notes : list of NoteText
        Notes for the result that are known before training.
    """

    config: EvaluateConfig
    run: DistilledRun
    store: Store
    all_source_statistics: list[ClassSubsetStatistics]
    eval_backbones: list[EvaluatedBackbone]
    teacher: EvaluatedBackbone | None
    soft_labels: SoftLabels | None
    notes: list[NoteText]

    @property
    def first_source_statistics(self) -> ClassSubsetStatistics:
        """The statistics of the first backbone distilled on."""
        return self.all_source_statistics[0]

    def get_teacher_backbone(self, eval_backbone: Backbone) -> Backbone:
        """Return the backbone of the classifier that a backbone inherits.

        A backbone distilled on inherits its own classifier, any other that of the first.
        """
        if eval_backbone.card.hash in [source.entry.backbone.hash for source in self.all_source_statistics]:
            return eval_backbone
        if self.teacher is None:
            raise ValueError("the first backbone distilled on was not loaded")
        return self.teacher.backbone

    @property
    def has_edited_images(self) -> bool | None:
        """Whether the images differ from those that `sfm distill` wrote; None if that is not known."""
        distilled_digest = self.run.record.images
        return None if distilled_digest is None else distilled_digest != compute_array_digest(self.run.pixels)


def prepare_evaluation_job(
    config: EvaluateConfig,
    run: DistilledRun,
    store: Store,
    summaries: Sequence[Summary],
    load_backbone: LoadBackbone,
) -> EvaluationJob:
    """Open and check everything that the evaluation of a run needs.

    Raises the errors of :func:`~sfm.eval.evaluation.evaluate_with_reader`.
    """
    soft_labels = None
    if "soft" in config.mode:
        soft_labels = require_soft_labels_of_images(
            read_run_soft_labels(config.run, run, config.store),
            compute_array_digest(run.pixels),
            config.run,
            run.record,
            config.store,
        )
    all_source_statistics = open_source_statistics(store, run, config.run)
    eval_backbones, notes = load_evaluated_backbones(
        config, run.record, store, summaries, all_source_statistics, load_backbone
    )
    own_hashes = {source.entry.backbone.hash for source in all_source_statistics}
    has_unseen = any(b.backbone.card.hash not in own_hashes for b in eval_backbones)
    teacher = None
    needs_features = has_unseen and bool(TARGET_FEATURE_MODES.intersection(config.mode))
    if needs_features or (soft_labels and "exemplar/role" in all_source_statistics[0].entry):
        try:
            teacher = reuse_or_load_teacher_backbone(
                run.record, store, all_source_statistics[0], eval_backbones, load_backbone
            )
        except InputError as error:
            # Distilled images have their labels in a file: they need no backbone.
            if needs_features:
                raise
            notes.append(f"Real images are left out of mode soft, they cannot be labelled: {error}.")
    if not all_source_statistics[0].has_all_classes:
        was = "have images" if isinstance(run.record, ForeignRecord) else "were distilled"
        class_count = len(all_source_statistics[0].entry.dataset.class_ids)
        notes.append(
            f"{len(run.class_ids)} of the {class_count} classes {was}: held-out samples, "
            f"classifiers and means of the others are left out."
        )
    entries = [statistics.entry for statistics in all_source_statistics]
    notes += describe_differing_classifier_solvers(
        [*entries, *(eval_backbone.statistics.entry for eval_backbone in eval_backbones)]
    )
    return EvaluationJob(
        config, run, store, all_source_statistics, eval_backbones, teacher, soft_labels, notes
    )


def describe_differing_classifier_solvers(entries: Sequence[Entry]) -> list[NoteText]:
    """Return a note if `sfm extract --classifier adam` trained some of the full-data classifiers, not all."""
    solvers = {
        entry.summary.entry_digest: "adam"
        if entry.extraction.options.get("classifier") == "adam"
        else "another"
        for entry in entries
    }
    if len(set(solvers.values())) < 2:
        return []
    names = [
        f"{entry.backbone.spec} at {entry.summary.image_size} px"
        for entry in entries
        if solvers[entry.summary.entry_digest] == "adam"
    ]
    return [
        f"The classifiers of all real images differ in how they were trained: those of "
        f"{', '.join(dict.fromkeys(names))} by adam, the others not. Compare them with care."
    ]


def require_same_held_out_data(jobs: Sequence[EvaluationJob]) -> None:
    """Refuse runs of different data or classes: no matrix can hold them."""
    first, *others = jobs
    for other in others:
        if get_held_out_data_key(other) != get_held_out_data_key(first):
            raise InputError(
                f"{first.config.run} and {other.config.run} are of different data or classes "
                f"({first.run.record.dataset}, {other.run.record.dataset}): evaluate them one by one"
            )


def get_held_out_data_key(job: EvaluationJob) -> tuple[str, str, list[str]]:
    """Return fingerprint, role and classes, which determine the held-out samples of a run."""
    summary = job.first_source_statistics.entry.summary
    return summary.fingerprint, summary.role, job.run.class_ids
