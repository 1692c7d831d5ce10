"""A whole MoE layer, router to combined output, forward and backward: ours in bf16 and FP8 against torchtitan's under
torch.compile, and, for what
fusion is worth, ours of Triton kernels around torch._grouped_mm.

16384 tokens, width 2048, 128 experts, 8 per token, sigmoid router, no shared expert; expert width 1024 (Trinity Mini,
the figures) and 768 (Qwen3-30B-A3B).
Every layer has the same weights and input; times are medians of steps taken in turns. A chip under load lowers its
clock until its power fits, each
layer's at another clock, and takes some tenths of a second for it: so a turn is sixty steps, and the last twenty count,
and every other round goes through
the layers backwards, so that each follows either neighbour as often. FP8 casts its weights once per 8
micro-batches, and that cast is in the figure. Peak memory is measured with only that layer in memory: weights, input,
gradients and all.

    moe-rl bench moe_layer [WIDTH ...]        1024 and 768 unless said otherwise
"""
import gc
from statistics import median

import torch

from moe_rl.bench import NeedsHardware, device_times, needs_hopper

T, D, E, K, SCALE = 16384, 2048, 128, 8, 2.826
MICRO = 8  # micro-batches that share a cast of the weights


class Layer:
    "Our layer: float32 router product, fused routing, experts given."
    def __init__(self, w, experts):
        from moe_rl.gpu.router import gate_logits, gpu_route
        self.router, self.gate_up, self.down = (w[n].detach().requires_grad_() for n in ("router", "gate_up", "down"))
        self.bias, self.experts, self.logits = torch.zeros(E, device="cuda"), experts, gate_logits
        self.route = gpu_route

    def parameters(self): return [self.router, self.gate_up, self.down]

    def __call__(self, x):
        logits, x = self.logits(x, self.router)
        r = self.route(logits, K, self.bias, route_scale=SCALE)
        return self.experts(x, r.idx, r.weights, self.gate_up, self.down)


def titan(w, compiled=True):
    "torchtitan's layer with the same weights."
    try:
        from torchtitan.models.common.config_utils import (
            make_moe_config, make_routed_experts_config, make_router_config)
    except ImportError as e:
        raise NeedsHardware(f"torchtitan 0.3.0 as the peer (pip install 'moe_rl[train]'): {e}") from e
    I = w["down"].shape[2]
    nothing = {n: torch.nn.init.zeros_ for n in ("weight", "bias", "w1_EFD", "w2_EDF", "w3_EFD")}
    cfg = make_moe_config(num_experts=E, router=make_router_config(dim=D, num_experts=E, gate_param_init=nothing,
        top_k=K, score_func="sigmoid", route_norm=True, route_scale=SCALE),
        routed_experts=make_routed_experts_config(dim=D, hidden_dim=I, num_experts=E, top_k=K, param_init=nothing,
            comm_backend="standard"))
    with torch.device("meta"): moe = cfg.build()
    moe = moe.to_empty(device="cuda")
    for b in moe.buffers(): b.zero_()
    experts = moe.routed_experts.inner_experts
    parts = {moe.router.gate: dict(weight=w["router"]), experts: dict(w1_EFD=w["gate_up"][:,:I].contiguous(),
        w3_EFD=w["gate_up"][:,I:].contiguous(), w2_EDF=w["down"])}
    for module, values in parts.items():
        for n, v in values.items(): setattr(module, n, torch.nn.Parameter(v.detach().clone()))
    return torch.compile(moe) if compiled else moe


def weights(I):
    g = torch.Generator("cuda").manual_seed(0)
    r = lambda *s: (torch.randn(*s, generator=g, device="cuda")*.02).bfloat16()
    return dict(router=r(E, D), gate_up=r(E, 2*I, D), down=r(E, D, I))


def step(layer, x, up, batched=False):
    "One forward and backward with fresh gradients."
    x.grad = None
    for p in layer.parameters(): p.grad = None
    y = layer(x[None] if batched else x)
    y.backward(up[None] if batched else up)
    return y.detach().view(T, D)


def peak(make, x, up, batched=False):
    "GiB at the worst moment of a step, with nothing else in memory."
    layer = make()
    for _ in range(2): step(layer, x, up, batched)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step(layer, x, up, batched)
    torch.cuda.synchronize()
    gib = torch.cuda.max_memory_allocated()/2**30
    del layer
    x.grad = None
    gc.collect()
    torch.cuda.empty_cache()
    return gib


