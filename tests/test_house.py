"""The rules that every paper file keeps, as far as a program can check them.

A check takes source text and returns its complaints, a list of sentences. The tests at the end feed each
check a source with one fault, to show that it complains.
"""

import ast
import difflib
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import run_demos

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = {n: (ROOT / f"{n}.py").read_text() for n in run_demos.FILES if (ROOT / f"{n}.py").exists()}
FIELDS = ["Paper", "Here", "Not here", "Differs", "Claims", "Checked", "Read", "Run", "Axes"]
SECTIONS = ["Config", "Parameters", "The idea", "Kernel", "Model", "Sharded training", "Checkpoints", "Demo"]
OPTIONAL = {"Kernel", "Checkpoints"}  # no kernel pays everywhere, and not every paper released weights
STANDS_FOR = {"State": "Parameters", "Problem": "Model"}  # the sections of an optimizer: gsam, amos
# Each file has its own text of these. Under any other name two files have the same text, and mark it.
OWN = {"Config", "param_table", "init_params", "block", "forward", "loss_fn", "make_train_step", "main"}
OWN |= {"from_official", "to_official", "load", "save"}
MARK = "# same in every file"
ARRAYS = {"images", "x", "q", "k", "v", "logits", "labels", "maps", "tokens"}  # arguments that have a shape
SHAPE = re.compile(r"\[(\.\.\.|[^]]*[A-Z])[^]]*\]")  # [B,T,D] or [...], but not the range [-1, 1]
PACKAGES = {"jax", "numpy", "optax"}
# file -> what its two steps need besides the usual flags; a demo on text reads its own source
DEMO_FLAGS = {"memeff_attention": "--data memeff_attention.py --context 64 --longest 8"}
DEMO_FLAGS["amos"] = "--data amos.py --steps 10 --adamw 0.01 --amos 0.05"


def silent(complaints):
    assert not complaints, "\n" + "\n".join(complaints)


# ==== Checks of one file ==========================================================================


def field_lines(source):
    """The docstring's fields, {"Paper": [its lines], ...}, in order; what precedes them is under ""."""
    fields, current = {"": []}, ""
    for line in (ast.get_docstring(ast.parse(source)) or "").splitlines():
        head = next((f for f in FIELDS if re.match(rf"{f}(\s|$)", line)), None)
        if head:
            current = head
            fields[head] = []
        fields[current].append(line)
    return {name: [line for line in lines if line.strip()] for name, lines in fields.items()}


def check_docstring(source):
    fields = field_lines(source)
    opening = fields.pop("")
    out = [] if len(opening) == 1 else [f"the docstring opens with {len(opening)} lines, not one"]
    if list(fields) != FIELDS:
        out.append(f"docstring fields are {list(fields)}, not {FIELDS}")
    for name, lines in fields.items():
        if len(lines) > 8:
            out.append(f"docstring field {name} has {len(lines)} lines, 8 at most")
        out += [f"not indented below {name}: {line}" for line in lines[1:] if not line.startswith(" ")]
    return out


def check_imports(source):
    """At module level only PACKAGES and the standard library, and nowhere a part of this repository."""
    tree, out = ast.parse(source), []
    inside = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." if node.level else node.module.split(".")[0]]
        else:
            continue
        for name in names:
            if name in [".", *run_demos.FILES]:
                out.append(f"line {node.lineno} imports {name}, a part of the repository")
            elif node not in inside and name not in PACKAGES | sys.stdlib_module_names:
                out.append(f"line {node.lineno} imports {name} at module level")
    return out


def check_sections(source):
    titles = re.findall(r"^# ==== (.+?)(?:: .+)? ====+$", source, re.MULTILINE)
    names = [STANDS_FOR.get(title, title) for title in titles]
    wanted = [section for section in SECTIONS if section not in OPTIONAL or section in names]
    return [f"sections are {titles}, not {wanted}"] if names != wanted else []


