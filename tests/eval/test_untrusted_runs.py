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
from sfm.eval.export.cards import cell, code
from sfm.eval.export.config import ExportConfig
from sfm.eval.export.run import export
from sfm.eval.report.commands import OPTIONS, distill_command, evaluate_again
from sfm.eval.report.read import ReportedRun, read_all
from sfm.eval.synthetic import read_run
from sfm.eval.work import KeptFeatures, Work

Damage = Callable[[Path], object]
COLUMNS = "step,loss,learning_rate,resolution,seconds\n"


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def changed(file: str, change: Callable[[dict], object]) -> Damage:
    """Change a JSON document of a run."""

    def damage(run: Path) -> None:
        document = json.loads((run / file).read_text())
        change(document)
        (run / file).write_text(json.dumps(document))

    return damage


def record(**values: object) -> Damage:
    return changed("run.json", lambda document: document.update(values))


def row(**values: object) -> Damage:
    return changed("evaluation.json", lambda document: document["rows"][0].update(values))


def first_class(**values: object) -> Damage:
    return changed("classes.json", lambda document: document[0].update(values))


def text(file: str, content: str | bytes) -> Damage:
    return lambda run: (run / file).write_bytes(content.encode() if isinstance(content, str) else content)


def history(*rows: str) -> Damage:
    return text("history.csv", COLUMNS + "".join(f"{line}\n" for line in rows))


def image_of(run: Path) -> Path:
    return sorted(run.glob("images/*/0.png"))[0]


def pipe(file: str) -> Damage:
    def damage(run: Path) -> None:
        path = run / file if file != "image" else image_of(run)
        path.unlink(missing_ok=True)
        os.mkfifo(path)

    return damage


def link_of_an_image(run: Path) -> None:
    private = run.parent / "private.png"
    image = image_of(run)
    image.rename(private)
    image.symlink_to(private)


def link_of_an_image_to(name: str) -> Damage:
    def damage(run: Path) -> None:
        image = image_of(run)
        image.unlink()
        image.symlink_to(name)

    return damage


def link_of_a_folder(name: str) -> Damage:
    def damage(run: Path) -> None:
        shutil.move(run / name, run.parent / "private")
        (run / name).symlink_to(run.parent / "private")

    return damage


def sheets(count: int) -> Damage:
    def damage(run: Path) -> None:
        for step in range(1000, 1000 + count):
            Image.new("RGB", (1, 1)).save(run / "growth" / f"step_{step}.png")

    return damage


def bomb(run: Path) -> None:
    Image.new("1", (5000, 5000)).save(run / "growth" / "step_00000001.png")


