"Measures and costs against computations by hand, whole and pruned; what they leave untouched, and what they refuse."
import itertools
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from adaptive_lab.controller import costs, measures
from adaptive_lab.controller.costs import cache_bytes, flops, latency, open_parts, parameters, part_flops, part_parameters, speed_up, timings, weight_bytes
from adaptive_lab.controller.masks import contributions
from adaptive_lab.controller.measures import attention_entropy, closing_costs, distinct, evaluate, fisher, gate_gradients, generation_quality, measure, repetition, signals
from adaptive_lab.controller.model import AdaptiveTransformer, Gates
from adaptive_lab.sampling import at_rest

L, H, T = 3, 2, 10
PRUNINGS = ((), ((0, 0), (1, "ffn"), (2, 1)), ((0, "layer"), (1, 0), (1, 1)), ((0, "layer"), (1, "layer"), (2, "layer")))


def made(pruning=(), seed=0, dtype=torch.float64, removed=True, **how):
    torch.manual_seed(seed)
    m = AdaptiveTransformer(num_layers=L, num_heads=H, dim=12, context=T, **how).to(dtype)
    with torch.no_grad():
        m.logits.weight.mul_(2)
    for part in pruning:
        m.set_gate(*part, 0)
    if removed:
        m.prune()
    return m


def windows(n=7, length=T, seed=0):
    b = torch.randint(0, 256, (n, length + 1), generator=torch.Generator().manual_seed(seed))
    return b[:, :-1], b[:, 1:]


def loss_of(m, x, t, gates=None):
    "The mean loss of one window."
    return cross_entropy(m(x[None], gates)[0], t)


def same(a, b, **how):
    return all(torch.allclose(x, z, equal_nan=True, **how) for x, z in zip(a, b))


# Quality


@pytest.mark.parametrize("pruning", PRUNINGS)
def test_evaluation_by_hand(pruning):
    m, (X, y) = made(pruning), windows()
    with at_rest(m):
        loss = sum(loss_of(m, x, t).item() for x, t in zip(X, y)) / len(X)
        right = sum((m(x[None])[0].argmax(-1) == t).sum().item() for x, t in zip(X, y)) / X.numel()
    got = evaluate(m, X, y)
    assert got == pytest.approx(dict(loss=loss, perplexity=math.exp(loss), bits_per_byte=loss / math.log(2), accuracy=right))
    assert got == pytest.approx(evaluate(m, X.to(torch.uint8), y.int()))


def test_each_window_may_have_its_own_gates(monkeypatch):
    m, (X, y), rng = made(), windows(), torch.Generator().manual_seed(1)
    rows = Gates(*(torch.rand(7, *g.shape, generator=rng, dtype=torch.float64) for g in m.gates))
    with at_rest(m):
        loss = sum(loss_of(m, x, t, Gates(*(g[i] for g in rows))).item() for i, (x, t) in enumerate(zip(X, y))) / 7
    monkeypatch.setattr(measures, "AT_ONCE", 3)
    assert evaluate(m, X, y, rows)["loss"] == pytest.approx(loss)


def test_a_huge_loss_has_a_finite_perplexity():
    m, (X, y) = made(), windows()
    with torch.no_grad():
        m.logits.weight.mul_(1e6)
    assert math.isfinite(evaluate(m, X, y)["perplexity"])


@pytest.mark.parametrize("n", range(1, 9))
def test_grams_are_told_apart_by_every_byte(n):
    x = torch.full((1, n), 255)
    others = torch.cat([x, *(x.clone().index_fill_(1, torch.tensor([i]), v) for i in range(n) for v in (0, 127, 128, 254))])
    assert distinct(others, n) == 1 and distinct(x.expand(5, -1), n) == 1 / 5


def test_counts_of_hand():
    a = torch.tensor([list(b"aaaa"), list(b"abcd")])
    assert distinct(a, 1) == 4 / 8 and distinct(a, 2) == 4 / 6 and repetition(a, 1) == 3 / 8 and repetition(a, 4) == 0
    assert generation_quality(a) == {"distinct_1": 0.5, "distinct_2": 4 / 6, "distinct_3": 3 / 4, "repetition_4": 0}


# Parts


