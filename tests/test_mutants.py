"""Broken settings and folders: a seeded handful of what `moe-rl bench mutants` draws by the thousand, and the faults
that it found."""
import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import mutants

from moe_rl.errors import StorageError, UserError
from moe_rl.report import read_run
from moe_rl.train import checkpoint as ck


def test_broken_settings_are_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "runs").mkdir(parents=True)
    tally = mutants.Tally()
    mutants.configs(tally, tmp_path / "here", random.Random(7), 24, lambda i: True)
    assert not tally.shown and tally.cases == 24 and tally.refused > 12


@pytest.mark.parametrize("words, said", [(["--env.params.x", "3"], "no setting 'x'"),
    (["--env.params.terms", "x"], "terms is a number"), (["--config", "none.toml"], "no such settings file")])
def test_found_by_the_bench(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fine.toml").write_text(mutants.TINY)
    from moe_rl import cli
    assert cli.main(["run", "--dry-run", "--config", "fine.toml", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0] and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["../../outside", "/outside", "a/../../outside", "x\0y"])
def test_a_checkpoint_names_no_file_outside(tmp_path, name):
    "A list of files that leads elsewhere is refused, even when what is there is a perfect copy."
    with ck.saving(tmp_path, 1) as folder: ck.write_bytes(folder / "part", b"data")
    [marker] = tmp_path.rglob(ck.MARKER)
    tree = json.loads(marker.read_bytes())
    tree["files"][name] = tree["files"]["part"]
    marker.write_text(json.dumps(tree))
    (tmp_path / "outside").write_bytes(b"data")
    (tmp_path / "checkpoints" / "outside").write_bytes(b"data")
    with pytest.raises(ck.CheckpointError, match="no file of this folder"): ck.verify(marker.parent)


def test_a_report_of_altered_logs_names_them(tmp_path):
    (tmp_path / "config.toml").write_text("rl = [")
    with pytest.raises(UserError, match="not valid TOML"): read_run(tmp_path)
    (tmp_path / "config.toml").write_text("")
    (tmp_path / "metrics.jsonl").write_text('{"stepp": 1}\n')
    with pytest.raises(StorageError, match="a line of its logs lacks something"): read_run(tmp_path)


@pytest.mark.parametrize("name", ["eos_token", "bos_token", "pad_token"])
def test_a_special_token_that_is_no_text(name, tmp_path):
    from moe_rl.data.tokens import byte_tokenizer, load_tokenizer
    byte_tokenizer().save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: 3}))
    with pytest.raises(ValueError, match=f"{name} 3 is not in the vocabulary"): load_tokenizer(tmp_path)


def test_a_line_that_repeats_what_was_given_stays_short(capsys):
    from moe_rl import cli
    assert cli.main(["a" * 5000]) == 2
    assert len(capsys.readouterr().err) < 1100


def test_a_sample_without_its_reward_is_left_out_of_the_report(tmp_path):
    from moe_rl.report import write_report
    (tmp_path / "config.toml").write_text("")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    (tmp_path / "samples.jsonl").write_text('{"step": 1, "rewerd": 1, "text": "x"}\n{"step": 2, "reward": 1, "text": '
                                            '"kept"}\n')
    text = Path(write_report(tmp_path)).read_text()
    assert "kept" in text
