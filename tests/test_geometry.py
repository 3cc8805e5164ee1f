"The Poincaré ball: identities (ten times tighter than geoopt's own tests), truth in 60 digits, gradients where arguments vanish, notes, bad input."
import copy
import io
import math

import mpmath
import pytest
import torch
from torch import nn

from adaptive_lab.wubu import geometry, tangent
from adaptive_lab.wubu.geometry import PoincareBall
from adaptive_lab.wubu.tangent import exact, tangent_add, tangent_dilate, tangent_dist

SEEDS, DTYPES = range(30, 40), (torch.float32, torch.float64)
RADII = (0.01, 0.03, 0.1, 0.5, 1, 3, 6, 9, 12, 17, 25, 33, 40)


@pytest.fixture(params=["kernel", "tensors"])
def way(request, monkeypatch):
    "With the kernel, if there is one here, and without."
    if request.param == "tensors":
        monkeypatch.setattr(tangent, "fits", lambda *x: False)
    return request.param


def close(a, b, low, high=(0, 1e-8)):
    "a and b within (atol, rtol): `low` in float32, `high` in float64."
    atol, rtol = low if a.dtype == torch.float32 else high
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


def finite(out, *inputs):
    "The sum of out has finite gradients."
    for g in torch.autograd.grad(out.sum(), inputs):
        assert g.isfinite().all()


class Case:
    "Points of 10 numbers and curvatures as geoopt's tests draw them: 1, a number, one a row, from 1e-15 to 1."

    def __init__(self, seed, dtype):
        g = torch.Generator().manual_seed(seed)
        rand = lambda *shape: torch.rand(*shape, generator=g, dtype=dtype)
        c = torch.ones((), dtype=dtype) if seed < 32 else 10 ** torch.arange(-15, 1, dtype=dtype) if seed == 39 else rand(100) if seed > 35 else rand(())
        self.B, self.c, self.dtype, self.rand = c.numel() if c.ndim else 100, c.requires_grad_(), dtype, rand
        self.ball = PoincareBall(self.c)
        self.a, self.b, self.d = (self.point(g) for _ in range(3))
        self.r1, self.r2 = ((rand(self.B) * 2 - 1).requires_grad_() for _ in range(2))
        self.v, self.w = (self.rand(self.B, 10).requires_grad_() for _ in range(2))

    def point(self, g):
        x = torch.randn(self.B, 10, generator=g, dtype=self.dtype) - 1
        x = x / x.norm(dim=-1, keepdim=True) * self.rand(self.B, 10)
        return (x * (1 / self.c.detach().sqrt()).clamp_max(100).expand(self.B)[:, None]).requires_grad_()


@pytest.fixture(params=[(s, d) for s in SEEDS for d in DTYPES], ids=lambda p: f"{p[0]}-{str(p[1])[6:]}")
def case(request, monkeypatch):
    "For odd seeds by the coordinates alone, without notes."
    if request.param[0] % 2:
        monkeypatch.setattr(geometry, "plainly", lambda: False)
    return Case(*request.param)


# Gyrovector laws


def test_left_cancellation(case):
    a, b, ball = case.a, case.b, case.ball
    back = ball.mobius_add(-a, ball.mobius_add(a, b))
    close(back, b, (5e-6, 5e-5))
    finite(back, a, b, case.c)


def test_zero_is_neutral_and_a_point_cancels(case):
    a, ball = case.a, case.ball
    zero = torch.zeros_like(a, requires_grad=True)
    assert torch.equal(ball.mobius_add(zero, a), a)
    torch.testing.assert_close(ball.mobius_add(a, zero), a, atol=0, rtol=1e-7)
    assert not ball.mobius_add(a, -a).any() and not ball.mobius_add(-a, a).any()
    finite(ball.mobius_add(zero, a) + ball.mobius_add(a, zero) + ball.mobius_add(a, -a), a, zero, case.c)


def test_negation_goes_through(case):
    a, b, ball = case.a, case.b, case.ball
    assert torch.equal(ball.mobius_add(-b, -a), -ball.mobius_add(b, a))


def test_gyroassociativity(case):
    "a ⊕ (b ⊕ d) = (a ⊕ b) ⊕ gyr[a, b]d, the gyration by its definition."
    a, b, d, ball = case.a, case.b, case.d, case.ball
    gyr = ball.mobius_add(-ball.mobius_add(a, b), ball.mobius_add(a, ball.mobius_add(b, d)))
    close(gyr.norm(dim=-1), d.norm(dim=-1), (1e-6, 1e-5))
    left, right = ball.mobius_add(a, ball.mobius_add(b, d)), ball.mobius_add(ball.mobius_add(a, b), gyr)
    close(left, right, (5e-6, 5e-5), (1e-10, 1e-8))


@pytest.mark.parametrize("n", range(5))
def test_n_additions(case, n):
    ball, a, y = case.ball, case.a, torch.zeros_like(case.a)
    for _ in range(n):
        y = ball.mobius_add(a, y)
    r = torch.tensor(float(n), requires_grad=True)
    z = ball.mobius_scalar_mul(r, a)
    close(y, z, (2e-7, 1e-4), (1e-6, 1e-4))
    finite(z, r, a, case.c)


def test_scalar_laws(case):
    a, r1, r2, ball = case.a, case.r1, case.r2, case.ball
    times, plus = ball.mobius_scalar_mul, ball.mobius_add
    close(plus(times(r1, a), times(r2, a)), times(r1 + r2, a), (5e-7, 1e-5), (1e-8, 1e-5))
    close(times(r1, times(r2, a)), times(r1 * r2, a), (1e-6, 1e-6), (1e-8, 1e-8))
    ra = times(r1, a)
    close(times(r1.abs(), a) / ra.norm(dim=-1, keepdim=True), a / a.norm(dim=-1, keepdim=True), (1e-7, 1e-6), (1e-11, 1e-8))
    close(times(1.0, a), a, (0, 1.2e-7), (0, 1e-14))
    finite(times(r1 + r2, a) + ra, a, r1, r2, case.c)


# Exponential maps, geodesics, distances