def gigabytes(run: Path) -> None:
    """One image per class of 8192 x 8192 pixels each: files of a few KiB that would take 2 GiB."""
    changed("run.json", lambda document: document.update(canvas=8192, ipc=1))(run)
    for file in run.glob("images/*/1.png"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (record(ipc=10**12), "run.json .* ipc: input should be less"),
        (record(ipc=-1), "ipc: input should be greater"),
        (record(canvas=10**6), "canvas: input should be less"),
        (record(image_size=10**9), "image_size: input should be less"),
        (record(entry_digest="../../etc"), "entry_digest: string should match"),
        (record(fingerprint=""), "fingerprint: string should match"),
        (record(dataset="x" * 2000), "dataset: string should have at most"),
        (record(wall_seconds=float("inf")), "wall_seconds: input should be a finite"),
        (record(loss=float("nan")), "loss: input should be a finite"),
        (record(train_samples=-5), "train_samples"),
        (record(peak_memory_bytes=10**400), "peak_memory_bytes"),
        (
            record(versions={str(number): 1 for number in range(100_000)}),
            "versions: .* at most 1000 are read",
        ),
        (text("run.json", '{"config":' + "[" * 100_000), "recursion limit"),
        (text("run.json", " " * 2**24 + "{}"), "run.json .* too long"),
        (text("classes.json", "[" + "1," * 10**6 + "1]"), "classes.json .* 0: input should be an object"),
        (text("classes.json", "[" * 100_000), "recursion limit"),
        (first_class(name="x" * 20_000), "0.name: string should have at most"),
        (first_class(index=-1), "0.index"),
        (first_class(class_id=7), "0.class_id"),
        (pipe("run.json"), "cannot read run.json: it is not a regular file"),
        (pipe("classes.json"), "cannot read classes.json: it is not a regular file"),
        (pipe("image"), "0.png: it is not a regular file"),
        (pipe("evaluation.json"), "evaluation.json: it is not a regular file"),
        (pipe("history.csv"), "history.csv: it is not a regular file"),
        (link_of_an_image, "0.png is a link that leads out of the run directory"),
        (link_of_an_image_to("nowhere.png"), "0.png: No such file"),
        (link_of_an_image_to("0.png"), "0.png: Too many levels of symbolic links"),
        (link_of_a_folder("images"), "images is a link that leads out"),
        (link_of_a_folder("growth"), "growth is a link that leads out"),
        (gigabytes, "would take 1.9 GiB, their files have 0.0 MiB"),
        (sheets(21), "a run leaves one for each level"),
        (bomb, "step_00000001.png: 5000 x 5000 pixels are more than"),
        (history("1,nan,1,1,1"), "history.csv is not what"),
        (history("1,1e308,1,1,1"), "history.csv is not what"),
        (history("1"), "history.csv is not what"),
        (history("1,1,1,2,1", "2,1,1,1,1"), "history.csv is not what"),
        (history("2,1,1,1,1", "1,1,1,1,1"), "history.csv is not what"),
        (history("1,1,1,99999999,1"), "history.csv is not what"),
        (history("9" * 5000 + ",1,1,1,1"), "history.csv is not what"),
        (history(*(f"{step},1,1,{step},1" for step in range(1, 100))), "history.csv is not what"),
        (text("history.csv", b"\xff\xfe"), "history.csv is not what"),
        (lambda run: os.truncate(run / "history.csv", 2**40), "history.csv is not what"),
        (row(top1_mean=float("nan")), "evaluation.json is not what"),
        (row(top1_mean=1e300), "evaluation.json is not what"),
        (row(seeds=10**30), "evaluation.json is not what"),
        (row(confused=[{"right": -3, "predicted": 0, "count": 1}]), "evaluation.json is not what"),
        (row(confused=[{"right": 10**9, "predicted": 0, "count": 1}]), "figures of other classes"),
        (row(per_class=[0.5] * 1000), "figures of other classes"),
        (row(confusion=[[1], [1, 2]]), "figures of other classes"),
        (row(chosen=[[0]]), "figures of other classes"),
        (changed("evaluation.json", lambda e: e["full_data"][0].update(per_class=[])), "figures of other"),
        (changed("evaluation.json", lambda e: e["provenance"].update(seconds=float("inf"))), "is not what"),
        (text("evaluation.json", "[" * 100_000), "evaluation.json is not what"),
        (lambda run: os.truncate(run / "evaluation.json", 2**40), "evaluation.json is not what"),
    ],
)
def test_what_no_run_leaves_is_refused_in_one_line_before_memory_is_taken(
    run: Path, damage: Damage, told: str
) -> None:
    damage(run)
    with pytest.raises(InputError, match=told) as caught:
        read_all([run], [])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + 2 * len(str(run))


def test_links_that_stay_in_the_run_directory_are_followed(run: Path) -> None:
    before = read_run(run).pixels
    (run / "images").rename(run / "kept")
    (run / "images").symlink_to("kept")
    assert np.array_equal(read_run(run).pixels, before)


