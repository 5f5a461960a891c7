"""Write a picture of a report: python scripts/screenshot.py report.html report.png [--dark] [--full] [--select CSS].

Needs Chromium; nothing is fetched and nothing else is installed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from chromium import Chromium


def shoot(
    report: Path,
    picture: Path,
    *,
    dark: bool = False,
    width: int = 1280,
    height: int = 900,
    scale: float = 1.0,
    full: bool = False,
    select: str | None = None,
) -> None:
    """Write a PNG of a page: its first screen, all of it, or the element that a selector finds."""
    with Chromium() as browser:
        page = browser.open(report, width=width, height=height, dark=dark, scale=scale)
        clip = None
        if select is not None:
            clip = page.evaluate(
                f"(({{x, y, width, height}}) => ({{x: x + scrollX, y: y + scrollY, width, height}}))"
                f"(document.querySelector({select!r}).getBoundingClientRect())"
            )
        elif full:
            tall = page.evaluate("document.documentElement.scrollHeight")
            clip = {"x": 0, "y": 0, "width": width, "height": tall}
        page.screenshot(picture, clip=clip)


def main() -> None:
    """Read the command line and write the picture."""
    parser = argparse.ArgumentParser(description="Write a picture of a report with headless Chromium.")
    parser.add_argument("report", type=Path, help="the HTML file")
    parser.add_argument("picture", type=Path, help="the PNG file to write")
    parser.add_argument("--dark", action="store_true", help="with the dark theme")
    parser.add_argument("--width", type=int, default=1280, help="of the window, in CSS pixels")
    parser.add_argument("--height", type=int, default=900, help="of the window, in CSS pixels")
    parser.add_argument("--scale", type=float, default=1.0, help="device pixels for each CSS pixel")
    parser.add_argument("--full", action="store_true", help="the whole page, not only its first screen")
    parser.add_argument("--select", help="only the element that this CSS selector finds")
    options = vars(parser.parse_args())
    shoot(**options)
    print(options["picture"])


if __name__ == "__main__":
    main()