def test_exp_and_log_at_the_origin(case):
    ball, a = case.ball, case.a
    v = ball.logmap0(a)
    close(ball.expmap0(v), a, (1e-6, 1e-6))
    close(2 * v.norm(dim=-1), ball.dist0(a), (1e-6, 1e-6))
    finite(v + ball.expmap0(v), a, case.c)


@pytest.mark.parametrize("s", (1.0, 0.3, 2.5))
def test_exp_and_log_at_a_point(case, s):
    a, b = case.a, case.b
    ball = PoincareBall(case.c, torch.tensor(s, dtype=case.dtype, requires_grad=True))
    v = ball.logmap(a, b)
    end = ball.expmap(a, v)
    close(end, b, (5e-6, 1e-6))
    close(ball.expmap(a, v.detach().clone()).detach(), b, (5e-6, 1e-6))
    lam = 2 / (1 - case.c * (a * a).sum(-1))
    close(lam * s * v.norm(dim=-1), ball.dist(a, b), (1e-6, 1e-5))
    finite(end, a, b, case.c, ball.s)


def test_geodesics(case):
    "End points, equal segments, unit speed, and the same way back."
    a, b, ball = case.a, case.b, case.ball
    v, t = ball.logmap(a, b), torch.linspace(0, 1, 13, dtype=case.dtype)
    at = [ball.expmap(a, x * v) for x in t]
    close(at[0], a, (5e-6, 1e-6), (1e-11, 1e-8))
    close(at[-1], b, (5e-6, 1e-6), (1e-11, 1e-8))
    whole = ball.dist(a, b)
    for x, y in zip(at, at[1:]):
        close(ball.dist(x, y), whole / 12, (5e-4, 1e-6), (5e-4, 1e-6))
    back = ball.expmap(b, ball.logmap(b, a) / 2)
    close(back, ball.expmap(a, v / 2), (5e-6, 1e-6), (1e-11, 1e-8))


def test_distance_is_a_metric_invariant_under_translation(case):
    a, b, d, ball = case.a, case.b, case.d, case.ball
    ab = ball.dist(a, b)
    close(ball.dist(b, a), ab, (0, 2e-7), (0, 1e-14))
    assert (ab <= ball.dist(a, d) + ball.dist(d, b) + 1e-5).all()
    close(ball.dist(ball.mobius_add(d, a), ball.mobius_add(d, b)), ab, (1e-6, 1e-5))
    close(ball.dist0(ball.mobius_add(-a, b)), ab, (1e-6, 1e-5))
    finite(ab, a, b, case.c)


# Transport


def test_transport_keeps_inner_products(case):
    a, b, v, w, ball = case.a, case.b, case.v, case.w, case.ball
    lam2 = lambda x: (2 / (1 - exact(case.c) * (exact(x) ** 2).sum(-1))) ** 2
    zero = torch.zeros_like(a)
    for x, y in ((a, b), (zero, a), (a, zero)):
        before = lam2(x) * (exact(v) * exact(w)).sum(-1)
        after = lam2(y) * (exact(ball.transport(x, y, v)) * exact(ball.transport(x, y, w))).sum(-1)
        torch.testing.assert_close(after, before, atol=1e-7, rtol=1e-7)
    finite(ball.transport(a, b, v), a, b, v, case.c)


def test_transport_from_the_origin_there_and_back_and_along(case):
    a, b, v, ball = case.a, case.b, case.v, case.ball
    close(ball.transport(torch.zeros_like(a), a, v), v * (1 - case.c.expand(case.B) * (a * a).sum(-1))[:, None], (1e-7, 1e-6), (1e-7, 1e-7))
    assert torch.equal(ball.transport(a, a, v), v)
    there = ball.transport(a, b, v)
    scale = v.norm(dim=-1, keepdim=True)
    close(ball.transport(b, a, there) / scale, v / scale, (1e-6, 1e-6), (1e-11, 1e-8))
    middle = ball.expmap(a, ball.logmap(a, b) * 0.3)
    along = ball.transport(middle, b, ball.transport(a, middle, v))
    close(along / there.norm(dim=-1, keepdim=True), there / there.norm(dim=-1, keepdim=True), (2e-6, 2e-6), (1e-11, 1e-8))
    u, back = ball.transport(a, b, ball.logmap(a, b)), ball.logmap(b, a)  # the tangent of the geodesic stays its tangent
    close(u / u.norm(dim=-1, keepdim=True), -back / back.norm(dim=-1, keepdim=True), (2e-6, 2e-6), (1e-11, 1e-8))


# Midpoint and planes


def test_midpoint(case):
    a, b, d, ball = case.a, case.b, case.d, case.ball
    if case.c.ndim and case.c.numel() == 16:
        pytest.skip("the last axis but one is that of the points")
    points = torch.stack([a, b, d], 1)
    w = case.rand(case.B, 3).requires_grad_()
    two = ball.midpoint(points[:, :2])
    close(two, ball.expmap(a, ball.logmap(a, b) / 2), (5e-6, 1e-6), (1e-11, 1e-8))
    close(ball.dist(two, a), ball.dist(two, b), (1e-5, 1e-6))
    m = ball.midpoint(points, w)
    order = [2, 0, 1]
    close(ball.midpoint(points[:, order], w[:, order]), m, (1e-7, 1e-6), (1e-14, 1e-12))
    close(ball.midpoint(points, 7 * w), m, (1e-7, 1e-6), (1e-14, 1e-12))
    close(ball.midpoint(points, torch.tensor([0.0, 1.0, 0.0], dtype=case.dtype)), b, (1e-7, 1e-6), (1e-12, 1e-10))
    moved = torch.stack([ball.mobius_add(case.d.flip(0), x) for x in (a, b, d)], 1) if not case.c.ndim else None
    if moved is not None:
        close(ball.midpoint(moved, w), ball.mobius_add(case.d.flip(0), m), (5e-6, 5e-5), (1e-10, 1e-8))
    finite(m, a, b, d, w, case.c)