@pytest.mark.parametrize("pruning", PRUNINGS)
def test_the_signals_by_hand(pruning, monkeypatch):
    "Window by window: contributions of heads as leaves of their own, and an ordinary backward pass for weights."
    monkeypatch.setattr(measures, "AT_ONCE", 3)
    m, (X, y) = made(pruning), windows()
    got = signals(m, X, y)
    m.eval()
    shape = (len(X), L, H)
    slope, places, size = (torch.full(shape, math.nan, dtype=torch.float64) for _ in range(3))
    each = gate_gradients(m, X, y)
    for b, (x, t) in enumerate(zip(X, y)):
        for i in range(L):
            a, place, norm = by_place(m, x, t, i)
            there = m.present_heads[i]
            slope[b, i, there], places[b, i, there], size[b, i, there] = a[there], place[there], norm[there]
    assert torch.allclose(each.heads, slope, equal_nan=True)
    assert torch.allclose(got["gate_gradient"].heads, slope.mean(0), equal_nan=True)
    assert torch.allclose(got["importance"].heads, slope.abs().mean(0), equal_nan=True)
    assert torch.allclose(got["activation_gradient"].heads, places.mean(0), equal_nan=True)
    assert torch.allclose(got["activation"].heads, size.mean(0), equal_nan=True)
    for i in m.present_ffn.nonzero().flatten().tolist():
        slope, place, norm = zip(*(by_place_of_ffn(m, x, t, i) for x, t in zip(X, y)))
        assert torch.allclose(each.ffn[:, i], torch.stack(slope)) and torch.isclose(got["importance"].ffn[i], torch.stack(slope).abs().mean())
        assert torch.isclose(got["activation_gradient"].ffn[i], torch.stack(place).mean()) and torch.isclose(got["activation"].ffn[i], torch.stack(norm).mean())


def by_place(m, x, t, layer):
    "Of each head of a layer: ∂L/∂gate, its absolute value place by place, and the mean norm of what it writes."
    with torch.no_grad():
        h = m.embed(x[None])
        for i in range(layer):
            h = m.blocks[i](h, *m.layer_gates(m.gates, i))
        c = contributions(m, layer, h)
    c = c.clone().requires_grad_()
    g = h + c.sum(0)
    g = g + m.blocks[layer].transform(g) if m.present_ffn[layer] else g
    for i in range(layer + 1, L):
        g = m.blocks[i](g, *m.layer_gates(m.gates, i))
    delta = torch.autograd.grad(cross_entropy(m.read_out(g)[0], t), c)[0]
    product = (c * delta).sum(-1).detach()  # (heads, 1, T)
    return product.sum((1, 2)), product.abs().sum((1, 2)), c.detach().norm(dim=-1).mean((1, 2))


def by_place_of_ffn(m, x, t, layer):
    "The same of a layer's feed-forward network."
    with torch.no_grad():
        h = m.embed(x[None])
        for i in range(layer):
            h = m.blocks[i](h, *m.layer_gates(m.gates, i))
        h = h + contributions(m, layer, h).sum(0)
        c = m.blocks[layer].transform(h)
    c.requires_grad_()
    g = h + c
    for i in range(layer + 1, L):
        g = m.blocks[i](g, *m.layer_gates(m.gates, i))
    product = (c * torch.autograd.grad(cross_entropy(m.read_out(g)[0], t), c)[0]).sum(-1).detach()
    return product.sum(), product.abs().sum(), c.detach().norm(dim=-1).mean()


@pytest.mark.parametrize("pruning", PRUNINGS)
def test_norms_by_an_ordinary_backward_pass(pruning):
    m, (X, y) = made(pruning), windows()
    got = signals(m, X, y)
    m.eval()
    cross_entropy(m(X).flatten(0, 1), y.flatten()).backward()
    for name, of in (("gradient_norm", lambda p: p.grad), ("magnitude", lambda p: p.detach())):
        for i, block in enumerate(m.blocks):
            squares = []
            for row, h in enumerate(m.present_heads[i].nonzero().flatten()):
                squares.append(of(block.attention.qkv)[:, row].square().sum() + of(block.attention.out)[row].square().sum())
                assert torch.isclose(got[name].heads[i, h], squares[-1].sqrt())
            if m.present_ffn[i]:
                squares.append(of(block.ffn.up.weight).square().sum() + of(block.ffn.down.weight).square().sum())
                assert torch.isclose(got[name].ffn[i], squares[-1].sqrt())
            assert torch.isclose(got[name].layers[i], sum(squares, torch.tensor(0.0)).double().sqrt()) if squares else got[name].layers[i].isnan()


@pytest.mark.parametrize("pruning", PRUNINGS[1:])
def test_what_is_left_is_measured_as_behind_closed_gates(pruning):
    X, y = windows()
    gone, shut = (made(pruning, removed=r) for r in (True, False))
    for f in (signals, lambda *a: {"costs": closing_costs(*a), "entropy": [attention_entropy(a[0], a[1])]}):
        for name, grids in f(gone, X, y).items():
            for grid, whole in zip(grids[:2] if name == "magnitude" else grids, f(shut, X, y)[name]):
                assert torch.allclose(grid.where(~grid.isnan(), 0), whole.where(~grid.isnan(), 0)), name
    assert all(grid.heads[~gone.present_heads].isnan().all() and not grid.heads[gone.present_heads].isnan().any() for grid in signals(gone, X, y).values())


