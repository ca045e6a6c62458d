"""Packed text files (.gz, or lines that end with CR alone) as plain copies, and messages with the original names."""

import gzip
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

PACKED = ".gz"
BLOCK = 1 << 20  # bytes per step
LARGE, MOST_GROWTH = 1 << 30, 200  # smaller files are not checked for their compression ratio


def plain_suffix(file: Path) -> str:
    """The suffix of a file without .gz, in lower case: .csv of events.csv.gz."""
    return Path(file.name[: -len(PACKED)] if file.name.lower().endswith(PACKED) else file.name).suffix.lower()


class Unpacker:
    """Replaces packed files by plain copies.

    Args:
        folder: folder of the copies.
        names: receives the path of each copy -> the original, for `original_names`.
    """

    def __init__(self, folder: Path, names: dict[str, str]) -> None:
        self.folder, self.names = folder, names

    def __call__(self, files: Sequence[Path]) -> list[Path]:
        """The files, with those that are packed replaced by copies.

        Raises:
            ValueError: for damaged files, and for those that unpack to far more than their size.
        """
        plain = []
        for file in files:
            copy = _plain_copy(file, self.folder / str(len(self.names)))  # numbers keep equal names apart
            if copy != file:
                original = str(file)
                for folder, name in self.names.items():  # a member of a zip
                    original = original.replace(folder, name)
                self.names[str(copy)] = original
            plain.append(copy)
        return plain


def _plain_copy(file: Path, folder: Path) -> Path:
    copy = file
    if file.name.lower().endswith(PACKED):
        folder.mkdir()
        copy = folder / file.name[: -len(PACKED)]
        _unpack(file, copy)
    if _ends_lines_with_cr(copy):
        folder.mkdir(exist_ok=True)
        target = folder / f"lines-{copy.name}"
        with copy.open("rb") as source, target.open("wb") as lines:
            while block := source.read(BLOCK):
                lines.write(block.replace(b"\r", b"\n"))
        return target
    return copy


def _unpack(file: Path, copy: Path) -> None:
    packed, free, written = file.stat().st_size, shutil.disk_usage(copy.parent).free, 0
    try:
        with gzip.open(file) as source, copy.open("wb") as target:
            while block := source.read(BLOCK):
                written += len(block)
                if written > free or (written > LARGE and written > MOST_GROWTH * packed):
                    raise ValueError(
                        f"{file} unpacks from {packed:,} to over {written:,} bytes, expected at most {MOST_GROWTH} "
                        f"times its size and the {free:,} bytes of free space; unpack it yourself and give the plain "
                        "file"
                    )
                target.write(block)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{file} ({packed:,} bytes) is not a complete gzip file ({error}), expected one that gunzip reads; make or "
            "download it again"
        ) from error


def _ends_lines_with_cr(file: Path) -> bool:
    """Whether the first line ends with a carriage return alone, as old Macs and some spreadsheets write it."""
    with file.open("rb") as stream:
        first = stream.readline(BLOCK).rstrip(b"\n").removesuffix(b"\r")
    return b"\r" in first and b"\n" not in first


@contextmanager
def original_names(names: Mapping[str, str]) -> Iterator[None]:
    """Replaces the paths of temporary copies in error messages.

    Args:
        names: path of a copy, or of a folder of copies -> what it is a copy of.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        for copy, original in names.items():
            text = text.replace(copy, original)
        if text == str(error):
            raise
        raise type(error)(text) from error
