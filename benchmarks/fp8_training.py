"""Does FP8 training arrive where bf16 training arrives? One model of 160 M parameters, the same data and seed, trained
with bf16 and with FP8 products.

AFMoE of 8 layers, width 768, 32 experts of 256 and 4 per token, a byte-pair vocabulary of 4096, 16384 tokens a step for
300 steps, AdamW on float32 master weights. In the
FP8 run every linear layer but the head, and all experts, multiply in FP8; routers, norms, embedding, head and attention
itself stay. The text is
benchmarks/data/reasoning.txt.xz, questions and answers of reasoning-gym (`make_text` below made it), about two epochs
of it. Two runs whose rounding differs drift apart,
whatever they round to: so the figure is the mean over three seeds, and a second bf16 run, with another kernel for the
experts and so other rounding, says how far apart two
runs of the same recipe are.

    moe-rl bench fp8_training [STEPS]         300 unless said otherwise
"""
import json
import lzma
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F

from moe_rl.bench import needs_hopper

TEXT = Path(__file__).parent/"data"/"reasoning.txt.xz"
TASKS = ("chain_sum", "basic_arithmetic", "letter_counting", "spell_backward", "number_sorting", "leg_counting", "gcd",
         "caesar_cipher", "word_sorting", "family_relationships",
         "calendar_arithmetic", "propositional_logic", "syllogism", "simple_equations", "fraction_simplification",
         "lcm", "base_conversion", "time_intervals")
VOCAB, DOCS, LENGTH, PEAK_LR, WARMUP, SEEDS = 4096, 32, 512, 3e-4, 60, (0, 1, 2)


def make_text(per_task=2000, seed=1):
    "Write the text again; needs reasoning-gym."
    import random
    import reasoning_gym
    items = [f"Question: {x['question']}\nAnswer: {x['answer']}\n\n" for n in TASKS
        for x in reasoning_gym.create_dataset(n, size=per_task, seed=seed)]
    random.Random(seed).shuffle(items)
    TEXT.parent.mkdir(exist_ok=True)
    TEXT.write_bytes(lzma.compress("".join(items).encode(), preset=9))


