"""Wrong command lines and configs of every verb: each gets one sentence."""

from pathlib import Path

import pytest
from wrong_inputs import check_error, check_message, nothing_written


def test_the_harness_finds_what_is_missing(tmp_path: Path) -> None:
    good = "--k is -3, expected at least 1; give --k 10"
    check_message(good, r"--k is -3", "at least 1", r"--k 10")
    check_error(ValueError(good), "-3", "at least 1", "give")
    for wrong in ("\n".join([good] * 4), f"{good} object at 0x7f", "--k is -3; give --k 10", "", good * 50):
        with pytest.raises(AssertionError):
            check_message(wrong, "-3", "at least 1", "--k 10")
    with pytest.raises(AssertionError):
        check_error(KeyError(good), "-3", "at least 1", "give")
    with pytest.raises(AssertionError, match="left"), nothing_written(tmp_path):
        (tmp_path / ".left.partial").touch()
