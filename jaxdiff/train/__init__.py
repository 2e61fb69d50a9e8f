"""Training of denoisers: loss, step, loop, checkpoints and small reference networks.

Imports optax, orbax and flax, which `import jaxdiff` does not: `import jaxdiff.train`.

```python
step = train.make_step(loss_fn, optimiser)                   # loss_fn: params, key, batch
state = train.init(key, params, optimiser)
state = train.fit(state, step, batch, steps=2000, path="run")  # the same line resumes
```
"""

from jaxdiff.train import checkpoint, loop, loss, nets, state
from jaxdiff.train.checkpoint import CheckpointError, latest, restore, save
from jaxdiff.train.loop import epochs, fit
from jaxdiff.train.loss import (
    batch_loss,
    batch_trace_loss,
    denoising_loss,
    lognormal_time,
    logsnr_time,
    trace_loss,
    uniform_time,
)
from jaxdiff.train.nets import MLP, TraceNet, UNet
from jaxdiff.train.state import TrainState, init, make_step

__all__ = [
    "MLP",
    "CheckpointError",
    "TraceNet",
    "TrainState",
    "UNet",
    "batch_loss",
    "batch_trace_loss",
    "checkpoint",
    "denoising_loss",
    "epochs",
    "fit",
    "init",
    "latest",
    "lognormal_time",
    "logsnr_time",
    "loop",
    "loss",
    "make_step",
    "nets",
    "restore",
    "save",
    "state",
    "trace_loss",
    "uniform_time",
]
