"""Whole optimizer steps on one Hopper GPU: ours against torchtitan's under torch.compile, AFMoE with float32 masters,
Muon, FP8 experts, and where the milliseconds go.

The model has width 2048, one dense layer of 6144 and then layers of 64 experts of width 768, 8 a token, and a shared
one, 32 heads, 4 KV heads of 128, and a vocabulary of 32768.
A micro-batch is one sequence of 16384 tokens; no activation checkpointing. Parts, each in a process of its own:

    titan, a   all layers fully causal with RoPE, no gates, no post-norms (torchtitan's Qwen3 decoder), bf16 parameters
    without masters, AdamW; both sides with the same weights
    b          AFMoE: three layers of window 2048 to one of all keys, gates, sandwich norms, SMEBU, AdamW with float32
    masters
    muon       the same, Muon for hidden matrices, four sequences a step
    fp8        as b, experts in FP8, routed and shared; AdamW leaves the casts of their weights behind
    fp8_linear as fp8, and the products of attention and of the dense block in FP8 too
    stream     as b, residual stream in float32: what that cast costs
    check      fused pieces against the plain ones on this GPU, and no waiting for the device

12 layers on an 80 GB card, 16 on more; b, muon and fp8 8 layers on an 80 GB card (masters and moments of 12 and what
the backward pass keeps do not fit), 12 on more. Before anything is timed the model trains 200 steps on a made-up
language, so that its router has learnt something; nothing forces balance. The parts fp8, fp8_linear and stream go on
from the weights that b has trained, if b is asked for too, so that their routes are b's. MFU counts 6 operations per
active parameter (embedding left out, head included) and token, and the scores
that attention really computes, over 989 TFLOPS.

    moe-rl bench mfu [PART ...]        all parts unless said otherwise
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch

from moe_rl.bench import NeedsHardware, needs_hopper

T, V, PEAK, WINDOW, THETA = 16384, 32768, 989e12, 2048, 1e6
PARTS = ("check", "a", "titan", "b", "muon", "fp8", "fp8_linear", "stream")
# steps before anything is timed, their tokens, and the rate of SMEBU at their beginning: so short a training has no
# time for small steps
ROUTER_STEPS, SHORT, RATE = 200, 4096, 5e-2
BF16 = torch.bfloat16


def config(layers, afmoe):
    from moe_rl.moe.families import new_afmoe
    return new_afmoe(vocab_size=V, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
                       num_hidden_layers=layers, num_dense_layers=1, num_attention_heads=32, num_key_value_heads=4,
                       head_dim=128,
                       num_experts=64, num_experts_per_tok=8, route_scale=2.826, rope_theta=THETA, rms_norm_eps=1e-6,
                       mup_enabled=afmoe, max_position_embeddings=T,
                       global_attn_every_n_layers=4 if afmoe else 10**6, sliding_window=WINDOW if afmoe else T)


def sizes(spec):
    "The numbers of its config.json, by name."
    return SimpleNamespace(**spec.config)


def build(layers, afmoe, masters):
    "The plain model in bf16; float32 norms and routers where parameters have masters."
    from moe_rl.moe.model import Model
    torch.manual_seed(0)
    with torch.device("meta"): model = Model(config(layers, afmoe)).bfloat16()
    if not afmoe:
        for l in model.layers: del l.self_attn.gate_proj, l.post_attention_layernorm, l.post_mlp_layernorm
    model = model.to_empty(device="cuda")
    for name, p in model.named_parameters():
        if masters and ("norm" in name or ".router." in name): p.data = p.data.float()
        with torch.no_grad():
            if p.ndim == 1: p.fill_(layers**-.5 if "post_" in name else 1.)
            elif afmoe: p.normal_(0, .5/2048**.5)   # the embedding is multiplied by the square root of the width
            else:
                p.normal_(0, .5 if "embed" in name else .02/(2*layers)**.5 if "o_proj" in name or "down_proj" in name
                    else .02)
    for name, b in model.named_buffers(): b.data = torch.zeros(b.shape, device="cuda")
    return model


def language(n, seed):
    "Tokens of a made-up language: mostly one of four followers of the last word, else any word, rare ones rarely."
    import numpy as np
    followers = np.random.default_rng(0).integers(V, size=(V, 4))
    r = np.random.default_rng(seed)
    zipf, which, free = (V*r.random(n)**3).astype(np.int64), r.integers(4, size=n), r.random(n) < .25
    out, w = np.empty(n, np.int64), 0
    for i in range(n): w = out[i] = zipf[i] if free[i] else followers[w, which[i]]
    return torch.from_numpy(out)


def batches(model, n, tokens, count, seed=1):
    "n micro-batches of one document each; `count` of them make a step."
    from moe_rl.gpu.step import Batch, documents
    docs, out = documents([tokens], model), []
    for i in range(n):
        ids = language(tokens+1, seed+i).cuda()
        out.append(Batch(ids[:-1].contiguous(), ids[1:].contiguous(),
            torch.full((tokens,), 1/(tokens*count), device="cuda"), docs))
    return out


def flops(cfg, gate):
    "Operations per token of a step, as MFU counts them: active parameters, head, and the scores of each layer."
    D, hd, H, KV = cfg.hidden_size, cfg.head_dim, cfg.num_attention_heads, cfg.num_key_value_heads
    I = cfg.moe_intermediate_size
    attn = D*hd*((3 if gate else 2)*H + 2*KV)
    dense, moe = 3*D*cfg.intermediate_size, 3*D*I*(cfg.num_experts_per_tok+cfg.num_shared_experts) + D*cfg.num_experts
    total = 6*(cfg.vocab_size*D + sum(attn + (dense if l < cfg.num_dense_layers else moe)
        for l in range(cfg.num_hidden_layers)))
    for l in range(cfg.num_hidden_layers):
        w = min(T, cfg.sliding_window) if cfg.layer_types[l] == "sliding_attention" else T
        keys = w - w*(w-1)/2/T     # of the mean query
        total += 12*keys*H*hd
    return total


def timed(step, repeats=12, settle=4):
    "Milliseconds of a step on the device, those the host needs to launch one, and GiB at the worst moment."
    for _ in range(settle): step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats+1)]
    marks[0].record()
    for m in marks[1:]:
        step()
        m.record()
    torch.cuda.synchronize()
    gib, began = torch.cuda.max_memory_allocated()/2**30, time.time()
    step()
    host = (time.time()-began)*1e3
    torch.cuda.synchronize()
    return dict(ms=median(a.elapsed_time(b) for a, b in zip(marks, marks[1:])), host_ms=host, gib=gib)


GROUPS = [("attention", r"flash_?attn|sdpa|FlashAttention"), ("optimizer",
    r"^_adamw|^_momentum|^_move|multi_tensor_apply|[Ss]ymmetric"), ("head", r"^_head"), ("norms", r"^_add_norm"),
          ("heads, gates, units", r"^_prepare|^_gate|^_unit"), ("router", r"^_route|^_split|^_add_product"),
          ("casts to FP8", r"_cast|^_permute_scales"),
          ("products in FP8", r"fp8_gemm"), ("experts", r"quack|enable_3x_kernel_for_sm9x"),
          ("experts' rows", r"^_permute|^_combine|^_rows|^_by_pair|^_count|^_prefix|^_place|^_swiglu|^_groups")]


def shape_group(shapes, cfg):
    "Which product of torch this is, by a size that only it has."
    sizes = {s for shape in shapes if shape for s in shape}
    I = cfg.moe_intermediate_size
    if cfg.vocab_size in sizes: return "head"
    if cfg.intermediate_size in sizes or 2*cfg.intermediate_size in sizes: return "dense block"
    if cfg.num_experts in sizes or 3*cfg.num_experts in sizes or 2*cfg.num_experts in sizes: return "router"
    if cfg.num_experts_per_tok*T in sizes: return "experts"
    if I in sizes or 2*I in sizes: return "shared expert"
    return "projections"


def profile(step, cfg, steps=2):
    "Milliseconds of a step by kind of work, and of the kernels that take most."
    import re
    from collections import Counter
    from torch.profiler import ProfilerActivity, profile as prof
    torch.cuda.synchronize()
    with prof(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as p:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(steps): step()
        end.record()
        torch.cuda.synchronize()
    wall = start.elapsed_time(end)/steps
    groups, kernels = Counter(), Counter()
    for e in p.key_averages(group_by_input_shape=True):
        ms = getattr(e, "self_device_time_total", 0)/1e3/steps
        if e.device_type == torch.autograd.DeviceType.CUDA:
            if not getattr(e, "is_user_annotation", False) and not re.match(r"Optimizer\.|## Call|ProfilerStep", e.key):
                kernels[e.key[:90]] += ms
        elif e.key in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm"):
            groups["optimizer" if e.key in ("aten::bmm", "aten::baddbmm") else "experts" if e.key
                == "aten::_grouped_mm" else shape_group(e.input_shapes, cfg)] += ms
    for name, ms in kernels.items():
        if re.search(r"nvjet|cublas|splitK", name): continue   # counted with the operator that launched them
        group = next((g for g, pattern in GROUPS if re.search(pattern, name)), "everything else")
        groups[group] += ms
    busy = sum(kernels.values())
    groups["gaps"] = max(0., wall-busy)
    return dict(wall_ms=wall, busy_ms=busy, groups={k: round(v, 2) for k, v in groups.most_common()},
        kernels={k: round(v, 2) for k, v in kernels.most_common(40)})


def fused(part, layers, folder, attention="flash4", experts=None):
    "One of our parts: build, train the router, measure."
    from functools import partial
    from moe_rl.fp8.adamw import CastingAdamW
    from moe_rl.fp8.experts import Fp8Experts
    from moe_rl.fp8.linear import KeptCasts, fp8_linear
    from moe_rl.gpu.fused import fused_experts
    from moe_rl.gpu.optimizers import fused_optimizers
    from moe_rl.gpu.step import FusedModel, FusedStep
    from moe_rl.train.optim import lr_schedule
    afmoe, masters, count = part != "a", part != "a", 4 if part == "muon" else 1
    model = build(layers, afmoe, masters)
    linear, eight = partial(fp8_linear, keep=KeptCasts()), part.startswith("fp8")
    experts = experts or (Fp8Experts() if eight else fused_experts)
    shared_weights, trained = part in ("fp8", "fp8_linear", "stream"), Path(folder)/"b.pt"
    go_on = shared_weights and trained.exists()
    if go_on: model.load_state_dict(torch.load(trained, mmap=True))
    kind = dict(adamw=partial(CastingAdamW, casts=experts.keep)) if eight else {}
    opt = fused_optimizers(model, "muon" if part == "muon" else "adamw", muon_lr=2e-3, adamw_lr=1e-3, masters=masters,
        products="quack", **kind)
    how = dict(shared=linear) if part == "fp8" else dict(linear=linear) if eight else {}
    fused = FusedModel(model, experts, attention, torch.float32 if part == "stream" else None, **how)
    step = FusedStep(fused, opt, RATE*.02)
    opt.set_lr_scale(.01)
    began, losses = time.time(), []
    for i, batch in enumerate([] if go_on else batches(model, ROUTER_STEPS, SHORT, 1)):
        scale = lr_schedule(i, warmup=20, total=ROUTER_STEPS, floor=.01)
        opt.set_lr_scale(scale)
        step.balance = RATE*max(scale, .02)
        losses.append(step([batch]))
    if losses:
        losses = torch.stack(losses).tolist()
        print(f"{part}: {ROUTER_STEPS} steps of {SHORT} tokens in {time.time()-began:.1f} s, loss {losses[0]:.3f} -> "
              f"{losses[-1]:.3f}", flush=True)
    else: print(f"{part}: goes on from b's weights", flush=True)
    work = batches(model, count, T, count, seed=1000)
    with torch.no_grad():
        out = step.fused.loss(*work[0])
        load = torch.stack([torch.bincount(r.idx.flatten(), minlength=64).float() for r in out.routings])
    vio = (load.amax(1)/load.mean(1)-1).tolist()
    loss = float(out.loss*count)
    del out
    print(f"{part}: loss on the batch {loss:.4f}; MaxVio of the layers {min(vio):.2f} to {max(vio):.2f}", flush=True)
    if part in "ab": torch.save({n: p.detach().cpu() for n, p in model.state_dict().items()}, Path(folder)/f"{part}.pt")
    result = timed(lambda: step(work), repeats=12 if count == 1 else 5, settle=4 if count == 1 else 2)
    optimizer = timed_optimizer(step, work)
    tokens, cost = T*count, flops(sizes(model.spec), afmoe)
    result |= dict(loss=loss, layers=layers, tokens_per_s=tokens/result["ms"]*1e3,
        mfu=cost*tokens/result["ms"]*1e3/PEAK, optimizer_ms=optimizer, optimizer_share=optimizer/result["ms"],
        max_vio=max(vio))
    if part != "stream": result["profile"] = profile(lambda: step(work), sizes(model.spec), 2 if count == 1 else 1)
    return result


def timed_optimizer(step, work):
    "Milliseconds of the optimizers alone, their gradients being there."
    for b in work: step.fused.loss(*b).loss.backward()
    times = []
    for _ in range(3):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        a.record()
        step.optimizers.step()
        b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b))
    step.optimizers.zero_grad()
    return min(times)


def titan_model(cfg):
    "torchtitan's Qwen3 decoder of these sizes, with its fused projections and cuDNN's attention."
    try:
        from torchtitan.models.common import CosSinRoPE, Embedding, Linear
        from torchtitan.models.common.attention import ScaledDotProductAttention
        from torchtitan.models.common.config_utils import (
            make_ffn_config, make_gqa_config, make_moe_config, make_routed_experts_config, make_router_config)
        from torchtitan.models.common.nn_modules import RMSNorm
        from torchtitan.models.qwen3.model import Qwen3Model, Qwen3TransformerBlock
    except ImportError as e:
        raise NeedsHardware(f"torchtitan 0.3.0 as the peer (pip install 'moe_rl[train]'): {e}") from e
    none = {n: torch.nn.init.zeros_ for n in ("weight", "bias", "w1_EFD", "w2_EDF", "w3_EFD")}
    D, c = cfg.hidden_size, cfg
    norm = lambda d: RMSNorm.Config(normalized_shape=d, eps=c.rms_norm_eps, param_init=none)
    ffn = lambda hidden: make_ffn_config(dim=D, hidden_dim=hidden, w1_param_init=none, w2w3_param_init=none)
    layers = []
    for l in range(c.num_hidden_layers):
        kind = dict(feed_forward=ffn(c.intermediate_size)) if l < c.num_dense_layers else dict(
            moe=make_moe_config(num_experts=c.num_experts, shared_experts=ffn(c.moe_intermediate_size),
            router=make_router_config(dim=D, num_experts=c.num_experts, gate_param_init=none,
                top_k=c.num_experts_per_tok, score_func=c.score_func, route_norm=True, route_scale=c.route_scale),
            routed_experts=make_routed_experts_config(dim=D, hidden_dim=c.moe_intermediate_size,
                num_experts=c.num_experts, top_k=c.num_experts_per_tok, param_init=none, comm_backend="standard")))
        layers.append(Qwen3TransformerBlock.Config(attention_norm=norm(D), ffn_norm=norm(D), **kind,
            attention=make_gqa_config(dim=D, n_heads=c.num_attention_heads, n_kv_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            wqkv_param_init=none, wo_param_init=none, inner_attention=ScaledDotProductAttention.Config(), fuse_qkv=True,
            qk_norm=norm(c.head_dim),
            rope=CosSinRoPE.Config(dim=c.head_dim, max_seq_len=c.max_position_embeddings, theta=THETA))))
    return Qwen3Model.Config(vocab_size=c.vocab_size, dim=D, norm=norm(D), layers=layers,
                             tok_embeddings=Embedding.Config(num_embeddings=c.vocab_size, embedding_dim=D,
                                 param_init=none),
                             lm_head=Linear.Config(in_features=D, out_features=c.vocab_size, param_init=none))


@torch.no_grad()
def titan_load(model, w, cfg):
    "Our weights under torchtitan's names; every parameter is filled."
    KV, group = cfg.num_key_value_heads, cfg.num_attention_heads//cfg.num_key_value_heads
    hd, D, I = cfg.head_dim, cfg.hidden_size, cfg.moe_intermediate_size
    new = {"tok_embeddings.weight": w["embed_tokens.weight"], "norm.weight": w["norm.weight"],
        "lm_head.weight": w["lm_head.weight"]}
    for l in range(cfg.num_hidden_layers):
        a, m, at = f"layers.{l}.self_attn.", f"layers.{l}.mlp.", f"layers.{l}."
        q, k = w[a+"q_proj.weight"].view(KV, group, hd, D), w[a+"k_proj.weight"].view(KV, 1, hd, D)
        v = w[a+"v_proj.weight"].view(KV, 1, hd, D)
        new |= {at+"attention.qkv_linear.wqkv.weight": torch.cat([q, k, v], 1).view(-1, D),
                at+"attention.wo.weight": w[a+"o_proj.weight"], at+"attention.q_norm.weight": w[a+"q_norm.weight"],
                at+"attention.k_norm.weight": w[a+"k_norm.weight"],
                at+"attention_norm.weight": w[at+"input_layernorm.weight"],
                at+"ffn_norm.weight": w[at+"pre_mlp_layernorm.weight"]}
        ffn = lambda to, of: {to+"w1.weight": w[of+"gate_proj.weight"], to+"w3.weight": w[of+"up_proj.weight"],
            to+"w2.weight": w[of+"down_proj.weight"]}
        if l < cfg.num_dense_layers: new |= ffn(at+"feed_forward.", m)
        else:
            e = at+"moe.routed_experts.inner_experts."
            new |= ffn(at+"moe.shared_experts.",
                    m+"shared_experts.") | {at+"moe.router.gate.weight": w[m+"router.weight"],
                    e+"w1_EFD": w[m+"experts.gate_up_proj"][:,:I],
                    e+"w3_EFD": w[m+"experts.gate_up_proj"][:,I:], e+"w2_EDF": w[m+"experts.down_proj"]}
            model.get_buffer(at+"moe.expert_bias_E").copy_(w[m+"expert_bias"])
    for n, p in model.named_parameters(): p.copy_(new.pop(n))
    if new: raise AssertionError(f"torchtitan's model has no {', '.join(new)}")


def titan(layers, folder):
    "torchtitan's step: blocks and loss compiled, fused AdamW, bf16 parameters."
    import torch.nn.functional as F
    cfg = sizes(config(layers, afmoe=False))
    with torch.device("meta"): model = titan_model(cfg).build()
    model = model.to(BF16).to_empty(device="cuda")
    for name, b in model.named_buffers(): b.data = torch.zeros(b.shape, device="cuda")
    for m in model.modules():
        if hasattr(m, "_precompute_cache"):
            with torch.device("cuda"): m.cache = m._precompute_cache()
    titan_load(model, torch.load(Path(folder)/"a.pt", mmap=True), cfg)
    torch._dynamo.config.capture_scalar_outputs = True
    for block in model.layers.values(): block.compile(fullgraph=True)
    loss_of = torch.compile(lambda logits, labels: F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(0, 1),
        reduction="sum"))
    opt = torch.optim.AdamW(model.parameters(), 1e-5, (.9, .95), fused=True)
    ids = language(T+1, 1000).cuda()
    x, y, positions = ids[None,:-1].contiguous(), ids[None,1:].contiguous(), torch.arange(T, device="cuda")[None]

    def step():
        loss = loss_of(model(x, positions), y)/T
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.detach()

    first = float(step())
    result = timed(step)
    return result | dict(loss=first, layers=layers, tokens_per_s=T/result["ms"]*1e3,
        mfu=flops(cfg, False)*T/result["ms"]*1e3/PEAK, profile=profile(step, cfg))


def check():
    """A small model of the same kind in bf16: loss and gradients of the fused pieces against the plain model's in
    float32, and a step that may not wait."""
    from moe_rl.gpu.optimizers import fused_optimizers
    from moe_rl.gpu.step import Batch, FusedModel, FusedStep, documents
    from moe_rl.moe.attention import packed_attend, packed_positions
    from moe_rl.moe.experts import grouped_experts
    from moe_rl.moe.families import new_afmoe
    from moe_rl.moe.model import Model, init_weights
    from moe_rl.train.objective import token_logprobs
    cfg = new_afmoe(vocab_size=2048, hidden_size=512, intermediate_size=1024, moe_intermediate_size=256,
                      num_hidden_layers=4, num_dense_layers=1, num_attention_heads=8, num_key_value_heads=2,
                      head_dim=128,
                      num_experts=16, num_experts_per_tok=4, sliding_window=256, route_scale=2.)
    half = init_weights(Model(cfg, grouped_experts), 0).bfloat16().cuda()
    for n, b in half.named_buffers(): b.data = b.data.float()
    full = init_weights(Model(cfg, grouped_experts), 0).cuda()
    full.load_state_dict({n: t.float() for n, t in half.state_dict().items()})
    docs = documents([1500, 548], half)
    ids, targets = torch.randint(2048, (2, 2048), device="cuda")
    weights = torch.full((2048,), 1/2048, device="cuda")
    out = full(ids, packed_positions(docs.cu), packed_attend(docs.cu))
    lp, _, lse = token_logprobs(out.hidden, full.lm_head.weight, targets)
    want = dict(zip((n for n, _ in full.named_parameters()), torch.autograd.grad(-lp.mean(), list(full.parameters()))))
    logits = out.hidden.detach()@full.lm_head.weight.detach().T
    result = dict(ok=True)
    check_casts()
    for attention in ("torch", "flash4"):
        for stream in (BF16, torch.float32):
            fused = FusedModel(half, attention=attention, stream=stream)
            got = fused.loss(ids, targets, weights, docs, replay=out.routes)
            grads = dict(zip(want, torch.autograd.grad(got.loss, list(half.parameters()))))
            worst = max(float((grads[n].float()-want[n]).norm()/want[n].norm()) for n in want)
            h, _ = fused.hidden(ids, docs, replay=out.routes)
            kl = torch.nn.functional.kl_div((h.float()@full.lm_head.weight.T).log_softmax(-1), logits.log_softmax(-1),
                log_target=True, reduction="batchmean")
            name = max(want, key=lambda n: float((grads[n].float()-want[n]).norm()/want[n].norm()))
            print(f"check {attention}, stream {stream}: loss {got.loss.item():.5f} against {-lp.mean().item():.5f}, "
                  f"worst gradient {worst:.4f} ({name}), mean |d logprob| "
                  f"{(got.logprobs-lp).abs().mean().item():.5f}, KL {kl.item():.2e}", flush=True)
            result |= {f"kl_stream_{str(stream).removeprefix('torch.')}": kl.item(),
                f"grad_stream_{str(stream).removeprefix('torch.')}": worst}
            if abs(got.loss.item()+lp.mean().item()) > 5e-3 or worst > .08:
                raise AssertionError("the fused model computes something else")
    for optimizer in ("adamw", "muon"):
        step = FusedStep(FusedModel(half), fused_optimizers(half, optimizer, products="quack"))
        batch = [Batch(ids, targets, weights, docs)]
        first = step(batch).item()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try: loss = step(batch)
        finally: torch.cuda.set_sync_debug_mode("default")
        for _ in range(5): loss = step(batch)
        print(f"check {optimizer}: no waiting; loss {first:.4f} -> {loss.item():.4f}", flush=True)
        if not loss.item() < first: raise AssertionError("the fused step does not learn")
    return result


def check_casts():
    "The optimizer's casts against a step followed by a cast, bit by bit."
    from functools import partial
    from moe_rl.fp8.adamw import CastingAdamW
    from moe_rl.fp8.kernels import cast_blocks
    from moe_rl.fp8.linear import KeptCasts
    from moe_rl.gpu.optimizers import AdamW
    casts, results = KeptCasts(), []
    for make in (AdamW, partial(CastingAdamW, casts=casts)):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(8, 768, 512, device="cuda").bfloat16())
        blocks = lambda w: cast_blocks(w, transpose=True)
        if make is not AdamW: casts(p, blocks)
        opt = make([p], 1e-2)
        for _ in range(3):
            p.grad = torch.randn(p.shape, device="cuda").bfloat16()
            opt.step()
        results.append([p.detach(), *opt.state[p].values()])
    same = [torch.equal(x, y) for x, y in zip(*results)]
    kept = [t for c in casts.kept[p][1] for t in (c.q.view(torch.uint8), c.scale)]
    anew = [t for c in blocks(p.detach()) for t in (c.q.view(torch.uint8), c.scale)]
    right = all(map(torch.equal, kept, anew))
    print(f"check casts: as cast_blocks {right}, weights and moments bit-equal {same}", flush=True)
    if not right or (results[0][0].float()-results[1][0].float()).abs().max() > 2e-2:
        raise AssertionError("the optimizer's casts are not those of cast_blocks")


def run_part(part, layers, folder):
    if part == "check": return check()
    return titan(layers, folder) if part == "titan" else fused(part, layers, folder)


def measure(args):
    needs_hopper()
    big = torch.cuda.get_device_properties(0).total_memory > 100*2**30
    parts = args or PARTS
    if bad := set(parts) - set(PARTS):
        raise SystemExit(f"bench mfu: no part {', '.join(bad)}; there are {', '.join(PARTS)}")
    results = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        for part in parts:
            layers = (16 if big else 12) if part in ("a", "titan") else (12 if big else 8)
            began, out = time.time(), Path(folder)/f"{part}.json"
            code = subprocess.run([sys.executable, __file__, part, str(layers), folder, str(out)]).returncode
            if code or not out.exists():
                print(f"part {part} ended with code {code} after {time.time()-began:.0f} s", flush=True)
                continue
            results[part] = json.loads(out.read_text())
            show(part, results[part], time.time()-began)
    return dict(figures=figures(results), parts=results)


def show(part, r, seconds):
    if "ms" not in r: return
    print(f"{part}: {r['layers']} layers, {r['ms']:.1f} ms ({r['host_ms']:.1f} on the host), {r['tokens_per_s']:.0f} "
          f"tokens/s, MFU {r['mfu']:.3f}, {r['gib']:.1f} GiB, optimizer {r.get('optimizer_ms', 0):.1f} ms, "
          f"loss {r['loss']:.4f}; {seconds:.0f} s in all", flush=True)
    if p := r.get("profile"):
        print(f"   profiled {p['wall_ms']:.1f} ms, kernels {p['busy_ms']:.1f}: "
            + ", ".join(f"{k} {v:.1f}" for k, v in p["groups"].items()))
        for k, v in list(p["kernels"].items())[:16]: print(f"      {v:7.2f}  {k}")


def figures(r):
    f = {}
    if "check" in r: f |= {k: v for k, v in r["check"].items() if k.startswith("kl_")}
    if "a" in r:
        f |= dict(mfu=r["a"]["mfu"], tokens_per_s=r["a"]["tokens_per_s"], peak_gib=r["a"]["gib"],
            layers=r["a"]["layers"])
    if "titan" in r:
        f |= dict(titan_tokens_per_s=r["titan"]["tokens_per_s"], titan_mfu=r["titan"]["mfu"],
            titan_peak_gib=r["titan"]["gib"])
    if "a" in r and "titan" in r: f["ratio_titan"] = r["a"]["tokens_per_s"]/r["titan"]["tokens_per_s"]
    if "b" in r:
        f |= dict(afmoe_mfu=r["b"]["mfu"], afmoe_tokens_per_s=r["b"]["tokens_per_s"], afmoe_peak_gib=r["b"]["gib"],
            afmoe_layers=r["b"]["layers"])
    f |= {f"max_vio_{n}": v["max_vio"] for n, v in r.items() if "max_vio" in v}
    if "muon" in r:
        f |= dict(muon_mfu=r["muon"]["mfu"], muon_tokens_per_s=r["muon"]["tokens_per_s"],
            muon_optimizer_share=r["muon"]["optimizer_share"], muon_peak_gib=r["muon"]["gib"])
    for other in ("fp8", "fp8_linear", "stream"):
        if "b" in r and other in r: f |= {f"{other}_ratio": r[other]["tokens_per_s"]/r["b"]["tokens_per_s"]}
    return f


if __name__ == "__main__":
    part, layers, folder, out = sys.argv[1:]
    Path(out).write_text(json.dumps(run_part(part, int(layers), folder)))
