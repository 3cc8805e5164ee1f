"WuBu levels: every tensor lives, lists fit, numbers are set safely, float32 holds at the extremes; rotations and maps."
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_lab.knobs import KnobError
from adaptive_lab.wubu.ablations import OFF, ablated, matched, parameters
from adaptive_lab.wubu.landmarks import Flat, Hyperbolic, inward, mean_way, outward, weights
from adaptive_lab.wubu.level_kernel import kernel
from adaptive_lab.wubu.levels import WuBuConfig, WuBuLevels
from adaptive_lab.wubu.maps import QuaternionLinear, TangentMap
from adaptive_lab.wubu.rotations import QuaternionRotation, SpecialOrthogonal, cayley, rotation, skew
from adaptive_lab.wubu.tangent import tangent_add, tangent_dilate, tangent_dist

SMALL = dict(hyperbolic_dims=[8, 12, 4], dropout=0.0)


def made(seed=0, input_dim=6, world=Hyperbolic, **knobs):
    torch.manual_seed(seed)
    return WuBuLevels(WuBuConfig(**SMALL | knobs), input_dim, world)


def dead(model, x, seed=0):
    "Names of the parameters that a generic loss gives no gradient."
    out = model(x)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(seed))
    (out * weight).sum().backward()
    return [name for name, w in model.named_parameters() if w.grad is None or not w.grad.isfinite().all() or not w.grad.abs().max() > 0]


@st.composite
def configs(draw):
    n = draw(st.integers(1, 4))
    pick = lambda *choices, size: draw(st.lists(st.sampled_from(choices), min_size=size, max_size=size))
    return dict(
        num_levels=n,
        hyperbolic_dims=pick(4, 8, 12, size=n),
        boundary_points_per_level=pick(0, 1, 3, size=n),
        initial_curvatures=pick(0.01, 1.0, 9.0, size=n),
        initial_scales=pick(0.1, 1.0, 3.0, size=n),
        initial_spread_values=draw(st.sampled_from([None, [0.5] * n, [None, *[2.0] * (n - 1)]])),
        rotation_types=pick("so_n", "quat", "identity", size=n - 1),
        transform_types=pick("mlp", "linear", "quat", size=n - 1),
        relative_vector_aggregation=draw(st.sampled_from(["mean", "sum", "none"])),
        tangent_flow_type=draw(st.sampled_from(["mlp", "linear", "none"])),
        tangent_flow_scale=draw(st.sampled_from([1.0, 0.3, 0.0])),
        **{k: draw(st.booleans()) for k in ("no_learnable_curvature", "no_learnable_scales", "no_learnable_spread", "no_level_descriptors", "no_level_spread", "no_tangent_flow")},
    )


@given(configs(), st.integers(0, 99), st.booleans())
@settings(max_examples=80, deadline=None, database=None)
def test_every_learnable_tensor_has_a_gradient(knobs, seed, flat):
    torch.manual_seed(seed)
    model = WuBuLevels(WuBuConfig(**knobs), 5, Flat if flat else Hyperbolic)
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(seed))
    assert dead(model, x, seed) == []
    names = {name.split(".")[-2] for name, _ in model.named_parameters() if name.endswith("raw")}
    for what, off in (("curvature", "no_learnable_curvature"), ("scale", "no_learnable_scales"), ("spread", "no_learnable_spread")):
        assert not (knobs[off] and what in names)
    assert not knobs["no_level_descriptors"] or not any("descriptor" in name for name, _ in model.named_parameters())
    assert not (knobs["no_tangent_flow"] or knobs["tangent_flow_type"] == "none" or not knobs["tangent_flow_scale"]) or not any("flow" in name for name, _ in model.named_parameters())
    assert not knobs["no_level_spread"] or not any("spread" in name for name in model.state_dict())


