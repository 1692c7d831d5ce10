"""One hand over all notebooks and all code: what a reader relies on, measured.

What does not hold yet is named in house.json, with its size; that list only shrinks.
`python tests/test_notebooks.py` prints the sizes and takes from the list whatever has been mended."""
import ast
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
HOUSE = ROOT/"tests"/"house.json"
NOTEBOOKS = sorted((ROOT/"nbs").glob("*/[0-9]*.ipynb"))
CODE = ["moe_rl/__init__.py", "nbs", "tests", "benchmarks", "docs"] # other modules are made of nbs/

def name_of(path): return path.relative_to(ROOT/"nbs").with_suffix("").as_posix()
def cells_of(path): return json.loads(path.read_text())["cells"]
def source(cell): return "".join(cell["source"])
def said(cell): return set(re.findall(r"^#\|\s*(\w+)", source(cell), re.M)) if cell["cell_type"] == "code" else set()
def pictured(cell): return any(kind.startswith("image/") for o in cell.get("outputs", []) for kind in o.get("data", {}))

# ---------------------------------------------------------------- what is measured, each as {where: how much}
def by_ruff(rule, *options):
    "Violations of a rule of ruff, by file."
    r = subprocess.run([sys.executable, "-m", "ruff", "check", "--select", rule, "--output-format", "json", *options,
        *CODE], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode in (0, 1), r.stderr
    return dict(Counter(Path(d["filename"]).relative_to(ROOT).as_posix() for d in json.loads(r.stdout)))

def long_lines():
    "Lines of code that end after column 120."
    return by_ruff("E501", "--line-length", "120")

def two_statements():
    "Lines on which a second statement follows a semicolon."
    return by_ruff("E702")

def single_quotes():
    "Strings in single quotes that double quotes would hold as they are."
    return by_ruff("Q000", "--config", "lint.flake8-quotes.inline-quotes='double'")

def long_classes():
    "Lines of classes that fill more than 60 lines of a cell: small classes, or methods by `@patch`, read better."
    found = {}
    for path in NOTEBOOKS:
        for cell in cells_of(path):
            if cell["cell_type"] != "code" or "class " not in source(cell): continue
            tree = ast.parse(re.sub(r"^[!%].*$", "pass", source(cell), flags=re.M))
            for c in tree.body:
                if isinstance(c, ast.ClassDef) and (lines := c.end_lineno - c.lineno + 1) > 60:
                    found[f"{name_of(path)} {c.name}"] = lines
    return found

def late_outputs():
    "Number of the first cell that shows something, where it comes after the 15th."
    first = {name_of(p): next((i for i, c in enumerate(cells_of(p), 1) if c.get("outputs")), 1000) for p in NOTEBOOKS}
    return {n: i for n, i in first.items() if i > 15}

def without_picture():
    "Notebooks in which nothing is drawn."
    return {name_of(p): 1 for p in NOTEBOOKS if not any(map(pictured, cells_of(p)))}

def endings():
    "Notebooks whose last cell is not `## What we built`: three lines or so, a link to the next notebook, an exercise."
    found = {}
    for path in NOTEBOOKS:
        last = cells_of(path)[-1]
        text = source(last)
        form = r"^## What we built\n\n(?s:.)*\]\((?s:.)*^\*\*Exercise\.\*\* [^a-z]"
        good = last["cell_type"] == "markdown" and re.search(form, text, re.M)
        if not good: found[name_of(path)] = 1
    return found

def exports_in_a_row():
    "Longest row of export cells without a word or an example between them, where it is longer than two."
    found = {}
    for path in NOTEBOOKS:
        row = longest = 0
        for cell in cells_of(path):
            if "export" in said(cell): row += 1
            elif not said(cell) & {"hide", "default_exp"}: row = 0
            longest = max(longest, row)
        if longest > 2: found[name_of(path)] = longest
    return found

def shared_numbers():
    "Notebooks of a folder that share a number, so that nobody knows which one comes first."
    count = Counter((p.parent.name, p.name[:2]) for p in NOTEBOOKS)
    return {"/".join(k): n for k, n in count.items() if n > 1}

RULES = [long_lines, two_statements, single_quotes, long_classes, late_outputs, without_picture, endings,
    exports_in_a_row, shared_numbers]

# ---------------------------------------------------------------- the list that only shrinks
@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
def test_one_hand(rule):
    allowed, found = json.loads(HOUSE.read_text()).get(rule.__name__, {}), rule()
    new = [f"{where}: {size}, allowed {allowed.get(where, 0)}" for where, size in found.items()
        if size > allowed.get(where, 0)]
    assert not new, f"{rule.__doc__}\n" + "\n".join(new)

def test_the_list_names_what_is_there():
    "No exception for a rule, a notebook or a file that does not exist."
    there = {name_of(p) for p in NOTEBOOKS} | {"/".join((p.parent.name, p.name[:2])) for p in NOTEBOOKS}
    for rule, places in json.loads(HOUSE.read_text()).items():
        assert rule in {r.__name__ for r in RULES}
        gone = [w for w in places if w.split()[0] not in there and not (ROOT/w).exists()]
        assert not gone, f"{rule}: {gone} do not exist: python tests/test_notebooks.py"

def test_rules_notice(tmp_path, monkeypatch):
    "A notebook that breaks every rule is seen by every rule."
    folder = tmp_path/"nbs"/"00_x"
    folder.mkdir(parents=True)
    export = dict(cell_type="code", source="#| export\nx = 'a'; y = 1 # " + "long "*30, outputs=[], metadata={},
        execution_count=None, id="a")
    whole = export | dict(source="class Long:\n" + "    x = 1\n"*70)
    for name in ("00_a", "00_b"):
        (folder/f"{name}.ipynb").write_text(json.dumps(dict(cells=[export]*3 + [whole], metadata={}, nbformat=4,
            nbformat_minor=5)))
    for folder in CODE[1:]: (tmp_path/folder).mkdir(exist_ok=True)
    (tmp_path/"moe_rl").mkdir()
    (tmp_path/"moe_rl"/"__init__.py").touch()
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "NOTEBOOKS", sorted((tmp_path/"nbs").glob("*/[0-9]*.ipynb")))
    assert [r.__name__ for r in RULES if not r()] == []

if __name__ == "__main__":
    allowed = json.loads(HOUSE.read_text()) if HOUSE.exists() else None
    left = {}
    for rule in RULES:
        found = rule()
        before = found if allowed is None else allowed.get(rule.__name__, {})
        kept = {w: min(n, found[w]) for w, n in sorted(before.items()) if w in found}
        if kept: left[rule.__name__] = kept
        print(f"{rule.__name__}: {sum(found.values())} in {len(found)} places, {sum(kept.values())} allowed")
    HOUSE.write_text(json.dumps(left, indent=1) + "\n")
