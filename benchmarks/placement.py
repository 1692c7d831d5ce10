"""Placement of 58 layers x 256 experts in 8 groups (a token takes 4 groups and 8 experts in them), loads Zipf 0.8: EPLB
beside ours.

    moe-rl bench placement [--layers 58] [--tokens 16384]

Tokens are drawn so that their expert loads are the wanted ones (within a percent). `random` rows: expected figures when
a replica is drawn by its share. `realised` rows: the tokens sent through the node-aware choice
and counted. `seconds` is the median of seven runs of placing and weighing all layers."""
import argparse, statistics, time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from moe_rl.ep.eplb import balance, draw_routes, eplb, evenly, gpu_loads, gumbel, nodes_per_token, strengths, zipf
from moe_rl.ep.placement import company, moved, place, place_ungrouped, rebalance, weigh
from moe_rl.ep.replicas import realised

E, GROUPS, K = 256, 8, 8


def layer(job):
    "Tokens of one layer, before and after a drift of the loads by total variation 0.2, and tokens of a second window."
    seed, T = job
    rng = np.random.default_rng(seed)
    loads, noise = zipf(rng, E), gumbel(rng, T, E)
    few = noise[:min(T, 2048)]
    a = strengths(loads, noise, 5, strengths(loads, few, 8))
    other = rng.permutation(loads)
    drift = loads + (other-loads)*(.2/(abs(other-loads).sum()/2))
    b = strengths(drift, noise, 5, strengths(drift, few, 8, a))
    pick = lambda a, noise: draw_routes(a, noise).astype(np.int64)
    return loads, pick(a, noise), drift, pick(b, noise), pick(a, gumbel(rng, T, E)) if seed % 8 == 0 else None


def measure(args:list[str])->dict:
    p = argparse.ArgumentParser("placement")
    p.add_argument("--layers", type=int, default=58)
    p.add_argument("--tokens", type=int, default=16384)
    a = p.parse_args(args)
    start = time.time()
    with ThreadPoolExecutor(2) as pool: got = list(pool.map(layer, [(s, a.tokens) for s in range(a.layers)]))
    loads, drift = (np.stack([g[i] for g in got]) for i in (0, 2))
    routes, after = (np.stack([g[i] for g in got], 1) for i in (1, 3))
    counts = lambda routes: np.stack([np.bincount(routes[:,l].ravel(), minlength=E) for l in range(routes.shape[1])])
    off = [abs(c/c.sum(1, keepdims=True)-w).sum(1).max()/2 for c, w in ((counts(routes), loads),
        (counts(after), drift))]
    print(f"{a.layers} layers, {a.tokens} tokens each, drawn in {time.time()-start:.0f} s; loads of the tokens off by "
          f"at most {max(off):.4f} (total variation)")
    figures = {}

    def row(name, bal, nodes, **keep):
        print(f"{name:44s} {bal:.4f} {nodes:.3f}")
        figures.update(keep)

    start = time.time()
    together, alone = company(routes[:2048], E, GROUPS)
    print(f"company of {min(2048, a.tokens)} recorded tokens per layer: {time.time()-start:.2f} s\n{'':44s} balance "
          "nodes per token")
    for slots, nodes, gpus in ((320, 8, 64), (288, 4, 32)):
        print(f"{slots} slots on {gpus} GPUs of {nodes} nodes")
        for kind, groups in (("hierarchical", GROUPS), ("global", 1)):
            e = evenly(eplb(loads, slots, groups, nodes, gpus), E, nodes, gpus)
            bal, visits = balance(gpu_loads(e, loads)), nodes_per_token(e, routes)
            row(f"  EPLB {kind}, random", bal, visits, **{f"eplb_{kind}_balance_{gpus}": bal,
                f"eplb_{kind}_nodes_{gpus}": visits})
        seconds = []
        for _ in range(7):
            start = time.perf_counter()
            even = place(loads, slots, GROUPS, nodes, gpus, together, alone, K)
            ours = weigh(even, loads)
            seconds.append(time.perf_counter()-start)
        bal, visits = balance(gpu_loads(even, loads)), nodes_per_token(even, routes)
        row("  ours, even split, random", bal, visits, **{f"balance_even_{gpus}": bal, f"nodes_even_{gpus}": visits})
        gpu, visits = realised(ours, routes)
        row("  ours, weighted split, realised", balance(gpu), visits,
            **{f"balance_weighted_{gpus}": balance(gpu), f"nodes_weighted_{gpus}": visits})
        print(f"  seconds for all layers: {', '.join(f'{s:.3f}' for s in seconds)}")
        if gpus == 64:
            figures["seconds"] = statistics.median(seconds)
            kept = ours
    del figures["balance_weighted_32"], figures["nodes_weighted_32"]

    some = [l for l in range(a.layers) if got[l][4] is not None]
    window = np.stack([got[l][4] for l in some], 1)
    cut = lambda p: type(p)(p.slots[some], p.share[some], p.num_experts, p.nodes, p.gpus)
    print(f"the next {a.tokens} tokens of {len(some)} layers, placed by the loads above (counts of single experts "
          "fluctuate)")
    for name, p in (("EPLB global", evenly(eplb(loads, 320, 1, 8, 64), E, 8, 64)), ("ours", kept)):
        gpu, visits = realised(cut(p), window)
        row(f"  {name}, node-aware choice, realised", balance(gpu), visits)

    print("after a drift of the loads by total variation 0.2")
    start = time.perf_counter()
    few = rebalance(kept, drift, GROUPS, together, alone, K)
    took = time.perf_counter()-start
    fresh = weigh(place(drift, 320, GROUPS, 8, 64, *company(after[:2048], E, GROUPS), K), drift)
    rows = {}
    for name, p in (("nothing changed", kept), ("new shares only", weigh(kept, drift)),
            (f"rebalanced in {took:.2f} s", few), ("placed afresh", fresh)):
        gpu, visits = realised(p, after)
        rows[name] = (balance(gpu), visits)
        row(f"  {name}, {moved(kept, p):.1%} of slots moved", *rows[name])
    (b, n), (bf, nf) = rows[f"rebalanced in {took:.2f} s"], rows["placed afresh"]
    figures.update(moved_share=moved(kept, few), after_move_share=b/bf, after_move_nodes=n-nf)
    print(f"  balance {b/bf:.3f} of a fresh placement; nodes {n-nf:+.3f}")
    recorded(row)
    figures.update(ungrouped(row))
    return dict(figures={k: round(float(v), 4) for k, v in figures.items()})


