"""A conversation of 120 turns in which a tool answers every one: whose numbers belong to which token, and how often
a token is computed."""
import argparse, asyncio, copy
import msgspec
import numpy as np
import torch
from moe_rl.config import load_settings
from moe_rl.data.tokens import TextTokenizer, byte_tokenizer, says
from moe_rl.moe.attention import packed_attend
from moe_rl.rl.ask import TRAIN, build_engine, converse
from moe_rl.rl.trainer import build_model
from moe_rl.rollout.environments import Environment, Task
from moe_rl.rollout.guard import Guard
from moe_rl.train.objective import sampling_logprobs

TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if "
            "add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


class Endless(Environment):
    "A tool that always has something to say."
    name = "endless"
    def problem(self, key):
        return Task(env=self.name, prompt=f"Count to {key % 1000}.", before=tuple(says("Be brief.", "system")),
            replies="tool")
    def reply(self, task, turns): return f"turn {len(turns)//2 + 1}"
    def score(self, task, turns): return 1.0


def chat_tokenizer() -> TextTokenizer:
    "Bytes, and the two tokens of a chat template."
    core = byte_tokenizer().core
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return TextTokenizer(core, dict(eos_token="<|im_end|>"), TEMPLATE)


def other_weights(model, seed: int) -> dict: # like those of a later version
    gen = torch.Generator().manual_seed(seed)
    return {n: t + .02*torch.randn(t.shape, generator=gen) if t.ndim > 1 else t.clone()
        for n, t in model.state_dict().items()}


def talk(s, model, tokenizer, versions: list[dict], turns: int):
    """One conversation whose engine takes the next of `versions` at equal distances; the rollout, the engine, and
    for each turn its version and how long the conversation was at its end."""
    engine, guard, ends = build_engine(s, copy.deepcopy(model), record_routes=True), Guard(Endless()), []
    async def generate(r):
        version, late = divmod(int(r.id.rpartition(".")[2]), -(-turns//len(versions)))
        if not late: engine.update_weights(version, versions[version])
        [done] = [part async for part in engine.generate([r])]
        ends.append((engine.version, len(r.prompt), len(r.prompt) + len(done.token_ids)))
        # an answer that was cut is an answer, too: a model that has learned nothing seldom ends one
        return msgspec.structs.replace(done, stop_reason="stop")
    rollout = asyncio.run(converse(s, guard, guard.env.sample(7), tokenizer, generate, (1 << 30, "nothing"), TRAIN, 0,
        0))
    return rollout, engine, ends


@torch.no_grad()
def check(rollout, model, versions: list[dict], ends) -> dict:
    "Against a plain forward pass of the whole conversation with the weights of each turn."
    ids, worst, routes, aligned, read = torch.from_numpy(rollout.token_ids).long(), 0., 0, 0, 0
    plain = copy.deepcopy(model)
    for version, start, end in ends:
        plain.load_state_dict(versions[version])
        out = plain(ids[:end], torch.arange(end), packed_attend(torch.tensor([0, end])))
        logp = sampling_logprobs(plain.logits(out.hidden[start-1:end-1]), 1.0, 0, 1.0).gather(1,
            ids[start:end, None])[:, 0].numpy()
        worst = max(worst, float(np.abs(logp - rollout.logprobs[start:end]).max()))
        new = out.routes[read:end-1].numpy()       # tokens that this turn was the first to read
        routes += int((np.sort(new, -1) == np.sort(rollout.routes[read:end-1].astype(np.int64), -1)).all((-1,
            -2)).sum())
        stamps = set(rollout.versions[start:end].tolist()), set(rollout.versions[read + 1:start].tolist()) - {-1}
        aligned += stamps == ({version}, set()) and bool(rollout.loss_mask[start:end].all()) and not rollout.loss_mask[
            read + 1:start].any()
        read = end - 1
    return dict(worst_logprob=worst, routes_equal=routes/len(rollout.routes), seams_aligned=aligned)


def measure(args):
    p = argparse.ArgumentParser(prog="moe-rl bench turns")
    p.add_argument("--turns", type=int, default=120)
    a = p.parse_args(args)
    tokenizer = chat_tokenizer()
    s = load_settings(overrides={"rl.max_turns": a.turns, "engine.max_tokens": 8, "engine.kv_tokens": 32768,
        "model.hidden_size": 32,
        "model.intermediate_size": 64, "model.moe_intermediate_size": 16, "model.head_dim": 16,
        "rl.tokens_per_batch": 16384,
        "model.max_position_embeddings": 16384})
    model, figures = build_model(s, tokenizer.vocab_size), {}
    weights = [model.state_dict(), other_weights(model, 1), other_weights(model, 2)]
    for name, versions in (("one_version", weights[:1]), ("three_versions", weights)):
        rollout, engine, ends = talk(s, model, tokenizer, versions, a.turns)
        found = check(rollout, model, versions, ends)
        # what each version has to compute at least: every token but the last, once
        need = sum(max(end for v, _, end in ends if v == version) - 1 for version in range(len(versions)))
        # tokens of the last block of the turn before, which was not full
        again = engine.stats()["computed_tokens"] - need
        found |= dict(turns=rollout.turns, tokens=len(rollout), computed_again_per_turn=again/rollout.turns,
            block=s.engine.block_size,
            without_reuse=sum(end - 1 for *_, end in ends)/need, with_reuse=1 + again/need)
        print(f"{name}: {found}", flush=True)
        figures |= {f"{name}_{k}": v for k, v in found.items()}
    return dict(figures=figures)