@pytest.mark.parametrize("kind, at", (("heads", (1, 0)), ("ffn", (2,)), ("layers", (0,))))
def test_gate_gradients_are_differences_of_losses(kind, at):
    m, (X, y), e = made(), windows(), 1e-5
    each, losses = gate_gradients(m, X, y), []
    for d in (e, -e):
        gates = Gates(*(g.clone() for g in m.gates))
        getattr(gates, kind)[at] += d
        with at_rest(m):
            losses.append(torch.stack([loss_of(m, x, t, gates) for x, t in zip(X, y)]))
    assert torch.allclose(getattr(each, kind)[(slice(None), *at)], (losses[0] - losses[1]) / (2 * e), atol=1e-8)


def test_a_closed_gate_has_a_gradient():
    m, (X, y) = made(), windows()
    m.set_gate(1, 0, 0), m.set_gate(1, "ffn", 0), m.set_gate(1, "layer", 0.5)
    got = signals(m, X, y)
    assert all(got[name].heads[1, 0] > 0 and got[name].ffn[1] > 0 for name in ("importance", "activation", "activation_gradient"))
    assert (got["importance"].heads <= got["activation_gradient"].heads).all() and (got["importance"].ffn <= got["activation_gradient"].ffn).all()
    assert got["gradient_norm"].heads[1, 0] == got["gradient_norm"].ffn[1] == 0 and closing_costs(m, X, y).heads[1, 0] == 0


def test_in_windows_of_one_byte_no_places_can_cancel():
    m, (X, y) = made(), windows(length=1)
    m.set_gate(1, "layer", 0.5), m.set_gate(0, "ffn", 0.3), m.set_gate(2, 1, 0.7)
    got = signals(m, X, y)
    assert same(got["importance"][:2], got["activation_gradient"][:2]) and (got["importance"].ffn > 0).all()


def test_entropy_is_one_for_even_attention_and_zero_for_one_place():
    m, (X, _) = made(), windows()
    with torch.no_grad():
        m.blocks[0].attention.qkv[0, 0] = 0
        m.blocks[1].attention.qkv[:2, 1] *= 1e6
    e = attention_entropy(m, X)
    assert e[0, 0].item() == pytest.approx(1) and e[1, 1] < 1e-3 and ((0 <= e) & (e <= 1 + 1e-12)).all()
    assert attention_entropy(m, X[:, :1]).isnan().all()


def test_the_curvature_is_that_of_the_likelihood():
    "T times the Fisher matrix of drawn bytes is the mean over bytes of Jᵀ (diag p − p pᵀ) J, J the logits' derivative by the gates."
    m, (X, _) = made(), windows(3)
    ones, e = torch.ones(L, dtype=torch.float64), 1e-5
    with at_rest(m):
        logits = lambda g: m(X, Gates(g.view(L, H), ones, ones)).flatten(0, 1)
        J = torch.stack([(logits(1 + d) - logits(1 - d)) / (2 * e) for d in e * torch.eye(L * H, dtype=torch.float64)], -1)  # (bytes, 256, m)
        p = m(X).softmax(-1).flatten(0, 1)
    exact = (torch.einsum("nci,nc,ncj->ij", J, p, J) - torch.einsum("ni,nj->ij", *[torch.einsum("nci,nc->ni", J, p)] * 2)) / len(p)
    got, generator = 0, torch.Generator().manual_seed(0)
    for _ in range(5):
        got = got + T * fisher(gate_gradients(m, X.repeat(100, 1), generator).heads) / 5
    assert (got - exact).norm() < 0.1 * exact.norm()
    assert torch.equal(got, got.T) and torch.linalg.eigvalsh(got).min() > -1e-12


def test_closing_costs_are_slope_and_curvature_along_the_way_to_zero():
    m, (X, y) = made(), windows()
    m.set_gate(0, 1, 0.5), m.set_gate(2, "layer", 0.25), m.set_gate(1, "ffn", 0)
    got, generator = closing_costs(m, X, y, draws=2), torch.Generator().manual_seed(0)
    slopes, curved = gate_gradients(m, X, y), [gate_gradients(m, X, generator) for _ in range(2)]
    for g, cost, slope, a, b in zip(m.gates, got, slopes, *curved):
        curvature = T * (a.square().mean(0) + b.square().mean(0)) / 2
        assert torch.allclose(cost, -g * slope.mean(0) + g**2 * curvature / 2)
    assert got.ffn[1] == 0 and same(got, closing_costs(m, X, y, draws=2)) and not same(got, closing_costs(m, X, y, draws=2, generator=generator))