def test_numbers_that_are_kept_are_buffers():
    model = made(no_learnable_curvature=True, no_learnable_scales=True, no_learnable_spread=True)
    raw = {name for name in model.state_dict() if name.endswith("raw")}
    assert len(raw) == 9 and raw == {name for name, _ in model.named_buffers()} and not raw & {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("what", [w for w in OFF if w])
def test_each_ablation_keeps_the_shapes_and_lives(what):
    config = WuBuConfig(**SMALL)
    torch.manual_seed(0)
    model = ablated(config, what, 6)
    assert model(torch.randn(2, 3, 6)).shape == (2, 3, 24) and [s.shape[-1] for s in model.states(torch.randn(2, 6))] == [8, 12, 4]
    assert dead(model, torch.randn(9, 6)) == []


@pytest.mark.parametrize("dims, input_dim", [([128, 64, 32], 256), ([32, 16, 8], 64), ([16], 5)])
def test_plain_network_has_as_many_parameters(dims, input_dim):
    config = WuBuConfig(num_levels=len(dims), hyperbolic_dims=dims)
    state = torch.random.get_rng_state()
    wanted = parameters(WuBuLevels(config, input_dim))
    torch.random.set_rng_state(state)
    assert abs(parameters(matched(config, input_dim)) - wanted) <= sum(dims) + 1  # half a step of the hidden width


# --- configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, bad, says", [
    ("hyperbolic_dims", [8, 8], "needs 3, one a level"),
    ("boundary_points_per_level", [5] * 4, "needs 3, one a level"),
    ("initial_spread_values", [1.0], "needs 3, one a level"),
    ("rotation_types", ["so_n"] * 3, "needs 2, one a transition"),
    ("transform_types", [], "needs 2, one a transition"),
    ("transform_hidden_dims", [8], "needs 2, one a transition"),
    ("hyperbolic_dims", [8, 0, 8], "greater than 0"),
    ("boundary_points_per_level", [-1, 5, 5], "greater than -1"),
    ("initial_curvatures", [1.0, 1e-6, 1.0], "curvature_min_value"),
    ("initial_scales", [-1.0, 1.0, 1.0], "scale_min_value"),
    ("initial_spread_values", [None, None, 0.0], "spread_min_value"),
    ("transform_hidden_dims", [None, 0], "greater than 0"),
    ("rotation_types", ["so_n", "so3"], "rotation_types"),
    ("initial_curvatures", [1.0, math.nan, 1.0], "initial_curvatures"),
])
def test_a_list_that_does_not_fit_is_refused_and_changes_nothing(name, bad, says):
    with pytest.raises(KnobError, match=says) as e:
        WuBuConfig(**{name: bad})
    assert name in str(e.value)
    config = WuBuConfig()
    with pytest.raises(KnobError):
        setattr(config, name, bad)
    assert config == WuBuConfig()


def test_lists_follow_the_number_of_levels_unless_given():
    assert WuBuConfig().model_dump() | dict(a=0) == WuBuConfig(num_levels=3).model_dump() | dict(a=0)
    for n in range(1, 7):
        config = WuBuConfig(num_levels=n)
        assert config.hyperbolic_dims == [max(4, 128 >> i) for i in range(n)] and len(config.rotation_types) == n - 1
        assert WuBuConfig(**config.model_dump()) == config
    config = WuBuConfig()
    config.num_levels = 5
    assert len(config.initial_scales) == 5
    with pytest.raises(KnobError, match="hyperbolic_dims"):
        WuBuConfig(num_levels=2, hyperbolic_dims=[128, 64, 32])


def test_defaults_are_those_of_the_table():
    c = WuBuConfig()
    assert (c.num_levels, c.hyperbolic_dims, c.boundary_points_per_level) == (3, [128, 64, 32], [5, 5, 5])
    assert c.initial_curvatures == c.initial_scales == [1, 1, 1] and c.initial_spread_values is None
    assert c.curvature_min_value == c.scale_min_value == c.spread_min_value == 1e-5 and c.level_descriptor_init_scale == 0.01
    assert (c.rotation_types, c.transform_types, c.transform_hidden_dims) == (["so_n"] * 2, ["mlp"] * 2, [None] * 2)
    assert (c.tangent_flow_type, c.tangent_flow_scale, c.relative_vector_aggregation, c.aggregation_method, c.dropout) == ("mlp", 1.0, "mean", "concat_tangent", 0.1)
    assert not any(v for k, v in c.model_dump().items() if k.startswith("no_"))


