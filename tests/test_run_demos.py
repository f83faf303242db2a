"""make demo: the table and the exit status."""

import re

import pytest

import run_demos

PRINT = """
import sys
print('result: accuracy: got {} %, expected 9 %, at least 8 %')
sys.exit({})
"""


@pytest.mark.parametrize(
    ("demo", "status", "row"),
    [
        (PRINT.format(9, 0), 0, ["accuracy", "9 %", "9 %", "ok"]),
        (PRINT.format(7, 1), 1, ["accuracy", "7 %", "9 %", "FAILED: exit status 1, at least 8 %"]),
        ("print('hello')\n", 1, ["-", "-", "-", "FAILED: exit status 0, no result line"]),
        ("1 / 0\n", 1, ["-", "-", "-", "FAILED: exit status 1, no result line"]),
    ],
)
def test_a_demo_is_run_and_judged(demo, status, row, tmp_path, capsys):
    (tmp_path / "vit.py").write_text(demo)
    assert run_demos.main([], tmp_path) == status
    file, _seconds, *rest = re.split(r"\s{2,}", capsys.readouterr().out.splitlines()[-1])
    assert [file, *rest] == ["vit.py", *row]


def test_an_unknown_demo_is_one_sentence(tmp_path, capsys):
    (tmp_path / "vit.py").touch()
    assert run_demos.main(["vti"], tmp_path) == 2
    assert capsys.readouterr().err == "no demo vti here: choose from vit\n"
