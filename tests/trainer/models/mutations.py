"""Files damaged at random, as a seed says: JSON values of another kind, and bytes."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3.5, -0.5, 1e12, 10**12, 10**400, 1e300, float("nan"),
    float("inf"), "", "x", "7", "\0", "../x", "/etc/hostname", "\ud800", [], [1], ["x"], [None], {},
    {"x": 1}, {"rope_type": "yarn"}, {"rope_type": []}, [[]], [{}], "float16", "default",
]  # fmt: skip


def mutate_json(values: dict[str, Any], generator: random.Random) -> str:
    """The text of `values` with one to three changes: a value replaced, removed, added or swapped
    with another, at any depth."""
    changed = copy.deepcopy(values)
    for _ in range(generator.randint(1, 3)):
        place, keys = changed, list(changed)
        while True:
            key = generator.choice(keys) if keys else "x"
            inner = place.get(key)
            if not isinstance(inner, dict) or generator.random() < 0.3:
                break
            place, keys = inner, list(inner)
        change = generator.random()
        if change < 0.7:
            place[key] = copy.deepcopy(generator.choice(ODD))
        elif change < 0.85:
            place.pop(key, None)
        elif change < 0.93 and keys:
            other = generator.choice(keys)
            place[key], place[other] = place.get(other), place.get(key)
        else:
            place[generator.choice(["x", "", "dtype", "auto_map"])] = generator.choice(ODD)
    return json.dumps(changed)


def mutate_bytes(content: bytes, generator: random.Random, within: int | None = None) -> bytes:
    """`content` cut, flipped, filled, doubled or replaced, in its first `within` bytes."""
    limit = min(within or len(content), len(content))
    at = generator.randrange(max(1, limit))
    length = generator.choice([1, 1, 2, 4, 8, 64])
    changes: list[Callable[[], bytes]] = [
        lambda: content[:at],
        lambda: content[:at] + generator.randbytes(length) + content[at + length :],
        lambda: content[:at] + b"\xff" * length + content[at + length :],
        lambda: content[:at] + bytes(length) + content[at + length :],
        lambda: (
            content[:at] + bytes([content[at] ^ 1 << generator.randrange(8)]) + content[at + 1 :]
        ),
        lambda: content[:at] + content[at + length :],
        lambda: content[:at] + content[max(0, at - length) :],
        lambda: b"\xef\xbb\xbf" + content,
        lambda: content.decode("latin-1").encode("utf-16"),
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        lambda: b"[" * 50_000,
        lambda: b"",
    ]
    weights = [4, 6, 6, 6, 10, 4, 4, 1, 1, 1, 1, 1]
    return generator.choices(changes, weights)[0]()


def mutate_file(
    path: Path, original: bytes, generator: random.Random, within: int | None = None
) -> None:
    """Writes a damaged `original` to `path`; JSON objects are also changed by their values."""
    if within is None and generator.random() < 0.8:
        text = mutate_json(json.loads(original), generator)
        path.write_text(text, encoding="utf-8")
    else:
        path.write_bytes(mutate_bytes(original, generator, within))
