"""The planner against published measurements that took no part in its calibration: prediction, interval, figure and
error of every row; then signs, speed, exactness, and wide expert parallelism.

moe-rl bench plan [loop]          with `loop` also the simulator against runs of this machine (some minutes)
python benchmarks/plan.py freeze  fits the constants again and writes moe_rl/scale/constants.toml"""
import json
import subprocess
import sys
from pathlib import Path

from moe_rl.bench import load_records

ROOT = Path(__file__).resolve().parents[1]
SPEED = '''
import json, resource, sys, time
t = time.process_time()
import moe_rl.scale.plan as P
took = dict(import_s=time.process_time() - t)
assert "torch" not in sys.modules
import numpy as np
from moe_rl.scale.loop import Loop, Plan, Workload, rounds_time
from moe_rl.scale.rollouts import Lengths
from moe_rl.scale.serve import Pace
pace = Pace(tuple(.012 + 2e-5*b for b in range(257)), 2e-9, 1e-6)
def loop(rollouts, turns):
    w = Workload(Lengths(1500/turns, 8192//turns, .8), Lengths(200, 800, .3), turns, 100 if turns > 1 else 0, 2. if turns > 1 else 0.)
    return Plan(pace, 16, 256, 4_000_000, w, 128, 16, 1, rollouts//2048, lambda n: 30.)
t = time.process_time(); P.plan(P.load_setup("configs/plan_h200x28.toml")); took["plan_s"] = time.process_time() - t
t = time.process_time(); n = len(Loop(loop(1_000_000, 1)).run()); took["simulate_s"] = time.process_time() - t
t = time.process_time(); Loop(loop(100_000, 30)).run(); took["turns_s"] = time.process_time() - t
t = time.process_time(); pack = rounds_time(65536, 64, .5, 1e-4); n = Lengths(1700, 9000, .8).draw(np.random.default_rng(0), 2048).tolist(); [pack(n) for _ in range(10)]; took["packing_s"] = (time.process_time() - t)*48.8
took["mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
print(json.dumps(took))
'''


def show(compared):
    for r in sorted(compared, key=lambda r: (r["kind"], r["use"])):
        inside = r["low"] <= r["measured"] <= r["high"]
        print(f"  {r['use']:4s} {r['kind']:8s} {r['id']:36s} {r['measured']:10.4g} predicted {r['predicted']:10.4g} "
              f"[{r['low']:.4g}, {r['high']:.4g}] {r['error']:+7.1%}{'' if inside else '  outside'}")


def bars(figs):
    "Each figure against its bar."
    from moe_rl.scale.calibrate import BARS
    known = {name + end: bar for name, *both in BARS.values() for end, bar in zip(("_median", "_worst"), both) if bar}
    for k, bar in known.items(): print(f"  {k:14s} {figs[k]:.3f} of {bar:.2f}{'' if figs[k] <= bar else '  FAILS'}")
    for k, bar, good in (("cover", "at least .80", figs["cover"] >= .8), ("width", ".35", figs["width"] <= .35)):
        print(f"  {k:14s} {figs[k]:.3f} of {bar}{'' if good else '  FAILS'}")


def wide_ep():
    "Worst error of DeepEP's times that took no part in the fit, and two layouts with whole experts on many GPUs."
    from moe_rl.ep.traffic import LOW_LATENCY_US, fit_links, low_latency_bytes, low_latency_time
    from moe_rl.scale.hardware import cluster
    from moe_rl.scale.models import load_model
    from moe_rl.scale.train import Layout, stack, trainer_step
    worst = 0.
    for i in (0, 1):
        volume = low_latency_bytes()[i]
        links = fit_links({r: LOW_LATENCY_US[r][i] for r in (8, 32, 128)}, volume)
        worst = max([worst, *(abs(low_latency_time(r, volume, links)/LOW_LATENCY_US[r][i] - 1) for r in (16, 64, 256))])
    for name, gpus, ep, micro in (("glm-5", 128, 32, 65536), ("glm-5", 128, 128, 65536),
            ("trinity-large", 64, 32, 32768)):
        s = trainer_step(load_model(name), Layout(gpus, cp=4, ep=ep, optimiser="muon"), cluster("h200", gpus//8),
            stack("prime-rl"), 4e6, micro)
        exposed = s.terms["experts' rows, exposed"]/s.seconds
        print(f"  {name} on {gpus} H200, EP{ep} over {ep//8} nodes: step {s.seconds:.1f} s, traffic of experts "
              f"{s.ep_share:.1%} of it, exposed {exposed:.1%}")
    return worst


def measure(args:list[str])->dict:
    if not set(args) <= {"loop"}: raise SystemExit(f"plan takes `loop` or nothing, not {args}")
    from moe_rl.scale.calibrate import compare, figures, load_rows, signs
    rows = load_rows(ROOT/"benchmarks"/"data"/"plan_rows.toml")
    compared = compare(rows)
    show(compared)
    figs = figures(compared)
    bars(figs)
    missed = [r for r in compared if r["use"] == "VAL" and not r["low"] <= r["measured"] <= r["high"]]
    print("outside their interval, and what no formula has:")
    for r in missed: print(f"  {r['kind']:8s} {r['id']:36s} {r['error']:+7.1%}  {r.get('lacks', 'cause unknown')}")
    for r in rows:
        if r["use"] == "INC": print(f"  INC  {r['id']}: refused, missing {r['missing']}")
    say = signs(rows)
    print("signs:", say)
    p = subprocess.run([sys.executable, "-c", SPEED], cwd=ROOT, capture_output=True, text=True)
    if p.returncode: raise SystemExit(p.stderr)
    speed = json.loads(p.stdout.splitlines()[-1])
    print("CPU seconds: a plan {plan_s:.2f}, import {import_s:.2f}, a million rollouts {simulate_s:.1f} (engines, "
          "gate, buffer) and {packing_s:.1f} for packing their 488 steps, 100,000 of thirty turns {turns_s:.1f}; "
          "{mib:.0f} MiB".format(**speed))
    figs |= speed | dict(signs=all(say.values()), wide_ep=wide_ep())
    if "loop" in args:
        from _plan_loop import against_runs
        figs |= against_runs(ROOT)
    outside = [dict(id=r["id"], error=round(r["error"], 3), lacks=r.get("lacks", "")) for r in missed]
    return dict(figures={k: round(v, 4) if isinstance(v, float) else v for k, v in figs.items()},
        details=dict(signs=say, outside=outside, rows=[dict(id=r["id"], kind=r["kind"], use=r["use"],
        measured=r["measured"],
        predicted=round(r["predicted"], 4), error=round(r["error"], 4)) for r in compared]))


if __name__ == "__main__" and sys.argv[1:] == ["freeze"]:
    from moe_rl.scale.calibrate import freeze, load_rows
    text = freeze(load_rows(ROOT/"benchmarks"/"data"/"plan_rows.toml"),
        load_records("kernel_table", ROOT)[0]["details"])
    (ROOT/"moe_rl"/"scale"/"constants.toml").write_text(text)
