"""The rules that every paper file keeps, as far as a program can check them.

A check takes source text and returns its complaints, a list of sentences. The tests at the end
feed each check a source with one fault, to show that it complains.
"""

import ast
import difflib
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import run_demos
import vit

ROOT = pathlib.Path(__file__).parents[1]
NAMES = [name for name in run_demos.FILES if (ROOT / f"{name}.py").exists()]
SOURCES = {name: (ROOT / f"{name}.py").read_text() for name in NAMES}
FIELDS = ["Paper", "Here", "Not here", "Differs", "Claims", "Checked", "Run", "Axes"]
MARK = "# same in every file"
PACKAGES = {"jax", "numpy", "optax"}
# Each file has its own text of these. Under any other name two files have one text, and mark it.
OWN = {
    *("Config", "State", "Recipe", "SIZES", "param_table", "block", "encode"),
    *("forward", "loss_fn", "param_specs", "init_state", "global_loss", "make_train_step", "adapt"),
    *("infer_config", "official_places", "from_official", "to_official", "save"),
    *("released_names", "embed", "self_attention", "mlp", "train", "draw", "main"),
    *("standard_config", "read_data", "init_mlp", "mlp_loss"),
}
# What makes a demo as short as two steps of training; most need TWO_STEPS and nothing else.
TWO_STEPS = "--steps 2 --data tiny.npz"
DEMO_FLAGS = {
    "performer": "--longest 12",
    "memeff_attention": "--longest 8",
    "vdm": "--steps 2 --data digits.npz",
}
# Constants of demos that would take long even so.
SMALLER = {
    "performer": {"LENGTH": 256, "SAMPLES": 1, "FEATURES": (16, 256)},
    "vdm": {"HELD_OUT": 32, "REPEATS": 1},
}


def silent(complaints):
    assert not complaints, "\n" + "\n".join(complaints)


# ==== Checks of one file ==========================================================================


def field_lines(source):
    """The docstring's fields, {"Paper": [its lines], ...}, in order; what precedes is under ""."""
    fields = {"": []}
    current = ""
    for line in (ast.get_docstring(ast.parse(source)) or "").splitlines():
        for field in FIELDS:
            if re.match(rf"{field}(\s|$)", line):
                current = field
                fields[field] = []
        fields[current].append(line)
    return {name: [line for line in lines if line.strip()] for name, lines in fields.items()}


def check_docstring(source):
    """One line, lines of code that show the use, then the fields in their order."""
    out = []
    fields = field_lines(source)
    first, *code = fields.pop("")
    if first.startswith(" "):
        out.append(
            f"the docstring opens with {first!r}, not with a line that says what the file is"
        )
    if not code or not all(line.startswith("    ") for line in code):
        out.append("the docstring shows no lines of code after its first line")
    if list(fields) != FIELDS:
        out.append(f"docstring fields are {list(fields)}, not {FIELDS}")
    for name, lines in fields.items():
        for line in lines[1:]:
            if not line.startswith(" "):
                out.append(f"not indented below {name}: {line}")
    return out


