"""Show what pip does on one line per package: `pip install ... | python jobs/show_install.py`.

Ends with pip's last words if it failed, so that make stops with the reason.
"""

import re
import sys
import time
from collections import deque

SHOWN = re.compile(r"^\s*(Collecting|Downloading|Building|Installing)\b")
DONE = re.compile(r"^(Successfully installed|Requirement already satisfied: raytrain)")
EVERY_S = 5.0  # longest silence between two lines


def main() -> int:
    """Print the course of an installation; return 1 if pip did not reach its end."""
    began = said = time.monotonic()
    last: deque[str] = deque(maxlen=15)
    packages, ended = 0, False
    for line in sys.stdin:
        last.append(line.rstrip())
        ended = ended or bool(DONE.match(line))
        packages += line.startswith("Collecting")
        now = time.monotonic()
        if SHOWN.match(line) and (now - said >= EVERY_S or line.startswith("Installing")):
            said = now
            words = line.split()
            print(f"  {now - began:4.0f} s  {packages} packages  {' '.join(words[:2])}"[:100])
    if ended:
        print(f"  {time.monotonic() - began:4.0f} s  done")
        return 0
    print("\n".join(last))
    return 1


if __name__ == "__main__":
    sys.exit(main())
