import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.train import CheckpointError, TrainState, checkpoint, init, latest, restore, save

OPTIMISER = optax.adam(1e-3)


def state(step=0, width=3):
    params = {
        "w": jax.random.normal(jax.random.key(step), (2, width), jnp.float32) / 3,
        "low": jnp.full(5, 1 / 3, jnp.bfloat16),
        "wide": jnp.asarray(np.pi, jnp.float64),
        "count": jnp.arange(4),
    }
    new = init(jax.random.key(step + 100), params, OPTIMISER)
    return new._replace(step=jnp.asarray(step, jnp.int32))


def raw(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.sharding == y.sharding
        assert raw(x).tobytes() == raw(y).tobytes()


def test_round_trip_is_bitwise(tmp_path):
    assert latest(tmp_path) is None
    directory = save(tmp_path, state(500))
    assert directory == tmp_path / "step_00000500" and latest(tmp_path) == 500
    assert_same(restore(tmp_path, state(0)), state(500))
    assert_same(restore(directory, state(0)), state(500))
    like = jax.eval_shape(state)
    assert_same(restore(tmp_path, like), state(500))


def test_sharding_is_that_of_like(tmp_path):
    save(tmp_path, state(1))
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(state(1), jax.NamedSharding(mesh, jax.P()))
    assert_same(restore(tmp_path, spread), spread)


def test_old_checkpoints_go_after_the_new_one_is_there(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, state(step), keep=2)
    names = [p.name for p in sorted(tmp_path.iterdir())]
    assert names == ["step_00000003", "step_00000004"]
    save(tmp_path, state(4)._replace(key=jax.random.key(9)), keep=2)  # the same step again
    assert [p.name for p in sorted(tmp_path.iterdir())] == names
    assert restore(tmp_path, state()).key == jax.random.key(9)
    save(tmp_path, state(2), keep=1)  # an earlier step removes nothing after it
    assert latest(tmp_path) == 4 and (tmp_path / "step_00000002").exists()


def largest(directory):
    files = [p for p in (directory / "state").rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def edit(directory, **changes):
    file = directory / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGE = {
    "truncated": (lambda d: os.truncate(largest(d), 10), "is corrupt .10 bytes"),
    "flipped": (lambda d: flip(largest(d)), "is corrupt"),
    "lost": (lambda d: largest(d).unlink(), "is missing"),
    "added": (lambda d: (d / "state" / "more").touch(), "more is not in the manifest"),
    "no_arrays": (lambda d: shutil.rmtree(d / "state"), "is missing"),
    "no_manifest": (lambda d: (d / "manifest.json").unlink(), "manifest.json is missing"),
    "cut_manifest": (lambda d: os.truncate(d / "manifest.json", 40), "manifest.json is unreadable"),
    "odd_manifest": (lambda d: (d / "manifest.json").write_text("[]"), "is unreadable"),
    "other_step": (lambda d: edit(d, step=9), "holds step 9"),
    "later_format": (lambda d: edit(d, format=99), "has format 99"),
}


@pytest.mark.parametrize("damage,message", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_one_error_that_names_the_directory(tmp_path, damage, message):
    save(tmp_path, state(1))
    directory = save(tmp_path, state(2))
    damage(directory)
    with pytest.raises(CheckpointError, match=message) as caught:
        restore(tmp_path, state())
    text = str(caught.value)
    assert str(directory) in text and "\n" not in text
    assert "delete that directory" in text or "another path" in text
    shutil.rmtree(directory)  # what the message says
    assert_same(restore(tmp_path, state()), state(1))


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"restore: no checkpoint in .*nowhere"):
        restore(tmp_path / "nowhere", state())
    save(tmp_path, state(1))
    with pytest.raises(CheckpointError, match=r"'w'\] is float32\[2,3\] there and float32\[2,4\]"):
        restore(tmp_path, state(width=4))
    like = state()
    like.params["count"] = like.params["count"].astype(jnp.int32)
    with pytest.raises(CheckpointError, match=r"'count'\] is int64\[4\] there and int32\[4\] here"):
        restore(tmp_path, like)
    like.params["count"] = state().params["count"]
    like.params["more"] = jnp.zeros(1)
    with pytest.raises(CheckpointError, match=r"'more'\] is no such leaf there"):
        restore(tmp_path, like)


def test_errors_of_save(tmp_path):
    with pytest.raises(ValueError, match="save: keep must be a whole number of at least 1, got 0"):
        save(tmp_path, state(), keep=0)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"save: .*file.* could not be written"):
        save(tmp_path / "file", state())


class Killed(BaseException):
    """The process ends here, with nothing of what follows."""


@pytest.mark.parametrize("again", [False, True], ids=["next_step", "same_step"])
def test_stopped_at_any_stage_the_earlier_checkpoint_is_there(tmp_path, monkeypatch, again):
    """The twin of the test with real kills: every stage of a save, in one process."""
    first, second = state(3), state(3 if again else 4)._replace(key=jax.random.key(5))
    for stage in range(1000):
        shutil.rmtree(tmp_path)
        save(tmp_path, first, keep=1)
        calls = 0

        def stop(done, target, *args, stage=stage, **kwargs):
            nonlocal calls
            calls += not os.path.isfile(target)  # one stage for all the files of the arrays
            if calls > stage:
                raise Killed
            return done(target, *args, **kwargs)

        with monkeypatch.context() as patch:
            for owner, name in ((checkpoint, "_sync"), (os, "replace"), (shutil, "rmtree")):
                done = getattr(owner, name)
                patch.setattr(owner, name, functools.partial(stop, done))
            try:
                save(tmp_path, second, keep=1)
                break
            except Killed:
                pass
        found = restore(tmp_path, state())
        assert_same(found, second if found.key == second.key else first)
        save(tmp_path, second, keep=1)
        assert_same(restore(tmp_path, state()), second)
        assert [p.name for p in tmp_path.iterdir()] == [f"step_{int(second.step):08d}"]
    assert stage > 5


CHILD = """
import sys
import jax, jax.numpy as jnp
from jaxdiff.train import TrainState, save
for step in range(1, 100_000):
    big = jnp.full((300_000,), step, jnp.float32)
    one = jnp.asarray(step, jnp.int32)
    save(sys.argv[1], TrainState(one, {"w": big, "v": one}, big, (), jax.random.key(step)))
    print(step, flush=True)
"""


def kill_while_saving(path, delay):
    """Kill a process `delay` seconds after its third save; return the last save it reported."""
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", CHILD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as child:
        assert child.stdout is not None
        for _ in range(3):
            reported = int(child.stdout.readline())
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read().split("\n")[:-1]
    assert child.returncode == -signal.SIGKILL
    return int(rest[-1]) if rest else reported


def check_after_kill(path, reported):
    big, one = jnp.zeros(300_000, jnp.float32), jnp.asarray(0, jnp.int32)
    like = TrainState(one, {"w": big, "v": one}, big, (), jax.random.key(0))
    found = restore(path, like)
    step = int(found.step)
    assert step == latest(path) and step in (reported, reported + 1)
    assert np.all(found.params["w"] == step) and np.all(found.ema == step)
    assert found.key == jax.random.key(step)
    save(path, like._replace(step=jnp.asarray(step + 1, jnp.int32)))
    assert not list(path.glob(".tmp_*"))


def test_sigkill_while_saving(tmp_path):
    check_after_kill(tmp_path, kill_while_saving(tmp_path, 0.05))


@pytest.mark.slow
def test_sigkill_at_many_moments(tmp_path):
    for i, delay in enumerate(np.random.default_rng(0).uniform(0, 0.1, 8)):
        check_after_kill(tmp_path / str(i), kill_while_saving(tmp_path / str(i), delay))