def check_functions(source):
    """Short, with one level of closures at most; if public with a docstring, which gives shapes of arrays."""
    out, tree = [], ast.parse(source)
    inside = lambda node: [n for n in ast.walk(node) if isinstance(n, ast.FunctionDef) and n is not node]
    for node in inside(tree):
        length = node.end_lineno - node.lineno + 1
        if length > 50:
            out.append(f"{node.name} has {length} lines, 50 at most")
        if any(inside(inner) for inner in inside(node)):
            out.append(f"{node.name} has closures within closures")
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or node.name == "main":
            continue
        text = ast.get_docstring(node) or ""
        if not text and node.end_lineno - node.body[0].lineno >= 4:
            out.append(f"{node.name} has no docstring")
        arrays = ARRAYS & {a.arg for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]}
        if arrays and not SHAPE.search(text):
            out.append(f"{node.name} takes {', '.join(sorted(arrays))} and its docstring gives no shape")
    return out


def check_lines(source):
    lines = source.splitlines()
    out = [f"{len(lines)} lines, 750 at most"] if len(lines) > 750 else []
    for number, line in enumerate(lines, 1):
        if len(line) > 110:
            out.append(f"line {number} has {len(line)} columns, 110 at most")
        if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line):
            out.append(f"line {number} is unfinished: {line.strip()}")
    return out


def check_calls(source):
    """axis_types is spelled out, since its default changed between JAX versions; loading runs no pickle."""
    out = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if function.split(".")[-1] in ("make_mesh", "Mesh") and "axis_types" not in given:
            out.append(f"line {node.lineno}: {function} without axis_types")
        if function in ("np.load", "numpy.load", "jnp.load") and given.get("allow_pickle") != "False":
            out.append(f"line {node.lineno}: {function} without allow_pickle=False")
    return out


CHECKS = [check_docstring, check_imports, check_sections, check_functions, check_lines, check_calls]


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("check", CHECKS)
def test_rules(check, name):
    silent(check(SOURCES[name]))


# ==== Checks of a file against its tests, the other files and the README ==========================


def check_claims(source, tests):
    claims = [int(n) for n in re.findall(r"\bC(\d+)\b", "\n".join(field_lines(source).get("Claims", [])))]
    tested = {int(n) for n in re.findall(r"^def test_c(\d+)_", tests, re.MULTILINE)}
    out = [f"claims are numbered {claims}"] if claims != list(range(1, len(claims) + 1)) else []
    out += [f"no test of claim C{n}" for n in claims if n not in tested]
    return out + [f"test_c{n}_ tests no claim of the docstring" for n in sorted(tested - set(claims))]


def check_same(sources):
    copies, lambdas = {}, set()  # name -> {file: text}
    for file, source in sources.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
                node.name, node.decorator_list = node.targets[0].id, []
                lambdas.add(node.name)
            if isinstance(node, ast.FunctionDef | ast.ClassDef) or hasattr(node, "name"):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                text = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
                copies.setdefault(node.name, {})[f"{file}.py"] = text
    out = []
    for name, texts in copies.items():
        free = name in OWN | lambdas and not any(MARK in text for text in texts.values())
        if len(texts) == 1 or free:
            continue
        (first, text), *others = texts.items()
        for file, other in others:
            lines = difflib.unified_diff(text.splitlines(), other.splitlines(), first, file, lineterm="")
            out += [f"{name} differs:\n" + "\n".join(lines)] if other != text else []
        out += [f"{name} lacks the mark {MARK} in {file}" for file, t in texts.items() if MARK not in t]
    return out


def check_readme(readme, sources):
    """A table has a row for each file, and its column "lines" is right."""
    out, column, missing = [], None, set(sources)
    for line in readme.splitlines():
        cells = [cell.strip().lower() for cell in line.strip("| ").split("|")]
        column = cells.index("lines") if "lines" in cells else column
        for file in [file for file in missing if line.startswith("|") and f"{file}.py" in cells[0]]:
            missing.remove(file)
            count = str(len(sources[file].splitlines()))
            if column is None or cells[column] != count:
                out.append(f"{file}.py has {count} lines, unlike its row: {line}")
    return out + [f"README.md has no row for {file}.py" for file in sorted(missing)]


@pytest.mark.parametrize("name", SOURCES)
def test_claims_and_tests_agree(name):
    tests = ROOT / "tests" / f"test_{name}.py"
    silent(check_claims(SOURCES[name], tests.read_text()))


def test_one_name_one_text():
    silent(check_same(SOURCES))


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="no README.md yet")
def test_readme():
    silent(check_readme((ROOT / "README.md").read_text(), SOURCES))


