"""Sound things, made once per session by the product itself, that mutations start from."""

import io
import json
import os
import shutil
import struct
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from fuzz.signing import seal_commit
from fuzz.worker import Worker
from PIL import Image

CLASSES = ("finch", "robin", "wren")
SIDE = 24

WEIGHTS = """
import timm, torch
from pathlib import Path
from safetensors.torch import save_file
Path("weights").mkdir()
torch.manual_seed(0)
tensors = timm.create_model("test_vit").state_dict()
save_file(tensors, "weights/w.safetensors")
torch.save(tensors, "weights/w.pth")
"""

INTERRUPTED = """
import sys
import sfm.eval.work_folder
from sfm.start import main
sfm.eval.work_folder.WorkFolder.delete_used_files = lambda self: None
sys.argv = ["sfm", *{argv}]
main()
"""
"""An evaluation that keeps what it would keep if it were killed at its end."""

KILLED = """
import sys
import sfm.distill.run
from sfm.start import main
sfm.distill.run.write_results_and_delete_old_checkpoints = lambda *arguments: sys.exit(9)
sys.argv = ["sfm", *{argv}]
main()
"""
"""A distillation that ends before its images are written."""

EXTRACTING = ("--image-size", 32, "--sub-classes", "2", "--exemplars", 4, "--keep-train-features")
DISTILLING = ("--dataset", "birds", "--ipc", 2, "--checkpoint-every", 2, "--steps", 4, "--threads", 1)
LABELLING = ("--soft-labels", "--label-views", 2)
EVALUATING = ("--seeds", 1, "--epochs", 2, "--views", 1, "--projector-views", 2, "--threads", 1)
MODES = ("linear", "soft", "inherit", "inherit-ridge", "inherit-statistics", "kd", "joint")


@dataclass(frozen=True)
class Seeds:
    """Where the sound things are.

    Attributes
    ----------
    root : Path
        Holds a folder per subject: ``store``, ``run``, ``stopped``, ``folder``, ``shards``, ``tables``,
        ``idx``, ``weights``, ``config``, ``lists``, ``staging``, ``half`` (an evaluation).
    backbone : str
        Spec of a tiny backbone of random weights.
    commits : dict of str to str
        Paths of the store's commits by names that do not depend on any digest.
    """

    root: Path
    backbone: str
    commits: dict[str, str]

    def path(self, subject: str, name: str) -> Path:
        """Return the file of a subject; commits go by their names."""
        return self.root / subject / self.commits.get(name, name)


def make_seeds(root: Path, worker: Worker) -> Seeds:
    """Make one of everything."""
    backbone = f"timm/test_vit@{root / 'weights' / 'w.safetensors'}"

    def sfm(*argv: object, status: int = 0) -> None:
        done = worker(argv, root, seconds=120)
        assert done.status == status, (argv, done)

    sfm("-c", WEIGHTS)
    rng = np.random.default_rng(0)
    birds, fish = draw_images(rng), draw_images(rng)
    write_folder(root / "folder", birds)
    write_folder(root / "fish", fish)
    write_shards(root / "shards", birds)
    write_tables(root / "tables", birds)
    write_idx(root / "idx", birds)
    write_lists(root / "lists")
    on_birds = ("extract", "folder:folder", "--name", "birds", "--store", "store", "--backbone", backbone)
    on_fish = ("extract", "folder:fish", "--store", "store", "--backbone", backbone)
    sfm(*on_birds, *EXTRACTING, "--tune-fraction", 0.25, "--threads", 1)
    sfm(*on_fish, *EXTRACTING, "--threads", 1)
    sfm(*on_fish, *EXTRACTING, "--threads", 1, "--replace", "--rehash")
    sfm("store", "merge", "store", "birds", "fish", "--name", "union", "--threads", 1)
    sfm("store", "rm", "store", "union")
    distilling = ("distill", "--store", "store", "--backbone", backbone, *DISTILLING)
    sfm(*distilling, *LABELLING, "--out", "run")
    modes = [word for mode in MODES for word in ("--mode", mode)]
    evaluating = ("evaluate", "run", "--store", "store", *EVALUATING, *modes)
    sfm(*evaluating, "--save")
    sfm("-c", INTERRUPTED.format(argv=[*map(str, evaluating), "--out", "half"]))
    (root / "half" / "evaluation.json").unlink()
    sfm("-c", KILLED.format(argv=[*map(str, distilling), "--out", "stopped"]), status=9)
    shutil.rmtree(root / "stopped" / "checkpoint" / "step_00000004")
    write_staging(root, sfm, backbone)
    write_configs(root, backbone)
    shutil.rmtree(root / "store" / "staging", ignore_errors=True)
    commits = assign_run_ids(root / "store")
    leave_abandoned_files(root / "store")
    return Seeds(root, backbone, commits)


def draw_images(rng: np.random.Generator) -> dict[tuple[str, int, int], npt.NDArray[np.uint8]]:
    """Return grey noise, brighter by class, by split, class and number."""
    counts = {"train": 8, "test": 4}
    return {
        (split, label, number): (rng.integers(0, 120, (SIDE, SIDE)) + 60 * label).clip(0, 255).astype("u1")
        for split, count in counts.items()
        for label in range(len(CLASSES))
        for number in range(count)
    }


def encode_png(pixels: npt.NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_folder(root: Path, images: dict[tuple[str, int, int], npt.NDArray[np.uint8]]) -> None:
    for (split, label, number), pixels in images.items():
        file = root / split / CLASSES[label] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_png(pixels))


