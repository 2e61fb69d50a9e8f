"""Steps exact for Gaussian data: by the Fisher, and by secants of the trajectory."""

import jax
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff import exact
from jaxdiff.fisher import Curvature
from jaxdiff.process import EDM, VP, Rectified
from jaxdiff.solvers import DDIM, LML, DPMpp2M, LocalGaussian, RungeKutta, Secant

D = 6
RNG = np.random.default_rng(0)
BASIS = np.linalg.qr(RNG.standard_normal((D, D)))[0]
MEAN = RNG.standard_normal(D)
GRIDS = {  # inside finite log-SNR
    "VP": (VP(), dict(kind="logsnr", t_start=0.95, t_end=0.02)),
    "EDM": (EDM(0.02, 20.0), dict(kind="edm")),
    "Rectified": (Rectified(), dict(kind="uniform", t_start=0.99, t_end=0.02)),
}


def gaussian(process, values):
    return exact.gaussian(process, MEAN, BASIS @ np.diag(values) @ BASIS.T)


def flow(process, values, t0, t1, x):
    """The PF-ODE of Gaussian data in closed form: each eigendirection keeps its quantile."""
    a0, s0, a1, s1 = (float(f(t)) for t in (t0, t1) for f in (process.alpha, process.sigma))
    ratio = np.sqrt((a1**2 * values + s1**2) / (a0**2 * values + s0**2))
    return a1 * MEAN + BASIS @ (ratio * (BASIS.T @ (x - a0 * MEAN)))


def steps(process, values, solver, n, kind):
    """Errors of each step, from where the one before it ended."""
    ts, values = process.grid(n, **kind), np.asarray(values)
    start = float(process.sigma(ts[0])) * np.linspace(-1, 1, D)
    denoiser = gaussian(process, values)
    run = jd.sampler(denoiser, (D,), solver=solver, ts=ts, trajectory=True)
    path = np.asarray(run(None, init=start).aux["trajectory"])
    ends = [flow(process, values, ts[i], ts[i + 1], path[i]) for i in range(n)]
    return np.abs(path[1:] - ends).max(axis=1)


@pytest.mark.parametrize("path", GRIDS)
def test_one_step_of_newton_is_exact_for_any_gaussian(path):
    """However long it is, and however the variances are spread."""
    process, kind = GRIDS[path]
    for values in ([0, 1e-4, 0.1, 1, 30, 30], [0.7] * D):
        solver = LocalGaussian(Curvature("exact"), damping=1e-9)
        assert steps(process, values, solver, 2, kind).max() < 1e-8


@pytest.mark.parametrize("path", GRIDS)
@pytest.mark.parametrize("k,values", [(1, [0.4] * D), (2, [0, 0, 0, 0.5, 0.5, 0.5]),
                                      (3, [0.1, 0.1, 0.5, 0.5, 2, 2])])  # fmt: skip
def test_k_secants_are_exact_for_k_variances(path, k, values):
    """From step k on, whatever the steps; one secant less is not enough."""
    process, kind = GRIDS[path]
    errors = steps(process, values, Secant(k, trust=False), 8, kind)
    assert errors[k:].max() < 1e-6 and errors[0] > 10 * errors[k:].max()
    if k > 1:
        fewer = steps(process, values, Secant(k - 1, trust=False), 8, kind)
        assert fewer[k:].max() > 100 * errors[k:].max()


def mixture(process):
    rng = np.random.default_rng(1)
    means, variances = 2 * rng.standard_normal((6, 8)), rng.uniform(0.1, 0.5, 6)
    return exact.mixture(process, np.ones(6), means, variances)