def test_every_golden_is_listed():
    readme = (ROOT / "tests" / "golden" / "README.md").read_text()
    goldens = [path.stem for path in (ROOT / "tests" / "golden").glob("*/*.npz")]
    assert goldens and [stem for stem in goldens if f"\n| {stem} |" not in readme] == []


# ==== A file copied alone into an empty folder ====================================================


def check_alone(name, source, folder):
    """It imports, helps, and trains for two steps. -I: what the user has set for Python does not count."""
    (folder / f"{name}.py").write_text(source)
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    np.savez(folder / "tiny.npz", images=images, labels=np.arange(40, dtype=np.uint8) % 10)
    flags = "--steps 2 --batch 8 --data tiny.npz --out figure.png " + DEMO_FLAGS.get(name, "")

    def python(*arguments):
        command = [sys.executable, "-I", *arguments]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)

    out = []
    imported = python("-c", f"import sys; sys.path.append('.'); import {name}; print('imported')")
    if imported.returncode or imported.stdout != "imported\n":
        out.append(f"import of {name}: {imported.stdout}{imported.stderr}")
    usage = python(f"{name}.py", "--help")
    if usage.returncode or "--data" not in usage.stdout:
        out.append(f"{name}.py --help: {usage.stdout}{usage.stderr}")
    demo = python(f"{name}.py", *flags.split())
    last = demo.stdout.strip().splitlines()[-1:]
    if demo.returncode not in (0, 1) or not last or not run_demos.RESULT.fullmatch(last[0]):
        out.append(f"{name}.py for two steps: status {demo.returncode}, {demo.stdout}{demo.stderr}")
    if not (folder / "figure.png").exists():
        out.append(f"{name}.py drew no figure")
    return out


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", SOURCES)
def test_a_file_copied_alone_runs(name, tmp_path):
    silent(check_alone(name, SOURCES[name], tmp_path))


# ==== The checks themselves: silent on GOOD, not on GOOD with one fault ===========================

GOOD = '''"""A file that keeps the rules.

Paper     Doe 2020, "Doubling".
Here      all of it
Not here  nothing
Differs   nowhere
Claims    C1 twice one is two
          C2 twice two is four
Checked   by hand
Read      double
Run       python good.py
Axes      B batch
"""
import argparse
import jax
import numpy as np
# ==== Config ====
# ==== Parameters ====
# ==== The idea: doubling ====
def double(images):  # same in every file
    """Twice.  [B,H,W] -> [B,H,W]."""
    return 2 * images
half = lambda x: x / 2  # same in every file
# ==== Model ====
# ==== Sharded training ====
mesh = lambda n: jax.make_mesh((n,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
# ==== Demo ====
def main(argv=None):
    parser = argparse.ArgumentParser()
    for flag in ("--steps", "--batch", "--data", "--out"):
        parser.add_argument(flag)
    args = parser.parse_args(argv)
    np.load(args.data, allow_pickle=False)
    open(args.out, "w").close()
    print("result: held-out accuracy: got 97.6 %, expected 97.5 %, at least 97.0 %")
if __name__ == "__main__":
    main()
'''

