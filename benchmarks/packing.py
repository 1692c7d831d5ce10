"""Packing and balancing: how often the fewest possible bins are reached, how evenly ranks are loaded, and how long that
takes.

Lengths are lognormal (median 2048, 95th percentile 8192, clipped at 32768). The budget of a draw is max(4 x its 95th
percentile, its longest). Peers of the same run: next-fit-decreasing
and first-fit-decreasing for bins; dealing, longest-first and Karmarkar-Karp for ranks. Cost is Trinity Mini's training
FLOPs.

    moe-rl bench packing [DRAWS]        1000 draws unless said otherwise
"""
import heapq
from statistics import median
from time import perf_counter

import numpy as np

from moe_rl.data.rounds import plan_rounds, step_time
from moe_rl.data.packing import (LengthProfile, balance, fewest_bins, first_fit_decreasing, imbalance,
    lognormal_lengths, longest_first, next_fit_decreasing, pack, sequence_flops)
from moe_rl.moe.zoo import preset


def timed(f, *args, repeats=1):
    "Result, and the median of `repeats` wall times in seconds."
    times = []
    for _ in range(repeats):
        t = perf_counter()
        out = f(*args)
        times.append(perf_counter()-t)
    return out, median(times)


def karmarkar_karp(costs, ranks):
    "Largest differencing for `ranks` parts: merge the two most uneven tuples, heaviest part with lightest."
    heap = [(-float(c), i, [(float(c), [i])]) for i, c in enumerate(costs)]
    heapq.heapify(heap)
    pad = lambda parts: sorted(parts + [(0., [])]*(ranks-len(parts)), key=lambda p: p[0])
    n = len(heap)
    while len(heap) > 1:
        a, b = pad(heapq.heappop(heap)[2]), pad(heapq.heappop(heap)[2])
        merged = sorted(((x+y, p+q) for (x, p), (y, q) in zip(a, reversed(b))), key=lambda p: p[0])
        low = merged[0][0]
        parts = [(x-low, p) for x, p in merged]     # only differences matter
        n += 1
        heapq.heappush(heap, (-parts[-1][0], n, parts))
    return [p for _, p in pad(heap[0][2])]


def bins_figures(draws):
    packers = dict(nfd=next_fit_decreasing, ffd=first_fit_decreasing, pack=pack)
    reached, used, seconds, more_than_ffd, fixed = {n: 0 for n in packers}, {n: [] for n in packers}, [], 0, 0
    for seed in range(draws):
        lengths = lognormal_lengths(np.random.default_rng(seed), 512)
        budget = LengthProfile.of(lengths).micro_batch_budget
        counts = {}
        for name, packer in packers.items():
            bins, s = timed(packer, lengths, budget)
            assert sorted(i for b in bins for i in b) == list(range(512)) and max(lengths[b].sum()
                for b in bins) <= budget
            counts[name] = len(bins)
            reached[name] += len(bins) == fewest_bins(lengths, budget)
            used[name].append(lengths.sum()/(len(bins)*budget))
            if name == "pack": seconds.append((s, seed))
        more_than_ffd += counts["pack"] > counts["ffd"]
        fixed += len(pack(lengths, 4*8192)) == fewest_bins(lengths, 4*8192)
    hardest = []
    for _, seed in sorted(seconds)[-5:]:
        lengths = lognormal_lengths(np.random.default_rng(seed), 512)
        hardest.append(timed(pack, lengths, LengthProfile.of(lengths).micro_batch_budget, repeats=5)[1])
    print(f"512 lengths, {draws} draws      fewest bins    utilisation")
    for name in packers: print(f"  {name:24s} {reached[name]/draws:12.2%} {np.mean(used[name]):14.3%}")
    print(f"  pack took {1e3*median(s for s, _ in seconds):.2f} ms (median draw), {1e3*max(hardest):.2f} ms (slowest "
          f"draw); more bins than first-fit: {more_than_ffd} times")
    print(f"  with a fixed budget of 4 x 8192 tokens: pack reaches the fewest bins in {fixed/draws:.2%} of draws")
    return dict(ms_512=1e3*max(hardest), ms_512_median=1e3*median(s for s, _ in seconds),
                bound_share=reached["pack"]/draws, bound_share_ffd=reached["ffd"]/draws,
                bound_share_nfd=reached["nfd"]/draws, bound_share_fixed=fixed/draws,
                utilisation=float(np.mean(used["pack"])), utilisation_nfd=float(np.mean(used["nfd"])),
                more_than_ffd=more_than_ffd)


def ranks_figures(draws=5, ranks=64):
    mini, rows = preset("trinity-mini"), []
    for seed in range(draws):
        lengths = lognormal_lengths(np.random.default_rng(seed), 4096)
        costs = sequence_flops(mini, lengths)
        parts, s = timed(balance, costs, ranks, repeats=3)
        lpt, s_lpt = timed(longest_first, costs, ranks, repeats=3)
        kk, s_kk = timed(karmarkar_karp, costs, ranks)
        budget = LengthProfile.of(lengths).micro_batch_budget
        rounds, s_plan = timed(plan_rounds, lengths, costs, budget, ranks)
        waiting = step_time([[np.array(b, int) for b in bins] for bins in rounds], costs)*ranks/costs.sum()
        dealt = imbalance([list(range(r, 4096, ranks)) for r in range(ranks)], costs)
        rows.append((imbalance(parts, costs), s, imbalance(lpt, costs), s_lpt, imbalance(kk, costs), s_kk, dealt,
            waiting, s_plan))
    worst = np.max(rows, axis=0)
    names = ["imbalance", "s_4096", "imbalance_lpt", "s_lpt", "imbalance_kk", "s_kk", "imbalance_dealt",
        "step_over_ideal", "s_plan"]
    print(f"\n4096 lengths over {ranks} ranks, worst of {draws} draws   max/mean   seconds")
    for label, i, j in (("dealt round robin", 6, None), ("longest first", 2, 3), ("Karmarkar-Karp", 4, 5),
            ("balance", 0, 1)):
        print(f"  {label:44s} {worst[i]:10.5f} {worst[j] if j is not None else 0:9.3f}")
    print(f"  whole plan (micro-batches in rounds): step time over ideal {worst[7]:.3f}, planned in {worst[8]:.3f} s")
    return dict(zip(names, map(float, worst)))


def measure(args):
    draws = int(args[0]) if args else 1000
    figures = bins_figures(draws) | ranks_figures()
    return dict(figures={k: float(f"{v:.6g}") for k, v in figures.items()}, draws=draws)
