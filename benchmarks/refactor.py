"""A refactor changes nothing: a deterministic run ends in the same bits before and after.

    moe-rl bench refactor [--base road-base] [--head COMMIT] [--steps 60] [--warm 20]

The main job, deterministic, at the commit BASE and in this tree, each from its own work tree on this machine. A commit that means to change a number says so by a line `Intended: reason` in its message; then the runs right
before and right after it are made too, and what must be equal is everything between two such commits. `--seeds 2` repeats all of it with another seed.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
import tomli_w
from _runs import folders
from moe_rl.bench import repository
from moe_rl.errors import UserError
from moe_rl.train.checkpoint import latest
from moe_rl.train.weights import load_tensors

RENAMED = {}  # dotted key of today -> what it was called at the base
TENSORS = {}  # name of a tensor today -> what it was called at the base


def git(root: Path, *args: str) -> str:
    "What git answers; an error of git's is the user's."
    r = subprocess.run(['git', '-C', str(root), *args], capture_output=True, text=True)
    if r.returncode: raise UserError(f'bench refactor: git {args[0]}: {r.stderr.strip().splitlines()[-1]}')
    return r.stdout.strip()


def intended(root: Path, base: str, head: str) -> list[tuple[str, str]]:
    "Commits from `base` to `head` that mean to change a number, oldest first, with their reasons."
    out = []
    for commit in git(root, 'log', '--reverse', '--format=%H', '--grep=^Intended:',
            f'{base}..{head or "HEAD"}').splitlines():
        body = git(root, 'show', '-s', '--format=%B', commit)
        out.append((commit, next(l for l in body.splitlines()
            if l.startswith('Intended:')).removeprefix('Intended:').strip()))
    return out


def segments(root: Path, base: str, head: str) -> list[tuple[str, str]]:
    "Pairs of commits between which nothing may change; '' is this tree as it is."
    starts, ends = [git(root, 'rev-parse', base)], []
    for commit, _ in intended(root, base, head):
        ends.append(git(root, 'rev-parse', f'{commit}^'))
        starts.append(commit)
    return [*zip(starts, [*ends, head and git(root, 'rev-parse', head)])]


def config(root: Path, a, seed: int, old: bool) -> dict:
    "The main job made deterministic, short, and with the names that a tree knows."
    tree = tomllib.loads((root / 'configs' / 'main_job.toml').read_text())
    change = {'schedule.deterministic': True, 'warm_start.steps': a.warm, 'rl.steps': a.steps, 'rl.seconds': 0,
              'rl.stop_at': 0, 'rl.groups_per_step': a.groups, 'rl.reward': 'score',
              'checkpoint.every': 0, 'eval.every': 0, 'eval.prompts': 16, 'seed': seed}
    for key, value in change.items():
        *parents, leaf = key.split('.')
        node = tree
        for p in parents: node = node.setdefault(p, {})
        node[leaf] = value
    for new, before in RENAMED.items() if old else ():
        *parents, leaf = new.split('.')
        node = tree
        for p in parents: node = node.get(p, {})
        if leaf not in node: continue
        value, node = node.pop(leaf), tree
        *parents, leaf = before.split('.')
        for p in parents: node = node.setdefault(p, {})
        node[leaf] = value
    return tree


def weights(root: Path, commit: str, out: Path, a, seed: int) -> dict:
    "Tensors at the end of the job as this commit runs it."
    name, old = f'{commit[:8] or "here"}-{seed}', commit == git(root, 'rev-parse', a.base)
    tree = root if not commit else out / f'tree-{commit[:8]}'
    if commit and not tree.exists(): git(root, 'worktree', 'add', '--detach', '--force', str(tree), commit)
    job, file = out / name, out / f'{name}.toml'
    shutil.rmtree(job, ignore_errors=True)
    file.write_text(tomli_w.dumps(config(root, a, seed, old) | {'dir': str(job)}))
    print(f'{name}: {a.warm} supervised and {a.steps} steps of RL', flush=True)
    r = subprocess.run([sys.executable, '-m', 'moe_rl.cli', 'run', '--config', str(file)], cwd=tree,
        env=os.environ | {'PYTHONPATH': str(tree)}, capture_output=True, text=True)
    if r.returncode: raise RuntimeError(f'{name} ended with code {r.returncode}: {(r.stdout + r.stderr)[-800:]}')
    parts = [load_tensors(latest(job) / f'{part}.safetensors') for part in ('model', 'optimizer')]
    return {f'{part}.{k if old else TENSORS.get(k, k)}': v for part, p in zip(('model', 'optimizer'), parts)
        for k, v in p.items()}


def differences(a: dict, b: dict) -> list[str]:
    "Names of the tensors that are not the same, bit for bit."
    same = lambda k: k in a and k in b and a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and (a[k]
        == b[k]).all()
    return [k for k in sorted(a.keys() | b.keys()) if not same(k)]


def measure(args: list[str]) -> dict:
    "`moe-rl bench refactor`; see the module's docstring."
    p = argparse.ArgumentParser(prog='moe-rl bench refactor')
    p.add_argument('--base', default='road-base', help='commit or tag to compare with')
    p.add_argument('--head', default='', help='commit to compare (default: this tree as it is)')
    p.add_argument('--steps', type=int, default=60)
    p.add_argument('--warm', type=int, default=20, help='supervised steps before')
    p.add_argument('--groups', type=int, default=16, help='of a step')
    p.add_argument('--seeds', type=int, default=1)
    a = p.parse_args(args)
    root, out, equal = repository(), folders(repository(), 'refactor'), True
    changes = intended(root, a.base, a.head)
    for commit, reason in changes: print(f'intended: {commit[:8]} {reason}')
    try:
        for seed in range(a.seeds):
            for before, after in segments(root, a.base, a.head):
                different = differences(weights(root, before, out, a, seed), weights(root, after, out, a, seed))
                print(f'{before[:8]} to {after[:8] or "here"}, seed {seed}: '
                    + (f'{len(different)} tensors differ, the first: {", ".join(different[:3])}' if different
                        else 'the same bits'), flush=True)
                equal = equal and not different
    finally:
        for tree in out.glob('tree-*'): git(root, 'worktree', 'remove', '--force', str(tree))
    return dict(figures=dict(equal=equal, intended=len(changes), steps=a.steps, seeds=a.seeds),
        base=git(root, 'rev-parse', a.base), reasons=[r for _, r in changes])