BROKEN = [  # check, a text in GOOD, what replaces it, a part of the complaint
    (check_docstring, "Paper  ", "papers ", "fields are"),
    (check_docstring, "Differs   nowhere\n", "", "fields are"),
    (check_docstring, "Read      double\nRun   ", "Run       all\nRead  ", "fields are"),
    (check_docstring, "rules.\n", "rules.\n\nIt is short.\n", "opens with 2 lines"),
    (check_docstring, "nowhere\n", "nowhere\n" + 8 * "          here\n", "Differs has 9 lines"),
    (check_docstring, "nowhere\n", "nowhere\nNor elsewhere.\n", "not indented below Differs: Nor"),
    (check_imports, "import argparse", "import flax.linen", "imports flax at module level"),
    (check_imports, "import argparse", "if 1:\n    from matplotlib import cm", "imports matplotlib at"),
    (check_imports, "    return", "    import mixer\n    return", "imports mixer, a part"),
    (check_imports, "import argparse", "from . import data", "imports ., a part"),
    (check_sections, "# ==== Model", "# == Model", "sections are"),
    (check_sections, "# ==== Config", "# ==== Kernel ====\n# ==== Config", "sections are"),
    (check_functions, "[B,H,W] -> [B,H,W]", "In [-1, 1]", "double takes images"),
    (check_functions, '    """Twice.  [B,H,W] -> [B,H,W]."""\n', 4 * "    1\n", "has no docstring"),
    (check_functions, "    return", 48 * "    1\n" + "    return", "double has 51 lines"),
    (check_functions, "    return", "    def a():\n        def b(): ...\n    return", "closures within"),
    (check_lines, "import argparse", 750 * "\n", "lines, 750 at most"),
    (check_lines, "import argparse", "#" * 111, "111 columns"),
    (check_lines, "import argparse", "# TODO: all", "unfinished"),
    (check_calls, ", axis_types=(jax.sharding.AxisType.Auto,)", "", "make_mesh without axis_types"),
    (check_calls, ", allow_pickle=False", "", "without allow_pickle=False"),
    (check_calls, "allow_pickle=False", "allow_pickle=True", "without allow_pickle=False"),
]

ALONE = [  # the same for check_alone
    ("import argparse", "import argparse, helpers", "import of good"),
    ("# ==== Demo", "print('hello')\n# ==== Demo", "import of good: hello"),
    ('"--data"', '"--set"', "--help"),
    ("result:", "outcome:", "for two steps: status 0"),
    ("    np.load", "    raise SystemExit(2)\n    np.load", "for two steps: status 2"),
    ("    open(args.out", "    len(args.out", "drew no figure"),
]


def broken(old, new):
    assert old in GOOD, f"cannot plant the fault: GOOD has no {old!r}"
    return GOOD.replace(old, new, 1)


def complains(complaints, part):
    return any(part in complaint for complaint in complaints)


@pytest.mark.parametrize("check", CHECKS)
def test_checks_pass_what_is_right(check):
    assert check(GOOD) == []


@pytest.mark.parametrize(("check", "old", "new", "part"), BROKEN)
def test_checks_find_a_fault(check, old, new, part):
    assert complains(check(broken(old, new)), part)


@pytest.mark.parametrize(("old", "new", "part"), [("", "", None), *ALONE])
def test_check_alone_finds_a_fault(old, new, part, tmp_path):
    quick = broken(old, new).replace("import jax\n", "")  # GOOD does not need it, and it takes a second
    complaints = check_alone("good", quick, tmp_path)
    assert complains(complaints, part) if part else complaints == []


def test_check_claims_finds_a_fault():
    tests = "def test_c1_one(): ...\ndef test_c2_two(): ...\n"
    assert check_claims(GOOD, tests) == []
    assert complains(check_claims(GOOD, tests.replace("c2", "b2")), "no test of claim C2")
    assert complains(check_claims(GOOD, tests.replace("c2", "c3")), "test_c3_ tests no claim")
    assert complains(check_claims(broken("C2", "C4"), tests), "claims are numbered [1, 4]")


def test_check_same_finds_a_fault():
    assert check_same({"vit": GOOD, "mixer": GOOD}) == []
    assert check_same({"vit": GOOD, "mixer": broken("parse_args(argv)", "parse_args()")}) == []  # main is OWN
    other = broken("2 * images", "images + images")
    assert complains(check_same({"vit": GOOD, "mixer": other}), "double differs:\n--- vit.py\n+++ mixer.py")
    other = broken("x / 2", "x * 0.5")
    assert complains(check_same({"vit": GOOD, "mixer": other}), "half differs:")
    unmarked = broken("images):  # same in every file", "images):")
    assert complains(check_same({"vit": unmarked, "mixer": unmarked}), "lacks the mark")


def test_check_readme_finds_a_fault():
    lines = len(GOOD.splitlines())
    readme = f"| File | Lines |\n|---|---|\n| [vit.py](vit.py) | {lines} |\n"
    assert check_readme(readme, {"vit": GOOD}) == []
    assert complains(check_readme(readme, {"vit": GOOD + "\n"}), f"vit.py has {lines + 1} lines")
    assert complains(check_readme(readme, {"vit": GOOD, "amos": GOOD}), "no row for amos.py")
