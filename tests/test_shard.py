"""Sampling over devices, processes and files: most of it in processes that have several devices."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd

ROOT = Path(__file__).parents[1]
VP, KEY = jd.process.VP(), jax.random.key(0)
MIX = jd.exact.mixture(VP, [0.5, 0.5], [[-1.0, 0.0], [1.0, 0.5]], 0.04)
TS = VP.grid(10, "logsnr")


def prepared(model=MIX, solver=None, ts=TS, **options):
    solver = solver or jd.solvers.DDIM(eta=1.0)
    return jd.sampler(model, (2,), solver=solver, ts=ts, **options)


def environment(devices=1):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def test_on_eight_devices():
    """All of `sharded.py`, whose own output says what failed."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider"]
    command.append(str(ROOT / "tests" / "sharded.py"))
    run = subprocess.run(command, env=environment(8), capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-6000:]


def launch(mode, folder):
    script = [str(ROOT / "tests" / "multiprocess.py"), mode, str(folder)]
    options = ["--processes", "2", "--devices", "2"]
    command = [sys.executable, str(ROOT / "benchmarks" / "launch.py"), *options, *script]
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=200, cwd=ROOT
    )


def test_two_processes_of_two_devices_make_the_same_samples(tmp_path, defaults):
    run = launch("made", tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    made = np.load(tmp_path / "made.npz")
    want = jd.sample(KEY, prepared(), num=16).x
    np.testing.assert_allclose(made["x"], want, rtol=1e-6, atol=1e-6)
    data = np.random.default_rng(0).normal(size=(101, 2)).astype(np.float32)
    fast = jd.solvers.DPMpp2M()
    want = jd.sample(KEY, prepared(jd.exact.empirical(VP, data), fast), num=4).x
    np.testing.assert_allclose(made["memoriser"], want, rtol=1e-5, atol=1e-5)
    want = jd.sample(KEY, prepared(MIX, fast), num=4).x
    assert len(list((tmp_path / "files").glob("*.npz"))) == 2  # one of each process
    np.testing.assert_allclose(jd.read(tmp_path / "files").x, want, rtol=1e-6, atol=1e-6)


def test_a_killed_process_ends_the_others(tmp_path):
    """Within `launch.GRACE`, which is 10 seconds, of its death."""
    run = launch("killed", tmp_path)
    assert time.time() - (tmp_path / "killed").stat().st_mtime < 10
    assert run.returncode == signal.SIGKILL
    assert "launch: process 1 of 2 was killed by SIGKILL; stopping the others" in run.stderr
    assert not (tmp_path / "made.npz").exists()


# --- Files. ---

TASK = dict(num=50, per_file=16, progress=False)


def files_of(folder):
    return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def test_files_hold_the_samples_and_are_made_once(tmp_path, capsys):
    task, cond = TASK | dict(progress=True), np.arange(50.0)
    net = jd.Denoiser(VP, lambda t, x, cond: jnp.tanh(x + cond), "x0")
    sampler = prepared(net, trajectory=True)
    jd.sample_to(tmp_path, KEY, sampler, cond=cond, **task)
    assert "4/4" in capsys.readouterr().err  # the bar
    got = jd.check(jd.read(tmp_path))
    want = jd.sample(KEY, sampler, num=50, cond=cond, chunk=16)
    for name in ("x", "nfe", "aux"):
        jax.tree.map(np.testing.assert_array_equal, getattr(got, name), getattr(want, name))
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    jd.sample_to(tmp_path, KEY, sampler, cond=cond, **task)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before


def test_missing_and_damaged_files_are_named_and_made_again(tmp_path):
    jd.sample_to(tmp_path, KEY, prepared(), **TASK)
    whole = files_of(tmp_path)
    (tmp_path / "000000.npz").write_bytes(whole["000000.npz"][:-100])
    (tmp_path / "000001.npz").write_bytes(b"")
    spoiled = bytearray(whole["000002.npz"])
    spoiled[len(spoiled) // 2] ^= 1
    (tmp_path / "000002.npz").write_bytes(spoiled)
    (tmp_path / "000003.npz").unlink()
    with pytest.raises(ValueError, match=r"path must be complete.*000000.npz.*2.npz.*000003.npz"):
        jd.read(tmp_path)
    with pytest.warns(UserWarning) as said:
        jd.sample_to(tmp_path, KEY, prepared(), **TASK)
    assert [f"00000{k}.npz is damaged and is made again" in str(w.message)
            for k, w in enumerate(said)] == [True] * 3  # fmt: skip
    assert files_of(tmp_path) == whole


def test_a_folder_of_other_settings_is_refused(tmp_path):
    jd.sample_to(tmp_path / "a", KEY, prepared(), **TASK)
    whole, other = files_of(tmp_path / "a"), jd.exact.gaussian(VP, jnp.zeros(2), 1.0)
    changes = {
        "num 60, was 50": (KEY, prepared(), dict(num=60)),
        r"solve .*DDIM\(.*was": (KEY, prepared(solver=jd.solvers.DDIM()), {}),
        "digest .* was": (KEY, prepared(other), {}),
        "digest '.*', was": (jax.random.key(1), prepared(), {}),
        "digest '[0-9a-f]*', was": (KEY, prepared(ts=VP.grid(10)), {}),
    }
    for said, (key, sampler, change) in changes.items():
        with pytest.raises(ValueError, match=f"path must be empty, or a folder .*{said}"):
            jd.sample_to(tmp_path / "a", key, sampler, **TASK | change)
    assert files_of(tmp_path / "a") == whole
    (tmp_path / "c").mkdir()  # in which another process is writing the settings just now
    (tmp_path / "c" / ".settings.json.1.part").write_text("{")
    jd.sample_to(tmp_path / "c", KEY, prepared(), **TASK)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="path must be empty, or a folder of this function"):
        jd.sample_to(tmp_path / "b", KEY, prepared(), **TASK)
    with pytest.raises(ValueError, match="path must be a folder of sample_to"):
        jd.read(tmp_path / "b")


JOB = """
import sys, jax, jaxdiff as jd
vp = jd.process.VP()
mixture = jd.exact.mixture(vp, [0.5, 0.5], [[-1.0, 0.0], [1.0, 0.5]], 0.04)
solver, ts = jd.solvers.DDIM(eta=1.0), vp.grid(10, "logsnr")
sampler = jd.sampler(mixture, (2,), solver=solver, ts=ts)
print("ready", flush=True)
jd.sample_to(sys.argv[1], jax.random.key(0), sampler, num=80_000, per_file=40, progress=False)
"""


@pytest.mark.slow
def test_ten_kills_leave_no_trace(tmp_path):
    def start(folder):
        command = [sys.executable, "-c", JOB, str(tmp_path / folder)]
        job = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE)
        with job.stdout as said:
            assert said.readline() == b"ready\n"
        return job

    assert start("whole").wait() == 0
    rng, made = random.Random(0), [0]
    count = lambda: len(list((tmp_path / "killed").glob("0*.npz")))  # noqa: E731
    for k in range(10):
        job = start("killed")
        while k % 5 and count() == made[-1] and job.poll() is None:  # else before it makes any
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.2))
        job.kill()
        assert job.wait() == -signal.SIGKILL
        made.append(count())
    assert made == sorted(made) and 8 <= made[-1] < 2000, made  # it went on, and was cut short
    assert start("killed").wait() == 0
    left = files_of(tmp_path / "killed")
    parts = [name for name in left if name.endswith(".part")]
    assert {name: left[name] for name in left if name not in parts} == files_of(tmp_path / "whole")
    assert json.loads(left["settings.json"])["num"] == 80_000
