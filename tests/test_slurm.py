"A run as a job of a real Slurm of two nodes on loopback; without Slurm's programs these tests say which are missing."
import importlib.util, json, subprocess, sys
from pathlib import Path
import pytest

BENCH = Path(__file__).resolve().parents[1]/"benchmarks"
sys.path.insert(0, str(BENCH))
from _slurm_host import missing, slurm  # noqa: E402

spec = importlib.util.spec_from_file_location("bench_slurm", BENCH/"slurm.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if why := missing(): pytest.skip(why)
    with slurm(tmp_path_factory.mktemp("slurm")) as folder: yield folder

def test_a_run_is_a_job(cluster, tmp_path):
    "Preflight, trainer and engine on different nodes, the run's own exit code; no key is left."
    assert bench.completed(tmp_path/"run", (*bench.SHORT, "--rl.steps", "2"))
    log = (tmp_path/"run"/"logs"/"slurm.log").read_text()
    assert "preflight: n1: well" in log and "preflight: n2: well" in log
    assert list((tmp_path/"run"/"keys").iterdir()) == []

def test_a_bad_node_is_named_and_nothing_starts(cluster, tmp_path):
    folder, words = tmp_path/"run", ("scontrol", "update", "partition=main", "state=")
    subprocess.run([*words[:-1], "state=down"], check=True)        # the job waits while a node goes bad
    job = bench.submit(folder, "--launch.params.minutes", "5", *bench.SHORT)
    versions = json.loads((folder/"versions.json").read_text())
    (folder/"versions.json").write_text(json.dumps(versions | dict(torch="1.0")))
    subprocess.run([*words[:-1], "state=up"], check=True)
    bench.follow(job, 60)
    assert bench.field(job, "JobState") == "FAILED" and bench.field(job, "ExitCode") == "1:0"
    log = (folder/"logs"/"slurm.log").read_text()
    assert "preflight: n2: torch" in log and "1.0 was submitted" in log and not (folder/"logs"/"trainer.log").exists()

def test_a_mistake_costs_no_place_in_the_queue(tmp_path):
    words = "run", "--slurm", "--dir", str(tmp_path/"x"), "--launch.params.nodes", "2"
    r = subprocess.run([sys.executable, "-m", "moe_rl.cli", *words], capture_output=True, text=True)
    assert (r.returncode, r.stderr.count("\n")) == (2, 1) and "launch.params.interface = '' is empty" in r.stderr
    assert not (tmp_path/"x").exists()
