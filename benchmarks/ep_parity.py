"""A layer over 1, 2, 4 and 8 ranks (gloo) against one process: output and all gradients, uniform and extremely
skewed routes, a rank without a token, every exchange that runs on CPU.

moe-rl bench ep_parity"""
import torch
import torch.distributed as dist

from moe_rl.ep.deepep import BufferOnGloo, DeepEP
from moe_rl.ep.dispatch import AllToAll, Hierarchical, Local, fp8_payload, parity, plain
from moe_rl.ep.ranks import ep_group, run_ranks
from moe_rl.fp8.quant import quantise, relative_error

E, WIDTH = 16, 256


def exchanges(ranks:int)->dict:
    "Exchanges that run with so many ranks."
    out = {"all_to_all": lambda: AllToAll(E)}
    if ranks == 1: out["local"] = lambda: Local(E)
    if ranks >= 2:
        out["deepep (stand-in)"] = lambda: DeepEP(E, WIDTH, dtype=torch.float32, buffer=BufferOnGloo(ep_group(), E))
    if ranks >= 4: out["hierarchical"] = lambda: Hierarchical(E, per_node=2)
    if ranks == 8: out["hierarchical, 4 a node"] = lambda: Hierarchical(E, per_node=4)
    return out


def on_ranks():
    "[(exchange, routes, payload, differences)] on every rank."
    return [(name, "skewed" if skew else "uniform", payload.name, parity(make, E, 4, WIDTH, 32, 16, skew, payload))
            for name, make in exchanges(dist.get_world_size()).items() for skew in (False, True)
            for payload in (plain, fp8_payload)]


def measure(args:list[str])->dict:
    if args: raise SystemExit(f"ep_parity takes no arguments, not {args}")
    worst_output = worst_grad = worst_fp8 = 0.
    for ranks in (1, 2, 4, 8):
        for name, routes, payload, diff in run_ranks(on_ranks, ranks, timeout=240.)[0]:
            grad = max(v for k, v in diff.items() if k != "output")
            print(f"EP {ranks}  {name:22s} {routes:8s} {payload:6s} output {diff['output']:.1e}  worst gradient "
                  f"{grad:.1e}")
            if payload == "plain": worst_output, worst_grad = max(worst_output, diff["output"]), max(worst_grad, grad)
            else: worst_fp8 = max(worst_fp8, *diff.values())
    x = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(0))
    error = relative_error(x, quantise(x))
    print(f"FP8 payload: the layer equals one process that computes on quantised tokens to {worst_fp8:.1e}; the "
          f"quantiser's own error is {error:.1e}")
    return dict(figures=dict(worst_output=worst_output, worst_grad=worst_grad, worst_fp8=worst_fp8,
        quantiser_error=error))
