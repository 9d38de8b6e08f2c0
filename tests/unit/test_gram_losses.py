"""MMD, uniformity, NT-Xent and VICReg's statistics: closed-form gradients, chunks, 16-bit products, values that are known."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastssl.bench.machine import peak_bytes
from fastssl.losses import pairs
from fastssl.losses.mmd import kernel_coefficients, legendre, mmd_uniform, polynomial
from fastssl.losses.nt_xent import nt_xent
from fastssl.losses.uniformity import uniformity
from fastssl.losses.vicreg import covariance, variance_hinge
from tests.dense_losses import LOSSES, dense_covariance, dense_mmd, dense_uniformity, value_and_gradients, views

PUBLISHED = (1.0, 40.0, 40.0)


# ------------------------------------------------------------------------------------------------ values and gradients


@pytest.mark.parametrize("shape", [(12, 20), (15, 7)], ids=["wide", "tall"])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_those_of_the_dense_formula(name: str, shape: tuple[int, int], monkeypatch):
    # Five rows at a time, and the rest.
    monkeypatch.setattr(pairs, "_CHUNK", 5 * shape[0])
    ours, dense = LOSSES[name]
    x, y = views(*shape)
    for actual, expected in zip(value_and_gradients(ours, x, y), value_and_gradients(dense, x, y), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


def test_legendre_polynomials_integrate_to_zero_and_are_one_at_one():
    """Against the density of t = u . v of uniform points, (1 - t^2)^((q - 3) / 2)."""
    t = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    for dim in (3, 8, 64):
        density = (1 - t.square()) ** ((dim - 3) / 2)
        for k, coefficients in enumerate(legendre(6, dim)[1:], 1):
            p = polynomial(t, coefficients)
            assert abs(float((p * density).sum() / density.sum())) < 1e-5, f"P_{k} in dimension {dim}"
            assert float(p[-1]) == pytest.approx(1, abs=1e-12)


def test_derivative_of_the_kernel():
    t = torch.linspace(-1, 1, 101, dtype=torch.float64)
    power, slope = kernel_coefficients((1.0, 40.0, 40.0, 2.0, 3.0), 16)
    numeric = (polynomial(t + 1e-6, power) - polynomial(t - 1e-6, power)) / 2e-6
    torch.testing.assert_close(polynomial(t, slope), numeric, rtol=1e-7, atol=1e-6)


def test_mmd_of_a_collapse_and_of_uniform_points():
    z = F.normalize(torch.randn(1, 64, dtype=torch.float64), dim=1).repeat(16, 1)
    assert float(mmd_uniform(z, PUBLISHED)) == pytest.approx(81)
    generator = torch.Generator().manual_seed(0)
    uniform = F.normalize(torch.randn(512, 64, generator=generator, dtype=torch.float64), dim=1)
    assert float(mmd_uniform(uniform, PUBLISHED)) == pytest.approx(81 / 512, rel=0.05)


def test_mmd_does_not_change_under_rotation():
    x, _ = views(16, 24)
    z = F.normalize(x, dim=1)
    rotation, _ = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    assert float(mmd_uniform(z @ rotation, PUBLISHED)) == pytest.approx(float(mmd_uniform(z, PUBLISHED)), rel=1e-12)


def test_known_values_of_the_baselines():
    same = F.normalize(torch.randn(1, 32, dtype=torch.float64), dim=1).repeat(8, 1)
    assert float(uniformity(same, 2.5)) == pytest.approx(0, abs=1e-12)
    assert float(nt_xent(same, same, 0.15)) == pytest.approx(math.log(15))
    orthogonal = torch.eye(8, 32, dtype=torch.float64)
    assert float(nt_xent(orthogonal, orthogonal, 0.15)) == pytest.approx(math.log(1 + 14 * math.exp(-1 / 0.15)))
    assert float(variance_hinge(same, same)) == pytest.approx(0.99)
    assert float(covariance(same, same, 8)) == pytest.approx(0, abs=1e-12)


def test_covariance_is_that_of_the_smaller_side(monkeypatch):
    """Neither the Gram matrix of more rows nor that of more columns is ever formed."""
    seen = []
    monkeypatch.setattr("fastssl.losses.vicreg.pair_sum", lambda x, *a, **k: seen.append("rows") or x.new_zeros(()))
    monkeypatch.setattr("fastssl.losses.vicreg.covariance_matrix", lambda x: seen.append("columns") or x.new_zeros(1, 1))
    for shape in ((4, 9), (9, 4)):
        covariance(*views(*shape), 9)
    assert seen == ["rows", "rows", "columns", "columns"]


# ------------------------------------------------------------------------------------------------ precision


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def uniform() -> tuple[torch.Tensor, torch.Tensor]:
    """The worst case of SFRIK, points that are spread already; value and gradient in float64."""
    x = torch.randn(384, 2048, generator=torch.Generator().manual_seed(0))
    return x, value_and_gradients(lambda x, _: dense_mmd(F.normalize(x, dim=1), PUBLISHED), x.double(), x[:0].double())[1]


@pytest.mark.parametrize(
    ("dtype", "least", "most"),
    [(torch.bfloat16, 1e-3, 6e-3), (torch.float16, 1e-4, 1e-3), (None, 0, 3e-6)],
    ids=["bf16", "fp16", "fp32"],
)
def test_error_of_the_gradient(uniform, dtype: torch.dtype | None, least: float, most: float):
    """Section 12 of methods/sfrik.md: with the diagonal left out about a quarter of the error that a 16-bit product has with it."""
    x, exact = uniform

    def mmd(x, _):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            return mmd_uniform(F.normalize(x.float(), dim=1), PUBLISHED)

    value, grad, _ = value_and_gradients(mmd, x, x[:0])
    assert value.dtype is grad.dtype is torch.float32
    error = relative(grad, exact)
    assert least < error < most
    if dtype is not None:
        z = F.normalize(x, dim=1).requires_grad_()
        rows = z.detach().to(dtype).float()
        slope = polynomial(rows @ rows.T, kernel_coefficients(PUBLISHED, 2048)[1]).to(dtype).float()
        with_diagonal = 2 / len(x) ** 2 * slope @ rows
        tangential = (with_diagonal - (with_diagonal * z).sum(1, keepdim=True) * z) / x.norm(dim=1, keepdim=True)
        assert error < relative(tangential.detach(), exact) / 2.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["mmd L=3", "nt_xent", "uniformity", "variance", "covariance"])
def test_autocast_changes_little(name: str, dtype: torch.dtype):
    ours, dense = LOSSES[name]

    def cast(x, y):
        with torch.autocast("cpu", dtype=dtype):
            return ours(x, y)

    x, y = views(48, 256, torch.float32)
    value, *grads = value_and_gradients(cast, x, y)
    exact, *exact_grads = value_and_gradients(dense, x.double(), y.double())
    assert value.dtype is torch.float32
    assert float(value) == pytest.approx(float(exact), rel=5e-4)
    for grad, expected in zip(grads, exact_grads, strict=True):
        assert relative(grad, expected) < (8e-3 if dtype is torch.bfloat16 else 1.5e-3)


@pytest.mark.parametrize(
    ("loss", "dense", "std"),
    [
        (lambda x, _: uniformity(F.normalize(x.float(), dim=1), 16.0), lambda x, _: dense_uniformity(F.normalize(x, dim=1), 16.0), 1.0),
        (lambda x, y: covariance(x, y, 64), lambda x, y: dense_covariance(x, 64) + dense_covariance(y, 64), 60.0),
    ],
    ids=["uniformity, a narrow kernel", "covariance, long rows"],
)
def test_fp16_holds_gradients_of_any_range(loss, dense, std: float):
    """exp(-2 s) and the products of long rows are beyond fp16; the coefficients of a row share a scale."""
    x = std * torch.randn(64, 2048, generator=torch.Generator().manual_seed(0))
    y = x.flip(1)

    def cast(x, y):
        with torch.autocast("cpu", dtype=torch.float16):
            return loss(x, y)

    grad, exact = (value_and_gradients(f, a, b)[1] for f, a, b in ((cast, x, y), (dense, x.double(), y.double())))
    assert relative(grad, exact) < 1e-3


def test_a_scaled_fp16_loss_neither_overflows_nor_vanishes():
    """The scaler's 2^16, and 1/N^2 of a large batch, meet only in fp32."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    grads = []
    for scale in (1.0, 2.0**16):
        z = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.float16):
            (scale * mmd_uniform(F.normalize(z, dim=1), PUBLISHED)).backward()
        grads.append(z.grad / scale)
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ memory, compiled


def test_peak_memory(monkeypatch):
    """C and the gradient are all that grows: T, k and k' are never whole, and no second matrix of N x q is made."""
    rows, dim, chunk = 256, 1024, 16
    monkeypatch.setattr(pairs, "_CHUNK", chunk * rows)
    z = F.normalize(torch.randn(rows, dim), dim=1).requires_grad_()
    peak = peak_bytes(lambda: torch.autograd.grad(mmd_uniform(z, PUBLISHED), z), z.device)
    assert peak < 4 * (rows * dim + rows * rows + 4 * chunk * rows)


@pytest.mark.slow
def test_compiled_is_eager_in_one_graph():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    names = ["mmd L=3", "nt_xent", "uniformity", "variance", "covariance"]

    def losses(x, y):
        return torch.stack([LOSSES[name][0](x, y) for name in names]).sum()

    compiled = torch.compile(losses, fullgraph=True, dynamic=False)
    for seed in range(3):
        x, y = (v + seed for v in views(12, 20))
        for actual, expected in zip(value_and_gradients(compiled, x, y), value_and_gradients(losses, x, y), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
