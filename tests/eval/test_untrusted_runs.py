"""Run directories of others: what `sfm distill` and `sfm evaluate` do not write is refused in one line."""

import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from sfm.distill.config import DistillConfig
from sfm.errors import InputError
from sfm.eval.distilled_run import read_distilled_run
from sfm.eval.export.config import ExportConfig
from sfm.eval.export.hub_cards import escape_markdown, format_inline_code
from sfm.eval.export.run_export import export
from sfm.eval.report.reported_runs import ReportedRun, read_reported_runs
from sfm.eval.report.reproduction_commands import DISTILL_OPTIONS, make_distill_command, make_evaluate_command
from sfm.eval.work_folder import ResumableFeatures, WorkFolder

Damage = Callable[[Path], object]
COLUMNS = "step,loss,learning_rate,resolution,seconds\n"


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def change_json(file: str, change: Callable[[dict], object]) -> Damage:
    """Change a JSON document of a run."""

    def damage(run: Path) -> None:
        document = json.loads((run / file).read_text())
        change(document)
        (run / file).write_text(json.dumps(document))

    return damage


def change_record(**values: object) -> Damage:
    return change_json("run.json", lambda document: document.update(values))


def change_row(**values: object) -> Damage:
    return change_json("evaluation.json", lambda document: document["rows"][0].update(values))


def change_first_class(**values: object) -> Damage:
    return change_json("classes.json", lambda document: document[0].update(values))


def write_text(file: str, content: str | bytes) -> Damage:
    return lambda run: (run / file).write_bytes(content.encode() if isinstance(content, str) else content)


def write_history(*rows: str) -> Damage:
    return write_text("history.csv", COLUMNS + "".join(f"{line}\n" for line in rows))


def find_image(run: Path) -> Path:
    return sorted(run.glob("images/*/0.png"))[0]


def replace_by_pipe(file: str) -> Damage:
    def damage(run: Path) -> None:
        path = run / file if file != "image" else find_image(run)
        path.unlink(missing_ok=True)
        os.mkfifo(path)

    return damage


def link_image(run: Path) -> None:
    private = run.parent / "private.png"
    image = find_image(run)
    image.rename(private)
    image.symlink_to(private)


def link_image_to(name: str) -> Damage:
    def damage(run: Path) -> None:
        image = find_image(run)
        image.unlink()
        image.symlink_to(name)

    return damage


def link_folder(name: str) -> Damage:
    def damage(run: Path) -> None:
        shutil.move(run / name, run.parent / "private")
        (run / name).symlink_to(run.parent / "private")

    return damage


def add_growth_sheets(count: int) -> Damage:
    def damage(run: Path) -> None:
        for step in range(1000, 1000 + count):
            Image.new("RGB", (1, 1)).save(run / "growth" / f"step_{step}.png")

    return damage


def add_decompression_bomb(run: Path) -> None:
    Image.new("1", (5000, 5000)).save(run / "growth" / "step_00000001.png")