def token_ids():
    "The text in byte pairs that were merged on its first quarter."
    from moe_rl.data.tokens import train_bpe
    items = lzma.decompress(TEXT.read_bytes()).decode().split("\n\n")
    tokenizer = train_bpe(items[:len(items)//4], VOCAB)
    return torch.tensor([i for item in items for i in tokenizer.encode(item+"\n\n")])


def batches(ids, steps, seed):
    "`DOCS` random stretches of the text per step: inputs and targets [DOCS*LENGTH]."
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        start = torch.randint(0, len(ids)-LENGTH-1, (DOCS, 1), generator=g).to(ids.device)
        at = start + torch.arange(LENGTH+1, device=ids.device)
        yield ids[at[:,:-1]].flatten(), ids[at[:,1:]].flatten()


def build(kind, device, seed):
    "The model and, for the record, what multiplies in FP8."
    from functools import partial
    from moe_rl.fp8.experts import Fp8Experts
    from moe_rl.fp8.linear import to_fp8
    from moe_rl.moe.experts import grouped_experts
    from moe_rl.gpu.fused import fused_experts
    from moe_rl.moe.families import new_afmoe
    from moe_rl.moe.model import Model, init_weights, lower_precision
    cfg = new_afmoe(vocab_size=VOCAB, hidden_size=768, intermediate_size=2048, moe_intermediate_size=256,
                      num_hidden_layers=8, num_dense_layers=1, num_attention_heads=6, num_key_value_heads=2,
                      head_dim=128, num_experts=32, num_experts_per_tok=4, sliding_window=256, route_scale=2.)
    fused, backend = ("quack", "deep_gemm") if device == "cuda" else ("plain", "reference")
    model = Model(cfg, {"bf16": partial(fused_experts, backend=fused), "bf16 again": grouped_experts,
        "fp8": Fp8Experts(backend)}[kind])
    model = lower_precision(init_weights(model, seed), torch.bfloat16).to(device)
    return model, to_fp8(model, backend=backend) if kind == "fp8" else []


def train(kind, ids, steps, seed=0):
    "Loss of every step."
    from moe_rl.moe.attention import packed_attend, packed_positions
    from moe_rl.moe.balance import sign_update
    from moe_rl.moe.model import moe_modules
    device = ids.device.type
    model, fp8 = build(kind, device, seed)
    params = list(model.parameters())
    master = [p.detach().float().clone() for p in params]
    opt = torch.optim.AdamW([{"params": [m for m in master if m.ndim > 1], "weight_decay": .1},
        {"params": [m for m in master if m.ndim == 1], "weight_decay": 0.}], lr=PEAK_LR, betas=(.9, .95))
    cu = torch.arange(0, DOCS*LENGTH+1, LENGTH, device=device)
    packed, positions, losses, began = packed_attend(cu), packed_positions(cu), [], perf_counter()
    # documents of one length: nothing to pad
    attend = lambda layer, q, k, v, window: packed.rectangles(q.to(v.dtype), k.to(v.dtype), v, window)
    print(
        f"{kind}, seed {seed}: {sum(p.numel() for p in params)/1e6:.0f} M parameters, {len(fp8)} linear layers in FP8",
        flush=True)
    for step, (x, y) in enumerate(batches(ids, steps, seed)):
        out = model(x, positions, attend)
        loss = F.cross_entropy(model.logits(out.hidden), y)
        loss.backward()
        for m, p in zip(master, params): m.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(master, 1.)
        for group in opt.param_groups: group["lr"] = PEAK_LR*min((step+1)/WARMUP, .5*(1+math.cos(math.pi*step/steps)))
        opt.step()
        with torch.no_grad():
            for m, p in zip(master, params): p.copy_(m)
            for moe, counts in zip(moe_modules(model), out.counts()): sign_update(moe.expert_bias, counts, 1e-3)
        losses.append(loss.detach())
        if step % max(1, steps//6) == 0 or step == steps-1:
            print(f"   {kind}, seed {seed}, step {step+1:4d} loss {loss.item():.4f}  {perf_counter()-began:5.1f} s",
                flush=True)
    return torch.stack(losses).cpu()


def measure(args):
    steps = int(args[0]) if args else 300
    needs_hopper()
    with tempfile.TemporaryDirectory() as folder: # a process per seed, side by side: losses are no timings
        torch.save(token_ids(), Path(folder)/"ids.pt")
        files = {s: Path(folder)/f"{s}.json" for s in SEEDS}
        children = [subprocess.Popen([sys.executable, __file__, "seed", str(s), str(steps), str(Path(folder)/"ids.pt"),
            str(files[s])]) for s in SEEDS]
        if any([c.wait() for c in children]):
            raise RuntimeError("fp8_training: a seed failed; its last words are above")
        losses = {(kind, s): torch.tensor(l) for s, f in files.items() for kind, l in json.loads(f.read_text()).items()}
    runs = list(losses)
    last = {r: l[-50:].mean().item() for r, l in losses.items()}
    difference = {r: last[r]/last["bf16", r[1]]-1 for r in runs}
    for r in runs:
        print(
            f"{r[0]:10s} seed {r[1]} mean loss of the last 50 steps {last[r]:.5f}, {100*difference[r]:+.3f} % of bf16")
    mean = sum(last["fp8", s] for s in SEEDS)/sum(last["bf16", s] for s in SEEDS)-1
    print(f"FP8 over all seeds: {100*mean:+.3f} %")
    return dict(figures=dict(rel_loss_diff=abs(mean), rel_loss_diff_bf16_again=abs(difference["bf16 again", SEEDS[0]]),
                             **{f"rel_loss_diff_seed_{s}": difference["fp8", s] for s in SEEDS},
                             loss_bf16=sum(last["bf16", s] for s in SEEDS)/len(SEEDS),
                             loss_fp8=sum(last["fp8", s] for s in SEEDS)/len(SEEDS)),
                curves={k: [round(v, 4) for v in losses[k, SEEDS[0]][::10].tolist()]
                    for k in ("bf16", "fp8", "bf16 again")})


def train_seed(seed, steps, ids, path):
    "All kinds of one seed on the tokens in `ids`; the losses go to `path`."
    ids = torch.load(ids, weights_only=True).cuda()
    kinds = ("bf16", "fp8") + ("bf16 again",)*(seed == SEEDS[0])
    Path(path).write_text(json.dumps({kind: train(kind, ids, steps, seed).tolist() for kind in kinds}))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make-text"]: make_text()
        case ["seed", seed, steps, ids, path]: train_seed(int(seed), int(steps), ids, path)
