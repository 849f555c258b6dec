"""The Distiller: a training loop over synthetic images that can be saved and resumed to the same bits."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfm.backbones.build import Backbone
from sfm.backbones.execution.determinism import (
    deterministic_algorithms,
    deterministic_if_supported,
    tf32_disabled,
)
from sfm.backbones.execution.modes import ExecutionMode
from sfm.backbones.execution.preparation import PreparedModel, count_cuda_graph_bytes, optimize_backbone
from sfm.distill.backbone_entries import open_entries_and_backbones, require_compatible_entries_and_backbones
from sfm.distill.class_indices import find_class_indices
from sfm.distill.config import DistillConfig
from sfm.distill.config_resolution import resolve_distill_config
from sfm.distill.distilled_images import iterate_decoded_pixels
from sfm.distill.execution_choice import should_compile
from sfm.distill.mixed_precision import convert_precision
from sfm.distill.objective import OBJECTIVES, ClassCentres, make_objective, read_or_compute_targets
from sfm.distill.process_group import SINGLE_PROCESS, ProcessGroup
from sfm.distill.resolved_config import ExecutionChoice, ResolvedDistillConfig
from sfm.distill.state_dict import (
    describe_invalid_state_values,
    gather_levels,
    gather_state,
    has_row_per_image,
    list_expected_state_tensors,
    make_state_from_tensors,
)
from sfm.distill.target_file import compute_targets_digest
from sfm.distill.train_step import LossTerm, StepOutput, init_distill_state, train_step
from sfm.errors import InputError
from sfm.events import ProgressCallback, no_progress
from sfm.stats_store.store import Entry


class Distiller:
    """Distil the dataset of a store's entry, one step at a time; writes no file.

    Iterating over a distiller does the remaining steps. Its state can be saved after any step: a
    distiller of the same config that loads it ends with the same bits as one that never stopped.

    Parameters
    ----------
    config : DistillConfig
        Options; unset ones are resolved, see the attribute `config`. `out` is not used.
    entry : Entry, or sequence of Entry
        Statistics of the dataset through the backbone; of several backbones, one entry for each.
    backbone : Backbone, or sequence of Backbone
        The one that the entry was extracted with; several are matched by the same images.
    group : ProcessGroup
        Processes that share the classes. All of them call the same methods in the same order.
    resume_from : ResolvedDistillConfig, optional
        Config of a saved run, which resolves the unset options of `config`.
    targets : sequence of ClassCentres, optional
        Targets of a saved run, one for each backbone; default: read or computed from the entries.
    progress : ProgressCallback
        Called before and after targets are computed.

    Attributes
    ----------
    config : ResolvedDistillConfig
        Resolved values of everything that shapes the images.
    entries : list of Entry
    backbones : list of Backbone
        In their precision; prepared for their execution modes once :meth:`prepare` was called.
    prepared : list of PreparedModel
        What :meth:`prepare` returned; empty before.
    computed_targets : list of ClassCentres
        The centres that the features of each backbone are matched to, if the objective computes them.
    state : DistillState

    Raises
    ------
    InputError
        If an entry was extracted with another backbone, lacks what the config needs, or the entries are not
        of the same data.

    Examples
    --------
    >>> from sfm.api import DistillConfig, Distiller
    >>> config = DistillConfig(store="./store", backbone="lite0", dataset="birds", out="./birds", steps=500)
    >>> distiller = Distiller.from_config(config)  # doctest: +SKIP
    >>> for output in distiller:  # doctest: +SKIP
    ...     print(output.step, output.loss, output.learning_rate, output.resolution)
    >>> images = distiller.decode_images()  # doctest: +SKIP
    """

    def __init__(
        self,
        config: DistillConfig,
        entry: Entry | Sequence[Entry],
        backbone: Backbone | Sequence[Backbone],
        group: ProcessGroup = SINGLE_PROCESS,
        resume_from: ResolvedDistillConfig | None = None,
        targets: Sequence[ClassCentres] | None = None,
        progress: ProgressCallback = no_progress,
    ) -> None:
        self.entries = [entry] if isinstance(entry, Entry) else list(entry)
        self.backbones = [backbone] if isinstance(backbone, Backbone) else list(backbone)
        require_compatible_entries_and_backbones(self.entries, self.backbones)
        self.group = group
        self.backbones = [convert_precision(each, config.precision) for each in self.backbones]
        dataset = self.entries[0].dataset
        indices = find_class_indices(config.classes, dataset)
        if OBJECTIVES[config.objective].compute_targets:
            # Other processors compute other last bits.
            targets = group.call_on_rank0(
                lambda: targets or read_or_compute_targets(self.entries, config, indices, progress)
            )
        else:
            targets = targets or read_or_compute_targets(self.entries, config, indices)
        class_ids = [dataset.class_ids[index] for index in indices]
        views = config.steps * len(class_ids) * config.ipc * config.views
        device = self.backbone.device
        self._optimized: list[tuple[Backbone, PreparedModel]] = []
        if config.execution != "eager" and not should_compile(config.compile, views, device, group):
            self._optimized = [optimize_backbone(each, 1, "input-grad") for each in self.backbones]
        measured = [each for each, _ in self._optimized] or self.backbones
        digests = [each.summary.entry_digest for each in self.entries]
        self.config = resolve_distill_config(config, digests, class_ids, measured, group, resume_from)
        self.computed_targets = list(targets) if OBJECTIVES[config.objective].compute_targets else []
        if self.computed_targets:
            update = {"targets": compute_targets_digest(self.computed_targets)}
            self.config = self.config.model_copy(update=update)
        self.objectives = [make_objective(self.config, each, device) for each in targets]
        self.prepared: list[PreparedModel] = []
        self.state = init_distill_state(self.config, device, group)

    @classmethod
    def from_config(cls, config: DistillConfig, progress: ProgressCallback = no_progress) -> "Distiller":
        """Open the store's entries and the backbones that a config names, and return their distiller.

        Raises
        ------
        InputError
            See :func:`open_entries_and_backbones` and :class:`Distiller`.
        """
        return cls(config, *open_entries_and_backbones(config, progress), progress=progress)

    @property
    def entry(self) -> Entry:
        """Statistics of the dataset through the first backbone."""
        return self.entries[0]

    @property
    def backbone(self) -> Backbone:
        """The first backbone."""
        return self.backbones[0]

    @property
    def feature_counts(self) -> list[int]:
        """Length of each backbone's features."""
        return [backbone.card.features for backbone in self.backbones]

    def prepare(self) -> list[PreparedModel]:
        """Prepare the backbones for the config's execution modes; the first step calls this if needed.

        Returns
        -------
        list of PreparedModel
            One for each backbone. `reason` explains a fallback to another mode, which the config then has,
            too.
        """
        if self.prepared:
            return self.prepared
        choices = [each.execution for each in self.config.matched_backbones]
        with self._computation_settings():
            repeatable = all(map(supports_deterministic_algorithms, self.backbones))
            with deterministic_algorithms(self.backbone.device) if repeatable else nullcontext():
                ready = [
                    self._get_or_optimize_backbone(index, each.mode) for index, each in enumerate(choices)
                ]
        self._optimized = []
        self.backbones, self.prepared = map(list, zip(*ready, strict=True))
        executions = [
            ExecutionChoice(mode=prepared.mode, reason=prepared.reason or choice.reason)
            for prepared, choice in zip(self.prepared, choices, strict=True)
        ]
        self.config = self.config.with_executions(executions).model_copy(update={"repeatable": repeatable})
        if self.backbone.device.type == "cuda":
            # Do not count compilation and graph capture in peak memory.
            torch.cuda.reset_peak_memory_stats(self.backbone.device)
        return self.prepared

    def _get_or_optimize_backbone(self, index: int, mode: ExecutionMode) -> tuple[Backbone, PreparedModel]:
        if self._optimized and mode == "input-grad":
            return self._optimized[index]
        views = self.config.micro_batch * self.config.views
        return optimize_backbone(self.backbones[index], views, mode)

    def step(self) -> StepOutput:
        """Do the next step.

        Raises
        ------
        InputError
            If the loss is not finite, all steps are done, or another process of the group is lost.
        """
        if self.state.step >= self.config.steps:
            raise InputError(f"all {self.config.steps} steps are done: make a config of more steps")
        self.prepare()
        with self._computation_settings():
            return train_step(self.state, self.config, self._make_loss_terms(), self.group)

    def _make_loss_terms(self) -> list[LossTerm]:
        matched = self.config.matched_backbones
        return [
            LossTerm(backbone, objective, each.weight)
            for backbone, objective, each in zip(self.backbones, self.objectives, matched, strict=True)
        ]

    def __iter__(self) -> Iterator[StepOutput]:
        """Do the remaining steps, one per iteration."""
        while self.state.step < self.config.steps:
            yield self.step()

    def run(self) -> list[StepOutput]:
        """Do all remaining steps, and return their outputs."""
        return list(self)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as tensors by name; in a group, rank 0 has that of all images.

        As in torch, the tensors are the distiller's own, which the next step changes: copy them to keep them.
        ``safetensors.torch.save_file`` saves them.
        """
        return {"step": torch.tensor(self.state.step), **gather_state(self.state, self.config, self.group)}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load a state that :meth:`state_dict` returned; the tensors are copied.

        Parameters
        ----------
        state_dict : mapping of str to Tensor
            Of all images, or of those of this process.

        Raises
        ------
        InputError
            If it is not the state of a run with this config.
        """
        tensors = dict(state_dict)
        step = int(tensors.pop("step", torch.tensor(-1)))
        if not 0 <= step <= self.config.steps:
            raise InputError(f"the state is of step {step} of {self.config.steps}")
        expected = list_expected_state_tensors(self.config, step, self.feature_counts, self.group)
        if tensors.keys() != expected.keys():
            names = ", ".join(sorted(tensors.keys() ^ expected.keys()))
            raise InputError(f"the state is not of this config after {step} steps: check {names}")
        rows = self.group.get_own_row_slice(len(self.config.classes), self.config.ipc)
        for name, (_, shape) in expected.items():
            if has_row_per_image(name):
                if len(tensors[name]) == shape[0]:
                    tensors[name] = tensors[name][rows]
                shape = (rows.stop - rows.start, *shape[1:])
            if tensors[name].shape != shape:
                found = tuple(tensors[name].shape)
                raise InputError(f"the state is not of this config: {name} has shape {found}, not {shape}")
        problem = describe_invalid_state_values(tensors, step)
        if problem:
            raise InputError(f"the state holds {problem}")
        self.state = make_state_from_tensors(step, tensors, self.backbone.device, len(self.backbones))

    def gather_levels(self) -> list[Tensor]:
        """Return the pyramids, shapes (C * K, 3, r, r); in a group, rank 0 has all of them."""
        return gather_levels(self.state, self.config, self.group)

    def decode_images(self) -> npt.NDArray[np.uint8]:
        """Return the current images, shape (C, K, canvas, canvas, 3).

        Call it in all processes of a group; rank 0 gets all images.
        """
        decoded = iterate_decoded_pixels(
            self.gather_levels(), self.config.canvas_pixels, self.config.color_decorrelation
        )
        images = np.stack(list(decoded))
        return images.reshape(-1, self.config.ipc, *images.shape[1:])

    def count_cuda_graph_bytes(self) -> int:
        """Return the GPU memory that CUDA graphs hold; torch does not count it as allocated."""
        return sum(map(count_cuda_graph_bytes, self.backbones))

    @contextmanager
    def _computation_settings(self) -> Iterator[None]:
        """Set threads and arithmetic for a while."""
        threads = torch.get_num_threads()
        with ExitStack() as stack:
            if threads != self.config.threads:
                torch.set_num_threads(self.config.threads)
                stack.callback(torch.set_num_threads, threads)
            stack.enter_context(tf32_disabled())
            if self.prepared and self.config.repeatable:
                stack.enter_context(deterministic_algorithms(self.backbone.device))
            yield


def supports_deterministic_algorithms(backbone: Backbone) -> bool:
    """Return whether a backbone's operations have deterministic algorithms on its device."""
    with deterministic_if_supported(backbone) as repeatable:
        return repeatable
