"""What the documentation names exists: functions, files, flags, links."""

import importlib
import re
from pathlib import Path

import pytest

import safesteer
from safesteer.cli import COMMANDS, _load

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def resolve(dotted: str) -> object:
    """Import the longest module prefix of `dotted`, then follow attributes."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(dotted)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_name_that_a_page_mentions_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for dotted in set(re.findall(r"`(safesteer\.[\w.]+)`", text)):
        resolve(dotted)
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if not link.startswith(("http", "mailto")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}, which is not there"


def test_every_flag_that_is_named_exists() -> None:
    """In pages, recipes, help texts and the remedies of errors; but for those of other programs."""
    commands = [_load(name) for name in COMMANDS]
    leaves = [leaf for command in commands for leaf in getattr(command, "commands", {"": command}).values()]
    flags = {
        flag for leaf in leaves for option in leaf.params for flag in (*option.opts, *option.secondary_opts)
    }
    elsewhere = {
        *("--help", "--version", "--strict", "--log-dir"),
        *("--only", "--seeds", "--shape", "--completion"),  # of benchmarks/
        *("--config", "--num", "--cpu"),  # of accelerate
        *("--abbrev", "--always", "--dirty", "--error-unmatch"),  # of git
    }
    files = [*PAGES, *ROOT.glob("recipes/**/*.*"), *ROOT.glob("src/**/*.py")]
    named = {
        (str(path.relative_to(ROOT)), flag)
        for path in files
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+[a-z]", path.read_text(encoding="utf-8"))
    }
    assert not {(path, flag) for path, flag in named if flag not in flags | elsewhere}
    assert len({flag for _, flag in named} & flags) > 40


def test_every_public_name_can_be_imported() -> None:
    for name in safesteer.__all__:
        assert getattr(safesteer, name) is not None
    with pytest.raises(AttributeError):
        _ = safesteer.no_such_name  # type: ignore[attr-defined]