def test_midpoint_minimises_what_it_should():
    "The gyrobarycentre minimises Σ w (cosh(√c·d) − 1)."
    g = torch.Generator().manual_seed(0)
    ball, x, w = PoincareBall(0.7), torch.rand(5, 3, generator=g, dtype=torch.float64) - 0.5, torch.rand(5, generator=g, dtype=torch.float64)
    energy = lambda m: (w * (0.7**0.5 * ball.dist(m, x)).cosh()).sum()
    m = ball.midpoint(x, w).requires_grad_()
    assert torch.autograd.grad(energy(m), m)[0].abs().max() < 1e-13 < energy(m + 1e-3) - energy(m)


def test_distance_to_a_plane(case):
    "The geodesic that leaves the plane along its normal has its length as distance from it."
    a, v, ball = case.a, case.v, case.ball
    unit = v * ((1 - case.c.expand(case.B) * (a * a).sum(-1)) / (2 * v.norm(dim=-1)))[:, None]
    z = ball.expmap(a, unit)
    close(ball.dist_to_plane(z, a, unit), ball.dist(a, z), (2e-5, 1e-5), (2e-5, 1e-5))
    finite(ball.dist_to_plane(z, a, unit), a, v, case.c)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", (0.3, 1.0, 4.0))
def test_distance_to_a_plane_by_search(dtype, c):
    "The least distance to points of the plane, which is the exponential map of what is orthogonal to the normal."
    g = torch.Generator().manual_seed(3)
    draw = lambda: (torch.rand(2, generator=g, dtype=torch.float64) - 0.5) / c**0.5
    ball = PoincareBall(c)
    for _ in range(5):
        x, p, a = draw(), draw(), draw()
        normal = torch.stack([-a[1], a[0]]) / a.norm()
        low, high = -8.0, 8.0
        for _ in range(12):  # distances from a point along a geodesic are convex: halve the grid around its least
            t = torch.linspace(low, high, 33, dtype=torch.float64)
            d = ball.dist(x, ball.expmap(p, t[:, None] * normal / c**0.5 * (1 - c * p @ p)))
            i = d.argmin().clamp(1, 31)
            low, high = t[i - 1].item(), t[i + 1].item()
        torch.testing.assert_close(ball.dist_to_plane(*(t.to(dtype) for t in (x, p, a))).double(), d.min(), rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=1e-7 if dtype == torch.float32 else 1e-12)


# Truth


def true_dist(u, v, c, s):
    "The distance of exp0(u) and exp0(v) in 80 digits, by ball coordinates."
    c, s = mpmath.mpf(c), mpmath.mpf(s)
    norm2 = lambda x: mpmath.fsum(t * t for t in x)

    def point(v):
        n = mpmath.sqrt(norm2(v))
        return [mpmath.tanh(mpmath.sqrt(c) * s * n) * t / (mpmath.sqrt(c) * n) for t in v] if n else v

    x, y = point([mpmath.mpf(t) for t in u]), point([mpmath.mpf(t) for t in v])
    return 2 * mpmath.asinh(mpmath.sqrt(c * norm2([a - b for a, b in zip(x, y)]) / ((1 - c * norm2(x)) * (1 - c * norm2(y))))) / mpmath.sqrt(c)


def float32_pairs(seed, n, c=1.0, s=1.0):
    "Tangent vectors at all geodesic radii: any angle, any two radii, near and very near, parallel, antipodal, nearly so, and from the origin."
    g = torch.Generator().manual_seed(seed)
    e, f = nn.functional.normalize(torch.randn(2, len(RADII), n, generator=g), dim=-1)
    r = torch.tensor(RADII)[:, None] / (2 * s)
    u, noise, far = e * r, torch.randn(len(RADII), n, generator=g), r.flip(0)
    others = [f * r, f * far, e * far, e * r * 0.999, 2 * u, u + 1e-3 * r * noise, u + 1e-6 * r * noise, torch.nextafter(u, 2 * u), -u, -u + 1e-5 * r * noise, -e * far, 0 * u]
    w = (e * 64).round() / 64 * torch.exp2((r / 43).log2().round())  # few digits: 29w and 43w are parallel to the last bit
    return torch.cat([*[u] * len(others), 29 * w, -29 * w]), torch.cat([*others, 43 * w, 43 * w])


@pytest.mark.parametrize("seed, n, c, s", [(0, 2, 1.0, 1.0), (1, 5, 1.0, 1.0), (2, 17, 1.0, 1.0), (3, 5, 0.1, 1.0), (4, 5, 1.0, 0.25), (5, 3, 3.0, 2.0), (6, 40, 0.01, 5.0)])
def test_float32_distances_are_true(way, seed, n, c, s):
    u, v = float32_pairs(seed, n, c, s)
    ball = PoincareBall(c, s)
    with mpmath.workdps(80):
        truth = [true_dist(a, b, c, s) for a, b in zip(u.tolist(), v.tolist())]
        for d in (ball.tangent_dist(u, v), ball.dist(ball.expmap0(u), ball.expmap0(v)), ball.dist(ball.expmap0(v), ball.expmap0(u))):
            assert d.dtype == torch.float32
            assert max(abs(x - t) / t for x, t in zip(d.tolist(), truth) if t) < 1.2e-7
            assert not any(x for x, t in zip(d.tolist(), truth) if not t)


def test_distances_of_float32_points_are_those_of_the_points(way):
    "Without notes: the distance of the float32 coordinates as they are, to radius 9."
    u, v = float32_pairs(7, 5)
    x, y = PoincareBall().expmap0(u).clone(), PoincareBall().expmap0(v).clone()
    inside = (x.norm(dim=-1) < 0.9997) & (y.norm(dim=-1) < 0.9997)
    with mpmath.workdps(60):
        norm2 = lambda x: mpmath.fsum(mpmath.mpf(t) ** 2 for t in x)
        truth = [2 * mpmath.asinh(mpmath.sqrt(norm2([mpmath.mpf(p) - q for p, q in zip(a, b)]) / ((1 - norm2(a)) * (1 - norm2(b))))) for a, b in zip(x[inside].tolist(), y[inside].tolist())]
        d = PoincareBall().dist(x, y)[inside].tolist()
        assert len(d) > 50 and max(abs(a - t) / t for a, t in zip(d, truth) if t) < 1.2e-7