def write_shards(root: Path, images: dict[tuple[str, int, int], npt.NDArray[np.uint8]]) -> None:
    """Write two shards per split; labels are members of their own in one, in JSON in the other."""
    root.mkdir()
    for split in ("train", "test"):
        for shard in (0, 1):
            with tarfile.open(root / f"{split}-{shard}.tar", "w") as tar:
                for (own, label, number), pixels in images.items():
                    if own != split or number % 2 != shard:
                        continue
                    about = (
                        ("cls", b"%d" % label) if shard else ("json", json.dumps({"label": label}).encode())
                    )
                    for ending, data in (("png", encode_png(pixels)), about):
                        member = tarfile.TarInfo(f"{label}{number}.{ending}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))


def write_tables(root: Path, images: dict[tuple[str, int, int], npt.NDArray[np.uint8]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir()
    features = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for split in ("train", "test"):
        own = {key: pixels for key, pixels in images.items() if key[0] == split}
        cells = [
            {"bytes": encode_png(pixels), "path": f"{key[1]}/{key[2]}.png"} for key, pixels in own.items()
        ]
        table = pa.table({"image": cells, "label": [key[1] for key in own]})
        pq.write_table(table.replace_schema_metadata(metadata), root / f"{split}-00000-of-00001.parquet")


def write_idx(root: Path, images: dict[tuple[str, int, int], npt.NDArray[np.uint8]]) -> None:
    root.mkdir()
    for split, prefix in (("train", "train"), ("test", "t10k")):
        own = {key: pixels for key, pixels in images.items() if key[0] == split}
        header = struct.pack(">4B3I", 0, 0, 8, 3, len(own), SIDE, SIDE)
        stacked = np.stack(list(own.values())).tobytes()
        (root / f"{prefix}-images-idx3-ubyte").write_bytes(header + stacked)
        labels = bytes(key[1] for key in own)
        (root / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, len(own)) + labels)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")


def write_lists(root: Path) -> None:
    """Write a list of classes to distil, and one that says what label numbers mean."""
    root.mkdir()
    (root / "classes.txt").write_text("# two of them\nfinch\nwren\n")
    (root / "names.txt").write_text("finch\tFinch\nrobin\tRobin redbreast\nwren\n")


def write_staging(root: Path, sfm: object, backbone: str) -> None:
    """Make the staging folder of an extraction that stopped at a damaged shard, which is whole again."""
    shard = root / "shards" / "train-1.tar"
    whole, then = shard.read_bytes(), shard.stat()
    shard.write_bytes(whole.replace(b"IDAT", b"IDXX"))
    os.utime(shard, ns=(then.st_atime_ns, then.st_mtime_ns))
    sfm(  # type: ignore[operator]
        *("extract", "wds:shards", "--store", "elsewhere", "--staging", "staging", "--backbone", backbone),
        *("--image-size", 32, "--sub-classes", "2", "--threads", 1),
        status=2,
    )
    shard.write_bytes(whole)
    os.utime(shard, ns=(then.st_atime_ns, then.st_mtime_ns))
    shutil.rmtree(root / "elsewhere", ignore_errors=True)


def write_configs(root: Path, backbone: str) -> None:
    """Write a configuration per command that takes one."""
    folder = root / "config"
    folder.mkdir()
    recorded = {
        "distill": json.loads((root / "run" / "run.json").read_bytes()),
        "evaluate": json.loads((root / "run" / "evaluation.json").read_bytes()),
        "extract": {"command": "extract", "config": {"source": f"folder:{root}/folder", "sub_classes": [2]}},
        "report": {"command": "report", "config": {"runs": [str(root / "run")], "store": []}},
        "export": {"command": "export", "config": {"run": str(root / "run"), "format": "parquet"}},
    }
    recorded["extract"]["config"] |= {"backbone": [backbone], "image_size": 32, "threads": 1, "store": "new"}
    for command, record in recorded.items():
        (folder / f"{command}.json").write_text(json.dumps(record, indent=1))


def leave_abandoned_files(store: Path) -> None:
    """Leave in a store what writers that were killed leave: a run without a commit, and staged work."""
    shutil.copytree(store / "runs" / make_run_id("fish-1"), store / "runs" / ("ab" * 16))
    staged = store / "staging" / ("cd" * 16) / "found"
    staged.mkdir(parents=True)
    (staged / "train-000000.json").write_text("{}")
    for file in (*store.rglob("*"), store):
        os.utime(file, (file.stat().st_atime, file.stat().st_mtime - 100 * 86400))


def make_run_id(name: str) -> str:
    """Return the id that the run of a commit gets: cases name it, in every session."""
    return name.encode().hex().ljust(32, "0")[:32]


def assign_run_ids(store: Path) -> dict[str, str]:
    """Give every run an id that is the same in every session; return the commits by name."""
    named = {}
    for file in sorted(store.glob("index/*/*/*/*.json")):
        commit = json.loads(file.read_bytes())["commit"]
        summary = commit["summary"]
        role = "" if summary["role"] == "full" else f"-{summary['role']}"
        name = f"{summary['dataset']}{role}-{summary['generation']}"
        run = make_run_id(name)
        if commit["kind"] == "entry":
            (store / "runs" / commit["run"]).rename(store / "runs" / run)
        commit["run"] = run
        file.write_bytes(seal_commit(commit))
        named[f"commit/{name}"] = file.relative_to(store).as_posix()
    return named
