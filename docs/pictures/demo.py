"""Make the picture of the home page, and the excerpt in the README, from one run of ``kvindex demo``.

``make docs-pictures``. Both show the printed lines, without most of the lines of progress. The picture has the table
without its vertical lines. The README has only the lines that fit on its first screen.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "README.md"
COLUMNS = 108

# rich's own template loads a font from a server.
TEMPLATE = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}
</defs>
<rect fill="#1c1f26" stroke="#57606a" x="0" y="0" width="{width}" height="{height}" rx="8"/>
<g transform="translate({terminal_x}, 12)" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""  # noqa: E501

STYLES = {
    r"\bexact\b": "green",
    r"\bstale\b": "bold red",
    r"pod-\d+ is killed": "bold red",
    r"pod-\d+ is started again.*": "yellow",
    r"answers equal to the engines'.*": "bold green",
    r"hit rate +[\d.]+%": "bold cyan",
}


def run() -> list[str]:
    command = [sys.executable, "-m", "kvindex", "demo"]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "COLUMNS": str(COLUMNS)}
    )
    return [line.rstrip() for line in done.stdout.splitlines()]


def draw(lines: list[str]) -> str:
    text = Text("$ kvindex demo\n" + "\n".join(lines))
    for pattern, style in STYLES.items():
        text.highlight_regex(pattern, style)
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, color_system="truecolor")
        console.print(text)
        return console.export_svg(title="", code_format=TEMPLATE, unique_id="demo")


def parts(lines: list[str]) -> tuple[list[str], list[str], list[str]]:
    """The events with every fourth line of progress, the table, and the last lines."""
    at = next(number for number, line in enumerate(lines) if line.startswith("kvindex demo:"))
    end = next(number for number, line in enumerate(lines) if line.startswith("round-robin routing"))
    shown, progress = [], 0
    for line in lines[1:at]:
        if " requests, " in line:
            progress += 1
            if progress % 4 != 1:
                continue
            line = line.partition(", match")[0]
        shown.append(line)
    table = [line for line in lines[at + 1 : end] if line and line[0] in "┃│├┡"]
    return shown, [ruled(line) for line in table], lines[end:]


def ruled(line: str) -> str:
    """A line of the table without vertical lines, between which fonts leave gaps."""
    if line[0] in "┡├":
        return "─" * len(line)
    return line.replace("┃", " ").replace("│", " ").rstrip()


def main() -> None:
    story, table, end = parts(run())
    (HERE / "demo.svg").write_text(draw([*story, "", *table, "", *end]))
    first = next(number for number, line in enumerate(story) if " requests, " in line)
    last = max(number for number, line in enumerate(story) if " requests, " in line)
    brief = [line for number, line in enumerate(story) if " requests, " not in line or number in (first, last)]
    words = [line for line in end if not line.startswith(("round-robin", "prefix-aware", "match call", "pod-"))]
    block = "\n".join(["```text", "$ make demo", *brief, *words, "```", ""])
    page = README.read_text()
    README.write_text(
        re.sub(r"(?<=<!-- demo -->\n).*?(?=<!-- /demo -->)", lambda _: block, page, count=1, flags=re.DOTALL)
    )


if __name__ == "__main__":
    main()