@pytest.mark.parametrize("c, s", [(1.0, 1.0), (0.2, 3.0), (5.0, 0.3)])
@pytest.mark.parametrize("n", (1, 2, 9, 128))
def test_chains_have_the_derivative_one(way, n, c, s):
    "Radially, in float32, at all radii: log0 ∘ exp0, with both c and s as tensors too, and log ∘ exp at a point."
    ball = PoincareBall(torch.tensor(c, requires_grad=True), torch.tensor(s, requires_grad=True))
    e = nn.functional.normalize(torch.randn(len(RADII), n, generator=torch.Generator().manual_seed(n)), dim=-1)
    v = (e * torch.tensor(RADII)[:, None] / (2 * s)).requires_grad_()
    y = ball.logmap0(ball.expmap0(v))
    assert torch.equal(y, v)
    g, by_c, by_s = torch.autograd.grad((y * e).sum(), (v, ball.c, ball.s), allow_unused=True)
    assert torch.equal(g, e) and not by_c and not by_s  # the identity, whatever c and s are
    d = ball.dist0(ball.expmap0(v))
    torch.testing.assert_close(d, 2 * s * v.norm(dim=-1), atol=0, rtol=3e-7)
    g, by_s = torch.autograd.grad(d.sum(), (v, ball.s))
    torch.testing.assert_close((g * e).sum(-1), torch.full((len(RADII),), 2 * s), atol=0, rtol=1e-6)
    torch.testing.assert_close(by_s, d.detach().sum() / s, atol=0, rtol=1e-6)
    if n > 1:
        x = ball.expmap0(0.7 * e.roll(1, -1) / s).detach()
        back = ball.logmap(x, ball.expmap(x, v))
        torch.testing.assert_close(back, v.detach(), atol=0, rtol=2e-6)
        torch.testing.assert_close((torch.autograd.grad((back * e).sum(), v)[0] * e).sum(-1), torch.ones(len(RADII)), atol=0, rtol=1e-6)


def test_the_radial_derivative_of_exp0_is_not_drowned_by_the_tangential_one(way):
    "In float32, for a gradient along the ray: s / cosh², down to 1e-8 of what is across it."
    s, rho = 1.3, torch.tensor([0.01, 0.5, 1.5, 3, 5, 7, 9, 10])[:, None]
    w = (nn.functional.normalize(torch.randn(8, 33, generator=torch.Generator().manual_seed(3)), dim=-1) * rho / s * 1024).round() / 1024
    v = (w * 3).requires_grad_()  # w is a third of v, to the last bit
    g = torch.autograd.grad((geometry.expmap0(v, 1.0, s / 3) * w).sum(), v)[0].double()
    true = w.double() * s / 3 / (s * w.double().norm(dim=-1, keepdim=True)).cosh() ** 2
    torch.testing.assert_close(g, true, rtol=2e-6, atol=0)


def test_curvature_that_depends_on_the_vectors(way):
    "A second derivative counts no path twice."
    found = []
    for dtype in DTYPES:
        v = torch.tensor([[0.3, 0.7], [1.1, -0.4]], dtype=dtype, requires_grad=True)
        c = 0.5 + v.square().mean()
        g = torch.autograd.grad(geometry.expmap0(v, c, 1.0).sum() + tangent_dist(v, v.flip(0), c, 1.0).sum(), v, create_graph=True)[0]
        found.append((g.double(), torch.autograd.grad(g.square().sum(), v)[0].double()))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_other_scales_in_a_chain():
    "log0 with another scale is a dilation, and learns."
    s1, s2, c = (torch.tensor(t, requires_grad=True) for t in (1.5, 0.5, 0.8))
    v = torch.tensor([[6.0, 8.0]], requires_grad=True)
    y = geometry.logmap0(geometry.expmap0(v, c, s1), c, s2)
    torch.testing.assert_close(y, 3 * v)
    by_v, by_1, by_2, by_c = torch.autograd.grad(y.sum(), (v, s1, s2, c), allow_unused=True)
    torch.testing.assert_close((by_v[0, 0], by_1, by_2), (torch.tensor(3.0), torch.tensor(28.0), torch.tensor(-84.0)))
    assert not by_c


@pytest.mark.parametrize("seed", range(5))
def test_sums_of_tangent_vectors_are_true(seed):
    c, s = (1.0, 1.0) if seed < 3 else (0.4, 1.7)
    u, v = float32_pairs(seed, 3, c, s)
    with mpmath.workdps(80):
        C, S = mpmath.mpf(c), mpmath.mpf(s)
        dot = lambda x, y: mpmath.fsum(a * b for a, b in zip(x, y))
        for a, b, found in zip(u.tolist(), v.tolist(), tangent_add(u, v, c, s).tolist()):
            x, y = ([mpmath.tanh(mpmath.sqrt(C) * S * n) * t / (mpmath.sqrt(C) * n) for t in w] if (n := mpmath.sqrt(dot(w, w))) else w for w in ([mpmath.mpf(t) for t in z] for z in (a, b)))
            xy, xx, yy = dot(x, y), dot(x, x), dot(y, y)
            z = [((1 + 2 * C * xy + C * yy) * p + (1 - C * xx) * q) / (1 + 2 * C * xy + C * C * xx * yy) for p, q in zip(x, y)]
            n = mpmath.sqrt(dot(z, z))
            truth = [mpmath.atanh(mpmath.sqrt(C) * n) / (mpmath.sqrt(C) * S * n) * t for t in z] if n else z
            assert mpmath.sqrt(dot([p - q for p, q in zip(found, truth)], [p - q for p, q in zip(found, truth)])) <= 1e-7 * mpmath.sqrt(dot(truth, truth)) + mpmath.mpf(10) ** -60


# Gradients


