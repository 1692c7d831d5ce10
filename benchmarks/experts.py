"""Every path of moe.experts on one core, at the sizes of a small model: forward for decode batches, forward and
backward for training batches.

Times are the least of several interleaved rounds of thread CPU time, so that a busy machine disturbs them little.
`worst_choice` is the time of the path that `choose_experts` picks over
the time of the best path, largest over all sizes; `speedup_train` and `speedup_decode` are the plain loop's time over
the picked path's, geometric means.

    moe-rl bench experts [ROUNDS]        20 rounds unless said otherwise
"""
from statistics import geometric_mean
from time import thread_time

import torch

from moe_rl.moe.experts import (
    choose_experts, experts_loop, grouped_experts, inplace_experts, small_experts, sorted_experts)
from moe_rl.moe.routing import route

PATHS = dict(loop=experts_loop, grouped=grouped_experts, small=small_experts, sorted=sorted_experts,
    inplace=inplace_experts)
SIZES = [(8, 2, 96, 48), (8, 2, 128, 128), (16, 4, 256, 128)] # E, k, D, I
DECODE, TRAIN = (1, 8, 32, 128, 512), (512, 2048, 8192)


def interleaved(calls: dict, rounds: int) -> dict[str, float]:
    "Least CPU milliseconds of each call, the calls taking turns."
    best = dict.fromkeys(calls, float("inf"))
    for name in calls: calls[name]()
    for _ in range(rounds):
        for name, call in calls.items():
            start = thread_time()
            call()
            best[name] = min(best[name], (thread_time()-start)*1e3)
    return best


def case(E: int, k: int, D: int, I: int, T: int, train: bool, rounds: int) -> dict:
    "One row of the table."
    g = torch.Generator().manual_seed(T)
    r = route(torch.randn(T, E, generator=g), k)
    ts = [torch.randn(T, D, generator=g), r.weights, torch.randn(E, 2*I, D, generator=g)/D**.5,
        torch.randn(E, D, I, generator=g)/I**.5]
    direction = torch.randn(T, D, generator=g)

    def forward(f):
        with torch.inference_mode(): f(ts[0], r.idx, *ts[1:])

    def both(f):
        leaves = [t.detach().requires_grad_() for t in ts]
        torch.autograd.grad(f(leaves[0], r.idx, *leaves[1:]), leaves, direction)

    run = both if train else forward
    paths = {n: f for n, f in PATHS.items() if n != "small" or T <= 512}
    ms = interleaved({n: (lambda f=f: run(f)) for n, f in paths.items()}, rounds if T > 1000 else 5*rounds)
    chosen = next(n for n, f in PATHS.items() if f is choose_experts(T, k, ts[2]))
    return dict(E=E, k=k, D=D, I=I, T=T, what="train" if train else "decode",
        ms={n: round(v, 3) for n, v in ms.items()}, chosen=chosen)


def measure(args: list[str]) -> dict:
    torch.set_num_threads(1)
    rounds, rows = int(args[0]) if args else 20, []
    print(f"{'E,k,D,I':>14} {'T':>5} {'':6}", *(f"{n:>9}" for n in PATHS), " chosen   [ms]")
    for size in SIZES:
        for train, tokens in ((False, DECODE), (True, TRAIN)):
            for T in tokens:
                rows.append(row := case(*size, T, train, rounds))
                print(f"{','.join(map(str, size)):>14} {T:5} {row['what']:6}",
                    *(f"{row['ms'].get(n, float('nan')):9.3f}" for n in PATHS), f" {row['chosen']}", flush=True)
    picked = lambda r: r["ms"][r["chosen"]]
    gain = {w: geometric_mean(r["ms"]["loop"]/picked(r) for r in rows if r["what"] == w) for w in ("train", "decode")}
    figures = dict(worst_choice=max(picked(r)/min(r["ms"].values()) for r in rows), speedup_train=gain["train"],
        speedup_decode=gain["decode"])
    return dict(figures={n: round(v, 2) for n, v in figures.items()}, rows=rows)
