"""Trajectories of our solvers against the schedulers of the package diffusers, node by node.

Both sides see one analytic model at the same times, and one schedule, in float64. The tables of
diffusers are float32 (1 - alpha^2 at index 0 is wrong by 2e-4): they are computed from ours, then
replaced by ours, so that only the solvers are left to differ.
"""

import functools
import warnings
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from helpers import each

import jaxdiff as jd
from jaxdiff.solvers import (
    DDIM,
    DEIS,
    PNDM,
    DPMpp2M,
    DPMpp3M,
    ExponentialRK,
    Heun,
    PseudoRK4,
    RungeKutta,
    UniPC,
    WarmStart,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what others warn of is not ours
    torch = pytest.importorskip("torch", exc_type=ImportError)
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)

SHAPE = (2, 3)
BETAS = np.linspace(1e-4, 0.02, 900)
VP, FLOW, EDM = jd.process.Discrete(BETAS), jd.process.Rectified(), jd.process.EDM()
# Processes, and times of the network, to which the end of each case is added: 9 steps of ours each,
# so that kernels are shared.
GRIDS = {
    "index 0": (VP, jd.grids.discrete(VP, 9)),
    "trailing": (VP, jd.grids.discrete(VP, 10)),
    "logsnr": (VP, VP.grid(18, "logsnr")),
    "flow": (FLOW, np.linspace(1.0, 1e-3, 10)),
    "edm": (EDM, EDM.grid(9)),
}


class Case(NamedTuple):
    """A scheduler of theirs, its options, and the solver of ours that it is.

    `end` is how theirs stops: at `"index 0"` of the schedule; with a step to `"clean"` data that is
    `denoise=True` of ours; or with another one, `"open"`, which is left out.
    """

    theirs: str
    options: dict[str, Any]
    ours: Any
    end: str = "index 0"
    grid: str = "index 0"


def _vp(theirs, ours, end="index 0", grid=None, **options):
    schedule = {"num_train_timesteps": len(BETAS), "trained_betas": BETAS}
    spacing = {} if grid else {"timestep_spacing": "trailing"}
    grid = grid or ("index 0" if end == "index 0" else "trailing")
    return Case(theirs, schedule | spacing | options, ours, end, grid)


def _multistep(theirs, ours, order, end="index 0", lower=False, **options):
    final = {"final_sigmas_type": "zero" if end == "clean" else "sigma_min"}
    final = {} if theirs == "DEIS" else final  # always the latter
    options |= {"solver_order": order, "lower_order_final": lower} | final
    return _vp(f"{theirs}MultistepScheduler", ours, end, **options)


_dpm, _deis, _unipc = (
    functools.partial(_multistep, name) for name in ("DPMSolver", "DEIS", "UniPC")
)
_single = functools.partial(
    _vp, "DPMSolverSinglestepScheduler", end="clean", grid="logsnr", use_exponential_sigmas=True
)


def _edm(theirs, ours, **options):
    # Of data of infinite deviation, the preconditioned network predicts eps.
    options |= {"sigma_data": 1e8, "prediction_type": "v_prediction"}
    return Case(theirs, options, ours, "clean", "edm")


CASES = {
    "DDIM": _vp("DDIMScheduler", DDIM(), clip_sample=False, set_alpha_to_one=False),
    "DDIM, clean": _vp("DDIMScheduler", DDIM(), "clean", clip_sample=False),
    "Euler": _vp("EulerDiscreteScheduler", DDIM(), final_sigmas_type="sigma_min"),
    "Heun": _vp("HeunDiscreteScheduler", Heun(), "clean"),
    "LMS": _vp("LMSDiscreteScheduler", DEIS(4, "s"), "open"),
    "iPNDM": Case("IPNDMScheduler", {}, PNDM()),
    "PLMS": _vp("PNDMScheduler", WarmStart(PNDM(), Heun(), 1), skip_prk_steps=True),
    "F-PNDM": _vp("PNDMScheduler", WarmStart(PNDM(), PseudoRK4(), 3)),
    "DPM-Solver++(2M)": _dpm(DPMpp2M(), 2),
    "DPM-Solver++(2M, heun)": _dpm(DPMpp2M("heun"), 2, solver_type="heun"),
    "DPM-Solver++(3M)": _dpm(DPMpp3M(released=True), 3),
    "DPM-Solver++(3M), lower": _dpm(DPMpp3M(True, lower_order_final=True), 3, lower=True),
    "DPM-Solver(2M)": _dpm(UniPC(2, output="eps", corrector=False), 2, algorithm_type="dpmsolver"),
    # Theirs interpolates in log(sigma/alpha), which is -lam.
    "DEIS(2)": _deis(DEIS(2, "lam"), 2),
    "DEIS(3)": _deis(DEIS(3, "lam"), 3),
    "DEIS(3), lower": _deis(DEIS(3, "lam", lower_order_final=True), 3, lower=True),
    "UniPC(2, bh1), skip": _unipc(
        UniPC(2, "bh1", skip=(0, 2)), 2, solver_type="bh1", disable_corrector=[0, 2]
    ),
    "UniPC(2, bh2), clean": _unipc(UniPC(2), 2, "clean", lower=True),
    "UniPC(2, bh2, eps)": _unipc(UniPC(2, output="eps"), 2, predict_x0=False),
    "UniPC(3, bh1)": _unipc(UniPC(3, "bh1"), 3, solver_type="bh1"),
    "UniPC(3, bh2), lower": _unipc(UniPC(3, lower_order_final=True), 3, lower=True),
    "DPM-Solver++(3M), lower, clean": _dpm(
        DPMpp3M(True, lower_order_final=True), 3, "clean", lower=True
    ),
    "UniPC(3, bh2), lower, clean": _unipc(UniPC(3, lower_order_final=True), 3, "clean", lower=True),
    # Its stages are nodes of the grid: in the middle, where that is uniform in lam. Its (3S) is not
    # the paper's: phi_1/2 stands for phi_2 in the second stage.
    "DPM-Solver++(2S)": _single(ExponentialRK(2), solver_order=2, lower_order_final=True),
    "flow, Euler": Case(
        "FlowMatchEulerDiscreteScheduler", {}, RungeKutta("euler", "t"), "clean", "flow"
    ),
    "flow, Heun": Case(
        "FlowMatchHeunDiscreteScheduler", {}, RungeKutta("heun", "t"), "clean", "flow"
    ),
    "EDM, Euler": _edm("EDMEulerScheduler", DDIM()),
    "EDM, DPM-Solver++(3M)": _edm(
        "EDMDPMSolverMultistepScheduler", DPMpp3M(True), solver_order=3, lower_order_final=False
    ),
}
# Theirs rounds the state to float32 in every step.
ROUNDED = ("DPMSolverMultistep", "EulerDiscrete", "FlowMatch", "EDMEuler")