@pytest.mark.parametrize("path", GRIDS)
def test_the_trusted_secant_is_a_shorter_correction_of_2m(path):
    """In every step parallel to that of DPM-Solver++(2M), and not longer."""
    process, kind = GRIDS[path]
    denoiser, ts = mixture(process), process.grid(6, **kind)
    x = float(process.sigma(ts[0])) * np.random.default_rng(2).standard_normal(8)
    for i in range(1, 6):  # two steps from each node, of which the second differs
        nodes = ts[i - 1 :][:3] if i < 6 else ts[-3:]
        runs = [
            jd.sampler(denoiser, (8,), solver=s, ts=nodes, trajectory=True)
            for s in (DDIM(), DPMpp2M(), Secant())
        ]
        base, second, secant = (np.asarray(r(None, init=x).aux["trajectory"]) for r in runs)
        np.testing.assert_allclose(secant[1], second[1], rtol=1e-13)
        one, other = second[2] - base[2], secant[2] - base[2]
        ratio = other @ one / (one @ one)
        np.testing.assert_allclose(other, ratio * one, rtol=1e-9, atol=1e-9 * np.abs(one).max())
        assert 0 < ratio <= 1 + 1e-12
        x = second[1]


def test_fewer_steps_than_2m_for_the_same_error():
    """The reason for it: the median error of ten steps, on three processes."""
    start = np.random.default_rng(3).standard_normal((32, 8))
    ratios = []
    for process, kind in GRIDS.values():
        denoiser, fine = mixture(process), process.grid(600, **kind)
        x = float(process.sigma(fine[0])) * start

        def run(solver, ts, denoiser=denoiser, x=x):
            prepared = jd.sampler(denoiser, (8,), solver=solver, ts=ts)
            return jd.sample(None, prepared, num=32, init=x).x

        truth = run(jd.solvers.DPMpp3M(), fine)
        ends = [run(s, process.grid(10, **kind)) for s in (DPMpp2M(), Secant())]
        both = [np.median(np.linalg.norm(np.asarray(end - truth), axis=1)) for end in ends]
        ratios.append(both[1] / both[0])
    assert max(ratios) < 1 and min(ratios) < 0.8, ratios


@pytest.mark.parametrize("k", [1, 3])
def test_gradients_pass_where_there_is_no_history(k):
    """Also from alpha = 0 and to sigma = 0; against central differences."""
    process = Rectified()
    means = np.random.default_rng(0).standard_normal((3, 4))
    denoiser = exact.mixture(process, np.ones(3), means, np.array([0.1, 0.2, 0.3]))
    run = jd.sampler(denoiser, (4,), solver=Secant(k), ts=np.linspace(1, 0, 6))

    @jax.jit
    def loss(x):
        return (run(None, init=x).x ** 2).sum()

    x, eye = np.array([0.3, -1.0, 0.5, 0.8]), np.eye(4)
    slopes = [(loss(x + 1e-6 * v) - loss(x - 1e-6 * v)) / 2e-6 for v in eye]
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), slopes, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "solver",
    [Secant(), Secant(2, trust=False), LocalGaussian(Curvature("exact")), LML(DPMpp2M(), c=0.5),
     LML(RungeKutta("euler", "t"))],
    ids=str,
)  # fmt: skip
def test_a_traced_grid_ends_at_sigma_0_as_a_known_one(solver):
    """There the step is x = alpha m, for all; on a mixture and on one atom."""
    process, x = Rectified(), np.array([0.4, -0.8])
    for variance in (0.1, 0.0):
        law = exact.mixture(process, [1.0, 2.0], [[-1.0, 0.3], [1.0, 0.1]], variance)

        def run(ts, law=law):
            return jd.sampler(law, (2,), solver=solver, ts=ts)(None, init=x).x

        ts = np.array([0.9, 0.6, 0.3, 0.0])
        np.testing.assert_allclose(jax.jit(run)(ts), run(ts), rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("as_users_see_it")
def test_refusals():
    for make, message in (
        (lambda: Secant(0), "Secant: k must be one of"),
        (lambda: LocalGaussian("exact"), "curvature must be a function"),
        (lambda: LocalGaussian(Curvature(), damping=0.0), "damping must be a"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