def claim_gigabytes(run: Path) -> None:
    """One image per class of 8192 x 8192 pixels each: files of a few KiB that would take 2 GiB."""
    change_json("run.json", lambda document: document.update(canvas=8192, ipc=1))(run)
    for file in run.glob("images/*/1.png"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_record(ipc=10**12), "run.json .* ipc: input should be less"),
        (change_record(ipc=-1), "ipc: input should be greater"),
        (change_record(canvas=10**6), "canvas: input should be less"),
        (change_record(image_size=10**9), "image_size: input should be less"),
        (change_record(entry_digest="../../etc"), "entry_digest: string should match"),
        (change_record(fingerprint=""), "fingerprint: string should match"),
        (change_record(dataset="x" * 2000), "dataset: string should have at most"),
        (change_record(wall_seconds=float("inf")), "wall_seconds: input should be a finite"),
        (change_record(loss=float("nan")), "loss: input should be a finite"),
        (change_record(train_samples=-5), "train_samples"),
        (change_record(peak_memory_bytes=10**400), "peak_memory_bytes"),
        (
            change_record(versions={str(number): 1 for number in range(100_000)}),
            "versions: .* at most 1000 are read",
        ),
        (write_text("run.json", '{"config":' + "[" * 100_000), "recursion limit"),
        (write_text("run.json", " " * 2**24 + "{}"), "run.json .* too long"),
        (
            write_text("classes.json", "[" + "1," * 10**6 + "1]"),
            "classes.json .* 0: input should be an object",
        ),
        (write_text("classes.json", "[" * 100_000), "recursion limit"),
        (change_first_class(name="x" * 20_000), "0.name: string should have at most"),
        (change_first_class(index=-1), "0.index"),
        (change_first_class(class_id=7), "0.class_id"),
        (replace_by_pipe("run.json"), "cannot read run.json: it is not a regular file"),
        (replace_by_pipe("classes.json"), "cannot read classes.json: it is not a regular file"),
        (replace_by_pipe("image"), "0.png: it is not a regular file"),
        (replace_by_pipe("evaluation.json"), "evaluation.json: it is not a regular file"),
        (replace_by_pipe("history.csv"), "history.csv: it is not a regular file"),
        (link_image, "0.png is a link that leads out of the run directory"),
        (link_image_to("nowhere.png"), "0.png: No such file"),
        (link_image_to("0.png"), "0.png: Too many levels of symbolic links"),
        (link_folder("images"), "images is a link that leads out"),
        (link_folder("growth"), "growth is a link that leads out"),
        (claim_gigabytes, "would take 1.9 GiB, their files have 0.0 MiB"),
        (add_growth_sheets(21), "a run leaves one for each level"),
        (add_decompression_bomb, "step_00000001.png: 5000 x 5000 pixels are more than"),
        (write_history("1,nan,1,1,1"), "history.csv is not what"),
        (write_history("1,1e308,1,1,1"), "history.csv is not what"),
        (write_history("1"), "history.csv is not what"),
        (write_history("1,1,1,2,1", "2,1,1,1,1"), "history.csv is not what"),
        (write_history("2,1,1,1,1", "1,1,1,1,1"), "history.csv is not what"),
        (write_history("1,1,1,99999999,1"), "history.csv is not what"),
        (write_history("9" * 5000 + ",1,1,1,1"), "history.csv is not what"),
        (write_history(*(f"{step},1,1,{step},1" for step in range(1, 100))), "history.csv is not what"),
        (write_text("history.csv", b"\xff\xfe"), "history.csv is not what"),
        (lambda run: os.truncate(run / "history.csv", 2**40), "history.csv is not what"),
        (change_row(top1_mean=float("nan")), "evaluation.json is not what"),
        (change_row(top1_mean=1e300), "evaluation.json is not what"),
        (change_row(seeds=10**30), "evaluation.json is not what"),
        (change_row(confused=[{"right": -3, "predicted": 0, "count": 1}]), "evaluation.json is not what"),
        (change_row(confused=[{"right": 10**9, "predicted": 0, "count": 1}]), "accuracies of other classes"),
        (change_row(per_class=[0.5] * 1000), "accuracies of other classes"),
        (change_row(confusion=[[1], [1, 2]]), "accuracies of other classes"),
        (change_row(chosen=[[0]]), "accuracies of other classes"),
        (
            change_json("evaluation.json", lambda e: e["full_data"][0].update(per_class=[])),
            "accuracies of other",
        ),
        (
            change_json("evaluation.json", lambda e: e["provenance"].update(seconds=float("inf"))),
            "is not what",
        ),
        (
            change_json(
                "evaluation.json",
                lambda e: e["provenance"].update(
                    distilled_from_entries=e["provenance"]["distilled_from_entries"] * 10_000
                ),
            ),
            "evaluation.json is not what",
        ),
        (write_text("evaluation.json", "[" * 100_000), "evaluation.json is not what"),
        (lambda run: os.truncate(run / "evaluation.json", 2**40), "evaluation.json is not what"),
    ],
)
def test_invalid_run_files_raise_a_one_line_error_before_memory_is_allocated(
    run: Path, damage: Damage, message: str
) -> None:
    damage(run)
    with pytest.raises(InputError, match=message) as caught:
        read_reported_runs([run], [])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + 2 * len(str(run))


