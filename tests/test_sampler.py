"""`sampler` and `check`: options, steps by hand, gradients, hooks, failures and errors."""

import functools
import re

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from helpers import PROCESSES, each, mlp

import jaxdiff as jd
from jaxdiff.process import AbstractProcess
from jaxdiff.score import AbstractDenoiser
from jaxdiff.solvers import BELM, DDIM, Between, DPMpp2M, EulerMaruyama, Heun, Langevin
from jaxdiff.solvers.reversible import VelocityLeapfrog

LAW = oracles.GaussianMixture.random(3, 3, 2)
VP = PROCESSES["VP"]
MIX = jd.exact.mixture(VP, LAW.weights, LAW.means, LAW.covs)
TS = VP.grid(8)
KEY = jax.random.key(11)


def prepared(solver, model=MIX, ts=TS, **kwargs):
    return jd.sampler(model, (2,), solver=solver, ts=ts, **kwargs)


def test_the_start_is_the_prior_and_each_step_has_its_own_noise():
    """The start is of fold_in(key_i, 0), that of step k of fold_in(fold_in(key_i, 1), 16k)."""
    nothing = jd.Denoiser(VP, lambda t, x, cond: jnp.zeros_like(x))
    out = prepared(EulerMaruyama("u"), nothing, trajectory=True)(KEY)
    path = np.asarray(out.aux["trajectory"])
    sigma = np.asarray(jax.vmap(VP.sigma)(TS))
    first = jax.random.normal(jax.random.fold_in(KEY, 0), (2,), float)
    np.testing.assert_allclose(path[0], sigma[0] * first, rtol=1e-14)
    row = EulerMaruyama("u").tabulate(VP, TS).rows
    noise = jax.random.fold_in(KEY, 1)
    for k in range(8):
        z = jax.random.normal(jax.random.fold_in(noise, 16 * k), (2,), float)
        expected = row.decay[k] * path[k] + row.noise[0][k] * z
        np.testing.assert_allclose(path[k + 1], expected, rtol=1e-12)


# --- Options. ---


def test_init_replaces_the_prior_and_no_key_is_needed():
    init, run = np.random.default_rng(0).normal(size=(3, 2)), prepared(DPMpp2M())
    whole = jd.sample(None, run, num=3, init=init, chunk=2)
    np.testing.assert_allclose(whole.x[2], run(None, init=init[2]).x, rtol=1e-12)
    assert not np.allclose(whole.x[0], whole.x[1])


def test_denoise_and_trajectory():
    plain = prepared(DDIM())(None, init=np.ones(2))
    seen = prepared(DDIM(), trajectory=True, denoise=True)(None, init=np.ones(2))
    path, ts = seen.aux["trajectory"], seen.aux["ts"]
    assert plain.aux == {} and path.shape == (10, 2) and ts.shape == (10,)
    np.testing.assert_array_equal(ts[:9], TS)
    np.testing.assert_array_equal(path[0], np.ones(2))
    np.testing.assert_allclose(path[8], plain.x, rtol=1e-13)
    np.testing.assert_array_equal(path[9], seen.x)
    alpha, sigma = float(VP.alpha(TS[-1])), float(VP.sigma(TS[-1]))
    np.testing.assert_allclose(seen.x, LAW.posterior_mean(plain.x, alpha, sigma), rtol=1e-10)
    assert int(plain.nfe) == 8 and int(seen.nfe) == 9


def test_a_trajectory_of_a_diffrax_solver_is_in_x():
    """Euler in clock r is DDIM, at every node and not only at the end."""
    ours, theirs = (
        prepared(solver, trajectory=True)(None, init=np.ones(2)).aux
        for solver in (DDIM(), dfx.Euler())
    )
    np.testing.assert_array_equal(ours["ts"], theirs["ts"])
    np.testing.assert_allclose(ours["trajectory"], theirs["trajectory"], rtol=1e-11)


