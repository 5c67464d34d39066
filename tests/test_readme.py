"""The front page and the docs: short, with numbers that a run printed and links that lead somewhere."""

import importlib.util
import re
from pathlib import Path

import pytest

from spi_utils.notebook import ALL, parameters_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
spec = importlib.util.spec_from_file_location("readme_numbers", ROOT / "scripts" / "readme_numbers.py")
numbers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(numbers)


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


def test_its_numbers_are_those_of_the_runs(capsys):
    assert numbers.main(["--check"]) == 0, capsys.readouterr().out


def test_a_changed_number_is_noticed(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(numbers, "PAGES", (page,))
    monkeypatch.setattr(numbers, "ROOT", tmp_path)
    page.write_text(text, encoding="utf-8")
    assert numbers.main(["--check"]) == 0
    block = text.index("<!-- numbers:verdict -->")
    digit = re.search(r"\d", text[block:]).start() + block
    page.write_text(f"{text[:digit]}{(int(text[digit]) + 1) % 10}{text[digit + 1 :]}", encoding="utf-8")
    assert numbers.main(["--check"]) == 1
    assert numbers.main([]) == 0 and page.read_text(encoding="utf-8") == text


def anchors(page):
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_within_the_project_leads_somewhere(page):
    # An image is shown on PyPI too, so its address is absolute.
    text = re.sub(
        r"https://raw\.githubusercontent\.com/[^/]+/[^/]+/main/", "", page.read_text(encoding="utf-8")
    )
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("http", "mailto:")):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_parameters_that_it_names_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| `", text, flags=re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert len(named) >= 10 and named - set(numbers.PRESETS) <= set(parameters_of(ALL))
    assert set(re.findall(r"-p (\w+)", text)) <= set(parameters_of(ALL))
