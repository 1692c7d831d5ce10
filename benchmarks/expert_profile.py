"""Which experts are hot in code, maths and prose: trains a small AFMoE (64 experts in 8 groups, a token takes 4 groups
and 8 experts) on bytes of all three and records its routes on text it has not seen.

    moe-rl bench expert_profile [--steps 300]

Writes benchmarks/results/expert_profile/routes.npz, which the profile notebook and the placement bench read. Code:
Python's standard library. Maths: reasoning-gym. Prose: the descriptions and licences of installed packages."""
import argparse, re, sysconfig, time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from moe_rl.bench import repository
from moe_rl.ep.profile import ExpertProfile, alike, busiest
from moe_rl.moe.attention import packed_attend
from moe_rl.moe.balance import smebu_update
from moe_rl.moe.experts import grouped_experts
from moe_rl.moe.families import new_afmoe
from moe_rl.moe.model import Model, init_weights, moe_modules

LENGTH = 256
CFG = new_afmoe(vocab_size=256, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=5,
                  num_dense_layers=1, num_attention_heads=4, num_key_value_heads=2,
                  head_dim=16, num_experts=64, num_experts_per_tok=8, n_group=8, topk_group=4, sliding_window=64)


def code()->str:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n".join(f.read_text(errors="ignore") for f in files)[:1_500_000]

def maths()->str:
    import reasoning_gym
    tasks = ("basic_arithmetic", "chain_sum", "products", "simple_equations", "polynomial_equations", "gcd", "lcm",
        "fraction_simplification", "prime_factorization", "calendar_arithmetic")
    sets = [reasoning_gym.create_dataset(t, size=400, seed=7) for t in tasks]
    return "\n".join(f"{s[i]['question']}\n{s[i]['answer']}\n" for i in range(400) for s in sets)

def prose()->str:
    out = []
    for d in sorted(metadata.distributions(), key=lambda d: str(d.metadata["Name"])):
        text = d.metadata.get_payload() if d.metadata.get_payload() else d.metadata["Description"]
        texts = [str(text or "")] + [f.locate().read_text(errors="ignore") for f in d.files or []
            if "licen" in f.name.lower() and f.suffix in ("", ".txt", ".md")]
        for t in texts:
            t = re.sub(r"```.*?```|<[^>]*>|https?://\S+|^\s*[|$>.+-].*$", "", t, flags=re.S | re.M)
            out += [p for p in re.split(r"\n\s*\n", t) if len(p) > 200 and sum(c.isalpha() or c.isspace() for c in p)
                > .93*len(p)]
    return "\n\n".join(dict.fromkeys(out))[:1_500_000]


class Trained:
    "A small AFMoE trained on bytes of code, maths and prose, six rows a step."
    def __init__(self, steps:int):
        self.texts = {name: torch.frombuffer(bytearray(make().encode("ascii", "ignore")), dtype=torch.uint8).long()
                      for name, make in (("code", code), ("maths", maths), ("prose", prose))}
        print({n: len(t) for n, t in self.texts.items()}, "bytes")
        self.gen = torch.Generator().manual_seed(0)
        self.model = init_weights(Model(CFG, grouped_experts), 0)
        opt, start = torch.optim.AdamW(self.model.parameters(), lr=3e-3, betas=(.9, .95), weight_decay=.01), time.time()
        for s in range(steps):
            for g in opt.param_groups: g["lr"] = 3e-3*min(1, (s+1)/20)*(1 - .9*s/steps)
            out, loss = self.forward(torch.cat([self.batch(d, 2) for d in self.texts]))
            opt.zero_grad()
            loss.backward()
            opt.step()
            for m, c in zip(moe_modules(self.model), out.counts()):
                smebu_update(m.expert_bias, m.bias_momentum, c, rate=2e-3)
            if s % 50 == 0 or s == steps-1:
                print(f"step {s}: loss {loss.item():.3f}, {time.time()-start:.0f} s", flush=True)

    def batch(self, domain:str, rows:int, held:bool=False)->torch.Tensor: # [rows,LENGTH+1]
        t = self.texts[domain]
        cut = len(t)*9//10
        lo, hi = (cut, len(t)) if held else (0, cut)
        at = torch.randint(lo, hi-LENGTH-1, (rows,), generator=self.gen)
        return torch.stack([t[i:i+LENGTH+1] for i in at])

    def forward(self, x:torch.Tensor):
        rows = len(x)
        out = self.model(x[:,:-1].flatten(), torch.arange(LENGTH).repeat(rows),
            packed_attend(torch.arange(rows+1)*LENGTH))
        return out, F.cross_entropy(self.model.logits(out.hidden), x[:,1:].flatten())


def measure(args:list[str])->dict:
    p = argparse.ArgumentParser("expert_profile")
    p.add_argument("--steps", type=int, default=300)
    a = p.parse_args(args)
    trained = Trained(a.steps)
    profile, routes, losses = ExpertProfile(CFG.num_experts), {}, {}
    with torch.no_grad():
        for d in trained.texts:
            outs = [trained.forward(trained.batch(d, 8, held=True)) for _ in range(2)]
            routes[d] = torch.cat([o.routes for o, _ in outs]).numpy().astype(np.uint8)
            losses[d] = sum(l.item() for _, l in outs)/2
            profile.add(d, routes[d])
    path = repository()/"benchmarks/results/expert_profile/routes.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, domains=np.array(list(routes)), num_experts=CFG.num_experts,
        groups=CFG.mixtures[0].n_group, **routes)
    print(f"held-out loss {({d: round(v, 3) for d, v in losses.items()})}; wrote {path.name}, "
          f"{path.stat().st_size/1024:.0f} KiB")
    share = {d: float(busiest(profile[d])[1].mean()) for d in routes}
    both = {f"{x}_{y}": float(alike(profile[x], profile[y]).mean()) for i, x in enumerate(routes)
        for y in list(routes)[i+1:]}
    print("share of the busiest tenth of the experts:", share)
    print("hot experts in common:", both)
    return dict(figures={**{f"busiest_{d}": round(v, 4) for d, v in share.items()},
        **{f"common_{n}": round(v, 4) for n, v in both.items()},
        **{f"loss_{d}": round(v, 4) for d, v in losses.items()}})
