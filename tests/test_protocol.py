"An engine of a user's own, named by `engine.kind`: a run with it, and what is said of one that lies or is not there."
import pytest

from moe_rl.records import Request
from moe_rl.rollout.protocol import EnginePlan, Folder, engine_maker
from moe_rl.train import weights
from test_orchestrator import MODULE, Command, books, latest

SOUND = dict(duplicated=[], lost=[], invented=[])
ENGINE = """
import msgspec, numpy as np
from moe_rl.records import Finished
from moe_rl.train.weights import describe

class Dice:
    "Says what it likes, one answer a poll, and knows how likely that was."
    def __init__(self, plan, lies=False):
        self.plan, self.lies, self.queue, self.version, self.tokens = plan, lies, [], 0, 0
    @property
    def busy(self): return bool(self.queue)
    def submit(self, requests): self.queue += requests
    def poll(self):
        if not self.queue: return []
        r, n = self.queue.pop(0), 3
        ids = np.random.default_rng(r.seed).integers(0, 256, n).tolist()
        self.tokens += n
        return [Finished(id=r.id, token_ids=ids, logprobs=np.full(n, -np.log(self.plan.spec.vocab_size), np.float32),
            versions=np.full(n, self.version, np.int32), routes=None, stop_reason="stop")]
    def update(self, version, source):
        tensors, manifest = source.load(version)
        self.version = version
        if self.lies and version: tensors = tensors | {"norm.weight": tensors["norm.weight"] + 1}
        return describe(tensors, version)
    def abort(self, ids): self.queue = [r for r in self.queue if r.id not in ids]
    def pause(self): pass
    def resume(self): pass
    def stats(self): return dict(tokens=self.tokens, version=self.version)
    def close(self): open(self.plan.folder/"closed", "w").close()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder/"letters_task.py").write_text(MODULE)
    (folder/"dice.py").write_text(ENGINE)
    return folder


def test_a_run_with_an_engine_of_the_users(home):
    run = Command(home, dir="dice", engine__kind="dice:Dice", rl__replay="false", rl__steps=3)
    assert run.wait() == 0, run.said()
    rows = run.lines("metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3] and all(r["engine_tokens_per_s"] >= 0 for r in rows)
    assert books(run.folder) == SOUND and latest(run.folder).name == "step_3"
    assert (run.folder/"closed").exists()                       # it was told that it is over


def test_an_engine_that_holds_other_weights_ends_the_run_by_the_name_of_a_tensor(home):
    "Bug: what an engine answers is not compared with what was published."
    run = Command(home, dir="lies", engine__kind="dice:Dice", engine__params__lies="true", rl__replay="false")
    assert run.wait() == 2
    assert ("engine-0.0: says that it took weights v1, but computes with others: norm.weight has other contents: look "
        "at its machine, then --resume") in run.said()


@pytest.mark.parametrize("settings, said", [
    (dict(engine__kind="dices:Dice"), "dices:Dice: cannot be imported: No module named 'dices'"),
    (dict(engine__kind="dice:Die"), "dice:Die: cannot be imported: module dice has no 'Die'; did you mean 'Dice'?"),
    (dict(engine__kind="embeded"), "engine.kind: 'embeded', expected one of embedded, vllm or \"module:attribute\"; "
        "did you mean 'embedded'?"),
    (dict(engine__kind="dice:Dice", engine__params__luck="1"), "engine.params: dice:Dice got an unexpected keyword "
        "argument 'luck'")])
def test_an_engine_that_is_not_there_is_refused_before_anything_is_made(home, settings, said):
    run = Command(home, dir="none", **settings)
    assert run.wait() == 2 and said in run.said() and not run.folder.exists()


def test_a_version_that_is_gone_is_asked_for_again(home, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(home)
    engine = engine_maker("dice:Dice", {})(EnginePlan(None, tmp_path, *[None]*9))
    with pytest.raises(weights.WeightsGone): engine.update(4, Folder(tmp_path))
    engine.submit([Request(id="a", prompt=[1], max_tokens=4)])
    engine.abort(["a", "b"])
    assert not engine.busy