def imported_names(node):
    """The top-level packages of an import; "." for a relative one; nothing for another node."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return ["." if node.level else node.module.split(".")[0]]
    return []


def check_imports(source):
    """At module level only PACKAGES and the standard library; nowhere a part of the repository."""
    out = []
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {node for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        for name in imported_names(node):
            if name in [".", *run_demos.FILES]:
                out.append(f"line {node.lineno} imports {name}, a part of the repository")
            elif node not in inside and name not in PACKAGES | sys.stdlib_module_names:
                out.append(f"line {node.lineno} imports {name} at module level")
    return out


def check_calls(source):
    """axis_types is spelled out, since its default changed; loading an array runs no pickle."""
    out = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if function in ("jax.make_mesh", "Mesh", "jax.sharding.Mesh") and "axis_types" not in given:
            out.append(f"line {node.lineno}: {function} without axis_types")
        if function in ("np.load", "jnp.load") and given.get("allow_pickle") != "False":
            out.append(f"line {node.lineno}: {function} without allow_pickle=False")
    return out


def check_finished(source):
    """No note of unfinished work; no long function without a docstring."""
    out = []
    for number, line in enumerate(source.splitlines(), 1):
        if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line):
            out.append(f"line {number} is unfinished: {line.strip()}")
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node) and node.end_lineno - node.lineno >= 5:
                out.append(f"{node.name} has no docstring")
    return out


CHECKS = [check_docstring, check_imports, check_calls, check_finished]


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("check", CHECKS)
def test_rules(check, name):
    silent(check(SOURCES[name]))


# ==== Checks of a file against its tests, the other files and the README ==========================


def check_claims(source, tests):
    out = []
    text = "\n".join(field_lines(source).get("Claims", []))
    claims = [int(n) for n in re.findall(r"\bC(\d+)\b", text)]
    tested = {int(n) for n in re.findall(r"^def test_c(\d+)_", tests, re.MULTILINE)}
    if claims != list(range(1, len(claims) + 1)):
        out.append(f"claims are numbered {claims}")
    out += [f"no test of claim C{n}" for n in claims if n not in tested]
    out += [f"test_c{n}_ tests no claim of the docstring" for n in sorted(tested - set(claims))]
    return out


def texts_by_name(sources):
    """Name of a function, class or lambda at module level -> {file: its text}."""
    copies = {}
    for file, source in sources.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                name = node.name
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
                name = node.targets[0].id
                first = node.lineno
            else:
                continue
            text = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
            copies.setdefault(name, {})[f"{file}.py"] = text
    return copies


def check_same(sources):
    out = []
    for name, texts in texts_by_name(sources).items():
        marked = any(MARK in text for text in texts.values())
        if len(texts) == 1 or (name in OWN and not marked):
            continue
        (first, text), *others = texts.items()
        for file, other in others:
            if other != text:
                diff = difflib.unified_diff(
                    text.splitlines(), other.splitlines(), first, file, lineterm=""
                )
                out.append(f"{name} differs:\n" + "\n".join(diff))
        out += [f"{name} lacks the mark {MARK} in {f}" for f, t in texts.items() if MARK not in t]
    return out


@pytest.mark.parametrize("name", SOURCES)
def test_claims_and_tests_agree(name):
    tests = ROOT / "tests" / f"test_{name}.py"
    silent(check_claims(SOURCES[name], tests.read_text()))


def test_one_name_one_text():
    silent(check_same(SOURCES))


def test_readme_has_a_row_for_each_file():
    readme = (ROOT / "README.md").read_text()
    for name, source in SOURCES.items():
        rows = re.findall(rf"^\| \[{name}.py\]\({name}.py\) \|.*$", readme, re.MULTILINE)
        assert len(rows) == 1, name
        assert f"| {len(source.splitlines()):,} |" in rows[0], f"{name}.py has other lines now"


def test_readme_code_runs(tmp_path, monkeypatch):
    """With a small stand-in for the released checkpoint, of the same patches and image size."""
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    config = vit.Config(width=16, depth=1, heads=2, mlp=16, representation=16)
    vit.save("B_16.npz", vit.init_params(jax.random.key(0), config), config)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 30, 40, 3), dtype=np.uint8)
    names = {"pixels": pixels, "labels": np.arange(4)}
    exec(code, names)
    assert names["logits"].shape == (4, 1000)
    assert float(names["metrics"]["loss"]) == pytest.approx(np.log(10), rel=1e-5)
    assert int(names["state"].step) == 1


def test_every_golden_is_listed():
    readme = (ROOT / "tests" / "golden" / "README.md").read_text()
    goldens = [path.stem for path in (ROOT / "tests" / "golden").glob("*/*.npz")]
    assert goldens
    assert [stem for stem in goldens if f"\n| {stem} |" not in readme] == []


# ==== A file copied alone into an empty folder ====================================================


def check_alone(name, source, folder):
    """It imports, helps, and trains for two steps. -I leaves out the user's settings of Python."""
    out = []
    (folder / f"{name}.py").write_text(source)
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    np.savez(folder / "tiny.npz", images=images, labels=np.arange(40, dtype=np.uint8) % 10)
    np.savez(folder / "digits.npz", images=np.resize(images // 16, (600, 8, 8)))

    def python(*arguments):
        command = [sys.executable, "-I", *arguments]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)

    imported = python("-c", f"import sys; sys.path.append('.'); import {name}; print('imported')")
    if imported.returncode or imported.stdout != "imported\n":
        out.append(f"import of {name}: {imported.stdout}{imported.stderr}")
    usage = python(f"{name}.py", "--help")
    if usage.returncode or "--out" not in usage.stdout:
        out.append(f"{name}.py --help: {usage.stdout}{usage.stderr}")
    program = [f"{name}.py"]
    if name in SMALLER:
        changes = "; ".join(f"{name}.{constant} = {v}" for constant, v in SMALLER[name].items())
        start = f"import sys; sys.path.append('.'); import {name}; {changes}; "
        program = ["-c", start + f"{name}.run_program({name}.main)"]
    flags = f"{DEMO_FLAGS.get(name, TWO_STEPS)} --out figure.png"
    demo = python(*program, *flags.split())
    result = [line for line in demo.stdout.splitlines() if run_demos.RESULT.fullmatch(line)]
    if demo.returncode not in (0, 1) or not result:
        out.append(f"{name}.py for two steps: status {demo.returncode}, {demo.stdout}{demo.stderr}")
    if not (folder / "figure.png").exists():
        out.append(f"{name}.py drew no figure")
    return out


SLOW = ("performer", "moe", "vdm")  # whose short demos still take a quarter of a minute and more
ALONE = [pytest.param(name, marks=[pytest.mark.long] * (name in SLOW)) for name in SOURCES]


@pytest.mark.parametrize("name", ALONE)
def test_a_file_copied_alone_runs(name, tmp_path):
    silent(check_alone(name, SOURCES[name], tmp_path))


# ==== The checks themselves: silent on GOOD, not on GOOD with one fault ===========================

GOOD = '''"""A file that keeps the rules.

    two = double(one)

Paper     Doe 2020, "Doubling".
Here      all of it
Not here  nothing
Differs   nowhere
Claims    C1 twice one is two
          C2 twice two is four
Checked   by hand
Run       python good.py
Axes      B batch
"""
import argparse
import jax
import numpy as np
def double(images):  # same in every file
    """Twice.  [B,H,W] -> [B,H,W]."""
    return 2 * images
half = lambda x: x / 2  # same in every file
def mesh(n):
    return jax.make_mesh((n,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
def main(argv=None):
    parser = argparse.ArgumentParser()
    for flag in ("--steps", "--data", "--out"):
        parser.add_argument(flag)
    args = parser.parse_args(argv)
    np.load(args.data, allow_pickle=False)
    open(args.out, "w").close()
    print("result: held-out accuracy: got 97.6 %, expected 97.5 %, at least 97.0 %")
if __name__ == "__main__":
    main()
'''.replace("def main(argv=None):\n", 'def main(argv=None):\n    """Runs."""\n')

BROKEN = [  # check, a text in GOOD, what replaces it, a part of the complaint
    (check_docstring, "Paper  ", "papers ", "fields are"),
    (check_docstring, "Differs   nowhere\n", "", "fields are"),
    (check_docstring, "Checked   by hand\nRun   ", "Run       all\nChecked  ", "fields are"),
    (check_docstring, "    two = double(one)\n", "", "shows no lines of code"),
    (check_docstring, "    two = double(one)\n", "It is short.\n", "shows no lines of code"),
    (check_docstring, "nowhere\n", "nowhere\nNor elsewhere.\n", "not indented below Differs: Nor"),
    (check_imports, "import argparse", "import flax.linen", "imports flax at module level"),
    (
        check_imports,
        "import argparse",
        "if 1:\n    from matplotlib import cm",
        "imports matplotlib",
    ),
    (check_imports, "    return 2", "    import mixer\n    return 2", "imports mixer, a part"),
    (check_imports, "import argparse", "from . import data", "imports ., a part"),
    (check_calls, ", axis_types=(jax.sharding.AxisType.Auto,)", "", "make_mesh without axis_types"),
    (check_calls, ", allow_pickle=False", "", "without allow_pickle=False"),
    (check_calls, "allow_pickle=False", "allow_pickle=True", "without allow_pickle=False"),
    (check_finished, "import argparse", "# TODO: all", "unfinished"),
    (check_finished, '    """Runs."""\n', "", "main has no docstring"),
]

ALONE = [  # the same for check_alone
    ("import argparse", "import argparse, helpers", "import of good"),
    ("def main", "print('hello')\ndef main", "import of good: hello"),
    ('"--out"', '"--draw"', "--help"),
    ("result:", "outcome:", "for two steps: status 0"),
    ("    np.load", "    raise SystemExit(2)\n    np.load", "for two steps: status 2"),
    ("    open(args.out", "    len(args.out", "drew no figure"),
]


def broken(old, new):
    assert old in GOOD, f"cannot plant the fault: GOOD has no {old!r}"
    return GOOD.replace(old, new, 1)


def complains(complaints, text):
    return any(text in complaint for complaint in complaints)


@pytest.mark.parametrize("check", CHECKS)
def test_checks_pass_what_is_right(check):
    assert check(GOOD) == []


@pytest.mark.parametrize(("check", "old", "new", "text"), BROKEN)
def test_checks_find_a_fault(check, old, new, text):
    assert complains(check(broken(old, new)), text)


@pytest.mark.parametrize(("old", "new", "text"), [("", "", None), *ALONE])
def test_check_alone_finds_a_fault(old, new, text, tmp_path):
    quick = broken(old, new).replace("import jax\n", "")  # GOOD does not need it: a second saved
    complaints = check_alone("good", quick, tmp_path)
    if text is None:
        assert complaints == []
    else:
        assert complains(complaints, text)


def test_check_claims_finds_a_fault():
    tests = "def test_c1_one(): ...\ndef test_c2_two(): ...\n"
    assert check_claims(GOOD, tests) == []
    assert complains(check_claims(GOOD, tests.replace("c2", "b2")), "no test of claim C2")
    assert complains(check_claims(GOOD, tests.replace("c2", "c3")), "test_c3_ tests no claim")
    assert complains(check_claims(broken("C2", "C4"), tests), "claims are numbered [1, 4]")


def test_check_same_finds_a_fault():
    assert check_same({"vit": GOOD, "mixer": GOOD.replace("def mesh", "def other")}) == []
    own = broken("parse_args(argv)", "parse_args()").replace("def mesh", "def other")
    assert check_same({"vit": GOOD, "mixer": own}) == []  # main is OWN
    other = broken("2 * images", "images + images")
    complaints = check_same({"vit": GOOD, "mixer": other})
    assert complains(complaints, "double differs:\n--- vit.py\n+++ mixer.py")
    complaints = check_same({"vit": GOOD, "mixer": broken("x / 2", "x * 0.5")})
    assert complains(complaints, "half differs:")
    assert complains(check_same({"vit": GOOD, "mixer": GOOD}), "mesh lacks the mark")