def test_to_clean_data_is_a_denoising_step():
    path = PROCESSES["Rectified"]
    denoiser = jd.exact.mixture(path, LAW.weights, LAW.means, LAW.covs)
    whole, most = (
        prepared(DDIM(), denoiser, ts, trajectory=True)(None, init=np.ones(2))
        for ts in (np.linspace(1, 0, 6), np.linspace(1, 0.2, 5))
    )
    np.testing.assert_allclose(whole.x, LAW.posterior_mean(most.x, 0.8, 0.2), rtol=1e-10)
    assert int(whole.nfe) == 5 and whole.aux["ts"][-1] == 0
    assert whole.aux["trajectory"].shape == (6, 2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_of_everything(dtype):
    out = jd.sample(KEY, prepared(DDIM(eta=0.5), dtype=dtype, trajectory=True), num=2)
    assert {out.x.dtype, out.aux["trajectory"].dtype, out.aux["ts"].dtype} == {np.dtype(dtype)}
    assert jnp.issubdtype(out.nfe.dtype, jnp.integer)


def test_an_adaptive_solve_meets_its_tolerance():
    init, ts = np.array([[0.4, -0.7], [-1.5, 0.2]]), np.array([0.9, 0.5, 0.05])

    def call(solver, tolerance, **kwargs):
        control = dfx.PIDController(tolerance, tolerance)
        run = prepared(solver, ts=ts, controller=control, **kwargs)
        return jd.check(jd.sample(None, run, num=2, init=init))

    loose, tight = call(dfx.Tsit5(), 1e-5, trajectory=True), call(dfx.Dopri8(), 1e-12)
    error = np.abs(loose.x - tight.x).max()
    assert 1e-9 < error < 1e-3
    path = loose.aux["trajectory"]
    assert path.shape == (2, 3, 2)
    np.testing.assert_allclose(path[:, 0], init, rtol=1e-12)
    np.testing.assert_allclose(path[:, -1], loose.x, rtol=1e-12)
    assert np.all(loose.nfe > 10) and np.all((loose.nfe - 1) % 6 == 0)


# --- Steps by hand. ---

LANGEVIN = Between(DPMpp2M(), Langevin())
STEPPED = {
    "DDIM": (DDIM(), {}),
    "DDIM, denoise": (DDIM(), {"denoise": True}),
    "DDIM(eta=1)": (DDIM(eta=1.0), {}),
    "DPMpp2M": (DPMpp2M(), {}),
    "Heun": (dfx.Heun(), {}),
    "Tsit5": (dfx.Tsit5(), {"denoise": True}),  # whose first stage is the last of the step before
    "ShARK": (dfx.ShARK(), {}),
    "BELM": (BELM(), {}),
    "Langevin": (LANGEVIN, {}),
    "Langevin, denoise": (LANGEVIN, {"denoise": True}),
}


@each(STEPPED)
def test_init_step_finish_are_a_call(case):
    run = prepared(case[0], trajectory=True, **case[1])
    whole, path = run(KEY), []
    state = run.init(KEY)
    for n in range(run.steps):
        path.append(run.x(n, state))
        state = run.step(n, KEY, state)
    path.append(run.x(run.steps, state))
    end, full = run.finish(KEY, state), whole.aux["trajectory"]
    assert run.steps == len(TS) - 1
    np.testing.assert_array_equal(path[0], full[0])
    np.testing.assert_allclose(path, full[: len(path)], rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(end.x, whole.x, rtol=1e-11, atol=1e-13)
    assert end.nfe == whole.nfe and end.result == whole.result


def test_a_step_takes_a_traced_number_and_its_condition():
    run = prepared(DDIM(), mlp(dtype=np.float64, width=4))
    state, cond = run.init(KEY), jnp.array([0.3, -0.2])
    body = lambda n, state: run.step(n, KEY, state, cond)  # noqa: E731
    end = run.finish(KEY, jax.lax.fori_loop(0, run.steps, body, state), cond)
    np.testing.assert_allclose(end.x, run(KEY, cond).x, rtol=1e-12)
    assert not np.any(end.x == run(KEY, 0 * cond).x)


@each({"DDIM": DDIM(), "Heun": dfx.Heun(), "Tsit5": dfx.Tsit5(), "ShARK": dfx.ShARK()})
def test_what_is_put_in_comes_out_and_is_where_the_steps_go_on(case):
    """Against a shorter grid that starts there; for ShARK without the noise, which a grid keys."""
    run, x = prepared(case), np.array([0.8, -0.3])
    state = run.init(KEY)
    for n in range(3):
        state = run.step(n, KEY, state)
    np.testing.assert_allclose(run.x(3, run.replace(3, state, run.x(3, state))), run.x(3, state))
    state = run.replace(3, state, x)
    np.testing.assert_allclose(run.x(3, state), x, rtol=1e-13)
    if isinstance(case, dfx.ShARK):
        return
    for n in range(3, run.steps):
        state = run.step(n, KEY, state)
    fresh = prepared(case, ts=TS[3:])(None, init=x)
    np.testing.assert_allclose(run.finish(KEY, state).x, fresh.x, rtol=1e-11)


def test_what_cannot_be_stepped_says_so(as_users_see_it):
    run, belm = prepared(DDIM(eta=1.0)), prepared(BELM())
    adaptive = prepared(dfx.Tsit5(), controller=dfx.PIDController(1e-3, 1e-3))
    state, pair = run.init(KEY), belm.init(KEY)
    alone = "controller must be left out: .* no step n"
    cases = [
        (lambda: adaptive.steps, f"sampler.steps: {alone}"),
        (lambda: adaptive.init(KEY), f"sampler.init: {alone}"),
        (lambda: adaptive.step(0, KEY, state), f"sampler.step: {alone}"),
        (lambda: jax.jit(adaptive.step)(0, KEY, state), f"sampler.step: {alone}"),
        (lambda: run.step(8, KEY, state), "sampler.step: n must be from 0 to 7, got 8"),
        (lambda: run.step(-1, KEY, state), "sampler.step: n must be from 0 to 7, got -1"),
        (lambda: run.step(0, None, state), "sampler.step: key must be a key .* got NoneType"),
        (lambda: run.finish(None, state), "sampler.finish: key must be a key .* got NoneType"),
        (lambda: run.init(KEY, init=np.ones(3)), r"sampler.init: init must be .* got shape \(3,\)"),
        (
            lambda: run.replace(0, state, 1.0),
            r"sampler.replace: x must be of shape .* got shape \(\)",
        ),
        (lambda: belm.replace(0, pair, np.ones(2)), "replace: sampler must be .* half of the pair"),
        (lambda: belm.init(KEY, init=belm.invert(np.ones(2))), "sampler.init: init must be an arr"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert len(str(error.value).splitlines()) == 1


# --- Hooks. ---

FLOW = PROCESSES["Rectified"]
FLOW_MIX = jd.exact.mixture(FLOW, [0.5, 0.5], [[-1.0, 0.0], [1.0, 0.5]], 0.04)


class Times(eqx.Module):
    """Replace the sample by the two times of the step, so that a trajectory records the calls."""

    last: bool = eqx.field(static=True, default=True)

    def __call__(self, model, times, x0, x1, key, cond):
        return jnp.stack(times)


@each({"DDIM": DDIM(), "DPMpp2M": DPMpp2M(), "Heun": dfx.Heun(), "noisy": DDIM(eta=0.5)})
def test_a_hook_is_called_on_every_step_with_its_times(case):
    for model, ts, kwargs in (
        (MIX, TS, {}),
        (MIX, TS, {"denoise": True}),  # with a step from the last time to itself
        (FLOW_MIX, np.linspace(0.9, 0, 5), {}),  # with the step to sigma = 0
    ):
        seen, skipped = (
            prepared(Between(case, Times(last)), model, ts, trajectory=True, **kwargs)(KEY)
            for last in (True, False)
        )
        nodes = np.append(ts, ts[-1:]) if kwargs else ts
        pairs = np.stack([nodes[:-1], nodes[1:]], axis=1)
        np.testing.assert_allclose(seen.aux["trajectory"][1:], pairs, rtol=1e-12)
        np.testing.assert_allclose(seen.x, pairs[-1], rtol=1e-12)
        np.testing.assert_allclose(skipped.aux["trajectory"][1:-1], pairs[:-1], rtol=1e-12)
        assert np.abs(skipped.x - pairs[-1]).max() > 1e-3
        if kwargs or ts[-1] == 0:  # what the solver makes of the times before
            clean = model(nodes[-2], skipped.aux["trajectory"][-2])
            np.testing.assert_allclose(skipped.x, clean, rtol=1e-10)


class Normal(eqx.Module):
    """Put a normal in a coordinate."""

    i: int = eqx.field(static=True)
    stochastic = True
    evaluations = 3

    def __call__(self, model, times, x0, x1, key, cond):
        return x1.at[self.i].set(jax.random.normal(key, ()))


def test_nested_hooks_go_outwards_with_keys_of_their_own():
    twice = Between(Between(DDIM(), Normal(0)), Normal(1))
    out = prepared(twice, trajectory=True)(KEY)
    normals = out.aux["trajectory"][1:]
    assert np.unique(normals).size == 16  # 8 steps, 2 hooks
    once = prepared(Between(DDIM(), Normal(0)), trajectory=True)(KEY).aux["trajectory"]
    np.testing.assert_array_equal(once[1:, 0], normals[:, 0])  # the outer changes nothing inside
    covered = prepared(Between(Between(DDIM(), Normal(0)), Normal(0)), trajectory=True)(KEY)
    np.testing.assert_array_equal(covered.aux["trajectory"][1:, 0], normals[:, 1])
    assert int(out.nfe) == 8 + 8 * 3 * 2
    with pytest.raises(ValueError, match="key must be a key"):
        prepared(Between(DDIM(), Normal(0)))(None, init=np.ones(2))


def same(model, times, x0, x1, key, cond):
    return x1


def test_a_hook_that_does_nothing_changes_nothing():
    for solver in (DDIM(), DPMpp2M(), dfx.Tsit5(), DDIM(eta=1.0)):
        plain = prepared(solver, trajectory=True)(KEY)
        hooked = prepared(Between(solver, same), trajectory=True)(KEY)
        if isinstance(solver, dfx.Tsit5):  # which evaluates anew after what may be a jump
            close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)
        else:
            close = np.testing.assert_array_equal
        close(hooked.aux["trajectory"], plain.aux["trajectory"])
        close(hooked.x, plain.x)


def test_a_jump_under_a_solver_that_keeps_its_last_stage():
    """Each step of Tsit5 starts afresh from what the hook has put in."""

    def half(model, times, x0, x1, key, cond):
        return x1 / 2 - 0.1 * cond * x0

    x, cond = np.array([0.8, -0.3]), 0.7
    whole = prepared(Between(dfx.Tsit5(), half))(None, cond, init=x)
    for n in range(8):
        x1 = prepared(dfx.Tsit5(), ts=TS[n : n + 2])(None, cond, init=x).x
        x = half(None, None, x, x1, None, cond)
    np.testing.assert_allclose(whole.x, x, rtol=1e-11)


def test_a_hook_sees_the_model_of_the_sampler():
    """As parameters that are arguments: another network needs no other program."""
    score = lambda model, times, x0, x1, key, cond: model.score(times[1], x1, cond)  # noqa: E731
    net, other = (mlp(seed, np.float64, width=4) for seed in (0, 1))
    run = prepared(Between(DDIM(), score), net, ts=TS[:2])
    for model in (net, other):
        x1 = prepared(DDIM(), model, ts=TS[:2])(KEY).x
        np.testing.assert_allclose(run.with_model(model)(KEY).x, model.score(TS[1], x1))


def test_hooks_fit_no_pair_and_no_controller(as_users_see_it):
    for solver, kwargs in (
        (BELM(), {}),
        (dfx.Tsit5(), {"controller": dfx.PIDController(1e-3, 1e-3)}),
        (DDIM(), {"engine": "diffrax"}),
    ):
        with pytest.raises(ValueError, match=r"sampler: solver \(Between\) must be left out: no "):
            prepared(Between(solver, same), **kwargs)


# --- Transformations. ---


def test_preparing_under_jit_vmap_and_grad():
    """Slopes in the start, the parameters of the network and of the process, by differences."""
    net = mlp(dtype=np.float64, width=4)

    def end(init, net, beta):
        path = jd.process.VP(beta_max=beta)
        denoiser = eqx.tree_at(lambda d: d.process, net, path)
        return jnp.sum(prepared(DPMpp2M(), denoiser)(None, init=init).x ** 2)

    init = jnp.array([0.4, -0.7])
    value_and_slopes = eqx.filter_jit(jax.value_and_grad(end, argnums=(0, 1, 2), allow_int=True))
    value, (by_init, by_net, by_beta) = value_and_slopes(init, net, 20.0)
    plain = eqx.filter_jit(end)
    np.testing.assert_allclose(value, plain(init, net, jnp.asarray(20.0)), rtol=1e-12)
    step = 1e-5

    def difference(init_step=0.0, net_step=0.0, beta_step=0.0):
        moved = [
            plain(
                init + sign * init_step,
                eqx.tree_at(lambda d: d.net.w1, net, net.net.w1 + sign * net_step),
                jnp.asarray(20.0 + sign * beta_step),
            )
            for sign in (1, -1)
        ]
        return (moved[0] - moved[1]) / (2 * step)

    direction = np.random.default_rng(1).normal(size=net.net.w1.shape)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9)
    close(by_init[0], difference(init_step=step * np.array([1.0, 0.0])))
    close((by_net.net.w1 * direction).sum(), difference(net_step=step * direction))
    close(by_beta, difference(beta_step=step))
    assert abs(by_beta) > 1e-6
    batch = jax.vmap(plain, in_axes=(0, None, None))(jnp.stack([init, 2 * init]), net, 20.0)
    close(batch[0], value, rtol=1e-12)


@pytest.mark.optimised
def test_a_gradient_keeps_states_and_not_networks():
    """Reverse-mode memory per step is a few states, not the hidden layers of the network."""
    width, d = 512, 2
    net = mlp(width=width, d=d)

    def temporary(n):
        ts = np.asarray(VP.grid(n))

        def loss(init, net):
            run = jd.sampler(net, (d,), solver=DDIM(), ts=ts, dtype=np.float32)
            return jnp.sum(run(None, init=init).x)

        program = jax.jit(jax.grad(loss)).lower(jnp.ones(d, np.float32), net).compile()
        return program.memory_analysis().temp_size_in_bytes

    per_step = (temporary(120) - temporary(20)) / 100
    assert per_step < width * 4, per_step  # one hidden layer in float32


def test_coefficients_of_a_prepared_process_have_a_slope_inside_only():
    """By the table of a discrete process and by a parameter of VP, against differences."""
    init = jnp.array([0.4, -0.7])

    def discrete(betas):
        return jd.process.Discrete(betas), [19, 12, 5, 0]

    def continuous(beta):
        return jd.process.VP(beta_max=beta), TS

    for make, value in ((discrete, jnp.linspace(0.01, 0.3, 20)), (continuous, jnp.asarray(20.0))):

        def end(value, make=make):
            path, ts = make(value)
            model = jd.exact.mixture(path, LAW.weights, LAW.means, LAW.covs)
            return jnp.sum(prepared(DPMpp2M(), model, ts)(None, init=init).x ** 2)

        slope, step = jax.grad(end)(value), 1e-6 * jnp.ones_like(value)
        difference = (end(value + step) - end(value - step)) / 2e-6
        np.testing.assert_allclose(jnp.sum(slope), difference, rtol=1e-6)
        assert abs(difference) > 1e-4
        path, ts = make(value)
        run = prepared(DPMpp2M(), eqx.tree_at(lambda m: m.process, MIX, path), ts)
        calls = (
            lambda run: run(None, init=init).x,
            lambda run: jd.sample(None, run, num=2, init=jnp.stack([init, init])).x,
            lambda run: run.step(0, None, run.init(None, init=init)).y,
        )
        for call in calls:
            for wrap in (lambda f: f, jax.jit):

                @wrap
                def late(path, run=run, call=call):
                    return jnp.sum(call(eqx.tree_at(lambda run: run.model.process, run, path)))

                with pytest.raises(ValueError, match=r"process of a prepared .* prepare inside"):
                    eqx.filter_grad(late)(jax.tree.map(jnp.asarray, path))


def test_a_slope_by_the_network_is_that_of_ddim_by_hand():
    net, init = mlp(dtype=np.float64, width=4), jnp.array([0.4, -0.7])
    run = prepared(DDIM(), net)
    scales = [(float(VP.alpha(t)), float(VP.sigma(t))) for t in TS]

    def by_hand(mlp):
        x = init
        for t, (a0, s0), (a1, s1) in zip(TS, scales, scales[1:], strict=False):
            m = mlp(jnp.asarray(t), x)
            x = a1 * m + s1 * (x - a0 * m) / s0
        return jnp.sum(x**2)

    def by_sampler(mlp):
        model = eqx.tree_at(lambda model: model.net, net, mlp)
        return jnp.sum(run.with_model(model)(None, init=init).x ** 2)

    wanted = eqx.filter_value_and_grad(by_hand)(net.net)
    got = eqx.filter_value_and_grad(by_sampler)(net.net)
    jitted = eqx.filter_jit(eqx.filter_value_and_grad(by_sampler))(net.net)
    for value in (got, jitted):
        for a, b in zip(jax.tree.leaves(value), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_another_model_is_of_the_same_process(as_users_see_it):
    run = prepared(DDIM(), mlp())
    for path in (jd.process.VP(beta_max=19.0), jd.process.EDM()):
        with pytest.raises(
            ValueError, match=f"^with_model: model must be .* {re.escape(repr(path))}$"
        ):
            run.with_model(eqx.tree_at(lambda model: model.process, mlp(1), path))
    with pytest.raises(ValueError, match="with_model: model must be of the process"):
        traced = lambda model: run.with_model(model)(KEY).x  # noqa: E731
        eqx.filter_jit(traced)(jax.tree.map(jnp.asarray, mlp(1)))


EVALUATIONS = {
    "DDIM": (DDIM(), {}, 8),
    "Heun": (Heun(), {}, 16),
    "denoise": (DDIM(eta=0.5), {"denoise": True}, 9),
    "Tsit5": (dfx.Tsit5(), {}, 49),
    "SEA": (dfx.SEA(), {}, 8),
    "ShARK": (dfx.ShARK(), {}, 16),
    "adaptive": (dfx.Bosh3(), {"controller": dfx.PIDController(1e-3, 1e-3)}, None),
}


@each(EVALUATIONS)
def test_nfe_is_the_number_of_evaluations(case):
    solver, kwargs, expected = case
    count = []

    def net(t, x, cond):
        jax.debug.callback(lambda: count.append(1))
        return jnp.tanh(x)

    out = prepared(solver, jd.Denoiser(VP, net), **kwargs)(KEY)
    jax.block_until_ready(out.x)
    jax.effects_barrier()
    assert int(out.nfe) == len(count)
    assert expected is None or len(count) == expected


# --- Failures. ---


def breaks_above(limit):
    return jd.Denoiser(VP, lambda t, x, cond: jnp.where(cond > limit, jnp.nan, 0.0) * x)


def test_a_broken_network_spoils_its_own_sample_only():
    cond = np.array([0.0, 5.0, 0.0, 7.0])
    run = prepared(DDIM(), breaks_above(1.0))
    out = jd.sample(KEY, run, num=4, cond=cond)
    np.testing.assert_array_equal(np.isnan(out.x).all(1), cond > 1)
    np.testing.assert_array_equal(np.isnan(out.x).any(1), cond > 1)
    np.testing.assert_array_equal(out.result != dfx.RESULTS.successful, cond > 1)
    with pytest.raises(RuntimeError, match=r"2 of 4 samples failed, first at index 1: .*2 samples"):
        jd.check(out)
    good = jd.sample(KEY, run, num=4, cond=np.zeros(4))
    np.testing.assert_array_equal(good.x[::2], out.x[::2])
    assert jd.check(good) is good


def test_too_few_steps_is_a_failure_of_its_sample():
    control = dfx.PIDController(1e-9, 1e-9)
    run = prepared(dfx.Tsit5(), ts=np.array([0.9, 0.01]), controller=control, max_steps=5)
    out = jd.sample(KEY, run, num=3)
    assert np.isnan(out.x).all()
    with pytest.raises(RuntimeError, match=r"3 of 3 samples failed, first at index 0: .*max"):
        jd.check(out)
    one = jax.tree.map(lambda a: a[0], out)
    with pytest.raises(RuntimeError, match="1 of 1 samples failed"):
        jd.check(one)


# --- Errors. ---

RECTIFIED = jd.exact.gaussian(PROCESSES["Rectified"], np.zeros(2), 1.0)
ENDS = np.array([1.0, 0.5, 0.1])
REFUSED = {  # changes of a good solve, argument, what was given
    "shape": ({"shape": (2, -1)}, "shape", "(2, -1)"),
    "shape 2": ({"shape": (2, 1.5)}, "shape", "1.5"),
    "class": ({"solver": DDIM}, "solver", "DDIM"),
    "solver": ({"solver": "DDIM"}, "solver", "'DDIM'"),
    "model": ({"model": abs}, "model", "abs"),
    "rising": ({"ts": TS[::-1]}, "ts", "0.001"),
    "equal": ({"ts": np.array([0.9, 0.5, 0.5, 0.1])}, "ts", "0.5 followed by 0.5 at node 1"),
    "outside": ({"ts": np.array([1.5, 0.5])}, "ts", "1.5"),
    "below": ({"ts": np.array([0.5, 1e-4])}, "ts", "0.0001"),
    "nan": ({"ts": np.array([0.5, np.nan])}, "ts", "nan"),
    "matrix": ({"ts": np.ones((2, 3))}, "ts", "(2, 3)"),
    "one node": ({"ts": np.ones(1)}, "ts", "(1,)"),
    "float32": (
        {"ts": np.array([0.5, 0.5 - 1e-9, 0.1]), "dtype": np.float32},
        "ts",
        "equal after rounding",
    ),
    "int": ({"dtype": int}, "dtype", "int"),
    "clock": ({"solver": dfx.Heun(), "clock": "q"}, "clock", "'q'"),
    "clock u": ({"solver": dfx.Heun(), "clock": "u"}, "clock", "'u'"),
    "clock of ours": ({"clock": "r"}, "clock", "'r'"),
    "clock of sde": ({"solver": dfx.SEA(), "clock": "t"}, "clock", "'t'"),
    "equation": ({"solver": dfx.Heun(), "equation": "pde"}, "equation", "'pde'"),
    "equation of ours": ({"equation": "ode"}, "equation", "'ode'"),
    "engine": ({"engine": "fast"}, "engine", "'fast'"),
    "engine of a controller": (
        {"solver": dfx.Heun(), "engine": "scan", "controller": dfx.PIDController(1e-3, 1e-3)},
        "engine",
        "'scan'",
    ),
    "SEA from noise": ({"model": RECTIFIED, "solver": dfx.SEA(), "ts": ENDS}, "ts[0]", "1.0"),
    "EM from noise": (
        {"model": RECTIFIED, "solver": EulerMaruyama("t"), "ts": ENDS},
        "ts",
        "1.0",
    ),
}
CALLS = {
    "no key": ({"key": None}, "key", "NoneType"),
    "seed": ({"key": 0}, "key", "int"),
    "rbg": ({"key": jax.random.key(0, impl="rbg")}, "key", "rbg"),
    "keys": ({"key": jax.random.split(KEY, 3)}, "key", "(3,)"),
    "init": ({"init": np.ones(5)}, "init", "(5,)"),
    "text": ({"init": "x"}, "init", "'x'"),
}


@pytest.mark.parametrize("case", [*REFUSED, *CALLS])
def test_errors_name_function_argument_and_what_was_given(case, as_users_see_it):
    change, argument, given = (REFUSED | CALLS)[case]
    good = {"key": KEY, "model": MIX, "shape": (2,), "solver": DDIM(), "ts": TS, "init": None}
    options = good | change
    key, init = options.pop("key"), options.pop("init")
    with pytest.raises(ValueError) as error:
        jd.sampler(**options)(key, init=init)
    message = str(error.value)
    assert message.startswith("sampler: ") and f": {argument} must be" in message, message
    assert given in message.split(", got ", 1)[1], message


@pytest.mark.parametrize("solver", [EulerMaruyama("u"), DDIM(eta=1.0)], ids=["EM", "DDIM"])
def test_a_brownian_path_of_ones_own_drives_either_library(solver):
    """A tree in clock u: Euler-Maruyama of diffrax on the same path, step for step."""
    clock = jd.solvers.Clock(VP, "u")
    tree = dfx.VirtualBrownianTree(
        clock.of_t(TS[0]), clock.of_t(TS[-1]), 1e-3, (2,), jax.random.key(5)
    )
    ours, theirs = (
        prepared(s, noise=lambda key: tree, trajectory=True, **kwargs)(KEY, init=jnp.ones(2)).aux
        for s, kwargs in ((solver, {}), (dfx.Euler(), {"equation": "sde"}))
    )
    np.testing.assert_allclose(ours["trajectory"], theirs["trajectory"], rtol=1e-9, atol=1e-9)


def test_a_path_is_made_of_the_key_of_the_solver():
    """A tree of one's own for each sample, from stream 1 of its key."""
    make = lambda key: dfx.VirtualBrownianTree(0.0, 1e6, 1e-3, (2,), key)  # noqa: E731
    run = prepared(EulerMaruyama("u"), noise=make)
    again = prepared(EulerMaruyama("u"), noise=lambda key: make(jax.random.fold_in(KEY, 1)))
    np.testing.assert_allclose(run(KEY, init=np.ones(2)).x, again(KEY, init=np.ones(2)).x)
    other = run(jax.random.key(12), init=np.ones(2)).x
    assert not np.any(other == run(KEY, init=np.ones(2)).x)


# --- The model as an argument, where the floats of its process are traced. ---


@pytest.mark.parametrize(
    "solver", [DDIM(), EulerMaruyama("t"), dfx.Euler(), dfx.SEA()], ids=lambda s: type(s).__name__
)
def test_the_step_to_clean_data_is_the_same_inside_jit(solver):
    ts = FLOW.grid(6, t_start=0.99)
    run = lambda model: prepared(solver, model, ts)(KEY).x  # noqa: E731
    np.testing.assert_allclose(jax.jit(run)(FLOW_MIX), run(FLOW_MIX), rtol=1e-9)


def test_a_model_that_went_through_float32_takes_the_same_grid():
    moved = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), MIX)
    out = prepared(DDIM(), moved, VP.grid(3))(KEY)
    assert np.isfinite(out.x).all()


def test_a_trajectory_starts_at_its_start():
    for solver in (DDIM(), dfx.Euler()):
        out = prepared(solver, FLOW_MIX, [0.5, 0.0], trajectory=True)(None, init=jnp.ones(2))
        np.testing.assert_array_equal(out.aux["trajectory"][0], jnp.ones(2))
        np.testing.assert_array_equal(out.aux["ts"], [0.5, 0.0])


def test_times_are_float32_where_the_state_is_not():
    """In bfloat16 the indices 999 and 801 of a discrete process would be 1000 and 800."""
    seen = []

    def net(t, x, cond):
        jax.debug.callback(lambda t: seen.append(float(t)), t)
        return x

    path, ts = PROCESSES["Discrete"], [999, 801, 601, 301, 101]
    out = prepared(DDIM(), jd.Denoiser(path, net, "eps"), ts, dtype="bfloat16")(KEY)
    jax.block_until_ready(out)
    assert out.x.dtype == jnp.bfloat16
    assert seen == ts[:-1]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_diffrax_solvers_meet_discrete_indices_exactly(dtype):
    seen = []

    def net(t, x, cond):
        jax.debug.callback(lambda t: seen.append(float(t)), t)
        return x

    ts = [999, 801, 601, 301, 101, 10, 0]
    model = jd.Denoiser(PROCESSES["Discrete"], net, "eps")
    jax.block_until_ready(prepared(dfx.Euler(), model, ts, dtype=dtype)(KEY))
    assert seen == ts[:-1]


def test_evaluations_are_not_guessed():
    out = prepared(dfx.SlowRK(), ts=VP.grid(3), equation="sde")(KEY)
    assert out.nfe == -1


@pytest.mark.parametrize(
    "kwargs, parts",
    [
        (dict(solver=dfx.ShARK(), controller=dfx.PIDController(1e-3, 1e-3)), ["noise", "None"]),
        (dict(solver=dfx.Tsit5(), controller=dfx.PIDController), ["controller", "PIDController"]),
        (dict(max_steps=0), ["max_steps", "0"]),
        (dict(dtype="foo"), ["dtype", "foo"]),
        (dict(solver=dfx.Euler(), clock=np.ones(2)), ["clock", "1."]),
    ],
)
def test_more_wrong_arguments_get_one_sentence(as_users_see_it, kwargs, parts):
    with pytest.raises(ValueError) as error:
        prepared(**(dict(solver=DDIM()) | kwargs))
    assert all(part in str(error.value) for part in ["sampler: ", *parts])
    assert len(str(error.value).splitlines()) == 1


def test_noise_that_is_no_path_or_not_wanted(as_users_see_it):
    with pytest.raises(ValueError, match=r"sampler: noise must be a function .* path"):
        prepared(EulerMaruyama(), noise=jnp.ones(2))
    tree = dfx.VirtualBrownianTree(0.0, 1.0, 0.1, (2,), jax.random.key(5))
    with pytest.raises(ValueError, match="noise must be left out, since DDIM solves the ODE"):
        prepared(DDIM(), noise=lambda key: tree)


class Own(AbstractProcess):
    """A user's path, whose alpha ends at 6e-17 and not at 0."""

    t_min: float = 0.0
    t_max: float = 1.0

    def alpha(self, t):
        return jnp.cos(jnp.pi / 2 * jnp.asarray(t))

    def sigma(self, t):
        return jnp.sin(jnp.pi / 2 * jnp.asarray(t))

    def log_alpha(self, t):
        return jnp.log(self.alpha(t))

    def log_sigma(self, t):
        return jnp.log(self.sigma(t))


FROM_NOISE = {
    "Heun": (Heun(), 2),
    "Heun of diffrax": (dfx.Heun(), 2),
    "DDIM": (DDIM(), 1),
    "DPMpp2M": (DPMpp2M(), 2),
    "VelocityLeapfrog": (VelocityLeapfrog(), 2),
}


@each(FROM_NOISE)
@each({"own": Own(), "Rectified": FLOW}, "path")
def test_a_path_without_signal_at_its_start_flows_to_the_closed_form(case, path):
    """Of a Gaussian: x keeps its distance from the mean, in units of the deviation."""
    (solver, order), mean, v, init = case, np.array([0.7, -1.3]), 0.25, np.array([0.4, 1.1])
    model = jd.exact.gaussian(path, mean, v)
    alpha, sigma = float(path.alpha(0.1)), float(path.sigma(0.1))
    truth = alpha * mean + np.sqrt(alpha**2 * v + sigma**2) * init
    assert float(path.sigma(1.0)) == 1 and float(path.alpha(1.0)) < 1e-16
    errors = [
        np.abs(prepared(solver, model, np.linspace(1, 0.1, n + 1))(None, init=init).x - truth).max()
        for n in (64, 128)
    ]
    assert errors[1] < (0.02 if order == 1 else 2e-3), errors
    assert np.log2(errors[0] / errors[1]) > order - 0.2, errors


class Grows(Own):
    def alpha(self, t):
        return jnp.sin(jnp.pi / 2 * jnp.asarray(t))

    def sigma(self, t):
        return jnp.cos(jnp.pi / 2 * jnp.asarray(t))


class Breaks(Own):
    def alpha(self, t):
        return jnp.where(jnp.asarray(t) > 0.6, jnp.nan, super().alpha(t))


class Late(Own):
    def lam(self, t):
        return super().lam(t) + 1


def test_what_is_no_path_is_refused(as_users_see_it):
    for path, expected in (
        (Grows(), "that decreases in t, got lam="),
        (Breaks(), "of finite alpha and sigma, got alpha=nan"),
        (Late(), r"of lam = log\(alpha/sigma\), got lam="),
    ):
        message = rf"^sampler: process \({type(path).__name__}\) must be .*{expected}.* at t="
        with pytest.raises(ValueError, match=message) as error:
            prepared(DDIM(), jd.Denoiser(path, lambda t, x, cond: x), np.linspace(0.5, 0.1, 4))
        assert len(str(error.value).splitlines()) == 1


class Wrapped(AbstractDenoiser):
    """A user's denoiser around another."""

    inner: AbstractDenoiser

    process = property(lambda self: self.inner.process)

    def pair(self, t, x, cond=None):
        return self.inner.pair(t, x, cond)


def test_a_wrapper_is_defined_where_what_it_wraps_is():
    start = FLOW.grid(4)
    for wrap in (Wrapped, lambda model: Wrapped(Wrapped(model))):
        velocity = wrap(jd.Denoiser(FLOW, lambda t, x, cond: x, "velocity"))
        assert np.isfinite(prepared(DDIM(), velocity, start)(KEY).x).all()
        noise = wrap(jd.Denoiser(FLOW, lambda t, x, cond: x, "eps"))
        with pytest.raises(ValueError, match=r"ts\[0\] must be a time with alpha > 0.* got t=1.0"):
            prepared(DDIM(), noise, start)
        assert np.isfinite(prepared(DDIM(), noise, start[1:])(KEY).x).all()


def test_options_of_another_family_are_named(as_users_see_it):
    bridge = jd.interpolants.Model(jd.interpolants.bridge(), lambda t, x, cond: x)
    psld = jd.phase.Denoiser(jd.phase.PSLD(), lambda t, z, cond: z)
    cases = [
        (MIX, DDIM(), "diffusion", 0.5),
        (bridge, dfx.Heun(), "denoise", True),
        (bridge, dfx.Heun(), "clock", "t"),
        (psld, jd.phase.Rotation(), "engine", "scan"),
        (psld, jd.phase.Rotation(), "max_steps", 5),
    ]
    for model, solver, option, value in cases:
        with pytest.raises(ValueError) as error:
            prepared(solver, model, np.array([0.9, 0.5]), **{option: value})
        name = type(model).__name__
        expected = f"sampler: {option} must be left out: {name} has no such option, got {value!r}"
        assert str(error.value) == expected


def test_check_reads_results_of_any_rank_and_nothing_else():
    bad = jd.Denoiser(VP, lambda t, x, cond: x * jnp.nan)
    keys = jax.random.split(KEY, 3)
    run = prepared(DDIM(), bad)
    many_keys = jax.vmap(lambda k: jd.sample(k, run, num=2))(keys)
    with pytest.raises(RuntimeError, match=r"6 of 6 samples failed.*detected during solve. \(6"):
        jd.check(many_keys)
    with pytest.raises(ValueError, match="samples must be a result of a sampler or a likelihood"):
        jd.check(jnp.ones(2))
    with pytest.raises(ValueError, match="call it outside jit"):
        jax.jit(lambda k: jd.check(run(k)).x)(KEY)
