import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.train import checkpoint, epochs, fit, init, make_step

KEY = jax.random.key(3)
OPTIMISER = optax.adam(1e-2)
ORDER = epochs(jax.random.key(4), 10, 3)
DATA = jax.random.normal(KEY, (10, 2))


def noisy(params, key, batch):
    """A loss that depends on the parameters, the key and the batch."""
    error = batch @ params["w"] - jax.random.normal(key, (3,))
    return jnp.mean(error**2), None


STEP = make_step(noisy, OPTIMISER)


def fresh():
    return init(KEY, {"w": jnp.ones(2), "low": jnp.ones(3, jnp.bfloat16)}, OPTIMISER)


def batch(n):
    return DATA[ORDER(n)]


def run(state, steps, step=STEP, batch=batch, **kwargs):
    return fit(state, step, batch, steps=steps, progress=False, **kwargs)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True)


def test_resuming_is_bitwise_an_uninterrupted_run(tmp_path):
    whole = run(fresh(), 20)
    assert whole.step == 20 and whole.params["w"][0] != 1
    run(fresh(), 7, path=tmp_path, save_every=5)
    assert checkpoint.latest(tmp_path) == 7
    assert_same(run(fresh(), 20, path=tmp_path, save_every=5), whole)
    assert_same(run(fresh(), 20, path=tmp_path), whole)  # nothing left to do
    assert_same(run(run(fresh(), 7), 20), whole)  # and without files


def test_interrupt_saves_the_last_finished_step(tmp_path):
    def interrupted(n):
        if n == 7:
            raise KeyboardInterrupt
        return batch(n)

    with pytest.raises(KeyboardInterrupt):
        run(fresh(), 20, batch=interrupted, path=tmp_path, save_every=5)
    assert checkpoint.latest(tmp_path) == 7
    assert_same(run(fresh(), 20, path=tmp_path), run(fresh(), 20))


def test_a_loss_that_is_not_finite_raises_and_is_not_saved(tmp_path):
    def broken(n):
        return batch(n) * (np.nan if n == 7 else 1.0)

    with pytest.raises(RuntimeError, match=r"the loss of step 7 is nan; .* are intact"):
        run(fresh(), 20, batch=broken, path=tmp_path, save_every=5)
    assert checkpoint.latest(tmp_path) == 5
    with pytest.raises(RuntimeError, match="step 7 is nan"):
        run(fresh(), 8, batch=broken)
    assert_same(checkpoint.restore(tmp_path, fresh()), run(fresh(), 5))


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    def cusp(params, key, batch):
        return jnp.sum(jnp.sqrt(jnp.abs(params["w"] - 1))), None  # finite, with infinite slope

    with pytest.raises(RuntimeError, match="fit: step 0 made params that are not finite"):
        run(fresh(), 1, step=make_step(cusp, OPTIMISER), path=tmp_path)
    assert checkpoint.latest(tmp_path) is None


def test_bar_shows_the_loss_and_is_optional(capsys, monkeypatch):
    fit(fresh(), STEP, batch, steps=3, description="toy")
    text = capsys.readouterr().err
    assert "toy: 100%" in text and "3/3" in text and "loss=" in text
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert fit(fresh(), STEP, batch, steps=3).step == 3
    assert capsys.readouterr().err == ""


def test_losses_are_fetched_now_and_then(monkeypatch):
    calls, device_get = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: calls.append(len(x)) or device_get(x))
    run(fresh(), 100)
    assert sum(calls) == 100 and len(calls) < 10


def test_errors():
    with pytest.raises(ValueError, match=r"fit: steps must be at least the 4 steps .*, got 3"):
        run(run(fresh(), 4), 3)
    with pytest.raises(ValueError, match="fit: save_every must be a whole number of at least 1"):
        run(fresh(), 4, save_every=0)
    with pytest.raises(ValueError, match="epochs: n must be a whole number of at least 5, got 4"):
        epochs(KEY, 4, 5)


def test_epochs_visit_each_example_once_also_under_jit():
    # 10 is not divisible by 3: three batches an epoch, one example left out.
    seen = jnp.stack([jax.jit(ORDER)(n) for n in range(6)])
    np.testing.assert_array_equal(seen, [ORDER(n) for n in range(6)])
    first, second = seen[:3].ravel().tolist(), seen[3:].ravel().tolist()
    assert len(set(first)) == len(set(second)) == 9 and first != second
    assert set(first) | set(second) <= set(range(10))


def test_a_path_that_cannot_be_written_is_told_before_training(tmp_path):
    (tmp_path / "file").write_text("")

    def never(n):
        raise AssertionError("a batch was asked for")

    with pytest.raises(checkpoint.CheckpointError, match="file/run cannot be written"):
        run(fresh(), 3, batch=never, path=tmp_path / "file" / "run")
