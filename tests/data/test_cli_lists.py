"""Values of another kind than their option takes: lists with commas, and switches for texts."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from data.cli import parse
from data.errors import InputError


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (("--seeds", "0,1,2"), "--seeds 0,1,2: values are separated by spaces: --seeds 0 1 2"),
        (("--seeds", "0,", "1"), "--seeds 0, 1: values .*--seeds 0 1$"),
        (("--seeds=-1,2",), "--seeds -1 2$"),
        (("--rates", "0.5,1e-3", "--seeds", "1"), "--rates 0.5 1e-3$"),
    ],
)
def test_numbers_between_commas_are_told_apart_by_spaces(
    words: tuple[str, ...], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Lists:
        seeds: tuple[int, ...] = (0,)
        rates: tuple[float, ...] = (0.5,)
        names: tuple[str, ...] = ()

    with pytest.raises(InputError, match=advice):
        parse(Lists, section="shear", argv=list(words))
    given = parse(Lists, section="shear", argv=["--names", "a,b", "--seeds", "3", "4"])
    assert given.names == ("a,b",) and given.seeds == (3, 4)
    monkeypatch.setenv("SHORN_SEEDS", "3,4")
    with pytest.raises(InputError, match=r'SHORN_SEEDS = .* by spaces: "3 4"'):
        parse(Lists, section="shear", argv=[])


@pytest.mark.parametrize("value", ["false", "true", "[true]"])
def test_what_is_true_or_false_is_no_text(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    @dataclass(frozen=True, kw_only=True)
    class Texts:
        json: str | None = None
        names: tuple[str, ...] = ()
        on: bool = False

    key = "names" if "[" in value else "json"
    (tmp_path / "shorn.toml").write_text(f"[shear]\non = true\n{key} = {value}\n")
    with pytest.raises(InputError, match=f"{key} = .* is not a valid value: expected TEXT"):
        parse(Texts, section="shear", argv=[])


def test_standard_output_is_no_file() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Files:
        output: str = "runs/x"
        json: str | None = None
        data: str = "d"

    for flag in ("--json", "--output"):
        with pytest.raises(InputError, match=f"{flag} -: standard output is for messages"):
            parse(Files, section="shear", argv=[flag, "-"])
    assert parse(Files, section="shear", argv=["--data", "-"]).data == "-"
