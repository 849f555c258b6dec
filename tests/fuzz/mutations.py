"""What a hostile writer changes: a mutation is one JSON object, so that a case can be kept and replayed."""

import contextlib
import copy
import io
import json
import os
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from fuzz.hostile import MAKE, encode_hostile_json
from fuzz.signing import is_small

Json = dict[str, Any]


class InapplicableMutation(Exception):  # noqa: N818 - says something of the case, not of the product
    """A kept case changes something that is not in the seeds any more."""


# -- JSON ----------------------------------------------------------------------------------------------------


def get_json_value(document: Any, path: list[Any]) -> Any:
    """Return the value at a path of keys and positions."""
    for step in path:
        try:
            document = document[step]
        except (KeyError, IndexError, TypeError) as error:
            raise InapplicableMutation(f"no {path} in the document") from error
    return document


def list_json_paths(document: Any, at: tuple[Any, ...] = ()) -> list[list[Any]]:
    """Return the paths of all values of a document; of a long list, those of the first and last."""
    found = [list(at)]
    if isinstance(document, dict):
        for key, value in document.items():
            found += list_json_paths(value, (*at, key))
    elif isinstance(document, list) and document:
        for index in dict.fromkeys((0, len(document) - 1)):
            found += list_json_paths(document[index], (*at, index))
    return found


def change_json(document: Any, change: Json) -> Any:
    """Return a document in which one value is set, deleted, renamed, repeated or taken from elsewhere."""
    path, how = change["path"], change["how"]
    value = copy.deepcopy(change.get("value"))
    if how == "take":
        value = copy.deepcopy(get_json_value(document, change["from"]))
    if not path:
        return {} if how in ("delete", "rename", "repeat") else value
    parent = get_json_value(document, path[:-1])
    get_json_value(parent, path[-1:])
    if how in ("set", "take"):
        parent[path[-1]] = value
    elif how == "delete":
        del parent[path[-1]]
    elif how == "rename":
        if isinstance(parent, dict):
            parent[value if isinstance(value, str) else "x"] = parent.pop(path[-1])
        else:
            parent.reverse()
    elif isinstance(parent, dict):
        parent[f"{path[-1]}_2"] = copy.deepcopy(parent[path[-1]])
    else:
        parent.extend([parent[path[-1]]] * 3)
    return document


def apply_json(file: Path, change: Json) -> None:
    file.write_bytes(encode_hostile_json(change_json(json.loads(file.read_bytes()), change)))


# -- bytes ---------------------------------------------------------------------------------------------------


def make_zlib_bomb(mebibytes: int) -> bytes:
    """Return a small zlib stream of so many mebibytes of zeros."""
    packer = zlib.compressobj(9)
    first = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    check = (mebibytes * 2**20 % 65521) << 16 | 1
    return first + first[2:] * (mebibytes - 1) + b"\x03\0" + check.to_bytes(4, "big")


BLOBS: dict[str, bytes] = {
    "nothing": b"",
    "null": b"null",
    "zeros": bytes(1000),
    "text": b"hello\n",
    "not UTF-8": b"\xff\xfe\x80",
    "escape": b"\x1b]0;owned\x07\x1b[2J\n\x9b31m\n",
    "long line": b"x" * 300_000,
    "many lines": b"a\n" * 100_000,
    "blank lines": b"\n" * 100_000,
    "deep": b"[" * 100_000,
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9999 9999\n%%EndComments\nshowpage\n",
    "icon": b"\0\0\1\0\1\0\0\0\0\0\1\0 \0\xff\xff\xff\x7f\x16\0\0\0",
    "bitmap": b"BM"
    + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "gif": b"GIF89a\xff\xff\xff\xff\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\xff\xff\xff\xff\0\2\2D\1\0;",
    "jpeg": b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff\x03\x01\x11\0\x02\x11\1\x03\x11\1\xff\xd9",
    "portable pixmap": b"P6 60000 60000 255\n",
    "tiff": b"II*\0\x08\0\0\0\1\0\0\1\4\0\xff\xff\xff\xff\xff\xff\xff\x7f\0\0\0\0",
    "gzip": zlib.compress(bytes(100), wbits=31),
    "gzip bomb": zlib.compress(bytes(2**20), 9, wbits=31) * 512,
    "zip": b"PK\x05\x06" + bytes(18),
    "pickle": b"\x80\x04cos\nsystem\n(V touch ../canary/ran\ntR.",
}


