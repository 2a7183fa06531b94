"""Domains are named so that different ones stay different, or both are named in an error."""

import re
from pathlib import Path

import pytest

from data.domain_names import DomainNames, chosen_domains, domain_name
from data.errors import InputError


@pytest.mark.parametrize(
    ("name", "domain"),
    [
        ("RedPajamaC4", "c4"),
        ("RedPajamaCommonCrawl", "commoncrawl"),
        ("RedPajamaStackExchange", "stackexchange"),
        ("Common Crawl", "common-crawl"),
        ("Pile-CC", "pile-cc"),
        ("Wikipedia (en)", "wikipedia-en"),
        ("RedPajama", "redpajama"),
        ("../x", "x"),
        ("...", ""),
        ("C#", "c#"),
        ("C++", "c++"),
        ("新闻2023", "新闻2023"),
        ("हिन्दी", "हिन्दी"),
        ("e\u0301t\u00e9", "été"),
        ("-1", "minus-1"),
    ],
)
def test_domain_names(name: str, domain: str) -> None:
    assert domain_name(name) == domain
    assert domain_name(domain) == domain or name == "RedPajama"


def test_names_that_become_one_are_both_named() -> None:
    names = DomainNames()
    names.add("common-crawl", "Common Crawl", Path("a.jsonl"), 3)
    names.add("common-crawl", "Common Crawl", Path("b.jsonl"), 1)
    with pytest.raises(
        InputError,
        match=r"'Common Crawl' \(a\.jsonl:3\) and 'common-crawl' \(c\.jsonl:9\); --merge-domains",
    ):
        names.add("common-crawl", "common-crawl", Path("c.jsonl"), 9)
    others = DomainNames(merge=True)
    others.add("common-crawl", "common-crawl", Path("c.jsonl"), 9)
    with pytest.raises(InputError, match="two names"):
        names.add_all(others.known)
    others.add_all(names.known)


def test_letters_with_their_marks_apart_are_the_same_name() -> None:
    names = DomainNames()
    names.add("été", "\u00e9t\u00e9", Path("a"), 1)
    names.add("été", "e\u0301te\u0301", Path("b"), 1)


def test_a_chosen_domain_without_letters_is_refused() -> None:
    assert chosen_domains(("RedPajamaC4", "C#")) == ("c4", "c#")
    with pytest.raises(InputError, match=r"--domains '\?\?' holds no letter"):
        chosen_domains(("c4", "??"))


def test_chosen_domains_with_commas_are_not_renamed() -> None:
    for text, parts in (("books,web", "books web"), ("Wikipedia (en), c4,", "wikipedia-en c4")):
        with pytest.raises(InputError, match=re.escape(f"by spaces: --domains {parts} (for one")):
            chosen_domains(("a", text))
