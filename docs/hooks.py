"""Of mkdocs: the README is the home page, and what pages link to elsewhere in the repository is there too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

LINK = re.compile(r"""(?:(?<=\]\()|(?<=src="))(?:\.\./)?([\w./-]+)""")


def on_files(files: Files, config: Any) -> Files:
    root = Path(config.config_file_path).parent
    pages = [root / "README.md", root / "DESIGN.md", root / "CHANGELOG.md", *(root / "docs").glob("*.md")]
    files.append(File.generated(config, "index.md", abs_src_path=str(pages[0])))
    wanted = {"DESIGN.md", "CHANGELOG.md", *(path for page in pages for path in LINK.findall(page.read_text()))}
    benchmarks = root / "benchmarks" / "README.md"  # is where it is
    wanted |= {f"benchmarks/{path}" for path in LINK.findall(benchmarks.read_text())}
    for path in sorted(wanted):
        if (root / path).is_file() and not path.startswith("docs/"):
            files.append(File.generated(config, path, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Pages of docs/ lie beside those of the repository's root here."""
    return markdown if "/" in page.file.src_uri else re.sub(r"(?<=\]\()(\.\./|docs/)", "", markdown)