def their_states(case, denoiser, ts, alpha, sigma, x):
    """Run a scheduler from x; return the states before the first and after every evaluation."""
    path, scheduler = denoiser.process, getattr(diffusers, case.theirs)(**case.options)
    if path is VP:
        scheduler.alphas_cumprod = torch.tensor(np.exp(2 * VP.log_alphas))
        scheduler.final_alpha_cumprod = torch.tensor(alpha[-1] ** 2)
    scheduler.set_timesteps(len(ts) - 1)
    kind, scale = "eps" if path is not FLOW else "velocity", np.ones(len(scheduler.timesteps) + 1)
    if case.theirs == "IPNDMScheduler":  # has a path of its own, and its network predicts v
        scheduler.alphas, scheduler.betas, kind = torch.tensor(alpha), torch.tensor(sigma), "v"
    elif hasattr(scheduler, "sigmas"):
        twice = [0, *np.repeat(np.arange(1, len(ts) - 1), 2), len(ts) - 1]  # two evaluations a step
        order = np.arange(len(ts)) if len(scheduler.sigmas) == len(ts) else np.array(twice)
        levels = (sigma if path is FLOW else sigma / alpha)[order]
        np.testing.assert_allclose(scheduler.sigmas, levels, rtol=2e-6)
        scheduler.sigmas, ts = torch.tensor(levels), ts[order]
        if getattr(scheduler, "init_noise_sigma", 1.0) > 1:  # its state is x/alpha
            scale = alpha[order]
    else:
        ts = scheduler.timesteps.numpy()
    scheduler.is_scale_input_called = True  # by us: the network gets scale * x
    x, states = torch.tensor(x / scale[0]), [x]
    for n, timestep in enumerate(scheduler.timesteps):
        out = getattr(denoiser, kind)(np.float64(ts[n]), scale[n] * x.numpy())
        x = scheduler.step(torch.tensor(np.asarray(out)), timestep, x, return_dict=False)[0]
        states.append(scale[n + 1] * x.numpy())
    return states


@each(CASES)
def test_the_trajectory_is_that_of_diffusers(case, as_users_see_it):
    with jax.disable_jit():  # to compile every solver for one use would take longer
        compare(case)


def compare(case):
    (path, ts), rng = GRIDS[case.grid], np.random.default_rng(0)
    denoiser = jd.exact.mixture(path, [0.3, 0.7], rng.standard_normal((2, *SHAPE)), [0.05, 0.2])
    nodes, clean = np.append(ts, 0.0), case.end == "clean"
    alpha, sigma = (np.array(jax.vmap(f)(nodes)) for f in (path.alpha, path.sigma))
    if case.end != "index 0":
        alpha[-1], sigma[-1] = 1.0, 0.0
    x = sigma[0] * rng.standard_normal(SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        states = their_states(case, denoiser, nodes, alpha, sigma, x)
    if case.end != "index 0":
        nodes = ts[:: case.ours.evaluations if case.grid == "logsnr" else 1]
    options = {"denoise": clean, "trajectory": True}
    ours = jd.sampler(denoiser, SHAPE, solver=case.ours, ts=nodes, **options)(None, init=x)
    done = [int(case.ours.cost(n)) for n in range(len(nodes))] + [-1] * clean
    assert ours.nfe == len(states) - 1 - (case.end == "open")
    theirs, ours = np.stack([states[n] for n in done]), ours.aux["trajectory"]
    tolerance = 1e-5 if case.theirs.startswith(ROUNDED) else 1e-11
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * abs(theirs).max())
