"""Names that nobody knows: a suggestion, and all the names there are."""

import difflib


def did_you_mean(name: str, known: "list[str] | tuple[str, ...]") -> str:
    """The end of a message about an unknown name: a suggestion, and all the names there are."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{hint} Known: {', '.join(known)}."
