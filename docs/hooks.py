"""Pages of the site that are files of the repository elsewhere: they are written once."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add them, their links as the site has them, the README's public names linked."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        for other, its_page in PAGES.items():
            text = text.replace(f"]({other})", f"]({its_page})")
        if source == "README.md":
            text = re.sub(r"^\| `.+?\|", _link_names, text, flags=re.MULTILINE)
        files.append(File.generated(config, page, content=text))
    return files


def _link_names(cell: re.Match[str]) -> str:
    return re.sub(r"`(\w+)`", r"[`\1`][mxd_lens.\1]", cell[0])