def free_layer(seed, num_experts, k, topics, tokens):
    """Loads [E] and routes [2*tokens,k] of a router without groups; with `topics`, each token has one and each topic
    its favourites."""
    rng = np.random.default_rng(seed)
    loads, noise, free = zipf(rng, num_experts), gumbel(rng, 2*tokens, num_experts), dict(k=k, groups=1, topk_groups=1)
    if topics: noise = noise + 1.2*rng.normal(size=(topics, num_experts))[rng.integers(0, topics, 2*tokens)]
    return loads, draw_routes(strengths(loads, noise, **free), noise, **free)


def ungrouped(row, layers=2, tokens=8192):
    """Routers without groups (Trinity, Qwen3, Kimi): DeepSeek's global policy beside `place_ungrouped`, planned on
    one sample of tokens and counted on another."""
    print("no groups: experts, k, nodes of 8 GPUs, topics of the text; planned on half of the tokens, counted on the "
          "other half")
    cases = [(E, k, N, topics) for E, k in ((128, 8), (160, 8), (256, 4), (384, 8)) for N in range(4, 10)
        for topics in (0, 8)]
    worse, visits, better = 0, [], []
    for E, k, N, topics in cases:
        gpus = 8*N
        slots = -(-E*5//4//gpus)*gpus
        loads, routes = (np.stack(x, a) for x, a in zip(zip(*(free_layer(s, E, k, topics, tokens)
            for s in range(layers))), (0, 1)))
        pair = []
        for name, p in (("global", evenly(eplb(loads, slots, 1, 1, gpus), E, N, gpus)),
                ("ours", place_ungrouped(loads, slots, N, gpus, routes[:tokens]))):
            pair.append((balance(gpu_loads(p, loads)), nodes_per_token(p, routes[tokens:])))
            row(f"  {E} experts, {k} a token, {N} nodes, {topics} topics, {slots} slots, {name}", *pair[-1])
        (b0, n0), (b1, n1) = pair
        worse += b1 < b0 - 1e-4 or n1 > n0 + 1e-3
        visits.append(n0 - n1)
        better.append(b1 - b0)
    print(f"{len(cases)} cases, {worse} worse in balance or nodes; saved visits {min(visits):.4f} to "
          f"{max(visits):.3f}, balance {min(better):+.4f} to {max(better):+.3f}")
    return dict(ungrouped_cases=len(cases), ungrouped_worse=worse, ungrouped_visits_saved=max(visits),
                ungrouped_visits_saved_least=min(visits),
                ungrouped_balance_gained=max(better), ungrouped_balance_gained_least=min(better))


def recorded(row):
    "The same on routes that a trained model recorded, if `moe-rl bench expert_profile` has been run."
    from moe_rl.bench import repository
    path = repository()/"benchmarks/results/expert_profile/routes.npz"
    if not path.exists():
        print(f"no recorded routes in {path.parent.name}/: run moe-rl bench expert_profile")
        return
    data = np.load(path)
    routes, num, groups = np.concatenate([data[n]
        for n in data["domains"]]).astype(np.int64), int(data["num_experts"]), int(data["groups"])
    first, second = routes[0::2], routes[1::2]   # plan on one half of the tokens, measure on the other
    count = lambda r: np.stack([np.bincount(r[:,l].ravel(), minlength=num) for l in range(r.shape[1])]).astype(float)
    slots, nodes, gpus = num*5//4, 8, 16
    print(f"recorded routes: {routes.shape[1]} layers, {num} experts, {len(routes)} tokens of "
          f"{', '.join(data['domains'])}; {slots} slots on {gpus} GPUs of {nodes} nodes; planned on half of the "
          "tokens, counted on the other")
    ours = place(count(first), slots, groups, nodes, gpus, *company(first, num, groups), routes.shape[2])
    for name, p in (("EPLB hierarchical", evenly(eplb(count(first), slots, groups, nodes, gpus), num, nodes, gpus)),
                    ("EPLB global", evenly(eplb(count(first), slots, 1, nodes, gpus), num, nodes, gpus)),
                    ("ours, even split", ours)):
        row(f"  {name}, random", balance(gpu_loads(p, count(second))), nodes_per_token(p, second))
    gpu, visits = realised(weigh(ours, count(first)), second)
    row("  ours, weighted split, realised", balance(gpu), visits)
