"""What a terminal cannot show is replaced: nobody should lose an answer or a table to an ellipsis."""

from __future__ import annotations

import codecs
import io
import sys
from typing import TextIO


def show_what_it_can() -> None:
    """Let stdout and stderr take any text. An error handler of the user's own (PYTHONIOENCODING) stays."""
    sys.stdout, sys.stderr = _lenient(sys.stdout), _lenient(sys.stderr)


class _Ascii(io.TextIOWrapper):
    """Writes ASCII, and says that it is Latin-1: click takes a stream that says ASCII for a mistake, and for UTF-8."""

    def __init__(self, stream: io.TextIOWrapper, errors: str) -> None:
        super().__init__(
            stream.buffer, "iso8859-1", errors, line_buffering=stream.line_buffering, write_through=stream.write_through
        )
        self.kept = stream  # which would close the buffer

    def write(self, text: str, /) -> int:
        super().write(text.encode("ascii", self.errors or "replace").decode("ascii"))
        return len(text)


def _lenient(stream: TextIO) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper) or isinstance(stream, _Ascii):  # none, or a test's
        return stream
    # Python's own choice where nobody chose: under LC_ALL=C it is surrogateescape.
    errors = "replace" if stream.errors in ("strict", "surrogateescape") else stream.errors or "replace"
    if codecs.lookup(stream.encoding).name == "ascii":
        return _Ascii(stream, errors)
    stream.reconfigure(errors=errors)
    return stream
