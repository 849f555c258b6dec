"""The Distiller: a training loop over synthetic images that can be saved and resumed to the same bits."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.execution.determinism import (
    deterministic_algorithms,
    deterministic_if_supported,
    tf32_disabled,
)
from sfm.backbones.execution.preparation import Prepared, count_cuda_graph_bytes, optimize_backbone
from sfm.backbones.spec import parse_spec
from sfm.distill.activation_memory import (
    choose_kept_graph_image_count,
    choose_micro_batch_size,
    measure_activation_bytes_per_view,
    measure_free_memory_bytes,
)
from sfm.distill.class_indices import find_class_indices
from sfm.distill.config import DistillConfig
from sfm.distill.distilled_images import iterate_decoded_pixels
from sfm.distill.execution_choice import choose_execution, keep_saved_execution, should_compile
from sfm.distill.mixed_precision import convert_precision
from sfm.distill.objective import make_objective, read_target_centres
from sfm.distill.process_group import SINGLE_PROCESS, ProcessGroup
from sfm.distill.resolved_config import (
    ExecutionChoice,
    ResolvedDistillConfig,
    choose_growth_interval,
)
from sfm.distill.state_dict import (
    describe_invalid_values,
    gather_levels,
    gather_state,
    is_per_image,
    list_expected_state_tensors,
    make_state,
)
from sfm.distill.train_step import StepOutput, init_distill_state, train_step
from sfm.errors import InputError
from sfm.events import ProgressCallback, no_progress
from sfm.stats_store.entry_history import list_visible_and_pinned_summaries
from sfm.stats_store.entry_selection import (
    NotExtractedError,
    filter_summaries_by_model,
    open_entry_of_backbone,
)
from sfm.stats_store.extract_command import format_extract_command
from sfm.stats_store.store import Entry, open_store


class Distiller:
    """Distil the dataset of a store's entry, one step at a time; writes no file.

    Iterating over a distiller does the remaining steps. Its state can be saved after any step: a
    distiller of the same config that loads it ends with the same bits as one that never stopped.

    Parameters
    ----------
    config : DistillConfig
        Options; unset ones are resolved, see the attribute `config`. `out` is not used.
    entry : Entry
        Statistics of the dataset through the backbone.
    backbone : Backbone
        The one that the entry was extracted with.
    group : ProcessGroup
        Processes that share the classes. All of them call the same methods in the same order.
    resume_from : ResolvedDistillConfig, optional
        Config of a saved run, which resolves the unset options of `config`.

    Attributes
    ----------
    config : ResolvedDistillConfig
        Resolved values of everything that shapes the images.
    backbone : Backbone
        In its precision; prepared for its execution mode once :meth:`prepare` was called.
    prepared : Prepared or None
        What :meth:`prepare` returned.
    state : DistillState

    Raises
    ------
    InputError
        If the entry was extracted with another backbone, or lacks what the config needs.

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
        entry: Entry,
        backbone: Backbone,
        group: ProcessGroup = SINGLE_PROCESS,
        resume_from: ResolvedDistillConfig | None = None,
    ) -> None:
        if backbone.card.hash != entry.summary.backbone_hash:
            raise InputError(
                f"the entry of {entry.dataset.name} was extracted with another backbone than this "
                f"{backbone.card.spec}: load {entry.summary.backbone} at {entry.summary.image_size} px, "
                "with the same weights"
            )
        self.group, self.entry = group, entry
        self.backbone = convert_precision(backbone, config.precision)
        indices = find_class_indices(config.classes, entry.dataset)
        centres = read_target_centres(
            entry, config.ipc, indices, use_sub_classes=config.centres == "sub-class"
        )
        class_ids = [entry.dataset.class_ids[index] for index in indices]
        views = config.steps * len(class_ids) * config.ipc * config.views
        device = self.backbone.device
        if config.execution == "eager" or should_compile(config.compile, views, device, group):
            self._optimized = None
        else:
            self._optimized = optimize_backbone(self.backbone, 1, "input-grad")
        measured = self._optimized[0] if self._optimized else self.backbone
        self.config = resolve_distill_config(
            config, entry.summary.entry_digest, class_ids, measured, group, resume_from
        )
        self.objective = make_objective(self.config, centres, self.backbone.device)
        self.prepared: Prepared | None = None
        self.state = init_distill_state(self.config, self.backbone.device, group)

    @classmethod
    def from_config(cls, config: DistillConfig, progress: ProgressCallback = no_progress) -> "Distiller":
        """Open the store's entry and the backbone that a config names, and return their distiller.

        Raises
        ------
        InputError
            See :func:`open_entry_and_backbone` and :class:`Distiller`.
        """
        entry, backbone = open_entry_and_backbone(config, progress)
        return cls(config, entry, backbone)

    def prepare(self) -> Prepared:
        """Prepare the backbone for the config's execution mode; the first step calls this if needed.

        Returns
        -------
        Prepared
            `reason` explains a fallback to another mode, which the config then has, too.
        """
        if self.prepared:
            return self.prepared
        choice = self.config.execution
        with self._computation_settings(), deterministic_if_supported(self.backbone) as repeatable:
            if self._optimized and choice.mode == "input-grad":
                self.backbone, self.prepared = self._optimized
            else:
                views = self.config.micro_batch * self.config.views
                self.backbone, self.prepared = optimize_backbone(self.backbone, views, choice.mode)
        self._optimized = None
        execution = ExecutionChoice(mode=self.prepared.mode, reason=self.prepared.reason or choice.reason)
        self.config = self.config.model_copy(update={"execution": execution, "repeatable": repeatable})
        if self.backbone.device.type == "cuda":
            # Do not count compilation and graph capture in peak memory.
            torch.cuda.reset_peak_memory_stats(self.backbone.device)
        return self.prepared

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
            return train_step(self.state, self.config, self.backbone, self.objective, self.group)

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
        expected = list_expected_state_tensors(self.config, step, self.backbone.card.features, self.group)
        if tensors.keys() != expected.keys():
            names = ", ".join(sorted(tensors.keys() ^ expected.keys()))
            raise InputError(f"the state is not of this config after {step} steps: check {names}")
        rows = self.group.own_rows(len(self.config.classes), self.config.ipc)
        for name, (_, shape) in expected.items():
            if is_per_image(name):
                if len(tensors[name]) == shape[0]:
                    tensors[name] = tensors[name][rows]
                shape = (rows.stop - rows.start, *shape[1:])
            if tensors[name].shape != shape:
                found = tuple(tensors[name].shape)
                raise InputError(f"the state is not of this config: {name} has shape {found}, not {shape}")
        problem = describe_invalid_values(tensors, step)
        if problem:
            raise InputError(f"the state holds {problem}")
        self.state = make_state(step, tensors, self.backbone.device)

    def gather_levels(self) -> list[Tensor]:
        """Return the pyramids, shapes (C * K, 3, r, r); in a group, rank 0 has all of them."""
        return gather_levels(self.state, self.config, self.group)

    def decode_images(self) -> npt.NDArray[np.uint8]:
        """Return the current images, shape (C, K, canvas, canvas, 3).

        Call it in all processes of a group; rank 0 gets all images.
        """
        images = np.stack(list(iterate_decoded_pixels(self.gather_levels(), self.config.canvas_pixels)))
        return images.reshape(-1, self.config.ipc, *images.shape[1:])

    def count_cuda_graph_bytes(self) -> int:
        """Return the GPU memory that CUDA graphs hold; torch does not count it as allocated."""
        return count_cuda_graph_bytes(self.backbone)

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


