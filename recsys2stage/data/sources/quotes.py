"""Quotes in delimited text: whether a file follows the rules of CSV, and on which line each row begins.

A parser that meets a quote which nothing closes takes all up to the next one as one field, and the rows between vanish.
So a file is looked through before it is parsed.
"""

import codecs
import mmap
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

AUTO, NONE = "auto", "none"
BLOCK = 1 << 24  # bytes in which lines are counted


@dataclass
class Layout:
    """How the rows of a file lie on its lines.

    Attributes:
        quote: the character that encloses fields, None where none does.
        rows: the places of rows, from 0 without the header, that take several lines, ascending.
        lines: the lines that the row takes beyond the first, and all such rows before it.
    """

    quote: str | None
    rows: list[int] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)

    def line_of(self, place: pl.Expr, first: int) -> pl.Expr:
        """The line on which a row begins, by its place, where the first row without the header is on line `first`."""
        if not self.rows:
            return place + first
        rows, beyond = np.array(self.rows), np.array([0, *self.lines])

        def lines(places: pl.Series) -> pl.Series:
            where = places.to_numpy().astype(np.int64)
            return pl.Series(places.name, where + first + beyond[np.searchsorted(rows, where)])

        return place.map_batches(lines, return_dtype=pl.Int64, is_elementwise=True)


def check_quote(quote: str | None, separator: str) -> None:
    """Raises a ValueError for what encloses no fields."""
    if quote not in (None, NONE, AUTO) and (len(quote) != 1 or not quote.isascii() or quote == separator):
        raise ValueError(f"quote is {quote!r}, expected one ASCII character other than the separator, null or auto")


def detect_layout(file: Path, separator: str, quote: str | None = AUTO, has_header: bool = True) -> Layout:
    """Looks for quotes that are not as CSV has them: around a whole field, and doubled within.

    Args:
        quote: the character that encloses fields; None or none: none does; auto: `"` does, but for files in which no
            field is enclosed and a `"` only stands within fields (inch marks).

    Raises:
        ValueError: naming the line of a quote that is never closed, closes before its field ends, or stands within a
            field of a file with enclosed fields; for auto also of one that closes so late that it takes in whole rows.
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
        self.fields = re.compile(rb"(?:(?:%b|%b)[%b\n])*+" % (closed, plain, s))  # whole fields, each on one line
        self.last = re.compile(rb"(?:%b|%b)\Z" % (closed, plain))  # one at the end of a file without a last line end
        self.enclosed = re.compile(rb"%b[^%b]*+(?:%b%b[^%b]*+)*+%b" % (q, q, q, q, q, q))  # on several lines
        # a field that is enclosed, or would be without the blanks before it
        self.proper = re.compile(rb"(?:\A|[%b\n])(?:%b(?=[%b\r\n]|\Z)| +%b)" % (s, closed, s, q))
        end = content.find(b"\n")
        header = content[: end if end >= 0 else len(content)]
        self.separators = header.count(separator)

    def layout(self) -> Layout:
        """The layout of the file, or the error of its first bad quote."""
        found = Layout(self.mark.decode())
        content, line, counted, beyond = self.content, 1, 0, 0
        place = len(codecs.BOM_UTF8) if content[: len(codecs.BOM_UTF8)] == codecs.BOM_UTF8 else 0
        stray = 0  # the first line with a quote within a field
        while True:
            place = self.fields.match(content, place).end()  # type: ignore[union-attr]
            if place == len(content) or self.last.match(content, place):
                break
            start = content.rfind(b"\n", 0, place) + 1  # of the line
            line, counted = line + self._lines(counted, start), start
            if content[place : place + 1] != self.mark:
                stray = stray or line
                place = self._end_of_line(place)
                continue
            field = self.enclosed.match(content, place)
            if field is None:
                raise self._error(line, "a quote begins a field and is not closed before the end of the file")
            end = field.end()
            if content[end : end + 1] not in (b"", b"\n", b"\r", self.separator):
                raise self._error(
                    line, "a quote begins a field and the next one does not end it" + self._span(place, end)
                )
            if b"\n" not in content[place:end]:
                raise self._error(line, "a quote closes a field before its end")
            if not start and self.has_header:
                raise self._error(line, "a quote in the names of the columns is not closed on their line")
            inside = content[place:end].count(b"\n")
            if self.guess and self._takes_in_rows(place, end):
                what = f"a quoted field takes in the {inside:,} lines after it, which look like rows"
                raise self._error(line, what, closed=True)
            beyond += inside
            found.rows.append(line - 1 - self.has_header - (beyond - inside))
            found.lines.append(beyond)
            place = end + 1 if content[end : end + 1] != b"\r" else end + 2
        if stray:
            if self.guess and not found.rows and not self.proper.search(content):
                return Layout(None)
            raise self._error(stray, "a quote stands within a field that does not begin with one")
        return found

    def _takes_in_rows(self, start: int, end: int) -> bool:
        """Whether a line that a field takes in has the separators of a row, some of them within the field."""
        *lines, last = self.content[start:end].split(b"\n")[1:]
        if self.separator in last:
            lines.append(self.content[end - len(last) : self._end_of_line(end)])
        return self.separators > 0 and any(line.count(self.separator) == self.separators for line in lines)

    def _lines(self, start: int, end: int) -> int:
        return sum(self.content[at : min(at + BLOCK, end)].count(b"\n") for at in range(start, end, BLOCK))

    def _end_of_line(self, place: int) -> int:
        end = self.content.find(b"\n", place)
        return len(self.content) if end < 0 else end + 1

    def _span(self, start: int, end: int) -> str:
        lines = self.content[start:end].count(b"\n")
        return f": it stands {lines:,} lines below" if lines else ""

    def _error(self, line: int, what: str, closed: bool = False) -> ValueError:
        mark = self.mark.decode()
        advice = f"; if they are one field, say quote: '{mark}'" if closed else f", or double each {mark} within one"
        return ValueError(
            f"{self.file}, line {line}: {what}. If {mark} is a character like any other, say quote: null of this table "
            f"(--source.quote null, of items --source.items.quote null); if it encloses fields, close it{advice}"
        )