def in_turns(steps, rounds=6, settle=40, repeats=20):
    """Median milliseconds of each step function on the device.

    Rounds go through all of them, there and back; a turn begins with steps that are not counted."""
    times = {n: [] for n in steps}
    for n in range(rounds+1):
        for name, f in list(steps.items())[::1 if n % 2 else -1]:
            counted = device_times(f, repeats, settle)
            if n: times[name] += counted
    return {n: median(t) for n, t in times.items()}


def no_sync(layer, x, up, backward):
    "Raises if the layer waits for the device."
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = layer(x)
        if backward: y.backward(up)
    finally: torch.cuda.set_sync_debug_mode("default")


def compare(I):
    from moe_rl.fp8.experts import Fp8Experts
    from moe_rl.fp8.gemm import calc_diff
    from moe_rl.gpu.fused import fused_experts
    from moe_rl.gpu.experts import gpu_experts
    g = torch.Generator("cuda").manual_seed(1)
    x, up = (torch.randn(T, D, generator=g, device="cuda").bfloat16() for _ in range(2))
    x.requires_grad_()
    fp8 = Fp8Experts()
    make = dict(bf16=lambda: Layer(weights(I), fused_experts), triton=lambda: Layer(weights(I), gpu_experts),
        fp8=lambda: Layer(weights(I), fp8), titan=lambda: titan(weights(I)))
    peaks = {n: peak(f, x, up, n == "titan") for n, f in make.items()}
    fp8.keep.clear()
    layers = {n: f() for n, f in make.items()}
    results = {}
    for n, l in layers.items():
        y = step(l, x, up, n == "titan")
        results[n] = [y, x.grad.clone(), l.parameters()[0].grad if n != "titan" else l.router.gate.weight.grad]
    agree = {n: [calc_diff(a, b) for a, b in zip(results[n], results["titan"])] for n in ("bf16", "triton", "fp8")}
    print(f"I {I}: 1 - agreement with torchtitan of output, dx, d router: "
        + ", ".join(f"{n} {[f'{d:.1e}' for d in diffs]}" for n, diffs in agree.items()))
    if max(agree["bf16"] + agree["triton"]) > 1e-3 or max(agree["fp8"]) > 1e-2:
        raise AssertionError(f"the layers compute different things: {agree}")
    del results
    no_sync(layers["bf16"], x, up, backward=True)
    no_sync(layers["fp8"], x, up, backward=False)
    ms = in_turns({n: (lambda l=l, n=n: step(l, x, up, n == "titan")) for n, l in layers.items()})
    cast = in_turns(dict(cast=lambda: (fp8.keep.clear(), fp8.cast(layers["fp8"].gate_up, layers["fp8"].down))))["cast"]
    with torch.no_grad():
        forward = in_turns({n: (lambda l=l, n=n: l(x[None] if n == "titan" else x)) for n, l in layers.items()},
            rounds=2)
    ms["fp8"] += cast/MICRO
    flops = 18*T*K*D*I
    for n in ms:
        print(f"   {n:6s} forward+backward {ms[n]:6.2f} ms, {flops/ms[n]/1e9:4.0f} TFLOPS; forward {forward[n]:5.2f} "
              f"ms; peak {peaks[n]:5.2f} GiB", flush=True)
    print(f"   weight cast {cast:.2f} ms, shared by {MICRO}; torchtitan / bf16 {ms['titan']/ms['bf16']:.3f}, bf16 / "
          f"FP8 {ms['bf16']/ms['fp8']:.3f}", flush=True)
    return dict(ms_bf16=ms["bf16"], ms_fp8=ms["fp8"], ms_titan=ms["titan"], ms_triton=ms["triton"],
                ratio_titan=ms["titan"]/ms["bf16"], ratio_fp8=ms["bf16"]/ms["fp8"],
                peak_gib=peaks["bf16"], peak_titan_gib=peaks["titan"], peak_fp8_gib=peaks["fp8"],
                peak_triton_gib=peaks["triton"], ms_cast=cast)


def measure(args):
    needs_hopper()
    figures = {}
    for I in map(int, args or ["1024", "768"]):
        out = compare(I)
        figures |= out if I == 1024 else {f"{n}_{I}": v for n, v in out.items()}
        gc.collect()
        torch.cuda.empty_cache()
        torch._dynamo.reset()
    return dict(figures=figures)
