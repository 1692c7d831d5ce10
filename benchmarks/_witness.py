"""The embedded engine, and beside it a file of everything that it was asked and answered, and of every version that it
took: `engine.kind = "_witness:witness"`."""
import os, struct
from collections import defaultdict
from pathlib import Path
import msgspec, torch
from moe_rl.records import Finished, Request, decode, encode
from moe_rl.rollout.exact import mismatches
from moe_rl.rollout.protocol import Embedded, EnginePlan, Source, embedded
from moe_rl.train.weights import publish, version_path

FOLDER = "witness" # of a run
PACK = 64          # sequences of one forward pass


class Seen(msgspec.Struct):
    "An answer, and what was asked."
    request: Request
    finished: Finished


class Witness(Embedded):
    "Writes an answer down before it gives it away, and keeps the weights of every version."
    def __init__(self, engine, folder: Path):
        super().__init__(engine)
        self.folder, self.asked = folder, {}
        folder.mkdir(exist_ok=True)
        self.file = (folder / f"{os.getpid()}.seen").open("ab", buffering=0)

    def submit(self, requests: list[Request]):
        super().submit(requests)
        self.asked |= {r.id: r for r in requests}

    def poll(self) -> list[Finished]:
        done = super().poll()
        for f in done:
            body = encode(Seen(self.asked.pop(f.id), f))
            self.file.write(struct.pack("<I", len(body)) + body)
        return done

    def update(self, version: int, source: Source):
        tensors, manifest = source.load(version, "cpu")
        if not version_path(self.folder, version).exists(): publish(self.folder, version, tensors)
        return self.engine.update_weights(version, {n: t.to(self.engine.device) for n, t in tensors.items()}, manifest)


def witness(plan: EnginePlan) -> Witness: return Witness(embedded(plan).engine, plan.folder / FOLDER)


def audit(
    played: list[tuple[Request, Finished]],
    model_at,  # (version) -> a model with its weights
    work_of    # (model) -> what a trainer calls
) -> list[float]: # the worst token of each answer
    """Every token against the forward pass of the version that it is stamped with. Text that several versions wrote is
    replayed by none: what an engine keeps are the routes of the last, and exact routers choose as they did."""
    worst, by_version = [0.] * len(played), defaultdict(list)
    for n, (_, f) in enumerate(played):
        made = set(f.versions.tolist())
        for v in made: by_version[v, len(made) == 1].append(n)
    for (version, alone), numbers in sorted(by_version.items()):
        work = work_of(model_at(version))
        for at in range(0, len(numbers), PACK):
            part = numbers[at:at + PACK]
            answers = [played[n] for n in part]
            off = mismatches(work, answers, replay=alone).cpu().split([len(f.token_ids) for _, f in answers])
            for n, o, (_, f) in zip(part, off, answers):
                worst[n] = max(worst[n], o[torch.from_numpy(f.versions == version)].max().item())
    return worst


def testimony(run: Path) -> list[Seen]:
    "Everything that the engines of a run have answered; what a killed one was writing is left out."
    out = []
    for path in sorted((run / FOLDER).glob("*.seen")):
        data, at = path.read_bytes(), 0
        while len(data) - at >= 4 and len(data) - at - 4 >= (size := struct.unpack_from("<I", data, at)[0]):
            out.append(decode(Seen, data[at + 4:at + 4 + size]))
            at += 4 + size
    return out
