"""The README's main job with one trainer process and with two that share its experts (gloo, two CPU cores).

Both runs start from the same settings and stop at the first evaluation of 512 held-out words with 0.9 or more exact.

    reward_after            of the run on two ranks
    steps, steps_one        optimizer steps until then, of two ranks and of one
    ratio                   of these: at most 1.3 is asked
    step_seconds, ..._one   median time of a step, publishing included, on a machine with this `load`

    moe-rl bench main_job_mesh [--only one|two]
"""
import argparse
import os
import statistics
from _runs import UNTIL, Run, finish, folders
from moe_rl.bench import repository

MESH = ("--parallel.shard", "2", "--parallel.experts", "2")


def measure(args):
    p = argparse.ArgumentParser(prog="moe-rl bench main_job_mesh")
    p.add_argument("--only", choices=["one", "two"], default="")
    a = p.parse_args(args)
    root = repository()
    out, config, load = folders(root, "main_job_mesh"), str(root / "configs" / "main_job.toml"), []

    def job(name, *more):
        run = finish(Run(out / name, "--config", config, "--dir", str(out / name), *UNTIL, *more), 2400)
        load.append(round(os.getloadavg()[2], 2)) # of the last 15 minutes
        return run
    runs = {n: job(n, *more) for n, more in (("two", MESH), ("one", ())) if a.only in ("", n)}
    figures = {}
    for name, run in runs.items():
        end = "" if name == "two" else "_one"
        figures |= {f"reward_before{end}": run.evals[0]["exact"], f"reward_after{end}": run.evals[-1]["exact"],
            f"steps{end}": len(run.metrics), f"minutes{end}": run.seconds / 60, f"peak_gib{end}": run.peak / 2**30,
            f"step_seconds{end}": statistics.median(m["step_seconds"] for m in run.metrics),
            f"curve{end}": [[e["step"], round(e["exact"], 4)] for e in run.evals]}
    if len(runs) == 2: figures["ratio"] = figures["steps"] / figures["steps_one"]
    return dict(figures=figures, load=load)
