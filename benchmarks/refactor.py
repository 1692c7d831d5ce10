"""A refactor changes nothing: a deterministic run ends in the same bits before and after.

    moe-rl bench refactor [--base COMMIT] [--head COMMIT] [--steps 60] [--warm 20] [--seeds 1] [--jobs 1]
    moe-rl bench refactor --pack FILE.tar.gz      the trees that it needs, for a machine without the repository
    moe-rl bench refactor --trees FILE.tar.gz     there

The main job, deterministic, at the commit BASE (the last one before the house was rebuilt, tagged `road-base`) and in
this tree, each from a tree of its own on this machine. A commit that means to change a number says so by a line
`Intended: reason` in its message; then the runs right before and right after it are made too, and what must be equal
is everything between two such commits.
"""
import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
import tomli_w
from _runs import Lanes, folders, jobs_option
from moe_rl.bench import repository
from moe_rl.errors import UserError
from moe_rl.train.checkpoint import latest
from moe_rl.train.weights import load_tensors

BASE = "4e92e183576f477515200f209c636436f64eb5f9"  # the tag `road-base`
RENAMED = {}  # dotted key of today -> what it was called at the base
TENSORS = {}  # name of a tensor today -> what it was called at the base


def git(root: Path, *args: str) -> str:
    "What git answers; an error of git's is the user's."
    r = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True)
    if r.returncode: raise UserError(f"bench refactor: git {args[0]}: {r.stderr.strip().splitlines()[-1]}")
    return r.stdout.strip()


def intended(root: Path, base: str, head: str) -> list[tuple[str, str]]:
    "Commits from `base` to `head` that mean to change a number, oldest first, with their reasons."
    out = []
    for commit in git(root, "log", "--reverse", "--format=%H", "--grep=^Intended:",
            f'{base}..{head or "HEAD"}').splitlines():
        body = git(root, "show", "-s", "--format=%B", commit)
        out.append((commit, next(l for l in body.splitlines()
            if l.startswith("Intended:")).removeprefix("Intended:").strip()))
    return out


def segments(root: Path, base: str, head: str) -> list[tuple[str, str]]:
    "Pairs of commits between which nothing may change; '' is this tree as it is."
    starts, ends = [git(root, "rev-parse", base)], []
    for commit, _ in intended(root, base, head):
        ends.append(git(root, "rev-parse", f"{commit}^"))
        starts.append(commit)
    return [*zip(starts, [*ends, head and git(root, "rev-parse", head)])]


def config(root: Path, a, seed: int, old: bool) -> dict:
    "The main job made deterministic, short, and with the names that a tree knows."
    tree = tomllib.loads((root / "configs" / "main_job.toml").read_text())
    change = {"schedule.deterministic": True, "warm_start.steps": a.warm, "rl.steps": a.steps, "rl.seconds": 0,
              "rl.stop_at": 0, "rl.groups_per_step": a.groups, "rl.reward": "score",
              "checkpoint.every": 0, "eval.every": 0, "eval.prompts": 16, "seed": seed}
    for key, value in change.items():
        *parents, leaf = key.split(".")
        node = tree
        for p in parents: node = node.setdefault(p, {})
        node[leaf] = value
    for new, before in RENAMED.items() if old else ():
        *parents, leaf = new.split(".")
        node = tree
        for p in parents: node = node.get(p, {})
        if leaf not in node: continue
        value, node = node.pop(leaf), tree
        *parents, leaf = before.split(".")
        for p in parents: node = node.setdefault(p, {})
        node[leaf] = value
    return tree


def unpack(root: Path, commit: str, tree: Path) -> Path:
    "The files of a commit."
    packed = subprocess.run(["git", "-C", str(root), "archive", commit, "moe_rl", "configs"], capture_output=True)
    if packed.returncode: raise UserError(f"bench refactor: git archive {commit}: {packed.stderr.decode()}")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as tar: tar.extractall(tree, filter="data")
    return tree


def plan(root: Path, base: str, head: str) -> dict:
    "What is compared with what, and which changes are meant."
    commits = intended(root, base, head)
    return dict(base=git(root, "rev-parse", base), segments=segments(root, base, head),
        reasons=[f"{c[:8]} {reason}" for c, reason in commits])


