"""Write the repository's public address, its version and the first cell everywhere they stand: `make links`.

The address stands in one place, pyproject.toml's [project.urls]; the version in spi_utils/__init__.py. This
puts them into badges, clone and install lines (at the version's tag: a notebook meets the code that it was
written with), and kernel-metadata.json, and puts first_cell.py into every notebook cell tagged `setup`.

    python scripts/links.py            write
    python scripts/links.py --check    say what would change; exit 1 if anything would
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PLACE = r"[\w.-]+/[\w.-]+?"  # owner/name
# What stands before and after the address in a text.
PATTERNS = (
    (r"kaggle\.com/notebooks/welcome\?src=https://github\.com/", r"(?=/blob/)"),
    (r"colab\.research\.google\.com/github/", r"(?=/blob/)"),
    (r"raw\.githubusercontent\.com/", r"(?=/main/)"),
    (r"git clone https://github\.com/", r"(?=\.git\b|[\s`\"']|$)"),
)
INSTALL = r"(git\+https://github\.com/)[\w.-]+/[\w.-]+?(?:\.git)?@[\w.-]+"


def version() -> str:
    """The package's version."""
    found = re.search(
        r'^__version__ = "(.+)"$', (ROOT / "spi_utils" / "__init__.py").read_text(), re.MULTILINE
    )
    if found is None:
        raise SystemExit("spi_utils/__init__.py has no __version__")
    return found[1]


def address() -> str:
    """`owner/name` from pyproject.toml.

    Raises:
        SystemExit: there is no GitHub address in it.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    url = project["urls"]["Repository"]
    found = re.fullmatch(rf"https://github\.com/({PLACE})/?", url)
    if found is None:
        raise SystemExit(f"pyproject.toml: Repository is {url!r}, expected https://github.com/owner/name")
    return found[1]


def relink(text: str, place: str) -> str:
    """`text` with every badge, clone and install line for `place` (owner/name), installs at the tag."""
    text = re.sub(INSTALL, rf"\g<1>{place}@v{version()}", text)
    for before, after in PATTERNS:
        text = re.sub(rf"({before}){PLACE}{after}", rf"\g<1>{place}", text, flags=re.MULTILINE)
    return text


def relink_notebook(text: str, place: str) -> str:
    """A notebook's JSON with its links and `setup` cells renewed; the same bytes where nothing changes."""
    book: dict[str, Any] = json.loads(text)
    first = relink((ROOT / "scripts" / "first_cell.py").read_text(encoding="utf-8").rstrip("\n"), place)
    changed = False
    for cell in book["cells"]:
        held = "".join(cell["source"])
        setup = "setup" in cell["metadata"].get("tags", [])
        wanted = first if setup else relink(held, place)
        if wanted != held:
            cell["source"] = wanted if isinstance(cell["source"], str) else wanted.splitlines(keepends=True)
            changed = True
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n" if changed else text


def relink_kernel(text: str, place: str) -> str:
    """kernel-metadata.json with the owner's name in its id (Kaggle's names are lower case)."""
    kernel = json.loads(text)
    owner = place.split("/", 1)[0].lower()
    kernel["id"] = f"{owner}/{kernel['id'].split('/', 1)[1]}"
    return json.dumps(kernel, indent=2) + "\n"


def changes(place: str) -> dict[Path, str]:
    """File -> its new text, for every file that has to change."""
    jobs = [
        *((path, relink) for path in (ROOT / "README.md", ROOT / "scripts" / "first_cell.py")),
        *((path, relink_notebook) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))),
        (ROOT / "kernel-metadata.json", relink_kernel),
    ]
    texts = {path: (path.read_text(encoding="utf-8"), job) for path, job in jobs if path.exists()}
    new = {path: job(text, place) for path, (text, job) in texts.items()}
    return {path: text for path, text in new.items() if text != texts[path][0]}


def main(arguments: list[str]) -> int:
    """Write or check; 1 where a check finds something to write."""
    found = changes(address())
    for path, text in found.items():
        print(f"{'would change' if '--check' in arguments else 'wrote'} {path.relative_to(ROOT)}")
        if "--check" not in arguments:
            path.write_text(text, encoding="utf-8")
    return int(bool(found) and "--check" in arguments)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
