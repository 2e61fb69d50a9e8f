"""The command line: what a user meets who types something wrong, and the demo from end to end."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from jaxdiff import cli

DEMO = [sys.executable, "-m", "jaxdiff.cli", "demo"]


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(flag in text for flag in ("--out", "--steps", "--num", "--seed", "--quiet"))
    assert "default: out" in text


@pytest.mark.parametrize(
    "args, said",
    [
        (["demo", "--steps", "0"], "must be at least 1, got 0"),
        (["demo", "--num", "many"], "many"),
        (["demo", "--colour"], "unrecognized arguments: --colour"),
        (["sing"], "sing"),
        ([], "command"),
    ],
)
def test_bad_flags_are_usage_errors(args, said, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert said in error and "usage:" in error


def test_an_unwritable_folder_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert cli.main(["demo", "--out", str(tmp_path / "file" / "out")]) == 1
    error = capsys.readouterr().err
    assert "cannot write to" in error and "choose another --out" in error
    assert len(error.strip().splitlines()) == 1


def test_another_seed_is_not_mixed_in(tmp_path, capsys):
    (tmp_path / "settings.json").write_text('{"seed": 1}')
    assert cli.main(["demo", "--out", str(tmp_path), "--seed", "2"]) == 1
    assert "holds a run with {'seed': 1}" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.delitem(sys.modules, "jaxdiff.demo", raising=False)
    import jaxdiff

    monkeypatch.delattr(jaxdiff, "demo", raising=False)
    assert cli.main(["demo"]) == 1
    assert 'sklearn.datasets is missing; install the extra: pip install "jaxdiff[demo]"' in (
        capsys.readouterr().err
    )


def run(*args, **kwargs):
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    return subprocess.run([*DEMO, *args], capture_output=True, text=True, env=env, **kwargs)


def test_the_demo_from_end_to_end(tmp_path):
    out = tmp_path / "out"
    first = run("--out", str(out), "--steps", "40", "--num", "60")
    assert first.returncode == 0, first.stderr
    assert "step/s" in first.stderr and "loss=" in first.stderr  # the bar
    assert "DPM++(2M), 20 steps" in first.stdout and "sliced W2" in first.stdout
    report = json.loads((out / "metrics.json").read_text())
    entries = {entry["name"]: entry for entry in report["entries"]}
    assert len(entries) == 9
    assert "bits/dim" in first.stdout and len(report["likelihoods"]) == 5
    bits = {entry["name"]: entry["bits_per_dim"] for entry in report["likelihoods"]}
    assert abs(bits["Hutchinson, 4 probes"] - bits["Hutchinson, 1 probe"]) < 0.2
    assert entries["memoriser, 20 steps"]["nearest"] < 0.3 < report["held_out_nearest"]
    assert all((out / name).stat().st_size > 5000 for name in ("samples.png", "trajectory.png"))
    fewer = run("--out", str(out), "--steps", "20")
    assert fewer.returncode == 1
    assert "steps must be at least the 40 steps already done, got 20" in fewer.stderr


@pytest.mark.slow
def test_a_second_demo_reuses_the_checkpoint(tmp_path):
    reports = []
    for quiet in ([], ["--quiet"]):
        done = run("--out", str(tmp_path), "--steps", "40", "--num", "60", *quiet)
        assert done.returncode == 0, done.stderr
        assert ("step/s" in done.stderr) == (not quiet)
        reports.append(json.loads((tmp_path / "metrics.json").read_text()))
    for old, new in zip(reports[0]["entries"], reports[1]["entries"], strict=True):
        assert old["energy"] == new["energy"]  # not trained again


@pytest.mark.slow
def test_ctrl_c_keeps_a_checkpoint(tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    args = [*DEMO, "--out", str(tmp_path), "--steps", "100000"]
    process = subprocess.Popen(args, stderr=subprocess.PIPE, env=env)
    os.set_blocking(process.stderr.fileno(), False)
    seen, deadline = b"", time.monotonic() + 120
    while b"loss=" not in seen and time.monotonic() < deadline:
        seen += process.stderr.read() or b""
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    os.set_blocking(process.stderr.fileno(), True)
    error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    assert "run the same command to go on" in error and "Traceback" not in error
    assert list((tmp_path / "checkpoint").glob("step_*"))
