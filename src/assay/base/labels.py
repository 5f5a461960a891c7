"""Texts a reader can see: ids made of titles, and tokens with their white space shown."""

from __future__ import annotations

import re
import unicodedata

SLUG = re.compile(r"[a-z0-9]+(?:[-_.][a-z0-9]+)*")
"""What an id may be."""

_VISIBLE = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "⍽"}


def slug(text: str) -> str:
    """Return a view id made of the letters and digits of `text`.

    Example:
        >>> slug("Denoising: residual stream (clean into corrupt)")
        'denoising-residual-stream-clean-into-corrupt'
    """
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text.lower()).strip("-") or "view"


def token_label(token: str) -> str:
    """Return a token as a reader can see it: white space as marks, control and direction characters as code points.

    A leading space, which most vocabularies keep as part of the token, becomes a middle dot.

    Example:
        >>> token_label(" Mary"), token_label("a b"), token_label(chr(10)), token_label(chr(0x202E))
        ('·Mary', 'a·b', '↵', 'U+202E')
    """
    if token == "":
        return "∅"
    out = []
    for char in token:
        if char in _VISIBLE:
            out.append(_VISIBLE[char])
        elif unicodedata.category(char) in ("Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp"):
            out.append(f"U+{ord(char):04X}")
        else:
            out.append(char)
    return "".join(out)