def apply_bytes(file: Path, change: Json) -> None:
    """Flip, cut, extend, move, clear or replace bytes; `at` is a share of the file, from 0 to 1."""
    data = bytearray(file.read_bytes())
    how, at = change["how"], int(change.get("at", 0) * max(0, len(data) - 1))
    value = change.get("value")
    if how == "flip" and data:
        data[at] ^= value
    elif how == "cut":
        del data[at:]
    elif how == "remove":
        del data[at : at + value]
    elif how == "extend":
        data += bytes([value]) * 64
    elif how == "clear":
        data[at : at + value] = bytes(len(data[at : at + value]))
    elif how == "splice":
        data[at:at] = data[int(change["from"] * len(data)) :][:value]
    elif how == "number":
        packed = struct.pack(change["format"], value)
        data[at : at + len(packed)] = packed
    elif how == "blob":
        data = bytearray(BLOBS[value])
    if change.get("crc") and len(data) >= 4:
        data[-4:] = struct.pack("<I", google_crc32c.value(bytes(data[:-4])))
    file.write_bytes(data)


# -- what lies at a path -------------------------------------------------------------------------------------


def apply_path(file: Path, change: Json) -> None:
    """Put something else than a file at a path: a link, a pipe, a folder, a huge file, nothing."""
    how = change["how"]
    if how == "link parent":
        # So many folders above the file, but not the whole subject.
        above = [file, *file.parents]
        subject = above.index(_find_canary(file).parent) - 1
        file = above[min(change.get("up", 1), subject - 1)]
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)
    # Cases lie in a folder with the canary in it; how deep, the path itself says.
    canary = Path(os.path.relpath(_find_canary(file), file.parent))
    if how in ("link folder", "link parent"):
        file.symlink_to(canary)
    elif how == "link file":
        file.symlink_to(canary / "mine")
    elif how == "link itself":
        file.symlink_to(file.name)
    elif how == "link zeros":
        file.symlink_to("/dev/zero")
    elif how == "pipe":
        os.mkfifo(file)
    elif how == "folder":
        file.mkdir()
    elif how == "huge":
        with file.open("wb") as out:
            out.truncate(2**36)


PATHS = (
    *(
        "gone",
        "link folder",
        "link file",
        "link itself",
        "link parent",
        "link zeros",
        "pipe",
        "folder",
        "huge",
    ),
)


def _find_canary(file: Path) -> Path:
    return next(parent / "canary" for parent in file.parents if (parent / "canary").is_dir())


# -- chunks and arrays ---------------------------------------------------------------------------------------

BLOSC = {"version": (0, "B"), "flags": (2, "B"), "typesize": (3, "B")} | {
    name: (at, "<I") for at, name in ((4, "nbytes"), (8, "blocksize"), (12, "cbytes"))
}


def apply_blosc(file: Path, change: Json) -> None:
    """Set a field of a chunk's Blosc header, and make its CRC32C right again."""
    data = bytearray(file.read_bytes())
    at, form = BLOSC[change["field"]]
    struct.pack_into(form, data, at, change["value"] & (0xFF if form == "B" else 0xFFFFFFFF))
    data[-4:] = struct.pack("<I", google_crc32c.value(bytes(data[:-4])))
    file.write_bytes(data)


