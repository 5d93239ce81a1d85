"""Name the formats that are not read, and what to do with each."""

import struct
from pathlib import Path
from typing import NamedTuple

from imnet_prep.errors import SourceError
from imnet_prep.files import PlainFile

START_BYTES = 262  # as many as tell a tar
_WRITE = "write its images into class folders (<folder>/<class>/<image>) with {}, and give the folder"
_CRC32C = 0x82F63B78  # polynomial, reflected


class _Format(NamedTuple):
    """A format: what it is, what to do, the ends of its file names, and what its files begin with at an offset."""

    name: str
    remedy: str
    endings: tuple[str, ...] = ()
    magic: bytes = b""
    offset: int = 0


_TFRECORD = _Format(
    "a TFRecord file", _WRITE.format("tensorflow (tf.data.TFRecordDataset)"), (".tfrecord", ".tfrecords")
)
_URLS = _Format("a list of URLs", "download its images first: imnet-prep download --urls {} --out images")
_LIST = _Format(
    "a list, not images", "give the folder or archive of the images that it names; their class folders are the labels"
)
_FORMATS = (
    _Format(
        "MindRecord already", "use imnet-prep adopt or imnet-prep reshard on its folder",
        (".mindrecord", ".mindrecord.db"),
    ),
    _Format("a dataset of FFCV", _WRITE.format("ffcv (ffcv.loader.Loader)"), (".beton",)),
    _Format("an LMDB database", _WRITE.format("lmdb (lmdb.open)"), (".mdb", ".lmdb"), b"\xde\xc0\xef\xbe", 16),
    _Format("an HDF5 file", _WRITE.format("h5py (h5py.File)"), (".h5", ".hdf5", ".hdf"), b"\x89HDF\r\n\x1a\n"),
    _Format("NumPy arrays", _WRITE.format("numpy (numpy.load) and Pillow"), (".npz", ".npy"), b"\x93NUMPY"),
    _Format("a RecordIO file of MXNet", _WRITE.format("mxnet (mxnet.recordio)"), (".rec",), b"\x0a\x23\xd7\xce"),
    _Format("the index of a RecordIO file", _WRITE.format("mxnet (mxnet.recordio)"), (".idx",)),
    _Format("a shard of MosaicML", _WRITE.format("streaming (streaming.StreamingDataset)"), (".mds",)),
    _Format(
        "an Arrow file", "write Parquet with datasets (load_from_disk(...).to_parquet(...)), and give that",
        (".arrow", ".feather"), b"ARROW1",
    ),
    _Format(
        "an MNIST file", _WRITE.format("numpy and Pillow"), ("-idx3-ubyte", "-idx1-ubyte", ".idx3-ubyte"),
        b"\0\0\x08\x03",
    ),
    _Format("a checkpoint or tensors of PyTorch", _WRITE.format("torch and Pillow"), (".pt", ".pth")),
    _Format("a 7z archive", "unpack it and give the folder", (".7z",), b"7z\xbc\xaf\x27\x1c"),
    _Format("a RAR archive", "unpack it and give the folder", (".rar",), b"Rar!\x1a\x07"),
    _Format("a SQLite database", _WRITE.format("sqlite3"), (), b"SQLite format 3\0"),
)  # fmt: skip
_PICKLE = _Format(
    "a Python pickle, as CIFAR's batches are",
    _WRITE.format("pickle (trusted files only) and Pillow"),
    (".pkl", ".pickle"),
)
ENDINGS = tuple(ending for form in (*_FORMATS, _TFRECORD, _PICKLE) for ending in form.endings)


def refuse_foreign(path: Path, start: bytes) -> None:
    """Raise an error that names the format of a file, if it is one that is known and not read.

    Args:
        path: The file.
        start: Its first :data:`START_BYTES` bytes.

    Raises:
        SourceError: It is of such a format.
    """
    if start[257:262] == b"ustar":
        return
    if form := _recognized(path.name.lower(), start):
        raise _error(path, form)


def refuse_foreign_folder(folder: Path) -> None:
    """Raise an error that names the format of the files in a folder, or in the folders in it.

    Raises:
        SourceError: They are of a format that is known and not read.
    """
    for pattern in ("*", "*/*"):
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                form = _recognized(path.name.lower(), PlainFile(path).read(START_BYTES, 0))
                if form and form is not _LIST:  # there are texts everywhere
                    raise _error(path, form)


def _error(path: Path, form: _Format) -> SourceError:
    return SourceError(
        f"{path} is {form.name}",
        expected="a folder or archive of images, or Parquet",
        remedy=form.remedy.format(path) if form is _URLS else form.remedy,
    )


def _recognized(name: str, start: bytes) -> _Format | None:
    for form in _FORMATS:
        if form.magic and start[form.offset :].startswith(form.magic):
            return form
    if _is_tfrecord(start) or ".tfrecord" in name:
        return _TFRECORD
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return _PICKLE
    for form in (*_FORMATS, _PICKLE):
        if name.endswith(form.endings or "\0"):
            return form
    if start and b"\0" not in start and name.endswith((".csv", ".tsv", ".txt", ".json", ".jsonl", ".lst", ".list")):
        return _URLS if b"://" in b"".join(start.split(b"\n")[:2]) else _LIST  # a header, and the first URL
    return None


def _is_tfrecord(start: bytes) -> bool:
    """Return whether bytes begin with a length and its masked CRC-32C.

    Source: TensorFlow's record_writer.cc and crc32c.h.
    """
    if len(start) < 12:
        return False
    crc = 0xFFFFFFFF
    for byte in start[:8]:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (_CRC32C if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    masked = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
    return start[8:12] == struct.pack("<I", masked)
