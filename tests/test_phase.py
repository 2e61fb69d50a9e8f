"""Phase-space diffusions: matrices against matrix exponentials, solvers by order and by moments."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from helpers import each

import jaxdiff as jd
from jaxdiff import exact, phase
from jaxdiff.process import EDM, VP

PSLD, CLD = phase.PSLD(), phase.CLD()
ANY = phase.LinearSDE([[-0.1, 1.0], [-0.8, -0.3]], [[0.3, 0.1], [0, 0.5]], 2.0, 3.0, momentum=0.2)
PROCESSES = {"PSLD": PSLD, "CLD": CLD, "any": ANY}
KEY, ONE_STEP, COARSE, FINE, END = jax.random.key(3), np.array([0.9, 0.1]), 80, 160, 0.03

QUICK = {"xla_backend_optimization_level": 0}  # to compile

# Every solver of ours: (instance, order of the path, or of the law where steps add noise).
SOLVERS = {name: (phase.Splitting(name), 1) for name in ("NSE", "RSE", "NVV", "RVV")} | {
    "Euler": (phase.Euler(), 1),
    "Heun": (phase.Heun(), 2),
    "GDDIM(0)": (phase.GDDIM(), 1),
    "GDDIM(2)": (phase.GDDIM(2), 3),
    "Conjugate(0)": (phase.Conjugate(), 1),
    "Conjugate(ones)": (phase.Conjugate(0.1 * np.ones((2, 2)), "cholesky"), 1),
    "Rotation": (phase.Rotation(), 2),
    "Rotation(Euler)": (phase.Rotation(midpoint=False), 1),
    "EulerMaruyama": (phase.EulerMaruyama(), 1),
    "SSCS": (phase.SSCS(), 2),
    "SSCS(Euler)": (phase.SSCS(midpoint=False), 1),
}


@functools.cache
def law(name, t, mean, variance):
    """Mean and covariance of z_t for Gaussian data of one coordinate, and Phi, by Van Loan."""
    process = PROCESSES[name]
    A, D = np.asarray(process.A), np.asarray(process.L) @ np.asarray(process.L).T
    b = process.beta * t + process.beta_slope * t**2 / 2
    block = scipy.linalg.expm(b * np.block([[A, D], [np.zeros((2, 2)), -A.T]]))
    phi, noise = block[:2, :2], block[:2, 2:] @ block[:2, :2].T
    start = phi @ np.diag([variance, process.momentum]) @ phi.T
    return phi[:, 0] * mean, start + noise, phi


@functools.cache
def affine(name, t, mean, variance):
    """The noise prediction -K^T score of Gaussian data as m, B with eps = B (z - m)."""
    m, cov, _ = law(name, t, mean, variance)
    return m, np.linalg.cholesky(law(name, t, mean, 0.0)[1]).T @ np.linalg.inv(cov)


def run(stages, z, evaluate, normal=None):
    """The engine once more: states (2, k), one step after the other, no scan and no key."""
    leaves, tree = jax.tree.flatten(stages)
    outputs = []
    for n in range(len(leaves[0])):
        y = z
        for stage in jax.tree.unflatten(tree, [np.asarray(leaf)[n] for leaf in leaves]):
            if stage.t is not None:
                outputs = [evaluate(float(stage.t), z), *outputs[:3]]
            terms = [(stage.state, z), *zip(stage.weights, outputs, strict=False)]
            terms += [] if stage.base is None else [(stage.base, y)]
            terms += [] if stage.noise is None else [(stage.noise, normal())]
            z = sum(m @ a for m, a in terms)
            y = z if stage.t is None else y
    return z


def moments(stages, name, mean, cov, data):
    """Mean and covariance of a solver's law for Gaussian data: exact, nothing is drawn.

    A state is (2, 1 + k): its mean and its coefficients of k independent standard normals.
    """
    steps = len(jax.tree.leaves(stages)[0])
    z = np.zeros((2, 3 + 2 * steps * sum(s.noise is not None for s in stages)))
    z[:, 0], z[:, 1:3], used = mean, np.linalg.cholesky(cov), itertools.count(3, 2)

    def evaluate(t, z):
        (m, slope), first = affine(name, t, *data), np.eye(z.shape[1])[0]
        return slope @ (z - np.outer(m, first))

    def normal():
        fresh, k = np.zeros_like(z), next(used)
        fresh[0, k] = fresh[1, k + 1] = 1
        return fresh

    z = run(stages, z, evaluate, normal)
    return z[:, 0], z[:, 1:] @ z[:, 1:].T


@functools.partial(jax.jit, compiler_options=QUICK)
def _build(head, ts, steps):
    def stages(solver):
        return jax.vmap(lambda w, n: solver.stages(head, w[: 2 + solver.memory], n))(ts, steps)

    return {name: stages(solver) for name, (solver, _) in SOLVERS.items()}


@functools.cache
def tables(name):
    """The stages of all solvers on a coarse and a fine grid and on one step, by one program."""
    rows, numbers = [], []
    for ts in (*(np.linspace(1, END, n + 1) for n in (COARSE, FINE)), ONE_STEP):
        k = np.arange(len(ts) - 1)
        rows.append(np.stack([ts[k + 1], *(ts[np.maximum(k - j, 0)] for j in range(3))], 1))
        numbers.append(k)
    process = PROCESSES[name]
    head = jax.tree.map(lambda a: jnp.asarray(a, float), phase.Denoiser(process, abs).head)
    out = jax.tree.map(np.asarray, _build(head, np.concatenate(rows), np.concatenate(numbers)))
    cuts = itertools.pairwise([0, COARSE, COARSE + FINE, COARSE + FINE + 1])
    return [jax.tree.map(lambda a, s=slice(*cut): a[s], out) for cut in cuts]


@functools.partial(jax.jit, compiler_options=QUICK)
def _matrices(process, ts):
    look = lambda t: (process.covariance(t), process.root(t), process.root(t, "r"))  # noqa: E731
    return jax.vmap(look)(ts)


def matrices(name, *ts):
    """(Sigma, Cholesky root, root of gDDIM) at four times, each (4, 2, 2)."""
    process = jax.tree.map(lambda a: jnp.asarray(a, float), PROCESSES[name])
    return [np.asarray(a) for a in _matrices(process, np.resize(ts, 4))]


@pytest.mark.parametrize("name", ["PSLD", "CLD", "any"])
def test_matrices_are_those_of_block_exponentials(name):
    ts, process = np.array([1e-3, 0.02, 0.4, 1.0]), PROCESSES[name]
    S, A, D = np.asarray(process.stationary), process.A, np.asarray(process.D)
    np.testing.assert_allclose(A @ S + S @ A.T, -D, atol=1e-14)
    for t, cov, root, _ in zip(ts, *matrices(name, *ts), strict=True):
        _, want, phi = law(name, t, 0.0, 0.0)
        np.testing.assert_allclose(process.transition(t), phi, rtol=0, atol=1e-13)
        np.testing.assert_allclose(cov, want, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(root @ root.T, cov, rtol=1e-13, atol=1e-16)
        assert root[0, 1] == 0 and root[0, 0] > 0 and root[1, 1] > 0
        start = process.momentum * np.outer(phi[:, 1], phi[:, 1])
        np.testing.assert_allclose(S - phi @ S @ phi.T, cov - start, rtol=1e-9, atol=1e-12)


def test_published_numbers():
    np.testing.assert_allclose(CLD.beta * CLD.A, 4.0 * np.array([[0, 4.0], [-1, -4.0]]))
    np.testing.assert_allclose(CLD.beta * np.asarray(CLD.D), np.diag([0, 2 * 1.0 * 4.0]))
    np.testing.assert_allclose(PSLD.A, [[-0.005, 2.0], [-0.5, -2.005]])
    assert CLD.momentum == pytest.approx(0.04 / 4) == PSLD.momentum
    np.testing.assert_allclose(matrices("CLD", 1.0)[0][0], np.diag([1, 0.25]), atol=3e-5)


def test_no_digit_is_lost_near_the_data_in_float32(defaults):
    """Entries of order b, b^2, b^3: relative errors, where S - Phi S Phi^T has no digit left."""
    ts = np.array([1e-4, 1e-3, 1e-2])
    for t, root in zip(ts, jax.jit(jax.vmap(lambda t: CLD.root(t)))(np.float32(ts)), strict=True):
        want, lower = np.linalg.cholesky(law("CLD", t, 0.0, 0.0)[1]), np.tril_indices(2)
        np.testing.assert_allclose(root[lower], want[lower], rtol=3e-6)


def test_the_root_of_gddim_solves_its_equation():
    """R' = F R + G G^T R^-T / 2, from the Cholesky root at 1e-4 on."""
    cov, lower, got = matrices("CLD", 1e-4, 1e-3, 0.1, 1.0)
    np.testing.assert_allclose(got[0], lower[0], atol=1e-15)
    np.testing.assert_allclose(got @ got.transpose(0, 2, 1), cov, rtol=0, atol=1e-14)
    look = lambda t: jax.jvp(lambda t: CLD.root(t, "r"), (t,), (jnp.ones(()),))  # noqa: E731
    root = jax.jit(look, compiler_options=QUICK)
    for t in (1e-3, 0.1, 1.0):
        R, slope = root(jnp.asarray(t))
        want = CLD.A @ R + CLD.L @ CLD.L.T @ np.linalg.inv(R).T / 2
        np.testing.assert_allclose(slope, CLD.beta * want, rtol=0, atol=1e-10 / t)


