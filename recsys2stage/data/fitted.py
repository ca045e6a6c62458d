"""The folder in which the fitted state of an estimator lives, shared by its copies."""

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

from recsys2stage.artifacts import fingerprint


class FittedFolder:
    """A folder with a manifest that copies of an estimator share; a temporary one is deleted with the last of them.

    Args:
        path: the folder; None: a new temporary one.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.temporary = path is None
        self.path = Path(tempfile.mkdtemp(prefix="recsys2stage-")) if path is None else Path(path).resolve()
        self.hash: str | None = None  # of the manifest
        if self.temporary:
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def remember(self) -> "FittedFolder":
        """Remembers the manifest, to notice later that the folder holds another model."""
        self.hash = fingerprint(self.path)
        return self

    def is_changed(self) -> bool:
        """Whether the folder was removed or written anew since `remember`."""
        return fingerprint(self.path) != self.hash

    def __deepcopy__(self, memo: dict[int, Any]) -> "FittedFolder":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.temporary:
            raise TypeError(
                f"a model fitted in the temporary folder {self.path}, which is deleted with it, cannot be pickled; "
                "expected one with folder=..., or a saved one: save(path), then load(path) where it is needed"
            )
        return _restore, (type(self), self.path, self.hash)


def _restore(kind: type[FittedFolder], path: Path, digest: str | None) -> FittedFolder:
    folder = kind(path)
    folder.hash = digest
    return folder