def test_symlinks_within_the_run_directory_are_followed(run: Path) -> None:
    before = read_distilled_run(run).pixels
    (run / "images").rename(run / "kept")
    (run / "images").symlink_to("kept")
    assert np.array_equal(read_distilled_run(run).pixels, before)


def test_a_symlinked_run_directory_is_read(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    assert len(read_distilled_run(tmp_path / "link").image_files) == 20


def change_classifier(change: Callable[[dict[str, np.ndarray]], object], **header: str) -> Damage:
    """Change the tensors or the header of the classifiers that an evaluation saved."""

    def damage(run: Path) -> None:
        from safetensors import safe_open

        for file in (run / "classifiers").glob("*.safetensors"):
            with safe_open(file, framework="numpy") as opened:
                about = opened.metadata() | header
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, file, about)

    return damage


def change_nothing(tensors: dict[str, np.ndarray]) -> None:
    pass


def set_nan(tensors: dict[str, np.ndarray]) -> None:
    tensors["weight"][0, 0] = np.nan


def shorten_bias(tensors: dict[str, np.ndarray]) -> None:
    tensors["bias"] = tensors["bias"][:3].copy()


def flatten_weight(tensors: dict[str, np.ndarray]) -> None:
    tensors["weight"] = tensors["weight"].reshape(-1)


def widen_bias(tensors: dict[str, np.ndarray]) -> None:
    tensors["bias"] = tensors["bias"].astype(np.float64)


def replace_classifiers_by_pipes(run: Path) -> None:
    for file in (run / "classifiers").glob("*.safetensors"):
        file.unlink()
        os.mkfifo(file)


@pytest.mark.parametrize(
    "damage",
    [
        change_classifier(set_nan),
        change_classifier(shorten_bias),
        change_classifier(flatten_weight),
        change_classifier(widen_bias),
        change_classifier(lambda tensors: tensors.pop("projector_bias", None)),
        change_classifier(change_nothing, image_size="9" * 5000),
        change_classifier(change_nothing, class_ids="[" * 100_000),
        change_classifier(change_nothing, distilled_on_hash="x"),
        change_classifier(change_nothing, epochs="nan"),
        replace_classifiers_by_pipes,
    ],
)
def test_an_invalid_saved_classifier_is_not_exported(
    run: Path, fashion_store: str, tmp_path: Path, damage: Damage
) -> None:
    damage(run)
    asked = ExportConfig(
        run=run, out=tmp_path / "out", format="classifier", store=fashion_store, backbone="lite1"
    )
    with pytest.raises(InputError, match="is damaged: evaluate again with --save") as caught:
        export(asked)
    assert "\n" not in str(caught.value)
    assert not asked.out.exists()


def test_stored_features_that_are_not_finite_or_misshapen_are_recomputed(tmp_path: Path) -> None:
    import torch

    def write_features(features: torch.Tensor) -> None:
        kept = ResumableFeatures(WorkFolder(tmp_path), "key", features)
        kept.write_unwritten_views(len(features))

    def count_loaded() -> int:
        return ResumableFeatures(WorkFolder(tmp_path), "key", torch.zeros(4, 3)).load_stored_view_features()

    write_features(torch.ones(4, 3))
    assert count_loaded() == 4
    for other in (
        torch.full((4, 3), torch.nan),
        torch.ones(4, 2),
        torch.ones(5, 3),
        torch.ones(4, 3).double(),
    ):
        write_features(other)
        assert count_loaded() == 0
    (tmp_path / "key-000000000.safetensors").unlink()
    os.mkfifo(tmp_path / "key-000000000.safetensors")
    assert count_loaded() == 0


