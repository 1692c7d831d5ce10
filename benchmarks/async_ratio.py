"""Time to 0.9 exact answers, synchronous over asynchronous: the same run with max_staleness 0 and 2, one thread a
process, three seeds in turn."""
import argparse, statistics
from _runs import Lanes, Run, finish, folders, jobs_option
from moe_rl.bench import repository


def time_to(run, goal: float, window: int = 5) -> float:
    "Seconds of RL until the mean of `window` steps' exact share on fresh training prompts reaches `goal`."
    shares = [(m["seconds"], m["exact"]) for m in run.metrics if m["played"]]
    for i in range(window - 1, len(shares)):
        if sum(s for _, s in shares[i - window + 1:i + 1]) / window >= goal: return shares[i][0]
    raise RuntimeError(f"{run.folder.name}: never reached {goal}")


def measure(args):
    p = argparse.ArgumentParser(prog="moe-rl bench async_ratio")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--goal", type=float, default=0.9)
    jobs_option(p, "runs")
    a = p.parse_args(args)
    root = repository()
    out = folders(root, "async_ratio")
    def job(seed, name, staleness):
        run = finish(Run(out / f"{name}_{seed}", "--config", str(root / "benchmarks" / "async_ratio.toml"), "--dir",
                         str(out / f"{name}_{seed}"), "--seed", str(seed),
                         "--rl.max_staleness", str(staleness)), 900)
        return time_to(run, a.goal)
    jobs = [(seed, name, staleness) for seed in range(a.seeds) for name, staleness in (("async", 2), ("sync", 0))]
    with Lanes(a.jobs) as pool: times = list(pool.map(lambda j: job(*j), jobs))
    rows = [{"async": times[2*i], "sync": times[2*i + 1]} for i in range(a.seeds)]
    ratios = [r["sync"] / r["async"] for r in rows]
    for seed, (r, ratio) in enumerate(zip(rows, ratios)):
        print(f'seed {seed}: synchronous {r["sync"]:.1f} s, asynchronous {r["async"]:.1f} s, ratio {ratio:.2f}')
    return dict(figures=dict(ratio=statistics.median(ratios), ratios=ratios), seconds=rows, side_by_side=a.jobs)
