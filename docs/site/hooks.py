"""What the site needs beyond its pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def on_page_read_source(*, page: Any, **_: Any) -> str | None:
    """CONTRIBUTING.md is a page too, and written for the root of the checkout, where docs/ is a directory below."""
    if page.file.src_uri == "contributing.md":
        return (ROOT / "CONTRIBUTING.md").read_text().replace("](docs/", "](")
    return None
