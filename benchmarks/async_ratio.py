"""Time to 0.9 exact answers, synchronous over asynchronous: the same run with max_staleness 0 and 2, one thread a process, three seeds in turn."""
import argparse, statistics
from _runs import Run, finish, folders
from moe_rl.bench import repository


def time_to(run, goal: float, window: int = 5) -> float:
    "Seconds of RL until the mean of `window` steps' exact share on fresh training prompts reaches `goal`."
    shares = [(m['seconds'], m['exact']) for m in run.metrics if m['played']]
    for i in range(window - 1, len(shares)):
        if sum(s for _, s in shares[i - window + 1:i + 1]) / window >= goal: return shares[i][0]
    raise RuntimeError(f'{run.folder.name}: never reached {goal}')


def measure(args):
    p = argparse.ArgumentParser(prog='moe-rl bench async_ratio')
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--goal', type=float, default=0.9)
    a = p.parse_args(args)
    root = repository()
    out, ratios, rows = folders(root, 'async_ratio'), [], []
    for seed in range(a.seeds):
        seconds = {}
        for name, staleness in (('async', 2), ('sync', 0)):
            run = finish(Run(out / f'{name}_{seed}', '--config', str(root / 'benchmarks' / 'async_ratio.toml'), '--dir',
                             str(out / f'{name}_{seed}'), '--seed', str(seed),
                             '--rl.max_staleness', str(staleness)), 900)
            seconds[name] = time_to(run, a.goal)
        ratios.append(seconds['sync'] / seconds['async'])
        rows.append(seconds)
        print(f'seed {seed}: synchronous {seconds["sync"]:.1f} s, asynchronous {seconds["async"]:.1f} s, ratio '
              f'{ratios[-1]:.2f}', flush=True)
    return dict(figures=dict(ratio=statistics.median(ratios), ratios=ratios), seconds=rows)
