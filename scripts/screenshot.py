"""Takes the picture of a report that the README shows: the top of the page, as a browser draws it."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SIZE = "1200,1300"
"""Width and height in pixels: the page down to the first row of charts."""


def main() -> int:
    """Exits with 1 where there is no browser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="such as runs/quickstart/distil/report.html")
    parser.add_argument("picture", type=Path, nargs="?", default=Path("docs/report.png"))
    arguments = parser.parse_args()
    wanted = os.environ.get("UNDERSTUDY_BROWSER")
    browser = next((path for name in ([wanted] if wanted else BROWSERS) if (path := shutil.which(name))), None)
    if browser is None:
        print(f"there is no browser; install one of {', '.join(BROWSERS)}, or name one in UNDERSTUDY_BROWSER")
        return 1
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser,
            "--headless",
            "--disable-gpu",
            "--hide-scrollbars",
            "--no-first-run",
            f"--user-data-dir={profile}",
            f"--window-size={SIZE}",
            "--virtual-time-budget=2000",
            f"--screenshot={arguments.picture.resolve()}",
            arguments.report.resolve(strict=True).as_uri(),
        ]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.insert(1, "--no-sandbox")  # the browser refuses its own sandbox to root, as in a container
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)  # noqa: S603
    print(f"{arguments.picture}: {arguments.picture.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