# Costs


@pytest.mark.parametrize("pruning, batch, length, before", [(p, b, t, n) for p in PRUNINGS for b, t, n in ((1, T, 0), (3, 1, 0), (2, 4, 6), (1, 1, 9))])
def test_operations_as_torch_counts_them(pruning, batch, length, before):
    shut, gone = (made(pruning, removed=r) for r in (False, True))
    left, cache, x = open_parts(shut), gone.new_cache(), torch.zeros(batch, T, dtype=torch.int64)
    with at_rest(gone), sdpa_kernel(SDPBackend.MATH):
        if before:
            gone(x[:, :before], cache=cache)
        with FlopCounterMode(display=False) as counter:
            gone(x[:, :length], cache=cache)
    counted = counter.get_total_flops()
    assert flops(gone, batch, length, before) == flops(shut, batch, length, before, left) == counted
    assert parameters(gone) == parameters(shut, left) == sum(p.numel() for p in gone.parameters())
    assert weight_bytes(gone) == 8 * parameters(gone)
    assert cache_bytes(gone, batch) == cache_bytes(shut, batch, left) == sum(c._kept.nbytes for c in cache if c.length)


def test_the_price_of_a_layer_is_that_of_its_parts():
    m = made()
    for price in (part_parameters(m), part_flops(m, 5)):
        assert torch.equal(price.layers, price.heads.sum(-1) + price.ffn)


def test_models_take_turns_and_the_clock_is_divided_by_the_calls():
    "A clock that a model moves: the second takes three times as long as the first."
    now, order = [0.0], []

    class Slow(torch.nn.Module):
        def __init__(self, name, seconds):
            super().__init__()
            self.name, self.seconds = name, seconds

        def forward(self, x):
            order.append(self.name)
            now[0] += self.seconds

    a, b, x = Slow("a", 0.001), Slow("b", 0.003), torch.zeros(1, 1)
    found = timings([a, b], x, 4, clock=lambda: now[0])
    assert torch.allclose(found, torch.tensor([[0.001, 0.003]], dtype=torch.float64).expand(4, 2))
    assert order[-12:] == list("aab" + "baa" + "aab" + "baa")
    assert latency(b, x, 3, lambda: now[0]) == pytest.approx(0.003) and speed_up(a, b, x, 3, lambda: now[0]) == pytest.approx(3)


# measure


def test_everything_that_is_asked_for():
    m, (X, y) = made(PRUNINGS[1], dtype=torch.float32), windows()
    quick = measure(m, X, y)
    assert quick == measure(m, X, y) and all(isinstance(v, (int, float)) for v in quick.values())
    assert quick["pruned_percentage"] == 2 / 6 and quick["flops"] == flops(m, 1, T) and quick["parameters"] == parameters(m)
    more = measure(m, X, y, samples=3, repeats=1)
    assert set(more) - set(quick) == {"distinct_1", "distinct_2", "distinct_3", "repetition_4", "latency"} and more["latency"] > 0
    assert {k: more[k] for k in quick} == quick and more["distinct_3"] == measure(m, X, y, samples=3)["distinct_3"]
    assert len({measure(m, X, y, samples=3, seed=s)["distinct_1"] for s in range(4)}) > 1


def test_a_closed_layer_shuts_its_heads_and_other_gates_count_too():
    m, (X, y) = made(), windows()
    gates = Gates(torch.tensor([[1, 0.1], [1, 1], [0, 1]]), torch.ones(L), torch.tensor([1.0, 0, 1]))
    got, whole = measure(m, X, y, gates), measure(m, X, y)
    price = part_flops(m, T)
    assert got["pruned_percentage"] == 0.5 and got["flops"] == whole["flops"]
    assert got["pruned_flops"] == pytest.approx((3 * price.heads[0, 0] + price.ffn[0]).item() / price.layers.sum().item())
    for i, row in enumerate(gates.heads.tolist()):
        for h, value in enumerate(row):
            m.set_gate(i, h, value)
    m.set_gate(1, "layer", 0)
    assert measure(m, X, y) == pytest.approx(got)
    m.prune()
    assert measure(m, X, y)["pruned_flops"] == pytest.approx(got["pruned_flops"]) and measure(m, X, y)["flops"] == pytest.approx(whole["flops"] - got["pruned_flops"] * price.layers.sum().item())