def open_entry_and_backbone(
    config: DistillConfig, progress: ProgressCallback = no_progress
) -> tuple[Entry, Backbone]:
    """Open the store's entry and the backbone that a config names.

    Raises
    ------
    InputError
        If the store holds no such entry, several fit, or the backbone is not the one it was extracted with.
    """
    store = open_store(config.store)
    model = parse_spec(config.backbone).model
    summaries = list_visible_and_pinned_summaries(store, config.dataset)
    try:
        candidates = filter_summaries_by_model(
            summaries, dataset=config.dataset, model=model, image_size=config.image_size
        )
    except NotExtractedError as error:
        line = format_extract_command(
            store, error.stored_entries_of_dataset, config.backbone, config.image_size
        )
        raise InputError(f"{error}; to add it: {line}") from None
    image_size = candidates[0].image_size
    backbone = load_backbone(
        config.backbone,
        image_size=image_size,
        device=config.device,
        fold_norms=config.execution != "eager",
        progress=progress,
    )
    return open_entry_of_backbone(store, candidates, backbone.card), backbone


def resolve_distill_config(
    config: DistillConfig,
    entry_digest: str,
    class_ids: list[str],
    backbone: Backbone,
    group: ProcessGroup = SINGLE_PROCESS,
    resume_from: ResolvedDistillConfig | None = None,
) -> ResolvedDistillConfig:
    """Resolve the unset options of a config by the free memory, the device and the number of steps.

    Parameters
    ----------
    config : DistillConfig
    entry_digest : str
    class_ids : list of str
        Classes to distil.
    backbone : Backbone
        In its precision; the activations of one forward pass are measured.
    group : ProcessGroup
        All its processes get the same result.
    resume_from : ResolvedDistillConfig, optional
        Config of a saved run, whose micro-batch, graphs, threads and execution mode are kept.

    Raises
    ------
    InputError
        If there are more processes than classes, or the backbone is to be compiled and cannot be.
    """
    classes, image_size = len(class_ids), backbone.card.preprocessing.input_size
    if group.size > classes:
        raise InputError(
            f"{classes} classes cannot be shared among {group.size} processes: use fewer --devices"
        )
    images = group.count_rows_per_process(classes, config.ipc)[0]
    micro_batch, graphs = config.micro_batch, config.graphs
    if resume_from:
        micro_batch = micro_batch or resume_from.micro_batch
        graphs = resume_from.graphs if graphs is None else graphs
    if micro_batch is None or graphs is None:
        view_bytes = measure_activation_bytes_per_view(backbone)
        # Processes on one CPU see the same free memory.
        free = measure_free_memory_bytes(backbone.device) // (
            1 if backbone.device.type == "cuda" else group.size
        )
        memory = (images, config.views, view_bytes, free, backbone.device.type)
        # The process with the least free memory decides for all.
        micro_batch = micro_batch or -group.all_reduce_max(-choose_micro_batch_size(*memory))
        graphs = -group.all_reduce_max(-choose_kept_graph_image_count(*memory)) if graphs is None else graphs
    resolved = ResolvedDistillConfig(
        dataset=entry_digest,
        classes=class_ids,
        backbone=backbone.card.hash,
        image_size=image_size,
        objective=config.objective,
        alpha=config.alpha,
        ipc=config.ipc,
        centres=config.centres,
        views=config.views,
        steps=config.steps,
        learning_rate=config.learning_rate,
        final_rate=config.final_rate,
        grow_every=config.grow_every or choose_growth_interval(config.steps, image_size),
        seed=config.seed,
        micro_batch=min(micro_batch, images),
        gradient=config.gradient,
        graphs=min(graphs, images),
        device=backbone.device.type,
        precision=config.precision,
        devices=group.size,
        threads=config.threads or (resume_from.threads if resume_from else torch.get_num_threads()),
    )
    if resume_from is None:
        device = backbone.device
        execution = choose_execution(resolved, config.execution, config.compile, device, group)
        return resolved.model_copy(update={"execution": execution})
    update = {
        "execution": keep_saved_execution(resume_from, config.execution),
        "repeatable": resume_from.repeatable,
        "threads_before": resume_from.with_threads(resolved.threads).threads_before,
    }
    return resolved.model_copy(update=update)