@pytest.mark.parametrize("knobs", [dict(rotation_types=["quat", "so_n"]), dict(transform_types=["mlp", "quat"])])
def test_quaternions_need_dimensions_divisible_by_four(knobs):
    with pytest.raises(ValueError, match="divisible by 4"):
        made(hyperbolic_dims=[6, 8, 6], **knobs)


# --- the stack -----------------------------------------------------------------------------------------------------


def test_same_seed_same_bits_and_the_state_travels():
    one, two, other = made(1), made(1), made(2)
    x = torch.randn(3, 4, 6)
    assert torch.equal(one(x), two(x)) and not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))


def test_vectors_do_not_see_each_other():
    model, x = made().double(), torch.randn(5, 6, dtype=torch.float64)
    y = x.clone()
    y[2] += 1
    same = (model(x) - model(y)).abs().amax(-1) < 1e-14
    assert same.tolist() == [True, True, False, True, True]
    assert torch.allclose(model(x[None, :, None]).flatten(0, 2), model(x), atol=1e-14) and model(x[:0]).shape == (0, 24) and torch.allclose(model(x[0]), model(x)[0], atol=1e-14)


def test_float64_gradients_by_differences():
    model = made(boundary_points_per_level=[2, 2, 2]).double()
    for r in model.rotations:
        torch.nn.init.normal_(r.a, std=0.3)
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    names, values = zip(*model.named_parameters())
    call = lambda x, *w: torch.func.functional_call(model, dict(zip(names, w)), (x,))
    assert torch.autograd.gradcheck(call, (x, *[v.detach().clone().requires_grad_() for v in values]), fast_mode=True)