def cases_of_gradients(dtype=torch.float64):
    g = torch.Generator().manual_seed(5)
    rand = lambda *shape: torch.rand(*shape, generator=g, dtype=dtype)
    x, y, z = ((rand(2, 2) - 0.5).requires_grad_() for _ in range(3))
    c, s = (0.5 + rand(2)).requires_grad_(), (0.5 + rand(())).requires_grad_()
    return x, y, z, c, s


FUNCTIONS = {
    "expmap0": lambda f, x, y, z, c, s: f.expmap0(x, c, s),
    "logmap0": lambda f, x, y, z, c, s: f.logmap0(x, c, s),
    "expmap": lambda f, x, y, z, c, s: f.expmap(x, y, c, s),
    "logmap": lambda f, x, y, z, c, s: f.logmap(x, y, c, s),
    "dist": lambda f, x, y, z, c, s: f.dist(x, y, c) + 0 * s,
    "dist0": lambda f, x, y, z, c, s: f.dist0(x, c) + 0 * s,
    "mobius_add": lambda f, x, y, z, c, s: f.mobius_add(x, y, c) + 0 * s,
    "mobius_scalar_mul": lambda f, x, y, z, c, s: f.mobius_scalar_mul(s, x, c),
    "transport": lambda f, x, y, z, c, s: f.transport(x, y, z, c) + 0 * s,
    "midpoint": lambda f, x, y, z, c, s: f.midpoint(torch.stack([x, y, z], -2), s * torch.ones(2, 3, dtype=x.dtype), c),
    "dist_to_plane": lambda f, x, y, z, c, s: f.dist_to_plane(x, y, z, c) + 0 * s,
    "tangent_dist": lambda f, x, y, z, c, s: f.tangent_dist(4 * x, 4 * y, c, s),
    "tangent_add": lambda f, x, y, z, c, s: f.tangent_add(4 * x, 4 * y, c, s),
    "tangent_dilate": lambda f, x, y, z, c, s: f.tangent_dilate(x, c, s, s, c),
    "chain": lambda f, x, y, z, c, s: f.logmap(f.expmap0(y, c, s), f.expmap(f.expmap0(x, c, s), f.logmap0(f.mobius_add(f.expmap0(y, c, s), z, c), c, 1.0), c, s), c, s),
    "chain of distances": lambda f, x, y, z, c, s: f.dist(f.expmap0(x, c, s), f.expmap0(y, c, s), c) + f.dist(f.expmap0(x, c, s), z, c) + f.dist0(f.expmap(x, y, c, s), c),
    "chain with another c": lambda f, x, y, z, c, s: f.logmap0(f.expmap0(x, c, s), 0.5 * c, s) + f.logmap0(f.expmap0(y, c, s), c + 0, s),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_by_differences(name):
    "In float64, first and second, by every vector, by c (one a row) and by s."
    f = lambda *args: FUNCTIONS[name](geometry, *args)
    args = cases_of_gradients()
    assert torch.autograd.gradcheck(f, args)
    assert torch.autograd.gradgradcheck(f, args, atol=1e-4, fast_mode=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32_equals_float64(way, name):
    "Values, gradients and gradients of gradients in float32 are those of float64."
    results = []
    for dtype in DTYPES:
        args = [t.detach().float().to(dtype).requires_grad_() for t in cases_of_gradients()]
        out = FUNCTIONS[name](geometry, *args)
        weight = torch.linspace(0.5, 1, out.numel(), dtype=dtype).view_as(out)
        used = lambda grads: [torch.zeros_like(a) if g is None else g for a, g in zip(args, grads)]
        plain = used(torch.autograd.grad((out * weight).sum(), args, allow_unused=True, retain_graph=True))
        first = used(torch.autograd.grad((out * weight).sum(), args, allow_unused=True, create_graph=True))
        second = used(torch.autograd.grad(sum(g.pow(2).sum() for g in first), args, allow_unused=True))
        results.append([out, *plain, *first, *second])
    for low, high in zip(*results):
        torch.testing.assert_close(low.double(), high, rtol=3e-6, atol=3e-6 * high.abs().max().item() + 1e-7)


@pytest.mark.parametrize("c, s", [(1.0, 1.0), (0.3, 2.0)])
def test_float32_gradients_of_distances_are_true(way, c, s):
    "By u, v, c and s, at all radii and angles: float64 with the same inputs, and that against differences in 80 digits."
    u, v = (t.requires_grad_() for t in float32_pairs(11, 3, c, s))
    g = {}
    for dtype in DTYPES:
        args = [u.detach().to(dtype).requires_grad_(), v.detach().to(dtype).requires_grad_(), *(torch.tensor(t).to(dtype).expand(len(u)).clone().requires_grad_() for t in (c, s))]
        g[dtype] = torch.autograd.grad(tangent_dist(*args).sum(), args)
    for low, high in zip(*g.values()):
        scale = high.norm(dim=-1, keepdim=True) if high.ndim > 1 else high.abs() + 1e-6
        assert ((low - high).abs() <= 1e-6 * scale).all()
    if c == 1.0 and way == "kernel":
        with mpmath.workdps(120):
            for i in range(0, len(u), 3):
                if (u[i] == v[i]).all():
                    continue
                for which, x in enumerate((u[i], v[i])):
                    e, h = mpmath.mpf(10) ** -40, [mpmath.mpf(t) for t in x.tolist()]
                    pair = lambda w: (w, v[i].tolist()) if which == 0 else (u[i].tolist(), w)
                    truth = [(true_dist(*pair([*h[:j], h[j] + e, *h[j + 1 :]]), c, s) - true_dist(*pair(h), c, s)) / e for j in range(3)]
                    found = g[torch.float64][which][i].tolist()
                    size = mpmath.sqrt(sum(t * t for t in truth))
                    if any(h):
                        assert all(abs(a - t) <= 1e-9 * size for a, t in zip(found, truth)), (i, which)


def test_where_arguments_vanish(way):
    "Values and gradients at v = 0, x = 0, x = y, r = 0 are the limits, in both dtypes."
    for dtype in DTYPES:
        ball = PoincareBall(torch.tensor(0.7, dtype=dtype, requires_grad=True), 1.5)
        zero, one = torch.zeros(2, 3, dtype=dtype), torch.ones(2, 3, dtype=dtype)
        x = torch.tensor([[0.3, -0.2, 0.5], [0.1, 0.6, 0.2]], dtype=dtype)

        def grad(f, *at):
            at = [t.clone().requires_grad_() for t in at]
            out = f(*at)
            return [out.detach(), *torch.autograd.grad(out.sum(), [*at, ball.c], allow_unused=True)[: len(at)]]

        gap = 1 - 0.7 * (x * x).sum(-1, keepdim=True)
        direction = x / x.norm(dim=-1, keepdim=True)
        for found, *limits in [
            (grad(ball.expmap0, zero), zero, 1.5 * one),
            (grad(ball.logmap0, zero), zero, one / 1.5),
            (grad(lambda v: ball.expmap(x, v), zero), x, 1.5 * one),
            (grad(lambda y: ball.logmap(x, y), x), zero, one / 1.5),
            (grad(lambda x: ball.logmap(x, x.detach()), x), zero, -one / 1.5),
            (grad(ball.dist0, zero), zero[:, 0], zero),
            (grad(ball.dist, x, x), zero[:, 0], zero, zero),
            (grad(ball.dist, zero, zero), zero[:, 0], zero, zero),
            (grad(ball.dist, zero, x), ball.dist0(x), -2 * direction, 2 * direction / gap),
            (grad(ball.tangent_dist, zero, zero), zero[:, 0], zero, zero),
            (grad(ball.tangent_dist, x, x), zero[:, 0], zero, zero),
            (grad(ball.tangent_dist, zero, x), 3 * x.norm(dim=-1), -3 * direction, 3 * direction),
            (grad(ball.tangent_dist, x, zero), 3 * x.norm(dim=-1), 3 * direction, -3 * direction),
            (grad(ball.tangent_add, zero, x), x),
            (grad(ball.tangent_add, x, -x), zero),
            (grad(lambda y: ball.mobius_add(-x, y), x), zero, one / gap),
            (grad(lambda y: ball.mobius_add(zero, y), x), x, one),
            (grad(lambda a: ball.mobius_scalar_mul(0.0, a), x), zero, zero),
            (grad(lambda a: ball.mobius_scalar_mul(2.0, a), zero), zero, 2 * one),
            (grad(lambda v: ball.transport(x, x, v), one), one, one),
            (grad(lambda v: ball.transport(zero, zero, v), one), one, one),
            (grad(lambda y: ball.midpoint(torch.stack([y, y], -2)), x), x, one),
            (grad(lambda y: ball.midpoint(torch.stack([y, y], -2)), zero), zero, one),
            (grad(lambda p: ball.dist_to_plane(p, x, one), x), zero[:, 0], zero),
        ]:
            for a, b in zip(found, limits):
                torch.testing.assert_close(a, b.detach(), atol=2e-6 if dtype == torch.float32 else 1e-12, rtol=1e-6)
            assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("tiny", (1e-4, 1e-8, 1e-15, 1e-25, 1e-37))
def test_tiny_vectors_are_a_euclidean_space(way, tiny):
    u, v = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(1)) * tiny
    ball = PoincareBall(0.6, 1.5)
    u, v = u.requires_grad_(), v.requires_grad_()
    euclid = 3 * (u.double() - v.double()).norm(dim=-1).float()
    d = ball.tangent_dist(u, v)
    torch.testing.assert_close(d, euclid, rtol=1e-6, atol=0)
    torch.testing.assert_close(ball.dist(ball.expmap0(u).clone(), ball.expmap0(v).clone()), euclid, rtol=1e-6, atol=0)
    torch.testing.assert_close(ball.expmap0(u), 1.5 * u, rtol=1e-6, atol=0)
    g = torch.autograd.grad(d.sum(), u)[0]
    torch.testing.assert_close(g.norm(dim=-1), torch.full((20,), 3.0), rtol=1e-5, atol=0)


# The kernel's other inputs


def test_shapes_and_layouts(way):
    "Broadcast batches, strides, one vector, no vectors, c one a row; gradients of a sum and of each."
    g = torch.Generator().manual_seed(2)
    u, v = torch.randn(4, 1, 7, generator=g), torch.randn(3, 7, generator=g)
    c, s = torch.rand(4, 3, generator=g) + 0.5, torch.rand(3, generator=g) + 0.5
    d = tangent_dist(u, v, c, s)
    assert d.shape == (4, 3)
    for i in range(4):
        for j in range(3):
            torch.testing.assert_close(d[i, j], tangent_dist(u[i, 0].double(), v[j].double(), c[i, j].double(), s[j].double()).float(), rtol=3e-7, atol=0)
    ball = PoincareBall(c, s)
    assert ball.expmap0(v).shape == (4, 3, 7) and ball.logmap0(ball.expmap0(v)).shape == (4, 3, 7)
    wide = torch.randn(7, 5, generator=g).T.requires_grad_()
    assert not wide.is_contiguous()
    for weight in (torch.ones(()).expand(5, 7), torch.randn(5, 7, generator=g), torch.randn(5, 1, generator=g).expand(5, 7)):
        fast = torch.autograd.grad(PoincareBall().expmap0(wide), wide, weight)[0]
        slow = torch.autograd.grad(PoincareBall().expmap0(wide.double()), wide, weight.double())[0]
        torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-7)
    one = torch.tensor([0.3, 0.4], requires_grad=True)
    assert PoincareBall().expmap0(one).shape == (2,) and PoincareBall().tangent_dist(one, -one).shape == ()
    PoincareBall().tangent_dist(one, -one).backward()
    torch.testing.assert_close(one.grad, torch.tensor([2.4, 3.2]))
    for n in (0, 5):
        empty = torch.zeros(0, n)
        assert PoincareBall().expmap0(empty).shape == (0, n) and PoincareBall().tangent_dist(empty, empty).shape == (0,)


