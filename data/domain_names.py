"""Names of domains: from what the input calls them to what folders and flags are called."""

import os
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from data.errors import InputError

REDPAJAMA_PREFIX = "RedPajama"
LONGEST = 255
"""UTF-8 bytes that file systems allow in a name."""
_KEPT = frozenset("._+-#")


@lru_cache(4096)
def domain_name(name: str) -> str:
    """A name fit for folders and flags: "RedPajamaC4" is "c4", "Wikipedia (en)" "wikipedia-en".

    Letters and digits of every script stay, in lower case, and so do . _ + - and #. Anything else
    becomes "-". Empty where nothing is left.
    """
    name = unicodedata.normalize("NFC", name)
    name = name.removeprefix(REDPAJAMA_PREFIX) or name
    # A sign tells one label from another; before anything but a number it is decoration.
    name = re.sub(r"^-(?=\d)", "minus-", name)
    kept = "".join(letter if _is_kept(letter) else " " for letter in name.lower())
    return re.sub(r" +", "-", kept).strip("-.")


def _is_kept(letter: str) -> bool:
    # Marks are the vowels of many scripts.
    return letter in _KEPT or unicodedata.category(letter)[0] in "LMN"


@dataclass(slots=True)
class Original:
    """What the input calls a domain, and where it was seen first."""

    name: str
    place: str


@dataclass(slots=True)
class DomainNames:
    """Notices names that become one domain though the input tells them apart.

    Args:
        merge: take them as one, as the user asked for.
    """

    merge: bool = False
    known: dict[str, Original] = field(default_factory=dict)

    def add(self, domain: str, name: str, place: Path, row: int) -> None:
        """Notes that `name`, read in row `row` of `place`, became `domain`.

        Raises InputError naming both where another name did so before.
        """
        first = self.known.get(domain)
        if first is None or first.name != name:
            self._add(domain, Original(unicodedata.normalize("NFC", name), f"{place}:{row}"))

    def add_all(self, known: Mapping[str, Original]) -> None:
        """Notes what another one has noted. Raises InputError as `add` does."""
        for domain, original in known.items():
            self._add(domain, original)

    def _add(self, domain: str, original: Original) -> None:
        first = self.known.setdefault(domain, original)
        if first.name != original.name and not self.merge:
            raise InputError(
                f"two names become the domain {domain!r}: {first.name!r} ({first.place}) and "
                f"{original.name!r} ({original.place}); --merge-domains takes them as one, or "
                "rename one in the input (finished parts are kept: run the same command again)"
            )


def chosen_domains(names: tuple[str, ...]) -> tuple[str, ...]:
    """The domains that --domains names. Raises InputError for a name that cannot be one."""
    domains = tuple(domain_name(name) for name in names)
    for name, domain in zip(names, domains, strict=True):
        if not domain:
            raise InputError(f"--domains {name!r} holds no letter or digit; correct it")
        if "," in name:
            parts = " ".join(filter(None, map(domain_name, name.split(","))))
            raise InputError(
                f"--domains {name!r}: separate names by spaces: --domains {parts} (for one name "
                f"with a comma in it, give --domains {domain})"
            )
    return domains


def folder_domain(path: Path) -> tuple[str, str]:
    """The name of a file's folder, as the path is written, and the domain it makes."""
    # Not resolved: a link stands where its user put it, its target lies in some store.
    name = path.absolute().parent.name
    if name == "..":
        name = path.absolute().parent.resolve().name
    name = _spelled(name, path)
    domain = domain_name(name)
    if not domain:
        raise InputError(f"{path}: its folder's name cannot serve as a domain; rename the folder")
    return name, domain


def _spelled(name: str, path: Path) -> str:
    """A folder's name as its bytes spell it in UTF-8, whatever the locale takes them for."""
    try:
        return os.fsencode(name).decode("utf-8")
    except UnicodeError:
        if any("\udc80" <= letter <= "\udcff" for letter in name):
            raise InputError(
                f"{path}: the name of its folder is not UTF-8, so no domain can be named by it; "
                "rename the folder, such as with `convmv -t utf8 --notest`"
            ) from None
        return name
