"""Predicted against measured times of dispatch and combine: DeepEP's published low-latency rows, and our own two
GPUs from the record of `ep_gpu`.

moe-rl bench traffic"""
from moe_rl.bench import NeedsHardware, load_records
from moe_rl.ep.traffic import LOW_LATENCY_US, fit_links, low_latency_bytes, low_latency_time, predict_own

FITTED, PREDICTED = (8, 32, 128), (16, 64, 256)


def measure(args:list[str])->dict:
    if args: raise SystemExit(f"traffic takes no arguments, not {args}")
    worst = []
    for i, what in enumerate(("dispatch", "combine")):
        volume = low_latency_bytes()[i]
        links = fit_links({r: LOW_LATENCY_US[r][i] for r in FITTED}, volume)
        print(f"low-latency {what}, {volume/1e6:.2f} MB a rank: {links.inside/1e3:.0f} GB/s inside a node, "
              f"{links.between/1e3:.1f} GB/s between (fitted on EP {', '.join(map(str, FITTED))})")
        for r, t in LOW_LATENCY_US.items():
            guess = low_latency_time(r, volume, links)
            print(f"  EP {r:3d}: published {t[i]:4d} us, model {guess:6.1f} us, "
                  f"{guess/t[i]-1:+.1%}{'' if r in PREDICTED else '  (in the fit)'}")
            if r in PREDICTED: worst.append(abs(guess/t[i]-1))
    records = [r for r in load_records("ep_gpu") if "sizes" in r.get("details", {}).get("kernels", {})]
    if not records: raise NeedsHardware("measured sizes of two GPUs: record `moe-rl bench ep_gpu --record` first")
    own = []
    for r in records:
        print(f"two GPUs, measured on {r['machine']} at {r['date']}; sizes that took no part in the fit:")
        for p in predict_own(r["details"]["kernels"]["sizes"]):
            print(f"  {p['what']:11s} {p['tokens']:5d} x {p['width']}: measured {p['measured']:7.1f}, predicted "
                  f"{p['predicted']:7.1f}, {p['predicted']/p['measured']-1:+.1%}")
            own.append(abs(p["predicted"]/p["measured"]-1))
    return dict(figures=dict(worst_published=round(max(worst), 4), worst_own=round(max(own), 4)),
        measured_on=[f"{r['machine']} {r['date']}" for r in records])