def pack(root: Path, file: Path, todo: dict, out: Path):
    "Write the trees of a plan, and the plan, as one archive."
    with tarfile.open(file, "w:gz") as tar:
        for commit in {c for pair in todo["segments"] for c in pair if c}:
            tar.add(unpack(root, commit, out/commit[:8]), commit[:8])
        (out/"plan.json").write_text(json.dumps(todo))
        tar.add(out/"plan.json", "plan.json")


def weights(tree: Path, name: str, old: bool, out: Path, a, seed: int) -> dict:
    "Tensors at the end of the job as the code of this tree runs it."
    job, file = out/name, out/f"{name}.toml"
    shutil.rmtree(job, ignore_errors=True)
    file.write_text(tomli_w.dumps(config(tree, a, seed, old) | {"dir": str(job)}))
    print(f"{name}: {a.warm} supervised and {a.steps} steps of RL", flush=True)
    r = subprocess.run([sys.executable, "-m", "moe_rl.cli", "run", "--config", str(file)], cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True, text=True)
    if r.returncode: raise RuntimeError(f"{name} ended with code {r.returncode}: {(r.stdout + r.stderr)[-800:]}")
    parts = [load_tensors(latest(job)/f"{part}.safetensors") for part in ("model", "optimizer")]
    return {f"{part}.{k if old else TENSORS.get(k, k)}": v for part, p in zip(("model", "optimizer"), parts)
        for k, v in p.items()}


def differences(a: dict, b: dict) -> list[str]:
    "Names of the tensors that are not the same, bit for bit."
    same = lambda k: k in a and k in b and a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and (a[k]
        == b[k]).all()
    return [k for k in sorted(a.keys() | b.keys()) if not same(k)]


def compared(root: Path, out: Path, todo: dict, a) -> bool:
    "Run both ends of every segment, and say which tensors differ."
    places = {c: out/c[:8] if c else root for pair in todo["segments"] for c in pair}
    def run(what):
        commit, seed = what
        return weights(places[commit], f"{commit[:8] or 'here'}-{seed}", commit == todo["base"], out, a, seed)
    ends, equal = [(c, seed) for seed in range(a.seeds) for c in places], True
    with Lanes(a.jobs) as pool: found = dict(zip(ends, pool.map(run, ends)))
    for seed in range(a.seeds):
        for before, after in todo["segments"]:
            different = differences(found[before, seed], found[after, seed])
            said = f"{len(different)} tensors differ, the first: {', '.join(different[:3])}"
            print(f"{before[:8]} to {after[:8] or 'here'}, seed {seed}: {said if different else 'the same bits'}",
                flush=True)
            equal = equal and not different
    return equal


def measure(args: list[str]) -> dict:
    "`moe-rl bench refactor`; see the module's docstring."
    p = argparse.ArgumentParser(prog="moe-rl bench refactor")
    p.add_argument("--base", default=BASE, help="commit or tag to compare with")
    p.add_argument("--head", default="", help="commit to compare (default: this tree as it is)")
    p.add_argument("--steps", type=int, default=60)
    p.add_argument("--warm", type=int, default=20, help="supervised steps before")
    p.add_argument("--groups", type=int, default=16, help="of a step")
    p.add_argument("--seeds", type=int, default=1)
    p.add_argument("--pack", type=Path, help="write the trees to this archive, and measure nothing")
    p.add_argument("--trees", type=Path, help="take the trees from this archive")
    jobs_option(p, "runs")
    a = p.parse_args(args)
    root, out = repository(), folders(repository(), "refactor")
    if a.trees:
        with tarfile.open(a.trees) as tar: tar.extractall(out, filter="data")
        todo = json.loads((out/"plan.json").read_text())
    else: todo = plan(root, a.base, a.head)
    if a.pack:
        pack(root, a.pack, todo, out)
        return dict(figures=dict(packed=len(todo["segments"])))
    if not a.trees:
        for commit in {c for pair in todo["segments"] for c in pair if c}: unpack(root, commit, out/commit[:8])
    for reason in todo["reasons"]: print(f"intended: {reason}")
    equal = compared(root, out, todo, a)
    return dict(figures=dict(equal=equal, intended=len(todo["reasons"]), steps=a.steps, seeds=a.seeds),
        base=todo["base"], reasons=todo["reasons"])
