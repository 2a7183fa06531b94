"""Records of JSON Lines with something between them: marks of their beginning, or no line's end."""

import json

from data.errors import InputError

SEPARATOR = b"\x1e"
"""What a record of a JSON text sequence (RFC 7464) begins with. Elsewhere JSON only spells it."""
SEPARATED = "tr -d '\\036' < OLD | jq -c . > NEW.jsonl"
"""How a JSON text sequence becomes JSON Lines, however its records are laid out."""


def refuse_several(text: str, place: str) -> None:
    """Raises InputError if a line holds several sound records, as where files were joined whose
    last line had no end."""
    # Python's own blanks are more than those of JSON.
    mark = SEPARATOR.decode()
    blanks = " \t\r" + mark
    first, decoder = text.strip(blanks), json.JSONDecoder()
    count = 0
    try:
        while first:
            value, end = decoder.raw_decode(first)
            if not isinstance(value, dict):
                return
            first, count = first[end:].lstrip(blanks), count + 1
    except (ValueError, RecursionError):
        return
    if count > 1:
        how = SEPARATED if mark in text else "jq -c . OLD > NEW.jsonl"
        raise InputError(
            f"{place}: {count} records on one line, as where files were joined without a line's "
            f"end between them; give each a line of its own, with {how}"
        )
