"""Check that text of the command line and of standard input is UTF-8."""

from __future__ import annotations

import os


def check(text: str, what: str = "the prompt") -> str:
    """Return text that Python has read from an argument or a standard stream, decoded as UTF-8.

    Python reads both in the encoding of the locale. Bytes that do not fit into it become lone
    surrogates (the error handler "surrogateescape").

    Raises:
        ValueError: if the bytes are not UTF-8. The message names the first wrong one.
    """
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError as e:
        try:
            data = os.fsencode(text)
        except UnicodeEncodeError:  # a surrogate that does not come from a byte
            raise ValueError(
                f"{what} holds half a surrogate pair at character {e.start}; it is not valid text"
            ) from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        encoding = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "ISO-8859-1"
        raise ValueError(
            f"{what} is not UTF-8 (byte {data[e.start]:02X} at {e.start}); convert it, for example "
            f"with iconv -f {encoding} -t UTF-8, or use a terminal and locale with UTF-8"
        ) from None