def test_autocast_leaves_the_geometry_in_float32():
    model, x = made(), torch.randn(4, 6)
    plain = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(x)
        assert model(x.bfloat16()).dtype == torch.float32 and torch.equal(model(x, model.frames()), plain)
    assert cast.dtype == torch.float32 and torch.equal(cast, plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert dead(model, x) == []


@given(st.floats(-4.9, 4), st.floats(-4.9, 4), st.floats(-8, 8), st.sampled_from([Hyperbolic, Flat]))
@settings(max_examples=60, deadline=None, database=None)
def test_float32_stays_finite_at_the_extremes(c, s, size, world):
    model = made(initial_curvatures=[1.0, 10**c, 1.0], initial_scales=[1.0, 10**s, 10**-s], world=world, scale_min_value=1e-6)
    out = model(10**size * torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
    out.square().mean().backward()
    assert out.isfinite().all() and all(w.grad.isfinite().all() for w in model.parameters())


def test_curvature_is_more_than_a_factor():
    "A level with another curvature gives outputs that no factor turns into the first ones; so do scale and spread."
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    for i, (name, value) in itertools.product(range(3), (("set_curvature", 4.0), ("set_scale", 3.0), ("set_spread", 0.7))):
        model = made()
        before = model.states(x)
        getattr(model, name)(i, value)
        after = model.states(x)
        for j in range(3):
            a, b = before[j].flatten(), after[j].flatten()
            off = (a - b * (a @ b) / (b @ b)).norm() / a.norm()
            carried = name == "set_spread" and j == i + 1  # inherited landmarks bring their spread
            assert (off > 1e-3) if j >= i else off < 1e-6, (i, name, j, carried)


def test_between_levels_the_relative_position_in_the_ball_is_kept():
    model = made(initial_curvatures=[0.5, 2.0, 1.0], initial_scales=[1.0, 0.3, 2.0], rotation_types=["identity", "so_n"])
    v = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    wanted = tangent_dilate(v, model.c[0], model.s[0], model.c[1], model.s[1])
    assert torch.allclose(model.frames()[1].turn * v, wanted, rtol=1e-6)
    assert torch.allclose(torch.linalg.matrix_norm(model.frames()[2].turn, 2), model.c[1].sqrt() * model.s[1] / (model.c[2].sqrt() * model.s[2]), rtol=1e-5)


def test_a_landmark_is_more_than_a_bias():
    "Moving one landmark moves different vectors differently, at its own level and where it is inherited."
    model = made(no_level_descriptors=True, boundary_points_per_level=[1, 0, 0])
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model.states(x)
        model.levels[0].boundary += 0.2
        for old, new in zip(before[:2], model.states(x)):
            change = new - old
            assert (change - change.mean(0)).norm() > 0.1 * change.norm() > 0


@pytest.mark.parametrize("name, value", [("set_curvature", 0.0), ("set_curvature", math.nan), ("set_scale", -1.0), ("set_spread", math.inf), ("set_spread", 1e-5)])
def test_a_number_out_of_range_is_refused_and_changes_nothing(name, value):
    model = made()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="not allowed"):
        getattr(model, name)(1, value)
    with pytest.raises(IndexError, match="levels are 0 to 2"):
        getattr(model, name)(3, 1.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("value", [1.1e-5, 1e-3, 1.0, 50.0, 1e4])
def test_a_number_that_is_set_is_read_back(value):
    model, other = made(), made()
    for i, (set_, read) in itertools.product(range(3), (("set_curvature", "c"), ("set_scale", "s"), ("set_spread", "sigma"))):
        getattr(model, set_)(i, value)
        assert math.isclose(getattr(model, read)[i].item(), value, rel_tol=1e-5)
    assert all(torch.equal(a, b) for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters()) if not name.endswith("raw"))


def test_spread_that_is_left_out_cannot_be_set():
    model = made(no_level_spread=True)
    assert model.sigma == [None] * 3
    with pytest.raises(ValueError, match="has no spread"):
        model.set_spread(0, 1.0)


def test_wrong_widths_are_refused():
    with pytest.raises(ValueError, match="input_dim=6"):
        made()(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="input_dim=0"):
        WuBuLevels(WuBuConfig(), 0)


# --- landmarks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_landmarks_agree_with_the_ball(seed, dtype, tolerance):
    g = torch.Generator().manual_seed(seed)
    c, s = (torch.rand(2, dtype=torch.float64, generator=g) * 2 + 0.1).to(dtype)
    k = 2 * c.sqrt() * s
    v, b = (torch.randn(n, 5, dtype=torch.float64, generator=g).to(dtype) / 2 for n in (30, 7))
    p, l, one = outward(k * v), outward(k * b), outward(k * b[:1])
    at = Hyperbolic.relate(p, l)
    assert torch.allclose(at.squared.sqrt(), c.sqrt() * tangent_dist(v[:, None], b[None], c, s), rtol=tolerance, atol=tolerance)
    counts, _ = weights(at.squared, torch.ones(7, dtype=dtype))
    ways = tangent_add(-b[None], v[:, None], c, s)
    assert torch.allclose(mean_way(p, l, at, counts) / k, (counts[..., None] * ways).sum(1), rtol=10 * tolerance, atol=10 * tolerance)
    assert torch.allclose(inward(Hyperbolic.translate(one, p), 1 / k), tangent_add(b[:1].expand_as(v), v, c, s), rtol=10 * tolerance, atol=10 * tolerance)


# --- rotations and maps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 17, 128])
@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_cayley_is_a_rotation(n, scale, dtype, tolerance):
    a = scale * torch.randn(n * (n - 1) // 2, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).to(dtype)
    R = cayley(skew(a, n))
    assert (R.T @ R - torch.eye(n, dtype=dtype)).abs().max() < tolerance and abs(torch.linalg.det(R.double()) - 1) < 1e-4


@given(st.integers(2, 9), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None, database=None)
def test_every_rotation_near_the_identity_is_reached(n, seed):
    a = torch.randn(n * (n - 1) // 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    R, eye = torch.matrix_exp(skew(a / max(1, a.norm()), n)), torch.eye(n, dtype=torch.float64)
    A = 2 * torch.linalg.solve(R + eye, R - eye, left=False)
    assert torch.allclose(A, -A.T, atol=1e-9) and torch.allclose(cayley(A), R, atol=1e-9)


@pytest.mark.parametrize("kind", ["so_n", "quat"])
def test_rotations_keep_lengths_and_learn(kind):
    torch.manual_seed(0)
    r, x = rotation(kind, 8), torch.randn(7, 8)
    (w,) = r.parameters()
    torch.nn.init.normal_(w)
    assert torch.allclose(r(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-5) and torch.allclose(r(x) @ r(x).T, x @ x.T, atol=1e-4)
    (r(x) * torch.randn(7, 8)).sum().backward()
    assert w.grad.abs().max() > 1e-3


def test_rotation_is_not_absorbed():
    "With an mlp map, turning before it is not what other weights of the map would do: what is kept is turned."
    torch.manual_seed(0)
    t, r, x = TangentMap("mlp", 8, 4).double(), SpecialOrthogonal(8).double(), torch.randn(50, 8, dtype=torch.float64)
    torch.nn.init.normal_(r.a)
    hidden = t.network[0]
    turned = torch.nn.Linear(8, hidden.out_features).double()
    turned.weight.data, turned.bias.data = (hidden.weight @ r.now()).detach(), hidden.bias.data  # the only way to take R into the first layer
    absorbed = t.ratio * x[:, :4] + t.network[3](t.network[1](turned(x)))
    assert not torch.allclose(t(r(x)), absorbed, atol=0.1)
    assert torch.allclose(t(r(x)) - t.ratio * r(x)[:, :4], absorbed - t.ratio * x[:, :4], atol=1e-12)


def test_unknown_kinds_and_dimensions():
    for f in (lambda: rotation("so3", 8), lambda: TangentMap("conv", 8, 8), lambda: QuaternionRotation(6), lambda: QuaternionLinear(8, 6), lambda: rotation("quat", 1)):
        with pytest.raises(ValueError):
            f()
    assert not list(rotation("so_n", 1).parameters())


# --- the kernel for a few vectors ----------------------------------------------------------------------------------


@given(configs(), st.integers(1, 32), st.integers(0, 99))
@settings(max_examples=60, deadline=None, database=None)
def test_the_kernel_agrees_with_the_tensors(knobs, rows, seed):
    if kernel() is None:
        pytest.skip("no compiler")
    torch.manual_seed(seed)
    model = WuBuLevels(WuBuConfig(**knobs), 7).eval()
    for name, w in model.named_parameters():
        if name.endswith((".a", ".pq", "bias")):
            torch.nn.init.normal_(w, std=0.3)
    x = 3 * torch.randn(rows, 7)
    with torch.no_grad():
        frames = model.frames()
        assert model.compiled(x, frames) and not model.compiled(x, None)
        for fast, slow in zip(model.packed(frames)(x), model.walk(x, frames)):
            assert torch.allclose(fast, slow, rtol=1e-4, atol=1e-4 * slow.abs().max())
        alone = torch.cat([model(row, frames) for row in x.split(1)])
        assert torch.equal(alone, model(x, frames))  # the kernel takes rows one by one


def test_the_kernel_is_used_only_where_it_may_be():
    model, x = made().eval(), torch.randn(4, 6)
    frames = model.frames()
    assert not model.compiled(x, frames)  # something may be differentiated
    with torch.no_grad():
        assert not model.compiled(torch.randn(33, 6), frames) and not model.compiled(x.double(), frames)
        assert not model.train().compiled(x, frames) and not made(world=Flat).eval().compiled(x, frames)