@pytest.mark.parametrize("threads", (1, 2))
def test_large_results_are_the_same(threads):
    "Results of a megabyte, which are written past the caches, are bit for bit those of their parts."
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        g = torch.Generator().manual_seed(0)
        u, v, weight = torch.randn(3, 4100, 64, generator=g) * 0.3
        every = torch.randn(4100, generator=g)

        def all_of(u, v, weight, every):
            u, v, ball = u.clone().requires_grad_(), v.clone().requires_grad_(), PoincareBall(0.7, 1.2)
            x, d, e = ball.expmap0(u), ball.tangent_dist(u, v), ball.dist(u / 9, v / 9)
            grads = [torch.autograd.grad(x, u, weight, retain_graph=True), torch.autograd.grad(x.sum(), u), torch.autograd.grad(d, (u, v), every), torch.autograd.grad(e, (u, v), every)]
            return [x, d, e, ball.logmap0(u / 9), *(t for pair in grads for t in pair)]

        large = all_of(u, v, weight, every)
        parts = [all_of(*(t[i : i + 100] for t in (u, v, weight, every))) for i in range(0, 4100, 100)]
        for a, pieces in zip(large, zip(*parts), strict=True):
            assert torch.equal(a, torch.cat(pieces))
    finally:
        torch.set_num_threads(before)