def test_a_run_directory_that_is_itself_a_link_is_read(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    assert len(read_run(tmp_path / "link").files) == 20


def weights(change: Callable[[dict[str, np.ndarray]], object], **header: str) -> Damage:
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


def nothing(tensors: dict[str, np.ndarray]) -> None:
    pass


def spoil(tensors: dict[str, np.ndarray]) -> None:
    tensors["weight"][0, 0] = np.nan


def cut(tensors: dict[str, np.ndarray]) -> None:
    tensors["bias"] = tensors["bias"][:3].copy()


def flatten(tensors: dict[str, np.ndarray]) -> None:
    tensors["weight"] = tensors["weight"].reshape(-1)


def widen(tensors: dict[str, np.ndarray]) -> None:
    tensors["bias"] = tensors["bias"].astype(np.float64)


def pipes(run: Path) -> None:
    for file in (run / "classifiers").glob("*.safetensors"):
        file.unlink()
        os.mkfifo(file)


@pytest.mark.parametrize(
    "damage",
    [
        weights(spoil),
        weights(cut),
        weights(flatten),
        weights(widen),
        weights(lambda tensors: tensors.pop("projector_bias", None)),
        weights(nothing, image_size="9" * 5000),
        weights(nothing, class_ids="[" * 100_000),
        weights(nothing, distilled_on_hash="x"),
        weights(nothing, epochs="nan"),
        pipes,
    ],
)
def test_a_saved_classifier_that_no_evaluation_leaves_is_not_exported(
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


def test_kept_features_that_are_not_finite_or_not_as_wide_are_computed_again(tmp_path: Path) -> None:
    import torch

    def keep(features: torch.Tensor) -> None:
        kept = KeptFeatures(Work(tmp_path), "key", features)
        kept.flush(len(features))

    def loaded() -> int:
        return KeptFeatures(Work(tmp_path), "key", torch.zeros(4, 3)).load()

    keep(torch.ones(4, 3))
    assert loaded() == 4
    for other in (
        torch.full((4, 3), torch.nan),
        torch.ones(4, 2),
        torch.ones(5, 3),
        torch.ones(4, 3).double(),
    ):
        keep(other)
        assert loaded() == 0
    (tmp_path / "key-000000000.safetensors").unlink()
    os.mkfifo(tmp_path / "key-000000000.safetensors")
    assert loaded() == 0


def test_kept_rows_that_are_not_finite_or_come_through_a_pipe_are_computed_again(
    run: Path, tmp_path: Path
) -> None:
    (found,) = read_all([run], [])
    work = Work(tmp_path / "work")
    assert found.evaluation
    work.keep_row("a", found.evaluation.rows[0])
    work.keep_row("b", found.evaluation.rows[0].model_copy(update={"top1_mean": 7.0}))
    os.mkfifo(tmp_path / "work" / "c.json")
    assert work.read_row("a") == found.evaluation.rows[0]
    assert work.read_row("b") is None
    assert work.read_row("c") is None


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
def test_names_are_shown_as_they_are_in_markdown(name: str, shown: str) -> None:
    assert cell(name) == shown


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
def test_code_in_markdown_ends_where_it_should(text: str, shown: str) -> None:
    assert code(text) == shown


def test_no_name_of_a_run_leaves_its_place_in_a_card(run: Path, tmp_path: Path) -> None:
    evil = "x`\n\n```\n# evil [l](http://e) <script>|"

    def change(document: dict) -> None:
        document["dataset"] = evil
        document["backbone"]["spec"] = evil
        document["config"]["backbone"] = evil

    changed("run.json", change)(run)
    changed("evaluation.json", lambda e: e.update(notes=[evil]))(run)
    row(backbone=evil)(run)
    export(ExportConfig(run=run, out=tmp_path / "out", format="imagefolder"))
    card = (tmp_path / "out" / "README.md").read_text().partition("\n---\n")[2]
    lines = card.splitlines()
    assert [line for line in lines if line.startswith("# ")] == [lines[1]]
    assert [line for line in lines if line.startswith("```")] == ["```python", "```", "```sh", "```"]
    assert [line for line in lines if "<script" in line and r"\<script" not in line and "`" not in line] == []


def reported(run: Path) -> ReportedRun:
    (found,) = read_all([run], [])
    return found


def test_commands_to_paste_hold_options_of_the_recipe_only(run: Path) -> None:
    assert DistillConfig.model_fields.keys() - {"out", "resume"} == OPTIONS
    config = {"trust_config": True, "config": "theirs.json", "x; y": 1, "resume": True}
    changed("run.json", lambda document: document["config"].update(config))(run)
    words = shlex.split(distill_command(reported(run)))
    assert {"--trust-config", "--config", "--x; y", "--resume"}.isdisjoint(words)
    assert words[words.index("--out") + 1] == f"{run}-again"


def test_commands_to_paste_give_what_a_configuration_file_may_not(run: Path) -> None:
    changed("run.json", lambda document: document["config"].update(classes=["0", "1"], views=1000))(run)
    assert "--views 1000" in distill_command(reported(run))
    assert evaluate_again(run, {"store": "s", "run": str(run), "seeds": 500}).endswith(
        "--store s --seeds 500"
    )


def test_a_history_of_many_steps_is_read(run: Path) -> None:
    history(*(f"{step},0.5,0.02,{1 if step < 50 else 37},{step}.1" for step in range(1, 20_001)))(run)
    assert reported(run).history[-1].step == 20_000
