"""Silence for commands that run inside another program."""

import functools
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from tqdm import tqdm


@contextmanager
def quiet(verbose: bool) -> Iterator[None]:
    """Silences prints, progress bars and Lightning's messages below warnings, unless verbose."""
    if verbose:
        yield
        return
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    original = tqdm.__init__
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        tqdm.__init__ = functools.partialmethod(original, disable=True)  # TQDM_DISABLE is read only at import
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = original
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