def test_nothing_is_left_behind():
    m, (X, y) = made(dropout=0.5), windows()
    m.blocks[1].eval(), m.blocks[0].attention.qkv.requires_grad_(False)
    m.logits.weight.grad = torch.ones_like(m.logits.weight)
    modes, state, random = [x.training for x in m.modules()], {n: t.clone() for n, t in m.state_dict().items()}, torch.get_rng_state()
    with torch.no_grad():  # as somebody may call it
        first = signals(m, X, y)
    measure(m, X, y, samples=2, repeats=1), attention_entropy(m, X), closing_costs(m, X, y)
    assert all(same(first[name], grid) for name, grid in signals(m, X, y).items()) and first["gradient_norm"].heads[0, 0] > 0
    assert modes == [x.training for x in m.modules()] and all(torch.equal(t, state[n]) for n, t in m.state_dict().items())
    assert torch.equal(random, torch.get_rng_state()) and torch.is_grad_enabled()
    assert [n for n, p in m.named_parameters() if p.grad is not None] == ["logits.weight"] and (m.logits.weight.grad == 1).all()
    assert [n for n, p in m.named_parameters() if not p.requires_grad] == ["blocks.0.attention.qkv"] and not any(x._forward_hooks for x in m.modules())


def test_broken_weights_are_named_and_hooks_and_modes_come_back():
    m, (X, y) = made(dropout=0.5), windows()
    with torch.no_grad():
        m.blocks[2].ffn.down.weight[0, 0] = math.inf
    for f in (evaluate, signals, gate_gradients, closing_costs, measure):
        with pytest.raises(ArithmeticError, match="7 of 7 windows is not finite"):
            f(m, X, y)
    assert m.training and not any(x._forward_hooks for x in m.modules())


X0, Y0 = windows(3)
HEADS, LAYERS = torch.ones(L, H), torch.ones(L)


@pytest.mark.parametrize("f", (evaluate, signals, gate_gradients, closing_costs, measure))
@pytest.mark.parametrize(
    "args, word",
    (
        ((X0[:0], Y0[:0]), "no validation data"),
        ((X0[:, :0], Y0[:, :0]), "no validation data"),
        ((X0, Y0[:2]), "do not fit"),
        ((X0[0], Y0[0]), r"X is of shape \(10,\)"),
        ((X0.float(), Y0), "X is of shape .* and torch.float32"),
        ((X0, Y0 > 5), "y is of shape .* and torch.bool"),
        ((X0.tolist(), Y0), "X is a list"),
        ((X0 - 300, Y0), "X holds numbers from"),
        ((X0, Y0 + 250), "y holds numbers from"),
        ((X0.repeat(1, 2), Y0.repeat(1, 2)), "context of 10"),
        ((X0, Y0, Gates(HEADS.T, LAYERS, LAYERS)), r"gates.heads of shape \(2, 3\)"),
        ((X0, Y0, Gates(HEADS, LAYERS[:2], LAYERS)), "gates.ffn"),
        ((X0, Y0, Gates(HEADS.expand(2, L, H), LAYERS, LAYERS)), "gates.heads"),
    ),
)
def test_what_does_not_fit_is_named(f, args, word):
    with pytest.raises(ValueError, match=word):
        f(made(), *args)


@pytest.mark.parametrize(
    "call, word",
    (
        (lambda m: measure(m, X0, Y0, samples=4), "samples=4 .* 0 to 3"),
        (lambda m: measure(m, X0, Y0, samples=-1), "samples=-1"),
        (lambda m: measure(m, X0, Y0, repeats=1.5), "repeats=1.5"),
        (lambda m: measure(m, X0, Y0, Gates(HEADS.expand(3, L, H), LAYERS.expand(3, L), LAYERS.expand(3, L))), "one set of gates"),
        (lambda m: closing_costs(m, X0, Y0, draws=0), "draws=0"),
        (lambda m: flops(m, 1, T + 1), "T=11"),
        (lambda m: flops(m, 1, 0), "T=0"),
        (lambda m: flops(m, 1, 5, 6), "before|T=5"),
        (lambda m: part_flops(m, 2.0), "T=2.0"),
        (lambda m: timings([], X0), "0 models"),
        (lambda m: latency(m, X0, 0), "repeats=0"),
        (lambda m: distinct(X0, 9), "n=9"),
        (lambda m: repetition(X0[:, :3], 4), "n=4"),
        (lambda m: distinct(X0[:0], 1), "one sample"),
    ),
)
def test_counts_out_of_range_are_named(call, word):
    with pytest.raises(ValueError, match=word):
        call(made())
