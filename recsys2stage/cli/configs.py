"""The shipped configs: where they are in a checkout and in an installed package, and what their first lines say."""

from difflib import get_close_matches
from pathlib import Path

import recsys2stage

OVERLAYS, STARTER = "with", "small"  # folders that are no dataset of their own


def shipped_configs() -> Path:
    """The folder of configs: next to the package in a checkout, within it where a wheel was installed."""
    package = Path(recsys2stage.__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / OVERLAYS).is_dir():
            return folder
    raise FileNotFoundError(f"{package} has no folder configs, expected that of its wheel; install recsys2stage again")


def datasets(folder: Path) -> list[str]:
    """Names of the datasets, and of the starter, in a folder of configs."""
    return sorted(path.parent.name for path in folder.glob("*/retriever.yaml"))


def overlays(folder: Path) -> list[str]:
    """Names of the overlays in a folder of configs."""
    return sorted(path.stem for path in (folder / OVERLAYS).glob("*.yaml"))


def headline(config: Path) -> str:
    """The first comment of a config, without the command that follows it."""
    with config.open(encoding="utf-8") as lines:
        first = lines.readline()
    return first.removeprefix("#").partition("  recsys ")[0].strip() if first.startswith("#") else ""


def resolve_path(name: str | Path, folder: str, suffix: str = "") -> Path:
    """Resolves a path, or the name of a file or folder of configs in the working directory, or of a shipped one.

    Args:
        name: path or name.
        folder: configs or configs/with.
        suffix: of the file that a name stands for.
    """
    local = Path(folder) / f"{name}{suffix}"
    for path in (Path(name), local, shipped_configs().parent / local):
        if path.exists():
            return path
    list_names, kind = (overlays, "overlays") if suffix and folder.endswith(OVERLAYS) else (datasets, "configs")
    names = [] if suffix and list_names is datasets else [*list_names(shipped_configs()), *list_names(Path("configs"))]
    near = get_close_matches(str(name), names, 1)
    hint = f"; did you mean {near[0]}? Give" if near else "; give"
    shown = f" (recsys list {kind})" if names else ""
    raise FileNotFoundError(f"{name} does not exist, nor does {local}{hint} a path, or a name from {folder}{shown}")
