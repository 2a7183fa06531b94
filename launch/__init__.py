"""Entry programs. Nothing imports this package."""

import sys
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent

# `python -m` puts the working folder first, whose own data/ or trainer.py would hide ours.
if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and Path(sys.path[0]).resolve() != _ROOT:
    sys.path.append(sys.path.pop(0))

for _name in ("data", "trainer", "pruner"):
    _spec = find_spec(_name)
    _places = [] if _spec is None else [_spec.origin, *(_spec.submodule_search_locations or [])]
    for _place in filter(None, _places):
        if _ROOT not in Path(_place).resolve().parents:
            print(
                f"error: {_place} hides Shorn's own `{_name}`, which is in {_ROOT}: rename it, or "
                "take its folder out of PYTHONPATH",
                file=sys.stderr,
            )
            raise SystemExit(2)
