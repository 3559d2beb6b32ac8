"""What the pages need beyond mkdocs: files of the repository outside docs/, and equations without scripts."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PICTURES = "benchmarks/results"
"""Pictures of the benchmarks, which the pages show from where the benchmarks leave them."""

_LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>(?![a-z]+:|#)[^)\s]+)\)")
_EQUATION = re.compile(r"<(?P<tag>span|div) class=\"arithmatex\">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>", re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the benchmarks' pictures to the site."""
    for picture in sorted((ROOT / PICTURES).glob("**/*.png")):
        path = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, path, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links that leave docs/ lead to what the site has, or name the file in the repository."""

    def rewrite(match: re.Match[str]) -> str:
        path = match["target"].partition("#")[0]
        folder = posixpath.dirname(page.file.src_uri)
        place = posixpath.normpath(posixpath.join("docs", folder, path))
        if place.startswith("docs/"):
            return match[0]
        if not (ROOT / place).exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {match['target']}, which does not exist")
        if place.startswith(PICTURES) and place.endswith(".png"):
            return f"{match['picture']}[{match['text']}]({posixpath.relpath(place, folder or '.')})"
        return f"`{place}`" if match["text"].strip("`") in (path, place) else f"{match['text']} (`{place}`)"

    return _LINK.sub(rewrite, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Equations as MathML, which browsers draw themselves."""

    def equation(match: re.Match[str]) -> str:
        latex = re.sub(r"&lt;", "<", re.sub(r"&amp;", "&", match["latex"]))
        return convert(latex.strip(), display="block" if match["tag"] == "div" else "inline")

    return _EQUATION.sub(equation, html)
