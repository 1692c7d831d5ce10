"""The simulator against runs of this machine: real orchestrator, embedded engine, the main job.

Two settings calibrate (seconds of a decode step, seconds of the trainer per step and token, pause for new weights); two
others, with another batch and another staleness, are predicted: seconds of a step and mean staleness."""
import json
from pathlib import Path

import numpy as np
from _runs import Run, finish, folders

from moe_rl.scale.kernels import fit_logs
from moe_rl.scale.loop import Loop, Plan, Workload
from moe_rl.scale.rollouts import Lengths
from moe_rl.scale.serve import Pace

CALIBRATE, PREDICT = ((16, 2), (8, 1)), ((24, 1), (12, 2))    # groups of a step, versions that engines may be behind
STEPS, WARM = 60, 15                                          # of a run; the first are not looked at


def run(out, groups, staleness, steps=STEPS):
    "One run of the main job with these settings; its metrics."
    name = f"{groups}_{staleness}"
    # the filter would make what is trained depend on what is learned; every group is kept, so that a step is a step
    args = ["--config", "configs/main_job.toml", "--dir", str(out/name), "--rl.steps", str(steps), "--rl.seconds", "0",
            "--rl.stop_at", "0", "--rl.stop_solved", "0", "--rl.zero_variance", "keep", "--eval.every", "0",
            "--eval.prompts", "16", "--checkpoint.every", "0", "--warm_start.seconds", "20", "--rl.groups_per_step",
            str(groups), "--rl.max_staleness", str(staleness)]
    return finish(Run(out/name, *args), 900).metrics


def look(rows, warm=WARM):
    "What of a run is compared, and what calibrates."
    late = rows[warm:] if len(rows) > 2*warm else rows[len(rows)//3:]
    mean = lambda key: float(np.mean([r[key] for r in late if r[key] is not None]))
    return dict(step=float(np.median(np.diff([r["seconds"] for r in late]))), staleness=mean("staleness"),
                trainer=float(np.median([r["step_seconds"] for r in late])), tokens=mean("tokens"),
                answer=mean("answer_tokens"),
                cut=mean("cut"), busy=1 - mean("engine_waits"), spread=.35)


def simulate(p, seen, groups, staleness, train, steps=120):
    "The loop with an engine of p seconds: a step, a sequence more, the pause for weights."
    a, b, pause = p
    # the more answers are cut, the nearer the mean is to the longest
    most = int(seen["answer"]*(2 - seen["cut"])) + 2
    prompt = max(2., seen["tokens"]/(seen["groups"]*8) - seen["answer"])
    w = Workload(Lengths(min(seen["answer"], most - .01), most, seen["spread"]), Lengths(prompt, int(2*prompt) + 1, .1))
    loop = Loop(Plan(Pace(tuple(a + b*n for n in range(257)), 0., b), 1, 256, 16384, w, groups, 8, staleness, steps,
        train, pause))
    rows = loop.run()[20:]
    return float(np.median(np.diff([r.ended for r in rows]))), float(np.mean([r.staleness
        for r in rows])), loop.replicas[0].busy/loop.now


def against_runs(root:Path, steps=STEPS)->dict:
    "Errors of the predictions: share of a step's seconds, versions of staleness."
    out = folders(root, "plan")
    seen = {setting: look(run(out, *setting, steps)) | dict(groups=setting[0]) for setting in (*CALIBRATE, *PREDICT)}
    x, y = [np.array([seen[s][k] for s in CALIBRATE]) for k in ("tokens", "trainer")]
    slope = max(0., float((y[0] - y[1])/(x[0] - x[1])))
    fixed = max(0., float(np.mean(y - slope*x)))
    train = lambda lengths: fixed + slope*sum(lengths)
    model = lambda p: np.concatenate([np.array(simulate(p, seen[s], *s, train))[[0, 2]] for s in CALIBRATE])
    p, err = fit_logs(model, [.004, 1e-4, .05], np.concatenate([[seen[s]["step"], max(.02, seen[s]["busy"])]
        for s in CALIBRATE]), rounds=25)
    print(f"calibrated: a decode step {1e3*p[0]:.2f} ms and {1e3*p[1]:.3f} a sequence, pause {p[2]:.3f} s, trainer "
          f"{fixed:.3f} s and {1e6*slope:.2f} us a token; residuals {err.round(3)}")
    steps_off, stale_off = [], []
    for s in PREDICT:
        step, stale, _ = simulate(p, seen[s], *s, train)
        print(f"  {s[0]} groups, at most {s[1]} behind: a step {seen[s]['step']:.3f} s, predicted {step:.3f} "
              f"({step/seen[s]['step']-1:+.1%}); staleness {seen[s]['staleness']:.2f}, predicted {stale:.2f}")
        steps_off.append(abs(step/seen[s]["step"] - 1))
        stale_off.append(abs(stale - seen[s]["staleness"]))
    return dict(loop_step=max(steps_off), loop_staleness=max(stale_off))


if __name__ == "__main__":
    import sys
    print(json.dumps(against_runs(Path.cwd(), int(sys.argv[1]) if len(sys.argv) > 1 else STEPS)))
