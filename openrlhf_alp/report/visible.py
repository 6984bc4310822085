"""Text of names, recipes and errors that neither breaks a page or terminal nor reorders it."""

import re
import unicodedata

_DIRECTIONAL = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_CANDIDATE = re.compile(r"[^\x20-\x7e]")


def visible(text: object) -> str:
    """The same text with signs for what has no shape: control and directional characters, line
    breaks, and bytes of a file's name that are no UTF-8.
    """
    return _CANDIDATE.sub(lambda found: _sign(found[0]), str(text))


def _sign(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds such a byte
        return f"\\x{code - 0xDC00:02x}"
    if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in _DIRECTIONAL:
        return f"<U+{code:04X}>"
    return char
