"""Kinds of SFRIK, SimCLR, AUH and VICReg that need no network: kernel and losses, through the methods' own forward pass."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.batch import Group, Views
from fastssl.losses.mmd import kernel_coefficients, polynomial
from fastssl.losses.nt_xent import similarities
from fastssl.losses.uniformity import uniformity
from fastssl.losses.vicreg import centered, covariance_matrix, squared_off_diagonal, standard_deviations
from fastssl.method import Method, StepOutput
from fastssl.methods.auh import AUH
from fastssl.methods.simclr import SimCLR
from fastssl.methods.vicreg import VICReg
from fastssl.precision import unit_rows
from tests.golden.kind import Arrays, Kind


def sfrik_kernel(arrays: Arrays) -> Arrays:
    t, orders = torch.from_numpy(arrays["t"]), arrays["P"].shape[1]

    def phi(weights: np.ndarray, q: int) -> list[np.ndarray]:
        """phi and phi'."""
        return [polynomial(t, c).numpy() for c in kernel_coefficients(weights.tolist(), q)]

    # P_l is the kernel with b_l = 1 alone.
    single = np.array([[phi(row, int(q)) for row in np.eye(orders)] for q in arrays["q"]])
    return {
        "P": single[:, :, 0],
        "dP": single[:, :, 1],
        "phi": np.array([[phi(row, int(q))[0] for row in arrays["weights"]] for q in arrays["q"]]),
    }


class _Nothing(nn.Module):
    """A backbone whose features are the projections of the file."""

    num_features = 1


def loss_of(method: Method, arrays: Arrays) -> tuple[StepOutput, Arrays]:
    """One step of the method on the file's projections, and what is common to the kinds: total and gradients."""
    method.encoder = nn.Identity()
    both = torch.from_numpy(np.concatenate((arrays["proj_x"], arrays["proj_y"]))).requires_grad_()
    n = len(both) // 2
    views = Views(
        groups=(Group(size=1, views=(0, 1), pixels=both),),
        boxes=torch.zeros(n, 2, 4),
        flips=torch.zeros(n, 2, dtype=torch.bool),
        source_hw=torch.zeros(n, 2, dtype=torch.int32),
        index=torch.arange(n),
    )
    out = method(views, None)
    out.loss.backward()
    return out, {"total": out.loss.detach().numpy(), "grad_x": both.grad[:n].numpy(), "grad_y": both.grad[n:].numpy()}


def unit(arrays: Arrays) -> tuple[Tensor, Tensor]:
    x, y = (unit_rows(torch.from_numpy(arrays[name])) for name in ("proj_x", "proj_y"))
    return x, y


def simclr_loss(arrays: Arrays) -> Arrays:
    temperature = float(arrays["temperature"])
    _, out = loss_of(SimCLR(SimCLR.Config(mlp="1", temperature=temperature), _Nothing, "local"), arrays)
    x, y = unit(arrays)
    n, z = len(x), torch.cat((x, y))
    s = similarities(z, z, temperature)
    for key_view, anchors, positives in ((0, range(n, 2 * n), range(n)), (1, range(n), range(n, 2 * n))):
        rows = []
        for i, partner in zip(anchors, positives, strict=True):
            negatives = [j for j in range(2 * n) if j not in (i, partner)]
            rows.append(s[i, [partner, *negatives]])
        logits = torch.stack(rows)
        out[f"logits_keyview{key_view}"] = logits.numpy()
        out[f"nce_keyview{key_view}"] = (s[anchors].logsumexp(1) - logits[:, 0]).mean().numpy()
    return {**out, "z_x": x.numpy(), "z_y": y.numpy()}


def auh_loss(arrays: Arrays) -> Arrays:
    coefficients = {name: float(arrays[name]) for name in ("sim_coeff", "unif_coeff", "scale")}
    step, out = loss_of(AUH(AUH.Config(mlp="1", **coefficients), _Nothing, "local"), arrays)
    x, y = unit(arrays)
    return {
        **out,
        "z_x": x.numpy(),
        "z_y": y.numpy(),
        "align": step.logs["align"].numpy(),
        "unif": step.logs["unif"].numpy(),
        "unif_x": uniformity(x, coefficients["scale"]).numpy(),
        "unif_y": uniformity(y, coefficients["scale"]).numpy(),
    }


def vicreg_loss(arrays: Arrays) -> Arrays:
    coefficients = {name: float(arrays[name]) for name in ("sim_coeff", "std_coeff", "cov_coeff")}
    method, n = VICReg(VICReg.Config(mlp="1", **coefficients), _Nothing, "local"), int(arrays["batch_size_arg"])
    method.global_batch_size = n
    step, out = loss_of(method, arrays)
    out |= {"align": step.logs["align"].numpy(), "std_loss": step.logs["std"].numpy(), "cov_loss": step.logs["cov"].numpy()}
    for view in ("x", "y"):
        z = torch.from_numpy(arrays[f"proj_{view}"])
        deviations = standard_deviations(z)
        out |= {
            f"std_{view}": deviations.numpy(),
            f"cov_{view}": covariance_matrix(centered(z) / (n - 1) ** 0.5).numpy(),
            f"std_loss_{view}": torch.relu(1 - deviations).mean().numpy(),
            f"cov_loss_{view}": squared_off_diagonal(z, n).numpy(),
        }
    return out


KINDS = {
    "sfrik/kernel": Kind(sfrik_kernel, ("t", "q", "weights")),
    "simclr/loss": Kind(simclr_loss, ("proj_?", "temperature")),
    "auh/loss": Kind(auh_loss, ("proj_?", "sim_coeff", "unif_coeff", "scale")),
    "vicreg/loss": Kind(vicreg_loss, ("proj_?", "sim_coeff", "std_coeff", "cov_coeff", "batch_size_arg")),
}