@each({"EDM": EDM(), "VP": VP()}, "path")
def test_a_lifted_denoiser_is_that_of_the_joint_law(path):
    t, z, (mean, cov, phi) = 0.15, np.array([[0.4], [-0.3]]), law("PSLD", 0.15, 0.7, 0.25)
    model = phase.Lifted(PSLD, exact.gaussian(path, [0.7], 0.25))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def views(z):
        raw = model.raw(t, z)
        return model(t, z), model.score(t, z), raw, model.eps(t, z, factor="r")

    slope = -np.linalg.solve(cov, z - mean[:, None])
    _, (root, *_), (root_r, *_) = matrices("PSLD", t)
    m = 0.7 - 0.25 * phi[:, 0] @ slope
    wanted = m, slope, -root.T @ slope, -root_r.T @ slope
    for got, want in zip(views(z), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", SOLVERS)
def test_order_of_the_law_of_gaussian_data(name):
    """Mean and covariance of the solver's law on CLD tend to those of z_t: nothing is drawn."""
    (solver, order), data, errors = SOLVERS[name], (0.7, 0.25), []
    for table in tables("CLD")[:2]:
        got = moments(table[name], "CLD", *law("CLD", 1.0, *data)[:2], data)
        want = law("CLD", END, *data)[:2]
        errors.append(max(np.abs(a - b).max() for a, b in zip(got, want, strict=True)))
    assert solver.claimed_order == order
    assert np.log2(errors[0] / errors[1]) > order - 0.25, errors


def test_gddim_is_exact_for_a_point_in_one_step():
    """One noise, 0.9 -> 0.1, with the root of gDDIM, whatever a network predicts."""
    noise, error = np.random.default_rng(1).normal(size=2), {}
    _, (root, *_), roots = matrices("PSLD", *ONE_STEP)
    means = [law("PSLD", t, 0.7, 0.0)[0] for t in ONE_STEP]
    start, want = (m[:, None] + r @ noise[:, None] for m, r in zip(means, roots[:2], strict=True))
    predict = lambda t, z: np.linalg.solve(root, z - means[0][:, None])  # noqa: E731
    for name in ("GDDIM(0)", "GDDIM(2)", "Conjugate(0)", "Conjugate(ones)", "Heun"):
        error[name] = np.abs(run(tables("PSLD")[2][name], start, predict) - want).max()
    assert error["GDDIM(0)"] < 1e-11 and error["GDDIM(2)"] < 1e-11
    assert error["Conjugate(0)"] < 1e-9  # the same integrator, its weight by quadrature
    assert error["Conjugate(ones)"] > 0.1 and error["Heun"] > 0.1
    head = phase.Denoiser(PSLD, abs, "eps", "r").head
    stages = jax.vmap(lambda ts: phase.GDDIM().stages(head, ts, 0))
    stages = jax.jit(stages, compiler_options=QUICK)(ONE_STEP[None, ::-1])
    assert np.abs(run(stages, start, lambda t, z: noise[:, None]) - want).max() < 1e-11


class Every(phase.AbstractPhaseSolver):
    """Uses all that a stage can do: history, noise, the first state, no evaluation."""

    memory = 2

    def stages(self, head, ts, n):
        one, first = jnp.eye(2), jnp.where(n > 0, 0.1, 0.0)
        return (
            phase.Stage(0.8 * one, (0.1 * one, first * one), ts[1], noise=0.3 * one),
            phase.Stage(head.process.transition(ts[0], ts[1]) / 4, noise=0.1 * one),
            phase.Stage(0.5 * one, (0.2 * one, -0.1 * one), (ts[0] + ts[1]) / 2, base=0.4 * one),
        )


TS = PSLD.grid(5)
NET = phase.Denoiser(PSLD, lambda t, z, cond: jnp.tanh(z))


def test_samples_by_hand_with_conditions_a_denoising_step_and_one_broken():
    """The start is of fold_in(key_i, 0), stage j of step k of stream 1, folded with k, then j.

    The network knows the point `cond`, which the denoising step returns; NaN stays alone.
    """

    def net(t, z, cond):
        shifted = z - PSLD.transition(t)[:, :1] * cond
        return -jnp.linalg.inv(PSLD.covariance(t)) @ shifted

    cond, fold = np.array([[0.5, -1.0], [np.nan, 0.0], [2.0, 0.3]]), jax.random.fold_in
    model, options = phase.Denoiser(PSLD, net, "score"), dict(denoise=True, trajectory=True)
    sampler = jd.sampler(model, (2,), solver=Every(), ts=TS, **options)
    go = lambda: jd.sample(KEY, sampler, num=3, chunk=2, cond=cond[:, None])  # noqa: E731
    out = jax.jit(go, compiler_options=QUICK)()
    stages, own = Every().tabulate(model.head, TS), fold(KEY, 2)
    keys = [fold(fold(fold(own, 1), k), j) for k in range(5) for j in (0, 1)]
    normals = iter(np.asarray(jax.random.normal(key, (2, 2))) for key in keys)
    start = matrices("PSLD", 1.0)[1][0] @ np.asarray(jax.random.normal(fold(own, 0), (2, 2)))
    known = jax.jit(lambda t, z: net(t, z, cond[2:]))
    want = run(stages, start, lambda t, z: np.asarray(known(t, z)), lambda: next(normals))
    path = out.aux["trajectory"][2]
    np.testing.assert_allclose(path[0], start, rtol=1e-11)
    np.testing.assert_allclose(path[-2], want, rtol=1e-9)
    np.testing.assert_allclose(path[-1][0], cond[2], atol=1e-9)
    np.testing.assert_allclose(np.stack([out.x[2], out.aux["momentum"][2]]), path[-1])
    assert out.nfe.tolist() == [11, 11, 11]
    with pytest.raises(RuntimeError, match="1 of 3 samples failed, first at index 1"):
        jd.check(out)


def test_slopes_in_the_start_and_in_the_process():
    """By differences, under jit; parameters of the process are traced, and so are the tables."""

    def end(u):
        model = phase.Denoiser(phase.PSLD(beta=u[0]), NET.net)
        sampler = jd.sampler(model, (1,), solver=phase.Rotation(midpoint=False), ts=TS)
        out = sampler(None, init=u[1:, None])
        return out.x[0] + out.aux["momentum"][0]

    both, u = jax.jit(jax.value_and_grad(end), compiler_options=QUICK), jnp.array([8.0, 0.4, -0.3])
    want = [(both(u + h)[0] - both(u - h)[0]) / 2e-5 for h in 1e-5 * np.eye(3)]
    np.testing.assert_allclose(both(u)[1], want, rtol=1e-5)


def call(key=KEY, denoiser=NET, solver=None, **rest):
    solver = solver or phase.Rotation()
    return jd.sample(key, jd.sampler(denoiser, (1,), solver=solver, ts=TS), num=2, **rest)


UNSTABLE = phase.Denoiser(phase.LinearSDE([[0.1, 1.0], [-1.0, 0.0]], np.eye(2)), abs)
ERRORS = {
    "solver": (lambda: call(solver=jd.solvers.DDIM()), "sampler: solver .* DDIM"),
    "key": (lambda: call(key=None), "sample: key .*NoneType"),
    "init": (
        lambda: call(init=np.ones(1)),
        r"sample: init must be of shape \(2, 2, 1\), got shape \(1,\)",
    ),
    "option": (
        lambda: jd.sampler(NET, (1,), solver=phase.Rotation(), ts=TS, engine="scan"),
        "sampler: engine must be left out: Denoiser has no such option, got 'scan'",
    ),
    "cond": (lambda: call(cond=np.ones(3)), r"sample: cond .*\(3,\)"),
    "unstable": (lambda: call(denoiser=UNSTABLE), "the drift A .*0.0499"),
    "nu": (lambda: phase.PSLD(gamma=2.0, nu=2.0), "PSLD: nu .*2.0"),
    "L": (lambda: phase.LinearSDE(-np.eye(2), np.diag([1, 0])), "A, L must be matrices that lead"),
    "predicts": (lambda: phase.Denoiser(PSLD, abs, "x0"), "Denoiser: predicts .*'x0'"),
    "base": (lambda: phase.Lifted(PSLD, abs), "Lifted: base must be a denoiser"),
    "order": (lambda: phase.GDDIM(3), "GDDIM: order .*3"),
    "scheme": (lambda: phase.Splitting("ABA"), "Splitting: scheme .*'ABA'"),
}


@each(ERRORS)
def test_errors_name_the_argument(case, as_users_see_it):
    build, message = case
    with pytest.raises(ValueError, match=message):
        build()