def damage_array(array: Any, how: str) -> Any:
    """Return an array of other values, another shape or another type."""
    spoiled = array.copy()
    flat = spoiled.reshape(-1)
    floating = array.dtype.kind == "f"
    if how in ("nan", "inf") and floating:
        flat[: len(flat) // 2 + 1] = np.nan if how == "nan" else np.inf
    elif how == "one nan" and floating:
        flat[-1] = np.nan
    elif how == "huge":
        flat[:] = np.finfo(array.dtype).max if floating else np.iinfo(array.dtype).max
    elif how == "one huge":
        flat[0] = np.finfo(array.dtype).max if floating else np.iinfo(array.dtype).max
    elif how == "negative":
        flat[:] = -np.abs(flat.astype("f8")).astype(array.dtype) - 1 if array.dtype.kind != "u" else 255
    elif how == "zero":
        flat[:] = 0
    elif how == "one off":
        flat[0] += 1
    elif how == "transposed":
        spoiled = array.T
    elif how == "flat":
        spoiled = flat
    elif how == "deeper":
        spoiled = array[None]
    elif how == "scalar":
        spoiled = flat[:1].reshape(())
    elif how == "empty":
        spoiled = array[:0]
    elif how == "short":
        spoiled = array[:-1]
    elif how == "long":
        spoiled = np.concatenate([array, array])
    elif how == "wide":
        spoiled = np.concatenate([array, array], axis=-1)
    elif how == "vast":
        spoiled = np.zeros((2**29 // max(1, array[:1].nbytes), *array.shape[1:]), array.dtype)
    elif how in ("float64", "int8", "bool", "complex64", "uint64", "float16", "datetime64[ns]"):
        with np.errstate(all="ignore"):
            spoiled = np.nan_to_num(array).astype(how)
    return spoiled


ARRAY_DAMAGE = (
    *("nan", "inf", "one nan", "huge", "one huge", "negative", "zero", "one off", "transposed", "flat"),
    *("deeper", "scalar", "empty", "short", "long", "wide", "vast"),
    *("float64", "int8", "bool", "complex64", "uint64", "float16", "datetime64[ns]"),
)


def apply_array(folder: Path, change: Json) -> None:
    """Write an array anew with valid encoding: only its values, shape or type are wrong."""
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec

    old = zarr.open_array(folder, mode="r", zarr_format=3)
    with np.errstate(all="ignore"):
        spoiled = np.ascontiguousarray(damage_array(old[...], change["how"])).reshape(
            np.shape(damage_array(old[...], change["how"]))
        )
    names = old.metadata.dimension_names or ()
    fits = spoiled.ndim == len(names)
    shutil.rmtree(folder)
    new = zarr.create_array(
        folder,
        shape=spoiled.shape,
        chunks=tuple(max(1, n) for n in spoiled.shape) or "auto",
        dtype=spoiled.dtype,
        compressors=[BloscCodec(cname="zstd"), Crc32cCodec()],
        dimension_names=names if fits else None,
        config={"write_empty_chunks": True},
        zarr_format=3,
    )
    new[...] = spoiled


# -- containers ----------------------------------------------------------------------------------------------

TAR = {
    "name": (0, 100),
    "mode": (100, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "type": (156, 1),
    "link": (157, 100),
    "magic": (257, 8),
    "prefix": (345, 155),
}


def apply_tar(file: Path, change: Json) -> None:
    """Set a field of a member's header, and make its checksum right again."""
    data = bytearray(file.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as tar:
        offsets = [member.offset for member in tar]
    start = offsets[change["member"] % len(offsets)]
    at, length = TAR[change["field"]]
    value = change["value"]
    if isinstance(value, int):
        number = b"%0*o" % (length - 1, value) if 0 <= value < 8 ** (length - 1) else b""
        field = number or b"\x80" + (value % 2 ** (8 * (length - 1))).to_bytes(length - 1, "big")
    else:
        field = str(value).encode("utf-8", "surrogatepass")
    data[start + at : start + at + length] = field[:length].ljust(length, b"\0")
    seal_tar(data, start)
    file.write_bytes(data)


def seal_tar(data: bytearray, start: int) -> None:
    """Make the checksum of the header at an offset right."""
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])


def apply_pax(file: Path, change: Json) -> None:
    """Put an extended header with one hostile record before the first member."""
    record = f"{change['key']}={change['value']}\n".encode("utf-8", "surrogatepass")
    length = len(record) + 3
    record = b"%d " % (length + (length > 97)) + record
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = change.get("type", "x").encode(), len(record)
    block = header.tobuf(tarfile.USTAR_FORMAT) + record + bytes(-len(record) % 512)
    file.write_bytes(block + file.read_bytes())


PNG = {"width": (16, ">I"), "height": (20, ">I")} | {
    name: (at, "B") for at, name in ((24, "depth"), (25, "colour"), (26, "compression"), (28, "interlace"))
}

PNG_CHUNKS: dict[str, tuple[bytes, bytes]] = {
    "text bomb": (b"zTXt", b"key\0\0" + make_zlib_bomb(512)),
    "profile": (b"iCCP", b"p\0\0" + zlib.compress(bytes(2**20), 9)),
    "escape": (b"tEXt", b"Title\0\x1b]0;owned\x07"),
    "palette": (b"PLTE", b"\1\2\3"),
    "transparency": (b"tRNS", b"\xff\xff"),
    "frames": (b"acTL", struct.pack(">II", 2**31 - 1, 0)),
    "exif": (b"eXIf", b"MM\0*\0\0\0\x08\xff\xff" + b"\1\x12\0\3\xff\xff\xff\xff" * 10),
    "data": (b"IDAT", make_zlib_bomb(512)),
}


def make_png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def apply_png(file: Path, change: Json) -> None:
    """Set a field of the header of a PNG file, or put a hostile chunk after it; its CRC is right."""
    data = bytearray(file.read_bytes())
    if "chunk" in change:
        data[33:33] = make_png_chunk(*PNG_CHUNKS[change["chunk"]])
    else:
        at, form = PNG[change["field"]]
        struct.pack_into(form, data, at, change["value"] & (0xFF if form == "B" else 0xFFFFFFFF))
        data[12:33] = data[12:29] + struct.pack(">I", zlib.crc32(data[12:29]))
    file.write_bytes(data)


def apply_safetensors(file: Path, change: Json) -> None:
    """Change the JSON header of a safetensors file, or the length that it says it has."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if change["how"] == "length":
        file.write_bytes((change["value"] % 2**64).to_bytes(8, "little") + data[8:])
        return
    header = encode_hostile_json(change_json(json.loads(data[8 : 8 + length]), change))
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def apply_parquet(file: Path, change: Json) -> None:
    """Write a table anew with a hostile column, cell or description."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(file)
    if "metadata" in change:
        with contextlib.suppress(UnicodeEncodeError):
            described = encode_hostile_json(
                change_json(json.loads(table.schema.metadata[b"huggingface"]), change["metadata"])
            )
            table = table.replace_schema_metadata({"huggingface": described})
    else:
        column = change["column"]
        cells = table[column].to_pylist()
        row = change["row"] % len(cells)
        value = (
            BLOBS.get(change["value"], change["value"])
            if isinstance(change["value"], str)
            else change["value"]
        )
        if column == "image" and isinstance(value, bytes):
            value = cells[row] | {"bytes": value}
        values = [value] * len(cells) if change.get("all") else [*cells[:row], value, *cells[row + 1 :]]
        try:
            changed = pa.array(values)
        except (pa.ArrowException, OverflowError, UnicodeEncodeError):
            changed = (
                pa.array([value] * len(cells)) if isinstance(value, float | bool) else pa.nulls(len(cells))
            )
        table = table.set_column(table.schema.get_field_index(column), column, changed)
    pq.write_table(table, file, row_group_size=change.get("group"))


def apply_idx(file: Path, change: Json) -> None:
    """Set a number of the header of an idx file."""
    data = bytearray(file.read_bytes())
    at = 4 * (change["number"] % (1 + data[3]))
    struct.pack_into(">I", data, at, change["value"] % 2**32)
    file.write_bytes(data)


def apply_lines(file: Path, change: Json) -> None:
    """Replace, repeat or delete a line, or a cell of it, of a text or CSV file."""
    lines = file.read_text(encoding="utf-8").splitlines()
    row = change["row"] % len(lines)
    value = change.get("value")
    text = str(value) if not (isinstance(value, dict) and MAKE in value) else "x" * 100_000
    if change["how"] == "cell":
        separator = "\t" if "\t" in lines[row] else ","
        cells = lines[row].split(separator)
        cells[change["column"] % len(cells)] = text
        lines[row] = separator.join(cells)
    elif change["how"] == "line":
        lines[row] = text
    elif change["how"] == "repeat":
        lines[row:row] = [lines[row]] * 3
    elif change["how"] == "delete":
        del lines[row]
    file.write_bytes("\n".join([*lines, ""]).encode("utf-8", "surrogatepass"))


PICKLES: dict[str, bytes] = {
    "command": b"\x80\x02cos\nsystem\nq\0X\x15\0\0\0touch ../../canary/ranq\1\x85q\2Rq\3.",
    "number": b"\x80\x02K\1.",
    "list": b"\x80\x02]q\0K\1a.",
    "text keys": b"\x80\x02}q\0(K\1K\2u.",
    "nested": b"\x80\x02" + b"]" * 3000 + b"a" * 2999 + b".",
    "nothing": b"",
}


def apply_pickle(file: Path, change: Json) -> None:
    """Put a hostile pickle into a torch checkpoint, or set a number that its pickle holds."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    if "pickle" in change:
        members[name] = PICKLES[change["pickle"]]
    else:
        data = bytearray(members[name])
        # BININT: the sizes of storages and tensors that do not fit a byte or two.
        numbers = [i for i, byte in enumerate(data) if byte in (0x4A, 0x4D, 0x4B)]
        at = numbers[change["number"] % len(numbers)]
        form, mask = {0x4A: ("<I", 2**32), 0x4D: ("<H", 2**16), 0x4B: ("B", 256)}[data[at]]
        struct.pack_into(form, data, at + 1, change["value"] % mask)
        members[name] = bytes(data)
    with zipfile.ZipFile(file, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)


APPLY: dict[str, Callable[[Path, Json], None]] = {
    "json": apply_json,
    "bytes": apply_bytes,
    "path": apply_path,
    "blosc": apply_blosc,
    "array": apply_array,
    "tar": apply_tar,
    "pax": apply_pax,
    "png": apply_png,
    "safetensors": apply_safetensors,
    "parquet": apply_parquet,
    "idx": apply_idx,
    "lines": apply_lines,
    "pickle": apply_pickle,
}


def apply_mutation(file: Path, mutation: Json, again: bool) -> None:
    """Apply a mutation to a file; `again` if another has changed it before and may have left anything.

    Raises
    ------
    InapplicableMutation
        If the file is missing or of another kind than the mutation changes.
    """
    if not os.path.lexists(file):
        if again:
            return
        raise InapplicableMutation(f"there is no {file}")
    if again and mutation["kind"] not in ("path", "array") and not is_small(file):
        return
    try:
        if file.is_file() and not file.is_symlink():
            # It may be another name of the sound file, which stays as it is.
            own = file.with_name("own")
            shutil.copyfile(file, own)
            own.replace(file)
        APPLY[mutation["kind"]](file, mutation)
    except (InapplicableMutation, IndexError, KeyError) as error:
        if not again:
            raise InapplicableMutation(f"{file}: {error}") from error
    except Exception:
        if not again:
            raise
