"""Quoting in delimited text: checks a file against the CSV rules, and maps rows to line numbers.

A CSV parser reads an unclosed quote and all rows up to the next quote as one field, and silently loses those rows.
So each file is checked before it is parsed.
"""

import codecs
import mmap
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

AUTO, NONE = "auto", "none"
BLOCK = 1 << 24  # bytes per step when counting lines


@dataclass
class Layout:
    """Quote character of a file, and the line numbers of its rows.

    Attributes:
        quote: quote character, or None.
        rows: indices of the rows that span several lines, ascending; from 0, without the header.
        lines: for each of them, the cumulative number of extra lines up to and including it.
    """

    quote: str | None
    rows: list[int] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)

    def line_of(self, position: pl.Expr, first: int) -> pl.Expr:
        """Line number at which a row begins. `first` is the line of row 0, the first after the header."""
        if not self.rows:
            return position + first
        rows, beyond = np.array(self.rows), np.array([0, *self.lines])

        def lines(indices: pl.Series) -> pl.Series:
            row = indices.to_numpy().astype(np.int64)
            return pl.Series(indices.name, row + first + beyond[np.searchsorted(rows, row)])

        return position.map_batches(lines, return_dtype=pl.Int64, is_elementwise=True)


def check_quote(quote: str | None, separator: str) -> None:
    """Raises a ValueError for an invalid `quote` option."""
    if quote not in (None, NONE, AUTO) and (len(quote) != 1 or not quote.isascii() or quote == separator):
        raise ValueError(f"quote is {quote!r}, expected one ASCII character other than the separator, null or auto")


def detect_layout(file: Path, separator: str, quote: str | None = AUTO, has_header: bool = True) -> Layout:
    """Checks that quotes follow the CSV rules: around a whole field, and doubled within it.

    Args:
        quote: quote character; None or none: no quoting; auto: `"`, unless no field of the file is quoted and `"` only
            occurs within fields (inch marks).

    Raises:
        ValueError: with the line of a quote that is never closed, is closed before its field ends, or occurs in an
            unquoted field of a file with quoted fields; with auto, also if a quoted field contains whole rows.
    """
    if quote is None or quote == NONE or file.stat().st_size == 0:
        return Layout(None)
    mark = '"' if quote == AUTO else quote
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(mark.encode()) < 0:
            return Layout(None)
        return _Scan(file, content, separator.encode(), mark.encode(), quote == AUTO, has_header).layout()


class _Scan:
    def __init__(
        self, file: Path, content: mmap.mmap, separator: bytes, mark: bytes, guess: bool, has_header: bool
    ) -> None:
        self.file, self.content, self.separator, self.mark = file, content, separator, mark
        self.guess, self.has_header = guess, has_header
        s, q = re.escape(separator), re.escape(mark)
        plain, closed = rb"[^%b%b\n]*+" % (q, s), rb"%b[^%b\n]*+(?:%b%b[^%b\n]*+)*+%b\r?" % (q, q, q, q, q, q)
        self.fields = re.compile(rb"(?:(?:%b|%b)[%b\n])*+" % (closed, plain, s))  # complete fields, each on one line
        self.last = re.compile(rb"(?:%b|%b)\Z" % (closed, plain))  # the last field of a file without a final newline
        self.enclosed = re.compile(rb"%b[^%b]*+(?:%b%b[^%b]*+)*+%b" % (q, q, q, q, q, q))  # may span lines
        # a quoted field, or one with blanks before the quote
        self.proper = re.compile(rb"(?:\A|[%b\n])(?:%b(?=[%b\r\n]|\Z)| +%b)" % (s, closed, s, q))
        end = content.find(b"\n")
        header = content[: end if end >= 0 else len(content)]
        self.separators = header.count(separator)

    def layout(self) -> Layout:
        """Scans the file; raises the error of its first bad quote."""
        result = Layout(self.mark.decode())
        content, line, counted, beyond = self.content, 1, 0, 0
        position = len(codecs.BOM_UTF8) if content[: len(codecs.BOM_UTF8)] == codecs.BOM_UTF8 else 0
        stray = 0  # first line with a quote within an unquoted field
        while True:
            position = self.fields.match(content, position).end()  # type: ignore[union-attr]  # it matches the empty text
            if position == len(content) or self.last.match(content, position):
                break
            start = content.rfind(b"\n", 0, position) + 1  # of this line
            line, counted = line + self._lines(counted, start), start
            if content[position : position + 1] != self.mark:
                stray = stray or line
                position = self._end_of_line(position)
                continue
            field = self.enclosed.match(content, position)
            if field is None:
                raise self._error(line, "a quote opens a field and is not closed before the end of the file")
            end = field.end()
            if content[end : end + 1] not in (b"", b"\n", b"\r", self.separator):
                raise self._error(
                    line, "a quote opens a field and the next one does not end it" + self._span(position, end)
                )
            if b"\n" not in content[position:end]:
                raise self._error(line, "a quote closes a field before its end")
            if not start and self.has_header:
                raise self._error(line, "a quote in the header is not closed on its line")
            inside = content[position:end].count(b"\n")
            if self.guess and self._contains_rows(position, end):
                problem = f"a quoted field contains the next {inside:,} lines, which look like rows"
                raise self._error(line, problem, closed=True)
            beyond += inside
            result.rows.append(line - 1 - self.has_header - (beyond - inside))
            result.lines.append(beyond)
            position = end + 1 if content[end : end + 1] != b"\r" else end + 2
        if stray:
            if self.guess and not result.rows and not self.proper.search(content):
                return Layout(None)
            raise self._error(stray, "a quote occurs within an unquoted field")
        return result

    def _contains_rows(self, start: int, end: int) -> bool:
        """Whether a line within a quoted field has as many separators as a row, at least one of them quoted."""
        *lines, last = self.content[start:end].split(b"\n")[1:]
        if self.separator in last:
            lines.append(self.content[end - len(last) : self._end_of_line(end)])
        return self.separators > 0 and any(line.count(self.separator) == self.separators for line in lines)

    def _lines(self, start: int, end: int) -> int:
        return sum(self.content[at : min(at + BLOCK, end)].count(b"\n") for at in range(start, end, BLOCK))

    def _end_of_line(self, position: int) -> int:
        end = self.content.find(b"\n", position)
        return len(self.content) if end < 0 else end + 1

    def _span(self, start: int, end: int) -> str:
        lines = self.content[start:end].count(b"\n")
        return f": it is {lines:,} lines below" if lines else ""

    def _error(self, line: int, problem: str, closed: bool = False) -> ValueError:
        mark = self.mark.decode()
        advice = f"; if they are one field, set quote: '{mark}'" if closed else f", or double each {mark} within it"
        return ValueError(
            f"{self.file}, line {line}: {problem}. If {mark} is an ordinary character, set quote: null for this table "
            f"(--source.quote null, for items --source.items.quote null); if it encloses fields, close it{advice}"
        )
