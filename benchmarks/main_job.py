"""The main job on two CPU cores: an AFMoE learns to spell words backward; a control that cannot learn; a second task
by `--env` alone."""
import argparse
from _runs import Lanes, Run, finish, folders, jobs_option
from moe_rl.bench import repository


def measure(args):
    p = argparse.ArgumentParser(prog="moe-rl bench main_job")
    p.add_argument("--second", default="string_insertion", help="a task that was not used while tuning")
    p.add_argument("--only", choices=["main", "control", "second"], default="")
    p.add_argument("--control-steps", type=int, default=600, help="of the control: about as many as the job makes")
    jobs_option(p, "runs")
    a = p.parse_args(args)
    root = repository()
    out, config, figures = folders(root, "main_job"), str(root / "configs" / "main_job.toml"), {}

    def job(name, *more): return finish(Run(out / name, "--config", config, "--dir", str(out / name), *more), 900)
    more = dict(main=(), control=("--optim.muon_lr", "0", "--optim.adamw_lr", "0", "--rl.steps", str(a.control_steps),
        "--rl.stop_at", "0"), second=("--env", a.second))
    with Lanes(a.jobs) as pool:
        runs = {n: pool.submit(job, n, *words) for n, words in more.items() if a.only in ("", n)}
    runs = {n: r.result() for n, r in runs.items()}
    if main := runs.get("main"):
        metrics = main.metrics
        figures |= dict(reward_before=main.evals[0]["exact"], reward_after=main.evals[-1]["exact"],
                        minutes=main.seconds / 60, peak_gib=main.peak / 2**30,
                        stale_share=sum(m["stale_tokens"] for m in metrics) / sum(m["loss_tokens"] for m in metrics),
                        steps=len(metrics),
                        sft_seconds=main_warm_start(main), curve=curve(main))
    if control := runs.get("control"):
        figures |= dict(control_before=control.evals[0]["exact"], control_after=control.evals[-1]["exact"],
            control_curve=curve(control))
    if second := runs.get("second"):
        figures |= dict(reward_before_second=second.evals[0]["exact"], reward_after_second=second.evals[-1]["exact"],
            minutes_second=second.seconds / 60)
    return dict(figures=figures, second_task=a.second)


def curve(run) -> list[list[float]]: # [minutes of RL, share of exact answers] of each evaluation
    "What the picture of the README draws."
    return [[round(e["seconds"] / 60, 3), round(e["exact"], 4)] for e in run.evals]


def main_warm_start(run) -> float:
    "Seconds of supervised warm start, from the run's events."
    import ast
    line = next(l for l in (run.folder / "events.log").read_text().splitlines() if "warm start: " in l)
    return ast.literal_eval(line.split("warm start: ")[1])["sft_seconds"]
