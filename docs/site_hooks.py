"""What the site does to the pages, which are written to be read in the repository."""

import re
from typing import Any

DIAGRAM = re.compile(r"^```mermaid\n.*?^```$", re.MULTILINE | re.DOTALL)
DRAWN = "![Who says what to whom in one step](one-step.svg)"
"""Drawn by Mermaid 11, sequence diagrams with `wrap`. The theme would have every reader's browser fetch Mermaid."""
OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A diagram becomes its picture, and a link to a file beside docs/, which leads nowhere on the site, its path."""
    markdown = DIAGRAM.sub(DRAWN, markdown)
    return OUTSIDE.sub(lambda link: link[1] if link[2] in link[1] else f"{link[1]} (`{link[2]}`)", markdown)