def test_not_finite_stays_so(way):
    for bad in (math.nan, math.inf):
        u = torch.tensor([[bad, 1.0], [0.1, 0.2]])
        d = PoincareBall().tangent_dist(u, torch.ones(2, 2))
        assert not d[0].isfinite() and d[1].isfinite()
        x = PoincareBall().expmap0(u)
        assert x[0].isnan().any() and x[1].isfinite().all()


def test_far_beyond_what_is_asked(way):
    u, v = torch.tensor([[200.0, 0.0], [1e5, 0.0], [0.0, 1e4]], requires_grad=True), torch.tensor([[0.0, 200.0], [-1e5, 0.0], [0.0, 0.0]])
    d = PoincareBall().tangent_dist(u, v)
    torch.testing.assert_close(d, torch.tensor([800 - 2 * math.log(2) / 2, 4e5, 2e4]), rtol=1e-6, atol=0)
    assert torch.autograd.grad(d.sum(), u)[0].isfinite().all()


def test_points_on_the_boundary_and_past_it_count_as_inside(way):
    x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [3.0, 0.0]], requires_grad=True)
    ball = PoincareBall()
    for out in (ball.logmap0(x), ball.dist(x, torch.zeros(2)), ball.dist(x, -x), ball.mobius_add(x, x.flip(0)), ball.expmap(x, x), ball.logmap(x, 0.5 * x), ball.transport(x, 0.5 * x, x)):
        assert out.isfinite().all()
        finite(out, x)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_computes_in_full(dtype):
    u, v = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    ball = PoincareBall()
    torch.testing.assert_close(ball.tangent_dist(u, v), ball.tangent_dist(u.double(), v.double()).to(dtype), rtol=0, atol=0)
    assert ball.dist(ball.expmap0(u), ball.expmap0(v)).dtype == dtype


def test_transforms_of_torch():
    "vmap, Jacobians in both modes, and a functional gradient see tensor operations."
    ball, v = PoincareBall(0.7), torch.tensor([[0.3, 0.4], [0.0, 0.0], [1.0, 2.0]])
    torch.testing.assert_close(torch.vmap(ball.expmap0)(v), ball.expmap0(v))
    back = torch.func.jacrev(lambda v: ball.logmap0(ball.expmap0(v)))(v[0])
    ahead = torch.func.jacfwd(lambda v: ball.logmap0(ball.expmap0(v)))(v[0])
    torch.testing.assert_close((back, ahead), (torch.eye(2), torch.eye(2)))
    torch.testing.assert_close(torch.func.grad(lambda v: ball.tangent_dist(v, v.flip(0)))(v[2]), torch.autograd.functional.jacobian(lambda v: ball.tangent_dist(v, v.flip(0)), v[2]))


def test_without_a_kernel_the_same(monkeypatch):
    u, v = float32_pairs(3, 6)
    found = []
    for on in (True, False):
        monkeypatch.setattr(tangent, "fits", tangent.fits if on else lambda *x: False)
        u_, v_, c = u.clone().requires_grad_(), v.clone().requires_grad_(), torch.tensor(0.8, requires_grad=True)
        d = tangent_dist(u_, v_, c, 1.1)
        found.append((d, *torch.autograd.grad(d.sum(), (u_, v_, c))))
    for a, b in zip(*found):
        scale = b.norm(dim=-1, keepdim=True) if b.ndim == 2 else b.abs()
        assert ((a - b).abs() <= 1e-6 * scale).all()


# Notes


def test_a_note_is_read_only_while_it_is_true():
    "After any change of the point, of v, c or s, the coordinates count."
    for change in ("x", "v", "c", "s", "x[0]"):
        v, c, s = torch.tensor([[1.0, 0.5]]), torch.tensor(1.0), torch.tensor(1.0)
        x = geometry.expmap0(v, c, s)
        assert geometry.note_of(x)
        target = {"x": x, "v": v, "c": c, "s": s, "x[0]": x[0]}[change]
        target.mul_(0.5)
        assert geometry.note_of(x) is None
        torch.testing.assert_close(geometry.logmap0(x, c, s), geometry.logmap0(x.clone(), c, s), rtol=0, atol=0)


def test_new_tensors_have_no_note():
    x = PoincareBall().expmap0(torch.tensor([[6.0, 8.0]]))
    for y in (x.clone(), x.detach(), x + 0, x[:], x.view(2), x.double(), nn.Parameter(x), copy.copy(x), copy.deepcopy(x)):
        assert geometry.note_of(y) is None
    assert PoincareBall().dist0(x) == 20 != PoincareBall().dist0(x.clone())


def test_a_point_is_saved_as_a_tensor_and_forgotten_with_it():
    x, file = PoincareBall().expmap0(torch.tensor([[6.0, 8.0]])), io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), x)
    before = len(geometry.notes)
    del x
    assert len(geometry.notes) == before - 1


