"""Runs the demos one after the other and prints one table: python tests/run_demos.py [vit ...]

A demo succeeds if it exits with 0 and prints a line such as this ("at most" where less is better):
    result: held-out accuracy: got 97.6 %, expected 97.5 %, at least 97.0 %
"""

import os
import pathlib
import re
import subprocess
import sys
import time

FILES = ["vit", "mixer", "moe", "performer", "memeff_attention", "vdm", "gsam", "amos"]
RESULT = re.compile(r"result: (.+): got (.+), expected (.+), (at (?:least|most) .+)")
ROOT = pathlib.Path(__file__).parents[1]


def run(name: str, root: pathlib.Path) -> list[str]:
    """Runs one demo, passes on what it prints as it comes, and returns its row of the table."""
    command = [f"{name}.py", "--out", f"figures/{name}.png"]
    print("$ python", *command, flush=True)
    start = time.monotonic()
    result = None
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=root,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            result = RESULT.fullmatch(line.strip()) or result
    seconds = f"{time.monotonic() - start:.0f}"
    if result is None:
        verdict = f"FAILED: exit status {process.returncode}, no result line"
        return [f"{name}.py", seconds, "-", "-", "-", verdict]
    metric, got, expected, floor = result.groups()
    verdict = "ok"
    if process.returncode:
        verdict = f"FAILED: exit status {process.returncode}, {floor}"
    return [f"{name}.py", seconds, metric, got, expected, verdict]


def main(names: list[str], root: pathlib.Path = ROOT) -> int:
    """Runs the demos of these names, or all. Returns the exit status: 1 if one failed."""
    there = [name for name in FILES if (root / f"{name}.py").exists()]
    wrong = [name for name in names if name not in there]
    if wrong or not there:
        choices = ", ".join(there) or "nothing"
        print("no demo", *wrong, "here: choose from", choices, file=sys.stderr)
        return 2
    (root / "figures").mkdir(exist_ok=True)
    rows = [run(name, root) for name in names or there]
    print()
    table = [["file", "seconds", "result", "got", "expected", "verdict"], *rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        print("  ".join(cells).rstrip())
    return int(any(row[-1] != "ok" for row in rows))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)  # what a shell expects after Ctrl-C, without a traceback