def test_stored_rows_that_are_invalid_or_pipes_are_recomputed(run: Path, tmp_path: Path) -> None:
    (found,) = read_reported_runs([run], [])
    work = WorkFolder(tmp_path / "work")
    assert found.evaluation
    work.write_row("a", found.evaluation.rows[0])
    work.write_row("b", found.evaluation.rows[0].model_copy(update={"top1_mean": 7.0}))
    os.mkfifo(tmp_path / "work" / "c.json")
    assert work.read_row_if_intact("a") == found.evaluation.rows[0]
    assert work.read_row_if_intact("b") is None
    assert work.read_row_if_intact("c") is None


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("birds [raw]", r"birds \[raw\]"),
        (r"\[x](http://evil)", r"\\\[x\](http://evil)"),
        ("a|b `c` <img src=x>", r"a\|b \`c\` \<img src=x>"),
        ("*b* _i_ ~s~ &lt; $m$", r"\*b\* \_i\_ \~s\~ \&lt; \$m\$"),
        ("two\nlines\x1b[2J", r"two lines\\x1b\[2J"),
    ],
)
def test_escape_markdown_shows_names_literally(name: str, shown: str) -> None:
    assert escape_markdown(name) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("lite0", "`lite0`"),
        ("a`b", "``a`b``"),
        ("`x`", "`` `x` ``"),
        ("a|b", r"`a\|b`"),
        ("a\n```\nb", "````a ``` b````"),
    ],
)
def test_format_inline_code_delimits_any_text(text: str, shown: str) -> None:
    assert format_inline_code(text) == shown


def test_hostile_names_are_escaped_on_a_card(run: Path, tmp_path: Path) -> None:
    evil = "x`\n\n```\n# evil [l](http://e) <script>|"

    def change(document: dict) -> None:
        document["dataset"] = evil
        document["backbone"]["spec"] = evil
        document["config"]["backbone"] = evil
        for each in document.get("backbones", []):
            each["backbone"]["spec"] = evil

    change_json("run.json", change)(run)
    change_json("evaluation.json", lambda e: e.update(notes=[evil]))(run)
    change_row(backbone=evil)(run)
    export(ExportConfig(run=run, out=tmp_path / "out", format="imagefolder"))
    card = (tmp_path / "out" / "README.md").read_text().partition("\n---\n")[2]
    lines = card.splitlines()
    assert [line for line in lines if line.startswith("# ")] == [lines[1]]
    assert [line for line in lines if line.startswith("```")] == ["```python", "```", "```sh", "```"]
    assert [line for line in lines if "<script" in line and r"\<script" not in line and "`" not in line] == []


def read_reported_run(run: Path) -> ReportedRun:
    (found,) = read_reported_runs([run], [])
    return found


def test_reproduction_commands_contain_only_distill_options(run: Path) -> None:
    assert DistillConfig.model_fields.keys() - {"out", "resume", "dry_run"} == DISTILL_OPTIONS
    config = {"trust_config": True, "config": "theirs.json", "x; y": 1, "resume": True}
    change_json("run.json", lambda document: document["config"].update(config))(run)
    words = shlex.split(make_distill_command(read_reported_run(run)))
    assert {"--trust-config", "--config", "--x; y", "--resume"}.isdisjoint(words)
    assert words[words.index("--out") + 1] == f"{run}-again"


def test_reproduction_commands_contain_options_that_need_a_trusted_config(run: Path) -> None:
    change_json("run.json", lambda document: document["config"].update(classes=["0", "1"], views=1000))(run)
    assert "--views 1000" in make_distill_command(read_reported_run(run))
    assert "canvas-pixels" not in make_distill_command(read_reported_run(run))
    change_json("run.json", lambda document: document["config"].update(canvas_pixels=2000))(run)
    assert "--canvas-pixels 2000" in make_distill_command(read_reported_run(run))
    assert make_evaluate_command(run, {"store": "s", "run": str(run), "seeds": 500}).endswith(
        "--store s --seeds 500"
    )


def test_reproduction_commands_turn_off_what_the_run_did_without(run: Path) -> None:
    assert "augmentation" not in make_distill_command(read_reported_run(run))
    config = {"augmentation": False, "color_decorrelation": True, "crop_edge": "zero"}
    change_json("run.json", lambda document: document["config"].update(config))(run)
    words = shlex.split(make_distill_command(read_reported_run(run)))
    assert "--no-augmentation" in words
    assert words[words.index("--crop-edge") + 1] == "zero"
    assert not [word for word in words if "color-decorrelation" in word]


def test_a_history_of_many_steps_is_read(run: Path) -> None:
    write_history(*(f"{step},0.5,0.02,{1 if step < 50 else 37},{step}.1" for step in range(1, 20_001)))(run)
    assert read_reported_run(run).loss_history[-1].step == 20_000
