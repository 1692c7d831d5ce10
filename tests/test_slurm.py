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

CONFIGS = {"gpu_1": 1, "gpu_2": 1, "node_8": 1, "nodes_4": 4, "trinity_large_28": 28}

@pytest.mark.parametrize("name", CONFIGS)
def test_each_config_fits_and_is_rendered(name, capsys):
    from moe_rl.cli import main
    assert main(["run", "--config", f"{BENCH.parent}/configs/{name}.toml", "--slurm", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# memory: ") and f"#SBATCH --nodes={CONFIGS[name]}\n" in out
    assert ("NCCL_SOCKET_IFNAME=ib0" in out) == (CONFIGS[name] > 1)

@pytest.mark.parametrize("name, less", [("trinity_large_28", ["trainer_nodes", "4", "trainer_ranks", "32"]),
    ("nodes_4", ["trainer_nodes", "1", "trainer_ranks", "2", "experts", "2"]),
    ("gpu_2", ["gpu", "a100", "trainer_ranks", "1"])])
def test_what_cannot_fit_is_refused_before_it_queues(name, less, capsys, tmp_path):
    from moe_rl.cli import main
    words = [w for k, v in zip(less[::2], less[1::2]) for w in (f"--launch.params.{k}", v)]
    more = ["--model.num_hidden_layers", "24"] if name == "gpu_2" else []
    assert main(["run", "--config", f"{BENCH.parent}/configs/{name}.toml", *words, *more, "--slurm", "--dir",
        str(tmp_path/"x")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "does not fit" in err and "would do" in err and not (tmp_path/"x").exists()

def test_what_a_run_cannot_do_yet_is_not_submitted(capsys, tmp_path):
    from moe_rl.cli import main
    assert main(["run", "--config", f"{BENCH.parent}/configs/node_8.toml", "--slurm", "--dir", str(tmp_path/"x")]) == 2
    assert "trainer_ranks = 4 is more than 1" in capsys.readouterr().err and not (tmp_path/"x").exists()