def test_a_point_made_without_gradients_is_a_constant():
    "Its distance moves with c as that of fixed coordinates does, and nothing flows to what it was made of."
    v, c = torch.tensor([[1.0, 0.5]], requires_grad=True), torch.tensor(0.7, requires_grad=True)
    with torch.no_grad():
        x = geometry.expmap0(v, c, 1.0)
        y = geometry.expmap(x, 0.1 * v, c, 1.0)
    for f in (lambda x, y: geometry.dist(x, y, c), lambda x, y: geometry.dist0(x, c) + geometry.dist0(y, c), lambda x, y: geometry.logmap0(x, c, 1.0), lambda x, y: geometry.logmap(x, y, c, 1.0)):
        noted, plain = f(x, y).sum(), f(x.clone(), y.clone()).sum()
        torch.testing.assert_close(noted, plain, rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.autograd.grad(noted, c), torch.autograd.grad(plain, c), rtol=1e-4, atol=1e-5)
        assert torch.autograd.grad(f(x, y).sum(), v, allow_unused=True)[0] is None


def test_a_point_whose_gradient_is_asked_for_gets_it():
    v = torch.tensor([[1.0, 0.5]])
    leaf = PoincareBall().expmap0(v).requires_grad_()
    kept = PoincareBall().expmap0(v.clone().requires_grad_())
    kept.retain_grad()
    twin = PoincareBall().expmap0(v).double().requires_grad_()
    for x in (leaf, kept, twin):
        PoincareBall().logmap0(x).sum().backward()
    for x in (leaf, kept):
        torch.testing.assert_close(x.grad, twin.grad.float())


def test_inference_mode_compares_the_point():
    ball, v = PoincareBall(), torch.tensor([[12.0, 16.0]])
    with torch.inference_mode():
        x = ball.expmap0(v)
        assert ball.dist0(x) == 40 and torch.equal(ball.logmap0(x), v)
        y = ball.mobius_add(x, x)
        assert abs(ball.dist0(y) - 80) < 1e-4
        x.mul_(0.5)
        assert ball.dist0(x) < 2


def test_another_curvature_reads_the_coordinates():
    "The point of one ball in another: the same coordinates, another radius."
    x = geometry.expmap0(torch.tensor([[2.0, 1.0]]), 1.0, 1.0)
    for c in (0.3, 0.9999, torch.tensor(0.5)):
        torch.testing.assert_close(geometry.dist0(x, c), geometry.dist0(x.double(), c).float(), rtol=1e-5, atol=0)
    assert geometry.dist0(x, 4.0).isfinite()
    a, b = (torch.tensor(1.0, requires_grad=True) for _ in range(2))  # equal, but not the same
    v = torch.tensor([[2.0, 1.0]], requires_grad=True)
    y = geometry.logmap0(geometry.expmap0(v, a, 1.0), b, 1.0).sum()
    torch.testing.assert_close(y, v.sum())
    by_a, by_b = torch.autograd.grad(y, (a, b))
    rho = 5**0.5
    torch.testing.assert_close(by_a, torch.tensor(3 * (rho - math.sinh(rho) * math.cosh(rho)) / (2 * rho)))
    torch.testing.assert_close(by_b, -by_a)


# Bad input


def test_bad_input_is_named():
    for bad in (0, -1.0, math.nan, math.inf, torch.tensor([1.0, -1.0]), "1", None):
        for name in "cs":
            with pytest.raises(ValueError, match=f"{name} must be"):
                PoincareBall(**{name: bad})
    ball, x = PoincareBall(), torch.zeros(2, 3)
    for f in (lambda: ball.expmap0(torch.zeros(2, 3, dtype=torch.int64)), lambda: ball.dist(x, torch.zeros(2, 4)), lambda: ball.tangent_dist(x, torch.zeros(2, 1)), lambda: ball.mobius_add(x, torch.zeros(4))):
        with pytest.raises(ValueError, match="vectors must be"):
            f()


def test_what_is_no_vector_is_named():
    ball = PoincareBall()
    for f in (lambda: ball.expmap0([1.0, 2.0]), lambda: ball.expmap0(torch.tensor(1.0)), lambda: ball.expmap0(v=3.0)):
        with pytest.raises(ValueError, match="v must be a tensor of vectors"):
            f()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("radius", (30.0, 100.0, 400.0, 3000.0))
def test_finite_points_have_finite_distances_and_gradients(radius, dtype):
    "Gaps below what float64 can hold count as the least one, not as 0."
    ball, near = PoincareBall(), torch.tensor([0.3, 0.1], dtype=dtype)
    v = torch.tensor([radius / 2, 0.0], dtype=dtype, requires_grad=True)
    x = ball.expmap(ball.expmap0(near), v)
    found = [ball.dist(x, near), ball.dist0(x), ball.dist_to_plane(x, near, near), ball.dist_to_plane(ball.expmap0(v), ball.expmap0(near * radius), near), ball.dist(ball.mobius_add(ball.expmap0(v), near), near)]
    for d in found:
        (g,) = torch.autograd.grad(d, v, retain_graph=True)
        assert 0 < d < 4 * radius and g.isfinite().all(), (d, g)


def test_the_ball_learns_its_curvature_and_scale():
    "A gradient step on c and s fits distances."
    ball = PoincareBall(nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(1.0)))
    u, v = torch.randn(2, 64, 3, generator=torch.Generator().manual_seed(0))
    target = tangent_dist(u, v, 0.5, 1.6)
    optimizer = torch.optim.Adam([ball.c, ball.s], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (ball.dist(ball.expmap0(u), ball.expmap0(v)) - target).pow(2).mean().backward()
        optimizer.step()
    assert abs(ball.c - 0.5) < 0.02 and abs(ball.s - 1.6) < 0.02


def test_dilation():
    v = torch.tensor([[0.3, 0.4]])
    w = tangent_dilate(v, 1.0, 2.0, 4.0, 0.5)
    x, y = geometry.expmap0(v, 1.0, 2.0), geometry.expmap0(w, 4.0, 0.5)
    torch.testing.assert_close(x, 2 * y)
    torch.testing.assert_close(PoincareBall(1.0, 2.0).tangent_dilate(v, PoincareBall(4.0, 0.5)), w)
